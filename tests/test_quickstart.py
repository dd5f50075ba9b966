"""The main job on a corpus of a few files: whole, repeated, changed, interrupted, killed."""

import dataclasses
import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap
import zipfile

import pytest
from rich.console import Console

import cs336.quickstart as q
from cs336.cli import main
from cs336.data.stdlib import stdlib_documents
from cs336.inference import LLM
from cs336.quickstart import SHAPES, Job, Quickstart, quickstart
from cs336.quickstart_full import Full
from cs336.utils.locks import locked
from cs336.utils.stages import LOCK

TINY = dataclasses.replace(SHAPES[0], num_layers=1, d_model=32, num_heads=2, context_length=32, batch_size=4)
STAGES = Job(Quickstart()).stages()
NAMES = [stage.name for stage in STAGES]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Three modules of the standard library, 200 kB."""
    directory = tmp_path_factory.mktemp("corpus")
    library = pathlib.Path(os.__file__).parent
    for name in ("argparse.py", "typing.py", "os.py"):
        (directory / name).write_bytes((library / name).read_bytes()[:70_000])
    return directory


@pytest.fixture
def tiny(monkeypatch):
    """A model that learns in seconds, for a number of steps that no clock decides."""
    config = Job._train_config
    monkeypatch.setattr(q, "SHAPES", (TINY,))
    monkeypatch.setattr(Job, "_train_config", lambda job: dataclasses.replace(config(job), budget="40steps"))


def run(settings):
    """What the job prints, and the stages that it ran."""
    out = io.StringIO()
    quickstart(settings, Console(file=out, width=120))
    heads = [line for line in out.getvalue().splitlines() if line[1:4] == f"/{len(STAGES)} "]
    assert [line.split()[1] for line in heads] == NAMES
    return out.getvalue(), [line.split()[1] for line in heads if "(done before)" not in line]


def files(directory):
    """The content of every file that a stage made."""
    return {p: p.read_bytes() for p in directory.rglob("*") if p.is_file() and not p.name.startswith(".")}


def rows(path):
    return [json.loads(line) for line in path.open()]


def test_end_to_end_then_only_what_changed(corpus, tiny, tmp_path):
    settings = Quickstart(corpus, tmp_path / "run", vocab_size=400)
    printed, ran = run(settings)
    assert ran == NAMES
    for stage in STAGES:
        for name in stage.outputs:
            assert (settings.run_dir / name).exists(), name
    for name in ("this model", "byte unigram", "token unigram", "gzip -9", "xz -9e"):
        assert name in printed
    evaluation = json.loads((settings.run_dir / "evaluation.json").read_text())
    bits = {b["name"]: b["bits_per_byte"] for b in evaluation["baselines"]}
    assert 0 < evaluation["bits_per_byte"] < 8
    validated = [row["val/loss"] for row in rows(settings.run_dir / "metrics.jsonl") if "val/loss" in row]
    assert evaluation["loss"] == validated[-1]
    assert 1 < bits["xz -9e"] < bits["byte unigram"] < 6
    assert bits["token unigram"] < bits["byte unigram"]
    samples = rows(settings.run_dir / "samples.jsonl")
    assert samples[0]["step"] == 0
    assert samples[-1]["step"] == rows(settings.run_dir / "metrics.jsonl")[-1]["step"]
    assert {row["prompt"] for row in samples} == {row["prompt"] for row in rows(settings.run_dir / "generated.jsonl")}
    report = (settings.run_dir / "report.html").read_text()
    assert "is not there yet" not in report
    assert all(f"<td>{name}" in report for name in NAMES[:-1])

    before = {path: path.stat().st_mtime_ns for path in settings.run_dir.rglob("*")}
    printed, ran = run(settings)
    assert ran == []
    assert {path: path.stat().st_mtime_ns for path in settings.run_dir.rglob("*")} == before

    (settings.run_dir / "evaluation.json").unlink()
    assert run(settings)[1] == ["evaluate"]  # made anew as it was: what follows from it stays
    printed, ran = run(dataclasses.replace(settings, seed=1))
    assert ran == NAMES[NAMES.index("pretrain") :]
    assert "seed 0 -> 1" in printed
    trained = [row["step"] for row in rows(settings.run_dir / "metrics.jsonl") if "train/loss" in row]
    assert trained == [10, 20, 30, 40]


def test_full_goes_on_to_a_model_that_answers(corpus, tiny, tmp_path, monkeypatch):
    """Each stage for a few steps; the second time nothing is repeated, and what is next is said again."""
    demo = Full.demo.fget
    steps = {"minutes": None, "sft_steps": 40, "dpo_steps": 2, "grpo_steps": 2, "prompts_per_step": 2}
    monkeypatch.setattr(Full, "demo", property(lambda full: dataclasses.replace(demo(full), **steps)))
    settings = Quickstart(corpus, tmp_path / "run", vocab_size=400, full=True)
    assert demo(Job(settings).after).minutes == settings.minutes
    out = io.StringIO()
    quickstart(settings, Console(file=out, width=400))
    measured = json.loads((settings.run_dir / "full.json").read_text())
    found = {row["after"]: row for row in measured["rows"]}
    assert list(found) == ["pretraining", "sft", "dpo", "grpo", "int8"]
    evaluation = json.loads((settings.run_dir / "evaluation.json").read_text())
    assert found["pretraining"]["bits_per_byte"] == pytest.approx(evaluation["bits_per_byte"], rel=0.02)
    assert found["int8"]["bits_per_byte"] == pytest.approx(found["grpo"]["bits_per_byte"], rel=0.05)
    assert found["int8"]["mebibytes"] < 0.7 * found["grpo"]["mebibytes"]  # half of so small a model is its embedding
    page = (settings.run_dir / "report.html").read_text()
    assert 'id="full"' in page
    assert "Each verifier" in page
    for path in measured["reports"].values():
        assert (settings.run_dir / path).exists()
        assert f'href="{path}"' in page
    model = settings.run_dir / "align" / "grpo" / "export"
    assert LLM(model, quiet=True).chat([{"role": "user", "content": "47+68"}])[0].text is not None

    before = files(settings.run_dir)
    again = io.StringIO()
    quickstart(settings, Console(file=again, width=400))
    assert again.getvalue().count("(done before)") == 10
    assert files(settings.run_dir) == before
    for text in (out.getvalue(), again.getvalue()):
        commands = [line.split("  #")[0].strip() for line in text.partition("\nnext\n")[2].splitlines()]
        assert [command.split()[:2] for command in commands] == [["cs336", v] for v in ("chat", "serve", "plan")]
    shutil.rmtree(settings.run_dir / "int8")  # as if it had been stopped before it was whole
    quickstart(settings, Console(file=io.StringIO()))
    assert files(settings.run_dir).keys() == before.keys()


def test_full_begins_with_a_crawl_unless_there_is_a_corpus(corpus):
    with_crawl, without = (Job(Quickstart(text, full=True)).stages() for text in (None, corpus))
    assert [stage.name for stage in with_crawl] == ["curate", *(stage.name for stage in without)]
    assert [stage.name for stage in without] == [*NAMES[:-1], "align", "int8", "compare", NAMES[-1]]


def test_a_finished_model_survives_every_rerun(corpus, tiny, tmp_path, monkeypatch):
    """Touched files, and paths spelled another way: nothing is trained again, nothing is removed."""
    mine = tmp_path / "corpus"
    shutil.copytree(corpus, mine)
    run(Quickstart(mine, tmp_path / "run", vocab_size=400))
    before = files(tmp_path / "run")
    for hours in (1, 2, 3):
        os.utime(mine / "os.py", (3600 * hours, 3600 * hours))
        assert run(Quickstart(mine, tmp_path / "run", vocab_size=400))[1] == []
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    spelled = Quickstart(pathlib.Path("../elsewhere/../corpus"), pathlib.Path("../run"), vocab_size=400)
    assert run(spelled)[1] == []
    assert files(tmp_path / "run") == before
    model = tmp_path / "run" / "export" / "model.safetensors"
    models = [model.read_bytes()]
    for seed in (1, 2, 3):
        run(dataclasses.replace(spelled, seed=seed))
        kept = [path.read_bytes() for path in (tmp_path / "run" / "earlier").glob("*/export/model.safetensors")]
        assert sorted(kept) == sorted(models)
        models.append(model.read_bytes())


def test_killed_and_interrupted_runs_go_on(corpus, tmp_path):
    """Ctrl-C in step 50, then SIGKILL in step 95; the third time, from another directory, by other spellings of the
    paths, it ends, without repeating a stage or a step."""
    run_dir = tmp_path / "run"
    job = f"""
        import dataclasses, os, signal, sys
        import cs336.cli, cs336.quickstart as q
        from cs336.training import Trainer
        q.SHAPES = (q.Shape(**{dataclasses.asdict(TINY)}),)
        config = q.Job._train_config
        q.Job._train_config = lambda self: dataclasses.replace(config(self), budget="200steps")
        update, (step, number) = Trainer._update, map(int, os.environ["SIGNAL_IN_STEP"].split())
        def signalled(self):
            update(self)
            if self.step == step:
                signal.raise_signal(number)
        Trainer._update = signalled
        sys.exit(cs336.cli.main(["quickstart", "--vocab-size=400", *sys.argv[1:]]))
    """
    python = [sys.executable, "-c", textwrap.dedent(job)]
    command = [*python, "--corpus", str(corpus), "--run-dir", str(run_dir)]
    spelled = [*python, "--corpus", os.path.relpath(corpus, tmp_path / "elsewhere"), "--run-dir", "../elsewhere/../run"]

    def start(command, step, number, place=None):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "SIGNAL_IN_STEP": f"{step} {number:d}"}
        return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)

    stopped = start(command, 50, signal.SIGINT)
    assert stopped.returncode == 130, stopped.stdout + stopped.stderr
    assert "to continue, run the same command again" in stopped.stdout
    assert max(path.name for path in run_dir.glob("checkpoints/step_*")) == "step_00000050"
    record = json.loads((run_dir / "stages.json").read_text())
    assert list(record) == ["collect", "tokenizer", "tokenize", "pretrain"]
    assert "seconds" not in record["pretrain"]

    assert start(command, 95, signal.SIGKILL).returncode == -signal.SIGKILL
    assert rows(run_dir / "metrics.jsonl")[-1]["step"] == 90
    assert not (run_dir / "export").exists()

    place = tmp_path / "elsewhere"
    place.mkdir()
    for path in corpus.iterdir():
        path.touch()
    done = start(spelled, 0, 0, place)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("(done before)") == 3
    assert "continuing after step" in done.stdout
    trained = [row["step"] for row in rows(run_dir / "metrics.jsonl") if "train/loss" in row]
    assert trained == sorted(set(trained))
    assert json.loads((run_dir / "stages.json").read_text()).keys() == set(NAMES)


def test_refuses_what_it_would_spoil_or_cannot_use(corpus, tmp_path):
    theirs = tmp_path / "theirs"
    for name in ("corpus/text.txt", "corpus/train.jsonl", "config.toml"):
        (theirs / name).parent.mkdir(parents=True, exist_ok=True)
        (theirs / name).write_text("precious")
    with pytest.raises(ValueError, match=r"holds corpus/train\.jsonl, config\.toml, which this job did not make"):
        run(Quickstart(corpus, theirs))
    with pytest.raises(ValueError, match="is where this run writes the text"):
        run(Quickstart(theirs / "corpus", theirs))
    assert (theirs / "corpus/text.txt").read_text() == "precious"
    with (
        locked(tmp_path, LOCK),
        pytest.raises(RuntimeError, match="another process is at work"),
    ):
        run(Quickstart(corpus, tmp_path))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Job(Quickstart(tmp_path / "none", tmp_path / "run"))
    (tmp_path / "short.txt").write_text("how do you train the best model? " * 100)
    with pytest.raises(ValueError, match="3,300 bytes of text, and this needs at least 100,000"):
        run(Quickstart(tmp_path / "short.txt", tmp_path / "run"))
    assert not list((tmp_path / "run" / "corpus").iterdir())
    for wrong in ({"minutes": 0}, {"minutes": float("nan")}, {"max_megabytes": -1}):
        with pytest.raises(ValueError, match="more than zero"):
            Quickstart(**wrong)


def test_more_compute_takes_a_larger_model_and_stops_before_repeating_too_often(corpus, tmp_path, monkeypatch):
    job = Job(Quickstart(corpus, tmp_path / "run", vocab_size=400), Console(file=io.StringIO()))
    job.run_dir.mkdir()
    job.collect()
    job.tokenizer()
    job.tokenize()

    def config(peak, tokens):
        meta = dataclasses.replace(q.read_meta(job._tokens("train")), tokens=tokens)
        monkeypatch.setattr(q, "peak_flops", lambda device, dtype: peak)
        monkeypatch.setattr(q, "read_meta", lambda path: meta)
        return job._train_config()

    shapes = [config(peak, 10**9) for peak in (1e10, 2e12, 1e13, 5e13, 1e15)]
    sizes = [shape.model.num_parameters() for shape in shapes]
    assert sizes == sorted(set(sizes))
    assert all(shape.budget == "240s" and shape.model.vocab_size == 448 for shape in shapes)
    assert config(1e15, 10**7).model == shapes[-1].model
    assert config(1e15, 10**7).budget == f"{q.EPOCHS * 10**7}tok"
    assert config(1e15, 10**4).model == shapes[0].model  # little text teaches a large model nothing


def test_a_run_inside_its_corpus_is_no_part_of_it(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"line {i}\n" for i in range(20_000)))
    job = Job(Quickstart(tmp_path, tmp_path / "runs" / "quickstart"))
    job.run_dir.mkdir(parents=True)
    job.collect()
    collected = {side: job._text(side).read_bytes() for side in ("train", "val")}
    job.collect()
    assert {side: job._text(side).read_bytes() for side in ("train", "val")} == collected


def test_text_that_is_cut_off_is_read_to_the_limit(corpus, tmp_path):
    job = Job(Quickstart(corpus, tmp_path / "run", max_megabytes=0.12))
    job.run_dir.mkdir()
    job.collect()
    size = sum(len(row["text"]) for side in ("train", "val") for row in rows(job._text(side)))
    assert 120_000 <= size < 125_000


@pytest.mark.parametrize("kind", ["one line", "one document", "many documents"])
def test_every_corpus_leaves_enough_held_out(kind, tmp_path):
    words = [f"word {i * 7919 % 10_007}" for i in range(30_000)]
    path = tmp_path / ("text.jsonl" if kind == "many documents" else "text.txt")
    if kind == "many documents":
        path.write_text("".join(json.dumps({"text": " ".join(words[i : i + 60])}) + "\n" for i in range(0, 30_000, 60)))
    else:
        path.write_text((" " if kind == "one line" else "\n").join(words))
    job = Job(Quickstart(path, tmp_path / "run"))
    job.run_dir.mkdir()
    job.collect()
    train, val = ([row["text"] for row in rows(job._text(side))] for side in ("train", "val"))
    assert sum(map(len, val)) >= q.LEAST_HELD_OUT
    assert len(train) + len(val) == 500 if kind == "many documents" else len(train) + len(val) >= 200
    assert not set(train) & set(val)


def test_a_corpus_that_is_one_document_over_and_over_is_refused(tmp_path):
    (tmp_path / "same.jsonl").write_text((json.dumps({"text": "the same again and again " * 40}) + "\n") * 400)
    with pytest.raises(ValueError, match=r"cannot be split: 0 bytes of it would be held out.*give others"):
        run(Quickstart(tmp_path / "same.jsonl", tmp_path / "run"))
    assert not list((tmp_path / "run" / "corpus").iterdir())


def test_the_standard_library_is_text():
    documents = list(stdlib_documents())
    assert len(documents) > 100
    assert any('"""' in d and "def " in d for d in documents)
    assert any(d.startswith("The ") for d in documents)  # a topic of help()
    assert not any("\0" in d or not d.strip() for d in documents)


