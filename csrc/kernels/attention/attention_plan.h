// What attention's launches are made of, as plain functions of the problem: tile shapes, order of work, workspace.
#pragma once
#include <algorithm>
#include <cstdint>

#include "kernels/attention/attention.h"

namespace cs336 {

// Query rows of a forward tile (64 a warpgroup), keys of a block, blocks of K and of V in flight, tiles of Q in flight,
// tiles that a multiprocessor works on at a time, features of Q that registers hold; the fastest measured of those that
// fit the registers (H200; docs/attention.md). What registers hold, products need not read: D = 96 2-3 % less time,
// D = 128 1 %, D = 64 and 192 none.
struct AttentionFwdShape {
  int head_dim, value_dim, groups, keys, stages, q_stages, teams = 1, held = 0;
};
inline constexpr AttentionFwdShape kAttentionFwdShapes[] = {
    {64, 64, 3, 128, 4, 1},  {96, 96, 3, 80, 2, 1, 1, 64}, {128, 128, 3, 80, 2, 1, 1, 32},
    {192, 128, 3, 80, 2, 1}, {256, 256, 2, 80, 2, 1},
};

// Of short sequences, not packed. D = 64: 280 for 236 TFLOP/s (512 tokens), 374 for 325 (1k), but 440 for 439 (2k) and
// less from there. D = 128: 316 for 298, 469 for 425, but 582 for 610.
inline constexpr AttentionFwdShape kAttentionFwdShortShapes[] = {{64, 64, 4, 64, 6, 2}, {128, 128, 2, 128, 2, 1}};
inline constexpr int kAttentionFwdShortTokens = 1024;

// Through a window of so many keys, where a tile has few blocks and the warpgroup of later rows is done with them
// earlier: blocks as wide as a warpgroup's rows straddle its ends least, enough are in flight for all warpgroups to be
// at blocks of their own, and nobody waits for a turn. In one team, 1024 keys of 16k: D = 128 577 for 546 TFLOP/s,
// D = 64 418 for 406; 4096 keys: 631 for 650, 497 for 502. D = 64 then in two teams of two warpgroups, each with tiles
// of its own, so that one has the multiprocessor while the other is between two tiles: 3-5 % less time than in one.
// Products of 64 queries by 64 keys read as much of Q as of K, as fast as shared memory gives it; held, 64 features of
// 128 take 3-4 % off, 16 of 64 1-2 %.
inline constexpr AttentionFwdShape kAttentionFwdWindowShapes[] = {{64, 64, 2, 64, 4, 2, 2, 16},
                                                                  {128, 128, 3, 64, 4, 1, 1, 64}};
inline constexpr int kAttentionFwdWindow = 2048;

// Queries of a backward tile and keys of a block.
struct AttentionBwdShape {
  int head_dim, value_dim, queries, keys;
  bool softcap;  // has the registers for it
  bool wide;     // dQ by a kernel of its own, whose tiles are kAttentionBwdRows queries
};
inline constexpr AttentionBwdShape kAttentionBwdShapes[] = {{64, 64, 128, 128, false, false},
                                                            {96, 96, 64, 128, true, false},
                                                            {128, 128, 64, 128, true, false},
                                                            {192, 128, 64, 64, false, true},
                                                            {256, 256, 64, 64, false, true}};
inline constexpr int kAttentionBwdRows = 128;

template <typename Shape, int kCount>
constexpr const Shape* find_attention_shape(const Shape (&shapes)[kCount], int head_dim, int value_dim) {
  for (const Shape& shape : shapes)
    if (shape.head_dim == head_dim && shape.value_dim == value_dim) return &shape;
  return nullptr;
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Tiles of `rows` rows over all sequences. Packed sequences begin a tile each, and how many tiles they fill is known on
// the device alone: sequence i gets the tiles from start / rows + i on, which is enough whatever the lengths are.
inline int64_t attention_tiles(const AttentionProblem& p, int tokens, int rows) {
  return p.cu_q ? tokens / rows + p.sequences : p.sequences * ceil_div(tokens, rows);
}

// Heads that are worked on together: as many as keep what all their tiles read again and again within about half of L2.
// 7 % (16 heads, 16k) to 14 % (2k) over all heads at once.
inline int attention_section(int heads, int64_t bytes_of_head) {
  constexpr int64_t kSectionBytes = 32 << 20;
  return static_cast<int>(std::clamp<int64_t>(kSectionBytes / std::max<int64_t>(1, bytes_of_head), 1, heads));
}

// Query heads of a section of the forward. Where a head has few keys, and no other shares them, the first tiles of a
// section would read them faster than memory gives them, and those after them none: there a section is about as many
// tiles as run at a time (16 x 16 heads of 512, D = 128: 317 for 305 TFLOP/s; 64/8 heads 335 for 351, D = 64 with its
// two row tiles 268 for 281), unless there are so few tiles in all that the longest must come first. It is one key head
// where all tiles are equally long (465 for 441).
inline int attention_fwd_section(int heads, int group, int keys, int64_t bytes_of_key_head, int row_tiles, int num_sms,
                                 bool drawn) {
  constexpr int kFewKeys = 512, kSomeRowTiles = 3, kManyTiles = 7;  // of a multiprocessor
  if (!drawn) return group;
  const int in_l2 = attention_section(heads, bytes_of_key_head) * group;
  const bool smooth = group == 1 && keys <= kFewKeys && row_tiles >= kSomeRowTiles &&
                      int64_t{row_tiles} * heads >= int64_t{kManyTiles} * num_sms;
  return std::min({heads, in_l2, smooth ? static_cast<int>(ceil_div(num_sms, row_tiles)) : heads});
}

// How the backward walks the key heads: `section` of them together, with `wave` key tiles of each at a time. The blocks
// of one wave start together at the last query tile, go down side by side and end one after the other, where their keys
// are (causal); those of the next start there one after the other, go up side by side and end together at the last
// tile. So the waves of a section are an even number, each about as many blocks as run at a time, and L2 holds what
// they share.
//
// In turns, a block waits at each query tile for those of smaller keys: a wave that goes up loses the lead that its
// first blocks had. That pays only where the queries that see a key do not fit in L2; else all blocks go down.
// Through a window they never get the lead back: 1024 keys of 64k, 15.1 ms for 1.5.
struct AttentionBwdWaves {
  int section, wave;

  // Bytes of a key head's queries, dO and dQ: of all, and of as many as see a key.
  AttentionBwdWaves(int heads, int64_t key_tiles, int num_sms, int64_t bytes_of_head, int64_t bytes_that_see,
                    bool in_turns) {
    constexpr int64_t kMuchOfL2 = 64 << 20;
    const bool all_down = in_turns && bytes_that_see < kMuchOfL2;
    // A section must outlast its longest block on all multiprocessors, or the last one ends late: 64/8 heads of 4k
    // tokens, 358 TFLOP/s with one head at a time. What is left for the last section is half as
    // much or more: with one head left of 16, 523 for 598 without turns.
    const int enough = static_cast<int>(ceil_div(2 * num_sms, key_tiles));
    if (all_down)
      section = std::max(enough, attention_section(heads, bytes_of_head));
    else  // twice as many as two waves need: fewer blocks add to the same dQ at the same time
      section = static_cast<int>(std::max<int64_t>((4 * num_sms + key_tiles / 2) / key_tiles, 1));
    section = std::min(section, heads);
    while (heads % section != 0 && 2 * (heads % section) < enough) section++;
    const int64_t pairs = ceil_div(key_tiles * section, 2 * num_sms + section);
    wave = static_cast<int>(all_down ? key_tiles : ceil_div(key_tiles, 2 * pairs));
  }
};

// Which head and which of its row tiles is dealt out as number `index`: heads in sections, and within a section all
// heads of one row tile before the next. A head's tiles are dealt in their order, on which the backward's turns rely.
struct DealtTile {
  int head, row_tile;
};
constexpr DealtTile dealt_tile(int index, int row_tiles, int heads, int section) {
  const int per_section = section * row_tiles, s = index / per_section, r = index - s * per_section;
  const int width = std::min(section, heads - s * section);
  return {s * section + r % width, r / width};
}

// The tiles [first, last) of `queries` queries that see some of the keys from key0 to last_key: query i of a sequence
// sees from i + offset - left to i + offset + right, where there are these ends.
struct QueryTiles {
  int first, last;
};
template <bool kLeft, bool kRight>
constexpr QueryTiles tiles_that_see(int key0, int last_key, int offset, int q_length, int left, int right,
                                    int queries) {
  const int begin = kRight ? std::max(0, key0 - offset - right) : 0;
  const int end = kLeft ? std::min(q_length, last_key - offset + left + 1) : q_length;
  return {begin / queries, begin < end ? (end + queries - 1) / queries : begin / queries};
}

// Ints: the counter that deals out tiles, and for packed sequences the sequence and the row of each tile.
inline int64_t attention_fwd_workspace(const AttentionProblem& p) {
  const AttentionFwdShape* shape = find_attention_shape(kAttentionFwdShapes, p.head_dim, p.value_dim);
  const AttentionFwdShape* window = find_attention_shape(kAttentionFwdWindowShapes, p.head_dim, p.value_dim);
  const int groups = window ? std::min(shape->groups, window->groups) : shape->groups;
  return p.cu_q ? 2 + 2 * attention_tiles(p, p.q_tokens, 64 * groups) : 2;
}

// Query heads that one block of the backward walks: all that share a key head, or a half, a quarter, ... of them where
// blocks would be too few to balance: the longest, with 64/8 heads of 2k tokens, has twice the average work.
inline int attention_bwd_heads(const AttentionProblem& p, int num_sms) {
  const AttentionBwdShape* shape = find_attention_shape(kAttentionBwdShapes, p.head_dim, p.value_dim);
  const int64_t blocks = attention_tiles(p, p.k_tokens, shape->keys) * p.q_heads;  // with one head each
  int heads = p.q_heads / p.kv_heads;
  while (heads % 2 == 0 && blocks / heads < 3 * num_sms) heads /= 2;
  return heads;
}

// Queries that see a key, at most.
inline int64_t attention_queries_that_see(const AttentionProblem& p) {
  const bool open = p.window_left < 0 || p.window_right < 0;
  return open ? p.max_q : std::min<int64_t>(p.max_q, int64_t{1} + p.window_left + p.window_right);
}

// Whether the backward adds to dQ in turns: asked for, or because it is faster, since the first turn needs no zeros
// (H200: 0.85-0.9 of the time at 512 tokens and 1k, 0.96-0.98 at 2k tokens, and through a window of 1024 keys, where
// the block of the next smaller keys is always a few steps ahead; but 1.07 at 2k where a multiprocessor has two
// blocks, 1.01 through a window of 4096). Wide heads' dQ is never added up in memory.
inline bool attention_bwd_in_turns(const AttentionProblem& p, bool deterministic, int num_sms) {
  constexpr int kShort = 1024;    // queries
  constexpr int kFew = 2048;      // of which so many see a key
  constexpr int kManyBlocks = 3;  // of a multiprocessor
  const AttentionBwdShape* shape = find_attention_shape(kAttentionBwdShapes, p.head_dim, p.value_dim);
  const int64_t blocks = attention_tiles(p, p.k_tokens, shape->keys) * p.q_heads / attention_bwd_heads(p, num_sms);
  const bool many = blocks >= int64_t{kManyBlocks} * num_sms;
  const bool faster = p.max_q <= kShort || (many && attention_queries_that_see(p) <= kFew);
  return !shape->wide && (deterministic || faster);
}

// Where things are in the backward's workspace, in bytes.
struct AttentionBwdWorkspace {
  int64_t query_tiles, key_tiles;  // of a head: of a sequence, or of all packed ones
  // First of all dQ in fp32 (not of wide heads), then per query tile its rows' lse and delta, then the turns of its two
  // pieces, then the lists of packed tiles: of keys, and of queries where dQ has a kernel of its own.
  int64_t rows, turns, key_tile_list, row_tile_list, dk_parts, dv_parts, counter, bytes;
  int heads;  // that one block walks

  AttentionBwdWorkspace(const AttentionProblem& p, bool deterministic, int num_sms) {
    const AttentionBwdShape* shape = find_attention_shape(kAttentionBwdShapes, p.head_dim, p.value_dim);
    const int64_t rows_of = p.cu_q ? 1 : p.sequences;  // batch entries
    query_tiles = attention_tiles(p, p.q_tokens, shape->queries) / rows_of;
    key_tiles = attention_tiles(p, p.k_tokens, shape->keys) / rows_of;
    const int64_t tiles = query_tiles * rows_of * p.q_heads;
    rows = shape->wide ? 0 : tiles * shape->queries * ceil_div(p.head_dim, 64) * 64 * 4;  // whole panels
    turns = rows + tiles * shape->queries * 2 * 4;
    key_tile_list = turns + (deterministic ? tiles * 2 * 4 : 0);
    heads = attention_bwd_heads(p, num_sms);
    // Of dK and dV, in so many heads; none where a block walks all that share a key head.
    const int64_t parts = heads * p.kv_heads == p.q_heads ? 0 : p.q_heads / heads;
    row_tile_list = key_tile_list + (p.cu_q ? key_tiles * 2 * 4 : 0);
    const int64_t row_tiles = p.cu_q && shape->wide ? attention_tiles(p, p.q_tokens, kAttentionBwdRows) : 0;
    dk_parts = ceil_div(row_tile_list + row_tiles * 2 * 4, 16) * 16;
    dv_parts = dk_parts + rows_of * p.k_tokens * parts * p.head_dim * 2;
    counter = dv_parts + rows_of * p.k_tokens * parts * p.value_dim * 2;
    bytes = counter + (shape->wide ? 8 : 4);  // one for each kernel
  }
};

}  // namespace cs336
