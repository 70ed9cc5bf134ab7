// What a client asks of the engine and what it gets back, token by token.
//
// Torch-free: the server builds requests, the engine answers them, tests answer with a script.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/sampling.h"

namespace hadal::engine_core {

/// What the text of an answer must be (after `</think>` in thinking mode).
struct Grammar {
  enum class Kind : uint8_t { kNone, kJsonObject, kJsonSchema, kRegex, kEbnf, kToolCalls };
  Kind kind = Kind::kNone;
  /// A JSON schema, a regular expression, an EBNF grammar; for kToolCalls a JSON list of
  /// {"name", "parameters": schema, "strict": bool}, or an object with that list (grammar.h).
  std::string text;
  bool must_call = false;  ///< with kToolCalls and a list: the answer is calls, no text before them
  friend bool operator==(const Grammar&, const Grammar&) = default;
};

/// A name that a client gives to what it will go on from: the cache prefers to keep the last prefix
/// that came under it (prefix_pins.h). No answer depends on it.
struct CacheKey {
  std::string name;    ///< empty: none
  std::string client;  ///< whose; Request::client, filled in by the scheduler
  std::chrono::seconds retention = std::chrono::hours(1);  ///< since it was last used
};

struct Request {
  std::vector<int64_t> prompt;  ///< token ids, at least one
  int64_t max_tokens = 16;      ///< of each choice; 0: the prompt alone, ends with kLength
  int64_t n = 1;                ///< choices; they share the prompt's pages
  Sampling sampling;
  std::vector<std::string> stop;     ///< bytes; the answer ends before the first that appears
  std::vector<int64_t> stop_tokens;  ///< end the answer as EOS does
  /// Before so many tokens neither EOS nor a stop token is drawn, unless nothing else may follow.
  int64_t min_tokens = 0;
  Grammar grammar;
  bool thinking = false;  ///< the answer begins inside <think>: the grammar waits for its end
  /// A chat's answer: added tokens are structure, told apart by their ids. They are in no
  /// OutputToken::text, and stop strings see what readers see: neither reasoning nor calls.
  bool structured = false;
  int64_t thinking_budget = -1;  ///< tokens until `</think>` is forced, with `thinking`; -1: none
  bool close_reasoning = false;  ///< an EOS inside the reasoning becomes `</think>`
  bool ignore_eos = false;       ///< for load tests
  int64_t top_logprobs = -1;     ///< -1: none; k: the token's and those of the k most likely
  /// The same of the prompt's tokens from prompt_logprobs_from on. What was cached of the prompt
  /// behind there is computed again for it.
  int64_t prompt_logprobs = -1;
  int64_t prompt_logprobs_from = 0;  ///< less than the prompt's tokens; those before have none
  bool sampled_logprobs = false;     ///< each token's in the distribution that it was drawn from
  int priority = 0;                  ///< higher first
  std::string client;                ///< the fair queue shares the machine among clients
  std::optional<std::chrono::steady_clock::time_point> deadline;
  bool use_prefix_cache = true;
  CacheKey cache_key;
  bool context_view = false;  ///< the last update of a choice tells what its last token saw
};

/// What the last token of an answer attended to.
struct ContextView {
  struct Layer {
    int64_t layer = 0;
    int64_t ratio = 0;              ///< 0: the window alone
    bool selects = false;           ///< CSA: the indexer chose; otherwise every block is seen
    int64_t blocks = 0;             ///< visible
    std::vector<int64_t> selected;  ///< CSA: block numbers, ascending
  };
  int64_t tokens = 0;  ///< positions of the context, the last token's included
  int64_t window = 0, index_topk = 0;
  std::vector<Layer> layers;
};

enum class FinishReason : uint8_t {
  kStop,  ///< EOS, or the grammar is complete
  kStopString,
  kLength,  ///< max_tokens, or the model's last position
  kCancelled,
  kDeadline,
  kError,
};

/// What the model gave a token of the prompt, after those before it.
struct TokenScore {
  double logprob = 0;
  int64_t rank = 0;               ///< 1: no token was likelier; 0: the token has no score
  std::vector<TokenLogprob> top;  ///< Request::prompt_logprobs of them
  friend bool operator==(const TokenScore&, const TokenScore&) = default;
};

struct OutputToken {
  int64_t token = 0;
  /// Bytes that are certain not to belong to a stop string; empty while they might. Whole
  /// characters only. EOS has none. In a structured answer, an added token's text is what was held
  /// back before it; the token itself is known by its id.
  std::string text;
  double logprob = 0;  ///< of the model; with top_logprobs >= 0
  std::vector<TokenLogprob> top;
  /// With sampled_logprobs: behind bias, penalties, grammar, temperature, top-k, top-p and min-p.
  /// 0 at temperature 0.
  double sampled_logprob = 0;
};

/// Why prompt tokens had to be computed.
struct CacheReport {
  int64_t prompt_tokens = 0;
  int64_t cached_tokens = 0;  ///< of the prompt, memory and disk
  int64_t disk_tokens = 0;    ///< of them from disk
  /// Why tokens that were seen before had to be computed: "none" (there were none, or hardly any),
  /// "new" (nothing of it was seen), "evicted", "tail" (they lie behind the last state), "off",
  /// "disk error".
  const char* miss = "";
};

/// Which weights a request is answered by, from its first token to its last (Engine).
struct WeightsVersion {
  int64_t number = 0;  ///< grows with every update; 0: those that the engine began with
  std::string digest;  ///< of them; empty: nobody made one
};

/// News of one choice of one request.
struct Update {
  int64_t choice = 0;
  std::vector<OutputToken> tokens;
  std::optional<FinishReason> finish;  ///< set once per choice, in its last update
  std::string matched_stop;            ///< with kStopString
  int64_t stop_token = -1;             ///< with kStop, where one of Request::stop_tokens ended it
  std::string error;                   ///< with kError
  CacheReport cache;                   ///< from the first update on
  std::shared_ptr<const WeightsVersion> weights;  ///< null where the request never began
  int64_t completion_tokens = 0;                  ///< of the choice so far
  int64_t accepted_drafts = 0, drafted = 0;
  std::shared_ptr<const ContextView> view;  ///< with Request::context_view, beside `finish`
  /// Of each token of the prompt, with Request::prompt_logprobs >= 0; shared by all updates.
  std::shared_ptr<const std::vector<TokenScore>> prompt_scores;
};

/// Gets the updates of one request, in order, from a thread that serves all requests: never block
/// in it. After the last choice's finish it is not called again and is released; one that throws
/// gets no more, and its request is cancelled.
class Sink {
 public:
  virtual ~Sink() = default;
  virtual void on_update(Update update) = 0;
};

}  // namespace hadal::engine_core
