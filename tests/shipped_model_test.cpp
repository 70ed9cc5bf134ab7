// The model that lies in the repository: its files are the ones it was published with, and it
// writes the same text on any number of threads.
#include <cstdlib>
#include <filesystem>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "checkpoint/official.h"
#include "cli_fixture.h"

namespace hadal {
namespace {

const std::string kFolder = std::string(HADAL_SOURCE_DIR) + "/models/hadal-nano";

class ShippedModel : public CliFixture {};

TEST_F(ShippedModel, FilesMatchTheirChecksums) {
  const std::string command = "cd " + kFolder + " && sha256sum --quiet -c SHA256SUMS";
  EXPECT_EQ(std::system(command.c_str()), 0);
  int64_t weights = 0;
  for (const auto& entry : std::filesystem::directory_iterator(kFolder)) {
    if (entry.path().extension() != ".safetensors") continue;
    weights += static_cast<int64_t>(entry.file_size());
    EXPECT_LE(entry.file_size(), 16u << 20) << entry.path();
  }
  EXPECT_LE(weights, 48'000'000);
}

TEST_F(ShippedModel, IsACompleteOfficialCheckpoint) {
  const auto checkpoint = checkpoint::OfficialCheckpoint::open(kFolder);
  EXPECT_EQ(checkpoint.storage(), checkpoint::Storage::kFp4);
  EXPECT_EQ(checkpoint.config().trained_length, 4096);
}

TEST_F(ShippedModel, ContinuesAParagraphAlikeOnAnyNumberOfThreads) {
  const std::string prompt = slurp(kFolder + "/example.txt");
  const std::string arguments =
      "generate --prompt \"" + prompt + "\" --max-tokens 48 --temperature 0.8 --seed 7 --json";
  const CliResult one = run(arguments, "", "taskset -c 0");
  ASSERT_EQ(one.code, 0) << one.error;
  const CliResult all = run(arguments);
  ASSERT_EQ(all.code, 0) << all.error;
  const auto a = nlohmann::json::parse(one.out), b = nlohmann::json::parse(all.out);
  EXPECT_EQ(a["tokens"], b["tokens"]);
  EXPECT_EQ(a["tokens"].size(), 48u);
}

}  // namespace
}  // namespace hadal
