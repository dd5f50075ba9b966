// One step of AdamW (Loshchilov & Hutter, arXiv:1711.05101), shared by the CPU and the CUDA kernel:
//   m += (1 - beta1)(g - m)      v += (1 - beta2)(g^2 - v)
//   p -= lr weight_decay p + lr/(1 - beta1^t) * m / (sqrt(v)/sqrt(1 - beta2^t) + eps)
// Interpolating rounds 1 - beta alone; beta*v + (1 - beta)*g^2 rounds both, which biases v by 1e-5 at beta2 = 0.999.
// Subtracting decay and update together rounds p once.
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
  float one_minus_beta1, one_minus_beta2;
  float log_beta1, log_beta2;
  float eps, weight_decay;
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
          .one_minus_beta1 = static_cast<float>(1 - beta1),
          .one_minus_beta2 = static_cast<float>(1 - beta2),
          .log_beta1 = static_cast<float>(std::log(beta1)),
          .log_beta2 = static_cast<float>(std::log(beta2)),
          .eps = static_cast<float>(eps),
          .weight_decay = static_cast<float>(weight_decay)};
}

// 1 - beta^t as -expm1(t log beta): in float32 1 - 0.999 keeps three digits, this keeps all.
ADAMW_INLINE AdamwCoefficients adamw_coefficients(const AdamwHyper& h, float lr, float t) {
  return {.decay = lr * h.weight_decay,
          .step_size = lr / -std::expm1(t * h.log_beta1),
          .rsqrt_bias2 = 1.f / std::sqrt(-std::expm1(t * h.log_beta2))};
}

// Exact at both ends, as torch.lerp.
ADAMW_INLINE float adamw_lerp(float from, float to, float weight) {
  const float difference = to - from;
  return weight < 0.5f ? from + weight * difference : to + (weight - 1.f) * difference;
}

ADAMW_INLINE void adamw_update(float& p, float g, float& m, float& v, const AdamwHyper& h, const AdamwCoefficients& c) {
  m = adamw_lerp(m, g, h.one_minus_beta1);
  v = adamw_lerp(v, g * g, h.one_minus_beta2);
  p -= c.decay * p + c.step_size * (m / (std::sqrt(v) * c.rsqrt_bias2 + h.eps));
}

}  // namespace cs336
