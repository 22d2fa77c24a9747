"""Toy data: the mixture against torch.distributions, autograd, Tweedie's formula and Bayes on a grid; samples by tests."""

import math

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch
from oracles import MEANS, PATHS, STDS, WEIGHTS, known, mixture_mean, path_of, time_on
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from dgm_course.paths import Cosine, Straight
from dgm_course.toy import GaussianMixture, checkerboard, ring, swiss_roll, two_moons

# Three components in space, none alike: two slanted ones, one of them nearly flat, and a round one
POINTS = torch.tensor([[-1.0, 0.5, 0.2], [1.0, 1.0, -0.7], [0.3, -1.2, 0.4]], dtype=torch.float64)
ROOTS = torch.tensor(
    [[[0.6, 0.0, 0.0], [0.5, 0.3, 0.0], [-0.2, 0.1, 0.4]], [[1.0, 0.0, 0.0], [-0.1, 0.05, 0.0], [0.3, 0.4, 0.5]]]
)
COVS = torch.cat([ROOTS @ ROOTS.mT, 0.2 * torch.eye(3)[None]]).double()
SHARES = torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64)
MIXTURE = GaussianMixture(POINTS, COVS, SHARES)
LINE = GaussianMixture(torch.from_numpy(MEANS)[:, None], torch.from_numpy(STDS**2), torch.from_numpy(WEIGHTS))
all_paths = pytest.mark.parametrize("name", PATHS)


def close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=tolerance, atol=tolerance)


def noised(alpha=1.0, sigma=0.0):
    """The same mixture by torch.distributions, with means α·m and covariances α²·C + σ²·I."""
    parts = MultivariateNormal(alpha * POINTS, alpha**2 * COVS + sigma**2 * torch.eye(3, dtype=torch.float64))
    return MixtureSameFamily(Categorical(SHARES), parts)


def points(generator, n=7):
    return 1.5 * torch.randn(n, 3, generator=generator, dtype=torch.float64)


def test_density_of_the_data(generator):
    """Without a path, log_prob is torch's; and a path at t = 0 changes nothing."""
    x = points(generator)
    close(MIXTURE.log_prob(x), noised().log_prob(x))
    close(MIXTURE.log_prob(x, Cosine(), 0.0), noised().log_prob(x))


@all_paths
def test_density_on_a_path(name, generator):
    """log p_t is that of the noised mixture, for a number and a time for each point."""
    x, times = points(generator, 3), [time_on(name, u) for u in (0.2, 0.5, 1.0)]
    each = torch.cat([noised(*known(name, t)).log_prob(x[i : i + 1]) for i, t in enumerate(times)])
    close(MIXTURE.log_prob(x, path_of(name), torch.tensor(times, dtype=torch.float64)), each)
    close(MIXTURE.log_prob(x, path_of(name), times[1]), noised(*known(name, times[1])).log_prob(x))


@all_paths
def test_score_is_the_gradient(name, generator):
    """score is ∇ log p_t, by autograd through torch's density; without a path that of the data."""
    for t in (time_on(name, 0.2), time_on(name, 1.0), None):
        x = points(generator).requires_grad_()
        law = noised() if t is None else noised(*known(name, t))
        (score,) = torch.autograd.grad(law.log_prob(x).sum(), x)
        close(MIXTURE.score(x.detach(), *(() if t is None else (path_of(name), t))), score, 1e-9)


@all_paths
@pytest.mark.parametrize("unit", [0.05, 0.5, 1.0])
def test_denoiser_is_tweedies(name, unit, generator):
    """α·E[x_0 | x_t] = x_t + σ²·∇ log p_t(x_t), with the gradient by autograd through torch's density."""
    t = time_on(name, unit)
    alpha, sigma = known(name, t)
    x = (max(sigma, 1) * points(generator)).requires_grad_()
    (score,) = torch.autograd.grad(noised(alpha, sigma).log_prob(x).sum(), x)
    x0_hat = MIXTURE.denoiser(path_of(name))(x.detach(), t)
    close(alpha * x0_hat, x.detach() + sigma**2 * score, 1e-10 * max(1, sigma**2))


