"""Losses against formulas typed by hand, quadrature, torch's KL divergence, and normal integrals in 40 digits."""

import math

import numpy as np
import pytest
import torch
from oracles import PATHS, forward_kernel, known, known_rates, mp, path_of, time_on
from torch.distributions import Normal, kl_divergence

from dgm_course.denoisers import Denoiser
from dgm_course.losses import bound_term, dsm, esm, hybrid, jacobian_trace, simple, ssm
from dgm_course.paths import VP, Cosine, DiscretePath, Straight
from dgm_course.schedules import linear_betas

BETAS = np.linspace(0.01, 0.3, 10)
ABAR = np.concatenate([[1.0], np.cumprod(1 - BETAS)])
CHAIN = DiscretePath(BETAS)


def normals(*shape, generator):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=tolerance, atol=tolerance)


# The training loss ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("predicts", ["eps", "x0", "v", "score", "velocity"])
@pytest.mark.parametrize("shape", [(3, 2), (3, 1, 2, 2), (1, 5)])
def test_simple(predicts, shape, generator):
    """Squared error of what the network predicts, averaged over values and samples, sample by sample with numpy."""
    x0, eps = normals(*shape, generator=generator), normals(*shape, generator=generator)
    times, total = [0.2, 0.5, 0.8][: shape[0]], 0.0

    def net(xt, t):
        return torch.sin(3 * xt) + t.double().reshape(-1, *[1] * (xt.ndim - 1))

    for i, t in enumerate(times):
        alpha, sigma, a, e = math.cos(math.pi * t / 2), math.sin(math.pi * t / 2), x0[i].numpy(), eps[i].numpy()
        rate = math.pi / 2 * (alpha * e - sigma * a)
        target = {"eps": e, "x0": a, "v": alpha * e - sigma * a, "score": -e / sigma, "velocity": rate}[predicts]
        said = np.sin(3 * (alpha * a + sigma * e)) + np.float32(t)
        total += ((said - target) ** 2).mean() / len(times)
    loss = simple(Denoiser(net, Cosine(), predicts), x0, torch.tensor(times, dtype=torch.float64), eps)
    assert loss.shape == () and loss.dtype == torch.float64
    close(loss, total)


@pytest.mark.parametrize("name", PATHS)
def test_simple_vanishes_for_the_right_answer(name, generator):
    """A network that says v, from closed forms, has loss 0, and one that is off by 2 has loss 4."""
    x0, eps, t = normals(3, 2, generator=generator), normals(3, 2, generator=generator), time_on(name, 0.6)
    alpha, sigma = known(name, t)
    v = alpha * eps - sigma * x0
    close(simple(Denoiser(lambda xt, t: v, path_of(name), "v"), x0, t, eps), 0.0, 1e-18)
    close(simple(Denoiser(lambda xt, t: v + 2, path_of(name), "v"), x0, t, eps), 4.0)
    if name != "chain":
        rates = known_rates(name, t)
        d = Denoiser(lambda xt, t: rates[0] * x0 + rates[1] * eps, path_of(name), "velocity")
        close(simple(d, x0, t, eps), 0.0, 1e-18)


def test_simple_weights_each_sample(generator):
    """`weight` multiplies each sample's own loss."""
    x0, eps, t = normals(3, 2, generator=generator), normals(3, 2, generator=generator), torch.tensor([0.2, 0.5, 0.9])
    d = Denoiser(lambda xt, t: torch.zeros_like(xt), Straight(), "eps")
    weight = torch.tensor([0.0, 2.0, 5.0], dtype=torch.float64)
    each = (eps**2).mean(1)
    close(simple(d, x0, t, eps, weight), (2 * each[1] + 5 * each[2]) / 3)
    close(simple(d, x0, t, eps, torch.ones(3)), simple(d, x0, t, eps))
    for bad in (torch.ones(2), torch.ones(3, 1), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"^weight must have shape \(3,\)"):
            simple(d, x0, t, eps, bad)


def test_simple_passes_conditions_and_gradients():
    """Conditions reach the network; the gradient is that of the mean squared error."""
    scale = torch.tensor(0.5, requires_grad=True)
    d = Denoiser(lambda xt, t, y: scale * y[:, None] * torch.ones_like(xt), Straight(), "eps")
    y, eps = torch.tensor([1.0, 2.0]), torch.zeros(2, 3)
    loss = simple(d, torch.zeros(2, 3), 0.5, eps, y=y)
    loss.backward()
    assert loss.item() == pytest.approx((0.25 + 1) / 2)
    assert scale.grad.item() == pytest.approx((2 * 0.5 * 1 + 2 * 0.5 * 4) / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_simple_keeps_the_type(dtype):
    """float32 data give a float32 loss."""
    d = Denoiser(lambda xt, t: xt, Cosine(), "v")
    assert (
        simple(d, torch.ones(2, 3, dtype=dtype), torch.tensor([0.1, 0.2]), torch.ones(2, 3, dtype=dtype)).dtype == dtype
    )


# Score matching -------------------------------------------------------------------------------------------------------
# Expectations are sums: data and noise run over Gauss–Hermite nodes, whose weights are given as `weight`.

HERMITE, HERMITE_WEIGHTS = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(80))
HERMITE_WEIGHTS = HERMITE_WEIGHTS / HERMITE_WEIGHTS.sum()
MIXTURE = {"weights": np.array([0.3, 0.7]), "means": np.array([-1.1, 0.6]), "stds": np.array([0.5, 0.3])}
POINTS = torch.tensor([[-1.0, 0.2], [0.7, 0.9], [0.4, -0.8]], dtype=torch.float64)


def mean_of(function, parts):
    """Σ w f over nodes: `weight` times the number of nodes, so that the mean over samples is the expectation."""
    *nodes, weights = parts
    return function(*nodes, weight=len(weights) * weights)


def line_nodes():
    """(x_0, ε, weights) of the 1-D mixture: two components, 80 nodes for x_0 and 80 for ε."""
    k, i, j = (index.flatten() for index in torch.meshgrid(*map(torch.arange, (2, 80, 80)), indexing="ij"))
    part, mean, std = (torch.from_numpy(MIXTURE[name])[k] for name in ("weights", "means", "stds"))
    x0 = mean + std * HERMITE[i]
    return x0[:, None], HERMITE[j][:, None], part * HERMITE_WEIGHTS[i] * HERMITE_WEIGHTS[j]


def plane_nodes():
    """(x_0, ε, weights) of three points in the plane and normal noise around them."""
    k, i, j = (index.flatten() for index in torch.meshgrid(*map(torch.arange, (3, 80, 80)), indexing="ij"))
    weights = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)[k] * HERMITE_WEIGHTS[i] * HERMITE_WEIGHTS[j]
    return POINTS[k], torch.stack([HERMITE[i], HERMITE[j]], 1), weights


LAWS = {"line": (line_nodes, 1), "plane": (plane_nodes, 2)}
both_laws = pytest.mark.parametrize("law", LAWS)
some_paths = pytest.mark.parametrize("name", ["VP", "SubVP", "Cosine", "Straight"])
HALFWAY = {"VP": 0.3, "SubVP": 0.4, "Cosine": 0.6, "Straight": 0.6}  # where the noise is wide enough for 80 nodes


