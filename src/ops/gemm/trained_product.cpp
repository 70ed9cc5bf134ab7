#include "ops/gemm/trained_product.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "base/check.h"
#include "base/math.h"
#include "base/parallel.h"
#include "ops/gemm/linear_cpu.h"
#include "ops/gemm/panels.h"
#include "ops/quant/e4m3_operands.h"
#include "ops/sum_tree.h"

namespace hadal::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// Outputs of one task, a multiple of every row tile.
constexpr int64_t kTileRows = kTaskRows;
constexpr int64_t kTileFloats = kTileRows * kBlockWidth;

/// Rows of one operand: row r of a matrix begins at data + r * stride elements.
struct Rows {
  const void* data;
  int64_t stride, width;
};

/// A chunk's rows of one matrix, and what follows it in the tree.
struct Leaf {
  int64_t begin, count;
  int32_t merges;
  int64_t padded() const { return align_up(count, kGroupInputs); }
};

/// The rows that meet one matrix.
struct Sum {
  Rows dy, x;
  std::vector<Leaf> leaves;
  int64_t depth = 0;
  float* out;  ///< [dy.width, x.width]
};

/// Cuts rows [begin, end) of one matrix into chunks; places null: rows are numbered from 0.
void cut(Sum& sum, int64_t begin, int64_t end, const int64_t* places) {
  SumSchedule schedule;
  for (int64_t row = begin; row < end;) {
    const auto place = [&](int64_t r) { return places != nullptr ? places[r] : r - begin; };
    const int64_t chunk = place(row) / kSumChunk;
    int64_t next = row + 1;
    while (next < end && place(next) / kSumChunk == chunk) ++next;
    HADAL_CHECK(next == end || place(next) / kSumChunk > chunk,
                "weight_gradient: places descend at row ", next);
    // A token may have several rows, so a chunk may hold more than one task's inputs: the kernel
    // adds its slabs in order.
    sum.leaves.push_back({.begin = row, .count = next - row, .merges = 0});
    schedule.add(static_cast<uint64_t>(chunk));
    row = next;
  }
  schedule.finish();
  sum.depth = schedule.depth();
  for (size_t i = 0; i < sum.leaves.size(); ++i) sum.leaves[i].merges = schedule.merges()[i];
}

/// The operands of all sums as the matrix kernel reads them: dy transposed as rows, x transposed as
/// panels.
template <typename Dy, typename X, typename Row>
class Packed {
 public:
  explicit Packed(const std::vector<Sum>& sums) {
    for (const Sum& sum : sums) {
      for (const Leaf& leaf : sum.leaves) {
        begins_.push_back({rows_, panels_});
        rows_ += align_up(leaf.padded() * sum.dy.width, int64_t{64});
        panels_ += align_up(leaf.padded() * align_up(sum.x.width, kPanelWidth), int64_t{64});
      }
    }
    memory_ = at::empty({rows_ * static_cast<int64_t>(sizeof(Row)) +
                         panels_ * static_cast<int64_t>(sizeof(X)) + 64},
                        at::kByte);
    auto* first = static_cast<uint8_t*>(memory_.mutable_data_ptr());
    first += (64 - reinterpret_cast<uintptr_t>(first) % 64) % 64;
    row_data_ = reinterpret_cast<Row*>(first);
    panel_data_ = reinterpret_cast<X*>(row_data_ + rows_);
  }

  Row* rows(size_t leaf) const { return row_data_ + begins_[leaf].rows; }
  X* panels(size_t leaf) const { return panel_data_ + begins_[leaf].panels; }

  /// dy [count, width] as [width][padded].
  static void pack_rows(const Rows& dy, const Leaf& leaf, Row* out) {
    const int64_t padded = leaf.padded();
    constexpr int64_t kSide = 16;
    for (int64_t t = 0; t < padded; t += kSide) {
      const int64_t filled = std::clamp<int64_t>(leaf.count - t, 0, kSide);
      const int64_t end = std::min(kSide, padded - t);
      for (int64_t o = 0; o < dy.width; ++o) {
        const Dy* from = static_cast<const Dy*>(dy.data) + (leaf.begin + t) * dy.stride + o;
        Row* to = out + o * padded + t;
        for (int64_t i = 0; i < filled; ++i) to[i] = convert<Row>(from[i * dy.stride]);
        for (int64_t i = filled; i < end; ++i) to[i] = Row{};
      }
    }
  }

