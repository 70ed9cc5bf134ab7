// What clients ask to keep in the cache, in each API's words.
#include <chrono>

#include <gtest/gtest.h>

#include "testing/api_harness.h"

namespace hadal::server {
namespace {

using std::chrono::seconds;

class CacheKeyTest : public testing::ApiHarness {
 protected:
  engine_core::CacheKey key_of(const std::string& path, const std::string& body) {
    const Json reply = post(path, body);
    EXPECT_EQ(status_, 200) << reply.dump();
    return last().cache_key;
  }
  std::string refusal(const std::string& path, const std::string& body) {
    const Json reply = post(path, body);
    EXPECT_EQ(status_, 400) << reply.dump();
    return at(reply, "error.message");
  }
};

struct Api {
  const char *path, *input;
};
constexpr std::array<Api, 3> kOpenAi = {
    {{"/v1/chat/completions", R"("messages": [{"role": "user", "content": "a"}])"},
     {"/v1/completions", R"("prompt": "a")"},
     {"/v1/responses", R"("input": "a")"}}};

TEST_F(CacheKeyTest, OpenAisKeyAndItsTime) {
  for (const Api& api : kOpenAi) {
    const auto key = [&](const std::string& more) {
      return key_of(api.path, concat("{", api.input, more, "}"));
    };
    EXPECT_EQ(key("").name, "");
    const engine_core::CacheKey plain = key(R"(, "prompt_cache_key": "s1")");
    EXPECT_NE(plain.name.find("s1"), std::string::npos) << api.path;
    EXPECT_EQ(plain.retention, seconds(3600));
    EXPECT_EQ(key(R"(, "prompt_cache_key": "s1", "prompt_cache_retention": "24h")").retention,
              seconds(86'400));
    EXPECT_EQ(key(R"(, "prompt_cache_key": "s1", "prompt_cache_retention": "in_memory")").name,
              plain.name);
    EXPECT_NE(key(R"(, "session_id": "s1")").name, "");
    EXPECT_NE(key(R"(, "session_id": "s1")").name, plain.name);
    EXPECT_NE(refusal(api.path, concat("{", api.input, R"(, "prompt_cache_retention": "7d"})"))
                  .find("24h"),
              std::string::npos);
    EXPECT_NE(refusal(api.path, concat("{", api.input, R"(, "prompt_cache_key": 5})"))
                  .find("prompt_cache_key"),
              std::string::npos);
  }
}

constexpr const char* kMessages = "/v1/messages";

std::string messages(const std::string& first, const std::string& rest, const std::string& more) {
  return concat(R"({"max_tokens": 9, "messages": [{"role": "user", "content": [{"type": "text",
      "text": ")",
                first, "\"}]}", rest, "]", more, "}");
}

constexpr const char* kSystem =
    R"(, "system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}])";
constexpr const char* kHourly = R"(, "system": [{"type": "text", "text": "s",
    "cache_control": {"type": "ephemeral", "ttl": "1h"}}])";
constexpr const char* kNextTurn = R"(, {"role": "assistant", "content": "b"}, {"role": "user",
    "content": [{"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text",
    "text": "r", "cache_control": {"type": "ephemeral", "ttl": "1h"}}]}]})";

TEST_F(CacheKeyTest, AMarkedConversationIsItsOwnKey) {
  EXPECT_EQ(key_of(kMessages, messages("a", "", "")).name, "");
  const engine_core::CacheKey first = key_of(kMessages, messages("a", "", kSystem));
  EXPECT_NE(first.name, "");
  EXPECT_EQ(first.retention, seconds(300));
  const engine_core::CacheKey next = key_of(kMessages, messages("a", kNextTurn, kSystem));
  EXPECT_EQ(next.name, first.name);
  EXPECT_EQ(next.retention, seconds(3600)) << "the longest of the marks";
  EXPECT_EQ(key_of(kMessages, messages("a", "", kHourly)).retention, seconds(3600));
  EXPECT_NE(key_of(kMessages, messages("b", "", kSystem)).name, first.name);
  EXPECT_NE(key_of(kMessages,
                   messages("a", "", std::string(kSystem) + R"(, "metadata": {"user_id": "u"})"))
                .name,
            first.name);
  EXPECT_NE(
      key_of(kMessages, messages("a", "", R"(, "cache_control": {"type": "ephemeral"})")).name, "");
  EXPECT_NE(key_of(kMessages, messages("a", "", R"(, "tools": [{"name": "f", "input_schema":
      {"type": "object"}, "cache_control": {"type": "ephemeral"}}])"))
                .name,
            "");
}

TEST_F(CacheKeyTest, AMarkThatMeansNothingIsRefused) {
  EXPECT_NE(refusal(kMessages, messages("a", "", R"(, "cache_control": {"type": "lasting"})"))
                .find("cache_control"),
            std::string::npos);
  EXPECT_NE(refusal(kMessages, messages("a", "", R"(, "system": [{"type": "text", "text": "s",
      "cache_control": {"type": "ephemeral", "ttl": "2h"}}])"))
                .find("ttl"),
            std::string::npos);
}

}  // namespace
}  // namespace hadal::server
