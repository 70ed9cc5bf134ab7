#include "checkpoint/weight_checks.h"

#include <cmath>
#include <filesystem>
#include <functional>
#include <limits>
#include <sstream>
#include <unistd.h>

#include <ATen/ATen.h>

#include <gtest/gtest.h>

#include "base/check.h"
#include "base/file.h"
#include "checkpoint/load_model.h"
#include "checkpoint/save_model.h"
#include "testing/tiny_model.h"

namespace hadal::checkpoint {
namespace {

namespace fs = std::filesystem;

/// What a plain loop says.
template <typename T>
ValueScan slow_scan(const at::Tensor& values) {
  ValueScan seen;
  const at::Tensor wide = values.to(at::kFloat);
  seen.finite = at::isfinite(wide).all().item<bool>();
  seen.zero = (wide == 0).all().item<bool>();
  const auto* bits = static_cast<const T*>(values.const_data_ptr());
  for (int64_t i = 1; i < values.numel(); ++i) seen.constant = seen.constant && bits[i] == bits[0];
  return seen;
}

template <typename T>
void expect_same_scan(const at::Tensor& values, Dtype dtype) {
  const ValueScan fast = scan_values(values.const_data_ptr(), values.numel(), dtype);
  const ValueScan slow = slow_scan<T>(values);
  EXPECT_EQ(fast.finite, slow.finite) << values.sizes() << " " << values.scalar_type();
  EXPECT_EQ(fast.zero, slow.zero) << values.sizes() << " " << values.scalar_type();
  EXPECT_EQ(fast.constant, slow.constant) << values.sizes() << " " << values.scalar_type();
}

void expect_same_scans(const at::Tensor& values) {
  expect_same_scan<uint32_t>(values, Dtype::kF32);
  expect_same_scan<uint16_t>(values.to(at::kBFloat16), Dtype::kBf16);
  expect_same_scan<uint16_t>(values.to(at::kHalf), Dtype::kF16);
  expect_same_scan<uint8_t>(values.to(at::kFloat8_e4m3fn), Dtype::kF8E4M3);
}

TEST(ScanValues, IsWhatALoopSees) {
  at::manual_seed(3);
  for (const int64_t count : {1, 2, 3, 5, 8, 9, 31, 64, 67}) {
    expect_same_scans(at::randn({count}));
    expect_same_scans(at::zeros({count}));
    expect_same_scans(at::neg(at::zeros({count})));
    expect_same_scans(at::full({count}, 1.5));
    expect_same_scans(at::full({count}, 448.0));  // the largest FP8 code, next to NaN
    for (const int64_t at : {int64_t{0}, count / 2, count - 1}) {
      for (const float special :
           {std::numeric_limits<float>::quiet_NaN(), INFINITY, -INFINITY, -0.0f, 1e-30f}) {
        for (const at::Tensor& base : {at::randn({count}), at::zeros({count})}) {
          at::Tensor values = base.clone();
          values[at] = special;
          expect_same_scans(values);
        }
      }
    }
  }
}

class WeightChecks : public ::testing::Test {
 protected:
  void SetUp() override {
    base_ = ::testing::TempDir() + "hadal-weights-" + std::to_string(getpid());
    fs::remove_all(base_);
    fs::create_directories(base_);
    model::ModelConfig config = testing::small_config();
    config.quantized = true;
    config.expert_dtype = model::ExpertDtype::kFp4;
    for (const auto format : {SaveFormat::kOfficial, SaveFormat::kBf16}) {
      save_model(testing::random_model(config, 4, at::kFloat), folder(format), {.format = format});
    }
  }
  void TearDown() override { fs::remove_all(base_); }

  std::string folder(SaveFormat format) const {
    return base_ + (format == SaveFormat::kOfficial ? "/official" : "/bf16");
  }

