"""Phrases by a slow search, lists by language, addresses by domain, word and substring."""

import random
import re
import time

import pytest

from cs336.data.filter.lists import BadWords, PhraseMatcher, UrlList
from cs336.data.step import Removed
from cs336.utils import config
from cs336.utils.documents import Document


def slow(phrases, text, whole_words):
    """(occurrences, the first to end: the longest of those)"""
    found = []
    for phrase in {" ".join(p.lower().split()) for p in phrases}:
        pattern = re.escape(phrase)
        if whole_words:
            pattern = (r"(?<!\w)" if re.match(r"\w", phrase) else "") + pattern
            pattern += r"(?!\w)" if re.search(r"\w$", phrase) else ""
        text = " ".join(text.lower().split())
        found += [(m.start() + len(phrase), -len(phrase), phrase) for m in re.finditer(f"(?={pattern})", text)]
    return len(found), min(found)[2] if found else None


class TestPhrases:
    @pytest.mark.parametrize("whole_words", [True, False])
    def test_equal_a_slow_search(self, whole_words):
        rng = random.Random(0)
        for _ in range(300):
            phrases = ["".join(rng.choices("abé $_", k=rng.randint(1, 4))) for _ in range(rng.randint(1, 6))]
            phrases = [p for p in phrases if p.strip()] or ["a"]
            text = "".join(rng.choices("abÉ $_\n", k=rng.randint(0, 30)))
            matcher = PhraseMatcher(phrases, whole_words)
            assert matcher.find(text) == slow(phrases, text, whole_words), (phrases, text)

    @pytest.mark.parametrize(
        ("text", "found"),
        [
            ("You ASS.", "ass"),
            ("a class, assets, ass_", None),
            ("two\n  girls", "two girls"),
            ("año", None),
            ("ano", "ano"),
            ("ひどい馬鹿野郎だ", "馬鹿"),
            ("x馬鹿x", "馬鹿"),
            ("pa$$word", None),  # a letter goes on before it
            ("an a$$word", "a$$"),
            ("ßß", None),
        ],
    )
    def test_whole_words_of_every_script(self, text, found):
        matcher = PhraseMatcher(["ass", "two girls", "ano", "馬鹿", "a$$"])
        assert matcher.find(text)[1] == found

    def test_stops_at_the_most(self):
        assert PhraseMatcher(["a"]).find("a a a a", 2) == (2, "a")
        assert PhraseMatcher([]).find("a") == (0, None)

    def test_time_is_that_of_the_text(self):
        """Patterns that make a backtracking search slow."""
        matcher = PhraseMatcher(["a" * n + "b" for n in range(1, 200)], whole_words=False)
        start = time.process_time()
        assert matcher.find("a" * 2_000_000) == (0, None)
        assert time.process_time() - start < 5


class TestBadWords:
    def test_one_list_for_all(self, tmp_path):
        (tmp_path / "words").write_text("# mine\nrotten egg\n\nRAT\n")
        apply = config.parse(BadWords, {"kind": "bad_words", "path": str(tmp_path / "words")}).build()
        good = Document("A rather good text.", "1", "f")
        assert apply(good) is good
        assert apply(Document("A Rotten\negg!", "2", "f")) == Removed("bad words", "'rotten egg'")
        lenient = BadWords(tmp_path / "words", most=2).build()
        assert isinstance(lenient(Document("rat, rat", "3", "f")), Document)
        assert isinstance(lenient(Document("rat, rat, rat", "3", "f")), Removed)

    def test_lists_by_language(self, tmp_path):
        (tmp_path / "en").write_text("gift horse\n")
        (tmp_path / "de.txt").write_text("gift\n")
        apply = BadWords(tmp_path, language_field="lang").build()

        def outcome(**metadata):
            return type(apply(Document("das Gift", "1", "f", metadata)))

        assert outcome(lang="de") is Removed
        assert outcome(lang="en") is outcome(lang="fr") is outcome() is Document

    def test_refuses_lists_that_are_none(self, tmp_path):
        (tmp_path / "empty").write_text("# nothing\n")
        with pytest.raises(ValueError, match="holds no words"):
            BadWords(tmp_path / "empty").build()
        (tmp_path / "latin").write_bytes(b"ok\ncaf\xe9\n")
        with pytest.raises(ValueError, match="latin:2 is not UTF-8"):
            BadWords(tmp_path / "latin").build()
        with pytest.raises(FileNotFoundError):
            BadWords(tmp_path / "absent").build()
        with pytest.raises(ValueError, match="most must be"):
            BadWords(tmp_path / "empty", most=-1)


class TestUrls:
    @pytest.fixture
    def apply(self, tmp_path):
        (tmp_path / "domains").write_text("\ufeffbad.example\n0.0.0.0 Ads.Example.\nbücher.example\n", encoding="utf-8")
        (tmp_path / "words").write_text("casino\nfree money\n")
        (tmp_path / "substrings").write_text("xxx\n")
        table = {"kind": "url_list"} | {n: [str(tmp_path / n)] for n in ("domains", "words", "substrings")}
        return config.parse(UrlList, table).build()

    @pytest.mark.parametrize(
        ("url", "reason"),
        [
            ("https://bad.example/a", "url: domain"),
            ("http://user@WWW.bad.example.:80/", "url: domain"),
            ("bad.example/page", "url: domain"),
            ("https://x.ads.example", "url: domain"),
            ("https://xn--bcher-kva.example/", "url: domain"),
            ("https://bücher.example/", "url: domain"),
            ("https://notbad.example/", None),
            ("https://bad.example.org/", None),
            ("https://good.example/best-casino-2024", "url: word"),
            ("https://good.example/free%20money", "url: word"),
            ("https://good.example/occasino", None),
            ("https://axxxb.example/", "url: substring"),
            ("http://[broken/xxx", "url: substring"),
            ("", None),
            ("http://" + "a." * 300_000 + "bad.example/", None),  # no host is so long
        ],
        ids=lambda value: str(value)[:30],
    )
    def test_each_rule(self, apply, url, reason):
        result = apply(Document("text", "1", "f", {"url": url}))
        assert (result.reason if isinstance(result, Removed) else None) == reason

    def test_without_an_address_a_document_passes(self, apply):
        for metadata in ({}, {"url": None}, {"url": 3}):
            assert isinstance(apply(Document("xxx casino", "1", "f", metadata)), Document)

    def test_refuses_no_lists(self):
        with pytest.raises(ValueError, match="needs files"):
            UrlList()
