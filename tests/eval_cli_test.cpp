// hadal eval choice and generate against the server's log probabilities and texts, and both against
// hadal logits.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "base/check.h"
#include "cli_fixture.h"
#include "serve_process.h"
#include "testing/loopback_client.h"

namespace hadal {
namespace {

using nlohmann::json;

class EvalTasks : public CliFixture {
 protected:
  json post(const testing::Server& server, const std::string& path, const json& request) {
    testing::LoopbackClient client(server.port());
    const testing::Reply reply = client.post(path, request.dump());
    EXPECT_EQ(reply.status, 200) << reply.body;
    return json::parse(reply.body, nullptr, false);
  }
  /// One safetensors file with input_ids [1, ids].
  std::string write_ids(const std::vector<int>& ids) {
    const json header = {
        {"input_ids",
         {{"dtype", "I32"}, {"shape", {1, ids.size()}}, {"data_offsets", {0, 4 * ids.size()}}}}};
    const std::string text = header.dump();
    const uint64_t size = text.size();
    std::string bytes(reinterpret_cast<const char*>(&size), sizeof(size));
    bytes += text;
    for (const int id : ids) {
      const int32_t value = id;
      bytes.append(reinterpret_cast<const char*>(&value), sizeof(value));
    }
    return write("ids.safetensors", bytes);
  }
};

const std::vector<json> kQuestions = {
    {{"context", "It was a bright cold morning, and"},
     {"choices", {"the clock struck.", "Zürich 你好 🙂", "he"}},
     {"answer", 0}},
    {{"context", ""}, {"choices", {"The", "q"}}, {"answer", "The"}},
    {{"context", "Once upon a time  "}, {"choices", {"there was a king", "xq"}}, {"answer", 1}},
};

/// log softmax(row)[token] in the order that matters to nobody but the last digits.
double log_softmax(const float* row, size_t vocab, int token) {
  double most = row[0], sum = 0;
  for (size_t i = 1; i < vocab; ++i) most = std::max(most, static_cast<double>(row[i]));
  for (size_t i = 0; i < vocab; ++i) sum += std::exp(row[i] - most);
  return row[token] - most - std::log(sum);
}

TEST_F(EvalTasks, PromptLogprobsAreThoseOfHadalLogits) {
  testing::Server server({"--step-tokens", "16"});
  ASSERT_NE(server.port(), 0) << server.log();
  std::string text = "It was a bright cold morning, and the old man";
  for (int i = 0; i < 6; ++i) text += text.substr(0, 60);
  const json tokens = post(server, "/tokenize", {{"prompt", text}})["tokens"];
  const auto ids = tokens.get<std::vector<int>>();
  ASSERT_GT(ids.size(), 64u);
  const CliResult result =
      run("logits --ids " + write_ids(ids) + " --out " + (folder_ / "out").string());
  ASSERT_EQ(result.code, 0) << result.error;
  const std::string bytes = slurp(folder_ / "out");
  uint64_t head = 0;
  std::memcpy(&head, bytes.data(), sizeof(head));
  const auto* logits = reinterpret_cast<const float*>(bytes.data() + 8 + head);
  const size_t vocab = (bytes.size() - 8 - head) / 4 / ids.size();
  // Once more, when the prefix is known: it must not hide anything.
  json first;
  for (const json& prompt : {json(text), json(ids), json({ids, ids})}) {
    const json reply =
        post(server, "/v1/completions",
             {{"prompt", prompt}, {"echo", true}, {"logprobs", 1}, {"max_tokens", 0}});
    const json& given = reply["choices"].back()["logprobs"]["token_logprobs"];
    ASSERT_EQ(given.size(), ids.size());
    EXPECT_TRUE(given[0].is_null());
    for (size_t i = 1; i < ids.size(); ++i) {
      ASSERT_NEAR(given[i].get<double>(), log_softmax(logits + (i - 1) * vocab, vocab, ids[i]),
                  1e-9)
          << i;
    }
    if (first.is_null()) first = given;
    EXPECT_EQ(given, first);
  }
}

TEST_F(EvalTasks, LogitsAsHopperDoNotKnowTheirChunksAndWhatHasNoKernelIsNamed) {
  std::vector<int> ids(24);
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int>(i * 7 % 32);
  const std::string file = write_ids(ids);
  const auto logits = [&](const std::string& flags) {
    return run(concat("logits --ids ", file, " --out ", (folder_ / "out").string(), " ", flags));
  };
  const auto bytes = [&](const std::string& flags) {
    const CliResult result = logits(flags);
    EXPECT_EQ(result.code, 0) << result.error;
    return slurp(folder_ / "out");
  };
  const std::string whole = bytes("--as hopper");
  EXPECT_EQ(bytes("--as hopper --chunk 5"), whole);
  EXPECT_NE(bytes(""), whole);
  for (const auto& [flags, why] :
       {std::pair{"--as hopper --numerics ideal", "`ideal`"}, {"--as ampere", "--as"}}) {
    const CliResult result = logits(flags);
    EXPECT_EQ(result.code, 2);
    EXPECT_NE(result.error.find(why), std::string::npos) << result.error;
  }
  // Two streams of residuals.
  const CliResult refused =
      logits(concat("--as hopper --model ", HADAL_SOURCE_DIR, "/tests/golden-tiny/released"));
  EXPECT_EQ(refused.code, 2);
  EXPECT_NE(refused.error.find("as hopper: hc_pre"), std::string::npos) << refused.error;
}

TEST_F(EvalTasks, ChoicesAreWhatTheServersLogprobsSay) {
  std::string lines;
  for (const json& question : kQuestions) lines += question.dump() + "\n";
  const CliResult result = run("eval choice " + write("q.jsonl", lines) + " --json");
  ASSERT_EQ(result.code, 0) << result.error;
  const json report = json::parse(result.out);
  const CliResult piece = run("eval choice " + write("q.jsonl", lines) + " --json --step-tokens 1");
  EXPECT_EQ(json::parse(piece.out), report);
  testing::Server server({});
  ASSERT_NE(server.port(), 0) << server.log();
  double sum = 0;
  for (size_t i = 0; i < kQuestions.size(); ++i) {
    const json& question = kQuestions[i];
    const std::string context = question["context"];
    const std::string known = context.substr(0, context.find_last_not_of(' ') + 1);
    const size_t begin = post(server, "/tokenize", {{"prompt", known}})["count"];
    std::vector<double> sums;
    for (const std::string choice : question["choices"]) {
      const json reply = post(
          server, "/v1/completions",
          {{"prompt", context + " " + choice}, {"echo", true}, {"logprobs", 1}, {"max_tokens", 1}});
      const json& lists = reply["choices"][0]["logprobs"];
      double own = 0;
      bool greedy = true;
      for (size_t t = begin; t + 1 < lists["token_logprobs"].size(); ++t) {
        own += lists["token_logprobs"][t].get<double>();
        double best = -1e9;
        for (const json& other : lists["top_logprobs"][t])
          best = std::max(best, other.get<double>());
        greedy = greedy && best == lists["token_logprobs"][t].get<double>();
      }
      const json& given = report["questions"][i]["choices"][sums.size()];
      EXPECT_EQ(given["logprob"].get<double>(), own) << choice;
      EXPECT_EQ(given["greedy"].get<bool>(), greedy) << choice;
      EXPECT_EQ(given["tokens"].get<size_t>(), lists["token_logprobs"].size() - 1 - begin);
      sums.push_back(own);
    }
    const auto best = std::ranges::max_element(sums) - sums.begin();
    EXPECT_EQ(report["questions"][i]["best"], best);
    sum += sums[report["questions"][i]["answer"].get<size_t>()];
  }
  EXPECT_NEAR(report["answers_logprob"].get<double>(), sum, 1e-9);
}

TEST_F(EvalTasks, AnswersAreTheServersTexts) {
  const std::vector<std::string> contexts = {"It was a bright cold morning, and", "Once upon a",
                                             "Call me"};
  testing::Server server({});
  ASSERT_NE(server.port(), 0) << server.log();
  for (const bool chat : {false, true}) {
    std::string lines;
    for (const std::string& context : contexts) {
      json request = {{"max_tokens", 12}, {"temperature", 0}, {"stop", {"the"}}};
      std::string text;
      if (chat) {
        request["messages"] = {{{"role", "user"}, {"content", context}}};
        request["thinking"] = false;
        text = post(server, "/v1/chat/completions", request)["choices"][0]["message"]["content"];
      } else {
        request["prompt"] = context;
        text = post(server, "/v1/completions", request)["choices"][0]["text"];
      }
      lines += json({{"context", context}, {"answer", text}, {"until", {"the"}}}).dump() + "\n";
    }
    lines += json({{"context", "x"}, {"answer", "never written"}}).dump() + "\n";
    const CliResult result = run("eval generate " + write("q.jsonl", lines) +
                                 " --json --max-tokens 12" + (chat ? " --chat" : ""));
    ASSERT_EQ(result.code, 0) << result.error;
    const json report = json::parse(result.out);
    EXPECT_EQ(report["exact_match"].get<double>(), 0.75) << report.dump();
    EXPECT_FALSE(report["answers"][3]["exact"].get<bool>());
  }
}

TEST_F(EvalTasks, BadLinesAreNamed) {
  const auto refused = [&](const std::string& command, const json& line, const std::string& why) {
    expect_refused(run("eval " + command + " " + write("q.jsonl", line.dump() + "\n")), why);
  };
  refused("choice", {{"choices", {"a"}}, {"answer", 0}}, "line 1: expected a text \"context\"");
  refused("choice", {{"context", "a"}, {"answer", 0}}, "line 1: expected \"choices\"");
  refused("choice", {{"context", "a"}, {"choices", {"b"}}, {"answer", 1}}, "from 0 to 0");
  refused("choice", {{"context", "a"}, {"choices", {"b"}}, {"answer", "c"}}, "none of the choices");
  refused("choice", {{"context", "a"}, {"choices", {1}}, {"answer", 0}}, "found an integer");
  refused("generate", {{"context", "a"}}, "line 1: expected a text \"answer\"");
  refused("generate", {{"context", "a"}, {"answer", "b"}, {"until", {""}}}, "\"until\"");
  expect_refused(run("eval choice " + write("none.jsonl", "")), "holds no question");
}

}  // namespace
}  // namespace hadal
