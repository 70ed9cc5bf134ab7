// Products with FP8 and BF16 weights grouped by expert on a card against the twin on the CPU, bit
// for bit. (FP4: linear_sm90_kernel_test.cpp.)
#include <bit>
#include <vector>

#include <gtest/gtest.h>

#include "ops/gemm/hopper_twin.h"
#include "ops/gemm/linear_sm90.h"
#include "ops/gemm/sm90_layout.h"
#include "ops/gemm/sm90_pack.h"
#include "testing/on_device.h"
#include "testing/product_data.h"

namespace hadal::ops {
namespace {

using sm90::round_up;
using testing::Data;
using testing::OnDevice;

/// Experts of a shape, rows of a few of them, and what the twin makes of those.
class Experts {
 public:
  static constexpr int64_t kExperts = 4, kGroups = 23;

  Experts(bool fp8, int64_t outputs, int64_t in, Data data)
      : fp8_(fp8),
        outputs_(outputs),
        in_(in),
        slabs_(round_up(in * (fp8 ? 1 : 2), 128) / 128),
        expected_(static_cast<size_t>(kGroups * 8 * outputs)) {
    if (fp8) {
      make_fp8(data);
    } else {
      make_bf16(data);
    }
  }

  /// The product by tiles of so many rows, compared with the twin; rows of no run stay as they are.
  void check(int tile) const {
    const OnDevice<uint8_t> x(x_), w(w_);
    const OnDevice<float> x_scale(x_scale_), w_scale(w_scale_);
    const OnDevice<ExpertRun> runs(kRuns);
    const OnDevice<int32_t> count(std::vector<int32_t>{static_cast<int32_t>(kRuns.size())});
    const OnDevice<uint32_t> y(expected_.size());
    const ExpertsSm90Params p = {.x = x.get(),
                                 .x_scale = fp8_ ? x_scale.get() : nullptr,
                                 .x_groups = kGroups,
                                 .w = w.get(),
                                 .outputs = outputs_,
                                 .slabs = slabs_,
                                 .runs = runs.get(),
                                 .num_runs = count.get(),
                                 .max_runs = 5,
                                 .out = {y.get(), outputs_, ElementType::kF32},
                                 .w_scale = fp8_ ? w_scale.get() : nullptr};
    (fp8_ ? experts_fp8_sm90 : experts_bf16_sm90)(p, nullptr, {tile, -1});
    const std::vector<uint32_t> found = y.read();
    std::vector<uint32_t> wanted(found.size(), 0xffffffffu);
    for (const ExpertRun& run : kRuns) {
      for (auto i = static_cast<size_t>(run.first_row * outputs_);
           i < static_cast<size_t>((run.first_row + run.rows) * outputs_); ++i)
        wanted[i] = std::bit_cast<uint32_t>(expected_[i]);
    }
    int64_t wrong = 0;
    for (size_t i = 0; i < found.size(); ++i) {
      if (found[i] == wanted[i]) continue;
      if (wrong++ == 0) {
        ADD_FAILURE() << (fp8_ ? "FP8" : "BF16") << " tile " << tile << " row "
                      << static_cast<int64_t>(i) / outputs_ << " output "
                      << static_cast<int64_t>(i) % outputs_ << ": " << std::hex << found[i]
                      << ", twin " << wanted[i];
      }
    }
    EXPECT_EQ(wrong, 0) << outputs_ << " x " << in_ << " tile " << tile;
  }

 private:
  inline static const std::vector<ExpertRun> kRuns = {{2, 0, 1}, {0, 8, 13}, {3, 24, 150}};

  /// Operands of all experts, one behind the other.
  template <typename T>
  void pack(const std::vector<T>& x, const std::vector<T>& w) {
    const auto bytes = [](const T* v) { return reinterpret_cast<const uint8_t*>(v); };
    const auto row_bytes = in_ * static_cast<int64_t>(sizeof(T));
    x_ = sm90::pack_operand(bytes(x.data()), kGroups * 8, row_bytes, kGroups);
    for (int64_t e = 0; e < kExperts; ++e) {
      const auto one = sm90::pack_operand(bytes(w.data() + e * outputs_ * in_), outputs_, row_bytes,
                                          round_up(outputs_, 64) / 8);
      w_.insert(w_.end(), one.begin(), one.end());
    }
  }

