// The DSpark drafter of V4-0731: counted, checked, kept, and run against recorded outputs.
#include <filesystem>
#include <functional>
#include <unistd.h>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <gtest/gtest.h>

#include "base/check.h"
#include "base/file.h"
#include "checkpoint/convert.h"
#include "checkpoint/load_model.h"
#include "checkpoint/verify.h"
#include "model/presets.h"

namespace hadal::checkpoint {
namespace {

namespace fs = std::filesystem;

const std::string kShared = HADAL_SOURCE_DIR "/../shared";

TEST(Drafter, CensusOfFlash0731) {
  model::ModelConfig config = model::deepseek_v4_flash();
  config.n_mtp_layers = 0;
  config.compress_ratios.pop_back();
  config.drafter = {.n_stages = 3,
                    .block_size = 5,
                    .noise_token_id = 128799,
                    .markov_rank = 256,
                    .target_layers = {40, 41, 42}};
  const Census census = take_census(config, Storage::kFp4);
  EXPECT_EQ(census.total().tensors, 72317);
  EXPECT_EQ(census.total().bytes, 166878536440);
  EXPECT_EQ(census.mtp_total().tensors, 4705);
  EXPECT_EQ(census.mtp_total().bytes, 10862838300);
  EXPECT_EQ(census.mtp_total().parameters, 19845850983);
}

TEST(Drafter, NamesAndShapesOfAPrunedFlash0731) {
  const std::string listing = kShared + "/data/dsv4-goldens/tensor_schema_0731.tsv";
  if (!fs::exists(listing)) GTEST_SKIP() << "the tensor schema is absent";
  model::ModelConfig config =
      model::load_config(kShared + "/data/dsv4-goldens/configs/V4-Flash-0731");
  config.n_routed_experts = 160;  // the listed file is pruned
  std::map<std::string, std::string> ours;
  const auto add = [&](std::string name, const StoredTensor& tensor) {
    const std::string part = ".experts.0.";
    if (const size_t at = name.find(part); at != std::string::npos)
      name.replace(at, part.size(), ".experts.E.");
    std::string shape;
    for (const int64_t size : tensor.shape) shape += concat(shape.empty() ? "" : "x", size);
    ours[name] = concat(dtype_name(tensor.dtype), "\t", shape);
  };
  for (const TensorSpec& spec : tensor_table(config)) {
    if (spec.role == TensorRole::kExpert && spec.name.find(".experts.0.") == std::string::npos)
      continue;
    add(spec.name, stored_weight(spec, Storage::kFp4));
    if (const auto scale = stored_scale(spec, Storage::kFp4)) add(scale_name(spec.name), *scale);
  }
  std::istringstream lines(read_file(listing));
  size_t count = 0;
  for (std::string line; std::getline(lines, line);) {
    if (line.starts_with("#")) continue;
    const size_t name_end = line.find('\t'), shape_end = line.rfind('\t');
    const std::string name = line.substr(0, name_end);
    EXPECT_EQ(ours[name], line.substr(name_end + 1, shape_end - name_end - 1)) << name;
    ++count;
  }
  EXPECT_EQ(count, ours.size());
}

class RecordedDrafter : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    folder_ = concat(kShared, "/golden/", GetParam());
    if (!fs::exists(folder_)) GTEST_SKIP() << GetParam() << " is absent";
    base_ = ::testing::TempDir() + "hadal-drafter-" + std::to_string(getpid());
    fs::remove_all(base_);
    fs::create_directories(base_);
  }
  void TearDown() override { fs::remove_all(base_); }

  /// Of a checkpoint against this recording.
  VerifyOptions options(const std::string& checkpoint) const {
    return {.folder = checkpoint,
            .expected = folder_ + "/expected.safetensors",
            .numerics = {},
            .gradients = false,
            .max_abs = {}};
  }

  /// Message of opening a copy with its tensors and its config changed.
  std::string error_after(const std::function<void(NamedTensor&)>& change,
                          const std::string& from = "",
                          const std::string& to = "") const {
    const TensorReader reader = TensorReader::open(folder_);
    std::vector<NamedTensor> tensors;
    for (const std::string& name : reader.names()) {
      NamedTensor tensor{name, reader.tensor(name), reader.info(name).dtype == Dtype::kF8E8M0};
      change(tensor);
      if (!tensor.name.empty()) tensors.push_back(tensor);
    }
    write_safetensors(base_ + "/model.safetensors", tensors);
    std::string json = read_file(folder_ + "/config.json");
    if (!from.empty()) json.replace(json.find(from), from.size(), to);
    write_file_atomic(base_ + "/config.json", json);
    try {
      OfficialCheckpoint::open(base_);
    } catch (const InputError& error) {
      return error.what();
    }
    return "no error";
  }

  std::string folder_, base_;
};

TEST_P(RecordedDrafter, IsOpenedAndTheMainModelRuns) {
  const auto checkpoint = OfficialCheckpoint::open(folder_);
  EXPECT_EQ(checkpoint.config().drafter.n_stages, 3);
  EXPECT_EQ(checkpoint.config().n_mtp_layers, 0);
  const at::NoGradGuard no_grad;
  const ops::Numerics numerics = default_numerics(checkpoint);
  const model::Transformer model = load_model(checkpoint, numerics);
  const TensorReader expected = TensorReader::open(folder_ + "/expected.safetensors");
  const at::Tensor ids = expected.tensor("prompt.2.input_ids").to(at::kLong);
  const at::Tensor wanted = expected.tensor("prompt.2.main_logits")[0];  // after the prompt
  const int64_t prompt = ids.size(0) - 40;
  const ops::Batch batch({prompt}, {0}, at::kCPU);
  model::ForwardContext context;
  context.batch = &batch;
  context.numerics = numerics;
  const at::Tensor streams = model.forward(ids.narrow(0, 0, prompt), context).streams;
  const at::Tensor logits = model.logits(model.head_input(streams, numerics), numerics)[-1];
  const double error = (logits - wanted).abs().max().item<double>();
  EXPECT_LT(error, numerics == ops::Numerics::kIdeal ? 2e-5 : 0.3);
  EXPECT_EQ(logits.argmax().item<int64_t>(), wanted.argmax().item<int64_t>());
}

