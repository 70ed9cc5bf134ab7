// Runs in `fp8` and `released`: the same bits on any number of ranks, and official files whose
// served pass has the bits of the training forward.
#include <string>
#include <utility>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <gtest/gtest.h>

#include "checkpoint/load_model.h"
#include "checkpoint/safetensors.h"
#include "model/context.h"
#include "testing/kernel_checks.h"
#include "train/run_state.h"
#include "train_fixture.h"

namespace hadal {
namespace {

using checkpoint::OfficialCheckpoint;
using ops::Numerics;

class TrainFp8 : public TrainCli {
 protected:
  /// The config says FP4 experts; `last` is the numerics of a second stage, if any.
  std::string config_of(const std::string& name, const std::string& last = "") const {
    Json run = run_json(name);
    run["stages"] = Json::parse(R"([{"name": "base", "tokens": 256, "row_length": 64,
        "attention": "sparse", "numerics": "fp8", "mix": {"a": 1, "b": 1}}])");
    run["batch"][0]["tokens"] = 128;
    if (!last.empty()) {
      run["stages"].push_back(run["stages"][0]);
      run["stages"][1]["name"] = "last";
      run["stages"][1]["numerics"] = last;
    }
    return write_run(run, name);
  }

  /// What the training forward of the run's last masters computes, of which `hadal logits` on the
  /// exported model is to have the bits, whole and in chunks, and its MTP block likewise.
  at::Tensor expect_served_as_trained(const std::string& name, Numerics numerics) const {
    const auto source = OfficialCheckpoint::open(out(name) + "/model");
    EXPECT_EQ(default_numerics(source), numerics);
    const model::Transformer masters = trained_masters(name);
    at::manual_seed(5);
    const at::Tensor ids = at::randint(train_config().vocab_size, {150}, at::kLong);
    const auto [expected, expected_mtp] = logits_of(masters, ids, numerics);
    EXPECT_TRUE(expected.requires_grad());
    checkpoint::write_safetensors(folder_ / "ids",
                                  {{.name = "input_ids", .tensor = ids.unsqueeze(0).to(at::kInt)}});
    for (const std::string chunk : {"", " --chunk 7"}) {
      const CliResult served =
          run(concat("logits --model ", out(name), "/model --ids ", (folder_ / "ids").string(),
                     " --out ", (folder_ / "logits").string(), chunk));
      EXPECT_EQ(served.code, 0) << served.error;
      if (served.code != 0) return {};
      const auto reader = checkpoint::TensorReader::open(folder_ / "logits");
      EXPECT_TRUE(testing::same_bits(reader.tensor("logits")[0], expected.detach())) << chunk;
    }
    const at::NoGradGuard no_grad;
    const auto [served, served_mtp] =
        logits_of(checkpoint::load_model(source, numerics), ids, numerics);
    EXPECT_TRUE(testing::same_bits(served, expected.detach()));
    EXPECT_TRUE(testing::same_bits(served_mtp, expected_mtp.detach()));
    return expected.detach();
  }

 private:
  /// FP32 masters under the run's config, which says FP4 experts, all asked for gradients.
  model::Transformer trained_masters(const std::string& name) const {
    const std::string state = train::newest_state(out(name));
    EXPECT_FALSE(state.empty());
    model::Transformer masters = train::open_masters(state, train_config());
    int64_t experts = 0, finer_norms = 0;
    masters.visit([&](model::Parameter& p) {
      p.hold(p.value.clone());
      if (!p.value.is_floating_point()) return;
      EXPECT_EQ(p.value.scalar_type(), at::kFloat) << p.name;
      experts += p.storage == model::Storage::kFp4 ? 1 : 0;
      finer_norms += p.kind == model::ParamKind::kNorm &&
                             !at::equal(p.value.to(at::kBFloat16).to(at::kFloat), p.value)
                         ? 1
                         : 0;
      p.value.requires_grad_(p.trainable());
    });
    EXPECT_EQ(experts, 4 * 3);
    // Where training moves no norm off the grid of BF16 this would show nothing.
    EXPECT_GT(finer_norms, 10);
    return masters;
  }

  /// Of the main model and of its MTP block, FP32.
  static std::pair<at::Tensor, at::Tensor> logits_of(const model::Transformer& model,
                                                     const at::Tensor& ids,
                                                     Numerics numerics) {
    const ops::Batch batch({ids.size(0)}, {0}, at::kCPU);
    model::ForwardContext context;
    context.batch = &batch;
    context.numerics = numerics;
    const at::Tensor streams = model.forward(ids, context).streams;
    const at::Tensor mtp = model.mtp(streams, ids.roll(-1), context).head_input;
    return {model.logits(model.head_input(streams, numerics), numerics).to(at::kFloat),
            model.logits(mtp, numerics).to(at::kFloat)};
  }
};

TEST_F(TrainFp8, TheExportedModelIsServedWithTheBitsOfTheTrainingForward) {
  const CliResult trained = train(config_of("base"));
  ASSERT_EQ(trained.code, 0) << trained.error;
  const auto source = OfficialCheckpoint::open(out("base") + "/model");
  EXPECT_EQ(source.storage(), checkpoint::Storage::kFp8F32Scales);
  EXPECT_EQ(source.config().expert_dtype, model::ExpertDtype::kFp8);
  const CliResult inspected = run("inspect " + out("base") + "/model");
  EXPECT_EQ(inspected.code, 0) << inspected.error;
  EXPECT_NE(inspected.out.find("FP8 with F32 scales"), std::string::npos) << inspected.out;
  const at::Tensor expected = expect_served_as_trained("base", Numerics::kFp8);
  // In other numerics it is another model.
  const CliResult other =
      run(concat("logits --model ", out("base"), "/model --numerics bf16 --ids ",
                 (folder_ / "ids").string(), " --out ", (folder_ / "other").string()));
  ASSERT_EQ(other.code, 0) << other.error;
  EXPECT_FALSE(testing::same_bits(
      checkpoint::TensorReader::open(folder_ / "other").tensor("logits")[0], expected));
}

TEST_F(TrainFp8, SoIsOneThatWasTrainedAsReleased) {
  const CliResult trained = train(config_of("qat", "released"));
  ASSERT_EQ(trained.code, 0) << trained.error;
  EXPECT_EQ(OfficialCheckpoint::open(out("qat") + "/model").storage(), checkpoint::Storage::kFp4);
  expect_served_as_trained("qat", Numerics::kReleased);
}

TEST_F(TrainFp8, RanksHaveTheBitsOfOneAndALaterStageSaysHowExpertsAreStored) {
  const CliResult whole = train(config_of("whole", "released"));
  ASSERT_EQ(whole.code, 0) << whole.error;
  EXPECT_EQ(OfficialCheckpoint::open(out("whole") + "/model").storage(), checkpoint::Storage::kFp4);
  const CliResult ranks = train(config_of("ranks", "released"), "--ranks 2");
  ASSERT_EQ(ranks.code, 0) << ranks.error;
  expect_same_results(out("whole"), out("ranks"));
}

TEST_F(TrainFp8, WidthsThatHaveNoBlocksAreRefused) {
  model::ModelConfig config = train_config();
  config.moe_inter_dim = 96;
  write("config.json", model::to_config_json(config));
  const CliResult refused = train(config_of("narrow"));
  EXPECT_EQ(refused.code, 2);
  EXPECT_NE(
      refused.error.find("fp8 numerics need moe_intermediate_size divisible by 128, found 96"),
      std::string::npos)
      << refused.error;
}

}  // namespace
}  // namespace hadal
