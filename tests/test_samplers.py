"""Samplers against formulas typed by hand, exact Gaussian recursions, and the exact flow of a mixture."""

import math
from functools import cache, partial

import numpy as np
import pytest
import torch
from oracles import (
    CONTINUOUS,
    LAMBDA_END,
    LAMBDA_START,
    PATHS,
    bayes_on_a_grid,
    exact_flow,
    forward_kernel,
    known,
    known_rates,
    mixture_denoiser,
    order_of,
    path_of,
    time_of_lambda,
    time_on,
)

from dgm_course.denoisers import Denoiser, clipped
from dgm_course.paths import VE, VP, Cosine, DiscretePath, Straight, SubVP
from dgm_course.samplers import (
    ddim,
    ddim_inversion,
    ddim_step,
    ddpm,
    ddpm_step,
    dpm_solver_pp_2m,
    dpm_solver_pp_2m_step,
    dpm_solver_pp_2s,
    dpm_solver_pp_2s_step,
    euler_maruyama,
    heun,
    heun_step,
    last,
    logsnr_times,
    predictor_corrector,
)
from dgm_course.schedules import cosine_betas, linear_betas

GRID = [1.0, 0.8, 0.5, 0.45, 0.1, 0.0]  # uneven on purpose, from one end to the other


def fraction(xt):
    """What a network may say of its variance: another number for each value, sometimes a little outside of [0, 1]."""
    return 0.5 + 0.55 * torch.sin(2 * xt)


def learned(denoiser, *arguments, **options):
    """`ddpm` with a denoiser that gives the pair."""
    return ddpm(lambda xt, t: (denoiser(xt, t), fraction(xt)), *arguments, variance="learned", **options)


SAMPLERS = {
    "ddpm": ddpm,
    "ddpm posterior": lambda *a, **k: ddpm(*a, variance="posterior", **k),
    "ddpm callable": lambda *a, **k: ddpm(*a, variance=lambda xt, x0, t, s: 0.01, **k),
    "ddpm number": lambda *a, **k: ddpm(*a, variance=0.3, **k),
    "ddpm learned": learned,
    "ddim": ddim,
    "ddim eta": lambda *a, **k: ddim(*a, eta=0.7, **k),
    "heun": lambda *a, generator=None: heun(*a),
    "2m": lambda *a, generator=None: dpm_solver_pp_2m(*a),
    "2s": lambda *a, generator=None: dpm_solver_pp_2s(*a),
    "em": euler_maruyama,
    "em, corrector": predictor_corrector,
    "corrector, em": partial(predictor_corrector, order="corrector first", snr=0.3, corrector_steps=2),
    "ddpm, corrector": partial(predictor_corrector, predictor="ddpm"),
}
OF_THE_SDE = ["em", "em, corrector", "corrector, em"]  # they need a finite drift, so also at t = 1 if they start there
OF_DDPM = ["ddpm", "ddpm posterior", "ddpm callable", "ddpm number", "ddpm learned"]
RANDOM = [*OF_DDPM, "ddim eta", *OF_THE_SDE, "ddpm, corrector"]
all_samplers = pytest.mark.parametrize("sampler", SAMPLERS)
all_paths = pytest.mark.parametrize("name", PATHS)
inside = pytest.mark.parametrize(
    "sampler, name", [(s, name) for s in SAMPLERS for name in PATHS if s not in OF_THE_SDE or name in CONTINUOUS]
)
FROM_END_TO_END = [
    (s, name)
    for s in SAMPLERS
    for name in PATHS
    if s not in OF_THE_SDE or name in ("VP", "VP gentle", "SubVP", "VE", "VE narrow")
]
end_to_end = pytest.mark.parametrize("sampler, name", FROM_END_TO_END)


def home(sampler):
    """A path on which the sampler goes from t = 1 to 0."""
    return VP() if sampler in OF_THE_SDE else Cosine()


def smooth(xt, t):
    """A denoiser that depends on state and time, and on each sample alone."""
    return torch.tanh(xt * 0.7 + 0.3) * (1 - 0.2 * float(t) / 20)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def normals(*shape, generator, dtype=torch.float64):
    return torch.randn(*shape, generator=generator, dtype=dtype)


def close(actual, expected, tolerance=1e-10):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


def grid_of(name, units=GRID):
    return [time_on(name, unit) for unit in units]


def inner(name):
    """Grids without the ends, where every formula can be typed without a limit."""
    return grid_of(name, [0.95, 0.8, 0.5, 0.45, 0.1])


# Steps against formulas -----------------------------------------------------------------------------------------------


def half_logsnr(name, t):
    """DPM-Solver's λ = log(α/σ), from the closed form."""
    alpha, sigma = known(name, t)
    return math.log(alpha / sigma)


def typed_ddim(name, xt, x0, t, s, eta=0.0, noise=0.0):
    """DDIM as in the paper, with its σ in terms of α² and σ² of the path."""
    (alpha_s, sigma_s), (alpha_t, sigma_t) = known(name, s), known(name, t)
    eps = (xt - alpha_t * x0) / sigma_t
    std = eta * sigma_s / sigma_t * math.sqrt(forward_kernel(name, s, t)[1])
    return alpha_s * x0 + math.sqrt(max(sigma_s**2 - std**2, 0)) * eps + std * noise


def typed_ddpm(name, xt, x0, t, s, variance, noise):
    """The posterior's mean by Gaussian conditioning, plus noise of variance v or of the posterior's."""
    (alpha_s, sigma_s), (alpha_t, sigma_t) = known(name, s), known(name, t)
    a, v = forward_kernel(name, s, t)
    gain = a * sigma_s**2 / sigma_t**2
    lower = v * sigma_s**2 / (a**2 * sigma_s**2 + v)
    share = {"beta": 1.0, "posterior": 0.0}.get(variance, variance) if isinstance(variance, str) else variance
    var = v**share * lower ** (1 - share) if sigma_s > 0 else 0.0  # as a product of powers, with no logs
    return alpha_s * x0 + gain * (xt - alpha_t * x0) + var**0.5 * noise


def typed_heun(denoiser, name, xt, t, s):
    """Euler in (x/α, σ/α), then again with the mean of the two slopes."""
    (alpha_s, sigma_s), (alpha_t, sigma_t) = known(name, s), known(name, t)
    step = sigma_s / alpha_s - sigma_t / alpha_t
    slope = (xt - alpha_t * denoiser(xt, t)) / sigma_t
    ahead = xt / alpha_t + step * slope
    slope_ahead = (alpha_s * ahead - alpha_s * denoiser(alpha_s * ahead, s)) / sigma_s
    return alpha_s * (xt / alpha_t + step * (slope + slope_ahead) / 2)


def typed_2m(name, xt, x0, t, s, x0_before=None, t_before=None):
    """DPM-Solver++(2M) of the paper, with λ = log(α/σ)."""
    (alpha_s, sigma_s), (_, sigma_t) = known(name, s), known(name, t)
    h = half_logsnr(name, s) - half_logsnr(name, t)
    if x0_before is not None:
        r = (half_logsnr(name, t) - half_logsnr(name, t_before)) / h
        x0 = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * x0_before
    return sigma_s / sigma_t * xt - alpha_s * (math.exp(-h) - 1) * x0


