// OpenAI's /v1/responses: items in, items out, and a stream of events about them.
#include "server/openai_types.h"
#include "server/responses_format.h"
#include "server/sealed_text.h"
#include "text/utf8.h"

namespace hadal::server {
namespace {

Json output_text(const std::string& text, Json logprobs = Json::array()) {
  return Json::object({{"type", js("output_text")},
                       {"text", js(text)},
                       {"annotations", Json::array()},
                       {"logprobs", std::move(logprobs)}});
}
Json reasoning_text(const std::string& text) {
  return Json::object({{"type", js("reasoning_text")}, {"text", js(text)}});
}

class ResponseFormat final : public Format {
 public:
  ResponseFormat(const text::Tokenizer& tokenizer, ResponseShape shape)
      : tokenizer_(tokenizer),
        shape_(std::move(shape)),
        message_id_(random_id("msg_")),
        reasoning_id_(random_id("rs_")) {}

  bool begins_at_once() const override { return true; }
  void begin(const Answer& answer, std::string& out) override {
    begun_.id = answer.id;
    begun_.model = answer.model;
    begun_.created = answer.created;
    event(out, "response.created", {{"response", response(answer, "in_progress")}});
    event(out, "response.in_progress", {{"response", response(answer, "in_progress")}});
  }
  void text(const Answer& answer,
            size_t index,
            Kind kind,
            const std::string& text,
            std::string& out) override {
    const bool content = kind == Kind::kContent;
    const Open wanted = content ? Open::kMessage : Open::kReasoning;
    if (open_ != wanted) {
      close_item(answer.choices[index], out);
      open_ = wanted;
      const std::string& id = content ? message_id_ : reasoning_id_;
      event(out, "response.output_item.added",
            {{"output_index", js(item_)},
             {"item", content ? message(id, "in_progress", Json::array())
                              : reasoning(id, "in_progress", "")}});
      Members part = place(id);
      part.emplace_back("part", content ? output_text("") : reasoning_text(""));
      event(out, "response.content_part.added", std::move(part));
    }
    Members delta = place(content ? message_id_ : reasoning_id_);
    delta.emplace_back("delta", js(text));
    if (content) {
      delta.emplace_back("logprobs", logprobs(answer.choices[index], sent_));
      sent_ = answer.choices[index].content_tokens_info.size();
    }
    event(out, content ? "response.output_text.delta" : "response.reasoning_text.delta",
          std::move(delta));
  }
  void call_begun(const Answer& answer, size_t index, std::string& out) override {
    const Choice& choice = answer.choices[index];
    close_item(choice, out);
    open_ = Open::kCall;
    event(out, "response.output_item.added",
          {{"output_index", js(item_)}, {"item", function_call(*choice.open_call, "in_progress")}});
  }
  void call_arguments(const Answer& answer,
                      size_t index,
                      const std::string& arguments,
                      std::string& out) override {
    // A custom tool's text is known when its JSON is whole.
    if (name_of(*answer.choices[index].open_call).custom) return;
    event(out, "response.function_call_arguments.delta",
          {{"item_id", js("fc_" + answer.choices[index].open_call->id)},
           {"output_index", js(item_)},
           {"delta", js(arguments)}});
  }
  void call_ended(const Answer& answer, size_t index, std::string& out) override {
    const CallRecord& call = answer.choices[index].calls.back();
    const ToolName name = name_of(call);
    if (name.custom) {
      const std::string input = custom_input(call);
      const Members place = {{"item_id", js("ctc_" + call.id)}, {"output_index", js(item_)}};
      Members delta = place, done = place;
      delta.emplace_back("delta", js(input));
      done.emplace_back("input", js(input));
      event(out, "response.custom_tool_call_input.delta", std::move(delta));
      event(out, "response.custom_tool_call_input.done", std::move(done));
    } else {
      event(out, "response.function_call_arguments.done",
            {{"item_id", js("fc_" + call.id)},
             {"output_index", js(item_)},
             {"name", js(name.name)},
             {"arguments", js(call.arguments)}});
    }
    close_call(call, "completed", out);
  }
  void call_dropped(const Answer& answer, size_t index, std::string& out) override {
    close_item(answer.choices[index], out);
  }
  void finished(const Answer& answer, size_t index, std::string& out) override {
    close_item(answer.choices[index], out);
  }
  void end(const Answer& answer, std::string& out) override {
    const char* status = status_of(answer);
    Json body = response(answer, status);
    if (shape_.keep) shape_.keep(answer.id, body);
    event(out, std::string(status) == "completed" ? "response.completed" : "response.incomplete",
          {{"response", std::move(body)}});
  }
  std::string whole(const Answer& answer) override {
    const Json body = response(answer, status_of(answer));
    if (shape_.keep) shape_.keep(answer.id, body);
    return body.dump();
  }
  HttpResponse error(const RequestError& error) override { return openai_error(error); }
  void stream_error(const RequestError& error, std::string& out) override {
    Json failed = response(begun_, "failed");
    failed.set("error", Json::object({{"code", js("server_error")},
                                      {"message", js(text::repair_utf8(error.what()))}}));
    event(out, "response.failed", {{"response", std::move(failed)}});
  }

