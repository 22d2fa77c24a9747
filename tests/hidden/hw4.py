"""Homework 4, score-based models and SDEs: what is right, what people write instead, and the cases that tell them apart.

For each exercise: the reference, the mistakes, right answers written in other ways, the cases. Scores are affine functions,
whose numbers can be sent; steps are so large that a wrong factor shows.
"""

import functools
import math
from itertools import combinations, pairwise

import numpy as np
import torch
from torch.distributions import MultivariateNormal, Normal

from dgm_course.grading.exercise import Exercise, Group
from dgm_course.homework import Affine

SINGLE, DOUBLE = torch.float32, torch.float64


# What the exercises share ---------------------------------------------------------------------------------------------


def each(coefficients, like):
    """One number for each sample, ready to multiply the samples."""
    return coefficients.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def normal(g, shape, dtype=SINGLE):
    return torch.randn(shape, generator=g, dtype=dtype)


def uniform(g, low, high, *shape):
    return low + (high - low) * torch.rand(shape, generator=g, dtype=DOUBLE)


def number(g, low, high):
    return uniform(g, low, high).item()


# 1. ou_moments --------------------------------------------------------------------------------------------------------


def grown(rate, t):
    """The integral of e^{−rate·u} from 0 to t."""
    return t if rate == 0 else -torch.expm1(-rate * t) / rate


def ou_with(x0, decay, variance):
    return each(decay, x0) * x0, variance.to(x0.dtype)


def ou_moments(x0, t, k, c):
    return ou_with(x0, (-k * t).exp(), c**2 * grown(2 * k, t))


def ou_no_2_in_the_exponent(x0, t, k, c):
    return ou_with(x0, (-k * t).exp(), c**2 * grown(k, t))


def ou_no_2_below(x0, t, k, c):
    return ou_with(x0, (-k * t).exp(), 2 * c**2 * grown(2 * k, t))


def ou_deviation(x0, t, k, c):
    return ou_with(x0, (-k * t).exp(), c * grown(2 * k, t).sqrt())


def ou_c_not_squared(x0, t, k, c):
    return ou_with(x0, (-k * t).exp(), c * grown(2 * k, t))


def ou_noise_alone(x0, t, k, c):
    return ou_with(x0, (-k * t).exp(), c**2 * t)


def ou_mean_stays(x0, t, k, c):
    return ou_with(x0, torch.ones_like(t), c**2 * grown(2 * k, t))


def ou_mean_twice(x0, t, k, c):
    return ou_with(x0, (-2 * k * t).exp(), c**2 * grown(2 * k, t))


def ou_other_sign(x0, t, k, c):
    return ou_moments(x0, t, -k, c)


def ou_limit(x0, t, k, c):
    return ou_with(x0, (-k * t).exp(), torch.full_like(t, c**2 / (2 * k) if k else torch.inf))


def ou_divides(x0, t, k, c):
    decay = torch.exp(-2 * k * t)
    return ou_with(x0, (-k * t).exp(), c**2 * (1 - decay) / torch.tensor(2 * k, dtype=DOUBLE))


def ou_divides_unless_0(x0, t, k, c):
    return ou_moments(x0, t, k, c) if k == 0 else ou_divides(x0, t, k, c)


def ou_first_time(x0, t, k, c):
    return ou_moments(x0, t[:1].expand_as(t), k, c)


def ou_in_a_loop(x0, t, k, c):
    """With a series where k·t is small."""
    means, variances = [], []
    for x, time in zip(x0, t.tolist(), strict=True):
        means.append(x * math.exp(-k * time))
        small = abs(k * time) < 1e-6
        variances.append(c * c * (time - k * time**2 if small else (1 - math.exp(-2 * k * time)) / (2 * k)))
    return torch.stack(means), torch.tensor(variances, dtype=x0.dtype)


def ou_by_a_matrix(x0, t, k, c):
    """The mean's factor and the variance follow linear equations; the third unknown is the constant 1."""
    rates = torch.tensor([[-k, 0, 0], [0, -2 * k, c**2], [0, 0, 0]], dtype=DOUBLE)
    powers = torch.linalg.matrix_exp(t[:, None, None] * rates)
    return ou_with(x0, powers[:, 0, 0], powers[:, 1, 2])


def ou_by_quadrature(x0, t, k, c):
    """Each bit of noise c² du that came in u before the end has shrunk by e^{−2ku}."""
    points, weights = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(64))
    u = t[:, None] * (points + 1) / 2
    return ou_with(x0, torch.exp(-t * k), (torch.exp(-2 * k * u) @ weights) * t / 2 * c**2)


def pulled(g, shape, k, t=None, dtype=SINGLE):
    t = uniform(g, 0.3, 2, shape[0]) if t is None else torch.tensor(t, dtype=DOUBLE)
    return {"x0": normal(g, shape, dtype), "t": t, "k": k, "c": number(g, 1.2, 1.9)}


OU = Exercise(
    "ou_moments",
    points=2,
    minutes=15,
    difficulty=2,
    reference=ou_moments,
    outputs=("mean", "variance"),
    visible=Group(
        1,
        lambda g: [
            pulled(g, (4, 3), 0.8, [0.0, 0.3, 1.0, 2.5]),
            pulled(g, (2, 1, 2, 3), -0.6, [0.5, 1.5], DOUBLE),
            pulled(g, (3, 2), 0.0, [0.4, 1.0, 2.0]),
            pulled(g, (2, 2), 1e-17, [0.7, 1.4], DOUBLE),
        ],
    ),
    hidden={
        "other shapes": Group(
            0.5,
            lambda g: [
                pulled(g, (5, 2), number(g, 0.4, 1.5)),
                pulled(g, (2, 1, 7, 5), number(g, 0.4, 1.5)),
                pulled(g, (1, 1), number(g, -1.5, -0.4), dtype=DOUBLE),
                pulled(g, (3,), number(g, 0.4, 1.5)),
            ],
        ),
        "k near 0, t = 0, and t large": Group(
            0.5,
            lambda g: [
                pulled(g, (3, 2), 0.0),
                pulled(g, (3, 1), number(g, 1e-18, 1e-17), dtype=DOUBLE),
                pulled(g, (2, 2), -number(g, 1e-18, 1e-17)),
                pulled(g, (3, 4), number(g, 1, 2), [0.0, 30.0, 1.0]),
                pulled(g, (1, 2), number(g, -1, -0.5), [0.0], DOUBLE),
            ],
        ),
    },
    mistakes={
        "you forgot the 2 in the variance's rate": (
            ou_no_2_in_the_exponent,
            "x shrinks like e^{−kt}, so its square shrinks like e^{−2kt}: V' = −2k V + c².",
        ),
        "you forgot to divide by the 2 of 2k": (
            ou_no_2_below,
            "The integral of e^{−2ku} is (1 − e^{−2kt})/(2k). For small t the variance must begin as c² t.",
        ),
        "you returned the standard deviation": (ou_deviation, "The second value asked for is a variance."),
        "you wrote c for c²": (
            ou_c_not_squared,
            "c multiplies the noise, so c² multiplies its variance: in a time dt the noise adds c² dt.",
        ),
        "you added up the noise and forgot that it shrinks": (
            ou_noise_alone,
            "c² t is right for k = 0 only. Noise that came in at time u is pulled to 0 like all of x from then on.",
        ),
        "you left the mean at x_0": (
            ou_mean_stays,
            "The drift −kx pulls each x towards 0, and so their mean: m' = −k m.",
        ),
        "you let the mean shrink like a variance": (
            ou_mean_twice,
            "The mean has m' = −k m, so it shrinks like e^{−kt}. The 2 belongs to squares.",
        ),
        "you took the drift with the other sign": (
            ou_other_sign,
            "It is −k x: for k > 0 the mean shrinks, and the variance stays below c²/(2k).",
        ),
        "you gave the variance of the limit t → ∞": (
            ou_limit,
            "c²/(2k) is where it ends, for k > 0. At t = 0 the variance is 0.",
        ),
        "you divided 0 by 0, or by nearly 0": (
            ou_divides,
            "For small k, 1 − e^{−2kt} rounds to 0. torch.expm1 finds e^y − 1 to all digits; and k = 0 needs a line of its own.",
        ),
        "you treated k = 0, and not a k near it": (
            ou_divides_unless_0,
            "For small k, 1 − e^{−2kt} loses its digits, and rounds to 0 in the end. torch.expm1 finds e^y − 1 to all digits.",
        ),
        "you used the first sample's time for all": (
            ou_first_time,
            "t holds one time for each sample. Reshape its coefficient to (B, 1, …) before you multiply.",
        ),
    },
    correct={
        "a loop with a series": ou_in_a_loop,
        "the exponential of a matrix": ou_by_a_matrix,
        "quadrature": ou_by_quadrature,
    },
    forbidden=(
        "paths.GaussianPath.alpha",
        "paths.GaussianPath.sigma",
        "paths.GaussianPath.perturb",
        "paths.GaussianPath.transition",
    ),
)


