// Attention of queries over cached latents on Hopper, as functions of pointers, and its twin on the
// CPU. Numerics that round probabilities (sparse_attn.h has the definition); free of ATen.
//
// A token's list is its places: first those of the window, then those of compressed rows. A place
// holds the number of a row, or none. The bits of a token's result depend on its queries, its sinks
// and its list alone (docs/decisions/0011-attention-tree.md): places without a row change nothing
// where they stand, but count: chunks of 64 and segments of 1,536 places begin at multiples of
// these from the list's start.
#pragma once

#include "ops/cache/kv_rows.h"
#include "ops/kernel_types.h"

namespace hadal::ops {

/// Channels of a latent in DeepSeek-V4 and bytes of it packed; its rotary channels.
inline constexpr int64_t kLatentDim = 512, kLatentRowBytes = 584, kAttnRotary = 64;
inline constexpr int64_t kAttnChunk = 64, kAttnSegment = 1536;
/// Places of a window of so many positions: whole chunks.
constexpr int64_t attn_window_places(int64_t window) {
  return (window + kAttnChunk - 1) / kAttnChunk * kAttnChunk;
}

/// How latents lie in memory: packed as a cache has them in `released` (kv_rows.h), or BF16.
enum class AttnRows : uint8_t { kPacked, kBf16 };
constexpr RowFormat packed_latent(int64_t width) {
  return {.kind = RowKind::kLatent, .width = width, .rotary = kAttnRotary};
}
constexpr int64_t attn_row_bytes(int64_t width, AttnRows format) {
  return format == AttnRows::kBf16 ? 2 * width : packed_latent(width).bytes();
}
static_assert(attn_row_bytes(kLatentDim, AttnRows::kPacked) == kLatentRowBytes);
/// Widths of a latent that the kernels and the twin serve.
constexpr bool serves_attn_width(int64_t width) {
  return width >= 64 && width <= 512 && width % 64 == 0;
}

struct SparseAttnSm90Params {
  const uint16_t* q;          ///< [tokens, heads, width] BF16
  const float* sink;          ///< [heads]
  const uint8_t* window;      ///< latents, attn_row_bytes(width, format) each, no NaN; packed ones
                              ///< 8-byte aligned, BF16 ones 16-byte aligned
  const uint8_t* blocks;      ///< the same: compressed rows
  const int32_t* window_row;  ///< [tokens, window_places] rows of `window`, negative: none
  const int32_t* block_row;   ///< [tokens, block_places] rows of `blocks`, negative: none
  const int32_t* num_blocks;  ///< [tokens] places of block_row that count; null: all
  int64_t tokens, heads;
  int64_t window_places;  ///< a multiple of 64
  int64_t block_places;
  float scale;     ///< of the logits
  uint16_t* out;   ///< [tokens, heads, width] BF16; 0 where a list is empty
  float* stats;    ///< [tokens, heads, 2] the largest logit and the denominator, or null
  float* scratch;  ///< sparse_attn_scratch_floats(p)
  /// Packed latents as BF16 rows of 512 (widen_latents_sm90), 16-byte aligned, for prefill: many
  /// tokens that read the same rows need not widen each of them anew. Both or neither; `window` and
  /// `blocks` are there anyway, for the kernel of few tokens.
  const uint16_t* wide_window;
  const uint16_t* wide_blocks;
  int64_t width = kLatentDim;  ///< channels of a latent: serves_attn_width
  AttnRows format = AttnRows::kPacked;
};

inline int64_t sparse_attn_segments(const SparseAttnSm90Params& p) {
  const int64_t places = p.window_places + p.block_places;
  return places <= kAttnSegment ? 1 : (places + kAttnSegment - 1) / kAttnSegment;
}
/// What blocks compute one after the other or together: a token's 64 heads, one segment.
inline int64_t sparse_attn_items(const SparseAttnSm90Params& p) {
  return p.tokens * (p.heads / 64) * sparse_attn_segments(p);
}
/// Whether the kernels of tiles of 64 heads and 512 channels are for it.
inline bool serves_whole_tiles(const SparseAttnSm90Params& p) {
  return p.width == kLatentDim && p.heads % 64 == 0;
}

/// Which kernel computes it changes no bit. kMany: serves_whole_tiles; kFew and kFewWide (8 and 16
/// blocks an item): of packed latents, too.
enum class SparseAttnKernel { kByShape, kFew, kFewWide, kMany, kAny };
inline SparseAttnKernel sparse_attn_kernel(const SparseAttnSm90Params& p) {
  if (!serves_whole_tiles(p)) return SparseAttnKernel::kAny;
  if (sparse_attn_items(p) > 24) return SparseAttnKernel::kMany;
  if (p.format != AttnRows::kPacked) return SparseAttnKernel::kAny;
  // Sixteen blocks save a round where eight need two, and find room beside little else.
  const bool wide = p.window_places + p.block_places > 8 * kAttnChunk && sparse_attn_items(p) <= 2;
  return wide ? SparseAttnKernel::kFewWide : SparseAttnKernel::kFew;
}
/// Floats of weights that up to sixteen blocks exchange in one item, twice.
inline constexpr int64_t kAttnExchange = 2 * 16 * 64 * kAttnChunk / 2;
inline int64_t sparse_attn_scratch_floats(const SparseAttnSm90Params& p,
                                          SparseAttnKernel kernel = SparseAttnKernel::kByShape) {
  const int64_t segments = sparse_attn_segments(p);
  if (kernel == SparseAttnKernel::kByShape) kernel = sparse_attn_kernel(p);
  return (segments == 1 ? 0 : p.tokens * segments * p.heads * (p.width + 2)) +
         (kernel == SparseAttnKernel::kFew || kernel == SparseAttnKernel::kFewWide
              ? sparse_attn_items(p) * kAttnExchange
              : 0);
}
void sparse_attn_sm90(const SparseAttnSm90Params& p,
                      Stream stream,
                      SparseAttnKernel kernel = SparseAttnKernel::kByShape);

/// Latents as BF16 rows, exactly.
struct WidenLatentsSm90Params {
  const uint8_t* latents;  ///< of 584 bytes
  const int32_t* row;      ///< [rows] which of them; null: row i
  uint16_t* wide;          ///< [rows, 512]
  int64_t rows;
};
void widen_latents_sm90(const WidenLatentsSm90Params& p, Stream stream);

/// One token with the bits of sparse_attn_sm90, on a CPU.
struct SparseAttnTwinTask {
  const uint16_t* q;           ///< [heads, width] BF16
  const float* sink;           ///< [heads]
  const uint8_t* const* rows;  ///< [places] the latents of the list; null: none
  int64_t heads, places;
  float scale;
  uint16_t* out;               ///< [heads, width] BF16
  float* stats;                ///< [heads, 2]
  int64_t width = kLatentDim;  ///< channels of a latent: serves_attn_width
  AttnRows format = AttnRows::kPacked;
};
void sparse_attn_twin(const SparseAttnTwinTask& t);
/// sparse_attn_sm90 on a CPU.
void sparse_attn_step_twin(const SparseAttnSm90Params& p);

}  // namespace hadal::ops
