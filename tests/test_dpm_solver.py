"""DPM-Solver++ of second order: what one step does exactly, which an order test cannot see. Runs and orders: test_samplers.py."""

import math

import pytest
import torch
from oracles import PATHS, known, path_of, time_of_lambda, time_on

from dgm_course.paths import Cosine, DiscretePath, Straight
from dgm_course.samplers import (
    ddim_step,
    dpm_solver_pp_2m,
    dpm_solver_pp_2m_step,
    dpm_solver_pp_2s,
    dpm_solver_pp_2s_step,
    last,
)
from dgm_course.schedules import cosine_betas

all_paths = pytest.mark.parametrize("name", PATHS)


def normals(*shape, generator):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def close(actual, expected, tolerance=1e-10):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


def half_logsnr(name, t):
    """DPM-Solver's λ = log(α/σ), from the closed form."""
    alpha, sigma = known(name, t)
    return math.log(alpha / sigma)


def exact_step(name, xt, x0, t, s):
    """The ODE's own step from t to s if x̂_0 does not change on the way: x_s = α_s·x̂_0 + σ_s·ε̂."""
    (alpha_s, sigma_s), (alpha_t, sigma_t) = known(name, s), known(name, t)
    return alpha_s * x0 + sigma_s * (xt - alpha_t * x0) / sigma_t


def affine(name, like, slope=1.7):
    """A denoiser that is a line in λ, whatever the state."""
    return lambda xt, t: (0.3 + slope * half_logsnr(name, t)) * torch.ones_like(like)


# One step -------------------------------------------------------------------------------------------------------------


@all_paths
def test_first_order_in_three_forms(name, generator):
    """Without a memory the step is DDIM, for which the paper has an x_0-form and an ε-form; and DDIM's own formula is the third."""
    path, t, s = path_of(name), time_on(name, 0.8), time_on(name, 0.3)
    xt, x0 = normals(3, 2, generator=generator), normals(3, 2, generator=generator)
    (alpha_s, sigma_s), (alpha_t, sigma_t) = known(name, s), known(name, t)
    h, eps = half_logsnr(name, s) - half_logsnr(name, t), (xt - alpha_t * x0) / sigma_t
    of_x0 = sigma_s / sigma_t * xt - alpha_s * math.expm1(-h) * x0
    of_eps = alpha_s / alpha_t * xt - sigma_s * math.expm1(h) * eps
    for expected in (of_x0, of_eps, exact_step(name, xt, x0, t, s)):
        close(dpm_solver_pp_2m_step(path, xt, x0, t, s), expected, 1e-9)
        close(ddim_step(path, xt, x0, t, s), expected, 1e-9)
        close(dpm_solver_pp_2s_step(lambda x, u: x0, path, xt, t, s), expected, 1e-9)


@all_paths
@pytest.mark.parametrize("units", [(0.95, 0.8, 0.3), (0.95, 0.35, 0.3), (0.5, 0.45, 0.05)])
def test_2m_uses_the_middle(name, units, generator):
    """If x̂_0 is a line in λ, 2M steps with its value in the middle of the step, also after a much longer or shorter one."""
    t_before, t, s = (time_on(name, unit) for unit in units)
    xt = normals(3, 2, generator=generator)
    d, middle = affine(name, xt), (half_logsnr(name, t) + half_logsnr(name, s)) / 2
    expected = exact_step(name, xt, (0.3 + 1.7 * middle) * torch.ones_like(xt), t, s)
    step = dpm_solver_pp_2m_step(path_of(name), xt, d(xt, t), t, s, d(xt, t_before), t_before)
    close(step, expected, 1e-9)
    states = list(dpm_solver_pp_2m(d, path_of(name), xt, [t_before, t, s]))
    close(states[1], exact_step(name, states[0], (0.3 + 1.7 * middle) * torch.ones_like(xt), t, s), 1e-9)


