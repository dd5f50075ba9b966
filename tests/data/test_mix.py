"""Mixtures: the shares, the caps, the choice by document."""

import collections
import json

import pytest

from cs336.data.mix import Buckets, MixSource, mix_documents, mixture_epochs, times
from cs336.utils import config
from cs336.utils.documents import Document


def write(path, count, size=100, **fields):
    rows = ({"text": f"{path.stem} {i} ".ljust(size, "x"), "id": f"{path.stem}{i}"} | fields for i in range(count))
    path.write_text("".join(json.dumps(row | {"score": i / count}) + "\n" for i, row in enumerate(rows)))
    return (str(path),)


class TestEpochs:
    def test_shares_are_those_of_the_weights(self):
        epochs = mixture_epochs({"a": 100, "b": 1000}, {"a": 3, "b": 1}, {"a": 4, "b": 4}, 200)
        assert epochs == {"a": pytest.approx(1.5), "b": pytest.approx(0.05)}

    def test_what_a_cap_leaves_goes_to_the_others(self):
        sizes, caps = {"a": 100, "b": 1000, "c": 1000}, dict.fromkeys("abc", 2)
        epochs = mixture_epochs(sizes, {"a": 8, "b": 1, "c": 1}, caps, 1000)
        assert epochs == {"a": 2, "b": pytest.approx(0.4), "c": pytest.approx(0.4)}
        assert mixture_epochs(sizes, {"a": 1, "b": 1, "c": 1}, caps, 1e9) == {"a": 2, "b": 2, "c": 2}

    def test_a_cap_may_push_another_over_its_own(self):
        sizes, caps = {"a": 100, "b": 250, "c": 1e6}, dict.fromkeys("abc", 1)
        epochs = mixture_epochs(sizes, {"a": 5, "b": 2, "c": 1}, caps, 1000)  # 625, 250 and 125 without caps
        assert epochs == {"a": 1, "b": 1, "c": pytest.approx(650 / 1e6)}

    def test_without_a_total_no_cap_is_passed_and_one_is_met(self):
        epochs = mixture_epochs({"a": 100, "b": 100}, {"a": 3, "b": 1}, {"a": 2, "b": 4})
        assert epochs == {"a": pytest.approx(2), "b": pytest.approx(2 / 3)}

    def test_refuses_nothing(self):
        with pytest.raises(ValueError, match="'a' has no text"):
            mixture_epochs({"a": 0}, {"a": 1}, {"a": 1})
        with pytest.raises(ValueError, match="above 0"):
            mixture_epochs({"a": 1}, {"a": 1}, {"a": 1}, 0)


class TestTimes:
    def test_are_epochs_on_average_and_grow_with_them(self):
        texts = [f"text {i}" for i in range(4000)]
        before = [0] * len(texts)
        for epochs in (0, 0.25, 1, 1.5, 3.9):
            now = [times(text, epochs) for text in texts]
            assert set(now) <= {int(epochs), int(epochs) + 1}
            assert sum(now) / len(now) == pytest.approx(epochs, abs=0.03)
            assert all(a <= b for a, b in zip(before, now, strict=True))
            before = now

    def test_depend_on_text_and_seed(self):
        chosen = [[times(f"t{i}", 0.5, seed) for i in range(64)] for seed in (0, 0, 1)]
        assert chosen[0] == chosen[1] != chosen[2]


class TestMix:
    def test_bytes_are_those_asked_for(self, tmp_path):
        sources = [
            MixSource("web", write(tmp_path / "web.jsonl", 3000), 3),
            MixSource("books", write(tmp_path / "books.jsonl", 300), 1),
        ]
        mixed = list(mix_documents(sources, 200_000))
        of = collections.Counter(d.id.rstrip("@0123456789") for d in mixed)
        assert of["web"] * 100 == pytest.approx(150_000, rel=0.1)
        assert of["books"] * 100 == pytest.approx(50_000, rel=0.1)
        ids = [d.id for d in mixed]
        assert len(set(ids)) == len(ids)
        assert any(name.endswith("@2") for name in ids)
        assert [d.id for d in mix_documents(sources, 200_000)] == ids
        assert [d.id for d in mix_documents(sources, 200_000, seed=1)] != ids

    def test_a_document_is_chosen_whatever_lies_beside_it(self, tmp_path):
        write(tmp_path / "a.jsonl", 400)
        source = MixSource("a", (tmp_path / "a.jsonl",), 1)
        ids = {d.id for d in mix_documents([source], 20_000)}
        lines = (tmp_path / "a.jsonl").read_text().splitlines()
        (tmp_path / "a.jsonl").write_text("\n".join(reversed(lines)))
        assert {d.id for d in mix_documents([source], 20_000)} == ids

    def test_buckets_repeat_the_better_and_drop_the_worse(self, tmp_path):
        paths = write(tmp_path / "a.jsonl", 1000)
        table = {"name": "a", "paths": paths, "weight": 1, "max_epochs": 1}
        table["buckets"] = {"field": "score", "edges": [0.5, 0.9], "repeats": [0, 1, 3]}
        mixed = collections.Counter(
            int(d.id[1:].split("@")[0]) for d in mix_documents([config.parse(MixSource, table)])
        )
        assert mixed == {i: 1 if i < 900 else 3 for i in range(500, 1000)}

    def test_buckets_need_a_score(self, tmp_path):
        buckets = Buckets("score", (0.5,), (0, 1))
        for score in (None, "high", True, float("nan")):
            with pytest.raises(ValueError, match='1: buckets need a number in the field "score"'):
                buckets.repeat(Document("x", "1", "f", {"score": score}))

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: Buckets("s", (0.5,), (1,)), "one repeat more"),
            (lambda: Buckets("s", (0.5, 0.1), (1, 1, 1)), "ascending"),
            (lambda: Buckets("s", (0.5,), (0, 0)), "not all 0"),
            (lambda: MixSource("a", ("x",), 0), "weight > 0"),
            (lambda: MixSource("a", (), 1), "0 paths"),
            (lambda: list(mix_documents([])), "sources with names"),
            (lambda: list(mix_documents([MixSource("a", ("x",), 1)] * 2)), "of their own"),
        ],
    )
    def test_refuses_what_cannot_be_meant(self, make, message):
        with pytest.raises(ValueError, match=message):
            make()
