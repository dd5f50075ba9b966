"""GPTQ: the algorithm against the paper's, and against rounding to the nearest; the verb, killed and gone on."""

import json

import pytest
import torch
from block_kinds import MIXERS

from cs336.cli.program import main
from cs336.inference import LLM, SamplingParams
from cs336.inference.load import load_model
from cs336.inference.quantization import calibrated, compress, gptq, layerwise
from cs336.inference.quantization.gptq import gptq_block
from cs336.inference.quantization.rounding import nearest
from cs336.models import Transformer, TransformerConfig, save_pretrained
from cs336.nn import QuantizedLinear
from cs336.nn.quantized import quantizable
from cs336.tokenizer import Tokenizer

CONFIG = TransformerConfig(257, 64, num_layers=2, d_model=64, num_heads=4, num_kv_heads=2)
TOKENIZER = Tokenizer({i: bytes([i]) for i in range(256)}, [], ["<|endoftext|>"])


def reference(w, hessian, bits, group, act_order, asymmetric):
    """The paper's algorithm in float64, one feature at a time, with the whole inverse factor; and the rows in which a
    weight lay between the least two numbers, as a group's first one does where it is the largest, below 0."""
    N, K = w.shape
    order = torch.argsort(hessian.diagonal(), descending=True) if act_order else torch.arange(K)
    w, hessian, half = w[:, order].clone(), hessian[order][:, order], 2 ** (bits - 1)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(K, dtype=torch.float64)
    u = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    q, ties = torch.zeros_like(w), torch.zeros(N, dtype=torch.bool)
    for k in range(K):
        if k % group == 0:
            part = w[:, k : k + group]
            scale, zero = part.abs().amax(1) / (half - 0.5), torch.zeros(N, dtype=torch.float64)
            if asymmetric:
                low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
                scale = (high - low) / (2 * half - 1)
                zero = (-half - low / scale).round()
        ties |= (w[:, k] / scale + half - 0.5).abs() < 1e-9
        level = ((w[:, k] / scale).round() + zero).clamp(-half, half - 1)
        q[:, k] = (level - zero) * scale
        error = (w[:, k] - q[:, k]) / u[k, k]
        w[:, k:] -= error[:, None] * u[k, k:]
    return q[:, order.argsort()], ties


def correlated(rows, features, seed):
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(features, features, generator=generator) * torch.rand(features, generator=generator) ** 2
    return torch.randn(rows, features, generator=torch.Generator().manual_seed(seed)) @ mix


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("features", "group"), [(40, 16), (300, 48), (160, 160), (130, 128)])
def test_it_is_the_papers_algorithm(features, group, act_order, asymmetric):
    torch.manual_seed(0)
    w, x = torch.randn(24, features, dtype=torch.float64), correlated(500, features, 0).double()
    found = gptq(w, x.t() @ x, bits=4, group=group, act_order=act_order, asymmetric=asymmetric)
    want, ties = reference(w, x.t() @ x, 4, group, act_order, asymmetric)
    assert ties.sum() < 16
    torch.testing.assert_close(found.dequantized(group)[~ties], want[~ties], rtol=1e-9, atol=1e-9)
    assert (found.order is not None, found.zeros is not None) == (act_order, asymmetric)
    assert found.q.min() >= -8
    assert found.q.max() <= 7


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("act_order", [False, True])
def test_layer_outputs_are_nearer_than_those_of_rounding(bits, act_order):
    torch.manual_seed(0)
    w, x, held_out = torch.randn(64, 128), correlated(600, 128, 2), correlated(600, 128, 3)
    found = gptq(w, x.t() @ x, bits=bits, group=32, act_order=act_order).dequantized(32) - w
    rounded = nearest(w, bits, 32).dequantized(32) - w
    for inputs in (x, held_out):
        assert (inputs @ found.t()).norm() < (0.7 if act_order else 0.9) * (inputs @ rounded.t()).norm()


def test_features_that_are_never_there_are_rounded_and_what_is_not_finite_refused():
    w, x = torch.randn(8, 32), torch.randn(100, 32)
    x[:, 5] = 0
    found = gptq(w, x.t() @ x, group=32)
    assert torch.equal(found.q[:, 5], nearest(w, 4, 32).q[:, 5])
    assert torch.equal(gptq(w, torch.zeros(32, 32), group=16).q, nearest(w, 4, 16).q)
    with pytest.raises(ValueError, match="the weight is not finite"):
        gptq(w * float("nan"), x.t() @ x)
    with pytest.raises(ValueError, match=r"the Hessian must be \(32, 32\) finite numbers, got \(31, 31\)"):
        gptq(w, torch.eye(31))
    with pytest.raises(ValueError, match="not positive definite"):
        gptq(w, -torch.ones(32, 32) + 1.5 * torch.eye(32))


