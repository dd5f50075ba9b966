"""`cs336 VERB`: a thin file an area, and the program that runs one verb of them."""

import sys

NOT_WHOLE = "what cs336 needs is not all installed. Run `pip install --no-build-isolation -e .` in its clone"


def main(arguments: list[str] | None = None) -> int:
    """Run one verb. The exit status: 0, 2 for an error that the user can mend, 130 after Ctrl-C."""
    try:
        from cs336.cli import program
    except ModuleNotFoundError as error:  # a clone that was never installed has no parser of options
        print(f"cs336: {error}: {NOT_WHOLE}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before there is anything to go on with
        return 130
    return program.main(arguments)
