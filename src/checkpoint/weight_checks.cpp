#include "checkpoint/weight_checks.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include <ATen/ATen.h>

#include "base/parallel.h"
#include "checkpoint/problems.h"

namespace hadal::checkpoint {
namespace {

/// The bits of one element in every lane of a word.
constexpr uint64_t lanes(uint64_t bits, int width) {
  uint64_t word = 0;
  for (int at = 0; at < 64; at += width) word |= bits << at;
  return word;
}

/// How an element type says "not finite" and "zero": a lane whose `special` bits are all set is not
/// finite (adding `carry` then reaches `top`); a lane without `magnitude` bits is a zero.
struct Pattern {
  int width;  // bits of an element
  uint64_t special, carry, top, magnitude;
};

Pattern pattern_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::kF32:
      return {32, lanes(0x7f800000, 32), lanes(0x00800000, 32), lanes(0x80000000, 32),
              lanes(0x7fffffff, 32)};
    case Dtype::kBf16:
      return {16, lanes(0x7f80, 16), lanes(0x0080, 16), lanes(0x8000, 16), lanes(0x7fff, 16)};
    case Dtype::kF16:
      return {16, lanes(0x7c00, 16), lanes(0x0400, 16), lanes(0x8000, 16), lanes(0x7fff, 16)};
    case Dtype::kF8E4M3:  // no infinity; NaN has all bits but the sign
      return {8, lanes(0x7f, 8), lanes(0x01, 8), lanes(0x80, 8), lanes(0x7f, 8)};
    case Dtype::kI8:
    case Dtype::kU8:  // two FP4 codes, every one of them finite
      return {8, 0, 0, 0, lanes(0x77, 8)};
    case Dtype::kF8E8M0:  // NaN is 255
      return {8, lanes(0x7f, 8), lanes(0x01, 8), 0, lanes(0xff, 8)};
    default:
      return {static_cast<int>(8 * dtype_bytes(dtype)), 0, 0, 0, ~uint64_t{0}};
  }
}

struct Seen {
  uint64_t special = 0, magnitude = 0, different = 0;
};

Dtype dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return Dtype::kF32;
    case at::kBFloat16:
      return Dtype::kBf16;
    case at::kHalf:
      return Dtype::kF16;
    case at::kFloat8_e4m3fn:
      return Dtype::kF8E4M3;
    case at::kLong:
      return Dtype::kI64;
    default:
      return Dtype::kU8;
  }
}

ValueScan scan(const at::Tensor& tensor) {
  return scan_values(tensor.const_data_ptr(), tensor.numel(), dtype_of(tensor));
}

bool all_equal_bytes(const at::Tensor& scale, bool zero) {
  const Dtype dtype = scale.scalar_type() == at::kByte ? Dtype::kF8E8M0 : dtype_of(scale);
  const ValueScan seen = scan_values(scale.const_data_ptr(), scale.numel(), dtype);
  return zero ? seen.zero : seen.constant;
}

enum Finding : uint8_t {
  kNotFinite = 1,
  kZero = 2,
  kConstant = 4,
  kZeroScales = 8,
  kConstantScales = 16,
};

uint8_t look_at(const OfficialCheckpoint& checkpoint, const TensorSpec& spec) {
  constexpr int64_t kManyScales = 64;  // few may well agree by chance
  const CheckpointTensor tensor = checkpoint.get(spec.name);
  if (spec.role == TensorRole::kI64 || tensor.data.numel() == 0) return 0;
  const ValueScan seen = scan(tensor.data);
  uint8_t found = seen.finite ? 0 : kNotFinite;
  const bool matrix = spec.shape.size() == 2 && spec.num_elements() >= kManyScales;
  if (matrix && seen.zero)
    found |= kZero;
  else if (matrix && seen.constant)
    found |= kConstant;
  if (spec.role != TensorRole::kExpert || !tensor.scale.defined()) return found;
  if (all_equal_bytes(tensor.scale, true)) return found | (seen.zero ? 0 : kZeroScales);
  if (tensor.scale.numel() >= kManyScales && all_equal_bytes(tensor.scale, false) && !seen.zero)
    found |= kConstantScales;
  return found;
}

}  // namespace

ValueScan scan_values(const void* data, int64_t num_elements, Dtype dtype) {
  const Pattern pattern = pattern_of(dtype);
  const auto* bytes = static_cast<const unsigned char*>(data);
  const auto size = static_cast<size_t>(num_elements * dtype_bytes(dtype));
  if (size == 0) return {};
  const auto element = static_cast<size_t>(pattern.width / 8);
  uint64_t first = 0;  // the first element in every lane
  for (size_t at = 0; at < 8; at += element)
    std::memcpy(reinterpret_cast<unsigned char*>(&first) + at, bytes, element);
  Seen seen;
  const auto take = [&](uint64_t word) {
    seen.special |= ((word & pattern.special) + pattern.carry) & pattern.top;
    seen.magnitude |= word & pattern.magnitude;
    seen.different |= word ^ first;
  };
  size_t at = 0;
  for (; at + 8 <= size; at += 8) {
    uint64_t word;
    std::memcpy(&word, bytes + at, 8);
    take(word);
  }
  if (at < size) {
    uint64_t word = first;  // the rest of the last word is elements seen before
    std::memcpy(&word, bytes + at, size - at);
    take(word);
  }
  return {
      .finite = seen.special == 0, .zero = seen.magnitude == 0, .constant = seen.different == 0};
}

void check_weights(const OfficialCheckpoint& checkpoint) {
  const std::vector<TensorSpec> table = tensor_table(checkpoint.config());
  std::vector<uint8_t> findings(table.size());
  parallel_for(static_cast<int64_t>(table.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      findings[static_cast<size_t>(i)] = look_at(checkpoint, table[static_cast<size_t>(i)]);
  });
  Problems not_finite, zero, constant, zero_scales, constant_scales;
  for (size_t i = 0; i < table.size(); ++i) {
    const std::string& name = table[i].name;
    if (findings[i] & kNotFinite) not_finite.add(checkpoint.described(name));
    if (findings[i] & kZero) zero.add(checkpoint.described(name));
    if (findings[i] & kConstant) constant.add(checkpoint.described(name));
    if (findings[i] & kZeroScales) zero_scales.add(checkpoint.described_scale(name));
    if (findings[i] & kConstantScales) constant_scales.add(checkpoint.described_scale(name));
  }
  const std::string& path = checkpoint.reader().path();
  not_finite.refuse(path, "tensors hold NaN or infinity");
  zero_scales.refuse(path, "scales of experts are all zero, the weights beside them are not");
  zero.warn(path, "matrices hold nothing but zeros");
  constant.warn(path, "matrices hold one value throughout");
  constant_scales.warn(path, "scales of experts are one value throughout");
}

}  // namespace hadal::checkpoint
