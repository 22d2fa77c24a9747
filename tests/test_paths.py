"""Paths against closed forms in 40 digits, Bayes on a grid, matrix algebra, differential equations and autograd."""

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
from oracles import (
    CHAIN_BETAS,
    CONTINUOUS,
    PATHS,
    bayes_on_a_grid,
    forward_kernel,
    known,
    known_rates,
    lookup,
    mp,
    path_of,
    time_on,
)

from dgm_course.paths import VE, VP, Cosine, DiscretePath, Scaled, Sigmoid, Straight, SubVP
from dgm_course.samplers import ddim, heun, last
from dgm_course.schedules import linear_betas
from dgm_course.toy import GaussianMixture

INSIDE = [0.05, 0.3, 0.5, 0.85, 0.95]
STEPS = [(0.05, 0.1), (0.25, 0.3), (0.1, 0.9), (0.5, 0.75), (0.9, 0.95), (0.6, 1.0)]  # (s, t) as parts of the way
QUANTITIES = ["eps", "x0", "v", "score", "velocity"]
all_paths = pytest.mark.parametrize("name", PATHS)
continuous_paths = pytest.mark.parametrize("name", CONTINUOUS)
TO_NOISE = [Cosine(), Cosine(-2.0), Cosine(3.0), Scaled(Cosine(), 0.5), Sigmoid(), Straight()]
ENDS_IN_NOISE = [*TO_NOISE, DiscretePath([0.1, 1.0])]  # α(end) = 0


def close(actual, expected, tolerance=1e-10):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(torch.as_tensor(actual).double(), expected, rtol=tolerance, atol=tolerance)


def times_of(values):
    """Times as float64, a number or (B,)."""
    return torch.tensor(values, dtype=torch.float64)


def normals(*shape, generator):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# α and σ --------------------------------------------------------------------------------------------------------------


@all_paths
@pytest.mark.parametrize("unit", [0.0, *INSIDE, 1.0])
def test_alpha_and_sigma(name, unit):
    """α(t), σ(t) and logsnr(t) against closed forms; a Python number gives a 0-d float64 tensor."""
    path, t = path_of(name), time_on(name, unit)
    alpha, sigma = known(name, t)
    assert path.alpha(t).item() == pytest.approx(alpha, rel=1e-12, abs=1e-15)
    assert path.sigma(t).item() == pytest.approx(sigma, rel=1e-12, abs=1e-15)
    assert path.alpha(t).dtype == path.sigma(t).dtype == path.logsnr(t).dtype == torch.float64
    assert path.alpha(t).shape == path.sigma(t).shape == path.logsnr(t).shape == ()
    if alpha > 1e-8 and sigma > 0:
        assert path.logsnr(t).item() == pytest.approx(
            float(2 * mp.log(alpha) - 2 * mp.log(sigma)), rel=1e-10, abs=1e-12
        )


@all_paths
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_alpha_and_sigma_of_a_batch(name, dtype):
    """A tensor (B,) of times gives float64 (B,), entry by entry as the numbers do, whatever its dtype."""
    path = path_of(name)
    units = [0.0, 0.25, 0.5, 1.0] if dtype.is_floating_point else [0.0, 1.0]
    t = torch.tensor([time_on(name, u) for u in units]).to(dtype)
    for function, which in ((path.alpha, 0), (path.sigma, 1)):
        assert function(t).dtype == torch.float64 and function(t).shape == t.shape
        close(function(t), lookup(name, t.tolist(), which), 1e-12)


@pytest.mark.parametrize("name", ["VP", "VP gentle", "Cosine", "Cosine shifted", "Sigmoid", "Sigmoid skew", "chain"])
def test_on_the_circle(name):
    """α² + σ² = 1 at every time of a variance-preserving path."""
    path = path_of(name)
    t = torch.arange(21) if name == "chain" else torch.linspace(0, 1, 401, dtype=torch.float64)
    close(path.alpha(t) ** 2 + path.sigma(t) ** 2, torch.ones(len(t)), 1e-14)


@all_paths
def test_ends(name):
    """At t = 0 the data are untouched: α = 1, or the scale, and σ = 0 exactly, and the log-SNR is +inf."""
    path = path_of(name)
    assert path.alpha(0).item() == (0.5 if name == "Scaled" else 1) and path.sigma(0).item() == 0
    assert path.logsnr(0).item() == math.inf


@pytest.mark.parametrize("path", ENDS_IN_NOISE, ids=repr)
def test_no_signal_at_the_end(path):
    """Where α(end) = 0 it is 0 exactly, σ = 1, and the log-SNR −inf."""
    assert path.alpha(path.horizon).item() == 0
    assert path.sigma(path.horizon).item() == pytest.approx(1, abs=1e-15)
    assert path.logsnr(path.horizon).item() == -math.inf


@pytest.mark.parametrize(
    "start, end, tau", [(-3, 3.9, 0.5), (-1.9, 1.3, 1.0), (-3.4, 3.7, 1.1), (-0.6, 5.0, 0.7), (0, 3, 0.3)]
)
def test_sigmoid_ends_for_any_piece(start, end, tau):
    """Sigmoid ends at exactly (1, 0) and (0, 1), also where start + 1·(end − start) is rounded past the end."""
    path = Sigmoid(start, end, tau)
    assert (path.alpha(0).item(), path.sigma(0).item()) == (1, 0)
    assert path.alpha(1).item() == 0 and path.sigma(1).item() == pytest.approx(1, abs=1e-15)


@continuous_paths
@pytest.mark.parametrize("t", [1e-12, 1e-8, 1e-5, 1e-3])
def test_digits_near_the_data(name, t):
    """σ keeps its relative digits near t = 0, where 1 − α² would lose them; against 40 digits."""
    assert path_of(name).sigma(t).item() == pytest.approx(known(name, t)[1], rel=1e-12, abs=0)


@pytest.mark.parametrize("name", ["Cosine", "Cosine shifted", "Scaled", "Sigmoid", "Sigmoid skew", "Straight"])
@pytest.mark.parametrize("gap", [2.0**-40, 2.0**-25, 2.0**-10])
def test_digits_near_the_noise(name, gap):
    """α keeps its relative digits near t = 1 on the paths where it ends at 0."""
    assert path_of(name).alpha(1 - gap).item() == pytest.approx(known(name, 1 - mp.mpf(gap))[0], rel=1e-12, abs=0)


@pytest.mark.parametrize("first", [1e-4, 1e-7, 1e-10])
def test_digits_of_the_chain(first):
    """1 − ᾱ_t has relative error below 1e-12 on a 1000-step chain, against the product in 40 digits."""
    betas = torch.linspace(first, 0.02, 1000, dtype=torch.float64)
    path, abar = DiscretePath(betas), mp.mpf(1)
    for t, beta in enumerate(betas.tolist(), 1):
        abar *= 1 - mp.mpf(beta)
        if t in (1, 2, 3, 10, 100, 1000):
            assert path.sigma(t).item() ** 2 == pytest.approx(float(1 - abar), rel=1e-12, abs=0)
            assert path.alpha_bars[t].item() == pytest.approx(float(abar), rel=1e-12, abs=0)