# 2. sde_of_path -------------------------------------------------------------------------------------------------------


def sde_of_path(alpha, mu, sigma, dalpha, dmu, dsigma):
    return noise_is_added(*sde_unchecked(alpha, mu, sigma, dalpha, dmu, dsigma))


def sde_unchecked(alpha, mu, sigma, dalpha, dmu, dsigma):
    f = dalpha / alpha
    return f, dmu - f * mu, 2 * sigma * (dsigma - f * sigma)


def noise_is_added(f, b, g2):
    if (g2 < 0).any():
        raise ValueError(f"g2 must not be negative: a path of an SDE takes no noise away; got {g2.tolist()}")
    return f, b, g2


def instead(**changes):
    """The right answer with another formula for some of it, of the path and of f, b and g²."""

    def answer(alpha, mu, sigma, dalpha, dmu, dsigma):
        f, b, g2 = sde_of_path(alpha, mu, sigma, dalpha, dmu, dsigma)
        known = {"alpha": alpha, "mu": mu, "sigma": sigma, "dalpha": dalpha, "dmu": dmu, "dsigma": dsigma}
        known |= {"f": f, "b": b, "g2": g2}
        return tuple(changes[name](**known) if name in changes else known[name] for name in ("f", "b", "g2"))

    return answer


sde_growth_of_variance = instead(g2=lambda sigma, dsigma, **_: 2 * sigma * dsigma)
sde_rate_squared = instead(g2=lambda dsigma, **_: dsigma**2)
sde_rate_of_alpha = instead(
    f=lambda dalpha, **_: dalpha,
    b=lambda mu, dmu, dalpha, **_: dmu - dalpha * mu,
    g2=lambda sigma, dsigma, dalpha, **_: 2 * sigma * dsigma - 2 * dalpha * sigma**2,
)
sde_plus = instead(g2=lambda f, sigma, dsigma, **_: 2 * sigma * dsigma + 2 * f * sigma**2)
sde_one_f = instead(g2=lambda f, sigma, dsigma, **_: 2 * sigma * dsigma - f * sigma**2)
sde_sigma_not_squared = instead(g2=lambda f, sigma, dsigma, **_: 2 * sigma * dsigma - 2 * f * sigma)
sde_root = instead(g2=lambda g2, **_: g2.sqrt())
sde_half = instead(g2=lambda g2, **_: g2 / 2)
sde_by_logsnr = instead(g2=lambda alpha, sigma, dalpha, dsigma, **_: -2 * sigma**2 * (dalpha / alpha - dsigma / sigma))
sde_noise_over_signal = instead(g2=lambda alpha, g2, **_: g2 / alpha**2)
sde_centre_alone = instead(b=lambda dmu, **_: dmu)
sde_centre_plus = instead(b=lambda f, mu, dmu, **_: dmu + f * mu)
sde_pull_alone = instead(b=lambda f, mu, **_: -f * mu)


def sde_error_if_all(*path):
    f, b, g2 = sde_unchecked(*path)
    return noise_is_added(f, b, g2) if (g2 < 0).all() else (f, b, g2)


def sde_clamped(*path):
    f, b, g2 = sde_unchecked(*path)
    return f, b, g2.clamp(min=0)


def sde_refuses_0(*path):
    f, b, g2 = sde_of_path(*path)
    if (g2 <= 0).any():
        raise ValueError("g2 is not positive")
    return f, b, g2


def sde_by_noise_to_signal(alpha, mu, sigma, dalpha, dmu, dsigma):
    """(x − μ)/α is Brownian motion, with α² times the rate of σ²/α² for its noise; the drift is that of α x_0 + μ."""
    rate = (2 * sigma * dsigma * alpha**2 - 2 * alpha * dalpha * sigma**2) / alpha**4
    if bool((rate < 0).any()):
        raise ValueError("g2 < 0: noise is taken away")
    at_0, at_1 = dmu, dalpha + dmu  # the drift where x_0 is 0, and where it is 1
    slope = (at_1 - at_0) / alpha
    return slope, at_1 - slope * (alpha + mu), alpha**2 * rate


def sde_by_autograd(alpha, mu, sigma, dalpha, dmu, dsigma):
    """Any curve with these values and rates will do; take straight ones."""
    with torch.enable_grad():
        u = torch.zeros_like(alpha, requires_grad=True)
        signal, centre, noise = alpha + u * dalpha, mu + u * dmu, sigma + u * dsigma
        (f,) = torch.autograd.grad(signal.log().sum(), u, retain_graph=True)
        (moved,) = torch.autograd.grad((centre / signal).sum(), u, retain_graph=True)
        (rate,) = torch.autograd.grad((noise / signal).square().sum(), u)
    g2 = rate * alpha**2
    if g2.min() < 0:
        raise ValueError(f"no SDE: the smallest g2 is {g2.min().item()}")
    return f, moved * alpha, g2


def sde_in_a_loop(*path):
    rows = []
    for a, m, s, da, dm, ds in zip(*(part.tolist() for part in path), strict=True):
        g2 = 2 * s * ds - 2 * s * s * da / a
        if g2 < 0:
            raise ValueError(f"g2 = {g2} < 0")
        rows.append((da / a, dm - m * da / a, g2))
    return tuple(torch.tensor(column, dtype=DOUBLE) for column in zip(*rows, strict=True))


