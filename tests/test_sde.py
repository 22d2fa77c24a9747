"""Samplers of the SDE: orders by shared noise and by quadrature, exact moments, and the density that the corrector keeps."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from oracles import CONTINUOUS, MEANS, STDS, WEIGHTS, known, mixture_denoiser, mixture_mean, path_of

from dgm_course.paths import VE, VP, Cosine, DiscretePath, Scaled, Straight, SubVP
from dgm_course.samplers import (
    ddpm,
    ddpm_step,
    euler_maruyama,
    euler_maruyama_step,
    forward_euler_maruyama,
    langevin,
    langevin_step,
    last,
    predictor_corrector,
)

WALKED = ["VP gentle", "SubVP", "VE narrow", "Straight"]
FIRST, LAST = 0.9, 0.3  # where the orders are measured: far from the ends, where rates may be infinite


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def normals(*shape, generator):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def close(actual, expected, tolerance=1e-10):
    actual, expected = (torch.as_tensor(value, dtype=torch.float64) for value in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def smooth(xt, t):
    """A denoiser that depends on state and time, and on each sample alone."""
    return torch.tanh(xt * 0.7 + 0.3) * (1 - 0.2 * float(t))


def closed_sde(name, t):
    """α, σ, f and g² over a tensor of inner times, from the closed forms: f = α'/α, g² = (σ²)' − 2fσ²."""
    t = t.clone().requires_grad_()
    alpha, sigma = CONTINUOUS[name][1](torch, t)
    d_alpha, d_var = (torch.autograd.grad(v.sum(), t, retain_graph=True)[0] for v in (alpha, sigma**2))
    f = d_alpha / alpha
    return [v.detach().numpy() for v in (alpha, sigma, f, d_var - 2 * f * sigma**2)]


def slope(errors):
    """The power of the step in errors over halvings of it, by least squares."""
    return -np.polyfit(np.arange(len(errors)), np.log2(errors), 1)[0]


def is_first_order(errors, exact=False):
    """The error halves with the step; or, where Euler makes none, it is rounding."""
    assert max(errors) < 1e-11 if exact else abs(slope(errors) - 1) < 0.15, errors


def gaussian(name, mean, var):
    """For data N(mean, var): the denoiser by the normal equations, and the moments of p_t."""

    def denoise(xt, t):
        alpha, sigma = known(name, t)
        return mean + alpha * var / (alpha**2 * var + sigma**2) * (xt - alpha * mean)

    def moments(t):
        alpha, sigma = known(name, t)
        return alpha * mean, alpha**2 * var + sigma**2

    return denoise, moments


def law(run, draws, mean, var):
    """Mean and variance of every state if the first is N(mean, var): exact, for a run that is affine in start and noise.

    `run(x, generator)` gives states of the shape (B, 1) and draws noise `draws` times. Least squares over the samples of a
    batch finds what the start and each draw contribute.
    """
    x, g = normals(3 * draws + 9, 1, generator=seeded(1)), seeded(2)
    states = torch.cat(list(run(x, seeded(2))), 1)
    design = torch.cat([torch.ones_like(x), x, *(normals(*x.shape, generator=g) for _ in range(draws))], 1)
    parts = torch.linalg.lstsq(design, states).solution
    close(design @ parts, states, 1e-9)
    return parts[0] + parts[1] * mean, parts[1] ** 2 * var + (parts[2:] ** 2).sum(0)


# The forward SDE ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WALKED)
def test_forward_step(name):
    """x_t = (1 + f(s)·h)·x_s + g(s)·√h·z, with f and g² from closed forms, on an uneven grid."""
    times = torch.tensor([0.1, 0.15, 0.4, 0.9], dtype=torch.float64)
    x, g = normals(3, 2, generator=seeded(0)), seeded(5)
    _, _, drift, diffusion2 = closed_sde(name, times[:-1])
    for state, f, g2, h in zip(
        forward_euler_maruyama(path_of(name), x, times, generator=seeded(5)),
        drift,
        diffusion2,
        times.diff(),
        strict=True,
    ):
        x = x + f * x * h + (g2 * h) ** 0.5 * normals(3, 2, generator=g)
        close(state, x)


@pytest.mark.parametrize("name", ["VP", "VP gentle", "SubVP", "VE", "VE narrow", "Cosine", "Straight"])
def test_forward_weak_order(name):
    """Mean and variance of the walk from a point tend to α and σ² as h¹; where α is 1 or 1 − t the mean has no error."""
    end, mean_errors, var_errors = 0.5, [], []
    alpha, sigma = known(name, end)
    for steps in (32, 64, 128, 256):
        times = np.linspace(0, end, steps + 1)
        mean, var = law(lambda x, g, t=times: forward_euler_maruyama(path_of(name), x, t, generator=g), steps, 1.0, 0.0)
        mean_errors.append(abs(mean[-1].item() - alpha))
        var_errors.append(abs(var[-1].item() - sigma**2))
    is_first_order(var_errors)
    is_first_order(mean_errors, exact=name.startswith(("VE", "Straight")))


@pytest.mark.parametrize("name", ["VP", "SubVP", "VE narrow", "Cosine"])
def test_forward_simulation(name):
    """20,000 walkers in 200 steps: moments within Euler's own error, from closed forms, and 4 standard errors."""
    times, n = torch.linspace(0, 0.8, 201, dtype=torch.float64), 20_000
    _, _, drift, diffusion2 = closed_sde(name, times[:-1].clamp(min=1e-12))
    states = list(forward_euler_maruyama(path_of(name), torch.full((n, 1), 2.0).double(), times, generator=seeded(3)))
    mean, var = 2.0, 0.0
    for k, (f, g2, h) in enumerate(zip(drift, diffusion2, times.diff().numpy(), strict=True), 1):
        mean, var = (1 + f * h) * mean, (1 + f * h) ** 2 * var + g2 * h
        if k in (50, 120, 200):
            alpha, sigma = known(name, times[k].item())
            assert abs(states[k - 1].mean().item() - 2 * alpha) < abs(mean - 2 * alpha) + 4 * sigma / n**0.5
            allowed = abs(var - sigma**2) + 4 * sigma**2 * math.sqrt(2 / n)
            assert abs(states[k - 1].var().item() - sigma**2) < allowed
            assert allowed < 0.15 * sigma**2


