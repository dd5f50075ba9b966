"""AWQ: its scales change nothing that is not rounded, and make rounding cheaper."""

import pytest
import torch
from block_kinds import MIXERS

from cs336.inference.load import load_model
from cs336.inference.quantization import awq, compress, layerwise
from cs336.inference.quantization.awq import awq_block
from cs336.inference.quantization.layerwise import fill_block
from cs336.inference.quantization.rounding import nearest
from cs336.models import BlockConfig, Transformer, TransformerConfig, save_pretrained
from cs336.nn import AttentionConfig, LayerNormConfig, MLPConfig, MoEConfig, QuantizedWeight
from cs336.tokenizer import Tokenizer

BLOCKS = MIXERS | {
    "sandwich": BlockConfig(AttentionConfig(4), placement="sandwich"),
    "reordered": BlockConfig(AttentionConfig(4), placement="reordered"),
    "post": BlockConfig(AttentionConfig(4), placement="post"),
    "biases": BlockConfig(
        AttentionConfig(4, qkv_bias=True, out_bias=True), MLPConfig(gated=True, bias=True), LayerNormConfig()
    ),
    "clamped": BlockConfig(AttentionConfig(4), MLPConfig("clamped_gelu", gated=True, bias=True, d_ff=48)),
    "experts with biases": BlockConfig(AttentionConfig(4), MoEConfig(4, 2, d_ff=48, bias=True)),
    "gpt-oss": BlockConfig(
        AttentionConfig(4, 2, sinks=True, qkv_bias=True, out_bias=True),
        MoEConfig(4, 2, d_ff=48, activation="clamped_gelu", bias=True),
    ),
    "parallel experts": BlockConfig(
        AttentionConfig(4, 2), MoEConfig(4, 2, num_shared=1, shared_gate=True), parallel=True
    ),
}


def model_of(block):
    """With features of very different sizes."""
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(64, 32, 2, 32, init_std=0.2, layers=(block,))).double().eval()
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter.data *= torch.rand(parameter.shape) ** 3 * 4 + 0.1
        if name.endswith("bias"):
            parameter.data += torch.randn(parameter.shape) / 4
    return model


@pytest.mark.parametrize("name", BLOCKS)
def test_scales_change_no_logit(name, tmp_path, monkeypatch):
    model, ids = model_of(BLOCKS[name]), torch.randint(0, 64, (4, 32))
    with torch.inference_mode():
        want = model(ids)
    monkeypatch.setattr(awq, "fill_block", lambda block, *others: "")
    monkeypatch.setattr(
        awq, "_search", lambda block, fold, scheme: torch.rand(len(fold.inputs[0].hessian)).double() + 0.5
    )
    before = {n: t.clone() for n, t in model.layers.named_parameters()}
    scheme = layerwise.Scheme("int4", 16)
    layerwise.quantize_blocks_(model, [ids], scheme, lambda *a: awq_block(*a, scheme), tmp_path, say=lambda line: None)
    changed = {
        n.rpartition(".")[0].split(".", 1)[1]
        for n, t in model.layers.named_parameters()
        if n in before and not torch.equal(t, before[n])
    }
    assert ("attention_norm" in changed) == (name not in ("post", "reordered"))
    with torch.inference_mode():
        torch.testing.assert_close(model(ids), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["attention", "experts", "mamba2", "latent"])
def test_layer_outputs_are_nearer_than_those_of_rounding(name, tmp_path):
    off = {}
    for how in ("rounded", "awq"):
        model, ids = model_of(BLOCKS[name]), torch.randint(0, 64, (8, 32), generator=torch.Generator().manual_seed(1))
        scheme = layerwise.Scheme("int4", 16, zeros=True)

        def rounded(block, inputs, scheme=scheme):
            def quantize(weight, group, read) -> QuantizedWeight:
                return nearest(weight, 4, group, asymmetric=True)

            return fill_block(block, inputs, scheme, quantize)

        lines = []
        method = rounded if how == "rounded" else lambda *a, scheme=scheme: awq_block(*a, scheme)
        layerwise.quantize_blocks_(model, [ids], scheme, method, tmp_path / how, say=lines.append)
        off[how] = [float(line.split()[-2].rstrip("%")) for line in lines]
    assert all(a < 0.95 * b for a, b in zip(off["awq"], off["rounded"], strict=True))


def test_a_group_is_cut_where_that_is_cheapest():
    """Against every share tried by hand, one group at a time; 10 features are one group and a part of one."""
    torch.manual_seed(0)
    w, x = torch.randn(5, 10).double(), torch.randn(50, 10).double() * torch.linspace(0.1, 2, 10)
    w[1, 3], w[2], w[4, 9] = 9, 0, -7
    got = awq.cut(w, x.T @ x, 3, 6, asymmetric=True)
    kept = set()
    for n in range(5):
        for features in (slice(0, 6), slice(6, 10)):
            offs, cuts = [], []
            for share in (1 - i / 20 for i in range(10)):
                most = w[n, features].abs().max() * share
                cuts.append(w[n : n + 1, features].clamp(-most, most))
                rounded = nearest(cuts[-1], 3, 6, asymmetric=True).dequantized(6)
                offs.append(((rounded - w[n, features]) @ x[:, features].T).square().sum().item())
            best = min(range(10), key=offs.__getitem__)
            kept.add(best)
            torch.testing.assert_close(got[n : n + 1, features], cuts[best], rtol=0, atol=0)
    assert len(kept) > 2


def test_a_directory_of_it(tmp_path):
    torch.manual_seed(0)
    config = TransformerConfig(257, 32, num_layers=2, d_model=32, num_heads=4)
    tokenizer = Tokenizer({i: bytes([i]) for i in range(256)}, [], ["<|endoftext|>"])
    save_pretrained(Transformer(config).eval(), tmp_path / "model", tokenizer)
    (tmp_path / "text.txt").write_text("the cat sat on the mat; " * 40)
    text, options = tmp_path / "text.txt", {"bits": 8, "asymmetric": True}
    found = compress(tmp_path / "model", tmp_path / "awq", "awq", 32, calibrate=text, **options)
    assert found.bits_after == pytest.approx(found.bits_before, abs=1e-2)
    layer = load_model(tmp_path / "awq").layers[0].mlp.up_proj
    assert (layer.method, layer.zeros.dtype, layer.order) == ("int8", torch.int16, None)
    with pytest.raises(ValueError, match="act_order is of gptq, got it with awq"):
        compress(tmp_path / "model", tmp_path / "b", "awq", 32, calibrate=text, act_order=True)
