// The two kernels of the backward of wide heads, and their launches for one instantiation.
#pragma once
#include <utility>

#include "common/launch.h"
#include "kernels/attention/attention_bwd_keys.cuh"
#include "kernels/attention/attention_bwd_queries.cuh"
#include "kernels/attention/attention_bwd_rows.cuh"

namespace cs336::attention {

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1) attention_bwd_keys_kernel(const __grid_constant__ BwdArgs args) {
  extern __shared__ uint8_t raw[];
  auto& shared = *reinterpret_cast<typename Tile::Shared*>(raw + (1024 - shared_address(raw) % 1024) % 1024);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  if (threadIdx.x == 0) {
    constexpr int kWarps = 8;  // of both consumers
    barrier_init(&shared.kv_full, 1), barrier_init(&shared.kv_empty, 2);
    for (int i = 0; i < Tile::kStages; i++) {
      barrier_init(&shared.q_full[i], 1), barrier_init(&shared.q_empty[i], kWarps);
      barrier_init(&shared.dout_full[i], 1), barrier_init(&shared.dout_empty[i], kWarps);
    }
    for (int i = 0; i < 2; i++) {
      barrier_init(&shared.p_full[i], 4), barrier_init(&shared.p_empty[i], 4);
      barrier_init(&shared.work_full[i], 1), barrier_init(&shared.work_empty[i], kWarps);
    }
    barrier_init_fence();
  }
  __syncthreads();
  if (warp < 4) {
    decrease_registers<Tile::kProducerRegisters>();
    if (warp == 0 && elect_one()) bwd_keys_produce<Tile>(args, shared);
  } else {
    increase_registers<Tile::kConsumerRegisters>();
    if (warp < 8)
      BwdKeysConsumer<Tile, true>(args, shared).run();
    else
      BwdKeysConsumer<Tile, false>(args, shared).run();
  }
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    attention_bwd_queries_kernel(const __grid_constant__ BwdQueriesArgs args) {
  extern __shared__ uint8_t raw[];
  auto& shared = *reinterpret_cast<typename Tile::Shared*>(raw + (1024 - shared_address(raw) % 1024) % 1024);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  if (threadIdx.x == 0) {
    constexpr int kWarps = 4 * Tile::kGroups;
    for (int g = 0; g < Tile::kGroups; g++) barrier_init(&shared.q_full[g], 1), barrier_init(&shared.q_empty[g], 1);
    for (int i = 0; i < Tile::kStages; i++)
      barrier_init(&shared.k_full[i], 1), barrier_init(&shared.k_empty[i], kWarps);
    for (int i = 0; i < Tile::kVStages; i++)
      barrier_init(&shared.v_full[i], 1), barrier_init(&shared.v_empty[i], kWarps);
    for (int i = 0; i < 2; i++) barrier_init(&shared.work_full[i], 1), barrier_init(&shared.work_empty[i], kWarps);
    barrier_init_fence();
  }
  __syncthreads();
  if (warp < 4) {
    decrease_registers<Tile::kProducerRegisters>();
    if (warp == 0 && elect_one()) bwd_queries_produce<Tile>(args, shared);
  } else {
    increase_registers<Tile::kConsumerRegisters>();
    BwdQueriesConsumer<Tile>(args, shared, warp / 4 - 1).run();
  }
}

template <class KeysTile, class QueriesTile>
void launch_bwd_wide(const AttentionBwdParams& params, cudaStream_t stream) {
  using T = typename KeysTile::T;
  constexpr int kHeadDim = KeysTile::kHeadDim, kValueDim = KeysTile::kValueDim;
  const AttentionProblem& p = params.problem;
  const int sms = current_device().num_sms;
  const AttentionBwdWorkspace at(p, false, sms);
  auto* workspace = static_cast<char*>(params.workspace);
  const Sequences sequences{p.q_tokens, p.k_tokens, p.cu_q, p.cu_k};
  const int group = p.q_heads / p.kv_heads, batch = p.cu_q ? 1 : p.sequences;
  const int block_heads = p.q_heads / at.heads, heads = batch * block_heads;
  const bool in_parts = block_heads != p.kv_heads;
  const auto parts = [&](int64_t offset, int width) -> AttentionTensor {
    const int64_t token = int64_t(block_heads) * width;
    return {workspace + offset, p.k_tokens * token, token, width};
  };
  const AttentionTensor dk = in_parts ? parts(at.dk_parts, kHeadDim) : params.dk;
  const AttentionTensor dv = in_parts ? parts(at.dv_parts, kValueDim) : params.dv;
  auto* key_tiles = p.cu_q ? reinterpret_cast<SequenceTile*>(workspace + at.key_tile_list) : nullptr;
  auto* row_tiles = p.cu_q ? reinterpret_cast<SequenceTile*>(workspace + at.row_tile_list) : nullptr;
  auto* counters = reinterpret_cast<int*>(workspace + at.counter);
  const auto num_row_tiles = static_cast<int>(attention_tiles(p, p.q_tokens, QueriesTile::kRows) / batch);
  const int64_t bytes_of_head = int64_t(p.max_q) * (kHeadDim + kValueDim) * 2 * at.heads;
  const AttentionBwdWaves waves(heads, ceil_div(p.max_k, KeysTile::kKeys), sms, bytes_of_head, bytes_of_head, false);
  const int64_t kv_bytes = int64_t(p.max_k) * (kHeadDim + kValueDim) * 2;

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
      .sums = nullptr,
      .turns = nullptr,
      .counter = counters,
      .scale = p.scale,
  };
  const BwdArgs keys{
      .q = tensor_map(params.q, p, p.q_tokens, p.q_heads, kHeadDim, 64),
      .k = tensor_map(params.k, p, p.k_tokens, p.kv_heads, kHeadDim, 64),
      .v = tensor_map(params.v, p, p.k_tokens, p.kv_heads, kValueDim, 64),
      .dout = tensor_map(params.dout, p, p.q_tokens, p.q_heads, kValueDim, 64),
      .dk = tensor_map(dk, p, p.k_tokens, block_heads, kHeadDim, 64),
      .dv = tensor_map(dv, p, p.k_tokens, block_heads, kValueDim, 64),
      .sequences = sequences,
      .window = Window(p),
      .order = {static_cast<int>(at.key_tiles), heads, waves.section, key_tiles},
      .rows = rows.rows,
      .dq = nullptr,
      .turns = nullptr,
      .counter = counters,
      .q_heads = p.q_heads,
      .group = group,
      .heads = at.heads,
      .wave = waves.wave,
      .query_tiles = rows.tiles,
      .cap_factor = 0.f,
      .scale = p.scale,
      .scale_log2 = p.scale * kLog2E,
  };
  const int all_heads = batch * p.q_heads;
  const BwdQueriesArgs queries{
      .q = keys.q,
      .k = keys.k,
      .v = keys.v,
      .dout = keys.dout,
      .dq = tensor_map(params.dq, p, p.q_tokens, p.q_heads, kHeadDim, 64),
      .sequences = sequences,
      .window = keys.window,
      .order = {num_row_tiles, all_heads, std::min(all_heads, attention_section(all_heads, kv_bytes) * group),
                row_tiles},
      .rows = rows.rows,
      .counter = counters + 1,
      .q_heads = p.q_heads,
      .group = group,
      .row_tiles = rows.tiles,
      .scale = p.scale,
      .scale_log2 = keys.scale_log2,
  };
  if (p.cu_q) {
    list_packed_tiles<<<ceil_div(at.key_tiles, 256), 256, 0, stream>>>(sequences, p.sequences, true, KeysTile::kKeys,
                                                                       at.key_tiles, key_tiles, counters);
    list_packed_tiles<<<ceil_div(num_row_tiles, 256), 256, 0, stream>>>(
        sequences, p.sequences, false, QueriesTile::kRows, num_row_tiles, row_tiles, counters + 1);
    clear_unheld<<<sms, 256, 0, stream>>>(sequences, p.sequences, false,
                                          {params.dq, {}, p.q_heads, kHeadDim / 8, nullptr});
    clear_unheld<<<sms, 256, 0, stream>>>(sequences, p.sequences, true, {dk, {}, block_heads, kHeadDim / 8, nullptr});
    clear_unheld<<<sms, 256, 0, stream>>>(sequences, p.sequences, true, {dv, {}, block_heads, kValueDim / 8, nullptr});
  } else
    CUDA_CHECK(cudaMemsetAsync(counters, 0, 2 * sizeof(int), stream));
  attention_bwd_prepare_kernel<T, kValueDim, KeysTile::kQueries>
      <<<rows.tiles * batch * p.q_heads, 256, 0, stream>>>(rows);
  CUDA_CHECK(cudaGetLastError());
  const auto blocks = [&](int64_t tiles) { return static_cast<unsigned>(std::min<int64_t>(tiles, sms)); };
  launch<attention_bwd_keys_kernel<KeysTile>>(
      {.grid = blocks(at.key_tiles * heads), .threads = KeysTile::kThreads, .shared_bytes = KeysTile::kSharedBytes},
      stream, keys);
  launch<attention_bwd_queries_kernel<QueriesTile>>({.grid = blocks(int64_t(num_row_tiles) * all_heads),
                                                     .threads = QueriesTile::kThreads,
                                                     .shared_bytes = QueriesTile::kSharedBytes},
                                                    stream, queries);
  if (in_parts) {
    const auto add = [&]<int kWidth>(const AttentionTensor& part, const AttentionTensor& sum) {
      const int64_t vectors = int64_t(batch) * p.k_tokens * p.kv_heads * (kWidth / 8);
      attention_bwd_add_parts_kernel<T, kWidth><<<ceil_div(vectors, 256), 256, 0, stream>>>(
          {part, sum, p.k_tokens, p.kv_heads, block_heads / p.kv_heads, vectors});
    };
    add.template operator()<kHeadDim>(dk, params.dk), add.template operator()<kValueDim>(dv, params.dv);
    CUDA_CHECK(cudaGetLastError());
  }
}

// One pair of head dimensions and type: the mask becomes a template argument here.
template <typename T, int kHeadDim, int kValueDim>
void attention_bwd_of(const AttentionBwdParams& params, cudaStream_t stream) {
  const auto launch = [&]<Mask kMask>() {
    launch_bwd_wide<BwdKeysTile<T, kHeadDim, kValueDim, kMask>, BwdQueriesTile<T, kHeadDim, kValueDim, kMask>>(params,
                                                                                                               stream);
  };
  if (params.problem.window_left >= 0)
    launch.template operator()<Mask::kWindow>();
  else
    launch.template operator()<Mask::kRight>();
}

}  // namespace cs336::attention
