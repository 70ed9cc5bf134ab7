#include "testing/packed_rows.h"

#include "base/philox.h"

namespace hadal::testing {

train::PackedRows packed_rows(int64_t from, int64_t count, int64_t length) {
  train::PackedRows packed{
      .rows = count, .row_length = length, .tokens = {}, .scored = {}, .sample_lengths = {}};
  for (int64_t row = from; row < from + count; ++row) {
    const Philox random(100, static_cast<uint64_t>(row));
    for (int64_t i = 0; i < length; ++i)
      packed.tokens.push_back(
          static_cast<int32_t>(128.0 * random.uniform(static_cast<uint64_t>(i))));
    const int64_t cut = 5 + 9 * row % (length - 6);
    packed.sample_lengths.insert(packed.sample_lengths.end(), {cut, length - cut});
  }
  packed.scored.assign(packed.tokens.size(), 1);
  if (from == 0) packed.scored[3] = 0;
  return packed;
}

}  // namespace hadal::testing
