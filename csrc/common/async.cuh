// Asynchronous copies from global to shared memory, and launches that overlap the end of the kernel before them.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace cs336 {

// Copies 16 bytes, or writes 16 zeros and reads nothing; both pointers are 16-byte aligned.
__device__ __forceinline__ void copy_async(uint4* shared, const void* global, bool live) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
      "l"(global), "r"(live ? 16 : 0)
      : "memory");
}

__device__ __forceinline__ void copy_async(float* shared, const float* global, bool live) {  // the same for one float
  asm volatile(
      "cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
      "l"(global), "r"(live ? 4 : 0)
      : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's committed groups are in flight.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// A ring of prefetched vectors, [stage][stream][vector][thread]. A thread reads only what it copied itself: no
// barriers.
template <int kVecs>
struct Ring {
  uint4* mine;  // this thread's first slot
  int num_threads, num_streams;

  __device__ __forceinline__ uint4* slot(int stage, int stream, int v) const {
    return mine + ((stage * num_streams + stream) * kVecs + v) * num_threads;
  }
};

// Programmatic dependent launch (see launch.h). A kernel may start while its predecessor still runs: it must
// wait_for_predecessor() before it reads or writes global memory. Its own successor may start once all its blocks have
// called allow_successor().
__device__ __forceinline__ void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void allow_successor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Safe before wait_for_predecessor(): the predecessor writes through the same L2, which keeps the line current.
__device__ __forceinline__ void prefetch_L2(const void* global) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

}  // namespace cs336
