"""Guided denoisers against a mixture with labels, whose density, score and ideal denoiser are typed here, with a label and without."""

import functools
import math

import numpy as np
import oracles
import pytest
import torch
from oracles import CONTINUOUS, PATHS, path_of, time_on

from dgm_course.denoisers import Denoiser, clipped
from dgm_course.guidance import classifier, classifier_free, interval
from dgm_course.paths import VP, Cosine, DiscretePath, Straight
from dgm_course.samplers import ddim, ddpm, dpm_solver_pp_2m, heun, last
from dgm_course.schedules import linear_betas

known = functools.cache(oracles.known)
all_paths = pytest.mark.parametrize("name", PATHS)

# A mixture of four normals in the plane; two of them have the label 0, two the label 1.
SHARES = torch.tensor([0.15, 0.25, 0.2, 0.4], dtype=torch.float64)
MEANS = torch.tensor([[-1.2, 0.4], [0.3, -0.9], [1.1, 0.7], [0.2, 0.5]], dtype=torch.float64)
VARS = torch.tensor([0.09, 0.3, 0.16, 0.5], dtype=torch.float64)
OF_LABEL = {None: [0, 1, 2, 3], 0: [0, 1], 1: [2, 3]}


def normals(*shape, generator):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def close(actual, expected, tolerance=1e-10):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


def parts(name, x, t, y):
    """log of share times density of each component with the label at x, its mean and its variance there; α, σ."""
    keep = OF_LABEL[y]
    alpha, sigma = known(name, t)
    mean, var = alpha * MEANS[keep], alpha**2 * VARS[keep] + sigma**2
    square = (x[:, None] - mean).square().sum(2)
    return SHARES[keep].log() - 0.5 * square / var - torch.log(2 * math.pi * var), mean, var, alpha


def log_p(name, x, t, y=None):
    """log p_t(x, y), or log p_t(x)."""
    return parts(name, x, t, y)[0].logsumexp(1)


def log_p_of_label(name, t, y):
    """x ↦ log p_t(y | x)."""
    return lambda x: log_p(name, x, t, y) - log_p(name, x, t)


def score(function, x):
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(function(x).sum(), x)[0]


def ideal(name, y=None, calls=None):
    """(x_t, t) ↦ E[x_0 | x_t, y], each component's regression weighed by how probable it is."""

    def denoise(xt, t):
        if calls is not None:
            calls.append((y, float(t)))
        log_joint, mean, var, alpha = parts(name, xt, t, y)
        slope = alpha * VARS[OF_LABEL[y]] / var
        guess = MEANS[OF_LABEL[y]] + slope[:, None] * (xt[:, None] - mean)
        return (log_joint.softmax(1)[..., None] * guess).sum(1)

    return denoise


def noisy(name, t, generator, count=7):
    """Points where x_t may be, with room around."""
    alpha, sigma = known(name, t)
    return alpha * 1.5 * normals(count, 2, generator=generator) + sigma * normals(count, 2, generator=generator)


# Without a classifier -------------------------------------------------------------------------------------------------

SCALES = [0, 1, 0.0, 1.0, 0.3, 2, 3.0, -1.5, 40.0]


@all_paths
@pytest.mark.parametrize("unit", [0.0, 0.05, 0.5, 1.0])
def test_classifier_free_by_hand(name, unit, generator):
    """(1 − w)·x̂_0(x) + w·x̂_0(x, y) with numpy, on all paths and at both ends; w a number, a function, one for each sample."""
    t = time_on(name, unit)
    xt = noisy(name, max(t, time_on(name, 0.05)), generator)
    guesses = [ideal(name, y)(xt, t) if unit else xt for y in (1, None)]
    with_label, without = (guess.numpy() for guess in guesses)
    cond, uncond = (lambda x, time, guess=guess: guess + (x - xt) + time - t for guess in guesses)
    for w in SCALES:
        expected = (1 - w) * without + w * with_label
        close(classifier_free(cond, uncond, w)(xt, t), expected, 1e-12)
        close(classifier_free(cond, uncond, lambda time, w=w: w + time - t)(xt, t), expected, 1e-12)
        close(classifier_free(cond, uncond, torch.tensor(w, dtype=torch.float64))(xt, t), expected, 1e-12)
    each = torch.tensor([0.0, 1.0, 0.5, 3.0, -2.0, 7.5, 1.0], dtype=torch.float64)
    expected = without + each.numpy()[:, None] * (with_label - without)
    close(classifier_free(cond, uncond, each)(xt, t), expected, 1e-12)


