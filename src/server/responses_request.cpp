// Requests of /v1/responses: items and tools of today's agents.
#include <algorithm>
#include <array>
#include <optional>

#include "server/openai_api.h"
#include "server/openai_fields.h"
#include "server/response_store.h"
#include "server/responses_format.h"
#include "server/sealed_text.h"

namespace hadal::server {
namespace {

/// Reasoning, a message and calls in a row are one turn of the assistant's.
class ItemReader {
 public:
  ItemReader(std::vector<Json>& messages, Notes& notes) : messages_(messages), notes_(notes) {}

  void read(const Fields& item) {
    const std::string type = item.string_or("type", "message");
    if (type == "message") {
      read_message(item);
    } else if (type == "reasoning") {
      read_reasoning(item);
    } else if (type == "function_call") {
      const Json* arguments = item.find("arguments");
      add_call(item.string_or("call_id", ""),
               prompt_name(item.string_or("namespace", ""), item.string("name")),
               arguments != nullptr ? *arguments : js("{}"));
    } else if (type == "custom_tool_call") {
      add_call(item.string_or("call_id", ""),
               prompt_name(item.string_or("namespace", ""), item.string("name")),
               custom_arguments(item.string_or("input", "")));
    } else if (type == "local_shell_call" || type == "shell_call" || type == "apply_patch_call") {
      // Tools that the client runs: the model sees what it asked for.
      const std::string_view detail = item.has("action") ? "action" : "operation";
      const Json* arguments = item.find(detail);
      add_call(item.string_or("call_id", ""), type.substr(0, type.size() - 5),
               arguments != nullptr ? *arguments : Json::object());
    } else if (type.ends_with("_output")) {
      read_output(item);
    } else if (is_passed_over(type)) {
      notes_.push_back(concat(item.path("type"), ": '", type, "' was left out"));
    } else {
      item.fail("type", concat("'", type.substr(0, 40), "' is not supported"));
    }
  }

 private:
  /// What other servers' tools did, and what only those can look up.
  static bool is_passed_over(std::string_view type) {
    constexpr std::array kKnown = {
        "item_reference",        "web_search_call",       "file_search_call", "computer_call",
        "code_interpreter_call", "image_generation_call", "tool_search_call", "compaction",
        "context_compaction"};
    return type.starts_with("mcp_") || std::ranges::find(kKnown, type) != kKnown.end();
  }
  bool last_is_assistant() const {
    return !messages_.empty() && messages_.back().find("role")->text() == "assistant";
  }
  void open_assistant() {
    messages_.push_back(Json::object({{"role", js("assistant")}, {"content", js("")}}));
  }
  void read_message(const Fields& item) {
    const std::string role = item.string("role");
    const std::string text =
        read_text(item, "content", {"input_text", "output_text", "text", "refusal"});
    if (role == "assistant") {
      const bool joins = last_is_assistant() && !messages_.back().find("content")->truthy() &&
                         messages_.back().find("tool_calls") == nullptr;
      if (!joins) open_assistant();
      messages_.back().set("content", js(text));
    } else if (role == "user") {
      messages_.push_back(Json::object({{"role", js(role)}, {"content", js(text)}}));
    } else if (role == "system" || role == "developer") {
      messages_.push_back(Json::object({{"role", js("system")}, {"content", js(text)}}));
    } else {
      item.fail("role", "expected user, assistant, system or developer");
    }
  }
  void read_reasoning(const Fields& item) {
    std::string text = read_text(item, "content", {"reasoning_text", "text"});
    if (text.empty()) text = unseal_text(item.string_or("encrypted_content", "")).value_or("");
    if (text.empty()) text = read_text(item, "summary", {"summary_text"});
    open_assistant();
    messages_.back().set("reasoning_content", js(text));
  }
  void add_call(const std::string& id, const std::string& name, Json arguments) {
    if (!last_is_assistant()) open_assistant();
    Json& message = messages_.back();
    if (message.find("tool_calls") == nullptr) message.set("tool_calls", Json::array());
    message.find("tool_calls")
        ->items()
        .push_back(Json::object(
            {{"id", js(id)},
             {"type", js("function")},
             {"function",
              Json::object({{"name", js(name)}, {"arguments", std::move(arguments)}})}}));
  }
  void read_output(const Fields& item) {
    const Json* output = item.find("output");
    const bool is_text = output == nullptr || output->is_string() || output->is_array();
    std::string text;
    if (!is_text) {
      text = output->dump();
    } else {
      text = read_text(item, "output", {"input_text", "output_text", "text"});
    }
    messages_.push_back(Json::object({{"role", js("tool")},
                                      {"tool_call_id", js(item.string_or("call_id", ""))},
                                      {"content", js(text)}}));
  }

