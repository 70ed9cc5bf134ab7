// A matrix of the model, or a stack of them, in one of the forms in which products read it.
//
//   dense   FP64, FP32 or BF16 values, [out, in] or [matrices, out, in]: training, references, and
//           what a device's library multiplies
//   panels  FP32, BF16, FP8 or FP4 for the CPU's matrix kernel (panels.h)
//   sm90    FP8 or FP4 with scales, or BF16, as the Hopper kernels read them (sm90_matrices.h)
//
// All forms hold values exactly, and a product's bits do not depend on the form on the CPU; on a
// GPU sm90 alone has the bits of hopper_twin.h, others those of the device's library. Panels
// and sm90 are constants. Weights are cheap to copy: copies share memory.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <variant>

#include <ATen/core/Tensor.h>

#include "ops/gemm/linear.h"
#include "ops/gemm/panels.h"
#include "ops/gemm/sm90_matrices.h"

namespace hadal::ops {

enum class WeightForm { kNone, kDense, kPanels, kSm90 };

/// The panels of dense values that many products read: made at the first call, and again once the
/// values are another tensor or were written to since (a write through a data pointer, or to a
/// tensor made in inference mode, is not noticed). From any thread.
class PanelCache {
 public:
  PanelCache();
  /// Of values [.., in], FP32 or BF16 on the CPU, as `matrices` matrices stacked along the first
  /// dimension.
  std::shared_ptr<const Panels> of(const at::Tensor& values, int64_t matrices);
  /// Bytes of the panels that it holds now.
  int64_t num_bytes() const;

 private:
  mutable std::mutex mutex_;
  std::shared_ptr<const Panels> panels_;
  c10::weak_intrusive_ptr<c10::TensorImpl> source_;  ///< does not keep replaced values alive
  uint32_t version_ = 0;
};

class Weight {
 public:
  Weight() = default;
  /// Dense values, [out, in] or [matrices, out, in].
  explicit Weight(at::Tensor values);
  /// Dense constants whose panels are kept: values [.., in] seen as matrices along the first
  /// dimension.
  Weight(const at::Tensor& values, int64_t matrices, std::shared_ptr<PanelCache> cache);
  explicit Weight(Panels panels);
  explicit Weight(Sm90Matrices matrices);

  WeightForm form() const { return static_cast<WeightForm>(storage_.index()); }
  bool defined() const { return form() != WeightForm::kNone; }
  int64_t matrices() const;
  int64_t out() const;
  int64_t in() const;
  at::Device device() const;
  /// Of the form; kept panels of dense values are their cache's.
  int64_t num_bytes() const;

  /// Error unless it has this form.
  const at::Tensor& dense() const;  ///< [out, in] or [matrices, out, in]
  const Panels& panels() const;
  const Sm90Matrices& sm90() const;
  /// Panels for the CPU kernel: its own, or the kept ones of dense constants; else null.
  std::shared_ptr<const Panels> kernel_panels() const;

  /// The values of one matrix, [out, in], on the weight's device, and of all, [matrices, out, in]:
  /// dense ones as they are, those of panels FP32 or BF16, those of sm90 BF16. FP8 panels whose
  /// scales are no powers of two have no exact values: theirs are rounded to FP32.
  at::Tensor values(int64_t matrix) const;
  at::Tensor values() const;

  /// The same values in another form, exactly (as values() where panels have FP32 scales).
  Weight to_dense() const;
  /// Error unless the values are FP32 or BF16 on the CPU; sm90 becomes BF16 panels.
  Weight to_panels() const;
  /// Of FP8, FP4 and BF16 panels, whatever `storage` says; of dense values on the CPU that lie on
  /// the grid of `storage`, kFp8 or kFp4, or are BF16 (kBf16). nullopt where the values have no
  /// exact form. `role` is that of the products: FP8 whose rows are BF16 (kBf16) is laid out to be
  /// widened, and experts (kFp4) have a kernel for FP4 alone.
  std::optional<Weight> to_sm90(OfficialStorage storage, GemmRole role = GemmRole::kFp8) const;
  /// On another device. Panels are for the CPU alone: elsewhere FP8, FP4 and BF16 become sm90
  /// without being made dense, and FP32 dense (what sm90 has no form for, too; of FP8 and FP4 a
  /// warning says so).
  Weight to(at::Device device, GemmRole role = GemmRole::kFp8) const;

 private:
  struct Dense {
    at::Tensor values;                  ///< [out, in] or [matrices, out, in]
    at::Tensor source;                  ///< what the cache goes by
    std::shared_ptr<PanelCache> cache;  ///< or null
  };
  std::variant<std::monostate,
               Dense,
               std::shared_ptr<const Panels>,
               std::shared_ptr<const Sm90Matrices>>
      storage_;  ///< in the order of WeightForm
};

/// The products of linear.h; x and w lie on one device. On a GPU the Hopper kernels read sm90
/// (sm90_products.h): there FP8 that is not to be widened and FP4 take rows that went through
/// quantise_input in `released`. What they do not do (FP32 rows, gradients of x, FP8 experts, other
/// widths) and the CPU make its matrices dense one by one for the call (those of experts without
/// rows are not, for which the offsets are read on the host); a warning says so once. Panels are
/// made dense for what their kernel does not do (FP64, gradients of x).
at::Tensor linear(const at::Tensor& x, const Weight& w, GemmRole role);
at::Tensor grouped_linear(const at::Tensor& x,
                          const Weight& w,
                          const at::Tensor& offsets,
                          GemmRole role);
at::Tensor group_linear(const at::Tensor& x, const Weight& w);

}  // namespace hadal::ops
