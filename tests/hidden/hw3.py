"""Homework 3, DDPM: what is right, what people write instead, and the cases that tell one from the other.

For each exercise: the reference, the mistakes, right answers written in other ways, the cases. Every case has a table of
ᾱ of its own, of steps so large that no answer hangs on the last digits of 1 − ᾱ; a single value is in double precision,
for it may be a small difference of large ones.
"""

import functools
import math
from itertools import pairwise

import numpy as np
import torch
from torch.distributions import Normal, kl_divergence

from dgm_course.grading.exercise import Exercise, Group
from dgm_course.homework import Affine

SINGLE, DOUBLE = torch.float32, torch.float64


# What the exercises share ---------------------------------------------------------------------------------------------


def each(coefficients, like):
    """One number for each image, ready to multiply the images."""
    return coefficients.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def mix(a, x, b, y):
    return each(a, x) * x + each(b, y) * y


def table(g, steps):
    """ᾱ_0 = 1 … ᾱ_T for steps that each have a β of their own, between 0.05 and 0.35."""
    betas = 0.05 + 0.3 * torch.rand(steps, generator=g, dtype=DOUBLE)
    return torch.cat([torch.ones(1, dtype=DOUBLE), (1 - betas).cumprod(0)])


def into_noise(g, steps):
    """Such a table whose last entry is 0."""
    return torch.cat([table(g, steps - 1), torch.zeros(1, dtype=DOUBLE)])


def normal(g, shape, dtype=SINGLE):
    return torch.randn(shape, generator=g, dtype=dtype)


def whole(g, low, high, batch):
    """Whole numbers from `low` to `high`, both included; all different where there are enough of them."""
    drawn = low + torch.randperm(high - low + 1, generator=g)
    return drawn.repeat(batch)[:batch]


def jumps(g, first, last, batch, gap=2):
    """Times s and t for each image, first ≤ s, s + gap ≤ t ≤ last."""
    t = whole(g, first + gap, last, batch)
    s = first + (torch.rand(batch, generator=g) * (t - first - gap + 1)).long()
    return s, t


# 1. perturb_zero_snr --------------------------------------------------------------------------------------------------


def shifted(alpha_bars):
    """α*(t), from 1 to 0."""
    alpha = alpha_bars.sqrt()
    return (alpha - alpha[-1]) / (1 - alpha[-1])


def perturb_zero_snr(x0, t, eps, alpha_bars):
    a = shifted(alpha_bars)[t]
    return mix(a, x0, (1 - a**2).sqrt(), eps)


def perturb_as_before(x0, t, eps, alpha_bars):
    return mix(alpha_bars[t].sqrt(), x0, (1 - alpha_bars[t]).sqrt(), eps)


def perturb_not_scaled(x0, t, eps, alpha_bars):
    a = (alpha_bars.sqrt() - alpha_bars[-1].sqrt())[t]
    return mix(a, x0, (1 - a**2).sqrt(), eps)


def perturb_without_root(x0, t, eps, alpha_bars):
    return perturb_as_before(x0, t, eps, (alpha_bars - alpha_bars[-1]) / (1 - alpha_bars[-1]))


def perturb_old_sigma(x0, t, eps, alpha_bars):
    return mix(shifted(alpha_bars)[t], x0, (1 - alpha_bars[t]).sqrt(), eps)


def perturb_by_variance(x0, t, eps, alpha_bars):
    a = shifted(alpha_bars)[t]
    return mix(a, x0, 1 - a**2, eps)


def perturb_root_of_one_minus(x0, t, eps, alpha_bars):
    a = shifted(alpha_bars)[t]
    return mix(a, x0, (1 - a).sqrt(), eps)


def perturb_exchanged(x0, t, eps, alpha_bars):
    return perturb_zero_snr(eps, t, x0, alpha_bars)


def perturb_along_a_line(x0, t, eps, alpha_bars):
    a = shifted(alpha_bars)[t]
    return mix(a, x0, 1 - a, eps)


def perturb_one_entry_off(x0, t, eps, alpha_bars):
    return perturb_zero_snr(x0, t - 1, eps, alpha_bars)


def perturb_anchored_at_1(x0, t, eps, alpha_bars):
    alpha = alpha_bars.sqrt()
    a = ((alpha - alpha[-1]) * alpha[1] / (alpha[1] - alpha[-1]))[t]
    return mix(a, x0, (1 - a**2).sqrt(), eps)


def perturb_first_time(x0, t, eps, alpha_bars):
    return perturb_zero_snr(x0, t[:1].expand_as(t), eps, alpha_bars)


def perturb_in_a_loop(x0, t, eps, alpha_bars):
    last = math.sqrt(alpha_bars[-1].item())
    rows = []
    for image, time, noise in zip(x0, t.tolist(), eps, strict=True):
        a = (math.sqrt(alpha_bars[time].item()) - last) / (1 - last)
        rows.append(a * image.double() + math.sqrt(1 - a * a) * noise.double())
    return torch.stack(rows).to(x0.dtype)


def perturb_by_angle(x0, t, eps, alpha_bars):
    angle = torch.acos(shifted(alpha_bars))[t]
    cos, sin = angle.cos().to(x0.dtype), angle.sin().to(x0.dtype)
    return torch.einsum("b,b...->b...", cos, x0) + torch.einsum("b,b...->b...", sin, eps)


def perturb_in_the_images_dtype(x0, t, eps, alpha_bars):
    a = shifted(alpha_bars.to(x0.dtype))
    return mix(a[t], x0, ((1 - a) * (1 + a)).sqrt()[t], eps)


def noisy(g, shape, steps, t=None, dtype=SINGLE):
    t = whole(g, 0, steps, shape[0]) if t is None else torch.tensor(t)
    return {"x0": normal(g, shape, dtype), "t": t, "eps": normal(g, shape, dtype), "alpha_bars": table(g, steps)}


