// Times of what a forward pass does between its large products: rows on their way to a cache, the
// compressor, small products, the choice of experts, sampling.
#include <cmath>
#include <numeric>

#include "kernels.cuh"
#include "ops/attention/heads_sm90.h"
#include "ops/cache/rows_sm90.h"
#include "ops/compressor/compress_sm90.h"
#include "ops/gemm/linear_sm90.h"
#include "ops/moe/gate_sm90.h"
#include "ops/sampling/sample_sm90.h"

namespace hadal::ops {
namespace {

constexpr int kCalls = 20;

/// About normal, as logits are.
__global__ void fill_logits(float* values, size_t count, uint32_t seed) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count;
       i += size_t{gridDim.x} * blockDim.x) {
    float sum = 0.0f;
    for (int j = 0; j < 6; ++j)
      sum += static_cast<float>(mix(i * 6 + static_cast<size_t>(j), seed) >> 8) / 16777216.0f;
    values[i] = (sum - 3.0f) * 3.0f;
  }
}
float* logits(size_t count, uint32_t seed, cudaStream_t stream) {
  auto* values = allocate<float>(count);
  fill_logits<<<1024, 256, 0, stream>>>(values, count, seed);
  return values;
}
uint16_t* bf16(size_t count, uint32_t seed, cudaStream_t stream) {
  auto* values = allocate<uint16_t>(count);
  fill_bf16<<<1024, 256, 0, stream>>>(values, count, seed);
  return values;
}
/// One line: time, bytes that must move at the least, and their share of the copy rate.
void print(const char* name, int64_t count, double us, double bytes, double copy) {
  std::printf("%-34s %6ld  %9.2f us  %6.2f TB/s (%3.0f %% of copy)\n", name,
              static_cast<long>(count), us, bytes / us / 1e6, bytes / us / 1e4 / copy);
  std::fflush(stdout);
}

void bench_cache_rows(cudaStream_t stream, double copy) {
  for (const int64_t tokens : {1, 64, 4096}) {
    constexpr int64_t kHeads = 64;
    auto* q = bf16(static_cast<size_t>(tokens * kHeads * 512), 1, stream);
    auto* turn = logits(static_cast<size_t>(tokens * 64), 2, stream);
    auto* weight = logits(512, 3, stream);
    auto* out = allocate<uint8_t>(static_cast<size_t>(tokens * kHeads * 68 + tokens * 584));
    const auto time = [&](auto body) {
      return microseconds(kCalls, stream, [&] {
        for (int i = 0; i < kCalls; ++i) body();
      });
    };
    for (const bool norm : {true, false}) {
      const double us = time([&] {
        head_rows_sm90({q, turn, q, tokens, kHeads, 512, 1e-6f, norm, !norm}, stream);
      });
      print(norm ? "64 heads: norm, rotation" : "64 heads: rotation back", tokens, us,
            static_cast<double>(tokens * kHeads * 2048), copy);
    }
    const int64_t x_groups = (tokens + 7) / 8;
    auto* operand = allocate<uint8_t>(static_cast<size_t>(x_groups * 8 * kHeads * 1024));
    print("64 heads: back, as operands", tokens, time([&] {
            head_operand_sm90({q, turn, operand, tokens, kHeads, 512, 8, x_groups}, stream);
          }),
          static_cast<double>(tokens * kHeads * 2048), copy);
    cudaFree(operand);
    print("latents", tokens, time([&] {
            latent_rows_sm90({q, weight, turn, nullptr, out, tokens, 512, 512, 1e-6f}, stream);
          }),
          static_cast<double>(tokens * (1024 + 584 + 256)), copy);
    print(
        "index queries, 64 heads", tokens, time([&] {
          index_rows_sm90({q, nullptr, turn, nullptr, out, tokens * kHeads, kHeads, 1e-6f}, stream);
        }),
        static_cast<double>(tokens * kHeads * (256 + 68)), copy);
    cudaFree(q);
    cudaFree(out);
  }
}