@all_paths
@pytest.mark.parametrize("unit", [0.1, 0.5, 0.95])
def test_denoiser_is_bayes(name, unit):
    """In one dimension E[x_0 | x_t] by brute force: prior times likelihood on a grid of x_0; and by numpy's formula."""
    t = time_on(name, unit)
    alpha, sigma = known(name, t)
    grid = np.linspace(-8, 8, 200_001)
    prior = sum(w * scipy.stats.norm.pdf(grid, m, s) for w, m, s in zip(WEIGHTS, MEANS, STDS, strict=True))
    x = alpha * np.array([-1.4, 0.1, 2.2]) + sigma * np.array([0.5, -0.3, 1.0])
    weight = prior * np.exp(-0.5 * ((x[:, None] - alpha * grid) / sigma) ** 2)
    expected = (weight * grid).sum(1) / weight.sum(1)
    close(LINE.denoiser(path_of(name))(torch.from_numpy(x)[:, None], t)[:, 0], expected)
    np.testing.assert_allclose(mixture_mean(x, alpha, sigma), expected, rtol=1e-10, atol=1e-10)


def test_denoiser_at_the_ends(generator):
    """At t = 0 it returns x; where no signal is left, the mean of the data."""
    x = points(generator)
    close(MIXTURE.denoiser(Cosine())(x, 0.0), x)
    mean = (SHARES / 6) @ POINTS
    close(MIXTURE.denoiser(Cosine())(x, 1.0), mean.expand(7, 3))


def test_density_integrates_to_one():
    """p_t has mass 1, by the trapezoidal rule."""
    grid = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    for t in (0.0, 0.3, 1.0):
        density = LINE.log_prob(grid[:, None], Cosine(), t).exp()
        assert torch.trapezoid(density, grid).item() == pytest.approx(1, abs=1e-10)


def test_far_away_nothing_overflows():
    """Far out in the tails density, score and denoiser stay finite, where plain exponentials would give 0/0."""
    x = torch.tensor([[1e4, -1e4, 1e4]], dtype=torch.float64)
    for value in (MIXTURE.log_prob(x), MIXTURE.score(x), MIXTURE.denoiser(Cosine())(x, 0.01)):
        assert bool(value.isfinite().all())


@pytest.mark.parametrize(
    "covs, expected",
    [
        (0.25, [0.25, 0.25, 0.25]),
        (torch.tensor([0.1, 0.2, 0.3]), [0.1, 0.2, 0.3]),
        (torch.tensor([0.1, 0.2, 0.3]).double()[:, None, None] * torch.eye(3).double(), [0.1, 0.2, 0.3]),
    ],
)
def test_ways_to_give_covariances(covs, expected, generator):
    """One variance for all, one for each component, or matrices; equal weights if none are given."""
    matrices = torch.tensor(expected).double()[:, None, None] * torch.eye(3).double()
    parts = MultivariateNormal(POINTS, matrices)
    law = MixtureSameFamily(Categorical(torch.ones(3, dtype=torch.float64)), parts)
    x = points(generator)
    close(GaussianMixture(POINTS, covs).log_prob(x), law.log_prob(x))


def test_mean_and_covariance():
    """In space from the raw second moments, E[xxᵀ] − mmᵀ; on the line by integrals; of one component its own."""
    share = SHARES.numpy() / 6
    mean = sum(w * m for w, m in zip(share, POINTS.numpy(), strict=True))
    second = sum(w * (c + np.outer(m, m)) for w, m, c in zip(share, POINTS.numpy(), COVS.numpy(), strict=True))
    close(MIXTURE.mean, mean)
    close(MIXTURE.cov, second - np.outer(mean, mean))
    grid = np.linspace(-8, 8, 200_001)
    density = sum(w * scipy.stats.norm.pdf(grid, m, s) for w, m, s in zip(WEIGHTS, MEANS, STDS, strict=True))
    mean = np.trapezoid(density * grid, grid)
    close(LINE.mean, [mean])
    close(LINE.cov, [[np.trapezoid(density * (grid - mean) ** 2, grid)]])
    one = GaussianMixture(POINTS[:1], COVS[:1])
    close(one.mean, POINTS[0])
    close(one.cov, COVS[0])
    assert ring(7, radius=3.0, std=0.5).cov.shape == (2, 2)
    close(ring(7, radius=3.0, std=0.5).cov, (4.5 + 0.25) * np.eye(2), 1e-5)  # a ring's is r²/2 in each direction


