"""Flows against zuko: the same weights give the same density, noise and samples, in float64 and in float32.

Where the conventions differ:
- Their flows carry data to noise, ours noise to data. So their forward is compared with our forward once by itself, where
  theirs is the way to noise, and once turned round, where both are the way to data.
- Their network sees the kept values only and gives (t, s) value by value, for the values that change. Ours sees all values,
  with zeros for those that change, and gives first every s and then every t. What ours has more stays random: it must not count.
- Their `slope` is the least scale, ours is the greatest log-scale: limit = −log(slope).
"""

import math
from functools import partial

import pytest
import torch
import zuko
from torch import nn
from zuko.distributions import DiagNormal, NormalizingFlow
from zuko.flows.coupling import GeneralCouplingTransform
from zuko.transforms import (
    ComposedTransform,
    LULinearTransform,
    MonotonicAffineTransform,
    PermutationTransform,
    RotationTransform,
)

from dgm_course.flows import Composed, Coupling, Flow, InvertibleConv, Permutation
from dgm_course.nets import perceptron

DIM, WIDTH = 5, 16
PRECISION = {torch.float64: 1e-11, torch.float32: 1e-5}
both_precisions = pytest.mark.parametrize("dtype", PRECISION, ids=["float64", "float32"])


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from one seed and leaves the global random state as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def agree(ours, theirs, dtype):
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype == dtype
        size = max(1.0, other.abs().max().item())  # rounding goes with the largest value
        torch.testing.assert_close(one, other, rtol=0, atol=PRECISION[dtype] * size)


def awake(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.25)
    return module


@torch.no_grad()
def take_weights(layer: Coupling, theirs: GeneralCouplingTransform) -> None:
    """Put the weights of their network where they belong in ours; everything else stays random."""
    kept, free = theirs.mask.nonzero().flatten(), (~theirs.mask).nonzero().flatten()
    assert torch.equal(layer.mask.bool(), theirs.mask)
    ours, other = ([part for part in net if hasattr(part, "weight")] for net in (layer.net, theirs.hyper))
    ours[0].weight[:, kept] = other[0].weight
    ours[0].bias.copy_(other[0].bias)
    for mine, its in zip(ours[1:-1], other[1:-1], strict=True):
        mine.load_state_dict(its.state_dict())
    for rows, part in ((free, 1), (len(layer.mask) + free, 0)):  # s, then t; theirs is t, s, t, s, …
        ours[-1].weight[rows] = other[-1].weight[part::2]
        ours[-1].bias[rows] = other[-1].bias[part::2]


def pair(dtype, slope=1e-3):
    """Our flow and theirs, with the same weights."""
    theirs = awake(
        zuko.flows.NICE(
            DIM,
            transforms=4,
            hidden_features=(WIDTH, WIDTH),
            activation=nn.SiLU,
            univariate=partial(MonotonicAffineTransform, slope=slope),
        )
    )
    layers = [
        Coupling(other.mask.float(), awake(perceptron(DIM, WIDTH, WIDTH, 2 * DIM)), limit=-math.log(slope))
        for other in theirs.transform.transforms
    ]
    for layer, other in zip(layers, theirs.transform.transforms, strict=True):
        take_weights(layer, other)
    return Flow(Composed(*layers), (DIM,)).to(dtype), theirs.to(dtype)


def turned(transform, base) -> NormalizingFlow:
    """Their distribution with the transform as the way from noise to data."""
    return NormalizingFlow(transform.inv, base)


def normal(dtype) -> DiagNormal:
    return DiagNormal(torch.zeros(DIM, dtype=dtype), torch.ones(DIM, dtype=dtype))


