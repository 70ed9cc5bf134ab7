#include "train/stochastic_rounding.h"

#include <algorithm>
#include <bit>

#include <ATen/ATen.h>

#include "base/check.h"
#include "base/parallel.h"
#include "base/philox.h"

namespace hadal::train {
namespace {

constexpr uint32_t kExponent = 0x7f800000u;

uint16_t round_by(float value, uint32_t random) {
  const auto bits = std::bit_cast<uint32_t>(value);
  // A NaN whose upper half has no bit of its own would become infinity.
  if ((bits & kExponent) == kExponent)
    return static_cast<uint16_t>(bits >> 16 | ((bits & 0x007fffffu) != 0 ? 0x40u : 0u));
  const uint32_t up = bits + (random & 0xffffu);
  return static_cast<uint16_t>(((up & kExponent) == kExponent ? bits : up) >> 16);
}

}  // namespace

at::Tensor stochastic_bf16(const at::Tensor& values, const RoundingKey& key) {
  HADAL_CHECK(values.is_cpu() && values.scalar_type() == at::kFloat && values.dim() == 1,
              "stochastic_bf16: values are ", values.scalar_type(), " ", values.sizes());
  HADAL_CHECK(key.node >= 0 && key.node < int64_t{1} << 24 && key.element >= 0 &&
                  key.element + values.numel() <= int64_t{1} << 42,
              "stochastic_bf16: row ", key.node, ", element ", key.element);
  const at::Tensor dense = values.contiguous();
  at::Tensor result = at::empty(dense.sizes(), dense.options().dtype(at::kBFloat16));
  const float* from = dense.const_data_ptr<float>();
  auto* to = reinterpret_cast<uint16_t*>(result.mutable_data_ptr<at::BFloat16>());
  const Philox philox(key.seed, static_cast<uint64_t>(key.step));
  constexpr int64_t kDraws = 8;  // of a block, two of each word
  const int64_t end = key.element + dense.numel();
  const int64_t first = key.element / kDraws, blocks = (end + kDraws - 1) / kDraws - first;
  parallel_for(blocks, 4096, [&](int64_t begin, int64_t last) {
    for (int64_t block = first + begin; block < first + last; ++block) {
      const auto words =
          philox.block(static_cast<uint64_t>(key.node) << 40 | static_cast<uint64_t>(block));
      const int64_t begin_element = std::max(key.element, block * kDraws);
      const int64_t end_element = std::min(end, (block + 1) * kDraws);
      for (int64_t element = begin_element; element < end_element; ++element) {
        const int64_t draw = element - block * kDraws;
        const uint32_t random = words[static_cast<size_t>(draw / 2)] >> (16 * (draw % 2));
        to[element - key.element] = round_by(from[element - key.element], random);
      }
    }
  });
  return result;
}

}  // namespace hadal::train
