// Reasoning effort as the encoders of the two checkpoints have it.
#include <fstream>
#include <optional>

#include <gtest/gtest.h>

#include "base/check.h"
#include "text/chat_format.h"
#include "text/tokenizer.h"

namespace hadal::text {
namespace {

const std::string kData = HADAL_SOURCE_DIR "/../shared/data/";

std::string prompt(EffortLevels levels, const std::string& effort) {
  ChatOptions options;
  options.levels = levels;
  options.effort = parse_reasoning_effort(effort, levels);
  return encode_chat(PyJson::parse(R"([{"role": "user", "content": "Hello!"}])", "test"), options);
}

TEST(EffortLevels, APreviewsMaxIsTheHighOf0731) {
  EXPECT_EQ(prompt(EffortLevels::kPreview, "max"), prompt(EffortLevels::k0731, "high"));
  EXPECT_EQ(prompt(EffortLevels::kPreview, "high"), prompt(EffortLevels::k0731, "low"));
  EXPECT_EQ(prompt(EffortLevels::kPreview, ""), prompt(EffortLevels::k0731, ""));
  EXPECT_NE(prompt(EffortLevels::k0731, "max"), prompt(EffortLevels::k0731, "high"));
}

TEST(EffortLevels, NamesOfTheEncoders) {
  EXPECT_THROW(parse_reasoning_effort("low", EffortLevels::kPreview), InputError);
  EXPECT_THROW(parse_reasoning_effort("none", EffortLevels::k0731), InputError);
  EXPECT_EQ(parse_effort_levels("0731"), EffortLevels::k0731);
  EXPECT_EQ(parse_effort_levels("preview"), EffortLevels::kPreview);
  EXPECT_THROW(parse_effort_levels("0813"), InputError);
}

/// The field of a recorded case, or what stands for its absence.
bool flag_of(const PyJson& item, const char* key, bool absent) {
  const PyJson* found = item.find_set(key);
  return found == nullptr ? absent : found->truthy();
}

TEST(EffortLevels, RecordedPromptsOf0731) {
  std::ifstream file(kData + "dsv4-encoding-0731/effort_cases.jsonl");
  if (!file.good()) GTEST_SKIP() << "the recorded cases are absent";
  const Tokenizer tokenizer = Tokenizer::from_file(kData + "deepseek-v4-tokenizer/tokenizer.json");
  int cases = 0, errors = 0;
  for (std::string line; std::getline(file, line);) {
    const PyJson item = PyJson::parse(line, "effort_cases.jsonl");
    const std::string name = item.find("name")->text();
    const PyJson* effort = item.find_set("reasoning_effort");
    ++cases;
    std::string made;
    try {
      ChatOptions options;
      options.levels = EffortLevels::k0731;
      options.thinking_mode = parse_thinking_mode(item.find("thinking_mode")->text());
      options.effort =
          parse_reasoning_effort(effort == nullptr ? "" : effort->text(), EffortLevels::k0731);
      options.drop_thinking = flag_of(item, "drop_thinking", true);
      options.add_bos = flag_of(item, "add_default_bos_token", true);
      const PyJson* context = item.find_set("context");
      made = encode_chat(*item.find("messages"), options,
                         context == nullptr ? PyJson::array() : *context);
    } catch (const InputError&) {
      EXPECT_NE(item.find("error"), nullptr) << name;
      ++errors;
      continue;
    }
    ASSERT_NE(item.find("prompt"), nullptr) << name;
    EXPECT_EQ(made, item.find("prompt")->text()) << name;
    const auto ids = tokenizer.encode(made, SpecialTokens::kRecognise);
    EXPECT_EQ(std::to_string(ids.size()), item.find("tokens")->dump()) << name;
    if (name == "hello-thinking-low") {
      EXPECT_EQ(ids.size(), 6u);
    }
    if (name == "hello-thinking-high") {
      EXPECT_EQ(ids.size(), 85u);
    }
    if (name == "hello-thinking-max") {
      EXPECT_EQ(ids.size(), 98u);
    }
  }
  EXPECT_EQ(cases, 32);
  EXPECT_EQ(errors, 6);
}

}  // namespace
}  // namespace hadal::text
