// How clusters of a device share a linear layer of many rows, without CUDA.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>

namespace cs336::many_rows {

inline constexpr int kStepFeatures = 128;  // that a block copies and multiplies at a time
inline constexpr int kNumSplits = 4;
inline constexpr std::array<int, kNumSplits> kSplits = {1, 2, 4,
                                                        8};  // blocks of a cluster: each has a part of the features

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Steps [first, last) of a row: the part of a block.
struct Steps {
  int first, last;
};

constexpr Steps steps_of(int rank, int split, int steps) {
  return {static_cast<int>(int64_t{steps} * rank / split), static_cast<int>(int64_t{steps} * (rank + 1) / split)};
}

using Resident = std::array<int, kNumSplits>;  // clusters of kSplits[i] blocks that the device holds at a time

struct Plan {
  int split;
  int clusters;  // each works on one tile at a time
  int64_t cost;  // steps, of the block that has most to do
};

// tiles: of y; steps: of a row of features. On an H200 one step for kJoin took eighths for
// 128 x 4096 x 4096, 26.4 us, for halves, 19.6.
inline Plan plan(int64_t tiles, int64_t steps, const Resident& resident) {
  constexpr int64_t kJoin = 3;  // steps in whose time a tile begins and its sums are put together
  Plan best{1, 1, INT64_MAX};
  for (int i = 0; i < kNumSplits; i++) {
    if (resident[i] == 0 || (kSplits[i] > 1 && kSplits[i] > steps)) continue;
    const int clusters = static_cast<int>(std::min<int64_t>(tiles, resident[i]));
    const int64_t cost = ceil_div(tiles, clusters) * (ceil_div(steps, kSplits[i]) + kJoin);
    if (cost < best.cost) best = {kSplits[i], clusters, cost};
  }
  return best;
}

// A step of 128 rows of weights takes 0.77 us with 64 rows of x, and 1 us with 128.
constexpr bool middle_is_faster(const Plan& middle, const Plan& wide) { return middle.cost * 77 < wide.cost * 100; }

}  // namespace cs336::many_rows
