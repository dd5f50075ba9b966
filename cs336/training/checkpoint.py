"""Checkpoints: a directory that is whole or absent, whatever happens while it is written.

    PATH/model.safetensors      parameters and buffers
    PATH/optimizer.safetensors  the optimizer's tensors, named PARAMETER.NAME: 0.exp_avg
    PATH/state.json             the iteration, the optimizer's numbers, the model's configuration, a checksum of each
                                file, and what the caller added

They are written under a temporary name, flushed to the disk, then renamed. Nothing is ever unpickled. In a file object,
and at a path with a suffix (model.pt), they are the members of a zip archive. Format 1, without configuration and
checksums, is read too.
"""

import base64
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from typing import IO, Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cs336.parallel import ShardedOptimizer
from cs336.utils.config import parse, to_table
from cs336.utils.files import replacing, sync

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
FORMAT = 2
READABLE = (1, FORMAT)


Config = TypeVar("Config")


class DamagedError(ValueError):
    """A checkpoint whose files are not what was written."""


def save_checkpoint(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    iteration: int,
    path: str | os.PathLike | IO[bytes],
    *,
    extra: dict[str, Any] | None = None,
) -> pathlib.Path | None:
    """Write a checkpoint at `path`, in place of one that is already there, and return where it is.

    Args:
        model: any module (a compiled one is saved under its own names, tied weights once). Its `config`, if it has a
            dataclass of that name, is kept too: see `read_model_config`.
        optimizer: any optimizer whose state is tensors and numbers, or None.
        iteration: steps done.
        path: becomes a directory; with a suffix (model.pt) one file, a zip archive of it, which is also what a file
            object gets.
        extra: JSON values to keep beside it; `read_extra` returns them.

    Raises OSError if it cannot be written, a full disk too: nothing is left of it then, and what was at `path` and
    beside it is untouched. Raises FileExistsError if something else than a checkpoint is at `path`.
    """
    return write_snapshot(snapshot(model, optimizer, iteration, extra=extra), path)


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds."""

    tensors: dict[str, Tensor]
    tied: dict[str, str]
    optimizer_tensors: dict[str, Tensor] | None
    state: dict[str, Any]
    """JSON values: state.json but for the checksums."""


def snapshot(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    iteration: int,
    *,
    extra: dict[str, Any] | None = None,
    copy: bool = False,
) -> Snapshot:
    """What save_checkpoint writes; with `copy` in memory of its own on the host, so that training may go on."""
    tensors, tied = _distinct(_unwrapped(model).state_dict())
    optimizer_tensors, numbers = None, None
    if optimizer is not None:
        whole = optimizer.consolidate(to=None) if isinstance(optimizer, ShardedOptimizer) else optimizer.state_dict()
        assert whole is not None
        apart, numbers = _split_optimizer(whole)
        optimizer_tensors = _distinct(apart, tie=False)[0]
    config = getattr(_unwrapped(model), "config", None)
    state = {
        "format": FORMAT,
        "iteration": iteration,
        "tied": tied,
        "optimizer": numbers,
        "model": to_table(config) if dataclasses.is_dataclass(config) else None,
        "extra": extra or {},
    }
    if copy:
        state = json.loads(json.dumps(state))
        tensors = _on_host(tensors)
        optimizer_tensors = None if optimizer_tensors is None else _on_host(optimizer_tensors)
    return Snapshot(tensors, tied, optimizer_tensors, state)


def _on_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}


def write_snapshot(snapshot: Snapshot, path: str | os.PathLike | IO[bytes]) -> pathlib.Path | None:
    """Write a checkpoint as save_checkpoint does, with its errors."""
    if not isinstance(path, str | os.PathLike):
        _write_archive(path, None, snapshot)
        return None
    path = pathlib.Path(os.path.abspath(path))
    if path.suffix and not path.is_dir():
        if path.exists() and not _is_archive(path):
            raise FileExistsError(f"{path} exists and is not a checkpoint: choose another path")
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, "wb") as file:
            _write_archive(file, path.parent, snapshot)
        return path
    if path.exists() and not (path / STATE).exists() and (path.is_file() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not a checkpoint: choose another path")
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        _write(temporary, snapshot)
        _put_in_place(temporary, path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"checkpoint {path} was not written ({error}); earlier checkpoints are whole") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def load_checkpoint(
    path: str | os.PathLike | IO[bytes],
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> int:
    """Load a checkpoint, a directory, an archive or a file object, into `model` and `optimizer`, each unless None.

    Returns its iteration.
    Raises FileNotFoundError if there is no checkpoint at `path`, DamagedError, before anything is loaded, if a file is
    not what was written, ValueError if it does not fit.
    """
    with _directory(path) as directory:
        return _load(directory, model, optimizer)


def _load(directory: str | os.PathLike, model: nn.Module | None, optimizer: torch.optim.Optimizer | None) -> int:
    path, state = _read_state(directory)
    names = [name for name, wanted in ((MODEL, model), (OPTIMIZER, optimizer)) if wanted is not None]
    _verify(path, {name: digest for name, digest in state.get("checksums", {}).items() if name in names})
    if model is not None:
        tensors = _read_tensors(path / MODEL)
        tensors |= {name: tensors[same] for name, same in state["tied"].items()}
        try:
            _unwrapped(model).load_state_dict(tensors)
        except RuntimeError as error:
            raise ValueError(f"checkpoint {path} does not fit the model: {error}") from None
    if optimizer is not None:
        if state["optimizer"] is None:
            raise ValueError(f"checkpoint {path} was saved without an optimizer")
        _load_optimizer(optimizer, state["optimizer"], _read_tensors(path / OPTIMIZER), path)
    return state["iteration"]


def read_extra(path: str | os.PathLike | IO[bytes]) -> dict[str, Any]:
    """What the caller of save_checkpoint added."""
    with _directory(path) as directory:
        return _read_state(directory)[1]["extra"]


def read_model_config(path: str | os.PathLike | IO[bytes], kind: type[Config]) -> Config | None:
    """The configuration, of class `kind`, of the model that was saved; None if it had none, as in format 1.

    Raises ValueError, naming the key, for that of another class.
    """
    with _directory(path) as directory:
        table = _read_state(directory)[1].get("model")
    return None if table is None else parse(kind, table)


# ---- a run's checkpoints ----


def step_path(directory: pathlib.Path, step: int) -> pathlib.Path:
    return directory / f"step_{step:08d}"


def list_checkpoints(directory: str | os.PathLike) -> list[pathlib.Path]:
    """The checkpoints step_* of a directory, oldest first."""
    return sorted(p for p in pathlib.Path(directory).glob("step_*") if (p / STATE).exists())


def prune_checkpoints(directory: str | os.PathLike, keep: int) -> None:
    """Remove all but the `keep` newest, and what a killed writer left."""
    for path in list_checkpoints(directory)[:-keep]:
        remove_checkpoint(path)
    for path in pathlib.Path(directory).glob(".step_*"):  # .tmp, and .previous of one that was replaced
        shutil.rmtree(path)


def remove_checkpoint(path: pathlib.Path) -> None:
    doomed = path.with_name(f".{path.name}.tmp")
    path.rename(doomed)  # a half-removed checkpoint must not look like one
    shutil.rmtree(doomed)


# ---- random numbers ----


def rng_state(device: torch.device | None = None) -> dict[str, Any]:
    """torch's generators, of the CPU and of `device` if that is a GPU, as JSON values."""
    cuda = [torch.cuda.get_rng_state(device)] if device is not None and device.type == "cuda" else []
    return {"cpu": _to_text(torch.get_rng_state()), "cuda": [_to_text(s) for s in cuda]}


