#include "engine_core/answer/generation_defaults.h"

#include <filesystem>
#include <fstream>
#include <unistd.h>

#include <gtest/gtest.h>

#include "base/check.h"

namespace hadal::engine_core {
namespace {

TEST(GenerationDefaults, AreWhatTheFileSays) {
  const GenerationDefaults read = parse_generation_defaults(
      R"({"_from_model_config": true, "bos_token_id": 0, "temperature": 0.7, "top_p": 0.9,
          "top_k": 40, "min_p": 0.05, "repetition_penalty": 1.1, "max_new_tokens": 1024,
          "thinking": false, "transformers_version": "5.17"})",
      "f");
  EXPECT_EQ(read.sampling.temperature, 0.7);
  EXPECT_EQ(read.sampling.top_p, 0.9);
  EXPECT_EQ(read.sampling.top_k, 40);
  EXPECT_EQ(read.sampling.min_p, 0.05);
  EXPECT_EQ(read.sampling.repetition_penalty, 1.1);
  EXPECT_EQ(read.max_tokens, 1024);
  EXPECT_FALSE(read.thinking);
}

TEST(GenerationDefaults, WhatIsNotSaidIsThePlainChoice) {
  for (const char* text : {"{}", R"({"temperature": null, "top_p": null, "thinking": null})"}) {
    const GenerationDefaults read = parse_generation_defaults(text, "f");
    EXPECT_EQ(read.sampling.temperature, 1.0);
    EXPECT_EQ(read.sampling.top_p, 1.0);
    EXPECT_EQ(read.sampling.top_k, 0);
    EXPECT_EQ(read.max_tokens, 0);
    EXPECT_TRUE(read.thinking);
  }
  EXPECT_EQ(parse_generation_defaults(R"({"do_sample": false, "temperature": 0.6})", "f")
                .sampling.temperature,
            0.0);
}

TEST(GenerationDefaults, WhatCannotBeMeantIsRefusedByName) {
  const std::pair<const char*, const char*> cases[] = {
      {"[]", "f: expected a JSON object"},
      {"{", "f: expected a JSON object"},
      {R"({"temperature": "hot"})", "f: temperature: expected a number from 0 to 2, found \"hot\""},
      {R"({"temperature": 3})", "found 3"},
      {R"({"top_p": 0})", "top_p"},
      {R"({"top_k": 1.5})", "top_k: expected a whole number"},
      {R"({"max_new_tokens": -1})", "max_new_tokens"},
      {R"({"thinking": "no"})", "thinking: expected true or false"},
  };
  for (const auto& [text, why] : cases) {
    try {
      parse_generation_defaults(text, "f");
      FAIL() << text;
    } catch (const InputError& error) {
      EXPECT_NE(std::string(error.what()).find(why), std::string::npos) << error.what();
    }
  }
}

TEST(GenerationDefaults, AFolderWithoutTheFileHasThePlainOnesAndADamagedFileIsNamed) {
  namespace fs = std::filesystem;
  const fs::path folder =
      fs::temp_directory_path() / ("hadal_defaults_" + std::to_string(getpid()));
  fs::create_directories(folder);
  EXPECT_TRUE(load_generation_defaults(folder).thinking);
  std::ofstream(folder / "generation_config.json") << R"({"thinking": false})";
  EXPECT_FALSE(load_generation_defaults(folder).thinking);
  fs::remove(folder / "generation_config.json");
  fs::create_symlink("generation_config.json", folder / "generation_config.json");
  EXPECT_THROW(load_generation_defaults(folder), InputError);
  fs::remove_all(folder);
}

}  // namespace
}  // namespace hadal::engine_core
