// Attention backward: from the head dimension and the type to the kernels that were compiled for them.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <stdexcept>
#include <string>

#include "common/nvtx.h"
#include "kernels/attention/attention.h"

namespace cs336 {
namespace attention {
template <typename T, int kHeadDim, int kValueDim>
void attention_bwd_of(const AttentionBwdParams& params, cudaStream_t stream);  // in attention_bwd_d*_sm90.cu
}

void attention_bwd(const AttentionBwdParams& params, cudaStream_t stream) {
  NVTX_FN();
  const AttentionProblem& p = params.problem;
  const auto run = [&]<int kHeadDim, int kValueDim>() {
    if (p.dtype == Dtype::BF16)
      attention::attention_bwd_of<__nv_bfloat16, kHeadDim, kValueDim>(params, stream);
    else
      attention::attention_bwd_of<__half, kHeadDim, kValueDim>(params, stream);
  };
  if (p.head_dim == 64 && p.value_dim == 64)
    run.template operator()<64, 64>();
  else if (p.head_dim == 96 && p.value_dim == 96)
    run.template operator()<96, 96>();
  else if (p.head_dim == 128 && p.value_dim == 128)
    run.template operator()<128, 128>();
  else if (p.head_dim == 192 && p.value_dim == 128)
    run.template operator()<192, 128>();
  else if (p.head_dim == 256 && p.value_dim == 256)
    run.template operator()<256, 256>();
  else
    throw std::invalid_argument("attention_bwd: no kernel for head dimension " + std::to_string(p.head_dim) +
                                " with value dimension " + std::to_string(p.value_dim));
}

}  // namespace cs336
