import pytest
import torch
from close import assert_close_to_ref

from cs336 import ops


def tables(S, D, device, theta=10000.0):
    angles = torch.outer(torch.arange(S, dtype=torch.float64), theta ** (-torch.arange(0, D, 2).double() / D))
    return angles.cos().to(device), angles.sin().to(device)


def definition(x, cos, sin, interleaved):
    """Each pair as a complex number, times one of modulus 1."""
    turn = torch.complex(cos, sin)
    if interleaved:
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)
    re, im = x.unflatten(-1, (2, -1)).unbind(-2)
    turned = torch.complex(re, im) * turn
    return torch.cat((turned.real, turned.imag), -1)


def in_dtype(x, cos, sin, interleaved):
    """The textbook's form, x cos + rotated(x) sin, in x's own dtype."""
    if interleaved:
        cos, sin = (t.repeat_interleave(2, -1).to(x.dtype) for t in (cos, sin))
        rotated = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    else:
        cos, sin = (torch.cat((t, t), -1).to(x.dtype) for t in (cos, sin))
        x1, x2 = x.chunk(2, -1)
        rotated = torch.cat((-x2, x1), -1)
    return x * cos + rotated * sin


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 3, 17, 8), (5, 2), (1, 64), (0, 4), (2, 257, 128)])
def test_against_complex_numbers(device, shape, dtype, interleaved):
    x = torch.randn(shape, dtype=dtype, device=device, requires_grad=True)
    cos, sin = tables(shape[-2], shape[-1], device)
    y = ops.rope(x, cos.float(), sin.float(), interleaved=interleaved)
    dy = torch.randn_like(y)
    x64, x_ = x.detach().double().requires_grad_(), x.detach().requires_grad_()
    y64, y_ = definition(x64, cos, sin, interleaved), in_dtype(x_, cos, sin, interleaved)
    assert_close_to_ref(y, y64, y_)
    grads = (torch.autograd.grad(out, leaf, dy.to(out.dtype))[0] for out, leaf in ((y, x), (y64, x64), (y_, x_)))
    assert_close_to_ref(*grads)


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_distance_alone(interleaved):
    q, k = torch.randn(2, 16, dtype=torch.float64)
    cos, sin = tables(50, 16, "cpu")
    at = lambda x, n: ops.rope(x, cos[n], sin[n], interleaved=interleaved)  # noqa: E731
    torch.testing.assert_close(at(q, 13) @ at(k, 7), at(q, 46) @ at(k, 40))
    torch.testing.assert_close(at(q, 13).norm(), q.norm())
    assert not torch.allclose(at(q, 13) @ at(k, 7), at(q, 13) @ at(k, 8))


def test_the_two_pairings_differ_by_a_permutation():
    x, (cos, sin) = torch.randn(5, 8), (t.float() for t in tables(5, 8, "cpu"))
    halves = torch.cat((x[:, ::2], x[:, 1::2]), -1)
    y = ops.rope(x, cos, sin, interleaved=True)
    torch.testing.assert_close(ops.rope(halves, cos, sin), torch.cat((y[:, ::2], y[:, 1::2]), -1))


def test_tables_broadcast():
    x, (cos, sin) = torch.randn(2, 3, 5, 8), (t.float() for t in tables(5, 8, "cpu"))
    y = ops.rope(x, cos, sin)
    assert torch.equal(ops.rope(x, cos[None, None], sin[None, None]), y)
    assert torch.equal(ops.rope(x, cos.expand(2, 1, 5, 4), sin.expand(2, 1, 5, 4)), y)


@pytest.mark.parametrize("interleaved", [False, True])
def test_compiles_whole(interleaved):
    x, (cos, sin) = torch.randn(2, 3, 5, 8), (t.float() for t in tables(5, 8, "cpu"))
    compiled = torch.compile(ops.rope, backend="aot_eager", fullgraph=True)
    y = compiled(x, cos, sin, interleaved=interleaved)
    torch.testing.assert_close(y, ops.rope(x, cos, sin, interleaved=interleaved))


X, C = torch.zeros(2, 5, 8), torch.zeros(5, 4)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((X[..., :7], C, C), r"2 P <= 7"),
        ((X.int(), C, C), "floating point"),
        ((X, torch.zeros(5, 5), torch.zeros(5, 5)), r"cos must be \(\.\.\., P\) with 2 P <= 8"),
        ((X, C[:4], C[:4]), r"to fit x \(2, 5, 8\), got \(4, 4\)"),
        ((X, C.expand(3, 2, 5, 4), C.expand(3, 2, 5, 4)), "cos must be"),
        ((X, C, C[:1]), "sin must have cos's shape"),
    ],
)
def test_bad_arguments(args, message):
    with pytest.raises(ValueError, match=message):
        ops.rope(*args)
