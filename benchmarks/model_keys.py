"""Every key of a model's configuration: docs/model_config.md, from the classes that read it.

python -m benchmarks.model_keys    # rewrites it
"""

import itertools
import pathlib
from collections.abc import Iterable, Iterator

from cs336.models import BlockConfig, TransformerConfig
from cs336.models.config import SHORT
from cs336.utils.config import Key, keys

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "model_config.md"
HEADER = """# Keys of a model's configuration

What may stand in `[model]` of a training configuration, and in the `model` of a checkpoint. A key that is not here is
refused with the nearest name. Where nothing is the default there is "–", where there is none "needed". Formulas are in
[architectures.md](architectures.md). Made by `python -m benchmarks.model_keys` from the classes of `cs336/models` and
`cs336/nn`; `tests/models/test_model_keys.py` keeps it current.
"""


def page() -> str:
    model = keys(TransformerConfig)
    return "\n".join(
        [
            HEADER,
            "## `[model]`",
            "",
            *table(key for key in model if key.name not in SHORT),
            "",
            "## `[model]`, the short form",
            "",
            "A model of equal blocks: RMSNorm, rotary attention, SwiGLU. Instead of `layers`.",
            "",
            *table(key for key in model if key.name in SHORT),
            "",
            "## `[[model.layers]]`",
            "",
            *blocks(keys(BlockConfig)),
        ]
    )


def blocks(found: list[Key]) -> Iterator[str]:
    """The keys of every block, then a table for each kind of what it is made of."""
    yield from table(key for key in found if not key.of)
    yield ""
    for of, some in itertools.groupby((key for key in found if key.of), lambda key: key.of):
        yield f"### `{of.replace(chr(39), chr(34))}`"
        yield ""
        yield from table(some)
        yield ""


def table(some: Iterable[Key]) -> Iterator[str]:
    yield "| key | type | default | what it is |"
    yield "| --- | --- | --- | --- |"
    for key in some:
        default = "needed" if key.default is None else f"`{key.default}`" if key.default else "–"
        kind = key.type.replace(" | ", " or ").replace("'", '"').replace("a list of a table", "a list of tables")
        text = " ".join(key.doc.split()).replace("|", "\\|")
        yield f"| `{key.name}` | {kind} | {default.replace(chr(39), chr(34))} | {text} |"


if __name__ == "__main__":
    PAGE.write_text(page())
