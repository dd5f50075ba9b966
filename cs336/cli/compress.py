"""`cs336 compress`: a method a function, whose parameters are the options that the method has."""

import difflib
import os

import tyro
from tyro.conf import FlagCreatePairsOff

from cs336.cli import quantize
from cs336.cli.common import Run


def compress(arguments: list[str]) -> Run:
    """Write a smaller model: a directory that generate, serve, chat and evaluate take."""

    def run() -> int:
        rest = list(arguments)
        method = _taken(rest)
        if method is None and {"-h", "--help"} & set(rest):
            print(_overview())
            return os.EX_OK
        call = METHODS[method or DEFAULT]
        named = "" if method is None else f" --method {method}"
        tyro.cli(call, prog=f"cs336 compress{named}", args=rest, config=(FlagCreatePairsOff,))
        return os.EX_OK

    return run


METHODS: dict[str, Run] = {
    "int8": quantize.int8,
    "int4": quantize.int4,
    "gptq": quantize.gptq,
    "awq": quantize.awq,
}
DEFAULT = "int8"


def _taken(arguments: list[str]) -> str | None:
    """The method that the arguments name, which are left without it."""
    for i, argument in enumerate(arguments):
        flag, equals, method = argument.partition("=")
        if flag != "--method":
            continue
        if not equals and i + 1 < len(arguments):
            method = arguments[i + 1]
        if method not in METHODS:
            close = difflib.get_close_matches(method, METHODS, 1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise ValueError(f"--method is one of {', '.join(METHODS)}, got {method!r}{hint}")
        del arguments[i : i + (1 if equals else 2)]
        return method
    return None


def _overview() -> str:
    rows = [f"  {name:<12}{(call.__doc__ or '').partition(chr(10))[0]}" for name, call in METHODS.items()]
    return "\n".join(
        [
            "usage: cs336 compress MODEL --out DIR [--method METHOD] [OPTIONS]",
            "",
            (compress.__doc__ or "").strip(),
            "",
            f"methods ({DEFAULT} if none is named), whose options --method METHOD --help shows:",
            *rows,
        ]
    )