@pytest.mark.parametrize("name", MIXERS)
def test_every_mixer_and_experts(name, tmp_path):
    """All layers but those that are kept, each nearer than rounded; from its files and as a saved model the same."""
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(64, 32, 2, 32, init_std=0.2, layers=(MIXERS[name],) * 2)).eval()
    plain = {n: t.clone() for n, t in model.state_dict().items()}
    batches = [torch.randint(0, 64, (4, 32)) for _ in range(2)]
    scheme = layerwise.Scheme("int4", 16, order=True)
    errors = []

    def quantize(block, inputs):
        read = {name: each for each in inputs for name in each.layers}
        old = {name: layer.weight for name, layer in quantizable(block).items()}
        said = gptq_block(block, inputs, scheme)
        for name, weight in old.items():
            new = block.get_submodule(name)
            rounded = QuantizedLinear.like(torch.nn.Linear(weight.shape[1], weight.shape[0], False), "int4", new.group)
            rounded.fill(nearest(weight, 4, new.group))
            errors.append([layerwise.output_error(weight, q, read[name])[0] for q in (new, rounded)])
        return said

    lines = []
    layerwise.quantize_blocks_(model, batches, scheme, quantize, tmp_path / "blocks", say=lines.append)
    assert len(lines) == 2
    assert "block 2 of 2: outputs are" in lines[1]
    found, rounded = map(sum, zip(*errors, strict=True))
    assert 0 < found < 0.8 * rounded
    assert not quantizable(model.layers)
    with torch.inference_mode():
        logits = model(batches[0])
    again = Transformer(model.config).eval()
    again.load_state_dict(plain)
    layerwise.quantize_blocks_(again, batches, scheme, None, tmp_path / "blocks", say=lines.append)
    assert lines[-1] == "block 2 of 2: done before"
    save_pretrained(model, tmp_path / "out")
    with torch.inference_mode():
        assert torch.equal(again(batches[0]), logits)
        assert torch.equal(load_model(tmp_path / "out")(batches[0]), logits)


