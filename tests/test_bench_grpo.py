"""benchmarks/end_to_end/bench_grpo.py at a tiny shape: responses have their length, invariant mode differs by 0."""

import json

import pytest

from benchmarks.alignment_tables import grpo_step
from benchmarks.end_to_end import bench_grpo
from cs336.alignment import GRPOConfig


def test_a_step_is_timed_and_its_invariant_twin_has_equal_log_probabilities(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_grpo, "SHAPE", {"vocab_size": 97, "num_layers": 2, "d_model": 32, "num_heads": 2})
    for name, value in {"PROMPTS": 2, "GENERATIONS": 3, "PROMPT": 5, "TOKENS": 7}.items():
        monkeypatch.setattr(bench_grpo, name, value)
    small = GRPOConfig(num_generations=2, prompts_per_step=2, max_tokens=6)
    monkeypatch.setattr(bench_grpo, "INVARIANT", small)
    assert bench_grpo.main(["--steps", "2", "--device", "cpu", "--out", str(tmp_path / "cpu.json")]) == 0
    *fast, invariant = json.loads((tmp_path / "cpu.json").read_text())["grpo_step"]["rows"]
    assert [(row["mode"], row["responses"], row["tokens"]) for row in fast] == [("fast", 6, 42)] * 2
    for row in fast:
        assert row["seconds"] == pytest.approx(row["rollout_seconds"] + row["learn_seconds"])
        assert row["rollout_tokens_per_second"] == pytest.approx(42 / row["rollout_seconds"])
    assert (invariant["mode"], invariant["tokens"], invariant["difference_max"]) == ("invariant", 24, 0.0)
    slow = fast[0] | {"seconds": fast[0]["seconds"] + 100}
    lines = list(grpo_step([row | {"peak_gib": 1.0} for row in (slow, *fast[1:], invariant)]))
    assert lines[0] == "6 responses of 7 tokens to prompts of 5"
    assert lines[4].startswith(f"| {fast[1]['seconds']:.1f} s |")
    assert lines[-1].endswith(", 0 in invariant mode.")
