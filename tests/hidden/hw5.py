"""Homework 5, guidance and sampling in few steps: what is right, what people write instead, and the cases that tell them apart.

For each exercise: the reference, the mistakes, right answers written in other ways, the cases. Classifiers and networks are
affine functions, whose numbers can be sent; tables of ᾱ have large steps, so that a wrong factor shows.
"""

import functools
import math
from itertools import pairwise

import numpy as np
import torch
from torch.nn.functional import log_softmax

from dgm_course.grading.exercise import Exercise, Group
from dgm_course.homework import Affine

SINGLE, DOUBLE = torch.float32, torch.float64


# What the exercises share ---------------------------------------------------------------------------------------------


def each(coefficients, like):
    """One number for each sample, ready to multiply the samples."""
    return coefficients.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def table(g, steps):
    """ᾱ_0 = 1 … ᾱ_T for steps that each have a β of their own, between 0.05 and 0.35."""
    return torch.cat([torch.ones(1, dtype=DOUBLE), (1 - uniform(g, 0.05, 0.35, steps)).cumprod(0)])


def into_noise(g, steps):
    """Such a table whose last entry is 0."""
    return torch.cat([table(g, steps - 1), torch.zeros(1, dtype=DOUBLE)])


def normal(g, shape, dtype=SINGLE):
    return torch.randn(shape, generator=g, dtype=dtype)


def uniform(g, low, high, *shape):
    return low + (high - low) * torch.rand(shape, generator=g, dtype=DOUBLE)


def number(g, low, high):
    return uniform(g, low, high).item()


def whole(g, low, high):
    """A whole number, low ≤ n < high."""
    return int(torch.randint(low, high, (), generator=g))


def descending(g, first, last, count):
    """`count` steps from `first` down to `last`, over times between them that are drawn."""
    inner = last + 1 + torch.randperm(first - last - 1, generator=g)[: count - 1]
    return torch.cat([torch.tensor([first]), inner.sort(descending=True).values, torch.tensor([last])])


# 1. guided_v ----------------------------------------------------------------------------------------------------------


def guided_v(v, v_class, gradient, alpha_bar, w, scale):
    return guided_with(v, v_class, gradient, alpha_bar, w, -scale * noise_over_signal(alpha_bar))


def noise_over_signal(alpha_bar):
    """σ/α, and 0 where there is no signal."""
    return torch.where(alpha_bar > 0, ((1 - alpha_bar) / alpha_bar).sqrt(), 0)


def guided_with(v, v_class, gradient, alpha_bar, w, factor):
    """With a factor of the gradient for each sample, 0 where ᾱ = 0."""
    factor = torch.where(alpha_bar > 0, factor, 0)
    return (1 + w) * v_class - w * v + each(factor, v) * gradient


def guided_slide_weight(v, v_class, gradient, alpha_bar, w, scale):
    return guided_v(v, v_class, gradient, alpha_bar, w - 1, scale)


def guided_both_plus_1(v, v_class, gradient, alpha_bar, w, scale):
    return guided_v(v, v_class, gradient, alpha_bar, w, 1 + scale)


def guided_exchanged(v, v_class, gradient, alpha_bar, w, scale):
    return guided_v(v_class, v, gradient, alpha_bar, w, scale)


def guided_interpolates(v, v_class, gradient, alpha_bar, w, scale):
    return guided_v(v, v_class, gradient, alpha_bar, -w, scale)


def guided_plus(v, v_class, gradient, alpha_bar, w, scale):
    return guided_v(v, v_class, gradient, alpha_bar, w, -scale)


def guided_as_noise(v, v_class, gradient, alpha_bar, w, scale):
    return guided_with(v, v_class, gradient, alpha_bar, w, -scale * (1 - alpha_bar).sqrt())


def guided_no_sigma(v, v_class, gradient, alpha_bar, w, scale):
    return guided_with(v, v_class, gradient, alpha_bar, w, -scale * torch.ones_like(alpha_bar))


def guided_slide_line(v, v_class, gradient, alpha_bar, w, scale):
    """ε moves by the gradient, without σ, and v by 1/α of that."""
    return guided_with(v, v_class, gradient, alpha_bar, w, -scale / alpha_bar.sqrt())


def guided_as_data(v, v_class, gradient, alpha_bar, w, scale):
    return guided_with(v, v_class, gradient, alpha_bar, w, scale * (1 - alpha_bar) / alpha_bar.sqrt())


def guided_x0_stays(v, v_class, gradient, alpha_bar, w, scale):
    return guided_with(v, v_class, gradient, alpha_bar, w, -scale * (alpha_bar * (1 - alpha_bar)).sqrt())


def guided_eps_stays(v, v_class, gradient, alpha_bar, w, scale):
    return guided_with(v, v_class, gradient, alpha_bar, w, -scale * (1 - alpha_bar) ** 1.5 / alpha_bar.sqrt())


def guided_no_root(v, v_class, gradient, alpha_bar, w, scale):
    return guided_with(v, v_class, gradient, alpha_bar, w, -scale * (1 - alpha_bar) / alpha_bar)


def guided_divides_by_0(v, v_class, gradient, alpha_bar, w, scale):
    return (1 + w) * v_class - w * v - each(scale * ((1 - alpha_bar) / alpha_bar).sqrt(), v) * gradient


def guided_first(v, v_class, gradient, alpha_bar, w, scale):
    return guided_v(v, v_class, gradient, alpha_bar[:1].expand_as(alpha_bar), w, scale)


def guided_by_the_noise(v, v_class, gradient, alpha_bar, w, scale):
    """Through ε and x_0 of some x_t; which one does not matter, so x_t = 0."""
    rows = []
    for one, other, push, kept in zip(v.double(), v_class.double(), gradient.double(), alpha_bar.tolist(), strict=True):
        if kept == 0:  # v is −x_0 there
            rows.append(other + w * (other - one))
            continue
        alpha, sigma = math.sqrt(kept), math.sqrt(1 - kept)
        eps = alpha * (other + w * (other - one)) - scale * sigma * push
        x0 = -sigma * eps / alpha
        rows.append(alpha * eps - sigma * x0)
    return torch.stack(rows).to(v.dtype)


def guided_by_an_angle(v, v_class, gradient, alpha_bar, w, scale):
    """σ/α is the tangent of the angle whose cosine is α."""
    angle = alpha_bar.sqrt().acos()
    push = torch.where(alpha_bar > 0, angle.tan(), torch.zeros_like(angle)) * scale
    return torch.lerp(v, v_class, 1 + w) - torch.einsum("b,b...->b...", push.to(v.dtype), gradient)


def guided_by_the_data(v, v_class, gradient, alpha_bar, w, scale):
    """x_0 = α x_t − σ v, at x_t = 0: x̂_0 moves by σ²/α times the gradient."""
    sigma = each((1 - alpha_bar).sqrt(), v)
    moved = torch.nan_to_num(scale * (1 - alpha_bar) / alpha_bar.sqrt(), posinf=0.0)
    x0 = -sigma * (v_class + w * (v_class - v)) + each(moved, v) * gradient
    return torch.where(sigma > 0, -x0 / sigma.clamp(min=1e-30), v_class + w * (v_class - v))


def pushed(g, shape, dtype=SINGLE, alpha_bar=None):
    alpha_bar = uniform(g, 0.15, 0.8, shape[0]) if alpha_bar is None else torch.tensor(alpha_bar, dtype=DOUBLE)
    parts = {name: normal(g, shape, dtype) for name in ("v", "v_class", "gradient")}
    return {**parts, "alpha_bar": alpha_bar, "w": number(g, 0.4, 2.5), "scale": number(g, 1.4, 3)}


GUIDED = Exercise(
    "guided_v",
    points=3,
    minutes=15,
    difficulty=2,
    reference=guided_v,
    outputs=("v",),
    visible=Group(
        1,
        lambda g: [
            pushed(g, (4, 3)),
            pushed(g, (2, 1, 2, 3), DOUBLE),
            pushed(g, (3, 2), alpha_bar=[0.0, 1.0, 0.4]),
        ],
    ),
    hidden={
        "other shapes": Group(
            1,
            lambda g: [pushed(g, (5, 2)), pushed(g, (2, 1, 7, 5)), pushed(g, (1, 1), DOUBLE), pushed(g, (6,), DOUBLE)],
        ),
        "only noise, only data": Group(
            1,
            lambda g: [
                pushed(g, (3, 4), alpha_bar=[number(g, 0.2, 0.7), 0.0, 1.0]),
                pushed(g, (1, 2), DOUBLE, [0.0]),
                pushed(g, (2, 3), DOUBLE, [1.0, number(g, 0.01, 0.02)]),
            ],
        ),
    },
    mistakes={
        "you counted w as the slide does": (
            guided_slide_weight,
            "In Algorithm 2, w = 0 is the plain conditional model: (1 + w)·conditional − w·unconditional. The slide's w is 1 more.",
        ),
        "you added 1 to the scale of the gradient, too": (
            guided_both_plus_1,
            "The scale is the slide's w: it stands before ∇log p(y | x_t) as it is, and 0 means no push.",
        ),
        "you exchanged the two predictions": (
            guided_exchanged,
            "The class is what you want more of: (1 + w)·conditional − w·unconditional.",
        ),
        "you interpolated between the two predictions": (
            guided_interpolates,
            "Guidance goes beyond the conditional prediction, away from the unconditional one: the factors are 1 + w and −w.",
        ),
        "you pushed against the gradient": (
            guided_plus,
            "The score is −ε/σ, so what is added to the score is subtracted from ε; and v goes the way of ε.",
        ),
        "you moved v as far as ε": (
            guided_as_noise,
            "σ times the gradient is how far ε moves. x_t stays, so x̂_0 moves as well, and v = α ε − σ x_0 feels both.",
        ),
        "you left out σ": (
            guided_slide_line,
            "The score is −ε/σ. The slide text loses this σ on two lines, where the slips cancel; here they do not.",
        ),
        "you moved v by the gradient itself": (
            guided_no_sigma,
            "The gradient is a push of the score, −ε/σ. Follow it from the score to ε, and from there to v while x_t stays.",
        ),
        "you moved v as far as x̂_0": (
            guided_as_data,
            "σ²/α times the gradient is how far x̂_0 moves. v = α ε − σ x_0 moves by another amount, the other way.",
        ),
        "you let ε move and held x̂_0": (
            guided_x0_stays,
            "x_t = α x_0 + σ ε is given. When ε moves, x̂_0 moves against it, and v = α ε − σ x_0 feels both.",
        ),
        "you let x̂_0 move and held ε": (
            guided_eps_stays,
            "x_t = α x_0 + σ ε is given. When x̂_0 moves, ε moves against it, and v = α ε − σ x_0 feels both.",
        ),
        "you forgot the roots": (guided_no_root, "α = √ᾱ and σ = √(1 − ᾱ)."),
        "you divided by 0 where ᾱ = 0": (
            guided_divides_by_0,
            "Pure noise says nothing about the condition, so there is no push at ᾱ = 0: leave the term out there.",
        ),
        "you used the first sample's ᾱ for all": (
            guided_first,
            "alpha_bar holds one number for each sample. Reshape its coefficient to (B, 1, …) before you multiply.",
        ),
    },
    correct={
        "a loop through ε and x_0": guided_by_the_noise,
        "an angle": guided_by_an_angle,
        "through x_0 alone": guided_by_the_data,
    },
    forbidden=("guidance.classifier_free", "guidance.classifier", "paths.GaussianPath.convert"),
)


