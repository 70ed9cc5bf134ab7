#include "checkpoint/convert.h"

#include <filesystem>
#include <unistd.h>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <gtest/gtest.h>

#include "base/check.h"
#include "base/file.h"
#include "checkpoint/dequantise.h"
#include "checkpoint/hf_names.h"
#include "checkpoint/official.h"
#include "checkpoint/quantise.h"
#include "checkpoint/requantise.h"
#include "checkpoint/save_model.h"
#include "testing/tiny_model.h"

namespace hadal::checkpoint {
namespace {

namespace fs = std::filesystem;

class Convert : public ::testing::Test {
 protected:
  void SetUp() override {
    at::set_num_threads(1);  // matrices too small to share
    base_ = ::testing::TempDir() + "hadal-convert-" + std::to_string(getpid()) + "-" +
            ::testing::UnitTest::GetInstance()->current_test_info()->name();
    fs::remove_all(base_);
    fs::create_directories(base_);
  }
  void TearDown() override { fs::remove_all(base_); }

  std::string path(const std::string& name) const { return base_ + "/" + name; }

  static model::ModelConfig config() {
    model::ModelConfig config = testing::small_config();
    config.n_layers = 3;
    config.compress_ratios = {0, 4, 128, 0};
    config.quantized = true;
    config.expert_dtype = model::ExpertDtype::kFp4;
    return config;
  }
  void make_official(const std::string& name) const {
    save_model(testing::random_model(config(), 21, at::kFloat), path(name),
               {.max_shard_bytes = kShard, .tokenizer = {}});
    write_file_atomic(path(name) + "/tokenizer.json", "{}");
    write_file_atomic(path(name) + "/generation_config.json", "{\"a\": 1}");
  }
  /// The tensors of a folder, changed one by one, as another folder.
  void rewrite(const std::string& from,
               const std::string& to,
               const std::function<NamedTensor(NamedTensor)>& change) const {
    const TensorReader reader = TensorReader::open(path(from));
    fs::create_directories(path(to));
    ShardWriter writer(path(to), int64_t{1} << 30);
    for (const std::string& name : reader.names()) {
      NamedTensor tensor = change({.name = name,
                                   .tensor = reader.tensor(name),
                                   .e8m0 = reader.info(name).dtype == Dtype::kF8E8M0});
      if (!tensor.name.empty()) writer.add(tensor);
    }
    writer.finish();
    write_file_atomic(path(to) + "/config.json", read_file(path(from) + "/config.json"));
  }
  ConvertReport run(const std::string& in,
                    const std::string& out,
                    ConvertTarget target,
                    bool drop = false) const {
    return convert({.in = path(in),
                    .out = path(out),
                    .target = target,
                    .drop_scales = drop,
                    .max_shard_bytes = kShard});
  }
  void expect_same_files(const std::string& a, const std::string& b) const {
    for (const auto& entry : fs::directory_iterator(path(a))) {
      const std::string name = entry.path().filename();
      if (name == "config.json") continue;
      ASSERT_TRUE(fs::exists(path(b) + "/" + name)) << name;
      EXPECT_EQ(read_file(entry.path()), read_file(path(b) + "/" + name)) << name;
    }
    EXPECT_EQ(model::load_config(path(a)), model::load_config(path(b)));
  }
  /// The same values, whatever the storage; `official` names on both sides.
  void expect_same_values(const std::string& a, const std::string& b) const {
    const auto left = OfficialCheckpoint::open(path(a)), right = OfficialCheckpoint::open(path(b));
    for (const TensorSpec& spec : tensor_table(left.config())) {
      const CheckpointTensor x = left.get(spec.name), y = right.get(spec.name);
      EXPECT_TRUE(at::equal(dense_values(x.data, x.scale).to(at::kDouble),
                            dense_values(y.data, y.scale).to(at::kDouble)))
          << spec.name;
    }
  }

