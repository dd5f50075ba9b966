// Launch a kernel with shared memory, a cluster and programmatic dependent launch, as far as the device has them.
#pragma once
#include <cuda_runtime.h>

#include <array>
#include <mutex>

#include "common/check.h"

namespace cs336 {

struct Device {
  int index, num_sms;
  int registers;         // of a multiprocessor
  int max_shared_bytes;  // of a block
  bool has_clusters;     // Hopper and newer: clusters, programmatic dependent launch
};

// The current device; its properties are asked of the driver once.
inline const Device& current_device() {
  static std::array<Device, 64> devices;
  static std::array<std::once_flag, 64> asked;
  int index;
  CUDA_CHECK(cudaGetDevice(&index));
  std::call_once(asked.at(index), [index] {
    const auto ask = [index](cudaDeviceAttr attribute) {
      int value;
      CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, index));
      return value;
    };
    devices[index] = {.index = index,
                      .num_sms = ask(cudaDevAttrMultiProcessorCount),
                      .registers = ask(cudaDevAttrMaxRegistersPerMultiprocessor),
                      .max_shared_bytes = ask(cudaDevAttrMaxSharedMemoryPerBlockOptin),
                      .has_clusters = ask(cudaDevAttrComputeCapabilityMajor) >= 9};
  });
  return devices[index];
}

struct LaunchShape {
  dim3 grid;
  unsigned threads;
  size_t shared_bytes = 0;  // dynamic
  unsigned cluster = 1;     // blocks
};

// Lets a kernel have as much dynamic shared memory as the device allows, once per device.
template <auto kKernel>
void allow_shared_memory(const Device& device) {
  static std::array<std::once_flag, 64> done;
  std::call_once(done[device.index], [&] {
    cudaFuncAttributes attributes;
    CUDA_CHECK(cudaFuncGetAttributes(&attributes, kKernel));
    CUDA_CHECK(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    device.max_shared_bytes - static_cast<int>(attributes.sharedSizeBytes)));
  });
}

struct LaunchConfig {
  std::array<cudaLaunchAttribute, 2> attributes;
  cudaLaunchConfig_t config;

  LaunchConfig(const LaunchShape& shape, cudaStream_t stream, const Device& device)
      : config{.gridDim = shape.grid,
               .blockDim = shape.threads,
               .dynamicSmemBytes = shape.shared_bytes,
               .stream = stream,
               .attrs = attributes.data(),
               .numAttrs = 0} {
    if (device.has_clusters) {
      attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (shape.cluster > 1) {
      attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
      attributes[config.numAttrs++].val.clusterDim = {.x = shape.cluster, .y = 1, .z = 1};
    }
  }
  LaunchConfig(const LaunchConfig&) = delete;  // config points into attributes
  LaunchConfig& operator=(const LaunchConfig&) = delete;
};

template <auto kKernel, typename... Params>
void launch(const LaunchShape& shape, cudaStream_t stream, const Params&... params) {
  const Device& device = current_device();
  if (shape.shared_bytes > 48 * 1024) allow_shared_memory<kKernel>(device);
  const LaunchConfig launch(shape, stream, device);
  CUDA_CHECK(cudaLaunchKernelEx(&launch.config, kKernel, params...));
}

// How many clusters of this shape the device holds at a time: what a grid that must be resident at once may have.
template <auto kKernel>
int max_resident_clusters(const LaunchShape& shape) {
  const Device& device = current_device();
  if (shape.shared_bytes > 48 * 1024) allow_shared_memory<kKernel>(device);
  const LaunchConfig launch(shape, nullptr, device);
  int clusters;
  CUDA_CHECK(cudaOccupancyMaxActiveClusters(&clusters, kKernel, &launch.config));
  return clusters;
}

}  // namespace cs336
