#include "apps/choice_eval.h"

#include <algorithm>
#include <memory>
#include <span>
#include <utility>

#include "apps/answer_engine.h"
#include "base/check.h"
#include "data/text_source.h"
#include "text/python_json.h"
#include "text/utf8.h"

namespace hadal::apps {
namespace {

using text::PyJson;

constexpr int64_t kChoicesAtOnce = 16;  // requests in the engine

/// Tokens, of which those from `scored` on count.
struct Item {
  std::vector<int64_t> ids;
  int64_t scored = 0;
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

engine_core::Request request_for(Item item) {
  engine_core::Request request;
  request.prompt = std::move(item.ids);
  request.max_tokens = 0;
  request.prompt_logprobs = 0;
  request.prompt_logprobs_from = item.scored;
  return request;
}

ChoiceScore score_of(const Answered& answered, int64_t scored) {
  HADAL_CHECK(answered.prompt_scores, "eval: a prompt without scores");
  ChoiceScore score;
  for (const engine_core::TokenScore& token :
       std::span(*answered.prompt_scores).subspan(static_cast<size_t>(scored))) {
    score.logprob += token.logprob;
    ++score.tokens;
    score.greedy = score.greedy && token.rank == 1;
  }
  return score;
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
  // Choices come back in order, so a question is whole with its last one.
  AnswerEngine engine(loaded, {.at_once = kChoicesAtOnce, .step_tokens = options.step_tokens});
  int64_t lines = 0;
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
    auto question = std::make_shared<Question>();
    question->answer = answer_of(record, choices, origin);
    std::vector<Item> items;
    for (const std::string& choice : choices) {
      question->lengths.push_back(count_characters(choice));
      items.push_back(make_item(loaded, context, choice, options, origin));
    }
    for (Item& item : items) {
      const int64_t scored = item.scored;
      engine.submit(request_for(std::move(item)), [&, question, scored](const Answered& answered) {
        question->choices.push_back(score_of(answered, scored));
        if (question->choices.size() == question->lengths.size()) on_question(*question);
      });
    }
  });
  HADAL_INPUT_CHECK(lines > 0, path, ": holds no question");
  engine.finish();
}

}  // namespace hadal::apps
