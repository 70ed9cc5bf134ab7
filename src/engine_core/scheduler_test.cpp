#include "engine_core/scheduler.h"

#include <algorithm>
#include <chrono>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "base/check.h"
#include "base/log.h"
#include "base/philox.h"
#include "engine_core/scripted_model.h"

namespace hadal::engine {
namespace {

using Tokens = std::vector<int64_t>;

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
constexpr uint64_t kSchedules = 100;  // sanitizers make everything slow
#else
constexpr uint64_t kSchedules = 500;
#endif

struct Answer {
  Tokens tokens;
  std::string text;
  std::optional<FinishReason> finish;
  std::string matched_stop, error;
  friend bool operator==(const Answer&, const Answer&) = default;
};

// All choices of one request; complains about updates after the end.
class Recorder : public Sink {
 public:
  void on_update(Update update) override {
    Answer& answer = answers[update.choice];
    EXPECT_FALSE(answer.finish) << "an update after the last";
    for (const OutputToken& token : update.tokens) {
      answer.tokens.push_back(token.token);
      answer.text += token.text;
    }
    EXPECT_EQ(update.completion_tokens, static_cast<int64_t>(answer.tokens.size()));
    answer.finish = update.finish;
    answer.matched_stop = update.matched_stop;
    answer.error = update.error;
    cache = update.cache;
    if (update.finish) ++finished;
    ++updates;
    if (throws) throw std::runtime_error("sink: gone");
  }
  std::map<int64_t, Answer> answers;
  CacheReport cache;
  int64_t finished = 0, updates = 0;
  bool throws = false;
};

// What one choice must be, computed without any cache or schedule.
Answer expected_answer(const ScriptedModel& model,
                       const Request& request,
                       int64_t choice,
                       int64_t max_context) {
  ScriptedSampler sampler;
  ScriptedFilters filters;
  const std::unique_ptr<AnswerFilter> filter = filters.create(request);
  Tokens tokens = request.prompt;
  Answer answer;
  while (!answer.finish) {
    const std::vector<float> logits = model.reference(tokens);
    const int64_t token = sampler
                              .sample({.logits = logits,
                                       .sampling = request.sampling,
                                       .choice = choice,
                                       .pos = static_cast<int64_t>(tokens.size()),
                                       .prompt = {},
                                       .answer = {},
                                       .mask = {},
                                       .top_logprobs = -1})
                              .token;
    tokens.push_back(token);
    answer.tokens.push_back(token);
    if (token == 0 && !request.ignore_eos) {
      answer.text += filter->finish();
      answer.finish = FinishReason::kStop;
      break;
    }
    const AnswerFilter::Accepted accepted = filter->accept(token);
    answer.text += accepted.text;
    if (accepted.verdict == AnswerFilter::Verdict::kStopString) {
      answer.matched_stop = accepted.matched_stop;
      answer.finish = FinishReason::kStopString;
    } else if (static_cast<int64_t>(answer.tokens.size()) == request.max_tokens ||
               static_cast<int64_t>(tokens.size()) == max_context) {
      answer.text += filter->finish();
      answer.finish = FinishReason::kLength;
    }
  }
  return answer;
}

struct Config {
  ScriptedOptions model;
  SchedulerOptions scheduler;
  uint64_t drafts_right = 200;  ///< of 256
  int64_t max_context = 200;
  bool store = false;
};

class World {
 public:
  explicit World(const Config& config)
      : model(config.model),
        drafter(model, config.drafts_right),
        store(config.model.page_tokens),
        info{.model_name = "scripted",
             .vocab_size = config.model.vocab_size,
             .max_context = config.max_context,
             .max_choices = 4,
             .eos_token = 0},
        scheduler(info,
                  config.scheduler,
                  {.runner = model,
                   .memory = model,
                   .sampler = sampler,
                   .filters = filters,
                   .drafter = &drafter,
                   .store = config.store ? &store : nullptr}) {}

