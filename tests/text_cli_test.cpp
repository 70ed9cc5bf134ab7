// The text subcommands as other programs call them: input and output to the byte, exit codes.
#include <algorithm>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "cli_fixture.h"

namespace hadal {
namespace {

using Json = nlohmann::json;

const std::string kShared = HADAL_SOURCE_DIR "/../shared/data/";
const std::string kTokenizer = kShared + "deepseek-v4-tokenizer/tokenizer.json";
const std::string kEos = "<\uff5cend\u2581of\u2581sentence\uff5c>";

using Result = CliResult;
using TextCli = CliFixture;

#define NEED_DATA(path) \
  if (!std::filesystem::exists(path)) GTEST_SKIP() << "absent: " << (path)

TEST_F(TextCli, TokenizeAndDetokenizeLines) {
  NEED_DATA(kTokenizer);
  const std::string vectors = kShared + "deepseek-v4-tokenizer/golden_encode.jsonl";
  const Result ids = run("tokenize --jsonl --tokenizer " + kTokenizer + " " + vectors, "");
  ASSERT_EQ(ids.code, 0) << ids.error;
  const Result texts = run("detokenize --jsonl --tokenizer " + kTokenizer, ids.out);
  ASSERT_EQ(texts.code, 0) << texts.error;
  std::ifstream expected(vectors);
  std::istringstream found_ids(ids.out);
  std::istringstream found_texts(texts.out);
  std::string line;
  int count = 0;
  while (std::getline(expected, line)) {
    const Json vector = Json::parse(line);
    ASSERT_TRUE(std::getline(found_ids, line));
    ASSERT_EQ(Json::parse(line), (Json{{"ids", vector["ids"]}}));
    ASSERT_TRUE(std::getline(found_texts, line));
    ASSERT_EQ(Json::parse(line), (Json{{"text", vector["text"]}}));
    ++count;
  }
  EXPECT_EQ(count, 688);
  EXPECT_FALSE(std::getline(found_ids, line));
}

TEST_F(TextCli, TokenizePlainText) {
  NEED_DATA(kTokenizer);
  EXPECT_EQ(run("tokenize --tokenizer " + kTokenizer, "Hello!").out, "19923 3\n");
  EXPECT_EQ(run("detokenize --tokenizer " + kTokenizer, " 19923,\n3 ").out, "Hello!");
  EXPECT_EQ(run("tokenize --tokenizer " + kTokenizer, "<think>").out, "128821\n");
  EXPECT_NE(run("tokenize --as-text --tokenizer " + kTokenizer, "<think>").out, "128821\n");
  const Result bad = run("detokenize --tokenizer " + kTokenizer, "1 129280");
  EXPECT_EQ(bad.code, 2);
  EXPECT_EQ(bad.out, "");
  EXPECT_NE(bad.error.find("id 129280 is outside the vocabulary of 129280"), std::string::npos)
      << bad.error;
  EXPECT_EQ(run("detokenize --tokenizer " + kTokenizer, "1x").code, 2);
  const Result line =
      run("tokenize --jsonl --tokenizer " + kTokenizer, "{\"text\": \"a\"}\n{\"text\": 1}\n");
  EXPECT_EQ(line.code, 2);
  EXPECT_NE(line.error.find("line 2"), std::string::npos) << line.error;
}

TEST_F(TextCli, ChatEncodeGivesTheOfficialPrompts) {
  const std::string folder = kShared + "dsv4-encoding-tests/";
  NEED_DATA(folder);
  for (int i = 1; i <= 4; ++i) {
    const std::string stem = folder + "test_input_" + std::to_string(i) + ".json";
    const Result result = run(
        std::string("chat-encode --thinking-mode ") + (i == 4 ? "chat" : "thinking"), slurp(stem));
    EXPECT_EQ(result.code, 0) << result.error;
    EXPECT_EQ(result.out, slurp(folder + "test_output_" + std::to_string(i) + ".txt"));
  }
}

TEST_F(TextCli, ChatEncodeOptions) {
  const std::string messages =
      R"([{"role":"user","content":"a"},{"role":"assistant","content":"b","reasoning_content":"r"},
          {"role":"user","content":"c"}])";
  const std::string kept =
      run("chat-encode --thinking-mode thinking --drop-thinking no", messages).out;
  const std::string dropped =
      run("chat-encode --thinking-mode thinking --drop-thinking yes", messages).out;
  EXPECT_NE(kept.find("<think>r</think>b"), std::string::npos);
  EXPECT_EQ(dropped.find("<think>r"), std::string::npos);
  EXPECT_EQ(run("chat-encode --thinking-mode thinking", messages).out, dropped);
  EXPECT_EQ(run("chat-encode --thinking-mode thinking --effort high", messages).out, dropped);
  EXPECT_EQ(run("chat-encode --thinking-mode thinking --effort max", messages).out.size(),
            dropped.size() + 476);
  EXPECT_EQ(run("chat-encode --effort low", messages).code, 2);
  EXPECT_EQ(run("chat-encode", "[{\"role\":\"user\"}]").code, 2);
  EXPECT_EQ(run("chat-encode", "no json").code, 2);
}

