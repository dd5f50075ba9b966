"""What is taken out is what counts least, and what stays is what it was."""

import dataclasses
import json
import shutil

import pytest
import torch

from cs336.cli.program import main
from cs336.compression import (
    block_influence,
    drop_layers,
    lowest,
    lowest_2_4,
    prune,
    prune_depth,
    prune_weights_,
    prune_width,
)
from cs336.compression.blocks import prunable
from cs336.compression.pruning import zeros
from cs336.inference.quantization import quantize_
from cs336.models import BlockConfig, Transformer, TransformerConfig, from_pretrained, save_pretrained
from cs336.nn import (
    AttentionConfig,
    GELUConfig,
    HyenaConfig,
    LatentAttentionConfig,
    LinearAttentionConfig,
    Mamba2Config,
    MoEConfig,
)
from cs336.tokenizer import Tokenizer

CONFIG = TransformerConfig(64, 16, 3, 32, num_heads=4, num_kv_heads=2, d_ff=48, init_std=0.1)
BLOCKS = {
    "gelu": BlockConfig(AttentionConfig(4, 2, qkv_bias=True, qk_norm=True, out_bias=True), GELUConfig(40)),
    "latent": BlockConfig(LatentAttentionConfig(2, 16, 12, rope_head_dim=8)),
    "linear": BlockConfig(LinearAttentionConfig(2, 8)),
    "mamba2": BlockConfig(Mamba2Config(head_dim=8, state_dim=8)),
    "hyena": BlockConfig(HyenaConfig(16)),
    "moe": BlockConfig(AttentionConfig(4), MoEConfig(4, 2, d_ff=16, num_shared=2, shared_gate=True)),
}


def model_of(config=CONFIG, seed=0):
    torch.manual_seed(seed)
    return Transformer(config).eval()


def of(block):
    return model_of(TransformerConfig(64, 16, 2, 32, init_std=0.1, layers=(block,)))


def batches(count=3):
    return [torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(i)) for i in range(count)]


def test_the_lowest_scores_are_found():
    score = torch.tensor([[4.0, 1, 3, 2], [8, 7, 6, 5]])
    assert lowest(score, 0.5, by_row=True).tolist() == [[False, True, False, True], [False, False, True, True]]
    assert lowest(score, 0.5, by_row=False).tolist() == [[True] * 4, [False] * 4]
    assert lowest(torch.rand(3, 100), 0.29, by_row=True).sum(1).tolist() == [29] * 3
    assert not lowest(score, 0, by_row=True).any()
    wide = torch.rand(5, 24, generator=torch.Generator().manual_seed(0))
    mask = lowest_2_4(wide)
    assert (mask.view(5, 6, 4).sum(-1) == 2).all()
    kept, gone = wide.masked_fill(mask, 9).view(-1, 4).amin(1), wide.masked_fill(~mask, 0).view(-1, 4).amax(1)
    assert (gone <= kept).all()


def test_wanda_is_the_paper_s_formula_layer_by_layer():
    model, dense = model_of(), model_of()
    prune_weights_(model, "wanda", 0.5, batches())
    ids = torch.cat(batches())
    with torch.no_grad():
        x = dense.embedding(ids)
        for ours, block in zip(model.layers, dense.layers, strict=True):
            read = block.attention_norm(x).flatten(0, 1)
            score = block.attention.q_proj.weight.abs() * read.norm(dim=0)
            least = score.kthvalue(16, dim=1, keepdim=True).values
            expected = block.attention.q_proj.weight.masked_fill(score <= least, 0)
            torch.testing.assert_close(ours.attention.q_proj.weight, expected, rtol=0, atol=0)
            x = ours(x)  # the next one sees the pruned ones
    assert abs(zeros(model) - 0.5) < 1e-6


@pytest.mark.parametrize("score", ["magnitude", "wanda"])
@pytest.mark.parametrize("sparsity", [0.3, "2:4"])
def test_weights_are_zero_or_what_they_were(score, sparsity):
    model, dense = model_of(), model_of()
    prune_weights_(model, score, sparsity, batches())
    for ours, theirs in zip(model.layers, dense.layers, strict=True):
        for name, layer in prunable(ours).items():
            before = theirs.get_submodule(name).weight
            assert ((layer.weight == 0) | (layer.weight == before)).all()
            if sparsity == "2:4":
                assert ((layer.weight == 0).view(-1, 4).sum(1) == 2).all()
            elif score == "magnitude":
                assert before[layer.weight == 0].abs().max() <= layer.weight[layer.weight != 0].abs().min()
    assert torch.equal(model.embedding.weight, dense.embedding.weight)
    assert torch.equal(model.head.weight, dense.head.weight)
    assert zeros(model) == pytest.approx(0.5 if sparsity == "2:4" else 0.3, abs=0.03)


