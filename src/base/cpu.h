// Which instruction set the CPU kernels use.
//
// Every *_cpu.cpp is compiled once per instruction set and fills CpuSlot::kernels[isa]. The choice
// is made once, from what the processor has; tests and `--isa` force a lower one. All sets walk the
// same reduction tree (numerics contract, rule 2), so with fused multiply-add the results are the
// same bits.
#pragma once

#include <string_view>

namespace hadal {

enum class Isa { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };
inline constexpr int kNumIsas = 3;

/// The best set this processor and operating system support.
Isa detect_isa();
/// The set in use: the detected one unless force_isa() chose another.
Isa current_isa();
/// Uses `isa` from now on, on all threads. Throws InputError when the processor lacks it.
void force_isa(Isa isa);
std::string_view isa_name(Isa isa);
/// "portable", "avx2" or "avx512"; throws InputError for anything else.
Isa parse_isa(std::string_view name);

/// One CPU kernel in up to three builds. Filled by the kernel's translation units at program start.
template <typename Signature>
class CpuSlot;

template <typename... Args>
class CpuSlot<void(Args...)> {
 public:
  using Function = void (*)(Args...);
  constexpr CpuSlot() = default;
  bool fill(Isa isa, Function function) {
    functions_[static_cast<int>(isa)] = function;
    return true;
  }
  explicit operator bool() const { return functions_[0] != nullptr; }
  void operator()(Args... args) const {
    const int isa = static_cast<int>(current_isa());
    functions_[functions_[isa] != nullptr ? isa : 0](args...);
  }

 private:
  Function functions_[kNumIsas] = {};
};

}  // namespace hadal
