// Times of the Hopper products at V4-Flash's widths, in the same run as the card's copy rate.
//   kernel_bench [linear] [experts] [wide_experts] [index] [rows] [forward] [attention] [prefill]
//                [any] [copy]
//   one line a case; none named: all; prefill: the prefill of attention alone
// Everything runs as a captured graph, products over distinct weights, so that the second-level
// cache holds nothing of what a call reads (of `forward` the products and wo_a alone); medians of
// 15 replays.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include <cuda_runtime.h>

#include "kernels.cuh"
#include "ops/gemm/linear_sm90.h"
#include "ops/gemm/sm90_layout.h"
#include "ops/indexer/index_scores_sm90.h"
#include "ops/mhc/hyper_connection_sm90.h"
#include "ops/norm/rms_norm_sm90.h"

namespace hadal::ops {
namespace {

/// E4M3 codes of both signs and moderate size.
__global__ void fill_codes(uint32_t* words, size_t count, uint32_t seed) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count;
       i += size_t{gridDim.x} * blockDim.x)
    words[i] = (mix(i, seed) & 0xbfbfbfbfu) | 0x20202020u;
}
__global__ void fill_fp4(uint32_t* words, size_t count, uint32_t seed) {
  constexpr size_t kWords = sm90::kFp4TileBytes / 4;
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count;
       i += size_t{gridDim.x} * blockDim.x) {
    const uint32_t random = mix(i, seed);
    words[i] = i % kWords < 1024 ? random : (0xccccu - (random & 0x1111u) + 0x2222u) << 16 | 120u;
  }
}
/// Rows of 68 bytes: FP4 pairs, then scales close together.
__global__ void fill_index(uint8_t* rows, int64_t count) {
  const int64_t bytes = count * kIndexRowBytes;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < bytes;
       i += int64_t{gridDim.x} * blockDim.x) {
    const uint32_t random = mix(static_cast<uint64_t>(i), 6);
    rows[i] = static_cast<uint8_t>(i % kIndexRowBytes < 64 ? random : 120 + random % 4);
  }
}
__global__ void fill_floats(float* values, size_t count, float value) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count;
       i += size_t{gridDim.x} * blockDim.x)
    values[i] = value;
}
__global__ void copy_kernel(const uint4* from, uint4* to, size_t count) {
  const size_t stride = size_t{gridDim.x} * blockDim.x;
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count; i += stride * 4) {
    uint4 v[4];
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (i + j * stride < count) v[j] = __ldcs(from + i + j * stride);
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (i + j * stride < count) __stcs(to + i + j * stride, v[j]);
  }
}

/// Bytes read and written a second, in units of 10^12, the best of a few grids.
double copy_rate(cudaStream_t stream) {
  const size_t bytes = size_t{2} << 30;
  auto* from = allocate<uint8_t>(bytes);
  auto* to = allocate<uint8_t>(bytes);
  double best = 0;
  for (const int blocks : {132 * 2, 132 * 4, 132 * 8, 132 * 32}) {
    const double us = microseconds(4, stream, [&] {
      for (int i = 0; i < 4; ++i)
        copy_kernel<<<blocks, 512, 0, stream>>>(reinterpret_cast<const uint4*>(from),
                                                reinterpret_cast<uint4*>(to), bytes / 16);
    });
    best = std::max(best, 2.0 * static_cast<double>(bytes) / us / 1e6);
  }
  cudaFree(from);
  cudaFree(to);
  return best;
}

