// Asks attention's launch plans about many shapes, and fails with the first that breaks a rule. Run by
// test_attention_plan.py.
#include "kernels/attention/attention_plan.h"

#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <random>
#include <utility>
#include <vector>

using namespace cs336;

namespace {

constexpr int kSms = 132, kUnbounded = 1 << 29;

#define CHECK(condition)                                                                                            \
  do {                                                                                                              \
    if (!(condition)) {                                                                                             \
      std::printf("%s: D %d heads %d/%d sequences %d tokens %d, %d packed %d\n", #condition, p.head_dim, p.q_heads, \
                  p.kv_heads, p.sequences, p.q_tokens, p.k_tokens, p.cu_q != nullptr);                              \
      std::exit(1);                                                                                                 \
    }                                                                                                               \
  } while (0)

// Packed sequences of any lengths find room in the tiles: each begins where the one before has ended.
void check_packed_tiles(const AttentionProblem& p, int rows) {
  std::mt19937 random(p.q_tokens);
  std::vector<int> starts{0};
  for (int i = 1; i < p.sequences; i++)
    starts.push_back(std::uniform_int_distribution(starts.back(), p.q_tokens)(random));
  starts.push_back(p.q_tokens);
  int64_t end = 0;
  for (int i = 0; i < p.sequences; i++) {
    const int64_t first = starts[i] / rows + i;
    CHECK(first >= end);
    end = first + ceil_div(starts[i + 1] - starts[i], rows);
  }
  CHECK(end <= attention_tiles(p, p.q_tokens, rows));
}

void check_heads(const AttentionProblem& p) {
  const int keys = find_attention_shape(kAttentionBwdShapes, p.head_dim, p.value_dim)->keys;
  const int group = p.q_heads / p.kv_heads, heads = attention_bwd_heads(p, kSms);
  const int64_t key_tiles = attention_tiles(p, p.k_tokens, keys);
  CHECK(heads >= 1 && group % heads == 0);
  CHECK(heads == group || key_tiles * p.q_heads / (2 * heads) < 3 * kSms);  // split no further than needed
  CHECK(heads % 2 == 1 || key_tiles * p.q_heads / heads >= 3 * kSms);       // and as far as needed
  for (int all : {1, 3, 64, 1000})
    for (int64_t bytes : {int64_t{0}, int64_t{1} << 20, int64_t{1} << 27, int64_t{1} << 40}) {
      const int section = attention_section(all, bytes);
      CHECK(section >= 1 && section <= all);
      for (int keys : {512, 513})
        for (int row_tiles : {1, 4, 86}) {
          const int in_l2 = section * group;
          const auto fwd = [&](bool drawn) {
            return attention_fwd_section(all * group, group, keys, bytes, row_tiles, kSms, drawn);
          };
          CHECK(fwd(false) == group);
          CHECK(fwd(true) >= group && fwd(true) <= in_l2 && fwd(true) % group == 0);
          if (keys > 512 || group > 1 || row_tiles == 1 || all * row_tiles < 7 * kSms)
            CHECK(fwd(true) == in_l2);
          else {
            CHECK(fwd(true) == in_l2 || fwd(true) * row_tiles >= kSms);
            CHECK(fwd(true) * row_tiles < kSms + row_tiles);  // one wave
          }
        }
      for (const auto& [in_turns, window] : {std::pair(false, 1), {true, 1}, {true, 64}}) {
        const int64_t that_see = bytes / window;
        const AttentionBwdWaves waves(all, key_tiles, kSms, bytes, that_see, in_turns);
        CHECK(waves.section >= 1 && waves.section <= all && waves.wave >= 1 && waves.wave <= key_tiles);
        const int rest = all % waves.section;
        CHECK(rest == 0 || rest * key_tiles >= kSms);  // and not much less in the last section
        const int64_t count = ceil_div(key_tiles, waves.wave);
        // Resident together, as nearly as whole tiles of all heads allow.
        CHECK(count == 1 || 2 * waves.wave * waves.section <= 2 * kSms + 3 * waves.section);
        CHECK(waves.section == all || waves.section * key_tiles >= 3 * kSms / 2);  // enough work for all
        if (in_turns && that_see < int64_t{1} << 26) CHECK(count == 1);            // all go down
      }
    }
}

// The deterministic backward's turns. Blocks draw tiles in the order dealt and work on what they drew in that order, so
// that no turn is waited for in vain if a tile waits for those dealt before it alone.
void check_order(const AttentionProblem& p, int row_tiles, int heads, int section) {
  std::vector<int> next(heads, 0);
  for (int index = 0; index < row_tiles * heads; index++) {
    const auto [head, row_tile] = dealt_tile(index, row_tiles, heads, section);
    CHECK(head >= 0 && head < heads && row_tile == next[head]++);
  }
}

// The key tiles that add to a query tile are neighbours, the first of them that of the first key that its first query
// sees: so many have added when it is a tile's turn.
template <bool kLeft, bool kRight>
void check_turns(const AttentionProblem& p, int left, int right, int queries) {
  const int offset = p.k_tokens - p.q_tokens;
  std::vector<int> added(ceil_div(p.q_tokens, queries), 0);
  for (int key0 = 0; key0 < p.k_tokens; key0 += 128) {
    const int last_key = std::min(key0 + 128, p.k_tokens) - 1;
    const auto [first, last] = tiles_that_see<kLeft, kRight>(key0, last_key, offset, p.q_tokens, left, right, queries);
    CHECK(first >= last || (first >= 0 && last <= static_cast<int>(added.size())));
    for (int tile = 0; tile < static_cast<int>(added.size()); tile++) {
      bool sees = false;
      for (int i = tile * queries; i < std::min((tile + 1) * queries, p.q_tokens); i++)
        sees |= (!kRight || key0 <= i + offset + right) && (!kLeft || last_key >= i + offset - left);
      CHECK(sees == (tile >= first && tile < last));
      if (!sees) continue;
      const int first_key = kLeft ? std::max(0, tile * queries + offset - left) : 0;
      CHECK(added[tile]++ == key0 / 128 - first_key / 128);
    }
  }
}

void check_workspace(const AttentionProblem& p) {
  const AttentionBwdShape& shape = *find_attention_shape(kAttentionBwdShapes, p.head_dim, p.value_dim);
  const AttentionBwdWorkspace launch(p, false, kSms);  // so many blocks of it
  const int64_t blocks = launch.key_tiles * (p.cu_q ? 1 : p.sequences) * p.q_heads / launch.heads;
  for (int left : {-1, 0, 1000, 2000, kUnbounded})
    for (int right : {-1, 0, 47, 48}) {
      AttentionProblem windowed = p;
      windowed.window_left = left, windowed.window_right = right;
      const bool few = p.max_q <= 2048 || (left >= 0 && right >= 0 && left + right < 2048);
      CHECK(attention_bwd_in_turns(windowed, true, kSms) == !shape.wide);
      CHECK(attention_bwd_in_turns(windowed, false, kSms) ==
            (!shape.wide && (p.max_q <= 1024 || (few && blocks >= 3 * kSms))));
      CHECK(attention_queries_that_see(windowed) <= p.max_q);
    }
  for (bool deterministic : {false, true}) {
    const AttentionBwdWorkspace at(p, deterministic, kSms);
    const int64_t batch = p.cu_q ? 1 : p.sequences, rows = shape.queries, columns = (p.head_dim + 63) / 64 * 64;
    const int64_t tiles = at.query_tiles * batch * p.q_heads;
    CHECK(at.query_tiles * rows >= p.q_tokens && at.key_tiles * shape.keys >= p.k_tokens);
    CHECK(at.rows >= (shape.wide ? 0 : tiles * rows * columns * 4) && at.rows % 16 == 0);
    CHECK(at.turns - at.rows >= tiles * rows * 8);
    CHECK(at.key_tile_list - at.turns >= (deterministic ? tiles * 8 : 0));
    CHECK(at.row_tile_list - at.key_tile_list >= (p.cu_q ? at.key_tiles * 8 : 0) && at.dk_parts % 16 == 0);
    const bool lists_rows = p.cu_q && shape.wide;
    CHECK(at.dk_parts - at.row_tile_list >= (lists_rows ? attention_tiles(p, p.q_tokens, kAttentionBwdRows) * 8 : 0));
    const bool in_parts = at.heads * p.kv_heads != p.q_heads;
    const int64_t part = in_parts ? batch * p.k_tokens * (p.q_heads / at.heads) * 2 : 0;  // of one feature
    CHECK(at.dv_parts - at.dk_parts >= part * p.head_dim && at.dv_parts % 16 == 0);
    CHECK(at.counter - at.dv_parts >= part * p.value_dim && at.counter % 4 == 0);
    CHECK(at.bytes == at.counter + (shape.wide ? 8 : 4));
  }
}

}  // namespace

