"""`cs336 batch-size`: the noise scale against a known one, the branches, and what is recommended."""

import dataclasses
import json
import math

import pytest
import torch
from experiments.tiny_study import base

from cs336.cli import main
from cs336.experiments.batch_size import Branching, critical, measure_batch_size, reason
from cs336.experiments.noise import NoiseScale, measure, smoothed
from cs336.training import TrainConfig
from cs336.training.learner import Learner
from cs336.utils.rows import read_rows


def config(tmp_path, **changes):
    return TrainConfig.from_table(base(tmp_path, **{"budget": "40steps"} | changes) | {"run_dir": "."})


def test_the_noise_scale_of_known_gradients():
    """Gradients drawn about G with variances S: both are found, whatever the batches' sizes."""
    torch.manual_seed(0)
    G, sigma = torch.randn(50, dtype=torch.float64), torch.rand(50, dtype=torch.float64)
    signal, noise = float((G**2).sum()), float((sigma**2).sum()) * 9
    for small in (1, 4):
        found = []
        for _ in range(3000):
            gradients = G + 3 * sigma * torch.randn(8, small, 50, dtype=torch.float64)
            parts = gradients.mean(1)
            found.append(NoiseScale.of([float((g**2).sum()) for g in parts], float((parts.mean(0) ** 2).sum()), small))
        mean = NoiseScale.mean(found)
        assert mean.signal == pytest.approx(signal, rel=0.02)
        assert mean.noise == pytest.approx(noise, rel=0.02)
        assert mean.batch_size == pytest.approx(noise / signal, rel=0.04)
    assert NoiseScale(-1.0, 3.0).batch_size == math.inf
    assert NoiseScale(2.0, -3.0).batch_size == 0
    with pytest.raises(ValueError, match="two batches or more"):
        NoiseScale.of([1.0], 1.0, 2)


def test_the_noise_scale_of_a_model(tmp_path):
    """Of its own gradients, taken by autograd in one piece each; nothing of it stays in the model."""
    learner = Learner(config(tmp_path))
    batches = [(torch.randint(0, 32, (3, 8)), torch.randint(0, 32, (3, 8))) for _ in range(4)]
    before = {name: p.clone() for name, p in learner.model.named_parameters()}
    found = measure(learner, batches)
    flat = []
    for x, y in batches:
        loss = torch.nn.functional.cross_entropy(learner.model(x).flatten(0, 1), y.flatten())
        flat.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(learner.model.parameters()))]))
    small, large = [float(g.double().square().sum()) for g in flat], float(sum(flat).div(4).double().square().sum())
    want = NoiseScale.of(small, large, 3)
    assert found.signal == pytest.approx(want.signal, rel=1e-4)
    assert found.noise == pytest.approx(want.noise, rel=1e-4)
    assert all(torch.equal(before[name], p) for name, p in learner.model.named_parameters())
    assert all(p.grad is None or not p.grad.any() for p in learner.model.parameters())


def test_measurements_are_averaged_before_they_are_divided():
    rows = [{"step": s, "noise/signal": g, "noise/noise": n} for s, g, n in ((1, 1, 4), (2, -0.5, 6), (3, 2.5, 2))]
    assert smoothed([{"step": 0}, *rows], 1) == [(1, 20.0), (2, 4.0), (3, 4.0)]
    assert smoothed(rows, 0)[1] == (2, math.inf)


def test_critical():
    assert critical({1: 3.0, 2: 3.005, 4: 3.009, 8: 3.02}, 0.01) == 4
    assert critical({1: 3.0, 2: 3.02, 4: 3.0}, 0.01) == 1  # luck beyond a loss does not count
    assert critical({1: 3.0, 2: math.nan}, 0.01) == 1
    assert critical({8: 2.0, 1: 3.0, 2: 2.5}, 0.01) == 8


