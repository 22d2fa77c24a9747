"""The references of homework 4 against other derivations: moment equations solved, densities differentiated, the kernels."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from oracles import CONTINUOUS, forward_kernel, known, known_rates
from scipy.integrate import solve_ivp
from torch.distributions import MultivariateNormal

from dgm_course import likelihood, losses, samplers
from dgm_course.denoisers import Denoiser
from dgm_course.grading.exercise import load
from dgm_course.homework import Affine
from dgm_course.paths import VP, Cosine, Straight
from dgm_course.toy import GaussianMixture

REFERENCE = {name: exercise.reference for name, exercise in load(Path(__file__).parent / "hw4.py").items()}


def near(actual, expected, tolerance=1e-10):
    actual, expected = (torch.as_tensor(value, dtype=torch.float64) for value in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tensor(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


# ou_moments -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1.3, 1e-6, 0.0, -0.7])
def test_the_moments_are_those_of_a_numerical_solver(k):
    c, t = 1.4, tensor(0.3, 1.0, 2.5)
    solved = solve_ivp(
        lambda _, y: [-k * y[0], -2 * k * y[1] + c**2], (0, 2.5), [1.0, 0.0], t_eval=t, rtol=1e-11, atol=1e-13
    )
    mean, variance = REFERENCE["ou_moments"](torch.ones(3, 2, dtype=torch.float64), t, k, c)
    near(mean, torch.from_numpy(solved.y[0])[:, None].expand(3, 2), 1e-8)
    near(variance, solved.y[1], 1e-8)


def test_the_moments_are_those_of_vp_with_one_beta():
    path, t = VP(3.0, 3.0), tensor(0.0, 0.2, 0.9)
    mean, variance = REFERENCE["ou_moments"](randn(3, 2), t, 1.5, 3**0.5)
    near(mean, path.alpha(t)[:, None] * randn(3, 2))
    near(variance, path.sigma(t) ** 2)


@pytest.mark.parametrize("k", [0.8, 1e-17, 0.0, -1e-17, -0.8])
def test_a_walk_in_two_parts_is_one_walk(k):
    s, t, x = tensor(0.4, 0.1), tensor(1.1, 0.7), randn(2, 3)
    middle, first = REFERENCE["ou_moments"](x, s, k, 1.3)
    mean, second = REFERENCE["ou_moments"](middle, t, k, 1.3)
    end, variance = REFERENCE["ou_moments"](x, s + t, k, 1.3)
    near(mean, end)
    near((-2 * k * t).exp() * first + second, variance)


def test_a_weak_spring_is_brownian_motion_and_a_strong_one_comes_to_rest():
    t = tensor(0.5, 2.0)
    for k in (1e-17, 0.0, -1e-17):
        near(REFERENCE["ou_moments"](randn(2, 1), t, k, 1.5)[1], 2.25 * t, 1e-14)
    mean, variance = REFERENCE["ou_moments"](randn(2, 1), t, 50.0, 1.5)
    near(mean, torch.zeros(2, 1), 1e-9)
    near(variance, 2.25 / 100 * torch.ones(2), 1e-9)


# sde_of_path ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONTINUOUS)
def test_without_a_centre_the_sde_is_that_of_the_path(name):
    path, t = CONTINUOUS[name][0], [0.1, 0.5, 0.85]
    values = [tensor(*column) for column in zip(*(known(name, time) for time in t), strict=True)]
    rates = [tensor(*column) for column in zip(*(known_rates(name, time) for time in t), strict=True)]
    zero = torch.zeros(3, dtype=torch.float64)
    f, b, g2 = REFERENCE["sde_of_path"](values[0], zero, values[1], rates[0], zero, rates[1])
    near(f, path.drift(tensor(*t)), 1e-8)
    near(g2, path.diffusion2(tensor(*t)), 1e-8)
    assert not b.any()
    for time, shrink, noise in zip(t, f.tolist(), g2.tolist(), strict=True):  # and of the step of a short time
        a, v = forward_kernel(name, time - 5e-7, time + 5e-7)
        near([math.log(a) / 1e-6, v / 1e-6], [shrink, noise], 1e-4)


def test_the_sde_with_a_centre_leads_along_the_path():
    """From t = 0.1 to 0.9, by a solver that knows f, b and g² only."""

    def path(t):
        return torch.stack([torch.cos(1.2 * t), torch.sin(3 * t) - t**2, torch.sinh(t)])

    def rates(t, y):
        t = torch.tensor([t], dtype=torch.float64)
        f, b, g2 = (part.item() for part in REFERENCE["sde_of_path"](*path(t), *torch.func.jvp(path, (t,), (t**0,))[1]))
        return [f * y[0] + b, f * y[1] + b, 2 * f * y[2] + g2]

    def moments(t):  # the means from two values of x_0, and the variance
        alpha, mu, sigma = path(tensor(t))
        return torch.cat([-1.5 * alpha + mu, 2 * alpha + mu, sigma**2])

    solved = solve_ivp(rates, (0.1, 0.9), moments(0.1), rtol=1e-10, atol=1e-12)
    near(solved.y[:, -1], moments(0.9), 1e-7)


def test_a_path_has_an_sde_as_long_as_the_noise_to_signal_ratio_grows():
    def path(t):  # σ/α = sin(πt) grows until t = 1/2
        return torch.stack([1 - t / 2, 3 * t, (1 - t / 2) * torch.sin(math.pi * t)])

    def sde(*times):
        t = tensor(*times)
        return REFERENCE["sde_of_path"](*path(t), *torch.func.jvp(path, (t,), (torch.ones_like(t),))[1])

    assert (sde(0.0, 0.2, 0.49)[2] >= 0).all()
    for times in ([0.51], [0.2, 0.51], [0.9, 0.1]):
        with pytest.raises(ValueError, match="g2"):
            sde(*times)


# correlated_dsm -------------------------------------------------------------------------------------------------------

FACTOR = torch.tensor([[0.9, 0, 0], [0.5, 0.7, 0], [-0.3, 0.4, 1.2]], dtype=torch.float64)


def bent(x, t):
    """Some score, not affine."""
    return torch.tanh(x @ randn(3, 3, seed=5)) * t - x


def test_the_loss_is_the_weighted_distance_to_the_gradient_of_the_log_density():
    x0, eps, alpha = randn(5, 3), randn(5, 3, seed=1), 0.6
    xt = (alpha * x0 + (FACTOR @ eps.mT).mT).requires_grad_()
    q = MultivariateNormal(alpha * x0, scale_tril=FACTOR)
    (target,) = torch.autograd.grad(q.log_prob(xt).sum(), xt)
    error = bent(xt, 0.3) - target
    expected = torch.stack([0.5 * one @ q.covariance_matrix[0] @ one for one in error])
    near(REFERENCE["correlated_dsm"](bent, x0, 0.3, eps, alpha, FACTOR), expected)


def test_with_noise_of_one_strength_it_is_the_kernel_with_sigma_squared():
    path, t = Cosine(), 0.4
    x0, eps, sigma = randn(5, 3), randn(5, 3, seed=1), path.sigma(0.4)
    d = Denoiser(lambda x, t: bent(x, 0.4), path, predicts="score")
    factor = sigma * torch.eye(3, dtype=torch.float64)
    mine = REFERENCE["correlated_dsm"](bent, x0, t, eps, path.alpha(t).item(), factor)
    near(mine.mean(), losses.dsm(d, x0, t, eps, weight=(sigma**2).expand(5)))


def test_the_best_affine_score_is_that_of_the_noised_data():
    """For Gaussian data, by sums over Gauss's points, which are exact here; also if L has no inverse."""
    points = tensor(-(3**0.5), 0.0, 3**0.5)
    nodes = torch.cartesian_prod(*[points] * 4)
    weights = torch.cartesian_prod(*[tensor(1 / 6, 2 / 3, 1 / 6)] * 4).prod(1)
    spread, factor = tensor([0.8, 0.0], [0.5, 0.6]), tensor([0.7, 0.0], [-0.4, 0.3])
    x0, eps = nodes[:, :2] @ spread.mT, nodes[:, 2:]
    exact = -torch.linalg.inv(0.25 * spread @ spread.mT + factor @ factor.mT)

    def loss(matrix):
        return (weights * REFERENCE["correlated_dsm"](lambda x, t: x @ matrix.mT, x0, 0.5, eps, 0.5, factor)).sum()

    near(torch.func.grad(loss)(exact), torch.zeros(2, 2))
    assert torch.func.grad(loss)(1.1 * exact).abs().max() > 0.01


