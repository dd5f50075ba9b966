// The element types of kernels, without torch, and the one place where they become template arguments.
#pragma once
#include <stdexcept>
#include <type_traits>
#include <utility>

namespace cs336 {

enum class Dtype { F32, F16, BF16, F64, F8E4M3, F8E5M2, U8, I8, I16, I32, I64, Bool };

constexpr int size_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::F64:
    case Dtype::I64:
      return 8;
    case Dtype::F32:
    case Dtype::I32:
      return 4;
    case Dtype::F16:
    case Dtype::BF16:
    case Dtype::I16:
      return 2;
    default:
      return 1;
  }
}

constexpr bool is_float_dtype(Dtype dtype) {  // what dispatch_dtype takes
  return dtype == Dtype::F32 || dtype == Dtype::F16 || dtype == Dtype::BF16;
}

// f(T()) with the element type of `dtype`; F16 and BF16 are what the caller's device calls them.
template <typename F16, typename BF16, typename F>
auto dispatch_dtype(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::F32:
      return f(float());
    case Dtype::F16:
      return f(F16());
    case Dtype::BF16:
      return f(BF16());
    default:
      throw std::invalid_argument("this kernel takes float32, float16 and bfloat16 alone");
  }
}

// f(std::true_type()) or f(std::false_type()).
template <typename F>
auto dispatch_bool(bool value, F&& f) {
  return value ? f(std::true_type()) : f(std::false_type());
}

}  // namespace cs336
