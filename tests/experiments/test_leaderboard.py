"""`cs336 leaderboard`: rules, submissions, and the table over them."""

import json
import math
import pathlib
import shlex

import pytest
from experiments.tiny_study import MODEL

from cs336.cli import main
from cs336.data import tokenize_documents
from cs336.experiments import leaderboard
from cs336.experiments.leaderboard import breaks, compete, load_rule, markdown, read_submissions, recipe_config, rules
from cs336.tokenizer import Tokenizer

ROOT = pathlib.Path(__file__).parents[2]
TEXT = ["How do you train the best model with a fixed set of resources? " * 30, "By measuring. " * 50] * 6
RULE = """
title = "Tiny"
text = "any"
budget = "{budget}"
device = "any"
[recipe]
batch_size = 2
compile = false
[recipe.model]
context_length = 8
num_layers = 1
d_model = 16
num_heads = 2
"""


@pytest.fixture
def data(tmp_path):
    tokenizer = Tokenizer.train(iter(TEXT), 300, ["<|endoftext|>"])
    for side in ("train", "val"):
        tokenize_documents(iter(TEXT), tokenizer, tmp_path / "data" / side)
        tokenizer.save(tmp_path / "data" / side / "tokenizer.json")
    return tmp_path / "data"


@pytest.fixture
def board(tmp_path, monkeypatch):
    """A rule that takes a moment, in place of those that are shipped."""
    boards = tmp_path / "boards"
    boards.mkdir()
    (boards / "tiny.toml").write_text(RULE.format(budget="320tok"))
    monkeypatch.setattr(leaderboard, "BOARDS", boards)
    return boards


@pytest.mark.parametrize("name", rules())
def test_every_rule_ships_a_recipe_that_fits_it(name, data):
    rule = load_rule(name)
    config = recipe_config(rule, rule.recipe, data, pathlib.Path("somewhere"))
    assert config.budget == rule.budget
    assert config.model.vocab_size == 320  # 300, up to a multiple of 64
    assert config.data.val == data / "val"


def test_a_submission(board, data, tmp_path, capsys):
    arguments = ["leaderboard", "run", "tiny", "--data", str(data), "--directory", str(tmp_path / "s" / "ours")]
    assert main([*arguments, "--author", "us | them"]) == 0
    assert "bits per byte" in capsys.readouterr().out
    made = {path.name for path in (tmp_path / "s" / "ours").iterdir()}
    assert made == {"run", "submission.json", "recipe.toml", "reproduce.sh", "log.jsonl", "samples.txt"}
    entry = json.loads((tmp_path / "s" / "ours" / "submission.json").read_text())
    assert (entry["tokens"], entry["steps"]) == (320, 20)
    assert entry["flops"] == 320 * load_flops(tmp_path)
    assert 0 < entry["bits_per_byte"] < 20
    (again,) = read_submissions(tmp_path / "s")
    assert again["name"] == "ours"
    table = markdown([again])
    assert f"| 1 | ours (us \\| them) | {entry['bits_per_byte']:.4f} |" in table
    # One command repeats it, bit for bit: it is run as it is written.
    (command,) = [
        line for line in (tmp_path / "s" / "ours" / "reproduce.sh").read_text().splitlines() if line[0] != "#"
    ]
    words = shlex.split(command)
    assert words[0] == "cs336"
    places = {"DATA": data, "recipe.toml": tmp_path / "s" / "ours" / "recipe.toml", "again": tmp_path / "again"}
    assert main([str(places.get(word, word)) for word in words[1:]]) == 0
    repeated = json.loads((tmp_path / "again" / "submission.json").read_text())
    assert repeated["loss"] == entry["loss"]
    capsys.readouterr()
    assert main(["leaderboard", "table", str(tmp_path / "s")]) == 0
    assert capsys.readouterr().out == table


def load_flops(tmp_path):
    return json.loads((tmp_path / "s" / "ours" / "run" / "run.json").read_text())["flops_per_token"]


