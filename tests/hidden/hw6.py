"""Homework 6, distillation: what is right, what people write instead, and the cases that tell them apart.

For each exercise: the reference, the mistakes, right answers written in other ways, the cases. Networks are tables of numbers or
affine functions, which can be sent; paths have large steps, and as a rule α² + σ² is not 1, so that a wrong factor shows.
"""

import math
from itertools import pairwise

import numpy as np
import torch

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


def whole(g, low, high, *shape):
    """Whole numbers, low ≤ n < high; a Python int without a shape."""
    drawn = torch.randint(low, high, shape, generator=g)
    return drawn if shape else int(drawn)


def descending(g, first, last, count):
    """`count` steps from `first` down to `last`, over times between them that are drawn."""
    inner = last + 1 + torch.randperm(first - last - 1, generator=g)[: count - 1]
    return torch.cat([torch.tensor([first]), inner.sort(descending=True).values, torch.tensor([last])])


def angles(g, steps, first=0.0):
    """Growing angles from `first` to somewhat below a right one."""
    parts = uniform(g, 0.5, 1.5, steps).cumsum(0)
    reach = number(g, 1.25, 1.4) - first
    return torch.cat([torch.full((1,), first, dtype=DOUBLE), first + reach * parts / parts[-1]])


def circle(g, steps, into=False, first=0.0):
    """α and σ with α² + σ² = 1, for each of 0 … T; into pure noise, if asked."""
    turn = angles(g, steps, first)
    alphas, sigmas = turn.cos(), turn.sin()
    if into:
        alphas[-1], sigmas[-1] = 0.0, 1.0
    return {"alphas": alphas, "sigmas": sigmas}


def any_path(g, steps, into=False):
    """α and σ without that, α_0 = 1 and σ_0 = 0."""
    turn = angles(g, steps)
    size = torch.cat([torch.ones(1, dtype=DOUBLE), uniform(g, 0.6, 1.7, steps)])
    alphas, sigmas = size * turn.cos(), size * turn.sin()
    if into:
        alphas[-1], sigmas[-1] = 0.0, size[-1]
    return {"alphas": alphas, "sigmas": sigmas}


# 1. network_target ----------------------------------------------------------------------------------------------------


def network_target(xt, xs, alpha_t, sigma_t, alpha_s, sigma_s, of_x0, of_eps):
    area = alpha_s * sigma_t - alpha_t * sigma_s
    of_xt, of_xs = of_eps * alpha_s - of_x0 * sigma_s, of_x0 * sigma_t - of_eps * alpha_t
    return each(of_xt / area, xt) * xt + each(of_xs / area, xt) * xs


def from_guesses(guesses):
    """A target out of other x̃_0 and ε̃, worked out in double precision."""

    def answer(xt, xs, alpha_t, sigma_t, alpha_s, sigma_s, of_x0, of_eps):
        wide = torch.zeros_like(xt, dtype=DOUBLE)
        numbers = (each(one, wide) for one in (alpha_t, sigma_t, alpha_s, sigma_s))
        x0, eps = guesses(xt.double(), xs.double(), *numbers)
        return (each(of_x0, wide) * x0 + each(of_eps, wide) * eps).to(xt.dtype)

    return answer


def jump_x0(xt, xs, a_t, b_t, a_s, b_s):
    return (xs - b_s / b_t * xt) / (a_s - b_s / b_t * a_t)


@from_guesses
def target_exchanged(xt, xs, a_t, b_t, a_s, b_s):
    x0 = jump_x0(xs, xt, a_t, b_t, a_s, b_s)
    return x0, (xs - a_t * x0) / b_t


@from_guesses
def target_xs_is_clean(xt, xs, a_t, b_t, a_s, b_s):
    return xs, (xt - a_t * xs) / b_t


@from_guesses
def target_rest_of_noise(xt, xs, a_t, b_t, a_s, b_s):
    return xs / a_s, (xt - a_t * xs / a_s) / b_t


@from_guesses
def target_noise_at_s(xt, xs, a_t, b_t, a_s, b_s):
    x0 = jump_x0(xt, xs, a_t, b_t, a_s, b_s)
    return x0, (xs - a_s * x0) / b_s


@from_guesses
def target_by_alpha(xt, xs, a_t, b_t, a_s, b_s):
    eps = (xs - a_s / a_t * xt) / (b_s - a_s / a_t * b_t)
    return (xt - b_t * eps) / a_t, eps


@from_guesses
def target_on_a_circle(xt, xs, a_t, b_t, a_s, b_s):
    v = ((a_t * a_s + b_t * b_s) * xt - xs) / (b_t * a_s - a_t * b_s)
    return a_t * xt - b_t * v, b_t * xt + a_t * v


@from_guesses
def target_upside_down(xt, xs, a_t, b_t, a_s, b_s):
    x0 = (xs - b_t / b_s * xt) / (a_s - b_t / b_s * a_t)
    return x0, (xt - a_t * x0) / b_t


@from_guesses
def target_length_forgotten(xt, xs, a_t, b_t, a_s, b_s):
    x0 = xs - b_s / b_t * xt
    return x0, (xt - a_t * x0) / b_t


@from_guesses
def target_signal_kept(xt, xs, a_t, b_t, a_s, b_s):
    """Takes σ_s/σ_t x_t away, and forgets that α_t x_0 goes with it."""
    x0 = (xs - b_s / b_t * xt) / a_s
    return x0, (xt - a_t * x0) / b_t


@from_guesses
def target_noise_of_s_coefficients(xt, xs, a_t, b_t, a_s, b_s):
    x0 = jump_x0(xt, xs, a_t, b_t, a_s, b_s)
    return x0, (xt - a_s * x0) / b_t


@from_guesses
def target_all_of_s(xt, xs, a_t, b_t, a_s, b_s):
    x0 = jump_x0(xt, xs, a_t, b_t, a_s, b_s)
    return x0, (xt - a_s * x0) / b_s


def target_ab_exchanged(xt, xs, alpha_t, sigma_t, alpha_s, sigma_s, of_x0, of_eps):
    return network_target(xt, xs, alpha_t, sigma_t, alpha_s, sigma_s, of_eps, of_x0)


def target_sign(xt, xs, alpha_t, sigma_t, alpha_s, sigma_s, of_x0, of_eps):
    return -network_target(xt, xs, alpha_t, sigma_t, alpha_s, sigma_s, of_x0, of_eps)


def target_first(xt, xs, *numbers):
    return network_target(xt, xs, *(one[:1].expand_as(one) for one in numbers))


def target_by_solve(xt, xs, alpha_t, sigma_t, alpha_s, sigma_s, of_x0, of_eps):
    """A 2×2 system for each sample."""
    rows = []
    for i, (now, then) in enumerate(zip(xt, xs, strict=True)):
        matrix = torch.stack([torch.stack([alpha_t[i], sigma_t[i]]), torch.stack([alpha_s[i], sigma_s[i]])])
        both = torch.linalg.solve(matrix, torch.stack([now.reshape(-1), then.reshape(-1)]).double())
        rows.append((of_x0[i] * both[0] + of_eps[i] * both[1]).reshape(now.shape))
    return torch.stack(rows).to(xt.dtype)


def target_by_x0_then_eps(xt, xs, alpha_t, sigma_t, alpha_s, sigma_s, of_x0, of_eps):
    """x̃_0 first, by a division by σ_t, which is above 0; then ε̃ from x_t."""
    x0 = each(1 / (alpha_s - sigma_s * alpha_t / sigma_t), xt) * (xs - each(sigma_s / sigma_t, xt) * xt)
    eps = (xt - each(alpha_t, xt) * x0) / each(sigma_t, xt)
    return each(of_x0, xt) * x0 + each(of_eps, xt) * eps


def target_by_eps_then_x0(xt, xs, alpha_t, sigma_t, alpha_s, sigma_s, of_x0, of_eps):
    """ε̃ first, then x̃_0 from x_s, by a division by α_s, which is above 0."""
    shape = (-1,) + (1,) * (xt.ndim - 1)
    a_t, b_t, a_s, b_s, c, d = (
        one.view(shape).to(xt.dtype) for one in (alpha_t, sigma_t, alpha_s, sigma_s, of_x0, of_eps)
    )
    eps = (a_s * xt - a_t * xs) / (a_s * b_t - a_t * b_s)
    return c * ((xs - b_s * eps) / a_s) + d * eps


PARAMETERS = ("x0", "eps", "v", "velocity")


def landed(g, shape, dtype=SINGLE, at=None, says=None):
    """Samples at both ends of a step on no path in particular; `at` sets (α, σ) of single samples: "data" or "noise"."""
    batch = shape[0]
    low, high = uniform(g, 0.25, 0.65, batch), uniform(g, 0.9, 1.35, batch)
    size_s, size_t = uniform(g, 0.6, 1.6, batch), uniform(g, 0.6, 1.6, batch)
    if says == "v":  # on the circle
        size_s, size_t = torch.ones(2, batch, dtype=DOUBLE)
    numbers = {
        "alpha_t": size_t * high.cos(),
        "sigma_t": size_t * high.sin(),
        "alpha_s": size_s * low.cos(),
        "sigma_s": size_s * low.sin(),
    }
    for place, end in enumerate(at or []):
        if end in ("data", "both"):
            numbers["alpha_s"][place], numbers["sigma_s"][place] = 1.0, 0.0
        if end in ("noise", "both"):
            numbers["alpha_t"][place], numbers["sigma_t"][place] = 0.0, size_t[place]
    one, none = torch.ones(batch, dtype=DOUBLE), torch.zeros(batch, dtype=DOUBLE)
    of_x0, of_eps = {
        None: (uniform(g, -1.5, 1.5, batch), uniform(g, 0.4, 1.5, batch)),
        "x0": (one, none),
        "eps": (none, one),
        "v": (-numbers["sigma_t"], numbers["alpha_t"]),
        "velocity": (-one, one),
    }[says]
    pair = {"xt": normal(g, shape, dtype), "xs": normal(g, shape, dtype)}
    return {**pair, **numbers, "of_x0": of_x0.clone(), "of_eps": of_eps.clone()}


