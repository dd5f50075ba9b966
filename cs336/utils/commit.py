"""Which commit of this repository runs."""

import pathlib
import subprocess

ROOT = pathlib.Path(__file__).parents[2]


def commit() -> str | None:
    """Short hash of the clone that this package is in, with "+" if files were changed; None outside a clone."""
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git
        return None
    return answer.stdout.strip() or None
