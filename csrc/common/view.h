// A tensor as kernels see it: where it is, how large, and how far apart its elements are.
#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace cs336 {

template <int kRank>
struct View {
  void* data;
  int64_t sizes[kRank];
  int64_t strides[kRank];  // in elements
  Dtype dtype;
};

}  // namespace cs336
