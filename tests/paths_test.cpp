// One forward pass (numerics contract, rules 1 to 3): the logits of a token are the same bits
// whatever path computed them. CPU kernels, every numerics that the widths allow, forced
// instruction sets and thread counts included.
#include <algorithm>
#include <numeric>
#include <random>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <gtest/gtest.h>

#include "base/cpu.h"
#include "base/parallel.h"
#include "model/contiguous_kv.h"
#include "testing/tiny_model.h"

namespace hadal {
namespace {

using ops::Numerics;

struct PathCase {
  const char* name;
  bool released_widths;
  Numerics numerics;
};

void PrintTo(const PathCase& path_case, std::ostream* out) { *out << path_case.name; }

class Paths : public ::testing::TestWithParam<PathCase> {
 protected:
  void SetUp() override {
    const PathCase& setup = GetParam();
    config_ = setup.released_widths ? testing::small_config() : testing::tiny_config();
    model_ = std::make_unique<model::Transformer>(testing::random_model(config_, 7, at::kFloat));
    dtype_ = setup.numerics == Numerics::kIdeal ? at::kFloat : at::kBFloat16;
    // A checkpoint's values: rounded once, so that every path reads the same weights.
    model_->visit([&](model::Parameter& p) {
      const bool rounded = p.is_matrix() || p.kind == model::ParamKind::kEmbedding ||
                           p.kind == model::ParamKind::kHead;
      if (rounded && setup.numerics != Numerics::kIdeal)
        p.value = p.operand(setup.numerics).contiguous();
    });
    std::mt19937 random(3);
    const int64_t base = setup.released_widths ? 260 : 90;
    for (const int64_t length : {base, base / 3, base - 29, int64_t{1}}) {
      std::vector<int64_t> ids(static_cast<size_t>(length));
      for (int64_t& id : ids)
        id = static_cast<int64_t>(random() % static_cast<unsigned>(config_.vocab_size));
      sequences_.push_back(ids);
    }
  }
  void TearDown() override {
    set_num_threads(2);
    force_isa(detect_isa());
  }

  at::Tensor logits_of(const at::Tensor& streams) const {
    return model_->logits(model_->head_input(streams, GetParam().numerics), GetParam().numerics);
  }

  /// Training's way: packed rows, no cache. One [length, vocab] tensor a sequence.
  std::vector<at::Tensor> packed(const std::vector<size_t>& order) const {
    std::vector<int64_t> lengths, ids;
    for (const size_t s : order) {
      lengths.push_back(static_cast<int64_t>(sequences_[s].size()));
      ids.insert(ids.end(), sequences_[s].begin(), sequences_[s].end());
    }
    const ops::Batch batch(lengths, std::vector<int64_t>(lengths.size(), 0), at::kCPU);
    model::ForwardContext context;
    context.batch = &batch;
    context.numerics = GetParam().numerics;
    const at::Tensor all = logits_of(model_->forward(at::tensor(ids, at::kLong), context).streams);
    std::vector<at::Tensor> result(sequences_.size());
    for (size_t i = 0; i < order.size(); ++i) {
      result[order[i]] = all.narrow(0, batch.begin(static_cast<int64_t>(i)), lengths[i]);
    }
    return result;
  }

  /// A service's way: every step runs some sequences by chunks of random length, now and then with
  /// a rollback.
  std::vector<at::Tensor> chunked(unsigned seed, int64_t max_chunk, bool rollbacks) const {
    std::mt19937 random(seed);
    model::ContiguousKv kv(config_, static_cast<int64_t>(sequences_.size()), 512, dtype_, at::kCPU);
    std::vector<std::vector<at::Tensor>> rows(sequences_.size());
    for (;;) {
      std::vector<int64_t> slots, lengths, ids;
      for (size_t s = 0; s < sequences_.size(); ++s) {
        const auto slot = static_cast<int64_t>(s);
        const int64_t total = static_cast<int64_t>(sequences_[s].size());
        if (rollbacks && kv.length(slot) > 8 && random() % 4 == 0) {
          const int64_t kept = std::max(kv.rollback_floor(slot),
                                        kv.length(slot) - static_cast<int64_t>(random() % 8));
          kv.rollback(slot, kept);
          rows[s].resize(static_cast<size_t>(kept));
        }
        if (kv.length(slot) == total || (random() % 3 == 0 && max_chunk > 1)) continue;
        const int64_t chunk =
            std::min(total - kv.length(slot),
                     1 + static_cast<int64_t>(random() % static_cast<unsigned>(max_chunk)));
        slots.push_back(slot);
        lengths.push_back(chunk);
      }
      if (slots.empty()) {
        bool done = true;
        for (size_t s = 0; s < sequences_.size(); ++s) {
          done &= rows[s].size() == sequences_[s].size();
        }
        if (done) break;
        continue;
      }
      // Any company, any order.
      std::vector<size_t> order(slots.size());
      std::iota(order.begin(), order.end(), size_t{0});
      std::shuffle(order.begin(), order.end(), random);
      std::vector<int64_t> shuffled_slots, shuffled_lengths;
      for (const size_t i : order) {
        shuffled_slots.push_back(slots[i]);
        shuffled_lengths.push_back(lengths[i]);
        const auto begin = sequences_[static_cast<size_t>(slots[i])].begin() + kv.length(slots[i]);
        ids.insert(ids.end(), begin, begin + lengths[i]);
      }
      const ops::Batch batch = kv.begin(shuffled_slots, shuffled_lengths);
      model::ForwardContext context;
      context.batch = &batch;
      context.numerics = GetParam().numerics;
      context.kv = &kv;
      const at::Tensor all =
          logits_of(model_->forward(at::tensor(ids, at::kLong), context).streams);
      for (int64_t i = 0; i < batch.num_seqs(); ++i) {
        for (int64_t t = batch.begin(i); t < batch.end(i); ++t) {
          rows[static_cast<size_t>(shuffled_slots[static_cast<size_t>(i)])].push_back(all[t]);
        }
      }
      kv.advance();
    }
    std::vector<at::Tensor> result;
    for (const auto& list : rows) result.push_back(at::stack(list));
    return result;
  }