void bench_linear(cudaStream_t stream, double copy) {
  struct Matrix {
    const char* name;
    int64_t in, out;
  };
  for (const Matrix m : {Matrix{"wq_a+wkv", 4096, 1536},
                         {"wq_b", 1024, 32768},
                         {"wo_b", 8192, 4096},
                         {"shared gate+up", 4096, 4096},
                         {"shared down", 2048, 4096}}) {
    const int64_t slabs = m.in / 128, w_groups = m.out / 8;
    const size_t w_bytes = static_cast<size_t>(m.in * m.out);
    const int sets = static_cast<int>(std::max<size_t>(2, (size_t{512} << 20) / w_bytes));
    auto* w = allocate<uint8_t>(w_bytes * sets);
    fill_codes<<<1024, 256, 0, stream>>>(reinterpret_cast<uint32_t*>(w), w_bytes * sets / 4, 1);
    auto* w_scale = allocate<float>(static_cast<size_t>(slabs * m.out / 128));
    fill_floats<<<64, 256, 0, stream>>>(w_scale, static_cast<size_t>(slabs * m.out / 128), 0.5f);
    for (const int64_t rows : {1, 8, 16, 64, 4096}) {
      const int64_t x_groups = (rows + 7) / 8;
      auto* x = allocate<uint8_t>(static_cast<size_t>(x_groups * 8 * m.in));
      fill_codes<<<1024, 256, 0, stream>>>(reinterpret_cast<uint32_t*>(x), x_groups * 2 * m.in, 2);
      auto* x_scale = allocate<float>(static_cast<size_t>(x_groups * 8 * slabs));
      fill_floats<<<64, 256, 0, stream>>>(x_scale, x_groups * 8 * slabs, 0.25f);
      auto* y = allocate<uint16_t>(static_cast<size_t>(rows * m.out));
      std::vector<int> splits = {-1};
      if (rows <= 16) splits = {-1, 1, 2, 4, 8};
      for (const int split : splits) {
        if (split > 1 && slabs / split * 64 * (rows > 8 ? 16 : 8) * 4 > 128 * 1024) continue;
        const double us = microseconds(sets, stream, [&] {
          for (int i = 0; i < sets; ++i) {
            linear_fp8_sm90({x,
                             w + i * w_bytes,
                             x_groups,
                             w_groups,
                             x_scale,
                             w_scale,
                             rows,
                             m.out,
                             slabs,
                             {y, m.out, ElementType::kBf16}},
                            stream, {-1, split});
          }
        });
        std::printf(
            "linear %-15s rows %4ld split %2d  %8.2f us  %6.2f TB/s of weights (%2.0f %% of copy)  "
            "%7.1f TFLOP/s\n",
            m.name, static_cast<long>(rows), split, us, static_cast<double>(w_bytes) / us / 1e6,
            static_cast<double>(w_bytes) / us / 1e4 / copy,
            2.0 * static_cast<double>(rows * m.in * m.out) / us / 1e6);
      }
      cudaFree(x);
      cudaFree(x_scale);
      cudaFree(y);
    }
    cudaFree(w);
    cudaFree(w_scale);
  }
}

/// One routing: rows of x by expert, each expert's from a multiple of 8 on.
struct Routing {
  int32_t* source;
  ExpertRun* runs;
  int32_t* num_runs;
  int64_t rows, hit;
};

Routing make_routing(int tokens, std::mt19937& random) {
  constexpr int kExperts = 256, kTopk = 6;
  std::vector<std::vector<int32_t>> of(kExperts);
  for (int t = 0; t < tokens; ++t) {
    std::vector<int> chosen;
    while (chosen.size() < kTopk) {
      const int e = static_cast<int>(random() % kExperts);
      if (std::find(chosen.begin(), chosen.end(), e) == chosen.end()) chosen.push_back(e);
    }
    for (const int e : chosen) of[e].push_back(t);
  }
  std::vector<int32_t> source;
  std::vector<ExpertRun> runs;
  for (int e = 0; e < kExperts; ++e) {
    if (of[e].empty()) continue;
    runs.push_back({e, static_cast<int32_t>(source.size()), static_cast<int32_t>(of[e].size())});
    source.insert(source.end(), of[e].begin(), of[e].end());
    while (source.size() % 8 != 0) source.push_back(-1);
  }
  Routing r = {allocate<int32_t>(source.size()), allocate<ExpertRun>(runs.size()),
               allocate<int32_t>(1), static_cast<int64_t>(source.size()),
               static_cast<int64_t>(runs.size())};
  const auto count = static_cast<int32_t>(runs.size());
  cudaMemcpy(r.source, source.data(), source.size() * 4, cudaMemcpyHostToDevice);
  cudaMemcpy(r.runs, runs.data(), runs.size() * sizeof(ExpertRun), cudaMemcpyHostToDevice);
  cudaMemcpy(r.num_runs, &count, 4, cudaMemcpyHostToDevice);
  return r;
}