void bench_compressor(cudaStream_t stream, double copy) {
  struct Case {
    const char* name;
    int64_t ratio, sequences, length;
  };
  for (const Case c : {Case{"CSA pooling, decode", 4, 1, 1},
                       {"CSA pooling, decode", 4, 64, 1},
                       {"CSA pooling, prefill", 4, 1, 4096},
                       {"HCA pooling, decode", 128, 1, 1},
                       {"HCA pooling, decode", 128, 64, 1},
                       {"HCA pooling, prefill", 128, 1, 4096}}) {
    constexpr int64_t kD = 512;
    const int64_t width = c.ratio == 4 ? 2 * kD : kD, ring = 2 * c.ratio;
    const int64_t tokens = c.sequences * c.length, start = 8191 * c.ratio + c.ratio - 1;
    std::vector<int32_t> slots, first_row;
    std::vector<int64_t> pos, block_seq, block_pos, from, to;
    for (int64_t s = 0; s < c.sequences; ++s) {
      slots.push_back(static_cast<int32_t>(s));
      first_row.push_back(static_cast<int32_t>(s * c.length));
      for (int64_t t = 0; t < c.length; ++t) {
        pos.push_back(start + t);
        if (t + ring < c.length) continue;
        from.push_back(s * c.length + t);
        to.push_back(s * ring + (start + t) % ring);
      }
      for (int64_t b = start / c.ratio; b < (start + c.length) / c.ratio; ++b) {
        block_seq.push_back(s);
        block_pos.push_back(b * c.ratio);
      }
    }
    const CompressorRowsSm90 rows = {
        logits(static_cast<size_t>(tokens * width), 1, stream),
        logits(static_cast<size_t>(tokens * width), 2, stream),
        logits(static_cast<size_t>(c.ratio * width), 3, stream),
        logits(static_cast<size_t>(c.sequences * ring * width), 4, stream),
        logits(static_cast<size_t>(c.sequences * ring * width), 5, stream),
        {.slots = on_device(slots), .size = ring},
        on_device(first_row),
        on_device(pos),
        width,
        c.ratio,
        kD};
    const auto blocks = static_cast<int64_t>(block_seq.size());
    const CompressSm90Params pool = {rows, on_device(block_seq), on_device(block_pos),
                                     allocate<uint16_t>(static_cast<size_t>(blocks * kD)), blocks};
    const KeepRowsSm90Params keep = {rows, on_device(from), on_device(to),
                                     static_cast<int64_t>(from.size())};
    const double us = microseconds(kCalls, stream, [&] {
      for (int i = 0; i < kCalls; ++i) compress_sm90(pool, stream);
    });
    const double keep_us = microseconds(kCalls, stream, [&] {
      for (int i = 0; i < kCalls; ++i) keep_rows_sm90(keep, stream);
    });
    const double candidates = static_cast<double>(blocks * c.ratio * (c.ratio == 4 ? 2 : 1));
    print(c.name, blocks, us, candidates * kD * 8, copy);
    std::printf("    rows kept of %ld tokens: %.2f us\n", static_cast<long>(tokens), keep_us);
  }
}

void bench_small_products(cudaStream_t stream, double copy) {
  struct Matrix {
    const char* name;
    int64_t in, out;
  };
  for (const Matrix m : {Matrix{"gate, BF16 to FP32", 4096, 256},
                         {"CSA compressor, kv and gate", 4096, 2048},
                         {"HCA compressor, kv and gate", 4096, 1024},
                         {"head", 4096, 129280}}) {
    const int64_t slabs = m.in / 64, w_groups = m.out / 8;
    const auto w_bytes = static_cast<size_t>(m.in * m.out * 2);
    const int sets = static_cast<int>(std::max<size_t>(1, (size_t{512} << 20) / w_bytes));
    auto* w = bf16(w_bytes / 2 * static_cast<size_t>(sets), 1, stream);
    for (const int64_t rows : {1, 8, 64, 4096}) {
      if (rows == 4096 && m.out > 4096) continue;
      const int64_t x_groups = (rows + 7) / 8;
      auto* x = bf16(static_cast<size_t>(rows * m.in), 2, stream);
      auto* operand = allocate<uint8_t>(static_cast<size_t>(x_groups * 8 * m.in * 2));
      auto* y = allocate<float>(static_cast<size_t>(rows * m.out));
      const double pack_us = microseconds(kCalls, stream, [&] {
        for (int i = 0; i < kCalls; ++i)
          bf16_operand_sm90({x, rows, m.in, m.in, operand, x_groups}, stream);
      });
      const double us = microseconds(sets, stream, [&] {
        for (int i = 0; i < sets; ++i) {
          linear_bf16_sm90({operand,
                            reinterpret_cast<uint8_t*>(w) + static_cast<size_t>(i) * w_bytes,
                            x_groups,
                            w_groups,
                            nullptr,
                            nullptr,
                            rows,
                            m.out,
                            slabs,
                            {y, m.out, ElementType::kF32}},
                           stream);
        }
      });
      print(m.name, rows, us, static_cast<double>(w_bytes), copy);
      std::printf("    %.1f TFLOP/s; operand %.2f us\n",
                  2.0 * static_cast<double>(rows * m.in * m.out) / us / 1e6, pack_us);
      cudaFree(x);
      cudaFree(operand);
      cudaFree(y);
    }
    cudaFree(w);
  }
}

