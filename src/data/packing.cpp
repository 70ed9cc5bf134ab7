#include "data/packing.h"

#include <algorithm>
#include <map>
#include <numeric>

#include "base/check.h"
#include "base/hash.h"
#include "base/philox.h"

namespace hadal::data {

std::vector<int64_t> shuffled(int64_t count, uint64_t seed, uint64_t stream) {
  std::vector<int64_t> order(static_cast<size_t>(count));
  std::iota(order.begin(), order.end(), 0);
  const Philox random(seed, stream);
  for (int64_t i = count - 1; i > 0; --i) {
    const auto j =
        static_cast<int64_t>(random.uniform(static_cast<uint64_t>(i)) * static_cast<double>(i + 1));
    std::swap(order[static_cast<size_t>(i)], order[static_cast<size_t>(std::min(i, j))]);
  }
  return order;
}

DocumentStream::DocumentStream(const TokenShards& shards,
                               int32_t source,
                               uint64_t seed,
                               bool splits)
    : shards_(&shards), source_(source), seed_(seed), splits_(splits) {
  HADAL_INPUT_CHECK(shards.num_tokens() > 0, "training source ", source, " has no tokens");
}

void DocumentStream::start_pass() {
  ++pass_;
  next_ = 0;
  offset_ = 0;
  order_ = shuffled(shards_->num_documents(), seed_,
                    fnv1a64(concat("documents ", source_, " pass ", pass_)));
}

void DocumentStream::take(int64_t tokens, int64_t row_length, std::vector<Piece>& pieces) {
  HADAL_CHECK(row_length >= 2, "take: rows of ", row_length, " tokens");
  while (tokens > 0) {
    if (next_ == order_.size()) start_pass();
    const int64_t document = order_[next_];
    const auto size = static_cast<int64_t>(shards_->document(document).size());
    const int64_t rest = size - offset_;
    const int64_t length = std::min({rest, row_length, splits_ ? tokens : rest});
    if (length > 0) {
      pieces.push_back({.source = source_,
                        .length = static_cast<int32_t>(length),
                        .document = document,
                        .begin = offset_});
    }
    tokens -= length;
    offset_ += length;
    if (!splits_) dropped_ += size - offset_;
    if (!splits_ || offset_ == size) {
      ++next_;
      offset_ = 0;
    }
  }
}

double DocumentStream::passes() const {
  if (pass_ < 0) return 0.0;
  int64_t seen = offset_;
  for (size_t i = 0; i < next_; ++i) {
    seen += static_cast<int64_t>(shards_->document(order_[i]).size());
  }
  return static_cast<double>(pass_) +
         static_cast<double>(seen) / static_cast<double>(shards_->num_tokens());
}

std::vector<Row> pack_best_fit(const std::vector<Piece>& pieces, int64_t row_length) {
  std::vector<const Piece*> by_length;
  by_length.reserve(pieces.size());
  for (const Piece& piece : pieces) {
    HADAL_CHECK(piece.length >= 1 && piece.length <= row_length, "pack: a piece of ", piece.length,
                " tokens for rows of ", row_length);
    by_length.push_back(&piece);
  }
  std::stable_sort(by_length.begin(), by_length.end(),
                   [](const Piece* a, const Piece* b) { return a->length > b->length; });
  std::vector<Row> rows;
  std::map<int64_t, std::vector<size_t>> by_space;  // free tokens -> rows
  for (const Piece* piece : by_length) {
    const auto fit = by_space.lower_bound(piece->length);
    size_t row = rows.size();
    int64_t space = row_length;
    if (fit == by_space.end()) {
      rows.emplace_back();
    } else {
      row = fit->second.back();
      space = fit->first;
      fit->second.pop_back();
      if (fit->second.empty()) by_space.erase(fit);
    }
    rows[row].push_back(*piece);
    if (space > piece->length) by_space[space - piece->length].push_back(row);
  }
  return rows;
}

}  // namespace hadal::data
