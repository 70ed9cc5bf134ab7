// What a step moves, and element-wise work on it, a piece to a thread.
#pragma once

#include <cstdint>

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>

#include "base/parallel.h"
#include "train/ownership.h"

namespace hadal::train {

/// A piece of a parameter in a step; tensors are flat, of its elements.
struct MovedPiece {
  const model::Parameter* parameter;
  UpdateRule rule;
  at::Tensor values, gradient, momentum, variance;
};

/// Calls body(i) for all i < count without gradients: on the CPU's threads where the parameters are
/// on the CPU, else in order on this one. A piece is one thread's as a whole, so the number of
/// threads changes no bit.
template <typename Body>
void for_each_slot(size_t count, bool on_cpu, Body&& body) {
  const auto run = [&](int64_t begin, int64_t end) {
    const at::NoGradGuard no_grad;
    for (int64_t i = begin; i < end; ++i) body(static_cast<size_t>(i));
  };
  if (on_cpu) return parallel_for(static_cast<int64_t>(count), 1, run);
  run(0, static_cast<int64_t>(count));
}

}  // namespace hadal::train
