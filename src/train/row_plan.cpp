#include "train/row_plan.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numeric>

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

/// The tokens of a stage as the file has them now, behind those it has begun with.
std::vector<int64_t> parts_of(const RunConfig& config, const StageParts& begun, size_t index) {
  const Stage& stage = config.stages[index];
  if (index >= begun.size() || begun[index].empty()) return {stage.tokens};
  std::vector<int64_t> parts = begun[index];
  const int64_t before = std::accumulate(parts.begin(), parts.end(), int64_t{0});
  if (stage.tokens == before) return parts;
  HADAL_INPUT_CHECK(stage.tokens > before, config.path, ": stage ", stage.name,
                    ": tokens: began with ", before, ", found ", stage.tokens,
                    "; what a stage has begun with can be raised, not lowered");
  HADAL_INPUT_CHECK(index + 1 == begun.size(), config.path, ": stage ", stage.name,
                    ": tokens: was ", before, ", found ", stage.tokens,
                    ", but a later stage has begun; "
                    "add a stage behind it instead");
  parts.push_back(stage.tokens - before);
  return parts;
}

/// The next tokens of a stage's mixture.
std::vector<data::Piece> take(const RunConfig& config,
                              const Stage& stage,
                              int64_t stage_tokens,
                              std::vector<data::DocumentStream>& streams,
                              std::string& summary) {
  double total = 0.0;
  for (const auto& [name, share] : stage.mix) total += share;
  std::vector<data::Piece> pieces;
  for (const auto& [name, share] : stage.mix) {
    if (share == 0.0) continue;
    const auto index = static_cast<size_t>(config.source_index(name));
    const auto tokens =
        static_cast<int64_t>(std::llround(static_cast<double>(stage_tokens) * share / total));
    const double before = streams[index].passes();
    streams[index].take(tokens, stage.row_length, pieces);
    char text[64];
    std::snprintf(text, sizeof(text), " %.3f to %.3f passes", before, streams[index].passes());
    summary += concat(summary.empty() ? "" : ", ", name, text);
  }
  return pieces;
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

RowPlan::RowPlan(const RunConfig& config,
                 const std::vector<data::TokenShards>& sources,
                 const StageParts& begun)
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
    const std::vector<int64_t> parts = parts_of(config, begun, s);
    plan.begun = s < begun.size() ? begun[s].size() : 0;
    uint64_t fingerprint = fnv1a64(concat(stage.row_length, ' ', config.seed));
    for (const auto& [name, share] : stage.mix) {
      const uint64_t source = sources[static_cast<size_t>(config.source_index(name))].fingerprint();
      fingerprint = fnv1a64(concat(name, ' ', source), fingerprint);
    }
    for (size_t part = 0; part < parts.size(); ++part) {
      std::vector<data::Row> packed = data::pack_best_fit(
          take(config, stage, parts[part], streams, plan.summary), stage.row_length);
      const std::string purpose = concat("rows ", s, part > 0 ? concat(" part ", part) : "");
      for (const int64_t row : data::shuffled(std::ssize(packed), config.seed, fnv1a64(purpose))) {
        plan.rows.push_back(std::move(packed[static_cast<size_t>(row)]));
        for (const data::Piece& piece : plan.rows.back()) {
          const int64_t key[4] = {piece.source, piece.length, piece.document, piece.begin};
          fingerprint = fnv1a64(std::string_view(reinterpret_cast<const char*>(key), sizeof(key)),
                                fingerprint);
        }
      }
      plan.parts.push_back(
          {.tokens = parts[part], .end_row = std::ssize(plan.rows), .fingerprint = fingerprint});
    }
    first_token += std::ssize(plan.rows) * stage.row_length;
    stages_.push_back(std::move(plan));
  }
}

std::vector<int64_t> RowPlan::parts(size_t stage) const {
  std::vector<int64_t> tokens;
  for (const Part& part : stages_[stage].parts) tokens.push_back(part.tokens);
  return tokens;
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
