// Plans linear layers of many sizes as the launcher does, and fails with the first plan that no device could run, that
// leaves a block without features, or that takes longer than the best of all. Run by test_linear_many_rows_plan.py.
#include <array>
#include <cstdio>
#include <cstdlib>
#include <random>

#include "kernels/linear_many_rows/linear_many_rows_plan.h"

using namespace cs336::many_rows;

namespace {

#define CHECK(condition)                                                                                               \
  do {                                                                                                                 \
    if (!(condition)) {                                                                                                \
      std::printf("%s: %lld tiles of %lld steps, resident %d %d %d %d: split %d, %d clusters\n", #condition,           \
                  static_cast<long long>(tiles), static_cast<long long>(steps), resident[0], resident[1], resident[2], \
                  resident[3], plan.split, plan.clusters);                                                             \
      std::exit(1);                                                                                                    \
    }                                                                                                                  \
  } while (0)

void check(int64_t tiles, int64_t steps, const Resident& resident) {
  const Plan plan = cs336::many_rows::plan(tiles, steps, resident);
  int index = 0;
  while (index < kNumSplits && kSplits[index] != plan.split) index++;
  CHECK(index < kNumSplits);
  CHECK(plan.clusters >= 1 && plan.clusters <= resident[index] && plan.clusters <= tiles);
  CHECK(plan.split <= steps);  // each block has a feature
  int64_t next = 0;            // step, dealt out as the kernel does
  for (int rank = 0; rank < plan.split; rank++) {
    const Steps mine = steps_of(rank, plan.split, static_cast<int>(steps));
    CHECK(mine.first == next && mine.last > mine.first);
    next = mine.last;
  }
  CHECK(next == steps);
  const int64_t rounds = (tiles + plan.clusters - 1) / plan.clusters;
  CHECK(plan.cost >= rounds * ((steps + plan.split - 1) / plan.split));
  CHECK(plan.cost <= (tiles + resident[0] - 1) / resident[0] * (steps + 3));  // no worse than undivided
}

}  // namespace

int main() {
  const Resident h200 = {132, 66, 30, 14};  // its multiprocessors come in groups of 16 and 18
  for (const Resident& resident : {h200, Resident{132, 66, 32, 16}, Resident{7, 3, 1, 0}, Resident{1, 0, 0, 0}})
    for (int64_t tiles : {1, 2, 3, 12, 16, 17, 66, 96, 131, 132, 133, 192, 1000, 1 << 30})
      for (int64_t steps : {1, 2, 3, 4, 7, 8, 9, 16, 32, 33, 64, 96, 1000, 1 << 23}) check(tiles, steps, resident);
  std::mt19937 random(0);
  for (int i = 0; i < 100000; i++) check(random() % 5000 + 1, random() % 200 + 1, h200);
  // What was measured to be fastest on an H200, us: 64 x 24576 x 4096 43 in halves, 128 x 4096 x 4096 16 in halves of
  // tiles of 64 rows of x (128: 20), 128 x 24576 x 4096 59 in halves of tiles of 128 (64: 74).
  const Resident& resident = h200;
  const auto split_is = [&](int64_t tiles, int64_t steps, int split) {
    const Plan plan = cs336::many_rows::plan(tiles, steps, resident);
    CHECK(plan.split == split);
    return plan;
  };
  split_is(192, 32, 2), split_is(24, 16, 4), split_is(96, 32, 1);
  const int64_t tiles = 64, steps = 32;
  Plan plan = split_is(tiles, steps, 2);
  CHECK(middle_is_faster(plan, split_is(32, steps, 2)));
  plan = cs336::many_rows::plan(384, steps, resident);
  CHECK(!middle_is_faster(plan, split_is(192, steps, 2)));
  return 0;
}
