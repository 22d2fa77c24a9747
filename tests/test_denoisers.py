"""Denoisers: whatever the network predicts, the x_0 from which its answer was made comes back."""

import pytest
import torch
from oracles import CONTINUOUS, MEANS, PATHS, STDS, WEIGHTS, known, known_rates, mixture_mean, path_of, time_on
from torch import nn
from torch.distributions import Categorical, MixtureSameFamily, Normal

from dgm_course.denoisers import Denoiser, clipped, on_path, read_as, with_fraction
from dgm_course.paths import VE, VP, Cosine, DiscretePath, Straight
from dgm_course.toy import GaussianMixture

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


def test_outputs(generator):
    """All that the network says, in its own units; without a learned variance the fraction is None."""
    xt, v, raw = (torch.randn(3, 2, generator=generator) for _ in "abc")
    both = Denoiser(lambda xt, t: torch.cat([v, raw], 1), Cosine(), "v", learned_variance=True).outputs(xt, 0.5)
    assert torch.equal(both[0], v)
    torch.testing.assert_close(both[1], 0.5 + raw / 2)
    output, fraction = Denoiser(lambda xt, t: v, Cosine(), "v").outputs(xt, 0.5)
    assert output is v and fraction is None


@pytest.mark.parametrize("low, high", [(-1.0, 1.0), (-0.2, 0.6)])
def test_clipped_pairs(low, high):
    """Of a pair the guess is held in the range and the fraction is left as it is; what was given is not written on."""
    x, says = (torch.linspace(-end, end, 5, dtype=torch.float64)[None] for end in (2, 3))
    guess, fraction = clipped(lambda xt, t: (xt, says), low, high)(x, 0.5)
    assert guess.tolist() == [[min(max(value, low), high) for value in x[0].tolist()]] and fraction is says
    assert x.tolist() == [[-2, -1, 0, 1, 2]]
    assert isinstance(clipped(lambda xt, t: xt, low, high)(x, 0.5), torch.Tensor)


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


# The same denoiser in other units -------------------------------------------------------------------------------------

LINE = GaussianMixture(torch.from_numpy(MEANS)[:, None], torch.from_numpy(STDS**2), torch.from_numpy(WEIGHTS))


def exact_score(name, x, t):
    """∇ log p_t of the mixture, by autograd through torch's density with the closed form's α and σ."""
    alpha, sigma = known(name, t)
    means, stds = alpha * torch.from_numpy(MEANS), ((alpha * torch.from_numpy(STDS)) ** 2 + sigma**2).sqrt()
    p = MixtureSameFamily(Categorical(torch.from_numpy(WEIGHTS)), Normal(means, stds))
    x = x.clone().requires_grad_()
    return torch.autograd.grad(p.log_prob(x).sum(), x)[0]


def exact_mean(name, x, t):
    """E[x_0 | x_t] of the mixture, by Bayes."""
    return torch.from_numpy(mixture_mean(x[:, 0].numpy(), *known(name, t)))[:, None]


@pytest.mark.parametrize("name", CONTINUOUS)
@pytest.mark.parametrize("t", [0.1, 0.6, 0.95])
def test_readings_of_the_ideal_denoiser(name, t, generator):
    """Its score is ∇ log p_t, its ε̂ is −σ·score, its velocity the ODE's f·x − ½g²·score, its v is α·ε̂ − σ·x̂_0."""
    path, d = path_of(name), LINE.denoiser(path_of(name))
    (alpha, sigma), (d_alpha, d_sigma) = known(name, t), known_rates(name, t)
    x = 2 * max(1.0, sigma) * torch.randn(6, 1, generator=generator, dtype=torch.float64)
    score, x0, f = exact_score(name, x, t), exact_mean(name, x, t), d_alpha / alpha
    g2 = 2 * sigma * (d_sigma - f * sigma)
    expected = {
        "score": score,
        "eps": -sigma * score,
        "velocity": f * x - g2 / 2 * score,
        "v": -alpha * sigma * score - sigma * x0,
        "x0": x0,
    }
    for quantity, value in expected.items():
        read, tolerance = read_as(quantity, d, path), 1e-8 * max(1.0, value.abs().max().item())
        torch.testing.assert_close(read(x, t), value, rtol=1e-8, atol=tolerance)
        each = read(x, torch.tensor([t, 0.3, 0.4, t, 0.5, 0.2], dtype=torch.float64))
        torch.testing.assert_close(each[[0, 3]], value[[0, 3]], rtol=1e-8, atol=tolerance)
        assert read(x.float(), t).dtype == torch.float32


