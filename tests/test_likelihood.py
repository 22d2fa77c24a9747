"""The bound against closed forms, quadrature and whole walks; the ODE's density against mixtures, scipy and integrals."""

import math

import numpy as np
import pytest
import scipy.integrate
import torch
from oracles import CHAIN_BETAS, MEANS, STDS, WEIGHTS, forward_kernel, known, known_rates, mixture_mean, mp, path_of
from scipy import stats
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from dgm_course.likelihood import bits_per_dim, bound, ode_log_prob, prior_term
from dgm_course.paths import VP, Cosine, DiscretePath, Straight
from dgm_course.toy import GaussianMixture

GRIDS = {
    "chain": [range(20, -1, -1), [20, 13, 6, 1, 0]],
    "Cosine": [np.linspace(1, 0, 9), [1.0, 0.7, 0.65, 0.2, 0.0]],
    "Straight": [np.linspace(1, 0, 9), [1.0, 0.7, 0.65, 0.2, 0.0]],
    "VE": [np.linspace(1, 0, 9), [0.9, 0.7, 0.65, 0.2, 0.0]],
}
all_grids = pytest.mark.parametrize("name, times", [(name, list(g)) for name in GRIDS for g in GRIDS[name]])
both_variances = pytest.mark.parametrize("variance", ["beta", "posterior"])
MEAN, STD = 0.3, 0.6  # of the data, where they are normal


def normals(*shape, generator):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def close(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=tolerance, atol=tolerance)


def start_std(name, times):
    """What p(x_T) is as wide as: σ where the noise grows beyond 1, else 1."""
    return max(1.0, known(name, times[0])[1])


def reverse_step(name, s, t, variance):
    """The numbers of p_θ(x_s | x_t): its mean is keep·x_t + pull·x̂_0; its variance; and that of q(x_s | x_t, x_0)."""
    a, v = forward_kernel(name, s, t)
    (alpha_s, sigma_s), (alpha_t, _) = known(name, s), known(name, t)
    keep = a * sigma_s**2 / (a**2 * sigma_s**2 + v)  # the gain of conditioning a normal on a noisy sight of it
    own = sigma_s**2 * v / (a**2 * sigma_s**2 + v)
    return keep, alpha_s - keep * alpha_t, v if variance == "beta" or s == 0 else own, own


def cost_of_step(name, s, t, variance, error):
    """A term for one value, from (x_0 − x̂_0)² or its mean: a divergence of two normals, or a density at s = 0."""
    _, pull, var, own = reverse_step(name, s, t, variance)
    if s == 0:
        return error / (2 * var) + 0.5 * math.log(2 * math.pi * var)
    return 0.5 * (pull**2 * error / var + own / var - 1 - math.log(own / var))


def cost_of_start(name, t, std, square):
    """L_T for one value, from x_0² or its mean."""
    alpha, sigma = known(name, t)
    return 0.5 * ((alpha**2 * square + sigma**2) / std**2 - 1) - math.log(sigma / std)


# Closed forms ---------------------------------------------------------------------------------------------------------


@all_grids
@both_variances
def test_every_term_by_hand(name, times, variance, generator):
    """A denoiser that is wrong and writes down what it was shown: each term is typed from that, value by value."""
    x0, shown = normals(3, 1, 2, 2, generator=generator), []

    def d(xt, t):
        shown.append((t, xt))
        return 0.3 * xt + 0.2

    terms = bound(d, path_of(name), x0, times, variance=variance, prior_std=1.7, generator=generator)
    assert terms.shape == (len(times), 3) and [t for t, _ in shown] == pytest.approx(times[:-1])
    close(terms[0], cost_of_start(name, times[0], 1.7, x0**2).flatten(1).sum(1))
    for row, (_, xt), t, s in zip(terms[1:], shown, times[:-1], times[1:], strict=True):
        close(row, cost_of_step(name, s, t, variance, (x0 - 0.3 * xt - 0.2) ** 2).flatten(1).sum(1))


def ideal(name, t):
    """The factor c of E[x_0 | x_t] = c·x_t for data of mean 0 and deviation STD."""
    alpha, sigma = known(name, t)
    return alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)


