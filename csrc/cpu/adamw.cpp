#include "cpu/adamw.h"

#include "common/multiversion.h"
#include "cpu/float16.h"

namespace cs336::cpu {
namespace {

template <typename P, typename G>
MULTIVERSION void update(P* __restrict__ p, const G* __restrict__ g, float* __restrict__ m, float* __restrict__ v,
                         int64_t n, float grad_scale, AdamwHyper hyper, AdamwCoefficients coefficients) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    float p_i = float(p[i]);
    adamw_update(p_i, float(g[i]), grad_scale, m[i], v[i], hyper, coefficients);
    p[i] = P(p_i);
  }
}

}  // namespace

void adamw(const AdamwTensor& t, int64_t begin, int64_t end, const AdamwHyper& hyper) {
  const AdamwCoefficients coefficients = adamw_coefficients(hyper, *hyper.lr, *t.step);
  const float grad_scale = hyper.grad_scale ? *hyper.grad_scale : 1.f;
  dispatch_dtype(t.p_dtype, [&]<typename P>(P) {
    dispatch_dtype(t.g_dtype, [&]<typename G>(G) {
      update(static_cast<P*>(t.p) + begin, static_cast<const G*>(t.g) + begin, t.m + begin, t.v + begin, end - begin,
             grad_scale, hyper, coefficients);
    });
  });
}

}  // namespace cs336::cpu
