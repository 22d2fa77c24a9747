"""Flows against autograd Jacobians, typed formulas, torch.distributions and sums over grids; wrong layers are rejected."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import nn
from torch.distributions import MultivariateNormal

from dgm_course import flows
from dgm_course.flows import (
    ActNorm,
    Composed,
    Coupling,
    Flow,
    InvertibleConv,
    Logit,
    Permutation,
    Planar,
    RealNVP,
    Split,
    Squeeze,
    channel_mask,
    checkerboard,
    coupling_flow,
    dequantize,
    quantize,
    squeeze,
    unsqueeze,
)
from dgm_course.nets import ConvCoupler, perceptron


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from one seed and leaves the global random state as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def awake(module: nn.Module, std: float = 0.3) -> nn.Module:
    """The module in float64 with every parameter random: nothing is left at zero, and nothing is the identity."""
    for parameter in module.double().parameters():
        nn.init.normal_(parameter, std=std)
    return module


def normals(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def close(actual, expected, tolerance=1e-10):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(torch.as_tensor(actual).detach(), expected.detach(), rtol=tolerance, atol=tolerance)


def points(mask=(1.0, 0.0, 0.0, 1.0, 0.0)):
    mask = torch.tensor(mask)
    return Coupling(mask, perceptron(len(mask), 16, 2 * len(mask)))


def stack():
    """Every transform of points, one after the other."""
    return Composed(
        ActNorm(5), InvertibleConv(5), points(), Planar(5), Permutation([2, 0, 4, 1, 3]), Split(points((0.0, 1.0, 0.0)))
    )


def images():
    """Every transform of images, one after the other."""
    board, half = checkerboard(4, 6), squeeze(checkerboard(4, 6, 1)[None])[0]
    folded = Composed(InvertibleConv(8), ActNorm(8), Split(Coupling(channel_mask(4), ConvCoupler(4, 8, 1))))
    return Composed(
        Coupling(board, ConvCoupler(2, 8, 1)),
        Squeeze(folded),
        Permutation([1, 0]),
        Squeeze(Coupling(half.repeat(2, 1, 1), ConvCoupler(8, 8, 1))),
        Logit(1e-6),
    )


# How to make it, the shape of one sample, and whether data lie in [0, 1].
TRANSFORMS = {
    "ActNorm of points": (lambda: ActNorm(3), (3,), False),
    "ActNorm of images": (lambda: ActNorm(2), (2, 3, 5), False),
    "InvertibleConv of points": (lambda: InvertibleConv(3), (3,), False),
    "InvertibleConv of images": (lambda: InvertibleConv(3), (3, 2, 3), False),
    "Permutation of points": (lambda: Permutation([2, 0, 3, 1]), (4,), False),
    "Permutation of images": (lambda: Permutation([2, 0, 1]), (3, 2, 3), False),
    "Planar": (lambda: Planar(3), (3,), False),
    "Coupling of points": (points, (5,), False),
    "Coupling, checkerboard": (lambda: Coupling(checkerboard(3, 5), ConvCoupler(2, 8, 1)), (2, 3, 5), False),
    "Coupling, channels": (lambda: Coupling(channel_mask(3, 1), ConvCoupler(3, 8, 1)), (3, 2, 2), False),
    "Squeeze": (lambda: Squeeze(Coupling(channel_mask(4), ConvCoupler(4, 8, 1))), (1, 4, 6), False),
    "Split of points": (lambda: Split(points((1.0, 0.0, 1.0))), (5,), False),
    "Split of images": (lambda: Split(InvertibleConv(2)), (4, 2, 3), False),
    "Logit of points": (lambda: Logit(0.01), (3,), True),
    "Logit of images": (lambda: Logit(), (1, 2, 3), True),
    "composition of points": (stack, (5,), False),
    "composition of images": (images, (2, 4, 6), True),
    "coupling_flow": (lambda: coupling_flow(3, depth=4, width=16).transform, (3,), False),
    "RealNVP": (lambda: RealNVP(4, widths=(8, 8), blocks=1, couplings=(2, 2, 2)).transform, (1, 4, 4), True),
}  # fmt: skip
all_transforms = pytest.mark.parametrize("name", TRANSFORMS)


def made(name, batch=3):
    """The transform with random parameters, noise z, and data x that have nothing to do with z."""
    make, shape, bounded = TRANSFORMS[name]
    z = normals(batch, *shape).clamp(-2.5, 2.5)
    return (
        awake(make(), 0.1 if len(shape) == 3 else 0.3),
        z,
        normals(batch, *shape).sigmoid() if bounded else normals(batch, *shape),
    )


def jacobian(function, point):
    """∂ result/∂ argument of one sample, by autograd, as a square matrix."""
    rows = torch.func.jacrev(lambda flat: function(flat.reshape(1, *point.shape))[0].flatten())(point.flatten())
    return rows.detach()


def is_invertible(transform, z, x, tolerance=1e-10):
    """Either direction undoes the other, and the two log-determinants sum to 0."""
    for function, back, start in ((transform, transform.inverse, z), (transform.inverse, transform, x)):
        result, log_det = function(start)
        again, log_det_back = back(result)
        assert result.shape == again.shape == start.shape and log_det.shape == log_det_back.shape == (len(start),)
        close(again, start, tolerance)
        close(log_det + log_det_back, torch.zeros(len(start)), tolerance)


def knows_its_volume(transform, z, x, tolerance=1e-10):
    """In either direction the log-determinant is that of the full Jacobian of the map that is computed."""
    for function, start in ((transform, z), (transform.inverse, x)):
        expected = [torch.linalg.slogdet(jacobian(function, one)).logabsdet for one in start]
        close(function(start)[1], torch.stack(expected), tolerance)


# All transforms


@all_transforms
@pytest.mark.parametrize("batch", [1, 3])
def test_there_and_back(name, batch):
    """Forward undoes inverse and inverse undoes forward, to 1e-10."""
    is_invertible(*made(name, batch))


@all_transforms
@pytest.mark.parametrize("batch", [1, 3])
def test_log_determinants(name, batch):
    """Those of both directions, against the full Jacobian."""
    knows_its_volume(*made(name, batch))


@all_transforms
def test_samples_do_not_meet(name):
    """What a sample becomes, and its log-determinant, do not depend on the others in the batch."""
    transform, z, x = made(name)
    for function, start in ((transform, z), (transform.inverse, x)):
        together, alone = function(start), [function(one[None]) for one in start]
        for part in (0, 1):
            close(together[part], torch.cat([one[part] for one in alone]))


@all_transforms
def test_gradients(name):
    """In both directions the gradient reaches every parameter and the argument, and is what finite differences give."""
    transform, z, x = made(name)
    for function, start in ((transform, z), (transform.inverse, x)):
        weights = normals(*start.shape)

        def value(function=function, start=start, weights=weights):
            result, log_det = function(start)
            return (weights * result).sum() + log_det.square().sum()

        start.requires_grad_()
        inputs = {**dict(transform.named_parameters()), "the argument": start}
        gradients = torch.autograd.grad(value(), list(inputs.values()))
        for (label, parameter), gradient in zip(inputs.items(), gradients, strict=True):
            assert gradient.abs().max() > 0, label
            along, step = torch.randn_like(parameter), 1e-5
            with torch.no_grad():
                parameter += step * along
                up = value()
                parameter -= 2 * step * along
                slope = (up - value()) / (2 * step)
                parameter += step * along
            assert slope.item() == pytest.approx((gradient * along).sum().item(), rel=1e-5, abs=1e-6), label
        start.requires_grad_(False)


@pytest.mark.parametrize("name", ["composition of points", "composition of images", "RealNVP"])
def test_float32(name):
    """In single precision the way there and back costs some digits and no more."""
    transform, z, _ = made(name)
    transform, z = transform.float(), z.float()
    x, log_det = transform(z)
    again, back = transform.inverse(x)
    assert x.dtype == log_det.dtype == back.dtype == torch.float32
    torch.testing.assert_close(again, z, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(log_det, -back, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["Coupling of points", "Coupling, checkerboard", "InvertibleConv of images"])
def test_under_autocast(name):
    """With networks in bfloat16 a layer is still undone in float32: both directions get the same s and t."""
    transform, z, _ = made(name)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        x, log_det = transform.float()(z.float())
        again, back = transform.inverse(x)
    assert x.dtype == log_det.dtype == torch.float32
    torch.testing.assert_close(again, z.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_det, -back, rtol=1e-5, atol=1e-5)


# Each transform's own equation


def test_affine():
    """x = z·e^s + t and Σ s by numpy, with s and t that broadcast; the inverse solves for z."""
    z, s, t = normals(3, 2, 4), normals(2, 1), normals(3, 2, 4)
    x, log_det = flows.affine(z, s, t)
    np.testing.assert_allclose(x, z.numpy() * np.exp(s.numpy()) + t.numpy(), rtol=1e-12)
    close(log_det, 4 * s.sum().expand(3))
    again, back = flows.affine_inverse(x, s, t)
    close(again, z)
    close(back, -4 * s.sum().expand(3))


def test_coupling_by_hand():
    """What the mask keeps stays, the rest is z·e^s + t with s squashed by hand, value by value."""
    mask, limit = torch.tensor([1.0, 0.0, 1.0, 0.0]), 0.7
    net = awake(perceptron(4, 8, 8), std=1.0)
    layer, z = Coupling(mask, net, limit).double(), normals(5, 4)
    x, log_det = layer(z)
    raw = net(torch.stack([z[:, 0], 0 * z[:, 1], z[:, 2], 0 * z[:, 3]], 1)).detach()
    for row in range(5):
        total = 0.0
        for i in (1, 3):
            s = raw[row, i].item() / (1 + abs(raw[row, i].item()) / limit)
            assert x[row, i].item() == pytest.approx(z[row, i].item() * math.exp(s) + raw[row, 4 + i].item(), rel=1e-12)
            total += s
        assert torch.equal(x[row, [0, 2]], z[row, [0, 2]])
        assert log_det[row].item() == pytest.approx(total, rel=1e-12)


def test_scales_are_limited():
    """A network that asks for e^{±10⁶} gets 1000 and 1/1000, and the layer can still be undone."""
    mask = torch.tensor([1.0, 0.0, 0.0])
    layer = Coupling(mask, lambda kept: torch.tensor([[0.0, 1e6, -1e6, 0.0, 1.0, 1.0]]).double().expand(len(kept), -1))
    z = torch.ones(2, 3, dtype=torch.float64)
    x, _ = layer.double()(z)
    close(x, torch.tensor([[1.0, 1001.0, 1.001]]).expand(2, -1), 1e-4)
    close(layer.inverse(x)[0], z)


def test_composition_has_the_order_of_the_docstring():
    """The first transform is the one next to the noise."""
    double, add = ActNorm(1).double(), ActNorm(1).double()
    nn.init.constant_(double.log_scale, math.log(2))
    nn.init.constant_(add.shift, 1.0)
    close(Composed(double, add)(torch.full((1, 1), 3.0, dtype=torch.float64))[0], [[7.0]])
    close(Composed(add, double)(torch.full((1, 1), 3.0, dtype=torch.float64))[0], [[8.0]])


def test_planar_stays_invertible():
    """wᵀû = softplus(wᵀu) − 1 > −1 however u is drawn, and û − u is along w."""
    for _ in range(50):
        layer = awake(Planar(4), std=2.0)
        raw, w, u = layer.raw.detach(), layer.w.detach(), layer.u.detach()
        assert (u @ w).item() == pytest.approx(math.log1p(math.exp(raw @ w)) - 1, abs=1e-8)
        across = normals(4)
        across -= (across @ w) / (w @ w) * w
        close((u - raw) @ across, 0.0)


@pytest.mark.parametrize("shape", [(4,), (4, 3, 5)])
def test_actnorm_initialization(shape):
    """Afterwards the first batch has mean 0 and deviation 1 in each channel, and s and t are those of numpy."""
    x = normals(51, *shape) * torch.tensor([1.0, 5.0, 0.1, 2.0]).reshape(-1, *[1] * (len(shape) - 1)) + 3
    layer = ActNorm(4).double()
    z = layer.initialize(x)
    rows = np.moveaxis(x.numpy(), 1, -1).reshape(-1, 4)
    close(layer.shift, torch.from_numpy(rows.mean(0)))
    close(layer.log_scale, torch.from_numpy(np.log(rows.std(0, ddof=0))))
    close(z, layer.inverse(x)[0])
    whitened = np.moveaxis(z.numpy(), 1, -1).reshape(-1, 4)
    np.testing.assert_allclose(whitened.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(whitened.std(0, ddof=0), 1, atol=1e-12)
    assert layer.shift.requires_grad and not z.requires_grad


def test_a_constant_channel_is_finite():
    """A channel of one value, as in the corner of every digit, gives no infinite scale."""
    layer = ActNorm(2).double()
    z = layer.initialize(torch.tensor([[1.0, 2.0], [1.0, 4.0]], dtype=torch.float64))
    assert bool(z.isfinite().all()) and bool(layer.log_scale.isfinite().all())


@pytest.mark.parametrize("name", ["composition of points", "composition of images", "RealNVP"])
def test_initialization_goes_through_a_composition(name):
    """Each normalization is set by what comes to it on the way to noise: there it makes its first batch standard."""
    transform, _, x = made(name, batch=41)
    seen = []
    for module in transform.modules():
        if isinstance(module, ActNorm):
            inverse = module.inverse
            module.inverse = lambda x, inverse=inverse: seen.append(inverse(x)[0]) or inverse(x)
    z = transform.initialize(x)
    close(transform.inverse(x)[0], z)
    assert len(seen) >= 2  # once while it is set, once in the line above
    for values in seen:
        rows = values.detach().movedim(1, -1).flatten(0, -2).numpy()
        np.testing.assert_allclose(rows.mean(0), 0, atol=1e-10)
        np.testing.assert_allclose(rows.std(0, ddof=0), 1, atol=1e-10)


def test_new_flows():
    """A new coupling flow is the identity; a new RealNVP is the logit alone, whose density has a closed form."""
    x = normals(5, 3)
    z, log_det = coupling_flow(3).double().transform.inverse(x)
    assert torch.equal(z, x) and not log_det.any()
    y = normals(2, 1, 8, 8).sigmoid()
    inside = 1e-5 + (1 - 2e-5) * y
    z = (inside / (1 - inside)).log()
    slope = (1 - 2e-5) / (inside * (1 - inside))
    expected = torch.from_numpy(norm.logpdf(z.numpy())) + slope.log()
    close(RealNVP(8, widths=(8, 8), blocks=1).double().log_prob(y), expected.flatten(1).sum(1))


def test_invertible_conv_starts_orthogonal(generator):
    """WWᵀ = I, so volume stays; a generator makes it repeatable."""
    weight = InvertibleConv(6, generator).weight
    close(weight.double() @ weight.double().T, torch.eye(6), 1e-5)
    again = InvertibleConv(6, torch.Generator().manual_seed(generator.initial_seed())).weight
    assert torch.equal(weight, again)


# Masks, folding, grey levels


@pytest.mark.parametrize("height, width", [(1, 1), (2, 3), (5, 4)])
def test_checkerboard(height, width):
    """Neighbours differ, and the other parity is the complement."""
    for parity in (0, 1):
        mask = checkerboard(height, width, parity)
        assert mask.shape == (1, height, width)
        for row in range(height):
            for column in range(width):
                assert mask[0, row, column] == float((row + column + parity) % 2 == 0)
    assert torch.equal(checkerboard(height, width) + checkerboard(height, width, 1), torch.ones(1, height, width))


def test_a_folded_checkerboard_is_a_channel_mask():
    """Of each 2×2 pixels two on a diagonal stay: after `squeeze` these are two whole channels."""
    for parity, channels in ((0, [1.0, 0.0, 0.0, 1.0]), (1, [0.0, 1.0, 1.0, 0.0])):
        folded = squeeze(checkerboard(6, 8, parity)[None])[0]
        assert torch.equal(folded, torch.tensor(channels)[:, None, None].expand(4, 3, 4))


@pytest.mark.parametrize("channels, first", [(1, 1), (4, 2), (5, 3)])
def test_channel_mask(channels, first):
    """The first half, rounded up, or the rest."""
    assert channel_mask(channels).shape == (channels, 1, 1)
    assert channel_mask(channels).flatten().tolist() == [1.0] * first + [0.0] * (channels - first)
    assert channel_mask(channels, 1).flatten().tolist() == [0.0] * first + [1.0] * (channels - first)


def test_squeeze_value_by_value():
    """Channel 4c + 2i + j is pixel (2h + i, 2w + j) of channel c; nothing is lost."""
    x = normals(2, 3, 4, 6)
    folded = squeeze(x)
    for c, i, j in ((c, i, j) for c in range(3) for i in range(2) for j in range(2)):
        assert torch.equal(folded[:, 4 * c + 2 * i + j], x[:, c, i::2, j::2])
    assert torch.equal(unsqueeze(folded), x)


@pytest.mark.parametrize("levels", [2, 3, 16, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_grey_level_comes_back(levels, dtype):
    """Level k is spread over [k/L, (k + 1)/L), and found again from every part of it."""
    k = torch.arange(levels, dtype=dtype)
    x = k / (levels - 1) * 2 - 1
    for u in (0.0, 0.25, 0.5, 0.999):
        y = dequantize(x, torch.full_like(x, u), levels)
        torch.testing.assert_close(y, (k + u) / levels)
        torch.testing.assert_close(quantize(y, levels), x, rtol=0, atol=1e-6)
    assert quantize(torch.tensor([-3.0, 1.0, 7.0]), levels).tolist() == [-1.0, 1.0, 1.0]


def test_no_image_no_trouble():
    """An empty batch stays one."""
    empty = torch.zeros(0, 1, 4, 4)
    assert dequantize(empty, empty).shape == quantize(empty).shape == empty.shape


# Densities


def whole(flow, reach, steps):
    """∫ p over the square [−reach, reach]², by the trapezoid rule."""
    axis = torch.linspace(-reach, reach, steps, dtype=torch.float64)
    with torch.no_grad():
        return flow.log_prob(torch.cartesian_prod(axis, axis)).exp().sum().item() * (axis[1] - axis[0]).item() ** 2


@pytest.mark.parametrize("flow, reach, steps", [
    (lambda: awake(coupling_flow(2, depth=4, width=16)), 12.0, 500),
    (lambda: awake(Flow(Composed(Planar(2), Planar(2), Planar(2)), (2,)), std=1.0), 16.0, 500),
    (lambda: awake(Flow(Composed(Planar(2), InvertibleConv(2), ActNorm(2)), (2,)), std=0.8), 25.0, 800),
], ids=["couplings", "Planar", "mixed"])  # fmt: skip
def test_densities_integrate_to_one(flow, reach, steps):
    """A density in the plane sums to 1 over a grid, whatever the parameters."""
    assert whole(flow(), reach, steps) == pytest.approx(1, abs=1e-6)


def test_a_trained_density_integrates_to_one():
    """Training changes the shape of a density and not its mass; it comes near that of the data, which is known."""
    cov = torch.tensor([[1.0, 0.8], [0.8, 1.0]], dtype=torch.float64)
    truth = MultivariateNormal(torch.tensor([1.0, -1.0], dtype=torch.float64), cov)
    flow = coupling_flow(2, depth=4, width=16).double()
    optimizer = torch.optim.Adam(flow.parameters(), 1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        (-flow.log_prob(truth.sample((256,))).mean()).backward()
        optimizer.step()
    assert whole(flow, 9.0, 400) == pytest.approx(1, abs=1e-5)
    x = truth.sample((4000,))
    assert (truth.log_prob(x) - flow.log_prob(x)).mean().item() < 0.05  # KL, from 1.5 at the start


def test_a_linear_flow_is_the_normal_it_is():
    """x = e^s ⊙ Wz + t is normal with mean t and covariance AAᵀ, A = diag(e^s)W: for points, and for each pixel."""
    mix, scale = awake(InvertibleConv(3), std=1.0), awake(ActNorm(3))
    a = scale.log_scale.exp().detach().diag() @ mix.weight.detach()
    truth = MultivariateNormal(scale.shift.detach(), a @ a.T)
    x = normals(7, 3)
    close(Flow(Composed(mix, scale), (3,)).log_prob(x), truth.log_prob(x))
    x = normals(7, 3, 2, 4)
    pixels = truth.log_prob(x.movedim(1, -1)).sum((1, 2))
    close(Flow(Composed(mix, scale), (3, 2, 4)).log_prob(x), pixels)


def test_realnvp_density():
    """log p(x) is the normal's at z plus log|det ∂z/∂x| of the full 16×16 Jacobian."""
    flow = awake(RealNVP(4, widths=(8, 8), blocks=1, couplings=(3, 2, 2)))
    x = normals(3, 1, 4, 4).sigmoid()
    for one in x:
        z = flow.transform.inverse(one[None])[0].detach()
        expected = norm.logpdf(z.numpy()).sum() + torch.linalg.slogdet(jacobian(flow.transform.inverse, one)).logabsdet
        close(flow.log_prob(one[None]), expected[None])