@pytest.mark.parametrize("kind", BLOCKS)
def test_any_mixer_is_pruned(kind):
    for score in ("magnitude", "wanda"):
        model = prune_weights_(of(BLOCKS[kind]), score, 0.5, batches())
        assert zeros(model) > 0.4
        assert model(batches()[0]).isfinite().all()
        kept = [p for name, p in model.named_parameters() if name.endswith(("router.weight", "shared_gate.weight"))]
        assert len(kept) == (4 if kind == "moe" else 0)
        assert all((p != 0).all() for p in kept)
    assert len(prune_depth(of(BLOCKS[kind]), 0.5, batches()).layers) == 1


def test_influence_is_one_less_the_cosine():
    model, ids = model_of(), batches()
    with torch.no_grad():
        model.layers[1].attention.o_proj.weight.zero_()
        model.layers[1].mlp.down_proj.weight.zero_()
        x, found = model.embedding(torch.cat(ids)), []
        for block in model.layers:
            y = block(x)
            found.append(1 - (x * y).sum(-1).div(x.norm(dim=-1) * y.norm(dim=-1)).mean())
            x = y
    influence = block_influence(model, ids)
    torch.testing.assert_close(influence, torch.stack(found).double(), atol=1e-6, rtol=1e-5)
    assert influence.argmin() == 1
    smaller = prune_depth(model, 0.34, ids)  # a block that does nothing goes, and nothing changes
    assert smaller.config.num_layers == 2
    assert smaller.config.layers is None
    torch.testing.assert_close(smaller(ids[0]), model(ids[0]))


def test_layers_are_dropped_by_number():
    model = model_of()
    smaller = drop_layers(model, [0, 2])
    assert torch.equal(smaller.layers[1].mlp.up_proj.weight, model.layers[2].mlp.up_proj.weight)
    for keep in ([], [2, 0], [0, 0], [3], [-1, 2]):
        with pytest.raises(ValueError, match=r"keep must be layers in 0\.\.2"):
            drop_layers(model, keep)


@pytest.mark.parametrize("config", [CONFIG, TransformerConfig(64, 16, 2, 32, init_std=0.1, layers=(BLOCKS["gelu"],))])
def test_neurons_and_heads_that_say_nothing_go_and_nothing_changes(config):
    model, ids = model_of(config), batches()
    with torch.no_grad():
        for block in model.layers:
            block.mlp.down_proj.weight.mul_(2)
            dead = torch.arange(3, block.mlp.up_proj.out_features)[::2][:16]
            for layer in [block.mlp.up_proj] + ([block.mlp.gate_proj] if block.mlp.gated else []):
                layer.weight[dead] = 0
            block.attention.v_proj.weight[:8] = 0
            if block.attention.v_proj.bias is not None:
                block.attention.v_proj.bias[:8] = 0
    d_ff = config.ff_size
    smaller = prune_width(model, 16 / d_ff, ids, head_sparsity=0.5)
    assert smaller.config.ff_size == d_ff - 16
    assert (smaller.layers[0].attention.num_heads, smaller.layers[0].attention.num_kv_heads) == (2, 1)
    assert smaller.layers[0].attention.head_dim == 8
    torch.testing.assert_close(smaller(ids[0]), model(ids[0]), atol=1e-5, rtol=1e-4)
    assert prune_width(model, 0.99, ids).config.ff_size == 8


def test_a_head_that_stays_keeps_its_sink():
    mixer = AttentionConfig(num_heads=4, num_kv_heads=2, sinks=True)
    model, ids = of(dataclasses.replace(BLOCKS["gelu"], mixer=mixer)), batches()
    with torch.no_grad():
        for block in model.layers:
            block.attention.sinks.copy_(torch.arange(4.0))
            block.attention.v_proj.weight[:8] = 0
    smaller = prune_width(model, 0.0, ids, head_sparsity=0.5)
    assert smaller.layers[1].attention.sinks.tolist() == [2, 3]
    torch.testing.assert_close(smaller(ids[0]), model(ids[0]), atol=1e-5, rtol=1e-4)


