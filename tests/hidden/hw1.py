"""Homework 1, VAE, KL and GAN: what is right, what people write instead, and the cases that tell one from the other.

For each exercise: the reference, the mistakes, right answers written in other ways, the cases. No case hangs on the last
digits of single precision: where a value may come out near 0 by chance, the case is in double precision.
"""

import math

import torch
from torch.distributions import Bernoulli, Independent, MultivariateNormal, Normal, kl_divergence
from torch.nn.functional import binary_cross_entropy, binary_cross_entropy_with_logits, logsigmoid, softplus

from dgm_course.grading.exercise import Exercise, Group

SINGLE, DOUBLE = torch.float32, torch.float64


def normal(g, *shape, dtype=SINGLE):
    return torch.randn(shape, generator=g, dtype=dtype)


def uniform(g, low, high, *shape, dtype=SINGLE):
    return low + (high - low) * torch.rand(shape, generator=g, dtype=dtype)


# 1. kl_to_prior -------------------------------------------------------------------------------------------------------


def kl_to_prior(mean, log_var, prior_mean, prior_std):
    ratio = (log_var.exp() + (mean - prior_mean) ** 2) / prior_std**2
    return 0.5 * (ratio - 1 - log_var + 2 * prior_std.log()).sum(1)


def kl_exchanged(mean, log_var, prior_mean, prior_std):
    ratio = (prior_std**2 + (mean - prior_mean) ** 2) / log_var.exp()
    return 0.5 * (ratio - 1 + log_var - 2 * prior_std.log()).sum(1)


def kl_prior_std_for_var(mean, log_var, prior_mean, prior_std):
    return kl_to_prior(mean, log_var, prior_mean, prior_std.sqrt())


def kl_log_std_for_log_var(mean, log_var, prior_mean, prior_std):
    return kl_to_prior(mean, 2 * log_var, prior_mean, prior_std)


def kl_std_for_var(mean, log_var, prior_mean, prior_std):
    std = (0.5 * log_var).exp()
    return kl_to_prior(mean, log_var, prior_mean, prior_std) + (0.5 * (std - std**2) / prior_std**2).sum(1)


def kl_without_half(mean, log_var, prior_mean, prior_std):
    return 2 * kl_to_prior(mean, log_var, prior_mean, prior_std)


def kl_without_ones(mean, log_var, prior_mean, prior_std):
    return kl_to_prior(mean, log_var, prior_mean, prior_std) + 0.5 * mean.shape[1]


def kl_one_for_all(mean, log_var, prior_mean, prior_std):
    return kl_to_prior(mean, log_var, prior_mean, prior_std) + 0.5 * (mean.shape[1] - 1)


def kl_wrong_sign(mean, log_var, prior_mean, prior_std):
    return kl_to_prior(mean, log_var, prior_mean, prior_std) + log_var.sum(1)


def kl_mean_of_latents(mean, log_var, prior_mean, prior_std):
    return kl_to_prior(mean, log_var, prior_mean, prior_std) / mean.shape[1]


def kl_no_prior_log(mean, log_var, prior_mean, prior_std):
    return kl_to_prior(mean, log_var, prior_mean, prior_std) - prior_std.log().sum()


def kl_distance_not_scaled(mean, log_var, prior_mean, prior_std):
    return kl_to_prior(prior_mean.expand_as(mean), log_var, prior_mean, prior_std) + 0.5 * (
        mean - prior_mean
    ).square().sum(1)


def kl_no_prior_mean(mean, log_var, prior_mean, prior_std):
    return kl_to_prior(mean, log_var, torch.zeros_like(prior_mean), prior_std)


def kl_by_distributions(mean, log_var, prior_mean, prior_std):
    q, p = Normal(mean, (log_var / 2).exp()), Normal(prior_mean, prior_std)
    return kl_divergence(Independent(q, 1), Independent(p.expand(mean.shape), 1))


def kl_in_a_loop(mean, log_var, prior_mean, prior_std):
    rows = []
    for m, v in zip(mean.tolist(), log_var.tolist(), strict=True):
        total = 0.0
        for a, b, c, d in zip(m, v, prior_mean.tolist(), prior_std.tolist(), strict=True):
            total += math.log(d / math.exp(b / 2)) + (math.exp(b) + (a - c) ** 2) / (2 * d * d) - 0.5
        rows.append(total)
    return torch.tensor(rows, dtype=mean.dtype)


def kl_in_units_of_the_prior(mean, log_var, prior_mean, prior_std):
    """Measured in units of the prior it is standard, and the formula the short one."""
    z, shrunk = (mean - prior_mean) / prior_std, log_var - 2 * prior_std.log()
    return (z.square() + shrunk.expm1() - shrunk).sum(-1) / 2


def kl_by_entropies(mean, log_var, prior_mean, prior_std):
    """Cross-entropy minus entropy, by matrix products."""
    precision = prior_std**-2
    cross = (log_var.exp() + (mean - prior_mean) ** 2) @ precision / 2 + prior_std.log().sum()
    return cross - log_var.sum(1) / 2 - mean.shape[1] / 2


def codes(g, batch, latent, dtype=SINGLE, standard=False):
    mean, log_var = normal(g, batch, latent, dtype=dtype), normal(g, batch, latent, dtype=dtype) - 1
    prior_mean, prior_std = normal(g, latent, dtype=dtype), uniform(g, 0.3, 2.0, latent, dtype=dtype)
    if standard:
        prior_mean, prior_std = torch.zeros_like(prior_mean), torch.ones_like(prior_std)
    return {"mean": mean, "log_var": log_var, "prior_mean": prior_mean, "prior_std": prior_std}


def one_is_the_prior(g, batch, latent):
    """A batch whose first code says nothing: its KL is 0."""
    case = codes(g, batch, latent)
    case["mean"][0], case["log_var"][0] = case["prior_mean"], 2 * case["prior_std"].log()
    return case


def far_out(g, batch, latent):
    """Very sure and very unsure codes."""
    case = codes(g, batch, latent)
    case["log_var"][:, 0], case["log_var"][:, -1] = -25.0, 6.0
    return case


