"""A run on disk, which can be killed at any moment.

RUN/config.toml, run.json    what runs, and on what; run.json also holds each budget that the run has been given
RUN/metrics.jsonl            a row each log_interval and each validation
RUN/ranks.jsonl              with parallel.log_ranks, a row a process for each row of training metrics
RUN/samples.jsonl            what the model wrote
RUN/checkpoints/step_*       see cs336.training.checkpoint
RUN/failure.json             why the latest process ended early, if an error ended it
RUN/export/                  the finished model, in the Hugging Face layout
"""

import contextlib
import datetime
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from cs336.parallel.launch import from_ranks, host_group, on_first, rank, together
from cs336.parallel.parts import Parts
from cs336.training import checkpoint
from cs336.training.config import TrainConfig
from cs336.training.metrics import DroppedLines, JsonLines, json_line
from cs336.training.staging import Staging
from cs336.utils.counted import counted
from cs336.utils.files import replacing
from cs336.utils.locks import locked
from cs336.utils.rows import newest_row

FORMAT = 1  # of a run's files; each checkpoint has its own


class RunDir:
    """The files of one run, which rank 0 writes. Its rows are open within `open_rows`.

    Where there are several ranks each has a RunDir, and they call together what all of them do: `load_newest`, `save`
    and `wait`. The rest is rank 0's, and what another rank writes is dropped.
    """

    def __init__(self, path: str | os.PathLike, keep_checkpoints: int):
        self.path = pathlib.Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"run_dir is where a run's files lie, and {self.path} is a file: name a directory")
        self.checkpoints = self.path / "checkpoints"
        self.export = self.path / "export"
        self.keep_checkpoints = keep_checkpoints
        self.metrics: JsonLines | DroppedLines
        self.samples: JsonLines | DroppedLines
        self.ranks: JsonLines | DroppedLines
        self._damaged: list[pathlib.Path] = []  # checkpoints
        self._group = host_group()  # of its own: checkpoints are written while others are in use
        self._writer: ThreadPoolExecutor | None = None
        self._writing: Future[None] | None = None
        self._staging = Staging()  # of the one that is being written

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Make the directory and keep other runs out. An error that ends the block is left in failure.json.

        Every rank calls it. Raises RuntimeError if another run is at this directory.
        """
        with contextlib.ExitStack() as stack:
            together(lambda: self._hold(stack) if rank() == 0 else None)
            yield

    def _hold(self, stack: contextlib.ExitStack) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        stack.enter_context(locked(self.path))
        stack.push(self._record_failure)

    @contextlib.contextmanager
    def open_rows(self, upto: int, ranks: bool = False) -> Iterator[None]:
        """metrics.jsonl, samples.jsonl and, if `ranks`, ranks.jsonl, cut after step `upto`."""
        with contextlib.ExitStack() as stack:

            def opened(name: str) -> JsonLines | DroppedLines:
                if rank():
                    return DroppedLines()
                return stack.enter_context(contextlib.closing(JsonLines(self.path / name, upto)))

            self.metrics, self.samples = opened("metrics.jsonl"), opened("samples.jsonl")
            self.ranks = opened("ranks.jsonl") if ranks else DroppedLines()
            yield

    # ---- what runs ----

    def saved_config(self) -> TrainConfig | None:
        """Of the run that is there, if it has a checkpoint to continue from.

        Raises ValueError for a run of another format, and for what `goes_on` refuses.
        """
        if (found := self.facts().get("format", FORMAT)) != FORMAT:
            raise ValueError(f"{self.path} holds a run of format {found}, expected {FORMAT}: use another run_dir")
        return TrainConfig.from_toml(self.path / "config.toml") if self.goes_on("train") else None

    def goes_on(self, verb: str) -> bool:
        """Whether there is a run with a checkpoint to continue from. Without one a run begins anew, over what is there.

        Raises ValueError for a run of another verb, and for a finished model without the checkpoint that it was made
        of, which would be written over.
        """
        known = (self.path / "config.toml").exists()
        if known and (other := self.verb) not in (verb, None):
            raise ValueError(f"{self.path} holds a run of `cs336 {other}`: use another run_dir")
        if self.newest() is not None:
            return known
        if self.export.exists():
            raise ValueError(
                f"{self.path} holds a finished model, {self.export}, and no checkpoint to continue from: use another "
                "run_dir, for a run that begins anew would write over it"
            )
        return False

    def say_lost(self, say: Callable[[str], None], begin: int) -> None:
        """Tell of a run that ended before its first checkpoint: its rows are dropped, and it begins anew, after step
        `begin`."""
        if rank() or self.newest() is not None:
            return
        if (row := newest_row(self.path, lambda row: row.get("step", 0) > begin)) is not None:
            lost = row["step"] - begin
            say(f"{self.path}: {counted(lost, 'step')} of a run that ended before its first checkpoint to be made anew")

    @property
    def verb(self) -> str | None:
        """Of the run that is there; None where run.json does not say."""
        facts = self.facts()
        return str(facts.get("stage") or "train") if facts else None

    def facts(self) -> dict[str, Any]:
        """run.json; empty where it is not there or torn."""
        try:
            found = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def write_facts(self, facts: dict[str, Any]) -> None:
        with replacing(self.path / "run.json") as file:
            json.dump({"format": FORMAT} | facts, file, indent=2)

    # ---- checkpoints ----

    def newest(self) -> pathlib.Path | None:
        """The newest checkpoint, whole or not."""
        return next(reversed(checkpoint.list_checkpoints(self.checkpoints)), None)

    def load_newest(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        say: Callable[[str], None],
        parts: Parts | None = None,
    ) -> pathlib.Path | None:
        """Load the newest checkpoint that is whole, and return it; those that are damaged are named with `say`.

        parts: what this rank has of a divided model.

        Raises ValueError if there are checkpoints and all are damaged, or if it does not fit.
        """
        name = on_first(lambda: self._load_whole(model, optimizer, say, parts))
        if name is None:
            return None
        path = self.checkpoints / name
        together(lambda: checkpoint.load_checkpoint(path, model, optimizer, parts=parts) if rank() else None)
        return path

    def _load_whole(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        say: Callable[[str], None],
        parts: Parts | None,
    ) -> str | None:
        self._damaged = []
        for path in reversed(checkpoint.list_checkpoints(self.checkpoints)):
            try:
                checkpoint.load_checkpoint(path, model, optimizer, parts=parts)
            except checkpoint.DamagedError as error:
                self._damaged.append(path)
                say(f"{error}; taking the one before it")
                continue
            return path.name
        if self._damaged:
            raise ValueError(f"every checkpoint in {self.checkpoints} is damaged: use another run_dir to begin anew")
        return None

    def save(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        step: int,
        extra: dict[str, Any],
        *,
        background: bool = False,
        parts: Parts | None = None,
    ) -> pathlib.Path:
        """Write the checkpoint of a step, in place of those that are too old. Rows are on the disk before it is.

        In the background, within `saving`, training goes on once weights and state are copied to the host; an error is
        raised by the next `save` or `wait`.
        """
        self.wait()
        path = checkpoint.step_path(self.checkpoints, step)
        staging = self._staging if background else None
        kept = checkpoint.snapshot(model, optimizer, step, extra=extra, staging=staging, parts=parts)
        for rows in (self.metrics, self.samples, self.ranks):
            rows.sync()
        if background:
            assert self._writer is not None, "the background is open within `saving`"
            self._writing = self._writer.submit(self._put, kept, path)
        else:
            self._put(kept, path)
        return path

    def _put(self, kept: checkpoint.Snapshot, path: pathlib.Path) -> None:
        """Every rank writes what it has; rank 0 makes room before, and gives them their name after."""

        def make_room() -> None:
            for other in checkpoint.list_checkpoints(self.checkpoints):
                # A damaged one would be kept in a whole one's place, a later one be taken for the newest.
                if other in self._damaged or other > path:
                    checkpoint.remove_checkpoint(other)
            checkpoint.begin(path)

        def name(written: list[Any]) -> None:
            checkpoint.finish(path, kept, written)
            checkpoint.prune_checkpoints(self.checkpoints, self.keep_checkpoints)

        with checkpoint.writing(path):
            on_first(make_room, self._group)
            written = from_ranks(together(lambda: checkpoint.write_files(path, kept), self._group), self._group)
            on_first(lambda: name(written), self._group)

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """A thread for checkpoints in the background, the latest of which is whole when the block ends."""
        with ThreadPoolExecutor(1, "checkpoint") as self._writer:
            try:
                yield
            finally:
                try:
                    self._wait()
                finally:
                    self._staging.free()

    def wait(self) -> None:
        """Until the checkpoint in the background is on the disk. Raises OSError if it could not be written."""
        together(self._wait)

    def _wait(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    # ---- failures ----

    def clear_failure(self) -> None:
        (self.path / "failure.json").unlink(missing_ok=True)

    def _record_failure(self, kind: type | None, error: BaseException | None, _: object) -> None:
        if error is not None:
            self.record_failure(error)

    def record_failure(self, error: BaseException) -> None:
        """Why this process ends, if it is rank 0."""
        if rank():
            return
        record = {
            "error": type(error).__name__,
            "message": str(error) or "interrupted",
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        record |= getattr(error, "record", {})
        with contextlib.suppress(OSError), replacing(self.path / "failure.json") as file:  # the disk may be full
            file.write(json_line(record, indent=2))
