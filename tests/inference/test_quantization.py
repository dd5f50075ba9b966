"""Quantised models: what they lose, the directories that hold them, and what is refused."""

import copy
import importlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import cs336
from cs336.cli.program import main
from cs336.inference import LLM, SamplingParams
from cs336.inference.load import load_model
from cs336.inference.quantization import compress, quantize_
from cs336.inference.quantization.rounding import nearest_fp8
from cs336.models import BlockConfig, Transformer, TransformerConfig, save_pretrained
from cs336.nn import AttentionConfig, GELUConfig, LatentAttentionConfig, MoEConfig, QuantizedLinear
from cs336.tokenizer import Tokenizer

module = importlib.import_module("cs336.inference.quantization.compress")  # whose name is its function's as well
CONFIG = TransformerConfig(257, 64, num_layers=2, d_model=64, num_heads=4, num_kv_heads=2)
TOKENIZER = Tokenizer({i: bytes([i]) for i in range(256)}, [], ["<|endoftext|>"])
TEXT = (b"the cat sat on the mat, and the dog lay by the door; " * 40)[:2048]


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    model = Transformer(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    rows = torch.tensor(list(TEXT)).view(32, 64)
    for step in range(40):
        batch = rows[step % 4 :: 4]
        optimizer.zero_grad()
        loss = model(batch[:, :-1], targets=batch[:, 1:]) / batch[:, 1:].numel()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture
def directory(trained, tmp_path):
    save_pretrained(trained, tmp_path / "model", TOKENIZER)
    return tmp_path / "model"


@torch.inference_mode()
def perplexity(model):
    rows = torch.tensor(list(TEXT)).view(32, 64)
    return float((model(rows[:, :-1], targets=rows[:, 1:]) / rows[:, 1:].numel()).exp())


@pytest.mark.parametrize(("method", "group", "most"), [("int8", 64, 1.002), ("int4", 16, 1.1), ("fp8", None, 1.02)])
def test_perplexity_and_size(trained, directory, tmp_path, method, group, most):
    before = perplexity(trained)
    assert before < 8, "the model has not learned"
    found = compress(directory, tmp_path / "small", method, group)
    model = load_model(tmp_path / "small")
    assert before / most < perplexity(model) < before * most
    assert perplexity(model) != before
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert len(layers) == 14
    assert found.bytes_after < 0.55 * found.bytes_before
    size = (tmp_path / "small" / "model.safetensors").stat().st_size
    assert found.bytes_after < size < found.bytes_after + 10_000
    again = quantize_(load_model(directory), method, group).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_fp8_rounds_small_rows_as_well_as_large_ones(dtype):
    """float16 has no scale as small as theirs; a row of zeros stays one."""
    weight = torch.randn(64, generator=torch.Generator().manual_seed(0))
    weight_NK = torch.stack([weight * size for size in (1, 1e-2, 1e-4, 0)]).to(dtype)
    found = nearest_fp8(weight_NK, 64).dequantized(64)
    error_N = (found - weight_NK.float()).norm(dim=1) / weight_NK.float().norm(dim=1).clamp(1e-30)
    assert error_N.max() < 0.035


def test_a_saved_model_is_the_same_in_any_dtype_and_may_be_saved_again(directory, tmp_path):
    compress(directory, tmp_path / "small", "int4", 32)
    model, low = load_model(tmp_path / "small"), load_model(tmp_path / "small", dtype=torch.bfloat16)
    name = "layers.0.attention.q_proj"
    assert low.embedding.weight.dtype == torch.bfloat16
    assert torch.equal(low.get_submodule(name).scales, model.get_submodule(name).scales)
    save_pretrained(model, tmp_path / "again")
    again = load_model(tmp_path / "again").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("form", ["cs336", "compressed-tensors", "gptq", "awq"])
def test_verbs_take_it(directory, tmp_path, capsys, form):
    out = tmp_path / "small"
    how = ["--method", "int4", "--group", "16", "--format", form, "--out", str(out)]
    assert main(["compress", str(directory), *how]) == 0
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == form
    assert "times smaller" in capsys.readouterr().out
    assert main(["generate", str(out), "--prompt", "the c", "--temperature", "0", "--max-tokens", "8"]) == 0
    text = capsys.readouterr().out
    llm = LLM(out, quiet=True, speculation="ngram")
    assert text.strip() == "the c" + llm.generate("the c", SamplingParams(temperature=0, max_tokens=8))[0].text
    assert main(["compress", str(directory), "--out", str(directory)]) == 2
    assert "which this job did not make" in capsys.readouterr().err


def test_rounding_goes_on_where_it_was_killed_and_repeats_nothing(directory, tmp_path, monkeypatch):
    out = tmp_path / "small"
    out.mkdir()
    (out / ".model.safetensors.left").write_bytes(b"of a process that was killed")

    def stop(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, "write_json", stop)
        with pytest.raises(KeyboardInterrupt):
            compress(directory, out, "int8", 16)
    found = compress(directory, out, "int8", 16)
    first = (out / "model.safetensors").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(module, "load_model", stop)
        assert compress(directory, out, "int8", 16) == found
    (out / "model.safetensors").unlink()
    assert compress(directory, out, "int8", 16) == found
    assert (out / "model.safetensors").read_bytes() == first
    compress(directory, out, "int4", 16)
    assert (out / "earlier" / "quantise-1" / "model.safetensors").read_bytes() == first
    assert load_model(out).layers[0].mlp.up_proj.method == "int4"
    assert load_model(out / "earlier" / "quantise-1").layers[0].mlp.up_proj.method == "int8"


@pytest.mark.parametrize(
    ("block", "plain"),
    [
        (BlockConfig(LatentAttentionConfig(2, 16, 16, rope_head_dim=8)), {"kv_b_proj"}),
        (BlockConfig(AttentionConfig(4, qkv_bias=True), MoEConfig(4, 2)), {"router"}),
        (BlockConfig(AttentionConfig(4, sinks=True), MoEConfig(4, 2, 48, 1, "clamped_gelu", bias=True)), {"router"}),
        (BlockConfig(AttentionConfig(4), GELUConfig()), set()),
    ],
)
def test_other_blocks(block, plain, tmp_path):
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(64, 32, 1, 32, init_std=0.2, layers=(block,))).eval()
    ids = torch.randint(0, 64, (2, 20))
    with torch.inference_mode():
        before = model(ids)
        after = quantize_(model, "int8", 16)(ids)
    off = (after - before).norm(dim=-1) / before.norm(dim=-1)
    assert 0 < off.median() < 0.02  # a token whose experts are others now may be further off
    kept = {n.rpartition(".")[2] for n, m in model.layers.named_modules() if isinstance(m, torch.nn.Linear)}
    assert kept == plain
    save_pretrained(model, tmp_path / "out")
    with torch.inference_mode():
        assert torch.equal(load_model(tmp_path / "out")(ids), after)


