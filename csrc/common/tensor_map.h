// What makes the maps that the copy engine reads tensors by.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <stdexcept>

#include "common/check.h"

namespace cs336 {

// cuTensorMapEncodeTiled through the runtime, so that nothing links against libcuda.
inline decltype(&cuTensorMapEncodeTiled) encode_tiled() {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    cudaDriverEntryPointQueryResult found;
    void* function = nullptr;
    CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found));
    if (found != cudaDriverEntryPointSuccess)
      throw std::runtime_error("the driver has no cuTensorMapEncodeTiled; it needs CUDA 12");
    return reinterpret_cast<Encode>(function);
  }();
  return encode;
}

}  // namespace cs336
