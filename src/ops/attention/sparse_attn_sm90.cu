// Many tokens: a block folds one item (a token's tile of 64 heads, one segment of its list) after
// the other. One warpgroup gathers latents, widens them to BF16 tiles and fetches queries ahead of
// time. The two others take turns with the scores, the first those of even chunks, the second those
// of odd ones; the weights go to both, and each keeps half of the value columns. The running
// maximum and sum travel with the weights, so that chunks are folded in order.
//
// Where the rows were widened before (widen_latents_sm90), the gathering warpgroups only start
// copies, and the folding ones do not wait for each other's weights: the maximum is handed over
// first.
//
// Few tokens: sparse_attn_few_sm90.cu.
#include "ops/attention/sparse_attn_sm90.cuh"

namespace hadal::ops::cuda {
namespace {

constexpr int kThreads = 4 * kWarpgroup;
/// Of each thread; four warpgroups have 512 together.
constexpr int kGatherRegisters = 64, kFoldRegisters = 192;
constexpr int kChunk = static_cast<int>(kAttnChunk);
/// Named barriers: weights and sum of the even chunk, of the odd one, the even chunk's maximum.
constexpr int kWeightsReady = 1, kMaxReady = 3;

/// What a thread of one consumer hands to the same thread of the other, and keeps for itself.
struct Handover {
  uint4 weights[4][kWarpgroup];  ///< operand A, sixteen keys each
  float2 max[kWarpgroup], sum[kWarpgroup], factor[kWarpgroup];
};

struct Memory {
  alignas(1024) uint8_t q[kLatentTile];
  alignas(1024) uint8_t rows[2][kLatentTile];
  Handover even, odd;
  uint64_t present[2];
  int chunks;  ///< of the item whose queries q holds
  uint64_t full[2], empty[2], q_full, q_empty;
};

extern __shared__ __align__(1024) uint8_t shared_memory[];
/// At an address that is known when compiled: it takes no registers.
__device__ __forceinline__ Memory& memory() { return *reinterpret_cast<Memory*>(shared_memory); }

/// One token's tile and segment.
struct Item {
  int token, tile, segment;
  __device__ __forceinline__ Item(const SparseAttnSm90Params& p, int number, int segments) {
    const int tiles = static_cast<int>(p.heads) / kAttnHeads, of_token = number / segments;
    segment = number % segments;
    tile = of_token % tiles;
    token = of_token / tiles;
  }
  /// The first of its rows of q and out.
  __device__ __forceinline__ int64_t row(const SparseAttnSm90Params& p) const {
    return static_cast<int64_t>(token) * p.heads + tile * kAttnHeads;
  }
};

/// Places [first, end) of the item.
struct Range {
  int first, end;
  __device__ __forceinline__ Range(const AttnList& list, int segment) {
    first = segment * static_cast<int>(kAttnSegment);
    end = min(list.places, first + static_cast<int>(kAttnSegment));
  }
  __device__ __forceinline__ int chunks() const {
    return end <= first ? 0 : (end - first + kChunk - 1) / kChunk;
  }
};

/// The gathering warpgroups. The next chunk is on its way while the consumers are at work; the
/// numbers of its rows were read a chunk earlier.
__device__ __forceinline__ void gather(const SparseAttnSm90Params& p, int items, int segments) {
  const int thread = static_cast<int>(threadIdx.x) - 2 * kWarpgroup;
  LatentChunk chunk(thread);
  Memory& m = memory();
  const auto publish = [](uint64_t* barrier) {  // all that this thread stored
    fence_async_proxy();
    barrier_arrive(barrier);
  };
  uint32_t round = 0, used[2] = {0, 0};
  for (int i = static_cast<int>(blockIdx.x); i < items; i += static_cast<int>(gridDim.x), ++round) {
    const Item item(p, i, segments);
    const AttnList list(p, item.token);
    const Range range(list, item.segment);
    const int chunks = range.chunks();
    int32_t number[2];
    AttnSource source = list.chunk(p, range.first);
    chunk.find(source, number);
    chunk.fetch(p, source.rows, number);
    source = list.chunk(p, range.first + kChunk);
    chunk.find(source, number);
    barrier_wait(&m.q_empty, (round & 1) ^ 1);
    load_queries<2 * kWarpgroup>(smem_address(m.q), p.q + item.row(p) * kLatentDim, thread);
    if (thread == 0) m.chunks = chunks;
    copy_async_wait_all();
    publish(&m.q_full);
    for (int c = 0; c < chunks; ++c) {
      const int b = c & 1;
      barrier_wait(&m.empty[b], ((b == 0 ? used[0] : used[1]) & 1) ^ 1);
      ++(b == 0 ? used[0] : used[1]);
      chunk.store(smem_address(m.rows[b]), &m.present[b]);
      publish(&m.full[b]);
      if (c + 1 == chunks) continue;
      chunk.fetch(p, source.rows, number);
      source = list.chunk(p, range.first + (c + 2) * kChunk);
      chunk.find(source, number);
    }
  }
}

/// The gathering warpgroups where rows are BF16 already.
__device__ __forceinline__ void gather_wide(const SparseAttnSm90Params& p,
                                            int items,
                                            int segments) {
  const int thread = static_cast<int>(threadIdx.x) - 2 * kWarpgroup;
  const WideChunk chunk(thread);
  Memory& m = memory();
  uint32_t round = 0, used[2] = {0, 0};
  for (int i = static_cast<int>(blockIdx.x); i < items; i += static_cast<int>(gridDim.x), ++round) {
    const Item item(p, i, segments);
    const AttnList list(p, item.token);
    const Range range(list, item.segment);
    const int chunks = range.chunks();
    int32_t number[2];
    chunk.find(list.chunk(p, range.first), number);
    barrier_wait(&m.q_empty, (round & 1) ^ 1);
    load_queries<2 * kWarpgroup>(smem_address(m.q), p.q + item.row(p) * kLatentDim, thread);
    if (thread == 0) m.chunks = chunks;
    WideChunk::arrive_when_copied(&m.q_full);
    __syncwarp();
    if (thread % 32 == 0) barrier_arrive(&m.q_full);
    for (int c = 0; c < chunks; ++c) {
      const int b = c & 1, place = range.first + c * kChunk;
      const auto* rows = place < list.window_places ? p.wide_window : p.wide_blocks;
      barrier_wait(&m.empty[b], ((b == 0 ? used[0] : used[1]) & 1) ^ 1);
      ++(b == 0 ? used[0] : used[1]);
      chunk.copy(p, rows, number, smem_address(m.rows[b]), &m.present[b], &m.full[b]);
      if (c + 1 < chunks) chunk.find(list.chunk(p, place + kChunk), number);
    }
  }
}

/// The folding warpgroups: kSelf 0 computes the weights of even chunks, 1 of odd ones. kWide: tiles
/// and queries were copied asynchronously.
template <int kSelf, bool kWide>
class Consumer {
 public:
  __device__ __forceinline__ Consumer(const SparseAttnSm90Params& params,
                                      int item_count,
                                      int of_list)
      : p(params),
        items(item_count),
        segments(of_list),
        thread(static_cast<int>(threadIdx.x) % kWarpgroup) {}

