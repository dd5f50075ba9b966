"""What verbs whose options are the keys of a configuration share: `cs336 VERB --config FILE --KEY VALUE ...`."""

import argparse
import inspect
import textwrap

from cs336.cli.common import Path

WIDTH = 100


def own_options(verb: str) -> argparse.ArgumentParser:
    """Options that are no keys; a verb adds its own."""
    parser = argparse.ArgumentParser(f"cs336 {verb}", add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="store_true", help="show this help message and exit")
    parser.add_argument("--config", type=Path, help="TOML file of settings, as --print-config writes it")
    parser.add_argument("--print-config", action="store_true", help="print the settings as TOML, and do nothing else")
    return parser


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
