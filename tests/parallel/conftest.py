import pytest
import torch.distributed as dist


@pytest.fixture
def world(tmp_path):
    """A group of this process alone."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.FileStore(str(tmp_path / "store"), 1))
    yield dist.group.WORLD
    dist.destroy_process_group()
