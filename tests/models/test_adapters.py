"""Low-rank adapters in PEFT's layout: merged as their formula says, and as PEFT merges them, both ways."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import save_file

from cs336.models import Transformer, TransformerConfig, from_pretrained, save_pretrained
from cs336.models.huggingface import base_of, read_config, save_adapter
from cs336.models.huggingface.adapter import ADAPTER, ADAPTER_WEIGHTS, PREFIX
from cs336.models.huggingface.directory import FAMILIES

QUERY = "model.layers.1.self_attn.q_proj"
CONFIG = TransformerConfig(97, 32, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, d_ff=40, init_std=0.2)
IDS = torch.arange(12).view(2, 6)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(3)
    directory = tmp_path_factory.mktemp("base")
    save_pretrained(Transformer(CONFIG), directory)
    return directory


def low_rank(out, inside, rank=3):
    return torch.randn(rank, inside), torch.randn(out, rank)


def write(directory, tensors, base, **fields):
    config = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": 3, "lora_alpha": 6, "bias": "none"}
    directory.mkdir(exist_ok=True)
    (directory / ADAPTER).write_text(json.dumps(config | fields))
    save_file({f"{PREFIX}{name}": t.contiguous() for name, t in tensors.items()}, directory / ADAPTER_WEIGHTS)
    return directory


@pytest.mark.parametrize(
    ("fields", "scale"),
    [
        ({}, 2.0),
        ({"use_rslora": True}, 6 / 3**0.5),
        ({"alpha_pattern": {"q_proj": 9}}, 3.0),
        ({"alpha_pattern": {"layers.0.self_attn.q_proj": 9, "1.self_attn.q_proj": 12}}, 4.0),
        ({"alpha_pattern": {r"^model\.layers\.1\.self_attn\.q_proj$": 9}}, 3.0),
        ({"alpha_pattern": {"^layers.1.self_attn.q_proj": 9, ".*tn.q_proj": 12}}, 4.0),
        ({"alpha_pattern": {"proj": 9}, "lora_dropout": 0.1, "target_modules": ["q_proj"], "use_dora": False}, 2.0),
    ],
)
def test_a_layer_becomes_its_sum(base, tmp_path, fields, scale):
    plain = from_pretrained(base)
    weight = plain.layers[1].attention.q_proj.weight
    a, b = low_rank(*weight.shape)
    tensors = {f"{QUERY}.lora_A.weight": a, f"{QUERY}.lora_B.weight": b}
    adapted = from_pretrained(write(tmp_path / "adapter", tensors, base, **fields))
    expected = weight.double() + scale * b.double() @ a.double()
    torch.testing.assert_close(adapted.layers[1].attention.q_proj.weight.double(), expected, rtol=1e-5, atol=1e-5)
    others = plain.state_dict().items()
    assert all(torch.equal(t, adapted.state_dict()[n]) for n, t in others if n != "layers.1.attention.q_proj.weight")


def test_embeddings_and_what_was_learned_whole(base, tmp_path):
    plain = from_pretrained(base)
    V, M = plain.embedding.weight.shape
    head, a, b = torch.randn(V, M), torch.randn(3, V), torch.randn(M, 3)
    name = "model.embed_tokens.lora_embedding_"
    tensors = {"lm_head.weight": head, f"{name}A": a, f"{name}B": b}
    adapted = from_pretrained(write(tmp_path / "adapter", tensors, base, modules_to_save=["lm_head"]))
    assert torch.equal(adapted.head.weight, head)
    torch.testing.assert_close(adapted.embedding.weight, plain.embedding.weight + 2 * (b @ a).T)


def test_the_base_is_found_beside_the_adapter_too(base, tmp_path):
    a, b = low_rank(*from_pretrained(base).layers[0].mlp.up_proj.weight.shape)
    tensors = {"model.layers.0.mlp.up_proj.lora_A.weight": a, "model.layers.0.mlp.up_proj.lora_B.weight": b}
    (tmp_path / "base").symlink_to(base)
    adapter = write(tmp_path / "adapter", tensors, "../base")
    assert base_of(adapter).resolve() == base.resolve()
    assert read_config(adapter) == read_config(base)
    (adapter / "chat_template.jinja").write_text("its own")
    assert from_pretrained(adapter).chat_template == "its own"
    with pytest.raises(FileNotFoundError, match="adapts 'someone/model', which is no directory"):
        from_pretrained(write(tmp_path / "far", tensors, "someone/model"))


def test_what_does_not_fit_is_refused(base, tmp_path):
    a, b = low_rank(*from_pretrained(base).layers[1].attention.q_proj.weight.shape)
    good = {f"{QUERY}.lora_A.weight": a, f"{QUERY}.lora_B.weight": b}
    cases = [
        (good, {"use_dora": True}, "use_dora = True, which is not read"),
        (good, {"bias": "all"}, "bias = 'all'"),
        (good, {"new_trick": 1}, "new_trick = 1"),
        (good, {"init_lora_weights": "pissa_niter_4"}, "whose base is not the model's own"),
        (good, {"lora_alpha": "much"}, "lora_alpha = 'much' for .*: expected a finite number"),
        (good, {"lora_alpha": 10**400}, "expected a finite number"),
        (good, {"alpha_pattern": {"(": 1}}, r"alpha_pattern '\(': expected the end of a layer's name"),
        (good, {"alpha_pattern": {r"layers\.[01]\.*q_proj": 1}}, "spell out the layers"),
        (good, {"alpha_pattern": [1]}, "expected a table"),
        ({f"{QUERY}.lora_A.weight": a[:0], f"{QUERY}.lora_B.weight": b[:, :0]}, {}, "no product"),
        (good, {"peft_type": "IA3"}, "peft_type 'IA3': only LORA"),
        ({f"{QUERY}.lora_A.weight": a}, {}, "one of the two matrices of base_model.model.*q_proj"),
        (good | {f"{QUERY}.lora_B.weight": b[:, :2]}, {}, "no product"),
        (good | {f"{QUERY}.lora_B.weight": b[:-1]}, {}, "the base model's weight is"),
        (good | {f"{QUERY}.lora_B.weight": b * torch.inf}, {}, "not finite"),
        (
            {"model.layers.7.mlp.up_proj.lora_A.weight": a, "model.layers.7.mlp.up_proj.lora_B.weight": b},
            {},
            "layers.7",
        ),
        ({"score.weight": b}, {}, "adapts score.weight, which the base model's files do not have"),
    ]
    for i, (tensors, fields, message) in enumerate(cases):
        with pytest.raises(ValueError, match=message):
            from_pretrained(write(tmp_path / str(i), tensors, base, **fields))
    torn = write(tmp_path / "torn", good, base)
    (torn / ADAPTER_WEIGHTS).write_bytes((torn / ADAPTER_WEIGHTS).read_bytes()[:-8])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        from_pretrained(torn)
    (torn / ADAPTER_WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match="never pickles"):
        from_pretrained(torn)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "pattern", ["(.*)*" * 9 + "x", "(a|a)?" * 40 + "x", ".*" * 40 + "x", "." * 100_000, "a." * 50_000]
)
def test_no_pattern_takes_for_ever(base, tmp_path, pattern):
    a, b = low_rank(*from_pretrained(base).layers[1].attention.q_proj.weight.shape)
    tensors = {f"{QUERY}.lora_A.weight": a, f"{QUERY}.lora_B.weight": b}
    adapter = write(tmp_path, tensors, base, alpha_pattern={pattern: 1})
    if set(pattern) <= set("a."):  # a name, which no layer has
        from_pretrained(adapter)
        return
    with pytest.raises(ValueError, match="spell out the layers"):
        from_pretrained(adapter)


@pytest.mark.parametrize("interleaved", [False, True])
def test_written_and_read_again(tmp_path, interleaved):
    torch.manual_seed(4)
    model = Transformer(dataclasses.replace(CONFIG, rope_interleaved=interleaved))
    save_pretrained(model, tmp_path / "base")
    layer = model.layers[0].attention.q_proj
    a, b = low_rank(*layer.weight.shape)
    layers = {"layers.0.attention.q_proj": (a, b)}
    save_adapter(model, layers, tmp_path / "adapter", base=tmp_path / "base", alpha=1.5)
    with torch.no_grad():
        layer.weight += 0.5 * b @ a
    torch.testing.assert_close(from_pretrained(tmp_path / "adapter")(IDS), model.eval()(IDS), rtol=1e-4, atol=1e-4)


def test_layers_without_a_name_of_their_own(tmp_path):
    table = {"vocab_size": 97, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 32}
    model = Transformer(FAMILIES["gpt2"].config(table))
    with pytest.raises(FileNotFoundError):
        save_adapter(
            model, {"layers.0.attention.q_proj": low_rank(32, 32)}, tmp_path / "adapter", base=tmp_path, alpha=1
        )
    save_pretrained(model, tmp_path)
    for name in ("layers.0.attention.q_proj", "layers.0.mlp.up_proj"):  # in one with others; transposed
        with pytest.raises(ValueError, match=f"{name} is no linear layer of its own in files of gpt2"):
            save_adapter(model, {name: low_rank(32, 32)}, tmp_path / "adapter", base=tmp_path, alpha=1)
    assert not (tmp_path / "adapter").exists()


def test_layers_have_the_names_of_the_base_not_of_a_family_that_is_alike(tmp_path):
    """A Phi-3 of whole heads is a Llama, but for its files."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "pad_token_id": None}
    config = transformers.Phi3Config(num_attention_heads=4, max_position_embeddings=32, sliding_window=None, **sizes)
    transformers.Phi3ForCausalLM(config).save_pretrained(tmp_path)
    model, rows = from_pretrained(tmp_path), {"q_proj": (32, 32), "o_proj": (32, 32)}
    layers = {f"layers.0.attention.{name}": low_rank(*shape) for name, shape in rows.items()}
    with pytest.raises(ValueError, match=r"q_proj is no linear layer of its own in files of phi3"):
        save_adapter(model, layers, tmp_path / "adapter", base=tmp_path, alpha=1)
    del layers["layers.0.attention.q_proj"]
    save_adapter(model, layers, tmp_path / "adapter", base=tmp_path, alpha=4)
    ((a, b),) = layers.values()
    with torch.no_grad():
        model.layers[0].attention.o_proj.weight += 4 / len(a) * b @ a
    torch.testing.assert_close(from_pretrained(tmp_path / "adapter")(IDS), model(IDS), rtol=1e-4, atol=1e-4)