int main() {
  const int packed_marker = 0;
  for (const AttentionFwdShape& shape : kAttentionFwdShapes)
    for (int kv_heads : {1, 3, 8})
      for (int group : {1, 2, 6, 8})
        for (int sequences : {1, 2, 17})
          for (int tokens : {1, 63, 64, 65, 191, 193, 1000, 2048, 2049, 4097, 100000})
            for (bool packed : {false, true}) {
              AttentionProblem p{};
              p.head_dim = shape.head_dim, p.value_dim = shape.value_dim;
              p.q_heads = kv_heads * group, p.kv_heads = kv_heads, p.sequences = sequences;
              p.q_tokens = p.k_tokens = p.max_q = p.max_k = tokens;
              if (packed) p.cu_q = p.cu_k = &packed_marker;
              if (packed) check_packed_tiles(p, 64 * shape.groups);
              CHECK(attention_fwd_workspace(p) >= (packed ? 2 + 2 * attention_tiles(p, tokens, 64 * shape.groups) : 1));
              const auto* window = find_attention_shape(kAttentionFwdWindowShapes, p.head_dim, p.value_dim);
              if (packed && window)
                CHECK(attention_fwd_workspace(p) >= 2 + 2 * attention_tiles(p, tokens, 64 * window->groups));
              if (!find_attention_shape(kAttentionBwdShapes, p.head_dim, p.value_dim)) continue;
              check_heads(p);
              check_workspace(p);
            }
  AttentionProblem p{};
  for (int row_tiles : {1, 2, 7, 33})
    for (int heads : {1, 3, 8, 64})
      for (int section = 1; section <= heads; section++) check_order(p, row_tiles, heads, section);
  constexpr int kLengths[] = {0, 1, 2, 63, 64, 65, 127, 128, 129, 200, 257, 700};
  constexpr int kSides[] = {0, 1, 9, 63, 64, 65, 127, 128, 129, 300, kUnbounded};
  for (int queries : {64, 128})
    for (int q_tokens : kLengths)
      for (int k_tokens : kLengths) {
        p.q_tokens = q_tokens, p.k_tokens = k_tokens;
        check_turns<false, false>(p, 0, 0, queries);
        for (int right : kSides) {
          check_turns<false, true>(p, 0, right, queries);
          for (int left : kSides) check_turns<true, true>(p, left, right, queries);
        }
      }
  CHECK(!find_attention_shape(kAttentionFwdShapes, 80, 80) && !find_attention_shape(kAttentionBwdShapes, 192, 192));
}
