"""The stochastic sampler of students: DDIM down and the forward kernel up, typed; its moments by linear algebra."""

import functools
import itertools
import math

import numpy as np
import oracles
import pytest
import torch
from oracles import CONTINUOUS, PATHS, forward_kernel, path_of, time_on

from dgm_course.paths import VP, Cosine, DiscretePath, Straight
from dgm_course.samplers import ddim, ddim_step, last, overshoot, overshoot_step

known = functools.cache(oracles.known)
all_paths = pytest.mark.parametrize("name", PATHS)
STEPS = [(1.0, 0.5, 0.75), (1.0, 0.0, 0.8), (0.8, 0.3, 0.55), (0.55, 0.0, 0.5), (0.9, 0.85, 0.85), (0.3, 0.0, 0.0)]
MENG = [1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 0.0], [6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0.0]
UNEVEN = [1.0, 0.8, 0.5, 0.45, 0.1, 0.0], [0.6, 0.5, 0.0, 0.1, 0.0]
GRIDS = {
    "every eighth": MENG,
    "consistency": (MENG[0], [0.0] * 7),
    "uneven": UNEVEN,
    "above the data": (UNEVEN[0][:4], UNEVEN[1][:3]),
}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def normals(*shape, generator, dtype=torch.float64):
    return torch.randn(*shape, generator=generator, dtype=dtype)


def close(actual, expected, tolerance=1e-10):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    size = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tolerance * size)


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def smooth(xt, t):
    return torch.tanh(xt * 0.7 + 0.3) * (1 - 0.2 * float(t) / 20)


def on(name, units):
    return [time_on(name, unit) for unit in units]


def typed_ddim(name, xt, x0, t, s):
    (alpha_s, sigma_s), (alpha_t, sigma_t) = known(name, s), known(name, t)
    return alpha_s * x0 + sigma_s * (xt - alpha_t * x0) / sigma_t


def kernel(name, low, s):
    """a and v of q(x_s | x_low), from the closed forms; nothing happens between equal times."""
    return forward_kernel(name, low, s) if low < s else (1.0, 0.0)


def typed_step(name, xt, x0, t, low, s, noise):
    """A DDIM step down to low, then noise by the forward kernel up to s."""
    a, v = kernel(name, low, s)
    return a * typed_ddim(name, xt, x0, t, low) + math.sqrt(max(v, 0.0)) * noise


# A step ---------------------------------------------------------------------------------------------------------------


@all_paths
@pytest.mark.parametrize("units", STEPS)
def test_step(name, units, generator):
    """Down by DDIM, up by the forward process, both typed; t = 1 without signal and s = 0 among them."""
    t, low, s = on(name, units)
    xt, x0, noise = (normals(3, 2, generator=generator) for _ in "abc")
    found = overshoot_step(path_of(name), xt, x0, t, low, s, noise)
    close(found, typed_step(name, xt, x0, t, low, s, noise))


@all_paths
@pytest.mark.parametrize("units", STEPS)
def test_step_is_made_of_two_kernels(name, units, generator):
    """With noise 0 it is `ddim_step` to low times the kernel's factor; noise adds the root of `path.transition`'s variance."""
    t, low, s = on(name, units)
    path, (xt, x0, noise) = path_of(name), (normals(3, 2, generator=generator) for _ in "abc")
    a, v = path.transition(low, s) if low < s else (double(1.0), double(0.0))
    mean = a * ddim_step(path, xt, x0, t, low)
    close(overshoot_step(path, xt, x0, t, low, s, 0 * noise), mean)
    close(overshoot_step(path, xt, x0, t, low, s, noise), mean + v.sqrt() * noise)
    close(
        overshoot_step(path, xt, x0, t, low, s, noise) - overshoot_step(path, xt, x0, t, low, s, -noise),
        2 * v.sqrt() * noise,
    )