def test_realnvp_mixes_every_pixel():
    """Each number of noise depends on more than one pixel, and each pixel on noise of both scales."""
    flow = awake(RealNVP(4, widths=(8, 8), blocks=1))
    matrix = jacobian(flow.transform.inverse, normals(1, 4, 4).sigmoid()).abs() > 1e-12
    assert matrix.sum(0).min() > 8 and matrix.sum(1).min() > 8


def test_samples(generator):
    """A sample is the transform of temperature · noise, repeatable, without a gradient, of the dtype of the flow."""
    flow = awake(coupling_flow(3, depth=2, width=8))
    seed = generator.initial_seed()
    for temperature in (1.0, 0.6, 0.0):
        noise = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        drawn = flow.sample(5, temperature, torch.Generator().manual_seed(seed))
        assert torch.equal(drawn, flow.transform(temperature * noise)[0]) and not drawn.requires_grad
    assert not torch.equal(flow.sample(5, generator=generator), flow.sample(5, generator=generator))
    assert flow.float().sample(2).dtype == torch.float32


def test_samples_have_the_moments(generator):
    """50,000 samples of a linear flow have its mean and covariance; at temperature 1/2, a quarter of the covariance."""
    mix, scale = awake(InvertibleConv(2), std=1.0), awake(ActNorm(2))
    a = scale.log_scale.exp().detach().diag() @ mix.weight.detach()
    for temperature in (1.0, 0.5):
        x = Flow(Composed(mix, scale), (2,)).sample(50_000, temperature, generator)
        close(x.mean(0), scale.shift, 0.05)
        close(x.T.cov(), temperature**2 * a @ a.T, 0.05)


