"""Which tools a conversation may call, and which it must: OpenAI's `tools`, `tool_choice` and `parallel_tool_calls`."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from cs336.inference.grammar import check_schema
from cs336.inference.tool_formats import ToolFormat
from cs336.inference.tool_formats.format import Symbols

NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
TYPES = ("array", "boolean", "integer", "null", "number", "object", "string")
LISTS = ("enum", "anyOf", "oneOf", "allOf")  # in JSON schemas; all but the first of schemas
OBJECTS = ("properties", "$defs", "definitions")
DEEPEST = 100
ANY_ARGUMENTS = {"type": "object"}
NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
TOOL = '{"type": "function", "function": {"name": ..., "description": ..., "parameters": a JSON schema}}'
FUNCTION = '{"type": "function", "function": {"name": ...}}'
CHOICE = f'"none", "auto", "required", {FUNCTION}, or {{"type": "allowed_tools", "allowed_tools": ...}}'
ALLOWED = f'{{"mode": "auto" or "required", "tools": a list of {FUNCTION}}}'


class Tools:
    """Raises ValueError, which names the field, for what is none of OpenAI's."""

    def __init__(
        self,
        tools: Sequence[Mapping[str, Any]] | None,
        choice: str | Mapping[str, Any] | None = None,
        parallel: bool = True,
    ):
        if isinstance(tools, str | Mapping) or not isinstance(tools, Sequence | None):
            raise ValueError(f"tools must be a list of {TOOL}, got {tools!r:.80}")
        self._schemas: dict[str, Mapping[str, Any]] = {}
        self._strict: set[str] = set()
        for i, tool in enumerate(tools or ()):
            name, schema = _checked(f"tools.{i}", tool)
            if name in self._schemas:
                raise ValueError(f"tools.{i}.function.name is {name!r}, as is another tool's: give it another name")
            self._schemas[name] = schema
            if tool["function"].get("strict"):
                self._strict.add(name)
        self._allowed = [*self._schemas]
        choice = "auto" if choice is None else choice
        named = isinstance(choice, Mapping)
        if isinstance(choice, Mapping) and choice.get("type") == "allowed_tools":
            choice, self._allowed = _allowed(choice, self._allowed)
            named = False
        must = _names(choice, self._allowed)
        self.must = must or ()
        """The names of the tools of which one must be called."""
        self.offered = [] if must is None else [dict(tool) for tool in tools or ()]
        """As chat templates take them."""
        self.parallel = parallel and not named

    @property
    def schemas(self) -> Mapping[str, Mapping[str, Any]]:
        """Of the arguments of the tools that may be called."""
        return {name: self._schemas[name] for name in self._allowed} if self.offered else {}

    @property
    def strict(self) -> bool:
        """Whether calls that nobody asks for follow a schema too."""
        return not self._strict.isdisjoint(self.schemas)

    def rules(self, format: ToolFormat, symbols: Symbols) -> list[str]:
        """Lark of the rule `call`: of one of `must`, or of any where none must be called, then by the schemas of strict
        tools alone. Raises ValueError for schemas that llguidance does not know, and where it is not installed."""
        names = self.must or [*self.schemas]
        followed = names if self.must else self._strict
        calls, places = [f"call{i}" for i in range(len(names))], [*self._schemas]
        lines = [f"call: {' | '.join(calls)}"]
        for call, name in zip(calls, names, strict=True):
            schema = self._schemas[name] if name in followed else ANY_ARGUMENTS
            check_schema(schema, f"tools.{places.index(name)}.function.parameters")
            lines += format.rules(call, name, schema, symbols)
        return lines


