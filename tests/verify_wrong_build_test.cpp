// What `hadal verify` is for: a build that computes something else must fail. Each mistake here is
// one that engines really made, put in from outside: the program itself cannot be asked for it.
#include <cmath>
#include <cstring>
#include <filesystem>
#include <map>
#include <unistd.h>

#include <ATen/ATen.h>

#include <gtest/gtest.h>

#include "base/check.h"
#include "base/file.h"
#include "checkpoint/verify.h"
#include "ops/quant/round_trip_cpu.h"

namespace hadal::checkpoint {
namespace {

namespace fs = std::filesystem;

class WrongBuild : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    folder_ = concat(HADAL_SOURCE_DIR, "/../shared/golden/", GetParam());
    if (!fs::exists(folder_))
      GTEST_SKIP() << "the recorded checkpoint " << GetParam() << " is absent";
  }

  /// Keys that failed.
  static std::vector<std::string> failed(const std::string& folder,
                                         const CacheFactory& make_cache = make_reference_cache) {
    const VerifyOptions options{
        .folder = folder, .expected = {}, .numerics = {}, .gradients = false, .max_abs = {}};
    std::vector<std::string> keys;
    verify(
        options,
        [&](const VerifyLine& line) {
          if (line.pass) return;
          keys.push_back(line.key);
          std::printf("%-24s max %.3g mean %.3g agreement %.3f %s\n", line.key.c_str(), line.max,
                      line.mean, line.agreement.value_or(NAN), line.note.c_str());
        },
        make_cache);
    return keys;
  }
  static bool holds(const std::vector<std::string>& keys, const std::string& key) {
    return std::find(keys.begin(), keys.end(), key) != keys.end();
  }

  std::string folder_;
};

TEST_P(WrongBuild, SwappedRopeBasesFail) {
  const std::string copy =
      concat(::testing::TempDir(), "hadal-swapped-rope-", GetParam(), "-", getpid());
  fs::create_directories(copy);
  for (const char* file : {"model.safetensors", "expected.safetensors"})
    fs::create_symlink(fs::absolute(concat(folder_, "/", file)), concat(copy, "/", file));
  std::string json = read_file(folder_ + "/config.json");
  const auto replace = [&](const std::string& from, const std::string& to) {
    const size_t at = json.find(from);
    ASSERT_NE(at, std::string::npos) << from;
    json.replace(at, from.size(), to);
  };
  replace("\"rope_theta\": 10000.0", "\"rope_theta\": 160000.0");
  replace("\"compress_rope_theta\": 160000.0", "\"compress_rope_theta\": 10000.0");
  write_file_atomic(copy + "/config.json", json);
  const std::vector<std::string> keys = failed(copy);
  EXPECT_TRUE(holds(keys, "prefill.logits"));
  EXPECT_TRUE(holds(keys, "prefill.layers.0.out"));
  EXPECT_TRUE(holds(keys, "decode.logits"));
  fs::remove_all(copy);
}

/// A cache that loses what decoding needs from before the step.
class Forgetful : public model::ContiguousKv {
 public:
  enum class What { kWindow, kPreviousBlock };

  Forgetful(What what,
            const model::ModelConfig& config,
            int64_t slots,
            int64_t max_tokens,
            at::ScalarType dtype,
            at::Device device)
      : ContiguousKv(config, slots, max_tokens, dtype, device), what_(what), config_(config) {}

  ops::RingView ring(int64_t block, model::RingKind kind) override {
    ops::RingView view = ContiguousKv::ring(block, kind);
    if (length(0) == 0) return view;  // prefill
    const bool score = kind == model::RingKind::kScore || kind == model::RingKind::kIndexScore;
    if (what_ == What::kWindow && kind == model::RingKind::kWindow) {
      view.rows = at::zeros_like(view.rows);
    } else if (what_ == What::kPreviousBlock && score && config_.ratio(block) == 4) {
      // The four rows of the block before the one that this token belongs to.
      const int64_t first = length(0) / 4 * 4;
      view.rows = view.rows.clone();
      for (int64_t seq = 0; seq < view.slots.size(0); ++seq)
        for (int64_t pos = first - 4; pos < first; ++pos)
          view.rows[view.table().row(seq, pos)].fill_(-INFINITY);
    }
    return view;
  }

 private:
  What what_;
  model::ModelConfig config_;
};

TEST_P(WrongBuild, DecodingWithoutThePreviousWindowFails) {
  const auto failed_without = [&](Forgetful::What what) {
    return failed(folder_, [what](const model::ModelConfig& config, int64_t slots,
                                  int64_t max_tokens, at::ScalarType dtype, at::Device device) {
      return std::make_unique<Forgetful>(what, config, slots, max_tokens, dtype, device);
    });
  };
  const std::vector<std::string> decode = {"decode.logits"};
  EXPECT_EQ(failed_without(Forgetful::What::kWindow), decode);
  // Seven compressed blocks of a hundred: with learned routing less than the noise of its choices.
  if (std::string(GetParam()) == "fp8-fp4-smooth") {
    EXPECT_EQ(failed_without(Forgetful::What::kPreviousBlock), decode);
  }
}

float bf16_to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

/// Q8 with the scale's exponent cut off instead of rounded up; BF16 activations only.
void truncated_fp8(const ops::RoundTripCpuParams& p, int64_t begin, int64_t end) {
  HADAL_CHECK(p.dtype == ops::ElementType::kBf16, "truncated_fp8: BF16 only");
  for (int64_t row = begin; row < end; ++row) {
    const auto* x = static_cast<const uint16_t*>(p.x) + row * p.stride;
    auto* out = static_cast<uint16_t*>(p.out) + row * p.stride;
    std::copy(x + p.dim, x + p.stride, out + p.dim);
    for (int64_t first = 0; first < p.dim; first += p.group) {
      float amax = 1e-4f;
      for (int64_t i = first; i < first + p.group; ++i)
        amax = std::max(amax, std::abs(bf16_to_float(x[i])));
      const float scale = std::exp2(std::floor(std::log2(amax / 448.0f)));
      for (int64_t i = first; i < first + p.group; ++i) {
        const float units = std::clamp(bf16_to_float(x[i]) / scale, -448.0f, 448.0f);
        const float rounded = static_cast<float>(c10::Float8_e4m3fn(units)) * scale;
        uint32_t bits;
        std::memcpy(&bits, &rounded, 4);
        out[i] = static_cast<uint16_t>(bits >> 16);
      }
    }
  }
}

TEST_P(WrongBuild, ATruncatedFp8ScaleFails) {
  const auto right = ops::fp8_round_trip_cpu;
  for (int isa = 0; isa < kNumIsas; ++isa)
    ops::fp8_round_trip_cpu.fill(static_cast<Isa>(isa), truncated_fp8);
  const std::vector<std::string> keys = failed(folder_);
  ops::fp8_round_trip_cpu = right;
  EXPECT_TRUE(holds(keys, "prefill.logits"));
  EXPECT_TRUE(holds(keys, "prefill.layers.0.out"));
  EXPECT_TRUE(holds(keys, "decode.logits"));
}

INSTANTIATE_TEST_SUITE_P(Golden,
                         WrongBuild,
                         ::testing::Values("fp8-fp4-smooth", "fp8-fp4"),
                         [](const auto& param_info) {
                           std::string name = param_info.param;
                           for (char& c : name) c = c == '-' ? '_' : c;
                           return name;
                         });

}  // namespace
}  // namespace hadal::checkpoint
