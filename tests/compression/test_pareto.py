"""The front is those that nothing beats, and the page shows every row."""

import json

import pytest
import torch

from cs336.cli.program import main
from cs336.compression import front, pareto
from cs336.inference.quantization import compress
from cs336.models import Transformer, TransformerConfig, save_pretrained
from cs336.report.pareto import write_pareto
from cs336.tokenizer import Tokenizer


def test_the_front_is_what_nothing_beats():
    assert front([1, 2, 3, 2], [3, 2, 1, 4]) == [0, 1, 2]
    assert front([2, 1, 3], [1, 1, 1]) == [1]
    assert front([1, 1], [2, 2]) == [0, 1]
    assert front([5, 4], [1, 2]) == [1, 0]
    with pytest.raises(ValueError, match="shorter"):
        front([1], [])


def test_models_are_measured_once_and_shown(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the dog sat on the log. " * 40)
    tokenizer = Tokenizer.train([text.read_text()], 270, ["<|endoftext|>"])
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(270, 16, 2, 32, num_heads=4, d_ff=64))
    save_pretrained(model, tmp_path / "whole", tokenizer)
    compress(tmp_path / "whole", tmp_path / "small", "int8", 32)
    (tmp_path / "small" / "teacher").mkdir()  # what a job kept
    (tmp_path / "small" / "teacher" / "00000.safetensors").write_bytes(bytes(1 << 20))
    (tmp_path / "ask.jsonl").write_text(
        '{"question": "the cat sat on the", "choices": [" mat", " dog"], "answer": 0}\n'
    )
    command = ["compress", "pareto", str(tmp_path / "whole"), str(tmp_path / "small"), "--text", str(text)]
    command += ["--tasks", f"choice:{tmp_path / 'ask.jsonl'}", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    told = json.loads((tmp_path / "out" / "pareto.json").read_text())
    whole, small = told["rows"]
    assert whole["disk_bytes"] == (tmp_path / "whole" / "model.safetensors").stat().st_size > small["disk_bytes"]
    assert "disk_bytes" in small["front"]
    assert whole["memory_bytes"] - small["memory_bytes"] > 10_000
    assert whole["accuracy"]["ask"] in (0, 1)
    assert min(whole["latency_ms"], small["latency_ms"], whole["tokens_per_second"], whole["bits_per_byte"]) > 0
    page = (tmp_path / "out" / "pareto.html").read_text()
    assert all(f"{row['bits_per_byte']:.4f}" in page and row["name"] in page for row in told["rows"])
    assert page.count("<circle") >= 4
    capsys.readouterr()
    assert main(command) == 0
    assert capsys.readouterr().out.count("(done before)") == 2
    assert json.loads((tmp_path / "out" / "pareto.json").read_text()) == told


def test_models_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"names of their own, got \['a', 'a'\]"):
        pareto([tmp_path / "a", tmp_path / "b" / ".." / "a"], tmp_path / "out", text="text.txt")
    (tmp_path / "pareto.json").write_text('{"rows": []}')
    with pytest.raises(ValueError, match=r"is no pareto\.json"):
        write_pareto(tmp_path / "pareto.json")
