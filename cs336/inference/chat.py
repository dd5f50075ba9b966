"""Conversations as text, by the Jinja template that a model was trained with, run in Hugging Face's way: in a sandbox.

A template comes with the model (chat_template.jinja, or chat_template in tokenizer_config.json). It is code of others:
it sees the messages and special tokens alone, changes nothing, and fails with ValueError. Without one, a conversation
is written as ChatML is.
"""

import datetime
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_STOP = ("<|im_end|>",)
LONGEST = 1 << 22  # characters of a conversation: a template that loops forever ends there


class _Generation(Extension):
    """{% generation %}...{% endgeneration %}, which marks what an assistant said, stands for its content."""

    tags = {"generation"}  # noqa: RUF012 (as in jinja2)

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


class ChatTemplate:
    """template: Jinja. special_tokens: texts by their names, bos_token and the like.

    Raises ValueError for a template that is none.
    """

    def __init__(self, template: str | None = None, special_tokens: Mapping[str, str] | None = None):
        self.is_default = template is None
        self._special_tokens = dict(special_tokens or {})
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda how: datetime.datetime.now().strftime(how)
        try:
            self._template = environment.from_string(CHATML if template is None else template)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template is not Jinja: {error}") from None

    @property
    def stop(self) -> tuple[str, ...]:
        """What ends an answer where the model does not know it as an end."""
        return CHATML_STOP if self.is_default else ()

    @classmethod
    def find(cls, directory: pathlib.Path) -> "ChatTemplate":
        """The one of a model's directory: chat_template.jinja, or in tokenizer_config.json; the default without any."""
        config: dict[str, Any] = {}
        if (file := directory / "tokenizer_config.json").exists():
            try:
                config = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{file} is not JSON: {error}") from None
        template = config.get("chat_template")
        if isinstance(template, list):  # several, by their names
            named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
            template = named.get("default")
        if (file := directory / "chat_template.jinja").exists():
            template = file.read_text(encoding="utf-8")
        tokens = {k: v.get("content") if isinstance(v, dict) else v for k, v in config.items() if k.endswith("_token")}
        return cls(template, {name: text for name, text in tokens.items() if isinstance(text, str)})

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        extra: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a conversation, up to where the assistant answers.

        messages: {"role": ..., "content": a text, or a list of {"type": "text", "text": ...}}.
        extra: what else the template may know, tools for one.
        Raises ValueError for messages of another form, and with what the template says of them.
        """
        plain = [_plain(i, message) for i, message in enumerate(messages)]
        if not plain:
            raise ValueError("there are no messages: give at least one")
        own = {"messages": plain, "add_generation_prompt": add_generation_prompt}
        known = self._special_tokens | dict(extra or {}) | own
        pieces, length = [], 0
        try:
            for piece in self._template.generate(known):
                pieces.append(piece)
                if (length := length + len(piece)) > LONGEST:
                    raise ValueError(f"the chat template writes more than {LONGEST} characters")
        except (jinja2.TemplateError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
            raise ValueError(f"the chat template refuses these messages: {error}") from None
        return "".join(pieces)


def _plain(i: int, message: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose content is one text."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(f'message {i} must be {{"role": ..., "content": ...}}')
    content = message.get("content")
    if isinstance(content, list | tuple):
        if bad := [part for part in content if not isinstance(part, Mapping) or part.get("type") != "text"]:
            raise ValueError(f"message {i} holds {bad[0]!r:.80}: only parts of text are understood")
        content = "".join(str(part.get("text", "")) for part in content)
    if content is not None and not isinstance(content, str):
        raise ValueError(f"message {i} has content of type {type(content).__name__}: expected text")
    return {**message, "content": content or ""}


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