  /// x [count, width] as blocks of up to four panels, each [groups][panels][8 inputs x 16 outputs].
  static void pack_panels(const Rows& x, const Leaf& leaf, X* out) {
    const int64_t panels = ceil_div(x.width, kPanelWidth), groups = leaf.padded() / kGroupInputs;
    for (int64_t first = 0; first < panels; first += kBlockPanels) {
      const int64_t count = std::min(kBlockPanels, panels - first);
      for (int64_t g = 0; g < groups; ++g) {
        for (int64_t q = first; q < first + count; ++q, out += kGroupInputs * kPanelWidth)
          pack_group(x, leaf, g * kGroupInputs, q * kPanelWidth, out);
      }
    }
  }

 private:
  template <typename To, typename From>
  static To convert(From value) {
    if constexpr (std::is_same_v<To, From>) {
      return value;
    } else {
      return static_cast<float>(value);
    }
  }

  static void pack_group(const Rows& x, const Leaf& leaf, int64_t first, int64_t column, X* out) {
    const int64_t width = std::min(kPanelWidth, x.width - column);
    const int64_t rows = std::min(kGroupInputs, leaf.count - first);
    if (width < kPanelWidth || rows < kGroupInputs) {
      std::fill_n(out, kGroupInputs * kPanelWidth, X{});
    }
    for (int64_t i = 0; i < rows; ++i) {
      const X* from = static_cast<const X*>(x.data) + (leaf.begin + first + i) * x.stride + column;
      if constexpr (sizeof(X) == 4) {
        std::memcpy(out + i * kPanelWidth, from, static_cast<size_t>(width) * sizeof(X));
      } else {
        X* pair = out + i / 2 * 2 * kPanelWidth + i % 2;
        for (int64_t c = 0; c < width; ++c) pair[2 * c] = from[c];
      }
    }
  }

  struct Begin {
    int64_t rows, panels;
  };
  std::vector<Begin> begins_;  ///< of each leaf, in elements
  int64_t rows_ = 0, panels_ = 0;
  at::Tensor memory_;
  Row* row_data_ = nullptr;
  X* panel_data_ = nullptr;
};

void add_tile(float* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] += from[i];
}

/// One tile of a sum: leaf after leaf by the matrix kernel, joined on a stack.
template <typename Dy, typename X, typename Row>
void sum_tile(const Sum& sum,
              size_t first_leaf,
              const Packed<Dy, X, Row>& packed,
              int64_t first_row,
              int64_t block,
              std::vector<float>& stack) {
  const int64_t rows = std::min(kTileRows, sum.dy.width - first_row);
  const int64_t panels =
      std::min(kBlockPanels, ceil_div(sum.x.width, kPanelWidth) - block * kBlockPanels);
  const int64_t width = std::min(kBlockWidth, sum.x.width - block * kBlockWidth);
  float* const out = sum.out + first_row * sum.x.width + block * kBlockWidth;
  if (stack.size() < static_cast<size_t>(sum.depth * kTileFloats))
    stack.resize(static_cast<size_t>(sum.depth * kTileFloats));
  float* top = stack.data();
  const bool alone = sum.leaves.size() == 1;
  for (size_t i = 0; i < sum.leaves.size(); ++i) {
    const Leaf& leaf = sum.leaves[i];
    const int64_t padded = leaf.padded();
    const X* weights = packed.panels(first_leaf + i) + block * kBlockWidth * padded;
    gemm_cpu({.weights = reinterpret_cast<const uint8_t*>(weights),
              .scales = nullptr,
              .panels = panels,
              .outputs = width,
              .in = padded,
              .slab = kSumChunk,
              .x = packed.rows(first_leaf + i) + first_row * padded,
              .x_row = padded,
              .x_slab = kSumChunk,
              .rows = rows,
              .y = alone ? out : top,
              .y_row = alone ? sum.x.width : width,
              .format = sizeof(X) == 4 ? WeightFormat::kF32 : WeightFormat::kBf16,
              .x_type = sizeof(Row) == 4 ? ElementType::kF32 : ElementType::kBf16,
              .result = ElementType::kF32,
              .exact = nullptr});
    if (alone) return;
    for (int32_t merge = 0; merge < leaf.merges; ++merge) {
      top -= kTileFloats;
      add_tile(top, top + kTileFloats, rows * width);
    }
    top += kTileFloats;
  }
  for (int64_t row = 0; row < rows; ++row) {
    float* to = out + row * sum.x.width;
    if (sum.leaves.empty()) {
      std::fill_n(to, width, kNoSum);
    } else {
      std::copy_n(stack.data() + row * width, width, to);
    }
  }
}

