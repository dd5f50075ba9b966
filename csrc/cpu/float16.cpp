#include "cpu/float16.h"

#include "common/multiversion.h"

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace cs336 {
namespace {

template <typename From, typename To>
[[gnu::always_inline]] inline void convert(const From* src, int64_t n, To* dst) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) dst[i] = To(float(src[i]));
}

#ifdef __x86_64__
__attribute__((target("avx,f16c"))) void widen_f16c(const Half* src, int64_t n, float* dst) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i))));
  convert(src + i, n - i, dst + i);
}

__attribute__((target("avx,f16c"))) void narrow_f16c(const float* src, int64_t n, Half* dst) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(src + i), _MM_FROUND_TO_NEAREST_INT));
  convert(src + i, n - i, dst + i);
}
#endif

}  // namespace

void widen(const Half* src, int64_t n, float* dst) {
#ifdef __x86_64__
  if (__builtin_cpu_supports("f16c")) return widen_f16c(src, n, dst);
#endif
  convert(src, n, dst);
}

void narrow(const float* src, int64_t n, Half* dst) {
#ifdef __x86_64__
  if (__builtin_cpu_supports("f16c")) return narrow_f16c(src, n, dst);
#endif
  convert(src, n, dst);
}

MULTIVERSION void widen(const BFloat16* src, int64_t n, float* dst) { convert(src, n, dst); }
MULTIVERSION void narrow(const float* src, int64_t n, BFloat16* dst) { convert(src, n, dst); }

}  // namespace cs336
