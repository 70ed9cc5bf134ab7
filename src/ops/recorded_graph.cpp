#include "ops/recorded_graph.h"

#include "base/check.h"
#include "base/log.h"

#ifdef HADAL_WITH_CUDA
#include <array>

#include <ATen/cuda/CUDAEvent.h>
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace hadal::ops {

#ifdef HADAL_WITH_CUDA

namespace {

c10::cuda::CUDAStream new_stream(at::Device device) {
  return c10::cuda::getStreamFromPool(/*isHighPriority=*/false, device.index());
}

struct Branch {
  explicit Branch(at::Device device) : stream(new_stream(device)) {}
  c10::cuda::CUDAStream stream;
  at::cuda::CUDAEvent forked, done;
};

/// The branches of the graph that this thread records.
thread_local std::array<Branch, SideBranch::kBranches>* recording = nullptr;

}  // namespace

struct GraphMemory::Parts {
  explicit Parts(at::Device on)
      : device(on), stream(new_stream(on)), branches{Branch(on), Branch(on), Branch(on)} {
    static_assert(SideBranch::kBranches == 3);
  }
  at::Device device;
  at::cuda::MempoolId_t pool = at::cuda::graph_pool_handle();
  c10::cuda::CUDAStream stream;  // that recordings are made on: the default one cannot be recorded
  std::array<Branch, SideBranch::kBranches> branches;
};
struct RecordedGraph::Parts {
  at::cuda::CUDAGraph graph;
};

GraphMemory::GraphMemory(at::Device device) : parts_(std::make_unique<Parts>(device)) {}

void GraphMemory::renew() { parts_->pool = at::cuda::graph_pool_handle(); }

RecordedGraph::RecordedGraph(GraphMemory& memory, const std::function<void()>& work)
    : parts_(std::make_unique<Parts>()) {
  const c10::cuda::CUDAStreamGuard guard(memory.parts_->stream);
  // Other threads may go on asking the device for things.
  parts_->graph.capture_begin(memory.parts_->pool, cudaStreamCaptureModeThreadLocal);
  struct Recording {
    explicit Recording(GraphMemory::Parts& parts) { recording = &parts.branches; }
    ~Recording() { recording = nullptr; }
  };
  try {
    const Recording branches(*memory.parts_);
    work();
  } catch (...) {
    // The stream must stop recording, which it only says in the same way.
    try {
      parts_->graph.capture_end();
    } catch (const std::exception&) {
    }
    throw;
  }
  parts_->graph.capture_end();
}

void RecordedGraph::replay() { parts_->graph.replay(); }

void SideBranch::run(const std::function<void()>& work) {
  if (recording == nullptr) return work();
  Branch& branch = (*recording)[static_cast<size_t>(number_)];
  branch.forked.record();
  branch.forked.block(branch.stream);
  forked_ = true;
  const c10::cuda::CUDAStreamGuard guard(branch.stream);
  work();
}

void SideBranch::join() {
  if (!forked_) return;
  forked_ = false;
  if (recording == nullptr) return;
  Branch& branch = (*recording)[static_cast<size_t>(number_)];
  branch.done.record(branch.stream);
  branch.done.block(c10::cuda::getCurrentCUDAStream(branch.stream.device_index()));
}

#else

struct GraphMemory::Parts {};
struct RecordedGraph::Parts {};

GraphMemory::GraphMemory(at::Device device) {
  throw Error(concat("recorded_graph: this build has no CUDA for device ", device.str()));
}
void GraphMemory::renew() {}
RecordedGraph::RecordedGraph(GraphMemory&, const std::function<void()>&) {}
void RecordedGraph::replay() {}

void SideBranch::run(const std::function<void()>& work) { work(); }
void SideBranch::join() {}

#endif

SideBranch::SideBranch(int number) : number_(number) {
  HADAL_CHECK(number >= 0 && number < kBranches, "side branch ", number, " of ", kBranches);
}

SideBranch::~SideBranch() {
  try {
    join();
  } catch (const std::exception& error) {
    // The recording, which is thrown away with all its branches, says why by itself.
    log::warn("graph", "branch ", number_, " of a recording: ", error.what());
  }
}

GraphMemory::~GraphMemory() = default;
RecordedGraph::~RecordedGraph() = default;

}  // namespace hadal::ops