def test_evaluations():
    """Where w is the number 1 only the conditional model is asked, where it is 0 only the other; elsewhere both, once each."""
    calls = []
    cond, uncond = ideal("Cosine", 1, calls), ideal("Cosine", None, calls)
    x = torch.ones(2, 2, dtype=torch.float64)
    for w, asked in [(1, [1]), (1.0, [1]), (0, [None]), (0.0, [None]), (2.0, [1, None]), (0.5, [1, None]),
                     (torch.tensor(1.0), [1, None]), (torch.ones(2), [1, None]), (torch.zeros(2), [1, None])]:  # fmt: skip
        for scale in (w, lambda t, w=w: w):
            calls.clear()
            classifier_free(cond, uncond, scale)(x, 0.4)
            assert sorted(calls, key=str) == sorted([(y, 0.4) for y in asked], key=str)


@all_paths
@pytest.mark.parametrize("w", [0.4, 1.0, 3.0])
def test_classifier_free_is_the_same_in_every_quantity(name, w, generator):
    """Guided in x̂_0 and converted, or converted and guided in ε, v or the score: one thing. The scores are by autograd."""
    path, t = path_of(name), time_on(name, 0.6)
    (alpha, sigma), xt = known(name, t), noisy(name, t, generator)
    guided = classifier_free(ideal(name, 0), ideal(name), w)(xt, t)
    scores = [score(lambda x, y=y: log_p(name, x, t, y), xt) for y in (0, None)]
    with_label, without = ({
        "score": s,
        "eps": -sigma * s,
        "v": -alpha * sigma * s - sigma * (xt + sigma**2 * s) / alpha,
        "x0": (xt + sigma**2 * s) / alpha,
    } for s in scores)  # fmt: skip
    for quantity in with_label:
        expected = without[quantity] + w * (with_label[quantity] - without[quantity])
        close(path.convert(guided, xt, t, given="x0", to=quantity), expected, 1e-9)
    # the slide's last line and Algorithm 2's: its weight is one less
    close(path.convert(guided, xt, t, "x0", "eps"), (1 - w) * without["eps"] + w * with_label["eps"], 1e-9)
    less = w - 1
    close(path.convert(guided, xt, t, "x0", "eps"), (1 + less) * with_label["eps"] - less * without["eps"], 1e-9)


def test_away_from_another_label(generator):
    """With another label in the place of none, w > 1 leads away from that label: the scores' difference is of the two labels."""
    xt, t, w = noisy("VP", 0.5, generator), 0.5, 2.5
    alpha, sigma = known("VP", t)
    guided = classifier_free(ideal("VP", 0), ideal("VP", 1), w)(xt, t)
    one, other = (score(lambda x, y=y: log_p("VP", x, t, y), xt) for y in (0, 1))
    close((alpha * guided - xt) / sigma**2, one + (w - 1) * (one - other), 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1, 3, torch.tensor([0.5, 2.0]), torch.tensor([0.5, 2.0], dtype=torch.float64)])
def test_images_and_types(dtype, scale):
    """Images keep their type, whatever the weight's is; a weight for each sample multiplies all its values."""
    x = torch.arange(24.0, dtype=dtype).reshape(2, 3, 2, 2)
    out = classifier_free(lambda x, t: x, lambda x, t: 0 * x, scale)(x, 0.5)
    assert out.dtype == dtype and out.shape == x.shape
    each = scale.tolist() if isinstance(scale, torch.Tensor) else [scale, scale]
    assert torch.equal(out, torch.stack([each[0] * x[0], each[1] * x[1]]).to(dtype))


