"""Small models of filters as one safetensors file each, with a format and a checksum."""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from cs336.utils.files import replacing


def save_model(path: str | os.PathLike, format: str, facts: Mapping[str, Any], tensors: dict[str, np.ndarray]) -> None:
    """Write it whole or not at all. facts: JSON values."""
    header = {"format": format, "facts": json.dumps(facts)}
    header["sha256"] = _digest(header, tensors)
    with replacing(path, "wb") as file:
        file.write(safetensors.numpy.save(tensors, header))


def load_model(path: str | os.PathLike, format: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(facts, tensors). Raises ValueError, naming the file, for one that is damaged or of another format."""
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path} is a directory: expected a safetensors file")
    try:
        with safetensors.safe_open(path, "numpy") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
    if header.get("format") != format:
        raise ValueError(f"{path} has the format {header.get('format')!r}, expected {format!r}")
    if header.pop("sha256", None) != _digest(header, tensors):
        raise ValueError(f"{path} is damaged: its checksum is another one; train or copy it again")
    return json.loads(header["facts"]), tensors


def _digest(header: Mapping[str, str], tensors: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(json.dumps(sorted(header.items())).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape} ".encode())
        digest.update(np.ascontiguousarray(tensor).data)
    return digest.hexdigest()
