#include "cpu/norm.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <type_traits>

#include "common/multiversion.h"
#include "cpu/float16.h"

#define INLINE __attribute__((always_inline))

namespace cs336::cpu {
namespace {

constexpr int kWidth = 8, kParts = 4;  // enough additions in flight on any machine, in one order on all
constexpr int64_t kBlock = 1024;       // features at a time: their float32 values stay in the first-level cache
constexpr int64_t kRow = 32768;        // most features of a 16-bit row that is widened once and kept: 1.2-1.6x as fast
using Vec = float __attribute__((vector_size(kWidth * sizeof(float))));
#pragma GCC diagnostic ignored "-Wpsabi"  // a Vec is never passed: everything that takes one is inlined

// K sums over i in [0, n): add(at, s) adds to s[0], ..., s[K - 1] the terms of i, where at(p) stands for p[i]. It is
// called for kWidth of them at once where that is possible.
template <int K, typename F>
INLINE inline std::array<float, K> sums(int64_t n, F add) {
  Vec s[kParts][K] = {};
  int64_t i = 0;
  auto next = [&](const float* p) INLINE {
    Vec v;
    __builtin_memcpy(&v, p + i, sizeof(v));
    return v;
  };
  while (i + kParts * kWidth <= n) {
    for (auto& part : s) {
      add(next, part);
      i += kWidth;
    }
  }
  for (; i + kWidth <= n; i += kWidth) add(next, s[0]);
  std::array<float, K> total = {};
  for (; i < n; i++) add([&](const float* p) INLINE { return p[i]; }, total.data());
  for (int k = 0; k < K; k++) {
    const Vec v = (s[0][k] + s[1][k]) + (s[2][k] + s[3][k]);
    total[k] += ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
  }
  return total;
}

// n elements of a row in float32: their own memory, or a copy in scratch, which may be there already.
inline const float* read(const float* row, int64_t, float*, bool = false) { return row; }

template <typename T>
const float* read(const T* row, int64_t n, float* scratch, bool copied = false) {
  if (!copied) widen(row, n, scratch);
  return scratch;
}

// Where to compute elements of a row before they are written.
inline float* place(float* row, float*) { return row; }

template <typename T>
float* place(T*, float* scratch) {
  return scratch;
}

inline void write(const float*, int64_t, float*) {}

template <typename T>
void write(const float* values, int64_t n, T* row) {
  narrow(values, n, row);
}

// Mean and sum of squared deviations, a block at a time: Chan, Golub & LeVeque 1979. Not centred, the mean stays 0.
struct Moments {
  float mean = 0.f, squares = 0.f;