def test_without_an_inverse_the_loss_is_the_limit():
    flat = FACTOR.clone()
    flat[2, 2] = 0
    x0, eps = randn(4, 3), randn(4, 3, seed=1)
    steps = [flat + h * torch.eye(3, dtype=torch.float64) for h in (1e-7, 0.0)]
    almost, there = (REFERENCE["correlated_dsm"](bent, x0, 0.3, eps, 0.6, factor) for factor in steps)
    near(almost, there, 1e-5)


# corrector_step -------------------------------------------------------------------------------------------------------


def test_what_the_score_adds_has_r_times_the_length_of_what_the_noise_adds():
    x, score, noise, r = randn(4, 2, 3), 3 * randn(4, 2, 3, seed=1), randn(4, 2, 3, seed=2), 0.3
    moved, delta = REFERENCE["corrector_step"](x, score, noise, r)
    for i in range(4):
        uphill = delta[i] * score[i]
        near(uphill.norm(), r * (moved[i] - x[i] - uphill).norm())
        alone, own = REFERENCE["corrector_step"](x[i : i + 1], score[i : i + 1], noise[i : i + 1], r)
        near(alone[0], moved[i])  # whatever else is in the batch
        near(own[0], delta[i])
    near(moved, samplers.langevin_step(x, score, delta, noise))