PERTURB = Exercise(
    "perturb_zero_snr",
    points=2,
    minutes=10,
    difficulty=1,
    reference=perturb_zero_snr,
    outputs=("xt",),
    visible=Group(
        1,
        lambda g: [noisy(g, (4, 3), 10, t=[0, 3, 7, 10]), noisy(g, (2, 1, 2, 3), 7, t=[5, 2], dtype=DOUBLE)],
    ),
    hidden={
        "other shapes and schedules": Group(
            0.5,
            lambda g: [
                noisy(g, (5, 2), 7),
                noisy(g, (2, 1, 7, 5), 20),
                noisy(g, (1, 1), 12, t=[4], dtype=DOUBLE),
                noisy(g, (3,), 9),
            ],
        ),
        "both ends": Group(
            0.5, lambda g: [noisy(g, (3, 4), 8, t=[8, 0, 4]), noisy(g, (1, 2, 2), 5, t=[5], dtype=DOUBLE)]
        ),
    },
    mistakes={
        "you used the schedule as it is": (
            perturb_as_before,
            "At t = T it keeps √ᾱ_T of x_0. Shift √ᾱ so that it ends in 0, then scale it so that it begins with 1.",
        ),
        "you shifted √ᾱ and did not scale it": (
            perturb_not_scaled,
            "Then not even t = 0 gives the clean image. After the shift, divide by what is left at t = 0: 1 − √ᾱ_T.",
        ),
        "you shifted ᾱ instead of √ᾱ": (
            perturb_without_root,
            "That ends in pure noise too, by another way: here the coefficient of x_0, √ᾱ, is what is shifted and scaled.",
        ),
        "you kept the old σ": (
            perturb_old_sigma,
            "The variance should stay 1 for data of variance 1, so σ* follows from α*: α*² + σ*² = 1.",
        ),
        "you multiplied the noise by its variance": (
            perturb_by_variance,
            "1 − α*² is a variance. The factor of ε is its square root.",
        ),
        "you took √(1 − α*) for σ*": (
            perturb_root_of_one_minus,
            "α* is what √ᾱ was, so under the root it is squared: σ* = √(1 − α*²).",
        ),
        "you exchanged x_0 and ε": (perturb_exchanged, "At t = 0 the clean image should come out, at t = T the noise."),
        "you let α* and σ* add up to 1": (
            perturb_along_a_line,
            "It is their squares that add up to 1: variances add, deviations do not.",
        ),
        "you read the table one entry early": (
            perturb_one_entry_off,
            "The table begins with ᾱ_0 = 1, so its entry number t is ᾱ_t. Entry −1 is the last: t = 0 becomes pure noise.",
        ),
        "you held the schedule fixed at t = 1 instead of t = 0": (
            perturb_anchored_at_1,
            "The paper's table begins with ᾱ_1. This one begins with ᾱ_0 = 1, and α*(0) = 1 is asked for.",
        ),
        "you used the first image's time for all images": (
            perturb_first_time,
            "t holds one time for each image. Take the table at all of t, and reshape to (B, 1, …) before you multiply.",
        ),
    },
    correct={
        "a loop in double precision": perturb_in_a_loop,
        "cosine and sine of an angle": perturb_by_angle,
        "the table in the images' dtype": perturb_in_the_images_dtype,
    },
    forbidden=("paths.GaussianPath.perturb", "paths.GaussianPath.quantity", "paths.GaussianPath.convert"),
)


# 2. skip_posterior ----------------------------------------------------------------------------------------------------


def skip_posterior(xt, x0, s, t, alpha_bars):
    abar_s, abar_t = alpha_bars[s], alpha_bars[t]
    v = 1 - abar_t / abar_s  # the noise of all steps from s to t
    keep, pull = (abar_t / abar_s).sqrt() * (1 - abar_s) / (1 - abar_t), abar_s.sqrt() * v / (1 - abar_t)
    return mix(keep, xt, pull, x0), (v * (1 - abar_s) / (1 - abar_t)).to(xt.dtype)


def posterior_one_beta(xt, x0, s, t, alpha_bars):
    beta = 1 - alpha_bars[t] / alpha_bars[t - 1]
    return posterior_with(beta, xt, x0, s, t, alpha_bars)


def posterior_sum_of_betas(xt, x0, s, t, alpha_bars):
    sums = torch.cat([alpha_bars.new_zeros(1), 1 - alpha_bars[1:] / alpha_bars[:-1]]).cumsum(0)
    return posterior_with(sums[t] - sums[s], xt, x0, s, t, alpha_bars)


def posterior_sum_root_kept(xt, x0, s, t, alpha_bars):
    sums = torch.cat([alpha_bars.new_zeros(1), 1 - alpha_bars[1:] / alpha_bars[:-1]]).cumsum(0)
    v, abar_s, abar_t = sums[t] - sums[s], alpha_bars[s], alpha_bars[t]
    keep, share = (abar_t / abar_s).sqrt() * (1 - abar_s) / (1 - abar_t), abar_s.sqrt() * v / (1 - abar_t)
    return mix(keep, xt, share, x0), (v * (1 - abar_s) / (1 - abar_t)).to(xt.dtype)


def posterior_all_steps(xt, x0, s, t, alpha_bars):
    return posterior_with(1 - alpha_bars[t], xt, x0, s, t, alpha_bars)


def posterior_with(v, xt, x0, s, t, alpha_bars):
    """The posterior with another v in it, and √(1 − v) in the place of √(ᾱ_t/ᾱ_s)."""
    abar_s, abar_t = alpha_bars[s], alpha_bars[t]
    keep, pull = (1 - v).clamp(min=0).sqrt() * (1 - abar_s) / (1 - abar_t), abar_s.sqrt() * v / (1 - abar_t)
    return mix(keep, xt, pull, x0), (v * (1 - abar_s) / (1 - abar_t)).to(xt.dtype)


def posterior_one_step(xt, x0, s, t, alpha_bars):
    return skip_posterior(xt, x0, t - 1, t, alpha_bars)


def posterior_deviation(xt, x0, s, t, alpha_bars):
    mean, variance = skip_posterior(xt, x0, s, t, alpha_bars)
    return mean, variance.sqrt()


def posterior_noisevariance(xt, x0, s, t, alpha_bars):
    return skip_posterior(xt, x0, s, t, alpha_bars)[0], (1 - alpha_bars[t] / alpha_bars[s]).to(xt.dtype)


def posterior_no_root_at_x0(xt, x0, s, t, alpha_bars):
    return skip_posterior(xt, each(alpha_bars[s].sqrt(), x0) * x0, s, t, alpha_bars)


def posterior_no_root_at_xt(xt, x0, s, t, alpha_bars):
    return skip_posterior(each((alpha_bars[t] / alpha_bars[s]).sqrt(), xt) * xt, x0, s, t, alpha_bars)


def posterior_exchanged(xt, x0, s, t, alpha_bars):
    return skip_posterior(x0, xt, s, t, alpha_bars)


def posterior_gain(xt, x0, s, t, alpha_bars):
    """Conditioning as a correction: the guess √ᾱ_s x_0, corrected by a share of what x_t has against it."""
    a, prior = (alpha_bars[t] / alpha_bars[s]).sqrt(), 1 - alpha_bars[s]
    gain = a * prior / (a**2 * prior + 1 - a**2)
    guess = each(alpha_bars[s].sqrt(), x0) * x0
    return guess + each(gain, xt) * (xt - each(a, xt) * guess), ((1 - gain * a) * prior).to(xt.dtype)


def posterior_by_eps(xt, x0, s, t, alpha_bars):
    """The step of DDIM with η = 1."""
    abar_s, abar_t = alpha_bars.to(xt.dtype)[s], alpha_bars.to(xt.dtype)[t]
    variance = (1 - abar_s) / (1 - abar_t) * (1 - abar_t / abar_s)
    eps = (xt - each(abar_t.sqrt(), xt) * x0) / each((1 - abar_t).sqrt(), xt)
    return mix(abar_s.sqrt(), x0, (1 - abar_s - variance).clamp(min=0).sqrt(), eps), variance


def posterior_by_precisions(xt, x0, s, t, alpha_bars):
    """A product of two Gaussians in x_s: precisions add, means are weighted by them; s = 0 is a case of its own."""
    rows = []
    for noisy_one, clean, i, j in zip(xt.double(), x0.double(), s.tolist(), t.tolist(), strict=True):
        step = (alpha_bars[j] / alpha_bars[i]).item()
        if i == 0:
            rows.append((clean, 0.0))
            continue
        from_x0, from_xt = 1 / (1 - alpha_bars[i].item()), step / (1 - step)
        there, variance = math.sqrt(alpha_bars[i].item()) * clean, 1 / (from_x0 + from_xt)
        rows.append((variance * (from_x0 * there + math.sqrt(step) / (1 - step) * noisy_one), variance))
    means, variances = zip(*rows, strict=True)
    return torch.stack(means).to(xt.dtype), torch.tensor(variances, dtype=xt.dtype)