# 2. classifier_step ---------------------------------------------------------------------------------------------------


def reverse(x, x0, s, t, alpha_bars):
    """Mean and variance of q(x_s | x_t, x_0), and β of the leap; s and t are whole numbers."""
    before, now = alpha_bars[s].item(), alpha_bars[t].item()
    kept = now / before
    mean = (math.sqrt(kept) * (1 - before) * x + math.sqrt(before) * (1 - kept) * x0) / (1 - now)
    return mean, (1 - kept) * (1 - before) / (1 - now), 1 - kept


def uphill(log_prob, x):
    """The gradient of the sum of log_prob(x), which is that of each sample."""
    point = x.clone().requires_grad_()
    return torch.autograd.grad(log_prob(point).sum(), point)[0]


def log_of_any(classifier, t, wanted):
    """x → log p(one of the wanted classes | x) of each sample."""
    return lambda x: log_softmax(classifier(x, t), dim=1).masked_fill(~wanted, -math.inf).logsumexp(1)


def steered(push):
    """A step whose mean moves by push(…), a tensor like x, of the parts that are known, unless x_t is pure noise."""

    @functools.wraps(push)
    def step(classifier, x, x0, wanted, s, t, alpha_bars, scale, noise):
        mean, var, beta = reverse(x, x0, s, t, alpha_bars)
        if alpha_bars[t] > 0:
            mean = mean + scale * push(
                log_prob=log_of_any(classifier, t, wanted),
                factor=beta * math.sqrt(alpha_bars[s] / alpha_bars[t]),
                **{"classifier": classifier, "x": x, "x0": x0, "wanted": wanted, "s": s, "t": t},
                **{"alpha_bars": alpha_bars, "mean": mean, "var": var, "beta": beta},
            )
        return mean + math.sqrt(var) * noise

    return step


@steered
def classifier_step(log_prob, x, factor, **_):
    return factor * uphill(log_prob, x)


@steered
def step_at_the_mean(log_prob, mean, factor, **_):
    return factor * uphill(log_prob, mean)


@steered
def step_at_x0(log_prob, x0, factor, **_):
    return factor * uphill(log_prob, x0)


@steered
def step_by_the_variance(log_prob, x, var, **_):
    return var * uphill(log_prob, x)


@steered
def step_by_beta(log_prob, x, beta, **_):
    return beta * uphill(log_prob, x)


@steered
def step_as_far_as_x0(log_prob, x, t, alpha_bars, **_):
    return ((1 - alpha_bars[t]) / alpha_bars[t].sqrt()).item() * uphill(log_prob, x)


@steered
def step_as_far_as_eps(log_prob, x, s, t, alpha_bars, **_):
    """x̂_0 moved by σ g, and the mean with it."""
    pull = alpha_bars[s].sqrt() * (1 - alpha_bars[t] / alpha_bars[s]) / (1 - alpha_bars[t])
    return (pull * (1 - alpha_bars[t]).sqrt()).item() * uphill(log_prob, x)


@steered
def step_no_factor(log_prob, x, **_):
    return uphill(log_prob, x)


@steered
def step_all_at_once(classifier, x, t, wanted, factor, **_):
    return factor * uphill(lambda x: (log_softmax(classifier(x, t), dim=1) * wanted).sum(1), x)


@steered
def step_mean_of_logs(classifier, x, t, wanted, factor, **_):
    def mean(x):
        return (log_softmax(classifier(x, t), dim=1) * wanted).sum(1) / wanted.sum(1)

    return factor * uphill(mean, x)


@steered
def step_best_of_them(classifier, x, t, wanted, factor, **_):
    return factor * uphill(lambda x: log_softmax(classifier(x, t), 1).masked_fill(~wanted, -math.inf).amax(1), x)


@steered
def step_of_the_logits(classifier, x, t, wanted, factor, **_):
    return factor * uphill(lambda x: classifier(x, t).masked_fill(~wanted, -math.inf).logsumexp(1), x)


@steered
def step_of_the_probability(log_prob, x, factor, **_):
    return factor * uphill(lambda x: log_prob(x).exp(), x)


@steered
def step_mean_of_batch(log_prob, x, factor, **_):
    return factor * uphill(log_prob, x) / len(x)


@steered
def step_downhill(log_prob, x, factor, **_):
    return -factor * uphill(log_prob, x)


@steered
def step_softmax_over_the_batch(classifier, x, t, wanted, factor, **_):
    def log_prob(x):
        return log_softmax(classifier(x, t), dim=0).masked_fill(~wanted, -math.inf).logsumexp(1)

    return factor * uphill(log_prob, x)


@steered
def step_asked_at_s(classifier, x, s, wanted, factor, **_):
    return factor * uphill(log_of_any(classifier, s, wanted), x)


def step_upper(classifier, x, x0, wanted, s, t, alpha_bars, scale, noise):
    _, var, beta = reverse(x, x0, s, t, alpha_bars)
    quiet = classifier_step(classifier, x, x0, wanted, s, t, alpha_bars, scale, torch.zeros_like(noise))
    return quiet + math.sqrt(beta if s else 0) * noise


def step_no_push_at_the_end(classifier, x, x0, wanted, s, t, alpha_bars, scale, noise):
    return classifier_step(classifier, x, x0, wanted, s, t, alpha_bars, scale if s else 0.0, noise)


def step_divides_by_0(classifier, x, x0, wanted, s, t, alpha_bars, scale, noise):
    mean, var, beta = reverse(x, x0, s, t, alpha_bars)
    factor = scale * beta * (alpha_bars[s] / alpha_bars[t]).sqrt()
    gradient = uphill(log_of_any(classifier, t, wanted), x)
    return mean + factor.to(x.dtype) * gradient + math.sqrt(var) * noise


def step_first_row(classifier, x, x0, wanted, s, t, alpha_bars, scale, noise):
    return classifier_step(classifier, x, x0, wanted[:1].expand_as(wanted), s, t, alpha_bars, scale, noise)


def step_by_func(classifier, x, x0, wanted, s, t, alpha_bars, scale, noise):
    """x̂_0 is pushed, and the step is DDIM's form of the posterior."""
    a_s, a_t = alpha_bars[s].item(), alpha_bars[t].item()
    if a_t:

        def surprise(x):
            return -(classifier(x, t).softmax(1) * wanted).sum(1).log().sum()

        x0 = x0 - scale * (1 - a_t) / a_t**0.5 * torch.func.grad(surprise)(x)
    var = (1 - a_s) / (1 - a_t) * (1 - a_t / a_s)
    eps = (x - a_t**0.5 * x0) / (1 - a_t) ** 0.5
    return a_s**0.5 * x0 + max(1 - a_s - var, 0.0) ** 0.5 * eps + var**0.5 * noise


def step_in_a_loop(classifier, x, x0, wanted, s, t, alpha_bars, scale, noise):
    rows = []
    for i in range(len(x)):
        point = x[i : i + 1].detach().clone().requires_grad_(True)
        logits = classifier(point, t)[0]
        (logits[wanted[i]].logsumexp(0) - logits.logsumexp(0)).backward()
        mean, var, beta = reverse(x[i], x0[i], s, t, alpha_bars)
        a = math.sqrt(alpha_bars[t] / alpha_bars[s])
        push = scale * beta / a * point.grad[0] if a > 0 else 0
        rows.append(mean + push + var**0.5 * noise[i])
    return torch.stack(rows)


def step_by_the_jacobian(classifier, x, x0, wanted, s, t, alpha_bars, scale, noise):
    """The gradient is Jᵀ(q − p), with J of the logits, p the probabilities, q those among the wanted; in double precision."""
    wide = x.double()
    p = classifier(wide, t).softmax(1)
    q = p * wanted / (p * wanted).sum(1, keepdim=True)
    J = torch.stack([torch.autograd.functional.jacobian(lambda one: classifier(one[None], t)[0], one) for one in wide])
    gradient = torch.einsum("bc,bc...->b...", q - p, J)
    mean, var, beta = reverse(wide, x0.double(), s, t, alpha_bars)
    factor = (alpha_bars[s] / alpha_bars[t]).sqrt().nan_to_num(posinf=0.0) * beta
    return (mean + scale * factor * gradient + math.sqrt(var) * noise.double()).to(x.dtype)


def steering(g, batch, classes, T, s, t, dtype=SINGLE, end=False):
    shape = (batch, classes)
    wanted = torch.rand(shape, generator=g) < 0.4
    some = torch.stack([torch.randperm(classes, generator=g)[:2] for _ in range(batch)])  # at least one, never all
    wanted = wanted.scatter(1, some[:, :1], True).scatter(1, some[:, 1:], False)
    return {
        "classifier": Affine(uniform(g, 0.6, 2, T + 1), uniform(g, -1, 1, T + 1)),
        "x": normal(g, shape, dtype),
        "x0": normal(g, shape, dtype),
        "wanted": wanted,
        "s": s,
        "t": t,
        "alpha_bars": into_noise(g, T) if end else table(g, T),
        "scale": number(g, 1.5, 4),
        "noise": normal(g, shape, dtype),
    }


