"""The stage runner: what is skipped, what goes on, what is never lost."""

import io
import json
import os
import shutil

import pytest
from rich.console import Console

from cs336.utils.contents import Contents
from cs336.utils.locks import locked
from cs336.utils.stages import ASIDE, LOCK, RECORD, Interrupted, Outcome, Stage, run_stages


class Job:
    """upper: TEXT -> upper.txt; model: upper.txt -> model.txt, by way of progress.txt; page: model.txt -> page.txt."""

    def __init__(self, directory, text, seed=0):
        self.directory, self.text, self.seed, self.ran, self.stop = directory, text, seed, [], False

    def upper(self):
        self.ran.append("upper")
        (self.directory / "upper.txt").write_text(self.text.read_text().upper())
        return Outcome("big letters")

    def model(self):
        self.ran.append("model")
        progress = self.directory / "progress.txt"
        if self.stop:
            progress.write_text("half")
            raise Interrupted
        went_on = progress.exists()
        progress.write_text("all")
        (self.directory / "model.txt").write_text(f"{self.seed} {(self.directory / 'upper.txt').read_text()}")
        return Outcome("went on" if went_on else "from the start", seconds=100)

    def page(self):
        self.ran.append("page")
        (self.directory / "page.txt").write_text("<p>")
        return Outcome("a page")

    def run(self):
        made = self.directory / "upper.txt", self.directory / "model.txt"
        kept = ("model.txt", "progress.txt")
        out, self.ran = io.StringIO(), []
        stages = [
            Stage("upper", "raise", self.upper, ("upper.txt",), (self.text,)),
            Stage("model", "learn", self.model, ("model.txt",), made[:1], {"seed": self.seed}, kept),
            Stage("page", "show", self.page, ("page.txt",), made[1:]),
        ]
        run_stages(self.directory, stages, Console(file=out, width=200))
        self.printed = out.getvalue()
        return self.ran


def test_a_stage_whose_output_names_what_is_gone_runs_again(tmp_path):
    runs = []

    def make():
        runs.append(1)
        for name in ("index", "part"):
            (tmp_path / name).touch()
        return Outcome("made")

    stage = Stage("make", "make", make, ("index",), is_whole=(tmp_path / "part").exists)
    run_stages(tmp_path, [stage], Console(file=io.StringIO()))
    run_stages(tmp_path, [stage], Console(file=io.StringIO()))
    assert len(runs) == 1
    (tmp_path / "part").unlink()
    run_stages(tmp_path, [stage], Console(file=io.StringIO()))
    assert len(runs) == 2


@pytest.fixture
def job(tmp_path):
    (tmp_path / "text.txt").write_text("how do you train")
    return Job(tmp_path / "job", tmp_path / "text.txt")


def test_what_is_current_is_skipped_whatever_its_time_and_spelling(job, tmp_path, monkeypatch):
    assert job.run() == ["upper", "model", "page"]
    for hours in (1, 2, 3):
        os.utime(job.text, (hours * 3600, hours * 3600))
        assert job.run() == []
    assert job.printed.count("(done before)") == 3
    assert "from the start" in job.printed  # the summary of a stage that is skipped
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert Job(tmp_path / "job", type(job.text)("../elsewhere/../text.txt")).run() == []


def test_a_change_that_comes_to_the_same_stops_there(job):
    job.run()
    job.text.write_text("HOW do you train")
    assert job.run() == ["upper"]
    (job.directory / "page.txt").unlink()
    assert job.run() == ["page"]


def test_what_is_kept_is_set_aside_and_never_removed(job):
    job.run()
    models = {(job.directory / "model.txt").read_text()}
    for text in ("one", "two", "three"):
        job.text.write_text(text)
        assert job.run() == ["upper", "model", "page"]
        assert "from the start" in job.printed  # not from another text's progress
        assert "another input" in job.printed
        models.add((job.directory / "model.txt").read_text())
    assert {p.read_text() for p in (job.directory / ASIDE).glob("*/model.txt")} | models == models
    assert len(list((job.directory / ASIDE).glob("model-*/model.txt"))) == 3
    job.seed = 5
    assert job.run() == ["model", "page"]
    assert "seed 0 -> 5" in job.printed