def set_rng_state(state: dict[str, Any], device: torch.device | None = None) -> None:
    torch.set_rng_state(_from_text(state["cpu"]))
    if device is not None and device.type == "cuda" and state["cuda"]:
        torch.cuda.set_rng_state(_from_text(state["cuda"][0]), device)


def _to_text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _from_text(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


# ---- writing ----


def _write(path: pathlib.Path, snapshot: Snapshot) -> None:
    save_file(snapshot.tensors, path / MODEL)
    if snapshot.optimizer_tensors is not None:
        save_file(snapshot.optimizer_tensors, path / OPTIMIZER)
    state = snapshot.state | {"checksums": {file.name: _digest(file) for file in sorted(path.iterdir())}}
    state["checksums"][STATE] = _text_digest(state)
    (path / STATE).write_text(json.dumps(state), encoding="utf-8")
    mode = (path / STATE).stat().st_mode
    for file in path.iterdir():
        file.chmod(mode)  # as the umask says: safetensors gives its files to their owner alone
        sync(file)
    sync(path)


def _write_archive(file: IO[bytes], beside: pathlib.Path | None, snapshot: Snapshot) -> None:
    """The directory as a zip archive; it is made in the directory `beside`, or in the system's for temporary files."""
    with tempfile.TemporaryDirectory(dir=beside) as directory, zipfile.ZipFile(file, "w") as archive:
        _write(pathlib.Path(directory), snapshot)
        for part in pathlib.Path(directory).iterdir():
            archive.write(part, part.name)


def _digest(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _text_digest(state: dict[str, Any]) -> str:
    """Of state.json without its own checksum."""
    others = {name: digest for name, digest in state["checksums"].items() if name != STATE}
    return hashlib.sha256(json.dumps(state | {"checksums": others}).encode()).hexdigest()


def _put_in_place(temporary: pathlib.Path, path: pathlib.Path) -> None:
    previous = _previous(path)
    if (path / STATE).exists():
        shutil.rmtree(previous, ignore_errors=True)
        path.rename(previous)  # a crash between the two renames: load_checkpoint finds it there
    temporary.rename(path)
    sync(path.parent)
    shutil.rmtree(previous, ignore_errors=True)


def _previous(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f".{path.name}.previous")


def _unwrapped(model: nn.Module) -> nn.Module:
    return getattr(model, "_orig_mod", model)  # torch.compile's wrapper prefixes every name


def _distinct(tensors: dict[str, Any], tie: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors that share no memory, as safetensors wants them, and name -> name for those that are one, tied."""
    distinct: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[tuple, str] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"cannot save {name}: expected a tensor, got {type(tensor).__name__}")
        view = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tie and tensor.numel() and view in first:
            tied[name] = first[view]
            continue
        first[view] = name
        storage = tensor.untyped_storage().data_ptr()
        distinct[name] = (tensor.detach().clone() if storage in storages else tensor.detach()).contiguous()
        storages.add(storage)
    return distinct, tied


def _split_optimizer(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for parameter, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{parameter}.{name}"] = value
            elif value is None or isinstance(value, int | float | str):
                numbers.setdefault(str(parameter), {})[name] = value
            else:
                raise TypeError(
                    f"cannot save the optimizer's {name}: expected a tensor or number, got {type(value).__name__}"
                )
    groups = [
        {name: value.item() if isinstance(value, Tensor) else value for name, value in group.items()}
        for group in state["param_groups"]
    ]
    return tensors, {"numbers": numbers, "groups": groups}


# ---- reading ----


@contextlib.contextmanager
def _directory(path: str | os.PathLike | IO[bytes]) -> Iterator[str | os.PathLike]:
    """A checkpoint's directory; that of an archive is unpacked for as long as it is needed."""
    if isinstance(path, str | os.PathLike) and not os.path.isfile(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as directory:
        try:
            with zipfile.ZipFile(path) as archive:
                archive.extractall(directory)
        except zipfile.BadZipFile as error:
            what = path if isinstance(path, str | os.PathLike) else "the file object"
            raise DamagedError(f"{what} holds no checkpoint: {error}") from None
        yield directory


def _is_archive(path: pathlib.Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return STATE in archive.namelist()


def _verify(path: pathlib.Path, checksums: dict[str, str]) -> None:
    for name, digest in checksums.items():
        if not (path / name).exists():
            raise DamagedError(f"checkpoint {path} is damaged: {name} is not there")
        if _digest(path / name) != digest:
            raise DamagedError(f"checkpoint {path} is damaged: {name} is not what was written (its checksum differs)")


def _read_state(path: str | os.PathLike) -> tuple[pathlib.Path, dict[str, Any]]:
    path = pathlib.Path(os.path.abspath(path))
    found = next((p for p in (path, _previous(path)) if (p / STATE).exists()), None)
    if found is None:
        raise FileNotFoundError(f"{path} is not a checkpoint: it has no {STATE}")
    try:
        state = json.loads((found / STATE).read_text(encoding="utf-8"))
        if state["format"] not in READABLE:
            raise ValueError(f"format {state['format']}, expected {' or '.join(map(str, READABLE))}")
        if "checksums" in state and state["checksums"].get(STATE) != _text_digest(state):
            raise ValueError("it is not what was written (its checksum differs)")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"checkpoint {found} cannot be read: {STATE}: {error}") from None
    return found, state


def _read_tensors(path: pathlib.Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise DamagedError(f"checkpoint {path.parent} is damaged: {path.name}: {error}") from None


def _load_optimizer(
    optimizer: torch.optim.Optimizer, saved: dict[str, Any], tensors: dict[str, Tensor], path: pathlib.Path
) -> None:
    state: dict[int, dict[str, Any]] = {int(parameter): dict(v) for parameter, v in saved["numbers"].items()}
    for name, tensor in tensors.items():
        parameter, _, key = name.partition(".")
        state.setdefault(int(parameter), {})[key] = tensor
    mine = optimizer.state_dict()["param_groups"]
    groups = [{k: _like(m.get(k), v) for k, v in g.items()} for g, m in zip(saved["groups"], mine, strict=False)]
    try:
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    except ValueError as error:
        raise ValueError(f"checkpoint {path} does not fit the optimizer: {error}") from None


def _like(mine: Any, saved: Any) -> Any:
    """A JSON value as the type that the optimizer holds: a tuple of betas, a learning rate in a tensor."""
    if isinstance(mine, tuple):
        return tuple(saved)
    return torch.tensor(saved, dtype=mine.dtype, device=mine.device) if isinstance(mine, Tensor) else saved
