"""The raw ops of attention: schemas, what they refuse, and which kernels take what. ops/attention.py is for people.

    attention           q (B, Hq, S, D), k (B, Hkv, T, D), v (B, Hkv, T, E): native, triton, ref
    attention_varlen    packed: q (Tq, Hq, D), k (Tk, Hkv, D), v (Tk, Hkv, E), cu_seqlens (N + 1,) int32
    attention_general   either of them (cu_seqlens None or not), with ALiBi and dropout: triton, ref

Last dims are contiguous, other strides free. o is like q, stored by token; lse (B, Hq, S), or (Hq, Tq) packed, is
float32 (float64 beside float64), the natural logarithm, and -inf where a query sees no key: there o is 0. A window or a
soft-cap is none at -1 or 0.0; causal is aligned at the last query and the last key.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from cs336.ops import registry
from cs336.ops.ref import attention as ref

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_HEAD_DIM = 256  # of the Triton kernels
NATIVE_HEAD_DIMS = {  # (D, E) of the kernels in csrc/kernels/attention
    "forward": ((64, 64), (96, 96), (128, 128), (192, 128), (256, 256)),
    "backward": ((64, 64), (96, 96), (128, 128), (192, 128), (256, 256)),
}
HOPPER = {"native": ((9, 0), (9, 0))}  # wgmma and TMA
PACKING = "cu_seqlens_q, Tensor{0} cu_seqlens_k, int max_seqlen_q, int max_seqlen_k"
OPTIONS = "float scale, bool causal, int window_left, int window_right, float softcap"
EXTRAS = "Tensor? alibi_slopes, float dropout_p, Tensor? seed"


# ---- what every variant refuses ----


def check(q, k, v, packing, scale, causal, window_left, window_right, softcap, *_) -> None:
    """packing: (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k) or None for a batch."""
    dims, names = (4, "(B, H, S, D)") if packing is None else (3, "(T, H, D)")
    check_dtype(q)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != dims or x.shape[-1] == 0:
            raise ValueError(f"{name} must be {names} with D >= 1, got shape {tuple(x.shape)}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} must be {q.dtype} on {q.device} like q, got {_like(x)}")
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            raise ValueError(f"{name} must have its last dim contiguous, got stride {x.stride()}")
    if k.shape[-1] != q.shape[-1] or k.shape[:-1] != v.shape[:-1] or (packing is None and k.shape[0] != q.shape[0]):
        raise ValueError(f"q, k and v must fit each other, got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    Hq, Hkv = q.shape[1], k.shape[1]
    if Hkv == 0 or Hq % Hkv != 0:
        raise ValueError(f"q's heads must be a multiple of k's, got {Hq} and {Hkv}")
    for name, value in (("window_left", window_left), ("window_right", window_right)):
        if value < -1:
            raise ValueError(f"{name} must be at least 0, or -1 for none, got {value}")
    check_numbers(scale, softcap or None)
    if packing is not None:
        for name, cu, longest, x in zip("qk", packing[:2], packing[2:], (q, k), strict=True):
            _check_cu_seqlens(name, cu, packing[0], longest, x)


def check_dtype(q: Tensor) -> None:
    if q.dtype not in DTYPES:
        raise ValueError(f"q must be floating point of 16, 32 or 64 bits, got {q.dtype}")


def check_numbers(scale: float | None, softcap: float | None) -> None:
    if scale is not None and not -math.inf < scale < math.inf:
        raise ValueError(f"scale must be finite, got {scale}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be positive and finite, got {softcap}")


def _check_cu_seqlens(name: str, cu: Tensor, other: Tensor, longest: int, x: Tensor) -> None:
    if cu.dtype != torch.int32 or cu.dim() != 1 or cu.shape[0] < 1 or cu.device != x.device or not cu.is_contiguous():
        raise ValueError(f"cu_seqlens_{name} must be contiguous (N + 1,) torch.int32 on {x.device}, got {_like(cu)}")
    if cu.shape != other.shape:
        raise ValueError(f"cu_seqlens_k must be as long as cu_seqlens_q, {other.shape[0]}, got {cu.shape[0]}")
    if longest < 0:
        raise ValueError(f"max_seqlen_{name} must not be negative, got {longest}")
    if cu.device.type != "cpu" or type(cu) is not Tensor:
        return  # reading them would wait for the GPU: the kernels clamp instead
    lengths = cu.diff()
    if cu[0] != 0 or cu[-1] != x.shape[0] or (lengths < 0).any():
        raise ValueError(
            f"cu_seqlens_{name} must rise from 0 to {name}'s {x.shape[0]} tokens and never fall, got {cu.tolist()}"
        )
    if lengths.numel() and lengths.max() > longest:
        raise ValueError(f"max_seqlen_{name} must be at least the longest sequence, {lengths.max()}, got {longest}")


def _check_bwd(do, dlse, q, k, v, o, lse, packing, *options) -> None:
    check(q, k, v, packing, *options)
    lse_shape = q.shape[:3] if packing is None else (q.shape[1], q.shape[0])
    for name, x in (("do", do), ("o", o)):
        if x.shape != (*q.shape[:-1], v.shape[-1]) or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} must be {(*q.shape[:-1], v.shape[-1])} like q, got {_like(x)}")
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            raise ValueError(f"{name} must have its last dim contiguous, got stride {x.stride()}")
    for name, x in (("dlse", dlse), ("lse", lse)):
        if x is not None and (x.shape != lse_shape or x.dtype != _lse_dtype(q) or x.device != q.device):
            raise ValueError(f"{name} must be {tuple(lse_shape)} {_lse_dtype(q)} on {q.device}, got {_like(x)}")
        if x is not None and not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got stride {x.stride()}")


def check_slopes(alibi_slopes: Tensor | None) -> None:
    if alibi_slopes is not None and not isinstance(alibi_slopes, Tensor):
        raise ValueError(f"alibi_slopes must be a float32 tensor, a number a head, got {alibi_slopes!r:.80}")


def check_extras(q: Tensor, packing, alibi_slopes: Tensor | None, dropout_p: float, seed: Tensor | None) -> None:
    sequences = q.shape[0] if packing is None else packing[0].shape[0] - 1
    check_slopes(alibi_slopes)
    if alibi_slopes is not None:
        fits = alibi_slopes.shape in ((q.shape[1],), (sequences, q.shape[1]))
        if not fits or alibi_slopes.dtype != torch.float32 or alibi_slopes.device != q.device:
            raise ValueError(
                f"alibi_slopes must be ({q.shape[1]},) or {(sequences, q.shape[1])} torch.float32 on {q.device}, "
                f"got {_like(alibi_slopes)}"
            )
        if not alibi_slopes.is_contiguous():
            raise ValueError(f"alibi_slopes must be contiguous, got stride {alibi_slopes.stride()}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if dropout_p > 0 and (seed is None or seed.shape != (1,) or seed.dtype != torch.int64 or seed.device != q.device):
        got = None if seed is None else _like(seed)
        raise ValueError(f"seed must be (1,) torch.int64 on {q.device} for dropout, got {got}")


def _like(x: Tensor) -> str:
    return f"{tuple(x.shape)} {x.dtype} on {x.device}"


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


# ---- what a variant refuses: sentences ----


def _triton_refuses(q: Tensor, v: Tensor) -> str | None:
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the Triton kernels take float32, float16 and bfloat16, not {q.dtype}"
    if max(q.shape[-1], v.shape[-1]) > MAX_HEAD_DIM:
        return f"the Triton kernels take heads of up to {MAX_HEAD_DIM} features, not {q.shape[-1]} and {v.shape[-1]}"
    return None


def _native_refuses(direction: str, *tensors: Tensor, scale: float = 1.0, softcap: float = 0.0) -> str | None:
    """tensors: q, k, v, and what else is read row by row."""
    q, _, v, *_ = tensors
    if not scale > 0:
        return f"the native kernels take a positive scale, not {scale}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"the native kernels take float16 and bfloat16, not {q.dtype}"
    if (q.shape[-1], v.shape[-1]) not in NATIVE_HEAD_DIMS[direction]:
        dims = ", ".join(f"{d} and {e}" for d, e in NATIVE_HEAD_DIMS[direction])
        return (
            f"the native {direction} has head dims (of q and k, and of v) {dims}, not {q.shape[-1]} and {v.shape[-1]}"
        )
    if direction == "backward" and q.shape[-1] not in (96, 128) and softcap > 0:
        return f"the native backward has a softcap for heads of 96 and 128 features, not of {q.shape[-1]}"
    seen = not torch.compiler.is_compiling()  # where offsets would break the graph: the op checks them again
    for x in tensors:
        steps = x.stride()
        for size, step in zip(x.shape[:-1], steps, strict=False):
            if size > 1 and step % 8 != 0:
                return f"the native kernels read rows at multiples of 16 bytes, not at strides {steps}"
        if seen and x.storage_offset() % 8 != 0:
            return "the native kernels read rows at multiples of 16 bytes: a tensor starts between two of them"
    return None


# ---- the ops ----


def _fake_fwd(q, k, v, packed):
    if packed:
        shape = q.shape[1], q.shape[0]
        return q.new_empty(*q.shape[:2], v.shape[-1]), q.new_empty(shape, dtype=_lse_dtype(q))
    B, Hq, S, _ = q.shape
    return _by_token(q, v.shape[-1]), q.new_empty(B, Hq, S, dtype=_lse_dtype(q))


def _fake_bwd(q, k, v, packed):
    return tuple(x.new_empty(x.shape) if packed else _by_token(x, x.shape[-1]) for x in (q, k, v))


def _by_token(x: Tensor, features: int) -> Tensor:
    B, H, S, _ = x.shape
    return x.new_empty(B, S, H, features).transpose(1, 2)


def _packing(args: tuple):
    return None if args[0] is None else args[:4]


def _check_general_fwd(q, k, v, *rest):
    packing = _packing(rest)
    check(q, k, v, packing, *rest[4:9])
    check_extras(q, packing, *rest[9:])


CHECKS: dict[str, Callable[..., None]] = {  # of the forwards
    "attention": lambda q, k, v, *options: check(q, k, v, None, *options),
    "attention_varlen": lambda q, k, v, *rest: check(q, k, v, rest[:4], *rest[4:]),
    "attention_general": _check_general_fwd,
}
registry.define(
    f"attention_fwd(Tensor q, Tensor k, Tensor v, {OPTIONS}) -> (Tensor o, Tensor lse)",
    fake=lambda q, k, v, *_: _fake_fwd(q, k, v, packed=False),
    ref=ref.fwd,
    triton="attention.fwd",
    capabilities=HOPPER,
    check=CHECKS["attention"],
    supports={
        "native": lambda q, k, v, *rest: _native_refuses("forward", q, k, v, scale=rest[-5], softcap=rest[-1]),
        "triton": lambda q, k, v, *_: _triton_refuses(q, v),
    },
)
registry.define(
    f"attention_bwd(Tensor do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, {OPTIONS}, "
    "bool deterministic) -> (Tensor dq, Tensor dk, Tensor dv)",
    fake=lambda do, dlse, q, k, v, *_: _fake_bwd(q, k, v, packed=False),
    ref=ref.bwd,
    triton="attention_bwd.bwd",
    capabilities=HOPPER,
    check=lambda do, dlse, q, k, v, o, lse, *options: _check_bwd(do, dlse, q, k, v, o, lse, None, *options),
    supports={
        "native": lambda do, dlse, q, k, v, o, *rest: _native_refuses(
            "backward", q, k, v, do, o, scale=rest[-6], softcap=rest[-2]
        ),
        "triton": lambda do, dlse, q, k, v, *_: _triton_refuses(q, v),
    },
)
registry.define(
    f"attention_varlen_fwd(Tensor q, Tensor k, Tensor v, Tensor {PACKING.format('')}, {OPTIONS}) "
    "-> (Tensor o, Tensor lse)",
    fake=lambda q, k, v, *_: _fake_fwd(q, k, v, packed=True),
    ref=ref.varlen_fwd,
    triton="attention.varlen_fwd",
    capabilities=HOPPER,
    check=CHECKS["attention_varlen"],
    supports={
        "native": lambda q, k, v, *rest: _native_refuses("forward", q, k, v, scale=rest[-5], softcap=rest[-1]),
        "triton": lambda q, k, v, *_: _triton_refuses(q, v),
    },
)
registry.define(
    "attention_varlen_bwd(Tensor do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, "
    f"Tensor {PACKING.format('')}, {OPTIONS}, bool deterministic) -> (Tensor dq, Tensor dk, Tensor dv)",
    fake=lambda do, dlse, q, k, v, *_: _fake_bwd(q, k, v, packed=True),
    ref=ref.varlen_bwd,
    triton="attention_bwd.varlen_bwd",
    capabilities=HOPPER,
    check=lambda do, dlse, q, k, v, o, lse, *rest: _check_bwd(do, dlse, q, k, v, o, lse, rest[:4], *rest[4:]),
    supports={
        "native": lambda do, dlse, q, k, v, o, *rest: _native_refuses(
            "backward", q, k, v, do, o, scale=rest[-6], softcap=rest[-2]
        ),
        "triton": lambda do, dlse, q, k, v, *_: _triton_refuses(q, v),
    },
)


def _check_general_bwd(do, dlse, q, k, v, o, lse, *rest):
    packing = _packing(rest)
    _check_bwd(do, dlse, q, k, v, o, lse, packing, *rest[4:9])
    check_extras(q, packing, *rest[10:])


NO_NATIVE = "ALiBi and dropout have no native kernel: Triton has them"

registry.define(
    f"attention_general_fwd(Tensor q, Tensor k, Tensor v, Tensor? {PACKING.format('?')}, {OPTIONS}, {EXTRAS}) "
    "-> (Tensor o, Tensor lse)",
    fake=lambda q, k, v, cu_seqlens_q, *_: _fake_fwd(q, k, v, packed=cu_seqlens_q is not None),
    ref=ref.general_fwd,
    triton="attention.general_fwd",
    check=CHECKS["attention_general"],
    supports={"native": lambda *_: NO_NATIVE, "triton": lambda q, k, v, *_: _triton_refuses(q, v)},
)
registry.define(
    "attention_general_bwd(Tensor do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, "
    f"Tensor? {PACKING.format('?')}, {OPTIONS}, bool deterministic, {EXTRAS}) -> (Tensor dq, Tensor dk, Tensor dv)",
    fake=lambda do, dlse, q, k, v, o, lse, cu_seqlens_q, *_: _fake_bwd(q, k, v, packed=cu_seqlens_q is not None),
    ref=ref.general_bwd,
    triton="attention_bwd.general_bwd",
    check=_check_general_bwd,
    supports={"native": lambda *_: NO_NATIVE, "triton": lambda do, dlse, q, k, v, *_: _triton_refuses(q, v)},
)
