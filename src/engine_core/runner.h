// What the scheduler asks of the model and of the memory behind the caches: plain numbers and
// bytes, so that tests can script both.
//
// Two memories (kv_cache.md). Pages: `page_tokens` positions each, with the compressed entries
// and index keys of all layers; shared by reference count, immutable once full. State slots: window
// rings and compressor rows of all layers, a function of the current position alone.
//
// A snapshot is what of a state slot a resumption at position `pos` needs, as bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "engine_core/request.h"
#include "engine_core/sampler.h"

namespace hadal::engine_core {

class CacheMemory {
 public:
  virtual ~CacheMemory() = default;
  virtual int64_t page_tokens() const = 0;
  virtual int64_t num_pages() const = 0;
  virtual int64_t num_slots() const = 0;
  virtual int64_t page_bytes() const = 0;
  virtual int64_t state_bytes() const = 0;
  virtual int64_t snapshot_bytes(int64_t pos) const = 0;

  virtual void copy_page(int64_t from, int64_t to) = 0;
  virtual void read_page(int64_t page, std::span<std::byte> out) const = 0;
  virtual void write_page(int64_t page, std::span<const std::byte> in) = 0;
  /// Of the state after exactly `pos` tokens.
  virtual void save_snapshot(int64_t slot, int64_t pos, std::span<std::byte> out) const = 0;
  virtual void load_snapshot(int64_t slot, int64_t pos, std::span<const std::byte> in) = 0;

  /// For stores that keep all windows. A window: the window rows of one page's tokens and what else
  /// a resumption at the page's end needs. 0: this memory holds no whole windows.
  virtual int64_t window_bytes() const { return 0; }
  /// So many pages the model's window reaches back.
  virtual int64_t window_pages() const { return 1; }
  /// Of the page that ends at `pos`, where the state is.
  virtual void save_window(int64_t /*slot*/, int64_t /*pos*/, std::span<std::byte> /*out*/) const {}
  /// The last window_pages() windows before `pos` (or all), in order, make the state there.
  virtual void load_window(int64_t /*slot*/, int64_t /*pos*/, std::span<const std::byte> /*in*/) {}
};

/// Tokens whose scores are wanted: what the rows before them say of them.
struct ScoredTokens {
  int64_t from = 0;  ///< row of the step's tokens that the first of them follows
  std::span<const int64_t>
      targets;      ///< that follow row `from` and those behind it; none: no scores
  int64_t top = 0;  ///< the likeliest beside them, so many
};

/// One sequence's part of a step.
struct SequenceStep {
  int64_t slot = 0;
  int64_t start = 0;                ///< of the first token; the state is there, at 0 a new one
  std::span<const int64_t> tokens;  ///< at least one
  std::span<const int64_t> pages;   ///< ceil((start + tokens) / page_tokens) page numbers
  int64_t num_logits = 0;           ///< rows: of the last so many tokens
  std::span<const Draw> draws = {};
  ScoredTokens scored = {};
  bool shows_logits = false;  ///< logits() will be asked for the rows
};

struct SequenceResult {
  std::vector<Sampled> drawn;      ///< [SequenceStep::draws]
  std::vector<TokenScore> scores;  ///< [SequenceStep::scored.targets]
};
struct StepResult {
  std::vector<SequenceResult> sequences;  ///< of the step, in order
  double sampling_seconds = 0;            ///< of the time that launch() and collect() took
};

/// Runs steps in two halves, so that a device can be at work while its host is, too.
///
/// What launch() is given, and what that points to, stays as it is until collect() has returned,
/// with one exception: Draw::mask of a draw that is `masked_later` is read by collect() alone and
/// may be set until then. Nobody touches the pages and slots of a step in flight, nor calls
/// anything else of the runner. One step is in flight at most. When either half throws, none is,
/// and the states of its slots are lost.
class Runner {
 public:
  using Ticket = uint64_t;

  virtual ~Runner() = default;
  virtual int64_t vocab_size() const = 0;
  /// How far back rewind() goes: the longest draft.
  virtual int64_t slack() const = 0;
  /// Begins a step; may return before anything is computed.
  virtual Ticket launch(std::span<const SequenceStep> steps) = 0;
  /// Ends it: the states are behind the last tokens, and every draw has its token.
  virtual StepResult collect(Ticket ticket) = 0;
  StepResult run(std::span<const SequenceStep> steps) { return collect(launch(steps)); }
  /// Of the j-th row of sequence i of the latest step, which said `shows_logits`: [vocab_size]
  /// FP32, valid until the next launch().
  virtual std::span<const float> logits(int64_t sequence, int64_t token) const = 0;
  /// The state of a slot goes back to `pos`, at most slack() tokens.
  virtual void rewind(int64_t slot, int64_t pos) = 0;
  /// What the last token with logits of a slot's latest step attended to; null where nobody knows.
  virtual std::shared_ptr<const ContextView> context_view(int64_t /*slot*/) const {
    return nullptr;
  }
  /// There is nothing to do: what was only kept for the next step may go.
  virtual void rest() {}

  /// Whether rebuild() works: the state behind whole pages from their entries and the tokens alone,
  /// by running the last of them again. For stores that keep no states.
  virtual bool can_rebuild() const { return false; }
  /// The first token to be run again for a state at `pos`.
  virtual int64_t rebuild_start(int64_t pos) const { return pos; }
  /// Runs tokens [start, start + count) again over `pages`, which it does not write; the pieces
  /// follow each other from rebuild_start() to the end of `tokens`.
  virtual void rebuild(int64_t /*slot*/,
                       std::span<const int64_t> /*tokens*/,
                       std::span<const int64_t> /*pages*/,
                       int64_t /*start*/,
                       int64_t /*count*/) {}
};

}  // namespace hadal::engine_core
