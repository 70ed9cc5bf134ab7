// Agents' conversations on the shipped model: every turn's prompt is the one before with more
// behind it, less the reasoning that the chat encoding drops. What the prefix cache gives each turn
// is held to a count made here from the tokens alone: the longest common prefix with anything seen,
// down to the last place where a state was kept (every page, before a prompt's last token, and
// where a conversation ended).
#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <unistd.h>
#include <vector>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "base/check.h"
#include "engine_core/disk/disk_store.h"
#include "nano_machine.h"
#include "text/chat_format.h"
#include "text/chat_tokens.h"
#include "text/tool_calls.h"

namespace hadal {
namespace {

using engine_core::CacheReport;
using engine_core::Request;
using nlohmann::json;
using testing::Nano;
using testing::NanoMachine;
using text::PyJson;
using text::ThinkingMode;
using Tokens = std::vector<int64_t>;

constexpr int64_t kPage = 256;

int64_t common_prefix(const Tokens& a, const Tokens& b) {
  return std::ranges::mismatch(a, b).in1 - a.begin();
}

/// What a perfect cache with hadal's checkpoints would know.
class Expected {
 public:
  explicit Expected(bool pages_only = false) : pages_only_(pages_only) {}

  /// An answer ended: its last token was drawn, but never computed.
  void add(const Tokens& prompt, const Tokens& answer) {
    Seen seen{.tokens = prompt, .kept = {}};
    seen.tokens.insert(seen.tokens.end(), answer.begin(), answer.end());
    const auto end = std::ssize(seen.tokens) - 1;
    for (int64_t pos = kPage; pos <= end; pos += kPage) seen.kept.insert(pos);
    if (!pages_only_) seen.kept.insert({std::ssize(prompt) - 1, end});
    seen_.push_back(std::move(seen));
  }
  /// Tokens that a prompt shares with anything seen, the last token of an answer included.
  int64_t shared(const Tokens& prompt) const {
    int64_t most = 0;
    for (const Seen& seen : seen_) most = std::max(most, common_prefix(seen.tokens, prompt));
    return most;
  }
  int64_t cached(const Tokens& prompt) const {
    int64_t most = 0;
    for (const Seen& seen : seen_) {
      const int64_t limit = std::min(common_prefix(seen.tokens, prompt), std::ssize(prompt) - 1);
      const auto above = seen.kept.upper_bound(limit);
      if (above != seen.kept.begin()) most = std::max(most, *std::prev(above));
    }
    return most;
  }
  /// Why what was seen is computed again: it lies behind the last checkpoint, where that is more
  /// than what was never seen; else there is no reason to speak of, or nothing was seen.
  std::string miss(const Tokens& prompt) const {
    int64_t known = 0;
    for (const Seen& seen : seen_) {
      const auto computed = std::ssize(seen.tokens) - 1;
      known = std::max(known, std::min(common_prefix(seen.tokens, prompt), computed));
    }
    const int64_t pos = cached(prompt);
    const bool whole = pos == std::ssize(prompt) - 1 || known == pos;
    const bool tail = !whole && std::ssize(prompt) - known <= known - pos;
    return tail ? "tail" : (pos > 0 ? "none" : "new");
  }