  __device__ __forceinline__ void run() {
    uint32_t round = 0;
    for (int i = static_cast<int>(blockIdx.x); i < items;
         i += static_cast<int>(gridDim.x), ++round) {
      float o[128];
#pragma unroll
      for (int j = 0; j < 128; ++j) o[j] = 0.0f;
      barrier_wait(&memory().q_full, round & 1);
      if constexpr (kWide) fence_async_proxy();
      const int chunks = memory().chunks;
      AttnState state = {{-INFINITY, -INFINITY}, {0.0f, 0.0f}};
      if (chunks == 0) leave(&memory().q_empty);
      for (int c = 0; c < chunks; c += 2) {
        if constexpr (kWide) {
          fold_together(o, state, c == 0, c + 1 < chunks, c + 2 >= chunks);
        } else {
          fold_pair(o, state, c == 0, c + 1 < chunks, c + 2 >= chunks);
        }
      }
      asm volatile("" : "+r"(i));  // so that nothing of the item is kept in registers till here
      const Item item(p, i, segments);
      write_rows<128>(p, {item.segment, segments, item.tile * kAttnHeads, item.row(p)}, o, state,
                      kSelf * 256, kSelf == 0);
    }
  }

 private:
  /// This warp is done with what the barrier guards.
  __device__ __forceinline__ void leave(uint64_t* barrier) {
    __syncwarp();
    if (thread % 32 == 0) barrier_arrive(barrier);
  }
  /// Until buffer kBuffer holds the chunk whose turn it is.
  template <int kBuffer>
  __device__ __forceinline__ void wait_full() {
    barrier_wait(&memory().full[kBuffer], (kBuffer == 0 ? even_chunks : odd_chunks) & 1);
    if constexpr (kWide) fence_async_proxy();  // what the copies wrote, for the products
  }

