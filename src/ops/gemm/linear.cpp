#include "ops/gemm/linear.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "base/check.h"
#include "base/math.h"
#include "base/parallel.h"
#include "ops/gemm/trained_product.h"
#include "ops/quant/round_trip.h"

namespace hadal::ops {
namespace {

at::ScalarType result_type(const at::Tensor& x, GemmRole role) {
  return role == GemmRole::kFp32 ? compute_type(x) : x.scalar_type();
}

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// Until hadal's own GEMM kernels exist, BF16 training on CUDA uses the library's: BF16 operands,
/// FP32 accumulation.
bool use_library_gemm(const at::Tensor& x, const at::Tensor& w) {
  return x.is_cuda() && !reference_forced() && x.scalar_type() == at::kBFloat16 &&
         w.scalar_type() == at::kBFloat16;
}

/// lin32: BF16 operands, FP32 result (no rounding of the products' sum).
struct LinearFp32 : torch::autograd::Function<LinearFp32> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& w) {
    context->save_for_backward({x, w});
    context->set_materialize_grads(false);
    return at::mm(x, w.t(), at::kFloat);
  }
  static variable_list backward(AutogradContext* context, variable_list grad_outputs) {
    if (!grad_outputs[0].defined()) return variable_list(2);
    const variable_list saved = context->get_saved_variables();
    const at::Tensor grad = grad_outputs[0].to(at::kBFloat16);
    at::Tensor grad_x, grad_w;
    if (context->needs_input_grad(0)) grad_x = at::mm(grad, saved[1]);
    if (context->needs_input_grad(1)) grad_w = at::mm(grad.t(), saved[0]);
    return {grad_x, grad_w};
  }
};

}  // namespace

bool quantises_input(GemmRole role, Numerics numerics) {
  const bool rounds = numerics == Numerics::kReleased || numerics == Numerics::kFp8;
  return rounds && (role == GemmRole::kFp8 || role == GemmRole::kFp4);
}

int64_t slab_length(GemmRole role) { return role == GemmRole::kFp4 ? 32 : 128; }

at::Tensor quantise_input(const at::Tensor& x, GemmRole role, Numerics numerics) {
  return quantises_input(role, numerics) ? fp8_round_trip(x, 128) : x;
}

namespace reference {

at::Tensor linear(const at::Tensor& x, const at::Tensor& w, GemmRole role) {
  const at::ScalarType type = compute_type(x);
  return at::linear(x.to(type), w.to(type)).to(result_type(x, role));
}

at::Tensor grouped_linear(const at::Tensor& x,
                          const at::Tensor& w,
                          const at::Tensor& offsets,
                          GemmRole role) {
  const at::Tensor bounds = offsets.to(at::kCPU);
  std::vector<at::Tensor> parts;
  for (int64_t expert = 0; expert < w.size(0); ++expert) {
    const int64_t begin = bounds[expert].item<int64_t>(), end = bounds[expert + 1].item<int64_t>();
    parts.push_back(reference::linear(x.narrow(0, begin, end - begin), w[expert], role));
  }
  return at::cat(parts);
}

at::Tensor group_linear(const at::Tensor& x, const at::Tensor& w) {
  const at::ScalarType type = compute_type(x);
  return at::einsum("tgi,goi->tgo", {x.to(type), w.to(type)}).to(x.scalar_type());
}

}  // namespace reference

constinit CpuSlot<void(const GemmTask&)> gemm_cpu;
constinit CpuSlot<void(int64_t, WeightFormat, RowForm*)> gemm_row_form_cpu;
constinit CpuSlot<void(const RowPacking&)> pack_rows_cpu;

