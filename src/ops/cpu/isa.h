// The instruction set a *_cpu.cpp file is being compiled for.
#pragma once

#include "base/cpu.h"

namespace hadal::ops::cpu::HADAL_ISA {

#if defined(HADAL_ISA_avx512)
inline constexpr Isa kIsa = Isa::kAvx512;
#elif defined(HADAL_ISA_avx2)
inline constexpr Isa kIsa = Isa::kAvx2;
#else
inline constexpr Isa kIsa = Isa::kPortable;
#endif

}  // namespace hadal::ops::cpu::HADAL_ISA