@all_grids
@both_variances
@pytest.mark.parametrize("factor", [ideal, lambda name, t: 0.7 - 0.4 * ideal(name, t)], ids=["ideal", "wrong"])
def test_mean_of_every_term(name, times, variance, factor, generator):
    """Normal data and x̂_0 = c(t)·x_t, ideal or wrong: each term's mean in closed form, within 5 standard errors."""
    n, std = 5000, start_std(name, times)
    x0 = STD * normals(n, 2, generator=generator) + MEAN
    c = {t: factor(name, t) for t in times[:-1]}
    nearest = dict(zip(torch.tensor(times[:-1], dtype=torch.float64).tolist(), c.values(), strict=True))
    terms = bound(
        lambda xt, t: nearest[t] * xt,
        path_of(name), x0, times, variance=variance, prior_std=std, generator=generator,
    )  # fmt: skip
    square = MEAN**2 + STD**2
    expected = [2 * cost_of_start(name, times[0], std, square)]
    for t, s in zip(times[:-1], times[1:], strict=True):
        alpha, sigma = known(name, t)
        error = (1 - c[t] * alpha) ** 2 * square + c[t] ** 2 * sigma**2  # E(x_0 − c·α·x_0 − c·σ·ε)²
        expected.append(2 * cost_of_step(name, s, t, variance, error))
    gap = (terms.mean(1) - torch.tensor(expected, dtype=torch.float64)).abs()
    assert (gap <= 5 * terms.std(1) / math.sqrt(n) + 1e-12).all(), gap


@pytest.mark.parametrize("path", [Cosine(), Straight(), DiscretePath([0.3, 1.0])], ids=repr)
@pytest.mark.parametrize("guess", [0.0, 0.8])
def test_bound_is_tight_where_the_model_is_one_step(path, guess, generator):
    """From pure noise at once to a constant guess, x_T says nothing of x_0: then −log p_θ(x_0) itself is returned."""
    x0 = normals(5, 3, generator=generator)
    terms = bound(lambda xt, t: torch.full_like(xt, guess), path, x0, path.times(1), generator=generator)
    close(terms.sum(0), -Normal(torch.full_like(x0, guess), 1.0).log_prob(x0).sum(1))


# The model's own density ----------------------------------------------------------------------------------------------

SHORT = [0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5]
ABAR = np.concatenate([[1.0], np.cumprod(1 - np.array(SHORT))])
GRID = np.linspace(-7, 7, 701)
GUESSES = {
    "ideal": lambda x, t: mixture_mean(x, math.sqrt(ABAR[t]), math.sqrt(1 - ABAR[t])),
    "wrong": lambda x, t: np.tanh(2 * x) + 0.05 * t,
}


def model_density(guess, x0):
    """p_θ(x_0) of the reverse chain with σ² = β in one dimension: T integrals over a grid, the mean as on the slide."""
    p = stats.norm.pdf(GRID)
    for t in range(8, 0, -1):
        beta, abar, before = SHORT[t - 1], ABAR[t], ABAR[t - 1]
        mean = math.sqrt(1 - beta) * (1 - before) / (1 - abar) * GRID
        mean = mean + math.sqrt(before) * beta / (1 - abar) * guess(GRID, t)
        target = x0 if t == 1 else GRID
        p = stats.norm.pdf(target[:, None], mean, math.sqrt(beta)) @ p * (GRID[1] - GRID[0])
    return p


def as_denoiser(guess):
    return lambda xt, t: torch.from_numpy(guess(xt[:, 0].numpy(), int(t)))[:, None]


@pytest.mark.parametrize("guess", GUESSES.values(), ids=GUESSES)
def test_bound_lies_above_the_density(guess, generator):
    """At each of nine points −log p_θ(x_0) is no more than the mean of the bound, in 5 standard errors, yet not far off."""
    points = np.linspace(-2.5, 3.0, 9)
    exact = -np.log(model_density(guess, points))
    x0 = torch.from_numpy(points).repeat_interleave(2000)[:, None]
    total = bound(as_denoiser(guess), DiscretePath(SHORT), x0, range(8, -1, -1), generator=generator).sum(0)
    mean, error = total.reshape(9, -1).mean(1).numpy(), total.reshape(9, -1).std(1).numpy() / math.sqrt(2000)
    assert (exact <= mean + 5 * error).all()
    assert (error < 0.1).all() and (guess is GUESSES["wrong"] or (mean[2:7] - exact[2:7] < 1).all())


def mixture_density(x):
    return (WEIGHTS * stats.norm.pdf(x[:, None], MEANS, STDS)).sum(1)


