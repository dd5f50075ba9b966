"""Fits recover the law that made the points; the published laws are such truths."""

import json

import numpy as np
import pytest

from cs336.scaling import EPOCH, ChinchillaLaw, Points, PowerLaw, fit_chinchilla, fit_envelope, fit_isoflop, read_points

HOFFMANN = ChinchillaLaw(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)
NUMBERS = ("E", "A", "B", "alpha", "beta")


def isoflop_grid(budgets=9, sizes=11, width=1.2):
    """Runs around the optimum of each budget, 6e18 to 3e21 FLOPs as in the paper."""
    flops = np.repeat(np.geomspace(6e18, 3e21, budgets), sizes)
    best = np.array([EPOCH.optimum(c).parameters for c in flops])
    parameters = best * np.tile(np.geomspace(np.exp(-width), np.exp(width), sizes), budgets)
    return parameters, flops / (6 * parameters)


def runs_of(law, noise=0.0, rng=None):
    N, D = isoflop_grid()
    factor = 1 if rng is None else np.exp(noise * rng.standard_normal(len(N)))
    return Points.of(N, D, law.loss(N, D) * factor)


@pytest.mark.parametrize("truth", [EPOCH, HOFFMANN])
def test_points_without_noise_give_the_law_back(truth):
    law = fit_chinchilla(runs_of(truth), bootstrap=0).law
    for name in NUMBERS:
        assert getattr(law, name) == pytest.approx(getattr(truth, name), rel=2e-3)


def test_a_ruined_run_counts_by_its_distance():
    points = runs_of(EPOCH)
    points.loss[17] *= 1.5
    law = fit_chinchilla(points, bootstrap=0).law
    assert law.alpha == pytest.approx(EPOCH.alpha, rel=1e-2)
    assert pytest.approx(EPOCH.E, rel=1e-2) == law.E


def covered(draws, bootstrap, seed):
    rng = np.random.default_rng(seed)
    inside = dict.fromkeys((*NUMBERS, "parameter_exponent"), 0)
    for draw in range(draws):
        fit = fit_chinchilla(runs_of(EPOCH, 0.004, rng), huber_delta=0.02, bootstrap=bootstrap, seed=draw)
        for name in inside:
            low, high = fit.interval(name)
            inside[name] += low <= getattr(EPOCH, name) <= high
    return {name: count / draws for name, count in inside.items()}


def test_intervals_hold_the_truth():
    assert min(covered(16, 60, 0).values()) >= 0.8


@pytest.mark.slow
def test_intervals_of_95_percent_hold_the_truth_in_90_to_97():
    for name, share in covered(200, 200, 1).items():
        assert 0.90 <= share <= 0.975, name


def test_a_forecast_ten_times_larger_is_within_its_interval():
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(12):
        fit = fit_chinchilla(runs_of(EPOCH, 0.004, rng), huber_delta=0.02, bootstrap=40)
        N, D, *_ = EPOCH.optimum(3e22)
        loss, (low, high) = fit.predict(N, D)
        assert low < loss < high
        hits += low <= EPOCH.loss(N, D) * np.exp(0.004 * rng.standard_normal()) <= high
    assert hits >= 9


def test_isoflop_profiles_centred_on_the_optimum_give_its_exponent():
    for minimum, tolerance in (("parabola", 5e-3), ("lowest", 5e-3)):
        found = fit_isoflop(runs_of(EPOCH), minimum)
        assert len(found.flops) == 9
        assert found.parameter_law.exponent == pytest.approx(EPOCH.parameter_exponent, abs=tolerance)
        assert found.parameter_law.exponent + found.token_law.exponent == pytest.approx(1)


def test_parabolas_off_centre_are_biased_and_the_law_is_not():
    """Sizes that reach further on the large side as budgets grow: the known fault of approach 2."""
    flops = np.repeat(np.geomspace(1e18, 1e22, 5), 9)
    drift = np.repeat(np.linspace(-2, 2, 5), 9)
    best = np.array([EPOCH.optimum(c).parameters for c in flops])
    N = best * np.exp(np.tile(np.linspace(-2, 2, 9), 5) + drift)
    D = flops / (6 * N)
    points = Points.of(N, D, EPOCH.loss(N, D))
    truth = EPOCH.parameter_exponent
    by_parabola = abs(fit_isoflop(points).parameter_law.exponent - truth)
    by_law = abs(fit_chinchilla(points, bootstrap=0).law.parameter_exponent - truth)
    assert by_parabola > 0.03
    assert by_law < 0.0005