def marginal(law, name, t):
    """p_t on a grid: points (N, D), weights p_t·(cell), ∇log p_t, and tr Cov(x_0 | x_t). In numpy, by Bayes."""
    alpha, sigma = known(name, t)
    if law == "line":
        weights, means, variances = MIXTURE["weights"], MIXTURE["means"][:, None], MIXTURE["stds"] ** 2
        x = np.linspace(-12, 12, 6001)[:, None]
    else:
        weights, means, variances = np.array([0.2, 0.3, 0.5]), POINTS.numpy(), np.zeros(3)
        axis = np.linspace(-9, 9, 241)
        x = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    dim, cell = x.shape[1], (x[1, -1] - x[0, -1]) ** x.shape[1]
    total = alpha**2 * variances + sigma**2  # of x_t in a component
    away = x[:, None] - alpha * means
    joint = weights * np.exp(-0.5 * (away**2).sum(2) / total) / (2 * math.pi * total) ** (dim / 2)
    p = joint.sum(1)
    share = joint / np.maximum(p, 1e-300)[:, None]
    score = -(share[..., None] * away / total[:, None]).sum(1)
    guess = means + (alpha * variances / total)[:, None] * away  # E[x_0 | x_t, component]
    left = dim * variances * sigma**2 / total  # and the trace of its covariance
    centre = (share[..., None] * guess).sum(1)
    spread = (share * (left + (guess**2).sum(2))).sum(1) - (centre**2).sum(1)
    return x, p * cell, score, spread


class Small(torch.nn.Module):
    """A smooth network with parameters: scale · tanh(W x + b) + c x."""

    def __init__(self, dim, seed):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        shapes = {"outer": (dim, 4), "inner": (4, dim), "bias": (4,), "linear": (dim, dim)}
        for key, shape in shapes.items():
            value = 0.5 * torch.randn(*shape, generator=g, dtype=torch.float64)
            setattr(self, key, torch.nn.Parameter(value))

    def forward(self, xt, t=None):
        return torch.tanh(xt @ self.inner.T + self.bias) @ self.outer.T + xt @ self.linear.T


def gradient(value, net):
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(net.parameters()))])


def every_sign(dim):
    """All 2^D vectors of ±1."""
    return torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * dim).reshape(-1, dim)


def over_directions(x0, eps, weights, v):
    """Every node with every direction, equally likely."""
    n = len(x0)
    again = [part.repeat_interleave(len(v), 0) for part in (x0, eps, weights / len(v))]
    return again[0], again[1], v.repeat(n, 1), again[2]


@pytest.mark.parametrize("shape", [(3, 2), (2, 1, 2, 3), (1, 4)])
@pytest.mark.parametrize("predicts", ["score", "eps", "x0", "v", "velocity"])
def test_dsm_by_hand(shape, predicts, generator):
    """½ Σ (s + ε/σ)², summed over values and averaged over samples with numpy, each sample at its own time."""
    x0, eps = normals(*shape, generator=generator), normals(*shape, generator=generator)
    times, total = [0.2, 0.5, 0.8][: shape[0]], 0.0
    lam = [0.3, 2.0, 0.7][: shape[0]]
    for i, t in enumerate(times):
        alpha, sigma, a, e = math.cos(math.pi * t / 2), math.sin(math.pi * t / 2), x0[i].numpy(), eps[i].numpy()
        xt = alpha * a + sigma * e
        said = np.sin(3 * xt) + np.float32(t)
        score = {  # on this path α² + σ² = 1 and the velocity is π/2·v
            "score": said,
            "eps": -said / sigma,
            "x0": (alpha * said - xt) / sigma**2,
            "v": -xt - alpha / sigma * said,
            "velocity": -xt - alpha / sigma * said * 2 / math.pi,
        }[predicts]
        total += lam[i] * 0.5 * ((score + e / sigma) ** 2).sum() / len(times)

    def net(xt, t):
        return torch.sin(3 * xt) + t.double().reshape(-1, *[1] * (xt.ndim - 1))

    d, t = Denoiser(net, Cosine(), predicts), torch.tensor(times, dtype=torch.float64)
    loss = dsm(d, x0, t, eps, torch.tensor(lam, dtype=torch.float64))
    assert loss.shape == () and loss.dtype == torch.float64
    close(loss, total)


@pytest.mark.parametrize("name", PATHS)
def test_dsm_weighted_by_the_variance_is_simple(name, generator):
    """With λ = σ² it is D/2 times the loss of a network that predicts the noise, whatever this one predicts."""
    x0, eps, t = normals(4, 3, generator=generator), normals(4, 3, generator=generator), time_on(name, 0.6)
    alpha, sigma = known(name, t)
    weight, net = torch.full((4,), sigma**2, dtype=torch.float64), Small(3, 1)
    for predicts in ["eps", "x0", "v", "score", "velocity"][: 4 if name == "chain" else 5]:  # a chain has no velocity
        d = Denoiser(net, path_of(name), predicts)
        eps_hat = (alpha * x0 + sigma * eps - alpha * d(alpha * x0 + sigma * eps, t)) / sigma
        loss = dsm(d, x0, t, eps, weight)
        close(loss, 0.5 * (eps - eps_hat).square().sum(1).mean(), 1e-8)
        of_noise = Denoiser(lambda xt, t, said=eps_hat: said, path_of(name), "eps")
        close(loss, 3 / 2 * simple(of_noise, x0, t, eps), 1e-8)


@both_laws
@some_paths
def test_three_losses_of_one_score(law, name):
    """DSM − ESM is D/2σ², and ½E‖s − ∇log p_t‖² lies ½E tr Cov(∇log p(x_t|x_0) | x_t) below DSM: for every θ.

    The first number is ½E‖ε/σ‖². The second comes from Bayes on a grid. The gradients in θ of all four are equal.
    """
    make, dim = LAWS[law]
    nodes, t = make(), HALFWAY[name]
    (alpha, sigma), path = known(name, t), path_of(name)
    x, p, score, spread = (torch.from_numpy(a) for a in marginal(law, name, t))
    close(p.sum(), 1.0, 1e-9)
    hidden = 0.5 * alpha**2 / sigma**4 * (p * spread).sum()
    fisher = 0.5 * (p * score.square().sum(1)).sum()
    close(dim / (2 * sigma**2) - fisher, hidden, 1e-8)  # the same number in two ways
    for seed in range(3):
        net = Small(dim, seed)
        d = Denoiser(net, path, "score")
        by_noise = mean_of(lambda x0, eps, weight, d=d: dsm(d, x0, t, eps, weight), nodes)
        by_trace = mean_of(lambda x0, eps, weight, d=d: esm(d, x0, t, eps, weight), nodes)
        explicit = 0.5 * (p * (net(x) - score).square().sum(1)).sum()
        directed = over_directions(*nodes, every_sign(dim))
        by_slices = [
            mean_of(lambda x0, eps, v, weight, d=d, r=r: ssm(d, x0, t, eps, v, weight, reduced=r), directed)
            for r in (True, False)
        ]
        close(by_noise - by_trace, dim / (2 * sigma**2), 1e-8)
        close(by_noise - explicit, hidden, 1e-8)
        slopes = [gradient(value, net) for value in (by_noise, by_trace, explicit, *by_slices)]
        assert slopes[0].abs().max() > 0.05
        for slope in slopes[1:]:
            close(slope, slopes[0], 1e-8)
        for value in by_slices:
            close(value, by_trace, 1e-12)


