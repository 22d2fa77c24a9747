"""The references of homework 2 against other derivations: Jacobians by autograd, quadrature, Φ, roots, an ODE solver."""

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.integrate import quad, solve_ivp
from scipy.optimize import brentq
from scipy.stats import norm
from torch.autograd.functional import jacobian
from torch.distributions import MultivariateNormal, Normal

from dgm_course.flows import Composed, Coupling, Flow, Logit, Planar, Transform, affine, affine_inverse, dequantize
from dgm_course.grading.exercise import load

REFERENCE = {name: exercise.reference for name, exercise in load(Path(__file__).parent / "hw2.py").items()}
WAYS = ("forward", "inverse")


def near(actual, expected, tolerance=1e-10):
    actual, expected = (torch.as_tensor(value, dtype=torch.float64) for value in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def log_volumes(function, points):
    """log|det| of the whole Jacobian at each point, by autograd."""
    rows = [jacobian(lambda row: function(row[None])[0].flatten(), point) for point in points]
    return torch.stack([torch.linalg.slogdet(row.reshape(row.shape[0], -1)).logabsdet for row in rows])


# sinh_arcsinh_log_prob ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("skew", "tail"), [(0.0, 1.0), (0.7, 1.4), (-0.5, 0.6), (0.4, -1.2)])
def test_between_two_points_lies_the_probability_of_the_noise_between_theirs(skew, tail):
    def density(x):
        inputs = ([[x]], [skew], [tail])
        return REFERENCE["sinh_arcsinh_log_prob"](*(torch.tensor(one, dtype=torch.float64) for one in inputs)).exp()

    def noise(x):
        return brentq(lambda z: math.sinh(tail * math.asinh(z) + skew) - x, -1e4, 1e4, xtol=1e-13)

    for low, high in pairwise([-2.0, -0.3, 0.1, 1.7]):
        near(quad(density, low, high, epsabs=1e-11)[0], abs(norm.cdf(noise(high)) - norm.cdf(noise(low))), 1e-9)


def test_coordinates_are_independent():
    x, skew, tail = randn(5, 3), randn(3, seed=1), torch.tensor([0.7, -1.3, 1.0], dtype=torch.float64)
    parts = [REFERENCE["sinh_arcsinh_log_prob"](x[:, i : i + 1], skew[i : i + 1], tail[i : i + 1]) for i in range(3)]
    near(REFERENCE["sinh_arcsinh_log_prob"](x, skew, tail), sum(parts))


# coupling_chain -------------------------------------------------------------------------------------------------------


def networks(dim, layers):
    kept = [(dim + 1 - i % 2) // 2 for i in range(layers)]
    return [(randn(2 * (dim - k), k, seed=i) / 2, randn(2 * (dim - k), seed=i + 9)) for i, k in enumerate(kept)]


@pytest.mark.parametrize("direction", WAYS)
@pytest.mark.parametrize(("dim", "layers"), [(2, 1), (4, 3), (5, 2), (7, 4)])
def test_a_chain_is_that_of_the_kernels_with_masks(dim, layers, direction):
    def coupling(i, weight, bias):
        stays = torch.arange(dim) % 2 == i % 2

        def net(kept):
            s, t = (kept[:, stays] @ weight.T + bias).chunk(2, 1)
            raw = kept.new_zeros(len(kept), 2, dim)
            raw[:, 0, ~stays], raw[:, 1, ~stays] = s.tanh(), t
            return raw.flatten(1)

        return Coupling(stays.double(), None, limit=math.inf), net

    nets, kernels = networks(dim, layers), []
    for i, (weight, bias) in enumerate(nets):
        kernel, net = coupling(i, weight, bias)
        kernel.net, kernel.mask = net, kernel.mask.double()
        kernels.append(kernel)
    flow, v = Composed(*kernels), randn(4, dim, seed=3)
    expected = flow(v) if direction == "forward" else flow.inverse(v)
    for got, wanted in zip(REFERENCE["coupling_chain"](v, nets, direction), expected, strict=True):
        near(got, wanted)


@pytest.mark.parametrize("direction", WAYS)
def test_the_log_determinant_of_a_chain_is_that_of_its_jacobian(direction):
    v, nets = randn(3, 5), networks(5, 3)
    result, log_det = REFERENCE["coupling_chain"](v, nets, direction)
    near(log_det, log_volumes(lambda row: REFERENCE["coupling_chain"](row, nets, direction)[0], v))
    back, home = REFERENCE["coupling_chain"](result, nets, WAYS[direction == "forward"])
    near(back, v)
    near(home, -log_det)


# image_bits -----------------------------------------------------------------------------------------------------------

LOC, LOG_SCALE = torch.tensor([0.3, -0.6], dtype=torch.float64), torch.tensor([0.2, 0.7], dtype=torch.float64)


@pytest.mark.parametrize(("levels", "margin"), [(2, 0.1), (3, 0.03), (8, 0.05)])
def test_with_the_noise_on_a_fine_grid_the_bits_are_those_of_the_probability(levels, margin):
    middles = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    noise = torch.cartesian_prod(middles, middles)[:, None]
    for image in ([0, 0], [1, 0], [0, levels - 1]):
        k = torch.tensor([image])
        log_p = 0.0
        for level, loc, log_scale in zip(image, LOC.tolist(), LOG_SCALE.tolist(), strict=True):
            shares = [margin + (1 - 2 * margin) * (level + end) / levels for end in (0, 1)]
            low, high = ((math.log(p / (1 - p)) - loc) / math.exp(log_scale) for p in shares)
            log_p += math.log2(norm.cdf(high) - norm.cdf(low))
        near(REFERENCE["image_bits"](k, noise, levels, margin, LOC, LOG_SCALE), [-log_p / 2], 1e-4)


class Pixelwise(Transform):
    def forward(self, z):
        return affine(z, LOG_SCALE, LOC)

    def inverse(self, x):
        return affine_inverse(x, LOG_SCALE, LOC)


def test_one_draw_gives_the_bits_of_the_kernels():
    k, noise = torch.tensor([[0, 3], [2, 1], [3, 3]]), torch.rand(1, 3, 2, generator=torch.Generator().manual_seed(0))
    y = dequantize(2 * k.double() / 3 - 1, noise[0].double(), levels=4)
    log_prob = Flow(Composed(Pixelwise(), Logit(0.04)), (2,)).log_prob(y)
    bits = (2 * math.log(4) - log_prob) / 2 / math.log(2)
    near(REFERENCE["image_bits"](k, noise.double(), 4, 0.04, LOC, LOG_SCALE), bits)


# multi_scale ----------------------------------------------------------------------------------------------------------


def fields(channels, scales):
    stays = [channels * 2 ** (i + 1) for i in range(scales)]
    return [(randn(2 * c, c, seed=i) / 3, randn(2 * c, seed=i + 9) / 2) for i, c in enumerate(stays)]


@pytest.mark.parametrize(("shape", "scales"), [((2, 1, 4, 4), 2), ((2, 3, 2, 4), 1), ((1, 1, 4, 8), 1)])
def test_the_density_of_an_image_is_that_of_the_jacobian(shape, scales):
    nets, x = fields(shape[1], scales), randn(*shape)
    z, log_prob = REFERENCE["multi_scale"](x, nets, "inverse")
    volume = log_volumes(lambda row: REFERENCE["multi_scale"](row, nets, "inverse")[0], x)
    near(log_prob, Normal(0.0, 1.0).log_prob(z).sum((1, 2, 3)) + volume)
    back, again = REFERENCE["multi_scale"](z, nets, "forward")
    near(back, x)
    near(again, log_prob)


def test_with_scales_that_are_constant_an_image_is_gaussian():
    nets = [
        (torch.cat([0 * weight[: len(weight) // 2], weight[len(weight) // 2 :]]), bias) for weight, bias in fields(1, 2)
    ]

    def draw(z):
        return REFERENCE["multi_scale"](z.reshape(-1, 1, 4, 4), nets, "forward")[0].flatten(1)

    mean, columns = draw(torch.zeros(1, 16, dtype=torch.float64))[0], torch.eye(16, dtype=torch.float64)
    mix = draw(columns) - mean
    x = randn(3, 16, seed=5)
    expected = MultivariateNormal(mean, mix.T @ mix).log_prob(x)
    near(REFERENCE["multi_scale"](x.reshape(3, 1, 4, 4), nets, "inverse")[1], expected)


def test_what_leaves_stands_where_it_stood_and_what_stays_does_not_see_it():
    nets, x = fields(1, 2), randn(1, 1, 4, 4)
    other = x.clone()
    other[:, :, 1, 2] += 1  # an odd row leaves at the first scale
    moved = (
        REFERENCE["multi_scale"](other, nets, "inverse")[0] - REFERENCE["multi_scale"](x, nets, "inverse")[0]
    ).abs()
    assert moved[0, 0, 1, 2] > 0.1 and (moved > 1e-12).sum() == 1


# ridge ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pull", [-3.0, -0.5, 2.0])
@pytest.mark.parametrize("dim", [1, 2, 5])
def test_a_ridge_is_undone_and_its_log_determinants_are_those_of_the_jacobian(dim, pull):
    w, z = 1.7 * randn(dim, seed=1), 2 * randn(6, dim)
    u = randn(dim, seed=2)
    u = u + (pull - u @ w) * w / (w @ w)
    x, log_det = REFERENCE["ridge"](z, u, w, 0.4, "forward")
    back, home = REFERENCE["ridge"](x, u, w, 0.4, "inverse")
    near(back, z, 1e-9)
    near(log_det, log_volumes(lambda row: REFERENCE["ridge"](row, u, w, 0.4, "forward")[0], z))
    near(home, log_volumes(lambda row: REFERENCE["ridge"](row, u, w, 0.4, "inverse")[0], x), 1e-8)


def test_the_push_is_bounded_as_that_of_the_kernel():
    planar = Planar(3, torch.Generator().manual_seed(0)).double()
    u, w = planar.raw.detach(), planar.w.detach()
    z, a = randn(4, 3), randn(4, 3) @ w + 0.2
    moved = REFERENCE["ridge"](z, u, w, 0.2, "forward")[0] - z
    near(moved, (a / (1 + a.abs()))[:, None] * planar.u.detach())


def test_the_way_back_solves_the_equation():
    u, w, x = randn(2, seed=1), randn(2, seed=2), 2 * randn(5, 2)
    k = math.log1p(math.exp((u @ w).item())) - 1
    z = REFERENCE["ridge"](x, u, w, -0.3, "inverse")[0]
    for point, noise in zip(x, z, strict=True):
        target = (point @ w).item() - 0.3
        near(
            noise @ w - 0.3,
            brentq(lambda a, target=target: a + k * a / (1 + abs(a)) - target, -50, 50, xtol=1e-13),
            1e-9,
        )


# small_steps ----------------------------------------------------------------------------------------------------------


def field(dim, ridges):
    return 0.4 * randn(dim, ridges, seed=1), randn(ridges, dim, seed=2), randn(ridges, seed=3)


@pytest.mark.parametrize(("dim", "ridges", "steps"), [(2, 4, 1), (3, 2, 3), (4, 6, 5), (1, 3, 2)])
def test_the_exact_sum_is_that_of_the_jacobian_of_the_whole_walk(dim, ridges, steps):
    z, parts = randn(3, dim), field(dim, ridges)
    near(
        REFERENCE["small_steps"](z, *parts, steps)[1],
        log_volumes(lambda row: REFERENCE["small_steps"](row, *parts, steps)[0], z),
    )


def test_one_step_of_a_linear_field():
    """Near 0 tanh is a line, and J a matrix that is known: here a whirl, with the eigenvalues 0.3 ± 2i."""
    a = torch.tensor([[0.3, -2.0], [2.0, 0.3]], dtype=torch.float64)
    w = torch.eye(2, dtype=torch.float64)
    z, still = 1e-9 * randn(2, 2), torch.zeros(2, dtype=torch.float64)
    x, exact, first, second = REFERENCE["small_steps"](z, a, w, still, 1)
    near(x, z + z @ a.T)
    near(exact, [math.log(1.3**2 + 4)] * 2)
    near(first, [0.6] * 2)
    near(second, [0.6 - (0.3**2 - 4)] * 2)


def test_the_orders_are_one_and_two_and_the_limit_is_the_integral_of_the_divergence():
    z, (u, w, b) = randn(3, 2), field(2, 5)

    def rates(t, state):
        x = torch.tensor(state[:2], dtype=torch.float64)
        j = jacobian(lambda x: u @ torch.tanh(w @ x + b), x)
        return [*(u @ torch.tanh(w @ x + b)).tolist(), j.trace().item()]

    ends = [solve_ivp(rates, (0, 1), [*row, 0.0], rtol=1e-11, atol=1e-12).y[:, -1] for row in z.tolist()]
    limit = torch.from_numpy(np.stack(ends))
    walks = [REFERENCE["small_steps"](z, u, w, b, steps) for steps in (100, 200, 400)]
    for order, part in ((1, 2), (2, 3)):  # of the distance to the exact sum
        gaps = [(walk[1] - walk[part]).abs().mean() for walk in walks]
        assert all(abs(math.log2(a / b) - order) < 0.05 for a, b in pairwise(gaps))
    for part, wanted in ((0, limit[:, :2]), (1, limit[:, 2]), (2, limit[:, 2]), (3, limit[:, 2])):
        near(2 * walks[2][part] - walks[1][part], wanted, 1e-4)  # without what is of order h
