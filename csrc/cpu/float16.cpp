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

template <typename T>
[[gnu::always_inline]] inline void normalise_all(const float* x, int64_t n, float mean, float scale, const float* w,
                                                 const float* b, T* y) {
  if (b) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) y[i] = T((x[i] - mean) * scale * w[i] + b[i]);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) y[i] = T((x[i] - mean) * scale * w[i]);
  }
}

template <typename T>
[[gnu::always_inline]] inline void add_all(const T* a, const T* b, int64_t n, T* sum) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) sum[i] = T(float(a[i]) + float(b[i]));
}

#ifdef __x86_64__
#define F16C __attribute__((target("avx,f16c")))

F16C inline __m256 load(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }

F16C inline void store(Half* p, __m256 values) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT));
}

F16C void widen_f16c(const Half* src, int64_t n, float* dst) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) _mm256_storeu_ps(dst + i, load(src + i));
  convert(src + i, n - i, dst + i);
}

F16C void narrow_f16c(const float* src, int64_t n, Half* dst) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) store(dst + i, _mm256_loadu_ps(src + i));
  convert(src + i, n - i, dst + i);
}

F16C void normalise_f16c(const float* x, int64_t n, float mean, float scale, const float* w, const float* b, Half* y) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    __m256 v = (_mm256_loadu_ps(x + i) - mean) * scale * _mm256_loadu_ps(w + i);
    if (b) v += _mm256_loadu_ps(b + i);
    store(y + i, v);
  }
  normalise_all(x + i, n - i, mean, scale, w + i, b ? b + i : b, y + i);
}

F16C void add_f16c(const Half* a, const Half* b, int64_t n, Half* sum) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) store(sum + i, _mm256_add_ps(load(a + i), load(b + i)));
  add_all(a + i, b + i, n - i, sum + i);
}

#define WITH_F16C(call) \
  if (__builtin_cpu_supports("f16c")) return call
#else
#define WITH_F16C(call)
#endif

}  // namespace

void widen(const Half* src, int64_t n, float* dst) {
  WITH_F16C(widen_f16c(src, n, dst));
  convert(src, n, dst);
}

void narrow(const float* src, int64_t n, Half* dst) {
  WITH_F16C(narrow_f16c(src, n, dst));
  convert(src, n, dst);
}

void normalise(const float* x, int64_t n, float mean, float scale, const float* w, const float* b, Half* y) {
  WITH_F16C(normalise_f16c(x, n, mean, scale, w, b, y));
  normalise_all(x, n, mean, scale, w, b, y);
}

void add(const Half* a, const Half* b, int64_t n, Half* sum) {
  WITH_F16C(add_f16c(a, b, n, sum));
  add_all(a, b, n, sum);
}

MULTIVERSION void widen(const BFloat16* src, int64_t n, float* dst) { convert(src, n, dst); }
MULTIVERSION void narrow(const float* src, int64_t n, BFloat16* dst) { convert(src, n, dst); }
MULTIVERSION void normalise(const float* x, int64_t n, float mean, float scale, const float* w, const float* b,
                            BFloat16* y) {
  normalise_all(x, n, mean, scale, w, b, y);
}
MULTIVERSION void normalise(const float* x, int64_t n, float mean, float scale, const float* w, const float* b,
                            float* y) {
  normalise_all(x, n, mean, scale, w, b, y);
}
MULTIVERSION void add(const BFloat16* a, const BFloat16* b, int64_t n, BFloat16* sum) { add_all(a, b, n, sum); }
MULTIVERSION void add(const float* a, const float* b, int64_t n, float* sum) { add_all(a, b, n, sum); }

}  // namespace cs336
