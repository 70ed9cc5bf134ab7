#include "apps/chat_session.h"

#include <utility>

#include "base/check.h"
#include "text/utf8.h"

namespace hadal::apps {
namespace {

using text::PyJson;

/// A rollback this long is cheap to keep possible: it covers the reasoning that the next prompt
/// leaves out.
constexpr int64_t kSlack = 1024;

PyJson call_id(int64_t number) { return PyJson::string(concat("call_", number)); }

}  // namespace

ChatSession::ChatSession(const LoadedModel& loaded, ChatSettings settings)
    : loaded_(loaded), settings_(std::move(settings)), sequence_(loaded, kSlack) {
  reset();
}

void ChatSession::reset() {
  messages_ = PyJson::array();
  const bool has_tools = settings_.tools.truthy();
  if (!settings_.system.empty() || has_tools) {
    PyJson message = PyJson::object(
        {{"role", PyJson::string("system")}, {"content", PyJson::string(settings_.system)}});
    if (has_tools) message.set("tools", settings_.tools);
    messages_.items().push_back(std::move(message));
  }
  answered_ = messages_.items().size();
}

void ChatSession::add_user(std::string_view text) {
  messages_.items().push_back(PyJson::object(
      {{"role", PyJson::string("user")}, {"content", PyJson::string(text::repair_utf8(text))}}));
}

void ChatSession::add_tool_result(size_t index, std::string_view text) {
  messages_.items().push_back(
      PyJson::object({{"role", PyJson::string("tool")},
                      {"tool_call_id", call_id(first_call_ + static_cast<int64_t>(index))},
                      {"content", PyJson::string(text::repair_utf8(text))}}));
}

Answer ChatSession::answer(const std::function<void(const text::CompletionEvent&)>& on_event,
                           const StopFunction& stop) {
  const text::ChatPrompt prompt = text::render_chat(messages_, settings_.encoding);
  std::vector<int64_t> ids;
  for (const int32_t id : loaded_.tokenizer.encode(prompt.text, prompt.foreign)) ids.push_back(id);

  const int64_t positions = loaded_.config().max_position_embeddings;
  if (std::ssize(ids) >= positions) {
    messages_.items().resize(answered_);
    throw InputError(concat("the conversation has ", ids.size(), " tokens, the model has ",
                            positions, " positions; the last message is dropped"));
  }
  Answer result;
  result.prompt_tokens = static_cast<int64_t>(ids.size());
  if (settings_.recompute) sequence_.reset();
  text::CompletionParser parser(settings_.encoding.thinking_mode);
  const auto report = [&](const std::vector<text::CompletionEvent>& events) {
    for (const text::CompletionEvent& event : events) on_event(event);
  };
  result.finish = Finish::kInterrupted;
  if (sequence_.set_tokens(ids, stop)) {
    result.finish = decode(
        loaded_, sequence_, settings_.sampling, settings_.max_tokens,
        [&](int64_t token) {
          ++result.tokens;
          report(parser.push(loaded_.tokenizer.token_bytes(static_cast<int32_t>(token))));
          return !parser.malformed();
        },
        stop);
  }
  result.reused_tokens = sequence_.reused();
  std::vector<text::CompletionEvent> held_back;
  result.completion = parser.finish(held_back);
  report(held_back);

  if (result.tokens == 0) {
    messages_.items().resize(answered_);
    return result;
  }
  PyJson message = result.completion.to_json();
  PyJson* calls = message.find("tool_calls");
  if (!result.completion.ok) calls->items().clear();
  first_call_ = num_calls_;
  for (PyJson& call : calls->items()) call.set("id", call_id(num_calls_++));
  messages_.items().push_back(std::move(message));
  answered_ = messages_.items().size();
  return result;
}

}  // namespace hadal::apps
