// New weights under load: every answer is that of one version alone, and says which.
#include <array>
#include <atomic>
#include <condition_variable>
#include <filesystem>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <unistd.h>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "base/check.h"
#include "engine/local_engine.h"
#include "testing/tiny_model.h"
#include "testing/tiny_tokenizer.h"

namespace hadal::engine {
namespace {

using Tokens = std::vector<int64_t>;

class Collected final : public engine_core::Sink {
 public:
  void on_update(engine_core::Update update) override {
    const std::lock_guard lock(mutex_);
    for (const engine_core::OutputToken& token : update.tokens) tokens.push_back(token.token);
    if (update.weights != nullptr) {
      one_version = one_version && (version < 0 || version == update.weights->number);
      version = update.weights->number;
      digest = update.weights->digest;
    }
    cache = update.cache;
    error += update.error;
    if (!update.finish) return;
    over_ = true;
    end_.notify_one();
  }
  void wait() {
    std::unique_lock lock(mutex_);
    end_.wait(lock, [&] { return over_; });
  }
  Tokens tokens;
  int64_t version = -1;
  bool one_version = true;
  std::string digest, error;
  engine_core::CacheReport cache;

 private:
  std::mutex mutex_;
  std::condition_variable end_;
  bool over_ = false;
};

class UpdateWeights : public ::testing::Test {
 protected:
  static constexpr int64_t kModels = 3, kRequests = 6;

  UpdateWeights() : tokenizer_(text::Tokenizer::from_json(testing::byte_tokenizer_json(), "test")) {
    model::ModelConfig config = testing::tiny_config();
    config.vocab_size = testing::byte_tokenizer_size();
    for (uint64_t seed = 0; seed < kModels; ++seed)
      models_.push_back(std::make_shared<model::Transformer>(
          testing::random_model(config, 20 + seed, at::kFloat)));
    std::mt19937 random(8);
    const auto token = [&] { return 3 + static_cast<int64_t>(random() % 256); };
    Tokens shared(260);
    for (int64_t& id : shared) id = token();
    for (int64_t i = 0; i < kRequests; ++i) {
      engine_core::Request request;
      // The last one shares its beginning with nobody.
      if (i + 1 < kRequests) request.prompt = shared;
      while (std::ssize(request.prompt) < 262 + 3 * i) request.prompt.push_back(token());
      request.max_tokens = 4 + i % 3;
      request.ignore_eos = true;
      request.sampling.temperature = i % 2 == 0 ? 0.0 : 1.0;
      request.sampling.seed = static_cast<uint64_t>(i);
      requests_.push_back(request);
    }
    for (const auto& model : models_) {
      LocalEngine engine(*model, tokenizer_, "", options());
      for (const engine_core::Request& request : requests_) {
        engine_core::Request alone = request;
        alone.use_prefix_cache = false;
        wanted_[model.get()].push_back(ask(engine, alone)->tokens);
      }
    }
    // Nothing below could fail if models agreed.
    EXPECT_NE(wanted_[models_[0].get()], wanted_[models_[1].get()]);
    EXPECT_NE(wanted_[models_[1].get()], wanted_[models_[2].get()]);
  }

  static LocalEngineOptions options() {
    LocalEngineOptions options;
    options.numerics = ops::Numerics::kIdeal;
    options.max_running = 4;
    options.cache_tokens = 8192;
    return options;
  }
  static std::shared_ptr<Collected> ask(LocalEngine& engine, const engine_core::Request& request) {
    auto sink = std::make_shared<Collected>();
    uint64_t id = 0;
    EXPECT_EQ(engine.engine().submit(request, sink, &id), engine_core::Submitted::kAccepted);
    sink->wait();
    return sink;
  }
  const std::shared_ptr<model::Transformer>& model_of(int64_t version) const {
    return models_[static_cast<size_t>(version % kModels)];
  }
  static std::string digest_of(int64_t version) { return concat("weights", version % kModels); }
  void check(const Collected& answer, size_t request) {
    EXPECT_EQ(answer.error, "");
    EXPECT_TRUE(answer.one_version);
    ASSERT_GE(answer.version, 0);
    EXPECT_EQ(answer.digest, digest_of(answer.version));
    EXPECT_EQ(answer.tokens, wanted_[model_of(answer.version).get()][request])
        << "request " << request << " of version " << answer.version;
  }

