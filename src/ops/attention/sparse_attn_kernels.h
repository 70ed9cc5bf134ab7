// Kernel contracts of sparse_attn on CUDA: whole samples from position 0 (training and one-shot
// prefill), head_dim 128, BF16. Other shapes run the reference.
#pragma once

#include <cstdint>

#include "base/fwd.h"
#include "base/kernel_slot.h"

namespace hadal::ops {

/// A run of consecutive tokens of one sequence.
struct TokenTile {
  int32_t first_token;  ///< row in the packed step
  int32_t num_tokens;
  int32_t pos;  ///< position of the first token
  int32_t seq;
};

/// Up to 64 consecutive keys of one sequence.
struct KeyTile {
  int32_t is_block;   ///< 0: window latents, 1: compressed blocks
  int32_t first_key;  ///< position or block number of the first key
  int32_t first_row;  ///< its row in kv or blocks
  int32_t seq;
};

struct SparseAttnParams {
  const void* q;              ///< [tokens, heads, 128] BF16
  const void* kv;             ///< [tokens, 128] BF16
  const void* blocks;         ///< [num_blocks, 128] BF16; null when ratio is 0
  const float* sink;          ///< [heads]
  const int32_t* selection;   ///< [tokens, topk], -1 last; null: every visible block
  const TokenTile* tiles;     ///< [num_tiles]
  const int32_t* cu_seqlens;  ///< [num_seqs + 1]
  const int32_t* cu_blocks;   ///< [num_seqs + 1]; null when ratio is 0
  void* out;                  ///< [tokens, heads, 128] BF16
  float* lse;                 ///< [tokens, heads]
  int32_t num_tiles, tokens, heads, window, ratio, topk;
  float scale;
};

struct SparseAttnBackwardParams {
  SparseAttnParams forward;  ///< as in the forward pass, out and lse filled
  const void* grad_out;      ///< [tokens, heads, 128] BF16
  const KeyTile* key_tiles;  ///< [num_key_tiles]: every window latent and every block once
  const uint32_t* selected;  ///< [tokens, mask_words] bit c of a row: block c is selected; null:
                             ///< every visible block
  float* delta;              ///< [tokens, heads] scratch and result: grad_out . out
  void* grad_q;              ///< [tokens, heads, 128] BF16
  void* grad_kv;             ///< [tokens, 128] BF16
  void* grad_blocks;         ///< [num_blocks, 128] BF16
  int32_t num_key_tiles, mask_words;
};

/// Heads a query tile of 64 rows can hold; with a selection a tile of 16 rows holds the heads of
/// one token.
inline constexpr int64_t kSparseAttnDim = 128;
inline constexpr int64_t kSparseAttnMaxHeads = 64;
inline constexpr int64_t kSparseAttnMaxSelectedHeads = 16;

extern KernelSlot<void(const SparseAttnParams&, Stream)> sparse_attn_cuda;
extern KernelSlot<void(const SparseAttnBackwardParams&, Stream)> sparse_attn_backward_cuda;

}  // namespace hadal::ops
