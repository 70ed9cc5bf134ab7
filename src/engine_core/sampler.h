// How tokens are drawn and what else the scheduler needs from above or beside: a sampler, a filter
// between tokens and text (stop strings, grammar), a drafter. All are called from the engine's
// thread, except AnswerFilters::create and where a runner draws.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "engine_core/request.h"

namespace hadal::engine_core {

/// What a sampler keeps of one choice between its tokens, so as not to read all of them again. It
/// saves time and decides nothing.
class SamplerMemory {
 public:
  virtual ~SamplerMemory() = default;
};

/// One token to draw. The result depends on these values and the row of logits alone, `memory` left
/// out.
struct Draw {
  int64_t row = 0;  ///< of those that its sequence asks for (SequenceStep::num_logits)
  const Sampling* sampling = nullptr;
  int64_t choice = 0;
  int64_t pos = 0;  ///< of the token to be drawn: everything before it
  std::span<const int64_t> prompt, answer;
  std::span<const int64_t> ahead = {};  ///< of the answer, too: drafts behind it
  /// `mask` may be set while the step runs; else it is what it is from the start.
  bool masked_later = false;
  /// Bit t % 32 of word t / 32: token t is allowed. Empty: all are.
  std::span<const int32_t> mask = {};
  /// Not to be drawn while anything else can be.
  std::span<const int64_t> avoided = {};
  int64_t top_logprobs = -1;     ///< as in Request
  bool sampled_logprob = false;  ///< as in Request
  /// Of this choice, whose answer only grows; null: nothing is kept.
  std::unique_ptr<SamplerMemory>* memory = nullptr;
};

struct Sampled {
  int64_t token = -1;  ///< -1: every logit is NaN or forbidden
  double logprob = 0;  ///< of the model; with top_logprobs >= 0
  std::vector<TokenLogprob> top = {};
  /// Of the distribution that was drawn from, behind bias, penalties, mask, temperature, top-k,
  /// top-p and min-p; where it was asked for. 0 at temperature 0.
  double sampled_logprob = 0;
};

/// A draw and its row.
struct DrawInput {
  const Draw& draw;
  std::span<const float> logits;  ///< [vocab_size]
};

class Sampler {
 public:
  virtual ~Sampler() = default;
  /// Draws from all rows at once; `sampled` has [inputs].
  virtual void sample(std::span<const DrawInput> inputs, std::span<Sampled> sampled) = 0;
  /// What the model's logits say of a token that is known, and their `top` most likely. Any thread.
  virtual TokenScore score(std::span<const float> logits, int64_t token, int64_t top) const = 0;
};

/// Between the tokens of one choice and its text. Keeps its state through preemption.
class AnswerFilter {
 public:
  enum class Verdict : uint8_t {
    kContinue,
    kStopString,  ///< `matched_stop` appeared: the text ends before it
    kComplete,    ///< nothing may follow (a finished grammar): ends with kStop
  };
  struct Accepted {
    Verdict verdict = Verdict::kContinue;
    std::string text;  ///< certain not to belong to a stop string; whole characters
    std::string matched_stop;
  };

  virtual ~AnswerFilter() = default;
  /// Whether masks() may ever forbid a token.
  virtual bool masks_tokens() const { return true; }
  /// Tokens allowed next, as Draw::mask, then those behind each token of `draft` as if it had been
  /// accepted: [1 + draft], valid until the next call of masks() or accept(). Behind a token that
  /// is not allowed they say nothing.
  virtual std::vector<std::span<const int32_t>> masks(std::span<const int64_t> draft) = 0;
  /// What stands in the answer for a token that was drawn; then accept() takes it.
  virtual int64_t decide(int64_t token) { return token; }
  virtual Accepted accept(int64_t token) = 0;
  /// The answer ends (EOS, which accept() does not see, or a limit): text that was held back.
  virtual std::string finish() = 0;
};

class AnswerFilters {
 public:
  virtual ~AnswerFilters() = default;
  /// What is remembered of grammars, and how much of it may be. Thread-safe.
  virtual int64_t kept_bytes() const { return 0; }
  virtual int64_t most_kept_bytes() const { return 0; }
  /// For one choice. Thread-safe. Errors: InputError for a grammar or stop string that cannot be.
  virtual std::unique_ptr<AnswerFilter> create(const Request& request) = 0;
};

/// A sequence to guess ahead of.
struct DraftRequest {
  int64_t slot = 0;
  std::span<const int64_t> tokens;     ///< all so far; the state is behind the last but one
  std::span<const int64_t> pages;      ///< for all tokens and max_drafts more
  int64_t max_drafts = 0;              ///< at least one
  Draw next;                           ///< how the next token will be drawn
  AnswerFilter* filter = nullptr;      ///< that made its mask and makes those behind drafts
  std::span<const int64_t> ends = {};  ///< tokens that nothing follows
  std::vector<int64_t> drafts;         ///< the answer, at most max_drafts
};

class Drafter {
 public:
  virtual ~Drafter() = default;
  virtual void draft(std::span<DraftRequest> requests) = 0;
};

}  // namespace hadal::engine_core
