// The forward kernel and its launch for one instantiation.
#pragma once
#include "common/launch.h"
#include "common/nvtx.h"
#include "kernels/attention/attention_fwd_mainloop.cuh"

namespace cs336::attention {

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1) attention_fwd_kernel(const __grid_constant__ FwdArgs args) {
  extern __shared__ uint8_t raw[];
  auto* teams = reinterpret_cast<typename Tile::Shared*>(raw + (1024 - shared_address(raw) % 1024) % 1024);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  if (threadIdx.x < Tile::kTeams) {
    auto& shared = teams[threadIdx.x];
    constexpr int kWarps = 4 * Tile::kGroups;
    for (int i = 0; i < Tile::kQStages; i++)
      for (int g = 0; g < Tile::kGroups; g++) {
        barrier_init(&shared.q_full[i][g], 1);
        barrier_init(&shared.q_empty[i][g], Tile::kOwnOutput ? 4 : 1);
      }
    for (int i = 0; i < Tile::kStages; i++) {
      barrier_init(&shared.k_full[i], 1), barrier_init(&shared.k_empty[i], kWarps);
      barrier_init(&shared.v_full[i], 1), barrier_init(&shared.v_empty[i], kWarps);
    }
    for (int i = 0; i < 2; i++) barrier_init(&shared.work_full[i], 1), barrier_init(&shared.work_empty[i], kWarps);
    barrier_init_fence();
  }
  __syncthreads();
  if (warp < 4) {
    decrease_registers<Tile::kProducerRegisters>();
    const int team = Tile::kTeams == 1 ? 0 : warp;
    if (warp < Tile::kTeams && elect_one()) fwd_produce<Tile>(args, teams[team], team);
  } else {
    increase_registers<Tile::kConsumerRegisters>();
    const int group = warp / 4 - 1, team = Tile::kTeams == 1 ? 0 : group / Tile::kGroups;
    FwdConsumer<Tile>(args, teams[team], team, group - team * Tile::kGroups).run();
  }
}

// Zeroes the counter that deals tiles. Both it and whom it deals to may be resident while the launch before ends;
// behind a memset the forward would be launched when that is done.
static __global__ void zero_counter(int* counter) {
  allow_successor(), wait_for_predecessor();
  *counter = 0;
}

template <class Tile>
void launch_fwd(const AttentionFwdParams& params, cudaStream_t stream) {
  const AttentionProblem& p = params.problem;
  const int row_tiles =
      static_cast<int>(p.cu_q ? attention_tiles(p, p.q_tokens, Tile::kRows) : ceil_div(p.q_tokens, Tile::kRows));
  const int heads = p.cu_q ? p.q_heads : p.sequences * p.q_heads, group = p.q_heads / p.kv_heads;
  const int64_t kv_bytes = int64_t(p.max_k) * (Tile::kHeadDim + Tile::kValueDim) * 2;
  const int section =
      attention_fwd_section(heads, group, p.max_k, kv_bytes, row_tiles, current_device().num_sms, Tile::kDrawn);
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(int64_t(row_tiles) * heads, current_device().num_sms));
  int* counter = params.workspace;
  auto* packed = p.cu_q ? reinterpret_cast<SequenceTile*>(params.workspace + 2) : nullptr;
  const Sequences sequences{p.q_tokens, p.k_tokens, p.cu_q, p.cu_k};
  if (packed) {
    list_packed_tiles<<<ceil_div(row_tiles, 256), 256, 0, stream>>>(sequences, p.sequences, false, Tile::kRows,
                                                                    row_tiles, packed, counter);
    clear_unheld<<<current_device().num_sms, 256, 0, stream>>>(
        sequences, p.sequences, false, {params.o, {}, p.q_heads, Tile::kValueDim / 8, params.lse});
    CUDA_CHECK(cudaGetLastError());
  } else if constexpr (Tile::kDrawn)
    launch<zero_counter>({.grid = 1, .threads = 1, .dependent = true}, stream, counter);
  const FwdArgs args{
      .q = tensor_map(params.q, p, p.q_tokens, p.q_heads, Tile::kHeadDim, 64),
      .k = tensor_map(params.k, p, p.k_tokens, p.kv_heads, Tile::kHeadDim, Tile::kKeys),
      .v = tensor_map(params.v, p, p.k_tokens, p.kv_heads, Tile::kValueDim, Tile::kKeys),
      .o = tensor_map(params.o, p, p.q_tokens, p.q_heads, Tile::kValueDim, 64),
      .sequences = sequences,
      .window = Window(p),
      .order = {row_tiles, heads, section, packed},
      .lse = params.lse,
      .counter = counter,
      .q_heads = p.q_heads,
      .group = group,
      .cap_factor = Tile::kCap ? p.scale / p.softcap : 0.f,
      .scale = Tile::kCap ? p.softcap : p.scale,
      .scale_log2 = (Tile::kCap ? p.softcap : p.scale) * kLog2E,
  };
  launch<attention_fwd_kernel<Tile>>(
      {.grid = blocks, .threads = Tile::kThreads, .shared_bytes = Tile::kSharedBytes, .dependent = true}, stream, args);
}

// One head dimension and type: the mask and the cap become template arguments here. Each is instantiated in a file of
// its own, so that they compile side by side.
template <typename T, int kHeadDim, int kValueDim>
void attention_fwd_of(const AttentionFwdParams& params, cudaStream_t stream) {
  constexpr AttentionFwdShape kShape = *find_attention_shape(kAttentionFwdShapes, kHeadDim, kValueDim);
  constexpr int kCapKeys = 64;  // the cap takes registers
  const AttentionProblem& p = params.problem;
  const auto launch = [&]<int kKeys, Mask kMask, bool kCap>() {
    constexpr const AttentionFwdShape* kShort = find_attention_shape(kAttentionFwdShortShapes, kHeadDim, kValueDim);
    constexpr const AttentionFwdShape* kWindow = find_attention_shape(kAttentionFwdWindowShapes, kHeadDim, kValueDim);
    if constexpr (kWindow && kMask == Mask::kWindow && !kCap)
      if (p.window_right >= 0 && p.window_left + p.window_right <= kAttentionFwdWindow)
        return launch_fwd<FwdTile<T, kHeadDim, kValueDim, kWindow->groups, kWindow->keys, kWindow->stages,
                                  kWindow->q_stages, kMask, kCap, false, true, kWindow->teams, kWindow->held / 16>>(
            params, stream);
    if constexpr (kShort && kMask != Mask::kWindow)
      if (!p.cu_q && p.q_tokens <= kAttentionFwdShortTokens)
        return launch_fwd<FwdTile<T, kHeadDim, kValueDim, kShort->groups, kShort->keys, kShort->stages,
                                  kShort->q_stages, kMask, kCap, true, kMask != Mask::kNone>>(params, stream);
    constexpr int kHeld = kCap ? 0 : kShape.held / 16;
    launch_fwd<FwdTile<T, kHeadDim, kValueDim, kShape.groups, kKeys, kShape.stages, kShape.q_stages, kMask, kCap, true,
                       true, 1, kHeld>>(params, stream);
  };
  if (p.softcap > 0)
    launch.template operator()<kCapKeys, Mask::kWindow, true>();
  else if (p.window_left >= 0)
    launch.template operator()<kShape.keys, Mask::kWindow, false>();
  else if (p.window_right >= 0)
    launch.template operator()<kShape.keys, Mask::kRight, false>();
  else
    launch.template operator()<kShape.keys, Mask::kNone, false>();
}

}  // namespace cs336::attention
