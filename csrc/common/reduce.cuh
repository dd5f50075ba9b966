// Sums over the threads that share a row: part of a warp, some warps of a block, or a cluster of blocks. Every thread
// gets the same bits, and the order of the sum depends only on how many threads share the row.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "common/device.h"

namespace cs336 {

// lanes: a power of two, at most 32; neighbouring groups of that many lanes sum on their own.
template <int K>
__device__ __forceinline__ void warp_sum(float (&values)[K], int lanes = 32) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    if (offset < lanes) {
#pragma unroll
      for (int k = 0; k < K; k++) values[k] += __shfl_xor_sync(~0u, values[k], offset);
    }
  }
}

__device__ __forceinline__ int cluster_rank() {
  int rank = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}

__device__ __forceinline__ int cluster_index() {
  int index = blockIdx.x;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(index));
#endif
  return index;
}

__device__ __forceinline__ int num_clusters() {
  int num = gridDim.x;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%nclusterid.x;" : "=r"(num));
#endif
  return num;
}

// Floats sent to every block of a cluster. They travel with their own arrival count (st.async): a cluster barrier would
// make each row wait until the stores of the row before it are visible (2.8 instead of 3.6 TB/s, H200, N = 32768).
struct ClusterExchange {
#if __CUDA_ARCH__ >= 900
  static __device__ __forceinline__ uint32_t address(const void* shared) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  }

  static __device__ void open(uint64_t* barriers, int count) {
    if (threadIdx.x == 0)
      for (int i = 0; i < count; i++)
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address(barriers + i)));
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  }

  static __device__ void wait_until_open() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }

  static __device__ __forceinline__ void expect(uint64_t* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(barrier)), "r"(bytes)
                 : "memory");
  }

  static __device__ __forceinline__ void send(float* slot, float value, uint64_t* barrier, int rank) {
    asm volatile(
        "{\n"
        ".reg .b32 slot, barrier;\n"
        "mapa.shared::cluster.u32 slot, %0, %3;\n"
        "mapa.shared::cluster.u32 barrier, %2, %3;\n"
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [slot], %1, [barrier];\n"
        "}" ::"r"(address(slot)),
        "f"(value), "r"(address(barrier)), "r"(rank)
        : "memory");
  }

  static __device__ __forceinline__ void wait(uint64_t* barrier, int parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"  // acquire.cluster would empty the L1 cache
        "@!done bra again;\n"
        "}" ::"r"(address(barrier)),
        "r"(parity)
        : "memory");
  }
#else
  static __device__ void open(uint64_t*, int) {}
  static __device__ void wait_until_open() {}
  static __device__ void expect(uint64_t*, int) {}
  static __device__ void send(float*, float, uint64_t*, int) {}
  static __device__ void wait(uint64_t*, int) {}
#endif
};

// Sums up to K values at a time, over `threads` threads of this block and, with kBlock, of all `cluster` blocks.
// Successive sums alternate between two buffers, so one barrier each is enough: no thread can be two sums ahead of
// another. Every warp adds up all warps' sums for itself.
template <Span kSpan, int K, int kMaxThreads>
class RowSum {
  static constexpr int kSlots = kSpan == Span::kLanes ? 1 : kMaxCluster * kMaxThreads / 32;

 public:
  struct Shared {
    uint64_t barriers[2];
    float sums[2][K][kSlots];
  };

  __device__ RowSum(Shared& shared, int threads, int cluster) : shared_(shared), threads_(threads), cluster_(cluster) {
    if constexpr (kSpan != Span::kLanes) {
      const int warps = threads / 32;
      first_slot_ = kSpan == Span::kWarps ? threadIdx.x / threads * warps : 0;
      slots_ = warps * cluster;
      lanes_ = slots_ > 16 ? 32 : slots_ > 8 ? 16 : slots_ > 4 ? 8 : slots_ > 2 ? 4 : slots_;
      if (kSpan == Span::kBlock && cluster > 1) ClusterExchange::open(shared_.barriers, 2);
    }
  }

  template <int L>
  __device__ __forceinline__ void operator()(float (&values)[L]) {
    static_assert(L <= K);
    if constexpr (kSpan == Span::kLanes) {
      warp_sum(values, threads_);
    } else {
      warp_sum(values);
      auto& sums = share(values);
      const int lane = threadIdx.x % lanes_;
#pragma unroll
      for (int k = 0; k < L; k++) {
        values[k] = lane < slots_ ? sums[k][first_slot_ + lane] : 0.f;
        for (int i = lane + 32; i < slots_; i += 32) values[k] += sums[k][i];
      }
      warp_sum(values, lanes_);
    }
  }

 private:
  // Puts the values of every warp of the row where every warp sees them.
  template <int L>
  __device__ __forceinline__ const float (&share(const float (&values)[L])) [K][kSlots] {
    auto& sums = shared_.sums[count_ & 1];
    if (kSpan == Span::kBlock && cluster_ > 1)
      exchange(sums, values);
    else
      publish(sums, values);
    count_++;
    return sums;
  }

  template <int L>
  __device__ __forceinline__ void publish(float (&sums)[K][kSlots], const float (&values)[L]) {
    if (threadIdx.x % 32 == 0) {
#pragma unroll
      for (int k = 0; k < L; k++) sums[k][threadIdx.x / 32] = values[k];
    }
    if constexpr (kSpan == Span::kWarps)
      asm volatile("bar.sync %0, %1;" ::"r"(1 + threadIdx.x / threads_), "r"(threads_) : "memory");
    else
      __syncthreads();
  }

  template <int L>
  __device__ __forceinline__ void exchange(float (&sums)[K][kSlots], const float (&values)[L]) {
    if (count_ == 0) ClusterExchange::wait_until_open();
    uint64_t* barrier = &shared_.barriers[count_ & 1];
    if (threadIdx.x == 0) ClusterExchange::expect(barrier, slots_ * L * sizeof(float));
    const int slot = (cluster_rank() * threads_ + threadIdx.x) / 32, peer = threadIdx.x % 32;
    if (peer < cluster_) {
#pragma unroll
      for (int k = 0; k < L; k++) ClusterExchange::send(&sums[k][slot], values[k], barrier, peer);
    }
    ClusterExchange::wait(barrier, count_ >> 1 & 1);
  }

  Shared& shared_;
  const int threads_, cluster_;
  int first_slot_, slots_, lanes_;  // of this row: partial sums, and the lanes that add them up
  int count_ = 0;
};

}  // namespace cs336