KL = Exercise(
    "kl_to_prior",
    points=2,
    minutes=10,
    difficulty=1,
    reference=kl_to_prior,
    outputs=("kl",),
    visible=Group(1, lambda g: [codes(g, 4, 3), codes(g, 2, 5, DOUBLE)]),
    hidden={
        "other shapes": Group(
            0.5, lambda g: [codes(g, 7, 2), codes(g, 1, 1, DOUBLE), codes(g, 3, 16), codes(g, 5, 4, standard=True)]
        ),
        "a code that is the prior, very sure and unsure codes": Group(
            0.5, lambda g: [one_is_the_prior(g, 4, 3), far_out(g, 3, 4), far_out(g, 1, 2)]
        ),
    },
    mistakes={
        "you exchanged the two distributions": (
            kl_exchanged,
            "The mean is over q, the code. So the prior's variance τ² divides, and log s² has a minus.",
        ),
        "you took the prior's standard deviation for its variance": (
            kl_prior_std_for_var,
            "What divides is τ², and `prior_std` is τ.",
        ),
        "you took log s² for log s": (
            kl_log_std_for_log_var,
            "`log_var` is the log of the variance: s² = exp(log_var), and nothing is doubled.",
        ),
        "you put the standard deviation s where the variance s² belongs": (
            kl_std_for_var,
            "E(z − c)² = s² + (m − c)², and s² is exp(log_var), not exp(log_var / 2).",
        ),
        "you forgot the ½": (
            kl_without_half,
            "The exponent of a Gaussian is −(z − c)²/(2τ²), and log τ is ½ log τ²: the whole sum has a ½.",
        ),
        "you forgot the −1": (
            kl_without_ones,
            "It is −E(z − m)²/s², from the code's own density. With it, a code that equals the prior costs 0 nats.",
        ),
        "you subtracted 1 once and not for each latent": (
            kl_one_for_all,
            "Every latent has its own −1. For k latents they are −k.",
        ),
        "the logarithm of s² has the wrong sign": (
            kl_wrong_sign,
            "A very sure code, s → 0, is far from the prior: −log s² makes it cost many nats.",
        ),
        "you took the mean over the latents": (
            kl_mean_of_latents,
            "The density of independent latents is a product, so their KL divergences add up.",
        ),
        "you left out log τ of the prior": (
            kl_no_prior_log,
            "Only for τ = 1 it is 0. Without it, a code that equals the prior does not cost 0 nats.",
        ),
        "you did not divide the distance of the means by τ²": (
            kl_distance_not_scaled,
            "What counts as far depends on the prior's width: (m − c)²/τ².",
        ),
        "you left out the prior's mean": (kl_no_prior_mean, "The distance is that from the prior's mean, m − c."),
    },
    correct={
        "torch.distributions": kl_by_distributions,
        "a loop in double precision": kl_in_a_loop,
        "in units of the prior": kl_in_units_of_the_prior,
        "cross-entropy minus entropy": kl_by_entropies,
    },
    forbidden=("divergences.standard_kl", "divergences.gaussian_kl", "divergences.kl"),
)


# 2. reconstruction_nats -----------------------------------------------------------------------------------------------


def squares(x, x_hat):
    """The squared errors of each image, (B, D)."""
    missed = (x - x_hat).flatten(1).square()
    if not missed.any():
        raise ValueError("x_hat must differ from x somewhere: at σ² = 0 there is no density")
    return missed


def nats_at(missed, var):
    return missed.sum(1) / (2 * var) + 0.5 * missed.shape[1] * (2 * math.pi * var).log()


def reconstruction_nats(x, x_hat):
    missed = squares(x, x_hat)
    return nats_at(missed, missed.mean())


def nats_zero_let_through(x, x_hat):
    missed = (x - x_hat).flatten(1).square()
    return nats_at(missed, missed.mean())


def nats_over_deviation(x, x_hat):
    missed = squares(x, x_hat)
    var = missed.mean()
    return nats_at(missed, var) + missed.sum(1) * (1 / (2 * var.sqrt()) - 1 / (2 * var))


def nats_deviation_throughout(x, x_hat):
    missed = squares(x, x_hat)
    return nats_at(missed, missed.mean().sqrt())


def nats_no_half_of_log(x, x_hat):
    missed = squares(x, x_hat)
    return nats_at(missed, missed.mean()) + 0.5 * missed.shape[1] * (2 * math.pi * missed.mean()).log()


def nats_without_2_pi(x, x_hat):
    return reconstruction_nats(x, x_hat) - 0.5 * x[0].numel() * math.log(2 * math.pi)


def nats_log_once(x, x_hat):
    missed = squares(x, x_hat)
    return missed.sum(1) / (2 * missed.mean()) + 0.5 * (2 * math.pi * missed.mean()).log()


def nats_own_variance(x, x_hat):
    missed = squares(x, x_hat)
    return nats_at(missed, missed.mean(1))


def nats_variance_of_a_pixel(x, x_hat):
    missed = squares(x, x_hat)
    var = missed.mean(0)
    return (missed / (2 * var) + 0.5 * (2 * math.pi * var).log()).sum(1)


def nats_less_one(x, x_hat):
    missed = squares(x, x_hat)
    return nats_at(missed, missed.sum() / (missed.numel() - 1))


def nats_mean_of_pixels(x, x_hat):
    return reconstruction_nats(x, x_hat) / x[0].numel()


def nats_around_the_mean_error(x, x_hat):
    missed = squares(x, x_hat)
    return nats_at(missed, (x - x_hat).var(correction=0))


def nats_sum_for_mean(x, x_hat):
    missed = squares(x, x_hat)
    return nats_at(missed, missed.sum(1).mean())


def nats_wrong_sign(x, x_hat):
    return -reconstruction_nats(x, x_hat)


def nats_unit_variance(x, x_hat):
    missed = squares(x, x_hat)
    return nats_at(missed, torch.ones_like(missed[0, 0]))


def nats_by_distributions(x, x_hat):
    std = (x - x_hat).pow(2).mean().sqrt()
    if std == 0:
        raise ValueError("x_hat is x")
    return -Independent(Normal(x_hat, std), x.ndim - 1).log_prob(x)


def nats_in_a_loop(x, x_hat):
    if torch.equal(x, x_hat):
        raise ValueError("x and x_hat are equal")
    errors = [(a.double() - b.double()).flatten() for a, b in zip(x, x_hat, strict=True)]
    size = x[0].numel()
    var = sum((e @ e).item() for e in errors) / (size * len(errors))
    rows = [(e @ e).item() / var / 2 + size / 2 * math.log(2 * math.pi * var) for e in errors]
    return torch.tensor(rows, dtype=x.dtype)


def nats_by_shares(x, x_hat):
    """An equal share of the total for each, and on top how much worse an image is than the mean one."""
    errors = (x - x_hat).square().sum(tuple(range(1, x.ndim)))
    if float(errors.max()) == 0:
        raise ValueError("x_hat has no error")
    size = x[0].numel()
    share = 0.5 * size * torch.log(2 * math.pi * math.e * errors.mean() / size)
    return share + 0.5 * size * (errors / errors.mean() - 1)


def pictures(g, *shape, dtype=SINGLE, spread=0.08):
    """Images and reconstructions; some images are harder than others, and the errors have a mean of their own."""
    x = uniform(g, -1, 1, *shape, dtype=dtype)
    scale = spread * uniform(g, 0.5, 1.5, shape[0], *[1] * (len(shape) - 1), dtype=dtype)
    return {"x": x, "x_hat": x + scale * (normal(g, *shape, dtype=dtype) + 0.6)}


def one_perfect(g, *shape):
    case = pictures(g, *shape)
    case["x_hat"][0] = case["x"][0]
    return case


def all_perfect(g, *shape):
    x = uniform(g, -1, 1, *shape)
    return {"x": x, "x_hat": x.clone()}