def test_a_link_to_nowhere_in_the_standard_library(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text("import os\n")
    (tmp_path / "sitecustomize.py").symlink_to(tmp_path / "none")
    monkeypatch.setattr("cs336.data.stdlib._root", lambda: tmp_path)
    assert next(stdlib_documents()) == "import os\n"
    assert len(list(stdlib_documents())) > 1


def test_a_zipped_or_absent_standard_library(tmp_path, monkeypatch):
    archive = tmp_path / "python.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("os.py", "import abc\n")
        file.writestr("encodings/cp437.py", "table\n")
        file.writestr("os.pyc", b"\0")
        file.writestr("bad.py", b"\xff\xfe")
    monkeypatch.setattr("cs336.data.stdlib._root", lambda: tmp_path / "none")
    monkeypatch.setattr(sys, "path", [str(archive)])
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert list(stdlib_documents()) == ["import abc\n"]


def test_the_standard_library_as_json_lines(tmp_path, monkeypatch, capsys):
    library, out = tmp_path / "library", tmp_path / "corpus.jsonl"
    library.mkdir()
    monkeypatch.setattr("cs336.data.stdlib._root", lambda: library)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    asked = ["data", "stdlib", str(out)]
    assert main(asked) == 2
    assert "holds no sources" in capsys.readouterr().err
    for name in ("a", "b", "c"):
        (library / f"{name}.py").write_text(f"{name} = 'é'\n".ljust(399, "#"))  # 400 bytes
    for megabytes, names in (("0", "abc"), ("0.0008", "ab"), ("0.00079", "a"), ("1e-9", "a")):
        assert main([*asked, "--megabytes", megabytes]) == 0
        assert f"wrote {len(names)} document" in capsys.readouterr().out
        texts = [json.loads(line)["text"] for line in out.read_text().splitlines()]
        assert texts == [(library / f"{name}.py").read_text() for name in names]
    for bad in ("-1", "nan", "inf"):
        assert main([*asked, "--megabytes", bad]) == 2
        assert f"megabytes must be finite and at least 0, got {bad}" in capsys.readouterr().err
