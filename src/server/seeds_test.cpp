// `seed` in every API: it alone, with the request, decides what is drawn.
#include <set>

#include <gtest/gtest.h>

#include "testing/api_harness.h"

namespace hadal::server {
namespace {

class SeedsTest : public testing::ApiHarness {
 protected:
  struct Api {
    const char *path, *input;
  };
  static constexpr std::array<Api, 4> kApis = {
      {{"/v1/chat/completions", R"("messages": [{"role": "user", "content": "a"}])"},
       {"/v1/completions", R"("prompt": "a")"},
       {"/v1/responses", R"("input": "a")"},
       {"/v1/messages", R"("max_tokens": 5, "messages": [{"role": "user", "content": "a"}])"}}};

  uint64_t seed_of(const Api& api, const std::string& seed) {
    const Json reply =
        post(api.path, concat("{", api.input, seed.empty() ? "" : ", \"seed\": ", seed, "}"));
    EXPECT_EQ(status_, 200) << reply.dump();
    return last().sampling.seed;
  }
};

TEST_F(SeedsTest, EveryApiTakesASeed) {
  for (const Api& api : kApis) {
    EXPECT_EQ(seed_of(api, "0"), 0u) << api.path;
    EXPECT_EQ(seed_of(api, "42"), 42u) << api.path;
    EXPECT_EQ(seed_of(api, "9223372036854775807"), 9223372036854775807u) << api.path;
    EXPECT_EQ(seed_of(api, "-1"), ~uint64_t{0}) << api.path;
    std::set<uint64_t> drawn;
    for (const char* none : {"", "null", "", ""}) drawn.insert(seed_of(api, none));
    EXPECT_EQ(drawn.size(), 4u) << api.path << ": without a seed each request has its own";
  }
}

TEST_F(SeedsTest, ASeedIsAWholeNumber) {
  for (const Api& api : kApis) {
    for (const char* seed : {"1.5", "\"7\"", "true", "[1]", "1e400", "9223372036854775808"}) {
      const Json reply = post(api.path, concat("{", api.input, ", \"seed\": ", seed, "}"));
      EXPECT_EQ(status_, 400) << api.path << " " << seed;
      EXPECT_NE(at(reply, "error.message").find("seed"), std::string::npos) << reply.dump();
    }
  }
}

// Choices differ by their number, prompts of one request by their text alone.
TEST_F(SeedsTest, PromptsOfOneRequestShareItsSeed) {
  post("/v1/completions", R"({"prompt": ["a", "b", "a"], "seed": 9, "n": 2})");
  const auto requests = engine_.requests();
  ASSERT_EQ(requests.size(), 3u);
  for (const engine_core::Request& request : requests) {
    EXPECT_EQ(request.sampling.seed, 9u);
    EXPECT_EQ(request.n, 2);
  }
}

}  // namespace
}  // namespace hadal::server
