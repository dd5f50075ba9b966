#include "kernels/attention/attention_bwd_kernel.cuh"

namespace cs336::attention {
template void attention_bwd_of<__nv_bfloat16, 64, 64>(const AttentionBwdParams&, cudaStream_t);
template void attention_bwd_of<__half, 64, 64>(const AttentionBwdParams&, cudaStream_t);
}  // namespace cs336::attention
