"""What the tests know without the package: closed forms in 40 digits, attention by loops, Bayes on a grid, a mixture and its exact flow.

Nothing here calls a kernel for an expected value; paths are built here only to stand beside their closed forms.
"""

import math

import mpmath
import numpy as np
import scipy.integrate
import torch

from dgm_course.paths import VE, VP, Cosine, DiscretePath, Scaled, Sigmoid, Straight, SubVP

mp = mpmath.mp.clone()
mp.dps = 40

# Paths, written a second time -----------------------------------------------------------------------------------------
# Each closed form gives (alpha, sigma) and takes the module of its functions first: `mp` for digits, `torch` for autograd.


def _vp(m, t, first=0.1, last=20.0):
    integral = first * t + (last - first) * t * t / 2
    return m.exp(-integral / 2), m.sqrt(1 - m.exp(-integral))


def _sub_vp(m, t):
    alpha, sigma = _vp(m, t)
    return alpha, sigma * sigma


def _ve(m, t, low=0.01, high=50.0):
    return 1 + 0 * t, m.sqrt(low**2 * (m.exp(2 * t * math.log(high / low)) - 1))


def _cosine(m, t):
    return m.cos(m.pi * t / 2), m.sin(m.pi * t / 2)


def _cosine_shifted(m, t, shift=-2.0):
    noise_to_signal = math.exp(-shift / 2) * m.tan(m.pi * t / 2)
    alpha = 1 / m.sqrt(1 + noise_to_signal**2)
    return alpha, alpha * noise_to_signal


def _scaled(m, t, scale=0.5):
    return scale * m.cos(m.pi * t / 2), m.sin(m.pi * t / 2)


def _sigmoid(m, t, start=-3.0, end=3.0, tau=1.0):
    one = 0 * t + 1

    def s(u):
        return 1 / (1 + m.exp(-u / tau))

    kept = (s(end * one) - s(start + t * (end - start))) / (s(end * one) - s(start * one))
    return m.sqrt(kept), m.sqrt(1 - kept)


def _straight(m, t):
    return 1 - t, t


CHAIN_BETAS = [0.001 + 0.3 * (k / 19) ** 2 for k in range(20)]


def _chain(m, t):
    abar = mp.mpf(1)
    for beta in CHAIN_BETAS[: int(t)]:
        abar *= 1 - mp.mpf(beta)
    return mp.sqrt(abar), mp.sqrt(1 - abar)


CONTINUOUS = {
    "VP": (VP(), _vp),
    "VP gentle": (VP(0.5, 8.0), lambda m, t: _vp(m, t, 0.5, 8.0)),
    "SubVP": (SubVP(), _sub_vp),
    "VE": (VE(), _ve),
    "VE narrow": (VE(0.1, 3.0), lambda m, t: _ve(m, t, 0.1, 3.0)),
    "Cosine": (Cosine(), _cosine),
    "Cosine shifted": (Cosine(shift=-2.0), _cosine_shifted),
    "Scaled": (Scaled(Cosine(), 0.5), _scaled),
    "Sigmoid": (Sigmoid(), _sigmoid),
    "Sigmoid skew": (Sigmoid(-1.0, 2.3, 0.7), lambda m, t: _sigmoid(m, t, -1.0, 2.3, 0.7)),
    "Straight": (Straight(), _straight),
}
PATHS = {**CONTINUOUS, "chain": (DiscretePath(CHAIN_BETAS), _chain)}


def path_of(name: str):
    return PATHS[name][0]


def time_on(name: str, unit: float) -> float | int:
    """The time that lies at `unit` ∈ [0, 1] of the way to the noise; a whole number on the chain."""
    return round(20 * unit) if name == "chain" else unit


def known(name: str, t) -> tuple[float, float]:
    """α and σ at t from the closed form, evaluated with 40 digits."""
    alpha, sigma = PATHS[name][1](mp, mp.mpf(t))
    return float(alpha), float(sigma)


def known_rates(name: str, t) -> tuple[float, float]:
    """α' and σ' at an inner t, from the closed form."""
    closed = PATHS[name][1]
    return float(mp.diff(lambda u: closed(mp, u)[0], mp.mpf(t))), float(mp.diff(lambda u: closed(mp, u)[1], mp.mpf(t)))


def lookup(name: str, times, which) -> torch.Tensor:
    """A closed form over several times, float64, shape (len(times),) of alpha or sigma (`which` 0 or 1)."""
    return torch.tensor([known(name, t)[which] for t in times], dtype=torch.float64)


# Attention, by loops --------------------------------------------------------------------------------------------------


def typed_attention(attention, h, context=None, prefix=None, causal=False):
    """Head by head, token by token, by numpy: the weights (B, heads, N, P + M) and the output (B, N, width).

    The maps of `attention` are its layers `query`, `key`, `value` and `out`. A prefix, (2, P, width), stands before the keys and
    values of the context, h itself if not given; with `causal` a token sees the prefix, itself and what stands before it.
    """
    own = {name: value.detach().numpy() for name, value in attention.named_parameters()}
    context = h if context is None else context
    q, k, v = (
        x.detach().numpy() @ own[f"{name}.weight"].T + own[f"{name}.bias"]
        for name, x in (("query", h), ("key", context), ("value", context))
    )
    length = 0 if prefix is None else prefix.shape[1]
    if length:
        k, v = (
            np.concatenate([np.broadcast_to(part, (len(q), *part.shape)), x], axis=1)
            for part, x in zip(prefix.detach().numpy(), (k, v), strict=True)
        )
    heads, d = attention.heads, q.shape[2] // attention.heads
    weights, mixed = np.zeros((len(q), heads, q.shape[1], k.shape[1])), np.zeros(q.shape)
    for b, head, n in np.ndindex(weights.shape[:3]):
        part = slice(head * d, (head + 1) * d)
        seen = range(length + n + 1 if causal else k.shape[1])
        score = [np.exp(q[b, n, part] @ k[b, m, part] / np.sqrt(d)) for m in seen]
        weights[b, head, n, : len(seen)] = np.array(score) / sum(score)
        mixed[b, n, part] = sum(weights[b, head, n, m] * v[b, m, part] for m in seen)
    return torch.from_numpy(weights), torch.from_numpy(mixed @ own["out.weight"].T + own["out.bias"])