def piece(g, count, *, start=False, rest=False, takes=0):
    """A path and its rates at some times; from σ = 0, with a time of rest, or with noise taken away at the last `takes`."""
    alpha, sigma, f = uniform(g, 0.3, 1.6, count), uniform(g, 0.2, 1.5, count), uniform(g, -1.5, 0.5, count)
    mu, dmu, g2 = uniform(g, -2, 2, count), uniform(g, -2, 2, count), uniform(g, 0.4, 2.5, count)
    if takes:
        g2[-takes:] *= -1
    dsigma = g2 / (2 * sigma) + f * sigma
    if rest:
        f[-1] = dsigma[-1] = 0
    if start:
        mu[0] = sigma[0] = 0
    return {"alpha": alpha, "mu": mu, "sigma": sigma, "dalpha": f * alpha, "dmu": dmu, "dsigma": dsigma}


PATH = Exercise(
    "sde_of_path",
    points=3,
    minutes=20,
    difficulty=2,
    reference=sde_of_path,
    outputs=("f", "b", "g2"),
    visible=Group(
        1,
        lambda g: [
            piece(g, 5),
            piece(g, 4, start=True, rest=True),
            piece(g, 3, takes=1),
            piece(g, 2, takes=2),
        ],
    ),
    hidden={
        "other paths": Group(1, lambda g: [piece(g, 7), piece(g, 1), piece(g, 30)]),
        "the start, a rest, and noise taken away": Group(
            1,
            lambda g: [
                piece(g, 6, start=True),
                piece(g, 3, rest=True),
                piece(g, 8, takes=1),
                piece(g, 1, start=True),
                piece(g, 1, takes=1),
            ],
        ),
    },
    mistakes={
        "you took the growth of σ² for g²": (
            sde_growth_of_variance,
            "2σσ' is what is left of the noise that comes in: the drift shrinks σ² meanwhile. (σ²)' = 2f σ² + g².",
        ),
        "you took σ' for g": (
            sde_rate_squared,
            "It is variances that add up, not deviations: start from (σ²)' = 2f σ² + g².",
        ),
        "you took α' for the drift": (
            sde_rate_of_alpha,
            "The mean of x_t is α x_0 + μ, and it moves at the rate f·mean + b: the part with x_0 says α' = f α.",
        ),
        "you added 2fσ² where it is subtracted": (
            sde_plus,
            "(σ²)' = 2f σ² + g², so g² = (σ²)' − 2f σ². With f < 0 the noise must make good for what the drift takes.",
        ),
        "you forgot the 2 of 2fσ²": (
            sde_one_f,
            "x changes at the rate f x, so x² at the rate 2f x².",
        ),
        "you wrote σ for σ² beside the drift": (
            sde_sigma_not_squared,
            "(σ²)' = 2f σ² + g²: all three terms are variances per time.",
        ),
        "you returned g": (sde_root, "The second value asked for is g², a variance per time."),
        "you lost a 2: the rate of σ² is 2σσ'": (
            sde_half,
            "The chain rule: (σ²)' = 2σσ', and with it the whole of g² doubles.",
        ),
        "you divided by σ": (
            sde_by_logsnr,
            "At t = 0 it is 0, and −σ² times the rate of the log-SNR becomes 0·∞. Multiply out: nothing needs to be divided by σ.",
        ),
        "you gave the rate of σ²/α²": (
            sde_noise_over_signal,
            "That is g² for (x − μ)/α, whose data keep their size. Multiply by α² to come back to x.",
        ),
        "you took μ' for b": (
            sde_centre_alone,
            "The drift f x pulls at the centre as well. The part of the mean without x_0 says μ' = f μ + b.",
        ),
        "you added f μ where it is subtracted": (
            sde_centre_plus,
            "The part of the mean without x_0 says μ' = f μ + b, so b = μ' − f μ.",
        ),
        "you forgot that the centre moves": (
            sde_pull_alone,
            "−f μ holds the cloud where μ rests. To move it, b needs μ' on top.",
        ),
        "you raised the error only where all g² are negative": (
            sde_error_if_all,
            "One time at which noise is taken away is enough: no SDE runs along such a path. Ask for any of them.",
        ),
        "you returned a g² where there is none": (
            sde_unchecked,
            "A negative g² has no root, and no noise can be drawn with it: raise a ValueError that names g2.",
        ),
        "you set a negative g² to 0": (
            sde_clamped,
            "That SDE would have another σ. Raise a ValueError that names g2.",
        ),
        "you raised the error at g² = 0, too": (
            sde_refuses_0,
            "At σ = 0 and where the path rests, g² is 0: no noise comes in there, and none is taken away.",
        ),
    },
    correct={
        "the rate of σ²/α²": sde_by_noise_to_signal,
        "autograd": sde_by_autograd,
        "a loop": sde_in_a_loop,
    },
    mentions=("g2",),
    forbidden=("paths.GaussianPath.drift", "paths.GaussianPath.diffusion2"),
)


# 3. correlated_dsm ----------------------------------------------------------------------------------------------------


def correlated_dsm(score, x0, t, eps, alpha, factor):
    s = score(alpha * x0 + eps @ factor.mT, t)
    return 0.5 * (s @ factor + eps).square().sum(1)


def dsm_transposed_noise(score, x0, t, eps, alpha, factor):
    s = score(alpha * x0 + eps @ factor, t)
    return 0.5 * (s @ factor + eps).square().sum(1)


def dsm_transposed_weight(score, x0, t, eps, alpha, factor):
    s = score(alpha * x0 + eps @ factor.mT, t)
    return 0.5 * (s @ factor.mT + eps).square().sum(1)


def dsm_plus_target(score, x0, t, eps, alpha, factor):
    s = score(alpha * x0 + eps @ factor.mT, t)
    return 0.5 * (s @ factor - eps).square().sum(1)


def dsm_unweighted(score, x0, t, eps, alpha, factor):
    s = score(alpha * x0 + eps @ factor.mT, t)
    return 0.5 * (s + eps @ torch.linalg.pinv(factor)).square().sum(1)


def dsm_by_an_inverse(score, x0, t, eps, alpha, factor):
    s = score(alpha * x0 + eps @ factor.mT, t)
    return 0.5 * ((s + eps @ torch.linalg.inv(factor)) @ factor).square().sum(1)


def dsm_without_correlation(score, x0, t, eps, alpha, factor):
    s = score(alpha * x0 + eps @ factor.mT, t)
    return 0.5 * (s * factor.square().sum(1).sqrt() + eps).square().sum(1)


def dsm_of_noise(score, x0, t, eps, alpha, factor):
    return 0.5 * (score(alpha * x0 + eps @ factor.mT, t) + eps).square().sum(1)


def dsm_mean_of_values(score, x0, t, eps, alpha, factor):
    return correlated_dsm(score, x0, t, eps, alpha, factor) / x0.shape[1]


def dsm_no_half(score, x0, t, eps, alpha, factor):
    return 2 * correlated_dsm(score, x0, t, eps, alpha, factor)


def dsm_not_squared(score, x0, t, eps, alpha, factor):
    return (2 * correlated_dsm(score, x0, t, eps, alpha, factor)).sqrt() / 2


def dsm_no_alpha(score, x0, t, eps, alpha, factor):
    return correlated_dsm(score, x0, t, eps, 1.0, factor)


