"""Divergences against torch.distributions, scipy, integrals by brute force and optimizers that know nothing of them."""

import itertools
import math

import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import torch
from scipy.stats import norm
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from dgm_course.divergences import gaussian_kl, jensen_shannon, kl, nearest_reverse, standard_kl
from dgm_course.toy import GaussianMixture

GRID = np.linspace(-20, 20, 8001)  # the sum over it is the integral, to rounding, for densities as smooth as these
CELL = GRID[1] - GRID[0]


def close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=tolerance, atol=tolerance)


def gaussian(generator, *batch, dim=3):
    """A mean and a covariance without any symmetry but its own, for each of a batch."""
    root = torch.randn(*batch, dim, dim, generator=generator, dtype=torch.float64)
    cov = root @ root.mT + 0.3 * torch.eye(dim, dtype=torch.float64)
    return torch.randn(*batch, dim, generator=generator, dtype=torch.float64), (cov + cov.mT) / 2


# Gaussians ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_gaussian_kl_is_torchs(dim, generator):
    """Full covariances, both ways round, which differ; 0 for equal ones."""
    p, q = gaussian(generator, dim=dim), gaussian(generator, dim=dim)
    there, back = gaussian_kl(*p, *q), gaussian_kl(*q, *p)
    close(there, kl_divergence(MultivariateNormal(*p), MultivariateNormal(*q)))
    close(back, kl_divergence(MultivariateNormal(*q), MultivariateNormal(*p)))
    assert there.shape == () and (there - back).abs() > 0.01
    close(gaussian_kl(*p, *p), 0.0)


def test_gaussian_kl_is_a_mean_of_log_ratios(generator):
    """E_p[log p − log q] over 200,000 draws, within 5 standard errors."""
    (m, c), q = gaussian(generator), gaussian(generator)
    x = m + torch.randn(200_000, 3, generator=generator, dtype=torch.float64) @ torch.linalg.cholesky(c).T
    ratio = MultivariateNormal(m, c).log_prob(x) - MultivariateNormal(*q).log_prob(x)
    assert (gaussian_kl(m, c, *q) - ratio.mean()).abs() < 5 * ratio.std() / math.sqrt(200_000)


def test_gaussian_kl_does_not_depend_on_coordinates(generator):
    """The same for Ax + b on both sides, whatever the invertible A."""
    p, q = gaussian(generator), gaussian(generator)
    a, b = (torch.randn(3, *rest, generator=generator, dtype=torch.float64) for rest in ((3,), ()))
    moved = [(a @ m + b, a @ c @ a.T) for m, c in (p, q)]
    close(gaussian_kl(*moved[0], *moved[1]), gaussian_kl(*p, *q), 1e-9)


def test_gaussian_kl_broadcasts(generator):
    """Batches on both sides, and many means on one covariance, are the single ones by torch."""
    (m_p, c_p), (m_q, c_q) = gaussian(generator, 4, 1), gaussian(generator, 5)
    found = gaussian_kl(m_p, c_p, m_q, c_q)
    assert found.shape == (4, 5)
    for i, j in itertools.product(range(4), range(5)):
        p, q = MultivariateNormal(m_p[i, 0], c_p[i, 0]), MultivariateNormal(m_q[j], c_q[j])
        close(found[i, j], kl_divergence(p, q))
    means, (m, c) = torch.randn(6, 3, generator=generator, dtype=torch.float64), (m_q[0], c_q[0])
    each = [kl_divergence(MultivariateNormal(mean, c_q[1]), MultivariateNormal(m, c)) for mean in means]
    close(gaussian_kl(means, c_q[1], m, c), torch.stack(each))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m, c: gaussian_kl(m, -c, m, c), "^cov_p must be symmetric and positive definite"),
        (lambda m, c: gaussian_kl(m, c, m, c.triu()), "^cov_q must be symmetric and positive definite"),
        (lambda m, c: gaussian_kl(m, c, m, c[:2]), r"^cov_q must have shape \(…, 3, 3\); got \(2, 3\)"),
        (lambda m, c: gaussian_kl(m, c, m[:2], c[:2, :2]), "^mean_q must have 3 dimensions, like mean_p; got 2"),
        (lambda m, c: standard_kl(m, m[:2]), r"^log_var must have the shape of mean, \(3,\); got \(2,\)"),
        (lambda m, c: kl(m, m[:2], 1.0), r"^log_q must have the shape of log_p, \(3,\); got \(2,\)"),
        (lambda m, c: nearest_reverse(lambda x: x.sum(1), m, -c), "^cov must be symmetric and positive definite"),
    ],
)
def test_arguments_are_checked(call, message, generator):
    """What does not fit raises and is named."""
    with pytest.raises(ValueError, match=message):
        call(*gaussian(generator))