@cache
def middle(name, t, s):
    """The time where λ is half way from t to s: by halving on the closed form; on the chain by looking at every time between."""
    half = (half_logsnr(name, t) + half_logsnr(name, s)) / 2
    if name == "chain":
        return min(range(s + 1, t), key=lambda u: abs(half_logsnr(name, u) - half), default=None)
    low, high = s, t
    for _ in range(50):
        u = (low + high) / 2
        low, high = (u, high) if half_logsnr(name, u) > half else (low, u)
    return low


def typed_2s(denoiser, name, xt, t, s):
    """DPM-Solver++(2S) of the paper, with any r: what it needs in the middle is a DDIM step to there."""
    x0, u = denoiser(xt, t), middle(name, t, s)
    if u is None:
        return typed_2m(name, xt, x0, t, s)
    r = (half_logsnr(name, u) - half_logsnr(name, t)) / (half_logsnr(name, s) - half_logsnr(name, t))
    ahead = denoiser(typed_ddim(name, xt, x0, t, u), u)
    return typed_2m(name, xt, (1 - 1 / (2 * r)) * x0 + 1 / (2 * r) * ahead, t, s)


def typed_reverse(name, xt, x0, t, s, noise):
    """Euler–Maruyama of the paper's eq. 6, with f and g² from the closed forms' rates."""
    (alpha, sigma), (d_alpha, d_sigma) = known(name, t), known_rates(name, t)
    f = d_alpha / alpha
    g2, h = 2 * sigma * d_sigma - 2 * f * sigma**2, t - s
    score = (alpha * x0 - xt) / sigma**2
    return xt - (f * xt - g2 * score) * h + math.sqrt(g2 * h) * noise


def typed_corrector(name, xt, x0, t, snr, noise):
    """One step of Langevin dynamics at t, with δ = 2(rσ)²."""
    alpha, sigma = known(name, t)
    step = 2 * (snr * sigma) ** 2
    return xt + step * (alpha * x0 - xt) / sigma**2 + math.sqrt(2 * step) * noise


@all_paths
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_step(name, eta, generator):
    """ddim_step against the paper's formula, at inner times and into t = 0."""
    xt, x0, noise = (normals(3, 2, generator=generator) for _ in "abc")
    for t, s in (
        (time_on(name, 0.8), time_on(name, 0.3)),
        (time_on(name, 1.0), time_on(name, 0.9)),
        (time_on(name, 0.1), 0),
    ):
        close(ddim_step(path_of(name), xt, x0, t, s, eta, noise), typed_ddim(name, xt, x0, t, s, eta, noise))


@all_paths
@pytest.mark.parametrize("variance", ["beta", "posterior", 0, 1, 0.3])
def test_ddpm_step(name, variance, generator):
    """ddpm_step against Gaussian conditioning; without noise its mean; into t = 0 it adds none."""
    xt, x0, noise = (normals(3, 2, generator=generator) for _ in "abc")
    for t, s in (
        (time_on(name, 0.8), time_on(name, 0.3)),
        (time_on(name, 1.0), time_on(name, 0.9)),
        (time_on(name, 0.1), 0),
    ):
        expected = typed_ddpm(name, xt, x0, t, s, variance, noise)
        close(ddpm_step(path_of(name), xt, x0, t, s, variance=variance, noise=noise), expected)
        close(ddpm_step(path_of(name), xt, x0, t, s, variance=variance), typed_ddpm(name, xt, x0, t, s, variance, 0.0))


@pytest.mark.parametrize("t", [2, 3, 500, 1000])
@pytest.mark.parametrize("variance", ["beta", "posterior"])
def test_ddpm_step_is_algorithm_2(t, variance, generator):
    """On the lecture's chain: (1/√(1−β_t))(x_t − β_t/√(1−ᾱ_t)·ε̂) + σ_t z, with the corrected factor in front."""
    betas = np.linspace(1e-4, 0.02, 1000)
    abar = np.concatenate([[1.0], np.cumprod(1 - betas)])
    xt, eps, noise = (normals(3, 2, generator=generator) for _ in "abc")
    x0 = (xt - math.sqrt(1 - abar[t]) * eps) / math.sqrt(abar[t])
    beta = betas[t - 1]
    var = beta if variance == "beta" else beta * (1 - abar[t - 1]) / (1 - abar[t])
    expected = (xt - beta / math.sqrt(1 - abar[t]) * eps) / math.sqrt(1 - beta) + math.sqrt(var) * noise
    close(ddpm_step(DiscretePath(betas), xt, x0, t, t - 1, variance=variance, noise=noise), expected)


@all_paths
@pytest.mark.parametrize("shape", [(3, 2), (2, 1, 2, 2)])
def test_ddpm_step_with_a_fraction_for_each_value(name, shape, generator):
    """What a network says, between β and β̃ and beyond: the variance is a product of their powers; 0 into t = 0."""
    xt, x0, noise = (normals(*shape, generator=generator) for _ in "abc")
    share = 0.5 + normals(*shape, generator=generator)
    for t, s in (
        (time_on(name, 0.8), time_on(name, 0.3)),
        (time_on(name, 1.0), time_on(name, 0.95)),
        (time_on(name, 0.1), 0),
    ):
        found = ddpm_step(path_of(name), xt, x0, t, s, variance=share, noise=noise)
        close(found, typed_ddpm(name, xt, x0, t, s, share, noise))
        close(ddpm_step(path_of(name), xt, x0, t, s, variance=share), typed_ddpm(name, xt, x0, t, s, share, 0.0))
    rows = [torch.tensor(grid_of(name, units)[: len(xt)], dtype=torch.float64) for units in ([0.9, 0.5, 0.3], [0.8, 0.1, 0.0])]  # fmt: skip
    found = ddpm_step(path_of(name), xt, x0, *rows, variance=share, noise=noise)
    for i, (t, s) in enumerate(zip(*(row.tolist() for row in rows), strict=True)):
        t, s = (round(t), round(s)) if name == "chain" else (t, s)
        close(found[i], typed_ddpm(name, xt[i], x0[i], t, s, share[i], noise[i]))


@pytest.mark.parametrize("says", [-1.0, 1.0, -0.5, 1.4])
@pytest.mark.parametrize("low, high", [(-2.0, 2.0), (-0.3, 0.4)])
def test_learned_variance_of_a_network(says, low, high, generator):
    """A Denoiser's pair goes through `ddpm`, clipped or not, with conditions: −1 and 1 of the last channels stand for β̃ and β."""
    x, seen, y, times = normals(3, 1, 2, 2, generator=generator), [], torch.tensor([2, 0, 1]), [50, 30, 29, 4, 0]

    def net(xt, t, y):
        seen.append(y)
        return torch.cat([torch.tanh(3 * xt), torch.full_like(xt, says)], 1)

    d, g = Denoiser(net, DiscretePath(linear_betas(50)), "x0", learned_variance=True), seeded(1)
    pair = clipped(lambda xt, t: d.with_variance(xt, t, y=y), low, high)
    states = list(ddpm(pair, d.path, x, times, variance="learned", generator=seeded(1)))
    abar = np.cumprod(np.append(1.0, 1 - np.linspace(2e-3, 0.4, 50)))
    for state, t, s in zip(states, times, times[1:], strict=False):
        beta, x0 = 1 - abar[t] / abar[s], torch.tanh(3 * x).clamp(low, high)
        tilde = beta * (1 - abar[s]) / (1 - abar[t])
        x = math.sqrt(abar[s]) * beta / (1 - abar[t]) * x0 + math.sqrt(1 - beta) * (1 - abar[s]) / (1 - abar[t]) * x
        if s:
            x = x + beta ** ((1 + says) / 4) * tilde ** ((1 - says) / 4) * normals(*x.shape, generator=g)
        close(state, x)
    assert len(seen) == 4 and all(said is y for said in seen)


