#pragma once
#include <cstdint>

#include "common/adamw.h"

namespace cs336 {

// Updates elements [begin, end) of one parameter. The gradients are multiplied by grad_scale first.
void adamw_range(const AdamwTensor& tensor, int64_t begin, int64_t end, float grad_scale, const AdamwCoefficients& c);

}  // namespace cs336
