import dataclasses
import json
import os
import pickle

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cs336 import ops
from cs336.models import BlockConfig, Transformer, TransformerConfig, from_pretrained, save_pretrained
from cs336.models.huggingface import read_step
from cs336.nn import (
    AttentionConfig,
    GELUConfig,
    LayerNormConfig,
    NoPositionsConfig,
    RMSNormConfig,
    RopeConfig,
    SwiGLUConfig,
)

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


def test_no_weights_of_an_earlier_save_are_left(tmp_path):
    """Whoever reads all *.safetensors, or the index first, would take them for this model's."""
    (tmp_path / "adapter_model.safetensors").write_text("another's")
    for most in (20_000, 50_000, 10**9, 50_000):
        model = make()
        save_pretrained(model, tmp_path, max_shard_bytes=most)
        files = {path.name for path in tmp_path.glob("model*")}
        if most == 10**9:
            assert files == {"model.safetensors"}
        else:
            index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
            assert len(files) > 2
            assert files == {"model.safetensors.index.json", *index["weight_map"].values()}
        assert torch.equal(from_pretrained(tmp_path)(X), model(X))
    assert (tmp_path / "adapter_model.safetensors").exists()


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
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("cs336.utils.tensor_file.save_file", full)
    with pytest.raises(OSError, match=r"No space left on device: .*model\.safetensors"):
        save_pretrained(make(d_ff=40), tmp_path, Tokenizer())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


OTHER_BLOCKS = (
    BlockConfig(AttentionConfig(4), GELUConfig(), LayerNormConfig(), NoPositionsConfig()),
    BlockConfig(AttentionConfig(2, 1, qkv_bias=True, qk_norm=True), positions=RopeConfig(interleaved=True)),
)


@pytest.mark.parametrize(
    "change",
    [
        {"logit_softcap": 5.0, "rope_interleaved": True},
        {"qk_norm": True, "qkv_bias": True, "tie_embeddings": True},
        {"num_heads": None, "layers": OTHER_BLOCKS},
    ],
)
def test_what_no_family_has_is_written_as_our_own(tmp_path, change):
    model = make(**change)
    save_pretrained(model, tmp_path, Tokenizer(), step=7)
    again = from_pretrained(tmp_path)
    assert again.config == model.config
    assert torch.equal(again(X), model(X))
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["model_type"], config["eos_token_id"]) == ("cs336", 89)
    edited(tmp_path, config=config["config"] | {"num_layer": 2})
    with pytest.raises(ValueError, match="unknown key num_layer; did you mean num_layers"):
        from_pretrained(tmp_path)


def test_blocks_that_are_llamas_are_written_as_llamas(tmp_path):
    block = BlockConfig(AttentionConfig(4, 2), SwiGLUConfig(40), RMSNormConfig(1e-6), RopeConfig(500.0))
    model = make(num_heads=None, layers=(block,))
    save_pretrained(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"
    again = from_pretrained(tmp_path)
    assert again.config.blocks[0] == dataclasses.replace(block, mixer=AttentionConfig(4, 2, 8))
    assert torch.equal(again(X), model(X))


def test_only_a_model_is_written(tmp_path):
    with pytest.raises(TypeError, match=r"must be a cs336\.models\.Transformer, got Linear"):
        save_pretrained(torch.nn.Linear(2, 2), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_have_the_mode_that_the_umask_says(tmp_path, mask):
    before = os.umask(mask)
    try:
        save_pretrained(make(), tmp_path, Tokenizer())
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {
        path.name: 0o666 & ~mask for path in tmp_path.iterdir()
    }


def test_weights_are_on_the_disk_before_their_name(tmp_path, monkeypatch):
    flushed, replace = set(), os.replace
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (flushed.add(os.fstat(file).st_ino), fsync(file)))

    def checked(source, target):
        assert os.stat(source).st_ino in flushed, target
        replace(source, target)

    monkeypatch.setattr(os, "replace", checked)
    save_pretrained(make(), tmp_path)
    assert (tmp_path / "model.safetensors").exists()


def test_step_of_training(tmp_path):
    save_pretrained(make(), tmp_path)
    assert read_step(tmp_path) is None
    save_pretrained(make(), tmp_path, step=12)
    assert read_step(tmp_path) == 12


@pytest.mark.parametrize("changes", [{}, {"logit_softcap": 30.0}])
def test_the_width_that_rates_were_chosen_at_goes_round(tmp_path, changes):
    """Training further has the learning rates that training had; a Llama's config.json, and our own."""
    model = Transformer(dataclasses.replace(SMALL, mup_base_width=16, **changes))
    save_pretrained(model, tmp_path)
    read = from_pretrained(tmp_path)
    assert read.config.mup_base_width == 16
    assert read.lr_scales() == model.lr_scales() != {}
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["model_type"] == ("cs336" if changes else "llama")


@pytest.mark.parametrize("width", [0, 1.5, "wide", 10**400])
def test_a_width_that_is_none_is_refused(tmp_path, width):
    save_pretrained(make(), tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | {"mup_base_width": width}))
    with pytest.raises(ValueError, match="mup_base_width must be a positive integer"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("eos", [3, [3, 5]])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_ends_of_text_and_generation_config_go_round(tmp_path, offline, eos, elsewhere):
    options = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 97}
    config = offline.LlamaConfig(**options, intermediate_size=40, bos_token_id=1, eos_token_id=7 if elsewhere else eos)
    theirs = offline.LlamaForCausalLM(config)
    theirs.generation_config = offline.GenerationConfig(
        bos_token_id=1, eos_token_id=eos, pad_token_id=0, do_sample=True, temperature=0.6, top_p=0.9
    )
    theirs.save_pretrained(tmp_path / "theirs")
    model = from_pretrained(tmp_path / "theirs")
    assert model.end_ids == ((3,) if eos == 3 else (3, 5))
    save_pretrained(model, tmp_path / "ours", Tokenizer())
    read = [json.loads((tmp_path / d / "generation_config.json").read_text()) for d in ("theirs", "ours")]
    assert read[0] == read[1]
    assert read[0]["temperature"] == 0.6
    configs = [json.loads((tmp_path / d / "config.json").read_text()) for d in ("theirs", "ours")]
    assert configs[0]["eos_token_id"] == configs[1]["eos_token_id"]
    assert from_pretrained(tmp_path / "ours").end_ids == model.end_ids
    again = offline.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert again.generation_config.eos_token_id == eos
    (tmp_path / "theirs" / "generation_config.json").unlink()
    assert from_pretrained(tmp_path / "theirs").end_ids == ((7,) if elsewhere else model.end_ids)