@pytest.mark.parametrize("predicts", ["eps", "x0", "v", "velocity"])
def test_score_matching_reads_any_network(predicts, generator):
    """What the network predicts becomes the score before it is differentiated: x_t stands in the conversion too."""
    alpha, sigma, t = 0.6, 0.4, 0.4  # of the straight path
    x0, eps, v = (normals(5, 3, generator=generator) for _ in "abc")
    net = Small(3, 2)

    def score(xt):
        said = net(xt)
        return {
            "eps": -said / sigma,
            "x0": (alpha * said - xt) / sigma**2,
            "v": -(sigma * xt + alpha * said) / (sigma * (alpha**2 + sigma**2)),
            "velocity": -(xt + alpha * said) / sigma,  # u = ε − x_0, so that ε = x_t + αu
        }[predicts]

    xt = alpha * x0 + sigma * eps
    jacobians = torch.func.vmap(torch.func.jacrev(score))(xt)
    half = 0.5 * score(xt).square().sum(1)
    d = Denoiser(net, Straight(), predicts)
    close(esm(d, x0, t, eps), (torch.einsum("bii->b", jacobians) + half).mean())
    along = torch.einsum("bi,bij,bj->b", v, jacobians, v)
    close(ssm(d, x0, t, eps, v), (along + half).mean())
    close(ssm(d, x0, t, eps, v, reduced=False), (along + 0.5 * (v * score(xt)).sum(1) ** 2).mean())


