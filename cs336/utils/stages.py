"""Stages: a job of many steps in one directory, which goes on where it was stopped and repeats nothing.

    def count() -> Outcome:
        ...
        return Outcome("1,234 words")

    run_stages("runs/words", [
        Stage("count", "count the words", count, outputs=("words.json",), inputs=(corpus,), settings={"lower": True}),
    ])

A stage is skipped when its outputs are there and were made from the same settings and from inputs of the same content:
neither times nor the spelling of paths count. DIRECTORY/stages.json says what each was made from, how long it took and
what came of it. A file that the job did not make is never replaced, and nothing is ever deleted: a stage writes over
its own outputs, atomically, but for those it names in `kept`, which are set aside in DIRECTORY/earlier/ when they would
be made anew from something else.
"""

import itertools
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.text import Text

from cs336.utils.contents import Contents
from cs336.utils.duration import duration
from cs336.utils.files import write_json
from cs336.utils.locks import locked

RECORD, ASIDE, LOCK, CONTENTS = "stages.json", "earlier", ".stages.lock", ".contents.json"


class Interrupted(Exception):
    """A signal stopped a stage; the same command continues it."""


@dataclass(frozen=True)
class Outcome:
    summary: str
    """One line, shown now and whenever the stage is skipped."""
    seconds: float | None = None
    """Of a stage that continued what an earlier process began; None: as long as the call took."""


@dataclass(frozen=True)
class Stage:
    name: str
    purpose: str
    """A few words, shown beside the name."""
    run: Callable[[], Outcome]
    """Makes the outputs, or what is left of them; raises Interrupted where a signal stopped it."""
    outputs: tuple[str, ...]
    """Files that it leaves in the directory; a stage without one of them is run again."""
    inputs: tuple[pathlib.Path, ...] = ()
    """Files and directories whose content decides the outputs. What the job writes below one of them is no part."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """JSON values that decide the outputs."""
    kept: tuple[str, ...] = ()
    """Files and folders that took long, or that `run` continues: set aside, not written over, for other inputs."""
    is_whole: Callable[[], bool] = lambda: True
    """Whether the files that the outputs name are there too; asked where all outputs are."""


def run_stages(directory: str | os.PathLike, stages: Sequence[Stage], console: Console | None = None) -> None:
    """Run the stages that are not current, in order.

    Raises RuntimeError if another process is at work in the directory, ValueError if it holds files of these names that
    the job did not make, Interrupted where a signal stopped a stage, and what the stages raise.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with locked(directory, LOCK), Contents(directory / CONTENTS) as contents:
        _Job(directory, stages, console or Console(highlight=False, soft_wrap=True), contents).run()


@dataclass(frozen=True)
class _Job:
    directory: pathlib.Path
    stages: Sequence[Stage]
    console: Console
    contents: Contents

    def run(self) -> None:
        record = self._record()
        if theirs := [name for stage in self.stages if stage.name not in record for name in self._made(stage)]:
            held = ", ".join(dict.fromkeys(theirs))
            if not record and (self.directory / CONTENTS).exists():
                raise ValueError(
                    f"{self.directory / RECORD}, which says what {held} were made from, is gone or cannot be read: put "
                    "it back, or move them away and they are made anew"
                )
            raise ValueError(
                f"{self.directory} holds {held}, which this job did not make and would replace: choose another "
                "directory"
            )
        for number, stage in enumerate(self.stages, 1):
            made_from = {
                "settings": json.loads(json.dumps(dict(stage.settings))),
                "inputs": [self.contents.digest(path, without=self.directory) for path in stage.inputs],
            }
            entry = self._record().get(stage.name, {})
            head = Text.assemble((f"{number}/{len(self.stages)} {stage.name:<9}", "bold"), f"  {stage.purpose}")
            changed = _changes(entry, made_from)
            is_there = all((self.directory / name).exists() for name in stage.outputs) and stage.is_whole()
            if not changed and "seconds" in entry and is_there:
                self.console.print(head.append(" (done before)", "dim"))
                self._say(entry["summary"])
                continue
            self.console.print(head)
            if changed and any((self.directory / name).exists() for name in stage.kept):
                self._say(f"made anew ({', '.join(changed)})", f"what was there is kept in {self._set_aside(stage)}")
            self._write(stage, made_from)
            self._run(stage, made_from)

    def _run(self, stage: Stage, made_from: dict[str, Any]) -> None:
        start = time.perf_counter()
        outcome = stage.run()
        seconds = time.perf_counter() - start if outcome.seconds is None else outcome.seconds
        self._write(stage, made_from | {"seconds": round(seconds, 2), "summary": outcome.summary})
        where = self.directory / pathlib.Path(stage.outputs[0]).parts[0]
        self._say(outcome.summary, duration(seconds), str(where))

    def _made(self, stage: Stage) -> Iterator[str]:
        return (name for name in (*stage.outputs, *stage.kept) if (self.directory / name).exists())

    def _set_aside(self, stage: Stage) -> pathlib.Path:
        places = (self.directory / ASIDE / f"{stage.name}-{n}" for n in itertools.count(1))
        aside = next(place for place in places if not place.exists())
        aside.mkdir(parents=True)
        for name in stage.kept:
            if (self.directory / name).exists():
                (aside / name).parent.mkdir(parents=True, exist_ok=True)
                (self.directory / name).rename(aside / name)
        return aside

    def _record(self) -> dict[str, Any]:
        try:
            record = json.loads((self.directory / RECORD).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}
        entries = record.items() if isinstance(record, dict) else ()
        return {name: entry for name, entry in entries if isinstance(entry, dict)}

    def _write(self, stage: Stage, entry: dict[str, Any]) -> None:
        record = self._record() | {stage.name: entry}
        ordered = {
            name: record[name] for name in dict.fromkeys([*(s.name for s in self.stages), *record]) if name in record
        }
        write_json(self.directory / RECORD, ordered, indent=2)

    def _say(self, *facts: str) -> None:
        self.console.print(Text("    " + "  ·  ".join(facts), style="dim"))


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What a stage would be made from that it was not: "seed 0 -> 1", or "another input"."""
    old, new = before.get("settings", {}), now["settings"]
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    other = ["another input"] if before.get("inputs") != now["inputs"] else []
    return [f"{name} {old.get(name)} -> {new.get(name)}" for name in names] + other
