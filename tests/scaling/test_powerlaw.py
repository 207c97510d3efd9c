"""Laws that are known come back, whatever the units, and the objective is a sum."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.scaling import powerlaw

BESIROGLU = (482.0, 2085.0, 1.82, 0.348, 0.366)
"""A, B, E, alpha, beta: the refit of Hoffmann's runs by Besiroglu et al. 2024."""


def points(scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Sizes and numbers of samples on six isoFLOP lines."""
    sizes, compute = np.geomspace(5e7, 1e10, 7), np.geomspace(6e18, 3e21, 6)
    f, c = (values.ravel() for values in np.meshgrid(sizes, compute))
    return f * scale, c / (6 * f)


def fit(f: np.ndarray, d: np.ndarray, loss: np.ndarray) -> tuple[float, float, float, float, float]:
    """A, B, E0, a, b"""
    log_f, log_d, log_l = np.log(f), np.log(d), np.log(loss)
    model = powerlaw.surface_model(log_f - log_f.mean(), log_d - log_d.mean(), log_l, np.zeros(len(f), int))
    assert len(model.starts) >= 200
    (a, b, e0, log_a, log_b), _, _ = powerlaw.fit_best(model, log_l)
    return np.exp(log_a + a * log_f.mean()), np.exp(log_b + b * log_d.mean()), np.exp(e0), a, b


@pytest.mark.parametrize("law", [BESIROGLU, (406.4, 410.7, 1.69, 0.34, 0.28), (1e3, 50.0, 0.3, 0.6, 0.2)])
def test_a_surface_without_noise_is_recovered(law):
    f, d = points()
    A, B, e0, a, b = law
    assert fit(f, d, e0 + A * f**-a + B * d**-b) == pytest.approx(law, rel=1e-3)


def test_exponents_do_not_depend_on_the_unit_of_compute():
    A, B, e0, a, b = BESIROGLU
    f, d = points()
    rng = np.random.default_rng(0)
    loss = (e0 + A * f**-a + B * d**-b) * np.exp(0.01 * rng.standard_normal(len(f)))
    in_flops, in_gigaflops = fit(f, d, loss), fit(f / 1e9, d, loss)
    assert in_gigaflops[1:] == pytest.approx(in_flops[1:], rel=1e-6)
    assert in_gigaflops[0] == pytest.approx(in_flops[0] * 1e9 ** -in_flops[3], rel=1e-6)


def test_a_frontier_without_noise_is_recovered():
    compute = np.geomspace(1e15, 1e19, 5)
    log_c, log_l = np.log(compute), np.log(0.4 + 900 * compute**-0.21)
    (g, e0, log_k), _, _ = powerlaw.fit_best(powerlaw.frontier_model(log_c - log_c.mean(), log_l), log_l)
    assert (g, np.exp(e0), np.exp(log_k + g * log_c.mean())) == pytest.approx((0.21, 0.4, 900), rel=1e-3)


def test_arms_that_share_exponents_differ_in_coefficients():
    f, d = points()
    arms = np.repeat([0, 1], len(f))
    loss = np.concatenate([1.5 + A * f**-0.3 + B * d**-0.4 for A, B in ((300.0, 900.0), (200.0, 1500.0))])
    log_f, log_d, log_l = np.log(np.tile(f, 2)), np.log(np.tile(d, 2)), np.log(loss)
    model = powerlaw.surface_model(log_f - log_f.mean(), log_d - log_d.mean(), log_l, arms)
    (a, b, e0, *logs), objective, _ = powerlaw.fit_best(model, log_l)
    assert (a, b, np.exp(e0)) == pytest.approx((0.3, 0.4, 1.5), rel=1e-3) and objective < 1e-12
    sizes = np.exp(np.array(logs) + np.tile([a * log_f.mean(), b * log_d.mean()], 2))
    assert sizes == pytest.approx([300, 900, 200, 1500], rel=1e-2)


def test_the_gradient_is_that_of_the_summed_huber_loss():
    f, d = points()
    log_l = np.log(1.82 + 482 * f**-0.348 + 2085 * d**-0.366)
    rng = np.random.default_rng(1)
    noisy = log_l + 0.05 * rng.standard_normal(len(log_l))
    model = powerlaw.surface_model(np.log(f / f.mean()), np.log(d / d.mean()), noisy, np.zeros(len(f), int))
    theta, weights = model.starts[40:41], rng.integers(0, 3, (1, len(f))).astype(float)

    def evaluate(at):
        return powerlaw._evaluate(model.terms, at, noisy[None], weights, 0.02)

    steps = 1e-6 * np.eye(theta.shape[1])
    numeric = [(evaluate(theta + s).objective[0] - evaluate(theta - s).objective[0]) / 2e-6 for s in steps]
    assert evaluate(theta).gradient[0] == pytest.approx(numeric, rel=1e-5)
    residual = np.abs(powerlaw.predict(model.terms, theta)[0] - noisy)
    huber = np.where(residual <= 0.02, residual**2 / 2, 0.02 * (residual - 0.01))
    assert evaluate(theta).objective[0] == pytest.approx((weights[0] * huber).sum())


def test_a_parameter_that_the_data_do_not_determine_is_at_its_bound():
    compute = np.geomspace(1e15, 1e19, 5)
    log_c, log_l = np.log(compute), np.log(900 * compute**-0.21)
    model = powerlaw.frontier_model(log_c - log_c.mean(), log_l)
    theta, _, _ = powerlaw.fit_best(model, log_l)
    assert model.at_bound(theta) == ["E0"] and theta[0] == pytest.approx(0.21, abs=2e-3)
