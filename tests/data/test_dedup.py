"""Duplicates: lines, documents, near duplicates; the Bloom filter."""

import collections
import contextlib
import random
import time
import unicodedata

import numpy as np
import pytest

from cs336 import _text
from cs336.data import BloomFilter, dedup_documents, dedup_lines, dedup_minhash, minhash, near_duplicates
from cs336.data.dedup import lines as lines_module


def words(rng, count):
    return ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 7))) for _ in range(count)]


def write(folder, **texts):
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_bytes(text)
    return [folder / name for name in texts]


class TestLines:
    def make(self, tmp_path):
        rng = random.Random(0)
        pool = [" ".join(words(rng, 3)).encode() for _ in range(300)] + [b"", "café".encode(), b"\r", b"\0"]
        texts = {f"f{i}": b"\n".join(rng.choices(pool, k=rng.randint(0, 200))) + b"\n" * (i % 2) for i in range(6)}
        return texts, write(tmp_path / "in", **texts)

    @pytest.mark.parametrize("keep", ["none", "first"])
    @pytest.mark.parametrize("max_memory", [1 << 30, 5000])
    @pytest.mark.parametrize("num_threads", [1, 3])
    def test_equals_counting(self, tmp_path, keep, max_memory, num_threads):
        texts, files = self.make(tmp_path)
        report = dedup_lines(files, tmp_path / "out", keep, max_memory, num_threads)
        split = {name: text.split(b"\n") for name, text in texts.items()}
        for name, text in texts.items():
            if not text or text.endswith(b"\n"):
                split[name].pop()
        counts = collections.Counter(line for lines in split.values() for line in lines)
        seen, kept = set(), 0
        for name, lines in split.items():
            expected = b""
            for i, line in enumerate(lines):
                stays = counts[line] == 1 if keep == "none" else line not in seen
                seen.add(line)
                kept += stays
                last = i == len(lines) - 1 and not texts[name].endswith(b"\n")
                expected += (line + (b"" if last else b"\n")) * stays
            assert (tmp_path / "out" / name).read_bytes() == expected
        assert (report.total, report.kept) == (sum(counts.values()), kept)

    @pytest.mark.parametrize("keep", ["none", "first"])
    def test_chunks_and_threads_change_nothing(self, tmp_path, keep):
        """Several megabytes, of which copies lie far apart, and a line that is longer than a chunk."""
        rng = random.Random(1)
        lines = [b"%d %s" % (i, b"x" * rng.randint(0, 60)) for i in rng.choices(range(60_000), k=90_000)]
        lines[5000] = lines[80_000] = b"y" * 3_000_000
        files = write(tmp_path / "in", a=b"\n".join(lines), b=b"\n".join(lines[:1000]) + b"\n")
        seen, expected = collections.Counter(lines + lines[:1000]), []
        if keep == "none":
            expected = [line for line in lines if seen[line] == 1]
        else:
            expected = list(dict.fromkeys(lines))
        for num_threads in (1, 2, 5):
            for max_memory in (1 << 32, 4_000_000):
                report = dedup_lines(files, tmp_path / "out", keep, max_memory, num_threads)
                assert (report.total, report.kept) == (91_000, len(expected))
                assert (tmp_path / "out" / "a").read_bytes().removesuffix(b"\n") == b"\n".join(expected)
                assert (tmp_path / "out" / "b").read_bytes() == b""

    def test_a_full_disk_is_an_error(self, tmp_path, monkeypatch):
        files = write(tmp_path / "in", a=b"1\n2\n")

        @contextlib.contextmanager
        def onto_a_full_disk(path, mode):
            with open("/dev/full", "wb", buffering=0) as file:
                yield file

        monkeypatch.setattr(lines_module, "replacing", onto_a_full_disk)
        with pytest.raises(OSError, match="No space left"):
            dedup_lines(files, tmp_path / "out")

    def test_outputs_are_planned_before_anything_is_written(self, tmp_path):
        files = write(tmp_path / "a", x=b"1\n") + write(tmp_path / "b", x=b"1\n")
        with pytest.raises(ValueError, match="have one name"):
            dedup_lines(files, tmp_path / "out")
        with pytest.raises(ValueError, match="would be overwritten"):
            dedup_lines(files[:1], tmp_path / "a")
        with pytest.raises(FileNotFoundError, match="is not a file"):
            dedup_lines(tmp_path / "a", tmp_path / "out")
        with pytest.raises(ValueError, match="keep is"):
            dedup_lines(files[:1], tmp_path / "out", keep="last")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="max_memory is bytes, 1 or more, got 0"):
            dedup_lines(files[:1], tmp_path / "out", max_memory=0)
        assert not (tmp_path / "out").exists()


