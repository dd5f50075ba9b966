"""Checkpoints: a directory that is whole or absent, whatever happens while it is written.

    PATH/model.safetensors      parameters and buffers
    PATH/optimizer.safetensors  the optimizer's tensors, named PARAMETER.NAME: 0.exp_avg
    PATH/state.json             the iteration, the optimizer's numbers, the model's configuration, a checksum of each
                                file, and what the caller added

Where several ranks split the model or the optimizer each writes its own, model-00002-of-00008.safetensors: see
cs336.training.shards. It loads under any layout.

They are written under a temporary name, flushed to the disk, then renamed. Nothing is ever unpickled. In a file object,
and at a path with a suffix (model.pt), they are the members of a zip archive. Format 1, without configuration and
checksums, is read too.
"""

import base64
import contextlib
import dataclasses
import errno
import hashlib
import json
import operator
import os
import pathlib
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from cs336.parallel import FSDP, ShardedAdamW, ShardedOptimizer
from cs336.parallel.launch import rank, world_size
from cs336.parallel.parts import Parts
from cs336.training.shards import DamagedError, Tensors, divided, shard_name
from cs336.training.staging import Staging
from cs336.utils.config import parse, to_table
from cs336.utils.files import is_name, replacing, sync

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
FORMAT = 2
READABLE = (1, FORMAT)
FILES = {"model": MODEL, "optimizer": OPTIMIZER}
MOST_UNPACKED = 16  # times its size: archives are written unpacked, and others may have packed them


Config = TypeVar("Config")


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

    Raises ValueError for an iteration that is no whole number or negative, TypeError for what is not JSON.
    Raises OSError if it cannot be written, a full disk too: nothing is left of it then, and what was at `path` and
    beside it is untouched. Raises FileExistsError if something else than a checkpoint is at `path`.
    """
    with contextlib.suppress(TypeError):
        iteration = operator.index(iteration)
    if not isinstance(iteration, int) or iteration < 0:
        raise ValueError(f"iteration must be a whole number, 0 or more: steps that are done; got {iteration!r}")
    try:
        json.dumps(extra)
    except (TypeError, ValueError) as error:
        raise TypeError(f"extra must be JSON values: {error}") from None
    return write_snapshot(snapshot(model, optimizer, iteration, extra=extra), path)


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds, of this rank."""

    tensors: dict[str, dict[str, Tensor]]
    """By kind, "model" and "optimizer", and by name."""
    state: dict[str, Any]
    """JSON values: state.json but for the checksums."""
    pieces: dict[str, dict[str, Any]]
    """What is said of pieces, by kind; a kind that is not here is not split: rank 0 has all of it."""


def snapshot(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    iteration: int,
    *,
    extra: dict[str, Any] | None = None,
    staging: Staging | None = None,
    parts: Parts | None = None,
) -> Snapshot:
    """What save_checkpoint writes.

    staging: memory that it is copied to, so that training may go on. None: the tensors themselves.
    parts: what this rank has of a divided model; None: all of it, or what FSDP says.
    """
    named, tied = model.local_state() if isinstance(model, FSDP) else _distinct(_unwrapped(model).state_dict())
    kinds: dict[str, dict[str, Any]] = {"model": named if parts is None else parts.pieces(named)}
    numbers = None
    if optimizer is not None:
        apart, numbers = _split_optimizer(optimizer.state_dict())
        kinds["optimizer"] = _distinct(apart, tie=False)[0]
        if isinstance(optimizer, ShardedAdamW):
            kinds["optimizer"] = optimizer.pieces(kinds["optimizer"])
        if isinstance(model, FSDP):
            kinds["optimizer"] = model.optimizer_pieces(optimizer, kinds["optimizer"])
        if parts is not None:
            kinds["optimizer"], numbers = parts.optimizer_pieces(kinds["optimizer"]), parts.optimizer_state(numbers)
    divided_model = isinstance(model, FSDP) or parts is not None
    split = {"model": divided_model, "optimizer": divided_model or _is_share(optimizer)}
    tensors, pieces = {}, {}
    for kind, found in kinds.items():
        tensors[kind], said = divided(found)
        if split[kind]:
            pieces[kind] = said
    config = getattr(_unwrapped(model), "saved_config", getattr(_unwrapped(model), "config", None))
    state = {
        "format": FORMAT,
        "iteration": iteration,
        "tied": tied,
        "optimizer": numbers,
        "model": to_table(config) if dataclasses.is_dataclass(config) else None,
        "extra": extra or {},
    }
    if staging is not None:
        state = json.loads(json.dumps(state))
        tensors = staging.copies(tensors)
    return Snapshot(tensors, state, pieces)


