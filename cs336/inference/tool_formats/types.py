"""Values that models write as text, as JSON: by the types of a JSON schema, and of Python's literals."""

import ast
import contextlib
import json
import re
from collections.abc import Mapping
from typing import Any

DEEPEST = 20  # references and alternatives within each other
PYTHON = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}
KINDS = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
ESCAPES = "\\'\"abfnrtvxuUN\n"


def types_of(schema: Any, root: Mapping[str, Any]) -> set[str]:
    """The types that a value may have; none where the schema says nothing of it. root: where its references point."""
    return _types(schema, root, {}, 0)


def _types(schema: Any, root: Mapping[str, Any], found: dict[int, set[str]], depth: int) -> set[str]:
    """found: of the schemas that were seen, each of which is read once, however many point at it."""
    if not isinstance(schema, Mapping) or depth > DEEPEST:
        return set()
    if id(schema) not in found:
        found[id(schema)] = set()  # within itself it says nothing
        found[id(schema)] = _types_of_new(schema, root, found, depth + 1)
    return found[id(schema)]


def _types_of_new(
    schema: Mapping[str, Any], root: Mapping[str, Any], found: dict[int, set[str]], depth: int
) -> set[str]:
    if "type" in schema:
        return {kind for kind in _list(schema["type"]) if isinstance(kind, str)}
    if "const" in schema or "enum" in schema:
        return {kind_of(value) for value in _list(schema.get("enum", [schema.get("const")]))}
    if isinstance(reference := schema.get("$ref"), str):
        place: Any = root
        for key in reference.removeprefix("#/").split("/"):
            place = place.get(key.replace("~1", "/").replace("~0", "~")) if isinstance(place, Mapping) else None
        return _types(place, root, found, depth)
    alternatives = [one for key in ("anyOf", "oneOf", "allOf") for one in _list(schema.get(key, []))]
    inner = [_types(one, root, found, depth) for one in alternatives]
    return set().union(*inner) if all(inner) else set()


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def value_of(text: str, types: set[str]) -> str:
    """A text as JSON of one of the types, where it is of one, or of any where there are none; else a string."""
    plain = text.strip()
    try:
        value = json.loads(plain, parse_constant=_refuse)
    except (ValueError, RecursionError):
        try:
            plain = json_of_literal(plain)
            value = json.loads(plain)
        except (ValueError, RecursionError):
            return json.dumps(text, ensure_ascii=False)
    kind = kind_of(value)
    wanted = types - {"string"} | ({"integer"} if "number" in types else set())
    if isinstance(value, float) and value.is_integer() and "integer" in types:
        kind = "integer"
    if kind in wanted or (not types and kind != "string"):
        return plain
    return json.dumps(text, ensure_ascii=False)


def kind_of(value: Any) -> str:
    """A value's type in JSON schemas."""
    return KINDS.get(type(value), "null")


def json_of_literal(text: str) -> str:
    """JSON of a literal of Python's, or of JSON itself. Raises ValueError for anything else, and for half a character
    ('\\ud800'), which no text in UTF-8 has."""
    with contextlib.suppress(ValueError, RecursionError):
        json.loads(text, parse_constant=_refuse)
        return text.strip()
    escaped = re.sub(r"(?s)\\(.)", lambda found: found[0] if found[1] in ESCAPES else "\\" + found[0], text)
    try:
        value = _plain(ast.parse(escaped.strip(), mode="eval").body)
        found = json.dumps(value, ensure_ascii=False, allow_nan=False)
        found.encode()
        return found
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"no literal: {error}") from None


def _plain(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=value) if value is None or isinstance(value, bool | int | float | str):
            return value
        case ast.Name(id=name) if name in PYTHON:
            return PYTHON[name]
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_plain(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            names = [None if key is None else _plain(key) for key in keys]
            if all(isinstance(name, str) for name in names):
                return dict(zip(names, map(_plain, values), strict=True))
    raise ValueError("no literal")


def _refuse(name: str) -> None:
    raise ValueError(f"JSON has no {name}")
