// Which elements of a shard belong to which parameter. A bucket holds parameters one behind the other and is cut into
// equal shards, wherever that falls.
#pragma once
#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

namespace cs336 {

constexpr int kShardAlign = 16;  // elements: every parameter and every shard begins at a multiple

struct Piece {
  int64_t begin, end;  // elements of the shard
  int parameter;       // of the bucket
};

// Those of the shard of `length` elements that begins at element `start` of the bucket, in order, none empty.
inline std::vector<Piece> pieces_of(std::span<const int64_t> numels, int64_t start, int64_t length) {
  std::vector<Piece> pieces;
  int64_t begin = -start;
  for (size_t i = 0; i < numels.size(); begin += numels[i++]) {
    const int64_t from = std::max<int64_t>(begin, 0), to = std::min(begin + numels[i], length);
    if (from < to) pieces.push_back({.begin = from, .end = to, .parameter = static_cast<int>(i)});
  }
  return pieces;
}

}  // namespace cs336
