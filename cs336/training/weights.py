"""A trained model where it lies: an export, a checkpoint, a run directory, a model in the Hugging Face layout."""

import os
import pathlib

import torch
from safetensors import safe_open

from cs336.models import Transformer, TransformerConfig, from_pretrained
from cs336.models.huggingface import is_adapter, read_config, read_step
from cs336.nn import is_quantized
from cs336.training.checkpoint import MODEL, STATE, list_checkpoints, load_checkpoint, read_model_config
from cs336.utils.config import to_table

MAY_DIFFER = {
    "context_length",
    "init_std",
    "mup_base_width",
    "float32_norms",
}
"""No weight has their shape, and no result at the same positions changes but by rounding, or where a LongRoPE has its
other factors in another context_length."""


def find_model(path: str | os.PathLike) -> pathlib.Path:
    """The export (any directory in the Hugging Face layout, or an adapter's) or checkpoint (a directory, or a file)
    that `path` means: itself, or that of a run directory which was trained for most steps.

    Raises FileNotFoundError where there is none.
    """
    path = pathlib.Path(path)
    if _is_layout(path) or (path / STATE).exists() or path.is_file():
        return path
    found = {p: _step(p) for p in list_checkpoints(path / "checkpoints") if (path / "config.toml").exists()}
    if _is_layout(path / "export"):
        found[path / "export"] = _export_step(path / "export", list(found))
    if not found:
        raise FileNotFoundError(
            f"{path} holds no model: expected an export, a checkpoint, a run directory, or the Hugging Face layout"
        )
    return max(reversed(found), key=found.__getitem__)  # the export is last: at the same step it is taken


def load_weights(model: Transformer, path: pathlib.Path) -> None:
    """Load the weights at `path` into the model.

    Raises FileNotFoundError if there is no model, ValueError if it is another one.
    """
    path = find_model(path)
    if _is_layout(path):
        source = from_pretrained(path, device=model.device)
        if is_quantized(source):
            raise ValueError(f"init_from {path} is quantised, and would not learn: give the model that it was made of")
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
    path = find_model(path)
    config = read_config(path) if _is_layout(path) else read_model_config(path, TransformerConfig)
    if config is None:
        raise ValueError(f"{path} is a checkpoint from before they held the model's configuration: give [model] too")
    return config


def _is_layout(path: pathlib.Path) -> bool:
    return (path / "config.json").exists() or is_adapter(path)


def _check_same(theirs: TransformerConfig, ours: TransformerConfig, path: pathlib.Path) -> None:
    before, now = to_table(theirs), to_table(ours)  # without what is None: it follows from the others
    names = [name for name in before if name in now and name not in MAY_DIFFER]
    if changed := [f"{name}: {before[name]} -> {now[name]}" for name in names if before[name] != now[name]]:
        raise ValueError(f"init_from {path} is another model than [model] ({'; '.join(changed)})")


def _step(checkpoint: pathlib.Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def _export_step(export: pathlib.Path, checkpoints: list[pathlib.Path]) -> int:
    """Of one that does not say, the step of the checkpoint with its embedding; before all of them if none has it."""
    if (step := read_step(export)) is not None:
        return step
    embedding = _embedding(export / "model.safetensors")
    return max((_step(p) for p in checkpoints if torch.equal(_embedding(p / MODEL), embedding)), default=-1)


def _embedding(path: pathlib.Path) -> torch.Tensor:
    with safe_open(path, framework="pt") as file:
        (name,) = {"embedding.weight", "model.embed_tokens.weight"} & set(file.keys())
        return file.get_tensor(name)