  std::shared_ptr<Recorder> add(const Request& request) {
    auto sink = std::make_shared<Recorder>();
    scheduler.add(++last_id, scheduler.prepare(request, sink));
    return sink;
  }
  void run_to_end() {
    for (int64_t i = 0; scheduler.step(); ++i) {
      ASSERT_LT(i, 20000) << "it does not end";
      ASSERT_NO_THROW(scheduler.check_integrity());
    }
  }
  Answer expected(const Request& request, int64_t choice = 0) const {
    return expected_answer(model, request, choice,
                           std::min(info.max_context, model.num_pages() * model.page_tokens()));
  }

  ScriptedModel model;
  ScriptedSampler sampler;
  ScriptedFilters filters;
  ScriptedDrafter drafter;
  ScriptedStore store;
  EngineInfo info;
  Scheduler scheduler;
  uint64_t last_id = 0;
};

Request plain(Tokens prompt, int64_t max_tokens) {
  Request request;
  request.prompt = std::move(prompt);
  request.max_tokens = max_tokens;
  request.ignore_eos = true;
  request.sampling.temperature = 0;
  return request;
}

Tokens counting(int64_t count, int64_t first = 1) {
  Tokens tokens;
  for (int64_t i = 0; i < count; ++i) tokens.push_back((first + i * 3) % 32);
  return tokens;
}

// Random settings from tiny to roomy.
Config random_config(const Philox& random) {
  const auto a = random.block(1), b = random.block(2), c = random.block(3);
  Config config;
  config.model.page_tokens = 2 + a[0] % 5;
  config.model.num_pages = 60 / config.model.page_tokens + 1 + a[1] % (a[1] % 4 == 0 ? 40 : 7);
  config.model.num_slots = 1 + a[2] % 8;
  config.model.window = 1 + a[3] % 6;
  config.model.slack = b[0] % 5;
  config.scheduler.max_running = 1 + b[1] % 8;
  config.scheduler.step_tokens = 1 + b[2] % 24;
  config.scheduler.prompt_tokens = 1 + b[3] % 40;
  config.scheduler.max_drafts = config.model.slack;
  config.scheduler.always_draft = c[0] % 2 == 0;
  config.scheduler.snapshot_prompts = c[1] % 2 == 0;
  config.scheduler.cache.snapshot_interval = config.model.page_tokens * (1 + c[2] % 3);
  config.scheduler.cache.snapshot_budget_bytes = c[3] % 3 == 0 ? 200 : 1 << 20;
  config.max_context = 60;
  config.store = c[0] / 2 % 3 == 0;
  return config;
}

Request random_request(const Philox& random, std::vector<Tokens>& prompts) {
  const auto a = random.block(10), b = random.block(11), c = random.block(12);
  Request request;
  if (!prompts.empty() && a[0] % 3 > 0) {
    request.prompt = prompts[a[1] % prompts.size()];
    request.prompt.resize(1 + a[2] % request.prompt.size());
  }
  for (uint32_t more = 1 + a[3] % 12; more > 0; --more) {
    request.prompt.push_back(1 + random.block(20 + more)[0] % 3);
  }
  request.prompt.resize(std::min<size_t>(request.prompt.size(), 50));
  request.max_tokens = 1 + b[0] % 25;
  request.n = b[1] % 4 == 0 ? 1 + b[1] / 4 % 4 : 1;
  request.sampling.temperature = b[2] % 2 == 0 ? 0 : 0.5;
  request.sampling.seed = b[3];
  request.ignore_eos = c[0] % 2 == 0;
  if (c[1] % 3 == 0) request.stop = {std::string(1, static_cast<char>('A' + c[1] / 3 % 26))};
  request.priority = static_cast<int>(c[2] % 3);
  request.client = std::string(1, static_cast<char>('a' + c[2] / 3 % 3));
  request.use_prefix_cache = c[3] % 6 > 0;
  return request;
}

struct Totals {
  int64_t preemptions = 0, cached = 0, accepted = 0, drafted = 0, cancelled = 0, answers = 0,
          from_disk = 0;
};

void run_random_schedule(uint64_t seed, Totals& totals) {
  const Philox random(seed, 0);
  World world(random_config(random));
  // Now and then a step of several sequences throws, half way through.
  const bool hiccups = seed % 5 == 0;
  int64_t runs = 0;
  world.model.on_run = [&](std::span<const SequenceStep> steps) {
    if (hiccups && ++runs % 7 == 0 && steps.size() > 1) {
      world.model.run_part(steps.first(steps.size() / 2));
      throw std::runtime_error("hiccup");
    }
  };
  struct Sent {
    uint64_t id;
    Request request;
    std::shared_ptr<Recorder> sink;
    int64_t cancel_at;
  };
  std::vector<Sent> sent;
  std::vector<Tokens> prompts;
  const int64_t count = 3 + random.block(4)[0] % 10;
  int64_t next = 0;
  for (int64_t step = 0; next < count || !world.scheduler.idle(); ++step) {
    ASSERT_LT(step, 5000) << "seed " << seed;
    const auto draw = Philox(seed, 1).block(static_cast<uint64_t>(step));
    while (next < count && (draw[0] % 3 == 0 || world.scheduler.idle())) {
      Request request = random_request(Philox(seed, 100 + static_cast<uint64_t>(next)), prompts);
      prompts.push_back(request.prompt);
      auto sink = world.add(request);
      sent.push_back({world.last_id, std::move(request), std::move(sink),
                      draw[1] % 6 == 0 ? step + draw[2] % 20 : -1});
      ++next;
      if (draw[3] % 2 == 0) break;
    }
    for (const Sent& one : sent) {
      if (one.cancel_at == step) world.scheduler.cancel(one.id);
    }
    world.scheduler.step();
    ASSERT_NO_THROW(world.scheduler.check_integrity()) << "seed " << seed;
  }
  for (const Sent& one : sent) {
    ASSERT_EQ(one.sink->finished, one.request.n) << "seed " << seed;
    for (const auto& [choice, answer] : one.sink->answers) {
      Answer expected = world.expected(one.request, choice);
      if (answer.finish == FinishReason::kCancelled) {
        ++totals.cancelled;
        ASSERT_LE(answer.tokens.size(), expected.tokens.size());
        expected.tokens.resize(answer.tokens.size());
        ASSERT_EQ(answer.tokens, expected.tokens) << "seed " << seed;
        continue;
      }
      ++totals.answers;
      ASSERT_EQ(answer, expected) << "seed " << seed << " request " << one.id << " choice "
                                  << choice;
    }
    // Once more, from what the caches kept.
    if (one.id % 4 != 0) continue;
    auto again = world.add(one.request);
    world.run_to_end();
    for (const auto& [choice, answer] : again->answers) {
      ASSERT_EQ(answer, world.expected(one.request, choice)) << "seed " << seed << " again";
    }
  }
  const EngineStats stats = world.scheduler.stats();
  EXPECT_EQ(stats.state_slots_free, stats.state_slots_total);
  EXPECT_EQ(stats.pages_free + stats.pages_cached, stats.pages_total);
  totals.preemptions += stats.preemptions;
  totals.cached += stats.cached_tokens;
  totals.drafted += stats.drafted;
  totals.from_disk += stats.disk_tokens;
  totals.accepted += stats.accepted;
}

TEST(Scheduler, RandomSchedulesGiveTheTokensOfEachRequestAlone) {
  log::set_level(log::Level::kError);
  Totals totals;
  for (uint64_t seed = 1; seed <= kSchedules; ++seed) {
    run_random_schedule(seed, totals);
    if (HasFatalFailure()) return;
  }
  const auto scale = static_cast<int64_t>(kSchedules);
  EXPECT_GT(totals.answers, 4 * scale);
  EXPECT_GT(totals.preemptions, scale);
  EXPECT_GT(totals.cached, 10 * scale);
  EXPECT_GT(totals.accepted, 2 * scale);
  EXPECT_GT(totals.drafted, totals.accepted);
  EXPECT_GT(totals.cancelled, scale / 5);
  EXPECT_GT(totals.from_disk, scale / 5);
  log::set_level(log::Level::kInfo);
}

TEST(Scheduler, RunningAnswersKeepTheirPaceWhileALongPromptArrives) {
  Config config;
  config.model.num_pages = 200;
  config.scheduler.step_tokens = 8;
  config.max_context = 700;
  World world(config);
  auto answer = world.add(plain(counting(3), 100));
  for (int i = 0; i < 4; ++i) world.scheduler.step();
  auto long_prompt = world.add(plain(counting(400, 2), 2));
  const Request brief = plain(counting(9, 5), 2);
  auto short_prompt = world.add(brief);
  const auto before = static_cast<int64_t>(answer->answers[0].tokens.size());
  int64_t rows = 0;
  world.model.on_run = [&](std::span<const SequenceStep> steps) {
    rows = 0;
    for (const SequenceStep& step : steps) rows += static_cast<int64_t>(step.tokens.size());
    EXPECT_LE(rows, 8);
  };
  for (int i = 0; i < 12; ++i) world.scheduler.step();
  EXPECT_EQ(static_cast<int64_t>(answer->answers[0].tokens.size()), before + 12);
  EXPECT_EQ(short_prompt->finished, 1) << "it does not wait for the long one";
  EXPECT_EQ(long_prompt->updates, 0);
  world.run_to_end();
  EXPECT_EQ(long_prompt->finished, 1);
  EXPECT_EQ(short_prompt->answers[0], world.expected(brief));
}

TEST(Scheduler, ClientsShareTheMachine) {
  Config config;
  config.scheduler.max_running = 1;
  World world(config);
  std::vector<std::pair<std::string, std::shared_ptr<Recorder>>> sent;
  const auto send = [&](const std::string& client, int priority) {
    Request request = plain(counting(5, static_cast<int64_t>(sent.size())), 5);
    request.client = client;
    request.priority = priority;
    sent.emplace_back(client, world.add(request));
  };
  for (int i = 0; i < 30; ++i) send("greedy", 0);
  for (int i = 0; i < 5; ++i) send("modest", 0);
  std::string order;
  std::set<size_t> seen;
  const auto note = [&] {
    for (size_t i = 0; i < sent.size(); ++i) {
      if (sent[i].second->finished > 0 && seen.insert(i).second) order += sent[i].first[0];
    }
  };
  for (int i = 0; i < 14; ++i) {
    world.scheduler.step();
    note();
  }
  send("urgent", 1);
  while (world.scheduler.step()) note();
  note();
  ASSERT_EQ(order.size(), 36u);
  const std::string first(order.substr(0, 11));
  EXPECT_EQ(std::ranges::count(first, 'm'), 5) << order;
  EXPECT_LT(order.find('u'), 4u) << order;
}

TEST(Scheduler, HigherPriorityPreemptsAndTheOtherResumes) {
  Config config;
  config.model.num_pages = 8;
  World world(config);
  const Request low = plain(counting(12), 16);
  Request high = plain(counting(16, 7), 12);
  high.priority = 1;
  auto first = world.add(low);
  for (int i = 0; i < 6; ++i) world.scheduler.step();
  auto second = world.add(high);
  while (second->finished == 0) world.scheduler.step();
  EXPECT_EQ(first->finished, 0);
  world.run_to_end();
  EXPECT_GT(world.scheduler.stats().preemptions, 0);
  EXPECT_EQ(first->answers[0], world.expected(low));
  EXPECT_EQ(second->answers[0], world.expected(high));
}

TEST(Scheduler, CancelAndDeadlineFreeEverythingWithinOneStep) {
  World world(Config{});
  Request request = plain(counting(9), 50);
  request.n = 3;
  request.use_prefix_cache = false;
  auto cancelled = world.add(request);
  for (int i = 0; i < 5; ++i) world.scheduler.step();
  EXPECT_EQ(world.scheduler.stats().running, 3);
  world.scheduler.cancel(world.last_id);
  world.scheduler.cancel(999);
  EXPECT_EQ(cancelled->finished, 3);
  EXPECT_EQ(world.scheduler.stats().pages_free, world.scheduler.stats().pages_total);
  EXPECT_EQ(world.scheduler.stats().state_slots_free, world.scheduler.stats().state_slots_total);
  request.deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(20);
  auto late = world.add(request);
  world.scheduler.step();
  while (std::chrono::steady_clock::now() < *request.deadline) continue;
  EXPECT_FALSE(world.scheduler.step());
  EXPECT_EQ(late->answers[2].finish, FinishReason::kDeadline);
  EXPECT_EQ(world.scheduler.stats().pages_free, world.scheduler.stats().pages_total);
  EXPECT_EQ(world.scheduler.stats().cancelled, 2);
}

TEST(Scheduler, AFailingStepFailsOnlyTheRequestThatMakesItFail) {
  log::set_level(log::Level::kError);
  World world(Config{});
  std::vector<Request> requests;
  std::vector<std::shared_ptr<Recorder>> sinks;
  for (int64_t i = 0; i < 4; ++i) requests.push_back(plain(counting(6, i), 12));
  requests[2].prompt[3] = 31;  // poison once it is run
  requests[1].prompt[3] = 30;
  for (const Request& request : requests) sinks.push_back(world.add(request));
  int hiccups = 1;
  int64_t steps = 0;
  world.model.on_run = [&](std::span<const SequenceStep> all) {
    for (const SequenceStep& step : all) {
      for (const int64_t token : step.tokens) HADAL_CHECK(token != 31, "poison");
    }
    if (++steps == 9 && hiccups-- > 0) throw std::runtime_error("a passing trouble");
  };
  requests[0].sampling.temperature = 0;
  world.run_to_end();
  EXPECT_EQ(sinks[2]->answers[0].finish, FinishReason::kError);
  EXPECT_NE(sinks[2]->answers[0].error.find("poison"), std::string::npos);
  int64_t poisoned = 0;
  for (size_t i = 0; i < 4; ++i) {
    const Answer expected = world.expected(requests[i]);
    // An answer may draw the poisoned token itself.
    const bool poison = std::ranges::find(expected.tokens, 31) != expected.tokens.end() || i == 2;
    poisoned += poison ? 1 : 0;
    if (!poison) {
      EXPECT_EQ(sinks[i]->answers[0], expected);
    }
  }
  EXPECT_LT(poisoned, 3);
  EXPECT_GE(world.scheduler.stats().failed, 1);
  log::set_level(log::Level::kInfo);
}

TEST(Scheduler, ASinkThatThrowsEndsItsRequestOnly) {
  World world(Config{});
  auto bad = world.add(plain(counting(4), 40));
  bad->throws = true;
  const Request request = plain(counting(4, 9), 8);
  auto good = world.add(request);
  world.run_to_end();
  EXPECT_EQ(bad->updates, 1);
  EXPECT_EQ(good->answers[0], world.expected(request));
  EXPECT_EQ(world.scheduler.stats().cancelled, 1);
}

TEST(Scheduler, ChoicesShareThePrompt) {
  World world(Config{});
  Request request = plain(counting(17), 3);
  request.n = 4;
  request.sampling.temperature = 1;
  int64_t rows = 0;
  world.model.on_run = [&](std::span<const SequenceStep> steps) {
    for (const SequenceStep& step : steps) rows += static_cast<int64_t>(step.tokens.size());
  };
  auto sink = world.add(request);
  world.run_to_end();
  EXPECT_EQ(rows, 17 + 4 * 2);
  std::set<Tokens> different;
  for (int64_t choice = 0; choice < 4; ++choice) {
    EXPECT_EQ(sink->answers[choice], world.expected(request, choice));
    different.insert(sink->answers[choice].tokens);
  }
  EXPECT_GT(different.size(), 2u);
  EXPECT_EQ(world.scheduler.stats().prompt_tokens, 17);
}

TEST(Scheduler, ConversationsAreReusedToTheLastToken) {
  World world(Config{});
  Tokens conversation = counting(10);
  for (int64_t turn = 0; turn < 5; ++turn) {
    auto sink = world.add(plain(conversation, 6));
    world.run_to_end();
    EXPECT_EQ(sink->cache.prompt_tokens, static_cast<int64_t>(conversation.size()));
    // All but the last drawn token, which was never run, and the new message.
    EXPECT_EQ(sink->cache.cached_tokens,
              turn == 0 ? 0 : static_cast<int64_t>(conversation.size()) - 4);
    EXPECT_STREQ(sink->cache.miss, "new");
    const Tokens& answer = sink->answers[0].tokens;
    conversation.insert(conversation.end(), answer.begin(), answer.end());
    for (int64_t i = 0; i < 3; ++i) conversation.push_back(5 + turn + i);
  }
  // The same prompt again: all but its last token.
  auto again = world.add(plain(conversation, 1));
  auto once_more = world.add(plain(conversation, 1));
  world.run_to_end();
  auto third = world.add(plain(conversation, 1));
  world.run_to_end();
  EXPECT_EQ(third->cache.cached_tokens, static_cast<int64_t>(conversation.size()) - 1);
  EXPECT_STREQ(third->cache.miss, "tail");
}

TEST(Scheduler, SpeculationTakesFewerStepsOrStops) {
  for (const uint64_t right : {uint64_t{256}, uint64_t{0}}) {
    Config config;
    config.scheduler.max_drafts = 3;
    config.scheduler.cache.snapshot_interval = 64;
    config.scheduler.always_draft = right == 256;
    config.drafts_right = right;
    config.max_context = 230;
    config.model.num_pages = 100;
    World world(config);
    const Request request = plain(counting(5), 200);
    auto sink = world.add(request);
    world.run_to_end();
    EXPECT_EQ(sink->answers[0], world.expected(request));
    const EngineStats stats = world.scheduler.stats();
    if (right == 256) {
      EXPECT_EQ(stats.accepted, stats.drafted);
      EXPECT_LT(stats.steps, 60);
    } else {
      EXPECT_LT(stats.drafted, 80) << "it looks again now and then";
      EXPECT_GE(stats.drafted, 4);
    }
  }
}

TEST(Scheduler, ALargeRequestIsNotStarvedBySmallOnes) {
  Config config;
  config.model.num_pages = 20;
  World world(config);
  for (int64_t i = 0; i < 6; ++i) world.add(plain(counting(6, i), 10));
  Request large = plain(counting(60), 4);
  large.client = "large";
  auto sink = world.add(large);
  int64_t steps = 0;
  for (; sink->finished == 0 && steps < 400; ++steps) {
    world.scheduler.step();
    // Small ones of new clients keep coming.
    Request small = plain(counting(6, steps), 10);
    small.client = concat("client ", steps);
    world.add(small);
  }
  EXPECT_LT(steps, 120);
  EXPECT_EQ(sink->answers[0], world.expected(large));
}

TEST(Scheduler, RefusesWhatIsNotValid) {
  World world(Config{});
  const auto refuse = [&](auto change) {
    Request request = plain(counting(4), 4);
    change(request);
    EXPECT_THROW(world.scheduler.prepare(request, nullptr), InputError);
  };
  refuse([](Request& request) { request.prompt.clear(); });
  refuse([](Request& request) { request.prompt[0] = 32; });
  refuse([](Request& request) { request.prompt = counting(200); });
  refuse([](Request& request) { request.max_tokens = 0; });
  refuse([](Request& request) { request.n = 5; });
  refuse([](Request& request) { request.sampling.top_p = 0; });
  refuse([](Request& request) { request.sampling.temperature = -1; });
  refuse([](Request& request) { request.sampling.logit_bias = {{-1, 2.0}}; });
}

}  // namespace
}  // namespace hadal::engine
