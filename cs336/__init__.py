"""cs336: one language-model stack, from raw bytes to reinforcement learning, on kernels you can read.

Importing the package imports nothing heavy: the names below, and the folders, are imported when they are first used.
`cs336.tokenizer` never loads torch.
"""

import importlib
import importlib.util
import platform
from typing import Any

__version__ = "0.1.0"

_HOME = {"enable": "cs336.backend", "disable": "cs336.backend"}
_HOME |= {"deterministic": "cs336.ops.registry", "invariant": "cs336.ops.registry"}
_HOME |= dict.fromkeys(
    (
        f"flash_attn_{kind}func"
        for kind in ("", "qkvpacked_", "kvpacked_", "varlen_", "varlen_qkvpacked_", "varlen_kvpacked_")
    ),
    "cs336.flash_attn",
)
_HOME["flash_attn_with_kvcache"] = "cs336.flash_attn"
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name == "_text" and importlib.util.find_spec("cs336._text") is None:  # what nearly everything begins with
        raise ImportError(
            f"cs336 is not compiled for Python {platform.python_version()}: run "
            "`pip install --no-build-isolation -e .` in its clone, which also goes on with a build that was cut"
        )
    if not name.startswith("_") and importlib.util.find_spec(f"cs336.{name}"):
        return importlib.import_module(f"cs336.{name}")
    raise AttributeError(f"module 'cs336' has no attribute {name!r}")
