"""cs336: one language-model stack, from raw bytes to reinforcement learning, on kernels you can read.

Importing the package imports nothing heavy: the names below load torch when they are first used, and
`cs336.tokenizer` never does.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {"enable": "cs336.backend", "disable": "cs336.backend", "deterministic": "cs336.ops.registry"}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'cs336' has no attribute {name!r}")
