// Partial interleaved rotary embedding and its tables (model.md 5).
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include <ATen/core/Tensor.h>

namespace hadal::ops {

/// YaRN interpolation of the rotary frequencies; static, and without a magnitude factor.
struct YarnParams {
  double factor = 16.0;
  double beta_fast = 32.0;
  double beta_slow = 1.0;
  int64_t original_seq_len = 65536;
};

/// cos and sin of fl32(fl32(p) * f_i), one table per rotary base; shared by queries, keys and the
/// inverse rotation. Angles are rounded to FP32 before cos and sin, which are then correct to the
/// last FP32 bit on every machine.
class RopeTable {
 public:
  /// rope_dim even; `yarn` null for layers with ratio 0.
  RopeTable(int64_t rope_dim, double base, const YarnParams* yarn);

  /// f_i, [rope_dim / 2] FP32.
  const std::vector<float>& frequencies() const { return frequencies_; }

  /// [n, rope_dim / 2, 2] FP32 (cos, sin) for the positions `pos` ([n] I64, all <= max_pos), on
  /// pos's device.
  at::Tensor cos_sin(const at::Tensor& pos, int64_t max_pos) const;

 private:
  at::Tensor compute(const at::Tensor& pos) const;

  std::vector<float> frequencies_;
  struct Cache {
    std::mutex mutex;
    std::vector<at::Tensor> tables;  // of the first positions, per device
  };
  std::unique_ptr<Cache> cache_ = std::make_unique<Cache>();
};

/// Rotates the last rope_dim channels of every vector, adjacent pairs; FP32 inside, one rounding.
///   x        [tokens, ..., dim]
///   cos_sin  [tokens, rope_dim / 2, 2] FP32
///   inverse  negates sin
at::Tensor rope(const at::Tensor& x, const at::Tensor& cos_sin, bool inverse = false);

namespace reference {
at::Tensor rope(const at::Tensor& x, const at::Tensor& cos_sin, bool inverse);
}  // namespace reference

}  // namespace hadal::ops
