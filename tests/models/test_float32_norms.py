"""Norms whose weights are float32 in a model of 16 bits: Gemma's, 1 + what a file of bfloat16 holds."""

import copy
import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from test_families import assert_same, made
from test_gguf_families import converted
from test_gguf_families import made as made_for_gguf

from cs336.compression import drop_layers
from cs336.inference import Engine, EngineConfig, SamplingParams
from cs336.inference.quantization import quantize_
from cs336.models import Transformer, TransformerConfig, from_gguf, from_pretrained, save_pretrained
from cs336.models.huggingface import read_config, read_kind
from cs336.nn import LayerNorm, QuantizedLinear, RMSNorm
from cs336.training.weights import load_weights

transformers = pytest.importorskip("transformers")

FAMILIES = ("gemma", "gemma2", "gemma3")
IDS = torch.arange(80).view(2, 40) % 97
SHAPE = TransformerConfig(97, 32, 2, 32, 4, 2, qk_norm=True, float32_norms=True)


def norms(model):
    return {name: p for name, p in model.named_parameters() if "norm" in name}


def dtypes(model):
    """Of the norms, and of the others."""
    kept = norms(model)
    others = {p.dtype for name, p in model.named_parameters() if name not in kept}
    return {p.dtype for p in kept.values()}, others


def written(name, folder, seed=0):
    """A model of transformers in bfloat16, in a folder: some weights are as near to nothing as come back."""
    torch.manual_seed(seed)
    theirs = made(name).bfloat16()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if name.endswith("norm.weight"):
                p[:4] = torch.tensor([0.0, 2**-16, -(2**-16) * 1.9921875, 0.00390625 * 1.0078125])
    theirs.save_pretrained(folder)
    return theirs


@pytest.mark.parametrize("name", FAMILIES)
def test_the_1_is_added_in_float32(tmp_path, name):
    written(name, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    sums = {tuple((1 + t.float()).tolist()) for theirs, t in stored.items() if theirs.endswith("norm.weight")}
    for dtype in (None, torch.bfloat16, torch.float16, torch.float32):
        ours = from_pretrained(tmp_path, dtype=dtype)
        assert dtypes(ours) == ({torch.float32}, {dtype or torch.bfloat16})
        assert {tuple(p.tolist()) for p in norms(ours).values()} == sums
    wide = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_same(ours, wide, IDS)
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS), wide(IDS).logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_a_file_that_is_read_and_written_is_the_same_bits(tmp_path, name, dtype):
    written(name, tmp_path)
    save_pretrained(from_pretrained(tmp_path, dtype=dtype), tmp_path / "again")
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path, tmp_path / "again"))
    assert before.keys() == after.keys()
    for key, t in before.items():
        assert after[key].dtype == (dtype or torch.bfloat16)
        assert torch.equal(after[key].to(t.dtype), t), key


@torch.no_grad()
def test_bfloat16_is_as_near_to_float32_as_that_of_transformers(tmp_path):
    """1 + 2^-8 of every weight: rounded it is 1, and all logits are smaller by a 256th or more. Errors of single logits
    are those of bfloat16, of which either has its own draw: over seeds alike within a few hundredths."""
    off = {"ours": 0.0, "theirs": 0.0}
    for seed in range(4):
        torch.manual_seed(seed)
        theirs = made("gemma3").bfloat16()
        for name, p in theirs.named_parameters():
            if name.endswith("norm.weight"):
                p.fill_(2**-8)
        theirs.save_pretrained(tmp_path)
        want = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(IDS).logits
        for who, logits in (("ours", from_pretrained(tmp_path)(IDS)), ("theirs", theirs(IDS).logits)):
            off[who] += float((logits.float() - want).square().sum())
            assert float((logits * want).sum() / want.square().sum()) == pytest.approx(1, abs=1e-3)
    assert off["ours"] ** 0.5 < 1.15 * off["theirs"] ** 0.5


def test_no_cast_makes_them_narrower():
    model = Transformer(SHAPE, dtype=torch.bfloat16)
    assert dtypes(model) == ({torch.float32}, {torch.bfloat16})
    assert dtypes(copy.deepcopy(model).half()) == ({torch.float32}, {torch.float16})
    assert dtypes(Transformer(SHAPE).to(torch.bfloat16)) == ({torch.float32}, {torch.bfloat16})
    assert dtypes(model.to("meta")) == ({torch.float32}, {torch.bfloat16})
    assert dtypes(model.double()) == ({torch.float64}, {torch.float64})
    assert dtypes(model.bfloat16()) == ({torch.float32}, {torch.bfloat16})
    plain = Transformer(dataclasses.replace(SHAPE, float32_norms=False))
    assert dtypes(plain.bfloat16()) == ({torch.bfloat16}, {torch.bfloat16})
    for norm in (RMSNorm(4, dtype=torch.bfloat16), LayerNorm(4, dtype=torch.bfloat16)):
        norm.keep_float32()
        assert {p.dtype for p in norm.to(torch.bfloat16).parameters()} == {torch.float32}
    with pytest.raises(ValueError, match="float32_norms must be"):
        dataclasses.replace(SHAPE, float32_norms=1)


