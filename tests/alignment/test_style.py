"""Sets for tone, length, format and refusals."""

import json

import pytest

from cs336.alignment.style import messages, safety_rows, save_rows, style_rows
from cs336.evaluation.tasks import read_task
from cs336.verifiers import is_refusal, verify_constraints


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_answer_passes_its_own_check(split):
    rows = style_rows(200, seed=3, split=split)
    kinds = {kind for row in rows for kind in row["instruction_id_list"]}
    assert len(kinds) == 8
    for row in rows:
        verdict = verify_constraints(row["response"], row["instruction_id_list"], row["kwargs"])
        assert verdict.score == 1, row
    # and none passes the checks of all others
    for kind in kinds - {"punctuation:no_comma", "tone:formal"}:
        given = next(r["kwargs"] for r in rows if r["instruction_id_list"] == [kind])
        others = [r for r in rows if r["instruction_id_list"] != [kind]]
        assert any(not verify_constraints(r["response"], [kind], given).score for r in others), kind


def test_refusals_and_their_twins():
    rows = safety_rows(100, seed=1)
    assert sum(row["harmful"] for row in rows) == 50
    for row in rows:
        assert is_refusal(row["response"]) is row["harmful"], row


def test_splits_share_nothing_and_seeds_repeat(tmp_path):
    for make in (style_rows, safety_rows):
        train, test = make(300), make(300, split="test")
        assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
        assert make(50, seed=7) == make(50, seed=7) != make(50, seed=8)
        with pytest.raises(ValueError, match="got 0 and 'train'"):
            make(0)
        with pytest.raises(ValueError, match="and 'valid'"):
            make(1, split="valid")
    path = save_rows(tmp_path / "s.jsonl", style_rows(9))
    assert len(read_task(f"ifeval:{path}").items) == 9
    assert len(read_task(f"refusal:{save_rows(tmp_path / 'r.jsonl', safety_rows(9))}").items) == 9
    row = json.loads(path.read_text().splitlines()[0])
    assert messages(row)[1] == {"role": "assistant", "content": row["response"]}
