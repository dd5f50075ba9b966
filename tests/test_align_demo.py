"""`cs336 align demo`, shortened: every stage, and nothing twice."""

import json

from cs336.align_demo import split_sums
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


def test_what_is_tested_is_in_nothing_that_is_learned():
    learned, tested = split_sums(3)
    assert len(set(learned)) + len(set(tested)) == len(set(learned + tested)) == 8100
    assert (learned, tested) == split_sums(3) != split_sums(4)
