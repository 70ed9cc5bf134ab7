#include "ops/quant/official_storage.h"

#include <cmath>
#include <vector>

#include <ATen/ATen.h>

#include <gtest/gtest.h>

#include "testing/kernel_checks.h"
#include "testing/stored_weights.h"

namespace hadal::ops {
namespace {

using testing::same_bits;

/// The value that a block of E4M3 with one power-of-two scale, or a group of E2M1, makes of x where
/// its largest magnitude is `amax`: by scalars, ties to even.
float rounded(float x, float amax, OfficialStorage storage) {
  if (amax == 0.0f) return x;
  const bool eight = storage == OfficialStorage::kFp8;
  const float largest = eight ? 448.0f : 6.0f;
  int exponent = 0;
  while (std::ldexp(largest, exponent) < amax) ++exponent;
  while (std::ldexp(largest, exponent - 1) >= amax) --exponent;
  const float scaled = std::ldexp(x, -exponent);
  int power = 0;
  std::frexp(scaled, &power);
  // Steps of the format: 3 bits of mantissa from 2^-6 on, or 1 bit from 1 on.
  const int step = eight ? std::max(power - 4, -9) : std::max(power - 2, -1);
  return std::ldexp(std::ldexp(std::nearbyint(std::ldexp(scaled, -step)), step), exponent);
}

TEST(OfficialStorage, RoundsByBlocks) {
  at::manual_seed(7);
  for (const auto& [out, in] : {std::pair{128, 128}, {130, 160}, {3, 32}}) {
    const at::Tensor size =
        at::exp2(at::randint(-20, 10, {out, in / 32}).to(at::kFloat)).repeat_interleave(32, 1);
    const at::Tensor w = (at::randn({out, in}) * size).contiguous();
    const float* x = w.const_data_ptr<float>();
    for (const OfficialStorage storage : {OfficialStorage::kFp8, OfficialStorage::kFp4}) {
      const bool eight = storage == OfficialStorage::kFp8;
      const int64_t rows = eight ? 128 : 1, columns = eight ? 128 : 32;
      const at::Tensor found = official_rounding(w, storage);
      at::Tensor expected = at::empty({out, in});
      for (int64_t i = 0; i < out; ++i) {
        for (int64_t j = 0; j < in; ++j) {
          float amax = 0.0f;
          for (int64_t a = i / rows * rows; a < std::min<int64_t>(out, (i / rows + 1) * rows); ++a)
            for (int64_t b = j / columns * columns;
                 b < std::min<int64_t>(in, (j / columns + 1) * columns); ++b)
              amax = std::max(amax, std::fabs(x[a * in + b]));
          expected.mutable_data_ptr<float>()[i * in + j] = rounded(x[i * in + j], amax, storage);
        }
      }
      EXPECT_TRUE(at::equal(found.to(at::kFloat), expected)) << out << " " << in << " " << eight;
      // The codes hold these values.
      const StoredCodes codes = official_codes(w, storage);
      const testing::Stored stored{.data = codes.data, .scale = codes.scale, .values = {}};
      const Panels panels = eight ? testing::fp8(stored) : testing::fp4(stored);
      EXPECT_TRUE(same_bits(unpack_panels(panels)[0], found)) << out << " " << in << " " << eight;
    }
    EXPECT_TRUE(at::equal(official_rounding(w, OfficialStorage::kBf16), w.to(at::kBFloat16)));
  }
}

}  // namespace
}  // namespace hadal::ops
