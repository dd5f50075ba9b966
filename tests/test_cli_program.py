"""How the program ends: by a user's error, a bug of ours, or Ctrl-C."""

import importlib
import re
import signal
import sys
import textwrap

import pytest

from cs336.cli import main


def test_debug_shows_the_trace(tmp_path, monkeypatch):
    monkeypatch.setenv("CS336_DEBUG", "1")
    with pytest.raises(ValueError, match="not a run directory"):
        main(["report", str(tmp_path)])


@pytest.mark.parametrize(
    ("error", "said"), [("", "give it less at once"), ("8 GiB are too much", "8 GiB are too much")]
)
def test_too_little_memory_is_said(tmp_path, monkeypatch, capsys, error, said):
    def huge(run_dir, output):
        raise MemoryError(error)

    monkeypatch.setattr("cs336.report.write_report", huge)
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"cs336: the memory of this machine does not suffice: {said}\n"


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
    monkeypatch.setattr("cs336.inference.load.find_model", lambda path: interrupted(path, None))
    assert main(["generate", str(tmp_path)]) == 130  # of which nothing is left to go on with
    assert capsys.readouterr().err == "\ninterrupted\n"


@pytest.mark.parametrize("error", [AttributeError, ImportError, SystemError])
def test_an_interrupt_that_an_import_dropped(tmp_path, monkeypatch, capsys, error):
    """It shows as the error of what was half imported. Without an interrupt, or after one that was dealt with, that is
    a bug, and not hidden."""
    (tmp_path / "half_made.py").write_text(
        textwrap.dedent("""
        import signal
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            DROPPED = True
    """)
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "half_made", raising=False)

    def dropped():
        assert importlib.import_module("half_made").DROPPED

    def dealt_with():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)

    def report(before):
        def write_report(run_dir, output):
            before()
            raise error("half made")

        monkeypatch.setattr("cs336.report.write_report", write_report)
        return main(["report", str(tmp_path)])

    before = signal.getsignal(signal.SIGINT)
    assert report(dropped) == 130
    assert "interrupted" in capsys.readouterr().err
    monkeypatch.setenv("CS336_DEBUG", "1")
    for harmless in (dealt_with, lambda: None):
        with pytest.raises(error, match="half made"):
            report(harmless)
    assert signal.getsignal(signal.SIGINT) is before


def test_the_list_of_verbs_says_of_each_its_first_paragraph_whole(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    said = " ".join(re.sub(r"[│╭╰─╮╯]", " ", capsys.readouterr().out).split())
    assert "evaluate Loss and bits per byte of a model on text, beside what needs no neural network" in said
    assert "and refusals. Writes evaluation.json and results.json. • compress" in said
    assert "whether they differ by chance. • batch-size" in said
