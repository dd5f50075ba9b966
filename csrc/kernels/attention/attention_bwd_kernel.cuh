// The backward's main kernel and the launches of one instantiation.
#pragma once
#include <utility>

#include "common/launch.h"
#include "kernels/attention/attention_bwd_mainloop.cuh"
#include "kernels/attention/attention_bwd_rows.cuh"

namespace cs336::attention {

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1) attention_bwd_kernel(const __grid_constant__ BwdArgs args) {
  extern __shared__ uint8_t raw[];
  auto& shared = *reinterpret_cast<typename Tile::Shared*>(raw + (1024 - shared_address(raw) % 1024) % 1024);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  if (threadIdx.x == 0) {
    constexpr int kWarps = 4 * Tile::kGroups;
    barrier_init(&shared.k_full, 1), barrier_init(&shared.v_full, 1);
    barrier_init(&shared.kv_empty, Tile::kGroups);
    for (int i = 0; i < Tile::kStages; i++) {
      barrier_init(&shared.q_full[i], 1), barrier_init(&shared.dout_full[i], 1);
      barrier_init(&shared.q_empty[i], kWarps);
    }
    for (int i = 0; i < 2; i++) {
      barrier_init(&shared.ds_full[i], kWarps), barrier_init(&shared.ds_empty[i], 4);
      barrier_init(&shared.work_full[i], 1);
      barrier_init(&shared.work_empty[i], kWarps + (Tile::kDqApart ? 4 : 0) + Tile::kGroups);
    }
    for (int i = 0; i < Tile::kDqStages; i++)
      for (int g = 0; g < Tile::kGroups; g++)
        barrier_init(&shared.dq_full[i][g], 4), barrier_init(&shared.dq_empty[i][g], 1);
    barrier_init_fence();
  }
  __syncthreads();
  if (warp < 4) {
    decrease_registers<Tile::kProducerRegisters>();
    if (warp == 0 && elect_one()) bwd_produce<Tile>(args, shared);
    if ((warp == 1 || warp == 2) && elect_one()) bwd_write<Tile>(args, shared, warp - 1);
  } else if (Tile::kDqApart && warp < 8) {
    decrease_registers<Tile::kDqRegisters>();
    bwd_multiply_queries<Tile>(args, shared);
  } else {
    increase_registers<Tile::kConsumerRegisters>();
    BwdConsumer<Tile>(args, shared, warp / 4 - (Tile::kDqApart ? 2 : 1)).run();
  }
}

