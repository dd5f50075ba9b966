"""`cs336 evaluate`, with tasks."""

import json
import pathlib

import pytest
import torch

from cs336.cli.program import main
from cs336.models import Transformer, TransformerConfig, save_pretrained
from cs336.tokenizer import Tokenizer

TOKENIZER = Tokenizer({i: bytes([i]) for i in range(256)}, [], ["<|endoftext|>"])
CONFIG = TransformerConfig(272, 96, num_layers=1, d_model=16, num_heads=2)


@pytest.fixture
def exported(tmp_path):
    torch.manual_seed(0)
    save_pretrained(Transformer(CONFIG), tmp_path / "model", TOKENIZER)
    return tmp_path / "model"


def test_tasks(exported, tmp_path, capsys):
    words = " ".join(f"w{i}" for i in range(15))
    rows = [
        {"query": "sky?", "choices": ["blue", "green"], "gold": 0},
        {"query": words, "choices": ["a", "b"], "gold": 1},
    ]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "g.jsonl").write_text(json.dumps({"question": "1 + 1?", "answer": "#### 2"}) + "\n")
    (tmp_path / "train.txt").write_text(f"before {words} after")
    tasks = [f"choice:{tmp_path}/c.jsonl", f"gsm8k:{tmp_path}/g.jsonl"]
    command = ["evaluate", str(exported), "--tasks", *tasks, "--new-tokens", "4", "--output", f"{tmp_path}/r.json"]
    assert main([*command, "--contamination", f"{tmp_path}/train.txt", "--samples", "2"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in said[:3]] == [["c", "acc"], ["c", "acc_norm"], ["c", "contaminated"]]
    assert said[2].endswith("1 of 2")
    assert said[-1] == f"{tmp_path}/r.json"
    saved = json.loads((tmp_path / "r.json").read_text())
    assert saved["samples"] == 2
    assert [task["task"] for task in saved["tasks"]] == ["c", "g"]
    assert list(saved["tasks"][0]["contaminated"]) == ["1"]
    assert len(saved["tasks"][1]["rows"][0]["answers"]) == 2
    assert not (exported / "evaluation.json").exists()


def test_what_is_refused(exported, tmp_path, capsys):
    assert main(["evaluate", str(exported), "--tasks", "arc.jsonl"]) == 2
    assert "arc.jsonl is no task: expected a .toml file, or KIND:FILE" in capsys.readouterr().err
    assert main(["evaluate", str(exported), "--tasks", f"choice:{tmp_path}/none.jsonl"]) == 2
    assert "none.jsonl: No such file" in capsys.readouterr().err
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "hi", "output": "ho"}))
    assert main(["evaluate", str(exported), "--tasks", f"pairs:{tmp_path}/p.jsonl", "--new-tokens", "2"]) == 2
    assert "a win rate takes a judge" in capsys.readouterr().err
    (tmp_path / "short.txt").write_text("hi")
    assert main(["evaluate", str(exported), "--text", str(tmp_path / "short.txt")]) == 2
    assert "short.txt holds 3 tokens; one window" in capsys.readouterr().err
    assert main(["evaluate", str(exported), "--text", str(tmp_path / "p.jsonl"), "--output", "r.json", "--chat"]) == 2
    assert "cs336: --chat, --output: of tasks alone: name --tasks, or leave it out" in capsys.readouterr().err
    assert main(["evaluate", str(exported), "--samples", "4", "--limit", "0"]) == 2
    assert "cs336: --limit, --samples: of tasks alone" in capsys.readouterr().err


def test_a_run_that_is_called_from_elsewhere(capsys):
    """Its configuration names data/val from where it was started."""
    run = pathlib.Path(__file__).parent.parent / "fixtures" / "run"
    assert main(["evaluate", str(run)]) == 2
    assert "data/val, is not here: call this where the run was started" in " ".join(capsys.readouterr().err.split())
