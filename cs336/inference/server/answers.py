"""OpenAI's answers, whole and in pieces, from what the engine says."""

import itertools
import time
from collections.abc import Sequence
from typing import Any

from cs336.inference.answer import Reader, read_answer
from cs336.inference.answer_events import call_of
from cs336.inference.engine import Request, Sample
from cs336.inference.outputs import Token
from cs336.inference.server.protocol import ChatRequest, CompletionRequest

Json = dict[str, Any]


class Answers:
    """Of one model. tokenizer: for the texts of single tokens."""

    def __init__(self, name: str, tokenizer):
        self.name, self._tokenizer = name, tokenizer

    def envelope(self, id: str, object: str, choices: list[Json], **more: Any) -> Json:
        head = {"id": id, "object": object, "created": int(time.time()), "model": self.name, "choices": choices}
        return head | more

    def token_text(self, id: int) -> str:
        """Of one token; of one that is no text by itself, its bytes, as OpenAI writes them."""
        raw = self.token_bytes(id)
        try:
            return raw.decode() if raw else f"<{id}>"
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def token_bytes(self, id: int) -> bytes:
        """None of an id that the tokenizer does not have, though the model does."""
        try:
            return self._tokenizer.token_bytes(id)
        except ValueError:
            return b""

    # ---- /v1/completions ----

    def completion(self, asked: CompletionRequest, requests: Sequence[Request], prompts: Sequence[str]) -> list[Json]:
        """The choices of requests that have finished, with their prompts' texts."""
        choices: list[Json] = []
        for request, prompt in zip(requests, prompts, strict=True):
            for sample in request.samples:
                text, tokens, reason = "".join(sample.pieces), [*sample.tokens], sample.finish_reason
                if sample.end is not None:
                    tokens.append(sample.end)
                if asked.max_tokens == 0:
                    text, tokens, reason = "", [], "length"
                logprobs = None
                if asked.logprobs is not None:
                    logprobs = self.completion_logprobs(self.echoed(asked, request) + tokens)
                shown = prompt + text if asked.echo else text
                choices.append(choice(len(choices), reason, text=shown, logprobs=logprobs))
        return choices

    def echoed(self, asked: CompletionRequest, request: Request) -> list[Token]:
        """The prompt's tokens, where they are to be told; of the first nothing is known."""
        if not asked.echo:
            return []
        first = Token(request.prompt_token_ids[0], float("nan"))
        return [first, *(token for token in request.prompt_logprobs or [] if token is not None)]

    def completion_logprobs(self, tokens: Sequence[Token], offset: int = 0) -> Json:
        texts = [self.token_text(token.id) for token in tokens]
        ends = itertools.accumulate(map(len, texts), initial=offset)
        known = [token.logprob == token.logprob for token in tokens]
        return {
            "tokens": texts,
            "token_logprobs": [least(token.logprob) if k else None for token, k in zip(tokens, known, strict=True)],
            "top_logprobs": [self._top(token) if k else None for token, k in zip(tokens, known, strict=True)],
            "text_offset": [begin for begin, _ in zip(ends, texts, strict=False)],
        }

    def _top(self, token: Token) -> dict[str, float]:
        found = {self.token_text(id): least(logprob) for id, logprob in token.top}
        return found | {self.token_text(token.id): least(token.logprob)}

    # ---- /v1/chat/completions ----

    def chat(self, asked: ChatRequest, request: Request, readers: Sequence[Reader]) -> list[Json]:
        """The choices of a request that has finished, with new readers of them."""
        choices = []
        for sample, reader in zip(request.samples, readers, strict=True):
            message, reason = read_answer("".join(sample.pieces), sample.finish_reason or "cancelled", reader)
            logprobs = self.chat_logprobs(sample.tokens) if asked.logprobs else None
            choices.append(choice(sample.index, reason, message=message, logprobs=logprobs))
        return choices

    def chat_logprobs(self, tokens: Sequence[Token]) -> Json:
        def entry(id: int, logprob: float) -> Json:
            return {
                "token": self.token_text(id),
                "logprob": least(logprob),
                "bytes": list(self.token_bytes(id)),
            }

        return {
            "content": [
                entry(t.id, t.logprob) | {"top_logprobs": [entry(id, logprob) for id, logprob in t.top]} for t in tokens
            ]
        }


def deltas(reader: Reader, text: str, finish_reason: str | None) -> tuple[list[Json], str | None]:
    """What a text adds to a streamed answer, and why the answer ends, if it does. A call that went wrong after it was
    announced stays as it is."""
    events = reader.push(text)
    if finish_reason is not None:
        events += reader.close(cut=finish_reason == "length")
        finish_reason = reader.finish_reason(finish_reason)
    found: list[Json] = []
    for event in events:
        match event.kind:
            case "content":
                found.append({"content": event.text})
            case "reasoning":
                found.append({"reasoning_content": event.text})
            case "call":
                found.append({"tool_calls": [{"index": event.number} | call_of(event)]})
            case "arguments":
                found.append({"tool_calls": [{"index": event.number, "function": {"arguments": event.text}}]})
    return found, finish_reason


def least(logprob: float) -> float:
    """JSON has no -inf: OpenAI writes this for what cannot be."""
    return max(logprob, -9999.0)


def choice(index: int, finish_reason: str | None, **more: Any) -> Json:
    return {"index": index, "finish_reason": finish_reason} | more


def usage(requests: Sequence[Request], *, echo_alone: bool = False) -> Json:
    """echo_alone: no token was asked for, and the one that was drawn is not counted."""
    prompt = sum(len(request.prompt_token_ids) for request in requests)
    samples: list[Sample] = [sample for request in requests for sample in request.samples]
    completion = 0 if echo_alone else sum(len(s.tokens) + (s.end is not None) for s in samples)
    cached = sum(request.samples[0].cached for request in requests)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def error(message: str, kind: str = "invalid_request_error", code: str | None = None, param: str | None = None) -> Json:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