def test_a_block_reads_what_the_quantised_ones_before_it_write(tmp_path):
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(64, 32, 2, 32, init_std=0.2, layers=(MIXERS["attention"],) * 2)).eval()
    ids, scheme, hessians = torch.randint(0, 64, (4, 32)), layerwise.Scheme("int4", None), []

    def quantize(block, inputs):
        hessians.append(next(each.hessian for each in inputs if "attention.q_proj" in each.layers))
        return gptq_block(block, inputs, scheme)

    layerwise.quantize_blocks_(model, [ids[:1], ids[1:]], scheme, quantize, tmp_path, say=lambda line: None)
    read = []
    model.layers[1].attention.q_proj.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    with torch.inference_mode():
        model(ids)
    x = read[0].flatten(0, -2)
    torch.testing.assert_close(hessians[1], x.t() @ x, rtol=1e-4, atol=1e-3)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model that has learned the words of text.txt."""
    torch.manual_seed(0)
    words = "the cat sat on a mat and then the old dog lay down by the door while it rained all day long"
    words = words.split()
    text = " ".join(words[i] for i in torch.randint(0, len(words), (4000,)).tolist())
    rows = torch.tensor(list(text.encode())[: 64 * 250]).view(-1, 64)
    model = Transformer(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    for step in range(60):
        batch = rows[step % 15 :: 15]
        optimizer.zero_grad()
        (model(batch[:, :-1], targets=batch[:, 1:]) / batch[:, 1:].numel()).backward()
        optimizer.step()
    place = tmp_path_factory.mktemp("place")
    save_pretrained(model.eval(), place / "model", TOKENIZER)
    (place / "text.txt").write_text(text)
    return place


def test_fewer_bits_per_byte_than_rounding_needs(place, tmp_path):
    rows = torch.tensor(list((place / "text.txt").read_bytes()[-64 * 40 :])).view(-1, 64)
    lost = {}
    for how in ("rounded", "gptq"):

        def quantize(block, inputs, how=how):
            read = {name: each for each in inputs for name in each.layers}
            for name, (old, new) in layerwise.Scheme("int4", None).replace(block).items():
                few = {"bits": 2, "group": new.group}
                new.fill(gptq(old.weight, read[name].hessian, **few) if how == "gptq" else nearest(old.weight, **few))
            return ""

        model = load_model(place / "model")
        with torch.inference_mode():
            before = model(rows[:, :-1], targets=rows[:, 1:])
            scheme = layerwise.Scheme("int4", None)
            layerwise.quantize_blocks_(model, [rows[:20, :-1]], scheme, quantize, tmp_path / how, say=lambda line: None)
            lost[how] = float((model(rows[20:, :-1], targets=rows[20:, 1:]) * 2 - before) / rows.numel())
    assert lost["gptq"] < 0.5 * lost["rounded"]


def run(place, out, *more):
    arguments = ["--calibrate", str(place / "text.txt"), "--samples", "20", "--group-size", "32", *more]
    return main(["compress", str(place / "model"), "--out", str(out), "--method", "gptq", *arguments])


def test_the_verb_goes_on_where_it_was_killed(place, tmp_path, capsys, monkeypatch):
    assert run(place, tmp_path / "whole", "--act-order") == 0
    said = capsys.readouterr().out
    assert "block 2 of 2: outputs are" in said
    assert "bits per byte, in" in said
    found = json.loads((tmp_path / "whole" / "compression.json").read_text())
    assert found["bytes_after"] < 0.5 * found["bytes_before"]
    assert abs(found["bits_after"] - found["bits_before"]) < 0.02 * found["bits_before"]

    calls, method = [], calibrated.BLOCK_METHODS["gptq"]

    def killed(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return method(*args, **options)

    monkeypatch.setitem(calibrated.BLOCK_METHODS, "gptq", killed)
    out = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        compress(place / "model", out, "gptq", 32, calibrate=place / "text.txt", samples=20, act_order=True)
    assert run(place, out, "--act-order") == 0
    assert len(calls) == 3  # the first block is not done again
    assert "block 1 of 2: done before" in capsys.readouterr().out
    weights = "model.safetensors"
    assert (out / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
    assert run(place, out, "--act-order") == 0
    assert len(calls) == 3
    (out / weights).unlink()
    assert run(place, out, "--act-order") == 0
    assert len(calls) == 5
    assert (out / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
    capsys.readouterr()
    assert main(["generate", str(out), "--prompt", "the c", "--temperature", "0", "--max-tokens", "8"]) == 0
    text = LLM(out, quiet=True).generate("the c", SamplingParams(temperature=0, max_tokens=8))[0].text
    assert capsys.readouterr().out.strip() == "the c" + text
    assert run(place, out) == 0
    assert len(calls) == 7


def test_what_it_cannot_do_is_said(place, tmp_path, capsys):
    model, text = place / "model", place / "text.txt"
    with pytest.raises(ValueError, match="gptq reads calibration text: name one with calibrate"):
        compress(model, tmp_path / "a", "gptq")
    with pytest.raises(ValueError, match="int4 rounds to the nearest and reads no text"):
        compress(model, tmp_path / "a", "int4", calibrate=text)
    with pytest.raises(ValueError, match="bits must be 4 or 8, got 3"):
        compress(model, tmp_path / "a", "gptq", calibrate=text, bits=3)
    with pytest.raises(FileNotFoundError, match=r"nothing.txt does not exist"):
        compress(model, tmp_path / "a", "gptq", calibrate=tmp_path / "nothing.txt")
    for form, group, options, message in (  # before the text is read, and nothing is written
        ("awq", 32, {"act_order": True}, "AWQ's format has no order of features"),
        ("awq", 32, {"bits": 8}, "AWQ's format holds int4 weights, got int8"),
        ("compressed-tensors", 24, {}, "q_proj: compressed-tensors has whole groups"),
        ("zip", 32, {}, "the format must be one of cs336, compressed-tensors, gptq, awq, got 'zip'"),
        ("cs336", 999, {}, "nothing to quantise in groups of 999"),
    ):
        with pytest.raises(ValueError, match=message):
            compress(model, tmp_path / "a", "gptq", group, calibrate=text, format=form, **options)
    assert not (tmp_path / "a").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    assert run(place, tmp_path / "mine") == 2
    assert "which this job did not make" in capsys.readouterr().err
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "000.safetensors").write_bytes(b"damaged")
    network, scheme = load_model(model), layerwise.Scheme("int4", 32)
    with pytest.raises(ValueError, match=r"000.safetensors is no block of this model"):
        layerwise.quantize_blocks_(network, [torch.ones(1, 8).long()], scheme, gptq_block, tmp_path / "b")
