"""The configuration, the machine, the versions."""

from collections.abc import Callable
from typing import Any

from cs336.report.run import Run, shown
from cs336.report.section import section


@section("Configuration and versions", order=60)
def config(run: Run) -> dict[str, Any]:
    return {"config": tables(run.config, toml), "facts": tables({"machine and versions": run.facts}, shown)}


def tables(config: dict[str, Any], show: Callable[[Any], str]) -> list[tuple[str, list[tuple[str, str]]]]:
    """A nested mapping as (heading, rows), scalars of the top level first, one heading a section."""
    out: list[tuple[str, list[tuple[str, str]]]] = []

    def walk(prefix: str, values: dict[str, Any]) -> None:
        if rows := [(key, show(v)) for key, v in values.items() if not isinstance(v, dict)]:
            out.append((prefix, rows))
        for key, v in values.items():
            if isinstance(v, dict):
                walk(f"{prefix}.{key}" if prefix else key, v)

    walk("", config)
    return out


def toml(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(toml, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