  std::vector<Json>& messages_;
  Notes& notes_;
};

/// The items that a request goes on from, and its own.
std::vector<Json> conversation(const Context& context, const Fields& body) {
  std::vector<Json> items;
  if (body.has("previous_response_id")) {
    if (context.responses == nullptr) {
      body.fail("previous_response_id",
                "responses are not stored (--disk-cache, --response-store); send the items again");
    }
    const std::string id = body.string("previous_response_id");
    auto stored = context.responses->find(id);
    if (!stored) {
      throw RequestError(404,
                         concat("Previous response with id '", id.substr(0, 64), "' not found."),
                         "previous_response_id", "previous_response_not_found");
    }
    items = std::move(stored->items.items());
  }
  const Json* input = body.find("input");
  if (input == nullptr) {
    if (items.empty()) body.fail("input", "expected text or items, found nothing");
    return items;
  }
  if (input->is_string()) {
    items.push_back(Json::object({{"role", js("user")}, {"content", *input}}));
    return items;
  }
  const Json& own = *body.array_or_null("input");
  if (own.items().empty() && items.empty()) body.fail("input", "expected at least one item");
  items.insert(items.end(), own.items().begin(), own.items().end());
  if (items.size() > context.options.max_messages)
    body.fail("input", concat("more than ", context.options.max_messages, " items"));
  return items;
}

void read_input(const Fields& body, const std::vector<Json>& items, ChatJob& chat, Notes& notes) {
  if (body.has("instructions"))
    chat.messages.push_back(
        Json::object({{"role", js("system")}, {"content", js(body.string("instructions"))}}));
  ItemReader reader(chat.messages, notes);
  for (size_t i = 0; i < items.size(); ++i) reader.read(Fields(items[i], concat("input[", i, "]")));
  if (chat.messages.empty()) body.fail("input", "no item says anything");
  settle_system_messages(chat.messages);
  const std::string role = chat.messages.back().find("role")->text();
  if (role != "user" && role != "tool")
    body.fail("input", "the last item must be a message or a function's output, not the model's");
}

void read_include(const Fields& body, ResponseShape& shape) {
  const Json* list = body.array_or_null("include");
  if (list == nullptr) return;
  // Nothing that the others name is ever in an answer.
  constexpr std::array kNeverThere = {"web_search_call.action.sources",
                                      "web_search_call.results",
                                      "file_search_call.results",
                                      "message.input_image.image_url",
                                      "computer_call_output.output.image_url",
                                      "code_interpreter_call.outputs"};
  for (const Json& item : list->items()) {
    const std::string name = item.is_string() ? item.text() : item.dump();
    if (name == "reasoning.encrypted_content") {
      shape.encrypted = true;
    } else if (name == "message.output_text.logprobs") {
      shape.logprobs = true;
    } else if (std::ranges::find(kNeverThere, name) == kNeverThere.end()) {
      body.fail("include", concat("'", name.substr(0, 60), "' is not known"));
    }
  }
}

Json copy_or(const Fields& body, std::string_view key, const Json& fallback) {
  const Json* value = body.find(key);
  return value != nullptr ? *value : fallback;
}

void read_text_format(const Fields& body, ChatJob& chat, ResponseShape& shape) {
  shape.format = Json::object({{"type", js("text")}});
  read_structure(body, chat);
  if (!body.has("text")) return;
  const Fields text = body.object("text");
  if (!text.has("format")) return;
  const Fields format = text.object("format");
  if (chat.format.kind != engine_core::Grammar::Kind::kNone && format.string("type") != "text")
    text.fail("format", "the answer has a form already");
  read_format(format, format, chat);
  shape.format = format.json();
}

}  // namespace

Job response_job(const Context& context, const Json& json) {
  const Fields body(json, "");
  const std::string model = read_model(context, body);
  refuse_unsupported(body, "responses");
  if (body.boolean_or("background", false))
    body.fail("background", "not supported: a response ends with its request");
  ChatJob chat;
  ResponseShape shape;
  chat.default_thinking = context.options.default_thinking;
  std::vector<Json> items = conversation(context, body);
  read_input(body, items, chat, shape.notes);
  shape.previous = copy_or(body, "previous_response_id", Json());
  if (context.responses != nullptr && body.boolean_or("store", true)) {
    shape.keep = [store = context.responses, items = std::move(items)](const std::string& id,
                                                                       const Json& response) {
      Json all = Json::array(items);
      for (const Json& item : response.find("output")->items()) all.items().push_back(item);
      store->put(id, all, response);
    };
  }
  read_openai_tools(context, body, false, chat, shape.names, shape.notes);
  read_openai_tool_choice(body, false, chat, shape.notes);
  read_text_format(body, chat, shape);
  read_thinking(body, chat);
  if (std::string note = settle_thinking(context, chat); !note.empty())
    shape.notes.push_back(std::move(note));
  read_include(body, shape);
  read_sampling(context, body, chat.base);
  read_logit_bias(context, body, chat.base);
  chat.base.stop = read_stop(body, "stop", context.options);
  chat.base.max_tokens = read_max_tokens(body, "max_output_tokens");
  OpenAiFormatOptions unused;
  read_extensions(context, body, chat.base, unused);
  if (unused.token_ids || unused.ids_as_tokens)
    body.fail("return_token_ids", "only chats and completions have them");
  if (unused.sampled_logprobs)
    body.fail("return_sampled_logprobs", "only chats and completions have them");
  const int64_t top = body.integer_or("top_logprobs", 0, 0, 20);
  if (shape.logprobs) chat.base.top_logprobs = top;
  shape.instructions = copy_or(body, "instructions", Json());
  shape.max_output_tokens = copy_or(body, "max_output_tokens", Json());
  shape.temperature = js(chat.base.sampling.temperature);
  shape.top_p = js(body.number_or("top_p", context.options.default_sampling.top_p, 0.0, 1.0));
  shape.effort = chat.effort.empty() ? Json() : js(chat.effort);
  shape.tools = copy_or(body, "tools", Json::array());
  shape.tool_choice = copy_or(body, "tool_choice", js("auto"));
  shape.metadata = copy_or(body, "metadata", Json::object());
  shape.parallel = js(chat.parallel_calls);
  const bool stream = body.boolean_or("stream", false);
  Job job = make_chat_job(context, std::move(chat));
  job.stream = stream;
  job.id = random_id("resp_");
  job.model = model;
  job.format = response_format(context.tokenizer, std::move(shape));
  return job;
}

}  // namespace hadal::server