def dsm_asks_clean(score, x0, t, eps, alpha, factor):
    return 0.5 * (score(x0, t) @ factor + eps).square().sum(1)


def dsm_mean_of_samples(score, x0, t, eps, alpha, factor):
    return correlated_dsm(score, x0, t, eps, alpha, factor).mean().expand(len(x0))


def dsm_as_a_quadratic_form(score, x0, t, eps, alpha, factor):
    """½(s − target)ᵀ Σ (s − target), multiplied out: Σ·target = −Lε, and targetᵀ Σ target = ‖ε‖²."""
    noise = torch.einsum("de,be->bd", factor, eps)
    s = score(alpha * x0 + noise, t)
    return 0.5 * torch.einsum("bd,de,be->b", s, factor @ factor.T, s) + (s * noise).sum(-1) + 0.5 * (eps**2).sum(-1)


def dsm_in_a_loop(score, x0, t, eps, alpha, factor):
    noised = torch.stack([alpha * x + factor @ e for x, e in zip(x0, eps, strict=True)])
    return torch.stack(
        [(factor.T @ s + e).norm() ** 2 / 2 for s, e in zip(score(noised, t), eps, strict=True)],
    )


def dsm_by_columns(score, x0, t, eps, alpha, factor):
    """One value of ε after the other, in double precision."""
    wide, noise = factor.double(), eps.double()
    xt = alpha * x0.double() + sum(noise[:, i : i + 1] * wide[:, i] for i in range(len(wide)))
    s = score(xt.to(x0.dtype), t).double()
    errors = [((s * wide[:, i]).sum(1) + noise[:, i]) ** 2 for i in range(len(wide))]
    return (sum(errors) / 2).to(x0.dtype)


def noisy(g, batch, dim, dtype=SINGLE, alpha=None, singular=False):
    factor = 0.6 * torch.randn(dim, dim, generator=g, dtype=DOUBLE).tril(-1) + uniform(g, 0.5, 1.5, dim).diag()
    if singular:
        factor[-1, -1] = 0
    return {
        "score": Affine(uniform(g, -1.5, -0.5, 2), uniform(g, 0.3, 1.0, 2)),
        "x0": normal(g, (batch, dim), dtype),
        "t": number(g, 0.1, 0.9),
        "eps": normal(g, (batch, dim), dtype),
        "alpha": number(g, 0.3, 0.8) if alpha is None else alpha,
        "factor": factor.to(dtype),
    }


DSM = Exercise(
    "correlated_dsm",
    points=3,
    minutes=25,
    difficulty=3,
    reference=correlated_dsm,
    outputs=("loss",),
    visible=Group(
        1,
        lambda g: [noisy(g, 4, 3), noisy(g, 2, 2, DOUBLE), noisy(g, 3, 3, DOUBLE, singular=True)],
    ),
    hidden={
        "other shapes": Group(
            1, lambda g: [noisy(g, 7, 2), noisy(g, 2, 9, DOUBLE), noisy(g, 1, 3), noisy(g, 5, 1, DOUBLE)]
        ),
        "noise on a plane, only noise, no shrinking": Group(
            1,
            lambda g: [
                noisy(g, 4, 4, DOUBLE, singular=True),
                noisy(g, 3, 2, alpha=0.0),
                noisy(g, 1, 2, DOUBLE, alpha=1.0),
            ],
        ),
    },
    mistakes={
        "you noised with Lᵀ": (
            dsm_transposed_noise,
            "Samples are rows: the row of Lε is εᵀLᵀ. In code eps @ factor.mT, or an einsum that names the axes.",
        ),
        "you weighted the score with L": (
            dsm_transposed_weight,
            "The weight Σ = LLᵀ turns s into Lᵀs, whose squared length is sᵀLLᵀs. As rows: sᵀL.",
        ),
        "you took the target with the other sign": (
            dsm_plus_target,
            "The score points back to the data, against the noise: the target is −L⁻ᵀε.",
        ),
        "you forgot the weight Σ": (
            dsm_unweighted,
            "‖s + L⁻ᵀε‖² grows without bound where L nearly loses a direction. Asked is the error in units of the noise, (…)ᵀ Σ (…).",
        ),
        "you inverted L": (
            dsm_by_an_inverse,
            "L may have no inverse. Multiply out first: Lᵀ(s + L⁻ᵀε) needs none.",
        ),
        "you treated the coordinates as independent": (
            dsm_without_correlation,
            "With one σ for each coordinate it is σ s + ε. Here the noise is mixed by L, and Lᵀ takes the place of σ.",
        ),
        "you compared the score itself with −ε": (
            dsm_of_noise,
            "The target is −L⁻ᵀε. With the weight Σ it is Lᵀs that is compared with −ε.",
        ),
        "you took the mean over the values of a sample": (
            dsm_mean_of_values,
            "A squared length is a sum over coordinates.",
        ),
        "you forgot the ½": (dsm_no_half, "Asked is ½(…)ᵀ Σ (…), as on the slide of score matching."),
        "you took the length, not its square": (
            dsm_not_squared,
            "The square is what makes the best score a mean: a conditional mean minimises squares.",
        ),
        "you forgot α": (dsm_no_alpha, "The score is asked at x_t = α x_0 + Lε."),
        "you asked the score at the clean data": (
            dsm_asks_clean,
            "The score is asked at x_t = α x_0 + Lε: it is that of the noised density.",
        ),
        "you took the mean over the samples": (
            dsm_mean_of_samples,
            "Asked is the loss of each sample, shape (B,); the mean is for the one who trains.",
        ),
    },
    correct={
        "a quadratic form": dsm_as_a_quadratic_form,
        "a loop": dsm_in_a_loop,
        "columns, in double precision": dsm_by_columns,
    },
    forbidden=("losses.dsm", "losses.esm", "losses.ssm", "losses.simple"),
)


# 4. corrector_step ----------------------------------------------------------------------------------------------------


def sizes(x):
    """‖x‖ of each sample, (B,)."""
    return x.flatten(1).norm(dim=1)


def uphill(x, score, noise, delta):
    return x + each(delta, x) * score + each((2 * delta).sqrt(), x) * noise, delta


def corrector_step(x, score, noise, r):
    return uphill(x, score, noise, 2 * (r * sizes(noise) / sizes(score)) ** 2)


def corrector_batch_mean(x, score, noise, r):
    delta = 2 * (r * sizes(noise).mean() / sizes(score).mean()) ** 2
    return uphill(x, score, noise, delta.expand(len(x)))


def corrector_whole_batch(x, score, noise, r):
    return uphill(x, score, noise, (2 * (r * noise.norm() / score.norm()) ** 2).expand(len(x)))


def corrector_no_2(x, score, noise, r):
    return uphill(x, score, noise, (r * sizes(noise) / sizes(score)) ** 2)


def corrector_r_not_squared(x, score, noise, r):
    return uphill(x, score, noise, 2 * r * (sizes(noise) / sizes(score)) ** 2)


def corrector_not_squared(x, score, noise, r):
    return uphill(x, score, noise, 2 * r * sizes(noise) / sizes(score))


def corrector_upside_down(x, score, noise, r):
    return uphill(x, score, noise, 2 * (r * sizes(score) / sizes(noise)) ** 2)