 private:
  struct Seen {
    Tokens tokens;
    std::set<int64_t> kept;  ///< positions
  };
  bool pages_only_;
  std::vector<Seen> seen_;
};

/// Draws the answer that the test wants: by seed and place.
class ScriptedSampler final : public engine_core::Sampler {
 public:
  void sample(std::span<const engine_core::DrawInput> inputs,
              std::span<engine_core::Sampled> sampled) override {
    for (size_t i = 0; i < inputs.size(); ++i) {
      const engine_core::Draw& draw = inputs[i].draw;
      sampled[i].token = answers.at(draw.sampling->seed).at(draw.answer.size());
    }
  }
  engine_core::TokenScore score(std::span<const float>, int64_t, int64_t) const override {
    return {};
  }
  std::map<uint64_t, Tokens> answers;
};

/// Words that differ from place to place.
std::string words(uint64_t place, int count) {
  static const std::vector<std::string> known = {"river", "stone", "the",   "old",    "king",
                                                 "went",  "house", "under", "bridge", "lantern",
                                                 "slow",  "and",   "field", "seven",  "of"};
  std::string text;
  uint64_t state = place * 7919 + 17;
  for (int i = 0; i < count; ++i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    text += (i == 0 ? "" : " ") + known[(state >> 33) % known.size()];
  }
  return text + ".";
}

json user(uint64_t place, int count) {
  return {{"role", "user"}, {"content", words(place, count)}};
}
json call(const std::string& id, uint64_t place) {
  return {
      {"id", id},
      {"function",
       {{"name", "look_up"}, {"arguments", json{{"what", words(place, 4)}, {"most", 3}}.dump()}}}};
}
json result(const std::string& id, uint64_t place, int count) {
  return {{"role", "tool"}, {"tool_call_id", id}, {"content", words(place, count)}};
}
json assistant(uint64_t place) {
  return {{"role", "assistant"},
          {"reasoning_content", words(place, 12)},
          {"content", words(place + 1, 9)}};
}

json system_message(bool tools) {
  json message{{"role", "system"}, {"content", words(1, 300)}};
  if (!tools) return message;
  json function = {{"name", "look_up"}, {"description", words(3, 60)}};
  function["parameters"]["type"] = "object";
  function["parameters"]["properties"] = {
      {"what", {{"type", "string"}, {"description", words(2, 60)}}},
      {"most", {{"type", "integer"}}}};
  json tool;
  tool["type"] = "function";
  tool["function"] = function;
  message["tools"].push_back(tool);
  return message;
}

/// What comes in at each turn, and the assistant message it is answered with.
struct Turn {
  std::vector<json> in;
  json out;
};

std::vector<Turn> turns(bool tools, uint64_t place) {
  std::vector<Turn> all(8);
  for (uint64_t i = 0; i < all.size(); ++i) {
    const uint64_t at = place + 100 * i;
    Turn& turn = all[i];
    turn.out = assistant(at + 1);
    if (!tools) {
      turn.in.push_back(user(at, 30 + 25 * static_cast<int>(i % 3)));
    } else if (i % 4 == 0) {
      turn.in.push_back(user(at, 40));
      turn.out["tool_calls"].push_back(call("a", at + 5));
    } else if (i % 4 == 1) {
      turn.in.push_back(result("a", at, 120));
      for (const char* id : {"b", "c"}) turn.out["tool_calls"].push_back(call(id, at + 5));
    } else if (i % 4 == 2) {  // results in another order than the calls
      turn.in.push_back(result("c", at, 20));
      turn.in.push_back(result("b", at + 7, 90));
    } else {
      turn.in.push_back(user(at, 35));
    }
  }
  return all;
}

struct Mode {
  const char* name;
  ThinkingMode thinking;
  bool tools;
  bool drops() const { return thinking == ThinkingMode::kThinking && !tools; }
};
void PrintTo(const Mode& mode, std::ostream* out) { *out << mode.name; }

class AgentTraffic : public ::testing::TestWithParam<Mode> {
 protected:
  Tokens prompt(const std::vector<json>& messages) const {
    text::ChatOptions options;
    options.thinking_mode = GetParam().thinking;
    return testing::prompt_ids(
        text::render_chat(PyJson::parse(json(messages).dump(), "messages"), options));
  }
  /// The tokens a model writes for this message.
  Tokens answer_tokens(const json& message) const {
    std::string text;
    if (GetParam().thinking == ThinkingMode::kThinking)
      text = message["reasoning_content"].get<std::string>() + std::string(text::kThinkEnd);
    text += message["content"].get<std::string>();
    std::vector<text::ToolCall> calls;
    for (const json& one : message.value("tool_calls", json::array()))
      calls.push_back({one["function"]["name"], one["function"]["arguments"]});
    if (!calls.empty()) text += "\n\n" + text::write_tool_calls(calls);
    text += text::kEos;
    const auto ids = Nano::get().tokenizer.encode(text, text::SpecialTokens::kRecognise);
    return {ids.begin(), ids.end()};
  }

