"""The text of a web page: parsed, judged block by block and written out natively (csrc/cpu/text/html*, content*)."""

from typing import Literal

from cs336 import _text
from cs336.data.extract.encoding import decode

Mode = Literal["main", "full"]
Format = Literal["text", "markdown"]


def html_to_text(html: bytes | str, mode: Mode = "main", format: Format = "text", charset: str = "") -> str:
    """The text of a page: `"main"` content alone, without navigation, advertising and comments, or `"full"`.

    html: bytes, whose encoding is detected, or a str. Broken markup is read as browsers read it; time and memory are
        linear in the size of the page, however it is nested.
    charset: of bytes, what the header that came with them says: it goes before what the page says.
    format: `"text"` parts paragraphs by an empty line, list items by a line end, cells by a tab; `"markdown"` keeps
        headings, lists, tables, quotes, code, emphasis and links.

    Returns "" where a page shows nothing, and in "main" where a long one is navigation alone.
    Raises ValueError for an unknown mode or format, and from 2 GB on.
    """
    if mode not in ("main", "full"):
        raise ValueError(f'mode is "main" or "full", got {mode!r}')
    if format not in ("text", "markdown"):
        raise ValueError(f'format is "text" or "markdown", got {format!r}')
    text = decode(html, charset) if isinstance(html, bytes) else html
    return _text.html_to_text(text, mode == "main", format == "markdown")