def test_nothing_is_changed():
    """Neither x_t nor what the denoisers gave is written on."""
    x, a, b = torch.ones(2, 2), torch.full((2, 2), 5.0), torch.full((2, 2), 2.0)
    for w in (0, 1, 3.0, torch.ones(2)):
        classifier_free(lambda xt, t: a, lambda xt, t: b, w)(x, 0.5)
        assert x.eq(1).all() and a.eq(5).all() and b.eq(2).all()


def test_clipped_on_the_outside():
    """The guess of the guided denoiser is held in the range, not those that it is made of."""
    guided = clipped(classifier_free(lambda x, t: x + 1.2, lambda x, t: x + 1.1, 4.0))
    close(guided(torch.tensor([[-2.0], [0.0]], dtype=torch.float64), 0.5), [[-0.5], [1.0]], 1e-12)


@pytest.mark.parametrize("shape", [(2,), (3, 1), (1,), (3, 2)])
def test_shape_of_the_scale(shape):
    """The error names the argument and says what came and what is asked."""
    guided = classifier_free(lambda x, t: x, lambda x, t: x, torch.ones(shape))
    with pytest.raises(ValueError) as failure:
        guided(torch.ones(3, 2), 0.5)
    assert str(failure.value) == f"scale must be a number or have shape (3,); got shape {shape}"
    with pytest.raises(ValueError, match="^scale must be"):
        classifier_free(lambda x, t: x, lambda x, t: x, lambda t: torch.ones(shape))(torch.ones(3, 2), 0.5)


# In an interval -------------------------------------------------------------------------------------------------------


def test_interval():
    """The weight from low to high, both included, and 1 outside."""
    scale = interval(3.5, 0.25, 0.75)
    inside, outside = [0.25, 0.26, 0.5, 0.75], [0.0, 0.2499, 0.7501, 1.0]
    assert [scale(t) for t in inside] == [3.5] * 4 and [scale(t) for t in outside] == [1.0] * 4
    assert (
        interval(2.0, 5, 10)(5) == interval(2.0, 5, 10)(10.0) == 2.0 and interval(2.0, 5, 10)(11) == 1.0
    )  # of a chain
    for low, high in ((0.5, 0.5), (0.7, 0.2), (math.nan, 0.5)):
        with pytest.raises(ValueError, match="^low must be less than high; got"):
            interval(3.0, low, high)


def test_guidance_in_an_interval(generator):
    """Outside of it a run costs one evaluation a step and takes the conditional model's step; inside two, and the guided one."""
    calls, times = [], [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]
    x = normals(3, 2, generator=generator)
    cond, uncond = ideal("Cosine", 1, calls), ideal("Cosine", None, calls)
    states = [x, *ddim(classifier_free(cond, uncond, interval(3.0, 0.4, 0.6)), Cosine(), x, times)]
    assert sorted(calls, key=str) == sorted([(1, t) for t in times[:-1]] + [(None, t) for t in (0.6, 0.4)], key=str)
    for before, after, t, s in zip(states, states[1:], times, times[1:], strict=False):
        (alpha_s, sigma_s), (alpha_t, sigma_t) = known("Cosine", s), known("Cosine", t)
        x0 = ideal("Cosine", 1)(before, t)
        if 0.4 <= t <= 0.6:
            x0 = 3 * x0 - 2 * ideal("Cosine")(before, t)
        close(after, alpha_s * x0 + sigma_s * (before - alpha_t * x0) / sigma_t)


# With a classifier ----------------------------------------------------------------------------------------------------


