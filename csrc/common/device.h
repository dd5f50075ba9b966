// What launch plans ask of a device, without CUDA.
#pragma once

namespace cs336 {

inline constexpr int kMaxCluster = 8;  // blocks; the largest that every device with clusters takes

struct Device {
  int index, num_sms;
  int registers;         // of a multiprocessor
  int max_shared_bytes;  // of a block
  bool has_clusters;     // Hopper and newer: clusters, programmatic dependent launch
};

// The threads that share a row.
enum class Span {
  kLanes,  // a power of two of neighbouring lanes of a warp
  kWarps,  // some warps of a block; named barriers, of which a multiprocessor has 64: at most 4 blocks are resident
  kBlock,  // a block, or a cluster of blocks
};

}  // namespace cs336