  void expect_same(const std::vector<at::Tensor>& a,
                   const std::vector<at::Tensor>& b,
                   const char* what) const {
    for (size_t s = 0; s < sequences_.size(); ++s) {
      EXPECT_TRUE(at::equal(a[s], b[s])) << what << ", sequence " << s << ": max difference "
                                         << (a[s] - b[s]).abs().max().item<double>();
    }
  }

  model::ModelConfig config_;
  std::unique_ptr<model::Transformer> model_;
  at::ScalarType dtype_ = at::kFloat;
  std::vector<std::vector<int64_t>> sequences_;
};

TEST_P(Paths, EveryPathGivesTheSameBits) {
  const at::NoGradGuard no_grad;
  const std::vector<at::Tensor> expected = packed({0, 1, 2, 3});
  ASSERT_TRUE(at::isfinite(expected[0]).all().item<bool>());
  expect_same(packed({3, 2, 0, 1}), expected, "packed in another order");
  for (size_t alone = 0; alone < sequences_.size(); ++alone) {
    EXPECT_TRUE(at::equal(packed({alone})[alone], expected[alone])) << "alone " << alone;
  }
  expect_same(chunked(1, 1000, false), expected, "one-shot prefill");
  expect_same(chunked(2, 40, false), expected, "random chunks");
  expect_same(chunked(3, 7, true), expected, "small chunks with rollbacks");
  expect_same(chunked(4, 1, false), expected, "token by token");
}

TEST_P(Paths, ThreadsDoNotMatter) {
  const at::NoGradGuard no_grad;
  set_num_threads(1);
  const std::vector<at::Tensor> expected = packed({0, 1, 2, 3});
  for (const int threads : {2, 3}) {
    set_num_threads(threads);
    expect_same(packed({0, 1, 2, 3}), expected, "threads");
  }
}

TEST_P(Paths, TrainingForwardIsTheSamePass) {
  const std::vector<at::Tensor> expected = [&] {
    const at::NoGradGuard no_grad;
    return packed({0, 1, 2, 3});
  }();
  model_->visit([](model::Parameter& p) {
    if (p.trainable()) p.value.requires_grad_(true);
  });
  expect_same(packed({0, 1, 2, 3}), expected, "with gradients recorded");
}

TEST_P(Paths, InstructionSetsAgree) {
  const at::NoGradGuard no_grad;
  const std::vector<at::Tensor> expected = packed({0, 1, 2, 3});
  for (const Isa isa : {Isa::kPortable, Isa::kAvx2}) {
    if (isa >= detect_isa()) continue;
    force_isa(isa);
    expect_same(packed({0, 1, 2, 3}), expected, std::string(isa_name(isa)).c_str());
  }
}

INSTANTIATE_TEST_SUITE_P(Numerics,
                         Paths,
                         ::testing::Values(PathCase{"tiny_ideal", false, Numerics::kIdeal},
                                           PathCase{"tiny_bf16", false, Numerics::kBf16},
                                           PathCase{"small_ideal", true, Numerics::kIdeal},
                                           PathCase{"small_bf16", true, Numerics::kBf16},
                                           PathCase{"small_released", true, Numerics::kReleased},
                                           PathCase{"small_fp8", true, Numerics::kFp8}),
                         [](const auto& param_info) { return param_info.param.name; });

}  // namespace
}  // namespace hadal