@pytest.mark.parametrize("name", ["VP", "Cosine", "VE"])
def test_minimiser_is_the_score_of_noised_data(name):
    """Normal data in the plane and s(x) = A x + b: all losses have the minimiser A = −C⁻¹, b = C⁻¹·αm of p_t = N(αm, C).

    Each loss is a quadratic in (A, b); four nodes on each axis make its mean exact and one Newton step its minimiser.
    """
    t, (alpha, sigma) = 0.4, known(name, 0.4)
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(4))
    grid = torch.cartesian_prod(*[nodes] * 4)
    weights = torch.cartesian_prod(*[weights / weights.sum()] * 4).prod(1)
    m = torch.tensor([0.5, -0.3], dtype=torch.float64)
    root = torch.tensor([[0.8, 0.0], [0.3, 0.5]], dtype=torch.float64)
    parts = m + grid[:, :2] @ root.T, grid[:, 2:], weights
    inverse = torch.linalg.inv(alpha**2 * root @ root.T + sigma**2 * torch.eye(2, dtype=torch.float64))
    expected = torch.cat([-inverse.flatten(), inverse @ m * alpha])
    directed = over_directions(*parts, every_sign(2))

    def value(theta, kind):
        d = Denoiser(lambda xt, t: xt @ theta[:4].reshape(2, 2).T + theta[4:], path_of(name), "score")
        if kind in (dsm, esm):
            return mean_of(lambda x0, eps, weight: kind(d, x0, t, eps, weight), parts)
        return mean_of(lambda x0, eps, v, weight: ssm(d, x0, t, eps, v, weight, reduced=kind == "reduced"), directed)

    for kind in (dsm, esm, "reduced", "plain"):
        start = torch.zeros(6, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(value(start, kind), start, create_graph=True)
        hessian = torch.stack([torch.autograd.grad(entry, start, retain_graph=True)[0] for entry in slope])
        close(-torch.linalg.solve(hessian, slope.detach()), expected, 1e-9)


def test_without_noise(generator):
    """At t = 0 ESM and SSM are the losses of the data's own score; DSM has no target there and raises."""
    x0, eps, v, net = (*(normals(4, 3, generator=generator) for _ in "abc"), Small(3, 0))
    d = Denoiser(net, Cosine(), "score")
    jacobians = torch.func.vmap(torch.func.jacrev(net))(x0)
    half = 0.5 * net(x0).square().sum(1)
    close(esm(d, x0, 0.0, eps), (torch.einsum("bii->b", jacobians) + half).mean())
    close(ssm(d, x0, 0.0, eps, v), (torch.einsum("bi,bij,bj->b", v, jacobians, v) + half).mean())
    with pytest.raises(ValueError, match="score.*not finite at t"):
        dsm(d, x0, 0.0, eps)


# Directions -----------------------------------------------------------------------------------------------------------


def each_value(loss, count):
    """The loss of each sample: the gradient of the mean with respect to `weight`, times the number of samples."""
    weight = torch.ones(count, dtype=torch.float64, requires_grad=True)
    return count * torch.autograd.grad(loss(weight), weight)[0]


@pytest.mark.parametrize("dim", [2, 3, 5])
def test_every_sign_gives_the_exact_trace(dim, generator):
    """Averaged over all 2^D vectors of signs both forms of SSM are ESM, sample by sample, to 1e-12."""
    x0, eps, net = normals(4, dim, generator=generator), normals(4, dim, generator=generator), Small(dim, 3)
    d, signs = Denoiser(net, Cosine(), "score"), every_sign(dim)
    exact = each_value(lambda w: esm(d, x0, 0.5, eps, w), 4)
    a, b, v, _ = over_directions(x0, eps, torch.ones(4, dtype=torch.float64), signs)
    for reduced in (True, False):
        each = each_value(lambda w, r=reduced: ssm(d, a, 0.5, b, v, w, reduced=r), len(v))
        assert each.reshape(4, -1).std(1).min() > 1e-3
        close(each.reshape(4, -1).mean(1), exact, 1e-12)


@pytest.mark.parametrize("dim", [2, 4])
def test_directions_of_length_one(dim, generator):
    """With ‖v‖ = 1 the plain form is ESM/D. The reduced one is not: for N(0, I) and s = a·x its minimiser is a = −1/D."""
    x0, eps, net = normals(4, dim, generator=generator), normals(4, dim, generator=generator), Small(dim, 3)
    d, unit = Denoiser(net, Cosine(), "score"), every_sign(dim) / math.sqrt(dim)
    a, b, v, _ = over_directions(x0, eps, torch.ones(4, dtype=torch.float64), unit)
    close(ssm(d, a, 0.5, b, v, reduced=False), esm(d, x0, 0.5, eps) / dim, 1e-12)
    nodes = math.sqrt(dim) * torch.cat([torch.eye(dim), -torch.eye(dim)]).double()  # E x = 0, E xxᵀ = I
    a, b, v, _ = over_directions(nodes, 0 * nodes, torch.ones(len(nodes), dtype=torch.float64), unit)
    for reduced, expected in ((True, -1 / dim), (False, -1.0)):
        slope = torch.zeros((), dtype=torch.float64, requires_grad=True)
        net = Denoiser(lambda xt, t, slope=slope: slope * xt, Cosine(), "score")
        (first,) = torch.autograd.grad(ssm(net, a, 0.0, b, v, reduced=reduced), slope, create_graph=True)
        (second,) = torch.autograd.grad(first, slope)
        close(-first.detach() / second, expected, 1e-12)


def test_the_reduced_form_has_less_variance():
    """s = −x on N(0, I), D = 4, signs v: vᵀJv = −D always, and Var ½‖x‖² = D/2 = 2 against Var ½(v·x)² = D²/2 = 8.

    For v·x ~ N(0, D). Summed over nodes for x and all signs, the mean of both is −D/2.
    """
    dim, (nodes, weights) = 4, (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(3))
    x = torch.cartesian_prod(*[nodes] * dim)
    w = torch.cartesian_prod(*[weights / weights.sum()] * dim).prod(1)
    a, b, v, weight = over_directions(x, 0 * x, w, every_sign(dim))
    d = Denoiser(lambda xt, t: -xt, Cosine(), "score")
    for reduced, expected in ((True, dim / 2), (False, dim**2 / 2)):
        each = each_value(lambda lam, r=reduced: ssm(d, a, 0.0, b, v, lam, reduced=r), len(v))
        mean = (weight * each).sum()
        close(mean, -dim / 2, 1e-10)
        close((weight * (each - mean) ** 2).sum(), expected, 1e-10)


# The trace of a Jacobian ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 4), (2, 2, 3, 3), (1, 1)])
def test_jacobian_trace(shape, generator):
    """Exact, and along v, against the full Jacobians of torch.func, for vectors and images."""
    x, v = normals(*shape, generator=generator), normals(*shape, generator=generator)
    size = math.prod(shape[1:])
    mix = normals(size, size, generator=generator)

    def f(row):
        return (torch.tanh(mix @ row.flatten()) * row.flatten()).reshape(row.shape)

    jacobians = torch.func.vmap(torch.func.jacrev(f))(x).reshape(shape[0], size, size)
    x = x.requires_grad_()
    y = torch.stack([f(row) for row in x])
    found, along = jacobian_trace(y, x), jacobian_trace(y, x, v)
    assert found.shape == along.shape == (shape[0],) and found.dtype == torch.float64
    close(found.detach(), torch.einsum("bii->b", jacobians))
    flat = v.reshape(shape[0], size)
    close(along.detach(), torch.einsum("bi,bij,bj->b", flat, jacobians, flat))


def test_hutchinson_by_enumeration(generator):
    """Over all signs the mean of vᵀJv is the trace, to 1e-12; one direction alone is off by what lies off the diagonal."""
    x = normals(1, 3, generator=generator).requires_grad_()
    mix, signs = normals(3, 3, generator=generator), every_sign(3)
    y = torch.sin(x) @ mix.T
    each = torch.cat([jacobian_trace(y, x, v[None]) for v in signs]).detach()
    exact = (mix.diagonal() * torch.cos(x[0])).sum().detach()
    close(each.mean(), exact, 1e-12)
    close(jacobian_trace(y, x)[0].detach(), exact, 1e-12)
    assert (each - exact).abs().min() > 1e-3


def test_trace_of_what_does_not_depend_on_x(generator):
    """It is 0: of a constant, of a network's bias, and of the values that do not depend on x among those that do."""
    x = normals(2, 3, generator=generator).requires_grad_()
    bias, v = normals(2, 3, generator=generator), torch.ones(2, 3, dtype=torch.float64)
    for y in (bias, bias.clone().requires_grad_()):
        assert jacobian_trace(y, x).tolist() == jacobian_trace(y, x, v).tolist() == [0, 0]
    half = torch.stack([x[:, 0] ** 2, bias[:, 1], bias[:, 2]], 1)
    close(jacobian_trace(half, x).detach(), 2 * x[:, 0].detach())
    d = Denoiser(lambda xt, t: torch.full_like(xt, 2.0), Cosine(), "score")
    close(esm(d, bias, 0.5, bias), 6.0)
    close(ssm(d, bias, 0.5, bias, v), 6.0)


def test_trace_can_be_differentiated(generator):
    """Its gradient in the parameters and in x is that of the Jacobian of tanh, written out."""
    net, x, v = Small(3, 5), normals(4, 3, generator=generator).requires_grad_(), normals(4, 3, generator=generator)
    for direction in (None, v):
        found = jacobian_trace(net(x), x, direction)
        bend = 1 - torch.tanh(x @ net.inner.T + net.bias) ** 2
        jacobian = torch.einsum("ih,bh,hj->bij", net.outer, bend, net.inner) + net.linear
        written = (
            torch.einsum("bii->b", jacobian)
            if direction is None
            else torch.einsum("bi,bij,bj->b", direction, jacobian, direction)
        )
        close(found.detach(), written.detach())
        inputs = [x, *net.parameters()]
        pairs = zip(
            torch.autograd.grad(found.sin().sum(), inputs),
            torch.autograd.grad(written.sin().sum(), inputs),
            strict=True,
        )
        for one, other in pairs:
            assert other.abs().max() > 1e-3
            close(one, other)


# Use of the three losses ----------------------------------------------------------------------------------------------


def losses_of(d, x0, t, eps, weight=None, **cond):
    v = torch.ones_like(x0)
    return [
        dsm(d, x0, t, eps, weight, **cond),
        esm(d, x0, t, eps, weight, **cond),
        ssm(d, x0, t, eps, v, weight, **cond),
        ssm(d, x0, t, eps, v, weight, reduced=False, **cond),
    ]


@pytest.mark.parametrize("shape", [(3, 2), (3, 1, 2, 2)])
def test_score_matching_weights_each_sample(shape, generator):
    """`weight` multiplies each sample's own loss, which is also what the sample has alone, at its own time."""
    x0, eps = normals(*shape, generator=generator), normals(*shape, generator=generator)
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    d, weight = Denoiser(lambda xt, t: torch.sin(xt), Straight(), "v"), torch.tensor([0.0, 2.0, 5.0])
    alone = [losses_of(d, x0[i : i + 1], t[i].item(), eps[i : i + 1]) for i in range(3)]
    for found, *each in zip(losses_of(d, x0, t, eps, weight), *alone, strict=True):
        close(found, (2 * each[1] + 5 * each[2]) / 3)
    for found, *each in zip(losses_of(d, x0, t, eps), *alone, strict=True):
        close(found, sum(each) / 3)


def test_score_matching_passes_conditions_and_gradients():
    """Conditions reach the network, gradients reach its parameters; without gradients the value is the same."""
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    d = Denoiser(lambda xt, t, y: scale * y[:, None] * xt, Straight(), "score")
    y, x0, eps = torch.tensor([1.0, 2.0]), torch.ones(2, 3).double(), torch.full((2, 3), 2.0).double()  # x_t = 1.5
    square = 1.5**2 * 3
    s = [0.5, 1.0]
    expected = [
        sum(0.5 * 3 * (k * 1.5 + 4) ** 2 for k in s) / 2,
        sum(3 * k + 0.5 * k**2 * square for k in s) / 2,
        sum(3 * k + 0.5 * k**2 * square for k in s) / 2,  # v = 1: vᵀJv is the trace
        sum(3 * k + 0.5 * k**2 * 4.5**2 for k in s) / 2,
    ]
    slopes = [
        sum(3 * (k * 1.5 + 4) * 1.5 * k / 0.5 for k in s) / 2,
        sum(3 * k / 0.5 + k**2 / 0.5 * square for k in s) / 2,
        sum(3 * k / 0.5 + k**2 / 0.5 * square for k in s) / 2,
        sum(3 * k / 0.5 + k**2 / 0.5 * 4.5**2 for k in s) / 2,
    ]
    for value, known_value, slope in zip(losses_of(d, x0, 0.5, eps, y=y), expected, slopes, strict=True):
        close(value.detach(), known_value)
        close(torch.autograd.grad(value, scale)[0], slope)
    with torch.no_grad():
        for value, known_value in zip(losses_of(d, x0, 0.5, eps, y=y), expected, strict=True):
            close(value, known_value)


def test_score_matching_keeps_the_type_and_the_data():
    """float32 data give float32 losses, and the data themselves are left without a gradient."""
    x0, eps = torch.ones(2, 3), torch.ones(2, 3)
    for value in losses_of(Denoiser(lambda xt, t: xt, Cosine(), "v"), x0, torch.tensor([0.1, 0.2]), eps):
        assert value.dtype == torch.float32 and value.shape == ()
    assert not x0.requires_grad and not eps.requires_grad


def test_arguments_of_score_matching_are_checked():
    """What does not fit raises and is named."""
    x, d = torch.ones(4, 2), Denoiser(lambda xt, t: xt, Cosine(), "v")
    cases = [
        (r"^eps must have the shape of x0", lambda: dsm(d, x, 0.5, torch.ones(4, 3))),
        (r"^eps must have the shape of x0", lambda: esm(d, x, 0.5, torch.ones(4, 3))),
        (r"^v must have the shape of x0, \(4, 2\); got \(4, 3\)", lambda: ssm(d, x, 0.5, x, torch.ones(4, 3))),
        (r"^v must have the shape of x0, \(4, 2\); got \(1, 2\)", lambda: ssm(d, x, 0.5, x, torch.ones(1, 2))),
        (r"^weight must have shape \(4,\); got \(2,\)", lambda: dsm(d, x, 0.5, x, torch.ones(2))),
        (r"^weight must have shape \(4,\); got \(4, 1\)", lambda: esm(d, x, 0.5, x, torch.ones(4, 1))),
        (r"^weight must have shape \(4,\); got \(\)", lambda: ssm(d, x, 0.5, x, x, torch.tensor(1.0))),
        (r"do not determine score at t = \[0\.0\]", lambda: dsm(d, x, 0.0, x)),
        (r"do not determine score at t = \[0\.0\]", lambda: esm(d, x, 0.0, x)),
        (r"do not determine score at t = \[0\.0\]", lambda: ssm(d, x, torch.tensor([0.0, 0.5, 0.5, 0.5]), x, x)),
        (r"^y must have the shape of x", lambda: jacobian_trace(x[:2], x.clone().requires_grad_())),
        (r"^v must have the shape of x", lambda: jacobian_trace(x, x.clone().requires_grad_(), x[:2])),
    ]
    for message, call in cases:
        with pytest.raises(ValueError, match=message):
            call()


# A term of the bound --------------------------------------------------------------------------------------------------


def gaussian_of_step(name, s, t, xt, x0):
    """Mean and variance of q(x_s | x_t, x_0) by conditioning with closed forms; and v of q(x_t | x_s)."""
    a, v = forward_kernel(name, s, t)
    (alpha_s, sigma_s), (alpha_t, _) = known(name, s), known(name, t)
    gain = a * sigma_s**2 / (a**2 * sigma_s**2 + v)
    return alpha_s * x0 + gain * (xt - alpha_t * x0), sigma_s**2 * v / (a**2 * sigma_s**2 + v), v


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("units", [(0.05, 0.1), (0.45, 0.5), (0.9, 1.0), (0.2, 0.8)])
@pytest.mark.parametrize("variance", ["beta", "posterior"])
@pytest.mark.parametrize("shape", [(2, 3), (2, 1, 2, 2)])
def test_bound_term_is_a_divergence(name, units, variance, shape, generator):
    """For s > 0 the term is torch's KL divergence of the two Gaussians of the step, summed over values."""
    s, t = (time_on(name, u) for u in units)
    x0, x0_hat = normals(*shape, generator=generator), normals(*shape, generator=generator)
    xt = known(name, t)[0] * x0 + known(name, t)[1] * normals(*shape, generator=generator)
    mean_q, var_q, v = gaussian_of_step(name, s, t, xt, x0)
    mean_p, _, _ = gaussian_of_step(name, s, t, xt, x0_hat)
    q = Normal(mean_q, math.sqrt(var_q))
    p = Normal(mean_p, math.sqrt(v if variance == "beta" else var_q))
    term = bound_term(lambda x, time: x0_hat, path_of(name), x0, xt, s, t, variance=variance)
    assert term.shape == (2,)
    close(term, kl_divergence(q, p).flatten(1).sum(1), 1e-9)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("variance", ["beta", "posterior"])
def test_last_term_is_a_density(name, variance, generator):
    """At s = 0 without bins it is −log N(x_0; x̂_0, v) by torch, where β̃ = 0 is replaced by v for either choice."""
    x0, x0_hat = normals(2, 3, generator=generator), normals(2, 3, generator=generator)
    t = time_on(name, 0.05)
    _, v = forward_kernel(name, 0, t)
    term = bound_term(lambda x, time: x0_hat, path_of(name), x0, x0, 0, t, variance=variance)
    close(term, -Normal(x0_hat, math.sqrt(v)).log_prob(x0).sum(1))


@pytest.mark.parametrize("t", range(2, 11))
def test_constant_of_the_bound(t):
    """With x̂_0 = x_0 what is left is (d/2)(β̃/σ² − 1 − log(β̃/σ²)): 0 for σ² = β̃, and above 0 for σ² = β."""
    x0 = torch.zeros(1, 5, dtype=torch.float64)
    ratio = (1 - ABAR[t - 1]) / (1 - ABAR[t])  # β̃/β
    constant = 5 / 2 * (ratio - 1 - math.log(ratio))
    close(bound_term(lambda x, time: x0, CHAIN, x0, x0 + 1, t - 1, t, variance="beta"), [constant])
    assert constant > 0
    close(bound_term(lambda x, time: x0, CHAIN, x0, x0 + 1, t - 1, t, variance="posterior"), [0.0])


@pytest.mark.parametrize("t", range(2, 11))
@pytest.mark.parametrize("variance", ["beta", "posterior"])
def test_weight_of_the_noise(t, variance, generator):
    """In terms of ε the term is the slide's β²/(2σ²·(1−β)(1−ᾱ))·‖ε − ε̂‖² plus the constant, for both σ²."""
    x0, eps, eps_hat = (normals(2, 3, generator=generator) for _ in "abc")
    beta, abar, before = BETAS[t - 1], ABAR[t], ABAR[t - 1]
    xt = math.sqrt(abar) * x0 + math.sqrt(1 - abar) * eps
    x0_hat = (xt - math.sqrt(1 - abar) * eps_hat) / math.sqrt(abar)
    tilde = beta * (1 - before) / (1 - abar)
    var = beta if variance == "beta" else tilde
    weight = beta**2 / (2 * var * (1 - beta) * (1 - abar))
    constant = 3 / 2 * (tilde / var - 1 - math.log(tilde / var))
    term = bound_term(lambda x, time: x0_hat, CHAIN, x0, xt, t - 1, t, variance=variance)
    close(term, weight * ((eps - eps_hat) ** 2).sum(1) + constant, 1e-9)


def normal_mass(low, high, mean, std):
    """P(low < N(mean, std²) < high) in 40 digits, far into the tails."""
    low, high = ((mp.mpf(edge) - mp.mpf(mean)) / mp.mpf(std) for edge in (low, high))
    if low > 0:
        low, high = -high, -low
    half = mp.sqrt(2)
    return (mp.erfc(-high / half) - mp.erfc(-low / half)) / 2


def levels(bins):
    return torch.linspace(-1, 1, bins, dtype=torch.float64)


@pytest.mark.parametrize("bins", [2, 3, 16, 256])
@pytest.mark.parametrize("mean", [0.0, 0.5, -0.97, 1.3, -4.0, 9.0])
@pytest.mark.parametrize("beta", [1e-4, 0.01, 0.9])
def test_bins(bins, mean, beta):
    """With bins it is −log of the normal mass of x_0's grey level, in 40 digits, near and far; the end levels are open."""
    path, std, half = DiscretePath([beta]), math.sqrt(beta), 1 / (bins - 1)
    chosen = levels(bins)[torch.linspace(0, bins - 1, min(bins, 7)).long()]
    x0 = chosen[:, None]
    term = bound_term(lambda x, t: torch.full_like(x, mean), path, x0, x0, 0, 1, bins=bins)
    for level, nats in zip(chosen.tolist(), term.tolist(), strict=True):
        low = -mp.inf if level == -1 else level - half
        high = mp.inf if level == 1 else level + half
        assert nats == pytest.approx(float(-mp.log(normal_mass(low, high, mean, std))), rel=1e-9, abs=1e-13)


@pytest.mark.parametrize("mean", [0.0, 0.41, -0.999, 1.0, 1.5])
@pytest.mark.parametrize("beta", [1e-6, 1e-4, 0.01, 0.5])
def test_mass_of_all_bins(mean, beta):
    """The 256 grey levels together have mass 1."""
    x0 = levels(256)[:, None]
    nats = bound_term(lambda x, t: torch.full_like(x, mean), DiscretePath([beta]), x0, x0, 0, 1, bins=256)
    assert (-nats).exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_bins_of_images(generator):
    """Over an image the bins' nats add up, and bins do not touch a term with s > 0."""
    x0 = levels(256)[torch.randint(256, (2, 1, 4, 4), generator=generator)]
    path = DiscretePath([0.01, 0.02])

    def d(x, t):
        return 0.9 * x

    each = bound_term(d, path, x0.reshape(-1, 1), x0.reshape(-1, 1), 0, 1, bins=256)
    close(bound_term(d, path, x0, x0, 0, 1, bins=256), each.reshape(2, 16).sum(1))
    assert torch.equal(bound_term(d, path, x0, x0, 1, 2, bins=256), bound_term(d, path, x0, x0, 1, 2))


@pytest.mark.parametrize("s, bins", [(1, None), (0, None), (0, 5)])
@pytest.mark.parametrize("variance", ["beta", "posterior"])
def test_gradients_of_the_bound(s, bins, variance, generator):
    """Autograd against finite differences, also in the open levels at both ends, where ±∞ stands in the formula."""
    x0 = levels(5)[None]
    x0_hat = (x0 + 0.1 * normals(1, 5, generator=generator)).requires_grad_()
    path = DiscretePath([0.3, 0.3])

    def term(x0_hat):
        return bound_term(lambda x, t: x0_hat, path, x0, x0, s, s + 1, bins=bins, variance=variance)

    assert torch.autograd.gradcheck(term, x0_hat)


@pytest.mark.parametrize("variance", ["beta", "posterior"])
@pytest.mark.parametrize("t", [1, 2, 100, 1000])
def test_bound_keeps_its_digits_in_float32(variance, t, generator):
    """For a denoiser that is nearly right the terms are tiny; float32 loses none of them against float64."""
    path = DiscretePath(linear_betas(1000))
    x0 = torch.rand(2, 1, 28, 28, generator=generator, dtype=torch.float64) * 2 - 1
    x0_hat = x0 + 0.01 * torch.sin(30 * x0)
    wide, narrow = (
        bound_term(lambda x, time, d=dtype: x0_hat.to(d), path, x0.to(dtype), x0.to(dtype), t - 1, t, variance=variance)
        for dtype in (torch.float64, torch.float32)
    )
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), wide, rtol=2e-4, atol=0)