TEST_F(TextCli, ChatParse) {
  const Result good = run("chat-parse --thinking-mode thinking", "why</think>so" + kEos);
  EXPECT_EQ(good.code, 0);
  EXPECT_EQ(Json::parse(good.out), (Json{{"role", "assistant"},
                                         {"content", "so"},
                                         {"reasoning_content", "why"},
                                         {"tool_calls", Json::array()}}));
  const Result bad = run("chat-parse --thinking-mode chat", "no end");
  EXPECT_EQ(bad.code, 1);
  EXPECT_TRUE(Json::parse(bad.out).contains("error"));
  // Complete calls are printed whatever their shape, with what is wrong beside them.
  const std::string mark = "\uff5cDSML\uff5c";
  const auto call = [&](const std::string& name) {
    return "<" + mark + "invoke name=\"" + name + "\"><" + mark +
           "parameter string=\"true\" name=\"a\">x</" + mark + "parameter></" + mark + "invoke>";
  };
  const Result loose = run("chat-parse --thinking-mode chat", "c\n" + call("f") + "\n" + kEos);
  EXPECT_EQ(loose.code, 0);
  EXPECT_EQ(Json::parse(loose.out)["tool_calls"][0]["function"]["arguments"], "{\"a\": \"x\"}");
  EXPECT_TRUE(Json::parse(loose.out).contains("error"));
  const Result half = run("chat-parse --thinking-mode chat",
                          "c\n<" + mark + "invoke name=\"g\">\n" + call("f") + kEos);
  EXPECT_EQ(half.code, 1);
  EXPECT_EQ(Json::parse(half.out)["tool_calls"].size(), 1u);
  EXPECT_EQ(run("chat-parse --thinking-mode loud", "x").code, 2);
  EXPECT_EQ(run("chat-parse /nonexistent", "").code, 2);
}

TEST_F(TextCli, TokenizerCutWritesAFileThatTokenizes) {
  NEED_DATA(kTokenizer);
  std::string text;
  for (int i = 0; i < 20; ++i) text += "The whale and the sea and the ship. ";
  const std::string input = write("text", text);
  const std::string out = folder_ / "small.json";
  const Result cut = run("tokenizer-cut --tokenizer " + kTokenizer +
                             " --vocab-size 280 --min-count 5 --out " + out + " " + input,
                         "");
  ASSERT_EQ(cut.code, 0) << cut.error;
  const Result ids = run("tokenize --tokenizer " + out, text);
  ASSERT_EQ(ids.code, 0) << ids.error;
  EXPECT_EQ(run("detokenize --tokenizer " + out, ids.out).out, text);
  EXPECT_LT(std::count(ids.out.begin(), ids.out.end(), ' '),
            static_cast<long>(text.size() * 3 / 4));
  EXPECT_EQ(run("tokenizer-cut --tokenizer " + kTokenizer + " --vocab-size 9999 --out " + out +
                    "x " + input,
                "")
                .code,
            2);
  EXPECT_FALSE(std::filesystem::exists(out + "x"));
}

}  // namespace
}  // namespace hadal
