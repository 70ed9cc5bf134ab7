// A kernel that may be absent from this build.
//
// The slot is declared beside the op and constant-initialised empty; the translation unit of the
// kernel fills it while the program starts. A build without that unit leaves it empty and the op
// takes its reference.
#pragma once

#include <string_view>

namespace hadal {

template <typename Signature>
class KernelSlot;

template <typename... Args>
class KernelSlot<void(Args...)> {
 public:
  using Function = void (*)(Args...);
  constexpr KernelSlot() = default;
  /// Returns true, so that a namespace-scope constant can do the filling.
  bool fill(Function function) {
    function_ = function;
    return true;
  }
  explicit operator bool() const { return function_ != nullptr; }
  void operator()(Args... args) const { function_(args...); }

 private:
  Function function_ = nullptr;
};

}  // namespace hadal
