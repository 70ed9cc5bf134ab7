// Tensor-level recomputation (docs/decisions/0025-recomputed-tensors.md): a forward pass leaves a
// tape of the functions that made its tensors; an annotated tensor is not kept for the backward
// pass, which runs its function again when a gradient needs it.
//
// Forward code calls its ops through recorded() and annotates results with checkpointed(). Without
// a tape on this thread, or without gradients, both do nothing.
#pragma once

#include <array>
#include <compare>
#include <concepts>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>

#include "ops/op.h"

namespace hadal::ops {

/// Which tensor of a pass: the ordinal-th result that the forward code calls so in a block.
struct TensorLabel {
  int64_t block = 0;
  std::string name;
  int64_t ordinal = 0;
  auto operator<=>(const TensorLabel&) const = default;
};
/// "block 3: norm 0".
std::string to_string(const TensorLabel& label);

/// What a tape tells of a pass; numbers of functions and of their results ascend from 0.
class TapeObserver {
 public:
  struct Result {
    int64_t slot = 0;
    TensorLabel label;
    int64_t bytes = 0;           ///< of its storage
    const void* data = nullptr;  ///< as the forward pass made it
  };
  virtual ~TapeObserver() = default;
  /// A function ran; inputs are numbers of results.
  virtual void ran(int64_t function,
                   const std::vector<int64_t>& inputs,
                   const std::vector<Result>& results) = 0;
  virtual void annotated(int64_t slot) = 0;
  /// The backward pass asks for a result, before anything runs again for it.
  virtual void needed(int64_t slot) = 0;
  /// No node of the graph will ask for it again.
  virtual void released(int64_t slot) = 0;
  virtual void runs_again(int64_t function) = 0;
  /// In so many seconds of its thread.
  virtual void ran_again(int64_t function, double seconds) = 0;
};

struct TapeOptions {
  /// Which annotated tensors are not kept; empty: all of them.
  std::function<bool(const TensorLabel&)> drops = {};
  /// What runs again is compared, bit by bit, with a digest of the first run: an Error names what
  /// differs.
  bool verify = false;
  std::shared_ptr<TapeObserver> observer = nullptr;
};

/// The tape of one forward pass, on the thread that makes it. It records from its construction
/// until close() or its end; what the graph needs of it lives as long as the graph.
///
/// Every tensor that autograd saves meanwhile is saved through the tape. One whose storage is an
/// annotated result is remembered by its shape alone: the storage dies with its last reader in the
/// forward pass, and the first node that unpacks a view of it runs what made it again, from results
/// that are kept or, where these were annotated as well, run again before. All views share the new
/// storage, which lives until the last node that saved one is done. A function runs again at most
/// once. Tensors that somebody holds are never taken away.
class Tape {
 public:
  explicit Tape(TapeOptions options);
  ~Tape();
  Tape(const Tape&) = delete;
  Tape& operator=(const Tape&) = delete;

  /// The forward pass is over.
  void close();
  /// What follows is of this block.
  void enter_block(int64_t block);

  /// f(inputs), remembered. Use recorded().
  std::vector<at::Tensor> run(const char* name,
                              TensorFunction f,
                              const std::vector<at::Tensor>& inputs);
  void annotate(const at::Tensor& x);

  /// The one that records on this thread, null where none does or nothing asks for gradients.
  static Tape* recording();

  struct State;

 private:
  std::shared_ptr<State> state_;
};

/// x, which the backward pass may compute again instead of keeping it. Error where x is no result
/// of recorded(), as inputs of the pass, or was changed in place since.
at::Tensor checkpointed(at::Tensor x);

namespace detail {

template <typename Function, size_t... I>
auto call_with(const Function& f, const std::vector<at::Tensor>& x, std::index_sequence<I...>) {
  return f(x[I]...);
}

}  // namespace detail

/// f(inputs...), on the tape. f returns a tensor or a std::array of tensors, which depend on the
/// inputs and on what f captures alone: every activation is an input, and what f refers to (the
/// model, the batch) lives until the backward pass is over. Numbers that f draws from the CPU's
/// generator of LibTorch are the same when it runs again. It must do nothing else: what counts or
/// stores stands outside.
template <typename Function, std::same_as<at::Tensor>... Inputs>
std::invoke_result_t<Function, const Inputs&...> recorded(const char* name,
                                                          Function f,
                                                          const Inputs&... inputs) {
  using Result = std::invoke_result_t<Function, const Inputs&...>;
  Tape* const tape = Tape::recording();
  if (tape == nullptr) return f(inputs...);
  const auto on_vector = [f = std::move(f)](const std::vector<at::Tensor>& x) {
    auto result = detail::call_with(f, x, std::index_sequence_for<Inputs...>());
    if constexpr (std::same_as<Result, at::Tensor>) {
      return std::vector<at::Tensor>{std::move(result)};
    } else {
      return std::vector<at::Tensor>(result.begin(), result.end());
    }
  };
  std::vector<at::Tensor> results = tape->run(name, on_vector, {inputs...});
  if constexpr (std::same_as<Result, at::Tensor>) {
    return std::move(results[0]);
  } else {
    Result array;
    std::move(results.begin(), results.end(), array.begin());
    return array;
  }
}

}  // namespace hadal::ops