def test_forward_states():
    """N states of x's dtype and shape in memory of their own, noise from the generator alone; x is left as it was."""
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(3, 1, 2, 2, generator=seeded(0), dtype=dtype)
        before, world = x.clone(), torch.random.get_rng_state()
        states, again, other = (
            list(forward_euler_maruyama(VP(), x, [0.0, 0.2, 0.7, 1.0], generator=seeded(k))) for k in (1, 1, 2)
        )
        assert [(s.dtype, s.shape) for s in states] == [(dtype, x.shape)] * 3
        assert len({s.data_ptr() for s in (x, *states)}) == 4 and torch.equal(x, before)
        assert torch.equal(torch.random.get_rng_state(), world)
        assert all(torch.equal(a, b) and not torch.equal(a, c) for a, b, c in zip(states, again, other, strict=True))


def test_forward_arguments():
    """What does not fit raises at the call, named; a drift that is infinite at the last time alone does not matter."""
    x = torch.ones(2, 1)
    cases = [
        (ValueError, "^times must be strictly ascending", lambda: forward_euler_maruyama(VP(), x, [1.0, 0.0])),
        (ValueError, "^times must be strictly ascending", lambda: forward_euler_maruyama(VP(), x, [0.0, 0.5, 0.5])),
        (ValueError, "^times must be strictly ascending", lambda: forward_euler_maruyama(VP(), x, [0.5])),
        (ValueError, "^times must be strictly ascending", lambda: forward_euler_maruyama(VP(), x, 0.5)),
        (ValueError, "^times must be strictly ascending", lambda: forward_euler_maruyama(VP(), x, [[0.0, 1.0]])),
        (ValueError, "^times must be strictly ascending", lambda: forward_euler_maruyama(VP(), x, [0.0, math.nan])),
        (ValueError, r"^times must lie in \[0, 1\]", lambda: forward_euler_maruyama(VP(), x, [0.0, 1.1])),
        (ValueError, r"^times must lie in \[0, 1\]", lambda: forward_euler_maruyama(VP(), x, [-0.1, 1.0])),
        (ValueError, "limit.*SDE of VP", lambda: forward_euler_maruyama(DiscretePath([0.1] * 4), x, [0, 2, 4])),
        (TypeError, "^x must be a floating-point tensor", lambda: forward_euler_maruyama(VP(), x.long(), [0.0, 1.0])),
        (TypeError, "^path must be a GaussianPath; got str", lambda: forward_euler_maruyama("VP", x, [0.0, 1.0])),
    ]  # fmt: skip
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()
    assert last(forward_euler_maruyama(Straight(), x, [0.0, 0.5, 1.0], generator=seeded(0))).isfinite().all()
    states = forward_euler_maruyama(VP(), torch.tensor([[1.0], [math.inf]]), [0.0, 0.25, 1.0])
    with pytest.raises(FloatingPointError, match="^the state is not finite after step 1 of 2, from t = 0 to 0.25"):
        next(states)


