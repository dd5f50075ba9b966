"""Configurations with everything that a table can hold: unions in lists in tables."""

import math
import pathlib
import re
import tomllib
from dataclasses import dataclass, field
from typing import Annotated, Literal

import pydantic
import pytest

from cs336.utils.config import dumps, keys, load, override, parse, read_table, to_table


@dataclass(frozen=True)
class Dense:
    kind: Literal["dense"] = "dense"
    width: int = 4
    """Hidden features."""


@dataclass(frozen=True)
class Experts:
    count: int
    """How many."""
    kind: Literal["experts"] = "experts"
    width: int | None = None
    each: Dense = field(default_factory=Dense)


Mlp = Annotated[Dense | Experts, pydantic.Field(discriminator="kind")]


@dataclass(frozen=True)
class Block:
    mlp: Mlp = field(default_factory=Dense)
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Model:
    """A model."""

    layers: tuple[Block, ...]
    """From the first to the last."""
    mlp: Mlp
    path: pathlib.Path | None = None
    size: tuple[int, float] = (1, 2.0)
    weights: dict[str, float] = field(default_factory=dict)
    by_name: dict[str, Mlp] = field(default_factory=dict)
    last: Mlp | None = None
    on: bool = False
    mode: Literal["a", "b"] = "a"
    text: str = ""

    def __post_init__(self):
        if not self.layers:
            raise ValueError("layers must not be empty")


FULL = Model(
    layers=(Block(), Block(Experts(2, each=Dense(width=9)), ("x", 'a "b"'))),
    mlp=Experts(8, width=3),
    path=pathlib.Path("a/b"),
    size=(3, math.inf),
    weights={"en": 0.5, "a key.with dots": 1e-7},
    by_name={"first": Dense(), "second": Experts(1)},
    last=Dense(width=7),
    on=True,
    mode="b",
    text='tab\t "quoted" \x7f é\n',
)
LEAST = {"layers": [{}], "mlp": {"kind": "dense"}}


@pytest.mark.parametrize("model", [FULL, Model((Block(),), Dense())])
def test_round_trip(tmp_path, model):
    (tmp_path / "m.toml").write_text(dumps(model))
    assert load(Model, tmp_path / "m.toml") == model
    assert tomllib.loads(dumps(model)) == to_table(model)


def test_a_tag_may_be_left_out_where_the_default_has_one():
    found = parse(Model, LEAST | {"layers": [{"mlp": {"width": 8}}, {"mlp": {"kind": "experts", "count": 1}}]})
    assert found.layers == (Block(Dense(width=8)), Block(Experts(1)))


@dataclass(frozen=True)
class Wide:
    mlp: Mlp = field(default_factory=lambda: Experts(3, width=7))


