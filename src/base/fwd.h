// Forward declarations, so that headers of ops and models need neither ATen nor CUDA.
#pragma once

namespace at {
class Tensor;
}  // namespace at

namespace hadal {
/// A CUDA stream as an opaque handle (cudaStream_t); null is the default stream.
using Stream = void*;
}  // namespace hadal
