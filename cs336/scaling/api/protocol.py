"""What is asked of the API and what it answers, as JSON. FLOPs, tokens, seconds; losses in nats a token."""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

State = Literal["waiting", "running", "done", "failed", "cancelled"]
Size = Annotated[float, Field(ge=1, le=1e15, allow_inf_nan=False)]
Loss = Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)]
LOWEST_LR, HIGHEST_LR = 1e-9, 1.0  # that may be asked for


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class RunRequest(_Request):
    """A run by its size, or by a configuration of `cs336 train`."""

    parameters: Size | None = None
    tokens: Annotated[float, Field(ge=1, le=1e18, allow_inf_nan=False)] | None = None
    learning_rate: Annotated[float, Field(ge=LOWEST_LR, le=HIGHEST_LR, allow_inf_nan=False)] | None = None
    """Highest. None: the Step Law's, arXiv:2503.04715."""
    batch_tokens: Annotated[float, Field(ge=1, le=1e12, allow_inf_nan=False)] | None = None
    """Tokens a step. None: the Step Law's."""
    seed: int = Field(0, ge=0, lt=2**31)
    config: dict[str, Any] | None = None
    """In place of all others: model, budget, optimizer, ..."""

    @field_validator("config")
    @classmethod
    def _is_text(cls, config: dict[str, Any] | None) -> dict[str, Any] | None:
        try:
            json.dumps(config, allow_nan=False, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            raise ValueError(f"must be JSON of finite numbers and of Unicode text: {error}") from None
        return config

    @model_validator(mode="after")
    def _one_form(self) -> "RunRequest":
        sizes = {name for name in self.model_fields_set - {"config"} if getattr(self, name) is not None}
        if self.config is not None and sizes:
            raise ValueError(f"config says everything: leave out {', '.join(sorted(sizes))}")
        if self.config is None and not {"parameters", "tokens"} <= sizes:
            raise ValueError("say parameters and tokens, or config")
        if self.batch_tokens is not None and self.tokens is not None and self.batch_tokens > self.tokens:
            raise ValueError(f"batch_tokens must be no more than tokens, {self.tokens:g}, got {self.batch_tokens:g}")
        return self


class RunInfo(BaseModel):
    """A run of the user who asks."""

    id: str
    state: State
    parameters: float
    tokens: float | None
    flops: float | None
    learning_rate: float
    batch_tokens: float
    seed: int
    reserved: float
    """Of the account, in its unit."""
    charged: float | None
    """Once it has ended; the rest of what was reserved is back in the account."""
    done: float
    """The part that is done, 0 to 1."""
    loss: float | None
    """Of a run that is done its result; before that the newest."""
    error: str | None
    attempts: int
    submitted: float
    """Seconds since 1970, as the next two."""
    started: float | None
    ended: float | None


class RunDetails(RunInfo):
    curve: list[tuple[float, float]]
    """Tokens and training loss, along the run."""
    config: dict[str, Any] | None


class Account(BaseModel):
    """granted = reserved + charged + left."""

    user: str
    unit: Literal["flops", "seconds"]
    granted: float
    reserved: float
    """By runs that wait or go on."""
    charged: float
    """For runs that have ended."""
    left: float


class Prediction(_Request):
    """A user's final submission: the best run that the target's FLOPs buy."""

    loss: Loss
    parameters: Size
    tokens: Annotated[float, Field(ge=1, le=1e18, allow_inf_nan=False)]
    final: bool = False
    """It is not replaced any more."""


class Submission(Prediction):
    user: str
    at: float
    """Seconds since 1970."""


class Score(BaseModel):
    """A row of the leaderboard: what was predicted is shown once the true run is revealed."""

    user: str
    final: bool
    loss: float | None = None
    parameters: float | None = None
    error: float | None = None
    """|predicted loss / true loss - 1|, by which the board is ordered."""
    size_ratio: float | None = None
    """Predicted parameters / the true optimum's, where that is known."""


class Leaderboard(BaseModel):
    target_flops: float | None
    deadline: str | None
    true_loss: float | None
    true_parameters: float | None
    rows: list[Score]


class ErrorBody(BaseModel):
    message: str
    field: str | None = None
    """Of the request, that is to blame."""
    run: str | None = None
    """The run that is there already."""
    left: float | None = None
    """In the account."""


class Problem(BaseModel):
    error: ErrorBody