@all_paths
@pytest.mark.parametrize("unit", [0.05, 0.5, 0.95])
def test_bayes(name, unit, generator):
    """The exact log p_t(y | x) turns the ideal denoiser without a label into the ideal one with it, on every path."""
    t = time_on(name, unit)
    xt = noisy(name, t, generator)
    for y in (0, 1):
        guided = classifier(ideal(name), path_of(name), lambda x, time, y=y: log_p_of_label(name, time, y)(x))
        close(guided(xt, t), ideal(name, y)(xt, t))


@pytest.mark.parametrize("name", ["VP", "SubVP", "VE", "VE narrow", "chain"])
def test_bayes_at_the_end_of_a_path_with_signal(name, generator):
    """Also at pure noise, where some signal is left; a network that reads the score off p(y | x) needs no more."""
    t = time_on(name, 1.0)
    xt = noisy(name, t, generator)
    guided = classifier(ideal(name), path_of(name), lambda x, time: log_p_of_label(name, time, 0)(x))
    close(guided(xt, t), ideal(name, 0)(xt, t))


@all_paths
def test_no_noise(name, generator):
    """At t = 0 there is nothing to guess and nothing to guide: x̂_0 is x_t/α, however steep the classifier."""
    alpha, x = known(name, 0)[0], normals(4, 2, generator=generator)
    guided = classifier(lambda xt, t: xt / alpha, path_of(name), lambda xt, t: 50 * xt.sum(1), 3.0)
    close(guided(x, 0), x / alpha, 1e-14)


@pytest.mark.parametrize("name", ["Cosine", "Straight", "Sigmoid", "Scaled"])
def test_no_signal(name, generator):
    """Where α = 0 the guess is left as it is and the classifier is not asked. The limit is another: σ²/α of a gradient that
    vanishes like α, so that just before the end the guess is the mean of the data with the label, not that of all."""

    def never(xt, t):
        raise AssertionError("the classifier was asked")

    x = normals(4, 2, generator=generator)
    assert torch.equal(classifier(ideal(name), path_of(name), never, 5.0)(x, 1.0), ideal(name)(x, 1.0))
    t = 1 - 1e-5
    almost = classifier(ideal(name), path_of(name), lambda x, time: log_p_of_label(name, time, 0)(x))(x, t)
    of_label = (SHARES[:2, None] * MEANS[:2]).sum(0) / SHARES[:2].sum()
    torch.testing.assert_close(almost, of_label.expand(4, 2), rtol=0, atol=1e-2)
    assert (of_label - (SHARES[:, None] * MEANS).sum(0)).norm() > 0.5


@pytest.mark.parametrize("w", [0.0, 0.5, 4.0])
@all_paths
def test_scale_of_the_classifier(name, w, generator):
    """In terms of scores: ∇log p_t(x) + w·∇log p_t(y | x), by autograd; in ε minus wσ times the gradient, with σ and not without."""
    t = time_on(name, 0.6)
    (alpha, sigma), xt = known(name, t), noisy(name, t, generator)
    slope = score(log_p_of_label(name, t, 1), xt)
    expected = score(lambda x: log_p(name, x, t), xt) + w * slope
    guided = classifier(ideal(name), path_of(name), lambda x, time: log_p_of_label(name, time, 1)(x), w)(xt, t)
    close((alpha * guided - xt) / sigma**2, expected, 1e-9)
    eps = (xt - alpha * ideal(name)(xt, t)) / sigma
    close((xt - alpha * guided) / sigma, eps - w * sigma * slope, 1e-9)


def test_a_time_for_each_sample(generator):
    """With (B,) times each sample is guided at its own; the one without signal is left alone."""
    units = torch.tensor([0.1, 0.5, 1.0, 0.9], dtype=torch.float64)
    xt = normals(4, 2, generator=generator)
    guided = classifier(lambda x, t: 0 * x, Straight(), lambda x, t: (t * x.prod(1)).to(x), 2.0)(xt, units)
    for i, t in enumerate(units.tolist()):
        slope = t * xt[i].flip(0)
        close(guided[i], 2 * t**2 / (1 - t) * slope if t < 1 else 0 * slope, 1e-12)


