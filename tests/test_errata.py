"""The slides' formulas against what holds: each is refuted by a counterexample, and our kernels follow what holds.

Expected values are typed here from the chain's definition, or come from Bayes on a grid, quadrature, sympy or torch.
A docstring says what the slide text reads, what holds, and how: pointwise, on average, in a limit, or for the gradient
in θ only.
"""

import math

import numpy as np
import pytest
import scipy.integrate
import sympy
import torch
from oracles import bayes_on_a_grid
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from dgm_course import tables
from dgm_course.denoisers import Denoiser
from dgm_course.likelihood import bound, prior_term
from dgm_course.losses import bound_term, dsm, esm, simple, ssm
from dgm_course.paths import VP, DiscretePath
from dgm_course.samplers import (
    ddim_step,
    ddpm,
    ddpm_step,
    euler_maruyama_step,
    forward_euler_maruyama,
    langevin_step,
    last,
)
from dgm_course.schedules import constant_betas, cosine_betas, linear_betas, quadratic_betas
from dgm_course.toy import GaussianMixture
from dgm_course.training import batches


def table(betas):
    """β_t, ᾱ_t and β̃_t by the slides' formulas, with entry t at index t, and β_0 = 0, ᾱ_0 = 1."""
    betas = np.concatenate([[0.0], betas])
    abar = np.cumprod(1 - betas)
    return betas, abar, np.concatenate([[np.nan], betas[1:] * (1 - abar[:-1]) / (1 - abar[1:])])


T = 10
SHORT, (BETA, ABAR, TILDE) = DiscretePath(np.linspace(0.01, 0.3, T)), table(np.linspace(0.01, 0.3, T))
LONG, (BETA_LONG, ABAR_LONG, TILDE_LONG) = DiscretePath(linear_betas(1000)), table(np.linspace(1e-4, 0.02, 1000))
EVERY_T = pytest.mark.parametrize("t", range(2, T + 1))
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(80)
WEIGHTS = WEIGHTS / WEIGHTS.sum()  # E f(z) = Σ w f(node) for standard normal z


def column(*values):
    return torch.tensor(values, dtype=torch.float64)[:, None]


def near(actual, expected, tolerance=1e-10):
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=tolerance, atol=tolerance, equal_nan=False)


def noised(x0, eps, t):
    return math.sqrt(ABAR[t]) * x0 + math.sqrt(1 - ABAR[t]) * eps


def bayes(xt, x0, t):
    """Mean and variance of q(x_{t−1} | x_t, x_0) on the short chain, by brute force."""
    return bayes_on_a_grid(math.sqrt(ABAR[t - 1]), math.sqrt(1 - ABAR[t - 1]), math.sqrt(1 - BETA[t]), BETA[t], xt, x0)


def says(x0_hat):
    return lambda xt, t: x0_hat


def normal(mean, std):
    """torch's normal law in float64; of Python numbers it would be one in float32."""
    return Normal(*(torch.as_tensor(value, dtype=torch.float64) for value in (mean, std)))


def normal_density(x, mean, var):
    return np.exp(-0.5 * (x - mean) ** 2 / var) / np.sqrt(2 * math.pi * var)


# E1, E2, E20, E21: the forward jump and the reverse step --------------------------------------------------------------


def test_e01_mean_of_the_jump():
    """Reads q(x_t|x_0) with mean √ᾱ_t·x_{t−1}; √ᾱ_t·x_0 holds, pointwise in x_0 and t. At t = 1 the two are one.

    The law given x_0 is walked on a grid; what is read, averaged over x_{t−1} given x_0, is too small by √ᾱ_{t−1}.
    """
    grid, x0 = np.linspace(-9, 9, 901), 2.0
    density, mean = None, x0
    for t in range(1, T + 1):
        kernel = normal_density(grid[:, None], math.sqrt(1 - BETA[t]) * grid, BETA[t])
        density = normal_density(grid, math.sqrt(1 - BETA[1]) * x0, BETA[1]) if t == 1 else kernel @ density
        density /= density.sum()
        read, mean = math.sqrt(ABAR[t]) * mean, (density * grid).sum()
        near(read, mean * math.sqrt(ABAR[t - 1]), 1e-9)
        assert t == 1 or abs(read - mean) > 0.009
        near(SHORT.perturb(column(x0), t, column(0.0)).item(), mean, 1e-9)
        spread = SHORT.perturb(column(x0), t, column(1.0)).item() - mean
        near(spread**2, (density * (grid - mean) ** 2).sum(), 1e-8)


@pytest.mark.parametrize("t", range(1, T + 1))
def test_e02_mean_of_the_step(t):
    """Reads (x_t − (1−ᾱ_t)/√(1−ᾱ_t)·ε)/√ᾱ_t, which is x̂_0; with α_t for two of the ᾱ_t it is μ_θ. Pointwise.

    With the true ε what is read gives x_0 itself, and μ̃_t by Bayes on a grid is another number, save at t = 1.
    """
    x0, eps = 0.8, 1.1
    xt, alpha, abar = noised(x0, eps, t), 1 - BETA[t], ABAR[t]
    read = (xt - (1 - abar) / math.sqrt(1 - abar) * eps) / math.sqrt(abar)
    holds = (xt - (1 - alpha) / math.sqrt(1 - abar) * eps) / math.sqrt(alpha)
    mean = bayes(xt, x0, t)[0] if t > 1 else x0
    near(read, x0)
    near(holds, mean, 1e-9)
    assert t == 1 or abs(read - mean) > 0.04
    near(ddpm_step(SHORT, column(xt), column(x0), t, t - 1), [[mean]], 1e-9)


def test_e02_samples(generator):
    """Reads x̂_0 for μ_θ: the samples' variance, from data N(0, 1) and the ideal ε, is below ½; 1 − β_1 holds with μ_θ.

    Of the law of the samples, exactly, by a recursion. Our sampler is measured on 40,000, within 5 errors.
    """
    n, read, holds = 40_000, 1.0, 1.0
    for t in range(T, 0, -1):
        added = BETA[t] if t > 1 else 0.0
        read, holds = ABAR[t] * read + added, (1 - BETA[t]) * holds + added  # for x̂_0 = √ᾱ_t·x_t and μ = √α_t·x_t
    near(holds, 1 - BETA[1])
    assert read < 0.5
    x = torch.randn(n, 1, generator=generator, dtype=torch.float64)
    x = last(ddpm(lambda xt, t: math.sqrt(ABAR[int(t)]) * xt, SHORT, x, SHORT.times(T), generator=generator))
    assert abs(x.var().item() - holds) < 5 * holds * math.sqrt(2 / n)


def test_e20_two_noises(generator):
    """Reads ε_t for one step's noise and for all the noise in x_t; their correlation is √(β_t/(1−ᾱ_t)). On average.

    Measured on 50,000 walks, within 5 errors. Training asks for all the noise: a network that says the last step's is
    off by 2(1 − correlation). At t = 1 the two are one variable, pointwise.
    """
    n = 50_000
    x0 = x = torch.where(torch.rand(n, 1, generator=generator) < 0.3, -1.0, 1.0).double()
    for t in range(1, T + 1):
        keep, var = SHORT.transition(t - 1, t)
        step = torch.randn(n, 1, generator=generator, dtype=torch.float64)
        x = keep * x + var.sqrt() * step
        total = SHORT.convert(x0, x, t, given="x0", to="eps")
        near(noised(x0, total, t), x)
        expected = math.sqrt(BETA[t] / (1 - ABAR[t]))
        measured = torch.corrcoef(torch.cat([step, total], 1).T)[0, 1].item()
        assert abs(measured - expected) < 5 * (1 - expected**2) / math.sqrt(n) + 1e-12
        assert (total - step).abs().max() < 1e-9 if t == 1 else measured < 0.95
        loss = simple(Denoiser(says(step), SHORT, "eps"), x0, t, total).item()
        gap = 2 * (1 - expected)
        assert abs(loss - gap) < 5 * gap * math.sqrt(2 / n) + 1e-12  # step − total is normal
        assert simple(Denoiser(says(total), SHORT, "eps"), x0, t, total).item() == 0


def test_e21_sum_of_normals(generator):
    """Reads that any two normals add their variances; independent ones do. x_2 = −x_1 gives 0, a random sign no normal.

    Of the law of the sum. Two steps that use one noise twice end with more variance than 1 − ᾱ_2, the kernel's.
    """
    n = 100_000
    one, other = torch.randn(2, n, generator=generator, dtype=torch.float64)
    sign = torch.where(torch.rand(n, generator=generator) < 0.5, -1.0, 1.0)
    assert (one + -one).var() == 0
    assert (one + sign * one == 0).double().mean().item() == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(n))
    error, var = 5 * math.sqrt(2 / n), SHORT.sigma(2).item() ** 2
    first, second = math.sqrt((1 - BETA[2]) * BETA[1]), math.sqrt(BETA[2])
    assert abs((first * one + second * other).var().item() / var - 1) < error
    assert (first * one + second * one).var().item() / var > 1.5
    near(var, first**2 + second**2)


