"""A student learns what its teacher expects, from the likeliest tokens that the teacher named once.

    forward    sum_k p_k (log p_k - log q_k)      p of the teacher, q of the student (arXiv:1503.02531)
    reverse    sum_k q_k (log q_k - log p_k)      which does not spread over all that p allows (arXiv:2306.08543)

Both are over the K tokens that were kept and over all others as one: the divergence of what p and q say of these K + 1
events, which is at most that of p and q, and the same where K is the whole vocabulary.
B = batch, S = tokens, K = tokens kept, N = windows.
"""

import hashlib
import json
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from cs336 import ops
from cs336.models import Transformer
from cs336.training.objectives import Batch, Terms, with_routing
from cs336.utils.files import replacing, write_json

Divergence = Literal["forward", "reverse"]
INDEX = "index.json"
CHUNK = 16  # windows of a file
LEAST = 1e-7  # probability of all other tokens: below it float32 knows no difference to 1


def kl_of_top(q_log_BSK: Tensor, p_log_BSK: Tensor, divergence: Divergence = "forward") -> Tensor:
    """(B, S) nats, of the student's and the teacher's log-probabilities of the same K tokens."""
    a, b = (p_log_BSK, q_log_BSK) if divergence == "forward" else (q_log_BSK, p_log_BSK)
    rest_a, rest_b = ((1 - x.exp().sum(-1)).clamp(min=LEAST) for x in (a, b))
    return (a.exp() * (a - b)).sum(-1) + rest_a * (rest_a / rest_b).log()


@dataclass(frozen=True)
class Distill:
    """KL divergence from the teacher's tokens, in nats, an objective of cs336.training. The batch is (token_ids_BS,
    targets_BS int64, top_ids_BSK int64, top_logprobs_BSK floating point), the last two of the teacher."""

    divergence: Divergence = "forward"
    cross_entropy: float = 0.0
    """Its share of the loss, beside 1 - share of the divergence."""
    ignore_index: int = -100
    kind: Literal["distill"] = "distill"

    def __post_init__(self):
        if self.divergence not in get_args(Divergence):
            raise ValueError(f"divergence must be forward or reverse, got {self.divergence!r}")
        if not 0 <= self.cross_entropy <= 1:
            raise ValueError(f"cross_entropy must be a share from 0 to 1, got {self.cross_entropy!r}")

    def __call__(self, model: nn.Module, batch: Batch) -> Terms:
        ids_BS, targets_BS, top_ids_BSK, top_logprobs_BSK = batch
        logits_BSV, routing = with_routing(model, ids_BS)
        counted_BS = targets_BS != self.ignore_index
        count = counted_BS.sum()
        q_log_BSK = logits_BSV.log_softmax(-1, dtype=torch.float32).gather(-1, top_ids_BSK)
        kl = (kl_of_top(q_log_BSK, top_logprobs_BSK.float(), self.divergence) * counted_BS).sum()
        ce = ops.cross_entropy(logits_BSV, targets_BS, ignore_index=self.ignore_index, reduction="sum")
        assert isinstance(ce, Tensor)  # nothing but the loss was asked for
        loss = (1 - self.cross_entropy) * kl + self.cross_entropy * ce
        metrics = {"kl": kl.detach(), "cross_entropy": ce.detach()}
        if routing is not None:
            loss = loss + count * (routing.balance + routing.z)
        return loss, count, metrics


class TopLogits:
    """What a teacher expects after each token of N windows: files of CHUNK windows, and their checksums beside them.

    Ids are int32 and log-probabilities float16: 6 K bytes a token.
    """

    def __init__(self, directory: pathlib.Path):
        self.directory = directory

    @torch.inference_mode()
    def write(
        self, teacher: Transformer, windows_NT: Sequence[Tensor], top_k: int, vocab_size: int | None = None
    ) -> None:
        """Go on where an earlier call was stopped. windows_NT: token ids (T,) int64 each. vocab_size: of the first so
        many tokens, which a student has; None: of all. Raises ValueError for a top_k that is not in 1..vocabulary."""
        vocab_size = teacher.config.vocab_size if vocab_size is None else vocab_size
        if not 1 <= top_k <= vocab_size:
            raise ValueError(f"top_k must be in 1..{vocab_size}, the vocabulary, got {top_k}")
        self.directory.mkdir(parents=True, exist_ok=True)
        checksums = self._checksums() if (self.directory / INDEX).exists() else {}
        for start in range(0, len(windows_NT), CHUNK):
            name = f"{start // CHUNK:05}.safetensors"
            if name in checksums and self._digest(name) == checksums[name]:
                continue
            tops = []
            for ids_T in windows_NT[start : start + CHUNK]:
                logits_1TV = teacher(ids_T[None].to(teacher.device))[..., :vocab_size]
                tops.append(logits_1TV[0].log_softmax(-1, dtype=torch.float32).topk(top_k))
            tensors = {
                "ids": torch.stack([top.indices for top in tops]).int().cpu(),
                "logprobs": torch.stack([top.values for top in tops]).half().cpu(),
            }
            with replacing(self.directory / name, "wb") as file:
                file.write(data := save(tensors))
            checksums[name] = hashlib.sha256(data).hexdigest()
            write_json(self.directory / INDEX, checksums, indent=1)

    def read(self, index_B: np.ndarray) -> tuple[Tensor, Tensor]:
        """Of these windows: ids (B, T, K) int64 and log-probabilities (B, T, K) float32.

        Raises FileNotFoundError for one that was not written, ValueError for a file that is not what was written.
        """
        rows = [self._chunk(int(i) // CHUNK) for i in index_B]
        ids = torch.stack([chunk["ids"][int(i) % CHUNK] for chunk, i in zip(rows, index_B, strict=True)])
        logprobs = torch.stack([chunk["logprobs"][int(i) % CHUNK] for chunk, i in zip(rows, index_B, strict=True)])
        return ids.long(), logprobs.float()

    def _chunk(self, number: int) -> dict[str, Tensor]:
        name = f"{number:05}.safetensors"
        data = (self.directory / name).read_bytes()
        if hashlib.sha256(data).hexdigest() != self._checksums().get(name):
            raise ValueError(f"{self.directory / name} is damaged: delete it, and the same command makes it anew")
        return load(data)

    def _digest(self, name: str) -> str | None:
        path = self.directory / name
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None

    def _checksums(self) -> dict[str, str]:
        return json.loads((self.directory / INDEX).read_text(encoding="utf-8"))
