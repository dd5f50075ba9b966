#include "common/nvtx.h"
#include "common/check.h"
