// The one place that asks LibTorch's CUDA side anything; a CPU build answers without it.
#include "base/check.h"
#include "ops/op.h"

#ifdef HADAL_WITH_CUDA
#include <c10/cuda/CUDAStream.h>
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

}  // namespace hadal::ops