def same_flow(ours: Flow, theirs: NormalizingFlow, dtype):
    """The same density at the same points; noise, data and log-determinants in both directions; the same samples."""
    x = torch.randn(64, DIM, dtype=dtype)
    with torch.no_grad():
        agree([ours.log_prob(x)], [theirs.log_prob(x)], dtype)
        agree(ours.transform.inverse(x), theirs.transform.call_and_ladj(x), dtype)
        agree(ours.transform(x), theirs.transform.inv.call_and_ladj(x), dtype)
        torch.manual_seed(1)
        drawn, density = theirs.rsample_and_log_prob((32,))
        same = ours.sample(32, generator=torch.Generator().manual_seed(1))
        agree([same, ours.log_prob(same)], [drawn, density], dtype)


@both_precisions
@pytest.mark.parametrize("slope", [1e-3, 0.2])
def test_couplings(dtype, slope):
    """A chain of couplings as the way to data: log-density, both directions, samples."""
    ours, theirs = pair(dtype, slope)
    same_flow(ours, turned(theirs.transform(), theirs.base()), dtype)


@both_precisions
def test_nice_as_it_comes(dtype):
    """Their NICE, whose forward is the way to noise: its density is N(f(x)) + log|det| with our forward for f."""
    ours, theirs = pair(dtype)
    x = torch.randn(64, DIM, dtype=dtype)
    with torch.no_grad():
        z, log_det = ours.transform(x)
        agree([normal(dtype).log_prob(z) + log_det], [theirs().log_prob(x)], dtype)


def test_gradients():
    """The slope of the log-density, at the data and at a weight, is the same."""
    ours, theirs = pair(torch.float64)
    distribution = turned(theirs.transform(), theirs.base())
    x = torch.randn(16, DIM, dtype=torch.float64)
    layer, other = ours.transform.transforms[1], theirs.transform.transforms[1]
    free = (~other.mask).nonzero().flatten()
    gradients = []
    for density, weight in ((ours.log_prob, layer.net[-1].weight), (distribution.log_prob, other.hyper[-1].weight)):
        x = x.detach().requires_grad_()
        gradients.append(torch.autograd.grad(density(x).sum(), (x, weight)))
    (at_x, at_weight), (their_x, their_weight) = gradients
    agree([at_x, at_weight[free]], [their_x, their_weight[1::2]], torch.float64)


@both_precisions
def test_permutation(dtype):
    """x = z[:, order]."""
    order = [3, 0, 4, 2, 1]
    theirs = turned(PermutationTransform(torch.tensor(order)), normal(dtype))
    x = torch.randn(8, DIM, dtype=dtype)
    agree(Permutation(order)(x), theirs.transform.inv.call_and_ladj(x), dtype)
    agree(Permutation(order).inverse(x), theirs.transform.call_and_ladj(x), dtype)


@both_precisions
@pytest.mark.parametrize("kind", [RotationTransform, LULinearTransform])
def test_linear_maps(dtype, kind):
    """A rotation, and a product of triangular matrices with a volume of its own, as the 1×1 convolution of points."""
    theirs = kind(torch.randn(DIM, DIM, dtype=dtype) / 2 + torch.eye(DIM, dtype=dtype))
    layer = InvertibleConv(DIM).to(dtype)
    with torch.no_grad():
        layer.weight.copy_(theirs.R if kind is RotationTransform else theirs.L @ theirs.U)
    same_flow(Flow(layer, (DIM,)), turned(theirs, normal(dtype)), dtype)


@both_precisions
def test_everything_together(dtype):
    """Rotation, permutation and couplings, one after the other."""
    ours, theirs = pair(dtype)
    rotation, order = RotationTransform(torch.randn(DIM, DIM, dtype=dtype)), [1, 4, 0, 3, 2]
    mix = InvertibleConv(DIM).to(dtype)
    with torch.no_grad():
        mix.weight.copy_(rotation.R)
    together = Composed(mix, Permutation(order), *ours.transform.transforms)
    chain = ComposedTransform(rotation, PermutationTransform(torch.tensor(order)), *theirs.transform().transforms)
    same_flow(Flow(together, (DIM,)), turned(chain, normal(dtype)), dtype)