RECONSTRUCTION = Exercise(
    "reconstruction_nats",
    points=3,
    minutes=15,
    difficulty=2,
    reference=reconstruction_nats,
    outputs=("nats",),
    visible=Group(
        1,
        lambda g: [
            pictures(g, 4, 1, 2, 3),
            pictures(g, 3, 7, dtype=DOUBLE, spread=1.0),
            all_perfect(g, 2, 3),
        ],
    ),
    hidden={
        "other shapes and errors": Group(
            1,
            lambda g: [
                pictures(g, 6, 1, 5, 4),
                pictures(g, 2, 3, 4, 4, dtype=DOUBLE),
                pictures(g, 5, 11, spread=1.5),
                pictures(g, 3, 1, dtype=DOUBLE),
            ],
        ),
        "a batch of one, an image without error, no error at all": Group(
            1,
            lambda g: [
                pictures(g, 1, 30),
                pictures(g, 1, 1, dtype=DOUBLE),
                one_perfect(g, 3, 1, 3, 3),
                all_perfect(g, 1, 1, 2, 2),
            ],
        ),
    },
    mistakes={
        "you let a variance of 0 through": (
            nats_zero_let_through,
            "Without any error the best σ² is 0, and log σ² has no value. Raise a ValueError that names x_hat.",
        ),
        "you divided the squared error by σ instead of σ²": (
            nats_over_deviation,
            "The exponent is (x − x̂)²/(2σ²). With the best σ² these sum to D/2, on average over the batch.",
        ),
        "you took σ for σ² throughout": (
            nats_deviation_throughout,
            "The mean squared error is the best σ² itself. A root makes it a standard deviation.",
        ),
        "you forgot the ½ before log σ²": (
            nats_no_half_of_log,
            "The density has σ in the denominator, and log σ = ½ log σ².",
        ),
        "you left out 2π": (
            nats_without_2_pi,
            "It changes no gradient, but without it this is no density: ½ log(2πσ²).",
        ),
        "you counted the logarithm once for an image": (
            nats_log_once,
            "Each of the D pixels has a density, and each of these has its own ½ log(2πσ²).",
        ),
        "you gave each image a variance of its own": (
            nats_own_variance,
            "One σ² for the whole batch is asked for. A decoder that states one σ cannot know which image will be hard.",
        ),
        "you gave each pixel a variance of its own": (
            nats_variance_of_a_pixel,
            "One σ² for all pixels is asked for: the mean of the squared errors over images and pixels.",
        ),
        "you divided by n − 1": (
            nats_less_one,
            "Set the derivative by σ² to 0: what comes out is the plain mean of the squares.",
        ),
        "you took the mean over the pixels": (
            nats_mean_of_pixels,
            "log p(x given z) of an image is a sum over its pixels. A mean makes it D times too small beside the KL.",
        ),
        "you took the variance of the errors around their mean": (
            nats_around_the_mean_error,
            "The Gaussian is centred at x̂, so its best variance is the mean square of x − x̂, with the mean error in it.",
        ),
        "you took an image's whole squared error for the variance of a pixel": (
            nats_sum_for_mean,
            "σ² belongs to one pixel: divide by D, too.",
        ),
        "you returned log p and not −log p": (nats_wrong_sign, "Asked is what is minimized, −log p(x given z)."),
        "you took σ² = 1": (
            nats_unit_variance,
            "That is the plain squared error. Here σ² is fitted, and the loss is compared at its best value.",
        ),
    },
    correct={
        "torch.distributions": nats_by_distributions,
        "a loop in double precision": nats_in_a_loop,
        "an equal share and a surplus": nats_by_shares,
    },
    mentions=("x_hat",),
    forbidden=("vae.gaussian_log_prob", "vae.VAE.log_likelihood", "vae.VAE.terms", "vae.loss"),
)


# 3. bernoulli_bound ---------------------------------------------------------------------------------------------------


def draws(mean, log_var, eps):
    return mean + (0.5 * log_var).exp() * eps


def likelihood(x, z, weight, bias):
    logits = z @ weight.T + bias
    return (x * logits - softplus(logits)).sum(-1)


def log_ratio(mean, log_var, eps):
    """log p(z) − log q(z given x), where z = m + sε; the 2π are the same in both."""
    return 0.5 * (eps**2 + log_var - draws(mean, log_var, eps) ** 2).sum(-1)


def combined(log_weights):
    return log_weights.logsumexp(0) - math.log(len(log_weights))


def bernoulli_bound(x, mean, log_var, eps, weight, bias):
    z = draws(mean, log_var, eps)
    return combined(likelihood(x, z, weight, bias) + log_ratio(mean, log_var, eps))


def bound_mean_of_logs(x, mean, log_var, eps, weight, bias):
    z = draws(mean, log_var, eps)
    return (likelihood(x, z, weight, bias) + log_ratio(mean, log_var, eps)).mean(0)


def bound_without_log_k(x, mean, log_var, eps, weight, bias):
    return bernoulli_bound(x, mean, log_var, eps, weight, bias) + math.log(len(eps))


def bound_without_prior(x, mean, log_var, eps, weight, bias):
    z = draws(mean, log_var, eps)
    prior = -0.5 * (z**2 + math.log(2 * math.pi)).sum(-1)
    return combined(likelihood(x, z, weight, bias) + log_ratio(mean, log_var, eps) - prior)


def bound_without_q(x, mean, log_var, eps, weight, bias):
    z = draws(mean, log_var, eps)
    return combined(likelihood(x, z, weight, bias) - 0.5 * (z**2 + math.log(2 * math.pi)).sum(-1))


def bound_without_both(x, mean, log_var, eps, weight, bias):
    return combined(likelihood(x, draws(mean, log_var, eps), weight, bias))


def bound_ratio_inverted(x, mean, log_var, eps, weight, bias):
    z = draws(mean, log_var, eps)
    return combined(likelihood(x, z, weight, bias) - log_ratio(mean, log_var, eps))


def bound_by_exp(x, mean, log_var, eps, weight, bias):
    z = draws(mean, log_var, eps)
    return (likelihood(x, z, weight, bias) + log_ratio(mean, log_var, eps)).exp().mean(0).log()


def bound_log_of_sigmoid(x, mean, log_var, eps, weight, bias):
    z = draws(mean, log_var, eps)
    p = (z @ weight.T + bias).sigmoid()
    return combined((x * p.log() + (1 - x) * (1 - p).log()).sum(-1) + log_ratio(mean, log_var, eps))


def bound_logs_cut(x, mean, log_var, eps, weight, bias):
    z = draws(mean, log_var, eps)
    p = (z @ weight.T + bias).sigmoid()
    loss = binary_cross_entropy(p, x.expand_as(p), reduction="none")
    return combined(-loss.sum(-1) + log_ratio(mean, log_var, eps))


def bound_variance_times_noise(x, mean, log_var, eps, weight, bias):
    """z is drawn with the wrong width; its density under q is the right formula, at that z."""
    return bernoulli_bound(x, mean, log_var, (0.5 * log_var).exp() * eps, weight, bias)


def bound_log_std_for_log_var(x, mean, log_var, eps, weight, bias):
    return bernoulli_bound(x, mean, 2 * log_var, eps, weight, bias)


def bound_mean_of_pixels(x, mean, log_var, eps, weight, bias):
    z = draws(mean, log_var, eps)
    return combined(likelihood(x, z, weight, bias) / x.shape[1] + log_ratio(mean, log_var, eps))


def bound_closed_kl(x, mean, log_var, eps, weight, bias):
    kl = 0.5 * (mean**2 + log_var.exp() - 1 - log_var).sum(1)
    return combined(likelihood(x, draws(mean, log_var, eps), weight, bias)) - kl


def bound_without_bias(x, mean, log_var, eps, weight, bias):
    return bernoulli_bound(x, mean, log_var, eps, weight, torch.zeros_like(bias))


def bound_by_distributions(x, mean, log_var, eps, weight, bias):
    q, prior = Normal(mean, (log_var / 2).exp()), Normal(torch.zeros_like(mean), torch.ones_like(mean))
    terms = []
    for one in eps:
        z = q.loc + q.scale * one
        decoder = Bernoulli(logits=torch.nn.functional.linear(z, weight, bias))
        terms.append(decoder.log_prob(x).sum(1) + prior.log_prob(z).sum(1) - q.log_prob(z).sum(1))
    return torch.logsumexp(torch.stack(terms, 1), 1) - math.log(len(terms))


