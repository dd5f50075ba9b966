"""The grammar of a whole answer: what the model thinks first, calls by the schemas of their tools, and text, free or of
the caller's grammar. In llguidance's Lark, where marks are the special tokens that the model was taught."""

import dataclasses
import functools
import json
import re
from collections.abc import Mapping

from cs336.inference.grammar import check_schema
from cs336.inference.reasoning import Place, ReasoningFormat
from cs336.inference.sampling import SamplingParams
from cs336.inference.tool_formats import ToolFormat
from cs336.inference.tool_formats.format import json_rule, symbols_of
from cs336.inference.tools import Tools

SPACE_RULE = "SPACE: /[ \\n]*/"
BARE_SLASH = re.compile(r"(?s)(\\.)|/")  # or what is escaped, a slash perhaps


def constrained(
    params: SamplingParams,
    tools: Tools,
    format: ToolFormat | None,
    reasoning: ReasoningFormat | None,
    place: Place,
    special_tokens: Mapping[str, int],
) -> SamplingParams:
    """Of an answer that begins at this place of what is thought and said. Where a tool must be called it is nothing but
    calls. Where one may be, it is calls or of the caller's grammar; without any it is text, in which what begins as a
    call is one, if there is a strict tool. Behind what the model thinks, where it does.

    format: of calls, where tools are offered. Raises ValueError for a caller's Lark beside tools, for min_tokens beside
    calls, for schemas that llguidance does not know, and where it is not installed.
    """
    thinks = reasoning is not None and place != "behind"
    wanted = params.grammar is not None and not tools.must
    if params.lark is not None:
        if tools.offered:
            raise ValueError(
                "lark says what the text must be, which leaves no room for calls of tools: leave out one of them, or "
                'give tool_choice "none"'
            )
        return params
    if not (tools.must or tools.strict or (wanted and (thinks or tools.offered))):
        return params
    if params.min_tokens:
        what = "tool_choice" if tools.must else "tools"
        raise ValueError(f"{what} says where a text may end, and min_tokens does: give one of them")
    symbols = functools.partial(symbols_of, special_tokens=special_tokens)
    lines: list[str] = []
    if wanted or tools.must:
        answer = [f"{symbols(reasoning.final) if reasoning is not None else ''} wanted"] if wanted else []
        alternatives = " | ".join([*(["calls"] if tools.offered else []), *answer])
        lines.append(f"start: {'lead SPACE' if thinks else ''} ({alternatives})")
        if reasoning is not None and thinks:
            lines += [SPACE_RULE, *reasoning.rules(place, symbols)]
        if wanted:
            lines.append(_caller_rule("wanted", params))
        if format is not None:
            lines += format.only_calls(tools.parallel, symbols)
    elif format is not None:
        lines += ["start: answer", *format.text_and_calls(tools.parallel, symbols, sorted(special_tokens.values()))]
    if format is not None:
        lines += tools.rules(format, symbols)
    return dataclasses.replace(params, json_schema=None, regex=None, choice=(), lark="\n".join(lines))


def _caller_rule(rule: str, params: SamplingParams) -> str:
    """What params say that the text must be."""
    assert params.grammar is not None
    kind, text = params.grammar
    if kind == "json_schema":
        check_schema(json.loads(text), "json_schema")
        return json_rule(rule, json.loads(text))
    if kind == "regex":
        return f"{rule}: /{BARE_SLASH.sub(lambda found: found[1] or chr(92) + '/', text)}/"
    return f"{rule}: {' | '.join(json.dumps(one, ensure_ascii=False) for one in json.loads(text))}"