def test_the_answer_to_the_question_holds():
    """For N(0, I) in 8 dimensions a small measured step leaves the variance (1 + 2/8)² and not 1: E‖s‖²p^{8/10}."""
    g = torch.Generator().manual_seed(0)
    x = 1.25 * torch.randn(20_000, 8, generator=g)
    for _ in range(200):
        x, _ = REFERENCE["corrector_step"](x, -x, torch.randn(x.shape, generator=g), 0.1)
    assert abs(x.square().mean() - 1.25**2) < 0.04


# sample_between -------------------------------------------------------------------------------------------------------

VARIANCE = 0.3
TIMES = torch.linspace(0.95, 0.05, 10, dtype=torch.float64) ** 1.5


def gaussian_score(path):
    """Of N(0, VARIANCE) data."""
    return lambda x, t: -x / (path.alpha(t) ** 2 * VARIANCE + path.sigma(t) ** 2)


def rates(path, times):
    return path.drift(times), path.diffusion2(times)


@pytest.mark.parametrize("path", [VP(), Cosine(), Straight()], ids=repr)
def test_lambda_1_is_the_kernel_and_lambda_0_the_ode(path):
    score, x = gaussian_score(path), randn(5, 2)

    def denoiser(x, t):
        return (x + path.sigma(t) ** 2 * score(x, t)) / path.alpha(t)

    g = torch.Generator().manual_seed(3)
    noise = torch.stack([torch.randn(5, 2, generator=g, dtype=torch.float64) for _ in TIMES[1:]])
    states = samplers.euler_maruyama(denoiser, path, x, TIMES, generator=torch.Generator().manual_seed(3))
    near(REFERENCE["sample_between"](score, x, TIMES, *rates(path, TIMES), 1.0, noise), samplers.last(states))
    y = x
    for t, s in itertools.pairwise(TIMES.tolist()):  # the velocity from the closed-form flow of a Gaussian
        var, later = (path.alpha(u) ** 2 * VARIANCE + path.sigma(u) ** 2 for u in (t - 1e-6, t + 1e-6))
        y = y + (s - t) * y * (later.log() - var.log()) / 4e-6
    near(REFERENCE["sample_between"](score, x, TIMES, *rates(path, TIMES), 0.0, noise), y, 1e-5)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 2.0])
def test_all_members_lead_to_the_same_density_as_steps_get_short(eta):
    """The last state is linear in the start and in each z, so its variance is known without a draw."""
    path, gaps = VP(), []
    for steps in (200, 400, 800):
        times = torch.linspace(1, 0.01, steps + 1, dtype=torch.float64)
        first, last = (path.alpha(t) ** 2 * VARIANCE + path.sigma(t) ** 2 for t in (1.0, 0.01))
        single = torch.eye(steps + 1, dtype=torch.float64)
        score = gaussian_score(path)
        end = REFERENCE["sample_between"](score, first.sqrt() * single[0], times, *rates(path, times), eta, single[1:])
        gaps.append((end.square().sum() / last - 1).item())
    assert abs(gaps[-1]) < 0.01
    assert eta == 0.5 or all(1.8 < before / after < 2.3 for before, after in itertools.pairwise(gaps))


def test_a_short_step_is_that_of_ddim_with_lambda_for_eta():
    path, x, z = VP(), randn(6, 1), randn(6, 1, seed=1)
    score = gaussian_score(path)
    gaps = []
    for h in (1e-2, 1e-3, 1e-4):
        times = tensor(0.5, 0.5 - h)
        x0 = (x + path.sigma(0.5) ** 2 * score(x, 0.5)) / path.alpha(0.5)
        ddim = samplers.ddim_step(path, x, x0, 0.5, 0.5 - h, eta=0.7, noise=z)
        gaps.append(
            (REFERENCE["sample_between"](score, x, times, *rates(path, times), 0.7, z[None]) - ddim).abs().max()
        )
    assert gaps[2] < gaps[1] / 20 < gaps[0] / 400  # faster than the step, which is of order √h


