"""The two players' losses against binary cross-entropy, quadrature with known densities, and gradients put together by hand."""

import math

import numpy as np
import pytest
import scipy.integrate
import torch
from scipy.stats import norm
from torch import nn

from dgm_course import gan
from dgm_course.gan import GAN, ConvGAN, discriminator_loss, generator_loss, gradient_penalty, optimal_logit
from dgm_course.nets import perceptron

cross_entropy = nn.functional.binary_cross_entropy_with_logits


def close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=tolerance, atol=tolerance)


def normal(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# The losses ---------------------------------------------------------------------------------------------------------


def test_discriminator_loss_is_binary_cross_entropy(generator):
    """Torch's, of real with label 1 and generated with label 0; each side is a mean, also of unequal numbers."""
    real, fake = 3 * normal(generator, 5, 1), 3 * normal(generator, 9, 1)
    expected = cross_entropy(real, torch.ones(5, 1).double()) + cross_entropy(fake, torch.zeros(9, 1).double())
    close(discriminator_loss(real, fake), expected)
    assert discriminator_loss(fake + 5, fake - 5) < discriminator_loss(fake - 5, fake + 5)


def test_generator_losses_and_their_gradients(generator):
    """E[−log D] and E[log(1 − D)]; of each logit the gradient is −(1 − D) and −D, divided by how many there are."""
    logits = (3 * normal(generator, 7, 1)).requires_grad_()
    d = 1 / (1 + (-logits.detach()).exp())
    for saturating, value, slope in ((False, -d.log(), -(1 - d)), (True, (1 - d).log(), -d)):
        loss = generator_loss(logits, saturating)
        close(loss, value.mean())
        close(torch.autograd.grad(loss, logits)[0], slope / 7)
    close(generator_loss(logits), cross_entropy(logits, torch.ones_like(logits)))


def test_a_sure_discriminator():
    """In float32 at logits of ±10,000 all is finite; of a fake that was seen through, only −log D keeps a gradient."""
    sure = torch.tensor([1e4]).requires_grad_()
    assert discriminator_loss(sure, -sure) == 0 and discriminator_loss(-sure, sure) == 2e4
    assert torch.autograd.grad(discriminator_loss(-sure, sure), sure)[0] == 2
    seen = torch.tensor([-1e4]).requires_grad_()
    for saturating, value, slope in ((False, 1e4, -1), (True, 0, 0)):
        loss = generator_loss(seen, saturating)
        assert loss == value and torch.autograd.grad(loss, seen)[0] == slope
    assert generator_loss(-seen, saturating=True) == -1e4


# The best discriminator ---------------------------------------------------------------------------------------------

P, Q = norm(0.0, 1.0), norm(1.2, 1.6)
GRID = np.linspace(-16, 18, 6801)


def densities():
    return (torch.from_numpy(law.pdf(GRID)) for law in (P, Q))


def integrated(logit):
    """L_D with its expectations as sums over a grid: one logit at a time, against none on the other side."""
    p, q = densities()
    nothing = torch.tensor([-math.inf], dtype=torch.float64)  # a generated sample of which D is 0 costs nothing
    of_real = torch.vmap(lambda one: discriminator_loss(one[None], nothing))(logit)
    of_fake = torch.vmap(lambda one: discriminator_loss(-nothing, one[None]))(logit)
    return (p * of_real + q * of_fake).sum() * (GRID[1] - GRID[0])


def test_optimal_logit_is_bayes():
    """D* = p/(p + q), and far out, where both densities are 0 in float64, it is still a number."""
    logit = optimal_logit(*(torch.from_numpy(law.logpdf(GRID)) for law in (P, Q)))
    p, q = densities()
    close(logit.sigmoid(), p / (p + q))
    far = optimal_logit(*(torch.tensor(law.logpdf(200.0)) for law in (P, Q)))
    assert P.pdf(200.0) == 0 and far.item() == pytest.approx(math.log(1.6) - 200**2 / 2 + (198.8 / 1.6) ** 2 / 2)


def test_the_least_loss_is_log_4_minus_twice_jensen_shannon():
    """By quadrature, with JS from scipy's adaptive integral of its definition."""

    def integrand(x):
        p, q = P.pdf(x), Q.pdf(x)
        return 0.5 * p * math.log(2 * p / (p + q)) + 0.5 * q * math.log(2 * q / (p + q))

    js = scipy.integrate.quad(integrand, -14, 16, points=[0.0, 1.2], epsabs=1e-13, limit=200)[0]
    logit = optimal_logit(*(torch.from_numpy(law.logpdf(GRID)) for law in (P, Q)))
    assert 0.05 < js < math.log(2)
    close(integrated(logit), math.log(4) - 2 * js, 1e-8)


def test_any_other_logit_is_worse():
    """The loss has gradient 0 at the best logit, at every point, and rises whichever way the logit is changed."""
    x = torch.from_numpy(GRID)
    logit = optimal_logit(*(torch.from_numpy(law.logpdf(GRID)) for law in (P, Q))).requires_grad_()
    least = integrated(logit)
    assert torch.autograd.grad(least, logit)[0].abs().max() < 1e-12
    logit = logit.detach()
    others = [logit + 0.1, logit - 0.1, 1.1 * logit, 0.9 * logit, -logit, 0 * logit, logit + 0.2 * torch.sin(3 * x)]
    assert all(integrated(other) > least + 1e-4 for other in others)
    close(integrated(0 * logit), math.log(4))


# The penalty --------------------------------------------------------------------------------------------------------


def test_penalty_of_known_slopes(generator):
    """‖w‖² of a linear discriminator; the mean of ‖Ax‖² for ½xᵀAx; all pixels of an image count."""
    x, w, a = normal(generator, 6, 3), normal(generator, 3), normal(generator, 3, 3)
    a = a + a.T
    close(gradient_penalty(lambda x: (x @ w)[:, None] + 2, x), (w**2).sum())
    close(gradient_penalty(lambda x: 0.5 * (x @ a * x).sum(1, keepdim=True), x), ((x @ a) ** 2).sum(1).mean())
    images = normal(generator, 4, 1, 2, 5)
    close(gradient_penalty(lambda x: x.flatten(1).pow(3).sum(1), images), (9 * images**4).sum() / 4)


def test_penalty_teaches_the_discriminator(generator):
    """Its gradient passes through a gradient: 2w for a linear one; finite differences for a network. x gets none."""
    torch.manual_seed(0)
    line, net = nn.Linear(3, 1).double(), perceptron(3, 8, 8, 1).double()
    x = normal(generator, 6, 3).requires_grad_()
    gradient_penalty(line, x).backward()
    close(line.weight.grad, 2 * line.weight.detach())
    gradient_penalty(net, x).backward()
    assert x.grad is None
    weight = net[2].weight
    direction = normal(generator, *weight.shape)
    sides = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            weight += step * direction
        sides.append(gradient_penalty(net, x).item())
        with torch.no_grad():
            weight -= step * direction
    assert (weight.grad * direction).sum().item() == pytest.approx((sides[0] - sides[1]) / 2e-5, rel=1e-6)


# Both players at once -----------------------------------------------------------------------------------------------


def side_by_side(x, m):
    """Groups of m neighbours, written with a loop."""
    return torch.stack([torch.cat([x[i + j] for j in range(m)]) for i in range(0, len(x), m)])


def players(pack):
    torch.manual_seed(0)
    return GAN(perceptron(3, 8, 2), perceptron(2 * pack, 8, 1), latent=3, pack=pack).double()


@pytest.mark.parametrize("penalty", [0.0, 3.0])
@pytest.mark.parametrize("saturating", [False, True])
@pytest.mark.parametrize("pack", [1, 2, 3])
def test_each_player_gets_the_gradient_of_its_own_loss(pack, saturating, penalty, generator):
    """The discriminator's, by torch's cross-entropy with the samples as data; the generator's, with nothing else in it."""
    both, x, z = players(pack), normal(generator, 6, 2), normal(generator, 6, 3)
    real, fake = side_by_side(x, pack), side_by_side(both.generator(z), pack)
    groups = torch.ones(6 // pack, 1, dtype=torch.float64)
    judged = cross_entropy(both.discriminator(real), groups)
    judged = judged + cross_entropy(both.discriminator(fake.detach()), 0 * groups)
    if penalty:
        steep = 0
        for one in real:
            one = one[None].clone().requires_grad_()
            steep = steep + torch.autograd.grad(both.discriminator(one).sum(), one, create_graph=True)[0].pow(2).sum()
        judged = judged + penalty / 2 * steep / len(real)
    d = both.discriminator(fake).sigmoid()
    made = (1 - d).log().mean() if saturating else -d.log().mean()
    of_judge = torch.autograd.grad(judged, list(both.discriminator.parameters()))
    of_maker = torch.autograd.grad(made, list(both.generator.parameters()))

    loss = gan.loss(both, x, z, saturating=saturating, penalty=penalty)
    close(loss, (judged + made).detach())
    loss.backward()
    for player, expected in ((both.discriminator, of_judge), (both.generator, of_maker)):
        for p, slope in zip(player.parameters(), expected, strict=True):
            assert p.requires_grad and slope.abs().max() > 0
            close(p.grad, slope)


def test_packing(generator):
    """The discriminator sees m images as m channels, real and generated ones, in their order."""
    shown = []

    class Judge(nn.Module):
        def forward(self, x):
            shown.append(x.detach())
            return x.flatten(1).sum(1, keepdim=True)

    class Maker(nn.Module):
        def forward(self, z):
            return z[:, :, None, None].expand(-1, 1, 4, 5)

    x, z = normal(generator, 6, 1, 4, 5), normal(generator, 6, 1)
    gan.loss(GAN(Maker(), Judge(), latent=1, pack=3), x, z)
    assert [seen.shape for seen in shown] == [(2, 3, 4, 5)] * 3
    for seen in shown[1:]:
        close(seen[:, :, 0, 0], z.reshape(2, 3))
    close(shown[0][1, 2], x[5, 0])
    close(shown[0][0, 1], x[1, 0])


@pytest.mark.parametrize("pack, size", [(3, 4), (2, 5), (4, 2)])
def test_a_batch_that_cannot_be_packed(pack, size, generator):
    """The error names what came and what is asked."""
    with pytest.raises(ValueError, match=rf"^x must have a multiple of pack = {pack} samples; got {size}"):
        gan.loss(players(pack), normal(generator, size, 2), normal(generator, size, 3))


def test_a_game_that_is_won(generator):
    """One optimizer for both: a generator that can only shift noise finds the mean of the data, from two units away."""
    torch.manual_seed(0)
    shift = nn.Linear(1, 1).double()
    both = GAN(shift, perceptron(1, 16, 1).double(), latent=1)
    with torch.no_grad():
        shift.weight.fill_(1.0)
        shift.bias.fill_(-2.0)
    optimizer = torch.optim.Adam(both.parameters(), lr=1e-2, betas=(0.5, 0.99))
    for _ in range(400):
        optimizer.zero_grad()
        gan.loss(both, normal(generator, 128, 1), normal(generator, 128, 1), penalty=0.5).backward()
        optimizer.step()
    assert abs(shift.bias.item()) < 0.4


# Models -------------------------------------------------------------------------------------------------------------


def test_samples(generator):
    """The generator's map of normal noise, narrower at a lower temperature; the generator of random numbers alone decides."""
    both = GAN(nn.Linear(2, 3), nn.Linear(3, 1), latent=2).double()
    w, b = both.generator.weight.detach(), both.generator.bias.detach()
    for temperature in (1.0, 0.5, 0.0):
        x = both.sample(100_000, temperature, generator)
        assert x.dtype == torch.float64 and not x.requires_grad
        close(x.mean(0), b, 0.03)
        close(torch.cov(x.T), temperature**2 * w @ w.T, 0.03)
    one, two = (both.sample(4, generator=torch.Generator().manual_seed(1)) for _ in "ab")
    assert torch.equal(one, two)


@pytest.mark.parametrize("pack", [1, 2])
def test_images(pack):
    """Shapes of the convolutional one, samples in (−1, 1), one logit for each group; the loss reaches all parameters."""
    torch.manual_seed(0)
    both, x = ConvGAN(latent=4, width=8, pack=pack), 2 * torch.rand(4, 1, 28, 28) - 1
    drawn = both.sample(3, temperature=5.0)
    assert drawn.shape == (3, 1, 28, 28) and drawn.abs().max() < 1
    assert both.discriminator(x.reshape(4 // pack, pack, 28, 28)).shape == (4 // pack, 1)
    gan.loss(both, x, torch.randn(4, 4), penalty=1.0).backward()
    for name, p in both.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and (p.grad != 0).any(), name