def test_a_flow_without_parameters_draws_samples():
    """Logit alone: sigmoids of normals, whose median is 1/2."""
    x = Flow(Logit(1e-6), (1,)).sample(4000, generator=torch.Generator().manual_seed(0))
    assert x.shape == (4000, 1) and x.median().item() == pytest.approx(0.5, abs=0.03)


# The bound of dequantization ------------------------------------------------------------------------------------------
# Two pixels with L = 4 levels. Their density is that of a sigmoid of a normal, so P of each pair of levels is known.

LEVELS, CENTRE, SPREAD, MARGIN = 4, (0.4, -0.5), (1.2, 0.9), 0.05


def two_pixels():
    layer = ActNorm(2).double()
    with torch.no_grad():
        layer.shift.copy_(torch.tensor(CENTRE, dtype=torch.float64))
        layer.log_scale.copy_(torch.tensor(SPREAD, dtype=torch.float64).log())
    return Flow(Composed(layer, Logit(MARGIN)), (2,))


def known_probability(levels):
    """P(k) as a product of differences of normal distribution functions."""
    probability = 1.0
    for k, centre, spread in zip(levels, CENTRE, SPREAD, strict=True):
        inside = MARGIN + (1 - 2 * MARGIN) * np.array([k, k + 1]) / LEVELS
        low, high = norm.cdf((np.log(inside / (1 - inside)) - centre) / spread)
        probability *= high - low
    return probability


