// What an accelerator's memory has room for.
#pragma once

#include <cstdint>

#include <c10/core/Device.h>

namespace hadal::ops {

struct DeviceMemory {
  int64_t free = 0, total = 0;  ///< bytes; free: of nobody on the device
};
/// Errors: Error for a device that cannot be asked, as in a build without CUDA.
DeviceMemory device_memory(c10::Device device);

}  // namespace hadal::ops
