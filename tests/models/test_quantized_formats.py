"""Quantised files of others: their bits, by the tests' own unpacker; compressed-tensors itself; what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from cs336.inference.quantization import gptq, quantize_
from cs336.inference.quantization.rounding import nearest
from cs336.models import BlockConfig, Transformer, TransformerConfig, from_pretrained, save_pretrained
from cs336.models.huggingface.quantized import FORMATS
from cs336.models.huggingface.quantized.tensors import Tensors
from cs336.nn import (
    AttentionConfig,
    LayerNormConfig,
    Linear,
    MLPConfig,
    MoEConfig,
    NoPositionsConfig,
    QuantizedLinear,
    RopeConfig,
)
from cs336.nn.quantized import rounded

ROPE = RopeConfig(interleaved=True)  # whose rows are in another order in a file
BLOCK = BlockConfig(AttentionConfig(4, 2), positions=ROPE)
NAME = "model.layers.1.mlp.up_proj"


def make(method="int4", group=16, asymmetric=False, order=False, block=BLOCK, activations=False):
    """A model whose layers have zeros, and orders if asked for, as GPTQ leaves them."""
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(64, 32, 2, 64, init_std=0.1, tie_embeddings=False, layers=(block,))).eval()
    plain = {name: m.weight for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    quantize_(model, method, group, asymmetric=asymmetric, activations=activations)
    for name, module in model.named_modules():
        if order and isinstance(module, QuantizedLinear):
            x = torch.randn(100, module.in_features, generator=torch.Generator().manual_seed(1))  # q, k and v read one
            bits = {"bits": 4 if method == "int4" else 8, "asymmetric": asymmetric}
            module.fill(gptq(plain[name], x.t() @ x, group=module.group, act_order=True, **bits))
    return model


@torch.inference_mode()
def logits(model):
    return model(torch.arange(60).view(2, 30))


def edited(directory, tensors=None, **said):
    """With other tensors, None for one that is taken away, and other fields of quantization_config."""
    weights = load_file(directory / "model.safetensors") | (tensors or {})
    save_file({n: t for n, t in weights.items() if t is not None}, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] |= said
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("form", "method", "group", "asymmetric", "order"),
    [
        ("compressed-tensors", "int4", 16, False, False),
        ("compressed-tensors", "int4", 16, True, False),
        ("compressed-tensors", "int8", 32, True, False),
        ("compressed-tensors", "int8", None, False, False),
        ("compressed-tensors", "fp8", None, False, False),
        ("gptq", "int4", 16, False, True),
        ("gptq", "int8", 64, False, False),
        ("gptq", "int4", None, False, True),
        ("awq", "int4", 16, True, False),
        ("awq", "int4", 32, False, False),
        ("cs336", "int4", 16, True, True),
        ("cs336", "int8", None, True, False),
        ("cs336", "fp8", 16, False, False),
        ("cs336", "fp8", None, False, False),
    ],
)
def test_what_is_written_is_read_as_the_same(form, method, group, asymmetric, order, tmp_path):
    model = make(method, group, asymmetric, order)
    save_pretrained(model, tmp_path, quantized_as=form)
    again = from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear) and "mlp" in name:  # the others' rows are in another order
            torch.testing.assert_close(again.get_submodule(name).weight, module.weight, rtol=0, atol=0)
    said = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert said["quant_method"] == form
    save_pretrained(again, tmp_path / "again", quantized_as=form)
    first, second = (load_file(d / "model.safetensors") for d in (tmp_path, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(t.float(), second[name].float()) for name, t in first.items())


def layer_in(directory):
    """The tensors of the layer NAME."""
    tensors = load_file(directory / "model.safetensors")
    return {n.removeprefix(f"{NAME}."): t for n, t in tensors.items() if n.startswith(f"{NAME}.")}


def check_both_ways(compressor, state, scheme, directory):
    """What compressed-tensors writes is read as it reads it, and what we then write, by both."""
    packed = compressor.compress(state, scheme)
    edited(directory, {f"{NAME}.{n}": t.contiguous() for n, t in packed.items()})
    for source in ("theirs", "ours"):
        if source == "ours":
            save_pretrained(from_pretrained(directory), directory, quantized_as="compressed-tensors")
            packed = layer_in(directory)
        want = compressor.decompress(packed, scheme)["weight"]
        found = from_pretrained(directory).layers[1].mlp.up_proj.weight
        torch.testing.assert_close(found, want, rtol=1e-6, atol=0)


def numbers(word, bits):
    """The numbers in an int32, from its lowest bits up."""
    return [(int(word) & 0xFFFFFFFF) >> i & (2**bits - 1) for i in range(0, 32, bits)]


@pytest.mark.parametrize(("method", "bits"), [("int4", 4), ("int8", 8)])
def test_gptq_bit_by_bit(method, bits, tmp_path):
    model = make(method, order=True)
    save_pretrained(model, tmp_path, quantized_as="gptq")
    t = layer_in(tmp_path)
    assert t.keys() == {"qweight", "qzeros", "scales", "g_idx"}
    many, want = 32 // bits, model.layers[1].mlp.up_proj.weight
    N, K = want.shape
    found = torch.empty(N, K)
    for n in range(N):
        for k in range(K):
            q, g = numbers(t["qweight"][k // many, n], bits)[k % many], int(t["g_idx"][k])
            zero = numbers(t["qzeros"][g, n // many], bits)[n % many] + 1
            found[n, k] = (q - zero) * t["scales"][g, n]
    torch.testing.assert_close(found, want, rtol=1e-6, atol=0)
    assert t["g_idx"].tolist() != sorted(t["g_idx"].tolist())


def test_awq_bit_by_bit(tmp_path):
    model = make(asymmetric=True)
    save_pretrained(model, tmp_path, quantized_as="awq")
    t = layer_in(tmp_path)
    assert t.keys() == {"qweight", "qzeros", "scales"}
    want = model.layers[1].mlp.up_proj.weight
    N, K = want.shape
    found = torch.empty(N, K)
    place = [0, 4, 1, 5, 2, 6, 3, 7]  # of each of eight columns in a word, as the published kernels unpack them
    for n in range(N):
        for k in range(K):
            q = numbers(t["qweight"][k, n // 8], 4)[place[n % 8]]
            zero = numbers(t["qzeros"][k // 16, n // 8], 4)[place[n % 8]]
            found[n, k] = (q - zero) * t["scales"][k // 16, n]
    torch.testing.assert_close(found, want, rtol=1e-6, atol=0)


def test_gptq_of_the_second_format_keeps_its_zeros(tmp_path):
    model = make(asymmetric=False)
    save_pretrained(model, tmp_path, quantized_as="gptq")
    words = {n: t for n, t in load_file(tmp_path / "model.safetensors").items() if n.endswith("qzeros")}
    assert all((t == 0x77777777).all() for t in words.values())
    edited(tmp_path, {n: torch.full_like(t, -0x77777778) for n, t in words.items()}, checkpoint_format="gptq_v2")
    torch.testing.assert_close(logits(from_pretrained(tmp_path)), logits(model), rtol=1e-5, atol=1e-5)


def test_experts_are_written_one_by_one(tmp_path):
    block = BlockConfig(AttentionConfig(4, 2), MoEConfig(4, 2, d_ff=64, normalize=True), positions=RopeConfig())
    model = make(block=block)
    save_pretrained(model, tmp_path, quantized_as="compressed-tensors")
    names = load_file(tmp_path / "model.safetensors").keys()
    assert sum(n.endswith("weight_packed") and ".experts.3." in n for n in names) == 6
    assert torch.equal(logits(from_pretrained(tmp_path)), logits(model))
    config = json.loads((tmp_path / "config.json").read_text())
    assert any("gate" in name for name in config["quantization_config"]["ignore"])
    gone = next(n for n in names if n.endswith("experts.2.w3.weight_packed") or n.endswith("2.up_proj.weight_packed"))
    edited(tmp_path, {gone: None})
    with pytest.raises(ValueError, match=rf"{gone} is missing, and other experts"):
        from_pretrained(tmp_path)


FLOATS = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False}
NAN = torch.full((192, 64), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)


DYNAMIC = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}


def fp8_group(read=None, **changes):
    only = {"targets": ["Linear"], "weights": FLOATS | changes, "input_activations": read}
    return {"config_groups": {"group_0": only}}


@pytest.mark.parametrize(
    ("change", "said", "message"),
    [
        ({f"{NAME}.weight": NAN}, {}, f"{NAME}.weight must be numbers, got NaN"),
        ({f"{NAME}.weight": torch.ones(192, 64)}, {}, f"{NAME}.weight is torch.float32"),
        ({f"{NAME}.weight": NAN[:, :63]}, {}, rf"{NAME}.weight has shape \(192, 63\)"),
        ({f"{NAME}.weight": None}, {}, f"{NAME}.weight is missing"),
        ({f"{NAME}.weight_scale": torch.zeros(192, 1)}, {}, f"{NAME}.weight_scale must be positive"),
        ({f"{NAME}.input_scale": torch.ones(1)}, {}, "unknown weights: .*input_scale"),
        ({}, fp8_group(strategy="tensor"), r"weight_scale has shape \(\d+, 1\), config.json means \(1,\)"),
        ({}, fp8_group(strategy="block", block_structure=[128, 0]), "weights.strategy = "),
        ({}, fp8_group(strategy="block", block_structure=[1, 10**30]), "group must be a positive integer"),
        ({}, fp8_group(strategy="group", group_size=16), "weights.strategy = "),
        ({}, fp8_group(num_bits=4), "symmetric floats of 8 bits"),
        ({}, fp8_group({"num_bits": 8, "dynamic": False}), "input_activations = "),
        ({}, fp8_group(DYNAMIC | {"num_bits": 4}), "input_activations = .*symmetric floats of 8 bits"),
        ({}, fp8_group(DYNAMIC | {"type": "int"}), "input_activations = .*symmetric floats of 8 bits"),
        ({}, fp8_group(DYNAMIC | {"strategy": "channel"}), r"input_activations.strategy = \('channel', None\)"),
        (
            {},
            fp8_group(DYNAMIC | {"strategy": "group", "group_size": 0}),
            r"input_activations.strategy = \('group', 0\)",
        ),
    ],
)
def test_fp8_that_does_not_fit_is_refused_by_name(change, said, message, tmp_path):
    save_pretrained(make("fp8", None), tmp_path, quantized_as="compressed-tensors")
    edited(tmp_path, {n: None if t is None else t.contiguous() for n, t in change.items()}, **said)
    with pytest.raises(ValueError, match=message):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("strategy", "rows", "columns"), [("tensor", None, None), ("block", 48, 32), ("block", 10**12, 2**62)]
)
def test_fp8_scales_of_a_tensor_and_of_blocks_are_read(strategy, rows, columns, tmp_path):
    save_pretrained(make("fp8", None), tmp_path, quantized_as="compressed-tensors")
    names = [n for n in load_file(tmp_path / "model.safetensors") if n.endswith("weight_scale")]
    weights = load_file(tmp_path / "model.safetensors")
    change = {}
    for name in names:
        N, K = weights[name.removesuffix("_scale")].shape
        change[name] = torch.rand(1 if rows is None else (-(-N // rows), -(-K // columns))) + 1
    edited(tmp_path, change, **fp8_group(DYNAMIC, strategy=strategy, block_structure=[rows, columns]))
    q, scale = weights[f"{NAME}.weight"].float(), change[f"{NAME}.weight_scale"]
    if rows is not None:
        scale = scale.repeat_interleave(min(rows, 192), 0)[:192].repeat_interleave(min(columns, 64), 1)[:, :64]
    torch.testing.assert_close(from_pretrained(tmp_path).layers[1].mlp.up_proj.weight, q * scale)


@pytest.mark.parametrize(
    ("read", "x_group"),
    [
        (None, None),
        (DYNAMIC, -1),
        (DYNAMIC | {"strategy": "tensor"}, -1),
        (DYNAMIC | {"strategy": "group", "group_size": 16}, 16),
    ],
)
def test_what_a_file_rounds_as_it_runs_is_rounded(read, x_group, tmp_path):
    """Each layer multiplies its weights with the nearest fp8 of what it reads: a scale a token or group of features."""
    save_pretrained(make("fp8", None), tmp_path, quantized_as="compressed-tensors")
    edited(tmp_path, **fp8_group(read))
    layer = from_pretrained(tmp_path).layers[1].mlp.up_proj
    assert layer.x_group == x_group
    x = torch.randn(7, 64) * torch.logspace(-9, 4, 7)[:, None]
    x[0] = 0
    wanted = x.double()
    if read is not None:
        groups = wanted.view(7, -1, 64 if x_group == -1 else x_group)
        scales = groups.abs().amax(-1, keepdim=True).clamp(1e-30).float() / 448
        wanted = ((groups.float() / scales).to(torch.float8_e4m3fn).double() * scales).view(7, 64)
        assert 0.01 < ((wanted - x).norm(dim=1) / x.norm(dim=1))[1:].max() < 0.05
    wanted = wanted @ layer.weight.double().T
    rows = wanted.abs().amax(1, keepdim=True).clamp(min=1e-30)
    assert ((layer(x) - wanted) / rows).abs().max() < 2e-6
    if read is not None:  # whatever stands in the batch beside a token
        assert torch.equal(rounded(x, x_group)[3], rounded(x[3], x_group))


@pytest.mark.parametrize("form", ["cs336", "compressed-tensors"])
def test_rounded_activations_are_written_and_read(form, tmp_path):
    model, plain = make("fp8", None, activations=True), make("fp8", None)
    assert (logits(model) - logits(plain)).abs().max() > 1e-3
    save_pretrained(model, tmp_path, quantized_as=form)
    again = from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)
    assert {m.x_group for m in again.modules() if isinstance(m, QuantizedLinear)} == {-1}
    save_pretrained(again, tmp_path / "again", quantized_as=form)
    said = [json.loads((d / "config.json").read_text())["quantization_config"] for d in (tmp_path, tmp_path / "again")]
    assert said[0] == said[1]


PACKED, SCALE = f"{NAME}.weight_packed", f"{NAME}.weight_scale"
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16, "dynamic": False}


def group(**changes):
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS | changes}}}


@pytest.mark.parametrize(
    ("form", "change", "said", "message"),
    [
        ("compressed-tensors", {SCALE: None}, {}, rf"{SCALE} is missing"),
        ("compressed-tensors", {SCALE: torch.ones(192, 3)}, {}, rf"{SCALE} has shape \(192, 3\)"),
        ("compressed-tensors", {SCALE: torch.full((192, 4), -1.0)}, {}, rf"{SCALE} must be positive"),
        ("compressed-tensors", {PACKED: torch.ones(192, 8)}, {}, rf"{PACKED} is torch.float32"),
        ("compressed-tensors", {PACKED: torch.ones(192, 7).int()}, {}, rf"{PACKED} has shape"),
        ("compressed-tensors", {f"{NAME}.weight_shape": torch.tensor([192, 65])}, {}, "weight_shape is"),
        ("compressed-tensors", {f"{NAME}.more": torch.ones(1)}, {}, "unknown weights: .*more"),
        ("compressed-tensors", {}, {"quant_method": "bitsandbytes"}, "quantization_config is of 'bitsandbytes'"),
        ("compressed-tensors", {}, {"quant_method": "cs336"}, "quantization_config is of 'cs336'"),
        ("compressed-tensors", {}, {"format": "nvfp4-pack-quantized"}, "format = 'nvfp4-pack-quantized'"),
        ("compressed-tensors", {}, {"config_groups": {}}, "config_groups = {}"),
        ("compressed-tensors", {}, {"config_groups": {"a": {}}}, "weights = None"),
        ("compressed-tensors", {}, {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme = "),
        ("compressed-tensors", {}, group(num_bits=3), "weights.num_bits = 3: expected 4 or 8"),
        ("compressed-tensors", {}, group(num_bits=8), r"weight_packed has shape"),
        ("compressed-tensors", {}, group(group_size=32), r"weight_scale has shape"),
        ("compressed-tensors", {}, group(symmetric=False), r"weight_zero_point is missing"),
        ("compressed-tensors", {}, group(strategy="tensor"), "weights.strategy = "),
        ("gptq", {f"{NAME}.qzeros": None}, {}, "up_proj.qzeros is missing"),
        ("gptq", {f"{NAME}.g_idx": torch.zeros(64).int()}, {}, "g_idx must give each group 16 features"),
        ("gptq", {}, {"bits": 3}, "bits = 3: expected 4 or 8"),
        ("gptq", {}, {"bits": 8}, "qweight has shape"),
        ("gptq", {}, {"group_size": 0}, "group_size = 0"),
        ("gptq", {}, {"checkpoint_format": "marlin"}, "checkpoint_format = 'marlin'"),
        ("gptq", {}, {"dynamic": {"-:.*": {}}}, "dynamic = "),
        ("awq", {f"{NAME}.scales": None}, {}, "up_proj.scales is missing"),
        ("awq", {}, {"version": "gemv"}, "version = 'gemv': expected 'gemm'"),
        ("awq", {}, {"bits": 8}, "bits = 8: expected 4"),
        ("awq", {}, {"quant_method": "gptq", "bits": 4}, "has shape"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(form, change, said, message, tmp_path):
    save_pretrained(make(), tmp_path, quantized_as=form)
    edited(tmp_path, change, **said)
    with pytest.raises(ValueError, match=message):
        from_pretrained(tmp_path)


def test_what_a_format_does_not_hold_is_refused(tmp_path):
    for model, form, message in (
        (make(order=True), "awq", "AWQ's format has no order of features"),
        (make(order=True), "compressed-tensors", "compressed-tensors has no order of features: choose gptq"),
        (make("int8"), "awq", "AWQ's format holds int4 weights, got int8"),
        (
            make(group=48),
            "compressed-tensors",
            r"q_proj: compressed-tensors has whole groups: 64 features in groups of 48",
        ),
        (make("fp8", None), "gptq", "GPTQ's format holds int4 and int8 weights, got fp8"),
        (make("fp8", None), "awq", "AWQ's format holds int4 weights, got fp8"),
        (make("fp8", 16), "compressed-tensors", "fp8 is written with a scale a row, not 16 features"),
        (make(), "gguf", "the format must be one of cs336, compressed-tensors, gptq, awq, got 'gguf'"),
    ):
        with pytest.raises(ValueError, match=message):
            save_pretrained(model, tmp_path, quantized_as=form)
    model = make()
    other = model.layers[0].mlp.up_proj
    other.fill(nearest(other.weight, 4, 16, asymmetric=True)._replace(zeros=torch.full_like(other.scales, -8).short()))
    with pytest.raises(ValueError, match="no zero below 1"):
        save_pretrained(model, tmp_path, quantized_as="gptq")
    soft = Transformer(TransformerConfig(64, 32, 1, 64, num_heads=4, logit_softcap=20.0))
    with pytest.raises(ValueError, match="no family of Hugging Face has this model"):
        save_pretrained(quantize_(soft, "int4", 16), tmp_path, quantized_as="awq")


@pytest.mark.parametrize(
    ("method", "group", "activations"),
    [("int4", 16, False), ("int8", 32, False), ("int8", None, False), ("fp8", None, False), ("fp8", None, True)],
)
def test_transformers_loads_ours_with_compressed_tensors(method, group, activations, tmp_path):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = make(method, group, activations=activations)
    save_pretrained(model, tmp_path, quantized_as="compressed-tensors")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.inference_mode():
        found = theirs(torch.arange(60).view(2, 30)).logits
    torch.testing.assert_close(found, logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("bits", "symmetric", "strategy"), [(4, True, "group"), (4, False, "group"), (8, True, "channel")]
)
def test_compressed_tensors_reads_what_is_written_and_the_other_way_round(bits, symmetric, strategy, tmp_path):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    size = 16 if strategy == "group" else None
    args = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, strategy=strategy, group_size=size)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    model = make("int4" if bits == 4 else "int8", size, not symmetric)
    save_pretrained(model, tmp_path, quantized_as="compressed-tensors")
    torch.manual_seed(1)
    w = torch.randn(192, 64)
    scale = (w.view(192, -1, size or 64).abs().amax(-1) / (2 ** (bits - 1))).contiguous()
    zero = None if symmetric else torch.randint(-3, 4, scale.shape, dtype=torch.int8)
    state = {"weight": w, "weight_scale": scale} | ({} if zero is None else {"weight_zero_point": zero})
    check_both_ways(PackedQuantizationCompressor, state, scheme, tmp_path)


def test_compressed_tensors_reads_fp8_as_it_is_written_and_the_other_way_round(tmp_path):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors import FloatQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy="channel")
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    save_pretrained(make("fp8", None), tmp_path, quantized_as="compressed-tensors")
    torch.manual_seed(1)
    w = torch.randn(192, 64)
    state = {"weight": w, "weight_scale": w.abs().amax(1, keepdim=True) / 448}
    check_both_ways(FloatQuantizationCompressor, state, scheme, tmp_path)


STACKED = BlockConfig(AttentionConfig(4, 2), positions=RopeConfig(interleaved=True, fraction=0.5))
FUSED = {"self_attn.qkv_proj": ("attention", "qkv"), "mlp.gate_up_proj": ("mlp", ("gate", "up"))}


@pytest.mark.parametrize(
    ("form", "method", "group", "asymmetric", "order"),
    [
        ("awq", "int4", 16, True, False),
        ("gptq", "int4", 16, False, True),
        ("gptq", "int8", None, True, False),
        ("compressed-tensors", "int8", 32, True, False),
        ("compressed-tensors", "fp8", None, False, False),
    ],
)
def test_matrices_of_several_layers_are_read_and_written(form, method, group, asymmetric, order, tmp_path):
    """As files of Phi-3 have q, k and v, and gate and up: what is read is the rows of the matrix dequantised, and
    transformers makes the same of that."""
    transformers = pytest.importorskip("transformers")
    save_pretrained(make(method, group, asymmetric, order, block=STACKED), tmp_path, quantized_as=form)
    config, tensors = json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors")
    said = config.pop("quantization_config")
    reader, width = FORMATS[form].of(said), group or 64
    plain, wide = {}, {"qkv_proj": (128, 64), "o_proj": (64, 64), "gate_up_proj": (2 * 192, 64), "down_proj": (64, 192)}
    for stem in {n.rpartition(".")[0] for n in tensors if n.endswith((reader.mark, "weight_scale"))}:
        shape = wide[stem.rpartition(".")[2]]
        weight = reader.read(Tensors(tensors, stem, method), *shape)
        plain[f"{stem}.weight"] = weight.dequantized(shape[1] if group is None else width)
    again = from_pretrained(tmp_path)
    for layer in range(2):
        for name, (module, parts) in FUSED.items():
            found = [again.get_submodule(f"layers.{layer}.{module}.{part}_proj") for part in parts]
            assert all(isinstance(part, QuantizedLinear) for part in found)
            whole = torch.cat([part.weight for part in found])
            torch.testing.assert_close(whole, plain[f"model.layers.{layer}.{name}.weight"], rtol=0, atol=0)
    assert len(plain) == 8
    (tmp_path / "float").mkdir()
    save_file(tensors | plain, tmp_path / "float" / "model.safetensors", {"format": "pt"})
    (tmp_path / "float" / "config.json").write_text(json.dumps(config))
    theirs = transformers.Phi3ForCausalLM.from_pretrained(tmp_path / "float").eval()
    with torch.inference_mode():
        want = theirs(torch.arange(60).view(2, 30)).logits
    torch.testing.assert_close(logits(again), want, rtol=1e-4, atol=1e-4)
    save_pretrained(again, tmp_path / "again", quantized_as=form)
    first, second = (load_file(d / "model.safetensors") for d in (tmp_path, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(t.float(), second[name].float()) for name, t in first.items())


def test_matrices_of_several_layers_that_do_not_fit_together_are_refused(tmp_path):
    model = make("int4", 16, order=True, block=STACKED)
    v = model.layers[0].attention.v_proj
    v.order = v.order.flip(0)
    with pytest.raises(ValueError, match=r"layers\.0\.attention\.q_proj, .*v_proj: .* features are in other orders"):
        save_pretrained(model, tmp_path, quantized_as="gptq")
    model.layers[0].attention.v_proj = Linear(64, 32)
    with pytest.raises(ValueError, match=r"v_proj is not quantised, and in a file of 'gptq' it is one matrix with "):
        save_pretrained(model, tmp_path, quantized_as="gptq")


def test_a_quantised_matrix_that_is_woven_of_layers_is_refused_by_its_name(tmp_path):
    """GPT-2's is transposed, q, k and v side by side."""
    save_pretrained(make(), tmp_path / "llama", quantized_as="gptq")
    said = json.loads((tmp_path / "llama" / "config.json").read_text())["quantization_config"]
    parts = {"mixer": AttentionConfig(4, qkv_bias=True, out_bias=True), "mlp": MLPConfig("gelu", bias=True)}
    block = BlockConfig(**parts, norm=LayerNormConfig(), positions=NoPositionsConfig())
    config = TransformerConfig(64, 32, 2, 64, layers=(block,), position_embedding="learned")
    save_pretrained(Transformer(config), tmp_path / "gpt2")
    weights = load_file(tmp_path / "gpt2" / "model.safetensors")
    weights["transformer.h.0.attn.c_attn.qweight"] = torch.zeros(8, 192, dtype=torch.int32)
    save_file(weights, tmp_path / "gpt2" / "model.safetensors")
    config = json.loads((tmp_path / "gpt2" / "config.json").read_text()) | {"quantization_config": said}
    (tmp_path / "gpt2" / "config.json").write_text(json.dumps(config))
    message = r"h\.0\.attn\.c_attn is quantised, and it is 3 layers here, layers\.0\.attention\.q_proj, "
    with pytest.raises(ValueError, match=message):
        from_pretrained(tmp_path / "gpt2")
