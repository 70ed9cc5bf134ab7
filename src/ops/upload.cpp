#include "ops/upload.h"

#include <algorithm>
#include <utility>

#include "base/check.h"
#include "base/parallel.h"

#ifdef HADAL_WITH_CUDA
#include <condition_variable>
#include <deque>
#include <mutex>

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime.h>
#endif

namespace hadal::ops {
namespace {

/// Of a buffer: what the bus needs to be busy.
constexpr int64_t kBufferBytes = int64_t{4} << 20;
/// Readers get multiples of it, but for the ends of pieces.
constexpr int64_t kUnit = 64;

/// Pieces, or parts of some, that lie behind each other on the device: one copy.
struct Part {
  std::byte* to = nullptr;
  int64_t bytes = 0;
  std::vector<UploadPiece> pieces;
};

std::vector<Part> parts_of(const std::vector<UploadPiece>& pieces) {
  std::vector<Part> parts;
  for (UploadPiece left : pieces) {
    while (left.bytes > 0) {
      const bool follows = !parts.empty() && parts.back().to + parts.back().bytes == left.to &&
                           kBufferBytes - parts.back().bytes >= kUnit;
      if (!follows) parts.push_back({.to = left.to, .bytes = 0, .pieces = {}});
      Part& part = parts.back();
      const int64_t room = (kBufferBytes - part.bytes) / kUnit * kUnit;
      const int64_t bytes = std::min(left.bytes, room);
      part.pieces.push_back({.from = left.from, .to = left.to, .bytes = bytes});
      part.bytes += bytes;
      left = {.from = left.from + bytes, .to = left.to + bytes, .bytes = left.bytes - bytes};
    }
  }
  return parts;
}

/// Brings a part's bytes to `to`, memory of the host.
void read(const Part& part, const Uploader::Reader& reader, std::byte* to) {
  for (const UploadPiece& piece : part.pieces) {
    reader(piece.from, {to, static_cast<size_t>(piece.bytes)});
    to += piece.bytes;
  }
}

}  // namespace

#ifdef HADAL_WITH_CUDA

namespace {

void check_cuda(cudaError_t error, const char* what) {
  HADAL_CHECK(error == cudaSuccess, "upload: ", what, ": ", cudaGetErrorString(error));
}

}  // namespace

/// Pinned buffers; the one that has been under way longest is taken next.
struct Uploader::Buffers {
  struct Buffer {
    std::byte* memory = nullptr;
    cudaEvent_t copied = nullptr;
  };

  explicit Buffers(c10::Device on) : device(on) {
    const c10::cuda::CUDAGuard guard(device);
    const int count = 2 * num_threads() + 2;
    void* all = nullptr;
    check_cuda(cudaHostAlloc(&all, static_cast<size_t>(count * kBufferBytes), cudaHostAllocDefault),
               "pinned memory");
    memory = static_cast<std::byte*>(all);
    for (int i = 0; i < count; ++i) {
      Buffer buffer{.memory = memory + i * kBufferBytes};
      check_cuda(
          cudaEventCreateWithFlags(&buffer.copied, cudaEventDisableTiming | cudaEventBlockingSync),
          "event");
      free.push_back(buffer);
    }
  }
  ~Buffers() {
    for (const Buffer& buffer : free) {
      cudaEventSynchronize(buffer.copied);
      cudaEventDestroy(buffer.copied);
    }
    cudaFreeHost(memory);
  }

  Buffer take() {
    std::unique_lock lock(mutex);
    returned.wait(lock, [&] { return !free.empty(); });
    const Buffer buffer = free.front();
    free.pop_front();
    lock.unlock();
    return buffer;
  }
  void give(const Buffer& buffer) {
    {
      const std::scoped_lock lock(mutex);
      free.push_back(buffer);
    }
    returned.notify_one();
  }

  void send(const Part& part, const Reader& reader, cudaStream_t stream) {
    const Buffer buffer = take();
    try {
      check_cuda(cudaEventSynchronize(buffer.copied), "wait");
      read(part, reader, buffer.memory);
      check_cuda(cudaMemcpyAsync(part.to, buffer.memory, static_cast<size_t>(part.bytes),
                                 cudaMemcpyHostToDevice, stream),
                 "copy");
      check_cuda(cudaEventRecord(buffer.copied, stream), "record");
    } catch (...) {
      give(buffer);
      throw;
    }
    give(buffer);
  }

  c10::Device device;
  std::byte* memory = nullptr;
  std::mutex mutex;
  std::condition_variable returned;
  std::deque<Buffer> free;
};

#else

struct Uploader::Buffers {
  explicit Buffers(c10::Device on) {
    throw Error(concat("upload: this build has no CUDA for device ", on.str()));
  }
};

#endif

Uploader::Uploader(c10::Device device, Reader reader)
    : device_(device.is_cpu() || device.has_index() ? device : c10::Device(device.type(), 0)),
      reader_(std::move(reader)) {
  if (!device_.is_cpu()) buffers_ = std::make_unique<Buffers>(device_);
}
Uploader::~Uploader() = default;

void Uploader::copy(const std::vector<UploadPiece>& pieces) {
  const std::vector<Part> parts = parts_of(pieces);
#ifdef HADAL_WITH_CUDA
  const cudaStream_t stream =
      buffers_ ? c10::cuda::getCurrentCUDAStream(device_.index()).stream() : nullptr;
#endif
  parallel_for(std::ssize(parts), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Part& part = parts[static_cast<size_t>(i)];
#ifdef HADAL_WITH_CUDA
      if (buffers_) {
        const c10::cuda::CUDAGuard guard(device_);
        buffers_->send(part, reader_, stream);
        continue;
      }
#endif
      read(part, reader_, part.to);
    }
  });
}

}  // namespace hadal::ops