def pair_of_times(g, shape, steps, dtype=SINGLE, s=None, t=None, make=table):
    drawn = jumps(g, 1, steps, shape[0])
    s, t = (a if b is None else torch.tensor(b) for a, b in zip(drawn, (s, t), strict=True))
    data = {"xt": normal(g, shape, dtype), "x0": normal(g, shape, dtype)}
    return {**data, "s": s, "t": t, "alpha_bars": make(g, steps)}


POSTERIOR = Exercise(
    "skip_posterior",
    points=3,
    minutes=20,
    difficulty=2,
    reference=skip_posterior,
    outputs=("mean", "variance"),
    visible=Group(
        1,
        lambda g: [
            pair_of_times(g, (3, 4), 10, s=[1, 4, 2], t=[5, 7, 10]),
            pair_of_times(g, (2, 1, 2, 3), 7, DOUBLE, s=[0, 3], t=[4, 6]),
        ],
    ),
    hidden={
        "other shapes and schedules": Group(
            1,
            lambda g: [
                pair_of_times(g, (5, 2), 9),
                pair_of_times(g, (2, 1, 7, 5), 25),
                pair_of_times(g, (1, 1), 7, DOUBLE),
                pair_of_times(g, (6,), 12),
            ],
        ),
        "s = 0, s = t − 1, t = T, and pure noise at T": Group(
            1,
            lambda g: [
                pair_of_times(g, (3, 2), 7, s=[0, 0, 3], t=[1, 7, 4]),
                pair_of_times(g, (1, 3), 7, DOUBLE, s=[0], t=[5]),
                pair_of_times(g, (3, 1, 2), 7, s=[0, 6, 2], t=[7, 7, 7], make=into_noise),
            ],
        ),
    },
    mistakes={
        "you used the β of one step": (
            posterior_one_beta,
            "From s to t there are several steps. Together they add noise of variance 1 − ᾱ_t/ᾱ_s.",
        ),
        "you added up the βs of the steps": (
            posterior_sum_of_betas,
            "Each later step also shrinks the noise of those before it. What they add together is 1 − ᾱ_t/ᾱ_s.",
        ),
        "you added up the βs, and kept √(ᾱ_t/ᾱ_s)": (
            posterior_sum_root_kept,
            "Each later step also shrinks the noise of those before it. What they add together is 1 − ᾱ_t/ᾱ_s.",
        ),
        "you took ᾱ_t for what the steps from s to t leave": (
            posterior_all_steps,
            "ᾱ_t counts from 0. From s to t the share ᾱ_t/ᾱ_s of the variance is left.",
        ),
        "you went back one step, to t − 1": (
            posterior_one_step,
            "Asked is x_s, and s may be any time before t: ᾱ_s stands where the lecture has ᾱ_{t−1}.",
        ),
        "you returned the standard deviation": (posterior_deviation, "The second value asked for is a variance."),
        "you returned the variance of the step forward": (
            posterior_noisevariance,
            "1 − ᾱ_t/ᾱ_s is the variance of q(x_t | x_s). That of q(x_s | x_t, x_0) is smaller, by the factor (1 − ᾱ_s)/(1 − ᾱ_t).",
        ),
        "you forgot a square root in the factor of x_0": (
            posterior_no_root_at_x0,
            "x_s contains √ᾱ_s x_0: images are scaled by √ᾱ, variances by ᾱ.",
        ),
        "you forgot a square root in the factor of x_t": (
            posterior_no_root_at_xt,
            "x_t contains √(ᾱ_t/ᾱ_s) x_s: images are scaled by √ᾱ, variances by ᾱ.",
        ),
        "you exchanged x_t and x_0": (
            posterior_exchanged,
            "Try s = 0: the mean should be x_0, so the factor of x_t is the one with 1 − ᾱ_s in it.",
        ),
    },
    correct={
        "a guess and its correction": posterior_gain,
        "by ε, in the images' dtype": posterior_by_eps,
        "precisions, in a loop in double precision": posterior_by_precisions,
    },
    tolerance=1e-4,
    forbidden=(
        "paths.GaussianPath.posterior",
        "paths.GaussianPath.bridge",
        "paths.GaussianPath.transition",
        "samplers.ddpm_step",
        "samplers.ddim_step",
        "samplers.ddpm",
        "samplers.ddim",
    ),
)


# 3. complete ----------------------------------------------------------------------------------------------------------


def complete(xt, value, given, alpha_bar):
    if given == "eps" and (alpha_bar == 0).any():
        raise ValueError(f"alpha_bar must be positive where eps is given: at 0, x_t is eps; got {alpha_bar.tolist()}")
    return solved(xt, value, given, alpha_bar.sqrt(), (1 - alpha_bar).sqrt())


def solved(xt, value, given, alpha, sigma):
    a, b = each(alpha, xt), each(sigma, xt)
    if given == "v":
        return a * xt - b * value, b * xt + a * value, value
    x0 = (xt - b * value) / a
    return x0, value, a * value - b * x0


def complete_unless_all_noise(xt, value, given, alpha_bar):
    if given == "eps" and (alpha_bar == 0).all():
        raise ValueError("alpha_bar is 0")
    return complete_unguarded(xt, value, given, alpha_bar)


def complete_unguarded(xt, value, given, alpha_bar):
    return solved(xt, value, given, alpha_bar.sqrt(), (1 - alpha_bar).sqrt())


def complete_too_careful(xt, value, given, alpha_bar):
    return complete(xt, value, given if alpha_bar.all() else "eps", alpha_bar)


def complete_other_sign(xt, value, given, alpha_bar):
    x0, eps, v = complete(xt, -value if given == "v" else value, given, alpha_bar)
    return x0, eps, -v


def complete_exchanged(xt, value, given, alpha_bar):
    complete(xt, value, given, alpha_bar)
    return solved(xt, value, given, (1 - alpha_bar).sqrt(), alpha_bar.sqrt())


def complete_without_roots(xt, value, given, alpha_bar):
    complete(xt, value, given, alpha_bar)
    return solved(xt, value, given, alpha_bar, 1 - alpha_bar)


def complete_over_sigma(xt, value, given, alpha_bar):
    x0, eps, v = complete(xt, value, given, alpha_bar)
    return x0, (xt - each(alpha_bar.sqrt(), xt) * x0) / each((1 - alpha_bar).sqrt(), xt), v


def complete_over_alpha(xt, value, given, alpha_bar):
    x0, eps, v = complete(xt, value, given, alpha_bar)
    return x0, (v + each((1 - alpha_bar).sqrt(), xt) * x0) / each(alpha_bar.sqrt(), xt), v


def complete_v_of_xt(xt, value, given, alpha_bar):
    x0, eps, v = complete(xt, value, given, alpha_bar)
    return x0, eps, v if given == "v" else mix(alpha_bar.sqrt(), eps, -(1 - alpha_bar).sqrt(), xt)


