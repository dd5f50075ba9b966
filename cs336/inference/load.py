"""A trained model from where training left it: an export, a run directory, or one checkpoint."""

import os
import pathlib

from cs336.models import Transformer
from cs336.models.huggingface import from_pretrained
from cs336.training import TrainConfig, load_checkpoint
from cs336.training.checkpoint import STATE, list_checkpoints
from cs336.utils.device import pick


def find_model(path: str | os.PathLike) -> pathlib.Path:
    """The export or checkpoint that `path` means: itself, or the newest of a run directory.

    Raises FileNotFoundError where there is none.
    """
    path = pathlib.Path(path)
    if (path / "config.json").exists() or (path / STATE).exists():
        return path
    found = [p for p in list_checkpoints(path / "checkpoints") if (path / "config.toml").exists()]
    if (path / "export" / "config.json").exists():
        found.append(path / "export")  # last: of equally new ones it wins
    if not found:
        raise FileNotFoundError(f"{path} holds no model: expected an export, a run directory or a checkpoint of one")
    return max(reversed(found), key=lambda p: (p / (STATE if (p / STATE).exists() else "config.json")).stat().st_mtime)


def load_model(path: str | os.PathLike, device: str = "auto") -> Transformer:
    """The model at `path`, an export or a checkpoint inside its run directory, for inference.

    device: "auto" is a GPU if there is one.
    Raises FileNotFoundError where a file is missing, ValueError for damaged files.
    """
    path = pathlib.Path(path)
    if not (path / STATE).exists():
        return from_pretrained(path, device=pick(device)).eval()
    config = path.resolve().parent.parent / "config.toml"
    if not config.exists():
        raise FileNotFoundError(
            f"{path} is a checkpoint outside its run directory: {config}, which describes it, is not there"
        )
    model = Transformer(TrainConfig.from_toml(config).model, device=pick(device))
    load_checkpoint(path, model)
    return model.eval()


def find_tokenizer(path: str | os.PathLike) -> pathlib.Path:
    """The tokenizer.json that belongs to the model at `path`: beside it, or in its run directory or that one's export.

    Raises FileNotFoundError where there is none.
    """
    path = pathlib.Path(path).resolve()
    run = path.parent.parent if (path / STATE).exists() else path.parent
    for place in (path, run, run / "export"):
        if (place / "tokenizer.json").exists():
            return place / "tokenizer.json"
    raise FileNotFoundError(f"no tokenizer.json beside {path} or in its run directory: name one with --tokenizer")