SOLVERS = {
    "ddim": lambda *a: ddim(*a, eta=0.0),
    "ddim, η = 1": lambda *a: ddim(*a, eta=1.0, generator=torch.Generator().manual_seed(1)),
    "ddpm": lambda *a: ddpm(*a, generator=torch.Generator().manual_seed(1)),
    "heun": heun,
    "2m": dpm_solver_pp_2m,
}


@pytest.mark.parametrize("sampler", SOLVERS)
@pytest.mark.parametrize("name", ["VP", "VE narrow", "chain"])
def test_samples(sampler, name, generator):
    """Whole runs under the exact classifier are runs of the conditional model, from pure noise to the data."""
    times = [time_on(name, unit) for unit in (1.0, 0.8, 0.5, 0.4, 0.2, 0.05, 0.0)]
    x = known(name, times[0])[1] * normals(6, 2, generator=generator)
    guided = classifier(ideal(name), path_of(name), lambda x, t: log_p_of_label(name, t, 1)(x))
    runs = [SOLVERS[sampler](d, path_of(name), x, times) for d in (guided, ideal(name, 1))]
    for one, other in zip(*runs, strict=True):
        close(one, other, 1e-8)


def test_samples_of_images(generator):
    """On images, in float32, under a network: DDIM's state moves by σ²/α of the gradient, times the weight of x̂_0 in the step."""
    x = torch.randn(2, 1, 4, 4, generator=generator)
    w = torch.randn(16, generator=generator)
    d, path = Denoiser(lambda xt, t: torch.tanh(xt), VP(), "v"), VP()

    def log_prob(xt, t):
        return torch.nn.functional.logsigmoid(xt.flatten(1) @ w)

    guided = classifier(d, path, log_prob, 3)
    t, s = 0.5, 0.4
    (alpha_t, sigma_t), (alpha_s, sigma_s) = known("VP", t), known("VP", s)
    moved = last(ddim(guided, path, x, [t, s])) - last(ddim(d, path, x, [t, s]))
    slope = (1 - torch.sigmoid(x.flatten(1) @ w))[:, None] * w  # of log sigmoid
    pull = alpha_s - sigma_s / sigma_t * alpha_t
    assert moved.dtype == torch.float32
    torch.testing.assert_close(moved.flatten(1), 3 * pull * sigma_t**2 / alpha_t * slope, rtol=1e-4, atol=1e-5)


def test_the_gradient_is_taken_at_xt(generator):
    """Not at the mean of the step, and not at x̂_0: the classifier is given x_t and t, unchanged."""
    seen, x = [], normals(3, 2, generator=generator)

    def log_prob(xt, t):
        seen.append((xt.detach().clone(), t))
        return -xt.square().sum(1)

    times = [0.9, 0.5, 0.2]
    states = [x, *ddpm(classifier(lambda xt, t: 0.3 * xt, VP(), log_prob), VP(), x, times, generator=generator)]
    assert [t for _, t in seen] == times[:2]
    assert all(torch.equal(given, state) for (given, _), state in zip(seen, states, strict=False))


@pytest.mark.parametrize("grad", [True, False])
def test_gradients(grad):
    """They are on for the classifier alone and as they were after it; x_t, the denoiser and the classifier get none."""
    seen, weight = [], torch.nn.Parameter(torch.ones(2))

    def d(xt, t):
        seen.append(torch.is_grad_enabled())
        return xt * 0.5

    def log_prob(xt, t):
        seen.append(torch.is_grad_enabled())
        return (weight * xt).sum(1)

    x = torch.ones(3, 2)
    guided = classifier(d, VP(), log_prob)
    with torch.set_grad_enabled(grad):
        out = guided(x, 0.5)
        assert torch.is_grad_enabled() is grad
    assert seen == [grad, True] and not out.requires_grad
    assert not x.requires_grad and x.grad is None and weight.grad is None and x.eq(1).all()
    with torch.set_grad_enabled(grad):  # of an x_t in a graph of the caller's
        x.requires_grad_()
        out = guided(x, 0.5)
    assert out.requires_grad is grad and x.requires_grad and x.grad is None and weight.grad is None
    with torch.no_grad(), pytest.raises(ZeroDivisionError):
        classifier(d, VP(), lambda xt, t: 1 / 0)(x.detach(), 0.5)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("shape", [(), (1,), (3, 1), (3, 2)])