def bound_largest_taken_out(x, mean, log_var, eps, weight, bias):
    """By hand, in double precision: the largest weight is taken out before exp."""
    asked = x.dtype
    x, mean, log_var, eps, weight, bias = (part.double() for part in (x, mean, log_var, eps, weight, bias))
    z = torch.addcmul(mean, (0.5 * log_var).exp(), eps)
    signs = 2 * x - 1  # the logit of what was seen: ℓ for a 1, −ℓ for a 0
    fit = logsigmoid(signs * (torch.einsum("kbj,dj->kbd", z, weight) + bias)).sum(2)
    log_w = fit - 0.5 * z.square().sum(2) + 0.5 * (eps.square() + log_var).sum(2)
    top = log_w.max(0).values
    return (top + (log_w - top).exp().mean(0).log()).to(asked)


def bound_one_by_one(x, mean, log_var, eps, weight, bias):
    """One draw after the other, added up by logaddexp."""
    total = None
    for one in eps:
        z = mean + log_var.div(2).exp() * one
        logits = z @ weight.mT + bias
        fit = -binary_cross_entropy_with_logits(logits, x, reduction="none").sum(1)
        log_q = -0.5 * ((z - mean) ** 2 / log_var.exp() + log_var + math.log(2 * math.pi)).sum(1)
        log_w = fit - 0.5 * (z**2 + math.log(2 * math.pi)).sum(1) - log_q
        total = log_w if total is None else torch.logaddexp(total, log_w)
    return total - math.log(eps.shape[0])


def binary(g, draws, batch, size, latent, dtype=SINGLE, steep=1.0):
    return {
        "x": (torch.rand(batch, size, generator=g, dtype=dtype) < 0.5).to(dtype),
        "mean": normal(g, batch, latent, dtype=dtype),
        "log_var": normal(g, batch, latent, dtype=dtype) * 0.5 - 1,
        "eps": normal(g, draws, batch, latent, dtype=dtype),
        "weight": steep * normal(g, size, latent, dtype=dtype),
        "bias": steep * normal(g, size, dtype=dtype),
    }


BOUND = Exercise(
    "bernoulli_bound",
    points=4,
    minutes=25,
    difficulty=3,
    reference=bernoulli_bound,
    outputs=("bound",),
    visible=Group(
        1,
        lambda g: [
            binary(g, 4, 3, 6, 2),
            binary(g, 5, 2, 7, 3, DOUBLE),
            binary(g, 3, 4, 9, 2, steep=150.0),
        ],
    ),
    hidden={
        "other shapes": Group(
            1,
            lambda g: [
                binary(g, 7, 2, 5, 1),
                binary(g, 2, 5, 3, 4, DOUBLE),
                binary(g, 16, 3, 11, 2),
            ],
        ),
        "one draw, a batch of one, one pixel": Group(
            1, lambda g: [binary(g, 1, 3, 8, 2, DOUBLE), binary(g, 6, 1, 8, 3), binary(g, 3, 2, 1, 1, DOUBLE)]
        ),
        "many pixels, and a decoder that is sure": Group(
            1, lambda g: [binary(g, 4, 3, 400, 2), binary(g, 5, 3, 12, 2, steep=150.0)]
        ),
    },
    mistakes={
        "you took the mean of the logs": (
            bound_mean_of_logs,
            "That estimates the ELBO, for any K. The mean over the draws stands inside the log: it is what makes the bound rise.",
        ),
        "you left out log K": (
            bound_without_log_k,
            "logsumexp is the log of a sum. For the log of a mean, subtract log K; without it this is no bound.",
        ),
        "you left out the prior": (
            bound_without_prior,
            "The weight is p(x, z)/q(z given x), and p(x, z) = p(x given z) p(z).",
        ),
        "you left out q": (
            bound_without_q,
            "The draws come from q and not from the prior, so each is divided by its density there.",
        ),
        "you left out the prior and q": (
            bound_without_both,
            "That is right for draws from the prior. These come from q: each weight has the factor p(z)/q(z given x).",
        ),
        "you turned p(z)/q(z given x) upside down": (
            bound_ratio_inverted,
            "The mean over q of f(z) p(z)/q(z) is the mean over p of f(z): q divides.",
        ),
        "you took exp and log one after the other": (
            bound_by_exp,
            "exp(−300) is 0 in single precision, and log 0 is −∞. `torch.logsumexp` takes the largest weight out first.",
        ),
        "you took the log of a sigmoid": (
            bound_log_of_sigmoid,
            "A sigmoid rounds to 0 or 1, and its log is −∞. From the logit ℓ: log p(x) = xℓ − softplus(ℓ).",
        ),
        "you used a cross-entropy of probabilities, whose logs are cut at −100": (
            bound_logs_cut,
            "`binary_cross_entropy` hides the infinity of log 0. The form with logits needs no cut.",
        ),
        "you multiplied the noise by the variance": (
            bound_variance_times_noise,
            "z = m + sε with the standard deviation s = exp(log_var / 2).",
        ),
        "you took log s² for log s": (
            bound_log_std_for_log_var,
            "`log_var` is the log of the variance: s = exp(log_var / 2).",
        ),
        "you took the mean over the pixels": (
            bound_mean_of_pixels,
            "The pixels are independent given z: their probabilities multiply, and the logs add up.",
        ),
        "you used the closed form of the KL": (
            bound_closed_kl,
            "That is the mean of log q/p. Inside the log each draw needs its own weight, log p(z) − log q(z given x) at that z.",
        ),
        "you left out the decoder's bias": (bound_without_bias, "The logits are Wz + b."),
    },
    correct={
        "torch.distributions, draw by draw": bound_by_distributions,
        "the largest weight taken out by hand": bound_largest_taken_out,
        "logaddexp in a loop": bound_one_by_one,
    },
    tolerance=1e-4,
    forbidden=(
        "vae.importance_bound",
        "vae.gaussian_log_prob",
        "vae.VAE.log_likelihood",
        "vae.VAE.terms",
        "divergences.standard_kl",
        "divergences.gaussian_kl",
    ),
)


# 4. nearest_diagonal --------------------------------------------------------------------------------------------------


def diagonal(matrix):
    return matrix.diagonal(dim1=-2, dim2=-1)


def to_diagonal(cov, var, first):
    """The KL between p = N(m, C) and q = N(m, diag v), with p or q first."""
    log_det, log_v = torch.linalg.slogdet(cov).logabsdet, var.log().sum(-1)
    if first == "p":
        return 0.5 * ((diagonal(cov) / var - 1).sum(-1) + log_v - log_det)
    return 0.5 * ((diagonal(torch.linalg.inv(cov)) * var - 1).sum(-1) + log_det - log_v)


def nearest_diagonal(cov, first):
    log_det = torch.linalg.slogdet(cov).logabsdet
    if first == "p":
        var = diagonal(cov).clone()
        return var, 0.5 * (var.log().sum(-1) - log_det)
    precision = diagonal(torch.linalg.inv(cov))
    return 1 / precision, 0.5 * (precision.log().sum(-1) + log_det)


def nearest_exchanged(cov, first):
    return nearest_diagonal(cov, "q" if first == "p" else "p")


def nearest_always_cov(cov, first):
    return nearest_diagonal(cov, "p")


