"""The VAE's bound against torch.distributions, quadrature, brute force over z, and a linear model solved by hand."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from dgm_course import vae
from dgm_course.nets import perceptron
from dgm_course.vae import VAE, ConvVAE, LinearGaussian, gaussian_log_prob, importance_bound, principal

D, K, VAR = 4, 2, math.exp(-1)


def close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=tolerance, atol=tolerance)


def normal(generator, *shape):
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def covariance(generator, *batch, dim=K):
    root = normal(generator, *batch, dim, dim)
    cov = root @ root.mT + 0.1 * torch.eye(dim, dtype=torch.float64)
    return (cov + cov.mT) / 2


@pytest.fixture
def model(generator) -> LinearGaussian:
    """Four numbers from two latents, with nothing orthogonal."""
    return LinearGaussian(normal(generator, D, K), normal(generator, D), VAR)


def linear(weight, bias, rule, shift, log_vars) -> VAE:
    """A VAE whose decoder is Wz + b and whose encoder says N(Ax + a, diag e^{s}), in float64; σ² is e^{−1}."""
    out, latent = weight.shape
    encoder, decoder = nn.Linear(out, 2 * latent), nn.Linear(latent, out)
    whole = VAE(encoder, decoder, latent, log_var=-1.0).double()
    with torch.no_grad():
        encoder.weight.copy_(torch.cat([rule, torch.zeros_like(rule)]))
        encoder.bias.copy_(torch.cat([shift, log_vars]))
        decoder.weight.copy_(weight)
        decoder.bias.copy_(bias)
    return whole


def cubature(latent: int):
    """Points ε and weights that integrate polynomials of degree 5 against the standard normal exactly."""
    nodes, shares = (-math.sqrt(3), 0.0, math.sqrt(3)), (1 / 6, 2 / 3, 1 / 6)
    points = torch.tensor(list(itertools.product(nodes, repeat=latent)), dtype=torch.float64)
    return points, torch.tensor([math.prod(w) for w in itertools.product(shares, repeat=latent)], dtype=torch.float64)


# Density ------------------------------------------------------------------------------------------------------------


def test_gaussian_log_prob_is_torchs(generator):
    """Summed over the last dimension; means and variances of any shape that fits, a number among them."""
    x, mean, log_var = (normal(generator, 5, 3) for _ in range(3))
    close(gaussian_log_prob(x, mean, log_var), Normal(mean, (log_var / 2).exp()).log_prob(x).sum(1))
    close(gaussian_log_prob(x, mean[0], log_var[0, 0]), Normal(mean[0], (log_var[0, 0] / 2).exp()).log_prob(x).sum(1))
    images = normal(generator, 2, 5, 3)
    close(gaussian_log_prob(images, mean, log_var), Normal(mean, (log_var / 2).exp()).log_prob(images).sum(2))


# The two terms ------------------------------------------------------------------------------------------------------


def test_terms_by_hand(generator):
    """One draw z = m + s·ε; log p(x|z) with all values of an image, and the KL of each latent, by torch.distributions."""
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 6))
    decoder = nn.Sequential(nn.Linear(3, 12), nn.Unflatten(1, (1, 3, 4)))
    whole = VAE(encoder, decoder, 3, log_var=-0.7).double()
    x, eps = normal(generator, 5, 1, 3, 4), normal(generator, 5, 3)
    out = x.flatten(1) @ encoder[1].weight.T + encoder[1].bias
    mean, std = out[:, :3], (out[:, 3:] / 2).exp()
    image = (mean + std * eps) @ decoder[0].weight.T + decoder[0].bias
    reconstruction, kl = whole.terms(x, eps)
    close(reconstruction, Normal(image, math.exp(whole.log_var.item() / 2)).log_prob(x.flatten(1)).sum(1))
    close(kl, kl_divergence(Normal(mean, std), Normal(0.0, 1.0)))
    assert reconstruction.shape == (5,) and kl.shape == (5, 3)
    close(whole.encode(x)[0], mean)
    close(whole.encode(x)[1], out[:, 3:])
    close(whole.decode(eps).flatten(1), eps @ decoder[0].weight.T + decoder[0].bias)
    for beta in (1.0, 0.0, 4.0):
        close(vae.loss(whole, x, eps, beta), (beta * kl.sum() - reconstruction.sum()) / (5 * 12))


def test_loss_teaches_every_parameter(generator):
    """Encoder, decoder and σ; and the slope along a random direction is that of finite differences, for fixed ε."""
    torch.manual_seed(0)
    whole = VAE(perceptron(3, 8, 4), perceptron(2, 8, 3), latent=2).double()
    x, eps = normal(generator, 6, 3), normal(generator, 6, 2)
    vae.loss(whole, x, eps, beta=1.7).backward()
    for name, p in whole.named_parameters():
        direction, sides = normal(generator, *p.shape), []
        with torch.no_grad():
            for step in (1e-5, -1e-5):
                p += step * direction
                sides.append(vae.loss(whole, x, eps, beta=1.7).item())
                p -= step * direction
        slope = (p.grad * direction).sum().item()
        assert abs(slope) > 1e-4 and slope == pytest.approx((sides[0] - sides[1]) / 2e-5, abs=1e-8), name


def test_images():
    """Shapes of the convolutional one; means of x in (−1, 1); the loss reaches all of its parameters."""
    torch.manual_seed(0)
    whole, x = ConvVAE(latent=3, width=8), 2 * torch.rand(2, 1, 28, 28) - 1
    mean, log_var = whole.encode(x)
    assert mean.shape == log_var.shape == (2, 3) and whole.log_var.item() == -2
    image = whole.decode(4 * torch.randn(5, 3))
    assert image.shape == (5, 1, 28, 28) and image.abs().max() < 1
    vae.loss(whole, x, torch.randn(2, 3)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and (p.grad != 0).any() for p in whole.parameters())


def test_samples_are_means(generator):
    """Of 100,000 samples of a linear decoder the covariance is τ²WWᵀ, without σ²; the generator alone decides."""
    weight, bias = normal(generator, 3, 2), normal(generator, 3)
    whole = linear(weight, bias, torch.zeros(2, 3).double(), torch.zeros(2).double(), torch.zeros(2).double())
    for temperature in (1.0, 0.5, 0.0):
        x = whole.sample(100_000, temperature, generator)
        assert x.dtype == torch.float64 and not x.requires_grad
        close(x.mean(0), bias, 0.03)
        close(torch.cov(x.T), temperature**2 * weight @ weight.T, 0.05)
    one, two = (whole.sample(4, generator=torch.Generator().manual_seed(1)) for _ in "ab")
    assert torch.equal(one, two)


# A model in which everything is known -------------------------------------------------------------------------------


def test_evidence_and_posterior_by_brute_force():
    """One latent: prior times likelihood on 40,001 values of z gives p(x) and the posterior's two moments."""
    weight, bias, var = np.array([0.8, -1.1, 0.3]), np.array([0.2, 0.0, -0.5]), 0.4
    one = LinearGaussian(torch.from_numpy(weight)[:, None], torch.from_numpy(bias), var)
    x = np.array([[0.5, 1.0, -1.0], [-2.0, 0.3, 0.4]])
    z = np.linspace(-10, 10, 40_001)
    joint = norm.pdf(z) * norm.pdf(x[:, None], z[:, None] * weight + bias, math.sqrt(var)).prod(2)
    evidence = joint.sum(1) * (z[1] - z[0])
    posterior = joint / joint.sum(1, keepdims=True)
    mean = (posterior * z).sum(1)
    close(one.log_evidence(torch.from_numpy(x)), np.log(evidence))
    found, cov = one.posterior(torch.from_numpy(x))
    close(found[:, 0], mean)
    close(cov[0, 0].expand(2), (posterior * (z - mean[:, None]) ** 2).sum(1))


