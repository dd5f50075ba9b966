"""The benchmarks of SFT beside TRL and of GRPO on GSM8K, on models that learn nothing in so few steps."""

import json
import sys

import pytest

from benchmarks import report
from benchmarks.end_to_end import bench_gsm8k, bench_sft
from cs336.models import Transformer, TransformerConfig, save_pretrained
from cs336.tokenizer import Tokenizer
from cs336.utils.special_tokens import END_OF_TEXT


def test_without_trl_ours_is_measured_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.setattr(bench_sft, "SHAPE", {"num_layers": 1, "d_model": 16, "num_heads": 2, "d_ff": 16})
    out = tmp_path / "cpu.json"
    assert bench_sft.main(["--examples", "12", "--rounds", "1", "--out", str(out)]) == 0
    assert "trl: skipped, " in capsys.readouterr().err
    (row,) = json.loads(out.read_text())["sft"]["rows"]
    assert (row["way"], row["examples"]) == ("cs336 sft", 12)
    assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"], rel=0.5)
    *_, line = report.sft([row, {**row, "way": "trl", "tokens_per_second": row["tokens_per_second"] / 4}])
    assert line.endswith("| 4.00 |")


def test_a_seed_of_gsm8k_is_a_row_and_several_are_a_gain(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_gsm8k, "TESTED", 3)
    monkeypatch.setattr(bench_gsm8k, "MAX_TOKENS", 4)
    tokenizer = Tokenizer({i: bytes([i]) for i in range(256)}, [], [END_OF_TEXT])
    shape = TransformerConfig(tokenizer.vocab_size, 1024, num_layers=1, d_model=16, num_heads=2)
    save_pretrained(Transformer(shape), tmp_path / "model", tokenizer=tokenizer)
    rows = [{"question": f"{i} and 1?", "answer": f"<<{i}+1={i + 1}>>It is {i + 1}\n#### {i + 1}"} for i in range(9)]
    rows += [{"question": f"hard {i}?", "answer": "<<1+1=2>>" * (bench_gsm8k.EASY + 1) + "#### 2"} for i in range(2)]
    (tmp_path / "gsm.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "cpu.json"
    for seed, budget in (("0", ["--grpo", "7steps"]), ("1", ["--within", "1"])):
        command = [str(tmp_path / "model"), str(tmp_path / "gsm.jsonl"), "--seed", seed, "--sft", "12steps"]
        command += [*budget, "--device", "cpu", "--run-dir", str(tmp_path), "--out", str(out)]
        assert bench_gsm8k.main(command) == 0
    *found, greedy, drawn = json.loads(out.read_text())["gsm8k"]["rows"]
    assert [(row["seed"], row["tested"], row["sft_steps"]) for row in found] == [(0, 3, 12), (1, 3, 12)]
    assert found[0]["grpo_steps"] == 7
    saved = (tmp_path / "seed-1" / "grpo" / "config.toml").read_text()
    assert 'budget = "1s"' in saved  # all that SFT has left
    assert greedy["gain"] == "greedy"
    assert greedy["mean"] == pytest.approx(sum(row["grpo_greedy"] - row["sft_greedy"] for row in found) / 2)
    for row in found:
        assert (row["gained"] - row["lost"]) / 3 == pytest.approx(row["grpo_greedy"] - row["sft_greedy"])
    assert drawn["half_width"] >= 0
    sft, val = ((tmp_path / "seed-0" / f"{name}.jsonl").read_text() for name in ("sft", "val"))
    assert "<<" not in sft
    train = (tmp_path / "seed-0" / "train.jsonl").read_text()
    assert "hard" in sft + val
    assert "hard" not in train
    asked = {json.loads(line)["prompt"][0]["content"] for line in val.splitlines()}
    assert len(asked) == 3
    assert not any(question in sft for question in asked)
    assert [line for line in report.gsm8k([*found, greedy, drawn]) if line.startswith("Gain, greedy: ")]
