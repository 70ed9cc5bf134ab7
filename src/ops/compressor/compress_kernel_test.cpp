// The compressor on a card against the CPU's kernel, bit for bit: a step of sequences that begin at
// many positions, with the rings that their histories left.
#include <algorithm>
#include <bit>
#include <cmath>
#include <utility>
#include <vector>

#include "ops/compressor/compress_cpu.h"
#include "ops/compressor/compress_sm90.h"
#include "testing/float_data.h"
#include "testing/on_device.h"

namespace hadal::ops {

// In the program this stands beside the op, which needs LibTorch.
constinit CpuSlot<void(const CompressCpuParams&, int64_t, int64_t)> compress_cpu;

namespace {

using testing::differences;
using testing::normals;
using testing::OnDevice;

struct Run {
  int32_t start, length;
};

/// Sequences with all their rows from position 0 on; the step has the last `length` of each.
class World {
 public:
  World(int64_t ratio, int64_t d, const std::vector<Run>& runs, bool smallest_ring)
      : ratio_(ratio),
        d_(d),
        width_((ratio == 4 ? 2 : 1) * d),
        stride_(width_ + 8),  // as where kv and gate are columns of one product
        ring_(smallest_ring ? (ratio == 4 ? 2 : 1) * ratio - 1 : 2 * ratio),
        runs_(runs) {
    ape_ = normals(static_cast<size_t>(ratio * width_), 1.0f, 1);
    kv_ring_.assign(runs.size() * static_cast<size_t>(ring_ * width_), NAN);
    score_ring_ = kv_ring_;
    for (size_t s = 0; s < runs.size(); ++s) {
      const auto values = static_cast<size_t>((runs[s].start + runs[s].length) * width_);
      kv_.push_back(normals(values, 1.0f, static_cast<unsigned>(10 + s)));
      gate_.push_back(normals(values, 3.0f, static_cast<unsigned>(50 + s)));
      first_row_.push_back(static_cast<int32_t>(pos_.size()));
      slots_.push_back(static_cast<int32_t>(slot(s)));
      for (int64_t p = 0; p < runs[s].start; ++p) keep(s, p, kv_ring_, score_ring_);
      for (int64_t p = runs[s].start; p < runs[s].start + runs[s].length; ++p) {
        if (p + ring_ >= runs[s].start + runs[s].length) {
          from_.push_back(static_cast<int64_t>(pos_.size()));
          to_.push_back(slot(s) * ring_ + p % ring_);
        }
        pos_.push_back(p);
        for (auto [step, rows] : {std::pair{&step_kv_, &kv_}, {&step_gate_, &gate_}}) {
          step->insert(step->end(), row(*rows, s, p), row(*rows, s, p) + width_);
          step->resize(step->size() + static_cast<size_t>(stride_ - width_), NAN);
        }
      }
      for (int64_t b = runs[s].start / ratio; b < (runs[s].start + runs[s].length) / ratio; ++b) {
        block_seq_.push_back(static_cast<int64_t>(s));
        block_pos_.push_back(b * ratio);
      }
    }
    // Places that are in no use, as in a step of fixed size.
    block_seq_.push_back(-1);
    block_pos_.push_back(0);
    from_.push_back(-1);
    to_.push_back(0);
  }

  void check() const {
    const OnDevice<float> kv(step_kv_), gate(step_gate_), ape(ape_), kv_ring(kv_ring_),
        score_ring(score_ring_);
    const OnDevice<int32_t> slots(slots_), first_row(first_row_);
    const OnDevice<int64_t> pos(pos_), block_seq(block_seq_), block_pos(block_pos_), from(from_),
        to(to_);
    const OnDevice<uint16_t> pooled(block_seq_.size() * static_cast<size_t>(d_));
    const CompressorRowsSm90 rows = {kv.get(),
                                     gate.get(),
                                     ape.get(),
                                     kv_ring.get(),
                                     score_ring.get(),
                                     {.slots = slots.get(), .size = ring_},
                                     first_row.get(),
                                     pos.get(),
                                     stride_,
                                     ratio_,
                                     d_};
    compress_sm90({rows, block_seq.get(), block_pos.get(), pooled.get(),
                   static_cast<int64_t>(block_seq_.size())},
                  nullptr);
    keep_rows_sm90({rows, from.get(), to.get(), static_cast<int64_t>(from_.size())}, nullptr);
    EXPECT_EQ(differences(pooled.read(), expected_blocks()), 0);
    auto kv_kept = kv_ring_, score_kept = score_ring_;
    for (size_t s = 0; s < runs_.size(); ++s) {
      for (int64_t p = runs_[s].start; p < runs_[s].start + runs_[s].length; ++p)
        keep(s, p, kv_kept, score_kept);
    }
    EXPECT_EQ(differences(kv_ring.read(), kv_kept), 0);
    EXPECT_EQ(differences(score_ring.read(), score_kept), 0);
  }

