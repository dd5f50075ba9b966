"""What the verbs sft, reward, dpo, ppo and grpo share: a model with its tokenizer and template, and an optimizer step.

B = rows of a batch.
"""

import contextlib
import hashlib
import inspect
import math
import pathlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from cs336.alignment.examples import digest_of
from cs336.alignment.lora import LoRAConfig, LoRALinear, apply_lora, merged
from cs336.inference.chat import CHATML, CHATML_STOP, ChatTemplate
from cs336.inference.load import find_model, find_tokenizer, load_model, load_tokenizer
from cs336.inference.vocabulary import ends_of
from cs336.models import Transformer, save_pretrained
from cs336.models.huggingface import save_adapter
from cs336.nn import is_quantized
from cs336.optim import AdamWConfig, ConstantConfig, OptimizerConfig, ScheduleConfig, clip_scale, grad_norm
from cs336.optim.optimizer import Optimizer
from cs336.tokenizer import Tokenizer, convert
from cs336.training import Budget
from cs336.training.evaluators import Finding
from cs336.training.loggers import LoggerName
from cs336.training.objectives import Batch, Terms, gradient_scale, micro_batches
from cs336.utils.device import pick
from cs336.utils.files import read_text

DEFAULT_LR = 1e-5
SMALL = 50_000_000  # parameters


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """What every stage is told. An interval of 0 means never, of None a tenth of the run."""

    run_dir: pathlib.Path
    """Where everything about the run is written; a run that is already there goes on."""
    init_from: pathlib.Path
    """The model to begin with: an export, a checkpoint, a run directory, a directory in the Hugging Face layout, or a
    GGUF file."""
    tokenizer: pathlib.Path | None = None
    """tokenizer.json of the model. None: the one beside it."""
    chat_template: pathlib.Path | None = None
    """A Jinja file that writes conversations, kept with the export. None: the model's own; ChatML if it has none."""
    end_tokens: tuple[str, ...] = ()
    """Special tokens that end an answer, besides those that the model says end a text."""
    lora: LoRAConfig | None = None
    """Train low-rank adapters and leave the weights as they are; the export is merged. None: all weights."""
    optimizer: OptimizerConfig = field(default_factory=lambda: AdamWConfig(lr=DEFAULT_LR))
    schedule: ScheduleConfig = field(default_factory=ConstantConfig)
    budget: str = "100steps"
    """When to stop: 500steps, 90m, 1.5h."""
    micro_batch_size: int | None = None
    """Rows a forward pass; gradients add up. None: all of a batch."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the matrix products; weights are fp32. auto: bf16 on a GPU, fp32 on a CPU."""
    gradient_checkpointing: bool = False
    """Compute layers again in the backward instead of keeping their activations."""
    seed: int = 0
    log_interval: int = 1
    """Steps a row of metrics.jsonl."""
    eval_interval: int | None = None
    """Steps between evaluations."""
    checkpoint_interval: int | None = None
    """Steps between checkpoints. With 0 there is one where the run ends or is stopped, and none after a kill."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept."""
    loggers: tuple[LoggerName, ...] = ()
    """Also write metrics to: tensorboard, wandb, trackio. Each is a package of its own."""

    def __post_init__(self):
        if Budget.parse(self.budget).kind not in ("steps", "seconds"):
            raise ValueError(f"budget must be of steps or time, like 500steps or 90m, got {self.budget!r}")
        for name in ("log_interval", "keep_checkpoints", "micro_batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("eval_interval", "checkpoint_interval"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.seed < 1 << 20:
            raise ValueError(f"seed must be in 0..2**20 - 1, got {self.seed}")


def slow_rate(config: StageConfig, num_parameters: int) -> str | None:
    """What to say of the default learning rate, which is one of billions of parameters, to those who train fewer.

    The loss after 100 steps of SFT on 400 short answers: from 5.96 with 0.24M parameters, 4.92 at 1e-5, 0.61 at 1e-3;
    from 6.77 with 15M, 3.48 at 1e-5, 0.67 at 1e-4.
    """
    if config.optimizer.lr != DEFAULT_LR or num_parameters >= SMALL:
        return None
    other = 1e-3 if num_parameters < SMALL / 10 else 1e-4
    return (
        f"the default learning rate, {DEFAULT_LR:g}, is one for billions of parameters, at which {num_parameters:,} "
        f"learn slowly: try --optimizer.lr {other:g}"
    )


FREE = {"run_dir", "budget", "micro_batch_size", "device", "log_interval", "eval_interval", "checkpoint_interval"}
FREE |= {"keep_checkpoints", "gradient_checkpointing", "loggers", "init_from", "tokenizer", "chat_template", "data"}
"""Fields that a run which goes on may change: files are known by their content."""


class Policy:
    """The model that learns, with what makes texts of its tokens.

    Raises FileNotFoundError where there is no model or tokenizer, ValueError where they are not of one another, for a
    quantised model, a template that is none, and end_tokens that the tokenizer does not have.
    """

    def __init__(self, config: StageConfig):
        self.device = pick(config.device)
        torch.manual_seed(config.seed)  # of adapters and heads
        self.config, self.base = config, find_model(config.init_from)
        found = self.base
        self.model = load_model(found, str(self.device), torch.float32)
        if is_quantized(self.model):
            raise ValueError(
                f"{found} is quantised, and its weights would not learn: give the model that it was made of"
            )
        self.model.gradient_checkpointing = config.gradient_checkpointing
        self.tokenizer: Tokenizer = _tokenizer(found, config.tokenizer, self.model)
        if config.chat_template is not None:
            self.model.chat_template = read_text(config.chat_template)
        special = {i: text for text, i in self.tokenizer.special_tokens.items()}
        named = {name: special[i] for name, i in self.model.special_ids.items() if isinstance(i, int) and i in special}
        tokens = {name.removesuffix("_id"): text for name, text in named.items()}
        self.template = ChatTemplate(self.model.chat_template, tokens)
        self.end_ids = self._ends(config.end_tokens)
        if self.template.is_default and CHATML_STOP[0] not in self.tokenizer.special_tokens:
            # ChatML whose turns end as the model's texts do: its own end would be text that stops no answer.
            self.model.chat_template = CHATML.replace(CHATML_STOP[0], special[self.end_ids[0]])
            self.template = ChatTemplate(self.model.chat_template, tokens)
        self.model.generation_config = {**self.model.generation_config, "eos_token_id": list(self.end_ids)}
        on_gpu = self.device.type == "cuda"
        self.low = config.precision == "bf16" or (config.precision == "auto" and on_gpu)
        self.fingerprints = {"init_from": _digest(self.model), "tokenizer": self.tokenizer.fingerprint}
        self.fingerprints["chat_template"] = hashlib.sha256(str(self.model.chat_template).encode()).hexdigest()
        self.adapters = None if config.lora is None else apply_lora(self.model, config.lora)

    @property
    def module(self) -> nn.Module:
        """What learns: the model, or its adapters."""
        return self.model if self.adapters is None else self.adapters

    def autocast(self) -> torch.autocast:
        """Without autocast's cache: optimizer steps inside change the weights, and the engine's graphs read them."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.low, cache_enabled=False)

    @contextlib.contextmanager
    def judging(self) -> Iterator[None]:
        """In eval mode, without gradients, under the precision of training."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), self.autocast():
                yield
        finally:
            self.model.train(training)

    def export(self, directory: pathlib.Path, step: int) -> None:
        """The model in the Hugging Face layout, with adapters merged, its tokenizer and its template; in `adapter`
        beside it the adapters alone, where such a directory can name their layers and their base."""
        save_pretrained(merged(self.model), directory, tokenizer=self.tokenizer, step=step)
        if self.config.lora is not None and (self.base / "config.json").exists():
            layers = {n: (m.lora_a, m.lora_b) for n, m in self.model.named_modules() if isinstance(m, LoRALinear)}
            place = directory.with_name("adapter")
            try:
                save_adapter(self.model, layers, place, base=self.base, alpha=self.config.lora.alpha)
            except ValueError as error:
                print(f"{place} is not written: {error}", file=sys.stderr)

    def _ends(self, names: tuple[str, ...]) -> tuple[int, ...]:
        special = self.tokenizer.special_tokens
        if unknown := [name for name in names if name not in special]:
            raise ValueError(f"end_tokens {unknown} are no special tokens of the tokenizer, which has {list(special)}")
        named = [special[name] for name in (*names, *self.template.stop) if name in special]
        ends = tuple(dict.fromkeys([*named, *ends_of(self.model, self.tokenizer)]))
        if not ends:
            raise ValueError(
                "no token ends an answer: neither the model nor the tokenizer names one. Give end_tokens, special "
                f"tokens of the tokenizer, which has {list(special)}"
            )
        return ends


def _tokenizer(found: pathlib.Path, given: pathlib.Path | None, model: Transformer) -> Tokenizer:
    """Raises ValueError for one that is given and is not the model's."""
    try:
        own = load_tokenizer(found)
    except FileNotFoundError:
        if given is None:
            raise
        own = None
    tokenizer = convert.load(given) if given is not None else own
    assert tokenizer is not None  # either was found, or the error was raised
    if own is not None and own.fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"the tokenizer {given} is not the one that lies with the model, {find_tokenizer(found)}: its tokens would "
            "mean something else to the model. Leave tokenizer out"
        )
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {model.config.vocab_size}: "
            "use the tokenizer that the model was trained with"
        )
    return tokenizer