# Other variances, and times for each sample ---------------------------------------------------------------------------


def variance_of_step(name, s, t, share):
    """β^v·β̃^(1−v), as a product of powers; at s = 0 it is β."""
    _, var_q, v = gaussian_of_step(name, s, t, 0.0, 0.0)
    return v**share * var_q ** (1 - share) if known(name, s)[1] else v + 0 * share


def typed_bound(name, s, t, x0, x0_hat, xt, share, bins=None):
    """Nats of one sample, by torch's KL divergence or the normal's density or mass; `share` is v, a number or of x0's shape."""
    var = torch.as_tensor(variance_of_step(name, s, t, share), dtype=torch.float64)
    if known(name, s)[1]:
        mean_q, var_q, _ = gaussian_of_step(name, s, t, xt, x0)
        mean_p, _, _ = gaussian_of_step(name, s, t, xt, x0_hat)
        return kl_divergence(Normal(mean_q, math.sqrt(var_q)), Normal(mean_p, var.sqrt())).sum()
    if bins is None:
        return -Normal(x0_hat, var.sqrt()).log_prob(x0).sum()
    half, nats = 1 / (bins - 1), 0.0
    for x, m, v in zip(*(value.detach().expand(x0.shape).flatten() for value in (x0, x0_hat, var)), strict=True):
        low = -mp.inf if x == -1 else float(x) - half
        high = mp.inf if x == 1 else float(x) + half
        nats -= mp.log(normal_mass(low, high, float(m), math.sqrt(float(v))))
    return torch.tensor(float(nats), dtype=torch.float64)