def complete_as_complex(xt, value, given, alpha_bar):
    """x_t + iv is x_0 + iε, turned by an angle."""
    turn = each(torch.complex(alpha_bar.sqrt(), (1 - alpha_bar).sqrt()), xt.to(torch.complex128))
    if given == "v":
        clean = turn * torch.complex(xt.double(), value.double())
        return clean.real.to(xt.dtype), clean.imag.to(xt.dtype), value
    if bool((turn.real <= 0).any()):
        raise ValueError("alpha_bar = 0")
    v = (value - turn.imag * xt) / turn.real
    return (turn * torch.complex(xt.double(), v)).real.to(xt.dtype), value.clone(), v.to(xt.dtype)


def complete_by_a_solver(xt, value, given, alpha_bar):
    """Two equations in x_0 and ε for each image, left to a solver."""
    if given == "eps" and alpha_bar.min() <= 0:
        raise ValueError("some alpha_bar is 0, where ε does not determine x_0")
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    second = [-sigma, alpha] if given == "v" else [zero, one]
    system = torch.stack([torch.stack([alpha, sigma], 1), torch.stack(second, 1)], 1)
    right = torch.stack([xt, value], 1).double().reshape(len(xt), 2, -1)
    x0, eps = torch.linalg.solve(system, right).unbind(1)
    v = alpha[:, None] * eps - sigma[:, None] * x0
    return tuple(part.reshape(xt.shape).to(xt.dtype) for part in (x0, eps, v))


def complete_in_a_loop(xt, value, given, alpha_bar):
    rows = []
    for x, known, abar in zip(xt, value, alpha_bar.tolist(), strict=True):
        a, b = math.sqrt(abar), math.sqrt(1 - abar)
        if given == "v":
            rows.append((a * x - b * known, b * x + a * known, known))
        elif abar == 0:
            raise ValueError(f"alpha_bar must not be 0; got {abar}")
        else:
            rows.append((x / a - b / a * known, known, known / a - b / a * x))
    return tuple(torch.stack(column) for column in zip(*rows, strict=True))


def known(g, given, shape, dtype=SINGLE, alpha_bar=None):
    drawn = 0.1 + 0.8 * torch.rand(shape[0], generator=g, dtype=DOUBLE)
    alpha_bar = drawn if alpha_bar is None else torch.tensor(alpha_bar, dtype=DOUBLE)
    return {"xt": normal(g, shape, dtype), "value": normal(g, shape, dtype), "given": given, "alpha_bar": alpha_bar}


COMPLETE = Exercise(
    "complete",
    points=2,
    minutes=15,
    difficulty=2,
    reference=complete,
    outputs=("x0", "eps", "v"),
    visible=Group(
        1,
        lambda g: [
            known(g, "v", (4, 2), alpha_bar=[0.3, 0.0, 0.8, 1.0]),
            known(g, "eps", (3, 1, 2, 2), DOUBLE, alpha_bar=[0.6, 1.0, 0.2]),
            known(g, "eps", (2, 2), alpha_bar=[0.5, 0.0]),
            known(g, "eps", (1, 2), alpha_bar=[0.0]),
        ],
    ),
    hidden={
        "other shapes": Group(
            0.5,
            lambda g: [
                known(g, "v", (5, 2)),
                known(g, "eps", (2, 1, 7, 5)),
                known(g, "v", (1, 1), DOUBLE),
                known(g, "eps", (4,)),
            ],
        ),
        "both ends, and errors": Group(
            0.5,
            lambda g: [
                known(g, "v", (3, 2), DOUBLE, alpha_bar=[1.0, 0.0, 0.4]),
                known(g, "v", (1, 3), alpha_bar=[0.0]),
                known(g, "eps", (2, 3), alpha_bar=[1.0, 0.7]),
                known(g, "eps", (3, 1), DOUBLE, alpha_bar=[0.9, 0.5, 0.0]),
            ],
        ),
    },
    mistakes={
        "you raised the error only where all ᾱ are 0": (
            complete_unless_all_noise,
            "One image with ᾱ = 0 is enough: its x_0 would be infinite or no number. Ask for any of them, not for all.",
        ),
        "you divided by √ᾱ = 0": (
            complete_unguarded,
            "Where ᾱ = 0, x_t is ε itself, and ε says nothing of x_0. Raise a ValueError before you divide.",
        ),
        "you raised the error when v is given, too": (
            complete_too_careful,
            "v determines x_0 and ε for every ᾱ: at ᾱ = 0 it is −x_0. Only ε leaves x_0 open there.",
        ),
        "you took v with the other sign": (
            complete_other_sign,
            "v = α ε − σ x_0. At ᾱ = 0 it is −x_0, at ᾱ = 1 it is ε.",
        ),
        "you exchanged α and σ": (complete_exchanged, "α = √ᾱ belongs to the data, σ = √(1 − ᾱ) to the noise."),
        "you forgot the square roots of ᾱ and 1 − ᾱ": (
            complete_without_roots,
            "α = √ᾱ and σ = √(1 − ᾱ): it is their squares that add up to 1.",
        ),
        "you found ε by a division by σ": (
            complete_over_sigma,
            "At ᾱ = 1 that is 0/0. Solve the two equations for x_t and v together: with α² + σ² = 1 no division is left.",
        ),
        "you found ε by a division by α": (
            complete_over_alpha,
            "At ᾱ = 0 that is 0/0. Solve the two equations for x_t and v together: with α² + σ² = 1 no division is left.",
        ),
        "you took x_t for x_0 in v": (
            complete_v_of_xt,
            "v = α ε − σ x_0, with the clean image: first find x_0 from x_t and ε.",
        ),
    },
    correct={
        "complex numbers": complete_as_complex,
        "a linear solver": complete_by_a_solver,
        "a loop": complete_in_a_loop,
    },
    mentions=("alpha_bar",),
    forbidden=("paths.GaussianPath.convert", "paths.GaussianPath.quantity", "paths.GaussianPath.perturb"),
)


# 4. x0_weight ---------------------------------------------------------------------------------------------------------


def x0_weight(s, t, alpha_bars, variance):
    abar_s, abar_t = alpha_bars[s], alpha_bars[t]
    return step_weight(abar_s, abar_t, 1 - abar_t / abar_s, variance)


def step_weight(abar_s, abar_t, v, variance):
    c, posterior = abar_s.sqrt() * v / (1 - abar_t), v * (1 - abar_s) / (1 - abar_t)
    sigma2 = posterior if variance == "posterior" else v
    return c**2 / (2 * sigma2), 0.5 * (posterior / sigma2 - 1 - (posterior / sigma2).log())


def ratio(s, t, alpha_bars):
    """β̃ over β_{t|s}."""
    return (1 - alpha_bars[s]) / (1 - alpha_bars[t])


def weight_one_beta(s, t, alpha_bars, variance):
    return step_weight(alpha_bars[s], alpha_bars[t], 1 - alpha_bars[t] / alpha_bars[t - 1], variance)


def weight_of_eps(s, t, alpha_bars, variance):
    weight, constant = x0_weight(s, t, alpha_bars, variance)
    return weight * (1 - alpha_bars[t]) / alpha_bars[t], constant


def weight_without_half(s, t, alpha_bars, variance):
    weight, constant = x0_weight(s, t, alpha_bars, variance)
    return 2 * weight, 2 * constant


def weight_always_posterior(s, t, alpha_bars, variance):
    return x0_weight(s, t, alpha_bars, "posterior")


