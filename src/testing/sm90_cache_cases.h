// Ops that read the caches where the Hopper kernels serve them: the bits of the CPU's kernels or of
// the twins of single tokens, over the same cached rows; on a GPU, and on a CPU in its place. Who
// includes this defines where.
#pragma once

#include <cmath>
#include <optional>
#include <vector>

#include <ATen/ATen.h>

#include <gtest/gtest.h>

#include "ops/attention/sparse_attn.h"
#include "ops/attention/sparse_attn_sm90.h"
#include "ops/cache/kv_rows.h"
#include "ops/compressor/compress.h"
#include "ops/indexer/index_bf16_sm90.h"
#include "ops/indexer/index_scores.h"
#include "ops/indexer/index_scores_sm90.h"
#include "ops/indexer/index_topk.h"
#include "ops/quant/round_trip.h"
#include "ops/sm90.h"
#include "testing/kernel_checks.h"

namespace hadal::ops {
namespace {

/// Where the tensors under test lie.
at::Device card();

}  // namespace
}  // namespace hadal::ops

namespace hadal::testing {
namespace {

using ops::BlockView;
using ops::RingView;
using ops::RowFormat;
using ops::RowKind;

constexpr RowFormat kLatents{.kind = RowKind::kLatent, .width = 512, .rotary = 64};
constexpr RowFormat kKeys{.kind = RowKind::kIndexKey, .width = 128};

/// Rows that went through their round trip, of many magnitudes.
at::Tensor rounded_rows(int64_t rows, const RowFormat& format) {
  const at::Tensor x =
      (at::randn({rows, format.width}) * at::exp(at::randn({rows, 1}))).to(at::kBFloat16);
  if (format.kind == RowKind::kIndexKey) return ops::fp4_round_trip(x, 32);
  return ops::fp8_round_trip_leading(x, format.width - format.rotary, 64);
}

RingView moved(RingView ring, at::Device device) {
  ring.rows = ring.rows.to(device);
  ring.slots = ring.slots.to(device);
  return ring;
}
BlockView moved(BlockView blocks, at::Device device) {
  blocks.rows = blocks.rows.to(device);
  blocks.slots = blocks.slots.to(device);
  blocks.pages = blocks.pages.to(device);
  return blocks;
}

/// Pages of 64 rows in no order, for sequences of up to `blocks` blocks each.
BlockView paged(const at::Tensor& bytes,
                int64_t sequences,
                int64_t blocks,
                const RowFormat& format) {
  const int64_t each = (blocks + 63) / 64, all = bytes.size(0) / 64;
  EXPECT_GE(all, sequences * each);
  const at::Tensor order = at::randperm(all);
  std::vector<std::vector<int64_t>> pages(static_cast<size_t>(sequences));
  for (int64_t i = 0; i < sequences * each; ++i)
    pages[static_cast<size_t>(i / each)].push_back(order[i].item<int64_t>());
  BlockView view = BlockView::paged(bytes, pages, 64);
  view.format = format;
  return view;
}

}  // namespace
}  // namespace hadal::testing

namespace hadal::ops {
namespace {

using testing::kKeys;
using testing::kLatents;
using testing::moved;
using testing::paged;
using testing::rounded_rows;
using testing::same_bits;

/// On the CPU these are in a card's place.
class Sm90Cache : public ::testing::Test {
 protected:
  Sm90Cache() {
    if (card().is_cpu()) as_hopper_.emplace();
  }