def quadrature(order=60):
    """Noise u on a grid in the unit square, and weights that sum to 1."""
    nodes, weights = np.polynomial.legendre.leggauss(order)
    nodes, weights = torch.from_numpy((nodes + 1) / 2), torch.from_numpy(weights / 2)
    return torch.cartesian_prod(nodes, nodes), torch.cartesian_prod(weights, weights).prod(1)


def is_a_bound(bound):
    """Over all pairs of levels: at most log P, and not far from it; so what it promises sums to at most 1."""
    total = 0.0
    for levels in ((i, j) for i in range(LEVELS) for j in range(LEVELS)):
        value, probability = bound(two_pixels(), levels), known_probability(levels)
        assert math.log(probability) - 1.0 < value < math.log(probability)
        total += math.exp(value)
    assert 0.8 < total < 1


def grey(levels):
    return (torch.tensor([levels], dtype=torch.float64) / (LEVELS - 1)) * 2 - 1


def our_bound(flow, levels):
    """E_u[log p(y)] − D log L, by quadrature."""
    noise, weights = quadrature()
    y = dequantize(grey(levels).expand(len(noise), 2), noise, LEVELS)
    return (weights * flow.log_prob(y)).sum().item() - 2 * math.log(LEVELS)


def no_levels(flow, levels):
    """The density of the noisy image taken for the probability of the image."""
    return our_bound(flow, levels) + 2 * math.log(LEVELS)