def _is_share(optimizer: torch.optim.Optimizer | None) -> bool:
    return isinstance(optimizer, ShardedOptimizer | ShardedAdamW)


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
    with writing(path):
        begin(path)
        finish(path, snapshot, [write_files(path, snapshot)])
    return path


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
    """Errors as save_checkpoint's, and nothing left over."""
    try:
        yield
    except FileExistsError:
        raise
    except (OSError, SafetensorError) as error:
        raise OSError(f"checkpoint {path} was not written ({error}); earlier checkpoints are whole") from error
    finally:
        if rank() == 0:
            shutil.rmtree(_temporary(path), ignore_errors=True)


def _temporary(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f".{path.name}.tmp")


def begin(path: pathlib.Path) -> None:
    """An empty directory for the files of a checkpoint at `path`; `finish` gives it that name."""
    if path.exists() and not (path / STATE).exists() and (path.is_file() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not a checkpoint: choose another path")
    temporary = _temporary(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)


def write_files(path: pathlib.Path, snapshot: Snapshot) -> dict[str, Any]:
    """Write this rank's tensors of a checkpoint at `path`, after `begin`; returns what `finish` needs, JSON values."""
    return _write_files(_temporary(path), snapshot)


def _write_files(directory: pathlib.Path, snapshot: Snapshot) -> dict[str, Any]:
    """A file's checksum is computed while it is flushed and the next one is written."""
    shards: dict[str, Any] = {}
    digests, flushes = {}, []
    with ThreadPoolExecutor(4, "checkpoint-file") as pool:  # two files, two tasks each
        for kind, tensors in snapshot.tensors.items():
            split = kind in snapshot.pieces
            if tensors if split else rank() == 0:
                name = shard_name(kind, rank(), world_size()) if split else FILES[kind]
                save_file(tensors, directory / name)
                flushes.append(pool.submit(sync, directory / name))
                digests[name] = pool.submit(_digest, directory / name)
                if split:
                    shards[kind] = {"file": name, "pieces": snapshot.pieces[kind]}
    for flushed in flushes:
        flushed.result()
    checksums = {name: digest.result() for name, digest in digests.items()}
    optimizer = snapshot.state["optimizer"]
    return {"shards": shards, "checksums": checksums, "numbers": optimizer["numbers"] if optimizer else {}}


def finish(path: pathlib.Path, snapshot: Snapshot, written: list[dict[str, Any]]) -> None:
    """Rank 0's part after `write_files` of all ranks, whose values are `written`: state.json, and the name."""
    temporary, state = _temporary(path), dict(snapshot.state)
    if snapshot.pieces:
        shards = [own["shards"] for own in written]
        state["shards"] = {kind: [own[kind] for own in shards if kind in own] for kind in snapshot.pieces}
        numbers = {i: values for own in written for i, values in own["numbers"].items()}
        state["optimizer"] = state["optimizer"] and state["optimizer"] | {"numbers": numbers}
    _write_state(temporary, state, {name: digest for own in written for name, digest in own["checksums"].items()})
    _put_in_place(temporary, path)


def load_checkpoint(
    path: str | os.PathLike | IO[bytes],
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    parts: Parts | None = None,
) -> int:
    """Load a checkpoint, a directory, an archive or a file object, into `model` and `optimizer`, each unless None.

    parts: what this rank has of a divided model. Returns its iteration.
    Raises FileNotFoundError if there is no checkpoint at `path`, DamagedError, before anything is loaded, if a file is
    not what was written, ValueError if it does not fit.
    """
    with _directory(path) as directory:
        return _load(directory, _archive_called(path), model, optimizer, parts)


def _load(
    directory: str | os.PathLike,
    archive: str | None,
    model: nn.Module | None,
    optimizer: torch.optim.Optimizer | None,
    parts: Parts | None,
) -> int:
    path, state = _read_state(directory, archive)
    called = archive or str(path)
    shards = {kind: _shards(state, kind) for kind, wanted in (("model", model), ("optimizer", optimizer)) if wanted}
    names = [shard["file"] for files in shards.values() for shard in files]
    _verify(path, {n: digest for n, digest in state.get("checksums", {}).items() if n in names}, called)
    if model is not None:
        try:
            load_whole(model, Tensors(path, shards["model"]), parts, state["tied"])
        except (RuntimeError, KeyError) as error:  # KeyError: of a tensor that another is tied to
            raise ValueError(f"checkpoint {called} does not fit the model: {error}") from None
    if optimizer is not None:
        if state["optimizer"] is None:
            raise ValueError(f"checkpoint {called} was saved without an optimizer")
        saved = state["optimizer"] if parts is None else parts.own_state(state["optimizer"])
        _load_optimizer(optimizer, saved, Tensors(path, shards["optimizer"]), called, parts, model)
    return state["iteration"]


def load_whole(
    model: nn.Module, tensors: Mapping[str, Tensor], parts: Parts | None = None, tied: Mapping[str, str] | None = None
) -> None:
    """Take this rank's part of a whole state_dict; tied: name -> name of what is saved once.

    Raises RuntimeError, as load_state_dict does, for one that does not fit.
    """
    if parts is not None:
        names = (model.module if isinstance(model, FSDP) else model).state_dict(keep_vars=True)
        tensors = parts.own_tensors(tensors, names)
    if isinstance(model, FSDP):
        model.load_whole(tensors)
        return
    whole = dict(tensors)
    whole |= {name: whole[same] for name, same in (tied or {}).items()}
    _unwrapped(model).load_state_dict(whole)


def _shards(state: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return state.get("shards", {}).get(kind) or [{"file": FILES[kind], "pieces": {}}]


def read_extra(path: str | os.PathLike | IO[bytes]) -> dict[str, Any]:
    """What the caller of save_checkpoint added."""
    with _directory(path) as directory:
        return _read_state(directory, _archive_called(path))[1]["extra"]


def read_model_config(path: str | os.PathLike | IO[bytes], kind: type[Config]) -> Config | None:
    """The configuration, of class `kind`, of the model that was saved; None if it had none, as in format 1.

    Raises ValueError, naming the key, for that of another class.
    """
    with _directory(path) as directory:
        table = _read_state(directory, _archive_called(path))[1].get("model")
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
    _write_state(path, snapshot.state, _write_files(path, snapshot)["checksums"])


def _write_state(path: pathlib.Path, state: dict[str, Any], checksums: dict[str, str]) -> None:
    state = state | {"checksums": dict(sorted(checksums.items()))}
    state["checksums"][STATE] = _text_digest(state)
    (path / STATE).write_text(json.dumps(state), encoding="utf-8")
    mode = (path / STATE).stat().st_mode
    for file in path.iterdir():
        file.chmod(mode)  # as the umask says: safetensors gives its files to their owner alone
    sync(path / STATE)
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
    what = path if isinstance(path, str | os.PathLike) else "the file object"
    with tempfile.TemporaryDirectory() as directory:
        try:
            with zipfile.ZipFile(path) as archive:
                if STATE not in archive.namelist():  # what torch.save wrote, say
                    raise DamagedError(f"{what} holds no checkpoint: expected what save_checkpoint wrote, with {STATE}")
                unpacked = sum(member.file_size for member in archive.infolist())
                if unpacked > MOST_UNPACKED * max(1 << 20, archive.start_dir):
                    raise DamagedError(f"{what} would unpack to {unpacked:,} bytes: no checkpoint of its size does")
                archive.extractall(directory)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError) as error:
            if isinstance(error, OSError) and error.errno != errno.EINVAL:  # EINVAL: a place before the file begins
                raise
            raise DamagedError(f"{what} holds no checkpoint: expected what save_checkpoint wrote ({error})") from None
        yield directory


def _is_archive(path: pathlib.Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return STATE in archive.namelist()


def _archive_called(path: str | os.PathLike | IO[bytes]) -> str | None:
    """What errors call an archive, which is unpacked elsewhere; None of a directory."""
    if isinstance(path, str | os.PathLike):
        return os.path.abspath(path) if os.path.isfile(path) else None
    return "the file object"


def _verify(path: pathlib.Path, checksums: dict[str, str], called: str) -> None:
    for name, digest in checksums.items():
        if not (path / name).exists():
            raise DamagedError(f"checkpoint {called} is damaged: {name} is not there")
        if _digest(path / name) != digest:
            raise DamagedError(f"checkpoint {called} is damaged: {name} is not what was written (its checksum differs)")


def _read_state(path: str | os.PathLike, archive: str | None) -> tuple[pathlib.Path, dict[str, Any]]:
    path = pathlib.Path(os.path.abspath(path))
    found = next((p for p in (path, _previous(path)) if (p / STATE).exists()), None)
    if found is None:
        inside = [*list_checkpoints(path), *list_checkpoints(path / "checkpoints")]  # of a run, or its checkpoints
        hint = f"; did you mean {inside[-1]}?" if inside else ""
        raise FileNotFoundError(f"{path} is not a checkpoint: it has no {STATE}{hint}")
    try:
        state = json.loads((found / STATE).read_text(encoding="utf-8"))
        if state["format"] not in READABLE:
            raise ValueError(f"format {state['format']}, expected {' or '.join(map(str, READABLE))}")
        if "checksums" in state and state["checksums"].get(STATE) != _text_digest(state):
            raise ValueError("it is not what was written (its checksum differs)")
        _check_state(state)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"checkpoint {archive or found} cannot be read: {STATE}: {error}") from None
    return found, state


def _check_state(state: dict[str, Any]) -> None:
    """Raises ValueError for what save_checkpoint does not write, which may have its checksum."""
    optimizer = state["optimizer"]
    values = [("iteration", state["iteration"], int), ("tied", state["tied"], dict)]
    values += [("shards", state.get("shards", {}), dict)]
    if optimizer is not None:
        values += [("optimizer", optimizer, dict), ("optimizer.numbers", optimizer["numbers"], dict)]
        values += [(f"optimizer.numbers.{i}", numbers, dict) for i, numbers in optimizer["numbers"].items()]
        values += [("optimizer.groups", optimizer["groups"], list)]
        values += [("optimizer.groups", group, dict) for group in optimizer["groups"]]
    files = [shard for shards in state.get("shards", {}).values() for shard in shards]
    values += [("shards", shard, dict) for shard in files]
    for name, value, kind in values:
        if type(value) is not kind:
            raise ValueError(f"{name} must be {kind.__name__}, got {value!r:.80}")
    if bad := [f"{name} is {same}" for name, same in state["tied"].items() if not isinstance(same, str)]:
        raise ValueError(f"a tensor that is tied has the name of another: {bad[0]:.80}")
    if bad := [shard["file"] for shard in files if not is_name(shard["file"])]:
        raise ValueError(f"it names {bad[0]!r:.80}, which is no file of its directory")


def _load_optimizer(
    optimizer: torch.optim.Optimizer,
    saved: dict[str, Any],
    tensors: Tensors,
    called: str,
    parts: Parts | None,
    model: nn.Module | None,
) -> None:
    state: dict[int, dict[str, Any]] = {int(parameter): dict(v) for parameter, v in saved["numbers"].items()}
    mine_alone = set(optimizer.share()) if isinstance(optimizer, ShardedOptimizer) else None
    for name in tensors:
        parameter, _, key = name.partition(".")
        place = int(parameter) if parts is None else parts.place(int(parameter))
        if place is not None and (mine_alone is None or place in mine_alone):
            tensor = tensors[name] if parts is None else parts.own_part(place, tensors[name])
            if isinstance(model, FSDP):
                tensor = model.part_of(optimizer, place, tensor)
            elif isinstance(optimizer, ShardedAdamW):
                tensor = optimizer.part_of(place, key, tensor)
            state.setdefault(place, {})[key] = tensor
    mine = optimizer.state_dict()
    pairs = zip(saved["groups"], mine["param_groups"], strict=False)
    try:
        groups = [{k: _like(m.get(k), v) for k, v in g.items()} for g, m in pairs]
        optimizer.load_state_dict(mine | {"state": state, "param_groups": groups})
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"checkpoint {called} does not fit the optimizer: {error}") from None


def _like(mine: Any, saved: Any) -> Any:
    """A JSON value as the type that the optimizer holds: a tuple of betas, a learning rate in a tensor."""
    if isinstance(mine, tuple):
        return tuple(saved)
    return torch.tensor(saved, dtype=mine.dtype, device=mine.device) if isinstance(mine, Tensor) else saved
