#include "ops/optim/newton_schulz.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include <ATen/ATen.h>

#include "base/math.h"
#include "base/parallel.h"
#include "ops/gemm/linear_cpu.h"
#include "ops/op.h"

namespace hadal::ops {
namespace {

struct Coefficients {
  double a, b, c;
};
constexpr Coefficients kRough{3.4445, -4.7750, 2.0315};
constexpr Coefficients kFine{2.0, -1.5, 0.5};

at::Tensor orthogonalise(const at::Tensor& u, bool low_precision) {
  const bool tall = u.size(1) > u.size(2);
  at::Tensor x = tall ? u.transpose(1, 2) : u;
  // The smallest normal number keeps 0 / 0 away; no gradient of interest is near it.
  const at::Tensor norm = x.square().sum({1, 2}, /*keepdim=*/true).sqrt().clamp_min(1e-37);
  x = (x / norm).contiguous();
  if (low_precision) x = x.to(at::kBFloat16);
  for (int step = 0; step < 10; ++step) {
    const Coefficients& k = step < 8 ? kRough : kFine;
    const at::Tensor gram = at::bmm(x, x.transpose(1, 2));
    // b G + c G^2, then a X + (...) X, each as one fused product.
    const at::Tensor polynomial = at::baddbmm(gram, gram, gram, k.b, k.c);
    x = at::baddbmm(x, polynomial, x, k.a, 1.0);
  }
  x = x.to(u.scalar_type());
  return tall ? x.transpose(1, 2).contiguous() : x;
}

/// BF16 as the CPU kernels hold it.
using Half = at::BFloat16;

/// Zeros that begin at a cache line, as the kernel's panels must.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : memory_(at::empty({count * static_cast<int64_t>(sizeof(T))}, at::kByte)),
        data_(reinterpret_cast<T*>(memory_.mutable_data_ptr<uint8_t>())),
        count_(count) {
    std::fill_n(data_, count, T(0.0f));
  }
  T* data() { return data_; }
  const T* data() const { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  int64_t size() const { return count_; }

 private:
  at::Tensor memory_;
  T* data_;
  int64_t count_;
};

/// One matrix at a time by the CPU's matrix kernel. Store is what stands between products: float,
/// or Half where they may be BF16; Row is how the kernel takes rows of Store.
template <typename Store, typename Row>
class CpuSchulz {
 public:
  /// Of matrices with n rows and k >= n columns.
  CpuSchulz(int64_t n, int64_t k)
      : n_(align_up(n, kPanelWidth)),
        k_(align_up(k, kPanelWidth)),
        x_(n_ * k_),
        gram_(n_ * n_),
        polynomial_(n_ * n_),
        row_memory_(std::is_same_v<Store, Row> ? 0 : n_ * k_),
        panels_(n_ * k_),
        sums_(n_ * k_) {}

  /// u and out [n, k], or their transposes, [k, n], where `tall`.
  void run(const float* u, int64_t n, int64_t k, bool tall, float* out) {
    double squares = 0.0;
    for (int64_t i = 0; i < n * k; ++i) squares += static_cast<double>(u[i]) * u[i];
    const float norm = std::max(static_cast<float>(std::sqrt(squares)), 1e-37f);
    std::fill_n(x_.data(), x_.size(), Store(0.0f));
    each(n, k, tall,
         [&](int64_t place, int64_t at) { x_[at] = static_cast<Store>(u[place] / norm); });
    for (int step = 0; step < 10; ++step) iterate(step < 8 ? kRough : kFine);
    each(n, k, tall, [&](int64_t place, int64_t at) { out[place] = static_cast<float>(x_[at]); });
  }

 private:
  /// visit(place in the matrix as it is given, place in x_).
  template <typename Visit>
  void each(int64_t n, int64_t k, bool tall, Visit&& visit) const {
    for (int64_t row = 0; row < n; ++row) {
      for (int64_t column = 0; column < k; ++column)
        visit(tall ? column * n + row : row * k + column, row * k_ + column);
    }
  }

  void iterate(const Coefficients& k) {
    const auto a = static_cast<float>(k.a), b = static_cast<float>(k.b),
               c = static_cast<float>(k.c);
    // Gram matrix and polynomial are symmetric in every bit: each is its own transpose.
    pack_lanes_of_rows(x_.data(), k_, n_);
    multiply(x_, k_, n_, /*symmetric=*/true);
    for (int64_t i = 0; i < gram_.size(); ++i) gram_[i] = static_cast<Store>(sums_[i]);
    pack_rows_of_lanes(gram_.data(), n_, n_);
    multiply(gram_, n_, n_, /*symmetric=*/true);
    for (int64_t i = 0; i < gram_.size(); ++i)
      polynomial_[i] = static_cast<Store>(c * sums_[i] + b * static_cast<float>(gram_[i]));
    pack_rows_of_lanes(x_.data(), n_, k_);
    multiply(polynomial_, n_, k_, /*symmetric=*/false);
    for (int64_t i = 0; i < x_.size(); ++i)
      x_[i] = static_cast<Store>(sums_[i] + a * static_cast<float>(x_[i]));
  }

