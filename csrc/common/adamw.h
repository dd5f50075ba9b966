// One step of AdamW (Loshchilov & Hutter, arXiv:1711.05101), shared by the CPU and the CUDA kernel:
//   m += (1 - beta1)(g - m)      v += (1 - beta2)(g^2 - v)
//   p -= lr weight_decay p + lr/(1 - beta1^t) * m / (sqrt(v)/sqrt(1 - beta2^t) + eps)
// Interpolating rounds 1 - beta alone; beta*v + (1 - beta)*g^2 rounds both, which biases v by 1e-5 at beta2 = 0.999.
// Subtracting decay and update together rounds p once. On a GPU every float32 rounds where it does in the reference,
// cs336/ops/ref/adamw.py on that GPU, and both give the same bits: a product is fused with a sum where torch.lerp does
// it, and nowhere else.
#pragma once
#include <cmath>
#include <cstdint>

#include "common/dtype.h"

#ifdef __CUDACC__
#define ADAMW_INLINE __host__ __device__ __forceinline__
#else
#define ADAMW_INLINE [[gnu::always_inline]] inline
#endif

namespace cs336 {

struct AdamwTensor {  // one parameter: four dense arrays of numel elements in one order
  void* p;
  const void* g;
  float* m;
  float* v;
  const float* step;  // one element: t, from 1
  int64_t numel;
  Dtype p_dtype, g_dtype;
  int16_t* remainder = nullptr;  // beside a bf16 p: what its bits, as the upper half of fp32's, are to be added to
};

struct AdamwHyper {
  const float* lr;          // one element
  const float* grad_scale;  // one element that multiplies the gradients, or null
  double log_beta1, log_beta2, weight_decay;
  float one_minus_beta1, one_minus_beta2, eps;
};

struct AdamwCoefficients {
  float decay;        // lr * weight_decay
  float step_size;    // lr / (1 - beta1^t)
  float rsqrt_bias2;  // 1 / sqrt(1 - beta2^t)
};

inline AdamwHyper adamw_hyper(const float* lr, const float* grad_scale, double beta1, double beta2, double eps,
                              double weight_decay) {
  return {.lr = lr,
          .grad_scale = grad_scale,
          .log_beta1 = std::log(beta1),
          .log_beta2 = std::log(beta2),
          .weight_decay = weight_decay,
          .one_minus_beta1 = static_cast<float>(1 - beta1),
          .one_minus_beta2 = static_cast<float>(1 - beta2),
          .eps = static_cast<float>(eps)};
}

// In float64, where 1 - beta^t is -expm1(t log beta): in float32 1 - 0.999 keeps three digits.
ADAMW_INLINE AdamwCoefficients adamw_coefficients(const AdamwHyper& h, double lr, double t) {
  return {.decay = static_cast<float>(lr * h.weight_decay),
          .step_size = static_cast<float>(lr / -std::expm1(t * h.log_beta1)),
          .rsqrt_bias2 = static_cast<float>(1 / std::sqrt(-std::expm1(t * h.log_beta2)))};
}

ADAMW_INLINE float adamw_product(float a, float b) {  // rounded
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

// Exact at both ends, as torch.lerp, whose product is fused with its sum.
ADAMW_INLINE float adamw_lerp(float from, float to, float weight) {
  const float difference = to - from;
  return weight < 0.5f ? from + weight * difference : to + (weight - 1.f) * difference;
}

ADAMW_INLINE void adamw_update(float& p, float g, float grad_scale, float& m, float& v, const AdamwHyper& h,
                               const AdamwCoefficients& c) {
  g = adamw_product(g, grad_scale);
  m = adamw_lerp(m, g, h.one_minus_beta1);
  v = adamw_lerp(v, adamw_product(g, g), h.one_minus_beta2);
  const float update = m / (adamw_product(std::sqrt(v), c.rsqrt_bias2) + h.eps);
  p -= adamw_product(p, c.decay) + adamw_product(update, c.step_size);
}

}  // namespace cs336
