"""The probability-flow ODE against torchdiffeq: end points, and the density with its divergence from torch.func.

What they are given is not made by our kernels where it can be helped: the velocity of the mixture is f x − ½g² ∇log p_t(x) with
the coefficients and the score typed here, its divergence by torch.func. A network has no such form;
there the score is read from its output by hand, and the divergence is the trace of the whole Jacobian.

Where the conventions differ:
- Their "rk4" is the 3/8 rule, ours the classical one: with the same steps the two agree to the order only. The classical
  rule is typed here once more, and agrees to rounding.
- Their dopri5 chooses its steps. With tolerances of 1e-9 it stands for the exact solution.
"""

import math

import pytest
import torch
from torchdiffeq import odeint

from dgm_course.denoisers import Denoiser, read_as
from dgm_course.likelihood import ode_log_prob
from dgm_course.paths import VE, VP, Cosine, Straight
from dgm_course.samplers import heun, last
from dgm_course.toy import GaussianMixture

MEANS = torch.tensor([[-1.5, 0.0], [1.0, 1.0], [0.5, -1.2]], dtype=torch.float64)
VARIANCES = torch.tensor([0.1, 0.2, 0.15], dtype=torch.float64)
WEIGHTS = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
LAW = GaussianMixture(MEANS, VARIANCES, WEIGHTS)
PRECISE = {"method": "dopri5", "rtol": 1e-9, "atol": 1e-9}


def vp(t):
    """α, σ², f and g² of VP."""
    alpha = math.exp(-0.5 * (0.1 * t + 9.95 * t**2))
    beta = 0.1 + 19.9 * t
    return alpha, 1 - alpha**2, -beta / 2, beta


def ve(t):
    growth = math.log(50 / 0.01)
    return 1.0, 1e-4 * math.expm1(2 * t * growth), 0.0, 1e-4 * 2 * growth * math.exp(2 * t * growth)


def cosine(t):
    turn = math.pi / 2
    return math.cos(turn * t), math.sin(turn * t) ** 2, -turn * math.tan(turn * t), 2 * turn * math.tan(turn * t)


def straight(t):
    return 1 - t, t**2, -1 / (1 - t), 2 * t / (1 - t)


PATHS = {"VP": (VP(), vp), "VE": (VE(), ve), "Cosine": (Cosine(), cosine), "Straight": (Straight(), straight)}
every_path = pytest.mark.parametrize("name", PATHS)


def typed_velocity(closed):
    """(x, t) → f x − ½g² ∇log p_t(x) for one sample x of shape (2,)."""

    def velocity(x, t):
        alpha, var, f, g2 = closed(t)
        total = alpha**2 * VARIANCES + var

        away = x - alpha * MEANS
        share = (WEIGHTS.log() - 0.5 * away.square().sum(1) / total - total.log()).softmax(0)
        return f * x + g2 / 2 * (share / total) @ away

    return velocity


def rates_of(velocity):
    """(t, (x, ∫ div u)) → (u, div u), with the whole Jacobian of each sample."""

    def twice(row, t):
        u = velocity(row, t)
        return u, u

    def rates(t, state):
        jacobian = torch.func.jacrev(twice, has_aux=True)
        jacobians, u = torch.func.vmap(lambda row: jacobian(row, float(t)))(state[0])
        return u, jacobians.flatten(1).reshape(len(u), u[0].numel(), -1).diagonal(dim1=1, dim2=2).sum(1)

    return rates


def their_flow(velocity, x, start, stop, **options):
    """States at `stop` of samples that are at x at `start`, and ∫ div u dt on the way, by their solver."""
    times = torch.tensor([start, stop], dtype=torch.float64)
    state = x, torch.zeros(len(x), dtype=x.dtype)
    states, changes = odeint(rates_of(velocity), state, times, **(options or PRECISE))
    return states[-1], changes[-1]


def log_normal(x):
    return torch.distributions.Normal(0.0, 1.0).log_prob(x).flatten(1).sum(1)


def grid(steps, start, stop):
    return torch.linspace(start, stop, steps + 1, dtype=torch.float64)