@pytest.mark.parametrize("guess", GUESSES.values(), ids=GUESSES)
def test_entropy_cross_entropy_bound(guess, generator):
    """Over the data, −log q(x_0) ≤ −log p_θ(x_0) ≤ the bound in the mean: the first two by quadrature."""
    x, step = np.linspace(-6, 6, 601, retstep=True)
    q, p = mixture_density(x), model_density(guess, x)
    assert q.sum() * step == pytest.approx(1, abs=1e-8) and p.sum() * step == pytest.approx(1, abs=1e-4)
    entropy, cross = -(q * np.log(q)).sum() * step, -(q * np.log(p)).sum() * step
    n = 10_000
    part = torch.multinomial(torch.from_numpy(WEIGHTS), n, replacement=True, generator=generator)
    x0 = torch.from_numpy(MEANS)[part] + torch.from_numpy(STDS)[part] * normals(n, generator=generator)
    total = bound(as_denoiser(guess), DiscretePath(SHORT), x0[:, None], range(8, -1, -1), generator=generator).sum(0)
    assert entropy < cross < total.mean().item() + 5 * total.std().item() / math.sqrt(n)


@pytest.mark.parametrize("name", ["chain", "Cosine", "VE"])
@both_variances
def test_sum_of_terms_is_a_log_ratio_of_walks(name, variance, generator):
    """E[log q(x_{1:T} | x_0) − log p_θ(x_{0:T})] over whole forward walks: the joint that the terms split, unsplit."""
    times, n = GRIDS[name][1], 20_000
    std = start_std(name, times)

    def d(xt, t):
        return 0.4 * torch.tanh(xt) + 0.1

    x0 = STD * normals(n, 1, generator=generator) + MEAN
    walk, log_q = {0: x0}, 0.0
    for s, t in zip(times[:0:-1], times[-2::-1], strict=True):
        a, v = forward_kernel(name, s, t)
        walk[t] = a * walk[s] + math.sqrt(v) * normals(n, 1, generator=generator)
        log_q = log_q + Normal(a * walk[s], math.sqrt(v)).log_prob(walk[t])
    log_p = Normal(0.0, std).log_prob(walk[times[0]])
    for t, s in zip(times[:-1], times[1:], strict=True):
        keep, pull, var, _ = reverse_step(name, s, t, variance)
        log_p = log_p + Normal(keep * walk[t] + pull * d(walk[t], t), math.sqrt(var)).log_prob(walk[s])
    unsplit = (log_q - log_p)[:, 0]
    split = bound(d, path_of(name), x0, times, variance=variance, prior_std=std, generator=generator).sum(0)
    error = math.hypot(unsplit.std().item(), split.std().item()) / math.sqrt(n)
    assert abs(unsplit.mean().item() - split.mean().item()) <= 5 * error
    assert error < 0.03 * split.mean().abs().item()