STEP = Exercise(
    "classifier_step",
    points=3,
    minutes=25,
    difficulty=3,
    reference=classifier_step,
    outputs=("x",),
    visible=Group(
        1,
        lambda g: [
            steering(g, 4, 5, 8, 3, 6),
            steering(g, 3, 6, 6, 2, 5, DOUBLE),
            steering(g, 3, 4, 5, 0, 2),
            steering(g, 2, 4, 6, 3, 6, DOUBLE, end=True),
        ],
    ),
    hidden={
        "other shapes": Group(
            1,
            lambda g: [
                steering(g, 7, 4, 10, whole(g, 1, 4), whole(g, 6, 10)),
                steering(g, 2, 9, 8, whole(g, 1, 4), 7, DOUBLE),
                steering(g, 1, 5, 6, 2, whole(g, 4, 6)),
            ],
        ),
        "the first step, a single step, the last one": Group(
            1,
            lambda g: [
                steering(g, 3, 5, 7, whole(g, 2, 6), 7, end=True),
                steering(g, 3, 4, 6, 4, 5, DOUBLE),
                steering(g, 4, 5, 6, 0, whole(g, 2, 5)),
                steering(g, 1, 2, 4, 0, 1, DOUBLE),
            ],
        ),
    },
    mistakes={
        "you asked for the gradient at the mean": (
            step_at_the_mean,
            "The score is that of x_t, and the classifier is told the time t: both belong to x_t.",
        ),
        "you asked the classifier about x̂_0": (
            step_at_x0,
            "The classifier of guidance knows noisy images, and t says how noisy: ask it about x_t.",
        ),
        "you moved the mean by Σ times the gradient": (
            step_by_the_variance,
            "That is right in the limit of short steps only. Put the push into the score, and follow it into the mean.",
        ),
        "you moved the mean by β times the gradient": (
            step_by_beta,
            "Nearly. x̂_0 moves by (σ_t²/α_t) times the gradient, and the mean has the factor α_s β/σ_t² of x̂_0: an α_s/α_t is left.",
        ),
        "you moved the mean as far as x̂_0": (
            step_as_far_as_x0,
            "x̂_0 moves by (σ_t²/α_t) times the gradient. In the mean it stands with a factor.",
        ),
        "you moved x̂_0 as far as ε": (
            step_as_far_as_eps,
            "ε moves by −σ times the gradient, and x̂_0 = (x_t − σ ε)/α by σ²/α times it.",
        ),
        "you moved the mean by the gradient itself": (
            step_no_factor,
            "The gradient is a push of the score. Follow it: from the score to x̂_0, from there to the mean.",
        ),
        "you asked for all the wanted classes at once": (
            step_all_at_once,
            "A sum of logarithms is the logarithm of a product: this digit, and that one. Wanted is one of them: add the probabilities.",
        ),
        "you took the mean of the logarithms": (
            step_mean_of_logs,
            "That is the logarithm of a product, too. The probability of one of several classes is the sum of their probabilities.",
        ),
        "you followed the likeliest of the wanted classes alone": (
            step_best_of_them,
            "The probability of one of several classes is the sum of their probabilities. The maximum forgets the others.",
        ),
        "you left out the classes that are not wanted": (
            step_of_the_logits,
            "Logits are no probabilities: normalise over all classes first, with log_softmax.",
        ),
        "you took the gradient of the probability": (
            step_of_the_probability,
            "It is ∇log p: where p is small, ∇p is small too, and the samples that need a push would get none.",
        ),
        "you took the mean over the batch before the gradient": (
            step_mean_of_batch,
            "Then each sample is pushed only 1/B as far. Sum over the samples; many losses take the mean unless told otherwise.",
        ),
        "you walked downhill": (
            step_downhill,
            "A loss is −log p. Guidance climbs log p.",
        ),
        "you normalised over the batch": (
            step_softmax_over_the_batch,
            "The probabilities of one sample's classes add up to 1: log_softmax over dimension 1.",
        ),
        "you told the classifier the time s": (step_asked_at_s, "x has the noise of time t."),
        "you drew noise of variance β": (
            step_upper,
            "Asked is the lower choice: β̃, the variance of q(x_s | x_t, x_0).",
        ),
        "you gave the last step no push": (
            step_no_push_at_the_end,
            "At s = 0 there is no noise, but the last state is x̂_0, and that is pushed like in any other step.",
        ),
        "you divided by 0 where ᾱ_t = 0": (
            step_divides_by_0,
            "Pure noise says nothing about the class: its gradient is 0 in truth. Leave the push out there.",
        ),
        "you used the first sample's classes for all": (
            step_first_row,
            "Each sample has a row of its own in wanted.",
        ),
    },
    correct={
        "torch.func, and x̂_0 pushed": step_by_func,
        "a loop": step_in_a_loop,
        "the Jacobian of the logits": step_by_the_jacobian,
    },
    forbidden=(
        "guidance.classifier",
        "samplers.ddpm",
        "samplers.ddpm_step",
        "samplers.ddim_step",
        "paths.GaussianPath.posterior",
        "paths.GaussianPath.bridge",
    ),
)


# 3. guided_moments ----------------------------------------------------------------------------------------------------


def regression(mean, var, kept):
    """Slope and constant of E[x_0 | x_t] for N(mean, var) data, at a time with ᾱ = kept."""
    slope = math.sqrt(kept) * var / (kept * var + 1 - kept)
    return slope, mean - slope * math.sqrt(kept) * mean


def sharpened(m, V, m_y, V_y, w):
    """Mean and variance of N(m, V)^(1−w) · N(m_y, V_y)^w."""
    precision = (1 - w) / V + w / V_y
    return ((1 - w) * m / V + w * m_y / V_y) / precision, 1 / precision


def noises(t, s, alpha_bars, eta):
    """α_t, α_s, the factor of x_t in DDIM's step, and the variance of its new noise."""
    a_t, a_s = alpha_bars[t].item(), alpha_bars[s].item()
    fresh = eta**2 * (1 - a_t / a_s) * (1 - a_s) / (1 - a_t)
    return math.sqrt(a_t), math.sqrt(a_s), math.sqrt((1 - a_s - fresh) / (1 - a_t)), fresh


def sampled(m, V, m_y, V_y, w, alpha_bars, times, eta, fit=regression, growth=lambda k, d: (k + d) ** 2, rest=noises):
    """Mean and variance of the last state of DDIM; `growth` is what a step does to the variance, `rest` its coefficients."""
    mean, var = torch.zeros_like(w), torch.ones_like(w)
    for t, s in pairwise(times.tolist()):
        alpha, alpha_s, keep, fresh = rest(t, s, alpha_bars, eta)
        pull, kept = alpha_s - keep * alpha, alpha_bars[t].item()
        (slope, const), (slope_y, const_y) = fit(m, V, kept), fit(m_y, V_y, kept)
        slope, const = pull * ((1 - w) * slope + w * slope_y), pull * ((1 - w) * const + w * const_y)
        mean, var = (keep + slope) * mean + const, growth(keep, slope) * var + fresh
    return mean, var


def guided_moments(m, V, m_y, V_y, w, alpha_bars, times, eta):
    return *sampled(m, V, m_y, V_y, w, alpha_bars, times, eta), *sharpened(m, V, m_y, V_y, w)


def moments_other_weight(m, V, m_y, V_y, w, alpha_bars, times, eta):
    return guided_moments(m, V, m_y, V_y, 1 + w, alpha_bars, times, eta)


def moments_exchanged(m, V, m_y, V_y, w, alpha_bars, times, eta):
    return guided_moments(m_y, V_y, m, V, w, alpha_bars, times, eta)


def moments_growth_not_squared(m, V, m_y, V_y, w, alpha_bars, times, eta):
    found = sampled(m, V, m_y, V_y, w, alpha_bars, times, eta, growth=lambda k, d: (k + d).abs())
    return *found, *sharpened(m, V, m_y, V_y, w)


def moments_independent(m, V, m_y, V_y, w, alpha_bars, times, eta):
    found = sampled(m, V, m_y, V_y, w, alpha_bars, times, eta, growth=lambda k, d: k**2 + d**2)
    return *found, *sharpened(m, V, m_y, V_y, w)


def moments_shrinks_uncentred(m, V, m_y, V_y, w, alpha_bars, times, eta):
    def fit(mean, var, kept):
        slope, _ = regression(mean, var, kept)
        return slope, (1 - slope) * mean

    return *sampled(m, V, m_y, V_y, w, alpha_bars, times, eta, fit), *sharpened(m, V, m_y, V_y, w)


def moments_no_mean(m, V, m_y, V_y, w, alpha_bars, times, eta):
    def fit(mean, var, kept):
        return regression(mean, var, kept)[0], 0.0

    return *sampled(m, V, m_y, V_y, w, alpha_bars, times, eta, fit), *sharpened(m, V, m_y, V_y, w)


def moments_sigma_for_its_square(m, V, m_y, V_y, w, alpha_bars, times, eta):
    def fit(mean, var, kept):
        slope = math.sqrt(kept) * var / (kept * var + math.sqrt(1 - kept))
        return slope, mean - slope * math.sqrt(kept) * mean

    return *sampled(m, V, m_y, V_y, w, alpha_bars, times, eta, fit), *sharpened(m, V, m_y, V_y, w)


def moments_alpha_bar_for_alpha(m, V, m_y, V_y, w, alpha_bars, times, eta):
    def fit(mean, var, kept):
        slope = kept * var / (kept * var + 1 - kept)
        return slope, mean - slope * kept * mean

    return *sampled(m, V, m_y, V_y, w, alpha_bars, times, eta, fit), *sharpened(m, V, m_y, V_y, w)


def moments_one_gaussian(m, V, m_y, V_y, w, alpha_bars, times, eta):
    """Samples the sharpened density."""
    mean, var = sharpened(m, V, m_y, V_y, w)
    moved, grown = [], []
    for one, spread in zip(mean.tolist(), var.tolist(), strict=True):
        end = sampled(one, spread, one, spread, torch.ones(1, dtype=DOUBLE), alpha_bars, times)
        moved.append(end[0])
        grown.append(end[1])
    return torch.cat(moved), torch.cat(grown), mean, var


def moments_with(rest):
    """With other coefficients of the step."""

    def answer(m, V, m_y, V_y, w, alpha_bars, times, eta):
        return *sampled(m, V, m_y, V_y, w, alpha_bars, times, eta, rest=rest), *sharpened(m, V, m_y, V_y, w)

    return answer


@moments_with
def moments_no_new_noise(t, s, alpha_bars, eta):
    return noises(t, s, alpha_bars, 0.0)


@moments_with
def moments_all_new_noise(t, s, alpha_bars, eta):
    return noises(t, s, alpha_bars, 1.0)


@moments_with
def moments_eta_not_squared(t, s, alpha_bars, eta):
    return noises(t, s, alpha_bars, eta**0.5)


@moments_with
def moments_old_noise_kept(t, s, alpha_bars, eta):
    """Adds new noise and takes none away."""
    alpha, alpha_s, _, fresh = noises(t, s, alpha_bars, eta)
    return alpha, alpha_s, noises(t, s, alpha_bars, 0.0)[2], fresh


@moments_with
def moments_noise_forgotten(t, s, alpha_bars, eta):
    """Takes old noise away, and does not count the new."""
    return *noises(t, s, alpha_bars, eta)[:3], 0.0


