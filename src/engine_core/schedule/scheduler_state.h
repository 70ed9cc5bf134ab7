// Inside the scheduler: requests and their sequences. Included by its own .cpp files only.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "engine_core/schedule/scheduler.h"

namespace hadal::engine_core {

struct Scheduler::Prepared {
  Request request;
  std::shared_ptr<Sink> sink;                          ///< shared with the server's connection
  std::vector<std::unique_ptr<AnswerFilter>> filters;  ///< [n]
};

/// One choice of a request.
struct Scheduler::Sequence {
  enum class Phase : uint8_t {
    kAwaitsPrompt,  ///< the first choice computes the prompt for it
    kWaiting,       ///< in the queue
    kRunning,       ///< has slot and pages
    kEnded,
  };

  RequestState* request = nullptr;
  int64_t choice = 0;
  uint64_t arrival = 0;
  Phase phase = Phase::kAwaitsPrompt;
  std::vector<int64_t> tokens;  ///< prompt and answer; the last was drawn but not yet run
  std::unique_ptr<AnswerFilter> filter;
  std::unique_ptr<SamplerMemory> memory;  ///< of its tokens: they are only ever added to
  CachedSequence cache;
  SequenceCache::Opened opened;  ///< while it loads
  DraftAcceptance acceptance;
  int64_t drafted = 0, accepted = 0;
  int64_t suspect_until = 0;  ///< a step up to here threw: it runs alone until it gets there

  const Sequence* leader = nullptr;  ///< computes its beginning, up to `shared`: it sits out
  int64_t shared = 0;
  bool seeks_leader = false;  ///< it began, or the one it followed is gone

  // The step being made: `chunk` known tokens, then drafts.
  int64_t chunk = 0;
  int64_t num_drafts = 0;
  std::vector<int64_t> drafts;
  std::vector<int64_t> rows;  ///< with drafts: the last token and they
  /// Behind the last token and each draft, then those of choices that begin from this prompt.
  std::vector<Draw> draws;
  std::string mask_error;  ///< why the filter has no masks for them

  int64_t pos() const { return cache.pos; }
  int64_t num_tokens() const { return static_cast<int64_t>(tokens.size()); }
  int64_t remaining() const { return num_tokens() - cache.pos; }
};

struct Scheduler::RequestState {
  uint64_t id = 0;
  Request request;
  std::shared_ptr<Sink> sink;  ///< null once it threw
  std::vector<std::unique_ptr<Sequence>> sequences;
  int64_t num_open = 0;  ///< choices that have not ended
  bool admitted = false;
  std::shared_ptr<const WeightsVersion> weights;  ///< once it is admitted
  const Sequence* reporter = nullptr;  ///< whose cache `report` tells of, until it is preempted
  CacheReport report;
  /// With Request::prompt_logprobs: those of the prompt's first tokens; constant once all are
  /// there.
  std::shared_ptr<std::vector<TokenScore>> scores;

  std::vector<int64_t> ends;  ///< tokens that end an answer

  int64_t prompt_size() const { return static_cast<int64_t>(request.prompt.size()); }
  bool wants_scores() const { return scores && std::ssize(*scores) < prompt_size(); }
  /// Choices that begin where the prompt ends.
  std::vector<Sequence*> awaiting() const {
    std::vector<Sequence*> choices;
    for (const std::unique_ptr<Sequence>& choice : sequences)
      if (choice->phase == Sequence::Phase::kAwaitsPrompt) choices.push_back(choice.get());
    return choices;
  }
};

}  // namespace hadal::engine_core
