"""Losses against formulas typed by hand, torch's KL divergence and normal density, and normal integrals in 40 digits."""

import math

import numpy as np
import pytest
import torch
from oracles import PATHS, forward_kernel, known, known_rates, mp, path_of, time_on
from torch.distributions import Normal, kl_divergence

from dgm_course.denoisers import Denoiser
from dgm_course.losses import bound_term, simple
from dgm_course.paths import Cosine, DiscretePath, Straight
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


def test_arguments_are_checked():
    """What does not fit raises and is named."""
    x, d = torch.ones(4, 2), lambda xt, t: xt
    batch = torch.ones(4)
    cases = [
        (ValueError, "^variance must be 'beta' or 'posterior'; got 'large'",
         lambda: bound_term(d, CHAIN, x, x, 1, 2, variance="large")),
        (ValueError, "^s must be less than t", lambda: bound_term(d, CHAIN, x, x, 2, 2)),
        (ValueError, "^bins must be at least 2; got 1", lambda: bound_term(d, CHAIN, x, x, 0, 1, bins=1)),
        (ValueError, "^s and t must be numbers", lambda: bound_term(d, CHAIN, x, x, batch, 2)),
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