# E3, E4: the last term ------------------------------------------------------------------------------------------------


def test_e03_sign_of_the_last_term():
    """Reads log p(x_0|x_1) = +(x_0 − μ)²/(2σ_1²) + C; the sign is minus, pointwise, and the loss −log p has the plus.

    With the minus exp is a density; with the plus, and the same C, its integral has no bound.
    """
    x0, mean, std = torch.linspace(-1, 1.6, 4001, dtype=torch.float64)[:, None], 0.3, math.sqrt(BETA[1])
    loss = bound_term(says(torch.full_like(x0, mean)), SHORT, x0, x0, 0, 1)
    square, constant = (x0[:, 0] - mean) ** 2 / (2 * BETA[1]), -math.log(std * math.sqrt(2 * math.pi))
    near(-loss, constant - square)
    near(-loss, normal(mean, std).log_prob(x0)[:, 0])
    near(torch.trapezoid((-loss).exp(), x0[:, 0]), 1.0)
    assert torch.trapezoid((constant + square).exp(), x0[:, 0]) > 1e30


def test_e04_weight_of_the_last_term():
    """Reads the weights 1/(2β̃_1) and β_1²/(2β̃_1·α_1·(1−ᾱ_1)): β̃_1 = 0 as ᾱ_0 = 1, so both are infinite.

    In a limit they diverge, as ᾱ_0 → 1 shows. With σ_1² = β_1 the weight of the noise is 1/(2α_1), pointwise.
    """
    assert TILDE[1] == 0 and SHORT.bridge(0, 1)[2] == 0 and SHORT.posterior(column(0.2), column(0.7), 0, 1)[1] == 0
    for before in (1 - 1e-3, 1 - 1e-6, 1 - 1e-9):
        tilde = BETA[1] * (1 - before) / (1 - before * (1 - BETA[1]))
        assert 1 / (2 * tilde) > 0.49 / (1 - before)
        assert BETA[1] ** 2 / (2 * tilde * (1 - BETA[1]) * BETA[1]) > 0.49 * BETA[1] / (1 - before)
    assert 0 < TILDE_LONG[2] < BETA_LONG[1]  # β̃ clipped from below by β̃_2 is a finite choice too
    x0, eps, eps_hat = 0.7, 0.4, -0.5
    x1 = noised(x0, eps, 1)
    x0_hat = (x1 - math.sqrt(1 - ABAR[1]) * eps_hat) / math.sqrt(ABAR[1])
    expected = (eps - eps_hat) ** 2 / (2 * (1 - BETA[1])) + 0.5 * math.log(2 * math.pi * BETA[1])
    for variance in ("beta", "posterior"):
        near(bound_term(says(column(x0_hat)), SHORT, column(x0), column(x1), 0, 1, variance=variance), [expected])


@pytest.mark.parametrize("bins", [2, 256])
@pytest.mark.parametrize("variance", ["beta", "posterior"])
@pytest.mark.parametrize("path, beta", [(SHORT, BETA[1]), (LONG, BETA_LONG[1])], ids=["short", "long"])
def test_e04_grey_levels(bins, variance, path, beta):
    """Reads σ² = β̃_1 = 0, for which no level but one has mass; with β_1 all costs are finite, the masses add up to 1.

    Pointwise, for the decoder over grey levels, against torch's distribution function.
    """
    x0, mean = torch.linspace(-1, 1, bins, dtype=torch.float64)[:, None], 0.41
    nats = bound_term(says(torch.full_like(x0, mean)), path, x0, x0, 0, 1, variance=variance, bins=bins)
    assert nats.isfinite().all()
    near((-nats).exp().sum(), 1.0)
    edges = torch.cat([x0.new_tensor([-math.inf]), (x0[1:, 0] + x0[:-1, 0]) / 2, x0.new_tensor([math.inf])])
    near((-nats).exp(), normal(mean, math.sqrt(beta)).cdf(edges).diff(), 1e-9)


# E5, E31: a divergence of two normals ---------------------------------------------------------------------------------


@EVERY_T
@pytest.mark.parametrize("d", [1, 3])
def test_e05_any_variance(t, d, generator):
    """Reads KL = ‖μ̃−μ_θ‖²/(2β̃) + C for either Σ_θ; 1/(2σ²) and C = (d/2)(β̃/σ² − 1 − log(β̃/σ²)) hold. Pointwise.

    With Σ_θ = β_t no C mends what is read: the gradient in θ is too large by β_t/β̃_t, another factor at each t. For
    Σ_θ = β̃_t it is right, and C = 0 there and nowhere else.
    """
    x0, x0_hat, eps = torch.randn(3, 1, d, generator=generator, dtype=torch.float64)
    xt, tilde = noised(x0, eps, t), TILDE[t]
    mean_q, mean_p = (
        torch.tensor([bayes(*pair, t)[0] for pair in torch.cat([xt, y]).T.tolist()]) for y in (x0, x0_hat)
    )
    square, q = ((mean_q - mean_p) ** 2).sum().item(), normal(mean_q, math.sqrt(tilde))
    for var in (tilde, BETA[t], 0.6 * tilde, 3 * BETA[t]):
        constant = d / 2 * (tilde / var - 1 - math.log(tilde / var))
        near(kl_divergence(q, normal(mean_p, math.sqrt(var))).sum(), square / (2 * var) + constant, 1e-7)
        assert constant == 0 if var == tilde else constant > 0
    for variance, var in (("beta", BETA[t]), ("posterior", tilde)):
        exact, off = (bound_term(says(y), SHORT, x0, xt, t - 1, t, variance=variance).item() for y in (x0, x0_hat))
        near(off - exact, square / (2 * var), 1e-7)
        near(exact, d / 2 * (tilde / var - 1 - math.log(tilde / var)))
    wide = [kl_divergence(q, normal(mean, math.sqrt(BETA[t]))).sum().item() for mean in (mean_p, mean_q)]
    too_large = square / (2 * tilde) / (wide[0] - wide[1])
    assert (too_large > 4 if t == 2 else too_large > 1.02) and (t < T or too_large < 1.1)


@EVERY_T
def test_e31_brackets_of_a_divergence(t):
    """Reads log(√Σ/√β̃)·exp(…); log[(√Σ/√β̃)^d·exp(…)] has the mean that is the divergence. On average over q.

    For Σ = β̃ what is read is 0 whatever the means; without the power d, log Σ/β̃ is counted once and not d times.
    """
    x0, x0_hat, xt = 0.7, -0.6, 0.2
    (mean_q, _), (mean_p, _) = bayes(xt, x0, t), bayes(xt, x0_hat, t)
    x = mean_q + math.sqrt(TILDE[t]) * NODES
    for variance, var in (("beta", BETA[t]), ("posterior", TILDE[t])):
        exponent = -0.5 * ((x - mean_q) ** 2 / TILDE[t] - (x - mean_p) ** 2 / var)
        log_ratio = 0.5 * math.log(var / TILDE[t])
        holds, read = (WEIGHTS * (log_ratio + exponent)).sum(), (WEIGHTS * log_ratio * np.exp(exponent)).sum()
        term = bound_term(says(column(x0_hat)), SHORT, column(x0), column(xt), t - 1, t, variance=variance).item()
        near(term, holds, 1e-8)
        assert abs(read - term) > 0.01 and (variance == "beta" or read == 0)
        three = [torch.full((1, 3), value, dtype=torch.float64) for value in (x0_hat, x0, xt)]
        term = bound_term(says(three[0]), SHORT, *three[1:], t - 1, t, variance=variance).item()
        near(term, 3 * log_ratio + 3 * (WEIGHTS * exponent).sum(), 1e-8)
        assert variance == "posterior" or term - (log_ratio + 3 * (WEIGHTS * exponent).sum()) > 0.04


def test_e31_brackets_of_the_bound():
    """Reads E[log q(x_{1:T}|x_0) − log p(x_T)∏p]; with log[p(x_T)∏p] it is the sum of the three terms.

    On average over q, at each x_0. Two steps and x̂_0 = c·x_t, by quadrature over (x_1, x_2).
    """
    path, (beta, abar, _), x0, c = DiscretePath([0.3, 0.6]), table([0.3, 0.6]), 0.8, 0.5
    z1, z2 = np.meshgrid(NODES, NODES, indexing="ij")
    x1 = math.sqrt(abar[1]) * x0 + math.sqrt(1 - abar[1]) * z1
    x2 = math.sqrt(1 - beta[2]) * x1 + math.sqrt(beta[2]) * z2
    of_x2 = math.sqrt(1 - beta[2]) * (1 - abar[1]) / (1 - abar[2]) + math.sqrt(abar[1]) * beta[2] / (1 - abar[2]) * c
    q = normal_density(x1, math.sqrt(abar[1]) * x0, beta[1]) * normal_density(x2, math.sqrt(1 - beta[2]) * x1, beta[2])
    start = normal_density(x2, 0, 1)
    rest = normal_density(x1, of_x2 * x2, beta[2]) * normal_density(x0, c * x1, beta[1])
    weights = np.outer(WEIGHTS, WEIGHTS)
    holds = (weights * (np.log(q) - np.log(start * rest))).sum()
    read = (weights * (np.log(q) - np.log(start) * rest)).sum()
    near(mean_bound(path, x0, lambda xt, t: c * xt), holds)
    assert abs(read - holds) > 1


