#include "kernels/attention/attention_bwd_kernel.cuh"

namespace cs336::attention {
template void attention_bwd_of<__nv_bfloat16, 96, 96>(const AttentionBwdParams&, cudaStream_t);
template void attention_bwd_of<__half, 96, 96>(const AttentionBwdParams&, cudaStream_t);
}  // namespace cs336::attention
