#include "kernels/attention/attention_bwd_wide_kernel.cuh"

namespace cs336::attention {
template void attention_bwd_of<__nv_bfloat16, 256, 256>(const AttentionBwdParams&, cudaStream_t);
template void attention_bwd_of<__half, 256, 256>(const AttentionBwdParams&, cudaStream_t);
}  // namespace cs336::attention
