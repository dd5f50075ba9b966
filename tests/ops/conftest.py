import pytest

from cs336.ops import registry


@pytest.fixture(params=registry.NAMESPACE)
def variant(request):
    """Each in turn, forced. Files whose op is to be asked first have their own."""
    with registry.use(request.param):
        yield request.param
