"""The references of homework 1 against other derivations: quadrature, search, the library's densities, autograd, grids."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Bernoulli, MultivariateNormal, Normal
from torch.nn.functional import logsigmoid

from dgm_course.grading.exercise import load

REFERENCE = {name: exercise.reference for name, exercise in load(Path(__file__).parent / "hw1.py").items()}


def near(actual, expected, tolerance=1e-10):
    actual, expected = (torch.as_tensor(value, dtype=torch.float64) for value in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hermite(count):
    """Points and weights for the mean over N(0, 1)."""
    points, weights = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(count))
    return points, weights / weights.sum()


# kl_to_prior ----------------------------------------------------------------------------------------------------------


def test_the_kl_is_the_mean_log_ratio_by_quadrature():
    """The log-ratio of two Gaussians is a quadratic, whose mean Gauss's rule gives exactly."""
    mean, log_var, prior_mean = randn(5, 3), randn(5, 3, seed=1), randn(3, seed=2)
    prior_std = randn(3, seed=3).exp()
    points, weights = hermite(4)
    z = mean[..., None] + (log_var / 2).exp()[..., None] * points
    q, p = Normal(mean[..., None], (log_var / 2).exp()[..., None]), Normal(prior_mean[:, None], prior_std[:, None])
    expected = ((q.log_prob(z) - p.log_prob(z)) @ weights).sum(1)
    near(REFERENCE["kl_to_prior"](mean, log_var, prior_mean, prior_std), expected)