  /// Logits of our chunk, in buffer kSelf, and the largest of each of the thread's rows.
  __device__ __forceinline__ void score(float (&s)[32], float (&largest)[2]) {
    wait_full<kSelf>();
    multiply_scores(s, smem_address(memory().q), smem_address(memory().rows[kSelf]));
    to_logits(s, memory().present[kSelf], p.scale);
    row_largest(s, largest);
  }
  /// The running maximum `max` with ours, and what rescales what was folded before, into h.
  __device__ __forceinline__ void raise(float (&max)[2], const float (&largest)[2], Handover& h) {
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float seen = fmaxf(max[half], largest[half]);
      factor[half] = exp_below(max[half] - fold_base(seen));
      max[half] = seen;
    }
    h.max[thread] = make_float2(max[0], max[1]);
    h.factor[thread] = make_float2(factor[0], factor[1]);
  }
  /// Weights of our chunk into h, for both of us.
  __device__ __forceinline__ void weigh(const float (&s)[32],
                                        const float (&max)[2],
                                        float (&sums)[2],
                                        Handover& h) {
    to_weights(s, max, sums, [&](int group, const uint32_t(&w)[4]) {
      h.weights[group][thread] = make_uint4(w[0], w[1], w[2], w[3]);
    });
  }
  /// The running sum `sum`, with ours, into h, which is then complete.
  __device__ __forceinline__ void give(float2 sum, const float (&sums)[2], Handover& h) {
    const float2 factor = h.factor[thread];
    h.sum[thread] = make_float2(sum.x * factor.x + sums[0], sum.y * factor.y + sums[1]);
    named_barrier_arrive(kWeightsReady + kSelf, 2 * kWarpgroup);
  }
  __device__ __forceinline__ AttnState state_of(const Handover& h) const {
    const float2 max = h.max[thread], sum = h.sum[thread];
    return {{max.x, max.y}, {sum.x, sum.y}};
  }
  /// Until the other's weights are there.
  __device__ __forceinline__ void wait_weights() {
    named_barrier_wait(kWeightsReady + 1 - kSelf, 2 * kWarpgroup);
  }
  /// Folds the chunk in buffer kBuffer with the weights in h into our half of the columns.
  template <int kBuffer>
  __device__ __forceinline__ void add_values(float (&o)[128], const Handover& h) {
    const float2 f = h.factor[thread];
    const float factor[2] = {f.x, f.y};
    rescale_rows(o, factor);
    wait_full<kBuffer>();
    uint32_t w[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint4 v = h.weights[i][thread];
      w[i][0] = v.x, w[i][1] = v.y, w[i][2] = v.z, w[i][3] = v.w;
    }
    multiply_values<256>(o, w, smem_address(memory().rows[kBuffer]) + kSelf * 4 * kSlabTile);
    leave(&memory().empty[kBuffer]);
    ++(kBuffer == 0 ? even_chunks : odd_chunks);
  }

