"""muP: weights and rates by its table; activations move equally far at every width, and do not without it."""

import math

import pytest
import torch

from cs336.cli import main
from cs336.models import Transformer, TransformerConfig
from cs336.optim.config import AdamWConfig, MuonConfig, SGDConfig, SOAPConfig
from cs336.scaling.coordinates import measure

WIDTHS = (32, 64, 128, 256)


def test_activations_move_equally_far_at_every_width_under_mup_and_further_without():
    mup, standard = (measure(WIDTHS, mup=which, seeds=2) for which in (True, False))
    assert mup.moved.keys() == {"attention 0", "mlp 0", "attention 1", "mlp 1", "features", "logits"}
    for name, slope in mup.slopes().items():
        assert abs(slope) < 0.4, (name, slope)
    assert abs(mup.slopes()["logits"]) < 0.15
    grown = standard.slopes()
    assert grown["logits"] > 0.7
    assert min(grown[name] for name in grown if name.startswith(("attention", "mlp"))) > 0.8
    for name, moved in standard.moved.items():  # the base width is the same model
        assert moved[0].tolist() == mup.moved[name][0].tolist()


def model(width, **changes):
    shape = {"mup_base_width": 32} | changes
    return Transformer(TransformerConfig(64, 16, 2, width, width // 16, **shape))


def test_initial_weights_are_those_of_the_table():
    for width in (32, 512):
        ratio = 32 / width
        made = model(width)
        deep = math.sqrt(2 * 2)
        for name, expected in {
            "embedding.weight": 0.02,
            "layers.0.attention.q_proj.weight": 0.02 * ratio**0.5,
            "layers.1.mlp.up_proj.weight": 0.02 * ratio**0.5,
            "layers.1.mlp.down_proj.weight": 0.02 * ratio**0.5 / deep,
            "head.weight": 0.02 * ratio,
        }.items():
            assert made.get_parameter(name).std().item() == pytest.approx(expected, rel=0.1), name


def test_each_group_has_its_rate_and_the_same_decay_a_step():
    made = model(128)
    groups = AdamWConfig(weight_decay=0.1).build(made).param_groups
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    for name, p in made.named_parameters():
        hidden = p.dim() == 2 and not name.startswith("embedding")
        assert scale[id(p)] == (0.25 if hidden else 1.0), name
    assert len(scale) == len(list(made.parameters()))
    assert groups[0]["lr_scale"] == 1  # whose rate the trainer logs
    assert {group["weight_decay"] * group["lr_scale"] for group in groups} == {0.1, 0.0}


def test_the_learner_steps_each_group_by_its_rate(tmp_path):
    from cs336.training.config import DataConfig, TrainConfig
    from cs336.training.learner import Learner

    config = model(128).config
    learner = Learner(TrainConfig(tmp_path, DataConfig(tmp_path), config, AdamWConfig(weight_decay=0.0), device="cpu"))
    before = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
    tokens = torch.arange(32 * 17).reshape(32, 17) % 64
    learner.update((tokens[:, :-1], tokens[:, 1:]), 1e-3)
    for name, p in learner.model.named_parameters():
        step = (p.detach() - before[name]).abs().max().item()
        hidden = p.dim() == 2 and name != "embedding.weight"
        assert step == pytest.approx(1e-3 * (0.25 if hidden else 1), rel=0.05), name


def test_without_a_base_width_nothing_changes():
    plain = model(64, mup_base_width=None)
    assert plain.lr_scales() == {}
    assert all("lr_scale" not in group for group in AdamWConfig().build(plain).param_groups)


@pytest.mark.parametrize("config", [MuonConfig(), SOAPConfig(), SGDConfig()])
def test_other_optimizers_refuse_it(config):
    with pytest.raises(ValueError, match="mup_base_width scales AdamW's learning rates"):
        config.build(model(64))
    config.build(model(32))


def test_models_that_the_table_does_not_cover_are_refused():
    with pytest.raises(ValueError, match="needs tie_embeddings = false"):
        model(64, tie_embeddings=True)
    with pytest.raises(ValueError, match="mup_base_width must be"):
        model(64, mup_base_width=0)


def test_the_verb_prints_both_and_draws(tmp_path, capsys):
    picture = tmp_path / "check.png"
    options = ["--widths", "32", "64", "--steps", "2", "--seeds", "1"]
    drawn = ["--out", str(picture)] if has_matplotlib() else []
    assert main(["scaling", "coord-check", *options, *drawn]) == 0
    said, told = capsys.readouterr()
    assert "muP: width 64, 2 of 2" in told
    assert said.count("logits") == 2
    assert "standard: RMS of the change after 2 steps at widths 32, 64" in said
    assert picture.exists() == bool(drawn)
    assert main(["scaling", "coord-check", "--widths", "32", "40"]) == 2
    assert "multiples of head_dim 16, got 40" in capsys.readouterr().err


def has_matplotlib():
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True
