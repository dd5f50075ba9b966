import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    """Threads only wait for one another in models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
