// Few tokens: eight blocks, or sixteen where a list is longer and the card not full, share an item
// (a token's tile of 64 heads, one segment of its list), as many chunks a round. Each computes the
// scores of one chunk; maxima, sums and weights go round among them; then each folds all chunks, in
// order, into its own 64 or 32 of the 512 value columns. So no sum is split: the tree is that of
// sparse_attn_sm90.cu.
//
// Two warpgroups gather, the first folds. Maxima and sums travel through the cluster's shared
// memory; weights, as many readers as blocks, through the second-level cache. Both
// have two places that rounds take in turn: who writes one for the second time has met everybody
// in the round between.
#include "ops/attention/sparse_attn_sm90.cuh"

namespace hadal::ops::cuda {
namespace {

constexpr int kGatherers = 2 * kWarpgroup, kThreads = kWarpgroup + kGatherers;
/// Of each thread; three warpgroups have 504 together.
constexpr int kGatherRegisters = 152, kFoldRegisters = 200;
constexpr int kChunk = static_cast<int>(kAttnChunk);

/// A thread's pieces of our columns of a round's chunks: two rows of every chunk where eight blocks
/// have whole slabs; one where sixteen have half a slab each.
constexpr int kEntries = 16;
/// Columns of a block, and pieces of eight of them.
template <int kBlocks>
constexpr int kColumns = static_cast<int>(kLatentDim) / kBlocks;
template <int kBlocks>
constexpr int kPieces = kColumns<kBlocks> / 8;

template <int kBlocks>
using OfBlocks = float[kBlocks][kAttnHeads];

/// Our columns of every chunk: eight tiles of a slab, each of one chunk or of two side by side.
template <int kBlocks>
struct Memory {
  alignas(1024) uint8_t q[kLatentTile];
  alignas(1024) uint8_t keys[kLatentTile];  ///< of our chunk
  alignas(1024) uint8_t values[8][kSlabTile];
  OfBlocks<kBlocks> largest[2], sums[2];
  uint64_t present;
  uint64_t q_full, keys_full, keys_empty, values_full[kBlocks], values_empty[kBlocks];
  uint64_t largest_ready[2], weights_ready[2];  ///< a warp of every block arrives
};

extern __shared__ __align__(1024) uint8_t shared_memory[];
template <int kBlocks>
__device__ __forceinline__ Memory<kBlocks>& memory() {
  return *reinterpret_cast<Memory<kBlocks>*>(shared_memory);
}

/// The chunks of this cluster's item.
template <int kBlocks>
struct Work {
  AttnList list;
  int begin, chunks;
  uint32_t rank;

  __device__ __forceinline__ int rounds() const { return (chunks + kBlocks - 1) / kBlocks; }
  /// Of a round.
  __device__ __forceinline__ int count(int round) const {
    return min(chunks - round * kBlocks, kBlocks);
  }
  __device__ __forceinline__ int place(int round) const { return begin + round * kBlocks * kChunk; }
};

/// Our columns of a round's chunks on their way.
template <int kBlocks>
struct Values {
  static constexpr int kOfChunk = kEntries / kBlocks;  ///< entries

  int32_t number[kEntries];
  uint2 first[kEntries], second[kEntries];
  uint32_t bits;  ///< which of them there are