  /// sums_ [n, width] = rows [n, in] times what is packed.
  void multiply(const Buffer<Store>& rows, int64_t in, int64_t width, bool symmetric) {
    const Row* data = nullptr;
    if constexpr (std::is_same_v<Store, Row>) {
      data = rows.data();
    } else {
      std::copy_n(rows.data(), rows.size(), row_memory_.data());
      data = row_memory_.data();
    }
    // Runs as long as a block is wide, so that what lies above the diagonal need not be computed.
    for (int64_t row = 0; row < n_; row += kBlockWidth) {
      for (int64_t column = 0; column < width; column += kBlockWidth) {
        if (symmetric && column > row) break;
        const int64_t outputs = std::min(kBlockWidth, width - column);
        gemm_cpu({.weights = reinterpret_cast<const uint8_t*>(panels_.data() + column * in),
                  .scales = nullptr,
                  .panels = outputs / kPanelWidth,
                  .outputs = outputs,
                  .in = in,
                  .slab = kSlab,
                  .x = data + row * in,
                  .x_row = in,
                  .x_slab = kSlab,
                  .rows = std::min(kBlockWidth, n_ - row),
                  .y = sums_.data() + row * width + column,
                  .y_row = width,
                  .format = sizeof(Store) == 4 ? WeightFormat::kF32 : WeightFormat::kBf16,
                  .x_type = sizeof(Row) == 4 ? ElementType::kF32 : ElementType::kBf16,
                  .result = ElementType::kF32,
                  .exact = nullptr});
      }
    }
    if (!symmetric) return;
    for (int64_t row = 0; row < n_; ++row) {
      for (int64_t column = align_up(row + 1, kBlockWidth); column < width; ++column)
        sums_[row * width + column] = sums_[column * width + row];
    }
  }

  /// Where an element of a group of 8 inputs and 16 outputs stands (linear_cpu.h).
  static int64_t place(int64_t input, int64_t output) {
    constexpr int64_t kPair = sizeof(Store) == 2 ? 2 : 1;
    return input / kPair * kPair * kPanelWidth + output * kPair + input % kPair;
  }

  /// pack(first input, first output, out) for every group in the order of the panels.
  template <typename Pack>
  void pack(int64_t in, int64_t width, Pack&& pack_group) {
    Store* out = panels_.data();
    for (int64_t block = 0; block < width; block += kBlockWidth) {
      const int64_t end = std::min(width, block + kBlockWidth);
      for (int64_t input = 0; input < in; input += kGroupInputs) {
        for (int64_t output = block; output < end; output += kPanelWidth) {
          pack_group(input, output, out);
          out += kGroupInputs * kPanelWidth;
        }
      }
    }
  }

  /// Outputs are rows of w [width, in].
  void pack_lanes_of_rows(const Store* w, int64_t in, int64_t width) {
    pack(in, width, [&](int64_t input, int64_t output, Store* out) {
      for (int64_t o = 0; o < kPanelWidth; ++o) {
        const Store* row = w + (output + o) * in + input;
        for (int64_t i = 0; i < kGroupInputs; ++i) out[place(i, o)] = row[i];
      }
    });
  }

  /// Outputs are columns of w [in, width].
  void pack_rows_of_lanes(const Store* w, int64_t in, int64_t width) {
    pack(in, width, [&](int64_t input, int64_t output, Store* out) {
      for (int64_t i = 0; i < kGroupInputs; ++i) {
        const Store* row = w + (input + i) * width + output;
        for (int64_t o = 0; o < kPanelWidth; ++o) out[place(i, o)] = row[o];
      }
    });
  }

  static constexpr int64_t kSlab = 128;
  int64_t n_, k_;
  Buffer<Store> x_, gram_, polynomial_;
  Buffer<Row> row_memory_;
  Buffer<Store> panels_;
  Buffer<float> sums_;
};

/// u [units, rows, cols] FP32; every unit is one thread's.
template <typename Store, typename Row>
at::Tensor orthogonalise_on_cpu(const at::Tensor& u_any) {
  const at::Tensor u = u_any.contiguous();
  const int64_t rows = u.size(1), cols = u.size(2);
  const at::Tensor result = at::empty_like(u);
  const float* from = u.const_data_ptr<float>();
  float* to = result.mutable_data_ptr<float>();
  parallel_for(u.size(0), 1, [&](int64_t begin, int64_t end) {
    CpuSchulz<Store, Row> schulz(std::min(rows, cols), std::max(rows, cols));
    for (int64_t i = begin; i < end; ++i) {
      schulz.run(from + i * rows * cols, std::min(rows, cols), std::max(rows, cols), rows > cols,
                 to + i * rows * cols);
    }
  });
  return result;
}

}  // namespace

at::Tensor newton_schulz(const at::Tensor& u, bool low_precision) {
  check_shape(u, {-1, -1, -1}, "newton_schulz: u");
  if (use_cpu_kernel(u) && u.scalar_type() == at::kFloat && u.numel() > 0) {
    if (!low_precision) return orthogonalise_on_cpu<float, float>(u);
    RowForm form;
    gemm_row_form_cpu(kBlockWidth, WeightFormat::kBf16, &form);
    return form.bf16 ? orthogonalise_on_cpu<Half, Half>(u) : orthogonalise_on_cpu<Half, float>(u);
  }
  if (!u.is_cpu() || u.size(0) <= 1) return orthogonalise(u, low_precision);
  // The CPU library's batched product chooses its order of summation by the number of matrices; the
  // contract is the bits of each matrix alone.
  std::vector<at::Tensor> each;
  for (int64_t i = 0; i < u.size(0); ++i) {
    each.push_back(orthogonalise(u.narrow(0, i, 1), low_precision));
  }
  return at::cat(each);
}

}  // namespace hadal::ops
