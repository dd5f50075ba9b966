"""Configurations: frozen dataclasses, the TOML tables that they are, and dotted options that change them.

    parse(TrainConfig, {"optimizer": {"kind": "adamw", "lr": 3e-4}, ...})     a table -> a dataclass, checked
    override(TrainConfig, table, ["--optimizer.lr", "1e-3"])                  options -> another table
    dumps(config)                                                             a dataclass -> TOML

A choice between classes is a tagged union, Annotated[A | B, pydantic.Field(discriminator="kind")], where each member
declares kind: Literal["a"] = "a". A table may leave the tag out where the field's default has one, and begins from that
default where it has its tag. Types are checked as they are in JSON: 3 is a float too, "3" and true are no int.
"""

import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import json
import os
import pathlib
import re
import textwrap
import tomllib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING
from typing import Annotated, Any, Literal, TypeVar

import pydantic

T = TypeVar("T")
Table = dict[str, Any]
TAG = "kind"
ELSEWHERE = "elsewhere"
BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def load(kind: type[T], path: str | os.PathLike) -> T:
    """Read a TOML file. Raises ValueError, naming the file and the key, for what does not fit."""
    table = read_table(path)
    try:
        return parse(kind, table)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_table(path: str | os.PathLike) -> Table:
    """The table that a TOML file is. Raises ValueError, naming the file, for another."""
    try:
        return tomllib.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not TOML: {error}") from None


def parse(kind: type[T], table: Mapping[str, Any]) -> T:
    """A table as the dataclass `kind`.

    Raises ValueError, naming the key by its dotted path, for one that is unknown (with the known one that is nearest),
    missing, or of another type, and for what a class refuses itself.
    """
    tagged = _with_tags(kind, table)
    try:
        # JSON, because there a list is a tuple and a string a path, while types stay strict.
        return _adapter(typing.cast(type, kind)).validate_json(json.dumps([tagged], default=str), strict=True)[0]
    except pydantic.ValidationError as error:
        raise ValueError(_message(kind, tagged, error)) from None


def to_table(config: Any) -> Any:
    """A dataclass as nested dicts, lists and scalars: its tag first, without fields that are None."""
    if dataclasses.is_dataclass(config):
        names = sorted((f.name for f in dataclasses.fields(config)), key=lambda name: name != TAG)
        fields = ((name, getattr(config, name)) for name in names)
        return {name: to_table(value) for name, value in fields if value is not None}
    if isinstance(config, Mapping):
        return {str(key): to_table(value) for key, value in config.items() if value is not None}
    if isinstance(config, list | tuple):
        return [to_table(value) for value in config]
    return str(config) if isinstance(config, os.PathLike) else config


def dumps(config: Any) -> str:
    """A dataclass as TOML. Raises ValueError for a None in a list, which TOML does not have."""
    return "\n".join(_toml_lines(to_table(config), ())) + "\n"


# ---- dotted options ----


def override(kind: type, table: Mapping[str, Any], options: Sequence[str]) -> Table:
    """The table with options applied: `--a.b 3`, `--a.b=3`, `--a.b 0.9 0.95` for a list, `--a.b` for true.

    Dashes stand for underscores, a number for the place in a list (`--layers.0.mlp.kind moe`), None for a field that is
    left out. Another tag than the table's begins from that class's own defaults. Raises ValueError for an unknown key.
    """
    changed: Table = _with_tags(kind, to_table(table))
    for key, words in _pairs(options):
        path = tuple(re.sub("-", "_", key).split("."))
        _set(kind, changed, path, words)
    return changed