  /// An even chunk and, where there is one, the odd one behind it. Both warpgroups are done with
  /// the first before the second has to be there: buffers are free for the next latents early.
  __device__ __forceinline__ void fold_pair(
      float (&o)[128], AttnState& state, bool first, bool both, bool last) {
    Memory& m = memory();
    if constexpr (kSelf == 0) {
      weigh_chunk(m.even, m.odd, first, last);
      add_values<0>(o, m.even);
      if (both) {
        wait_weights();
        add_values<1>(o, m.odd);
      }
      if (last) state = state_of(both ? m.odd : m.even);
    } else {
      wait_weights();
      add_values<0>(o, m.even);
      if (both) {
        weigh_chunk(m.odd, m.even, false, last);
        add_values<1>(o, m.odd);
        if (last) state = state_of(m.odd);
      } else {
        // Not before: who may begin the next item may write the next handover.
        state = state_of(m.even);
        leave(&m.q_empty);
      }
    }
  }
  /// Scores and weights of our chunk into `mine`; `before`: of the chunk before it, unless this is
  /// the first; last: the queries are needed no more.
  __device__ __forceinline__ void weigh_chunk(Handover& mine,
                                              const Handover& before,
                                              bool first,
                                              bool last) {
    float s[32], largest[2], max[2], sums[2];
    score(s, largest);
    if (last) leave(&memory().q_empty);
    const float2 max_before = first ? make_float2(-INFINITY, -INFINITY) : before.max[thread];
    max[0] = max_before.x, max[1] = max_before.y;
    raise(max, largest, mine);
    weigh(s, max, sums, mine);
    give(first ? make_float2(0.0f, 0.0f) : before.sum[thread], sums, mine);
  }

  /// The same, with scores of the one beside weights of the other: the faster way where buffers
  /// fill without the gathering warpgroups' work. Nobody writes a handover that the other may still
  /// read: before its next maximum each waits for a buffer, or for the barrier of the other's
  /// maximum or weights, that the other passes later.
  __device__ __forceinline__ void fold_together(
      float (&o)[128], AttnState& state, bool first, bool both, bool last) {
    Memory& m = memory();
    float s[32], largest[2], max[2], sums[2];
    if constexpr (kSelf == 0) {
      score(s, largest);
      if (last) leave(&m.q_empty);
      const float2 before = first ? make_float2(-INFINITY, -INFINITY) : m.odd.max[thread];
      max[0] = before.x, max[1] = before.y;
      raise(max, largest, m.even);
      named_barrier_arrive(kMaxReady, 2 * kWarpgroup);
      weigh(s, max, sums, m.even);
      give(first ? make_float2(0.0f, 0.0f) : m.odd.sum[thread], sums, m.even);
      add_values<0>(o, m.even);
      if (both) {
        wait_weights();
        add_values<1>(o, m.odd);
      }
      if (last) state = state_of(both ? m.odd : m.even);
    } else if (both) {
      // After the other's scores, or the two would end at the same time, and late.
      named_barrier_wait(kMaxReady, 2 * kWarpgroup);
      score(s, largest);
      if (last) leave(&m.q_empty);
      const float2 before = m.even.max[thread];
      max[0] = before.x, max[1] = before.y;
      raise(max, largest, m.odd);
      weigh(s, max, sums, m.odd);
      wait_weights();
      give(m.even.sum[thread], sums, m.odd);
      add_values<0>(o, m.even);
      add_values<1>(o, m.odd);
      if (last) state = state_of(m.odd);
    } else {
      named_barrier_wait(kMaxReady, 2 * kWarpgroup);
      wait_weights();
      add_values<0>(o, m.even);
      // Not before: who may begin the next item may write the next handover.
      state = state_of(m.even);
      leave(&m.q_empty);
    }
  }