template <typename Dy, typename X, typename Row>
void compute_typed(const std::vector<Sum>& sums) {
  const Packed<Dy, X, Row> packed(sums);
  struct Task {
    size_t sum, leaf;
    int64_t row, block;
  };
  std::vector<Task> leaves, tiles;
  std::vector<size_t> first(sums.size());  // leaf of each sum
  size_t leaf = 0;
  for (size_t s = 0; s < sums.size(); ++s) {
    first[s] = leaf;
    for (int64_t row = 0; row < sums[s].dy.width; row += kTileRows) {
      for (int64_t block = 0; block < ceil_div(sums[s].x.width, kBlockWidth); ++block)
        tiles.push_back({s, leaf, row, block});
    }
    for (size_t i = 0; i < sums[s].leaves.size(); ++i) leaves.push_back({s, leaf++, 0, 0});
  }
  parallel_for(std::ssize(leaves), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Task& task = leaves[static_cast<size_t>(i)];
      const Sum& sum = sums[task.sum];
      const Leaf& rows = sum.leaves[task.leaf - first[task.sum]];
      packed.pack_rows(sum.dy, rows, packed.rows(task.leaf));
      packed.pack_panels(sum.x, rows, packed.panels(task.leaf));
    }
  });
  parallel_for(std::ssize(tiles), 1, [&](int64_t begin, int64_t end) {
    std::vector<float> stack;
    for (int64_t i = begin; i < end; ++i) {
      const Task& task = tiles[static_cast<size_t>(i)];
      sum_tile(sums[task.sum], task.leaf, packed, task.row, task.block, stack);
    }
  });
}

/// Of operands in these types, which both sides of a product have.
void compute(const std::vector<Sum>& sums, at::ScalarType dy, at::ScalarType x) {
  RowForm form;
  gemm_row_form_cpu(kTileRows, WeightFormat::kBf16, &form);
  HADAL_CHECK(dy == x, "weight_gradient: ", dy, " gradients of ", x, " rows");
  if (x == at::kFloat) return compute_typed<float, float, float>(sums);
  if (form.bf16) return compute_typed<at::BFloat16, at::BFloat16, at::BFloat16>(sums);
  compute_typed<at::BFloat16, at::BFloat16, float>(sums);
}

/// dw [matrices, out, in]: of rows sorted by matrix, or, where `offsets` is undefined, of all rows
/// for each matrix, dy and x [rows, matrices, ..].
at::Tensor weight_gradients(const at::Tensor& dy_any,
                            const at::Tensor& x_any,
                            int64_t matrices,
                            const at::Tensor& offsets,
                            const at::Tensor& places) {
  const at::Tensor dy = dy_any.contiguous();
  // FP32 gradients of BF16 rows (GemmRole::kFp32) meet them widened.
  const at::Tensor x =
      x_any.to(dy.scalar_type() == at::kFloat ? at::kFloat : x_any.scalar_type()).contiguous();
  const int64_t out = dy.size(-1), in = x.size(-1);
  const at::Tensor result = at::empty({matrices, out, in}, dy.options().dtype(at::kFloat));
  const int64_t* bounds = offsets.defined() ? offsets.const_data_ptr<int64_t>() : nullptr;
  const int64_t* place = places.defined() ? places.const_data_ptr<int64_t>() : nullptr;
  const auto at_column = [](const at::Tensor& t, int64_t column) {
    return static_cast<const char*>(t.const_data_ptr()) + column * t.element_size();
  };
  std::vector<Sum> sums;
  for (int64_t m = 0; m < matrices; ++m) {
    const int64_t column = bounds != nullptr ? 0 : m;
    sums.push_back({.dy = {at_column(dy, column * out), dy.stride(0), out},
                    .x = {at_column(x, column * in), x.stride(0), in},
                    .leaves = {},
                    .out = result.mutable_data_ptr<float>() + m * out * in});
    cut(sums.back(), bounds != nullptr ? bounds[m] : 0,
        bounds != nullptr ? bounds[m + 1] : dy.size(0), place);
  }
  compute(sums, dy.scalar_type(), x.scalar_type());
  return result;
}