def test_e31_index_of_the_product():
    """Reads ᾱ_t = ∏ α'_t with the outer index, literally α_t^t; ∏ α_{t'} holds. Pointwise; equal for constant α."""
    for t in range(1, T + 1):
        near(SHORT.alpha_bars[t], math.prod(1 - BETA[i] for i in range(1, t + 1)), 1e-13)
        assert t == 1 or SHORT.alpha_bars[t] - (1 - BETA[t]) ** t > 0.02
    near(DiscretePath([0.1] * 5).alpha_bars[5], 0.9**5, 1e-13)


# E6: the bound --------------------------------------------------------------------------------------------------------


def mean_bound(path, x0, d, variance="beta"):
    """The bound at one x_0 with our terms; each mean over x_t by quadrature, exact for a denoiser linear in x_t."""
    clean, total = torch.full((len(NODES), 1), x0, dtype=torch.float64), prior_term(path, column(x0), path.T).item()
    for t in range(1, path.T + 1):
        xt = path.perturb(clean, t, column(*NODES))
        total += (WEIGHTS * bound_term(d, path, clean, xt, t - 1, t, variance=variance).numpy()).sum()
    return total


def test_e06_equality():
    """Reads E[−log p(x_0)] < E[log q(x_{1:T}|x_0) − log p(x_{0:T})]; ≤ holds. With q's own reverse model it is =.

    Data N(m, s²): each q(x_{t−1}|x_t) is normal, by regression. Equal at each x_0, and so on average.
    """
    m, s2 = 0.7, 0.3
    mean, var = np.sqrt(ABAR) * m, ABAR * s2 + 1 - ABAR  # of x_t
    for x0 in (-1.0, 0.4, 2.0):
        at, spread = np.sqrt(ABAR) * x0, 1 - ABAR  # of x_t given x_0
        total = 0.5 * ((spread[T] + (at[T] - mean[T]) ** 2) / var[T] - 1 - math.log(spread[T] / var[T]))
        for t in range(1, T + 1):
            root = math.sqrt(1 - BETA[t])
            slope, left = root * var[t - 1] / var[t], BETA[t] * var[t - 1] / var[t]  # q(x_{t−1}|x_t), regression
            gain, rest = root * spread[t - 1] / spread[t], TILDE[t]  # the same given x_0
            off = at[t - 1] - mean[t - 1] - slope * (at[t] - mean[t])
            square = off**2 + (gain - slope) ** 2 * spread[t]  # E (μ̃ − μ)² over x_t given x_0
            entropy = math.log(2 * math.pi) if t == 1 else -1 - math.log(rest)
            total += 0.5 * ((square + rest) / left + math.log(left) + entropy)
        near(total, -normal(m, math.sqrt(s2)).log_prob(torch.tensor(x0, dtype=torch.float64)))


def test_e06_sign():
    """Reads "ELBO" at KL[q(z|x) ‖ p(z)] − E_q[log p(x|z)]; it is −ELBO, no lower bound of log p(x). Pointwise in x.

    z ~ N(0, 1) and x|z ~ N(z, ½): never below −log p(x), and equal to it for the true q(z|x) = N(2x/3, ⅓) alone.
    """
    x, nll = 0.9, -normal(0, math.sqrt(1.5)).log_prob(torch.tensor(0.9, dtype=torch.float64)).item()
    for mean, var in ((2 * x / 3, 1 / 3), (2 * x / 3, 0.5), (0.0, 1 / 3), (1.0, 1.0)):
        z = torch.from_numpy(mean + math.sqrt(var) * NODES)
        kl = kl_divergence(normal(mean, math.sqrt(var)), normal(0, 1)).item()
        value = kl - (WEIGHTS * normal(z, math.sqrt(0.5)).log_prob(torch.tensor(x, dtype=torch.float64)).numpy()).sum()
        assert value > nll + 0.01 if (mean, var) != (2 * x / 3, 1 / 3) else abs(value - nll) < 1e-10
        assert value > -nll + 1  # above log p(x) itself


@pytest.mark.parametrize("factor, variance", [(1.0, "beta"), (0.7, "beta"), (1.0, "posterior")])
@pytest.mark.parametrize("x0", [0.4, -1.3])
def test_e06_gap(factor, variance, x0, generator):
    """Reads <; the gap is KL(q(x_{1:T}|x_0) ‖ p(x_{1:T}|x_0)), 0 for p = q and only then. At each x_0.

    Data N(0, 1), where Σ_θ = β and x̂_0 = √ᾱ_t·x_t make p = q; with 0.7 of that x̂_0, or with Σ_θ = β̃, it is strict.
    p is a normal law of T + 1 variables, conditioned by linear algebra; `likelihood.bound` is within 5 errors of that.
    """

    def d(xt, t):
        return factor * math.sqrt(ABAR[int(t)]) * xt

    mix = np.eye(T + 1)  # row t: x_t as a sum of T + 1 independent noises, those of x_0|x_1, …, x_{T−1}|x_T, and x_T
    for t in range(T, 0, -1):
        keep = math.sqrt(1 - BETA[t]) * (1 - ABAR[t - 1]) / (1 - ABAR[t])
        pull = math.sqrt(ABAR[t - 1]) * BETA[t] / (1 - ABAR[t])
        slope = keep + pull * factor * math.sqrt(ABAR[t])
        var = BETA[t] if variance == "beta" or t == 1 else TILDE[t]
        mix[t - 1] = slope * mix[t] + math.sqrt(var) * np.eye(T + 1)[t - 1]
    cov = mix @ mix.T
    given = cov[1:, 0] / cov[0, 0]
    p = MultivariateNormal(torch.from_numpy(given * x0), torch.from_numpy(cov[1:, 1:] - np.outer(given, cov[0, 1:])))
    lower, upper = (f.outer(np.arange(1, T + 1), np.arange(1, T + 1)) for f in (np.minimum, np.maximum))
    q_cov = np.sqrt(ABAR[upper] / ABAR[lower]) * (1 - ABAR[lower])
    q = MultivariateNormal(torch.from_numpy(np.sqrt(ABAR[1:]) * x0), torch.from_numpy(q_cov))
    nll = 0.5 * (x0**2 / cov[0, 0] + math.log(2 * math.pi * cov[0, 0]))
    gap = kl_divergence(q, p).item()
    assert abs(gap) < 1e-10 if (factor, variance) == (1, "beta") else gap > 0.05
    near(mean_bound(SHORT, x0, d, variance), nll + gap, 1e-9)
    x0 = torch.full((40_000, 1), x0, dtype=torch.float64)
    draws = bound(d, SHORT, x0, SHORT.times(T), variance=variance, generator=generator).sum(0)
    assert abs(draws.mean().item() - nll - gap) < 5 * draws.std().item() / math.sqrt(40_000)


# E7, E25: schedules and times -----------------------------------------------------------------------------------------


WEAK = torch.linspace(1e-5, 1e-3, 100, dtype=torch.float64)  # α_t decreases, and 95 % of x_0's variance is left at T
SCHEDULES = {
    "constant": (constant_betas(100), True),
    "α increasing": (linear_betas(100).flip(0), True),
    "linear": (linear_betas(100), True),
    "quadratic": (quadratic_betas(100), True),
    "cosine": (cosine_betas(100), True),
    "α decreasing, ᾱ_T = 0.95": (WEAK, False),
}


def samples(path, generator):
    """4,000 from N(0, 1) by all steps of a path, for data 0.8·N(1, 0.1²) + 0.2·N(−1, 0.1²) and their ideal denoiser."""
    law = GaussianMixture(column(1.0, -1.0), 0.01, torch.tensor([0.8, 0.2]))
    x = torch.randn(4000, 1, generator=generator, dtype=torch.float64)
    return last(ddpm(law.denoiser(path), path, x, path.times(path.T), generator=generator))


