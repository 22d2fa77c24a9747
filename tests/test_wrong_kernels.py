"""Bugs that public code really had, written again in a few lines: what accepts our kernels must reject each of them.

A case is one oracle with the kernels that it must accept and those that it must reject. An oracle takes a kernel and
asserts; it holds no expected value from the package. Beside ours, most cases also accept a correct kernel typed in the
same style as the wrong ones, so that a wrong one is turned down for its one mistake and not for how it is written.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import scipy.integrate
import torch
from oracles import CHAIN_BETAS, bayes_on_a_grid, known, mp, order_of, typed_attention
from scipy.stats import norm
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from dgm_course import gan, peft, vae
from dgm_course.denoisers import Denoiser, clipped
from dgm_course.distillation import consistency_target, progressive_target, truncated_snr
from dgm_course.divergences import gaussian_kl, jensen_shannon, standard_kl
from dgm_course.guidance import classifier, classifier_free
from dgm_course.likelihood import bits_per_dim, bound, prior_term
from dgm_course.losses import bound_term, hybrid, simple
from dgm_course.metrics import frechet_distance, inception_score, precision_recall
from dgm_course.nets import perceptron
from dgm_course.nets.embeddings import sinusoids
from dgm_course.nets.language import CausalAttention
from dgm_course.paths import VP, Cosine, DiscretePath, SubVP
from dgm_course.samplers import (
    ddim,
    ddim_inversion,
    ddim_step,
    ddpm,
    ddpm_step,
    dpm_solver_pp_2m,
    dpm_solver_pp_2m_step,
    dpm_solver_pp_2s,
    euler_maruyama_step,
    forward_euler_maruyama,
    heun,
    langevin,
    langevin_step,
    last,
    overshoot_step,
    picard,
    predictor_corrector,
)
from dgm_course.schedules import cosine_betas, linear_betas

BETAS = np.array(CHAIN_BETAS)
ABAR = np.concatenate([[1.0], np.cumprod(1 - BETAS)])  # ABAR[t] is ᾱ_t, ABAR[0] = 1
CHAIN = DiscretePath(CHAIN_BETAS)
T = 20


@dataclass
class Case:
    """An oracle, what it accepts, and what it rejects."""

    oracle: Callable
    right: dict[str, Callable]
    wrong: dict[str, Callable] = field(default_factory=dict)


CASES: dict[str, Case] = {}


def near(actual, expected, tolerance=1e-9):
    """Assert that numbers, arrays or tensors agree; nan and inf agree with nothing."""
    actual, expected = (np.asarray(value, dtype=np.float64) for value in (actual, expected))
    assert np.isfinite(actual).all()
    assert np.abs(actual - expected).max() <= tolerance * max(1.0, np.abs(expected).max())


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


# Which times a sampler visits -----------------------------------------------------------------------------------------
# A kernel takes (T, steps) and gives the pairs (t, s) of its steps, with t = 1 … T and 0 for the data.


def visits_a_chain(pairs_of):
    """The first step starts at T, each next one where the last ended, the last ends at 0, and every step goes down."""
    for length, steps in ((1000, 1000), (1000, 50), (1000, 7), (1000, 999), (1000, 3), (1000, 600), (10, 1)):
        pairs = pairs_of(length, steps)
        assert len(pairs) == steps
        assert pairs[0][0] == length and pairs[-1][1] == 0
        assert all(t > s for t, s in pairs)
        assert all(before[1] == after[0] for before, after in zip(pairs[:-1], pairs[1:], strict=True))


def ours_visits(length, steps):
    times = DiscretePath([0.1] * length).times(steps).tolist()
    return list(zip(times[:-1], times[1:], strict=True))


def typed_visits(length, steps):
    times = [round(length * (steps - k) / steps) for k in range(steps + 1)]
    return list(zip(times[:-1], times[1:], strict=True))


def previous_ignores_spacing(length, steps):
    """The time before is t − T // n although the grid is spaced otherwise."""
    return [(t, max(t - length // steps, 0)) for t, _ in typed_visits(length, steps)]


def below_zero(length, steps):
    """The last index, 0, minus the stride: a negative index into the table."""
    stride = length // steps
    return [(i + 1, i - stride + 1) for i in range((steps - 1) * stride, -1, -stride)]


def leading(length, steps):
    """Spacing from the front: T is never visited, so sampling starts from noise at a time that is not pure noise."""
    times = [k * (length // steps) + 1 for k in range(steps)][::-1] + [0]
    return list(zip(times[:-1], times[1:], strict=True))


def one_too_many(length, steps):
    """Indices up to T of a table that ends at T − 1."""
    table = list(range(1, length + 1))
    times = [table[round(length * (steps - k) / steps)] for k in range(steps)] + [0]
    return list(zip(times[:-1], times[1:], strict=True))


def dummy_step(length, steps):
    """The last noise level is stored twice: the last step goes nowhere."""
    times = [t for t, _ in typed_visits(length, steps - 1)] if steps > 1 else []
    times += [0, 0]
    return list(zip(times[:-1], times[1:], strict=True))


def repeated_times(length, steps):
    """Times spaced by a power and then rounded: near the data they coincide."""
    times = [round(length * ((steps - k) / steps) ** 7) for k in range(steps + 1)]
    return list(zip(times[:-1], times[1:], strict=True))


def stays_above_the_data(length, steps):
    """The final value of ᾱ is the table's first, ᾱ_1: the last step ends at t = 1."""
    return [(t, max(s, 1)) for t, s in typed_visits(length, steps)]


CASES["visited times"] = Case(
    visits_a_chain,
    {"ours": ours_visits, "typed": typed_visits},
    {
        "previous time t − T//n": previous_ignores_spacing,
        "0 → −stride": below_zero,
        "leading spacing": leading,
        "index T": one_too_many,
        "last level repeated": dummy_step,
        "duplicate times": repeated_times,
        "final ᾱ is ᾱ_1": stays_above_the_data,
    },
)


# Tables ---------------------------------------------------------------------------------------------------------------
# A kernel takes betas β_1 … β_T and gives ᾱ_0 … ᾱ_T.


def is_the_table(table_of):
    """ᾱ_0 = 1, and ᾱ_t is the product in 40 digits: relative error below 1e-12 in ᾱ_t and in 1 − ᾱ_t."""
    betas = np.linspace(1e-4, 0.02, 1000)
    table, abar = table_of(betas), mp.mpf(1)
    assert len(table) == 1001 and table[0] == 1
    for t, beta in enumerate(betas, 1):
        abar *= 1 - mp.mpf(float(beta))
        assert abs(table[t] / float(abar) - 1) < 1e-12
        assert abs((1 - table[t]) / float(1 - abar) - 1) < 1e-9


def table_in_float32(betas):
    table = np.concatenate([[1.0], np.cumprod(1 - betas.astype(np.float32), dtype=np.float32)])
    return table.astype(np.float64)


CASES["table of ᾱ"] = Case(
    is_the_table,
    {
        "ours": lambda betas: DiscretePath(betas).alpha_bars.numpy(),
        "typed": lambda betas: np.concatenate([[1.0], np.cumprod(1 - betas)]),
    },
    {
        "starts at ᾱ_1": lambda betas: np.cumprod(1 - betas),
        "starts at ᾱ_1, padded": lambda betas: np.cumprod(np.append(1 - betas[0], 1 - betas)),
        "of √ᾱ": lambda betas: np.concatenate([[1.0], np.cumprod(np.sqrt(1 - betas))]),
        "of β": lambda betas: np.concatenate([[1.0], np.cumprod(betas)]),
        "in float32": table_in_float32,
    },
)


def is_the_cosine_schedule(betas_of):
    """T values of which one is clipped; ᾱ_t ∝ cos² in 40 digits; β̃_t finite for every t ≥ 2."""
    length = 1000
    betas = np.asarray(betas_of(length))
    assert betas.shape == (length,) and (betas > 0).all() and (betas <= 0.999).all()
    assert (betas == 0.999).sum() == 1
    f = [mp.cos((mp.mpf(t) / length + mp.mpf("0.008")) / mp.mpf("1.008") * mp.pi / 2) ** 2 for t in range(length)]
    near(np.cumprod(1 - betas)[:-1], [float(value / f[0]) for value in f[1:]], 1e-10)


def cosine_table(length, offset=0.008):
    t = np.arange(length + 1) / length
    f = np.cos((t + offset) / (1 + offset) * np.pi / 2) ** 2
    return f / f[0]


def typed_cosine(length, offset=0.008, clip=0.999):
    table = cosine_table(length, offset)
    return np.minimum(1 - table[1:] / table[:-1], clip)


CASES["cosine schedule"] = Case(
    is_the_cosine_schedule,
    {
        "ours": lambda length: cosine_betas(length).numpy(),
        "typed": lambda n: typed_cosine(n),
    },
    {
        # a table that begins with ᾱ = 1 where ᾱ_1 belongs: β_1 = 0, all is one step late, and 0/0 in the first posterior
        "table includes ᾱ_0": lambda n: np.append(0.0, typed_cosine(n)[:-1]),
        "without the offset": lambda n: typed_cosine(n, offset=0),
        "without the square": lambda n: np.minimum(1 - np.sqrt(1 - typed_cosine(n, clip=1)), 0.999),
        "without the clip": lambda n: typed_cosine(n, clip=1),
        "β of ᾱ, not of a ratio": lambda n: np.minimum(1 - cosine_table(n)[1:], 0.999),
    },
)


def adds_as_much_noise(betas_of):
    """A linear schedule of any length adds the published one's noise: Σβ = 1000·(1e-4 + 0.02)/2 = 10.05, in even steps."""
    for length in (100, 500, 1000, 4000):
        betas = np.asarray(betas_of(length))
        assert betas.shape == (length,)
        near(betas.sum(), 10.05)
        near(np.diff(betas, 2), 0.0)


CASES["schedule for another T"] = Case(
    adds_as_much_noise,
    {
        "ours": lambda n: linear_betas(n).numpy(),
        "typed": lambda n: 1000 / n * np.linspace(1e-4, 0.02, n),
    },
    {
        "not scaled": lambda n: np.linspace(1e-4, 0.02, n),
        "scaled the other way": lambda n: n / 1000 * np.linspace(1e-4, 0.02, n),
        "only the last scaled": lambda n: np.linspace(1e-4, 0.02 * 1000 / n, n),
    },
)


# The forward chain ----------------------------------------------------------------------------------------------------
# A kernel walks x through all T steps of the chain with the given generator.


def walks_to_the_noise(walk):
    """From x_0 = 2, 40,000 walkers end with mean √ᾱ_T·2, variance 1 − ᾱ_T and no skew, within 5 standard errors."""
    n, g = 40_000, torch.Generator().manual_seed(3)
    x = walk(torch.full((n, 1), 2.0, dtype=torch.float64), g)[:, 0].numpy()
    var = 1 - ABAR[T]
    assert abs(x.mean() - 2 * math.sqrt(ABAR[T])) < 5 * math.sqrt(var / n)
    assert abs(x.var() - var) < 5 * var * math.sqrt(2 / n)


def walker(keep, spread, draw=torch.randn):
    """A walk x ← keep(β)·x + spread(β)·noise."""

    def walk(x, g):
        for beta in CHAIN_BETAS:
            x = keep(beta) * x + spread(beta) * draw(x.shape, generator=g, dtype=x.dtype)
        return x

    return walk


def our_walk(x, g):
    for t in range(1, T + 1):
        keep, var = CHAIN.transition(t - 1, t)
        x = keep * x + var.sqrt() * torch.randn(x.shape, generator=g, dtype=x.dtype)
    return x


def our_jump(x, g):
    return CHAIN.perturb(x, T, torch.randn(x.shape, generator=g, dtype=x.dtype))


def jump(scale, spread, draw=torch.randn):
    return lambda x, g: scale * x + spread * draw(x.shape, generator=g, dtype=x.dtype)


CASES["forward walk"] = Case(
    walks_to_the_noise,
    {"ours": our_walk, "typed": walker(lambda b: math.sqrt(1 - b), math.sqrt), "our jump": our_jump},
    {
        "β for √β": walker(lambda b: math.sqrt(1 - b), lambda b: b),
        "1 − β for √(1 − β)": walker(lambda b: 1 - b, math.sqrt),
        "rand for randn": walker(lambda b: math.sqrt(1 - b), math.sqrt, torch.rand),
        "signal not scaled": walker(lambda b: 1.0, math.sqrt),
        "jump: ᾱ for √ᾱ": jump(ABAR[T], math.sqrt(1 - ABAR[T])),
        "jump: 1 − ᾱ for √(1 − ᾱ)": jump(math.sqrt(ABAR[T]), 1 - ABAR[T]),
        "jump: 1 − √ᾱ for √(1 − ᾱ)": jump(math.sqrt(ABAR[T]), 1 - math.sqrt(ABAR[T])),
        "jump: one step's β": jump(math.sqrt(1 - BETAS[-1]), math.sqrt(BETAS[-1])),
        "jump: rand for randn": jump(math.sqrt(ABAR[T]), math.sqrt(1 - ABAR[T]), torch.rand),
    },
)


# The posterior --------------------------------------------------------------------------------------------------------
# A kernel takes (xt, x0, s, t) as numbers and gives the mean and variance of q(x_s | x_t, x_0).


def is_bayes(posterior):
    """Mean and variance are those of prior times likelihood on a grid, for single steps and for skips."""
    for s, t in ((1, 2), (5, 6), (19, 20), (3, 9), (10, 20)):
        ratio = ABAR[t] / ABAR[s]
        for x0, z in ((0.8, 1.0), (-1.5, 0.3)):
            xt = math.sqrt(ABAR[t]) * x0 + math.sqrt(1 - ABAR[t]) * z
            expected = bayes_on_a_grid(math.sqrt(ABAR[s]), math.sqrt(1 - ABAR[s]), math.sqrt(ratio), 1 - ratio, xt, x0)
            near(posterior(xt, x0, s, t), expected)


def our_posterior(xt, x0, s, t):
    mean, var = CHAIN.posterior(tensor(xt), tensor(x0), s, t)
    return mean.item(), var.item()


def typed_posterior(root=math.sqrt, spread=lambda v: v, beta_of=None, swapped=False, at=lambda s, t: (s, t)):
    """μ̃ and β̃ between s and t, with one thing at a time to get wrong."""

    def posterior(xt, x0, s, t):
        before, now = (ABAR[i] for i in at(s, t))
        beta = beta_of(s, t) if beta_of else 1 - ABAR[t] / ABAR[s]
        of_x0, of_xt = root(before) * beta / (1 - now), root(1 - beta) * (1 - before) / (1 - now)
        if swapped:
            of_x0, of_xt = of_xt, of_x0
        return of_x0 * x0 + of_xt * xt, spread(beta * (1 - before) / (1 - now))

    return posterior


CASES["posterior"] = Case(
    is_bayes,
    {"ours": our_posterior, "typed": typed_posterior()},
    {
        "missing square roots": typed_posterior(root=lambda a: a),
        "deviation for variance": typed_posterior(spread=math.sqrt),
        "log of the variance": typed_posterior(spread=math.log),
        "β for β̃": lambda xt, x0, s, t: (our_posterior(xt, x0, s, t)[0], 1 - ABAR[t] / ABAR[s]),
        "one step's β for a skip": typed_posterior(beta_of=lambda s, t: BETAS[t - 1]),
        "ᾱ_{t−1} for ᾱ_t": typed_posterior(at=lambda s, t: (s, t - 1)),
        "ᾱ_t for ᾱ_{t−1}": typed_posterior(at=lambda s, t: (t, t)),
        "coefficients swapped": typed_posterior(swapped=True),
    },
)


# One step of DDPM -----------------------------------------------------------------------------------------------------
# A kernel takes (xt, eps, t, noise) and gives x_{t−1}, with variance β̃.


def is_a_draw_from_bayes(step):
    """With ε known, the mean over noise ±1 and half their difference are mean and deviation of Bayes on a grid."""
    for t in (2, 7, 20):
        before, now = ABAR[t - 1], ABAR[t]
        x0, eps = 0.6, -1.1
        xt = math.sqrt(now) * x0 + math.sqrt(1 - now) * eps
        a, v = math.sqrt(1 - BETAS[t - 1]), BETAS[t - 1]
        mean, var = bayes_on_a_grid(math.sqrt(before), math.sqrt(1 - before), a, v, xt, x0)
        high, low = step(xt, eps, t, 1.0), step(xt, eps, t, -1.0)
        near((high + low) / 2, mean)
        near((high - low) / 2, math.sqrt(var))


def our_ddpm_step(xt, eps, t, noise):
    xt, eps = tensor(xt), tensor(eps)
    x0 = CHAIN.convert(eps, xt, t, "eps", "x0")
    return ddpm_step(CHAIN, xt, x0, t, t - 1, variance="posterior", noise=tensor(noise)).item()


def algorithm_2(factor=lambda t: 1 - BETAS[t - 1], weight=None, spread=math.sqrt):
    """(1/√factor)(x_t − weight·ε) + spread(β̃)·z."""

    def step(xt, eps, t, noise):
        w = weight(t) if weight else BETAS[t - 1] / math.sqrt(1 - ABAR[t])
        var = BETAS[t - 1] * (1 - ABAR[t - 1]) / (1 - ABAR[t])
        return (xt - w * eps) / math.sqrt(factor(t)) + spread(var) * noise

    return step


CASES["step of Algorithm 2"] = Case(
    is_a_draw_from_bayes,
    {"ours": our_ddpm_step, "typed": algorithm_2()},
    {
        # the slide's line: its mean is x̂_0, not μ_θ
        "ᾱ for α throughout": algorithm_2(factor=lambda t: ABAR[t], weight=lambda t: math.sqrt(1 - ABAR[t])),
        "ᾱ for α in front": algorithm_2(factor=lambda t: ABAR[t]),
        "β/(1 − ᾱ)": algorithm_2(weight=lambda t: BETAS[t - 1] / (1 - ABAR[t])),
        "√β/√(1 − ᾱ)": algorithm_2(weight=lambda t: math.sqrt(BETAS[t - 1] / (1 - ABAR[t]))),
        "variance for deviation": algorithm_2(spread=lambda v: v),
        "no noise": algorithm_2(spread=lambda v: 0.0),
    },
)


# The last step --------------------------------------------------------------------------------------------------------
# A kernel takes (denoiser, x, times) and gives the final state at t = 0.


def ends_at_the_denoised(sample):
    """At t = 0 the state is x̂_0 of the state before, finite and without noise, over one step and over two."""

    def denoiser(x, t):
        return 0.3 + 0.0 * x if t < 10 else 0.5 * x

    for times in ([1, 0], [20, 1, 0], [20, 5, 0]):
        g = torch.Generator().manual_seed(0)
        out = sample(denoiser, torch.full((64, 1), 0.9, dtype=torch.float64), times, g)
        near(out, np.full((64, 1), 0.3), 1e-12)


def typed_ancestral(std_of, x0_coefficient=lambda s, t: math.sqrt(ABAR[s]) * (1 - ABAR[t] / ABAR[s]) / (1 - ABAR[t])):
    def sample(denoiser, x, times, g):
        for t, s in zip(times[:-1], times[1:], strict=True):
            of_xt = math.sqrt(ABAR[t] / ABAR[s]) * (1 - ABAR[s]) / (1 - ABAR[t])
            mean = x0_coefficient(s, t) * denoiser(x, t) + of_xt * x
            x = mean + std_of(s, t) * torch.randn(x.shape, generator=g, dtype=x.dtype)
        return x

    return sample


def one_by_one(denoiser):
    """The denoiser for samples that each have a time of their own."""
    return lambda x, t: torch.cat([denoiser(row[None], time.item()) for row, time in zip(x, t, strict=True)])


def tilde(s, t):
    return (1 - ABAR[t] / ABAR[s]) * (1 - ABAR[s]) / (1 - ABAR[t])


def log_of_zero(s, t):
    """exp(½ log β̃) with the log of a ratio: log 0 − log 0 at the last step."""
    with np.errstate(divide="ignore", invalid="ignore"):
        above, below = np.log(np.float64(1 - ABAR[s])), np.log(np.float64(1 - ABAR[t]))
        return float(np.exp(0.5 * (above - below + np.log1p(-ABAR[t] / ABAR[s])) + 0 * above))


def typed_2m_run(ratio_at_the_end):
    """2M on the chain from end to end; at σ = 0 the last h is infinite."""

    def sample(denoiser, x, times, g):
        with np.errstate(divide="ignore", invalid="ignore"):
            lam = [np.float64(0.5) * (np.log(ABAR[t]) - np.log(np.float64(1 - ABAR[t]))) for t in times]
            before = None
            for i, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
                x0, h = denoiser(x, t), lam[i + 1] - lam[i]
                past = 0.0
                if i and (s > 0 or ratio_at_the_end):
                    past = float(h / (2 * (lam[i] - lam[i - 1])))
                extrapolated = x0 if before is None else (1 + past) * x0 - past * before
                sigma = math.sqrt((1 - ABAR[s]) / (1 - ABAR[t]))
                x, before = sigma * x - float(math.sqrt(ABAR[s]) * np.expm1(-h)) * extrapolated, x0
        return x

    return sample


CASES["last step"] = Case(
    ends_at_the_denoised,
    {
        "ours, β": lambda d, x, times, g: last(ddpm(d, CHAIN, x, times, generator=g)),
        "ours, β̃": lambda d, x, times, g: last(ddpm(d, CHAIN, x, times, variance="posterior", generator=g)),
        "ours, callable": lambda d, x, times, g: last(ddpm(d, CHAIN, x, times, variance=lambda *_: 0.1, generator=g)),
        "ours, between": lambda d, x, times, g: last(ddpm(d, CHAIN, x, times, variance=0.5, generator=g)),
        "ours, learned": lambda d, x, times, g: last(
            ddpm(lambda x, t: (d(x, t), 0.5 + 0 * x), CHAIN, x, times, variance="learned", generator=g)
        ),
        "ours, Picard": lambda d, x, times, g: last(
            picard(one_by_one(d), CHAIN, x, times, tol=0, eta=1.0, generator=g)
        ),
        "ours, DDIM η = 1": lambda d, x, times, g: last(ddim(d, CHAIN, x, times, eta=1.0, generator=g)),
        "ours, Heun": lambda d, x, times, g: last(heun(d, CHAIN, x, times)),
        "ours, 2M": lambda d, x, times, g: last(dpm_solver_pp_2m(d, CHAIN, x, times)),
        "ours, 2S": lambda d, x, times, g: last(dpm_solver_pp_2s(d, CHAIN, x, times)),
        "typed": typed_ancestral(lambda s, t: math.sqrt(tilde(s, t))),
        "typed 2M": typed_2m_run(ratio_at_the_end=False),
    },
    {
        "noise at the last step": typed_ancestral(lambda s, t: math.sqrt(1 - ABAR[t] / ABAR[s])),
        "β̃_1 clipped to β̃_2": typed_ancestral(lambda s, t: math.sqrt(tilde(s, t) or tilde(1, 2))),
        "log of 0": typed_ancestral(log_of_zero),
        "2M second order into σ = 0": typed_2m_run(ratio_at_the_end=True),
        "ᾱ_prev starts at ᾱ_1": typed_ancestral(
            lambda s, t: math.sqrt(tilde(s, t)),
            lambda s, t: math.sqrt(ABAR[max(s, 1)]) * (1 - ABAR[t] / ABAR[s]) / (1 - ABAR[t]),
        ),
    },
)


# DDIM -----------------------------------------------------------------------------------------------------------------
# A kernel takes (xt, x0, eps, s, t, eta, noise), numbers, and gives x_s.


def keeps_the_marginals(step):
    """With x_t ~ q(x_t | x_0): mean and variance of x_s are √ᾱ_s·x_0 and 1 − ᾱ_s for every η; at η = 1 the noise is Bayes'."""
    for s, t in ((5, 6), (3, 9), (10, 20)):
        for eta in (0.0, 0.5, 1.0):

            def move(x0, eps, noise, s=s, t=t, eta=eta):
                return step(math.sqrt(ABAR[t]) * x0 + math.sqrt(1 - ABAR[t]) * eps, x0, eps, s, t, eta, noise)

            near(move(0.7, 0.0, 0.0), math.sqrt(ABAR[s]) * 0.7)
            of_eps, of_noise = move(0.0, 1.0, 0.0), move(0.0, 0.0, 1.0)
            near(of_eps**2 + of_noise**2, 1 - ABAR[s])
            ratio = ABAR[t] / ABAR[s]
            args = math.sqrt(ABAR[s]), math.sqrt(1 - ABAR[s]), math.sqrt(ratio), 1 - ratio, math.sqrt(ABAR[t]), 1.0
            near(of_noise, eta * math.sqrt(bayes_on_a_grid(*args)[1]))


def our_ddim_step(xt, x0, eps, s, t, eta, noise):
    return ddim_step(CHAIN, tensor(xt), tensor(x0), t, s, eta, tensor(noise)).item()


def typed_ddim(sigma=lambda s, t, eta: eta * math.sqrt(tilde(s, t)), direction=lambda s, sigma: 1 - ABAR[s] - sigma**2):
    def step(xt, x0, eps, s, t, eta, noise):
        spread = sigma(s, t, eta)
        return math.sqrt(ABAR[s]) * x0 + math.sqrt(max(direction(s, spread), 0)) * eps + spread * noise

    return step


CASES["DDIM's noise"] = Case(
    keeps_the_marginals,
    {"ours": our_ddim_step, "typed": typed_ddim()},
    {
        # the clamp hides that 1 − ᾱ_s − σ² is negative
        "σ from ᾱ_t only": typed_ddim(sigma=lambda s, t, eta: eta * math.sqrt(1 - ABAR[t])),
        "σ without its square root": typed_ddim(sigma=lambda s, t, eta: eta * tilde(s, t)),
        "σ² = η β̃": typed_ddim(sigma=lambda s, t, eta: math.sqrt(eta * tilde(s, t))),
        "σ of one step for a skip": typed_ddim(
            sigma=lambda s, t, eta: eta * math.sqrt(BETAS[t - 1] * (1 - ABAR[t - 1]) / (1 - ABAR[t]))
        ),
        "σ² = β": typed_ddim(sigma=lambda s, t, eta: eta * math.sqrt(min(1 - ABAR[t] / ABAR[s], 1 - ABAR[s]))),
        "direction not shortened": typed_ddim(direction=lambda s, sigma: 1 - ABAR[s]),
        "direction shortened by σ": typed_ddim(direction=lambda s, sigma: 1 - ABAR[s] - sigma),
    },
)


# Clipping -------------------------------------------------------------------------------------------------------------
# A kernel takes (eps, xt, s, t), clips x̂_0 to [−1, 1] and makes a deterministic step.


def stays_on_one_path(step):
    """(x_t, x_s) must lie on one path α·x̂_0 + σ·ε with the clipped x̂_0: the same ε explains both."""
    for s, t in ((5, 6), (3, 9), (10, 20)):
        for xt, eps in ((2.5, -1.0), (-3.0, 0.4), (0.1, 0.2)):
            x0 = np.clip((xt - math.sqrt(1 - ABAR[t]) * eps) / math.sqrt(ABAR[t]), -1, 1)
            explained = (xt - math.sqrt(ABAR[t]) * x0) / math.sqrt(1 - ABAR[t])
            near((step(eps, xt, s, t) - math.sqrt(ABAR[s]) * x0) / math.sqrt(1 - ABAR[s]), explained)


def our_clipped_step(eps, xt, s, t):
    d = clipped(Denoiser(lambda x, u: torch.full_like(x, eps), CHAIN, "eps"))
    return last(ddim(d, CHAIN, tensor(xt)[:, None], [t, s])).item()


def clip_and_step(recomputed):
    def step(eps, xt, s, t):
        x0 = np.clip((xt - math.sqrt(1 - ABAR[t]) * eps) / math.sqrt(ABAR[t]), -1, 1)
        if recomputed:
            eps = (xt - math.sqrt(ABAR[t]) * x0) / math.sqrt(1 - ABAR[t])
        return math.sqrt(ABAR[s]) * x0 + math.sqrt(1 - ABAR[s]) * eps

    return step


CASES["clipping"] = Case(
    stays_on_one_path,
    {"ours": our_clipped_step, "typed": clip_and_step(recomputed=True)},
    {
        "ε not recomputed": clip_and_step(recomputed=False),
        "the state clipped instead": lambda eps, xt, s, t: float(np.clip(
            clip_and_step(recomputed=True)(eps, xt, s, t), -1, 1)),
    },
)  # fmt: skip


# What the network predicts --------------------------------------------------------------------------------------------
# A kernel takes (quantity, xt, alpha, sigma) with what the network said, and gives x̂_0.


def convert_on_cosine(given):
    def kernel(value, xt, alpha, sigma):
        return Cosine().convert(tensor(value), tensor(xt), 2 / math.pi * math.atan2(sigma, alpha), given, "x0").item()

    return kernel


def recovers_x0_from(quantity):
    def oracle(kernel):
        """x_0 comes back from x_t and the true quantity, the score being ∇ log q by autograd; where α = 0, it or an error."""
        for angle in (0.3, 0.8, 1.4):
            alpha, sigma = math.cos(angle), math.sin(angle)
            for x0, eps in ((0.7, -1.2), (-0.4, 0.5)):
                xt = tensor(alpha * x0 + sigma * eps).requires_grad_()
                (score,) = torch.autograd.grad(Normal(tensor(alpha * x0), sigma).log_prob(xt), xt)
                value = {"eps": eps, "score": score.item(), "v": alpha * eps - sigma * x0}[quantity]
                near(kernel(value, xt.item(), alpha, sigma), x0)
        try:
            at_the_end = kernel({"eps": 0.5, "score": -0.5, "v": -0.3}[quantity], 0.5, 0.0, 1.0)  # x_0 = 0.3, ε = 0.5
        except ValueError:
            return
        near(at_the_end, 0.3)

    return oracle


def only_where_there_is_signal(kernel):
    """The typed kernel, with the refusal that α = 0 asks for."""

    def guarded(value, xt, alpha, sigma):
        if alpha == 0:
            raise ValueError("no signal")
        return kernel(value, xt, alpha, sigma)

    return guarded


def safe(kernel):
    """numpy's division, which gives inf or nan where Python's would raise."""

    def quiet(value, xt, alpha, sigma):
        with np.errstate(divide="ignore", invalid="ignore"):
            return kernel(np.float64(value), np.float64(xt), np.float64(alpha), np.float64(sigma))

    return quiet


CASES["x_0 from ε"] = Case(
    recovers_x0_from("eps"),
    {"ours": convert_on_cosine("eps"), "typed": only_where_there_is_signal(lambda e, x, a, s: (x - s * e) / a)},
    {
        "inf hidden by a clip": safe(lambda e, x, a, s: np.clip(np.nan_to_num((x - s * e) / a), -1, 1)),
        "inf where no signal is left": safe(lambda e, x, a, s: (x - s * e) / a),
        "α held above 1e-8": lambda e, x, a, s: (x - s * e) / max(a, 1e-8),
        "σ² for σ": only_where_there_is_signal(lambda e, x, a, s: (x - s**2 * e) / a),
        "α² for α": only_where_there_is_signal(lambda e, x, a, s: (x - s * e) / a**2),
        "not divided by α": lambda e, x, a, s: x - s * e,
    },
)
CASES["x_0 from the score"] = Case(
    recovers_x0_from("score"),
    {"ours": convert_on_cosine("score"), "typed": only_where_there_is_signal(lambda g, x, a, s: (x + s**2 * g) / a)},
    {
        "sign": only_where_there_is_signal(lambda g, x, a, s: (x - s**2 * g) / a),
        "scale: σ for σ²": only_where_there_is_signal(lambda g, x, a, s: (x + s * g) / a),
        "taken for noise": only_where_there_is_signal(lambda g, x, a, s: (x - s * g) / a),
    },
)
CASES["x_0 from v"] = Case(
    recovers_x0_from("v"),
    {"ours": convert_on_cosine("v"), "typed": lambda v, x, a, s: a * x - s * v},
    {
        "sign": lambda v, x, a, s: a * x + s * v,
        "α and σ swapped": lambda v, x, a, s: s * x - a * v,
        "taken for noise": safe(lambda v, x, a, s: (x - s * v) / a),
        "gives ε": lambda v, x, a, s: s * x + a * v,
    },
)


# Solvers --------------------------------------------------------------------------------------------------------------
# A kernel takes (denoiser, path, x, times) and gives the state at the last time.


def has_order(expected):
    def oracle(solve):
        """Both slopes of the error on a three-mode mixture lie within 0.15 of the order."""
        for slope in order_of(solve, "Cosine"):
            assert abs(slope - expected) < 0.15

    return oracle


def typed_heun(divide_by="next", weight=0.5):
    """Heun in (x/α, ς = σ/α): d(x/α)/dς = (x/α − x̂_0)/ς; the second slope belongs to the next ς."""

    def solve(denoiser, path, x, times):
        for t, s in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
            (a_t, s_t), (a_s, s_s) = known("Cosine", t), known("Cosine", s)
            now, then = s_t / a_t, s_s / a_s
            y = x / a_t
            slope = (y - denoiser(x, t)) / now
            ahead = y + (then - now) * slope
            second = (ahead - denoiser(a_s * ahead, s)) / (then if divide_by == "next" else now)
            x = a_s * (y + (then - now) * ((1 - weight) * slope + weight * second))
        return x

    return solve


CASES["Heun"] = Case(
    has_order(2),
    {"ours": lambda d, path, x, times: last(heun(d, path, x, times)), "typed": typed_heun()},
    {
        "second stage divided by the first σ": typed_heun(divide_by="now"),
        "second stage not used": typed_heun(weight=0.0),
        "only the second stage": typed_heun(weight=1.0),
    },
)


def typed_2m_solver(past=lambda h, h_last: h / (2 * h_last), sign=1.0, length=lambda h, h_last: h):
    """2M with x̂_0 extrapolated by the weight past(h, h_last), over the step length(h, h_last)."""

    def solve(denoiser, path, x, times):
        before = lam_before = None
        for t, s in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
            (a_t, s_t), (a_s, s_s) = known("Cosine", t), known("Cosine", s)
            lam_t, lam_s = math.log(a_t / s_t), math.log(a_s / s_s)
            mixed = x0 = denoiser(x, t)
            h = lam_s - lam_t
            if before is not None:
                w = sign * past(h, lam_t - lam_before)
                mixed, h = (1 + w) * x0 - w * before, length(h, lam_t - lam_before)
            x = s_s / s_t * x - a_s * math.expm1(-h) * mixed
            before, lam_before = x0, lam_t
        return x

    return solve


CASES["2M's order"] = Case(
    has_order(2),
    {"ours": lambda d, path, x, times: last(dpm_solver_pp_2m(d, path, x, times)), "typed": typed_2m_solver()},
    {
        "no memory": typed_2m_solver(past=lambda h, h_last: 0.0),
        "sign of the extrapolation": typed_2m_solver(sign=-1.0),
        "½ forgotten": typed_2m_solver(past=lambda h, h_last: h / h_last),
    },
)
CASES["DDIM's order"] = Case(
    has_order(1),
    {
        "ours": lambda d, path, x, times: last(ddim(d, path, x, times)),
        "typed": typed_2m_solver(past=lambda h, h_last: 0.0),
    },
    {
        "σ for the next σ": lambda d, path, x, times: _sloppy_ddim(d, x, times, lambda s_t, s_s: s_t),
        "σ² for σ": lambda d, path, x, times: _sloppy_ddim(d, x, times, lambda s_t, s_s: s_s**2),
    },
)


def _sloppy_ddim(denoiser, x, times, choose):
    for t, s in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        (a_t, s_t), (a_s, s_s) = known("Cosine", t), known("Cosine", s)
        x0 = denoiser(x, t)
        x = a_s * x0 + choose(s_t, s_s) * (x - a_t * x0) / s_t
    return x


def extrapolates_exactly(solve):
    """Where x̂_0 = c + k·λ, the last step of an uneven grid must use its value at the middle λ: this fixes r itself.

    An order test cannot: with r inverted the slope is 2 as well, and without r it is on an even grid.
    """

    def denoiser(x, t):
        return 0.3 + 1.7 * math.log(1 / math.tan(math.pi * t / 2)) + 0 * x

    for lam in ([-1.0, -0.8, 0.4], [-1.0, 0.2, 0.4], [-0.5, 0.0, 0.5]):
        times = tensor(*[2 / math.pi * math.atan(math.exp(-value)) for value in lam])
        middle = solve(denoiser, Cosine(), tensor(0.9)[:, None], times[:2])
        out = solve(denoiser, Cosine(), tensor(0.9)[:, None], times)
        (_, s_t), (a_s, s_s) = known("Cosine", times[1].item()), known("Cosine", times[2].item())
        x0 = 0.3 + 1.7 * (lam[1] + lam[2]) / 2
        near(out, s_s / s_t * middle + a_s * (1 - math.exp(lam[1] - lam[2])) * x0, 1e-9)


def our_2m_steps(denoiser, path, x, times):
    before = ()
    for t, s in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        x0 = denoiser(x, t)
        x, before = dpm_solver_pp_2m_step(path, x, x0, t, s, *before), (x0, t)
    return x


CASES["2M's extrapolation"] = Case(
    extrapolates_exactly,
    {
        "ours": lambda d, path, x, times: last(dpm_solver_pp_2m(d, path, x, times)),
        "ours, step by step": our_2m_steps,
        "typed": typed_2m_solver(),
    },
    {
        "r inverted": typed_2m_solver(past=lambda h, h_last: h_last / (2 * h)),
        "r dropped": typed_2m_solver(past=lambda h, h_last: 0.5),
        "h_last for h": typed_2m_solver(length=lambda h, h_last: h_last),
        "no memory": typed_2m_solver(past=lambda h, h_last: 0.0),
        "½ forgotten": typed_2m_solver(past=lambda h, h_last: h / h_last),
    },
)


def typed_2s_solver(
    share=lambda r: 1 / (2 * r), inner=lambda h, r: r * h, ratio=lambda h, h_inner: h_inner / h, told="inner"
):
    """2S between known times; on a path the middle in λ, on the chain the whole time nearest to it."""

    def solve(denoiser, path, x, times):
        name = "chain" if path is CHAIN else "Cosine"

        def lam(t):
            return math.log(known(name, t)[0] / known(name, t)[1])

        for t, s in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
            h = lam(s) - lam(t)
            if path is CHAIN:
                u = min(range(int(s) + 1, int(t)), key=lambda u, t=t, h=h: abs(lam(u) - lam(t) - h / 2))
            else:
                u = 2 / math.pi * math.atan(math.exp(-(lam(t) + h / 2)))
            r = ratio(h, lam(u) - lam(t))
            (_, s_t), (a_u, s_u), (a_s, s_s) = (known(name, time) for time in (t, u, s))
            x0 = denoiser(x, t)
            ahead = s_u / s_t * x - a_u * math.expm1(-inner(h, r)) * x0
            second = denoiser(ahead, u if told == "inner" else t)
            w = share(r)
            x = s_s / s_t * x - a_s * math.expm1(-h) * ((1 - w) * x0 + w * second)
        return x

    return solve


def ours_2s(denoiser, path, x, times):
    return last(dpm_solver_pp_2s(denoiser, path, x, times))


CASES["2S's order"] = Case(
    has_order(2),
    {"ours": ours_2s, "typed": typed_2s_solver()},
    {
        "second evaluation not used": typed_2s_solver(share=lambda r: 0.0),
        "1/r for 1/(2r)": typed_2s_solver(share=lambda r: 1 / r),
        "h for rh on the way to the middle": typed_2s_solver(inner=lambda h, r: h),
        "the middle told the first time": typed_2s_solver(told="outer"),
        "mean of both guesses": typed_2s_solver(share=lambda r: 0.5),
    },
)


def meets_a_line_on_a_chain(solve):
    """Where x̂_0 = c + k·λ one step on the chain must use its value at the middle λ, although no time lies there; and the second
    guess must be asked for where DDIM leads: a denoiser that depends on the state differs by its share of that."""
    for t, s in ((20, 2), (16, 9), (9, 2), (5, 3)):
        lam = {u: math.log(known("chain", u)[0] / known("chain", u)[1]) for u in range(s, t + 1)}
        half = (lam[t] + lam[s]) / 2
        u = min(range(s + 1, t), key=lambda u, lam=lam, half=half: abs(lam[u] - half))
        (a_t, s_t), (a_u, s_u), (a_s, s_s) = (known("chain", time) for time in (t, u, s))
        x = tensor(0.9)[:, None]
        for k in (0.0, 0.2):

            def denoiser(x, time, lam=lam, k=k):
                return 0.3 + 1.7 * lam[int(time)] + k * x

            first = 0.3 + 1.7 * lam[t] + k * 0.9
            ahead = a_u * first + s_u * (0.9 - a_t * first) / s_t
            mixed = 0.3 + 1.7 * half + k * 0.9 + k * (ahead - 0.9) * (half - lam[t]) / (lam[u] - lam[t])
            out = solve(denoiser, CHAIN, x, tensor(float(t), float(s)))
            near(out, a_s * mixed + s_s * (0.9 - a_t * mixed) / s_t, 1e-9)


CASES["2S on a chain"] = Case(
    meets_a_line_on_a_chain,
    {"ours": ours_2s, "typed": typed_2s_solver()},
    {
        "r taken for ½": typed_2s_solver(share=lambda r: 1.0),
        "r inverted": typed_2s_solver(share=lambda r: r / 2),
        "half of h on the way to the middle": typed_2s_solver(inner=lambda h, r: h / 2),
        "1 − r for r": typed_2s_solver(share=lambda r: 1 / (2 * (1 - r))),
        "second evaluation not used": typed_2s_solver(share=lambda r: 0.0),
    },
)


# A kernel takes (denoiser, x, times), ascending, and goes from the data to the noise on the cosine path.


def goes_back(walk):
    """Each step takes x̂_0 and ε̂ where it starts to where it ends; an order test cannot tell where it asks."""
    times, x, angle = [0.1, 0.35, 0.5, 0.9], 0.8, math.pi / 2

    def guess(x, t):
        return math.tanh(1.4 * x - t)

    def denoiser(x, t):
        return torch.tanh(1.4 * x - t)

    for s, t in zip(times, times[1:], strict=False):
        eps = (x - math.cos(angle * s) * guess(x, s)) / math.sin(angle * s)
        x = math.cos(angle * t) * guess(x, s) + math.sin(angle * t) * eps
    near(walk(denoiser, tensor(0.8)[:, None], times), x)


def typed_walk(at=lambda s, t: s, split=lambda s, t: s, noise=lambda s, t: t):
    def walk(denoiser, x, times):
        for s, t in zip(times, times[1:], strict=False):
            x0, angle = denoiser(x, at(s, t)), math.pi / 2 * split(s, t)
            eps = (x - math.cos(angle) * x0) / math.sin(angle)
            x = math.cos(math.pi / 2 * t) * x0 + math.sin(math.pi / 2 * noise(s, t)) * eps
        return x

    return walk


CASES["DDIM backwards"] = Case(
    goes_back,
    {"ours": lambda d, x, times: last(ddim_inversion(d, Cosine(), x, times)), "typed": typed_walk()},
    {
        "asked for the time it goes to": typed_walk(at=lambda s, t: t),
        "taken to be where it goes": typed_walk(at=lambda s, t: t, split=lambda s, t: t),
        "split at the time it goes to": typed_walk(split=lambda s, t: t),
        "σ not moved": typed_walk(noise=lambda s, t: s),
        "down instead of up": lambda d, x, times: last(ddim(d, Cosine(), x, times[::-1])),
    },
)


# The SDE --------------------------------------------------------------------------------------------------------------
# A kernel gives (α, σ, f, g²) at t. VP with β from 0.1 to 20, and SubVP.


def is_consistent(marginals):
    def oracle(kernel):
        """α' = f·α and (σ²)' = 2f·σ² + g² by central differences, with α and σ those of the closed form."""
        for t in (0.05, 0.4, 0.9):
            step = 1e-5
            alpha, sigma, drift, diffusion2 = kernel(t)
            near([alpha, sigma], marginals(t), 1e-9)
            (a_low, s_low), (a_high, s_high) = marginals(t - step), marginals(t + step)
            near((a_high - a_low) / (2 * step), drift * alpha, 1e-6)
            near((s_high**2 - s_low**2) / (2 * step), 2 * drift * sigma**2 + diffusion2, 1e-6)

    return oracle


def vp_beta(t):
    return 0.1 + 19.9 * t


def vp_alpha(t, factor=0.5):
    return math.exp(-factor * (0.1 * t + 19.9 * t**2 / 2))


def ours_sde(path):
    return lambda t: tuple(value.item() for value in (path.alpha(t), path.sigma(t), path.drift(t), path.diffusion2(t)))


def typed_vp(factor=0.5, drift=lambda b: -b / 2, diffusion2=lambda b, t: b):
    def kernel(t):
        alpha = vp_alpha(t, factor)
        return alpha, math.sqrt(1 - alpha**2), drift(vp_beta(t)), diffusion2(vp_beta(t), t)

    return kernel


CASES["SDE of VP"] = Case(
    is_consistent(lambda t: known("VP", t)),
    {"ours": ours_sde(VP()), "typed": typed_vp()},
    {
        "α without ½": typed_vp(factor=1.0),
        "α with ¼": typed_vp(factor=0.25),
        "drift without ½": typed_vp(drift=lambda b: -b),
        "drift's sign": typed_vp(drift=lambda b: b / 2),
        "g for g²": typed_vp(diffusion2=lambda b, t: math.sqrt(b)),
        "g² doubled": typed_vp(diffusion2=lambda b, t: 2 * b),
        "β averaged over [0, t]": typed_vp(diffusion2=lambda b, t: 0.1 + 19.9 * t / 2),
    },
)


def typed_sub_vp(power=2, sigma=lambda a: 1 - a**2):
    def kernel(t):
        alpha = vp_alpha(t)
        return alpha, sigma(alpha), -vp_beta(t) / 2, vp_beta(t) * (1 - alpha ** (2 * power))

    return kernel


CASES["SDE of SubVP"] = Case(
    is_consistent(lambda t: known("SubVP", t)),
    {"ours": ours_sde(SubVP()), "typed": typed_sub_vp()},
    {
        "g² with α² for α⁴": typed_sub_vp(power=1),
        "g² = β": typed_sub_vp(power=math.inf),
        "σ² for σ": typed_sub_vp(sigma=lambda a: (1 - a**2) ** 2),
        "VP's σ": typed_sub_vp(sigma=lambda a: math.sqrt(1 - a**2)),
    },
)


# Samplers of the SDE --------------------------------------------------------------------------------------------------
# A kernel takes (x, t, h, noise) and walks forward on VP, by h from t.


def ends_in_vp(step):
    """From the point 2, 400 steps to t = 0.7: mean 2α and variance σ² to 2 %, from what a step does to x and to noise."""
    mean, var, h = 2.0, 0.0, 0.7 / 400
    for k in range(400):
        rest, of_x, of_noise = step(tensor(0.0, 1.0, 0.0), k * h, h, tensor(0.0, 0.0, 1.0)).tolist()
        mean, var = rest + (of_x - rest) * mean, (of_x - rest) ** 2 * var + (of_noise - rest) ** 2
    alpha, sigma = known("VP", 0.7)
    near(mean / (2 * alpha), 1.0, 0.02)
    near(var / sigma**2, 1.0, 0.02)


def our_forward_step(x, t, h, noise):
    """The sampler draws its noise itself: what it adds to 0 is taken off, and the asked one put in its place."""
    g = torch.Generator().manual_seed(0)
    drawn = torch.randn(x.shape, generator=g, dtype=x.dtype)
    plain = last(forward_euler_maruyama(VP(), torch.zeros_like(x), [t, t + h], generator=g.manual_seed(0)))
    moved = last(forward_euler_maruyama(VP(), x, [t, t + h], generator=g.manual_seed(0)))
    return moved - plain + plain / drawn * noise


def typed_forward(drift=lambda b: -b / 2, spread=lambda b, h: math.sqrt(b * h), at=lambda t: t):
    def step(x, t, h, noise):
        beta = vp_beta(at(t))
        return x + drift(beta) * x * h + spread(beta, h) * noise

    return step


CASES["forward SDE"] = Case(
    ends_in_vp,
    {"ours": our_forward_step, "typed": typed_forward()},
    {
        "h for √h": typed_forward(spread=lambda b, h: math.sqrt(b) * h),
        "β for √β": typed_forward(spread=lambda b, h: b * math.sqrt(h)),
        "drift without ½": typed_forward(drift=lambda b: -b),
        "drift's sign": typed_forward(drift=lambda b: b / 2),
        "no noise": typed_forward(spread=lambda b, h: 0.0),
        "time runs from 1": typed_forward(at=lambda t: 1 - t),
    },
)


# A kernel takes (x, x0_hat, t, s, noise) and steps back on VP. Data N(0.7, 1/4), exact denoiser.


def undoes_vp(step):
    """600 steps from p_0.9 to t = 0.1: mean and variance to 1 %, from what a step does to x and to noise."""
    m, v = 0.7, 0.25
    times = np.linspace(0.9, 0.1, 601).tolist()
    alpha, sigma = known("VP", 0.9)
    mean, var = alpha * m, alpha**2 * v + sigma**2
    for t, s in zip(times[:-1], times[1:], strict=True):
        alpha, x = vp_alpha(t), tensor(0.0, 1.0, 0.0)
        x0 = m + alpha * v / (alpha**2 * v + 1 - alpha**2) * (x - alpha * m)
        rest, of_x, of_noise = step(x, x0, t, s, tensor(0.0, 0.0, 1.0)).tolist()
        mean, var = rest + (of_x - rest) * mean, (of_x - rest) ** 2 * var + (of_noise - rest) ** 2
    alpha, sigma = known("VP", 0.1)
    near(mean / (alpha * m), 1.0, 0.01)
    near(var / (alpha**2 * v + sigma**2), 1.0, 0.01)


def typed_reverse(
    weight=1.0, drift=-0.5, forward=1.0, spread=lambda g2, h: math.sqrt(g2 * h), size=lambda var: var, at=lambda t, s: t
):
    """x − forward·(drift·β·x − weight·β·score)·h + noise; score = (αx̂_0 − x)/size(σ²)."""

    def step(x, x0, t, s, noise):
        alpha, beta, h = vp_alpha(t), vp_beta(at(t, s)), t - s
        score = (alpha * x0 - x) / size(1 - alpha**2)
        return x - forward * (drift * beta * x - weight * beta * score) * h + spread(beta, h) * noise

    return step


CASES["reverse SDE"] = Case(
    undoes_vp,
    {
        "ours": lambda x, x0, t, s, noise: euler_maruyama_step(VP(), x, x0, t, s, noise),
        "typed": typed_reverse(),
    },
    {
        "½g² before the score, as the ODE": typed_reverse(weight=0.5),
        "the ODE's drift and no noise, with g²": typed_reverse(spread=lambda g2, h: 0.0),
        "no score": typed_reverse(weight=0.0),
        "score's sign": typed_reverse(weight=-1.0),
        "time not reversed": typed_reverse(forward=-1.0),
        "drift's sign": typed_reverse(drift=0.5),
        "drift without ½": typed_reverse(drift=-1.0),
        "h for √h": typed_reverse(spread=lambda g2, h: math.sqrt(g2) * h),
        "g² for g before the noise": typed_reverse(spread=lambda g2, h: g2 * math.sqrt(h)),
        "score divided by σ": typed_reverse(size=math.sqrt),  # ε̂ up to its sign
        "score not divided": typed_reverse(size=lambda var: 1.0),
        "β at the time T − t": typed_reverse(at=lambda t, s: 1 - t),
    },
)


# A kernel takes (x, score, step, noise) and makes a step of Langevin dynamics.


def stays_at(step):
    """On N(1, 4) small steps keep mean 1 and variance 4, to 2 %, whatever they started from."""
    mean, var = 0.0, 0.0
    for _ in range(3000):
        x = tensor(0.0, 1.0, 0.0)
        rest, of_x, of_noise = step(x, -(x - 1) / 4, 0.02, tensor(0.0, 0.0, 1.0)).tolist()
        mean, var = rest + (of_x - rest) * mean, (of_x - rest) ** 2 * var + (of_noise - rest) ** 2
    near(mean, 1.0, 0.02)
    near(var / 4, 1.0, 0.02)


CASES["Langevin dynamics"] = Case(
    stays_at,
    {
        "ours": langevin_step,
        "typed": lambda x, score, step, noise: x + step * score + math.sqrt(2 * step) * noise,
        "typed, half the step": lambda x, score, step, noise: x + step / 2 * score + math.sqrt(step) * noise,
    },
    {
        "√δ for √2δ": lambda x, score, step, noise: x + step * score + math.sqrt(step) * noise,
        "√2δ with half the drift": lambda x, score, step, noise: x + step / 2 * score + math.sqrt(2 * step) * noise,
        "2δ for √2δ": lambda x, score, step, noise: x + step * score + 2 * step * noise,
        "√2·δ for √2δ": lambda x, score, step, noise: x + step * score + math.sqrt(2) * step * noise,
        "downhill": lambda x, score, step, noise: x - step * score + math.sqrt(2 * step) * noise,
        "no noise": lambda x, score, step, noise: x + step * score,
        "keeps the noise alone": lambda x, score, step, noise: step * score + math.sqrt(2 * step) * noise,
    },
)


# A kernel takes (x0, x, t, snr, steps, generator) and corrects x at t on VP, for data in one point x0.


def corrects_each_sample_at_its_time(correct):
    """30,000 samples take on N(αx_0, σ²/(1 − r²)), within 5 standard errors; a sample is what it is without batch mates."""
    n, snr = 30_000, 0.5
    for t in (0.1, 0.4):
        g = torch.Generator().manual_seed(1)
        x = correct(0.8, torch.zeros(n, 1, dtype=torch.float64), t, snr, 25, g)[:, 0].numpy()
        alpha, sigma = known("VP", t)
        var = sigma**2 / (1 - snr**2)
        assert abs(x.mean() - 0.8 * alpha) < 5 * math.sqrt(var / n)
        assert abs(x.var() - var) < 5 * var * math.sqrt(2 / n)
        ends = []
        for mate in (0.0, 50.0):
            start = tensor([1.0], [mate])
            ends.append(correct(0.8, start, t, snr, 1, torch.Generator().manual_seed(1))[0])
        assert torch.equal(*ends)


def typed_corrector(step_of=lambda snr, var, score, noise: 2 * (snr**2) * var, variance=lambda t: 1 - vp_alpha(t) ** 2):
    def correct(x0, x, t, snr, steps, g):
        for _ in range(steps):
            score = (vp_alpha(t) * x0 - x) / variance(t)
            noise = torch.randn(x.shape, generator=g, dtype=x.dtype)
            step = step_of(snr, variance(t), score, noise)
            x = x + step * score + (2 * torch.as_tensor(step)).sqrt() * noise
        return x

    return correct


def our_corrector(x0, x, t, snr, steps, g):
    return last(langevin(lambda xt, t: torch.full_like(xt, x0), VP(), x, t, snr=snr, steps=steps, generator=g))


def measured(norm):
    """δ = 2(r‖z‖/‖s‖)², with norms measured in some way."""
    return lambda snr, var, score, noise: 2 * (snr * norm(noise) / norm(score)) ** 2


CASES["corrector's step"] = Case(
    corrects_each_sample_at_its_time,
    {"ours": our_corrector, "typed": typed_corrector()},
    {
        "r for r²": typed_corrector(lambda snr, var, score, noise: 2 * snr * var),
        "σ for σ²": typed_corrector(lambda snr, var, score, noise: 2 * snr**2 * var**0.5),
        "without the 2": typed_corrector(lambda snr, var, score, noise: snr**2 * var),
        "norms of each sample": typed_corrector(measured(lambda z: z.norm(dim=1, keepdim=True))),
        "norms of the batch": typed_corrector(measured(lambda z: z.norm())),
        "mean norms of the batch": typed_corrector(measured(lambda z: z.norm(dim=1).mean())),
        "α² for σ²": typed_corrector(variance=lambda t: vp_alpha(t) ** 2),
    },
)


# A kernel takes (denoiser, x, times, correctors, generator), predicts and then corrects with r = 0.5, on VP.


def corrects_where_it_has_arrived(sample):
    """Data in one point: after 25 corrections the samples have the corrector's own law at s, not at t, whatever came before."""
    n, snr, asked = 30_000, 0.5, []

    def denoiser(x, t):
        asked.append(float(t))
        return torch.full_like(x, 0.8)

    g = torch.Generator().manual_seed(2)
    x = sample(denoiser, torch.randn(n, 1, generator=g, dtype=torch.float64), [0.5, 0.2], 25, g)[:, 0].numpy()
    alpha, sigma = known("VP", 0.2)
    var = sigma**2 / (1 - snr**2)
    assert abs(x.mean() - 0.8 * alpha) < 5 * math.sqrt(var / n)
    assert abs(x.var() - var) < 5 * var * math.sqrt(2 / n)
    assert asked == [0.5] + [0.2] * 25


def typed_predictor_corrector(
    ask_at=lambda t, s: s, noise_at=lambda t, s: s, step_of=lambda snr, t, s, var: 2 * snr**2 * var, again=True
):
    def sample(denoiser, x, times, correctors, g):
        for t, s in zip(times[:-1], times[1:], strict=True):
            x0 = denoiser(x, t)
            x = typed_reverse()(x, x0, t, s, torch.randn(x.shape, generator=g, dtype=x.dtype))
            for _ in range(correctors):
                at = noise_at(t, s)
                x0 = denoiser(x, ask_at(t, s)) if again else x0
                var = 1 - vp_alpha(at) ** 2
                score, step = (vp_alpha(at) * x0 - x) / var, step_of(0.5, t, s, var)
                x = x + step * score + math.sqrt(2 * step) * torch.randn(x.shape, generator=g, dtype=x.dtype)
        return x

    return sample


CASES["predictor, then corrector"] = Case(
    corrects_where_it_has_arrived,
    {
        "ours": lambda d, x, times, k, g: last(
            predictor_corrector(d, VP(), x, times, snr=0.5, corrector_steps=k, generator=g)
        ),
        "typed": typed_predictor_corrector(),
    },
    {
        "corrects at the time it left": typed_predictor_corrector(lambda t, s: t, lambda t, s: t),
        "asks at the time it left": typed_predictor_corrector(ask_at=lambda t, s: t),
        "reads the score at the time it left": typed_predictor_corrector(noise_at=lambda t, s: t),
        "the predictor's Δt for δ": typed_predictor_corrector(step_of=lambda snr, t, s, var: t - s),
        "the predictor's score again": typed_predictor_corrector(again=False),
        "no corrector": lambda d, x, times, k, g: typed_predictor_corrector()(d, x, times, 0, g),
    },
)


# Losses ---------------------------------------------------------------------------------------------------------------
# A kernel takes (x0, x0_hat, xt, t) and gives the term of the bound from t to t − 1, with variance β, for one sample.


def is_a_divergence(term):
    """torch's KL divergence of the two Gaussians for t > 1 (means by Bayes on a grid), −log density at t = 1."""
    for t in (1, 2, 9, 20):
        before, beta = ABAR[t - 1], BETAS[t - 1]
        xt, x0, x0_hat = 0.4, 0.7, -0.2
        if t == 1:
            expected = -Normal(tensor(x0_hat), math.sqrt(beta)).log_prob(tensor(x0)).item()
        else:
            args = math.sqrt(before), math.sqrt(1 - before), math.sqrt(1 - beta), beta, xt
            (mean, var), (mean_hat, _) = bayes_on_a_grid(*args, x0), bayes_on_a_grid(*args, x0_hat)
            q, p = Normal(tensor(mean), math.sqrt(var)), Normal(tensor(mean_hat), math.sqrt(beta))
            expected = kl_divergence(q, p).item()
        near(term(x0, x0_hat, xt, t), expected)


def our_term(x0, x0_hat, xt, t):
    return bound_term(lambda x, u: tensor([x0_hat]), CHAIN, tensor([x0]), tensor([xt]), t - 1, t).item()


def typed_term(posterior=tilde, model=lambda t: BETAS[t - 1], half=0.5, const=True, swapped=False, sign=1.0):
    def term(x0, x0_hat, xt, t):
        if t == 1:
            sigma2 = model(1)
            return sign * (x0 - x0_hat) ** 2 / (2 * sigma2) + 0.5 * math.log(2 * math.pi * sigma2)
        var_q, var_p = posterior(t - 1, t), model(t)
        gap = math.sqrt(ABAR[t - 1]) * BETAS[t - 1] / (1 - ABAR[t]) * (x0 - x0_hat)
        if swapped:
            var_q, var_p = var_p, var_q
        constant = var_q / var_p - 1 - math.log(var_q / var_p) if const else 0.0
        return half * (gap**2 / var_p + constant)

    return term


CASES["term of the bound"] = Case(
    is_a_divergence,
    {"ours": our_term, "typed": typed_term()},
    {
        "β̃ weights for Σ = β": typed_term(model=lambda t: tilde(t - 1, t) or BETAS[0]),
        "without its constant": typed_term(const=False),
        "KL the other way round": typed_term(swapped=True),
        "without ½": typed_term(half=1.0),
        "deviations for variances": typed_term(
            posterior=lambda s, t: math.sqrt(tilde(s, t)), model=lambda t: math.sqrt(BETAS[t - 1])
        ),
        "log p for −log p at t = 1": typed_term(sign=-1.0),
        "log of the wrong variance": typed_term(posterior=lambda s, t: BETAS[t - 1]),
        # the slide's 1/(2β̃_1): β̃_1 = 0
        "β̃_1 at t = 1": lambda *args: np.inf if args[-1] == 1 else typed_term()(*args),
    },
)


# A kernel takes (level, mean, std), the grey level as a number in [−1, 1], and gives the log mass of its bin out of 256.


def is_the_mass(log_mass):
    """All 256 masses add up to 1, and each is the normal integral in 40 digits, also far from the mean."""
    half = mp.mpf(1) / 255
    for mean, std in ((0.1, 0.01), (0.999, 0.05), (-0.5, 0.3)):
        logs = [log_mass(k / 127.5 - 1, mean, std) for k in range(256)]
        assert abs(math.fsum(math.exp(value) for value in logs) - 1) < 1e-9
        for k in (0, 100, 130, 140, 255):
            level = mp.mpf(k) / mp.mpf("127.5") - 1
            low = -mp.inf if k == 0 else (level - half - mean) / std
            high = mp.inf if k == 255 else (level + half - mean) / std
            if low > 0:
                low, high = -high, -low
            exact = mp.log((mp.erfc(-high / mp.sqrt(2)) - mp.erfc(-low / mp.sqrt(2))) / 2)
            near(logs[k], float(exact), 1e-8)


def our_mass(level, mean, std):
    x0 = tensor(level)[:, None]
    return -bound_term(lambda x, t: torch.full_like(x, mean), DiscretePath([std**2]), x0, x0, 0, 1, bins=256).item()


def phi(x):
    return float((1 + mp.erf(mp.mpf(x) / mp.sqrt(2))) / 2)


def rough_phi(x):
    return 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def typed_mass(cdf=phi, open_ends=True, half=1 / 255, floor=1e-12):
    def log_mass(level, mean, std):
        above = 1.0 if open_ends and level > 0.999 else cdf((level + half - mean) / std)
        below = 0.0 if open_ends and level < -0.999 else cdf((level - half - mean) / std)
        return math.log(max(above - below, floor))

    return log_mass


def exact_mass(level, mean, std):
    """The difference of two integrals in 40 digits, without a floor."""
    low = -mp.inf if level < -0.999 else (mp.mpf(level) - mp.mpf(1) / 255 - mean) / std
    high = mp.inf if level > 0.999 else (mp.mpf(level) + mp.mpf(1) / 255 - mean) / std
    if low > 0:
        low, high = -high, -low
    return float(mp.log((mp.erfc(-high / mp.sqrt(2)) - mp.erfc(-low / mp.sqrt(2))) / 2))


CASES["mass of a grey level"] = Case(
    is_the_mass,
    {"ours": our_mass, "typed": exact_mass},
    {
        "cdf by tanh": typed_mass(cdf=rough_phi),
        "ends closed": typed_mass(open_ends=False),
        "bins half as wide": typed_mass(half=1 / 510),
        "256 steps for 255": typed_mass(half=1 / 256),
        "a floor under the mass": typed_mass(),
    },
)


# A kernel takes (net, x0, t, eps) on the chain and gives the training loss for noise prediction.


def is_the_simple_loss(loss):
    """Zero for a net that says ε, 4 for one that is off by 2, and what it is shown has the mean and noise of q(x_t | x_0)."""
    eps, x0, t = tensor([0.5, -1.0], [2.0, 0.1]), tensor([0.3, -0.8], [0.3, -0.8]), torch.tensor([3, 17])
    shown = []

    def net(shift):
        def call(xt, u):
            shown.append((xt, u))
            return eps + shift

        return call

    near(loss(net(0.0), x0, t, eps), 0.0)
    near(loss(net(2.0), x0, t, eps), 4.0)
    root = np.sqrt(ABAR[[3, 17]])[:, None]
    near(shown[0][0], root * x0.numpy() + np.sqrt(1 - root**2) * eps.numpy())
    near(shown[0][1], [3 / 20, 17 / 20], 1e-6)


def typed_loss(scale=np.sqrt, spread=np.sqrt, time=lambda t: t / 20, target=lambda eps, x0: eps, reduce=torch.mean):
    def loss(net, x0, t, eps):
        abar = ABAR[t.numpy()]
        mixed = torch.from_numpy(scale(abar))[:, None] * x0 + torch.from_numpy(spread(1 - abar))[:, None] * eps
        return reduce((net(mixed, time(t)) - target(eps, x0)) ** 2).item()

    return loss


CASES["training loss"] = Case(
    is_the_simple_loss,
    {"ours": lambda net, x0, t, eps: simple(Denoiser(net, CHAIN, "eps"), x0, t, eps).item(), "typed": typed_loss()},
    {
        "ᾱ for √ᾱ": typed_loss(scale=lambda a: a),
        "1 − ᾱ for √(1 − ᾱ)": typed_loss(spread=lambda a: a),
        "t not scaled": typed_loss(time=lambda t: t),
        "t counted from 0": typed_loss(time=lambda t: (t - 1) / 20),
        "x_0 as target": typed_loss(target=lambda eps, x0: x0),
        "sum for mean": typed_loss(reduce=torch.sum),
    },
)


# The bound ------------------------------------------------------------------------------------------------------------
# A kernel takes (x0, alpha, sigma, std), one sample of the shape (1, D), and gives L_T against N(0, std²).


def is_the_prior_term(prior):
    """torch's KL divergence of the two normals; 0 where they are the same."""
    x0 = tensor([0.5, -1.0, 0.25])
    for t, std in ((20, 1.0), (7, 1.0), (12, 0.4), (3, 5.0)):
        alpha, sigma = known("chain", t)
        p = Normal(tensor([0.0] * 3), std)
        near(prior(x0, alpha, sigma, std), kl_divergence(Normal(alpha * x0, sigma), p).sum().item())
    near(prior(0 * x0, 0.8, 0.6, 0.6), 0.0)


class Fixed(Cosine):
    """A path with just this α and σ."""

    def __init__(self, alpha, sigma):
        super().__init__()
        self.alpha = lambda t: torch.tensor(alpha, dtype=torch.float64)
        self.sigma = lambda t: torch.tensor(sigma, dtype=torch.float64)


def typed_prior(
    sign=-1.0, var=lambda s: s**2, square=lambda a, x: (a * x) ** 2, half=0.5, one=1.0, width=lambda s: s**2
):
    def prior(x0, alpha, sigma, std):
        ratio = var(sigma) / width(std)
        return half * sum(square(alpha, x) / width(std) + ratio - one + sign * math.log(ratio) for x in x0[0].tolist())

    return prior


def swapped_prior(x0, alpha, sigma, std):
    """KL(p ‖ q) for KL(q ‖ p)."""
    return kl_divergence(Normal(tensor([0.0] * 3), std), Normal(alpha * x0, sigma)).sum().item()


CASES["L_T"] = Case(
    is_the_prior_term,
    {
        "ours": lambda x0, alpha, sigma, std: prior_term(Fixed(alpha, sigma), x0, 1.0, std).item(),
        "typed": typed_prior(),
    },
    {
        "sign of the log": typed_prior(sign=1.0),
        "σ for σ²": typed_prior(var=lambda s: s),
        "α x_0² for α² x_0²": typed_prior(square=lambda a, x: a * x**2),
        "α for α² x_0²": typed_prior(square=lambda a, x: a),
        "x_0 not scaled": typed_prior(square=lambda a, x: x**2),
        "without ½": typed_prior(half=1.0),
        "without −1": typed_prior(one=0.0),
        "s for s²": typed_prior(width=lambda s: s),
        "prior always N(0, 1)": typed_prior(width=lambda s: 1.0),
        "mean over the values": lambda *args: typed_prior()(*args) / 3,
        "KL the other way round": swapped_prior,
    },
)


# A kernel takes (d, x0, generator), x0 of the shape (B, 1), and gives the terms on the chain, variance β: (T + 1, B).


def is_the_bound(terms):
    """Each term's mean for x̂_0 = c(t)·x_t in closed form, within 5 standard errors; first L_T, last L_0."""
    g = torch.Generator().manual_seed(0)
    n, c = 4000, 0.9 - 0.6 * np.arange(T + 1) / T
    x0 = 0.6 * torch.randn(n, 1, generator=g, dtype=torch.float64) + 0.3
    square, asked = 0.45, []
    out = terms(lambda xt, t: asked.append(t) or c[int(t)] * xt, x0, g)
    assert out.shape == (T + 1, n) and asked == list(range(T, 0, -1))
    expected = [0.5 * (ABAR[T] * square - ABAR[T] - math.log(1 - ABAR[T]))]
    for t in range(T, 0, -1):
        error = (1 - c[t] * math.sqrt(ABAR[t])) ** 2 * square + c[t] ** 2 * (1 - ABAR[t])
        beta, before = BETAS[t - 1], ABAR[t - 1]
        if t == 1:
            expected.append(error / (2 * beta) + 0.5 * math.log(2 * math.pi * beta))
        else:
            ratio = (1 - before) / (1 - ABAR[t])
            shift = before * beta / (1 - ABAR[t]) ** 2 * error
            expected.append(0.5 * (shift + ratio - 1 - math.log(ratio)))
    gap = (out.mean(1) - tensor(*expected)).abs()
    assert (gap <= 5 * out.std(1) / math.sqrt(n) + 1e-12).all()


def typed_bound(start=True, last=1.0, first=1.0, shown=0, told=0, spread=math.sqrt, model=lambda t: BETAS[t - 1]):
    """The terms in a loop, x̂_0 asked at t + `told` for the x_t of t + `shown`."""

    step = typed_term(model=model)

    def terms(d, x0, generator):
        rows = [first * typed_prior()(x[None], math.sqrt(ABAR[T]), math.sqrt(1 - ABAR[T]), 1.0) for x in x0]
        rows = [tensor(*rows)] if start else []
        for t in range(T, 0, -1):
            abar = ABAR[t + shown]
            eps = torch.randn(x0.shape, generator=generator, dtype=x0.dtype)
            xt = math.sqrt(abar) * x0 + spread(1 - abar) * eps
            row = step(x0[:, 0], d(xt, t + told)[:, 0], xt[:, 0], t)
            rows.append(last * row if t == 1 else row)
        return torch.stack(rows)

    return terms


CASES["bound"] = Case(
    is_the_bound,
    {
        "ours": lambda d, x0, g: bound(d, CHAIN, x0, CHAIN.times(T), generator=g),
        "typed": typed_bound(),
    },
    {
        "L_T missing": typed_bound(start=False),
        "sign of L_T": typed_bound(first=-1.0),
        "sign of L_0": typed_bound(last=-1.0),
        "L_0 missing": lambda d, x0, g: typed_bound()(d, x0, g)[:-1],
        "x_{t−1} for x_t": typed_bound(shown=-1),
        "denoiser asked at t − 1": typed_bound(told=-1),
        "1 − ᾱ for √(1 − ᾱ)": typed_bound(spread=lambda a: a),
        "weights of β̃": typed_bound(model=lambda t: tilde(t - 1, t) or BETAS[0]),
        "terms from 1 to T": lambda d, x0, g: typed_bound()(d, x0, g).flip(0),
    },
)


# A kernel takes (nats, x0) and gives bits for one value.


def counts_bits(bits):
    """An even guess over 2^k levels costs k bits for each value, however many samples there are."""
    for shape in ((1, 5), (7, 5), (3, 1, 4, 4), (2, 3, 4, 4)):
        values = math.prod(shape[1:])
        for k in (1, 8):
            near(
                bits(torch.full(shape[:1], values * math.log(2**k), dtype=torch.float64), torch.zeros(shape)),
                [k] * shape[0],
            )


CASES["bits"] = Case(
    counts_bits,
    {"ours": bits_per_dim, "typed": lambda nats, x0: nats / math.log(2) / math.prod(x0.shape[1:])},
    {
        "log 2 missing": lambda nats, x0: nats / x0[0].numel(),
        "times log 2": lambda nats, x0: nats * math.log(2) / x0[0].numel(),
        "batch counted in D": lambda nats, x0: nats / math.log(2) / x0.numel(),
        "D missing": lambda nats, x0: nats / math.log(2),
        "channels not counted": lambda nats, x0: nats / math.log(2) / math.prod(x0.shape[-2:]),
        "log 256 for log 2": lambda nats, x0: nats / math.log(256) / x0[0].numel(),
    },
)


# A learned variance ---------------------------------------------------------------------------------------------------
# A kernel takes (said, s, t), what the network says in [−1, 1], and gives the variance of the step from t to s on the chain.


def is_between_in_logs(variance):
    """−1 stands for β̃ and 1 for β, of this very step, and 0 for their geometric mean; into the data it is β, for it has no log 0."""
    for s, t in ((1, 2), (5, 6), (19, 20), (3, 9), (10, 20)):
        beta = 1 - ABAR[t] / ABAR[s]
        args = math.sqrt(ABAR[s]), math.sqrt(1 - ABAR[s]), math.sqrt(1 - beta), beta, 0.3, 0.7
        least = bayes_on_a_grid(*args)[1]
        for said, expected in (
            (-1.0, least),
            (1.0, beta),
            (0.0, math.sqrt(least * beta)),
            (0.5, (least * beta**3) ** 0.25),
        ):
            near(variance(said, s, t) / expected, 1.0, 1e-8)
    for said in (-1.0, 0.0, 1.0):
        near(variance(said, 0, 1) / BETAS[0], 1.0)


def our_learned_variance(said, s, t):
    net = Denoiser(lambda x, u: torch.cat([x, torch.full_like(x, said)], 1), CHAIN, "x0", learned_variance=True)
    return CHAIN.log_variance(s, t, net.with_variance(tensor([0.0]), t)[1]).exp().item()


def typed_learned(fraction=lambda said: (said + 1) / 2, mix=None, ends=None):
    """exp(v·log β + (1 − v)·log β̃), with one thing at a time to get wrong."""

    def variance(said, s, t):
        upper = 1 - ABAR[t] / ABAR[s]
        lower = tilde(s, t) or upper
        upper, lower = ends(s, t, upper, lower) if ends else (upper, lower)
        v = fraction(said)
        return mix(v, upper, lower) if mix else math.exp(v * math.log(upper) + (1 - v) * math.log(lower))

    return variance


def log_without_a_clip(said, s, t):
    with np.errstate(divide="ignore", invalid="ignore"):
        v, beta = np.float64((said + 1) / 2), 1 - ABAR[t] / ABAR[s]
        return float(np.exp(v * np.log(beta) + (1 - v) * np.log(np.float64(tilde(s, t)))))


CASES["learned variance"] = Case(
    is_between_in_logs,
    {"ours": our_learned_variance, "typed": typed_learned()},
    {
        "variances for logs": typed_learned(mix=lambda v, upper, lower: v * upper + (1 - v) * lower),
        "deviations for logs": typed_learned(
            mix=lambda v, upper, lower: (v * math.sqrt(upper) + (1 - v) * math.sqrt(lower)) ** 2
        ),
        "ends swapped": typed_learned(fraction=lambda said: (1 - said) / 2),
        "said taken for the fraction": typed_learned(fraction=lambda said: said),
        "half of the log": typed_learned(mix=lambda v, upper, lower: math.sqrt(upper**v * lower ** (1 - v))),
        "taken for the log-variance itself": lambda said, s, t: math.exp(said),
        "log of 0": log_without_a_clip,
        "one step's β for a skip": typed_learned(ends=lambda s, t, upper, lower: (BETAS[t - 1], lower)),
        "ᾱ_{t−1} for ᾱ_t in β̃": typed_learned(
            ends=lambda s, t, upper, lower: (upper, upper * (1 - ABAR[s]) / (1 - ABAR[t - 1]) if s else lower)
        ),
        "β throughout": typed_learned(mix=lambda v, upper, lower: upper),
    },
)


# A kernel takes (said, raw, x0, eps, t) of one sample on the chain, noise prediction and its variance, each (1, D): the hybrid loss.


def teaches_each_half_its_own(loss):
    """In the prediction the gradient is that of the mean squared error, bit by bit; in the variance's half it is the slope of
    the bound's term, torch's KL divergence, in bits for each value, with T times its weight 0.001 being 1."""
    x0, eps = tensor([0.4, -0.7, 0.1]), tensor([0.3, 1.2, -0.8])
    for t in (2, 7, 20):
        said, raw = tensor([0.5, 0.6, -0.2]).requires_grad_(), tensor([-0.4, 0.3, 0.8]).requires_grad_()
        first, second = torch.autograd.grad(
            loss(said, raw, x0, eps, t), [said, raw], allow_unused=True, materialize_grads=True
        )
        near(first, 2 * (said.detach() - eps) / 3, 1e-12)
        before, now, beta = ABAR[t - 1], ABAR[t], BETAS[t - 1]
        xt = math.sqrt(now) * x0 + math.sqrt(1 - now) * eps
        guess = (xt - math.sqrt(1 - now) * said.detach()) / math.sqrt(now)

        def mean(x0, before=before, now=now, beta=beta, xt=xt):
            return (math.sqrt(before) * beta * x0 + math.sqrt(1 - beta) * (1 - before) * xt) / (1 - now)

        share = (raw + 1) / 2
        p = Normal(mean(guess), (beta**share * tilde(t - 1, t) ** (1 - share)).sqrt())
        bits = kl_divergence(Normal(mean(x0), math.sqrt(tilde(t - 1, t))), p).sum() / (3 * math.log(2))
        near(second, torch.autograd.grad(bits, raw)[0], 1e-8)
        away = (said.detach() - eps).square().mean() + bits.detach()
        near(loss(said, raw, x0, eps, t).detach(), away, 1e-8)


def our_hybrid(said, raw, x0, eps, t):
    d = Denoiser(lambda x, u: torch.cat([said, raw], 1), CHAIN, "eps", learned_variance=True)
    return hybrid(d, x0, t - 1, t, eps)


def typed_hybrid(hold=lambda said, raw: (said.detach(), raw), unit=None, each=3, weight=1.0, flip=False, wide=False):
    def loss(said, raw, x0, eps, t):
        before, now, beta = ABAR[t - 1], ABAR[t], BETAS[t - 1]
        kept, told = hold(said, raw)
        xt = math.sqrt(now) * x0 + math.sqrt(1 - now) * eps
        gap = math.sqrt(before) * beta / (1 - now) * (x0 - (xt - math.sqrt(1 - now) * kept) / math.sqrt(now))
        least, v = tilde(t - 1, t), (told + 1) / 2
        log_var = v * math.log(beta) + (1 - v) * math.log(least)
        kl = 0.5 * (gap.square() / log_var.exp() + (math.log(least) - log_var).exp() - 1 - math.log(least) + log_var)
        if flip:
            kl = 0.5 * (gap.square() / least + (log_var - math.log(least)).exp() - 1 + math.log(least) - log_var)
        error = (torch.cat([said, raw], 1) - torch.cat([eps, 0 * raw], 1)).square() if wide else (said - eps).square()
        return error.mean() + weight * kl.sum() / (each * (unit or math.log(2)))

    return loss


CASES["hybrid loss"] = Case(
    teaches_each_half_its_own,
    {"ours": our_hybrid, "typed": typed_hybrid()},
    {
        "the mean not held": typed_hybrid(hold=lambda said, raw: (said, raw)),
        "the variance held": typed_hybrid(hold=lambda said, raw: (said.detach(), raw.detach())),
        "both held the wrong way": typed_hybrid(hold=lambda said, raw: (said, raw.detach())),
        "nats for bits": typed_hybrid(unit=1.0),
        "sum and not mean over values": typed_hybrid(each=1),
        "0.001 without T": typed_hybrid(weight=1e-3),
        "T without 0.001": typed_hybrid(weight=float(T)),
        "no bound": typed_hybrid(weight=0.0),
        "KL the other way round": typed_hybrid(flip=True),
        "the simple loss over both halves": typed_hybrid(wide=True),
    },
)


# Guidance -------------------------------------------------------------------------------------------------------------
# Four values in a sample; N(m_y, v_y) for the labels 0 and 1, equally often. A kernel gives ε̂ for the label 1 and the weight w.

CENTRES, WIDTHS = tensor([0.8, -0.5, 0.3, 0.6], [-0.4, 0.7, 0.1, -0.9]), tensor(0.3, 0.5)
NOISE_LEVELS = [(math.cos(angle), math.sin(angle)) for angle in (0.4, 0.9, 1.3)]


def log_labelled(x, alpha, sigma):
    """log p_t(x, y) of both labels, (B, 2), up to a number."""
    var = alpha**2 * WIDTHS + sigma**2
    return -0.5 * (x[:, None] - alpha * CENTRES).square().sum(2) / var - 2 * var.log()


def slope_of(function, x):
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(function(x).sum(), x)[0]


def label_odds(alpha, sigma):
    return lambda x: log_labelled(x, alpha, sigma).log_softmax(1)[:, 1]


def leads_to_the_label(kernel_of):
    def oracle(kernel):
        """ε̂ = −σ·∇[log p_t(x) + w·log p_t(y | x)] by autograd, at three noise levels; w = 1 is the conditional model, 0 the other."""
        for alpha, sigma in NOISE_LEVELS:
            x = tensor([0.3, -0.6, 0.9, 0.2], [1.4, 0.8, -1.1, 0.5], [-0.7, 0.1, 0.4, -1.6])
            for w in (0.0, 1.0, 0.5, 3.0):

                def aim(x, w=w, alpha=alpha, sigma=sigma):
                    return log_labelled(x, alpha, sigma).logsumexp(1) + w * label_odds(alpha, sigma)(x)

                near(kernel_of(kernel, x, alpha, sigma, w), -sigma * slope_of(aim, x), 1e-8)

    return oracle


def noise_of(x, alpha, sigma, label=None):
    """The exact ε̂ with the label or without."""

    def log_p(x):
        joint = log_labelled(x, alpha, sigma)
        return joint.logsumexp(1) if label is None else joint[:, label]

    return -sigma * slope_of(log_p, x)


def of_two_noises(kernel, x, alpha, sigma, w):
    return kernel(noise_of(x, alpha, sigma, 1), noise_of(x, alpha, sigma), w, x, alpha, sigma)


def our_classifier_free(cond, uncond, w, x, alpha, sigma):
    guesses = [lambda x, t, eps=eps: (x - sigma * eps) / alpha for eps in (cond, uncond)]
    x0 = classifier_free(*guesses, w)(x, 2 / math.pi * math.atan2(sigma, alpha))
    return (x - alpha * x0) / sigma


def on_three_of_four(cond, uncond, w, *_):
    """The last channel was left out, as it holds a variance in another model."""
    guided = uncond + w * (cond - uncond)
    return torch.cat([guided[:, :3], cond[:, 3:]], 1)


# A kernel takes (ε̂ with the label, ε̂ without, w, x, α, σ).
CASES["guidance without a classifier"] = Case(
    leads_to_the_label(of_two_noises),
    {"ours": our_classifier_free, "typed": lambda c, u, w, *_: (1 - w) * u + w * c},
    {
        "the other paper's weight": lambda c, u, w, *_: (1 + w) * c - w * u,
        "roles swapped": lambda c, u, w, *_: (1 - w) * c + w * u,
        "three channels of four": on_three_of_four,
        "added, not moved towards": lambda c, u, w, *_: u + w * c,
        "difference the wrong way round": lambda c, u, w, *_: u + w * (u - c),
        "starts from the conditional": lambda c, u, w, *_: c + w * (c - u),
        "cut to an interpolation": lambda c, u, w, *_: u + min(w, 1.0) * (c - u),
        "rescaled to the conditional's size": lambda c, u, w, *_: (u + w * (c - u)) * c.norm() / (u + w * (c - u)).norm(),
        "clipped before it was guided": lambda c, u, w, x, a, s: (
            x - a * sum(f * ((x - s * e) / a).clamp(-0.5, 0.5) for f, e in ((1 - w, u), (w, c)))
        ) / s,
    },
)  # fmt: skip


def of_a_noise_and_a_classifier(kernel, x, alpha, sigma, w):
    return kernel(noise_of(x, alpha, sigma), label_odds(alpha, sigma), w, x, alpha, sigma)


def our_classifier(eps, log_prob, w, x, alpha, sigma):
    t = 2 / math.pi * math.atan2(sigma, alpha)
    x0 = classifier(lambda x, t: (x - sigma * eps) / alpha, Cosine(), lambda x, t: log_prob(x), w)(x, t)
    return (x - alpha * x0) / sigma


def typed_classifier(factor=lambda alpha, sigma: sigma, at=lambda x, x0, alpha, sigma: x, of=lambda f: f, reduce=1.0):
    def kernel(eps, log_prob, w, x, alpha, sigma):
        x0 = (x - sigma * eps) / alpha
        return eps - reduce * w * factor(alpha, sigma) * slope_of(of(log_prob), at(x, x0, alpha, sigma))

    return kernel


def mean_of_a_step(x, x0, alpha, sigma):
    """Of the posterior at a time with nine tenths of the angle."""
    angle = 0.9 * math.atan2(sigma, alpha)
    keep = alpha / math.cos(angle) * math.sin(angle) ** 2 / sigma**2
    return math.cos(angle) * x0 + keep * (x - alpha * x0)


# A kernel takes (ε̂ without a label, x ↦ log p_t(y | x), w, x, α, σ).
CASES["guidance by a classifier"] = Case(
    leads_to_the_label(of_a_noise_and_a_classifier),
    {"ours": our_classifier, "typed": typed_classifier()},
    {
        "gradient at the mean of the step": typed_classifier(at=mean_of_a_step),
        "gradient at x̂_0": typed_classifier(at=lambda x, x0, alpha, sigma: x0),
        "σ dropped, as on the slide": typed_classifier(factor=lambda alpha, sigma: 1.0),
        "σ² for σ": typed_classifier(factor=lambda alpha, sigma: sigma**2),
        "σ/α for σ": typed_classifier(factor=lambda alpha, sigma: sigma / alpha),
        "sign": typed_classifier(factor=lambda alpha, sigma: -sigma),
        "p for log p": typed_classifier(of=lambda f: lambda x: f(x).exp()),
        "mean over the batch": typed_classifier(reduce=1 / 3),
        "not used at all": lambda eps, log_prob, w, x, alpha, sigma: eps,
        "the label's score for its odds": lambda eps, log_prob, w, x, a, s: eps + w * noise_of(x, a, s, 1),
        "a classifier of clean data": lambda eps, log_prob, w, x, a, s: eps - w * s * slope_of(label_odds(1.0, 0.0), x),
    },
)


# Distillation ---------------------------------------------------------------------------------------------------------
# On the cosine path. A kernel takes (teacher, x, t, m, s), the teacher (x, t) → x̂_0, and gives the target of one step for two.


def on_circle(*times):
    """(α, σ) of each time."""
    return [(math.cos(math.pi / 2 * t), math.sin(math.pi / 2 * t)) for t in times]


def step_on_circle(x, x0, t, s):
    (a_t, s_t), (a_s, s_s) = on_circle(t, s)
    return a_s * x0 + s_s * (x - a_t * x0) / s_t


def bent(x, t):
    """A teacher whose guesses lie within [−1, 1] and change with state and time."""
    return torch.sin(1.7 * x + 0.4) * (1 - 0.5 * t)


def ends_where_two_steps_end(target):
    """The student's step to it ends where the teacher's two end; also from noise alone, to the data, and where σ_s is tiny."""
    x = tensor(0.3, -1.2, 0.8, 2.1)
    for t, m, s in (
        (0.75, 0.5, 0.25),
        (1.0, 0.75, 0.5),
        (0.5, 0.25, 0.0),
        (1.0, 0.5, 0.0),
        (0.5, 0.3, 0.01),
        (0.9, 0.8, 0.1),
    ):
        asked, grad = [], x.clone().requires_grad_()

        def teacher(x, t, asked=asked):
            asked.append(t)
            return bent(x, t)

        found = target(teacher, grad, t, m, s)
        assert len(asked) == 2 and not found.requires_grad
        xm = step_on_circle(x, bent(x, t), t, m)
        near(step_on_circle(x, found, t, s), step_on_circle(xm, bent(xm, m), m, s))
        near(found, found.clamp(-1, 1))


def typed_two(
    first=lambda t, m, s: m, second=lambda t, m, s: s, at=lambda t, m: m, state=lambda x, xm: xm, target=None
):
    """Two steps of the teacher and the guess of a student that makes them in one; with `target`, what it is told instead."""

    @torch.no_grad()
    def kernel(teacher, x, t, m, s):
        x_a = teacher(x, t)
        xm = step_on_circle(x, x_a, t, first(t, m, s))
        x_b = teacher(state(x, xm), at(t, m))
        xs = step_on_circle(xm, x_b, first(t, m, s), second(t, m, s))
        (a_t, s_t), (a_m, s_m), (a_s, s_s) = on_circle(t, m, s)
        if target:
            return target(x, x_a, x_b, xs, *map(np.float64, (a_t, s_t, a_m, s_m, a_s, s_s)))
        return (s_t * xs - s_s * x) / (s_t * a_s - s_s * a_t)

    return kernel


def mean_of_guesses(weight):
    """(1 − weight)·first + weight·second."""
    return typed_two(target=lambda x, x_a, x_b, xs, *levels: x_a + weight(*levels) * (x_b - x_a))


def by_the_noise_at_the_end(x, x_a, x_b, xs, a_t, s_t, a_m, s_m, a_s, s_s):
    """ε from x_t by the levels at s, and v of it: it divides by σ_s."""
    eps = (x - a_s * x_b) / torch.tensor(s_s)
    return a_t * x - s_t * (a_s * eps - s_s * x_b)


def special_case(index):
    """The published form, with its own line for the step into the data: there the second guess is the target."""

    def target(x, x_a, x_b, xs, a_t, s_t, a_m, s_m, a_s, s_s):
        general = (xs - s_s / s_t * x) / (a_s - s_s / s_t * a_t)
        return index(general, x_a, x_b, xs, a_t, s_s)

    return typed_two(target=target)


def gradient_kept(teacher, x, t, m, s):
    xm = step_on_circle(x, teacher(x, t), t, m)
    xs = step_on_circle(xm, teacher(xm, m), m, s)
    (a_t, s_t), (a_s, s_s) = on_circle(t, s)
    return (s_t * xs - s_s * x) / (s_t * a_s - s_s * a_t)


CASES["one step for two"] = Case(
    ends_where_two_steps_end,
    {
        "ours": lambda teacher, x, t, m, s: progressive_target(teacher, Cosine(), x, t, m, s),
        "typed": typed_two(),
        "a mean by lengths": mean_of_guesses(lambda a_t, s_t, a_m, s_m, a_s, s_s: (
            1 - (a_m / s_m - a_t / s_t) / (a_s / s_s - a_t / s_t) if s_s else 1.0
        )),
        "published, with its case i = 0": special_case(lambda general, x_a, x_b, xs, a_t, s_s: x_b if s_s == 0 else general),
    },
    {
        "t' and t'' swapped": typed_two(first=lambda t, m, s: max(s, 1e-9), second=lambda t, m, s: m),
        "divides by a tiny σ_s": typed_two(target=by_the_noise_at_the_end),
        "i = 0 is its first guess": special_case(lambda general, x_a, x_b, xs, a_t, s_s: x_a if s_s == 0 else general),
        "i = 0 at the end with the noise": special_case(
            lambda general, x_a, x_b, xs, a_t, s_s: x_b if abs(a_t) < 1e-9 else general
        ),
        "i = 0 everywhere": special_case(lambda general, x_a, x_b, xs, a_t, s_s: x_b),
        "i = 0 is left out": special_case(
            lambda general, x_a, x_b, xs, a_t, s_s: 0 * x_b if s_s == 0 else general
        ),
        "where it ends, not the guess": special_case(lambda general, x_a, x_b, xs, a_t, s_s: xs),
        "second guess with the first state": typed_two(state=lambda x, xm: x),
        "second guess at the first time": typed_two(at=lambda t, m: t),
        "plain mean": mean_of_guesses(lambda *levels: 0.5),
        "lengths the wrong way round": mean_of_guesses(lambda a_t, s_t, a_m, s_m, a_s, s_s: s_s / (s_s + s_t)),
        "first guess": mean_of_guesses(lambda *levels: 0.0),
        "ratio inverted": typed_two(target=lambda x, x_a, x_b, xs, a_t, s_t, a_m, s_m, a_s, s_s: (
            (s_s * xs - s_t * x) / (s_s * a_s - s_t * a_t)
        )),
        "plus for minus": typed_two(target=lambda x, x_a, x_b, xs, a_t, s_t, a_m, s_m, a_s, s_s: (
            (s_t * xs + s_s * x) / (s_t * a_s + s_s * a_t)
        )),
        "ratio of α": typed_two(target=lambda x, x_a, x_b, xs, a_t, s_t, a_m, s_m, a_s, s_s: (
            (xs - a_t / a_s * x) / (a_s - a_t / a_s * a_t)
        )),
        "levels of the middle": typed_two(target=lambda x, x_a, x_b, xs, a_t, s_t, a_m, s_m, a_s, s_s: (
            (s_m * xs - s_s * x) / (s_m * a_s - s_s * a_m)
        )),
        "gradient into the teacher": gradient_kept,
    },
)  # fmt: skip


# A kernel takes (α, σ), two tensors (B,), and gives the weight of an error in x̂_0.


def is_never_below_one(weight):
    """α²/σ² where that is above 1, and 1 elsewhere, α = 0 included; each sample by itself."""
    levels = [(0.96, 0.28), (0.6, 0.8), (0.0, 1.0), (0.8, 0.6)]
    found = weight(*(tensor(*column) for column in zip(*levels, strict=True)))
    near(found, [max(a * a / s / s, 1.0) for a, s in levels])


def our_weight(alpha, sigma):
    return truncated_snr(Cosine(), 2 / math.pi * torch.atan2(sigma, alpha))


CASES["truncated SNR"] = Case(
    is_never_below_one,
    {"ours": our_weight, "typed": lambda a, s: torch.where(a > s, a * a / (s * s), 1.0)},
    {
        "SNR alone": lambda a, s: (a / s) ** 2,
        "cut from above": lambda a, s: ((a / s) ** 2).clamp(max=1),
        "without the square": lambda a, s: (a / s).clamp(min=1),
        "inverted": lambda a, s: ((s / a) ** 2).clamp(min=1),
        "SNR + 1": lambda a, s: (a / s) ** 2 + 1,
        "cut at another number": lambda a, s: ((a / s) ** 2).clamp(min=5),
        "cut over the batch": lambda a, s: ((a / s) ** 2).mean().clamp(min=1).expand(4),
    },
)


# A kernel takes (student, teacher, x, t, s) and gives the consistency target.


def agrees_one_step_on(target):
    """What the student says at s where the teacher's step ends, without a gradient for either; at s = 0 that state itself."""
    x, w = tensor(0.3, -1.2, 0.8), tensor(0.7).requires_grad_()
    for t, s in ((0.75, 0.5), (1.0, 0.75), (0.25, 0.0)):
        found = target(lambda x, t: (1 - t) * x + t * w * torch.cos(x), bent, x, t, s)
        xs = step_on_circle(x, bent(x, t), t, s)
        assert not found.requires_grad
        near(found, ((1 - s) * xs + s * 0.7 * torch.cos(xs)))


def typed_consistency(at=lambda t, s: s, state=lambda x, xs: xs, by=lambda student, teacher: teacher, detach=True):
    def target(student, teacher, x, t, s):
        xs = step_on_circle(x, by(student, teacher)(x, t), t, s)
        out = student(state(x, xs), at(t, s))
        return out.detach() if detach else out

    return target


CASES["consistency"] = Case(
    agrees_one_step_on,
    {"ours": lambda f, d, x, t, s: consistency_target(f, d, Cosine(), x, t, s), "typed": typed_consistency()},
    {
        "asked at t": typed_consistency(at=lambda t, s: t),
        "asked of x_t": typed_consistency(state=lambda x, xs: x),
        "step by the student": typed_consistency(by=lambda student, teacher: student),
        "with a gradient": typed_consistency(detach=False),
        "the teacher's guess": lambda f, d, x, t, s: d(x, t),
        "the teacher's next guess": lambda f, d, x, t, s: d(step_on_circle(x, d(x, t), t, s), s),
        "where the step ends": lambda f, d, x, t, s: step_on_circle(x, d(x, t), t, s),
    },
)


# A kernel takes (x, x0, t, low, s, noise), goes down to low and comes back up to s.


def comes_back_up(step):
    """Mean and variance of a DDIM step and of the forward kernel, composed with numbers; all that is added keeps the marginal."""
    for t, low, s in ((1.0, 0.5, 0.75), (0.8, 0.0, 0.6), (0.5, 0.25, 0.25), (0.75, 0.25, 0.5)):
        (a_t, s_t), (a_l, s_l), (a_s, s_s) = on_circle(t, low, s)
        mean = a_s / a_l * (a_l * 0.4 + s_l * (1.3 - a_t * 0.4) / s_t)
        spread = math.sqrt(max(s_s**2 - (a_s / a_l * s_l) ** 2, 0.0))
        for z in (0.0, 1.0, -0.7):
            near(step(tensor(1.3), tensor(0.4), t, low, s, tensor(z)), [mean + spread * z])


def typed_back(up=lambda a_s, a_l: a_s / a_l, spread=None, first=lambda low, s: low):
    def step(x, x0, t, low, s, noise):
        (a_l, s_l), (a_s, s_s) = on_circle(low, s)
        factor = up(a_s, a_l)
        std = spread(a_s, s_s, a_l, s_l) if spread else math.sqrt(max(s_s**2 - (a_s / a_l * s_l) ** 2, 0.0))
        return factor * step_on_circle(x, x0, t, first(low, s)) + std * noise

    return step


CASES["down and up again"] = Case(
    comes_back_up,
    {"ours": lambda x, x0, t, low, s, z: overshoot_step(Cosine(), x, x0, t, low, s, z), "typed": typed_back()},
    {
        "only to s": typed_back(first=lambda low, s: s),
        "not scaled on the way up": typed_back(up=lambda a_s, a_l: 1.0),
        "α_s for α_s/α_l": typed_back(up=lambda a_s, a_l: a_s),
        "inverted": typed_back(up=lambda a_s, a_l: a_l / a_s),
        "variances subtracted": typed_back(spread=lambda a_s, s_s, a_l, s_l: math.sqrt(s_s**2 - s_l**2)),
        "deviations subtracted": typed_back(spread=lambda a_s, s_s, a_l, s_l: s_s - a_s / a_l * s_l),
        "all the noise of s": typed_back(spread=lambda a_s, s_s, a_l, s_l: s_s),
        "variance for deviation": typed_back(spread=lambda a_s, s_s, a_l, s_l: s_s**2 - (a_s / a_l * s_l) ** 2),
        "no noise": typed_back(spread=lambda *levels: 0.0),
        "factor not squared": typed_back(spread=lambda a_s, s_s, a_l, s_l: math.sqrt(s_s**2 - a_s / a_l * s_l**2)),
    },
)


# Scores ---------------------------------------------------------------------------------------------------------------
# A kernel takes two clouds, (N, D) and (M, D).


def is_the_frechet_distance(distance):
    """By singular values: with x = (a − m_a)/√(N − 1) the trace of the root is the nuclear norm of x·yᵀ."""
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 4, generator=g, dtype=torch.float64) for n in (9, 30))
    b = b @ torch.randn(4, 4, generator=g, dtype=torch.float64) + tensor(2.0, -1.0, 0.0, 0.5)
    (m_a, x), (m_b, y) = ((p.mean(0), (p - p.mean(0)).numpy() / math.sqrt(len(p) - 1)) for p in (a, b))
    gap = (m_a - m_b).square().sum().item()
    near(distance(a, b), gap + (x**2).sum() + (y**2).sum() - 2 * np.linalg.norm(x @ y.T, "nuc"), 1e-8)
    near(distance(a, a + 3), 36.0, 1e-8)


def typed_frechet(root=np.sqrt, factor=2.0, gap=lambda m: (m**2).sum(), unbiased=1, product=lambda a, b: a @ b):
    def distance(a, b):
        a, b = a.numpy(), b.numpy()
        cov_a, cov_b = (np.cov(x, rowvar=False, ddof=unbiased) for x in (a, b))
        overlap = root(np.linalg.eigvals(product(cov_a, cov_b)).real.clip(min=0)).sum()  # those of a root are the roots
        return gap(a.mean(0) - b.mean(0)) + np.trace(cov_a + cov_b) - factor * overlap

    return distance


CASES["Fréchet distance"] = Case(
    is_the_frechet_distance,
    {"ours": frechet_distance, "typed": typed_frechet()},
    {
        "without the root": typed_frechet(root=lambda values: values),
        "without the 2": typed_frechet(factor=1.0),
        "means not squared": typed_frechet(gap=lambda m: math.sqrt((m**2).sum())),
        "means' absolute differences": typed_frechet(gap=lambda m: np.abs(m).sum()),
        "N for N − 1": typed_frechet(unbiased=0),
        "root entry by entry": lambda a, b: (
            typed_frechet(factor=0.0)(a, b) - 2 * np.trace(np.sqrt(np.abs(a.T.cov().numpy() @ b.T.cov().numpy())))
        ),
        "product entry by entry": typed_frechet(product=lambda a, b: a * b),
        "root of the distance": lambda a, b: math.sqrt(typed_frechet()(a, b)),
        "covariances left out": lambda a, b: (a.mean(0) - b.mean(0)).square().sum().item(),
    },
)


# A kernel takes logits, (N, classes).


def is_the_inception_score(score):
    """exp(H(mean of p) − mean of H(p)), with entropies in loops; 1 and the number of classes at the ends."""
    logits = tensor([2.0, 0.0, -1.0], [0.3, 0.1, 0.0], [-4.0, 1.0, 1.5], [2.0, 0.5, 0.0])
    rows = [[math.exp(value) for value in row] for row in logits.tolist()]
    rows = [[value / sum(row) for value in row] for row in rows]
    mean = [sum(column) / 4 for column in zip(*rows, strict=True)]
    own = sum(-sum(p * math.log(p) for p in row) for row in rows) / 4
    near(score(logits), math.exp(-sum(p * math.log(p) for p in mean) - own), 1e-6)
    near(score(torch.ones(5, 3, dtype=torch.float64)), 1.0, 1e-6)
    near(score(1000 * torch.eye(4, dtype=torch.float64)), 4.0, 1e-6)


def typed_score(swapped=False, end=math.exp, log=torch.log, axis=0, first=lambda logits: logits.softmax(1)):
    def score(logits):
        p = first(logits).clamp(min=1e-300)
        mean = p.mean(axis, keepdim=True).expand_as(p)
        if swapped:
            p, mean = mean, p
        return end((p * (log(p) - log(mean))).sum(1).mean().item())

    return score


CASES["inception score"] = Case(
    is_the_inception_score,
    {"ours": inception_score, "typed": typed_score()},
    {
        "KL the other way round": typed_score(swapped=True, end=lambda kl: math.exp(min(kl, 700.0))),
        "without exp": typed_score(end=float),
        "log₂": typed_score(log=torch.log2),
        "mean over classes": typed_score(axis=1),
        "softmax over samples": typed_score(first=lambda logits: logits.softmax(0)),
        "sigmoid for softmax": typed_score(first=torch.sigmoid),
        "logits as probabilities": typed_score(first=lambda logits: logits),
        "own entropy only": lambda logits: math.exp(torch.special.entr(logits.softmax(1)).sum(1).mean().item()),
    },
)


# A kernel takes (real, generated, k) and gives (precision, recall).


def is_precision_recall(scores):
    """Points on a line: real 0, 1, 3, 7 have radius 1, 1, 2, 4 for k = 1; generated 3.5, 4, 20, 40, 41 have ½, ½, 16, 1, 1."""
    real, generated = tensor(0.0, 1.0, 3.0, 7.0)[:, None], tensor(3.5, 4.0, 20.0, 40.0, 41.0)[:, None]
    near(scores(real, generated, 1), (2 / 5, 1 / 2))
    near(scores(generated, real, 1), (1 / 2, 2 / 5))
    near(scores(real, generated, 2), (2 / 5, 1.0))
    near(scores(real, real, 3), (1.0, 1.0))
    near(scores(real, real + 1000, 3), (0.0, 0.0))


def typed_share(neighbour=0, power=1, owner="territory", closed=True):
    def share(points, territory, k):
        inside = 0
        for point in points[:, 0].tolist():
            balls = territory[:, 0].tolist()
            if owner == "points":  # the point's own ball, among its like
                reach = sorted(abs(point - other) for other in points[:, 0].tolist())[k]
                inside += any(abs(point - centre) <= reach for centre in balls)
                continue
            for centre in balls:
                radius = sorted(abs(centre - other) for other in balls)[k + neighbour] ** power
                if abs(point - centre) < radius or closed and abs(point - centre) == radius:
                    inside += 1
                    break
        return inside / len(points)

    return share


def typed_scores(swapped=False, **options):
    def scores(real, generated, k):
        share = typed_share(**options)
        out = share(generated, real, k), share(real, generated, k)
        return out[::-1] if swapped else out

    return scores


CASES["precision and recall"] = Case(
    is_precision_recall,
    {"ours": precision_recall, "typed": typed_scores()},
    {
        "itself counted as a neighbour": typed_scores(neighbour=-1),
        "one neighbour too far": typed_scores(neighbour=1),
        "swapped": typed_scores(swapped=True),
        "squared radius": typed_scores(power=2),
        "radius of the point, not of the ball": typed_scores(owner="points"),
        "one number for both": lambda *args: (typed_scores()(*args)[0],) * 2,
        "share of the other set": lambda real, generated, k: tuple(
            np.array(typed_scores()(real, generated, k)) * (len(generated) / len(real), len(real) / len(generated))
        ),
    },
)


# Features of time -----------------------------------------------------------------------------------------------------
# A kernel takes times in [0, 1], shape (B,), and gives 64 features.


def tells_times_apart(features):
    """Every pair of neighbouring times out of 1000 differs by a clear distance, and all features lie in [−1, 1]."""
    out = features(torch.arange(1001, dtype=torch.float64) / 1000)
    assert out.shape == (1001, 64) and out.abs().max() <= 1
    assert (out[1:] - out[:-1]).norm(dim=1).min() > 0.3


def typed_sinusoids(scale):
    def features(t):
        angle = scale * t[:, None] * 10_000.0 ** (-torch.arange(32) / 32)
        return torch.cat([angle.cos(), angle.sin()], 1)

    return features


CASES["features of time"] = Case(
    tells_times_apart,
    {"ours": lambda t: sinusoids(t, 64), "typed": typed_sinusoids(1000.0)},
    {"t in [0, 1] as it is": typed_sinusoids(1.0), "t itself": lambda t: t[:, None].expand(-1, 64)},
)


# How far two distributions are apart ----------------------------------------------------------------------------------
# A kernel takes mean and covariance of p and of q, or mean and log-variance, or two log-densities on a grid.


def is_gaussian_kl(divergence):
    """In three dimensions, with full covariances, it is torch's."""
    root_p, root_q = (
        tensor([1.0, 0, 0], [0.5, 0.6, 0], [-0.3, 0.2, 0.9]),
        tensor([0.7, 0, 0], [-0.4, 1.2, 0], [0.1, 0.3, 0.5]),
    )
    p, q = (tensor(0.3, -1.0, 0.5), root_p @ root_p.T), (tensor(-0.2, 0.4, 0.1), root_q @ root_q.T)
    near(divergence(*p, *q), kl_divergence(MultivariateNormal(*p), MultivariateNormal(*q)))


def typed_gaussian_kl(trace=1.0, shift="q", dim=3, log_det=1.0, factor=0.5, change=lambda c: c):
    def divergence(mean_p, cov_p, mean_q, cov_q):
        cov_p, cov_q = change(cov_p), change(cov_q)
        away, by = mean_q - mean_p, {"p": cov_p, "q": cov_q}[shift].inverse()
        dets = torch.logdet(cov_q) - torch.logdet(cov_p)
        return factor * (trace * (cov_q.inverse() @ cov_p).trace() + away @ by @ away - dim + log_det * dets)

    return divergence


CASES["KL of two Gaussians"] = Case(
    is_gaussian_kl,
    {"ours": gaussian_kl, "typed": typed_gaussian_kl()},
    {
        "swapped": lambda mean_p, cov_p, mean_q, cov_q: gaussian_kl(mean_q, cov_q, mean_p, cov_p),
        "deviations for variances": typed_gaussian_kl(change=lambda c: c @ c),
        "no half": typed_gaussian_kl(factor=1.0),
        "dimension left out": typed_gaussian_kl(dim=0),
        "log-determinants the wrong way round": typed_gaussian_kl(log_det=-1.0),
        "shift measured by p": typed_gaussian_kl(shift="p"),
        "no trace": typed_gaussian_kl(trace=0.0, dim=0),
    },
)


def is_standard_kl(divergence):
    """For each latent by itself it is torch's, with the variance the exponential of what is given."""
    mean, log_var = tensor([0.5, -1.0, 0.0], [2.0, 0.1, -0.3]), tensor([-1.0, 0.7, 0.0], [-3.0, 1.5, -0.2])
    near(divergence(mean, log_var), kl_divergence(Normal(mean, (log_var / 2).exp()), Normal(0.0, 1.0)))


CASES["KL to the prior"] = Case(
    is_standard_kl,
    {"ours": standard_kl, "typed": lambda m, s: -0.5 * (1 + s - m**2 - s.exp())},
    {
        "no half": lambda m, s: m**2 + s.exp() - 1 - s,
        "sign of the log-variance": lambda m, s: 0.5 * (m**2 + s.exp() - 1 + s),
        "sign of all": lambda m, s: 0.5 * (1 + s - m**2 - s.exp()),
        "deviation for variance": lambda m, s: 0.5 * (m**2 + (s / 2).exp() - 1 - s),
        "log-variance taken as log-deviation": lambda m, s: 0.5 * (m**2 + (2 * s).exp() - 1 - 2 * s),
        "swapped": lambda m, s: 0.5 * ((1 + m**2) / s.exp() - 1 + s),
        "mean over the latents": lambda m, s: standard_kl(m, s).mean(1, keepdim=True).expand(m.shape),
        "mean not squared": lambda m, s: 0.5 * (m + s.exp() - 1 - s),
    },
)


def is_jensen_shannon(divergence):
    """log 2 for densities apart; 0 for equal ones; of two Gaussians that of scipy's integral; the same both ways round."""
    apart = tensor(0.5, 0.5, 0.0, 0.0).log()
    near(divergence(apart, apart.flip(0), 1.0), math.log(2))
    p, q, x = norm(-0.5, 0.8), norm(1.0, 1.5), np.linspace(-14, 16, 6001)

    def integrand(x):
        a, b = p.pdf(x), q.pdf(x)
        return 0.5 * a * math.log(2 * a / (a + b)) + 0.5 * b * math.log(2 * b / (a + b))

    log_p, log_q = (torch.from_numpy(law.logpdf(x)) for law in (p, q))
    exact = scipy.integrate.quad(integrand, -12, 14, points=[-0.5, 1.0], epsabs=1e-13, limit=200)[0]
    near(divergence(log_p, log_q, 0.005), exact)
    near(divergence(log_q, log_p, 0.005), exact)
    near(divergence(log_p, log_p, 0.005), 0.0)


def typed_jensen_shannon(middle=lambda p, q: (p + q) / 2, share=0.5, swapped=False):
    def one(p, m):
        p, m = (m, p) if swapped else (p, m)
        return (p * torch.where(p > 0, p / m, 1.0).log()).sum()

    def divergence(log_p, log_q, cell):
        p, q = log_p.exp(), log_q.exp()
        m = middle(p, q)
        return share * (one(p, m) + one(q, m)) * cell

    return divergence


CASES["Jensen–Shannon"] = Case(
    is_jensen_shannon,
    {"ours": jensen_shannon, "typed": typed_jensen_shannon()},
    {
        "no half": typed_jensen_shannon(share=1.0),
        "the middle is the sum": typed_jensen_shannon(middle=lambda p, q: p + q),
        "the middle is the geometric mean": typed_jensen_shannon(middle=lambda p, q: (p * q).sqrt()),
        "from the middle": typed_jensen_shannon(swapped=True),
        "without the cell": lambda p, q, cell: typed_jensen_shannon()(p, q, 1.0),
        "0 · log 0": lambda p, q, cell: (
            0.5 * cell * sum((a.exp() * (a - ((p.exp() + q.exp()) / 2).log())).sum() for a in (p, q))
        ),
        "mean of the two KL": lambda p, q, cell: 0.5 * cell * ((p.exp() - q.exp()) * (p - q)).sum(),
    },
)


# The bound of a VAE ---------------------------------------------------------------------------------------------------
# A kernel takes x (B, D), a decoder Wz + b with variance e^{c}, the mean and log-variance of q, and ε.

DECODER = tensor([0.8, -0.3], [-1.1, 0.4], [0.3, 0.9]), tensor(0.2, 0.0, -0.5), -0.5
SEEN = tensor([0.5, 1.0, -1.0], [-2.0, 0.3, 0.4])
GUESS = tensor([0.4, -0.2], [-0.9, 0.6]), tensor([0.2, -0.4], [0.1, 0.3])


def a_vae(decoder, guess):
    """Our VAE with that decoder and an encoder that gives these numbers whatever it is shown."""

    class Says(torch.nn.Module):
        def forward(self, x):
            return torch.cat(guess, 1)

    weight, bias, log_var = decoder
    line = torch.nn.Linear(weight.shape[1], len(weight))
    whole = vae.VAE(Says(), line, weight.shape[1], log_var).double()
    line.weight.data, line.bias.data = weight, bias
    return whole


def is_vae_loss(loss):
    """Its mean over ε, exact by a rule of degree 5, is (β·KL − E[log p(x|z)])/D in closed form."""
    (weight, bias, log_var), (mean, spread) = DECODER, GUESS
    var = math.exp(log_var)
    nodes, shares = (-math.sqrt(3), 0.0, math.sqrt(3)), (1 / 6, 2 / 3, 1 / 6)
    for beta in (1.0, 3.0):
        found = sum(
            shares[i] * shares[j] * loss(SEEN, DECODER, GUESS, tensor(nodes[i], nodes[j]).expand(2, 2), beta)
            for i in range(3)
            for j in range(3)
        )
        missed = (SEEN - bias - mean @ weight.T).square().sum(1) + (spread.exp() @ weight.square().T).sum(1)
        fit = -missed / (2 * var) - 1.5 * math.log(2 * math.pi * var)
        kl = kl_divergence(Normal(mean, (spread / 2).exp()), Normal(0.0, 1.0)).sum(1)
        near(found, (beta * kl - fit).mean() / 3)


def typed_vae_loss(
    noise=0.5, sign=1.0, weigh=lambda beta, kl, missed: beta * kl + missed, constant=True, half=0.5, mean_of=1
):
    def loss(x, decoder, guess, eps, beta):
        (weight, bias, log_var), (mean, spread) = decoder, guess
        z = mean + (noise * spread).exp() * eps
        missed = half * (x - z @ weight.T - bias).square() / math.exp(log_var)
        if constant:
            missed = missed + 0.5 * (log_var + math.log(2 * math.pi))
        kl = 0.5 * (mean**2 + spread.exp() - 1 - spread).sum(1)
        return sign * weigh(beta, kl, missed.sum(1) / mean_of).mean() / 3

    return loss


CASES["loss of a VAE"] = Case(
    is_vae_loss,
    {
        "ours": lambda x, decoder, guess, eps, beta: vae.loss(a_vae(decoder, guess), x, eps, beta).detach(),
        "typed": typed_vae_loss(),
    },
    {
        "sign of the bound": typed_vae_loss(sign=-1.0),
        "sign of the KL": typed_vae_loss(weigh=lambda beta, kl, missed: missed - beta * kl),
        "β on the reconstruction": typed_vae_loss(weigh=lambda beta, kl, missed: kl + beta * missed),
        "β on both": typed_vae_loss(weigh=lambda beta, kl, missed: beta * (kl + missed)),
        "β forgotten": typed_vae_loss(weigh=lambda beta, kl, missed: kl + missed),
        "variance for deviation in z": typed_vae_loss(noise=1.0),
        "no noise": lambda x, decoder, guess, eps, beta: typed_vae_loss()(x, decoder, guess, 0 * eps, beta),
        "only the square": typed_vae_loss(constant=False),
        "the square without its half": typed_vae_loss(half=1.0),
        "mean over pixels beside a sum over latents": typed_vae_loss(mean_of=3),
    },
)


def is_importance_bound(bound):
    """E[exp L_K] = p(x) for K = 1 and 2, by Gauss–Hermite over one latent; p(x) is a Gaussian's density."""
    weight, bias, log_var = tensor([0.8], [-1.1], [0.3]), DECODER[1], DECODER[2]
    guess, x = (tensor([0.2]), tensor([0.3])), SEEN[:1]
    cov = weight @ weight.T + math.exp(log_var) * torch.eye(3, dtype=torch.float64)
    evidence = MultivariateNormal(bias, cov).log_prob(x).exp()
    places, shares = (torch.from_numpy(values) for values in np.polynomial.hermite_e.hermegauss(50))
    for draws in (1, 2):
        eps = torch.cartesian_prod(*[places] * draws).reshape(-1, draws).T[:, :, None]
        weights = torch.cartesian_prod(*[shares / shares.sum()] * draws).reshape(-1, draws).prod(1)
        rows = [part.expand(len(weights), -1) for part in (x, *guess)]
        near(weights @ bound(rows[0], (weight, bias, log_var), tuple(rows[1:]), eps).exp(), evidence, 1e-8)


def typed_weighted_bound(combine=lambda ratios: ratios.exp().mean(0).log(), prior=1.0, own=1.0):
    def bound(x, decoder, guess, eps):
        (weight, bias, log_var), (mean, spread) = decoder, guess
        std = (spread / 2).exp()
        z = mean + std * eps
        ratios = Normal(z @ weight.T + bias, math.exp(log_var / 2)).log_prob(x).sum(2)
        return combine(
            ratios + prior * Normal(0.0, 1.0).log_prob(z).sum(2) - own * Normal(mean, std).log_prob(z).sum(2)
        )

    return bound


CASES["bound from several draws"] = Case(
    is_importance_bound,
    {
        "ours": lambda x, decoder, guess, eps: vae.importance_bound(a_vae(decoder, guess), x, eps).detach(),
        "typed": typed_weighted_bound(),
    },
    {
        "mean of the logs": typed_weighted_bound(lambda ratios: ratios.mean(0)),
        "log K not taken off": typed_weighted_bound(lambda ratios: ratios.logsumexp(0)),
        "log K added": typed_weighted_bound(lambda ratios: ratios.logsumexp(0) + math.log(len(ratios))),
        "the best of the draws": typed_weighted_bound(lambda ratios: ratios.max(0).values),
        "no prior": typed_weighted_bound(prior=0.0),
        "not divided by q": typed_weighted_bound(own=0.0),
        "prior and q swapped": typed_weighted_bound(prior=-1.0, own=-1.0),
    },
)


# A generator and a discriminator --------------------------------------------------------------------------------------
# A kernel takes logits of real and of generated samples; or a GAN, x and z, and gives a loss for both players.


def is_discriminator_loss(loss):
    """−E[log D(x)] − E[log(1 − D(G(z)))] in 40 digits; in float32 finite where D is 0 or 1 to rounding."""
    real, fake = (1.5, -0.5, 3.0), (-2.0, 0.5)
    exact = sum(mp.log(1 + mp.exp(-u)) for u in real) / 3 + sum(mp.log(1 + mp.exp(u)) for u in fake) / 2
    near(loss(tensor(*real), tensor(*fake)), float(exact))
    near(loss(torch.tensor([-200.0]), torch.tensor([300.0])), 500.0)


def labelled(of_real, of_fake, sharpen=lambda logit: logit):
    def loss(real, fake):
        cost = torch.nn.functional.binary_cross_entropy_with_logits
        real, fake = sharpen(real), sharpen(fake)
        return cost(real, torch.full_like(real, of_real)) + cost(fake, torch.full_like(fake, of_fake))

    return loss


CASES["loss of the discriminator"] = Case(
    is_discriminator_loss,
    {"ours": gan.discriminator_loss, "typed": labelled(1.0, 0.0)},
    {
        "labels swapped": labelled(0.0, 1.0),
        "both are real": labelled(1.0, 1.0),
        "sigmoid twice": labelled(1.0, 0.0, torch.sigmoid),
        "one mean over both": lambda real, fake: torch.cat([-real, fake]).exp().log1p().mean(),
        "sum and not mean": lambda real, fake: (-real).exp().log1p().sum() + fake.exp().log1p().sum(),
        "log of a sigmoid": lambda real, fake: -real.sigmoid().log().mean() - (1 - fake.sigmoid()).log().mean(),
        "what it maximizes": lambda real, fake: -labelled(1.0, 0.0)(real, fake),
    },
)


def parts_the_players(loss):
    """Each player's gradient is that of its own loss, with all of the other player held fixed."""
    torch.manual_seed(0)
    both = gan.GAN(perceptron(3, 8, 2), perceptron(2, 8, 1), latent=3).double()
    x, z = torch.randn(2, 6, 3, dtype=torch.float64)
    x = x[:, :2] + 1
    fake = both.generator(z)
    d_real, d_fake = both.discriminator(x).sigmoid(), both.discriminator(fake.detach()).sigmoid()
    judged = -d_real.log().mean() - (1 - d_fake).log().mean()
    made = -both.discriminator(fake).sigmoid().log().mean()
    expected = torch.autograd.grad(judged, list(both.discriminator.parameters()))
    expected += torch.autograd.grad(made, list(both.generator.parameters()))
    loss(both, x, z).backward()
    for p, slope in zip([*both.discriminator.parameters(), *both.generator.parameters()], expected, strict=True):
        assert p.grad is not None
        near(p.grad, slope)


def typed_players(see=lambda fake: fake.detach(), frozen=True, judge=gan.discriminator_loss, make=gan.generator_loss):
    def loss(both, x, z):
        fake = both.generator(z)
        judged = judge(both.discriminator(x), both.discriminator(see(fake)))
        both.discriminator.requires_grad_(not frozen)
        made = make(both.discriminator(fake))
        both.discriminator.requires_grad_(True)
        return judged + made

    return loss


CASES["both players at once"] = Case(
    parts_the_players,
    {"ours": gan.loss, "typed": typed_players()},
    {
        "samples with their history": typed_players(see=lambda fake: fake),
        "the generator's loss moves the discriminator": typed_players(frozen=False),
        "both leaks": typed_players(see=lambda fake: fake, frozen=False),
        "labels swapped": typed_players(judge=lambda real, fake: gan.discriminator_loss(fake, real)),
        "the generator helps the discriminator": typed_players(make=lambda fake: gan.generator_loss(-fake)),
        "the saturating loss": typed_players(make=lambda fake: gan.generator_loss(fake, saturating=True)),
        "the generator learns from nothing": typed_players(make=lambda fake: gan.generator_loss(fake.detach())),
    },
)


# Beside a frozen base -------------------------------------------------------------------------------------------------
# A kernel takes a layer's weight, A, B and the scale, and how often it is told to get ready for use; it gives the weight in use.


def outer_products(a, b, scale):
    """s·BA, one product of numbers after the other."""
    rank, (rows, columns) = len(a), (len(b), a.shape[1])
    delta = [[sum(float(b[i, m] * a[m, j]) for m in range(rank)) for j in range(columns)] for i in range(rows)]
    return scale * torch.tensor(delta, dtype=torch.float64)


def drawn_update(rows, columns, rank, size=1.0, dtype=torch.float64):
    """A weight, A and B; size is that of ΔW beside the weight."""
    g = torch.Generator().manual_seed(5)
    weight = torch.randn(rows, columns, generator=g, dtype=torch.float64).to(dtype)
    return weight, torch.randn(rank, columns, generator=g), size * torch.randn(rows, rank, generator=g) / rank**0.5


def is_ready_for_use(ready):
    """W + s·BA for a square weight, whose transpose fits as well, however often it is asked for; the given tensors stay."""
    weight, a, b = drawn_update(6, 6, 2)
    kept = weight.clone()
    for times in (1, 2, 3):
        near(ready(weight, a, b, 0.7, times), kept + outer_products(a, b, 0.7), 1e-6)
    assert torch.equal(weight, kept)


def our_update(weight, a, b, scale):
    """A model of one layer, with the update as ours."""
    model = torch.nn.Sequential(torch.nn.Linear(*weight.shape[::-1], bias=False, dtype=weight.dtype))
    peft.add_lora(model, ("0",), rank=len(a), alpha=scale * len(a))
    with torch.no_grad():
        for parameter, value in zip(
            (model[0].base.weight, model[0].down.default.weight, model[0].up.default.weight),
            (weight, a, b),
            strict=True,
        ):
            parameter.copy_(value)
    return model


def our_use(weight, a, b, scale, times):
    model = our_update(weight, a, b, scale)
    for _ in range(times):
        peft.merge(model)
    return model[0].base.weight.detach()


class TypedLayer(torch.nn.Module):
    """A layer that merges when it is told that training is over, and how: one thing at a time to get wrong."""

    def __init__(self, weight, a, b, scale, delta=lambda a, b: b @ a, remembers=True):
        super().__init__()
        self.weight, self.change, self.merged = weight.clone(), scale * delta(a, b), False
        self.remembers = remembers

    def merge(self):
        if not (self.merged and self.remembers):
            self.weight, self.merged = self.weight + self.change, True


class ToldByMode(TypedLayer):
    def train(self, mode=True):
        if not mode:
            self.merge()
        return super().train(mode)


class ToldByEval(TypedLayer):
    """`eval` of a model calls `train(False)` of its layers, and never their `eval`."""

    def eval(self):
        self.merge()
        return super().eval()


def typed_use(kind=ToldByMode, **how):
    def ready(weight, a, b, scale, times):
        model = torch.nn.Sequential(kind(weight, a, b, scale, **how))
        for _ in range(times):
            model.eval()
        return model[0].weight

    return ready


CASES["a merged layer"] = Case(
    is_ready_for_use,
    {"ours": our_use, "typed": typed_use()},
    {
        "eval never merges": typed_use(ToldByEval),
        "merged at each call": typed_use(remembers=False),
        "transposed": typed_use(delta=lambda a, b: (b @ a).mT),
        "A times B": typed_use(delta=lambda a, b: a.mT @ b.mT),
        "not scaled": lambda weight, a, b, scale, times: typed_use()(weight, a, b, 1.0, times),
        "scaled twice": lambda weight, a, b, scale, times: typed_use()(weight, a, b, scale**2, times),
        "the update alone": lambda weight, a, b, scale, times: typed_use()(0 * weight, a, b, scale, times),
        "into the given weight": lambda weight, a, b, scale, times: (
            weight.add_(scale * b @ a) if times == 1 else weight
        ),
    },
)


# A kernel takes a bfloat16 weight, A and B in float32 and the scale, and gives the merged bfloat16 weight.


def is_the_nearest(merge):
    """No bfloat16 lies nearer to W + s·BA, worked out in float64; a ΔW of a hundredth of W."""
    weight, a, b = drawn_update(24, 20, 4, size=0.02, dtype=torch.bfloat16)
    exact, found = weight.double() + outer_products(a, b, 0.5), merge(weight, a, b, 0.5)
    assert found.dtype == torch.bfloat16
    for side in (-torch.inf, torch.inf):
        other = torch.nextafter(found, torch.full_like(found, side)).double()
        assert ((found.double() - exact).abs() <= (other - exact).abs()).all()


def merging(delta, add=lambda weight, change: weight.float() + change):
    return lambda weight, a, b, scale: add(weight, delta(a, b, scale)).bfloat16()


def rounded_each_time(weight, a, b, scale):
    """Rounded after each of the r products."""
    for m in range(len(a)):
        weight = (weight.float() + scale * torch.outer(b[:, m], a[m])).bfloat16()
    return weight


def truncated(weight, a, b, scale):
    """The last sixteen bits of float32 cut off."""
    return (weight.float() + scale * b @ a).view(torch.int32).bitwise_and(-(1 << 16)).view(torch.float32).bfloat16()


CASES["merging in bfloat16"] = Case(
    is_the_nearest,
    {
        "ours": lambda weight, a, b, scale: peft.merged(our_update(weight, a, b, scale))[0].weight.detach(),
        "typed": merging(lambda a, b, scale: scale * b @ a),
        "in float64": lambda weight, a, b, scale: (weight.double() + outer_products(a, b, scale)).bfloat16(),
    },
    {
        "BA rounded first": merging(lambda a, b, scale: (scale * b @ a).bfloat16().float()),
        "A and B rounded first": merging(lambda a, b, scale: scale * (b.bfloat16() @ a.bfloat16()).float()),
        "A and B rounded, BA not": merging(lambda a, b, scale: scale * b.bfloat16().float() @ a.bfloat16().float()),
        "one of the r after the other": rounded_each_time,
        "cut off": truncated,
        "nothing added": merging(lambda a, b, scale: 0 * b @ a),
    },
)


# A kernel takes the same and a number of switches, and gives the weight after it was merged and taken back so often.


def leaves_no_trace(switch):
    """The weight is the old one, bit by bit, after one switch and after a hundred, in bfloat16 and in float32."""
    for dtype in (torch.bfloat16, torch.float32):
        weight, a, b = drawn_update(8, 8, 2, dtype=dtype)
        for times in (1, 100):
            assert torch.equal(switch(weight.clone(), a, b, 0.7, times), weight)


def our_switch(weight, a, b, scale, times):
    model = our_update(weight, a, b, scale)
    for _ in range(times):
        peft.unmerge(peft.merge(model))
    return model[0].base.weight.detach()


def switching(merge, back):
    def switch(weight, a, b, scale, times):
        for _ in range(times):
            merged = merge(weight, scale * b @ a)
            weight = back(merged, weight, scale * b @ a)
        return weight

    return switch


def added(weight, change):
    return (weight.float() + change).to(weight.dtype)


CASES["taking an update back"] = Case(
    leaves_no_trace,
    {"ours": our_switch, "typed": switching(added, lambda merged, weight, change: weight)},
    {
        "by subtraction": switching(added, lambda merged, weight, change: added(merged, -change)),
        "by subtraction of what was rounded": switching(
            lambda weight, change: weight + change.to(weight.dtype),
            lambda merged, weight, change: merged - change.to(merged.dtype),
        ),
        "never": switching(added, lambda merged, weight, change: merged),
    },
)


# A kernel takes numbers of outputs, of inputs and the rank, and gives A, B and the scale of a new update with α = 2.


def is_a_beginning(begin):
    """ΔW is zero and yet can learn: at W = 0 the slope of ‖ΔW − M‖² reaches B, with α/r; A is Gaussian of variance 1/k."""
    torch.manual_seed(4)
    a, b, scale = begin(30, 400, 8)
    assert a.shape == (8, 400) and b.shape == (30, 8)
    near(outer_products(a[:, :5], b, scale), 0.0)
    target = torch.randn(30, 400)
    moved = (2 * scale * target @ a.mT).abs().max() + (2 * scale * b.mT @ target).abs().max()
    assert moved > 0.1
    near(scale, 2 / 8)
    variance = a.square().mean().item() * 400
    assert abs(variance - 1) < 5 * math.sqrt(2 / a.numel())


def our_beginning(rows, columns, rank):
    layer = peft.add_lora(torch.nn.Sequential(torch.nn.Linear(columns, rows)), ("0",), rank=rank, alpha=2.0)[0]
    return layer.down.default.weight.detach(), layer.up.default.weight.detach(), layer.scaling["default"]


def beginning(a=lambda r, k: torch.randn(r, k) / math.sqrt(k), b=torch.zeros, scale=lambda alpha, r: alpha / r):
    return lambda rows, columns, rank: (a(rank, columns), b(rows, rank), scale(2.0, rank))


CASES["how an update begins"] = Case(
    is_a_beginning,
    {"ours": our_beginning, "typed": beginning()},
    {
        "both zero": beginning(a=torch.zeros),
        "both Gaussian": beginning(b=torch.randn),
        "of variance 1/r": beginning(a=lambda r, k: torch.randn(r, k) / math.sqrt(r)),
        "of variance 1": beginning(a=torch.randn),
        "uniform of 1/√k": beginning(a=lambda r, k: (2 * torch.rand(r, k) - 1) / math.sqrt(k)),
        "α for α/r": beginning(scale=lambda alpha, r: alpha),
        "r/α for α/r": beginning(scale=lambda alpha, r: r / alpha),
        "α/√r for α/r": beginning(scale=lambda alpha, r: alpha / math.sqrt(r)),
    },
)


# A kernel takes a causal attention, tokens h (B, N, width) and a prefix of keys and values (2, P, width), and gives the output.


def sees_the_prefix(attend):
    """By loops over heads and tokens: a token looks at all of the prefix, at itself and at what stands before it, and at no more."""
    torch.manual_seed(6)
    for length, tokens in ((1, 4), (3, 4), (5, 2), (4, 1)):
        attention = CausalAttention(12, 3).double()
        h, prefix = torch.randn(2, tokens, 12).double(), torch.randn(2, length, 12).double()
        found = attend(attention, h, prefix)
        assert found.shape == h.shape
        near(found.detach(), typed_attention(attention, h, prefix=prefix, causal=True)[1].detach())


def typed_prefix(hidden, queries=lambda h, prefix: h, scaled=True, order=lambda prefix, own: (prefix, own)):
    """Attention with a mask (N, P, …) → (N, P + N), True where nobody may look."""

    def attend(attention, h, prefix):
        q = attention.query(queries(h, prefix))
        k, v = (
            torch.cat(order(part.expand(len(h), -1, -1), layer(h)), 1)
            for part, layer in zip(prefix, (attention.key, attention.value), strict=True)
        )
        q, k, v = (x.unflatten(2, (attention.heads, -1)).transpose(1, 2) for x in (q, k, v))
        scores = q @ k.mT / (q.shape[-1] ** 0.5 if scaled else 1.0)
        mask = hidden(q.shape[2], prefix.shape[1])
        assert mask.shape[-1] == scores.shape[-1]  # a mask for as many keys as queries does not fit
        return attention.out((scores.masked_fill(mask, -torch.inf).softmax(-1) @ v).transpose(1, 2).flatten(2))

    return attend


def after(n, keys, shift):
    """True above a diagonal of (n, keys)."""
    return torch.ones(n, keys, dtype=torch.bool).triu(shift)


def beside(left, n):
    """A mask of the prefix beside the causal one of the tokens."""
    return torch.cat([left, after(n, n, 1)], 1)


def right_mask(n, p):
    return beside(torch.zeros(n, p, dtype=torch.bool), n)


CASES["a prefix's mask"] = Case(
    sees_the_prefix,
    {
        "ours": lambda attention, h, prefix: peft.PrefixAttention(attention, lambda: prefix)(h),
        "typed": typed_prefix(right_mask),
    },
    {
        "as many keys as queries": typed_prefix(lambda n, p: after(n, n, 1)),
        "counted from the first key": typed_prefix(lambda n, p: after(n, p + n, 1)),
        "the prefix is later": typed_prefix(lambda n, p: beside(torch.ones(n, p, dtype=torch.bool), n)),
        "padded on the other side": typed_prefix(lambda n, p: right_mask(n, p).flip(0, 1)),
        "no mask": typed_prefix(lambda n, p: torch.zeros(n, p + n, dtype=torch.bool)),
        "nobody sees itself": typed_prefix(lambda n, p: after(n, p + n, p)),
        "one token too many": typed_prefix(lambda n, p: after(n, p + n, p + 2)),
        "the prefix is causal too": typed_prefix(lambda n, p: beside(after(n, p, 1), n)),
        "the prefix asks as well": typed_prefix(
            lambda n, p: after(n, n, 1), queries=lambda h, prefix: torch.cat([prefix[0].expand(len(h), -1, -1), h], 1)
        ),
        "the prefix stands behind": typed_prefix(right_mask, order=lambda prefix, own: (own, prefix)),
        "not divided by √d": typed_prefix(right_mask, scaled=False),
        "no prefix": lambda attention, h, prefix: attention(h),
    },
)


# --- all of it --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case, kernel", [(case, kernel) for case in CASES for kernel in CASES[case].right])
def test_right_is_accepted(case, kernel):
    """Every oracle accepts our kernel, and a correct one that is written like the wrong ones."""
    CASES[case].oracle(CASES[case].right[kernel])


@pytest.mark.parametrize("case, kernel", [(case, kernel) for case in CASES for kernel in CASES[case].wrong])
def test_wrong_is_rejected(case, kernel):
    """The same oracle rejects every wrong kernel: by an assertion, or because it reads beyond its table."""
    with pytest.raises((AssertionError, IndexError)):
        CASES[case].oracle(CASES[case].wrong[kernel])
