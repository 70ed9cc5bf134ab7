// Where a model is loaded to: panels, dense values, and storage of an accelerator, which is tested
// on the CPU (the bytes are the same on every device).
#include <filesystem>
#include <map>
#include <unistd.h>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <gtest/gtest.h>

#include "base/check.h"
#include "checkpoint/dequantise.h"
#include "checkpoint/load_model.h"
#include "checkpoint/quantise.h"
#include "checkpoint/safetensors.h"
#include "checkpoint/save_model.h"
#include "model/context.h"
#include "model/init.h"
#include "testing/kernel_checks.h"
#include "testing/tiny_model.h"

namespace hadal::checkpoint {
namespace {

using model::Parameter;
using model::ParamKind;
using ops::Numerics;
using ops::WeightForm;

at::Tensor logits(const model::Transformer& model, Numerics numerics) {
  const at::NoGradGuard no_grad;
  const ops::Batch batch({40, 9}, {0, 0}, at::kCPU);
  model::ForwardContext context;
  context.batch = &batch;
  context.numerics = numerics;
  const at::Tensor streams = model.forward(at::arange(49), context).streams;
  return model.logits(model.head_input(streams, numerics), numerics);
}

/// What products multiply by.
bool is_product(const Parameter& p) { return p.is_matrix() || p.kind == ParamKind::kHead; }

/// An official checkpoint, FP4 experts and FP8 matrices, of a random model.
class LoadTargets : public ::testing::Test {
 protected:
  void SetUp() override {
    folder_ = ::testing::TempDir() + "hadal-targets-" + std::to_string(getpid());
    std::filesystem::remove_all(folder_);
    model::ModelConfig config = testing::small_config();
    config.quantized = true;
    config.expert_dtype = model::ExpertDtype::kFp4;
    save_model(testing::random_model(config, 11, at::kFloat), folder_, {});
    checkpoint_.emplace(OfficialCheckpoint::open(folder_));
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  model::Transformer load(Numerics numerics, Held held) const {
    return load_model(*checkpoint_, numerics, {.held = held});
  }

  /// The same checkpoint with its experts in FP8.
  void write_with_fp8_experts(const std::string& folder) const {
    const TensorReader reader = TensorReader::open(folder_);
    std::filesystem::create_directories(folder);
    ShardWriter writer(folder, int64_t{1} << 30);
    std::map<std::string, at::Tensor> scales;
    for (const std::string& name : reader.names()) {
      if (reader.tensor(name).scalar_type() != at::kChar) continue;
      const std::string scale = name.substr(0, name.size() - 6) + "scale";  // of .weight
      const ops::StoredCodes codes =
          quantise_fp8(dequantise_fp4(reader.tensor(name), reader.tensor(scale)), name);
      writer.add({.name = name, .tensor = codes.data});
      scales[scale] = codes.scale;
    }
    for (const std::string& name : reader.names()) {
      if (reader.tensor(name).scalar_type() == at::kChar) continue;
      const auto anew = scales.find(name);
      writer.add({.name = name,
                  .tensor = anew == scales.end() ? reader.tensor(name) : anew->second,
                  .e8m0 = reader.info(name).dtype == Dtype::kF8E8M0});
    }
    writer.finish();
    std::filesystem::copy_file(folder_ + "/config.json", folder + "/config.json");
  }

  /// A Base checkpoint of the same values but for rounding: FP8 experts, F32 scales everywhere,
  /// each times a factor that is no power of two where `factors`.
  void write_base(const std::string& folder, bool factors) const {
    const std::string eight = folder + "-e8m0";
    write_with_fp8_experts(eight);
    const TensorReader reader = TensorReader::open(eight);
    std::filesystem::create_directories(folder);
    ShardWriter writer(folder, int64_t{1} << 30);
    at::manual_seed(31);
    for (const std::string& name : reader.names()) {
      at::Tensor tensor = reader.tensor(name);
      if (reader.info(name).dtype == Dtype::kF8E8M0) {
        tensor = e8m0_to_float(tensor);
        if (factors) tensor = tensor * (at::rand(tensor.sizes()) + 0.5);
      }
      writer.add({.name = name, .tensor = tensor});
    }
    writer.finish();
    std::filesystem::copy_file(eight + "/config.json", folder + "/config.json");
    std::filesystem::remove_all(eight);
  }

  std::string folder_;
  std::optional<OfficialCheckpoint> checkpoint_;
};

TEST_F(LoadTargets, BaseCheckpointsWithPowersOfTwoAreThoseWithE8m0) {
  const std::string eight_folder = folder_ + "-fp8", base_folder = folder_ + "-base";
  write_with_fp8_experts(eight_folder);
  write_base(base_folder, /*factors=*/false);
  {
    const auto eight = OfficialCheckpoint::open(eight_folder);
    const auto base = OfficialCheckpoint::open(base_folder);
    EXPECT_EQ(base.storage(), Storage::kFp8F32Scales);
    EXPECT_EQ(default_numerics(base), Numerics::kFp8);
    EXPECT_EQ(default_numerics(eight), Numerics::kFp8);
    EXPECT_EQ(default_numerics(*checkpoint_), Numerics::kReleased);
    for (const Numerics numerics :
         {Numerics::kFp8, Numerics::kReleased, Numerics::kBf16, Numerics::kIdeal}) {
      const model::Transformer a = load_model(eight, numerics, {}),
                               b = load_model(base, numerics, {});
      EXPECT_TRUE(testing::same_bits(logits(a, numerics), logits(b, numerics)))
          << ops::numerics_name(numerics);
    }
    // Codes and E8M0 bytes in memory, and an accelerator has a form for them.
    load_model(base, Numerics::kFp8, {}).visit([](const Parameter& p) {
      if (p.storage != model::Storage::kFp8) return;
      ASSERT_EQ(p.weight.form(), WeightForm::kPanels) << p.name;
      EXPECT_EQ(p.weight.panels().format, ops::WeightFormat::kFp8) << p.name;
      EXPECT_FALSE(p.weight.panels().has_factors()) << p.name;
    });
    EXPECT_NO_THROW(load_model(base, Numerics::kReleased, {.held = Held::kAccelerator}));
    // Dense values compute the same bits: the training forward is the served one.
    const model::Transformer dense = load_model(base, Numerics::kFp8, {.held = Held::kDense});
    EXPECT_TRUE(testing::same_bits(logits(dense, Numerics::kFp8),
                                   logits(load_model(base, Numerics::kFp8, {}), Numerics::kFp8)));
  }
  std::filesystem::remove_all(eight_folder);
  std::filesystem::remove_all(base_folder);
}

TEST_F(LoadTargets, BaseCheckpointsWithScalesOfAnyValueAreServedOnTheCpu) {
  const std::string folder = folder_ + "-base";
  write_base(folder, /*factors=*/true);
  {
    const auto base = OfficialCheckpoint::open(folder);
    const model::Transformer ideal = load_model(base, Numerics::kIdeal, {.held = Held::kDense});
    std::map<std::string, at::Tensor> values;
    ideal.visit([&](const Parameter& p) { values[p.name] = p.value; });
    const at::Tensor exact = logits(ideal, Numerics::kIdeal);
    // Held as codes and scales, which stand for the same values.
    const model::Transformer model = load_model(base, Numerics::kFp8, {});
    int64_t coded = 0;
    model.visit([&](const Parameter& p) {
      if (p.storage != model::Storage::kFp8) return;
      ASSERT_EQ(p.weight.form(), WeightForm::kPanels) << p.name;
      EXPECT_TRUE(p.weight.panels().has_factors()) << p.name;
      EXPECT_TRUE(at::equal(p.weight.values().reshape(p.shape), values[p.name])) << p.name;
      ++coded;
    });
    EXPECT_GT(coded, 6 * 10);
    // Errors are those of rounded rows in a random model: 0.25 in `fp8`, 0.05 in `bf16`.
    const auto error = [&](const model::Transformer& of, Numerics numerics) {
      return ((logits(of, numerics) - exact).norm() / exact.norm()).item<double>();
    };
    EXPECT_LT(error(model, Numerics::kFp8), 0.5);
    EXPECT_LT(error(load_model(base, Numerics::kBf16, {}), Numerics::kBf16), 0.1);
    try {
      load_model(base, Numerics::kReleased, {.held = Held::kAccelerator});
      FAIL();
    } catch (const InputError& refused) {
      EXPECT_NE(std::string(refused.what()).find("are no powers of two"), std::string::npos)
          << refused.what();
    }
  }
  std::filesystem::remove_all(folder);
}

TEST_F(LoadTargets, Fp8RefusesFp4ExpertsAndAccelerators) {
  const auto refused = [](const OfficialCheckpoint& checkpoint, Held held) -> std::string {
    try {
      load_model(checkpoint, Numerics::kFp8, {.held = held});
    } catch (const InputError& error) {
      return error.what();
    }
    return "loaded";
  };
  EXPECT_NE(refused(*checkpoint_, Held::kPanels).find("experts are stored in it"),
            std::string::npos);
  const std::string folder = folder_ + "-fp8";
  write_with_fp8_experts(folder);
  {
    const auto eight = OfficialCheckpoint::open(folder);
    EXPECT_EQ(refused(eight, Held::kPanels), "loaded");
    EXPECT_NE(refused(eight, Held::kAccelerator).find("fp8 is for the CPU"), std::string::npos);
  }
  std::filesystem::remove_all(folder);
}

TEST_F(LoadTargets, AnAcceleratorHoldsFourEightAndSixteenBitsAWeight) {
  const model::Transformer model = load(Numerics::kReleased, Held::kAccelerator);
  int64_t experts = 0, matrices = 0;
  model.visit([&](const Parameter& p) {
    const bool fp4 = p.kind == ParamKind::kExperts;
    const bool low = p.storage == model::Storage::kBf16 && is_product(p);
    EXPECT_EQ(p.weight.form(), p.storage == model::Storage::kFp8 || fp4 || low ? WeightForm::kSm90
                                                                               : WeightForm::kNone)
        << p.name;
    EXPECT_NE(p.value.defined(), p.weight.defined()) << p.name;
    if (!p.weight.defined()) return;
    EXPECT_EQ(p.weight.sm90().widened, p.kind == ParamKind::kGroups) << p.name;
    int64_t weights = 1;
    for (const int64_t size : p.shape) weights *= size;
    // FP4: half a byte, and four bytes for the four scales of 128 inputs: 4.25 bits. FP8: a byte,
    // and four for the scale of each 128 x 128.
    const int64_t out = p.weight.out(), in = p.weight.in(), count = p.weight.matrices();
    const int64_t blocks = (out + 127) / 128 * ((in + 127) / 128);
    // BF16: rows in tiles of 64, inputs in slabs of 64.
    const int64_t tiles = count * ((out + 63) / 64) * ((in + 63) / 64) * 64 * 64 * 2;
    EXPECT_EQ(p.weight.num_bytes(), low   ? tiles
                                    : fp4 ? weights * 17 / 32
                                          : weights + count * blocks * 4)
        << p.name;
    EXPECT_EQ(p.num_bytes(), p.weight.num_bytes());
    ++(fp4 ? experts : matrices);
  });
  EXPECT_EQ(experts, 6 * 3);
  EXPECT_GT(matrices, 6 * 7);
}

TEST_F(LoadTargets, AnAcceleratorHoldsExpertsOfEveryForm) {
  const auto expect = [](const model::Transformer& model, ops::WeightFormat format) {
    int64_t experts = 0;
    model.visit([&](const Parameter& p) {
      if (p.kind != ParamKind::kExperts) return;
      ASSERT_EQ(p.weight.form(), WeightForm::kSm90) << p.name;
      EXPECT_EQ(p.weight.sm90().format, format) << p.name;
      ++experts;
    });
    EXPECT_EQ(experts, 6 * 3);
  };
  expect(load(Numerics::kReleased, Held::kAccelerator), ops::WeightFormat::kFp4);
  expect(load(Numerics::kBf16, Held::kAccelerator), ops::WeightFormat::kBf16);
  const std::string folder = folder_ + "-fp8";
  write_with_fp8_experts(folder);
  {
    const auto eight = OfficialCheckpoint::open(folder);
    EXPECT_EQ(eight.storage(), Storage::kFp8);
    const model::Transformer packed =
        load_model(eight, Numerics::kReleased, {.held = Held::kAccelerator});
    expect(packed, ops::WeightFormat::kFp8);
    const model::Transformer dense = load_model(eight, Numerics::kReleased, {.held = Held::kDense});
    EXPECT_TRUE(at::equal(logits(packed, Numerics::kReleased), logits(dense, Numerics::kReleased)));
  }
  std::filesystem::remove_all(folder);
}

TEST_F(LoadTargets, ValuesAndResultsDoNotDependOnTheTarget) {
  for (const Numerics numerics : {Numerics::kReleased, Numerics::kBf16, Numerics::kIdeal}) {
    model::Transformer dense = load(numerics, Held::kDense);
    model::Transformer panels = load(numerics, Held::kPanels);
    model::Transformer accelerator = load(numerics, Held::kAccelerator);
    const at::Tensor expected = logits(dense, numerics);
    EXPECT_TRUE(at::equal(logits(panels, numerics), expected)) << ops::numerics_name(numerics);
    EXPECT_TRUE(at::equal(logits(accelerator, numerics), expected)) << ops::numerics_name(numerics);
    std::map<std::string, at::Tensor> values;
    dense.visit([&](Parameter& p) { values[p.name] = p.value; });
    for (model::Transformer* packed : {&panels, &accelerator}) {
      packed->visit([&](Parameter& p) {
        p.hold_dense();
        EXPECT_EQ(p.value.scalar_type(), values[p.name].scalar_type()) << p.name;
        EXPECT_TRUE(at::equal(p.value, values[p.name])) << p.name;
      });
    }
  }
}

TEST_F(LoadTargets, MovingPanelsToADeviceKeepsTheirBits) {
  const model::Transformer loaded = load(Numerics::kReleased, Held::kAccelerator);
  std::map<std::string, ops::Weight> expected;
  loaded.visit([&](const Parameter& p) { expected[p.name] = p.weight; });
  load(Numerics::kReleased, Held::kPanels).visit([&](const Parameter& p) {
    if (p.weight.form() != WeightForm::kPanels) return;
    // What Weight::to does on its way to a device, as far as there is none.
    const std::optional<ops::Weight> moved = p.weight.to_sm90(p.storage, p.role);
    ASSERT_EQ(moved.has_value(), expected[p.name].defined()) << p.name;
    if (!moved) return;
    EXPECT_TRUE(at::equal(moved->sm90().data, expected[p.name].sm90().data)) << p.name;
    if (moved->sm90().scales.defined()) {
      EXPECT_TRUE(at::equal(moved->sm90().scales, expected[p.name].sm90().scales)) << p.name;
    }
  });
  // A device can be the CPU, too: nothing changes.
  model::Transformer stays = load(Numerics::kReleased, Held::kAccelerator);
  model::move_to(stays, at::kCPU);
  EXPECT_TRUE(at::equal(logits(stays, Numerics::kReleased), logits(loaded, Numerics::kReleased)));
}

TEST_F(LoadTargets, AnExpertRangeLoadsExactlyThoseExperts) {
  for (const Held held : {Held::kPanels, Held::kDense, Held::kAccelerator}) {
    model::Transformer whole = load(Numerics::kReleased, held);
    std::map<std::string, at::Tensor> values;
    whole.visit([&](Parameter& p) {
      p.hold_dense();
      values[p.name] = p.value;
    });
    model::Transformer part(checkpoint_->config());
    model::shard_experts(part, 1, 4);
    load_weights(part, *checkpoint_, Numerics::kReleased, {.held = held});
    int64_t sharded = 0;
    part.visit([&](Parameter& p) {
      const bool coded = p.weight.defined();
      EXPECT_EQ(coded, held != Held::kDense && is_product(p)) << p.name;
      p.hold_dense();
      if (p.kind != ParamKind::kExperts) {
        EXPECT_TRUE(p.shard.whole());
        EXPECT_TRUE(at::equal(p.value, values[p.name])) << p.name;
        return;
      }
      ++sharded;
      EXPECT_EQ(p.local_shape()[0], 2);
      EXPECT_EQ(p.local_units(), 2);
      EXPECT_TRUE(at::equal(p.value, values[p.name].narrow(0, 2, 2))) << p.name;
    });
    EXPECT_EQ(sharded, 6 * 3);
  }
}

TEST_F(LoadTargets, ShardsOfRowsAndInputs) {
  struct Case {
    int64_t axis, part, parts;
    ops::WeightFormat format;  ///< of FP8 matrices held for an accelerator
  };
  // 128 rows of a matrix of 256 keep their codes; 64 cut through the grid of scales, as inputs do,
  // and are held in BF16.
  for (const Case& c : {Case{0, 1, 2, ops::WeightFormat::kFp8},
                        {0, 1, 4, ops::WeightFormat::kBf16},
                        {1, 0, 2, ops::WeightFormat::kBf16}}) {
    model::Transformer whole = load(Numerics::kReleased, Held::kDense);
    model::Transformer part(checkpoint_->config());
    const auto cut = [&](const Parameter& p) {
      return p.kind == ParamKind::kMatrix && p.storage == model::Storage::kFp8 &&
             p.shape == std::vector<int64_t>{256, 128};
    };
    part.visit([&](Parameter& p) {
      if (cut(p))
        p.shard = model::Shard::even(c.axis, p.shape[static_cast<size_t>(c.axis)], c.part, c.parts);
    });
    load_weights(part, *checkpoint_, Numerics::kReleased, {.held = Held::kAccelerator});
    std::map<std::string, at::Tensor> values;
    whole.visit([&](const Parameter& p) { values[p.name] = p.value; });
    int64_t found = 0;
    part.visit([&](Parameter& p) {
      if (!cut(p)) return;
      ++found;
      ASSERT_EQ(p.weight.form(), WeightForm::kSm90) << p.name;
      EXPECT_EQ(p.weight.sm90().format, c.format) << p.name;
      p.hold_dense();
      EXPECT_TRUE(at::equal(p.value, p.shard.of(values[p.name]))) << p.name;
    });
    EXPECT_GT(found, 0);
  }
}

TEST_F(LoadTargets, AShardIsNoWholeModel) {
  model::Transformer part(checkpoint_->config());
  model::shard_experts(part, 0, 2);
  load_weights(part, *checkpoint_, Numerics::kReleased, {.held = Held::kDense});
  EXPECT_THROW(save_model(part, folder_ + "-part", {}), Error);
  EXPECT_THROW(model::shard_experts(part, 0, 2), Error);  // has values already
  EXPECT_THROW(logits(part, Numerics::kReleased), Error);
  part.visit([](Parameter& p) {
    if (p.kind != ParamKind::kExperts) return;
    EXPECT_THROW(p.hold(at::zeros(p.shape)), Error);  // of the whole's shape
    EXPECT_THROW(p.hold(ops::Weight(at::zeros(p.shape))), Error);
  });
}

}  // namespace
}  // namespace hadal::checkpoint
