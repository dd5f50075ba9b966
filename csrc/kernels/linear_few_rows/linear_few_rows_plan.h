// How the warps of a device share the weights of a linear layer, without CUDA.
#pragma once
#include <algorithm>
#include <cstdint>

namespace cs336::few_rows {

inline constexpr int kWarps = 16;       // of a block
inline constexpr int kTileRows = 16;    // of weights: what one product of 16 x 8 x 16 takes
inline constexpr int kStepWidth = 128;  // bytes of each that a warp copies and multiplies at a time
inline constexpr int kChunkBytes = 64;  // 16 for each of the four lanes that share a row
inline constexpr int kChunks = kStepWidth / kChunkBytes;
inline constexpr int kStepBytes = kTileRows * kStepWidth;
inline constexpr int kVectors = kStepBytes / 16;  // of a step

inline constexpr int kMostOfBlock = 16;                  // rows of x that a block takes by itself
inline constexpr int kLeastOfCluster = 8;                // fewer have the bits of one
inline constexpr int kMostParts = 8;                     // blocks of a cluster
inline constexpr int kLeastStages = 2, kMostStages = 8;  // steps of a warp's ring

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Vectors of 16 bytes that a row of x takes in shared memory: up to the end of the last step of any format, and half of
// the banks more, so that two rows are read at once without conflicts.
inline constexpr int kXPad = 4;
constexpr int x_vectors(int K) { return ceil_div(K, 256) * 32 + kXPad; }

// Chunks of a row of x, up to the same end, of 16 bytes each: odd, so that two rows are in different banks.
constexpr int x_chunks(int K) { return ceil_div(K, 256) * 256 / kChunkBytes | 1; }

// Tiles whose sums there is room for at a time.
constexpr int handed_tiles(int rows) { return rows <= 8 ? 2 : 1; }

// Rows of x that there is room for.
constexpr int rows_kept(int rows, int parts) { return parts == 1 ? rows : rows <= 32 ? 32 : 64; }

// Bytes of a block's shared memory for so many rows and features of x: the rings with a barrier a stage, what warps
// hand to their teams, x and its chunks.
constexpr int64_t shared_bytes(int rows, int features, int parts, int stages) {
  const int64_t rings = int64_t{kWarps} * stages * (kStepBytes + 8);
  const int64_t partials = int64_t{kWarps} * handed_tiles(rows) * rows * kTileRows * 4;
  return rings + partials +
         rows_kept(rows, parts) * (x_vectors(features) * int64_t{16} + x_chunks(features) * int64_t{16});
}

constexpr bool fits(int rows, int features, int parts, int64_t most_bytes) {
  return shared_bytes(rows, features, parts, kLeastStages) <= most_bytes;
}

// Features that a block has of K, in whole steps of so many.
constexpr int features_of(int K, int of_step, int parts) { return ceil_div(ceil_div(K, of_step), parts) * of_step; }

// Blocks that share the features of so many rows; 0: none have room for them.
constexpr int parts(int rows, int K, int of_step, int64_t most_bytes) {
  if (rows <= kMostOfBlock && fits(rows, K, 1, most_bytes)) return 1;
  for (int parts = 2; rows > kLeastOfCluster && parts <= kMostParts; parts *= 2)
    if (fits(rows, features_of(K, of_step, parts), parts, most_bytes)) return parts;
  return 0;
}

// Rows of x that are taken at a time; 0: there is no room for one.
constexpr int rows_at_once(int M, int K, int of_step, int64_t most_bytes) {
  for (int times = 1; times <= M; times++)
    if (const int rows = ceil_div(M, times); parts(rows, K, of_step, most_bytes)) return rows;
  return 0;
}

// Of a ring: as many as leave room for a block of the kernel behind this one, which then fetches its first weights
// while this one ends; where none has room, as many as there is room for.
constexpr int stages(int rows, int features, int parts, int64_t most_bytes) {
  const int64_t half = most_bytes / 2 - 512;  // a multiprocessor keeps 1 KB for itself with each block
  const int64_t bytes = rows <= 8 && fits(rows, features, parts, half) ? half : most_bytes;
  int stages = kMostStages;
  while (stages > kLeastStages && shared_bytes(rows, features, parts, stages) > bytes) stages--;
  return stages;
}

struct Plan {
  int blocks;    // of all clusters
  int parts;     // blocks of a cluster: each has some of the features, and all of a team's blocks share its tiles
  int features;  // of a block, in whole steps
  int split;     // warps that share a tile, each with every split-th step of its rows: a power of two up to kWarps
  int teams;     // of so many warps, on the device
  int rounds;    // tiles of the team that has most
  int steps;     // of a row, of a block's features
  int stages;    // of a ring
  int groups = 0, per_group = 0;  // of a row; one by the chunks of a group, in 2^-kDivide, rounded up
};
inline constexpr int kDivide = 20;  // chunks of a row and chunks of a group, multiplied, stay below 2^20

// tiles: of rows of weights; clusters: that are there at a time. A tile is split until a warp's own share is no longer
// what takes longest, and then as it keeps most warps at work to the end.
inline Plan plan(int tiles, int K, int of_step, int parts, int stages, int clusters) {
  constexpr int kWarpsAtFullSpeed = 6;  // of a multiprocessor
  constexpr int kJoin = 4;              // steps in whose time the sums of a tile are put together
  clusters = std::max(1, std::min(tiles, clusters));
  const int features = features_of(K, of_step, parts), steps = features / of_step;
  Plan best{};
  int64_t least = INT64_MAX;
  for (int split = 1; split <= std::min(kWarps, steps); split *= 2) {
    const int teams = clusters * (kWarps / split), rounds = ceil_div(tiles, teams);
    const int64_t of_warp = static_cast<int64_t>(rounds) * (ceil_div(steps, split) + kJoin);
    const int64_t of_block = static_cast<int64_t>(ceil_div(tiles, clusters)) * steps;
    const int64_t cost = std::max(of_warp * kWarpsAtFullSpeed, of_block) * 4 + of_warp;
    if (cost < least) {
      least = cost;
      best = {clusters * parts, parts, features, split, teams, rounds, steps, stages};
    }
  }
  return best;
}

}  // namespace cs336::few_rows
