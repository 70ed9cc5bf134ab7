#include "apps/generate_eval.h"

#include <algorithm>

#include "apps/answer_engine.h"
#include "base/check.h"
#include "data/text_source.h"
#include "text/chat_format.h"
#include "text/chat_tokens.h"

namespace hadal::apps {
namespace {

using text::PyJson;

constexpr int64_t kTextsAtOnce = 16;  // requests in the engine

struct Line {
  std::string origin, context, answer;
  std::vector<std::string> stops;
};

std::string member(const PyJson& record, const char* key, const std::string& origin) {
  const PyJson* value = record.find_set(key);
  HADAL_INPUT_CHECK(value != nullptr && value->is_string(), origin, ": expected a text \"", key,
                    "\", found ", value == nullptr ? "nothing" : value->kind_name());
  return value->text();
}

std::vector<std::string> stops_of(const PyJson& record,
                                  const GenerateOptions& options,
                                  const std::string& origin) {
  const PyJson* list = record.find_set("until");
  if (list == nullptr) return options.until;
  std::vector<std::string> stops;
  HADAL_INPUT_CHECK(list->is_array(), origin, ": expected a list \"until\", found ",
                    list->kind_name());
  for (const PyJson& item : list->items()) {
    HADAL_INPUT_CHECK(item.is_string() && !item.text().empty(), origin,
                      ": expected texts in \"until\"");
    stops.push_back(item.text());
  }
  return stops;
}

engine_core::Request make_request(const LoadedModel& loaded,
                                  const std::string& context,
                                  const GenerateOptions& options) {
  engine_core::Request request;
  std::vector<int32_t> ids;
  if (options.chat) {
    const PyJson messages = PyJson::array(
        {PyJson::object({{"role", PyJson::string("user")}, {"content", PyJson::string(context)}})});
    text::ChatOptions encoding;
    encoding.thinking_mode =
        options.thinking ? text::ThinkingMode::kThinking : text::ThinkingMode::kChat;
    const text::ChatPrompt prompt = text::render_chat(messages, encoding);
    ids = loaded.tokenizer.encode(prompt.text, prompt.foreign);
    request.thinking = options.thinking;
  } else {
    if (options.bos) ids.push_back(static_cast<int32_t>(loaded.config().bos_token_id));
    loaded.tokenizer.encode(context, text::SpecialTokens::kAsText, ids);
  }
  request.prompt.assign(ids.begin(), ids.end());
  request.max_tokens = options.max_tokens;
  request.sampling.temperature = 0;
  return request;
}

/// What a reader of the answer sees, as far as it goes before a stop string.
void take_content(const GenerateOptions& options,
                  const std::vector<std::string>& stops,
                  GeneratedAnswer& answer) {
  if (options.thinking) {
    const size_t reasoning = answer.text.find(text::kThinkEnd);
    answer.text.erase(
        0, reasoning == std::string::npos ? reasoning : reasoning + text::kThinkEnd.size());
  }
  size_t end = answer.text.size();
  for (const std::string& stop : stops) end = std::min(end, answer.text.find(stop));
  answer.text.resize(end);
}

std::string_view trimmed(std::string_view text) {
  constexpr std::string_view kSpace = " \t\n\r\f\v";
  const size_t begin = std::min(text.find_first_not_of(kSpace), text.size());
  text.remove_prefix(begin);
  return text.substr(0, text.find_last_not_of(kSpace) + 1);
}

}  // namespace

bool GeneratedAnswer::same_words() const { return trimmed(text) == trimmed(answer); }

void generate_answers(const LoadedModel& loaded,
                      const std::string& path,
                      const GenerateOptions& options,
                      const std::function<void(const GeneratedAnswer&)>& on_answer) {
  // All lines are read first: what is wrong with one shows before the work begins.
  std::vector<Line> lines;
  data::for_each_line(path, [&](const std::string& line, int64_t number) {
    if (options.max_lines > 0 && std::ssize(lines) >= options.max_lines) return;
    const std::string origin = concat(path, ": line ", number);
    const PyJson record = PyJson::parse(line, origin);
    lines.push_back({origin, member(record, "context", origin), member(record, "answer", origin),
                     stops_of(record, options, origin)});
  });
  HADAL_INPUT_CHECK(!lines.empty(), path, ": holds no question");
  AnswerEngine engine(loaded, {.at_once = kTextsAtOnce});
  for (const Line& line : lines) {
    engine_core::Request request = make_request(loaded, line.context, options);
    request.max_tokens =
        std::min(request.max_tokens, engine.room_behind(std::ssize(request.prompt), line.origin));
    // In a chat they are for what the reader sees.
    if (!options.chat) request.stop = line.stops;
    engine.submit(std::move(request), [&](Answered answered) {
      const bool length = answered.finish == Finish::kLength;
      GeneratedAnswer answer{.text = std::move(answered.text),
                             .answer = line.answer,
                             .finish = length ? "length" : "stop",
                             .tokens = std::ssize(answered.tokens)};
      if (options.chat) take_content(options, line.stops, answer);
      on_answer(answer);
    });
  }
  engine.finish();
}

}  // namespace hadal::apps