# Orders of Euler–Maruyama ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WALKED)
def test_strong_order(name):
    """Paths driven by the same Brownian motion come together as h¹, because the noise is additive; typed reference."""
    path, fine, n = path_of(name), 2048, 300
    times = torch.linspace(FIRST, LAST, fine + 1, dtype=torch.float64)
    h = (FIRST - LAST) / fine
    steps = normals(fine, n, 1, generator=seeded(0)) * h**0.5  # increments of the Brownian motion
    start = known(name, FIRST)[1] * normals(n, 1, generator=seeded(1)) + known(name, FIRST)[0] * 0.3
    reference = start[:, 0].numpy()
    for a, s, f, g2, dw in zip(*closed_sde(name, times[:-1]), steps[..., 0].numpy(), strict=True):
        score = (a * mixture_mean(reference, a, s) - reference) / s**2
        reference = reference - (f * reference - g2 * score) * h + math.sqrt(g2) * dw
    d, errors = mixture_denoiser(path), []
    for every in (128, 64, 32, 16):
        x, grid = start, times[::every].tolist()
        for t, s, dw in zip(grid[:-1], grid[1:], steps.unflatten(0, (-1, every)).sum(1), strict=True):
            x = euler_maruyama_step(path, x, d(x, t), t, s, noise=dw / (every * h) ** 0.5)
        errors.append(np.abs(x[:, 0].numpy() - reference).mean())
    is_first_order(errors)


@pytest.mark.parametrize("name", ["VP", *WALKED])
def test_weak_order_on_a_gaussian(name):
    """Mean and variance of data N(0.7, 1/4) come out with an error of h¹, without a single random number left."""
    d, moments = gaussian(name, 0.7, 0.25)
    errors = []
    for steps in (32, 64, 128, 256):
        times = np.linspace(FIRST, LAST, steps + 1)

        def run(x, g, times=times):
            return euler_maruyama(d, path_of(name), x, times, generator=g)

        found = [value[-1].item() for value in law(run, steps, *moments(FIRST))]
        errors.append([abs(a - b) for a, b in zip(found, moments(LAST), strict=True)])
    of_mean, of_var = zip(*errors, strict=True)
    is_first_order(of_mean, exact=name in ("VE narrow", "Straight"))  # Euler is exact where α is 1 or 1 − t
    is_first_order(of_var)


def density(name, t, x):
    """p_t of the mixture at points x, numpy."""
    alpha, sigma = known(name, t)
    return scipy.stats.norm.pdf(x[:, None], alpha * MEANS, np.sqrt((alpha * STDS) ** 2 + sigma**2)) @ WEIGHTS


@pytest.mark.parametrize("name", WALKED)
def test_weak_order_on_a_mixture(name):
    """The density pushed through each step's Gaussian kernel on a grid: its distance to p_s falls as h¹."""
    path = path_of(name)
    x = torch.linspace(-14, 14, 561, dtype=torch.float64)[:, None]
    dx, d, errors = (x[1] - x[0]).item(), mixture_denoiser(path), []
    for steps in (8, 16, 32, 64):
        times, p = np.linspace(FIRST, LAST, steps + 1).tolist(), density(name, FIRST, x[:, 0].numpy())
        for t, s in zip(times[:-1], times[1:], strict=True):
            x0 = d(x, t)
            mean = euler_maruyama_step(path, x, x0, t, s)
            std = (euler_maruyama_step(path, x, x0, t, s, noise=torch.ones_like(x)) - mean)[0].item()
            move = np.exp(-0.5 * ((x.numpy() - mean[:, 0].numpy()) / std) ** 2) / (std * math.sqrt(2 * math.pi))
            p = dx * move @ p
        assert p.sum() * dx == pytest.approx(1, abs=1e-6)
        errors.append(np.abs(p - density(name, LAST, x[:, 0].numpy())).sum() * dx / 2)
    is_first_order(errors)
    assert errors[-1] < 0.03


# The reverse SDE has the marginals of the forward one ------------------------------------------------------------------


def typed_walk(name, times, half=False, forget=False):
    """Euler–Maruyama typed with numpy; `half` has g²/2 before the score, as the ODE, and `forget` no score at all."""

    def run(x, g):
        x = x[:, 0].numpy()
        coefficients = closed_sde(name, torch.from_numpy(times[:-1]))
        for alpha, sigma, f, g2, h in zip(*coefficients, -np.diff(times), strict=True):
            score = (alpha * mixture_mean(x, alpha, sigma) - x) / sigma**2
            weight = 0.0 if forget else 0.5 if half else 1.0
            noise = normals(len(x), generator=g).numpy()
            x = x - (f * x - weight * g2 * score) * h + math.sqrt(g2 * h) * noise
            yield torch.from_numpy(x)[:, None]

    return run