def test_rounded_activations(trained, directory, tmp_path):
    """What the engine's joined products say is what the layers say one by one; gradients pass the rounding."""
    compress(directory, tmp_path / "small", "fp8", None, activations=True)
    model = load_model(tmp_path / "small")
    assert perplexity(trained) / 1.05 < perplexity(model) < perplexity(trained) * 1.05
    quantised = quantize_(copy.deepcopy(trained), "fp8", None)
    assert perplexity(model) != perplexity(quantised)
    ids = list(TEXT[:24])
    (out,) = LLM(model, TOKENIZER, quiet=True).generate([ids], SamplingParams(temperature=0, max_tokens=12))
    for token in out.token_ids:
        with torch.no_grad():
            assert model(torch.tensor([ids]))[0, -1].argmax() == token
        ids.append(token)
    layer = model.layers[0].mlp.up_proj
    x = torch.randn(3, 64, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(3, -1))
    layer.x_group = None
    with torch.no_grad():
        torch.testing.assert_close(layer(x), quantised.layers[0].mlp.up_proj(x))
    for method in ("int8", "gptq"):
        with pytest.raises(ValueError, match=f"beside weights in fp8, got {method}"):
            compress(directory, tmp_path / "other", method, activations=True)
    with pytest.raises(ValueError, match="these are int8: leave out x_group"):
        QuantizedLinear(8, 8, "int8", None, x_group=-1)