@moments_with
def moments_new_noise_is_beta(t, s, alpha_bars, eta):
    a_t, a_s = alpha_bars[t].item(), alpha_bars[s].item()
    fresh = eta**2 * min(1 - a_t / a_s, 1 - a_s)
    return math.sqrt(a_t), math.sqrt(a_s), math.sqrt((1 - a_s - fresh) / (1 - a_t)), fresh


def moments_last_x0_only(m, V, m_y, V_y, w, alpha_bars, times, eta):
    """x̂_0 of the last state instead of the last state."""
    mean, var = sampled(m, V, m_y, V_y, w, alpha_bars, times, eta)
    kept = alpha_bars[times[-1]].item()
    (slope, const), (slope_y, const_y) = regression(m, V, kept), regression(m_y, V_y, kept)
    slope, const = (1 - w) * slope + w * slope_y, (1 - w) * const + w * const_y
    return slope * mean + const, slope**2 * var, *sharpened(m, V, m_y, V_y, w)


def moments_deviation(m, V, m_y, V_y, w, alpha_bars, times, eta):
    mean, var, sharp_mean, sharp_var = guided_moments(m, V, m_y, V_y, w, alpha_bars, times, eta)
    return mean, var.sqrt(), sharp_mean, sharp_var.sqrt()


def moments_sharp_mixed(m, V, m_y, V_y, w, alpha_bars, times, eta):
    found = sampled(m, V, m_y, V_y, w, alpha_bars, times, eta)
    return *found, (1 - w) * m + w * m_y, (1 - w) * V + w * V_y


def moments_sharp_unweighted_mean(m, V, m_y, V_y, w, alpha_bars, times, eta):
    found = guided_moments(m, V, m_y, V_y, w, alpha_bars, times, eta)
    return *found[:2], (1 - w) * m + w * m_y, found[3]


def moments_sharp_product(m, V, m_y, V_y, w, alpha_bars, times, eta):
    """N(m, V) · N(m_y, V_y)^w."""
    precision = 1 / V + w / V_y
    return *sampled(m, V, m_y, V_y, w, alpha_bars, times, eta), (m / V + w * m_y / V_y) / precision, 1 / precision


def moments_of_two_walks(m, V, m_y, V_y, w, alpha_bars, times, eta):
    """A step is affine, so two walks, from 0 and from 1, say all."""

    def guess(x, kept, mean, var):
        return (mean / var + math.sqrt(kept) * x / (1 - kept)) / (1 / var + kept / (1 - kept))

    x = last = torch.stack([torch.zeros_like(w), torch.ones_like(w)])
    added = torch.zeros_like(w)
    for t, s in pairwise(times.tolist()):
        a_t, a_s = alpha_bars[t].item(), alpha_bars[s].item()
        x0 = guess(x, a_t, m, V) + w * (guess(x, a_t, m_y, V_y) - guess(x, a_t, m, V))
        eps = (x - a_t**0.5 * x0) / (1 - a_t) ** 0.5
        new = eta**2 * (1 - a_s) / (1 - a_t) * (1 - a_t / a_s)
        x = a_s**0.5 * x0 + (1 - a_s - new) ** 0.5 * eps
        added = added * ((x[1] - x[0]) / (last[1] - last[0])) ** 2 + new
        last = x
    rate = w / V_y + (1 - w) / V  # of the sharpened density: minus its log is rate/2 · x² − lean · x + …
    lean = w * m_y / V_y + (1 - w) * m / V
    return x[0], (x[1] - x[0]) ** 2 + added, lean / rate, rate.reciprocal()


def moments_by_matrices(m, V, m_y, V_y, w, alpha_bars, times, eta):
    """With ε̂ = −σ·score and one weight after the other: matrices that act on (mean, variance, 1)."""
    rows = []
    for weight in w.tolist():
        state = np.array([0.0, 1.0, 1.0])
        for t, s in pairwise(times.tolist()):
            a_t, a_s = alpha_bars[t].item(), alpha_bars[s].item()
            alpha, sigma, alpha_s = np.sqrt([a_t, 1 - a_t, a_s])
            new = eta**2 * (1 - a_t / a_s) * (1 - a_s) / (1 - a_t)
            old = np.sqrt(1 - a_s - new)
            eps = np.zeros(2)  # ε̂: its factor of x, and its constant
            for share, mean, var in ((1 - weight, m, V), (weight, m_y, V_y)):
                eps += share * sigma / (a_t * var + 1 - a_t) * np.array([1, -alpha * mean])
            if alpha:  # x_s = α_s (x − σ ε̂)/α + old·ε̂
                slope, const = np.array([alpha_s / alpha, 0]) + (old - alpha_s * sigma / alpha) * eps
            else:  # pure noise: x̂_0 is the mean, and ε̂ is x
                slope, const = old, alpha_s * ((1 - weight) * m + weight * m_y)
            state = np.array([[slope, 0, const], [0, slope**2, new], [0, 0, 1]]) @ state
        precision = (1 - weight) / V + weight / V_y
        rows.append([state[0], state[1], ((1 - weight) * m / V + weight * m_y / V_y) / precision, 1 / precision])
    return tuple(torch.tensor(column, dtype=DOUBLE) for column in zip(*rows, strict=True))


def moments_by_single_noises(m, V, m_y, V_y, w, alpha_bars, times, eta):
    """The last state is a constant, plus each noise times a factor: put in a 1 for one noise at a time, and read it off."""
    count = len(times)
    z = torch.eye(count, dtype=DOUBLE)[:, :, None].expand(-1, -1, len(w))  # row i has the 1 at noise i
    z = torch.cat([torch.zeros(1, count, len(w), dtype=DOUBLE), z])  # and a row without noise
    alpha, x = alpha_bars.sqrt(), z[:, 0]
    for i in range(count - 1):
        t, s = times[i], times[i + 1]
        noise_t, noise_s = 1 - alpha_bars[t], 1 - alpha_bars[s]
        both = [
            mu + alpha[t] * v / (alpha[t] ** 2 * v + noise_t) * (x - alpha[t] * mu) for mu, v in ((m, V), (m_y, V_y))
        ]
        x0 = torch.lerp(*both, w.expand_as(x))
        new = (noise_s / noise_t * (1 - alpha_bars[t] / alpha_bars[s])).sqrt() * eta
        x = alpha[s] * x0 + ((noise_s - new**2) / noise_t).sqrt() * (x - alpha[t] * x0) + new * z[:, i + 1]
    sharp_var = V * V_y / (V_y + w * (V - V_y))
    return x[0], (x[1:] - x[0]).square().sum(0), sharp_var * (m / V + w * (m_y / V_y - m / V)), sharp_var


def classes(g, T, count, weights, eta, end=0, into=False, first=None):
    """A wide density and a narrower one of a class, so that the sharpened one exists for every weight drawn."""
    V = number(g, 0.8, 1.8)
    return {
        "m": number(g, -0.8, 0.8),
        "V": V,
        "m_y": number(g, 0.9, 1.6),
        "V_y": V * number(g, 0.3, 0.7),
        "w": uniform(g, 0.2, 3.5, weights) if isinstance(weights, int) else torch.tensor(weights, dtype=DOUBLE),
        "alpha_bars": into_noise(g, T) if into else table(g, T),
        "times": descending(g, T if first is None else first, end, count),
        "eta": eta,
    }


MOMENTS = Exercise(
    "guided_moments",
    points=4,
    minutes=25,
    difficulty=3,
    reference=guided_moments,
    outputs=("mean", "var", "sharp_mean", "sharp_var"),
    visible=Group(
        1,
        lambda g: [
            classes(g, 9, 4, 3, 0.6, end=1),
            classes(g, 12, 6, [0.0, 1.0, 2.0], 0.0, into=True),
            classes(g, 6, 2, 2, 1.0, end=2),
        ],
    ),
    hidden={
        "other weights and grids": Group(
            2,
            lambda g: [
                classes(g, 15, 8, 5, number(g, 0.3, 0.8), end=whole(g, 1, 4)),
                classes(g, 20, 12, 1, number(g, 0.3, 0.8), end=1),
                classes(g, 10, 3, [-0.1, number(g, 4, 6)], 0.0, end=2),
            ],
        ),
        "one step, down to the data, from pure noise": Group(
            1,
            lambda g: [
                classes(g, 8, 1, 3, number(g, 0.3, 0.8), end=whole(g, 1, 4)),
                classes(g, 8, 4, 3, 1.0),
                classes(g, 9, 5, 2, number(g, 0.3, 0.8), end=1, into=True),
                classes(g, 12, 4, 2, 0.0, end=3, first=9),
            ],
        ),
    },
    mistakes={
        "you counted w as Algorithm 2 does": (
            moments_other_weight,
            "Here w is the slide's: (1 − w)·unconditional + w·conditional, and w = 1 is the plain conditional model.",
        ),
        "you exchanged the data and the class": (
            moments_exchanged,
            "w is the weight of the class: w = 1 must give N(m_y, V_y).",
        ),
        "you multiplied the variance by the slope, not by its square": (
            moments_growth_not_squared,
            "x → a·x + b multiplies the deviation by |a| and the variance by a².",
        ),
        "you added the variances of x̂_0 and of x": (
            moments_independent,
            "Variances add for independent numbers. x̂_0 is a function of x: first collect all that multiplies x, then square.",
        ),
        "you forgot that x_t holds α times the mean": (
            moments_shrinks_uncentred,
            "x̂_0 = m + slope·(x_t − α m): at x_t = α m the best guess is m.",
        ),
        "you left the means out of x̂_0": (
            moments_no_mean,
            "x̂_0 = m + slope·(x_t − α m). Without m the samples stay around 0.",
        ),
        "you wrote σ for σ²": (
            moments_sigma_for_its_square,
            "x_t has the variance α² V + σ².",
        ),
        "you wrote ᾱ for α": (
            moments_alpha_bar_for_alpha,
            "x_t = √ᾱ x_0 + σ ε: its mean and its covariance with x_0 have the factor √ᾱ. Only its variance, ᾱ V + σ², has ᾱ.",
        ),
        "you sampled the sharpened density": (
            moments_one_gaussian,
            "The guidance of each t is made of the two densities at that t. That is another field than that of the sharpened data.",
        ),
        "you left the new noise out altogether": (
            moments_no_new_noise,
            "Only η = 0 draws none. η enters twice: in the root before ε̂, and as η² β̃ on the variance.",
        ),
        "you drew all noise anew, whatever η is": (
            moments_all_new_noise,
            "That is η = 1, ancestral sampling. The new noise has the variance η² β̃.",
        ),
        "you wrote η for η²": (moments_eta_not_squared, "η multiplies the deviation √β̃: the variance has η²."),
        "you added new noise and took no old one away": (
            moments_old_noise_kept,
            "Before ε̂ stands the root of σ_s² − η² β̃: with it, x_s has noise of variance σ_s² in all.",
        ),
        "you took old noise away and did not count the new": (
            moments_noise_forgotten,
            "z is independent of x_t, so each step adds η² β̃ to the variance.",
        ),
        "you drew new noise of variance η² β": (
            moments_new_noise_is_beta,
            "It is η² β̃, with β̃ = β σ_s²/σ_t², the variance of q(x_s | x_t, x_0).",
        ),
        "you returned x̂_0 of the last state": (
            moments_last_x0_only,
            "Asked is the last state itself, at times[-1]. Only where that is 0 is it x̂_0.",
        ),
        "you returned deviations": (moments_deviation, "Both are variances."),
        "you mixed the two densities' means and variances": (
            moments_sharp_mixed,
            "Multiply the densities: the exponent holds (1 − w)(x − m)²/V + w(x − m_y)²/V_y, so the precisions 1/V are what is mixed.",
        ),
        "you mixed the means without their precisions": (
            moments_sharp_unweighted_mean,
            "In the exponent the means stand over their variances: the sharper density counts for more.",
        ),
        "you multiplied p(x) with p(x|y)^w": (
            moments_sharp_product,
            "Asked is p(x) p(y|x)^w, and by Bayes p(y|x) is p(x|y)/p(x) up to a constant: p(x)^(1 − w) p(x|y)^w.",
        ),
    },
    correct={
        "two walks": moments_of_two_walks,
        "scores and matrices": moments_by_matrices,
        "one noise at a time": moments_by_single_noises,
    },
    tolerance=1e-6,
    forbidden=("guidance.classifier_free", "samplers.ddim", "samplers.ddim_step", "toy.GaussianMixture.denoiser"),
)


