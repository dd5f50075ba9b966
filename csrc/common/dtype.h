// The element types of kernels, without torch.
#pragma once

namespace cs336 {
enum class Dtype { F32, F16, BF16 };
}  // namespace cs336
