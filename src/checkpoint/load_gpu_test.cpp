// A checkpoint in codes loaded for requests on a GPU: held as the Hopper kernels read it, with the
// values and about the logits of the CPU.
#include <filesystem>
#include <map>
#include <unistd.h>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <gtest/gtest.h>

#include "checkpoint/load_model.h"
#include "checkpoint/save_model.h"
#include "model/context.h"
#include "testing/tiny_model.h"

namespace hadal::checkpoint {
namespace {

using model::ParamKind;
using ops::Numerics;

at::Tensor logits(const model::Transformer& model, Numerics numerics, at::Device device) {
  const at::NoGradGuard no_grad;
  const ops::Batch batch({40, 9}, {0, 0}, device);
  model::ForwardContext context;
  context.batch = &batch;
  context.numerics = numerics;
  const at::Tensor streams = model.forward(at::arange(49).to(device), context).streams;
  return model.logits(model.head_input(streams, numerics), numerics).cpu();
}

TEST(LoadGpu, ServesPackedWeights) {
  if (!at::globalContext().hasCUDA()) GTEST_SKIP() << "no CUDA device";
  const std::string folder = ::testing::TempDir() + "hadal-load-gpu-" + std::to_string(getpid());
  std::filesystem::remove_all(folder);
  model::ModelConfig config = testing::small_config();
  config.quantized = true;
  config.expert_dtype = model::ExpertDtype::kFp4;
  save_model(testing::random_model(config, 11, at::kFloat), folder, {});
  {
    const auto checkpoint = OfficialCheckpoint::open(folder);
    for (const Numerics numerics : {Numerics::kReleased, Numerics::kBf16}) {
      model::Transformer here = load_model(checkpoint, numerics, serving_target(at::kCPU));
      model::Transformer there = load_model(checkpoint, numerics, serving_target(at::kCUDA));
      const at::Tensor wanted = logits(here, numerics, at::kCPU),
                       found = logits(there, numerics, at::kCUDA);
      // Unrelated logits are 1.4 apart (engine_gpu_test.cpp).
      EXPECT_LE(((found - wanted).norm() / wanted.norm()).item<double>(), 0.35)
          << ops::numerics_name(numerics);
      std::map<std::string, at::Tensor> values;
      here.visit([&](model::Parameter& p) {
        p.hold_dense();
        values[p.name] = p.value;
      });
      there.visit([&](model::Parameter& p) {
        const bool product = p.is_matrix() || p.kind == ParamKind::kHead;
        EXPECT_EQ(p.weight.form(), product ? ops::WeightForm::kSm90 : ops::WeightForm::kNone)
            << p.name;
        p.hold_dense();
        EXPECT_TRUE(p.value.is_cuda()) << p.name;
        EXPECT_TRUE(at::equal(p.value.cpu(), values[p.name])) << p.name;
      });
    }
  }
  std::filesystem::remove_all(folder);
}

}  // namespace
}  // namespace hadal::checkpoint
