// A model and its caches for tests: logits are a hash of all tokens so far, computed through what
// pages and states hold, so that any mistake in bookkeeping changes them.
//
// Each position leaves one 8-byte entry in its page; a state is a ring of the last `window` hashes
// and `slack` more. Included by tests only.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/math.h"
#include "engine_core/prefix_store.h"
#include "engine_core/runner.h"
#include "testing/scripted_sampler.h"

namespace hadal::testing {

struct ScriptedOptions {
  int64_t page_tokens = 4;
  int64_t num_pages = 64;
  int64_t num_slots = 8;
  int64_t vocab_size = 32;
  int64_t window = 3;
  int64_t slack = 4;
  bool whole_windows = false;  ///< the ring holds a page
};

class ScriptedModel : public engine_core::CacheMemory, public engine_core::Runner {
 public:
  explicit ScriptedModel(const ScriptedOptions& options)
      : options_(options),
        pages_(static_cast<size_t>(options.num_pages * options.page_tokens), 0xdead),
        states_(static_cast<size_t>(options.num_slots)) {
    for (State& state : states_) state.ring.assign(static_cast<size_t>(ring()), 0xbeef);
  }

  /// Before each step is computed; may throw.
  std::function<void(std::span<const engine_core::SequenceStep>)> on_run;
  std::function<void()> on_launch;
  bool in_flight() const { return !in_flight_.empty(); }
  uint64_t weights = 0;  ///< bears on every token's hash

  static uint64_t mix(uint64_t state, uint64_t value) { return scripted_mix(state, value); }

  /// Logits after `tokens`, without caches: what every schedule must give.
  std::vector<float> reference(std::span<const int64_t> tokens) const {
    std::vector<uint64_t> hashes;
    uint64_t hash = 0;
    for (const int64_t token : tokens) {
      hash = mix(hash, static_cast<uint64_t>(token) + (weights << 32));
      hashes.push_back(hash);
    }
    uint64_t all = 1;
    for (const uint64_t entry : hashes) all = mix(all, entry);
    const auto size = static_cast<int64_t>(hashes.size());
    for (int64_t back = std::max(size - options_.window, int64_t{0}); back < size; ++back) {
      all = mix(all, hashes[static_cast<size_t>(back)]);
    }
    return spread(all);
  }

  int64_t page_tokens() const override { return options_.page_tokens; }
  int64_t num_pages() const override { return options_.num_pages; }
  int64_t num_slots() const override { return options_.num_slots; }
  int64_t page_bytes() const override { return options_.page_tokens * 8; }
  int64_t state_bytes() const override { return 8 + ring() * 8; }
  int64_t snapshot_bytes(int64_t pos) const override {
    const int64_t unfinished = options_.whole_windows ? pos % options_.page_tokens : 0;
    return std::min(pos, std::max(options_.window, unfinished)) * 8;
  }
  int64_t window_bytes() const override { return options_.whole_windows ? page_bytes() : 0; }
  int64_t window_pages() const override { return ceil_div(options_.window, options_.page_tokens); }

