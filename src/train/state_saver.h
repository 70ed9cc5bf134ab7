// Checkpoints written beside the steps that follow them
// (docs/decisions/0032-checkpoints-and-spikes.md).
//
// A save copies what this rank owns, then a thread writes the copy while the run goes on. All ranks
// write into one file of a temporary folder; when the last has, which they learn between two steps,
// the first writes the manifest and gives the folder its name. Older checkpoints are removed after
// that. Bytes do not depend on the number of ranks.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "dist/ranks.h"
#include "train/run_state.h"

namespace hadal::train {

struct SaverParams {
  std::string out;     ///< the run's folder, the same for all ranks
  int64_t keep = 2;    ///< whole checkpoints
  bool beside = true;  ///< false: begin() returns when the checkpoint is whole, and copies nothing
};

/// All ranks make the same calls. Errors of the writer (a full disk) are InputErrors of the next
/// call, on every rank, naming the rank, the file and the reason; the checkpoint is gone then,
/// those before it stay.
class StateSaver {
 public:
  StateSaver(SaverParams params, dist::Ranks& ranks);
  /// Waits for the thread; what is not whole is removed.
  ~StateSaver();
  StateSaver(const StateSaver&) = delete;
  StateSaver& operator=(const StateSaver&) = delete;

  /// Saves the state as it is now; first waits for the save before it. Nothing to do where that
  /// step's checkpoint exists. Errors: also InputError where a rank does not see the folder.
  void begin(const RunProgress& progress, model::Transformer& model, const Optimizer& optimizer);
  /// Between two steps: completes the save under way where all ranks have written.
  void poll();
  /// Waits until no save is under way.
  void finish();
  bool under_way() const { return write_ != nullptr; }

 private:
  struct Write;
  void conclude();
  void raise(const std::string& error_here);

  SaverParams params_;
  dist::Ranks& ranks_;
  std::unique_ptr<Write> write_;
};

}  // namespace hadal::train