def test_a_run_and_its_branches(tmp_path, capsys):
    branching = Branching(tmp_path / "b", config(tmp_path), factors=(1, 2), places=2, tokens=4 * 2 * 2 * 8)
    found = measure_batch_size(branching)
    assert found["parameters"] == branching.config.model.num_parameters()
    assert [point["step"] for point in found["points"]] == [13, 26]
    assert set(found["points"][0]["losses"]) == {1, 2}
    rows = [row for row in read_rows(tmp_path / "b" / "trunk") if "noise/noise" in row]
    assert rows
    branches = {p.name: json.loads(p.read_text()) for p in sorted((tmp_path / "b" / "branches").iterdir())}
    plain, double = branches["step_00000013-1.json"], branches["step_00000013-2.json"]
    assert (len(plain["losses"]), len(double["losses"])) == (8, 4)  # the same tokens
    assert double["lr"] == pytest.approx(math.sqrt(2) * plain["lr"])
    trunk = {row["step"]: row["lr"] for row in read_rows(tmp_path / "b" / "trunk") if "lr" in row}
    assert plain["lr"] == pytest.approx(trunk[13])
    written = (tmp_path / "b" / "branches" / "step_00000013-2.json").stat().st_mtime_ns
    capsys.readouterr()
    assert measure_batch_size(branching)["points"] == json.loads(json.dumps(found["points"]), object_hook=_ints)
    assert capsys.readouterr().out.count("(done before)") == 1 + 1 + 4
    assert (tmp_path / "b" / "branches" / "step_00000013-2.json").stat().st_mtime_ns == written


def _ints(table):
    return {int(k) if k.isdecimal() else k: v for k, v in table.items()}


def test_a_branch_goes_on_as_the_run_would(tmp_path):
    """From the same state, with the same optimizer: its first loss is that of the checkpoint's weights."""
    from cs336.data import TokenDataset, TokenLoader
    from cs336.experiments.batch_size import SEED
    from cs336.training.checkpoint import load_checkpoint

    branching = Branching(tmp_path / "b", config(tmp_path), factors=(1, 4), places=1, tokens=2 * 4 * 2 * 8)
    measure_batch_size(branching)
    found = json.loads((tmp_path / "b" / "branches" / "step_00000020-4.json").read_text())
    learner = Learner(dataclasses.replace(branching.config, batch_size=8))
    load_checkpoint(tmp_path / "b" / "trunk" / "checkpoints" / "step_00000020", learner.model)
    loader = TokenLoader(TokenDataset(branching.config.data.train, 8), 8, seed=SEED ^ 20)
    loss, count, _ = learner.terms(next(loader))
    assert found["losses"][0] == pytest.approx((loss / count).item(), rel=1e-5)
    assert found["factor"] == 4


def test_reasons():
    point = {"step": 10, "tokens": 100, "losses": {"1": 3.0, "2": 3.005, "4": 3.1}, "noise_scale": 17.2}
    found = {"points": [point | {"critical": 8}], "batch_size": 8, "branch_tokens": 50, "tolerance": 0.01}
    early, late = point | {"critical": 8, "tokens": 40}, point | {"critical": 16}
    said = reason(found | {"points": [early, late], "recommended": 16})
    assert "in batches of 16 sequences ends +0.0050 nats from batches of 8" in said
    assert "Batches of 32 end +0.1000 from it" in said
    assert "17.2 sequences" in said
    assert "at 40 tokens, only 8 sequences do no harm" in said
    none = reason(found | {"recommended": 8})
    assert "no batch larger than 8 stays within 0.01" in none
    assert "Early" not in none
    assert "the largest that was tried" in reason(found | {"points": [point | {"critical": 32}], "recommended": 32})


BAD = [
    ({"factors": (2, 4)}, {}, "factors go up from 1"),
    ({"factors": (1, 4, 2)}, {}, "factors go up from 1"),
    ({"places": 0}, {}, "places"),
    ({"tolerance": 0.0}, {}, "tolerance"),
    ({}, {"budget": "90s"}, "a budget of those, not 90s"),
    ({}, {"budget": "7steps"}, "too few for 3 checkpoints"),
    ({"tokens": 100}, {}, "fewer than two steps"),
]


@pytest.mark.parametrize(("keys", "changes", "message"), BAD)
def test_what_cannot_be_compared(tmp_path, keys, changes, message):
    with pytest.raises(ValueError, match=message):
        Branching(tmp_path / "b", config(tmp_path, **changes), **keys)


def test_the_verb(tmp_path, capsys):
    config(tmp_path).save(tmp_path / "base.toml")
    arguments = ["batch-size", "--config", str(tmp_path / "base.toml"), "--directory", str(tmp_path / "b")]
    assert main([*arguments, "--factors", "1", "2", "--places", "1", "--tokens", "128"]) == 0
    said = capsys.readouterr().out
    assert "recommended: batch_size " in said
    page = (tmp_path / "b" / "report.html").read_text()
    for text in ("Recommended batch", "Critical batch", "What a larger batch costs"):
        assert text in page
