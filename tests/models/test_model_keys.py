import dataclasses
import typing

from benchmarks import model_keys
from cs336.models import BlockConfig, TransformerConfig
from cs336.utils.config import keys


def test_the_page_is_current():
    assert model_keys.PAGE.read_text() == model_keys.page(), "run `python -m benchmarks.model_keys`"


def test_every_key_of_every_kind_is_on_the_page_and_says_what_it_is():
    sections = model_keys.page().split("\n##")
    for field, union in typing.get_type_hints(BlockConfig).items():
        for kind in (c for c in typing.get_args(union) if dataclasses.is_dataclass(c)):
            named = [s for s in sections if s.startswith(f'# `{field}.kind = "{tag(kind)}"`')]
            own = [f.name for f in dataclasses.fields(kind) if f.name not in ("kind", "scaling")]
            assert len(named) == bool(own)
            assert all(f"| `{field}.{name}` |" in named[0] for name in own)
    undocumented = [key.name for kind in (TransformerConfig, BlockConfig) for key in keys(kind) if not key.doc]
    assert undocumented == []


def tag(kind):
    return next(f.default for f in dataclasses.fields(kind) if f.name == "kind")
