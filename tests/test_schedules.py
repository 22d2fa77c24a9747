"""Noise schedules against their formulas in 40 digits and the figures that are known of them."""

import math

import numpy as np
import pytest
import torch
from oracles import mp

from dgm_course.denoisers import Denoiser, clipped
from dgm_course.paths import DiscretePath
from dgm_course.schedules import (
    constant_betas,
    cosine_betas,
    linear_betas,
    quadratic_betas,
    sigmoid_betas,
    zero_terminal,
)

EVERY = [constant_betas, linear_betas, quadratic_betas, cosine_betas, sigmoid_betas]


def cosine_signal(t: int, T: int, offset: float = 0.008):
    """cos² of the paper, without its division by the value at 0, which cancels in every β."""
    return mp.cos((mp.mpf(t) / T + mp.mpf(offset)) / (1 + mp.mpf(offset)) * mp.pi / 2) ** 2


def sigmoid_signal(t: int, T: int, start=-3.0, end=3.0, tau=1.0):
    """γ of Chen's Algorithm 1 without its clip."""

    def s(u):
        return 1 / (1 + mp.exp(-mp.mpf(u) / mp.mpf(tau)))

    return (s(end) - s(start + mp.mpf(t) / T * (end - start))) / (s(end) - s(start))


@pytest.mark.parametrize("schedule", EVERY)
@pytest.mark.parametrize("T", [20, 100, 1000])
def test_every_schedule_is_a_chain(schedule, T):
    """T values in (0, 1], float64, that make a DiscretePath whose ᾱ_t falls from 1."""
    betas = schedule(T)
    assert betas.shape == (T,) and betas.dtype == torch.float64
    assert bool(((betas > 0) & (betas <= 1)).all())
    assert bool((DiscretePath(betas).alpha_bars.diff() < 0).all())


def test_linear():
    """β_t in even steps from 1e-4 to 0.02; ᾱ_T = 4.04e-5."""
    betas = linear_betas(1000)
    np.testing.assert_allclose(betas, [1e-4 + (0.02 - 1e-4) * k / 999 for k in range(1000)], rtol=1e-13)
    abar = mp.mpf(1)
    for k in range(1000):
        abar *= 1 - (mp.mpf(1) / 10_000 + mp.mpf(199) / 10_000 * k / 999)
    assert (1 - betas).prod().item() == pytest.approx(float(abar), rel=1e-11)
    assert float(abar) == pytest.approx(4.04e-5, abs=5e-8)


def test_constant_and_quadratic():
    """One β for all; even steps of √β between the linear schedule's ends, hence less noise early."""
    np.testing.assert_allclose(constant_betas(1000), np.full(1000, 0.01), rtol=1e-14)
    roots = [math.sqrt(1e-4) + (math.sqrt(0.02) - math.sqrt(1e-4)) * k / 999 for k in range(1000)]
    np.testing.assert_allclose(quadratic_betas(1000), np.square(roots), rtol=1e-12)
    assert bool((quadratic_betas(1000)[1:-1] < linear_betas(1000)[1:-1]).all())


@pytest.mark.parametrize("schedule", [constant_betas, linear_betas, quadratic_betas])
@pytest.mark.parametrize("T", [50, 100, 4000])
def test_another_length_adds_as_much_noise(schedule, T):
    """β scales with 1000/T: the ends do exactly, and Σβ, which is −log ᾱ_T to first order, stays within 2 %."""
    betas, published = schedule(T), schedule(1000)
    assert betas[0].item() == pytest.approx(1000 / T * published[0].item(), rel=1e-12)
    assert betas[-1].item() == pytest.approx(1000 / T * published[-1].item(), rel=1e-12)
    assert betas.sum().item() == pytest.approx(published.sum().item(), rel=0.02)


@pytest.mark.parametrize("T", [10, 1000])
@pytest.mark.parametrize("offset", [0.008, 0.0, 0.1])
def test_cosine(T, offset):
    """1 − f(t)/f(t−1) in 40 digits, all but the last value, which is clipped."""
    betas = cosine_betas(T, offset)
    expected = [float(1 - cosine_signal(t, T, offset) / cosine_signal(t - 1, T, offset)) for t in range(1, T)]
    np.testing.assert_allclose(betas[:-1], expected, rtol=1e-9)
    assert betas[-1].item() == 0.999


def test_cosine_clips_exactly_one():
    """One of 1000 betas is clipped; the noise-to-signal ratio jumps there from 642 to 20291."""
    betas = cosine_betas(1000)
    assert (betas >= 0.999).sum().item() == 1
    path = DiscretePath(betas)
    assert (path.sigma(1000) / path.alpha(1000)).item() == pytest.approx(20291, abs=0.5)
    assert (path.sigma(999) / path.alpha(999)).item() == pytest.approx(642, abs=0.5)


@pytest.mark.parametrize("settings", [(), (-1.0, 2.0, 0.5), (0.0, 3.0, 0.3)])
def test_sigmoid(settings):
    """ᾱ_t follows the logistic function until the last step, which is clipped."""
    betas = sigmoid_betas(200, *settings)
    expected = [float(sigmoid_signal(t, 200, *settings)) for t in range(201)]
    np.testing.assert_allclose((1 - betas).cumprod(0)[:-1], expected[1:-1], rtol=1e-10)
    assert betas[-1].item() == 0.999 and (betas >= 0.999).sum().item() == 1


