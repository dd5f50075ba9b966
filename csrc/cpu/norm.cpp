#include "cpu/norm.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>

#include "common/multiversion.h"
#include "cpu/float16.h"

#define INLINE __attribute__((always_inline))

namespace cs336 {
namespace {

constexpr int kWidth = 8, kParts = 4;  // enough additions in flight on any machine, in one order on all
constexpr int kBlock = 1024;           // elements summed before they join the total, which rounds more coarsely
using Vec = float __attribute__((vector_size(kWidth * sizeof(float))));
#pragma GCC diagnostic ignored "-Wpsabi"  // a Vec is never passed: everything that takes one is inlined

// K sums over i in [0, n): add(at, s) adds to s[0], ..., s[K - 1] the terms of i, where at(p) stands for p[i]. It is
// called for kWidth of them at once where that is possible.
template <int K, typename F>
INLINE inline std::array<float, K> sums(int64_t n, F add) {
  Vec total[K] = {};
  int64_t i = 0;
  auto next = [&](const float* p) INLINE {
    Vec v;
    __builtin_memcpy(&v, p + i, sizeof(v));
    return v;
  };
  while (i + kWidth <= n) {
    Vec s[kParts][K] = {};
    const int64_t end = std::min(n, i + kBlock);
    while (i + kParts * kWidth <= end) {
      for (auto& part : s) {
        add(next, part);
        i += kWidth;
      }
    }
    for (; i + kWidth <= end; i += kWidth) add(next, s[0]);
    for (int k = 0; k < K; k++) total[k] += (s[0][k] + s[1][k]) + (s[2][k] + s[3][k]);
  }
  std::array<float, K> rest = {};
  for (; i < n; i++) add([&](const float* p) INLINE { return p[i]; }, rest.data());
  for (int k = 0; k < K; k++) {
    const Vec v = total[k];
    rest[k] += ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
  }
  return rest;
}

// A row in float32: its own memory, or a copy in scratch.
inline const float* read(const float* row, int64_t, float*) { return row; }

template <typename T>
const float* read(const T* row, int64_t n, float* scratch) {
  widen(row, n, scratch);
  return scratch;
}

// Where to compute a row before it is written.
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

template <typename T, bool kCentred>
MULTIVERSION void fwd(NormFwdParams p, int64_t first, int64_t last) {
  const int64_t N = p.N;
  const float *w = p.w, *b = p.b;
  const auto scratch = std::make_unique_for_overwrite<float[]>(2 * N);
  float *scratch_x = scratch.get(), *scratch_y = scratch.get() + N;
  for (int64_t m = first; m < last; m++) {
    const float* x = read(static_cast<const T*>(p.x) + m * p.x_stride, N, scratch_x);
    if (p.residual) {
      const float* residual = read(static_cast<const T*>(p.residual) + m * p.residual_stride, N, scratch_y);
      T* added_row = static_cast<T*>(p.sum) + m * N;
      float* added = place(added_row, scratch_y);
#pragma omp simd
      for (int64_t i = 0; i < N; i++) added[i] = x[i] + residual[i];
      write(added, N, added_row);
      x = read(added_row, N, scratch_x);
    }
    float mean = 0.f;
    if constexpr (kCentred) p.mean[m] = mean = sums<1>(N, [&](auto at, auto* s) INLINE { s[0] += at(x); })[0] / N;
    const auto [squares] = sums<1>(N, [&](auto at, auto* s) INLINE {
      const auto d = at(x) - mean;
      s[0] += d * d;
    });
    const float rstd = p.rstd[m] = 1.f / std::sqrt(squares / N + p.eps);
    T* y_row = static_cast<T*>(p.y) + m * N;
    float* y = place(y_row, scratch_y);
    if (kCentred && b) {
#pragma omp simd
      for (int64_t i = 0; i < N; i++) y[i] = (x[i] - mean) * rstd * w[i] + b[i];
    } else {
#pragma omp simd
      for (int64_t i = 0; i < N; i++) y[i] = (x[i] - mean) * rstd * w[i];
    }
    write(y, N, y_row);
  }
}

template <typename T, bool kCentred>
MULTIVERSION void bwd(NormBwdParams p, int64_t first, int64_t last) {
  const int64_t N = p.N;
  const float* w = p.w;
  const auto scratch = std::make_unique_for_overwrite<float[]>(3 * N);
  float *scratch_x = scratch.get(), *scratch_dy = scratch.get() + N, *scratch_dx = scratch.get() + 2 * N;
  for (int64_t chunk = first; chunk < last; chunk++) {
    float *dw = p.dw_partials + chunk * N, *db = p.db_partials + chunk * N;
    std::fill_n(dw, N, 0.f);
    if (kCentred) std::fill_n(db, N, 0.f);
    for (int64_t m = chunk * p.chunk; m < std::min(p.M, (chunk + 1) * p.chunk); m++) {
      const float* x = read(static_cast<const T*>(p.x) + m * p.x_stride, N, scratch_x);
      const float* dy = read(static_cast<const T*>(p.dy) + m * p.dy_stride, N, scratch_dy);
      T* dx_row = static_cast<T*>(p.dx) + m * N;
      float* dx = place(dx_row, scratch_dx);
      const float rstd = p.rstd[m], mean = kCentred ? p.mean[m] : 0.f;
      const auto along = sums<kCentred ? 2 : 1>(N, [&](auto at, auto* s) INLINE {
        const auto wdy = at(dy) * at(w);
        s[0] += wdy * (at(x) - mean);
        if constexpr (kCentred) s[1] += wdy;
      });
      const float along_xhat = along[0] * rstd / N, along_1 = kCentred ? along[kCentred] / N : 0.f;
#pragma omp simd
      for (int64_t i = 0; i < N; i++) {
        const float xhat = (x[i] - mean) * rstd;
        dx[i] = (dy[i] * w[i] - along_1 - xhat * along_xhat) * rstd;
        dw[i] += dy[i] * xhat;
        if constexpr (kCentred) db[i] += dy[i];
      }
      if (p.dsum) {
        const float* dsum = read(static_cast<const T*>(p.dsum) + m * p.dsum_stride, N, scratch_dy);
#pragma omp simd
        for (int64_t i = 0; i < N; i++) dx[i] += dsum[i];
      }
      write(dx, N, dx_row);
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

// f(T()) with the element type of dtype.
template <typename F>
void dispatch_dtype(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::F32:
      return f(float());
    case Dtype::F16:
      return f(Half());
    case Dtype::BF16:
      return f(BFloat16());
  }
}

}  // namespace

void norm_fwd(const NormFwdParams& p, int64_t first, int64_t last) {
  dispatch_dtype(p.dtype,
                 [&]<typename T>(T) { return p.mean ? fwd<T, true>(p, first, last) : fwd<T, false>(p, first, last); });
}

void norm_bwd(const NormBwdParams& p, int64_t first, int64_t last) {
  dispatch_dtype(p.dtype,
                 [&]<typename T>(T) { return p.mean ? bwd<T, true>(p, first, last) : bwd<T, false>(p, first, last); });
}

void norm_bwd_reduce(const float* partials, int64_t num_chunks, int64_t N, int64_t begin, int64_t end, void* out,
                     Dtype dtype) {
  constexpr int64_t kBlock = 512;
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

}  // namespace cs336