/// The grouped output projection: 8 groups of 4,096 to 1,024.
void bench_widened(cudaStream_t stream, double copy) {
  constexpr int64_t kGroups = 8, kIn = 4096, kOut = 1024;
  constexpr size_t kBytes = kGroups * kIn * kOut;
  constexpr int kSets = 16;
  auto* w = reinterpret_cast<uint8_t*>(bf16(kBytes * kSets / 2, 1, stream));
  auto* scales = allocate<float>(kGroups * kIn / 128 * kOut / 128);
  const std::vector<float> ones(kGroups * kIn / 128 * kOut / 128, 1.0f);
  cudaMemcpy(scales, ones.data(), ones.size() * 4, cudaMemcpyHostToDevice);
  for (const int64_t rows : {1, 8, 64, 4096}) {
    const int64_t x_groups = (rows + 7) / 8;
    auto* x = reinterpret_cast<uint8_t*>(
        bf16(static_cast<size_t>(x_groups * 8 * kGroups * kIn), 2, stream));
    auto* y = allocate<uint16_t>(static_cast<size_t>(rows * kGroups * kOut));
    const double us = microseconds(kSets, stream, [&] {
      for (int i = 0; i < kSets; ++i) {
        widened_sm90({x, x_groups, w + static_cast<size_t>(i) * kBytes, scales, rows, kGroups, kOut,
                      kIn / 128, y, kGroups * kOut},
                     stream);
      }
    });
    print("wo_a, E4M3 widened", rows, us, static_cast<double>(kBytes), copy);
    std::printf("    %.1f TFLOP/s\n", 2.0 * static_cast<double>(rows) * kBytes / us / 1e6);
    cudaFree(x);
    cudaFree(y);
  }
  cudaFree(w);
}

void bench_gate(cudaStream_t stream, double copy) {
  for (const int64_t tokens : {1, 64, 4096}) {
    auto* z = logits(static_cast<size_t>(tokens * 256), 1, stream);
    auto* bias = logits(256, 2, stream);
    auto* experts = allocate<int32_t>(static_cast<size_t>(tokens * 6));
    auto* weights = allocate<float>(static_cast<size_t>(tokens * 6));
    const double us = microseconds(kCalls, stream, [&] {
      for (int i = 0; i < kCalls; ++i)
        gate_sm90({z, bias, nullptr, nullptr, experts, weights, tokens, 256, 6, 1.5f}, stream);
    });
    print("choice of 6 experts of 256", tokens, us, static_cast<double>(tokens * 1024), copy);
  }
}

void bench_sampling(cudaStream_t stream, double copy) {
  constexpr int64_t kVocab = 129280;
  for (const int64_t rows : {1, 8, 64}) {
    auto* z = logits(static_cast<size_t>(rows * kVocab), 1, stream);
    auto* tokens = allocate<int32_t>(static_cast<size_t>(rows * 5));
    auto* logprobs = allocate<double>(static_cast<size_t>(rows * 5));
    auto* picked_logprob = allocate<double>(static_cast<size_t>(rows));
    struct Case {
      const char* name;
      double temperature, top_p;
      int32_t top_k;
    };
    for (const Case c : {Case{"largest logit", 0, 1, 0},
                         {"draw, temperature 1", 1, 1, 0},
                         {"draw, top-p 0.95", 1, 0.95, 0},
                         {"draw, top-k 50", 1, 1, 50}}) {
      std::vector<SamplingRowSm90> settings(static_cast<size_t>(rows));
      for (size_t r = 0; r < settings.size(); ++r) {
        settings[r].temperature = c.temperature;
        settings[r].least = -INFINITY;
        settings[r].top_p = c.top_p;
        settings[r].top_k = c.top_k;
        settings[r].seed = r;
      }
      auto* there = on_device(settings);
      const double us = microseconds(kCalls, stream, [&] {
        for (int i = 0; i < kCalls; ++i)
          sample_sm90({z, there, nullptr, nullptr, nullptr, tokens, rows, kVocab, kVocab, 0},
                      stream);
      });
      print(c.name, rows, us, static_cast<double>(rows * kVocab * 4), copy);
    }
    for (const int64_t count : {0, 5}) {
      const double us = microseconds(kCalls, stream, [&] {
        for (int i = 0; i < kCalls; ++i)
          log_probs_sm90(
              {z, nullptr, nullptr, tokens, logprobs, picked_logprob, rows, kVocab, kVocab, count},
              stream);
      });
      print(count == 0 ? "log-sum-exp" : "log-sum-exp, five likeliest", rows, us,
            static_cast<double>(rows * kVocab * 4), copy);
    }
    cudaFree(z);
  }
}

}  // namespace

void bench_forward(cudaStream_t stream, double copy) {
  bench_gate(stream, copy);
  bench_cache_rows(stream, copy);
  bench_compressor(stream, copy);
  bench_small_products(stream, copy);
  bench_widened(stream, copy);
  bench_sampling(stream, copy);
}

}  // namespace hadal::ops
