"""Ranks in a grid with named axes: `Mesh(data=2, tensor=4)` has rank 4 d + t at (d, t).

The last axis is of neighbours, which share the fastest links: order axes by how much they send, tensor last.
"""

import math

import torch
import torch.distributed as dist


class Mesh:
    """The processes of the default group as a grid; every rank makes it with the same axes.

        mesh = Mesh(data=-1, tensor=2)
        tensor_parallel(model, mesh.group("tensor"))

    Args:
        axes: ranks of each axis, by its name; one may be -1: what the others leave.

    Raises ValueError, with the product, for axes that do not make up the world.
    """

    def __init__(self, **axes: int) -> None:
        world = dist.get_world_size()
        self.axes = resolve(axes, world)
        self._grid = torch.arange(world).view(*self.axes.values())
        self._groups: dict[tuple[str, ...], dist.ProcessGroup] = {}
        for name in self.axes:
            self.group(name)

    def size(self, *names: str) -> int:
        """Ranks of an axis; of several, their product."""
        return math.prod(self.axes[name] for name in self._known(names))

    def rank(self, name: str) -> int:
        """This rank's place on an axis."""
        return self.place(dist.get_rank())[self._known((name,))[0]]

    def place(self, rank: int) -> dict[str, int]:
        """Where a rank of the default group stands on each axis."""
        found = (self._grid == rank).nonzero()[0].tolist()
        return dict(zip(self.axes, found, strict=True))

    def group(self, *names: str) -> dist.ProcessGroup:
        """The processes that differ from this one on these axes alone, in the order of their ranks.

        Of several axes every rank has to ask, in the same order, the first time.
        """
        names = self._known(names)
        if names not in self._groups:
            for ranks in self.rows(*names):
                group = dist.new_group(ranks)  # every rank makes every group
                if dist.get_rank() in ranks:
                    self._groups[names] = group
        return self._groups[names]

    def rows(self, *names: str) -> list[list[int]]:
        """The ranks of each group along these axes."""
        names = self._known(names)
        along = [i for i, name in enumerate(self.axes) if name in names]
        across = [i for i in range(len(self.axes)) if i not in along]
        return self._grid.permute(*across, *along).reshape(-1, self.size(*names)).tolist()

    def _known(self, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in self.axes:
                raise ValueError(f"the mesh has no axis {name!r}: its axes are {', '.join(self.axes)}")
        if not names:
            raise ValueError(f"name one or more axes of {', '.join(self.axes)}")
        return tuple(name for name in self.axes if name in names)

    def __repr__(self) -> str:
        return f"Mesh({', '.join(f'{name}={size}' for name, size in self.axes.items())})"


def resolve(axes: dict[str, int], world: int) -> dict[str, int]:
    """The axes with -1 filled in. Raises ValueError, with the arithmetic, for those that do not make up `world`."""
    if not axes:
        raise ValueError("a mesh needs axes: Mesh(data=-1) is one of all ranks")
    for name, size in axes.items():
        if not isinstance(size, int) or isinstance(size, bool) or (size < 1 and size != -1):
            raise ValueError(f"{name} must be a number of ranks, or -1 for what the others leave, got {size!r}")
    open_axes = [name for name, size in axes.items() if size == -1]
    fixed = {name: size for name, size in axes.items() if size != -1}
    product = math.prod(fixed.values())
    shown = " x ".join(f"{name} {size}" for name, size in fixed.items()) or "nothing"
    if len(open_axes) > 1:
        raise ValueError(f"only one axis may be -1, got {', '.join(open_axes)}")
    if open_axes and world % product != 0:
        raise ValueError(
            f"{shown} = {product} does not divide {world} ranks: {open_axes[0]} would be {world / product:g}"
        )
    if not open_axes and product != world:
        raise ValueError(
            f"{shown} = {product} ranks, but there are {world}: change an axis or start {product} processes"
        )
    return {name: world // product if size == -1 else size for name, size in axes.items()}
