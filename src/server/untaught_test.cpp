// A model that was not taught to think, asked to: an effort alone means no thinking, thinking that
// is asked for ends, and the answer says so.
#include <gtest/gtest.h>

#include "testing/api_harness.h"

namespace hadal::server {
namespace {

class Untaught : public testing::ApiHarness {
 protected:
  struct Api {
    const char *path, *input, *limit;
  };
  static constexpr std::array<Api, 3> kApis = {
      {{"/v1/chat/completions", R"("messages": [{"role": "user", "content": "a"}])", "max_tokens"},
       {"/v1/responses", R"("input": "a")", "max_output_tokens"},
       {"/v1/messages", R"("messages": [{"role": "user", "content": "a"}])", "max_tokens"}}};

  Untaught() { options_.default_thinking = false; }
  Json ask(const Api& api, const std::string& more) {
    const Json reply =
        post(api.path, concat("{", api.input, ", \"", api.limit, "\": 40", more, "}"));
    EXPECT_EQ(status_, 200) << reply.dump();
    return reply;
  }
};

TEST_F(Untaught, AnEffortMeansNoThinking) {
  const std::vector<std::pair<size_t, std::string>> asked = {
      {0, R"(, "reasoning_effort": "high")"},
      {0, R"(, "reasoning": {"effort": "low"})"},
      {0, R"(, "chat_template_kwargs": {"reasoning_effort": "max"})"},
      {1, R"(, "reasoning": {"effort": "medium", "summary": "auto"})"},
      {2, R"(, "thinking": {"type": "adaptive"})"}};
  for (const auto& [api, more] : asked) {
    const Json reply = ask(kApis[api], more);
    EXPECT_FALSE(last().thinking) << more;
    if (api < 2) {
      EXPECT_NE(at(reply, "notes.0").find("was not taught to think"), std::string::npos)
          << reply.dump();
    }
  }
  // The prompt is the one of a request that says nothing.
  ask(kApis[0], "");
  const auto plain = last().prompt;
  ask(kApis[0], R"(, "reasoning_effort": "max")");
  EXPECT_EQ(last().prompt, plain);
  EXPECT_EQ(at(ask(kApis[0], R"(, "reasoning_effort": "none")"), "notes"), "nothing");
  post(kApis[0].path, concat("{", kApis[0].input, R"(, "reasoning_effort": "deep"})"));
  EXPECT_EQ(status_, 400) << "no effort at all";
  // Counting and answering agree.
  const Json counted =
      post("/tokenize", concat("{", kApis[0].input, R"(, "reasoning_effort": "max"})"));
  EXPECT_EQ(at(counted, "count"), concat(plain.size()));
}

TEST_F(Untaught, ThinkingThatIsAskedForEnds) {
  const std::vector<std::pair<size_t, std::string>> asked = {
      {0, R"(, "thinking": true, "reasoning_effort": "high")"},
      {0, R"(, "enable_thinking": true)"},
      {0, R"(, "chat_template_kwargs": {"thinking": true})"},
      {1, R"(, "thinking": {"type": "enabled"})"},
      {2, R"(, "thinking": {"type": "enabled"})"}};
  for (const auto& [api, more] : asked) {
    const Json reply = ask(kApis[api], more);
    EXPECT_TRUE(last().thinking) << more;
    EXPECT_EQ(last().thinking_budget, 20) << more;
    EXPECT_NE(at(reply, "notes.0").find("closed after half"), std::string::npos) << reply.dump();
  }
  const Json reply = ask(kApis[0], R"(, "thinking": true, "thinking_budget": 30)");
  EXPECT_EQ(last().thinking_budget, 30);
  EXPECT_EQ(at(reply, "notes"), "nothing");
}

TEST_F(Untaught, AModelThatWasTaughtThinksAsItIsAsked) {
  options_.default_thinking = true;
  const Json reply = ask(kApis[0], R"(, "reasoning_effort": "high")");
  EXPECT_TRUE(last().thinking);
  EXPECT_EQ(last().thinking_budget, -1);
  EXPECT_EQ(at(reply, "notes"), "nothing");
}

}  // namespace
}  // namespace hadal::server
