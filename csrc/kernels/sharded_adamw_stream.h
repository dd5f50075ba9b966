// What a sharded step queues, and what waits for what. `current` is the caller's stream, where the backward, AdamW and
// the next forward run; `moving` is ours, of high priority, where NCCL runs; -> is an event.
//
//   current   backward    backward            ->AdamW b  AdamW a          ->forward of b   ->forward of a
//             a is there  b is there         |         |         |        |                |
//   moving    ->sum a     ->sum b  total ----'         ->gather b ->gather a
//               squares a   squares b
//
// Everything on `moving` is in order: a bucket's gather is over before the next step's sums are. An event is recorded
// again and again: a wait is for what was recorded last when the wait was queued. AdamW of `a` waits for the last sum,
// not for the gather of `b`. Nothing here waits on the host or allocates device memory, so a CUDA graph can hold a
// step.
#pragma once
#include <cuda_runtime.h>

#include <map>
#include <mutex>

#include "common/check.h"
#include "common/nccl.h"
#include "kernels/sharded_adamw.h"

namespace cs336::cuda {

class ShardedAdamwStream {
 public:
  // Makes `device` the current one; waits for the other ranks.
  ShardedAdamwStream(const Nccl& nccl, const NcclId& id, int rank, int size, int device)
      : nccl_(nccl), rank_(rank), size_(size), device_(device) {
    int least, greatest;
    CUDA_CHECK(cudaSetDevice(device));
    CUDA_CHECK(cudaDeviceGetStreamPriorityRange(&least, &greatest));
    nccl_.check(nccl_.comm_init_rank(&comm_, size, id, rank), "ncclCommInitRank");
    try {
      CUDA_CHECK(cudaStreamCreateWithPriority(&moving_, cudaStreamNonBlocking, greatest));
      CUDA_CHECK(cudaEventCreateWithFlags(&to_moving_, cudaEventDisableTiming));
      CUDA_CHECK(cudaEventCreateWithFlags(&summed_, cudaEventDisableTiming));
    } catch (...) {
      if (to_moving_) cudaEventDestroy(to_moving_);
      if (moving_) cudaStreamDestroy(moving_);
      nccl_.comm_destroy(comm_);
      throw;
    }
  }
  ShardedAdamwStream(const ShardedAdamwStream&) = delete;
  ShardedAdamwStream& operator=(const ShardedAdamwStream&) = delete;

  // Waits for what is queued. Call it once, last. The stream itself stays for as long as the process: torch's allocator
  // records an event on it when memory that it used is freed, which may be later.
  void close() {
    CUDA_CHECK(cudaStreamSynchronize(moving_));
    nccl_.check(nccl_.comm_destroy(comm_), "ncclCommDestroy");
    for (const auto& [param, event] : gathered_) CUDA_CHECK(cudaEventDestroy(event));
    CUDA_CHECK(cudaEventDestroy(to_moving_));
    CUDA_CHECK(cudaEventDestroy(summed_));
  }

  int rank() const { return rank_; }
  int size() const { return size_; }
  int device() const { return device_; }
  cudaStream_t moving() const { return moving_; }

  // Of grad (size * shard,) this rank's shard becomes the sum; squares (kSquares,).
  void reduce(void* grad, int64_t shard, Dtype dtype, double* squares, cudaStream_t current) {
    const std::lock_guard lock(mutex_);
    void* own = own_of(grad, shard, dtype);
    begin(current);
    nccl_.check(nccl_.reduce_scatter(grad, own, shard, type_of(dtype), NcclSum::kSum, comm_, moving_),
                "ncclReduceScatter");
    sum_squares(own, shard, dtype, squares, moving_);
    CUDA_CHECK(cudaEventRecord(summed_, moving_));
  }

  // totals (num_totals,): the first is the sum of squares (num_squares,); then each the sum over the ranks.
  void total(float* totals, int64_t num_totals, const double* squares, int64_t num_squares, cudaStream_t current) {
    const std::lock_guard lock(mutex_);
    begin(current);
    sum_partials(squares, num_squares, totals, moving_);
    nccl_.check(nccl_.all_reduce(totals, totals, num_totals, NcclType::kFloat32, NcclSum::kSum, comm_, moving_),
                "ncclAllReduce");
    CUDA_CHECK(cudaEventRecord(summed_, moving_));
    CUDA_CHECK(cudaStreamWaitEvent(current, summed_, 0));
  }

  // param (size * shard,), whose own shard p.p is; all of it is there after `wait`. Its gradients have been reduced
  // since the step before, and so its earlier gather is over when they are.
  void step(void* param, int64_t shard, const ShardedAdamwParams& p, const AdamwHyper& hyper, cudaStream_t current) {
    const std::lock_guard lock(mutex_);
    CUDA_CHECK(cudaStreamWaitEvent(current, summed_, 0));
    sharded_adamw(p, hyper, current);
    begin(current);
    nccl_.check(nccl_.all_gather(p.p, param, shard, type_of(p.dtype), comm_, moving_), "ncclAllGather");
    cudaEvent_t& event = gathered_[param];
    if (!event) CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    CUDA_CHECK(cudaEventRecord(event, moving_));
  }

  void wait(const void* param, cudaStream_t current) {
    const std::lock_guard lock(mutex_);
    if (const auto found = gathered_.find(param); found != gathered_.end())
      CUDA_CHECK(cudaStreamWaitEvent(current, found->second, 0));
  }

  void* own_of(void* bucket, int64_t shard, Dtype dtype) const {
    return static_cast<char*>(bucket) + rank_ * shard * size_of(dtype);
  }

 private:
  static NcclType type_of(Dtype dtype) { return dtype == Dtype::BF16 ? NcclType::kBFloat16 : NcclType::kFloat32; }

  void begin(cudaStream_t current) {  // what is queued on `current` is over before what comes on `moving`
    CUDA_CHECK(cudaEventRecord(to_moving_, current));
    CUDA_CHECK(cudaStreamWaitEvent(moving_, to_moving_, 0));
  }

  const Nccl nccl_;
  const int rank_, size_, device_;
  NcclComm comm_ = nullptr;
  cudaStream_t moving_ = nullptr;
  cudaEvent_t to_moving_ = nullptr, summed_ = nullptr;
  std::map<const void*, cudaEvent_t> gathered_;  // by where the bucket begins
  std::mutex mutex_;                             // backwards call from threads of their own
};

}  // namespace cs336::cuda
