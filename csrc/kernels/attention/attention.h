// Attention on CUDA: O = softmax(scale Q K^T) V and its gradients.
#pragma once
#include <cstdint>

#include "common/dtype.h"

using cudaStream_t = struct CUstream_st*;  // as cuda_runtime.h has it: launch plans are tested where there is none

namespace cs336 {

// (batch, tokens, heads, features) with contiguous features; strides in elements. Of packed sequences the batch is one.
struct AttentionTensor {
  void* data;
  int64_t batch_stride, token_stride, head_stride;
};

// Query i of a sequence sees key j if i + offset - window_left <= j <= i + offset + window_right, where
// offset = k length - q length: the last query stands beside the last key.
struct AttentionProblem {
  Dtype dtype;  // F16 or BF16
  int head_dim, value_dim;
  int q_heads, kv_heads;          // kv_heads divides q_heads
  int sequences;                  // the batch, or the number of packed sequences
  int q_tokens, k_tokens;         // of a sequence; packed: of all together
  int max_q, max_k;               // tokens of the longest sequence
  const int *cu_q, *cu_k;         // (sequences + 1,) where packed sequences start, on the device; null when not packed
  int window_left, window_right;  // -1: unbounded
  float scale;
  float softcap;  // scores become softcap * tanh(scores / softcap); 0: they stay
};

struct AttentionFwdParams {
  AttentionProblem problem;
  AttentionTensor q, k, v, o;
  float* lse;      // (batch, q heads, q tokens), natural logarithm; packed: (q heads, q tokens)
  int* workspace;  // attention_fwd_workspace(problem) ints
};

struct AttentionBwdParams {
  AttentionProblem problem;
  AttentionTensor q, k, v, o, dout, dq, dk, dv;
  const float *lse, *dlse;  // as the forward's lse; dlse may be null
  void* workspace;          // the bytes of AttentionBwdWorkspace, 16-byte aligned
  bool deterministic;       // dQ is added up in turns: asked for, or because that is faster (attention_bwd_in_turns)
};

// Both need compute capability 9.0 and the shapes that attention_plan.h supports, with at least one query and one key.
void attention_fwd(const AttentionFwdParams& p, cudaStream_t stream);
void attention_bwd(const AttentionBwdParams& p, cudaStream_t stream);

}  // namespace cs336