template <class Tile>
void launch_bwd(const AttentionBwdParams& params, cudaStream_t stream) {
  const AttentionProblem& p = params.problem;
  const AttentionBwdWorkspace at(p, params.deterministic, current_device().num_sms);
  auto* workspace = static_cast<char*>(params.workspace);
  const auto ints = [&](int64_t offset) { return reinterpret_cast<int*>(workspace + offset); };
  const Sequences sequences{p.q_tokens, p.k_tokens, p.cu_q, p.cu_k};
  const int group = p.q_heads / p.kv_heads, batch = p.cu_q ? 1 : p.sequences;
  const int block_heads = p.q_heads / at.heads, heads = batch * block_heads;
  const bool in_parts = block_heads != p.kv_heads;
  const auto parts = [&](int64_t offset) -> AttentionTensor {
    const int64_t token = int64_t(block_heads) * Tile::kHeadDim;
    return {workspace + offset, p.k_tokens * token, token, Tile::kHeadDim};
  };
  const AttentionTensor dk = in_parts ? parts(at.dk_parts) : params.dk, dv = in_parts ? parts(at.dv_parts) : params.dv;
  auto* packed = p.cu_q ? reinterpret_cast<SequenceTile*>(workspace + at.key_tile_list) : nullptr;
  const int64_t bytes_of_query = int64_t{Tile::kHeadDim} * 8 * at.heads;  // Q, dO and the sums for dQ
  const AttentionBwdWaves waves(heads, ceil_div(p.max_k, Tile::kKeys), current_device().num_sms,
                                p.max_q * bytes_of_query, attention_queries_that_see(p) * bytes_of_query,
                                params.deterministic);

  const RowsArgs rows{
      .o = params.o,
      .dout = params.dout,
      .dq = params.dq,
      .lse = params.lse,
      .dlse = params.dlse,
      .sequences = sequences,
      .num_sequences = p.sequences,
      .q_heads = p.q_heads,
      .tiles = static_cast<int>(at.query_tiles),
      .rows = reinterpret_cast<float*>(workspace + at.rows),
      .sums = reinterpret_cast<float*>(workspace),
      .turns = params.deterministic ? ints(at.turns) : nullptr,
      .counter = ints(at.counter),
      .scale = p.scale,
  };
  const BwdArgs args{
      .q = tensor_map(params.q, p, p.q_tokens, p.q_heads, Tile::kHeadDim, Tile::kQueries),
      .k = tensor_map(params.k, p, p.k_tokens, p.kv_heads, Tile::kHeadDim, Tile::kKeys),
      .v = tensor_map(params.v, p, p.k_tokens, p.kv_heads, Tile::kHeadDim, Tile::kKeys),
      .dout = tensor_map(params.dout, p, p.q_tokens, p.q_heads, Tile::kHeadDim, Tile::kQueries),
      .dk = tensor_map(dk, p, p.k_tokens, block_heads, Tile::kHeadDim, 64),
      .dv = tensor_map(dv, p, p.k_tokens, block_heads, Tile::kHeadDim, 64),
      .sequences = sequences,
      .window = Window(p),
      .order = {static_cast<int>(at.key_tiles), heads, waves.section, packed},
      .rows = rows.rows,
      .dq = rows.sums,
      .turns = rows.turns,
      .counter = rows.counter,
      .q_heads = p.q_heads,
      .group = group,
      .heads = at.heads,
      .wave = waves.wave,
      .query_tiles = rows.tiles,
      .cap_factor = Tile::kCap ? p.scale / p.softcap : 0.f,
      .scale = p.scale,
      .scale_log2 = (Tile::kCap ? p.softcap : p.scale) * kLog2E,
  };
  using T = typename Tile::T;
  const int row_blocks = rows.tiles * batch * p.q_heads;
  if (packed) {
    list_packed_tiles<<<ceil_div(at.key_tiles, 256), 256, 0, stream>>>(sequences, p.sequences, true, Tile::kKeys,
                                                                       at.key_tiles, packed, rows.counter);
    const int sms = current_device().num_sms, vectors = Tile::kHeadDim / 8;
    clear_unheld<<<sms, 256, 0, stream>>>(sequences, p.sequences, false, {params.dq, {}, p.q_heads, vectors, nullptr});
    clear_unheld<<<sms, 256, 0, stream>>>(sequences, p.sequences, true, {dk, dv, block_heads, vectors, nullptr});
  }
  attention_bwd_prepare_kernel<T, Tile::kHeadDim, Tile::kQueries><<<row_blocks, 256, 0, stream>>>(rows);
  CUDA_CHECK(cudaGetLastError());
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(at.key_tiles * heads, current_device().num_sms));
  launch<attention_bwd_kernel<Tile>>({.grid = blocks, .threads = Tile::kThreads, .shared_bytes = Tile::kSharedBytes},
                                     stream, args);
  attention_bwd_finish_kernel<T, Tile::kHeadDim, Tile::kQueries><<<row_blocks, 256, 0, stream>>>(rows);
  CUDA_CHECK(cudaGetLastError());
  if (in_parts) {
    const int64_t vectors = int64_t(batch) * p.k_tokens * p.kv_heads * (Tile::kHeadDim / 8);
    for (const auto& [part, sum] : {std::pair(dk, params.dk), std::pair(dv, params.dv)})
      attention_bwd_add_parts_kernel<T, Tile::kHeadDim><<<ceil_div(vectors, 256), 256, 0, stream>>>(
          {part, sum, p.k_tokens, p.kv_heads, block_heads / p.kv_heads, vectors});
    CUDA_CHECK(cudaGetLastError());
  }
}

// One head dimension and type: the mask and the cap become template arguments here. Each is instantiated in a file of
// its own, so that they compile side by side.
template <typename T, int kHeadDim, int kValueDim>
void attention_bwd_of(const AttentionBwdParams& params, cudaStream_t stream) {
  constexpr AttentionBwdShape kShape = *find_attention_shape(kAttentionBwdShapes, kHeadDim, kValueDim);
  const AttentionProblem& p = params.problem;
  const auto launch = [&]<Mask kMask, bool kCap>() {
    launch_bwd<BwdTile<T, kHeadDim, kShape.queries, kShape.keys, kMask, kCap>>(params, stream);
  };
  if (p.softcap > 0) {
    if constexpr (kShape.softcap) launch.template operator()<Mask::kWindow, true>();
  } else if (p.window_left >= 0)
    launch.template operator()<Mask::kWindow, false>();
  else  // also where nothing is masked: the test for it costs nothing that can be measured
    launch.template operator()<Mask::kRight, false>();
}

}  // namespace cs336::attention