def _pairs(options: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    words = list(options)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or len(word) < 3:
            file = f": --config {word} reads a file" if word.endswith(".toml") else ""
            raise ValueError(f"expected an option like --optimizer.lr 3e-4, got {word!r}{file}")
        key, equals, value = word[2:].partition("=")
        values = [value] if equals else []
        while words and not words[0].startswith("--"):
            values.append(words.pop(0))
        yield key, values


def _set(kind: type, table: Any, path: tuple[str, ...], words: list[str]) -> None:
    *parents, last = path
    hint: Any = kind
    place, above = table, ""
    for name in parents:
        hint = _member(hint, place, name, above, kind)
        above += f"{name}."
        if isinstance(place, list):
            place = place[_index(place, name, above[:-1])]
        else:
            place = place.setdefault(name, {})
    value = _value(_member(hint, place, last, above, kind), words, ".".join(path))
    if isinstance(place, list):
        place[_index(place, last, f"{above}{last}")] = value
        return
    if last == TAG and _tag(hint, place) != value:
        place.clear()
    if value is None:
        place.pop(last, None)
    else:
        place[last] = value


def _index(place: list, name: str, path: str) -> int:
    if name.isdecimal() and int(name) < len(place):
        return int(name)
    raise ValueError(f"{path}: expected a place in a list of {len(place)}")


def _member(hint: Any, table: Any, name: str, above: str, root: type) -> Any:
    """The type that stands at `name` in a table of type `hint`, within one of type `root`."""
    hint = _plain(hint)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if not _classes(hint) and origin not in (tuple, list, dict):
        raise ValueError(f"unknown key {above}{name}: {above[:-1]} is {_name(hint)}, and no table")
    if not isinstance(table, Mapping | list):
        raise ValueError(_misfit(above[:-1], hint, table))
    if origin in (tuple, list):
        return args[0]
    if origin is dict:
        return args[1]
    classes = [c for c in _classes(hint) if name in _hints(c)]
    if not classes:
        raise ValueError(_unknown(_classes(hint), name, above, root))
    tag = _tag(hint, table)
    chosen = [c for c in classes if name == TAG or tag is None or _tag_of(c) == tag]
    if not chosen:
        raise ValueError(f"unknown key {above}{name} of {TAG} {tag!r}; it is of {TAG} {_tag_of(classes[0])!r}")
    if name == TAG:
        return Literal[tuple(_tag_of(c) for c in classes)]  # type: ignore[misc]
    return _hints(chosen[0])[name]


def _value(hint: Any, words: list[str], key: str) -> Any:
    """The words of an option as the type of its field; what does not fit stays text, which `parse` refuses by name."""
    hint = _plain(hint)
    if typing.get_origin(hint) in (tuple, list) and not (len(words) == 1 and words[0].startswith("[")):
        return [_value(typing.get_args(hint)[0], [word], key) for word in words]
    if not words:
        return True
    or_list = str in typing.get_args(hint)  # a text, or a list of them
    if or_list and len(words) > 1:
        return words
    if len(words) > 1:
        raise ValueError(f"--{key} takes one value, got {' '.join(words)}")
    (word,) = words
    if word == "None":
        return None
    if not word and hint is pathlib.Path:
        raise ValueError(f"--{key} is empty: name a path; . is this directory")
    if not word.isprintable() and any(0xD800 <= ord(c) < 0xE000 for c in word):
        raise ValueError(f"--{key} must be UTF-8, which a configuration is written in, got {word!r}")
    literal = typing.get_origin(hint) is Literal and isinstance(typing.get_args(hint)[0], str)
    if hint in (str, pathlib.Path) or literal or (or_list and not word.startswith("[")):
        return word
    try:
        return tomllib.loads(f"value = {word.lower() if word in ('True', 'False') else word}")["value"]
    except ValueError:
        return _number(word)


def _number(word: str) -> Any:
    try:
        return float(word)  # 1e5, .5 and 3., which TOML does not read
    except ValueError:
        return word


# ---- what the keys are ----


@dataclasses.dataclass(frozen=True)
class Key:
    name: str
    """Dotted path."""
    type: str
    """int, float, 'adamw' | 'muon', ..."""
    default: str | None
    """As TOML; None: it must be given, "": it may be left out."""
    doc: str
    of: str = ""
    """Where a tagged union's class has it alone: the tag, e.g. optimizer.kind = "adamw"."""


def keys(kind: type) -> list[Key]:
    """Every key of a configuration in order, for a list of options; those in lists and dicts excepted, and those of a
    part that the whole has in another place, which the field's metadata names: {ELSEWHERE: names}."""
    return list(_keys(kind, "", "", {}))


def _keys(kind: type, prefix: str, of: str, begins: Table) -> Iterator[Key]:
    """begins: values that stand in place of the class's own defaults."""
    docs = _docs(kind)
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        name, hint = prefix + field.name, _hints(kind)[field.name]
        classes = _classes(hint)
        if field.name == TAG and of:
            continue
        if not classes:
            default = _toml_value(begins[field.name]) if field.name in begins else _default_text(field)
            yield Key(name, _name(hint), default, docs.get(field.name, ""), of)
        elif len(classes) == 1:
            there = [f"{name}.{key}" for key in field.metadata.get(ELSEWHERE, ())]
            yield from (key for key in _keys(classes[0], f"{name}.", of, {}) if key.name not in there)
        else:
            tags = " | ".join(repr(_tag_of(c)) for c in classes)
            begins_with = _default_table(field)
            tag = begins_with.get(TAG)
            default = "" if field.default is None else None if tag is None else repr(tag)
            yield Key(f"{name}.{TAG}", tags, default, docs.get(field.name, ""), of)
            for member in classes:
                own = begins_with if _tag_of(member) == tag else {}
                yield from _keys(member, f"{name}.", f"{name}.{TAG} = {_tag_of(member)!r}", own)


@functools.cache
def _in_lists(kind: type, prefix: str = "") -> dict[str, tuple[str, str]]:
    """The keys of the tables of lists, by their last name: of which list, and their place in one of its tables."""
    found: dict[str, tuple[str, str]] = {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        name, hint = prefix + field.name, _plain(_hints(kind)[field.name])
        for member in _classes(hint):
            found = _in_lists(member, f"{name}.") | found
        if typing.get_origin(hint) not in (tuple, list):
            continue
        for key in (key for member in _classes(typing.get_args(hint)[0]) for key in keys(member)):
            steps = key.name.split(".")
            for i, step in enumerate(steps, 1):
                found.setdefault(step, (name, ".".join(steps[:i])))
    return found


def _default_text(field: dataclasses.Field) -> str | None:
    value = _default(field)
    return None if value is MISSING else "" if value is None else _toml_value(to_table(value))


@functools.cache
def _docs(kind: type) -> dict[str, str]:
    """The strings that stand under the fields of a dataclass, its bases' included."""
    docs: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body  # type: ignore[attr-defined]
        except (OSError, TypeError):  # a class without a file
            continue
        for field, text in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                docs[ast.unparse(field.target)] = inspect.cleandoc(str(text.value.value))
    return docs


# ---- types ----


@functools.cache
def _adapter(kind: type) -> pydantic.TypeAdapter:
    # Around a tuple, because a dataclass cannot be given a configuration from outside, and takes on that of its parent.
    return pydantic.TypeAdapter(tuple[kind], config=pydantic.ConfigDict(extra="forbid"))  # type: ignore[valid-type]


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind)}  # type: ignore[arg-type]


