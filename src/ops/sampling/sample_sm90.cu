// A cluster of eight blocks a row, each with its share of the logits in shared memory. Everything
// that decides is the same in all of them: they exchange maxima of ranks and keys and sums of
// masses, which have one value in every order.
#include "ops/cuda/launch.cuh"
#include "ops/cuda/sm90.cuh"
#include "ops/sampling/sample_math.h"
#include "ops/sampling/sample_sm90.h"

namespace hadal::ops::cuda {
namespace {

constexpr int kBlocks = 8, kThreads = 512, kWarps = kThreads / 32;
constexpr int kMaxShare = 50'000;  // floats of a block
constexpr uint32_t kPieceBytes = 8192;

struct alignas(16) Pair {
  uint64_t first, second;
};

/// The largest of a warp's, in every lane.
__device__ __forceinline__ uint64_t largest_of_warp(uint64_t x) {
  const auto high = static_cast<uint32_t>(x >> 32);
  const uint32_t top = __reduce_max_sync(0xffffffffu, high);
  const uint32_t low = high == top ? static_cast<uint32_t>(x) : 0;
  return static_cast<uint64_t>(top) << 32 | __reduce_max_sync(0xffffffffu, low);
}
/// The sum of a warp's, below 2^64, in every lane.
__device__ __forceinline__ uint64_t sum_of_warp(uint64_t x) {
  constexpr uint32_t kLow = (1u << 27) - 1;
  const uint32_t low = __reduce_add_sync(0xffffffffu, static_cast<uint32_t>(x) & kLow);
  const uint64_t high = __reduce_add_sync(0xffffffffu, static_cast<uint32_t>(x >> 27) & kLow);
  const uint64_t top = __reduce_add_sync(0xffffffffu, static_cast<uint32_t>(x >> 54));
  return low + (high << 27) + (top << 54);
}

/// The larger first, then the larger second.
struct Larger {
  __device__ __forceinline__ Pair operator()(const Pair& x) const {
    const uint64_t first = largest_of_warp(x.first);
    return {first, largest_of_warp(x.first == first ? x.second : 0)};
  }
};
/// The larger first alone.
struct Largest {
  __device__ __forceinline__ Pair operator()(const Pair& x) const {
    return {largest_of_warp(x.first), 0};
  }
};
struct Sum {
  __device__ __forceinline__ Pair operator()(const Pair& x) const {
    return {sum_of_warp(x.first), sum_of_warp(x.second)};
  }
};

/// What a block keeps beside its logits. Slots by turns: whoever writes them has met all blocks
/// since they read theirs.
struct Exchange {
  Pair warps[kWarps];
  Pair slots[2][kBlocks];  ///< of all blocks
  uint32_t histogram[2][256];
  uint32_t bins[256];
  uint32_t chosen_bin, before, in_bin;
  uint64_t loaded;  ///< barrier of the copy
};

__device__ __forceinline__ void store_remote(Pair* local, uint32_t rank, const Pair& value) {
  asm volatile("st.shared::cluster.v2.u64 [%0], {%1, %2};" ::"r"(remote_address(local, rank)),
               "l"(value.first), "l"(value.second)
               : "memory");
}
__device__ __forceinline__ uint32_t load_remote32(const uint32_t* local, uint32_t rank) {
  uint32_t value;
  asm volatile("ld.shared::cluster.u32 %0, [%1];"
               : "=r"(value)
               : "r"(remote_address(local, rank))
               : "memory");
  return value;
}

/// Adds to a count in shared memory.
__device__ __forceinline__ void count_in(uint32_t* count, uint32_t more) {
  asm volatile("red.shared.add.u32 [%0], %1;" ::"r"(smem_address(count)), "r"(more) : "memory");
}

/// The row of a cluster, as one of its blocks sees it.
struct Row {
  float* logits;  ///< tokens [first, first + count)
  int first, count, turn;
  Exchange& exchange;

  /// Calls f(token, logit) for this thread's share; f may use all lanes: they take part, with
  /// -infinity behind the end.
  template <typename F>
  __device__ __forceinline__ void each(F f) const {
#pragma unroll 4
    for (int t = static_cast<int>(threadIdx.x); t / 32 * 32 < count; t += kThreads)
      f(first + t, t < count ? logits[t] : -INFINITY);
  }