def test_what_breaks_a_rule(board):
    rule = load_rule("tiny")
    good = {"tokens": 320, "budget": "320tok", "device": "CPU", "seconds": 3.0}
    assert breaks(good, rule) is None
    assert breaks(good | {"tokens": 321}, rule) == "321 tokens of 320"
    assert breaks(good | {"tokens": None}, rule) == "no tokens"
    assert "under a budget of 1h" in breaks(good | {"budget": "1h"}, rule)
    (board / "timed.toml").write_text(RULE.format(budget="60s").replace('device = "any"', 'device = "one GPU"'))
    timed = load_rule("timed")
    gpu = good | {"budget": "60s", "device": "H200"}
    assert breaks(gpu, timed) is None
    assert breaks(gpu | {"seconds": 60.5}, timed) is None  # the last step ends after it
    assert breaks(gpu | {"seconds": 61}, timed) == "61 seconds of 60"
    assert breaks(gpu | {"device": "CPU, 2 threads"}, timed) == "it was trained on a CPU"
    with pytest.raises(ValueError, match=r"no rule 'tinny'; there are timed, tiny"):
        load_rule("tinny")


def submission(name, bits, **changes):
    entry = {"name": name, "rule": "tiny", "budget": "320tok", "author": "", "loss": 2.0, "bits_per_byte": bits}
    entry |= {"text": "a", "tokenizer": "300 tokens", "parameters": 10, "tokens": 320, "flops": 1.0, "seconds": 1.0}
    return entry | {"device": "CPU", "commit": "abc"} | changes


def test_the_table_ranks_what_can_be_compared(board):
    found = [
        submission("x", 2.0),
        submission("y", 1.0),
        submission("z", 0.5, text="b"),
        submission("w", 0.1, tokens=999),
    ]
    table = markdown(found)
    assert table.index("| 1 | y |") < table.index("| 2 | x |") < table.index("On b of held-out text")
    assert "| 1 | z |" in table
    assert "Left out, for they break their rule: w (tiny): 999 tokens of 320." in table


BAD = [
    ({"budget": "1h", "model": MODEL}, "a recipe leaves budget to the rule"),
    ({"batch_sizes": 2, "model": MODEL}, "did you mean batch_size"),
    ({"model": MODEL}, "the model's embedding has 32 rows"),
]


@pytest.mark.parametrize(("recipe", "message"), BAD)
def test_recipes_that_do_not_fit(board, data, tmp_path, recipe, message):
    with pytest.raises(ValueError, match=message):
        compete("tiny", data, tmp_path / "s", recipe)
    assert not (tmp_path / "s" / "submission.json").exists()


def test_other_files_are_no_submissions(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "submission.json").write_text('{"rule": "tiny"}')
    with pytest.raises(ValueError, match="is not a submission"):
        read_submissions(tmp_path)


ENTRY = {"rule": "flops-1e18", "budget": "1e18flops", "author": "", "loss": 3.0, "bits_per_byte": 1.0, "text": "t"}
ENTRY |= {"parameters": 5, "tokens": 9, "flops": 1e17, "seconds": 1.0, "tokenizer": "9 tokens", "device": "H200"}
ENTRY |= {"commit": None}


@pytest.mark.parametrize(
    ("key", "value"),
    [("bits_per_byte", math.nan), ("bits_per_byte", -1.0), ("loss", "3.0"), ("tokens", True), ("tokenizer", 5)],
)
def test_a_submission_whose_values_are_none_is_refused(tmp_path, key, value):
    (tmp_path / "submission.json").write_text(json.dumps(ENTRY | {key: value}))
    with pytest.raises(ValueError, match=rf"submission\.json is not a submission: .*{key} must be a"):
        read_submissions(tmp_path)


def test_a_submission_to_no_rule_is_named(tmp_path):
    (tmp_path / "submission.json").write_text(json.dumps(ENTRY | {"rule": "mine"}))
    assert f"{tmp_path.name}: there is no rule 'mine'" in markdown(read_submissions(tmp_path))


def test_the_committed_table_is_that_of_the_committed_submissions():
    assert (ROOT / "leaderboard" / "README.md").read_text() == markdown(read_submissions(ROOT / "leaderboard"))