def _plain(hint: Any) -> Any:
    """Without Annotated and without None."""
    while typing.get_origin(hint) is Annotated:
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        some = [a for a in typing.get_args(hint) if a is not types.NoneType]
        return _plain(some[0]) if len(some) == 1 else typing.Union[tuple(some)]  # noqa: UP007 (made from a list)
    return hint


def _classes(hint: Any) -> list[type]:
    """The dataclass, or the dataclasses of a union, that a hint names."""
    hint = _plain(hint)
    args = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    return [a for a in map(_plain, args) if isinstance(a, type) and dataclasses.is_dataclass(a)]


def _tag_of(kind: type) -> Any:
    return next((f.default for f in dataclasses.fields(kind) if f.name == TAG), None)  # type: ignore[arg-type]


def _tag(hint: Any, table: Any) -> Any:
    classes = _classes(hint)
    default = _tag_of(classes[0]) if len(classes) == 1 else None
    return table.get(TAG, default) if isinstance(table, Mapping) else None


def _default(field: dataclasses.Field) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _default_table(field: dataclasses.Field) -> Table:
    """Of a field whose default has a tag: that, and what is not its class's own default."""
    default = _default(field)
    if getattr(default, TAG, None) is None:
        return {}
    values = ((f, getattr(default, f.name)) for f in dataclasses.fields(default))
    return {f.name: to_table(value) for f, value in values if f.name == TAG or value != _default(f)}