def fits_the_marginals(name, first, run_of):
    """Kolmogorov–Smirnov against the exact distribution function of p_t, at four times on the way down from `first`."""
    times, n = np.linspace(first, 0.02, 301), 4000
    g = seeded(4)
    k = torch.multinomial(torch.from_numpy(WEIGHTS), n, replacement=True, generator=g)
    x0 = torch.from_numpy(MEANS)[k] + torch.from_numpy(STDS)[k] * normals(n, generator=g)
    alpha, sigma = known(name, first)
    states = list(run_of(times)((alpha * x0 + sigma * normals(n, generator=g))[:, None], seeded(5)))
    gaps = []
    for i in (75, 150, 225, 300):
        alpha, sigma = known(name, times[i])
        spread = np.sqrt((alpha * STDS) ** 2 + sigma**2)
        x = np.sort(states[i - 1][:, 0].numpy())
        cdf = scipy.stats.norm.cdf((x[:, None] - alpha * MEANS) / spread) @ WEIGHTS
        gaps.append(np.abs(cdf - (np.arange(n) + 0.5) / n).max())
    return max(gaps) < 0.035  # 1.95/√n is passed once in a thousand; the rest is for Euler's 300 steps


@pytest.mark.parametrize("name, first", [("VP", 1.0), ("SubVP", 1.0), ("VE", 1.0), ("Cosine", 0.95)])
def test_reverse_marginals(name, first):
    """With the exact score the states have the forward marginals; with g²/2 or without the score they have not."""
    path = path_of(name)

    def ours(times):
        return lambda x, g: euler_maruyama(mixture_denoiser(path), path, x, times, generator=g)

    def corrected(times):
        return lambda x, g: predictor_corrector(mixture_denoiser(path), path, x, times, snr=0.1, generator=g)

    assert fits_the_marginals(name, first, ours)
    assert fits_the_marginals(name, first, corrected)
    assert fits_the_marginals(name, first, lambda times: typed_walk(name, times))
    assert not fits_the_marginals(name, first, lambda times: typed_walk(name, times, half=True))
    assert not fits_the_marginals(name, first, lambda times: typed_walk(name, times, forget=True))


# Steps ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WALKED)
def test_step_takes_a_time_for_each_sample(name):
    """With (B,) times a step does to each sample what it does to it alone, also into t = 0."""
    path, (xt, x0, noise) = path_of(name), (normals(3, 2, generator=seeded(k)) for k in range(3))
    t, s = (torch.tensor(v, dtype=torch.float64) for v in ([0.9, 0.6, 0.5], [0.8, 0.1, 0.0]))
    rows = [
        euler_maruyama_step(path, xt[i : i + 1], x0[i : i + 1], t[i].item(), s[i].item(), noise[i : i + 1])
        for i in range(3)
    ]
    close(euler_maruyama_step(path, xt, x0, t, s, noise), torch.cat(rows), 1e-12)
    close(rows[2], x0[2:], 1e-12)
    alpha, sigma, f, g2 = (v.item() for v in closed_sde(name, t[:1]))
    score = (alpha * x0[:1] - xt[:1]) / sigma**2
    close(rows[0], xt[:1] - (f * xt[:1] - g2 * score) * 0.1 + math.sqrt(g2 * 0.1) * noise[:1])


@pytest.mark.parametrize("path", [Scaled(VP(), 0.5), Scaled(VE(), 2.0), VP(), SubVP(), VE()], ids=repr)
@pytest.mark.parametrize("order", ["predictor first", "corrector first", None])
def test_last_step_ends_in_the_data(path, order):
    """At t = 0 the state is α(0)·x̂_0, of the size that the path gives to the data, as with every other sampler."""
    x0 = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(3, 2)
    options = {"generator": seeded(0)} if order is None else {"generator": seeded(0), "order": order}
    sampler = euler_maruyama if order is None else predictor_corrector
    x = path.sigma(1.0) * normals(3, 2, generator=seeded(1))
    out = last(sampler(lambda xt, t: x0, path, x, [1.0, 0.5, 0.1, 0.0], **options))
    close(out, getattr(path, "scale", 1.0) * x0, 1e-12)