def change(path, name, tensor):
    weights = load_file(path / "model.safetensors")
    weights[name] = tensor(weights[name]) if tensor else weights.pop(name) and None
    save_file({k: t for k, t in weights.items() if t is not None}, path / "model.safetensors")


PACKED, SCALES = "layers.1.mlp.up_proj.packed", "layers.1.mlp.up_proj.scales"


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (PACKED, lambda t: t[:, :-1].contiguous(), rf"{PACKED} has shape"),
        (PACKED, lambda t: t.to(torch.int8), rf"{PACKED} is torch.int8, int4 means torch.uint8"),
        (SCALES, lambda t: t[:, :1].contiguous(), rf"{SCALES} has shape"),
        (SCALES, lambda t: t * float("nan"), rf"{SCALES} must be positive"),
        (SCALES, lambda t: -t, rf"{SCALES} must be positive"),
        (SCALES, lambda t: t.int(), rf"{SCALES} must be positive"),
    ],
)
def test_damaged_weights_are_refused_by_name(directory, tmp_path, name, tensor, message):
    compress(directory, tmp_path / "small", "int4", 16)
    change(tmp_path / "small", name, tensor)
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "small")


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantization_config is of 'gptq'"),
        ({"quant_method": "cs336", "method": "int3", "group": 16}, "method must be int8 or int4 or fp8, got 'int3'"),
        ({"quant_method": "cs336", "method": "int4", "group": "16"}, "group must be a positive integer, got '16'"),
        ({"quant_method": "cs336", "method": "int4", "group": 32}, "has shape"),
        ({"quant_method": "cs336", "method": "int8", "group": 16}, "has shape"),
        ({"quant_method": "cs336", "method": "int4"}, "must have quant_method, method and group"),
        ("int4", "quantization_config is of 'int4'"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(directory, tmp_path, said, message):
    compress(directory, tmp_path / "small", "int4", 16)
    path = tmp_path / "small" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": said}))
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "small")


def test_a_file_cut_short_and_one_without_its_config_are_refused(directory, tmp_path):
    compress(directory, tmp_path / "small", "int8", 16)
    path, weights = tmp_path / "small" / "config.json", tmp_path / "small" / "model.safetensors"
    config = json.loads(path.read_text())
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        load_model(tmp_path / "small")
    weights.write_bytes(whole)
    del config["quantization_config"]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"lacks weights: .*q_proj.weight"):
        load_model(tmp_path / "small")


@pytest.mark.parametrize("name", ["asymmetric", "activations", "act_order"])
def test_what_is_no_flag_is_refused(directory, tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} must be true or false, got 'yes'"):
        compress(directory, tmp_path / "small", "fp8", None, **{name: "yes"})
    if name != "act_order":
        with pytest.raises(ValueError, match=f"{name} must be true or false, got 1"):
            quantize_(Transformer(TransformerConfig(64, 16, 1, 32, 4)), "fp8", None, **{name: 1})


def test_what_cannot_be_quantised_is_refused(trained, directory, tmp_path):
    model = load_model(directory)
    with pytest.raises(ValueError, match=r"in groups of 4096: layers have at most \d+ features"):
        quantize_(model, "int8", 4096)
    with pytest.raises(ValueError, match="int4 wants even in_features and group, got 64 and 3"):
        quantize_(model, "int4", 3)
    with pytest.raises(ValueError, match="method must be int8 or int4 or fp8, got 'fp2'"):
        quantize_(model, "fp2")
    model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj: the weight is not finite"):
        quantize_(model, "int8", 16)
    small = quantize_(load_model(directory), "int8", 16)
    with pytest.raises(ValueError, match="no sums in one order"), cs336.invariant():
        small(torch.tensor([[1, 2]]))
    with pytest.raises(ValueError, match="quantised already: quantise the model that they were made of"):
        quantize_(small, "int8", 16)
