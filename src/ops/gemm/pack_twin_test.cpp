// What is packed where the codes lie is what the host packs, byte for byte.
#include <random>
#include <vector>

#include <ATen/ATen.h>

#include <gtest/gtest.h>

#include "ops/gemm/pack_sm90.h"
#include "ops/gemm/sm90_layout.h"
#include "ops/gemm/sm90_matrices.h"
#include "ops/gemm/sm90_pack.h"
#include "ops/gemm/sm90_pack_items.h"
#include "testing/kernel_checks.h"

namespace hadal::ops {
namespace {

using testing::same_bits;

at::Tensor random_bytes(const std::vector<int64_t>& shape, unsigned seed) {
  std::mt19937 random(seed);
  const at::Tensor bytes = at::empty(shape, at::kByte);
  for (int64_t i = 0; i < bytes.numel(); ++i)
    bytes.mutable_data_ptr<uint8_t>()[i] = static_cast<uint8_t>(random());
  return bytes;
}

struct Fp4 {
  at::Tensor codes, scales;  // [matrices, out, in / 2], [matrices, out, in / 32]

  /// With groups of zeros, among them all of a row's slab, whose scales are anything.
  Fp4(int64_t matrices, int64_t out, int64_t in)
      : codes(random_bytes({matrices, out, in / 2}, 1)),
        scales(random_bytes({matrices, out, in / 32}, 2).remainder(15).add(120).to(at::kByte)) {
    const at::Tensor groups = codes.view({-1, 16});
    for (const int64_t group : {int64_t{0}, int64_t{3}, groups.size(0) - 1}) {
      groups[group].fill_(0x80);
      scales.view({-1})[group] = group == 0 ? 255 : 0;
    }
    codes[0][2].fill_(0);
    scales[0][2].fill_(7);
  }
  /// nullopt where the twin says that there is no exact form.
  std::optional<at::Tensor> packed() const {
    const int64_t matrices = codes.size(0), out = codes.size(1), in = codes.size(2) * 2;
    const at::Tensor tiles = at::full({matrices, sm90::fp4_bytes(out, in)}, 0xaa, at::kByte);
    int32_t inexact = 0;
    pack_fp4_twin({.codes = codes.const_data_ptr<uint8_t>(),
                   .scales = scales.const_data_ptr<uint8_t>(),
                   .matrices = matrices,
                   .outputs = out,
                   .in = in,
                   .tiles = tiles.mutable_data_ptr<uint8_t>(),
                   .inexact = &inexact});
    if (inexact != 0) return std::nullopt;
    return tiles;
  }
  std::optional<Sm90Matrices> by_host() const {
    return pack_sm90_fp4(codes.unbind(0), scales.unbind(0));
  }
};

TEST(PackTwin, WordsOfFp4) {
  std::mt19937 random(4);
  for (int i = 0; i < 1000; ++i) {
    const auto codes = static_cast<uint32_t>(random());
    uint8_t apart[8];
    for (int j = 0; j < 8; ++j) apart[j] = codes >> (4 * j) & 15;
    ASSERT_EQ(sm90::fp4_word_of(codes), sm90::fp4_word(apart, apart + 4)) << codes;
  }
}

TEST(PackTwin, Fp4TilesAreTheHosts) {
  for (const auto& [out, in] : {std::pair{64, 128}, {70, 160}, {200, 384}, {3, 32}}) {
    const Fp4 w(2, out, in);
    const auto found = w.packed();
    const auto wanted = w.by_host();
    ASSERT_TRUE(found.has_value() && wanted.has_value()) << out << " x " << in;
    EXPECT_TRUE(same_bits(*found, wanted->data)) << out << " x " << in;
  }
}

TEST(PackTwin, ScalesWithoutAnExactFormAreSaid) {
  for (const int scale : {0, 66, 188, 255, 104}) {  // the last: more than 2^14 from the others
    Fp4 w(2, 70, 160);
    w.scales[1][69][3] = scale;
    w.codes[1][69].narrow(0, 48, 16).fill_(0x11);
    EXPECT_EQ(w.packed().has_value(), w.by_host().has_value()) << scale;
    EXPECT_FALSE(w.packed().has_value()) << scale;
  }
}

struct Fp8 {
  at::Tensor codes, scales;
  Fp8(int64_t matrices, int64_t out, int64_t in)
      : codes(random_bytes({matrices, out, in}, 5).bitwise_and(0xf7)),
        scales(random_bytes({matrices, (out + 127) / 128, (in + 127) / 128}, 6)
                   .remainder(30)
                   .add(100)
                   .to(at::kByte)) {
    codes[0]
        .narrow(0, 0, std::min<int64_t>(128, out))
        .narrow(1, 0, std::min<int64_t>(128, in))
        .fill_(0x80);
    scales[0][0][0] = 255;
  }
  std::vector<at::Tensor> data() const { return codes.view(at::kFloat8_e4m3fn).unbind(0); }
  /// The scales, or nullopt.
  std::optional<at::Tensor> packed_scales(int most) const {
    const int64_t matrices = codes.size(0), out = codes.size(1), in = codes.size(2);
    const at::Tensor result = at::zeros({matrices, scales.size(2), scales.size(1)}, at::kFloat);
    int32_t inexact = 0;
    pack_scales_twin({.codes = codes.const_data_ptr<uint8_t>(),
                      .scales = scales.const_data_ptr<uint8_t>(),
                      .matrices = matrices,
                      .outputs = out,
                      .in = in,
                      .most = most,
                      .out = result.mutable_data_ptr<float>(),
                      .inexact = &inexact});
    if (inexact != 0) return std::nullopt;
    return result;
  }
};

TEST(PackTwin, OperandsAndScalesOfFp8AreTheHosts) {
  for (const auto& [out, in] : {std::pair{128, 256}, {70, 144}, {200, 320}, {8, 16}}) {
    const Fp8 w(2, out, in);
    const auto wanted = pack_sm90_fp8(w.data(), w.scales.unbind(0));
    ASSERT_TRUE(wanted.has_value());
    const at::Tensor operand = at::full_like(wanted->data, 0xaa);
    pack_operand_twin({.rows = w.codes.const_data_ptr<uint8_t>(),
                       .matrices = 2,
                       .outputs = out,
                       .row_bytes = in,
                       .operand = operand.mutable_data_ptr<uint8_t>()});
    EXPECT_TRUE(same_bits(operand, wanted->data)) << out << " x " << in;
    const auto scales = w.packed_scales(kMaxScaleByte);
    ASSERT_TRUE(scales.has_value());
    EXPECT_TRUE(same_bits(*scales, wanted->scales)) << out << " x " << in;
  }
  Fp8 large(1, 130, 128);
  large.scales[0][1][0] = 127 + 61;
  EXPECT_FALSE(large.packed_scales(kMaxScaleByte).has_value());
  EXPECT_FALSE(pack_sm90_fp8(large.data(), large.scales.unbind(0)).has_value());
}

TEST(PackTwin, WidenedTilesAreTheHosts) {
  const Fp8 w(3, 192, 256);
  const auto wanted = pack_sm90_widened(w.data(), w.scales.unbind(0));
  ASSERT_TRUE(wanted.has_value());
  const at::Tensor tiles = at::full_like(wanted->data, 0xaa);
  pack_widened_twin({.codes = w.codes.const_data_ptr<uint8_t>(),
                     .matrices = 3,
                     .outputs = 192,
                     .in = 256,
                     .tiles = tiles.mutable_data_ptr<uint8_t>()});
  EXPECT_TRUE(same_bits(tiles, wanted->data));
  const auto scales = w.packed_scales(127 + 7);
  ASSERT_TRUE(scales.has_value());
  EXPECT_TRUE(same_bits(*scales, wanted->scales));
  Fp8 large(1, 192, 256);
  large.scales[0][1][1] = 127 + 8;
  EXPECT_FALSE(large.packed_scales(127 + 7).has_value());
  EXPECT_FALSE(pack_sm90_widened(large.data(), large.scales.unbind(0)).has_value());
}

}  // namespace
}  // namespace hadal::ops
