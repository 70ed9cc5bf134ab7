#include "checkpoint/safetensors.h"

#include <cstring>
#include <filesystem>

#include <ATen/ATen.h>

#include <gtest/gtest.h>

#include "base/check.h"

namespace hadal::checkpoint {
namespace {

namespace fs = std::filesystem;

class SafetensorsTest : public ::testing::Test {
 protected:
  SafetensorsTest() {
    std::string name = (fs::temp_directory_path() / "hadal-tensors-XXXXXX").string();
    root_ = ::mkdtemp(name.data());
  }
  ~SafetensorsTest() override { fs::remove_all(root_); }
  std::string path(const std::string& name) const { return (root_ / name).string(); }
  fs::path root_;
};

/// Same type, shape and bits.
void expect_same(const at::Tensor& a, const at::Tensor& b) {
  ASSERT_EQ(a.scalar_type(), b.scalar_type());
  ASSERT_EQ(a.sizes(), b.sizes());
  const at::Tensor x = a.contiguous(), y = b.contiguous();
  EXPECT_EQ(std::memcmp(x.const_data_ptr(), y.const_data_ptr(), x.nbytes()), 0);
}

TEST_F(SafetensorsTest, EveryTypeReadsBackBitForBit) {
  const at::Tensor bytes = at::arange(256, at::kByte);
  std::vector<NamedTensor> tensors;
  for (const auto type : {at::kChar, at::kByte, at::kFloat8_e4m3fn, at::kBFloat16, at::kHalf,
                          at::kFloat, at::kInt, at::kLong, at::kDouble})
    tensors.push_back({c10::toString(type), bytes.view(type)});
  tensors.push_back({"strided", at::arange(12, at::kFloat).view({3, 4}).t()});
  tensors.push_back({"scalar", at::scalar_tensor(2.5)});
  tensors.push_back({"empty", at::empty({0, 3})});
  write_safetensors(path("x"), tensors);
  const TensorReader reader = TensorReader::open(path("x"));
  EXPECT_EQ(reader.names().size(), tensors.size());
  for (const NamedTensor& item : tensors) expect_same(reader.tensor(item.name), item.tensor);
}

TEST_F(SafetensorsTest, ScalesAreBytesWithTheirOwnTypeInTheFile) {
  const at::Tensor bytes = at::arange(256, at::kByte);
  write_safetensors(path("x"), std::vector<NamedTensor>{{"s", bytes, true}, {"u", bytes, false}});
  const TensorReader reader = TensorReader::open(path("x"));
  EXPECT_EQ(reader.info("s").dtype, Dtype::kF8E8M0);
  EXPECT_EQ(reader.info("u").dtype, Dtype::kU8);
  expect_same(reader.tensor("s"), bytes);
}

TEST_F(SafetensorsTest, TensorsOutliveTheReader) {
  write_safetensors(path("x"), {{"a", at::arange(5, at::kFloat)}});
  const at::Tensor a = TensorReader::open(path("x")).tensor("a");
  fs::remove(path("x"));
  EXPECT_EQ(a.sum().item<float>(), 10.0f);
}

TEST_F(SafetensorsTest, ShardsAndSingleFileHoldTheSame) {
  for (const int64_t max_bytes : {int64_t{1}, int64_t{100}, int64_t{1} << 30}) {
    const std::string folder = path(std::to_string(max_bytes));
    fs::create_directory(folder);
    ShardWriter writer(folder, max_bytes);
    for (int i = 0; i < 7; ++i)
      writer.add({"t" + std::to_string(i), at::full({i + 1, 3}, i, at::kFloat), false});
    writer.finish();
    const TensorReader reader = TensorReader::open(folder);
    EXPECT_EQ(reader.files().size(), max_bytes == 1 ? 7u : max_bytes == 100 ? 5u : 1u);
    ASSERT_EQ(reader.names().size(), 7u);
    for (int i = 0; i < 7; ++i)
      expect_same(reader.tensor("t" + std::to_string(i)), at::full({i + 1, 3}, i, at::kFloat));
  }
}

// What a run on several ranks saves is what one rank saves.
TEST_F(SafetensorsTest, AFileThatSeveralWriteIsTheFileOfOne) {
  const std::vector<NamedTensor> all = {{"bytes", at::arange(7, at::kByte)},
                                        {"a", at::arange(12, at::kFloat).view({3, 4}).t()},
                                        {"b", at::arange(5, at::kFloat)},
                                        {"wide", at::arange(3, at::kLong)},
                                        {"empty", at::empty({0, 3})}};
  write_safetensors(path("one"), all);
  create_safetensors(path("many"), all);
  for (size_t writer = 0; writer < 2; ++writer) {
    std::vector<NamedTensor> own = all;
    for (size_t i = 0; i < own.size(); ++i)
      if (i % 2 != writer) own[i].tensor = own[i].tensor.to(at::kMeta);
    fill_safetensors(path("many"), own);
  }
  EXPECT_EQ(read_file(path("many")), read_file(path("one")));
  EXPECT_THROW(create_safetensors(path("many"), all), InputError);
  EXPECT_THROW(fill_safetensors(path("absent"), all), InputError);
}

TEST_F(SafetensorsTest, IndexAndShardsMustAgree) {
  ShardWriter writer(root_.string(), 1);
  writer.add({"a", at::zeros({2}), false});
  writer.add({"b", at::zeros({2}), false});
  writer.finish();
  ASSERT_NO_THROW(TensorReader::open(root_.string()));
  const std::string index = path("model.safetensors.index.json");
  const std::string good = read_file(index);
  const auto error_with = [&](const std::string& from, const std::string& to) -> std::string {
    std::string text = good;
    write_file_atomic(index, text.replace(text.find(from), from.size(), to));
    try {
      TensorReader::open(root_.string());
    } catch (const InputError& error) {
      return error.what();
    }
    return "no error";
  };
  const std::string renamed = error_with("\"a\"", "\"c\"");
  EXPECT_NE(renamed.find("disagree on 2 tensors: c (not in model-00001"), std::string::npos)
      << renamed;
  EXPECT_NE(renamed.find("a (not in the index)"), std::string::npos) << renamed;
  EXPECT_NE(error_with("00001-of", "00003-of").find("cannot open"), std::string::npos);
  EXPECT_NE(error_with("model-00001", "../model-00001").find("no file name"), std::string::npos);
  EXPECT_NE(error_with("weight_map", "map").find("weight_map: required"), std::string::npos);
}

TEST_F(SafetensorsTest, ErrorsNameWhatIsMissing) {
  EXPECT_THROW(TensorReader::open(root_.string()), InputError);
  EXPECT_THROW(TensorReader::open(path("none.safetensors")), InputError);
  write_safetensors(path("x"), {{"a", at::zeros({1})}});
  EXPECT_THROW(TensorReader::open(path("x")).tensor("b"), InputError);
  EXPECT_THROW(write_safetensors(path("y"), {{"c", at::zeros({1}, at::kComplexFloat)}}), Error);
  EXPECT_FALSE(fs::exists(path("y")));
}

TEST_F(SafetensorsTest, MisalignedTensorsAreRead) {
  const at::Tensor data = at::arange(4, at::kFloat);
  const std::string json = R"({"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}})";
  for (size_t pad = 0; pad < 4; ++pad) {
    std::string file(8, '\0');
    file[0] = static_cast<char>(json.size() + pad);
    file += json + std::string(pad, ' ');
    file.append(static_cast<const char*>(data.const_data_ptr()), 16);
    write_file_atomic(path("x"), file);
    expect_same(TensorReader::open(path("x")).tensor("a"), data);
  }
}

TEST_F(SafetensorsTest, GoldenCheckpointsAreReadable) {
  const std::string golden = HADAL_SOURCE_DIR "/../shared/golden";
  if (!fs::exists(golden)) GTEST_SKIP() << "golden is absent";
  const TensorReader reader = TensorReader::open(golden + "/fp8-fp4");
  EXPECT_EQ(reader.tensor("embed.weight").scalar_type(), at::kBFloat16);
  EXPECT_EQ(reader.tensor("layers.0.attn.wq_a.weight").scalar_type(), at::kFloat8_e4m3fn);
  EXPECT_EQ(reader.tensor("layers.0.ffn.experts.0.w1.weight").scalar_type(), at::kChar);
  EXPECT_EQ(reader.tensor("layers.0.ffn.experts.0.w1.scale").scalar_type(), at::kByte);
  EXPECT_EQ(reader.tensor("layers.0.ffn.gate.tid2eid").scalar_type(), at::kLong);
}

}  // namespace
}  // namespace hadal::checkpoint