def test_tables_of_the_chain():
    """betas and alpha_bars have T + 1 entries, β_0 = 0 and ᾱ_0 = 1, so that betas[t] is β_t; float32 betas are widened."""
    path = DiscretePath(CHAIN_BETAS)
    assert path.T == path.horizon == 20
    assert path.betas.shape == path.alpha_bars.shape == (21,)
    assert path.betas.tolist() == [0.0, *CHAIN_BETAS]
    close(path.alpha_bars, np.cumprod([1.0, *(1 - np.array(CHAIN_BETAS))]), 1e-14)
    assert DiscretePath(torch.tensor(CHAIN_BETAS, dtype=torch.float32)).alpha_bars.dtype == torch.float64


# The SDE --------------------------------------------------------------------------------------------------------------


def closed_sde(name: str, t: float) -> tuple[float, float]:
    """f and g² typed out for each path (by mpmath's derivative for Sigmoid's logistic)."""
    first, last = (0.5, 8.0) if name == "VP gentle" else (0.1, 20.0)
    beta, integral = first + t * (last - first), first * t + (last - first) * t**2 / 2
    if name.startswith("VP"):
        return -beta / 2, beta
    if name == "SubVP":
        return -beta / 2, beta * (1 - math.exp(-2 * integral))
    if name.startswith("VE"):
        low, high = (0.01, 50.0) if name == "VE" else (0.1, 3.0)
        return 0.0, 2 * math.log(high / low) * low**2 * (high / low) ** (2 * t)
    if name in ("Cosine", "Scaled"):  # the scale is in no rate: (log bα)' = (log α)'
        return -math.pi / 2 * math.tan(math.pi * t / 2), math.pi * math.tan(math.pi * t / 2)
    if name == "Cosine shifted":  # on the circle f = ½σ²λ' and g² = −σ²λ', with λ = −2 log tan(πt/2) − 2
        rate = -2 * math.pi / math.sin(math.pi * t) * known(name, t)[1] ** 2
        return rate / 2, -rate
    if name == "Straight":
        return -1 / (1 - t), 2 * t / (1 - t)
    kept = CONTINUOUS[name][1]
    rate = float(mp.diff(lambda u: 2 * mp.log(kept(mp, u)[0]), t))  # (log α²)'; on the circle g² = −(log α²)'
    return rate / 2, -rate


@continuous_paths
@pytest.mark.parametrize("t", INSIDE)
def test_drift_and_diffusion(name, t):
    """f and g² against the closed forms of the SDEs, for numbers and for (B,) times."""
    path, (drift, diffusion2) = path_of(name), closed_sde(name, t)
    assert path.drift(t).item() == pytest.approx(drift, rel=1e-10, abs=1e-12)
    assert path.diffusion2(t).item() == pytest.approx(diffusion2, rel=1e-10, abs=1e-12)
    batch = torch.tensor([t, 0.5], dtype=torch.float64)
    close(path.drift(batch), [drift, closed_sde(name, 0.5)[0]])
    close(path.diffusion2(batch), [diffusion2, closed_sde(name, 0.5)[1]])


@continuous_paths
def test_moments_of_the_sde(name):
    """dm/dt = f·m and dV/dt = 2f·V + g², integrated from a point, reach α and σ²."""
    path, stops = path_of(name), [0.2, 0.5, 0.95]

    def rate(t, moments):
        f, g2 = path.drift(t).item(), path.diffusion2(t).item()
        return [f * moments[0], 2 * f * moments[1] + g2]

    start = [known(name, 0)[0], 0.0]
    solved = scipy.integrate.solve_ivp(rate, (0, 0.95), start, method="DOP853", rtol=1e-9, atol=1e-12, t_eval=stops)
    for t, mean, var in zip(stops, *solved.y, strict=True):
        alpha, sigma = known(name, t)
        assert mean == pytest.approx(alpha, rel=1e-7)
        assert var == pytest.approx(sigma**2, rel=1e-7)


@pytest.mark.parametrize("path", TO_NOISE, ids=repr)
def test_infinite_drift(path):
    """Where α(1) = 0 drift and diffusion are infinite at t = 1, and the error says so; also inside a batch."""
    for function, what in ((path.drift, "drift"), (path.diffusion2, "diffusion")):
        with pytest.raises(ValueError, match=rf"{what}.*not finite at t = \[1\.0\]"):
            function(1.0)
        with pytest.raises(ValueError, match="not finite"):
            function(torch.tensor([0.5, 1.0]))


def test_chain_has_no_sde():
    """A chain has no drift, diffusion or velocity; the errors name the limit."""
    path, x = DiscretePath(CHAIN_BETAS), torch.ones(2, 1)
    for call in (
        lambda: path.drift(3),
        lambda: path.diffusion2(3),
        lambda: path.convert(x, x, 3, given="velocity", to="x0"),
        lambda: path.quantity("velocity", x, x, 3),
    ):
        with pytest.raises(ValueError, match="limit.*SDE of VP"):
            call()


def test_chain_is_an_ornstein_uhlenbeck_process():
    """With the rate −T·log(1 − β_t) on each interval of length 1/T, the SDE's moments are the chain's exactly."""
    path, T, mean, var = DiscretePath(CHAIN_BETAS), 20, 1.0, 0.0
    for t, beta in enumerate(CHAIN_BETAS, 1):
        rate = -T * math.log(1 - beta)

        def slope(_, moments, rate=rate):
            return [-rate / 2 * moments[0], rate * (1 - moments[1])]

        solved = scipy.integrate.solve_ivp(slope, (0, 1 / T), [mean, var], method="DOP853", rtol=1e-13, atol=1e-15)
        mean, var = solved.y[:, -1]
        close(path.alpha(t), mean, 1e-11)
        close(path.sigma(t) ** 2, var, 1e-11)


def test_chain_tends_to_the_vp_sde():
    """DDPM's linear chain at T = 1000 is near VP, not the same: ᾱ_T 4.04e-5 against 4.32e-5, log ᾱ off by 0.068."""
    chain, vp = DiscretePath(linear_betas(1000)), VP()
    assert chain.alpha_bars[-1].item() == pytest.approx(4.04e-5, rel=2e-3)
    assert vp.alpha(1).item() ** 2 == pytest.approx(4.32e-5, rel=2e-3)
    t = torch.arange(1001)
    gap = (2 * chain.alpha(t).log() - 2 * vp.alpha(t / 1000).log()).abs().max().item()
    assert gap == pytest.approx(0.068, abs=5e-4)


