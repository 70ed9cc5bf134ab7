#include "ops/gemm/hopper_twin.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include <gtest/gtest.h>

#include "base/cpu.h"
#include "ops/gemm/sm90_layout.h"
#include "testing/product_data.h"

namespace hadal::ops {
namespace {

using testing::Data;

std::vector<Isa> available() {
  std::vector<Isa> sets;
  for (int level = 0; level <= static_cast<int>(detect_isa()); ++level)
    sets.push_back(static_cast<Isa>(level));
  return sets;
}

struct Operands {
  int64_t rows, outputs, in, slabs;
  std::vector<uint8_t> x, w;
  std::vector<float> x_scale, w_scale;

  Operands(int64_t num_rows, int64_t num_outputs, int64_t inputs, Data data)
      : rows(num_rows),
        outputs(num_outputs),
        in(inputs),
        slabs((inputs + 127) / 128),
        x(testing::random_codes(static_cast<size_t>(rows * in), data, 1)),
        w(testing::random_codes(static_cast<size_t>(outputs * in), data, 2)),
        x_scale(testing::random_powers(static_cast<size_t>(rows * slabs), 3)) {
    // One scale for 128 outputs and 128 inputs, as FP8 weights have it.
    const int64_t blocks = (outputs + 127) / 128;
    const auto of_blocks = testing::random_powers(static_cast<size_t>(slabs * blocks), 4);
    w_scale.resize(static_cast<size_t>(outputs * slabs));
    for (int64_t o = 0; o < outputs; ++o) {
      for (int64_t s = 0; s < slabs; ++s)
        w_scale[static_cast<size_t>(o * slabs + s)] =
            of_blocks[static_cast<size_t>(s * blocks + o / 128)];
    }
  }

  std::vector<float> product() const {
    std::vector<float> y(static_cast<size_t>(rows * outputs));
    twin_fp8_cpu({w.data(), w_scale.data(), x.data(), x_scale.data(), y.data(), outputs, rows, in});
    return y;
  }
};

std::vector<float> bf16_product(int64_t rows, int64_t outputs, int64_t in, Data data) {
  const auto x = testing::random_bf16(static_cast<size_t>(rows * in), data, 1);
  const auto w = testing::random_bf16(static_cast<size_t>(outputs * in), data, 2);
  std::vector<float> y(static_cast<size_t>(rows * outputs));
  twin_bf16_cpu({w.data(), x.data(), y.data(), outputs, rows, in});
  return y;
}

/// One instruction at a time, as the definition has it.
float by_instructions(const Operands& o, int64_t row, int64_t output) {
  float y = 0.0f;
  for (int64_t slab = 0; slab < o.slabs; ++slab) {
    float chain = 0.0f;
    for (int64_t k = slab * 128; k < std::min(o.in, slab * 128 + 128); k += 32)
      chain = wgmma_e4m3(&o.x[static_cast<size_t>(row * o.in + k)],
                         &o.w[static_cast<size_t>(output * o.in + k)], chain);
    y = std::fma(chain,
                 o.x_scale[static_cast<size_t>(row * o.slabs + slab)] *
                     o.w_scale[static_cast<size_t>(output * o.slabs + slab)],
                 y);
  }
  return y;
}

TEST(HopperTwin, VectorKernelsAreTheInstructionsOneByOne) {
  for (const Data data : {Data::kWide, Data::kSparse, Data::kSmall, Data::kPositive}) {
    const Operands o(3, 37, 352, data);
    const auto x = testing::random_bf16(3 * 1056, data, 1);
    const auto w = testing::random_bf16(37 * 1056, data, 2);
    for (const Isa isa : available()) {
      force_isa(isa);
      const std::vector<float> fp8 = o.product(), bf16 = bf16_product(3, 37, 1056, data);
      for (int64_t row = 0; row < 3; ++row) {
        for (int64_t output = 0; output < 37; ++output) {
          const auto at = static_cast<size_t>(row * 37 + output);
          EXPECT_EQ(std::bit_cast<uint32_t>(fp8[at]),
                    std::bit_cast<uint32_t>(by_instructions(o, row, output)))
              << isa_name(isa) << " row " << row << " output " << output;
          float sum = 0.0f;
          for (int64_t first = 0; first < 1056; first += 1024) {
            float chain = 0.0f;
            for (int64_t k = first; k < std::min<int64_t>(1056, first + 1024); k += 16)
              chain = wgmma_bf16(&x[static_cast<size_t>(row * 1056 + k)],
                                 &w[static_cast<size_t>(output * 1056 + k)], chain);
            sum += chain;
          }
          EXPECT_EQ(std::bit_cast<uint32_t>(bf16[at]), std::bit_cast<uint32_t>(sum))
              << isa_name(isa) << " row " << row << " output " << output;
        }
      }
    }
  }
  force_isa(detect_isa());
}

/// BF16 rows whose steps of 16 have exponents of their own, from one value to 60 apart, subnormal
/// ones and zeros among them; every fifth row has the largest significand everywhere.
std::vector<uint16_t> uneven_rows(int64_t rows, int64_t in, unsigned largest, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<uint16_t> values;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t step = 0; step < in / 16; ++step) {
      const auto base = static_cast<unsigned>(random() % largest),
                 spread = static_cast<unsigned>(1 + random() % 60);
      for (int k = 0; k < 16; ++k) {
        const auto exponent = base + static_cast<unsigned>(row % 5 == 4 ? 0 : random() % spread);
        const auto significand = static_cast<unsigned>(row % 5 == 4 ? 0x7f : random() & 0x7f);
        const auto sign = static_cast<unsigned>(row % 5 == 4 ? 0 : random() & 0x8000);
        values.push_back(random() % 16 == 0 && row % 5 != 4
                             ? uint16_t{0}
                             : static_cast<uint16_t>(sign | exponent << 7 | significand));
      }
    }
  }
  return values;
}