TARGET = Exercise(
    "network_target",
    points=2,
    minutes=15,
    difficulty=2,
    reference=network_target,
    outputs=("target",),
    visible=Group(
        1,
        lambda g: [
            landed(g, (4, 3)),
            landed(g, (3, 1, 2, 2), DOUBLE, says="v"),
            landed(g, (3, 2), DOUBLE, at=["data", "noise", "both"]),
        ],
    ),
    hidden={
        "other shapes and parameterisations": Group(
            0.5,
            lambda g: [
                landed(g, (5, 2), says="velocity"),
                landed(g, (2, 1, 7, 5), says="eps"),
                landed(g, (1, 1), DOUBLE, says="v"),
                landed(g, (6,), DOUBLE, says="x0"),
                landed(g, (3, 4), DOUBLE),
            ],
        ),
        "from pure noise, down to the data": Group(
            0.5,
            lambda g: [
                landed(g, (4, 3), at=["both", None, "data", "noise"]),
                landed(g, (2, 5), DOUBLE, at=["data", "both"], says="v"),
                landed(g, (1, 2, 3), DOUBLE, at=["noise"], says="eps"),
                landed(g, (1, 2), at=["data"], says="velocity"),
            ],
        ),
    },
    mistakes={
        "you exchanged x_t and x_s": (
            target_exchanged,
            "x_t goes with α_t and σ_t, x_s with α_s and σ_s.",
        ),
        "you took x_s for x_0": (
            target_xs_is_clean,
            "x_s is clean where s = 0 only. Ask for the x_0 with which one DDIM step from x_t ends in x_s.",
        ),
        "you divided x_s by α_s and called it x_0": (
            target_rest_of_noise,
            "That would be right if x_s held no noise. It holds σ_s times the same ε as x_t.",
        ),
        "you took ε from x_s, dividing by σ_s": (
            target_noise_at_s,
            "Where s = 0, x_s tells nothing about ε, and near it the rounding of x_s is made large. x_t holds more of it: divide by σ_t.",
        ),
        "you took α and σ of s for x_t": (
            target_all_of_s,
            "x_t holds noise of size σ_t: ε = (x_t − α_t x_0)/σ_t. Divided by σ_s it is far too large.",
        ),
        "you took x_0 from x_t, dividing by α_t": (
            target_by_alpha,
            "Where α_t = 0, x_t tells nothing about x_0. x_s holds more of it; or solve for both without either division.",
        ),
        "you used α² + σ² = 1": (
            target_on_a_circle,
            "Here the path may be any. Solve x_t = α_t x_0 + σ_t ε and x_s = α_s x_0 + σ_s ε as they are.",
        ),
        "you turned the ratio σ_s/σ_t upside down": (
            target_upside_down,
            "x_s holds σ_s ε, and x_t holds σ_t ε: to take the noise out of x_s, subtract σ_s/σ_t times x_t.",
        ),
        "you forgot to divide by α_s − (σ_s/σ_t) α_t": (
            target_length_forgotten,
            "x_s − (σ_s/σ_t) x_t holds no noise any more, but x_0 with a factor: find it.",
        ),
        "you divided by α_s alone": (
            target_signal_kept,
            "Subtracting (σ_s/σ_t) x_t takes away noise, and (σ_s/σ_t) α_t x_0 with it.",
        ),
        "you worked out ε from x_t with α_s": (
            target_noise_of_s_coefficients,
            "x_t = α_t x_0 + σ_t ε: both coefficients are those of t.",
        ),
        "you exchanged of_x0 and of_eps": (
            target_ab_exchanged,
            "The network says of_x0 · x_0 + of_eps · ε.",
        ),
        "you have the sign of the determinant wrong": (
            target_sign,
            "The two equations have the determinant α_t σ_s − α_s σ_t, below 0. Write the inverse of the matrix out once more.",
        ),
        "you used the first sample's numbers for all": (
            target_first,
            "Each sample has numbers of its own. Reshape what you make of them to (B, 1, …) before you multiply.",
        ),
    },
    correct={
        "a 2×2 system": target_by_solve,
        "x_0, then ε": target_by_x0_then_eps,
        "ε, then x_0": target_by_eps_then_x0,
    },
    forbidden=(
        "distillation.step_x0",
        "distillation.progressive_target",
        "paths.GaussianPath.convert",
        "samplers.ode.ddim_coefficients",
    ),
)


# 2. many_in_one -------------------------------------------------------------------------------------------------------


def many_in_one(teacher, x, times, alphas, sigmas):
    return mixed(*guesses_of(teacher, x, times, alphas, sigmas), times, alphas, sigmas)


def half_ratios(times, alphas, sigmas):
    """1/(2r) of each step: how far 2M extends the line; 0 in the first step, and in one to the data."""
    lam = (alphas[times] / sigmas[times]).log()
    h = lam.diff()
    past = torch.cat([torch.zeros(1, dtype=DOUBLE), h[1:] / (2 * h[:-1])])
    return torch.where(h.isfinite(), past, 0.0)


def in_u(times, alphas, sigmas):
    """Shares of the steps in α/σ; multiplied by σ of the last time, so that it may be 0."""
    last = sigmas[times[-1]]
    ends = torch.cat([last * alphas[times[:-1]] / sigmas[times[:-1]], alphas[times[-1:]]])
    return ends.diff() / (ends[-1] - ends[0])


def guesses_of(
    teacher, x, times, alphas, sigmas, past=half_ratios, told=lambda t, s, first: t, looks=None, remembers=0
):
    """The network's guesses on 2M's way, how far each line is extended, and the last state.

    `told` and `looks` change what the network is asked about; with `remembers` = 1 it is the extended guess that is remembered.
    """
    extend, guesses, now, before = past(times, alphas, sigmas), [], x, None
    for i, (t, s) in enumerate(pairwise(times.tolist())):
        guess = teacher(now if looks is None else looks(x, guesses), told(t, s, int(times[0])))
        line = guess if before is None else guess + extend[i].to(x.dtype) * (guess - before)
        before = line if remembers else guess
        ratio = sigmas[s] / sigmas[t]
        now = ratio.to(x.dtype) * now + (alphas[s] - ratio * alphas[t]).to(x.dtype) * line
        guesses.append(guess)
    return guesses, extend, now


def collected(shares, extend):
    """What stands before each guess, if each step's line is made of it and of the one before."""
    taken = torch.cat([shares[1:] * extend[1:], torch.zeros(1, dtype=DOUBLE)])
    return shares * (1 + extend) - taken


def mixed(guesses, extend, _, times, alphas, sigmas, shares=in_u):
    weights = collected(shares(times, alphas, sigmas), extend)
    return sum(w.to(one.dtype) * one for w, one in zip(weights, guesses, strict=True)), weights


def another_teacher(**changes):
    """The right weights for what that teacher does."""

    def answer(teacher, x, times, alphas, sigmas):
        return mixed(*guesses_of(teacher, x, times, alphas, sigmas, **changes), times, alphas, sigmas)

    return answer


def weighed(lengths):
    """Right guesses, and shares of what `lengths` says at each time."""

    def shares(times, alphas, sigmas):
        ends = lengths(times, alphas[times], sigmas[times]).double()
        return ends.diff() / (ends[-1] - ends[0])

    def answer(teacher, x, times, alphas, sigmas):
        return mixed(*guesses_of(teacher, x, times, alphas, sigmas), times, alphas, sigmas, shares)

    return answer


def with_ratio(formula):
    """2M with something else for 1/(2r), made of the lengths of a step and of the one before."""

    def past(times, alphas, sigmas):
        h = (alphas[times] / sigmas[times]).log().diff()
        found = torch.cat([torch.zeros(1, dtype=DOUBLE), formula(h[1:], h[:-1])])
        return torch.where(h.isfinite(), found, 0.0)

    return another_teacher(past=past)


many_ddim = another_teacher(past=lambda times, alphas, sigmas: torch.zeros(len(times) - 1, dtype=DOUBLE))
many_upside_down = with_ratio(lambda h, last: torch.where(last.isfinite(), last / (2 * h), 0.0))
many_no_half = with_ratio(lambda h, last: h / last)
many_no_ratio = with_ratio(lambda h, last: torch.full_like(h, 0.5))
many_backwards = with_ratio(lambda h, last: -h / (2 * last))
many_same_state = another_teacher(looks=lambda x, guesses: x)
many_same_time = another_teacher(told=lambda t, s, first: first)
many_next_time = another_teacher(told=lambda t, s, first: s)
many_in_time = weighed(lambda times, alphas, sigmas: times)
many_in_noise_to_signal = weighed(lambda times, alphas, sigmas: sigmas / alphas)
many_in_lambda = weighed(lambda times, alphas, sigmas: (alphas / sigmas).log())
many_in_alpha = weighed(lambda times, alphas, sigmas: alphas)
many_divides_by_0 = weighed(lambda times, alphas, sigmas: alphas / sigmas)


def many_ratio_in_time(teacher, x, times, alphas, sigmas):
    def past(times, alphas, sigmas):
        steps = times.double().diff()
        found = torch.cat([torch.zeros(1, dtype=DOUBLE), steps[1:] / (2 * steps[:-1])])
        return torch.where(sigmas[times[1:]] > 0, found, 0.0)

    return another_teacher(past=past)(teacher, x, times, alphas, sigmas)


def many_line_to_the_data(teacher, x, times, alphas, sigmas):
    """Extends the line in a step to the data, too, infinitely far."""

    def past(times, alphas, sigmas):
        h = (alphas[times] / sigmas[times]).log().diff()
        return torch.cat([torch.zeros(1, dtype=DOUBLE), h[1:] / (2 * h[:-1])])

    return another_teacher(past=past)(teacher, x, times, alphas, sigmas)


def many_remembers_the_line(teacher, x, times, alphas, sigmas):
    guesses, extend, now = guesses_of(teacher, x, times, alphas, sigmas, remembers=1)
    shares, left = in_u(times, alphas, sigmas), torch.eye(len(guesses), dtype=DOUBLE)
    line = [left[0]]
    for i in range(1, len(guesses)):
        line.append((1 + extend[i]) * left[i] - extend[i] * line[-1])
    weights = shares @ torch.stack(line)
    return sum(w.to(x.dtype) * one for w, one in zip(weights, guesses, strict=True)), weights


def many_weights_of_lines(teacher, x, times, alphas, sigmas):
    target, _ = many_in_one(teacher, x, times, alphas, sigmas)
    return target, in_u(times, alphas, sigmas)


def many_shares_of_ddim(teacher, x, times, alphas, sigmas):
    """Lets the teacher walk by 2M, and mixes its guesses as if it had walked by DDIM."""
    guesses, extend, now = guesses_of(teacher, x, times, alphas, sigmas)
    return mixed(guesses, 0 * extend, now, times, alphas, sigmas)


def many_keeps_positive(teacher, x, times, alphas, sigmas):
    guesses, extend, _ = guesses_of(teacher, x, times, alphas, sigmas)
    weights = collected(in_u(times, alphas, sigmas), extend).clamp(min=0)
    weights = weights / weights.sum()
    return sum(w.to(x.dtype) * one for w, one in zip(weights, guesses, strict=True)), weights


def many_last_state(teacher, x, times, alphas, sigmas):
    guesses, extend, end = guesses_of(teacher, x, times, alphas, sigmas)
    return end, mixed(guesses, extend, end, times, alphas, sigmas)[1]


