// Cross-entropy: a block a row. The forward reads it once, with the sums of an online softmax (Milakov & Gimelshein,
// arXiv:1805.02867); the backward reads it and writes its gradient; both at once, in place, read it a second time from
// the L2 cache, in which all rows at work fit.
//
// A row's vectors are dealt to its threads in turn. Their number depends on the row's length alone, and so do the bits.
#include <limits>

#include "common/async.cuh"
#include "common/dispatch.h"
#include "common/launch.h"
#include "common/nvtx.h"
#include "common/reduce.cuh"
#include "common/vec.cuh"
#include "kernels/cross_entropy.h"

namespace cs336::cuda {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kFwdThreads =
    256;                    // 4 rows a multiprocessor: more of them load while others add (254 us for 274 with 512)
constexpr int kUnroll = 4;  // vectors in flight a thread
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// ---- the soft-cap ----

struct Capped {
  float z, slope;  // cap * tanh(x / cap), dz / dx
};

__device__ __forceinline__ Capped capped(float x, float softcap) {
  if (softcap == 0.f) return {x, 1.f};
  const float e = __expf(-2.f * fabsf(x) / softcap), inverse = __fdividef(1.f, 1.f + e);
  return {copysignf(softcap * (1.f - e) * inverse, x), 4.f * e * inverse * inverse};
}

// ---- a row's vectors ----

// 16 bytes of a row from a column on. Where they are not aligned (kElements): out of the two vectors that they lie in,
// which read nothing that is not in a vector with a part of the row. The forward, which stores nothing, is faster with
// one element after the other (8192 x 50257: 263 us for 283).
template <typename T, Access kAccess>
__device__ __forceinline__ uint4 load_columns(const T* row, int column) {
  if constexpr (kAccess == Access::kVectors) return load<T>(row, column);
  const uintptr_t address = reinterpret_cast<uintptr_t>(row + column);
  const uint4* vectors = reinterpret_cast<const uint4*>(address & ~uintptr_t{15});
  const uint4 first = vectors[0];
  const unsigned skipped = address & 15;  // bytes; the same for all vectors of a row
  if (skipped == 0) return first;
  const uint4 second = vectors[1];
  uint32_t w[8] = {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w};
#pragma unroll
  for (int i = 0; i < 6; i++) w[i] = skipped & 8 ? w[i + 2] : w[i];
#pragma unroll
  for (int i = 0; i < 5; i++) w[i] = skipped & 4 ? w[i + 1] : w[i];
  const unsigned bits = 8 * (skipped & 3);
  return {__funnelshift_r(w[0], w[1], bits), __funnelshift_r(w[1], w[2], bits), __funnelshift_r(w[2], w[3], bits),
          __funnelshift_r(w[3], w[4], bits)};
}

// How a row that is written, V elements, divides into aligned vectors and what is before and behind them.
template <typename T>
struct Parts {
  int before, vectors, around;  // elements, vectors, elements

  __device__ __forceinline__ Parts(const T* out, int V) {
    const int to_vector = static_cast<int>(-reinterpret_cast<uintptr_t>(out) & 15) / static_cast<int>(sizeof(T));
    before = min(to_vector, V);
    vectors = (V - before) / kVec<T>;
    around = V - vectors * kVec<T>;
  }

  __device__ __forceinline__ int column(int vector) const { return before + vector * kVec<T>; }
  __device__ __forceinline__ int column_around(int i) const { return i < before ? i : i + vectors * kVec<T>; }
};

// ---- sums over a row ----

// Of what a thread, or the row, has seen of z: `top` is the largest, the exponentials are relative to it.
struct OnlineSums {
  float top = -kInfinity;
  float total = 0.f;     // sum of e^(z - top)
  float weighted = 0.f;  // sum of e^(z - top) (z - top), for the entropy
  float plain = 0.f;     // sum of z, for label smoothing

  __device__ __forceinline__ float shift() const { return top == -kInfinity ? 0.f : top; }

  template <bool kEntropy>
  __device__ __forceinline__ void raise(float new_top) {
    if (new_top == top) return;
    const float by = top - new_top, factor = __expf(by);
    if (kEntropy && top != -kInfinity) weighted = factor * (weighted + by * total);
    total *= factor;
    top = new_top;
  }

