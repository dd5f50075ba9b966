#include "cpu/adamw.h"

#include "common/multiversion.h"
#include "cpu/float16.h"

namespace cs336 {
namespace {

template <typename P, typename G>
MULTIVERSION void update(P* __restrict__ p, const G* __restrict__ g, float* __restrict__ m, float* __restrict__ v,
                         int64_t n, float grad_scale, AdamwCoefficients c) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    float p_i = float(p[i]);
    adamw_update(p_i, float(g[i]) * grad_scale, m[i], v[i], c);
    p[i] = P(p_i);
  }
}

template <typename P, typename G>
void update_range(const AdamwTensor& t, int64_t begin, int64_t end, float grad_scale, const AdamwCoefficients& c) {
  update(static_cast<P*>(t.p) + begin, static_cast<const G*>(t.g) + begin, t.m + begin, t.v + begin, end - begin,
         grad_scale, c);
}

template <typename P>
void update_range_of(const AdamwTensor& t, int64_t begin, int64_t end, float grad_scale, const AdamwCoefficients& c) {
  switch (t.g_dtype) {
    case Dtype::F32:
      return update_range<P, float>(t, begin, end, grad_scale, c);
    case Dtype::F16:
      return update_range<P, Half>(t, begin, end, grad_scale, c);
    case Dtype::BF16:
      return update_range<P, BFloat16>(t, begin, end, grad_scale, c);
  }
}

}  // namespace

void adamw_range(const AdamwTensor& t, int64_t begin, int64_t end, float grad_scale, const AdamwCoefficients& c) {
  switch (t.p_dtype) {
    case Dtype::F32:
      return update_range_of<float>(t, begin, end, grad_scale, c);
    case Dtype::F16:
      return update_range_of<Half>(t, begin, end, grad_scale, c);
    case Dtype::BF16:
      return update_range_of<BFloat16>(t, begin, end, grad_scale, c);
  }
}

}  // namespace cs336
