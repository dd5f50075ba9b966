"""Every way to split a training run over N GPUs: what each takes and sends, and how long a step is, before paying.

    step = micro-batches (m + p - 1) * (compute + sums of tensor, context, expert)  +  what data sends behind none of it
           + the optimizer, and what is copied on a GPU to be sent

compute = FLOPs / (GPU's FLOP/s * its efficiency). Bytes of memory are those of models/memory.py, of the part of the
model that the fullest rank has. What a rank sends is what count_traffic counts of such a step. Gradients travel behind
the backward of the last micro-batch, with ZeRO-2 and 3 of each, weights of ZeRO-3 behind what is computed meanwhile; a
ring's keys and values behind attention. Behind nothing: the embedding's gradient, which is there last, and with ZeRO-1
the weights that were stepped. Axes lie as (data, pipeline, context, expert, tensor), neighbours last.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from cs336.models import BlockConfig, Memory, TransformerConfig
from cs336.models.config import SHORT
from cs336.models.memory import head_bytes, kept_bytes, matrices, side_by_side_bytes
from cs336.nn import AttentionConfig, MoEConfig, NoMLPConfig
from cs336.parallel.hardware import Gpu, find
from cs336.parallel.layout import AXES, ParallelConfig
from cs336.parallel.pipeline import layers_of
from cs336.parallel.vocabulary import vocabulary_loss_bytes

RECOMPUTE: tuple[Literal["none", "selective", "full"], ...] = ("none", "selective", "full")
RECOMPUTED = {"none": 3.0, "selective": 3.15, "full": 4.0}  # forwards that a step costs, of which the backward is two


Units = tuple[tuple[float, str], ...]
BYTES: Units = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))
SENT: Units = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B"))
TIMES: Units = ((1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))


def _in(units: Units, value: float) -> str:
    """In the largest unit of which it is one or more."""
    size, name = next((unit for unit in units if value >= unit[0]), units[-1])
    return f"{value / size:.1f} {name}"


@dataclass(frozen=True)
class Layout:
    """How many ranks there are along each axis."""

    data: int = 1
    zero: int = 0
    """Of the ranks that hold alike: 0 nothing is divided, 1 the optimizer, 2 gradients too, 3 parameters too."""
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    micro_batch: int = 1
    """Sequences of a forward pass."""
    recompute: str = "none"
    schedule: Literal["1f1b", "gpipe"] = "1f1b"

    @property
    def gpus(self) -> int:
        return self.data * self.tensor * self.pipeline * self.context * self.expert

    @property
    def alike(self) -> int:
        """Ranks that hold the same parameters, experts apart."""
        return self.experts_alike * self.expert

    @property
    def experts_alike(self) -> int:
        """Ranks that hold the same experts."""
        return self.data * self.context

    @property
    def whole_weights(self) -> bool:
        """Whether every rank has all weights all the time."""
        return self.gpus == self.data and self.zero <= 1

    @property
    def config(self) -> ParallelConfig:
        """The [parallel] table of such a run."""
        sizes = {axis: getattr(self, axis) for axis in AXES}
        return ParallelConfig(**sizes, zero=self.zero, schedule=self.schedule)  # type: ignore[arg-type]

    def __str__(self) -> str:
        axes = {axis: getattr(self, axis) for axis in ("tensor", "pipeline", "context", "expert")}
        parts = [f"data {self.data}", *([f"zero {self.zero}"] if self.zero else [])]
        parts += [f"{axis} {size}" for axis, size in axes.items() if size > 1]
        return ", ".join([*parts, f"micro-batch {self.micro_batch}", f"recompute {self.recompute}"])


@dataclass(frozen=True, eq=False)
class Work:
    """A training step that is to be split."""

    config: TransformerConfig
    batch_size: int
    """Sequences of a step, of all ranks."""
    context_length: int
    weight_bytes: int = 4
    compute_bytes: int = 2
    optimizer_bytes: float = 8
    compiled: bool = True
    """By our kernels on a GPU: see cs336.models.memory."""
    layers_compiled: bool | None = None
    """None: as `cs336 train` on a GPU does by itself, where data alone are split, and ZeRO splits no weights."""
    fused_head: bool = False
    """Head and loss are one, which never has whole logits: objective.fused_head. A pipeline's always are."""

    @functools.cached_property
    def flops(self) -> float:
        """Of a step, without recomputation."""
        return self.config.flops_per_token(self.context_length) * self.batch_size * self.context_length

    @functools.cached_property
    def attention(self) -> float:
        """Its share of the FLOPs."""
        return 1 - self.config.flops_per_token(0) / self.config.flops_per_token(self.context_length)


