"""Preferences: a conversation, two answers to it, and which of them was chosen. Readers of the forms they come in.

{"history": [{"role", "content"}, ...], "response_a", "response_b", "chosen": "a", "b" or "tie"}    ours, "margin" too
{"prompt": a text or messages, "chosen": a text or messages, "rejected"}                       TRL's, UltraFeedback's
{"chosen": "\\n\\nHuman: ...\\n\\nAssistant: ...", "rejected"}                                           HH's
"""

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from cs336.alignment.examples import Turn, read_rows, text_at, turns_of
from cs336.utils.files import write_json_lines

_HH = re.compile(r"(?:\A|\n\n)(Human|Assistant):[ ]?")
_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class PreferenceExample:
    """Two answers to one conversation. Raises ValueError without a history, and for another choice."""

    history: list[Turn]
    """What was said before, the user last."""
    response_a: str
    response_b: str
    chosen: Literal["a", "b", "tie"]
    margin: float = 0.0
    """How much better the chosen one is, in the scale of a reward."""

    def __post_init__(self):
        if not self.history:
            raise ValueError("a preference needs a history: the turns before the answers")
        if self.chosen not in ("a", "b", "tie"):
            raise ValueError(f"chosen must be a, b or tie, got {self.chosen!r}")
        if not 0 <= self.margin < math.inf:
            raise ValueError(f"margin must be 0 or more and finite, got {self.margin}")

    @property
    def better(self) -> str:
        """Raises ValueError for a tie."""
        return self._answers()[0]

    @property
    def worse(self) -> str:
        """Raises ValueError for a tie."""
        return self._answers()[1]

    def _answers(self) -> tuple[str, str]:
        if self.chosen == "tie":
            raise ValueError("neither answer of a tie is the better one: leave ties out")
        a, b = self.response_a, self.response_b
        return (a, b) if self.chosen == "a" else (b, a)


def read_preferences(path: str | os.PathLike) -> list[PreferenceExample]:
    """The preferences of JSON lines, each in one of the forms above.

    Raises ValueError, naming the line, for one of another form, and for a file without any.
    """
    found = []
    for where, row in read_rows(path):
        try:
            found.append(parse_preference(row, where))
        except ValueError as error:
            raise ValueError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None
    if not found:
        raise ValueError(f"{path} holds no preferences")
    return found


def parse_preference(row: Mapping[str, Any], where: str = "the row") -> PreferenceExample:
    """A row as a preference. Raises ValueError, naming `where`, for one of no known form."""
    if "response_a" in row:
        margin = row.get("margin", 0.0)
        if not isinstance(margin, int | float) or isinstance(margin, bool):
            raise ValueError(f'{where}: "margin" must be a number, got {margin!r:.40}')
        a, b = text_at(row, "response_a", where), text_at(row, "response_b", where)
        chosen: Any = row.get("chosen")
        return PreferenceExample(list(turns_of(row.get("history"), where)), a, b, chosen, float(margin))
    if "chosen" not in row or "rejected" not in row:
        raise ValueError(f'{where}: expected "history" and "response_a", or "chosen" and "rejected"; got {list(row)}')
    if "prompt" in row:
        return _of_prompt(row, where)
    if isinstance(row["chosen"], list):
        (history, better), (other, worse) = (_split(row[name], where) for name in ("chosen", "rejected"))
    else:
        (history, better), (other, worse) = (
            _split_hh(text_at(row, name, where), where) for name in ("chosen", "rejected")
        )
    if history != other:
        raise ValueError(f"{where}: the chosen and the rejected conversation differ before their last answers")
    return PreferenceExample(history, better, worse, "a", _margin(row))


def _of_prompt(row: Mapping[str, Any], where: str) -> PreferenceExample:
    prompt = row["prompt"]
    history = [Turn("user", prompt)] if isinstance(prompt, str) else list(turns_of(prompt, where))
    answers = list[str]()
    for name in ("chosen", "rejected"):
        value = row[name]
        if isinstance(value, list):  # UltraFeedback: the prompt again, then the answer
            value = turns_of(value, where)[-1].content
        elif not isinstance(value, str):
            raise ValueError(f'{where}: "{name}" must be text or messages, got {value!r:.60}')
        answers.append(value)
    return PreferenceExample(history, answers[0], answers[1], "a", _margin(row))


def _margin(row: Mapping[str, Any]) -> float:
    """UltraFeedback's scores, where the chosen one's is higher."""
    scores = [row.get(name) for name in ("score_chosen", "score_rejected")]
    chosen, rejected = (s if isinstance(s, int | float) and math.isfinite(s) else 0.0 for s in scores)
    return max(0.0, float(chosen) - float(rejected))


def _split(messages: Any, where: str) -> tuple[list[Turn], str]:
    *history, last = turns_of(messages, where)
    return history, last.content


def _split_hh(text: str, where: str) -> tuple[list[Turn], str]:
    parts = _HH.split(text)
    if parts[0].strip() or len(parts) < 5 or parts[-2] != "Assistant":
        raise ValueError(f'{where}: expected "\\n\\nHuman: ...\\n\\nAssistant: ...", got {text!r:.60}')
    turns = [Turn(_ROLES[role], said.strip()) for role, said in zip(parts[1::2], parts[2::2], strict=True)]
    return turns[:-1], turns[-1].content


def write_preferences(path: str | os.PathLike, examples: Iterable[PreferenceExample]) -> None:
    """As JSON lines of our form, which read_preferences reads."""
    rows = (
        {
            "history": [turn.message for turn in example.history],
            "response_a": example.response_a,
            "response_b": example.response_b,
            "chosen": example.chosen,
            "margin": example.margin,
        }
        for example in examples
    )
    write_json_lines(path, rows)