void bench_experts(cudaStream_t stream, double copy) {
  constexpr int64_t kDim = 4096, kInter = 2048, kExperts = 256;
  constexpr int64_t kUpBytes = 2 * kInter / 64 * (kDim / 128) * sm90::kFp4TileBytes;
  constexpr int64_t kDownBytes = kDim / 64 * (kInter / 128) * sm90::kFp4TileBytes;
  auto* up = allocate<uint8_t>(kExperts * kUpBytes);
  auto* down = allocate<uint8_t>(kExperts * kDownBytes);
  fill_fp4<<<2048, 256, 0, stream>>>(reinterpret_cast<uint32_t*>(up), kExperts * kUpBytes / 4, 1);
  fill_fp4<<<2048, 256, 0, stream>>>(reinterpret_cast<uint32_t*>(down), kExperts * kDownBytes / 4,
                                     2);
  std::mt19937 random(3);
  for (const int tokens : {1, 8, 64, 4096}) {
    std::vector<Routing> sets;
    int64_t most = 0, hit = 0;
    for (int i = 0; i < 8; ++i) {
      sets.push_back(make_routing(tokens, random));
      most = std::max(most, sets.back().rows);
      hit += sets.back().hit;
    }
    auto* x = allocate<uint16_t>(static_cast<size_t>(tokens * kDim));
    fill_bf16<<<64, 256, 0, stream>>>(x, static_cast<size_t>(tokens * kDim), 4);
    auto* codes = allocate<uint8_t>(static_cast<size_t>(most * kDim));
    auto* scales = allocate<float>(static_cast<size_t>(most * kDim / 128));
    auto* h = allocate<uint16_t>(static_cast<size_t>(most * 2 * kInter));
    auto* h_codes = allocate<uint8_t>(static_cast<size_t>(most * kInter));
    auto* h_scales = allocate<float>(static_cast<size_t>(most * kInter / 128));
    auto* y = allocate<uint16_t>(static_cast<size_t>(most * kDim));
    const double bytes = static_cast<double>(hit) / 8 * static_cast<double>(kUpBytes + kDownBytes);
    for (const int tile :
         tokens < 256 ? std::vector<int>{-1, 8, 16} : std::vector<int>{-1, 64, 128}) {
      for (int part = 0; part < 3; ++part) {  // all, gate and up alone, down alone
        const double us = microseconds(8, stream, [&] {
          for (const Routing& r : sets) {
            const int64_t groups = r.rows / 8;
            if (part == 0)
              quantise_operand_sm90({x, r.source, r.rows, kDim, kDim, codes, scales, groups},
                                    stream);
            if (part <= 1)
              experts_fp4_sm90({codes,
                                scales,
                                groups,
                                up,
                                2 * kInter,
                                kDim / 128,
                                r.runs,
                                r.num_runs,
                                r.hit,
                                {h, 2 * kInter, ElementType::kBf16}},
                               stream, {tile, -1});
            if (part == 0)
              swiglu_quantise_sm90(
                  {h, nullptr, nullptr, 10.0f, r.rows, kInter, h_codes, h_scales, groups}, stream);
            if (part != 1)
              experts_fp4_sm90({h_codes,
                                h_scales,
                                groups,
                                down,
                                kDim,
                                kInter / 128,
                                r.runs,
                                r.num_runs,
                                r.hit,
                                {y, kDim, ElementType::kBf16}},
                               stream, {tile, -1});
          }
        });
        const double part_bytes = part == 0 ? bytes : bytes * (part == 1 ? 2.0 : 1.0) / 3.0;
        std::printf(
            "experts tokens %4d tile %3d %-8s %8.2f us  %5.2f TB/s of weights (%2.0f %% of copy)\n",
            tokens, tile, part == 0 ? "all" : (part == 1 ? "gate+up" : "down"), us,
            part_bytes / us / 1e6, part_bytes / us / 1e4 / copy);
      }
    }
  }
}

