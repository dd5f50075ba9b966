import math

import pytest
import torch

from cs336.nn import LongRopeScaling
from cs336.ops import rope_tables

THETA = 500000.0


def of_transformers(kind, seq_len=None, **options):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = transformers.LlamaConfig(
        hidden_size=512,
        num_attention_heads=8,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": kind, "rope_theta": THETA, **options},
    )
    return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs.double(), rtol=1e-5, atol=0)


def test_frequencies_by_hand():
    assert rope_tables.inverse_frequencies(4, 100.0).tolist() == pytest.approx([1.0, 0.1])
    cos, sin = rope_tables.tables(rope_tables.inverse_frequencies(4, 100.0), 3, scale=2.0)
    assert cos.dtype == sin.dtype == torch.float32
    assert cos[2].tolist() == pytest.approx([2 * math.cos(2), 2 * math.cos(0.2)])
    assert sin[2].tolist() == pytest.approx([2 * math.sin(2), 2 * math.sin(0.2)])


def test_what_no_memory_holds_is_refused():
    frequencies = rope_tables.inverse_frequencies(4, 10**30)  # a whole number that torch does not take
    with pytest.raises(ValueError, match="tables of 1,000,000,000 positions would have 2,000,000,000 angles"):
        rope_tables.tables(frequencies, 10**9)


def test_linear():
    close(rope_tables.linear(rope_tables.inverse_frequencies(64, THETA), 4.0), of_transformers("linear", factor=4.0)[0])


def test_llama3():
    options = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    ours = rope_tables.llama3(rope_tables.inverse_frequencies(64, THETA), *options.values(), 4096)
    close(ours, of_transformers("llama3", **options, original_max_position_embeddings=4096)[0])


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize("factor", [1.0, 4.0, 40.0])
def test_yarn(factor, truncate):
    ours, scale = rope_tables.yarn(64, THETA, factor, 2048, truncate=truncate)
    theirs, their_scale = of_transformers(
        "yarn", factor=factor, original_max_position_embeddings=2048, truncate=truncate
    )
    close(ours, theirs)
    assert scale == pytest.approx(their_scale)


@pytest.mark.parametrize("scale", [{}, {"factor": 8.0}, {"attention_factor": 1.3}])
@pytest.mark.parametrize(("original", "context_length"), [(4096, 8192), (8192, 8192), (8192, 4096)])
def test_longrope(original, context_length, scale):
    """Of a model whose context is longer than the original one, or not."""
    factors = {"short_factor": [1 + i / 40 for i in range(32)], "long_factor": [1.0 + i for i in range(32)]}
    options = factors | scale | {"original_max_position_embeddings": original}
    theirs, their_scale = of_transformers("longrope", **options, seq_len=context_length)
    said = original, scale.get("factor", 8192 / original), scale.get("attention_factor")
    scaling = LongRopeScaling(*map(tuple, factors.values()), *said)
    assert {scaling} == {LongRopeScaling(*factors.values(), *said)}  # lists are as good
    ours, our_scale = scaling.frequencies(64, THETA, context_length)
    close(ours, theirs)
    assert our_scale == pytest.approx(their_scale)


def test_ntk_stretches_the_slowest_pair_alone():
    plain, stretched = rope_tables.inverse_frequencies(64, THETA), rope_tables.ntk(64, THETA, 4.0)
    assert stretched[0] == plain[0]
    assert (plain[-1] / stretched[-1]).item() == pytest.approx(4.0)


def test_far_positions_keep_their_angle():
    """In float32 the angle of position 10^6 would be off by 0.03."""
    cos, _ = rope_tables.tables(torch.ones(1, dtype=torch.float64), 1_000_001)
    assert cos[-1].item() == pytest.approx(math.cos(1_000_000), abs=1e-7)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rope_tables.inverse_frequencies(5), "rotary_dim must be even and at least 2, got 5"),
        (lambda: rope_tables.inverse_frequencies(4, 0.0), "theta must be positive"),
        (lambda: rope_tables.linear(torch.ones(2), 0.5), "factor must be at least 1, got 0.5"),
        (lambda: rope_tables.ntk(2, 10.0, 2.0), "rotary_dim must be at least 4"),
        (lambda: rope_tables.llama3(torch.ones(2), 8.0, 4.0, 1.0, 10), "high_freq_factor must exceed"),
        (lambda: rope_tables.longrope(torch.ones(2), [1.0]), "longrope has a factor for each of 2 pairs, got 1"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_default_device_does_not_matter():
    def made():
        frequencies, scale = rope_tables.yarn(8, 100.0, 4.0, 16)
        stretched = rope_tables.llama3(frequencies, 8.0, 1.0, 4.0, 64)
        own = rope_tables.longrope(frequencies, [1.0, 1.5, 2.0, 3.0])
        made = (
            rope_tables.tables(frequencies, 5, scale, device="cpu"),
            *(rope_tables.tables(f, 5) for f in (stretched, own)),
        )
        return [table for pair in made for table in pair]

    want = made()
    with torch.device("meta"):
        assert all(torch.equal(got, w) for got, w in zip(made(), want, strict=True))