namespace {

/// Memory for the packed rows of one product at a time, begun at a cache line. A thread keeps up to
/// 16 MiB of it for its next product: new pages cost as much as packing into them.
class Scratch {
 public:
  explicit Scratch(int64_t size) {
    if (size > kept_.size) {
      kept_.data.reset();
      kept_.data.reset(static_cast<char*>(::operator new(static_cast<size_t>(size), kAlign)));
      kept_.size = size;
    }
    data_ = kept_.data.get();
  }
  ~Scratch() {
    if (kept_.size > kMostKept) kept_ = {};
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  /// From any thread.
  char* get() const { return data_; }
  static void release() { kept_ = {}; }

 private:
  static constexpr std::align_val_t kAlign{64};
  static constexpr int64_t kMostKept = int64_t{16} << 20;
  struct Delete {
    void operator()(char* data) const { ::operator delete(data, kAlign); }
  };
  struct Kept {
    std::unique_ptr<char, Delete> data;
    int64_t size = 0;
  };
  static thread_local Kept kept_;
  char* data_;
};

thread_local Scratch::Kept Scratch::kept_;

/// Rows that meet one matrix.
struct Part {
  int64_t matrix, rows;
  const char* x;
  char* y;
};

/// A product as the kernel takes it: parts cut into runs of rows.
class Product {
 public:
  /// x is [.., in] of FP32 for FP32 panels, else BF16, with x_row elements from row to row; y has
  /// y_row.
  Product(const Panels& w, ElementType result, GemmRole role, int64_t x_row, int64_t y_row)
      : w_(w),
        in_(w.padded_in()),
        slab_(slab_length(role)),
        x_row_(x_row),
        y_row_(y_row),
        x_type_(w.format == WeightFormat::kF32 ? ElementType::kF32 : ElementType::kBf16),
        result_(result) {
    HADAL_CHECK(w.format != WeightFormat::kFp4 || slab_ == 32,
                "linear: FP4 weights need the role of routed experts");
  }

  void add(const Part& part) {
    for (int64_t row = 0; row < part.rows; row += kTaskRows) {
      Run run{.matrix = part.matrix,
              .rows = std::min(kTaskRows, part.rows - row),
              .x = part.x + row * x_row_ * size_of(x_type_),
              .y = part.y + row * y_row_ * size_of(result_),
              .x_type = x_type_};
      const RowForm form = row_form(run.rows);
      if (!form.bf16) run.x_type = ElementType::kF32;
      if (run.rows > kFewRows || in_ != w_.in || run.x_type != x_type_ || form.exact) {
        run.packed = packed_bytes_;
        // Tiles are read whole, so the last one may reach beyond the rows.
        const int64_t rows = form.exact ? run.rows + kUnitRows - 1 : run.rows;
        packed_bytes_ += align_up(rows * align_up(in_, slab_) * size_of(run.x_type), int64_t{64});
      }
      if (form.exact && run.packed >= 0) {
        run.exact = packed_bytes_;
        packed_bytes_ +=
            align_up(2 * ceil_div(in_, slab_) * ceil_div(run.rows, kUnitRows), int64_t{64});
      }
      rows_ += run.rows;
      runs_.push_back(run);
    }
  }

  void compute() {
    const Scratch packed(packed_bytes_);
    // Below some 64K products a second thread costs more than it brings.
    const int64_t blocks = w_.blocks(), num_runs = static_cast<int64_t>(runs_.size());
    const int64_t products =
        std::max<int64_t>(1, rows_ * in_ * kBlockWidth / std::max<int64_t>(1, num_runs));
    const int64_t grain = ceil_div(65536, products);
    if (packed_bytes_ > 0) {
      const int64_t pieces = ceil_div(in_, kPackInputs);
      parallel_for(num_runs * pieces, ceil_div(grain, 8), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          pack_rows(runs_[static_cast<size_t>(i / pieces)], i % pieces, packed.get());
      });
    }
    parallel_for(num_runs * blocks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        gemm_cpu(task(runs_[static_cast<size_t>(i / blocks)], i % blocks, packed.get()));
    });
  }

 private:
  struct Run {
    int64_t matrix, rows;
    const char* x;
    char* y;
    ElementType x_type;   ///< as the kernel takes the rows
    int64_t packed = -1;  ///< where its packed rows begin, in bytes; -1: x is read as it lies
    int64_t exact = -1;   ///< where its marks begin; -1: none
  };

  static int64_t size_of(ElementType type) { return type == ElementType::kF32 ? 4 : 2; }
  RowForm row_form(int64_t rows) const {
    RowForm form;
    gemm_row_form_cpu(rows, w_.format, &form);
    return form;
  }

  /// Inputs that one thread packs at a time: a multiple of every slab.
  static constexpr int64_t kPackInputs = 1024;

  void pack_rows(const Run& run, int64_t piece, char* packed) const {
    if (run.packed < 0) return;
    pack_rows_cpu(
        {.x = run.x,
         .x_row = x_row_,
         .rows = run.rows,
         .in = w_.in,
         .slab = slab_,
         .begin = piece * kPackInputs,
         .end = std::min(w_.in, (piece + 1) * kPackInputs),
         .packed = packed + run.packed,
         .from = x_type_,
         .to = run.x_type,
         .exact = run.exact < 0 ? nullptr : reinterpret_cast<uint16_t*>(packed + run.exact)});
  }

