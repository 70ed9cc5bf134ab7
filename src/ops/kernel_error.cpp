#include "base/check.h"
#include "ops/kernel_types.h"

namespace hadal::ops {

void throw_kernel_error(const char* kernel, const char* message) {
  throw Error(concat(kernel, ": ", message));
}

}  // namespace hadal::ops