 private:
  using Rows = std::vector<std::vector<float>>;

  /// Slots are not in the order of sequences.
  int64_t slot(size_t s) const { return static_cast<int64_t>(runs_.size() - 1 - s); }
  const float* row(const Rows& x, size_t s, int64_t p) const { return x[s].data() + p * width_; }
  std::vector<float> score(size_t s, int64_t p) const {
    std::vector<float> result(row(gate_, s, p), row(gate_, s, p) + width_);
    for (int64_t i = 0; i < width_; ++i)
      result[static_cast<size_t>(i)] += ape_[static_cast<size_t>(p % ratio_ * width_ + i)];
    return result;
  }
  void keep(size_t s,
            int64_t p,
            std::vector<float>& kv_ring,
            std::vector<float>& score_ring) const {
    const auto to = (slot(s) * ring_ + p % ring_) * width_;
    std::copy_n(row(kv_, s, p), width_, kv_ring.begin() + to);
    const auto scores = score(s, p);
    std::copy(scores.begin(), scores.end(), score_ring.begin() + to);
  }
  std::vector<uint16_t> expected_blocks() const {
    const int64_t overlap = ratio_ == 4 ? 2 : 1, candidates = overlap * ratio_;
    std::vector<uint16_t> result;
    for (size_t b = 0; b + 1 < block_seq_.size(); ++b) {
      const auto s = static_cast<size_t>(block_seq_[b]);
      std::vector<std::vector<float>> scores(static_cast<size_t>(candidates));
      std::vector<const float*> kv_rows, score_rows;
      for (int64_t j = 0; j < candidates; ++j) {
        const int64_t p = block_pos_[b] - (overlap - 1) * ratio_ + j;
        const int64_t column = overlap == 2 && j >= ratio_ ? d_ : 0;
        if (p >= 0) scores[static_cast<size_t>(j)] = score(s, p);
        kv_rows.push_back(p < 0 ? nullptr : row(kv_, s, p) + column);
        score_rows.push_back(p < 0 ? nullptr : scores[static_cast<size_t>(j)].data() + column);
      }
      std::vector<float> pooled(static_cast<size_t>(d_));
      compress_cpu({kv_rows.data(), score_rows.data(), pooled.data(), candidates, d_}, 0, 1);
      for (const float v : pooled) {
        const auto bits = std::bit_cast<uint32_t>(v);
        result.push_back(static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16));
      }
    }
    result.resize(result.size() + static_cast<size_t>(d_), 0xffff);  // of the place in no use
    return result;
  }

  int64_t ratio_, d_, width_, stride_, ring_;
  std::vector<Run> runs_;
  std::vector<float> ape_, kv_ring_, score_ring_, step_kv_, step_gate_;
  Rows kv_, gate_;
  std::vector<int32_t> slots_, first_row_;
  std::vector<int64_t> pos_, block_seq_, block_pos_, from_, to_;
};

TEST(CompressSm90, HasTheBitsOfTheCpu) {
  for (const bool smallest : {false, true}) {
    for (const int64_t d : {36, 128, 512}) {
      World(4, d, {{0, 1}, {0, 9}, {3, 1}, {7, 1}, {6, 30}, {12, 4}, {101, 3}}, smallest).check();
      World(4, d, {{5, 3}}, smallest).check();
      World(128, d, {{0, 130}, {127, 1}, {255, 1}, {200, 300}, {64, 63}, {128, 128}}, smallest)
          .check();
    }
  }
}

// A step may have more blocks than the second dimension of a grid.
TEST(CompressSm90, PoolsMoreThan65535Blocks) { World(4, 4, {{2, 4 * 66000}}, true).check(); }

}  // namespace
}  // namespace hadal::ops
