"""Distillation's targets against DDIM typed by hand, linear maps of one Gaussian, and a mixture's exact flow by SciPy."""

import functools
import inspect
import itertools
import math

import numpy as np
import oracles
import pytest
import scipy.integrate
import scipy.optimize
import torch
from oracles import MEANS, PATHS, STDS, WEIGHTS, path_of, time_on
from scipy.stats import norm
from torch import nn

from dgm_course import distillation
from dgm_course.denoisers import Denoiser, clipped
from dgm_course.distillation import (
    consistency_function,
    consistency_target,
    matching,
    progressive_target,
    step_x0,
    truncated_snr,
)
from dgm_course.paths import Cosine, DiscretePath, Sigmoid, Straight
from dgm_course.samplers import ddim, last
from dgm_course.toy import GaussianMixture

known = functools.cache(oracles.known)
all_paths = pytest.mark.parametrize("name", PATHS)
TRIPLES = [(1.0, 0.75, 0.5), (1.0, 0.5, 0.0), (0.8, 0.55, 0.3), (0.3, 0.1, 0.0), (0.9, 0.85, 0.05)]
LINE = GaussianMixture(torch.from_numpy(MEANS)[:, None], torch.from_numpy(STDS**2), torch.from_numpy(WEIGHTS))


def normals(*shape, generator, dtype=torch.float64):
    return torch.randn(*shape, generator=generator, dtype=dtype)


def close(actual, expected, tolerance=1e-10):
    """Up to the tolerance times the largest value, or absolutely if that is below 1."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    size = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tolerance * size)


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def on(name, units):
    return [time_on(name, unit) for unit in units]


def smooth(xt, t):
    """A teacher that depends on state and time, t a number or one for each sample."""
    t = torch.as_tensor(t, dtype=torch.float64).reshape(-1, *[1] * (xt.ndim - 1)).to(xt)
    return torch.tanh(0.7 * xt + 0.3) * (1 - 0.2 * t / 20) + 0.1 * torch.cos(3 * t)


def typed_ddim(name, xt, x0, t, s):
    """x_s = α_s·x̂_0 + σ_s·ε̂, with α and σ from the closed forms."""
    (alpha_s, sigma_s), (alpha_t, sigma_t) = known(name, s), known(name, t)
    return alpha_s * x0 + sigma_s * (xt - alpha_t * x0) / sigma_t


def signal(name, t):
    """u = α/σ."""
    alpha, sigma = known(name, t)
    return alpha / sigma if sigma else math.inf


def noisy(name, t, generator, *shape):
    alpha, sigma = known(name, t)
    return alpha * normals(*shape, generator=generator) + sigma * normals(*shape, generator=generator)


# One step for two -----------------------------------------------------------------------------------------------------


@all_paths
@pytest.mark.parametrize("units", [(1.0, 0.9), (1.0, 0.0), (0.8, 0.3), (0.1, 0.0), (0.55, 0.5)])
def test_step_x0_finds_the_guess(name, units, generator):
    """A DDIM step typed with any guess, however large, gives that guess back; into t = 0 it is x_s/α_0, whatever x_t was."""
    t, s = on(name, units)
    guess, xt = 3 * normals(4, 3, generator=generator), noisy(name, t, generator, 4, 3)
    found = step_x0(path_of(name), xt, typed_ddim(name, xt, guess, t, s), t, s)
    close(found, guess, 1e-9 if t == 1 or name.startswith("VE") else 1e-10)
    if s == 0:
        close(step_x0(path_of(name), 7 - xt, guess, t, s), guess / known(name, 0)[0], 1e-12)


@all_paths
@pytest.mark.parametrize("units", TRIPLES)
def test_one_step_is_two(name, units, generator):
    """The student's DDIM step to the target ends where two of the teacher's end, all typed, to 1e-10."""
    t, m, s = on(name, units)
    xt = noisy(name, t, generator, 5, 2)
    target = progressive_target(smooth, path_of(name), xt, t, m, s)
    xm = typed_ddim(name, xt, smooth(xt, t), t, m)
    xs = typed_ddim(name, xm, smooth(xm, m), m, s)
    close(typed_ddim(name, xt, target, t, s), xs)


@all_paths
@pytest.mark.parametrize("units", TRIPLES)
def test_target_is_a_mean_weighted_by_lengths(name, units, generator):
    """Of the two guesses, by the lengths of the teacher's steps in u = α/σ, so between them; at s = 0 it is the second one."""
    t, m, s = on(name, units)
    xt = noisy(name, t, generator, 5, 2)
    first = smooth(xt, t)
    xm = typed_ddim(name, xt, first, t, m)
    second = smooth(xm, m)
    u_t, u_m, u_s = (signal(name, time) for time in (t, m, s))
    share = 0.0 if s == 0 else (u_m - u_t) / (u_s - u_t)
    target = progressive_target(smooth, path_of(name), xt, t, m, s)
    close(target, share * first + (1 - share) * second, 1e-9)
    low, high = torch.minimum(first, second), torch.maximum(first, second)
    assert bool(((target >= low - 1e-9) & (target <= high + 1e-9)).all()) and 0 <= share < 1


