"""The table of conversions, all 20 entries derived by hand: what a network predicts, from any of the five to any other.

From x_t = α x_0 + σ ε and v = α ε − σ x_0, s = −ε/σ, u = α' x_0 + σ' ε, with r² = α² + σ² and W = ασ' − α'σ:
f = α'/α and ½g² = σW/α. One of x_t's two unknowns is eliminated with the quantity that is given; the rest is put in.
"""

import math

import numpy as np
import pytest
import torch
from oracles import CONTINUOUS, MEANS, STDS, WEIGHTS, known, known_rates, mixture_mean, path_of

from dgm_course.denoisers import Denoiser, read_as

NAMES = ["VP", "SubVP", "VE", "Cosine", "Straight"]
QUANTITIES = ["eps", "x0", "v", "score", "velocity"]
PAIRS = [(given, to) for given in QUANTITIES for to in QUANTITIES if given != to]
INSIDE = [0.02, 0.3, 0.5, 0.85, 0.98]
every_path = pytest.mark.parametrize("name", NAMES)
every_pair = pytest.mark.parametrize("given, to", PAIRS)


class At:
    """α, σ, their rates, and what is made of them, at one time."""

    def __init__(self, name, t):
        self.a, self.s = known(name, t)
        self.a1, self.s1 = known_rates(name, t)
        self.r2 = self.a**2 + self.s**2
        self.w = self.a * self.s1 - self.a1 * self.s
        self.half = (self.a * self.a1 + self.s * self.s1) / self.r2  # (log r)'


TABLE = {
    ("eps", "x0"): lambda c, x, e: (x - c.s * e) / c.a,
    ("eps", "v"): lambda c, x, e: (c.r2 * e - c.s * x) / c.a,
    ("eps", "score"): lambda c, x, e: -e / c.s,
    ("eps", "velocity"): lambda c, x, e: (c.a1 * x + c.w * e) / c.a,
    ("x0", "eps"): lambda c, x, z: (x - c.a * z) / c.s,
    ("x0", "v"): lambda c, x, z: (c.a * x - c.r2 * z) / c.s,
    ("x0", "score"): lambda c, x, z: (c.a * z - x) / c.s**2,
    ("x0", "velocity"): lambda c, x, z: (c.s1 * x - c.w * z) / c.s,
    ("v", "eps"): lambda c, x, v: (c.s * x + c.a * v) / c.r2,
    ("v", "x0"): lambda c, x, v: (c.a * x - c.s * v) / c.r2,
    ("v", "score"): lambda c, x, v: -(x + c.a / c.s * v) / c.r2,
    ("v", "velocity"): lambda c, x, v: c.half * x + c.w / c.r2 * v,
    ("score", "eps"): lambda c, x, s: -c.s * s,
    ("score", "x0"): lambda c, x, s: (x + c.s**2 * s) / c.a,
    ("score", "v"): lambda c, x, s: -c.s * (x + c.r2 * s) / c.a,
    ("score", "velocity"): lambda c, x, s: c.a1 / c.a * x - c.s * c.w / c.a * s,
    ("velocity", "eps"): lambda c, x, u: (c.a * u - c.a1 * x) / c.w,
    ("velocity", "x0"): lambda c, x, u: (c.s1 * x - c.s * u) / c.w,
    ("velocity", "v"): lambda c, x, u: c.r2 / c.w * (u - c.half * x),
    ("velocity", "score"): lambda c, x, u: (c.a1 * x - c.a * u) / (c.s * c.w),
}


def close(actual, expected, tolerance=1e-9):
    size = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual / size, expected / size, rtol=tolerance, atol=tolerance)


def normals(*shape, generator):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_the_table_is_whole():
    """20 ordered pairs."""
    assert set(TABLE) == set(PAIRS) and len(PAIRS) == 20


@every_path
@every_pair
def test_table(name, given, to, generator):
    """Each entry is what `convert` does, for any numbers: both are linear in x_t and in what is given."""
    x, value = normals(3, 2, generator=generator), normals(3, 2, generator=generator)
    for t in INSIDE:
        close(path_of(name).convert(value, x, t, given, to), TABLE[given, to](At(name, t), x, value))
    t = torch.tensor(INSIDE[:3], dtype=torch.float64)
    each = [TABLE[given, to](At(name, u), x[i : i + 1], value[i : i + 1]) for i, u in enumerate(INSIDE[:3])]
    for found, expected in zip(path_of(name).convert(value, x, t, given, to), each, strict=True):
        close(found[None], expected)


@pytest.mark.parametrize("shape", [(4, 3), (2, 1, 2, 2)])
@every_path
def test_table_against_the_definitions(name, shape, generator):
    """The table itself: each entry gives back what x_0 and ε define."""
    x0, eps = normals(*shape, generator=generator), normals(*shape, generator=generator)
    for t in INSIDE:
        c = At(name, t)
        made = {
            "eps": eps,
            "x0": x0,
            "v": c.a * eps - c.s * x0,
            "score": -eps / c.s,
            "velocity": c.a1 * x0 + c.s1 * eps,
        }
        xt = c.a * x0 + c.s * eps
        for given, to in PAIRS:
            close(TABLE[given, to](c, xt, made[given]), made[to])


