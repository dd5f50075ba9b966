"""Groups of processes are made once, however often a run makes its model anew: each has a communicator of its own."""

import pytest
import torch.distributed as dist

from cs336.parallel.pipeline import _second
from cs336.training.division import _mesh


@pytest.mark.parametrize("world_of", ["one", "the next"])
def test_groups_are_made_once_for_a_world(world, world_of, monkeypatch):
    made, new_group = [], dist.new_group

    def counted(*args, **options):
        made.append(new_group(*args, **options))
        return made[-1]

    monkeypatch.setattr(dist, "new_group", counted)
    for _ in range(2):
        mesh = _mesh(world, data=1, pipeline=1)
        back = _second(mesh.group("pipeline"))
    assert len(made) == 3
    assert back is made[2]
