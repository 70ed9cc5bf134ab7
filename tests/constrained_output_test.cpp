// Answers that must follow a schema, on the shipped model: what ends with "stop" is valid, nearly
// all end, speculation changes no token, and a constrained token costs hardly more than a free one.
// HADAL_SCHEMAS=200 asks for more than CI's 20 schemas.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "base/check.h"
#include "nano_machine.h"
#include "schema_cases.h"
#include "text/chat_format.h"
#include "text/chat_tokens.h"
#include "text/tool_calls.h"

namespace hadal {
namespace {

using engine_core::Grammar;
using engine_core::Request;
using nlohmann::json;
using testing::Nano;
using testing::NanoAnswer;
using testing::NanoMachine;
using text::PyJson;
using text::ThinkingMode;

constexpr int64_t kMaxTokens = 512;

size_t num_schemas() {
  const char* wanted = std::getenv("HADAL_SCHEMAS");
  return wanted != nullptr ? static_cast<size_t>(std::max(std::atoi(wanted), 1)) : 20;
}

/// A question as the chat APIs render it; the system message shows what else it says.
std::vector<int64_t> prompt(const std::string& key,
                            const json& shown,
                            size_t index,
                            ThinkingMode mode) {
  static const std::vector<std::string> questions = {
      "Describe the house of the old king.", "Who was the first of the travellers?",
      "Give me an example.", "How far is it from the river to the town, and who lives there?"};
  const json messages = {{{"role", "system"}, {"content", ""}, {key, shown}},
                         {{"role", "user"}, {"content", questions[index % questions.size()]}}};
  text::ChatOptions options;
  options.thinking_mode = mode;
  return testing::prompt_ids(
      text::render_chat(PyJson::parse(messages.dump(), "messages"), options));
}

Request request_for(std::vector<int64_t> ids, Grammar grammar, size_t index, ThinkingMode mode) {
  constexpr double kTemperatures[] = {0, 0.6, 1};
  Request request;
  request.prompt = std::move(ids);
  request.max_tokens = kMaxTokens;
  request.grammar = std::move(grammar);
  request.sampling.temperature = kTemperatures[index % 3];
  request.sampling.seed = 100 + index;
  if (mode == ThinkingMode::kThinking) {
    request.thinking = true;
    // The model was never taught to think and would go on for ever. Behind </think> the grammar
    // does not allow another one, whatever its logit.
    request.sampling.logit_bias = {{Nano::get().tokenizer.id_of(text::kThinkEnd), 12.0}};
  }
  return request;
}

/// The request with this schema as its format, as chat_job.h builds it.
Request with_schema(const json& schema, size_t index, ThinkingMode mode) {
  return request_for(prompt("response_format", schema, index, mode),
                     {Grammar::Kind::kJsonSchema, schema.dump()}, index, mode);
}

/// The request with a strict tool of these parameters beside another; every fourth may answer
/// with text instead.
Request with_tool(const json& parameters, size_t index, ThinkingMode mode) {
  const json strict = {{"name", "note_down"}, {"parameters", parameters}};
  const json other = {{"name", "leave"}, {"parameters", {{"type", "object"}}}};
  const json shown = {{{"type", "function"}, {"function", strict}},
                      {{"type", "function"}, {"function", other}}};
  json list = {strict, other};
  list[0]["strict"] = true;
  Request request =
      request_for(prompt("tools", shown, index, mode),
                  {Grammar::Kind::kToolCalls, list.dump(), index % 4 != 3}, index, mode);
  request.max_tokens = 192;  // text has no bound, and some go on for ever
  return request;
}

std::vector<std::shared_ptr<NanoAnswer>> answers_to(const std::vector<Request>& requests,
                                                    bool drafts) {
  NanoMachine machine({.drafts = drafts});
  std::vector<std::shared_ptr<NanoAnswer>> answers;
  for (const Request& request : requests) answers.push_back(machine.add(request));
  machine.run();
  for (const auto& answer : answers) {
    EXPECT_EQ(answer->error, "");
    EXPECT_TRUE(answer->finish.has_value());
  }
  return answers;
}

/// What was counted over all answers.
struct Counts {
  int64_t answers = 0, stopped = 0, valid = 0, thought = 0, called = 0;
  int64_t tokens = 0, drafted = 0, accepted = 0;
};

class Constrained : public ::testing::TestWithParam<ThinkingMode> {
 protected:
  /// Answers with and without drafts; `is_valid` judges what stopped.
  template <class IsValid>
  Counts check(const std::vector<Request>& requests, const IsValid& is_valid) {
    const auto plain = answers_to(requests, false), drafted = answers_to(requests, true);
    Counts counts;
    for (size_t i = 0; i < requests.size(); ++i) {
      EXPECT_EQ(plain[i]->tokens, drafted[i]->tokens) << requests[i].grammar.text;
      ++counts.answers;
      counts.tokens += std::ssize(plain[i]->tokens);
      counts.drafted += drafted[i]->drafted;
      counts.accepted += drafted[i]->accepted;
      if (!plain[i]->stopped()) continue;
      ++counts.stopped;
      const text::Completion read =
          text::parse_completion(plain[i]->text + std::string(text::kEos), GetParam());
      EXPECT_TRUE(read.ok) << read.error << "\n" << plain[i]->text;
      counts.thought += read.reasoning.empty() ? 0 : 1;
      counts.called += read.tool_calls.empty() ? 0 : 1;
      const bool valid = read.ok && is_valid(i, read);
      EXPECT_TRUE(valid) << plain[i]->text << "\n" << requests[i].grammar.text;
      counts.valid += valid ? 1 : 0;
    }
    std::printf(
        "%ld answers: %ld stopped, %ld valid, %ld with reasoning, %ld with calls; "
        "%ld tokens; %ld of %ld drafts kept\n",
        counts.answers, counts.stopped, counts.valid, counts.thought, counts.called, counts.tokens,
        counts.accepted, counts.drafted);
    EXPECT_EQ(counts.valid, counts.stopped);
    EXPECT_GT(counts.accepted, 0);
    if (GetParam() == ThinkingMode::kThinking) {
      EXPECT_GT(counts.thought, 0);
    }
    return counts;
  }
};

TEST_P(Constrained, AnswersFollowRandomSchemas) {
  std::mt19937_64 random(12);
  std::vector<json> schemas;
  std::vector<Request> requests;
  for (size_t i = 0; i < num_schemas(); ++i) {
    schemas.push_back(testing::random_schema(random, false));
    requests.push_back(with_schema(schemas.back(), i, GetParam()));
  }
  const Counts counts = check(requests, [&](size_t i, const text::Completion& read) {
    const json value = json::parse(read.content, nullptr, false);
    return !value.is_discarded() && testing::validates(value, schemas[i]);
  });
  EXPECT_GE(counts.stopped * 100, counts.answers * 95);
}

TEST_P(Constrained, ArgumentsOfStrictToolsFollowRandomSchemas) {
  std::mt19937_64 random(13);
  std::vector<json> schemas;
  std::vector<Request> requests;
  for (size_t i = 0; i < std::max(num_schemas() / 2, size_t{4}); ++i) {
    schemas.push_back(testing::random_schema(random, true));
    requests.push_back(with_tool(schemas.back(), i, GetParam()));
  }
  const Counts counts = check(requests, [&](size_t i, const text::Completion& read) {
    if (requests[i].grammar.must_call && read.tool_calls.empty()) return false;
    return std::all_of(read.tool_calls.begin(), read.tool_calls.end(),
                       [&](const text::ToolCall& call) {
                         if (call.name == "leave") return true;
                         const json arguments = json::parse(call.arguments, nullptr, false);
                         return call.name == "note_down" && !arguments.is_discarded() &&
                                testing::validates(arguments, schemas[i]);
                       });
  });
  EXPECT_GE(counts.stopped * 2, counts.answers);
  EXPECT_GE(counts.called * 2, counts.answers);
}

INSTANTIATE_TEST_SUITE_P(Modes,
                         Constrained,
                         ::testing::Values(ThinkingMode::kChat, ThinkingMode::kThinking),
                         [](const auto& test) {
                           return test.param == ThinkingMode::kChat ? "chat" : "thinking";
                         });

/// Time of decoding, by the engine's books.
struct Cost {
  double wall = 0, overhead = 0;  ///< overhead: outside the model
  int64_t tokens = 0;
};

/// Adds what all requests at once take on a machine that knows their prompts.
std::vector<std::shared_ptr<NanoAnswer>> measure(NanoMachine& machine,
                                                 const std::vector<Request>& requests,
                                                 Cost& cost) {
  std::vector<std::shared_ptr<NanoAnswer>> answers;
  for (const Request& request : requests) answers.push_back(machine.add(request));
  const engine_core::EngineStats before = machine.scheduler().stats();
  machine.run();
  const engine_core::EngineStats after = machine.scheduler().stats();
  const double overhead = after.overhead_seconds - before.overhead_seconds;
  cost.wall += after.model_seconds - before.model_seconds + overhead;
  cost.overhead += overhead;
  cost.tokens += after.generated_tokens - before.generated_tokens;
  return answers;
}

TEST(ConstrainedCost, IsAFractionOfATokensTime) {
  for (const size_t streams : {size_t{1}, size_t{8}}) {
    std::mt19937_64 random(5);
    NanoMachine machine({});
    Cost constrained, unconstrained;
    double compiling = 0;
    const size_t groups = streams == 1 ? num_schemas() / 5 : num_schemas() / 20;
    for (size_t group = 0; group < std::max(groups, size_t{1}); ++group) {
      std::vector<Request> requests;
      for (size_t i = 0; i < streams; ++i) {
        requests.push_back(
            with_schema(testing::random_schema(random, false), i, ThinkingMode::kChat));
      }
      const auto begin = std::chrono::steady_clock::now();
      for (const Request& request : requests) machine.add(request);
      compiling += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
      machine.run();
      // By turns, the same number of tokens.
      for (int round = 0; round < 2; ++round) {
        const auto answers = measure(machine, requests, constrained);
        std::vector<Request> free = requests;
        for (size_t i = 0; i < free.size(); ++i) {
          free[i].grammar = {};
          free[i].ignore_eos = true;
          free[i].max_tokens = std::ssize(answers[i]->tokens);
        }
        measure(machine, free, unconstrained);
      }
    }
    ASSERT_EQ(constrained.tokens, unconstrained.tokens);
    const double micros = 1e6 / static_cast<double>(constrained.tokens);
    std::printf(
        "%zu streams, %ld tokens: %.0f us a token, free %.0f us (%.1f %%); outside the "
        "model %.0f us, free %.0f us; to compile a schema %.1f ms\n",
        streams, constrained.tokens, constrained.wall * micros, unconstrained.wall * micros,
        100 * (constrained.wall / unconstrained.wall - 1), constrained.overhead * micros,
        unconstrained.overhead * micros,
        compiling * 1e3 / static_cast<double>(std::max(groups, size_t{1}) * streams));
    // What the grammar does lies outside the model, whose time is noise. It is some 10 us a token;
    // other processes share the processors of a test run.
    EXPECT_LE(constrained.overhead - unconstrained.overhead, unconstrained.wall / 10);
  }
}

}  // namespace
}  // namespace hadal