  static __device__ __forceinline__ int row(int entry, int thread) {
    return entry % kOfChunk * 32 + thread / kPieces<kBlocks>;
  }
  __device__ __forceinline__ void find(const SparseAttnSm90Params& p,
                                       const Work<kBlocks>& work,
                                       int place,
                                       int thread) {
#pragma unroll
    for (int i = 0; i < kEntries; ++i)
      number[i] = work.list.chunk(p, place + i / kOfChunk * kChunk).early_number(row(i, thread));
  }
  __device__ __forceinline__ void fetch(const SparseAttnSm90Params& p,
                                        const Work<kBlocks>& work,
                                        int place,
                                        int thread) {
    const int column =
        static_cast<int>(work.rank) * kColumns<kBlocks> + thread % kPieces<kBlocks> * 8;
    const bool rotary = column >= 448;
    const int at = rotary ? 448 + (column - 448) * 2 : column;
    const int next = rotary ? at + 8 : 576;  // the other half, or the scales
    bits = 0;
#pragma unroll
    for (int i = 0; i < kEntries; ++i) {
      const uint8_t* row =
          latent(p, work.list.chunk(p, place + i / kOfChunk * kChunk).rows, number[i]);
      first[i] = load_codes(row + at);
      second[i] = load_codes(row + next);
      bits |= number[i] < 0 ? 0 : 1u << i;
    }
  }
  __device__ __forceinline__ void store(int chunk, uint32_t rank, int thread) const {
    const uint32_t slab = rank * kColumns<kBlocks> / 64;
    const uint32_t tile = smem_address(memory<kBlocks>().values[chunk * kColumns<kBlocks> / 64]);
    const int piece = chunk * kPieces<kBlocks> % 8 + thread % kPieces<kBlocks>;
#pragma unroll
    for (int i = 0; i < kEntries; ++i) {
      if (i / kOfChunk != chunk) continue;
      uint4 v = make_uint4(first[i].x, first[i].y, second[i].x, second[i].y);
      if (slab < 7) {
        const uint32_t word = slab < 4 ? second[i].x : second[i].y;
        v = widen_any_codes(first[i], word >> (slab % 4 * 8) & 255);
      }
      store16(tile + slab_offset(row(i, thread), piece),
              bits >> i & 1 ? v : make_uint4(0, 0, 0, 0));
    }
  }
};

template <int kBlocks>
__device__ __forceinline__ void gather(const SparseAttnSm90Params& p,
                                       const Work<kBlocks>& work,
                                       const uint16_t* q) {
  Memory<kBlocks>& m = memory<kBlocks>();
  const int thread = static_cast<int>(threadIdx.x) - kWarpgroup;
  const auto publish = [](uint64_t* barrier) {
    fence_async_proxy();
    barrier_arrive(barrier);
  };
  LatentChunk keys(thread);
  Values<kBlocks> values;
  int32_t number[2];
  const auto chunk_of = [&](int round) {
    return work.list.chunk(p, work.place(round) + static_cast<int>(work.rank) * kChunk);
  };
  // Where there is one of ours in that round.
  const auto store_keys = [&](int round) {
    if (static_cast<int>(work.rank) >= work.count(round)) return;
    barrier_wait(&m.keys_empty, (static_cast<uint32_t>(round) & 1) ^ 1);
    keys.store(smem_address(m.keys), &m.present);
    publish(&m.keys_full);
  };
  // All numbers are on their way before the first is waited for.
  for (int u = 0; u < 2; ++u) number[u] = chunk_of(0).early_number(keys.row(u));
  values.find(p, work, work.place(0), thread);
  load_queries<kGatherers>(smem_address(m.q), q, thread);
  keys.fetch(p, chunk_of(0).rows, number);
  values.fetch(p, work, work.place(0), thread);
  copy_async_wait_all();
  publish(&m.q_full);
  if (work.rounds() == 0) return;
  store_keys(0);
  for (int round = 0; round < work.rounds(); ++round) {
    const bool more = round + 1 < work.rounds();
    if (more) {
      keys.find(chunk_of(round + 1), number);
      values.find(p, work, work.place(round + 1), thread);
      keys.fetch(p, chunk_of(round + 1).rows, number);
    }
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      if (i >= work.count(round)) continue;
      barrier_wait(&m.values_empty[i], (static_cast<uint32_t>(round) & 1) ^ 1);
      values.store(i, work.rank, thread);
      publish(&m.values_full[i]);
    }
    if (!more) break;
    store_keys(round + 1);
    values.fetch(p, work, work.place(round + 1), thread);
  }
}

/// The thread's two values of its rows to element [rank][row] of an array in every block: each lane
/// of a quad serves a fourth of the blocks. Then the warp arrives at `barrier` there.
template <int kBlocks>
__device__ __forceinline__ void send(
    const OfBlocks<kBlocks>& to, uint64_t* barrier, uint32_t rank, bool any, const float (&v)[2]) {
  const int t = static_cast<int>(threadIdx.x), row = t / 32 * 16 + t % 32 / 4;
  if (any) {
#pragma unroll
    for (uint32_t i = 0; i < kBlocks / 4; ++i) {
      const uint32_t at = remote_address(&to[rank][row], threadIdx.x % 4 * (kBlocks / 4) + i);
      store_remote(at, v[0]);
      store_remote(at + 32, v[1]);
    }
  }
  __syncwarp();
  if (t % 32 < kBlocks) barrier_arrive_remote(remote_address(barrier, threadIdx.x % 32));
}

/// The folding warpgroup.
template <int kBlocks>
class Folder {
  static constexpr int kHalf = kColumns<kBlocks> / 2;  ///< values of a thread

