// NVTX_FN() opens a range named after the function and closes it at the end of the scope: first line of every launcher.
#pragma once
#include <nvtx3/nvToolsExt.h>

namespace cs336 {
struct NvtxRange {
  explicit NvtxRange(const char* name) { nvtxRangePushA(name); }
  ~NvtxRange() { nvtxRangePop(); }
  NvtxRange(const NvtxRange&) = delete;
  NvtxRange& operator=(const NvtxRange&) = delete;
};
}  // namespace cs336

#define NVTX_FN() ::cs336::NvtxRange nvtx_range_(__func__)
