"""Weights to begin with: of an export, a checkpoint, or a model in the Hugging Face layout."""

import pathlib

from cs336.models import Transformer, TransformerConfig, from_pretrained
from cs336.training.checkpoint import STATE, list_checkpoints, load_checkpoint, read_model_config
from cs336.utils.config import to_table

MAY_DIFFER = {"context_length", "init_std"}  # no weight has their shape, and no result at the same positions changes


def load_weights(model: Transformer, path: pathlib.Path) -> None:
    """Load the weights at `path` into the model.

    Raises FileNotFoundError if there is no model, ValueError if it is another one.
    """
    path = _find(path)
    if _is_layout(path):
        source = from_pretrained(path, device=model.device)
        _check_same(source.config, model.config, path)
        try:
            model.load_state_dict(source.state_dict())
        except RuntimeError as error:
            raise ValueError(f"init_from {path} does not fit [model]: {error}") from None
        model.special_ids, model.generation_config = source.special_ids, source.generation_config
        return
    if (config := read_model_config(path, TransformerConfig)) is not None:
        _check_same(config, model.config, path)
    load_checkpoint(path, model)


def model_config(path: pathlib.Path) -> TransformerConfig:
    """The configuration of the model at `path`.

    Raises FileNotFoundError if there is no model, ValueError for a checkpoint that does not hold it.
    """
    path = _find(path)
    config = from_pretrained(path).config if _is_layout(path) else read_model_config(path, TransformerConfig)
    if config is None:
        raise ValueError(f"{path} is a checkpoint from before they held the model's configuration: give [model] too")
    return config


def _find(path: pathlib.Path) -> pathlib.Path:
    """The model itself, or that of a run directory."""
    if _is_layout(path) or (path / STATE).exists() or path.is_file():
        return path
    if _is_layout(path / "export"):
        return path / "export"
    found = list_checkpoints(path / "checkpoints")
    if not found:
        raise FileNotFoundError(
            f"init_from {path} holds no model: expected an export, a checkpoint, a run directory, or a directory in "
            "the Hugging Face layout"
        )
    return found[-1]


def _is_layout(path: pathlib.Path) -> bool:
    return (path / "config.json").exists()


def _check_same(theirs: TransformerConfig, ours: TransformerConfig, path: pathlib.Path) -> None:
    before, now = to_table(theirs), to_table(ours)  # without what is None: it follows from the others
    names = [name for name in before if name in now and name not in MAY_DIFFER]
    if changed := [f"{name}: {before[name]} -> {now[name]}" for name in names if before[name] != now[name]]:
        raise ValueError(f"init_from {path} is another model than [model] ({'; '.join(changed)})")