@all_paths
@pytest.mark.parametrize("units", STEPS)
def test_step_keeps_the_marginal(name, units):
    """With x_0 known and x_t ~ q(x_t | x_0), x_s has mean α_s·x_0 and variance σ_s², however far the jump goes."""
    t, low, s = on(name, units)
    one, zero = double([1.0]), double([0.0])
    keep, pull, std = (
        overshoot_step(path_of(name), *tensors[:2], t, low, s, tensors[2]).item()
        for tensors in ((one, zero, zero), (zero, one, zero), (zero, zero, one))
    )
    (alpha_s, sigma_s), (alpha_t, sigma_t) = known(name, s), known(name, t)
    assert keep * alpha_t + pull == pytest.approx(alpha_s, rel=1e-10)
    assert keep**2 * sigma_t**2 + std**2 == pytest.approx(sigma_s**2, rel=1e-9, abs=1e-13)


@all_paths
def test_without_a_way_up_it_is_ddim(name, generator):
    """With low = s: the very numbers of `ddim_step`, and no noise is needed nor used."""
    xt, x0, noise = (normals(3, 2, generator=generator) for _ in "abc")
    for t, s in ((1.0, 0.5), (0.8, 0.3), (0.3, 0.0)):
        t, s = on(name, (t, s))
        expected = ddim_step(path_of(name), xt, x0, t, s)
        assert torch.equal(overshoot_step(path_of(name), xt, x0, t, s, s), expected)
        assert torch.equal(overshoot_step(path_of(name), xt, x0, t, s, s, noise), expected)
        close(expected, typed_ddim(name, xt, x0, t, s))


@pytest.mark.parametrize("name", CONTINUOUS)
def test_a_rounding_above_the_next_time_is_forgiven(name, generator):
    """0.1 + 0.2 is a little more than 0.3; as the end of a jump it is taken for the same, and nothing becomes nan."""
    xt, x0, noise = (normals(3, 2, generator=generator) for _ in "abc")
    for low, s in ((0.1 + 0.2, 0.3), (1 - 0.9, 0.1), (0.8 - 0.1, 0.7)):
        assert abs(low - s) < 1e-15
        found = overshoot_step(path_of(name), xt, x0, 0.8, low, s, noise)
        close(found, typed_ddim(name, xt, x0, 0.8, s), 1e-6)
    states = overshoot(smooth, path_of(name), xt, [0.8, 0.3, 0.0], low=[0.1 + 0.2, 0.0], generator=seeded(0))
    close(next(states), typed_ddim(name, xt, smooth(xt, 0.8), 0.8, 0.3), 1e-6)


@all_paths
def test_from_the_data_nothing_is_left_of_the_state(name, generator):
    """With low = 0: x_s = α_s·x̂_0 + σ_s·z for a path whose data are not scaled, whatever x_t was."""
    xt, x0, noise = (normals(3, 2, generator=generator) for _ in "abc")
    t, s = on(name, (0.8, 0.5))
    found = overshoot_step(path_of(name), xt, x0, t, 0, s, noise)
    assert torch.equal(found, overshoot_step(path_of(name), 100 - 7 * xt, x0, t, 0, s, noise))
    alpha, sigma = known(name, s)
    close(
        found, alpha * x0 + sigma * noise
    )  # on `Scaled` too: α_s is 0.5·cos, and α_0 = 0.5 takes x̂_0 to 0.5·x̂_0 and up


@all_paths
def test_a_time_for_each_sample(name, generator):
    """With (B,) times each sample gets what it gets alone."""
    rows = [on(name, units) for units in STEPS]
    xt, x0, noise = (normals(6, 2, 1, generator=generator) for _ in "abc")
    t, low, s = (double(column) for column in zip(*rows, strict=True))
    found = overshoot_step(path_of(name), xt, x0, t, low, s, noise)
    for i, (time, down, end) in enumerate(rows):
        close(found[i], typed_step(name, xt[i], x0[i], time, down, end, noise[i]))


