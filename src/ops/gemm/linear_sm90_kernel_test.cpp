// The Hopper products against their twin on the CPU, bit for bit; runs on a card.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include <cuda_runtime.h>

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
using testing::random_bf16;
using testing::random_codes;
using testing::random_powers;

/// Calls part(first, last) for pieces of [0, count) on all processors.
template <typename Part>
void on_threads(int64_t count, Part part) {
  const int64_t each = round_up((count + 15) / 16, 16);
  std::vector<std::jthread> threads;
  for (int64_t first = 0; first < count; first += each)
    threads.emplace_back([=] { part(first, std::min(first + each, count)); });
}

/// Rows of y that the twin gives, in the result's element type as bits.
uint32_t as_bits(float value, ElementType type) {
  const auto bits = std::bit_cast<uint32_t>(value);
  if (type == ElementType::kF32) return bits;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

struct Product {
  int64_t rows, outputs, in;
  Data data = Data::kWide;
  ElementType type = ElementType::kF32;
};

/// y of the twin [rows][outputs], with the outputs shared among threads.
std::vector<float> twin(const Product& s,
                        const std::vector<uint8_t>& x,
                        const std::vector<float>& x_scale,
                        const std::vector<uint8_t>& w,
                        const std::vector<float>& w_scale) {
  const int64_t slabs = round_up(s.in, 128) / 128;
  std::vector<float> y(static_cast<size_t>(s.rows * s.outputs));
  on_threads(s.outputs, [&](int64_t first, int64_t last) {
    std::vector<float> part(static_cast<size_t>(s.rows * (last - first)));
    twin_fp8_cpu({w.data() + first * s.in, w_scale.data() + first * slabs, x.data(), x_scale.data(),
                  part.data(), last - first, s.rows, s.in});
    for (int64_t r = 0; r < s.rows; ++r)
      std::copy_n(part.data() + r * (last - first), last - first, y.data() + r * s.outputs + first);
  });
  return y;
}

struct Difference {
  int64_t count = 0, first = -1;
};

template <typename Bits>
Difference compare(const std::vector<float>& expected,
                   const std::vector<Bits>& found,
                   ElementType type) {
  Difference d;
  for (size_t i = 0; i < expected.size(); ++i) {
    if (as_bits(expected[i], type) != found[i] && d.count++ == 0) d.first = static_cast<int64_t>(i);
  }
  return d;
}

class Fp8Product {
 public:
  explicit Fp8Product(const Product& s)
      : s_(s),
        slabs_(round_up(s.in, 128) / 128),
        x_groups_(round_up(s.rows, 8) / 8),
        w_groups_(round_up(s.outputs, 64) / 8) {
    const auto x = random_codes(static_cast<size_t>(s.rows * s.in), s.data, 1);
    const auto w = random_codes(static_cast<size_t>(s.outputs * s.in), s.data, 2);
    const auto x_scale = random_powers(static_cast<size_t>(s.rows * slabs_), 3);
    const int64_t blocks = (s.outputs + 127) / 128;
    const auto w_blocks = random_powers(static_cast<size_t>(slabs_ * blocks), 4);
    std::vector<float> w_scale(static_cast<size_t>(s.outputs * slabs_));
    for (int64_t o = 0; o < s.outputs; ++o) {
      for (int64_t k = 0; k < slabs_; ++k) w_scale[o * slabs_ + k] = w_blocks[k * blocks + o / 128];
    }
    expected_ = twin(s, x, x_scale, w, w_scale);
    std::vector<float> x_padded(static_cast<size_t>(slabs_ * x_groups_ * 8));
    for (int64_t r = 0; r < s.rows; ++r) {
      for (int64_t k = 0; k < slabs_; ++k)
        x_padded[k * x_groups_ * 8 + r] = x_scale[r * slabs_ + k];
    }
    x_ = std::make_unique<OnDevice<uint8_t>>(sm90::pack_operand(x.data(), s.rows, s.in, x_groups_));
    w_ = std::make_unique<OnDevice<uint8_t>>(
        sm90::pack_operand(w.data(), s.outputs, s.in, w_groups_));
    x_scale_ = std::make_unique<OnDevice<float>>(x_padded);
    w_scale_ = std::make_unique<OnDevice<float>>(w_blocks);
  }

  Difference run(const Sm90Choice& choice) const {
    if (s_.type == ElementType::kF32) return compare(expected_, on_card<uint32_t>(choice), s_.type);
    return compare(expected_, on_card<uint16_t>(choice), s_.type);
  }
  /// y in FP32 as the card computes it.
  std::vector<float> result(const Sm90Choice& choice) const { return on_card<float>(choice); }

 private:
  template <typename T>
  std::vector<T> on_card(const Sm90Choice& choice) const {
    OnDevice<T> y(expected_.size());
    linear_fp8_sm90({x_->get(),
                     w_->get(),
                     x_groups_,
                     w_groups_,
                     x_scale_->get(),
                     w_scale_->get(),
                     s_.rows,
                     s_.outputs,
                     slabs_,
                     {y.get(), s_.outputs, s_.type}},
                    nullptr, choice);
    return y.read();
  }

  Product s_;
  int64_t slabs_, x_groups_, w_groups_;
  std::vector<float> expected_;
  std::unique_ptr<OnDevice<uint8_t>> x_, w_;
  std::unique_ptr<OnDevice<float>> x_scale_, w_scale_;
};

TEST(Fp8Sm90, EveryTileSplitAndRoleGivesTheTwinsBits) {
  for (const Data data : {Data::kWide, Data::kSparse, Data::kSmall, Data::kPositive}) {
    for (const Product s : {Product{257, 320, 1152}, Product{5, 200, 512}, Product{64, 64, 128}}) {
      Product of = s;
      of.data = data;
      const Fp8Product product(of);
      for (const int tile : {0, 8, 16, 32, 64, 128, 256}) {
        const Difference d = product.run({tile, 1});
        EXPECT_EQ(d.count, 0) << "rows " << s.rows << " tile " << tile << " data "
                              << static_cast<int>(data) << " first at " << d.first;
      }
      for (const int split : {2, 4, 8}) {
        for (const int tile : {8, 16}) {
          const Difference d = product.run({tile, split});
          EXPECT_EQ(d.count, 0) << "rows " << s.rows << " tile " << tile << " split " << split;
        }
      }
    }
  }
}

TEST(Fp8Sm90, ResultsAreRoundedOnceToBf16) {
  Product s{33, 256, 896};
  s.type = ElementType::kBf16;
  const Fp8Product product(s);
  for (const int tile : {-1, 0, 8, 64}) EXPECT_EQ(product.run({tile, -1}).count, 0) << tile;
}

class Bf16Product {
 public:
  explicit Bf16Product(const Product& s)
      : s_(s),
        slabs_(round_up(s.in, 64) / 64),
        x_groups_(round_up(s.rows, 8) / 8),
        w_groups_(round_up(s.outputs, 64) / 8) {
    const auto x = random_bf16(static_cast<size_t>(s.rows * s.in), s.data, 1);
    const auto w = random_bf16(static_cast<size_t>(s.outputs * s.in), s.data, 2);
    expected_.resize(static_cast<size_t>(s.rows * s.outputs));
    on_threads(s.outputs, [&](int64_t first, int64_t last) {
      std::vector<float> part(static_cast<size_t>(s.rows * (last - first)));
      twin_bf16_cpu({w.data() + first * s.in, x.data(), part.data(), last - first, s.rows, s.in});
      for (int64_t r = 0; r < s.rows; ++r) {
        std::copy_n(part.data() + r * (last - first), last - first,
                    expected_.data() + r * s.outputs + first);
      }
    });
    const auto bytes = [](const auto& v) { return reinterpret_cast<const uint8_t*>(v.data()); };
    x_ = std::make_unique<OnDevice<uint8_t>>(
        sm90::pack_operand(bytes(x), s.rows, s.in * 2, x_groups_));
    w_ = std::make_unique<OnDevice<uint8_t>>(
        sm90::pack_operand(bytes(w), s.outputs, s.in * 2, w_groups_));
  }

  Difference run(const Sm90Choice& choice) const {
    return compare(expected_, on_card<uint32_t>(choice), ElementType::kF32);
  }
  std::vector<float> result(const Sm90Choice& choice) const { return on_card<float>(choice); }

 private:
  template <typename T>
  std::vector<T> on_card(const Sm90Choice& choice) const {
    OnDevice<T> y(expected_.size());
    linear_bf16_sm90({x_->get(),
                      w_->get(),
                      x_groups_,
                      w_groups_,
                      nullptr,
                      nullptr,
                      s_.rows,
                      s_.outputs,
                      slabs_,
                      {y.get(), s_.outputs, ElementType::kF32}},
                     nullptr, choice);
    return y.read();
  }

  Product s_;
  int64_t slabs_, x_groups_, w_groups_;
  std::vector<float> expected_;
  std::unique_ptr<OnDevice<uint8_t>> x_, w_;
};

TEST(Bf16Sm90, EveryTileSplitAndRoleGivesTheTwinsBits) {
  for (const Data data : {Data::kWide, Data::kSparse, Data::kSmall, Data::kPositive}) {
    for (const Product s : {Product{257, 192, 2112}, Product{3, 128, 4096}, Product{16, 72, 64},
                            Product{50, 192, 4096}, Product{20, 128, 8192}}) {
      Product of = s;
      of.data = data;
      const Bf16Product product(of);
      for (const Sm90Choice choice : {Sm90Choice{0, 1},
                                      {8, 1},
                                      {16, 1},
                                      {32, 1},
                                      {64, 1},
                                      {128, 1},
                                      {256, 1},
                                      {8, 2},
                                      {16, 4},
                                      {32, 4},
                                      {32, 8},
                                      {-1, -1}}) {
        EXPECT_EQ(product.run(choice).count, 0)
            << "rows " << s.rows << " in " << s.in << " tile " << choice.tile << " split "
            << choice.split << " data " << static_cast<int>(data);
      }
    }
  }
}

TEST(WidenedSm90, EveryTileGivesTheTwinsBits) {
  for (const Data data : {Data::kWide, Data::kSparse, Data::kSmall}) {
    for (const Product s : {Product{150, 192, 2176}, Product{7, 64, 128}, Product{33, 256, 1024}}) {
      const int64_t groups = 3, slabs = s.in / 128, blocks = (s.outputs + 127) / 128;
      const int64_t x_groups = round_up(s.rows, 8) / 8;
      const auto x = random_bf16(static_cast<size_t>(groups * s.rows * s.in), data, 1);
      const auto codes = random_codes(static_cast<size_t>(groups * s.outputs * s.in), data, 2);
      const auto scales = random_powers(static_cast<size_t>(groups * slabs * blocks), 3);
      std::vector<uint8_t> operands, tiles(codes.size());
      std::vector<float> expected(static_cast<size_t>(s.rows * groups * s.outputs));
      for (int64_t g = 0; g < groups; ++g) {
        const auto* rows = reinterpret_cast<const uint8_t*>(x.data() + g * s.rows * s.in);
        const auto operand = sm90::pack_operand(rows, s.rows, s.in * 2, x_groups);
        operands.insert(operands.end(), operand.begin(), operand.end());
        const uint8_t* w = codes.data() + g * s.outputs * s.in;
        sm90::pack_widened(w, s.outputs, s.in, tiles.data() + g * s.outputs * s.in);
        std::vector<uint16_t> wide(static_cast<size_t>(s.outputs * s.in));
        for (int64_t o = 0; o < s.outputs; ++o) {
          for (int64_t i = 0; i < s.in; ++i) {
            const int code = w[o * s.in + i], field = code >> 3 & 15, fraction = code & 7;
            const float magnitude = field == 0
                                        ? std::ldexp(static_cast<float>(fraction), -9)
                                        : std::ldexp(static_cast<float>(8 + fraction), field - 10);
            const float value = magnitude * scales[(g * slabs + i / 128) * blocks + o / 128];
            wide[o * s.in + i] =
                static_cast<uint16_t>(std::bit_cast<uint32_t>(code >= 128 ? -value : value) >> 16);
          }
        }
        on_threads(s.outputs, [&](int64_t first, int64_t last) {
          std::vector<float> part(static_cast<size_t>(s.rows * (last - first)));
          twin_bf16_cpu({wide.data() + first * s.in, x.data() + g * s.rows * s.in, part.data(),
                         last - first, s.rows, s.in});
          for (int64_t r = 0; r < s.rows; ++r)
            std::copy_n(part.data() + r * (last - first), last - first,
                        expected.data() + (r * groups + g) * s.outputs + first);
        });
      }
      const OnDevice<uint8_t> x_there(operands), w_there(tiles);
      const OnDevice<float> scales_there(scales);
      for (const int tile : {8, 16, 32, 64, 128, -1}) {
        const OnDevice<uint16_t> y(expected.size());
        widened_sm90({x_there.get(), x_groups, w_there.get(), scales_there.get(), s.rows, groups,
                      s.outputs, slabs, y.get(), groups * s.outputs},
                     nullptr, {tile, -1});
        EXPECT_EQ(compare(expected, y.read(), ElementType::kBf16).count, 0)
            << "tile " << tile << " rows " << s.rows << " data " << static_cast<int>(data);
      }
    }
  }
}

TEST(Bf16Sm90, OperandsAreLaidOutAsOnTheHost) {
  for (const auto [rows, in, stride] :
       {std::array<int64_t, 3>{1, 64, 64}, {9, 4096, 4096}, {13, 200, 208}}) {
    const auto x = random_bf16(static_cast<size_t>(rows * stride), Data::kWide, 1);
    std::vector<uint8_t> dense(static_cast<size_t>(rows * in * 2));
    for (int64_t r = 0; r < rows; ++r)
      std::memcpy(dense.data() + r * in * 2, x.data() + r * stride, static_cast<size_t>(in * 2));
    const int64_t groups = (rows + 7) / 8 + 1;
    const auto expected = sm90::pack_operand(dense.data(), rows, in * 2, groups);
    const OnDevice<uint16_t> there(x);
    const OnDevice<uint8_t> operand(expected.size());
    bf16_operand_sm90({there.get(), rows, in, stride, operand.get(), groups}, nullptr);
    EXPECT_EQ(operand.read(), expected) << rows << " x " << in;
  }
}

TEST(ExpertsFp4Sm90, EveryTileGivesTheTwinsBits) {
  const int64_t experts = 3, outputs = 192, in = 640, slabs = 5;
  const std::vector<ExpertRun> runs = {{2, 0, 1}, {0, 8, 13}, {1, 24, 150}};
  const int64_t x_groups = 23;
  std::mt19937 random(7);
  std::vector<uint8_t> packed(static_cast<size_t>(experts * outputs * in / 2)),
      scales(static_cast<size_t>(experts * outputs * in / 32));
  for (uint8_t& byte : packed) byte = static_cast<uint8_t>(random());
  for (uint8_t& byte : scales) byte = static_cast<uint8_t>(120 + random() % 15);
  const auto x = random_codes(static_cast<size_t>(x_groups * 8 * in), Data::kWide, 8);
  const auto x_scale = random_powers(static_cast<size_t>(x_groups * 8 * slabs), 9);
  std::vector<uint8_t> tiles(static_cast<size_t>(experts * sm90::fp4_bytes(outputs, in)));
  std::vector<uint8_t> codes(static_cast<size_t>(experts * outputs * in));
  std::vector<float> w_scale(static_cast<size_t>(experts * outputs * slabs));
  for (int64_t e = 0; e < experts; ++e) {
    ASSERT_EQ(
        sm90::pack_fp4(packed.data() + e * outputs * in / 2, scales.data() + e * outputs * in / 32,
                       outputs, in, tiles.data() + e * sm90::fp4_bytes(outputs, in)),
        0);
  }
  for (int64_t o = 0; o < experts * outputs; ++o) {
    ASSERT_TRUE(fold_fp4(packed.data() + o * in / 2, scales.data() + o * in / 32, in,
                         codes.data() + o * in, w_scale.data() + o * slabs));
  }
  std::vector<float> x_padded(x_scale.size());
  for (int64_t r = 0; r < x_groups * 8; ++r) {
    for (int64_t k = 0; k < slabs; ++k) x_padded[k * x_groups * 8 + r] = x_scale[r * slabs + k];
  }
  const OnDevice<uint8_t> x_there(sm90::pack_operand(x.data(), x_groups * 8, in, x_groups));
  const OnDevice<uint8_t> w_there(tiles);
  const OnDevice<float> scale_there(x_padded);
  const OnDevice<ExpertRun> runs_there(runs);
  const OnDevice<int32_t> count_there(std::vector<int32_t>{3});
  for (const int tile : {8, 16, 32, 64, 128}) {
    OnDevice<uint32_t> y(static_cast<size_t>(x_groups * 8 * outputs));
    experts_fp4_sm90({x_there.get(),
                      scale_there.get(),
                      x_groups,
                      w_there.get(),
                      outputs,
                      slabs,
                      runs_there.get(),
                      count_there.get(),
                      5,
                      {y.get(), outputs, ElementType::kF32}},
                     nullptr, {tile, -1});
    const auto found = y.read();
    std::vector<bool> written(static_cast<size_t>(x_groups * 8));
    for (const ExpertRun& run : runs) {
      const Product s{run.rows, outputs, in};
      const auto part = [&](const auto& all, int64_t first, int64_t count) {
        return std::vector(all.begin() + first, all.begin() + first + count);
      };
      const auto expected = twin(s, part(x, run.first_row * in, run.rows * in),
                                 part(x_scale, run.first_row * slabs, run.rows * slabs),
                                 part(codes, run.expert * outputs * in, outputs * in),
                                 part(w_scale, run.expert * outputs * slabs, outputs * slabs));
      const Difference d = compare(
          expected, part(found, run.first_row * outputs, run.rows * outputs), ElementType::kF32);
      EXPECT_EQ(d.count, 0) << "tile " << tile << " expert " << run.expert << " first at "
                            << d.first;
      for (int64_t r = 0; r < run.rows; ++r) written[run.first_row + r] = true;
    }
    for (int64_t r = 0; r < x_groups * 8; ++r) {
      if (written[r]) continue;
      EXPECT_EQ(found[r * outputs], 0xffffffffu) << "row " << r << " of no run was written";
    }
  }
}

TEST(Sm90, GoldenProductsAreWhatIsStored) {
  for (const testing::GoldenProduct& g : testing::kGoldenProducts) {
    const Fp8Product fp8({g.rows, g.outputs, g.in, g.data});
    EXPECT_EQ(testing::digest(fp8.result({})), g.fp8)
        << std::hex << testing::digest(fp8.result({}));
    const Bf16Product bf16({g.rows, g.outputs, g.in, g.data});
    EXPECT_EQ(testing::digest(bf16.result({})), g.bf16)
        << std::hex << testing::digest(bf16.result({}));
  }
}

}  // namespace
}  // namespace hadal::ops
