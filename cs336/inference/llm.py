"""A model with its engine, for programs: prompts in, texts out.

llm = LLM("runs/mine")
outputs = llm.generate(["how do ", "def "], SamplingParams(temperature=0.7, max_tokens=64))
print(outputs[0].text)
"""

import contextlib
import dataclasses
import os
import pathlib
import sys
from collections.abc import Generator, Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cs336.inference import ranks
from cs336.inference.answer import Reader, new_reader, read_answer
from cs336.inference.answer_grammar import constrained
from cs336.inference.beams import Beam, BeamParams, beam_search_ids
from cs336.inference.chat import ChatTemplate
from cs336.inference.engine import Engine, EngineConfig, Request
from cs336.inference.load import find_model, load_model, load_tokenizer, weight_dtype
from cs336.inference.outputs import CompletionOutput, RequestOutput, Token, warn_if_cut
from cs336.inference.reasoning import REASONING, Place, ReasoningFormat
from cs336.inference.sampling import SamplingParams
from cs336.inference.tool_formats import FORMATS, ToolFormat
from cs336.inference.tools import Tools
from cs336.inference.vocabulary import begins_text, check_same_tokens, encode_prompts, unused_ids
from cs336.models import Transformer
from cs336.parallel.launch import connect, rank
from cs336.tokenizer import convert

Prompt = str | Sequence[int]