@every_path
def test_density_of_a_mixture(name):
    """log p(x_1) + ∫ div u dt by dopri5 from t = 0.2 to 0.8: 1e-7 in float64 and 1e-5 in float32, relative to its size."""
    path, closed = PATHS[name]
    x = LAW.sample(8, torch.Generator().manual_seed(0))
    end, change = their_flow(typed_velocity(closed), x, 0.2, 0.8)
    alpha, var, *_ = closed(0.8)
    std = math.hypot(alpha, math.sqrt(var))  # N(0, std²) stands for p_1, so that VE's nats are not in the thousands
    theirs = log_normal(end / std) - 2 * math.log(std) + change

    def prior(x):
        return torch.distributions.Normal(0.0, std).log_prob(x).sum(1)

    for dtype, tolerance, steps in ((torch.float64, 1e-7, 160), (torch.float32, 1e-5, 40)):
        ours = ode_log_prob(LAW.denoiser(path), path, x.to(dtype), grid(steps, 0.8, 0.2), prior_log_prob=prior)
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("predicts", ["eps", "v"])
def test_density_of_a_network(predicts):
    """The same for an untrained network on images of 1×2×3 values, whose output is turned into a score by hand."""
    g = torch.Generator().manual_seed(1)
    inner, outer = torch.randn(2, 6, 6, generator=g, dtype=torch.float64) / 2

    def net(xt, t):
        return (torch.tanh(xt.flatten(1) @ inner + t.double()[:, None]) @ outer).reshape(xt.shape)

    def velocity(x, t):
        alpha, var, f, g2 = vp(t)
        said = net(x[None], torch.tensor([t]))[0]
        score = -said / math.sqrt(var) if predicts == "eps" else -x - alpha / math.sqrt(var) * said
        return f * x - g2 / 2 * score

    x = torch.randn(4, 1, 2, 3, generator=g, dtype=torch.float64)
    end, change = their_flow(velocity, x, 0.2, 0.8)
    ours = ode_log_prob(Denoiser(net, VP(), predicts), VP(), x, grid(60, 0.8, 0.2))
    torch.testing.assert_close(ours, log_normal(end) + change, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", ["VP", "Straight"])
def test_fixed_steps_of_order_four(name):
    """With N equal steps both rules err by O(N⁻⁴), by different amounts: their distance falls about 16-fold from N to 2N."""
    path, closed = PATHS[name]
    x = LAW.sample(8, torch.Generator().manual_seed(0))
    distances = []
    for steps in (10, 20, 40):
        options = {"method": "rk4", "options": {"step_size": (0.8 - 0.2) / steps}}
        end, change = their_flow(typed_velocity(closed), x, 0.2, 0.8, **options)
        ours = ode_log_prob(LAW.denoiser(path), path, x, grid(steps, 0.8, 0.2))
        distances.append((ours - log_normal(end) - change).abs().mean().item())
    assert distances[-1] > 1e-11
    for first, second in zip(distances[:-1], distances[1:], strict=True):
        assert abs(math.log2(first / second) - 4) < 0.5, distances


@every_path
def test_classical_rule(name):
    """The rule of 1/6, 1/3, 1/3, 1/6 for state and integral as one vector, on uneven steps: the same nats, up to rounding."""
    path, closed = PATHS[name]
    x = LAW.sample(8, torch.Generator().manual_seed(0))
    times, rates = [0.2, 0.25, 0.4, 0.5, 0.8], rates_of(typed_velocity(closed))

    def slope(t, state):
        u, div = rates(t, (state[:, :2],))
        return torch.cat([u, div[:, None]], 1)

    state = torch.cat([x, torch.zeros(8, 1, dtype=torch.float64)], 1)
    for t, h in zip(times[:-1], torch.tensor(times, dtype=torch.float64).diff().tolist(), strict=True):
        a = slope(t, state)
        b = slope(t + h / 2, state + h / 2 * a)
        c = slope(t + h / 2, state + h / 2 * b)
        state = state + h * (a / 6 + b / 3 + c / 3 + slope(t + h, state + h * c) / 6)
    ours = ode_log_prob(LAW.denoiser(path), path, x, times[::-1])
    torch.testing.assert_close(ours, log_normal(state[:, :2]) + state[:, 2], rtol=1e-10, atol=1e-10)


@every_path
def test_end_points_of_heun(name):
    """Our second-order sampler tends to their solution: its distance falls fourfold when the steps double."""
    path, closed = PATHS[name]
    g = torch.Generator().manual_seed(2)
    start = path.perturb(LAW.sample(8, g), 0.8, torch.randn(8, 2, generator=g, dtype=torch.float64))
    theirs, _ = their_flow(typed_velocity(closed), start, 0.8, 0.1)
    u = read_as("velocity", LAW.denoiser(path), path)
    times = torch.tensor([0.8, 0.1], dtype=torch.float64)
    again = odeint(lambda t, x: u(x, t.item()), start, times, **PRECISE)[-1]
    torch.testing.assert_close(again, theirs, rtol=1e-6, atol=1e-6)  # the same ODE, read from the denoiser
    errors = []
    for steps in (50, 100, 200):
        ours = last(heun(LAW.denoiser(path), path, start, grid(steps, 0.8, 0.1)))
        errors.append((ours - theirs).abs().mean().item())
    assert errors[-1] < 2e-3
    for first, second in zip(errors[:-1], errors[1:], strict=True):
        assert abs(math.log2(first / second) - 2) < 0.3, errors