def test_equal_documents_leave_the_first(tmp_path):
    files = write(tmp_path / "in", a=b"one", b=b"two", c=b"one", d=b"", e=b"")
    report = dedup_documents(files, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a", "b", "d"]
    assert (report.total, report.dropped) == (5, 2)
    assert (tmp_path / "out" / "a").read_bytes() == b"one"


def simplify(text):
    """What `normalize` promises, by Python's tables."""
    bases = (c for c in unicodedata.normalize("NFD", text) if unicodedata.category(c) != "Mn")
    letters = (c if unicodedata.category(c)[0] in "LNM" else " " for c in map(str.lower, bases))
    return " ".join("".join(letters).split())


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \t",
        "Crème  BRÛLÉE—l'été!",
        "ΣΊΣΥΦΟΣ İstanbul ǅ",
        "한국어 텍스트",
        "हिन्दी में",
        "a\u0301b x²",
        "日本語、テキスト。",
    ],
)
def test_copies_in_another_dress_are_one_text(text):
    plain = simplify(text)
    for form in ("NFC", "NFD"):
        found = _text.normalize(unicodedata.normalize(form, text))
        assert unicodedata.normalize("NFC", found) == unicodedata.normalize("NFC", plain)


def test_bytes_that_are_no_utf8_part_words():
    assert _text.normalize(b"ab\xff\xc3cd") == "ab cd"


def test_one_text_is_no_list_of_texts():
    with pytest.raises(TypeError, match=r"expected a list of texts, got one str: give \[text\]"):
        near_duplicates("one text")
    with pytest.raises(TypeError, match=r"give \[text\]"):
        minhash("one text")
    assert (minhash(text for text in ("a b", "c d")) == minhash(["a b", "c d"])).all()


@pytest.mark.parametrize(("unit", "n"), [("word", 1), ("word", 3), ("char", 4)])
def test_shingles_are_the_distinct_ngrams(unit, n):
    rng = random.Random(1)
    for _ in range(20):
        a, b = (rng.choices(["ab", "cd", "ef", "é"], k=rng.randint(1, 12)) for _ in range(2))

        def grams(tokens):
            units = tokens if unit == "word" else list(" ".join(tokens).replace("é", "e"))
            return {tuple(units[i : i + n]) for i in range(max(1, len(units) - n + 1))}

        ga, gb = grams(a), grams(b)
        sa, sb = (_text.shingles(" ".join(t), n, unit) for t in (a, b))
        assert (len(sa), len(sb)) == (len(ga), len(gb))
        assert _text.jaccard(sa, sb) == pytest.approx(len(ga & gb) / len(ga | gb))


def test_signatures_agree_as_often_as_texts_do():
    rng = random.Random(2)
    base = words(rng, 600)
    for changed in (30, 150, 400):
        other = words(rng, changed) + base[changed:]
        texts = [" ".join(base), " ".join(other)]
        true = _text.jaccard(*(_text.shingles(t, 1, "word") for t in texts))
        a_H, b_H = minhash(texts, num_hashes=4000, ngram=1)
        assert np.mean(a_H == b_H) == pytest.approx(true, abs=4 * (true * (1 - true) / 4000) ** 0.5)


def test_signatures_depend_on_seed_and_not_on_neighbours():
    texts = ["the river rises in the hills", "", "and runs to the sea"]
    both = minhash(texts, 40, 2)
    assert both.shape == (3, 40)
    assert (both[2] == minhash(texts[2:], 40, 2)[0]).all()
    assert (both[1] == 2**32 - 1).all()
    assert (minhash(texts, 40, 2, seed=1) != both)[0].all()
    assert (minhash(texts, 100, 2)[:, :40] == both).all()


def planted(seed=3, count=60):
    """Texts of 200 words, each followed by a copy in which one word is another one, and its rank among them."""
    rng = random.Random(seed)
    texts, origin = [], []
    for i in range(count):
        tokens = words(rng, 200)
        texts.append(" ".join(tokens))
        origin.append(i)
        if i % 2:
            tokens[rng.randrange(200)] = "ZZZ"
            texts.append(" ".join(tokens).upper().replace(" ", ",\n"))
            origin.append(i)
    return texts, origin


def test_planted_duplicates_are_found_and_nothing_else():
    texts, origin = planted()
    first = near_duplicates(texts)
    assert first == [origin.index(o) for o in origin]


def test_candidates_are_verified():
    """With one row a band nearly all pairs are candidates; those below the threshold stay apart."""
    rng = random.Random(4)
    base = words(rng, 300)
    near, far = [*base[:295], *words(rng, 5)], [*base[:200], *words(rng, 100)]
    texts = [" ".join(t) for t in (base, far, near)]
    assert near_duplicates(texts, num_hashes=64, num_bands=64, ngram=1, threshold=0.9) == [0, 1, 0]
    assert near_duplicates(texts, num_hashes=64, num_bands=64, ngram=1, threshold=0.4) == [0, 0, 0]


def test_clusters_are_chains():
    """0 ~ 1 ~ 2 though 0 and 2 are below the threshold; the first one stands for all, whatever the order."""
    rng = random.Random(5)
    base = words(rng, 100)
    second = [*base[10:], *words(rng, 10)]
    texts = [" ".join(t) for t in (base, second, [*second[10:], *words(rng, 10)])]
    sets = [_text.shingles(t, 1, "word") for t in texts]
    assert _text.jaccard(sets[0], sets[2]) < 0.7 < _text.jaccard(sets[0], sets[1])
    for order in ([0, 1, 2], [2, 0, 1], [0, 2, 1]):
        shuffled = [texts[i] for i in order]
        assert near_duplicates(shuffled, num_hashes=128, num_bands=64, ngram=1, threshold=0.7) == [0, 0, 0]