def _digest(model: Transformer) -> str:
    """Names weights by some of each."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten()[:1024].float().cpu().numpy().tobytes())
    return digest.hexdigest()


class Stage:
    """What a run repeats: a class a verb. Its steps follow from its parameters, its state and their number alone."""

    verb: ClassVar[str]

    def __init__(self, config: StageConfig, policy: Policy, module: nn.Module, train: pathlib.Path):
        self.config, self.policy = config, policy
        self.module = module  # what learns and is saved
        self.optimizer: Optimizer = config.optimizer.build(module)
        self.fingerprints = policy.fingerprints | {"data.train": digest_of(train)}  # the same when a run goes on

    def begin(self) -> None:
        """Called once the weights are those to begin with, or those of the checkpoint that is continued."""

    def describe(self) -> str:
        """In a line, what is learned from."""
        raise NotImplementedError

    def update(self, step: int) -> dict[str, float]:
        """Make step number 1, 2, ...: metrics, among them "loss", "grad_norm" and "tokens"."""
        raise NotImplementedError

    def evaluate(self) -> Finding:
        raise NotImplementedError

    def export(self, directory: pathlib.Path, step: int) -> None:
        self.policy.export(directory, step)

    def state_dict(self) -> dict[str, Any]:
        """JSON values that its next steps depend on, besides their number."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What state_dict gave."""

    def _learn(self, terms: Callable[[Batch], Terms], batch: Batch) -> dict[str, float]:
        """One optimizer step: see optimizer_step."""
        size, most = self.config.micro_batch_size, self.config.optimizer.max_grad_norm
        return optimizer_step(self.optimizer, self.module, terms, batch, micro_batch_size=size, max_grad_norm=most)


