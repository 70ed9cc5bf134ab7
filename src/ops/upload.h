// Bytes of the host to tensors of a device, as fast as both memories and the bus between them
// allow: threads fill pinned buffers while earlier ones are on their way.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include <c10/core/Device.h>

namespace hadal::ops {

struct UploadPiece {
  const std::byte* from = nullptr;  ///< handed to the reader
  std::byte* to = nullptr;          ///< memory of the device
  int64_t bytes = 0;
};

class Uploader {
 public:
  /// Brings the bytes at `from` to `to`, memory of the host. Called by several threads at a time,
  /// and for parts of a piece, all but the last of which have a multiple of 64 bytes.
  using Reader = std::function<void(const std::byte* from, std::span<std::byte> to)>;

  /// For a device; on the CPU the reader writes where pieces belong. Errors: Error for a GPU in a
  /// build without CUDA.
  Uploader(c10::Device device, Reader reader);
  ~Uploader();
  Uploader(const Uploader&) = delete;
  Uploader& operator=(const Uploader&) = delete;

  c10::Device device() const { return device_; }
  /// Reads all pieces and queues their copies on the device's current stream, in front of what is
  /// queued there next. What `from` points to is needed no longer once this returns.
  void copy(const std::vector<UploadPiece>& pieces);

 private:
  struct Buffers;
  c10::Device device_;
  Reader reader_;
  std::unique_ptr<Buffers> buffers_;  ///< null on the CPU
};

}  // namespace hadal::ops