@pytest.mark.parametrize("betas", [np.linspace(1e-4, 0.02, 1000), [0.3, 0.1, 0.6]], ids=["DDPM's", "uneven"])
def test_ancestral_step_of_the_paper(betas):
    """(x + β·s)/√(1 − β) + √β·z is ddpm_step with variance β, to rounding: Song et al.'s and Ho et al.'s samplers are one."""
    path, abar = DiscretePath(betas), np.cumprod(1 - np.asarray(betas))
    xt, x0, noise = (normals(3, 2, generator=seeded(k)) for k in range(3))
    for t in (2, 3, len(betas)):
        beta = betas[t - 1]
        score = (math.sqrt(abar[t - 1]) * x0 - xt) / (1 - abar[t - 1])
        expected = (xt + beta * score) / math.sqrt(1 - beta) + math.sqrt(beta) * noise
        close(ddpm_step(path, xt, x0, t, t - 1, variance="beta", noise=noise), expected, 1e-11)


# The corrector --------------------------------------------------------------------------------------------------------


def test_langevin_step_is_the_formula():
    """x + δ·s + √(2δ)·z, for one δ and for one of each sample, which then does not depend on its batch mates."""
    x, score, noise = (normals(3, 2, 2, generator=seeded(k)) for k in range(3))
    close(langevin_step(x, score, 0.3, noise), x + 0.3 * score + math.sqrt(0.6) * noise, 1e-14)
    each = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)
    whole = langevin_step(x, score, each, noise)
    for i, step in enumerate(each.tolist()):
        one = slice(i, i + 1)
        close(whole[one], x[one] + step * score[one] + math.sqrt(2 * step) * noise[one], 1e-14)
        close(whole[one], langevin_step(x[one], score[one], step, noise[one]), 1e-14)
    assert langevin_step(x.float(), score.float(), each, noise.float()).dtype == torch.float32


@pytest.mark.parametrize("sigma, step", [(1.0, 0.1), (1.0, 1.0), (0.3, 0.05), (5.0, 2.0)])
def test_variance_that_a_langevin_step_keeps(sigma, step):
    """On N(0, σ²) the step's own numbers, iterated to their fixed point, give σ²/(1 − δ/2σ²)."""
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    keep = langevin_step(one, -one / sigma**2, step, zero).item()
    spread = langevin_step(zero, zero, step, one).item()
    var = 0.0
    for _ in range(2000):
        var = keep**2 * var + spread**2
    assert var == pytest.approx(sigma**2 / (1 - step / (2 * sigma**2)), rel=1e-9)


@pytest.mark.parametrize("name, t", [("VP", 0.4), ("VE", 0.7), ("Cosine", 1.0), ("chain", 12)])
@pytest.mark.parametrize("snr", [0.3, 0.6])
def test_variance_that_langevin_keeps(name, t, snr):
    """Data at one point, so that p_t = N(α·m, σ²): after many steps the mean is right and the variance σ²/(1 − r²)."""
    (alpha, sigma), steps = known(name, t), 90

    def run(x, g):
        return langevin(lambda xt, t: torch.full_like(xt, 0.8), path_of(name), x, t, snr=snr, steps=steps, generator=g)

    mean, var = law(run, steps, 3.0, 7.0)
    close(mean[-1], alpha * 0.8, 1e-6)
    close(var[-1], sigma**2 / (1 - snr**2), 1e-6)
    expected = (1 - 2 * snr**2) ** 2 * 7.0 + 4 * snr**2 * sigma**2  # one step of the recursion
    close(var[0], expected, 1e-9)
    close(mean[0], 3.0 + 2 * snr**2 * (alpha * 0.8 - 3.0), 1e-9)


def kept_density(x, mean, std):
    """The density, on the points x, that a move x → N(mean(x), std(x)²) leaves unchanged: the matrix' fixed vector."""
    dx = x[1] - x[0]
    move = scipy.stats.norm.pdf(x[:, None], mean, std)
    move /= move.sum(0)
    rest = move - np.eye(len(x))
    rest[0] = dx  # one equation is redundant; instead the density sums to 1
    return np.linalg.solve(rest, np.eye(len(x))[0])


def test_langevin_tends_to_the_marginal_as_its_ratio_falls():
    """On a mixture, by quadrature: the density that `langevin` keeps is off p_t by about r²."""
    name, t = "VP gentle", 0.3
    path, x = path_of(name), torch.linspace(-5, 5, 501, dtype=torch.float64)[:, None]
    dx, gaps = (x[1] - x[0]).item(), []
    d = mixture_denoiser(path)
    for snr in (0.4, 0.2, 0.1, 0.05):
        g, z = seeded(0), normals(*x.shape, generator=seeded(0))
        states = [last(langevin(d, path, x, t, snr=snr, generator=g))]
        states.append(last(langevin(d, path, x, t, snr=snr, generator=seeded(1))))
        other = normals(*x.shape, generator=seeded(1))
        std = ((states[0] - states[1]) / (z - other)).median().item()
        mean = states[0] - std * z
        p = kept_density(x[:, 0].numpy(), mean[:, 0].numpy(), std)
        gaps.append(np.abs(p - density(name, t, x[:, 0].numpy())).sum() * dx / 2)
    assert gaps[0] > 0.01 and gaps[-1] < 0.002
    assert abs(slope(gaps) - 2) < 0.3, gaps


