// E1 of the caches: logits of a sequence are the same bits through pages, slots and snapshots,
// alone and in company, in any chunks, after a rewind, as through the reference cache.
#include <algorithm>
#include <memory>
#include <random>

#include <ATen/ATen.h>

#include <gtest/gtest.h>

#include "engine/model_runner.h"
#include "engine/sampler.h"
#include "model/contiguous_kv.h"
#include "testing/tiny_model.h"

namespace hadal::engine {
namespace {

using ops::Numerics;

struct Setup {
  const char* name;
  bool released_widths;
  Numerics numerics;
};
void PrintTo(const Setup& setup, std::ostream* out) { *out << setup.name; }

class EnginePaths : public ::testing::TestWithParam<Setup> {
 protected:
  static constexpr int64_t kSlack = 6, kPages = 24, kSlots = 8;
  void SetUp() override {
    config_ = GetParam().released_widths ? testing::small_config() : testing::tiny_config();
    model_ = std::make_unique<model::Transformer>(testing::random_model(config_, 11, at::kFloat));
    numerics_ = GetParam().numerics;
    model_->visit([&](model::Parameter& p) {
      const bool rounded = p.is_matrix() || p.kind == model::ParamKind::kEmbedding ||
                           p.kind == model::ParamKind::kHead;
      if (rounded && numerics_ != Numerics::kIdeal) p.value = p.operand(numerics_).contiguous();
    });
    for (const int64_t length : {530, 300, 257, 77}) {
      std::vector<int64_t> ids(static_cast<size_t>(length));
      for (int64_t& id : ids)
        id = static_cast<int64_t>(random_() % static_cast<unsigned>(config_.vocab_size));
      sequences_.push_back(ids);
      expected_.push_back(reference(ids));
    }
    cache_ = std::make_unique<KvCache>(
        config_,
        KvCacheOptions{
            .numerics = numerics_, .num_pages = kPages, .num_slots = kSlots, .slack = kSlack});
    runner_ = std::make_unique<ModelRunner>(*model_, *cache_, sampler_);
  }

  at::Tensor reference(const std::vector<int64_t>& ids) const {
    const c10::InferenceMode inference;
    model::ContiguousKv kv(config_, 1, 1024,
                           numerics_ == Numerics::kIdeal ? at::kFloat : at::kBFloat16, at::kCPU);
    const ops::Batch batch = kv.begin({0}, {static_cast<int64_t>(ids.size())});
    model::ForwardContext context;
    context.batch = &batch;
    context.numerics = numerics_;
    context.kv = &kv;
    const at::Tensor streams = model_->forward(at::tensor(ids, at::kLong), context).streams;
    return model_->logits(model_->head_input(streams, numerics_), numerics_);
  }

  /// [length - 1, vocab]: the MTP block's logits at every position.
  at::Tensor mtp_reference(const std::vector<int64_t>& ids) const {
    const c10::InferenceMode inference;
    const auto length = static_cast<int64_t>(ids.size());
    model::ContiguousKv kv(config_, 1, 1024,
                           numerics_ == Numerics::kIdeal ? at::kFloat : at::kBFloat16, at::kCPU);
    const ops::Batch batch = kv.begin({0}, {length});
    model::ForwardContext context;
    context.batch = &batch;
    context.numerics = numerics_;
    context.kv = &kv;
    const at::Tensor all = at::tensor(ids, at::kLong);
    const at::Tensor streams = model_->forward(all, context).streams;
    const at::Tensor next = at::cat({all.narrow(0, 1, length - 1), all.narrow(0, 0, 1)});
    const at::Tensor head = model_->mtp(streams, next, context).head_input;
    return model_->logits(head, numerics_).narrow(0, 0, length - 1);
  }

  struct Live {
    size_t sequence;
    int64_t slot, pos = 0;
    std::vector<int64_t> pages;
  };

  /// Runs tokens of the given sequences in one step and compares every logit.
  void step(const std::vector<std::pair<Live*, int64_t>>& parts) {
    std::vector<engine_core::SequenceStep> steps;
    for (const auto& [live, count] : parts) {
      const auto& ids = sequences_[live->sequence];
      steps.push_back({.slot = live->slot,
                       .start = live->pos,
                       .tokens = {ids.data() + live->pos, static_cast<size_t>(count)},
                       .pages = live->pages,
                       .num_logits = count,
                       .shows_logits = true});
    }
    runner_->run(steps);
    for (size_t i = 0; i < parts.size(); ++i) {
      auto& [live, count] = parts[i];
      for (int64_t t = 0; t < count; ++t) {
        const std::span<const float> got = runner_->logits(static_cast<int64_t>(i), t);
        const auto* want = expected_[live->sequence][live->pos + t].const_data_ptr<float>();
        ASSERT_TRUE(std::equal(got.begin(), got.end(), want))
            << "sequence " << live->sequence << ", position " << live->pos + t;
      }
      live->pos += count;
    }
  }

