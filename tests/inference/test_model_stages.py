"""Steps of a data build that run a language model: what they keep, write and refuse, through the verb."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from cs336.cli import main
from cs336.data import Document
from cs336.data.build.worker import described, recipe_of
from cs336.data.recipe import Recipe
from cs336.data.step import Removed
from cs336.inference import LLM, SamplingParams, generate
from cs336.inference.stages import ModelPerplexity, ModelRecipe, Rewrite
from cs336.models import Transformer, TransformerConfig, save_pretrained
from cs336.tokenizer import Tokenizer
from cs336.utils.config import load, parse

TOKENIZER = Tokenizer({i: bytes([i]) for i in range(256)}, [], ["<|endoftext|>"])
CONFIG = TransformerConfig(257, 128, num_layers=1, d_model=32, num_heads=2, init_std=0.5)
PROMPT = "Again, {text} {plainly}:"
TEXTS = [f"{word} document of number {i}" for i, word in enumerate(["One", "Short", "River", "Letter", "Music"] * 4)]
RECIPE = """
output = "{output}"
keep_removed = true
[[sources]]
kind = "jsonl"
paths = ["documents/*.jsonl"]
[[steps]]
kind = "model_perplexity"
model = "{model}"
most = {most}
field = "ppl"
[[steps]]
kind = "rewrite"
model = "{model}"
prompt = "Again, {{text}} {{plainly}}:"
max_tokens = 24
max_prompt_tokens = 60
temperature = 0.7
"""


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    return Transformer(CONFIG).eval()


@pytest.fixture(scope="module")
def export(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("model") / "export"
    save_pretrained(model, directory, TOKENIZER)
    return directory


def perplexity(model, text):
    """By its definition, the beginning of the document before it."""
    ids = [256, *text.encode()]
    with torch.inference_mode():
        logits = model(torch.tensor([ids[:-1]]))[0].double().log_softmax(-1)
    return math.exp(-logits[torch.arange(len(ids) - 1), ids[1:]].mean())


@pytest.fixture(scope="module")
def built(model, export, tmp_path_factory):
    """(directory, bound of the perplexity) of a build by the verb with one worker."""
    directory = tmp_path_factory.mktemp("built")
    most = sorted(perplexity(model, text) for text in TEXTS)[15] * 1.0001
    (directory / "documents").mkdir()
    for part in range(4):
        rows = [{"id": f"d{i}", "text": text, "url": f"http://x/{i}"} for i, text in enumerate(TEXTS) if i % 4 == part]
        if part == 3:
            rows.append({"id": "long", "text": TEXTS[0] * 3})
            rows.append({"id": "marked", "text": "a <|endoftext|> b"})
        (directory / f"documents/{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "recipe.toml").write_text(RECIPE.format(output="out", model=export, most=most))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        patch.setenv("CS336_VARIANT", "ref")  # for the workers: as in this process, not Triton's interpreter
        assert main(["data", "build", "recipe.toml", "--workers", "1"]) == 0
    return directory, most


def rows(directory, folder):
    return [json.loads(line) for path in sorted((directory / "1-extract" / folder).iterdir()) for line in path.open()]


def outputs(directory):
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.parent.name in ("documents", "removed", "unread", "counts")
    }


def test_perplexity_is_that_of_its_definition_and_removes_by_it(built, model):
    directory, most = built
    of_id = {f"d{i}": perplexity(model, text) for i, text in enumerate(TEXTS)}
    kept = rows(directory / "out", "documents")
    assert {row["id"] for row in kept} == {name for name, value in of_id.items() if value <= most}
    assert all(math.isclose(row["metadata"]["ppl"], of_id[row["id"]], rel_tol=1e-4) for row in kept)
    high = {r["id"]: r["detail"] for r in rows(directory / "out", "removed") if r["stage"] == "model_perplexity"}
    assert {name for name in high if name in of_id} == {name for name, value in of_id.items() if value > most}
    assert all(high[n] == f"{of_id[n]:.1f} over {len(TEXTS[int(n[1:])])} tokens" for n in high if n in of_id)


def test_what_is_rewritten_is_what_the_model_writes_and_says_so(built, export):
    directory, _ = built
    step = Rewrite(export, PROMPT, max_tokens=24, temperature=0.7)
    llm = LLM(export, device="cpu", quiet=True, max_seqs=4)
    seeds = set()
    for row in rows(directory / "out", "documents"):
        number = int(row["id"][1:])
        params = step._params(TEXTS[number])
        seeds.add(params.seed)
        prompt = f"Again, {TEXTS[number]} {{plainly}}:"
        (wanted,) = llm.generate(prompt, params)
        assert row["text"] == wanted.text
        assert row["source"] == f"documents/{number % 4}.jsonl"
        assert row["metadata"]["url"] == f"http://x/{number}"
        assert row["metadata"]["rewritten"] == {
            "model": "export",
            "prompt_tokens": len(prompt),
            "tokens": len(wanted.token_ids),
            "finish_reason": wanted.finish_reason,
        }
    assert len(seeds) == 16


def test_greedy_is_that_of_generate(export, model):
    apply = Rewrite(export, PROMPT, max_tokens=12).build()
    (want,) = generate(model, TOKENIZER, "Again, hello {plainly}:", SamplingParams(temperature=0, max_tokens=12))
    found = apply(Document("hello", "a", "b", {"rewritten": "before", "url": "u"}))
    assert (found.text, found.id, found.source, found.metadata["url"]) == (want.text, "a", "b", "u")
    assert found.metadata["rewritten"]["tokens"] == 12


def test_documents_that_do_not_fit_or_hold_special_tokens_go_by_name(export):
    apply = Rewrite(export, "{text}", max_tokens=8, max_prompt_tokens=20).build()
    assert isinstance(apply(Document("x" * 20, "a", "b")), Document)
    assert apply(Document("x" * 21, "a", "b")) == Removed("too long to rewrite", "a prompt of 21 tokens, of at most 20")
    assert apply(Document("<|endoftext|>", "a", "b")).reason == "special token in text"
    apply = Rewrite(export, "{text}", max_tokens=100).build()  # here the context of 128 bounds it
    assert isinstance(apply(Document("x" * 28, "a", "b")), Document)
    assert apply(Document("x" * 29, "a", "b")).reason == "too long to rewrite"


def test_bounds_and_the_tokens_that_are_read(export, model):
    text = "hello, hello, hello, who is there?"
    value = perplexity(model, text[:10])
    document = Document(text, "a", "b")
    low = ModelPerplexity(export, least=value * 1.01, max_tokens=10).build()(document)
    assert low == Removed("model perplexity too low", f"{value:.1f} over 10 tokens")
    assert ModelPerplexity(export, least=value * 0.99, most=value * 1.01, max_tokens=10).build()(document) is document
    long = ModelPerplexity(export, most=1.0).build()(Document("<|endoftext|>" * 100, "a", "b"))
    assert long.detail.endswith("over 127 tokens")


def test_a_chat_template_writes_the_prompt_and_does_not_know_the_day(export, tmp_path, model):
    directory = shutil.copytree(export, tmp_path / "chat")
    (directory / "chat_template.jinja").write_text(
        "{{ strftime_now('%Y') }}|{{ messages[0].role }}|{{ messages[0].content }}|"
    )
    found = Rewrite(directory, "Say {text}", max_tokens=12).build()(Document("hello", "a", "b"))
    (want,) = generate(model, TOKENIZER, "2025|user|Say hello|", SamplingParams(temperature=0, max_tokens=12))
    assert found.text == want.text


KILLED = """
import os, signal
from cs336.cli import main
from cs336.data.build.supervisor import Supervisor
send, sent = Supervisor._send, []
def send_or_die(self, process, request):
    sent.append(send(self, process, request))
    if len(sent) == 3:  # the recipe, the first unit, and the second, which the worker is at now
        os.kill(os.getpid(), signal.SIGKILL)
    return sent[-1]
