// CUDA_CHECK(expr): throws std::runtime_error with the call and CUDA's message. Last line of every launcher:
// CUDA_CHECK(cudaGetLastError()).
#pragma once
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#define CUDA_CHECK(expr)                                                                                     \
  do {                                                                                                       \
    cudaError_t error_ = (expr);                                                                             \
    if (error_ != cudaSuccess)                                                                               \
      throw std::runtime_error(std::string(__func__) + ": " #expr " failed: " + cudaGetErrorString(error_)); \
  } while (0)
