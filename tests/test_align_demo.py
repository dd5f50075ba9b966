"""`cs336 align demo`, shortened: every stage, and nothing twice."""

import json

import pytest
from rich.console import Console

from cs336.align_demo import SFT_SHARE, AlignDemo, _Job, split_sums
from cs336.cli.program import main


def test_all_stages_and_nothing_twice(tmp_path, capsys):
    command = ["align", "demo", "--run-dir", str(tmp_path), "--pretrain-steps", "3", "--sft-steps", "30"]
    command += ["--dpo-steps", "2", "--grpo-steps", "2", "--prompts-per-step", "2"]
    assert main(command) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["model"] for row in results["rows"]] == ["sft", "dpo", "grpo"]
    assert all(0 <= row["accuracy"] <= 1 for row in results["rows"])
    for stage in ("sft", "dpo", "grpo"):
        assert (tmp_path / stage / "report.html").exists()
        assert (tmp_path / stage / "export" / "chat_template.jinja").exists()
    out = capsys.readouterr().out
    assert "of 500 sums that it never saw" in out
    record = json.loads((tmp_path / "stages.json").read_text())
    del record["compare"]  # as if it had been stopped before
    (tmp_path / "stages.json").write_text(json.dumps(record))
    (tmp_path / "results.json").unlink()
    weights = (tmp_path / "grpo" / "export" / "model.safetensors").stat().st_mtime_ns
    assert main(command) == 0
    assert capsys.readouterr().out.count("(done before)") == 6
    assert (tmp_path / "grpo" / "export" / "model.safetensors").stat().st_mtime_ns == weights
    assert json.loads((tmp_path / "results.json").read_text()) == results


def test_a_base_that_is_not_there_is_said_first(tmp_path, capsys):
    command = ["align", "demo", "--run-dir", str(tmp_path / "run"), "--model", str(tmp_path / "none")]
    assert main(command) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "none holds no model: expected an export" in err
    assert not (tmp_path / "run").exists()


def test_what_is_tested_is_in_nothing_that_is_learned():
    learned, tested = split_sums(3)
    assert len(set(learned)) + len(set(tested)) == len(set(learned + tested)) == 8100
    assert (learned, tested) == split_sums(3) != split_sums(4)


def test_minutes_are_shared_by_sft_and_grpo(tmp_path, monkeypatch):
    monkeypatch.setattr(_Job, "_width", lambda job: 64)
    job = _Job(AlignDemo(tmp_path, minutes=2), Console(quiet=True))
    shares = {"sft": SFT_SHARE, "dpo": 0, "grpo": 1 - SFT_SHARE}
    budgets = [job._shared(name, tmp_path, 600, 1e-3, share)["budget"] for name, share in shares.items()]
    assert budgets == ["30s", "600steps", "90s"]
    settings = {stage.name: stage.settings for stage in job.stages()}
    assert settings["sft"]["minutes"] == settings["grpo"]["minutes"] == 2
    assert "minutes" not in settings["dpo"]
    with pytest.raises(ValueError, match="minutes must be more than zero and finite, got 0"):
        AlignDemo(minutes=0)