def test_the_best_prior_has_the_moments_of_the_mixture_of_all_codes():
    """What the question of exercise 1 claims; found here by descent."""
    mean, log_var = 2 * randn(20, 2), randn(20, 2, seed=1)
    prior = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)  # mean and log-deviation
    optimizer = torch.optim.LBFGS(
        [prior], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-20, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = REFERENCE["kl_to_prior"](mean, log_var, prior[0], prior[1].exp()).mean()
        value.backward()
        return value

    optimizer.step(closure)
    near(prior[0].detach(), mean.mean(0), 1e-6)
    near((2 * prior[1]).exp().detach(), log_var.exp().mean(0) + mean.var(0, correction=0), 1e-6)


# reconstruction_nats --------------------------------------------------------------------------------------------------


def test_the_nats_are_those_of_the_best_of_many_variances():
    x, x_hat = randn(4, 1, 3, 2), randn(4, 1, 3, 2, seed=1)
    nats = REFERENCE["reconstruction_nats"](x, x_hat)
    stds = torch.logspace(-2, 2, 40_001, dtype=torch.float64)
    at = torch.stack([-Normal(x_hat, std).log_prob(x).flatten(1).sum(1) for std in stds])
    best = at.sum(1).argmin()
    assert 0 < best < len(stds) - 1 and nats.sum() <= at.sum(1).min()
    near(nats, at[best], 1e-3)


def test_the_mean_is_half_d_log_2_pi_e_times_the_mean_square():
    x, x_hat = randn(5, 7), randn(5, 7, seed=1)
    expected = 3.5 * math.log(2 * math.pi * math.e * (x - x_hat).square().mean())
    near(REFERENCE["reconstruction_nats"](x, x_hat).mean(), expected)


def test_no_error_anywhere_raises():
    with pytest.raises(ValueError, match="x_hat"):
        REFERENCE["reconstruction_nats"](randn(2, 3), randn(2, 3))


# bernoulli_bound ------------------------------------------------------------------------------------------------------


def small_decoder():
    x = torch.tensor([[1.0, 0, 1], [0, 0, 1]], dtype=torch.float64)
    return x, randn(2, 1), randn(2, 1, seed=1) - 1, randn(3, 1, seed=2), randn(3, seed=3)


def test_the_weights_are_those_of_probabilities_multiplied_out():
    x, mean, log_var, weight, bias = small_decoder()
    eps = randn(4, 2, 1, seed=4)
    for image, row in enumerate(REFERENCE["bernoulli_bound"](x, mean, log_var, eps, weight, bias)):
        total = 0.0
        for draw in range(4):
            s = math.exp(log_var[image].item() / 2)
            z = mean[image].item() + s * eps[draw, image].item()
            p = 1.0
            for pixel in range(3):
                on = 1 / (1 + math.exp(-(weight[pixel].item() * z + bias[pixel].item())))
                p *= on if x[image, pixel] == 1 else 1 - on
            q = math.exp(-(eps[draw, image].item() ** 2) / 2) / s
            total += p * math.exp(-(z**2) / 2) / q  # the 2π of prior and q cancel
        near(row, math.log(total / 4))


def test_one_draw_is_the_elbo_and_many_are_the_evidence():
    """Both by quadrature: the mean over ε of the bound for K = 1, and a fine grid of z."""
    x, mean, log_var, weight, bias = small_decoder()
    points, weights = hermite(60)
    eps = points[:, None, None, None].expand(60, 1, 2, 1)
    one = torch.stack([REFERENCE["bernoulli_bound"](x, mean, log_var, e, weight, bias) for e in eps])
    kl = 0.5 * (mean**2 + log_var.exp() - 1 - log_var).sum(1)
    z = mean + (log_var / 2).exp() * points[:, None, None]
    fit = Bernoulli(logits=z @ weight.T + bias).log_prob(x).sum(2)
    near(weights @ one, weights @ fit - kl, 1e-8)

    grid = torch.linspace(-12, 12, 24_001, dtype=torch.float64)[:, None]
    joint = Bernoulli(logits=grid @ weight.T + bias).log_prob(x[:, None]).sum(2) + Normal(0.0, 1.0).log_prob(grid)[:, 0]
    evidence = joint.exp().sum(1).mul(0.001).log()
    assert (weights @ one < evidence).all()
    many = REFERENCE["bernoulli_bound"](x, mean, log_var, randn(400_000, 2, 1, seed=5), weight, bias)
    near(many, evidence, 0.02)


def test_sure_decoders_and_many_pixels_stay_finite_in_single_precision():
    x, mean, log_var, weight, bias = (part.float() for part in small_decoder())
    far = REFERENCE["bernoulli_bound"](x, mean, log_var, torch.randn(5, 2, 1), 500 * weight, 500 * bias)
    many = REFERENCE["bernoulli_bound"](
        x.repeat(1, 300), mean, log_var, torch.randn(5, 2, 1), weight.repeat(300, 1), bias.repeat(300)
    )
    assert torch.isfinite(far).all() and torch.isfinite(many).all() and (many < -300).all()
    zero, one = torch.zeros(1, 1), torch.ones(1, 1)  # at z = 0, the mean of q = p, a white pixel and the logit −500
    near(REFERENCE["bernoulli_bound"](one, zero, zero, zero[None], zero, torch.tensor([-500.0])), [-500.0])


# nearest_diagonal -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["p", "q"])
def test_the_nearest_gaussian_is_that_of_a_descent_on_the_librarys_kl(first):
    mixed = randn(3, 4, 6)
    cov = mixed @ mixed.mT / 4
    log_var = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [log_var], max_iter=1000, tolerance_grad=1e-13, tolerance_change=1e-20, line_search_fn="strong_wolfe"
    )

    def distance():
        p = MultivariateNormal(torch.zeros(3, 4, dtype=torch.float64), cov)
        q = MultivariateNormal(torch.zeros(3, 4, dtype=torch.float64), torch.diag_embed(log_var.exp()))
        return torch.distributions.kl_divergence(*((p, q) if first == "p" else (q, p)))

    def closure():
        optimizer.zero_grad()
        value = distance().sum()
        value.backward()
        return value

    optimizer.step(closure)
    var, nats = REFERENCE["nearest_diagonal"](cov, first)
    near(var, log_var.exp().detach(), 1e-5)
    near(nats, distance().detach(), 1e-9)


def test_two_latents_by_their_correlation():
    """Closed forms: both divergences are −½ log(1 − ρ²), and q first keeps the share 1 − ρ² of each variance."""
    rho, a, b = 0.8, 4.0, 0.25
    off = rho * math.sqrt(a * b)
    cov = torch.tensor([[[a, off], [off, b]]], dtype=torch.float64)
    for first, share in (("p", 1), ("q", 1 - rho**2)):
        var, nats = REFERENCE["nearest_diagonal"](cov, first)
        near(var, [[a * share, b * share]])
        near(nats, [-0.5 * math.log(1 - rho**2)])


def test_a_determinant_below_single_precision_does_no_harm():
    cov = torch.eye(40).mul(1e-3)[None]
    cov[0, 0, 1] = cov[0, 1, 0] = 0.5e-3
    assert torch.linalg.det(cov) == 0
    for first in "pq":
        near(REFERENCE["nearest_diagonal"](cov, first)[1], [-0.5 * math.log(0.75)], 1e-4)