  void copy_page(int64_t from, int64_t to) override {
    std::ranges::copy(page(from), page(to).begin());
  }
  void read_page(int64_t number, std::span<std::byte> out) const override {
    const auto bytes =
        std::as_bytes(std::span(pages_).subspan(static_cast<size_t>(number * options_.page_tokens),
                                                static_cast<size_t>(options_.page_tokens)));
    HADAL_CHECK(out.size() == bytes.size(), "scripted: page of ", out.size(), " bytes");
    std::ranges::copy(bytes, out.begin());
  }
  void write_page(int64_t number, std::span<const std::byte> in) override {
    const auto bytes = std::as_writable_bytes(page(number));
    HADAL_CHECK(in.size() == bytes.size(), "scripted: page of ", in.size(), " bytes");
    std::ranges::copy(in, bytes.begin());
  }
  void save_snapshot(int64_t slot, int64_t pos, std::span<std::byte> out) const override {
    check_free(slot);
    const State& state = states_.at(static_cast<size_t>(slot));
    HADAL_CHECK(state.pos == pos, "scripted: state at ", state.pos, ", snapshot of ", pos);
    HADAL_CHECK(static_cast<int64_t>(out.size()) == snapshot_bytes(pos), "scripted: snapshot size");
    for (int64_t i = 0; i < snapshot_bytes(pos) / 8; ++i) {
      std::memcpy(out.data() + i * 8, &state.ring[index(pos - 1 - i)], 8);
    }
  }
  void load_snapshot(int64_t slot, int64_t pos, std::span<const std::byte> in) override {
    check_free(slot);
    State& state = states_.at(static_cast<size_t>(slot));
    HADAL_CHECK(static_cast<int64_t>(in.size()) == snapshot_bytes(pos), "scripted: snapshot size");
    state.pos = pos;
    state.ring.assign(static_cast<size_t>(ring()), 0xbeef);
    for (int64_t i = 0; i < snapshot_bytes(pos) / 8; ++i) {
      std::memcpy(&state.ring[index(pos - 1 - i)], in.data() + i * 8, 8);
    }
  }
  void save_window(int64_t slot, int64_t pos, std::span<std::byte> out) const override {
    check_free(slot);
    const State& state = states_.at(static_cast<size_t>(slot));
    HADAL_CHECK(state.pos == pos && pos > 0 && pos % options_.page_tokens == 0,
                "scripted: state at ", state.pos, ", window at ", pos);
    HADAL_CHECK(static_cast<int64_t>(out.size()) == window_bytes(), "scripted: window size");
    for (int64_t i = 0; i < options_.page_tokens; ++i) {
      const uint64_t hash = state.ring[index(pos - 1 - i)];
      HADAL_CHECK(hash != 0xbeef, "scripted: a window with a hole before ", pos);
      std::memcpy(out.data() + i * 8, &hash, 8);
    }
  }
  void load_window(int64_t slot, int64_t pos, std::span<const std::byte> in) override {
    State& state = states_.at(static_cast<size_t>(slot));
    HADAL_CHECK(static_cast<int64_t>(in.size()) == window_bytes(), "scripted: window size");
    if (state.pos != pos - options_.page_tokens) state.ring.assign(state.ring.size(), 0xbeef);
    state.pos = pos;
    for (int64_t i = 0; i < options_.page_tokens; ++i) {
      std::memcpy(&state.ring[index(pos - 1 - i)], in.data() + i * 8, 8);
    }
  }
  bool can_rebuild() const override { return true; }
  int64_t rebuild_start(int64_t pos) const override {
    return std::max(pos - options_.window, int64_t{0});
  }
  void rebuild(int64_t slot,
               std::span<const int64_t> tokens,
               std::span<const int64_t> pages,
               int64_t start,
               int64_t count) override {
    State& state = states_.at(static_cast<size_t>(slot));
    HADAL_CHECK(std::ssize(tokens) == std::ssize(pages) * options_.page_tokens,
                "scripted: rebuilt inside a page");
    const bool first = start == rebuild_start(std::ssize(tokens));
    HADAL_CHECK(first || start == state.pos, "scripted: rebuilt from ", start);
    if (first) state.ring.assign(static_cast<size_t>(ring()), 0xbeef);
    state.pos = start + count;
    most_rebuilt = std::max(most_rebuilt, count);
    // An entry is the hash itself: the window is in the last pages.
    for (int64_t pos = start; pos < state.pos; ++pos) {
      state.ring[index(pos)] = page(pages[static_cast<size_t>(
          pos / options_.page_tokens)])[static_cast<size_t>(pos % options_.page_tokens)];
    }
  }
  int64_t most_rebuilt = 0;  ///< tokens in one piece