def nearest_always_precision(cov, first):
    return nearest_diagonal(cov, "q")


def nearest_measured_from_p(cov, first):
    var, _ = nearest_diagonal(cov, first)
    return var, to_diagonal(cov, var, "p")


def nearest_diagonal_of_c_throughout(cov, first):
    """The right KL, of q with the variances of p."""
    var = diagonal(cov).clone()
    return var, to_diagonal(cov, var, first)


def nearest_precision_for_var(cov, first):
    var, nats = nearest_diagonal(cov, first)
    return (var if first == "p" else 1 / var), nats


def nearest_deviations(cov, first):
    var, nats = nearest_diagonal(cov, first)
    return var.sqrt(), nats


def nearest_without_half(cov, first):
    var, nats = nearest_diagonal(cov, first)
    return var, 2 * nats


def nearest_log_det_sign(cov, first):
    var, nats = nearest_diagonal(cov, first)
    log_det = torch.linalg.slogdet(cov).logabsdet
    return var, nats + (log_det if first == "p" else -log_det)


def nearest_log_of_det(cov, first):
    var, nats = nearest_diagonal(cov, first)
    off = torch.linalg.det(cov).log() - torch.linalg.slogdet(cov).logabsdet
    return var, nats + (-0.5 * off if first == "p" else 0.5 * off)


def nearest_mean_of_latents(cov, first):
    var, nats = nearest_diagonal(cov, first)
    return var, nats / var.shape[-1]


def nearest_eigenvalues(cov, first):
    var = torch.linalg.eigvalsh(cov)
    return var, torch.zeros_like(var[:, 0])


def nearest_one_variance(cov, first):
    """The best round Gaussian."""
    shown = diagonal(cov) if first == "p" else diagonal(torch.linalg.inv(cov))
    var = (shown.mean(-1, keepdim=True) if first == "p" else 1 / shown.mean(-1, keepdim=True)).expand_as(shown).clone()
    return var, to_diagonal(cov, var, first)


def nearest_by_cholesky(cov, first):
    factor = torch.linalg.cholesky(cov)
    half_log_det = factor.diagonal(dim1=1, dim2=2).log().sum(1)
    if first == "p":
        var = factor.square().sum(2)
        return var, var.log().sum(1) / 2 - half_log_det
    eye = torch.eye(cov.shape[1], dtype=cov.dtype).expand_as(cov)
    var = 1 / torch.linalg.solve_triangular(factor, eye, upper=False).square().sum(1)
    return var, half_log_det - var.log().sum(1) / 2


def nearest_by_axes(cov, first):
    """Along the axes of each ellipsoid, in double precision."""
    lengths, axes = torch.linalg.eigh(cov.double())
    share = axes**2
    sign = 1 if first == "p" else -1
    shown = torch.einsum("bij,bj->bi", share, lengths**sign)
    nats = 0.5 * (shown.log().sum(1) - (lengths**sign).log().sum(1))
    return (shown**sign).to(cov.dtype), nats.to(cov.dtype)


def nearest_by_conditions(cov, first):
    """In a loop: q first keeps of each latent the variance that is left when all others are known."""
    rows, nats = [], []
    for one in cov.double():
        if first == "p":
            var = [one[i, i].item() for i in range(len(one))]
        else:
            var = []
            for i in range(len(one)):
                rest = [j for j in range(len(one)) if j != i]
                known = one[i, rest] @ torch.linalg.solve(one[rest][:, rest], one[rest, i]) if rest else 0.0
                var.append(float(one[i, i] - known))
        rows.append(var)
        gap = sum(map(math.log, var)) - 2 * torch.linalg.cholesky(one).diagonal().log().sum().item()
        nats.append(gap / 2 if first == "p" else -gap / 2)
    return torch.tensor(rows, dtype=cov.dtype), torch.tensor(nats, dtype=cov.dtype)


def nearest_by_distributions(cov, first):
    var = diagonal(cov).clone() if first == "p" else diagonal(torch.linalg.inv(cov)).reciprocal()
    zero = torch.zeros_like(var)
    p, q = MultivariateNormal(zero, cov), MultivariateNormal(zero, torch.diag_embed(var))
    return var, kl_divergence(p, q) if first == "p" else kl_divergence(q, p)


def ellipsoids(g, batch, size, first, dtype=SINGLE, scale=1.0):
    """Covariances of correlated latents, none of them near singular."""
    mixed = torch.randn(batch, size, size + 2, generator=g, dtype=DOUBLE)
    cov = mixed @ mixed.mT / size + 0.3 * torch.eye(size, dtype=DOUBLE)
    widths = uniform(g, 0.5, 2.0, batch, size, dtype=DOUBLE)
    cov = scale * widths[:, :, None] * cov * widths[:, None, :]
    return {"cov": ((cov + cov.mT) / 2).to(dtype), "first": first}


def one_without_correlation(g, size, first):
    case = ellipsoids(g, 3, size, first)
    case["cov"][0] = torch.diag(diagonal(case["cov"])[0])
    return case


def nearly_a_line(g, first):
    """Two latents with a correlation of 0.98 or −0.98."""
    width = uniform(g, 0.5, 2.0, 2, 2, dtype=DOUBLE)
    rho = torch.tensor([0.98, -0.98], dtype=DOUBLE)
    cov = torch.diag_embed(width**2)
    cov[:, 0, 1] = cov[:, 1, 0] = rho * width.prod(1)
    return {"cov": cov, "first": first}