def many_last_guess(teacher, x, times, alphas, sigmas):
    guesses, extend, end = guesses_of(teacher, x, times, alphas, sigmas)
    return guesses[-1], mixed(guesses, extend, end, times, alphas, sigmas)[1]


def many_reversed(teacher, x, times, alphas, sigmas):
    target, weights = many_in_one(teacher, x, times, alphas, sigmas)
    return target, weights.flip(0)


def many_by_landing(teacher, x, times, alphas, sigmas):
    """Where the teacher lands, and the step solved for its guess; the weights by walking with unit guesses."""

    def landing(guess, state):
        last = h_last = None
        for i, (t, s) in enumerate(pairwise(times.tolist())):
            now = guess(state, t, i)
            ratio, signal = sigmas[s].item() / sigmas[t].item(), alphas[s].item()
            pull, line = signal - ratio * alphas[t].item(), now
            h = math.inf if ratio == 0 or alphas[t] == 0 else math.log(signal / (ratio * alphas[t].item()))
            if last is not None and ratio > 0 and h_last < math.inf:
                line = now + h / h_last / 2 * (now - last)
            state, last, h_last = ratio * state + pull * line, now, h
        return state

    t, s = times[0], times[-1]
    ratio = (sigmas[s] / sigmas[t]).item()
    pull = alphas[s].item() - ratio * alphas[t].item()
    units = torch.eye(len(times) - 1, dtype=DOUBLE)
    end = landing(lambda state, t, i: teacher(state, t), x)
    return (end - ratio * x) / pull, landing(lambda state, t, i: units[i], torch.zeros_like(units[0])) / pull


def many_by_a_matrix(teacher, x, times, alphas, sigmas):
    """y = x/σ; a matrix makes lines out of guesses, and the steps' lengths weigh the lines."""
    count = len(times) - 1
    lam = alphas[times].log() - sigmas[times].log()
    lines = torch.eye(count, dtype=DOUBLE)
    for i in range(1, count):
        if sigmas[times[i + 1]] > 0:
            more = (lam[i + 1] - lam[i]) / (lam[i] - lam[i - 1]) / 2
            lines[i, i] += more
            lines[i, i - 1] -= more
    area = [alphas[s] / sigmas[s] - alphas[t] / sigmas[t] if sigmas[s] > 0 else None for t, s in pairwise(times)]
    y, guesses = x.double() / sigmas[times[0]], []
    for i, length in enumerate(area):
        t = times[i]
        guesses.append(teacher((sigmas[t] * y).to(x.dtype), int(t)).double())
        if length is not None:
            y = y + length * sum(lines[i, k] * guesses[k] for k in range(i + 1))
    weights = lines[-1] if area[-1] is None else torch.stack(area) @ lines / torch.stack(area).sum()
    return torch.einsum("k,k...->...", weights, torch.stack(guesses)).to(x.dtype), weights


def many_as_it_goes(teacher, x, times, alphas, sigmas):
    """The target of the way so far, brought up to date after each step."""
    a, b = alphas[times].tolist(), sigmas[times].tolist()
    target, weights, before = torch.zeros_like(x), np.zeros(len(a) - 1), None
    for i, t in enumerate(times[:-1].tolist()):
        state = b[i] / b[0] * x + (a[i] - b[i] / b[0] * a[0]) * target  # one step of the student so far
        guess, line = teacher(state, t), np.zeros(len(a) - 1)
        line[i], past = 1.0, 0.0
        if i and b[i + 1] and a[i - 1]:
            past = math.log(a[i + 1] * b[i] / (b[i + 1] * a[i])) / math.log(a[i] * b[i - 1] / (b[i] * a[i - 1])) / 2
            line[i], line[i - 1] = 1 + past, -past
        extended = guess if before is None else (1 + past) * guess - past * before
        all_now = a[i + 1] * b[0] - a[0] * b[i + 1]
        new = (a[i + 1] * b[i] - a[i] * b[i + 1]) * b[0] / (b[i] * all_now)
        target, weights, before = target + new * (extended - target), weights + new * (line - weights), guess
    return target, torch.from_numpy(weights)


def steps_of(g, path, shape, T, times, dtype=SINGLE):
    return {
        "teacher": Affine(uniform(g, 0.3, 0.9, T + 1), uniform(g, -1.5, 1.5, T + 1)),
        "x": normal(g, shape, dtype),
        "times": times if isinstance(times, torch.Tensor) else torch.tensor(times),
        **path,
    }


MANY = Exercise(
    "many_in_one",
    points=4,
    minutes=30,
    difficulty=4,
    reference=many_in_one,
    outputs=("target", "weights"),
    visible=Group(
        1,
        lambda g: [
            steps_of(g, any_path(g, 9), (4, 3), 9, [8, 6, 5, 2], DOUBLE),
            steps_of(g, any_path(g, 8, into=True), (2, 1, 2, 3), 8, [8, 6, 5, 3, 1]),
            steps_of(g, circle(g, 7), (3, 2), 7, [6, 5, 3, 0], DOUBLE),
            steps_of(g, any_path(g, 10), (2, 2), 10, [9, 8, 2], DOUBLE),
        ],
    ),
    hidden={
        "other numbers of steps": Group(
            2,
            lambda g: [
                steps_of(g, any_path(g, 12), (5, 2), 12, descending(g, 11, whole(g, 1, 3), 6), DOUBLE),
                steps_of(g, circle(g, 7), (2, 3, 1, 2), 7, descending(g, 7, 2, 3)),
                steps_of(g, any_path(g, 5), (1, 1), 5, [4, 2], DOUBLE),
                steps_of(g, any_path(g, 20), (6,), 20, descending(g, 20, 3, 12), DOUBLE),
            ],
        ),
        "from pure noise, down to the data": Group(
            1,
            lambda g: [
                steps_of(g, any_path(g, 8, into=True), (3, 4), 8, descending(g, 8, 0, 4)),
                steps_of(g, circle(g, 5, into=True), (1, 2), 5, [5, 0], DOUBLE),
                steps_of(g, any_path(g, 9), (2, 5), 9, descending(g, 7, 0, 3), DOUBLE),
                steps_of(g, any_path(g, 7, into=True), (2, 2), 7, descending(g, 7, 2, 3), DOUBLE),
            ],
        ),
    },
    mistakes={
        "you let the teacher walk by DDIM": (
            many_ddim,
            "A step of 2M takes D in the place of x̂_0: the line through this guess and the last one, extended by half a step.",
        ),
        "you mixed the guesses as after steps of DDIM": (
            many_shares_of_ddim,
            "The lengths in u weigh the D of the steps. Put D = (1 + 1/(2r)) x̂_i − 1/(2r) x̂_{i−1} in, and collect each guess.",
        ),
        "you gave the weights of the D, not those of the guesses": (
            many_weights_of_lines,
            "Each guess stands in the D of its own step and in that of the next one: collect both.",
        ),
        "you have r upside down": (
            many_upside_down,
            "r is the length of the last step over that of this one, both in λ.",
        ),
        "you extended the line by a whole step": (
            many_no_half,
            "2M takes the value in the middle of the step: 1/(2r), and not 1/r.",
        ),
        "you took r = 1": (
            many_no_ratio,
            "Steps of different lengths have r ≠ 1, and steps that are equal in time differ in λ.",
        ),
        "you measured r in time": (
            many_ratio_in_time,
            "2M draws its line over λ = log(α/σ), so both lengths in r are measured in λ.",
        ),
        "you extended the line into the past": (
            many_backwards,
            "D = (1 + 1/(2r)) x̂_i − 1/(2r) x̂_{i−1}: away from the guess before.",
        ),
        "you remembered D in the place of the guess": (
            many_remembers_the_line,
            "The line goes through two guesses of the network, x̂_i and x̂_{i−1}.",
        ),
        "you extended the line in the step to the data": (
            many_line_to_the_data,
            "There h is infinite, and so is 1/(2r): a step to σ = 0 takes its guess as it is.",
        ),
        "you weighted by the lengths of the steps in time": (
            many_in_time,
            "Time is only a name for the levels of noise. In x/σ a step adds (u_s − u_t) D, with u = α/σ: measure the steps in u.",
        ),
        "you measured the steps in σ/α": (
            many_in_noise_to_signal,
            "σ/α weighs guesses of ε. Guesses of x_0 are weighed in u = α/σ.",
        ),
        "you weighted by the lengths of the steps in λ": (
            many_in_lambda,
            "λ is where 2M draws its line. What a step adds to x/σ is the difference of u = α/σ, times D.",
        ),
        "you measured the steps in α": (
            many_in_alpha,
            "α_s − α_t is not all: the noise that is taken out is made of x̂_0, too. Divide the step by σ first.",
        ),
        "you divided by σ_s = 0": (
            many_divides_by_0,
            "At the data u is infinite. Multiply numerator and denominator by σ of the last time before you let it be 0.",
        ),
        "you made negative weights 0": (
            many_keeps_positive,
            "They are as they are: 2M subtracts old guesses, and may subtract more of one than its own step adds.",
        ),
        "you gave the weights in the opposite order": (
            many_reversed,
            "The first weight belongs to the teacher's first guess, from the noisiest state.",
        ),
        "you asked the teacher about the first state each time": (
            many_same_state,
            "Its second guess is about x_m, where its own first step leads, and so on.",
        ),
        "you told the teacher the first time each time": (
            many_same_time,
            "Its second guess is made at time m: tell it m together with x_m.",
        ),
        "you told the teacher where the step ends": (
            many_next_time,
            "A step from t to s asks about x_t, at time t.",
        ),
        "you took the last guess": (
            many_last_guess,
            "That is right at s = 0 only. Before it, x_s still holds what the earlier guesses put there.",
        ),
        "you returned where the teacher lands": (
            many_last_state,
            "Asked is the x_0 with which one DDIM step leads there. The two are the same at s = 0 only.",
        ),
    },
    correct={
        "the landing, solved": many_by_landing,
        "a matrix": many_by_a_matrix,
        "as it goes": many_as_it_goes,
    },
    forbidden=(
        "distillation.step_x0",
        "distillation.progressive_target",
        "samplers.ddim",
        "samplers.ddim_step",
        "samplers.ode.ddim_coefficients",
        "samplers.dpm_solver_pp_2m",
        "samplers.dpm_solver_pp_2m_step",
    ),
)


# 3. network_weight ----------------------------------------------------------------------------------------------------


def network_weight(alpha, sigma, of_x0, of_eps, least):
    turned = of_x0 * sigma - of_eps * alpha
    refuse_zero(turned)
    return torch.maximum(alpha**2, least * sigma**2) / turned**2


def refuse_zero(turned):
    if bool((turned == 0).any()):
        raise ValueError("what the network says, of_x0 · x_0 + of_eps · ε, must determine x_0 for each sample")


