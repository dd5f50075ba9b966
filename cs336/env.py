"""What `cs336 env` prints: what is here, what is not, and how to get it, on one screen."""

import importlib
import importlib.metadata
import os
import pathlib
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cs336 import __version__

try:
    import torch
except ModuleNotFoundError:  # the tokenizer alone works without it
    HAS_TORCH = False
else:
    from cs336 import _load
    from cs336.ops import registry
    from cs336.utils import device as devices

    HAS_TORCH = True

HERE = pathlib.Path(__file__).parent
PLAIN = "ref (plain torch)"
Line = tuple[str, bool, str]  # what, is it here, a sentence


def print_env(console: Console | None = None) -> None:
    """Print versions, GPUs, compiled libraries, extras, and the variants of every op. Without torch, what concerns the
    tokenizer."""
    console = console or Console()
    for title, lines in (
        ("Versions", versions),
        ("GPUs", gpus),
        ("Compiled", compiled),
        ("Extras", extras),
        ("Ops: where each variant has a kernel", variants),
    ):
        if lines in (gpus, variants) and not HAS_TORCH:
            continue
        table = Table(
            title=title, title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False
        )
        for what, here, sentence in lines():
            table.add_row(Text("yes" if here else "no", style="green" if here else "yellow"), what, Text(sentence))
        console.print(table)


def versions() -> Iterator[Line]:
    yield "cs336", True, f"{__version__} in {HERE}"
    yield "Python", True, f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if HAS_TORCH:
        built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU alone"
        yield "torch", True, f"{torch.__version__}, built for {built_for}; {torch.get_num_threads()} CPU threads"
        driver = devices.driver_version()
        yield (
            "NVIDIA driver",
            driver is not None,
            driver or "none here: install it from nvidia.com/drivers if there is a GPU",
        )
    else:
        yield "torch", False, "the tokenizer works without it; for the rest install cs336 without CS336_TEXT_ONLY"
    nvcc = shutil.which("nvcc")
    yield "nvcc", nvcc is not None, _nvcc(nvcc) if nvcc else "not on PATH: install the CUDA toolkit 12.8 or newer"
    if forced := {name: value for name, value in os.environ.items() if name.startswith("CS336_")}:
        yield "environment", True, " ".join(f"{name}={value}" for name, value in sorted(forced.items()))


def _nvcc(path: str) -> str:
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release ([\d.]+)", said)
    return f"{release[1] if release else 'of unknown version'} at {path}"


def gpus() -> Iterator[Line]:
    if not torch.cuda.is_available():
        how = (
            ""
            if torch.version.cuda
            else "; this torch is built for the CPU: install one built for CUDA from pytorch.org"
        )
        yield "none", False, f"torch sees no CUDA device{how}"
    for index in range(torch.cuda.device_count()):
        gpu = devices.gpu(index)
        peak, bandwidth = gpu.peak_flops("bfloat16"), gpu.bandwidth
        facts = (
            "compute capability {}.{}".format(*gpu.capability),
            f"{gpu.sm_count} SMs at {gpu.clock_hz / 1e6:.0f} MHz",
            f"{peak / 1e12:.0f} TFLOP/s dense bf16" if peak else "peak unknown here, so no MFU",
            f"{gpu.memory_bytes / 2**30:.0f} GiB" + (f" at {bandwidth / 1e12:.2f} TB/s" if bandwidth else ""),
            f"{gpu.l2_bytes / 2**20:.0f} MiB L2",
        )
        yield gpu.name, True, ", ".join(facts)
        if gpu.note:
            yield "", False, gpu.note


def compiled() -> Iterator[Line]:
    """Each compiled library, and why it is not loaded."""
    try:
        importlib.import_module("cs336._text")
        text = None
    except ImportError as error:
        text = f"{error}: run `pip install --no-build-isolation -e .` with a C++ compiler"
    yield "_text (tokenizer)", text is None, text or "loaded"
    if not HAS_TORCH:
        yield "_C, _C_cuda (kernels)", False, "not built: they need torch"
        return
    cuda = _load.missing("cuda")
    if cuda and not torch.cuda.is_available() and (HERE / "_C_cuda.so").exists():
        cuda = f"built, not loaded: {cuda}"
    elif cuda and not shutil.which("nvcc"):
        cuda = f"{cuda}; nvcc is not on PATH"
    for name, what, missing in (
        ("_C", "CPU kernels", _load.missing("cpu")),
        ("_C_cuda", "CUDA kernels", cuda),
    ):
        yield f"{name} ({what})", missing is None, missing or "loaded"


def extras() -> Iterator[Line]:
    """Each extra of pyproject.toml: what is installed of it, and the command for what is not."""
    try:
        requirements = importlib.metadata.requires("cs336") or []
    except importlib.metadata.PackageNotFoundError:
        yield (
            "cs336",
            False,
            "runs from a source tree that is not installed, so its extras are unknown: "
            "pip install --no-build-isolation -e .",
        )
        return
    packages: dict[str, list[str]] = {}
    for requirement in requirements:
        name, extra = re.match(r"[\w.-]+", requirement), re.search(r'extra == "([\w-]+)"', requirement)
        assert name is not None
        packages.setdefault(extra[1] if extra else "core", []).append(name[0])
    used = {name for extra_name, names in packages.items() if extra_name != "dev" for name in names}
    for extra_name, names in packages.items():
        missing = [name for name in names if not _installed(name)]
        wanted = "cs336" if extra_name == "core" else f"'cs336[{extra_name}]'"
        shown = [name for name in names if extra_name != "dev" or name not in used]  # others' are named above
        here = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in shown if n not in missing)
        sentence = (
            f"{here + '; ' if here else ''}missing {', '.join(missing)}: pip install {wanted}" if missing else here
        )
        yield extra_name, not missing, sentence


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def variants() -> Iterator[Line]:
    """Ops that have kernels in the same places, a line; "no" where a GPU is left to plain torch."""
    devices_here = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices_here.append(torch.device("cuda", torch.cuda.current_device()))
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in registry.OPS:
        where = tuple("+".join(registry.kernels(name, d)) for d in devices_here)
        groups.setdefault(where, []).append(name)
    for where, names in groups.items():
        served = {d.type: kernels for d, kernels in zip(devices_here, where, strict=True)}
        what = ", ".join(f"{d}: {PLAIN if kernels == 'ref' else kernels}" for d, kernels in served.items())
        yield what, served.get("cuda") != "ref", " ".join(names)
