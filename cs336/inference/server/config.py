"""Options of the server, which can be read without its extra."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class ServerConfig:
    """Whom a server listens to, and how much it takes."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    """That clients must know; anyone may ask if None."""
    name: str | None = None
    """Of the model, to clients; its directory's if None."""
    max_requests: int = 256
    """Sequences that run or wait; more are told to come back later."""
    max_body_bytes: int = 4 << 20
    timeout: float = 600.0
    """Seconds, of a request."""
    drain: float = 60.0
    """Seconds for requests that are under way, after SIGTERM."""

    def __post_init__(self):
        for name in ("max_requests", "max_body_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if not 0 < self.timeout < math.inf:
            raise ValueError(f"timeout must be above 0 seconds, got {self.timeout}")
        if not 0 <= self.drain < math.inf:
            raise ValueError(f"drain must be 0 seconds or more, got {self.drain}")
        if self.api_key == "":
            raise ValueError(
                "api_key is empty, which no client can send: give a key, or leave it out and anyone may ask"
            )