def test_an_end_that_is_no_id(tmp_path):
    save_pretrained(make(), tmp_path)
    model = from_pretrained(tmp_path)
    assert model.end_ids == ()
    save_pretrained(model, tmp_path, Tokenizer())  # no end is not an end of its own
    assert from_pretrained(tmp_path).end_ids == (89,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, "</s>"]}')
    with pytest.raises(ValueError, match="eos_token_id '</s>': expected a token's id, or a list of them"):
        from_pretrained(tmp_path)


def test_the_tokenizer_names_the_models_end(tmp_path):
    model = make()
    model.special_ids = {"bos_token_id": None, "eos_token_id": [88, 89]}
    tokenizer = Tokenizer()
    tokenizer.special_tokens = {"<|endoftext|>": 89, "<|im_end|>": 88}
    save_pretrained(model, tmp_path, tokenizer)
    written = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert written["eos_token"] == "<|im_end|>"
    assert "bos_token" not in written


def edited(directory, **changes):
    """The config.json of an export with these changes; None takes a key out."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "model_type must be one of llama, .*gpt2, .*cs336, got 'bert'"),
        ({"model_type": "gpt2"}, "config.json lacks n_positions, n_embd, n_layer, n_head"),
        ({"model_type": "mistral", "sliding_window": "23"}, "window must be a positive integer, got '23'"),
        ({"model_type": "qwen2", "mlp_bias": None}, r"lacks weights: model\.layers\.0\.self_attn\.k_proj\.bias"),
        ({"model_type": "qwen2", "layer_types": ["full_attention", "sliding_attention"]}, "layer_types = "),
        ({"hidden_act": "tanh"}, "hidden_act = 'tanh'"),
        ({"attention_bias": True}, r"lacks weights: model\.layers\.0\.self_attn\.k_proj\.bias"),
        ({"attention_bias": 1}, "attention_bias = 1: expected true or false"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "config.json lacks rope_parameters.low_freq_factor"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 8.0}}, "rope_parameters.rope_type = 'dynamic'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta": 1}}, "rope_parameters.beta = 1"),
        ({"rope_scaling": 3}, "rope_scaling = 3: expected a table"),
        ({"rope_theta": "10"}, "rope_theta = '10': expected a number"),
        ({"residual_multiplier": 0.2}, "residual_multiplier = 0.2, which cs336.models.Transformer does not do"),
        ({"is_decoder": True}, "is_decoder = True"),
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


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_weights_that_are_no_floating_point_are_refused(tmp_path, dtype):
    save_pretrained(make(), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if name.endswith("down_proj.weight"))
    save_file(weights | {name: weights[name].to(dtype)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"{name} is {dtype}, config\.json means floating point"):
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
    (tmp_path / "folder").mkdir()
    index.write_text(json.dumps({"weight_map": {"a": "folder"}}))
    with pytest.raises(ValueError, match="folder cannot be read"):
        from_pretrained(tmp_path)
    for name in ("../a.safetensors", "/a.safetensors", "..", ""):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(ValueError, match="names files outside its directory"):
            from_pretrained(tmp_path)
    for table in ({}, {"weight_map": []}, {"weight_map": {"a": 3}}, {"weight_map": {"a": ["b"]}}):
        index.write_text(json.dumps(table))
        with pytest.raises(ValueError, match="must have a weight_map"):
            from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": ["llama"]}, "model_type must be one of"),
        ({"num_key_value_heads": 3}, "num_heads"),
        ({"num_hidden_layers": 5000}, "num_layers must be at most 4,096"),
    ],
)
def test_the_file_of_what_no_model_can_be_is_named(tmp_path, change, message):
    save_pretrained(make(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=rf"{tmp_path}/config\.json: .*{message}"):
        from_pretrained(tmp_path)


def test_files_that_are_no_text_are_named(tmp_path):
    save_pretrained(make(), tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"chat_template\.jinja is not a text in UTF-8"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"config\.json is not JSON: maximum recursion"):
        from_pretrained(tmp_path)


def test_old_rotary_buffers_are_ignored(tmp_path):
    model = make()
    save_pretrained(model, tmp_path)
    path = tmp_path / "model.safetensors"
    save_file(load_file(path) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, path)
    assert torch.equal(from_pretrained(tmp_path)(X), model(X))