  int64_t vocab_size() const override { return options_.vocab_size; }
  int64_t slack() const override { return options_.slack; }
  Ticket launch(std::span<const engine_core::SequenceStep> steps) override {
    HADAL_CHECK(in_flight_.empty(), "scripted: two steps at once");
    in_flight_.assign(steps.begin(), steps.end());
    given_ = digest_of(steps);
    if (on_launch) on_launch();
    return ++ticket_;
  }
  engine_core::StepResult collect(Ticket ticket) override {
    const std::vector<engine_core::SequenceStep> steps = std::exchange(in_flight_, {});
    HADAL_CHECK(ticket == ticket_ && !steps.empty(), "scripted: no step ", ticket);
    HADAL_CHECK(digest_of(steps) == given_, "scripted: a step was changed while it ran");
    if (on_run) on_run(steps);
    return run_part(steps);
  }
  /// A step without on_run.
  engine_core::StepResult run_part(std::span<const engine_core::SequenceStep> steps) {
    logits_.assign(steps.size(), {});
    engine_core::StepResult result;
    result.sequences.resize(steps.size());
    for (size_t i = 0; i < steps.size(); ++i) {
      Rows all;
      run_one(steps[i], logits_[i], all);
      for (const engine_core::Draw& draw : steps[i].draws)
        result.sequences[i].drawn.push_back(
            ScriptedSampler::sample(draw, logits_[i].at(static_cast<size_t>(draw.row))));
      const engine_core::ScoredTokens& scored = steps[i].scored;
      for (size_t t = 0; t < scored.targets.size(); ++t)
        result.sequences[i].scores.push_back(ScriptedSampler().score(
            all.at(static_cast<size_t>(scored.from) + t), scored.targets[t], scored.top));
    }
    return result;
  }
  std::span<const float> logits(int64_t sequence, int64_t token) const override {
    return logits_.at(static_cast<size_t>(sequence)).at(static_cast<size_t>(token));
  }
  void rewind(int64_t slot, int64_t pos) override {
    HADAL_CHECK(in_flight_.empty(), "scripted: rewind while a step runs");
    State& state = states_.at(static_cast<size_t>(slot));
    HADAL_CHECK(pos <= state.pos && state.pos - pos <= options_.slack, "scripted: rewind from ",
                state.pos, " to ", pos);
    state.pos = pos;
  }

 private:
  struct State {
    int64_t pos = 0;
    std::vector<uint64_t> ring;
  };

  int64_t ring() const {
    const int64_t page = options_.whole_windows ? options_.page_tokens : 0;
    return std::max(options_.window, page) + options_.slack;
  }
  size_t index(int64_t pos) const { return static_cast<size_t>(pos % ring()); }
  std::span<uint64_t> page(int64_t number) {
    HADAL_CHECK(number >= 0 && number < options_.num_pages, "scripted: no page ", number);
    return std::span(pages_).subspan(static_cast<size_t>(number * options_.page_tokens),
                                     static_cast<size_t>(options_.page_tokens));
  }
  std::vector<float> spread(uint64_t all) const {
    std::vector<float> logits;
    for (int64_t token = 0; token < options_.vocab_size; ++token) {
      logits.push_back(static_cast<float>(mix(all, static_cast<uint64_t>(token)) >> 40));
    }
    return logits;
  }

  /// Of all that must not change while a step runs: all but the masks.
  static uint64_t digest_of(std::span<const engine_core::SequenceStep> steps) {
    uint64_t digest = 0;
    const auto add = [&](std::span<const int64_t> numbers) {
      for (const int64_t number : numbers) digest = mix(digest, static_cast<uint64_t>(number));
    };
    for (const engine_core::SequenceStep& step : steps) {
      for (const auto numbers : {step.tokens, step.pages, step.scored.targets}) add(numbers);
      for (const engine_core::Draw& draw : step.draws) {
        for (const auto numbers : {draw.prompt, draw.answer, draw.ahead, draw.avoided})
          add(numbers);
        const int64_t numbers[] = {draw.row, draw.choice, draw.pos, draw.top_logprobs};
        add(numbers);
        digest = mix(digest, draw.sampling->seed);
      }
    }
    return digest;
  }
  /// Nobody may touch a state or a page that a step in flight has.
  void check_free(int64_t slot) const {
    for (const engine_core::SequenceStep& step : in_flight_)
      HADAL_CHECK(step.slot != slot, "scripted: slot ", slot, " is used while its step runs");
  }