# 4. best_variance -----------------------------------------------------------------------------------------------------


def leaps(times, alpha_bars):
    """Of each step: β, β̃, and the factor of x_0 in the mean."""
    a_t, a_s = alpha_bars[times[:-1]], alpha_bars[times[1:]]
    beta = 1 - a_t / a_s
    return beta, beta * (1 - a_s) / (1 - a_t), a_s.sqrt() * beta / (1 - a_t)


def clip(lower):
    """β̃ with that of the step before in the last place."""
    return torch.cat([lower[:-1], lower[-2:-1]])


def share(var, low, high):
    return (var / low).log() / (high / low).log()


def best_variance(mse, times, alpha_bars):
    return best_of(mse, times, alpha_bars)


def best_of(mse, times, alpha_bars, var=None, fraction=None, extra=None, steps=leaps, clip=clip):
    """The right answer, or one with another formula for some of it; each is a function of all that is known."""
    beta, lower, c = steps(times, alpha_bars)
    known = {"beta": beta, "lower": lower, "c": c, "mse": mse, "alpha_bars": alpha_bars}
    known["var"] = var(**known) if var else lower + c**2 * mse
    known["low"] = clip(lower)
    found = fraction(**known) if fraction else share(known["var"], known["low"], beta)
    ratio = known["var"] / beta
    return known["var"], found, extra(ratio) if extra else (ratio - 1 - ratio.log()) / 2 / math.log(2)


def best_with(**changes):
    return functools.wraps(best_of)(functools.partial(best_of, **changes))


best_straight = best_with(fraction=lambda var, low, beta, **_: (var - low) / (beta - low))
best_other_way = best_with(fraction=lambda var, low, beta, **_: 1 - share(var, low, beta))
best_between_minus_1_and_1 = best_with(fraction=lambda var, low, beta, **_: 2 * share(var, low, beta) - 1)
best_clamped = best_with(fraction=lambda var, low, beta, **_: share(var, low, beta).clamp(0, 1))
best_c_not_squared = best_with(var=lambda lower, c, mse, **_: lower + c * mse)
best_no_c = best_with(var=lambda lower, mse, **_: lower + mse)
best_error_alone = best_with(var=lambda c, mse, **_: c**2 * mse)
best_deviation = best_with(var=lambda lower, c, mse, **_: (lower + c**2 * mse).sqrt())
best_error_times_beta = best_with(var=lambda lower, beta, mse, **_: lower + beta * mse)
best_error_squared = best_with(var=lambda lower, c, mse, **_: lower + (c * mse) ** 2)
best_on_beta = best_with(var=lambda beta, c, mse, **_: beta + c**2 * mse)
best_no_clip = best_with(clip=lambda lower: lower)
best_tiny_clip = best_with(clip=lambda lower: lower.clamp(min=1e-20))
best_clip_from_the_start = best_with(clip=lambda lower: torch.cat([lower[:-1], lower[:1]]))
best_clip_everywhere = best_with(var=lambda lower, c, mse, **_: clip(lower) + c**2 * mse)
best_nats = best_with(extra=lambda ratio: (ratio - 1 - ratio.log()) / 2)
best_no_half = best_with(extra=lambda ratio: (ratio - 1 - ratio.log()) / math.log(2))
best_upside_down = best_with(extra=lambda ratio: (1 / ratio - 1 + ratio.log()) / 2 / math.log(2))
best_logs_alone = best_with(extra=lambda ratio: -ratio.log() / 2 / math.log(2))


def best_single_steps(mse, times, alpha_bars):
    """β and β̃ of the full chain at each t, not of the leap."""

    def steps(times, alpha_bars):
        return leaps(torch.stack([times[:-1], times[:-1] - 1], 1).flatten(), alpha_bars)

    def of_each(times, alpha_bars):
        return [part[::2] for part in steps(times, alpha_bars)]

    return best_of(mse, times, alpha_bars, steps=of_each, clip=lambda low: torch.where(low > 0, low, clip(low)))


def best_clip_of_the_chain(mse, times, alpha_bars):
    second = (1 - alpha_bars[2] / alpha_bars[1]) * (1 - alpha_bars[1]) / (1 - alpha_bars[2])
    return best_of(mse, times, alpha_bars, clip=lambda lower: torch.cat([lower[:-1], second[None]]))


def best_in_a_loop(mse, times, alpha_bars):
    variances, fractions, extras, low = [], [], [], None
    steps = list(pairwise(times.tolist()))
    for error, (t, s) in zip(mse.tolist(), steps, strict=True):
        now, before = alpha_bars[t].item(), alpha_bars[s].item()
        added = 1 - now / before
        lower = added * (1 - before) / (1 - now)
        var = lower + (math.sqrt(before) * added / (1 - now)) ** 2 * error
        low = lower if s > 0 else low
        variances.append(var)
        fractions.append((math.log(var) - math.log(low)) / (math.log(added) - math.log(low)))
        extras.append(0.5 * (var / added / math.log(2) - 1 / math.log(2) - math.log2(var) + math.log2(added)))
    return tuple(torch.tensor(column, dtype=DOUBLE) for column in (variances, fractions, extras))


def best_by_the_noise_left(mse, times, alpha_bars):
    """In units of the data: y = x/α has noise of variance N, which falls from N_t to N_s; no table is divided by ᾱ_t."""
    a_t, a_s = alpha_bars[times].double()[:-1], alpha_bars[times].double()[1:]
    noise_s, noise_t, size = a_t * (1 - a_s), a_s * (1 - a_t), a_s * (1 - a_t)  # N_s and N_t, both times ᾱ_s ᾱ_t
    inner = (noise_t - noise_s) / noise_t  # how far y_s lies from y_t towards x_0
    low = (1 - a_s) * inner
    var = low + a_s * inner**2 * mse
    high = (size - a_t * (1 - a_s)) / a_s
    held = low.clone()
    held[-1] = low[-2]
    bits = torch.log2(torch.exp(var / high - 1) * high / var) / 2
    return var, torch.log2(var / held) / torch.log2(high / held), bits


def best_by_search(mse, times, alpha_bars):
    """The minimum of the cost E(x_s − mean)²/(2Σ) + ½ log Σ over log Σ, by Newton's method."""
    a_t, a_s = alpha_bars[times[:-1]], alpha_bars[times[1:]]
    kept = a_t / a_s
    upper = 1 - kept
    lower = (1 - a_s) * upper / (1 - a_t)
    square = lower + a_s * upper**2 / (1 - a_t) ** 2 * mse
    log_var = square.log() - 0.3
    for _ in range(40):
        ratio = square * torch.exp(-log_var)
        log_var = log_var - (1 - ratio) / ratio
    low = torch.cat([lower[:-1], lower[-2:-1]]).log()

    def cost(log_var):
        return (square * (-log_var).exp() + log_var) / (2 * math.log(2))

    return log_var.exp(), (log_var - low) / (upper.log() - low), cost(upper.log()) - cost(log_var)


def erring(g, T, count, into=False, large=False, first=None):
    alpha_bars = into_noise(g, T) if into else table(g, T)
    return {
        "mse": uniform(g, 1.5, 4, count) if large else uniform(g, 0.1, 0.9, count),
        "times": descending(g, T if first is None else first, 0, count),
        "alpha_bars": alpha_bars,
    }