 private:
  std::optional<AsHopperGuard> as_hopper_;
};

struct Runs {
  std::vector<int64_t> lengths, starts;
  Batch on(at::Device device) const { return {lengths, starts, device, {.slots = {2, 0, 1}}}; }
};

TEST_F(Sm90Cache, PackedRowsHaveTheBytesOfTheCpu) {
  at::manual_seed(3);
  for (const RowFormat& format :
       {kLatents, kKeys, packed_latent(128), packed_latent(192), packed_latent(256)}) {
    for (const int64_t rows : {1, 70, 1000}) {
      const at::Tensor x = rounded_rows(rows, format);
      EXPECT_TRUE(at::equal(pack_rows(x.to(card()), format).cpu(), pack_rows(x, format)))
          << format.width << " " << rows;
    }
  }
}

TEST_F(Sm90Cache, PoolingHasTheBitsOfTheCpu) {
  at::manual_seed(4);
  const int64_t d = 128;
  for (const auto& [ratio, ring] : {std::pair<int64_t, int64_t>{4, 9}, {128, 131}}) {
    const int64_t width = ratio == 4 ? 2 * d : d;
    for (const Runs& runs : {Runs{{5, 1, 140}, {6, 3, 250}}, Runs{{260, 4, 129}, {0, 0, 0}}}) {
      const Batch here = runs.on(at::kCPU), there = runs.on(card());
      const at::Tensor kv = at::randn({here.num_tokens(), width}),
                       gate = at::randn({here.num_tokens(), width}) * 2,
                       ape = at::randn({ratio, width});
      const RingView kv_ring = RingView::of_slots(at::randn({3 * ring, width}), {2, 0, 1}, ring),
                     score_ring = RingView::of_slots(at::randn({3 * ring, width}), {2, 0, 1}, ring);
      const Compressed wanted =
          compress(kv, gate, ape, kv_ring, score_ring, here, ratio, Numerics::kReleased);
      const Compressed found =
          compress(kv.to(card()), gate.to(card()), ape.to(card()), moved(kv_ring, card()),
                   moved(score_ring, card()), there, ratio, Numerics::kReleased);
      EXPECT_TRUE(same_bits(found.pooled.cpu(), wanted.pooled.to(at::kBFloat16))) << ratio;
      EXPECT_TRUE(same_bits(found.score.cpu(), wanted.score)) << ratio;
    }
  }
}

/// Scores and choices over keys whose packed rows are `bytes`.
void expect_index_twins(const Batch& here,
                        const Batch& there,
                        const BlockView& keys,
                        const at::Tensor& bytes,
                        int64_t heads) {
  const int64_t ratio = 4, k = 50, tokens = here.num_tokens(), columns = here.max_end_pos() / ratio;
  const at::Tensor q = rounded_rows(tokens * heads, kKeys).reshape({tokens, heads, 128}),
                   w = (at::randn({tokens, heads}) * 0.01).to(at::kBFloat16);
  const at::Tensor q_bytes = pack_rows(q.reshape({-1, 128}), kKeys);
  at::Tensor twin = at::full({tokens, columns}, -INFINITY);
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t seq = here.seq()[t].item<int64_t>();
    for (int64_t c = 0; c < (here.host_pos()[static_cast<size_t>(t)] + 1) / ratio; ++c) {
      twin[t][c] = index_score_twin(
          q_bytes.const_data_ptr<uint8_t>() + t * heads * kIndexRowBytes,
          reinterpret_cast<const uint16_t*>(w.const_data_ptr<at::BFloat16>()) + t * heads,
          bytes.const_data_ptr<uint8_t>() + keys.table().row(seq, c) * kIndexRowBytes, heads);
    }
  }
  const BlockView keys_there = moved(keys, card());
  const at::Tensor q_there = q.to(card()), w_there = w.to(card());
  EXPECT_TRUE(same_bits(
      index_scores(q_there, w_there, keys_there, there, ratio, Numerics::kReleased).cpu(), twin))
      << heads;
  EXPECT_TRUE(at::equal(
      index_topk(q_there, w_there, keys_there, there, ratio, k, Numerics::kReleased).cpu(),
      reference::select_topk(twin, here, ratio, k)))
      << heads;
}

TEST_F(Sm90Cache, IndexScoresAndChoicesAreTheTwins) {
  at::manual_seed(5);
  const Runs runs{{3, 1, 20}, {700, 1000, 5}};
  const Batch here = runs.on(at::kCPU), there = runs.on(card());
  const at::Tensor bytes = pack_rows(rounded_rows(64 * 20, kKeys), kKeys);
  const BlockView keys = paged(bytes, 3, here.max_end_pos() / 4, kKeys);
  for (const int64_t heads : {3, 8, 64}) expect_index_twins(here, there, keys, bytes, heads);
}

TEST_F(Sm90Cache, IndexScoresWithoutACacheAreThoseWithOne) {
  at::manual_seed(9);
  const Batch here({300, 2, 37}, {0, 0, 0}, at::kCPU), there({300, 2, 37}, {0, 0, 0}, card());
  const at::Tensor rows = rounded_rows(here.blocks(4).num_blocks(), kKeys);
  expect_index_twins(here, there, step_blocks(rows, here, 4), pack_rows(rows, kKeys), 8);
}

TEST_F(Sm90Cache, IndexScoresAndChoicesOfBf16KeysAreTheTwins) {
  at::manual_seed(8);
  const int64_t ratio = 4, k = 50, heads = 8;
  const auto bits = [](const at::Tensor& x) {
    return reinterpret_cast<const uint16_t*>(x.const_data_ptr<at::BFloat16>());
  };
  const auto check = [&](const Batch& here, const Batch& there, const BlockView& keys) {
    const int64_t tokens = here.num_tokens(), columns = here.max_end_pos() / ratio;
    const at::Tensor q = at::randn({tokens, heads, 128}).to(at::kBFloat16),
                     w = (at::randn({tokens, heads}) * 0.01).to(at::kBFloat16);
    at::Tensor twin = at::full({tokens, columns}, -INFINITY);
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t seq = here.seq()[t].item<int64_t>();
      for (int64_t c = 0; c < (here.host_pos()[static_cast<size_t>(t)] + 1) / ratio; ++c) {
        twin[t][c] = index_score_bf16_twin(bits(q) + t * heads * 128, bits(w) + t * heads,
                                           bits(keys.rows) + keys.table().row(seq, c) * 128, heads);
      }
    }
    const BlockView keys_there = moved(keys, card());
    const at::Tensor q_there = q.to(card()), w_there = w.to(card());
    EXPECT_TRUE(same_bits(
        index_scores(q_there, w_there, keys_there, there, ratio, Numerics::kBf16).cpu(), twin));
    EXPECT_TRUE(
        at::equal(index_topk(q_there, w_there, keys_there, there, ratio, k, Numerics::kBf16).cpu(),
                  reference::select_topk(twin, here, ratio, k)));
  };
  const Runs runs{{3, 1, 20}, {700, 1000, 5}};
  const Batch cached = runs.on(at::kCPU);
  check(cached, runs.on(card()),
        paged(at::randn({64 * 20, 128}).to(at::kBFloat16), 3, cached.max_end_pos() / ratio, {}));
  const Batch alone({230, 1, 37}, {0, 0, 0}, at::kCPU),
      alone_there({230, 1, 37}, {0, 0, 0}, card());
  check(alone, alone_there,
        step_blocks(at::randn({alone.blocks(ratio).num_blocks(), 128}).to(at::kBFloat16), alone,
                    ratio));
}