def _with_tags(hint: Any, table: Any) -> Any:
    """The table with each tag that it leaves out and a field's default has, and with what else that default has."""
    hint = _plain(hint)
    if isinstance(table, list) and typing.get_origin(hint) in (tuple, list):
        return [_with_tags(typing.get_args(hint)[0], value) for value in table]
    classes = _classes(hint)
    if not isinstance(table, Mapping):
        return table
    if typing.get_origin(hint) is dict:
        return {name: _with_tags(typing.get_args(hint)[1], value) for name, value in table.items()}
    kind = next((c for c in classes if len(classes) == 1 or _tag_of(c) == table.get(TAG)), None)
    if kind is None:
        return dict(table)
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    tagged: Table = {}
    for name, value in table.items():
        if name in fields:
            member = _hints(kind)[name]
            default = _default_table(fields[name])
            union = len(_classes(member)) > 1
            if union and default and isinstance(value, Mapping) and value.get(TAG, default[TAG]) == default[TAG]:
                value = default | dict(value)
            value = _with_tags(member, value)
        tagged[name] = value
    return tagged


# ---- errors ----


def _message(kind: type, table: Table, error: pydantic.ValidationError) -> str:
    found = [(e, *_locate(kind, table, e["loc"][1:])) for e in error.errors()]
    for e, path, hint in found:
        if e["type"] == "unexpected_keyword_argument":
            above, _, name = path.rpartition(".")
            return _unknown(_classes(hint), name, f"{above}." if above else "", kind)
    missing = [path for e, path, _ in found if e["type"] in ("missing", "missing_argument", "union_tag_not_found")]
    if missing:
        return f"missing: {', '.join(missing)}"
    e, path, hint = found[0]
    if e["type"] == "value_error":
        return f"[{path}] {e['ctx']['error']}" if path else str(e["ctx"]["error"])
    value = e["input"]
    if e["type"] == "union_tag_invalid":
        tags = [str(_tag_of(c)) for c in _classes(hint)]
        near = difflib.get_close_matches(str(value[TAG]), tags, 1, 0.6)
        hinted = f"; did you mean {near[0]!r}?" if near else ""
        return f"{path}.{TAG} must be {' or '.join(map(repr, tags))}, got {value[TAG]!r}{hinted}"
    return _misfit(path, hint, value)


def _misfit(path: str, hint: Any, value: Any) -> str:
    """That a value is of another type, and what a table there would hold."""
    classes = _classes(hint)
    if not classes or isinstance(value, Mapping):
        return f"{path} must be {_name(hint)}, got {value!r}"
    tags = " or ".join(repr(_tag_of(c)) for c in classes)
    holds = f"its {TAG} is {tags}" if len(classes) > 1 else f"its keys are {', '.join(_hints(classes[0]))}"
    return f"{path} must be a table [{path}], got {value!r}; {holds}"


