#include "model/parameter.h"

#include <ATen/ATen.h>

#include "base/check.h"
#include "ops/quant/round_trip.h"

namespace hadal::model {
namespace {

/// Rounds each 128x128 block of [rows, in] to E4M3 with one power-of-two scale: the blocks' rows
/// are laid out as one group of 16384 for the round trip that activations use.
at::Tensor fp8_blocks(const at::Tensor& w) {
  const int64_t out = w.size(0), in = w.size(1);
  const int64_t out_blocks = (out + 127) / 128, in_blocks = (in + 127) / 128;
  const at::Tensor padded =
      at::constant_pad_nd(w, {0, in_blocks * 128 - in, 0, out_blocks * 128 - out});
  const at::Tensor blocks = padded.reshape({out_blocks, 128, in_blocks, 128})
                                .permute({0, 2, 1, 3})
                                .reshape({-1, 128 * 128});
  return ops::fp8_round_trip(blocks, 128 * 128)
      .reshape({out_blocks, in_blocks, 128, 128})
      .permute({0, 2, 1, 3})
      .reshape({out_blocks * 128, in_blocks * 128})
      .narrow(0, 0, out)
      .narrow(1, 0, in)
      .contiguous();
}

}  // namespace

at::Tensor official_rounding(const at::Tensor& w, Storage storage) {
  switch (storage) {
    case Storage::kFp4:
      return ops::fp4_round_trip(w, 32).to(at::kBFloat16);
    case Storage::kFp8: {
      const at::Tensor flat = w.reshape({-1, w.size(-1)});
      return fp8_blocks(flat).reshape(w.sizes()).to(at::kBFloat16);
    }
    default:
      return w.to(at::kBFloat16);
  }
}

void Parameter::hold_packed(ops::Panels panels) {
  const int64_t stacked = kind == ParamKind::kMatrix || kind == ParamKind::kHead ? 1 : units;
  HADAL_CHECK(panels.matrices == stacked && panels.in == shape.back(), "parameter ", name, ": ",
              panels.matrices, " packed matrices of ", panels.in, " inputs");
  packed = std::make_shared<const ops::Panels>(std::move(panels));
  value = packed_value = at::Tensor();
}

void Parameter::hold_dense() {
  if (value.defined() || !packed) return;
  value = ops::unpack_panels(*packed).reshape(shape);
  packed.reset();
}

at::Tensor Parameter::operand(ops::Numerics numerics) const {
  if (!value.defined() && packed) return ops::unpack_panels(*packed).reshape(shape);
  HADAL_CHECK(value.defined(), "parameter ", name, " has no value");
  if (numerics == ops::Numerics::kIdeal || storage == Storage::kF32 || as_stored) return value;
  if (value.scalar_type() == at::kBFloat16) return value;
  if (numerics == ops::Numerics::kBf16) return value.to(at::kBFloat16);
  return ops::straight_through(official_rounding(value.detach(), storage), value);
}

const ops::Panels* Parameter::panels(const at::Tensor& x, ops::Numerics numerics) const {
  if (!ops::serves_panels(x)) return nullptr;
  if (!value.defined()) return packed.get();
  const bool as_it_is = numerics == ops::Numerics::kIdeal || storage == Storage::kF32 ||
                        as_stored || value.scalar_type() == at::kBFloat16;
  const bool fixed = !value.requires_grad() && value.is_cpu() &&
                     (value.scalar_type() == at::kBFloat16 || value.scalar_type() == at::kFloat);
  if (!as_it_is || !fixed) return nullptr;
  if (!packed || !packed_value.is_same(value)) {
    const at::Tensor matrices =
        kind == ParamKind::kGroups ? value.reshape({units, -1, value.size(-1)}) : value;
    packed = std::make_shared<const ops::Panels>(ops::pack_panels(matrices));
    packed_value = value;
  }
  return packed.get();
}

at::Tensor apply_linear(const Parameter& w, const at::Tensor& x, ops::Numerics numerics) {
  if (const ops::Panels* panels = w.panels(x, numerics)) return ops::linear(x, *panels, w.role);
  return ops::linear(x, w.operand(numerics), w.role);
}

at::Tensor apply_experts(const Parameter& w,
                         const at::Tensor& x,
                         const at::Tensor& offsets,
                         ops::Numerics numerics) {
  if (const ops::Panels* panels = w.panels(x, numerics))
    return ops::grouped_linear(x, *panels, offsets, w.role);
  return ops::grouped_linear(x, w.operand(numerics), offsets, w.role);
}

at::Tensor apply_groups(const Parameter& w, const at::Tensor& x, ops::Numerics numerics) {
  if (const ops::Panels* panels = w.panels(x, numerics)) return ops::group_linear(x, *panels);
  return ops::group_linear(x, w.operand(numerics).reshape({x.size(1), -1, x.size(2)}));
}

}  // namespace hadal::model