# One step -------------------------------------------------------------------------------------------------------------


@all_paths
@pytest.mark.parametrize("units", STEPS)
def test_transition(name, units):
    """q(x_t | x_s) against the closed form; on the chain against the walk of single steps."""
    s, t = (time_on(name, u) for u in units)
    for actual, expected in zip(path_of(name).transition(s, t), forward_kernel(name, s, t), strict=True):
        assert actual.item() == pytest.approx(expected, rel=1e-10, abs=1e-12)


def test_transition_of_one_step():
    """One step of the chain keeps √(1 − β_t) and adds variance β_t."""
    path, t = DiscretePath(CHAIN_BETAS), torch.arange(1, 21)
    a, v = path.transition(t - 1, t)
    close(a, [math.sqrt(1 - beta) for beta in CHAIN_BETAS], 1e-13)
    close(v, CHAIN_BETAS, 1e-13)


@all_paths
@pytest.mark.parametrize("units", STEPS)
@pytest.mark.parametrize("x0, noise", [(0.7, 1.1), (-1.3, -0.4), (0.0, 2.0)])
def test_posterior_is_bayes(name, units, x0, noise):
    """Mean and variance of q(x_s | x_t, x_0) against prior times likelihood on a grid."""
    s, t = (time_on(name, u) for u in units)
    (alpha_s, sigma_s), (alpha_t, sigma_t) = known(name, s), known(name, t)
    xt = alpha_t * x0 + sigma_t * noise
    mean, var = path_of(name).posterior(
        torch.tensor([xt], dtype=torch.float64), torch.tensor([x0], dtype=torch.float64), s, t
    )
    expected_mean, expected_var = bayes_on_a_grid(alpha_s, sigma_s, *forward_kernel(name, s, t), xt, x0)
    assert mean.item() == pytest.approx(expected_mean, rel=1e-10, abs=1e-10)
    assert var.item() == pytest.approx(expected_var, rel=1e-10, abs=1e-10)


@all_paths
@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 3, 2, 2)])
def test_posterior_is_gaussian_conditioning(name, shape, generator):
    """The same with a time for each sample, any data shape, against conditioning of the joint Gaussian of (x_s, x_t)."""
    s = [time_on(name, u) for u in (0.0, 0.1, 0.5, 0.9)]
    t = [time_on(name, u) for u in (0.3, 0.15, 1.0, 0.95)]
    x0, xt = normals(*shape, generator=generator), normals(*shape, generator=generator)
    mean, var = path_of(name).posterior(xt, x0, times_of(s), times_of(t))
    for i in range(4):
        a, v = forward_kernel(name, s[i], t[i])
        alpha_s, sigma_s = known(name, s[i])
        walk = np.array([[sigma_s, 0.0], [a * sigma_s, math.sqrt(v)]])  # (x_s, x_t) from the two independent noises
        cov, centre = walk @ walk.T, np.array([alpha_s, a * alpha_s])
        gain = np.linalg.solve(cov[1:, 1:], cov[1:, :1]).item()
        close(mean[i], centre[0] * x0[i] + gain * (xt[i] - centre[1] * x0[i]))
        close(var.expand(xt.shape)[i], torch.full(shape[1:], cov[0, 0] - gain * cov[1, 0], dtype=torch.float64))


@all_paths
def test_posterior_of_a_batch_is_that_of_each(name, generator):
    """(B,) times, one time for all, and one sample at a time give the same numbers."""
    path, x0, xt = path_of(name), normals(3, 2, generator=generator), normals(3, 2, generator=generator)
    s, t = time_on(name, 0.2), time_on(name, 0.7)
    one = path.posterior(xt, x0, s, t)
    many = path.posterior(xt, x0, times_of([s] * 3), times_of([t] * 3))
    close(many[0], one[0], 1e-13)
    close(many[1].expand(3, 1), one[1].expand(3, 1), 1e-13)
    close(path.posterior(xt[:1], x0[:1], s, t)[0], one[0][:1], 1e-13)


def coefficients(path, s, t):
    """keep, pull and variance of the posterior, read off by feeding it ones and zeros."""
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    (keep, var), (pull, _) = path.posterior(one, zero, s, t), path.posterior(zero, one, s, t)
    return keep.item(), pull.item(), var.item()


@all_paths
@pytest.mark.parametrize("units", STEPS)
def test_bridge_has_the_right_marginal(name, units):
    """q(x_s | x_t, x_0) averaged over q(x_t | x_0) is q(x_s | x_0)."""
    s, t = (time_on(name, u) for u in units)
    keep, pull, var = coefficients(path_of(name), s, t)
    (alpha_s, sigma_s), (alpha_t, sigma_t) = known(name, s), known(name, t)
    assert keep * alpha_t + pull == pytest.approx(alpha_s, rel=1e-10)
    assert keep**2 * sigma_t**2 + var == pytest.approx(sigma_s**2, rel=1e-10)


@all_paths
@pytest.mark.parametrize("r, s, t", [(0.0, 0.1, 0.2), (0.05, 0.5, 0.95), (0.3, 0.35, 1.0)])
def test_bridges_compose(name, r, s, t):
    """Going t → s → r with x_0 known is going t → r."""
    r, s, t = (time_on(name, u) for u in (r, s, t))
    keep_1, pull_1, var_1 = coefficients(path_of(name), s, t)
    keep_2, pull_2, var_2 = coefficients(path_of(name), r, s)
    keep, pull, var = coefficients(path_of(name), r, t)
    assert keep == pytest.approx(keep_1 * keep_2, rel=1e-10, abs=1e-12)
    assert pull == pytest.approx(pull_2 + keep_2 * pull_1, rel=1e-10, abs=1e-12)
    assert var == pytest.approx(var_2 + keep_2**2 * var_1, rel=1e-10, abs=1e-12)


@all_paths
@pytest.mark.parametrize("unit", [0.05, 0.5, 1.0])
def test_bridge_to_the_data(name, unit, generator):
    """At s = 0 the posterior is α(0)·x_0, with variance 0."""
    x0, xt = normals(3, 2, generator=generator), normals(3, 2, generator=generator)
    mean, var = path_of(name).posterior(xt, x0, 0, time_on(name, unit))
    close(mean, known(name, 0)[0] * x0, 1e-12)
    assert var.item() == 0


def test_posterior_is_the_slides():
    """μ̃_t and β̃_t as on the slide, for every t of DDPM's chain."""
    betas = np.linspace(1e-4, 0.02, 1000)
    abar = np.concatenate([[1.0], np.cumprod(1 - betas)])
    path, x0, xt = (
        DiscretePath(betas),
        torch.tensor([0.6], dtype=torch.float64),
        torch.tensor([-1.2], dtype=torch.float64),
    )
    for t in [1, 2, 3, 10, 500, 999, 1000]:
        beta, before, now = betas[t - 1], abar[t - 1], abar[t]
        mu = (math.sqrt(1 - beta) * (1 - before) * -1.2 + math.sqrt(before) * beta * 0.6) / (1 - now)
        mean, var = path.posterior(xt, x0, t - 1, t)
        close(mean, [mu])
        close(var, beta * (1 - before) / (1 - now), 1e-12)


