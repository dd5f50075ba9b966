"""The linear classifier: its features and steps by slow references, its file, its filter and verbs."""

import itertools
import json
import pathlib
import random
import re

import numpy as np
import pytest
import safetensors.numpy

from cs336 import _text
from cs336.cli.program import main
from cs336.data.filter.classifier import BLOCK, Classifier, ClassifierFilter, Features, _auc
from cs336.data.step import Removed
from cs336.utils import config
from cs336.utils.documents import Document


def examples(count=400, seed=0):
    """Two topics with words of their own among common ones; which one is not always clear."""
    rng = random.Random(seed)
    own = {"sea": ["ship", "harbour", "tide", "sail", "gull"], "city": ["street", "tram", "market", "tower", "crowd"]}
    common = ["the", "a", "of", "and", "in", "to", "it", "was"]
    pairs = []
    for _ in range(count):
        label = rng.choice(["sea", "city"])
        other = "city" if label == "sea" else "sea"
        words = rng.choices(common, k=12) + rng.choices(own[label], k=3) + rng.choices(own[other], k=1)
        rng.shuffle(words)
        pairs.append((" ".join(words), label))
    return pairs


SMALL = Features(bucket_bits=12)


@pytest.fixture(scope="module")
def model():
    return Classifier.train(examples(), features=SMALL)


def words_of(text):
    """The words that features.h promises, for ASCII and a few more."""
    return re.findall(
        r"[一-龥ぁ-ヿ]|(?:(?![一-龥ぁ-ヿ])[^\W_])+|(?:[^\w\s]|_)+", re.sub("[A-Z]+", lambda m: m[0].lower(), text)
    )


class TestFeatures:
    @pytest.mark.parametrize(
        "text",
        ["", " \n", "Don't stop!!", "one two  one", "naïve Été_x 12a", "今日は晴れ。ok", "a\u2028b\u00a0c", "x" * 200],
    )
    @pytest.mark.parametrize("word_ngrams", [1, 2, 3])
    def test_are_those_of_the_words(self, text, word_ngrams):
        """Each once, in the order of their first places."""
        words = words_of(text)
        wanted = []
        for i in range(len(words)):
            wanted += [tuple(words[i - n : i + 1]) for n in range(min(i + 1, word_ngrams))]
        found = _text.FeatureSpec(word_ngrams, 0, 0, 32).features(text)
        distinct = list(dict.fromkeys(wanted))
        assert len(found) == len(set(found)) == len(distinct)
        for length in (1, 2, 5):  # the features of the first words come first
            begin = _text.FeatureSpec(word_ngrams, 0, 0, 32).features(" ".join(words[:length]))
            assert begin == found[: len(begin)]

    def test_character_ngrams_know_where_a_word_begins_and_ends(self):
        spec = _text.FeatureSpec(1, 2, 3, 32)
        marked = "<été>"
        grams = [marked[i : i + n] for i in range(5) for n in (2, 3) if i + n <= 5]
        found = spec.features("été")
        assert len(found) == len(set(found)) == 1 + len(set(grams))
        shared = set(found) & set(spec.features("tété"))  # "ét" and "été" are within both, "<ét" in one alone
        assert len(shared) == len({"ét", "té", "é>", "été", "té>"})

    def test_are_in_proportion_to_the_text(self):
        assert len(_text.FeatureSpec(2, 1, 16, 20).features("x" * 100_000)) == 1
        assert len(_text.FeatureSpec(1, 3, 5, 20).features(b"\xff\xfe\x80" * 9)) >= 1

    def test_buckets_are_below_their_number(self):
        found = _text.FeatureSpec(2, 2, 4, 8).features(" ".join(text for text, _ in examples(20)))
        assert max(found) < 256
        assert len(set(found)) > 128