TEST_P(RecordedDrafter, ConfigAndTensorsMustAgree) {
  const auto same = [](NamedTensor&) {};
  const auto expect_error = [](const std::string& error, const std::string& message) {
    EXPECT_NE(error.find(message), std::string::npos) << error;
  };
  EXPECT_EQ(error_after(same), "no error");
  EXPECT_EQ(error_after([](NamedTensor& t) {
              if (t.name.starts_with("mtp.")) t.name.clear();
            }),
            "no error");
  expect_error(error_after(same, "\"dspark_block_size\": 5", "\"dspark_block_size\": 0"),
               "compress_ratios has 7 entries");
  expect_error(error_after([](NamedTensor& t) {
                 if (t.name.find("main_proj") != std::string::npos)
                   t.name = t.name.replace(t.name.find("main_proj"), 9, "e_proj");
               }),
               "dspark_block_size 5, a DSpark drafter, but the files hold mtp.0.e_proj.weight");
  expect_error(error_after([](NamedTensor& t) {
                 if (t.name.starts_with("mtp.2.")) t.name.clear();
               }),
               "3 stages of a drafter (compress_ratios), the files hold 2");
  expect_error(error_after([](NamedTensor& t) {
                 if (t.name == "mtp.2.confidence_head.proj.weight") t.name.clear();
               }),
               "1 tensors are missing: mtp.2.confidence_head.proj.weight");
  expect_error(error_after([](NamedTensor& t) {
                 if (t.name == "mtp.2.markov_head.markov_w1.weight") t.tensor = t.tensor.t();
               }),
               "mtp.2.markov_head.markov_w1.weight is BF16 [64, 512], expected BF16 [512, 64]");
}

TEST_P(RecordedDrafter, IsKeptByConversions) {
  const auto first = OfficialCheckpoint::open(folder_);
  convert({.in = folder_, .out = base_ + "/bf16", .target = ConvertTarget::kBf16});
  convert({.in = folder_, .out = base_ + "/hf", .target = ConvertTarget::kHfBf16});
  for (const char* name : {"/bf16", "/hf"}) {
    const auto other = OfficialCheckpoint::open(base_ + name);
    EXPECT_EQ(other.config().drafter, first.config().drafter) << name;
    EXPECT_TRUE(at::equal(other.get("mtp.2.markov_head.markov_w2.weight").data,
                          first.get("mtp.2.markov_head.markov_w2.weight").data));
  }
}

/// Every key of the recording: the drafter alone, the main model, both together.
TEST_P(RecordedDrafter, EveryKeyHolds) {
  int lines = 0, skipped = 0;
  double draft_agreement = 1.0;
  verify(options(folder_), [&](const VerifyLine& line) {
    ++lines;
    skipped += line.skipped ? 1 : 0;
    EXPECT_TRUE(line.pass) << line.key << ": max " << line.max << ", mean " << line.mean << " "
                           << line.note;
    if (line.key.ends_with(".draft"))
      draft_agreement = std::min(draft_agreement, line.agreement.value());
  });
  EXPECT_EQ(lines, 125);
  // A token of the main model's text is a near tie in one of the five of `released`.
  EXPECT_EQ(skipped, std::string(GetParam()) == "dspark-ideal" ? 0 : 2);
  EXPECT_EQ(draft_agreement, 1.0);
}

// A check that cannot fail checks nothing: each part's first key to differ.
TEST_P(RecordedDrafter, ABrokenWeightFails) {
  const std::map<std::string, std::string> parts = {
      {"mtp.0.main_norm.weight", "record.main_x"},
      {"mtp.1.attn.kv_norm.weight", "record.stage.1.main_kv"},
      {"mtp.0.attn.attn_sink", "record.base_logits"},
      {"mtp.2.ffn.gate.weight", "record.base_logits"},
      {"mtp.2.hc_head_base", "record.base_logits"},
      {"mtp.2.norm.weight", "record.base_logits"},
      {"mtp.2.markov_head.markov_w2.weight", "draft"},
  };
  for (const auto& [name, key] : parts) {
    const auto negate = [&, name = name](NamedTensor& t) {
      if (t.name == name) t.tensor = t.tensor.neg();
    };
    EXPECT_EQ(error_after(negate), "no error");
    struct Found {
      bool pass;
    };
    try {
      verify(options(base_), [&, key = key](const VerifyLine& line) {
        if (line.key == "prompt.0." + key) throw Found{line.pass};
      });
      ADD_FAILURE() << name << ": no " << key;
    } catch (const Found& found) {
      EXPECT_FALSE(found.pass) << name << ": " << key;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Golden,
                         RecordedDrafter,
                         ::testing::Values("dspark-ideal", "dspark-fp8"),
                         [](const auto& param_info) {
                           std::string name = param_info.param;
                           name[6] = '_';
                           return name;
                         });

}  // namespace
}  // namespace hadal::checkpoint