  uint32_t even_chunks = 0, odd_chunks = 0;  ///< folded so far
  const SparseAttnSm90Params& p;
  int items, segments;
  int thread;
};

template <bool kWide>
__global__ void __launch_bounds__(kThreads, 1)
    sparse_attn_kernel(const __grid_constant__ SparseAttnSm90Params p, int items, int segments) {
  Memory& m = memory();
  if (threadIdx.x == 0) {
    // Of the gathering threads; and of their warps, where copies arrive on their own.
    constexpr int kFull = 2 * kWarpgroup + (kWide ? 2 * kWarpgroup / 32 : 0);
    for (int i = 0; i < 2; ++i) {
      barrier_init(&m.full[i], kFull);
      barrier_init(&m.empty[i], 2 * kWarpgroup / 32);
    }
    barrier_init(&m.q_full, kFull);
    barrier_init(&m.q_empty, 2 * kWarpgroup / 32);
    barrier_init_done();
  }
  __syncthreads();
  wait_for_previous();
  launch_dependents();
  const int warpgroup = static_cast<int>(threadIdx.x) / kWarpgroup;
  if (warpgroup >= 2) {
    fewer_registers<kGatherRegisters>();
    if constexpr (kWide) {
      gather_wide(p, items, segments);
    } else {
      gather(p, items, segments);
    }
  } else {
    more_registers<kFoldRegisters>();
    if (warpgroup == 0) {
      Consumer<0, kWide>(p, items, segments).run();
    } else {
      Consumer<1, kWide>(p, items, segments).run();
    }
  }
}

/// A thread widens eight channels of a row.
__global__ void __launch_bounds__(128)
    widen_latents_kernel(const __grid_constant__ WidenLatentsSm90Params p) {
  wait_for_previous();
  launch_dependents();
  const int64_t row = static_cast<int64_t>(blockIdx.x) * 2 + threadIdx.x / 64;
  const int piece = static_cast<int>(threadIdx.x) % 64;
  if (row >= p.rows) return;
  const uint8_t* from = p.latents + (p.row != nullptr ? p.row[row] : row) * kLatentRowBytes;
  uint4 v;
  if (piece < 56) {
    v = widen_any_codes(load_codes(from + piece * 8), from[576 + piece / 8]);
  } else {
    const uint2 low = load_codes(from + 448 + (piece - 56) * 16);
    const uint2 high = load_codes(from + 456 + (piece - 56) * 16);
    v = make_uint4(low.x, low.y, high.x, high.y);
  }
  *reinterpret_cast<uint4*>(p.wide + row * kLatentDim + piece * 8) = v;
}

void launch_many(SparseAttnSm90Params p, int64_t items, Stream stream) {
  if (p.format == AttnRows::kBf16) {
    p.wide_window = reinterpret_cast<const uint16_t*>(p.window);
    p.wide_blocks = reinterpret_cast<const uint16_t*>(p.blocks);
  }
  if (p.block_places > 0 && (p.wide_window != nullptr) != (p.wide_blocks != nullptr))
    throw_kernel_error("sparse_attn_sm90", "rows of the window or of blocks alone are widened");
  constexpr int kBytes = sizeof(Memory);
  static_assert(kBytes <= 227 * 1024);
  auto* kernel = p.wide_window != nullptr ? sparse_attn_kernel<true> : sparse_attn_kernel<false>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  const dim3 grid(static_cast<unsigned>(items < 132 ? items : 132));
  launch_early(kernel, {grid, kThreads, kBytes}, stream, "sparse_attn_sm90", p,
               static_cast<int>(items), static_cast<int>(sparse_attn_segments(p)));
}

}  // namespace
}  // namespace hadal::ops::cuda

namespace hadal::ops {

void widen_latents_sm90(const WidenLatentsSm90Params& p, Stream stream) {
  if (p.rows == 0) return;
  cuda::launch_early(cuda::widen_latents_kernel, {cuda::blocks_for(p.rows, 2), 128}, stream,
                     "widen_latents_sm90", p);
}

void sparse_attn_sm90(const SparseAttnSm90Params& p, Stream stream, SparseAttnKernel kernel) {
  if (p.tokens == 0) return;
  if (!serves_attn_width(p.width) || p.window_places % kAttnChunk != 0)
    throw_kernel_error("sparse_attn_sm90", "channels and places of the window come in 64s");
  if (kernel == SparseAttnKernel::kByShape) kernel = sparse_attn_kernel(p);
  if (kernel != SparseAttnKernel::kAny && !serves_whole_tiles(p))
    throw_kernel_error("sparse_attn_sm90", "this kernel is for 64s of heads of 512 channels");
  const bool wide = kernel == SparseAttnKernel::kFewWide;
  if ((wide || kernel == SparseAttnKernel::kFew) && p.format != AttnRows::kPacked)
    throw_kernel_error("sparse_attn_sm90", "this kernel is for packed latents");
  switch (kernel) {
    case SparseAttnKernel::kFew:
    case SparseAttnKernel::kFewWide:
      cuda::sparse_attn_few(p, sparse_attn_items(p), wide, stream);
      break;
    case SparseAttnKernel::kMany:
      cuda::launch_many(p, sparse_attn_items(p), stream);
      break;
    default:
      cuda::sparse_attn_any(p, stream);
  }
  const int64_t segments = sparse_attn_segments(p);
  if (segments > 1) cuda::join_segments(p, segments, stream);
}

}  // namespace hadal::ops
