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

at::Tensor Parameter::operand(ops::Numerics numerics) const {
  HADAL_CHECK(value.defined(), "parameter ", name, " has no value");
  if (numerics == ops::Numerics::kIdeal || storage == Storage::kF32) return value;
  if (value.scalar_type() == at::kBFloat16) return value;
  if (numerics == ops::Numerics::kBf16) return value.to(at::kBFloat16);
  return ops::straight_through(official_rounding(value.detach(), storage), value);
}

const ops::Panels* Parameter::panels() const {
  const bool fixed = !value.requires_grad() && value.is_cpu() &&
                     (value.scalar_type() == at::kBFloat16 || value.scalar_type() == at::kFloat);
  if (!fixed) return nullptr;
  if (!packed || !packed_value.is_same(value)) {
    const at::Tensor matrices = units > 1 && kind == ParamKind::kGroups
                                    ? value.reshape({units, -1, value.size(-1)})
                                    : value;
    packed = std::make_shared<ops::Panels>(ops::pack_panels(matrices));
    packed_value = value;
  }
  return packed.get();
}

at::Tensor apply_linear(const Parameter& w, const at::Tensor& x, ops::Numerics numerics) {
  const at::Tensor operand = w.operand(numerics);
  // Packed panels hold the values themselves; a master that is rounded on the way is packed anew.
  return ops::linear(x, operand, w.role, operand.is_same(w.value) ? w.panels() : nullptr);
}

}  // namespace hadal::model