def test_posterior_by_conditioning(model, generator):
    """Two latents: the joint Gaussian of (z, x), conditioned the textbook way, with the inverse of the covariance of x."""
    x, w = normal(generator, 5, D), model.weight
    gain = w.T @ (w @ w.T + VAR * torch.eye(D, dtype=torch.float64)).inverse()
    mean, cov = model.posterior(x)
    close(mean, (x - model.bias) @ gain.T)
    close(cov, torch.eye(K, dtype=torch.float64) - gain @ w)


def test_terms_without_sampling(model, generator):
    """E_q[log p(x|z)] over 200,000 draws within 5 standard errors, for a q with a covariance of its own for each x."""
    x, mean, cov = normal(generator, 3, D), normal(generator, 3, K), covariance(generator, 3)
    fit, kl = model.terms(x, mean, cov)
    z = mean + torch.einsum("bij,nbj->nbi", torch.linalg.cholesky(cov), normal(generator, 200_000, 3, K))
    values = Normal(z @ model.weight.T + model.bias, math.sqrt(VAR)).log_prob(x).sum(2)
    assert ((fit - values.mean(0)).abs() < 5 * values.std(0) / math.sqrt(200_000)).all()
    prior = MultivariateNormal(torch.zeros(K, dtype=torch.float64), torch.eye(K, dtype=torch.float64))
    close(kl, kl_divergence(MultivariateNormal(mean, cov), prior))


