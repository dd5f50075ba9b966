"""B = batch, S = tokens, M = d_model, V = vocabulary."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn

from cs336 import ops
from cs336.models import mup
from cs336.models.block import Stream, TransformerBlock
from cs336.models.config import TransformerConfig
from cs336.models.invariance import check_invariant
from cs336.models.recompute import Recompute, call_layer
from cs336.models.state import DecodingState, PagedState
from cs336.nn import (
    MLP,
    Attention,
    Context,
    Embedding,
    Hyena,
    LayerNorm,
    LearnedPositions,
    Linear,
    LinearAttention,
    Mamba2,
    MoE,
    PagedKeyValues,
    RMSNorm,
    SinusoidalPositions,
    Slotted,
)
from cs336.nn.derived import Derived
from cs336.nn.linear import linear
from cs336.nn.moe import add_loads
from cs336.ops import registry


class Transformer(nn.Module):
    """A decoder, made of its config's blocks.

    Under torch.autocast the residual stream is in autocast's dtype. Set `gradient_checkpointing` to recompute each
    layer in the backward instead of keeping its activations: see cs336.models.recompute.
    """

    def __init__(
        self, config: TransformerConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ):
        super().__init__()
        self.config = config
        self.gradient_checkpointing: Recompute = False
        self.call_layer: Callable[..., tuple] = call_layer
        """What calls a layer without a state. With torch.compile of it layers of one kind are compiled once, not the
        whole model, layer by layer."""
        self.special_ids: dict[str, Any] = {}
        """bos_token_id, eos_token_id and the like, as from_pretrained read them in config.json."""
        self.generation_config: dict[str, Any] = {}
        """What generation_config.json said; save_pretrained writes it again."""
        self.chat_template: str | None = None
        """How a conversation becomes a text, in Jinja, as the tokenizer's files said; saved as the two above."""
        self.saved_context = config.context_length
        """The context_length that files of this model say, where it was read for shorter texts: see `within`."""
        d_model = config.d_model
        place: dict[str, Any] = {"device": torch.device("meta"), "dtype": dtype}  # memory and weights come once, below
        self.embedding = Embedding(config.vocab_size, d_model, **place)
        self.position_embedding: nn.Module | None = None
        if config.position_embedding == "learned":
            self.position_embedding = LearnedPositions(config.context_length, d_model, **place)
        elif config.position_embedding == "sinusoidal":
            self.position_embedding = SinusoidalPositions(config.context_length, d_model, device="meta")
        ropes = {
            (block.positions, block.mixer.rope_dim(d_model)): block.build_rope(
                d_model, config.context_length, device="meta"
            )
            for block in config.blocks
        }
        self.layers = nn.ModuleList(
            TransformerBlock(block, d_model, ropes[block.positions, block.mixer.rope_dim(d_model)], **place)
            for block in config.blocks
        )
        self.norm = config.final_norm.build(d_model, **place) if config.final_norm else None
        self.head = None if config.tie_embeddings else Linear(d_model, config.vocab_size, **place)
        if config.float32_norms:
            for norm in self._norms().values():
                norm.keep_float32()
        self.register_load_state_dict_post_hook(_place_derived)
        self.to_empty(device=torch.get_default_device() if device is None else device)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Matrices normal with init_std, what writes to the stream over sqrt(2 * num_layers), with mup_base_width as
        muP has them; norms 1, biases and sinks 0. Decays, convolutions and filters start as their mixers say."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(0 if name.endswith(("bias", "sinks")) else 1)
            else:
                writes = name.removesuffix(".weight").endswith(("o_proj", "out_proj", "down_proj"))
                depth = 2 * self.config.num_layers if writes else 1
                parameter.normal_(std=mup.init_scale(self.config, name) * self.config.init_std / depth**0.5)
        for layer in self.layers:
            mixer = cast(TransformerBlock, layer).attention
            mlp = cast(TransformerBlock, layer).mlp
            if isinstance(mlp, MoE):
                mlp.reset_balance()
            if isinstance(mixer, LinearAttention | Mamba2 | Hyena):
                mixer.reset_dynamics()

    def lr_scales(self) -> dict[str, float]:
        """Of parameters by name: what their learning rate is multiplied by. Only with mup_base_width, those not 1."""
        scales = {name: mup.lr_scale(self.config, name, p.dim()) for name, p in self.named_parameters()}
        return {name: scale for name, scale in scales.items() if scale != 1}

    def forward(
        self,
        token_ids_BS: Tensor,
        *,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        state: DecodingState | PagedState | None = None,
        targets: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        return_routing: bool = False,
    ) -> Any:
        """Logits (B, S, V) of the next token after each; with targets the sum of their cross-entropy.

        Args:
            token_ids_BS: (B, S) int64 or int32 in [0, vocab_size).
            positions: (S,) or (B, S) int64 or int32 in [0, context_length), of rotary and absolute positions. None: 0
                to S - 1, from 0 again in each segment, and behind the state's tokens.
            segments: (B, S) integers. Each run of equal ones is a document that sees no other. With a state the row
                is one document, and a negative segment marks padding on the right, which the state does not count.
            state: the tokens before these, of which these become part.
            targets: (B, S) int64 or int32, each in [0, vocab_size) or ignore_index, which counts for nothing. The
                logits are then never kept whole: see ops.linear_cross_entropy.
            label_smoothing, z_loss: of ops.cross_entropy. With either two sums are returned in place of one: what is
                minimised, and the cross-entropy alone, without a gradient.
            return_routing: return (logits or sum, Routing) of a model with mixtures of experts: what their routers add
                to a loss, and the load of the experts. (logits or sum, None) of another.

        Returns the weights' dtype, or autocast's; at least float32 with a soft-cap. The sum is a float32 scalar.
        Raises ValueError for a shape or dtype that does not fit, or past context_length.
        """
        stream = self._layers(token_ids_BS, positions, segments, state)
        features_BSM = self._normed(stream)
        if targets is None:
            out: Any = self.logits(features_BSM)
        else:
            out = self.loss(features_BSM, targets, ignore_index, label_smoothing=label_smoothing, z_loss=z_loss)
        return (out, stream.routing) if return_routing else out

    def features(
        self,
        token_ids_BS: Tensor,
        *,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        state: DecodingState | PagedState | None = None,
    ) -> Tensor:
        """What the head reads: (B, S, M), normalised, times logit_scale. Arguments and errors as forward's."""
        return self._normed(self._layers(token_ids_BS, positions, segments, state))

    def features_beside(
        self, batches: Sequence[tuple[Tensor, PagedState]], places: Sequence[Callable[[], AbstractContextManager]]
    ) -> list[Tensor]:
        """What `features` returns of each batch: token ids (1, T), and the state that says whose they are. No sequence
        is in two of them.

        places: where a batch is computed, a stream for example. Each is given work layer by layer, so that one may
            compute while another waits for memory.
        """
        contexts: list[Context] = []
        ongoing: list[Stream] = []
        for (ids_1T, state), place in zip(batches, places, strict=True):
            with place():
                contexts.append(self._context(ids_1T, None, None, state))
                ongoing.append(Stream(self._embed(ids_1T, contexts[-1]), None))
        for i, layer in enumerate(self.layers):
            for j, ((_, state), context, place) in enumerate(zip(batches, contexts, places, strict=True)):
                with place():
                    ongoing[j] = layer(ongoing[j], context, state.layers[i])
        features = []
        for stream, place in zip(ongoing, places, strict=True):
            with place():
                features.append(self._normed(stream))
        return features

    def _normed(self, stream: Stream) -> Tensor:
        x_BSM, scale = stream.value if self.norm is None else stream.normed(self.norm)[0], self.config.logit_scale
        return x_BSM if scale is None else scale * x_BSM  # here, so that whatever is fused with the head knows none

    def _layers(
        self,
        token_ids_BS: Tensor,
        positions: Tensor | None,
        segments: Tensor | None,
        state: DecodingState | PagedState | None,
    ) -> Stream:
        context = self._context(token_ids_BS, positions, segments, state)
        stream = Stream(self._embed(token_ids_BS, context), None)
        how = self.gradient_checkpointing if torch.is_grad_enabled() else "none"
        for i, layer in enumerate(self.layers):
            if state is None:
                stream = Stream.of(self.call_layer(how, layer, stream.flat(), context))
            else:
                stream = layer(stream, context, state.layers[i])
        if state is not None:
            state.advance(context.counts(token_ids_BS.shape[1]))
        if stream.routing is not None and self.training and torch.is_grad_enabled():
            add_loads(self, stream.routing)  # here, for a layer that is checkpointed runs twice
        return stream

    def _embed(self, token_ids_BS: Tensor, context: Context) -> Tensor:
        x_BSM, config = self.embedding(token_ids_BS), self.config
        if config.embedding_scale is not None:
            x_BSM = config.embedding_scale * x_BSM
        if self.position_embedding is not None:
            S, positions = token_ids_BS.shape[1], context.positions
            if positions is None:
                positions = torch.arange(S, device=x_BSM.device) if context.lengths is None else context.slots(S)
            x_BSM = x_BSM + self.position_embedding(positions).to(x_BSM.dtype)
        x_BSM = x_BSM.to(self.compute_dtype)
        if config.embedding_dropout:
            x_BSM = nn.functional.dropout(x_BSM, config.embedding_dropout, self.training)
        return x_BSM

    def join_weights(self) -> None:
        """Lay those weights together that read the same features, for steps of few tokens: see nn/linear.py."""
        for layer in self.layers:
            for module in (cast(TransformerBlock, layer).attention, cast(TransformerBlock, layer).mlp):
                if isinstance(module, Attention | LinearAttention | MLP):
                    module.join()

    def logits(self, features_BSM: Tensor) -> Tensor:
        """(..., M) as `features` returns them -> (..., V), soft-capped."""
        if self.head is None:
            logits_BSV = linear(features_BSM, self.embedding.weight)
        else:
            logits_BSV = self.head(features_BSM)
        cap = self.config.logit_softcap
        if cap is None:
            return logits_BSV
        return cap * torch.tanh(logits_BSV.to(torch.promote_types(logits_BSV.dtype, torch.float32)) / cap)

    def loss(
        self,
        features_BSM: Tensor,
        targets: Tensor,
        ignore_index: int = -100,
        *,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> Any:
        """The sum of the cross-entropy of features (..., M) as `features` returns them; the rest as forward's."""
        head = self.embedding if self.head is None else self.head
        layer, cap = (features_BSM, head.weight, targets), self.config.logit_softcap
        sums, entropy = self._fused_losses()
        if label_smoothing or z_loss:
            return sums(*layer, ignore_index=ignore_index, softcap=cap, label_smoothing=label_smoothing, z_loss=z_loss)
        return entropy(*layer, ignore_index=ignore_index, softcap=cap, reduction="sum")

    def _fused_losses(self) -> tuple[Callable, Callable]:
        """linear_loss_sums and linear_cross_entropy of this model's head."""
        return ops.linear_loss_sums, ops.linear_cross_entropy

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens that end a text, as generation_config.json says, or config.json; none if neither was read."""
        eos = self.generation_config.get("eos_token_id", self.special_ids.get("eos_token_id"))
        return () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    def _norms(self) -> dict[str, LayerNorm | RMSNorm]:
        return {name: module for name, module in self.named_modules() if isinstance(module, LayerNorm | RMSNorm)}

    def dtypes(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """Of its parameters by name, in a model of this dtype: only norms that are kept in float32 may have another."""
        wide = {f"{name}.{part}" for name, norm in self._norms().items() if norm.float32 for part in norm._parameters}
        widened = torch.promote_types(dtype, torch.float32)
        return {name: widened if name in wide else dtype for name, _ in self.named_parameters()}

    @property
    def compute_dtype(self) -> torch.dtype:
        """Autocast's dtype inside torch.autocast, the weights' outside."""
        kind, dtype = self.device.type, self.embedding.weight.dtype
        autocast = kind != "meta" and torch.is_autocast_enabled(kind)  # is_autocast_available: a graph break in 2.11
        return torch.get_autocast_dtype(kind) if autocast else dtype

    @classmethod
    def within(
        cls, config: TransformerConfig, max_len: int | None, device: torch.device | str | None = None
    ) -> "Transformer":
        """A config's model for texts of at most max_len tokens, saved as that of all: see TransformerConfig.within."""
        model = cls(config.within(max_len), device)
        model.saved_context = config.context_length
        return model

    @property
    def saved_config(self) -> TransformerConfig:
        """`config`, as files say it."""
        return dataclasses.replace(self.config, context_length=max(self.config.context_length, self.saved_context))

    def new_state(self, batch_size: int, max_len: int | None = None, *, rollback: int = 0) -> DecodingState:
        """An empty state of this model's dtype and device, with room for max_len tokens a row, context_length if None.

        rollback: how many tokens a row may go back in layers whose memory is bounded; in others it may go back to any.
        Raises ValueError for more than context_length, and for a negative number of rows or tokens.
        """
        limit = self.config.context_length
        max_len = limit if max_len is None else max_len
        if batch_size < 0 or max_len < 0:
            raise ValueError(f"a state is of 0 or more rows and tokens, got batch_size {batch_size}, max_len {max_len}")
        if max_len > limit:
            raise ValueError(f"{max_len} tokens do not fit the model's context_length of {limit}")
        device, dtype = self.device, self.compute_dtype
        if rollback < 0:
            raise ValueError(f"rollback must be 0 or more tokens, got {rollback}")
        mixers = [cast(TransformerBlock, layer).attention for layer in self.layers]
        layers = [
            mixer.new_state(batch_size, max_len, rollback=rollback, device=device, dtype=dtype) for mixer in mixers
        ]
        return DecodingState(layers, torch.zeros(batch_size, dtype=torch.int64, device=device), max_len)

    def new_pages(
        self, num_pages: int, page_size: int, num_slots: int = 0, max_len: int | None = None, *, rollback: int = 0
    ) -> PagedState:
        """Pools of num_pages pages of page_size tokens, of this model's dtype and device: see nn/paged.py. Where a
        mixer's state has no pages, num_slots rows of it, for max_len tokens each, context_length if None; these may go
        back by `rollback` tokens."""
        place: dict[str, Any] = {"device": self.device, "dtype": self.compute_dtype}
        options = place | {"rollback": rollback}
        max_len = self.config.context_length if max_len is None else max_len
        layers: list[PagedKeyValues | Slotted] = []
        for layer in self.layers:
            mixer: Any = cast(TransformerBlock, layer).attention
            if getattr(mixer, "has_pages", False):
                layers.append(mixer.new_pages(num_pages, page_size, **place))
            else:
                layers.append(Slotted(functools.partial(mixer.new_state, num_slots, max_len, **options)))
        return PagedState(layers)

    def _context(
        self,
        token_ids_BS: Tensor,
        positions: Tensor | None,
        segments_BS: Tensor | None,
        state: DecodingState | PagedState | None,
    ) -> Context:
        if token_ids_BS.dim() != 2:
            raise ValueError(f"token_ids must be (batch, tokens), got shape {tuple(token_ids_BS.shape)}")
        if registry.is_invariant():
            check_invariant(self.config)
        B, S = token_ids_BS.shape
        if segments_BS is not None and (segments_BS.shape != (B, S) or segments_BS.dtype.is_floating_point):
            raise ValueError(
                f"segments must be ({B}, {S}) integers as token_ids are, "
                f"got {tuple(segments_BS.shape)} {segments_BS.dtype}"
            )
        if state is not None:
            return state.context(token_ids_BS, positions, segments_BS)
        if segments_BS is not None:
            return Context.packed(segments_BS, positions)
        if positions is None and self.config.context_length < S:
            raise ValueError(f"{S} tokens do not fit the model's context_length of {self.config.context_length}")
        return Context(positions)


def _place_derived(model: Transformer, incompatible_keys) -> None:
    """Tables follow weights that load_state_dict(assign=True) has put in place of those on meta."""
    for module in model.modules():
        if isinstance(module, Derived):
            module.place(model.device)