  void make_fp8(Data data) {
    const auto x = testing::random_codes(static_cast<size_t>(kGroups * 8 * in_), data, 1);
    const auto w = testing::random_codes(static_cast<size_t>(kExperts * outputs_ * in_), data, 2);
    const auto x_scale = testing::random_powers(static_cast<size_t>(kGroups * 8 * slabs_), 3);
    const int64_t blocks = (outputs_ + 127) / 128;
    w_scale_ = testing::random_powers(static_cast<size_t>(kExperts * slabs_ * blocks), 4);
    pack(x, w);
    x_scale_.resize(x_scale.size());
    for (int64_t r = 0; r < kGroups * 8; ++r) {
      for (int64_t k = 0; k < slabs_; ++k)
        x_scale_[static_cast<size_t>(k * kGroups * 8 + r)] =
            x_scale[static_cast<size_t>(r * slabs_ + k)];
    }
    for (const ExpertRun& run : kRuns) {
      std::vector<float> scale;  // of every output
      for (int64_t o = 0; o < outputs_; ++o) {
        for (int64_t k = 0; k < slabs_; ++k)
          scale.push_back(
              w_scale_[static_cast<size_t>((run.expert * slabs_ + k) * blocks + o / 128)]);
      }
      twin_fp8_cpu({.w = w.data() + run.expert * outputs_ * in_,
                    .w_scale = scale.data(),
                    .x = x.data() + run.first_row * in_,
                    .x_scale = x_scale.data() + run.first_row * slabs_,
                    .y = expected_.data() + run.first_row * outputs_,
                    .outputs = outputs_,
                    .rows = run.rows,
                    .in = in_});
    }
  }

  void make_bf16(Data data) {
    const auto x = testing::random_bf16(static_cast<size_t>(kGroups * 8 * in_), data, 1);
    const auto w = testing::random_bf16(static_cast<size_t>(kExperts * outputs_ * in_), data, 2);
    pack(x, w);
    x_scale_.resize(1), w_scale_.resize(1);  // no list is empty memory
    for (const ExpertRun& run : kRuns) {
      twin_bf16_cpu({.w = w.data() + run.expert * outputs_ * in_,
                     .x = x.data() + run.first_row * in_,
                     .y = expected_.data() + run.first_row * outputs_,
                     .outputs = outputs_,
                     .rows = run.rows,
                     .in = in_});
    }
  }

  bool fp8_;
  int64_t outputs_, in_, slabs_;
  std::vector<uint8_t> x_, w_;
  std::vector<float> x_scale_, w_scale_, expected_;
};

TEST(ExpertsSm90, EveryTileGivesTheTwinsBits) {
  for (const Data data : {Data::kWide, Data::kPositive}) {
    for (const Experts& experts : {Experts(true, 200, 640, data), Experts(true, 64, 128, data),
                                   Experts(false, 200, 2120, data), Experts(false, 64, 64, data)}) {
      for (const int tile : {8, 16, 32, 64, 128, -1}) experts.check(tile);
    }
  }
}

// Rows are gathered by number on their way to an operand.
TEST(ExpertsSm90, Bf16RowsAreGathered) {
  const int64_t in = 200, stride = 208, groups = 2;
  const auto x = testing::random_bf16(static_cast<size_t>(9 * stride), Data::kWide, 5);
  const std::vector<int32_t> source = {8, -1, 0, 3, 3, -1, 7, 1, 2, -1, 4};
  std::vector<uint16_t> rows;
  for (const int32_t from : source) {
    for (int64_t i = 0; i < in; ++i)
      rows.push_back(from < 0 ? uint16_t{0} : x[static_cast<size_t>(from * stride + i)]);
  }
  const auto count = static_cast<int64_t>(source.size());
  const auto expected =
      sm90::pack_operand(reinterpret_cast<const uint8_t*>(rows.data()), count, in * 2, groups);
  const OnDevice<uint16_t> there(x);
  const OnDevice<int32_t> source_there(source);
  const OnDevice<uint8_t> operand(expected.size());
  bf16_operand_sm90({.x = there.get(),
                     .rows = count,
                     .in = in,
                     .stride = stride,
                     .operand = operand.get(),
                     .x_groups = groups,
                     .source = source_there.get()},
                    nullptr);
  EXPECT_EQ(operand.read(), expected);
}

}  // namespace
}  // namespace hadal::ops