  /// v of all threads of the cluster joined, in every thread.
  template <typename Join>
  __device__ Pair over_cluster(Pair v, Join join) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    v = join(v);
    if (lane == 0) exchange.warps[threadIdx.x / 32] = v;
    __syncthreads();
    turn ^= 1;
    if (threadIdx.x < 32) {
      v = join(lane < kWarps ? exchange.warps[lane] : Pair{0, 0});
      if (lane < kBlocks)
        store_remote(&exchange.slots[turn][cluster_rank()], static_cast<uint32_t>(lane), v);
    }
    cluster_sync();
    return join(lane < kBlocks ? exchange.slots[turn][lane] : Pair{0, 0});
  }

  /// The largest rank below `limit`; 0: none.
  __device__ uint64_t largest(uint64_t limit) {
    uint64_t best = 0;
    each([&](int token, float logit) {
      const uint64_t rank = rank_of(logit, token);
      if (rank < limit && rank > best) best = rank;
    });
    return over_cluster({best, 0}, Largest()).first;
  }

  /// A rank that the k largest reach and no other, found byte by byte from the highest; 1 if there
  /// are no more than k.
  __device__ uint64_t kth(uint32_t k) {
    uint64_t prefix = 0, mask = 0;
    for (const int shift : {56, 48, 40, 32, 24, 16, 8, 0}) {
      turn ^= 1;
      uint32_t* own = exchange.histogram[turn];
      if (threadIdx.x < 256) own[threadIdx.x] = 0;
      __syncthreads();
      each([&](int token, float logit) {
        const uint64_t rank = rank_of(logit, token);
        const bool counts = rank != 0 && (rank & mask) == prefix;
        const uint32_t bin = counts ? static_cast<uint32_t>(rank >> shift) & 255 : 256;
        const uint32_t equal = __match_any_sync(0xffffffffu, bin);
        if (counts && __ffs(static_cast<int>(equal)) - 1 == static_cast<int>(threadIdx.x) % 32)
          count_in(&own[bin], static_cast<uint32_t>(__popc(equal)));
      });
      cluster_sync();
      if (threadIdx.x < 256) {
        uint32_t sum = 0;
        for (uint32_t rank = 0; rank < kBlocks; ++rank)
          sum += load_remote32(&own[threadIdx.x], rank);
        exchange.bins[threadIdx.x] = sum;
      }
      __syncthreads();
      find_bin(k);
      __syncthreads();
      if (exchange.before + exchange.in_bin < k) return 1;  // all there are, in the first pass
      k -= exchange.before;
      prefix |= static_cast<uint64_t>(exchange.chosen_bin) << shift;
      mask |= uint64_t{255} << shift;
      if (exchange.in_bin == k) break;
    }
    return prefix > 0 ? prefix : 1;
  }