def corrector_squared_twice(x, score, noise, r):
    return uphill(x, score, noise, 2 * (r * sizes(noise) ** 2 / sizes(score) ** 2) ** 2)


def corrector_root_delta(x, score, noise, r):
    _, delta = corrector_step(x, score, noise, r)
    return x + each(delta, x) * score + each(delta.sqrt(), x) * noise, delta


def corrector_no_root(x, score, noise, r):
    _, delta = corrector_step(x, score, noise, r)
    return x + each(delta, x) * score + each(2 * delta, x) * noise, delta


def corrector_2_outside(x, score, noise, r):
    _, delta = corrector_step(x, score, noise, r)
    return x + each(delta, x) * score + each(2 * delta.sqrt(), x) * noise, delta


def corrector_downhill(x, score, noise, r):
    _, delta = corrector_step(x, score, noise, r)
    return x - each(delta, x) * score + each((2 * delta).sqrt(), x) * noise, delta


def corrector_no_noise(x, score, noise, r):
    _, delta = corrector_step(x, score, noise, r)
    return x + each(delta, x) * score, delta


def corrector_half_score(x, score, noise, r):
    _, delta = corrector_step(x, score, noise, r)
    return x + each(delta, x) * score / 2 + each((2 * delta).sqrt(), x) * noise, delta


def corrector_in_a_loop(x, score, noise, r):
    states, deltas = [], []
    for one, s, z in zip(x.double(), score.double(), noise.double(), strict=True):
        ratio = math.sqrt((z * z).sum().item() / (s * s).sum().item())
        states.append(one + 2 * r**2 * ratio**2 * s + 2 * r * ratio * z)
        deltas.append(2 * r**2 * ratio**2)
    return torch.stack(states).to(x.dtype), torch.tensor(deltas, dtype=x.dtype)


def corrector_by_einsum(x, score, noise, r):
    """√(2δ) is 2r‖z‖/‖s‖, and δ half its square."""
    strength = 2 * r * (torch.einsum("b...,b...->b", noise, noise) / torch.einsum("b...,b...->b", score, score)).sqrt()
    move = torch.einsum("b,b...->b...", strength**2 / 2, score) + torch.einsum("b,b...->b...", strength, noise)
    return move + x, strength**2 / 2


def corrector_keeping_dims(x, score, noise, r):
    axes = tuple(range(1, x.ndim))
    delta = 2 * r**2 * noise.square().mean(axes, keepdim=True) / score.square().mean(axes, keepdim=True)
    return torch.addcmul(x + score * delta, noise, torch.sqrt(delta + delta)), delta.reshape(len(x))


def cloud(g, shape, dtype=SINGLE):
    """States whose scores differ in size from sample to sample."""
    size = each(uniform(g, 0.4, 2.5, shape[0]), torch.ones(shape, dtype=dtype))
    parts = {name: normal(g, shape, dtype) for name in ("x", "score", "noise")}
    return {**parts, "score": size * parts["score"], "r": number(g, 0.2, 0.4)}


CORRECTOR = Exercise(
    "corrector_step",
    points=3,
    minutes=15,
    difficulty=2,
    reference=corrector_step,
    outputs=("x", "delta"),
    visible=Group(1, lambda g: [cloud(g, (4, 3)), cloud(g, (2, 1, 3, 4)), cloud(g, (3, 2, 2), DOUBLE)]),
    hidden={
        "other shapes": Group(1, lambda g: [cloud(g, (6, 2)), cloud(g, (2, 3, 7, 5)), cloud(g, (3, 1, 1, 9), DOUBLE)]),
        "a batch of one, and single values": Group(
            1, lambda g: [cloud(g, (1, 2)), cloud(g, (1, 1, 4, 4), DOUBLE), cloud(g, (5, 1), DOUBLE)]
        ),
    },
    mistakes={
        "you averaged the norms over the batch": (
            corrector_batch_mean,
            "So the paper's code does; but then a sample's step depends on what else is in the batch. Asked is a step for each sample.",
        ),
        "you took the norms of the whole batch": (
            corrector_whole_batch,
            "Flatten each sample and take the norm over dimension 1: one number for each sample.",
        ),
        "you forgot the factor 2": (
            corrector_no_2,
            "From δ‖s‖ = r √(2δ) ‖z‖: squared, δ² ‖s‖² = r² 2δ ‖z‖², and one δ cancels.",
        ),
        "you did not square r": (
            corrector_r_not_squared,
            "From δ‖s‖ = r √(2δ) ‖z‖: square both sides, r included, then one δ cancels.",
        ),
        "you did not square the ratio": (
            corrector_not_squared,
            "From δ‖s‖ = r √(2δ) ‖z‖: δ stands on one side, its root on the other, so the ratio of norms is squared.",
        ),
        "you turned the ratio of norms over": (
            corrector_upside_down,
            "A large score needs a small step: ‖s‖ stands below.",
        ),
        "you squared the norms twice": (
            corrector_squared_twice,
            "‖z‖ is a root already. δ has the squared norms, to the first power.",
        ),
        "you multiplied the noise by √δ": (
            corrector_root_delta,
            "Langevin dynamics has √(2δ) beside δ. With √δ the cloud has half the variance that it should have.",
        ),
        "you forgot the root over 2δ": (corrector_no_root, "2δ is the variance of the noise. Its factor is √(2δ)."),
        "you wrote 2√δ for √(2δ)": (
            corrector_2_outside,
            "2√δ is √(4δ): the noise would have twice the variance.",
        ),
        "you walked downhill": (
            corrector_downhill,
            "The predictor's Δt is negative, for it goes back in time. The corrector stays at its t: its step δ is positive, uphill.",
        ),
        "you left out the noise": (
            corrector_no_noise,
            "Uphill alone, all samples end on the modes. The noise keeps the cloud as wide as p_t.",
        ),
        "you halved the score": (
            corrector_half_score,
            "½ s goes with √δ. Beside √(2δ) the score has the factor δ.",
        ),
    },
    correct={
        "a loop in double precision": corrector_in_a_loop,
        "einsum": corrector_by_einsum,
        "means over kept axes": corrector_keeping_dims,
    },
    forbidden=("samplers.langevin_step", "samplers.langevin", "samplers.predictor_corrector"),
)


# 5. sample_between ----------------------------------------------------------------------------------------------------


def walking(step):
    """A sampler from a step (x, score at t, dt, f, g², η, z) → x at t + dt."""

    @functools.wraps(step)
    def sample(score, x, times, f, g2, eta, noise):
        for i, (t, dt) in enumerate(zip(times[:-1].tolist(), times.diff().tolist(), strict=True)):
            x = step(x, score(x, t), dt, f[i].item(), g2[i].item(), eta, noise[i])
        return x

    return sample


def drift_of(x, s, f, g2, eta):
    return f * x - (1 + eta**2) / 2 * g2 * s


@walking
def sample_between(x, s, dt, f, g2, eta, z):
    return x + drift_of(x, s, f, g2, eta) * dt + eta * math.sqrt(g2 * -dt) * z


@walking
def between_positive(x, s, dt, f, g2, eta, z):
    return x - drift_of(x, s, f, g2, eta) * dt + eta * math.sqrt(g2 * -dt) * z


