"""A trained model is found and read, also from what the first release left."""

import dataclasses
import os
import pathlib
import shutil

import pytest
import torch
from safetensors.torch import load_file

from cs336.inference.load import find_model, find_tokenizer, load_model, load_tokenizer, read_config
from cs336.models import save_pretrained
from cs336.tokenizer import Tokenizer
from cs336.training import save_checkpoint

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
X = torch.arange(16).view(2, 8) * 7 % 264


@pytest.fixture
def run(tmp_path):
    shutil.copytree(FIXTURES / "run", tmp_path / "run")
    return tmp_path / "run"


def touch(path):
    for file in path.rglob("*"):
        os.utime(file, (2**31, 2**31))


@pytest.mark.parametrize("where", ["run", "run/export", "run/checkpoints/step_00000060"])
def test_what_the_first_release_left(where):
    model = load_model(find_model(FIXTURES / where), device="cpu")
    want = load_file(FIXTURES / "logits.safetensors")["trained"]
    torch.testing.assert_close(model(X), want, atol=1e-6, rtol=1e-6)
    assert load_tokenizer(find_model(FIXTURES / where)).vocab_size == 257


def test_a_configuration_is_read_without_the_weights(run):
    want = load_model(run / "export", device="cpu").config
    (run / "export" / "model.safetensors").unlink()
    assert read_config(run / "export") == want


def test_an_export_wins_over_the_checkpoint_it_was_made_of(run):
    touch(run / "checkpoints")
    assert find_model(run) == run / "export"
    shutil.copytree(run / "checkpoints" / "step_00000060", run / "checkpoints" / "step_00000030")
    touch(run / "checkpoints" / "step_00000030")
    assert find_model(run) == run / "export"


def test_a_checkpoint_of_a_longer_run_wins_over_an_old_export(run):
    model = load_model(run / "export", device="cpu")
    torch.nn.init.normal_(model.embedding.weight)
    save_checkpoint(model, None, 80, run / "checkpoints" / "step_00000080")
    touch(run / "export")
    assert find_model(run) == run / "checkpoints" / "step_00000080"
    shutil.rmtree(run / "checkpoints" / "step_00000060")  # what the export was made of
    assert find_model(run) == run / "checkpoints" / "step_00000080"


def test_an_export_of_our_own_kind_that_does_not_say_its_step(run):
    checkpoint = run / "checkpoints" / "step_00000060"
    model = load_model(checkpoint, device="cpu")
    model.config = dataclasses.replace(model.config, logit_softcap=5.0)
    save_pretrained(model, run / "export")
    touch(checkpoint)
    assert find_model(run) == run / "export"


@pytest.mark.parametrize(("step", "found"), [(79, "checkpoints/step_00000080"), (80, "export"), (100, "export")])
def test_an_export_that_says_its_step(run, step, found):
    model = load_model(run / "export", device="cpu")
    save_checkpoint(model, None, 80, run / "checkpoints" / "step_00000080")
    save_pretrained(model, run / "export", step=step)
    touch(run / "checkpoints")
    assert find_model(run) == run / found


def test_a_checkpoint_alone(run, tmp_path):
    model = load_model(run / "export", device="cpu")
    alone = save_checkpoint(model, None, 80, tmp_path / "alone")
    assert torch.equal(load_model(alone, device="cpu")(X), model(X))
    file = save_checkpoint(model, None, 80, tmp_path / "model.pt")
    assert torch.equal(load_model(find_model(file), device="cpu")(X), model(X))
    shutil.copytree(run / "checkpoints" / "step_00000060", tmp_path / "old" / "alone" / "step")
    with pytest.raises(FileNotFoundError, match=r"checkpoint outside its run directory: .*config\.toml"):
        load_model(tmp_path / "old" / "alone" / "step")


@pytest.mark.parametrize("where", ["export", "checkpoints/step_00000060"])
def test_dtype(run, where):
    model = load_model(run / where, device="cpu", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not model.training
    assert {p.dtype for p in load_model(run / where, device="cpu").parameters()} == {torch.float32}


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no model"):
        find_model(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json beside"):
        find_tokenizer(tmp_path)


def test_a_tokenizer_of_hugging_face(run):
    tokenizers = pytest.importorskip("tokenizers")
    ours = Tokenizer.load(run / "export" / "tokenizer.json")
    theirs = tokenizers.Tokenizer.from_file(str(run / "export" / "tokenizer.json"))
    theirs.save(str(run / "export" / "tokenizer.json"))  # in their words
    with pytest.raises(ValueError, match=r"tokenizer"):
        Tokenizer.load(run / "export" / "tokenizer.json")
    assert load_tokenizer(run / "export").encode("the cat") == ours.encode("the cat")
