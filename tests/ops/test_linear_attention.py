"""Linear attention and the gated delta rule: chunks and kernels against the recurrence in float64."""

import pytest
import torch
import torch.nn.functional as F
from close import assert_close_to_ref

from cs336 import ops
from cs336.ops import chunked, registry

CUDA = torch.cuda.is_available()
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SHAPES = [(1, 1, 1, 2, 3, 5), (2, 1, 2, 65, 24, 70), (1, 2, 2, 64, 16, 16), (1, 1, 2, 130, 70, 20)]  # B, G, H, T, K, V