def test_standard_kl_is_torchs(generator):
    """Number by number, from the narrowest to the widest; the variance is the exponential of what is given."""
    mean = 3 * torch.randn(50, 4, generator=generator, dtype=torch.float64)
    log_var = 4 * torch.randn(50, 4, generator=generator, dtype=torch.float64)
    expected = kl_divergence(Normal(mean, (log_var / 2).exp()), Normal(0.0, 1.0))
    close(standard_kl(mean, log_var), expected)
    close(standard_kl(torch.zeros(1).double(), torch.tensor([-300.0]).double()), [149.5])


def test_standard_kl_of_nearly_the_prior():
    """In float32 near log σ² = 0 it is (log σ²)²/4 to 2e-11, where exp − 1 loses 6e-8; it is 0 at the prior."""
    log_var = torch.cat([-torch.logspace(-8, -4, 20), torch.zeros(1), torch.logspace(-8, -4, 20)])
    exact = log_var.double() ** 2 / 4 + log_var.double() ** 3 / 12
    found = standard_kl(torch.zeros(41), log_var).double()
    assert (found - exact).abs().max() < 2e-11 and found[20] == 0
    assert (0.5 * (log_var.exp() - 1 - log_var).double() - exact).abs().max() > 1e-8


# On a grid ----------------------------------------------------------------------------------------------------------


def normals():
    return norm(-0.5, 0.8), norm(1.0, 1.5)


def test_kl_on_a_grid_is_the_closed_form():
    """Two Gaussians, both ways round; the divergence of a density to itself is 0."""
    log_p, log_q = (torch.from_numpy(law.logpdf(GRID)) for law in normals())
    p, q = (Normal(*torch.tensor(numbers, dtype=torch.float64)) for numbers in ((-0.5, 0.8), (1.0, 1.5)))
    close(kl(log_p, log_q, CELL), kl_divergence(p, q))
    close(kl(log_q, log_p, CELL), kl_divergence(q, p))
    shift = torch.from_numpy(norm(1.0, 0.8).logpdf(GRID))
    close(kl(log_p, shift, CELL), 1.5**2 / (2 * 0.8**2))
    close(kl(log_p, log_p, CELL), 0.0)


def test_kl_on_a_grid_of_two_dimensions(generator):
    """The cell is an area; any shape of grid will do."""
    p, q = (MultivariateNormal(*gaussian(generator, dim=2)) for _ in "pq")
    axis = torch.linspace(-25, 25, 601, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis).reshape(601, 601, 2)
    cell = float(axis[1] - axis[0]) ** 2
    close(kl(p.log_prob(points), q.log_prob(points), cell), kl_divergence(p, q), 1e-8)


def test_where_there_is_nothing_counts_nothing():
    """0 · log 0 = 0, also against nothing; where only q is 0 the divergence is infinite."""
    p, q = torch.tensor([0.0, 0.5, 0.5, 0.0]).double(), torch.tensor([0.25, 0.25, 0.5, 0.0]).double()
    close(kl(p.log(), q.log(), 1.0), 0.5 * math.log(2))
    assert kl(q.log(), p.log(), 1.0) == math.inf
    halves = 0.5 * math.log(0.5 / 0.375), 0.25 * math.log(2) + 0.25 * math.log(0.25 / 0.375)
    close(jensen_shannon(p.log(), q.log(), 1.0), sum(halves) / 2)
    far = torch.full((3,), -2000.0, dtype=torch.float64)  # smaller than any number: 0
    close(kl(far, torch.zeros(3).double(), 1.0), 0.0)


