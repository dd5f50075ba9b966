"""Which part of a whole model each tensor of a rank is: what checkpoints, samples and the export need of a division.

An optimizer's tensors are named INDEX.KIND (0.exp_avg), INDEX being a parameter's place among all of its groups.
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cs336.parallel.collectives import broadcast, gather_json, receive, send
from cs336.parallel.launch import control_device
from cs336.parallel.pieces import WHOLE, Cut, Piece, assembled

Groups = list[dict[str, Any]]
"""An optimizer's groups, each with the "names" of its parameters in place of "params"."""


def groups_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> Groups:
    """Of an optimizer of the model's parameters."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [
        {k: v for k, v in group.items() if k != "params"} | {"names": [names[id(p)] for p in group["params"]]}
        for group in optimizer.param_groups
    ]


@dataclass(frozen=True)
class Parts:
    """What this rank has of a whole model and of the whole model's optimizer. Names are those of the whole.

    Its tensors may be pieces themselves, those of FSDP, and its optimizer's state that of a share.
    """

    shapes: Mapping[str, torch.Size]
    """Of the whole model's state_dict."""
    cuts: Mapping[str, Cut]
    """Of the tensors of which this rank has a part; the others are whole."""
    written: frozenset[str]
    """Of the state_dict, what this rank writes: of ranks that have the same one does."""
    written_state: frozenset[str]
    """The parameters whose optimizer state it writes."""
    whole: Groups
    own: Groups

    @functools.cached_property
    def _names(self) -> list[str]:
        """Of this rank's parameters, in the order of its optimizer."""
        return [name for group in self.own for name in group["names"]]

    @functools.cached_property
    def _index(self) -> dict[str, int]:
        """Of all parameters, in the order of the whole optimizer."""
        return {name: i for i, name in enumerate(name for group in self.whole for name in group["names"])}

    # ---- what is written ----

    def pieces(self, tensors: Mapping[str, Tensor | Piece]) -> dict[str, Tensor | Piece]:
        """What this rank writes of its part of the state_dict."""
        return {name: self._piece(name, t) for name, t in tensors.items() if name in self.written}

    def optimizer_pieces(self, tensors: Mapping[str, Tensor | Piece]) -> dict[str, Tensor | Piece]:
        """What it writes of its optimizer's tensors, under the whole optimizer's indices."""
        found = {}
        for key, t in tensors.items():
            i, _, kind = key.partition(".")
            name = self._names[int(i)]
            if name in self.written_state:
                found[f"{self._index[name]}.{kind}"] = self._piece(name, t)
        return found

    def optimizer_state(self, saved: dict[str, Any]) -> dict[str, Any]:
        """The numbers and groups of its optimizer, as the whole one's."""
        written = {i: name for i, name in enumerate(self._names) if name in self.written_state}
        numbers = {str(self._index[written[int(i)]]): v for i, v in saved["numbers"].items() if int(i) in written}
        options = {name: group for mine, group in zip(self.own, saved["groups"], strict=True) for name in mine["names"]}
        groups = []
        for group in self.whole:
            here = next((options[name] for name in group["names"] if name in options), group)
            params = [self._index[name] for name in group["names"]]
            groups.append({k: v for k, v in here.items() if k != "names"} | {"params": params})
        return {"numbers": numbers, "groups": groups}

    def _piece(self, name: str, t: Tensor | Piece) -> Tensor | Piece:
        cut = self.cuts.get(name)
        if cut is None:
            return t
        if isinstance(t, Piece):
            return replace(t, shape=self.shapes[name], cut=cut)
        size = list(self.shapes[name])
        size[cut.dim] //= cut.parts
        return Piece(t.reshape(-1), self.shapes[name], 0, cut) if list(t.shape) == size else t  # a step, say

    # ---- what is read ----

    def own_tensors(self, tensors: Mapping[str, Tensor], have: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """This rank's part of a whole state_dict, each cut when it is asked for; `have`: what of it is here."""
        return _Own(tensors, self, have)

    def own_state(self, saved: dict[str, Any]) -> dict[str, Any]:
        """This rank's part of the numbers and groups of a whole optimizer, in the order of its own."""
        places = [sorted(p for i in group["params"] if (p := self.place(i)) is not None) for group in saved["groups"]]
        kept = [group | {"params": mine} for group, mine in zip(saved["groups"], places, strict=True) if mine]
        numbers = {str(p): v for i, v in saved["numbers"].items() if (p := self.place(int(i))) is not None}
        return {"numbers": numbers, "groups": sorted(kept, key=lambda group: group["params"][0])}

    def place(self, i: int) -> int | None:
        """Where this rank's optimizer has the i-th parameter of the whole one; None: nowhere."""
        return self._places.get(i)

    @functools.cached_property
    def _places(self) -> dict[int, int]:
        return {self._index[name]: place for place, name in enumerate(self._names)}

    def own_part(self, place: int, t: Tensor) -> Tensor:
        """This rank's part of a tensor of the whole state of its parameter there."""
        name = self._names[place]
        return self.cuts[name].of(t) if name in self.cuts and t.shape == self.shapes[name] else t


class _Own(Mapping[str, Tensor]):
    """Unknown names stay, to be found by load_state_dict. Raises RuntimeError, as that does, for another shape."""

    def __init__(self, tensors: Mapping[str, Tensor], parts: Parts, have: Mapping[str, Any]):
        self.tensors, self.parts = tensors, parts
        self.names = [name for name in tensors if name in have or name not in parts.shapes]

    def __getitem__(self, name: str) -> Tensor:
        whole, cut = self.tensors[name], self.parts.cuts.get(name, WHOLE)
        if whole.shape != self.parts.shapes.get(name, whole.shape):
            raise RuntimeError(f"{name} has shape {list(whole.shape)}, expected {list(self.parts.shapes[name])}")
        return cut.of(whole).contiguous()

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@torch.no_grad()
def gather_whole(
    pieces: Mapping[str, Tensor | Piece], device: torch.device, *, everywhere: bool = False
) -> dict[str, Tensor]:
    """The whole tensors of which the ranks have these pieces, on a device of rank 0, or of every rank; else empty.

    Every rank calls it, with a device of one kind. A tensor at a time travels.
    """
    here = {name: t if isinstance(t, Piece) else Piece(t.reshape(-1), t.shape, 0) for name, t in pieces.items()}
    said = [
        [name, str(p.tensor.dtype).removeprefix("torch."), p.tensor.numel(), list(p.shape), p.start, *astuple(p.cut)]
        for name, p in here.items()
    ]
    found: dict[str, list[Piece]] = {}
    for owner, theirs in enumerate(gather_json(said, control_device())):
        for name, dtype, numel, shape, start, *cut in theirs:
            if not everywhere and dist.get_rank() not in (owner, 0):
                continue
            if owner == dist.get_rank():
                t = here[name].tensor.detach().to(device).contiguous()
            else:
                t = torch.empty(numel, dtype=getattr(torch, dtype), device=device)
            if numel:
                _travel(t.view(torch.uint8), owner, everywhere)
            found.setdefault(name, []).append(Piece(t, torch.Size(shape), start, Cut(*cut)))
    return {name: assembled(parts) for name, parts in found.items()} if everywhere or dist.get_rank() == 0 else {}


def _travel(data: Tensor, owner: int, everywhere: bool) -> None:
    """From its owner to rank 0, or to every rank."""
    if everywhere:
        broadcast(data, owner)
    elif owner and dist.get_rank() == owner:
        send(data, 0).wait()
    elif owner:
        receive(data, owner)
