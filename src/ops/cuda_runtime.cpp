// The one place where host code of the ops meets the CUDA runtime of LibTorch.
#include "base/check.h"
#include "ops/kernel_types.h"
#include "ops/op.h"

#ifdef HADAL_WITH_CUDA
#include <c10/cuda/CUDAStream.h>
#endif

namespace hadal::ops {

void throw_kernel_error(const char* kernel, const char* message) {
  throw Error(concat(kernel, ": ", message));
}

Stream current_stream([[maybe_unused]] const at::Tensor& x) {
#ifdef HADAL_WITH_CUDA
  if (x.is_cuda()) return c10::cuda::getCurrentCUDAStream(x.device().index()).stream();
#endif
  return nullptr;
}

}  // namespace hadal::ops
