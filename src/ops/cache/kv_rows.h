// Rows of the caches as they are stored (kv_cache.md): dense, or in the released precision.
//
// A packed row holds what a row that went through its round trip (model.md 14.1 to 14.3) already
// is, bit for bit: packing and unpacking change nothing.
//   latent     [width - rotary] E4M3, [rotary] BF16, a UE8M0 byte per 64 of the former, zeros up to
//              a multiple of 8: 584 bytes for 512 channels with 64 rotary ones
//   index key  [width / 2] E2M1 pairs, the even channel in the low half, a UE8M0 byte per 32: 68
//              bytes for 128 channels
// docs/kv_cache.md
#pragma once

#include <cstdint>

#include "base/cpu.h"
#include "base/fwd.h"

namespace hadal::ops {

enum class RowKind : uint8_t { kDense, kLatent, kIndexKey };

struct RowFormat {
  RowKind kind = RowKind::kDense;
  int64_t width = 0;   ///< channels
  int64_t rotary = 0;  ///< of a latent: the last so many
  /// Bytes of a packed row; 0 for a dense one, whose size its tensor knows.
  constexpr int64_t bytes() const {
    const int64_t rounded = width - rotary;
    if (kind == RowKind::kLatent) return (rounded + 2 * rotary + rounded / 64 + 7) / 8 * 8;
    if (kind == RowKind::kIndexKey) return width / 2 + width / 32;
    return 0;
  }
  bool packed() const { return kind != RowKind::kDense; }
  friend bool operator==(const RowFormat&, const RowFormat&) = default;
};

/// Packs BF16 rows [n, width] that went through their round trip into bytes [n, format.bytes()], on
/// their device. On the CPU: Error for a row that no round trip gave, with its number; elsewhere
/// nobody looks, since the host would have to wait for the answer.
at::Tensor pack_rows(const at::Tensor& rows, const RowFormat& format);
namespace reference {
at::Tensor pack_rows(const at::Tensor& rows, const RowFormat& format);
}  // namespace reference

/// Bytes [n, format.bytes()] -> BF16 rows [n, width]; plain ATen, any device: the definition.
at::Tensor unpack_rows(const at::Tensor& bytes, const RowFormat& format);

/// rows as `format` says: unpacked, or as they are.
at::Tensor dense_rows(const at::Tensor& rows, const RowFormat& format);

/// One row of n: packs BF16 into bytes; false when it was not rounded before.
bool pack_row(const uint16_t* row, const RowFormat& format, uint8_t* out);

}  // namespace hadal::ops
