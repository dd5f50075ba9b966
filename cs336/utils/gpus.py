"""Which GPU a child process gets."""

import os


def visible_gpu(index: int) -> str:
    """CUDA_VISIBLE_DEVICES of a child with this GPU alone, counted among those that this process sees, as torch does.

    Raises ValueError if CUDA_VISIBLE_DEVICES lists fewer.
    """
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return str(index)
    found = [name.strip() for name in listed.split(",") if name.strip()]
    if not 0 <= index < len(found):
        raise ValueError(
            f"gpus are counted from 0 among those in CUDA_VISIBLE_DEVICES={listed!r}: "
            f"GPU {index} is not there, {len(found)} are"
        )
    return found[index]
