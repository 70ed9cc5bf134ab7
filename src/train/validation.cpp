#include "train/validation.h"

#include <algorithm>

namespace hadal::train {

Evaluation evaluate_rows(const model::Transformer& model,
                         const PackedRows& rows,
                         int64_t micro_rows,
                         const Stage& rules,
                         at::Device device) {
  Evaluation result;
  size_t sample = 0;
  for (int64_t row = 0; row < rows.rows; row += micro_rows) {
    const int64_t count = std::min(micro_rows, rows.rows - row);
    const int64_t begin = rows.row_length * row, end = begin + rows.row_length * count;
    PackedRows part{.rows = count,
                    .row_length = rows.row_length,
                    .tokens = {},
                    .scored = {},
                    .sample_lengths = {}};
    part.tokens.assign(rows.tokens.begin() + begin, rows.tokens.begin() + end);
    part.scored.assign(rows.scored.begin() + begin, rows.scored.begin() + end);
    for (int64_t filled = 0; filled < end - begin; ++sample) {
      part.sample_lengths.push_back(rows.sample_lengths[sample]);
      filled += rows.sample_lengths[sample];
    }
    evaluate(model, MicroBatch(part, device), rules.mode, rules.numerics, result);
  }
  return result;
}

}  // namespace hadal::train