def test_jensen_shannon_is_scipys_integral():
    """By its definition and adaptive quadrature; symmetric; half the sum of two divergences, and less than log 2."""
    p, q = normals()

    def integrand(x):
        a, b = p.pdf(x), q.pdf(x)
        return 0.5 * a * math.log(2 * a / (a + b)) + 0.5 * b * math.log(2 * b / (a + b))

    exact = scipy.integrate.quad(integrand, -12, 15, points=[-0.5, 1.0], epsabs=1e-13, limit=200)[0]
    log_p, log_q = (torch.from_numpy(law.logpdf(GRID)) for law in (p, q))
    close(jensen_shannon(log_p, log_q, CELL), exact)
    close(jensen_shannon(log_q, log_p, CELL), exact)
    assert 0.05 < exact < math.log(2)
    close(jensen_shannon(log_p, log_p, CELL), 0.0)


def test_jensen_shannon_of_densities_apart():
    """log 2, whether zeros are zeros or only very small; and Kullback–Leibler has no such bound."""
    one = torch.tensor([0.5, 0.5, 0.0, 0.0], dtype=torch.float64).log()
    close(jensen_shannon(one, one.flip(0), 1.0), math.log(2))
    log_p, log_q = (torch.from_numpy(norm(m, 0.5).logpdf(GRID)) for m in (-9, 9))
    close(jensen_shannon(log_p, log_q, CELL), math.log(2))
    close(kl(log_p, log_q, CELL), 18**2 / (2 * 0.25))


# The nearest Gaussian, reverse --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_a_gaussian_is_found_from_anywhere(dim, generator):
    """The divergence has one minimum then, and it is 0: mean and covariance are the density's own."""
    mean, cov = gaussian(generator, dim=dim)
    log_p = MultivariateNormal(mean, cov).log_prob
    for _ in range(3):
        start = gaussian(generator, dim=dim)
        start[0].mul_(3)
        before = [value.clone() for value in start]
        found, spread, value = nearest_reverse(log_p, *start, nodes=5)
        close(found, mean, 1e-6)
        close(spread, cov, 1e-6)
        assert value.abs() < 1e-9 and not any(out.requires_grad for out in (found, spread, value))
        assert all(map(torch.equal, before, start))  # the start is left alone


def test_each_side_finds_its_own_mode():
    """Of two far modes q takes one, that of its start, and pays −log of its weight: log 2 for one of two equal ones."""
    means = torch.tensor([[-4.0, 0.0], [4.0, 1.0]], dtype=torch.float64)
    covs = torch.tensor([[[0.5, 0.2], [0.2, 0.3]], [[0.2, 0.0], [0.0, 0.6]]], dtype=torch.float64)
    for share in (0.5, 0.2):
        p = GaussianMixture(means, covs, torch.tensor([share, 1 - share]))
        for k, weight in enumerate((share, 1 - share)):
            start = means[k] + torch.tensor([0.5, -0.7]), torch.eye(2, dtype=torch.float64)
            with torch.no_grad():  # its own gradients are nobody's business
                mean, cov, value = nearest_reverse(p.log_prob, *start)
            close(mean, means[k], 1e-5)
            close(cov, covs[k], 1e-5)
            close(value, -math.log(weight), 1e-6)


def bumps(x):
    """Log-density of two overlapping Gaussians, 0.35·N(−1.2, 0.7²) + 0.65·N(1, 0.9²), by numpy."""
    return np.logaddexp(math.log(0.35) + norm.logpdf(x, -1.2, 0.7), math.log(0.65) + norm.logpdf(x, 1, 0.9))


def reverse(parameters):
    """KL(q‖p) of q = N(m, e^{2s}) and the bumps, summed on the fine grid."""
    log_q = norm.logpdf(GRID, parameters[0], math.exp(parameters[1]))
    return (np.exp(log_q) * (log_q - bumps(GRID))).sum() * CELL