def _locate(kind: type, table: Any, loc: Iterable[Any]) -> tuple[str, Any]:
    """The dotted path of an error, without the tags that pydantic puts in, and the type that is expected there."""
    path: list[str] = []
    hint: Any = kind
    value: Any = table
    *front, last = loc or [None]
    for step in [*front, last]:
        classes = _classes(hint)
        if len(classes) > 1 and isinstance(value, Mapping) and step == value.get(TAG):
            hint = next(c for c in classes if _tag_of(c) == step)
            continue
        if isinstance(value, Mapping):
            origin = typing.get_origin(_plain(hint))
            owner = next((c for c in classes if step in _hints(c)), None)
            if step not in value and owner is None:
                continue
            if owner is not None:
                hint = _hints(owner)[step]
            elif origin is dict:
                hint = typing.get_args(_plain(hint))[1]
            value = value.get(step)
        elif isinstance(value, list) and isinstance(step, int):
            args = typing.get_args(_plain(hint))
            hint = args[step] if len(args) > step and args[-1] is not ... else args[0]
            value = value[step] if step < len(value) else None
        else:
            continue
        path.append(str(step))
    return ".".join(path), hint


def _unknown(classes: Sequence[type], name: str, above: str, root: type) -> str:
    """The known key that looks most like an unknown one, of its own table or of any other; first one of its name."""
    own = list(dict.fromkeys(key for c in classes for key in _hints(c)))
    text = f"unknown key {above}{name}"
    known = keys(root)
    elsewhere = {key.name.rpartition(".")[2]: key.name for key in reversed(known)}
    if not above and "." in elsewhere.get(name, "") and not difflib.get_close_matches(name, own, 1, 0.85):
        return f"{text}; did you mean {elsewhere[name]}?"
    if near := difflib.get_close_matches(name, own, 1, 0.7):
        return f"{text}; did you mean {above}{near[0]}?"
    if other := next((key.of for key in known if key.name == above + name), ""):
        return f"{text} of this {TAG}: it goes with {other}"
    listed = _in_lists(root)
    if (near := difflib.get_close_matches(name, elsewhere, 1, 0.7)) and name not in listed:
        return f"{text}; did you mean {elsewhere[near[0]]}?"
    if near := difflib.get_close_matches(name, listed, 1, 0.8):
        place, path = listed[near[0]]
        return f"{text}; did you mean {path} in one of [[{place}]]?"
    return f"{text}: known are {', '.join(above + key for key in own)}"


def _name(hint: Any) -> str:
    hint = _plain(hint)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " or ".join(map(repr, args))
    if origin is tuple:
        return f"a list of {_name(args[0])}" if args[-1] is ... else f"a list [{', '.join(map(_name, args))}]"
    if origin is list:
        return f"a list of {_name(args[0])}"
    if origin in (types.UnionType, typing.Union):
        return " or ".join(map(_name, args))
    if dataclasses.is_dataclass(hint):
        names = sorted((f.name for f in dataclasses.fields(hint)), key=lambda name: name != TAG)
        return f"{{{', '.join(f'{TAG} = {_tag_of(hint)!r}' if name == TAG else name for name in names)}}}"  # type: ignore[arg-type]
    if origin is dict:
        return "a table"
    return "a path" if hint is pathlib.Path else getattr(hint, "__name__", str(hint))


# ---- writing TOML ----


def _toml_lines(table: Table, path: tuple[str, ...]) -> Iterator[str]:
    tables = {k: v for k, v in table.items() if isinstance(v, dict)}
    lists = {k: v for k, v in table.items() if isinstance(v, list) and v and all(isinstance(i, dict) for i in v)}
    for key, value in table.items():
        if key not in tables and key not in lists:
            yield f"{_toml_key(key)} = {_toml_value(value)}"
    for key, value in tables.items():
        yield f"\n[{_dotted(*path, key)}]"
        yield from _toml_lines(value, (*path, key))
    for key, values in lists.items():
        for value in values:
            yield f"\n[[{_dotted(*path, key)}]]"
            yield from _toml_lines(value, (*path, key))


def _toml_value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml_key(k)} = {_toml_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml_value, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if value is None:
        raise ValueError("a list holds None, which TOML cannot write")
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def _toml_key(key: str) -> str:
    return key if BARE_KEY.fullmatch(key) else _toml_value(key)


def _dotted(*path: str) -> str:
    return ".".join(map(_toml_key, path))
