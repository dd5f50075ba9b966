// MULTIVERSION void f(...) {...}: the compiler clones f for each instruction set and the loader picks one at start, so
// one binary is fast on any x86-64. What f calls must be inline, or it stays at the baseline.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MULTIVERSION
#endif
