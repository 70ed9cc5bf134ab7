// The header of a safetensors file: an 8-byte little-endian length, that many bytes of JSON naming
// every tensor's dtype, shape and byte range, then the data.
//
// parse_tensor_header looks only at bytes in memory and trusts none of them: whatever it returns
// describes ranges that lie inside the file, do not overlap, leave no gaps and have exactly the
// size of their shape. Every defect is an InputError that names file and tensor. Torch-free;
// checkpoint/safetensors.h makes tensors of it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace hadal {

/// Element types of our files. kF8E8M0 is a power-of-two scale (model.md 14.1); packed FP4 is kI8
/// or kU8.
enum class Dtype { kF64, kF32, kBf16, kF16, kF8E4M3, kF8E8M0, kI64, kI32, kI8, kU8, kBool };

/// The name in the header: "F64", "F32", "BF16", "F16", "F8_E4M3", "F8_E8M0", "I64", "I32", "I8",
/// "U8", "BOOL".
std::string_view dtype_name(Dtype dtype);
int64_t dtype_bytes(Dtype dtype);

struct TensorInfo {
  std::string name;
  Dtype dtype = Dtype::kF32;
  std::vector<int64_t> shape;
  int64_t begin = 0;  ///< first byte, counted from the start of the file
  int64_t end = 0;    ///< one past the last byte

  int64_t num_bytes() const { return end - begin; }
  /// The format promises no alignment, and files that have none exist.
  bool is_aligned() const { return begin % dtype_bytes(dtype) == 0; }
  int64_t num_elements() const { return num_bytes() / dtype_bytes(dtype); }
  bool operator==(const TensorInfo&) const = default;
};

struct TensorHeader {
  std::vector<TensorInfo> tensors;  ///< by offset
  std::map<std::string, std::string> metadata;
};

/// Reads the header of a whole file given as bytes. `origin` names the file in messages.
TensorHeader parse_tensor_header(std::span<const std::byte> file, const std::string& origin);

/// The bytes before the data for tensors written one after another in this order (length and JSON,
/// padded with spaces so that the data starts at a multiple of 64). Fills begin and end of every
/// entry. Tensors must be ordered so that each starts at a multiple of its element size: largest
/// element type first does it. Throws Error otherwise.
std::string make_tensor_header(std::vector<TensorInfo>& tensors,
                               const std::map<std::string, std::string>& metadata);

/// "[2, 3]": how shapes appear in messages.
std::string shape_text(std::span<const int64_t> shape);

}  // namespace hadal