 private:
  /// The bin of the k-th from above, and how many lie in it and above it.
  __device__ void find_bin(uint32_t k) {
    if (threadIdx.x >= 32) return;
    const int lane = static_cast<int>(threadIdx.x);
    uint32_t sum = 0;
    for (int i = 0; i < 8; ++i) sum += exchange.bins[255 - lane * 8 - i];
    uint32_t up_to = sum;
    for (int step = 1; step < 32; step *= 2) {
      const uint32_t other = __shfl_up_sync(0xffffffffu, up_to, step);
      if (lane >= step) up_to += other;
    }
    uint32_t before = up_to - sum;
    const bool here = before < k && (up_to >= k || lane == 31);
    if (!here) return;
    int bin = 255 - lane * 8;
    while (bin > 255 - lane * 8 - 7 && before + exchange.bins[bin] < k)
      before += exchange.bins[bin--];
    exchange.chosen_bin = static_cast<uint32_t>(bin);
    exchange.before = before;
    exchange.in_bin = exchange.bins[bin];
  }
};

/// Tokens of a block: a multiple of 4, so that its share is copied as it lies.
int64_t share_of(int64_t vocab) { return (vocab + 4 * kBlocks - 1) / (4 * kBlocks) * 4; }

/// The block's share of a row of logits, in shared memory.
__device__ Row
load_row(const float* logits, int64_t vocab, int share, float* memory, Exchange& exchange) {
  const int first = min(static_cast<int>(cluster_rank()) * share, static_cast<int>(vocab));
  const int count = min(share, static_cast<int>(vocab) - first);
  const auto bytes = static_cast<uint32_t>((count + 3) / 4 * 16);
  if (threadIdx.x == 0) {
    barrier_init(&exchange.loaded, 1);
    barrier_init_done();
    barrier_arrive_expect(&exchange.loaded, bytes);
    for (uint32_t at = 0; at < bytes; at += kPieceBytes)
      bulk_copy(memory + at / 4, logits + first + at / 4, min(bytes - at, kPieceBytes),
                &exchange.loaded);
  }
  cluster_sync();  // all blocks are there to be written to
  barrier_wait(&exchange.loaded, 0);
  return {memory, first, count, 0, exchange};
}

__device__ void change_row(const SampleSm90Params& p, const SamplingRowSm90& row, const Row& own) {
  for (int i = static_cast<int>(threadIdx.x); i < row.num_changes; i += kThreads) {
    const LogitChangeSm90 change = p.changes[row.changes + i];
    const int at = change.token - own.first;
    if (at >= 0 && at < own.count) own.logits[at] = changed_logit(own.logits[at], change, row);
  }
  __syncthreads();
  if (row.mask < 0) return;
  const uint32_t* mask = p.masks + row.mask * p.mask_words;
  for (int t = static_cast<int>(threadIdx.x); t < own.count; t += kThreads) {
    const int token = own.first + t;
    if (token / 32 >= p.mask_words || (mask[token / 32] >> token % 32 & 1) == 0)
      own.logits[t] = -INFINITY;
  }
}

__device__ __forceinline__ uint64_t ordered(double x) {
  const uint64_t bits = double_bits(x);
  return bits ^ (bits >> 63 != 0 ? ~uint64_t{0} : uint64_t{1} << 63);
}

__device__ __forceinline__ double unordered(uint64_t x) {
  return bits_double(x ^ (x >> 63 != 0 ? uint64_t{1} << 63 : ~uint64_t{0}));
}

/// The Gumbel noise of a draw's leading word within 1e-3, or a NaN where the draw is too near to 0
/// or 1 for that.
__device__ __forceinline__ float about_gumbel(uint32_t word) {
  if (word < 4096 || ~word < 4096) return NAN;
  const float u = static_cast<float>(word) * 0x1p-32f;
  // -log(1 - u), by its series where 1 - u has lost what matters.
  const float series = u * fmaf(u, fmaf(u, fmaf(u, fmaf(u, 0.2f, 0.25f), 0.33333333f), 0.5f), 1.0f);
  const float left = static_cast<float>(~word) * 0x1p-32f;
  return -__logf(u < 0.0625f ? series : -__logf(left));
}

/// A token that may win, with its key as far as it is known.
struct Contender {
  float about;  ///< the key within kSlack
  int token;
};
constexpr float kSlack = 2e-3f;

/// Of the tokens with ranks from `from` on: the one of the largest key. Keys are computed in FP32
/// first, which decides but among those that are close.
__device__ int draw(
    Row& own, const SamplingRowSm90& row, uint64_t best, float highest, uint64_t from) {
  const Philox random(row.seed, row.stream);
  const auto counter = [&](int token) {
    return static_cast<uint64_t>(row.choice) << 32 | static_cast<uint32_t>(token);
  };
  const auto key = [&](int token, float logit) {
    const auto words = random.block(counter(token));
    return scaled_logit(logit, highest, row) + gumbel(words[0], words[1]);
  };
  const auto logit_of = [&](int token) {
    return token == token_of(best) ? highest : own.logits[token - own.first];
  };
  const float inverse = static_cast<float>(1.0 / row.temperature);
  Contender front = {-INFINITY, token_of(best)};
  const auto consider = [&](int token, float about) {
    if (about < front.about - kSlack) return;
    if (!(about > front.about + kSlack)) {  // close, or not known
      const double other = key(front.token, logit_of(front.token));
      const double k = key(token, logit_of(token));
      about = static_cast<float>(k);
      if (other > k || (other == k && front.token < token)) return;
    }
    front = {about, token};
  };
  // Several at once, so that one's rounds hide another's.
  constexpr int kTogether = 4;
  for (int t = static_cast<int>(threadIdx.x); t < own.count; t += kTogether * kThreads) {
    float about[kTogether];
    bool any = false;
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int at = t + i * kThreads, token = own.first + at;
      const float logit = at < own.count ? own.logits[at] : -INFINITY;
      const uint64_t rank = rank_of(logit, token);
      const float noise = about_gumbel(random.block(counter(token))[0]);
      about[i] = rank == 0 || rank < from ? -INFINITY : (logit - highest) * inverse + noise;
      any = any || !(about[i] < front.about - kSlack);
    }
    if (!any) continue;
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if (about[i] != -INFINITY) consider(own.first + t + i * kThreads, about[i]);
    }
  }
  // The block's best are compared exactly.
  const uint64_t near = own.over_cluster({ordered(front.about), 0}, Largest()).first;
  Pair won = {0, 0};
  if (!(static_cast<double>(front.about) < unordered(near) - kSlack))
    won = {ordered(key(front.token, logit_of(front.token))), static_cast<uint32_t>(~front.token)};
  won = own.over_cluster(won, Larger());
  return static_cast<int>(~static_cast<uint32_t>(won.second));
}