def test_gguf_has_them_too(tmp_path):
    path = converted(tmp_path, made_for_gguf("gemma3"))
    wide, low = from_gguf(path), from_gguf(path, dtype=torch.bfloat16)
    assert dtypes(low) == ({torch.float32}, {torch.bfloat16})
    assert all(torch.equal(p, norms(wide)[name]) for name, p in norms(low).items())


@torch.no_grad()
def test_the_engine_goes_with_them(tmp_path):
    """In pages queries and keys are normed, turned and kept in one launch, of bfloat16 beside weights of float32."""
    written("gemma3", tmp_path)
    engine = Engine(from_pretrained(tmp_path), config=EngineConfig(page_size=4, max_seqs=2))
    request = engine.add([5, 6, 7], SamplingParams(temperature=0, max_tokens=12))
    while engine.busy:
        engine.step()
    ids = [5, 6, 7, *(token.id for token in request.samples[0].tokens)]
    logits_SV = from_pretrained(tmp_path, dtype=torch.float32)(torch.tensor([ids]))[0, 2:-1]
    picked_S = logits_SV.gather(1, torch.tensor(ids[3:])[:, None])[:, 0]
    assert len(ids) == 15
    assert (logits_SV.amax(1) - picked_S).max() < 0.2  # the most that rounding may make of a tie


@pytest.mark.parametrize("form", ["cs336", "compressed-tensors"])
def test_quantised_models_keep_them(tmp_path, form):
    written("gemma2", tmp_path)
    model = quantize_(from_pretrained(tmp_path), "int8", 8)
    save_pretrained(model, tmp_path / form, quantized_as=form)
    again = from_pretrained(tmp_path / form)
    assert any(isinstance(module, QuantizedLinear) for module in again.modules())
    assert again.layers[0].attention_norm.weight.dtype == torch.float32
    for name, t in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], t), name


def test_a_model_of_fewer_layers_keeps_them(tmp_path):
    written("gemma3", tmp_path)
    model = from_pretrained(tmp_path)
    fewer = drop_layers(model, [0, 2])
    assert dtypes(fewer) == ({torch.float32}, {torch.bfloat16})
    assert torch.equal(fewer.layers[1].mlp_norm.weight, model.layers[2].mlp_norm.weight)


def test_a_layout_that_would_round_them_is_not_taken(tmp_path):
    """Qwen3's, of the same blocks, has norms of the model's dtype; Gemma's is read with wide ones."""
    for folder, config in (("wide", SHAPE), ("plain", dataclasses.replace(SHAPE, float32_norms=False))):
        model = Transformer(config, dtype=torch.bfloat16)
        with torch.no_grad():
            for p in norms(model).values():
                p.add_(torch.rand_like(p) - 0.5)
        save_pretrained(model, tmp_path / folder)
        again = from_pretrained(tmp_path / folder)
        assert again.config.float32_norms == config.float32_norms
        assert all(torch.equal(t, again.state_dict()[name]) for name, t in model.state_dict().items())
    assert [read_kind(tmp_path / folder) for folder in ("wide", "plain")] == ["cs336", "qwen3"]
    written("gemma2", tmp_path)
    narrow = dataclasses.replace(read_config(tmp_path), float32_norms=False)
    save_pretrained(Transformer(narrow, dtype=torch.bfloat16), tmp_path / "gemma")
    assert read_kind(tmp_path / "gemma") == "gemma2"


def test_training_begins_from_them_with_norms_of_either_kind(tmp_path):
    """A configuration that says nothing of them takes the weights rounded, as it did before there was the key."""
    written("gemma2", tmp_path)
    source = from_pretrained(tmp_path)
    plain = dataclasses.replace(source.config, float32_norms=False)
    for config, dtype in ((source.config, torch.float32), (plain, torch.bfloat16)):
        model = Transformer(config, dtype=torch.bfloat16)
        load_weights(model, tmp_path)
        for name, p in norms(model).items():
            assert p.dtype == dtype
            assert torch.equal(p, norms(source)[name].to(dtype))
