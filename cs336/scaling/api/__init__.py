"""The training API: runs under a budget, for several users, on this machine's GPUs or simulated; and its client."""

from cs336.scaling.api.client import ApiError, Client
from cs336.scaling.api.simulator import Simulator
from cs336.scaling.api.store import Store

__all__ = ["ApiError", "Client", "Simulator", "Store"]