@pytest.mark.parametrize("t, h", [(1.0, 0.25), (1.0, 0.5), (0.75, 0.125), (0.5, 0.01)])
def test_target_on_the_circle(t, h, generator):
    """On the cosine path, with the middle half way in t: (σ_s·x̂_a + σ_t·x̂_b)/(σ_s + σ_t)."""
    xt, s, m = normals(5, 2, generator=generator), t - 2 * h, t - h
    turn = [math.pi / 2 * time for time in (s, m, t)]
    sin_s, sin_m, sin_t = (math.sin(angle) for angle in turn)
    cos_s, cos_m, cos_t = (math.cos(angle) for angle in turn)
    first = smooth(xt, t)
    second = smooth(cos_m * first + sin_m / sin_t * (xt - cos_t * first), m)
    target = progressive_target(smooth, Cosine(), xt, t, m, s)
    close(target, (sin_s * first + sin_t * second) / (sin_s + sin_t), 1e-10)
    assert cos_s > cos_m > cos_t


@all_paths
@pytest.mark.parametrize("units", TRIPLES)
@pytest.mark.parametrize("mean, var", [(0.6, 0.2), (-1.0, 3.0)])
def test_target_of_one_gaussian(name, units, mean, var, generator):
    """For data N(m, c) each DDIM step multiplies x − αm by a known number, so the target is a known line in x_t."""
    t, m, s = on(name, units)

    def slope(time):
        alpha, sigma = known(name, time)
        return alpha * var / (alpha**2 * var + sigma**2)

    def factor(t, s):
        (a_s, s_s), (a_t, s_t) = known(name, s), known(name, t)
        return (a_s * a_t * var + s_s * s_t) / (a_t**2 * var + s_t**2)

    xt = noisy(name, t, generator, 6, 1)
    target = progressive_target(
        lambda x, time: mean + slope(time) * (x - known(name, time)[0] * mean), path_of(name), xt, t, m, s
    )
    (a_s, s_s), (a_t, s_t) = known(name, s), known(name, t)
    ratio = s_s / s_t
    line = (factor(t, m) * factor(m, s) - ratio) / (a_s - ratio * a_t)
    close(target, mean + line * (xt - a_t * mean), 1e-9)
    assert line > 0


@all_paths
def test_a_time_for_each_sample(name, generator):
    """With (B,) times, t = 1 and s = 0 among them, each sample gets what it gets alone, by the typed steps."""
    rows = [on(name, units) for units in TRIPLES]
    t, m, s = (double(column) for column in zip(*rows, strict=True))
    xt = torch.cat([noisy(name, time, generator, 1, 2, 3) for time, *_ in rows])
    target = progressive_target(smooth, path_of(name), xt, t, m, s)
    for i, (time, middle, end) in enumerate(rows):
        x = xt[i : i + 1]
        xm = typed_ddim(name, x, smooth(x, time), time, middle)
        xs = typed_ddim(name, xm, smooth(xm, middle), middle, end)
        close(typed_ddim(name, x, target[i : i + 1], time, end), xs)
        close(step_x0(path_of(name), x, xs, time, end), target[i : i + 1], 1e-9)
    mixed = progressive_target(smooth, path_of(name), xt, t, m, 0)  # a number for one of the times goes too
    close(mixed[:1], progressive_target(smooth, path_of(name), xt[:1], t[0].item(), m[0].item(), 0), 1e-12)


