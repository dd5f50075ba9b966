"""A model beside transformers' own."""

import dataclasses

import pytest
import torch

from cs336.inference import compare
from cs336.inference.compare import compare_huggingface
from cs336.models import BlockConfig, Transformer, TransformerConfig, save_pretrained
from cs336.nn import AttentionConfig, LongRopeScaling, RopeConfig
from cs336.tokenizer import Tokenizer

TEXT = "the cat sat on the mat, and the dog did not: naïve café. " * 3
VOCAB = {i: bytes([i]) for i in range(256)} | {256: b"he", 257: b" t", 258: b" the"}
TOKENIZER = Tokenizer(VOCAB, [(b"h", b"e"), (b" ", b"t"), (b" t", b"he")], ["<|endoftext|>"])
CONFIG = TransformerConfig(272, 200, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, init_std=0.2)


@pytest.fixture
def directory(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    save_pretrained(Transformer(CONFIG), tmp_path, TOKENIZER)
    return tmp_path


def test_the_same_model(directory, capsys):
    got = compare_huggingface(directory, TEXT, "cpu")
    assert got.tokens == len(TOKENIZER.encode(TEXT)) < 200
    assert got.same_tokens
    assert got.worst_difference < 1e-4
    assert got.log_likelihood == pytest.approx(got.their_log_likelihood, abs=1e-5)
    assert got.log_likelihood < -4
    assert (got.new_tokens, got.same_new_tokens, got.margin) == (64, 64, None)
    assert "64 of 64 greedy tokens are the same" in str(got)
    assert f"worst difference {got.worst_difference:.2g}" in str(got)


@pytest.mark.parametrize("original", [200, 40])
def test_a_longrope_is_read_for_the_text(directory, original):
    """With its short factors or the long ones, as transformers has them for this text."""
    torch.manual_seed(6)
    scaling = LongRopeScaling((1.0, 1.1, 1.2, 1.3), (1.0, 2.0, 4.0, 6.0), original, 4.0)
    block = BlockConfig(AttentionConfig(4, 2), positions=RopeConfig(100.0, scaling=scaling))
    save_pretrained(
        Transformer(TransformerConfig(272, 400, 2, 32, init_std=0.2, layers=(block,))), directory, TOKENIZER
    )
    got = compare_huggingface(directory, TEXT, "cpu", new_tokens=20)
    assert got.worst_difference < 1e-4
    assert (got.new_tokens, got.same_new_tokens) == (20, 20)


def test_a_difference_is_seen(directory, monkeypatch):
    original = compare.from_pretrained

    def damaged(*args, **options):
        model = original(*args, **options)
        model.layers[1].mlp.down_proj.weight.data[0] += 1.0
        model.norm.weight.data *= 3.0
        return model

    monkeypatch.setattr(compare, "from_pretrained", damaged)
    got = compare_huggingface(directory, TEXT, "cpu", new_tokens=20)
    token_ids = torch.tensor([TOKENIZER.encode(TEXT)])
    at = token_ids[0, 1:, None]
    mine, other = (m(directory)(token_ids)[0, :-1].log_softmax(-1).gather(1, at) for m in (damaged, original))
    assert (other - mine).max() > (mine - other).max()  # the worst is one of ours that is too low
    assert got.worst_difference == pytest.approx((mine - other).abs().max().item(), rel=1e-3)
    assert got.same_new_tokens < got.new_tokens == 20
    assert got.margin > 0
    assert "apart" in str(got)


def test_other_ids_are_seen(directory, monkeypatch):
    monkeypatch.setattr(compare, "load_tokenizer", lambda path: Tokenizer(VOCAB, [(b"h", b"e")]))
    got = compare_huggingface(directory, TEXT, "cpu", new_tokens=2)
    assert not got.same_tokens
    assert "OTHER IDS" in str(got)


def test_a_long_text_is_cut(directory):
    got = compare_huggingface(directory, TEXT * 5, "cpu")
    assert (got.tokens, got.same_tokens, got.new_tokens) == (200, True, 64)
    with pytest.raises(ValueError, match="the text has 1 tokens"):
        compare_huggingface(directory, "a", "cpu")


def test_sixteen_bits(directory):
    got = compare_huggingface(directory, TEXT, "cpu", dtype=torch.bfloat16, new_tokens=4)
    assert 1e-4 < got.worst_difference < 0.5


def test_a_checkpoint_is_refused(directory):
    (directory / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="name an export"):
        compare_huggingface(directory, TEXT, "cpu")


def test_a_kind_of_our_own_is_refused(directory):
    save_pretrained(Transformer(dataclasses.replace(CONFIG, logit_softcap=30.0)), directory, TOKENIZER)
    with pytest.raises(ValueError, match="no family of transformers has"):
        compare_huggingface(directory, TEXT, "cpu")


def test_a_tokenizer_of_our_own_is_refused(directory):
    tokenizer = Tokenizer({i: bytes([i]) for i in range(256)}, [], [], pattern=r"\w+|\W+")
    save_pretrained(Transformer(dataclasses.replace(CONFIG, vocab_size=256)), directory, tokenizer)
    with pytest.raises(ValueError, match=r"cuts texts by .*, which no other program reads"):
        compare_huggingface(directory, TEXT, "cpu")
