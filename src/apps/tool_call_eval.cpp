#include "apps/tool_call_eval.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "apps/answer_engine.h"
#include "base/check.h"
#include "data/text_source.h"
#include "text/chat_format.h"
#include "text/completion_parser.h"

namespace hadal::apps {
namespace {

using text::PyJson;

constexpr int64_t kCallsAtOnce = 16;  // requests in the engine

bool has_calls(const PyJson& message) {
  const PyJson* calls = message.find_set("tool_calls");
  return calls != nullptr && calls->truthy();
}

/// The "function" object of a tool or call, or the value itself where there is none.
const PyJson& function_of(const PyJson& value) {
  const PyJson* function = value.find_set("function");
  return function != nullptr ? *function : value;
}

std::string member_text(const PyJson& value, const char* key) {
  const PyJson* member = value.find_set(key);
  return member != nullptr && member->is_string() ? member->text() : "";
}

/// One dialogue of the file.
struct Dialogue {
  std::vector<PyJson> messages;
  PyJson tools;
  text::ChatOptions encoding;

  Dialogue(const std::string& line, const std::string& origin) {
    const PyJson record = PyJson::parse(line, origin);
    const PyJson* list = record.find_set("messages");
    HADAL_INPUT_CHECK(list != nullptr && list->is_array(), origin,
                      ": expected an object with messages");
    messages = list->items();
    if (const PyJson* offered = record.find_set("tools")) tools = *offered;
    const std::string mode = member_text(record, "thinking_mode");
    encoding.thinking_mode = text::parse_thinking_mode(mode.empty() ? "chat" : mode);
  }

  std::vector<size_t> turns_with_calls() const {
    std::vector<size_t> turns;
    for (size_t i = 0; i < messages.size(); ++i) {
      if (member_text(messages[i], "role") == "assistant" && has_calls(messages[i]))
        turns.push_back(i);
    }
    return turns;
  }

  bool offers(const std::string& name) const {
    return std::any_of(tools.items().begin(), tools.items().end(), [&](const PyJson& tool) {
      return member_text(function_of(tool), "name") == name;
    });
  }
};

engine_core::Request request_for(const LoadedModel& loaded, const Dialogue& dialogue, size_t turn) {
  PyJson messages = PyJson::object(
      {{"messages", PyJson::array({dialogue.messages.begin(),
                                   dialogue.messages.begin() + static_cast<int64_t>(turn)})}});
  if (dialogue.tools.truthy()) messages.set("tools", dialogue.tools);
  const text::ChatPrompt prompt =
      text::render_chat(text::messages_of_request(std::move(messages)), dialogue.encoding);
  engine_core::Request request;
  for (const int32_t id : loaded.tokenizer.encode(prompt.text, prompt.foreign))
    request.prompt.push_back(id);
  request.sampling.temperature = 0;
  return request;
}

text::Completion completion_of(const LoadedModel& loaded,
                               const Dialogue& dialogue,
                               const Answered& answered) {
  text::CompletionParser parser(dialogue.encoding.thinking_mode);
  for (const int64_t token : answered.tokens)
    parser.push_token(loaded.tokenizer, static_cast<int32_t>(token));
  std::vector<text::CompletionEvent> rest;
  return parser.finish(rest);
}

/// Arguments are JSON, but a model may write values that are none.
bool same_json(const std::string& a, const std::string& b) {
  try {
    return PyJson::parse(a, "arguments").dump() == PyJson::parse(b, "arguments").dump();
  } catch (const InputError&) {
    return a == b;
  }
}

void count(const Dialogue& dialogue,
           size_t turn,
           const text::Completion& completion,
           ToolCallScore& score) {
  ++score.turns;
  if (!completion.ok) return;
  ++score.well_formed;
  const auto& calls = completion.tool_calls;
  const bool known =
      !calls.empty() && std::all_of(calls.begin(), calls.end(), [&](const text::ToolCall& call) {
        return dialogue.offers(call.name);
      });
  if (!known) return;
  ++score.known_tool;
  const PyJson& recorded = function_of(dialogue.messages[turn].find("tool_calls")->items().front());
  if (calls.front().name != member_text(recorded, "name")) return;
  ++score.same_tool;
  if (same_json(calls.front().arguments, member_text(recorded, "arguments"))) {
    ++score.same_arguments;
  }
}

}  // namespace

ToolCallScore score_tool_calls(const LoadedModel& loaded,
                               const std::string& path,
                               const ToolCallOptions& options,
                               const std::function<void(const ToolCallScore&)>& progress) {
  ToolCallScore score;
  AnswerEngine engine(loaded, {.at_once = kCallsAtOnce});
  int64_t number = 0;
  data::for_each_line(path, [&](const std::string& line, int64_t line_number) {
    if (number >= options.turns) return;
    const std::string origin = concat(path, ": line ", line_number);
    auto dialogue = std::make_shared<const Dialogue>(line, origin);
    const std::vector<size_t> turns = dialogue->turns_with_calls();
    if (turns.empty()) return;
    const size_t turn = turns[static_cast<size_t>(number++) % turns.size()];
    engine_core::Request request = request_for(loaded, *dialogue, turn);
    request.max_tokens =
        std::min(options.max_tokens, engine.room_behind(std::ssize(request.prompt), origin));
    engine.submit(std::move(request), [&, dialogue, turn](const Answered& answered) {
      count(*dialogue, turn, completion_of(loaded, *dialogue, answered), score);
      progress(score);
    });
  });
  engine.finish();
  HADAL_INPUT_CHECK(score.turns > 0, path, ": no turn of an assistant with tool calls");
  return score;
}

}  // namespace hadal::apps
