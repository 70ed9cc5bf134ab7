// Prompts that begin alike and arrive together: the beginning is computed once. Whoever comes first
// computes it; the others sit out until it is there and go on from a copy of that state, at the
// very token where they differ.
#include <algorithm>

#include "base/check.h"
#include "engine_core/schedule/scheduler.h"
#include "engine_core/schedule/scheduler_state.h"

namespace hadal::engine_core {

// Up to where `leader` computes what `sequence` needs; 0: it does not.
int64_t Scheduler::shared_tokens(const Sequence& leader, const Sequence& sequence) const {
  const bool may_share =
      (leader.cache.use_tree && sequence.cache.use_tree) || leader.request == sequence.request;
  if (!may_share || leader.remaining() <= 1 || cache_.loads(leader.cache) ||
      leader.suspect_until > leader.pos())
    return 0;
  const RequestState &theirs = *leader.request, &own = *sequence.request;
  const auto differ = std::ranges::mismatch(leader.tokens, sequence.tokens).in1;
  int64_t shared = std::min<int64_t>(differ - leader.tokens.begin(),
                                     std::min(leader.num_tokens(), sequence.num_tokens()) - 1);
  if (own.wants_scores()) {
    // With the state come the scores; that of the next token must be the same, too.
    if (!theirs.scores || theirs.request.prompt_logprobs != own.request.prompt_logprobs ||
        theirs.request.prompt_logprobs_from != own.request.prompt_logprobs_from)
      return 0;
    shared = std::min({shared, differ - leader.tokens.begin() - 1, theirs.prompt_size() - 1});
  }
  return shared > leader.pos() ? shared : 0;
}

void Scheduler::follow(Sequence& sequence, const Sequence* leader) {
  num_following_ += (leader != nullptr ? 1 : 0) - (sequence.leader != nullptr ? 1 : 0);
  sequence.leader = leader;
}

// Whom the sequence waits for, of those that come before it: whoever computes most of its prompt.
void Scheduler::seek_leader(Sequence& sequence) {
  sequence.seeks_leader = false;
  follow(sequence, nullptr);
  int64_t most = sequence.pos() + options_.least_shared - 1;
  if (sequence.num_tokens() <= most || sequence.suspect_until > sequence.pos()) return;
  for (Sequence* other : running_) {
    if (other == &sequence) return;
    const int64_t shared = shared_tokens(*other, sequence);
    if (shared <= most) continue;
    most = shared;
    follow(sequence, other);
    sequence.shared = shared;
  }
}

// Tokens until somebody takes over from it.
int64_t Scheduler::until_taken(const Sequence& sequence) const {
  int64_t least = sequence.remaining();
  for (const Sequence* other : running_)
    if (other->leader == &sequence) least = std::min(least, other->shared - sequence.pos());
  return least;
}

// It got somewhere: those that waited for this go on from here.
void Scheduler::serve_followers(Sequence& leader) {
  if (num_following_ == 0) return;  // as with every token of an answer
  for (Sequence* other : running_) {
    if (other->leader != &leader || other->shared > leader.pos()) continue;
    follow(*other, nullptr);
    other->seeks_leader = true;
    if (other->shared == leader.pos()) take_over(leader, *other);
  }
}

void Scheduler::take_over(const Sequence& leader, Sequence& sequence) {
  RequestState& request = *sequence.request;
  const int64_t pos = leader.pos();
  const CacheKey* const key = sequence.cache.key;
  const bool use_tree = sequence.cache.use_tree;
  cache_.close(sequence.cache);
  sequence.cache = cache_.fork(leader.cache).value();  // the slot is the one it just gave back
  sequence.cache.key = key;
  sequence.cache.use_tree = use_tree;
  if (request.wants_scores()) {
    const std::vector<TokenScore>& scores = *leader.request->scores;
    HADAL_CHECK(std::ssize(scores) > pos, "scheduler: ", scores.size(), " scores of ", pos,
                " tokens");
    if (std::ssize(*request.scores) <= pos)
      request.scores->assign(scores.begin(), scores.begin() + pos + 1);
  } else {
    sequence.opened.miss = "none";
  }
  sequence.opened.cached_tokens = pos;
  if (request.reporter == &sequence) add_cached(request, sequence.opened);
  serve_followers(sequence);
}

// It stops: those that waited for it look for somebody else.
void Scheduler::leave_followers(const Sequence& leader) {
  if (num_following_ == 0) return;
  for (Sequence* other : running_) {
    if (other->leader != &leader) continue;
    follow(*other, nullptr);
    other->seeks_leader = true;
  }
}

}  // namespace hadal::engine_core