def test_shape_of_the_log_probability(shape):
    """One for each sample; the error names the argument and says what came."""
    guided = classifier(lambda xt, t: xt, VP(), lambda xt, t: xt.sum() * torch.ones(shape))
    with pytest.raises(ValueError) as failure:
        guided(torch.ones(3, 2), 0.5)
    assert str(failure.value) == f"log_prob must return shape (3,); got {shape}"


def test_samples_do_not_meet(generator):
    """A sample's guidance does not depend on its batch mates."""
    x, other = normals(3, 2, generator=generator), normals(3, 2, generator=generator)
    other[1] = x[1]
    guided = classifier(ideal("VP"), VP(), lambda x, t: log_p_of_label("VP", t, 0)(x), 2.0)
    one, two = guided(x, 0.5), guided(other, 0.5)
    close(one[1], two[1], 1e-14)
    assert not torch.allclose(one[0], two[0])


def test_on_the_lectures_chain(generator):
    """ε̂ − √(1−ᾱ_t)·∇log p(y | x_t), as it is written for DDIM, with ᾱ_t by a product."""
    betas = np.linspace(1e-4, 0.02, 1000)
    abar = np.cumprod(1 - betas)
    path, t = DiscretePath(linear_betas(1000)), 400
    xt, eps, slope = (normals(3, 2, generator=generator) for _ in "abc")
    guided = classifier(Denoiser(lambda x, t: eps, path, "eps"), path, lambda x, t: (slope * x).sum(1))
    expected = eps - math.sqrt(1 - abar[t - 1]) * slope
    close(path.convert(guided(xt, t), xt, t, "x0", "eps"), expected, 1e-8)


# What is drawn from ---------------------------------------------------------------------------------------------------
# Two normals on a line, N(−1, 0.4²) with the label 0 and N(1, 0.6²) with the label 1, equally often.

LINE = {0: (-1.0, 0.16), 1: (1.0, 0.36)}


def on_line(name, x, t, y):
    alpha, sigma = known(name, t)
    mean, var = LINE[y]
    var = alpha**2 * var + sigma**2
    return 0.5 * torch.exp(-0.5 * (x - alpha * mean) ** 2 / var) / math.sqrt(2 * math.pi * var)


def sharpened(name, x, t, w):
    """log of p_t(x)·p_t(y=1 | x)^w, not normalised."""
    total = on_line(name, x, t, 0) + on_line(name, x, t, 1)
    return total.log() + w * (on_line(name, x, t, 1) / total).log()


def diffused(name, x, t, w):
    """∇log at x of the sharpened density of the data after the noise of time t: an integral on 4,001 points."""
    alpha, sigma = known(name, t)
    x0 = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    log_weight = sharpened(name, x0, 0, w) - 0.5 * ((x[:, None] - alpha * x0) / sigma) ** 2
    mean = (log_weight.softmax(1) * x0).sum(1)
    return (alpha * mean - x) / sigma**2


def line_denoiser(name, y):
    def denoise(xt, t):
        alpha, sigma = known(name, t)
        means = {k: m + alpha * v / (alpha**2 * v + sigma**2) * (xt - alpha * m) for k, (m, v) in LINE.items()}
        if y is not None:
            return means[y]
        share = on_line(name, xt, t, 1) / (on_line(name, xt, t, 0) + on_line(name, xt, t, 1))
        return share * means[1] + (1 - share) * means[0]

    return denoise