  template <bool kEntropy>
  __device__ __forceinline__ void add(float z, bool smoothed) {
    const float below = z - shift(), e = __expf(below);
    total += e;
    if (kEntropy) weighted += e * fmaxf(below, -1e30f);  // 0 * -inf would be NaN
    if (smoothed) plain += z;
  }
};

template <typename T>
__device__ __forceinline__ float largest(const float (&x)[kVec<T>]) {
  float top = x[0];
#pragma unroll
  for (int i = 1; i < kVec<T>; i++) top = fmaxf(top, x[i]);
  return top;
}

template <typename T, bool kEntropy, int kCount>
__device__ __forceinline__ void add_vectors(OnlineSums& sums, uint4 (&packed)[kCount], float softcap, bool smoothed) {
  float x[kVec<T>], top = -kInfinity;
#pragma unroll
  for (int u = 0; u < kCount; u++) {
    unpack<T>(packed[u], x);
    top = fmaxf(top, largest<T>(x));
  }
  sums.raise<kEntropy>(fmaxf(sums.top, capped(top, softcap).z));
#pragma unroll
  for (int u = 0; u < kCount; u++) {
    forget_derived(packed[u]);
    unpack<T>(packed[u], x);
#pragma unroll
    for (int i = 0; i < kVec<T>; i++) sums.add<kEntropy>(capped(x[i], softcap).z, smoothed);
  }
}

// This thread's share of the row. kSplit: code of its own for rows without a cap and smoothing, which would ask about
// them at each logit (4096 x 128256 bf16: 274 us for 305).
template <typename T, Access kAccess, bool kEntropy, bool kSplit>
__device__ __forceinline__ OnlineSums sums_of_thread(const T* row, int V, float softcap, bool smoothed) {
  OnlineSums sums;
  const int full = V / kVec<T>, threads = static_cast<int>(blockDim.x);
  int v = threadIdx.x;
  for (; v + (kUnroll - 1) * threads < full; v += kUnroll * threads) {
    uint4 packed[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; u++) packed[u] = load<T, kAccess>(row, (v + u * threads) * kVec<T>);
    if (kSplit && softcap == 0.f && !smoothed)
      add_vectors<T, kEntropy>(sums, packed, 0.f, false);
    else
      add_vectors<T, kEntropy>(sums, packed, softcap, smoothed);
  }
  for (; v < full; v += threads) {
    uint4 packed[1] = {load<T, kAccess>(row, v * kVec<T>)};
    add_vectors<T, kEntropy>(sums, packed, softcap, smoothed);
  }
  if (const int i = full * kVec<T> + static_cast<int>(threadIdx.x); i < V) {  // fewer than a vector
    const float z = capped(to_float(row[i]), softcap).z;
    sums.raise<kEntropy>(fmaxf(sums.top, z));
    sums.add<kEntropy>(z, smoothed);
  }
  return sums;
}

__device__ __forceinline__ float block_max(float value, float (&shared)[kMaxThreads / 32]) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value = fmaxf(value, __shfl_xor_sync(~0u, value, offset));
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  for (int warp = 0; warp < static_cast<int>(blockDim.x) / 32; warp++) value = fmaxf(value, shared[warp]);
  return value;
}

using BlockSum = RowSum<Span::kBlock, 3, kMaxThreads>;

struct RowMemory {
  float tops[kMaxThreads / 32];
  BlockSum::Shared sums;
};

template <bool kEntropy>
__device__ __forceinline__ OnlineSums sums_of_row(OnlineSums sums, RowMemory& memory) {
  sums.raise<kEntropy>(block_max(sums.top, memory.tops));
  float values[3] = {sums.total, sums.weighted, sums.plain};
  BlockSum block_sum(memory.sums, blockDim.x, 1);
  block_sum(values);
  return {sums.top, values[0], values[1], values[2]};
}

// ---- the gradient ----

// dz = p (of_p - dentropy (log p + entropy)) - spread, and at the target - share too.
struct RowGradient {
  float lse, of_p, dentropy, entropy, share, spread;

  template <bool kEntropy>
  __device__ __forceinline__ float weight(float log_p) const {
    return kEntropy ? of_p - dentropy * (fmaxf(log_p, -1e30f) + entropy) : of_p;
  }

  template <bool kEntropy>
  __device__ __forceinline__ float at(float x, float softcap) const {
    const Capped c = capped(x, softcap);
    const float log_p = c.z - lse;
    return (__expf(log_p) * weight<kEntropy>(log_p) - spread) * c.slope;
  }

  template <bool kEntropy>
  __device__ __forceinline__ float at_target(float x, float softcap) const {  // p - 1 does not cancel where p nears 1
    const Capped c = capped(x, softcap);
    const float log_p = c.z - lse;
    return (__expf(log_p) * (weight<kEntropy>(log_p) - share) + share * expm1f(log_p) - spread) * c.slope;
  }
};