@all_paths
@pytest.mark.parametrize("units", [(0.95, 0.3), (0.8, 0.7), (0.5, 0.05)])
def test_2s_uses_the_middle(name, units, generator):
    """If x̂_0 is a line in λ, 2S steps with its value in the middle of the step; on a chain too, where it looks beside the middle."""
    t, s = (time_on(name, unit) for unit in units)
    xt = normals(3, 2, generator=generator)
    d, middle = affine(name, xt), (half_logsnr(name, t) + half_logsnr(name, s)) / 2
    expected = exact_step(name, xt, (0.3 + 1.7 * middle) * torch.ones_like(xt), t, s)
    close(dpm_solver_pp_2s_step(d, path_of(name), xt, t, s), expected, 1e-9)
    close(last(dpm_solver_pp_2s(d, path_of(name), xt, [t, s])), expected, 1e-9)


@pytest.mark.parametrize("t, s", [(20, 1), (19, 6), (16, 14), (9, 2), (5, 3), (3, 1), (20, 18)])
def test_2s_on_a_chain(t, s, generator):
    """It looks at the whole time between that lies nearest to the middle in λ, r away from ½ as it may be, at a state that
    DDIM leads to; and mixes both guesses so that a line in λ is met."""
    lam, seen, xt = [half_logsnr("chain", u) for u in range(1, 21)], [], normals(3, 2, generator=generator)
    off = {u: abs(lam[u - 1] - (lam[t - 1] + lam[s - 1]) / 2) for u in range(s + 1, t)}
    u = min(off, key=off.get)

    def denoiser(x, time):
        seen.append((x.clone(), time))
        return torch.sin(2 * x + time)

    step = dpm_solver_pp_2s_step(denoiser, path_of("chain"), xt, t, s)
    assert [time for _, time in seen] == [t, u] and all(isinstance(time, float) for _, time in seen)
    first = torch.sin(2 * xt + t)
    ahead = exact_step("chain", xt, first, t, u)
    close(seen[1][0], ahead)
    r = (lam[u - 1] - lam[t - 1]) / (lam[s - 1] - lam[t - 1])
    assert abs(r - 0.5) > 1e-4
    close(step, exact_step("chain", xt, (1 - 0.5 / r) * first + 0.5 / r * torch.sin(2 * ahead + u), t, s))


@pytest.mark.parametrize("t", [2, 10, 20])
def test_2s_has_nothing_between_neighbours(t, generator):
    """On a chain with s = t − 1 there is no time between: one evaluation, DDIM's step."""
    xt, seen = normals(3, 2, generator=generator), []

    def denoiser(x, time):
        seen.append(time)
        return torch.sin(2 * x + time)

    close(
        dpm_solver_pp_2s_step(denoiser, path_of("chain"), xt, t, t - 1),
        exact_step("chain", xt, denoiser(xt, t), t, t - 1),
    )
    assert seen == [t, t]
    seen.clear()
    states = [xt, *dpm_solver_pp_2s(denoiser, path_of("chain"), xt, [t, t - 1, 0])]
    assert seen == [t, t - 1]
    close(states[1], exact_step("chain", xt, torch.sin(2 * xt + t), t, t - 1))
    close(states[2], torch.sin(2 * states[1] + t - 1))


def test_2s_walks_the_whole_chain(generator):
    """Over every time of a chain it is DDIM; over every second one it asks at all times but 0, in order, as s = 0 is first order."""
    seen, xt = [], normals(2, 2, generator=generator)

    def denoiser(x, time):
        seen.append(time)
        return 0.5 * x

    last(dpm_solver_pp_2s(denoiser, path_of("chain"), xt, list(range(20, -1, -1))))
    assert seen == list(range(20, 0, -1))
    seen.clear()
    last(dpm_solver_pp_2s(denoiser, path_of("chain"), xt, list(range(20, -1, -2))))
    assert seen == list(range(20, 2, -1)) + [2]


