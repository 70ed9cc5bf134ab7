#include "ops/tensor_memory.h"

#include <atomic>
#include <mutex>
#include <utility>

#include <c10/core/CPUAllocator.h>

namespace hadal::ops {
namespace {

std::atomic<int64_t> held{0}, peak{0};
std::atomic<TensorMemoryWatcher*> watcher{nullptr};
std::mutex watching;

/// Passes on to the allocator that LibTorch had.
class CountingAllocator final : public c10::Allocator {
 public:
  explicit CountingAllocator(c10::Allocator* inner) : inner_(inner) {}

  c10::DataPtr allocate(size_t size) override {
    c10::DataPtr data = inner_->allocate(size);
    void* const address = data.get();
    if (address == nullptr) return data;
    const c10::Device device = data.device();
    auto* const block = new Block{.data = std::move(data), .bytes = static_cast<int64_t>(size)};
    const int64_t now = held.fetch_add(block->bytes) + block->bytes;
    int64_t before = peak.load();
    while (before < now && !peak.compare_exchange_weak(before, now)) {
    }
    if (watcher.load() != nullptr) {
      const std::lock_guard lock(watching);
      if (TensorMemoryWatcher* const w = watcher.load()) w->allocated(address, block->bytes);
    }
    return {address, block, &free, device};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

 private:
  struct Block {
    c10::DataPtr data;
    int64_t bytes;
  };
  static void free(void* context) {
    auto* const block = static_cast<Block*>(context);
    held -= block->bytes;
    if (watcher.load() != nullptr) {
      const std::lock_guard lock(watching);
      if (TensorMemoryWatcher* const w = watcher.load()) w->freed(block->data.get(), block->bytes);
    }
    delete block;
  }

  c10::Allocator* inner_;
};

}  // namespace

void count_tensor_memory() {
  // Never destroyed: tensors may outlive main().
  static auto* const allocator = [] {
    auto* const counting = new CountingAllocator(c10::GetCPUAllocator());
    constexpr uint8_t kAbove = 100;  // LibTorch's own have 0
    c10::SetCPUAllocator(counting, kAbove);
    return counting;
  }();
  static_cast<void>(allocator);
}

int64_t tensor_bytes() { return held; }
int64_t tensor_peak_bytes() { return peak; }
void reset_tensor_peak() { peak = held.load(); }

TensorMemoryWatcher* watch_tensor_memory(TensorMemoryWatcher* next) {
  const std::lock_guard lock(watching);
  return watcher.exchange(next);
}

}  // namespace hadal::ops