TEST(HopperTwin, EverySpreadAndStartGivesTheInstructionsBits) {
  const int64_t rows = 10, outputs = 37, in = 160;
  for (const unsigned largest : {1U, 90U, 130U}) {
    const auto x = uneven_rows(rows, in, largest, 3 + largest),
               w = uneven_rows(outputs, in, largest, 4 + largest);
    std::mt19937 random(5);
    std::vector<float> from(static_cast<size_t>(rows * outputs));
    for (float& start : from)
      start = random() % 4 == 0 ? 0.0f
                                : std::ldexp(static_cast<float>(random() % 16777216) - 8388608.0f,
                                             static_cast<int>(random() % (2 * largest)) - 200);
    for (const Isa isa : available()) {
      force_isa(isa);
      std::vector<float> y(from.size());
      twin_bf16_cpu({.w = w.data(),
                     .x = x.data(),
                     .y = y.data(),
                     .outputs = outputs,
                     .rows = rows,
                     .in = in,
                     .from = from.data()});
      for (size_t at = 0; at < y.size(); ++at) {
        float chain = from[at];
        for (size_t k = 0; k < static_cast<size_t>(in); k += 16)
          chain = wgmma_bf16(&x[at / outputs * in + k], &w[at % outputs * in + k], chain);
        ASSERT_EQ(std::bit_cast<uint32_t>(y[at]), std::bit_cast<uint32_t>(chain))
            << isa_name(isa) << " largest " << largest << " result " << at;
      }
    }
  }
  force_isa(detect_isa());
}

TEST(HopperTwin, GivesTheBitsThatACardComputed) {
  for (const testing::GoldenProduct& g : testing::kGoldenProducts) {
    const Operands o(g.rows, g.outputs, g.in, g.data);
    EXPECT_EQ(testing::digest(o.product()), g.fp8);
    EXPECT_EQ(testing::digest(bf16_product(g.rows, g.outputs, g.in, g.data)), g.bf16);
  }
}