@pytest.mark.parametrize("name", ["VP", "Cosine", "Straight"])
def test_2s_looks_at_the_middle(name, generator):
    """On a path the second evaluation has r = ½: at the time solved by hand, at DDIM's state there, and D is that guess alone."""
    lam, seen, xt = torch.tensor([-1.0, 0.1, 1.2], dtype=torch.float64), [], normals(3, 2, generator=generator)
    t, u, s = time_of_lambda(name, lam).tolist()

    def denoiser(x, time):
        seen.append((x.clone(), time))
        return torch.sin(2 * x + time)

    step = dpm_solver_pp_2s_step(denoiser, path_of(name), xt, t, s)
    assert [time for _, time in seen] == pytest.approx([t, u], abs=1e-12)
    ahead = exact_step(name, xt, torch.sin(2 * xt + t), t, u)
    close(seen[1][0], ahead)
    close(step, exact_step(name, xt, torch.sin(2 * ahead + u), t, s))


# The ends -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [Cosine(), Straight(), DiscretePath(cosine_betas(20, clip=1.0))], ids=repr)
@pytest.mark.parametrize("sampler", [dpm_solver_pp_2s, dpm_solver_pp_2m])
def test_start_without_signal(path, sampler, generator):
    """Where α = 0, λ is −∞ and the step is DDIM's: all of x_t is noise. 2M has nothing to extrapolate from after it either."""
    calls, noise, guess = [], normals(3, 2, generator=generator), normals(3, 2, generator=generator)

    def denoiser(x, t):
        calls.append(t)
        return guess if len(calls) == 1 else guess + len(calls)

    end, s, after = (20, 12, 5) if path.horizon == 20 else (1.0, 0.6, 0.3)
    states = list(sampler(denoiser, path, noise, [end, s, after]))
    alpha, sigma = (value.item() for value in (path.alpha(s), path.sigma(s)))
    close(states[0], alpha * guess + sigma * noise, 1e-9)
    assert calls[:2] == [end, s]
    if sampler is dpm_solver_pp_2m:
        alpha_after, sigma_after = path.alpha(after).item(), path.sigma(after).item()
        close(states[1], alpha_after * (guess + 2) + sigma_after / sigma * (states[0] - alpha * (guess + 2)), 1e-9)


@all_paths
def test_end_at_the_data(name, generator):
    """Where σ_s = 0 one evaluation is made, and the state is x̂_0 times α(0)."""
    calls, xt, t = [], normals(3, 2, generator=generator), time_on(name, 0.3)
    step = dpm_solver_pp_2s_step(lambda x, u: calls.append(u) or torch.sin(2 * x), path_of(name), xt, t, 0)
    close(step, known(name, 0)[0] * torch.sin(2 * xt), 1e-12)
    assert calls == [t]
    whole = dpm_solver_pp_2s_step(lambda x, u: torch.sin(2 * x), path_of(name), xt, time_on(name, 1.0), 0)
    close(whole, known(name, 0)[0] * torch.sin(2 * xt), 1e-12)


def test_2s_takes_times_as_they_come(generator):
    """A step takes numbers of any kind; the state keeps its type and is not written on."""
    x, start = torch.ones(2, 1, 2, 2), torch.ones(2, 1, 2, 2)
    for t, s in ((0.8, 0.2), (torch.tensor(0.8, dtype=torch.float64), torch.tensor(0.2, dtype=torch.float64))):
        out = dpm_solver_pp_2s_step(lambda x, u: x.tanh(), Cosine(), x, t, s)
        assert out.dtype == torch.float32 and out.shape == x.shape and torch.equal(x, start)
    chain = path_of("chain")
    wide = normals(2, 2, generator=generator)
    for t, s in ((10, 5), (10.0, 5.0), (torch.tensor(10), torch.tensor(5))):
        assert torch.equal(dpm_solver_pp_2s_step(lambda x, u: x.tanh(), chain, wide, t, s),
                           last(dpm_solver_pp_2s(lambda x, u: x.tanh(), chain, wide, [10, 5])))  # fmt: skip