def one_dimension(flow, levels):
    """log L once and not for every pixel."""
    return our_bound(flow, levels) + math.log(LEVELS)


def added_levels(flow, levels):
    return our_bound(flow, levels) + 4 * math.log(LEVELS)


def no_noise(flow, levels):
    """The density at the lower corner of the cell, as if a density were a probability."""
    return flow.log_prob(
        dequantize(grey(levels), torch.zeros(1, 2, dtype=torch.float64), LEVELS)
    ).item() - 2 * math.log(LEVELS)


def noise_of_two_levels(flow, levels):
    """Noise that reaches into the next level's cell."""
    noise, weights = quadrature()
    y = ((torch.tensor(levels) + 2 * noise) / LEVELS).clamp(max=1)
    return (weights * flow.log_prob(y)).sum().item() - 2 * math.log(LEVELS)


def test_cells_hold_what_is_known():
    """∫ p over a level's cell, by quadrature, is P in closed form; over all cells it is what lies within [0, 1]²."""
    noise, weights = quadrature()
    for levels in ((0, 0), (1, 3), (2, 1)):
        y = dequantize(grey(levels).expand(len(noise), 2), noise, LEVELS)
        cell = (weights * two_pixels().log_prob(y).exp()).sum().item() / LEVELS**2
        assert cell == pytest.approx(known_probability(levels), rel=1e-8)


