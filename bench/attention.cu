// Times of sparse attention at V4's shapes: decode with lists of CSA and HCA, prefill.
#include <cstdint>
#include <random>

#include "kernels.cuh"
#include "ops/attention/sparse_attn_sm90.h"

namespace hadal::ops {
namespace {

/// Latents: E4M3 codes of moderate size, BF16 rotary channels, scales close together; or BF16
/// alone.
/// rounded: channels in E4M3.
__global__ void fill_latents(uint8_t* rows, int64_t count, int64_t row_bytes, int64_t rounded) {
  const int64_t bytes = count * row_bytes;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < bytes;
       i += int64_t{gridDim.x} * blockDim.x) {
    const auto random = mix(static_cast<uint64_t>(i), 7);
    const int64_t at = i % row_bytes;
    uint32_t byte = (random & 0xbf) | 0x20;
    if (at >= rounded) byte = at % 2 == 1 ? (random & 0x80) | 0x3e : random & 0xff;
    if (rounded > 0 && at >= rounded + 2 * kAttnRotary) byte = 120 + random % 3;
    rows[i] = static_cast<uint8_t>(byte);
  }
}

struct Case {
  const char* name;
  int64_t tokens, heads, window, blocks;
  int64_t rows;  ///< compressed rows that the lists choose among, each token's own or shared
  bool prefill;
  int64_t width = kLatentDim;
  AttnRows format = AttnRows::kPacked;
};

/// The same over rows that were widened before, widening included.
void bench_wide(cudaStream_t stream,
                SparseAttnSm90Params p,
                int64_t window_rows,
                int64_t block_rows,
                double flop) {
  auto* wide_window = allocate<uint16_t>(static_cast<size_t>(window_rows * kLatentDim));
  auto* wide_blocks = allocate<uint16_t>(static_cast<size_t>(block_rows * kLatentDim + 8));
  p.wide_window = wide_window, p.wide_blocks = wide_blocks;
  double us[2];
  for (int part = 0; part < 2; ++part) {
    us[part] = microseconds(2, stream, [&] {
      for (int i = 0; i < 2; ++i) {
        widen_latents_sm90({p.window, nullptr, wide_window, window_rows}, stream);
        widen_latents_sm90({p.blocks, nullptr, wide_blocks, block_rows}, stream);
        if (part == 0) sparse_attn_sm90(p, stream, SparseAttnKernel::kMany);
      }
    });
  }
  std::printf("    rows widened before: %9.2f us  %6.1f TFLOP/s, of which widening %.2f us\n",
              us[0], flop / us[0] / 1e6, us[1]);
  std::fflush(stdout);
  cudaFree(wide_window);
  cudaFree(wide_blocks);
}

const char* name_of(SparseAttnKernel kernel) {
  if (kernel == SparseAttnKernel::kFew) return "few ";
  if (kernel == SparseAttnKernel::kFewWide) return "wide";
  return kernel == SparseAttnKernel::kMany ? "many" : "any ";
}

void bench_case(cudaStream_t stream, double copy, const Case& c) {
  const int64_t window_rows = c.prefill ? c.tokens + c.window : c.tokens * c.window;
  const int64_t block_rows = c.prefill ? c.rows : c.rows * c.tokens;
  std::mt19937 random(1);
  std::vector<int32_t> window, blocks;
  for (int64_t t = 0; t < c.tokens; ++t) {
    for (int64_t i = 0; i < c.window; ++i)
      window.push_back(static_cast<int32_t>(c.prefill ? t + i : t * c.window + i));
    // Ascending choices, about evenly spread.
    for (int64_t i = 0; i < c.blocks; ++i) {
      const int64_t step = c.rows / c.blocks;
      blocks.push_back(
          static_cast<int32_t>((c.prefill ? 0 : t * c.rows) + i * step +
                               static_cast<int64_t>(random() % static_cast<unsigned>(step))));
    }
  }
  const int64_t row_bytes = attn_row_bytes(c.width, c.format);
  const int64_t rounded = c.format == AttnRows::kPacked ? c.width - kAttnRotary : 0;
  auto* window_memory = allocate<uint8_t>(static_cast<size_t>(window_rows * row_bytes));
  auto* block_memory = allocate<uint8_t>(static_cast<size_t>(block_rows * row_bytes + 1));
  fill_latents<<<1024, 256, 0, stream>>>(window_memory, window_rows, row_bytes, rounded);
  fill_latents<<<1024, 256, 0, stream>>>(block_memory, block_rows, row_bytes, rounded);
  const auto values = static_cast<size_t>(c.tokens * c.heads * c.width);
  auto* q = allocate<uint16_t>(values);
  fill_bf16<<<1024, 256, 0, stream>>>(q, values, 3);
  auto* out = allocate<uint16_t>(values);
  auto* sink = allocate<float>(static_cast<size_t>(c.heads));
  cudaMemset(sink, 0, static_cast<size_t>(c.heads) * 4);
  SparseAttnSm90Params p = {.q = q,
                            .sink = sink,
                            .window = window_memory,
                            .blocks = block_memory,
                            .window_row = on_device(window),
                            .block_row = on_device(blocks),
                            .num_blocks = nullptr,
                            .tokens = c.tokens,
                            .heads = c.heads,
                            .window_places = c.window,
                            .block_places = c.blocks,
                            .scale = 0.044194173824159216f,
                            .out = out,
                            .stats = nullptr,
                            .scratch = nullptr,
                            .wide_window = nullptr,
                            .wide_blocks = nullptr,
                            .width = c.width,
                            .format = c.format};
  const bool whole = serves_whole_tiles(p);
  p.scratch = allocate<float>(static_cast<size_t>(
      sparse_attn_scratch_floats(p, whole ? SparseAttnKernel::kFew : SparseAttnKernel::kAny) + 1));
  const double keys = static_cast<double>(c.tokens * (c.window + c.blocks));
  const double bytes = keys * static_cast<double>(row_bytes),
               flop = keys * static_cast<double>(c.heads * c.width) * 4.0;
  for (const SparseAttnKernel kernel : {SparseAttnKernel::kFew, SparseAttnKernel::kFewWide,
                                        SparseAttnKernel::kMany, SparseAttnKernel::kAny}) {
    const bool few = kernel == SparseAttnKernel::kFew || kernel == SparseAttnKernel::kFewWide;
    if (few && (c.prefill || c.format != AttnRows::kPacked)) continue;
    if (kernel != SparseAttnKernel::kAny && !whole) continue;
    const int calls = c.prefill ? 2 : 20;
    const double us = microseconds(calls, stream, [&] {
      for (int i = 0; i < calls; ++i) sparse_attn_sm90(p, stream, kernel);
    });
    std::printf(
        "attention %-16s heads %3ld of %3ld tokens %4ld keys %4ld %s %9.2f us  %6.1f TFLOP/s  "
        "%5.2f TB/s "
        "of rows (%2.0f %% of copy)\n",
        c.name, static_cast<long>(c.heads), static_cast<long>(c.width), static_cast<long>(c.tokens),
        static_cast<long>(c.window + c.blocks), name_of(kernel), us, flop / us / 1e6,
        bytes / us / 1e6, bytes / us / 1e4 / copy);
    std::fflush(stdout);
  }
  if (c.prefill && whole && c.format == AttnRows::kPacked)
    bench_wide(stream, p, window_rows, c.blocks > 0 ? block_rows : 0, flop);
  for (void* memory :
       {static_cast<void*>(window_memory), static_cast<void*>(block_memory), static_cast<void*>(q),
        static_cast<void*>(out), static_cast<void*>(sink), static_cast<void*>(p.scratch),
        const_cast<void*>(static_cast<const void*>(p.window_row)),
        const_cast<void*>(static_cast<const void*>(p.block_row))})
    cudaFree(memory);
}

}  // namespace