def weight_no_constant(s, t, alpha_bars, variance):
    weight, constant = x0_weight(s, t, alpha_bars, variance)
    return weight, torch.zeros_like(constant)


def weight_other_direction(s, t, alpha_bars, variance):
    r = 1 / ratio(s, t, alpha_bars) if variance == "beta" else alpha_bars.new_ones(len(s))
    return x0_weight(s, t, alpha_bars, "posterior")[0], 0.5 * (r - 1 - r.log())


def weight_over_deviation(s, t, alpha_bars, variance):
    weight, constant = x0_weight(s, t, alpha_bars, variance)
    sigma2 = (1 - alpha_bars[t] / alpha_bars[s]) * (ratio(s, t, alpha_bars) if variance == "posterior" else 1)
    return weight * sigma2.sqrt(), constant


def weight_of_the_mean(s, t, alpha_bars, variance):
    weight, constant = x0_weight(s, t, alpha_bars, variance)
    return weight / pull(s, t, alpha_bars) ** 2, constant


def weight_not_squared(s, t, alpha_bars, variance):
    weight, constant = x0_weight(s, t, alpha_bars, variance)
    return weight / pull(s, t, alpha_bars), constant


def pull(s, t, alpha_bars):
    """The factor of x_0 in the mean."""
    return alpha_bars[s].sqrt() * (1 - alpha_bars[t] / alpha_bars[s]) / (1 - alpha_bars[t])


def weight_exchanged(s, t, alpha_bars, variance):
    return x0_weight(s, t, alpha_bars, "beta" if variance == "posterior" else "posterior")


def weight_wrong_log(s, t, alpha_bars, variance):
    weight, constant = x0_weight(s, t, alpha_bars, variance)
    return weight, constant + (ratio(s, t, alpha_bars).log() if variance == "beta" else 0)


def weight_by_snr(s, t, alpha_bars, variance):
    snr = 1 / (1 / alpha_bars - 1)
    weight = 0.5 * (snr[s] - snr[t])
    if variance == "posterior":
        return weight, torch.zeros_like(weight)
    r = ratio(s, t, alpha_bars)
    return weight * r, 0.5 * torch.special.expm1(r.log()) - 0.5 * r.log()


def weight_by_distributions(s, t, alpha_bars, variance):
    """The KL of the library: without an error of x̂_0 it is the constant, with an error of 1 the weight is added."""
    abar_s, abar_t = alpha_bars[s], alpha_bars[t]
    upper = 1 - abar_t / abar_s
    lower = upper * ratio(s, t, alpha_bars)
    c = abar_s.sqrt() * upper / (1 - abar_t)
    model = Normal(torch.zeros_like(c), (lower if variance == "posterior" else upper).sqrt())
    constant = kl_divergence(Normal(torch.zeros_like(c), lower.sqrt()), model)
    return kl_divergence(Normal(c, lower.sqrt()), model) - constant, constant


def weight_in_a_loop(s, t, alpha_bars, variance):
    rows = []
    for i, j in zip(alpha_bars[s].tolist(), alpha_bars[t].tolist(), strict=True):
        step = 1 - j / i
        share = (1 - i) / (1 - j) if variance == "beta" else 1.0
        sigma2 = step if variance == "beta" else step * (1 - i) / (1 - j)
        rows.append((i * (step / (1 - j)) ** 2 / sigma2 / 2, (share - 1 - math.log(share)) / 2))
    return tuple(torch.tensor(column, dtype=DOUBLE) for column in zip(*rows, strict=True))


def one_step(g, variance, steps, batch=None, gap=2, s=None, t=None, make=table):
    drawn = jumps(g, 1, steps, batch or len(s), gap)
    s, t = (a if b is None else torch.tensor(b) for a, b in zip(drawn, (s, t), strict=True))
    return {"s": s, "t": t, "alpha_bars": make(g, steps), "variance": variance}


WEIGHT = Exercise(
    "x0_weight",
    points=4,
    minutes=25,
    difficulty=3,
    reference=x0_weight,
    outputs=("weight", "constant"),
    visible=Group(
        1,
        lambda g: [
            one_step(g, "posterior", 10, s=[1, 4, 2], t=[4, 6, 10]),
            one_step(g, "beta", 10, s=[1, 4, 2], t=[4, 6, 10]),
        ],
    ),
    hidden={
        "Σ_θ = β̃": Group(1, lambda g: [one_step(g, "posterior", 12, batch=5), one_step(g, "posterior", 7, batch=1)]),
        "Σ_θ = β": Group(1, lambda g: [one_step(g, "beta", 12, batch=5), one_step(g, "beta", 7, batch=1)]),
        "neighbours, t = T, and pure noise at T": Group(
            1,
            lambda g: [
                one_step(g, "beta", 9, s=[1, 8, 4, 1], t=[2, 9, 5, 9]),
                one_step(g, "posterior", 9, s=[1, 8, 4, 1], t=[2, 9, 5, 9]),
                one_step(g, "beta", 6, s=[2, 5], t=[6, 6], make=into_noise),
            ],
        ),
    },
    mistakes={
        "you used the β of one step": (
            weight_one_beta,
            "From s to t there are several steps. Together they add noise of variance 1 − ᾱ_t/ᾱ_s.",
        ),
        "you gave the weight of an error in ε": (
            weight_of_eps,
            "An error in x̂_0 is √(1 − ᾱ_t)/√ᾱ_t times that in ε̂. Start from the mean as a mix of x_t and x̂_0.",
        ),
        "you gave the weight of an error in the mean": (
            weight_of_the_mean,
            "1/(2σ²) weighs the squared distance of the means, as on the slide. They differ by (x_0 − x̂_0) times the factor of x_0.",
        ),
        "you did not square the factor of x_0": (
            weight_not_squared,
            "The distance of the means is squared, and with it the factor of x_0 − x̂_0 in it.",
        ),
        "you exchanged the two choices of Σ_θ": (
            weight_exchanged,
            '"posterior" is σ² = β̃, where the constant is 0; "beta" is σ² = 1 − ᾱ_t/ᾱ_s.',
        ),
        "you dropped the ½": (
            weight_without_half,
            "The exponent of a Gaussian is −(x − μ)²/(2σ²), and its log σ is ½ log σ²: the whole KL has a ½.",
        ),
        "you took Σ_θ = β̃ in both cases": (
            weight_always_posterior,
            "The weight c²/(2β̃), with c the factor of x_0 in the mean, and the constant 0 hold for Σ_θ = β̃ only: here σ² is stated.",
        ),
        "you left out the constant": (
            weight_no_constant,
            "It is 0 for Σ_θ = β̃. With Σ_θ = β two Gaussians of different width stay apart even where x̂_0 = x_0.",
        ),
        "you took the KL the other way round": (
            weight_other_direction,
            "Asked is KL(q ‖ p_θ): the mean is over q, so that the model's variance σ² divides.",
        ),
        "you divided by σ instead of σ²": (
            weight_over_deviation,
            "The squared distance of the means is divided by a variance: c²/(2σ²), with c the factor of x_0 in the mean.",
        ),
        "the logarithm in the constant has the wrong sign": (
            weight_wrong_log,
            "A KL is never negative: with r = β̃/σ² it has r − 1 − log r, which is 0 at r = 1 and positive elsewhere.",
        ),
    },
    correct={
        "by the SNR": weight_by_snr,
        "torch.distributions": weight_by_distributions,
        "a loop": weight_in_a_loop,
    },
    forbidden=(
        "losses.bound_term",
        "likelihood.bound",
        "paths.GaussianPath.posterior",
        "paths.GaussianPath.bridge",
        "paths.GaussianPath.transition",
    ),
)