@pytest.mark.parametrize("batch", [(), (6,)])
def test_the_gap_is_the_divergence_from_the_posterior(batch, model, generator):
    """log p(x) − ELBO(q) = KL(q‖p(z|x)), for any q; so the ELBO is a bound, and it is reached at the posterior alone."""
    x, mean, cov = 2 * normal(generator, 6, D), normal(generator, 6, K), covariance(generator, *batch)
    fit, kl = model.terms(x, mean, cov)
    centre, spread = model.posterior(x)
    gap = model.log_evidence(x) - (fit - kl)
    close(gap, kl_divergence(MultivariateNormal(mean, cov), MultivariateNormal(centre, spread)))
    assert (gap > 0.01).all()
    fit, kl = model.terms(x, centre, spread)
    close(fit - kl, model.log_evidence(x))


@pytest.fixture
def guess(model, generator) -> VAE:
    """A VAE with that model as its decoder, and an encoder that is not the posterior."""
    rule, shift, log_vars = normal(generator, K, D), normal(generator, K), normal(generator, K)
    return linear(model.weight, model.bias, rule, shift, log_vars)


def known_terms(model, guess, x):
    """The terms of the linear model for the q that the encoder says."""
    mean, log_var = guess.encode(x)
    return model.terms(x, mean, torch.diag_embed(log_var.exp()))


def test_a_linear_vae_is_the_linear_model(model, guess, generator):
    """Its terms are quadratic in ε, so their mean over ε by a rule of degree 5 is exact."""
    x = normal(generator, 5, D)
    points, weights = cubature(K)
    fit = sum(w * guess.terms(x, eps.expand(5, K))[0] for eps, w in zip(points, weights, strict=True))
    close(fit, known_terms(model, guess, x)[0])
    close(guess.terms(x, points[:5])[1].sum(1), known_terms(model, guess, x)[1])


def test_arguments_of_the_linear_model():
    """What does not fit raises and is named."""
    with pytest.raises(
        ValueError, match=r"^weight and bias must have shapes \(D, k\) and \(D,\); got \(3, 2\) and \(2,\)"
    ):
        LinearGaussian(torch.zeros(3, 2), torch.zeros(2), 1.0)
    for var in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="^var must be positive; got"):
            LinearGaussian(torch.zeros(3, 2), torch.zeros(3), var)


# The bound from several draws ---------------------------------------------------------------------------------------


def test_importance_bound_by_hand(guess, generator):
    """log of the mean of p(x, z)/q(z|x), by torch.distributions."""
    x, eps = normal(generator, 5, D), normal(generator, 3, 5, K)
    mean, std = guess.encode(x)[0], (guess.encode(x)[1] / 2).exp()
    ratios = []
    for one in eps:
        z = mean + std * one
        joint = Normal(guess.decode(z), math.sqrt(VAR)).log_prob(x).sum(1) + Normal(0.0, 1.0).log_prob(z).sum(1)
        ratios.append((joint - Normal(mean, std).log_prob(z).sum(1)).exp())
    close(importance_bound(guess, x, eps), torch.stack(ratios).mean(0).log())


