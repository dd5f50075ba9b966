// What every torch binding needs: dtypes, checks, workspaces, the stream. Header-only, stable ABI only.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <initializer_list>

#include "common/dtype.h"

struct CUstream_st;

namespace cs336 {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Dtype::F32;
    case ScalarType::Half:
      return Dtype::F16;
    case ScalarType::BFloat16:
      return Dtype::BF16;
    case ScalarType::Double:
      return Dtype::F64;
    case ScalarType::Float8_e4m3fn:
      return Dtype::F8E4M3;
    case ScalarType::Float8_e5m2:
      return Dtype::F8E5M2;
    case ScalarType::Byte:
      return Dtype::U8;
    case ScalarType::Char:
      return Dtype::I8;
    case ScalarType::Short:
      return Dtype::I16;
    case ScalarType::Int:
      return Dtype::I32;
    case ScalarType::Long:
      return Dtype::I64;
    case ScalarType::Bool:
      return Dtype::Bool;
    default:
      STD_TORCH_CHECK(false, name, " has a dtype that no kernel takes");
  }
}

// The dtypes that dispatch_dtype knows.
inline Dtype float_dtype_of(const Tensor& t, const char* name) {
  const Dtype dtype = dtype_of(t, name);
  STD_TORCH_CHECK(is_float_dtype(dtype), name, " must be float32, float16 or bfloat16");
  return dtype;
}

inline void* data_of(const Tensor& t) { return const_cast<void*>(t.const_data_ptr()); }

inline void check_device(const Tensor& t, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(
      t.is_cpu() == x.is_cpu() && t.is_cuda() == x.is_cuda() && t.get_device_index() == x.get_device_index(), name,
      " must be on the device of the other tensors");
}

// (M, N), N >= 1, with the last dim contiguous; rows may be strided.
inline void check_rows(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2, name, " must have 2 dims (rows, features), got ", t.dim());
  STD_TORCH_CHECK(t.size(1) >= 1, name, " must have at least one feature");
  STD_TORCH_CHECK(t.size(1) == 1 || t.stride(1) == 1, name, " must be contiguous in its last dim");
}

inline void check_rows_like(const Tensor& t, const char* name, const Tensor& x, const char* x_name) {
  check_rows(t, name);
  STD_TORCH_CHECK(t.size(0) == x.size(0) && t.size(1) == x.size(1), name, " must have the shape of ", x_name);
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), name, " must have the dtype of ", x_name);
  check_device(t, name, x);
}

// (N,) contiguous, in x's dtype or float32 (master weights).
inline void check_features(const Tensor& w, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(w.dim() == 1 && w.size(0) == x.size(1), name, " must have shape (", x.size(1), ",)");
  STD_TORCH_CHECK(w.size(0) == 1 || w.stride(0) == 1, name, " must be contiguous");
  STD_TORCH_CHECK(w.scalar_type() == x.scalar_type() || w.scalar_type() == ScalarType::Float, name,
                  " must be in x's dtype or float32");
  check_device(w, name, x);
}

// (M,) contiguous float32: what a forward kept of each row of x.
inline void check_row_stat(const Tensor& s, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(s.dim() == 1 && s.size(0) == x.size(0), name, " must have shape (", x.size(0), ",)");
  STD_TORCH_CHECK(s.size(0) <= 1 || s.stride(0) == 1, name, " must be contiguous");
  STD_TORCH_CHECK(s.scalar_type() == ScalarType::Float, name, " must be float32");
  check_device(s, name, x);
}

// Uninitialised and contiguous, on x's device. torch::stable::new_empty looks the operator up by name at each call and
// takes twice as long.
inline Tensor new_tensor(const Tensor& x, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  std::array<int64_t, 8> strides;
  const size_t dims = sizes.size();
  for (size_t d = dims; d-- > 0;)
    strides[d] = d + 1 == dims ? 1 : strides[d + 1] * std::max<int64_t>(1, sizes.begin()[d + 1]);
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes.begin(), strides.data(), static_cast<int32_t>(dtype),
                                                  device_type, x.get_device_index(), &handle));
  return Tensor(handle);
}

#ifdef USE_CUDA
inline CUstream_st* current_stream(const Tensor& t) {  // a cudaStream_t
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<CUstream_st*>(stream);
}
#endif

}  // namespace cs336