/// Attention over caches: heads of a width, a window, latents packed or in BF16.
struct AttentionCase {
  int64_t heads, width, window;
  AttnRows format;
  friend void PrintTo(const AttentionCase& c, std::ostream* out) {
    *out << c.heads << " heads of " << c.width << ", window " << c.window
         << (c.format == AttnRows::kPacked ? ", packed" : ", BF16");
  }
};

class Sm90Attention : public Sm90Cache, public ::testing::WithParamInterface<AttentionCase> {
 protected:
  bool packed() const { return GetParam().format == AttnRows::kPacked; }
  RowFormat format() const { return packed() ? packed_latent(GetParam().width) : RowFormat{}; }
  /// Rows as a cache holds them, and as a step has them.
  at::Tensor cached(const at::Tensor& rows) const {
    return packed() ? pack_rows(rows, format()) : rows.contiguous();
  }
  at::Tensor rows(int64_t count) const {
    return rounded_rows(count, packed_latent(GetParam().width));
  }

  /// The latents of a token's places as attn_lists_sm90 lays them out.
  std::vector<const uint8_t*> places_of(const Batch& batch,
                                        int64_t token,
                                        const at::Tensor& own,
                                        const RingView& ring,
                                        const BlockView& blocks,
                                        const at::Tensor& selection,
                                        const AttentionParams& params) const {
    const int64_t seq = batch.seq()[token].item<int64_t>(), start = batch.start(seq);
    const int64_t pos = batch.host_pos()[static_cast<size_t>(token)];
    const int64_t bytes = attn_row_bytes(GetParam().width, GetParam().format);
    const auto row = [&](const at::Tensor& rows, int64_t index) {
      return static_cast<const uint8_t*>(rows.const_data_ptr()) + index * bytes;
    };
    std::vector<const uint8_t*> places(static_cast<size_t>(attn_window_places(params.window)));
    for (int64_t p = std::max<int64_t>(0, pos - params.window + 1); p <= pos; ++p) {
      places[static_cast<size_t>(p % params.window)] =
          p >= start ? row(own, batch.begin(seq) + p - start)
                     : row(ring.rows, ring.table().row(seq, p));
    }
    const int64_t visible = params.ratio == 0 ? 0 : (pos + 1) / params.ratio;
    for (int64_t c = 0; c < visible; ++c) {
      const int64_t block = !selection.defined()    ? c
                            : c < selection.size(1) ? selection[token][c].item<int64_t>()
                                                    : -1;
      if (block >= 0) places.push_back(row(blocks.rows, blocks.table().row(seq, block)));
    }
    return places;
  }

