#include "model/presets.h"

#include <filesystem>

#include <gtest/gtest.h>

#include "base/check.h"

namespace hadal::model {
namespace {

const std::string kConfigs = HADAL_SOURCE_DIR "/../shared/data/dsv4-goldens/configs";

TEST(Presets, EqualTheOfficialFiles) {
  if (!std::filesystem::exists(kConfigs)) GTEST_SKIP() << "official configs are absent";
  EXPECT_EQ(load_config(kConfigs + "/V4-Flash"), deepseek_v4_flash());
  EXPECT_EQ(load_config(kConfigs + "/V4-Pro"), deepseek_v4_pro());
}

TEST(Presets, AreValidAndServeReleasedNumerics) {
  for (const ModelConfig& config : {deepseek_v4_flash(), deepseek_v4_pro()}) {
    EXPECT_NO_THROW(config.validate());
    EXPECT_NO_THROW(config.check_released());
  }
  EXPECT_EQ(deepseek_v4_flash().kind(1), LayerKind::kWindow);
  EXPECT_EQ(deepseek_v4_pro().kind(1), LayerKind::kHca);
  EXPECT_EQ(deepseek_v4_flash().kind(42), LayerKind::kCsa);
  EXPECT_EQ(deepseek_v4_pro().kind(61), LayerKind::kWindow);
}

}  // namespace
}  // namespace hadal::model