__device__ __forceinline__ RowGradient row_gradient(const CrossEntropyRows& rows, bool inside, float lse, float dloss) {
  const float smoothing = rows.options.label_smoothing;
  const float of_p = dloss * (1.f + 2.f * rows.options.z_loss * lse);
  return {.lse = lse,
          .of_p = inside ? of_p : kNaN,
          .dentropy = 0.f,
          .entropy = 0.f,
          .share = dloss * (1.f - smoothing),
          .spread = dloss * smoothing / static_cast<float>(rows.V)};
}

template <typename T, bool kEntropy>
__device__ __forceinline__ void store_vector_gradient(const uint4& packed, T* out, int column, int target,
                                                      float at_target, const RowGradient& gradient, float softcap) {
  float x[kVec<T>];
  unpack<T>(packed, x);
#pragma unroll
  for (int i = 0; i < kVec<T>; i++) x[i] = gradient.at<kEntropy>(x[i], softcap);
  if (target >= column && target < column + kVec<T>) {
#pragma unroll
    for (int i = 0; i < kVec<T>; i++) x[i] = column + i == target ? at_target : x[i];
  }
  store<T>(out, column, pack<T>(x));
}

// out may be row itself: a thread writes what it has read. kAccess: of row where out has its aligned vectors.
template <typename T, Access kAccess, bool kEntropy>
__device__ __forceinline__ void store_gradient(const T* row, T* out, int V, int target, float logit_of_target,
                                               const RowGradient& gradient, float softcap) {
  const Parts<T> parts(out, V);
  const int threads = static_cast<int>(blockDim.x);
  const float at_target = gradient.at_target<kEntropy>(logit_of_target, softcap);
  int v = threadIdx.x;
  for (; v + (kUnroll - 1) * threads < parts.vectors; v += kUnroll * threads) {
    uint4 packed[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; u++) packed[u] = load_columns<T, kAccess>(row, parts.column(v + u * threads));
#pragma unroll
    for (int u = 0; u < kUnroll; u++)
      store_vector_gradient<T, kEntropy>(packed[u], out, parts.column(v + u * threads), target, at_target, gradient,
                                         softcap);
  }
  for (; v < parts.vectors; v += threads)
    store_vector_gradient<T, kEntropy>(load_columns<T, kAccess>(row, parts.column(v)), out, parts.column(v), target,
                                       at_target, gradient, softcap);
  if (static_cast<int>(threadIdx.x) < parts.around) {
    const int i = parts.column_around(threadIdx.x);
    out[i] = from_float<T>(i == target ? at_target : gradient.at<kEntropy>(to_float(row[i]), softcap));
  }
}

template <typename T>
__device__ __forceinline__ void store_zeros(T* out, int V) {
  const Parts<T> parts(out, V);
  const float zeros[kVec<T>] = {};
  for (int v = threadIdx.x; v < parts.vectors; v += blockDim.x) store<T>(out, parts.column(v), pack<T>(zeros));
  if (static_cast<int>(threadIdx.x) < parts.around) out[parts.column_around(threadIdx.x)] = from_float<T>(0.f);
}

// ---- kernels ----

// The row's target, and its logit.
struct Target {
  int index = 0;
  bool inside, ignored;
  float logit = kNaN;

  template <typename T>
  __device__ __forceinline__ Target(const CrossEntropyRows& rows, const T* row) {
    const int64_t target = rows.targets[blockIdx.x];
    ignored = target == rows.options.ignore_index;
    inside = target >= 0 && target < rows.V;
    if (ignored || !inside) return;
    index = static_cast<int>(target);
    logit = to_float(row[index]);
  }
};

// kGradient: with the gradient in the place of the logits.
template <typename T, Access kAccess, bool kEntropy, bool kGradient>
__global__ void __launch_bounds__(kGradient ? kMaxThreads : kFwdThreads, kGradient ? 1 : 4)
    cross_entropy_fwd_kernel(const CrossEntropyFwdParams p) {
  __shared__ RowMemory memory;
  const CrossEntropyOptions& options = p.rows.options;
  T* row = static_cast<T*>(const_cast<void*>(p.rows.logits)) + blockIdx.x * p.rows.stride;
  const int V = static_cast<int>(p.rows.V);
  allow_successor();
  wait_for_predecessor();
  const Target target(p.rows, row);
  float loss = 0.f, lse = 0.f, entropy = 0.f;
  if (target.ignored) {
    if constexpr (kGradient) store_zeros<T>(row, V);
  } else {
    constexpr bool kSplit = !kGradient && kAccess == Access::kVectors;  // what has registers for it
    const bool smoothed = options.label_smoothing > 0.f;
    const OnlineSums sums =
        sums_of_row<kEntropy>(sums_of_thread<T, kAccess, kEntropy, kSplit>(row, V, options.softcap, smoothed), memory);
    const float log_total = logf(sums.total), picked = capped(target.logit, options.softcap).z;
    lse = sums.top + log_total;
    entropy = log_total - sums.weighted / sums.total;
    loss = lse - picked + options.z_loss * lse * lse;
    if (smoothed) loss += options.label_smoothing * (picked - sums.plain / static_cast<float>(V));
    if constexpr (kGradient) {
      const RowGradient gradient = row_gradient(p.rows, target.inside, lse, *p.scale);
      store_gradient<T, Access::kVectors, false>(row, row, V, target.index, target.logit, gradient, options.softcap);
    }
  }
  if (threadIdx.x == 0) {
    p.loss[blockIdx.x] = loss;
    p.lse[blockIdx.x] = lse;
    if constexpr (kEntropy) p.entropy[blockIdx.x] = entropy;
  }
}

