#include "ops/recorded_graph.h"

#include "base/check.h"

#ifdef HADAL_WITH_CUDA
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace hadal::ops {

#ifdef HADAL_WITH_CUDA

struct GraphMemory::Parts {
  at::Device device;
  at::cuda::MempoolId_t pool;
  c10::cuda::CUDAStream stream;  // that recordings are made on: the default one cannot be recorded
};
struct RecordedGraph::Parts {
  at::cuda::CUDAGraph graph;
};

GraphMemory::GraphMemory(at::Device device)
    : parts_(std::make_unique<Parts>(Parts{
          .device = device,
          .pool = at::cuda::graph_pool_handle(),
          .stream = c10::cuda::getStreamFromPool(/*isHighPriority=*/false, device.index())})) {}

RecordedGraph::RecordedGraph(GraphMemory& memory, const std::function<void()>& work)
    : parts_(std::make_unique<Parts>()) {
  const c10::cuda::CUDAStreamGuard guard(memory.parts_->stream);
  // Other threads may go on asking the device for things.
  parts_->graph.capture_begin(memory.parts_->pool, cudaStreamCaptureModeThreadLocal);
  try {
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

#else

struct GraphMemory::Parts {};
struct RecordedGraph::Parts {};

GraphMemory::GraphMemory(at::Device device) {
  throw Error(concat("recorded_graph: this build has no CUDA for device ", device.str()));
}
RecordedGraph::RecordedGraph(GraphMemory&, const std::function<void()>&) {}
void RecordedGraph::replay() {}

#endif

GraphMemory::~GraphMemory() = default;
RecordedGraph::~RecordedGraph() = default;

}  // namespace hadal::ops
