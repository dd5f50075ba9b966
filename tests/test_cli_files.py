"""Files that are not what a verb reads, or cannot be what it writes: a sentence that names them, before any work."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from cs336.cli import main

ROOT = pathlib.Path(__file__).parents[1]
TEXT = "how do you train the best model?\n" * 50
TRAIN = """
run_dir = "run"
budget = "2steps"
batch_size = 2
device = "cpu"
compile = false
data = {{train = "{vocab}"}}
model = {{vocab_size = {vocab}, context_length = 8, num_layers = 1, d_model = 16, num_heads = 2}}
"""
POINTS = [{"parameters": 1e6 * 2**n, "flops": 1e15 * 4**k, "loss": 4 - 0.1 * k} for n in range(3) for k in range(3)]


@pytest.fixture
def place(tmp_path, monkeypatch, capsys):
    """A directory with a text, a tokenizer, points, and files of all the wrong kinds."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "points.json").write_text(json.dumps(POINTS))
    (tmp_path / "labels.jsonl").write_text('{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n' * 9)
    (tmp_path / "empty").touch()
    (tmp_path / "binary").write_bytes(b"\xd0\x00\xff" * 40)
    (tmp_path / "cut.toml").write_text("a = [")
    (tmp_path / "wide.csv").write_text("a,b\n1,2,3\n")
    (tmp_path / "long.csv").write_text("loss\n" + "1" * 200_000)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    assert main(["tokenizer", "train", "text.txt", "--vocab-size", "270"]) == 0
    capsys.readouterr()
    return tmp_path


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("generate empty", "empty holds no checkpoint: expected what save_checkpoint wrote"),
        ("sweep cut.toml", "cut.toml is not TOML: "),
        ("data build binary", "binary is not TOML: "),
        ("tokenizer inspect empty", "empty is no tokenizer.json"),
        ("tokenizer inspect folder", "folder is no tokenizer.json"),
        ("leaderboard table none", "none is no directory: expected one in which `cs336 leaderboard run` wrote"),
        ("scaling fit binary", "binary holds no runs"),
        (
            "scaling fit wide.csv",
            "wide.csv must have loss and two of parameters, tokens and flops as columns; it has a, b",
        ),
        ("scaling fit long.csv", "long.csv is not CSV: field larger"),
        ("scaling grade a 3 --log binary", "binary:1 is no forecast"),
        ("scaling api submit --config cut.toml --key-file text.txt", "a key is one line of ASCII"),
        ("scaling api runs --key-file binary", "a key is one line of ASCII"),
        ("scaling api runs --key-file empty --url http://127.0.0.1:1", "no server answers at 127.0.0.1:1"),
        ("data classifier apply folder text.txt", "folder is a directory: expected a safetensors file"),
    ],
)
def test_what_is_read(asked, message, place, capsys):
    assert main(asked.split()) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err) < 500  # and not the file


@pytest.mark.parametrize(
    "asked",
    [
        "tokenizer train text.txt --vocab-size 270 --output",
        "tokenizer compare tokenizer.json --text text.txt --plot",
        "data classifier train labels.jsonl --output",
        "scaling fit points.json --law isoflop-lowest --out",
        "evaluate none --tasks gsm8k:none --output",
        "align pairs none text.txt",
        "data stdlib",
        "report none none --output",
        "scaling coord-check --out",
        "leaderboard table folder --output",
    ],
)
def test_what_is_written(asked, place, capsys):
    for output, message in (
        ("folder", "folder is a directory"),
        ("none/out", "there is no directory none; make it"),
        ("pipe", "pipe is a device or a pipe"),
    ):
        assert main([*asked.split(), output]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert message in err
    assert not (place / "none").exists()


@pytest.mark.parametrize(
    "asked",
    [
        "tokenizer train text.txt --vocab-size 270 --output ./text.txt",
        "data classifier train labels.jsonl --output labels.jsonl",
        "scaling fit points.json --law isoflop-lowest --out points.json",
        "align pairs none text.txt text.txt",
    ],
)
def test_what_is_read_is_not_written_over(asked, place, capsys):
    before = {path.name: path.read_bytes() for path in place.iterdir() if path.is_file()}
    assert main(asked.split()) == 2
    assert "is what is read, and would be written over" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in place.iterdir() if path.is_file()} == before


@pytest.mark.parametrize(("unbuffered", "what"), [("", "standard output"), ("1", "standard output, or a file")])
def test_standard_output_that_is_full(unbuffered, what):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "cs336", "leaderboard", "rules"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered}
        done = subprocess.run(command, env=environment, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, f"cs336: {what}: No space left on device\n")


def test_what_went_wrong_is_said_where_standard_output_is_full_too():
    program = "import sys; from cs336.cli import main; print(1); sys.exit(main(['scaling', 'fit', 'none.csv']))"
    with open("/dev/full", "w") as full:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, env=environment, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, "cs336: none.csv: No such file or directory\n")


def test_a_descriptor_is_no_output(place, capsys):
    with open("redirected", "w") as file:  # as /dev/stdout is, before `> redirected`
        os.symlink(f"/proc/self/fd/{file.fileno()}", "out")
        assert main(["tokenizer", "train", "text.txt", "--vocab-size", "270", "--output", "out"]) == 2
        out, err = capsys.readouterr()
    assert out == ""
    assert "out is a device or a pipe" in err


def test_other_data_of_a_run_that_left_no_checkpoint(place, capsys):
    """The tokenizer that it left is not asked of data that have another."""
    for vocab in ("270", "280"):
        assert main(["tokenizer", "train", "text.txt", "--vocab-size", vocab]) == 0
        encode = ["tokenizer", "encode", "tokenizer.json", "text.txt", "--val-fraction", "0"]
        assert main([*encode, "--shards", vocab]) == 0
        (place / "train.toml").write_text(TRAIN.format(vocab=vocab))
        assert main(["train", "--config", "train.toml"]) == 0
        assert len(json.loads((place / "run/tokenizer.json").read_text())["model"]["vocab"]) == int(vocab)
        for left in ("checkpoints", "export"):
            shutil.rmtree(place / "run" / left)
    (place / "run/stages.json").write_text("{}")
    before = {path: path.read_bytes() for path in (place / "run").iterdir()}
    capsys.readouterr()
    assert main(["train", "--config", "train.toml", "--run-dir", "trunk"]) == 0
    capsys.readouterr()
    trunk = ["--branch-from", "trunk/checkpoints/step_00000002", "--budget", "3steps"]
    for options in ([], trunk):
        assert main(["train", "--config", "train.toml", *options]) == 2
        assert "run is where `cs336 quickstart`, or a verb like it, works" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (place / "run").iterdir()} == before
