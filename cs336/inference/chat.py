"""Conversations as text, by the Jinja template that a model was trained with, run in Hugging Face's way: in a sandbox.

A template comes with the model (chat_template.jinja, or chat_template in tokenizer_config.json). It is code of others:
it sees the messages and special tokens alone, changes nothing, and fails with ValueError. Without one, a conversation
is written as ChatML is.
"""

import datetime
import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from cs336.inference.reasoning import ReasoningFormat, reasoning_of
from cs336.inference.template_sandbox import Sandbox, to_json
from cs336.inference.tool_formats import ToolFormat, format_of
from cs336.models.huggingface.fields import read_json
from cs336.utils.files import read_text

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_STOP = ("<|im_end|>",)


class ChatTemplate:
    """template: Jinja. special_tokens: texts by their names, bos_token and the like. with_tools: the template of
    conversations with tools, where that is another.

    Raises ValueError for a template that is none.
    """

    def __init__(
        self,
        template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
        with_tools: str | None = None,
    ):
        self.is_default = template is None
        self._special_tokens = dict(special_tokens or {})
        environment = self._environment = Sandbox()
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda how: datetime.datetime.now().strftime(how)
        self._source = CHATML if template is None else template
        self._source_with_tools = with_tools or self._source
        try:
            self._template = environment.from_string(self._source)
            self._with_tools = environment.from_string(self._source_with_tools)
            names = [*environment.parse(self._source_with_tools).find_all(jinja2.nodes.Name)]
        except (jinja2.TemplateError, SyntaxError, RecursionError, MemoryError) as error:
            raise ValueError(f"the chat template is not Jinja: {error or 'it nests too deep'}") from None
        self._names = {node.name for node in names if node.ctx == "load"}
        self._tools_name = next((name for name in ("tools", "xml_tools") if name in self._names), None)  # SmolLM3's
        self.takes_tools = self._tools_name is not None

    @property
    def stop(self) -> tuple[str, ...]:
        """What ends an answer where the model does not know it as an end."""
        return CHATML_STOP if self.is_default else ()

    @functools.cached_property
    def tool_format(self) -> ToolFormat | None:
        """How the model writes calls of tools, where the template shows it."""
        return format_of(self._source_with_tools)

    @functools.cached_property
    def reasoning_format(self) -> ReasoningFormat | None:
        """How the model writes what it thinks before it answers, where the template shows it."""
        return reasoning_of(self._source_with_tools)

    def of_effort(self, effort: str) -> dict[str, Any]:
        """What the template may know of OpenAI's `reasoning_effort`. Raises ValueError where it takes nothing of it."""
        if "reasoning_effort" in self._names:
            return {"reasoning_effort": effort}
        if effort == "none" and "enable_thinking" in self._names:
            return {"enable_thinking": False}
        raise ValueError(f"reasoning_effort {effort!r} is nothing that this model's chat template takes: leave it out")

    @classmethod
    def find(cls, directory: pathlib.Path) -> "ChatTemplate":
        """The one of a model's directory: chat_template.jinja, or in tokenizer_config.json; the default without any."""
        config: dict[str, Any] = {}
        if (file := directory / "tokenizer_config.json").exists():
            config = read_json(file)
        template, with_tools = config.get("chat_template"), None
        if isinstance(template, list):  # several, by their names
            named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
            template, with_tools = named.get("default"), named.get("tool_use")
        if (file := directory / "chat_template.jinja").exists():
            template = with_tools = read_text(file)
        if bad := [t for t in (template, with_tools) if not isinstance(t, str | None)]:
            raise ValueError(f"{directory / 'tokenizer_config.json'} has the chat template {bad[0]!r:.80}, no text")
        tokens = {k: v.get("content") if isinstance(v, dict) else v for k, v in config.items() if k.endswith("_token")}
        return cls(template, {name: text for name, text in tokens.items() if isinstance(text, str)}, with_tools)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
        extra: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a conversation, up to where the assistant answers.

        messages: {"role": ..., "content": a text, or a list of {"type": "text", "text": ...}}. An assistant's may have
            tool_calls as OpenAI writes them; those of the role tool have what a call returned, and its tool_call_id.
        tools: that may be called, as OpenAI writes them.
        extra: what else the template may know.
        Raises ValueError for messages of another form, with what the template says of them, and for tools where it has
        no place for them.
        """
        plain = [_plain(i, message) for i, message in enumerate(messages)]
        if not plain:
            raise ValueError("there are no messages: give at least one")
        _check_answers(plain)
        if tools and not self.takes_tools:
            raise ValueError(
                "this model's chat template has no place for tools: leave them out, or take a model whose template has"
            )
        with_calls = any("tool_calls" in message for message in plain)
        if with_calls and "tool_calls" not in self._source_with_tools:
            if self.tool_format is None:
                raise ValueError(
                    "this model's chat template has no place for tool_calls: take a model whose template has"
                )
            plain = [_with_written_calls(message, self.tool_format) for message in plain]
        own = {"messages": plain, "add_generation_prompt": add_generation_prompt}
        if tools and self._tools_name is not None:
            own[self._tools_name] = [dict(tool) for tool in tools]
        nothing = {
            "tools": None,
            "documents": None,
        }  # as in transformers: many templates ask no more than "is not none"
        known = self._special_tokens | nothing | dict(extra or {}) | own
        template = self._with_tools if tools or with_calls else self._template
        try:
            try:
                return self._environment.write(template, known)
            except TypeError:  # DeepSeek's join the text of arguments to others
                if not with_calls:
                    raise
                texts = known | {"messages": [_with_texts(message) for message in plain]}
                return self._environment.write(template, texts)
        except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"the chat template refuses these messages: {error}") from None
        except (RecursionError, MemoryError) as error:
            raise ValueError(f"the chat template takes too much for these messages: {error}") from None


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
    plain = {**message, "content": content or ""}
    if calls := plain.pop("tool_calls", None):
        plain["tool_calls"] = _plain_calls(f"messages.{i}.tool_calls", calls)
    thought = message.get("reasoning_content")
    if not isinstance(thought, str | None):
        raise ValueError(f"messages.{i}.reasoning_content must be a text, got {thought!r:.80}")
    if thought and not (calls and content):  # gpt-oss's name of it, whose template takes one of both beside calls
        plain["thinking"] = thought
    return plain


def _plain_calls(at: str, calls: Any) -> list[dict[str, Any]]:
    """With their arguments as objects, as templates take them; OpenAI's are texts."""
    if not isinstance(calls, list | tuple):
        raise ValueError(f"{at} must be a list, got {calls!r:.80}")
    plain = []
    for i, call in enumerate(calls):
        whole = isinstance(call, Mapping) and isinstance(call.get("function"), Mapping)
        function: Mapping[str, Any] = call["function"] if whole else {}
        if not (isinstance(function.get("name"), str) and isinstance(call.get("id"), str | None)):
            raise ValueError(
                f'{at}.{i} must be {{"id": ..., "type": "function", "function": {{"name": ..., "arguments": ...}}}}, '
                f"got {call!r:.80}"
            )
        arguments = function.get("arguments")
        arguments = {} if arguments in (None, "", "null") else arguments
        try:
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{at}.{i}.function.arguments is not JSON: {error}") from None
        if not isinstance(arguments, Mapping):
            raise ValueError(f"{at}.{i}.function.arguments must be an object, as JSON, got {arguments!r:.80}")
        plain.append({**call, "function": {**function, "arguments": arguments}})
    return plain