void bench_attention(cudaStream_t stream, double copy, bool prefill) {
  for (const int64_t tokens : {1, 8, 16, 32, 64, 128}) {
    if (prefill) break;
    bench_case(stream, copy, {"CSA", tokens, 64, 128, 512, 32768, false});
    bench_case(stream, copy, {"HCA at 128K", tokens, 64, 128, 1024, 1024, false});
    if (tokens <= 64) bench_case(stream, copy, {"HCA at 1M", tokens, 64, 128, 8192, 8192, false});
    bench_case(stream, copy, {"CSA of Pro", tokens, 128, 128, 1024, 32768, false});
  }
  bench_case(stream, copy, {"prefill window", 4096, 64, 128, 0, 1, true});
  bench_case(stream, copy, {"prefill CSA 8K", 4096, 64, 128, 512, 2048, true});
  bench_case(stream, copy, {"prefill CSA 1M", 4096, 64, 128, 512, 262144, true});
  bench_case(stream, copy, {"prefill HCA 1M", 1024, 64, 128, 8192, 8192, true});
  bench_case(stream, copy, {"prefill CSA Pro", 4096, 128, 128, 1024, 32768, true});
}

void bench_attention_any(cudaStream_t stream, double copy) {
  for (const AttnRows format : {AttnRows::kPacked, AttnRows::kBf16}) {
    const char* name = format == AttnRows::kPacked ? "packed" : "BF16";
    for (const int64_t tokens : {1, 8, 64})
      bench_case(stream, copy, {name, tokens, 6, 128, 384, 1024, false, 128, format});
    bench_case(stream, copy, {name, 4096, 6, 128, 384, 1024, true, 128, format});
    bench_case(stream, copy, {name, 4096, 6, 128, 0, 1, true, 128, format});
    bench_case(stream, copy, {name, 1, 4, 64, 128, 1024, false, 256, format});
    bench_case(stream, copy, {name, 1024, 64, 128, 512, 2048, true, 512, format});
  }
}

}  // namespace hadal::ops
