// MULTIVERSION void f(...) {...}: the compiler clones f for each instruction set and the loader picks one at start, so
// one binary is fast on any x86-64. What f calls must be inline, or it stays at the baseline.
#pragma once

// gcc before 12 has no clones for x86-64 levels: it builds the baseline alone, which is slower and right.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__)
#define MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MULTIVERSION
#endif