/// w [.., out, in] as the panels of its transposes, in the type in which they meet dy.
Panels transposed_panels(const at::Tensor& w, const at::Tensor& dy) {
  const at::ScalarType type = dy.scalar_type() == at::kFloat ? at::kFloat : w.scalar_type();
  return pack_panels(w.transpose(-1, -2).to(type).contiguous());
}

enum class Form { kDense, kGrouped, kGroups };

struct TrainedProduct : torch::autograd::Function<TrainedProduct> {
  static at::Tensor forward(AutogradContext* context,
                            const at::Tensor& x,
                            const at::Tensor& master,
                            const at::Tensor& values,
                            const std::optional<at::Tensor>& offsets,
                            const std::optional<at::Tensor>& places,
                            Form form,
                            GemmRole role,
                            bool e4m3) {
    context->save_for_backward(
        {x, values, offsets.value_or(at::Tensor()), places.value_or(at::Tensor())});
    context->set_materialize_grads(false);  // no gradient stays none
    context->saved_data["form"] = static_cast<int64_t>(form);
    context->saved_data["e4m3"] = e4m3;
    context->saved_data["shape"] = master.sizes();
    const Panels panels = pack_panels(values);
    switch (form) {
      case Form::kDense:
        return linear(x, panels, role);
      case Form::kGrouped:
        return grouped_linear(x, panels, *offsets, role);
      case Form::kGroups:
        break;
    }
    return group_linear(x, panels);
  }

  static variable_list backward(AutogradContext* context, variable_list grad_outputs) {
    variable_list grads(8);
    if (!grad_outputs[0].defined()) return grads;
    const variable_list saved = context->get_saved_variables();
    const at::Tensor &x = saved[0], &values = saved[1], &offsets = saved[2];
    const at::Tensor dy = grad_outputs[0].contiguous();
    const auto form = static_cast<Form>(context->saved_data["form"].toInt());
    const bool e4m3 = context->saved_data["e4m3"].toBool();
    if (context->needs_input_grad(0)) {
      // Slabs of 128 outputs, in `fp8` each with one scale of dy.
      const at::Tensor rows = e4m3 ? e4m3_rows(dy, 128) : dy;
      const Panels panels = transposed_panels(values, rows);
      at::Tensor dx;
      if (form == Form::kDense) dx = linear(rows, panels, GemmRole::kBf16);
      if (form == Form::kGrouped) dx = grouped_linear(rows, panels, offsets, GemmRole::kBf16);
      if (form == Form::kGroups) dx = group_linear(rows, panels);
      grads[0] = dx.to(x.scalar_type());
    }
    if (context->needs_input_grad(1)) {
      const int64_t matrices = form == Form::kDense ? 1 : values.size(0);
      const at::Tensor& places = saved[3];
      std::vector<int64_t> groups;
      if (e4m3) groups = e4m3_groups(dy.size(0), offsets, places);
      const auto operand = [&](const at::Tensor& of) {
        return e4m3 ? e4m3_columns(of, groups) : of;
      };
      grads[1] = weight_gradients(operand(dy), operand(x), matrices, offsets, places)
                     .reshape(context->saved_data["shape"].toIntVector());
    }
    return grads;
  }
};

at::Tensor apply(const at::Tensor& x,
                 const at::Tensor& values,
                 const at::Tensor& master,
                 const at::Tensor& offsets,
                 const at::Tensor& places,
                 Form form,
                 GemmRole role,
                 Numerics numerics = Numerics::kBf16) {
  const bool e4m3 = numerics == Numerics::kFp8 && quantises_input(role, numerics);
  HADAL_CHECK(use_cpu_kernel(x) && use_cpu_kernel(values),
              "trained product: x and values are FP32 or BF16 on the CPU");
  HADAL_CHECK(master.numel() == values.numel(), "trained product: ", master.numel(), " masters of ",
              values.numel(), " values");
  const auto optional = [](const at::Tensor& t) {
    return t.defined() ? std::optional(t.contiguous()) : std::nullopt;
  };
  return TrainedProduct::apply(x, master, values.detach(), optional(offsets), optional(places),
                               form, role, e4m3);
}

}  // namespace

