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
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "engine_core/request.h"

namespace hadal::engine {

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

  /// Whether rebuild() works: the state behind whole pages from their entries and the tokens alone,
  /// by running the last of them again. For stores that keep no states.
  virtual bool can_rebuild() const { return false; }
  /// The first token to be run again for a state at `pos`.
  virtual int64_t rebuild_start(int64_t pos) const { return pos; }
  /// Runs tokens [start, start + count) again over `pages`; the pieces follow each other from
  /// rebuild_start() to the end of `tokens`.
  virtual void rebuild(int64_t /*slot*/,
                       std::span<const int64_t> /*tokens*/,
                       std::span<const int64_t> /*pages*/,
                       int64_t /*start*/,
                       int64_t /*count*/) {}
};

/// One sequence's part of a step.
struct SequenceStep {
  int64_t slot = 0;
  int64_t start = 0;                ///< of the first token; the state is there, at 0 a new one
  std::span<const int64_t> tokens;  ///< at least one
  std::span<const int64_t> pages;   ///< ceil((start + tokens) / page_tokens) page numbers
  int64_t num_logits = 0;           ///< of the last so many tokens
  bool scored = false;              ///< visit_logits() will be asked for others
};

class Runner {
 public:
  virtual ~Runner() = default;
  virtual int64_t vocab_size() const = 0;
  /// How far back rewind() goes: the longest draft.
  virtual int64_t slack() const = 0;
  /// Runs the step; afterwards logits(i, j) are those of the j-th asked-for token of sequence i,
  /// [vocab_size] FP32, valid until the next run(). The states are behind the last tokens.
  virtual void run(std::span<const SequenceStep> steps) = 0;
  virtual std::span<const float> logits(int64_t sequence, int64_t token) const = 0;
  /// Logits of tokens [from, from + count) of sequence i of the latest step, which was `scored`:
  /// computed now and shown piece by piece, so that no more than a piece's rows exist at once.
  /// `visit` gets a piece's first token and its rows [tokens, vocab_size].
  using VisitLogits = std::function<void(int64_t first, std::span<const float> rows)>;
  virtual void visit_logits(int64_t sequence,
                            int64_t from,
                            int64_t count,
                            const VisitLogits& visit) const = 0;
  /// The state of a slot goes back to `pos`, at most slack() tokens.
  virtual void rewind(int64_t slot, int64_t pos) = 0;
  /// What the last token with logits of a slot's latest step attended to; null where nobody knows.
  virtual std::shared_ptr<const ContextView> context_view(int64_t /*slot*/) const {
    return nullptr;
  }
  /// There is nothing to do: what was only kept for the next step may go.
  virtual void rest() {}
};

}  // namespace hadal::engine