def test_a_step_measured_at_each_sample_keeps_another_density():
    """δ = 2(r‖z‖/‖s‖)², with √d for ‖z‖, keeps p·‖s‖² and not p, however small r: for N(0, 1) that is x²·φ(x).

    Under the density that is kept, E cos(x) stays the same in a step; its change, over r², is worked out on a grid.
    This is why the corrector's step comes from σ_t and not from a measured norm.
    """
    x = torch.linspace(-9, 9, 60_000, dtype=torch.float64)[:, None]  # an even number: no point at 0
    normal, zero, one = torch.exp(-(x**2) / 2), torch.zeros_like(x), torch.ones_like(x)
    squared, rates = x**2 * normal, []
    for r in (0.08, 0.04, 0.02, 0.01):
        for step in (2 * r**2 / x[:, 0] ** 2, 2 * r**2):
            mean = langevin_step(x, -x, step, zero)
            std = langevin_step(x, -x, step, one) - mean
            change = (torch.cos(mean) * torch.exp(-(std**2) / 2) - torch.cos(x)) / r**2  # E cos of a Gaussian
            rates.append([(abs(p @ change[:, 0]) / p.sum()).item() for p in (normal[:, 0], squared[:, 0])])
    measured, fixed = np.array(rates[::2]), np.array(rates[1::2])
    assert abs(slope(measured[:, 1]) - 1) < 0.15 and measured[:, 0].min() > 1, rates
    assert abs(slope(fixed[:, 0]) - 2) < 0.15 and fixed[:, 1].min() > 0.3, rates


@pytest.mark.parametrize("name, t", [("VP", 0.4), ("Cosine", 1.0), ("chain", 7)])
def test_langevin_states(name, t):
    """N states at one t, which the denoiser gets as a float; each of x's dtype, in memory of its own, from the generator."""
    seen = []

    def d(xt, t):
        assert isinstance(t, float) and not torch.is_grad_enabled()
        seen.append(t)
        return smooth(xt, 0.5)

    for dtype in (torch.float32, torch.float64):
        x = torch.randn(3, 2, generator=seeded(0), dtype=dtype)
        before, world = x.clone(), torch.random.get_rng_state()
        runs = [list(langevin(d, path_of(name), x, t, steps=3, generator=seeded(k))) for k in (1, 1, 2)]
        assert [(s.dtype, s.shape) for s in runs[0]] == [(dtype, x.shape)] * 3
        assert len({s.data_ptr() for s in (x, *runs[0])}) == 4 and torch.equal(x, before)
        assert all(torch.equal(a, b) and not torch.equal(a, c) for a, b, c in zip(*runs, strict=True))
        assert torch.equal(torch.random.get_rng_state(), world)
    assert seen == [float(t)] * 18
    alone = x.clone()
    alone[[0, 2]] = 9.0
    other = last(langevin(d, path_of(name), alone, t, steps=3, generator=seeded(1)))
    assert torch.equal(other[1], runs[0][-1][1]) and not torch.equal(other[0], runs[0][-1][0])


def test_langevin_default_is_the_papers_ratio():
    """One step with r = 0.16."""
    x = normals(3, 1, generator=seeded(0))
    (state,) = langevin(lambda xt, t: torch.zeros_like(xt), Cosine(), x, 1.0, generator=seeded(1))
    close(state, x * (1 - 2 * 0.16**2) + 2 * 0.16 * normals(3, 1, generator=seeded(1)))


# Predictor and corrector in turn --------------------------------------------------------------------------------------

GRID = [1.0, 0.8, 0.5, 0.45, 0.1, 0.0]


@pytest.mark.parametrize("predictor", ["euler_maruyama", "ddpm"])
@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("order", ["predictor first", "corrector first"])
def test_when_the_denoiser_is_asked(predictor, steps, order):
    """The predictor asks at t; the corrector at s after it, and not at s = 0, or at t before it. So many evaluations."""
    seen = []

    def d(xt, t):
        assert isinstance(t, float)
        seen.append(t)
        return smooth(xt, t)

    options = {"predictor": predictor, "corrector_steps": steps, "order": order, "generator": seeded(0)}
    states = predictor_corrector(d, VP(), torch.ones(2, 1), GRID, **options)
    expected = []
    for t, s in zip(GRID[:-1], GRID[1:], strict=True):
        expected += [t, *([s] * steps if s > 0 else [])] if order == "predictor first" else [t] * (steps + 1)
        next(states)
        assert seen == expected
    assert len(seen) == 5 * (1 + steps) - (steps if order == "predictor first" else 0)


