"""What stages learn from, as JSON lines: conversations and prompts. Fields are named as in TRL's data sets.

{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}    to learn, by a chat template
{"prompt": "2 + 2 = ", "completion": "4"}                                                  to learn, as plain text
{"prompt": a text or messages, "answer": ...}                                              to be answered and verified
"""

import hashlib
import json
import os
import pathlib
from codecs import BOM_UTF8
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cs336.alignment.sft import Example, encode_chat
from cs336.inference.chat import ChatTemplate
from cs336.tokenizer import Tokenizer
from cs336.utils.documents import open_bytes, unpacking


@dataclass(frozen=True)
class Turn:
    """What one side of a conversation says."""

    role: str
    content: str

    @property
    def message(self) -> dict[str, str]:
        """As ChatTemplate.render takes it."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True)
class Prompt:
    """A question, and what a verifier needs to judge an answer to it."""

    prompt: str | tuple[Turn, ...]
    """A text that the model continues as it is, or a conversation."""
    answer: Any


def read_rows(path: str | os.PathLike) -> Iterator[tuple[str, dict[str, Any]]]:
    """(FILE:LINE, object) of each line that is not empty; .gz, .xz, .bz2 and .zst are unpacked.

    Raises ValueError, naming the line, for one that is no JSON object.
    """
    path = pathlib.Path(path)
    with unpacking(path), open_bytes(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(line.removeprefix(BOM_UTF8))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: expected a JSON object ({error})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}")
            yield where, row


def digest_of(path: str | os.PathLike) -> str:
    """Names a file by its content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_at(row: Mapping[str, Any], name: str, where: str) -> str:
    """A field that must be text. Raises ValueError, naming the line, for one that is not there or something else."""
    value = row.get(name)
    if not isinstance(value, str):
        raise ValueError(f'{where}: "{name}" must be text, got {value!r:.60}; the line has {", ".join(row)}')
    return value


def turns_of(messages: Any, where: str) -> tuple[Turn, ...]:
    """Raises ValueError, naming the line, unless it is a list of {"role": text, "content": text}, not an empty one."""
    if isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages):
        pairs = [(m.get("role"), m.get("content")) for m in messages]
        if all(isinstance(role, str) and isinstance(content, str) for role, content in pairs):
            return tuple(Turn(role, content) for role, content in pairs)
    raise ValueError(f'{where}: expected a list of {{"role": text, "content": text}}, got {messages!r:.80}')


def read_prompts(path: str | os.PathLike) -> list[Prompt]:
    """Lines of {"prompt", "answer"}. Raises ValueError, naming the line, for others, and for a file without any."""
    prompts = []
    for where, row in read_rows(path):
        given = row.get("prompt")
        prompt = given if isinstance(given, str) and given else turns_of(given, where)
        if "answer" not in row:
            raise ValueError(f'{where}: expected "answer", of which a verifier tells right from wrong; got {list(row)}')
        prompts.append(Prompt(prompt, row["answer"]))
    if not prompts:
        raise ValueError(f"{path} holds no prompts")
    return prompts


def read_examples(
    path: str | os.PathLike,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    end_ids: Collection[int],
    *,
    last_only: bool = False,
) -> list[Example]:
    """The tokens of each line: {"messages"} by encode_chat, {"prompt", "completion"} by encode_completion.

    Raises ValueError, naming the line, for another and for what those refuse, and for a file without any.
    """
    examples = []
    for where, row in read_rows(path):
        try:
            if "messages" in row:
                messages = [turn.message for turn in turns_of(row["messages"], where)]
                examples.append(encode_chat(messages, tokenizer, template, end_ids, last_only=last_only))
            elif "prompt" not in row and "completion" not in row:
                raise ValueError(
                    f'{where}: expected "messages", or "prompt" and "completion"; the line has {", ".join(row)}'
                )
            else:
                prompt, completion = text_at(row, "prompt", where), text_at(row, "completion", where)
                examples.append(encode_completion(prompt, completion, tokenizer, end_ids))
        except ValueError as error:
            raise ValueError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None
    if not examples:
        raise ValueError(f"{path} holds no examples")
    return examples


def encode_completion(prompt: str, completion: str, tokenizer: Tokenizer, end_ids: Collection[int]) -> Example:
    """The tokens of a plain text; learned are those of the completion and the end, the first of end_ids.

    Special tokens that are written in either are taken as such. Raises ValueError for an empty prompt or completion,
    and where there is no end.
    """
    if not prompt or not completion:
        raise ValueError(f"prompt and completion must not be empty, got {prompt!r:.40} and {completion!r:.40}")
    if not end_ids:
        raise ValueError("no token ends a completion: a model that learns this never stops. Name one in end_tokens")
    before = tokenizer.encode_prompt(prompt)
    answer = tokenizer.encode(completion, "all", behind=before)
    if answer[-1] not in end_ids:
        answer.append(min(end_ids) if isinstance(end_ids, set | frozenset) else next(iter(end_ids)))
    return Example(before + answer, [False] * len(before) + [True] * len(answer))


def render(prompt: str | Sequence[Turn], template: ChatTemplate) -> str:
    """The text that the model is asked to continue."""
    return prompt if isinstance(prompt, str) else template.render([turn.message for turn in prompt])
