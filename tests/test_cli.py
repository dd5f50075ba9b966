"""The command line, mostly in this process: what a newcomer types, and what comes back."""

import contextlib
import gzip
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
import textwrap

import pytest

from cs336.cli import main
from cs336.cli.program import TREE, Group, verb_paths

README = pathlib.Path(__file__).parents[1] / "README.md"
VERBS, TOKENIZER_VERBS, DATA_VERBS = (
    {name: found for name, found in verbs.items() if not isinstance(found, Group)}
    for verbs in (TREE, TREE["tokenizer"].verbs, TREE["data"].verbs)
)
TEXT = "How do you train the best model?\r\n\tWith a fixed set of resources — naïve, 日本語.\n" * 40


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT.encode())
    return path


@pytest.fixture
def tokenizer(tmp_path, text_file):
    path = tmp_path / "tokenizer.json"
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["tokenizer", "train", str(text_file), "--vocab-size", "300", "--output", str(path)]) == 0
    assert f"{path}: 300 tokens" in out.getvalue()
    return str(path)


def last_line(arguments, capsys):
    """Of stderr, of a user's error that comes after some output."""
    assert main(arguments) == 2
    return capsys.readouterr().err.splitlines()[-1]


def fails(arguments, capsys):
    """The one line on stderr of a user's error."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("cs336: ")
    assert err.count("\n") == 1
    return err


def help_of(arguments, capsys):
    with contextlib.suppress(SystemExit):  # of the option parser
        main([*arguments, "--help"])
    return capsys.readouterr().out


def test_help_waits_for_nothing_heavy():
    code = """
        import sys
        from cs336.cli import main
        try:
            main(["--help"])
        except SystemExit as stop:
            assert stop.code == 0
        heavy = {"torch", "numpy", "jinja2", "cs336.tokenizer", "cs336.report"} & set(sys.modules)
        assert not heavy, heavy
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    for verb in [*VERBS, "tokenizer"]:
        assert f" {verb} " in run.stdout


@pytest.mark.parametrize("verb", [v for v in VERBS if v != "bench"])
def test_help_of_each_verb(verb, capsys):
    shown = help_of([verb], capsys)
    assert " ".join(VERBS[verb].__doc__.split()[:8]) in " ".join(shown.split())
    assert "Args:" not in shown
    assert "(default: )" not in shown


@pytest.mark.parametrize("verb", TOKENIZER_VERBS)
def test_help_of_each_tokenizer_verb(verb, capsys):
    shown = help_of(["tokenizer", verb], capsys)
    assert TOKENIZER_VERBS[verb].__doc__.split("\n")[0] in " ".join(shown.split())


@pytest.mark.parametrize("verb", DATA_VERBS)
def test_help_of_each_data_verb(verb, capsys):
    shown = help_of(["data", verb], capsys)
    assert DATA_VERBS[verb].__doc__.split("\n")[0] in " ".join(shown.split())


def test_readme_names_every_verb():
    named = README.read_text()
    for verb in [*VERBS, "tokenizer train"]:
        assert f"`cs336 {verb}" in named


