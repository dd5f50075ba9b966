"""Text from pages: F1 and speed of `html_to_text` and of what else is installed, on sets of pages with gold text.

    python benchmarks/end_to_end/bench_extract.py SET...

A SET is a directory with gold.jsonl (one {"id", "gold"} a line) and html/ID.html. Peers are used where they are
installed: pip install trafilatura readability-lxml resiliparse. Times are of this process alone, so that a busy
machine changes them little.
"""

import argparse
import json
import logging
import pathlib
import sys
import time
from collections.abc import Callable

from extract_score import Score

from cs336.data import html_to_text
from cs336.data.extract.encoding import decode

Extractor = Callable[[bytes], str]


def peers() -> dict[str, Extractor]:
    """Each with the options that its documentation gives for main text."""
    found: dict[str, Extractor] = {"cs336": html_to_text}
    try:
        import trafilatura

        found["trafilatura"] = lambda page: trafilatura.extract(page) or ""
        found["trafilatura, no comments"] = lambda page: trafilatura.extract(page, include_comments=False) or ""
        found["trafilatura, fast"] = lambda page: trafilatura.extract(page, include_comments=False, fast=True) or ""
    except ImportError as error:
        print(f"without trafilatura: {error}", file=sys.stderr)
    try:
        import lxml.html
        import readability

        found["readability-lxml"] = lambda page: lxml.html.fromstring(
            readability.Document(decode(page)).summary()
        ).text_content()
    except ImportError as error:
        print(f"without readability-lxml: {error}", file=sys.stderr)
    try:
        from resiliparse.extract.html2text import extract_plain_text

        found["resiliparse"] = lambda page: extract_plain_text(decode(page), main_content=True, alt_texts=False)
    except ImportError as error:
        print(f"without resiliparse: {error}", file=sys.stderr)
    return found


def measure(directory: pathlib.Path, extract: Extractor, most: int) -> tuple[Score, float, int]:
    """(score, seconds, pages that the extractor raised on, which count as empty)."""
    score, seconds, failed = Score(), 0.0, 0
    rows = [json.loads(line) for line in (directory / "gold.jsonl").open(encoding="utf-8")][:most]
    for row in rows:
        page = (directory / "html" / f"{row['id']}.html").read_bytes()
        start = time.process_time()
        try:
            text = extract(page)
        except Exception as error:  # whatever a peer raises on a page is its result
            print(f"{row['id']}: {error!r}", file=sys.stderr)
            text, failed = "", failed + 1
        seconds += time.process_time() - start
        score.add(row["gold"] or "", text)
    return score, seconds / len(rows), failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", type=pathlib.Path)
    parser.add_argument("--pages", type=int, default=10**9, help="at most, of a set")
    args = parser.parse_args()
    logging.disable(logging.CRITICAL)
    print(
        "| set | extractor | F1 | precision | recall | pages/s | failed |\n"
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |"
    )
    for directory in args.sets:
        for name, extract in peers().items():
            score, seconds, failed = measure(directory, extract, args.pages)
            print(
                f"| {directory.name} | {name} | {score.f1:.4f} | {score.precision:.3f} | {score.recall:.3f} "
                f"| {1 / seconds:.0f} | {failed} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
