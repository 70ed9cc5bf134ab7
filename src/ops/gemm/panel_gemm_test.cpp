#include "ops/gemm/panel_gemm.h"

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include <gtest/gtest.h>

#include "base/parallel.h"

namespace hadal::gemm {
namespace {

uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
float from_bf16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

struct Matrix {
  WeightDesc desc;
  std::vector<uint8_t> weight, scale, packed;
  std::vector<float> values;  ///< dequantised, [n, k]
};

void finish(Matrix* m) {
  m->packed.resize(packed_bytes(m->desc));
  pack(m->desc, m->weight.data(), m->scale.data(), m->packed.data());
}

Matrix make_fp4(int64_t n, int64_t k, unsigned seed) {
  const float magnitudes[8] = {0, .5f, 1, 1.5f, 2, 3, 4, 6};
  std::mt19937 random(seed);
  Matrix m{{WeightFormat::kFp4, n, k, 32, ScaleType::kE8m0}, {}, {}, {}, {}};
  const int64_t groups = (k + 31) / 32;
  for (int64_t i = 0; i < n * k / 2; ++i) m.weight.push_back(static_cast<uint8_t>(random()));
  for (int64_t i = 0; i < n * groups; ++i)
    m.scale.push_back(static_cast<uint8_t>(118 + random() % 8));
  for (int64_t i = 0; i < n * k; ++i) {
    const int code = m.weight[i / 2] >> (i % 2 * 4) & 15;
    const float s = std::ldexp(1.0f, m.scale[i / k * groups + i % k / 32] - 127);
    m.values.push_back((code & 8 ? -s : s) * magnitudes[code & 7]);
  }
  finish(&m);
  return m;
}

Matrix make_fp8(int64_t n, int64_t k, int slab, unsigned seed) {
  std::mt19937 random(seed);
  Matrix m{{WeightFormat::kFp8, n, k, slab, ScaleType::kE8m0}, {}, {}, {}, {}};
  const int64_t columns = (k + 127) / 128;
  for (int64_t i = 0; i < (n + 127) / 128 * columns; ++i)
    m.scale.push_back(static_cast<uint8_t>(120 + random() % 4));
  for (int64_t i = 0; i < n * k; ++i) {
    int code = static_cast<int>(random() % 256);
    if ((code & 127) == 127) code &= ~8;
    m.weight.push_back(static_cast<uint8_t>(code));
    const int exponent = code >> 3 & 15, mantissa = code & 7;
    const float v = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9)
                                  : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
    const float s = std::ldexp(1.0f, m.scale[i / k / 128 * columns + i % k / 128] - 127);
    m.values.push_back((code & 128 ? -v : v) * s);
  }
  finish(&m);
  return m;
}

/// The same values in another storage.
Matrix stored_as(const Matrix& from, WeightFormat format) {
  Matrix m{{format, from.desc.n, from.desc.k, from.desc.slab, ScaleType::kNone},
           {},
           {},
           {},
           from.values};
  for (const float v : m.values) {
    uint8_t bytes[4];
    const uint16_t h = to_bf16(v);
    std::memcpy(bytes, format == WeightFormat::kBf16 ? static_cast<const void*>(&h) : &v,
                format == WeightFormat::kBf16 ? 2 : 4);
    m.weight.insert(m.weight.end(), bytes, bytes + (format == WeightFormat::kBf16 ? 2 : 4));
  }
  finish(&m);
  return m;
}

std::vector<uint16_t> make_rows(int64_t rows, int64_t k, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<uint16_t> x(static_cast<size_t>(rows * k));
  for (auto& v : x) v = to_bf16(normal(random));
  return x;
}

std::vector<float> run(const Matrix& m, const void* x, RowType type, int64_t rows) {
  std::vector<float> y(static_cast<size_t>(rows * m.desc.n), NAN);
  gemm({m.desc, m.packed.data(), x, type, m.desc.k, y.data(), RowType::kF32, m.desc.n, rows});
  return y;
}

/// The contract's tree in scalar code.
std::vector<float> golden(const Matrix& m, const std::vector<uint16_t>& x, int64_t rows) {
  const int64_t n = m.desc.n, k = m.desc.k, slab = m.desc.slab;
  std::vector<float> y;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t o = 0; o < n; ++o) {
      const auto product = [&](int64_t i, float acc) {
        return i < k ? std::fma(m.values[o * k + i], from_bf16(x[r * k + i]), acc) : acc + 0.0f;
      };
      float total = 0;
      for (int64_t s = 0; s < k; s += slab) {
        float acc = 0;
        for (int64_t i = s; i < s + slab; i += 2) acc = product(i, product(i + 1, acc));
        total += acc;
      }
      y.push_back(total);
    }
  }
  return y;
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * 4) == 0;
}

