"""What a device can do: its properties through cuda-python, and the two roofs that follow from them.

Bandwidth is bus width x memory clock x 2 (double data rate). Peak FLOP/s is SMs x clock x FLOPs a clock, dense, with
fp32 accumulation: the numbers of NVIDIA's data sheets, so that MFU means the same here as elsewhere. On a CPU both
roofs are short measurements.
"""

import functools
import importlib
import pathlib
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

MISSING = "cuda-python is not installed, so GPU properties come from torch: pip install 'cs336[cuda]'"


@dataclass(frozen=True)
class Architecture:
    """FLOPs a clock a SM, dense. half: fp16 and bf16 into fp32."""

    half: int
    tf32: int
    fp32: int
    bf16: bool = True
    geforce: float = 1.0  # GeForce cards run fp32 accumulation at this fraction of the tensor rate
    tensor_clock: float = 1.0  # data sheets count tensor FLOPs at this fraction of the highest clock


TURING = Architecture(half=1024, tf32=0, fp32=128, bf16=False, geforce=0.5)
AMPERE_ADA = Architecture(half=1024, tf32=512, fp32=256, geforce=0.5)
BLACKWELL = Architecture(half=8192, tf32=4096, fp32=256, tensor_clock=0.944)  # B200: 1856 of 1965 MHz
ARCHITECTURES = {
    (7, 0): Architecture(half=1024, tf32=0, fp32=128, bf16=False),  # V100
    (7, 5): TURING,
    (8, 0): Architecture(half=2048, tf32=1024, fp32=128),  # A100
    (8, 6): AMPERE_ADA,
    (8, 9): AMPERE_ADA,
    (9, 0): Architecture(half=4096, tf32=2048, fp32=256, tensor_clock=0.9243),  # H100, H200: 1830 of 1980 MHz
    (10, 0): BLACKWELL,
    (10, 3): BLACKWELL,
    (12, 0): AMPERE_ADA,  # RTX 50 and RTX PRO 6000: the same rates
    (12, 1): AMPERE_ADA,
}


@dataclass(frozen=True)
class Gpu:
    name: str
    capability: tuple[int, int]
    sm_count: int
    clock_hz: float  # highest; 0 where it could not be read, as in the next two
    memory_clock_hz: float
    bus_bits: int
    l2_bytes: int
    memory_bytes: int
    note: str | None = None  # where the properties come from, if not from cuda-python

    @property
    def bandwidth(self) -> float | None:
        """Bytes a second of device memory; None if a clock could not be read."""
        return 2 * self.memory_clock_hz * self.bus_bits / 8 or None

    def peak_flops(self, kind: str) -> float | None:
        """Dense FLOP/s of "bfloat16", "float16", "tf32" or "float32"; None where unknown or not supported."""
        arch = ARCHITECTURES.get(self.capability)
        if arch is None:
            return None
        if kind == "float32":
            return self.sm_count * self.clock_hz * arch.fp32 or None
        rate = {"float16": arch.half, "bfloat16": arch.half if arch.bf16 else 0, "tf32": arch.tf32}.get(kind, 0)
        share = arch.geforce if "GeForce" in self.name else 1.0
        return self.sm_count * self.clock_hz * rate * share * arch.tensor_clock or None


@functools.cache
def gpu(index: int = 0) -> Gpu:
    """Properties of one of the GPUs that torch sees. Raises RuntimeError where there is no such GPU."""
    count = torch.cuda.device_count()
    if not 0 <= index < count:
        raise RuntimeError(f"there is no GPU {index}: torch {torch.__version__} sees {count}")
    try:
        runtime = importlib.import_module("cuda.bindings.runtime")
    except ImportError:
        return from_torch(torch.cuda.get_device_properties(index), MISSING)
    return from_runtime(runtime, index)


