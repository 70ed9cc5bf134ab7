#include "apps/choice_eval.h"

#include <algorithm>
#include <iterator>
#include <memory>
#include <span>

#include <ATen/ATen.h>

#include "base/check.h"
#include "base/parallel.h"
#include "data/text_source.h"
#include "ops/sampling/sample.h"
#include "text/python_json.h"
#include "text/utf8.h"

namespace hadal::apps {
namespace {

using text::PyJson;

constexpr int64_t kLogitRows = 512;  // rows of logits that exist at once

/// Tokens, of which those from `scored` on count.
struct Item {
  std::vector<int64_t> ids;
  int64_t scored = 0;
  ChoiceScore* score = nullptr;
};

const std::string& text_of(const PyJson& record, const char* key, const std::string& origin) {
  const PyJson* value = record.find_set(key);
  HADAL_INPUT_CHECK(value != nullptr && value->is_string(), origin, ": expected a text \"", key,
                    "\", found ", value == nullptr ? "nothing" : value->kind_name());
  return value->text();
}

int64_t answer_of(const PyJson& record,
                  const std::vector<std::string>& choices,
                  const std::string& origin) {
  const PyJson* value = record.find_set("answer");
  HADAL_INPUT_CHECK(value != nullptr, origin, ": expected an \"answer\", found nothing");
  if (value->is_string()) {
    const auto found = std::ranges::find(choices, value->text());
    HADAL_INPUT_CHECK(found != choices.end(), origin, ": the answer is none of the choices");
    return found - choices.begin();
  }
  const bool is_index = value->kind() == PyJson::Kind::kInteger && value->text().size() < 10 &&
                        value->text().front() != '-' &&
                        std::stoll(value->text()) < std::ssize(choices);
  HADAL_INPUT_CHECK(is_index, origin, ": expected an answer from 0 to ", choices.size() - 1,
                    " or one of the choices, found ", value->dump());
  return std::stoll(value->text());
}

bool is_space(char32_t c) {
  return c == ' ' || (c >= 9 && c <= 13) || (c >= 0x1C && c <= 0x1F) || c == 0x85 || c == 0xA0 ||
         c == 0x1680 || (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F ||
         c == 0x205F || c == 0x3000;
}

/// Bytes up to and with the last character that is no white space (Python's str.rstrip).
size_t trimmed_size(std::string_view text) {
  size_t size = 0;
  for (size_t pos = 0; pos < text.size();) {
    const text::Utf8Char c = text::decode_utf8(text, pos);
    pos += c.length;
    if (!is_space(c.code_point)) size = pos;
  }
  return size;
}

int64_t count_characters(std::string_view text) {
  return std::ranges::count_if(
      text, [](char c) { return (static_cast<unsigned char>(c) & 0xC0) != 0x80; });
}

Item make_item(const LoadedModel& loaded,
               const std::string& context,
               const std::string& choice,
               const ChoiceOptions& options,
               const std::string& origin) {
  const auto encode = [&](std::string_view text) {
    return loaded.tokenizer.encode(text, options.special_tokens ? text::SpecialTokens::kRecognise
                                                                : text::SpecialTokens::kAsText);
  };
  const std::string_view known = std::string_view(context).substr(0, trimmed_size(context));
  const std::string whole = context + options.delimiter + choice;
  Item item;
  // Something has to stand before the first token that is scored.
  if (options.bos || known.empty()) item.ids.push_back(loaded.config().bos_token_id);
  item.scored = std::ssize(item.ids) + (known.empty() ? 0 : std::ssize(encode(known)));
  for (const int32_t id : encode(whole)) item.ids.push_back(id);
  HADAL_INPUT_CHECK(item.scored < std::ssize(item.ids), origin, ": a choice has no tokens");
  HADAL_INPUT_CHECK(std::ssize(item.ids) <= loaded.config().max_position_embeddings, origin, ": ",
                    item.ids.size(), " tokens, the model takes ",
                    loaded.config().max_position_embeddings);
  return item;
}

/// One forward pass over several items.
void score_items(const LoadedModel& loaded, std::span<const Item> items) {
  std::vector<int64_t> step, lengths, rows, targets;
  std::vector<ChoiceScore*> owners;
  for (const Item& item : items) {
    const auto first = std::ssize(step);
    const auto count = std::ssize(item.ids) - 1;  // the last token predicts nothing that counts
    step.insert(step.end(), item.ids.begin(), item.ids.begin() + count);
    lengths.push_back(count);
    for (int64_t token = item.scored; token <= count; ++token) {
      rows.push_back(first + token - 1);
      targets.push_back(item.ids[static_cast<size_t>(token)]);
      owners.push_back(item.score);
    }
  }
  const at::NoGradGuard no_grad;
  const ops::Batch batch(lengths, std::vector<int64_t>(lengths.size(), 0), at::kCPU);
  model::ForwardContext context;
  context.batch = &batch;
  context.numerics = loaded.numerics;
  const at::Tensor streams = loaded.model.forward(at::tensor(step, at::kLong), context).streams;
  // Ids beyond the tokenizer's have no text and no probability, as in answers.
  const auto known = static_cast<size_t>(loaded.tokenizer.vocab_size());
  for (int64_t begin = 0; begin < std::ssize(rows); begin += kLogitRows) {
    const int64_t end = std::min(begin + kLogitRows, std::ssize(rows));
    const at::Tensor index =
        at::tensor(std::vector<int64_t>(rows.begin() + begin, rows.begin() + end), at::kLong);
    const at::Tensor head =
        loaded.model.head_input(streams.index_select(0, index), loaded.numerics);
    const at::Tensor logits = loaded.model.logits(head, loaded.numerics).contiguous();
    const auto* values = logits.const_data_ptr<float>();
    const int64_t vocab = logits.size(1);
    std::vector<double> own(static_cast<size_t>(end - begin)), best(own.size());
    parallel_for(end - begin, 8, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) {
        const ops::LogSoftmax model(std::span(values + i * vocab, known));
        own[static_cast<size_t>(i)] = model.of(targets[static_cast<size_t>(begin + i)]);
        best[static_cast<size_t>(i)] = model.top(1).front().logprob;
      }
    });
    for (size_t i = 0; i < own.size(); ++i) {
      ChoiceScore& score = *owners[static_cast<size_t>(begin) + i];
      score.logprob += own[i];
      ++score.tokens;
      score.greedy = score.greedy && own[i] == best[i];
    }
  }
}

template <typename Value>
int64_t index_of_best(size_t count, const Value& value) {
  size_t best = 0;
  for (size_t i = 1; i < count; ++i) {
    if (value(i) > value(best)) best = i;
  }
  return static_cast<int64_t>(best);
}

}  // namespace