def test_what_a_network_said_is_left_alone(generator):
    """Neither x̂_0 nor the fraction is written on, so that a denoiser may give the same tensors again."""
    x, x0, share = (normals(2, 2, generator=generator) for _ in "abc")
    before = x0.clone(), share.clone()
    once = list(ddpm(lambda xt, t: (x0, share), Cosine(), x, GRID, variance="learned", generator=seeded(1)))
    assert torch.equal(x0, before[0]) and torch.equal(share, before[1])
    again = ddpm(lambda xt, t: (x0.clone(), share.clone()), Cosine(), x, GRID, variance="learned", generator=seeded(1))
    assert all(torch.equal(one, other) for one, other in zip(once, again, strict=True))


@all_paths
def test_heun_step(name, generator):
    """heun_step against Heun's rule typed in x/α and σ/α."""
    xt, t, s = normals(3, 2, generator=generator), time_on(name, 0.8), time_on(name, 0.6)
    close(heun_step(smooth, path_of(name), xt, t, s), typed_heun(smooth, name, xt, t, s))


@all_paths
def test_dpm_solver_pp_2m_step(name, generator):
    """The step against the paper's formula: second order, first order, and into t = 0."""
    path, (xt, x0, before) = path_of(name), (normals(3, 2, generator=generator) for _ in "abc")
    t_before, t, s = (time_on(name, unit) for unit in (0.95, 0.8, 0.3))
    close(dpm_solver_pp_2m_step(path, xt, x0, t, s, before, t_before), typed_2m(name, xt, x0, t, s, before, t_before))
    close(dpm_solver_pp_2m_step(path, xt, x0, t, s), typed_2m(name, xt, x0, t, s))
    close(dpm_solver_pp_2m_step(path, xt, x0, t, s), typed_ddim(name, xt, x0, t, s))
    close(dpm_solver_pp_2m_step(path, xt, x0, t, 0, before, t_before), known(name, 0)[0] * x0, 1e-12)


@all_paths
def test_steps_take_a_time_for_each_sample(name, generator):
    """With (B,) times a step does to each sample what it does to it alone."""
    path, (xt, x0, before, noise) = path_of(name), (normals(3, 2, generator=generator) for _ in "abcd")
    b, t, s = grid_of(name, [0.95, 0.9, 0.7]), grid_of(name, [0.9, 0.5, 0.3]), grid_of(name, [0.8, 0.1, 0.0])
    whole = [torch.tensor(times, dtype=torch.float64) for times in (b, t, s)]
    calls = {
        "ddim": lambda i, b, t, s: ddim_step(path, xt[i], x0[i], t, s, 0.5, noise[i]),
        "ddpm": lambda i, b, t, s: ddpm_step(path, xt[i], x0[i], t, s, noise=noise[i]),
        "2m": lambda i, b, t, s: dpm_solver_pp_2m_step(path, xt[i], x0[i], t, s, before[i], b),
    }
    for call in calls.values():
        rows = torch.cat([call(slice(i, i + 1), b[i], t[i], s[i]) for i in range(3)])
        close(call(slice(None), *whole), rows, 1e-12)


@all_paths
@pytest.mark.parametrize("units", [(0.25, 0.3), (0.1, 0.9), (0.5, 0.75)])
def test_eta_one_draws_from_the_posterior(name, units, generator):
    """DDIM with η = 1 is DDPM with the posterior's variance; both have the moments of Bayes on a grid."""
    s, t = (time_on(name, u) for u in units)
    xt, x0, noise = (normals(3, 2, generator=generator) for _ in "abc")
    step = ddim_step(path_of(name), xt, x0, t, s, 1.0, noise)
    close(step, ddpm_step(path_of(name), xt, x0, t, s, variance="posterior", noise=noise))
    (alpha_s, sigma_s), (alpha_t, sigma_t) = known(name, s), known(name, t)
    x0, xt = 0.7, alpha_t * 0.7 + 0.9 * sigma_t
    mean, var = bayes_on_a_grid(alpha_s, sigma_s, *forward_kernel(name, s, t), xt, x0)
    pair = [torch.tensor([value], dtype=torch.float64) for value in (xt, x0)]
    low, high = (
        ddim_step(path_of(name), *pair, t, s, 1.0, torch.tensor([z], dtype=torch.float64)) for z in (-1.0, 1.0)
    )
    close((high + low) / 2, [mean], 1e-9)
    close(((high - low) / 2) ** 2, [var], 1e-9)


@all_paths
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_keeps_the_marginal(name, eta):
    """With x_0 known and x_t ~ q(x_t | x_0), x_s has mean α_s·x_0 and variance σ_s², whatever η."""
    path, t, s = path_of(name), time_on(name, 0.8), time_on(name, 0.5)
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    keep = ddim_step(path, one, zero, t, s, eta, zero).item()
    pull = ddim_step(path, zero, one, t, s, eta, zero).item()
    std = ddim_step(path, zero, zero, t, s, eta, one).item()
    (alpha_s, sigma_s), (alpha_t, sigma_t) = known(name, s), known(name, t)
    assert keep * alpha_t + pull == pytest.approx(alpha_s, rel=1e-10)
    assert keep**2 * sigma_t**2 + std**2 == pytest.approx(sigma_s**2, rel=1e-10)


# Samplers are repeated steps ------------------------------------------------------------------------------------------


def stepped(sampler, name, x, times, seed):
    """The same run written as a loop over formulas, with noise drawn in the same order."""
    g, states, x0_before = seeded(seed), [], None

    def draw():
        return torch.randn(x.shape, generator=g, dtype=x.dtype)

    for i, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
        x0 = smooth(x, t)
        if sampler == "ddpm":
            x = typed_ddpm(name, x, x0, t, s, "beta", draw())
        elif sampler == "ddpm posterior":
            x = typed_ddpm(name, x, x0, t, s, "posterior", draw())
        elif sampler == "ddpm callable":
            x = typed_ddpm(name, x, x0, t, s, "posterior", 0.0) + 0.1 * draw()
        elif sampler == "ddpm number":
            x = typed_ddpm(name, x, x0, t, s, 0.3, draw())
        elif sampler == "ddpm learned":
            x = typed_ddpm(name, x, x0, t, s, fraction(x), draw())
        elif sampler == "ddim":
            x = typed_ddim(name, x, x0, t, s)
        elif sampler == "ddim eta":
            x = typed_ddim(name, x, x0, t, s, 0.7, draw())
        elif sampler == "heun":
            x = typed_heun(smooth, name, x, t, s)
        elif sampler == "corrector, em":
            for _ in range(2):
                x = typed_corrector(name, x, smooth(x, t), t, 0.3, draw())
            x = typed_reverse(name, x, smooth(x, t), t, s, draw())
        elif sampler.startswith("em"):
            x = typed_reverse(name, x, x0, t, s, draw())
        elif sampler == "ddpm, corrector":
            x = typed_ddpm(name, x, x0, t, s, "beta", draw())
        elif sampler == "2s":
            x = typed_2s(smooth, name, x, t, s)
        elif sampler == "2m":
            x = typed_2m(name, x, x0, t, s, x0_before, times[i - 1] if i else None)
        if sampler in ("em, corrector", "ddpm, corrector"):
            x = typed_corrector(name, x, smooth(x, s), s, 0.16, draw())
        x0_before = x0
        states.append(x)
    return states


