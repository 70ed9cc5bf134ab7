// The arithmetic of one token's hyper-connection gates and its derivative, for n = 4 streams: plain
// functions that the CUDA kernels and the tests on the CPU share (definition: reference::hc_pre in
// hyper_connection.h; model.md 3.1 to 3.4).
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define HADAL_HOST_DEVICE __host__ __device__
#else
#define HADAL_HOST_DEVICE
#endif

namespace hadal::ops::hc {

inline constexpr int kStreams = 4;
inline constexpr int kCells = kStreams * kStreams;
inline constexpr int kRows = 2 * kStreams + kCells;  ///< rows of fn: collapse, expand, combination
inline constexpr int kMaxIters = 32;                 ///< what the backward pass has room for

template <typename R>
HADAL_HOST_DEVICE inline R logistic(R x) {
  return R(1) / (R(1) + std::exp(-x));
}

/// Which of scale's entries belongs to a row of fn.
HADAL_HOST_DEVICE constexpr int scale_index(int row) {
  return row < kStreams ? 0 : row < 2 * kStreams ? 1 : 2;
}

/// Element i of a column or row of a 4 x 4 matrix.
template <bool kColumns>
HADAL_HOST_DEVICE constexpr int cell(int line, int i) {
  return kColumns ? i * kStreams + line : line * kStreams + i;
}

/// Divides every column (row) by its sum + eps, and leaves these divisors in `sums`.
template <bool kColumns, typename R>
HADAL_HOST_DEVICE inline void normalise(R (&p)[kCells], R eps, R (&sums)[kStreams]) {
  for (int line = 0; line < kStreams; ++line) {
    R total = 0;
    for (int i = 0; i < kStreams; ++i) total += p[cell<kColumns>(line, i)];
    sums[line] = total + eps;
    const R inverse = R(1) / sums[line];
    for (int i = 0; i < kStreams; ++i) p[cell<kColumns>(line, i)] *= inverse;
  }
}

/// Takes p from the result of `normalise` back to its input, and grad with it: of q = p / s with
/// s = sum(p) + eps the gradient is (grad - sum(grad q)) / s.
template <bool kColumns, typename R>
HADAL_HOST_DEVICE inline void normalise_backward(R (&p)[kCells],
                                                 R (&grad)[kCells],
                                                 const R (&sums)[kStreams]) {
  for (int line = 0; line < kStreams; ++line) {
    R along = 0;
    for (int i = 0; i < kStreams; ++i) {
      along += grad[cell<kColumns>(line, i)] * p[cell<kColumns>(line, i)];
    }
    const R inverse = R(1) / sums[line];
    for (int i = 0; i < kStreams; ++i) {
      const int at = cell<kColumns>(line, i);
      grad[at] = (grad[at] - along) * inverse;
      p[at] *= sums[line];
    }
  }
}

/// Softmax of each row.
template <typename R>
HADAL_HOST_DEVICE inline void softmax(R (&p)[kCells]) {
  for (int j = 0; j < kStreams; ++j) {
    R highest = p[j * kStreams], total = 0;
    for (int k = 1; k < kStreams; ++k) {
      highest = p[j * kStreams + k] > highest ? p[j * kStreams + k] : highest;
    }
    for (int k = 0; k < kStreams; ++k) {
      p[j * kStreams + k] = std::exp(p[j * kStreams + k] - highest);
      total += p[j * kStreams + k];
    }
    for (int k = 0; k < kStreams; ++k) p[j * kStreams + k] /= total;
  }
}

/// P0 = softmax + eps, then columns, then iters - 1 times rows and columns. `sums` holds the
/// divisors of the 2 iters - 1 steps when kKeep; otherwise it is one line of scratch.
template <bool kKeep, typename R>
HADAL_HOST_DEVICE inline void sinkhorn(R (&p)[kCells], int iters, R eps, R (*sums)[kStreams]) {
  softmax(p);
  for (int i = 0; i < kCells; ++i) p[i] += eps;
  normalise<true>(p, eps, sums[0]);
  for (int i = 1; i < iters; ++i) {
    normalise<false>(p, eps, sums[kKeep ? 2 * i - 1 : 0]);
    normalise<true>(p, eps, sums[kKeep ? 2 * i : 0]);
  }
}

/// What a token's gates depend on; z is fn v times rho, the reciprocal RMS of v.
template <typename R>
struct GateInput {
  R z[kRows], scale[3], base[kRows], eps;
  int iters;
};

template <typename R>
HADAL_HOST_DEVICE inline R logit(const GateInput<R>& in, int row) {
  return in.z[row] * in.scale[scale_index(row)] + in.base[row];
}

/// post (c of model.md 3.1) and P.
template <typename R>
HADAL_HOST_DEVICE inline void post_and_comb(const GateInput<R>& in,
                                            R (&post)[kStreams],
                                            R (&comb)[kCells]) {
  for (int k = 0; k < kStreams; ++k) post[k] = R(2) * logistic(logit(in, kStreams + k));
  for (int i = 0; i < kCells; ++i) comb[i] = logit(in, 2 * kStreams + i);
  R scratch[1][kStreams];
  sinkhorn<false>(comb, in.iters, in.eps, scratch);
}

/// d_logit, the gradient at z scale + base, from the gradients of the collapse weights, post and P;
/// it is base's share of this token.
template <typename R>
HADAL_HOST_DEVICE inline void gates_backward(const GateInput<R>& in,
                                             const R (&d_pre)[kStreams],
                                             const R (&d_post)[kStreams],
                                             const R (&d_comb)[kCells],
                                             R (&d_logit)[kRows]) {
  for (int j = 0; j < kStreams; ++j) {
    const R pre = logistic(logit(in, j)), half = logistic(logit(in, kStreams + j));
    d_logit[j] = d_pre[j] * pre * (R(1) - pre);
    d_logit[kStreams + j] = d_post[j] * R(2) * half * (R(1) - half);
  }
  R p[kCells], grad[kCells], sums[2 * kMaxIters][kStreams];
  for (int i = 0; i < kCells; ++i) {
    p[i] = logit(in, 2 * kStreams + i);
    grad[i] = d_comb[i];
  }
  sinkhorn<true>(p, in.iters, in.eps, sums);
  for (int i = in.iters - 1; i > 0; --i) {
    normalise_backward<true>(p, grad, sums[2 * i]);
    normalise_backward<false>(p, grad, sums[2 * i - 1]);
  }
  normalise_backward<true>(p, grad, sums[0]);
  // The softmax once more: taking eps off p again would cancel where an entry is small.
  for (int i = 0; i < kCells; ++i) p[i] = logit(in, 2 * kStreams + i);
  softmax(p);
  for (int j = 0; j < kStreams; ++j) {
    R along = 0;
    for (int k = 0; k < kStreams; ++k) along += grad[j * kStreams + k] * p[j * kStreams + k];
    for (int k = 0; k < kStreams; ++k) {
      const int at = j * kStreams + k;
      d_logit[2 * kStreams + at] = p[at] * (grad[at] - along);
    }
  }
}

/// What the streams' gradient needs of d_logit:
///   dv = sum_o dz_rho[o] fn[o] - v_factor v,  of z = rho (fn v), rho = (mean(v^2) + eps)^-1/2.
/// `width` is the length of v.
template <typename R>
HADAL_HOST_DEVICE inline void logits_backward(const GateInput<R>& in,
                                              R rho,
                                              R width,
                                              const R (&d_logit)[kRows],
                                              R (&dz_rho)[kRows],
                                              R& v_factor) {
  R along = 0;
  for (int o = 0; o < kRows; ++o) {
    const R dz = d_logit[o] * in.scale[scale_index(o)];
    along += dz * in.z[o];
    dz_rho[o] = dz * rho;
  }
  v_factor = along * rho * rho / width;
}

}  // namespace hadal::ops::hc