def weighing(formula):
    """Refuses what the right answer refuses, and then does something else."""

    def answer(alpha, sigma, of_x0, of_eps, least):
        refuse_zero(of_x0 * sigma - of_eps * alpha)
        return formula(alpha, sigma, of_x0, of_eps, least)

    return answer


def floor_of(snr, least):
    return snr.clamp(min=least)


def error_of_x0(alpha, sigma, of_x0, of_eps):
    """The error of x̂_0 when the network errs by 1, without its sign."""
    return sigma / (of_x0 * sigma - of_eps * alpha)


def weight_lets_a_zero_through(alpha, sigma, of_x0, of_eps, least):
    return torch.maximum(alpha**2, least * sigma**2) / (of_x0 * sigma - of_eps * alpha) ** 2


@weighing
def weight_of_x0(alpha, sigma, of_x0, of_eps, least):
    return torch.where(sigma > 0, floor_of((alpha / sigma) ** 2, least), alpha**2)


@weighing
def weight_upside_down(alpha, sigma, of_x0, of_eps, least):
    scaled = torch.maximum((alpha / sigma) ** 2, torch.full_like(sigma, least)) / sigma**2
    return scaled * (of_x0 * sigma - of_eps * alpha) ** 2


@weighing
def weight_not_squared(alpha, sigma, of_x0, of_eps, least):
    """The error's factor, for its square."""
    worth = torch.maximum(alpha**2, least * sigma**2) / (of_x0 * sigma - of_eps * alpha).abs()
    return torch.where(sigma > 0, worth / sigma, worth)


@weighing
def weight_untruncated(alpha, sigma, of_x0, of_eps, least):
    return alpha**2 / (of_x0 * sigma - of_eps * alpha) ** 2


@weighing
def weight_smaller_one(alpha, sigma, of_x0, of_eps, least):
    return torch.minimum(alpha**2, least * sigma**2) / (of_x0 * sigma - of_eps * alpha) ** 2


@weighing
def weight_sum(alpha, sigma, of_x0, of_eps, least):
    return (alpha**2 + least * sigma**2) / (of_x0 * sigma - of_eps * alpha) ** 2


@weighing
def weight_snr_not_squared(alpha, sigma, of_x0, of_eps, least):
    return torch.maximum(alpha * sigma, least * sigma**2) / (of_x0 * sigma - of_eps * alpha) ** 2


@weighing
def weight_floor_last(alpha, sigma, of_x0, of_eps, least):
    return floor_of(alpha**2 / (of_x0 * sigma - of_eps * alpha) ** 2, least)


@weighing
def weight_on_a_circle(alpha, sigma, of_x0, of_eps, least):
    """SNR from α alone."""
    var = 1 - alpha**2
    return torch.maximum(alpha**2, least * var) / (of_x0 * var.clamp(min=0).sqrt() - of_eps * alpha) ** 2


@weighing
def weight_eps_held(alpha, sigma, of_x0, of_eps, least):
    worth = torch.where(sigma > 0, floor_of((alpha / sigma) ** 2, least), torch.inf)
    return worth / of_x0**2


@weighing
def weight_same_direction(alpha, sigma, of_x0, of_eps, least):
    return torch.maximum(alpha**2, least * sigma**2) / (of_x0 * sigma + of_eps * alpha) ** 2


@weighing
def weight_pythagoras(alpha, sigma, of_x0, of_eps, least):
    return torch.maximum(alpha**2, least * sigma**2) / ((of_x0 * sigma) ** 2 + (of_eps * alpha) ** 2)


@weighing
def weight_exchanged(alpha, sigma, of_x0, of_eps, least):
    return torch.maximum(alpha**2, least * sigma**2) / (of_eps * sigma - of_x0 * alpha) ** 2


@weighing
def weight_divides_by_0(alpha, sigma, of_x0, of_eps, least):
    return floor_of((alpha / sigma) ** 2, least) * error_of_x0(alpha, sigma, of_x0, of_eps) ** 2


@weighing
def weight_mean(alpha, sigma, of_x0, of_eps, least):
    worth = torch.maximum(alpha**2, least * sigma**2) / (of_x0 * sigma - of_eps * alpha) ** 2
    return worth.mean().expand_as(worth).clone()


def weight_in_a_loop(alpha, sigma, of_x0, of_eps, least):
    """By cases, in Python: ε̂ moves by −α/σ when x̂_0 moves by 1; at the data it is the other one that does not move."""
    found = []
    for a, b, c, d in zip(*(one.tolist() for one in (alpha, sigma, of_x0, of_eps)), strict=True):
        if b == 0:
            if d == 0:
                raise ValueError("of_x0, of_eps: at the data a network has to say something of ε")
            found.append(1 / d**2)  # x̂_0 is x_t/α; SNR times its squared error is that of ε̂
            continue
        error = c - d * a / b
        if error == 0:
            raise ValueError("of_x0 and of_eps leave x_0 open")
        found.append(max((a / b) ** 2, least) / error**2)
    return torch.tensor(found, dtype=DOUBLE)


def weight_by_solve(alpha, sigma, of_x0, of_eps, least):
    """Both errors from a 2×2 system: x_t stays, and the network errs by 1. The loss is the larger of two."""
    matrix = torch.stack([torch.stack([alpha, sigma], -1), torch.stack([of_x0, of_eps], -1)], -2)
    if (torch.linalg.det(matrix).abs() < 1e-14).any():
        raise ValueError(f"of_x0 = {of_x0.tolist()}, of_eps = {of_eps.tolist()}: no answer")
    errors = torch.linalg.solve(matrix, torch.tensor([0, 1], dtype=DOUBLE).expand(len(alpha), 2))
    return torch.stack([errors[:, 1] ** 2, least * errors[:, 0] ** 2]).amax(0)


def weight_by_angle(alpha, sigma, of_x0, of_eps, least):
    """In polar coordinates: the network's line and that of x_t, and the angle between them."""
    if any(c * b == d * a for a, b, c, d in zip(alpha, sigma, of_x0, of_eps, strict=True)):
        raise ValueError("(of_x0, of_eps) may not be parallel to (α, σ)")
    between = torch.atan2(of_x0, of_eps) - torch.atan2(alpha, sigma)
    here = torch.atan2(sigma, alpha)
    return (here.cos() ** 2).maximum(least * here.sin() ** 2) / (torch.hypot(of_x0, of_eps) * between.sin()).square()


def weighted(g, batch, says=None, at=None, least=None, low=0.2):
    turn, size = uniform(g, low, 1.35, batch), uniform(g, 0.6, 1.6, batch)
    if says == "v":
        size = torch.ones(batch, dtype=DOUBLE)
    alpha, sigma = size * turn.cos(), size * turn.sin()
    for place, end in enumerate(at or []):
        if end:
            alpha[place], sigma[place] = {"data": (1.0, 0.0), "noise": (0.0, size[place].item())}[end]
    one, none = torch.ones(batch, dtype=DOUBLE), torch.zeros(batch, dtype=DOUBLE)
    of_x0, of_eps = {
        None: (-uniform(g, 0.3, 1.5, batch), uniform(g, 0.3, 1.5, batch)),
        "x0": (one, none),
        "eps": (none, one),
        "v": (-sigma, alpha),
        "velocity": (-one, one),
    }[says]
    least = number(g, 0.5, 1.5) if least is None else least
    return {"alpha": alpha, "sigma": sigma, "of_x0": of_x0.clone(), "of_eps": of_eps.clone(), "least": least}


WEIGHT = Exercise(
    "network_weight",
    points=3,
    minutes=20,
    difficulty=3,
    reference=network_weight,
    outputs=("weight",),
    visible=Group(
        1,
        lambda g: [
            weighted(g, 6),
            weighted(g, 4, "v", at=["noise", "data"]),
            weighted(g, 3, "eps", at=["data"]),
            weighted(g, 3, "eps", at=[None, "noise"]),
        ],
    ),
    hidden={
        "other parameterisations and floors": Group(
            1,
            lambda g: [
                weighted(g, 7, "velocity"),
                weighted(g, 5, "eps", least=number(g, 2, 5)),
                weighted(g, 4, "x0", low=0.5),
                weighted(g, 1, "v"),
                weighted(g, 6, least=number(g, 0.2, 0.6)),
                weighted(g, 3, least=0.0),
            ],
        ),
        "only noise, only data": Group(
            1,
            lambda g: [
                weighted(g, 4, at=["data", "noise"]),
                weighted(g, 3, "x0", at=["noise"]),
                weighted(g, 2, "velocity", at=["noise", "data"]),
                weighted(g, 1, "eps", at=["data"]),
                weighted(g, 3, "x0", at=[None, None, "data"]),
                weighted(g, 1, "eps", at=["noise"]),
            ],
        ),
    },
    mistakes={
        "you let a weight be infinite": (
            weight_lets_a_zero_through,
            "Where of_x0 · σ = of_eps · α the network only repeats x_t, and no weight makes x̂_0 of it: raise a ValueError.",
        ),
        "you gave the weight of x̂_0": (
            weight_of_x0,
            "Asked is the weight of the network's own error: work out how far x̂_0 moves when the network's output moves by δ.",
        ),
        "you multiplied where you had to divide": (
            weight_upside_down,
            "If the network's error is a large multiple of that of x̂_0, its square has to be weighted less.",
        ),
        "you forgot to square the factor": (
            weight_not_squared,
            "The errors are squared in the loss, so the factor between them is squared, too.",
        ),
        "you left the floor out": (
            weight_untruncated,
            "With the plain SNR the first step of every student, where α = 0, would not be trained: take the larger of SNR and the floor.",
        ),
        "you took the smaller of SNR and floor": (
            weight_smaller_one,
            "That weight exists, for training teachers. A student needs the larger one, so that no time is forgotten.",
        ),
        "you added the floor": (
            weight_sum,
            "SNR + 1 is another weight of the paper: it is the error in v where α² + σ² = 1. Asked is the larger of the two.",
        ),
        "you forgot the square in SNR": (
            weight_snr_not_squared,
            "The signal-to-noise ratio is α²/σ².",
        ),
        "you put the floor under the network's weight": (
            weight_floor_last,
            "The floor belongs to the weight of x̂_0's error. First the larger of SNR and floor, then the change of units.",
        ),
        "you used σ² = 1 − α²": (
            weight_on_a_circle,
            "Here the path may be any; σ is given.",
        ),
        "you held ε̂ while x̂_0 moved": (
            weight_eps_held,
            "x_t = α x̂_0 + σ ε̂ is given. When x̂_0 moves, ε̂ moves, too, and the network's output feels both.",
        ),
        "you moved ε̂ the same way as x̂_0": (
            weight_same_direction,
            "x_t = α x̂_0 + σ ε̂ stays. So when x̂_0 moves by δ, ε̂ moves by −(α/σ) δ.",
        ),
        "you added the squares of the two errors": (
            weight_pythagoras,
            "The errors of x̂_0 and ε̂ are no independent numbers, one fixes the other: add them first, with their signs, then square.",
        ),
        "you exchanged of_x0 and of_eps": (
            weight_exchanged,
            "The network says of_x0 · x_0 + of_eps · ε.",
        ),
        "you divided by σ = 0": (
            weight_divides_by_0,
            "At the data SNR is infinite, and the factor of the error is 0. Multiply them on paper: the σ cancels.",
        ),
        "you averaged over the batch": (
            weight_mean,
            "Each sample has a weight of its own. The mean comes after the weight has met its error.",
        ),
    },
    correct={
        "a loop": weight_in_a_loop,
        "a 2×2 system": weight_by_solve,
        "angles": weight_by_angle,
    },
    tolerance=1e-8,
    mentions=("of_x0", "of_eps"),
    forbidden=("distillation.truncated_snr", "distillation.matching", "paths.GaussianPath.convert"),
)