  GemmTask task(const Run& run, int64_t block, const char* packed) const {
    const bool is_packed = run.packed >= 0;
    const int64_t panels =
        std::min(kBlockPanels, ceil_div(w_.out, kPanelWidth) - block * kBlockPanels);
    const uint8_t* weights = w_.data.const_data_ptr<uint8_t>() + run.matrix * w_.data.stride(0);
    const uint8_t* scales = nullptr;
    const float* factors = nullptr;
    if (w_.has_factors()) {
      factors = w_.scales.const_data_ptr<float>() + run.matrix * w_.scales.stride(0) +
                block * ceil_div(w_.in, 128);
    } else if (w_.scales.defined()) {
      const int64_t per_block =
          w_.format == WeightFormat::kFp8 ? ceil_div(w_.in, 128) : w_.in / 32 * kBlockWidth;
      scales = w_.scales.const_data_ptr<uint8_t>() + run.matrix * w_.scales.stride(0) +
               block * per_block;
    }
    return {
        .weights = weights + block * kBlockPanels * (in_ / kGroupInputs) * group_bytes(w_.format),
        .scales = scales,
        .panels = panels,
        .outputs = std::min(kBlockWidth, w_.out - block * kBlockWidth),
        .in = in_,
        .slab = slab_,
        .x = is_packed ? packed + run.packed : run.x,
        .x_row = is_packed ? slab_ : x_row_,
        .x_slab = is_packed ? run.rows * slab_ : slab_,
        .rows = run.rows,
        .y = run.y + block * kBlockWidth * size_of(result_),
        .y_row = y_row_,
        .format = w_.format,
        .x_type = run.x_type,
        .result = result_,
        .exact = run.exact < 0 ? nullptr : reinterpret_cast<const uint16_t*>(packed + run.exact),
        .factors = factors};
  }

  const Panels& w_;
  int64_t in_, slab_, x_row_, y_row_;
  ElementType x_type_, result_;
  int64_t rows_ = 0, packed_bytes_ = 0;
  std::vector<Run> runs_;
};

/// x in the element type that the panels multiply: a BF16 row times FP32 weights is widened.
at::Tensor match(const at::Tensor& x, const Panels& w) {
  return x.to(w.format == WeightFormat::kF32 ? at::kFloat : at::kBFloat16).contiguous();
}

const char* bytes(const at::Tensor& x) { return static_cast<const char*>(x.const_data_ptr()); }
char* mutable_bytes(const at::Tensor& x) { return static_cast<char*>(x.mutable_data_ptr()); }

at::Tensor linear_kernel(const at::Tensor& x_any, const Panels& w, GemmRole role) {
  const at::Tensor x = match(x_any, w);
  const at::Tensor y =
      at::empty({x.size(0), w.out}, x_any.options().dtype(result_type(x_any, role)));
  Product product(w, element_type(y), role, w.in, w.out);
  product.add({.matrix = 0, .rows = x.size(0), .x = bytes(x), .y = mutable_bytes(y)});
  product.compute();
  return y;
}

at::Tensor grouped_kernel(const at::Tensor& x_any,
                          const Panels& w,
                          const at::Tensor& offsets,
                          GemmRole role) {
  const at::Tensor x = match(x_any, w);
  const at::Tensor y =
      at::empty({x.size(0), w.out}, x_any.options().dtype(result_type(x_any, role)));
  const int64_t x_row = w.in * x.element_size(), y_row = w.out * y.element_size();
  const int64_t* bounds = offsets.const_data_ptr<int64_t>();
  Product product(w, element_type(y), role, w.in, w.out);
  for (int64_t expert = 0; expert < w.matrices; ++expert) {
    product.add({.matrix = expert,
                 .rows = bounds[expert + 1] - bounds[expert],
                 .x = bytes(x) + bounds[expert] * x_row,
                 .y = mutable_bytes(y) + bounds[expert] * y_row});
  }
  product.compute();
  return y;
}