def test_the_minimum_is_one_by_an_integral():
    """Where modes overlap: value, vanishing slopes and place agree with an integral on a grid and scipy's optimizer."""
    p = GaussianMixture(
        torch.tensor([[-1.2], [1.0]]).double(), torch.tensor([0.49, 0.81]).double(), torch.tensor([0.35, 0.65]).double()
    )
    mean, cov, value = nearest_reverse(p.log_prob, torch.tensor([0.3]).double(), torch.eye(1).double(), nodes=120)
    found = np.array([mean.item(), 0.5 * math.log(cov.item())])
    assert value.item() == pytest.approx(reverse(found), abs=1e-7) and value > 0.01
    for step in 1e-4 * np.eye(2):
        assert abs(reverse(found + step) - reverse(found - step)) / 2e-4 < 1e-5
        assert min(reverse(found + 300 * step), reverse(found - 300 * step)) > reverse(found)
    best = scipy.optimize.minimize(reverse, [0.3, 0.0], method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-12})
    np.testing.assert_allclose(found, best.x, atol=1e-5)
    mean, cov, value = nearest_reverse(p.log_prob, torch.tensor([0.3]).double(), torch.eye(1).double())
    assert value.item() == pytest.approx(best.fun, abs=1e-4)  # and with the nodes it takes unasked
    np.testing.assert_allclose([mean.item(), 0.5 * math.log(cov.item())], best.x, atol=2e-3)


# The nearest Gaussian, forward --------------------------------------------------------------------------------------


def test_forward_the_moments_are_nearest_on_the_line():
    """scipy's optimizer of KL(p‖q), summed on the grid, ends at the mixture's mean and variance; q covers both modes."""
    p = GaussianMixture(
        torch.tensor([[-3.0], [2.0]]).double(), torch.tensor([0.25, 0.64]).double(), torch.tensor([0.3, 0.7])
    )
    parts = [math.log(w) + norm.logpdf(GRID, m, s) for w, m, s in ((0.3, -3, 0.5), (0.7, 2, 0.8))]
    log_p = np.logaddexp(*parts)

    def forward(parameters):
        return (np.exp(log_p) * (log_p - norm.logpdf(GRID, parameters[0], math.exp(parameters[1])))).sum() * CELL

    best = scipy.optimize.minimize(forward, [2.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-13})
    moments = np.array([p.mean.item(), 0.5 * math.log(p.cov.item())])
    np.testing.assert_allclose(moments, best.x, atol=1e-5)
    for step in 0.05 * np.array([[1, 0], [-1, 0], [0, 1], [0, -1]]):
        assert forward(moments + step) > forward(moments) + 1e-4
    grid_q = torch.from_numpy(norm.logpdf(GRID, p.mean.item(), math.sqrt(p.cov.item())))
    close(kl(torch.from_numpy(log_p), grid_q, CELL), best.fun, 1e-8)
    assert best.fun < forward([2.0, math.log(0.8)])


def test_forward_the_moments_are_nearest_in_the_plane(generator):
    """E_p[−log q], in closed form component by component, has gradient 0 there, and is larger all around."""
    means, covs = gaussian(generator, 3, dim=2)
    share = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    p = GaussianMixture(2 * means, covs, share)

    def cross_entropy(mean, root):
        parts, q = MultivariateNormal(2 * means, covs), MultivariateNormal(mean, scale_tril=root)
        return share @ (kl_divergence(parts, q) + parts.entropy())

    mean, root = p.mean.requires_grad_(), torch.linalg.cholesky(p.cov).requires_grad_()
    least = cross_entropy(mean, root)
    slopes = torch.autograd.grad(least, (mean, root))
    assert slopes[0].abs().max() < 1e-10 and slopes[1].tril().abs().max() < 1e-10
    for _ in range(20):
        shift, turn = (0.1 * torch.randn(2, *rest, generator=generator, dtype=torch.float64) for rest in ((), (2,)))
        assert cross_entropy(mean + shift, root + turn.tril()) > least + 1e-5
