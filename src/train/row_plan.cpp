#include "train/row_plan.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "base/check.h"
#include "base/file.h"
#include "base/hash.h"

namespace hadal::train {
namespace {

bool splits(const data::SourceSpec& spec) { return spec.kind == data::SourceKind::kText; }

/// Copies rows out of the token files; free space becomes one unscored sample at the end of a row.
PackedRows fill(const std::vector<const data::TokenShards*>& sources,
                const data::Row* first,
                int64_t count,
                int64_t row_length) {
  PackedRows packed{
      .rows = count, .row_length = row_length, .tokens = {}, .scored = {}, .sample_lengths = {}};
  packed.tokens.reserve(static_cast<size_t>(count * row_length));
  packed.scored.reserve(packed.tokens.capacity());
  for (int64_t row = 0; row < count; ++row) {
    for (const data::Piece& piece : first[row]) {
      const data::TokenShards& source = *sources[static_cast<size_t>(piece.source)];
      const auto begin = static_cast<size_t>(piece.begin),
                 length = static_cast<size_t>(piece.length);
      const auto tokens = source.document(piece.document).subspan(begin, length);
      packed.tokens.insert(packed.tokens.end(), tokens.begin(), tokens.end());
      const auto scored = source.scored(piece.document);
      if (scored.empty()) {
        packed.scored.insert(packed.scored.end(), length, uint8_t{1});
      } else {
        packed.scored.insert(packed.scored.end(), scored.begin() + piece.begin,
                             scored.begin() + piece.begin + piece.length);
      }
      packed.sample_lengths.push_back(piece.length);
    }
    const auto full = static_cast<size_t>((row + 1) * row_length);
    if (packed.tokens.size() < full) {
      packed.sample_lengths.push_back(static_cast<int64_t>(full - packed.tokens.size()));
      packed.tokens.resize(full, 0);
      packed.scored.resize(full, 0);
    }
  }
  return packed;
}

}  // namespace

std::vector<data::TokenShards> open_sources(const RunConfig& config) {
  const std::string json = read_file(config.tokenizer);
  const text::Tokenizer tokenizer = text::Tokenizer::from_json(json, config.tokenizer);
  std::vector<data::TokenShards> sources;
  for (const data::SourceSpec& spec : config.sources) {
    sources.emplace_back(data::build_token_shards(spec, tokenizer, json, config.cache));
  }
  return sources;
}

RowPlan::RowPlan(const RunConfig& config, const std::vector<data::TokenShards>& sources)
    : sources_(&sources) {
  std::vector<data::DocumentStream> streams;
  for (size_t i = 0; i < sources.size(); ++i) {
    streams.emplace_back(sources[i], static_cast<int32_t>(i), config.seed,
                         splits(config.sources[i]));
  }
  int64_t first_token = 0;
  for (size_t s = 0; s < config.stages.size(); ++s) {
    const Stage& stage = config.stages[s];
    StagePlan plan;
    plan.row_length = stage.row_length;
    plan.first_token = first_token;
    double total = 0.0;
    for (const auto& [name, share] : stage.mix) total += share;
    std::vector<data::Piece> pieces;
    for (const auto& [name, share] : stage.mix) {
      if (share == 0.0) continue;
      const auto index = static_cast<size_t>(config.source_index(name));
      const auto tokens =
          static_cast<int64_t>(std::llround(static_cast<double>(stage.tokens) * share / total));
      const double before = streams[index].passes();
      streams[index].take(tokens, stage.row_length, pieces);
      char text[64];
      std::snprintf(text, sizeof(text), " %.3f to %.3f passes", before, streams[index].passes());
      plan.summary += concat(plan.summary.empty() ? "" : ", ", name, text);
    }
    std::vector<data::Row> packed = data::pack_best_fit(pieces, stage.row_length);
    const std::vector<int64_t> order = data::shuffled(static_cast<int64_t>(packed.size()),
                                                      config.seed, fnv1a64(concat("rows ", s)));
    plan.fingerprint = fnv1a64(concat(stage.row_length, ' ', config.seed));
    for (const auto& [name, share] : stage.mix) {
      const uint64_t source = sources[static_cast<size_t>(config.source_index(name))].fingerprint();
      plan.fingerprint = fnv1a64(concat(name, ' ', source), plan.fingerprint);
    }
    for (const int64_t row : order) {
      plan.rows.push_back(std::move(packed[static_cast<size_t>(row)]));
      for (const data::Piece& piece : plan.rows.back()) {
        const int64_t key[4] = {piece.source, piece.length, piece.document, piece.begin};
        plan.fingerprint = fnv1a64(
            std::string_view(reinterpret_cast<const char*>(key), sizeof(key)), plan.fingerprint);
      }
    }
    first_token += static_cast<int64_t>(plan.rows.size()) * stage.row_length;
    stages_.push_back(std::move(plan));
  }
}

int64_t RowPlan::tokens_before(size_t stage, int64_t row) const {
  return stages_[stage].first_token + row * stages_[stage].row_length;
}

PackedRows RowPlan::rows(size_t stage, int64_t begin, int64_t count) const {
  const StagePlan& plan = stages_[stage];
  HADAL_CHECK(begin >= 0 && count >= 1 && begin + count <= num_rows(stage), "rows ", begin, " to ",
              begin + count, " of ", num_rows(stage));
  std::vector<const data::TokenShards*> sources;
  for (const data::TokenShards& source : *sources_) sources.push_back(&source);
  return fill(sources, plan.rows.data() + begin, count, plan.row_length);
}

PackedRows validation_rows(const data::TokenShards& source,
                           bool splits,
                           int64_t rows,
                           int64_t row_length) {
  data::DocumentStream stream(source, 0, /*seed=*/0, splits);
  std::vector<data::Piece> pieces;
  stream.take(rows * row_length, row_length, pieces);
  const std::vector<data::Row> packed = data::pack_best_fit(pieces, row_length);
  return fill({&source}, packed.data(), std::min(rows, static_cast<int64_t>(packed.size())),
              row_length);
}

}  // namespace hadal::train
