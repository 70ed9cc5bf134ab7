// What a client's reasoning effort means depends on the checkpoint.
#include "base/check.h"
#include "testing/answer_fixture.h"

namespace hadal::server {
namespace {

using testing::AnswerTest;

class EffortLevelsOfTheServer : public AnswerTest {
 protected:
  std::string prompt(const std::string& effort) {
    const std::string more =
        effort.empty() ? "" : concat(R"(, "reasoning_effort": ")", effort, "\"");
    const HttpResponse reply =
        post("/v1/chat/completions",
             concat(R"({"messages": [{"role": "user", "content": "Hello!"}], "thinking": true)",
                    more, "}"));
    EXPECT_EQ(reply.status, 200) << reply.body;
    return last_prompt();
  }
};

TEST_F(EffortLevelsOfTheServer, Preview) {
  script_ = "x</think>y";
  const std::string plain = prompt("");
  for (const char* effort : {"minimal", "low", "medium", "high"})
    EXPECT_EQ(prompt(effort), plain) << effort;
  for (const char* effort : {"xhigh", "max", "ultra"})
    EXPECT_NE(prompt(effort).find("Absolute maximum"), std::string::npos) << effort;
}

TEST_F(EffortLevelsOfTheServer, Flash0731) {
  script_ = "x</think>y";
  options_.effort_levels = text::EffortLevels::k0731;
  const std::string plain = prompt("");
  for (const char* effort : {"minimal", "low"}) EXPECT_EQ(prompt(effort), plain) << effort;
  for (const char* effort : {"medium", "high", "xhigh"})
    EXPECT_NE(prompt(effort).find("Absolute maximum"), std::string::npos) << effort;
  for (const char* effort : {"max", "ultra"})
    EXPECT_NE(prompt(effort).find("Beyond maximum"), std::string::npos) << effort;
}

}  // namespace
}  // namespace hadal::server
