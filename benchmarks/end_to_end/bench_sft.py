"""Supervised fine-tuning beside TRL on one CPU core: one model, the same examples and batch, tokens a second of a core.

    python -m benchmarks.end_to_end.bench_sft [--examples N] [--rounds N] [--out FILE]

Lengths are as those of conversations, exp of a normal. TRL runs as it comes, with a padded row an example, and packed,
where on a CPU its examples see each other. Both learn the answers alone, in float32, without recomputation.
Without TRL its rows are left out by name. Needs transformers and datasets for it.
"""

import argparse
import json
import pathlib
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import results
from cs336.alignment.stages.sft import SFTConfig, SFTData, SFTStage
from cs336.models import Transformer, TransformerConfig, save_pretrained
from cs336.optim import AdamWConfig
from cs336.tokenizer import Tokenizer
from cs336.utils.special_tokens import END_OF_TEXT

VOCAB, CONTEXT, BATCH, LR = 8192, 512, 8, 1e-4
SHAPE = {"num_layers": 4, "d_model": 256, "num_heads": 4, "d_ff": 704}
Row = dict[str, Any]


def write_inputs(folder: pathlib.Path, count: int) -> None:
    """A model, and conversations whose questions are of about 40 tokens and whose answers of about 110."""
    torch.manual_seed(0)
    characters = {i: bytes([i]) for i in range(256)}
    tokenizer = Tokenizer(characters, [], [END_OF_TEXT])
    model = Transformer(TransformerConfig(VOCAB, CONTEXT, **SHAPE, tie_embeddings=True))
    save_pretrained(model, folder / "model", tokenizer=tokenizer)
    rng = random.Random(0)

    def text(median: float, most: int) -> str:
        return "".join(rng.choices("abcdefgh ", k=min(most, max(4, round(rng.lognormvariate(0, 0.8) * median)))))

    with open(folder / "chats.jsonl", "w", encoding="utf-8") as file:
        for _ in range(count):
            file.write(json.dumps({"prompt": text(30, 100), "completion": text(80, CONTEXT - 102)}) + "\n")


def settings(folder: pathlib.Path) -> SFTConfig:
    return SFTConfig(
        run_dir=folder / "run", init_from=folder / "model", device="cpu", data=SFTData(folder / "chats.jsonl"),
        batch_size=BATCH, context_length=CONTEXT, optimizer=AdamWConfig(lr=LR, weight_decay=0.0),
    )  # fmt: skip


def ours(folder: pathlib.Path) -> Callable[[], int]:
    """A pass over the examples as `cs336 sft` makes it: returns its steps."""
    stage = SFTStage(settings(folder))
    steps = stage.batches.per_epoch

    def train() -> int:
        for step in range(steps):
            stage.update(step + 1)
        return steps

    return train


def theirs(folder: pathlib.Path, packing: bool) -> Callable[[], int]:
    """The same by TRL's SFTTrainer. Raises ImportError where TRL is not installed."""
    import datasets
    import transformers
    import trl

    examples = [e for row in SFTStage(settings(folder)).rows for e in row]
    columns = {
        "input_ids": [list(e.token_ids) for e in examples],
        "completion_mask": [[int(x) for x in e.mask] for e in examples],
    }
    arguments = trl.SFTConfig(
        output_dir=str(folder / "trl"), use_cpu=True, bf16=False, learning_rate=LR, num_train_epochs=1,
        per_device_train_batch_size=BATCH, max_length=CONTEXT, packing=packing, gradient_checkpointing=False,
        lr_scheduler_type="constant", save_strategy="no", report_to=[], disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.pad_token = tokenizer.eos_token
    trainer = trl.SFTTrainer(
        model, arguments, train_dataset=datasets.Dataset.from_dict(columns), processing_class=tokenizer
    )
    return lambda: trainer.train().global_step


def measure(folder: pathlib.Path, rounds: int) -> list[Row]:
    """A row a way, of the median of rounds that take turns; each begins with the model as it was."""
    stage = SFTStage(settings(folder))
    tokens = stage.num_tokens
    ways: dict[str, Callable[[pathlib.Path], Callable[[], int]]] = {
        "cs336 sft": ours,
        "trl": lambda folder: theirs(folder, packing=False),
        "trl, packing": lambda folder: theirs(folder, packing=True),
    }
    found: dict[str, list[tuple[float, int]]] = {}
    for _ in range(rounds):
        for name, way in ways.items():
            try:
                train = way(folder)
            except ImportError as error:
                print(f"{name}: skipped, {error}", file=sys.stderr)
                continue
            start = time.process_time()
            steps = train()
            found.setdefault(name, []).append((time.process_time() - start, steps))
            print(f"{name}: {tokens / found[name][-1][0]:,.0f} tokens a second", flush=True)
    return [
        {
            "way": name, "tokens": tokens, "examples": stage.num_examples, "steps": times[0][1],
            "seconds": round(statistics.median(t for t, _ in times), 2),
            "tokens_per_second": round(tokens / statistics.median(t for t, _ in times)),
        }
        for name, times in found.items()
    ]  # fmt: skip


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.end_to_end.bench_sft", description=__doc__)
    parser.add_argument("--examples", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path, metavar="FILE", help="results file to put the rows into")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(pathlib.Path(folder), options.examples)
        rows = measure(pathlib.Path(folder), options.rounds)
    if options.out:
        command = f"python -m benchmarks.end_to_end.bench_sft --examples {options.examples} --rounds {options.rounds}"
        header = results.cpu_header(command, peers=("torch", "trl", "transformers"))
        results.write(options.out, "sft", header, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
