#include "kernels/attention/attention_fwd_kernel.cuh"

namespace cs336::attention {
template void attention_fwd_of<__nv_bfloat16, 128, 128>(const AttentionFwdParams&, cudaStream_t);
template void attention_fwd_of<__half, 128, 128>(const AttentionFwdParams&, cudaStream_t);
}  // namespace cs336::attention
