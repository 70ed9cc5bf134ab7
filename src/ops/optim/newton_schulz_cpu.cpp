#include "ops/optim/newton_schulz_cpu.h"

#include <new>
#include <type_traits>

#include "ops/cpu/isa.h"
#include "ops/cpu/vec.h"
#include "ops/gemm/linear_cpu.h"

namespace hadal::ops {
namespace {

namespace cpu = ops::cpu::HADAL_ISA;

template <typename T>
constexpr T smallest(T a, T b) {
  return a < b ? a : b;
}
constexpr int64_t align_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }
constexpr float largest(float a, float b) { return a > b ? a : b; }

/// BF16 in memory.
struct Half {
  uint16_t bits;
  Half() = default;
  explicit Half(float value) : bits(cpu::float_to_bf16(value)) {}
  explicit operator float() const { return cpu::bf16_to_float(bits); }
};

/// Zeros that begin at a cache line, as the kernel's panels must.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(static_cast<T*>(
            ::operator new(static_cast<size_t>(count) * sizeof(T) + 1, kAlignment))),
        count_(count) {
    for (int64_t i = 0; i < count; ++i) data_[i] = T(0.0f);
  }
  ~Buffer() { ::operator delete(data_, kAlignment); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() { return data_; }
  const T* data() const { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  int64_t size() const { return count_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
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
    const float norm = largest(static_cast<float>(__builtin_sqrt(squares)), 1e-37f);
    for (int64_t i = 0; i < x_.size(); ++i) x_[i] = Store(0.0f);
    each(n, k, tall,
         [&](int64_t place, int64_t at) { x_[at] = static_cast<Store>(u[place] / norm); });
    for (int step = 0; step < kSchulzSteps; ++step) iterate(schulz_coefficients(step));
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

  void iterate(const SchulzCoefficients& k) {
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
      for (int64_t i = 0; i < rows.size(); ++i) row_memory_[i] = static_cast<Row>(rows.data()[i]);
      data = row_memory_.data();
    }
    // Runs as long as a block is wide, so that what lies above the diagonal need not be computed.
    for (int64_t row = 0; row < n_; row += kBlockWidth) {
      for (int64_t column = 0; column < width; column += kBlockWidth) {
        if (symmetric && column > row) break;
        const int64_t outputs = smallest(kBlockWidth, width - column);
        gemm_cpu({.weights = reinterpret_cast<const uint8_t*>(panels_.data() + column * in),
                  .scales = nullptr,
                  .panels = outputs / kPanelWidth,
                  .outputs = outputs,
                  .in = in,
                  .slab = kSlab,
                  .x = data + row * in,
                  .x_row = in,
                  .x_slab = kSlab,
                  .rows = smallest(kBlockWidth, n_ - row),
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
      const int64_t end = smallest(width, block + kBlockWidth);
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

template <typename Store, typename Row>
void run_units(const NewtonSchulzCpuParams& p, int64_t begin, int64_t end) {
  const int64_t n = smallest(p.rows, p.cols), k = p.rows + p.cols - n, size = n * k;
  CpuSchulz<Store, Row> schulz(n, k);
  for (int64_t unit = begin; unit < end; ++unit)
    schulz.run(p.u + unit * size, n, k, p.rows > p.cols, p.out + unit * size);
}

void units(const NewtonSchulzCpuParams& p, int64_t begin, int64_t end) {
  if (!p.bf16) return run_units<float, float>(p, begin, end);
  if (p.bf16_rows) return run_units<Half, Half>(p, begin, end);
  run_units<Half, float>(p, begin, end);
}

const bool filled = newton_schulz_cpu.fill(cpu::kIsa, units);

}  // namespace
}  // namespace hadal::ops
