// What an op that samples next tokens is told. cs336/ops/ref/sample.py has the formulas.
#pragma once
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

inline constexpr int kInPrompt = 1 << 30;  // in counts: the token is in the prompt

}  // namespace cs336
