// Deals the work of many batches to blocks as paged attention's kernel does, and fails with the first batch of which a
// piece is nobody's, or two blocks', or shares its slot of the workspace. Run by test_paged_plan.py.
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

#define CHECK(condition)                                                                                       \
  do {                                                                                                         \
    if (!(condition)) {                                                                                        \
      std::printf("%s: %d sequences, first length %d, %d queries, heads %d x %d, window %d, %d resident\n",    \
                  #condition, p.sequences, p.seq_lens[0], p.queries, p.kv_heads, p.group, p.window, resident); \
      std::exit(1);                                                                                            \
    }                                                                                                          \
  } while (0)

Share share_of(const PagedAttentionParams& p, const PagedPlan& plan, int block) {
  int tiles = 0;
  for (int b = 0; b < p.sequences; b++) tiles += sequence_of(p, b).cost();
  Share share{.total = int64_t{tiles} * plan.segments, .begin = 0, .end = 0, .b = 0, .start = 0};
  share.begin = first_of_block(share.total, block, plan.blocks);
  share.end = first_of_block(share.total, block + 1, plan.blocks);
  for (int after; share.b < p.sequences; share.b++, share.start = after) {
    after = share.start + sequence_of(p, share.b).cost() * plan.segments;
    if (after > share.begin) break;
  }
  return share;
}

void check(const PagedAttentionParams& p, int resident) {
  const PagedPlan plan = paged::plan(p, resident);
  CHECK(plan.blocks >= 1 && plan.blocks <= resident && plan.rows >= 1 && plan.rows <= kRows);
  std::map<std::pair<int, int>, int> tiles_done, pieces_done;
  std::set<int64_t> slots;
  int64_t most = 0, total = 0;
  for (int block = 0; block < plan.blocks; block++) {
    const Share share = share_of(p, plan, block);
    Walk walk(p, plan, share);
    int64_t tiles = 0;
    bool ends_one = false;
    total = share.total;
    for (Segment s; walk.next(p, plan, s);) {
      CHECK(s.b < p.sequences && s.index < plan.segments && s.begin % s.piece == 0 && s.begin < s.end);
      CHECK(s.end == s.sequence.tiles || s.end % s.piece == 0);
      CHECK(s.pieces() <= plan.max_pieces && s.piece % kWarps == 0);
      CHECK(s.piece == piece_tiles(s.sequence.tiles, plan.max_pieces));  // of nothing but the length
      const std::pair<int, int> segment{s.b, s.index};
      CHECK(s.whole() || share.begin >= s.start || tiles_done[segment] == s.begin);
      tiles_done[segment] += s.end - s.begin;
      if (!s.whole()) {
        for (int piece = s.begin / s.piece; piece * s.piece < s.end; piece++)
          CHECK(starts_a_part(plan, share.total, s, piece) == (piece * s.piece == s.begin));
        CHECK(s.end < s.sequence.tiles || !std::exchange(ends_one, true));  // it waits for earlier blocks, once
      }
      tiles += s.end - s.begin + (s.begin == 0 ? kSegmentCost : 0);
      for (int begin = s.begin; begin < s.end; begin += s.piece) {
        pieces_done[segment]++;
        if (s.whole()) continue;
        const int64_t slot = slot_of(plan, share.total, s, begin / s.piece);
        CHECK(slot >= 0 && slot < plan.slots);
        CHECK(slots.insert(slot).second);
      }
    }
    most = std::max(most, tiles);
  }
  int64_t longest = 0;
  for (int b = 0; b < p.sequences; b++) {
    const Sequence of_b = sequence_of(p, b);
    longest = std::max<int64_t>(longest, piece_tiles(of_b.tiles, plan.max_pieces));
    CHECK(of_b.tiles <= plan.max_tiles && (of_b.first_tile + of_b.tiles) * kTile >= of_b.length);
    for (int index = 0; index < plan.segments; index++) {
      CHECK((tiles_done[{b, index}] == of_b.tiles));
      CHECK((pieces_done[{b, index}] == ceil_div(of_b.tiles, piece_tiles(of_b.tiles, plan.max_pieces))));
    }
  }
  CHECK(most <=
        total / plan.blocks + 1 + longest + kSegmentCost);  // dealt evenly, to a piece, however short segments are
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
      p.num_pages = any(0, 50) ? 1000 : 0;
      p.page_size = 16 * any(1, 4);
      p.table_width = any(0, i % 3 == 0 ? 4000 : 64);
      p.window = any(0, 2) ? -1 : any(0, 2000);
      std::vector<int> lengths(p.sequences);
      for (int& length : lengths) length = any(-1, p.page_size * p.table_width + 5);
      if (i % 5 == 0) std::fill(lengths.begin(), lengths.end(), lengths[0]);
      p.seq_lens = lengths.data();
      check(p, resident);
    }
}