def test_version_as_a_module():
    run = subprocess.run([sys.executable, "-m", "cs336", "--version"], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("cs336 ")


def test_threads_do_not_spin_for_long():
    """libgomp says what it read when torch loaded."""

    def shown(**environment):
        inherited = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
        environment |= inherited | {"OMP_DISPLAY_ENV": "verbose"}
        command = [sys.executable, "-m", "cs336", "env"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stderr

    said = shown()
    if "GOMP" not in said:
        pytest.skip("this torch has another OpenMP")
    assert "GOMP_SPINCOUNT = '1000'" in said
    assert "GOMP_SPINCOUNT = '1000'" not in shown(OMP_WAIT_POLICY="active")


def test_no_verb_shows_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 0
    assert "quickstart" in capsys.readouterr().out


def test_unknown_verb_and_option(capsys):
    for arguments in (["generate"], ["train", "--prompt"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
    capsys.readouterr()
    assert "name a run directory" in fails(["report"], capsys)
    assert "did you mean optimizer.lr?" in fails(["train", "--optimizer.lrr", "1"], capsys)


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("scaling submit --tokens 1", "`cs336 scaling submit`: did you mean `cs336 scaling api submit`?"),
        ("submit", "`cs336 submit`: did you mean `cs336 scaling api submit`?"),
        ("data train", "`cs336 data train`: did you mean `cs336 data classifier train`?"),
        ("model report runs/mine", "`cs336 model report`: did you mean `cs336 report`?"),
        ("trian --config x.toml", "`cs336 trian`: did you mean `cs336 train`?"),
        ("scaling fti points.csv --law envelope", "`cs336 scaling fti`: did you mean `cs336 scaling fit`?"),
        ("tokenizer trian", "`cs336 tokenizer trian`: did you mean `cs336 tokenizer train`?"),
        ("data classifier aply --help", "`cs336 data classifier aply`: did you mean `cs336 data classifier apply`?"),
        ("model runs/mine", "`cs336 model runs/mine`: `cs336 model` has info"),
        ("demo", "`cs336 demo`: did you mean `cs336 data demo` or `cs336 align demo`?"),
    ],
)
def test_a_verb_that_there_is_not(asked, meant, capsys):
    assert fails(asked.split(), capsys) == f"cs336: there is no {meant}\n"


def test_a_group_without_a_verb(capsys):
    assert fails(["data"], capsys) == "cs336: `cs336 data` has build, demo, stdlib, classifier: name one, or --help\n"
    assert "`cs336 data classifier` has train, apply" in fails(["data", "classifier"], capsys)
    assert "build" in help_of(["data"], capsys)


def test_nobody_sees_what_the_option_parser_calls_things(data, capsys):
    """Values that a configuration refuses are named by its own keys."""
    arguments = train_arguments(data)
    message = fails(["train", *arguments, "--model.num-heads", "3", "--seed", "1"], capsys)
    assert "d_model 32 is not a multiple of num_heads 3" in message
    assert "dummy" not in message
    assert "seed" in fails(["train", *arguments, "--seed", "x"], capsys)


@pytest.mark.parametrize("verb", list(verb_paths()))
def test_empty_defaults_and_none_are_not_shown(verb, capsys):
    """None is no value that an option takes: left out it is what is meant."""
    shown = help_of(verb, capsys)
    assert "(default: )" not in shown
    assert "{None}" not in shown
    assert "│ STR " not in shown  # what stands at a place has a name


# ---- tokenizer ----


def test_round_trip_through_numbers(tokenizer, text_file, tmp_path, capfdbinary):
    assert main(["tokenizer", "encode", tokenizer, str(text_file)]) == 0
    numbers = tmp_path / "ids"
    numbers.write_bytes(capfdbinary.readouterr().out)
    assert len(numbers.read_text().split()) < len(TEXT)
    assert main(["tokenizer", "decode", tokenizer, str(numbers)]) == 0
    assert capfdbinary.readouterr().out == TEXT.encode()


def test_round_trip_through_pipes(tokenizer):
    cs336 = f"{sys.executable} -m cs336 tokenizer"
    pipe = f"{cs336} encode {tokenizer} | {cs336} decode {tokenizer}"
    run = subprocess.run(["bash", "-o", "pipefail", "-c", pipe], input=TEXT.encode(), capture_output=True, check=True)
    assert run.stdout == TEXT.encode()


def test_reader_that_stops_early_is_no_error(tokenizer):
    command = f"yes word | head -c 3000000 | {sys.executable} -m cs336 tokenizer encode {tokenizer} | head -n 1"
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert run.stdout
    assert run.stderr == ""


def test_training_from_standard_input(tokenizer, tmp_path):
    other = tmp_path / "other.json"
    command = [sys.executable, "-m", "cs336", "tokenizer", "train", "--vocab-size", "300", "--output", str(other)]
    subprocess.run(command, input=TEXT.encode(), check=True)
    assert other.read_bytes() == pathlib.Path(tokenizer).read_bytes()


def test_special_tokens(tokenizer, capsys, monkeypatch):
    def encode(*options):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a<|endoftext|>")))
        assert main(["tokenizer", "encode", tokenizer, *options]) == 0
        return capsys.readouterr().out.split()

    assert encode("--special")[-1] == "299"
    assert "299" not in encode()


def test_shards(tokenizer, text_file, tmp_path, capfdbinary):
    shards = str(tmp_path / "tokens")
    assert main(["tokenizer", "encode", tokenizer, str(text_file), "--shards", shards, "--val-fraction", "0"]) == 0
    assert b"tokens of 1 documents" in capfdbinary.readouterr().out
    assert main(["tokenizer", "decode", tokenizer, f"{shards}/00000.bin"]) == 0
    assert capfdbinary.readouterr().out == TEXT.encode() + b"<|endoftext|>"
    documents = tmp_path / "documents.jsonl"
    documents.write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(100)))
    assert main(["tokenizer", "encode", tokenizer, str(documents), "--shards", shards, "--val-fraction", "0.3"]) == 0
    out = capfdbinary.readouterr().out
    assert b"tokens/train" in out
    assert b"tokens/val" in out
    assert out.count(b" pieces of 100 documents, ") == 2


