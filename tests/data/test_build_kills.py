"""kill -9 at any moment, and the same command again: the same bytes as a build that nobody disturbed."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from tiny_crawl import tree, write_crawl, write_recipe

from cs336.data import Recipe
from cs336.utils.config import parse

MORE = """
[[dedup]]
kind = "paragraphs"
[[dedup]]
kind = "substrings"
length = 16
"""
KILLS = 10  # at random times, beside one at each of these moments: when the build has made
MOMENTS = (
    ".sources.json",
    "1-extract/documents",
    "1-extract/counts/00001.json",
    "1-extract/index.json",
    "2-documents/documents",
    "3-minhash/documents",
    "4-lines/documents",
    "5-paragraphs/documents",
    "6-substrings/documents",
    "build.json",
    "tokenizer.json",
    "tokens/train",
    "tokens/val/meta.json",
)


def start(directory):
    code = "import sys; from cs336.cli import main; sys.exit(main(['data', 'build', 'recipe.toml', '--workers', '2']))"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=directory,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def kill(process):
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stderr.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(recipe's text, what an undisturbed build makes, seconds that it takes)."""
    directory = tmp_path_factory.mktemp("whole")
    write_crawl(directory / "crawl")
    path = write_recipe(directory / "recipe.toml", directory / "crawl", end=MORE)
    began = time.monotonic()
    process = start(directory)
    finish(process)
    assert json.loads((directory / "out/build.json").read_text())["repeats"]["documents_cut"] > 5
    return path.read_text(), tree(directory / "out"), time.monotonic() - began


def finish(process):
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said.decode()


def new_directory(path, text):
    path.mkdir()
    (path / "recipe.toml").write_text(text)
    return path


def test_killed_in_each_stage_the_bytes_are_the_same(whole, tmp_path):
    """A build that goes on ten times with what the one before it left."""
    text, expected, _ = whole
    directory = new_directory(tmp_path / "build", text)
    killed = 0
    for moment in MOMENTS:
        process = start(directory)
        while process.poll() is None and not (directory / "out" / moment).exists():
            time.sleep(0.002)
        killed += process.poll() is None
        kill(process)
    finish(start(directory))
    assert tree(directory / "out") == expected
    assert killed >= len(MOMENTS) - 2


def test_killed_at_random_times_the_bytes_are_the_same(whole, tmp_path):
    text, expected, seconds = whole
    rng = random.Random(int(os.environ.get("SEED", "0")))
    killed = builds = 0
    directory = new_directory(tmp_path / "0", text)
    while killed < KILLS:
        process = start(directory)
        time.sleep(rng.uniform(0.2, 1) * seconds)
        if process.poll() is None:
            killed += 1
            kill(process)
            continue
        finish(process)  # before its time came: looked at, and another begun
        assert tree(directory / "out") == expected
        builds += 1
        directory = new_directory(tmp_path / str(builds), text)
    finish(start(directory))
    assert tree(directory / "out") == expected


def test_a_worker_that_is_killed_from_outside_loses_nothing(whole, tmp_path):
    text, expected, _ = whole
    (tmp_path / "recipe.toml").write_text(text)
    process = start(tmp_path)
    counts = tmp_path / "out/1-extract/documents"
    while process.poll() is None and not counts.exists():
        time.sleep(0.002)
    for child in children(process.pid):
        with contextlib.suppress(ProcessLookupError):  # it had ended
            os.kill(child, signal.SIGKILL)
    finish(process)
    assert tree(tmp_path / "out") == expected


def children(pid):
    direct = set()
    for task in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(FileNotFoundError), open(f"/proc/{pid}/task/{task}/children") as file:  # a thread ends
            direct |= {int(word) for word in file.read().split()}
    return direct


def test_what_a_killed_build_remembers_of_losses_is_not_paid_twice(tmp_path, monkeypatch):
    """The record of losses is written before the unit is made again."""
    from cs336.data.build.supervisor import Supervisor
    from cs336.data.build.unit import Work
    from cs336.data.sources.unit import Unit

    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    recipe = parse(Recipe, {"output": "out", "sources": [{"kind": "jsonl", "paths": ["a.jsonl"]}]})
    work = Work(0, 0, Unit(("a.jsonl",), 32, "a.jsonl"), str(tmp_path / "out"), "key", lost={1: ("too slow", "x")})
    supervisor = Supervisor(recipe, str(tmp_path / "lock"))
    supervisor._remember(work)
    for key, kept in (("key", ["one"]), ("another key", ["one", "two"])):
        supervisor.run(Work(0, 0, work.unit, work.directory, key))
        assert [json.loads(line)["text"] for line in work.path("documents").open()] == kept
    supervisor.close()
