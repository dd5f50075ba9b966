// How paged attention is cut into work, as plain functions of the problem. Host and device alike.
//
// The keys of a sequence, as one key head sees them for one tile of rows, are a segment: tiles of 16 keys. All segments
// behind each other are dealt evenly to the blocks, each of which may get parts of the segments at both its ends.
// Invariant: a segment is cut into pieces, where depends on that sequence's length alone, and they are added up one
// after the other, whose ever they are: so a sequence's bits do not depend on its batch. Otherwise a block adds up all
// it has of a segment at once: the only cuts are those between blocks.
#pragma once
#include <algorithm>
#include <bit>
#include <cstdint>

#include "kernels/paged_attention/paged_attention.h"

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HOST_DEVICE inline
#endif

namespace cs336 {

struct PagedPlan {
  int row_tiles;  // of 16 rows, a row being a query token of a query head that reads the key head
  int rows;       // of a tile that are used
  int segments;   // of a sequence: key heads times row tiles
  int all_segments;
  int max_pieces;  // of a segment
  int max_tiles;   // of a segment: what the page table can hold
  int blocks;      // or teams, of which two may be a block
  bool invariant;
  int least_share;  // tiles of a block if not: of little work it is better that fewer blocks have to meet
  bool by_segment;  // every segment has slots of its own for the pieces that blocks hand over; else every block has
  int64_t slots;
};

namespace paged {

inline constexpr int kRows = 16, kTile = 16, kWarps = 4, kThreads = 32 * kWarps;
inline constexpr int kMaxPieces = 128;
inline constexpr int kFewTiles = 48;
inline constexpr int kCut = 2;  // tiles: where segments may be cut if not into pieces
// Tiles' worth of time that a segment takes however short it is: its rows are loaded, added up and written. On an H200
// a segment of one tile takes 2.3 us, and a tile more 0.5; dealt by tiles alone, 15 empty sequences beside 193 of 850
// keys were all one block's, which made the launch take 0.45 ms instead of 0.2.
inline constexpr int kSegmentCost = 4;

HOST_DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Tiles of a piece: a multiple of two for each of the warps that share it, since its end costs them two barriers; of
// four where a sequence has so few keys that blocks cannot share it well. us, pieces of 256 and of 128 keys, H200, 16/8
// heads: 1 x 600 10.8 and 11.5, 256 x 545 152 and 155; but 1 x 1024, 32/8 heads, 15.6 and 12.1.
HOST_DEVICE int piece_tiles(int tiles, int max_pieces) {
  const int unit = tiles <= kFewTiles ? 4 * kWarps : 2 * kWarps;
  return ceil_div(ceil_div(tiles, max_pieces), unit) * unit;
}

// Flags of pieces at the start of the workspace, as many as keep what follows aligned to 16 bytes.
HOST_DEVICE int64_t flag_words(const PagedPlan& plan) { return (plan.slots + 1) / 2 * 2; }

// resident: blocks that the device holds at once. One long sequence alone is cut so that it fills them, about.
// most: of these, that the launch may have; pieces do not depend on it.
inline PagedPlan plan(const PagedAttentionParams& p, int resident, int most) {
  PagedPlan plan{};
  const int rows = p.group * p.queries;
  plan.invariant = p.invariant;
  plan.row_tiles = ceil_div(rows, kRows);
  plan.rows = std::min(rows, kRows);
  plan.segments = p.kv_heads * plan.row_tiles;
  const unsigned pieces = std::clamp(resident / plan.segments, 1, kMaxPieces);
  plan.max_pieces = static_cast<int>(std::bit_floor(pieces));
  const int64_t keys = int64_t{p.table_width} * p.page_size;
  plan.max_tiles = static_cast<int>(std::max<int64_t>(1, (keys + kTile - 1) / kTile));
  const int64_t segments = int64_t{p.sequences} * plan.segments;
  plan.all_segments = static_cast<int>(segments);
  plan.least_share = p.head_dim <= 64 ? 4 * kWarps : 2 * kWarps;
  // A block more than pieces: a segment's cost makes shares of as many longer than a piece, and some would have two.
  const int of_segment = plan.invariant ? std::min(plan.max_pieces, ceil_div(plan.max_tiles, 2 * kWarps)) + 1
                                        : ceil_div(plan.max_tiles + kSegmentCost, plan.least_share);
  plan.blocks = static_cast<int>(std::min<int64_t>(most, segments * of_segment));
  plan.by_segment = plan.invariant && segments <= 2 * plan.blocks;
  plan.slots = (plan.by_segment ? segments : int64_t{2} * plan.blocks) * (plan.invariant ? plan.max_pieces : 1);
  return plan;
}

}  // namespace paged
}  // namespace cs336
