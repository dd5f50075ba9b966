import dataclasses
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from cs336 import ops
from cs336.models import Transformer, TransformerConfig, from_pretrained, save_pretrained

SMALL = TransformerConfig(97, 24, num_layers=2, d_model=32, num_heads=4, init_std=0.15)
VARIANTS = {
    "llama": {},
    "grouped and tied": {"num_kv_heads": 2, "tie_embeddings": True, "d_ff": 40, "rope_theta": 500.0},
    "interleaved": {"rope_interleaved": True, "num_kv_heads": 1},
    "qwen2": {"qkv_bias": True, "num_kv_heads": 2, "tie_embeddings": True},
    "qwen2 interleaved": {"qkv_bias": True, "rope_interleaved": True, "num_kv_heads": 1, "head_dim": 12},
    "qwen3": {"qk_norm": True, "head_dim": 12, "norm_eps": 1e-6},
    "qwen3 interleaved": {"qk_norm": True, "rope_interleaved": True, "tie_embeddings": True},
}
X = torch.arange(48).view(2, 24)


class Tokenizer:
    """What an export asks of one."""

    vocab_size = 90
    special_tokens = {"<|endoftext|>": 89}  # noqa: RUF012

    def save(self, path):
        with open(path, "w") as file:
            file.write("the tokenizer")


def make(**change):
    model = Transformer(dataclasses.replace(SMALL, **change))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.uniform_(0.5, 1.5)
    return model


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("transformers")


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip(tmp_path, variant):
    model = make(**VARIANTS[variant])
    save_pretrained(model, tmp_path / "new" / "directory")
    again = from_pretrained(tmp_path / "new" / "directory")
    torch.testing.assert_close(again(X), model(X), atol=1e-5, rtol=1e-5)
    config = model.config
    if config.rope_interleaved:
        config = dataclasses.replace(config, rope_interleaved=False)
    else:
        for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
            assert torch.equal(a, b), name
    resolved = {"num_kv_heads": config.kv_heads, "head_dim": config.head_size, "d_ff": config.ff_size}
    assert again.config == dataclasses.replace(config, **resolved)
    ops.cross_entropy(again(X), X).backward()
    assert all(p.grad is not None for p in again.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_gives_the_same_logits(tmp_path, offline, variant):
    model = make(**VARIANTS[variant])
    save_pretrained(model, tmp_path)
    theirs, report = offline.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert type(theirs).__name__.lower().startswith(variant.split()[0] if "qwen" in variant else "llama")
    with torch.no_grad():
        torch.testing.assert_close(theirs(X).logits, model(X), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shard_size", ["1GB", "20kB"])
@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_reads_what_transformers_writes(tmp_path, offline, kind, shard_size, tied):
    options = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    options |= {"vocab_size": 97, "intermediate_size": 40, "max_position_embeddings": 24, "initializer_range": 0.15}
    config = getattr(offline, f"{kind}Config")(**options, tie_word_embeddings=tied)
    theirs = getattr(offline, f"{kind}ForCausalLM")(config)
    for name, p in theirs.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p)
    theirs.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "20kB")
    model = from_pretrained(tmp_path)
    assert model.config.tie_embeddings == tied
    assert (model.config.qk_norm, model.config.qkv_bias) == (kind == "Qwen3", kind == "Qwen2")
    with torch.no_grad():
        torch.testing.assert_close(model(X), theirs(X).logits, atol=1e-4, rtol=1e-4)


