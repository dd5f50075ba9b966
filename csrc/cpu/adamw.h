#pragma once
#include <cstdint>

#include "common/adamw.h"

namespace cs336::cpu {

// Updates elements [begin, end) of one parameter.
void adamw(const AdamwTensor& tensor, int64_t begin, int64_t end, const AdamwHyper& hyper);

}  // namespace cs336::cpu
