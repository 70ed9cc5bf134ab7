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

/// Of a buffer: long enough for the bus, short enough for the processor's caches, in which it is
/// looked at after it was read.
constexpr int64_t kBufferBytes = int64_t{2} << 20;

/// Pieces cut to buffers.
std::vector<UploadPiece> cut(const std::vector<UploadPiece>& pieces) {
  std::vector<UploadPiece> result;
  for (const UploadPiece& piece : pieces) {
    for (int64_t at = 0; at < piece.bytes; at += kBufferBytes)
      result.push_back({.from = piece.from + at,
                        .to = piece.to + at,
                        .bytes = std::min(kBufferBytes, piece.bytes - at)});
  }
  return result;
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
    const int count = 3 * num_threads();
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

  void send(const UploadPiece& piece, const Reader& reader, cudaStream_t stream) {
    const Buffer buffer = take();
    try {
      check_cuda(cudaEventSynchronize(buffer.copied), "wait");
      reader(piece.from, {buffer.memory, static_cast<size_t>(piece.bytes)});
      check_cuda(cudaMemcpyAsync(piece.to, buffer.memory, static_cast<size_t>(piece.bytes),
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
  const std::vector<UploadPiece> parts = cut(pieces);
#ifdef HADAL_WITH_CUDA
  const cudaStream_t stream =
      buffers_ ? c10::cuda::getCurrentCUDAStream(device_.index()).stream() : nullptr;
#endif
  parallel_for(std::ssize(parts), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const UploadPiece& part = parts[static_cast<size_t>(i)];
#ifdef HADAL_WITH_CUDA
      if (buffers_) {
        const c10::cuda::CUDAGuard guard(device_);
        buffers_->send(part, reader_, stream);
        continue;
      }
#endif
      reader_(part.from, {part.to, static_cast<size_t>(part.bytes)});
    }
  });
}

}  // namespace hadal::ops