def test_the_score_is_asked_at_the_time_where_the_step_begins():
    asked = []

    def score(x, t):
        asked.append(t)
        return -x

    REFERENCE["sample_between"](score, randn(2, 1), TIMES, *rates(VP(), TIMES), 1.0, randn(9, 2, 1))
    assert asked == TIMES[:-1].tolist() and all(type(t) is float for t in asked)


# estimated_log_prob ---------------------------------------------------------------------------------------------------


def test_with_all_signs_the_trace_is_exact_and_the_error_is_known():
    """All 2^D signs make E vvᵀ = I without chance; over them the variance of vᵀJv is ½Σ_{i≠j}(J_ij + J_ji)²."""
    D, B, h = 4, 3, 0.3
    J, end = randn(B, D, D), randn(B, D, seed=1)
    signs = torch.cartesian_prod(*[tensor(-1.0, 1.0)] * D)[:, None].expand(-1, B, D)
    products = torch.einsum("bde,kbe->kbd", J, signs)[None]
    log_prob, error = REFERENCE["estimated_log_prob"](end, tensor(0.2, 0.2 + h), signs, products)
    normal = MultivariateNormal(torch.zeros(D).double(), torch.eye(D).double())
    near(log_prob, normal.log_prob(end) + h * torch.stack([one.trace() for one in J]))
    both = (J + J.mT) * (1 - torch.eye(D, dtype=torch.float64))
    K = 2**D
    near(error**2, h**2 * both.square().sum((1, 2)) / 2 / (K - 1))


def test_the_error_is_the_spread_of_the_estimate_over_new_probes():
    """20,000 times 5 normal probes kept over 3 steps: the mean of error² is the variance of the estimate."""
    n, K, D = 20_000, 5, 3
    J, times = randn(3, D, D), tensor(0.0, 0.2, 0.7, 1.0)
    probes = randn(K, n, D, seed=1)
    products = torch.einsum("nde,kbe->nkbd", J, probes)
    log_prob, error = REFERENCE["estimated_log_prob"](torch.zeros(n, D).double(), times, probes, products)
    whole = (times.diff()[:, None, None] * J).sum(0)
    near(log_prob.mean(), whole.trace() - D / 2 * math.log(2 * math.pi), 0.02)
    exact = 2 * ((whole + whole.mT) / 2).square().sum() / K
    near([log_prob.var().item(), error.square().mean().item()], [exact, exact], 0.03)


def test_along_the_flow_of_a_mixture_it_comes_to_the_log_density_and_to_the_kernel():
    path = Cosine()
    mixture = GaussianMixture(tensor([-1.0, 0.5], [1.2, -0.3]), 0.2)
    x0 = mixture.sample(6, torch.Generator().manual_seed(0))
    signs = torch.cartesian_prod(*[tensor(-1.0, 1.0)] * 2)[:, None].expand(-1, 6, 2)

    def estimate(steps):
        times = torch.linspace(1e-3, 0.999, steps + 1, dtype=torch.float64)
        x, products = x0, []
        for t, h, f, g2 in zip(times, times.diff(), path.drift(times), path.diffusion2(times), strict=False):
            copies = x.expand(4, 6, 2).clone().requires_grad_()  # one for each probe
            score = mixture.score(copies.flatten(0, 1), path, t).unflatten(0, (4, 6))
            (row,) = torch.autograd.grad((score * signs).sum(), copies)  # vᵀ∇s, and ∇s is symmetric
            products.append(f * signs - g2 / 2 * row)
            x = x + h * (f * x - g2 / 2 * score[0].detach())
        return REFERENCE["estimated_log_prob"](x, times, signs, torch.stack(products))[0]

    truth = mixture.log_prob(x0, path, 1e-3)
    coarse, fine = ((estimate(steps) - truth).abs().max() for steps in (100, 200))
    assert fine < 0.1 and fine < 0.7 * coarse
    kernel = likelihood.ode_log_prob(mixture.denoiser(path), path, x0, torch.linspace(0.999, 1e-3, 101).double())
    near(2 * estimate(200) - estimate(100), kernel, 0.01)  # the error of first order removed


# The cases ------------------------------------------------------------------------------------------------------------


def test_each_step_asks_the_score_in_a_cell_of_its_own():
    """Else the score's table would not tell at which time it is asked."""
    exercise = load(Path(__file__).parent / "hw4.py")["sample_between"]
    for label in exercise.groups:
        for seed in range(20):
            for inputs in exercise.groups[label].make(torch.Generator().manual_seed(seed)):
                cells = inputs["times"].long().tolist()
                assert isinstance(inputs["score"], Affine) and len(set(cells)) == len(cells)
                assert (inputs["times"].diff() < 0).all() and cells[0] < len(inputs["score"].scale)