def test_dequantization_gives_a_bound():
    """E_u[log p(y)] − D log L ≤ log P(k), on every pair of levels."""
    is_a_bound(our_bound)


@pytest.mark.parametrize("wrong", [no_levels, one_dimension, added_levels, no_noise, noise_of_two_levels])
def test_wrong_bounds_are_rejected(wrong):
    """The same check turns down the bounds that people really write."""
    with pytest.raises(AssertionError):
        is_a_bound(wrong)


# Layers that public code really had, turned down by the checks above --------------------------------------------------


class FlippedForward(Coupling):
    """normalizing-flows#27: the log-determinant of the other direction."""

    def forward(self, z):
        x, log_det = super().forward(z)
        return x, -log_det


class FlippedInverse(Coupling):
    def inverse(self, x):
        z, log_det = super().inverse(x)
        return z, -log_det


class FlippedBoth(Coupling):
    """Wrong twice: the two still sum to 0, and only the Jacobian tells."""

    def forward(self, z):
        x, log_det = super().forward(z)
        return x, -log_det

    def inverse(self, x):
        z, log_det = super().inverse(x)
        return z, -log_det


class ScaleForShift(Coupling):
    """pyro#2084: one network in the place of another, and only on the way back."""

    def inverse(self, x):
        log_scale, _ = self.parameters_of(self.mask * x)
        return flows.affine_inverse(x, log_scale, log_scale)


class SeesEverything(Coupling):
    """The network sees also what is to be changed: on the way back it does not know it."""

    def forward(self, z):
        return flows.affine(z, *self.parameters_of(z))

    def inverse(self, x):
        return flows.affine_inverse(x, *self.parameters_of(x))


class CountsKeptValues(Coupling):
    """Σ s over all values, with scales for the kept ones that are not applied."""

    def forward(self, z):
        raw = self.net(self.mask * z).chunk(2, dim=1)[0]
        return super().forward(z)[0], (raw / (1 + raw.abs() / self.limit)).sum(1)


