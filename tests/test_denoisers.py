"""Denoisers: whatever the network predicts, the x_0 from which its answer was made comes back."""

import pytest
import torch
from oracles import PATHS, known, known_rates, path_of, time_on
from torch import nn

from dgm_course.denoisers import Denoiser, clipped
from dgm_course.paths import Cosine, DiscretePath, Straight

PREDICTS = ["eps", "x0", "v", "score", "velocity"]
PAIRS = [(name, predicts) for name in PATHS for predicts in PREDICTS if (name, predicts) != ("chain", "velocity")]


class Oracle:
    """A "network" that knows x_0 and ε and answers what it is asked, from closed forms; it records what it was given."""

    def __init__(self, name, predicts, x0, eps, t):
        alpha, sigma = known(name, t)
        if predicts == "velocity":
            rates = known_rates(name, t)
            self.answer = rates[0] * x0 + rates[1] * eps
        else:
            self.answer = {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0, "score": -eps / sigma}[predicts]
        self.xt = alpha * x0 + sigma * eps
        self.calls = []

    def __call__(self, xt, t, **cond):
        self.calls.append((xt, t, cond))
        return self.answer.to(xt.dtype)


@pytest.mark.parametrize("name, predicts", PAIRS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_known_data_come_back(name, predicts, dtype, tolerance, generator):
    """A network made from a known x_0 gives back that x_0, for a number, a 0-d tensor and (B,) times."""
    t, shape = time_on(name, 0.6), (3, 1, 2, 2)
    x0 = torch.randn(shape, generator=generator, dtype=torch.float64)
    eps = torch.randn(shape, generator=generator, dtype=torch.float64)
    net = Oracle(name, predicts, x0, eps, t)
    d = Denoiser(net, path_of(name), predicts)
    for time in (t, torch.tensor(t, dtype=torch.float64), torch.full((3,), t, dtype=torch.float64)):
        x0_hat = d(net.xt.to(dtype), time)
        assert x0_hat.dtype == dtype
        torch.testing.assert_close(x0_hat.double(), x0, rtol=tolerance, atol=tolerance * net.xt.abs().max().item())
        torch.testing.assert_close(d.output(net.xt, time), net.answer, rtol=0, atol=0)
    path_of(name).tabulate(torch.tensor([t, 0], dtype=torch.float64))
    torch.testing.assert_close(d(net.xt, t), x0, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("predicts", ["x0", "v", "velocity"])
def test_no_signal_left(predicts, generator):
    """At t = 1 of a straight path x_t is noise alone; x0, v and velocity still determine x̂_0, exactly."""
    x0, eps = (torch.randn(3, 2, generator=generator, dtype=torch.float64) for _ in "ab")
    net = Oracle("Straight", predicts, x0, eps, 1)
    torch.testing.assert_close(Denoiser(net, Straight(), predicts)(eps, 1.0), x0, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("predicts", ["eps", "score"])
@pytest.mark.parametrize("path", [Cosine(), Straight(), DiscretePath([0.1, 1.0])], ids=repr)
def test_noise_predicted_where_no_signal_is_left(path, predicts):
    """Noise predicted where α = 0 determines nothing: it raises instead of returning inf to a clip that hides it."""
    d = Denoiser(lambda xt, t: xt, path, predicts)
    for denoiser in (d, clipped(d)):
        with pytest.raises(ValueError, match=f"x_t and {predicts} do not determine x0"):
            denoiser(torch.ones(2, 2), path.horizon)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_time_that_the_network_sees(name, dtype):
    """The network sees the part of the way as float32 of shape (B,), whatever t and the data are."""
    seen = []

    def net(xt, t):
        seen.append(t)
        return xt

    path, t = path_of(name), time_on(name, 0.25)
    d = Denoiser(net, path, "x0")
    x = torch.ones(4, 2, dtype=dtype)
    path.tabulate(torch.tensor([0.0]))
    for time in (t, torch.tensor(t), torch.full((4,), t), torch.tensor([t])):
        d(x, time)
    path.tabulate(torch.tensor([t, 0.0]))
    d(x, t)
    assert len(seen) == 5
    for time in seen:
        assert time.shape == (4,) and time.dtype == torch.float32
        torch.testing.assert_close(time, torch.full((4,), 0.25), rtol=1e-7, atol=0)
    d(x, torch.tensor([0, t, time_on(name, 0.5), time_on(name, 1.0)]))
    torch.testing.assert_close(seen[-1], torch.tensor([0.0, 0.25, 0.5, 1.0]), rtol=1e-7, atol=0)


def test_conditions_are_passed_on():
    """Keyword conditions reach the network unchanged through every way of calling it, clipped or not."""
    seen = []

    def net(xt, t, y=None, context=None):
        seen.append((y, context))
        return torch.cat([xt, xt], 1)

    d = Denoiser(net, Cosine(), "v", learned_variance=True)
    y, context, x = torch.tensor([1, 2]), torch.ones(2, 3), torch.ones(2, 1)
    d(x, 0.5, y=y, context=context)
    d.output(x, 0.5, y=y, context=context)
    d.with_variance(x, 0.5, y=y, context=context)
    clipped(d)(x, 0.5, y=y, context=context)
    assert len(seen) == 4 and all(a is y and b is context for a, b in seen)
    d(x, 0.5)
    assert seen[-1] == (None, None)


@pytest.mark.parametrize("shape", [(3, 2), (3, 1, 4, 4)])
def test_learned_variance(shape, generator):
    """The first half of the channels is the prediction; the second, in [−1, 1], becomes a fraction in [0, 1]."""
    x0, eps, raw = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in "abc")
    xt, v = (x0 + eps) / 2**0.5, (eps - x0) / 2**0.5  # Cosine's quarter turn, half way
    d = Denoiser(lambda xt, t: torch.cat([v, raw], 1), Cosine(), "v", learned_variance=True)
    x0_hat, fraction = d.with_variance(xt, 0.5)
    torch.testing.assert_close(x0_hat, x0, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(fraction, 0.5 + 0.5 * raw, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(d(xt, 0.5), x0, rtol=1e-12, atol=1e-12)
    assert torch.equal(d.output(xt, 0.5), v)


def test_gradients_reach_the_network():
    """A Denoiser is a module: its network's parameters are its own, and get gradients through the conversion."""
    d = Denoiser(_Scale(), Cosine(), "eps")
    d(torch.ones(2, 3), 0.5).sum().backward()
    assert [name for name, _ in d.named_parameters()] == ["net.scale"]
    # x̂_0 = (x − σ·scale·x)/α, so the derivative of the sum of six is −6σ/α = −6 at t = 1/2
    assert d.net.scale.grad.item() == pytest.approx(-6.0, rel=1e-6)


class _Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.3))

    def forward(self, xt, t):
        return self.scale * xt


@pytest.mark.parametrize("low, high", [(-1.0, 1.0), (0.0, 0.5)])
def test_clipped(low, high):
    """x̂_0 is held in [low, high], elementwise, and what lies inside is untouched."""
    x = torch.tensor([[-3.0, -0.2, 0.3, 7.0]])
    expected = [min(max(value, low), high) for value in (-3.0, -0.2, 0.3, 7.0)]
    assert torch.equal(clipped(lambda xt, t: xt, low, high)(x, 0.5), torch.tensor([expected]))
    assert x[0, 0] == -3.0


def test_arguments_are_checked():
    """What does not fit raises and is named."""
    x = torch.ones(4, 2)
    narrow = Denoiser(lambda xt, t: xt[:, :1], Cosine())
    half = Denoiser(lambda xt, t: xt, Cosine(), learned_variance=True)
    d = Denoiser(lambda xt, t: xt, Cosine(), "v")
    cases = [
        (ValueError, "^predicts must be one of eps, x0, v, score, velocity; got 'noise'",
         lambda: Denoiser(nn.Identity(), Cosine(), "noise")),
        (TypeError, "^path must be a GaussianPath; got str", lambda: Denoiser(nn.Identity(), "cosine")),
        (ValueError, r"^net must return shape \(4, 2\).*got \(4, 1\)", lambda: narrow(x, 0.5)),
        (ValueError, r"^net must return shape \(4, 4\).*got \(4, 2\)", lambda: half(x, 0.5)),
        (ValueError, "^with_variance needs a Denoiser built with learned_variance=True", lambda: d.with_variance(x, 0.5)),
        (ValueError, r"^t must be a number or have shape \(4,\)", lambda: d(x, torch.full((3,), 0.5))),
        (ValueError, r"^t must lie in \[0, 1\]", lambda: d(x, 1.5)),
        (TypeError, "^t must be a number", lambda: d(x, "now")),
        (ValueError, "^low must be less than high; got 1 and 1", lambda: clipped(d, 1, 1)),
        (ValueError, "^low must be less than high", lambda: clipped(d, 1.0, -1.0)),
    ]  # fmt: skip
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()
