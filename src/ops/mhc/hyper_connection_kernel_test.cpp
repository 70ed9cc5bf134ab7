// Hyper-connections and norms on a card against the CPU's kernels, bit for bit.
#include <vector>

#include "ops/mhc/hyper_connection_cpu.h"
#include "ops/mhc/hyper_connection_sm90.h"
#include "ops/norm/rms_norm_cpu.h"
#include "ops/norm/rms_norm_sm90.h"
#include "testing/float_data.h"
#include "testing/on_device.h"

namespace hadal::ops {

// In the program these stand beside the ops, which need LibTorch.
constinit CpuSlot<void(const HcPreCpuParams&, int64_t, int64_t)> hc_pre_cpu;
constinit CpuSlot<void(const HcPostCpuParams&, int64_t, int64_t)> hc_post_cpu;
constinit CpuSlot<void(const RmsNormCpuParams&, int64_t, int64_t)> rms_norm_cpu;

namespace {

using testing::differences;
using testing::normals;
using testing::normals_bf16;
using testing::OnDevice;

struct Size {
  int64_t tokens, dim;
};

class HyperConnectionSm90 : public ::testing::TestWithParam<Size> {};

TEST_P(HyperConnectionSm90, PreHasTheBitsOfTheCpu) {
  const auto [tokens, dim] = GetParam();
  for (const bool head : {false, true}) {
    const size_t rows = head ? 4 : 24;
    const auto streams = normals_bf16(static_cast<size_t>(tokens * 4 * dim), 1.5f, 1);
    const auto fn = normals(rows * static_cast<size_t>(4 * dim), 0.02f, 2);
    const auto base = normals(rows, 0.5f, 3), scale = normals(3, 1.0f, 4);
    std::vector<uint16_t> mixed(static_cast<size_t>(tokens * dim));
    std::vector<float> post(static_cast<size_t>(tokens * 4)),
        comb(static_cast<size_t>(tokens * 16));
    hc_pre_cpu({streams.data(), fn.data(), base.data(), scale.data(), mixed.data(), post.data(),
                comb.data(), 4, dim, 20, 1e-6f, 1e-6f, ElementType::kBf16, head},
               0, tokens);
    const OnDevice<uint16_t> streams_there(streams), mixed_there(mixed.size());
    const OnDevice<float> fn_there(fn), base_there(base), scale_there(scale),
        post_there(post.size()), comb_there(comb.size());
    hc_pre_sm90({streams_there.get(), fn_there.get(), base_there.get(), scale_there.get(),
                 mixed_there.get(), post_there.get(), comb_there.get(), tokens, dim, 20, 1e-6f,
                 1e-6f, head},
                nullptr);
    EXPECT_EQ(differences(mixed_there.read(), mixed), 0) << "head " << head;
    if (head) continue;
    EXPECT_EQ(differences(post_there.read(), post), 0);
    EXPECT_EQ(differences(comb_there.read(), comb), 0);
  }
}

TEST(HcPreNormSm90, HasTheBitsOfBothKernels) {
  for (const auto [tokens, dim] : {Size{1, 4096}, Size{2, 256}, Size{3, 512}, Size{5, 4096},
                                   Size{8, 1792}, Size{11, 4096}, Size{16, 1024}, Size{2, 7168},
                                   Size{17, 512}, Size{66, 4096}, Size{64, 4096}, Size{129, 256}}) {
    const auto count = static_cast<size_t>(tokens * dim);
    const int64_t groups = (tokens + 7) / 8;
    const OnDevice<uint16_t> streams(normals_bf16(count * 4, 1.5f, 1));
    const OnDevice<float> fn(normals(static_cast<size_t>(24 * 4 * dim), 0.02f, 2)),
        base(normals(24, 0.5f, 3)), scale(normals(3, 1.0f, 4)),
        weight(normals(static_cast<size_t>(dim), 1.0f, 5));
    struct Outputs {
      OnDevice<uint16_t> mixed, out;
      OnDevice<float> post, comb, scales;
      OnDevice<uint8_t> codes, operand;
      Outputs(size_t rows, size_t width, size_t padded)
          : mixed(rows * width),
            out(rows * width),
            post(rows * 4),
            comb(rows * 16),
            scales(padded * (width / 128)),
            codes(padded * width),
            operand(padded * width * 2) {}
    };
    const auto rows = static_cast<size_t>(tokens), width = static_cast<size_t>(dim),
               padded = static_cast<size_t>(groups * 8);
    const Outputs one(rows, width, padded), other(rows, width, padded);
    const auto pre = [&](const Outputs& to) {
      return HcPreSm90Params{streams.get(), fn.get(),      base.get(), scale.get(), to.mixed.get(),
                             to.post.get(), to.comb.get(), tokens,     dim,         20,
                             1e-6f,         1e-6f,         false};
    };
    const auto norm = [&](const Outputs& to) {
      return NormalisedSm90Params{
          to.mixed.get(), weight.get(),   to.out.get(),    tokens,           dim,
          1e-6f,          to.codes.get(), to.scales.get(), to.operand.get(), groups};
    };
    hc_pre_sm90(pre(one), nullptr);
    normalised_sm90(norm(one), nullptr);
    ASSERT_TRUE(serves_hc_pre_norm_sm90(tokens, dim));
    hc_pre_norm_sm90({pre(other), norm(other)}, nullptr);
    hc_comb_sm90({other.comb.get(), tokens, 20, 1e-6f}, nullptr);
    EXPECT_EQ(differences(other.out.read(), one.out.read()), 0) << tokens << " " << dim;
    EXPECT_EQ(differences(other.post.read(), one.post.read()), 0) << tokens << " " << dim;
    EXPECT_EQ(differences(other.comb.read(), one.comb.read()), 0) << tokens << " " << dim;
    EXPECT_EQ(differences(other.codes.read(), one.codes.read()), 0) << tokens << " " << dim;
    EXPECT_EQ(differences(other.operand.read(), one.operand.read()), 0) << tokens << " " << dim;
    // Scales of rows of zeros are their own smallest, too.
    EXPECT_EQ(differences(other.scales.read(), one.scales.read()), 0) << tokens << " " << dim;
    const HcPreNormSm90Params no_codes{pre(other),
                                       {nullptr, weight.get(), other.out.get(), tokens, dim, 1e-6f,
                                        nullptr, nullptr, other.operand.get(), groups}};
    hc_pre_norm_sm90(no_codes, nullptr);
    EXPECT_EQ(differences(other.operand.read(), one.operand.read()), 0) << tokens << " " << dim;
  }
}

TEST_P(HyperConnectionSm90, PostHasTheBitsOfTheCpu) {
  const auto [tokens, dim] = GetParam();
  const auto streams = normals_bf16(static_cast<size_t>(tokens * 4 * dim), 1.5f, 1);
  const auto out = normals_bf16(static_cast<size_t>(tokens * dim), 1.0f, 2);
  const auto post = normals(static_cast<size_t>(tokens * 4), 1.0f, 3),
             comb = normals(static_cast<size_t>(tokens * 16), 0.3f, 4);
  std::vector<uint16_t> result(streams.size());
  hc_post_cpu({out.data(), streams.data(), post.data(), comb.data(), result.data(), 4, dim,
               ElementType::kBf16},
              0, tokens);
  const OnDevice<uint16_t> out_there(out), streams_there(streams);
  const OnDevice<float> post_there(post), comb_there(comb);
  hc_post_sm90({out_there.get(), streams_there.get(), post_there.get(), comb_there.get(),
                streams_there.get(), tokens, dim},
               nullptr);
  EXPECT_EQ(differences(streams_there.read(), result), 0);
}

INSTANTIATE_TEST_SUITE_P(Sizes,
                         HyperConnectionSm90,
                         ::testing::Values(Size{1, 256},
                                           Size{3, 512},
                                           Size{5, 4096},
                                           Size{65, 1024},
                                           Size{130, 256},
                                           Size{2, 384},
                                           Size{70, 384},
                                           Size{300, 128},
                                           Size{2, 7168}));

TEST(RmsNormSm90, HasTheBitsOfTheCpu) {
  for (const bool chain : {false, true}) {
    for (const int64_t dim : {8, 72, 512, 1536, 7168}) {
      const int64_t rows = 7;
      const auto x = normals_bf16(static_cast<size_t>(rows * dim), 3.0f, 1);
      const auto weight = normals(static_cast<size_t>(dim), 1.0f, 2);
      std::vector<uint16_t> out(x.size());
      const float* w = chain ? nullptr : weight.data();
      rms_norm_cpu({x.data(), w, out.data(), dim, 1e-6f, ElementType::kBf16, chain}, 0, rows);
      const OnDevice<uint16_t> x_there(x), out_there(out.size());
      const OnDevice<float> weight_there(weight);
      rms_norm_sm90({x_there.get(), chain ? nullptr : weight_there.get(), out_there.get(), rows,
                     dim, 1e-6f, chain},
                    nullptr);
      EXPECT_EQ(differences(out_there.read(), out), 0) << "dim " << dim << " chain " << chain;
    }
  }
}

}  // namespace
}  // namespace hadal::ops