class EvenOdd(flows.Transform):
    """pytorch-normalizing-flows#5: split into even and odd coordinates, joined again as first and second half."""

    def __init__(self, dim, joined=torch.cat):
        super().__init__()
        self.net, self.joined = perceptron((dim + 1) // 2, 8, 2 * (dim // 2)), joined

    def forward(self, z):
        kept, moved = z[:, ::2], z[:, 1::2]
        s, t = self.net(kept).chunk(2, 1)
        return self.joined([kept, moved * s.exp() + t], 1), s.sum(1)

    def inverse(self, x):
        kept, moved = x[:, ::2], x[:, 1::2]
        s, t = self.net(kept).chunk(2, 1)
        return self.joined([kept, (moved - t) * (-s).exp()], 1), -s.sum(1)


def interleaved(parts, dim):
    out = parts[0].new_empty(len(parts[0]), sum(part.shape[1] for part in parts))
    out[:, ::2], out[:, 1::2] = parts
    return out


class NormNotSquared(Planar):
    """tonyduan/normalizing-flows#2: û = u + (softplus(wᵀu) − 1 − wᵀu)·w/‖w‖."""

    @property
    def u(self):
        along = self.raw @ self.w
        return self.raw + (nn.functional.softplus(along) - 1 - along) * self.w / self.w.norm()


class NoPositions(InvertibleConv):
    """log|det W| once, and not for each of H·W positions."""

    def _log_det(self, x):
        return torch.linalg.slogdet(self.weight).logabsdet.expand(len(x))


class NoSquash(Planar):
    """1 + uᵀw: the slope of tanh is forgotten."""

    def forward(self, z):
        return super().forward(z)[0], torch.log1p(self.u @ self.w).expand(len(z))


class PlainLogit(Logit):
    """The log-determinant of the sigmoid alone, without that of the margin."""

    def _log_det(self, z):
        return super()._log_det(z) + z[0].numel() * math.log(1 - 2 * self.margin)


def is_a_layer(layer, shape=(5,), bounded=False):
    """What every transform above must pass."""
    z, x = normals(3, *shape), normals(3, *shape)
    x = x.sigmoid() if bounded else x
    with torch.no_grad():
        is_invertible(layer, z, x)
    knows_its_volume(layer, z, x)


def coupler(cls):
    mask = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0])
    return cls(mask, perceptron(5, 16, 10))


def narrow(cls):
    """A ridge with a short w, where the norm and its square are far apart."""
    layer = cls(2).double()
    with torch.no_grad():
        layer.raw.copy_(torch.tensor([-8.0, 1.0]))
        layer.w.copy_(torch.tensor([0.5, 0.1]))
    return layer


LAYERS = {
    "interleaved even and odd": (lambda: awake(EvenOdd(5, interleaved)), (5,), False),
    "concatenated, of two": (lambda: awake(EvenOdd(2)), (2,), False),
    "narrow Planar": (lambda: narrow(Planar), (2,), False),
    "without positions, of points": (lambda: awake(NoPositions(3)), (3,), False),
}
WRONG_LAYERS = {
    "sign flipped forward": (lambda: awake(coupler(FlippedForward)), (5,), False),
    "sign flipped in the inverse": (lambda: awake(coupler(FlippedInverse)), (5,), False),
    "sign flipped in both": (lambda: awake(coupler(FlippedBoth)), (5,), False),
    "scale for shift on the way back": (lambda: awake(coupler(ScaleForShift)), (5,), False),
    "network sees what changes": (lambda: awake(coupler(SeesEverything)), (5,), False),
    "scales of kept values counted": (lambda: awake(coupler(CountsKeptValues)), (5,), False),
    "even and odd, concatenated": (lambda: awake(EvenOdd(5)), (5,), False),
    "norm, not squared": (lambda: narrow(NormNotSquared), (2,), False),
    "slope of tanh forgotten": (lambda: awake(NoSquash(2)), (2,), False),
    "1×1 without positions": (lambda: awake(NoPositions(3)), (3, 2, 2), False),
    "margin not in the log-determinant": (lambda: PlainLogit().double(), (3,), True),
}


@pytest.mark.parametrize("name", LAYERS)
def test_right_layers_are_accepted(name):
    """Layers typed like the wrong ones, and wrong ones where they happen to be right: dimension 2, or no positions."""
    make, shape, bounded = LAYERS[name]
    is_a_layer(make(), shape, bounded)


@pytest.mark.parametrize("name", WRONG_LAYERS)
def test_wrong_layers_are_rejected(name):
    """What accepts every transform of the package rejects these."""
    make, shape, bounded = WRONG_LAYERS[name]
    with pytest.raises(AssertionError):
        is_a_layer(make(), shape, bounded)


# What a layer must be beyond invertible. A kernel takes z and linear maps A, B of the first value to s and t of the second.


def is_the_coupling_of_the_slide(kernel, z):
    """x_1 = z_1, x_2 = z_2·e^{A z_1} + B z_1, log-determinant A z_1, by numpy."""
    a, b = 0.7, -1.3
    x, log_det = kernel(z, a, b)
    first, second = z.numpy().T
    np.testing.assert_allclose(x, np.stack([first, second * np.exp(a * first) + b * first], 1), atol=1e-6)
    np.testing.assert_allclose(log_det, a * first, atol=1e-6)


def our_coupling(z, a, b):
    mask = torch.tensor([1.0, 0.0])
    weights = torch.tensor([[0.0, 0.0], [a, 0.0], [0.0, 0.0], [b, 0.0]]).double()
    return Coupling(mask, lambda kept: kept @ weights.T, limit=math.inf).double()(z)


