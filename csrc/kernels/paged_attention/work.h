// Which keys a block works on: its share of all segments. Host and device alike, for tests.
#pragma once
#include "kernels/paged_attention/paged_attention_plan.h"

namespace cs336::paged {

struct Sequence {
  int length;      // keys
  int first_tile;  // the first that a window leaves
  int tiles;       // of a segment; at least one, so that an empty sequence gets its zeros

  // What a segment is dealt as.
  HOST_DEVICE int cost() const { return tiles + kSegmentCost; }
};

HOST_DEVICE Sequence sequence_of(const PagedAttentionParams& p, int b) {
  const int capacity = p.num_pages > 0 ? p.table_width * p.page_size : 0, asked = p.seq_lens[b];
  const int length = asked < 0 ? 0 : asked < capacity ? asked : capacity;
  const int first = length - p.queries - p.window, first_tile = p.window < 0 || first < 0 ? 0 : first / kTile;
  const int tiles = ceil_div(length, kTile) - first_tile;
  return {length, first_tile, tiles < 1 ? 1 : tiles};
}

// A block's part of a segment.
struct Segment {
  int b, index;  // sequence, and which of its segments: key head * row tiles + row tile
  Sequence sequence;
  int start;       // its first tile among those of all segments
  int piece;       // tiles of a piece
  int begin, end;  // its tiles that are this block's: whole pieces

  HOST_DEVICE int pieces() const { return ceil_div(sequence.tiles, piece); }
  HOST_DEVICE bool whole() const { return begin == 0 && end == sequence.tiles; }
};

// The tiles of all segments, with kSegmentCost behind those of each, and which of them are a block's: those from
// `begin` to `end`, the first of which is in segments of sequence b, whose own start at `start`.
struct Share {
  int64_t total;
  int begin, end, b, start;
};

// Goes over the segments of which a piece starts in a share.
class Walk {
 public:
  HOST_DEVICE Walk(const PagedAttentionParams& p, const PagedPlan& plan, const Share& share)
      : begin_(share.begin), end_(share.end), b_(share.b), start_(share.start) {
    if (begin_ >= end_) return;
    take_sequence(p, plan);
    index_ = (begin_ - start_) / sequence_.cost();
    start_ += index_ * sequence_.cost();
  }

  // False after the last.
  HOST_DEVICE bool next(const PagedAttentionParams& p, const PagedPlan& plan, Segment& segment) {
    while (start_ < end_) {
      const int tiles = sequence_.tiles;
      segment = {b_, index_, sequence_, start_, piece_, first_piece(begin_ - start_), first_piece(end_ - start_)};
      if (segment.end > tiles) segment.end = tiles;
      start_ += sequence_.cost();
      if (++index_ == plan.segments) {
        index_ = 0;
        b_++;
        if (start_ < end_) take_sequence(p, plan);
      }
      if (segment.begin < segment.end) return true;
    }
    return false;
  }

 private:
  HOST_DEVICE void take_sequence(const PagedAttentionParams& p, const PagedPlan& plan) {
    sequence_ = sequence_of(p, b_);
    piece_ = piece_tiles(sequence_.tiles, plan.max_pieces);
  }
  // The start of the first piece at or after a tile of the segment.
  HOST_DEVICE int first_piece(int tile) const { return tile <= 0 ? 0 : ceil_div(tile, piece_) * piece_; }

  int begin_, end_;
  int b_, start_, index_ = 0, piece_ = 1;
  Sequence sequence_{};
};

// Where the result of a piece that its block does not add up itself lies in the workspace.
HOST_DEVICE int64_t slot_of(const PagedPlan& plan, int64_t total, const Segment& segment, int piece) {
  if (plan.by_segment) return (int64_t{segment.b} * plan.segments + segment.index) * plan.max_pieces + piece;
  const int block = block_of(total, segment.start + piece * segment.piece, plan.blocks);
  const int before = first_of_block(total, block, plan.blocks) - segment.start;  // tiles of the segment, not its own
  const int first = before > 0 ? ceil_div(before, segment.piece) : 0;
  return (int64_t{2} * block + (before > 0 ? 0 : 1)) * plan.max_pieces + piece - first;
}

// Whether a piece is the first that its block has of the segment.
HOST_DEVICE bool starts_a_part(const PagedPlan& plan, int64_t total, const Segment& segment, int piece) {
  const auto block = [&](int i) { return block_of(total, segment.start + i * segment.piece, plan.blocks); };
  return piece == 0 || block(piece) != block(piece - 1);
}

}  // namespace cs336::paged
