"""Evaluation of a model where training left it: an export, a run directory, or one checkpoint."""

import os
import pathlib
from collections.abc import Iterable
from typing import Any

from cs336.evaluation.evaluation import MOST_TOKENS, Evaluation, evaluate, evaluate_text, last_step
from cs336.inference.load import find_model, load_model, load_tokenizer
from cs336.models.huggingface import read_step
from cs336.tokenizer import convert
from cs336.training import TrainConfig, load_checkpoint
from cs336.training.run_dir import RunDir


def evaluate_saved(
    path: str | os.PathLike,
    documents: Iterable[str] | None = None,
    *,
    text: str = "",
    tokenizer: str | os.PathLike | None = None,
    device: str = "auto",
    most_tokens: int = MOST_TOKENS,
) -> tuple[Evaluation, pathlib.Path]:
    """Evaluate on documents, or on the run's own validation data, and say into which directory that belongs: the run's
    for its newest model, else the model's own.

    Args:
        text: names the documents.
        tokenizer: tokenizer.json, ours or Hugging Face's; None: the one that is where the model is.

    Raises FileNotFoundError where there is no model, tokenizer or validation data, ValueError for text that cannot be
    measured.
    """
    found = find_model(path).resolve()
    checkpoint = not (found / "config.json").exists()
    run = found.parent.parent if checkpoint else found.parent
    of_run = (run / "config.toml").exists()
    trained = of_run and RunDir(run, keep_checkpoints=1).verb in ("train", None)  # alignment's settings are others
    data = TrainConfig.from_toml(run / "config.toml").data if trained else None
    place = run if of_run and find_model(run) == found else found if found.is_dir() else found.parent
    if documents is None and (data is None or data.val is None):
        raise ValueError(f"{path} has no validation data of its own: give text to measure it on, --text FILE")
    if documents is None and data is not None and data.val is not None and not data.val.exists():
        raise FileNotFoundError(
            f"the validation data of {path}, {data.val}, is not here: call this where the run was started, or give "
            "text to measure it on, --text FILE"
        )
    encoder = load_tokenizer(found) if tokenizer is None else convert.load(tokenizer)
    model = load_model(found, device)
    train = data.train if data is not None and data.train.is_dir() else None
    step = load_checkpoint(found) if checkpoint else read_step(found) or last_step(run)
    if documents is not None:
        how: dict[str, Any] = {"text": text, "most_tokens": most_tokens, "step": step}
        return evaluate_text(model, encoder, documents, train, **how), place
    assert data is not None  # as asked above
    assert data.val is not None
    return evaluate(model, encoder, data.val, train, most_tokens=most_tokens, step=step), place
