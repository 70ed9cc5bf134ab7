#include "apps/chat_session.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "base/check.h"
#include "text/utf8.h"

namespace hadal::apps {
namespace {

using text::PyJson;

PyJson call_id(int64_t number) { return PyJson::string(concat("call_", number)); }

}  // namespace

ChatSession::ChatSession(const LoadedModel& loaded, ChatSettings settings)
    : loaded_(loaded), settings_(std::move(settings)), engine_(loaded, {.max_drafts = 8}) {
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
  taken_.reset();
}

void ChatSession::set_system(const std::string& text) {
  settings_.system = text;
  const bool has_tools = settings_.tools.truthy();
  std::vector<PyJson>& messages = messages_.items();
  const bool there = !messages.empty() && messages[0].find("role")->text() == "system";
  if (there) messages.erase(messages.begin());
  if (!text.empty() || has_tools) {
    PyJson message = PyJson::object(
        {{"role", PyJson::string("system")}, {"content", PyJson::string(text::repair_utf8(text))}});
    if (has_tools) message.set("tools", settings_.tools);
    messages.insert(messages.begin(), std::move(message));
  }
  answered_ = messages.size();
}

void ChatSession::set_messages(PyJson messages, const std::string& name) {
  HADAL_INPUT_CHECK(messages.is_array(), name, ": expected a list of messages, found ",
                    messages.kind_name());
  int64_t calls = 0;
  for (const PyJson& message : messages.items()) {
    const PyJson* role = message.find("role");
    HADAL_INPUT_CHECK(role != nullptr && role->is_string(), name, ": a message without a \"role\"");
    if (const PyJson* list = message.find("tool_calls"); list != nullptr)
      calls += std::ssize(list->items());
  }
  try {
    text::render_chat(messages, settings_.encoding);
  } catch (const InputError& error) {
    throw InputError(concat(name, ": ", error.what()));
  }
  messages_ = std::move(messages);
  answered_ = messages_.items().size();
  num_calls_ = std::max(num_calls_, calls);
  taken_.reset();
  // The system message and the tools are the conversation's from here on.
  const PyJson* first = messages_.items().empty() ? nullptr : &messages_.items()[0];
  const bool system = first != nullptr && first->find("role")->text() == "system";
  const PyJson* content = system ? first->find("content") : nullptr;
  const PyJson* tools = system ? first->find("tools") : nullptr;
  settings_.system = content != nullptr ? content->text() : "";
  settings_.tools = tools != nullptr ? PyJson(*tools) : PyJson();
}

bool ChatSession::take_answer() {
  std::vector<PyJson>& messages = messages_.items();
  if (messages.empty() || messages.back().find("role")->text() == "system") return false;
  if (messages.back().find("role")->text() == "assistant") {
    taken_ = std::move(messages.back());
    messages.pop_back();
    answered_ = messages.size();
  }
  return !messages.empty();
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
    if (taken_) messages_.items().push_back(std::move(*std::exchange(taken_, std::nullopt)));
    answered_ = messages_.items().size();
    throw InputError(concat("the conversation has ", ids.size(), " tokens, the model has ",
                            positions, " positions; the last message is dropped"));
  }
  Answer result;
  result.prompt_tokens = static_cast<int64_t>(ids.size());
  text::CompletionParser parser(settings_.encoding.thinking_mode,
                                {.tools = std::make_shared<text::ToolSchemas>(settings_.tools)});
  const auto report = [&](const std::vector<text::CompletionEvent>& events) {
    for (const text::CompletionEvent& event : events) on_event(event);
  };
  engine_core::Request request;
  request.prompt = std::move(ids);
  request.max_tokens = settings_.max_tokens;
  request.sampling = settings_.sampling;
  request.use_prefix_cache = !settings_.recompute;
  request.structured = true;
  request.thinking = settings_.encoding.thinking_mode == text::ThinkingMode::kThinking;
  const Answered answered = engine_.answer(
      std::move(request),
      [&](const engine_core::OutputToken& token) {
        report(parser.push_token(loaded_.tokenizer, static_cast<int32_t>(token.token)));
      },
      stop);
  result.tokens = std::ssize(answered.tokens);
  result.reused_tokens = answered.cache.cached_tokens;
  result.finish = answered.finish;
  std::vector<text::CompletionEvent> held_back;
  result.completion = parser.finish(held_back);
  report(held_back);

  std::optional<PyJson> taken = std::exchange(taken_, std::nullopt);
  if (result.tokens == 0) {
    messages_.items().resize(answered_);
    if (taken) messages_.items().push_back(std::move(*taken));
    answered_ = messages_.items().size();
    return result;
  }
  PyJson message = result.completion.to_json();
  PyJson* calls = message.find("tool_calls");
  first_call_ = num_calls_;
  for (PyJson& call : calls->items()) call.set("id", call_id(num_calls_++));
  messages_.items().push_back(std::move(message));
  answered_ = messages_.items().size();
  return result;
}

}  // namespace hadal::apps
