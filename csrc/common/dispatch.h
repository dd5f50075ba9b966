// Runtime values to template arguments: the visible place.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>
#include <utility>

#include "common/dtype.h"

namespace cs336 {

// f(T()) with the element type of `dtype`.
template <typename F>
void dispatch_dtype(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::F32:
      return f(float());
    case Dtype::F16:
      return f(__half());
    case Dtype::BF16:
      return f(__nv_bfloat16());
  }
}

// f(std::true_type()) or f(std::false_type()).
template <typename F>
void dispatch_bool(bool value, F&& f) {
  value ? f(std::true_type()) : f(std::false_type());
}

}  // namespace cs336
