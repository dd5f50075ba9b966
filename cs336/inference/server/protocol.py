"""OpenAI's requests, as far as they are understood. What else a client sends is refused by name, but for what does not
change an answer."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cs336.inference.sampling import MAX_LOGPROBS, SamplingParams

MOST_PROMPTS = 1024  # of one request
MOST_SAMPLES = 128
ANY_OBJECT = {"type": "object"}
MOST_STOPS = 256  # strings, each of which is looked for in every token's text

TokenId = Annotated[int, Field(ge=0)]
TokenIds = list[TokenId]
PASSED_OVER = {"user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key"}
PASSED_OVER |= {"prompt_cache_retention", "function_call"}


class StreamOptions(BaseModel):
    include_usage: bool = False


class SchemaFormat(BaseModel):
    """With a name and `strict`, which change nothing."""

    model_config = ConfigDict(protected_namespaces=())
    json_schema: dict[str, Any] = Field(alias="schema")


class ResponseFormat(BaseModel):
    """OpenAI's."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaFormat | None = None

    @property
    def grammar(self) -> dict[str, Any]:
        """What it is in SamplingParams. Raises ValueError where the schema is missing."""
        if self.type == "json_schema":
            if self.json_schema is None:
                raise ValueError('response_format of type json_schema takes {"json_schema": {"schema": ...}}')
            return {"json_schema": self.json_schema.json_schema}
        return {"json_schema": ANY_OBJECT} if self.type == "json_object" else {}


class StructuredOutputs(BaseModel):
    """vLLM's."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())
    json_schema: dict[str, Any] | str | None = Field(None, alias="json")
    json_object: bool = False
    regex: str | None = None
    choice: list[str] | None = None

    @property
    def grammar(self) -> dict[str, Any]:
        """What it is in SamplingParams. Raises ValueError for several, and for none."""
        found = {"json_schema": self.json_schema, "regex": self.regex, "choice": self.choice}
        if self.json_object:
            if self.json_schema is not None:
                raise ValueError("structured_outputs has json and json_object: give one of them")
            found["json_schema"] = ANY_OBJECT
        if self.choice == []:
            raise ValueError("structured_outputs.choice is an empty list: give it texts")
        given = {name: value for name, value in found.items() if value is not None}
        if not given:
            raise ValueError("structured_outputs takes one of json, json_object, regex and choice, got none")
        return given


class Generation(BaseModel):
    """What both kinds of requests have."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())
    model: str | None = None
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    n: int = Field(1, ge=1, le=MOST_SAMPLES)
    seed: int | None = None
    stop: str | Annotated[list[str], Field(max_length=MOST_STOPS)] | None = None
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: dict[TokenId, float] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    # not OpenAI's
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    stop_token_ids: TokenIds = []
    ignore_eos: bool = False
    structured_outputs: StructuredOutputs | None = None

    @model_validator(mode="before")
    @classmethod
    def _normalised(cls, given: Any) -> Any:
        """What OpenAI's client writes beside the others, other clients send as it is. A null is as if left out, but for
        max_tokens: then there is no limit."""
        if not isinstance(given, dict):
            return given
        if isinstance(extra := given.get("extra_body"), dict):
            given = {name: value for name, value in given.items() if name != "extra_body"} | extra
        return {name: value for name, value in given.items() if value is not None or name == "max_tokens"}

    def sampling(self, max_tokens: int, **more: Any) -> SamplingParams:
        """Raises ValueError for values out of range."""
        return SamplingParams(
            temperature=self.temperature,
            top_k=self.top_k if self.top_k is not None and self.top_k > 0 else None,
            top_p=self.top_p,
            min_p=self.min_p,
            max_tokens=max_tokens,
            seed=None if self.seed is None else self.seed % 2**63,
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            min_tokens=self.min_tokens,
            n=self.n,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=self.logit_bias or {},
            **self.grammar,
            **more,
        )

    @property
    def grammar(self) -> dict[str, Any]:
        """What the text must be, in SamplingParams."""
        given = [field.grammar for field in (self.response_format, self.structured_outputs) if field is not None]
        found = [grammar for grammar in given if grammar]
        if len(found) > 1:
            raise ValueError("response_format and structured_outputs both say what the text must be: give one of them")
        return found[0] if found else {}

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def refuse(self, **usual: Any) -> None:
        """Raises ValueError for a field that nobody knows, or of these has another value than None or the usual one."""
        given = self.model_extra or {}
        if unknown := sorted(given.keys() - usual.keys() - PASSED_OVER):
            raise ValueError(f"Unrecognized request argument supplied: {', '.join(unknown)}")
        for name, value in usual.items():
            if given.get(name) not in (None, value):
                raise ValueError(f"{name} is not supported: leave it out")


class CompletionRequest(Generation):
    prompt: str | list[str] | TokenIds | list[TokenIds] = ""
    max_tokens: int | None = Field(16, ge=0)
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @property
    def prompts(self) -> list[str | TokenIds]:
        """Raises ValueError for none, and for too many."""
        prompt: Any = self.prompt
        several = not isinstance(prompt, str) and not (prompt and isinstance(prompt[0], int))
        prompts = list(prompt) if several else [prompt]
        if not 1 <= len(prompts) <= MOST_PROMPTS:
            raise ValueError(f"prompt must be 1 to {MOST_PROMPTS} prompts, got {len(prompts)}")
        return prompts

    def params(self, room: int) -> SamplingParams:
        """For a prompt after which there is room for so many tokens."""
        self.refuse(best_of=self.n, suffix="")
        wanted = self.max_tokens if "max_tokens" in self.model_fields_set else min(16, max(1, room))
        max_tokens = max(1, room if wanted is None else _within(room, wanted))
        prompt_logprobs = self.logprobs if self.echo else None
        more = {"stop": self.stops, "logprobs": self.logprobs, "prompt_logprobs": prompt_logprobs}
        return self.sampling(max_tokens, **more)


class ChatRequest(Generation):
    messages: list[dict[str, Any]]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    chat_template_kwargs: dict[str, Any] = {}
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    tools: list[dict[str, Any]] = []
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True

    def params(self, room: int, stop: tuple[str, ...]) -> SamplingParams:
        """For a prompt after which there is room for so many tokens. stop: the template's."""
        self.refuse(functions=[], audio=None, modalities=["text"])
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs takes logprobs = true")
        max_tokens = _within(room, self.max_completion_tokens or self.max_tokens or max(1, room))
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self.sampling(max_tokens, stop=(*self.stops, *stop), logprobs=logprobs)


def _within(room: int, max_tokens: int) -> int:
    """Raises ValueError where so many tokens do not fit behind a prompt; one without room is refused by the engine."""
    if max_tokens > room > 0:
        raise ValueError(
            f"max_tokens is {max_tokens}, and the model's context length leaves {room} behind the prompt: "
            "lower it, or leave it out"
        )
    return max_tokens


class TokenizeRequest(BaseModel):
    model_config = ConfigDict(protected_namespaces=())
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    model: str | None = None


class DetokenizeRequest(BaseModel):
    model_config = ConfigDict(protected_namespaces=())
    tokens: TokenIds
    model: str | None = None
