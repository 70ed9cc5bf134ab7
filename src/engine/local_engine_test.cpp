// E9 of the engine: what is drawn ahead changes no text, no token and no end of an answer.
#include "engine/local_engine.h"

#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "testing/tiny_model.h"
#include "testing/tiny_tokenizer.h"

namespace hadal::engine {
namespace {

struct Choice {
  std::string text, stop;
  std::vector<int64_t> tokens;
  engine_core::FinishReason finish = engine_core::FinishReason::kError;
  friend bool operator==(const Choice&, const Choice&) = default;
};
void PrintTo(const Choice& choice, std::ostream* out) {
  *out << choice.tokens.size() << " tokens, finish " << static_cast<int>(choice.finish)
       << ", stopped by " << ::testing::PrintToString(choice.stop) << ", text "
       << ::testing::PrintToString(choice.text);
}

class Collected final : public engine_core::Sink {
 public:
  void on_update(engine_core::Update update) override {
    const std::lock_guard lock(mutex_);
    Choice& choice = choices_[update.choice];
    for (const engine_core::OutputToken& token : update.tokens) {
      choice.tokens.push_back(token.token);
      choice.text += token.text;
    }
    if (!update.finish) return;
    choice.finish = *update.finish;
    choice.stop = update.matched_stop;
    ++finished_;
    end_.notify_one();
  }
  std::map<int64_t, Choice> wait(int64_t choices) {
    std::unique_lock lock(mutex_);
    end_.wait(lock, [&] { return finished_ == choices; });
    return choices_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable end_;
  std::map<int64_t, Choice> choices_;
  int64_t finished_ = 0;
};

/// With the MTP block, or with a DSpark drafter.
class Speculation : public ::testing::TestWithParam<bool> {
 protected:
  Speculation()
      : tokenizer_(text::Tokenizer::from_json(testing::byte_tokenizer_json(), "test")),
        model_(testing::random_model(config(), 9, at::kFloat)) {}

  static model::ModelConfig config() {
    model::ModelConfig config = testing::tiny_config();
    config.vocab_size = testing::byte_tokenizer_size();
    return GetParam() ? testing::with_drafter(config) : config;
  }
  static LocalEngineOptions options(bool drafts) {
    LocalEngineOptions options;
    options.numerics = ops::Numerics::kIdeal;
    options.max_running = 6;
    options.cache_tokens = 8192;
    options.max_drafts = !drafts ? 0 : GetParam() ? 4 : 1;
    options.draft_threshold = 0.1;
    options.always_draft = drafts;
    return options;
  }
  std::vector<std::map<int64_t, Choice>> answers(const std::vector<engine_core::Request>& requests,
                                                 bool drafts) {
    LocalEngine engine(model_, tokenizer_, "", options(drafts));
    std::vector<std::shared_ptr<Collected>> sinks;
    for (const engine_core::Request& request : requests) {
      uint64_t id = 0;
      sinks.push_back(std::make_shared<Collected>());
      EXPECT_EQ(engine.engine().submit(request, sinks.back(), &id),
                engine_core::Submitted::kAccepted);
    }
    std::vector<std::map<int64_t, Choice>> result;
    for (size_t i = 0; i < sinks.size(); ++i) result.push_back(sinks[i]->wait(requests[i].n));
    engine.loop().drain();
    stats_ = engine.engine().stats();
    EXPECT_FALSE(engine.loop().integrity_lost());
    return result;
  }

  text::Tokenizer tokenizer_;
  model::Transformer model_;
  engine_core::EngineStats stats_;
};

TEST_P(Speculation, ChangesNoAnswerWithStopStringsGreedyOrNot) {
  std::mt19937 random(3);
  std::vector<engine_core::Request> requests;
  for (int i = 0; i < 10; ++i) {
    engine_core::Request request;
    for (auto length = 1 + random() % 300; length > 0; --length)
      request.prompt.push_back(3 + static_cast<int64_t>(random() % 256));
    request.max_tokens = 40;
    request.n = i % 5 == 4 ? 2 : 1;
    request.ignore_eos = i % 2 == 0;
    request.sampling.temperature = i % 2 == 0 ? 0.0 : 0.7;
    request.sampling.seed = static_cast<uint64_t>(i);
    if (i % 3 == 0) request.sampling.presence_penalty = 0.5;
    requests.push_back(request);
  }
  const auto free = answers(requests, false);
  // Stop strings out of the middle of the answers, of one and of several tokens.
  for (size_t i = 0; i < requests.size(); ++i) {
    const std::string& text = free[i].at(0).text;
    if (text.size() > 12) requests[i].stop = {text.substr(text.size() / 2, 1 + i % 5), "nowhere"};
  }
  const auto wanted = answers(requests, false);
  EXPECT_EQ(stats_.drafted, 0);
  const auto found = answers(requests, true);
  EXPECT_GT(stats_.drafted, 100);
  EXPECT_GT(stats_.accepted, 0);
  EXPECT_LT(stats_.accepted, stats_.drafted);
  int64_t stopped = 0;
  for (size_t i = 0; i < requests.size(); ++i) {
    EXPECT_EQ(found[i], wanted[i]) << "request " << i;
    stopped += found[i].at(0).finish == engine_core::FinishReason::kStopString ? 1 : 0;
  }
  EXPECT_GT(stopped, 5);
}

TEST_P(Speculation, DraftsOfSampledRequestsUseTheSamplersOwnRandomness) {
  // So hot that the noise decides almost alone: a draft by the same noise is mostly right, one by
  // the largest logit would hardly ever be.
  engine_core::Request request;
  request.prompt = {7, 8, 9};
  request.max_tokens = 200;
  request.ignore_eos = true;
  request.sampling.temperature = 50;
  static_cast<void>(answers({request}, true));
  EXPECT_GT(stats_.accepted * 2, stats_.drafted);
}

// Masks behind drafts, ends and stop tokens among them, few tokens left.
TEST_P(Speculation, GrammarsAndEndsAmongDrafts) {
  std::vector<engine_core::Request> requests;
  for (int i = 0; i < 12; ++i) {
    engine_core::Request request;
    request.prompt = {3 + i, 40, 50};
    request.max_tokens = 1 + 5 * i;
    request.grammar = {.kind = engine_core::Grammar::Kind::kRegex,
                       .text = i % 2 == 0 ? "[ab]{3,40}c" : "(x|yy|zzz){2,}(1|2)"};
    request.sampling.temperature = i % 3 == 0 ? 0.0 : 3.0;
    request.sampling.seed = static_cast<uint64_t>(i);
    if (i % 4 == 3) request.stop_tokens = {3 + 'b', 3 + 'y'};
    requests.push_back(request);
  }
  const auto wanted = answers(requests, false);
  const auto found = answers(requests, true);
  for (size_t i = 0; i < requests.size(); ++i) EXPECT_EQ(found[i], wanted[i]) << "request " << i;
  EXPECT_GT(stats_.accepted * 4, stats_.drafted);
}

INSTANTIATE_TEST_SUITE_P(Drafters, Speculation, ::testing::Bool(), [](const auto& test) {
  return std::string(test.param ? "dspark" : "mtp");
});

}  // namespace
}  // namespace hadal::engine
