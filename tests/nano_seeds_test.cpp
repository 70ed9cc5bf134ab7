// A seed and a request decide an answer of the shipped model, whatever else runs: alone, in company
// that shares the prompt or does not, with drafts, from the cache.
#include <algorithm>

#include <gtest/gtest.h>

#include "nano_machine.h"

namespace hadal {
namespace {

using engine_core::Request;
using testing::Nano;
using testing::NanoAnswer;
using testing::NanoMachine;

Request ask(const std::string& prompt, uint64_t seed) {
  Request request;
  const std::vector<int32_t> ids =
      Nano::get().tokenizer.encode(prompt, text::SpecialTokens::kAsText);
  request.prompt.assign(ids.begin(), ids.end());
  request.max_tokens = 16;
  request.ignore_eos = true;
  request.sampling.seed = seed;
  return request;
}

TEST(NanoSeeds, DecideAnAnswerWhateverRunsBeside) {
  std::string context = "It was a long and quiet evening by the river, and";
  while (context.size() < 1500) context += " the old man told the children another story, and";
  const std::vector<std::string> prompts = {context + " then", context + " so they", "The house"};
  std::vector<std::vector<int64_t>> alone;
  for (const std::string& prompt : prompts) {
    for (const uint64_t seed : {7, 8}) {
      NanoMachine machine({});
      alone.push_back(machine.answer(ask(prompt, seed))->tokens);
      EXPECT_EQ(alone.back().size(), 16u);
    }
  }
  EXPECT_NE(alone[0], alone[1]) << "another seed";
  for (const bool drafts : {false, true}) {
    NanoMachine machine({.drafts = drafts});
    for (int round = 0; round < 2; ++round) {  // the second from what the first left
      std::vector<std::shared_ptr<NanoAnswer>> answers;
      for (const std::string& prompt : prompts)
        for (const uint64_t seed : {7, 8}) answers.push_back(machine.add(ask(prompt, seed)));
      machine.run();
      for (size_t i = 0; i < answers.size(); ++i)
        EXPECT_EQ(answers[i]->tokens, alone[i]) << i << (drafts ? " with drafts" : "");
      if (round > 0) continue;
      // All of the prompts that begin alike but the first had the beginning for nothing.
      const auto first = ask(prompts[0], 0).prompt, other = ask(prompts[1], 0).prompt;
      const int64_t common = std::ranges::mismatch(first, other).in1 - first.begin();
      for (size_t i = 1; i < 4; ++i) EXPECT_GE(answers[i]->cache.cached_tokens, common - 1) << i;
    }
  }
}

}  // namespace
}  // namespace hadal