BEST = Exercise(
    "best_variance",
    points=3,
    minutes=20,
    difficulty=3,
    reference=best_variance,
    outputs=("variance", "fraction", "extra"),
    visible=Group(
        1, lambda g: [erring(g, 14, 4), erring(g, 12, 5, into=True), erring(g, 12, 3, large=True), erring(g, 15, 3)]
    ),
    hidden={
        "other grids": Group(1, lambda g: [erring(g, 30, 12), erring(g, 18, 4, first=13), erring(g, 16, 5, into=True)]),
        "three steps, all steps, large errors": Group(
            1,
            lambda g: [
                erring(g, 12, 3),
                erring(g, 6, 6),
                erring(g, 15, 5, large=True),
                erring(g, 9, 3, into=True, large=True),
            ],
        ),
    },
    mistakes={
        "you measured the fraction between the variances": (
            best_straight,
            "Improved DDPM interpolates the logarithms: log Σ = v log β + (1 − v) log β̃.",
        ),
        "you measured the fraction from β": (
            best_other_way,
            "v = 1 is β, the upper choice, and v = 0 is β̃.",
        ),
        "you gave what the network puts out, between −1 and 1": (
            best_between_minus_1_and_1,
            "Asked is v, for which 0 is β̃ and 1 is β.",
        ),
        "you held the fraction between 0 and 1": (
            best_clamped,
            "β and β̃ bound the best variance for data of variance up to 1. With large errors it lies above β.",
        ),
        "you forgot to square the factor of x_0": (
            best_c_not_squared,
            "An error d of x̂_0 moves the mean by c·d, and what counts is its square.",
        ),
        "you forgot the factor of x_0": (
            best_no_c,
            "In the mean of q(x_s | x_t, x_0) stands c·x_0, so an error of x̂_0 counts c² times.",
        ),
        "you left out β̃": (
            best_error_alone,
            "x_s is spread by β̃ around the true mean, and the model's mean is off by c(x_0 − x̂_0): the two squares add up.",
        ),
        "you returned the deviation": (best_deviation, "The first value asked for is a variance."),
        "you multiplied the error by β": (
            best_error_times_beta,
            "How far an error of x̂_0 moves the mean is said by the factor of x_0 in it, squared.",
        ),
        "you squared the error again": (
            best_error_squared,
            "mse is a mean of squares already; only the factor c has to be squared.",
        ),
        "you added the error to β": (
            best_on_beta,
            "β̃ is the spread of x_s when x_0 is known. The error of x̂_0 comes on top of that, not on top of β.",
        ),
        "you counted in nats": (best_nats, "A nat is 1/log 2 bits: divide by log 2."),
        "you lost a ½ of the cost": (
            best_no_half,
            "The cost of a Gaussian is its mean square over 2Σ plus ½ log Σ: both terms have their ½.",
        ),
        "you turned the ratio of the variances over in the cost": (
            best_upside_down,
            "The mean square is Σ*, and it stands over twice the variance that is used, 2β.",
        ),
        "you compared the logarithms only": (
            best_logs_alone,
            "A wider Gaussian pays ½ log Σ more, and less for the mean square: both terms change.",
        ),
        "you took β and β̃ from the full chain": (
            best_single_steps,
            "β, β̃ and c belong to the step of the list, from t to s: β = 1 − ᾱ_t/ᾱ_s, and s stands where the chain has t − 1.",
        ),
        "you took the logarithm of 0": (
            best_no_clip,
            "At s = 0 there is β̃ = 0. Take the β̃ of the step before in its place.",
        ),
        "you clipped β̃ to a tiny number": (
            best_tiny_clip,
            "So the first DDPM did. Then log β̃ says something about the tiny number only. Take the β̃ of the step before in its place.",
        ),
        "you clipped with β̃_2 of the full chain": (
            best_clip_of_the_chain,
            "On a list of times, the step before is the one before in the list.",
        ),
        "you clipped β̃ in the variance, too": (
            best_clip_everywhere,
            "The best variance needs no logarithm of β̃: at s = 0 it is the error itself. Only the fraction needs the clip.",
        ),
        "you clipped with the β̃ of the first step": (
            best_clip_from_the_start,
            "Times descend, so the step to 0 is the last of the list and its neighbour is the one before.",
        ),
    },
    correct={
        "a loop": best_in_a_loop,
        "the noise that is left": best_by_the_noise_left,
        "Newton's method": best_by_search,
    },
    forbidden=(
        "paths.GaussianPath.log_variance",
        "paths.GaussianPath.posterior",
        "paths.GaussianPath.bridge",
        "paths.GaussianPath.transition",
    ),
)


# 5. exact_inversion ---------------------------------------------------------------------------------------------------


def ratio_and_turn(s, t, alpha_bars):
    """a = α_t/α_s and σ_t − a σ_s."""
    a_s, a_t = alpha_bars[s].item(), alpha_bars[t].item()
    a = math.sqrt(a_t / a_s)
    return a, math.sqrt(1 - a_t) - a * math.sqrt(1 - a_s)


def inverting(improve):
    """An inversion from improve(model, x_s, guess of x_t, s, t, alpha_bars) → a better guess; the first guess is x_s."""

    @functools.wraps(improve)
    def invert(eps_model, x, times, alpha_bars, rounds):
        for s, t in pairwise(times.tolist()):
            guess = x
            for _ in range(rounds):
                guess = improve(eps_model, x, guess, s, t, alpha_bars)
            x = guess
        return x

    return invert


@inverting
def exact_inversion(model, x, guess, s, t, alpha_bars):
    a, turn = ratio_and_turn(s, t, alpha_bars)
    return a * x + turn * model(guess, t)


@inverting
def inversion_asks_at_s(model, x, guess, s, t, alpha_bars):
    a, turn = ratio_and_turn(s, t, alpha_bars)
    return a * x + turn * model(guess, s)


@inverting
def inversion_runs_on(model, x, guess, s, t, alpha_bars):
    a, turn = ratio_and_turn(s, t, alpha_bars)
    return a * guess + turn * model(guess, t)


@inverting
def inversion_asks_x_s(model, x, guess, s, t, alpha_bars):
    a, turn = ratio_and_turn(s, t, alpha_bars)
    return a * x + turn * model(x, t)


@inverting
def inversion_minus(model, x, guess, s, t, alpha_bars):
    a, turn = ratio_and_turn(s, t, alpha_bars)
    return a * x - turn * model(guess, t)


@inverting
def inversion_ratio_over(model, x, guess, s, t, alpha_bars):
    a, _ = ratio_and_turn(s, t, alpha_bars)
    turn = math.sqrt(1 - alpha_bars[t]) - math.sqrt(1 - alpha_bars[s]) / a
    return x / a + turn * model(guess, t)


@inverting
def inversion_plain_difference(model, x, guess, s, t, alpha_bars):
    a, _ = ratio_and_turn(s, t, alpha_bars)
    return a * x + (math.sqrt(1 - alpha_bars[t]) - math.sqrt(1 - alpha_bars[s])) * model(guess, t)


@inverting
def inversion_no_ratio(model, x, guess, s, t, alpha_bars):
    _, turn = ratio_and_turn(s, t, alpha_bars)
    return x + turn * model(guess, t)


@inverting
def inversion_no_root(model, x, guess, s, t, alpha_bars):
    kept = (alpha_bars[t] / alpha_bars[s]).item()
    return kept * x + ((1 - alpha_bars[t]) - kept * (1 - alpha_bars[s])).item() * model(guess, t)


@inverting
def inversion_new_noise(model, x, guess, s, t, alpha_bars):
    """The chain's step with the predicted noise in the place of new noise."""
    kept = (alpha_bars[t] / alpha_bars[s]).item()
    return math.sqrt(kept) * x + math.sqrt(1 - kept) * model(guess, t)


@inverting
def inversion_downwards(model, x, guess, s, t, alpha_bars):
    """DDIM's own step, from t to s."""
    a, turn = ratio_and_turn(s, t, alpha_bars)
    return (x - turn * model(guess, t)) / a


@inverting
def inversion_through_x0(model, x, guess, s, t, alpha_bars):
    """x_t = (x_s − pull·x̂_0)/keep, which divides by σ_s."""
    alpha_s, alpha_t = alpha_bars[s].sqrt(), alpha_bars[t].sqrt()
    sigma_s, sigma_t = (1 - alpha_bars[s]).sqrt(), (1 - alpha_bars[t]).sqrt()
    x0 = (guess - sigma_t.to(x.dtype) * model(guess, t)) / alpha_t.to(x.dtype)
    keep = sigma_s / sigma_t
    return (x - (alpha_s - keep * alpha_t).to(x.dtype) * x0) / keep.to(x.dtype)


def inversion_one_more(eps_model, x, times, alpha_bars, rounds):
    return exact_inversion(eps_model, x, times, alpha_bars, rounds + 1)


def inversion_one_less(eps_model, x, times, alpha_bars, rounds):
    for s, t in pairwise(times.tolist()):
        a, turn = ratio_and_turn(s, t, alpha_bars)
        guess = a * x  # as if ε̂ were 0
        for _ in range(rounds - 1):
            guess = a * x + turn * eps_model(guess, t)
        x = guess
    return x


def inversion_from_scaled(eps_model, x, times, alpha_bars, rounds):
    for s, t in pairwise(times.tolist()):
        a, turn = ratio_and_turn(s, t, alpha_bars)
        guess = a * x
        for _ in range(rounds):
            guess = a * x + turn * eps_model(guess, t)
        x = guess
    return x


def inversion_keeps_the_guess(eps_model, x, times, alpha_bars, rounds):
    """The first guess of every step is the very first state."""
    first = x
    for s, t in pairwise(times.tolist()):
        a, turn = ratio_and_turn(s, t, alpha_bars)
        guess = first
        for _ in range(rounds):
            guess = a * x + turn * eps_model(guess, t)
        x = guess
    return x


def inversion_equal_steps(eps_model, x, times, alpha_bars, rounds):
    """Asks at the time that would come next if all steps were as long as the first."""
    stride, last = (times[1] - times[0]).item(), len(alpha_bars) - 1
    for s, t in pairwise(times.tolist()):
        a, turn = ratio_and_turn(s, t, alpha_bars)
        guess = x
        for _ in range(rounds):
            guess = a * x + turn * eps_model(guess, min(s + stride, last))
        x = guess
    return x


def inversion_in_other_units(eps_model, x, times, alpha_bars, rounds):
    """In y = x/α the step is y_t = y_s + (ς_t − ς_s) ε̂, with ς = σ/α; in double precision."""
    kept = alpha_bars[times]
    ratio = ((1 - kept) / kept).sqrt()
    y = x.double() / kept[0].sqrt()
    for i, t in enumerate(times.tolist()[1:]):
        state = y * kept[i].sqrt()
        for _ in range(rounds):
            better = y + (ratio[i + 1] - ratio[i]) * eps_model(state, t)
            state = better * kept[i + 1].sqrt()
        y = state / kept[i + 1].sqrt()
    return (y * kept[-1].sqrt()).to(x.dtype)


def inversion_recursively(eps_model, x, times, alpha_bars, rounds):
    """From the last step back: its x_s is the inversion of all steps before."""
    if len(times) == 1:
        return x
    before = inversion_recursively(eps_model, x, times[:-1], alpha_bars, rounds)
    s, t = int(times[-2]), int(times[-1])
    root = (alpha_bars[t] / alpha_bars[s]).sqrt().item()
    sigma = (1 - alpha_bars).sqrt()

    def better(guess, left):
        found = before * root + eps_model(guess, t) * (sigma[t] - root * sigma[s]).item()
        return found if left == 1 else better(found, left - 1)

    return better(before, rounds)


def inversion_by_residuals(eps_model, x, times, alpha_bars, rounds):
    """Each round takes away by how much DDIM's step from the guess misses x_s, times a."""
    for s, t in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        alpha_s, alpha_t = math.sqrt(alpha_bars[s]), math.sqrt(alpha_bars[t])
        sigma_s, sigma_t = math.sqrt(1 - alpha_bars[s]), math.sqrt(1 - alpha_bars[t])
        guess = x
        for _ in range(rounds):
            eps = eps_model(guess, t)
            down = alpha_s * (guess - sigma_t * eps) / alpha_t + sigma_s * eps
            guess = guess - alpha_t / alpha_s * (down - x)
        x = guess
    return x