# 4. guided_gradient ---------------------------------------------------------------------------------------------------


def says(theta, x, t, y, w):
    """v of the exercise's network: four numbers for each class and time."""
    scale, scale_w, shift, shift_w = theta[:, y, t]
    w = w.to(theta.dtype)
    return each(scale + w * scale_w, x) * x + each(shift + w * shift_w, x)


def guided_with(
    mix=lambda cond, uncond, w: (1 + w) * cond - w * uncond,
    hold=lambda guided, limit: guided.clamp(-limit, limit),
    worth=lambda snr: snr.clamp(min=1),
    null=lambda y, classes: torch.full_like(y, classes),
    told=lambda w: w,
    label=lambda y, classes: y,
    student=lambda guess, limit: guess,
    loss=lambda errors, weight: (weight[:, None] * errors**2).mean(),
    noisy=lambda x0, eps, alpha, sigma: alpha * x0 + sigma * eps,
):
    """The loss of stage one and its gradient, with one part of it changed."""

    def answer(theta, teacher, x0, eps, t, y, w, alphas, sigmas, limit):
        alpha, sigma, classes = each(alphas[t], x0), each(sigmas[t], x0), theta.shape[1] - 1
        xt = noisy(x0, eps, alpha, sigma)
        cond, uncond = (alpha * xt - sigma * says(teacher, xt, t, one, 0 * w) for one in (y, null(y, classes)))
        target = hold(mix(cond, uncond, each(w, x0)), limit)
        leaf = theta.detach().clone().requires_grad_()
        guess = student(alpha * xt - sigma * says(leaf, xt, t, label(y, classes), told(w)), limit)
        value = loss((guess - target).flatten(1), worth((alphas[t] / sigmas[t]) ** 2).to(x0.dtype))
        return torch.autograd.grad(value, leaf)[0], value.detach()

    return answer


guided_gradient = guided_with()
guided_by_w = guided_with(mix=lambda cond, uncond, w: w * cond + (1 - w) * uncond)
guided_exchanged = guided_with(mix=lambda cond, uncond, w: (1 + w) * uncond - w * cond)
guided_between = guided_with(mix=lambda cond, uncond, w: (1 - w) * cond + w * uncond)
guided_not_at_all = guided_with(mix=lambda cond, uncond, w: cond)
guided_free = guided_with(hold=lambda guided, limit: guided)
guided_one_w = guided_with(mix=lambda cond, uncond, w: (1 + w[:1]) * cond - w[:1] * uncond)
guided_class_0 = guided_with(null=lambda y, classes: torch.zeros_like(y))
guided_not_told = guided_with(told=lambda w: 0 * w)
guided_told_more = guided_with(told=lambda w: 1 + w)
guided_no_label = guided_with(label=lambda y, classes: torch.full_like(y, classes))
guided_student_held = guided_with(student=lambda guess, limit: guess.clamp(-limit, limit))
guided_untruncated = guided_with(worth=lambda snr: snr)
guided_smaller = guided_with(worth=lambda snr: snr.clamp(max=1))
guided_no_weight = guided_with(worth=torch.ones_like)
guided_root_of_snr = guided_with(worth=lambda snr: snr.sqrt().clamp(min=1))
guided_means_apart = guided_with(loss=lambda errors, weight: weight.mean() * (errors**2).mean())
guided_weight_squared = guided_with(loss=lambda errors, weight: ((weight[:, None] * errors) ** 2).mean())
guided_sum = guided_with(loss=lambda errors, weight: (weight[:, None] * errors**2).sum())
guided_sum_of_sample = guided_with(loss=lambda errors, weight: (weight * (errors**2).sum(1)).mean())
guided_absolute = guided_with(loss=lambda errors, weight: (weight[:, None] * errors.abs()).mean())
guided_plain_x0 = guided_with(noisy=lambda x0, eps, alpha, sigma: x0 + sigma * eps)


def guided_each_held(theta, teacher, x0, eps, t, y, w, alphas, sigmas, limit):
    """Holds the teacher's two guesses in range, and not what is made of them."""

    def mix(cond, uncond, w):
        return (1 + w) * cond.clamp(-limit, limit) - w * uncond.clamp(-limit, limit)

    return guided_with(mix=mix, hold=lambda guided, limit: guided)(
        theta, teacher, x0, eps, t, y, w, alphas, sigmas, limit
    )


def guided_towards_the_data(theta, teacher, x0, eps, t, y, w, alphas, sigmas, limit):
    return guided_with(mix=lambda cond, uncond, w: x0, hold=lambda x, limit: x)(
        theta, teacher, x0, eps, t, y, w, alphas, sigmas, limit
    )


def guided_units_of_v(theta, teacher, x0, eps, t, y, w, alphas, sigmas, limit):
    """v's error with the weight of that of x̂_0."""

    def loss(errors, weight):
        return (weight[:, None] * (errors / each(sigmas[t], errors)) ** 2).mean()

    return guided_with(loss=loss)(theta, teacher, x0, eps, t, y, w, alphas, sigmas, limit)


def guided_by_hand(theta, teacher, x0, eps, t, y, w, alphas, sigmas, limit):
    """The student is linear in its numbers: the derivative of its guess by them is −σ (x, w x, 1, w)."""
    x0, eps, w = (one.double() for one in (x0, eps, w))
    a, b = each(alphas[t], x0), each(sigmas[t], x0)
    x = a * x0 + b * eps
    null = torch.full_like(y, theta.shape[1] - 1)

    def guess(numbers, label, w):
        p, q, r, s = numbers.double()[:, label, t]
        return a * x - b * (each(p, x) * x + each(w * q, x) * x + each(r, x) + each(w * s, x))

    free = guess(teacher, null, 0 * w)
    push = guess(teacher, y, 0 * w) - free
    gap = guess(theta, y, w) - (free + (1 + each(w, x)) * push).clamp(-limit, limit)
    weight = torch.maximum(alphas[t] ** 2, sigmas[t] ** 2) / sigmas[t] ** 2
    slope = -2 * each(weight * sigmas[t], x) * gap / gap.numel()
    by_x, by_1 = (slope * x).flatten(1).sum(1), slope.flatten(1).sum(1)
    gradient = torch.zeros(theta.shape, dtype=DOUBLE)
    for row, part in enumerate((by_x, w * by_x, by_1, w * by_1)):
        gradient[row].index_put_((y, t), part, accumulate=True)
    loss = (weight * gap.flatten(1).square().mean(1)).mean()
    return gradient.to(theta.dtype), loss.to(theta.dtype)


def guided_by_func(theta, teacher, x0, eps, t, y, w, alphas, sigmas, limit):
    """torch.func, the weight as the larger of two losses' factors, and v mixed before it is turned into x̂_0."""
    shape = (len(x0), *[1] * (x0.ndim - 1))
    cos, sin, strength = (one.to(x0.dtype).reshape(shape) for one in (alphas[t], sigmas[t], w))
    xt = cos * x0 + sin * eps
    both = [says(teacher, xt, t, label, torch.zeros_like(w)) for label in (y, torch.full_like(y, theta.shape[1] - 1))]
    target = torch.clip(cos * xt - sin * torch.lerp(both[1], both[0], 1 + strength), -limit, limit)

    def loss(theta):
        off = target - (cos * xt - sin * says(theta, xt, t, y, w))
        return (off**2 * (cos / sin).square().clip(min=1.0)).flatten().mean()

    return torch.func.grad_and_value(loss)(theta)


def guided_in_a_loop(theta, teacher, x0, eps, t, y, w, alphas, sigmas, limit):
    """One sample after the other; the gradient of the mean is the mean of the gradients."""
    null, total, gradient = theta.shape[1] - 1, 0.0, torch.zeros_like(theta)
    for i in range(len(x0)):
        a, b = alphas[t[i]].to(x0.dtype), sigmas[t[i]].to(x0.dtype)
        x = a * x0[i] + b * eps[i]
        guesses = []
        for label in (y[i], null):
            scale, _, shift, _ = teacher[:, label, t[i]]
            guesses.append(a * x - b * (scale * x + shift))
        target = (guesses[0] + w[i] * (guesses[0] - guesses[1])).clamp(min=-limit, max=limit)
        mine = theta[:, y[i], t[i]].clone().requires_grad_(True)
        v = (mine[0] + w[i] * mine[1]) * x + mine[2] + w[i] * mine[3]
        part = max((a / b).item() ** 2, 1.0) * torch.nn.functional.mse_loss(a * x - b * v, target) / len(x0)
        part.backward()
        gradient[:, y[i], t[i]] += mine.grad
        total = total + part.detach()
    return gradient, total


def stage_one(g, shape, T, classes, dtype=SINGLE, t=None, y=None, w=None, limit=1.0, into=False):
    batch, tables = shape[0], (4, classes + 1, T + 1)
    teacher = uniform(g, -0.8, 0.8, *tables)
    teacher[[1, 3]] = 0.0  # it is not told w
    t = whole(g, 1, T + 1, batch) if t is None else torch.tensor(t)
    y = whole(g, 0, classes + 1, batch) if y is None else torch.tensor(y)
    return {
        "theta": uniform(g, -0.8, 0.8, *tables).to(dtype),
        "teacher": teacher.to(dtype),
        "x0": normal(g, shape, dtype),
        "eps": normal(g, shape, dtype),
        "t": t,
        "y": y,
        "w": uniform(g, 0.4, 3, batch).to(dtype) if w is None else torch.tensor(w, dtype=dtype),
        **circle(g, T, into),
        "limit": limit,
    }