@pytest.mark.parametrize("schedule", [cosine_betas, sigmoid_betas])
def test_without_a_clip_no_signal_is_left(schedule):
    """clip = 1 gives β_T = 1 exactly, so ᾱ_T = 0."""
    betas = schedule(100, clip=1.0)
    assert betas[-1].item() == 1 and DiscretePath(betas).alpha_bars[-1].item() == 0


# No signal at the end -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", EVERY)
@pytest.mark.parametrize("T", [30, 300])
def test_zero_terminal(schedule, T):
    """√ᾱ goes through one affine map that keeps its first value and takes its last to 0, in 40 digits; ᾱ_T is 0 exactly."""
    betas = schedule(T)
    before, left = betas.clone(), [mp.mpf(1)]
    for beta in betas.tolist():
        left.append(left[-1] * (1 - mp.mpf(beta)))
    left = [mp.sqrt(share) for share in left[1:]]
    slope = left[0] / (left[0] - left[-1])
    moved = zero_terminal(betas)
    path = DiscretePath(moved)
    assert torch.equal(betas, before) and moved.shape == (T,) and moved.dtype == torch.float64
    expected = [float(slope * (alpha - left[-1])) for alpha in left]
    np.testing.assert_allclose(path.alpha(torch.arange(1, T + 1)), expected, rtol=0, atol=1e-13)
    assert path.alpha(T).item() == 0 == path.alpha_bars[-1] and moved[-1].item() == 1
    assert path.alpha_bars[1].item() == pytest.approx(1 - before[0].item(), rel=1e-13)
    assert bool((path.alpha_bars.diff() < 0).all())
    assert path.logsnr(T).item() == -math.inf


def test_zero_terminal_takes_the_rest_of_the_signal():
    """DDPM's linear chain leaves √4.04e-5 of the data at T; before that less is taken, the less the earlier."""
    before, after = DiscretePath(linear_betas(1000)), DiscretePath(zero_terminal(linear_betas(1000)))
    t = torch.arange(2, 1001)
    lost = before.alpha(t) - after.alpha(t)
    assert 0 < lost.min() < 1e-6 and bool((lost.diff() > 0).all())
    assert lost.max().item() == pytest.approx(math.sqrt(4.04e-5), rel=1e-3)


def test_zero_terminal_twice_is_once():
    """A schedule that ends without signal stays as it is; a list will do."""
    once = zero_terminal([0.1, 0.2, 0.3])
    np.testing.assert_allclose(zero_terminal(once), once, rtol=0, atol=1e-14)
    np.testing.assert_allclose(zero_terminal([0.1, 1.0]), [0.1, 1.0], rtol=0, atol=1e-15)


@pytest.mark.parametrize("predicts", ["eps", "score", "v", "x0"])
def test_what_can_be_predicted_from_pure_noise(predicts):
    """At T the noise says nothing of the data and raises; v is −x_0 there, and x_0 itself."""
    path, x = DiscretePath(zero_terminal(linear_betas(50))), torch.tensor([[0.3], [-0.8]], dtype=torch.float64)
    d = Denoiser(lambda xt, t: x, path, predicts)
    if predicts in ("eps", "score"):
        for denoiser in (d, clipped(d)):
            with pytest.raises(ValueError, match=f"x_t and {predicts} do not determine x0"):
                denoiser(torch.ones(2, 1, dtype=torch.float64), 50)
    else:
        guess = d(torch.ones(2, 1, dtype=torch.float64), 50)
        np.testing.assert_allclose(guess, -x if predicts == "v" else x, rtol=0, atol=1e-15)


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", EVERY)
@pytest.mark.parametrize("T", [0, -5, 10.0, "10", None])
def test_length_is_checked(schedule, T):
    """T must be a positive whole number."""
    with pytest.raises(ValueError, match="^T must be a whole number"):
        schedule(T)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: linear_betas(19), r"^last, scaled by 1000/T, must lie in \(0, 1\]; got 1.05263 for T = 19"),
        (lambda: constant_betas(9), r"must lie in \(0, 1\]"),
        (lambda: quadratic_betas(10), "^last"),
        (lambda: linear_betas(1000, first=0.0), "^first"),
        (lambda: linear_betas(1000, last=-0.1), "^last"),
        (lambda: linear_betas(1000, first=math.nan), "^first"),
        (lambda: cosine_betas(10, offset=-0.1), "^offset"),
        (lambda: cosine_betas(10, clip=1.1), "^clip"),
        (lambda: cosine_betas(10, clip=0), "^clip"),
        (lambda: sigmoid_betas(10, clip=0), "^clip"),
        (lambda: sigmoid_betas(10, start=3, end=-3), "^start, end and tau"),
        (lambda: sigmoid_betas(10, tau=0), "^start, end and tau"),
        (lambda: zero_terminal([0.1]), "^betas must be at least two; got 1"),
        (lambda: zero_terminal([]), "^betas must have shape"),
        (lambda: zero_terminal(torch.zeros(3)), r"^betas must lie in \(0, 1\]"),
        (lambda: zero_terminal([0.1, 1.0, 0.1]), "^betas may be 1 in the last step only"),
    ],
)
def test_settings_are_checked(make, message):
    """A setting that gives no chain is refused and named."""
    with pytest.raises(ValueError, match=message):
        make()
