"""Embeddings by a model: means of its last hidden states, and documents of one meaning as a stage of a build."""

import json

import numpy as np
import pytest
import torch

from cs336.cli import main
from cs336.data import Document, semantic_duplicates
from cs336.data.build.dedup import run_dedup
from cs336.data.build.job import Build
from cs336.data.build.store import Store, write_index
from cs336.data.build.unit import line_of
from cs336.inference import embed
from cs336.inference.embed import BATCH_TEXTS, Semantic
from cs336.inference.stages import ModelRecipe
from cs336.models import Transformer, TransformerConfig, save_pretrained
from cs336.tokenizer import Tokenizer
from cs336.utils.config import load, parse
from cs336.utils.contents import Contents

TOKENIZER = Tokenizer({i: bytes([i]) for i in range(256)}, [], ["<|endoftext|>"])
CONFIG = TransformerConfig(257, 64, num_layers=1, d_model=32, num_heads=2, init_std=0.5)
TEXTS = ["One document of some length", "Two", "A third document, which is longer than the others are", "Two"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    return Transformer(CONFIG).eval()


@pytest.fixture(scope="module")
def export(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("model") / "export"
    save_pretrained(model, directory, TOKENIZER)
    return directory


def alone(model, text, most=64):
    with torch.inference_mode():
        return model.features(torch.tensor([list(text.encode()[:most])]))[0].mean(0).numpy()


def test_is_the_mean_of_the_last_hidden_states_of_the_text_alone(model, export):
    texts = [*TEXTS, "x" * 200, *(f"{i} of more than a batch" * (i % 3 + 1) for i in range(BATCH_TEXTS))]
    rows_ND = embed(export, texts, device="cpu")
    assert rows_ND.shape == (len(texts), 32)
    for row_D, text in zip(rows_ND, texts, strict=True):
        np.testing.assert_allclose(row_D, alone(model, text), atol=1e-4)
    np.testing.assert_allclose(embed(export, ["abcdef"], 3, "cpu")[0], alone(model, "abc"), atol=1e-4)


def test_edges(export):
    assert embed(export, [], device="cpu").shape == (0, 32)
    assert not embed(export, [""], device="cpu").any()
    assert embed(export, ["", "a"], device="cpu")[1].any()
    with pytest.raises(TypeError, match=r"give \[text\]"):
        embed(export, "a text")
    with pytest.raises(FileNotFoundError):
        embed(export / "nothing", ["a"])


def test_equal_texts_mean_the_same(export):
    assert semantic_duplicates(embed(export, TEXTS, device="cpu"), 0.9999, 1, device="cpu")[3] == 1


RECIPE = """
output = "out"
[[sources]]
kind = "jsonl"
paths = ["a.jsonl"]
[[dedup]]
kind = "semantic"
model = "{model}"
threshold = 0.9999
num_clusters = 1
"""


def staged(directory, documents, config):
    """(ids of what a stage leaves, what it removed) of documents."""
    (directory / "1-extract/documents").mkdir(parents=True)
    (directory / "1-extract/documents/00000.jsonl").write_bytes(b"".join(map(line_of, documents)))
    seen = Contents(directory / "seen.json")
    write_index(directory / "1-extract", ["00000.jsonl"], {}, seen)
    run_dedup(config, directory / "1-extract", directory / "2-semantic", keep_removed=False, seed=0, seen=seen)
    removed = [json.loads(line) for line in (directory / "2-semantic/removed/00000.jsonl").open()]
    return [document.id for document in Store(directory / "2-semantic")], removed


def test_as_a_stage(export, tmp_path):
    (tmp_path / "recipe.toml").write_text(RECIPE.format(model=export))
    recipe = load(ModelRecipe, tmp_path / "recipe.toml")
    documents = [Document(text, f"d{i}", "a.jsonl", {}) for i, text in enumerate(TEXTS)]
    left, (removed,) = staged(tmp_path, documents, recipe.dedup[0])
    assert left == ["d0", "d1", "d2"]
    assert (removed["reason"], removed["detail"]) == ("semantic duplicate", "means the same as d1")
    stage = Build(recipe).stages([])[1]
    assert stage.inputs == (recipe.output / "1-extract/index.json", export)  # another model there is another stage
    assert "model" not in stage.settings


def test_a_model_that_is_not_there_is_refused_before_anything_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    (tmp_path / "recipe.toml").write_text(RECIPE.format(model="nothing"))
    assert main(["data", "build", "recipe.toml"]) != 0
    assert "nothing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def by_field(directory, vectors):
    documents = [Document(f"text {i}", f"d{i}", "a.jsonl", {"vector": v}) for i, v in enumerate(vectors)]
    config = parse(Semantic, {"kind": "semantic", "field": "vector", "num_clusters": 1, "keep": "nearest"})
    return staged(directory, documents, config)[0]


def test_embeddings_may_come_with_the_documents(tmp_path):
    assert by_field(tmp_path / "some", [[1, 0], [0, 2.5], [3, 0], [-1, 0]]) == ["d0", "d1", "d3"]
    assert by_field(tmp_path / "none", []) == []


@pytest.mark.parametrize("vector", [None, [], "abc", [1.0, "x"], [1e999]])
def test_a_document_without_an_embedding_is_named(vector):
    with pytest.raises(ValueError, match="document d7 has no embedding in its field 'vector'"):
        list(Semantic(field="vector").embed([Document("a", "d7", "a.jsonl", {"vector": vector})]))


def test_embeddings_of_two_lengths_are_refused(tmp_path):
    with pytest.raises(ValueError, match="expected embeddings of one length, got some of 2 and 3 numbers"):
        by_field(tmp_path, [[1, 2], [1, 2, 3]])


def test_refuses_what_makes_no_sense():
    for options, message in (
        ({}, "give one of the two"),
        ({"model": "a", "field": "b"}, "give one of the two"),
        ({"field": "b", "threshold": 2}, "threshold is a cosine"),
        ({"field": "b", "max_tokens": 0}, "max_tokens must be 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Semantic(**options)