Supervisor._send = send_or_die
main(["data", "build", "recipe.toml", "--workers", "1"])
"""


def test_killed_and_begun_anew_with_more_workers_the_bytes_are_the_same(built, tmp_path, monkeypatch):
    directory, _ = built
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CS336_VARIANT", "ref")
    (tmp_path / "documents").symlink_to(directory / "documents")
    shutil.copy(directory / "recipe.toml", tmp_path)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    killed = subprocess.run([sys.executable, "-c", KILLED], env=environment)
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in (tmp_path / "out").glob("1-extract/counts/*.json")] == ["00000.json"]
    assert not (tmp_path / "out/build.json").exists()
    assert main(["data", "build", "recipe.toml", "--workers", "2"]) == 0
    assert outputs(tmp_path / "out") == outputs(directory / "out")


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
@pytest.mark.parametrize("kind", ["model_perplexity", "rewrite"])
@pytest.mark.parametrize("broken", ["absent", "empty", "no tokenizer"])
def test_a_directory_without_a_model_is_refused_at_the_start(
    tmp_path, monkeypatch, capsys, export, options, kind, broken
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    if broken == "empty":
        (tmp_path / "model").mkdir()
    elif broken == "no tokenizer":
        shutil.copytree(export, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer.json"))
    own = "most = 5.0" if kind == "model_perplexity" else 'prompt = "{text}"'
    (tmp_path / "recipe.toml").write_text(
        f'output = "out"\n[[sources]]\nkind = "jsonl"\npaths = ["a.jsonl"]\n'
        f'[[steps]]\nkind = "{kind}"\nmodel = "model"\n{own}\n'
    )
    assert main(["data", "build", "recipe.toml", *options]) == 2
    said = capsys.readouterr().err
    assert ("no tokenizer.json" if broken == "no tokenizer" else "model holds no model") in said
    assert not (tmp_path / "out").exists()


def test_settings_that_make_no_step_are_refused(export):
    with pytest.raises(ValueError, match=r"must hold \{text\} once"):
        Rewrite(export, "no place")
    with pytest.raises(ValueError, match="temperature"):
        Rewrite(export, "{text}", temperature=-1.0)
    with pytest.raises(ValueError, match="max_prompt_tokens"):
        Rewrite(export, "{text}", max_prompt_tokens=0)
    with pytest.raises(ValueError, match="no room for a document in the context of 128"):
        Rewrite(export, "{text}", max_tokens=128).check()
    with pytest.raises(ValueError, match="unknown"):
        Rewrite(export, "{text}", max_tokens=8, device="abacus").check()
    with pytest.raises(ValueError, match="changes nothing"):
        ModelPerplexity(export)
    with pytest.raises(ValueError, match="least <= most"):
        ModelPerplexity(export, 2.0, 1.0)
    with pytest.raises(ValueError, match="max_tokens"):
        ModelPerplexity(export, 2.0, max_tokens=0)


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ('kind = "rewrit"', "did you mean 'rewrite'"),
        ('kind = "gopher_qualty"', "did you mean 'gopher_quality'"),
        ('kind = "rewrite"\nmodel = "m"\nprompt = "{text}"\nmax_token = 3', "did you mean steps.0.max_tokens?"),
        ('kind = "length"\nmin_char = 3', "did you mean steps.0.min_chars?"),
    ],
)
def test_unknown_kinds_and_keys_give_the_nearest_name(tmp_path, capsys, step, said):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'output = "out"\n[[sources]]\nkind = "jsonl"\npaths = ["a.jsonl"]\n[[steps]]\n{step}\n')
    assert main(["data", "build", str(recipe)]) == 2
    assert said in capsys.readouterr().err


def test_a_worker_is_told_the_class_of_the_recipe(built):
    directory, _ = built
    recipe = load(ModelRecipe, directory / "recipe.toml")
    assert recipe_of(json.loads(json.dumps(described(recipe)))) == recipe
    with pytest.raises(ValueError, match="must be"):
        load(Recipe, directory / "recipe.toml")

    class Local(Recipe):
        pass

    table = {"output": "out", "sources": [{"kind": "jsonl", "paths": ["a.jsonl"]}]}
    with pytest.raises(ImportError, match=r"cannot import the recipe's class .*Local"):
        recipe_of(described(parse(Local, table)))