NEAREST = Exercise(
    "nearest_diagonal",
    points=4,
    minutes=35,
    difficulty=4,
    reference=nearest_diagonal,
    outputs=("var", "nats"),
    visible=Group(
        1,
        lambda g: [
            ellipsoids(g, 3, 3, "p"),
            ellipsoids(g, 2, 4, "q", DOUBLE),
            ellipsoids(g, 1, 30, "p", scale=1e-3),
            ellipsoids(g, 1, 30, "q", scale=1e-3),
        ],
    ),
    hidden={
        "KL(p‖q)": Group(1, lambda g: [ellipsoids(g, 5, 2, "p"), ellipsoids(g, 1, 6, "p", DOUBLE)]),
        "KL(q‖p)": Group(1, lambda g: [ellipsoids(g, 5, 2, "q"), ellipsoids(g, 1, 6, "q", DOUBLE)]),
        "one latent, no correlation, almost all, many latents": Group(
            1,
            lambda g: [
                ellipsoids(g, 2, 1, "q", DOUBLE),
                one_without_correlation(g, 3, "p"),
                one_without_correlation(g, 4, "q"),
                nearly_a_line(g, "q"),
                nearly_a_line(g, "p"),
                ellipsoids(g, 1, 40, "q", scale=1e-3),
                ellipsoids(g, 2, 40, "p", scale=1e-3),
            ],
        ),
    },
    mistakes={
        "you exchanged the two directions": (
            nearest_exchanged,
            'With `first` = "p" the mean is over p, so the variances of q divide. Then q covers p, and is the wider one.',
        ),
        "you gave the answer to KL(p‖q) in both directions": (
            nearest_always_cov,
            "In KL(q‖p) it is C⁻¹ whose diagonal stands in the formula; and the diagonal of C⁻¹ is not one over that of C.",
        ),
        "you gave the answer to KL(q‖p) in both directions": (
            nearest_always_precision,
            "In KL(p‖q) the variances of q divide those of p, C_ii/v_i: no inverse matrix is needed.",
        ),
        "you measured KL(p‖q) in both directions": (
            nearest_measured_from_p,
            'The variances fit. But `nats` is the divergence that they minimize: for `first` = "q" the KL from q to p.',
        ),
        "you kept the variances of p in both directions": (
            nearest_diagonal_of_c_throughout,
            "For KL(q‖p) they are not the best. Set its derivative by v_i to 0.",
        ),
        "you returned precisions in the place of variances": (
            nearest_precision_for_var,
            "The diagonal of C⁻¹ is one over a variance: v_i = 1/(C⁻¹)_ii.",
        ),
        "you returned standard deviations": (nearest_deviations, "The first value asked for is a variance."),
        "you forgot the ½": (nearest_without_half, "log σ is ½ log σ²: the whole KL of two Gaussians has a ½."),
        "the logarithm of det C has the wrong sign": (
            nearest_log_det_sign,
            "A KL is 0 where p is a diagonal Gaussian itself: then log det C cancels the sum of the other logarithms.",
        ),
        "you took the log of a determinant that had rounded to 0": (
            nearest_log_of_det,
            "A product of thirty small variances is too small for single precision. `torch.linalg.slogdet` adds up logs.",
        ),
        "you took the mean over the latents": (
            nearest_mean_of_latents,
            "The KL of the vectors is asked for: a sum over the latents.",
        ),
        "you took the eigenvalues of C": (
            nearest_eigenvalues,
            "They are the variances along axes of p's own. A diagonal q lies along the given axes and cannot turn.",
        ),
        "you took one variance for all latents": (
            nearest_one_variance,
            "Each latent has a variance of its own, v_1 … v_k. In the KL they are separate, so each has its own best value.",
        ),
    },
    correct={
        "a Cholesky factor": nearest_by_cholesky,
        "eigenvectors, in double precision": nearest_by_axes,
        "conditional variances, in a loop": nearest_by_conditions,
        "torch.distributions": nearest_by_distributions,
    },
    tolerance=1e-4,
    forbidden=("divergences.gaussian_kl", "divergences.nearest_reverse", "divergences.kl", "vae.LinearGaussian.terms"),
)


# 5. js_from_logits ----------------------------------------------------------------------------------------------------


def log_odds(share):
    return (share / (1 - share)).log()[:, None]


def js_of_ratios(real, fake):
    """From log p/q at real and at generated samples."""
    return math.log(2) - 0.5 * softplus(-real).mean(1) - 0.5 * softplus(fake).mean(1)


def js_from_logits(real, fake, share):
    odds = log_odds(share)
    return js_of_ratios(real - odds, fake - odds)


def js_odds_forgotten(real, fake, share):
    return js_of_ratios(real, fake)


def js_odds_added(real, fake, share):
    return js_of_ratios(real + log_odds(share), fake + log_odds(share))


def js_share_for_odds(real, fake, share):
    return js_of_ratios(real - share.log()[:, None], fake - share.log()[:, None])


def js_odds_not_logged(real, fake, share):
    odds = (share / (1 - share))[:, None]
    return js_of_ratios(real - odds, fake - odds)


def js_labels_exchanged(real, fake, share):
    odds = log_odds(share)
    return js_of_ratios(odds - real, odds - fake)


def js_log_4(real, fake, share):
    return js_from_logits(real, fake, share) + math.log(2)


def js_doubled(real, fake, share):
    return 2 * js_from_logits(real, fake, share)


def js_half_forgotten(real, fake, share):
    return 2 * js_from_logits(real, fake, share) - math.log(2)


def js_loss(real, fake, share):
    return 2 * math.log(2) - 2 * js_from_logits(real, fake, share)


def js_pooled(real, fake, share):
    odds = log_odds(share)
    return math.log(2) - torch.cat([softplus(odds - real), softplus(fake - odds)], 1).mean(1)


def js_log_of_sigmoid(real, fake, share):
    odds = log_odds(share)
    d_real, d_fake = (real - odds).sigmoid(), (fake - odds).sigmoid()
    return math.log(2) + 0.5 * d_real.log().mean(1) + 0.5 * (1 - d_fake).log().mean(1)


def js_skewed(real, fake, share):
    """How much a sample tells about its class: the entropy of the classes minus the loss."""
    entropy = -share * share.log() - (1 - share) * (1 - share).log()
    return entropy - share * softplus(-real).mean(1) - (1 - share) * softplus(fake).mean(1)


def js_weighted(real, fake, share):
    odds = log_odds(share)
    return math.log(2) - share * softplus(odds - real).mean(1) - (1 - share) * softplus(fake - odds).mean(1)


def js_bits(real, fake, share):
    return js_from_logits(real, fake, share) / math.log(2)


def js_is_kl(real, fake, share):
    return (real - log_odds(share)).mean(1)


def js_in_a_loop(real, fake, share):
    rows = []
    for a, b, pi in zip(real.double(), fake.double(), share.tolist(), strict=True):
        odds = math.log(pi) - math.log1p(-pi)
        over_p = sum(math.log(2) - math.log1p(math.exp(-abs(r))) + min(r, 0.0) for r in (a - odds).tolist()) / len(a)
        over_q = sum(math.log(2) - math.log1p(math.exp(-abs(r))) - max(r, 0.0) for r in (b - odds).tolist()) / len(b)
        rows.append((over_p + over_q) / 2)
    return torch.tensor(rows, dtype=real.dtype)


def js_by_cross_entropy(real, fake, share):
    """By the loss for logits that PyTorch has, with the labels 1 and 0."""
    shift = torch.logit(share).unsqueeze(1)
    ones, zeros = torch.ones_like(real), torch.zeros_like(fake)
    loss_real = binary_cross_entropy_with_logits(real - shift, ones, reduction="none").mean(1)
    loss_fake = binary_cross_entropy_with_logits(fake - shift, zeros, reduction="none").mean(1)
    return 0.5 * (2 * math.log(2) - loss_real - loss_fake)


def js_by_two_logs(real, fake, share):
    """log 2p/(p + q) and log 2q/(p + q), where p and q are known up to a factor; in double precision."""
    real, fake, pi = real.double(), fake.double(), share.double()[:, None]
    parts = []
    for logits, wanted in ((real, 0), (fake, 1)):
        log_p, log_q = logits - pi.log(), -torch.log1p(-pi).expand_as(logits)
        mixed = torch.logaddexp(log_p, log_q) - math.log(2)
        parts.append(((log_p, log_q)[wanted] - mixed).mean(1))
    return ((parts[0] + parts[1]) / 2).to(share.dtype)


def judged(g, rows, real, fake, dtype=SINGLE, share=None, sure=1.0):
    """Logits of good discriminators: log p/q above 0 at most real samples, below at most others, and shifted by the odds."""
    share = uniform(g, 0.05, 0.45, rows, dtype=dtype) if share is None else torch.tensor(share, dtype=dtype)
    for_p, for_q = 1.5 + normal(g, rows, real, dtype=dtype), -1.5 + normal(g, rows, fake, dtype=dtype)
    if sure > 1:  # and wrong at one sample of each
        for_p[:, 0], for_q[:, 0] = -3.0, 3.0
    return {"real": sure * for_p + log_odds(share), "fake": sure * for_q + log_odds(share), "share": share}