@pytest.mark.parametrize("order", ["predictor first", "corrector first"])
@pytest.mark.parametrize("predictor, alone", [("euler_maruyama", euler_maruyama), ("ddpm", ddpm)])
def test_no_corrector_is_the_predictor(order, predictor, alone):
    """With corrector_steps = 0 every state is that of the predictor's own sampler, bit for bit."""
    x = normals(3, 2, generator=seeded(0))
    options = {"order": order, "predictor": predictor, "corrector_steps": 0}
    for one, two in zip(
        predictor_corrector(smooth, VP(), x, GRID, **options, generator=seeded(1)),
        alone(smooth, VP(), x, GRID, generator=seeded(1)),
        strict=True,
    ):
        assert torch.equal(one, two)


@pytest.mark.parametrize("predictor, alone", [("euler_maruyama", euler_maruyama), ("ddpm", ddpm)])
def test_in_turn(predictor, alone):
    """A step is the predictor's step and `langevin` at the right time, in the order that is asked for, bit for bit."""
    x, times, options = normals(3, 2, generator=seeded(0)), [0.8, 0.5], {"snr": 0.3}
    for order in ("predictor first", "corrector first"):
        g, state = seeded(1), x
        for part in order.split()[0], {"predictor": "corrector", "corrector": "predictor"}[order.split()[0]]:
            if part == "predictor":
                state = last(alone(smooth, SubVP(), state, times, generator=g))
            else:
                at = times[1] if order == "predictor first" else times[0]
                state = last(langevin(smooth, SubVP(), state, at, steps=2, **options, generator=g))
        settings = {"predictor": predictor, "corrector_steps": 2, "order": order, **options}
        assert torch.equal(last(predictor_corrector(smooth, SubVP(), x, times, **settings, generator=seeded(1))), state)


def test_defaults_of_predictor_corrector():
    """Euler–Maruyama, then one Langevin step with r = 0.16."""
    x = normals(3, 2, generator=seeded(0))
    said = {"snr": 0.16, "corrector_steps": 1, "order": "predictor first", "predictor": "euler_maruyama"}
    for one, two in zip(
        predictor_corrector(smooth, VP(), x, GRID, generator=seeded(1)),
        predictor_corrector(smooth, VP(), x, GRID, **said, generator=seeded(1)),
        strict=True,
    ):
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", ["Cosine", "Straight", "chain"])
def test_ancestral_predictor_starts_without_signal(name):
    """predictor="ddpm" runs from a time where α = 0, and on a chain; Euler–Maruyama is refused there at the call."""
    path = DiscretePath([0.1, 0.2, 1.0]) if name == "chain" else path_of(name)
    x, times = normals(3, 2, generator=seeded(0)), path.times(3)
    for order in ("predictor first", "corrector first"):
        settings = {"predictor": "ddpm", "order": order, "generator": seeded(1)}
        assert last(predictor_corrector(smooth, path, x, times, **settings)).isfinite().all()
    for call in (euler_maruyama, predictor_corrector):
        with pytest.raises(ValueError, match="limit.*SDE of VP" if name == "chain" else r"not finite at t = \[1\.0\]"):
            call(smooth, path, x, times)
    if name != "chain":
        with pytest.raises(ValueError, match=r"not finite at t = \[1\.0\]"):
            euler_maruyama_step(path, x, x, 1.0, 0.5)


@pytest.mark.parametrize("order", ["predictor first", "corrector first"])
@pytest.mark.parametrize("name", ["VP", "SubVP"])
def test_the_corrector_brings_the_law_closer(order, name):
    """Data N(0.7, 1/4), exact score: at t = 0.1 the law is nearer to the truth, in Wasserstein's metric, than without it."""
    d, moments = gaussian(name, 0.7, 0.25)
    path, (true_mean, true_var) = path_of(name), moments(0.1)
    for steps in (20, 40):
        times, gaps = np.linspace(1, 0.1, steps + 1), []
        for correctors in (0, 1, 3):

            def run(x, g, times=times, correctors=correctors):
                options = {"snr": 0.1, "corrector_steps": correctors, "order": order, "generator": g}
                return predictor_corrector(d, path, x, times, **options)

            mean, var = (value[-1].item() for value in law(run, steps * (1 + correctors), *moments(1.0)))
            gaps.append(math.hypot(mean - true_mean, var**0.5 - true_var**0.5))
        assert gaps[0] > gaps[1] > gaps[2], gaps


# Arguments ------------------------------------------------------------------------------------------------------------