@inside
def test_sampler_is_its_step_repeated(sampler, name, generator):
    """Every state of a sampler is the typed formula applied to the one before, on every path, over inner times."""
    times = inner(name)
    x = known(name, times[0])[1] * normals(3, 2, generator=generator)
    states = list(SAMPLERS[sampler](smooth, path_of(name), x, times, generator=seeded(5)))
    scale = max(1.0, known(name, times[0])[1])
    assert len(states) == len(times) - 1
    for state, expected in zip(states, stepped(sampler, name, x, times, 5), strict=True):
        close(state / scale, expected / scale)


@all_paths
def test_sampler_is_its_step_function(name, generator):
    """From end to end, zero signal and t = 0 included, samplers and step functions agree."""
    path, times = path_of(name), grid_of(name)
    x = start = known(name, times[0])[1] * normals(3, 2, generator=generator)
    scale = max(1.0, known(name, times[0])[1])
    for i, state in enumerate(ddim(smooth, path, start, times)):
        x = ddim_step(path, x, smooth(x, times[i]), times[i], times[i + 1])
        close(state / scale, x / scale)
    x = start
    for i, state in enumerate(heun(smooth, path, start, times)):
        x = heun_step(smooth, path, x, times[i], times[i + 1])
        close(state / scale, x / scale)
    x = start
    for i, state in enumerate(dpm_solver_pp_2s(smooth, path, start, times)):
        x = dpm_solver_pp_2s_step(smooth, path, x, times[i], times[i + 1])
        close(state / scale, x / scale)
    x, before = start, (None, None)
    for i, state in enumerate(dpm_solver_pp_2m(smooth, path, start, times)):
        x0 = smooth(x, times[i])
        x, before = dpm_solver_pp_2m_step(path, x, x0, times[i], times[i + 1], *before), (x0, times[i])
        close(state / scale, x / scale)


def test_callable_variance(generator):
    """A variance function gets (x_t, x̂_0, t, s); it may give a number, one value for each sample, or one for each entry."""
    seen, x = [], normals(2, 2, generator=generator)
    each = torch.tensor([0.04, 0.25], dtype=torch.float64)
    full = torch.tensor([[0.01, 0.04], [0.09, 0.16]], dtype=torch.float64)
    for value, std in (
        (0.04, 0.2),
        (each, each.sqrt()[:, None]),
        (full, full.sqrt()),
        (each[:, None], each.sqrt()[:, None]),
    ):

        def variance(xt, x0, t, s, value=value):
            seen.append((xt, x0, t, s))
            return value

        out = last(ddpm(smooth, Cosine(), x, [0.7, 0.4], variance=variance, generator=seeded(1)))
        mean = ddpm_step(Cosine(), x, smooth(x, 0.7), 0.7, 0.4)
        close(out - mean, std * normals(2, 2, generator=seeded(1)), 1e-12)
        xt, x0, t, s = seen[-1]
        assert torch.equal(xt, x) and torch.equal(x0, smooth(x, 0.7)) and (t, s) == (0.7, 0.4)


# Exact laws -----------------------------------------------------------------------------------------------------------


def gaussian_denoiser(name, var):
    """E[x_0 | x_t] and Var[x_0 | x_t] for data N(0, var), by the normal equations."""

    def mean(xt, t):
        alpha, sigma = known(name, t)
        return alpha * var / (alpha**2 * var + sigma**2) * xt

    def spread(t):
        alpha, sigma = known(name, t)
        return var * sigma**2 / (alpha**2 * var + sigma**2)

    return mean, spread


@pytest.mark.parametrize("name", ["VP", "Cosine", "Sigmoid", "chain"])
def test_ddim_on_a_gaussian(name, generator):
    """Data N(0, 1) on the circle: every step turns by an angle, x_s = cos(θ_t − θ_s)·x_t, and so does a run."""
    times = grid_of(name, [1.0, 0.8, 0.5, 0.45, 0.1, 0.0])
    x = normals(5, 1, generator=generator)
    angle = [math.atan2(*reversed(known(name, t))) for t in times]
    factor = math.prod(math.cos(a - b) for a, b in zip(angle[:-1], angle[1:], strict=True))
    close(last(ddim(gaussian_denoiser(name, 1.0)[0], path_of(name), x, times)), factor * x)


def test_ddim_shrinks_a_gaussian():
    """So DDIM is not exact: N(0, 1) leaves DDPM's linear chain after 10 steps with standard deviation 0.829."""
    betas = linear_betas(1000)
    path, abar = DiscretePath(betas), np.cumprod(np.append(1.0, 1 - betas.numpy()))
    x = last(
        ddim(lambda xt, t: math.sqrt(abar[int(t)]) * xt, path, torch.ones(1, 1, dtype=torch.float64), path.times(10))
    )
    assert x.item() == pytest.approx(0.829, abs=5e-4)


@pytest.mark.parametrize("name", ["VP", "Cosine", "Straight", "VE"])
@pytest.mark.parametrize("sampler", ["ddim", "heun", "2m", "2s"])
def test_solvers_tend_to_the_exact_map(name, sampler):
    """For data N(0, 1/4) the flow maps x_t to x_s·√(Var_s/Var_t); the solvers come close with many steps."""
    times = np.linspace(0.9, 0.1, 301)
    x = torch.linspace(-1, 1, 5, dtype=torch.float64)[:, None]
    std = [math.sqrt(known(name, t)[0] ** 2 / 4 + known(name, t)[1] ** 2) for t in (0.9, 0.1)]
    out = last(SAMPLERS[sampler](gaussian_denoiser(name, 0.25)[0], path_of(name), x, times))
    close(out, x * std[1] / std[0], 0.02 * std[1] / std[0] if sampler == "ddim" else 2e-3 * std[1] / std[0])