/// The gate and up product of experts in FP8 and BF16, rows gathered to operands included.
void bench_wide_experts(cudaStream_t stream, double copy) {
  constexpr int64_t kDim = 4096, kOut = 4096, kExperts = 256;
  for (const bool fp8 : {true, false}) {
    const int64_t slabs = kDim * (fp8 ? 1 : 2) / 128, expert_bytes = kOut * slabs * 128;
    auto* w = allocate<uint16_t>(static_cast<size_t>(kExperts * expert_bytes / 2));
    fill_bf16<<<2048, 256, 0, stream>>>(w, static_cast<size_t>(kExperts * expert_bytes / 2), 1);
    const auto scale_count = static_cast<size_t>(kExperts * slabs * kOut / 128);
    auto* w_scale = on_device(std::vector<float>(scale_count, 0.25f));
    std::mt19937 random(3);
    for (const int tokens : {1, 8, 64, 4096}) {
      const Routing r = make_routing(tokens, random);
      const int64_t groups = r.rows / 8;
      auto* x = allocate<uint16_t>(static_cast<size_t>(tokens * kDim));
      fill_bf16<<<64, 256, 0, stream>>>(x, static_cast<size_t>(tokens * kDim), 4);
      auto* operand = allocate<uint8_t>(static_cast<size_t>(r.rows * slabs * 128));
      auto* scales = allocate<float>(static_cast<size_t>(r.rows * slabs));
      auto* y = allocate<uint16_t>(static_cast<size_t>(r.rows * kOut));
      ExpertsSm90Params p = {operand, fp8 ? scales : nullptr,
                             groups,  reinterpret_cast<uint8_t*>(w),
                             kOut,    slabs,
                             r.runs,  r.num_runs,
                             r.hit,   {y, kOut, ElementType::kBf16},
                             w_scale};
      for (const int tile :
           tokens < 256 ? std::vector<int>{-1, 8, 16} : std::vector<int>{-1, 64, 128}) {
        const double us = microseconds(2, stream, [&] {
          for (int i = 0; i < 2; ++i) {
            if (fp8) {
              quantise_operand_sm90({x, r.source, r.rows, kDim, kDim, operand, scales, groups},
                                    stream);
              experts_fp8_sm90(p, stream, {tile, -1});
            } else {
              bf16_operand_sm90({x, r.rows, kDim, kDim, operand, groups, r.source}, stream);
              experts_bf16_sm90(p, stream, {tile, -1});
            }
          }
        });
        const double bytes = static_cast<double>(r.hit * expert_bytes);
        const double flop = 2.0 * tokens * 6 * kDim * kOut;
        std::printf(
            "experts %s gate+up tokens %4d tile %3d %8.2f us  %5.2f TB/s of weights (%2.0f %% of "
            "copy)  %5.0f TFLOP/s\n",
            fp8 ? "FP8 " : "BF16", tokens, tile, us, bytes / us / 1e6, bytes / us / 1e4 / copy,
            flop / us / 1e6);
      }
      for (void* memory : {static_cast<void*>(x), static_cast<void*>(operand),
                           static_cast<void*>(scales), static_cast<void*>(y)})
        cudaFree(memory);
    }
    cudaFree(w);
    cudaFree(w_scale);
  }
}

void bench_index(cudaStream_t stream, double copy) {
  constexpr int64_t kHeads = 64, kTopk = 512;
  for (const int64_t tokens : {1, 8}) {
    for (const int64_t blocks : {2048, 32768, 262144}) {
      const int64_t pages = blocks / kIndexPageRows, all = pages * tokens;
      auto* keys = allocate<uint8_t>(static_cast<size_t>(all * kIndexPageRows * kIndexRowBytes));
      fill_index<<<1024, 256, 0, stream>>>(keys, all * kIndexPageRows);
      auto* q = allocate<uint8_t>(static_cast<size_t>(tokens * kHeads * kIndexRowBytes));
      fill_index<<<64, 256, 0, stream>>>(q, tokens * kHeads);
      auto* w = allocate<uint16_t>(static_cast<size_t>(tokens * kHeads));
      fill_bf16<<<64, 256, 0, stream>>>(w, static_cast<size_t>(tokens * kHeads), 4);
      std::vector<int32_t> table(static_cast<size_t>(all)),
          visible(tokens, static_cast<int32_t>(blocks)), sequence(tokens);
      std::iota(table.begin(), table.end(), 0);
      std::shuffle(table.begin(), table.end(), std::mt19937(5));
      std::iota(sequence.begin(), sequence.end(), 0);
      const auto there = [](const std::vector<int32_t>& values) {
        auto* p = allocate<int32_t>(values.size());
        cudaMemcpy(p, values.data(), values.size() * 4, cudaMemcpyHostToDevice);
        return p;
      };
      const int32_t *table_there = there(table), *visible_there = there(visible),
                    *sequence_there = there(sequence);
      auto* scores = allocate<uint16_t>(static_cast<size_t>(tokens * blocks));
      auto* chosen = allocate<int32_t>(static_cast<size_t>(tokens * kTopk));
      double us[2];
      for (int part = 0; part < 2; ++part) {
        us[part] = microseconds(20, stream, [&] {
          for (int i = 0; i < 20; ++i) {
            if (part == 0)
              index_scores_sm90({q, w, keys, table_there, sequence_there, visible_there, scores,
                                 tokens, kHeads, pages, blocks},
                                stream);
            else
              index_topk_sm90({scores, visible_there, chosen, tokens, blocks, kTopk}, stream);
          }
        });
      }
      const double bytes = static_cast<double>(tokens * blocks * kIndexRowBytes);
      std::printf(
          "index tokens %2ld blocks %6ld  scores %8.2f us  %5.2f TB/s of keys (%2.0f %% of copy)  "
          "top-k %8.2f us\n",
          static_cast<long>(tokens), static_cast<long>(blocks), us[0], bytes / us[0] / 1e6,
          bytes / us[0] / 1e4 / copy, us[1]);
      cudaFree(keys);
      cudaFree(scores);
    }
  }
}

