// One checkpoint under every convention that people name tensors by.
#include <filesystem>
#include <functional>
#include <unistd.h>

#include <ATen/ATen.h>

#include <gtest/gtest.h>

#include "base/check.h"
#include "base/file.h"
#include "checkpoint/official.h"
#include "checkpoint/save_model.h"
#include "testing/tiny_model.h"

namespace hadal::checkpoint {
namespace {

namespace fs = std::filesystem;

class NamingTest : public ::testing::Test {
 protected:
  void SetUp() override {
    base_ = ::testing::TempDir() + "hadal-naming-" + std::to_string(getpid());
    fs::remove_all(base_);
    fs::create_directories(base_);
    model::ModelConfig config = testing::small_config();
    config.quantized = true;
    config.expert_dtype = model::ExpertDtype::kFp4;
    save_model(testing::random_model(config, 3, at::kFloat), base_ + "/official", {});
  }
  void TearDown() override { fs::remove_all(base_); }

  std::string renamed(const std::function<std::string(const std::string&)>& rename) const {
    const TensorReader reader = TensorReader::open(base_ + "/official");
    std::vector<NamedTensor> tensors;
    for (const std::string& name : reader.names())
      tensors.push_back(
          {rename(name), reader.tensor(name), reader.info(name).dtype == Dtype::kF8E8M0});
    const std::string folder = base_ + "/renamed";
    fs::create_directories(folder);
    write_safetensors(folder + "/model.safetensors", tensors);
    write_file_atomic(folder + "/config.json", read_file(base_ + "/official/config.json"));
    return folder;
  }
  static std::string error_of(const std::string& folder) {
    try {
      OfficialCheckpoint::open(folder);
    } catch (const InputError& error) {
      return error.what();
    }
    return "no error";
  }
  void expect_same(const std::string& folder, Naming naming) const {
    const auto first = OfficialCheckpoint::open(base_ + "/official");
    const auto other = OfficialCheckpoint::open(folder);
    EXPECT_EQ(other.naming(), naming);
    EXPECT_EQ(other.storage(), first.storage());
    for (const TensorSpec& spec : tensor_table(first.config())) {
      const CheckpointTensor a = first.get(spec.name), b = other.get(spec.name);
      const auto bytes = [](const at::Tensor& x) { return x.contiguous().view(at::kByte); };
      EXPECT_TRUE(at::equal(bytes(a.data), bytes(b.data))) << spec.name;
      if (a.scale.defined()) {
        EXPECT_TRUE(at::equal(a.scale, b.scale)) << spec.name;
      }
    }
  }

  std::string base_;
};

TEST_F(NamingTest, BehindModel) {
  expect_same(renamed([](const std::string& name) { return "model." + name; }), Naming::kPrefixed);
  // The head and the MTP block stand outside of many reposts' "model.".
  expect_same(renamed([](const std::string& name) {
                return name.starts_with("layers.") ? "model." + name : name;
              }),
              Naming::kPrefixed);
}

TEST_F(NamingTest, AsSavePretrainedWrites) {
  expect_same(renamed([](std::string name) {
                if (name == "embed.weight") return std::string("model.embed_tokens.weight");
                if (name == "norm.weight") return std::string("model.norm.weight");
                if (name.starts_with("hc_head_")) return "model.hc_head.hc_" + name.substr(8);
                if (!name.starts_with("layers.")) return name;
                const std::string part = ".attn.kv_norm.";
                if (const size_t at = name.find(part); at != std::string::npos)
                  name.replace(at, part.size(), ".attn.norm.");
                return "model." + name;
              }),
              Naming::kHfSaved);
}

// What transformers 5.24 writes of a model that it had read under its modules' names: the
// compressor keeps them, component by component.
TEST_F(NamingTest, AsSavePretrainedMixesThem) {
  const std::pair<const char*, const char*> pieces[] = {
      {".attn.indexer.compressor.wkv.", ".attn.compressor.indexer.wkv."},
      {".attn.indexer.compressor.wgate.", ".attn.compressor.indexer.gate_proj."},
      {".attn.indexer.compressor.ape", ".attn.compressor.indexer.position_bias"},
      {".attn.indexer.compressor.norm.", ".attn.compressor.indexer.norm."},
      {".attn.indexer.wq_b.", ".attn.compressor.indexer.q_b_proj."},
      {".attn.indexer.weights_proj.", ".attn.compressor.indexer.scorer.weights_proj."},
      {".attn.compressor.wgate.", ".attn.compressor.gate_proj."},
      {".attn.compressor.ape", ".attn.compressor.position_bias"},
      {".attn.kv_norm.", ".attn.norm."}};
  expect_same(renamed([&](std::string name) {
                if (!name.starts_with("layers."))
                  return name == "embed.weight" ? std::string("model.embed_tokens.weight") : name;
                for (const auto& [from, to] : pieces)
                  if (const size_t at = name.find(from); at != std::string::npos) {
                    name.replace(at, std::string(from).size(), to);
                    break;
                  }
                return "model." + name;
              }),
              Naming::kHfSaved);
}

TEST_F(NamingTest, OneTensorUnderTwoNamesIsNamed) {
  const std::string folder = renamed([](const std::string& name) { return name; });
  const TensorReader reader = TensorReader::open(folder);
  std::vector<NamedTensor> tensors;
  for (const std::string& name : reader.names())
    tensors.push_back({name, reader.tensor(name), reader.info(name).dtype == Dtype::kF8E8M0});
  tensors.push_back({"model.layers.0.attn.norm.weight", at::ones({4})});
  const std::string twice = base_ + "/twice";
  fs::create_directories(twice);
  write_safetensors(twice + "/model.safetensors", tensors);
  write_file_atomic(twice + "/config.json", read_file(folder + "/config.json"));
  EXPECT_NE(error_of(twice).find("1 tensors are unexpected: model.layers.0.attn.norm.weight"),
            std::string::npos)
      << error_of(twice);
}

TEST_F(NamingTest, AnUnknownConventionIsOneError) {
  const std::string folder = renamed(
      [](const std::string& name) { return "blk." + std::string(name.rbegin(), name.rend()); });
  const std::string error = error_of(folder);
  EXPECT_NE(error.find("none of them called as a V4's; the first is blk."), std::string::npos)
      << error;
  EXPECT_NE(error.find("model.layers.0.self_attn.q_a_proj.weight"), std::string::npos) << error;
}

}  // namespace
}  // namespace hadal::checkpoint