@pytest.mark.parametrize("shape", [(1,), (3,), (1, 1), (2, 0), (2, 1, 3, 5), (3, 2, 1, 1, 2)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_shapes_and_types(shape, dtype, tolerance, generator):
    """The target has the shape and type of x_t; in float32 it is that of float64, up to rounding."""
    xt = normals(*shape, generator=generator, dtype=dtype)
    each = [torch.full((shape[0],), time) for time in (0.75, 0.5, 0.25)]
    for name, times in (("Cosine", (1.0, 0.75, 0.5)), ("VP", (0.5, 0.25, 0.0)), ("Straight", each)):
        found = progressive_target(smooth, path_of(name), xt, *times)
        assert found.shape == shape and found.dtype == dtype
        wide = progressive_target(smooth, path_of(name), xt.double(), *times)
        torch.testing.assert_close(found.double(), wide, rtol=tolerance, atol=tolerance)
        step = step_x0(path_of(name), xt, xt, times[0], times[2])
        assert step.shape == shape and step.dtype == dtype
        assert consistency_target(smooth, smooth, path_of(name), xt, *times[::2]).dtype == dtype


def test_on_a_chain_of_whole_times(generator):
    """Times may be int64, as `DiscretePath.times` gives them; the last step of a chain ends at the teacher's last guess."""
    path, xt = DiscretePath([0.02] * 40), normals(3, 2, generator=generator)
    t, m, s = path.times(2)
    by_tensors, by_numbers = (progressive_target(smooth, path, xt, *times) for times in ((t, m, s), (40, 20, 0)))
    assert torch.equal(by_tensors, by_numbers)
    abar = [0.98**time for time in (40, 20)]
    first = smooth(xt, 40)
    xm = math.sqrt(abar[1]) * first + math.sqrt((1 - abar[1]) / (1 - abar[0])) * (xt - math.sqrt(abar[0]) * first)
    close(by_numbers, smooth(xm, 20))


def test_two_evaluations(generator):
    """The teacher is asked twice: first for x_t at t, then for its own x_m at m; the times arrive as they were given."""
    xt, asked = normals(4, 2, generator=generator), []

    def teacher(x, t):
        asked.append((x, t))
        return smooth(x, t)

    m = torch.full((4,), 0.5, dtype=torch.float64)
    progressive_target(teacher, Cosine(), xt, 0.75, m, 0.25)
    (first, t), (second, middle) = asked
    assert first is xt and t == 0.75 and middle is m
    close(second, typed_ddim("Cosine", xt, smooth(xt, 0.75), 0.75, 0.5))
    asked.clear()
    consistency_target(smooth, teacher, Cosine(), xt, 0.75, 0.25)
    assert len(asked) == 1 and asked[0][0] is xt and asked[0][1] == 0.75


class Slope(nn.Module):
    """x̂_0 = w·x_t, with one parameter."""

    def __init__(self, w=0.5):
        super().__init__()
        self.w, self.grad_was = nn.Parameter(torch.tensor(w, dtype=torch.float64)), []

    def forward(self, xt, t, **cond):
        self.grad_was.append(torch.is_grad_enabled())
        return self.w * xt


def test_targets_have_no_gradient(generator):
    """Neither teacher, student nor x_t gets one from a target; outside, gradients are as they were."""
    xt, teacher, student = normals(3, 2, generator=generator).requires_grad_(), Slope(), Slope(0.3)
    targets = [
        progressive_target(teacher, Cosine(), xt, 0.8, 0.5, 0.1),
        consistency_target(student, teacher, Cosine(), xt, 0.8, 0.1),
        consistency_function(lambda x, t: teacher(x, t), Straight(), xt, 0.5, tolerance=1e-3),
    ]
    assert not any(target.requires_grad for target in targets)
    assert not any(teacher.grad_was + student.grad_was) and torch.is_grad_enabled()
    matching(student, xt.detach(), 0.8, targets[0]).backward()
    assert student.w.grad is not None and teacher.w.grad is None and xt.grad is None
    assert step_x0(Cosine(), xt, xt, 0.8, 0.1).requires_grad  # a plain formula, which can be differentiated


def test_students_of_students(generator):
    """A target is a denoiser. Stacked from 16 steps down to 1, each ends where the teacher's 16 steps end, to 1e-10."""
    for name in ("Cosine", "Scaled", "Straight", "Sigmoid"):
        path, x = path_of(name), normals(4, 1, generator=generator)
        state, steps = x, 16
        for k in range(16, 0, -1):
            state = typed_ddim(name, state, LINE.denoiser(path)(state, k / 16), k / 16, (k - 1) / 16)
        d = LINE.denoiser(path)
        while steps > 1:
            steps //= 2
            h = 1 / steps
            d = functools.partial(
                lambda x, t, d, h, path: progressive_target(d, path, x, t, t - h / 2, t - h), d=d, h=h, path=path
            )
            close(last(ddim(d, path, x, path.times(steps))), state)


def test_what_a_student_says_is_no_mean(generator):
    """At t = 1, without signal, the teacher says the mean of the data for every noise; its student says a sample for each."""
    x = normals(200, 1, generator=generator)
    teacher = LINE.denoiser(Cosine())
    close(teacher(x, 1.0), np.full((200, 1), WEIGHTS @ MEANS))
    said = functools.reduce(
        lambda d, h: lambda x, t: progressive_target(d, Cosine(), x, t, t - h / 2, t - h), [1 / 4, 1 / 2, 1.0], teacher
    )(x, 1.0)
    assert said.std() > 1  # the data's deviation is 1.2


@pytest.mark.parametrize("name", ["Cosine", "VP", "Sigmoid"])
def test_targets_of_a_clipped_teacher_stay_in_range(name, generator):
    """The mean of guesses within [−1, 1] is within, also where the path has hardly any noise left."""
    wild = clipped(lambda xt, t: 5 * torch.sin(7 * xt))
    for h in (0.5, 0.1, 1e-3):
        for t in (1.0, 0.6, min(2.1 * h, 1.0)):
            target = progressive_target(wild, path_of(name), normals(50, 1, generator=generator), t, t - h / 2, t - h)
            assert target.abs().max() <= 1 + 1e-9


# The weight -----------------------------------------------------------------------------------------------------------


@all_paths
def test_truncated_snr(name):
    """max(α²/σ², 1) in Python, for a number and for each sample, float64 whatever comes."""
    times = on(name, [0.05, 0.1, 0.3, 0.5, 0.7, 0.95, 1.0])
    expected = [max((known(name, t)[0] / known(name, t)[1]) ** 2, 1.0) for t in times]
    for t, weight in zip(times, expected, strict=True):
        found = truncated_snr(path_of(name), t)
        assert found.dtype == torch.float64 and found.shape == () and found.item() == pytest.approx(weight, rel=1e-12)
    each = truncated_snr(path_of(name), double(times))
    assert each.shape == (7,) and each.tolist() == pytest.approx(expected, rel=1e-12)
    assert truncated_snr(path_of(name), torch.tensor(times[3:4], dtype=torch.float32)).dtype == torch.float64


def test_truncated_snr_at_the_edges():
    """1 where α = 0, so nothing is forgotten there; 1 where α = σ; very large, but finite, where there is hardly any noise."""
    assert truncated_snr(Cosine(), 1.0) == truncated_snr(Straight(), 1) == truncated_snr(Sigmoid(), 1.0) == 1
    assert truncated_snr(Cosine(), 0.5).item() == pytest.approx(1, abs=1e-12)
    assert truncated_snr(Straight(), 0.5 - 1e-3) > 1
    assert truncated_snr(Cosine(), 1e-8).item() == pytest.approx((2 / math.pi * 1e8) ** 2, rel=1e-9)
    for bad in (0.0, 0, double([0.5, 0.0])):
        with pytest.raises(ValueError, match=r"^t must be times with σ\(t\) > 0; got"):
            truncated_snr(Cosine(), bad)


@pytest.mark.parametrize(
    "name", [name for name in PATHS if name not in ("SubVP", "VE", "VE narrow", "Scaled", "Straight")]
)
def test_truncated_snr_and_the_error_in_v(name, generator):
    """Where α² + σ² = 1: SNR times the error in x̂_0 is that in ε̂, 1 + SNR times that in v, and the weight half of it or more."""
    x0, guess = normals(2, 40, 3, generator=generator)
    for t in on(name, [0.05, 0.2, 0.45, 0.5, 0.8, 0.95, 1.0]):
        alpha, sigma = known(name, t)
        xt = alpha * x0 + sigma * normals(40, 3, generator=generator)
        errors = (x0 - guess).square().sum()
        eps, eps_hat = (xt - alpha * x0) / sigma, (xt - alpha * guess) / sigma
        v, v_hat = alpha * eps - sigma * x0, alpha * eps_hat - sigma * guess
        in_v = (v - v_hat).square().sum() / errors
        weight = truncated_snr(path_of(name), t)
        assert in_v.item() == pytest.approx(1 / sigma**2, rel=1e-8)
        assert 0.5 - 1e-9 <= weight / in_v <= 1 + 1e-9
        in_eps = ((eps - eps_hat).square().sum() / errors).item()
        assert weight.item() == pytest.approx(max(in_eps, 1), rel=1e-8)


# The loss -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (4, 3), (3, 1, 2, 2)])
@pytest.mark.parametrize("weights", ["none", "each", "one", "float32"])
def test_matching_by_loops(shape, weights, generator):
    """Σ w·(guess − target)² over samples and values, by their number; and its gradient, 2w·(guess − target) by that number."""
    xt, target = (normals(*shape, generator=generator) for _ in "ab")
    each = torch.rand(shape[0], generator=generator, dtype=torch.float64) * 5
    weight = {"none": None, "each": each, "one": double(2.5), "float32": each.float()}[weights]
    guess = (0.3 * xt).requires_grad_()
    loss = matching(lambda x, t: guess, xt, 0.4, target, weight)
    loss.backward()
    total, slopes = 0.0, np.zeros(shape)
    for place in itertools.product(*map(range, shape)):
        w = {"none": 1.0, "one": 2.5}.get(weights, float(each[place[0]]))
        w = float(np.float32(w)) if weights == "float32" else w
        away = guess[place].item() - target[place].item()
        total += w * away**2
        slopes[place] = 2 * w * away / math.prod(shape)
    assert loss.shape == () and loss.item() == pytest.approx(total / math.prod(shape), rel=1e-12)
    close(guess.grad, slopes, 1e-12)


def test_matching_asks_the_student_once(generator):
    """With x_t, t and all conditions as they came; the loss has the data's type, also with weights in float64."""
    xt, t, y, w = normals(3, 2, generator=generator, dtype=torch.float32), torch.rand(3), torch.arange(3), torch.ones(3)
    asked = []

    def student(x, time, **cond):
        asked.append((x, time, cond))
        return 0 * x

    loss = matching(student, xt, t, torch.ones_like(xt), truncated_snr(Cosine(), t.clamp(min=0.9)), y=y, w=w)
    ((x, time, cond),) = asked
    assert x is xt and time is t and cond.keys() == {"y", "w"} and cond["y"] is y and cond["w"] is w
    assert loss.dtype == torch.float32 and loss.item() == 1.0


def test_matching_is_smallest_at_the_target(generator):
    """Zero there, and Newton's step on one slope leads to the weighted least squares solution of numpy."""
    xt, target, student = normals(6, 1, generator=generator), normals(6, 1, generator=generator), Slope()
    weight = torch.rand(6, generator=generator, dtype=torch.float64)
    assert matching(lambda x, t: target, xt, 0.5, target, weight) == 0
    (slope,) = torch.autograd.grad(matching(student, xt, 0.5, target, weight), student.w, create_graph=True)
    (curve,) = torch.autograd.grad(slope, student.w)
    best = (weight[:, None] * xt * target).sum() / (weight[:, None] * xt * xt).sum()
    assert (student.w - slope / curve).item() == pytest.approx(best.item(), rel=1e-10)


# Consistency ----------------------------------------------------------------------------------------------------------


@all_paths
@pytest.mark.parametrize("units", [(1.0, 0.75), (1.0, 0.0), (0.8, 0.3), (0.1, 0.05)])
def test_consistency_target(name, units, generator):
    """What the student says where the teacher's typed step ends, at s and not at t."""
    t, s = on(name, units)
    xt = noisy(name, t, generator, 4, 2)

    def student(x, time):
        assert time == s
        return torch.sin(x) + 0.1 * time

    xs = typed_ddim(name, xt, smooth(xt, t), t, s)
    close(consistency_target(student, smooth, path_of(name), xt, t, s), torch.sin(xs) + 0.1 * s)


def test_consistency_target_for_each_sample(generator):
    """With (B,) times each sample gets what it gets alone."""
    t, s, xt = double([1.0, 0.5, 0.25]), double([0.75, 0.25, 0.0]), normals(3, 2, generator=generator)
    found = consistency_target(lambda x, time: x * (1 + time[:, None]), smooth, Cosine(), xt, t, s)
    for i in range(3):
        xs = typed_ddim("Cosine", xt[i : i + 1], smooth(xt[i : i + 1], t[i]), t[i].item(), s[i].item())
        close(found[i : i + 1], xs * (1 + s[i]))


def test_a_student_that_predicts_v_has_the_boundary(generator):
    """Its guess at t = 0 is x itself, so the target of a last step is the teacher's guess, whatever the student's network says."""
    xt = normals(4, 2, generator=generator)
    for said in (0.0, 17.0):
        student = Denoiser(lambda x, t, said=said: said + torch.tanh(x), Cosine(), "v")
        close(consistency_target(student, smooth, Cosine(), xt, 0.25, 0.0), smooth(xt, 0.25))


def of_gaussian(name, mean, std, t):
    """The exact consistency function of N(mean, std²): x − αm is stretched to the data's deviation."""
    alpha, sigma = known(name, t)
    return lambda x: known(name, 0)[0] * (mean + std / math.hypot(alpha * std, sigma) * (x - alpha * mean))


@pytest.mark.parametrize("name", ["Cosine", "VP", "Straight"])
def test_the_true_function_agrees_with_itself(name, generator):
    """With the exact function as the student, the target misses it by the teacher's error of one step: four times less at half."""
    xt, t, errors = noisy(name, 0.6, generator, 20, 1), 0.6, []

    def teacher(x, time):
        alpha, sigma = known(name, time)
        return 0.4 + alpha * 0.09 / (alpha**2 * 0.09 + sigma**2) * (x - alpha * 0.4)

    for h in (0.02, 0.01, 0.005):
        target = consistency_target(
            lambda x, time: of_gaussian(name, 0.4, 0.3, time)(x), teacher, path_of(name), xt, t, t - h
        )
        errors.append((target - of_gaussian(name, 0.4, 0.3, t)(xt)).abs().max().item())
    assert all(3.5 < errors[i] / errors[i + 1] < 4.5 for i in (0, 1)), errors


def cdf(x, alpha, sigma):
    return WEIGHTS @ norm.cdf(x, alpha * MEANS, np.hypot(alpha * STDS, sigma))


def quantile(p, alpha, sigma):
    return scipy.optimize.brentq(lambda x: cdf(x, alpha, sigma) - p, -30, 30, xtol=1e-14)


@pytest.mark.parametrize("name", ["Cosine", "Cosine shifted", "Scaled", "Straight", "SubVP", "VE", "VP", "Sigmoid"])
def test_consistency_on_the_line(name):
    """In one dimension it is F_0⁻¹∘F_t, with the distribution functions and the root by SciPy; to 1e-8."""
    t = 0.9 if name == "Sigmoid" else 1.0  # whose rates are infinite at 1
    alpha, sigma = known(name, t)
    x = np.linspace(-1.9, 1.9, 5) * math.hypot(1.2 * alpha, sigma)
    expected = [known(name, 0)[0] * quantile(cdf(value, alpha, sigma), 1, 0) for value in x]
    found = consistency_function(LINE.denoiser(path_of(name)), path_of(name), torch.from_numpy(x)[:, None], t)
    assert found.shape == (5, 1) and found.dtype == torch.float64
    close(found[:, 0], expected, 1e-8)


@pytest.mark.parametrize("name", ["Cosine", "VP", "Straight", "Scaled", "VE narrow"])
@pytest.mark.parametrize("t", [1.0, 0.37, 1e-3])
def test_consistency_of_one_gaussian(name, t, generator):
    """A line, in closed form, with a shape of images and from any time; a whole number is a time too."""
    x = noisy(name, t, generator, 2, 1, 2, 3)

    def denoiser(x, time):
        alpha, sigma = path_of(name).alpha(time), path_of(name).sigma(time)
        return 0.4 + alpha * 0.36 / (alpha**2 * 0.36 + sigma**2) * (x - alpha * 0.4)

    close(consistency_function(denoiser, path_of(name), x, int(t) or t), of_gaussian(name, 0.4, 0.6, t)(x), 1e-8)


PLANE = {"means": np.array([[-1.0, 0.4], [0.8, 0.9], [0.5, -1.1]]), "std": 0.35, "share": np.array([0.2, 0.5, 0.3])}


def plane_mean(x, alpha, sigma):
    """E[x_0 | x_t] of the mixture in the plane, x of shape (N, 2), with numpy."""
    var = (alpha * PLANE["std"]) ** 2 + sigma**2
    away = x[:, None] - alpha * PLANE["means"]
    log_joint = np.log(PLANE["share"]) - 0.5 * (away**2).sum(2) / var
    joint = np.exp(log_joint - log_joint.max(1, keepdims=True))
    joint /= joint.sum(1, keepdims=True)
    return (joint[..., None] * (PLANE["means"] + alpha * PLANE["std"] ** 2 / var * away)).sum(1)


@pytest.mark.parametrize("name, t", [("Cosine", 0.9), ("Straight", 0.8), ("VP", 0.7)])
def test_consistency_in_the_plane(name, t):
    """By SciPy's DOP853 in x/α against log σ/α, down to σ/α = 1e-7: the ODE in other variables, without a path's rates."""
    alpha, sigma = known(name, t)
    x = np.random.default_rng(0).normal(size=(4, 2)) * math.hypot(alpha, sigma)

    def slope(log_ratio, flat):
        y = flat.reshape(-1, 2)
        return (y - plane_mean(y, 1.0, math.exp(log_ratio))).ravel()

    span = (math.log(sigma / alpha), math.log(1e-7))
    solved = scipy.integrate.solve_ivp(slope, span, (x / alpha).ravel(), method="DOP853", rtol=1e-12, atol=1e-13)
    mixture = GaussianMixture(torch.from_numpy(PLANE["means"]), PLANE["std"] ** 2, torch.from_numpy(PLANE["share"]))
    found = consistency_function(mixture.denoiser(path_of(name)), path_of(name), torch.from_numpy(x), t)
    close(found, solved.y[:, -1].reshape(-1, 2), 1e-8)


def test_consistency_along_a_path(generator):
    """Every state that the ODE visits has the same end: from t = 0.9, and from where it is at 0.5 by the law's quantiles."""
    alpha, sigma = known("Cosine", 0.5)
    x = 0.8 * normals(3, 1, generator=generator)
    middle = [[quantile(cdf(value, *known("Cosine", 0.9)), alpha, sigma)] for value in x[:, 0].tolist()]
    d = LINE.denoiser(Cosine())
    close(consistency_function(d, Cosine(), x, 0.9), consistency_function(d, Cosine(), double(middle), 0.5), 1e-8)


def test_consistency_asks_inside(generator):
    """Never at a time above t or below 0; the fewer times, the larger its tolerance, with a larger error."""
    x, errors, counts = normals(4, 1, generator=generator), [], []
    expected = of_gaussian("Cosine", 0.4, 0.6, 1)(x)
    for tolerance in (1e-2, 1e-5, 1e-8):
        asked = []

        def denoiser(x, time, asked=asked):
            asked.append(float(time))
            alpha, sigma = Cosine().alpha(time), Cosine().sigma(time)
            return 0.4 + alpha * 0.36 / (alpha**2 * 0.36 + sigma**2) * (x - alpha * 0.4)

        found = consistency_function(denoiser, Cosine(), x, 1.0, tolerance=tolerance)
        assert max(asked) == 1 and 0 < min(asked) <= 1e-8 and asked[0] == 1
        counts.append(len(asked))
        errors.append((found - expected).abs().max().item())
    assert counts[0] < counts[1] < counts[2] and errors[0] > errors[1] > errors[2]
    assert inspect.signature(consistency_function).parameters["tolerance"].default == 1e-10


def test_consistency_in_float32(generator):
    """The state keeps its type; what is found is that of float64 to five digits."""
    x = normals(4, 1, generator=generator, dtype=torch.float32)
    found = consistency_function(LINE.denoiser(Cosine()), Cosine(), x, 0.8, tolerance=1e-5)
    wide = consistency_function(LINE.denoiser(Cosine()), Cosine(), x.double(), 0.8, tolerance=1e-7)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wide, rtol=0, atol=2e-4)


# What does not fit ----------------------------------------------------------------------------------------------------

X = torch.zeros(3, 2, dtype=torch.float64)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: step_x0(Cosine(), X, X, 0.3, 0.3), ValueError, "^s must be less than t everywhere"),
        (lambda: step_x0(Cosine(), X, X, 0.3, 0.5), ValueError, "^s must be less than t everywhere"),
        (lambda: step_x0(Cosine(), X, X, double([0.3, 0.5, 0.9]), 0.4), ValueError, "^s must be less than t"),
        (lambda: step_x0(Cosine(), X, X[:2], 0.5, 0.3), ValueError, r"^xs must have the shape of xt, \(3, 2\)"),
        (lambda: step_x0(Cosine(), X, X.long(), 0.5, 0.3), TypeError, "^xs must be a floating-point tensor"),
        (lambda: step_x0(Cosine(), X.long(), X, 0.5, 0.3), TypeError, "^xt must be a floating-point tensor"),
        (lambda: step_x0(Cosine(), X, X, 1.5, 0.3), ValueError, r"^t must lie in \[0, 1\]"),
        (lambda: step_x0(Cosine(), X, X, 0.5, -0.1), ValueError, r"^s must lie in \[0, 1\]"),
        (lambda: step_x0(Cosine(), X, X, "1", 0.3), TypeError, "^t must be a number or a tensor"),
        (lambda: step_x0(Cosine(), X, X, double([0.5, 0.6]), 0.3), ValueError, r"^t must be a number or have shape \(3,\)"),
        (lambda: progressive_target(smooth, Cosine(), X, 0.3, 0.3, 0.1), ValueError, "^m must lie between s and t"),
        (lambda: progressive_target(smooth, Cosine(), X, 0.3, 0.5, 0.1), ValueError, "^m must lie between s and t"),
        (lambda: progressive_target(smooth, Cosine(), X, 0.5, 0.3, 0.3), ValueError, "^m must lie between s and t"),
        (lambda: progressive_target(smooth, Cosine(), X, 0.5, 0.3, 0.4), ValueError, "^m must lie between s and t"),
        (lambda: progressive_target(lambda x, t: x[:2], Cosine(), X, 0.5, 0.3, 0.1), ValueError, "^x0 must have the shape"),
        (lambda: consistency_target(smooth, smooth, Cosine(), X, 0.5, 0.5), ValueError, "^s must be less than t"),
        (lambda: consistency_target(smooth, lambda x, t: x[:, :1], Cosine(), X, 0.5, 0.1), ValueError, "^x0 must have"),
        (lambda: truncated_snr(Cosine(), 2.0), ValueError, r"^t must lie in \[0, 1\]"),
        (lambda: matching(lambda x, t: x[:, :1], X, 0.5, X), ValueError, r"^x0 must have the shape of xt, \(3, 2\)"),
        (lambda: matching(smooth, X, 0.5, X[:2]), ValueError, "^target must have the shape of xt"),
        (lambda: matching(smooth, X, 0.5, X[:, :1]), ValueError, "^target must have the shape of xt"),
        (lambda: matching(smooth, X, 0.5, X, torch.ones(2)), ValueError, r"^weight must be a number or have shape \(3,\)"),
        (lambda: matching(smooth, X, 0.5, X, torch.ones(1)), ValueError, r"^weight must be .* got shape \(1,\)"),
        (lambda: matching(smooth, X, 0.5, X, torch.ones(3, 1)), ValueError, r"^weight must be .* got shape \(3, 1\)"),
        (lambda: matching(smooth, X, 0.5, X, torch.ones(3, 2)), ValueError, r"^weight must be .* got shape \(3, 2\)"),
        (lambda: consistency_function(smooth, Cosine(), X, 0.0), ValueError, "^t must be a number above 1e-09; got 0.0"),
        (lambda: consistency_function(smooth, Cosine(), X, 1e-9), ValueError, "^t must be a number above"),
        (lambda: consistency_function(smooth, Cosine(), X, -0.5), ValueError, "^t must be a number above"),
        (lambda: consistency_function(smooth, Cosine(), X, math.nan), ValueError, "^t must be a number above"),
        (lambda: consistency_function(smooth, Cosine(), X, "1"), ValueError, "^t must be a number above 1e-09; got '1'"),
        (lambda: consistency_function(smooth, Cosine(), X, double([0.5] * 3)), ValueError, "^t must be a number above"),
        (lambda: consistency_function(smooth, Cosine(), X, 1.5), ValueError, r"^t must lie in \[0, 1\]"),
        (lambda: consistency_function(smooth, Sigmoid(), X, 1.0), ValueError, "do not determine velocity"),
        (lambda: consistency_function(smooth, DiscretePath([0.1] * 4), X, 4), ValueError, "a DiscretePath has no velocity"),
    ],
)  # fmt: skip
def test_arguments_are_checked(call, error, message):
    """What does not fit raises and is named."""
    with pytest.raises(error, match=message):
        call()


def test_all_there_is():
    """Every function of the module is looked at here."""
    assert set(distillation.__all__) <= set(globals())


@pytest.mark.parametrize("h", [1e-2, 1e-4, 1e-6])
def test_short_steps_lose_digits(h, generator):
    """As the docstring warns: about as many as the step is shorter than 1; the guess is right to the others."""
    xt, guess = normals(2, 50, 1, generator=generator)
    for name in ("Cosine", "Straight"):
        found = step_x0(path_of(name), xt, typed_ddim(name, xt, guess, 0.5, 0.5 - h), 0.5, 0.5 - h)
        assert (found - guess).abs().max() < 1e-14 / h