at::Tensor trained_linear(const at::Tensor& x,
                          const at::Tensor& values,
                          const at::Tensor& master,
                          GemmRole role,
                          Numerics numerics) {
  check_shape(x, {-1, -1}, "trained_linear: x");
  check_shape(values, {-1, x.size(1)}, "trained_linear: values");
  return apply(x, values, master, {}, {}, Form::kDense, role, numerics);
}

at::Tensor trained_grouped_linear(const at::Tensor& x,
                                  const at::Tensor& values,
                                  const at::Tensor& master,
                                  const at::Tensor& offsets,
                                  const at::Tensor& places,
                                  GemmRole role,
                                  Numerics numerics) {
  check_shape(x, {-1, -1}, "trained_grouped_linear: x");
  check_shape(values, {-1, -1, x.size(1)}, "trained_grouped_linear: values");
  check_shape(offsets, {values.size(0) + 1}, "trained_grouped_linear: offsets");
  if (places.defined()) check_shape(places, {x.size(0)}, "trained_grouped_linear: places");
  return apply(x, values, master, offsets, places, Form::kGrouped, role, numerics);
}

at::Tensor trained_group_linear(const at::Tensor& x,
                                const at::Tensor& values,
                                const at::Tensor& master) {
  check_shape(x, {-1, -1, -1}, "trained_group_linear: x");
  check_shape(values, {x.size(1), -1, x.size(2)}, "trained_group_linear: values");
  return apply(x, values, master, {}, {}, Form::kGroups, GemmRole::kBf16);
}

at::Tensor weight_gradient(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& places) {
  check_shape(dy, {-1, -1}, "weight_gradient: dy");
  check_shape(x, {dy.size(0), -1}, "weight_gradient: x");
  if (places.defined()) check_shape(places, {dy.size(0)}, "weight_gradient: places");
  return weight_gradients(dy, x, 1, {}, places)[0];
}

std::vector<int64_t> e4m3_groups(int64_t rows,
                                 const at::Tensor& offsets,
                                 const at::Tensor& places) {
  const int64_t* place = places.defined() ? places.const_data_ptr<int64_t>() : nullptr;
  const int64_t* bounds = offsets.defined() ? offsets.const_data_ptr<int64_t>() : nullptr;
  const int64_t matrices = bounds != nullptr ? offsets.size(0) - 1 : 1;
  std::vector<int64_t> groups = {0};
  for (int64_t m = 0; m < matrices; ++m) {
    Sum sum{.dy = {}, .x = {}, .leaves = {}, .out = nullptr};
    cut(sum, bounds != nullptr ? bounds[m] : 0, bounds != nullptr ? bounds[m + 1] : rows, place);
    for (const Leaf& leaf : sum.leaves) {
      for (int64_t first = 0; first < leaf.count; first += kSumChunk)
        groups.push_back(leaf.begin + std::min(first + kSumChunk, leaf.count));
    }
  }
  return groups;
}

at::Tensor input_gradient(const at::Tensor& dy, const at::Tensor& w) {
  check_shape(dy, {-1, -1}, "input_gradient: dy");
  check_shape(w, {dy.size(1), -1}, "input_gradient: w");
  return linear(dy, transposed_panels(w, dy), GemmRole::kBf16);
}

namespace reference {

at::Tensor grouped_weight_gradient(const at::Tensor& dy,
                                   const at::Tensor& x,
                                   const at::Tensor& offsets) {
  const at::Tensor bounds = offsets.to(at::kCPU);
  std::vector<at::Tensor> parts;
  for (int64_t m = 0; m + 1 < bounds.size(0); ++m) {
    const int64_t begin = bounds[m].item<int64_t>(), count = bounds[m + 1].item<int64_t>() - begin;
    parts.push_back(
        at::mm(to_compute(dy.narrow(0, begin, count)).t(), to_compute(x.narrow(0, begin, count))));
  }
  return at::stack(parts);
}

}  // namespace reference

}  // namespace hadal::ops
