#include "ops/attention/rope_cpu.h"

#include "ops/cpu/isa.h"
#include "ops/cpu/vec.h"

namespace hadal::ops {
namespace {

namespace cpu = ops::cpu::HADAL_ISA;

float read(const float* p) { return *p; }
float read(const uint16_t* p) { return cpu::bf16_to_float(*p); }
void write(float* p, float x) { *p = x; }
void write(uint16_t* p, float x) { *p = cpu::float_to_bf16(x); }

/// Not vectorised by the compiler: g++ turns this pattern into fused multiply-add-subtract on AVX
/// even with -ffp-contract=off, and the bits would differ from the portable build.
template <typename T>
__attribute__((optimize("no-tree-vectorize", "no-tree-slp-vectorize"))) void rotate_tokens(
    const RopeCpuParams& p, int64_t begin, int64_t end) {
  const int64_t plain = p.dim - p.rope_dim;
  for (int64_t token = begin; token < end; ++token) {
    const float* table = p.cos_sin + token * p.rope_dim;
    for (int64_t head = 0; head < p.heads; ++head) {
      const int64_t offset = (token * p.heads + head) * p.dim;
      const T* x = static_cast<const T*>(p.x) + offset;
      T* out = static_cast<T*>(p.out) + offset;
      std::memcpy(out, x, static_cast<size_t>(plain) * sizeof(T));
      // even * cos - odd * sin, even * sin + odd * cos: products and their sum are rounded one by
      // one.
      for (int64_t i = 0; i < p.rope_dim; i += 2) {
        const float cos = table[i], sin = p.inverse ? -table[i + 1] : table[i + 1];
        const float even = read(x + plain + i), odd = read(x + plain + i + 1);
        write(out + plain + i, even * cos - odd * sin);
        write(out + plain + i + 1, even * sin + odd * cos);
      }
    }
  }
}

void rope_tokens(const RopeCpuParams& p, int64_t begin, int64_t end) {
  if (p.dtype == ElementType::kF32) {
    rotate_tokens<float>(p, begin, end);
  } else {
    rotate_tokens<uint16_t>(p, begin, end);
  }
}

const bool filled = rope_cpu.fill(cpu::kIsa, rope_tokens);

}  // namespace
}  // namespace hadal::ops