class LLM:
    """Args:
        model: an export, a checkpoint or a run directory, of which the newest is taken; or a Transformer, whose tensors
            are used as they are.
        tokenizer: of the model, or a file of it; what lies beside a model that is read, if None. A Transformer without
            one takes and gives ids alone.
        draft: a smaller model of the same tokenizer, given as `model` is, which drafts what the model then verifies:
            texts stay what they are.
        device, dtype: of a model that is read: "auto" is a GPU if there is one; torch's dtype or its name, that of the
            files if None or "auto".
        tensor_parallel: divide a model that is read among the processes that torchrun started, if it did; each makes an
            LLM, and all are asked the same, in the same order.
        tool_parser: how the model writes calls of tools, one of tool_formats.FORMATS; as its chat template shows if
            None.
        reasoning_parser: how it writes what it thinks before it answers, one of reasoning.REASONING; "none": that is
            text as any; as its chat template shows if None.
        quiet: do not print on stderr what the memory is for.
        options: of EngineConfig, max_seqs, max_len, num_pages and more.

    Raises FileNotFoundError where there is no model, ValueError where it does not fit the memory, and for a tokenizer
    that is not the model's.
    """

    def __init__(
        self,
        model: str | os.PathLike | Transformer,
        tokenizer: Any = None,
        *,
        device: str = "auto",
        dtype: torch.dtype | str | None = None,
        draft: str | os.PathLike | Transformer | None = None,
        tensor_parallel: bool = False,
        tool_parser: str | None = None,
        reasoning_parser: str | None = None,
        quiet: bool = False,
        **options: Any,
    ):
        self.chat_template, self.name = ChatTemplate(), "cs336"
        dtype = weight_dtype(dtype)
        if tool_parser not in (None, *FORMATS):
            raise ValueError(f"tool_parser must be one of {', '.join(FORMATS)}, got {tool_parser!r:.80}")
        if reasoning_parser not in (None, "none", *REASONING):
            known = ", ".join([*REASONING, "none"])
            raise ValueError(f"reasoning_parser must be one of {known}, got {reasoning_parser!r:.80}")
        self._tool_parser, self._reasoning_parser = tool_parser, reasoning_parser
        if isinstance(tokenizer, str | os.PathLike):
            tokenizer = convert.load(tokenizer)
        if not isinstance(model, Transformer):
            if tensor_parallel:
                connect(device)
                quiet = quiet or rank() > 0
            found = find_model(model)
            if draft is not None and not isinstance(draft, Transformer):
                draft = find_model(draft)  # before the model is read, not after it
            self.name = pathlib.Path(model).resolve().name
            if not quiet:
                print(f"reading {found}", file=sys.stderr)
            tokenizer = load_tokenizer(found) if tokenizer is None else tokenizer
            read = ranks.load_part if tensor_parallel else load_model
            model = read(found, device, dtype, options.get("max_len"))
            self.chat_template = ChatTemplate.find(found)
        if self.chat_template.is_default and model.chat_template is not None:  # of a GGUF file, or of the caller
            self.chat_template = _template_of(model, tokenizer)
        self.tokenizer = tokenizer
        if draft is not None and not isinstance(draft, Transformer):
            draft = _load_draft(find_model(draft), tokenizer, model, options.get("max_len"))
        self.engine = Engine(model.eval(), tokenizer, EngineConfig(**options), draft=draft)
        if not quiet:
            print(f"memory: {self.engine.memory}", file=sys.stderr)
            if self.engine.warm_up.steps:
                print(f"warmed up: {self.engine.warm_up}", file=sys.stderr)

    @property
    def model(self) -> Transformer:
        return self.engine.model

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Continue each prompt, a text or a list of ids: an output a prompt, in their order.

        prompts: or a tensor of ids, (S,) or (B, S).
        params: for all of them, or of each. Special tokens written in a prompt are taken as such.
        Raises ValueError for prompts that are empty or leave no room, and where a model's logits are not finite.
        """
        encoded = self._encode(prompts)
        each = [params or SamplingParams()] * len(encoded) if not isinstance(params, Sequence) else list(params)
        if len(each) != len(encoded):
            raise ValueError(f"there are {len(encoded)} prompts and {len(each)} params: give one, or one a prompt")
        if wrong := [p for p in each if not isinstance(p, SamplingParams)]:
            raise ValueError(f"params must be SamplingParams, got {wrong[0]!r:.80}: write SamplingParams(...)")
        return self._run([(ids, p, text, 1) for (text, ids), p in zip(encoded, each, strict=True)])

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Generator[str]:
        """Continue one prompt, piece by piece: joined, they are generate's text. Closing it early ends the request.

        Warns where the context ends before max_tokens. Raises what generate does.
        """
        if self.tokenizer is None:
            raise ValueError("to stream text takes a tokenizer: give LLM one")
        params = params or SamplingParams()
        if params.n != 1:
            raise ValueError(f"a stream is of one continuation, got n = {params.n}")
        ((text, ids),) = self._encode([prompt])
        request = self.engine.add(ids, params, text)
        pieces, seen = request.samples[0].pieces, 0
        try:
            while not request.finished:
                self.engine.step()
                while seen < len(pieces):
                    seen += 1
                    yield pieces[seen - 1]
            (ended,) = request.output().outputs
            if ended.finish_reason == "length":
                warn_if_cut(len(ended.token_ids), params.max_tokens, self.engine.max_len)
        finally:
            self.engine.cancel(request)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] = "auto",
        parallel_tool_calls: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer a conversation, or several: lists of {"role": ..., "content": ...}, written by the chat template.

        tools, tool_choice, parallel_tool_calls: OpenAI's. `text` is what the model wrote, `message` has its calls, and
            apart from its answer what it thought.
        chat_template_kwargs: what else the template may know, {"enable_thinking": False} and the like.
        Raises ValueError where the chat template has no place for tools, or does not show how calls are written.
        """
        asked = Tools(tools, tool_choice, parallel_tool_calls)
        several = [messages] if messages and isinstance(messages[0], Mapping) else messages
        given = [params or SamplingParams()] * len(several) if not isinstance(params, Sequence) else params
        ending = [dataclasses.replace(p, stop=(*p.stop, *self.chat_template.stop)) for p in given]
        prompts = [
            self.chat_template.render(m, tools=asked.offered, extra=chat_template_kwargs)  # type: ignore[arg-type]
            for m in several
        ]
        outputs = self.generate(prompts, [self.calling(p, asked, t) for p, t in zip(ending, prompts, strict=True)])
        return [
            dataclasses.replace(output, outputs=[self._read(one, asked, prompt) for one in output.outputs])
            for output, prompt in zip(outputs, prompts, strict=True)
        ]

    def calling(self, params: SamplingParams, tools: Tools, prompt: str) -> SamplingParams:
        """For an answer that may call tools, by the grammar of answer_grammar.constrained.

        Raises ValueError where that does, and where it is not known how the model writes calls.
        """
        format = self._tool_format if tools.offered else None
        specials = {} if self.tokenizer is None else self.tokenizer.special_tokens
        return constrained(params, tools, format, *self._reasoning(prompt), specials)

    def reader(self, tools: Tools, prompt: str) -> Reader:
        """For one answer to this prompt."""
        return new_reader(tools, self._tool_format if tools.offered else None, *self._reasoning(prompt))

    def _reasoning(self, prompt: str) -> tuple[ReasoningFormat | None, Place]:
        """How the model writes it, and where the answer to a prompt begins."""
        named = self._reasoning_parser
        found = self.chat_template.reasoning_format if named is None else REASONING.get(named)
        return found, "behind" if found is None else found.place(prompt)

    @property
    def _tool_format(self) -> ToolFormat:
        found = FORMATS[self._tool_parser] if self._tool_parser else self.chat_template.tool_format
        if found is None:
            raise ValueError(
                "this model's chat template does not show how calls of tools are written: give tool_parser "
                f"(--tool-parser), one of {', '.join(FORMATS)}"
            )
        return found

    def _read(self, output: CompletionOutput, tools: Tools, prompt: str) -> CompletionOutput:
        message, reason = read_answer(output.text, output.finish_reason, self.reader(tools, prompt))
        return dataclasses.replace(output, message=message, finish_reason=reason)

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        beam_width: int = 4,
        max_tokens: int = 128,
        *,
        length_penalty: float = 1.0,
        early_stopping: bool = False,
    ) -> list[RequestOutput]:
        """The beam_width best continuations of each prompt that a search finds, the best first: by the loop of
        beams.py, with a state of its own beside the engine's pages.

        Raises what generate does, ValueError for values out of range, and for a model that is divided among ranks.
        """
        if ranks.is_divided(self.model):
            raise ValueError("beam search is a loop in one process: give a model that is not divided among ranks")
        encoded = self._encode(prompts)
        params = BeamParams(beam_width, max_tokens, length_penalty, early_stopping)
        unused = () if self.tokenizer is None else unused_ids(self.model, self.tokenizer)
        found = beam_search_ids(self.model, [ids for _, ids in encoded], params, self.engine.ends, unused)
        return [
            RequestOutput(text, list(ids), [self._beam_output(i, beam, ids) for i, beam in enumerate(beams)])
            for (text, ids), beams in zip(encoded, found, strict=True)
        ]

    def _beam_output(self, index: int, beam: Beam, prompt_ids: Sequence[int]) -> CompletionOutput:
        text = ""
        if self.tokenizer is not None:
            text = self.tokenizer.decode(beam.token_ids, at_start=begins_text(self.tokenizer, prompt_ids))
        reason = "stop" if beam.ended else "length"
        return CompletionOutput(index, text, beam.token_ids, reason, None, score=beam.score)

    def score(self, prompts: Sequence[Prompt], continuations: Sequence[Prompt], top: int = 0) -> list[list[Token]]:
        """How likely each continuation is after its prompt: a Token for each of its tokens. What prompts have in common
        is computed once.

        top: how many of the likeliest tokens to tell in the place of each.
        Raises ValueError for another number of continuations, and for prompts and continuations without tokens.
        """
        if len(prompts) != len(continuations):
            raise ValueError(
                f"there are {len(prompts)} prompts and {len(continuations)} continuations: give one of each"
            )
        if not all(len(continuation) for continuation in continuations):
            raise ValueError("there is an empty continuation, which has no tokens to score")
        heads = self._encode(prompts)
        pairs = list(zip(heads, self._encode(continuations, behind=[ids for _, ids in heads]), strict=True))
        if not all(len(ids) for (_, ids), _ in pairs):
            raise ValueError("there is an empty prompt: what stands before a continuation says how likely it is")
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=top)
        outputs = self._run([([*a, *b], params, None, len(a)) for (_, a), (_, b) in pairs])
        found = [output.prompt_logprobs or [] for output in outputs]
        return [[t for t in row[len(a) :] if t] for row, ((_, a), _) in zip(found, pairs, strict=True)]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of prompts: special tokens written in one are taken as such, an empty one begins a document."""
        return encode_prompts(self.model, self.tokenizer, texts) if texts else []

    def decode(self, ids: Sequence[int]) -> str:
        """Raises ValueError for an id that the tokenizer does not have."""
        return self.tokenizer.decode(ids)

    def update_weights(self, weights: Transformer | Mapping[str, Tensor]) -> None:
        """Go on with other weights, without a restart: see Engine.update_weights."""
        self.engine.update_weights(weights)

    def _run(self, requests: Sequence[tuple[Sequence[int], SamplingParams, str | None, int]]) -> list[RequestOutput]:
        added: list[Request] = []
        try:
            for ids, params, text, score_from in requests:
                added.append(self.engine.add(ids, params, text, score_from=score_from))
            while not all(request.finished for request in added):
                self.engine.step()
            return [request.output() for request in added]
        finally:
            for request in added:
                self.engine.cancel(request)

    def _encode(
        self, prompts: Prompt | Sequence[Prompt], behind: Sequence[Sequence[int]] | None = None
    ) -> list[tuple[str | None, Sequence[int]]]:
        """(text if it was one, ids) of each. behind: the ids that each goes on, if it does."""
        if isinstance(prompts, Tensor | np.ndarray):
            if not prompts.ndim:
                raise ValueError("a prompt is a list of ids, got one number")
            prompts = prompts.tolist()
        if isinstance(prompts, bytes | bytearray | Mapping) or not isinstance(prompts, Iterable):
            raise ValueError(f"a prompt is a text or a list of token ids, got {prompts!r:.80}")
        listed: list[Any] = [prompts] if isinstance(prompts, str) else list(prompts)
        if listed and isinstance(listed[0], Integral):
            listed = [listed]
        listed = [p.tolist() if isinstance(p, Tensor | np.ndarray) else p for p in listed]
        for prompt in listed:
            if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray):
                raise ValueError(f"a prompt is a text or a list of token ids, got {prompt!r:.80}")
        texts = [prompt for prompt in listed if isinstance(prompt, str)]
        if texts and self.tokenizer is None:
            raise ValueError("prompts of text need a tokenizer: give LLM one, or lists of ids")
        if behind is not None:
            tails = zip(listed, behind, strict=True)
            return [
                (p, self.tokenizer.encode(p, "all", behind=ids)) if isinstance(p, str) else (None, list(p))
                for p, ids in tails
            ]
        ids = iter(self.encode(texts))
        return [(p, next(ids)) if isinstance(p, str) else (None, list(p)) for p in listed]


def _load_draft(path: pathlib.Path, tokenizer, model: Transformer, max_len: int | None) -> Transformer:
    """In the model's dtype, where it is; its tokenizer, if it has one, must be the model's."""
    if tokenizer is not None:
        with contextlib.suppress(FileNotFoundError):
            check_same_tokens(tokenizer, load_tokenizer(path), str(path))
    return load_model(path, str(model.device), model.embedding.weight.dtype, max_len)


def _template_of(model: Transformer, tokenizer) -> ChatTemplate:
    """The template that a model was read with, with the texts of its special ids."""
    texts = {} if tokenizer is None else {i: text for text, i in tokenizer.special_tokens.items()}
    first = {name: i[0] if isinstance(i, list) and i else i for name, i in model.special_ids.items()}
    named = {name.removesuffix("_id"): texts[i] for name, i in first.items() if isinstance(i, int) and i in texts}
    return ChatTemplate(model.chat_template, named)
