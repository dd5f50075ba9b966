"""Kneser-Ney by its definition, slowly; the file; the filter."""

import collections
import math
import random

import numpy as np
import pytest

from cs336.data.filter.perplexity import NgramModel, Perplexity
from cs336.data.step import Removed
from cs336.utils import config
from cs336.utils.documents import Document


class Slow:
    """p(w | h) of interpolated Kneser-Ney, from sets of n-grams."""

    def __init__(self, texts, order):
        self.order = order
        self.counts = [collections.Counter() for _ in range(order + 1)]
        for units in texts:
            padded = ["<"] * order + units + [">"]
            self.counts[order].update(tuple(padded[i : i + order]) for i in range(1, len(units) + 2))
        for k in range(order - 1, 0, -1):
            self.counts[k] = collections.Counter(gram[1:] for gram in self.counts[k + 1])
        self.discounts = [0.0]
        for k in range(1, order + 1):
            once, twice = (sum(c == n for c in self.counts[k].values()) for n in (1, 2))
            self.discounts.append(max(once, 1) / (max(once, 1) + 2 * twice))
        self.words = {gram[0] for gram in self.counts[1]}

    def p(self, word, history):
        p = 1 / (len(self.words) + 1)
        for k in range(1, self.order + 1):
            context = tuple(history[len(history) - k + 1 :])
            followers = [c for gram, c in self.counts[k].items() if gram[:-1] == context]
            if not followers:
                continue
            d = self.discounts[k]
            seen = max(self.counts[k][(*context, word)] - d, 0)
            p = (seen + d * len(followers) * p) / sum(followers)
        return p

    def log(self, units):
        padded = ["<"] * self.order + units + [">"]
        return sum(math.log(self.p(padded[i], padded[:i])) for i in range(self.order, len(padded)))


def sentences(seed, count=30, words="red green blue one two"):
    rng = random.Random(seed)
    return [rng.choices(words.split(), k=rng.randint(0, 7)) for _ in range(count)]


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_equals_the_definition(order):
    texts = sentences(0)
    slow, model = Slow(texts, order), NgramModel.train([" ".join(t) for t in texts], order)
    others = sentences(1, 20, "red green blue one two never")
    logs, units = model.log_probability([" ".join(t) for t in others])
    assert units.tolist() == [len(t) + 1 for t in others]
    assert logs == pytest.approx([slow.log(t) for t in others], rel=1e-9)


def test_probabilities_of_all_words_and_the_unknown_one_are_one():
    texts = sentences(2)
    model = NgramModel.train([" ".join(t) for t in texts], 3)
    for context in ("", "red", "red blue", "never seen", "one never"):
        ends = [" ".join([context, w]).strip() for w in ["red", "green", "blue", "one", "two", "other"]]
        # The end of the text is a word as well: p(context, w) without it is the sum over all that may follow.
        logs, _ = model.log_probability([context, *ends])
        slow = Slow(texts, 3)
        history = ["<"] * 3 + context.split()
        total = sum(slow.p(w, history) for w in [*["red", "green", "blue", "one", "two"], ">", "other"])
        assert total == pytest.approx(1)
        step = [slow.p(w.split()[-1], history) * slow.p(">", history + w.split()[-1:]) for w in ends]
        base = logs[0] - math.log(slow.p(">", history))
        assert np.exp(logs[1:] - base) == pytest.approx(step)


def test_characters_are_units_too():
    texts = [list("abab"), list("éa")]
    slow, model = Slow([list("abab"), list("ea")], 3), NgramModel.train(["".join(t) for t in texts], 3, "char")
    assert model.log_probability(["bAe"])[0][0] == pytest.approx(slow.log(list("bae")))


def test_reference_text_is_less_surprising_than_noise():
    rng = random.Random(0)
    texts = [" ".join(t) for t in sentences(3, 300)]
    model = NgramModel.train(iter(texts))
    noise = " ".join("".join(rng.choices("abcdef", k=5)) for _ in range(30))
    same, other, empty = model.perplexity([" ".join(sentences(4, 1)[0]), noise, ""])
    assert same < other
    assert math.isfinite(empty)
    many = texts * 400
    assert (model.perplexity(many, num_threads=3) == model.perplexity(many)).all()


def test_the_file_holds_the_model_and_damage_is_seen(tmp_path):
    path = tmp_path / "m.safetensors"
    texts = [" ".join(t) for t in sentences(5)]
    model = NgramModel.train(texts, 2)
    model.save(path)
    loaded = NgramModel.load(path)
    assert (len(loaded), loaded.order, loaded.unit) == (len(model), 2, "word")
    assert (loaded.perplexity(texts) == model.perplexity(texts)).all()
    whole = path.read_bytes()
    for place in range(0, len(whole), 97):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"m\.safetensors"):
            NgramModel.load(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NgramModel.train([]), "no text"),
        (lambda: NgramModel.train(["a"], 0), "order in 1..8"),
        (lambda: NgramModel.train(["a"], 9), "order in 1..8"),
        (lambda: NgramModel(3, "byte"), '"word" or "char"'),
        (lambda: Perplexity("m"), "changes nothing"),
        (lambda: Perplexity("m", 5.0, 1.0), "least <= most"),
    ],
)
def test_refuses_what_cannot_be_meant(make, message):
    with pytest.raises(ValueError, match=message):
        make()
    with pytest.raises(TypeError, match=r"give \[text\]"):
        NgramModel.train(["a"]).perplexity("a")
    with pytest.raises(TypeError, match=r"give \[text\]"):
        NgramModel.train("a")


def test_the_step_keeps_what_is_within_bounds(tmp_path):
    path = tmp_path / "m.safetensors"
    texts = [" ".join(t) for t in sentences(6, 200)]
    NgramModel.train(texts).save(path)
    table = {"kind": "perplexity", "model": str(path), "most": 12.0, "least": 2.0, "field": "ppl"}
    apply = config.parse(Perplexity, table).build()
    kept = apply(Document(texts[0], "1", "f", {"a": 1}))
    assert kept.metadata == {"a": 1, "ppl": pytest.approx(NgramModel.load(path).perplexity([texts[0]])[0])}
    removed = apply(Document("quite another text with words of its own", "2", "f"))
    assert isinstance(removed, Removed)
    assert (removed.reason, float(removed.detail) > 12) == ("perplexity too high", True)
    low = config.parse(Perplexity, table | {"least": 11.9}).build()
    assert low(Document(texts[0], "3", "f")).reason == "perplexity too low"
