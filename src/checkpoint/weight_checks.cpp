#include "checkpoint/weight_checks.h"

#include <atomic>
#include <cstring>
#include <functional>
#include <iterator>
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

/// What some words showed.
struct Seen {
  uint64_t special = 0, magnitude = 0, different = 0;
};

/// The element at `data` in every lane.
uint64_t first_of(const void* data, const Pattern& pattern) {
  uint64_t first = 0;
  for (size_t at = 0; at < 8; at += static_cast<size_t>(pattern.width / 8))
    std::memcpy(reinterpret_cast<unsigned char*>(&first) + at, data,
                static_cast<size_t>(pattern.width / 8));
  return first;
}

Seen look_at_bytes(const void* data, size_t size, const Pattern& pattern, uint64_t first) {
  const auto* bytes = static_cast<const unsigned char*>(data);
  uint64_t special = 0, magnitude = 0, different = 0;
  const auto take = [&](uint64_t word) {
    special |= ((word & pattern.special) + pattern.carry) & pattern.top;
    magnitude |= word & pattern.magnitude;
    different |= word ^ first;
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
  return {special, magnitude, different};
}

ValueScan told_by(const Seen& seen, int64_t num_elements) {
  return {.finite = seen.special == 0,
          .zero = seen.magnitude == 0,
          .constant = seen.different == 0,
          .num_elements = num_elements};
}

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

Dtype scale_dtype(const at::Tensor& scale) {
  return scale.scalar_type() == at::kByte ? Dtype::kF8E8M0 : dtype_of(scale);
}

enum Finding : uint8_t {
  kNotFinite = 1,
  kZero = 2,
  kConstant = 4,
  kZeroScales = 8,
  kConstantScales = 16,
};

uint8_t findings_of(const TensorSpec& spec,
                    const ValueScan& weight,
                    const std::optional<ValueScan>& scale) {
  constexpr int64_t kManyScales = 64;  // few may well agree by chance
  uint8_t found = weight.finite ? 0 : kNotFinite;
  const bool matrix = spec.shape.size() == 2 && spec.num_elements() >= kManyScales;
  if (matrix && weight.zero)
    found |= kZero;
  else if (matrix && weight.constant)
    found |= kConstant;
  if (!scale) return found;
  if (scale->zero) return found | (weight.zero ? 0 : kZeroScales);
  if (scale->num_elements >= kManyScales && scale->constant && !weight.zero)
    found |= kConstantScales;
  return found;
}

uint8_t look_at(const OfficialCheckpoint& checkpoint,
                const TensorSpec& spec,
                const WeightScans* scans) {
  if (spec.role == TensorRole::kI64) return 0;
  if (scans != nullptr) {
    if (const auto seen = scans->weight(spec.name))
      return findings_of(spec, *seen, scans->scale(spec.name));
  }
  const CheckpointTensor tensor = checkpoint.get(spec.name);
  if (tensor.data.numel() == 0) return 0;
  std::optional<ValueScan> scale;
  if (spec.role == TensorRole::kExpert && tensor.scale.defined())
    scale =
        scan_values(tensor.scale.const_data_ptr(), tensor.scale.numel(), scale_dtype(tensor.scale));
  return findings_of(spec, scan(tensor.data), scale);
}

}  // namespace

ValueScan scan_values(const void* data, int64_t num_elements, Dtype dtype) {
  const Pattern pattern = pattern_of(dtype);
  const auto size = static_cast<size_t>(num_elements * dtype_bytes(dtype));
  if (size == 0) return {};
  return told_by(look_at_bytes(data, size, pattern, first_of(data, pattern)), num_elements);
}

class PieceScan {
 public:
  PieceScan(const at::Tensor& tensor, Dtype dtype)
      : pattern_(pattern_of(dtype)),
        first_(first_of(tensor.const_data_ptr(), pattern_)),
        end_(static_cast<const std::byte*>(tensor.const_data_ptr()) + tensor.nbytes()),
        num_elements_(tensor.numel()) {}

  const std::byte* end() const { return end_; }
  void look(std::span<const std::byte> bytes) {
    const Seen seen = look_at_bytes(bytes.data(), bytes.size(), pattern_, first_);
    special_ |= seen.special;
    magnitude_ |= seen.magnitude;
    different_ |= seen.different;
  }
  ValueScan result() const { return told_by({special_, magnitude_, different_}, num_elements_); }

 private:
  Pattern pattern_;
  uint64_t first_;
  const std::byte* end_;
  int64_t num_elements_;
  std::atomic<uint64_t> special_{0}, magnitude_{0}, different_{0};
};

WeightScans::WeightScans() = default;
WeightScans::~WeightScans() = default;

void WeightScans::expect(const std::string& name, const CheckpointTensor& weight) {
  const auto add = [&](const at::Tensor& tensor, Dtype dtype) {
    const auto* begin = static_cast<const std::byte*>(tensor.const_data_ptr());
    auto& entry = tensors_[begin];
    if (entry == nullptr) entry = std::make_unique<PieceScan>(tensor, dtype);
    return entry.get();
  };
  if (weight.data.numel() == 0) return;
  weights_[name] = add(weight.data, dtype_of(weight.data));
  if (weight.scale.defined() && weight.scale.numel() > 0)
    scales_[name] = add(weight.scale, scale_dtype(weight.scale));
}

void WeightScans::look(const std::byte* from, std::span<const std::byte> bytes) {
  auto next = tensors_.upper_bound(from);
  if (next == tensors_.begin()) return;
  PieceScan& scan = *std::prev(next)->second;
  if (std::less<>()(from, scan.end())) scan.look(bytes);
}

std::optional<ValueScan> WeightScans::weight(const std::string& name) const {
  const auto found = weights_.find(name);
  if (found == weights_.end()) return std::nullopt;
  return found->second->result();
}

std::optional<ValueScan> WeightScans::scale(const std::string& name) const {
  const auto found = scales_.find(name);
  if (found == scales_.end()) return std::nullopt;
  return found->second->result();
}

void check_weights(const OfficialCheckpoint& checkpoint, const WeightScans* scans) {
  const std::vector<TensorSpec> table = tensor_table(checkpoint.config());
  std::vector<uint8_t> findings(table.size());
  parallel_for(static_cast<int64_t>(table.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      findings[static_cast<size_t>(i)] = look_at(checkpoint, table[static_cast<size_t>(i)], scans);
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