@pytest.mark.parametrize("name", SCHEDULES)
def test_e07_decreasing(name, generator):
    """Reads that α_t must decrease; ᾱ_T ≈ 0 is what is needed, and ᾱ_t decreases by itself, pointwise, if 0 < α_t < 1.

    Of a law with 80 % on the right, the ideal denoiser samples 80 % from noise with a constant or increasing α_t
    (within 5 errors of 4,000 samples), and not with a decreasing α_t that leaves the data in x_T.
    """
    betas, enough = SCHEDULES[name]
    path, abar = DiscretePath(betas), np.cumprod(1 - betas.numpy())
    assert (np.diff(1 - betas.numpy()) < 0).all() == (name not in ("constant", "α increasing"))
    near(path.alpha_bars[1:], abar)
    assert (path.alpha_bars.diff() < 0).all()
    cost = prior_term(path, column(1.0), 100).item()
    near(cost, 0.5 * (abar[-1] + (1 - abar[-1]) - 1 - math.log(1 - abar[-1])))
    assert cost < 1e-3 if enough else cost > 1
    share = (samples(path, generator) > 0).double().mean().item()
    assert abs(share - 0.8) < 5 * math.sqrt(0.16 / 4000) if enough else share < 0.7


def test_e07_one_step(generator):
    """0 < α_t < 1 and ᾱ_T ≈ 0 are not enough for good samples either: in a limit, the steps must be small as well.

    One step from ᾱ_1 = 10⁻⁴ ends near the data's mean 0.6, with no spread, where the data have variance 0.65.
    """
    path = DiscretePath([1 - 1e-4])
    assert prior_term(path, column(1.0), 1).item() < 1e-3
    drawn = samples(path, generator)
    assert abs(drawn.mean().item() - 0.6) < 0.01 and drawn.var().item() < 0.01
    assert samples(DiscretePath(linear_betas(100)), generator).var().item() == pytest.approx(0.65, abs=0.06)