GUIDED = Exercise(
    "guided_gradient",
    points=4,
    minutes=25,
    difficulty=3,
    reference=guided_gradient,
    outputs=("gradient", "loss"),
    visible=Group(
        1,
        lambda g: [
            stage_one(g, (6, 5), 5, 3, DOUBLE, t=[1, 2, 3, 4, 5, 2], y=[1, 2, 0, 2, 1, 3]),
            stage_one(g, (4, 1, 3, 3), 4, 2, t=[4, 1, 3, 3], y=[1, 0, 1, 1], into=True),
        ],
    ),
    hidden={
        "other shapes": Group(
            2,
            lambda g: [
                stage_one(g, (9, 4), 6, 3),
                stage_one(g, (5, 1, 5, 3), 8, 10, DOUBLE, limit=number(g, 0.5, 0.9)),
                stage_one(g, (1, 7), 3, 1, DOUBLE, t=[2], y=[0]),
                stage_one(g, (12, 3), 2, 2, DOUBLE, limit=math.inf),
            ],
        ),
        "pure noise, no label, no guidance": Group(
            1,
            lambda g: [
                stage_one(g, (5, 6), 4, 2, DOUBLE, t=[4, 4, 1, 2, 4], y=[0, 1, 1, 0, 2], into=True),
                stage_one(g, (4, 5), 5, 3, y=[3, 3, 3, 3]),
                stage_one(g, (4, 6), 5, 3, DOUBLE, w=[0.0, 0.0, number(g, 1, 4), 0.0], y=[0, 1, 2, 2]),
                stage_one(g, (1, 8), 4, 2, DOUBLE, t=[1], y=[1]),
            ],
        ),
    },
    mistakes={
        "you counted w as the slide of guidance does": (
            guided_by_w,
            "Here w = 0 is the plain conditional teacher: (1 + w)·conditional − w·unconditional.",
        ),
        "you exchanged the teacher's two guesses": (
            guided_exchanged,
            "The label is what you want more of: (1 + w)·conditional − w·unconditional.",
        ),
        "you interpolated between the teacher's two guesses": (
            guided_between,
            "Guidance goes beyond the conditional guess, away from the unconditional one.",
        ),
        "you left the guidance out of the target": (
            guided_not_at_all,
            "The student is to say in one evaluation what the teacher says in two: (1 + w)·conditional − w·unconditional.",
        ),
        "you trained the student towards the data": (
            guided_towards_the_data,
            "That would make it a denoiser without guidance, whatever w it is told. The target is the guided guess of the teacher.",
        ),
        "you did not hold the target in its range": (
            guided_free,
            "Guidance leaves the range of the data. The teacher is sampled with its guess held in it, so the student has to learn that.",
        ),
        "you held the teacher's two guesses in the range, not the guided one": (
            guided_each_held,
            "Guidance comes first: two guesses in the range do not make a guided one in it.",
        ),
        "you held the student in the range, too": (
            guided_student_held,
            "Where the student is out of range, it would get no gradient that brings it back.",
        ),
        "you used the first sample's w for all": (
            guided_one_w,
            "Each sample has a w of its own. Reshape w to (B, 1, …) before you multiply.",
        ),
        "you took class 0 for no class": (
            guided_class_0,
            "The null label is the last of the rows: theta.shape[1] − 1.",
        ),
        "you did not tell the student its w": (
            guided_not_told,
            "A student that is not told w can but learn the mean over all of them.",
        ),
        "you told the student 1 + w": (
            guided_told_more,
            "The student is told the w of its own sample as it is; 1 + w is the factor of the conditional guess.",
        ),
        "you did not tell the student its label": (
            guided_no_label,
            "The student is told the label: it replaces both of the teacher's evaluations, and the null label is for the teacher's second.",
        ),
        "you weighted by the plain SNR": (
            guided_untruncated,
            "Then pure noise has the weight 0, and the first step of the sampler is never trained: max(SNR, 1).",
        ),
        "you took the smaller of SNR and 1": (
            guided_smaller,
            "It is the larger one, so that no time is forgotten.",
        ),
        "you left the weight out": (guided_no_weight, "The squared error of x̂_0 has the weight max(SNR, 1)."),
        "you forgot the square in SNR": (guided_root_of_snr, "The signal-to-noise ratio is α²/σ²."),
        "you weighted the errors before you squared them": (
            guided_weight_squared,
            "The weight stands before the square, or its root inside.",
        ),
        "you averaged weights and errors apart": (
            guided_means_apart,
            "The mean of products is not the product of means: each sample's error with its own weight first.",
        ),
        "you compared v and not x̂_0": (
            guided_units_of_v,
            "max(SNR, 1) is the weight of the error in x̂_0 = α x_t − σ v. That in v is 1/σ times as large.",
        ),
        "you summed instead of averaging": (
            guided_sum,
            "The loss is the mean over samples and values, the gradient with it.",
        ),
        "you summed over the values of a sample": (
            guided_sum_of_sample,
            "The loss is the mean over samples and values, so that it does not grow with the size of the images.",
        ),
        "you took absolute errors": (guided_absolute, "The errors are squared."),
        "you forgot α before x_0": (guided_plain_x0, "x_t = α x_0 + σ ε."),
    },
    correct={
        "by hand": guided_by_hand,
        "torch.func": guided_by_func,
        "a loop": guided_in_a_loop,
    },
    forbidden=(
        "distillation.matching",
        "distillation.truncated_snr",
        "guidance.classifier_free",
        "denoisers.clipped",
        "paths.GaussianPath.perturb",
        "paths.GaussianPath.convert",
    ),
)


# 5. jumps_for ---------------------------------------------------------------------------------------------------------


def tau(times):
    """σ²/α² on the cosine path; very large, but finite, at t = 1."""
    return torch.tan(math.pi / 2 * times) ** 2


def time_of(tau):
    return 2 / math.pi * tau.sqrt().atan()


def refuse_eta(eta, most):
    if bool((eta > most).any()):
        raise ValueError(f"eta must be at most {most.tolist()}; got {eta.tolist()}")


def jumps_for(eta, times):
    t, s = tau(times[:-1]), tau(times[1:])
    most = (1 - s / t).rsqrt()
    refuse_eta(eta, most)
    return time_of(s * (1 - eta**2 * (1 - s / t)).clamp(min=0)), most


def with_low(formula):
    """Another end of the jump, a τ made of η and of τ at t and s; what is refused, and `most`, are right."""

    def answer(eta, times):
        _, most = jumps_for(eta, times)
        return time_of(formula(eta, tau(times[:-1]), tau(times[1:]))), most

    return answer


def with_most(formula):
    """Another largest η, made of the share τ_s/τ_t."""

    def answer(eta, times):
        low, _ = jumps_for(eta, times)
        return low, formula(tau(times[1:]) / tau(times[:-1]))

    return answer


jumps_eta_not_squared = with_low(lambda eta, t, s: s * (1 - eta * (1 - s / t)))
jumps_in_log_snr = with_low(lambda eta, t, s: s * (s / t) ** eta)
jumps_ratio_upside_down = with_low(lambda eta, t, s: s * (1 - eta**2 * (1 - t / s)))
jumps_share_for_its_rest = with_low(lambda eta, t, s: s * (1 - eta**2 * s / t))
jumps_of_tangents = with_low(lambda eta, t, s: s * (1 - eta**2 * (1 - (s / t).sqrt())) ** 2)
jumps_from_t = with_low(lambda eta, t, s: t * (1 - eta**2 * (1 - s / t)))
jumps_all_noise = with_low(lambda eta, t, s: s * (1 - eta**2))
jumps_posterior_as_low = with_low(lambda eta, t, s: eta**2 * s * (1 - s / t))
most_without_root = with_most(lambda share: 1 / (1 - share))
most_upside_down = with_most(lambda share: (1 - share).sqrt())
most_is_1 = with_most(torch.ones_like)
most_of_t = with_most(lambda share: share.sqrt())


def jumps_in_time(eta, times):
    _, most = jumps_for(eta, times)
    return (times[1:] - eta * (times[:-1] - times[1:])).clamp(min=0), most


def noise_of(eta, times):
    """α_s, σ_s, and the variance of DDIM's new noise."""
    a_t, b_t, a_s, b_s = (f(math.pi / 2 * at) for at in (times[:-1], times[1:]) for f in (torch.cos, torch.sin))
    return a_s, b_s, (eta * b_s / b_t) ** 2 * (b_t**2 - (a_t / a_s * b_s) ** 2)


def jumps_unscaled(eta, times):
    """Takes the new noise from σ_s² for σ_low², without the shrinking on the way up."""
    _, b_s, new = noise_of(eta, times)
    return 2 / math.pi * (b_s**2 - new).clamp(min=0).sqrt().asin(), jumps_for(eta, times)[1]


def jumps_by_beta(eta, times):
    """β in the place of β̃; where that is more than all noise, the jump ends in the data."""
    a_s, b_s, _ = noise_of(eta, times)
    beta = 1 - (torch.cos(math.pi / 2 * times[:-1]) / a_s) ** 2
    return time_of((b_s**2 - eta**2 * beta).clamp(min=0) / a_s**2), jumps_for(eta, times)[1]


def jumps_length(eta, times):
    low, most = jumps_for(eta, times)
    return times[:-1] - low, most


def jumps_angle(eta, times):
    low, most = jumps_for(eta, times)
    return math.pi / 2 * low, most


def jumps_tau(eta, times):
    low, most = jumps_for(eta, times)
    return tau(low), most


def jumps_root_forgotten(eta, times):
    low, most = jumps_for(eta, times)
    return 2 / math.pi * tau(low).atan(), most


def jumps_held_at_the_data(eta, times):
    """Where η is too large it jumps to the data."""
    most = (1 - tau(times[1:]) / tau(times[:-1])).rsqrt()
    return jumps_for(eta.minimum(most), times)[0], most


def jumps_refuses_above_1(eta, times):
    refuse_eta(eta, torch.ones_like(eta))
    return jumps_for(eta, times)


def jumps_by_angles(eta, times):
    """Sines and cosines alone: the noise left from below is σ_s² − ς² of x_s, and on the way up its ratio to x_0 stays."""
    a_t, b_t, a_s, b_s = (f(math.pi / 2 * at) for at in (times[:-1], times[1:]) for f in (torch.cos, torch.sin))
    kept = (a_t / a_s) ** 2
    posterior = (b_s / b_t) ** 2 * (b_t**2 - kept * b_s**2)
    old = b_s**2 - eta**2 * posterior
    if (old < -1e-12).any():
        raise ValueError("with this eta there would be more new noise than noise")
    most = torch.where(b_s > 0, b_s / posterior.sqrt(), 1.0)
    return torch.atan2(old.clamp(min=0).sqrt(), a_s) * 2 / math.pi, most