int64_t Question::best() const {
  return index_of_best(choices.size(), [&](size_t i) { return choices[i].logprob; });
}

int64_t Question::best_by_length() const {
  return index_of_best(choices.size(), [&](size_t i) {
    return choices[i].logprob / static_cast<double>(std::max<int64_t>(lengths[i], 1));
  });
}

void score_choices(const LoadedModel& loaded,
                   const std::string& path,
                   const ChoiceOptions& options,
                   const std::function<void(const Question&)>& on_question) {
  // Questions wait for their items to fill a step; the items point into them.
  std::vector<std::unique_ptr<Question>> waiting;
  std::vector<Item> items;
  int64_t tokens = 0, lines = 0;
  const auto flush = [&] {
    if (!items.empty()) score_items(loaded, items);
    for (const auto& question : waiting) on_question(*question);
    waiting.clear();
    items.clear();
    tokens = 0;
  };
  data::for_each_line(path, [&](const std::string& line, int64_t number) {
    if (options.max_lines > 0 && lines >= options.max_lines) return;
    ++lines;
    const std::string origin = concat(path, ": line ", number);
    const PyJson record = PyJson::parse(line, origin);
    const std::string& context = text_of(record, "context", origin);
    const PyJson* list = record.find_set("choices");
    HADAL_INPUT_CHECK(list != nullptr && list->is_array() && !list->items().empty(), origin,
                      ": expected \"choices\", a list of texts");
    std::vector<std::string> choices;
    for (const PyJson& item : list->items()) {
      HADAL_INPUT_CHECK(item.is_string(), origin, ": expected choices that are texts, found ",
                        item.kind_name());
      choices.push_back(item.text());
    }
    auto question = std::make_unique<Question>();
    question->answer = answer_of(record, choices, origin);
    question->choices.resize(choices.size());
    std::vector<Item> own;
    int64_t own_tokens = 0;
    for (size_t i = 0; i < choices.size(); ++i) {
      question->lengths.push_back(count_characters(choices[i]));
      own.push_back(make_item(loaded, context, choices[i], options, origin));
      own.back().score = &question->choices[i];
      own_tokens += std::ssize(own.back().ids);
    }
    if (tokens > 0 && tokens + own_tokens > options.step_tokens) flush();
    tokens += own_tokens;
    std::ranges::move(own, std::back_inserter(items));
    waiting.push_back(std::move(question));
  });
  HADAL_INPUT_CHECK(lines > 0, path, ": holds no question");
  flush();
}

}  // namespace hadal::apps