/// Whether the tokens that are likelier than `rank` have less than top_p of the mass of those from
/// `from` on.
__device__ bool within(
    Row& own, const SamplingRowSm90& row, float highest, uint64_t from, uint64_t rank) {
  const float inverse = static_cast<float>(1.0 / row.temperature);
  Pair masses = {0, 0};
  own.each([&](int token, float logit) {
    const uint64_t other = rank_of(logit, token);
    if (other == 0 || other < from) return;
    const uint64_t mass = mass_of((logit - highest) * inverse);
    masses.first += mass;
    if (other > rank) masses.second += mass;
  });
  masses = own.over_cluster(masses, Sum());
  return static_cast<double>(masses.second) < row.top_p * static_cast<double>(masses.first);
}

/// The likeliest token's rank, without those that the row avoids if there is any other.
__device__ uint64_t avoid(const SampleSm90Params& p, const SamplingRowSm90& row, Row& own) {
  const auto thread = static_cast<int>(threadIdx.x);
  int at = -1;
  float before = 0.0f;
  if (thread < row.num_avoided) {
    at = p.avoided[row.avoided + thread] - own.first;
    if (at >= own.count) at = -1;
    if (at >= 0) {
      before = own.logits[at];
      own.logits[at] = -INFINITY;
    }
  }
  __syncthreads();
  const uint64_t best = own.largest(~uint64_t{0});
  if (best != 0 || row.num_avoided == 0) return best;
  if (at >= 0) own.logits[at] = before;
  __syncthreads();
  return own.largest(~uint64_t{0});
}

__device__ int sample_row(const SampleSm90Params& p, const SamplingRowSm90& row, Row& own) {
  const uint64_t best = avoid(p, row, own);
  if (best == 0) return -1;
  if (row.temperature <= 0.0) return token_of(best);
  const uint32_t bits = static_cast<uint32_t>(best >> 32);
  const float highest = bits_float(bits ^ (bits >> 31 != 0 ? 0x80000000u : 0xffffffffu));
  const uint64_t from = row.top_k > 0 ? own.kth(static_cast<uint32_t>(row.top_k)) : 1;
  // Whom top-p or min-p excludes, they exclude with everybody who is less likely, so the next best
  // is looked for among the likelier ones.
  uint64_t least = from;
  while (true) {
    const int chosen = draw(own, row, best, highest, least);
    if (chosen == token_of(best)) return chosen;
    // Its logit is in one block alone.
    uint64_t mine = 0;
    const int at = chosen - own.first;
    if (at >= 0 && at < own.count) mine = rank_of(own.logits[at], chosen);
    const uint64_t rank = own.over_cluster({mine, 0}, Largest()).first;
    const uint32_t high = static_cast<uint32_t>(rank >> 32);
    const float logit = bits_float(high ^ (high >> 31 != 0 ? 0x80000000u : 0xffffffffu));
    const bool allowed = !(scaled_logit(logit, highest, row) < row.least) &&
                         (row.top_p >= 1.0 || within(own, row, highest, from, rank));
    if (allowed) return chosen;
    least = rank + 1;
  }
}