@walking
def between_eta_not_squared(x, s, dt, f, g2, eta, z):
    return x + (f * x - (1 + eta) / 2 * g2 * s) * dt + eta * math.sqrt(g2 * -dt) * z


@walking
def between_g(x, s, dt, f, g2, eta, z):
    return x + drift_of(x, s, f, math.sqrt(g2), eta) * dt + eta * math.sqrt(g2 * -dt) * z


@walking
def between_noise_g2(x, s, dt, f, g2, eta, z):
    return x + drift_of(x, s, f, g2, eta) * dt + eta * g2 * math.sqrt(-dt) * z


@walking
def between_no_root(x, s, dt, f, g2, eta, z):
    return x + drift_of(x, s, f, g2, eta) * dt - eta * math.sqrt(g2) * dt * z


@walking
def between_no_noise(x, s, dt, f, g2, eta, z):
    return x + drift_of(x, s, f, g2, eta) * dt


@walking
def between_no_half(x, s, dt, f, g2, eta, z):
    return x + (f * x - (1 + eta**2) * g2 * s) * dt + eta * math.sqrt(g2 * -dt) * z


@walking
def between_half_of_1(x, s, dt, f, g2, eta, z):
    return x + (f * x - (0.5 + eta**2) * g2 * s) * dt + eta * math.sqrt(g2 * -dt) * z


@walking
def between_sde(x, s, dt, f, g2, eta, z):
    return x + drift_of(x, s, f, g2, 1.0) * dt + math.sqrt(g2 * -dt) * z


@walking
def between_sde_weak_noise(x, s, dt, f, g2, eta, z):
    return x + drift_of(x, s, f, g2, 1.0) * dt + eta * math.sqrt(g2 * -dt) * z


@walking
def between_full_noise(x, s, dt, f, g2, eta, z):
    return x + drift_of(x, s, f, g2, eta) * dt + math.sqrt(g2 * -dt) * z


@walking
def between_eta2_noise(x, s, dt, f, g2, eta, z):
    return x + drift_of(x, s, f, g2, eta) * dt + eta**2 * math.sqrt(g2 * -dt) * z


@walking
def between_plus_score(x, s, dt, f, g2, eta, z):
    return x + drift_of(x, -s, f, g2, eta) * dt + eta * math.sqrt(g2 * -dt) * z


def between_next_coefficients(score, x, times, f, g2, eta, noise):
    return sample_between(score, x, times, f[1:], g2[1:], eta, noise)


def between_asks_later(score, x, times, f, g2, eta, noise):
    for i, (t, s) in enumerate(pairwise(times.tolist())):
        x = x + drift_of(x, score(x, s), f[i].item(), g2[i].item(), eta) * (s - t)
        x = x + eta * math.sqrt(g2[i] * (t - s)) * noise[i]
    return x


def between_equal_steps(score, x, times, f, g2, eta, noise):
    dt = (times[-1] - times[0]).item() / (len(times) - 1)
    for i, t in enumerate(times[:-1].tolist()):
        x = x + drift_of(x, score(x, t), f[i].item(), g2[i].item(), eta) * dt
        x = x + eta * math.sqrt(g2[i] * -dt) * noise[i]
    return x


def between_no_last_noise(score, x, times, f, g2, eta, noise):
    quiet = torch.cat([noise[:-1], torch.zeros_like(noise[-1:])])
    return sample_between(score, x, times, f, g2, eta, quiet)


def between_from_a_table(score, x, times, f, g2, eta, noise):
    """All coefficients at once, in double precision."""
    h = times[:-1] - times[1:]
    keep, climb, spread = 1 - f[:-1] * h, (1 + eta * eta) * g2[:-1] * h / 2, eta * (g2[:-1] * h).sqrt()
    state = x.double()
    for i in range(len(h)):
        state = keep[i] * state + climb[i] * score(state, times[i].item()) + spread[i] * noise[i].double()
    return state.to(x.dtype)


def between_in_two_parts(score, x, times, f, g2, eta, noise):
    """A step of the ODE, and a step of Langevin dynamics with δ = η² g² h / 2: what they add together."""
    for i in range(len(noise)):
        h, s = times[i] - times[i + 1], score(x, times[i].item())
        flow = -(f[i] * h).to(x) * x + (g2[i] * h / 2).to(x) * s
        delta = (eta**2 * g2[i] * h / 2).to(x)
        x = x + flow + delta * s + torch.sqrt(2 * delta) * noise[i]
    return x


def between_recursively(score, x, times, f, g2, eta, noise):
    if not len(noise):
        return x
    t, s = times[0].item(), times[1].item()
    pull, gain = float(f[0]), math.sqrt(float(g2[0]))
    ode = pull * x - gain**2 * score(x, t) / 2
    extra = -((eta * gain) ** 2) * score(x, t) / 2
    x = x - (t - s) * (ode + extra) + eta * gain * (t - s) ** 0.5 * noise[0]
    return between_recursively(score, x, times[1:], f[1:], g2[1:], eta, noise[1:])


def back(g, shape, count, eta, dtype=SINGLE):
    """A grid of `count` steps of unequal length, every time in a cell of its own of the score's table."""
    times = torch.arange(2 * count, -1, -2, dtype=DOUBLE) + uniform(g, 0, 0.9, count + 1)
    drawn = torch.rand(2, 2 * count + 1, generator=g, dtype=DOUBLE)
    return {
        "score": Affine(-0.3 - 0.7 * drawn[0], 0.2 + drawn[1]),
        "x": normal(g, shape, dtype),
        "times": times,
        "f": -uniform(g, 0.05, 0.25, count + 1),
        "g2": uniform(g, 0.1, 0.4, count + 1),
        "eta": eta,
        "noise": normal(g, (count, *shape), dtype),
    }