def climbing(g, shape, T, count, rounds, first=1, dtype=SINGLE, last=None):
    return {
        "eps_model": Affine(uniform(g, 0.3, 0.9, T + 1), uniform(g, -1, 1, T + 1)),
        "x": normal(g, shape, dtype),
        "times": descending(g, T if last is None else last, first, count).flip(0),
        "alpha_bars": table(g, T),
        "rounds": rounds,
    }


INVERSION = Exercise(
    "exact_inversion",
    points=3,
    minutes=20,
    difficulty=3,
    reference=exact_inversion,
    outputs=("x",),
    visible=Group(
        1,
        lambda g: [
            climbing(g, (3, 2), 12, 4, 3),
            climbing(g, (2, 1, 2, 2), 9, 3, 1, first=2, dtype=DOUBLE),
            climbing(g, (2, 3), 10, 3, 2, first=0),
            climbing(g, (3, 2), 12, 4, 2, dtype=DOUBLE),
        ],
    ),
    hidden={
        "other grids and shapes": Group(
            1,
            lambda g: [
                climbing(g, (5, 2), 16, 6, whole(g, 2, 6)),
                climbing(g, (2, 1, 7, 5), 12, 4, 2),
                climbing(g, (4,), 12, 3, 4, dtype=DOUBLE, last=11),
            ],
        ),
        "from the data, one step, one round and many": Group(
            1,
            lambda g: [
                climbing(g, (4, 3), 12, 4, 3, first=0),
                climbing(g, (3, 2), 8, 1, whole(g, 2, 5), first=2),
                climbing(g, (2, 2), 9, 3, 1, dtype=DOUBLE),
                climbing(g, (1, 1), 10, 4, 40, dtype=DOUBLE),
            ],
        ),
    },
    mistakes={
        "you asked the network at s": (
            inversion_asks_at_s,
            "DDIM's step down asks at t, where it begins. What is to be undone is that step, so the guess of x_t is asked at t.",
        ),
        "you went on from the guess instead of x_s": (
            inversion_runs_on,
            "a·x_s stays in all rounds; a better guess enters through ε̂ alone. Else each round noises once more.",
        ),
        "you asked about x_s in every round": (
            inversion_asks_x_s,
            "Then all rounds say the same. Ask about the newest guess of x_t.",
        ),
        "you took the noise away": (
            inversion_minus,
            "On the way to the noise, noise is added: σ_t is greater than (α_t/α_s) σ_s.",
        ),
        "you turned α_t/α_s over": (
            inversion_ratio_over,
            "α shrinks on the way to the noise: x_0 stands in x_t with α_t, in x_s with α_s.",
        ),
        "you wrote σ_t − σ_s before the noise": (
            inversion_plain_difference,
            "x_s brings its noise along, and it shrinks like all of x_s: (α_t/α_s) σ_s is there, σ_t is wanted.",
        ),
        "you did not shrink x_s": (
            inversion_no_ratio,
            "Solve DDIM's step for x_t: x_s gets the factor α_t/α_s.",
        ),
        "you forgot the roots": (inversion_no_root, "α = √ᾱ and σ = √(1 − ᾱ)."),
        "you took the chain's step, √β before the noise": (
            inversion_new_noise,
            "√β belongs to new noise, independent of that in x_s. Here it is the same noise, so deviations add up: σ_t − (α_t/α_s) σ_s.",
        ),
        "you took DDIM's own step": (
            inversion_downwards,
            "It leads from x_t to x_s. Solve it for x_t.",
        ),
        "you divided by σ_s": (
            inversion_through_x0,
            "In terms of x̂_0 the step says x_t = (x_s − …)·σ_t/σ_s, which fails at the data. In terms of ε̂ nothing is divided by σ.",
        ),
        "you took one round too many": (
            inversion_one_more,
            "The first guess is x_s, for free; after that the network is asked once in each round.",
        ),
        "you took one round too few": (
            inversion_one_less,
            "The first guess is x_s; after that the network is asked as many times as there are rounds.",
        ),
        "you began with a·x_s": (
            inversion_from_scaled,
            "That is a good guess, too, but not the one asked for: the first guess is x_s.",
        ),
        "you began each step with the very first state": (
            inversion_keeps_the_guess,
            "The first guess of a step is the x_s of this step.",
        ),
        "you took all steps to be equally long": (
            inversion_equal_steps,
            "The next time is the next of the list.",
        ),
    },
    correct={
        "in units of the data": inversion_in_other_units,
        "recursion": inversion_recursively,
        "residuals of DDIM's step": inversion_by_residuals,
    },
    tolerance=1e-4,
    forbidden=(
        "samplers.ddim_inversion",
        "samplers.ddim",
        "samplers.ddim_step",
        "samplers.picard",
    ),
)


# 6. sample_linear -----------------------------------------------------------------------------------------------------


def half_logsnr(alpha_bar):
    return 0.5 * math.log(alpha_bar / (1 - alpha_bar)) if alpha_bar < 1 else math.inf


def linear_sampler(update):
    """A sampler from update(x, ε, ε before, h, h before, ᾱ_t, ᾱ_s) → x_s, for all steps but the first and one to 0."""

    @functools.wraps(update)
    def sample(eps_model, x, times, alpha_bars):
        before, h_before = None, None
        for t, s in pairwise(times.tolist()):
            eps, a_t, a_s = eps_model(x, t), alpha_bars[t].item(), alpha_bars[s].item()
            h = half_logsnr(a_s) - half_logsnr(a_t)
            plain = before is None or a_s == 1
            x = first_order(x, eps, a_t, a_s) if plain else update(x, eps, before, h, h_before, a_t, a_s)
            before, h_before = eps, h
        return x

    return sample


def first_order(x, eps, a_t, a_s):
    x0 = (x - math.sqrt(1 - a_t) * eps) / math.sqrt(a_t)
    return math.sqrt(a_s) * x0 + math.sqrt(1 - a_s) * eps


def of_noise(x, a_t, a_s, *terms):
    """(α_s/α_t) x − σ_s Σ factor·ε."""
    return math.sqrt(a_s / a_t) * x - math.sqrt(1 - a_s) * sum(factor * eps for factor, eps in terms)


@linear_sampler
def sample_linear(x, eps, before, h, h_before, a_t, a_s):
    return of_noise(x, a_t, a_s, (math.expm1(h), eps), ((math.expm1(h) - h) / h_before, eps - before))


@linear_sampler
def linear_middle(x, eps, before, h, h_before, a_t, a_s):
    return of_noise(x, a_t, a_s, (math.expm1(h), eps), (math.expm1(h) * h / h_before / 2, eps - before))


@linear_sampler
def linear_own_step(x, eps, before, h, h_before, a_t, a_s):
    return of_noise(x, a_t, a_s, (math.expm1(h), eps), ((math.expm1(h) - h) / h, eps - before))


@linear_sampler
def linear_r_over(x, eps, before, h, h_before, a_t, a_s):
    rest = (math.expm1(h) - h) / h
    return of_noise(x, a_t, a_s, (math.expm1(h), eps), (rest * h_before / h, eps - before))


@linear_sampler
def linear_backwards(x, eps, before, h, h_before, a_t, a_s):
    return of_noise(x, a_t, a_s, (math.expm1(h), eps), ((math.expm1(h) - h) / h_before, before - eps))


@linear_sampler
def linear_minus_h(x, eps, before, h, h_before, a_t, a_s):
    factor = -math.expm1(-h)
    return of_noise(x, a_t, a_s, (factor, eps), ((factor - h) / h_before, eps - before))


@linear_sampler
def linear_plus(x, eps, before, h, h_before, a_t, a_s):
    return of_noise(x, a_t, a_s, (-math.expm1(h), eps), (-(math.expm1(h) - h) / h_before, eps - before))


@linear_sampler
def linear_of_data(x, eps, before, h, h_before, a_t, a_s):
    """The formula for a network that predicts x_0."""
    extrapolated = (-math.expm1(-h)) * eps + (math.expm1(-h) + h) / h_before * (eps - before)
    return math.sqrt((1 - a_s) / (1 - a_t)) * x + math.sqrt(a_s) * extrapolated


@linear_sampler
def linear_mean_of_two(x, eps, before, h, h_before, a_t, a_s):
    return of_noise(x, a_t, a_s, (math.expm1(h), (eps + before) / 2))


@linear_sampler
def linear_only_first_order(x, eps, before, h, h_before, a_t, a_s):
    return first_order(x, eps, a_t, a_s)


@linear_sampler
def linear_no_exponential(x, eps, before, h, h_before, a_t, a_s):
    """Adams' rule for dx̄ = −e^{−λ} ε dλ with the factor e^{−λ} taken where the step begins."""
    return of_noise(x, a_t, a_s, (h * math.exp(h), eps), (h**2 / 2 / h_before * math.exp(h), eps - before))


@linear_sampler
def linear_half_square(x, eps, before, h, h_before, a_t, a_s):
    return of_noise(x, a_t, a_s, (math.expm1(h), eps), (h**2 / 2 / h_before, eps - before))


@linear_sampler
def linear_rest_not_grown(x, eps, before, h, h_before, a_t, a_s):
    return of_noise(x, a_t, a_s, (math.expm1(h), eps), ((math.expm1(-h) + h) / h_before, eps - before))


@linear_sampler
def linear_whole_logsnr(x, eps, before, h, h_before, a_t, a_s):
    return of_noise(x, a_t, a_s, (math.expm1(2 * h), eps), ((math.expm1(2 * h) - 2 * h) / h_before / 2, eps - before))


def linear_in_time(eps_model, x, times, alpha_bars):
    """Extrapolates in t instead of λ."""
    before, t_before = None, None
    for t, s in pairwise(times.tolist()):
        eps, a_t, a_s = eps_model(x, t), alpha_bars[t].item(), alpha_bars[s].item()
        h = half_logsnr(a_s) - half_logsnr(a_t)
        if before is None or a_s == 1:
            x = first_order(x, eps, a_t, a_s)
        else:
            slope = (eps - before) * ((t - s) / (t_before - t))
            x = of_noise(x, a_t, a_s, (math.expm1(h), eps), ((math.expm1(h) - h) / h, slope))
        before, t_before = eps, t
    return x


def linear_first_stays(eps_model, x, times, alpha_bars):
    """The noise before is always that of the first step."""
    first = None
    for i, (t, s) in enumerate(pairwise(times.tolist())):
        eps, a_t, a_s = eps_model(x, t), alpha_bars[t].item(), alpha_bars[s].item()
        h = half_logsnr(a_s) - half_logsnr(a_t)
        if i == 0 or a_s == 1:
            x = first_order(x, eps, a_t, a_s)
        else:
            h_before = half_logsnr(a_t) - half_logsnr(alpha_bars[times[i - 1]].item())
            x = of_noise(x, a_t, a_s, (math.expm1(h), eps), ((math.expm1(h) - h) / h_before, eps - first))
        first = eps if first is None else first
    return x