def variance_after(betas, variance, data, stop):
    """Variance at `stop` when ancestral sampling starts with the exact variance at T and the ideal denoiser of N(0, data).

    The state stays Gaussian, so one number is carried; each step's factor and noise are read off the sampler.
    """
    path = DiscretePath(betas)
    abar = np.cumprod(np.append(1.0, 1 - np.asarray(betas)))
    var = abar[-1] * data + 1 - abar[-1]

    def denoiser(xt, t):
        now = abar[int(t)]
        return math.sqrt(now) * data / (now * data + 1 - now) * xt

    noise = torch.randn(1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for t in range(len(betas), stop, -1):

        def go(x, t=t):
            g = seeded(0)
            x = torch.full((1, 1), x, dtype=torch.float64)
            return last(ddpm(denoiser, path, x, [t, t - 1], variance=variance, generator=g)).item()

        std = go(0.0) / noise.item()
        factor = go(1.0) - go(0.0)
        var = factor**2 * var + std**2
    return var


def test_ancestral_sampling_is_not_exact():
    """Data N(0, 1/4), T = 50: β̃ ends with .1966 and β with .266, though the denoiser is ideal."""
    betas = np.linspace(2e-3, 0.4, 50)  # DDPM's schedule for T = 50
    assert variance_after(betas, "posterior", 0.25, 0) == pytest.approx(0.1966, abs=1e-4)
    assert variance_after(betas, "beta", 0.25, 0) == pytest.approx(0.2662, abs=1e-4)


def test_ancestral_sampling_with_the_right_variance_is_exact():
    """Adding coef²·Var[x_0 | x_t] to β̃ gives every marginal exactly, down to t = 1; then x̂_0 lacks Var[x_0 | x_1] only."""
    betas = np.linspace(2e-3, 0.4, 50)
    abar = np.cumprod(np.append(1.0, 1 - betas))

    def spread(t):
        return 0.25 * (1 - abar[t]) / (abar[t] * 0.25 + 1 - abar[t])

    def variance(xt, x0, t, s):
        t, s = int(t), int(s)
        beta = betas[t - 1]
        coef = math.sqrt(abar[s]) * beta / (1 - abar[t])
        return beta * (1 - abar[s]) / (1 - abar[t]) + coef**2 * spread(t)

    for stop in (40, 10, 1):
        assert variance_after(betas, variance, 0.25, stop) == pytest.approx(abar[stop] / 4 + 1 - abar[stop], rel=1e-10)
    assert variance_after(betas, variance, 0.25, 0) + spread(1) == pytest.approx(0.25, rel=1e-10)


# Orders ---------------------------------------------------------------------------------------------------------------

ORDERS = {"ddim": (ddim, 1), "heun": (heun, 2), "2m": (dpm_solver_pp_2m, 2), "2s": (dpm_solver_pp_2s, 2)}


@pytest.mark.parametrize("solver", ORDERS)
@pytest.mark.parametrize("name", ["VP", "Cosine", "Straight"])
def test_order(solver, name):
    """The error on a three-mode mixture falls as h^p over two halvings of the step in λ, |slope − p| < 0.15."""
    sampler, order = ORDERS[solver]
    slopes = order_of(lambda d, path, x, times: last(sampler(d, path, x, times)), name)
    for slope in slopes:
        assert abs(slope - order) < 0.15, slopes


@pytest.mark.parametrize("ratio", [3.0, 1 / 3, 1.0])
def test_2m_extrapolates_exactly(ratio, generator):
    """If x̂_0 is affine in λ, the step uses its value at the middle λ, also where the two steps differ in length.

    An order test cannot see this: with the ratio of the steps inverted the slope is still 2.
    """
    lam = [-1.0, -0.6, -0.6 + 0.4 * ratio]
    times = [2 / math.pi * math.atan(math.exp(-value)) for value in lam]
    xt = normals(3, 2, generator=generator)

    def x0_at(value):
        return (0.3 + 1.7 * value) * torch.ones_like(xt)

    expected = typed_2m("Cosine", xt, x0_at((lam[1] + lam[2]) / 2), times[1], times[2])
    step = dpm_solver_pp_2m_step(Cosine(), xt, x0_at(lam[1]), times[1], times[2], x0_at(lam[0]), times[0])
    close(step, expected)
    states = list(dpm_solver_pp_2m(lambda x, t: x0_at(math.log(1 / math.tan(math.pi * t / 2))), Cosine(), xt, times))
    close(states[1], typed_2m("Cosine", states[0], x0_at((lam[1] + lam[2]) / 2), times[1], times[2]))


# Back to the noise ----------------------------------------------------------------------------------------------------


def typed_inversion(name, x, x0, s, t):
    """The step from s up to t: x̂_0 and ε̂ at s, put together again at t."""
    (alpha_s, sigma_s), (alpha_t, sigma_t) = known(name, s), known(name, t)
    return alpha_t * x0 + sigma_t * (x - alpha_s * x0) / sigma_s


@all_paths
def test_ddim_inversion_by_hand(name, generator):
    """Every state is the typed formula applied to the one before, up to pure noise; the denoiser is asked where a step starts."""
    times, seen = grid_of(name, [0.05, 0.3, 0.5, 0.55, 0.9, 1.0]), []
    x = start = normals(3, 2, generator=generator)

    def denoiser(xt, t):
        assert isinstance(t, float)
        seen.append(t)
        return smooth(xt, t)

    states = list(ddim_inversion(denoiser, path_of(name), x, times))
    before, scale = x.clone(), max(1.0, known(name, times[-1])[1])
    for state, s, t in zip(states, times, times[1:], strict=False):
        x = typed_inversion(name, x, smooth(x, s), s, t)
        close(state / scale, x / scale)
    assert seen == times[:-1] and len(states) == 5 and torch.equal(start, before)
    assert len({tensor.data_ptr() for tensor in (start, *states)}) == 6


@all_paths
def test_ddim_and_back_for_one_point(name, generator):
    """If x̂_0 is the same everywhere, up and down again changes nothing at all, over any steps."""
    x0, x = normals(3, 2, generator=generator), normals(3, 2, generator=generator)
    up = grid_of(name, [0.1, 0.5, 0.95])
    there = last(ddim_inversion(lambda xt, t: x0, path_of(name), x, up))
    (alpha, sigma), (alpha_t, sigma_t) = known(name, up[0]), known(name, up[-1])
    close((there - alpha_t * x0) / sigma_t, (x - alpha * x0) / sigma)
    close(last(ddim(lambda xt, t: x0, path_of(name), there, up[::-1])), x)


@pytest.mark.parametrize("name", ["VP", "Cosine", "Sigmoid", "chain"])
def test_ddim_inversion_on_a_gaussian(name, generator):
    """Data N(0, 1) on the circle: each step up turns by an angle too, so up and down together shrink by its cosine squared."""
    times = grid_of(name, [0.1, 0.2, 0.45, 0.8, 1.0])
    x = normals(5, 1, generator=generator)
    angle = [math.atan2(*reversed(known(name, t))) for t in times]
    factor = math.prod(math.cos(a - b) for a, b in zip(angle[:-1], angle[1:], strict=True))
    d = gaussian_denoiser(name, 1.0)[0]
    there = last(ddim_inversion(d, path_of(name), x, times))
    close(there, factor * x)
    close(last(ddim(d, path_of(name), there, times[::-1])), factor**2 * x)


@pytest.mark.parametrize("name", ["VP", "Cosine", "Straight"])
def test_order_of_ddim_inversion(name):
    """Up to the noise the error is of order 1 against the exact flow; up and down again it is too: the two do not cancel."""
    path, d = path_of(name), mixture_denoiser(path_of(name))
    noise = np.linspace(-1.8, 1.8, 13) * math.hypot(1, math.exp(-LAMBDA_START))
    data, up, both = exact_flow(noise), [], []
    for count in (40, 80, 160):
        times = time_of_lambda(name, torch.linspace(LAMBDA_END, LAMBDA_START, count + 1, dtype=torch.float64))
        (alpha, _), (alpha_t, _) = known(name, times[0].item()), known(name, times[-1].item())
        x = alpha * torch.from_numpy(data)[:, None]
        there = last(ddim_inversion(d, path, x, times))
        up.append(np.abs(there[:, 0].numpy() / alpha_t - noise).mean())
        both.append((last(ddim(d, path, there, times.flip(0))) - x).abs().mean().item())
    for errors in (up, both):
        slopes = [math.log2(errors[i] / errors[i + 1]) for i in (0, 1)]
        assert all(abs(slope - 1) < 0.15 for slope in slopes), slopes


def test_ddim_inversion_checks_its_arguments():
    """At the call, before any step; what does not fit is named. A state that is not finite raises at its step."""
    x, path, chain = torch.ones(2, 3), Cosine(), DiscretePath([0.1] * 4)

    def never(xt, t):
        raise AssertionError("the denoiser was called")

    def run(times, path=path, x=x):
        return lambda: ddim_inversion(never, path, x, times)

    cases = [
        (ValueError, r"^times must be strictly ascending, shape \(N \+ 1,\).*got \[0.9, 0.5\]", run([0.9, 0.5])),
        (ValueError, "^times must be strictly ascending", run([0.1, 0.5, 0.5])),
        (ValueError, "^times must be strictly ascending", run([0.1])),
        (ValueError, "^times must be strictly ascending", run(0.5)),
        (ValueError, "^times must be strictly ascending", run([[0.1, 0.5]])),
        (ValueError, "^times must be strictly ascending", run([0.1, math.nan])),
        (ValueError, "^times must start where σ > 0; got 0 as the first", run([0.0, 0.5])),
        (ValueError, "^times must start where σ > 0; got 0 as the first", run([0, 2], path=chain)),
        (ValueError, r"^times must lie in \[0, 1\]", run([0.5, 1.1])),
        (ValueError, r"^times must lie in \[0, 1\]", run([-0.1, 0.5])),
        (ValueError, "^times must be a whole number", run([1, 1.5, 4], path=chain)),
        (TypeError, "^x must be a floating-point tensor", run([0.1, 0.5], x=x.long())),
        (TypeError, "^path must be a GaussianPath; got str", run([0.1, 0.5], path="cosine")),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()
    states = ddim_inversion(lambda xt, t: xt / (t != 0.4), path, x, [0.2, 0.4, 0.7])
    assert next(states).isfinite().all()
    with pytest.raises(FloatingPointError, match="^the state is not finite after step 2 of 2, from t = 0.4 to 0.7"):
        next(states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ddim_inversion_of_images(dtype, generator):
    """Images keep type and shape, no gradient flows, and the times may come as a list, an array or whole numbers."""
    x, chain = torch.rand(2, 1, 4, 4, generator=generator, dtype=dtype), DiscretePath(linear_betas(50))
    runs = [last(ddim_inversion(smooth, chain, x.requires_grad_(), times))
            for times in ([2, 20, 50], (2.0, 20.0, 50.0), torch.tensor([2, 20, 50]), np.array([2, 20, 50]))]  # fmt: skip
    for run in runs:
        assert torch.equal(run, runs[0]) and run.dtype == dtype and run.shape == x.shape and not run.requires_grad
    assert torch.is_grad_enabled()


# Grids ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONTINUOUS)
@pytest.mark.parametrize("steps, start, end", [(2, 0.9, 0.1), (3, 0.99, 1e-3), (20, 0.95, 0.02)])
def test_logsnr_times(name, steps, start, end):
    """From start to end the closed form's log-SNR rises in equal steps, to 1e-8; then one to 0. Both ends are met exactly."""
    times = logsnr_times(path_of(name), steps, start, end)
    assert times.shape == (steps + 1,) and times.dtype == torch.float64
    assert times[0] == start and times[-2] == end and times[-1] == 0 and bool((times.diff() < 0).all())
    logsnr = np.array([2 * half_logsnr(name, t) for t in times[:-1].tolist()])
    expected = np.linspace(2 * half_logsnr(name, start), 2 * half_logsnr(name, end), steps)
    assert np.abs(logsnr - expected).max() < 1e-8
    out = last(ddim(smooth, path_of(name), torch.ones(1, 1, dtype=torch.float64), times))
    assert bool(out.isfinite().all())


def test_logsnr_times_solved_by_hand():
    """On the cosine path t = 2/π·atan e^(−λ)."""
    times = logsnr_times(Cosine(), 5, start=0.98, end=0.04)
    lam = np.linspace(-math.log(math.tan(0.49 * math.pi)), -math.log(math.tan(0.02 * math.pi)), 5)
    close(times, [*(2 / math.pi * np.arctan(np.exp(-lam))), 0.0], 1e-12)


def test_logsnr_times_checks_its_arguments():
    """What does not fit is named; a chain has no time for each log-SNR."""
    cases = [
        *[("^steps must be a whole number of at least 2; got", Cosine(), steps, 0.9, 0.1) for steps in (1, 0, -3, 2.0)],
        *[("^start and end must satisfy 0 < end < start", Cosine(), 5, *ends)
          for ends in ((0.1, 0.9), (0.5, 0.5), (0.5, 0.0), (0.5, -0.1), (math.nan, 0.1))],
        ("^start and end must be times with a finite log-SNR; got 1.0 and 0.1", Straight(), 5, 1.0, 0.1),
        (r"^t must lie in \[0, 1\]", Cosine(), 5, 1.2, 0.1),
        ("has whole times only", DiscretePath(linear_betas(50)), 5, 50, 1),
    ]  # fmt: skip
    for message, *arguments in cases:
        with pytest.raises(ValueError, match=message):
            logsnr_times(*arguments)
    assert logsnr_times(VP(), 4, 1.0, 0.001)[0] == 1  # a path on which some signal is left to the end


# What every sampler promises ------------------------------------------------------------------------------------------


@end_to_end
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_states(sampler, name, dtype, generator):
    """N states, all finite from the noise's end on, of x's type and shape, each in its own memory; x is left alone."""
    path, times = path_of(name), grid_of(name)
    x = known(name, times[0])[1] * normals(3, 1, 2, 2, generator=generator, dtype=dtype)
    before = x.clone()
    states = list(SAMPLERS[sampler](smooth, path, x, times, generator=generator))
    assert len(states) == len(times) - 1
    for state in states:
        assert state.dtype == dtype and state.shape == x.shape and bool(state.isfinite().all())
    assert len({tensor.data_ptr() for tensor in (x, *states)}) == len(times)
    assert torch.equal(x, before)


@pytest.mark.parametrize("sampler, name", [pair for pair in FROM_END_TO_END if pair[0] != "corrector, em"])
def test_last_state_is_the_denoised_one(sampler, name, generator):
    """At t = 0 the state is α(0)·x̂_0 of the state before, with no noise on it."""
    path, times, alpha = path_of(name), grid_of(name), known(name, 0)[0]
    x = known(name, times[0])[1] * normals(3, 2, generator=generator)
    states = list(SAMPLERS[sampler](smooth, path, x, times, generator=generator))
    close(states[-1], alpha * smooth(states[-2], times[-2]), 1e-12)
    one = last(SAMPLERS[sampler](smooth, path, x, [times[0], 0], generator=generator))
    close(one, alpha * smooth(x, times[0]), 1e-12)


@all_samplers
def test_grid_may_end_before_the_data(sampler, generator):
    """A grid that stops at t > 0 is the start of the one that goes on, up to 2M's last step."""
    x, run, path = normals(3, 2, generator=generator), SAMPLERS[sampler], home(sampler)
    to_the_data = run(smooth, path, x, [1.0, 0.6, 0.2, 0.0], generator=seeded(2))
    for short in run(smooth, path, x, [1.0, 0.6, 0.2], generator=seeded(2)):
        long = next(to_the_data)
        assert torch.equal(short, long)


@all_samplers
def test_a_perfect_denoiser_is_obeyed(sampler, generator):
    """A denoiser that always says the same x_0 ends there, on both a path and a chain whose last β is 1."""
    x0 = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(3, 2)
    anywhere = Cosine(), Straight(), VP(), DiscretePath(cosine_betas(50, clip=1.0))
    for path in (VP(), SubVP(), VE()) if sampler in OF_THE_SDE else anywhere:
        out = last(SAMPLERS[sampler](lambda xt, t: x0, path, normals(3, 2, generator=generator), path.times(8)))
        close(out, x0, 1e-12)
        assert out.data_ptr() != x0.data_ptr()


@pytest.mark.parametrize("sampler", ["ddim", "heun", "2m", "2s"])
def test_the_noise_follows_a_clipped_x0(sampler, generator):
    """After a step with a clipped x̂_0 the state lies on the path through it: ε̂ is worked out again from what was clipped."""
    x = 3 * normals(3, 2, generator=generator)
    d = clipped(lambda xt, t: 5 * xt)
    t, s = 0.6, 0.5
    state = last(SAMPLERS[sampler](d, Cosine(), x, [t, s]))
    x0, (alpha_t, sigma_t), (alpha_s, sigma_s) = d(x, t), known("Cosine", t), known("Cosine", s)
    if sampler == "2s":
        u = middle("Cosine", t, s)
        assert torch.equal(d(typed_ddim("Cosine", x, x0, t, u), u), x0)
    if sampler == "heun":
        ahead = alpha_s * x0 + sigma_s * (x - alpha_t * x0) / sigma_t
        assert torch.equal(d(ahead, s), x0)  # the same corner, so the second slope is the first
    close((state - alpha_s * x0) / sigma_s, (x - alpha_t * x0) / sigma_t)


@pytest.mark.parametrize("sampler", RANDOM)
def test_random_numbers(sampler, generator):
    """Noise comes from the generator alone: one seed one result, another seed another, and the global state untouched."""
    x, times = normals(3, 2, generator=generator), [1.0, 0.5, 0.2]

    def run(seed):
        return last(SAMPLERS[sampler](smooth, home(sampler), x, times, generator=seeded(seed)))

    before = torch.random.get_rng_state()
    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(3)
    without = last(SAMPLERS[sampler](smooth, home(sampler), x, times))
    torch.random.set_rng_state(before)
    assert torch.equal(without, run(3))


@pytest.mark.parametrize("sampler", sorted(set(SAMPLERS) - set(RANDOM)))
def test_deterministic(sampler, generator):
    """Without noise nothing random is touched: two runs are equal and the global state stays."""
    x = normals(3, 2, generator=generator)
    before = torch.random.get_rng_state()
    assert torch.equal(*(last(SAMPLERS[sampler](smooth, Cosine(), x, GRID)) for _ in "ab"))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("sampler", RANDOM)
def test_noise_is_normal(sampler):
    """What a step adds has mean 0 and the fourth moment of a normal, not of a uniform: 200,000 draws, 5 standard errors."""
    zero = torch.zeros(200_000, 1, dtype=torch.float64)
    g = torch.Generator().manual_seed(11)
    out = last(SAMPLERS[sampler](lambda xt, t: torch.zeros_like(xt), Cosine(), zero, [0.7, 0.5], generator=g))[
        :, 0
    ].numpy()
    out = out / out.std()
    assert abs(out.mean()) < 5 / math.sqrt(len(out))
    assert abs((out**4).mean() - 3) < 5 * math.sqrt(96 / len(out))


@all_samplers
def test_samples_do_not_meet(sampler, generator):
    """A sample's run does not depend on its batch mates."""
    x, other = normals(3, 2, generator=generator), normals(3, 2, generator=generator)
    other[1] = x[1]
    runs = [SAMPLERS[sampler](smooth, home(sampler), start, GRID, generator=seeded(4)) for start in (x, other)]
    for one, two in zip(*runs, strict=True):
        assert torch.equal(one[1], two[1]) and not torch.equal(one[0], two[0])


@all_samplers
def test_gradients(sampler):
    """No gradient flows unless asked for: off inside the denoiser, on where it turns them on, and restored in between."""
    seen, x = [], torch.ones(2, 2, requires_grad=True)

    def denoiser(xt, t):
        seen.append(torch.is_grad_enabled())
        with torch.enable_grad():
            xt = xt.detach().requires_grad_()
            return torch.autograd.grad((0.5 * xt**2).sum(), xt)[0]

    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            states = SAMPLERS[sampler](denoiser, home(sampler), x, GRID)
            for state in states:
                assert torch.is_grad_enabled() is grad
                assert not state.requires_grad
            assert torch.is_grad_enabled() is grad
    assert seen and not any(seen)


@all_samplers
def test_a_run_left_early_leaves_no_trace(sampler):
    """Stopping after the first state leaves gradients as they were."""
    states = SAMPLERS[sampler](smooth, home(sampler), torch.ones(2, 2), GRID)
    next(states)
    assert torch.is_grad_enabled()
    states.close()
    assert torch.is_grad_enabled()


@all_samplers
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_state_that_is_not_finite(sampler, bad):
    """One bad value in one sample raises at the step where it came, which the message names."""

    def denoiser(xt, t):
        x0 = smooth(xt, t)
        if t == 0.45:
            x0[1, 1] = bad
        return x0

    states = SAMPLERS[sampler](denoiser, home(sampler), torch.ones(2, 3), GRID)
    ahead = sampler in ("heun", "em, corrector", "ddpm, corrector")  # they ask at 0.45 in the step that ends there
    step = 3 if ahead else 4
    for _ in range(step - 1):
        assert bool(next(states).isfinite().all())
    message = rf"^the state is not finite after step {step} of 5, from t = {GRID[step - 1]:g} to {GRID[step]:g}"
    with pytest.raises(FloatingPointError, match=message):
        next(states)


@all_samplers
def test_arguments_are_checked_at_the_call(sampler):
    """What does not fit raises when the sampler is called, before any step, and is named."""
    run, x, path = SAMPLERS[sampler], torch.ones(2, 3), Cosine()

    def never(xt, t):
        raise AssertionError("the denoiser was called")

    cases = [
        (ValueError, "^times must be strictly descending", lambda: run(never, path, x, [0.5, 0.5])),
        (ValueError, "^times must be strictly descending", lambda: run(never, path, x, [0.0, 0.5, 1.0])),
        (ValueError, "^times must be strictly descending", lambda: run(never, path, x, [1.0, 0.2, 0.3, 0.0])),
        (ValueError, "^times must be strictly descending", lambda: run(never, path, x, [1.0])),
        (ValueError, "^times must be strictly descending", lambda: run(never, path, x, 0.5)),
        (ValueError, "^times must be a number or a tensor of shape", lambda: run(never, path, x, [[1.0, 0.0]])),
        (ValueError, r"^times must lie in \[0, 1\]", lambda: run(never, path, x, [1.1, 0.0])),
        (ValueError, r"^times must lie in \[0, 1\]", lambda: run(never, path, x, [1.0, -0.1])),
        (ValueError, r"^times must lie in \[0, 1\]", lambda: run(never, path, x, [1.0, math.nan])),
        (ValueError, "^times must be a whole number", lambda: run(never, DiscretePath([0.1] * 4), x, [4, 1.5, 0])),
        (ValueError, "^times must be a whole number", lambda: run(never, DiscretePath([0.1] * 4), x, [5, 0])),
        (TypeError, "^x must be a floating-point tensor", lambda: run(never, path, x.long(), [1.0, 0.0])),
        (TypeError, "^x must be a floating-point tensor", lambda: run(never, path, 1.0, [1.0, 0.0])),
        (TypeError, "^path must be a GaussianPath; got str", lambda: run(never, "cosine", x, [1.0, 0.0])),
    ]  # fmt: skip
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()


def test_options_are_checked_at_the_call():
    """Options of single samplers and the arguments of step functions, likewise."""
    x, path = torch.ones(2, 3), Cosine()
    cases = [
        (ValueError, "^variance must be 'beta', 'posterior' or", lambda: ddpm(smooth, path, x, GRID, variance="large")),
        (ValueError, r"^eta must lie in \[0, 1\]; got 1.5", lambda: ddim(smooth, path, x, GRID, eta=1.5)),
        (ValueError, r"^eta must lie in \[0, 1\]; got -0.1", lambda: ddim(smooth, path, x, GRID, eta=-0.1)),
        (ValueError, "^noise must be given for eta = 0.5", lambda: ddim_step(path, x, x, 0.5, 0.4, 0.5)),
        (ValueError, "^noise must have the shape of xt", lambda: ddim_step(path, x, x, 0.5, 0.4, 0.5, x[:1])),
        (ValueError, "^variance must be", lambda: ddpm_step(path, x, x, 0.5, 0.4, variance="large")),
        (ValueError, "^x0 must have the shape of xt", lambda: ddpm_step(path, x, x[:1], 0.5, 0.4)),
        (ValueError, "^x0_before must have the shape of xt",
         lambda: dpm_solver_pp_2m_step(path, x, x, 0.5, 0.4, x[:1], 0.6)),
        (ValueError, "^x0_before and t_before must be given together", lambda: dpm_solver_pp_2m_step(path, x, x, 0.5, 0.4, x)),
        (ValueError, "^x0_before and t_before must be given together",
         lambda: dpm_solver_pp_2m_step(path, x, x, 0.5, 0.4, t_before=0.6)),
    ]  # fmt: skip
    half = {"variance": torch.full((2, 3), 0.5)}
    cases += [
        *[(ValueError, r"^variance must be 'beta', 'posterior' or a number in \[0, 1\]; got",
           lambda bad=bad: ddpm(smooth, path, x, GRID, variance=bad)) for bad in (1.01, -0.1, math.nan, True, None)],
        (ValueError, "^variance must be", lambda: ddpm_step(path, x, x, 0.5, 0.4, variance=2)),
        (ValueError, r"^variance must have the shape of xt, \(2, 3\); got \(2, 1\)",
         lambda: ddpm_step(path, x, x, 0.5, 0.4, variance=x[:, :1], noise=x)),
        (TypeError, "^variance must be a floating-point tensor",
         lambda: ddpm_step(path, x, x, 0.5, 0.4, variance=x.long(), noise=x)),
        (ValueError, "^noise must have the shape of xt", lambda: ddpm_step(path, x, x, 0.5, 0.4, **half, noise=x[:1])),
        (ValueError, "^x0 must have the shape of xt", lambda: ddpm_step(path, x, x[:1], 0.5, 0.4, **half, noise=x)),
        (ValueError, "^s must be less than t", lambda: ddpm_step(path, x, x, 0.5, 0.5, **half, noise=x)),
        (ValueError, "^s must be less than t", lambda: dpm_solver_pp_2s_step(smooth, path, x, 0.5, 0.5)),
        (ValueError, "^s must be less than t", lambda: dpm_solver_pp_2s_step(smooth, path, x, 0.4, 0.5)),
        (ValueError, r"^t must lie in \[0, 1\]", lambda: dpm_solver_pp_2s_step(smooth, path, x, 1.4, 0.5)),
    ]  # fmt: skip
    for step in (ddim_step, ddpm_step, dpm_solver_pp_2m_step):
        cases += [(ValueError, "^s must be less than t", lambda step=step: step(path, x, x, 0.4, 0.5))]
    cases += [(ValueError, "^s must be less than t", lambda: heun_step(smooth, path, x, 0.5, 0.5))]
    cases += [(ValueError, "must be less than", lambda: dpm_solver_pp_2m_step(path, x, x, 0.5, 0.4, x, 0.45))]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()


ONCE = GRID[:-1]
CALLS = {
    "ddim": ONCE,
    "2m": ONCE,
    **{sampler: ONCE for sampler in OF_DDPM},
    "heun": [1.0, 0.8, 0.5, 0.5, 0.45, 0.45, 0.1, 0.1],
    "2s": [
        1.0,
        0.8,
        middle("Cosine", 0.8, 0.5),
        0.5,
        middle("Cosine", 0.5, 0.45),
        0.45,
        middle("Cosine", 0.45, 0.1),
        0.1,
    ],
}


@pytest.mark.parametrize("sampler", CALLS)
def test_evaluations(sampler):
    """One evaluation a step, Heun and 2S two, but one where a step starts without signal or ends at the data; t is a float."""
    seen = []

    def denoiser(xt, t):
        assert isinstance(t, float)
        seen.append(t)
        return smooth(xt, t)

    last(SAMPLERS[sampler](denoiser, Cosine(), torch.ones(1, 1), GRID))
    assert seen == pytest.approx(CALLS[sampler], abs=1e-12)


def test_times_in_any_form(generator):
    """A list, a tuple, float32, float64 and whole-number tensors of times give the same run."""
    x, path = normals(2, 2, generator=generator), DiscretePath(linear_betas(50))
    runs = [last(ddim(smooth, path, x, t)) for t in ([50, 20, 0], (50.0, 20.0, 0.0), torch.tensor([50, 20, 0]),
                                                      torch.tensor([50.0, 20.0, 0.0]), np.array([50, 20, 0]))]  # fmt: skip
    for run in runs[1:]:
        assert torch.equal(run, runs[0])


def test_two_runs_on_one_path_do_not_disturb_each_other(generator):
    """Announcing a grid to the path is no state that a second run could spoil: states interleave."""
    path, x = Cosine(), normals(2, 2, generator=generator)
    alone = [list(ddim(smooth, path, x, grid)) for grid in (GRID, [0.9, 0.6, 0.3, 0.2, 0.05, 0.0])]
    both = zip(ddim(smooth, path, x, GRID), ddim(smooth, path, x, [0.9, 0.6, 0.3, 0.2, 0.05, 0.0]), strict=True)
    for i, pair in enumerate(both):
        assert torch.equal(pair[0], alone[0][i]) and torch.equal(pair[1], alone[1][i])


@pytest.mark.parametrize("sampler", [*sorted(set(SAMPLERS) - set(RANDOM)), "ddpm callable"])
def test_float32_follows_float64(sampler, generator):
    """A float32 run stays within rounding of the float64 run from the same noise."""
    x, run = normals(3, 2, generator=generator), SAMPLERS[sampler]
    if sampler == "ddpm callable":  # float32 and float64 draw different noise: compare without
        run = partial(ddpm, variance=lambda *_: 0.0)
    for low, high in zip(run(smooth, Cosine(), x.float(), GRID), run(smooth, Cosine(), x, GRID), strict=True):
        torch.testing.assert_close(low.double(), high, rtol=2e-6, atol=2e-6)


def test_last():
    """`last` keeps the final state only."""
    assert last(iter([1, 2, 3])) == 3


def test_every_path_has_an_oracle():
    """A path that is added to the package belongs into the tests' list of closed forms."""
    from dgm_course import paths

    classes = {getattr(paths, name) for name in paths.__all__} - {paths.GaussianPath}
    assert classes == {type(path) for path, _ in PATHS.values()}
    assert set(CONTINUOUS) < set(PATHS)