@dataclass(frozen=True)
class Plan:
    """A layout, and what is predicted of it. Bytes and seconds are of the rank that has most, a step."""

    layout: Layout
    memory: Memory
    room: float
    """Bytes of a GPU that a plan may fill."""
    sent: dict[str, int] = field(hash=False)
    """Bytes that a rank sends, by the axis they are for."""
    seconds: dict[str, float] = field(hash=False)
    """Compute, what stands idle in the pipeline, the optimizer, and what of each axis's messages is not hidden."""
    tokens: int
    mfu: float
    """FLOPs of the model, none of them recomputed, over those the GPUs could do."""

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.room

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step_seconds

    def explain(self) -> str:
        """Sentences: whether it fits and what fills it, what a step is made of, what is sent."""
        memory, total = dataclasses.asdict(self.memory), self.step_seconds
        largest = sorted(memory, key=lambda name: -memory[name])[:3]
        filled = ", ".join(f"{name} {_in(BYTES, memory[name])}" for name in largest if memory[name])
        verdict = "fits" if self.fits else "does not fit"
        parts = sorted(self.seconds.items(), key=lambda part: -part[1])
        shares = ", ".join(f"{name} {100 * s / total:.1f} %" for name, s in parts if s > 0.001 * total)
        sent = ", ".join(f"{axis} {_in(SENT, size)}" for axis, size in self.sent.items() if size) or "nothing"
        return (
            f"{self.layout}: {verdict}, {_in(BYTES, self.memory.total)} of {_in(BYTES, self.room)} ({filled}). "
            f"A step takes {_in(TIMES, total)} ({shares}), {self.tokens_per_second:,.0f} tokens/s, "
            f"{100 * self.mfu:.1f} % MFU. A GPU sends: {sent}."
        )


def plan(
    config: TransformerConfig,
    gpus: int,
    *,
    gpu: Gpu | str = "H200",
    batch_size: int,
    context_length: int | None = None,
    weight_bytes: int = 4,
    compute_bytes: int = 2,
    optimizer_bytes: float = 8,
    fill: float = 0.9,
    data_only: bool = False,
) -> list[Plan]:
    """Every layout of a model on so many GPUs: those that fit first, each by the time of a step.

    Args:
        gpu: one of parallel.hardware.GPUS by name, or a Gpu with measured roofs and network.
        batch_size: sequences of a step, of all GPUs; context_length: their tokens, the config's if None.
        weight_bytes, compute_bytes, optimizer_bytes: as in models.training_memory.
        fill: the share of a GPU's memory that a plan may fill; the rest is the allocator's and NCCL's.
        data_only: split nothing but data and what ZeRO does.

    Raises ValueError for numbers that are not positive, a network that does not reach, and where nothing divides.
    """
    context_length = config.context_length if context_length is None else context_length
    for name, value in (("gpus", gpus), ("batch_size", batch_size), ("context_length", context_length)):
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, got {value}")
    device = find(gpu) if isinstance(gpu, str) else gpu
    device.tier(gpus)
    capped = config.logit_softcap is not None  # whose head `cs336 train` fuses by itself
    sizes = weight_bytes, compute_bytes, optimizer_bytes
    work = Work(config, batch_size, context_length, *sizes, fused_head=capped)
    found = _of_data(work, gpus) if data_only else layouts(work, gpus)
    plans = [predict(work, layout, device, fill) for layout in found]
    if not plans:
        raise ValueError(
            f"no layout has {gpus} GPUs: a batch of {batch_size}, {config.num_layers} layers, the heads and the hidden "
            "features do not divide into as many; raise batch_size to a multiple of the GPUs"
        )
    return sorted(plans, key=_place)


