// Plain C++ that g++ vectorises for AVX-512, AVX2 and neither: for kernels that any x86-64 CPU runs.
#pragma once

#include <stdlib.h>  // says whether there is glibc

#ifdef __GLIBC__
#define FOR_EACH_CPU __attribute__((target_clones("avx512f", "avx2", "default")))  // chosen when the library is loaded
#else
#define FOR_EACH_CPU
#endif
#define INLINE __attribute__((always_inline))  // into the variant of each CPU
