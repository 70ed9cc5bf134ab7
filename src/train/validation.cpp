#include "train/validation.h"

#include <algorithm>
#include <bit>
#include <vector>

#include "train/step_share.h"

namespace hadal::train {
namespace {

/// The rows, `count` at a time.
std::vector<PackedRows> cut(const PackedRows& rows, int64_t count) {
  std::vector<PackedRows> parts;
  size_t sample = 0;
  for (int64_t row = 0; row < rows.rows; row += count) {
    const int64_t taken = std::min(count, rows.rows - row);
    const int64_t begin = rows.row_length * row, end = begin + rows.row_length * taken;
    PackedRows part{.rows = taken,
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
    parts.push_back(std::move(part));
  }
  return parts;
}

constexpr size_t kWords = 5;

}  // namespace

Evaluation evaluate_rows(const model::Transformer& model,
                         const PackedRows& rows,
                         int64_t micro_rows,
                         const Stage& rules,
                         at::Device device,
                         dist::Ranks& ranks,
                         const dist::Mesh& mesh,
                         Pipeline* pipeline) {
  const std::vector<PackedRows> parts = cut(rows, device.is_cpu() ? 1 : micro_rows);
  // Members that share rows in training take whole ones here.
  const dist::MeshPlace place = mesh.place(ranks.rank());
  const int64_t sharing = mesh.shape().context;
  const Span own =
      row_share(std::ssize(parts), mesh.data() * sharing, place.data * sharing + place.context);
  std::vector<MicroBatch> batches;
  for (int64_t i = own.begin; i < own.end; ++i)
    batches.emplace_back(parts[static_cast<size_t>(i)], device);
  std::vector<Evaluation> found;
  if (pipeline != nullptr) {
    found = pipeline->evaluate(model, passes_of(batches), rules.mode, rules.numerics);
  } else {
    for (const MicroBatch& batch : batches)
      evaluate(model, batch, rules.mode, rules.numerics, found.emplace_back());
  }
  // Ranks add integers only: a part's words are zero but on the rank that has its loss.
  std::vector<int64_t> words(parts.size() * kWords, 0);
  for (size_t i = 0; i < found.size(); ++i) {
    const Evaluation& one = found[i];
    const int64_t values[kWords] = {std::bit_cast<int64_t>(one.loss_sum), one.targets,
                                    std::bit_cast<int64_t>(one.mass_sum),
                                    std::bit_cast<int64_t>(one.best_mass_sum), one.mass_queries};
    const int64_t part = own.begin + static_cast<int64_t>(i);
    std::copy(values, values + kWords, words.begin() + part * static_cast<int64_t>(kWords));
  }
  ranks.sum(words);
  Evaluation result;
  for (size_t at = 0; at < words.size(); at += kWords) {
    result.loss_sum += std::bit_cast<double>(words[at]);
    result.targets += words[at + 1];
    result.mass_sum += std::bit_cast<double>(words[at + 2]);
    result.best_mass_sum += std::bit_cast<double>(words[at + 3]);
    result.mass_queries += words[at + 4];
  }
  return result;
}

}  // namespace hadal::train
