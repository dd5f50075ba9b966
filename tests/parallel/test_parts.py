"""Tensors cut and put together again, and the names and indices of a part of a model."""

import dataclasses

import pytest
import torch

from cs336.parallel.parts import Parts
from cs336.parallel.pieces import Cut, Piece, assembled, bounds

WHOLE = torch.arange(24.0).view(4, 6)


def pieces_of(whole, cut, ranks):
    """A cut of a tensor, split flat among ranks, the last first."""
    part = cut.of(whole).reshape(-1)
    spans = [bounds(part.numel(), ranks, r) for r in range(ranks)]
    return [Piece(part[first:end], whole.shape, first, cut) for first, end in reversed(spans)]


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("ranks", [1, 3, 30])
def test_a_tensor_is_put_together(dim, parts, ranks):
    pieces = [
        p for i in reversed(range(parts)) for p in pieces_of(WHOLE, Cut(dim if parts > 1 else 0, i, parts), ranks)
    ]
    assert torch.equal(assembled(pieces), WHOLE)
    empty = torch.empty(0, 3)
    assert assembled(pieces_of(empty, Cut(0, 0, 1), ranks)).shape == (0, 3)


def test_what_is_missing_is_found():
    flat, columns = pieces_of(WHOLE, Cut(0, 0, 1), 3), [pieces_of(WHOLE, Cut(1, i, 2), 2) for i in (0, 1)]
    for pieces in (flat[1:], flat[:-1], [flat[0], flat[2]], [*flat, flat[0]], [*columns[0], *columns[1][1:]]):
        with pytest.raises(ValueError, match="the pieces of a tensor do not make it whole"):
            assembled(pieces)
    for pieces in (columns[0], columns[1], [*columns[0], *pieces_of(WHOLE, Cut(0, 1, 2), 1)]):
        with pytest.raises(ValueError, match="the parts of a tensor do not make it whole"):
            assembled(pieces)


@pytest.fixture
def parts():
    """Of the second of two stages, which has half of the columns of b, and of a optimizer in two groups a rank."""
    whole = [{"names": ["a", "b"], "lr": 1.0}, {"names": ["x", "y"], "lr": 2.0}, {"names": ["z"], "lr": 3.0}]
    return Parts(
        shapes={name: torch.Size([4, 6]) for name in "abxyz"},
        cuts={"b": Cut(1, 1, 2)},
        written=frozenset("by"),
        written_state=frozenset("b"),
        whole=whole,
        own=[{"names": ["b"], "lr": 1.0}, {"names": ["y"], "lr": 2.0}],
    )


def test_what_a_rank_writes_is_a_part_of_the_whole(parts):
    mine = Cut(1, 1, 2).of(WHOLE)
    written = parts.pieces({"b": mine, "y": WHOLE, "tied": WHOLE})
    assert written.keys() == {"b", "y"}
    assert written["y"] is WHOLE
    assert (written["b"].shape, written["b"].cut) == ((4, 6), Cut(1, 1, 2))
    split = parts.pieces({"b": Piece(mine.reshape(-1)[5:], mine.shape, 5)})["b"]  # as FSDP has it
    assert (split.shape, split.start, split.cut) == ((4, 6), 5, Cut(1, 1, 2))
    step = torch.tensor(3.0)
    state = parts.optimizer_pieces({"0.exp_avg": mine, "0.step": step, "1.exp_avg": WHOLE})
    assert state.keys() == {"1.exp_avg", "1.step"}
    assert state["1.step"] is step
    assert torch.equal(state["1.exp_avg"].tensor, mine.reshape(-1))


def test_an_optimizer_is_counted_as_the_whole_one(parts):
    saved = {
        "numbers": {"0": {"k": 7}, "1": {"k": 8}},
        "groups": [{"lr": 0.1, "params": [0]}, {"lr": 0.2, "params": [1]}],
    }
    whole = parts.optimizer_state(saved)
    assert whole["numbers"] == {"1": {"k": 7}}
    assert [group["params"] for group in whole["groups"]] == [[0, 1], [2, 3], [4]]
    assert [group["lr"] for group in whole["groups"]] == [0.1, 0.2, 3.0]
    own = parts.own_state(whole | {"numbers": {str(i): {"k": i} for i in range(5)}})
    assert own["groups"] == saved["groups"]
    assert own["numbers"] == {"0": {"k": 1}, "1": {"k": 3}}
    assert [parts.place(i) for i in range(5)] == [None, 0, None, 1, None]


def test_what_a_rank_reads_is_its_part(parts):
    own = parts.own_tensors({"a": WHOLE, "b": WHOLE, "y": WHOLE, "new": WHOLE}, {"b": 0, "y": 0})
    assert dict(own).keys() == {"b", "y", "new"}  # what no rank knows is for load_state_dict to refuse
    assert len(own) == 3
    assert "a" not in own
    assert torch.equal(own["b"], WHOLE[:, 3:])
    assert torch.equal(own["y"], WHOLE)
    with pytest.raises(RuntimeError, match=r"b has shape \[4, 3\], expected \[4, 6\]"):
        parts.own_tensors({"b": WHOLE[:, :3]}, {"b": 0})["b"]
    assert torch.equal(parts.own_part(0, WHOLE), WHOLE[:, 3:])
    assert parts.own_part(0, WHOLE[0]).shape == (6,)


def test_an_optimizer_of_another_order(parts):
    """Its groups and parameters are in an order of their own: a saved group's options and states follow the names."""
    other = dataclasses.replace(parts, own=[{"names": ["y", "x"]}, {"names": ["b", "a"]}])
    saved = {
        "groups": [{"params": [0, 1], "lr": 1.0}, {"params": [2, 3], "lr": 2.0}, {"params": [4], "lr": 3.0}],
        "numbers": {str(i): {"step": i} for i in range(5)},
    }
    assert other.own_state(saved) == {
        "groups": [{"params": [0, 1], "lr": 2.0}, {"params": [2, 3], "lr": 1.0}],
        "numbers": {"3": {"step": 0}, "2": {"step": 1}, "1": {"step": 2}, "0": {"step": 3}},
    }
