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
  int cut;         // it is cut at multiples of these tiles: into pieces, or anywhere
  int begin, end;  // its tiles that are this block's

  HOST_DEVICE bool whole() const { return begin == 0 && end == sequence.tiles; }
  // Whether a tile has none of the newest tokens.
  HOST_DEVICE bool is_settled(const PagedAttentionParams& p, int tile) const {
    return (sequence.first_tile + tile + 1) * kTile <= sequence.length - p.queries;
  }
};

// The tiles of all segments, with kSegmentCost behind those of each, and which of them are a block's: those from
// `begin` to `end`, the first of which, if there are any, is in segments of sequence b, whose own start at `start`.
struct Share {
  int64_t total;
  int blocks;  // that have any
  int begin = 0, end = 0, b = 0, start = 0;

  HOST_DEVICE Share(const PagedPlan& plan, int64_t tiles, int block) : total(tiles), blocks(plan.blocks) {
    if (!plan.invariant && total < int64_t{blocks} * plan.least_share) {
      blocks = total < plan.least_share ? 1 : static_cast<int>(total / plan.least_share);
      if (blocks > plan.all_segments) blocks -= blocks % plan.all_segments;  // equal segments: each its own blocks
    }
    begin = first_of(block < blocks ? block : blocks);
    end = first_of(block < blocks ? block + 1 : blocks);
  }

  HOST_DEVICE int first_of(int block) const { return static_cast<int>(total * block / blocks); }
  HOST_DEVICE int block_of(int tile) const {
    return static_cast<int>(((int64_t{tile} + 1) * blocks + total - 1) / total - 1);
  }
};

// Goes over the segments of which a cut is in a share.
class Walk {
 public:
  HOST_DEVICE Walk(const PagedAttentionParams& p, const PagedPlan& plan, const Share& share)
      : begin_(share.begin), end_(share.end), b_(share.b), start_(share.start) {
    if (begin_ >= end_) {
      start_ = end_;
      return;
    }
    take_sequence(p, plan);
    index_ = (begin_ - start_) / sequence_.cost();
    start_ += index_ * sequence_.cost();
  }

  // False after the last.
  HOST_DEVICE bool next(const PagedAttentionParams& p, const PagedPlan& plan, Segment& segment) {
    while (start_ < end_) {
      const int tiles = sequence_.tiles;
      segment = {b_, index_, sequence_, start_, cut_, first_cut(begin_ - start_), first_cut(end_ - start_)};
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
    cut_ = plan.invariant ? piece_tiles(sequence_.tiles, plan.max_pieces) : kCut;
  }
  // The first cut at or after a tile of the segment.
  HOST_DEVICE int first_cut(int tile) const { return tile <= 0 ? 0 : ceil_div(tile, cut_) * cut_; }

  int begin_, end_;
  int b_, start_, index_ = 0, cut_ = 1;
  Sequence sequence_{};
};

// The parts of a segment that several blocks share, in the order in which they are added up: its pieces, or what each
// block has of it. Each has a slot of the workspace.
class Parts {
 public:
  HOST_DEVICE Parts(const PagedPlan& plan, const Share& share, const Segment& segment)
      : plan_(plan), share_(share), segment_(segment), first_block_(share.block_of(segment.start)) {
    const int last = ceil_div(segment.sequence.tiles, segment.cut) - 1;
    count_ = 1 + (plan.invariant ? last : share.block_of(segment.start + last * segment.cut) - first_block_);
  }

  HOST_DEVICE int count() const { return count_; }
  // That which begins with a tile.
  HOST_DEVICE int at(int tile) const {
    return plan_.invariant ? tile / segment_.cut : share_.block_of(segment_.start + tile) - first_block_;
  }
  // Whether it is the first that its block has of the segment.
  HOST_DEVICE bool begins(int part) const { return !plan_.invariant || part == 0 || block(part) != block(part - 1); }

  HOST_DEVICE int64_t slot(int part) const {
    if (!plan_.invariant) return int64_t{2} * (first_block_ + part) + (part == 0);
    if (plan_.by_segment) return (int64_t{segment_.b} * plan_.segments + segment_.index) * plan_.max_pieces + part;
    const int before = share_.first_of(block(part)) - segment_.start;  // tiles of the segment, not its block's
    const int first = before > 0 ? ceil_div(before, segment_.cut) : 0;
    return (int64_t{2} * block(part) + (before > 0 ? 0 : 1)) * plan_.max_pieces + part - first;
  }

 private:
  HOST_DEVICE int block(int piece) const { return share_.block_of(segment_.start + piece * segment_.cut); }

  const PagedPlan& plan_;
  const Share& share_;
  const Segment& segment_;
  int first_block_, count_;
};

}  // namespace cs336::paged
