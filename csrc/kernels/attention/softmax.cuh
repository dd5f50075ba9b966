// The running softmax of the two rows that a thread shares with three others.
#pragma once
#include "common/hopper.cuh"

namespace cs336::attention {

// How far, as a power of two, weights may exceed 1 before the output is rescaled. The maximum in use follows the true
// one only when that has outgrown it so far: no accuracy is lost, and rescaling is rare (3-9 % faster).
inline constexpr float kRescaleLog2 = 8;

// Sum or maximum over the four threads of a row.
__device__ __forceinline__ float sum_of_row(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}
__device__ __forceinline__ float max_of_row(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

template <int N>  // scores of this thread: rows e / 2 % 2
struct Softmax {
  float top[2];  // the maximum in use
  float sum[2];  // of weights, this thread's part

  static __device__ __forceinline__ float largest(const float (&s)[N], int i) {
    float x = s[2 * i], y = s[2 * i + 1];
#pragma unroll
    for (int e = 4; e < N; e += 4) x = fmaxf(x, s[e + 2 * i]), y = fmaxf(y, s[e + 2 * i + 1]);
    return max_of_row(fmaxf(x, y));
  }

  // The first block of a tile. The maximum is finite also where a row sees nothing here: all its weights are then 0.
  __device__ __forceinline__ void begin(float (&s)[N], float scale_log2) {
    constexpr float kLeast = -1e30f;
    top[0] = fmaxf(largest(s, 0), kLeast), top[1] = fmaxf(largest(s, 1), kLeast);
    sum[0] = sum[1] = 0.f;
    weights(s, scale_log2);
  }

  // A later block: scores become weights; what was summed before must be multiplied by `fade`. True if that is not 1.
  __device__ __forceinline__ bool update(float (&s)[N], float scale_log2, float (&fade)[2]) {
    bool moved = false;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float m = largest(s, i), growth = (m - top[i]) * scale_log2;
      const bool move = growth > kRescaleLog2;
      fade[i] = move ? hopper::exp2_approx(-growth) : 1.f;
      top[i] = move ? m : top[i];
      sum[i] *= fade[i];
      moved |= move;
    }
    weights(s, scale_log2);
    return moved;
  }

 private:
  __device__ __forceinline__ void weights(float (&s)[N], float scale_log2) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float shift = top[i] * scale_log2;
      float x = 0.f, y = 0.f;
#pragma unroll
      for (int e = 2 * i; e < N; e += 4) {
        s[e] = hopper::exp2_approx(fmaf(s[e], scale_log2, -shift));
        s[e + 1] = hopper::exp2_approx(fmaf(s[e + 1], scale_log2, -shift));
        x += s[e], y += s[e + 1];
      }
      sum[i] += x + y;
    }
  }
};

// tanh(x * factor), its error absolute (2^-22) as a softcap needs it: tanh.approx is off by 2^-11.
__device__ __forceinline__ float soft_capped(float x, float factor) {
  constexpr float kTwoLog2E = 2.885390081777927f;
  return 1.f - 2.f * hopper::reciprocal_approx(1.f + hopper::exp2_approx(x * (factor * kTwoLog2E)));
}

}  // namespace cs336::attention