def typed_log_variance(name, s, t, v):
    """v·log β + (1 − v)·log β̃ with 40 digits: β of q(x_t | x_s), β̃ by Gaussian conditioning; at s = 0 log β alone."""
    a, beta = (mp.mpf(value) for value in forward_kernel(name, s, t))
    if s == 0:
        return float(mp.log(beta))
    var = mp.mpf(known(name, s)[1]) ** 2
    return float(v * mp.log(beta) + (1 - v) * mp.log(var * beta / (a**2 * var + beta)))


@all_paths
def test_log_variance(name, generator):
    """Between the two in logs, for a number, for a name, and for a fraction of each value, in any type; and clipped at s = 0."""
    path = path_of(name)
    for units in (*STEPS, (0.0, 0.05), (0.0, 0.7), (0.0, 1.0)):
        s, t = (time_on(name, u) for u in units)
        for v, share in ((0, 0), (0.0, 0), (0.5, 0.5), (0.31, 0.31), (1, 1), (1.0, 1), ("posterior", 0), ("beta", 1)):
            found = path.log_variance(s, t, v)
            assert found.shape == () and found.dtype == torch.float64
            close(found, typed_log_variance(name, s, t, share), 1e-9)
        said = 0.5 + normals(2, 1, 2, 2, generator=generator)  # a network may leave [0, 1]
        for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
            found = path.log_variance(s, t, said.to(dtype))
            assert found.shape == said.shape and found.dtype == dtype
            close(
                found,
                [[[[typed_log_variance(name, s, t, v) for v in row] for row in x[0]]] for x in said.tolist()],
                tolerance,
            )


@all_paths
def test_log_variance_of_a_batch(name, generator):
    """With (B,) times each sample has its own step; one that ends at the data does not touch the others."""
    s, t = ([time_on(name, u) for u in units] for units in ([0.0, 0.3, 0.9], [0.1, 0.5, 1.0]))
    for v, share in (("beta", 1), ("posterior", 0), (0.4, 0.4)):
        found = path_of(name).log_variance(times_of(s), times_of(t), v)
        assert found.shape == (3,)
        close(found, [typed_log_variance(name, *step, share) for step in zip(s, t, strict=True)], 1e-9)
    said = normals(3, 2, generator=generator).requires_grad_()
    found = path_of(name).log_variance(times_of(s), times_of(t), said)
    rows = zip(s, t, said.tolist(), strict=True)
    close(found.detach(), [[typed_log_variance(name, a, b, v) for v in row] for a, b, row in rows], 1e-9)
    (slope,) = torch.autograd.grad(found.sum(), said)
    gaps = [typed_log_variance(name, a, b, 1) - typed_log_variance(name, a, b, 0) for a, b in zip(s, t, strict=True)]
    close(slope, [[gap, gap] for gap in gaps], 1e-9)
    assert gaps[0] == 0 and min(gaps[1:]) > 0


def test_log_variance_on_fewer_steps():
    """On the lecture's chain β and β̃ of a skip are those of the skip, not of one step; of one step they are the table's."""
    betas = np.linspace(1e-4, 0.02, 1000)
    path, abar = DiscretePath(betas), np.cumprod(np.append(1.0, 1 - betas))
    for s, t in ((1, 2), (499, 500), (400, 420), (20, 40), (980, 1000), (1, 1000)):
        beta = 1 - abar[t] / abar[s]
        tilde = beta * (1 - abar[s]) / (1 - abar[t])
        for v in (0.0, 0.5, 1.0):
            close(path.log_variance(s, t, v).exp(), beta**v * tilde ** (1 - v), 1e-9)
        if t == s + 1:
            close(path.log_variance(s, t, 1).exp(), betas[t - 1], 1e-12)
    close(path.log_variance(0, 1, 0).exp(), 1e-4, 1e-12)
    close(path.log_variance(0, 1, "posterior").exp(), 1e-4, 1e-12)
    close(path.log_variance(0, 20, 0.5).exp(), 1 - abar[20], 1e-12)


@pytest.mark.parametrize("bad", ["large", "learned", "", -0.01, 1.01, math.nan, math.inf, True, None, [0.5]])
def test_log_variance_checks_what_it_is_given(bad):
    """A name that is none, a number outside [0, 1], no number: the error names it. Times out of order do too."""
    with pytest.raises(ValueError) as failure:
        Cosine().log_variance(0.2, 0.5, bad)
    assert str(failure.value) == f"variance must be 'beta', 'posterior' or a number in [0, 1]; got {bad!r}"
    for s, t in ((0.5, 0.5), (0.6, 0.5)):
        with pytest.raises(ValueError, match="^s must be less than t everywhere"):
            Cosine().log_variance(s, t, 0.5)
    with pytest.raises(ValueError, match=r"^t must be a number or have shape \(3,\)"):
        Cosine().log_variance(0.1, times_of([0.2, 0.3]), torch.ones(3, 2))


# What a network can predict -------------------------------------------------------------------------------------------


def quantities(name, x0, eps, t):
    """All five at time t, from closed forms of α, σ and their derivatives; a chain has no velocity."""
    alpha, sigma = known(name, t)
    out = {"x0": x0, "eps": eps, "v": alpha * eps - sigma * x0, "score": -eps / sigma}
    if name != "chain":
        alpha_rate, sigma_rate = known_rates(name, t)
        out["velocity"] = alpha_rate * x0 + sigma_rate * eps
    return out, alpha * x0 + sigma * eps


@all_paths
@pytest.mark.parametrize("unit", INSIDE)
def test_conversions(name, unit, generator):
    """Every quantity turns into every other, hence all round trips; the same for a number, an announced time and (B,)."""
    path, t = PATHS[name][0], time_on(name, unit)
    x0, eps = normals(3, 2, generator=generator), normals(3, 2, generator=generator)
    values, xt = quantities(name, x0, eps, t)
    grid = [time_on(name, u) for u in (1.0, unit, 0.0)]
    for given in values:
        for to in values:
            size = max(1.0, values[to].abs().max().item())
            path.tabulate(times_of([0]))
            for kind in (t, times_of(t), times_of([t] * 3)):
                close(path.convert(values[given], xt, kind, given, to) / size, values[to] / size, 1e-10)
            path.tabulate(times_of(grid))
            close(path.convert(values[given], xt, t, given, to) / size, values[to] / size, 1e-10)
        close(path.quantity(given, x0, eps, t), values[given])


