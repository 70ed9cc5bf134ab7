// The rows of a whole training run, planned from its configuration before it starts.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "data/packing.h"
#include "train/objective.h"
#include "train/run_config.h"
#include "train/run_state.h"

namespace hadal::train {

/// Token files of a run's sources, in their order; tokenises what is not there yet.
std::vector<data::TokenShards> open_sources(const RunConfig& config);

class RowPlan {
 public:
  /// `begun`: the tokens with which stages have begun, part by part. The last of them may have got
  /// more since: further rows follow those it has. Errors: InputError where a stage has got fewer,
  /// or an earlier one more.
  RowPlan(const RunConfig& config,
          const std::vector<data::TokenShards>& sources,
          const StageParts& begun = {});

  int64_t num_rows(size_t stage) const { return static_cast<int64_t>(stages_[stage].rows.size()); }
  /// Tokens consumed before a row of a stage.
  int64_t tokens_before(size_t stage, int64_t row) const;
  int64_t total_tokens() const {
    return tokens_before(stages_.size() - 1, num_rows(stages_.size() - 1));
  }
  /// Identifies the rows of a stage: a run may only go on with the rows it began with.
  uint64_t fingerprint(size_t stage) const { return stages_[stage].parts.back().fingerprint; }
  /// The same of the parts that `begun` named, and how many rows they are; of all where it named
  /// none.
  uint64_t begun_fingerprint(size_t stage) const { return begun_part(stage).fingerprint; }
  int64_t begun_rows(size_t stage) const { return begun_part(stage).end_row; }
  std::vector<int64_t> parts(size_t stage) const;
  /// Rows [begin, begin + count) of a stage.
  PackedRows rows(size_t stage, int64_t begin, int64_t count) const;
  /// What a stage takes from every source, for the log: "books 1.25 passes, ...".
  const std::string& summary(size_t stage) const { return stages_[stage].summary; }

 private:
  struct Part {
    int64_t tokens = 0;        ///< taken from the sources
    int64_t end_row = 0;       ///< of the stage
    uint64_t fingerprint = 0;  ///< of the stage's rows up to there
  };
  struct StagePlan {
    int64_t row_length = 0;
    int64_t first_token = 0;
    std::vector<Part> parts;
    size_t begun = 0;  ///< parts named by the checkpoint
    std::vector<data::Row> rows;
    std::string summary;
  };
  const Part& begun_part(size_t stage) const {
    const StagePlan& plan = stages_[stage];
    return plan.begun > 0 ? plan.parts[plan.begun - 1] : plan.parts.back();
  }

  const std::vector<data::TokenShards>* sources_;
  std::vector<StagePlan> stages_;
};

/// Rows of one source for validation: the same whatever else the run does.
PackedRows validation_rows(const data::TokenShards& source,
                           bool splits,
                           int64_t rows,
                           int64_t row_length);

}  // namespace hadal::train
