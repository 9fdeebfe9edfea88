// What every file of this folder builds on: the instruction set that is being compiled.
//
// A translation unit (../*_avx2.cpp and so on) is compiled with the flags of one instruction set
// and says which by two macros, before it includes anything from here:
//
//   MOSO_FAST_VARIANT   the namespace of its kernels
//   VL                  floats in a vector
//
// Each file includes what it needs, so that their order does not matter, and puts all it defines
// into that namespace. It calls no inline function of anybody else's, the standard library's
// templates and containers included: of equal inline functions the linker keeps one copy for all
// instruction sets, and the copy that it takes may be one that this processor cannot run.
// tests/native/cpu/test_cpu_isolation.py holds all three rules.
#pragma once

#if !defined(MOSO_FAST_VARIANT) || !defined(VL)
#error "define MOSO_FAST_VARIANT and VL, see above"
#endif

#include <cstddef>
#include <cstdint>
#include <cstring>
#if defined(MOSO_FAST_X86) && VL > 4
#include <immintrin.h>
#endif

#include "jobs.h"

#define MOSO_INLINE inline __attribute__((always_inline))

// Instructions for bfloat16 products may be compiled in where the processor lacks them: they are
// reached by Problem::bf16_products alone.
#if VL == 16 && !defined(MOSO_FAST_NO_AVX512BF16)
#define MOSO_FAST_BF16_UNITS 1
#endif