def test_encode_of_packed_text_and_of_documents(tokenizer, text_file, tmp_path, capsys):
    packed, documents, empty = (tmp_path / name for name in ("text.txt.gz", "documents.jsonl", "empty.txt"))
    packed.write_bytes(gzip.compress(text_file.read_bytes()))
    documents.write_text('{"text": "one"}\n{"text": "two"}\n')
    empty.touch()
    assert main(["tokenizer", "encode", tokenizer, str(text_file)]) == 0
    plain = capsys.readouterr().out
    assert main(["tokenizer", "encode", tokenizer, str(packed)]) == 0
    assert capsys.readouterr().out == plain
    assert "give --shards" in fails(["tokenizer", "encode", tokenizer, str(documents)], capsys)
    assert main(["tokenizer", "compare", tokenizer, "--text", str(documents)]) == 0
    assert "1.000" in capsys.readouterr().out  # bytes per token of six bytes, not of JSON
    (tmp_path / "cut.txt.gz").write_bytes(packed.read_bytes()[:20])
    (tmp_path / "packed.7z").write_bytes(b"7z\xbc\xaf\x27\x1c\0")
    for verb in (["encode", tokenizer], ["decode", tokenizer], ["compare", tokenizer, "--text"]):
        assert "cut.txt.gz is damaged" in last_line(["tokenizer", *verb, str(tmp_path / "cut.txt.gz")], capsys)
    assert "packed.7z is binary" in fails(["tokenizer", "train", str(tmp_path / "packed.7z")], capsys)
    assert "No such file" in fails(["tokenizer", "encode", tokenizer, str(tmp_path / "none.jsonl")], capsys)
    output = str(tmp_path / "none.json")
    assert main(["tokenizer", "train", str(empty), "--output", output]) == 2
    assert "nothing to merge" in capsys.readouterr().err
    assert not pathlib.Path(output).exists()


def test_tokenizers_of_others(tokenizer, tmp_path, capsys):
    document = json.loads(pathlib.Path(tokenizer).read_text())
    del document["model"]["cs336"]
    other = tmp_path / "other.json"
    other.write_text(json.dumps(document))
    assert main(["tokenizer", "inspect", str(other), "--text", "model"]) == 0
    assert "5 bytes" in capsys.readouterr().out
    (tmp_path / "empty.tiktoken").touch()
    ranks = ["tokenizer", "convert", str(tmp_path / "empty.tiktoken"), str(tmp_path / "x.json"), "--pattern", "gpt2"]
    assert "it is empty" in fails(ranks, capsys)


def test_inspect(tokenizer, capsys):
    assert main(["tokenizer", "inspect", tokenizer]) == 0
    out = capsys.readouterr().out
    assert "300" in out
    assert "<|endoftext|>" in out


