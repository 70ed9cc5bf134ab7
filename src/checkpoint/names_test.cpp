#include "checkpoint/names.h"

#include <filesystem>
#include <fstream>
#include <map>
#include <set>
#include <sstream>

#include <gtest/gtest.h>

#include "base/check.h"
#include "checkpoint/safetensors.h"
#include "model/presets.h"

namespace hadal::checkpoint {
namespace {

const std::string kShared = HADAL_SOURCE_DIR "/../shared";

// Those of the released models.
TEST(Census, FlashAsPublished) {
  const Census census = take_census(model::deepseek_v4_flash(), Storage::kFp4);
  EXPECT_EQ(census.total().tensors, 69187);
  EXPECT_EQ(census.mtp_total().tensors, 1575);
  EXPECT_EQ(census.total().bytes, 159609485896);
  EXPECT_EQ(census.main_total().parameters, 284332240471);
  EXPECT_EQ(census.mtp_total().parameters, 6610048891);
  EXPECT_EQ(census.active, 13799632471);
  EXPECT_EQ(census.active_without_embedding, 13270101591);
}

TEST(Census, ProAsPublished) {
  const Census census = take_census(model::deepseek_v4_pro(), Storage::kFp4);
  EXPECT_EQ(census.total().tensors, 145116);
  EXPECT_EQ(census.total().bytes, 864704792696);
  EXPECT_EQ(census.main_total().parameters, 1572997201763);
  EXPECT_EQ(census.mtp_total().parameters, 25840145979);
  EXPECT_EQ(census.active, 49779081059);
  EXPECT_EQ(census.active_without_embedding, 48852402019);
}

/// Name -> "DTYPE shape" of every tensor in a file with this storage.
std::map<std::string, std::string> expected_files(const model::ModelConfig& config,
                                                  Storage storage) {
  const auto text = [](const StoredTensor& t) {
    return concat(dtype_name(t.dtype), " ", shape_text(t.shape));
  };
  std::map<std::string, std::string> result;
  for (const TensorSpec& spec : tensor_table(config)) {
    result[spec.name] = text(stored_weight(spec, storage));
    if (const auto scale = stored_scale(spec, storage))
      result[scale_name(spec.name)] = text(*scale);
  }
  return result;
}

TEST(TensorTable, EqualsTheGoldenFiles) {
  if (!std::filesystem::exists(kShared + "/golden")) GTEST_SKIP() << "golden is absent";
  for (const char* name : {"golden/ideal-f32", "golden/fp8-fp4", "golden/fp8-fp4-smooth",
                           "data/dsv4-goldens/tiny-ckpt"}) {
    const std::string folder = concat(kShared, "/", name);
    if (!std::filesystem::exists(folder)) continue;
    const model::ModelConfig config = model::load_config(folder);
    const TensorReader reader = TensorReader::open(folder);
    std::map<std::string, std::string> found;
    for (const std::string& tensor : reader.names())
      found[tensor] =
          concat(dtype_name(reader.info(tensor).dtype), " ", shape_text(reader.info(tensor).shape));
    auto expected = expected_files(config, storage_of(config));
    // The tiny checkpoint's config names an MTP block that its file does not hold.
    if (!found.contains("mtp.0.norm.weight"))
      std::erase_if(expected, [](const auto& item) { return item.first.starts_with("mtp."); });
    EXPECT_EQ(found.contains("mtp.0.norm.weight"),
              std::string(name).find("tiny") == std::string::npos);
    EXPECT_EQ(found, expected) << name;
  }
}

TEST(TensorTable, EqualsARealCheckpointsMainModel) {
  std::ifstream file(kShared + "/data/dsv4-goldens/tensor_schema_0731.tsv");
  if (!file) GTEST_SKIP() << "tensor_schema_0731.tsv is absent";
  // That checkpoint keeps 160 of 256 experts, and its draft blocks are another variant.
  model::ModelConfig config = model::deepseek_v4_flash();
  config.n_routed_experts = 160;
  auto expected = expected_files(config, Storage::kFp4);
  std::erase_if(expected, [](const auto& item) { return item.first.starts_with("mtp."); });
  std::map<std::string, std::string> found;
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with("#") || line.starts_with("mtp.")) continue;
    std::istringstream fields(line);
    std::string name, dtype, shape, count;
    fields >> name >> dtype >> shape >> count;
    std::string list = "[";
    for (const char c : shape) list += c == 'x' ? std::string(", ") : std::string(1, c);
    const size_t at = name.find("experts.E.");
    for (int expert = 0; expert < std::stoi(count); ++expert) {
      std::string full = name;
      if (at != std::string::npos) full.replace(at, 9, concat("experts.", expert));
      found[full] = concat(dtype, " ", list, "]");
    }
  }
  EXPECT_EQ(found.size(), expected.size());
  EXPECT_EQ(found, expected);
}

TEST(TensorTable, NamesAreUnique) {
  std::set<std::string> names;
  for (const TensorSpec& spec : tensor_table(model::deepseek_v4_flash()))
    EXPECT_TRUE(names.insert(spec.name).second) << spec.name;
}

}  // namespace
}  // namespace hadal::checkpoint
