#include "checkpoint/official.h"

#include <filesystem>
#include <functional>

#include <ATen/ATen.h>

#include <gtest/gtest.h>

#include "base/check.h"

namespace hadal::checkpoint {
namespace {

namespace fs = std::filesystem;
using Tensors = std::vector<NamedTensor>;

const std::string kGolden = HADAL_SOURCE_DIR "/../shared/golden";

class OfficialTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!fs::exists(kGolden)) GTEST_SKIP() << "golden is absent";
    std::string name = (fs::temp_directory_path() / "hadal-official-XXXXXX").string();
    root_ = ::mkdtemp(name.data());
  }
  void TearDown() override { fs::remove_all(root_); }

  /// Message of opening a copy of golden/fp8-fp4 with its tensors changed.
  std::string error_after(const std::function<void(Tensors&)>& change) {
    const TensorReader reader = TensorReader::open(kGolden + "/fp8-fp4");
    Tensors tensors;
    for (const std::string& name : reader.names())
      tensors.push_back({name, reader.tensor(name), reader.info(name).dtype == Dtype::kF8E8M0});
    change(tensors);
    fs::copy_file(kGolden + "/fp8-fp4/config.json", root_ / "config.json",
                  fs::copy_options::overwrite_existing);
    write_safetensors((root_ / "model.safetensors").string(), tensors);
    try {
      OfficialCheckpoint::open(root_.string());
    } catch (const InputError& error) {
      return error.what();
    }
    return "no error";
  }
  static NamedTensor& find(Tensors& tensors, const std::string& name) {
    for (NamedTensor& item : tensors)
      if (item.name == name) return item;
    throw Error("no tensor " + name);
  }
  fs::path root_;
};

void expect_contains(const std::string& text, const std::string& part) {
  EXPECT_NE(text.find(part), std::string::npos) << text;
}

TEST_F(OfficialTest, GoldenFoldersAreValid) {
  const auto ideal = OfficialCheckpoint::open(kGolden + "/ideal-f32");
  EXPECT_EQ(ideal.storage(), Storage::kBf16);
  EXPECT_FALSE(ideal.get("layers.0.attn.wq_a.weight").scale.defined());
  const auto fp4 = OfficialCheckpoint::open(kGolden + "/fp8-fp4");
  EXPECT_EQ(fp4.storage(), Storage::kFp4);
  EXPECT_TRUE(fp4.get("layers.0.attn.wq_a.weight").scale.defined());
  EXPECT_FALSE(fp4.get("norm.weight").scale.defined());
}

TEST_F(OfficialTest, TinyCheckpointHasNoMtpBlock) {
  const std::string tiny = HADAL_SOURCE_DIR "/../shared/data/dsv4-goldens/tiny-ckpt";
  if (!fs::exists(tiny)) GTEST_SKIP() << "tiny-ckpt is absent";
  EXPECT_EQ(OfficialCheckpoint::open(tiny).config().n_mtp_layers, 0);
}

TEST_F(OfficialTest, AcceptedSpellings) {
  EXPECT_EQ(error_after([](Tensors& tensors) {
              for (NamedTensor& item : tensors) {
                if (!item.name.ends_with(".scale")) continue;
                item.name = item.name.substr(0, item.name.size() - 5) + "weight_scale_inv";
                item.e8m0 = false;  // stored as U8
              }
              tensors.push_back({"mtp.0.head.weight", at::zeros({1})});
              tensors.push_back({"mtp.0.emb.tok_emb.weight", at::zeros({1})});
            }),
            "no error");
}

TEST_F(OfficialTest, MissingAndUnexpectedTensorsAreListedUpToTwenty) {
  expect_contains(error_after([](Tensors& t) { find(t, "norm.weight").name = "norm2.weight"; }),
                  "1 tensors are missing: norm.weight");
  const std::string many = error_after([](Tensors& tensors) {
    for (int i = 10; i < 40; ++i) tensors.push_back({concat("extra.", i), at::zeros({1})});
  });
  expect_contains(many, "30 tensors are unexpected: extra.10; ");
  expect_contains(many, "extra.29; ...");
  EXPECT_EQ(many.find("extra.30"), std::string::npos) << many;
}

TEST_F(OfficialTest, WrongShapesTypesAndValues) {
  expect_contains(
      error_after([](Tensors& t) { find(t, "norm.weight").tensor = at::ones({3}, at::kBFloat16); }),
      "norm.weight is BF16 [3], expected BF16 [256]");
  expect_contains(error_after([](Tensors& t) { find(t, "norm.weight").tensor = at::ones({256}); }),
                  "norm.weight is F32 [256], expected BF16 [256]");
  expect_contains(error_after([](Tensors& t) {
                    at::Tensor& s = find(t, "layers.1.attn.wq_a.scale").tensor;
                    s = s.clone();
                    s.view(-1)[0] = 255;
                  }),
                  "1 scales hold NaN or infinity: layers.1.attn.wq_a.scale");
  const auto with_experts = [&](int64_t a, int64_t b) {
    return error_after([&](Tensors& t) {
      at::Tensor& ids = find(t, "layers.0.ffn.gate.tid2eid").tensor;
      ids = ids.clone();
      ids[5][0] = a;
      ids[5][1] = b;
    });
  };
  EXPECT_EQ(with_experts(0, 7), "no error");
  expect_contains(with_experts(0, 8), "token 5 has expert 8 of 8");
  expect_contains(with_experts(-1, 0), "token 5 has expert -1");
  expect_contains(with_experts(3, 3), "token 5 has expert 3 twice");
}

}  // namespace
}  // namespace hadal::checkpoint