def posterior_means(name, t):
    """x_t, and E[· | x_t] of all five for a mixture: x_0 by Bayes in numpy, the score from differences of log p_t."""
    c, x = At(name, t), np.linspace(-2.2, 2.4, 9) * math.hypot(*known(name, t))

    def log_density(x):
        var = (c.a * STDS) ** 2 + c.s**2
        joint = WEIGHTS * np.exp(-0.5 * (x[:, None] - c.a * MEANS) ** 2 / var) / np.sqrt(var)
        return np.log(joint.sum(1))

    h = 1e-3 * c.s
    near, far = (log_density(x + k * h) - log_density(x - k * h) for k in (1, 2))
    score = (8 * near - far) / (12 * h)  # fourth order
    mean = mixture_mean(x, c.a, c.s)
    of_noise = -c.s * score
    means = {
        "x0": mean,
        "eps": of_noise,
        "score": score,
        "v": c.a * of_noise - c.s * mean,
        "velocity": c.a1 * mean + c.s1 * of_noise,
    }
    return torch.from_numpy(x)[:, None], {key: torch.from_numpy(value)[:, None] for key, value in means.items()}


@every_path
@pytest.mark.parametrize("t", [0.3, 0.5, 0.8])
def test_posterior_means(name, t):
    """The table holds for E[· | x_t] too, being linear: every pair of a mixture's means, of which two are worked out apart."""
    x, means = posterior_means(name, t)
    c = At(name, t)
    for given, to in PAIRS:
        close(path_of(name).convert(means[given], x, t, given, to), means[to], 1e-6)
        close(TABLE[given, to](c, x, means[given]), means[to], 1e-6)
    for predicts in QUANTITIES:
        d = Denoiser(lambda xt, t, said=means[predicts]: said, path_of(name), predicts)
        close(d(x, t), means["x0"], 1e-6)
        for quantity in QUANTITIES:
            close(read_as(quantity, d, path_of(name))(x, t), means[quantity], 1e-6)


@every_path
@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_velocity_is_the_drift_of_the_ode(name, t, generator):
    """u = f x − ½g² s, with f = (log α)' and g² = (σ²)' − 2fσ² by autograd through the closed forms."""
    time = torch.tensor(t, dtype=torch.float64, requires_grad=True)
    alpha, sigma = CONTINUOUS[name][1](torch, time)
    (f,) = torch.autograd.grad(alpha.log(), time, retain_graph=True)
    (rate,) = torch.autograd.grad(sigma**2, time)
    g2 = rate - 2 * f * sigma.detach() ** 2
    x, score = normals(3, 2, generator=generator), normals(3, 2, generator=generator)
    close(path_of(name).convert(score, x, t, "score", "velocity"), f * x - g2 / 2 * score)
    close(path_of(name).convert(f * x - g2 / 2 * score, x, t, "velocity", "score"), score)


# Where two things are one ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, factor", [("VP", None), ("Cosine", math.pi / 2)])
def test_v_and_velocity_on_the_circle(name, factor, generator):
    """Where α² + σ² = 1 the velocity is W·v, π/2·v on the cosine path: x_t is not needed."""
    v = normals(3, 2, generator=generator)
    for t in INSIDE:
        w = factor or At(name, t).w
        for x in (0 * v, 5 + v):
            close(path_of(name).convert(v, x, t, "v", "velocity"), w * v)
            close(path_of(name).convert(w * v, x, t, "velocity", "v"), v)
    assert abs(At("SubVP", 0.5).half) > 0.1 and abs(At("Straight", 0.3).half) > 0.1  # off the circle it is needed


def test_v_and_velocity_cross_once_on_the_straight_path(generator):
    """u = ε − x_0 and v = (1−t)ε − t·x_0 are parallel at t = ½ only, u = 2v, and nothing goes wrong there."""
    x, v = normals(3, 2, generator=generator), normals(3, 2, generator=generator)
    close(path_of("Straight").convert(v, x, 0.5, "v", "velocity"), 2 * v)
    close(path_of("Straight").convert(2 * v, x, 0.5, "velocity", "v"), v)


def test_velocity_of_exploding_noise(generator):
    """On VE α' = 0: the velocity is σ'ε, whatever x_t is."""
    eps = normals(3, 2, generator=generator)
    for t in INSIDE:
        rate = At("VE", t).s1
        for x in (0 * eps, 5 + eps):
            close(path_of("VE").convert(eps, x, t, "eps", "velocity"), rate * eps)
            close(path_of("VE").convert(rate * eps, x, t, "velocity", "eps"), eps)


