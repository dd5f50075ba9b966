"""Results on disk: one JSON file a kind of machine, {name: {"header": where, when and with what, "rows": [...]}}."""

import datetime
import importlib.metadata
import json
import pathlib
import platform
import subprocess
from collections.abc import Iterable
from typing import Any

import torch

from benchmarks import harness
from cs336.utils import device as devices

ROOT = pathlib.Path(__file__).parents[1]
PEERS = ("liger-kernel", "quack-kernels", "nvidia-cutlass-dsl", "tokenspeed-fa3", "fla-core")


def header(device: torch.device, command: str, commit: str | None = None, *, roofs: bool = True) -> dict[str, Any]:
    """What a reader needs to judge and repeat the rows. A GPU's names are those that NVIDIA's tools print.

    Who merges rows adds "beside" where something else used the device: what did.

    roofs: measure what the device can do, for rows that are held against it.
    """
    on_gpu = device.type == "cuda"
    found = {
        "command": command,
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "driver": devices.driver_version() if on_gpu else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": version("triton"),
        "python": platform.python_version(),
        "peers": {name: version(name) for name in PEERS if version(name)},
        "commit": commit or describe_commit(),
        "date": today(),
    }
    if on_gpu:
        found["peers"]["cuDNN"] = str(torch.backends.cudnn.version())
    if roofs:
        matmul = round(harness.matmul_roof(device) / 1e12, 1) if on_gpu else None
        found["roofs"] = {"copy_gbps": round(harness.copy_roof(device) / 1e9, 1), "matmul_bf16_tflops": matmul}
    return found


def cpu_header(command: str, *, cores: int = 1, peers: Iterable[str] = ("torch",)) -> dict[str, Any]:
    """The same for rows of a CPU. peers: packages, of which those that are installed are named with their versions."""
    return {
        "command": command,
        "cpu": cpu_model(),
        "cores": cores,
        "python": platform.python_version(),
        "peers": {name: found for name in peers if (found := version(name))},
        "commit": describe_commit(),
        "date": today(),
    }


def cpu_model() -> str:
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe_commit() -> str | None:
    """Short hash, with "+" if the tree differs from it; None outside a git checkout."""
    command = ["git", "describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.check_output(command, cwd=ROOT, text=True, stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def read(path: pathlib.Path) -> dict[str, Any]:
    """The runs of a file, none if there is no file yet. Raises ValueError if it holds something else."""
    if not path.exists():
        return {}
    try:
        runs = json.loads(path.read_text())
        if all({"header", "rows"} <= run.keys() for run in runs.values()):
            return runs
    except (ValueError, AttributeError):
        pass
    raise ValueError(f"{path} holds something else than benchmark results: name another file")


def of_device(device: torch.device, folder: pathlib.Path = ROOT / "benchmarks/results") -> pathlib.Path:
    """The committed file of this kind of device. Raises ValueError if there is none."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    for path in sorted(folder.glob("*.json")):
        if any(run["header"].get("gpu", "not said") == gpu for run in read(path).values()):
            return path
    raise ValueError(f"no results of {gpu or 'a CPU'} in {folder}: measure with --out first")


def write(path: pathlib.Path, name: str, header: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Put one run into the file, in place of the last run of that name; a line a row, so that diffs can be read."""
    runs = read(path) | {name: {"header": header, "rows": rows}}
    body = ",\n".join(
        f' {json.dumps(name)}: {{\n  "header": {json.dumps(run["header"])},\n  "rows": [\n'
        + ",\n".join(f"   {json.dumps(row)}" for row in run["rows"])
        + "\n  ]\n }"
        for name, run in sorted(runs.items())
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{{\n{body}\n}}\n")