def from_runtime(runtime: ModuleType, index: int) -> Gpu:
    """Through `cuda.bindings.runtime`, which starts no context."""

    def check(result: tuple) -> Any:
        error, *value = result
        if error != runtime.cudaError_t.cudaSuccess:
            raise RuntimeError(f"reading the properties of GPU {index} failed: {error}")
        return value[0]

    def attribute(name: str) -> int:
        return check(runtime.cudaDeviceGetAttribute(getattr(runtime.cudaDeviceAttr, f"cudaDevAttr{name}"), index))

    properties = check(runtime.cudaGetDeviceProperties(index))
    return Gpu(
        name=properties.name.decode().rstrip("\0"),
        capability=(properties.major, properties.minor),
        sm_count=properties.multiProcessorCount,
        clock_hz=attribute("ClockRate") * 1e3,
        memory_clock_hz=attribute("MemoryClockRate") * 1e3,
        bus_bits=attribute("GlobalMemoryBusWidth"),
        l2_bytes=properties.l2CacheSize,
        memory_bytes=properties.totalGlobalMem,
    )


def from_torch(properties: Any, note: str | None) -> Gpu:
    """Through torch.cuda.get_device_properties; clocks are 0 where this torch does not tell them."""
    return Gpu(
        name=properties.name,
        capability=(properties.major, properties.minor),
        sm_count=properties.multi_processor_count,
        clock_hz=getattr(properties, "clock_rate", 0) * 1e3,
        memory_clock_hz=getattr(properties, "memory_clock_rate", 0) * 1e3,
        bus_bits=getattr(properties, "memory_bus_width", 0),
        l2_bytes=properties.L2_cache_size,
        memory_bytes=properties.total_memory,
        note=note,
    )


def pick(name: str) -> torch.device:
    """The device of a setting: "auto" is a GPU if there is one. Raises ValueError for one that is not here."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError:
        raise ValueError(f"device {name!r} is unknown: expected auto, cpu, cuda or cuda:1") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {name}, but torch {torch.__version__} sees {torch.cuda.device_count()} GPUs")
    return device


def driver_version() -> str | None:
    """As nvidia-smi prints it; None where there is no NVIDIA driver."""
    if smi := shutil.which("nvidia-smi"):
        command = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        if answer.returncode == 0 and answer.stdout.strip():
            return answer.stdout.split()[0]
    version = pathlib.Path("/proc/driver/nvidia/version")  # NVRM version: NVIDIA UNIX ... Kernel Module  580.0  ...
    words = version.read_text().split() if version.exists() else []
    return next((word for word in words if word[0].isdigit() and "." in word), None)


# ---- roofs ----


def peak_flops(device: torch.device | str, dtype: torch.dtype) -> float | None:
    """The FLOP/s that MFU divides by: dense matrix products of `dtype` accumulated in fp32.

    float32 counts as tf32 where torch.set_float32_matmul_precision allows that. On a CPU: torch's own rate, measured
    once in a fraction of a second. None for a device or dtype that is not known here: then there is no MFU.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return _cpu_matmul_rate(dtype)
    if device.type != "cuda":
        return None
    kind = str(dtype).removeprefix("torch.")
    if kind == "float32" and torch.get_float32_matmul_precision() != "highest":
        kind = "tf32"
    return gpu(_index(device)).peak_flops(kind)


def peak_bandwidth(device: torch.device | str) -> float | None:
    """Bytes a second of the device's memory: from a GPU's properties, measured by a copy on a CPU, None if unknown."""
    device = torch.device(device)
    if device.type == "cpu":
        return _cpu_copy_rate()
    return gpu(_index(device)).bandwidth if device.type == "cuda" else None


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@functools.cache
def _cpu_matmul_rate(dtype: torch.dtype) -> float:
    n = 512
    a, b = (torch.randn(n, n).to(dtype) for _ in range(2))
    return 2 * n**3 / _fastest(lambda: a @ b)


@functools.cache
def _cpu_copy_rate() -> float:
    source = torch.randn(1 << 24)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _fastest(lambda: target.copy_(source))


def _fastest(call: Callable[[], Any], seconds: float = 0.1) -> float:
    """Seconds of the fastest of the calls that fit in `seconds`, of at least 3."""
    call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)
