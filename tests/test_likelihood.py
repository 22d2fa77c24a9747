"""The bound against closed forms for linear denoisers, against p_θ(x_0) by quadrature, and as one log ratio of walks."""

import math

import numpy as np
import pytest
import torch
from oracles import CHAIN_BETAS, MEANS, STDS, WEIGHTS, forward_kernel, known, mixture_mean, mp, path_of
from scipy import stats
from torch.distributions import Normal, kl_divergence

from dgm_course.likelihood import bits_per_dim, bound, prior_term
from dgm_course.paths import VP, Cosine, DiscretePath, Straight

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
        (ValueError, "^variance must be 'beta' or 'posterior'; got 'large'",
         lambda: bound(d, path, x, [1, 0], variance="large")),
        (ValueError, "^bins must be at least 2; got 1", lambda: bound(d, path, x, [1, 0], bins=1)),
        (TypeError, "must be a floating-point tensor", lambda: bound(d, path, x.long(), [1, 0])),
        (TypeError, "^path must be a GaussianPath; got str", lambda: bound(d, "Cosine", x, [1, 0])),
    ]  # fmt: skip
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()