def adapted_by_peft(directory, **fields):
    """What PEFT says of the model in a directory with random adapters: the adapters' place beside it, and logits."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory)
    model = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=10, init_lora_weights=False, **fields)).eval()
    model.save_pretrained(directory / "adapter")
    with torch.no_grad():
        return directory / "adapter", model(IDS).logits


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj"], "use_rslora": True},
        {"target_modules": ["q_proj"], "fan_in_fan_out": True},  # which is of no such layer
    ],
)
def test_as_peft_merges_a_llama(tmp_path, fields):
    torch.manual_seed(5)
    save_pretrained(Transformer(CONFIG), tmp_path)
    adapter, logits = adapted_by_peft(tmp_path, **fields)
    torch.testing.assert_close(from_pretrained(adapter)(IDS), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("said", [True, False, None])
def test_as_peft_merges_a_gpt2(tmp_path, said):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(6)
    config = transformers.GPT2Config(
        vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=32, initializer_range=0.2
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    fields = {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": bool(said)}
    adapter, logits = adapted_by_peft(tmp_path, **fields)
    if said is None:  # a square weight's shape does not tell
        config = json.loads((adapter / ADAPTER).read_text())
        (adapter / ADAPTER).write_text(json.dumps(config | {"fan_in_fan_out": False}))
    torch.testing.assert_close(from_pretrained(adapter)(IDS), logits, rtol=1e-4, atol=1e-4)


def test_peft_reads_ours(tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    torch.manual_seed(7)
    model = Transformer(dataclasses.replace(CONFIG, rope_interleaved=True))
    save_pretrained(model, tmp_path)
    shapes = {name: m.weight.shape for name, m in model.layers.named_modules() if isinstance(m, torch.nn.Linear)}
    layers = {f"layers.{name}": low_rank(*shape) for name, shape in shapes.items()}
    save_adapter(model, layers, tmp_path / "adapter", base=tmp_path, alpha=1.5)
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path), tmp_path / "adapter"
    ).eval()
    ours = from_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS), theirs(IDS).logits, rtol=1e-4, atol=1e-4)
        assert (ours(IDS) - model.eval()(IDS)).abs().max() > 0.1