 public:
  __device__ __forceinline__ Folder(const Work<kBlocks>& item, float logit_scale, uint4* weights)
      : work(item),
        scale(logit_scale),
        exchange(weights),
        thread(static_cast<int>(threadIdx.x)),
        row(thread / 32 * 16 + thread % 32 / 4) {}

  __device__ __forceinline__ void run(float (&o)[kHalf], AttnState& state) {
    float s[32];
    barrier_wait(&memory<kBlocks>().q_full, 0);
    if (work.rounds() > 0) score(s, 0);
    for (int round = 0; round < work.rounds(); ++round) {
      weigh(s, state, round);
      // The next scores are computed while others are still at these weights.
      if (round + 1 < work.rounds()) score(s, round + 1);
      fold(o, state, round);
    }
  }

 private:
  __device__ __forceinline__ bool ours(int round) const {
    return static_cast<int>(work.rank) < work.count(round);
  }
  /// Our columns of a chunk.
  static __device__ __forceinline__ uint32_t values_of(int chunk) {
    const int column = chunk * kColumns<kBlocks>;
    return smem_address(memory<kBlocks>().values[column / 64]) +
           static_cast<uint32_t>(column % 64 * 2);
  }
  /// Logits of our chunk, where there is one; their maxima to all.
  __device__ __forceinline__ void score(float (&s)[32], int round) {
    Memory<kBlocks>& m = memory<kBlocks>();
    float largest[2] = {-INFINITY, -INFINITY};
    if (ours(round)) {
      barrier_wait(&m.keys_full, static_cast<uint32_t>(round) & 1);
      multiply_scores(s, smem_address(m.q), smem_address(m.keys));
      to_logits(s, m.present, scale);
      __syncwarp();
      if (thread % 32 == 0) barrier_arrive(&m.keys_empty);
      row_largest(s, largest);
    }
    send<kBlocks>(m.largest[round & 1], &m.largest_ready[round & 1], work.rank, true, largest);
  }
  /// Weights and sums of our chunk, to all.
  __device__ __forceinline__ void weigh(float (&s)[32], AttnState& state, int round) {
    Memory<kBlocks>& m = memory<kBlocks>();
    barrier_wait_cluster(&m.largest_ready[round & 1], static_cast<uint32_t>(round) >> 1 & 1);
    float own[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float seen = fmaxf(state.max[half], m.largest[round & 1][i][row + half * 8]);
        factor[i][half] = exp_below(state.max[half] - fold_base(seen));
        state.max[half] = seen;
        if (static_cast<uint32_t>(i) == work.rank) own[half] = seen;
      }
    }
    float sums[2] = {0.0f, 0.0f};
    if (ours(round)) {
      uint4* to = exchange + (round & 1) * kBlocks * 512 + work.rank * 512 + thread;
      to_weights(s, own, sums, [&](int group, const uint32_t(&w)[4]) {
        __stcg(to + group * kWarpgroup, make_uint4(w[0], w[1], w[2], w[3]));
      });
    }
    send<kBlocks>(m.sums[round & 1], &m.weights_ready[round & 1], work.rank, ours(round), sums);
  }
  /// Folds a round's chunks into our columns.
  __device__ __forceinline__ void fold(float (&o)[kHalf], AttnState& state, int round) {
    Memory<kBlocks>& m = memory<kBlocks>();
    const int count = work.count(round);
    constexpr int kAhead = 2;  // chunks whose weights are on their way at once
    barrier_wait_cluster(&m.weights_ready[round & 1], static_cast<uint32_t>(round) >> 1 & 1);
    const uint4* from = exchange + (round & 1) * kBlocks * 512 + thread;
    uint32_t w[2][kAhead][4][4];
    const auto load = [&](int first, uint32_t(&to)[kAhead][4][4]) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (first + i >= count) continue;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const uint4 v = __ldcg(from + (first + i) * 512 + j * kWarpgroup);
          to[i][j][0] = v.x, to[i][j][1] = v.y, to[i][j][2] = v.z, to[i][j][3] = v.w;
        }
      }
    };
    load(0, w[0]);