class TestTraining:
    def test_takes_the_steps_of_gradient_descent(self):
        """Three texts, two passes: the result of one of the orders that they may have been in."""
        pairs = [("red red blue", "b"), ("blue green", "c"), ("", "a")]
        spec = _text.FeatureSpec(2, 0, 0, 8)
        features = [spec.features(text) for text, _ in pairs]
        trained = Classifier.train(pairs, features=Features(2, bucket_bits=8), epochs=2, learning_rate=0.7)

        def descend(order):
            weights, bias = np.zeros((256, 3)), np.zeros(3)
            for step, i in enumerate(order):
                x = np.bincount(features[i], minlength=256) / max(1, len(features[i])) ** 0.5
                logits = x @ weights + bias
                gradient = np.exp(logits) / np.exp(logits).sum() - np.eye(3)["abc".index(pairs[i][1])]
                rate = 0.7 * (1 - step / 6)
                weights -= rate * np.outer(x, gradient)
                bias -= rate * gradient
            return weights, bias

        orders = [a + b for a in itertools.permutations(range(3)) for b in itertools.permutations(range(3))]
        assert any(
            np.allclose(trained.weights, w, atol=1e-5) and np.allclose(trained.bias, b, atol=1e-5)
            for w, b in map(descend, orders)
        )

    def test_learns_what_the_words_tell(self, model):
        found = model.evaluate(examples(seed=1))
        assert found.accuracy > 0.97
        assert (found.auc > 0.99).all()

    def test_is_a_function_of_examples_and_seed(self, model):
        again = Classifier.train(iter(examples()), features=SMALL)
        other = Classifier.train(examples(), features=SMALL, seed=1)
        assert (again.weights == model.weights).all()
        assert (other.weights != model.weights).any()

    def test_threads_learn_as_well_and_predict_the_same(self, model):
        many = Classifier.train(examples(), features=SMALL, num_threads=4)
        assert many.evaluate(examples(seed=1)).accuracy > 0.97
        texts = [text for text, _ in examples(3000)]
        assert (model.probabilities(texts, num_threads=3) == model.probabilities(texts)).all()

    def test_files_of_each_label_are_examples(self, tmp_path, model):
        for label in ("sea", "city"):
            rows = [json.dumps({"text": text}) for text, its in examples() if its == label]
            (tmp_path / f"{label}.jsonl").write_text("\n".join(rows))
        trained = Classifier.train({label: tmp_path / f"{label}.jsonl" for label in model.labels}, features=SMALL)
        assert trained.evaluate(examples(seed=1)).accuracy > 0.97

    @pytest.mark.parametrize(
        ("pairs", "options", "message"),
        [
            ([("x", "a")], {}, "two labels or more"),
            ([], {}, "two labels or more"),
            (examples(4), {"epochs": 0}, "epochs >= 1"),
            (examples(4), {"learning_rate": float("nan")}, "finite learning_rate"),
            (examples(4), {"learning_rate": 3e38, "epochs": 9}, "diverged"),
            (examples(4), {"num_threads": 0}, "num_threads must be"),
        ],
    )
    def test_refuses_what_it_cannot_learn_from(self, pairs, options, message):
        with pytest.raises(ValueError, match=message):
            Classifier.train(pairs, features=SMALL, **options)

    @pytest.mark.parametrize("pair", ["ab", ("a", "b", "c")])
    def test_refuses_what_is_no_pair(self, pair):
        with pytest.raises(TypeError, match="an example is a pair of text and label, got"):
            Classifier.train([*examples(4), pair], features=SMALL)

    @pytest.mark.parametrize("options", [{"word_ngrams": 0}, {"char_ngrams": (5, 3)}, {"bucket_bits": 40}])
    def test_refuses_features_that_cannot_be(self, options):
        with pytest.raises(ValueError, match="expected word_ngrams"):
            Features(**options)


class TestScores:
    def test_are_probabilities_of_the_best_label(self, model):
        labels, scores = model.predict(["ship tide sail", "tram market", ""])
        assert labels[:2] == ["sea", "city"]
        assert np.allclose(model.probabilities(["", "ship"]).sum(1), 1)
        assert (scores >= 0.5).all()
        assert model.predict([]) == ([], pytest.approx(np.zeros(0)))

    def test_one_str_is_no_list(self, model):
        with pytest.raises(TypeError, match=r"give \[text\]"):
            model.predict("ship")
        with pytest.raises(TypeError, match=r"give \[text\]"):
            model.probabilities("ship")

    def test_evaluation_counts_by_hand(self, model):
        found = model.evaluate([("ship tide", "sea"), ("ship sail", "city"), ("tram crowd", "city")])
        assert found.labels == ("city", "sea")
        assert found.confusion.tolist() == [[1, 1], [0, 1]]
        assert found.accuracy == pytest.approx(2 / 3)
        assert found.precision.tolist() == [1, 0.5]
        assert found.recall.tolist() == [0.5, 1]
        with pytest.raises(ValueError, match="no label 'land'"):
            model.evaluate([("x", "land")])

    def test_auc_is_the_chance_of_the_right_order(self):
        rng = np.random.default_rng(0)
        scores, is_true = rng.integers(0, 6, 60), rng.random(60) < 0.4
        pairs = [(a > b) + 0.5 * (a == b) for a in scores[is_true] for b in scores[~is_true]]
        assert _auc(scores, is_true) == pytest.approx(np.mean(pairs))
        assert np.isnan(_auc(scores, np.ones(60, bool)))

    def test_quantized_weights_are_near(self, model):
        small = model.quantize()
        scale = np.abs(model.weights.reshape(-1, BLOCK)).max(1, keepdims=True)
        restored = small.weights.reshape(-1, BLOCK) * small.scales[:, None]
        assert (np.abs(restored - model.weights.reshape(-1, BLOCK)) <= scale / 254 * 1.001).all()
        texts = [text for text, _ in examples(seed=1)]
        assert np.abs(small.probabilities(texts) - model.probabilities(texts)).max() < 0.02
        assert small.quantize() is small


