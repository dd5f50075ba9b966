"""The text of a PDF, in reading order, by pypdfium2."""

import itertools
import os
import pathlib
import statistics
import time
from dataclasses import dataclass

MOST_PAGES = 2000
MOST_SECONDS = 60.0
HYPHEN = "\ufffe"  # pdfium's, where a word goes on in the next line, which it has joined already
MOST_CHARS = 1 << 24  # of a page: what a page that generates text without end is cut at


@dataclass(frozen=True)
class Line:
    """A line of a page in points, y upwards."""

    text: str
    left: float
    bottom: float
    right: float
    top: float


def pdf_to_text(pdf: bytes | str | os.PathLike, max_pages: int = MOST_PAGES, max_seconds: float = MOST_SECONDS) -> str:
    """The text of a PDF: pages parted by a form feed, paragraphs by an empty line, columns one after the other.

    pdf: its bytes, or a path.
    max_pages, max_seconds: where they are reached, the text of the pages until then is returned.

    Words that a line end hyphenates are whole. A PDF of images alone has no text: "". Raises ImportError without
    pypdfium2, and ValueError for a file that is damaged, encrypted or no PDF.
    """
    try:
        import pypdfium2
    except ModuleNotFoundError as error:
        raise ImportError("pdf_to_text needs pypdfium2: pip install pypdfium2") from error
    name = "the PDF" if isinstance(pdf, bytes) else str(pdf)
    data = pdf if isinstance(pdf, bytes) else pathlib.Path(pdf).read_bytes()
    try:
        document = pypdfium2.PdfDocument(data)
    except pypdfium2.PdfiumError as error:
        raise ValueError(f"{name} cannot be read: it is damaged, encrypted or no PDF ({error})") from error
    pages: list[str] = []
    deadline = time.monotonic() + max_seconds
    try:
        for index in range(min(len(document), max_pages)):
            if time.monotonic() > deadline:
                break
            try:
                pages.append(_page_text(document[index]))
            except pypdfium2.PdfiumError as error:
                raise ValueError(f"page {index + 1} of {name} cannot be read: it is damaged ({error})") from error
    finally:
        document.close()
    return "\f".join(pages).strip("\f\n ")


def _page_text(page) -> str:
    text_page = page.get_textpage()
    try:
        return join_lines(_in_reading_order(_lines(text_page)))
    finally:
        text_page.close()
        page.close()


def _lines(text_page) -> list[Line]:
    """In the order of the file, with pdfium's own spaces; the box of a line is that of its first and last letter."""
    count = min(text_page.count_chars(), MOST_CHARS)
    text = text_page.get_text_range(0, count) if count > 0 else ""
    lines: list[Line] = []
    begin = 0
    for raw in text.split("\n"):
        end = begin + len(raw)
        visible = raw.strip()
        if visible:
            first = begin + raw.index(visible[0])
            last = min(begin + raw.rindex(visible[-1]), count - 1)
            left, _, _, top = text_page.get_charbox(min(first, count - 1), loose=True)
            _, bottom, right, _ = text_page.get_charbox(last, loose=True)
            lines.append(Line(visible.replace(HYPHEN, ""), left, bottom, right, top))
        begin = end + 1
    return lines


def _in_reading_order(lines: list[Line]) -> list[Line]:
    """The order of the file, which is that of reading nearly always, unless it jumps up within a column.

    A page whose file order goes up the page more often than columns explain is sorted from top to bottom.
    """
    jumps = sum(b.bottom > a.top and b.left <= a.right for a, b in itertools.pairwise(lines))
    return sorted(lines, key=lambda line: (-line.top, line.left)) if jumps > 0.2 * len(lines) else lines


def join_lines(lines: list[Line]) -> str:
    """Paragraphs: lines that follow each other closely."""
    if not lines:
        return ""
    height = statistics.median(line.top - line.bottom for line in lines)
    out = lines[0].text
    for above, line in itertools.pairwise(lines):
        gap = above.bottom - line.top
        new_column = gap < -2 * height
        if gap > 0.9 * height or (new_column and out.endswith((".", "!", "?", ":"))):
            out += "\n\n" + line.text
        else:
            out += "\n" + line.text
    return out
