"""The references of homework 3 against other derivations: Bayes on a grid, the library's KL, quadrature, the kernels."""

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import CHAIN_BETAS, bayes_on_a_grid, forward_kernel, known
from torch.distributions import Normal, kl_divergence

from dgm_course import likelihood, losses, samplers
from dgm_course.grading.exercise import load
from dgm_course.homework import Affine
from dgm_course.paths import DiscretePath
from dgm_course.schedules import linear_betas

REFERENCE = {name: exercise.reference for name, exercise in load(Path(__file__).parent / "hw3.py").items()}
CHAIN = DiscretePath(CHAIN_BETAS)
ABAR, T = CHAIN.alpha_bars, CHAIN.T


def near(actual, expected, tolerance=1e-10):
    actual, expected = (torch.as_tensor(value, dtype=torch.float64) for value in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# perturb_zero_snr -----------------------------------------------------------------------------------------------------


def test_the_shifted_schedule_runs_from_1_to_0_keeps_the_variance_and_is_linear_in_the_old_one():
    """These three leave one schedule."""
    t = torch.arange(T + 1)
    one, zero = torch.ones(T + 1, 1, dtype=torch.float64), torch.zeros(T + 1, 1, dtype=torch.float64)
    a = REFERENCE["perturb_zero_snr"](one, t, zero, ABAR)[:, 0]
    sigma = REFERENCE["perturb_zero_snr"](zero, t, one, ABAR)[:, 0]
    assert (a[0], a[-1], sigma[0], sigma[-1]) == (1, 0, 0, 1)
    near(a**2 + sigma**2, one[:, 0])
    assert (sigma >= 0).all()
    old = torch.tensor([known("chain", time)[0] for time in range(T + 1)], dtype=torch.float64)
    near(a.diff() / old.diff(), (1 / (old[0] - old[-1])).expand(T))
    x0, eps = randn(T + 1, 2, 3), randn(T + 1, 2, 3, seed=1)
    mixed = REFERENCE["perturb_zero_snr"](x0, t, eps, ABAR)
    near(mixed, a[:, None, None] * x0 + sigma[:, None, None] * eps)


# skip_posterior -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("s", "t"), [(1, 2), (1, 20), (3, 9), (7, 8), (12, 20)])
def test_the_posterior_is_that_of_bayes_on_a_grid(s, t):
    alpha_s, sigma_s = known("chain", s)
    alpha_t, sigma_t = known("chain", t)
    for x0, eps in ((-1.2, 1.5), (0.7, -0.8)):
        xt = alpha_t * x0 + sigma_t * eps
        expected = bayes_on_a_grid(alpha_s, sigma_s, *forward_kernel("chain", s, t), xt, x0)
        inputs = torch.tensor([[xt]], dtype=torch.float64), torch.tensor([[x0]], dtype=torch.float64)
        mean, variance = REFERENCE["skip_posterior"](*inputs, torch.tensor([s]), torch.tensor([t]), ABAR)
        near([mean.item(), variance.item()], list(expected), 1e-6)


def test_the_posterior_of_a_batch_is_that_of_the_path():
    s, t = torch.tensor([0, 3, 1, 19]), torch.tensor([4, 20, 2, 20])
    xt, x0 = randn(4, 2, 3), randn(4, 2, 3, seed=1)
    mean, variance = REFERENCE["skip_posterior"](xt, x0, s, t, ABAR)
    expected = CHAIN.posterior(xt, x0, s, t)
    near(mean, expected[0])
    near(variance, expected[1].flatten())
    assert torch.equal(mean[0], x0[0]) and variance[0] == 0


def test_pure_noise_tells_the_posterior_nothing():
    """x_t does not depend on x_s, so that q(x_s | x_t, x_0) = q(x_s | x_0)."""
    table = torch.tensor([1.0, 0.6, 0.3, 0.0], dtype=torch.float64)
    xt, x0 = randn(3, 2), randn(3, 2, seed=1)
    mean, variance = REFERENCE["skip_posterior"](xt, x0, torch.tensor([0, 1, 2]), torch.tensor([3, 3, 3]), table)
    near(mean, torch.tensor([1.0, 0.6, 0.3], dtype=torch.float64).sqrt()[:, None] * x0)
    near(variance, torch.tensor([0.0, 0.4, 0.7], dtype=torch.float64))


# complete -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["v", "eps"])
def test_what_was_mixed_is_found_again(given):
    alpha_bar = torch.tensor([1.0, 0.7, 0.01, 0.0 if given == "v" else 0.3], dtype=torch.float64)
    x0, eps = randn(4, 3), randn(4, 3, seed=1)
    alpha, sigma = alpha_bar.sqrt()[:, None], (1 - alpha_bar).sqrt()[:, None]
    v = alpha * eps - sigma * x0
    found = REFERENCE["complete"](alpha * x0 + sigma * eps, {"v": v, "eps": eps}[given], given, alpha_bar)
    for got, expected in zip(found, (x0, eps, v), strict=True):
        near(got, expected)


@pytest.mark.parametrize("given", ["v", "eps"])
def test_completing_is_converting(given):
    t, xt, value = torch.tensor([1, 9, 20]), randn(3, 2), randn(3, 2, seed=1)
    for name, got in zip(("x0", "eps", "v"), REFERENCE["complete"](xt, value, given, ABAR[t]), strict=True):
        near(got, CHAIN.convert(value, xt, t, given=given, to=name))


@pytest.mark.parametrize("alpha_bar", [[0.0], [0.5, 0.0]])
def test_noise_alone_raises(alpha_bar):
    with pytest.raises(ValueError, match="alpha_bar"):
        REFERENCE["complete"](randn(len(alpha_bar), 2), randn(len(alpha_bar), 2), "eps", torch.tensor(alpha_bar))


# x0_weight ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance", ["posterior", "beta"])
@pytest.mark.parametrize(("s", "t"), [(1, 2), (1, 20), (3, 9), (19, 20)])
def test_the_line_in_the_squared_error_is_the_kl(variance, s, t):
    weight, constant = REFERENCE["x0_weight"](torch.tensor([s]), torch.tensor([t]), ABAR, variance)
    xt, x0, guess = randn(5, 1), randn(5, 1, seed=1), randn(5, 1, seed=2)
    mean, posterior = CHAIN.posterior(xt, x0, s, t)
    sigma2 = (
        posterior if variance == "posterior" else torch.as_tensor(forward_kernel("chain", s, t)[1], dtype=torch.float64)
    )
    model = Normal(CHAIN.posterior(xt, guess, s, t)[0], sigma2.sqrt())
    near(weight * (x0 - guess) ** 2 + constant, kl_divergence(Normal(mean, posterior.sqrt()), model))
    term = losses.bound_term(lambda xt, t: guess, CHAIN, x0, xt, s, t, variance=variance)
    near(weight * (x0 - guess)[:, 0] ** 2 + constant, term)


# sample_subset --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [[20, 13, 12, 4, 0], [20, 0], [17, 9, 3], list(range(20, -1, -1))])
def test_sampling_is_that_of_the_kernel_with_the_same_noise(times):
    drawn = torch.rand(2, T + 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    denoiser, x = Affine(drawn[0], drawn[1]), randn(3, 2)
    g = torch.Generator().manual_seed(7)
    noise = torch.stack([torch.randn(3, 2, generator=g, dtype=torch.float64) for _ in times[1:]])
    states = samplers.ddpm(denoiser, CHAIN, x, times, variance="beta", generator=torch.Generator().manual_seed(7))
    near(REFERENCE["sample_subset"](denoiser, x, torch.tensor(times), ABAR, noise), samplers.last(states))


# gaussian_bound -------------------------------------------------------------------------------------------------------

MEAN, VAR = 0.8, 0.3
TIMES = [20, 13, 12, 4, 2, 0]


def guess(path):
    """E[x_0 | x_t] of Gaussian data."""

    def denoise(xt, t):
        alpha, var = path.alpha(t), path.sigma(t) ** 2
        return MEAN + VAR * alpha / (alpha**2 * VAR + var) * (xt - alpha * MEAN)

    return denoise


def test_the_terms_are_those_of_quadrature():
    """Each term is a quadratic in x_0 and ε, whose mean Gauss's rule gives exactly."""
    points, weights = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(6))
    weight = (weights[:, None] * weights).flatten() / weights.sum() ** 2
    x0 = (MEAN + math.sqrt(VAR) * points)[:, None].expand(-1, 6).reshape(-1)
    eps = points.repeat(6)
    end = Normal(CHAIN.alpha(TIMES[0]) * x0, CHAIN.sigma(TIMES[0]))
    terms = [kl_divergence(end, Normal(torch.zeros_like(x0), 1.0))]
    for t, s in pairwise(TIMES):
        xt = CHAIN.perturb(x0, t, eps)
        x0_hat = guess(CHAIN)(xt, t)
        std = math.sqrt(forward_kernel("chain", s, t)[1])
        if s == 0:
            terms.append(-Normal(x0_hat, std).log_prob(x0))
        else:
            mean, variance = CHAIN.posterior(xt, x0, s, t)
            terms.append(
                kl_divergence(Normal(mean, variance.sqrt()), Normal(CHAIN.posterior(xt, x0_hat, s, t)[0], std))
            )
    expected = torch.stack([(weight * term).sum() for term in terms])
    near(REFERENCE["gaussian_bound"](MEAN, VAR, ABAR, torch.tensor(TIMES)), expected)


def test_the_terms_are_the_mean_of_the_kernels():
    """Each within 5 standard errors of 40,000 draws."""
    g = torch.Generator().manual_seed(0)
    x0 = MEAN + math.sqrt(VAR) * torch.randn(40_000, 1, generator=g, dtype=torch.float64)
    drawn = likelihood.bound(guess(CHAIN), CHAIN, x0, TIMES, generator=g)
    gap = REFERENCE["gaussian_bound"](MEAN, VAR, ABAR, torch.tensor(TIMES)) - drawn.mean(1)
    assert (gap.abs() < 5 * drawn.std(1) / 200).all()


def test_the_bound_stays_above_the_entropy_and_comes_down_to_it():
    entropy = 0.5 * math.log(2 * math.pi * math.e * VAR)
    gaps = []
    for steps in (30, 300, 3000, 30_000):
        table = DiscretePath(linear_betas(steps)).alpha_bars if steps >= 300 else ABAR
        times = torch.arange(len(table) - 1, -1, -1)
        gaps.append(REFERENCE["gaussian_bound"](MEAN, VAR, table, times).sum().item() - entropy)
    assert all(after < before / 2 for before, after in pairwise(gaps)) and 0 < gaps[-1] < 0.01