  template <bool kCentred>
  INLINE inline void add(const float* x, int64_t n, int64_t before) {
    float block_mean = 0.f;
    if constexpr (kCentred) block_mean = sums<1>(n, [&](auto at, auto* s) INLINE { s[0] += at(x); })[0] / n;
    squares += sums<1>(n, [&](auto at, auto* s) INLINE {
      const auto d = at(x) - block_mean;
      s[0] += d * d;
    })[0];
    if (before == 0) {
      mean = block_mean;
    } else if constexpr (kCentred) {
      const float delta = block_mean - mean, share = static_cast<float>(n) / (before + n);
      mean += delta * share;
      squares += delta * delta * share * before;
    }
  }
};

template <typename T, bool kCentred>
MULTIVERSION void fwd(NormFwdParams p, int64_t first, int64_t last) {
  const int64_t N = p.N;
  alignas(64) float scratch_x[std::is_same_v<T, float> ? 1 : kRow];
  const bool kept = !std::is_same_v<T, float> && N <= kRow;
  for (int64_t m = first; m < last; m++) {
    const T* x_row = static_cast<const T*>(p.x) + m * p.x_stride;
    const T* residual_row = static_cast<const T*>(p.residual) + m * p.residual_stride;
    T *sum_row = static_cast<T*>(p.sum) + m * N, *y_row = static_cast<T*>(p.y) + m * N;
    Moments moments;
    for (int64_t i = 0; i < N; i += kBlock) {
      const int64_t n = std::min(kBlock, N - i);
      if (p.residual) add(x_row + i, residual_row + i, n, sum_row + i);
      const float* x = read((p.residual ? sum_row : x_row) + i, n, scratch_x + (kept ? i : 0));
      moments.add<kCentred>(x, n, i);
    }
    const float mean = moments.mean, rstd = 1.f / std::sqrt(moments.squares / N + p.eps);
    if constexpr (kCentred) p.mean[m] = mean;
    p.rstd[m] = rstd;
    for (int64_t i = 0; i < N; i += kBlock) {
      const int64_t n = std::min(kBlock, N - i);
      const float* x = read((p.residual ? sum_row : x_row) + i, n, scratch_x + (kept ? i : 0), kept);
      normalise(x, n, mean, rstd, p.w + i, p.b ? p.b + i : nullptr, y_row + i);
    }
  }
}

template <typename T, bool kCentred>
MULTIVERSION void bwd(NormBwdParams p, int64_t first, int64_t last) {
  const int64_t N = p.N;
  float scratch_x[kBlock], scratch_dy[kBlock], scratch_dx[kBlock];
  for (int64_t chunk = first; chunk < last; chunk++) {
    std::fill_n(p.dw_partials + chunk * N, N, 0.f);
    if (kCentred) std::fill_n(p.db_partials + chunk * N, N, 0.f);
    for (int64_t m = chunk * p.chunk; m < std::min(p.M, (chunk + 1) * p.chunk); m++) {
      const T* x_row = static_cast<const T*>(p.x) + m * p.x_stride;
      const T* dy_row = static_cast<const T*>(p.dy) + m * p.dy_stride;
      const T* dsum_row = static_cast<const T*>(p.dsum) + m * p.dsum_stride;
      T* dx_row = static_cast<T*>(p.dx) + m * N;
      const float rstd = p.rstd[m], mean = kCentred ? p.mean[m] : 0.f;
      float along_xhat = 0.f, along_1 = 0.f;  // how much of dy * w points there, on average; none of it reaches dx
      for (int64_t i = 0; i < N; i += kBlock) {
        const int64_t n = std::min(kBlock, N - i);
        const float *x = read(x_row + i, n, scratch_x), *dy = read(dy_row + i, n, scratch_dy), *w = p.w + i;
        const auto along = sums<kCentred ? 2 : 1>(n, [&](auto at, auto* s) INLINE {
          const auto wdy = at(dy) * at(w);
          s[0] += wdy * (at(x) - mean);
          if constexpr (kCentred) s[1] += wdy;
        });
        along_xhat += along[0] * rstd / N;
        if constexpr (kCentred) along_1 += along[1] / N;
      }
      for (int64_t i = 0; i < N; i += kBlock) {
        const int64_t n = std::min(kBlock, N - i);
        const float* x = read(x_row + i, n, scratch_x, N <= kBlock);
        const float *dy = read(dy_row + i, n, scratch_dy, N <= kBlock), *w = p.w + i;
        float *dx = place(dx_row + i, scratch_dx), *dw = p.dw_partials + chunk * N + i;
        float* db = p.db_partials + chunk * N + i;
#pragma omp simd
        for (int64_t j = 0; j < n; j++) {
          const float xhat = (x[j] - mean) * rstd;
          dx[j] = (dy[j] * w[j] - along_1 - xhat * along_xhat) * rstd;
          dw[j] += dy[j] * xhat;
          if constexpr (kCentred) db[j] += dy[j];
        }
        if (p.dsum) {
          const float* dsum = read(dsum_row + i, n, scratch_dy);
#pragma omp simd
          for (int64_t j = 0; j < n; j++) dx[j] += dsum[j];
        }
        write(dx, n, dx_row + i);
      }
    }
  }
}

MULTIVERSION void add_rows(const float* rows, int64_t num_rows, int64_t stride, int64_t width, float* sums) {
  std::fill_n(sums, width, 0.f);
  for (int64_t m = 0; m < num_rows; m++) {
#pragma omp simd
    for (int64_t i = 0; i < width; i++) sums[i] += rows[m * stride + i];
  }
}

}  // namespace

void norm_fwd(const NormFwdParams& p, int64_t first, int64_t last) {
  dispatch_dtype(
      p.dtype, [&]<typename T>(T) { return p.centred ? fwd<T, true>(p, first, last) : fwd<T, false>(p, first, last); });
}

void norm_bwd(const NormBwdParams& p, int64_t first, int64_t last) {
  dispatch_dtype(
      p.dtype, [&]<typename T>(T) { return p.centred ? bwd<T, true>(p, first, last) : bwd<T, false>(p, first, last); });
}

void norm_bwd_reduce(const float* partials, int64_t num_chunks, int64_t N, int64_t begin, int64_t end, void* out,
                     Dtype dtype) {
  float scratch[kBlock];
  dispatch_dtype(dtype, [&]<typename T>(T) {
    for (int64_t n = begin; n < end; n += kBlock) {
      const int64_t width = std::min(kBlock, end - n);
      T* row = static_cast<T*>(out) + n;
      float* sums = place(row, scratch);
      add_rows(partials + n, num_chunks, N, width, sums);
      write(sums, width, row);
    }
  });
}

void to_floats(const void* src, Dtype dtype, int64_t n, float* dst) {
  dispatch_dtype(dtype, [&]<typename T>(T) {
    const T* row = static_cast<const T*>(src);
    const float* values = read(row, n, dst);
    if (values != dst) std::copy_n(values, n, dst);
  });
}

}  // namespace cs336::cpu