def test_inspect_a_text(tokenizer, capsys, monkeypatch):
    def shown(**environment):
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            assert main(["tokenizer", "inspect", tokenizer, "--text", "model?\n<|endoftext|>"]) == 0
        return capsys.readouterr().out

    plain = shown().splitlines()
    assert [line.split()[0] for line in plain[-3:]] == ["10", "299", str(len(plain) - 1)]  # newline, special, count
    assert plain[-1].split()[1:] == ["tokens", "20", "bytes"]
    coloured = shown(FORCE_COLOR="1", TERM="xterm-256color")
    assert "\x1b[" in coloured
    assert "\\n" not in coloured
    assert f"{len(plain) - 1} tokens" in coloured
    assert "\x1b[" not in shown(FORCE_COLOR="1", TERM="xterm-256color", NO_COLOR="1")


def test_convert_and_compare(tokenizer, text_file, tmp_path, capsys):
    ranks, back, chart = (str(tmp_path / name) for name in ("ranks.tiktoken", "back.json", "chart.png"))
    assert main(["tokenizer", "convert", tokenizer, ranks]) == 0
    assert "tell its readers: the special token <|endoftext|> = 299" in capsys.readouterr().out
    assert "give its pattern" in fails(["tokenizer", "convert", ranks, back], capsys)
    assert "give its pattern" in fails(["tokenizer", "compare", ranks, "--text", str(text_file)], capsys)
    assert "no tokenizer to compare" in fails(["tokenizer", "compare", "--text", str(text_file)], capsys)
    told = ["--pattern", "gpt2", "--special-tokens", "<|endoftext|>", "299"]
    assert main(["tokenizer", "convert", ranks, back, *told]) == 0
    assert main(["tokenizer", "compare", tokenizer, ranks, "--text", str(text_file), "--pattern", "gpt2"]) == 0
    assert main(["tokenizer", "compare", tokenizer, back, "--text", str(text_file), "--plot", chart]) == 0
    first, second = (line.split() for line in capsys.readouterr().out.splitlines()[-3:-1])
    wrong = ["tokenizer", "compare", tokenizer, "--text", str(tmp_path / "none"), "--plot", "chart.jpeg"]
    assert "a plot is" in fails(wrong, capsys)  # before the text is read
    assert first[:3] == second[:3] == ["300", first[1], f"{len(TEXT.encode()) / int(first[1].replace(',', '')):.3f}"]
    assert [first[-1], second[-1]] == [tokenizer, back]
    assert pathlib.Path(chart).stat().st_size > 0


def test_errors_of_tokenizer_verbs(tokenizer, text_file, tmp_path, capsys):
    assert "No such file" in fails(["tokenizer", "inspect", str(tmp_path / "none.json")], capsys)
    assert "not" in fails(["tokenizer", "inspect", str(text_file)], capsys)
    assert "line 1 of the token ids" in fails(["tokenizer", "decode", tokenizer, str(text_file)], capsys)
    assert "--shards needs files" in fails(["tokenizer", "encode", tokenizer, "--shards", str(tmp_path / "s")], capsys)
    assert "too small" in fails(["tokenizer", "train", str(text_file), "--vocab-size", "3"], capsys)
    assert "before the options" in fails(["tokenizer", "train", "--special-tokens", "<e>", str(text_file)], capsys)


# ---- train, generate, report ----

TRAIN = {
    "model.vocab_size": 300,
    "model.context_length": 16,
    "model.num_layers": 1,
    "model.d_model": 32,
    "model.num_heads": 2,
    "batch_size": 4,
    "budget": "6steps",
    "eval_tokens": 32,
}


def train_arguments(directory):
    data = {"run_dir": directory / "run", "data.train": directory / "tokens", "data.val": directory / "tokens"}
    return [str(word) for key, value in (data | TRAIN).items() for word in (f"--{key}", value)]


@pytest.fixture
def data(tmp_path, tokenizer, text_file, capsys):
    shards = str(tmp_path / "tokens")
    assert main(["tokenizer", "encode", tokenizer, str(text_file), "--shards", shards, "--val-fraction", "0"]) == 0
    capsys.readouterr()
    return tmp_path