@all_paths
def test_a_time_for_each_sample(name, generator):
    """With (B,) times each sample is converted, perturbed and asked for at its own time."""
    path, x0, eps = path_of(name), normals(4, 2, generator=generator), normals(4, 2, generator=generator)
    times = [time_on(name, u) for u in INSIDE[:4]]
    t = times_of(times)
    rows = [quantities(name, x0[i], eps[i], times[i]) for i in range(4)]
    xt = torch.stack([row[1] for row in rows])
    close(path.perturb(x0, t, eps), xt, 1e-12)
    for given in rows[0][0]:
        value = torch.stack([row[0][given] for row in rows])
        close(path.quantity(given, x0, eps, t), value)
        close(path.convert(value, xt, t, given, "x0"), x0, 1e-10)


@all_paths
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-14), (torch.float32, 3e-7), (torch.bfloat16, 2e-2)])
def test_tabulate_changes_no_result(name, dtype, tolerance, generator):
    """Announced times give the numbers that unannounced ones give, up to rounding, at both ends of a step and again."""
    path, times = path_of(name), [time_on(name, u) for u in (1.0, 0.6, 0.2, 0.0)]
    value, xt = (normals(3, 2, generator=generator).to(dtype) for _ in "ab")
    for t in times:
        path.tabulate(times_of([time_on(name, 0.4)]))
        plain, unit = path.convert(value, xt, t, "v", "x0"), path.units(t, 3, xt.device)
        path.tabulate(times_of(times))
        for _ in "ab":
            again = path.convert(value, xt, t, "v", "x0")
            assert again.dtype == dtype
            size = max(1.0, plain.abs().max().item())
            torch.testing.assert_close(again, plain, rtol=0, atol=tolerance * size)
            assert torch.equal(path.units(t, 3, xt.device), unit) and unit.shape == (3,) and unit.dtype == torch.float32
        with pytest.raises(ValueError, match="^value must have the shape of xt"):
            path.convert(value[:2], xt, t, "v", "x0")
        with pytest.raises(ValueError, match="^to must be one of"):
            path.convert(value, xt, t, "v", "noise")


@continuous_paths
def test_velocity_is_the_derivative(name, generator):
    """The velocity is d/dt of α(t)·x_0 + σ(t)·ε, by autograd through the closed form."""
    path, closed = CONTINUOUS[name]
    x0, eps = normals(3, 2, generator=generator), normals(3, 2, generator=generator)
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)

    def walk(t):
        alpha, sigma = closed(torch, t)
        return alpha[:, None] * x0 + sigma[:, None] * eps

    xt, velocity = torch.autograd.functional.jvp(walk, t, torch.ones_like(t))
    close(path.perturb(x0, t, eps), xt)
    close(path.quantity("velocity", x0, eps, t), velocity)
    close(path.convert(eps, xt, t, "eps", "velocity"), velocity, 1e-10)


@all_paths
def test_score_is_the_gradient(name, generator):
    """The score is ∇ log q(x_t | x_0), by autograd through torch's normal density."""
    x0, eps = normals(3, 2, generator=generator), normals(3, 2, generator=generator)
    t = time_on(name, 0.7)
    alpha, sigma = known(name, t)
    xt = (alpha * x0 + sigma * eps).requires_grad_()
    (score,) = torch.autograd.grad(torch.distributions.Normal(alpha * x0, sigma).log_prob(xt).sum(), xt)
    close(path_of(name).convert(eps, xt.detach(), t, "eps", "score"), score)
    close(path_of(name).convert(score, xt.detach(), t, "score", "eps"), eps)


@pytest.mark.parametrize(
    "name", ["VP", "Cosine", "Cosine shifted", "Scaled", "Sigmoid", "SubVP", "VE", "Straight", "chain"]
)
@pytest.mark.parametrize("unit", [0.0, 1.0])
def test_v_at_both_ends(name, unit, generator):
    """(x_t, v) gives x_0 and ε at both ends, wherever the path ends."""
    x0, eps, t = normals(3, 2, generator=generator), normals(3, 2, generator=generator), time_on(name, unit)
    alpha, sigma = known(name, t)
    xt, v = alpha * x0 + sigma * eps, alpha * eps - sigma * x0
    for kind in (t, torch.full((3,), t)):
        close(path_of(name).convert(v, xt, kind, "v", "x0"), x0, 1e-11)
        close(path_of(name).convert(v, xt, kind, "v", "eps"), eps, 1e-11)


def test_straight_velocity_at_both_ends(generator):
    """On straight lines the velocity is ε − x_0 and gives both back at both ends."""
    x0, eps = normals(3, 2, generator=generator), normals(3, 2, generator=generator)
    for t, xt in ((0.0, x0), (1.0, eps)):
        close(Straight().convert(eps - x0, xt, t, "velocity", "x0"), x0, 1e-14)
        close(Straight().convert(eps - x0, xt, t, "velocity", "eps"), eps, 1e-14)


@pytest.mark.parametrize("path", ENDS_IN_NOISE, ids=repr)
@pytest.mark.parametrize("announced", [False, True])
def test_noise_alone_determines_no_data(path, announced):
    """Where α = 0, (x_t, ε) holds nothing of x_0 or v: converting raises and names the time, for numbers and in a batch."""
    x = torch.ones(2, 3, dtype=torch.float64)
    path.tabulate(torch.tensor([path.horizon, 0.0] if announced else [0.0]))
    for given in ("eps", "score"):
        for to in ("x0", "v"):
            for t in (path.horizon, torch.tensor([path.horizon / 2, path.horizon])):
                with pytest.raises(ValueError, match=rf"x_t and {given} do not determine {to} at t = \[{path.horizon}"):
                    path.convert(x, x, t, given, to)
    close(path.convert(x, x, path.horizon, "eps", "score"), -x, 1e-12)
    close(path.convert(x, x, path.horizon, "score", "eps"), -x, 1e-12)


@all_paths
def test_data_alone_determine_no_noise(name):
    """Where σ = 0, (x_t, x_0) holds nothing of ε, and the score does not exist: both raise."""
    x = torch.ones(2, 3)
    for to in ("eps", "v", "score"):
        with pytest.raises(ValueError, match="do not determine"):
            path_of(name).convert(x, x, 0, "x0", to)
    with pytest.raises(ValueError, match="score.*not finite at t"):
        path_of(name).quantity("score", x, x, 0)
    close(path_of(name).convert(x, 2 * x, 0, "eps", "x0"), 2 * x / known(name, 0)[0])


@pytest.mark.parametrize("name, unit", [("VP", 0.0), ("VE", 0.0), ("Sigmoid", 0.0), ("Sigmoid", 1.0)])
def test_infinite_velocity(name, unit):
    """Where σ' or α' is infinite the velocity is refused."""
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="velocity.*not finite at t"):
        path_of(name).quantity("velocity", x, x, unit)