@pytest.mark.parametrize(
    ("options", "mlp"),
    [
        ([], Experts(3, width=7)),
        (["--mlp.width=2"], Experts(3, width=2)),
        (["--mlp.kind=experts", "--mlp.each.width=1"], Experts(3, width=7, each=Dense(width=1))),
        (["--mlp.kind=dense"], Dense()),
    ],
)
def test_a_table_begins_from_the_default_of_its_field(options, mlp):
    """Where its tag is that default's, which a list of keys shows."""
    assert parse(Wide, override(Wide, {}, options)).mlp == mlp
    found = {key.name: key.default for key in keys(Wide) if key.of == "mlp.kind = 'experts'"}
    assert found == {"mlp.count": "3", "mlp.width": "7", "mlp.each.width": "4"}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"mlps": {}}, "unknown key mlps; did you mean mlp?"),
        ({"names": []}, "unknown key names; did you mean names in one of [[layers]]?"),
        ({"nmes": []}, "unknown key nmes; did you mean names in one of [[layers]]?"),
        ({"xyz": []}, "unknown key xyz: known are layers"),
        ({"layers": [{}, {"mlp": {"widht": 3}}]}, "unknown key layers.1.mlp.widht; did you mean layers.1.mlp.width?"),
        (
            {"mlp": {"kind": "dense", "count": 3}},
            "unknown key mlp.count of this kind: it goes with mlp.kind = 'experts'",
        ),
        ({"mlp": {"kind": "experts"}}, "missing: mlp.count"),
        ({"mlp": {"kind": "expert", "count": 3}}, "mlp.kind must be 'dense' or 'experts', got 'expert'; did you mean"),
        ({"mlp": {"width": 3}}, "missing: mlp"),
        ({"mlp": {"kind": "experts", "count": 3, "each": {"width": "4"}}}, "mlp.each.width must be int, got '4'"),
        ({"layers": 3}, "layers must be a list of {mlp, names}, got 3"),
        ({"layers": [3]}, "layers.0 must be a table [layers.0], got 3"),
        ({"layers": [{"names": ["a", 3]}]}, "layers.0.names.1 must be str, got 3"),
        ({"layers": []}, "layers must not be empty"),
        ({"size": [1, "x"]}, "size.1 must be float, got 'x'"),
        ({"size": [1.5, 2]}, "size.0 must be int, got 1.5"),
        ({"weights": {"en": "x"}}, "weights.en must be float, got 'x'"),
        ({"by_name": {"a": {"kind": "dense", "width": True}}}, "by_name.a.width must be int, got True"),
        ({"on": 1}, "on must be bool, got 1"),
        ({"on": "true"}, "on must be bool, got 'true'"),
        ({"mode": "c"}, "mode must be 'a' or 'b', got 'c'"),
        ({"path": 3}, "path must be a path, got 3"),
        ({"last": 3}, "last must be a table [last], got 3; its kind is 'dense' or 'experts'"),
        (
            {"mlp": {"kind": "experts", "count": 3, "each": 4}},
            "mlp.each must be a table [mlp.each], got 4; its keys are",
        ),
    ],
)
def test_errors_name_the_whole_path(table, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (compared below)
        parse(Model, LEAST | table)
    assert str(error.value).startswith(message)


def test_all_that_is_missing_is_named_at_once(tmp_path):
    (tmp_path / "m.toml").write_text("on = true\n")
    with pytest.raises(ValueError, match=r"m\.toml: missing: layers, mlp"):
        load(Model, tmp_path / "m.toml")


def test_a_file_that_is_no_toml_is_named_once(tmp_path):
    (tmp_path / "broken.toml").write_text("on = true true\n")
    for read in (read_table, lambda path: load(Model, path)):
        with pytest.raises(ValueError, match=r"^\S+broken\.toml is not TOML: Expected newline"):
            read(tmp_path / "broken.toml")


def test_none_in_a_list_cannot_be_written():
    with pytest.raises(ValueError, match="a list holds None"):
        dumps(Block(names=("a", None)))


@pytest.mark.parametrize(
    ("options", "table"),
    [
        ("--text 5 --on --size 3 4", {"text": "5", "on": True, "size": [3, 4]}),
        ("--on=False --mode=b --size [3,4.5]", {"on": False, "mode": "b", "size": [3, 4.5]}),
        ("--on True --path x/y --path None", {"on": True}),
        ("--weights.en 1e5 --weights.de .5", {"weights": {"en": 1e5, "de": 0.5}}),
        ("--mlp.width 3", {"mlp": {"kind": "dense", "width": 3}}),
        ("--mlp.kind experts --mlp.count 3", {"mlp": {"kind": "experts", "count": 3}}),
        ("--mlp.width 7 --mlp.kind experts --mlp.count 3", {"mlp": {"kind": "experts", "count": 3}}),
        ("--mlp.width 7 --mlp.kind dense", {"mlp": {"kind": "dense", "width": 7}}),
        ("--layers.0.mlp.kind experts --layers.0.mlp.count 2", {"layers": [{"mlp": {"kind": "experts", "count": 2}}]}),
        ("--layers.0.names a b", {"layers": [{"names": ["a", "b"]}]}),
        ("--by-name.x.kind dense", {"by_name": {"x": {"kind": "dense"}}}),
    ],
)
def test_options(options, table):
    assert override(Model, LEAST, options.split()) == LEAST | table
    assert parse(Model, LEAST | table)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--mlp.widht 3", "unknown key mlp.widht; did you mean mlp.width?"),
        ("--width 3", "unknown key width; did you mean mlp.width?"),
        ("--layers.1.mlp.width 3", "layers.1: expected a place in a list of 1"),
        ("--mlp.count 3", "unknown key mlp.count of kind 'dense'; it is of kind 'experts'"),
        ("--mode a b", "--mode takes one value, got a b"),
        ("text", "expected an option like"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (compared below)
        override(Model, LEAST, options.split())
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("table", "option", "message"),
    [
        ({"last": 3}, "--last.width=2", "last must be a table [last], got 3; its kind is 'dense' or 'experts'"),
        ({"last": "a"}, "--last.each.width=2", "last must be a table [last], got 'a'; its kind is"),
        (
            {"mlp": {"kind": "experts", "each": 4}},
            "--mlp.each.width=2",
            "mlp.each must be a table [mlp.each], got 4; its",
        ),
        ({"layers": 3}, "--layers.0.mlp.width=2", "layers must be a list of {mlp, names}, got 3"),
        ({"weights": "a"}, "--weights.en=2", "weights must be a table, got 'a'"),
        ({}, "--text.x=3", "unknown key text.x: text is str, and no table"),
        ({"mode": "a"}, "--mode.x=3", "unknown key mode.x: mode is 'a' or 'b', and no table"),
    ],
)
def test_options_under_what_is_no_table(table, option, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        override(Model, LEAST | table, [option])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--path=", "--path is empty: name a path; . is this directory"),  # of a variable that is not set
        ("--path=a\udcff", "--path must be UTF-8, which a configuration is written in, got 'a\\udcff'"),
        ("--text=\ud800", "--text must be UTF-8"),
    ],
)
def test_paths_that_are_none(option, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        override(Model, LEAST, [option])
    assert override(Model, LEAST, ["--text="])["text"] == ""


def test_an_option_of_a_wrong_type_is_named_as_in_a_file():
    with pytest.raises(ValueError, match="on must be bool, got 'maybe'"):
        parse(Model, override(Model, LEAST, ["--on", "maybe"]))


def test_keys():
    found = {(key.name, key.of): key for key in keys(Model)}
    assert found["layers", ""].doc == "From the first to the last."
    assert found["layers", ""].default is None
    assert found["mlp.kind", ""].type == "'dense' | 'experts'"
    assert found["mlp.width", "mlp.kind = 'dense'"].doc == "Hidden features."
    assert found["mlp.count", "mlp.kind = 'experts'"].default is None
    assert found["path", ""].default == ""
    assert found["size", ""].default == "[1, 2.0]"
