"""The run that data, hardware and time deserve: for each size of model what it would reach, the best first.

    tokens = min(tokens a second of the fastest layout that fits * (time - time to serve), 16 epochs)
    loss   = the law of parameters and tokens, of which `data_tokens` are unique

Serving counts 2 FLOPs a parameter and token at the same efficiency, out of the same time: what is promised to users is
not left for training, so the best model is smaller (Sardana et al. 2023, arXiv:2401.00448, for a budget, not a loss).
"""

import math
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

from cs336.models import TransformerConfig, training_memory
from cs336.optim.config import AdamWConfig
from cs336.parallel import ParallelConfig, Plan, plan
from cs336.parallel.hardware import Gpu, find
from cs336.scaling.fit import EPOCH_FIT, Fit
from cs336.scaling.laws import check_positive, step_law
from cs336.training.config import DataConfig, TrainConfig
from cs336.utils.duration import duration

ASPECT = 100  # d_model / num_layers; 25 to 400 are within 3 % of it: arXiv:2001.08361, figure 5
WIDTHS = (64, 16384)  # the narrowest and the widest model that is tried, an eighth of an octave apart
MOST_EPOCHS = 16  # a token read again then is worth 1 / e of a fresh one: arXiv:2305.16264
LEAST_STEPS = 100
PUBLISHED = (7e7, 1.6e10), (5e9, 5e11)  # parameters and tokens of the runs behind EPOCH
HIGHEST_LR = 1e-2  # the law of the rate was fitted from 60M parameters on; below that it has no upper end


@dataclass(frozen=True)
class RunPlan:
    """A run, and what is predicted of it."""

    model: TransformerConfig
    tokens: int
    """Read in training, again or not: whole steps."""
    epochs: float
    batch_size: int
    """Sequences a step, of all GPUs."""
    lr: float
    parallel: Plan
    """How it is split, with the memory of the fullest GPU and the time of a step."""
    gpus: int
    loss: float
    interval: tuple[float, float]
    """95 % of such runs, where corpus and tokenizer are those of the law."""
    training_seconds: float
    serving_seconds: float

    @property
    def parameters(self) -> int:
        return self.model.num_parameters()

    @property
    def steps(self) -> int:
        return self.tokens // self.parallel.tokens

    def config(self, run_dir: pathlib.Path, train: pathlib.Path, val: pathlib.Path | None = None) -> TrainConfig:
        """What `cs336 train` runs, on as many GPUs as were planned."""
        layout = self.parallel.layout
        return TrainConfig(
            run_dir=run_dir,
            data=DataConfig(train, val),
            model=self.model,
            optimizer=AdamWConfig(lr=self.lr),
            budget=f"{self.steps}steps",
            batch_size=self.batch_size,
            micro_batch_size=layout.micro_batch,
            gradient_checkpointing=layout.recompute,  # type: ignore[arg-type]
            parallel=ParallelConfig(data=self.gpus, zero=layout.zero),  # type: ignore[arg-type]
        )


def plan_run(
    data_tokens: float,
    seconds: float,
    *,
    gpus: int = 1,
    gpu: Gpu | str = "H100",
    inference_tokens: float = 0.0,
    vocab_size: int = 32_768,
    context_length: int = 2048,
    compute_bytes: int = 2,
    fit: Fit = EPOCH_FIT,
) -> list[RunPlan]:
    """Every size of model that fits, by the loss that is predicted: the first is the run to make.

    Args:
        data_tokens: unique tokens there are; reading them again is worth less (arXiv:2305.16264).
        seconds: of all GPUs together, for training and for what is served.
        gpu: one of parallel.hardware.GPUS by name, or a Gpu that was measured.
        inference_tokens: tokens that the model will read and write in its life.
        compute_bytes: of an activation; 4 where training is in float32.
        fit: the law of the loss, of parameters with embeddings.

    Raises ValueError for numbers that are not positive, and where no model fits memory and time.
    """
    check_positive(data_tokens=data_tokens, seconds=seconds)
    if not (inference_tokens >= 0 and math.isfinite(inference_tokens)):
        raise ValueError(f"inference_tokens must be finite and not negative, got {inference_tokens}")
    if gpus < 1:
        raise ValueError(f"gpus must be 1 or more, got {gpus}")
    device = find(gpu) if isinstance(gpu, str) else gpu
    flops = gpus * device.flops * device.efficiency  # a second
    found = []
    for model in shapes(vocab_size, context_length):
        serving = inference_tokens * model.flops_per_token() / 3 / flops
        training = seconds - serving
        most = MOST_EPOCHS * data_tokens
        expected = min(most, training * flops / model.flops_per_token())
        if expected < LEAST_STEPS * gpus * context_length:
            continue
        batch_size = _batch_size(model, expected, gpus)
        split = fastest(model, gpus, device, batch_size, compute_bytes)
        steps = int(min(most, training * split.tokens_per_second) / split.tokens)
        if not split.fits or steps < LEAST_STEPS:
            continue
        tokens = steps * split.tokens
        loss, interval = fit.predict(model.num_parameters(), tokens, unique_tokens=data_tokens)
        found.append(
            RunPlan(
                model=model,
                tokens=tokens,
                epochs=tokens / data_tokens,
                batch_size=batch_size,
                lr=float(f"{min(HIGHEST_LR, step_law(model.num_parameters(embeddings=False), tokens)[0]):.3g}"),
                parallel=split,
                gpus=gpus,
                loss=loss,
                interval=interval,
                training_seconds=steps * split.step_seconds,
                serving_seconds=serving,
            )
        )
    if not found:
        raise ValueError(
            f"no model trains for {LEAST_STEPS} steps within {seconds:,.0f} s on {gpus} {device.name} and "
            f"{MOST_EPOCHS} epochs of {data_tokens:,.0f} tokens, beside {inference_tokens:,.0f} served: give more "
            "time, GPUs or data, or a shorter context"
        )
    return sorted(found, key=lambda p: p.loss)