  /// The warnings and the error of checking a copy with one tensor changed.
  std::string said(SaveFormat format,
                   const std::string& name,
                   const std::function<void(at::Tensor)>& change) const {
    const TensorReader reader = TensorReader::open(folder(format));
    std::vector<NamedTensor> tensors;
    for (const std::string& other : reader.names()) {
      at::Tensor value = reader.tensor(other).clone();
      if (other == name) change(value);
      tensors.push_back(
          {.name = other, .tensor = value, .e8m0 = reader.info(other).dtype == Dtype::kF8E8M0});
    }
    write_safetensors(base_ + "/model.safetensors", tensors);
    write_file_atomic(base_ + "/config.json", read_file(folder(format) + "/config.json"));
    // What an accelerator's weights are looked at for on their way there.
    const auto numerics =
        format == SaveFormat::kOfficial ? ops::Numerics::kReleased : ops::Numerics::kBf16;
    EXPECT_EQ(said_by_loading(numerics, Held::kAccelerator),
              said_by_loading(numerics, Held::kDense))
        << name;
    ::testing::internal::CaptureStderr();
    std::string error;
    try {
      const auto checkpoint = OfficialCheckpoint::open(base_);
      check_weights(checkpoint);
      load_model(checkpoint, ops::Numerics::kIdeal);
    } catch (const InputError& refusal) {
      error = refusal.what();
    }
    return ::testing::internal::GetCapturedStderr() + error;
  }

  /// Warnings, without their times, and the error.
  std::string said_by_loading(ops::Numerics numerics, Held held) const {
    ::testing::internal::CaptureStderr();
    std::string error;
    try {
      load_model(OfficialCheckpoint::open(base_), numerics, {.held = held});
    } catch (const InputError& refusal) {
      error = refusal.what();
    }
    std::istringstream lines(::testing::internal::GetCapturedStderr());
    std::string text;
    for (std::string line; std::getline(lines, line);) text += line.substr(line.find(' ')) + "\n";
    return text + error;
  }

  std::string base_;
};

TEST_F(WeightChecks, RightOnesAreQuiet) {
  EXPECT_EQ(said(SaveFormat::kOfficial, "", [](const at::Tensor&) {}), "");
  EXPECT_EQ(said(SaveFormat::kBf16, "", [](const at::Tensor&) {}), "");
}

TEST_F(WeightChecks, NothingThatIsNotFinite) {
  const auto last_is = [](double value) {
    return [value](const at::Tensor& x) { x.view(-1)[x.numel() - 1] = value; };
  };
  const auto expect_refused = [](const std::string& text, const std::string& name) {
    EXPECT_NE(text.find("1 tensors hold NaN or infinity: " + name), std::string::npos) << text;
  };
  for (const char* name :
       {"embed.weight", "norm.weight", "layers.0.attn.attn_sink", "layers.1.hc_ffn_fn",
        "layers.0.ffn.experts.1.w2.weight", "layers.1.attn.compressor.wkv.weight"}) {
    expect_refused(said(SaveFormat::kBf16, name, last_is(NAN)), name);
    expect_refused(said(SaveFormat::kBf16, name, last_is(-INFINITY)), name);
  }
  expect_refused(said(SaveFormat::kOfficial, "layers.0.attn.wq_b.weight",
                      [](const at::Tensor& x) { x.view(at::kByte).view(-1)[7] = 255; }),
                 "layers.0.attn.wq_b.weight");
}

TEST_F(WeightChecks, WhatCanHardlyBeMeantIsNamed) {
  const auto expect_said = [](const std::string& text, const std::string& what) {
    EXPECT_NE(text.find(what), std::string::npos) << text;
  };
  const auto zero = [](const at::Tensor& x) { x.view(at::kByte).zero_(); };
  expect_said(said(SaveFormat::kBf16, "layers.0.attn.wq_a.weight", zero),
              "1 matrices hold nothing but zeros: layers.0.attn.wq_a.weight");
  expect_said(said(SaveFormat::kOfficial, "layers.1.ffn.experts.0.w3.weight", zero),
              "1 matrices hold nothing but zeros: layers.1.ffn.experts.0.w3.weight");
  expect_said(said(SaveFormat::kBf16, "layers.1.ffn.gate.weight",
                   [](const at::Tensor& x) { x.fill_(0.25); }),
              "1 matrices hold one value throughout: layers.1.ffn.gate.weight");
  const std::string scale = "layers.1.ffn.experts.2.w1.scale";
  expect_said(said(SaveFormat::kOfficial, scale, zero),
              "1 scales of experts are all zero, the weights beside them are not: " + scale);
  expect_said(said(SaveFormat::kOfficial, scale, [](const at::Tensor& x) { x.fill_(120); }),
              "1 scales of experts are one value throughout: " + scale);
}

}  // namespace
}  // namespace hadal::checkpoint
