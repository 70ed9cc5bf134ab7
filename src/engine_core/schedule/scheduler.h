// Which sequences run in which step: the engine without its thread.
//
// A request becomes n sequences of tokens. In each step every running sequence whose next token is
// due gets its one row (and drafts), and prompts share the rest of the token budget in chunks, so
// that running answers keep their pace while long prompts arrive. Chunks end where snapshots are
// taken. A sequence is admitted when its prompt fits into free and cached pages; when memory runs
// short the lowest priority's latest arrival gives up its pages and slot and resumes later from
// what the prefix tree kept, with the same tokens: a token depends on its request, its choice and
// its position, never on the schedule. A sequence whose prefix is being loaded from the store sits
// out, while each step reads a few pages for it; so does one whose prompt begins as that of another
// which is being computed.
//
// A step that throws is repeated sequence by sequence, so that only the request whose own step
// throws ends with kError. Updates are delivered inside step() and cancel(). One thread, except
// prepare().
#pragma once

#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "engine_core/answer/answer_cuts.h"
#include "engine_core/engine.h"
#include "engine_core/prefix/sequence_cache.h"
#include "engine_core/prefix_store.h"
#include "engine_core/request.h"
#include "engine_core/runner.h"
#include "engine_core/sampler.h"
#include "engine_core/schedule/draft_policy.h"
#include "engine_core/schedule/fair_queue.h"
#include "engine_core/schedule/prompt_pace.h"

namespace hadal::engine_core {

struct SchedulerOptions {
  int64_t max_running = 64;       ///< sequences in a step; at most the memory's slots count
  int64_t max_waiting = 1024;     ///< requests that wait for admission
  int64_t step_tokens = 256;      ///< rows of a step while answers are running, at most
  int64_t prompt_tokens = 1024;   ///< rows of a step of prompts alone
  double prompt_seconds = 0.02;   ///< that a step with prompts and answers may take (PromptPace)
  int64_t load_pages = 8;         ///< read from the store in a step
  int64_t max_drafts = 0;         ///< at most Runner::slack(); 0: no speculation
  bool always_draft = false;      ///< max_drafts whatever it costs: for tests
  bool drafts_in_blocks = false;  ///< the drafter makes max_drafts in the time of one
  /// Prompts wait for so many tokens that another computes for them, at least: fewer are computed
  /// sooner than a step is divided for them.
  int64_t least_shared = 32;
  bool snapshot_prompts = true;  ///< also before a prompt's last token: it comes again or branches
  SequenceCache::Options cache = {};
};

/// What the scheduler works with; all outlive it. The pointers may be null.
struct SchedulerParts {
  Runner& runner;
  CacheMemory& memory;
  AnswerFilters& filters;
  Drafter* drafter = nullptr;
  PrefixStore* store = nullptr;
  AnswerCuts* cuts = nullptr;  ///< told of every answer
};

class Scheduler {
 public:
  /// A checked request with its filters.
  struct Prepared;
  struct PreparedDeleter {
    void operator()(Prepared* prepared) const;
  };
  using PreparedPtr = std::unique_ptr<Prepared, PreparedDeleter>;

  Scheduler(const EngineInfo& info, const SchedulerOptions& options, const SchedulerParts& parts);
  ~Scheduler();
  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;

  /// Thread-safe. Errors: InputError naming what in the request is not valid.
  PreparedPtr prepare(Request request, std::shared_ptr<Sink> sink) const;
  /// Queues it under a new number, which must be larger than all before.
  void add(uint64_t id, PreparedPtr prepared);
  void cancel(uint64_t id);
  void cancel_all();
  /// All requests end with kError.
  void fail_all(const std::string& what);
  /// One step, with everything around it. False: nothing is running or waiting.
  bool step();

  /// Requests that have not begun do not until the weights have changed.
  void hold_waiting();
  /// None has begun.
  bool drained() const { return std::ssize(requests_) == num_waiting_requests_; }
  /// When drained: swaps, forgets all prefixes in memory (those of a store are the swap's), and
  /// lets those that wait begin. Errors: as Engine::update_weights(); then the old weights stay.
  void update_weights(const WeightsUpdate& update);

  bool idle() const { return requests_.empty(); }
  /// As the runner's.
  void rest() { parts_.runner.rest(); }
  /// Requests with no choice admitted yet.
  int64_t num_waiting_requests() const { return num_waiting_requests_; }
  EngineStats stats() const;
  const SequenceCache& cache() const { return cache_; }
  void clear_prefix_tree() { cache_.clear_tree(); }
  /// Pools, tree and sequences agree. Errors: Error.
  void check_integrity() const;

