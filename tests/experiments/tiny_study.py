"""A study of runs that take a moment."""

import pathlib

import numpy as np

from cs336.data import ShardWriter
from cs336.experiments import Study

MODEL = {"vocab_size": 32, "context_length": 8, "num_layers": 1, "d_model": 16, "num_heads": 2}


def write_data(root):
    rng = np.random.default_rng(0)
    for name, count in (("train", 2000), ("val", 200)):
        with ShardWriter(root / name, vocab_size=32, tokenizer="t", eot_id=0) as writer:
            writer.write(np.cumsum(rng.integers(0, 3, count)) % 32, documents=1, text_bytes=2 * count)


def base(root, **changes):
    if not (root / "train").exists():
        write_data(root)
    found = {"data": {"train": str(root / "train"), "val": str(root / "val")}, "model": MODEL, "budget": "4steps"}
    found |= {"batch_size": 2, "device": "cpu", "compile": False, "log_interval": 1, "eval_interval": 0}
    return found | {"sample_interval": 0, "checkpoint_interval": 1} | changes


def study(root, *, changes=(), **keys):
    where = {"kind": "here"}
    table = {"directory": str(root / "study"), "base": base(pathlib.Path(root), **dict(changes)), "where": where}
    return Study.from_table(table | keys)


def pretend(loss):
    """A `train` that writes a run's rows and gives the loss that `loss(config)` says, without training."""

    def train(config):
        from cs336.experiments.study import cost

        planned = cost(config)
        config.run_dir.mkdir(parents=True, exist_ok=True)
        tokens = planned.tokens or 0
        (config.run_dir / "metrics.jsonl").write_text(f'{{"step": 1, "tokens": {tokens}, "seconds": 2.0}}\n')
        per_token = config.model.flops_per_token()
        (config.run_dir / "run.json").write_text(f'{{"flops_per_token": {per_token}}}')
        return {"val/loss": loss(config)}

    return train