# 5. sample_subset -----------------------------------------------------------------------------------------------------


def walking(step):
    """A sampler from a step (x, x0_hat, t, s, alpha_bars, z) → x_s."""

    @functools.wraps(step)
    def sample(denoiser, x, times, alpha_bars, noise):
        for (t, s), z in zip(pairwise(times.tolist()), noise, strict=True):
            x = step(x, denoiser(x, t), t, s, alpha_bars, z)
        return x

    return sample


def mean_of(x, x0_hat, t, s, alpha_bars):
    abar_s, abar_t = alpha_bars[s], alpha_bars[t]
    v = 1 - abar_t / abar_s
    return (abar_t / abar_s).sqrt() * (1 - abar_s) / (1 - abar_t) * x + abar_s.sqrt() * v / (1 - abar_t) * x0_hat


def upper(t, s, alpha_bars):
    return 1 - alpha_bars[t] / alpha_bars[s] if s > 0 else alpha_bars.new_zeros(())


@walking
def sample_subset(x, x0_hat, t, s, alpha_bars, z):
    return mean_of(x, x0_hat, t, s, alpha_bars) + upper(t, s, alpha_bars).sqrt() * z


@walking
def sample_noise_at_0(x, x0_hat, t, s, alpha_bars, z):
    return mean_of(x, x0_hat, t, s, alpha_bars) + (1 - alpha_bars[t] / alpha_bars[s]).sqrt() * z


def sample_no_last_noise(denoiser, x, times, alpha_bars, noise):
    return sample_subset(denoiser, x, times, alpha_bars, torch.cat([noise[:-1], torch.zeros_like(noise[-1:])]))


@walking
def sample_by_variance(x, x0_hat, t, s, alpha_bars, z):
    return mean_of(x, x0_hat, t, s, alpha_bars) + upper(t, s, alpha_bars) * z


@walking
def sample_one_beta(x, x0_hat, t, s, alpha_bars, z):
    return mean_of(x, x0_hat, t, s, alpha_bars) + (upper(t, t - 1, alpha_bars).sqrt() if s else 0) * z


@walking
def sample_one_step_mean(x, x0_hat, t, s, alpha_bars, z):
    return mean_of(x, x0_hat, t, t - 1, alpha_bars) + upper(t, s, alpha_bars).sqrt() * z


@walking
def sample_lower(x, x0_hat, t, s, alpha_bars, z):
    lower = upper(t, s, alpha_bars) * (1 - alpha_bars[s]) / (1 - alpha_bars[t])
    return mean_of(x, x0_hat, t, s, alpha_bars) + lower.sqrt() * z


@walking
def sample_around_x0(x, x0_hat, t, s, alpha_bars, z):
    return x0_hat + upper(t, s, alpha_bars).sqrt() * z


@walking
def sample_noise_again(x, x0_hat, t, s, alpha_bars, z):
    return alpha_bars[s].sqrt() * x0_hat + (1 - alpha_bars[s]).sqrt() * z


def sample_asks_at_s(denoiser, x, times, alpha_bars, noise):
    for (t, s), z in zip(pairwise(times.tolist()), noise, strict=True):
        x = mean_of(x, denoiser(x, s), t, s, alpha_bars) + upper(t, s, alpha_bars).sqrt() * z
    return x


def sample_by_eps(denoiser, x, times, alpha_bars, noise):
    """The mean as DDIM writes it, by x̂_0 and ε̂."""
    for i in range(len(times) - 1):
        t, s = int(times[i]), int(times[i + 1])
        a_t, a_s = math.sqrt(alpha_bars[t]), math.sqrt(alpha_bars[s])
        var_t, var_s = 1 - a_t**2, 1 - a_s**2
        step = var_t - (a_t / a_s) ** 2 * var_s
        x0_hat = denoiser(x, t)
        eps = (x - a_t * x0_hat) / math.sqrt(var_t)
        x = a_s * x0_hat + math.sqrt(max(var_s - step * var_s / var_t, 0)) * eps
        if s != 0:
            x = x + math.sqrt(step) * noise[i]
    return x


def sample_from_a_table(denoiser, x, times, alpha_bars, noise):
    """All coefficients at once, in double precision; the last step to 0 has none of the noise."""
    t, s = times[:-1], times[1:]
    a, rest_s, rest_t = (alpha_bars[t] / alpha_bars[s]).sqrt(), 1 - alpha_bars[s], 1 - alpha_bars[t]
    keep, pull = a * rest_s / rest_t, alpha_bars[s].sqrt() * (1 - a**2) / rest_t
    std = ((1 - a**2) * (s > 0)).sqrt()
    state = x.double()
    for i, time in enumerate(t.tolist()):
        state = keep[i] * state + pull[i] * denoiser(state, time) + std[i] * noise[i].double()
    return state.to(x.dtype)


def sample_recursively(denoiser, x, times, alpha_bars, noise):
    """One step by gain and correction, in the images' dtype, and the rest by itself."""
    if len(times) == 1:
        return x
    t, s = times[0].item(), times[1].item()
    abar_s, abar_t = alpha_bars.to(x.dtype)[[s, t]]
    a2, prior = abar_t / abar_s, 1 - abar_s
    guess = abar_s.sqrt() * denoiser(x, t)
    x = guess + a2.sqrt() * prior / (a2 * prior + 1 - a2) * (x - a2.sqrt() * guess)
    return sample_recursively(denoiser, x + (1 - a2).sqrt() * noise[0] if s else x, times[1:], alpha_bars, noise[1:])


def chain(g, shape, steps, times, dtype=SINGLE):
    drawn = torch.rand(2, steps + 1, generator=g, dtype=DOUBLE)
    return {
        "denoiser": Affine(0.2 + 0.7 * drawn[0], 0.2 + drawn[1]),
        "x": normal(g, shape, dtype),
        "times": torch.tensor(times),
        "alpha_bars": table(g, steps),
        "noise": normal(g, (len(times) - 1, *shape), dtype),
    }


def subset(g, steps, count, end=0):
    """`count` times from T down to `end`, the last jump longer than one step."""
    inner = (end + 2 + torch.randperm(steps - end - 2, generator=g)[: count - 2]).sort(descending=True).values
    return [steps, *inner.tolist(), end]


