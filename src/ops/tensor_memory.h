// Bytes that tensors on the CPU hold: counted where LibTorch allocates them.
#pragma once

#include <cstdint>

namespace hadal::ops {

/// Told of every allocation on the CPU while it watches (watch_tensor_memory), under a lock.
class TensorMemoryWatcher {
 public:
  virtual ~TensorMemoryWatcher() = default;
  virtual void allocated(const void* data, int64_t bytes) = 0;
  virtual void freed(const void* data, int64_t bytes) = 0;
};

/// From here on LibTorch's tensors on the CPU are counted; those that were there before are not.
/// Calling it again does nothing. For one thread, before others allocate.
void count_tensor_memory();

/// Bytes that counted tensors hold, and the most since the last reset_tensor_peak().
int64_t tensor_bytes();
int64_t tensor_peak_bytes();
void reset_tensor_peak();

/// Null: nobody. The watcher before is given back.
TensorMemoryWatcher* watch_tensor_memory(TensorMemoryWatcher* watcher);

}  // namespace hadal::ops