  using Rows = std::vector<std::vector<float>>;
  void run_one(const engine_core::SequenceStep& step, Rows& logits, Rows& scored) {
    State& state = states_.at(static_cast<size_t>(step.slot));
    const auto count = static_cast<int64_t>(step.tokens.size());
    HADAL_CHECK(count > 0 && step.num_logits <= count, "scripted: empty step");
    HADAL_CHECK(static_cast<int64_t>(step.pages.size()) ==
                    ceil_div(step.start + count, options_.page_tokens),
                "scripted: ", step.pages.size(), " pages for ", step.start + count, " tokens");
    if (step.start == 0) state.pos = 0;
    HADAL_CHECK(state.pos == step.start, "scripted: state at ", state.pos, ", step at ",
                step.start);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t pos = step.start + i;
      const uint64_t before = pos == 0 ? 0 : state.ring[index(pos - 1)];
      const uint64_t hash =
          mix(before, static_cast<uint64_t>(step.tokens[static_cast<size_t>(i)]) + (weights << 32));
      state.ring[index(pos)] = hash;
      state.pos = pos + 1;
      page(step.pages[static_cast<size_t>(pos / options_.page_tokens)])[static_cast<size_t>(
          pos % options_.page_tokens)] = hash;
      const bool asked = i >= count - step.num_logits;
      if (!asked && step.scored.targets.empty()) continue;
      uint64_t all = 1;
      for (int64_t past = 0; past <= pos; ++past) {
        all = mix(
            all,
            page(step.pages[static_cast<size_t>(past / options_.page_tokens)])[static_cast<size_t>(
                past % options_.page_tokens)]);
      }
      for (int64_t back = std::max(pos + 1 - options_.window, int64_t{0}); back <= pos; ++back) {
        all = mix(all, state.ring[index(back)]);
      }
      if (!step.scored.targets.empty()) scored.push_back(spread(all));
      if (asked) logits.push_back(spread(all));
    }
  }

  ScriptedOptions options_;
  std::vector<uint64_t> pages_;  ///< [num_pages, page_tokens]
  std::vector<State> states_;
  std::vector<Rows> logits_;
  Ticket ticket_ = 0;
  std::vector<engine_core::SequenceStep> in_flight_;
  uint64_t given_ = 0;  ///< a digest of the step in flight
};

/// Guesses right with a chance of `right` in 256, by knowing the model and the sampling of greedy
/// requests.
class ScriptedDrafter : public engine_core::Drafter {
 public:
  ScriptedDrafter(const ScriptedModel& model, uint64_t right) : model_(model), right_(right) {}
  void draft(std::span<engine_core::DraftRequest> requests) override {
    for (engine_core::DraftRequest& request : requests) {
      std::vector<int64_t> tokens(request.tokens.begin(), request.tokens.end());
      for (int64_t i = 0; i < request.max_drafts; ++i) {
        const std::vector<float> logits = model_.reference(tokens);
        auto guess = std::ranges::max_element(logits) - logits.begin();
        if (ScriptedModel::mix(static_cast<uint64_t>(guess), ++count_) % 256 >= right_) {
          guess = (guess + 1) % model_.vocab_size();
        }
        tokens.push_back(guess);
        request.drafts.push_back(guess);
      }
    }
  }

 private:
  const ScriptedModel& model_;
  uint64_t right_, count_ = 0;
};

/// A prefix store in memory that can be made to throw and to damage what it gives.
class ScriptedStore : public engine_core::PrefixStore {
 public:
  explicit ScriptedStore(int64_t page_tokens,
                         engine_core::WindowPolicy policy = engine_core::WindowPolicy::kPeriodic,
                         int64_t window_pages = 1)
      : page_tokens_(page_tokens), policy_(policy), window_pages_(window_pages) {}