  /// The op against the twin.
  void expect_twin(const Batch& here,
                   const Batch& there,
                   const RingView& ring,
                   const BlockView& blocks,
                   const at::Tensor& selection,
                   int64_t ratio) const {
    const auto [heads, width, window, format] = GetParam();
    const int64_t tokens = here.num_tokens();
    const at::Tensor q = at::randn({tokens, heads, width}).to(at::kBFloat16),
                     sink = at::randn({heads}), kv = rows(tokens), own = cached(kv);
    const AttentionParams params{.window = window,
                                 .scale = 1.0 / std::sqrt(static_cast<double>(width)),
                                 .ratio = ratio,
                                 .numerics = packed() ? Numerics::kReleased : Numerics::kBf16};
    at::Tensor out = at::empty_like(q), stats = at::empty({tokens, heads, 2});
    for (int64_t t = 0; t < tokens; ++t) {
      const auto list = places_of(here, t, own, ring, blocks, selection, params);
      sparse_attn_twin({.q = reinterpret_cast<const uint16_t*>(q.const_data_ptr<at::BFloat16>()) +
                             t * heads * width,
                        .sink = sink.const_data_ptr<float>(),
                        .rows = list.data(),
                        .heads = heads,
                        .places = std::ssize(list),
                        .scale = static_cast<float>(params.scale),
                        .out = reinterpret_cast<uint16_t*>(out.mutable_data_ptr<at::BFloat16>()) +
                               t * heads * width,
                        .stats = stats.mutable_data_ptr<float>() + t * heads * 2,
                        .width = width,
                        .format = format});
    }
    const RingView ring_there = ring.rows.defined() ? moved(ring, card()) : ring;
    const BlockView blocks_there = blocks.rows.defined() ? moved(blocks, card()) : blocks;
    const AttentionResult found = sparse_attn(
        q.to(card()), kv.to(card()), ring_there, blocks_there,
        selection.defined() ? selection.to(card()) : selection, sink.to(card()), there, params);
    EXPECT_TRUE(same_bits(found.out.cpu(), out)) << ratio << " " << selection.defined();
    EXPECT_TRUE(
        at::allclose(found.lse.cpu(), stats.select(2, 0) + stats.select(2, 1).log(), 1e-6, 1e-6))
        << ratio;
  }
};

TEST_P(Sm90Attention, IsTheTwins) {
  at::manual_seed(6);
  const int64_t ring_size = 131, k = 70;
  const Runs runs{{2, 1, 3}, {0, 400, 1022}};
  const Batch here = runs.on(at::kCPU), there = runs.on(card());
  RingView ring = RingView::of_slots(cached(rows(3 * ring_size)), {2, 0, 1}, ring_size);
  ring.format = format();
  const BlockView blocks = paged(cached(rows(64 * 16)), 3, 300, format());
  const at::Tensor chosen =
      reference::select_topk(at::randn({here.num_tokens(), here.max_end_pos() / 4}), here, 4, k);
  for (const auto& [ratio, selection] :
       {std::pair<int64_t, at::Tensor>{0, {}}, {128, {}}, {4, {}}, {4, chosen}})
    expect_twin(here, there, ring, blocks, selection, ratio);
}

TEST_P(Sm90Attention, IsTheTwinsWithoutACache) {
  if (packed()) return;  // a step's own rows are BF16
  at::manual_seed(7);
  const Batch here({70, 1, 37}, {0, 0, 0}, at::kCPU), there({70, 1, 37}, {0, 0, 0}, card());
  expect_twin(here, there, RingView{}, BlockView{}, {}, 0);
  const at::Tensor pooled = rows(here.blocks(4).num_blocks());
  expect_twin(here, there, RingView{}, step_blocks(pooled, here, 4), {}, 4);
}

const auto kAttentionCases = ::testing::Values(AttentionCase{64, 512, 128, AttnRows::kPacked},
                                               AttentionCase{6, 128, 128, AttnRows::kPacked},
                                               AttentionCase{4, 256, 32, AttnRows::kPacked},
                                               AttentionCase{17, 192, 100, AttnRows::kPacked},
                                               AttentionCase{6, 128, 128, AttnRows::kBf16},
                                               AttentionCase{3, 512, 32, AttnRows::kBf16});

}  // namespace
}  // namespace hadal::ops
