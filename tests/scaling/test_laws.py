"""The laws' own mathematics, against brute force."""

import math

import numpy as np
import pytest

from cs336.scaling import EPOCH, ChinchillaLaw, DataConstrainedLaw, step_law


def test_the_optimum_is_where_no_other_size_is_better():
    best = EPOCH.optimum(1e21)
    assert 6 * best.parameters * best.tokens == pytest.approx(1e21)
    sizes = best.parameters * np.geomspace(0.2, 5, 2001)
    losses = EPOCH.loss(sizes, 1e21 / (6 * sizes))
    assert best.loss <= losses.min() + 1e-12
    assert sizes[losses.argmin()] == pytest.approx(best.parameters, rel=2e-3)


def test_the_published_law_wants_about_20_tokens_a_parameter():
    best = EPOCH.optimum(5.76e23)  # Chinchilla's own budget
    assert 15 < best.tokens / best.parameters < 30
    assert EPOCH.parameter_exponent == pytest.approx(0.514, abs=1e-3)


def test_serving_moves_the_optimum_to_smaller_models():
    plain = EPOCH.optimum(1e22)
    free = EPOCH.cheapest(plain.loss)
    assert free.parameters == pytest.approx(plain.parameters, rel=1e-3)
    assert free.flops == pytest.approx(1e22, rel=1e-6)
    served = EPOCH.cheapest(plain.loss, 1e13)
    assert served.parameters < 0.8 * plain.parameters
    assert EPOCH.loss(served.parameters, served.tokens) == pytest.approx(plain.loss)
    sizes = np.geomspace(served.parameters / 3, served.parameters * 3, 4001)
    costs = [6 * n * EPOCH.tokens_to(plain.loss, n) + 2 * n * 1e13 for n in sizes]
    assert served.flops <= min(costs) * (1 + 1e-9)


@pytest.mark.parametrize("served", [math.nan, math.inf, -1.0])
def test_tokens_that_are_none_are_served_nowhere(served):
    with pytest.raises(ValueError, match="inference_tokens must be finite and not negative"):
        EPOCH.cheapest(2.5, served)


def test_a_loss_below_the_law_is_refused():
    with pytest.raises(ValueError, match=r"no budget reaches a loss of 1\.8"):
        EPOCH.cheapest(1.8)
    assert EPOCH.tokens_to(1.9, 1e6) == np.inf


def test_repeated_tokens_are_worth_less_and_never_more_than_a_bound():
    law = DataConstrainedLaw(EPOCH, 1e9)
    N = EPOCH.matched_parameters(1e9)
    assert law.loss(N, 1e9) == pytest.approx(float(EPOCH.loss(N, 1e9)))
    four, fresh = float(law.loss(N, 4e9)), float(EPOCH.loss(N, 4e9))
    assert fresh < four < float(law.loss(N, 1e9))
    assert four - fresh < 0.15 * (float(law.loss(N, 1e9)) - four)  # four epochs are nearly as good as new text
    assert law.loss(N, 1e13) == pytest.approx(float(EPOCH.loss(N, 1e9 * (1 + 15.387756))))
    best = law.optimum(1e21)
    sizes = np.geomspace(best.parameters / 4, best.parameters * 4, 2001)
    assert best.loss <= law.loss(sizes, 1e21 / (6 * sizes)).min() + 1e-9
    assert best.tokens > EPOCH.optimum(1e21).tokens * 0.1


def test_plenty_of_text_changes_nothing():
    law = DataConstrainedLaw(EPOCH, 1e14)
    assert law.optimum(1e20).parameters == pytest.approx(EPOCH.optimum(1e20).parameters, rel=1e-3)


def test_step_law():
    lr, batch = step_law(1e9, 1e11)
    assert lr == pytest.approx(1.79 * 1e9**-0.713 * 1e11**0.307)
    assert batch == pytest.approx(0.58 * 1e11**0.571)
    with pytest.raises(ValueError, match="tokens must be positive"):
        step_law(1e9, 0)


def test_a_law_wants_positive_numbers():
    with pytest.raises(ValueError, match="beta must be positive"):
        ChinchillaLaw(1.8, 400, 2000, 0.3, -0.1)
