// What the kernels' benches share: memory, data, and times of captured graphs.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include <cuda_runtime.h>

namespace hadal::ops {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "kernel_bench: %s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

template <typename T>
T* allocate(size_t count) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, count * sizeof(T)), "cudaMalloc");
  return static_cast<T*>(memory);
}

template <typename T>
T* on_device(const std::vector<T>& values) {
  T* there = allocate<T>(values.size() + 1);
  check(cudaMemcpy(there, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice),
        "copy");
  return there;
}

__device__ inline uint32_t mix(uint64_t i, uint32_t seed) {
  uint64_t x = i * 0x9e3779b97f4a7c15ull + seed;
  x ^= x >> 31;
  x *= 0xbf58476d1ce4e5b9ull;
  return static_cast<uint32_t>(x >> 32);
}

/// BF16 values around one.
static __global__ void fill_bf16(uint16_t* values, size_t count, uint32_t seed) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count;
       i += size_t{gridDim.x} * blockDim.x)
    values[i] = static_cast<uint16_t>((mix(i, seed) & 0x80ff) | 0x3f00);
}

/// Microseconds of one of the `calls` that `body` queues, by replaying them as a graph.
template <typename Body>
double microseconds(int calls, cudaStream_t stream, Body body) {
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  body();
  check(cudaStreamSynchronize(stream), "first run");
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "capture");
  body();
  check(cudaStreamEndCapture(stream, &graph), "end of capture");
  check(cudaGraphInstantiate(&executable, graph, 0), "instantiate");
  cudaEvent_t start, end;
  check(cudaEventCreate(&start), "event");
  check(cudaEventCreate(&end), "event");
  std::vector<float> times;
  for (int i = 0; i < 18; ++i) {
    cudaEventRecord(start, stream);
    check(cudaGraphLaunch(executable, stream), "replay");
    cudaEventRecord(end, stream);
    check(cudaEventSynchronize(end), "replay");
    float ms = 0;
    cudaEventElapsedTime(&ms, start, end);
    if (i >= 3) times.push_back(ms);
  }
  std::sort(times.begin(), times.end());
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
  return times[times.size() / 2] * 1000.0 / calls;
}

/// prefill: of prefill alone.
void bench_attention(cudaStream_t stream, double copy, bool prefill);
/// Of other widths, head counts and rows than V4's: hadal-nano's, BF16.
void bench_attention_any(cudaStream_t stream, double copy);
void bench_forward(cudaStream_t stream, double copy);

}  // namespace hadal::ops