def test_arguments_are_checked():
    """What does not fit raises at the call, and its name comes first."""
    x, path, ones = torch.ones(2, 3), VP(), torch.ones(2, 3, dtype=torch.float64)

    def never(xt, t):
        raise AssertionError("the denoiser was called")

    cases = [
        (ValueError, "^s must be less than t", lambda: euler_maruyama_step(path, x, x, 0.4, 0.5)),
        (ValueError, "^s must be less than t", lambda: euler_maruyama_step(path, x, x, 0.5, 0.5)),
        (ValueError, "^x0 must have the shape of xt", lambda: euler_maruyama_step(path, x, x[:1], 0.5, 0.4)),
        (ValueError, "^noise must have the shape of xt", lambda: euler_maruyama_step(path, x, x, 0.5, 0.4, x[:1])),
        (ValueError, r"^t must lie in \[0, 1\]", lambda: euler_maruyama_step(path, x, x, 1.5, 0.4)),
        (ValueError, "^score must have the shape of xt", lambda: langevin_step(x, x[:1], 0.1, x)),
        (ValueError, "^noise must have the shape of xt", lambda: langevin_step(x, x, 0.1, x[:, :1])),
        (TypeError, "^xt must be a floating-point tensor", lambda: langevin_step(x.long(), x, 0.1, x)),
        (ValueError, "^step must be positive; got 0.0", lambda: langevin_step(x, x, 0.0, x)),
        (ValueError, "^step must be positive; got -1.0", lambda: langevin_step(x, x, -1.0, x)),
        (ValueError, r"^step must be positive; got \[0.5, 0.0\]",
         lambda: langevin_step(x, x, torch.tensor([0.5, 0.0]), x)),
        (ValueError, "^step must be positive; got nan", lambda: langevin_step(x, x, math.nan, x)),
        (ValueError, r"^step must .*\(2,\)", lambda: langevin_step(x, x, torch.full((3,), 0.1), x)),
        (ValueError, r"^step must .*\(2,\)", lambda: langevin_step(x, x, torch.full((2, 3), 0.1), x)),
        (ValueError, "^steps must be a whole number of at least 1; got 0", lambda: langevin(never, path, x, 0.5, steps=0)),
        (ValueError, "^steps must be a whole number of at least 1; got 1.5",
         lambda: langevin(never, path, x, 0.5, steps=1.5)),
        (ValueError, r"^snr must lie in \(0, 1\); got 0", lambda: langevin(never, path, x, 0.5, snr=0)),
        (ValueError, r"^snr must lie in \(0, 1\); got 1", lambda: langevin(never, path, x, 0.5, snr=1)),
        (ValueError, r"^snr must lie in \(0, 1\); got nan", lambda: langevin(never, path, x, 0.5, snr=math.nan)),
        (ValueError, r"^t must have σ\(t\) > 0.*; got 0.0", lambda: langevin(never, path, x, 0.0)),
        (ValueError, r"^t must lie in \[0, 1\]", lambda: langevin(never, path, x, 1.5)),
        (ValueError, "^t must be a whole number", lambda: langevin(never, DiscretePath([0.1] * 4), x, 1.5)),
        (TypeError, "^x must be a floating-point tensor", lambda: langevin(never, path, x.long(), 0.5)),
        (TypeError, "^path must be a GaussianPath; got str", lambda: langevin(never, "VP", x, 0.5)),
        (ValueError, "^order must be 'predictor first' or 'corrector first'; got 'both'",
         lambda: predictor_corrector(never, path, x, GRID, order="both")),
        (ValueError, "^predictor must be 'euler_maruyama' or 'ddpm'; got 'heun'",
         lambda: predictor_corrector(never, path, x, GRID, predictor="heun")),
        (ValueError, "^corrector_steps must be a whole number of at least 0; got -1",
         lambda: predictor_corrector(never, path, x, GRID, corrector_steps=-1)),
        (ValueError, "^corrector_steps must be a whole number of at least 0; got 0.5",
         lambda: predictor_corrector(never, path, x, GRID, corrector_steps=0.5)),
        (ValueError, r"^snr must lie in \(0, 1\); got 2", lambda: predictor_corrector(never, path, x, GRID, snr=2)),
    ]  # fmt: skip
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()
    assert langevin_step(ones, ones, 0.5, ones).unique().item() == 2.5


def test_langevin_watches_its_states():
    """A state that is not finite raises at its step."""
    states = langevin(lambda xt, t: xt / 0, VP(), torch.ones(2, 1), 0.5, steps=2)
    with pytest.raises(FloatingPointError, match="^the state is not finite after step 1 of 2"):
        next(states)
