// Lists of answers as grammars: each of them can be written, byte for byte, and nothing else.
#include <gtest/gtest.h>

#include "engine_core/grammar/grammar.h"
#include "server/openai_fields.h"
#include "testing/tiny_tokenizer.h"
#include "text/chat_tokens.h"

namespace hadal::server {
namespace {

TEST(Structure, ChoicesAreWrittenToTheByte) {
  const auto tokenizer = text::Tokenizer::from_json(testing::byte_tokenizer_json(), "tiny");
  engine_core::GrammarCompiler compiler(tokenizer);
  const std::vector<std::string> choices = {
      "yes", "a \"b\"\n\\c\t", "Zürich 你好 🙂", "[x] (y) {z} | * + ? ^ $ . - / #", "\x01\x7f",
      " "};
  Json list = Json::array();
  for (const std::string& choice : choices) list.items().push_back(js(choice));
  const Json body = Json::object({{"guided_choice", list}});
  ChatJob chat;
  read_structure(Fields(body, ""), chat);
  const auto compiled = compiler.compile(chat.format);
  ASSERT_NE(compiled, nullptr);
  const auto writes = [&](const std::string& text) {
    engine_core::GrammarSession session(compiled, false);
    for (const int32_t token : tokenizer.encode(text, text::SpecialTokens::kAsText)) {
      if (!session.accept(token)) return false;
    }
    return session.accept(tokenizer.id_of(text::kEos));
  };
  for (const std::string& choice : choices) EXPECT_TRUE(writes(choice)) << choice;
  for (const char* other : {"", "ye", "yesyes", "no", "Zürich"})
    EXPECT_FALSE(writes(other)) << other;
}

}  // namespace
}  // namespace hadal::server