def mixed_batch(name, shape, generator):
    """Steps of every kind, two of them to the data, and grey levels among 16 with a guess near them."""
    steps = [
        tuple(time_on(name, u) for u in units)
        for units in ((0.0, 0.05), (0.45, 0.5), (0.0, 0.3), (0.9, 1.0), (0.2, 0.8))
    ]
    x0 = levels(16)[torch.randint(16, (5, *shape), generator=generator)]
    x0_hat = x0 + 0.1 * normals(5, *shape, generator=generator)
    noise = normals(5, *shape, generator=generator)
    xt = torch.stack([known(name, t)[0] * x0[i] + known(name, t)[1] * noise[i] for i, (_, t) in enumerate(steps)])
    return steps, x0, x0_hat, xt, [torch.tensor(times, dtype=torch.float64) for times in zip(*steps, strict=True)]


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("variance, share", [("beta", 1.0), ("posterior", 0.0), (0.3, 0.3), (1, 1.0), (0, 0.0)])
@pytest.mark.parametrize("bins", [None, 16])
def test_bound_with_times_for_each_sample(name, variance, share, bins, generator):
    """Each sample has the nats of its own step by torch, those into the data among others; alone and in the batch."""
    steps, x0, x0_hat, xt, (s, t) = mixed_batch(name, (2,), generator)
    expected = [typed_bound(name, *steps[i], x0[i], x0_hat[i], xt[i], share, bins) for i in range(5)]
    together = bound_term(lambda x, time: x0_hat, path_of(name), x0, xt, s, t, variance=variance, bins=bins)
    assert together.shape == (5,)
    close(together, expected, 1e-8)
    for i, step in enumerate(steps):
        row = slice(i, i + 1)
        alone = bound_term(
            lambda x, time, r=row: x0_hat[r], path_of(name), x0[row], xt[row], *step, variance=variance, bins=bins
        )
        close(alone, expected[i : i + 1], 1e-8)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("bins", [None, 16])
@pytest.mark.parametrize("shape", [(2,), (1, 2, 2)])
def test_learned_variance_in_the_bound(name, bins, shape, generator):
    """With a fraction for each value the term is torch's divergence with that variance; into the data the fraction counts for nothing."""
    steps, x0, x0_hat, xt, (s, t) = mixed_batch(name, shape, generator)
    share = 0.5 + 0.5 * normals(5, *shape, generator=generator)
    expected = [typed_bound(name, *steps[i], x0[i], x0_hat[i], xt[i], share[i], bins) for i in range(5)]

    def pair(x, time):
        return x0_hat[: len(x)], share[: len(x)]

    found = bound_term(pair, path_of(name), x0, xt, s, t, variance="learned", bins=bins)
    close(found, expected, 1e-8)
    for i, step in enumerate(steps):
        row = slice(i, i + 1)
        alone = bound_term(lambda x, time, r=row: (x0_hat[r], share[r]), path_of(name), x0[row], xt[row], *step,
                           variance="learned", bins=bins)  # fmt: skip
        close(alone, expected[i : i + 1], 1e-8)


