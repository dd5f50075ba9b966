// Sampling of next tokens on CUDA. cs336/ops/ref/sample.py has the formulas.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "common/dtype.h"

namespace cs336 {

struct SampleParams {
  const void* logits;  // (rows, vocabulary)
  int64_t logits_stride;
  const float* temperature;
  const int* top_k;
  const float *top_p, *min_p;
  const int64_t *seeds, *offsets;
  const int* counts;  // (rows, vocabulary) or null; so are the penalties, (rows,)
  int64_t counts_stride;
  const float *repetition, *presence, *frequency;
  const float* bias;  // (rows, vocabulary) or null
  int64_t bias_stride;
  int64_t* tokens;
  float* logprobs;
  int64_t* top_tokens;  // (rows, num_logprobs)
  float* top_logprobs;
  int rows, vocabulary, num_logprobs;
  Dtype dtype;  // of logits: F32, F16, BF16
};

inline constexpr int kSampleCluster = 8;              // blocks that hold a row in their shared memory
inline constexpr int kMaxVocabulary = 8 * 48 * 1024;  // what fits there

void sample(const SampleParams& p, cudaStream_t stream);  // compute capability 9.0

}  // namespace cs336