def test_what_cannot_be_pruned_is_refused_by_name():
    model = model_of()
    with pytest.raises(ValueError, match="score must be magnitude or wanda, got 'sparsegpt'"):
        prune_weights_(model, "sparsegpt", 0.5)
    with pytest.raises(
        ValueError, match=r"layers\.0\.attention\.q_proj: sparsity must be '2:4' or a share .*, got 1\.0"
    ):
        prune_weights_(model, "magnitude", 1.0)
    with pytest.raises(ValueError, match="there is no calibration text"):
        prune_weights_(model, "wanda", 0.5)
    with pytest.raises(ValueError, match=r"a sparsity of 0\.2 takes 0 of 3 layers: take 1 to 2"):
        prune_depth(model, 0.2, batches())
    with pytest.raises(ValueError, match="nothing is pruned"):
        prune_width(of(BLOCKS["moe"]), 0.5, batches())
    with pytest.raises(ValueError, match="head_sparsity must be a share"):
        prune_width(model, 0.5, batches(), head_sparsity=1)
    with pytest.raises(ValueError, match="multiple of 4, got 6"):
        lowest_2_4(torch.rand(2, 6))
    with torch.no_grad():
        model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj: a weight, or what .*, is not finite"):
        prune_weights_(model, "magnitude", 0.5)
    with pytest.raises(ValueError, match="is quantised: prune it first"):
        prune_weights_(quantize_(model_of(), "int8", 16), "magnitude", 0.5)


@pytest.fixture
def saved(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the dog sat on the log. " * 60)
    tokenizer = Tokenizer.train([text.read_text()], 280, ["<|endoftext|>"])
    save_pretrained(model_of(TransformerConfig(280, 16, 4, 32, num_heads=4, d_ff=64)), tmp_path / "model", tokenizer)
    return tmp_path / "model", text


METHODS = [("magnitude", "0.5"), ("wanda", "2:4"), ("prune-depth", "0.25"), ("prune-width", "0.5")]


@pytest.mark.parametrize(("method", "sparsity"), METHODS)
def test_the_verb_writes_a_model_that_loads_and_does_nothing_twice(saved, tmp_path, capsys, method, sparsity):
    model, text = saved
    out = tmp_path / "out"
    command = ["compress", str(model), "--method", method, "--sparsity", sparsity, "--calibrate", str(text)]
    assert main([*command, "--out", str(out)]) == 0
    first = (out / "model.safetensors").read_bytes()
    smaller, said = from_pretrained(out), json.loads((out / "compression.json").read_text())
    assert said["parameters_after"] == smaller.config.num_parameters()
    assert (said["zeros"] > 0.4) == (method in ("magnitude", "wanda"))
    assert smaller.config.num_layers == (3 if method == "prune-depth" else 4)
    assert smaller.config.ff_size == (32 if method == "prune-width" else 64)
    assert "bits per byte" in capsys.readouterr().out
    (out / "compression.json").unlink()  # stopped before it was measured
    assert main([*command, "--out", str(out)]) == 0
    assert capsys.readouterr().out.count("(done before)") == 2
    assert (out / "model.safetensors").read_bytes() == first
    (out / "model.safetensors").unlink()
    assert main([*command, "--out", str(out)]) == 0
    assert capsys.readouterr().out.count("(done before)") == 2
    assert (out / "model.safetensors").read_bytes() == first
    assert json.loads((out / "compression.json").read_text()) == said


def test_the_job_refuses_what_is_not_its_own(saved, tmp_path, capsys):
    model, text = saved
    shutil.copytree(model, tmp_path / "other")
    with pytest.raises(ValueError, match=r"holds config\.json, which this job did not make"):
        prune(model, tmp_path / "other", "magnitude", calibrate=text)
    with pytest.raises(FileNotFoundError, match="expected a text to calibrate with"):
        prune(model, tmp_path / "out", "wanda", calibrate=tmp_path / "none.txt")
    with pytest.raises(ValueError, match="method must be one of magnitude, wanda"):
        prune(model, tmp_path / "out", "lottery", calibrate=text)
    command = ["compress", str(model), "--method", "wanda", "--calibrate", str(text), "--out", str(tmp_path / "out")]
    assert main([*command, "--sparsity", "half"]) == 2
    assert "--sparsity is 2:4 or a share from 0 to below 1, got 'half'" in capsys.readouterr().err
    assert main([*command, "--sparsity", "1.5"]) == 2
    assert "sparsity must be 2:4 or a share from 0 to below 1, got 1.5" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"head_sparsity must be a share from 0 to below 1, got -0\.5"):
        prune(model, tmp_path / "out", "prune-width", calibrate=text, head_sparsity=-0.5)
    with pytest.raises(ValueError, match="sparsity must be a share from 0 to below 1, got '2:4'"):
        prune(model, tmp_path / "out", "prune-depth", calibrate=text, sparsity="2:4")
    assert not (tmp_path / "out").exists()  # nothing was calibrated first