def _place(p: Plan) -> tuple:
    """Of those whose time is the same to three digits the one that sends least, then the simplest, then the smallest,
    is first."""
    if not p.fits:
        return True, p.memory.total, p.step_seconds
    simple = sum(getattr(p.layout, axis) > 1 for axis in AXES), p.layout.zero, RECOMPUTE.index(p.layout.recompute)
    return False, float(f"{p.step_seconds:.3g}"), sum(p.sent.values()), simple, p.memory.total


def layouts(work: Work, gpus: int) -> Iterator[Layout]:
    """Those that divide without a rest."""
    config = work.config
    for tensor in (t for t in _divisors(gpus) if not _tensor_refuses(config, t)):
        for pipeline in (p for p in _divisors(gpus // tensor) if p <= config.num_layers):
            for context in (c for c in _divisors(gpus // tensor // pipeline) if _context_divides(work, c)):
                left = gpus // tensor // pipeline // context
                for expert in (e for e in _divisors(left) if _experts_divide(config, e)):
                    if work.batch_size % left == 0:
                        axes: dict[str, Any] = {
                            "tensor": tensor,
                            "pipeline": pipeline,
                            "context": context,
                            "expert": expert,
                        }
                        yield from _variants(Layout(left // expert, **axes), work.batch_size // left)


def _of_data(work: Work, gpus: int) -> Iterator[Layout]:
    if work.batch_size % gpus == 0:
        yield from _variants(Layout(gpus), work.batch_size // gpus)


def _variants(layout: Layout, sequences: int) -> Iterator[Layout]:
    """With each stage of ZeRO, micro-batch and recomputation."""
    stages = (0,) if layout.alike == 1 else (0, 1) if layout.pipeline > 1 else (0, 1, 2, 3)
    micro_batches = [m for m in _divisors(sequences) if m & (m - 1) == 0]
    for zero in stages:
        for micro_batch in micro_batches:
            for recompute in RECOMPUTE:
                yield dataclasses.replace(layout, zero=zero, micro_batch=micro_batch, recompute=recompute)


def _divisors(n: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return [*small, *(n // d for d in reversed(small) if d * d != n)]


def _tensor_refuses(config: TransformerConfig, t: int) -> bool:
    def divides(block: BlockConfig) -> bool:
        mixer, mlp = block.mixer, block.mlp
        heads = isinstance(mixer, AttentionConfig) and mixer.qk_norm != "all" and mixer.kv_heads % t == 0
        return heads and not isinstance(mlp, MoEConfig | NoMLPConfig) and mlp.width(config.d_model) % t == 0

    return t > 1 and not (config.vocab_size % t == 0 and all(divides(block) for block in set(config.blocks)))


def _context_divides(work: Work, c: int) -> bool:
    mixers = [b.mixer for b in work.config.blocks]
    plain = all(isinstance(m, AttentionConfig) and m.window is None and not m.sinks for m in mixers)
    return c == 1 or (plain and work.context_length % (2 * c) == 0)


def _experts_divide(config: TransformerConfig, e: int) -> bool:
    counts = {block.mlp.num_experts for block in config.blocks if isinstance(block.mlp, MoEConfig)}
    return e == 1 or (bool(counts) and all(count % e == 0 for count in counts))


# ---- what a rank has ----


@dataclass(frozen=True)
class Part:
    """What one rank has of the model: of a stage's layers its heads, hidden features and rows of the vocabulary."""

    model: TransformerConfig
    """As it is here."""
    dense: int
    """Parameters, without those of experts."""
    experts: int
    """Parameters of all experts of these layers."""
    cast: int
    """Of `dense`, those of layers that autocast reads in its own dtype."""
    embedding: int
    """Parameters of the table that tokens are looked up in; 0 but in the first stage."""
    head: int
    """Parameters of the head, be they the embedding's; 0 but in the last stage."""
    largest: int
    """Parameters of the largest block."""
    kept: dict[str, int] = field(hash=False)
    """Bytes a token that are kept for the backward, by what is recomputed."""
    again: dict[str, int] = field(hash=False)
    """Bytes a token that are there of one block while it is recomputed."""
    copied: dict[str, int] = field(hash=False)
    """Bytes of the matrices that compiled layers lay side by side, by what is recomputed."""
    norms: int
    """Bytes a token, of those kept, that norms keep."""
    keys: int
    """Features of keys and values, of all layers."""
    choices: int
    """Experts that a token goes to, of all layers."""

    @property
    def layers(self) -> int:
        return self.model.num_layers

    @property
    def root(self) -> int:
        """Parameters of embedding and head, which no layer has."""
        return max(self.embedding, self.head) if self.model.tie_embeddings else self.embedding + self.head


@functools.cache
def part_of(work: Work, tensor: int, pipeline: int, rank: int) -> Part:
    """The part of stage `rank` of `pipeline`."""
    config, layers = work.config, layers_of(rank, pipeline, work.config.num_layers)
    model = _divided(config, tensor, layers)
    mixtures = [block.mlp for block in model.blocks if isinstance(block.mlp, MoEConfig)]
    experts = sum(m.num_experts * m.expert_parameters(config.d_model) for m in mixtures)
    table = model.vocab_size * config.d_model
    embedding, head = table * (rank == 0), table * (rank == pipeline - 1)
    tables = max(embedding, head) if config.tie_embeddings else embedding + head
    compiled = work.compiled or bool(work.layers_compiled)
    how = {r: kept_bytes(model, work.compute_bytes, r, compiled=compiled) for r in RECOMPUTE}
    heads = [b.mixer for b in model.blocks if isinstance(b.mixer, AttentionConfig)]
    return Part(
        model=model,
        dense=model.num_parameters(embeddings=False) + tables - experts,
        experts=experts,
        cast=min(matrices(model), model.num_parameters(embeddings=False) + table) - table - experts,
        embedding=embedding,
        head=head,
        largest=max(block.num_parameters(config.d_model) for block in set(model.blocks)),
        kept={r: kept for r, (kept, _) in how.items()},
        again={r: again for r, (_, again) in how.items()},
        copied={r: side_by_side_bytes(model, work.compute_bytes, r) for r in RECOMPUTE},
        norms=sum(b.num_norms * b.norm.activation_bytes(config.d_model, work.compute_bytes) for b in model.blocks),
        keys=sum(2 * mixer.kv_heads * mixer.head_size(config.d_model) for mixer in heads),
        choices=sum(m.top_k for m in mixtures),
    )


def _divided(config: TransformerConfig, tensor: int, layers: range) -> TransformerConfig:
    """The model of a rank of a tensor group, of these layers."""

    def divided(block: BlockConfig) -> BlockConfig:
        mixer, mlp = block.mixer, block.mlp
        if tensor == 1:
            return block
        assert isinstance(mixer, AttentionConfig)
        heads: dict[str, Any] = {"num_heads": mixer.num_heads // tensor, "num_kv_heads": mixer.kv_heads // tensor}
        mixer = dataclasses.replace(mixer, **heads, head_dim=mixer.head_size(config.d_model))
        mlp = dataclasses.replace(mlp, d_ff=mlp.width(config.d_model) // tensor)  # type: ignore[type-var,arg-type]
        return dataclasses.replace(block, mixer=mixer, mlp=mlp)

    blocks = config.blocks
    made = {block: divided(block) for block in set(blocks)}
    short = {f.name: f.default for f in dataclasses.fields(config) if f.name in SHORT}
    return dataclasses.replace(
        config,
        **short,  # type: ignore[arg-type]
        vocab_size=config.vocab_size // tensor,
        num_layers=len(layers),
        layers=tuple(made[blocks[i]] for i in layers),
        pattern=None,
    )


def rank_memory(work: Work, layout: Layout, rank: int) -> Memory:
    """Of a rank of stage `rank` at its peak."""
    part, zero = part_of(work, layout.tensor, layout.pipeline, rank), layout.zero
    tokens, width, low = _tokens(work, layout), work.weight_bytes, work.compute_bytes
    experts = part.experts // layout.expert
    whole, cast = part.dense + experts, part.cast + experts
    shared = part.dense // layout.alike + experts // layout.experts_alike
    weights, gradients, casts = width * whole, width * whole, low * (cast + part.head)
    if zero >= 2:  # masters and their gradients, and of the root's the head's come first; layers are whole as cast
        gathered = low * cast + width * (whole - cast) if zero == 2 else low * 2 * part.largest + width * part.root
        weights, gradients, casts = width * shared + gathered, width * (shared + part.head), low * part.head
    compiled = work.compiled and layout.whole_weights if work.layers_compiled is None else work.layers_compiled
    copied = part.copied[layout.recompute] if compiled else 0
    if low == width:
        casts = copied
    elif zero >= 2:  # what is cast when it is gathered is copied apart
        casts += copied
    apart = 0 if layout.recompute == "full" else part.norms * (layout.tensor - 1) // layout.tensor
    in_flight = _micro_batches(work, layout) if layout.pipeline > 1 else 1
    if layout.schedule == "1f1b":
        in_flight = min(in_flight, layout.pipeline - rank)
    logits = _logits(work, layout, part) if part.head else 0
    again = tokens * part.again[layout.recompute]
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=round(work.optimizer_bytes * (shared if zero >= 1 else whole)),
        casts=casts,
        activations=tokens * in_flight * (part.kept[layout.recompute] - apart) + max(0, again - logits),
        logits=logits,
    )


def _logits(work: Work, layout: Layout, part: Part) -> int:
    """Bytes of a micro-batch's logits and their gradient in the last stage."""
    tokens, width, model = _tokens(work, layout), work.compute_bytes, part.model
    fused = work.fused_head or layout.pipeline > 1
    if fused and layout.tensor > 1:
        capped = model.logit_softcap is not None
        return vocabulary_loss_bytes(tokens, model.vocab_size, model.d_model, width, capped=capped)
    if layout.tensor > 1 and work.compiled and model.logit_softcap is None:  # gathered, and this part of their gradient
        return (layout.tensor + 1) * width * tokens * model.vocab_size
    own = head_bytes(model, tokens, width, compiled=work.compiled, fused=fused)
    return layout.tensor * own  # gathered where they are not fused


def _micro_batches(work: Work, layout: Layout) -> int:
    return work.batch_size // (layout.data * layout.expert) // layout.micro_batch


def _tokens(work: Work, layout: Layout) -> int:
    """Of a micro-batch, on one rank."""
    return layout.micro_batch * work.context_length // layout.context


# ---- what it sends, and how long that takes ----


@dataclass(frozen=True)
class DataMessages:
    """Bytes that a rank sends for the data axis and what lies alike along others, a micro-batch, by what they can
    travel behind."""

    forward: float = 0
    backward: float = 0
    nothing: float = 0
    """The embedding's: it is needed first, and its gradient is there last; and weights behind a step that needs all."""
    first: float = 0
    """Of `forward` what goes once a step, before its first micro-batch."""
    last: float = 0
    """As `backward`, of the last micro-batch alone."""
    step: float = 0
    """As `nothing`, once a step."""
    copied: float = 0
    """Read and written on the device, for what is sent lies together, and what came where it is used."""
    copied_once: float = 0
    """As `copied`, a step."""

    def sent(self, micro_batches: int) -> float:
        each = self.forward + self.backward + self.nothing
        return micro_batches * each + self.first + self.last + self.step


def data_messages(work: Work, layout: Layout, rank: int = 0) -> DataMessages:
    """Of a rank of stage `rank`. Sums of gradients are in the weights' dtype, as are weights that no layer has."""
    part = part_of(work, layout.tensor, layout.pipeline, rank)
    width, low, zero = work.weight_bytes, work.compute_bytes, layout.zero
    alike, own_experts = _ring(layout.alike), part.experts // layout.expert
    whole = part.dense * (layout.alike > 1) + own_experts * (layout.experts_alike > 1)
    experts = own_experts * _ring(layout.experts_alike)
    last = width * part.embedding * alike
    gradients = width * (part.dense * alike + experts) - last
    if zero <= 1:  # those that a rank has stepped are broadcast; gradients are put into buckets and divided
        moved = 2 * width * whole
        return DataMessages(last=2 * gradients, step=2 * last + width * whole * zero, copied_once=moved * (2 + zero))
    layers = (low * part.cast + width * (part.dense - part.root - part.cast)) * alike + low * experts
    root = width * part.root * alike
    message, gathered = 2 * width * whole, 2 * (low * (part.cast + own_experts) + width * (part.dense - part.cast))
    if zero == 2:
        return DataMessages(
            backward=gradients, nothing=last, first=layers, step=root, copied=message, copied_once=gathered
        )
    again = 1 - 1 / part.layers  # the last layer is still whole when its backward begins
    copied = message + (1 + again) * gathered
    return DataMessages(layers, gradients + again * layers, root + last, copied=copied)


def sent_bytes(work: Work, layout: Layout, rank: int = 0) -> dict[str, int]:
    """Bytes that a rank of stage `rank` sends in a step, by the axis they are for."""
    part = part_of(work, layout.tensor, layout.pipeline, rank)
    m, tokens, c = _micro_batches(work, layout), _tokens(work, layout), layout.context
    first, last = rank == 0, rank == layout.pipeline - 1
    stream, forwards = tokens * work.config.d_model * work.compute_bytes, 1 if layout.recompute == "none" else 2
    # Two sums a layer forward and two backward; forward again, half of one is not needed. The embedding's is not cast.
    sums = (2.5 + 1.5 * forwards) * part.layers + (0.5 + work.weight_bytes / work.compute_bytes) * first + 1.5 * last
    travels = work.compute_bytes * (forwards + 1) * (c - 1) + 4 * c  # keys and values, and their float32 gradients
    tied = work.weight_bytes * part.root if layout.pipeline > 1 and work.config.tie_embeddings else 0
    sizes = {
        "data": data_messages(work, layout, rank).sent(m),
        "tensor": m * _ring(layout.tensor) * (2 * stream * sums + tokens * _sent_of_logits(work, layout) * last),
        "pipeline": m * stream * ((not first) + (not last)) / layout.tensor + tied,
        "context": m * tokens * part.keys * travels if c > 1 else 0,
        "expert": (2 * forwards + 2) * _ring(layout.expert) * stream * m * part.choices,
    }
    return {name: int(size) for name, size in sizes.items()}


def _sent_of_logits(work: Work, layout: Layout) -> int:
    """Bytes a token, of all ranks of a tensor group, in an all-gather: three numbers where the logits do not travel."""
    if work.fused_head or layout.pipeline > 1:
        return 2 * 3 * 4
    capped = work.config.logit_softcap is not None
    return (max(4, work.compute_bytes) if capped else work.compute_bytes) * work.config.vocab_size


def _ring(n: int) -> float:
    """What each of n ranks sends of a tensor in a reduce-scatter, or an all-gather."""
    return (n - 1) / n


def predict(work: Work, layout: Layout, gpu: Gpu, fill: float = 0.9) -> Plan:
    """What a layout takes. Raises ValueError for one that the network does not reach."""
    p, m = layout.pipeline, _micro_batches(work, layout)
    ranks = sorted({0, p // 2, p - 1})
    memory = max((rank_memory(work, layout, rank) for rank in ranks), key=lambda memory: memory.total)
    rank = ranks[len(ranks) // 2] if p > 2 else 0
    sent = sent_bytes(work, layout, rank)
    compute = work.flops / layout.gpus * RECOMPUTED[layout.recompute] / 3 / (gpu.flops * gpu.efficiency)
    strides = {"tensor": 1, "expert": layout.tensor, "context": layout.tensor * layout.expert}
    strides |= {"pipeline": strides["context"] * layout.context, "data": 1}
    took = {
        axis: gpu.seconds(sent[axis], getattr(layout, axis), strides[axis])
        for axis in ("tensor", "expert", "context", "pipeline")
    }
    # Ranks that hold alike are the data axis, outside, and those of context and expert, inside.
    messages = data_messages(work, layout, rank)
    took["data"] = _seen_of_data(messages, layout, gpu, compute / m, m)
    copies = (m * messages.copied + messages.copied_once) / gpu.bandwidth
    took["context"] = max(0.0, took["context"] - work.attention * compute)
    busy = compute + took["tensor"] + took["expert"] + took["context"]
    part = part_of(work, layout.tensor, p, rank)
    experts = part.experts // layout.expert
    mine = part.dense // layout.alike + experts // layout.experts_alike if layout.zero else part.dense + experts
    optimizer = mine * (3 * work.weight_bytes + 2 * work.optimizer_bytes) / gpu.bandwidth
    seconds = {
        "compute": compute,
        "pipeline idle": busy * (p - 1) / m,
        "optimizer": optimizer,
        "copies": copies,
        **took,
    }
    total = sum(seconds.values())
    tokens = work.batch_size * work.context_length
    mfu = work.flops / (total * layout.gpus * gpu.flops)
    return Plan(layout, memory, fill * gpu.memory, sent, seconds, tokens, mfu)


def _seen_of_data(sent: DataMessages, layout: Layout, gpu: Gpu, pass_seconds: float, passes: int) -> float:
    """Seconds a step of what no compute hides; pass_seconds: of a micro-batch's forward and backward."""
    forward = pass_seconds / RECOMPUTED[layout.recompute]
    backward = pass_seconds - forward

    def beyond(size: float, hidden: float = 0) -> float:
        return max(0.0, gpu.seconds(size, layout.alike, layout.gpus // layout.alike) - hidden)

    each = beyond(sent.forward, forward) + beyond(sent.backward, backward) + beyond(sent.nothing)
    return passes * each + beyond(sent.first, forward) + beyond(sent.last, backward) + beyond(sent.step)


def table(plans: list[Plan], top: int = 10) -> str:
    """The first plans, a line each; of those that differ in micro-batch and recomputation alone, the first."""
    firsts: dict[Layout, Plan] = {}
    for p in plans:
        firsts.setdefault(dataclasses.replace(p.layout, micro_batch=1, recompute=""), p)
    rows = [f"{'step':>10} {'tokens/s':>13} {'MFU':>6} {'memory':>10} {'sent':>10}  layout"]
    for p in list(firsts.values())[:top]:
        numbers = f"{_in(TIMES, p.step_seconds):>10} {p.tokens_per_second:13,.0f} {100 * p.mfu:5.1f}%"
        sizes = f"{_in(BYTES, p.memory.total):>10} {_in(SENT, sum(p.sent.values())):>10}"
        rows.append(f"{numbers} {sizes}  {p.layout}{'' if p.fits else '  (does not fit)'}")
    return "\n".join(rows)
