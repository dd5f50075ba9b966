#include "kernels/attention/attention_fwd_kernel.cuh"

namespace cs336::attention {
template void attention_fwd_of<__nv_bfloat16, 256, 256>(const AttentionFwdParams&, cudaStream_t);
template void attention_fwd_of<__half, 256, 256>(const AttentionFwdParams&, cudaStream_t);
}  // namespace cs336::attention