BETWEEN = Exercise(
    "sample_between",
    points=4,
    minutes=25,
    difficulty=3,
    reference=sample_between,
    outputs=("x",),
    visible=Group(
        1,
        lambda g: [
            back(g, (3, 2), 4, 0.6),
            back(g, (2, 1, 2, 2), 2, 1.0, DOUBLE),
            back(g, (2, 3), 3, 0.0),
            back(g, (2, 2), 3, 1.7, DOUBLE),
        ],
    ),
    hidden={
        "any η": Group(
            1,
            lambda g: [
                back(g, (5, 2), 6, number(g, 0.3, 0.8)),
                back(g, (2, 1, 7, 5), 3, number(g, 1.2, 2), DOUBLE),
                back(g, (4,), 3, number(g, 0.3, 0.8), DOUBLE),
            ],
        ),
        "the ODE, and the reverse SDE": Group(
            1, lambda g: [back(g, (4, 3), 5, 0.0), back(g, (3, 2), 5, 1.0), back(g, (2, 2, 2), 3, 0.0, DOUBLE)]
        ),
        "one step, and a batch of one": Group(
            1, lambda g: [back(g, (3, 2), 1, number(g, 0.3, 0.8)), back(g, (1, 1), 4, number(g, 1.2, 2), DOUBLE)]
        ),
    },
    mistakes={
        "you took a positive step of time": (
            between_positive,
            "The equation runs back from t to s: dt = s − t is negative. Only under the root stands its size.",
        ),
        "you wrote η for η² in the drift": (
            between_eta_not_squared,
            "The drift has to make good for the variance of the noise, η² g² dt. So η is squared there.",
        ),
        "you multiplied the score by g": (
            between_g,
            "It is g² in the drift, for the score is measured against the variance of the noise; g is beside dw̄.",
        ),
        "you multiplied the noise by g²": (
            between_noise_g2,
            "In a step the noise has variance η² g² |dt|. Its factor is the root.",
        ),
        "you multiplied the noise by |dt|": (
            between_no_root,
            "Brownian motion spreads like the root of time: the variances of the steps add up, so each is g² |dt|.",
        ),
        "you left out the noise": (
            between_no_noise,
            "Only η = 0 has none. The drift with η > 0 pulls the samples together, and the noise has to keep them apart.",
        ),
        "you forgot the ½": (
            between_no_half,
            "η = 0 must be the probability-flow ODE, f x − ½g² s, and η = 1 the reverse SDE, f x − g² s.",
        ),
        "you took ½ + η² for ½(1 + η²)": (
            between_half_of_1,
            "At η = 1 that is 3/2, but the reverse SDE has the factor 1.",
        ),
        "you took the reverse SDE whatever η is": (
            between_sde,
            "It is the case η = 1. η stands in two places: as η² in the drift, as η beside the noise.",
        ),
        "you scaled the noise by η, and not the drift": (
            between_sde_weak_noise,
            "Less noise with the same pull makes the cloud too narrow. The drift's factor is ½(1 + η²).",
        ),
        "you scaled the drift by η, and not the noise": (
            between_full_noise,
            "The noise is η g dw̄: for η = 0 there is none.",
        ),
        "you wrote η² beside the noise": (
            between_eta2_noise,
            "η² is in the variance; the factor of the noise is η.",
        ),
        "you added the score where it is subtracted": (
            between_plus_score,
            "dt is negative, so −g² s dt leads uphill, towards the data.",
        ),
        "you took f and g² where the step ends": (
            between_next_coefficients,
            "Euler's rule takes all of the right side where the step begins: the step from times[i] takes f[i] and g2[i].",
        ),
        "you asked the score at the time where the step ends": (
            between_asks_later,
            "x has the noise of time t, so t is the time to tell the score.",
        ),
        "you took all steps to be equally long": (
            between_equal_steps,
            "dt is times[i + 1] − times[i], anew in each step.",
        ),
        "you left out the noise of the last step": (
            between_no_last_noise,
            "Here each step gets its noise: the last time of the list need not be that of the data.",
        ),
    },
    correct={
        "a table, in double precision": between_from_a_table,
        "the ODE and Langevin": between_in_two_parts,
        "recursion": between_recursively,
    },
    tolerance=1e-4,
    forbidden=(
        "samplers.euler_maruyama",
        "samplers.euler_maruyama_step",
        "samplers.predictor_corrector",
        "samplers.ddim",
        "samplers.ddim_step",
        "samplers.ddpm",
        "samplers.ddpm_step",
    ),
)


# 6. estimated_log_prob ------------------------------------------------------------------------------------------------


def of_end(end):
    """log N(x; 0, I) of each sample."""
    return -0.5 * (end**2 + math.log(2 * math.pi)).flatten(1).sum(1)


def of_probes(times, probes, products):
    """The integral of vᵀJv over time for each probe, (K, B)."""
    along = (probes * products).flatten(3).sum(3) if probes.ndim > 2 else probes * products
    return torch.einsum("n,nkb->kb", times.diff().to(products.dtype), along)


def mean_and_error(end, integrals):
    return of_end(end) + integrals.mean(0), integrals.std(0) / len(integrals) ** 0.5


def estimated_log_prob(end, times, probes, products):
    return mean_and_error(end, of_probes(times, probes, products))


def estimate_minus(end, times, probes, products):
    return mean_and_error(end, -of_probes(times, probes, products))


def estimate_unit_probes(end, times, probes, products):
    length2 = probes.flatten(2).square().sum(2) if probes.ndim > 2 else probes**2
    return mean_and_error(end, of_probes(times, probes / each_of_two(length2, probes), products))


def each_of_two(numbers, like):
    return numbers.reshape(*numbers.shape, *[1] * (like.ndim - 2))


def estimate_mean_of_values(end, times, probes, products):
    return mean_and_error(end, of_probes(times, probes, products) / end[0].numel())


def estimate_sum_of_probes(end, times, probes, products):
    integrals = of_probes(times, probes, products)
    return of_end(end) + integrals.sum(0), integrals.std(0) / len(integrals) ** 0.5


def estimate_first_probe(end, times, probes, products):
    integrals = of_probes(times, probes, products)
    return of_end(end) + integrals[0], integrals.std(0) / len(integrals) ** 0.5


def estimate_biased(end, times, probes, products):
    integrals = of_probes(times, probes, products)
    return of_end(end) + integrals.mean(0), integrals.std(0, correction=0) / len(integrals) ** 0.5


def estimate_deviation(end, times, probes, products):
    integrals = of_probes(times, probes, products)
    return of_end(end) + integrals.mean(0), integrals.std(0)


def estimate_variance(end, times, probes, products):
    integrals = of_probes(times, probes, products)
    return of_end(end) + integrals.mean(0), integrals.var(0) / len(integrals)


def estimate_over_k(end, times, probes, products):
    integrals = of_probes(times, probes, products)
    return of_end(end) + integrals.mean(0), integrals.std(0) / len(integrals)


def step_errors(times, probes, products):
    """The standard error of each step's part, (N, B)."""
    pieces = pairwise(range(len(times)))
    parts = [of_probes(times[[i, j]], probes, products[i : i + 1]) for i, j in pieces]
    return torch.stack([part.std(0) for part in parts]) / len(probes) ** 0.5


def estimate_independent_steps(end, times, probes, products):
    log_prob, _ = estimated_log_prob(end, times, probes, products)
    return log_prob, step_errors(times, probes, products).square().sum(0).sqrt()


def estimate_sum_of_errors(end, times, probes, products):
    log_prob, _ = estimated_log_prob(end, times, probes, products)
    return log_prob, step_errors(times, probes, products).sum(0)


def estimate_equal_steps(end, times, probes, products):
    even = times[0] + (times[-1] - times[0]) * torch.arange(len(times), dtype=DOUBLE) / (len(times) - 1)
    return estimated_log_prob(end, even, probes, products)


def estimate_no_steps(end, times, probes, products):
    return estimated_log_prob(end, torch.arange(len(times), dtype=DOUBLE), probes, products)


def estimate_no_pi(end, times, probes, products):
    log_prob, error = estimated_log_prob(end, times, probes, products)
    return log_prob + end[0].numel() / 2 * math.log(2 * math.pi), error


def estimate_one_pi(end, times, probes, products):
    log_prob, error = estimated_log_prob(end, times, probes, products)
    return log_prob + (end[0].numel() - 1) / 2 * math.log(2 * math.pi), error


def estimate_no_end(end, times, probes, products):
    log_prob, error = estimated_log_prob(end, times, probes, products)
    return log_prob - of_end(end), error


def estimate_trace_of_products(end, times, probes, products):
    return mean_and_error(end, of_probes(times, torch.ones_like(probes), products))