void bench_rows(cudaStream_t stream, double copy) {
  for (const int64_t dim : {4096, 7168}) {
    for (const int64_t tokens : {1, 16, 64, 4096}) {
      const auto values = static_cast<size_t>(tokens * dim);
      auto* streams = allocate<uint16_t>(values * 4);
      auto* out = allocate<uint16_t>(values);
      auto* mixed = allocate<uint16_t>(values);
      fill_bf16<<<512, 256, 0, stream>>>(streams, values * 4, 1);
      fill_bf16<<<512, 256, 0, stream>>>(out, values, 2);
      // Some copies of fn, so that the cache does not hold the next.
      constexpr int kCopies = 40;
      const size_t fn_values = 24 * 4 * static_cast<size_t>(dim);
      auto* fn = allocate<float>(fn_values * kCopies);
      fill_floats<<<512, 256, 0, stream>>>(fn, fn_values * kCopies, 0.001f);
      auto* small = allocate<float>(static_cast<size_t>(tokens * 20 + 64));
      fill_floats<<<64, 256, 0, stream>>>(small, static_cast<size_t>(tokens * 20 + 64), 0.1f);
      const HcPreSm90Params pre = {
          streams, fn,  small, small, mixed, small + 64, small + 64 + tokens * 4,
          tokens,  dim, 20,    1e-6f, 1e-6f, false};
      const double pre_us = microseconds(kCopies, stream, [&] {
        for (int i = 0; i < kCopies; ++i) {
          HcPreSm90Params p = pre;
          p.fn = fn + i * fn_values;
          hc_pre_sm90(p, stream);
        }
      });
      const double post_us = microseconds(kCopies, stream, [&] {
        for (int i = 0; i < kCopies; ++i)
          hc_post_sm90({out, streams, small + 64, small + 64 + tokens * 4, streams, tokens, dim},
                       stream);
      });
      const double norm_us = microseconds(kCopies, stream, [&] {
        for (int i = 0; i < kCopies; ++i)
          rms_norm_sm90({mixed, fn, out, tokens, dim, 1e-6f, false}, stream);
      });
      const double bytes = static_cast<double>(tokens * dim * 20);
      std::printf(
          "mHC dim %ld tokens %4ld  pre %7.2f us  post %7.2f us  norm %7.2f us  together %5.2f "
          "TB/s of 20 D bytes (%2.0f %% of copy)\n",
          static_cast<long>(dim), static_cast<long>(tokens), pre_us, post_us, norm_us,
          bytes / (pre_us + post_us + norm_us) / 1e6,
          bytes / (pre_us + post_us + norm_us) / 1e4 / copy);
      cudaFree(streams);
      cudaFree(out);
      cudaFree(mixed);
      cudaFree(fn);
      cudaFree(small);
    }
  }
}

}  // namespace

int run(int argc, char** argv) {
  const auto wanted = [&](const char* name) {
    bool found = argc == 1;
    for (int i = 1; i < argc; ++i) found = found || std::strcmp(argv[i], name) == 0;
    return found;
  };
  cudaStream_t stream;
  check(cudaStreamCreate(&stream), "stream");
  const double copy = copy_rate(stream);
  std::printf("copy %.3f TB/s read and written\n", copy);
  if (wanted("attention")) bench_attention(stream, copy, false);
  if (argc > 1 && wanted("prefill")) bench_attention(stream, copy, true);
  if (wanted("any")) bench_attention_any(stream, copy);
  if (wanted("rows")) bench_rows(stream, copy);
  if (wanted("forward")) bench_forward(stream, copy);
  if (wanted("index")) bench_index(stream, copy);
  if (wanted("experts")) bench_experts(stream, copy);
  if (wanted("wide_experts")) bench_wide_experts(stream, copy);
  if (wanted("linear")) bench_linear(stream, copy);
  return 0;
}

}  // namespace hadal::ops

int main(int argc, char** argv) { return hadal::ops::run(argc, argv); }