template <typename T, Access kAccess, bool kEntropy>
__global__ void __launch_bounds__(kMaxThreads / 2, 2) cross_entropy_bwd_kernel(const CrossEntropyBwdParams p) {
  const T* row = static_cast<const T*>(p.rows.logits) + blockIdx.x * p.rows.stride;
  T* out = static_cast<T*>(p.dlogits) + blockIdx.x * p.rows.V;
  const int V = static_cast<int>(p.rows.V);
  allow_successor();
  wait_for_predecessor();
  const Target target(p.rows, row);
  if (target.ignored) return store_zeros<T>(out, V);
  RowGradient gradient = row_gradient(p.rows, target.inside, p.lse[blockIdx.x], p.dloss[blockIdx.x]);
  if (p.dlse) gradient.of_p += p.dlse[blockIdx.x];
  if constexpr (kEntropy) {
    gradient.dentropy = p.dentropy[blockIdx.x];
    gradient.entropy = p.entropy[blockIdx.x];
  }
  store_gradient<T, kAccess, kEntropy>(row, out, V, target.index, target.logit, gradient, p.rows.options.softcap);
}

// ---- launchers ----

// About eight vectors a thread. max_threads: of what is read twice, two rows a multiprocessor must fit the L2 cache, or
// one if it is longer than 128 KB.
LaunchShape row_shape(const CrossEntropyRows& rows, unsigned max_threads) {
  const int64_t vecs = rows.V * size_of(rows.dtype) / 16;
  const unsigned threads = std::clamp<int64_t>((vecs / 8 + 31) / 32 * 32, 32, max_threads);
  return {.grid = dim3(static_cast<unsigned>(rows.N)), .threads = dim3(threads), .dependent = true};
}

// f(access): of N rows, the first at an address and each `stride` elements behind the one before.
template <typename T, typename F>
void dispatch_access(int64_t N, int64_t stride, const void* first, F&& f) {
  if (all_aligned(N, sizeof(T), {stride}, {first}))
    f(std::integral_constant<Access, Access::kVectors>());
  else
    f(std::integral_constant<Access, Access::kElements>());
}

}  // namespace

void cross_entropy_fwd(const CrossEntropyFwdParams& p, cudaStream_t stream) {
  NVTX_FN();
  if (p.rows.N == 0) return;
  const bool long_rows = p.rows.V * size_of(p.rows.dtype) > 128 * 1024;
  const LaunchShape shape = row_shape(p.rows, !p.scale ? kFwdThreads : long_rows ? kMaxThreads : kMaxThreads / 2);
  dispatch_dtype(p.rows.dtype, [&]<typename T>(T) {
    dispatch_access<T>(p.rows.N, p.rows.stride, p.rows.logits, [&](auto access) {
      if (p.scale)
        launch<cross_entropy_fwd_kernel<T, access.value, false, true>>(shape, stream, p);
      else
        dispatch_bool(p.entropy, [&](auto entropy) {
          launch<cross_entropy_fwd_kernel<T, access.value, entropy.value, false>>(shape, stream, p);
        });
    });
  });
}

void cross_entropy_bwd(const CrossEntropyBwdParams& p, cudaStream_t stream) {
  NVTX_FN();
  if (p.rows.N == 0) return;
  const LaunchShape shape = row_shape(p.rows, kMaxThreads / 2);
  const auto address = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); };
  const auto* apart = reinterpret_cast<const void*>(address(p.rows.logits) - address(p.dlogits));  // aligned alike?
  dispatch_dtype(p.rows.dtype, [&]<typename T>(T) {
    dispatch_access<T>(p.rows.N, p.rows.stride - p.rows.V, apart, [&](auto access) {
      dispatch_bool(p.dentropy, [&](auto entropy) {
        launch<cross_entropy_bwd_kernel<T, access.value, entropy.value>>(shape, stream, p);
      });
    });
  });
}

}  // namespace cs336::cuda
