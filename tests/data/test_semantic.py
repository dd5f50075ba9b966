"""Duplicates by embeddings: against the definition in one cluster, planted ones in many, and what is refused."""

import numpy as np
import pytest
import torch

from cs336.data import semantic_duplicates
from cs336.data.dedup import semantic


def rows(count, features=16, seed=0):
    return np.random.default_rng(seed).standard_normal((count, features)).astype(np.float32)


def defined(x_ND, centre_D, threshold, farthest):
    """One cluster: from the end that stays on, each row goes to the first earlier one that is like it."""
    unit_ND = x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)
    towards_N, cosine_NN = unit_ND @ centre_D, unit_ND @ unit_ND.T
    # No order and no comparison that rounding could change:
    assert np.diff(np.sort(towards_N)).min() > 1e-5
    assert abs(cosine_NN - threshold).min() > 1e-4
    order = sorted(range(len(x_ND)), key=lambda i: towards_N[i] if farthest else -towards_N[i])
    root = {}
    for place, i in enumerate(order):
        like = [j for j in order[:place] if cosine_NN[i, j] >= threshold]
        root[i] = root[like[0]] if like else i
    return [root[i] for i in range(len(x_ND))]


def one_centre(monkeypatch, centre_D):
    monkeypatch.setattr(semantic, "_centres", lambda *_: torch.tensor(centre_D[None], dtype=torch.float32))


@pytest.mark.parametrize("keep", ["farthest", "nearest"])
@pytest.mark.parametrize("block", [4096, 7])
def test_one_cluster_is_what_the_definition_says(keep, block, monkeypatch):
    monkeypatch.setattr(semantic, "BLOCK", block)
    centre_D = np.eye(6)[0]
    one_centre(monkeypatch, centre_D)
    x_ND = rows(60, 6)
    for threshold in (0.5, 0.7, 0.9):
        found = semantic_duplicates(x_ND, threshold, 1, keep=keep, device="cpu")
        assert found == defined(x_ND, centre_D, threshold, keep == "farthest")
        assert sum(first != i for i, first in enumerate(found)) > 0
        assert all(found[first] == first for first in found)


@pytest.mark.parametrize("keep", ["farthest", "nearest"])
def test_planted_duplicates_are_found_in_clusters(keep):
    """Blobs far from one another, in each some rows that are another one, scaled or moved a little."""
    rng = np.random.default_rng(1)
    centres = 20 * rows(6, 32, 2)
    x_ND = np.repeat(centres, 50, axis=0) + 8 * rng.standard_normal((300, 32))
    copies = [i for i in range(300) if i % 10 == 9]
    for i in copies:
        x_ND[i] = 3 * x_ND[i - 4] + 1e-4 * rng.standard_normal(32)
    found = semantic_duplicates(x_ND, 0.999, 6, keep=keep, device="cpu")
    pairs = {tuple(sorted((i, first))) for i, first in enumerate(found) if first != i}
    assert pairs == {(i - 4, i) for i in copies}
    assert found == semantic_duplicates(x_ND, 0.999, 6, keep=keep, device="cpu")
    assert found == semantic_duplicates(x_ND * 8, 0.999, 6, keep=keep, device="cpu")


def test_which_stays_is_its_distance_from_the_centre(monkeypatch):
    """Three directions at 0, 10 and 20 degrees, the centre at 10: the outer ones stay, or the inner one."""
    angles = np.radians([10, 0, 20])
    one_centre(monkeypatch, np.array([np.cos(angles[0]), np.sin(angles[0])]))
    x_ND = np.stack([np.cos(angles), np.sin(angles)], 1)
    close = np.cos(np.radians(11))
    assert semantic_duplicates(x_ND, close, 1, keep="nearest", device="cpu") == [0, 0, 0]
    assert semantic_duplicates(x_ND, close, 1, keep="farthest", device="cpu")[1:] == [1, 2]
    assert semantic_duplicates(x_ND, close, 1, keep="farthest", device="cpu")[0] in (1, 2)