 private:
  struct Sequence;
  struct RequestState;
  using Clock = std::chrono::steady_clock;

  // Between steps.
  void expire();
  void admit();
  bool try_admit(Sequence& sequence);
  bool make_room_for(const Sequence& sequence, int64_t pages_needed);
  bool has_place() const;
  int64_t pages_spare() const;
  void start(Sequence& sequence);
  void load_prefixes();
  void add_cached(RequestState& request, const SequenceCache::Opened& opened);
  void enqueue(Sequence& sequence, bool resumes);
  static std::span<const int64_t> reusable(const Sequence& sequence);
  void insert_running(Sequence& sequence);
  void preempt(Sequence& sequence, bool keep_prefix);
  Sequence* worst_running() const;
  int64_t pages_owed(const Sequence& sequence) const;

  // Prompts that begin alike (scheduler_shared.cpp).
  int64_t shared_tokens(const Sequence& leader, const Sequence& sequence) const;
  void seek_leader(Sequence& sequence);
  void follow(Sequence& sequence, const Sequence* leader);
  int64_t until_taken(const Sequence& sequence) const;
  void serve_followers(Sequence& leader);
  void take_over(const Sequence& leader, Sequence& sequence);
  void leave_followers(const Sequence& leader);

  // A step.
  void plan();
  void plan_prompts(std::span<Sequence* const> prompts, int64_t budget);
  int64_t chunk_limit(const Sequence& sequence) const;
  int64_t draft_limit(const Sequence& sequence) const;
  void reserve_planned();
  void make_drafts();
  void build_steps();
  void run_planned();
  void contain_failure(const std::string& what);
  void finish_step();
  void forget_finished();

  // What is drawn and scored in a step (scheduler_draws.cpp).
  static Draw draw_of(Sequence& sequence, int64_t row);
  static void plan_draws(Sequence& sequence);
  static void set_masks(Sequence& sequence);
  static ScoredTokens plan_scores(const Sequence& sequence);
  static void take_scores(RequestState& request, std::vector<TokenScore> scores);

  // After the model.
  void advance(Sequence& sequence, int64_t index);
  std::optional<FinishReason> take_token(Sequence& sequence, Sampled sampled, Update& update);
  void fork_choices(Sequence& leader, std::span<Sampled> drawn);
  void keep_state(Sequence& sequence, bool ends);
  void deliver(Sequence& sequence, Update update);
  void end(Sequence& sequence, FinishReason reason, Update update);
  /// Ends a request that its client may take up again: its states are kept as they stand.
  void break_off(RequestState& request, FinishReason reason);
  void end_request(RequestState& request, FinishReason reason, const std::string& error);
  void fail(RequestState& request, const std::string& what);
  void release(Sequence& sequence);

  EngineInfo info_;
  std::shared_ptr<const WeightsVersion> weights_;
  bool holds_waiting_ = false;
  SchedulerOptions options_;
  SchedulerParts parts_;
  SequenceCache cache_;
  FairQueue queue_;
  std::map<uint64_t, std::unique_ptr<RequestState>> requests_;
  std::unordered_map<uint64_t, Sequence*> waiting_;  ///< by arrival
  std::vector<Sequence*> running_;                   ///< by (priority, arrival), best first
  std::set<std::pair<Clock::time_point, uint64_t>> deadlines_;
  std::vector<uint64_t> finished_;  ///< requests to be forgotten after the step
  std::vector<Sequence*> planned_;
  std::vector<SequenceStep> steps_;
  StepResult result_;
  DraftPolicy draft_policy_;
  PromptPace prompt_pace_;
  struct Rows {
    int64_t answers = 0, drafts = 0, prompts = 0;
  };
  Rows rows_;  ///< of the step
  EngineStats stats_;
  std::vector<uint64_t> broken_;  ///< requests whose sink threw
  struct Spent {
    double seconds = 0;
    double processor = 0;  ///< seconds of the engine's thread
  };
  class Stopwatch;
  Spent model_;                ///< in the step being made, with the draws
  uint64_t load_turn_ = 0;     ///< whose load comes first
  int64_t num_following_ = 0;  ///< sequences with a leader
  int64_t num_waiting_requests_ = 0;
  int64_t max_tokens_ = 0;      ///< of a sequence: context and memory
  int64_t blocked_spare_ = 0;   ///< spare pages when the front did not fit
  uint64_t blocked_front_ = 0;  ///< 0: none
};

}  // namespace hadal::engine_core
