#include "ops/cache/kv_rows.h"

#include <cmath>

#include <ATen/ATen.h>

#include <gtest/gtest.h>

#include "base/check.h"
#include "base/cpu.h"
#include "ops/attention/sparse_attn.h"
#include "ops/indexer/index_scores.h"
#include "ops/indexer/index_topk.h"
#include "ops/quant/round_trip.h"
#include "testing/kernel_checks.h"

namespace hadal::ops {
namespace {

constexpr RowFormat kLatent{.kind = RowKind::kLatent, .width = 192, .rotary = 64},
    kKey{.kind = RowKind::kIndexKey, .width = 64};

/// Rows as the model makes them, of very different sizes; some groups are zero.
at::Tensor values(int64_t rows, int64_t width) {
  const at::Tensor sizes = at::pow(2.0, at::randint(-18, 12, {rows, width / 32, 1}).to(at::kFloat));
  at::Tensor x = (at::randn({rows, width / 32, 32}) * sizes).reshape({rows, width});
  x.narrow(0, 0, 1).zero_();
  x.select(1, 3).neg_();
  return x.to(at::kBFloat16);
}
at::Tensor latents(int64_t rows) {
  return fp8_round_trip_leading(values(rows, kLatent.width), 128, 64);
}
at::Tensor keys(int64_t rows) { return fp4_round_trip(values(rows, kKey.width), 32); }

using testing::same_bits;

TEST(KvRows, HaveTheBytesOfTheReport) {
  EXPECT_EQ((RowFormat{.kind = RowKind::kLatent, .width = 512, .rotary = 64}.bytes()), 584);
  EXPECT_EQ((RowFormat{.kind = RowKind::kIndexKey, .width = 128}.bytes()), 68);
}

TEST(KvRows, PackingChangesNoBit) {
  at::manual_seed(1);
  for (int round = 0; round < 20; ++round) {
    const at::Tensor latent = latents(300), key = keys(300);
    EXPECT_TRUE(same_bits(unpack_rows(pack_rows(latent, kLatent), kLatent), latent));
    EXPECT_TRUE(same_bits(unpack_rows(pack_rows(key, kKey), kKey), key));
  }
}

// Other devices pack by the definition in ATen.
TEST(KvRows, TheDefinitionPacksTheSameBytes) {
  at::manual_seed(4);
  for (int round = 0; round < 20; ++round) {
    at::Tensor latent = latents(300), key = keys(300);
    // The ends of the scales' range, and zeros of both signs.
    latent[1].narrow(0, 0, 64).fill_(-0.0);
    latent[2].narrow(0, 0, 64).fill_(std::ldexp(1.75, 127));
    latent[3].narrow(0, 0, 64).fill_(std::ldexp(1.0, -118));
    key[1].narrow(0, 0, 32).fill_(-0.0);
    key[2].narrow(0, 0, 32).fill_(std::ldexp(1.5, 127));
    key[3].narrow(0, 0, 32).fill_(std::ldexp(-1.5, -124));
    EXPECT_TRUE(at::equal(reference::pack_rows(latent, kLatent), pack_rows(latent, kLatent)));
    EXPECT_TRUE(at::equal(reference::pack_rows(key, kKey), pack_rows(key, kKey)));
  }
}

TEST(KvRows, RefusesRowsThatWereNotRounded) {
  at::manual_seed(2);
  at::Tensor latent = latents(3);
  latent[2][5] = latent[2].narrow(0, 0, 64).abs().max() * 0.77;
  EXPECT_THROW(pack_rows(latent, kLatent), Error);
  at::Tensor key = keys(2);
  key[1][7] = NAN;
  EXPECT_THROW(pack_rows(key, kKey), Error);
}

/// A step of two sequences whose histories and blocks are read dense or packed.
TEST(KvRows, KernelsReadThemToTheSameBits) {
  at::manual_seed(3);
  const Batch batch({5, 1}, {140, 77}, at::kCPU);
  const at::Tensor q = at::randn({6, 3, kLatent.width}).to(at::kBFloat16), sink = at::randn({3});
  const at::Tensor kv = latents(6), past = latents(64), rows = latents(80);
  const std::vector<std::vector<int64_t>> pages = {{1, 0, 3}, {4, 2}};
  RingView ring = RingView::of_slots(past, {0, 1}, 32);
  BlockView blocks = BlockView::paged(rows, pages, 16);
  const AttentionParams params{
      .window = 24, .scale = 0.1, .ratio = 4, .numerics = Numerics::kReleased};
  const at::Tensor dense = sparse_attn(q, kv, ring, blocks, {}, sink, batch, params).out;
  ring.rows = pack_rows(past, kLatent);
  ring.format = blocks.format = kLatent;
  blocks.rows = pack_rows(rows, kLatent);
  for (const Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512}) {
    if (isa > detect_isa()) continue;
    force_isa(isa);
    const RingView dense_ring = RingView::of_slots(past, {0, 1}, 32);
    const BlockView dense_blocks = BlockView::paged(rows, pages, 16);
    EXPECT_TRUE(
        same_bits(sparse_attn(q, kv, ring, blocks, {}, sink, batch, params).out,
                  sparse_attn(q, kv, dense_ring, dense_blocks, {}, sink, batch, params).out));
  }
  force_isa(detect_isa());
  {
    const ReferenceGuard guard;
    const at::Tensor reference = sparse_attn(q, kv, ring, blocks, {}, sink, batch, params).out;
    EXPECT_TRUE(at::allclose(reference.to(at::kFloat), dense.to(at::kFloat), 2e-2, 2e-2));
  }
  const at::Tensor index_q = keys(12).reshape({6, 2, kKey.width}), key_rows = keys(80);
  const at::Tensor w = at::randn({6, 2}).to(at::kBFloat16);
  BlockView index = BlockView::paged(key_rows, pages, 16);
  const at::Tensor scores = index_scores(index_q, w, index, batch, 4, Numerics::kReleased);
  index.rows = pack_rows(key_rows, kKey);
  index.format = kKey;
  EXPECT_TRUE(at::equal(index_scores(index_q, w, index, batch, 4, Numerics::kReleased), scores));
  EXPECT_TRUE(at::equal(index_topk(index_q, w, index, batch, 4, 7, Numerics::kReleased),
                        select_topk(scores, batch, 4, 7)));
}

}  // namespace
}  // namespace hadal::ops