  int64_t page_tokens() const override { return page_tokens_; }
  void set_identity(const std::string&) override {
    for (auto* entries : {&pages_, &snapshots_, &windows_}) entries->clear();
  }
  std::unique_ptr<engine_core::PrefixLoad> begin_load(std::span<const int64_t> tokens,
                                                      int64_t from_page,
                                                      int64_t max_pos) override {
    if (throws) throw std::runtime_error("store: gone");
    return std::make_unique<Load>(*this, key(tokens, max_pos / page_tokens_ * page_tokens_),
                                  from_page);
  }
  bool save_page(std::span<const int64_t> tokens, std::span<const std::byte> page) override {
    if (throws) throw std::runtime_error("store: full");
    if (!refuses) pages_[Tokens(tokens.begin(), tokens.end())].assign(page.begin(), page.end());
    return !refuses;
  }
  void save_snapshot(std::span<const int64_t> tokens, std::span<const std::byte> bytes) override {
    snapshots_[Tokens(tokens.begin(), tokens.end())].assign(bytes.begin(), bytes.end());
  }
  int64_t stored_bytes() const override {
    int64_t bytes = 0;
    for (const auto* entries : {&pages_, &snapshots_, &windows_})
      for (const auto& [tokens, entry] : *entries) bytes += std::ssize(entry);
    return bytes;
  }
  engine_core::WindowPolicy policy() const override { return policy_; }
  bool wants_snapshot(int64_t /*pos*/) const override {
    return policy_ == engine_core::WindowPolicy::kPeriodic;
  }
  void save_window(std::span<const int64_t> tokens, std::span<const std::byte> bytes) override {
    windows_[Tokens(tokens.begin(), tokens.end())].assign(bytes.begin(), bytes.end());
  }

  bool throws = false, truncates = false, forgets_states = false, refuses = false;
  int64_t damaged_page = -1;  ///< of every prefix: cannot be read
  int64_t num_read = 0;       ///< pages
  int64_t most_read = 0;      ///< by one advance()

 private:
  using Tokens = std::vector<int64_t>;

  class Load : public engine_core::PrefixLoad {
   public:
    Load(ScriptedStore& store, Tokens tokens, int64_t from_page)
        : store_(store), tokens_(std::move(tokens)), from_page_(from_page), pos_(ssize(tokens_)) {}

    bool advance(int64_t max_pages, std::vector<std::vector<std::byte>>& pages) override {
      if (store_.throws) throw std::runtime_error("store: gone");
      for (int64_t num_read = 0; pos_ > 0; pos_ -= store_.page_tokens_) {
        engine_core::StoredPrefix found{.pos = pos_, .pages = {}, .snapshot = {}};
        if (!store_.find_state(tokens_, found)) continue;
        const int64_t end = pos_ / store_.page_tokens_;
        while (from_page_ < end) {
          if (num_read == max_pages) return true;
          const auto page =
              store_.pages_.find(key(tokens_, (from_page_ + 1) * store_.page_tokens_));
          if (page == store_.pages_.end() || from_page_ == store_.damaged_page) break;
          store_.most_read = std::max(store_.most_read, ++num_read);
          ++store_.num_read;
          pages.push_back(page->second);
          if (store_.truncates) pages.back().pop_back();
          ++from_page_;
        }
        if (from_page_ < end) continue;
        result_ = std::move(found);
        return false;
      }
      return false;
    }
    std::optional<engine_core::StoredPrefix> take_result() override { return std::move(result_); }

   private:
    ScriptedStore& store_;
    Tokens tokens_;
    int64_t from_page_, pos_;
    std::optional<engine_core::StoredPrefix> result_;
  };

  static Tokens key(std::span<const int64_t> tokens, int64_t count) {
    return Tokens(tokens.begin(), tokens.begin() + count);
  }

  // What resumes at found.pos, by the policy.
  bool find_state(std::span<const int64_t> tokens, engine_core::StoredPrefix& found) const {
    if (policy_ == engine_core::WindowPolicy::kZero) return true;
    if (policy_ == engine_core::WindowPolicy::kPeriodic) {
      const auto snapshot = snapshots_.find(key(tokens, found.pos));
      if (snapshot == snapshots_.end()) return false;
      if (!forgets_states) found.snapshot = snapshot->second;
      return true;
    }
    const int64_t end = found.pos / page_tokens_;
    for (int64_t page = std::max(end - window_pages_, int64_t{0}); page < end; ++page) {
      const auto window = windows_.find(key(tokens, (page + 1) * page_tokens_));
      if (window == windows_.end()) return false;
      found.windows.push_back(window->second);
    }
    if (truncates) found.windows.back().pop_back();
    return true;
  }

  int64_t page_tokens_;
  engine_core::WindowPolicy policy_;
  int64_t window_pages_;
  std::map<Tokens, std::vector<std::byte>> pages_, snapshots_, windows_;
};

}  // namespace hadal::testing
