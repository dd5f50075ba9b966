// A warp's tiles of keys and values on their way from the pages to shared memory.
#pragma once
#include "common/async.cuh"
#include "kernels/paged_attention/work.h"

namespace cs336::paged {

// ---- teams of four warps: one is a block, or two are, which then has a multiprocessor for itself ----

__device__ __forceinline__ int thread_of_team() { return threadIdx.x % kThreads; }
__device__ __forceinline__ int team() { return (blockIdx.x * blockDim.x + threadIdx.x) / kThreads; }
__device__ __forceinline__ void sync_team() {
  if (threadIdx.x < kThreads)  // by constants: a block whose barriers are numbered at run time takes all sixteen
    asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory");
  else
    asm volatile("bar.sync 2, %0;" ::"n"(kThreads) : "memory");
}

template <int kDim>
struct Tile {  // 16 keys, then their 16 values; the 16-byte chunks of a row are swapped so that columns meet no bank
               // twice
  static constexpr int kChunks = kDim / 8, kVectors = kTile * kChunks;
  uint4 keys[kVectors], values[kVectors];

  static __device__ __forceinline__ int at(int row, int chunk) { return row * kChunks + (chunk ^ (row & 7)); }
};

// The warp's tiles in order, over all segments of the block, some tiles ahead of where they are used.
template <typename T, int kDim>
class Stream {
  using Shared = Tile<kDim>;

 public:
  __device__ __forceinline__ Stream(const Walk& walk, int warp) : walk_(walk), warp_(warp) {}

  // Whether the next copies may be issued while newest tokens are on their way to the cache.
  __device__ __forceinline__ bool is_settled(const PagedAttentionParams& p, const PagedPlan& plan) {
    advance(p, plan);
    return !live_ || segment_.is_settled(p, tile_);
  }

  __device__ __forceinline__ void issue(const PagedAttentionParams& p, const PagedPlan& plan, Shared& shared) {
    const int lane = thread_of_team() % 32;
    advance(p, plan);
    if (live_) {
      if (known_ == 0) look_up(p, lane);
      const int page = __shfl_sync(~0u, pages_, 32 - known_), row = __shfl_sync(~0u, rows_, 32 - known_);
      const int left = segment_.sequence.length - (segment_.sequence.first_tile + tile_) * kTile;
      const int head = segment_.index / plan.row_tiles;
      copy(p.k, page, row, head, left, lane, shared.keys);
      copy(p.v, page, row, head, left, lane, shared.values);
      known_--;
      tile_ += kWarps;
    }
    commit_copies();
  }

 private:
  __device__ __forceinline__ void advance(const PagedAttentionParams& p, const PagedPlan& plan) {
    while (live_ && tile_ >= segment_.end) {
      live_ = walk_.next(p, plan, segment_);
      tile_ = segment_.begin + warp_;
      if (live_) known_ = 0;
    }
  }

  // The pages of the warp's next 32 tiles, one a lane.
  __device__ __forceinline__ void look_up(const PagedAttentionParams& p, int lane) {
    const int tile = tile_ + lane * kWarps;
    const int token = (segment_.sequence.first_tile + tile) * kTile;
    pages_ = rows_ = 0;
    if (tile < segment_.end && token < segment_.sequence.length) {
      const int entry = token / p.page_size;
      const int page = __ldg(p.page_table + segment_.b * p.table_stride + entry);
      pages_ = static_cast<unsigned>(page) < static_cast<unsigned>(p.num_pages) ? page : 0;
      rows_ = token - entry * p.page_size;
    }
    known_ = 32;
  }

  // `left` rows of the tile exist; the others become zeros.
  __device__ __forceinline__ void copy(const PagedCache& cache, int page, int row, int head, int left, int lane,
                                       uint4* shared) {
    constexpr int kRowsAtOnce = 32 / Shared::kChunks;
    const int r = lane / Shared::kChunks, chunk = lane % Shared::kChunks;
    const T* from = static_cast<const T*>(cache.data) + page * cache.page_stride + (row + r) * cache.token_stride +
                    head * cache.head_stride + chunk * 8;
#pragma unroll
    for (int i = 0; i < kTile; i += kRowsAtOnce)
      copy_async(shared + Shared::at(i + r, chunk), from + i * cache.token_stride, i + r < left);
  }

  Walk walk_;
  Segment segment_{};
  int warp_, tile_ = 0, known_ = 0;  // known_: pages that are looked up and not yet used
  int pages_ = 0, rows_ = 0;
  bool live_ = true;
};

}  // namespace cs336::paged