def test_with_one_draw_its_mean_is_the_elbo(model, guess, generator):
    """Exactly: it is quadratic in ε as well."""
    x = normal(generator, 5, D)
    points, weights = cubature(K)
    values = torch.stack([importance_bound(guess, x, eps.expand(1, 5, K)) for eps in points])
    fit, kl = known_terms(model, guess, x)
    close(weights @ values, fit - kl)


def test_it_rises_to_the_evidence(generator):
    """More draws, a higher mean; it stays below log p(x), and comes close. A bound is at least the mean of its halves."""
    weight, bias = torch.tensor([[1.0], [0.5]]).double(), torch.tensor([0.1, -0.2]).double()
    model = LinearGaussian(weight, bias, VAR)
    x = torch.tensor([[1.5, 0.3]]).double().expand(3000, 2)
    mean, cov = model.posterior(x[:1])
    zero = torch.zeros(1, 2, dtype=torch.float64)
    guess = linear(weight, bias, zero, mean[0] + 0.5, (2 * cov[0]).log())
    means, values = [], importance_bound(guess, x, eps := normal(generator, 64, 3000, 1))
    for size in (1, 2, 4, 8, 16, 32, 64):
        means.append(importance_bound(guess, x, eps[:size]).mean().item())
    evidence = model.log_evidence(x[:1]).item()
    assert all(a < b for a, b in itertools.pairwise(means))
    assert evidence - 0.02 < means[-1] < evidence + 5 * values.std().item() / math.sqrt(3000)
    fit, kl = known_terms(model, guess, x[:1])
    assert means[0] == pytest.approx((fit - kl).item(), abs=0.15) and means[0] < evidence - 0.1
    halves = importance_bound(guess, x, eps[:32]), importance_bound(guess, x, eps[32:])
    assert (values >= sum(halves) / 2 - 1e-12).all()


def test_with_the_posterior_any_draw_gives_the_evidence(generator):
    """Orthogonal columns make the posterior diagonal: then every ratio is p(x), for any ε and any K, far out as well."""
    weight = torch.linalg.qr(normal(generator, D, K))[0] * torch.tensor([2.0, 0.5])
    bias = normal(generator, D)
    inner = (weight.T @ weight + VAR * torch.eye(K, dtype=torch.float64)).diagonal()
    rule = weight.T / inner[:, None]
    exact = linear(weight, bias, rule, -rule @ bias, (VAR / inner).log())
    x = torch.cat([normal(generator, 5, D), 100 * normal(generator, 1, D)])
    cov = weight @ weight.T + VAR * torch.eye(D, dtype=torch.float64)
    evidence = MultivariateNormal(bias, cov).log_prob(x)
    for k in (1, 2, 7):
        close(importance_bound(exact, x, 3 * normal(generator, k, 6, K)), evidence, 1e-8)


# The best linear model ----------------------------------------------------------------------------------------------


@pytest.fixture
def data(generator):
    """400 points in five dimensions, with variances from about 9 to about 0.04 along slanted axes."""
    axes = torch.linalg.qr(normal(generator, 5, 5))[0]
    return normal(generator, 400, 5) * torch.tensor([3.0, 1.5, 0.9, 0.5, 0.2]) @ axes.T + normal(generator, 5)


def spectrum(x):
    """Mean, variances and principal axes by the singular values of the centred data."""
    _, s, axes = np.linalg.svd(x.numpy() - x.numpy().mean(0), full_matrices=False)
    return x.numpy().mean(0), s**2 / len(x), axes