WRONG_COUPLINGS = {
    "identity": lambda z, a, b: (z, z.new_zeros(len(z))),
    "scale for shift": lambda z, a, b: our_coupling(z, a, a),
    "shift for scale": lambda z, a, b: our_coupling(z, b, b),
    "swapped": lambda z, a, b: our_coupling(z, b, a),
    "s and not e^s": lambda z, a, b: (
        torch.stack([z[:, 0], z[:, 1] * a * z[:, 0] + b * z[:, 0]], 1),
        a * z[:, 0],
    ),
    "shift before scale": lambda z, a, b: (
        torch.stack([z[:, 0], (z[:, 1] + b * z[:, 0]) * (a * z[:, 0]).exp()], 1),
        a * z[:, 0],
    ),
}


def test_our_coupling_is_that_of_the_slide():
    is_the_coupling_of_the_slide(our_coupling, normals(7, 2))


@pytest.mark.parametrize("name", WRONG_COUPLINGS)
def test_wrong_couplings_are_rejected(name):
    """Layers that are invertible, with the right log-determinant of the wrong map, among them."""
    with pytest.raises(AssertionError):
        is_the_coupling_of_the_slide(WRONG_COUPLINGS[name], normals(7, 2))


@pytest.mark.parametrize("name", WRONG_COUPLINGS)
def test_zeros_tell_nothing(name):
    """At z = 0 every one of them passes the very same check, the identity too: a test that feeds zeros tests nothing."""
    is_the_coupling_of_the_slide(WRONG_COUPLINGS[name], torch.zeros(7, 2, dtype=torch.float64))


# Messages


def test_arguments_are_checked():
    """What does not fit is refused, and named."""
    half, two = torch.tensor([1.0, 0.5]), torch.tensor([1.0, 0.0])
    x = torch.zeros(2, 2)
    grey_levels = r"^x must hold 2 grey levels in \[−1, 1\]"
    cases = [
        ("^mask must hold 0 and 1 only; got values from 0.5 to 1", lambda: Coupling(half, perceptron(2, 4))),
        (r"^net must return twice the channels of \(2, 2\); got shape \(2, 3\)", lambda: Coupling(two, perceptron(2, 3))(x)),
        (r"^net must return twice the channels", lambda: Coupling(two, perceptron(2, 3)).inverse(x)),
        (r"^order must hold each of 0 … 1 once; got \[0, 0\]", lambda: Permutation([0, 0])),
        (r"^order must hold each of 0 … 2 once; got \[1, 2, 3\]", lambda: Permutation([1, 2, 3])),
        ("^margin must lie between 0 and 1/2; got 0", lambda: Logit(0)),
        ("^margin must lie between 0 and 1/2; got 0.5", lambda: Logit(0.5)),
        (r"^x must lie in \[0, 1\]; got values from -0.1 to 1", lambda: Logit().inverse(torch.tensor([[-0.1, 1.0]]))),
        (r"^x must lie in \[0, 1\]; got values from nan", lambda: Logit().inverse(torch.tensor([[math.nan]]))),
        (r"^x must have shape \(B, 2\); got \(2, 3\)", lambda: coupling_flow(2).log_prob(torch.zeros(2, 3))),
        (r"^x must have shape \(B, 1, 8, 8\); got \(1, 8, 8\)", lambda: RealNVP(8).log_prob(torch.zeros(1, 8, 8))),
        ("^side must be a multiple of 4; got 6", lambda: RealNVP(6)),
        ("^dim must be at least 2, as one coordinate must stay; got 1", lambda: coupling_flow(1)),
        (r"^noise must have the shape of x, \(2, 2\); got \(2,\)", lambda: dequantize(x - 1, torch.zeros(2), 2)),
        (r"^noise must lie in \[0, 1\); got values from 1 to 1", lambda: dequantize(x - 1, torch.ones(2, 2), 2)),
        (r"^noise must lie in \[0, 1\); got values from -1 to -1", lambda: dequantize(x - 1, x - 1, 2)),
        (grey_levels, lambda: dequantize(x + 0.3, x, 2)),
        (grey_levels, lambda: dequantize(x + 3, x, 2)),
        (grey_levels, lambda: dequantize(x - 3, x, 2)),
        (grey_levels, lambda: dequantize(x * math.nan, x, 2)),
    ]  # fmt: skip
    for message, call in cases:
        with pytest.raises(ValueError, match=message):
            call()


def test_the_masks_of_realnvp_take_turns():
    """Of two neighbouring couplings of a kind each changes what the other keeps, so no value stays as it is."""
    flow = RealNVP(side=8, widths=(8, 8), blocks=1, couplings=(2, 4, 6))
    masks = [module.mask for module in flow.modules() if isinstance(module, Coupling)]
    kinds = masks[:6], masks[6:10], masks[10:]  # low resolution, channels, checkerboards
    assert [len(kind) for kind in kinds] == [6, 4, 2]
    for kind in kinds:
        for one, other in itertools.pairwise(kind):
            assert torch.equal(one + other, torch.ones_like(one))