__global__ void __launch_bounds__(kThreads)
    sample_kernel(const __grid_constant__ SampleSm90Params p, int share) {
  extern __shared__ __align__(16) float memory[];
  __shared__ Exchange exchange;
  wait_for_previous();
  launch_dependents();
  const int64_t r = blockIdx.x / kBlocks;
  const SamplingRowSm90 row = p.rows[r];
  Row own = load_row(p.logits + r * p.stride, p.vocab, share, memory, exchange);
  change_row(p, row, own);
  __syncthreads();
  const int chosen = sample_row(p, row, own);
  if (cluster_rank() == 0 && threadIdx.x == 0) p.tokens[r] = chosen;
  cluster_sync();  // nobody leaves while its slots are read
}

__global__ void __launch_bounds__(kThreads)
    log_probs_kernel(const __grid_constant__ LogProbsSm90Params p, int share) {
  extern __shared__ __align__(16) float memory[];
  __shared__ Exchange exchange;
  wait_for_previous();
  launch_dependents();
  const int64_t r = blockIdx.x / kBlocks;
  const float* logits = p.logits + r * p.stride;
  Row own = load_row(logits, p.vocab, share, memory, exchange);
  uint64_t rank = own.largest(~uint64_t{0});
  const float highest = rank == 0 ? -INFINITY : logits[token_of(rank)];
  Pair masses = {0, 0};
  own.each([&](int, float logit) { masses.first += mass_of(logit - highest); });
  masses = own.over_cluster(masses, Sum());
  const double log_total = masses.first == 0 ? -INFINITY : log_mass(masses.first);
  const bool writes = cluster_rank() == 0 && threadIdx.x == 0;
  const auto logprob = [&](int64_t token) {
    return static_cast<double>(logits[token]) - static_cast<double>(highest) - log_total;
  };
  for (int64_t i = 0; i < p.count; ++i) {
    if (writes) {
      p.tokens[r * p.count + i] = rank == 0 ? -1 : token_of(rank);
      p.logprobs[r * p.count + i] = rank == 0 ? -INFINITY : logprob(token_of(rank));
    }
    if (i + 1 < p.count) rank = own.largest(rank);
  }
  if (writes) {
    if (p.picked != nullptr)
      p.picked_logprob[r] = p.picked[r] < 0 ? -INFINITY : logprob(p.picked[r]);
    if (p.log_sum_exp != nullptr) p.log_sum_exp[r] = static_cast<double>(highest) + log_total;
  }
  cluster_sync();
}

template <typename Params>
void launch(void (*kernel)(Params, int), const Params& p, Stream stream, const char* name) {
  if (p.num_rows == 0) return;
  const int64_t share = share_of(p.vocab);
  if (share > kMaxShare) throw_kernel_error(name, "more than 400,000 tokens");
  if (p.stride % 4 != 0 || reinterpret_cast<uintptr_t>(p.logits) % 16 != 0 ||
      p.stride < (p.vocab + 3) / 4 * 4)
    throw_kernel_error(name, "rows of logits at multiples of 16 bytes");
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxShare * 4);
  const auto bytes = static_cast<size_t>(share * 4);
  launch_early(kernel, {blocks_for(p.num_rows * kBlocks, 1), kThreads, bytes, kBlocks}, stream,
               name, p, static_cast<int>(share));
}

}  // namespace
}  // namespace hadal::ops::cuda

namespace hadal::ops {

void sample_sm90(const SampleSm90Params& p, Stream stream) {
  cuda::launch(cuda::sample_kernel, p, stream, "sample_sm90");
}

void log_probs_sm90(const LogProbsSm90Params& p, Stream stream) {
  if (p.count > 32) throw_kernel_error("log_probs_sm90", "more than 32 tokens");
  cuda::launch(cuda::log_probs_kernel, p, stream, "log_probs_sm90");
}

}  // namespace hadal::ops