def test_train_then_generate_then_report(data, tokenizer, capsys):
    run = data / "run"
    assert main(["train", *train_arguments(data), "--tokenizer", tokenizer, "--prompt", "How do"]) == 0
    out = capsys.readouterr().out
    assert "finished 6 steps" in out
    assert f"report: {run}/report.html" in out
    report = run.joinpath("report.html").read_text()
    assert "How do" in report
    assert "vocab size" in report
    generate = ["--prompt", "How ", "--max-tokens", "5", "--seed", "1"]
    shown = []
    for model in (run, run / "export", run / "checkpoints" / "step_00000006"):
        assert main(["generate", str(model), *generate]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0].startswith("How ")
    assert len(set(shown)) == 1
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{run}/report.html\n"
    assert main(["train", *train_arguments(data), "--budget", "8steps"]) == 0  # goes on, with the tokenizer it has
    assert "continuing after step 6" in capsys.readouterr().out
    assert [json.loads(line)["step"] for line in run.joinpath("samples.jsonl").open()] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_run_that_failed_has_a_report_that_says_why(data, tokenizer, capsys):
    arguments = [*train_arguments(data), "--tokenizer", tokenizer, "--optimizer.lr", "1e30", "--budget", "20steps"]
    assert main(["train", *arguments]) == 2
    out, err = capsys.readouterr()
    assert "report.html" in out
    assert "loss" in err
    report = (data / "run" / "report.html").read_text()
    assert "<b>Failed at step " in report
    assert "first that is not finite" in report