def jumps_in_a_loop(eta, times):
    """The clock u = α/σ; bisection for the end of the jump."""
    low, most = [], []
    for i, share in enumerate(eta.tolist()):
        t, s = times[i].item(), times[i + 1].item()
        if s == 0:
            if share > 1:
                raise ValueError("eta is above 1 in the last step")
            low.append(0.0)
            most.append(1.0)
            continue
        u_t, u_s = (math.cos(math.pi / 2 * at) / math.sin(math.pi / 2 * at) for at in (t, s))
        most.append(u_s / math.sqrt(u_s**2 - u_t**2))
        if share > most[-1]:
            raise ValueError(f"eta = {share} is too large for the step from {t} to {s}")
        below, above = 0.0, s
        for _ in range(70):
            middle = (below + above) / 2
            ratio = u_s * math.tan(math.pi / 2 * middle)  # u_s/u_low
            found = math.sqrt(max(1 - ratio**2, 0.0) / (1 - (u_t / u_s) ** 2))
            below, above = (middle, above) if found > share else (below, middle)
        low.append((below + above) / 2)
    return torch.tensor(low, dtype=DOUBLE), torch.tensor(most, dtype=DOUBLE)


def jumps_by_log_snr(eta, times):
    """With the log-SNR ℓ: e^(ℓ_s − ℓ_low) = 1 − (η/most)², and the sigmoid of ℓ is α²."""
    angle = math.pi / 2 * times
    snr = 2 * (angle.cos().log() - angle.sin().log())
    most = (-torch.expm1(snr[:-1] - snr[1:])) ** -0.5
    if not (eta <= most).all():
        raise ValueError(f"no jump has this eta: {eta}")
    low = snr[1:] - torch.log1p(-((eta / most) ** 2))
    return torch.acos(torch.sigmoid(low).sqrt()) / (math.pi / 2), most


def falling(g, steps, first=None, last=None):
    """Times from below 1 to above 0, or with given ends."""
    parts = uniform(g, 0.5, 1.5, steps).cumsum(0)
    first = number(g, 0.8, 0.95) if first is None else first
    last = number(g, 0.05, 0.2) if last is None else last
    return torch.cat([torch.tensor([first], dtype=DOUBLE), first - (first - last) * parts / parts[-1]])


def chance(g, times, low=0.3, high=0.95, too_much=None):
    """η between shares of what each step allows; in one step more than that, if asked."""
    times = times.clone()
    if times[-1] < 1e-9:
        times[-1] = 0.0
    share = tau(times[1:]) / tau(times[:-1])
    eta = uniform(g, low, high, len(share)) * (1 - share).rsqrt()
    if too_much is not None:
        eta[too_much] = 1.1 * (1 - share[too_much]).rsqrt()
    return {"eta": eta, "times": times}


JUMPS = Exercise(
    "jumps_for",
    points=3,
    minutes=20,
    difficulty=3,
    reference=jumps_for,
    outputs=("low", "most"),
    visible=Group(
        1,
        lambda g: [
            chance(g, falling(g, 4)),
            chance(g, falling(g, 5, 1.0, 0.0)),
            chance(g, falling(g, 5, 0.5), 0.95, 0.999),
            chance(g, falling(g, 3), too_much=1),
        ],
    ),
    hidden={
        "other grids": Group(
            1,
            lambda g: [
                chance(g, falling(g, 9)),
                chance(g, falling(g, 1)),
                chance(g, falling(g, 6, 0.6), 0.8, 0.999),
                {"eta": torch.zeros(3, dtype=DOUBLE), "times": falling(g, 3)},
                chance(g, falling(g, 25)),
            ],
        ),
        "from pure noise, down to the data, too much": Group(
            1,
            lambda g: [
                chance(g, falling(g, 3, 1.0)),
                chance(g, falling(g, 4, last=0.0)),
                chance(g, falling(g, 2, 1.0, 0.0)),
                chance(g, falling(g, 5), too_much=whole(g, 0, 5)),
                chance(g, falling(g, 1), too_much=0),
            ],
        ),
    },
    mistakes={
        "you wrote η for η²": (
            jumps_eta_not_squared,
            "η multiplies the deviation √β̃: the variance of the new noise is η² β̃.",
        ),
        "you went on in the log-SNR in proportion to η": (
            jumps_in_log_snr,
            "That is right for η = 0 and η = 1. Between them compare the variances of the new noise.",
        ),
        "you went on in time in proportion to η": (
            jumps_in_time,
            "Time is only a name for the levels of noise. Compare the variances of the new noise.",
        ),
        "you turned τ_s/τ_t upside down": (
            jumps_ratio_upside_down,
            "β̃ = σ_s² (1 − τ_s/τ_t) with τ = σ²/α², which grows with t: the ratio is below 1.",
        ),
        "you took τ_s/τ_t for 1 − τ_s/τ_t": (
            jumps_share_for_its_rest,
            "β̃ = σ_s² (1 − τ_s/τ_t). The share τ_s/τ_t is that of σ_s² which x_t already fixes.",
        ),
        "you compared tangents, not their squares": (
            jumps_of_tangents,
            "τ = σ²/α² = tan²(πt/2), and variances are what adds up.",
        ),
        "you began at t and not at s": (
            jumps_from_t,
            "The way up ends at s: σ_s² − (α_s/α_low)² σ_low² is the noise that it adds.",
        ),
        "you took η² as the share of new noise in σ_s²": (
            jumps_all_noise,
            "It is a share of β̃, which is smaller: σ_s² (1 − τ_s/τ_t).",
        ),
        "you exchanged old noise and new": (
            jumps_posterior_as_low,
            "From below comes what is *not* new: σ_s² − η² β̃.",
        ),
        "you forgot that noise shrinks on the way up": (
            jumps_unscaled,
            "Going up multiplies the state, noise and all, by α_s/α_low: σ_s² − η² β̃ = (α_s/α_low)² σ_low².",
        ),
        "you took β for β̃": (
            jumps_by_beta,
            "η is a share of √β̃, with β̃ the variance of q(x_s | x_t, x_0).",
        ),
        "you returned the lengths of the jumps": (jumps_length, "Asked is the time at which each jump ends."),
        "you returned angles": (jumps_angle, "α = cos(πt/2): multiply the angle by 2/π."),
        "you returned τ": (jumps_tau, "Asked is the time that has this τ = tan²(πt/2)."),
        "you forgot a root": (jumps_root_forgotten, "tan(πt/2) is the root of τ."),
        "you forgot the root in the largest η": (
            most_without_root,
            "η is compared with deviations: solve η² (1 − τ_s/τ_t) = 1 for η.",
        ),
        "you have the largest η upside down": (
            most_upside_down,
            "There is no old noise left when η² β̃ = σ_s². As β̃ is below σ_s², this η is above 1.",
        ),
        "you have √(τ_s/τ_t) for the largest η": (
            most_of_t,
            "There is no old noise left when η² β̃ = σ_s², with β̃ = σ_s² (1 − τ_s/τ_t).",
        ),
        "you said that η is at most 1": (
            most_is_1,
            "Nothing is special at 1. What must not be negative is the old noise, σ_s² − η² β̃.",
        ),
        "you refused every η above 1": (
            jumps_refuses_above_1,
            "Between 1 and the largest η all is well: the jump ends above the data.",
        ),
        "you jumped to the data where η is too large": (
            jumps_held_at_the_data,
            "There is no jump with that much new noise: raise a ValueError that names eta.",
        ),
    },
    correct={
        "sines and cosines": jumps_by_angles,
        "a loop": jumps_in_a_loop,
        "the log-SNR": jumps_by_log_snr,
    },
    tolerance=1e-7,
    mentions=("eta",),
    forbidden=(
        "samplers.overshoot",
        "samplers.overshoot_step",
        "samplers.overshoot.overshoot_coefficients",
        "samplers.ddim_step",
        "samplers.ode.ddim_coefficients",
        "paths.GaussianPath.posterior",
        "paths.GaussianPath.bridge",
        "paths.GaussianPath.transition",
        "paths.GaussianPath.time_at",
    ),
)


# 6. consistency_gradient ----------------------------------------------------------------------------------------------


def towards_0(t, alphas, sigmas):
    """Cosine and sine of the angle between the times t and 0."""
    return alphas[t] * alphas[0] + sigmas[t] * sigmas[0], sigmas[t] * alphas[0] - alphas[t] * sigmas[0]


def f_of(theta, x, t, alphas, sigmas, towards=towards_0):
    """The student: where one DDIM step by its v leads, from t to the time 0."""
    skip, out = towards(t, alphas, sigmas)
    return each(skip, x) * x - each(out, x) * Affine(*theta)(x, t)


def ddim_down(x, x0, t, s, alphas, sigmas):
    eps = (x - each(alphas[t], x) * x0) / each(sigmas[t], x)
    return each(alphas[s], x) * x0 + each(sigmas[s], x) * eps


def consistent(
    f=f_of,
    step=lambda theta, teacher, x, t, s, a, b: ddim_down(x, teacher(x, t), t, s, a, b),
    target=lambda f, theta, teacher, x, xs, t, s: f(theta, xs, s),
    flows="here",
    loss=lambda gap: gap.square().mean(),
):
    """The loss and its gradient, with one part of it changed; `flows` says where the gradient goes: here, there, both."""

    def answer(theta, teacher, xt, t, s, alphas, sigmas):
        def student(theta, x, t):
            return f(theta, x, t, alphas, sigmas)

        leaf = theta.detach().clone().requires_grad_()
        here, there = (leaf if flows in (place, "both") else theta.detach() for place in ("here", "there"))
        xs = step(there, teacher, xt, t, s, alphas, sigmas)
        value = loss(student(here, xt, t) - target(student, there, teacher, xt, xs, t, s))
        return torch.autograd.grad(value, leaf)[0], value.detach()

    return answer


def f_of_the_data(theta, x, t, alphas, sigmas):
    return each(alphas[t], x) * x - each(sigmas[t], x) * Affine(*theta)(x, t)


def f_without_rest(theta, x, t, alphas, sigmas):
    """α_0 x̂_0, without the noise that is still in a state at the time 0."""
    return alphas[0].to(x.dtype) * f_of_the_data(theta, x, t, alphas, sigmas)


def f_of_the_sum(theta, x, t, alphas, sigmas):
    def towards(t, a, b):
        return a[t] * a[0] - b[t] * b[0], b[t] * a[0] + a[t] * b[0]

    return f_of(theta, x, t, alphas, sigmas, towards)


def f_plus(theta, x, t, alphas, sigmas):
    skip, out = towards_0(t, alphas, sigmas)
    return each(skip, x) * x + each(out, x) * Affine(*theta)(x, t)


def f_of_x0(theta, x, t, alphas, sigmas):
    """Reads the network's output as x̂_0."""
    return ddim_down(x, Affine(*theta)(x, t), t, torch.zeros_like(t), alphas, sigmas)


def f_differences(theta, x, t, alphas, sigmas):
    """Begins at 0, but is no DDIM step."""
    return x - each(sigmas[t] - sigmas[0], x) * Affine(*theta)(x, t)


def step_keeps_sigma_t(theta, teacher, x, t, s, alphas, sigmas):
    x0 = teacher(x, t)
    return each(alphas[s], x) * x0 + (x - each(alphas[t], x) * x0)


