"""Texts that mean the same, by their embeddings: clusters, and within each pairs of a high cosine (arXiv 2303.09540).

Only rows of one cluster are compared: N^2 / K products for N / K rows a cluster. Two rows that are alike, but on both
sides of a border, are not found.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from cs336.utils.device import pick

Keep = Literal["farthest", "nearest"]
CLUSTER_ROWS = 1000  # of a cluster, on average, where their number is not given
BATCH, PASSES, LEAST_STEPS = 1024, 5, 20  # of k-means
BLOCK = 4096  # rows that are compared at once
ROUNDING = 1e-5  # of a cosine in float32: equal rows reach a threshold of 1
LEAST_CENTRED = 100  # rows that have a mean which is not mostly they themselves
AT_THE_MEAN = 1e-3  # of a direction: nearer ones have none of their own, copies of one text for example
ONE_CENTRE = 0.9999  # cosine from which on two rows begin one cluster: rows that are nearly equal would be torn apart


class Rows(Protocol):
    """(N, D) numbers, of which a few rows are read at a time: an array, or a file that is mapped."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: np.ndarray) -> np.ndarray: ...


def semantic_duplicates(
    embeddings_ND: Rows,
    threshold: float = 0.95,
    num_clusters: int | None = None,
    seed: int = 0,
    *,
    keep: Keep = "farthest",
    centre: bool = False,
    device: str = "auto",
) -> list[int]:
    """Of each row the row that stays for it: those with `semantic_duplicates(...)[i] == i` stay.

    Rows are parted by k-means over their directions. In a cluster they are taken in the order of their cosine to its
    centre, and one goes when its cosine to an earlier one is `threshold` or more; the one that stays is at the end of
    the chain of such pairs.

    embeddings_ND: an array of numbers, or a numpy.memmap of which blocks are read. Lengths do not matter.
    num_clusters: of k-means, at most the rows; None: one for a thousand rows. keep: whether what is farthest from the
        centre comes first, the rare examples, as in the paper, or what is nearest.
    centre: of a hundred rows or more, take the mean of all directions off first. Those of a causal language model point
        one way, so that texts that have nothing in common are alike without it. What is the mean stays as it is.
    device: "auto" is a GPU if there is one. The same arguments give the same rows on the same kind of device.

    Raises ValueError for arguments that make no sense and for rows that are not finite.
    """
    check_semantic(threshold, num_clusters, keep)
    shape = getattr(embeddings_ND, "shape", None)
    if isinstance(embeddings_ND, Tensor) or shape is None:
        raise TypeError(
            f"expected a numpy array of embeddings, got a {type(embeddings_ND).__name__}: convert it to one"
        )
    if len(shape) != 2 or not shape[1]:
        raise ValueError(f"expected embeddings of shape (rows, features), got {tuple(shape)}")
    rows = _Directions(embeddings_ND, pick(device))
    if not len(rows):
        return []
    if centre and len(rows) >= LEAST_CENTRED:
        rows.centre()
    centres_KD = _centres(rows, min(num_clusters or max(1, len(rows) // CLUSTER_ROWS), len(rows)), seed)
    cluster_N, cosine_N = _nearest(rows, centres_KD)
    towards_N = cosine_N if keep == "farthest" else -cosine_N
    order_N = np.lexsort((np.arange(len(rows)), towards_N, cluster_N))
    ends_C = np.flatnonzero(np.diff(cluster_N[order_N], append=-1)) + 1
    first_N = np.arange(len(rows))
    begin = 0
    for end in ends_C.tolist():
        members_M = order_N[begin:end]
        first_N[members_M] = members_M[_first_alike(rows[members_M], threshold)]
        begin = end
    return first_N.tolist()


def check_semantic(threshold: float, num_clusters: int | None, keep: Keep) -> None:
    """Raises ValueError for what makes no sense."""
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is a cosine above 0, 1 at most, got {threshold}")
    if num_clusters is not None and num_clusters < 1:
        raise ValueError(f"num_clusters must be 1 or more, or None for one for a thousand rows, got {num_clusters}")
    if keep not in ("farthest", "nearest"):
        raise ValueError(f'keep is "farthest" or "nearest", of the centre, got {keep!r}')


class _Directions:
    """Rows as float32 of length 1, a few at a time on the device; one of zeros stays as it is, like no other."""

    def __init__(self, rows_ND: Rows, device: torch.device):
        self._rows_ND, self.device = rows_ND, device
        self._mean_D: Tensor | None = None

    def centre(self) -> None:
        """From now on less the mean of all."""
        sums_BD = torch.stack([block_BD.double().sum(0) for block_BD in self.blocks()])
        self._mean_D = (sums_BD.sum(0) / len(self)).float()

    def __len__(self) -> int:
        return self._rows_ND.shape[0]

    def __getitem__(self, index_B: np.ndarray) -> Tensor:
        rows_BD = torch.from_numpy(np.asarray(self._rows_ND[index_B], np.float32)).to(self.device)
        finite_B = rows_BD.isfinite().all(1)
        if not finite_B.all():
            row = int(index_B[int(finite_B.int().argmin())])
            raise ValueError(f"row {row} of the embeddings is not finite: leave that text out, or embed it again")
        largest_B = rows_BD.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny)  # its square may be none
        rows_BD = torch.nn.functional.normalize(rows_BD / largest_B[:, None], dim=1)
        if self._mean_D is None:
            return rows_BD
        off_BD = rows_BD - self._mean_D
        far_B = off_BD.norm(dim=1, keepdim=True) >= AT_THE_MEAN
        return torch.where(far_B, torch.nn.functional.normalize(off_BD, dim=1), rows_BD)

    def blocks(self) -> Iterator[Tensor]:
        for begin in range(0, len(self), BLOCK):
            yield self[np.arange(begin, min(begin + BLOCK, len(self)))]


def _centres(rows: _Directions, num_clusters: int, seed: int) -> Tensor:
    """(K, D): k-means of batches, each centre the mean direction of the rows that it was nearest to so far."""
    generator = np.random.default_rng(seed)
    centres_KD = rows[np.sort(generator.choice(len(rows), num_clusters, replace=False))]
    first_K = _first_alike(centres_KD, ONE_CENTRE)
    centres_KD = centres_KD[np.flatnonzero(first_K == np.arange(num_clusters))]
    clusters_K = torch.arange(len(centres_KD), device=rows.device)
    counts_K = torch.zeros(len(centres_KD), device=rows.device)
    batch = min(BATCH, len(rows))
    for _ in range(max(LEAST_STEPS, PASSES * len(rows) // batch)):
        batch_BD = rows[np.sort(generator.integers(len(rows), size=batch))]
        nearest_B = (batch_BD @ centres_KD.T).argmax(1)
        # A product, not a scattered sum, whose order differs from call to call on a GPU.
        member_BK = (nearest_B[:, None] == clusters_K).to(batch_BD.dtype)
        new_K = member_BK.sum(0)
        counts_K += new_K
        step_KD = member_BK.T @ batch_BD - new_K[:, None] * centres_KD
        centres_KD = torch.nn.functional.normalize(centres_KD + step_KD / counts_K.clamp(min=1)[:, None], dim=1)
    return centres_KD


def _nearest(rows: _Directions, centres_KD: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """((N,) the nearest centre, (N,) the cosine to it)."""
    clusters, cosines = [], []
    for block_BD in rows.blocks():
        cluster_B = (block_BD @ centres_KD.T).argmax(1)
        clusters.append(cluster_B.cpu().numpy())
        # Row by row, and not from the product, in which equal rows need not have equal bits.
        cosines.append((block_BD * centres_KD[cluster_B]).sum(1).cpu().numpy())
    return np.concatenate(clusters), np.concatenate(cosines)


def _first_alike(rows_MD: Tensor, threshold: float) -> np.ndarray:
    """(M,) of each row the one that stays: itself, or where the chain of earlier rows that are like it ends."""
    earlier_M: list[int] = []
    for begin in range(0, len(rows_MD), BLOCK):
        end = min(begin + BLOCK, len(rows_MD))
        alike_BM = (rows_MD[begin:end] @ rows_MD[:end].T >= threshold - ROUNDING).tril(begin - 1)
        first_B = alike_BM.int().argmax(1)  # of several the first
        own_B = torch.arange(begin, end, device=rows_MD.device)
        earlier_M += torch.where(alike_BM.any(1), first_B, own_B).tolist()
    return np.array(_roots(earlier_M))


def _roots(earlier_M: Sequence[int]) -> list[int]:
    roots: list[int] = []
    for index, earlier in enumerate(earlier_M):
        roots.append(index if earlier == index else roots[earlier])
    return roots
