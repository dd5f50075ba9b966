"""The rows of a run that goes on, or was killed."""

import json
import pathlib
from typing import Any


def read_rows(run_dir: pathlib.Path) -> list[dict[str, Any]]:
    """metrics.jsonl; a torn line, which a killed run leaves, is passed over."""
    rows = []
    try:
        with open(run_dir / "metrics.jsonl", encoding="utf-8") as file:
            for line in file:
                try:
                    rows.append(json.loads(line))
                except ValueError:
                    continue
    except FileNotFoundError:
        pass
    return rows