def estimate_in_a_loop(end, times, probes, products):
    log_probs, errors = [], []
    for b in range(len(end)):
        found = []
        for k in range(len(probes)):
            total = 0.0
            for i in range(len(products)):
                total += (times[i + 1] - times[i]).item() * (probes[k, b] * products[i, k, b]).double().sum().item()
            found.append(total)
        mean = sum(found) / len(found)
        spread = sum((one - mean) ** 2 for one in found) / (len(found) - 1)
        log_probs.append(Normal(0.0, 1.0).log_prob(end[b].double()).sum().item() + mean)
        errors.append(math.sqrt(spread / len(found)))
    return torch.tensor(log_probs, dtype=end.dtype), torch.tensor(errors, dtype=end.dtype)


def estimate_by_pairs(end, times, probes, products):
    """The variance as half the mean square of the difference of two probes; the integral of Jv first, then one product."""
    integral = torch.tensordot(times.diff().to(products.dtype), products, dims=1)
    values = torch.einsum("kbd,kbd->kb", probes.flatten(2), integral.flatten(2)) if end.ndim > 1 else probes * integral
    pairs = list(combinations(values, 2))
    variance = sum((a - b) ** 2 for a, b in pairs) / (2 * len(pairs))
    flat = end.reshape(len(end), -1)
    dim = flat.shape[1]
    prior = MultivariateNormal(torch.zeros(dim, dtype=end.dtype), torch.eye(dim, dtype=end.dtype))
    return prior.log_prob(flat) + sum(values) / len(values), (variance / len(values)).sqrt()


def estimate_by_jackknife(end, times, probes, products):
    """How much the mean moves when one probe is left out."""
    h = np.diff(times.numpy())
    both = (products * probes[None]).double().numpy().reshape(*products.shape[:2], len(end), -1).sum(-1)
    values = np.einsum("n,nkb->kb", h, both)
    count = len(values)
    without = (values.sum(0) - values) / (count - 1)
    error = np.sqrt((count - 1) / count * ((without - values.mean(0)) ** 2).sum(0))
    flat = end.double().numpy().reshape(len(end), -1)
    log_prob = -(flat**2).sum(1) / 2 - flat.shape[1] * math.log(2 * math.pi) / 2 + values.mean(0)
    return torch.tensor(log_prob, dtype=end.dtype), torch.tensor(error, dtype=end.dtype)


def probed(g, shape, steps, count, dtype=SINGLE, signs=False):
    """Probes, and their products with symmetric matrices that change from step to step."""
    dim = math.prod(shape[1:])
    matrices = torch.randn(steps, shape[0], dim, dim, generator=g, dtype=DOUBLE) + torch.eye(dim, dtype=DOUBLE)
    probes = torch.randn(count, shape[0], dim, generator=g, dtype=DOUBLE)
    probes = probes.sign() if signs else probes
    products = torch.einsum("nbde,kbe->nkbd", matrices, probes)
    return {
        "end": normal(g, shape, dtype),
        "times": torch.cat([torch.zeros(1, dtype=DOUBLE), uniform(g, 0.05, 0.4, steps).cumsum(0)]),
        "probes": probes.reshape(count, *shape).to(dtype),
        "products": products.reshape(steps, count, *shape).to(dtype),
    }


ESTIMATE = Exercise(
    "estimated_log_prob",
    points=5,
    minutes=35,
    difficulty=4,
    reference=estimated_log_prob,
    outputs=("log_prob", "error"),
    visible=Group(
        1,
        lambda g: [probed(g, (3, 4), 4, 5, signs=True), probed(g, (2, 1, 2, 3), 3, 4, DOUBLE)],
    ),
    hidden={
        "other shapes": Group(
            2,
            lambda g: [
                probed(g, (5, 2), 6, 4),
                probed(g, (2, 1, 3, 5), 3, 7, DOUBLE, signs=True),
                probed(g, (2, 2, 2), 4, 3),
            ],
        ),
        "two probes, one step, a batch of one": Group(
            2,
            lambda g: [
                probed(g, (3, 3), 4, 2, DOUBLE),
                probed(g, (2, 3), 1, 6, signs=True),
                probed(g, (1, 2), 5, 3, DOUBLE),
                probed(g, (2, 1), 3, 4, DOUBLE),
            ],
        ),
    },
    mistakes={
        "you took the trace with the other sign": (
            estimate_minus,
            "Where the flow spreads out on its way to the noise, the data lay closer together: the density at the data is higher there.",
        ),
        "you divided by the squared length of the probe": (
            estimate_unit_probes,
            "A probe of length 1 sees the mean of the diagonal. With E vvᵀ = I the product vᵀJv is an estimate of its sum, as it is.",
        ),
        "you took the mean over the values of a sample": (
            estimate_mean_of_values,
            "vᵀJv is a sum over values, and a trace is a sum too.",
        ),
        "you added up the probes": (
            estimate_sum_of_probes,
            "Each probe is an estimate of the whole trace, so take their mean.",
        ),
        "you used the first probe only": (estimate_first_probe, "Take the mean over all K probes."),
        "you divided by K instead of K − 1 in the variance": (
            estimate_biased,
            "The mean was taken from the same K numbers, and they lie closer to it than to the truth: divide by K − 1.",
        ),
        "you gave the deviation of one probe": (
            estimate_deviation,
            "The mean of K independent estimates has a deviation smaller by √K.",
        ),
        "you gave the variance of the mean": (estimate_variance, "Asked is the standard error: the root of it."),
        "you divided by K instead of √K": (
            estimate_over_k,
            "The variance of a mean is smaller by K, so its deviation by √K.",
        ),
        "you took the errors of the steps as independent": (
            estimate_independent_steps,
            "One probe is used in all steps, so its errors go together. First integrate over time for each probe, then compare the probes.",
        ),
        "you added up the errors of the steps": (
            estimate_sum_of_errors,
            "That is right only if all errors go the same way. First integrate over time for each probe, then compare the probes.",
        ),
        "you took all steps to be equally long": (
            estimate_equal_steps,
            "Step i has the length times[i + 1] − times[i].",
        ),
        "you left out the lengths of the steps": (
            estimate_no_steps,
            "An integral over time: each trace is multiplied by the length of its step.",
        ),
        "you left out the 2π": (
            estimate_no_pi,
            "log N(x; 0, I) has −½ log 2π for each value of the sample.",
        ),
        "you counted the 2π once, not for each value": (
            estimate_one_pi,
            "log N(x; 0, I) is a sum over the values of the sample, and each has its −½ log 2π.",
        ),
        "you gave the change alone": (
            estimate_no_end,
            "The density at the data is that of the noise it flows to, log N(end; 0, I), plus the change on the way.",
        ),
        "you added up the values of Jv": (
            estimate_trace_of_products,
            "Jv is a vector. Its product with v is what has the trace as its mean.",
        ),
    },
    correct={
        "a loop": estimate_in_a_loop,
        "pairs of probes": estimate_by_pairs,
        "the jackknife": estimate_by_jackknife,
    },
    tolerance=1e-4,
    forbidden=("likelihood.ode_log_prob", "losses.jacobian_trace"),
)


EXERCISES = [OU, PATH, DSM, CORRECTOR, BETWEEN, ESTIMATE]
