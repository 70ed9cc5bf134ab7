// The rows of a whole training run, planned from its configuration before it starts.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "data/packing.h"
#include "train/objective.h"
#include "train/run_config.h"

namespace hadal::train {

/// Token files of a run's sources, in their order; tokenises what is not there yet.
std::vector<data::TokenShards> open_sources(const RunConfig& config);

class RowPlan {
 public:
  RowPlan(const RunConfig& config, const std::vector<data::TokenShards>& sources);

  int64_t num_rows(size_t stage) const { return static_cast<int64_t>(stages_[stage].rows.size()); }
  /// Tokens consumed before a row of a stage.
  int64_t tokens_before(size_t stage, int64_t row) const;
  int64_t total_tokens() const {
    return tokens_before(stages_.size() - 1, num_rows(stages_.size() - 1));
  }
  /// Identifies the rows of a stage: a run may only go on with the rows it began with.
  uint64_t fingerprint(size_t stage) const { return stages_[stage].fingerprint; }
  /// Rows [begin, begin + count) of a stage.
  PackedRows rows(size_t stage, int64_t begin, int64_t count) const;
  /// What a stage takes from every source, for the log: "books 1.25 passes, ...".
  const std::string& summary(size_t stage) const { return stages_[stage].summary; }

 private:
  struct StagePlan {
    int64_t row_length = 0;
    int64_t first_token = 0;
    uint64_t fingerprint = 0;
    std::vector<data::Row> rows;
    std::string summary;
  };
  const std::vector<data::TokenShards>* sources_;
  std::vector<StagePlan> stages_;
};

/// Rows of one source for validation: the same whatever else the run does.
PackedRows validation_rows(const data::TokenShards& source,
                           bool splits,
                           int64_t rows,
                           int64_t row_length);

}  // namespace hadal::train