def test_given_is_asked():
    """Asking for what is given returns it, at any time."""
    x = torch.ones(2, 3)
    for name in QUANTITIES:
        assert torch.equal(Cosine().convert(x, 2 * x, 1.0, name, name), x)


# A log-SNR moved up or down -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [-20.0, -2.0, 0.0, 0.7, 4.0, 20.0])
def test_shifted_cosine(shift):
    """log(α²/σ²) = −2 log tan(πt/2) + shift in 40 digits, on the circle, both ends exact; σ and α keep their digits."""
    path, times = Cosine(shift), [1e-9, 1e-4, 0.05, 0.2, 0.5, 0.77, 0.999, 1 - 2.0**-30]
    assert (path.alpha(0).item(), path.sigma(0).item(), path.logsnr(0).item()) == (1, 0, math.inf)
    assert (path.alpha(1).item(), path.sigma(1).item(), path.logsnr(1).item()) == (0, 1, -math.inf)
    for t in times:
        logsnr = -2 * mp.log(mp.tan(mp.pi * mp.mpf(t) / 2)) + mp.mpf(shift)
        assert path.logsnr(t).item() == pytest.approx(float(logsnr), rel=1e-12, abs=1e-12)
        assert path.alpha(t).item() == pytest.approx(float(mp.sqrt(1 / (1 + mp.exp(-logsnr)))), rel=1e-12, abs=0)
        assert path.sigma(t).item() == pytest.approx(float(mp.sqrt(1 / (1 + mp.exp(logsnr)))), rel=1e-12, abs=0)
    t = torch.linspace(0, 1, 301, dtype=torch.float64)
    close(path.alpha(t) ** 2 + path.sigma(t) ** 2, torch.ones(301), 1e-14)


def test_no_shift_is_the_plain_cosine():
    """Without a shift α and σ are a quarter turn, to the last digits."""
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    for path in (Cosine(), Cosine(0.0)):
        np.testing.assert_allclose(path.alpha(t), np.sin(np.pi / 2 * (1 - t.numpy())), rtol=0, atol=1e-15)
        np.testing.assert_allclose(path.sigma(t), np.sin(np.pi / 2 * t.numpy()), rtol=0, atol=1e-15)


@pytest.mark.parametrize("shift", [-4.0, 1.5])
@pytest.mark.parametrize("t", INSIDE)
def test_sde_of_the_shifted_cosine(shift, t):
    """f = ½σ²λ' and g² = −σ²λ' with λ' = −2π/sin πt, whatever the shift; and both by differences of the closed form."""
    path, h = Cosine(shift), 1e-5
    var = 1 / (1 + math.exp(shift) / math.tan(math.pi * t / 2) ** 2)
    rate = -2 * math.pi / math.sin(math.pi * t)
    assert path.drift(t).item() == pytest.approx(var * rate / 2, rel=1e-10)
    assert path.diffusion2(t).item() == pytest.approx(-var * rate, rel=1e-10)
    low, high = (1 / (1 + math.exp(-shift) * math.tan(math.pi * u / 2) ** 2) for u in (t - h, t + h))  # α²
    assert path.drift(t).item() == pytest.approx((math.log(high) - math.log(low)) / (4 * h), rel=1e-6)


def posterior_over(images, xt, path, t):
    """p(image | x_t) for images that are equally likely, from the normal density of each pixel."""
    alpha, sigma = path.alpha(t).item(), path.sigma(t).item()
    log_p = scipy.stats.norm.logpdf(xt, alpha * images, sigma).sum((1, 2))
    return np.exp(log_p - log_p.max()) / np.exp(log_p - log_p.max()).sum()


@pytest.mark.parametrize("copies", [2, 3])
@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_copied_pixels_ask_for_a_shift(copies, shift):
    """The mean of r² noisy copies of a pixel has noise σ/r: with shift −2 log r the same is known at the same t, without more."""
    rng = np.random.default_rng(0)
    small = rng.normal(size=(6, 4, 4))
    large = small.repeat(copies, 1).repeat(copies, 2)
    path, moved = Cosine(shift), Cosine(shift - 2 * math.log(copies))
    for t in (0.3, 0.5, 0.8):
        xt = moved.alpha(t).item() * large[2] + moved.sigma(t).item() * rng.normal(size=large[2].shape)
        mean = xt.reshape(4, copies, 4, copies).mean((1, 3))
        seen = mean * copies * path.sigma(t).item() / moved.sigma(t).item()  # the same noise as on the small image
        np.testing.assert_allclose(
            posterior_over(large, xt, moved, t), posterior_over(small, seen, path, t), rtol=1e-9, atol=1e-12
        )
    unmoved, alone = (posterior_over(x, path.alpha(0.8).item() * x[2], path, 0.8)[2] for x in (large, small))
    assert unmoved > alone + 0.05  # copies at the same noise give the image away


@pytest.mark.parametrize("path", [VP(), VE(), Cosine(), Straight(), SubVP()], ids=repr)
@pytest.mark.parametrize("scale", [0.1, 0.5, 3.0])
def test_scaled_data(path, scale):
    """x_t is that of the data b·x_0: the log-SNR moves by 2 log b at every t, and the noise stays."""
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    scaled, x0, eps = Scaled(path, scale), torch.tensor([0.7, -1.2]).double(), torch.tensor([0.3, 0.4]).double()
    close(scaled.logsnr(t), path.logsnr(t) + 2 * math.log(scale), 1e-12)
    close(scaled.alpha(t), scale * path.alpha(t), 1e-15)
    assert torch.equal(scaled.sigma(t), path.sigma(t))
    close(scaled.perturb(x0, 0.4, eps), path.perturb(scale * x0, 0.4, eps), 1e-14)
    assert Scaled(path, 1.0).alpha(0.3) == path.alpha(0.3) and scaled.horizon == 1


@pytest.mark.parametrize("scale", [0.2, 0.5, 2.0])
def test_scaled_cosine_is_a_shifted_one(scale):
    """Divided by √(b²α² + σ²), the deviation of x_t for data of variance 1, it is Cosine with shift 2 log b."""
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    angle = np.pi / 2 * t.numpy()
    norm = np.sqrt(scale**2 * np.cos(angle) ** 2 + np.sin(angle) ** 2)
    scaled, shifted = Scaled(Cosine(), scale), Cosine(shift=2 * math.log(scale))
    close(scaled.alpha(t) / norm, shifted.alpha(t), 1e-14)
    close(scaled.sigma(t) / norm, shifted.sigma(t), 1e-14)