class PanelGemm : public testing::TestWithParam<int> {
 protected:
  void SetUp() override {
    if (GetParam() > static_cast<int>(detect_isa())) GTEST_SKIP() << "this processor lacks it";
    force_isa(static_cast<Isa>(GetParam()));
  }
  void TearDown() override { force_isa(detect_isa()); }
};

TEST_P(PanelGemm, WalksTheTreeOfTheContractInEveryFormat) {
  for (const int64_t n : {1, 24, 100}) {
    for (const int64_t k : {2, 130, 322}) {
      const Matrix fp4 = make_fp4(n, k, 1), fp8 = make_fp8(n, k, 128, 2);
      const auto x = make_rows(8, k, 3);
      for (const Matrix& m :
           {fp4, fp8, make_fp8(n, k, 32, 4), stored_as(fp4, WeightFormat::kBf16),
            stored_as(fp8, WeightFormat::kBf16), stored_as(fp8, WeightFormat::kF32)}) {
        for (const int64_t rows : {1, 2, 8})
          EXPECT_TRUE(same(run(m, x.data(), RowType::kBf16, rows), golden(m, x, rows)))
              << "format " << static_cast<int>(m.desc.format) << " n " << n << " k " << k;
      }
    }
  }
}

TEST_P(PanelGemm, OddKOfPlainWeights) {
  Matrix m = make_fp8(33, 77, 128, 5);
  m = stored_as(m, WeightFormat::kBf16);
  const auto x = make_rows(7, 77, 6);
  EXPECT_TRUE(same(run(m, x.data(), RowType::kBf16, 7), golden(m, x, 7)));
}

TEST_P(PanelGemm, RowsAndThreadsChangeNoBit) {
  const int threads = num_threads();
  for (const Matrix& m : {make_fp4(80, 160, 7), make_fp8(80, 160, 128, 8)}) {
    const auto x = make_rows(300, 160, 9);
    const auto all = run(m, x.data(), RowType::kBf16, 300);
    for (const int count : {1, 2}) {
      set_num_threads(count);
      EXPECT_TRUE(same(run(m, x.data(), RowType::kBf16, 300), all));
      for (int64_t r = 0; r < 300; r += 13) {
        const auto one = run(m, x.data() + r * 160, RowType::kBf16, 1);
        EXPECT_EQ(std::memcmp(one.data(), all.data() + r * 80, 80 * 4), 0) << "row " << r;
      }
    }
    set_num_threads(threads);
  }
}

TEST_P(PanelGemm, FloatRowsOfBf16ValuesGiveTheSameBits) {
  const Matrix m = make_fp8(40, 256, 128, 10);
  const auto x = make_rows(9, 256, 11);
  std::vector<float> wide;
  for (const uint16_t v : x) wide.push_back(from_bf16(v));
  EXPECT_TRUE(same(run(m, wide.data(), RowType::kF32, 9), run(m, x.data(), RowType::kBf16, 9)));
}

INSTANTIATE_TEST_SUITE_P(Isas, PanelGemm, testing::Values(0, 1, 2));

TEST(QuantizeRowsFp8, RoundsAsTheFormulaSays) {
  std::vector<float> x(128, 0.0f);
  x[0] = 448.0f, x[1] = 17.0f, x[2] = 19.0f, x[3] = -0x1p-10f, x[4] = 0x1.8p-9f;
  std::vector<uint16_t> y(128);
  quantize_rows_fp8(x.data(), RowType::kF32, y.data(), 1, 128, 128);
  // 448 * fl(1/448) may be exactly 1 or one ulp above it, which doubles the scale.
  const float ratio = 448.0f * (1.0f / 448.0f);
  ASSERT_EQ(ratio, 1.0f);
  const float expected[5] = {448.0f, 16.0f, 20.0f, -0.0f, 0x1p-8f};
  for (int i = 0; i < 5; ++i) EXPECT_EQ(from_bf16(y[i]), expected[i]) << i;
  x.assign(128, 1e-9f);
  quantize_rows_fp8(x.data(), RowType::kF32, y.data(), 1, 128, 128);
  EXPECT_EQ(from_bf16(y[0]),
            0x1p-30f);  // the floor gives the scale 2^-22; 2.1 steps of 2^-9 become 2
}

}  // namespace
}  // namespace hadal::gemm