def optimizer_step(
    optimizer: Any,
    module: nn.Module,
    terms: Callable[[Batch], Terms],
    batch: Batch,
    *,
    micro_batch_size: int | None,
    max_grad_norm: float,
) -> dict[str, float]:
    """One step on a batch, a part at a time, whatever the parts: the mean "loss", its metrics, and "grad_norm".

    Raises FloatingPointError, before anything is changed, for a loss or gradient that is not finite.
    """
    totals = []
    for part in micro_batches(batch, micro_batch_size or len(batch[0])):
        loss, count, metrics = terms(part)
        loss.backward()
        totals.append(torch.stack([x.detach().float() for x in (count, loss, *metrics.values())]))
    return step_on(optimizer, module, torch.stack(totals).sum(0), ("loss", *metrics), max_grad_norm)


def step_on(
    optimizer: Any, module: nn.Module, totals: Tensor, names: tuple[str, ...], max_grad_norm: float
) -> dict[str, float]:
    """Step on gradients of sums that have been added up. totals: their count, then the sums by their names.

    An optimizer whose step takes no grad_scale, such as torch's, finds gradients that have been scaled.

    Raises FloatingPointError, before anything is changed, for a loss or gradient that is not finite.
    """
    count, *sums = totals
    scale = gradient_scale(count)
    norm = grad_norm(module.parameters()) * scale
    values = {name: (total / count.clamp(min=1)).item() for name, total in zip(names, sums, strict=True)}
    values["grad_norm"] = norm.item()
    if bad := [name for name in ("loss", "grad_norm") if not math.isfinite(values[name])]:
        optimizer.zero_grad()
        raise FloatingPointError(
            f"{' and '.join(bad)} not finite ({', '.join(str(values[name]) for name in bad)}): a lower optimizer.lr in "
            "a new run_dir may avoid it"
        )
    scale = scale * clip_scale(norm, max_grad_norm)
    if "grad_scale" in inspect.signature(optimizer.step).parameters:
        optimizer.step(grad_scale=scale)
    else:  # torch's
        torch._foreach_mul_([p.grad for p in module.parameters() if p.grad is not None], scale)
        optimizer.step()
    optimizer.zero_grad()
    return values