@pytest.mark.parametrize("shape", [(1,), (2, 0), (2, 1, 3, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes_and_types(shape, dtype, generator):
    """The step and every state have the shape and type of x."""
    x = normals(*shape, generator=generator, dtype=dtype)
    found = overshoot_step(Cosine(), x, x, 0.8, 0.1, 0.5, x)
    assert found.shape == shape and found.dtype == dtype
    times, low = UNEVEN
    states = list(overshoot(smooth, Cosine(), x, times, low=low, generator=seeded(0)))
    assert len(states) == 5 and all(state.shape == shape and state.dtype == dtype for state in states)


# The sampler ----------------------------------------------------------------------------------------------------------


@all_paths
@pytest.mark.parametrize("grid", GRIDS)
def test_sampler_is_its_step_repeated(name, grid, generator):
    """Every state is that of the typed steps, with noise drawn in the same order, and none where nothing leads up."""
    times, low = (on(name, units) for units in GRIDS[grid])
    assert len(set(times)) == len(times) and all(down <= s for down, s in zip(low, times[1:], strict=True))
    x, g = 2 * normals(3, 2, generator=generator), seeded(5)
    states = list(overshoot(smooth, path_of(name), x, times, low=low, generator=seeded(5)))
    assert len(states) == len(low)
    for state, t, s, down in zip(states, times, times[1:], low, strict=False):
        noise = normals(3, 2, generator=g) if down < s else torch.zeros(3, 2, dtype=torch.float64)
        x = typed_step(name, x, smooth(x, t), t, down, s, noise)
        close(state, x)


@all_paths
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_low_it_is_ddim(name, dtype, generator):
    """The very states of `ddim`, if low is not given or is the next time; nothing is drawn then."""
    times, x = on(name, UNEVEN[0]), 2 * normals(3, 2, generator=generator, dtype=dtype)
    expected = list(ddim(smooth, path_of(name), x, times))
    g, before = seeded(3), seeded(3).get_state()
    for low in (None, times[1:], torch.tensor(times[1:], dtype=torch.float64)):
        states = list(overshoot(smooth, path_of(name), x, times, low=low, generator=g))
        assert all(torch.equal(one, other) for one, other in zip(states, expected, strict=True))
    assert torch.equal(g.get_state(), before)


def affine(sample, steps, rows=40):
    """A sampler of one value with a linear denoiser: its states as b + a·x + Σ c_k·z_k, solved from what it drew; (steps, 2 + steps)."""
    x, draws = normals(rows, 1, generator=seeded(1)), seeded(2)
    states = torch.stack([state[:, 0] for state in sample(x, seeded(2))], 1)
    z = torch.cat([normals(rows, 1, generator=draws) for _ in range(steps)], 1)
    design = torch.cat([torch.ones(rows, 1, dtype=torch.float64), x, z], 1)
    solved = torch.linalg.lstsq(design, states).solution
    close(design @ solved, states, 1e-9)  # it is affine indeed
    return solved.T


@pytest.mark.parametrize("name", ["Cosine", "VP", "Straight", "SubVP", "Sigmoid", "VE narrow"])
@pytest.mark.parametrize("grid", GRIDS)
def test_moments_with_an_exact_student(name, grid):
    """Data N(m, c): a student that knows its jumps exactly is at each time in N(αm, α²c + σ²), whatever low is."""
    (times, low), mean, var = GRIDS[grid], 0.6, 0.3

    def law(t):
        alpha, sigma = known(name, t)
        return alpha * mean, alpha**2 * var + sigma**2

    def student(x, t):
        down = low[times.index(t)]
        (m_t, v_t), (m_l, v_l) = law(t), law(down)
        end, (a_t, s_t), (a_l, s_l) = m_l + math.sqrt(v_l / v_t) * (x - m_t), known(name, t), known(name, down)
        return (s_t * end - s_l * x) / (s_t * a_l - s_l * a_t)  # the DDIM step to `end`, solved for its guess

    rows = affine(lambda x, g: overshoot(student, path_of(name), x, times, low=low, generator=g), len(low))
    start_mean, start_var = law(times[0])
    for row, s in zip(rows, times[1:], strict=True):
        b, a, c = row[0], row[1], row[2:]
        expected = law(s)
        assert (b + a * start_mean).item() == pytest.approx(expected[0], abs=1e-9)
        assert (a**2 * start_var + c.square().sum()).item() == pytest.approx(expected[1], abs=1e-9)


@pytest.mark.parametrize("name", ["Cosine", "VP", "Straight"])
@pytest.mark.parametrize("grid", GRIDS)
def test_moments_with_an_exact_denoiser(name, grid):
    """With E[x_0 | x_t] instead, the moments are those of the composed lines; they miss the data's, as few steps do."""
    (times, low), mean, var = GRIDS[grid], 0.6, 0.3

    def gain(t):
        alpha, sigma = known(name, t)
        return alpha * var / (alpha**2 * var + sigma**2)

    def denoiser(x, t):
        return mean + gain(t) * (x - known(name, t)[0] * mean)

    rows = affine(lambda x, g: overshoot(denoiser, path_of(name), x, times, low=low, generator=g), len(low))
    spread = 1.7  # of x − αm at the start
    for row, t, s, down in zip(rows, times, times[1:], low, strict=False):
        (a_t, s_t), (a_l, s_l) = known(name, t), known(name, down)
        up, added = kernel(name, down, s)
        spread = (up * (a_l * gain(t) + s_l / s_t * (1 - a_t * gain(t)))) ** 2 * spread + max(added, 0.0)
        b, a, c = row[0], row[1], row[2:]
        assert (a**2 * 1.7 + c.square().sum()).item() == pytest.approx(spread, rel=1e-9, abs=1e-11)
        assert (b + a * known(name, times[0])[0] * mean).item() == pytest.approx(known(name, s)[0] * mean, abs=1e-9)
    if grid in ("consistency", "every eighth"):
        assert spread < 0.9 * var


def test_consistency_sampling_starts_anew(generator):
    """With low = 0 two starts whose first guesses agree have one future; with DDIM they part."""
    x, y = normals(2, 4, 2, generator=generator)

    def student(xt, t):
        return torch.full_like(xt, 0.3) if t == 1 else smooth(xt, t)

    for low, same in (([0.0] * 5, True), (None, False)):
        one, other = (list(overshoot(student, Cosine(), z, UNEVEN[0], low=low, generator=seeded(1))) for z in (x, y))
        assert all(torch.equal(a, b) == same for a, b in zip(one, other, strict=True))


# Chance, evaluations, gradients ---------------------------------------------------------------------------------------


def test_random_numbers(generator):
    """All from the generator: one seed one run, another seed another; without a generator the global state is used."""
    x, world = normals(4, 2, generator=generator), torch.random.get_rng_state()

    def run(g):
        return last(overshoot(smooth, Cosine(), x, UNEVEN[0], low=UNEVEN[1], generator=g))

    assert torch.equal(run(seeded(1)), run(seeded(1))) and not torch.equal(run(seeded(1)), run(seeded(2)))
    assert torch.equal(torch.random.get_rng_state(), world)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        one = run(None)
        assert not torch.equal(torch.random.get_rng_state(), world)
        torch.manual_seed(1)
        assert torch.equal(run(None), one)


def test_noise_is_normal():
    """Of 20,000 values, mean, deviation and kurtosis of what one step adds."""
    x = torch.zeros(20_000, 1, dtype=torch.float64)
    first = next(overshoot(lambda xt, t: 0 * xt, Cosine(), x, [1.0, 0.5, 0.0], low=[0.0, 0.0], generator=seeded(1)))
    z = first / math.sin(math.pi / 4)
    assert abs(z.mean()) < 0.03 and abs(z.std() - 1) < 0.03 and abs((z**4).mean() - 3) < 0.3


@pytest.mark.parametrize("low", [None, MENG[1], [0.0] * 7])
def test_evaluations(low, generator):
    """One for each step, at the times of the grid, as Python floats, of the state as it is; no gradient is kept."""
    asked, x = [], normals(3, 2, generator=generator)
    before = x.clone()

    def denoiser(xt, t):
        asked.append((t, xt.clone()))
        assert not torch.is_grad_enabled()
        return smooth(xt, t)

    states = list(overshoot(denoiser, Cosine(), x, MENG[0], low=low, generator=seeded(0)))
    assert [t for t, _ in asked] == MENG[0][:-1] and all(type(t) is float for t, _ in asked)
    assert torch.equal(x, before) and torch.equal(asked[0][1], x)
    assert all(torch.equal(seen, state) for (_, seen), state in zip(asked[1:], states, strict=False))
    assert not any(state.requires_grad for state in states) and torch.is_grad_enabled()


def test_the_end_is_the_last_guess(generator):
    """At t = 0 there is nothing but x̂_0, whatever came before: no noise is added at the end."""
    x, seen = normals(3, 2, generator=generator), []

    def denoiser(xt, t):
        seen.append(smooth(xt, t))
        return seen[-1]

    for times, low in (MENG, (MENG[0], [0.0] * 7), UNEVEN):
        close(last(overshoot(denoiser, Cosine(), x, times, low=low, generator=seeded(0))), seen[-1])


def test_low_in_any_form(generator):
    """A list, a tuple, a tensor of either type; on a chain whole numbers."""
    x = normals(3, 2, generator=generator)
    forms = [UNEVEN[1], tuple(UNEVEN[1]), double(UNEVEN[1])]
    ends = [last(overshoot(smooth, Cosine(), x, UNEVEN[0], low=low, generator=seeded(1))) for low in forms]
    assert all(torch.equal(end, ends[0]) for end in ends)
    path = DiscretePath([0.05] * 8)
    chain = [last(overshoot(smooth, path, x, path.times(4), low=low, generator=seeded(1)))
             for low in ([4, 2, 0, 0], torch.tensor([4, 2, 0, 0]), [4.0, 2.0, 0.0, 0.0])]  # fmt: skip
    assert all(torch.equal(end, chain[0]) for end in chain)


@all_paths
def test_float32_follows_float64(name, generator):
    """With the same noise, which has to be handed to steps: every state to rounding."""
    times, low = (on(name, units) for units in UNEVEN)
    wide = known(name, times[0])[1] * normals(4, 1, 3, 3, generator=generator)
    narrow = wide.float()
    for t, s, down in zip(times, times[1:], low, strict=False):
        noise = normals(4, 1, 3, 3, generator=generator)
        wide = overshoot_step(path_of(name), wide, smooth(wide, t), t, down, s, noise)
        narrow = overshoot_step(path_of(name), narrow, smooth(narrow, t), t, down, s, noise.float())
        torch.testing.assert_close(narrow.double(), wide, rtol=1e-5, atol=1e-5)


def test_samples_do_not_meet(generator):
    """What a sample becomes does not depend on its neighbours, but for the noise that it is dealt."""
    x, y = normals(2, 4, 2, generator=generator)
    y[2] = x[2]
    one, other = (last(overshoot(smooth, VP(), z, UNEVEN[0], low=UNEVEN[1], generator=seeded(3))) for z in (x, y))
    assert torch.equal(one[2], other[2]) and not torch.equal(one[1], other[1])


# What does not fit ----------------------------------------------------------------------------------------------------

X = torch.zeros(3, 2, dtype=torch.float64)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: overshoot_step(Cosine(), X, X, 0.8, 0.3, 0.5), ValueError, "^noise must be given where low < s; got None"),
        (lambda: overshoot_step(Cosine(), X, X, 0.8, double([0.5, 0.5, 0.4]), 0.5), ValueError, "^noise must be given"),
        (lambda: overshoot_step(Cosine(), X, X, 0.8, 0.6, 0.5, X), ValueError, "^low must not be above s; got low = 0.6"),
        (lambda: overshoot_step(Cosine(), X, X, 0.8, double([0.5, 0.5, 0.6]), 0.5, X), ValueError, "^low must not be above s"),
        (lambda: overshoot_step(Cosine(), X, X, 0.5, 0.1, 0.5, X), ValueError, "^s must be less than t everywhere"),
        (lambda: overshoot_step(Cosine(), X, X, 0.5, 0.1, 0.6, X), ValueError, "^s must be less than t everywhere"),
        (lambda: overshoot_step(Cosine(), X, X, 0.5, -0.1, 0.3, X), ValueError, r"must lie in \[0, 1\]; got \[-0.1\]"),
        (lambda: overshoot_step(Cosine(), X, X, 1.5, 0.1, 0.3, X), ValueError, r"^t must lie in \[0, 1\]"),
        (lambda: overshoot_step(Cosine(), X, X[:2], 0.5, 0.1, 0.3, X), ValueError, "^x0 must have the shape of xt"),
        (lambda: overshoot_step(Cosine(), X, X, 0.5, 0.1, 0.3, X[:, :1]), ValueError, "^noise must have the shape of xt"),
        (lambda: overshoot_step(Cosine(), X, X, 0.5, 0.1, 0.3, X.long()), TypeError, "^noise must be a floating-point"),
        (lambda: overshoot_step(Cosine(), X.long(), X, 0.5, 0.1, 0.3, X), TypeError, "^xt must be a floating-point"),
        (lambda: overshoot_step(Cosine(), X, X, double([0.5, 0.6]), 0.1, 0.3, X), ValueError, "^t must be a number or have"),
        (lambda: overshoot(smooth, Cosine(), X, [1.0, 0.5, 0.0], low=[0.0]), ValueError, r"^low must have shape \(2,\)"),
        (lambda: overshoot(smooth, Cosine(), X, [1.0, 0.5, 0.0], low=0.0), ValueError, r"^low must have shape \(2,\)"),
        (lambda: overshoot(smooth, Cosine(), X, [1.0, 0.5, 0.0], low=[0.5, 0.0, 0.0]), ValueError, "^low must have shape"),
        (lambda: overshoot(smooth, Cosine(), X, [1.0, 0.5, 0.0], low=[0.6, 0.0]), ValueError, "^low must not be above s"),
        (lambda: overshoot(smooth, Cosine(), X, [1.0, 0.5, 0.0], low=[0.5, 0.1]), ValueError, "^low must not be above s"),
        (lambda: overshoot(smooth, Cosine(), X, [1.0, 0.5, 0.0], low=[-0.5, 0.0]), ValueError, r"must lie in \[0, 1\]"),
        (lambda: overshoot(smooth, Cosine(), X, [1.0, 0.5, 0.5], low=[0.5, 0.1]), ValueError, "^times must be strictly desc"),
        (lambda: overshoot(smooth, Cosine(), X, [0.0, 1.0], low=[0.0]), ValueError, "^times must be strictly descending"),
        (lambda: overshoot(smooth, Cosine(), X, [1.0], low=[]), ValueError, "^times must be strictly descending"),
        (lambda: overshoot(smooth, Cosine(), X, [2.0, 0.0]), ValueError, r"^times must lie in \[0, 1\]"),
        (lambda: overshoot(smooth, DiscretePath([0.1] * 4), X, [4, 2, 0], low=[1.5, 0]), ValueError, "must be a whole number"),
        (lambda: overshoot(smooth, Cosine(), X.long(), [1.0, 0.0]), TypeError, "^x must be a floating-point tensor"),
        (lambda: overshoot(smooth, None, X, [1.0, 0.0]), TypeError, "^path must be a GaussianPath"),
    ],
)  # fmt: skip
def test_arguments_are_checked_at_the_call(call, error, message):
    """Before the first step, and named."""
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_state_that_is_not_finite(bad):
    """The step is named where it appears."""

    def denoiser(xt, t):
        return torch.full_like(xt, bad) if t == 0.5 else xt

    states = overshoot(denoiser, Straight(), X, [1.0, 0.5, 0.25, 0.0], low=[0.0, 0.0, 0.0], generator=seeded(0))
    next(states)
    with pytest.raises(FloatingPointError, match="^the state is not finite after step 2 of 3, from t = 0.5 to 0.25"):
        next(states)


def test_grids_have_an_oracle():
    """Each grid goes down, and no jump of it ends above the next time."""
    for times, low in GRIDS.values():
        assert all(t > s for t, s in itertools.pairwise(times))
        assert all(down <= s for down, s in zip(low, times[1:], strict=True))
    assert np.allclose(np.array(MENG[0][:-1]) - 0.25, MENG[1])