def step_by_itself(theta, teacher, x, t, s, alphas, sigmas):
    return ddim_down(x, f_of_the_data(theta, x, t, alphas, sigmas), t, s, alphas, sigmas)


def step_to_0(theta, teacher, x, t, s, alphas, sigmas):
    return ddim_down(x, teacher(x, t), t, torch.zeros_like(s), alphas, sigmas)


consistency_gradient = consistent()
consistency_both = consistent(flows="both")
consistency_there = consistent(flows="there")
consistency_data = consistent(f_of_the_data)
consistency_without_rest = consistent(f_without_rest)
consistency_sum_of_angles = consistent(f_of_the_sum)
consistency_plus = consistent(f_plus)
consistency_as_x0 = consistent(f_of_x0)
consistency_differences = consistent(f_differences)
consistency_told_t = consistent(target=lambda f, theta, teacher, x, xs, t, s: f(theta, xs, t))
consistency_no_step = consistent(target=lambda f, theta, teacher, x, xs, t, s: f(theta, x, s))
consistency_teachers_x0 = consistent(target=lambda f, theta, teacher, x, xs, t, s: teacher(x, t))
consistency_state = consistent(target=lambda f, theta, teacher, x, xs, t, s: xs)
consistency_asked_at_s = consistent(step=lambda theta, teacher, x, t, s, a, b: ddim_down(x, teacher(x, s), t, s, a, b))
consistency_to_0 = consistent(step=step_to_0, target=lambda f, theta, teacher, x, xs, t, s: xs)
consistency_keeps_sigma_t = consistent(step=step_keeps_sigma_t)
consistency_by_itself = consistent(step=step_by_itself)
consistency_sum = consistent(loss=lambda gap: gap.square().sum())
consistency_sum_of_sample = consistent(loss=lambda gap: gap.square().flatten(1).sum(1).mean())
consistency_absolute = consistent(loss=lambda gap: gap.abs().mean())


def consistency_by_hand(theta, teacher, xt, t, s, alphas, sigmas):
    """The output is linear in the network's numbers: its derivative is −sin δ · (x, 1)."""
    angle = torch.atan2(sigmas, alphas)
    x, shape = xt.double(), (-1, *[1] * (xt.ndim - 1))

    def arrival(x, t):
        turn = (angle[t] - angle[0]).reshape(shape)
        scale, shift = (row.double()[t].reshape(shape) for row in theta)
        return turn.cos() * x - turn.sin() * (scale * x + shift)

    x0 = teacher(xt, t).double()
    ratio = (sigmas[s] / sigmas[t]).reshape(shape)
    xs = ratio * x + (alphas[s].reshape(shape) - ratio * alphas[t].reshape(shape)) * x0
    gap = arrival(x, t) - arrival(xs, s)
    slope = -2 * (angle[t] - angle[0]).sin().reshape(shape) * gap / gap.numel()
    gradient = torch.zeros(theta.shape, dtype=DOUBLE)
    gradient[0].scatter_add_(0, t, (slope * x).flatten(1).sum(1))
    gradient[1].scatter_add_(0, t, slope.flatten(1).sum(1))
    return gradient.to(theta.dtype), gap.square().mean().to(theta.dtype)


def consistency_by_backward(theta, teacher, xt, t, s, alphas, sigmas):
    """x̂_0 and ε̂ of the student's v, moved to the time 0; the target without a graph."""
    bend = lambda one: one.to(xt.dtype).view(-1, *[1] * (xt.ndim - 1))  # noqa: E731
    theta = theta.clone().requires_grad_()

    def end(x, t):
        v = bend(theta[0][t]) * x + bend(theta[1][t])
        x0, eps = bend(alphas[t]) * x - bend(sigmas[t]) * v, bend(sigmas[t]) * x + bend(alphas[t]) * v
        return alphas[0].to(xt.dtype) * x0 + sigmas[0].to(xt.dtype) * eps

    with torch.no_grad():
        guess = teacher(xt, t)
        target = end(bend(alphas[s]) * guess + bend(sigmas[s] / sigmas[t]) * (xt - bend(alphas[t]) * guess), s)
    loss = torch.nn.functional.mse_loss(end(xt, t), target)
    loss.backward()
    return theta.grad, loss.detach()


def consistency_in_a_loop(theta, teacher, xt, t, s, alphas, sigmas):
    """Sample by sample with torch.func; the gradient of the second argument is never asked for."""

    def student(theta, x, t):
        skip, out = towards_0(t, alphas, sigmas)
        return skip.item() * x - out.item() * (theta[0, t] * x + theta[1, t])

    def loss(theta, frozen, x, xs, t, s):
        return (student(theta, x, t) - student(frozen, xs, s)).square().sum() / xt.numel()

    total, gradient = torch.zeros((), dtype=theta.dtype), torch.zeros_like(theta)
    moved = ddim_down(xt, teacher(xt, t), t, s, alphas, sigmas)
    for one, other, now, then in zip(xt, moved, t, s, strict=True):
        part, value = torch.func.grad_and_value(loss)(theta, theta, one, other, now, then)
        total, gradient = total + value, gradient + part
    return gradient, total


def agreeing(g, shape, T, dtype=SINGLE, t=None, s=None, into=False):
    t = whole(g, 2, T + 1, shape[0]) if t is None else torch.tensor(t)
    s = t - whole(g, 1, 2, shape[0]) if s is None else torch.tensor(s)
    return {
        "theta": uniform(g, -1.2, 1.2, 2, T + 1).to(dtype),
        "teacher": Affine(uniform(g, 0.2, 0.8, T + 1), uniform(g, -1.2, 1.2, T + 1)),
        "xt": normal(g, shape, dtype),
        "t": t,
        "s": s,
        **circle(g, T, into, first=number(g, 0.15, 0.35)),
    }


CONSISTENT = Exercise(
    "consistency_gradient",
    points=4,
    minutes=30,
    difficulty=4,
    reference=consistency_gradient,
    outputs=("gradient", "loss"),
    visible=Group(
        1,
        lambda g: [
            agreeing(g, (5, 4), 6, DOUBLE, t=[6, 4, 3, 5, 4], s=[4, 3, 1, 2, 2]),
            agreeing(g, (3, 1, 2, 3), 5, t=[5, 2, 3], s=[3, 0, 2], into=True),
        ],
    ),
    hidden={
        "other shapes": Group(
            2,
            lambda g: [
                agreeing(g, (8, 3), 9),
                agreeing(g, (4, 2, 1, 5), 7, DOUBLE, t=[7, 7, 3, 5], s=[5, 2, 2, 1]),
                agreeing(g, (1, 6), 4, DOUBLE, t=[3], s=[1]),
                agreeing(g, (6, 1), 8, DOUBLE),
            ],
        ),
        "pure noise, down to the first time": Group(
            1,
            lambda g: [
                agreeing(g, (4, 5), 6, DOUBLE, t=[6, 6, 3, 1], s=[2, 5, 0, 0], into=True),
                agreeing(g, (3, 2), 4, t=[1, 2, 4], s=[0, 0, 0]),
                agreeing(g, (1, 4), 3, DOUBLE, t=[3], s=[2], into=True),
            ],
        ),
    },
    mistakes={
        "you let the gradient flow into the target": (
            consistency_both,
            "The target stands for the truth, and the student is to come to it, not the other way round: detach it.",
        ),
        "you let the gradient flow into the target alone": (
            consistency_there,
            "The student learns at (x_t, t). The target at (x_s, s) is what it is compared with.",
        ),
        "you let the student end in the data": (
            consistency_data,
            "x̂_0 = α x − σ v is x itself where σ = 0. Here the path begins with noise, σ_0 > 0, and f(x, 0) = x must hold there.",
        ),
        "you forgot the noise that is left at the time 0": (
            consistency_without_rest,
            "At the time 0 a state is α_0 x̂_0 + σ_0 ε̂, and the v says the ε̂, too.",
        ),
        "you added the angles of t and 0": (
            consistency_sum_of_angles,
            "A step from t to 0 turns by the difference of their angles: at t = 0 nothing may be left of the network.",
        ),
        "you have the sign of v wrong": (
            consistency_plus,
            "v = α ε − σ x_0 points to the noise. The step goes to the data: f = … − (…) v.",
        ),
        "you read the network's output as x̂_0": (
            consistency_as_x0,
            "The network says v. First make x̂_0 = α x − σ v and ε̂ = σ x + α v of it.",
        ),
        "you multiplied v by σ_t − σ_0": (
            consistency_differences,
            "That is x at t = 0, but no DDIM step. Work out α_0 x̂_0 + σ_0 ε̂.",
        ),
        "you told the student t in the target": (
            consistency_told_t,
            "x_s has the noise of s: tell the student s there.",
        ),
        "you asked the student about x_t at the time s": (
            consistency_no_step,
            "The target is its answer one teacher's step further on, at x_s.",
        ),
        "you took the teacher's x̂_0 as the target": (
            consistency_teachers_x0,
            "That is the mean of all data that are possible, and the student would stay a denoiser. The path of the ODE ends elsewhere.",
        ),
        "you took x_s as the target": (
            consistency_state,
            "x_s is the end of the path at s = 0 only. Further up ask the student where the path from x_s ends.",
        ),
        "you let the teacher go to the end in one step": (
            consistency_to_0,
            "From far away one step of the teacher ends elsewhere than its path. It goes to s, and the student says the rest.",
        ),
        "you told the teacher s": (consistency_asked_at_s, "The teacher's step begins at x_t, at time t."),
        "you kept the noise of t in the teacher's step": (
            consistency_keeps_sigma_t,
            "x_s = α_s x̂_0 + σ_s ε̂, with ε̂ = (x_t − α_t x̂_0)/σ_t.",
        ),
        "you made the step by the student itself": (
            consistency_by_itself,
            "The student agrees with its own steps whether they are right or not. What it is to agree with is the teacher's path.",
        ),
        "you summed instead of averaging": (
            consistency_sum,
            "The loss is the mean over samples and values, the gradient with it.",
        ),
        "you summed over the values of a sample": (
            consistency_sum_of_sample,
            "The loss is the mean over samples and values, so that it does not grow with the size of the images.",
        ),
        "you took absolute errors": (consistency_absolute, "The errors are squared."),
    },
    correct={
        "by hand, with angles": consistency_by_hand,
        "backward": consistency_by_backward,
        "a loop": consistency_in_a_loop,
    },
    forbidden=(
        "distillation.consistency_target",
        "distillation.consistency_function",
        "distillation.matching",
        "samplers.ddim",
        "samplers.ddim_step",
        "samplers.ode.ddim_coefficients",
        "paths.GaussianPath.convert",
    ),
)

EXERCISES = [TARGET, MANY, WEIGHT, GUIDED, JUMPS, CONSISTENT]