SAMPLE = Exercise(
    "sample_subset",
    points=4,
    minutes=20,
    difficulty=2,
    reference=sample_subset,
    outputs=("x",),
    visible=Group(
        1,
        lambda g: [chain(g, (3, 2), 12, [12, 9, 5, 2, 0]), chain(g, (2, 1, 2, 2), 10, [10, 7, 3], DOUBLE)],
    ),
    hidden={
        "down to 0": Group(
            1, lambda g: [chain(g, (5, 2), 20, subset(g, 20, 6)), chain(g, (2, 1, 7, 5), 9, subset(g, 9, 4))]
        ),
        "ending before 0": Group(
            1,
            lambda g: [
                chain(g, (4, 3), 15, subset(g, 15, 5, end=3)),
                chain(g, (2, 2, 2), 9, subset(g, 9, 4, 1), DOUBLE),
            ],
        ),
        "one step, every step, a batch of one": Group(
            1,
            lambda g: [
                chain(g, (1, 1), 7, list(range(7, -1, -1)), DOUBLE),
                chain(g, (1, 2), 7, [6, 0]),
                chain(g, (3,), 7, [7, 4]),
            ],
        ),
    },
    mistakes={
        "you added noise in the step that ends at 0": (
            sample_noise_at_0,
            "The last state is what is looked at: at s = 0 return the mean, which is x̂_0.",
        ),
        "you left out the noise of the last step, though it ends before 0": (
            sample_no_last_noise,
            "Only data are free of noise. What counts is s = 0, not that no step follows.",
        ),
        "you multiplied the noise by its variance": (sample_by_variance, "The factor of the noise is √β, not β."),
        "you used the β of one step for the noise": (
            sample_one_beta,
            "The step goes from t to s. The noise between them has variance 1 − ᾱ_t/ᾱ_s, which is recomputed for each pair.",
        ),
        "you took the mean of one step back": (
            sample_one_step_mean,
            "The mean, too, is that of the leap: of q(x_s | x_t, x̂_0), with ᾱ_t/ᾱ_s in the place of α_t and ᾱ_s in that of ᾱ_{t−1}.",
        ),
        "you took β̃ for the variance": (
            sample_lower,
            "That is the lower choice of Σ_θ. Asked is the upper one, 1 − ᾱ_t/ᾱ_s.",
        ),
        "you took x̂_0 for the mean of each step": (
            sample_around_x0,
            "Line 4 of Algorithm 2, as the slide text reads, does this: it has ᾱ_t where α_t holds. The mean is that of q(x_s | x_t, x̂_0).",
        ),
        "you noised x̂_0 anew in each step": (
            sample_noise_again,
            "√ᾱ_s x̂_0 + √(1 − ᾱ_s) z forgets x_t. The mean of q(x_s | x_t, x̂_0) keeps a part of it.",
        ),
        "you asked the denoiser at s instead of t": (
            sample_asks_at_s,
            "The state has the noise of time t when it is denoised, so t is the time to tell the denoiser.",
        ),
    },
    correct={
        "x̂_0 and ε̂": sample_by_eps,
        "a table, in double precision": sample_from_a_table,
        "recursion, in the images' dtype": sample_recursively,
    },
    tolerance=1e-4,
    forbidden=(
        "samplers.ddpm",
        "samplers.ddpm_step",
        "samplers.ddim",
        "samplers.ddim_step",
        "paths.GaussianPath.posterior",
        "paths.GaussianPath.bridge",
        "paths.GaussianPath.transition",
    ),
)


# 6. gaussian_bound ----------------------------------------------------------------------------------------------------


def gaussian_bound(mean, var, alpha_bars, times):
    mmse = error_of(var, alpha_bars[times[:-1]])
    return bound_of(mean, var, alpha_bars, times, mmse, x0_weight(times[1:-1], times[:-2], alpha_bars, "beta"))


def error_of(var, abar):
    return var * (1 - abar) / (abar * var + 1 - abar)


def bound_of(mean, var, alpha_bars, times, mmse, line):
    """The terms, from the errors of x̂_0 at times[:-1] and the lines weight·error + constant of the inner steps."""
    weight, constant = line
    abar, sigma2 = alpha_bars[times[:1]], 1 - alpha_bars[times[-2:-1]]
    first = 0.5 * (abar * (mean**2 + var) - abar - (1 - abar).log())
    last = 0.5 * (2 * math.pi * sigma2).log() + mmse[-1:] / (2 * sigma2)
    return torch.cat([first, weight * mmse[:-1] + constant, last])


def bound_var_forgotten(mean, var, alpha_bars, times):
    terms = gaussian_bound(mean, var, alpha_bars, times)
    terms[0] -= 0.5 * alpha_bars[times[0]] * var
    return terms


def bound_mean_forgotten(mean, var, alpha_bars, times):
    return gaussian_bound(0.0, var, alpha_bars, times)


def bound_whole_chain(mean, var, alpha_bars, times):
    terms, abar = gaussian_bound(mean, var, alpha_bars, times), alpha_bars[-1:]
    return torch.cat([0.5 * (abar * (mean**2 + var) - abar - (1 - abar).log()), terms[1:]])


def bound_prior_forgotten(mean, var, alpha_bars, times):
    mmse = 1 / alpha_bars[times[:-1]] - 1
    return bound_of(mean, var, alpha_bars, times, mmse, x0_weight(times[1:-1], times[:-2], alpha_bars, "beta"))


def bound_error_at_s(mean, var, alpha_bars, times):
    right, late = error_of(var, alpha_bars[times[:-1]]), error_of(var, alpha_bars[times[1:]])
    mmse = torch.cat([late[:-1], right[-1:]])
    return bound_of(mean, var, alpha_bars, times, mmse, x0_weight(times[1:-1], times[:-2], alpha_bars, "beta"))


def bound_wrong_sign(mean, var, alpha_bars, times):
    terms, abar = gaussian_bound(mean, var, alpha_bars, times), alpha_bars[times[-2]]
    terms[-1] -= error_of(var, abar) / (1 - abar)
    return terms


def bound_wrong_log(mean, var, alpha_bars, times):
    terms, abar = gaussian_bound(mean, var, alpha_bars, times), alpha_bars[times[:1]]
    return torch.cat([0.5 * (abar * (mean**2 + var) - abar - abar.log()), terms[1:]])


def bound_no_pi(mean, var, alpha_bars, times):
    terms = gaussian_bound(mean, var, alpha_bars, times)
    terms[-1] -= 0.5 * math.log(2 * math.pi)
    return terms


def bound_ends_at_1(mean, var, alpha_bars, times):
    terms, abar = gaussian_bound(mean, var, alpha_bars, times), alpha_bars[1]
    terms[-1] = 0.5 * (2 * math.pi * (1 - abar)).log() + error_of(var, abar) / (2 * (1 - abar))
    return terms


def bound_no_constant(mean, var, alpha_bars, times):
    weight, _ = x0_weight(times[1:-1], times[:-2], alpha_bars, "beta")
    mmse = error_of(var, alpha_bars[times[:-1]])
    return bound_of(mean, var, alpha_bars, times, mmse, (weight, 0 * weight))


def bound_lower_variance(mean, var, alpha_bars, times):
    mmse = error_of(var, alpha_bars[times[:-1]])
    return bound_of(mean, var, alpha_bars, times, mmse, x0_weight(times[1:-1], times[:-2], alpha_bars, "posterior"))


def bound_one_beta(mean, var, alpha_bars, times):
    mmse = error_of(var, alpha_bars[times[:-1]])
    return bound_of(mean, var, alpha_bars, times, mmse, weight_one_beta(times[1:-1], times[:-2], alpha_bars, "beta"))


def bound_guesses_the_mean(mean, var, alpha_bars, times):
    mmse = torch.full((len(times) - 1,), var, dtype=DOUBLE)
    return bound_of(mean, var, alpha_bars, times, mmse, x0_weight(times[1:-1], times[:-2], alpha_bars, "beta"))


def bound_in_bits(mean, var, alpha_bars, times):
    return gaussian_bound(mean, var, alpha_bars, times) / math.log(2)