at::Tensor group_kernel(const at::Tensor& x_any, const Panels& w) {
  const at::Tensor x = match(x_any, w);  // [tokens, groups, in]
  const int64_t groups = x.size(1);
  const at::Tensor y = at::empty({x.size(0), groups, w.out}, x_any.options());
  Product product(w, element_type(y), GemmRole::kBf16, groups * w.in, groups * w.out);
  for (int64_t group = 0; group < groups; ++group) {
    product.add({.matrix = group,
                 .rows = x.size(0),
                 .x = bytes(x) + group * w.in * x.element_size(),
                 .y = mutable_bytes(y) + group * w.out * y.element_size()});
  }
  product.compute();
  return y;
}

bool use_gemm_kernel(const at::Tensor& x, const at::Tensor& w) {
  return use_cpu_kernel(x) && (w.scalar_type() == at::kFloat || w.scalar_type() == at::kBFloat16);
}

bool wants_gradient(const at::Tensor& x, const at::Tensor& w) {
  return at::GradMode::is_enabled() && (x.requires_grad() || w.requires_grad());
}

}  // namespace

at::Tensor linear(const at::Tensor& x, const at::Tensor& w, GemmRole role) {
  check_shape(x, {-1, -1}, "linear: x");
  check_shape(w, {-1, x.size(1)}, "linear: w");
  if (use_library_gemm(x, w)) {
    return role == GemmRole::kFp32 ? LinearFp32::apply(x, w) : at::linear(x, w);
  }
  if (use_gemm_kernel(x, w)) {
    if (wants_gradient(x, w)) return trained_linear(x, w, w, role);
    return linear_kernel(x, pack_panels(w), role);
  }
  return reference::linear(x, w, role);
}

at::Tensor grouped_linear(const at::Tensor& x,
                          const at::Tensor& w,
                          const at::Tensor& offsets,
                          GemmRole role) {
  check_shape(x, {-1, -1}, "grouped_linear: x");
  check_shape(w, {-1, -1, x.size(1)}, "grouped_linear: w");
  check_shape(offsets, {w.size(0) + 1}, "grouped_linear: offsets");
  if (use_library_gemm(x, w) && role != GemmRole::kFp32) {
    const at::Tensor ends = offsets.narrow(0, 1, w.size(0)).to(at::kInt);
    return at::_grouped_mm(x, w.transpose(1, 2), ends);
  }
  if (use_gemm_kernel(x, w)) {
    if (wants_gradient(x, w)) return trained_grouped_linear(x, w, w, offsets, {}, role);
    return grouped_kernel(x, pack_panels(w), offsets, role);
  }
  return reference::grouped_linear(x, w, offsets, role);
}

at::Tensor group_linear(const at::Tensor& x, const at::Tensor& w) {
  check_shape(x, {-1, -1, -1}, "group_linear: x");
  check_shape(w, {x.size(1), -1, x.size(2)}, "group_linear: w");
  if (use_library_gemm(x, w)) {
    return at::bmm(x.transpose(0, 1), w.transpose(1, 2)).transpose(0, 1);
  }
  if (use_gemm_kernel(x, w)) {
    if (wants_gradient(x, w)) return trained_group_linear(x, w, w);
    return group_kernel(x, pack_panels(w));
  }
  return reference::group_linear(x, w);
}

void release_packed_rows() { Scratch::release(); }

bool serves_panels(const at::Tensor& x) {
  return use_cpu_kernel(x) && !(at::GradMode::is_enabled() && x.requires_grad());
}

at::Tensor linear(const at::Tensor& x, const Panels& w, GemmRole role) {
  check_shape(x, {-1, w.in}, "linear: x");
  HADAL_CHECK(w.matrices == 1, "linear: ", w.matrices, " packed matrices");
  if (serves_panels(x)) return linear_kernel(x, w, role);
  return linear(x, unpack_panels(w)[0].to(x.device()), role);
}

at::Tensor grouped_linear(const at::Tensor& x,
                          const Panels& w,
                          const at::Tensor& offsets,
                          GemmRole role) {
  check_shape(x, {-1, w.in}, "grouped_linear: x");
  check_shape(offsets, {w.matrices + 1}, "grouped_linear: offsets");
  if (serves_panels(x)) return grouped_kernel(x, w, offsets, role);
  return grouped_linear(x, unpack_panels(w).to(x.device()), offsets, role);
}

at::Tensor group_linear(const at::Tensor& x, const Panels& w) {
  check_shape(x, {-1, w.matrices, w.in}, "group_linear: x");
  if (serves_panels(x)) return group_kernel(x, w);
  return group_linear(x, unpack_panels(w).to(x.device()));
}

}  // namespace hadal::ops