  model::ModelConfig config_;
  std::unique_ptr<model::Transformer> model_;
  Numerics numerics_ = Numerics::kIdeal;
  std::mt19937 random_{4};
  std::vector<std::vector<int64_t>> sequences_;
  std::vector<at::Tensor> expected_;  // [length, vocab]
  std::unique_ptr<KvCache> cache_;
  ModelSampler sampler_{0};  // nothing is drawn
  std::unique_ptr<ModelRunner> runner_;
};

TEST_P(EnginePaths, RandomSchedulesGiveTheSameBits) {
  // Sequences live in scattered pages, advance by random chunks in random company, go back, move to
  // another slot through a snapshot and to another page through a copy or its bytes.
  for (int round = 0; round < 4; ++round) {
    std::vector<int64_t> free_pages(kPages), free_slots(kSlots);
    for (int64_t i = 0; i < kPages; ++i) free_pages[static_cast<size_t>(i)] = i;
    for (int64_t i = 0; i < kSlots; ++i) free_slots[static_cast<size_t>(i)] = i;
    std::shuffle(free_pages.begin(), free_pages.end(), random_);
    std::shuffle(free_slots.begin(), free_slots.end(), random_);
    const auto take = [](std::vector<int64_t>& from) {
      const int64_t value = from.back();
      from.pop_back();
      return value;
    };
    std::vector<Live> live;
    for (size_t i = 0; i < sequences_.size(); ++i) {
      live.push_back({.sequence = i, .slot = take(free_slots), .pages = {}});
      for (int64_t page = 0; page < 3; ++page) live.back().pages.push_back(take(free_pages));
    }
    const auto left = [&](const Live& l) {
      return static_cast<int64_t>(sequences_[l.sequence].size()) - l.pos;
    };
    while (std::any_of(live.begin(), live.end(), [&](const Live& l) { return left(l) > 0; })) {
      std::vector<std::pair<Live*, int64_t>> parts;
      for (Live& l : live) {
        if (left(l) == 0 || random_() % 3 == 0) continue;
        const int64_t most = random_() % 2 == 0 ? 5 : 160;
        parts.emplace_back(&l, 1 + static_cast<int64_t>(
                                       random_() % static_cast<unsigned>(std::min(most, left(l)))));
      }
      std::shuffle(parts.begin(), parts.end(), random_);
      if (parts.empty()) continue;
      step(parts);
      if (HasFatalFailure()) return;
      for (auto& [l, count] : parts) {
        switch (random_() % 4) {
          case 0: {  // a rejected draft
            l->pos -= std::min<int64_t>({count, kSlack, static_cast<int64_t>(random_() % 4)});
            runner_->rewind(l->slot, l->pos);
            break;
          }
          case 1: {  // preempted and resumed elsewhere
            std::vector<std::byte> snapshot(static_cast<size_t>(cache_->snapshot_bytes(l->pos)));
            cache_->save_snapshot(l->slot, l->pos, snapshot);
            free_slots.insert(free_slots.begin(), l->slot);
            l->slot = take(free_slots);
            cache_->load_snapshot(l->slot, l->pos, snapshot);
            break;
          }
          case 2: {  // its pages move
            const size_t which = random_() % l->pages.size();
            const int64_t target = take(free_pages);
            if (random_() % 2 == 0) {
              cache_->copy_page(l->pages[which], target);
            } else {
              std::vector<std::byte> bytes(static_cast<size_t>(cache_->page_bytes()));
              cache_->read_page(l->pages[which], bytes);
              cache_->write_page(target, bytes);
            }
            free_pages.insert(free_pages.begin(), l->pages[which]);
            l->pages[which] = target;
            break;
          }
          default:
            break;
        }
      }
    }
  }
}

TEST_P(EnginePaths, DraftsAreTheMtpBlocksAndChangeNothing) {
  // Chunks, then token by token with right and wrong drafts; every logit stays, and while no
  // position was missed the draft's logits are those of the one-shot pass of the MTP block.
  cache_ = std::make_unique<KvCache>(config_, KvCacheOptions{.numerics = numerics_,
                                                             .num_pages = kPages,
                                                             .num_slots = kSlots,
                                                             .slack = kSlack,
                                                             .with_mtp = true});
  runner_ = std::make_unique<ModelRunner>(*model_, *cache_, sampler_);
  const std::vector<int64_t>& ids = sequences_[3];
  const at::Tensor wanted = mtp_reference(ids);
  Live live{.sequence = 3, .slot = 2, .pages = {5}};
  step({{&live, 30}});
  while (live.pos < static_cast<int64_t>(ids.size()) - 4) {
    // Where nobody drafts for a while, the next draft makes up for it.
    if (random_() % 4 > 0) {
      const std::vector<DraftStep> drafts = {
          {.slot = live.slot,
           .tokens = std::span(ids).first(static_cast<size_t>(live.pos + 1)),
           .pages = live.pages}};
      const at::Tensor logits = runner_->draft(drafts);
      ASSERT_TRUE(at::equal(logits[0], wanted[live.pos - 1])) << "draft behind " << live.pos;
    }
    const int64_t count = 1 + static_cast<int64_t>(random_() % 3);
    step({{&live, count}});
    if (HasFatalFailure()) return;
    if (count > 1 && random_() % 2 == 0) {
      live.pos -= 1;
      runner_->rewind(live.slot, live.pos);
    }
  }
}

TEST_P(EnginePaths, AStateIsRebuiltFromPagesAndExactlyTheseTokens) {
  const int64_t page = cache_->page_tokens();
  Live live{.sequence = 0, .slot = 1, .pages = {7, 3, 9}};
  step({{&live, page}});
  step({{&live, page}});
  // A slot that others used, whose rows are of no use.
  Live other{.sequence = 1, .slot = 4, .pages = {1, 2}};
  step({{&other, 290}});
  const auto prefix = std::span(sequences_[0]).first(static_cast<size_t>(2 * page));
  const int64_t first = runner_->rebuild_start(2 * page), all = 2 * page - first;
  EXPECT_EQ(all, std::min(2 * page, cache_->rebuild_tokens()));
  // In pieces.
  runner_->rebuild(4, prefix, live.pages, first, all / 3);
  runner_->rebuild(4, prefix, live.pages, first + all / 3, all - all / 3);
  Live again{.sequence = 0, .slot = 4, .pos = 2 * page, .pages = live.pages};
  const int64_t left = static_cast<int64_t>(sequences_[0].size()) - 2 * page;
  step({{&again, 1}});
  step({{&again, left - 1}});
  if (HasFatalFailure() || numerics_ != Numerics::kIdeal || GetParam().released_widths) return;
  // One token fewer, and the oldest row of the last layer's window is another: here, where windows
  // are so short that the missing key bears on it.
  const auto oldest = [&](int64_t count) {
    runner_->rebuild(4, prefix, live.pages, 2 * page - count, count);
    const ops::RingView ring = cache_->ring(config_.n_layers - 1, model::RingKind::kWindow);
    const int64_t row = 4 * ring.ring + (2 * page - config_.window_size + 1) % ring.ring;
    return ring.rows[row].clone();
  };
  const at::Tensor right = oldest(cache_->rebuild_tokens());
  EXPECT_TRUE(at::equal(oldest(cache_->rebuild_tokens() + 40), right));
  EXPECT_FALSE(at::equal(oldest(cache_->rebuild_tokens() - 1), right));
}

TEST_P(EnginePaths, BytesAreTheClosedForm) {
  EXPECT_EQ(cache_->allocated_bytes(),
            kPages * cache_->page_bytes() + kSlots * cache_->state_bytes());
  int64_t page = 0, state = 0;
  const bool packs = numerics_ == Numerics::kReleased;
  const int64_t dense = numerics_ == Numerics::kIdeal ? 4 : 2, c = config_.head_dim,
                r = config_.rope_head_dim, ci = config_.index_head_dim;
  const int64_t latent = packs ? ((c - r) + 2 * r + (c - r) / 64 + 7) / 8 * 8 : dense * c;
  const int64_t key = packs ? ci / 2 + ci / 32 : dense * ci;
  for (int64_t layer = 0; layer < config_.n_layers; ++layer) {
    state += (config_.window_size + kSlack) * latent;
    const int64_t m = config_.ratio(layer);
    if (m == 0) continue;
    page += cache_->page_tokens() / m * (latent + (m == 4 ? key : 0));
    const int64_t overlap = m == 4 ? 2 : 1;
    state += (overlap * m + kSlack) * 2 * overlap * 4 * (c + (m == 4 ? ci : 0));
  }
  EXPECT_EQ(cache_->page_bytes(), page);
  EXPECT_EQ(cache_->state_bytes(), state);
}

INSTANTIATE_TEST_SUITE_P(Numerics,
                         EnginePaths,
                         ::testing::Values(Setup{"tiny_ideal", false, Numerics::kIdeal},
                                           Setup{"tiny_bf16", false, Numerics::kBf16},
                                           Setup{"small_ideal", true, Numerics::kIdeal},
                                           Setup{"small_released", true, Numerics::kReleased}),
                         [](const auto& test) { return std::string(test.param.name); });

}  // namespace
}  // namespace hadal::engine