# js_from_logits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_js_is_that_of_a_sum_over_states_whatever_the_shares(share):
    """Two distributions on four states; the discriminator is Bayes's rule, the samples are each state in its share."""
    p, q = np.array([4, 3, 2, 1]) / 10, np.array([1, 1, 3, 5]) / 10
    real_odds = share * p / ((1 - share) * q)
    logits = torch.from_numpy(np.log(real_odds))
    real, fake = (
        logits.repeat_interleave(torch.tensor([4, 3, 2, 1])),
        logits.repeat_interleave(torch.tensor([2, 2, 6, 10])),
    )
    mixed = (p + q) / 2
    expected = (np.sum(p * np.log(p / mixed)) + np.sum(q * np.log(q / mixed))) / 2
    near(REFERENCE["js_from_logits"](real[None], fake[None], torch.tensor([share]).double()), [expected])


def test_any_other_discriminator_gives_less_and_a_sure_one_log_2():
    """Gaussians at ±1, by quadrature: the samples and their weights are the same for all."""
    points, weights = hermite(40)
    half = torch.tensor([0.5], dtype=torch.float64)

    def js(logit):
        """The mean of the estimate from one real and one generated sample, over all pairs that belong together."""
        return sum(
            w * REFERENCE["js_from_logits"](logit(1 + e)[None, None], logit(-1 + e)[None, None], half)
            for e, w in zip(points, weights, strict=True)
        ).item()

    best = js(lambda x: 2 * x)  # log N(x; 1, 1) − log N(x; −1, 1)
    grid = torch.linspace(-12, 12, 24_001, dtype=torch.float64)
    p, q = Normal(1.0, 1.0).log_prob(grid), Normal(-1.0, 1.0).log_prob(grid)
    mixed = torch.logaddexp(p, q) - math.log(2)
    expected = 0.0005 * (p.exp() * (p - mixed) + q.exp() * (q - mixed)).sum()
    near(best, expected, 1e-5)
    assert all(js(other) < best - 1e-4 for other in (lambda x: x, lambda x: 3 * x, lambda x: 2 * x + 0.3, torch.sin))
    sure = REFERENCE["js_from_logits"](torch.full((1, 3), 800.0), torch.full((1, 2), -800.0), half.float())
    near(sure, [math.log(2)], 1e-6)
    wrong = REFERENCE["js_from_logits"](torch.full((1, 3), -800.0), torch.full((1, 2), 800.0), half.float())
    near(wrong, [math.log(2) - 800], 1e-6)


# generator_gradient ---------------------------------------------------------------------------------------------------

LOSSES = {
    "saturating": lambda logit: torch.log(1 - torch.sigmoid(logit)),
    "non-saturating": lambda logit: -torch.log(torch.sigmoid(logit)),
    "least squares": lambda logit: (logit - 1) ** 2,
}


@pytest.mark.parametrize("loss", LOSSES)
def test_the_gradient_is_that_of_differences_and_of_autograd(loss):
    x, weight, bias, head = randn(3, 2), randn(4, 2, seed=1), randn(4, seed=2), randn(4, seed=3)

    def value(x):
        return LOSSES[loss](torch.tanh(x @ weight.T + bias) @ head).mean()

    found = REFERENCE["generator_gradient"](x, weight, bias, head, loss)
    step = 1e-6
    for place in np.ndindex(3, 2):
        up, down = x.clone(), x.clone()
        up[place] += step
        down[place] -= step
        near(found[place], (value(up) - value(down)) / (2 * step), 1e-7)
    leaf = x.clone().requires_grad_()
    near(found, torch.autograd.grad(value(leaf), leaf)[0])


def test_where_the_discriminator_is_sure_only_the_slides_gradient_is_lost():
    x, weight, bias, head = torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1), torch.tensor([-300.0])
    slope = -300 * (1 - math.tanh(1) ** 2)
    found = {loss: REFERENCE["generator_gradient"](x, weight, bias, head, loss).item() for loss in LOSSES}
    near(found["saturating"], 0.0)
    near(found["non-saturating"], -slope, 1e-5)
    near(found["least squares"], 2 * (-300 * math.tanh(1) - 1) * slope, 1e-5)
    near(logsigmoid(torch.tensor(-300.0)), -300.0)  # while the loss itself is as far from its best as can be
