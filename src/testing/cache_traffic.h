// Conversations over the scheduler with a model that computes nothing, in the shapes of real
// caches: how much of what came before a budget of bytes lets come again, and how much a cache that
// knows the future would. Included by tests only.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <set>
#include <span>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "engine_core/schedule/scheduler.h"
#include "testing/scripted_model.h"

namespace hadal::testing::traffic {

using Tokens = std::vector<int64_t>;

/// Bytes of a model's cache, as docs/kv_cache.md counts them.
struct Shape {
  int64_t page_tokens = 256, page_bytes = 0, state_bytes = 0;
  int64_t border_snapshot = 0;  ///< at the end of a page
  int64_t csa_row = 0;          ///< of p mod 4, besides
  int64_t hca_row = 0;          ///< of p mod 128
  int64_t snapshot_bytes(int64_t pos) const {
    return border_snapshot + pos % 4 * csa_row + pos % 128 * hca_row;
  }
};
inline constexpr Shape kNano{.page_bytes = 52'656,
                             .state_bytes = 713'280,
                             .border_snapshot = 253'952,
                             .csa_row = 12'288,
                             .hca_row = 3'072};

/// Pages and slots without bytes, a model without numbers.
class Nothing final : public engine_core::CacheMemory, public engine_core::Runner {
 public:
  Nothing(const Shape& shape, int64_t num_pages, int64_t num_slots, int64_t vocab_size = 8)
      : shape_(shape), num_pages_(num_pages), num_slots_(num_slots), vocab_size_(vocab_size) {}

  int64_t page_tokens() const override { return shape_.page_tokens; }
  int64_t num_pages() const override { return num_pages_; }
  int64_t num_slots() const override { return num_slots_; }
  int64_t page_bytes() const override { return shape_.page_bytes; }
  int64_t state_bytes() const override { return shape_.state_bytes; }
  int64_t snapshot_bytes(int64_t pos) const override { return shape_.snapshot_bytes(pos); }
  void copy_page(int64_t, int64_t) override {}
  void read_page(int64_t, std::span<std::byte>) const override {}
  void write_page(int64_t, std::span<const std::byte>) override {}
  void save_snapshot(int64_t, int64_t, std::span<std::byte>) const override {}
  void load_snapshot(int64_t, int64_t, std::span<const std::byte>) override {}

  int64_t vocab_size() const override { return vocab_size_; }
  int64_t slack() const override { return 0; }
  Ticket launch(std::span<const engine_core::SequenceStep> steps) override {
    in_flight_ = steps;
    return 0;
  }
  /// Draws what `answers` says of the seed.
  engine_core::StepResult collect(Ticket) override {
    engine_core::StepResult result;
    for (const engine_core::SequenceStep& step : in_flight_) {
      computed += std::ssize(step.tokens);
      engine_core::SequenceResult& own = result.sequences.emplace_back();
      for (const engine_core::Draw& draw : step.draws)
        own.drawn.push_back({.token = (*answers.at(draw.sampling->seed))[draw.answer.size()]});
    }
    return result;
  }
  std::span<const float> logits(int64_t, int64_t) const override { return {}; }
  void rewind(int64_t, int64_t) override {}

  int64_t computed = 0;  ///< tokens
  std::map<uint64_t, const Tokens*> answers;

 private:
  Shape shape_;
  int64_t num_pages_, num_slots_, vocab_size_;
  std::span<const engine_core::SequenceStep> in_flight_;
};

/// One turn: all tokens so far and the answer that follows.
struct Turn {
  int64_t conversation = 0, family = -1;  ///< -1: shares its beginning with nobody
  int64_t shared = 0;                     ///< tokens of the family's beginning
  Tokens prompt, answer;
  engine_core::CacheKey key = {};
};
/// Turns of a batch run together, batches one behind the other.
using Traffic = std::vector<std::vector<Turn>>;

class Writer {
 public:
  explicit Writer(uint64_t seed) : random_(seed) {}
  Tokens draw(int64_t count) {
    Tokens tokens(static_cast<size_t>(count));
    for (int64_t& token : tokens) token = 1 + static_cast<int64_t>(random_() % 7);
    return tokens;
  }
  int64_t below(int64_t limit) {
    return static_cast<int64_t>(random_() % static_cast<uint64_t>(limit));
  }
  double unit() { return static_cast<double>(random_() >> 11) * 0x1p-53; }

 private:
  std::mt19937_64 random_;
};

/// A conversation that grows turn by turn.
struct Talk {
  int64_t number = 0, family = -1, shared = 0;
  Tokens tokens;
  Turn next(Writer& writer, int64_t question, int64_t answer) {
    Turn turn{
        .conversation = number, .family = family, .shared = shared, .prompt = {}, .answer = {}};
    const Tokens more = writer.draw(question);
    tokens.insert(tokens.end(), more.begin(), more.end());
    turn.prompt = tokens;
    turn.answer = writer.draw(answer);
    tokens.insert(tokens.end(), turn.answer.begin(), turn.answer.end());
    return turn;
  }
};

struct Counts {
  int64_t prompt = 0, cached = 0, reusable = 0;
  double share() const {
    return reusable == 0 ? 1.0 : static_cast<double>(cached) / static_cast<double>(reusable);
  }
};

/// What this scheduler makes of it.
class Served {
 public:
  Served(const Shape& shape,
         int64_t num_pages,
         int64_t num_slots,
         const engine_core::SchedulerOptions& options,
         int64_t vocab_size = 8,
         engine_core::AnswerCuts* cuts = nullptr)
      : nothing_(shape, num_pages, num_slots, vocab_size),
        scheduler_({.model_name = "nothing",
                    .vocab_size = vocab_size,
                    .max_context = num_pages * shape.page_tokens,
                    .max_choices = 1,
                    .eos_token = 0},
                   options,
                   {.runner = nothing_, .memory = nothing_, .filters = filters_, .cuts = cuts}) {}

  /// Reports of a batch, in order.
  std::vector<engine_core::CacheReport> run(const std::vector<Turn>& batch) {
    std::vector<std::shared_ptr<Reader>> readers;
    for (const Turn& turn : batch) {
      engine_core::Request request;
      request.prompt = turn.prompt;
      request.max_tokens = std::ssize(turn.answer);
      request.ignore_eos = true;
      request.cache_key = turn.key;
      request.client = turn.key.client;
      request.sampling.seed = last_id_ + 1;
      nothing_.answers[request.sampling.seed] = &turn.answer;
      readers.push_back(std::make_shared<Reader>());
      scheduler_.add(++last_id_, scheduler_.prepare(std::move(request), readers.back()));
    }
    while (scheduler_.step()) {
    }
    scheduler_.check_integrity();
    nothing_.answers.clear();
    std::vector<engine_core::CacheReport> reports;
    for (const auto& reader : readers) {
      EXPECT_EQ(reader->error, "");
      reports.push_back(reader->report);
    }
    return reports;
  }
  Counts run(const Traffic& all) {
    Counts counts;
    for (const std::vector<Turn>& batch : all) {
      for (const engine_core::CacheReport& report : run(batch)) {
        counts.prompt += report.prompt_tokens;
        counts.cached += report.cached_tokens;
      }
    }
    return counts;
  }
  const engine_core::Scheduler& scheduler() const { return scheduler_; }

 private:
  struct Reader final : engine_core::Sink {
    void on_update(engine_core::Update update) override {
      report = update.cache;
      error += update.error;
    }
    engine_core::CacheReport report;
    std::string error;
  };
  Nothing nothing_;
  ScriptedFilters filters_;
  engine_core::Scheduler scheduler_;
  uint64_t last_id_ = 0;
};

/// What bytes allow: whoever keeps conversations knows which comes again when, keeps one state each
/// and one for each family's beginning, and gives up what is used last, or what saves the least for
/// its bytes and time.
class Oracle {
 public:
  Oracle(const Shape& shape, int64_t bytes, bool by_density)
      : shape_(shape), bytes_(bytes), by_density_(by_density) {}

  Counts run(const Traffic& all) {
    for (size_t batch = 0; batch < all.size(); ++batch)
      for (const Turn& turn : all[batch]) {
        uses_[{false, turn.conversation}].push_back(static_cast<int64_t>(batch));
        if (turn.family >= 0) uses_[{true, turn.family}].push_back(static_cast<int64_t>(batch));
      }
    Counts counts;
    for (size_t now = 0; now < all.size(); ++now) {
      int64_t running = 0;
      for (const Turn& turn : all[now]) {
        const auto own = kept_.find({false, turn.conversation});
        const auto family = kept_.find({true, turn.family});
        int64_t cached = 0;
        if (family != kept_.end()) cached = floor_page(turn.shared);
        if (own != kept_.end()) cached = own->second.tokens;
        counts.prompt += std::ssize(turn.prompt);
        counts.cached += std::min(cached, std::ssize(turn.prompt) - 1);
        counts.reusable += std::min(seen(turn), std::ssize(turn.prompt) - 1);
        running += pages(size_of(turn) - (turn.family >= 0 ? floor_page(turn.shared) : 0)) *
                   shape_.page_bytes;
      }
      for (const Turn& turn : all[now]) {
        kept_[{false, turn.conversation}] = {
            .tokens = size_of(turn) - 1, .family = turn.family, .shared = floor_page(turn.shared)};
        if (turn.family >= 0)
          kept_[{true, turn.family}] = {
              .tokens = floor_page(turn.shared), .family = -1, .shared = 0};
        seen_[turn.conversation] = size_of(turn) - 1;
        families_[turn.family] = floor_page(turn.shared);
      }
      const int64_t next = now + 1 < all.size() ? next_running(all[now + 1]) : 0;
      shrink(static_cast<int64_t>(now), bytes_ - std::max(running, next));
    }
    return counts;
  }

 private:
  using Key = std::pair<bool, int64_t>;  ///< a family's beginning or not; its number
  struct Kept {
    int64_t tokens = 0, family = -1, shared = 0;
  };
  static int64_t size_of(const Turn& turn) {
    return std::ssize(turn.prompt) + std::ssize(turn.answer);
  }
  int64_t floor_page(int64_t tokens) const {
    return tokens / shape_.page_tokens * shape_.page_tokens;
  }
  int64_t pages(int64_t tokens) const {
    return (tokens + shape_.page_tokens - 1) / shape_.page_tokens;
  }
  int64_t seen(const Turn& turn) const {
    const auto own = seen_.find(turn.conversation);
    if (own != seen_.end()) return own->second;
    const auto family = turn.family >= 0 ? families_.find(turn.family) : families_.end();
    return family != families_.end() ? family->second : 0;
  }
  int64_t next_running(const std::vector<Turn>& batch) const {
    int64_t bytes = 0;  // what a resumed one has in memory already is no more
    for (const Turn& turn : batch) {
      const auto own = kept_.find({false, turn.conversation});
      const int64_t known = own != kept_.end() ? own->second.tokens : floor_page(turn.shared);
      bytes += pages(size_of(turn) - known) * shape_.page_bytes;
    }
    return bytes;
  }
  int64_t next_use(const Key& key, int64_t now) const {
    const std::vector<int64_t>& uses = uses_.at(key);
    const auto next = std::ranges::upper_bound(uses, now);
    return next == uses.end() ? -1 : *next;
  }
  int64_t bytes_of(const Kept& kept, bool pays_family) const {
    const int64_t own = pays_family ? kept.tokens : kept.tokens - kept.shared;
    return pages(own) * shape_.page_bytes + shape_.snapshot_bytes(kept.tokens);
  }
  // Keeps the best until the bytes are used up.
  void shrink(int64_t now, int64_t budget) {
    std::vector<std::pair<double, Key>> order;
    for (const auto& [key, kept] : kept_) {
      const int64_t next = next_use(key, now);
      if (next < 0) continue;
      const auto wait = static_cast<double>(next - now);
      const double density = static_cast<double>(kept.tokens - kept.shared) /
                             (wait * static_cast<double>(bytes_of(kept, kept.family < 0)));
      order.emplace_back(by_density_ ? -density : wait, key);
    }
    std::ranges::sort(order);
    std::map<Key, Kept> best;
    std::set<int64_t> paid;
    for (const auto& [rank, key] : order) {
      const Kept& kept = kept_.at(key);
      int64_t bytes = bytes_of(kept, kept.family < 0);
      // The beginning's pages lie there once, whoever needs them.
      const int64_t family = key.first ? key.second : kept.family;
      if (family >= 0) {
        const int64_t beginning = key.first ? kept.tokens : kept.shared;
        if (key.first) bytes -= pages(beginning) * shape_.page_bytes;
        if (!paid.contains(family)) bytes += pages(beginning) * shape_.page_bytes;
      }
      if (bytes > budget) continue;
      budget -= bytes;
      if (family >= 0) paid.insert(family);
      best.emplace(key, kept);
    }
    kept_ = std::move(best);
  }

  const Shape shape_;
  const int64_t bytes_;
  const bool by_density_;
  std::map<Key, std::vector<int64_t>> uses_;  ///< batches
  std::map<Key, Kept> kept_;
  std::map<int64_t, int64_t> seen_, families_;
};

/// The better of two ways to use the future.
inline Counts oracle(const Shape& shape, int64_t bytes, const Traffic& all) {
  const Counts a = Oracle(shape, bytes, false).run(all), b = Oracle(shape, bytes, true).run(all);
  return a.cached >= b.cached ? a : b;
}

// --- traffic

/// `count` conversations, one turn each by turns, until each has `size` tokens; then `more` short
/// turns each.
inline Traffic in_turns(int64_t count, int64_t size, int64_t turns, int64_t more, uint64_t seed) {
  Writer writer(seed);
  std::vector<Talk> talks(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) talks[static_cast<size_t>(i)].number = i;
  Traffic all;
  for (int64_t turn = 0; turn < turns; ++turn)
    for (Talk& talk : talks) {
      const int64_t answer = 60 + writer.below(80);
      all.push_back({talk.next(writer, size / turns - answer + writer.below(40), answer)});
    }
  for (int64_t turn = 0; turn < more; ++turn)
    for (Talk& talk : talks) all.push_back({talk.next(writer, 40 + writer.below(120), 60)});
  return all;
}

/// `count` conversations behind one beginning, `together` at a time, in changing order.
inline Traffic with_beginning(
    int64_t count, int64_t shared, int64_t turns, int64_t together, uint64_t seed) {
  Writer writer(seed);
  const Tokens beginning = writer.draw(shared);
  std::vector<Talk> talks(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i)
    talks[static_cast<size_t>(i)] = {
        .number = i, .family = 0, .shared = shared, .tokens = beginning};
  Traffic all;
  std::vector<size_t> order(talks.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  all.push_back({talks[0].next(writer, 200, 60)});
  for (int64_t turn = 0; turn < turns; ++turn) {
    for (size_t i = order.size(); i > 1; --i)
      std::swap(order[i - 1], order[static_cast<size_t>(writer.below(static_cast<int64_t>(i)))]);
    for (size_t i = 0; i < order.size(); ++i) {
      if (i % static_cast<size_t>(together) == 0) all.emplace_back();
      all.back().push_back(
          talks[order[i]].next(writer, 150 + writer.below(500), 40 + writer.below(160)));
    }
  }
  return all;
}

/// People: conversations begin and end, some are quick and some slow, a few prompts are common.
inline Traffic people(int64_t requests, int64_t active, uint64_t seed) {
  Writer writer(seed);
  std::vector<Tokens> beginnings;
  for (int i = 0; i < 3; ++i) beginnings.push_back(writer.draw(1000 + 700 * i));
  struct Open {
    Talk talk;
    int64_t left = 0;
    double pace = 1, due = 0;
  };
  std::vector<Open> open;
  int64_t number = 0;
  double clock = 0;
  Traffic all;
  while (std::ssize(all) < requests) {
    while (std::ssize(open) < active) {
      const auto family = static_cast<size_t>(writer.below(4));
      Open one;
      one.talk.number = number++;
      if (family < beginnings.size()) {
        one.talk.family = static_cast<int64_t>(family);
        one.talk.tokens = beginnings[family];
        one.talk.shared = std::ssize(one.talk.tokens);
      }
      one.left = 1 + static_cast<int64_t>(-7.0 * std::log(1 - writer.unit()));
      one.pace = std::exp(2.5 * writer.unit());
      one.due = clock + writer.unit() * static_cast<double>(active);
      open.push_back(std::move(one));
    }
    auto first = std::ranges::min_element(open, {}, &Open::due);
    clock = first->due;
    all.push_back({first->talk.next(writer, 60 + writer.below(900), 40 + writer.below(200))});
    first->due = clock - std::log(1 - writer.unit()) * first->pace;
    if (--first->left == 0) open.erase(first);
  }
  return all;
}

}  // namespace hadal::testing::traffic