def test_equal_rows_leave_the_first_and_zeros_are_like_nothing():
    x_ND = np.concatenate([rows(5), rows(5), np.zeros((2, 16), np.float32), rows(5)])
    for clusters in (1, 3, 17, 1000):
        found = semantic_duplicates(x_ND, 1.0, clusters, device="cpu")
        assert found == [*range(5), *range(5), 10, 11, *range(5)]


def test_copies_of_rows_are_in_one_cluster_with_them():
    """Centres are drawn among rows, and so among copies too: of equal ones one is enough."""
    for seed in range(50):
        some = rows(80 + seed, 3, seed)
        x_ND = np.concatenate([some, some[::2], some[::3]])
        found = semantic_duplicates(x_ND, 1.0, 17, seed, device="cpu")
        stays = [found[i] for i in range(len(some))]  # rows that are alike by chance are one, too
        assert found[len(some) :] == [*stays[::2], *stays[::3]]


def test_rows_of_any_length_are_directions():
    for scale in (1e25, 1e-14, 1e-30):
        some = rows(4) * np.float32(scale)
        assert semantic_duplicates(np.concatenate([some, some]), device="cpu") == [*range(4), *range(4)]


def test_what_all_rows_share_is_taken_off():
    """Rows that all point one way, but for a little that is each one's own, and a copy."""
    x_ND = 10 + rows(200)
    x_ND[150] = 3 * x_ND[20]
    assert sum(first != i for i, first in enumerate(semantic_duplicates(x_ND, 0.95, 1, device="cpu"))) > 150
    found = semantic_duplicates(x_ND, 0.95, 1, centre=True, device="cpu")
    assert {tuple(sorted((i, first))) for i, first in enumerate(found) if first != i} == {(20, 150)}


def test_copies_stay_alike_when_the_mean_is_theirs():
    for count in (2, 50, 100, 500):
        for features in (3, 64):
            x_ND = np.repeat(rows(1, features), count, axis=0)
            assert semantic_duplicates(x_ND, 1.0, centre=True, device="cpu") == [0] * count
    close = np.array([[1.0, 0.0], [1.0, 0.03]])
    assert len(set(semantic_duplicates(close, 0.99, centre=True, device="cpu"))) == 1


def test_edges():
    assert semantic_duplicates(np.zeros((0, 4)), device="cpu") == []
    assert semantic_duplicates(rows(1), device="cpu") == [0]
    assert semantic_duplicates(np.ones((50, 3)), device="cpu") == [0] * 50


def test_a_mapped_file_is_read_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(semantic, "BLOCK", 16)
    x_ND = rows(100)
    x_ND[60] = x_ND[3]
    np.save(tmp_path / "rows.npy", x_ND)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    found = semantic_duplicates(mapped, 0.99, 4, device="cpu")
    assert found == [3 if i == 60 else i for i in range(100)]


def test_refuses_what_makes_no_sense():
    for options, message in (
        ({"threshold": 0}, "threshold is a cosine"),
        ({"num_clusters": 0}, "num_clusters must be 1"),
        ({"keep": "first"}, 'keep is "farthest"'),
    ):
        with pytest.raises(ValueError, match=message):
            semantic_duplicates(rows(3), **options)
    for shape in ((3,), (3, 0), (1, 2, 3)):
        with pytest.raises(ValueError, match=r"shape \(rows, features\), got "):
            semantic_duplicates(np.zeros(shape))
    for wrong, name in (([[1.0, 2.0]], "list"), (torch.ones(2, 2), "Tensor")):
        with pytest.raises(TypeError, match=f"expected a numpy array of embeddings, got a {name}"):
            semantic_duplicates(wrong)
    broken = rows(9)
    broken[6, 1] = np.nan
    with pytest.raises(ValueError, match="row 6 of the embeddings is not finite"):
        semantic_duplicates(broken, num_clusters=1, device="cpu")
