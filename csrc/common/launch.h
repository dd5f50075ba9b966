// Launch a kernel with what its LaunchShape asks for: shared memory, a cluster, an early start.
#pragma once
#include <cuda_runtime.h>

#include <array>
#include <map>
#include <mutex>

#include "common/check.h"
#include "common/device.h"

namespace cs336 {

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
  dim3 threads;
  size_t shared_bytes = 0;   // dynamic
  dim3 cluster = {1, 1, 1};  // blocks; the grid is a multiple
  bool dependent = false;    // starts while the kernel before it still runs, and calls wait_for_predecessor()

  unsigned cluster_size() const { return cluster.x * cluster.y * cluster.z; }
};

// Lets a kernel have as much dynamic shared memory as the device allows, once per device. Without, it has 48 KB with
// its static one.
template <auto kKernel>
void allow_shared_memory(const LaunchShape& shape, const Device& device) {
  if (shape.shared_bytes == 0) return;
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
    if (shape.dependent && device.has_clusters)
      add(cudaLaunchAttributeProgrammaticStreamSerialization).programmaticStreamSerializationAllowed = 1;
    if (shape.cluster_size() > 1)
      add(cudaLaunchAttributeClusterDimension).clusterDim = {shape.cluster.x, shape.cluster.y, shape.cluster.z};
  }
  LaunchConfig(const LaunchConfig&) = delete;  // config points into attributes
  LaunchConfig& operator=(const LaunchConfig&) = delete;

 private:
  cudaLaunchAttributeValue& add(cudaLaunchAttributeID id) {
    attributes[config.numAttrs].id = id;
    return attributes[config.numAttrs++].val;
  }
};

template <auto kKernel, typename... Params>
void launch(const LaunchShape& shape, cudaStream_t stream, const Params&... params) {
  const Device& device = current_device();
  allow_shared_memory<kKernel>(shape, device);
  const LaunchConfig launch(shape, stream, device);
  CUDA_CHECK(cudaLaunchKernelEx(&launch.config, kKernel, params...));
}

// How many clusters of this shape the device holds at a time: what a grid that must be resident at once may have.
// Remembered for each device: the driver takes microseconds.
template <auto kKernel>
int max_resident_clusters(const LaunchShape& shape) {
  static std::mutex mutex;
  static std::map<std::array<size_t, 4>, int> answers;
  const Device& device = current_device();
  const size_t threads = shape.threads.x * shape.threads.y * shape.threads.z;
  const std::array<size_t, 4> key{static_cast<size_t>(device.index), threads, shape.shared_bytes, shape.cluster_size()};
  const std::lock_guard lock(mutex);
  auto answer = answers.find(key);
  if (answer == answers.end()) {
    allow_shared_memory<kKernel>(shape, device);
    const LaunchConfig launch(shape, nullptr, device);
    int clusters;
    CUDA_CHECK(cudaOccupancyMaxActiveClusters(&clusters, kKernel, &launch.config));
    answer = answers.emplace(key, clusters).first;
  }
  return answer->second;
}

}  // namespace cs336