def test_generate_takes_the_model_of_most_steps(data, tokenizer, capsys):
    arguments = [*train_arguments(data), "--tokenizer", tokenizer, "--checkpoint-interval", "2"]
    assert main(["train", *arguments]) == 0
    from cs336.inference.load import find_model

    checkpoint = data / "run" / "checkpoints" / "step_00000006"
    newer = checkpoint.joinpath("state.json").stat().st_mtime + 100
    os.utime(checkpoint / "state.json", (newer, newer))
    assert find_model(data / "run") == data / "run" / "export"
    later = shutil.copytree(checkpoint, checkpoint.with_name("step_00000008"))  # as if it had gone on since the export
    assert find_model(data / "run") == later
    capsys.readouterr()
    assert main(["generate", str(data / "run"), "--prompt", "How", "--max-tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("How")


def test_settings_file_and_overrides(data, capsys):
    assert main(["train", *train_arguments(data), "--print-config"]) == 0
    config = data / "config.toml"
    config.write_text(capsys.readouterr().out)
    assert not (data / "run").exists()
    assert main(["train", "--config", str(config), "--optimizer.lr", "0.25", "--print-config"]) == 0
    changed = capsys.readouterr().out
    assert changed != config.read_text()
    assert changed.replace("lr = 0.25", "lr = 0.001") == config.read_text()
    config.write_text(config.read_text().replace("weight_decay", "weight_dekay"))
    assert "did you mean optimizer.weight_decay?" in fails(["train", f"--config={config}"], capsys)


def test_errors_of_train_and_generate(data, tokenizer, capsys):
    arguments = train_arguments(data)
    assert "batch_size must be at least 1" in fails(["train", *arguments, "--batch-size", "0"], capsys)
    assert "does not exist" in fails(["train", *arguments, "--data.train", str(data / "none")], capsys)
    assert "needs a vocabulary of" in fails(["train", *arguments, "--model.vocab-size", "99"], capsys)
    assert not (data / "run").exists()
    assert "holds no model" in fails(["generate", str(data)], capsys)
    assert "temperature must be" in fails(["generate", str(data), "--temperature", "-1"], capsys)
    assert "not a run directory" in fails(["report", str(data)], capsys)
    assert "none does not exist" in fails(["quickstart", "--corpus", str(data / "none")], capsys)
    assert "device 'gpu' is unknown" in fails(["quickstart", "--device", "gpu"], capsys)


def test_env(capsys):
    assert main(["env"]) == 0
    assert "torch" in capsys.readouterr().out


def test_bench_passes_its_arguments_on(monkeypatch, capsys):
    code = "import sys; sys.exit(sys.argv[1:] != ['ops', '--quick'] and 9)"
    real = subprocess.run
    monkeypatch.setattr(
        "cs336.cli.env.subprocess.run", lambda command, **kw: real([sys.executable, "-c", code, *command[3:]], **kw)
    )
    assert main(["bench", "ops", "--quick"]) == 0
    assert main(["bench", "ops"]) == 9
    monkeypatch.setattr("cs336.cli.env.ROOT", pathlib.Path("/nowhere"))
    assert "run this in a clone" in fails(["bench", "ops"], capsys)


def test_the_end_of_a_long_prompt_is_read_and_that_is_said(data, tokenizer, capsys):
    assert main(["train", *train_arguments(data), "--tokenizer", tokenizer]) == 0
    for many in ("1", "2"):
        capsys.readouterr()
        generate = ["generate", str(data / "run"), "--prompt", TEXT, "--max-tokens", "3", "--num-samples", many]
        assert main([*generate, "--dtype", "bfloat16"]) == 0
        out, err = capsys.readouterr()
        assert out.count(TEXT) == int(many)
        assert "not read" in err
        assert err.count("\n") == 1


def test_a_warning_has_a_line_of_its_own(data, tokenizer, capsys, monkeypatch):
    """Also where it comes at the end of a text that is written piece by piece."""
    assert main(["train", *train_arguments(data), "--tokenizer", tokenizer]) == 0
    capsys.readouterr()
    monkeypatch.setattr(sys, "stderr", sys.stdout)
    assert main(["generate", str(data / "run"), "--max-tokens", "1000", "--ignore-eos", "--seed", "1"]) == 0
    assert "\ncs336: the text ends where the model's context of" in capsys.readouterr().out


def test_samples_of_a_seed(data, tokenizer, capsys):
    """Several are those of the seeds one by one."""
    assert main(["train", *train_arguments(data), "--tokenizer", tokenizer]) == 0

    def texts(seed, many):
        capsys.readouterr()
        options = ["--prompt", "How ", "--max-tokens", "4", "--seed", str(seed), "--num-samples", str(many)]
        assert main(["generate", str(data / "run"), *options]) == 0
        return capsys.readouterr().out

    assert texts(3, 2) == texts(3, 1) + "\n" + texts(4, 1)


def test_generate_with_a_draft(data, tokenizer, capsys):
    """Its text is the model's own; with several samples too."""
    assert main(["train", *train_arguments(data), "--tokenizer", tokenizer]) == 0
    run, small = str(data / "run"), str(data / "small")
    assert main(["train", "--config", f"{run}/config.toml", "--run-dir", small, "--model.d-model", "16"]) == 0

    def text(*options):
        capsys.readouterr()
        assert main(["generate", run, "--prompt", "How ", "--max-tokens", "6", "--temperature", "0", *options]) == 0
        return capsys.readouterr()

    want = text()
    assert text("--draft", small) == want
    assert text("--draft", small, "--num-samples", "2") == (f"{want.out}\n{want.out}", "")
    assert "n must be" in fails(["generate", run, "--draft", small, "--num-samples", "0"], capsys)
    assert "leaves no room" in fails(["generate", run, "--draft", small, "--prompt", TEXT], capsys)


def test_compare_hf(data, tokenizer, text_file, capsys):
    pytest.importorskip("transformers")
    assert main(["train", *train_arguments(data), "--tokenizer", tokenizer]) == 0
    capsys.readouterr()
    assert main(["compare-hf", str(data / "run"), "--text", str(text_file), "--new-tokens", "4"]) == 0
    out = capsys.readouterr().out
    assert "the same ids from both tokenizers" in out
    assert "worst difference" in out
    assert "4 of 4 greedy tokens are the same" in out or "apart" in out


def test_a_warning_is_one_line(text_file, tmp_path, capsys):
    command = ["tokenizer", "train", str(text_file), "--vocab-size", "9000", "--output", str(tmp_path / "t.json")]
    assert main(command) == 0
    err = capsys.readouterr().err
    assert err.startswith("cs336: no pair is left to merge")
    assert err.count("\n") == 1


def test_text_in_another_field_and_zstandard(tokenizer, tmp_path, capsys):
    zstandard = pytest.importorskip("zstandard")
    lines = "".join(json.dumps({"content": f"document {i} of many"}) + "\n" for i in range(300))
    path = tmp_path / "documents.jsonl.zst"
    path.write_bytes(zstandard.compress(lines.encode()))
    encode = ["tokenizer", "encode", tokenizer, str(path), "--shards", str(tmp_path / "tokens")]
    assert "it has 'content': name one" in last_line(encode, capsys)
    assert main([*encode, "--text-field", "content"]) == 0
    assert "tokens/val" in capsys.readouterr().out
    other = ["--output", str(tmp_path / "other.json"), "--vocab-size", "270", "--text-field", "content"]
    assert main(["tokenizer", "train", str(path), *other]) == 0
    assert main(["tokenizer", "compare", tokenizer, "--text", str(path), "--text-field", "content"]) == 0


def test_six_books_become_shards(tokenizer, tmp_path, capsys):
    (tmp_path / "books").mkdir()
    for b in range(6):
        (tmp_path / f"books/{b}.txt").write_text("".join(f"book {b}, line {i}\n" for i in range(500)))
    assert main(["tokenizer", "encode", tokenizer, str(tmp_path / "books"), "--shards", str(tmp_path / "tokens")]) == 0
    train, val = capsys.readouterr().out.splitlines()
    assert "tokens/train" in train
    assert "tokens/val" in val


def test_evaluate(data, tokenizer, text_file, capsys):
    run = data / "run"
    assert main(["train", *train_arguments(data), "--tokenizer", tokenizer]) == 0
    capsys.readouterr()
    trained = json.loads((run / "evaluation.json").read_text())
    assert {b["name"] for b in trained["baselines"]} == {"byte unigram", "token unigram", "gzip -9", "xz -9e"}
    report = (run / "report.html").read_text()
    assert "not evaluated yet" not in report.lower()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    assert trained["loss"] == [row["val/loss"] for row in rows if "val/loss" in row][-1]
    assert main(["evaluate", str(run)]) == 0
    out = capsys.readouterr().out
    own = json.loads((run / "evaluation.json").read_text())
    assert f"loss {own['loss']:.4f}" in out
    assert own["text"] == ""
    assert main(["evaluate", str(run / "export"), "--text", str(text_file)]) == 0
    other = json.loads((run / "evaluation.json").read_text())
    assert other["text"] == str(text_file)
    assert other["loss"] == pytest.approx(own["loss"])  # the same text
    (older,) = list((run / "checkpoints").glob("step_*"))[:1]
    step = int(older.name.removeprefix("step_"))
    named = older.rename(run / "checkpoints" / "kept")
    assert main(["evaluate", str(named), "--text", str(text_file), "--tokenizer", tokenizer]) == 0
    assert json.loads((named / "evaluation.json").read_text())["step"] == step
    assert json.loads((run / "evaluation.json").read_text()) == other  # of the run's newest model
    capsys.readouterr()
    assert "give text to measure it on" in fails(["evaluate", str(bare_export(run, data))], capsys)


def bare_export(run, data):
    """An export without its run."""
    return shutil.copytree(run / "export", data / "elsewhere")


def test_the_tokenizer_of_another_run_s_data_is_found(data, tokenizer, capsys):
    """README: train on a run's tokens with its configuration, then generate with the new run."""
    first = data / "first"
    assert main(["train", *train_arguments(data), "--run-dir", str(first), "--tokenizer", tokenizer]) == 0
    assert main(["train", "--config", str(first / "config.toml"), "--run-dir", str(data / "mine")]) == 0
    capsys.readouterr()
    assert main(["generate", str(data / "mine"), "--prompt", "How", "--max-tokens", "3", "--num-samples", "2"]) == 0
    assert capsys.readouterr().out.count("How") == 2