def linear_by_quadrature(eps_model, x, times, alpha_bars):
    """x/α falls by the integral of e^{−λ} ε̂(λ), by Gauss's points, in double precision."""
    points, weights = np.polynomial.legendre.leggauss(40)
    lam = 0.5 * np.log(alpha_bars.numpy()[times.numpy()]) - 0.5 * np.log(
        np.maximum(1 - alpha_bars.numpy()[times.numpy()], 1e-300)
    )
    state, seen = x.double(), []
    for i in range(len(times) - 1):
        t, s = int(times[i]), int(times[i + 1])
        seen.append(eps_model(state, t))
        alpha, sigma, alpha_s = math.sqrt(alpha_bars[t]), math.sqrt(1 - alpha_bars[t]), math.sqrt(alpha_bars[s])
        if alpha_bars[s] == 1:
            state = (state - sigma * seen[-1]) / alpha
            continue
        total = torch.zeros_like(state)
        for point, weight in zip(points, weights, strict=True):
            at = (lam[i] + lam[i + 1]) / 2 + point * (lam[i + 1] - lam[i]) / 2
            noise = seen[-1]
            if i:
                noise = noise + (at - lam[i]) / (lam[i] - lam[i - 1]) * (seen[-1] - seen[-2])
            total = total + weight * (lam[i + 1] - lam[i]) / 2 * math.exp(-at) * noise
        state = alpha_s * (state / alpha - total)
    return state.to(x.dtype)


def linear_by_noise_to_signal(eps_model, x, times, alpha_bars):
    """In ς = σ/α the step is ∫ ε̂ dς, with λ = −log ς: the integral of log ς is ς log ς − ς."""
    kept = alpha_bars[times]
    ratio = ((1 - kept) / kept).sqrt()
    y, old, moved = x / kept[0].sqrt().to(x.dtype), None, None
    for i, t in enumerate(times.tolist()[:-1]):
        u, w = ratio[i], ratio[i + 1]
        eps = eps_model(y * kept[i].sqrt().to(y.dtype), t)
        y_next = y + (w - u).to(y.dtype) * eps
        if old is not None and w > 0:
            primitive = (w * w.log() - w) - (u * u.log() - u) - u.log() * (w - u)  # of log ς − log u
            slope = (eps - old) / moved.to(y.dtype)  # against log ς
            y_next = y_next + primitive.to(y.dtype) * slope
        old, moved, y = eps, (ratio[i + 1] / u).log(), y_next
    return y * kept[-1].sqrt().to(y.dtype)


def linear_by_two_weights(eps_model, x, times, alpha_bars):
    """Weights of the two noises, which add up to that of the first order; recursively."""

    def walk(x, times, old, h_old):
        if len(times) < 2:
            return x
        a_t, a_s = (alpha_bars[time].item() for time in times[:2])
        eps = eps_model(x, times[0])
        if a_s == 1.0:
            return walk(x / a_t**0.5 - (1 / a_t - 1) ** 0.5 * eps, times[1:], None, None)
        h = math.log(a_s / (1 - a_s) * (1 - a_t) / a_t) / 2
        sigma_s, grown = (1 - a_s) ** 0.5, math.exp(h)
        other = 0.0 if old is None else -sigma_s * (1 + h - grown) / h_old
        mine = sigma_s * (grown - 1) + other
        x = x * (a_s / a_t) ** 0.5 - mine * eps + (0 if old is None else other * old)
        return walk(x, times[1:], eps, h)

    return walk(x, times.tolist(), None, None)


def linear_nan_at_the_end(eps_model, x, times, alpha_bars):
    before, h_before = None, None
    lam = 0.5 * (alpha_bars / (1 - alpha_bars)).log()
    for t, s in pairwise(times.tolist()):
        eps, h = eps_model(x, t), lam[s] - lam[t]
        slope = 0 if before is None else (eps - before) / h_before.to(x.dtype)
        grown, rest = torch.expm1(h), torch.expm1(h) - h
        sigma_s = (1 - alpha_bars[s]).sqrt()
        x = (alpha_bars[s] / alpha_bars[t]).sqrt().to(x.dtype) * x - (sigma_s * grown).to(x.dtype) * eps
        x = x - (sigma_s * rest).to(x.dtype) * slope
        before, h_before = eps, h
    return x


def linear_extrapolates_to_the_end(eps_model, x, times, alpha_bars):
    before, h_before = None, None
    for t, s in pairwise(times.tolist()):
        eps, a_t, a_s = eps_model(x, t), alpha_bars[t].item(), alpha_bars[s].item()
        h = half_logsnr(a_s) - half_logsnr(a_t)
        if before is None:
            x = first_order(x, eps, a_t, a_s)
        elif a_s < 1:
            x = of_noise(x, a_t, a_s, (math.expm1(h), eps), ((math.expm1(h) - h) / h_before, eps - before))
        else:  # σ_s e^h stays finite: it is σ_t/α_t
            x = first_order(x, eps, a_t, a_s) - math.sqrt(1 / a_t - 1) / h_before * (eps - before)
        before, h_before = eps, h
    return x


def walk_down(g, shape, T, count, end=0, dtype=SINGLE, first=None):
    return {
        "eps_model": Affine(uniform(g, 0.2, 0.8, T + 1), uniform(g, -1, 1, T + 1)),
        "x": normal(g, shape, dtype),
        "times": descending(g, T if first is None else first, end, count),
        "alpha_bars": table(g, T),
    }


LINEAR = Exercise(
    "sample_linear",
    points=4,
    minutes=30,
    difficulty=4,
    reference=sample_linear,
    outputs=("x",),
    visible=Group(
        1,
        lambda g: [
            walk_down(g, (3, 2), 12, 5, end=1),
            walk_down(g, (2, 1, 2, 2), 9, 3, end=2, dtype=DOUBLE),
            walk_down(g, (2, 3), 10, 4),
            walk_down(g, (2, 2), 14, 5, end=2, dtype=DOUBLE),
        ],
    ),
    hidden={
        "other grids and shapes": Group(
            2,
            lambda g: [
                walk_down(g, (5, 2), 16, 7, end=whole(g, 1, 4)),
                walk_down(g, (2, 1, 7, 5), 12, 4, end=1),
                walk_down(g, (4,), 12, 4, end=2, dtype=DOUBLE),
                walk_down(g, (3, 2), 15, 6, end=1, first=12),
            ],
        ),
        "down to the data, one step, a batch of one": Group(
            1,
            lambda g: [
                walk_down(g, (4, 3), 12, 5),
                walk_down(g, (3, 2), 8, 1, end=whole(g, 1, 5)),
                walk_down(g, (2, 2), 7, 1, dtype=DOUBLE),
                walk_down(g, (1, 1), 10, 4, end=1, dtype=DOUBLE),
            ],
        ),
    },
    mistakes={
        "you took the noise in the middle of the step for the whole step": (
            linear_middle,
            "That is DPM-Solver++'s shortcut, right to second order. Asked is the exact integral of e^{−λ} times a straight line.",
        ),
        "you divided the difference of the two noises by this step's length": (
            linear_own_step,
            "ε̂ changed by ε − ε_before over the step before: the slope is over h_before.",
        ),
        "you turned the ratio of the two steps over": (
            linear_r_over,
            "The slope is (ε − ε_before)/h_before. After a short step the same difference means a steeper line.",
        ),
        "you took the slope with the other sign": (
            linear_backwards,
            "The line goes on from ε_before through ε: the slope is (ε − ε_before)/h_before.",
        ),
        "you wrote e^{−h} for e^h": (
            linear_minus_h,
            "α_s(e^{−λ_t} − e^{−λ_s}) = σ_s(e^h − 1), for σ_s = α_s e^{−λ_s}. e^{−h} stands beside α_s, where x_0 is predicted.",
        ),
        "you added the noise": (
            linear_plus,
            "From noise to data λ grows and σ/α falls: d(x/α) = −e^{−λ} ε dλ, so noise is taken away.",
        ),
        "you used the formula for predictions of x_0": (
            linear_of_data,
            "σ_s/σ_t and α_s(1 − e^{−h}) go with x̂_0. The network here predicts ε.",
        ),
        "you took the mean of the two noises": (
            linear_mean_of_two,
            "The mean is the noise in the middle of the step that lies behind. Extend the line forward.",
        ),
        "you stayed at first order": (
            linear_only_first_order,
            "That is DDIM. From the second step on, the noise of the step before is known, and says how ε̂ changes.",
        ),
        "you held e^{−λ} fixed over the step": (
            linear_no_exponential,
            "This is what an exponential integrator avoids: only ε̂ is approximated, the factor e^{−λ} is integrated exactly.",
        ),
        "you cut the series off: ½h² for e^h − 1 − h": (
            linear_half_square,
            "They agree for short steps only. The integral of e^{−λ}(λ − λ_t) has a closed form.",
        ),
        "you wrote e^{−h} − 1 + h beside σ_s": (
            linear_rest_not_grown,
            "The integral of e^{−λ}(λ − λ_t) is e^{−λ_t}(1 − e^{−h}(1 + h)); and α_s e^{−λ_t} is σ_s e^h.",
        ),
        "you took the whole log-SNR for λ": (
            linear_whole_logsnr,
            "λ = log(α/σ) is half of log(ᾱ/(1 − ᾱ)).",
        ),
        "you extended the line in t": (
            linear_in_time,
            "The integral is over λ, and so is the straight line: lengths are differences of λ, not of t.",
        ),
        "you kept the first noise as the one before": (
            linear_first_stays,
            "After each step, the noise just used becomes the one before.",
        ),
        "you let λ = ∞ into the formula": (
            linear_nan_at_the_end,
            "At ᾱ = 1 it gives 0·∞. A step to the data is x̂_0 = (x − σ ε)/α.",
        ),
        "you extended the line to λ = ∞": (
            linear_extrapolates_to_the_end,
            "In the step to the data the line would be followed for an infinite way. Take x̂_0 = (x − σ ε)/α there.",
        ),
    },
    correct={
        "quadrature": linear_by_quadrature,
        "the noise-to-signal ratio": linear_by_noise_to_signal,
        "two weights, recursively": linear_by_two_weights,
    },
    tolerance=1e-4,
    forbidden=(
        "samplers.ddim",
        "samplers.ddim_step",
        "samplers.heun",
        "samplers.heun_step",
        "samplers.dpm_solver_pp_2m",
        "samplers.dpm_solver_pp_2m_step",
        "samplers.dpm_solver_pp_2s",
        "samplers.dpm_solver_pp_2s_step",
    ),
)


EXERCISES = [GUIDED, STEP, MOMENTS, BEST, INVERSION, LINEAR]