  static constexpr int64_t kShard = 1 << 20;
  std::string base_;
};

TEST_F(Convert, ThroughBf16AndBackIsTheSameFileToTheByte) {
  make_official("official");
  const ConvertReport there = run("official", "bf16", ConvertTarget::kBf16);
  EXPECT_EQ(there.rounded, 0);
  EXPECT_GT(there.kept_scales, 100);
  EXPECT_EQ(OfficialCheckpoint::open(path("bf16")).storage(), Storage::kBf16);
  EXPECT_TRUE(fs::exists(path("bf16") + "/model.safetensors.index.json"));
  EXPECT_EQ(read_file(path("bf16") + "/generation_config.json"), "{\"a\": 1}");
  expect_same_values("official", "bf16");
  const ConvertReport back = run("bf16", "back", ConvertTarget::kOfficial);
  EXPECT_EQ(back.kept_scales, there.kept_scales);
  EXPECT_EQ(back.found_scales + back.rounded, 0);
  expect_same_files("official", "back");
  EXPECT_EQ(run("official", "again", ConvertTarget::kOfficial).rounded, 0);
  expect_same_files("official", "again");
}

TEST_F(Convert, ScalesThatNobodyWouldChooseComeBackToo) {
  make_official("made");
  // Without the highest bit of their exponents no code is large: the scales are larger than need
  // be.
  rewrite("made", "official", [](NamedTensor tensor) {
    const at::ScalarType type = tensor.tensor.scalar_type();
    const int mask = type == at::kChar ? 0xBB : type == at::kFloat8_e4m3fn ? 0xBF : 0;
    if (mask != 0) tensor.tensor = tensor.tensor.view(at::kByte).bitwise_and(mask).view(type);
    return tensor;
  });
  run("official", "bf16", ConvertTarget::kBf16);
  const ConvertReport back = run("bf16", "back", ConvertTarget::kOfficial);
  EXPECT_EQ(back.found_scales + back.rounded, 0);
  const auto before = TensorReader::open(path("official")),
             after = TensorReader::open(path("back"));
  ASSERT_EQ(before.names(), after.names());
  for (const std::string& name : before.names()) {
    EXPECT_EQ(before.info(name).dtype, after.info(name).dtype) << name;
    EXPECT_TRUE(at::equal(before.tensor(name).contiguous().view(at::kByte),
                          after.tensor(name).contiguous().view(at::kByte)))
        << name;
  }
}

TEST_F(Convert, WithoutScalesTheValuesComeBack) {
  make_official("made");
  // Blocks so small that the official rounding's floor of 1e-4 would flush them.
  rewrite("made", "official", [](NamedTensor tensor) {
    if (tensor.e8m0) tensor.tensor = tensor.tensor - 40;
    return tensor;
  });
  const ConvertReport there = run("official", "bf16", ConvertTarget::kBf16, /*drop=*/true);
  EXPECT_EQ(there.kept_scales + there.rounded, 0);
  for (const std::string& name : TensorReader::open(path("bf16")).names())
    EXPECT_FALSE(name.ends_with(".scale")) << name;
  const ConvertReport back = run("bf16", "back", ConvertTarget::kOfficial);
  EXPECT_EQ(back.rounded, 0) << back.first_rounded;
  EXPECT_GT(back.found_scales, 100);
  EXPECT_EQ(OfficialCheckpoint::open(path("back")).storage(), Storage::kFp4);
  expect_same_values("official", "back");
}

TEST_F(Convert, TransformersNamesAndBack) {
  make_official("official");
  const ConvertReport there = run("official", "hf", ConvertTarget::kHfBf16);
  EXPECT_EQ(there.rounded, 0);
  EXPECT_TRUE(there.mtp_beside_hf);
  const TensorReader hf = TensorReader::open(path("hf"));
  const model::ModelConfig c = config();
  EXPECT_EQ(hf.info("model.layers.1.mlp.experts.gate_up_proj").shape,
            std::vector<int64_t>({c.n_routed_experts, 2 * c.moe_inter_dim, c.dim}));
  EXPECT_EQ(hf.info("model.layers.2.mlp.experts.down_proj").shape,
            std::vector<int64_t>({c.n_routed_experts, c.dim, c.moe_inter_dim}));
  for (const char* name :
       {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", "model.hc_head.hc_fn",
        "model.layers.0.input_layernorm.weight", "model.layers.0.attn_hc.scale",
        "model.layers.0.self_attn.sinks", "model.layers.0.mlp.gate.tid2eid",
        "model.layers.1.mlp.gate.e_score_correction_bias",
        "model.layers.1.self_attn.compressor.position_bias",
        "model.layers.1.self_attn.compressor.indexer.scorer.weights_proj.weight",
        "model.layers.1.self_attn.compressor.indexer.kv_norm.weight",
        "model.layers.2.mlp.shared_experts.down_proj.weight", "mtp.0.e_proj.weight"})
    EXPECT_TRUE(hf.has(name)) << name;
  // w1 first, then w3.
  const auto official = OfficialCheckpoint::open(path("official"));
  const CheckpointTensor w3 = official.get("layers.1.ffn.experts.2.w3.weight");
  EXPECT_TRUE(at::equal(hf.tensor("model.layers.1.mlp.experts.gate_up_proj")[2]
                            .narrow(0, c.moe_inter_dim, c.moe_inter_dim)
                            .to(at::kFloat),
                        dequantise_fp4(w3.data, w3.scale)));

  EXPECT_EQ(run("hf", "bf16", ConvertTarget::kBf16).naming, Naming::kHfModules);
  expect_same_values("official", "bf16");
  const ConvertReport back = run("hf", "back", ConvertTarget::kOfficial);
  EXPECT_EQ(back.rounded, 0);
  expect_same_values("official", "back");

  // As transformers itself would save it: no MTP block; an older name for the indexer's weights.
  rewrite("hf", "saved", [](NamedTensor tensor) {
    if (tensor.name.starts_with("mtp.")) tensor.name.clear();
    if (const size_t at = tensor.name.find("scorer."); at != std::string::npos)
      tensor.name.erase(at, 7);
    return tensor;
  });
  run("saved", "no-mtp", ConvertTarget::kOfficial);
  EXPECT_EQ(OfficialCheckpoint::open(path("no-mtp")).config().n_mtp_layers, 0);
}

TEST_F(Convert, QuantisedTensorsUnderTransformersNames) {
  make_official("official");
  rewrite("official", "hf-fp8", [](NamedTensor tensor) {
    // Matrices of attention only: names as a quantised repost has them.
    const std::string scale = ".scale";
    const bool is_scale = tensor.name.ends_with(scale);
    const std::string weight =
        is_scale ? tensor.name.substr(0, tensor.name.size() - scale.size()) + ".weight"
                 : tensor.name;
    for (const TensorSpec& spec : tensor_table(config())) {
      if (spec.name != weight) continue;
      HfPlace place = hf_place(spec);
      if (place.is_stacked()) {
        const bool down = place.name.ends_with("down_proj");
        const size_t experts = place.name.rfind("experts.");
        place.name = concat(place.name.substr(0, experts), "experts.", place.expert, ".",
                            down                  ? "down_proj"
                            : place.first_row > 0 ? "up_proj"
                                                  : "gate_proj",
                            ".weight");
      }
      tensor.name = is_scale ? hf_scale_name(place.name) : place.name;
    }
    return tensor;
  });
  const ConvertReport report = run("hf-fp8", "back", ConvertTarget::kOfficial);
  EXPECT_EQ(report.naming, Naming::kHfModules);
  expect_same_values("official", "back");
}

TEST_F(Convert, BaseCheckpointsAreLossyAndComeBackByTheirScales) {
  make_official("made");
  at::manual_seed(8);
  // FP8 everywhere with F32 scales that are no powers of two.
  rewrite("made", "base", [&](NamedTensor tensor) {
    if (tensor.tensor.scalar_type() == at::kChar) {
      const std::string scale = tensor.name.substr(0, tensor.name.size() - 6) + "scale";
      const TensorReader reader = TensorReader::open(path("made"));
      tensor.tensor =
          quantise_fp8(dequantise_fp4(tensor.tensor, reader.tensor(scale)), tensor.name).data;
    } else if (tensor.e8m0) {
      const std::string weight = tensor.name.substr(0, tensor.name.size() - 5) + "weight";
      const TensorReader reader = TensorReader::open(path("made"));
      const auto shape = reader.tensor(weight).sizes();
      const int64_t in = reader.tensor(weight).scalar_type() == at::kChar ? shape[1] * 2 : shape[1];
      tensor.e8m0 = false;
      tensor.tensor = at::rand({(shape[0] + 127) / 128, (in + 127) / 128}) * 0.01 + 0.001;
    }
    return tensor;
  });
  EXPECT_EQ(OfficialCheckpoint::open(path("base")).storage(), Storage::kFp8F32Scales);
  const ConvertReport there = run("base", "bf16", ConvertTarget::kBf16);
  EXPECT_GT(there.rounded, 100) << "a lossy conversion said nothing";
  run("bf16", "back", ConvertTarget::kOfficial);
  const auto before = TensorReader::open(path("base")), after = TensorReader::open(path("back"));
  for (const std::string& name : before.names())
    EXPECT_TRUE(at::equal(before.tensor(name).contiguous().view(at::kByte),
                          after.tensor(name).contiguous().view(at::kByte)))
        << name;
}

TEST_F(Convert, WeightsTrainedFurtherAreRounded) {
  make_official("official");
  run("official", "bf16", ConvertTarget::kBf16);
  rewrite("bf16", "tuned", [](NamedTensor tensor) {
    if (tensor.name == "layers.0.attn.wq_a.weight") tensor.tensor = tensor.tensor * 1.01;
    return tensor;
  });
  const ConvertReport report = run("tuned", "back", ConvertTarget::kOfficial);
  EXPECT_EQ(report.rounded, 1);
  EXPECT_EQ(report.first_rounded, "layers.0.attn.wq_a.weight");
}

TEST_F(Convert, BadInputLeavesNothing) {
  make_official("official");
  const auto refused = [&](const std::string& in, const std::string& out, const char* why) {
    try {
      run(in, out, ConvertTarget::kBf16);
      FAIL() << in;
    } catch (const InputError& error) {
      EXPECT_NE(std::string(error.what()).find(why), std::string::npos) << error.what();
    }
  };
  refused("nowhere", "out", "nowhere");
  refused("official", "official", "exists");
  rewrite("official", "wrong", [](NamedTensor tensor) {
    if (tensor.name == "norm.weight") tensor.name = "normal.weight";
    return tensor;
  });
  refused("wrong", "out", "norm.weight");
  run("official", "hf", ConvertTarget::kHfBf16);
  rewrite("hf", "wrong-hf", [](NamedTensor tensor) {
    if (tensor.name == "model.norm.weight") tensor.name = "model.normal.weight";
    return tensor;
  });
  refused("wrong-hf", "out", "tensors are missing: model.norm.weight");
  EXPECT_THROW(parse_convert_target("gguf"), InputError);
  for (const auto& entry : fs::directory_iterator(base_))
    EXPECT_EQ(entry.path().filename().string().find("out"), std::string::npos) << entry.path();
}

}  // namespace
}  // namespace hadal::checkpoint
