#include "data/conversation.h"

#include "base/check.h"
#include "text/chat_format.h"
#include "text/chat_tokens.h"

namespace hadal::data {

MarkedTokens encode_conversation(std::string_view json,
                                 const std::string& origin,
                                 const text::Tokenizer& tokenizer) {
  const text::PyJson record = text::PyJson::parse(json, origin);
  HADAL_INPUT_CHECK(record.is_object() && record.find_set("messages") != nullptr, origin,
                    ": expected an object with messages");
  text::ChatOptions options;
  const text::PyJson* mode = record.find_set("thinking_mode");
  HADAL_INPUT_CHECK(mode == nullptr || mode->is_string(), origin,
                    ": thinking_mode: expected \"chat\" or \"thinking\", found ",
                    mode != nullptr ? mode->kind_name() : "");
  options.thinking_mode = text::parse_thinking_mode(mode != nullptr ? mode->text() : "chat");
  text::PyJson request = text::PyJson::object({{"messages", *record.find("messages")}});
  if (const text::PyJson* tools = record.find_set("tools")) request.set("tools", *tools);
  const text::ChatPrompt prompt =
      text::render_chat(text::messages_of_request(std::move(request)), options);

  MarkedTokens result;
  result.ids = tokenizer.encode(prompt.text, prompt.foreign);
  result.scored.assign(result.ids.size(), 0);
  const int32_t assistant = tokenizer.id_of(text::kAssistant);
  const int32_t end = tokenizer.id_of(text::kEos);
  bool inside = false;
  for (size_t i = 0; i < result.ids.size(); ++i) {
    if (inside) {
      result.scored[i] = 1;
      if (result.ids[i] == end) inside = false;
    } else if (result.ids[i] == assistant) {
      inside = true;
      ++i;  // the thinking mark belongs to the prompt
    }
  }
  return result;
}

}  // namespace hadal::data