def bound_of(x, weight, bias, var, mean, root, beta=1.0):
    """The mean β-ELBO, written with torch.distributions and a trace."""
    latent = weight.shape[1]
    fit = Normal(mean @ weight.T + bias, math.sqrt(var)).log_prob(x).sum(1).mean()
    fit = fit - (weight @ root).square().sum() / (2 * var)
    q = MultivariateNormal(mean, scale_tril=root)
    prior = MultivariateNormal(torch.zeros(latent).double(), torch.eye(latent, dtype=torch.float64))
    return fit - beta * kl_divergence(q, prior).mean()


@pytest.mark.parametrize("latent", [1, 3, 5])
@pytest.mark.parametrize("var", [0.1, 1.0, 3.0])
def test_principal_by_singular_values(latent, var, data):
    """WWᵀ = Σ_i (λ_i − σ²)₊ u_i u_iᵀ, whatever the signs of the axes, with columns in order of length; b is the mean."""
    best, (mean, variances, axes) = principal(data, latent, var), spectrum(data)
    lengths = np.maximum(variances[:latent] - var, 0)
    close(best.weight @ best.weight.T, (axes[:latent].T * lengths) @ axes[:latent])
    close(best.weight.norm(dim=0), np.sqrt(lengths))
    close(best.bias, mean)
    assert best.var == var and best.weight.shape == (5, latent)


def test_a_latent_collapses_where_its_variance_is_sigma(data):
    """Just below the variance of an axis the latent is in use, just above it is not."""
    variances = spectrum(data)[1]
    for k, threshold in enumerate(variances):
        for factor, used in ((0.999, k + 1), (1.001, k)):
            weight = principal(data, 5, factor * threshold).weight
            assert (weight.norm(dim=0) > 0).tolist() == [True] * used + [False] * (5 - used)


@pytest.mark.parametrize("beta", [1.0, 4.0])
def test_principal_maximizes_the_bound(beta, data, generator):
    """With the best q put in, the exact β-ELBO has gradient 0 in W, b and q, and is lower all around."""
    var = 0.3
    best = principal(data, 3, beta * var)
    mean, cov = best.posterior(data)
    at = [value.clone().requires_grad_() for value in (best.weight, best.bias, mean, torch.linalg.cholesky(cov))]

    def value(weight, bias, mean, root):
        return bound_of(data, weight, bias, var, mean, root, beta)

    most = value(*at)
    for slope in torch.autograd.grad(most, at):
        assert slope.tril().abs().max() < 1e-10 if slope.shape == (3, 3) else slope.abs().max() < 1e-10
    for _ in range(10):
        weight, bias = (part + 0.1 * normal(generator, *part.shape) for part in (best.weight, best.bias))
        moved = LinearGaussian(weight, bias, beta * var)
        centre, spread = moved.posterior(data)
        assert value(weight, bias, centre, torch.linalg.cholesky(spread)) < most - 1e-3
        assert value(best.weight, best.bias, mean + 0.1 * normal(generator, 400, 3), at[3]) < most - 1e-3
    if beta == 1:
        close(most, best.log_evidence(data).mean())


@pytest.mark.parametrize("beta", [1.0, 4.0])
def test_an_optimizer_finds_the_same(beta, data, generator):
    """L-BFGS from a random start, over W, b and a linear encoder, ends at the same WWᵀ; two of three axes if β is large."""
    var = 0.3
    parts = [normal(generator, 5, 3), normal(generator, 5), 0.1 * normal(generator, 3, 5), torch.eye(3).double()]
    parts = [part.requires_grad_() for part in parts]
    optimizer = torch.optim.LBFGS(
        parts, max_iter=400, tolerance_grad=1e-9, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        weight, bias, rule, root = parts
        root = root.tril(-1) + root.diagonal().square().diag()
        value = -bound_of(data, weight, bias, var, (data - bias) @ rule.T, root, beta)
        value.backward()
        return value

    optimizer.step(closure)
    best, weight = principal(data, 3, beta * var), parts[0].detach()
    close(weight @ weight.T, best.weight @ best.weight.T, 1e-3)
    assert int((best.weight.norm(dim=0) > 0).sum()) == (3 if beta == 1 else 2)
