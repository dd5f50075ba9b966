import io
import json

import pytest
from rich.console import Console

from cs336.training.metrics import Display, JsonLines, duration


def write(path, steps, upto=0):
    lines = JsonLines(path, upto)
    for step in steps:
        lines.write({"step": step, "x": 0.1 * step})
    lines.sync()
    lines.close()


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize(("upto", "kept"), [(0, []), (3, [1, 2, 2, 3]), (4, [1, 2, 2, 3]), (9, [1, 2, 2, 3, 5])])
def test_rows_after_the_resumed_step_are_cut(tmp_path, upto, kept):
    path = tmp_path / "m.jsonl"
    write(path, [1, 2, 2, 3, 5])
    write(path, [7], upto)
    assert steps(path) == [*kept, 7]


@pytest.mark.parametrize("torn", [b'{"step": 2, "x', b'{"step": 2}', b"\0\0\0\n", b"[]\n", b'{"x": 1}\n'])
def test_a_torn_last_row_is_cut(tmp_path, torn):
    path = tmp_path / "m.jsonl"
    write(path, [1])
    with path.open("ab") as file:
        file.write(torn)
    write(path, [2], upto=5)
    assert steps(path) == [1, 2]


def test_rows_are_on_disk_as_they_are_written(tmp_path):
    lines = JsonLines(tmp_path / "m.jsonl", 0)
    lines.write({"step": 1})
    assert steps(tmp_path / "m.jsonl") == [1]
    lines.close()


ROW = {"step": 5, "tokens": 500, "train/loss": 2.5, "train/grad_norm": 1.0, "lr": 1e-3, "train/tok_per_sec": 100.0}


def test_plain_lines_without_a_terminal():
    out = io.StringIO()
    with Display(Console(file=out, soft_wrap=True)) as display:
        display.row(ROW | {"train/mfu": 0.25}, 10, 5.0)
        display.row(ROW, None, None)
        display.say("text with [brackets]")
    assert out.getvalue().splitlines() == [
        "step 5/10  loss 2.5000  lr 1.00e-03  norm 1.00  100 tok/s  MFU 25.0%  5 s left",
        "step 5/?  loss 2.5000  lr 1.00e-03  norm 1.00  100 tok/s",
        "text with [brackets]",
    ]


def test_a_bar_on_a_terminal():
    out = io.StringIO()
    with Display(Console(file=out, force_terminal=True, width=150)) as display:
        display.row(ROW, 10, 5.0)
        display.say("above")
    assert "step 5/10  loss 2.5000" in out.getvalue()
    assert "5 s left" in out.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0 s"), (43.4, "43 s"), (125, "2 min 05 s"), (11_220, "3 h 07 min"), (3599.7, "1 h 00 min")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text
