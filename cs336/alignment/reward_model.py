"""A model whose head says what a text is worth: the reward model, and PPO's critic. B = rows, S = tokens."""

import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cs336.models import Transformer, from_pretrained, save_pretrained
from cs336.tokenizer import Tokenizer
from cs336.utils.files import replacing
from cs336.utils.tensor_file import save_tensors

HEAD = "reward_head.safetensors"


class RewardModel(nn.Module):
    """A Transformer with a head of one number for each token, which begins as 0."""

    def __init__(self, model: Transformer):
        super().__init__()
        self.model = model
        self.head = nn.Linear(model.config.d_model, 1, device=model.device, dtype=torch.float32)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, token_ids_BS: Tensor) -> Tensor:
        """(B, S) float32: at each token, the worth of the text up to it. What follows a token does not change it."""
        features_BSM = self.model.features(token_ids_BS)
        with torch.autocast(features_BSM.device.type, enabled=False):  # bfloat16 would leave a score 8 bits
            return self.head(features_BSM.float())[..., 0]

    def score(self, token_ids_BS: Tensor, lengths_B: Tensor) -> Tensor:
        """(B,) float32: of rows padded on the right, at their last token. lengths_B: (B,) int64 of 1..S."""
        return self(token_ids_BS).gather(1, lengths_B[:, None] - 1)[:, 0]


def save_reward_model(
    model: RewardModel, backbone: Transformer, directory: pathlib.Path, tokenizer: Tokenizer | None, step: int
) -> None:
    """The backbone in the Hugging Face layout, which every verb takes, and the head beside it."""
    save_pretrained(backbone, directory, tokenizer=tokenizer, step=step)
    with replacing(directory / HEAD, "wb") as file:
        save_tensors({name: tensor.contiguous() for name, tensor in model.head.state_dict().items()}, file.name)


def load_reward_model(directory: str | os.PathLike, device: torch.device | str = "cpu") -> RewardModel:
    """What save_reward_model wrote, in eval mode.

    Raises FileNotFoundError where there is no head, and what from_pretrained does.
    """
    directory = pathlib.Path(directory)
    if not (directory / HEAD).exists():
        raise FileNotFoundError(f"{directory} holds no reward model: it has no {HEAD}")
    model = RewardModel(from_pretrained(directory, device, torch.float32))
    model.head.load_state_dict(load_file(directory / HEAD, device=str(device)))
    return model.eval()


class Bin(NamedTuple):
    """Of what was said to be about equally likely."""

    said: float
    """Mean probability."""
    came_true: float
    """How often it came true."""
    size: int


def calibration_curve(probabilities: Sequence[float], outcomes: Sequence[bool], bins: int = 10) -> list[Bin]:
    """How often came true what was said to be so likely, in bins of equal width; empty ones are left out.

    Raises ValueError for other than one outcome a probability, and for probabilities outside 0..1.
    """
    if len(probabilities) != len(outcomes) or not len(probabilities):
        raise ValueError(f"there are {len(probabilities)} probabilities and {len(outcomes)} outcomes: give one of each")
    if bins < 1:
        raise ValueError(f"bins must be 1 or more, got {bins}")
    p, came = torch.tensor(list(probabilities), dtype=torch.float64), torch.tensor(list(outcomes)).double()
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError("probabilities must be in 0..1")
    bin_N = (p * bins).long().clamp(max=bins - 1)
    inside = [bin_N == i for i in range(bins)]
    return [Bin(float(p[at].mean()), float(came[at].mean()), int(at.sum())) for at in inside if at.any()]


def calibration_error(probabilities: Sequence[float], outcomes: Sequence[bool], bins: int = 10) -> float:
    """Expected calibration error (arXiv:1706.04599): how far, on average over calibration_curve's bins, what is said to
    be likely is from how often it came true. Raises what that does.
    """
    curve = calibration_curve(probabilities, outcomes, bins)
    return sum(b.size * abs(b.came_true - b.said) for b in curve) / len(probabilities)
