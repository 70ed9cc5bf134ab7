// libFuzzer target: any bytes either are a well-formed header, whose promises are checked here, or
// an InputError.
#include <cstdint>
#include <cstdlib>
#include <span>

#include "base/check.h"
#include "base/tensor_file.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto bytes = std::as_bytes(std::span(data, size));
  try {
    const hadal::TensorHeader header = hadal::parse_tensor_header(bytes, "input");
    int64_t end =
        header.tensors.empty() ? static_cast<int64_t>(size) : header.tensors.front().begin;
    for (const hadal::TensorInfo& tensor : header.tensors) {
      int64_t elements = 1;
      for (const int64_t extent : tensor.shape) elements *= extent;
      if (tensor.begin != end || tensor.end < tensor.begin || elements != tensor.num_elements())
        std::abort();
      end = tensor.end;
    }
    if (end != static_cast<int64_t>(size)) std::abort();
  } catch (const hadal::InputError&) {
    // The expected outcome for nearly every input.
  }
  return 0;
}