@pytest.mark.parametrize("name", ["VP", "SubVP", "VE", "Cosine", "Straight"])
def test_velocity_is_that_of_the_exact_flow(name, generator):
    """Data N(m, v): the ODE carries x_t to α_u·m + √(Var_u/Var_t)·(x_t − α_t·m) at u; its derivative there is autograd's."""
    m, v, t = 0.7, 0.3, torch.tensor(0.6, dtype=torch.float64)
    data = GaussianMixture(torch.tensor([[m]], dtype=torch.float64), v)
    x = 1 + torch.randn(5, 1, generator=generator, dtype=torch.float64)

    def flow(u):
        (alpha, sigma), (alpha_t, sigma_t) = (CONTINUOUS[name][1](torch, time) for time in (u, t))
        ratio = (alpha**2 * v + sigma**2) / (alpha_t**2 * v + sigma_t**2)
        return alpha * m + ratio.sqrt() * (x - alpha_t * m)

    velocity = torch.autograd.functional.jacobian(flow, t)
    found = read_as("velocity", data.denoiser(path_of(name)), path_of(name))(x, 0.6)
    torch.testing.assert_close(found, velocity, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("wrap", [lambda d: read_as("score", d, Cosine()), lambda d: on_path(d, Cosine(), Straight())])
def test_conditions_and_gradients_pass_through(wrap):
    """Keyword conditions reach the denoiser unchanged, and gradients come back through it."""
    y, x, seen = torch.tensor([1, 2]), torch.ones(2, 1, requires_grad=True), []

    def d(xt, t, y=None):
        seen.append(y)
        return 3 * xt

    wrap(d)(x, 0.3, y=y).sum().backward()
    assert len(seen) == 1 and seen[0] is y and x.grad.isfinite().all() and x.grad.abs().min() > 0


# The same network on another path -------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", ["Cosine", "Cosine shifted", "Scaled", "Straight"])
@pytest.mark.parametrize("name", CONTINUOUS)
def test_a_denoiser_on_another_path(trained, name, generator):
    """The mixture's denoiser on one path is, moved, its E[x_0 | x_t] on another: from end to end, and with (B,) times."""
    moved = on_path(LINE.denoiser(path_of(trained)), path_of(trained), path_of(name))
    times, rows = [0.0, 0.01, 0.2, 0.6, 0.95, 1.0], []
    x = torch.randn(6, 1, generator=generator, dtype=torch.float64)
    x = x * torch.tensor([[max(1.0, known(name, t)[1])] for t in times], dtype=torch.float64)
    for i, t in enumerate(times):
        expected = exact_mean(name, x, t)
        rows.append(expected[i])
        for time in (t, torch.tensor(t, dtype=torch.float64)):
            torch.testing.assert_close(moved(x, time), expected, rtol=1e-10, atol=1e-10)
        assert moved(x.float(), t).dtype == torch.float32
    each = moved(x, torch.tensor(times, dtype=torch.float64))
    torch.testing.assert_close(each, torch.stack(rows), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(3, 2), (3, 1, 4, 4)])
def test_what_a_moved_denoiser_is_given(shape, generator):
    """From a straight path to the circle: x_t divided by α + σ, at the time σ/(α + σ), in the shape of x_t and of t."""
    seen = []

    def d(xt, t):
        seen.append((xt, t))
        return xt

    moved, x = on_path(d, Straight(), Cosine()), torch.randn(shape, generator=generator, dtype=torch.float64)
    for t in (0.0, 0.3, 1.0, torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64)):
        angle = torch.as_tensor(t, dtype=torch.float64) * torch.pi / 2
        total = angle.cos() + angle.sin()
        moved(x, t)
        xt, tau = seen[-1]
        torch.testing.assert_close(xt, x / total.reshape(-1, *[1] * (len(shape) - 1)), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(tau, angle.sin() / total, rtol=1e-12, atol=1e-12)


def test_a_ratio_that_was_not_trained():
    """VP does not reach the log-SNR −∞ at the end of a straight path: asked there, the moved denoiser says so."""
    moved = on_path(lambda xt, t: xt, VP(), Straight())
    assert moved(torch.ones(2, 1), 0.9).isfinite().all()
    for t in (1.0, torch.tensor([0.5, 1.0])):
        with pytest.raises(ValueError, match=r"^logsnr must lie in \[-10.05, inf\], where VP"):
            moved(torch.ones(2, 1), t)
    with pytest.raises(ValueError, match=r"^DiscretePath\(T=2\) has whole times only"):
        on_path(lambda xt, t: xt, DiscretePath([0.1, 0.2]), VE())(torch.ones(2, 1), 0.5)


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
        (ValueError, "^quantity must be one of eps, x0, v, score, velocity; got 'noise'",
         lambda: read_as("noise", d, Cosine())),
        (ValueError, "^x_t and x0 do not determine score at t = .0.0.", lambda: read_as("score", d, Cosine())(x, 0.0)),
        (ValueError, r"^t must lie in \[0, 1\]", lambda: on_path(d, Cosine(), Straight())(x, 1.5)),
        (ValueError, r"^t must be a number or have shape \(4,\)",
         lambda: on_path(d, Cosine(), Straight())(x, torch.full((3,), 0.5))),
    ]  # fmt: skip
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("out", [torch.zeros(2, 3), (torch.zeros(2, 3),), None])
def test_a_pair_that_is_none(out):
    """What asks for a learned variance says so where the denoiser does not know it."""
    with pytest.raises(TypeError, match=r"^the denoiser must return \(x̂_0, fraction\).*got"):
        with_fraction(lambda xt, t: out, torch.zeros(2, 3), 0.5)