@pytest.mark.parametrize("path", [Scaled(Cosine(), 0.4), Scaled(Straight(), 2.0), Cosine(-2.0), Cosine(3.0)], ids=repr)
@pytest.mark.parametrize("sampler", [ddim, heun])
def test_samplers_on_moved_paths(path, sampler, generator):
    """From noise, with the exact denoiser, the last state over α(0) has the mixture's mean, variance and weights."""
    mixture = GaussianMixture(times_of([[-1.0], [2.0]]), times_of([0.04, 0.25]), times_of([0.3, 0.7]))
    x = normals(4000, 1, generator=generator)
    x = last(sampler(mixture.denoiser(path), path, x, path.times(200 if sampler is ddim else 60)))
    x = x[:, 0] / path.alpha(0)
    mean, var = 0.3 * -1 + 0.7 * 2, 0.3 * 0.04 + 0.7 * 0.25 + 0.3 * 0.7 * 3**2
    assert x.mean().item() == pytest.approx(mean, abs=5 * math.sqrt(var / 4000) + 0.01)
    assert x.var().item() == pytest.approx(var, rel=0.06)
    assert (x < 0.2).double().mean().item() == pytest.approx(0.3, abs=0.04)


# The time of a log-SNR ------------------------------------------------------------------------------------------------


@continuous_paths
def test_time_at(name):
    """The log-SNR from the closed form in 40 digits leads back to its time, for a number and for tensors of any shape."""
    path, units = path_of(name), [0.001, 0.02, *INSIDE, 0.999]
    logsnr = [float(2 * mp.log(a) - 2 * mp.log(s)) for a, s in (PATHS[name][1](mp, mp.mpf(t)) for t in units)]
    for value, t in zip(logsnr, units, strict=True):
        found = path.time_at(value)
        assert found.shape == () and found.dtype == torch.float64
        assert found.item() == pytest.approx(t, rel=1e-10, abs=1e-13)
    close(path.time_at(times_of(logsnr)), units)
    close(path.time_at(times_of(logsnr).reshape(2, -1)), times_of(units).reshape(2, -1))
    assert path.time_at(torch.zeros(0)).shape == (0,)
    assert path.time_at(torch.tensor(logsnr[3], dtype=torch.float32)).dtype == torch.float64


@continuous_paths
def test_time_at_the_ends(name):
    """Where no noise is left it is 0, exactly; the log-SNR of the other end, which may be −∞, leads to 1."""
    path = path_of(name)
    assert path.time_at(math.inf).item() == 0
    close(path.time_at(torch.stack([path.logsnr(0.0), path.logsnr(1.0)])), [0.0, 1.0], 1e-12)


@pytest.mark.parametrize("path", TO_NOISE, ids=repr)
def test_time_without_signal(path):
    """Where α(1) = 0 the log-SNR −∞ is reached, at 1 exactly."""
    assert path.time_at(-math.inf).item() == 1


