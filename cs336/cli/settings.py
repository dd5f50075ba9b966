"""What verbs whose options are the keys of a configuration share: `cs336 VERB --config FILE --KEY VALUE ...`."""

import argparse
import inspect
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from cs336.cli.common import Path

WIDTH = 100


def own_options(verb: str) -> argparse.ArgumentParser:
    """Options that are no keys; a verb adds its own."""
    parser = argparse.ArgumentParser(f"cs336 {verb}", add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="store_true", help="show this help message and exit")
    parser.add_argument("--config", type=Path, help="TOML file of settings, as --print-config writes it")
    parser.add_argument("--print-config", action="store_true", help="print the settings as TOML, and do nothing else")
    return parser


def given(own: argparse.Namespace, options: Sequence[str], kind: type, parse: Callable[[dict[str, Any]], Any]) -> Any:
    """`parse` of --config's table and the options that win over it. Raises ValueError, naming the key, and where
    nothing was given at all, how to."""
    from cs336.utils import config as configs

    try:
        return parse(configs.override(kind, {} if own.config is None else configs.read_table(own.config), options))
    except ValueError as error:
        if own.config is not None or options:
            raise
        raise ValueError(f"{error}: give a file, --config FILE, or options, which --help lists") from None


def help_text(parser: argparse.ArgumentParser, kind: type, description: str | None) -> str:
    """Every key of `kind` with its type, its default and its description, those of a table together."""
    from cs336.utils import config as configs

    parser.usage = f"{parser.prog} [--config FILE] [--KEY VALUE ...]"
    parser.description = inspect.cleandoc(description or "").replace("\n\n", " ").replace("\n", " ")
    lines, table = [parser.format_help(), "settings, as in the TOML file:"], None
    for key in configs.keys(kind):
        if key.of != table:
            table = key.of
            lines += [f"\n  where {key.of}:"] if key.of else [""]
        default = "(required)" if key.default is None else f"(default: {key.default})" if key.default else ""
        lines.append(f"  --{key.name.replace('_', '-')} {key.type}")
        lines += textwrap.wrap(f"{key.doc} {default}".strip(), WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(lines)
