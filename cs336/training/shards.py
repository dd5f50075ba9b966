"""The files of a checkpoint that several ranks wrote: whole tensors, and pieces that are put together again.

state.json of such a checkpoint says under "shards", for the model and the optimizer, which files there are, and of each
the pieces: name -> {"shape": of the whole tensor, "start": of the piece in it, flattened}, and where a dim of the whole
is divided {"cut": [dim, index, parts]}, within which the piece is. Other tensors are whole.
A rank that loads reads a tensor at a time, so a checkpoint loads under any layout.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cs336.parallel.pieces import WHOLE, Cut, Piece, assembled

Shards = list[dict[str, Any]]


class DamagedError(ValueError):
    """A checkpoint whose files are not what was written."""


def shard_name(kind: str, rank: int, world: int) -> str:
    """Of a file: model-00002-of-00008.safetensors."""
    return f"{kind}-{rank:05d}-of-{world:05d}.safetensors"


def divided(tensors: Mapping[str, Tensor | Piece]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file, and what is said of those that are pieces."""
    pieces = {name: t for name, t in tensors.items() if isinstance(t, Piece)}
    plain = {name: t.tensor if isinstance(t, Piece) else t for name, t in tensors.items()}
    return plain, {name: _said(piece) for name, piece in pieces.items()}


def _said(piece: Piece) -> dict[str, Any]:
    cut = {} if piece.cut == WHOLE else {"cut": dataclasses.astuple(piece.cut)}
    return {"shape": list(piece.shape), "start": piece.start} | cut


class Tensors(Mapping[str, Tensor]):
    """Name -> whole tensor, read when it is asked for.

    Raises DamagedError for a file that cannot be read, and for pieces that leave a gap.
    """

    def __init__(self, directory: pathlib.Path, shards: Shards):
        self._files = {shard["file"]: _opened(directory / shard["file"]) for shard in shards}
        self._places: dict[str, list[tuple[str, dict[str, Any] | None]]] = {}
        self._directory = directory
        for shard in shards:
            for name in self._files[shard["file"]].keys():  # noqa: SIM118 (safe_open is no mapping)
                self._places.setdefault(name, []).append((shard["file"], shard["pieces"].get(name)))

    def __getitem__(self, name: str) -> Tensor:
        places = self._places[name]
        file, piece = places[0]
        if piece is None:
            return self._files[file].get_tensor(name)
        pieces = [
            Piece(self._files[f].get_tensor(name), torch.Size(p["shape"]), p["start"], Cut(*p.get("cut", (0, 0, 1))))
            for f, p in places
            if p is not None
        ]
        try:
            return assembled(pieces)
        except ValueError as error:
            raise DamagedError(f"checkpoint {self._directory} is damaged: {name}: {error}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _opened(path: pathlib.Path) -> Any:
    try:
        return safe_open(path, framework="pt").__enter__()
    except (SafetensorError, OSError) as error:
        raise DamagedError(f"checkpoint {path.parent} is damaged: {path.name}: {error}") from None
