// The one place that asks LibTorch's CUDA side anything; a CPU build answers without it.
#include "base/check.h"
#include "ops/device_memory.h"
#include "ops/op.h"
#include "ops/sm90.h"

#ifdef HADAL_WITH_CUDA
#include <array>
#include <atomic>

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime.h>
#endif

namespace hadal::ops {

Stream current_stream(const at::Tensor& x) {
  if (x.is_cpu()) return nullptr;
#ifdef HADAL_WITH_CUDA
  return c10::cuda::getCurrentCUDAStream(x.device().index()).stream();
#else
  throw Error("this build has no CUDA: configure with the cuda preset");
#endif
}

void require_sm90(at::Device device) {
#ifdef HADAL_WITH_CUDA
  static std::array<std::atomic<bool>, 64> known{};
  const auto index = static_cast<size_t>(device.index());
  HADAL_CHECK(index < known.size(), "device ", device.str(), ": beyond the 64 that are known");
  if (known[index]) return;
  cudaDeviceProp properties{};
  HADAL_CHECK(cudaGetDeviceProperties(&properties, device.index()) == cudaSuccess, "device ",
              device.str(), ": cannot be asked what it is");
  HADAL_CHECK(properties.major == 9 && properties.minor == 0, "device ", device.str(), ", ",
              properties.name, ", has compute capability ", properties.major, ".", properties.minor,
              "; hadal's kernels are for 9.0 (Hopper)");
  known[index] = true;
#else
  throw Error(
      concat("device ", device.str(), ": this build has no CUDA: configure with the cuda preset"));
#endif
}

DeviceMemory device_memory(c10::Device device) {
#ifdef HADAL_WITH_CUDA
  const c10::cuda::CUDAGuard guard(device.has_index() ? device : c10::Device(at::kCUDA, 0));
  size_t free = 0, total = 0;
  HADAL_CHECK(cudaMemGetInfo(&free, &total) == cudaSuccess, "device ", device.str(),
              ": cannot be asked for its memory");
  return {.free = static_cast<int64_t>(free), .total = static_cast<int64_t>(total)};
#else
  throw Error(
      concat("device ", device.str(), ": this build has no CUDA: configure with the cuda preset"));
#endif
}

}  // namespace hadal::ops
