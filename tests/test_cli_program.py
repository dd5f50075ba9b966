"""How the program ends: by a user's error, a bug of ours, or Ctrl-C."""

import pytest

from cs336.cli import main


def test_debug_shows_the_trace(tmp_path, monkeypatch):
    monkeypatch.setenv("CS336_DEBUG", "1")
    with pytest.raises(ValueError, match="not a run directory"):
        main(["report", str(tmp_path)])


def test_a_bug_is_not_hidden(tmp_path, monkeypatch):
    def broken(run_dir, output):
        raise AssertionError("ours")

    monkeypatch.setattr("cs336.report.write_report", broken)
    with pytest.raises(AssertionError, match="ours"):
        main(["report", str(tmp_path)])


def test_interrupt(tmp_path, monkeypatch, capsys):
    def interrupted(run_dir, output):
        raise KeyboardInterrupt

    monkeypatch.setattr("cs336.report.write_report", interrupted)
    assert main(["report", str(tmp_path)]) == 130
    assert "go on with the same command" in capsys.readouterr().err