def shapes(vocab_size: int, context_length: int) -> Iterator[TransformerConfig]:
    """Decoders from narrow to wide, of one aspect ratio: heads of 64 features, from a width of 2048 of 128."""
    narrowest, widest = WIDTHS
    widths = [narrowest * 2 ** (i / 8) for i in range(round(8 * math.log2(widest / narrowest)) + 1)]
    rounded = {(round(width / head) * head, head) for width in widths for head in (128 if width >= 2048 else 64,)}
    for width, head in sorted(rounded):
        yield TransformerConfig(vocab_size, context_length, max(2, round(width / ASPECT)), width, width // head)


def fastest(model: TransformerConfig, gpus: int, gpu: Gpu, batch_size: int, compute_bytes: int = 2) -> Plan:
    """Of the layouts that `cs336 train` runs; of those as fast by the planner's roofs, with the largest micro-batch
    that fits, which launches least. Where nothing fits, one that does not."""
    casts = training_memory(model, 1, context_length=1, compute_bytes=compute_bytes).casts
    plans = [  # autocast keeps its copies of all matrices until the backward, whatever ZeRO splits
        replace(p, memory=replace(p.memory, casts=max(casts, p.memory.casts)))
        for p in plan(model, gpus, gpu=gpu, batch_size=batch_size, compute_bytes=compute_bytes, data_only=True)
    ]
    first = next((p for p in plans if p.fits), plans[0])

    def like(p: Plan) -> tuple:
        return p.fits, f"{p.step_seconds:.3g}", p.layout.zero, p.layout.recompute

    return max((p for p in plans if like(p) == like(first)), key=lambda p: p.layout.micro_batch)


def _batch_size(model: TransformerConfig, tokens: float, gpus: int) -> int:
    """The law's, as a power of two of sequences a GPU, and no more than leaves LEAST_STEPS."""
    wanted = step_law(model.num_parameters(embeddings=False), tokens)[1]
    most = tokens / LEAST_STEPS
    sequences = min(wanted, most) / (gpus * model.context_length)
    power = round(math.log2(max(1.0, sequences)))
    return gpus * 2 ** (power if gpus * model.context_length * 2**power <= most else max(0, power - 1))


def explain(best: RunPlan) -> str:
    """A plan, a line a decision."""
    model, layout = best.model, best.parallel
    low, high = best.interval
    per_step = layout.tokens
    served = f", and {duration(best.serving_seconds)} to serve" if best.serving_seconds else ""
    rows = {
        "model": f"{best.parameters:,} parameters: d_model {model.d_model}, {model.num_layers} layers, "
        f"{model.num_heads} heads",
        "tokens": f"{best.tokens:.3g}, {best.epochs:.2f} epochs, {best.tokens / best.parameters:.1f} a parameter",
        "batch": f"{best.batch_size:,} sequences, {per_step:,} tokens; {best.steps:,} steps",
        "rate": f"{best.lr:g}, highest, of AdamW",
        "layout": f"{layout.layout}; {100 * layout.mfu:.1f} % MFU",
        "memory": f"{layout.memory.total / 2**30:.1f} of {layout.room / 2**30:.1f} GiB a GPU",
        "time": f"{duration(best.training_seconds)} to train at {layout.tokens_per_second:,.0f} tokens/s{served}",
        "loss": f"{best.loss:.3f} nats a token, 95 % of such runs between {low:.3f} and {high:.3f}",
    }
    return "\n".join(f"{name:8}{text}" for name, text in rows.items())


def caution(best: RunPlan) -> str | None:
    """Where the published law was not measured: at sizes and tokens beyond those of arXiv:2203.15556's runs."""
    sizes, tokens = PUBLISHED
    if sizes[0] <= best.parameters <= sizes[1] and tokens[0] <= best.tokens <= tokens[1]:
        return None
    return (
        f"the published law is of {sizes[0]:.0e} to {sizes[1]:.0e} parameters and {tokens[0]:.0e} to {tokens[1]:.0e} "
        f"tokens, and this is {best.parameters:.1e} on {best.tokens:.1e}: its loss is a guess there. Fit a law to "
        "small runs of your own: cs336 scaling fit, then --law"
    )


def table(plans: list[RunPlan]) -> str:
    """A row a plan, as they are ranked."""
    rows = [
        f"{'loss':>7} {'parameters':>11} {'tokens':>9} {'epochs':>7} {'batch':>7} {'rate':>9} {'GiB':>6} {'hours':>8}"
    ]
    for p in plans:
        size = f"{p.loss:7.4f} {p.parameters:11.3g} {p.tokens:9.3g} {p.epochs:7.2f} {p.batch_size:7,}"
        memory, hours = p.parallel.memory.total / 2**30, p.training_seconds / 3600
        rows.append(f"{size} {p.lr:9.3g} {memory:6.1f} {hours:8.3g}")
    return "\n".join(rows)
