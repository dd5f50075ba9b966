// How the warps of a device share the weights of a linear layer, without CUDA.
#pragma once
#include <algorithm>
#include <cstdint>

namespace cs336::few_rows {

inline constexpr int kWarps = 16;       // of a block, of which a multiprocessor has one
inline constexpr int kTileRows = 8;     // of weights: what one product of 16 x 8 x 16 takes
inline constexpr int kChunkBytes = 64;  // of a row of weights: 16 for each of the four lanes that share it

inline constexpr int kMostAtOnce = 16;   // rows of x
inline constexpr int kStepBytes = 2048;  // of weights, that a warp copies and multiplies at a time
inline constexpr int kStages = 2;        // steps of a warp's ring
inline constexpr int kRingBytes = kWarps * kStages * kStepBytes;  // of all warps

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Vectors of 16 bytes that a row of x takes in shared memory: up to the end of the last step of any format, and half of
// the banks more, so that two rows are read at once without conflicts.
constexpr int x_vectors(int K) { return ceil_div(K, 256) * 32 + 4; }

// Floats that the sums of a row of x take, one a chunk of weights, up to the same end: odd, so that two rows are in
// different banks.
constexpr int x_sums(int K) { return ceil_div(K, 256) * 256 / kChunkBytes | 1; }

// Bytes of a block's shared memory for so many rows of x: the rings, what warps hand to their teams, x and its sums.
constexpr int64_t shared_bytes(int rows, int K) {
  const int64_t partials = int64_t{kWarps} * ceil_div(rows, 8) * 8 * 16 * 4;
  return kRingBytes + partials + rows * (x_vectors(K) * int64_t{16} + x_sums(K) * int64_t{4});
}

// Rows of x that a block can keep; 0: none.
constexpr int rows_at_once(int K, int64_t most_bytes) {
  int rows = kMostAtOnce;
  while (rows > 0 && shared_bytes(rows, K) > most_bytes) rows--;
  return rows;
}

struct Plan {
  int blocks;
  int split;  // warps that share a tile, each with every split-th chunk of its rows: a power of two up to kWarps
  constexpr int teams() const { return blocks * (kWarps / split); }
};

// tiles: of as many rows of weights as a warp takes at a time; chunks: of a row. A warp has 6 KB in flight, about a
// sixth of what a multiprocessor needs, so that tiles are split until its own share of the work is no longer what takes
// longest.
inline Plan plan(int tiles, int chunks, int num_sms) {
  constexpr int kWarpsAtFullSpeed = 6;  // of a multiprocessor
  constexpr int kJoin = 4;              // chunks in whose time the sums of a tile are put together
  Plan best{std::max(1, std::min(tiles, num_sms)), 1};
  int64_t least = INT64_MAX;
  for (int split = 1; split <= kWarps; split *= 2) {
    const Plan next{best.blocks, split};
    const int64_t of_warp = static_cast<int64_t>(ceil_div(tiles, next.teams())) * (ceil_div(chunks, split) + kJoin);
    const int64_t of_block = static_cast<int64_t>(ceil_div(tiles, next.blocks)) * chunks;
    const int64_t cost = std::max(of_warp * kWarpsAtFullSpeed, of_block);
    if (split > 1 && split > chunks) break;
    if (cost < least) {
      least = cost;
      best = next;
    }
  }
  return best;
}

}  // namespace cs336::few_rows