JS = Exercise(
    "js_from_logits",
    points=4,
    minutes=20,
    difficulty=3,
    reference=js_from_logits,
    outputs=("js",),
    visible=Group(
        1,
        lambda g: [judged(g, 3, 5, 9), judged(g, 2, 6, 4, DOUBLE, share=[0.5, 0.8]), judged(g, 2, 6, 7, sure=100.0)],
    ),
    hidden={
        "other shapes": Group(1, lambda g: [judged(g, 4, 12, 3), judged(g, 2, 30, 41, DOUBLE), judged(g, 1, 8, 5)]),
        "rare and common real samples, one sample": Group(
            1,
            lambda g: [
                judged(g, 3, 8, 6, share=[0.001, 0.9, 0.999]),
                judged(g, 2, 1, 3, DOUBLE),
                judged(g, 1, 1, 1, DOUBLE, share=[0.3]),
            ],
        ),
        "a discriminator that is sure": Group(
            1, lambda g: [judged(g, 3, 12, 9, sure=200.0), judged(g, 1, 20, 25, DOUBLE, sure=600.0)]
        ),
    },
    mistakes={
        "you left out the odds of the classes": (
            js_odds_forgotten,
            'If real samples are rare, the best discriminator says "fake" more often: its logit is log p/q + log π/(1 − π).',
        ),
        "you added the odds of the classes": (
            js_odds_added,
            "The logit has them in it already, ℓ = log p/q + log π/(1 − π). Subtract them to get log p/q.",
        ),
        "you subtracted log π": (js_share_for_odds, "The logit is a log of odds, and so is its shift: log π/(1 − π)."),
        "you subtracted the odds and not their log": (
            js_odds_not_logged,
            "A logit is a log: what multiplies p/q is added to it as a log.",
        ),
        "you exchanged real and generated": (
            js_labels_exchanged,
            "D says how sure it is of *real*: at real samples it is log D that counts, at generated ones log(1 − D).",
        ),
        "you added log 4 and not log 2": (
            js_log_4,
            "L_D = log 4 − 2·JS. Divided by 2, the constant is log 2; and no JS is larger than log 2.",
        ),
        "you returned twice the divergence": (js_doubled, "log 4 − L_D is 2·JS, by the ½ in the definition of JS."),
        "you left out the ½": (
            js_half_forgotten,
            "JS is the mean of two KL divergences: each expectation has a ½.",
        ),
        "you returned the discriminator's loss": (
            js_loss,
            "A low loss means that p and q are easy to tell apart, so JS is large. L_D = log 4 − 2·JS.",
        ),
        "you took the mean over real and generated samples together": (
            js_pooled,
            "Then the larger group counts more. Take the two means first, and their mean next.",
        ),
        "you took the log of a sigmoid": (
            js_log_of_sigmoid,
            "A sigmoid rounds to 0 or 1, and its log is −∞. From a logit r: −log sigmoid(r) = softplus(−r).",
        ),
        "you measured how much a sample tells about its class": (
            js_skewed,
            "Its mixture is πp + (1 − π)q. In JS it is ½p + ½q, whatever the shares in training were.",
        ),
        "you weighted the two expectations by the shares": (
            js_weighted,
            "JS has a ½ for each, whatever the shares in training were. These come in by the logit alone.",
        ),
        "you returned bits": (js_bits, "Nats are asked for: no division by log 2."),
        "you returned KL(p‖q)": (
            js_is_kl,
            "The mean of log p/q over real samples is that. JS compares each with ½p + ½q.",
        ),
    },
    correct={
        "a loop in double precision": js_in_a_loop,
        "PyTorch's cross-entropy": js_by_cross_entropy,
        "the two logs of the definition": js_by_two_logs,
    },
    tolerance=1e-4,
    forbidden=(
        "gan.discriminator_loss",
        "gan.optimal_logit",
        "gan.loss",
        "divergences.jensen_shannon",
        "divergences.kl",
    ),
)


# 6. generator_gradient ------------------------------------------------------------------------------------------------


def slopes(x, weight, bias, head):
    """The logit at each sample, and its gradient there."""
    hidden = torch.tanh(x @ weight.T + bias)
    return hidden @ head, ((1 - hidden**2) * head) @ weight


def by_logit(logit, loss):
    """The derivative of one sample's loss by its logit."""
    if loss == "saturating":
        return -logit.sigmoid()
    return -(-logit).sigmoid() if loss == "non-saturating" else 2 * (logit - 1)


def descends(derivative):
    """The gradient, from another idea of the derivative by the logit."""

    def gradient(x, weight, bias, head, loss):
        logit, slope = slopes(x, weight, bias, head)
        return derivative(logit, loss)[:, None] * slope / len(x)

    return gradient


def generator_gradient(x, weight, bias, head, loss):
    return descends(by_logit)(x, weight, bias, head, loss)


OTHER = {"saturating": "non-saturating", "non-saturating": "saturating", "least squares": "least squares"}


def gradient_exchanged(x, weight, bias, head, loss):
    return generator_gradient(x, weight, bias, head, OTHER[loss])


def gradient_wrong_sign(x, weight, bias, head, loss):
    return -generator_gradient(x, weight, bias, head, loss)


@descends
def gradient_by_probability(logit, loss):
    d = logit.sigmoid()
    return {"saturating": -1 / (1 - d), "non-saturating": -1 / d, "least squares": 2 * (logit - 1)}[loss]


@descends
def gradient_of_probability(logit, loss):
    return 2 * (logit - 1) if loss == "least squares" else -logit.sigmoid() * (-logit).sigmoid()


@descends
def gradient_divided(logit, loss):
    """By the chain rule, with D(1 − D) left to be divided by 1 − D, or by D."""
    d = logit.sigmoid()
    slope = d * (1 - d)
    return {"saturating": -slope / (1 - d), "non-saturating": -slope / d, "least squares": 2 * (logit - 1)}[loss]


def gradient_of_the_sum(x, weight, bias, head, loss):
    return len(x) * generator_gradient(x, weight, bias, head, loss)


def gradient_without_tanh(x, weight, bias, head, loss):
    logit, _ = slopes(x, weight, bias, head)
    return by_logit(logit, loss)[:, None] * (head @ weight) / len(x)


def gradient_tanh_not_squared(x, weight, bias, head, loss):
    hidden = torch.tanh(x @ weight.T + bias)
    return by_logit(hidden @ head, loss)[:, None] * (((1 - hidden) * head) @ weight) / len(x)


def gradient_tanh_of_tanh(x, weight, bias, head, loss):
    hidden = torch.tanh(x @ weight.T + bias)
    return by_logit(hidden @ head, loss)[:, None] * (((1 - hidden.tanh() ** 2) * head) @ weight) / len(x)


def gradient_without_head(x, weight, bias, head, loss):
    hidden = torch.tanh(x @ weight.T + bias)
    return by_logit(hidden @ head, loss)[:, None] * ((1 - hidden**2) @ weight) / len(x)


@descends
def gradient_without_2(logit, loss):
    return logit - 1 if loss == "least squares" else by_logit(logit, loss)


@descends
def gradient_towards_fake(logit, loss):
    return 2 * logit if loss == "least squares" else by_logit(logit, loss)


@descends
def gradient_squares_of_probability(logit, loss):
    d = logit.sigmoid()
    return 2 * (d - 1) * d * (1 - d) if loss == "least squares" else by_logit(logit, loss)


def gradient_of_the_discriminator(x, weight, bias, head, loss):
    """The discriminator's loss at generated samples."""
    if loss == "least squares":
        return gradient_towards_fake(x, weight, bias, head, loss)
    return descends(lambda logit, loss: logit.sigmoid())(x, weight, bias, head, loss)


