// Tokens with lists of cached latents, the same on every machine: for the tests of sparse attention
// on a card and of its twin. Free of ATen.
#pragma once

#include <algorithm>
#include <cstring>
#include <random>
#include <vector>

#include "ops/attention/sparse_attn_sm90.h"
#include "testing/product_data.h"

namespace hadal::testing {

/// BF16 values of both signs between 2^least and 2^(least + 7).
inline uint16_t moderate_bf16(std::mt19937& random, int least) {
  const auto exponent = static_cast<unsigned>(127 + least) + random() % 7;
  return static_cast<uint16_t>((random() & 0x807f) | exponent << 7);
}

struct AttentionShape {
  int64_t tokens, heads, window_places, block_places;
  int64_t width = ops::kLatentDim;
  ops::AttnRows format = ops::AttnRows::kPacked;

  int64_t row_bytes() const { return ops::attn_row_bytes(width, format); }
};

/// Latents whose values lie around one; a few packed ones have a scale far from the others'.
inline std::vector<uint8_t> random_latents(int64_t count,
                                           const AttentionShape& shape,
                                           unsigned seed) {
  std::mt19937 random(seed);
  std::vector<uint8_t> rows(static_cast<size_t>(count * shape.row_bytes()));
  const bool packed = shape.format == ops::AttnRows::kPacked;
  const int64_t rounded = packed ? shape.width - ops::kAttnRotary : 0;
  const auto groups = static_cast<unsigned>(rounded / 64);
  for (int64_t r = 0; r < count; ++r) {
    uint8_t* row = rows.data() + r * shape.row_bytes();
    for (int64_t i = 0; i < rounded; ++i) {
      row[i] = static_cast<uint8_t>(random());
      if ((row[i] & 0x7f) == 0x7f) row[i] = 0;
    }
    for (int64_t i = 0; i < shape.width - rounded; ++i) {
      const uint16_t value = moderate_bf16(random, -5);
      std::memcpy(row + rounded + 2 * i, &value, 2);
    }
    if (groups == 0) continue;
    uint8_t* scales = row + rounded + 2 * ops::kAttnRotary;
    for (unsigned i = 0; i < groups; ++i) scales[i] = static_cast<uint8_t>(118 + random() % 4);
    if (random() % 64 == 0) scales[random() % groups] = static_cast<uint8_t>(1 + random() % 20);
  }
  return rows;
}

/// Tokens over one set of latents, with lists that skip places, whole chunks and whole segments.
/// Logits of every fifth token are large.
struct AttentionWorld {
  static constexpr float kScale = 0.044194173824159216f;

  AttentionShape shape;
  std::vector<uint8_t> window, blocks;
  std::vector<uint16_t> q;
  std::vector<float> sink;
  std::vector<int32_t> window_row, block_row, num_blocks;

  explicit AttentionWorld(const AttentionShape& s, unsigned seed = 1) : shape(s) {
    constexpr unsigned kRows = 500;
    window = random_latents(kRows, s, seed);
    blocks = random_latents(kRows, s, seed + 1);
    std::mt19937 random(seed + 2);
    const auto row = [&] {
      return random() % 10 == 0 ? -1 : static_cast<int32_t>(random() % kRows);
    };
    for (int64_t t = 0; t < s.tokens; ++t) {
      for (int64_t i = 0; i < s.heads * s.width; ++i)
        q.push_back(moderate_bf16(random, t % 5 == 4 ? -2 : -5));
      for (int64_t i = 0; i < s.window_places; ++i)
        window_row.push_back(t % 3 == 1 && i < 64 ? -1 : row());
      for (int64_t i = 0; i < s.block_places; ++i)
        block_row.push_back(
            t % 4 == 2 && i >= ops::kAttnSegment && i < 2 * ops::kAttnSegment ? -1 : row());
      const int64_t fewer = t % 2 == 0 ? 0 : static_cast<int64_t>(random() % 100);
      num_blocks.push_back(static_cast<int32_t>(std::max<int64_t>(s.block_places - fewer, 0)));
    }
    for (int64_t i = 0; i < s.heads; ++i)
      sink.push_back(static_cast<float>(static_cast<int>(random() % 64) - 32) / 16.0f);
  }

  /// The latents of a token's list; null: none.
  std::vector<const uint8_t*> list(int64_t token) const {
    std::vector<const uint8_t*> rows;
    const auto add = [&](const std::vector<uint8_t>& latents, int32_t row) {
      rows.push_back(row < 0 ? nullptr : latents.data() + row * shape.row_bytes());
    };
    for (int64_t i = 0; i < shape.window_places; ++i)
      add(window, window_row[static_cast<size_t>(token * shape.window_places + i)]);
    for (int64_t i = 0; i < num_blocks[static_cast<size_t>(token)]; ++i)
      add(blocks, block_row[static_cast<size_t>(token * shape.block_places + i)]);
    return rows;
  }
};

struct AttentionResults {
  std::vector<uint16_t> out;  ///< [.., heads, width]
  std::vector<float> stats;   ///< [.., heads, 2]
};

/// Heads [first, first + count) of a token by the twin.
inline AttentionResults attention_twin(const AttentionWorld& w,
                                       int64_t token,
                                       int64_t first,
                                       int64_t count) {
  const std::vector<const uint8_t*> rows = w.list(token);
  const int64_t width = w.shape.width;
  AttentionResults r{std::vector<uint16_t>(static_cast<size_t>(count * width)),
                     std::vector<float>(static_cast<size_t>(count * 2))};
  ops::sparse_attn_twin({.q = w.q.data() + (token * w.shape.heads + first) * width,
                         .sink = w.sink.data() + first,
                         .rows = rows.data(),
                         .heads = count,
                         .places = static_cast<int64_t>(rows.size()),
                         .scale = AttentionWorld::kScale,
                         .out = r.out.data(),
                         .stats = r.stats.data(),
                         .width = width,
                         .format = w.shape.format});
  return r;
}

/// Of all output bits and statistics.
inline uint64_t digest(const AttentionResults& r) {
  std::vector<float> values(r.stats);
  for (const uint16_t v : r.out)
    values.push_back(std::bit_cast<float>(static_cast<uint32_t>(v) << 16));
  return digest(values);
}

/// Tokens whose results a card computed once.
struct GoldenAttention {
  AttentionShape shape;
  unsigned seed;
  uint64_t digest;
};
inline constexpr GoldenAttention kGoldenAttention[] = {
    {{1, 64, 128, 512}, 31, 0x028720e38b6e3b4eu},
    {{1, 64, 64, 1600}, 32, 0xc2485b72f6775808u},
};

}  // namespace hadal::testing