def test_many_copies_take_linear_time():
    texts = [f"page {i % 3} " + "of the same words again and " * 20 for i in range(20_000)]
    start = time.process_time()
    assert near_duplicates(texts, threshold=1.0) == [i % 3 for i in range(20_000)]
    assert time.process_time() - start < 10  # comparing all pairs would take minutes


def test_minhash_files_keep_names_and_bytes(tmp_path):
    texts, origin = planted(count=10)
    files = write(tmp_path / "in", **{f"{i:02}.txt": t.encode() for i, t in enumerate(texts)})
    report = dedup_minhash(files, tmp_path / "out", num_hashes=100, num_bands=10, ngram=5, threshold=0.8)
    kept = sorted({origin.index(o) for o in origin})
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [f"{i:02}.txt" for i in kept]
    assert all((tmp_path / "out" / f"{i:02}.txt").read_text() == texts[i] for i in kept)
    assert (report.total, report.dropped) == (15, 5)


def test_edges_and_arguments():
    assert near_duplicates([]) == []
    assert near_duplicates(["", "...", "a"], ngram=3) == [0, 0, 2]
    assert near_duplicates(["a b", "A  b!"]) == [0, 0]
    with pytest.raises(ValueError, match="multiple of num_bands"):
        near_duplicates([], num_hashes=100, num_bands=16)
    with pytest.raises(ValueError, match="num_hashes must be at most 65536"):
        near_duplicates([], num_hashes=1 << 40)
    with pytest.raises(ValueError, match="seed must be in"):
        minhash([], seed=-1)
    with pytest.raises(ValueError, match="seed must be in"):
        near_duplicates([], seed=1 << 64)
    with pytest.raises(ValueError, match="ngram must be"):
        minhash([], ngram=0)
    with pytest.raises(ValueError, match="threshold is"):
        near_duplicates([], threshold=0)
    with pytest.raises(ValueError, match='"word" or "char"'):
        minhash(["a"], unit="byte")  # type: ignore[arg-type]


class TestBloom:
    def test_knows_all_it_was_given_and_errs_as_it_was_told(self):
        bloom = BloomFilter(20_000, error=0.01)
        assert not bloom.add("first")
        assert bloom.add("first")
        known = bloom.add_many([f"key {i}" for i in range(20_000)])
        assert known.sum() < 0.004 * 20_000  # while it fills it errs less
        assert all(f"key {i}" in bloom for i in range(20_000))
        wrong = sum(f"other {i}" in bloom for i in range(20_000))
        assert 0.007 < wrong / 20_000 < 0.013
        assert bloom.num_bits / 20_000 == pytest.approx(9.585, abs=0.01)
        assert bloom.num_probes == 7

    def test_text_is_its_utf8(self):
        bloom = BloomFilter(10)
        bloom.add("é")
        assert "é".encode() in bloom
        assert "e" not in bloom
        assert bloom.add_many(("é", "a")).tolist() == [True, False]
        with pytest.raises(TypeError, match=r"give \[key\]"):
            bloom.add_many("é")

    def test_is_saved(self, tmp_path):
        bloom = BloomFilter(100)
        bloom.add("a")
        bloom.save(tmp_path / "bloom")
        loaded = BloomFilter.load(tmp_path / "bloom")
        assert "a" in loaded
        assert "b" not in loaded
        whole = (tmp_path / "bloom").read_bytes()
        probes = whole[:16] + b"\xff" * 4 + whole[20:]  # of which each look-up would take seconds
        for damaged in (whole[:-1], whole[:10], b"x" + whole[1:], probes):
            (tmp_path / "bloom").write_bytes(damaged)
            with pytest.raises(ValueError, match="bloom: "):
                BloomFilter.load(tmp_path / "bloom")

    @pytest.mark.parametrize(("capacity", "error"), [(0, 0.1), (10, 0.0), (10, 1.0)])
    def test_refuses_what_makes_no_sense(self, capacity, error):
        with pytest.raises(ValueError, match="needs a capacity"):
            BloomFilter(capacity, error)

    @pytest.mark.parametrize(("capacity", "error"), [(2**63, 0.01), (2**62, 1e-300)])
    def test_refuses_what_no_memory_holds(self, capacity, error):
        with pytest.raises(ValueError, match="more than 8 TiB"):
            BloomFilter(capacity, error)


def test_hashes_tell_lengths_and_first_bytes_apart():
    """A length must not cancel against a byte: "1..." of 20 bytes and "5..." of 16 had one hash."""
    keys = {b"%d%s" % (i, b"x" * n) for i in range(2000) for n in range(40)}
    shingles = _text.shingles(b" ".join(keys), 1, "word")
    assert len(shingles) == len(keys)
