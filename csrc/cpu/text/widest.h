// One binary for every x86-64: a function marked so is compiled for several, and the loader takes the widest that the
// machine has.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CS336_WIDEST __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define CS336_WIDEST
#endif