# Bayes, twice ---------------------------------------------------------------------------------------------------------


def forward_kernel(name: str, s, t) -> tuple[float, float]:
    """a and v of q(x_t | x_s) = N(a·x_s, v), from the closed form; on the chain by walking it step by step."""
    if name == "chain":
        a, v = mp.mpf(1), mp.mpf(0)
        for beta in CHAIN_BETAS[s:t]:
            a, v = a * mp.sqrt(1 - mp.mpf(beta)), (1 - mp.mpf(beta)) * v + mp.mpf(beta)
        return float(a), float(v)
    alpha_s, sigma_s = PATHS[name][1](mp, mp.mpf(s))
    alpha_t, sigma_t = PATHS[name][1](mp, mp.mpf(t))
    a = alpha_t / alpha_s
    return float(a), float(sigma_t**2 - a**2 * sigma_s**2)


def bayes_on_a_grid(alpha_s, sigma_s, a, v, xt, x0) -> tuple[float, float]:
    """Mean and variance of x_s given x_t and x_0 by brute force: prior times likelihood on 40,001 points."""
    grid = alpha_s * x0 + sigma_s * np.linspace(-12, 12, 40_001)
    log_weight = -0.5 * ((grid - alpha_s * x0) / sigma_s) ** 2 - 0.5 * (xt - a * grid) ** 2 / v
    weight = np.exp(log_weight - log_weight.max())
    weight /= weight.sum()
    mean = (weight * grid).sum()
    return mean, (weight * (grid - mean) ** 2).sum()


# A mixture in one dimension, written with numpy -----------------------------------------------------------------------

WEIGHTS, MEANS, STDS = np.array([0.3, 0.5, 0.2]), np.array([-1.5, 0.3, 2.0]), np.array([0.4, 0.25, 0.5])


def mixture_mean(x: np.ndarray, alpha: float, sigma: float) -> np.ndarray:
    """E[x_0 | x_t = x] for the mixture above, x of shape (B,)."""
    var = (alpha * STDS) ** 2 + sigma**2
    away = x[:, None] - alpha * MEANS
    log_joint = np.log(WEIGHTS) - 0.5 * np.log(var) - 0.5 * away**2 / var
    joint = np.exp(log_joint - log_joint.max(1, keepdims=True))
    joint /= joint.sum(1, keepdims=True)
    return (joint * (MEANS + alpha * STDS**2 / var * away)).sum(1)


def mixture_denoiser(path):
    """The same as a denoiser for tensors (B, 1); α and σ come from the path, whose closed forms are tested."""

    def denoise(xt, t):
        mean = mixture_mean(xt[:, 0].double().numpy(), path.alpha(t).item(), path.sigma(t).item())
        return torch.from_numpy(mean)[:, None].to(xt)

    return denoise


LAMBDA_START, LAMBDA_END = -2.5, 3.0


def exact_flow(start: np.ndarray) -> np.ndarray:
    """x/α at λ = 3 of the probability-flow ODE that starts at x/α = `start` at λ = −2.5; the same for every path.

    In x̄ = x/α and λ = log(α/σ) the ODE is dx̄/dλ = E[x_0 | x̄] − x̄.
    """

    def slope(lam, x):
        return mixture_mean(x, 1.0, math.exp(-lam)) - x

    span = (LAMBDA_START, LAMBDA_END)
    return scipy.integrate.solve_ivp(slope, span, start, method="DOP853", rtol=1e-12, atol=1e-13).y[:, -1]


def time_of_lambda(name: str, lam: torch.Tensor) -> torch.Tensor:
    """The time where log(α/σ) = λ, solved by hand for three paths."""
    if name == "Cosine":
        return torch.atan(torch.exp(-lam)) * 2 / math.pi
    if name == "Straight":
        return 1 / (1 + torch.exp(lam))
    integral = torch.log1p(torch.exp(-2 * lam))  # VP: α² = 1/(1 + e^{−2λ}) = e^{−integral}
    return (-0.1 + torch.sqrt(0.01 + 2 * 19.9 * integral)) / 19.9


def order_of(solve, name: str = "Cosine", steps: int = 40) -> list[float]:
    """Slopes of log₂ error over two halvings of the step; `solve(denoiser, path, x, times) -> x` at the last time."""
    path = CONTINUOUS[name][0]
    x = np.linspace(-1.8, 1.8, 13) * math.hypot(1, math.exp(-LAMBDA_START))
    reference, errors = exact_flow(x), []
    for count in (steps, 2 * steps, 4 * steps):
        times = time_of_lambda(name, torch.linspace(LAMBDA_START, LAMBDA_END, count + 1, dtype=torch.float64))
        first, end = times[0].item(), times[-1].item()
        state = torch.from_numpy(x)[:, None] * CONTINUOUS[name][1](torch, times[0])[0]
        out = solve(mixture_denoiser(path), path, state, times)[:, 0].numpy() / known(name, end)[0]
        errors.append(np.abs(out - reference).mean())
        assert first > end
    return [math.log2(errors[i] / errors[i + 1]) for i in (0, 1)]