def test_names_and_fractions_agree(generator):
    """A network that says 0 or 1 everywhere has the posterior's or β's nats; the denoiser is asked once, with x_t and t."""
    _, x0, x0_hat, xt, (s, t) = mixed_batch("Cosine", (2,), generator)
    seen = []
    for says, name in ((0.0, "posterior"), (1.0, "beta")):

        def pair(x, time, says=says):
            seen.append((x, time))
            return x0_hat, torch.full_like(x, says)

        one = bound_term(pair, Cosine(), x0, xt, s, t, variance="learned")
        close(one, bound_term(lambda x, time: x0_hat, Cosine(), x0, xt, s, t, variance=name), 1e-9)
    assert len(seen) == 2 and all(x is xt and time is t for x, time in seen)


@pytest.mark.parametrize("bins", [None, 16])
def test_gradients_of_the_learned_variance(bins, generator):
    """Autograd against finite differences, in the guess and in the fraction, where steps into the data stand beside others."""
    _, x0, x0_hat, xt, (s, t) = mixed_batch("VP", (2,), generator)
    share = (0.5 + 0.3 * normals(5, 2, generator=generator)).requires_grad_()

    def term(guess, share):
        return bound_term(lambda x, time: (guess, share), VP(), x0, xt, s, t, variance="learned", bins=bins)

    assert torch.autograd.gradcheck(term, (x0_hat.requires_grad_(), share))
    (slope,) = torch.autograd.grad(term(x0_hat, share).sum(), share)
    assert bool((slope[[0, 2]] == 0).all()) and bool((slope[[1, 3, 4]] != 0).all())


def test_learned_variance_in_float32(generator):
    """On a chain of 1000 steps, all in one batch, the nats follow float64, and their gradients are finite from end to end."""
    end = torch.arange(1, 1001, dtype=torch.float64)
    x0 = levels(256)[torch.randint(256, (1000, 1, 4, 4), generator=generator)]
    noise, off = normals(2, *x0.shape, generator=generator)
    share = 0.5 + 0.7 * torch.sin(9 * noise)
    wide, narrow = [], []
    for out, dtype in ((wide, torch.float64), (narrow, torch.float32)):
        xt = Cosine().perturb(x0, end / 1000, noise).to(dtype)
        says = [(x0 + 0.05 * off).to(dtype).requires_grad_(), share.to(dtype).requires_grad_()]
        nats = bound_term(lambda x, t, says=says: tuple(says), Cosine(), x0.to(dtype), xt, (end - 1) / 1000, end / 1000,
                          variance="learned", bins=256)  # fmt: skip
        out += [nats.detach(), *torch.autograd.grad(nats.sum(), says)]
    assert narrow[0].dtype == torch.float32
    for one, other in zip(narrow, wide, strict=True):
        assert bool(one.isfinite().all())
        torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=1e-4)


# The hybrid loss ------------------------------------------------------------------------------------------------------


class Improved(torch.nn.Module):
    """A network for a learned variance: the first half of what it says has its own parameters, the second has others."""

    def __init__(self, dim=2, labels=0):
        super().__init__()
        g = torch.Generator().manual_seed(4)
        self.mean, self.spread = (torch.nn.Parameter(0.5 * normals(dim, dim, generator=g)) for _ in "ab")
        self.bias = torch.nn.Parameter(torch.tensor(0.1, dtype=torch.float64))

    def forward(self, xt, t, y=0.0):
        return torch.cat([torch.tanh(xt @ self.mean + y), torch.sin(xt @ self.spread + self.bias)], 1)


def typed_hybrid(net, predicts, name, x0, steps, eps, weight, bins=256, frozen=None):
    """Its value by numpy and torch.distributions, sample by sample; `frozen` is a network that x̂_0 of the bound comes from."""
    total = 0.0
    for i, (s, t) in enumerate(steps):
        alpha, sigma = known(name, t)
        xt = alpha * x0[i] + sigma * eps[i]
        said, raw = net(xt[None], None)[0].chunk(2)
        target = {"eps": eps[i], "x0": x0[i], "v": alpha * eps[i] - sigma * x0[i]}[predicts]
        out = said if frozen is None else frozen(xt[None], None)[0].chunk(2)[0]
        guess = {"eps": (xt - sigma * out) / alpha if alpha else None, "x0": out, "v": alpha * xt - sigma * out}[
            predicts
        ]
        nats = typed_bound(name, s, t, x0[i], guess, xt, (raw + 1) / 2, bins)
        total = total + (said - target).square().mean() + weight * nats / (len(x0[i]) * math.log(2))
    return total / len(steps)


@pytest.mark.parametrize("predicts", ["eps", "x0", "v"])
@pytest.mark.parametrize("name, bins", [("Cosine", 16), ("VP", None), ("chain", 16)])
@pytest.mark.parametrize("weight", [0.0, 1.0, 3.0])
def test_hybrid(predicts, name, bins, weight, generator):
    """The simple loss plus λT times the bound's term in bits for each value, by torch.distributions, into the data and not."""
    steps, x0, _, _, (s, t) = mixed_batch(name, (2,), generator)
    if predicts == "eps":  # α = 0 at the end of the cosine path
        steps, x0, s, t = ([values[i] for i in (0, 1, 2, 4)] for values in (steps, x0, s, t))
        x0, s, t = torch.stack(x0), torch.stack(s), torch.stack(t)
    eps, net = normals(*x0.shape, generator=generator), Improved()
    d = Denoiser(net, path_of(name), predicts, learned_variance=True)
    found = hybrid(d, x0, s, t, eps, weight, bins=bins)
    assert found.shape == () and found.dtype == torch.float64
    close(found.detach(), typed_hybrid(net, predicts, name, x0, steps, eps, weight, bins).detach(), 1e-8)
    plain = Denoiser(lambda xt, t: net(xt, t).chunk(2, 1)[0], path_of(name), predicts)
    if weight == 0:
        close(found.detach(), simple(plain, x0, t, eps).detach(), 1e-12)


def test_hybrid_by_default(generator):
    """λT = 1 and 256 grey levels, as in the paper; numbers may stand for times; conditions reach the network."""
    x0, eps = levels(256)[torch.randint(256, (3, 2), generator=generator)], normals(3, 2, generator=generator)
    net = Improved()
    d = Denoiser(net, Cosine(), "v", learned_variance=True)
    for s, t in ((0.0, 0.1), (0.3, 0.4)):
        expected = typed_hybrid(net, "v", "Cosine", x0, [(s, t)] * 3, eps, 1.0, 256).detach()
        close(hybrid(d, x0, s, t, eps).detach(), expected, 1e-8)
        each = [torch.full((3,), time, dtype=torch.float64) for time in (s, t)]
        close(hybrid(d, x0, *each, eps).detach(), expected, 1e-8)
        moved = typed_hybrid(lambda xt, t: net(xt, t, 0.7), "v", "Cosine", x0, [(s, t)] * 3, eps, 1.0, 256)
        close(hybrid(d, x0, s, t, eps, y=0.7).detach(), moved.detach(), 1e-8)


