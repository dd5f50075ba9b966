"""What may be shown on a terminal."""


def visible(text: str) -> str:
    """Text that a model made up, or anyone: each control character, which terminals obey, is U+FFFD instead."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