def test_time_at_is_checked():
    """A log-SNR beyond the path's, nan, and a chain are refused."""
    cases = [
        (lambda: VP().time_at(-11.0), r"^logsnr must lie in \[-10.05, inf\], where VP.* goes; got -11.0"),
        (lambda: VP().time_at(-math.inf), "^logsnr must lie in .*got -inf"),
        (lambda: VE().time_at(times_of([0.0, -9.0])), r"^logsnr must lie in .*got \[0.0, -9.0\]"),
        (lambda: Straight().time_at(math.nan), r"^logsnr must lie in \[-inf, inf\].*; got nan"),
        (lambda: DiscretePath([0.1, 0.2]).time_at(0.0), r"^DiscretePath\(T=2\) has whole times only"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


# Types, shapes and errors ---------------------------------------------------------------------------------------------


@all_paths
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 0), (torch.float32, 1e-6), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("kind", ["number", "0-d", "(B,)"])
def test_dtypes(name, dtype, tolerance, kind, generator):
    """What comes in float64, float32 or bfloat16 goes out in it, and differs from float64 by rounding only."""
    path, shape = path_of(name), (4, 1, 3)
    x0, eps = normals(*shape, generator=generator), normals(*shape, generator=generator)
    s, t = time_on(name, 0.4), time_on(name, 0.5)
    if kind != "number":
        s, t = torch.tensor(s), torch.tensor(t)
    if kind == "(B,)":
        s, t = s.expand(4), t.expand(4)

    def results(dtype):
        a, b = x0.to(dtype), eps.to(dtype)
        xt = path.perturb(a, t, b)
        mean, var = path.posterior(xt, a, s, t)
        return [xt, mean, var, path.quantity("v", a, b, t), path.convert(a, b, t, "v", "x0")]

    for low, high in zip(results(dtype), results(torch.float64), strict=True):
        assert low.dtype == dtype and low.shape == high.shape
        torch.testing.assert_close(low.double(), high, rtol=tolerance, atol=tolerance * high.abs().max().item())


@all_paths
def test_numbers_and_tensors_of_times(name):
    """unit(t) is float32 in [0, 1], of the shape of t; a chain's is t/T."""
    path = path_of(name)
    end = 20 if name == "chain" else 1.0
    assert path.horizon == end
    assert path.unit(end).item() == 1 and path.unit(0).item() == 0
    t = torch.tensor([0, end / 4, end], dtype=torch.float64)
    assert path.unit(t).tolist() == [0, 0.25, 1] and path.unit(t).dtype == torch.float32
    assert path.unit(end).shape == () and path.units(end, 5, torch.device("cpu")).tolist() == [1.0] * 5


@all_paths
@pytest.mark.parametrize("steps", [1, 3, 7, 20])
def test_grid_of_times(name, steps):
    """times(N) has N + 1 entries, from the noise to 0, strictly descending and as even as can be."""
    times = path_of(name).times(steps)
    assert times.shape == (steps + 1,)
    assert times[0] == (20 if name == "chain" else 1) and times[-1] == 0
    assert bool((times.diff() < 0).all())
    if name == "chain":
        assert times.dtype == torch.int64
        assert times.diff().min() >= -math.ceil(20 / steps) and times.diff().max() <= -math.floor(20 / steps)
    else:
        assert times.dtype == torch.float64
        close(times.diff(), torch.full((steps,), -1 / steps), 1e-7)


def test_grid_of_every_chain():
    """No grid of any chain up to T = 60 repeats a time, misses an end, or is further than ½ from even spacing."""
    for T in range(1, 61):
        path = DiscretePath([0.1] * T)
        for steps in range(1, T + 1):
            times = path.times(steps)
            assert len(times) == steps + 1 and times[0] == T and times[-1] == 0 and bool((times.diff() < 0).all())
            assert all(abs(steps * t - T * (steps - k)) <= steps / 2 for k, t in enumerate(times.tolist()))


@continuous_paths
@pytest.mark.parametrize("t", [-1e-9, 1.0 + 1e-9, math.nan, math.inf])
def test_time_off_a_path(name, t):
    """A time outside [0, 1] is refused by everything that takes one, as number and in a batch."""
    path, x = path_of(name), torch.ones(2, 1)
    calls = [path.alpha, path.sigma, path.logsnr, path.drift, path.diffusion2, path.unit]
    calls += [
        lambda t: path.perturb(x, t, x),
        lambda t: path.posterior(x, x, 0, t),
        lambda t: path.quantity("v", x, x, t),
    ]
    calls += [lambda t: path.convert(x, x, t, "v", "x0"), lambda t: path.transition(0, t)]
    for call in calls:
        for time in (t, torch.tensor([0.5, t], dtype=torch.float64)):
            with pytest.raises(ValueError, match=r"^t must lie in \[0, 1\]"):
                call(time)
    with pytest.raises(ValueError, match=r"^s must lie in \[0, 1\]"):
        path.posterior(x, x, t, 0.5)


@pytest.mark.parametrize("t", [-1, 21, 0.5, 19.999, math.nan])
def test_time_off_a_chain(t):
    """A chain takes whole times from 0 to T only; floats with whole values are fine."""
    path, x = DiscretePath(CHAIN_BETAS), torch.ones(2, 1)
    for time in (t, torch.tensor([3, t])):
        with pytest.raises(ValueError, match="^t must be a whole number from 0 to T = 20"):
            path.perturb(x, time, x)
    with pytest.raises(ValueError, match="^s must be a whole number"):
        path.posterior(x, x, t, 20)
    assert path.alpha(3.0) == path.alpha(3) == path.alpha(torch.tensor(3.0)) == path.alpha(torch.tensor(3))


@all_paths
def test_arguments_are_checked(name):
    """Each bad argument raises and is named: order of times, types, shapes, names."""
    path, x, t = path_of(name), torch.ones(4, 2), time_on(name, 0.5)
    later = time_on(name, 0.6)
    whole = torch.ones(4, 2, dtype=torch.int64)
    cases = [
        (ValueError, "^s must be less than t", lambda: path.posterior(x, x, t, t)),
        (ValueError, "^s must be less than t", lambda: path.posterior(x, x, later, t)),
        (ValueError, "^s must be less than t", lambda: path.transition(torch.tensor([0, t]), torch.tensor([t, t]))),
        (TypeError, "^t must be a number or a tensor", lambda: path.alpha("0")),
        (TypeError, "^t must be a number or a tensor", lambda: path.perturb(x, None, x)),
        (ValueError, r"^t must be a number or a tensor of shape \(B,\)", lambda: path.sigma(torch.zeros(2, 1))),
        (ValueError, r"^t must be a number or have shape \(4,\)", lambda: path.perturb(x, torch.full((3,), t), x)),
        (ValueError, r"^t must be a number or have shape \(4,\)", lambda: path.units(torch.full((3,), t), 4, x.device)),
        (ValueError, r"^t must be a number or have shape \(4,\)",
         lambda: path.convert(x, x, torch.full((3,), t), "v", "x0")),
        (ValueError, "^eps must have the shape of x0", lambda: path.perturb(x, t, x[:3])),
        (ValueError, "^x0 must have the shape of xt", lambda: path.posterior(x, x[:, :1], 0, t)),
        (ValueError, "^value must have the shape of xt", lambda: path.convert(x[:3], x, t, "v", "x0")),
        (ValueError, "^eps must have the shape of x0", lambda: path.quantity("v", x, x[:3], t)),
        (TypeError, "^x0 must be a floating-point tensor; got torch.int64", lambda: path.perturb(whole, t, x)),
        (TypeError, "^eps must be a floating-point tensor; got float", lambda: path.perturb(x, t, 0.0)),
        (TypeError, "^xt must be a floating-point tensor", lambda: path.posterior(whole, x, 0, t)),
        (TypeError, "^value must be a floating-point tensor", lambda: path.convert(whole, x, t, "v", "x0")),
        (ValueError, "^given must be one of eps, x0, v, score, velocity; got 'noise'",
         lambda: path.convert(x, x, t, "noise", "x0")),
        (ValueError, "^to must be one of", lambda: path.convert(x, x, t, "v", "x_0")),
        (ValueError, "^steps must be a whole number", lambda: path.times(0)),
        (ValueError, "^steps must be a whole number", lambda: path.times(2.5)),
    ]  # fmt: skip
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: DiscretePath([]), r"^betas must have shape \(T,\)"),
        (lambda: DiscretePath([[0.1]]), r"^betas must have shape \(T,\)"),
        (lambda: DiscretePath([0.1, 0.0]), r"^betas must lie in \(0, 1\]"),
        (lambda: DiscretePath([0.1, 1.01]), r"^betas must lie in \(0, 1\]"),
        (lambda: DiscretePath([0.1, -0.1]), r"^betas must lie in \(0, 1\]"),
        (lambda: DiscretePath([0.1, math.nan]), r"^betas must lie in \(0, 1\]"),
        (lambda: DiscretePath([1.0, 0.1]), "^betas may be 1 in the last step only"),
        (lambda: DiscretePath([0.1] * 5).times(6), "^steps must be a whole number from 1 to T = 5"),
        (lambda: VP(-0.1, 20), "^beta_min and beta_max"),
        (lambda: VP(3, 2), "^beta_min and beta_max"),
        (lambda: SubVP(0, 0), "^beta_min and beta_max"),
        (lambda: VE(0, 50), "^sigma_min and sigma_max"),
        (lambda: VE(2, 1), "^sigma_min and sigma_max"),
        (lambda: Sigmoid(3, -3), "^start, end and tau"),
        (lambda: Sigmoid(tau=0), "^start, end and tau"),
        (lambda: Cosine(shift=math.inf), "^shift must be finite; got inf"),
        (lambda: Cosine(shift=math.nan), "^shift must be finite; got nan"),
        (lambda: Scaled(DiscretePath([0.1, 0.2]), 0.5), "^path must be continuous, .*; got DiscretePath"),
        (lambda: Scaled(Cosine(), 0.0), "^scale must be positive; got 0.0"),
        (lambda: Scaled(Cosine(), -0.5), "^scale must be positive; got -0.5"),
        (lambda: Scaled(Cosine(), math.inf), "^scale must be positive; got inf"),
        (lambda: Scaled(Cosine(), math.nan), "^scale must be positive; got nan"),
    ],
)
def test_settings_are_checked(make, message):
    """A path that could not be one is refused when it is built, and the setting is named."""
    with pytest.raises(ValueError, match=message):
        make()


@all_paths
def test_repr_names_the_settings(name):
    """repr shows the class and its settings, as error messages quote it."""
    path = path_of(name)
    assert repr(path).startswith(type(path).__name__ + "(") and repr(path).endswith(")")
    assert "sigma_max=3.0" in repr(VE(0.1, 3.0)) and repr(DiscretePath([0.1] * 7)) == "DiscretePath(T=7)"