#pragma unroll
    for (int first = 0; first < kBlocks; first += kAhead) {
      if (first >= count) break;
      if (first + kAhead < kBlocks) load(first + kAhead, w[(first / kAhead + 1) & 1]);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int chunk = first + i;
        if (chunk >= count) continue;
#pragma unroll
        for (int half = 0; half < 2; ++half)
          state.sum[half] =
              state.sum[half] * factor[chunk][half] + m.sums[round & 1][chunk][row + half * 8];
        rescale_rows(o, factor[chunk]);
        barrier_wait(&m.values_full[chunk], static_cast<uint32_t>(round) & 1);
        multiply_values<kColumns<kBlocks>>(o, w[(first / kAhead) & 1][i], values_of(chunk));
        __syncwarp();
        if (thread % 32 == 0) barrier_arrive(&m.values_empty[chunk]);
      }
    }
  }

  const Work<kBlocks>& work;
  float scale;
  uint4* exchange;
  int thread, row;
  float factor[kBlocks][2];
};

template <int kBlocks>
__global__ void __launch_bounds__(kThreads, 1)
    sparse_attn_few_kernel(const __grid_constant__ SparseAttnSm90Params p,
                           int segments,
                           float* exchange) {
  Memory<kBlocks>& m = memory<kBlocks>();
  if (threadIdx.x == 0) {
    barrier_init(&m.q_full, kGatherers);
    barrier_init(&m.keys_full, kGatherers);
    barrier_init(&m.keys_empty, kWarpgroup / 32);
    for (int i = 0; i < kBlocks; ++i) {
      barrier_init(&m.values_full[i], kGatherers);
      barrier_init(&m.values_empty[i], kWarpgroup / 32);
    }
    for (int i = 0; i < 2; ++i) {
      barrier_init(&m.largest_ready[i], kBlocks * kWarpgroup / 32);
      barrier_init(&m.weights_ready[i], kBlocks * kWarpgroup / 32);
    }
    barrier_init_done();
  }
  cluster_sync();
  wait_for_previous();
  launch_dependents();
  const int item = static_cast<int>(blockIdx.x) / kBlocks;
  const int tiles = static_cast<int>(p.heads) / kAttnHeads;
  const int segment = item % segments, tile = item / segments % tiles,
            token = item / segments / tiles;
  const int64_t row = static_cast<int64_t>(token) * p.heads + tile * kAttnHeads;
  const AttnList list(p, token);
  const int begin = segment * static_cast<int>(kAttnSegment);
  const int end = min(list.places, begin + static_cast<int>(kAttnSegment));
  const Work<kBlocks> work = {list, begin, end <= begin ? 0 : (end - begin + kChunk - 1) / kChunk,
                              cluster_rank()};
  if (threadIdx.x >= kWarpgroup) {
    fewer_registers<kGatherRegisters>();
    gather(p, work, p.q + row * kLatentDim);
  } else {
    more_registers<kFoldRegisters>();
    constexpr int kHalf = kColumns<kBlocks> / 2;
    float o[kHalf];
#pragma unroll
    for (int i = 0; i < kHalf; ++i) o[i] = 0.0f;
    AttnState state = {{-INFINITY, -INFINITY}, {0.0f, 0.0f}};
    Folder<kBlocks>(work, p.scale, reinterpret_cast<uint4*>(exchange + item * kAttnExchange))
        .run(o, state);
    write_rows<kHalf>(p, {segment, segments, tile * kAttnHeads, row}, o, state,
                      static_cast<int>(work.rank) * kColumns<kBlocks>, work.rank == 0);
  }
}

template <int kBlocks>
void launch_few(const SparseAttnSm90Params& p, int64_t items, Stream stream) {
  constexpr int kBytes = sizeof(Memory<kBlocks>);
  static_assert(kBytes <= 227 * 1024);
  constexpr auto kKernel = sparse_attn_few_kernel<kBlocks>;
  cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  // More than eight is what every Hopper card has room for but no other generation promises.
  cudaFuncSetAttribute(kKernel, cudaFuncAttributeNonPortableClusterSizeAllowed, kBlocks > 8);
  const int64_t segments = sparse_attn_segments(p);
  float* exchange =
      p.scratch + (segments == 1 ? 0 : p.tokens * p.heads * segments * (kLatentDim + 2));
  launch_early(kKernel, {blocks_for(items * kBlocks, 1), kThreads, kBytes, kBlocks}, stream,
               "sparse_attn_sm90", p, static_cast<int>(segments), exchange);
}

}  // namespace

void sparse_attn_few(const SparseAttnSm90Params& p, int64_t items, bool wide, Stream stream) {
  if (wide) {
    launch_few<16>(p, items, stream);
  } else {
    launch_few<8>(p, items, stream);
  }
}

}  // namespace hadal::ops::cuda
