"""attn_implementation="cs336" for Hugging Face transformers.

    from cs336 import huggingface_attention

    huggingface_attention.register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="cs336")

Causal masks, sliding windows and packed batches are recognised and never made: the kernels know them. Padding and any
other pattern become transformers' boolean mask, which torch's kernels take.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from cs336.ops import attention, attention_varlen
from cs336.ops.attention_varlen import cu_seqlens

NAME = "cs336"


def register() -> None:
    """Tell transformers, once a process, of the attention and the mask called "cs336"."""
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ImportError(f"attention in transformers needs it ({error}): pip install 'cs336[hf]'") from None

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """query (B, Hq, S, D), key and value (B, Hkv, T, D) -> (B, S, Hq, D).

    attention_mask: what `attention_mask` below made, or a (B, 1 or Hq, S, T) mask of the caller's own.
    s_aux: (Hq,) attention sinks, as gpt-oss has them.
    Raises NotImplementedError for what changes the result and is not known here: position biases.
    """
    for name in ("position_bias", "output_attentions"):
        refused = kwargs.get(name)
        if refused is not None and refused is not False:
            raise NotImplementedError(f'attn_implementation="cs336" does not support {name}: use "eager"')
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    window = (sliding_window - 1, None) if sliding_window is not None and causal else None
    if attention_mask is not None and attention_mask.dim() == 1:  # cu_seqlens of a packed batch
        B, _, S, _ = query.shape
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        o = attention_varlen(
            q, k, v, attention_mask, None, S, S,
            causal=True, window=window, softcap=softcap, scale=scaling, dropout_p=dropout, sinks=s_aux,
        )  # fmt: skip
        return o.unflatten(0, (B, S)), None
    if attention_mask is not None:  # holds causality and the window too
        causal, window = False, None
        attention_mask = attention_mask[..., : key.shape[2]]
    o = attention(
        query, key, value, attention_mask,
        causal=causal, window=window, softcap=softcap, scale=scaling, dropout_p=dropout, sinks=s_aux,
    )  # fmt: skip
    return o.transpose(1, 2).contiguous(), None


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable | None = None,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs,
) -> Tensor | None:
    """None for a causal mask or a causal window, cu_seqlens (N + 1,) int32 for packed rows, else transformers' mask.

    The arguments are those of transformers' sdpa_mask, which makes the (B, 1, S, T) mask.
    """
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    mask_function = causal_mask_function if mask_function is None else mask_function
    parts = list(_parts(mask_function))
    kinds = {kind for kind, _ in parts}
    ends_meet = not isinstance(q_offset, Tensor) and q_offset + q_length == kv_offset + kv_length
    no_padding = attention_mask is None or (not _tracing() and bool(attention_mask.all()))
    segments = [value for _, value in parts if value is not None]
    if ends_meet and no_padding and "causal" in kinds and kinds <= {"causal", "window", "packed"}:
        if not segments and allow_is_causal_skip:
            return None
        if len(segments) == 1 and not _tracing():
            return cu_seqlens(segments[0])
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        **kwargs,
    )


def _tracing() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _parts(mask_function: Callable) -> Iterator[tuple[str, Tensor | None]]:
    """The patterns that a mask of transformers is the intersection of: (kind, segments of a pack).

    transformers builds masks from closures in masking_utils.py; what is not known by its name is "other".
    """
    closure = dict(zip(mask_function.__code__.co_freevars, mask_function.__closure__ or (), strict=True))
    match mask_function.__qualname__:
        case "causal_mask_function":
            yield "causal", None
        case "sliding_window_overlay.<locals>.inner_mask":
            yield "window", None  # its size comes to attention_forward as sliding_window
        case "packed_sequence_mask_function.<locals>.inner_mask":
            yield "packed", closure["packed_sequence_mask"].cell_contents
        case "remap_positions_for_packed_sequence.<locals>.inner_mask":
            yield from _parts(closure["mask_function"].cell_contents)
        case "and_masks.<locals>.and_mask":
            for part in closure["mask_functions"].cell_contents:
                yield from _parts(part)
        case _:
            yield "other", None