def gradient_by_autograd(x, weight, bias, head, loss):
    """The oracle: the loss itself, differentiated by the library."""
    with torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        logit = torch.tanh(x @ weight.T + bias) @ head
        losses = {
            "saturating": lambda: logsigmoid(-logit),
            "non-saturating": lambda: -logsigmoid(logit),
            "least squares": lambda: (logit - 1) ** 2,
        }
        return torch.autograd.grad(losses[loss]().mean(), x)[0]


def gradient_sample_by_sample(x, weight, bias, head, loss):
    """In double precision, sample by sample and unit by unit."""
    rows = []
    for one in x.double():
        units = [math.tanh(float(row.double() @ one) + b) for row, b in zip(weight, bias.tolist(), strict=True)]
        logit = sum(a * h for a, h in zip(head.tolist(), units, strict=True))
        up = 0.5 * (1 + math.tanh(logit / 2))  # the sigmoid
        outer = {"saturating": -up, "non-saturating": up - 1, "least squares": 2 * logit - 2}[loss]
        slope = sum(a * (1 - h * h) * row.double() for a, h, row in zip(head.tolist(), units, weight, strict=True))
        rows.append(outer * slope / len(x))
    return torch.stack(rows).to(x.dtype)


def gradient_by_einsum(x, weight, bias, head, loss):
    before = torch.nn.functional.linear(x, weight, bias)
    logit = torch.einsum("bh,h->b", before.tanh(), head)
    sure = torch.where(logit >= 0, 1 / (1 + (-logit.abs()).exp()), (-logit.abs()).exp() / (1 + (-logit.abs()).exp()))
    if loss == "least squares":
        outer = 2 * logit - 2
    else:
        outer = -sure if loss == "saturating" else sure - 1
    return torch.einsum("b,bh,h,hd->bd", outer / x.shape[0], before.cosh() ** -2, head, weight)


def judge_of(g, batch, size, units, loss, dtype=SINGLE, sure=1.0):
    """Samples and a discriminator, with logits of both signs."""
    return {
        "x": normal(g, batch, size, dtype=dtype),
        "weight": normal(g, units, size, dtype=dtype) / size**0.5,
        "bias": 0.5 * normal(g, units, dtype=dtype),
        "head": sure * normal(g, units, dtype=dtype),
        "loss": loss,
    }


def certain(g, batch, size, loss):
    """One discriminator unit for all: half of the samples far on its one side, half on the other, and one between."""
    case = judge_of(g, batch, size, 3, loss)
    case["bias"], case["head"] = torch.zeros(3), torch.tensor([400.0, 300.0, 500.0])
    case["weight"] = case["weight"][:1].repeat(3, 1) * torch.tensor([[1.0], [0.7], [0.4]])
    along = case["weight"][0] / case["weight"][0].norm()
    place = torch.linspace(-0.8, 0.8, batch)
    place[batch // 2] = 0.0005
    case["x"] = case["x"] - (case["x"] @ along)[:, None] * along + place[:, None] / case["weight"][0].norm() * along
    return case


GRADIENT = Exercise(
    "generator_gradient",
    points=3,
    minutes=20,
    difficulty=3,
    reference=generator_gradient,
    outputs=("gradient",),
    visible=Group(
        1,
        lambda g: [
            judge_of(g, 4, 3, 5, "saturating"),
            judge_of(g, 3, 2, 4, "non-saturating", DOUBLE),
            judge_of(g, 5, 3, 4, "least squares"),
            certain(g, 5, 3, "saturating"),
            certain(g, 5, 3, "non-saturating"),
        ],
    ),
    hidden={
        "other shapes": Group(
            1,
            lambda g: [
                judge_of(g, 7, 2, 9, "saturating"),
                judge_of(g, 2, 11, 3, "non-saturating"),
                judge_of(g, 6, 4, 6, "least squares", DOUBLE),
                judge_of(g, 1, 5, 2, "saturating", DOUBLE),
                judge_of(g, 3, 1, 1, "non-saturating", DOUBLE),
                judge_of(g, 1, 2, 8, "least squares", DOUBLE),
            ],
        ),
        "a discriminator that is sure": Group(
            1,
            lambda g: [
                certain(g, 5, 4, "saturating"),
                certain(g, 7, 2, "non-saturating"),
                judge_of(g, 4, 3, 5, "least squares", sure=100.0),
            ],
        ),
    },
    mistakes={
        "you exchanged the saturating and the non-saturating loss": (
            gradient_exchanged,
            "Saturating is the slide's log(1 − D), with the derivative −D by the logit: where the fake is found out, D ≈ 0, it is lost.",
        ),
        "the gradient has the wrong sign": (
            gradient_wrong_sign,
            "It is the gradient of what the generator minimizes. A step against it should make the logit larger.",
        ),
        "you differentiated by D instead of the logit": (
            gradient_by_probability,
            "D = sigmoid(ℓ) has the derivative D(1 − D) by ℓ. Multiply by it, and simplify.",
        ),
        "you took D(1 − D) for the derivative of the logarithm": (
            gradient_of_probability,
            "That is the derivative of D. The logarithm divides it by D, or by 1 − D.",
        ),
        "you divided D(1 − D) by a D or 1 − D that had rounded to 0": (
            gradient_divided,
            "0/0 is not a number. Cancel on paper first: the derivatives by ℓ are −D and −(1 − D).",
        ),
        "you differentiated the sum over the batch": (
            gradient_of_the_sum,
            "The loss is a mean: each of the B samples has a share of 1/B in it.",
        ),
        "you left out the slope of tanh": (
            gradient_without_tanh,
            "A unit passes on 1 − tanh² of what comes in: at a saturated unit, nothing.",
        ),
        "you took 1 − tanh for the slope of tanh": (gradient_tanh_not_squared, "It is 1 − tanh²."),
        "you took the tanh of a tanh": (
            gradient_tanh_of_tanh,
            "The slope is 1 − h² with h = tanh(Vx + b), the unit's value itself.",
        ),
        "you left out the head's weights": (
            gradient_without_head,
            "ℓ = Σ a_j h_j: the slope of each unit is multiplied by its a_j, and these have signs.",
        ),
        "you forgot the 2 in the derivative of the square": (
            gradient_without_2,
            "The least-squares loss is (ℓ − 1)², without a ½.",
        ),
        "you pulled the logits to 0, the label of generated samples": (
            gradient_towards_fake,
            "The generator wants its samples to be taken for real: the label is 1.",
        ),
        "you took the sigmoid in the least-squares loss": (
            gradient_squares_of_probability,
            "There is none in it: ℓ itself is compared with the label.",
        ),
        "you gave the gradient of the discriminator's loss": (
            gradient_of_the_discriminator,
            "The discriminator wants generated samples to have D = 0 (in least squares, ℓ = 0). The generator wants the opposite.",
        ),
    },
    correct={
        "autograd": gradient_by_autograd,
        "sample by sample in double precision": gradient_sample_by_sample,
        "one einsum": gradient_by_einsum,
    },
    tolerance=1e-4,
    forbidden=("gan.generator_loss", "gan.discriminator_loss", "gan.loss", "gan.gradient_penalty"),
)


EXERCISES = [KL, RECONSTRUCTION, BOUND, NEAREST, JS, GRADIENT]