@all_paths
@pytest.mark.parametrize("unit", [0.0, 0.3, 1.0])
def test_cdf(name, unit):
    """P(x_t ≤ x) by SciPy's normals; far out it is 0 and 1; it has x's shape and type."""
    t = time_on(name, unit)
    alpha, sigma = known(name, t)
    x = math.hypot(alpha, sigma) * np.array([-300.0, -9.0, -1.5, 0.0, 0.4, 2.5, 300.0])
    expected = sum(
        w * scipy.stats.norm.cdf(x, alpha * m, np.hypot(alpha * s, sigma))
        for w, m, s in zip(WEIGHTS, MEANS, STDS, strict=True)
    )
    found = LINE.cdf(torch.from_numpy(x)[:, None], path_of(name), t)
    assert found.shape == (7, 1) and found.dtype == torch.float64
    np.testing.assert_allclose(found[:, 0].numpy(), expected, rtol=0, atol=1e-14)
    assert found[0] == 0 and found[-1] == 1
    assert LINE.cdf(torch.tensor([[0.3]]), path_of(name), t).dtype == torch.float32


def test_cdf_is_the_integral_of_the_density():
    """By the trapezoidal rule; its slope is the density, by autograd; without a path both are of the data."""
    grid = torch.linspace(-12, 12, 20_001, dtype=torch.float64)[:, None]
    for law in ((), (Cosine(), 0.0), (Cosine(), 0.3), (Cosine(), 1.0)):
        density = LINE.log_prob(grid, *law).exp()
        below = torch.cumulative_trapezoid(density, grid[:, 0])
        torch.testing.assert_close(LINE.cdf(grid, *law)[1:, 0], below, rtol=0, atol=1e-6)
        x = torch.tensor([[-1.4], [0.2], [1.7]], dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(LINE.cdf(x, *law).sum(), x)
        close(slope[:, 0], LINE.log_prob(x.detach(), *law).exp())


@all_paths
@pytest.mark.parametrize("unit", [0.0, 0.3, 1.0])
def test_quantile(name, unit):
    """The root of SciPy's distribution function, for shares of the middle and of the tails."""
    t = time_on(name, unit)
    alpha, sigma = known(name, t)

    def below(x):
        return sum(
            w * scipy.stats.norm.cdf(x, alpha * m, np.hypot(alpha * s, sigma))
            for w, m, s in zip(WEIGHTS, MEANS, STDS, strict=True)
        )

    size = math.hypot(alpha, sigma)
    for p in (1e-6, 0.01, 0.3, 0.5, 0.97, 1 - 1e-6):
        found = LINE.quantile(torch.tensor([[p]], dtype=torch.float64), path_of(name), t)
        expected = scipy.optimize.brentq(lambda x, p=p: below(x) - p, -40 * size, 40 * size, xtol=1e-14, rtol=1e-15)
        assert found.shape == (1, 1) and found.item() == pytest.approx(expected, abs=1e-8 * size)


def test_quantile_and_cdf_with_a_time_for_each_point():
    """Each point gets what it gets alone; the two undo each other; in float32 to its digits."""
    p, t = torch.tensor([[0.1], [0.5], [0.9]], dtype=torch.float64), torch.tensor([0.2, 0.6, 1.0], dtype=torch.float64)
    x = LINE.quantile(p, Cosine(), t)
    for i in range(3):
        close(x[i : i + 1], LINE.quantile(p[i : i + 1], Cosine(), t[i].item()))
    close(LINE.cdf(x, Cosine(), t), p)
    close(LINE.cdf(LINE.quantile(p)), p)
    narrow = LINE.quantile(p.float(), Cosine(), t)
    assert narrow.dtype == torch.float32
    close(narrow.double(), x, 1e-5)
    one = GaussianMixture(torch.tensor([[3.0]], dtype=torch.float64), 4.0)
    close(one.quantile(torch.tensor([[0.5], [0.975]], dtype=torch.float64)), [[3.0], [3 + 2 * 1.959963984540054]])


def test_quantile_far_from_zero():
    """A narrow component and a wide one, far apart: the search looks around both, as wide as the wider one is, and not around 0."""
    means, variances = torch.tensor([[-1000.0], [30000.0]], dtype=torch.float64), torch.tensor([1e-4, 1e4])
    far = GaussianMixture(means, variances, torch.tensor([1.0, 3.0]))
    p = torch.tensor([[0.125], [0.625], [0.25 + 0.75 * scipy.stats.norm.cdf(2.0)]], dtype=torch.float64)
    close(far.quantile(p), [[-1000.0], [30000.0], [30200.0]], 1e-9)  # the medians of the two, and two deviations above
    close(far.quantile(p[:2], Straight(), 0.5), [[-500.0], [15000.0]], 1e-9)


def test_quantiles_draw_from_the_law(generator):
    """Of even numbers they make the samples: the mean and the covariance are the mixture's, to the fourth digit on a grid."""
    p = ((torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000)[:, None]
    x = LINE.quantile(p)
    assert bool((x.diff(dim=0) > 0).all())
    close(x.mean(0), LINE.mean, 1e-3)
    close(x.var(0)[None], LINE.cov, 1e-3)


def test_samples_have_the_law(generator):
    """In one dimension 20,000 samples pass a Kolmogorov-Smirnov test at 1e-3."""
    x = LINE.sample(20_000, generator)[:, 0].numpy()

    def cdf(x):
        return sum(w * scipy.stats.norm.cdf(x, m, s) for w, m, s in zip(WEIGHTS, MEANS, STDS, strict=True))

    assert scipy.stats.kstest(x, cdf).pvalue > 1e-3
    assert scipy.stats.kstest(x, lambda x: cdf(x - 0.03)).pvalue < 1e-3  # and the test would see a shift of 0.03


def test_samples_have_the_moments(generator):
    """In space, mean and covariance of 200,000 samples lie within 5 standard errors of the exact ones."""
    x, n = MIXTURE.sample(200_000, generator), 200_000
    share = SHARES / 6
    mean = share @ POINTS
    cov = torch.einsum("k,kij->ij", share, COVS + POINTS[:, :, None] * POINTS[:, None, :]) - torch.outer(mean, mean)
    away = x - mean
    assert bool(((x.mean(0) - mean).abs() < 5 * (cov.diagonal() / n).sqrt()).all())
    products = away[:, :, None] * away[:, None, :]
    assert bool(((products.mean(0) - cov).abs() < 5 * products.std(0) / math.sqrt(n)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_types(dtype, generator):
    """Everything has x's type, also when the mixture was built in another."""
    x = points(generator).to(dtype)
    for value in (MIXTURE.log_prob(x), MIXTURE.score(x, Cosine(), 0.5), MIXTURE.denoiser(Cosine())(x, 0.5)):
        assert value.dtype == dtype
    close(MIXTURE.denoiser(Cosine())(x, 0.5).double(), MIXTURE.denoiser(Cosine())(x.double(), 0.5), 1e-5)
    assert GaussianMixture(POINTS.to(dtype), 0.1).sample(3, generator).dtype == dtype


def test_ring(generator):
    """Modes stand on a circle, at equal angles."""
    mixture = ring(6, radius=3.0, std=0.01)
    x = mixture.sample(600, generator).double()
    assert bool(((x.norm(dim=1) - 3).abs() < 0.06).all())
    angle = torch.atan2(x[:, 1], x[:, 0]) / (math.pi / 3)
    assert bool(((angle - angle.round()).abs() < 0.02).all())
    assert len(angle.round().remainder(6).unique()) == 6


def test_two_moons(generator):
    """Without noise the points lie on two half circles of radius 1, each the other turned by half a turn."""
    x = two_moons(500, generator, noise=0.0).double()
    on_one, on_other = ((x + torch.tensor([0.5, 0.25]) * side).norm(dim=1) for side in (1, -1))
    one, other = (on_one - 1).abs() < 1e-5, (on_other - 1).abs() < 1e-5
    assert bool((one | other).all())
    assert bool((x[one & ~other][:, 1] > -0.25 - 1e-5).all()) and bool((x[other & ~one][:, 1] < 0.25 + 1e-5).all())
    assert 0.35 < one.double().mean() < 0.65


def test_swiss_roll(generator):
    """Without noise the radius grows with the angle, over one and a half turns, to about 1.2."""
    x = swiss_roll(500, generator, noise=0.0).double()
    radius, angle = x.norm(dim=1), torch.atan2(x[:, 1], x[:, 0])
    turns = (12 * radius - angle) / (2 * math.pi)
    close(turns, turns.round(), 1e-5)
    assert 12 * radius.min() > 1.5 * math.pi - 1e-4 and 12 * radius.max() < 4.5 * math.pi + 1e-4
    assert radius.max() < 1.2 < radius.max() + 0.1


def test_checkerboard(generator):
    """All points lie in the dark squares of a 4×4 board, evenly over them and within each."""
    x = checkerboard(8000, generator)
    assert x.min() >= -2 and x.max() <= 2
    square = x.floor().long()
    assert bool((square.sum(1) % 2 == 0).all())
    counts = torch.unique(square, dim=0, return_counts=True)[1]
    assert len(counts) == 8 and scipy.stats.chisquare(counts.numpy()).pvalue > 1e-3
    assert scipy.stats.kstest((x - square).flatten().numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("make", [two_moons, swiss_roll, checkerboard, lambda n, g: ring().sample(n, g)])
def test_points_come_from_the_generator(make):
    """One seed one set of points; the global state stays untouched."""
    before = torch.random.get_rng_state()
    one, same, other = (make(5, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert one.shape == (5, 2) and torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: GaussianMixture(torch.zeros(3), 1.0), r"^means must be floating-point of shape \(K, d\)"),
        (lambda: GaussianMixture(torch.zeros(3, 2, dtype=torch.int64), 1.0), "^means must be floating-point"),
        (lambda: GaussianMixture(POINTS, torch.ones(2)), "^covs must be a number"),
        (lambda: GaussianMixture(POINTS, torch.ones(3, 2, 2)), "^covs must be a number"),
        (
            lambda: GaussianMixture(POINTS, torch.ones(3, 3).tril().expand(3, 3, 3)),
            "^covs must be a number",
        ),
        (
            lambda: GaussianMixture(POINTS, -torch.eye(3).expand(3, 3, 3)),
            "^covs must have no negative",
        ),
        (lambda: GaussianMixture(POINTS, 1.0, torch.ones(2)), r"^weights must be positive, shape \(3,\)"),
        (lambda: GaussianMixture(POINTS, 1.0, torch.tensor([1.0, 0.0, 1.0])), "^weights must be positive"),
        (
            lambda: MIXTURE.cdf(torch.zeros(4, 3)),
            r"^a distribution function needs points \(B, 1\) and data of one dimension",
        ),
        (lambda: MIXTURE.cdf(torch.zeros(4, 1)), r"got \(4, 1\) and means \(3, 3\)$"),
        (lambda: LINE.cdf(torch.zeros(4, 2)), "^a distribution function needs"),
        (lambda: LINE.cdf(torch.zeros(4)), r"got \(4,\) and means \(3, 1\)$"),
        (lambda: LINE.quantile(torch.full((4, 2), 0.5)), "^a distribution function needs"),
        (lambda: LINE.quantile(torch.tensor([[0.5], [0.0]])), r"^p must lie in \(0, 1\); got 0 to 0.5"),
        (lambda: LINE.quantile(torch.tensor([[0.5], [1.0]])), r"^p must lie in \(0, 1\); got 0.5 to 1"),
        (lambda: LINE.quantile(torch.tensor([[0.5], [torch.nan]])), r"^p must lie in \(0, 1\)"),
        (lambda: LINE.cdf(torch.zeros(4, 1), Cosine(), torch.zeros(3)), r"^t must be a number or have shape \(4,\)"),
        (lambda: MIXTURE.log_prob(torch.zeros(4, 2)), r"^x must have shape \(B, 3\)"),
        (lambda: MIXTURE.score(torch.zeros(3)), r"^x must have shape \(B, 3\)"),
        (lambda: MIXTURE.denoiser(Cosine())(torch.zeros(4, 2), 0.5), r"^x must have shape \(B, 3\)"),
        (
            lambda: MIXTURE.log_prob(torch.zeros(4, 3), Cosine(), torch.zeros(3)),
            r"^t must be a number or have shape \(4,\)",
        ),
    ],
)
def test_arguments_are_checked(call, message):
    """What does not fit raises and is named."""
    with pytest.raises(ValueError, match=message):
        call()