def test_e25_whole_times():
    """Reads t ∼ Uniform(0, T); Uniform{1, …, T} holds: between whole times there is no β_t, and x_0 holds no noise.

    Of the law of t: each whole time equally often, in one large batch exactly, in 2,000 of size 1 within 5 errors.
    """
    times = batches(torch.zeros(1000, 1), SHORT, size=1000)(0)["t"]
    assert not times.is_floating_point()
    assert times.bincount(minlength=T + 1).tolist() == [0] + [1000 // T] * T
    single = batches(torch.zeros(1, 1), SHORT, size=1)
    counts = torch.cat([single(step)["t"] for step in range(2000)]).bincount(minlength=T + 1)
    assert len(counts) == T + 1 and counts[0] == 0
    assert (counts[1:] - 2000 / T).abs().max() < 5 * math.sqrt(2000 / T * (1 - 1 / T))
    with pytest.raises(ValueError, match="^t must be a whole number"):
        SHORT.perturb(column(1.0), math.pi, column(1.0))
    assert SHORT.perturb(column(1.0), 0, column(5.0)).item() == 1


def test_e25_sum_is_a_multiple_of_the_mean():
    """Reads the mean over t for Σ_t; the sum is T times it. An identity; the gradient in θ keeps its direction."""
    weight = np.concatenate([[np.nan, 1.0], BETA[2:] ** 2 / (2 * TILDE[2:] * (1 - BETA[2:]) * (1 - ABAR[2:]))])
    batch = batches(torch.zeros(1000, 1, dtype=torch.float64), SHORT, size=1000)(0)
    off_by_one = Denoiser(lambda xt, t: batch["eps"] + 1, SHORT, "eps")
    mean = simple(off_by_one, **batch, weight=torch.from_numpy(weight)[batch["t"]]).item()
    near(T * mean, weight[1:].sum())


# E15: completing the square -------------------------------------------------------------------------------------------


def test_e15_completing_the_square():
    """Reads b without x_0 and of the other sign, and drops the remainder; with −b and x_0 it is 0, identically.

    In sympy: what is read does not add up to the exponent, its square has another centre, and something is left over.
    """
    x, xt, x0 = sympy.symbols("x x_t x_0", real=True)
    alpha, before = sympy.symbols("alpha_t alphabar_s", positive=True)
    beta, abar = 1 - alpha, alpha * before
    ends = x0**2 * before / (1 - before) + xt**2 / beta - (xt - sympy.sqrt(abar) * x0) ** 2 / (1 - abar)
    exponent = (xt - sympy.sqrt(alpha) * x) ** 2 / beta + (x - sympy.sqrt(before) * x0) ** 2 / (1 - before)
    exponent -= (xt - sympy.sqrt(abar) * x0) ** 2 / (1 - abar)
    a, last_term = alpha / beta + 1 / (1 - before), 2 * sympy.sqrt(before) / (1 - before)
    read = 2 * sympy.sqrt(alpha) / beta * xt + last_term
    b = -(2 * sympy.sqrt(alpha) / beta * xt + last_term * x0)
    assert sympy.simplify(a * x**2 + b * x + ends - exponent) == 0
    assert sympy.simplify(ends - b**2 / (4 * a)) == 0
    off = sympy.simplify(a * x**2 - read * x + ends - exponent)
    assert sympy.simplify(off - last_term * (x0 - 1) * x) == 0  # even with −b it is the exponent for x_0 = 1 alone
    assert sympy.simplify(ends - read**2 / (4 * a)) != 0
    for t in range(2, T + 1):
        values = {alpha: 1 - BETA[t], before: ABAR[t - 1], xt: 0.4, x0: 1.3}
        centre, width = (float(part.subs(values)) for part in (-b / (2 * a), 1 / a))
        mean, var = SHORT.posterior(column(0.4), column(1.3), t - 1, t)
        near([mean.item(), var.item()], [centre, width], 1e-9)
        near([mean.item(), var.item()], bayes(0.4, 1.3, t), 1e-9)
        for wrong in (-read / (2 * a), read / (2 * a), b / (2 * a)):  # as it is read; with −b alone; with x_0 alone
            assert abs(float(wrong.subs(values)) - mean.item()) > 0.05


# E19: the reverse variance --------------------------------------------------------------------------------------------


def reverse_variance(means, variances, weights, t, xt=None):
    """Var(x_{t−1} | x_t) on the long chain, for a mixture as data: at x_t, or its mean over x_t. All on grids."""
    keep, beta, before = math.sqrt(1 - BETA_LONG[t]), BETA_LONG[t], ABAR_LONG[t - 1]
    at, spread = np.sqrt(before) * np.array(means), before * np.array(variances) + 1 - before
    reach = np.abs(at).max() + 8 * np.sqrt(spread.max())
    x = np.linspace(-reach, reach, 2001)
    prior = (np.array(weights) * normal_density(x[:, None], at, spread)).sum(1)
    y = np.array([xt]) if xt is not None else x
    joint = prior * normal_density(y[:, None], keep * x, beta)
    mass = joint.sum(1) + 1e-300
    first, second = joint @ x / mass, joint @ x**2 / mass
    return ((second - first**2) * mass).sum() / mass.sum()


LAWS = {  # means, variances, weights; then the sign of E Var − β_t and of E Var − β̃_t
    "N(0, 1)": ([0.0], [1.0], [1.0], 0, 1),
    "a point": ([0.6], [0.0], [1.0], -1, 0),
    "±1": ([-1.0, 1.0], [0.0, 0.0], [0.5, 0.5], -1, 1),
    "N(0, ¼)": ([0.0], [0.25], [1.0], -1, 1),
    "three bumps": ([-1.0, 0.1, 0.9], [0.01, 0.04, 0.02], [0.3, 0.5, 0.2], -1, 1),
    "N(0, 4)": ([0.0], [4.0], [1.0], 1, 1),
}


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("t", [10, 100, 1000])
def test_e19_average(name, t):
    """Reads β_t an upper, β̃_t a lower bound of the reverse variance; they are on average over x_t and for Var x_0 ≤ 1.

    N(0, 1) and a point attain them, exactly. For N(0, 4) the upper one breaks. Strict at t = 100; near the data ±1 is
    two points that cannot be confused, and near the noise all laws are alike, within rounding.
    """
    *law, above_beta, above_tilde = LAWS[name]
    mean = reverse_variance(*law, t)
    step, (*_, tilde) = LONG.transition(t - 1, t)[1].item(), LONG.bridge(t - 1, t)
    near([step, tilde], [BETA_LONG[t], TILDE_LONG[t]])
    for limit, sign in ((step, above_beta), (tilde.item(), above_tilde)):
        ratio = mean / limit - 1
        assert abs(ratio) < 1e-9 if sign == 0 else sign * ratio > (1e-7 if t == 100 else -1e-9)


def test_e19_pointwise():
    """Reads bounds for q(x_{t−1}|x_t); at one x_t the lower one holds, the upper one need not. Pointwise.

    Data ±1, x_t = 0, t = 10 of 1,000: Var(x_{t−1}|x_t)/β_t is 78.5, by Bayes on a grid, and by our kernel's
    β̃_t + pull²·Var(x_0|x_t) with Var(x_0|x_t) from the slope of the ideal denoiser.
    """
    law, xt = GaussianMixture(column(-1.0, 1.0), 0.0), column(0.0, 0.9).requires_grad_()
    alpha, sigma = LONG.alpha(10), LONG.sigma(10)
    (slope,) = torch.autograd.grad(law.denoiser(LONG)(xt, 10).sum(), xt)
    _, pull, tilde = LONG.bridge(9, 10)
    ours = (tilde + pull**2 * sigma**2 / alpha * slope)[:, 0]
    exact = [reverse_variance([-1.0, 1.0], [0.0, 0.0], [0.5, 0.5], 10, at) for at in (0.0, 0.9)]
    near(ours / TILDE_LONG[10], np.array(exact) / TILDE_LONG[10], 1e-7)
    assert exact[0] / BETA_LONG[10] == pytest.approx(78.5, abs=0.05)
    assert exact[1] < BETA_LONG[10]
    for at in (0.0, 0.3, 1.0, 2.5):
        assert reverse_variance([-1.0, 1.0], [0.0, 0.0], [0.5, 0.5], 100, at) > TILDE_LONG[100] * (1 - 1e-9)


def test_e19_gap():
    """Reads that the gap is "extremely small when diffusion step is large": in the limit of many steps, at a fixed t/T.

    (β_t − β̃_t)/β_t falls like 1/T there; at t = 1 it is whole for every T.
    """
    gaps = {}
    for steps in (100, 1000, 10_000):
        path, (beta, _, tilde) = DiscretePath(linear_betas(steps)), table(np.linspace(0.1, 20, steps) / steps)
        gaps[steps] = [(1 - path.bridge(t - 1, t)[2] / path.transition(t - 1, t)[1]).item() for t in (1, steps // 10)]
        near(gaps[steps], [1 - tilde[t] / beta[t] for t in (1, steps // 10)], 1e-9)
        assert gaps[steps][0] == 1
    for steps in (100, 1000):
        assert gaps[steps][1] / gaps[10 * steps][1] == pytest.approx(10, rel=0.3)
    assert gaps[100][1] > 0.1 > 0.002 > gaps[10_000][1]


# E22: one letter ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [2, 10, 500, 1000])
def test_e22_three_sigmas(t):
    """Reads σ for √(1−ᾱ_t), for the reverse step's deviation and for DDIM's: three numbers. Pointwise.

    The second is √β_t or √β̃_t, a choice. The third is η·√β̃_t: 0 for η = 0, and the second for η = 1 and Σ_θ = β̃.
    """

    def noise_of(step, **choice):
        still, moved = (step(LONG, column(0.3), column(0.5), t, t - 1, noise=column(z), **choice) for z in (0.0, 1.0))
        return (moved - still).item()

    near(LONG.sigma(t), math.sqrt(1 - ABAR_LONG[t]))
    near(noise_of(ddpm_step), math.sqrt(BETA_LONG[t]))
    near(noise_of(ddpm_step, variance="posterior"), math.sqrt(TILDE_LONG[t]))
    for eta in (0.0, 0.5, 1.0):
        near(noise_of(ddim_step, eta=eta), eta * math.sqrt(TILDE_LONG[t]))
    sigmas = [LONG.sigma(t).item(), noise_of(ddpm_step), noise_of(ddim_step, eta=0.5)]
    assert all(first / second > 1.1 for first, second in zip(sigmas[:-1], sigmas[1:], strict=True))


# E8, E9, E16, E26: score matching -------------------------------------------------------------------------------------

LAW_WEIGHTS, LAW_MEANS, LAW_STDS = np.array([0.3, 0.7]), np.array([-1.0, 0.6]), np.array([0.4, 0.25])
AT = 7  # a time of the short chain with as much noise as signal
SCORES = {  # s_θ and its slope in θ, at θ = 1
    "−x": (lambda x: -x, lambda x: -x),
    "tanh": (lambda x: -2 * np.tanh(x) + 0.3, lambda x: -2 * np.tanh(x)),
    "x²": (lambda x: 0.2 * x**2 - x, lambda x: 0.2 * x**2),
}


def law_on_grids():
    """x_t and its weights p_t·dx; ∇log p_t; Var(−ε/σ_t | x_t). By Bayes: p(x_0) times p(x_t|x_0) on 2,001 × 1,201 points."""
    x0, x = np.linspace(-4, 4, 2001), np.linspace(-7, 7, 1201)
    prior = (LAW_WEIGHTS * normal_density(x0[:, None], LAW_MEANS, LAW_STDS**2)).sum(1)
    joint = prior * normal_density(x[:, None], math.sqrt(ABAR[AT]) * x0, 1 - ABAR[AT])
    joint *= (x0[1] - x0[0]) * (x[1] - x[0])
    conditional = -(x[:, None] - math.sqrt(ABAR[AT]) * x0) / (1 - ABAR[AT])
    p = joint.sum(1)
    mean = (joint * conditional).sum(1) / p
    return x, p, mean, (joint * (conditional - mean[:, None]) ** 2).sum(1) / p, joint, conditional


def law_by_nodes():
    """(x_0, ε, weights) for the kernel: both components, 80 nodes for x_0 and 80 for ε."""
    k, i, j = (index.ravel() for index in np.meshgrid(range(2), range(80), range(80), indexing="ij"))
    weights = LAW_WEIGHTS[k] * WEIGHTS[i] * WEIGHTS[j]
    return column(*(LAW_MEANS[k] + LAW_STDS[k] * NODES[i])), column(*NODES[j]), torch.from_numpy(weights)


def mean_dsm(score):
    """Twice our DSM at AT, as the slide has no ½: over the law, by quadrature."""
    x0, eps, weights = law_by_nodes()
    d = Denoiser(lambda xt, t: torch.from_numpy(score(xt.numpy())), SHORT, "score")
    return 2 * dsm(d, x0, AT, eps, len(weights) * weights).item()


def test_e08_four_lines_and_the_missing_one():
    """Reads four lines with ∇log p_t(x_t) for target: they are equal, for every s_θ, and none can be trained on.

    The step that matters is missing: ∇log p(x_t|x_0) put in adds E Var(∇log p(x_t|x_0) | x_t) ≥ 0, the same number for every
    θ. The values differ, the gradients in θ do not. On average over x_0 and x_t.
    """
    x, p, marginal, spread, joint, conditional = law_on_grids()
    x0, eps, weights = law_by_nodes()
    xt = (math.sqrt(ABAR[AT]) * x0 + math.sqrt(1 - ABAR[AT]) * eps)[:, 0].numpy()
    var = ABAR[AT] * LAW_STDS**2 + 1 - ABAR[AT]
    each = LAW_WEIGHTS * normal_density(xt[:, None], math.sqrt(ABAR[AT]) * LAW_MEANS, var)
    at_nodes = -(each * (xt[:, None] - math.sqrt(ABAR[AT]) * LAW_MEANS) / var).sum(1) / each.sum(1)
    added = (p * spread).sum()
    assert added > 0.1
    for score, slope in SCORES.values():
        single = (p * (score(x) - marginal) ** 2).sum()  # lines 1 and 2
        double = (joint * ((score(x) - marginal) ** 2)[:, None]).sum()  # line 3
        drawn = (weights.numpy() * (score(xt) - at_nodes) ** 2).sum()  # line 4
        near([double, drawn], [single, single], 1e-7)
        trained = (joint * (score(x)[:, None] - conditional) ** 2).sum()
        near(trained, single + added, 1e-7)
        near(mean_dsm(score), single + added, 1e-7)
        gradients = [
            (p * 2 * (score(x) - marginal) * slope(x)).sum(),
            (joint * 2 * (score(x)[:, None] - conditional) * slope(x)[:, None]).sum(),
        ]
        near(gradients[0], gradients[1], 1e-7)
        ahead, behind = (mean_dsm(lambda x, s=score, d=slope, h=h: s(x) + h * d(x)) for h in (1e-4, -1e-4))
        near((ahead - behind) / 2e-4, gradients[0], 1e-6)


def test_e09_target():
    """Reads the target ∇log p_t(x_t), which nobody knows; what Algorithm 3 can use is −ε/σ_t, a draw around it.

    Pointwise the two differ, in the square by half of what the score itself is large; on average given x_t they are equal. So
    our DSM is 0 for a network that says −ε/σ_t, and not for one that says the right score.
    """
    x, p, marginal, spread, *_ = law_on_grids()
    var = ABAR[AT] * LAW_STDS**2 + 1 - ABAR[AT]
    each = LAW_WEIGHTS * normal_density(x[:, None], math.sqrt(ABAR[AT]) * LAW_MEANS, var)
    exact = -(each * (x[:, None] - math.sqrt(ABAR[AT]) * LAW_MEANS) / var).sum(1) / each.sum(1)
    inner = np.abs(x) < 3
    near(marginal[inner], exact[inner], 1e-6)  # E[−ε/σ | x_t] by Bayes is ∇log p_t
    assert (p * spread).sum() > 0.4 * (p * marginal**2).sum()
    x0, eps, weights = law_by_nodes()
    target = -eps / math.sqrt(1 - ABAR[AT])
    assert dsm(Denoiser(says(target), SHORT, "score"), x0, AT, eps).item() < 1e-24

    def right(x):
        each = LAW_WEIGHTS * normal_density(x, math.sqrt(ABAR[AT]) * LAW_MEANS, var)
        return (-(each * (x - math.sqrt(ABAR[AT]) * LAW_MEANS) / var).sum(1) / each.sum(1))[:, None]

    near(mean_dsm(right), (p * spread).sum(), 1e-7)


@pytest.mark.parametrize("kind, minimiser", [("normal", -1.0), ("signs", -1.0), ("length one", -1 / 3)])
def test_e16_which_directions(kind, minimiser):
    """Reads ½‖s‖² for any p_v; E vvᵀ = I is needed. With ‖v‖ = 1 the minimiser for N(0, I) is −x/d. On average over x, v.

    Of s = a·x in d = 3, by quadrature. With ½(vᵀs)² in its place the minimiser is −x for all three.
    """
    d, (nodes, weights) = 3, np.polynomial.hermite_e.hermegauss(3)
    grid = torch.from_numpy(np.stack(np.meshgrid(*[nodes] * d, indexing="ij"), -1).reshape(-1, d))
    mass = torch.from_numpy(np.prod(np.stack(np.meshgrid(*[weights / weights.sum()] * d), -1).reshape(-1, d), 1))
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * d)
    v, of_v = {
        "normal": (grid, mass),
        "signs": (signs, torch.full((8,), 1 / 8).double()),
        "length one": (signs / math.sqrt(3), torch.full((8,), 1 / 8).double()),
    }[kind]
    second = torch.einsum("n,ni,nj->ij", of_v, v, v)
    near(second, np.eye(d) * (1 / 3 if kind == "length one" else 1))
    x, v, weight = grid.repeat_interleave(len(v), 0), v.repeat(len(grid), 1), (mass[:, None] * of_v).flatten()
    for reduced, expected in ((True, minimiser), (False, -1.0)):
        values = []
        for a in (-1.0, 0.0, 1.0):  # the loss is a parabola in a
            network = Denoiser(lambda xt, t, a=a: a * xt, SHORT, "score")
            values.append(ssm(network, x, 0, 0 * x, v, len(x) * weight, reduced=reduced).item())
        low, zero, high = values
        near(-(high - low) / 2 / (high - 2 * zero + low), expected)


def test_e26_up_to_a_constant():
    """Reads ⇔ between ½E‖s − ∇log p‖² and E[tr ∇s + ½‖s‖²]; they differ by ½E‖∇log p‖². At each s, on average over x."""
    x = np.linspace(-6, 6, 4001)
    p = (LAW_WEIGHTS * normal_density(x[:, None], LAW_MEANS, LAW_STDS**2)).sum(1)
    slope = -(
        LAW_WEIGHTS * normal_density(x[:, None], LAW_MEANS, LAW_STDS**2) * (x[:, None] - LAW_MEANS) / LAW_STDS**2
    ).sum(1)
    fisher = 0.5 * np.trapezoid(slope**2 / p, x)
    weight = torch.from_numpy(len(x) * p * (x[1] - x[0]))
    for a, b in ((1.0, 0.5), (-2.0, 1.0), (0.0, 3.0)):
        explicit = 0.5 * np.trapezoid(p * (a * np.sin(b * x) - x - slope / p) ** 2, x)
        d = Denoiser(lambda xt, t, a=a, b=b: a * torch.sin(b * xt) - xt, SHORT, "score")
        implicit = esm(d, column(*x), 0, 0 * column(*x), weight).item()
        near(explicit - implicit, fisher, 1e-7)
        assert fisher > 1


def test_e26_boundary():
    """Reads ⇔ without conditions; p·s must vanish at the edge. For uniform data on [−1, 1] the two have other minimisers.

    ∇log p = 0 inside, so that s = 0 is best; of s = a·x the trace form finds a = −1/E x² = −3, the score of a normal law.
    """
    nodes, weights = np.polynomial.legendre.leggauss(5)
    x, weight = column(*nodes), torch.from_numpy(5 * weights / 2)
    values = [
        esm(Denoiser(lambda xt, t, a=a: a * xt, SHORT, "score"), x, 0, 0 * x, weight).item() for a in (-1.0, 0.0, 1.0)
    ]
    low, zero, high = values
    near(-(high - low) / 2 / (high - 2 * zero + low), -3.0)


def test_e26_noised_data():
    """Reads DSM as a way to the score of the data; it learns that of the noised density. Of the minimiser.

    Data N(0.5, 0.3), s = a·x + b: DSM at t finds −(x − √ᾱ·0.5)/(ᾱ·0.3 + 1 − ᾱ), ESM without noise −(x − 0.5)/0.3. In the
    limit of no noise the two agree; and there the variance of DSM's target, 1/σ_t², has no bound.
    """
    m, s2 = 0.5, 0.3
    nodes, weights = np.polynomial.hermite_e.hermegauss(4)
    z1, z2 = (column(*part.ravel()) for part in np.meshgrid(nodes, nodes, indexing="ij"))
    weight = 16 * torch.from_numpy(np.outer(weights, weights).ravel() / weights.sum() ** 2)

    def minimiser(loss, t):
        theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        d = Denoiser(lambda xt, t: theta[0] * xt + theta[1], LONG, "score")
        value = loss(d, m + math.sqrt(s2) * z1, t, z2, weight)
        (first,) = torch.autograd.grad(value, theta, create_graph=True)
        hessian = torch.stack([torch.autograd.grad(part, theta, retain_graph=True)[0] for part in first])
        return -torch.linalg.solve(hessian, first.detach())

    for t in (1, 100, 500):
        var = ABAR_LONG[t] * s2 + 1 - ABAR_LONG[t]
        expected = [-1 / var, math.sqrt(ABAR_LONG[t]) * m / var]
        near(minimiser(dsm, t), expected, 1e-8)
        near(minimiser(esm, t), expected, 1e-8)
        assert abs(expected[0] + 1 / s2) > (0.5 if t > 1 else 1e-4)
    near(minimiser(esm, 0), [-1 / s2, m / s2])
    near(minimiser(dsm, 1), [-1 / s2, m / s2], 1e-3)
    with pytest.raises(ValueError, match="score.*not finite"):
        minimiser(dsm, 0)


# E10: λ(t) ------------------------------------------------------------------------------------------------------------

SPREAD = 0.25  # of data N(0, ¼); the network says s_θ = −0.7·x/Var(x_t), for x̂_0 and all else below


def score_error(abar):
    """E‖s_θ + ε/σ‖² = a²V + 2a + 1/σ², for a = −0.7/V and V = ᾱ/4 + 1 − ᾱ."""
    var = abar * SPREAD + 1 - abar
    return 0.49 / var - 1.4 / var + 1 / (1 - abar)


def by_two_nodes():
    """±½ for x_0 and ±1 for ε: exact for what is quadratic in them."""
    x0, eps = (column(*part.ravel()) for part in np.meshgrid([-0.5, 0.5], [-1.0, 1.0]))
    return x0, eps


def chain_terms(steps, variance):
    """E L_0, …, E L_{T−1} by our kernel; t in place of t − 1."""
    path, (x0, eps), terms = DiscretePath(linear_betas(steps)), by_two_nodes(), []
    abar = path.alpha_bars.tolist()
    for t in range(1, steps + 1):
        xt = math.sqrt(abar[t]) * x0 + math.sqrt(1 - abar[t]) * eps
        score = -0.7 * xt / (abar[t] * SPREAD + 1 - abar[t])
        x0_hat = (xt + (1 - abar[t]) * score) / math.sqrt(abar[t])
        terms.append(bound_term(says(x0_hat), path, x0, xt, t - 1, t, variance=variance).mean().item())
    return np.array([np.nan, *terms])


def vp_abar(t):
    return np.exp(-0.1 * t - 9.95 * t**2)


def test_e10_half_of_the_integral():
    """Reads that λ = g² makes the loss equal to DDPM's; Σ L_{t−1} over t/T ≥ ε tends to HALF of ∫ g²E‖·‖². In a limit.

    Half for the slide's loss without ½; our DSM has it, and needs no factor. With Σ_θ = β̃ each term is its θ-dependent part, and
    the ratio is 0.561, 0.528, 0.514, 0.507 at T = 100 … 800: its error halves as T doubles.
    """
    whole, _ = scipy.integrate.quad(lambda t: (0.1 + 19.9 * t) * score_error(vp_abar(t)), 0.1, 1)
    off = []
    for steps in (100, 200, 400, 800):
        off.append(chain_terms(steps, "posterior")[steps // 10 + 1 :].sum() / whole - 0.5)
    assert 0.05 < off[0] < 0.07 and 0 < off[3] < 0.008
    for first, second in zip(off[:-1], off[1:], strict=True):
        assert abs(math.log2(first / second) - 1) < 0.2
    nodes, weights = np.polynomial.legendre.leggauss(40)
    t, (x0, eps), total = 0.55 + 0.45 * nodes, by_two_nodes(), 0.0
    d = Denoiser(
        lambda xt, t: -0.7 * xt / VP().alpha(t.double()).square().mul(SPREAD - 1).add(1)[:, None], VP(), "score"
    )
    for time, weight in zip(t.tolist(), 0.45 * weights, strict=True):
        g2 = VP().diffusion2(time).expand(4)
        total += weight * dsm(d, x0, time, eps, g2).item()
    near(total, whole / 2, 1e-6)  # the network sees its time in float32


def test_e10_whole_sum():
    """Reads an equality for all t; the sum over t > 1 grows by ½·log 2 with every doubling of T, for each value of a sample.

    What grows has no θ: it is there for the right score too. L_0, the log of a density of deviation √β_1, falls by as much,
    and the whole bound tends to a number. In a limit.
    """
    sums, lasts = [], []
    for steps in (100, 200, 400, 800):
        terms = chain_terms(steps, "beta")
        sums.append(terms[2:].sum())
        lasts.append(terms[1])
    growth = np.diff(sums)
    assert abs(growth[-1] - 0.5 * math.log(2)) < 0.02
    near(np.diff(lasts), [-0.5 * math.log(2)] * 3, 0.01)
    together = np.abs(np.diff(np.add(sums, lasts)))
    assert together[-1] < 0.02 and (together[1:] < 0.6 * together[:-1]).all()
    ideal = []
    for steps in (400, 800):  # with the right score E‖·‖² is tr Cov = 1/σ² − 1/V
        beta, abar, tilde = (part[2:] for part in table(np.linspace(0.1, 20, steps) / steps))
        constant = 0.5 * (tilde / beta - 1 - np.log(tilde / beta))
        hidden = 1 / (1 - abar) - 1 / (abar * SPREAD + 1 - abar)
        ideal.append((beta / (2 * (1 - beta)) * hidden + constant).sum())
    assert abs(ideal[1] - ideal[0] - 0.5 * math.log(2)) < 0.02


@pytest.mark.parametrize("t", [1, 5, T])
def test_e10_simple_is_the_variance(t, generator):
    """Reads DDPM's loss for λ = g²; L_simple, what DDPM trains on, is λ = σ_t²: E‖ε − ε_θ‖². Pointwise, at every t.

    λ = g² weighs ε's error by g²/σ²: on VP 13.7-fold at t = 0.1 as against 1-fold in L_simple.
    """
    x0, eps, eps_hat = torch.randn(3, 5, 3, generator=generator, dtype=torch.float64)
    d = Denoiser(says(-eps_hat / math.sqrt(1 - ABAR[t])), SHORT, "score")
    weight = torch.full((5,), 1 - ABAR[t], dtype=torch.float64)
    near(2 * dsm(d, x0, t, eps, weight).item(), (eps - eps_hat).square().sum(1).mean().item())
    near(2 / 3 * dsm(d, x0, t, eps, weight).item(), simple(Denoiser(says(eps_hat), SHORT, "eps"), x0, t, eps).item())
    assert 2.09 / (1 - vp_abar(0.1)) == pytest.approx(VP().diffusion2(0.1).item() / VP().sigma(0.1).item() ** 2)
    assert VP().diffusion2(0.1).item() / VP().sigma(0.1).item() ** 2 > 10


# E18: from the chain to the SDE ---------------------------------------------------------------------------------------


def test_e18_exactly_an_ornstein_uhlenbeck_process():
    """Reads that the chain converges to the SDE; it is the SDE, seen at T times, with β(t) = −T·log(1 − β_t) on step t.

    Pointwise and for every pair of times: mean factor e^{−B/2} and variance 1 − e^{−B} with B = ∫β, for T = 10 as for 1,000.
    """
    for path, beta, steps in ((SHORT, BETA, T), (LONG, BETA_LONG, 1000)):
        rate = -steps * np.log1p(-beta)
        for s, t in ((0, 1), (0, steps), (steps // 5, steps // 2), (steps - 1, steps)):
            integral = rate[s + 1 : t + 1].sum() / steps
            keep, var = path.transition(s, t)
            near([keep.item(), var.item()], [math.exp(-integral / 2), -math.expm1(-integral)])


def test_e18_what_is_approximate():
    """Reads β(t) with no word on its size: β_t = β(t/T)/T is needed, and then β(t) ≈ Tβ_t, in a limit.

    log ᾱ_T differs from −Σβ_t by 0.068 at T = 1,000, and by a tenth at 10,000. With β_t itself for β(t/T), all signal is
    gone after any share of the way as T grows.
    """
    gaps = []
    for steps in (100, 1000, 10_000):
        betas = np.linspace(0.1, 20, steps) / steps
        chain, vp = DiscretePath(linear_betas(steps)), VP()
        gaps.append((vp.alpha(1).log() - chain.alpha(steps).log()).item() * 2)
        near(gaps[-1], -np.log1p(-betas).sum() - betas.sum(), 1e-8)
    assert gaps[1] == pytest.approx(0.068, abs=5e-4)
    assert gaps[0] / gaps[1] == pytest.approx(10, rel=0.15) and gaps[1] / gaps[2] == pytest.approx(10, rel=0.02)
    left = [np.prod(1 - np.linspace(1e-4, 0.02, steps)[: steps // 2]) for steps in (100, 1000, 10_000)]
    assert left[0] > 0.7 and left[1] < 0.1 and left[2] < 1e-10


def kernel_gap(steps, share, xt):
    """KL of q(x_{t−1}|x_t) from the normal law of its mean and variance, for data ±1 at t = share·T; and Var/β_t. On a grid."""
    beta, abar, _ = table(np.linspace(0.1, 20, steps) / steps)
    t = round(share * steps)
    x = xt + np.linspace(-14, 14, 20_001) * math.sqrt(beta[t])
    signal, var = math.sqrt(abar[t - 1]), 1 - abar[t - 1]
    away = np.stack([-0.5 * (x - sign * signal) ** 2 / var for sign in (-1, 1)])
    log_p = np.logaddexp(*away) - 0.5 * (xt - math.sqrt(1 - beta[t]) * x) ** 2 / beta[t]
    p = np.exp(log_p - log_p.max())
    p /= p.sum()
    mean = (p * x).sum()
    spread = (p * (x - mean) ** 2).sum()
    log_q = -0.5 * (x - mean) ** 2 / spread
    log_q -= np.log(np.exp(log_q).sum())
    return (p * (np.log(p + 1e-300) - log_q)).sum(), spread / beta[t]


def test_e18_reverse_kernel():
    """Reads the two as equivalent; the normal reverse kernel holds in the limit of many steps, at a fixed t/T only.

    Data ±1 at t = 0.3·T: the divergence from a normal law falls like T⁻³ (T⁻⁴ where the law is symmetric) and Var/β_t → 1. At a
    fixed t it does not fall: x_0 given x_1 is one of two points, whatever T.
    """
    for xt, order in ((0.3, 3), (0.0, 4)):
        gaps = [kernel_gap(steps, 0.3, xt) for steps in (50, 100, 200, 400)]
        assert gaps[0][0] > 1e-5
        for (first, wide), (second, narrow) in zip(gaps[:-1], gaps[1:], strict=True):
            assert abs(math.log2(first / second) - order) < 0.5
            assert abs(math.log2((wide - 1) / (narrow - 1)) - 1) < 0.15
        assert gaps[-1][1] == pytest.approx(1, abs=0.01)
    early = [kernel_gap(steps, 10 / steps, 0.0) for steps in (100, 1000, 10_000)]  # t = 10 always
    assert all(gap > 0.05 and wide > 2 for gap, wide in early)


# E23, E24: the corrector and the reverse SDE --------------------------------------------------------------------------

BUMPS = GaussianMixture(column(-1.0, 0.8), [0.2, 0.1], [0.4, 0.6])


def moved(x, p, step, sign=1.0, t=200):
    """The density on the grid x after one step x ← x ± δ∇log p_t + √(2δ)z from the density p, as a sum over the grid."""
    centre = langevin_step(column(*x), BUMPS.score(column(*x), LONG, t), step, 0 * column(*x))[:, 0].numpy()
    noise = langevin_step(column(0.0), column(0.0), step, column(1.0)).item()
    return normal_density(x[:, None], x + sign * (centre - x), noise**2) @ p * (x[1] - x[0])


def test_e23_step_of_the_corrector():
    """Reads x + sΔt + √(2Δt)ε with the predictor's Δt, which is negative: √ of it is no number. δ > 0 at fixed t holds.

    One step of δ > 0 moves p_t by O(δ²), in a limit, at one t; with the drift's sign turned it moves by O(δ), downhill, and
    goes on: for N(0, 1) the variance grows (1 + δ)² in each step.
    """
    dt = -1 / 1000
    assert math.isnan(torch.tensor(2 * dt).sqrt().item())
    with pytest.raises(ValueError, match=r"^step must be positive; got -0\.001"):
        langevin_step(column(0.3), column(0.3), dt, column(0.1))
    x = np.linspace(-6, 6, 1201)
    p = BUMPS.log_prob(column(*x), LONG, 200).exp().numpy()
    changes = {
        sign: [np.trapezoid(np.abs(moved(x, p, step, sign) - p), x) for step in (0.04, 0.02, 0.01)] for sign in (1, -1)
    }
    for sign, order in ((1, 2), (-1, 1)):
        for first, second in zip(changes[sign][:-1], changes[sign][1:], strict=True):
            assert abs(math.log2(first / second) - order) < 0.25
    assert changes[1][-1] < 0.02 * changes[-1][-1]
    right = wrong = 1.0  # variances, from N(0, 1) by the kernel's own two numbers, whose score is −x
    keep = langevin_step(column(1.0), column(-1.0), 0.02, column(0.0)).item()
    noise = langevin_step(column(0.0), column(0.0), 0.02, column(1.0)).item()
    near([keep, noise**2], [0.98, 0.04])
    for _ in range(200):
        right, wrong = keep**2 * right + noise**2, (2 - keep) ** 2 * wrong + noise**2
    assert right == pytest.approx(1 / (1 - 0.01), rel=1e-3) and wrong > 1000


def test_e23_fixed_time():
    """Reads x_{t+1} for the corrected state; it belongs to the same t, t + 1 counts iterations. In the limit of many steps.

    From a wrong density, 1,000 steps at one t come to p_t of that t, not of the next: on grids, δ = 0.01.
    """
    x = np.linspace(-6, 6, 601)
    p = normal_density(x, 1.5, 0.5)
    p = np.linalg.matrix_power(moved(x, np.eye(len(x)), 0.01), 1000) @ p
    here, elsewhere = (BUMPS.log_prob(column(*x), LONG, t).exp().numpy() for t in (200, 150))
    assert np.trapezoid(np.abs(p - here), x) < 0.02 < 0.05 < np.trapezoid(np.abs(p - elsewhere), x)


def test_e23_size_of_the_step():
    """Reads one Δt for both; |Δt| = 1/T is too long a step near the data, where σ² is small, for any T: it needs δ < 2σ².

    Of N(0, σ_t²), of point data: x shrinks by 1 − δ/σ², which is below −1 at t = 1 of the linear chain for T = 100 and 1,000.
    """
    for steps in (100, 1000):
        path = DiscretePath(linear_betas(steps))
        var = path.sigma(1).item() ** 2
        near(var, 0.1 / steps)
        shrunk = langevin_step(column(1.0), column(-1 / var), 1 / steps, column(0.0)).item()
        near(shrunk, -9.0)


@pytest.mark.parametrize("t", [0.2, 0.5, 0.8])
def test_e24_drift_is_a_rate(t):
    """Reads drift "as mean", diffusion "as deviation", dw as "derivative"; each is a rate or an increment. In a limit.

    E[x_{t+h} − x_t | x_t] = f x h + O(h²) and its variance is g²h + O(h²), so that (x_{t+h} − x_t)/h has a variance without bound.
    """
    beta = 0.1 + 19.9 * t
    for h in (1e-2, 1e-4, 1e-6):
        keep, var = VP().transition(t, t + h)
        assert (keep.item() - 1) / h == pytest.approx(-beta / 2, rel=20 * h + 1e-6)
        assert var.item() / h == pytest.approx(beta, rel=20 * h + 1e-6)
        assert var.item() / h**2 > 0.8 * beta / h
    near(VP().drift(t), -beta / 2)
    near(VP().diffusion2(t), beta)
    x0, eps, step = column(*[1.3] * 80), column(*[0.4] * 80), 1e-5
    xt = VP().perturb(x0, t, eps)
    (after,) = forward_euler_maruyama(VP(), xt, [t, t + step], generator=torch.Generator().manual_seed(0))
    assert (after - xt * (1 - beta / 2 * step)).var().item() == pytest.approx(beta * step, rel=0.6)


@pytest.mark.parametrize("t", [3, 6, T])
def test_e24_noise_seen_from_the_future(t):
    """Reads dw in the reverse SDE; it is dw̄. The forward noise is independent of the past, not of x_t. On average given x_t.

    E[z | x_t] = −√β_t·∇log p_t(x_t) for x_t = √(1−β_t)x_{t−1} + √β_t z, by Bayes on a grid: what dw̄ leaves out is the score.
    Its variance is 1 + β_t∇²log p_t, and 1 in the limit of small steps.
    """
    z = np.linspace(-9, 9, 4001)
    for xt in (-1.2, 0.1, 0.9):
        before = (xt - math.sqrt(BETA[t]) * z) / math.sqrt(1 - BETA[t])
        joint = np.exp(BUMPS.log_prob(column(*before), SHORT, t - 1).numpy() - z**2 / 2)
        mean = (joint * z).sum() / joint.sum()
        near(mean, -math.sqrt(BETA[t]) * BUMPS.score(column(xt), SHORT, t).item(), 1e-8)
        at = column(xt).requires_grad_()
        (curve,) = torch.autograd.grad(BUMPS.score(at, SHORT, t).sum(), at)
        var = (joint * (z - mean) ** 2).sum() / joint.sum()
        near(var, 1 + BETA[t] * curve.item(), 1e-8)


def test_e24_direction_of_time():
    """Reads no sign for dt; dt < 0. A step back gives N(αm, V) of the earlier time up to O(h²); with dt > 0 it is off by 2g²h.

    Of the variance of normal data N(0, ¼), in a limit; by the two numbers of our step.
    """

    def var_at(t):
        return vp_abar(t) * SPREAD + 1 - vp_abar(t)

    t, errors = 0.4, []
    f, g2 = -(0.1 + 19.9 * t) / 2, 0.1 + 19.9 * t
    for h in (0.004, 0.002, 0.001):
        x0_hat = math.sqrt(vp_abar(t)) * SPREAD / var_at(t)  # of x_t = 1
        still, drawn = (
            euler_maruyama_step(VP(), column(1.0), column(x0_hat), t, t - h, noise=column(z)).item() for z in (0.0, 1.0)
        )
        errors.append(abs(still**2 * var_at(t) + (drawn - still) ** 2 - var_at(t - h)))
        ahead = (1 + (f + g2 / var_at(t)) * h) ** 2 * var_at(t) + g2 * h  # the slide's line with dt = +h
        assert ahead - var_at(t + h) == pytest.approx(2 * g2 * h, rel=60 * h)
    for first, second in zip(errors[:-1], errors[1:], strict=True):
        assert abs(math.log2(first / second) - 2) < 0.2


# E32: what is easier to learn -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [1, 3, T])
def test_e32_losses_are_in_different_units(t, generator):
    """Reads that modelling the noise is easier; one and the same x̂_0 has three losses, so that none of them can tell.

    Pointwise: the loss of ε is ᾱ/(1−ᾱ) times that of x_0, the loss of v 1/(1−ᾱ) times.
    """
    x0, eps, x0_hat = torch.randn(3, 4, 2, generator=generator, dtype=torch.float64)
    error = (x0 - x0_hat).square().mean().item()
    eps_hat = (noised(x0, eps, t) - math.sqrt(ABAR[t]) * x0_hat) / math.sqrt(1 - ABAR[t])
    v_hat = math.sqrt(ABAR[t]) * eps_hat - math.sqrt(1 - ABAR[t]) * x0_hat
    said = {"x0": (x0_hat, 1.0), "eps": (eps_hat, ABAR[t] / (1 - ABAR[t])), "v": (v_hat, 1 / (1 - ABAR[t]))}
    for predicts, (value, scale) in said.items():
        d = Denoiser(says(value), SHORT, predicts)
        near(d(noised(x0, eps, t), t), x0_hat)
        near(simple(d, x0, t, eps).item(), scale * error)


def test_e32_is_an_experiment():
    """Reads that modelling the noise is easier, "not always"; what holds is measured, on average over seeds.

    The same net, data and budget for ε, x_0 and v, scored by the samples.
    """
    shipped = tables.load("mnist-predictions")
    seeds = {}
    for row in shipped["rows"]:
        assert math.isfinite(row["Fréchet distance"]) and 0 <= row["classified as asked"] <= 1
        seeds.setdefault(row["predicts"], []).append(row["seed"])
    assert set(seeds) == {"eps", "x0", "v"} == set(shipped["vary"]["predicts"])
    assert len(set(map(tuple, map(sorted, seeds.values())))) == 1  # the same seeds for each
    assert len(seeds["eps"]) == len(set(seeds["eps"])) >= 3
    assert set(shipped["vary"]) == {"predicts", "seed"}  # and nothing else differs