class TestFile:
    @pytest.mark.parametrize("quantized", [False, True])
    def test_holds_the_model(self, model, tmp_path, quantized):
        saved = model.quantize() if quantized else model
        saved.save(tmp_path / "m.safetensors")
        loaded = Classifier.load(tmp_path / "m.safetensors")
        texts = [text for text, _ in examples(20)]
        assert (loaded.labels, loaded.features) == (saved.labels, saved.features)
        assert (loaded.probabilities(texts) == saved.probabilities(texts)).all()

    def test_refuses_any_damage(self, model, tmp_path):
        path = tmp_path / "m.safetensors"
        model.save(path)
        whole = path.read_bytes()
        rng = random.Random(0)
        places = [rng.randrange(len(whole)) for _ in range(40)] + list(range(0, 400, 7))
        for place in places:
            broken = bytearray(whole)
            broken[place] ^= 1 << rng.randrange(8)
            path.write_bytes(broken)
            with pytest.raises(ValueError, match=r"m\.safetensors"):
                Classifier.load(path)
        for size in (0, 7, 100, len(whole) - 1):
            path.write_bytes(whole[:size])
            with pytest.raises(ValueError, match=r"m\.safetensors"):
                Classifier.load(path)

    def test_refuses_other_tensors(self, tmp_path):
        path = tmp_path / "m.safetensors"
        path.write_bytes(safetensors.numpy.save({"weights": np.zeros(3, np.float32)}))
        with pytest.raises(ValueError, match="expected 'cs336 classifier 1'"):
            Classifier.load(path)

    def test_arrays_must_fit_together(self, model):
        for bias, weights in [
            (model.bias[:1], model.weights),
            (model.bias, model.weights[:-1]),
            (model.bias, model.weights.astype(np.float64)),
            (model.bias * np.nan, model.weights),
        ]:
            with pytest.raises(ValueError, match=r"expected|must be"):
                Classifier(model.labels, model.features, bias, weights)


class TestFilter:
    def test_keeps_what_scores_within_bounds(self, model, tmp_path):
        model.save(tmp_path / "m.safetensors")
        table = {"kind": "classifier", "model": str(tmp_path / "m.safetensors"), "label": "sea", "field": "sea_score"}
        step = config.parse(ClassifierFilter, table | {"min_score": 0.6})
        apply = step.build()
        kept = apply(Document("ship tide sail harbour", "1", "f", {"url": "u"}))
        assert kept.metadata == {"url": "u", "sea_score": pytest.approx(model.probabilities([kept.text])[0, 1])}
        removed = apply(Document("tram market street", "2", "f"))
        assert isinstance(removed, Removed)
        assert (removed.reason, removed.detail[:6]) == ("not sea", "score ")
        assert config.parse(ClassifierFilter, table | {"max_score": 0.5}).build()(kept).reason == "is sea"

    def test_refuses_what_cannot_be_meant(self, model, tmp_path):
        path = tmp_path / "m.safetensors"
        model.save(path)
        with pytest.raises(ValueError, match="no label 'land'"):
            ClassifierFilter(path, "land", min_score=0.5).build()
        with pytest.raises(ValueError, match="changes nothing"):
            ClassifierFilter(path, "sea")
        with pytest.raises(ValueError, match="min_score <= max_score"):
            ClassifierFilter(path, "sea", 0.7, 0.2)


class TestVerbs:
    def test_train_then_apply(self, tmp_path, capsys):
        rows = [json.dumps({"text": text, "label": label}) for text, label in examples(600)]
        (tmp_path / "in.jsonl").write_text("\n".join(rows))
        model, source = str(tmp_path / "m.safetensors"), str(tmp_path / "in.jsonl")
        assert main(["data", "classifier", "train", source, "--output", model, "--bucket-bits", "12"]) == 0
        out = capsys.readouterr().out
        assert "city, sea" in out
        assert float(re.search(r"accuracy ([\d.]+)", out)[1]) > 0.9
        assert main(["data", "classifier", "apply", model, source]) == 0
        found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        right = [row["label"] == label for row, (_, label) in zip(found, examples(600), strict=True)]
        assert np.mean(right) > 0.97
        kept = str(tmp_path / "kept.jsonl")
        assert main(["data", "classifier", "apply", model, source, "--keep", "sea", "--output", kept]) == 0
        texts = {json.loads(line)["text"] for line in pathlib.Path(kept).read_text().splitlines()}
        assert texts == {
            text for text, row in zip((t for t, _ in examples(600)), found, strict=True) if row["label"] == "sea"
        }

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "give either"),
            (["in.jsonl"], 'in the field "label"'),
            (["--classes", "a", "in.jsonl"], "two labels or more"),
        ],
    )
    def test_errors_are_sentences(self, tmp_path, monkeypatch, capsys, arguments, message):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "in.jsonl").write_text('{"text": "x y"}\n')
        assert main(["data", "classifier", "train", *arguments]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "classifier.safetensors").exists()
