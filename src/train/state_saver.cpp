#include "train/state_saver.h"

#include <atomic>
#include <cstring>
#include <exception>
#include <filesystem>
#include <thread>
#include <utility>
#include <vector>

#include <ATen/ATen.h>

#include "base/check.h"
#include "base/file.h"
#include "checkpoint/checksum.h"
#include "checkpoint/safetensors.h"
#include "train/state_copy.h"
#include "train/state_manifest.h"

namespace hadal::train {
namespace {

namespace fs = std::filesystem;

/// As the file has them; what this rank writes of each.
std::vector<checkpoint::NamedTensor> written_here(const std::vector<NamedState>& state,
                                                  bool leads) {
  std::vector<checkpoint::NamedTensor> result;
  for (const NamedState& each : state) {
    checkpoint::NamedTensor tensor{.name = each.tensor.name, .tensor = each.tensor.whole};
    // What all ranks of a stage have is the first one's of them to write.
    if (leads || !each.everywhere)
      for (const auto& [begin, values] : each.tensor.parts) tensor.parts.push_back({begin, values});
    result.push_back(std::move(tensor));
  }
  return result;
}

/// The checksum of every block of every tensor, zero where another rank writes it.
std::vector<int64_t> block_checksums(const std::vector<NamedState>& state, bool leads) {
  std::vector<int64_t> sums;
  for (const NamedState& each : state) {
    const auto blocks = checked_blocks(each.tensor.whole.numel(), each.unit);
    const size_t start = sums.size();
    sums.resize(start + blocks.size(), 0);
    if (!leads && each.everywhere) continue;
    for (const auto& [begin, values] : each.tensor.parts) {
      const auto size = static_cast<int64_t>(values.element_size());
      const at::Tensor dense = values.detach().to(at::kCPU).contiguous();
      const auto* data = static_cast<const std::byte*>(dense.const_data_ptr());
      const int64_t end = begin + values.numel();
      auto block = std::ranges::lower_bound(blocks, begin, {}, &CheckedBlock::begin);
      for (int64_t at = begin; at < end; ++block) {
        HADAL_CHECK(block != blocks.end() && block->begin == at && block->end <= end,
                    "checkpoint: ", each.tensor.name, ": a part of elements ", begin, " to ", end,
                    " cuts a unit of ", each.unit);
        const uint64_t sum = checkpoint::checksum(
            {data + (at - begin) * size, static_cast<size_t>((block->end - at) * size)});
        sums[start + static_cast<size_t>(block - blocks.begin())] = static_cast<int64_t>(sum);
        at = block->end;
      }
    }
  }
  return sums;
}

}  // namespace

struct StateSaver::Write {
  std::string target, temporary;
  std::unique_ptr<AtomicDirectory> directory;  ///< the first rank's
  std::string progress;
  int64_t step = 0;
  StateCopy copy;
  std::vector<NamedState> state;  ///< of the copy, or where nothing is copied the run's own
  std::vector<int64_t> checksums;
  std::string error;
  std::atomic<bool> done = false;
  std::thread thread;

  std::string file() const { return temporary + "/" + kStateFile; }
  /// Of several ranks the file is there already.
  void write(bool leads, bool alone) {
    try {
      checksums = block_checksums(state, leads);
      const auto tensors = written_here(state, leads);
      if (alone) checkpoint::create_safetensors(file(), tensors);
      checkpoint::fill_safetensors(file(), tensors);
    } catch (const std::exception& failed) {
      error = failed.what();
    }
    done = true;
  }
  ~Write() {
    if (thread.joinable()) thread.join();
  }
};

StateSaver::StateSaver(SaverParams params, dist::Ranks& ranks)
    : params_(std::move(params)), ranks_(ranks) {}
StateSaver::~StateSaver() = default;

void StateSaver::begin(const RunProgress& progress,
                       model::Transformer& model,
                       const Optimizer& optimizer) {
  finish();
  const bool first = ranks_.first(), alone = ranks_.size() == 1;
  const dist::MeshPlace place = optimizer.ownership().mesh().place(ranks_.rank());
  const bool leads = place.data == 0 && place.context == 0;
  const fs::path folder = fs::path(params_.out) / "checkpoints";
  auto write = std::make_unique<Write>();
  write->step = progress.step;
  write->target = (folder / concat("step-", progress.step)).string();
  std::vector<NamedState> state = named_state(model, optimizer);
  // The first rank looks and makes, so that all do the same.
  std::string problem;
  if (first) {
    try {
      fs::create_directories(folder);
      if (!fs::exists(write->target)) {
        write->directory = std::make_unique<AtomicDirectory>(write->target);
        write->temporary = write->directory->temporary();
        if (!alone) checkpoint::create_safetensors(write->file(), written_here(state, first));
      }
    } catch (const std::exception& error) {
      problem = error.what();
    }
  }
  raise(problem);
  write->temporary = ranks_.broadcast(write->temporary);
  if (write->temporary.empty()) return;
  raise(alone || fs::exists(write->file())
            ? ""
            : concat(write->file(), ": expected in a folder that all ranks see, not found"));
  write->progress = progress_json(progress, optimizer);
  if (params_.beside) {
    write->copy = StateCopy(std::move(state));
    write->state = write->copy.tensors();
    write->thread = std::thread([raw = write.get(), leads, alone] { raw->write(leads, alone); });
    write_ = std::move(write);
    return;
  }
  write->state = std::move(state);
  write->write(leads, alone);
  write_ = std::move(write);
  conclude();
}

void StateSaver::poll() {
  if (!write_) return;
  if (!ranks_.any(!write_->done)) conclude();
}

void StateSaver::finish() {
  if (!write_) return;
  ranks_.enter(concat("writing ", write_->target));
  conclude();
}

void StateSaver::conclude() {
  const std::unique_ptr<Write> write = std::move(write_);
  if (write->thread.joinable()) write->thread.join();
  raise(write->error);
  ranks_.sum(write->checksums);
  std::string problem;
  if (ranks_.first()) {
    try {
      write_file_atomic(concat(write->temporary, "/", kProgressFile), write->progress);
      write_manifest(write->temporary, write->step, write->state, write->checksums);
      write->directory->commit();
    } catch (const std::exception& error) {
      problem = error.what();
    }
  }
  raise(problem);
  if (ranks_.first()) remove_older_states(params_.out, params_.keep);
}

void StateSaver::raise(const std::string& error_here) {
  if (ranks_.size() == 1) {
    if (!error_here.empty()) throw InputError(concat("checkpoint: ", error_here));
    return;
  }
  std::vector<int64_t> lengths(static_cast<size_t>(ranks_.size()), 0);
  lengths[static_cast<size_t>(ranks_.rank())] = std::ssize(error_here);
  ranks_.sum(lengths);
  for (int64_t rank = 0; rank < ranks_.size(); ++rank) {
    const int64_t length = lengths[static_cast<size_t>(rank)];
    if (length == 0) continue;
    const at::Tensor text = at::empty({length}, at::kByte);
    if (rank == ranks_.rank())
      std::memcpy(text.mutable_data_ptr(), error_here.data(), error_here.size());
    ranks_.broadcast(text, rank).wait();
    const std::string told(static_cast<const char*>(text.const_data_ptr()),
                           static_cast<size_t>(length));
    throw InputError(concat("checkpoint: rank ", rank, ": ", told));
  }
}

}  // namespace hadal::train