def _checked(at: str, tool: Any) -> tuple[str, Mapping[str, Any]]:
    """A tool's name and the schema of its arguments."""
    if not isinstance(tool, Mapping) or tool.get("type") != "function" or not isinstance(tool.get("function"), Mapping):
        raise ValueError(f"{at} must be {TOOL}, got {tool!r:.80}")
    function = tool["function"]
    _refuse_others(at, tool, {"type", "function"})
    _refuse_others(f"{at}.function", function, {"name", "description", "parameters", "strict"})
    name, schema = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(f"{at}.function.name must be 1 to 64 letters, digits, _ and -, got {name!r:.80}")
    for field, kind in (("description", str), ("strict", bool)):
        if not isinstance(value := function.get(field), kind | None):  # type: ignore[arg-type]
            raise ValueError(f"{at}.function.{field} must be a {kind.__name__}, got {value!r:.80}")
    if schema is None:
        return name, NO_ARGUMENTS
    at = f"{at}.function.parameters"
    if not isinstance(schema, Mapping) or schema.get("type", "object") != "object":
        raise ValueError(f'{at} must be a JSON schema of {{"type": "object"}}, got {schema!r:.80}')
    try:
        json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{at} is not JSON: {error}") from None
    _check(at, schema, depth=0)
    return name, {"type": "object"} | dict(schema)


def _check(at: str, schema: Any, depth: int) -> None:
    """Raises ValueError, with the place, where what is said most often in JSON schemas is said wrongly."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping) or depth > DEEPEST:
        raise ValueError(f"{at} must be a JSON schema, at most {DEEPEST} deep, got {schema!r:.80}")
    types = schema.get("type", [])
    if not all(kind in TYPES for kind in (types if isinstance(types, list) else [types])):
        raise ValueError(f"{at}.type must be one of {', '.join(TYPES)}, or a list of them, got {types!r:.80}")
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise ValueError(f"{at}.required must be a list of names, got {required!r:.80}")
    for kind, name, keys in ((list, "a list", LISTS), (Mapping, "an object", OBJECTS)):
        if wrong := [key for key in keys if key in schema and not isinstance(schema[key], kind)]:
            raise ValueError(f"{at}.{wrong[0]} must be {name}, got {schema[wrong[0]]!r:.80}")
    inner = [(f"{key}.{name}", value) for key in OBJECTS for name, value in schema.get(key, {}).items()]
    inner += [(f"{key}.{i}", value) for key in LISTS[1:] for i, value in enumerate(schema.get(key, ()))]
    inner += [(key, schema[key]) for key in ("items", "additionalProperties") if key in schema]
    for where, value in inner:
        _check(f"{at}.{where}", value, depth + 1)


def _names(choice: Any, names: list[str]) -> list[str] | None:
    """Of which one must be called; None where nothing may be."""
    if choice == "none":
        return None
    if choice == "auto":
        return []
    if choice != "required" and not _is_function(choice):
        raise ValueError(f"tool_choice must be {CHOICE}, got {choice!r:.80}")
    if not names:
        raise ValueError("tool_choice asks for a call, and there are no tools: give some")
    if choice == "required":
        return names
    if (name := choice["function"]["name"]) not in names:
        raise ValueError(f"tool_choice.function.name is {name!r:.80}, and the tools are {', '.join(names)}")
    return [name]


def _allowed(choice: Mapping[str, Any], names: list[str]) -> tuple[str, list[str]]:
    """OpenAI's choice among some of the tools: "auto" or "required", and their names."""
    given, at = choice.get("allowed_tools"), "tool_choice.allowed_tools"
    mode, tools = (given.get("mode"), given.get("tools")) if isinstance(given, Mapping) else (None, None)
    if mode not in ("auto", "required") or not isinstance(tools, list) or not all(map(_is_function, tools)):
        raise ValueError(f"{at} must be {ALLOWED}, got {given!r:.80}")
    allowed = [tool["function"]["name"] for tool in tools]
    if unknown := [name for name in allowed if name not in names]:
        raise ValueError(f"{at} has {unknown[0]!r:.80}, and the tools are {', '.join(names) or 'none'}")
    return mode, [name for name in names if name in allowed]


def _is_function(choice: Any) -> bool:
    """Whether it names one."""
    return (
        isinstance(choice, Mapping)
        and choice.keys() == {"type", "function"}
        and choice["type"] == "function"
        and isinstance(choice["function"], Mapping)
        and choice["function"].keys() == {"name"}
    )


def _refuse_others(at: str, given: Mapping[str, Any], known: set[str]) -> None:
    if unknown := sorted(map(str, given.keys() - known)):
        raise ValueError(f"{at} has {', '.join(unknown)}, and the fields are {', '.join(sorted(known))}")