 private:
  enum class Open : uint8_t { kNone, kReasoning, kMessage, kCall };

  static const char* status_of(const Answer& answer) {
    const Ending ending = answer.choices.front().ending();
    return ending == Ending::kLength || ending == Ending::kMalformed ? "incomplete" : "completed";
  }
  static Json message(const std::string& id, const char* status, Json content) {
    return Json::object({{"id", js(id)},
                         {"type", js("message")},
                         {"status", js(status)},
                         {"role", js("assistant")},
                         {"content", std::move(content)}});
  }
  Json reasoning(const std::string& id, const char* status, const std::string& text) const {
    Json content = Json::array();
    if (!text.empty()) content.items().push_back(reasoning_text(text));
    Json item = Json::object({{"id", js(id)},
                              {"type", js("reasoning")},
                              {"status", js(status)},
                              {"summary", Json::array()},
                              {"content", std::move(content)}});
    if (shape_.encrypted)
      item.set("encrypted_content", text.empty() ? Json() : js(seal_text(text)));
    return item;
  }
  ToolName name_of(const CallRecord& call) const {
    const auto known = shape_.names.find(call.name);
    return known != shape_.names.end() ? known->second : ToolName{call.name, "", false};
  }
  Json function_call(const CallRecord& call, const char* status) const {
    const ToolName name = name_of(call);
    Json item = Json::object({{"id", js((name.custom ? "ctc_" : "fc_") + call.id)},
                              {"type", js(name.custom ? "custom_tool_call" : "function_call")},
                              {"status", js(status)},
                              {"call_id", js(call.id)}});
    if (!name.space.empty()) item.set("namespace", js(name.space));
    item.set("name", js(name.name));
    const bool begun = call.arguments.empty();
    if (name.custom) {
      item.set("input", js(begun ? std::string() : custom_input(call)));
    } else {
      item.set("arguments", js(call.arguments));
    }
    return item;
  }
  /// Of the output's text, from token `from` on.
  Json logprobs(const Choice& choice, size_t from) const {
    if (!shape_.logprobs) return Json::array();
    return logprob_list(tokenizer_, choice.content_tokens_info, from);
  }
  Json output_part(const Choice& choice) const {
    return output_text(choice.content, logprobs(choice, 0));
  }
  Members place(const std::string& id) const {
    return {{"item_id", js(id)}, {"output_index", js(item_)}, {"content_index", js(int64_t{0})}};
  }
  void event(std::string& out, const char* name, Members members) {
    members.insert(members.begin(), {{"type", js(name)}, {"sequence_number", js(sequence_++)}});
    write_sse(out, Json::object(std::move(members)), name);
  }
  void close_call(const CallRecord& call, const char* status, std::string& out) {
    event(out, "response.output_item.done",
          {{"output_index", js(item_)}, {"item", function_call(call, status)}});
    open_ = Open::kNone;
    ++item_;
  }
  void close_item(const Choice& choice, std::string& out) {
    if (open_ == Open::kNone) return;
    if (open_ == Open::kCall) return close_call(*choice.open_call, "incomplete", out);
    const bool content = open_ == Open::kMessage;
    const std::string& id = content ? message_id_ : reasoning_id_;
    const std::string& text = content ? choice.content : choice.reasoning;
    const Json part = content ? output_part(choice) : reasoning_text(text);
    Members done = place(id);
    done.emplace_back("text", js(text));
    if (content) done.emplace_back("logprobs", logprobs(choice, 0));
    event(out, content ? "response.output_text.done" : "response.reasoning_text.done",
          std::move(done));
    Members closed = place(id);
    closed.emplace_back("part", part);
    event(out, "response.content_part.done", std::move(closed));
    event(out, "response.output_item.done",
          {{"output_index", js(item_)},
           {"item", content ? message(id, "completed", Json::array({part}))
                            : reasoning(id, "completed", text)}});
    open_ = Open::kNone;
    ++item_;
  }
  Json response(const Answer& answer, const char* status) const {
    const bool over = std::string_view(status) != "in_progress";
    Json output = Json::array();
    Json usage, incomplete;
    if (over && !answer.choices.empty()) {
      const Choice& choice = answer.choices.front();
      const Ending ending = choice.ending();
      const bool cut = ending == Ending::kLength || ending == Ending::kMalformed;
      const char* item_status = cut ? "incomplete" : "completed";
      if (!choice.reasoning.empty())
        output.items().push_back(reasoning(reasoning_id_, item_status, choice.reasoning));
      if (!choice.content.empty())
        output.items().push_back(
            message(message_id_, item_status, Json::array({output_part(choice)})));
      for (const CallRecord& call : choice.calls)
        output.items().push_back(function_call(call, "completed"));
      if (choice.open_call)
        output.items().push_back(function_call(*choice.open_call, "incomplete"));
      if (cut)
        incomplete = Json::object(
            {{"reason", js(ending == Ending::kLength ? "max_output_tokens" : "malformed")}});
      const int64_t tokens = answer.completion_tokens();
      usage = Json::object(
          {{"input_tokens", js(answer.prompt_tokens)},
           {"input_tokens_details", Json::object({{"cached_tokens", js(answer.cached_tokens)},
                                                  {"disk_tokens", js(answer.disk_tokens)},
                                                  {"miss_reason", js(answer.miss)}})},
           {"output_tokens", js(tokens)},
           {"output_tokens_details",
            Json::object({{"reasoning_tokens", js(answer.reasoning_tokens())}})},
           {"total_tokens", js(answer.prompt_tokens + tokens)},
           {"timings", timings_json(answer)}});
    }
    Json body =
        Json::object({{"id", js(answer.id)},
                      {"object", js("response")},
                      {"created_at", js(answer.created)},
                      {"status", js(status)},
                      {"error", Json()},
                      {"incomplete_details", std::move(incomplete)},
                      {"instructions", shape_.instructions},
                      {"max_output_tokens", shape_.max_output_tokens},
                      {"metadata", shape_.metadata},
                      {"model", js(answer.model)},
                      {"output", std::move(output)},
                      {"parallel_tool_calls", shape_.parallel},
                      {"previous_response_id", shape_.previous},
                      {"reasoning", Json::object({{"effort", shape_.effort}, {"summary", Json()}})},
                      {"store", js(shape_.keep != nullptr)},
                      {"temperature", shape_.temperature},
                      {"text", Json::object({{"format", shape_.format}})},
                      {"tool_choice", shape_.tool_choice},
                      {"tools", shape_.tools},
                      {"top_p", shape_.top_p},
                      {"truncation", js("disabled")},
                      {"usage", std::move(usage)}});
    add_notes(shape_.notes, body);
    return body;
  }

  const text::Tokenizer& tokenizer_;
  const ResponseShape shape_;
  Answer begun_;  ///< names the response where it fails
  const std::string message_id_, reasoning_id_;
  Open open_ = Open::kNone;
  int64_t item_ = 0, sequence_ = 0;
  size_t sent_ = 0;  ///< tokens of the output whose logprobs were sent
};

}  // namespace

std::unique_ptr<Format> response_format(const text::Tokenizer& tokenizer, ResponseShape shape) {
  return std::make_unique<ResponseFormat>(tokenizer, std::move(shape));
}

}  // namespace hadal::server
