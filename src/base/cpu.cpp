#include "base/cpu.h"

#include <atomic>

#include "base/check.h"

namespace hadal {
namespace {

std::atomic<int> forced_isa{-1};

}  // namespace

Isa detect_isa() {
#if defined(__x86_64__)
  static const Isa isa = [] {
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0;
    const bool avx512 =
        avx2 && __builtin_cpu_supports("avx512f") != 0 && __builtin_cpu_supports("avx512bw") != 0 &&
        __builtin_cpu_supports("avx512vl") != 0 && __builtin_cpu_supports("avx512dq") != 0 &&
        __builtin_cpu_supports("avx512vbmi") != 0 && __builtin_cpu_supports("avx512bf16") != 0;
    return avx512 ? Isa::kAvx512 : avx2 ? Isa::kAvx2 : Isa::kPortable;
  }();
  return isa;
#else
  return Isa::kPortable;
#endif
}

Isa current_isa() {
  const int forced = forced_isa.load(std::memory_order_relaxed);
  return forced >= 0 ? static_cast<Isa>(forced) : detect_isa();
}

void force_isa(Isa isa) {
  HADAL_INPUT_CHECK(isa <= detect_isa(), "isa: this processor lacks ", isa_name(isa),
                    "; the best it has is ", isa_name(detect_isa()));
  forced_isa.store(static_cast<int>(isa), std::memory_order_relaxed);
}

std::string_view isa_name(Isa isa) {
  switch (isa) {
    case Isa::kPortable:
      return "portable";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
  }
  return "unknown";
}

Isa parse_isa(std::string_view name) {
  for (const Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512}) {
    if (isa_name(isa) == name) return isa;
  }
  throw InputError(concat("isa: expected portable, avx2 or avx512, found '", name, "'"));
}

}  // namespace hadal