def test_the_envelope_of_training_curves_gives_the_exponent():
    sizes = np.geomspace(5e7, 2e10, 24)
    tokens = np.geomspace(1e9, 1e12, 200)
    N, D = (axis.ravel() for axis in np.meshgrid(sizes, tokens, indexing="ij"))
    found = fit_envelope(Points.of(N, D, EPOCH.loss(N, D)))
    middle = (found.flops > 1e19) & (found.flops < 1e22)
    exponent = PowerLaw.through(found.flops[middle], found.parameters[middle]).exponent
    assert exponent == pytest.approx(EPOCH.parameter_exponent, abs=0.03)


def test_too_few_runs_and_profiles_without_a_valley_are_refused():
    with pytest.raises(ValueError, match="at least 6 runs"):
        fit_chinchilla(Points.of([1e6] * 6, [1e9] * 6, [3.0] * 6))
    N, D = np.geomspace(1e6, 1e8, 6), np.geomspace(1e8, 1e10, 6)
    with pytest.raises(ValueError, match="has no valley"):
        fit_isoflop(Points(N, D, 3 - 0.01 * np.log(N) ** 2 / 100, np.repeat([1e15, 1e16], 3)))
    with pytest.raises(ValueError, match="2 sizes: a parabola wants 3"):
        fit_isoflop(Points(N[:4], D[:4], np.ones(4), np.repeat([1e15, 1e16], 2)))
    with pytest.raises(ValueError, match="at least two budgets"):
        fit_isoflop(Points(N, D, np.ones(6), np.full(6, 1e15)), "lowest")
    with pytest.raises(ValueError, match="loss must be positive"):
        Points.of([1e6, 2e6], [1e9, 1e9], [3.0, -1.0])


@pytest.mark.parametrize("kind", ["csv", "json", "jsonl"])
def test_files_with_the_usual_names_are_read(tmp_path, kind):
    rows = [{"parameters": 1e6, "compute_budget": 6e15, "final_loss": 4.0}, {"parameters": 2e6, "compute_budget": 6e15, "final_loss": 3.9}]  # fmt: skip # noqa: E501
    path = tmp_path / f"points.{kind}"
    if kind == "csv":
        path.write_text("N, C ,loss\n".replace(" ", "") + "".join(f"{r['parameters']},{r['compute_budget']},{r['final_loss']}\n" for r in rows))  # fmt: skip # noqa: E501
    else:
        path.write_text(json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows)))
    points = read_points(path)
    assert points.tokens.tolist() == [1e9, 5e8]
    assert points.loss.tolist() == [4.0, 3.9]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no runs"),
        ("parameters,loss\n1,2\n", "must have loss and two of"),
        ("N,D,loss\n1,2,three\n", "run 1: loss must be a number, got 'three'"),
        ("N,D,loss\n1,2,3\n1,2\n", "run 2: loss must be a number, got None"),
        ("N,D,loss\n1,-2,3\n", "tokens must be positive"),
        ("N,D,loss\n1,nan,3\n", "tokens must be positive and finite"),
    ],
)
def test_files_that_do_not_fit_say_so(tmp_path, text, message):
    path = tmp_path / "points.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_points(path)


def test_losses_that_do_not_flatten_have_a_law_without_an_end():
    parameters, tokens = np.meshgrid([1e4, 3e4, 1e5, 3e5], [1e5, 1e6, 1e7])
    law = ChinchillaLaw(E=1e-300, A=12.0, B=14.0, alpha=0.15, beta=0.15)
    points = Points.of(parameters.ravel(), tokens.ravel(), law.loss(parameters, tokens).ravel())
    found = fit_chinchilla(points, bootstrap=20)
    assert 0 < found.law.E < 0.05
    assert found.law.loss(1e6, 1e8) == pytest.approx(law.loss(1e6, 1e8), rel=1e-3)
    assert len(found.resampled) == 20
