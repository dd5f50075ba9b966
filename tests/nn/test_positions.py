import pytest
import torch

from cs336.nn import NoPositionsConfig, RopeConfig, RotaryEmbedding


@pytest.mark.parametrize("interleaved", [False, True])
def test_turns_pairs_by_position_times_frequency(interleaved):
    rope = RotaryEmbedding(8, 32, theta=100.0, interleaved=interleaved)
    x = torch.randn(2, 3, 20, 8)
    y = rope(x)
    for pair in range(4):
        i, j = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + 4)
        turned = torch.complex(x[..., i], x[..., j]) * torch.exp(1j * torch.arange(20) * 100 ** (-2 * pair / 8))
        torch.testing.assert_close(torch.complex(y[..., i], y[..., j]), turned)


def test_explicit_positions():
    rope = RotaryEmbedding(8, 32)
    x = torch.randn(2, 3, 5, 8)
    assert torch.equal(rope(x, torch.arange(5)), rope(x))
    positions = torch.randint(0, 32, (2, 5))
    y = rope(x, positions)
    assert torch.equal(rope(x, positions[:, None].expand(2, 3, 5)), y)
    for b in range(2):
        assert torch.equal(rope(x[b], positions[b]), y[b])
        assert torch.equal(rope(x[b, 0], positions[b]), y[b, 0])
    assert torch.equal(rope(x[:, 0], positions), y[:, 0])
    assert torch.equal(rope(x, positions[:, None]), y)
    assert torch.equal(rope(x, positions[:1]), rope(x, positions[:1].expand(2, 5)))
    assert torch.equal(rope(x, positions.int()), y)


def test_far_positions_keep_their_angle():
    rope = RotaryEmbedding(2, 100_001)
    want = torch.tensor(100_000.0, dtype=torch.float64)
    torch.testing.assert_close(rope.cos[100_000, 0].double(), want.cos(), atol=1e-7, rtol=0)
    torch.testing.assert_close(rope.sin[100_000, 0].double(), want.sin(), atol=1e-7, rtol=0)


def test_tables_are_float32_and_no_state():
    rope = RotaryEmbedding(8, 32)
    cos = rope.cos.clone()
    assert rope.state_dict() == {}
    assert torch.equal(rope.bfloat16().cos, cos)
    assert torch.equal(rope.double().float().cos, cos)
    assert rope(torch.randn(3, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_to_empty_derives_the_tables(device):
    rope, late = RotaryEmbedding(8, 32), RotaryEmbedding(8, 32, device=device).to_empty(device="cpu")
    assert torch.equal(late.cos, rope.cos)
    assert torch.equal(late.sin, rope.sin)


def test_configs():
    rope = RopeConfig(50.0, interleaved=True).build(8, 16, device="meta")
    assert (rope.theta, rope.interleaved, rope.cos.shape, rope.cos.device.type) == (50.0, True, (16, 4), "meta")
    assert NoPositionsConfig().build(7, 16) is None
    NoPositionsConfig().check(7)
    with pytest.raises(ValueError, match="head_dim must be even for rotary positions, got 7"):
        RopeConfig().check(7)
    with pytest.raises(ValueError, match="theta must be a positive, finite number, got -1"):
        RopeConfig(-1)


def test_bad_arguments():
    with pytest.raises(ValueError, match="even"):
        RotaryEmbedding(7, 32)
    rope = RotaryEmbedding(8, 4)
    with pytest.raises(ValueError, match="5 positions, the tables have 4: raise max_seq_len"):
        rope(torch.zeros(5, 8))
    x = torch.zeros(2, 3, 8)
    for bad in (torch.arange(2), torch.tensor(1), torch.zeros(1, 1, 3).long(), torch.zeros(3, 3).long()):
        with pytest.raises(ValueError, match=r"positions must be \(\.\.\., 3\) to fit x \(2, 3, 8\)"):
            rope(x, bad)
    for dtype in (torch.float32, torch.bool, torch.uint8):  # torch indexes with the last two as if they were masks
        with pytest.raises(ValueError, match="positions must be int64 or int32"):
            rope(x, torch.zeros(3, dtype=dtype))
    for bad in (-1, 4):
        with pytest.raises(IndexError, match="positions must be 0 to 3"):
            rope(x, torch.tensor([0, bad, 1]))
    for bad in (torch.zeros(8), torch.zeros(3, 6)):
        with pytest.raises(ValueError, match=r"x must be \(\.\.\., S, 8\)"):
            rope(bad)
