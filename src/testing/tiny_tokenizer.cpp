#include "testing/tiny_tokenizer.h"

#include "base/json.h"
#include "text/chat_tokens.h"
#include "text/tokenizer_file.h"

namespace hadal::testing {

int64_t byte_tokenizer_size() { return 3 + 256 + static_cast<int64_t>(text::kChatTokens.size()); }

std::string byte_tokenizer_json(const std::vector<std::string>& more) {
  JsonWriter out;
  out.begin_object().key("added_tokens").begin_array();
  int64_t id = 0;
  const auto add = [&](std::string_view content) {
    out.begin_object().field("id", id++).field("content", content).field("special", true);
    out.end_object();
  };
  for (const std::string_view content : {text::kBos, text::kEos, text::kPad}) add(content);
  id += 256;
  for (const std::string_view content : text::kChatTokens) add(content);
  const auto is_markup = [](const std::string& content) {
    return content.find(text::kDsml) != std::string::npos;
  };
  for (const std::string& content : more) {
    if (is_markup(content)) add(content);
  }
  out.end_array().key("pre_tokenizer").begin_object().field("type", "Sequence");
  out.key("pretokenizers").begin_array();
  out.begin_object().field("type", "Split").field("behavior", "Isolated").key("pattern");
  out.begin_object().field("Regex", "[a-z]+").end_object().end_object();
  out.begin_object().field("type", "ByteLevel").field("add_prefix_space", false);
  out.field("use_regex", false).end_object().end_array().end_object();
  out.key("model").begin_object().field("type", "BPE").key("merges").begin_array().end_array();
  out.key("vocab").begin_object();
  for (int64_t byte = 0; byte < 256; ++byte)
    out.field(text::byte_alphabet()[static_cast<size_t>(byte)], 3 + byte);
  // Ordinary tokens, which no merge makes: a model may draw them.
  for (const std::string& content : more) {
    if (is_markup(content)) continue;
    std::string letters;
    for (const char byte : content)
      letters += text::byte_alphabet()[static_cast<unsigned char>(byte)];
    out.field(letters, id++);
  }
  return out.end_object().end_object().end_object().str();
}

}  // namespace hadal::testing
