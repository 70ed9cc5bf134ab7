// What is stored is what computes: no numerics rounds a float that a checkpoint holds.
#include <filesystem>
#include <unistd.h>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <gtest/gtest.h>

#include "base/file.h"
#include "checkpoint/convert.h"
#include "checkpoint/load_model.h"
#include "model/context.h"
#include "testing/tiny_model.h"

namespace hadal::checkpoint {
namespace {

namespace fs = std::filesystem;
using ops::Numerics;

class StoredValues : public ::testing::TestWithParam<at::ScalarType> {
 protected:
  void SetUp() override {
    folder_ = ::testing::TempDir() + "hadal-stored-" + std::to_string(getpid());
    fs::remove_all(folder_);
    fs::create_directories(folder_);
    model::ModelConfig config = testing::small_config();
    config.quantized = false;
    config.expert_dtype = model::ExpertDtype::kBf16;
    source_.emplace(testing::random_model(config, 9, at::kFloat));
    std::vector<NamedTensor> tensors;
    source_->visit([&](model::Parameter& p) {
      if (p.value.is_floating_point()) p.value = p.value.to(GetParam()).to(at::kFloat);
      const at::Tensor stored = p.value.is_floating_point() ? p.value.to(GetParam()) : p.value;
      const size_t star = p.name.find('*');
      for (int64_t i = 0; i < (star == std::string::npos ? 1 : p.shape[0]); ++i) {
        std::string name = p.name;
        if (star != std::string::npos) name.replace(star, 1, std::to_string(i));
        tensors.push_back({.name = name, .tensor = star == std::string::npos ? stored : stored[i]});
      }
    });
    write_safetensors(folder_ + "/model.safetensors", tensors);
    write_file_atomic(folder_ + "/config.json", model::to_config_json(config));
  }
  void TearDown() override { fs::remove_all(folder_); }

  static at::Tensor logits(const model::Transformer& model, Numerics numerics) {
    const at::NoGradGuard no_grad;
    const ops::Batch batch({40}, {0}, at::kCPU);
    model::ForwardContext context;
    context.batch = &batch;
    context.numerics = numerics;
    const at::Tensor streams = model.forward(at::arange(40), context).streams;
    return model.logits(model.head_input(streams, numerics), numerics);
  }

  std::string folder_;
  std::optional<model::Transformer> source_;
};

TEST_P(StoredValues, AreTheModels) {
  const auto checkpoint = OfficialCheckpoint::open(folder_);
  std::map<std::string, at::Tensor> wanted;
  source_->visit([&](const model::Parameter& p) { wanted[p.name] = p.value; });
  for (const Numerics numerics : {Numerics::kIdeal, Numerics::kBf16, Numerics::kReleased}) {
    at::Tensor by_holding[3];
    for (const Held held : {Held::kDense, Held::kPanels, Held::kAccelerator}) {
      model::Transformer model = load_model(checkpoint, numerics, {.held = held});
      by_holding[static_cast<int>(held)] = logits(model, numerics);
      model.visit([&](model::Parameter& p) {
        p.hold_dense();
        // Rows of the embedding are activations.
        if (p.kind == model::ParamKind::kEmbedding && numerics != Numerics::kIdeal) return;
        EXPECT_TRUE(at::equal(p.operand(numerics).to(at::kFloat), wanted[p.name].to(at::kFloat)))
            << p.name << " " << ops::numerics_name(numerics);
      });
    }
    EXPECT_TRUE(at::equal(by_holding[0], by_holding[1])) << ops::numerics_name(numerics);
    EXPECT_TRUE(at::equal(by_holding[0], by_holding[2])) << ops::numerics_name(numerics);
  }
  EXPECT_TRUE(at::equal(logits(*source_, Numerics::kIdeal),
                        logits(load_model(checkpoint, Numerics::kIdeal), Numerics::kIdeal)));
}

TEST_P(StoredValues, SurviveConversionToF32AndBack) {
  const std::string there = folder_ + "/hf", back = folder_ + "/back";
  const ConvertReport to_hf =
      convert({.in = folder_, .out = there, .target = ConvertTarget::kHfF32});
  EXPECT_EQ(to_hf.rounded, 0);
  EXPECT_EQ(convert({.in = there, .out = back, .target = ConvertTarget::kF32}).rounded, 0);
  const auto first = OfficialCheckpoint::open(folder_), last = OfficialCheckpoint::open(back),
             hf = OfficialCheckpoint::open(there);
  EXPECT_EQ(hf.naming(), Naming::kHfModules);
  for (const TensorSpec& spec : tensor_table(first.config())) {
    const at::Tensor a = first.get(spec.name).data, b = last.get(spec.name).data;
    EXPECT_TRUE(at::equal(a.to(b.scalar_type()), b)) << spec.name;
    EXPECT_TRUE(at::equal(hf.get(spec.name).data, b)) << spec.name;
  }
}

INSTANTIATE_TEST_SUITE_P(Floats,
                         StoredValues,
                         ::testing::Values(at::kFloat, at::kHalf, at::kBFloat16),
                         [](const auto& param_info) {
                           return std::string(c10::toString(param_info.param));
                         });

}  // namespace
}  // namespace hadal::checkpoint