@pytest.mark.parametrize("predicts", ["eps", "x0", "v"])
def test_the_bound_does_not_teach_the_mean(predicts, generator):
    """The gradient in the first half's parameters is the simple loss's, bit by bit, however heavy the bound; that in the second
    half's is the finite difference of a value in which x̂_0 is held, and the simple loss has none."""
    steps, x0, _, _, _ = mixed_batch("VP", (2,), generator)
    s, t = (torch.tensor(times, dtype=torch.float64) for times in zip(*steps, strict=True))
    eps, net = normals(*x0.shape, generator=generator), Improved()
    d = Denoiser(net, VP(), predicts, learned_variance=True)
    plain = Denoiser(lambda xt, t: net(xt, t).chunk(2, 1)[0], VP(), predicts)
    only, none, heavy = (
        torch.autograd.grad(loss, [net.mean, net.spread, net.bias], allow_unused=True, materialize_grads=True)
        for loss in (simple(plain, x0, t, eps), hybrid(d, x0, s, t, eps, 0.0), hybrid(d, x0, s, t, eps, 1e6, bins=16))
    )
    close(none[0], only[0], 1e-12)
    assert torch.equal(heavy[0], none[0]) and none[0].abs().max() > 0.01
    assert not none[1].any() and not none[2].any() and not only[1].any()
    slopes = torch.autograd.grad(hybrid(d, x0, s, t, eps, 2.0, bins=16), [net.bias])[0]
    values = []
    for change in (1e-5, -1e-5):
        with torch.no_grad():
            net.bias += change
            values.append(typed_hybrid(net, predicts, "VP", x0, steps, eps, 2.0, 16))
            net.bias -= change
    close(slopes, (values[0] - values[1]) / 2e-5, 1e-6)


def test_whole_gradient_of_the_hybrid_loss(generator):
    """In every parameter it is that of a value in which the bound's x̂_0 comes from a frozen copy of the network."""
    steps, x0, _, _, (s, t) = mixed_batch("Cosine", (2,), generator)
    eps, net, frozen = normals(*x0.shape, generator=generator), Improved(), Improved().requires_grad_(False)
    found = torch.autograd.grad(
        hybrid(Denoiser(net, Cosine(), "v", True), x0, s, t, eps, 5.0, bins=None), list(net.parameters())
    )
    typed = typed_hybrid(net, "v", "Cosine", x0, steps, eps, 5.0, None, frozen)
    for one, other in zip(found, torch.autograd.grad(typed, list(net.parameters())), strict=True):
        close(one, other, 1e-8)
        assert other.abs().max() > 0.01


@pytest.mark.parametrize(
    "name, units", [("VP", (0.3, 0.4)), ("Cosine", (0.5, 0.75)), ("chain", (0.1, 0.15)), ("Cosine", (0.9, 1.0))]
)
@pytest.mark.parametrize("data", [0.2, 0.7])
def test_the_best_variance_is_learned(name, units, data):
    """Data N(0, v_0) and the ideal denoiser: over (x_0, ε), a sum of 4 nodes each, the bound is least where Σ is the true reverse
    variance β̃ + coef²·Var(x_0 | x_t), between β̃ and β; there the hybrid loss has gradient 0 in the fraction too."""
    s, t = (time_on(name, u) for u in units)
    (alpha_s, sigma_s), (alpha_t, sigma_t) = known(name, s), known(name, t)
    a, beta = forward_kernel(name, s, t)
    tilde = sigma_s**2 * beta / sigma_t**2
    left = data * sigma_t**2 / (alpha_t**2 * data + sigma_t**2)
    best = tilde + (alpha_s * beta / sigma_t**2) ** 2 * left
    share = math.log(best / tilde) / math.log(beta / tilde)
    assert tilde < best < beta and 0.01 < share < 0.999
    nodes, weights = (torch.from_numpy(values) for values in np.polynomial.hermite_e.hermegauss(4))
    x0, eps = (part[:, None] for part in torch.cartesian_prod(math.sqrt(data) * nodes, nodes).T)
    weights = torch.cartesian_prod(*[weights / weights.sum()] * 2).prod(1)
    xt = alpha_t * x0 + sigma_t * eps

    def ideal(x):
        return alpha_t * data / (alpha_t**2 * data + sigma_t**2) * x

    def mean_nats(v):
        return weights @ bound_term(
            lambda x, time: (ideal(x), v.expand(x.shape)), path_of(name), x0, xt, s, t, variance="learned"
        )

    v = torch.tensor(share, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(mean_nats(v), v)
    close(slope, 0.0, 1e-8)
    least = mean_nats(v.detach())
    for off in (-0.2, -0.01, 0.01, 0.2):
        assert mean_nats(v.detach() + off) > least
        assert (
            weights
            @ bound_term(lambda x, time: ideal(x), path_of(name), x0, xt, s, t, variance=min(max(share + off, 0), 1))
            > least
        )
    raw = torch.tensor(2 * share - 1, dtype=torch.float64, requires_grad=True)
    d = Denoiser(
        lambda x, time: torch.cat([ideal(x), raw.expand(x.shape)], 1), path_of(name), "x0", learned_variance=True
    )
    slope = sum(
        w * torch.autograd.grad(hybrid(d, x0[i : i + 1], s, t, eps[i : i + 1]), raw)[0] for i, w in enumerate(weights)
    )
    close(slope, 0.0, 1e-8)


def test_arguments_of_the_hybrid_loss_are_checked():
    """What does not fit raises and is named."""
    x = torch.ones(4, 2)
    d, plain = (
        Denoiser(lambda xt, t: torch.cat([xt, xt], 1), Cosine(), "v", True),
        Denoiser(lambda xt, t: xt, Cosine(), "v"),
    )
    cases = [
        ("^d must be a Denoiser built with learned_variance=True", lambda: hybrid(plain, x, 0.1, 0.2, x)),
        ("^eps must have the shape of x0", lambda: hybrid(d, x, 0.1, 0.2, x[:, :1])),
        ("^s must be less than t", lambda: hybrid(d, x, 0.2, 0.2, x)),
        ("^bins must be at least 2; got 1", lambda: hybrid(d, x, 0.1, 0.2, x, bins=1)),
        (r"^t must be a number or have shape \(4,\)", lambda: hybrid(d, x, 0.1, torch.full((3,), 0.2), x)),
        (r"^variance must be 'beta', 'posterior' or a number in \[0, 1\]; got 1.5",
         lambda: bound_term(plain, Cosine(), x, x, 0.1, 0.2, variance=1.5)),
    ]  # fmt: skip
    for message, call in cases:
        with pytest.raises(ValueError, match=message):
            call()


def test_arguments_are_checked():
    """What does not fit raises and is named."""
    x, d = torch.ones(4, 2), lambda xt, t: xt
    batch = torch.ones(4)
    cases = [
        (ValueError, "^variance must be 'beta', 'posterior' or a number in .*; got 'large'",
         lambda: bound_term(d, CHAIN, x, x, 1, 2, variance="large")),
        (ValueError, "^s must be less than t", lambda: bound_term(d, CHAIN, x, x, 2, 2)),
        (ValueError, "^bins must be at least 2; got 1", lambda: bound_term(d, CHAIN, x, x, 0, 1, bins=1)),
        (ValueError, "^t must be a number or have shape", lambda: bound_term(d, CHAIN, x, x, batch[:3], 2)),
        (ValueError, "^xt must have the shape of x0", lambda: bound_term(d, CHAIN, x, x[:2], 1, 2)),
        (TypeError, "^x0 must be a floating-point tensor", lambda: bound_term(d, CHAIN, x.long(), x, 1, 2)),
        (ValueError, "^t must be a whole number", lambda: bound_term(d, CHAIN, x, x, 1, 11)),
        (ValueError, "^eps must have the shape of x0",
         lambda: simple(Denoiser(d, Cosine()), x, 0.5, torch.ones(4, 3))),
        (ValueError, "^t must be a number or have shape",
         lambda: simple(Denoiser(d, Cosine()), x, torch.full((3,), 0.5), x)),
    ]  # fmt: skip
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()
