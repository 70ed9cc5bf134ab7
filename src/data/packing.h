// Which tokens a training run sees, in which order and in which rows (model.md 17.9).
//
// A source is an endless stream of passes over its documents, each pass in an order of its own. A
// stage of training takes a number of tokens from every source, cuts long documents into pieces of
// at most one row, packs the pieces by best fit and shuffles the rows. All of it is planned before
// a stage begins and depends on the seed and the amounts alone, so a run can be resumed at any row.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "data/token_shards.h"

namespace hadal::data {

/// Tokens [begin, begin + length) of a document.
struct Piece {
  int32_t source = 0;
  int32_t length = 0;
  int64_t document = 0;
  int64_t begin = 0;
  bool operator==(const Piece&) const = default;
};

/// One row: pieces side by side; what they leave free is padding.
using Row = std::vector<Piece>;

/// Cursor through the endless stream of one source.
class DocumentStream {
 public:
  /// `splits`: long documents go on in the next piece; otherwise what exceeds a row is dropped
  /// (conversations).
  DocumentStream(const TokenShards& shards, int32_t source, uint64_t seed, bool splits);

  /// Appends pieces of at most `row_length` tokens until they hold at least `tokens` tokens. With
  /// `splits` the last piece ends exactly there, and the next call goes on behind it.
  void take(int64_t tokens, int64_t row_length, std::vector<Piece>& pieces);
  /// Passes begun, the current one included, as a number: 2.25 is a quarter of the third.
  double passes() const;
  int64_t num_dropped_tokens() const { return dropped_; }

 private:
  void start_pass();

  const TokenShards* shards_;
  int32_t source_;
  uint64_t seed_;
  bool splits_;
  int64_t pass_ = -1;
  size_t next_ = 0;     ///< in order_
  int64_t offset_ = 0;  ///< in the document order_[next_]
  int64_t dropped_ = 0;
  std::vector<int64_t> order_;
};

/// Packs pieces into rows by best fit, longest first (ties in the given order).
std::vector<Row> pack_best_fit(const std::vector<Piece>& pieces, int64_t row_length);

/// A permutation of [0, count) that depends on the arguments alone.
std::vector<int64_t> shuffled(int64_t count, uint64_t seed, uint64_t stream);

}  // namespace hadal::data
