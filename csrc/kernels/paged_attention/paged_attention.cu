// Launches of paged attention.
#include <atomic>
#include <random>

#include "common/launch.h"
#include "common/nvtx.h"
#include "kernels/paged_attention/paged_attention_kernel.cuh"

namespace cs336 {
namespace {

// f(T(), head_dim as a constant).
template <typename F>
auto dispatch(const PagedAttentionParams& p, F&& f) {
  const auto of_dim = [&](auto dim) { return p.dtype == Dtype::BF16 ? f(__nv_bfloat16(), dim) : f(__half(), dim); };
  switch (p.head_dim) {
    case 64:
      return of_dim(std::integral_constant<int, 64>());
    case 128:
      return of_dim(std::integral_constant<int, 128>());
    default:
      throw std::invalid_argument("paged attention has heads of 64 and 128 features alone");
  }
}

// teams: of a block; with two it has a multiprocessor for itself, and takes most of its shared memory.
template <int kDim>
LaunchShape shape_of(int teams_in_all, int teams) {
  return {.grid = dim3(paged::ceil_div(teams_in_all, teams)),
          .threads = dim3(teams * paged::kThreads),
          .shared_bytes = teams * sizeof(paged::Shared<kDim>),
          .dependent = true};
}

// Whether multiprocessors are spared by blocks of two teams. Where these do not fit nothing is.
template <int kDim>
bool spares(const PagedAttentionParams& p) {
  return p.spare && 2 * sizeof(paged::Shared<kDim>) <= static_cast<size_t>(current_device().max_shared_bytes);
}

// Blocks that the device holds at once; the driver is asked once.
template <auto kKernel>
int resident_blocks(const LaunchShape& shape) {
  static std::array<int, 64> answers;
  static std::array<std::once_flag, 64> asked;
  const Device& device = current_device();
  std::call_once(asked.at(device.index), [&] {
    allow_shared_memory<kKernel>(shape, device);
    int blocks;
    CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kKernel, shape.threads.x, shape.shared_bytes));
    answers[device.index] = std::max(1, blocks) * device.num_sms;
  });
  return answers[device.index];
}

PagedPlan plan_of(const PagedAttentionParams& p) {
  return dispatch(p, [&]<typename T, int kDim>(T, std::integral_constant<int, kDim>) {
    const int resident = resident_blocks<paged::paged_attention_kernel<T, kDim>>(shape_of<kDim>(1, 1));
    return paged::plan(p, resident, spares<kDim>(p) ? 2 * std::max(1, current_device().num_sms - p.spare) : resident);
  });
}

// 64 bits that are no float or integer of anyone: a workspace is not cleared (a node of a graph, 2 us).
uint64_t new_tag() {
  static std::atomic<uint64_t> next = uint64_t{std::random_device()()} << 32 | std::random_device()();
  uint64_t x = next.fetch_add(0x9E3779B97F4A7C15);  // Steele, Lea & Flood 2014: splitmix64
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9;
  x = (x ^ x >> 27) * 0x94D049BB133111EB;
  return (x ^ x >> 31) | 1;
}

}  // namespace

int64_t paged_attention_workspace(const PagedAttentionParams& p) {
  const PagedPlan plan = plan_of(p);
  return 8 * paged::flag_words(plan) + 4 * plan.slots * plan.rows * (p.head_dim + 2);
}

void paged_attention(PagedAttentionParams p, cudaStream_t stream) {
  NVTX_FN();
  const PagedPlan plan = plan_of(p);
  p.tag = new_tag();
  dispatch(p, [&]<typename T, int kDim>(T, std::integral_constant<int, kDim>) {
    launch<paged::paged_attention_kernel<T, kDim>>(shape_of<kDim>(plan.blocks, spares<kDim>(p) ? 2 : 1), stream, p,
                                                   plan);
  });
}

}  // namespace cs336
