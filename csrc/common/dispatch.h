// Runtime dtypes to CUDA's element types.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/dtype.h"

namespace cs336::cuda {

template <typename F>
auto dispatch_dtype(Dtype dtype, F&& f) {
  return cs336::dispatch_dtype<__half, __nv_bfloat16>(dtype, std::forward<F>(f));
}

}  // namespace cs336::cuda