TEST(HopperTwin, OneFusedSum) {
  // What an instruction keeps: 13 bits below the largest term of E4M3 products, 25 inside and 23
  // outside for BF16, everything below cut off.
  uint8_t a[32] = {}, b[32] = {};
  a[0] = b[0] = 0x38;  // 1 * 1
  a[1] = 0x08;         // 2^-6
  b[1] = 0x04;         // 2^-7: 2^-13 is kept
  EXPECT_EQ(wgmma_e4m3(a, b, 0.0f), 1.0f + std::ldexp(1.0f, -13));
  b[1] = 0x02;  // 2^-14 is not
  EXPECT_EQ(wgmma_e4m3(a, b, 0.0f), 1.0f);
  EXPECT_EQ(wgmma_e4m3(a, b, -1.0f), 0.0f);
  a[0] = 0;  // alone it is the largest
  EXPECT_EQ(wgmma_e4m3(a, b, 0.0f), std::ldexp(1.0f, -14));
  EXPECT_EQ(std::bit_cast<uint32_t>(wgmma_e4m3(a, b, std::numeric_limits<float>::quiet_NaN())),
            0x7fffffffu);
  a[0] = 0x7f;
  EXPECT_EQ(std::bit_cast<uint32_t>(wgmma_e4m3(a, b, 0.0f)), 0x7fffffffu);

  uint16_t x[16] = {}, y[16] = {};
  x[0] = x[1] = x[2] = 0x3f80;
  y[0] = 0x3f80;                           // 1
  y[1] = 0xbf80;                           // - 1
  y[2] = static_cast<uint16_t>(102 << 7);  // + 2^-25: kept inside
  EXPECT_EQ(wgmma_bf16(x, y, 0.0f), std::ldexp(1.0f, -25));
  y[1] = 0;
  EXPECT_EQ(wgmma_bf16(x, y, 0.0f), 1.0f);
  // Exponents of a sum stop at -133: 2^-158 is the last that counts.
  x[0] = 0x1f80, y[0] = static_cast<uint16_t>(53 << 7);  // 2^-64 * 2^-74 = 2^-138
  x[2] = static_cast<uint16_t>(63 << 7), y[2] = static_cast<uint16_t>(0x8000 | 32 << 7);
  EXPECT_EQ(wgmma_bf16(x, y, 0.0f), std::ldexp(1.0f, -138));  // less 2^-159, which is lost
  y[2] = static_cast<uint16_t>(0x8000 | 33 << 7);
  EXPECT_EQ(wgmma_bf16(x, y, 0.0f), std::ldexp(1.0f, -138) - std::ldexp(1.0f, -149));
  y[0] = y[2] = 0;
  EXPECT_EQ(std::bit_cast<uint32_t>(wgmma_bf16(x, y, -0.0f)), 0u);
}

TEST(FoldFp4, IsExactUpToASpreadOf14) {
  // All 16 codes under every exponent that the fold allows.
  std::vector<uint8_t> packed(64), scales = {127, 127, 113, 120}, codes(128);
  for (size_t i = 0; i < packed.size(); ++i)
    packed[i] = static_cast<uint8_t>((2 * i % 16) | (2 * i + 1) % 16 << 4);
  float slab_scale = 0.0f;
  ASSERT_TRUE(fold_fp4(packed.data(), scales.data(), 128, codes.data(), &slab_scale));
  EXPECT_EQ(slab_scale, std::ldexp(1.0f, -6));
  constexpr float kValues[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
  for (size_t i = 0; i < 128; ++i) {
    const int code = packed[i / 2] >> (i % 2 * 4) & 15;
    const float value =
        kValues[code & 7] * (code & 8 ? -1.0f : 1.0f) * std::ldexp(1.0f, scales[i / 32] - 127);
    uint8_t one[32] = {0x38}, folded[32] = {codes[i]};
    EXPECT_EQ(wgmma_e4m3(one, folded, 0.0f) * slab_scale, value) << i;
    EXPECT_EQ(codes[i] >> 7, code >> 3) << i;
  }
  scales[2] = 112;
  EXPECT_FALSE(fold_fp4(packed.data(), scales.data(), 128, codes.data(), &slab_scale));
}

}  // namespace
}  // namespace hadal::ops