# Where there is no answer ---------------------------------------------------------------------------------------------

AT_THE_DATA = {
    # t = 0, σ = 0 and α = 1: x_t is x_0 itself and holds nothing of ε; there is no score. Where σ' is infinite (VP, VE)
    # there is no velocity either; elsewhere (x_t, velocity) and (x_t, v) give everything but the score.
    "VP": {("eps", "x0"), ("eps", "v"), ("v", "eps"), ("v", "x0")},
    "VE": {("eps", "x0"), ("eps", "v"), ("v", "eps"), ("v", "x0")},
    **dict.fromkeys(
        ["SubVP", "Cosine", "Straight"],
        {(given, to) for given in ("eps", "v", "velocity") for to in ("eps", "x0", "v", "velocity") if given != to},
    ),
}
AT_THE_NOISE = {
    # t = 1. On VP, SubVP and VE some signal is left: all 20. On the others α = 0 and σ = 1: x_t is ε itself and holds
    # nothing of x_0; ε and the score, one thing in two units, still give each other.
    **dict.fromkeys(["VP", "SubVP", "VE"], set(PAIRS)),
    **dict.fromkeys(
        ["Cosine", "Straight"],
        {(given, to) for given, to in PAIRS if given in ("x0", "v", "velocity")} | {("eps", "score"), ("score", "eps")},
    ),
}


def limits(name, t):
    """(α, σ, α', σ') at an end, by hand."""
    turn, growth = math.pi / 2, math.log(5000)
    alpha = math.exp(-10.05 / 2)
    return {
        ("Cosine", 0): (1, 0, 0, turn),
        ("Cosine", 1): (0, 1, -turn, 0),
        ("Straight", 0): (1, 0, -1, 1),
        ("Straight", 1): (0, 1, -1, 1),
        ("VP", 0): (1, 0, -0.05, math.inf),
        ("VP", 1): (alpha, math.sqrt(1 - alpha**2), -10 * alpha, 10 * alpha**2 / math.sqrt(1 - alpha**2)),
        ("SubVP", 0): (1, 0, -0.05, 0.1),
        ("SubVP", 1): (alpha, 1 - alpha**2, -10 * alpha, 20 * alpha**2),
        ("VE", 0): (1, 0, 0, math.inf),
        ("VE", 1): (1, 0.01 * math.sqrt(5000**2 - 1), 0, 0.01 * growth * 5000**2 / math.sqrt(5000**2 - 1)),
    }[name, t]


@every_path
@pytest.mark.parametrize("end", [0, 1])
@every_pair
@pytest.mark.parametrize("announced", [False, True])
def test_ends(name, end, given, to, announced, generator):
    """At both ends each pair either has its value, from the definitions, or raises, alone, announced and in a batch."""
    path = path_of(name)
    path.tabulate(torch.tensor([1.0, 0.5, 0.0] if announced else [0.5]))
    x0, eps = normals(2, 3, generator=generator), normals(2, 3, generator=generator)
    a, s, a1, s1 = limits(name, end)
    xt = a * x0 + s * eps
    defined = (given, to) in (AT_THE_NOISE if end else AT_THE_DATA)[name]
    if defined:
        made = {"eps": eps, "x0": x0, "v": a * eps - s * x0}
        if s:
            made["score"] = -eps / s
        if math.isfinite(s1):
            made["velocity"] = a1 * x0 + s1 * eps
        for t in (float(end), torch.full((2,), float(end))):
            close(path.convert(made[given], xt, t, given, to), made[to])
    else:
        for t in (float(end), torch.tensor([0.5, float(end)])):
            with pytest.raises(ValueError, match=rf"x_t and {given} do not determine {to} at t = \[{end}\.0\]"):
                path.convert(x0, xt, t, given, to)


@every_path
def test_no_gap_inside(name):
    """Inside all 20 are defined: no determinant is 0. Those of x_t with ε, x_0, v, score, velocity are α, −σ, r², −α/σ, W.

    W = −½ασ·(log SNR)' is above 0 as long as the log-SNR falls; by hand ½(β/σ)α, ½βα(1 + α²), σ', π/2 and 1.
    """
    for t in np.linspace(0.001, 0.999, 41).tolist():
        c = At(name, t)
        beta = 0.1 + 19.9 * t
        w = {
            "VP": beta * c.a / (2 * c.s),
            "SubVP": beta * c.a * (1 + c.a**2) / 2,
            "VE": c.s1,
            "Cosine": math.pi / 2,
            "Straight": 1.0,
        }[name]
        assert c.w == pytest.approx(w, rel=1e-9)
        assert min(c.a, c.s, c.r2, c.a / c.s, c.w) > 1e-5
        one = torch.ones(1, 1, dtype=torch.float64)
        for given, to in PAIRS:
            assert path_of(name).convert(one, one, t, given, to).isfinite().all()