@pytest.mark.parametrize("name", ["VP", "Cosine", "VE narrow"])
@pytest.mark.parametrize("w", [0.5, 1.0, 3.0])
def test_the_field_of_guidance(name, w):
    """At each t it is the score of p_t(x)·p_t(y | x)^w; but for w ≠ 1 not that of the sharpened data after noise was added."""
    x = torch.linspace(-2, 2, 21, dtype=torch.float64)
    for unit in (0.2, 0.5, 0.8):
        alpha, sigma = known(name, unit)
        exact = score(lambda x, t=unit: sharpened(name, x, t, w), x)
        by_label = classifier_free(line_denoiser(name, 1), line_denoiser(name, None), w)
        by_classifier = classifier(
            line_denoiser(name, None), CONTINUOUS[name][0],
            lambda x, t: (sharpened(name, x, t, 1.0) - sharpened(name, x, t, 0.0))[:, 0], w,
        )  # fmt: skip
        for d in (by_label, by_classifier):
            guided = d(x[:, None], unit)[:, 0]
            close((alpha * guided - x) / sigma**2, exact, 1e-8)
        off = ((diffused(name, x, unit, w) - exact) * sigma).abs().max()  # in units of ε
        assert off < 1e-8 if w == 1 else off > 0.01, off


def test_guided_samples_are_not_the_sharpened_data():
    """So the guided ODE does not end in p(x)·p(y | x)^w, though it starts in p_1(x)·p_1(y | x)^w: here it goes further out.

    800 quantiles of the start, by a sum on a grid, are moved by Heun's rule. With w = 1 they end where they should.
    """
    name, times = "VE narrow", torch.linspace(1, 0, 151, dtype=torch.float64).pow(2)
    x0, x1 = torch.linspace(-6, 6, 4001, dtype=torch.float64), torch.linspace(-20, 20, 20001, dtype=torch.float64)
    for w, agree in ((1.0, True), (4.0, False)):
        mass = sharpened(name, x1, 1.0, w).softmax(0).cumsum(0)
        start = x1[torch.searchsorted(mass, (torch.arange(800, dtype=torch.float64) + 0.5) / 800)][:, None]
        d = classifier_free(line_denoiser(name, 1), line_denoiser(name, None), w)
        out = last(heun(d, path_of(name), start, times))
        law = sharpened(name, x0, 0, w).softmax(0)
        mean = (law * x0).sum()
        std = (law * (x0 - mean) ** 2).sum().sqrt()
        assert agree == (abs(out.mean() - mean) < 0.01) == (abs(out.std() - std) < 0.01), (w, out.mean(), mean)


def test_interval_takes_a_time_for_each_sample():
    """As where all steps are asked at once: each sample has the weight of its own time."""
    t = torch.tensor([0.1, 0.2, 0.5, 0.8, 0.9], dtype=torch.float64)
    assert interval(3.0, 0.2, 0.8)(t).tolist() == [1.0, 3.0, 3.0, 3.0, 1.0]
    d = classifier_free(lambda x, t: 0 * x + 1, lambda x, t: 0 * x, interval(3.0, 0.2, 0.8))
    assert d(torch.zeros(5, 2), t)[:, 0].tolist() == [1.0, 3.0, 3.0, 3.0, 1.0]


@pytest.mark.parametrize("scale", ["3", None, [1.0]])
def test_a_scale_of_another_kind(scale):
    with pytest.raises(TypeError, match="^scale must be a number, a tensor or a function of t; got"):
        classifier_free(lambda x, t: x, lambda x, t: x, scale)


def test_a_log_prob_without_a_gradient():
    d = classifier(lambda x, t: x, Cosine(), lambda x, t: x.detach().sum(1))
    with pytest.raises(ValueError, match="^log_prob must depend on x_t"):
        d(torch.zeros(2, 3), 0.5)