def test_a_fresh_export_wins_over_old_shards(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    model = make()
    save_pretrained(model, tmp_path)
    assert torch.equal(from_pretrained(tmp_path)(X), model(X))


def test_dtype(tmp_path):
    model = make().bfloat16()
    save_pretrained(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert {p.dtype for p in from_pretrained(tmp_path).parameters()} == {torch.bfloat16}
    wide = from_pretrained(tmp_path, device="cpu", dtype=torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    assert torch.equal(wide.head.weight, model.head.weight.float())


def test_with_a_tokenizer(tmp_path):
    save_pretrained(make(), tmp_path, Tokenizer())
    assert (tmp_path / "tokenizer.json").read_text() == "the tokenizer"
    for name in ("config.json", "generation_config.json"):
        ids = json.loads((tmp_path / name).read_text())
        assert (ids["bos_token_id"], ids["eos_token_id"]) == (89, 89)
    small = make(vocab_size=80)
    with pytest.raises(ValueError, match="the tokenizer has 90 tokens, the model 80"):
        save_pretrained(small, tmp_path, Tokenizer())


def test_transformers_reads_the_tokenizer(tmp_path, offline):
    tokenizers = pytest.importorskip("cs336.tokenizer")
    vocab = {i: bytes([i]) for i in range(256)} | {256: b"he", 257: b" he"}
    ours = tokenizers.Tokenizer(vocab, [(b"h", b"e"), (b" ", b"he")], ["<|endoftext|>"])
    save_pretrained(make(vocab_size=ours.vocab_size), tmp_path, ours)
    theirs = offline.AutoTokenizer.from_pretrained(tmp_path)
    text = "hello, the naïve heart<|endoftext|>"
    assert theirs(text)["input_ids"] == ours.encode(text, allowed_special="all")
    assert theirs.eos_token_id == ours.special_tokens["<|endoftext|>"]


def test_a_failed_export_leaves_the_last_one(tmp_path, monkeypatch):
    model = make()
    save_pretrained(model, tmp_path, Tokenizer())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("cs336.models.huggingface.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(make(d_ff=40), tmp_path, Tokenizer())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_the_layout_cannot_hold(tmp_path):
    with pytest.raises(ValueError, match="no logit soft-cap"):
        save_pretrained(make(logit_softcap=5.0), tmp_path)
    with pytest.raises(ValueError, match="no qk_norm and Qwen3's no qkv_bias"):
        save_pretrained(make(qk_norm=True, qkv_bias=True), tmp_path)
    with pytest.raises(TypeError, match=r"must be a cs336\.models\.Transformer, got Linear"):
        save_pretrained(torch.nn.Linear(2, 2), tmp_path)
    assert not list(tmp_path.iterdir())


def edited(directory, **changes):
    """The config.json of an export with these changes; None takes a key out."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type must be one of llama, mistral, qwen2, qwen3, got 'gpt2'"),
        ({"model_type": "mistral", "sliding_window": 23}, "lets a token see the last 23 alone"),
        ({"model_type": "mistral", "max_position_embeddings": 5000}, "lets a token see the last 4096 alone"),
        ({"model_type": "qwen2"}, r"lacks weights: model\.layers\.0\.self_attn\.k_proj\.bias"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "scales its rotary positions"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "scales its rotary positions"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": None, "vocab_size": None}, "config.json lacks vocab_size, hidden_size"),
        ({"num_hidden_layers": 3}, r"lacks weights: model\.layers\.2\.input_layernorm"),
        ({"num_hidden_layers": 1}, r"has unknown weights: model\.layers\.1\.input_layernorm"),
        ({"intermediate_size": 40}, r"gate_proj\.weight has shape \(128, 32\), config\.json means \(40, 32\)"),
        ({"num_attention_heads": "4"}, "num_heads must be a positive integer, got '4'"),
    ],
)
def test_models_that_cannot_be_read(tmp_path, changes, message):
    save_pretrained(make(), tmp_path)
    edited(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        from_pretrained(tmp_path)


def test_damaged_and_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no config"):
        from_pretrained(tmp_path / "nowhere")
    save_pretrained(make(), tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[:-10], whole[:5], b"", pickle.dumps({"a": 1})):
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
            from_pretrained(tmp_path)
    weights.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"lacks model\.safetensors; only safetensors are read, never pickles"):
        from_pretrained(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "../a.safetensors"}}')
    with pytest.raises(ValueError, match="names files outside its directory"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object"):
        from_pretrained(tmp_path)


def test_old_rotary_buffers_are_ignored(tmp_path):
    model = make()
    save_pretrained(model, tmp_path)
    path = tmp_path / "model.safetensors"
    save_file(load_file(path) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, path)
    assert torch.equal(from_pretrained(tmp_path)(X), model(X))
