#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "common/dtype.h"

namespace cs336::cuda {

struct CrossEntropyOptions {
  int64_t ignore_index;
  float softcap;  // 0: none
  float z_loss, label_smoothing;
};

struct CrossEntropyRows {
  const void* logits;      // (N, V)
  const int64_t* targets;  // (N,); outside [0, V): the row becomes NaN
  int64_t N, V;
  int64_t stride;  // of logits, in elements
  Dtype dtype;     // of logits and their gradient
  CrossEntropyOptions options;
};

struct CrossEntropyFwdParams {
  CrossEntropyRows rows;
  float* loss;         // (N,)
  float* lse;          // (N,)
  float* entropy;      // (N,) or null
  const float* scale;  // null, or one number: the logits become their gradient times it
};

struct CrossEntropyBwdParams {
  CrossEntropyRows rows;
  const float* lse;       // (N,)
  const float* entropy;   // (N,), read beside dentropy
  const float* dloss;     // (N,)
  const float* dlse;      // (N,) or null
  const float* dentropy;  // (N,) or null
  void* dlogits;          // (N, V) contiguous
};

void cross_entropy_fwd(const CrossEntropyFwdParams& p, cudaStream_t stream);
void cross_entropy_bwd(const CrossEntropyBwdParams& p, cudaStream_t stream);

}  // namespace cs336::cuda