  /// `updates` while two clients ask without a pause.
  void run(LocalEngine& engine, int64_t updates, bool on_disk) {
    std::atomic<int64_t> asked_for{0};
    std::atomic<bool> over{false};
    std::mutex mutex;
    std::map<int64_t, int64_t> answers;  // by version
    int64_t in_flight = 0, cached = 0;
    std::vector<std::thread> clients;
    for (unsigned client = 0; client < 2; ++client) {
      clients.emplace_back([&, client] {
        std::mt19937 random(client);
        while (!over) {
          std::array<std::pair<size_t, std::shared_ptr<Collected>>, 2> asked;
          for (auto& [request, sink] : asked) {
            request = random() % (kRequests - 1);
            sink = std::make_shared<Collected>();
            uint64_t id = 0;
            EXPECT_EQ(engine.engine().submit(requests_[request], sink, &id),
                      engine_core::Submitted::kAccepted);
          }
          for (const auto& [request, sink] : asked) {
            sink->wait();
            const std::lock_guard lock(mutex);
            check(*sink, request);
            ++answers[sink->version];
            in_flight += sink->version < asked_for ? 1 : 0;
            cached += sink->cache.cached_tokens;
          }
        }
      });
    }
    for (int64_t version = 1; version <= updates; ++version) {
      asked_for = version;
      engine.update_weights(model_of(version), {.number = version, .digest = digest_of(version)});
      const auto own = ask(engine, requests_.back());
      check(*own, kRequests - 1);
      EXPECT_EQ(own->version, version);
      // What it computed under the version before is of no use.
      if (!on_disk) {
        EXPECT_EQ(own->cache.cached_tokens, 0) << version;
      }
      if (version % 5 == 0) {
        const auto again = ask(engine, requests_.back());
        check(*again, kRequests - 1);
        EXPECT_GT(again->cache.cached_tokens, 0);
      }
    }
    over = true;
    for (std::thread& client : clients) client.join();
    engine.loop().drain();
    EXPECT_FALSE(engine.loop().integrity_lost());
    EXPECT_GT(std::ssize(answers), updates / 2) << "versions that clients saw";
    EXPECT_GT(in_flight, updates / 5) << "answers under way when new weights came";
    EXPECT_GT(cached, 0);
  }

  text::Tokenizer tokenizer_;
  std::vector<std::shared_ptr<model::Transformer>> models_;
  std::vector<engine_core::Request> requests_;
  std::map<const model::Transformer*, std::vector<Tokens>> wanted_;
};

TEST_F(UpdateWeights, EveryAnswerIsOfOneVersionAlone) {
  LocalEngine engine(*models_[0], tokenizer_, digest_of(0), options());
  run(engine, 50, false);
}

TEST_F(UpdateWeights, WhatIsOnDiskIsOfItsOwnWeights) {
  const std::string folder =
      (std::filesystem::temp_directory_path() / concat("hadal-update-", getpid())).string();
  LocalEngineOptions on_disk = options();
  on_disk.disk.folder = folder;
  {
    LocalEngine engine(*models_[0], tokenizer_, digest_of(0), on_disk);
    EXPECT_THROW(engine.update_weights(models_[1], {.number = 1, .digest = ""}), InputError);
    run(engine, 12, true);
    // Every third version has the weights, and the prefixes, of one before.
    EXPECT_GT(engine.disk()->stats().hits, 0);
  }
  std::filesystem::remove_all(folder);
}

TEST_F(UpdateWeights, OtherConfigurationsAndOldVersionsAreRefused) {
  LocalEngine engine(*models_[0], tokenizer_, digest_of(0), options());
  auto other = testing::tiny_config();
  other.vocab_size = testing::byte_tokenizer_size() + 8;
  const auto larger =
      std::make_shared<model::Transformer>(testing::random_model(other, 1, at::kFloat));
  EXPECT_THROW(engine.update_weights(larger, {.number = 1, .digest = "x"}), InputError);
  EXPECT_THROW(engine.update_weights(models_[1], {.number = 0, .digest = "x"}), InputError);
  const auto answer = ask(engine, requests_[0]);
  check(*answer, 0);
  EXPECT_EQ(answer->version, 0);
}

}  // namespace
}  // namespace hadal::engine
