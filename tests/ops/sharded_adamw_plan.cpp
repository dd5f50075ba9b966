// The host's part of the native sharded step: which elements of a shard are whose, and float32 in two halves. Run by
// test_sharded_adamw_native.py.
#include "kernels/sharded_adamw_plan.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>

#include "common/rounding.h"

using namespace cs336;

#define CHECK(condition)                                             \
  do {                                                               \
    if (!(condition)) std::printf("%s\n", #condition), std::exit(1); \
  } while (0)

namespace {

void check_pieces(const std::vector<int64_t>& numels, int64_t shard, int size) {
  std::vector<int64_t> seen(numels.size(), 0);
  int64_t covered = 0, sum = 0;
  for (const int64_t numel : numels) sum += numel;
  for (int rank = 0; rank < size; rank++) {
    int64_t end = 0;
    for (const Piece& piece : pieces_of(numels, rank * shard, shard)) {
      CHECK(piece.begin == end && piece.begin < piece.end && piece.end <= shard);  // one behind the other
      CHECK(piece.begin % kShardAlign == 0 && piece.end % kShardAlign == 0);
      end = piece.end;
      seen[piece.parameter] += piece.end - piece.begin;
      int64_t begin = 0;  // of the parameter, in the bucket
      for (int i = 0; i < piece.parameter; i++) begin += numels[i];
      CHECK(rank * shard + piece.begin >= begin);
      CHECK(rank * shard + piece.end <= begin + numels[piece.parameter]);
    }
    covered += end;
  }
  CHECK(covered == sum && seen == numels);
}

void check_halves(uint32_t bits) {
  const Halves halves = split_bits(bits);
  float x, rounded;
  const uint32_t high = uint32_t{halves.high} << 16;
  std::memcpy(&x, &bits, 4);
  std::memcpy(&rounded, &high, 4);
  if (x != x) {
    CHECK(rounded != rounded && halves.remainder == 0);
    return;
  }
  CHECK(join_bits(halves) == bits);
  const int64_t away = int64_t{bits} - int64_t{high};
  CHECK(away >= -0x8000 && away < 0x8000);  // to nearest, ties away from zero
}

}  // namespace

int main() {
  std::mt19937 random(0);
  const auto any = [&](int least, int most) { return std::uniform_int_distribution(least, most)(random); };
  for (int i = 0; i < 2000; i++) {
    const int size = any(1, 9);
    std::vector<int64_t> numels(any(0, 12));
    int64_t sum = 0;
    for (int64_t& numel : numels) sum += numel = kShardAlign * (any(0, 3) ? any(0, 40) : 0);
    const int64_t unit = int64_t{kShardAlign} * size, padded = (sum + unit - 1) / unit * unit + unit * any(0, 1);
    check_pieces(numels, padded / size, size);
  }
  for (const uint32_t bits : {0u, 0x80000000u, 0x7f800000u, 0xff800000u, 0x7f7fffffu, 0xff7fffffu, 0x7fffffffu,
                              0xffffffffu, 0x7f800001u, 0x3f808000u, 0x3f807fffu, 0x3f818000u, 1u, 0x8000u})
    check_halves(bits);
  for (int i = 0; i < 1000000; i++) check_halves(random());
}