def bound_in_a_loop(mean, var, alpha_bars, times):
    """Numbers of Python, and the error of x̂_0 as 1/(1/var + SNR)."""
    abar, times = alpha_bars.tolist(), times.tolist()
    keep = abar[times[0]]
    terms = [(keep * mean**2 + keep * var - keep - math.log1p(-keep)) / 2]
    for t, s in pairwise(times):
        mmse, step = 1 / (1 / var + abar[t] / (1 - abar[t])), 1 - abar[t] / abar[s]
        if s == 0:
            terms.append((math.log(2 * math.pi) + math.log(step) + mmse / step) / 2)
        else:
            share = (1 - abar[s]) / (1 - abar[t])
            terms.append(abar[s] * step / (1 - abar[t]) ** 2 * mmse / 2 + (share - 1 - math.log(share)) / 2)
    return torch.tensor(terms, dtype=DOUBLE)


def bound_by_distributions(mean, var, alpha_bars, times):
    """A KL of Gaussians is quadratic in the distance of their means, so its mean has the root mean square there."""
    now, then = alpha_bars[times[:-1]], alpha_bars[times[1:]]
    noise = 1 - now / then
    std = (noise * (1 - then) / (1 - now)).sqrt()[:-1]
    error = (var - now * var**2 / (now * var + 1 - now)).sqrt()  # what x_t leaves of the variance
    shift = (then.sqrt() * noise / (1 - now) * error)[:-1]
    first = Normal((now[:1] * (mean**2 + var)).sqrt(), (1 - now[:1]).sqrt())
    inner = kl_divergence(Normal(shift, std), Normal(torch.zeros_like(shift), noise[:-1].sqrt()))
    last = -Normal(0.0, noise[-1:].sqrt()).log_prob(error[-1:])
    return torch.cat([kl_divergence(first, Normal(0.0, 1.0)), inner, last])


def bound_by_quadrature(mean, var, alpha_bars, times):
    """L_T as a mean over x_0 on Gauss's points, the inner terms by the difference of two SNRs."""
    points, weights = (torch.from_numpy(part) for part in np.polynomial.hermite.hermgauss(8))
    abar = alpha_bars[times]
    x0 = mean + math.sqrt(2 * var) * points
    kl = 0.5 * (abar[0] * x0**2 - abar[0] - (1 - abar[0]).log())
    terms = [(weights * kl).sum() / weights.sum()]
    snr = abar[:-1] / (1 - abar[:-1])
    for i in range(len(times) - 2):
        share = (1 - abar[i + 1]) / (1 - abar[i])
        terms.append(0.5 * ((snr[i + 1] - snr[i]) * share / (1 / var + snr[i]) + share - 1 - share.log()))
    noise = 1 - abar[-2]
    terms.append(0.5 * (math.log(2 * math.pi) + noise.log() + 1 / (noise / var + abar[-2])))
    return torch.stack(terms)


def bounded(g, steps, times):
    mean, var = (2 * torch.rand(2, generator=g, dtype=DOUBLE) + torch.tensor([-2.5, 0.2], dtype=DOUBLE)).tolist()
    return {"mean": mean, "var": var, "alpha_bars": table(g, steps), "times": torch.tensor(times)}


BOUND = Exercise(
    "gaussian_bound",
    points=5,
    minutes=45,
    difficulty=4,
    reference=gaussian_bound,
    outputs=("terms",),
    visible=Group(1, lambda g: [bounded(g, 12, [12, 9, 5, 2, 0]), bounded(g, 9, [7, 3, 0])]),
    hidden={
        "other data and schedules": Group(
            2,
            lambda g: [
                bounded(g, 20, subset(g, 20, 7)),
                bounded(g, 9, subset(g, 9, 4)),
                bounded(g, 30, [25, 11, 4, 0]),
            ],
        ),
        "one step, and every step": Group(
            2, lambda g: [bounded(g, 7, [5, 0]), bounded(g, 7, list(range(7, -1, -1))), bounded(g, 10, [10, 8, 3, 0])]
        ),
    },
    mistakes={
        "you forgot the variance of x_0 in L_T": (
            bound_var_forgotten,
            "L_T is a mean over the data, and the mean of x_0² is mean² + var.",
        ),
        "you forgot the mean of x_0 in L_T": (
            bound_mean_forgotten,
            "L_T is a mean over the data, and the mean of x_0² is mean² + var.",
        ),
        "you wrote log ᾱ_T where log(1 − ᾱ_T) belongs in L_T": (
            bound_wrong_log,
            "The logarithm in a KL is that of the variances, and q(x_T | x_0) has variance 1 − ᾱ_T.",
        ),
        "you forgot the 2π in L_0": (
            bound_no_pi,
            "L_0 is no KL, in which 2π cancels, but minus the log of a density: ½ log(2πσ²) stands in it.",
        ),
        "you took L_T at the end of the table": (
            bound_whole_chain,
            "This chain starts at times[0], which need not be the last entry of the table.",
        ),
        "you forgot what the denoiser knows before it looks": (
            bound_prior_forgotten,
            "(1 − ᾱ_t)/ᾱ_t is the error of x_t/√ᾱ_t alone. Add the precision of the data: 1/mmse = 1/var + ᾱ_t/(1 − ᾱ_t).",
        ),
        "you took the denoiser's error at s instead of t": (
            bound_error_at_s,
            "The denoiser is asked at t, before the step.",
        ),
        "the squared error in L_0 has a minus sign": (
            bound_wrong_sign,
            "log p_θ(x_0 | x_t) has −(x_0 − μ)²/(2σ²). L_0 is minus that: an error makes it larger.",
        ),
        "you took L_0 at t = 1": (
            bound_ends_at_1,
            "The last step of this subset starts at times[−2], which need not be 1: σ² = 1 − ᾱ_t of that t.",
        ),
        "you left out the constants of the inner terms": (
            bound_no_constant,
            "They are 0 for Σ_θ = β̃. With Σ_θ = β each step pays for a width that is not the posterior's.",
        ),
        "you took Σ_θ = β̃ in the inner terms": (
            bound_lower_variance,
            "Asked is the upper choice, β_{t|s} = 1 − ᾱ_t/ᾱ_s. Weight and constant both depend on it.",
        ),
        "you used the β of one step": (
            bound_one_beta,
            "The inner steps go from t to s. The noise between them has variance 1 − ᾱ_t/ᾱ_s.",
        ),
        "you let the denoiser guess the mean of the data": (
            bound_guesses_the_mean,
            "Its error is then var. The exact denoiser uses x_t: 1/mmse = 1/var + ᾱ_t/(1 − ᾱ_t).",
        ),
        "you counted in bits": (bound_in_bits, "Asked are nats: natural logarithms, and no division by log 2."),
    },
    correct={
        "a loop over numbers": bound_in_a_loop,
        "torch.distributions": bound_by_distributions,
        "quadrature and SNRs": bound_by_quadrature,
    },
    forbidden=(
        "likelihood.bound",
        "likelihood.prior_term",
        "losses.bound_term",
        "paths.GaussianPath.posterior",
        "paths.GaussianPath.bridge",
        "paths.GaussianPath.transition",
    ),
)


EXERCISES = [PERTURB, POSTERIOR, COMPLETE, WEIGHT, SAMPLE, BOUND]
