"""`cs336 quickstart`."""

from typing import Annotated

from tyro.conf import arg

from cs336.cli.common import Late, Run, Stopped


@Late
def quickstart(arguments: list[str]) -> Run:
    """Text to report in minutes: train a tokenizer and a language model, evaluate, generate.

    Stages whose output is current are skipped; after Ctrl-C the same command continues.
    """
    from cs336.quickstart import Quickstart
    from cs336.quickstart import quickstart as main_job
    from cs336.utils.stages import Interrupted

    def run(settings: Annotated[Quickstart, arg(name="")]) -> None:
        try:
            main_job(settings)
        except Interrupted:
            raise Stopped from None

    return run
