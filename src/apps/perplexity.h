// How well a model predicts a text: bits per byte.
//
// BOS stands before the text and is not scored. The text runs through windows of `context` tokens,
// each beginning half a window after the one before; of every window but the first only the tokens
// are scored that no earlier window has scored, so each has at least half a window before it.
// Windows do not see each other. A token's score does not depend on how many windows share a step.
// As in every distribution of the engine, ids that stand for no text have no share.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "apps/answer_engine.h"
#include "apps/loaded_model.h"

namespace hadal::apps {

struct TextScore {
  int64_t tokens = 0;  ///< scored: all of the text, BOS not counted
  int64_t bytes = 0;
  double nats = 0.0;  ///< sum over the tokens of -log p

  double nats_per_token() const { return nats / static_cast<double>(tokens); }
  double bits_per_byte() const;
};

struct PerplexityOptions {
  int64_t context = 4096;
  int64_t step_tokens = 8192;  ///< rows of a step, of one window or of several
  bool cuda = false;           ///< the model lies on the GPU
};

/// What a scoring engine needs: as many windows at once as fill a step.
AnswerEngineOptions scoring_engine(const PerplexityOptions& options);

/// InputError when the text is empty or no UTF-8; `name` begins the message.
void check_text(const std::string& text, const std::string& name);

/// `text` is such that check_text() finds no fault; `engine` is of `loaded` and has nothing to do.
/// `progress` gets the share of the text that is scored, in bytes.
TextScore score_text(AnswerEngine& engine,
                     const LoadedModel& loaded,
                     const std::string& text,
                     const PerplexityOptions& options,
                     const std::function<void(int64_t bytes)>& progress = {});

/// A window of the tokens [BOS, text ...]: it spans [begin, end), and the tokens [scored, end)
/// count.
struct Window {
  int64_t begin, scored, end;
};
std::vector<Window> windows_of(int64_t num_tokens, int64_t context);

}  // namespace hadal::apps
