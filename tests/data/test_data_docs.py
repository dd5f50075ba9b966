"""docs/data.md names every key that a recipe may have."""

import dataclasses
import pathlib
import typing

from cs336.inference.stages import ModelRecipe

TEXT = (pathlib.Path(__file__).parents[2] / "docs" / "data.md").read_text()


def configs(annotation):
    """The dataclasses of an annotation, and of their fields."""
    if dataclasses.is_dataclass(annotation):
        yield annotation
        for hint in typing.get_type_hints(annotation).values():
            yield from configs(hint)
    for part in typing.get_args(annotation):
        yield from configs(part)


def test_every_key_of_a_recipe_is_documented():
    found = {(config.__name__, field.name) for config in configs(ModelRecipe) for field in dataclasses.fields(config)}
    assert {("Tokenize", "pack"), ("BadWords", "language_field"), ("Buckets", "repeats")} <= found
    missing = {(config, key) for config, key in found if not any(f"`{key}{end}" in TEXT for end in ("`", " = ", "]"))}
    tables = {("ModelRecipe", key) for key in ("sources", "steps", "dedup", "mix", "tokenize")}  # in brackets
    assert missing - tables == set()
    assert all(f"[{key}]" in TEXT for _, key in tables)


def test_every_kind_is_documented():
    kinds = {getattr(config, "kind", None) for config in configs(ModelRecipe)} - {None}
    assert {"classifier", "huggingface", "minhash", "rewrite"} <= kinds
    assert {kind for kind in kinds if f"| `{kind}` |" not in TEXT} == set()
