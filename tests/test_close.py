"""The tolerance itself: what it must let through, and what it must not."""

import pytest
import torch
from close import assert_close_to_ref

BF16, F32 = torch.bfloat16, torch.float32


def cross_entropy_gradient(dtype, with_softmax=True):
    """(rows, vocabulary) as a model of 1000 words sees it."""
    logits, targets = torch.randn(64, 1000), torch.randint(1000, (64,))
    onehot = torch.nn.functional.one_hot(targets, 1000).double()
    exact = (logits.to(dtype).double().softmax(-1) - onehot) / 64
    torchs = exact.to(dtype)
    return (torchs if with_softmax else (-onehot / 64).to(dtype)), exact, torchs


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_a_gradient_without_its_softmax_is_wrong(dtype):
    assert_close_to_ref(*cross_entropy_gradient(dtype))
    with pytest.raises(AssertionError, match="error"):
        assert_close_to_ref(*cross_entropy_gradient(dtype, with_softmax=False))


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_zeros_are_wrong_whatever_the_size(dtype, size):
    exact = size * torch.randn(8, 128).double()
    assert_close_to_ref(exact.to(dtype), exact, exact.to(dtype))
    with pytest.raises(AssertionError, match="max error"):
        assert_close_to_ref(torch.zeros(8, 128, dtype=dtype), exact, exact.to(dtype))


def test_a_small_row_beside_a_large_one_counts():
    exact = torch.randn(8, 128).double()
    exact[0] *= 1e-3
    out = exact.to(F32)
    out[0, :] = 0
    with pytest.raises(AssertionError, match="max error"):
        assert_close_to_ref(out, exact, exact.to(F32))


def test_one_element_in_the_wrong_place():
    exact = torch.randn(64, 1024).double()
    out = exact.to(BF16)
    out[3, [5, 6]] = out[3, [6, 5]]
    with pytest.raises(AssertionError, match="max error"):
        assert_close_to_ref(out, exact, exact.to(BF16))


def test_low_precision_everywhere():
    """TF32's product, float32's result."""
    a, b = torch.randn(2, 64, 64)
    exact = a.double() @ b.double()
    low = (a.to(BF16).float() @ b).to(F32)
    assert_close_to_ref(a @ b, exact, a @ b)
    with pytest.raises(AssertionError, match="error"):
        assert_close_to_ref(low, exact, a @ b)


def test_torch_may_be_lucky():
    exact = torch.randn(8, 128).double()
    out = exact.to(BF16)
    one_ulp_off = (out.double() * (1 + 2**-8)).to(BF16)[:1]
    assert_close_to_ref(torch.cat([one_ulp_off[:, :2], out[:1, 2:]], 1), out[:1].double(), out[:1])


def test_rows_of_zeros_must_be_zeros():
    exact = torch.randn(4, 64).double()
    exact[1] = 0
    out = exact.to(F32)
    assert_close_to_ref(out, exact, exact.to(F32))
    out[1, 3] = 1e-3
    with pytest.raises(AssertionError, match="max error"):
        assert_close_to_ref(out, exact, exact.to(F32))


def test_scale_is_the_size_of_the_terms():
    exact = torch.full((4, 64), 1e-4).double()
    out = (exact + 1e-5).to(F32)
    assert_close_to_ref(out, exact, exact.to(F32), scale=100.0)
    with pytest.raises(AssertionError, match="max error"):
        assert_close_to_ref(out, exact, exact.to(F32))


def test_what_a_kernel_is_handed_is_added_and_no_more():
    """Weights of rows whose logarithm was rounded, all up, by half an ulp of 32 to 64."""
    exact, half_an_ulp = torch.rand(64, 64).double() + 0.5, 2.0**-19
    out = (exact * (1 + half_an_ulp)).float()
    assert_close_to_ref(out, exact, exact.float(), handed=half_an_ulp * 3**0.5)  # all up, where it may be evenly spread
    with pytest.raises(AssertionError, match="max error"):
        assert_close_to_ref(out, exact, exact.float())
    with pytest.raises(AssertionError, match="rms error"):
        assert_close_to_ref(out, exact, exact.float(), handed=half_an_ulp)
    with pytest.raises(AssertionError, match="max error"):
        assert_close_to_ref((exact * (1 + 3 * half_an_ulp)).float(), exact, exact.float(), handed=half_an_ulp)