def test_a_record_of_the_first_release_loses_nothing(job):
    job.run()
    first = (job.directory / "model.txt").read_text()
    old = {name: {"fingerprint": "0123", "seconds": 1.0, "summary": "s"} for name in ("upper", "model", "page")}
    (job.directory / RECORD).write_text(json.dumps(old))
    assert job.run() == ["upper", "model", "page"]
    assert (job.directory / ASIDE / "model-1" / "model.txt").read_text() == first


def test_a_stopped_stage_goes_on(job):
    job.stop = True
    with pytest.raises(Interrupted):
        job.run()
    job.stop = False
    assert job.run() == ["model", "page"]
    assert "went on" in job.printed
    assert not (job.directory / ASIDE).exists()
    record = json.loads((job.directory / RECORD).read_text())
    assert record["model"]["seconds"] == 100
    assert list(record) == ["upper", "model", "page"]


def test_a_stage_that_failed_after_it_wrote_runs_again(job):
    job.run()
    page, failing = job.page, [True]

    def half():
        (job.directory / "page.txt").write_text("ha")
        if failing:
            raise OSError("the disk is full")
        return page()

    job.page, job.seed = half, 1
    with pytest.raises(OSError, match="full"):
        job.run()
    failing.clear()
    assert job.run() == ["page"]
    assert (job.directory / "page.txt").read_text() == "<p>"


def test_content_has_no_place(tmp_path, monkeypatch):
    for name, text in (("a/x.txt", "one"), ("a/y/z.txt", "two")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    shutil.copytree(tmp_path / "a", tmp_path / "elsewhere" / "b")
    monkeypatch.chdir(tmp_path)
    with Contents(tmp_path / "contents.json") as contents:
        same = {contents.digest(path) for path in (tmp_path / "a", "a", "elsewhere/../a", "elsewhere/b")}
        assert len(same) == 1
        (tmp_path / "a/y/z.txt").rename(tmp_path / "a/z.txt")  # it would be read at another time
        assert contents.digest("a") not in same
        assert contents.digest("a/x.txt") == contents.digest("elsewhere/b/x.txt")


def test_what_the_job_did_not_make_is_not_touched(job):
    job.directory.mkdir()
    (job.directory / "page.txt").write_text("precious")
    (job.directory / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds page\.txt, which this job did not make and would replace"):
        job.run()
    assert job.ran == []
    (job.directory / "page.txt").unlink()
    job.run()
    job.text.write_text("another")
    job.run()
    assert (job.directory / "notes.txt").read_text() == "mine"


def test_one_process_at_a_job(job):
    job.directory.mkdir()
    with locked(job.directory, LOCK), pytest.raises(RuntimeError, match="another process is at work"):
        job.run()


def test_an_input_around_the_job_is_read_without_it(tmp_path):
    (tmp_path / "text.txt").write_text("text")
    directory, calls = tmp_path / "runs" / "job", []

    def count():
        calls.append(1)
        (directory / "count.txt").write_text("4")
        return Outcome("4")

    for _ in range(2):
        run_stages(
            directory, [Stage("count", "count", count, ("count.txt",), (tmp_path,))], Console(file=io.StringIO())
        )
    assert len(calls) == 1


def test_large_inputs_are_read_once(job, monkeypatch):
    job.run()
    monkeypatch.setattr("hashlib.file_digest", lambda *_: pytest.fail("read again"))
    assert job.run() == []


@pytest.mark.parametrize("left", ["{", '["a list"]', None])
def test_a_record_that_is_gone_or_damaged_says_how_to_go_on(job, left):
    job.run()
    record = job.directory / RECORD
    whole = record.read_text()
    record.unlink()
    if left is not None:
        record.write_text(left)
    with pytest.raises(ValueError, match=r"stages\.json, which says what .*model\.txt.* put it back, or move"):
        job.run()
    assert (job.directory / "model.txt").exists()
    record.write_text(whole)
    assert job.run() == []
    record.unlink()
    for name in ("upper.txt", "model.txt", "progress.txt", "page.txt"):
        (job.directory / name).rename(job.directory / f"old {name}")
    assert job.run() == ["upper", "model", "page"]
