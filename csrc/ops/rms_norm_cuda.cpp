#include "ops/tensor.h"
