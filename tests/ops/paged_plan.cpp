// Deals the work of many batches to blocks as paged attention's kernel does, and fails with the first batch of which a
// tile is nobody's, or two blocks', or of which two parts share a slot of the workspace. Run by test_paged_plan.py.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <set>
#include <tuple>
#include <utility>
#include <vector>

#include "kernels/paged_attention/work.h"

using namespace cs336;
using namespace cs336::paged;

namespace {

#define CHECK(condition)                                                                                            \
  do {                                                                                                              \
    if (!(condition)) {                                                                                             \
      std::printf("%s: %d sequences, first length %d, %d queries, heads %d x %d, window %d, %d resident, %d, %d\n", \
                  #condition, p.sequences, p.seq_lens[0], p.queries, p.kv_heads, p.group, p.window, resident, held, \
                  p.invariant);                                                                                     \
      std::exit(1);                                                                                                 \
    }                                                                                                               \
  } while (0)

Share share_of(const PagedAttentionParams& p, const PagedPlan& plan, int block) {
  int tiles = 0;
  for (int b = 0; b < p.sequences; b++) tiles += sequence_of(p, b).cost();
  Share share(plan, int64_t{tiles} * plan.segments, block);
  if (share.begin >= share.end) {
    share.b = p.sequences, share.start = -1000;  // nothing finds these on the device
    return share;
  }
  for (int after; share.b < p.sequences; share.b++, share.start = after) {
    after = share.start + sequence_of(p, share.b).cost() * plan.segments;
    if (after > share.begin) break;
  }
  return share;
}

void check(const PagedAttentionParams& p, int resident, int held) {
  const PagedPlan plan = paged::plan(p, resident, held);
  CHECK(plan.max_pieces == paged::plan(p, resident, resident).max_pieces);
  CHECK(plan.blocks >= 1 && plan.blocks <= held && plan.rows >= 1 && plan.rows <= kRows);
  std::map<std::pair<int, int>, int> tiles_done, parts_done, runs_done, parts_told;
  std::set<int64_t> slots;
  int64_t most = 0, total = 0;
  int busy = 1;
  for (int block = 0; block < plan.blocks; block++) {
    const Share share = share_of(p, plan, block);
    Walk walk(p, plan, share);
    int64_t tiles = 0;
    bool ends_one = false;
    total = share.total;
    busy = share.blocks;
    CHECK(busy >= 1 && busy <= plan.blocks && (block < busy || share.begin == share.end));
    for (Segment s; walk.next(p, plan, s);) {
      CHECK(s.b < p.sequences && s.index < plan.segments && s.begin % s.cut == 0 && s.begin < s.end);
      CHECK(s.end == s.sequence.tiles || s.end % s.cut == 0);
      if (plan.invariant) {
        CHECK(ceil_div(s.sequence.tiles, s.cut) <= plan.max_pieces && s.cut % kWarps == 0);
        CHECK(s.cut == piece_tiles(s.sequence.tiles, plan.max_pieces));  // of nothing but the length
      }
      const std::pair<int, int> segment{s.b, s.index};
      CHECK(tiles_done[segment] == s.begin);  // blocks have parts in their own order
      tiles_done[segment] += s.end - s.begin;
      tiles += s.end - s.begin + (s.begin == 0 ? kSegmentCost : 0);
      for (int tile = s.begin; tile < s.end; tile++) {
        const int first = (s.sequence.first_tile + tile) * kTile, newest = s.sequence.length - p.queries;
        CHECK(s.is_settled(p, tile) == (first <= newest - kTile));
      }
      const int run = plan.invariant ? s.cut : s.end - s.begin;
      const Parts parts(plan, share, s);
      for (int begin = s.begin; begin < s.end; begin += run) {
        runs_done[segment]++;
        if (s.whole()) continue;
        const int part = parts.at(begin);
        CHECK(part == parts_done[segment]++ && part < parts.count());
        CHECK(parts.begins(part) == (begin == s.begin));
        CHECK(parts.slot(part) >= 0 && parts.slot(part) < plan.slots);
        CHECK(slots.insert(parts.slot(part)).second);
        parts_told[segment] = parts.count();
      }
      if (!s.whole()) CHECK(s.end < s.sequence.tiles || !std::exchange(ends_one, true));  // it waits, once
    }
    most = std::max(most, tiles);
  }
  CHECK(parts_done == parts_told);
  if (!plan.invariant) {
    const int most = static_cast<int>(std::clamp<int64_t>(total / plan.least_share, 1, held));
    CHECK(busy == (most == held || most < plan.all_segments ? most : most - most % plan.all_segments));
  }
  int64_t longest = kCut;
  for (int b = 0; b < p.sequences; b++) {
    const Sequence of_b = sequence_of(p, b);
    const int piece = piece_tiles(of_b.tiles, plan.max_pieces);
    if (plan.invariant) longest = std::max<int64_t>(longest, piece);
    CHECK(of_b.tiles <= plan.max_tiles && (of_b.first_tile + of_b.tiles) * kTile >= of_b.length);
    for (int index = 0; index < plan.segments; index++) {
      const std::pair<int, int> segment{b, index};
      CHECK(tiles_done[segment] == of_b.tiles);
      if (plan.invariant) CHECK(runs_done[segment] == ceil_div(of_b.tiles, piece));
    }
  }
  CHECK(most <= total / busy + 1 + longest + kSegmentCost);  // dealt evenly, to a cut, however short segments are
  if (plan.invariant && p.sequences == 1 && plan.row_tiles == 1 && held >= (plan.max_pieces + 1) * plan.segments)
    CHECK(most <= longest + kSegmentCost);  // alone on the device: a piece a block
}

}  // namespace

int main() {
  std::mt19937 random(0);
  const auto any = [&](int least, int most) { return std::uniform_int_distribution(least, most)(random); };
  for (int resident : {1, 7, 132, 264})
    for (int i = 0; i < 600; i++) {
      PagedAttentionParams p{};
      p.sequences = i % 3 == 0 ? 1 : any(1, i % 3 == 1 ? 10 : 300);
      p.queries = any(1, 8);
      p.kv_heads = any(1, 9);
      p.group = any(1, 8);
      p.head_dim = i % 2 ? 64 : 128;
      p.num_pages = any(0, 50) ? 1000 : 0;
      p.page_size = 16 * any(1, 4);
      p.table_width = any(0, i % 3 == 0 ? 4000 : 64);
      p.window = any(0, 2) ? -1 : any(0, 2000);
      std::vector<int> lengths(p.sequences);
      for (int& length : lengths) length = any(-1, p.page_size * p.table_width + 5);
      if (i % 5 == 0) std::fill(lengths.begin(), lengths.end(), lengths[0]);
      p.seq_lens = lengths.data();
      for (bool invariant : {true, false}) {
        p.invariant = invariant;
        check(p, resident, resident);
        check(p, resident, any(1, resident));
      }
    }
}
