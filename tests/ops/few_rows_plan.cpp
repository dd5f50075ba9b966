// Every row of x is taken once, every tile by one team, and a block's shared memory holds what it keeps.
#include <cstdio>
#include <vector>

#include "kernels/linear_few_rows/linear_few_rows_plan.h"

using namespace cs336::few_rows;

constexpr int64_t kBytes = 232448;  // of a block's shared memory, on an H200
constexpr int kMultiprocessors = 132;

const char* check(int M, int N, int K, int of_step) {
  for (int first = 0, rows; first < M; first += rows) {
    rows = rows_at_once(M - first, K, of_step, kBytes);
    if (rows <= 0 || rows > M - first) return "no room for a row";
    const int of_cluster = parts(rows, K, of_step, kBytes), features = features_of(K, of_step, of_cluster);
    if (of_cluster < 1 || features * of_cluster < K || (features * of_cluster - K) / of_cluster >= of_step)
      return "features";
    const int of_ring = stages(rows, features, of_cluster, kBytes);
    if (of_ring < kLeastStages || shared_bytes(rows, features, of_cluster, of_ring) > kBytes) return "shared memory";
    const int tiles = ceil_div(N, kTileRows), clusters = of_cluster == 1 ? kMultiprocessors : 120 / of_cluster;
    const Plan p = plan(tiles, K, of_step, of_cluster, of_ring, clusters);
    const int count = p.blocks / of_cluster, of_block = kWarps / p.split;
    if (p.split < 1 || p.split > p.steps || p.steps * of_step != features || p.teams != count * of_block)
      return "teams";
    std::vector<int> taken(tiles);
    for (int cluster = 0; cluster < count; cluster++)
      for (int team = 0, rounds = 0; team < of_block; team++, rounds = 0) {
        int tile = of_cluster > 1 ? cluster * of_block + team : team * count + cluster;
        for (; tile < tiles; tile += p.teams, rounds++) taken[tile]++;
        if (rounds > p.rounds) return "more rounds than a cluster waits for";
      }
    for (int times : taken)
      if (times != 1) return "a tile is not one team's";
  }
  return nullptr;
}

int main() {
  for (int of_step : {64, 128, 256})
    for (int K : {64, 320, 1184, 2048, 4096, 8192, 12288, 28672, 57344})
      for (int N : {1, 17, 1001, 4096, 24576})
        for (int M = 1; M <= 64; M++)
          if (const char* wrong = check(M, N, K, of_step)) {
            std::printf("%s: M %d N %d K %d, %d features a step\n", wrong, M, N, K, of_step);
            return 1;
          }
}
