"""Sections of a report: each a file in sections/ that registers itself, with a template of the same name beside it.

    @section("Tokenizer", order=40)
    def tokenizer(run: Run) -> dict[str, Any] | None:
        ...

The function returns what sections/tokenizer.html is given, or None: then the section is left out.
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cs336.report.run import Run

Build = Callable[[Run], dict[str, Any] | None]


@dataclass(frozen=True)
class Section:
    id: str
    title: str
    order: int
    build: Build


_SECTIONS: dict[str, Section] = {}


def section(title: str, order: int) -> Callable[[Build], Build]:
    """Register a function under its own name. Sections stand in the order of their numbers."""

    def register(build: Build) -> Build:
        _SECTIONS[build.__name__] = Section(build.__name__, title, order, build)
        return build

    return register


def all_sections() -> list[Section]:
    """Those of every file in sections/, in order."""
    package = importlib.import_module("cs336.report.sections")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return sorted(_SECTIONS.values(), key=lambda found: found.order)