  /// Asks with these messages, answers with that one, checks the report; both are then seen.
  CacheReport turn(NanoMachine& machine,
                   Expected& expected,
                   const std::vector<json>& messages,
                   const json& out) {
    Request request;
    request.prompt = prompt(messages);
    request.max_tokens = 1000;
    request.thinking = GetParam().thinking == ThinkingMode::kThinking;
    request.sampling.seed = ++seed_;
    sampler_.answers[seed_] = answer_tokens(out);
    const auto answer = machine.answer(request);
    EXPECT_EQ(answer->error, "");
    EXPECT_TRUE(answer->stopped());
    EXPECT_EQ(answer->tokens, sampler_.answers[seed_]);
    const CacheReport& report = answer->cache;
    EXPECT_EQ(report.prompt_tokens, std::ssize(request.prompt));
    EXPECT_EQ(report.cached_tokens, expected.cached(request.prompt));
    std::printf("%-9s %5ld tokens, %5ld shared, %5ld cached (%ld from disk): %s\n", GetParam().name,
                report.prompt_tokens, expected.shared(request.prompt), report.cached_tokens,
                report.disk_tokens, report.miss);
    prompts_ += report.prompt_tokens;
    cached_ += report.cached_tokens;
    expected.add(request.prompt, answer->tokens);
    return report;
  }

  /// Eight turns behind `messages`, which they extend.
  void converse(NanoMachine& machine,
                Expected& expected,
                std::vector<json>& messages,
                const std::vector<Turn>& all) {
    std::optional<Tokens> before;
    for (const Turn& one : all) {
      messages.insert(messages.end(), one.in.begin(), one.in.end());
      const Tokens now = prompt(messages);
      const int64_t shared = expected.shared(now), cached = expected.cached(now);
      if (before) {
        // What the encoding demands: all of it comes again, but for dropped reasoning.
        const int64_t own = common_prefix(*before, now);
        EXPECT_EQ(own, GetParam().drops() ? prompt_size_ - 1 : std::ssize(*before));
        EXPECT_EQ(shared, own);
        // Nothing is computed twice: an answer's EOS is computed for the first time.
        EXPECT_EQ(cached, GetParam().drops() ? shared : shared - 1);
      }
      EXPECT_LE(shared - cached, kPage);
      const std::string miss = expected.miss(now);
      EXPECT_EQ(turn(machine, expected, messages, one.out).miss, miss);
      before = now;
      prompt_size_ = std::ssize(now);
      const Tokens answer = answer_tokens(one.out);
      before->insert(before->end(), answer.begin(), answer.end());
      messages.push_back(one.out);
    }
  }