# The first and the last term ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["chain", "Cosine", "Straight", "VE", "VP", "SubVP"])
@pytest.mark.parametrize("unit", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("std", [1.0, 0.3, 50.0])
def test_prior_term(name, unit, std, generator):
    """torch's KL divergence of the two normals, and the same in 40 digits for each sample."""
    t, x0 = round(20 * unit) if name == "chain" else unit, normals(3, 2, 2, generator=generator)
    alpha, sigma = known(name, t)
    found = prior_term(path_of(name), x0, t, std)
    assert found.shape == (3,)
    prior = Normal(torch.zeros_like(x0), std)
    close(found, kl_divergence(Normal(alpha * x0, sigma), prior).flatten(1).sum(1))
    for value, row in zip(found.tolist(), x0.flatten(1).tolist(), strict=True):
        a, s2, p2 = mp.mpf(alpha), mp.mpf(sigma) ** 2, mp.mpf(std) ** 2
        exact = sum((a**2 * mp.mpf(x) ** 2 + s2) / p2 - 1 - mp.log(s2 / p2) for x in row) / 2
        assert value == pytest.approx(float(exact), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_prior_term_where_almost_nothing_is_left(dtype):
    """At the end of VP L_T is about 1e-5 for each value; of data at 0 it is 1e-10, and still has digits in float32."""
    alpha = mp.exp(-mp.mpf("10.05") / 2)
    for x in (0.0, 0.7, -1.0):
        exact = (alpha**2 * mp.mpf(x) ** 2 + (1 - alpha**2) - 1 - mp.log(1 - alpha**2)) / 2
        found = prior_term(VP(), torch.full((1, 1), x, dtype=dtype), 1.0)
        assert found.dtype == dtype and found.item() == pytest.approx(float(exact), rel=1e-5)


def test_prior_term_vanishes_where_the_prior_is_reached():
    """Cosine and Straight end in N(0, 1) whatever x_0 is; a wider prior then costs log s + 1/(2s²) − ½ for each value."""
    x0 = torch.full((2, 3), 5.0, dtype=torch.float64)
    for path in (Cosine(), Straight()):
        assert prior_term(path, x0, 1.0).tolist() == [0, 0]
        close(prior_term(path, x0, 1.0, 2.0), [3 * (math.log(2) + 1 / 8 - 0.5)] * 2)


@pytest.mark.parametrize("name", ["chain", "Cosine"])
@pytest.mark.parametrize("bins", [2, 256])
@both_variances
def test_mass_of_all_grey_levels(name, bins, variance, generator):
    """With a decoder, exp(−L_0) over all grey levels is 1: a probability of whole numbers, not a density."""
    times = GRIDS[name][1]
    x0 = torch.linspace(-1, 1, bins, dtype=torch.float64)[:, None]
    for guess in (0.0, 0.31, -1.4):
        terms = bound(
            lambda xt, t, guess=guess: torch.full_like(xt, guess),
            path_of(name), x0, times, variance=variance, bins=bins, generator=generator,
        )  # fmt: skip
        assert (-terms[-1]).exp().sum().item() == pytest.approx(1, abs=1e-11)
        assert (terms[-1] >= 0).all()


def test_bins_change_the_last_term_only(generator):
    """A grey level's mass is its width, 2/255, times the density where that is smooth."""
    x0 = torch.randint(1, 255, (4, 6), generator=generator).double() / 127.5 - 1
    with_bins, without = (
        bound(lambda xt, t: 0 * xt, Cosine(), x0, [1.0, 0.5, 0], bins=bins, generator=torch.Generator().manual_seed(1))
        for bins in (256, None)
    )
    assert torch.equal(with_bins[:-1], without[:-1])
    close(with_bins[-1], without[-1] - 6 * math.log(2 / 255), 1e-4)


# The density of the ODE -----------------------------------------------------------------------------------------------

LINE = GaussianMixture(torch.tensor([[-1.5], [0.3], [2.0]]).double(), [0.16, 0.0625, 0.25], [0.3, 0.5, 0.2])
PLANE = GaussianMixture(
    torch.tensor([[-1.5, 0.0], [1.0, 1.0], [0.5, -1.2]]).double(),
    torch.tensor([[[0.1, 0.05], [0.05, 0.2]], [[0.1, 0.0], [0.0, 0.1]], [[0.3, -0.1], [-0.1, 0.1]]]).double(),
    [0.3, 0.3, 0.4],
)
both_mixtures = pytest.mark.parametrize("law", [LINE, PLANE], ids=["line", "plane"])
flow_paths = pytest.mark.parametrize("name", ["VP", "SubVP", "VE", "Cosine", "Straight"])


def typed_log_density(law, name, t, x):
    """log Σ w_k N(x; α m_k, α² C_k + σ² I) by torch's normal law and the closed forms of α and σ."""
    alpha, sigma = known(name, t)
    covs = torch.einsum("kde,ke,kfe->kdf", law._axes, law._spread, law._axes)
    covs = alpha**2 * covs + sigma**2 * torch.eye(x.shape[1], dtype=torch.float64)
    each = MultivariateNormal(alpha * law.means, covs).log_prob(x[:, None])
    return (law.weights.log() + each).logsumexp(1)


def down(start, stop, steps):
    return torch.linspace(start, stop, steps + 1, dtype=torch.float64)


@both_mixtures
@flow_paths
def test_exact_denoiser_gives_the_exact_density(law, name, generator):
    """With the ideal denoiser and log p_1 as prior it is the log-density at t_min, to 1e-4 on the grid that is the default."""
    x = law.sample(20, generator)
    found = ode_log_prob(
        law.denoiser(path_of(name)), path_of(name), x, prior_log_prob=lambda z: typed_log_density(law, name, 1.0, z)
    )
    close(found, typed_log_density(law, name, 1e-5, x), 1e-4)


@both_mixtures
@flow_paths
def test_finer_grid_of_the_density(law, name, generator):
    """Between two inner times 50 steps give 1e-7."""
    x, (late, early) = law.sample(10, generator), (0.5, 0.3)
    found = ode_log_prob(
        law.denoiser(path_of(name)), path_of(name), x, down(late, early, 50),
        prior_log_prob=lambda z: typed_log_density(law, name, late, z),
    )  # fmt: skip
    close(found, typed_log_density(law, name, early, x), 1e-7)


@pytest.mark.parametrize("name", ["VP", "Cosine", "VE narrow"])
def test_order_of_the_density(name, generator):
    """Half the step, a sixteenth of the error: order 4 in two halvings, within 0.3."""
    x, errors = LINE.sample(30, generator), []
    for steps in (16, 32, 64):
        found = ode_log_prob(
            LINE.denoiser(path_of(name)), path_of(name), x, down(0.8, 0.2, steps),
            prior_log_prob=lambda z: typed_log_density(LINE, name, 0.8, z),
        )  # fmt: skip
        errors.append((found - typed_log_density(LINE, name, 0.2, x)).abs().mean().item())
    assert errors[-1] > 1e-12  # far above rounding
    for first, second in zip(errors[:-1], errors[1:], strict=True):
        assert abs(math.log2(first / second) - 4) < 0.3, errors


@pytest.mark.parametrize("name, late", [("VP", 0.5), ("SubVP", 0.4), ("Cosine", 0.7), ("Straight", 0.8)])
def test_what_the_normal_prior_adds(name, late, generator):
    """Taking N(0, I) for p_1 adds log N(x_1; 0, I) − log p_1(x_1) at the exact end point x_1, here for normal data.

    The ODE carries N(αm, V) to N(αm, V) by x_1 = α_1m + √(V_1/V_ε)(x − α_εm), value by value.
    """
    m, spread = torch.tensor([0.6, -1.0]).double(), torch.tensor([0.25, 1.7]).double()
    law = GaussianMixture(m[None], spread.diag()[None])
    early = 0.1
    (alpha, sigma), (alpha_1, sigma_1) = known(name, early), known(name, late)
    var, var_1 = alpha**2 * spread + sigma**2, alpha_1**2 * spread + sigma_1**2
    x = normals(6, 2, generator=generator)
    end = alpha_1 * m + (var_1 / var).sqrt() * (x - alpha * m)
    added = (Normal(0.0, 1.0).log_prob(end) - Normal(alpha_1 * m, var_1.sqrt()).log_prob(end)).sum(1)
    exact = Normal(alpha * m, var.sqrt()).log_prob(x).sum(1)
    found = ode_log_prob(law.denoiser(path_of(name)), path_of(name), x, down(late, early, 60))
    assert added.abs().max() > 0.1
    close(found, exact + added, 1e-7)


def guess(xt, t):
    """A denoiser that is wrong for any data: of its own law the density is asked for."""
    return torch.tanh(2 * xt) + 0.3 * torch.cos(3 * xt) * t


@pytest.mark.parametrize("name", ["VP", "Cosine", "Straight"])
@pytest.mark.parametrize("denoiser", [guess, None], ids=["wrong", "ideal"])
def test_density_integrates_to_one(name, denoiser):
    """Whatever the denoiser, over a grid of x the density of its ODE has mass 1."""
    x = torch.linspace(-5, 5, 801, dtype=torch.float64)[:, None]
    d = denoiser or LINE.denoiser(path_of(name))
    density = ode_log_prob(d, path_of(name), x, down(0.95, 0.1, 40)).exp()
    assert density[[0, -1]].max() < 1e-6
    assert torch.trapezoid(density, x[:, 0]).item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", ["Cosine", "VE narrow"])
def test_density_is_a_change_of_variables(name):
    """log N(x_1) + log |dx_1/dx| for a wrong denoiser: the end points by scipy, their slope by central differences."""
    x, h, closed = np.array([-1.3, -0.2, 0.4, 1.1]), 1e-4, {}

    def velocity(t, x):
        if t not in closed:
            closed[t] = (*known(name, t), *known_rates(name, t))
        alpha, sigma, alpha_rate, sigma_rate = closed[t]
        x0 = guess(torch.from_numpy(x), t).numpy()
        return alpha_rate * x0 + sigma_rate * (x - alpha * x0) / sigma

    starts = np.concatenate([x, x - h, x + h])
    ends = scipy.integrate.solve_ivp(velocity, (0.2, 0.9), starts, method="DOP853", rtol=1e-12, atol=1e-12).y[:, -1]
    slope = (ends[8:] - ends[4:8]) / (2 * h)
    found = ode_log_prob(guess, path_of(name), torch.from_numpy(x)[:, None], down(0.9, 0.2, 80))
    close(found, stats.norm.logpdf(ends[:4]) + np.log(slope), 1e-6)


@pytest.mark.parametrize("dim", [2, 3])
def test_hutchinson_is_unbiased(dim, generator):
    """One probe sees Σ_ij s_i s_j J_ij: a value for each of the 2^(D−1) patterns of s_i·s_j, with the exact one as mean.

    Many copies of a point meet every pattern. That there are no other values shows that a probe is drawn once, and that
    all its entries are ±1.
    """
    mix = normals(dim, dim, generator=generator)

    def d(xt, t):
        return torch.tanh(xt @ mix)

    x, times = normals(1, dim, generator=generator), down(0.9, 0.1, 5)
    exact = ode_log_prob(d, Cosine(), x, times)
    found = ode_log_prob(d, Cosine(), x.expand(200, dim), times, probes=1, generator=generator)
    values = (found * 1e9).round().unique() / 1e9
    assert len(values) == 2 ** (dim - 1)
    close(values.mean(), exact[0], 1e-8)
    assert values.std() > 0.05


def test_variance_of_hutchinson(generator):
    """In the plane a probe adds ±b, so that n independent ones add b times a mean of n signs: variance b²/n, exactly known."""
    mix = normals(2, 2, generator=generator)

    def d(xt, t):
        return torch.tanh(xt @ mix)

    x, times = normals(1, 2, generator=generator).expand(3000, 2), down(0.9, 0.1, 2)
    exact = ode_log_prob(d, Cosine(), x[:1], times)
    b = (ode_log_prob(d, Cosine(), x[:1], times, probes=1, generator=generator) - exact).abs().item()
    for probes in (4, 16):
        off = ode_log_prob(d, Cosine(), x, times, probes=probes, generator=generator) - exact
        square = off.square()
        assert abs(square.mean().item() - b**2 / probes) < 5 * square.std().item() / math.sqrt(3000)
        assert abs(off.mean().item()) < 5 * b / math.sqrt(3000 * probes)


def test_density_of_images(generator):
    """(B, 1, 4, 4) is the same as (B, 16); four evaluations a step; no gradient is kept; the data stay as they were."""
    x = normals(3, 1, 4, 4, generator=generator)
    x.requires_grad_()
    mix, calls = normals(16, 16, generator=generator) / 4, []
    mix.requires_grad_()

    def d(xt, t):
        calls.append(t)
        return torch.tanh(xt.flatten(1) @ mix).reshape(xt.shape)

    times = down(0.9, 0.1, 4)
    for probes in (None, 2):
        runs = []
        for data in (x, x.flatten(1)):
            calls.clear()
            g = torch.Generator().manual_seed(1)
            runs.append(ode_log_prob(d, Cosine(), data, times, probes=probes, generator=g))
            assert runs[-1].shape == (3,) and not runs[-1].requires_grad
            close(torch.tensor(calls), [0.1, 0.2, 0.2, 0.3, 0.3, 0.4, 0.4, 0.5, 0.5, 0.6, 0.6, 0.7, 0.7, 0.8, 0.8, 0.9])
        close(*runs)
    assert x.grad is None and mix.grad is None


def test_density_adds_over_independent_values(generator):
    """Four values that do not meet have four densities, added up."""
    x, times = normals(3, 4, generator=generator), down(0.9, 0.1, 5)
    each = ode_log_prob(guess, Cosine(), x.reshape(-1, 1), times)
    close(ode_log_prob(guess, Cosine(), x, times), each.reshape(3, 4).sum(1))
    close(ode_log_prob(guess, Cosine(), x, times, probes=1), each.reshape(3, 4).sum(1))  # J is diagonal: no error


def test_density_in_float32(generator):
    """float32 data give float32 nats, within 1e-4 of float64, and a probe of the same type."""
    x = PLANE.sample(10, generator)
    wide, narrow = (
        ode_log_prob(PLANE.denoiser(VP()), VP(), x.to(dtype), down(1.0, 0.05, 25)) for dtype in (x.dtype, torch.float32)
    )
    assert narrow.dtype == torch.float32 and wide.dtype == torch.float64
    close(narrow.double(), wide, 1e-4)
    assert ode_log_prob(guess, VP(), x.float(), [1.0, 0.5], probes=2).dtype == torch.float32


def test_probes_come_from_the_generator():
    """One seed, one result, whatever the global state, which is left; each probe and each sample has its own signs."""
    x, mix = torch.zeros(64, 5, dtype=torch.float64), normals(5, 5, generator=torch.Generator().manual_seed(1))

    def run(seed, probes=1):
        g = torch.Generator().manual_seed(seed)
        return ode_log_prob(lambda xt, t: torch.tanh(xt @ mix), Cosine(), x, [0.9, 0.5], probes=probes, generator=g)

    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(run(1).round(decimals=9).unique()) > 10
    assert (run(1, 2) - run(1)).abs().max() > 1e-3


def test_start_of_the_density(generator):
    """The prior is asked once, at x_1, and its nats are added; without it stands N(0, I), whatever the path."""
    x, shown = normals(4, 3, generator=generator), []

    def prior(z):
        shown.append(z)
        return torch.arange(4.0).double()

    times = down(0.9, 0.1, 3)
    with_prior = ode_log_prob(guess, Straight(), x, times, prior_log_prob=prior)
    (end,) = shown
    normal = Normal(torch.zeros_like(end), 1.0).log_prob(end).sum(1)
    close(ode_log_prob(guess, Straight(), x, times), with_prior - torch.arange(4.0).double() + normal, 1e-12)


def test_default_grid():
    """Without times it runs over 150 steps from 1e-5 to 1, squares of an even grid: 600 evaluations, short at first."""
    calls = []
    ode_log_prob(lambda xt, t: calls.append(t) or 0 * xt, Straight(), torch.zeros(1, 1, dtype=torch.float64))
    edges = [1e-5 + (1 - 1e-5) * (k / 150) ** 2 for k in range(151)]
    close(torch.tensor(calls[::4], dtype=torch.float64), edges[:-1], 1e-12)
    close(torch.tensor(calls[3::4], dtype=torch.float64), edges[1:], 1e-12)
    assert len(calls) == 600


def test_arguments_of_the_density_are_checked():
    """What does not fit raises and is named."""
    x = torch.ones(4, 2)
    cases = [
        (ValueError, "^times must end in some t_min > 0: .*; got 0 as the last$",
         lambda: ode_log_prob(guess, Cosine(), x, [1.0, 0.5, 0.0])),
        (ValueError, "^times must be strictly descending", lambda: ode_log_prob(guess, Cosine(), x, [0.1, 1.0])),
        (ValueError, "^times must be strictly descending", lambda: ode_log_prob(guess, Cosine(), x, [1.0])),
        (ValueError, r"^times must lie in \[0, 1\]", lambda: ode_log_prob(guess, Cosine(), x, [1.5, 0.1])),
        *((ValueError, "^probes must be a whole number of at least 1, or None for the exact trace; got ",
           lambda n=n: ode_log_prob(guess, Cosine(), x, [1.0, 0.1], probes=n)) for n in (0, -1, 1.5)),
        (TypeError, "must be a floating-point tensor", lambda: ode_log_prob(guess, Cosine(), x.long(), [1.0, 0.1])),
        (TypeError, "^path must be a GaussianPath; got str", lambda: ode_log_prob(guess, "Cosine", x, [1.0, 0.1])),
        (ValueError, "SDE of VP", lambda: ode_log_prob(guess, path_of("chain"), x, [20, 10])),
    ]  # fmt: skip
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()


# Bits -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape, values", [((5, 2), 2), ((1, 1, 28, 28), 784), ((3, 3, 4, 5), 60), ((2,), 1)])
def test_bits_per_dim(shape, values, generator):
    """log₂ of an even guess over 256 levels is 8 bits a value, and any nats divide alike, whatever their shape."""
    x0 = torch.zeros(shape)
    assert bits_per_dim(torch.tensor(values * math.log(256), dtype=torch.float64), x0).item() == pytest.approx(8)
    nats = normals(7, shape[0], generator=generator)
    np.testing.assert_allclose(bits_per_dim(nats, x0), np.log2(np.exp(nats.numpy())) / values, rtol=1e-12)


# Use ------------------------------------------------------------------------------------------------------------------


def test_noise_comes_from_the_generator(generator):
    """One seed, one result, whatever the global state; terms and samples have noise of their own; the state is left."""
    x0, times = torch.zeros(4, 2, dtype=torch.float64), [20, 15, 10, 5, 0]

    def run(seed):
        shown = []
        g = torch.Generator().manual_seed(seed)
        terms = bound(lambda xt, t: shown.append((xt, t)) or 0.5 * xt, path_of("chain"), x0, times, generator=g)
        noise = torch.stack([xt / known("chain", t)[1] for xt, t in shown])
        return terms, noise

    torch.manual_seed(0)
    state = torch.get_rng_state()
    (one, noise), (two, _), (other, _) = run(1), run(1), run(2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one, two) and not torch.equal(one[1:], other[1:])
    assert len(noise.unique()) == noise.numel()
    torch.manual_seed(1)
    first = bound(lambda xt, t: 0.5 * xt, path_of("chain"), x0, times)
    assert not torch.equal(first, bound(lambda xt, t: 0.5 * xt, path_of("chain"), x0, times))


def test_shape_type_and_gradient():
    """(N, B) for N times, of the data's type; no gradient is kept, even of a network that has one."""
    weight = torch.tensor(0.5, requires_grad=True)
    for dtype in (torch.float32, torch.float64):
        x0 = torch.ones(3, 1, 4, 4, dtype=dtype, requires_grad=True)
        terms = bound(lambda xt, t: weight.to(xt) * xt, Cosine(), x0, Cosine().times(6), variance="posterior")
        assert terms.shape == (7, 3) and terms.dtype == dtype and not terms.requires_grad
    x0 = torch.zeros(2, 5)
    chain = DiscretePath(CHAIN_BETAS)
    for times in (chain.times(20), [20, 0], (20, 3, 0), np.array([20.0, 7, 0])):
        assert bound(lambda xt, t: xt, chain, x0, times).shape == (len(times), 2)


def test_float32_keeps_up(generator):
    """Every term of a nearly right denoiser that is blind to the noise agrees in both types to a part in a thousand."""
    x0 = torch.rand(2, 20, generator=generator, dtype=torch.float64)

    def d(xt, t):
        return (x0 + 0.05 * torch.sin(9 * x0)).to(xt)

    wide, narrow = (bound(d, Cosine(), x0.to(dtype), Cosine().times(50)) for dtype in (torch.float64, torch.float32))
    torch.testing.assert_close(narrow.double(), wide, rtol=1e-3, atol=1e-6)


def test_arguments_are_checked():
    """What does not fit raises and is named."""
    x, d, path = torch.ones(4, 2), lambda xt, t: xt, Cosine()
    cases = [
        (ValueError, r"^times must end in 0, where the data are; got 0\.25", lambda: bound(d, path, x, [1, 0.5, 0.25])),
        (ValueError, "^times must be strictly descending", lambda: bound(d, path, x, [0.0, 0.5, 1.0])),
        (ValueError, "^times must be strictly descending", lambda: bound(d, path, x, [1.0, 0.5, 0.5, 0.0])),
        (ValueError, "^times must be strictly descending", lambda: bound(d, path, x, [0.0])),
        (ValueError, r"^times must lie in \[0, 1\]", lambda: bound(d, path, x, [1.5, 0.0])),
        (ValueError, "^times must be a whole number", lambda: bound(d, path_of("chain"), x, [20, 2.5, 0])),
        (ValueError, "^prior_std must be positive; got 0", lambda: bound(d, path, x, [1, 0], prior_std=0)),
        (ValueError, "^prior_std must be positive; got -1", lambda: prior_term(path, x, 1.0, -1)),
        (ValueError, "^prior_std must be positive; got nan", lambda: prior_term(path, x, 1.0, math.nan)),
        (ValueError, "^variance must be 'beta', 'posterior' or a number in .*; got 'large'",
         lambda: bound(d, path, x, [1, 0], variance="large")),
        (ValueError, "^bins must be at least 2; got 1", lambda: bound(d, path, x, [1, 0], bins=1)),
        (TypeError, "must be a floating-point tensor", lambda: bound(d, path, x.long(), [1, 0])),
        (TypeError, "^path must be a GaussianPath; got str", lambda: bound(d, "Cosine", x, [1, 0])),
    ]  # fmt: skip
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()