def _with_written_calls(message: Mapping[str, Any], format: ToolFormat) -> dict[str, Any]:
    """With calls in its content, as the model wrote them."""
    functions = [call["function"] for call in message.get("tool_calls", ())]
    calls = [(function["name"], function["arguments"]) for function in functions]
    written = message["content"] + (format.write(calls) if calls else "")
    return {name: value for name, value in message.items() if name != "tool_calls"} | {"content": written}


def _with_texts(message: Mapping[str, Any]) -> dict[str, Any]:
    """With arguments of calls as texts of JSON."""
    calls = [
        {**call, "function": {**call["function"], "arguments": to_json(call["function"]["arguments"])}}
        for call in message.get("tool_calls", ())
    ]
    return {**message, "tool_calls": calls} if calls else {**message}


def _check_answers(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError where a message of the role tool is of no call that was there."""
    ids: list[str] = []
    for i, message in enumerate(messages):
        ids += [call["id"] for call in message.get("tool_calls", ()) if call.get("id")]
        answered = message.get("tool_call_id")
        if message["role"] == "tool" and answered not in ids and (ids or answered is not None):
            raise ValueError(
                f"messages.{i}.tool_call_id is {answered!r:.80}, and the calls before it are {', '.join(ids) or 'none'}"
            )


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