  ScriptedSampler sampler_;
  uint64_t seed_ = 0;
  int64_t prompt_size_ = 0, prompts_ = 0, cached_ = 0;
};

TEST_P(AgentTraffic, EveryTurnReusesAllThatItCan) {
  // Room for every state beside the pages: nothing is evicted.
  NanoMachine machine({.num_pages = 2048, .sampler = &sampler_});
  ASSERT_EQ(machine.page_tokens(), kPage);
  Expected expected;
  std::vector<json> messages = {system_message(GetParam().tools)};
  converse(machine, expected, messages, turns(GetParam().tools, 1000));

  // Another conversation with the same system message and tools: down to a page.
  std::vector<json> other = {system_message(GetParam().tools), user(5000, 20)};
  const int64_t shared = expected.shared(prompt(other));
  const CacheReport second = turn(machine, expected, other, assistant(5001));
  EXPECT_EQ(second.cached_tokens, shared / kPage * kPage);
  EXPECT_GE(second.cached_tokens, kPage);

  // The last answer again, and then on from either.
  std::vector<json> left = messages, right = messages;
  right.back() = assistant(6000);
  messages.pop_back();
  const CacheReport again = turn(machine, expected, messages, right.back());
  EXPECT_EQ(again.cached_tokens, again.prompt_tokens - 1);
  EXPECT_STREQ(again.miss, "none");
  for (std::vector<json>* fork : {&left, &right}) {
    fork->push_back(user(7000, 10));
    const int64_t known = expected.shared(prompt(*fork));
    const CacheReport report = turn(machine, expected, *fork, assistant(7001));
    EXPECT_EQ(report.cached_tokens, GetParam().drops() ? prompt_size_ - 1 : known - 1);
  }

  // An earlier message put differently.
  std::vector<json> edited(left.begin(), left.begin() + 5);
  edited.push_back(user(8000, 10));
  turn(machine, expected, edited, assistant(8001));

  const engine_core::EngineStats stats = machine.scheduler().stats();
  EXPECT_EQ(stats.prompt_tokens, prompts_);
  EXPECT_EQ(stats.cached_tokens, cached_);
  std::printf("%s: %ld of %ld prompt tokens cached\n", GetParam().name, cached_, prompts_);
}

TEST_P(AgentTraffic, PagesOutliveARestart) {
  const std::filesystem::path folder =
      std::filesystem::temp_directory_path() /
      concat("hadal_agent_traffic_", GetParam().name, "_", ::getpid());
  std::filesystem::remove_all(folder);
  const engine_core::DiskStoreOptions options{
      .folder = folder, .identity = "agent traffic", .page_tokens = kPage, .period = kPage};
  std::vector<Turn> all = turns(GetParam().tools, 2000);
  all.resize(4);
  std::vector<json> messages = {system_message(GetParam().tools)};
  Expected on_disk(/*pages_only=*/true);
  {
    engine_core::DiskStore store(options);
    NanoMachine machine({.sampler = &sampler_, .store = &store});
    Expected expected;
    for (const Turn& one : all) {
      messages.insert(messages.end(), one.in.begin(), one.in.end());
      turn(machine, expected, messages, one.out);
      on_disk.add(prompt(messages), answer_tokens(one.out));
      messages.push_back(one.out);
    }
  }
  engine_core::DiskStore store(options);
  NanoMachine machine({.sampler = &sampler_, .store = &store});
  messages.push_back(user(9000, 10));
  const Tokens now = prompt(messages);
  const CacheReport back = turn(machine, on_disk, messages, assistant(9001));
  EXPECT_GE(back.cached_tokens, 2 * kPage);
  EXPECT_EQ(back.disk_tokens, back.cached_tokens);
  EXPECT_STREQ(back.miss, "none");
  // From here on memory knows the exact end again.
  Expected expected;
  expected.add(now, answer_tokens(assistant(9001)));
  messages.push_back(assistant(9001));
  messages.push_back(user(9100, 10));
  EXPECT_EQ(turn(machine, expected, messages, assistant(9101)).disk_tokens, 0);
  std::filesystem::remove_all(folder);
}

/// What the model writes itself comes back as text: other tokens may stand for it then.
TEST_P(AgentTraffic, OwnAnswersComeBackAsText) {
  NanoMachine machine({});
  Expected expected;
  std::vector<json> messages = {system_message(GetParam().tools)};
  for (uint64_t i = 0; i < 4; ++i) {
    messages.push_back(user(3000 + i, 20));
    Request request;
    request.prompt = prompt(messages);
    request.max_tokens = 24;
    request.thinking = GetParam().thinking == ThinkingMode::kThinking;
    request.sampling.seed = i;
    const auto answer = machine.answer(request);
    ASSERT_EQ(answer->error, "");
    EXPECT_EQ(answer->cache.cached_tokens, expected.cached(request.prompt));
    EXPECT_EQ(answer->cache.miss, expected.miss(request.prompt));
    expected.add(request.prompt, answer->tokens);
    // Cut off inside the reasoning, it has no content.
    const bool thinks = request.thinking;
    messages.push_back({{"role", "assistant"},
                        {"reasoning_content", thinks ? answer->text : ""},
                        {"content", thinks ? "" : answer->text}});
  }
}

INSTANTIATE_TEST_SUITE_P(Modes,
                         AgentTraffic,
                         ::testing::Values(Mode{"chat", ThinkingMode::kChat, true},
                                           Mode{"dropped", ThinkingMode::kThinking, false},
                                           Mode{"kept", ThinkingMode::kThinking, true}),
                         [](const auto& test) { return std::string(test.param.name); });

}  // namespace
}  // namespace hadal
