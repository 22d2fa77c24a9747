"""Networks: shapes, what they are at the start, gradients to every parameter, labels, and the sinusoids by numpy."""

import copy

import numpy as np
import pytest
import torch
from oracles import typed_attention
from torch import nn

from dgm_course.denoisers import Denoiser
from dgm_course.nets import (
    MLP,
    Classifier,
    ConvCoupler,
    ConvDecoder,
    ConvEncoder,
    DiT,
    LabelEmbedding,
    TimeEmbedding,
    UNet,
    WeightEmbedding,
    perceptron,
)
from dgm_course.nets.dit import Attention, DiTBlock, attention_maps, positions
from dgm_course.nets.embeddings import sinusoids
from dgm_course.nets.unet import ResBlock, SelfAttention
from dgm_course.paths import Cosine

UNETS = {
    "plain": {},
    "labels": {"num_classes": 10},
    "attention": {"num_classes": 10, "attention": True},
    "colour": {"image_channels": 3, "channels": (8, 16), "blocks": (1, 1), "fold": 1, "condition": 16},
    "deep": {"channels": (16, 24), "blocks": (3, 2), "fold": 4, "dropout": 0.1},
    "no skip": {"channels": (16, 24), "blocks": (2, 1), "num_classes": 10, "skip": False},
    "variance": {"channels": (16, 24), "blocks": (1, 1), "num_classes": 10, "out_channels": 2},
    "colour, variance": {"image_channels": 3, "channels": (8, 16), "blocks": (1, 1), "fold": 1, "out_channels": 6},
}
all_unets = pytest.mark.parametrize("settings", UNETS.values(), ids=UNETS)


KINDS = ("adaLN-Zero", "cross-attention", "in-context")
all_kinds = pytest.mark.parametrize("kind", KINDS)


def small_dit(**settings) -> DiT:
    """A DiT of four tokens, or of as many as the settings say."""
    return DiT(**{"size": 8, "patch": 4, "width": 16, "depth": 2, "heads": 2} | settings)


def lively(net: nn.Module) -> nn.Module:
    """The net with weights as large as trained ones, so that attention is far from even."""
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    return net.eval()


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from one seed and leaves the global random state as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def awake(net: nn.Module) -> nn.Module:
    """The net with every parameter random, none left at zero, and no dropout."""
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.05)
    return net.eval()


def images(settings, batch=2, side=16):
    g = torch.Generator().manual_seed(1)
    return torch.randn(batch, settings.get("image_channels", 1), side, side, generator=g), torch.rand(
        batch, generator=g
    )


@pytest.mark.parametrize("dim", [2, 4, 64])
@pytest.mark.parametrize("longest", [10_000.0, 100.0])
def test_sinusoids(dim, longest):
    """cos and sin of 1000·t·ω_k, ω_k = longest^(−k/(d/2)), with numpy."""
    t = np.array([0.0, 0.001, 0.5, 1.0])
    angle = 1000 * t[:, None] * longest ** (-np.arange(dim // 2) / (dim // 2))
    expected = np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
    np.testing.assert_allclose(sinusoids(torch.from_numpy(t), dim, longest), expected, atol=1e-11)
    low = sinusoids(torch.from_numpy(t).float(), dim, longest)
    assert low.dtype == torch.float32
    np.testing.assert_allclose(low, expected, atol=2e-4)  # angles up to 1000 have 3e-5 of rounding in float32


def test_sinusoids_tell_times_apart():
    """Neighbouring times of a 1000-step chain have clearly different features."""
    features = sinusoids(torch.arange(1001) / 1000, 64)
    assert (features[1:] - features[:-1]).norm(dim=1).min() > 0.5


@pytest.mark.parametrize("dim, t, message", [
    (3, torch.zeros(2), "^dim must be even and positive; got 3"),
    (0, torch.zeros(2), "^dim must be even and positive"),
    (4, torch.zeros(2, 1), r"^t must have shape \(B,\)"),
    (4, torch.tensor(0.5), r"^t must have shape \(B,\)"),
])  # fmt: skip
def test_sinusoids_check_their_arguments(dim, t, message):
    """Odd or no features, and times of another shape, are refused."""
    with pytest.raises(ValueError, match=message):
        sinusoids(t, dim)


def test_embeddings():
    """Time and label become (B, width); the null label, the last row, stands for no label."""
    assert TimeEmbedding(16)(torch.zeros(3)).shape == (3, 16)
    label = LabelEmbedding(10, 16)
    assert label.table.weight.shape == (11, 16)
    y = torch.tensor([3, 10, 0])
    assert torch.equal(label(y, 3), label.table.weight[y])
    assert torch.equal(label(None, 2), label.table.weight[[10, 10]])
    for bad in (
        torch.tensor([1.0, 2.0, 3.0]),
        torch.tensor([1, 2], dtype=torch.int32),
        torch.tensor([[1, 2, 3]]),
        torch.tensor([1]),
    ):
        with pytest.raises(ValueError, match=r"^y must be int64 of shape \(3,\)"):
            label(bad, 3)


@all_unets
@pytest.mark.parametrize("batch", [1, 3])
def test_unet_shapes(settings, batch):
    """What goes in comes out in the same shape, or with the channels asked for, also for a batch of one and oblong images."""
    net, side = awake(UNet(**settings)), 2 * settings.get("fold", 2)
    for height, width in ((2 * side, 2 * side), (side, 3 * side)):
        x = torch.randn(batch, settings.get("image_channels", 1), height, width)
        channels = settings.get("out_channels", x.shape[1])
        assert net(x, torch.rand(batch)).shape == (batch, channels, height, width)


@all_unets
def test_unet_starts_at_zero(settings):
    """At the start the output is exactly zero: a new network predicts the mean of v, and no block adds anything."""
    net = UNet(**settings)
    x, t = images(settings)
    assert torch.equal(net(x, t), torch.zeros(len(x), settings.get("out_channels", x.shape[1]), *x.shape[2:]))


def test_blocks_start_as_the_identity():
    """A residual block of one width, and attention, do nothing at the start, and something once their last layer is awake."""
    h, condition = torch.randn(2, 16, 4, 4), torch.randn(2, 8)
    block, attention = ResBlock(16, 16, 8), SelfAttention(16)
    assert torch.equal(block(h, condition), h) and torch.equal(attention(h), h)
    assert not torch.allclose(awake(block)(h, condition), h) and not torch.allclose(awake(attention)(h), h)


def test_block_by_hand():
    """skip(h) + W₂∗SiLU((1 + s)·norm(W₁∗SiLU(norm(h))) + b) with (s, b) = W·SiLU(c), from the block's own parameters."""
    f, block = nn.functional, awake(ResBlock(16, 24, 8)).double()
    h, c = torch.randn(2, 16, 4, 4, dtype=torch.float64), torch.randn(2, 8, dtype=torch.float64)
    own = dict(block.named_parameters())
    scale_shift = f.silu(c) @ own["modulation.weight"].T + own["modulation.bias"]
    scale, shift = scale_shift[:, :24, None, None], scale_shift[:, 24:, None, None]
    inside = f.conv2d(
        f.silu(f.group_norm(h, 8, own["norm1.weight"], own["norm1.bias"])),
        own["conv1.weight"],
        own["conv1.bias"],
        padding=1,
    )
    inside = (1 + scale) * f.group_norm(inside, 8, own["norm2.weight"], own["norm2.bias"]) + shift
    expected = f.conv2d(h, own["skip.weight"], own["skip.bias"]) + f.conv2d(
        f.silu(inside), own["conv2.weight"], own["conv2.bias"], padding=1
    )
    torch.testing.assert_close(block(h, c), expected, rtol=1e-12, atol=1e-12)


def test_skip_passes_the_bottleneck():
    """With nothing let through to the lower level the image still reaches the output, over the skip."""
    net = awake(UNet(channels=(16, 16), blocks=(1, 1)))
    nn.init.zeros_(net.shrink.weight)
    x, t = images({})
    assert not torch.allclose(net(x, t), net(x.flip(-1), t), atol=1e-4)


def test_without_a_skip_everything_goes_through_the_second_level():
    """What the way up gets is fixed by what was handed down: with that held still, other images give the same output."""
    for skip in (False, True):
        net = awake(UNet(channels=(16, 16), blocks=(1, 1), skip=skip))
        x, t = images({})
        free = net(x, t), net(x.flip(-1), t)
        assert not torch.allclose(*free, atol=1e-4)
        handed = torch.randn(2, 16, 4, 4)
        net.shrink.register_forward_hook(lambda *_, handed=handed: handed)
        assert torch.equal(net(x, t), net(x.flip(-1), t)) is not skip


@pytest.mark.parametrize("blocks", [(1, 1), (3, 2)])
def test_parameters_of_the_skip(blocks):
    """Twice the width w enters the first block of the way up: 2w more to norm, 9w² and 2w² + w more to convolve."""
    with_skip, without = (
        sum(p.numel() for p in UNet(channels=(24, 40), blocks=blocks, skip=skip).parameters()) for skip in (True, False)
    )
    assert with_skip - without == 2 * 24 + 9 * 24**2 + 2 * 24**2 + 24


def test_attention_by_numpy():
    """softmax(QKᵀ/√d)V over positions, head by head, with numpy."""
    attention = awake(SelfAttention(16, heads=2)).double()
    h = torch.randn(1, 16, 2, 3, dtype=torch.float64)
    weight = {name: value.detach().numpy() for name, value in attention.named_parameters()}
    flat = attention.norm(h).detach().numpy().reshape(16, 6)
    qkv = weight["qkv.weight"][:, :, 0, 0] @ flat + weight["qkv.bias"][:, None]
    q, k, v = qkv[:16], qkv[16:32], qkv[32:]
    mixed = np.zeros((16, 6))
    for head in (slice(0, 8), slice(8, 16)):
        score = np.exp(q[head].T @ k[head] / np.sqrt(8))
        mixed[head] = v[head] @ (score / score.sum(1, keepdims=True)).T
    expected = h.numpy().reshape(16, 6) + weight["out.weight"][:, :, 0, 0] @ mixed + weight["out.bias"][:, None]
    np.testing.assert_allclose(attention(h).detach().numpy().reshape(16, 6), expected, atol=1e-12)


@all_unets
def test_gradients_reach_every_parameter(settings):
    """Once the zero layers are awake, no parameter is without effect on the output."""
    net = awake(UNet(**settings))
    x, t = images(settings, batch=3)
    y = torch.tensor([0, 4, 10]) if settings.get("num_classes") else None
    net(x, t, y).square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
        assert parameter.grad.abs().max() > 0, name
    if y is not None:
        assert (net.label.table.weight.grad.abs().sum(1) > 0).nonzero().flatten().tolist() == [0, 4, 10]


@pytest.mark.parametrize("make", [
    lambda: awake(UNet(num_classes=10, channels=(8, 16), blocks=(1, 1), attention=True)),
    lambda: awake(MLP(2, width=16, num_classes=10)),
    *(lambda kind=kind: lively(small_dit(size=16, num_classes=10, conditioning=kind)) for kind in KINDS),
], ids=["UNet", "MLP", *KINDS])  # fmt: skip
def test_labels(make):
    """The null label equals no label; another label does not; each sample feels its own only."""
    net = make()
    x, t = (torch.randn(2, 2), torch.rand(2)) if isinstance(net, MLP) else images({})
    null = net(x, t, torch.tensor([10, 10]))
    assert torch.equal(net(x, t), null)
    mixed = net(x, t, torch.tensor([10, 3]))
    torch.testing.assert_close(mixed[0], null[0])
    assert not torch.allclose(mixed[1], null[1])


@pytest.mark.parametrize("make", [
    lambda: awake(UNet(attention=True)),
    lambda: awake(MLP(2)),
    *(lambda kind=kind: lively(small_dit(size=16, conditioning=kind)) for kind in KINDS),
], ids=["UNet", "MLP", *KINDS])  # fmt: skip
def test_time_matters_and_samples_do_not_meet(make):
    """The output depends on t, and each sample's only on its own image and time."""
    net = make()
    x, t = (torch.randn(3, 2), torch.rand(3)) if isinstance(net, MLP) else images({}, batch=3)
    with torch.no_grad():
        out, alone, later = net(x, t), net(x[1:2], t[1:2]), net(x, t.roll(1))
    torch.testing.assert_close(out[1:2], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(out, later, rtol=1e-3, atol=1e-4)


def test_folding_loses_nothing():
    """Every pixel reaches the output's own patch: the Jacobian of the folded net has no empty row or column."""
    net = awake(UNet(channels=(16, 16), blocks=(1, 1))).double()
    x = torch.randn(1, 1, 4, 4, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: net(x, torch.tensor([0.3], dtype=torch.float64)), x)
    jacobian = jacobian.reshape(16, 16).abs()
    assert jacobian.max(0).values.min() > 0 and jacobian.max(1).values.min() > 0


def test_more_channels_leave_the_first_as_they_were():
    """With the weights of a plain net in the first rows of the last layer, the first channel is what that net says; the second
    is what the other rows say, each of them four pixels of it."""
    settings = {"channels": (16, 16), "blocks": (1, 1), "num_classes": 10}
    plain, wide = awake(UNet(**settings)), awake(UNet(**settings, out_channels=2))
    (weight, bias), (x, t) = (p.detach().clone() for p in wide.leave[2].parameters()), images(settings)
    state = plain.state_dict()
    for k, name in enumerate(("leave.2.weight", "leave.2.bias")):
        state[name] = torch.cat([state[name], (weight, bias)[k][4:]])
    wide.load_state_dict(state)
    first, second = wide(x, t).chunk(2, 1)
    torch.testing.assert_close(first, plain(x, t), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        plain.leave[2].weight.copy_(weight[4:])
        plain.leave[2].bias.copy_(bias[4:])
    torch.testing.assert_close(second, plain(x, t), rtol=1e-5, atol=1e-6)
    assert (first - second).abs().max() > 0.01


# A weight of guidance -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [4, 64])
def test_weight_embedding_by_numpy(features):
    """Cosines and sines of 10w/10000^(k/(d/2)), two linear layers with a SiLU between; the shortest wave is 0.63 in w."""
    net, w = lively(WeightEmbedding(6, features)), torch.tensor([0.0, 0.5, 1.0, 4.0])
    half = features // 2
    angles = 10 * w.numpy()[:, None] / 10_000 ** (np.arange(half) / half)
    rows = np.concatenate([np.cos(angles), np.sin(angles)], 1)
    first, second = (
        (layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in (net.layers[0], net.layers[2])
    )
    hidden = rows @ first[0].T + first[1]
    expected = hidden / (1 + np.exp(-hidden)) @ second[0].T + second[1]
    np.testing.assert_allclose(net(w).detach().numpy(), expected, rtol=1e-4, atol=1e-4)
    later = sinusoids((w + 2 * np.pi / 10) / 100, features)[:, [0, half]]
    torch.testing.assert_close(later, torch.from_numpy(rows).float()[:, [0, half]], rtol=0, atol=1e-4)


def test_weight_embedding_starts_at_zero():
    """Nothing is added at any w; its first layer is not zero, so that it can learn, and only the second gets a gradient at first."""
    net = WeightEmbedding(6)
    out = net(torch.linspace(0, 9, 5))
    assert out.shape == (5, 6) and not out.any() and net.layers[0].weight.abs().max() > 0.01
    out.sum().backward()
    assert net.layers[2].weight.grad.any() and net.layers[2].bias.grad.any() and not net.layers[0].weight.grad.any()


GUIDED = {"channels": (8, 16), "blocks": (1, 1), "num_classes": 10, "condition": 16}


def test_a_guided_unet_starts_as_one_that_is_not():
    """With the same weights in all else it says the same at every w, to the bit; told by one that has learned, another thing."""
    plain, guided = lively(UNet(**GUIDED)), UNet(**GUIDED, guided=True).eval()
    missing = guided.load_state_dict(plain.state_dict(), strict=False)
    assert missing.unexpected_keys == [] and {key.split(".")[0] for key in missing.missing_keys} == {"weight"}
    x, t, y = images(GUIDED, 3)[0], torch.tensor([0.1, 0.5, 1.0]), torch.tensor([3, 10, 0])
    for w in (0.0, 1.0, 4.0):
        assert torch.equal(guided(x, t, y, torch.full((3,), w)), plain(x, t, y))
    lively(guided.weight)
    with torch.no_grad():
        out = [guided(x, t, y, torch.full((3,), w)) for w in (0.0, 1.0, 4.0)]
    assert all(
        (one - other).abs().max() > 1e-2 for one, other in ((out[0], out[1]), (out[1], out[2]), (out[0], out[2]))
    )


def test_each_sample_has_its_weight():
    """A sample depends on its own w alone; the embeddings of time, label and weight are added."""
    net = lively(UNet(**GUIDED, guided=True))
    x, t, y, w = (
        images(GUIDED, 3)[0],
        torch.tensor([0.1, 0.5, 1.0]),
        torch.tensor([3, 10, 0]),
        torch.tensor([0.0, 1.3, 4.0]),
    )
    with torch.no_grad():
        whole = net(x, t, y, w)
        for i in range(3):
            torch.testing.assert_close(
                net(x[i : i + 1], t[i : i + 1], y[i : i + 1], w[i : i + 1])[0], whole[i], rtol=1e-4, atol=1e-4
            )
        felt = []
        net.down[0].register_forward_pre_hook(lambda module, inputs: felt.append(inputs[1]))
        net(x, t, y, w)
    torch.testing.assert_close(felt[0], net.time(t) + net.label(y, 3) + net.weight(w))


def test_gradients_reach_the_weight():
    """Every parameter of an awake guided network gets a gradient, those of the weight too."""
    net = awake(UNet(**GUIDED, guided=True))
    net(images(GUIDED, 3)[0], torch.rand(3), torch.tensor([1, 2, 3]), torch.rand(3)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in net.weight.parameters())
    assert all(p.grad is not None for p in net.parameters())


def test_a_guided_unet_in_a_denoiser():
    """The weight is handed on as a condition; a network without labels can be told one too."""
    net = lively(UNet(channels=(8, 8), blocks=(1, 1), condition=16, guided=True))
    d, x, w = Denoiser(net, Cosine(), "x0"), images({}, 2)[0], torch.tensor([0.5, 3.0])
    with torch.no_grad():
        torch.testing.assert_close(d(x, 0.4, w=w), net(x, torch.full((2,), 0.4), w=w))


@pytest.mark.parametrize(
    "guided, w, message",
    [
        (
            True,
            None,
            r"^w must have shape \(2,\) for a UNet built with guided = True, and be given to no other; got None",
        ),
        (True, torch.tensor(1.0), r"^w must have shape \(2,\) .* got \(\)$"),
        (True, torch.ones(1), r"^w must have shape \(2,\) .* got \(1,\)$"),
        (True, torch.ones(2, 1), r"^w must have shape \(2,\) .* got \(2, 1\)$"),
        (False, torch.ones(2), r"^w must have shape \(2,\) .* given to no other; got \(2,\)$"),
    ],
)
def test_a_weight_is_for_a_guided_unet(guided, w, message):
    """Missing, in another shape, or told to a network that knows none, it is refused and named."""
    net = UNet(**GUIDED, guided=guided)
    with pytest.raises(ValueError, match=message):
        net(images(GUIDED, 2)[0], torch.zeros(2), torch.tensor([1, 2]), w)


def test_size():
    """With labels, the U-Net of the course has at most 0.6 million parameters, with attention, and the DiT 1.2."""
    assert sum(p.numel() for p in UNet(num_classes=10, attention=True).parameters()) <= 600_000
    assert sum(p.numel() for p in DiT(num_classes=10).parameters()) <= 1_200_000


def test_dropout_only_while_training():
    """In eval mode the net is deterministic; while training dropout is not."""
    net = awake(UNet(channels=(8, 8), blocks=(1, 1), dropout=0.5))
    x, t = images({})
    assert torch.equal(net(x, t), net(x, t))
    net.train()
    assert not torch.equal(net(x, t), net(x, t))


@pytest.mark.parametrize("dim, depth", [(1, 1), (2, 3), (5, 2)])
def test_mlp(dim, depth):
    """Points of any dimension keep their shape, and gradients reach every parameter."""
    net = awake(MLP(dim, width=16, depth=depth, num_classes=3))
    x = torch.randn(4, dim)
    out = net(x, torch.rand(4), torch.tensor([0, 1, 2, 3]))
    assert out.shape == x.shape
    out.square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    "make",
    [lambda: UNet(num_classes=10, attention=True), lambda: MLP(2), lambda: small_dit(size=16, num_classes=10)],
    ids=["UNet", "MLP", "DiT"],
)
def test_saved_and_loaded(make):
    """A state dict brings a second network to the same function; double precision stays near single."""
    net, twin = awake(make()), make().eval()
    twin.load_state_dict(net.state_dict())
    x, t = (torch.randn(2, 2), torch.rand(2)) if isinstance(net, MLP) else images({})
    with torch.no_grad():
        assert torch.equal(net(x, t), twin(x, t))
        wide = copy.deepcopy(net).double()(x.double(), t.double())
        torch.testing.assert_close(net(x, t).double(), wide, rtol=1e-2, atol=1e-3)


def test_network_in_a_denoiser():
    """The networks fit a Denoiser: a new U-Net that predicts v gives x̂_0 = α·x_t."""
    x = torch.randn(2, 1, 8, 8)
    d = Denoiser(UNet(num_classes=10), Cosine(), "v")
    torch.testing.assert_close(d(x, 0.5, y=torch.tensor([1, 2])), np.cos(np.pi / 4) * x, rtol=1e-6, atol=1e-6)


def test_arguments_are_checked():
    """Images that do not fold and labels without classes are refused, and named."""
    t, y = torch.zeros(2), torch.tensor([1, 2])
    cases = [
        ("^xt must have shape .* divisible by 4; got", lambda: UNet()(torch.zeros(2, 1, 28, 30), t)),
        ("^xt must have shape .* divisible by 8", lambda: UNet(fold=4)(torch.zeros(2, 1, 28, 28), t)),
        ("^xt must have shape", lambda: UNet()(torch.zeros(2, 28, 28), t)),
        ("^y was given, but this UNet", lambda: UNet()(torch.zeros(2, 1, 8, 8), t, y)),
        ("^y was given, but this MLP", lambda: MLP()(torch.zeros(2, 2), t, y)),
        (r"^y must be int64 of shape \(2,\)", lambda: MLP(num_classes=3)(torch.zeros(2, 2), t, torch.tensor([1]))),
        (r"^y must be int64 of shape \(2,\)", lambda: UNet(num_classes=3)(torch.zeros(2, 1, 8, 8), t, y.float())),
        (r"^t must have shape \(B,\)", lambda: MLP()(torch.zeros(2, 2), torch.tensor(0.5))),
    ]
    for message, call in cases:
        with pytest.raises(ValueError, match=message):
            call()


# The transformer ------------------------------------------------------------------------------------------------------


def wide(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("heads", [1, 2, 6])
@pytest.mark.parametrize("length", [None, 1, 7])
def test_attention_by_loops(heads, length):
    """A weighted mean of values for each head and token, of the own sequence and of a context of any length."""
    attention, h = lively(Attention(12, heads)).double(), wide(2, 5, 12)
    context = None if length is None else wide(2, length, 12)
    weights, out = typed_attention(attention, h, context)
    torch.testing.assert_close(attention(h, context), out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(attention.weights(h, context), weights, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        attention.weights(h, context).sum(-1), torch.ones(2, heads, 5).double(), rtol=1e-14, atol=0
    )


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("length", [None, 7])
def test_attention_is_torchs(heads, length):
    """With its weights in torch's own module: output and weights."""
    attention, h = lively(Attention(12, heads)).double(), wide(2, 5, 12)
    context = h if length is None else wide(2, length, 12)
    theirs = nn.MultiheadAttention(12, heads, batch_first=True).double()
    parts = (attention.query, attention.key, attention.value)
    theirs.load_state_dict({
        "in_proj_weight": torch.cat([part.weight for part in parts]),
        "in_proj_bias": torch.cat([part.bias for part in parts]),
        "out_proj.weight": attention.out.weight,
        "out_proj.bias": attention.out.bias,
    })  # fmt: skip
    out, weights = theirs(h, context, context, average_attn_weights=False)
    given = None if length is None else context
    torch.testing.assert_close(attention(h, given), out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(attention.weights(h, given), weights, rtol=1e-12, atol=1e-12)


def typed_block(block, kind, h, condition):
    """The block from its own parameters; attention by the loops above."""
    f, own = nn.functional, dict(block.named_parameters())

    def normed(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
        return x if kind == "adaLN-Zero" else x * own[f"{name}.weight"] + own[f"{name}.bias"]

    def perceptron(x):
        x = x @ own["perceptron.0.weight"].T + own["perceptron.0.bias"]
        x = x / 2 * (1 + torch.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))
        return x @ own["perceptron.2.weight"].T + own["perceptron.2.bias"]

    shift1 = scale1 = shift2 = scale2 = 0.0
    gate1 = gate2 = 1.0
    if kind == "adaLN-Zero":
        c = condition.sum(1)
        told = (c * c.sigmoid()) @ own["modulation.weight"].T + own["modulation.bias"]
        shift1, scale1, gate1, shift2, scale2, gate2 = told.unflatten(1, (6, 1, -1)).unbind(1)
    x = normed(h, "norm1") * (1 + scale1) + shift1
    h = h + gate1 * typed_attention(block.attention, x)[1]
    if kind == "cross-attention":
        x = f.layer_norm(h, h.shape[-1:], own["norm_cross.weight"], own["norm_cross.bias"], 1e-6)
        h = h + typed_attention(block.cross, x, condition)[1]
    return h + gate2 * perceptron(normed(h, "norm2") * (1 + scale2) + shift2)


@all_kinds
@pytest.mark.parametrize("tokens", [1, 2])
def test_dit_block_by_hand(kind, tokens):
    """Two branches and, for cross-attention, one between; modulated, attending or left alone by the condition."""
    block = lively(DiTBlock(12, 3, 2.5, kind)).double()
    h, condition = wide(2, 5, 12), wide(2, tokens, 12)
    torch.testing.assert_close(block(h, condition), typed_block(block, kind, h, condition), rtol=1e-11, atol=1e-11)
    assert block.perceptron[0].out_features == 30


def test_only_adaln_zero_starts_as_the_identity():
    """Its gates are zero, so a new block changes no bit; the other two kinds add something from the start."""
    h, condition = torch.randn(2, 5, 16), torch.randn(2, 2, 16)
    for kind in KINDS:
        block = DiTBlock(16, 4, conditioning=kind)
        assert torch.equal(block(h, condition), h) == (kind == "adaLN-Zero")
        assert (block(h, condition) - h).abs().max() > 1e-2 or kind == "adaLN-Zero"
        lively(block)
        changed = not torch.allclose(block(h, condition), block(h, 2 * condition))
        assert changed == (kind != "in-context")  # there the condition is in the sequence
        assert not torch.allclose(block(h, condition), h)


@all_kinds
@pytest.mark.parametrize("settings", [
    {}, {"num_classes": 10}, {"image_channels": 3, "size": 12, "patch": 2, "heads": 4, "ratio": 1.5}, {"patch": 8}, {"patch": 1, "size": 3},
], ids=str)  # fmt: skip
def test_dit_shapes(kind, settings):
    """What goes in comes out in the same shape; a new net says exactly 0, also for one image and one token."""
    new = small_dit(conditioning=kind, **settings)
    x = torch.randn(3, settings.get("image_channels", 1), *[settings.get("size", 8)] * 2)
    assert torch.equal(new(x, torch.rand(3)), torch.zeros_like(x))
    net = lively(new)
    assert net(x, torch.rand(3)).shape == x.shape == net(x, torch.rand(3)).shape
    assert net(x[:1], torch.rand(1)).shape == x[:1].shape and net(x, torch.rand(3)).abs().min() > 0


@all_kinds
@pytest.mark.parametrize("channels", [1, 2])
def test_dit_by_hand(kind, channels):
    """Patches cut by loops, positions added, conditions made; block after block; the last layer pasted back by loops."""
    settings = {"image_channels": channels, "size": 6, "patch": 2, "width": 12, "heads": 3, "num_classes": 4}
    net = lively(small_dit(conditioning=kind, **settings)).double()
    own, f = dict(net.named_parameters()), nn.functional
    xt, t, y = wide(2, channels, 6, 6), torch.tensor([0.2, 0.9]).double(), torch.tensor([3, 4])
    places = [(2 * row, 2 * column) for row in range(3) for column in range(3)]
    tokens = torch.stack([xt[:, :, i : i + 2, j : j + 2].flatten(1) for i, j in places], 1)
    tokens = tokens @ own["enter.weight"].T + own["enter.bias"]
    line = [torch.tensor([np.cos(k), np.cos(k * 10_000 ** (-1 / 3)), np.cos(k * 10_000 ** (-2 / 3)),
                          np.sin(k), np.sin(k * 10_000 ** (-1 / 3)), np.sin(k * 10_000 ** (-2 / 3))]) for k in range(3)]  # fmt: skip
    h = tokens + torch.stack([torch.cat([line[i // 2], line[j // 2]]) for i, j in places])
    condition = torch.stack([net.time(t), own["label.table.weight"][y]], 1)
    if kind == "in-context":
        h = torch.cat([condition, h], 1)
    for block in net.blocks:
        h = typed_block(block, kind, h, condition)
    h = h[:, 2:] if kind == "in-context" else h
    h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    if kind == "adaLN-Zero":
        shift, scale = (f.silu(condition.sum(1)) @ own["modulation.weight"].T + own["modulation.bias"]).chunk(2, 1)
        h = h * (1 + scale[:, None]) + shift[:, None]
    else:
        h = h * own["norm.weight"] + own["norm.bias"]
    h = h @ own["leave.weight"].T + own["leave.bias"]
    expected = torch.zeros_like(xt)
    for n, (i, j) in enumerate(places):
        expected[:, :, i : i + 2, j : j + 2] = h[:, n].reshape(2, channels, 2, 2)
    torch.testing.assert_close(
        net(xt, t, y), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item()
    )  # float32 places


def felt(net) -> set[str]:
    """The parameters in which a loss has a slope."""
    net.zero_grad()
    g = torch.Generator().manual_seed(2)
    x, target = torch.randn(2, 5, 1, 8, 8, generator=g).double()
    y = torch.arange(5)
    (net(x, torch.rand(5, generator=g).double(), y) - target).square().mean().backward()
    return {name for name, p in net.named_parameters() if p.grad is not None and p.grad.abs().max() > 1e-13}


def unfelt(name: str) -> bool:
    """A key's bias adds the same to all scores of a query, and a softmax does not feel that."""
    return name.endswith("key.bias")


@all_kinds
def test_gradients_reach_every_parameter_of_the_dit(kind):
    """At the start the zero layer lets only itself learn; it wakes what is before it, and after two steps all learn."""
    net = small_dit(num_classes=4, conditioning=kind).double()
    every = {name for name, _ in net.named_parameters() if not unfelt(name)}
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    learning = []
    for _ in range(3):
        learning.append(felt(net))
        optimizer.step()
    assert learning[0] == {"leave.weight", "leave.bias"}
    if kind == "adaLN-Zero":  # then the gates, closed still for what is behind them
        assert {name for name in learning[1] if name.startswith("blocks")} == {
            f"blocks.{n}.modulation.{part}" for n in (0, 1) for part in ("weight", "bias")
        }
        assert not any(name.startswith(("time", "label")) for name in learning[1])
    else:
        assert learning[1] == every
    assert learning[2] == every
    assert felt(lively(net)) == every
    assert (net.label.table.weight.grad.abs().sum(1) > 0).all()


@all_kinds
def test_a_bias_of_the_keys_does_nothing(kind):
    """What the test above leaves out has no effect at all, up to rounding."""
    block, h, condition = lively(DiTBlock(16, 2, 2, kind)).double(), wide(2, 5, 16), wide(2, 2, 16)
    before = block(h, condition)
    for name, parameter in block.named_parameters():
        if unfelt(name):
            nn.init.normal_(parameter)
    torch.testing.assert_close(block(h, condition), before, rtol=1e-11, atol=1e-11)


@all_kinds
def test_tokens_are_treated_alike(kind):
    """A block permutes what it gives as its tokens are permuted; so does the net without positions, and not with them."""
    order = torch.randperm(9)
    block, h, condition = lively(DiTBlock(16, 2, 2, kind)).double(), wide(2, 9, 16), wide(2, 2, 16)
    torch.testing.assert_close(block(h[:, order], condition), block(h, condition)[:, order], rtol=1e-10, atol=1e-11)
    net, x, t = lively(small_dit(size=12, conditioning=kind)).double(), wide(2, 1, 12, 12), torch.rand(2).double()

    def shuffled(x):
        tokens = x.unflatten(2, (3, 4)).unflatten(4, (3, 4)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)[:, order]
        return tokens.unflatten(1, (3, 3)).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)

    assert not torch.allclose(net(shuffled(x), t), shuffled(net(x, t)), atol=1e-2)
    net.positions.zero_()
    torch.testing.assert_close(net(shuffled(x), t), shuffled(net(x, t)), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("side, width", [(7, 96), (3, 8), (14, 16), (1, 4)])
def test_positions(side, width):
    """cos and sin of the row in the first half, of the column in the second, by numpy; all different, none far away."""
    found, quarter = positions(side, width), width // 4
    assert found.shape == (side**2, width) and found.dtype == torch.float32
    angle = np.arange(side)[:, None] * 10_000.0 ** (-np.arange(quarter) / quarter)
    line = np.concatenate([np.cos(angle), np.sin(angle)], 1)
    expected = np.stack([np.concatenate([line[n // side], line[n % side]]) for n in range(side**2)])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    apart = torch.cdist(found, found) + 10 * torch.eye(side**2)
    assert apart.min() > 0.5


def test_labels_in_the_sequence_do_not_come_out():
    """In context, time and label are two more tokens in the blocks, and none in the output."""
    net, lengths = lively(small_dit(num_classes=10, conditioning="in-context")), []
    for module in (*net.blocks, net.leave):
        module.register_forward_hook(lambda module, given, out: lengths.append(out.shape[1]))
    assert net(torch.randn(2, 1, 8, 8), torch.rand(2)).shape == (2, 1, 8, 8) and lengths == [6, 6, 4]


@all_kinds
def test_attention_maps_are_those_of_the_pass(kind, monkeypatch):
    """One for each block, the very weights that the pass mixes with; nothing is left behind, also when the net raises."""
    net = lively(small_dit(num_classes=10, conditioning=kind))
    x, t, y = torch.randn(3, 1, 8, 8), torch.rand(3), torch.tensor([1, 10, 4])
    used, weights = {}, Attention.weights

    def recorded(self, *arguments):
        used[self] = weights(self, *arguments)
        return used[self]

    with monkeypatch.context() as patch:
        patch.setattr(Attention, "weights", recorded)
        out = net(x, t, y)
    maps = attention_maps(net, x, t, y)
    tokens = 6 if kind == "in-context" else 4
    assert len(maps) == 2 and all(one.shape == (3, 2, tokens, tokens) for one in maps)
    for block, one in zip(net.blocks, maps, strict=True):
        assert torch.equal(one, used[block.attention]) and not one.requires_grad
        torch.testing.assert_close(one.sum(-1), torch.ones(3, 2, tokens))
    assert not torch.allclose(*maps, atol=1e-2)
    with pytest.raises(ValueError, match="^xt must have shape"):
        attention_maps(net, x[..., :4], t, y)
    with pytest.raises(ValueError, match="^y must be int64"):
        attention_maps(net, x, t, y[:2])
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in net.modules())
    assert torch.equal(net(x, t, y), out)


@all_kinds
def test_dit_in_bfloat16(kind):
    """Under autocast it runs, and stays near float32; gradients come back in float32."""
    net = awake(small_dit(num_classes=10, conditioning=kind))
    x, t, y = torch.randn(4, 1, 8, 8), torch.rand(4), torch.tensor([1, 2, 3, 10])
    with torch.autocast("cpu", torch.bfloat16):
        low = net(x, t, y)
        low.float().square().sum().backward()
    high = net(x, t, y)
    assert (low.float() - high).abs().max() < 0.05 * high.abs().max()
    assert all(p.grad.dtype == torch.float32 and bool(p.grad.isfinite().all()) for p in net.parameters())


def test_dit_checks_its_arguments():
    """Sizes that do not fit, other images, and labels or kinds that there are none of: the error names them."""
    net, x, t, y = small_dit(), torch.zeros(2, 1, 8, 8), torch.zeros(2), torch.tensor([1, 2])
    cases = [
        (r"^heads must divide the width, 16; got 3", lambda: Attention(16, 3)),
        (r"^heads must divide the width, 16; got 0", lambda: Attention(16, 0)),
        (r"^heads must divide the width, 20; got 3", lambda: DiT(width=20, heads=3)),
        (r"^patch must divide the size of the images, 28; got 5", lambda: DiT(patch=5)),
        (r"^conditioning must be one of adaLN-Zero, cross-attention, in-context; got 'adaLN'",
         lambda: DiTBlock(16, 2, conditioning="adaLN")),
        (r"^conditioning must be one of .*; got None", lambda: DiT(conditioning=None)),
        (r"^xt must have shape \(B, 1, 8, 8\); got \(2, 3, 8, 8\)", lambda: net(x.expand(2, 3, 8, 8), t)),
        (r"^xt must have shape \(B, 1, 8, 8\); got \(2, 1, 8, 4\)", lambda: net(x[..., :4], t)),
        (r"^xt must have shape \(B, 1, 8, 8\); got \(1, 8, 8\)", lambda: net(x[0], t)),
        (r"^y was given, but this DiT", lambda: net(x, t, y)),
        (r"^y must be int64 of shape \(2,\)", lambda: small_dit(num_classes=3)(x, t, y.float())),
        (r"^t must have shape \(B,\)", lambda: net(x, torch.tensor(0.5))),
    ]  # fmt: skip
    for message, call in cases:
        with pytest.raises(ValueError, match=message):
            call()


# The classifier -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"image_channels": 3, "num_classes": 4, "width": 32}], ids=["grey", "colour"])
@pytest.mark.parametrize("batch, height, width", [(1, 28, 28), (3, 28, 28), (2, 9, 14), (2, 1, 1)])
def test_classifier_shapes(settings, batch, height, width):
    """One logit for each class and `width` features, for images of any size."""
    net = Classifier(**settings).eval()
    x = torch.randn(batch, settings.get("image_channels", 1), height, width)
    assert net(x).shape == (batch, settings.get("num_classes", 10))
    assert net.features(x).shape == (batch, settings.get("width", 128))


def test_classifier_by_hand():
    """Five 3×3 convolutions, the second and fourth of stride 2, each normed and bent; the mean of places; a linear map."""
    f, net = nn.functional, awake(Classifier(width=32, num_classes=3)).double()
    h = x = torch.randn(2, 1, 12, 12, dtype=torch.float64)
    weights = iter(net.parameters())
    for stride in (1, 2, 1, 2, 1):
        h = f.conv2d(h, next(weights), next(weights), stride=stride, padding=1)
        h = f.group_norm(h, 8, next(weights), next(weights))
        h = h * h.sigmoid()
    features = h.sum((2, 3)) / 9
    torch.testing.assert_close(net.features(x), features, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(net(x), features @ next(weights).T + next(weights), rtol=1e-12, atol=1e-12)
    assert next(weights, None) is None


def test_classifier_head_sees_the_features():
    """The features are what the last layer is given, of each image by itself; while training, some are dropped from it."""
    net, seen = Classifier(width=32), []
    net.head.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    x = torch.randn(3, 1, 28, 28)
    for mode in (net.eval(), net.train()):
        mode(x)
        assert torch.equal(seen.pop(), net.features(x))
    torch.testing.assert_close(net.features(x[1:2]), net.features(x)[1:2], rtol=1e-4, atol=1e-5)


def test_gradients_reach_every_parameter_of_the_classifier():
    """From a cross-entropy, and from the features to the image."""
    net, x = Classifier(width=32).train(), torch.randn(6, 1, 28, 28, requires_grad=True)
    nn.functional.cross_entropy(net(x), torch.arange(6)).backward()
    for name, parameter in net.named_parameters():
        assert bool(parameter.grad.isfinite().all()) and parameter.grad.abs().max() > 0, name
    assert x.grad.abs().amax((1, 2, 3)).min() > 0


def test_classifier_drops_only_while_training():
    """In eval mode it is deterministic, while training it is not; its features always are."""
    net, x = awake(Classifier(width=32)), torch.randn(2, 1, 28, 28)
    assert torch.equal(net(x), net(x))
    net.train()
    assert not torch.equal(net(x), net(x)) and torch.equal(net.features(x), net.features(x))


def test_classifier_features_do_not_move_with_the_image():
    """A shift by 4 pixels, two strides of 2, within a wide background changes nothing; a shift by less does."""
    net = awake(Classifier(width=32)).double()
    blob = torch.randn(1, 1, 6, 6, dtype=torch.float64)

    def features(down, right):
        x = -torch.ones(1, 1, 64, 64, dtype=torch.float64)
        x[..., 28 + down : 34 + down, 28 + right : 34 + right] = blob
        return net.features(x)

    here = features(0, 0)
    for shift in ((4, 0), (0, -4), (-4, 8)):
        torch.testing.assert_close(features(*shift), here, rtol=1e-10, atol=1e-12)
    assert (features(2, 1) - here).abs().max() > 1e-6
    assert (net.features(-torch.ones(1, 1, 64, 64, dtype=torch.float64)) - here).abs().max() > 1e-4


@pytest.mark.parametrize("shape", [(2, 3, 28, 28), (2, 28, 28), (1, 1, 28), (2, 784), (1, 1, 2, 28, 28)])
def test_classifier_checks_its_argument(shape):
    """Another number of channels, or no batch of images: the error says what came and what is asked."""
    net = Classifier()
    for call in (net, net.features):
        with pytest.raises(ValueError) as failure:
            call(torch.zeros(shape))
        assert str(failure.value) == f"x must have shape (B, 1, H, W); got {shape}"


@pytest.mark.parametrize("batch, height, width", [(1, 28, 28), (3, 9, 14)])
def test_timed_classifier_by_hand(batch, height, width):
    """The embedding of t is added to what two layers gave, at every place; then three layers, the mean of places, a linear map."""
    f, net = nn.functional, awake(Classifier(width=32, num_classes=3, timed=True)).double()
    h, t = torch.randn(batch, 1, height, width, dtype=torch.float64), torch.rand(batch, dtype=torch.float64)
    x, weights = h, dict(net.named_parameters())
    for layer, stride in enumerate((1, 2, 1, 2, 1)):
        if layer == 2:
            first, second = ("time.layers.0", "time.layers.2")
            moved = f.silu(sinusoids(t, 64) @ weights[f"{first}.weight"].T + weights[f"{first}.bias"])
            h = h + (moved @ weights[f"{second}.weight"].T + weights[f"{second}.bias"])[:, :, None, None]
        conv, norm = f"trunk.{3 * layer}", f"trunk.{3 * layer + 1}"
        h = f.conv2d(h, weights[f"{conv}.weight"], weights[f"{conv}.bias"], stride=stride, padding=1)
        h = f.silu(f.group_norm(h, 8, weights[f"{norm}.weight"], weights[f"{norm}.bias"]))
    features = h.mean((2, 3))
    assert features.shape == (batch, 32)
    torch.testing.assert_close(net.features(x, t), features, rtol=1e-12, atol=1e-12)
    logits = features @ weights["head.1.weight"].T + weights["head.1.bias"]
    torch.testing.assert_close(net(x, t), logits, rtol=1e-12, atol=1e-12)


def test_time_matters_to_the_timed_classifier():
    """Each sample's logits depend on its own time and image; gradients reach every parameter and the image, as guidance needs."""
    net, x, t = lively(Classifier(width=32, timed=True)), torch.randn(3, 1, 12, 12), torch.tensor([0.1, 0.5, 0.9])
    with torch.no_grad():
        out, alone, later = net(x, t), net(x[1:2], t[1:2]), net(x, t.roll(1))
    torch.testing.assert_close(out[1:2], alone, rtol=1e-4, atol=1e-5)
    assert (out - later).abs().amax(1).min() > 1e-4
    x.requires_grad_()
    nn.functional.cross_entropy(net(x, t), torch.arange(3)).backward()
    for name, parameter in net.named_parameters():
        assert bool(parameter.grad.isfinite().all()) and parameter.grad.abs().max() > 0, name
    assert x.grad.abs().amax((1, 2, 3)).min() > 0


def test_a_time_is_for_a_timed_classifier():
    """And for no other: the error says so. One without a time has the weights that it always had."""
    x, t = torch.zeros(2, 1, 28, 28), torch.zeros(2)
    for net, given in ((Classifier(timed=True), ()), (Classifier(), (t,))):
        for call in (net, net.features):
            with pytest.raises(ValueError, match="^t must be given to a classifier that is timed, and to no other"):
                call(x, *given)
    with pytest.raises(ValueError, match=r"^x must have shape \(B, 1, H, W\)"):
        Classifier(timed=True)(x[0], t)
    names = set(Classifier(timed=True).state_dict()) - set(Classifier().state_dict())
    assert names and all(name.startswith("time.") for name in names)


# Networks without a time ----------------------------------------------------------------------------------------------

TIMELESS = {
    "perceptron": (lambda: perceptron(3, 16, 8, 2), (3,), (2,)),
    "encoder": (lambda: ConvEncoder(5, width=8), (1, 28, 28), (5,)),
    "encoder of three images": (lambda: ConvEncoder(1, width=8, image_channels=3), (3, 28, 28), (1,)),
    "decoder": (lambda: ConvDecoder(5, width=8), (5,), (1, 28, 28)),
    "coupler": (lambda: ConvCoupler(4, 8, 2), (4, 7, 7), (8, 7, 7)),
    "coupler, not square": (lambda: ConvCoupler(1, 6, 1), (1, 3, 5), (2, 3, 5)),
}
all_timeless = pytest.mark.parametrize("name", TIMELESS)


@all_timeless
@pytest.mark.parametrize("batch", [1, 3])
def test_timeless_shapes(name, batch):
    """Shapes as stated, also for a batch of one; each sample's output depends on its own input alone."""
    make, inside, outside = TIMELESS[name]
    net, x = awake(make()), torch.randn(batch, *inside)
    out = net(x)
    assert out.shape == (batch, *outside)
    torch.testing.assert_close(out[-1:], net(x[-1:]), rtol=1e-4, atol=1e-5)
    if batch > 1:
        assert not torch.allclose(out[0], out[1])


@all_timeless
def test_timeless_gradients(name):
    """No parameter is without effect, and none of the input."""
    make, inside, _ = TIMELESS[name]
    net, x = awake(make()), torch.randn(3, *inside, requires_grad=True)
    net(x).square().sum().backward()
    for label, parameter in [*net.named_parameters(), ("x", x)]:
        assert bool(parameter.grad.isfinite().all()) and parameter.grad.abs().max() > 0, label
    assert (x.grad != 0).all()


def test_perceptron_by_numpy():
    """Matrices with z·sigmoid(z) between them, and nothing after the last."""
    net, x = awake(perceptron(3, 16, 8, 2)).double(), torch.randn(5, 3, dtype=torch.float64)
    w1, b1, w2, b2, w3, b3 = (parameter.detach().numpy() for parameter in net.parameters())
    h = x.numpy()
    for w, b in ((w1, b1), (w2, b2)):
        h = h @ w.T + b
        h = h / (1 + np.exp(-h))
    np.testing.assert_allclose(net(x).detach(), h @ w3.T + b3, atol=1e-12)
    assert len(perceptron(3, 2)) == 1


def bent(h):
    return h * h.sigmoid()


def test_encoder_by_hand():
    """Two convolutions 4×4 of stride 2, one 3×3, the last two normed, each bent; then one linear map."""
    f, net = nn.functional, awake(ConvEncoder(5, width=8)).double()
    x = torch.randn(2, 1, 28, 28, dtype=torch.float64)
    weights = iter(net.parameters())
    h = bent(f.conv2d(x, next(weights), next(weights), stride=2, padding=1))
    for stride in (2, 1):
        h = f.conv2d(h, next(weights), next(weights), stride=stride, padding=1)
        h = bent(f.group_norm(h, 8, next(weights), next(weights)))
    assert h.shape == (2, 16, 7, 7)
    expected = h.flatten(1) @ next(weights).T + next(weights)
    torch.testing.assert_close(net(x), expected, rtol=1e-12, atol=1e-12)


def test_decoder_by_hand():
    """A linear map to 7×7, one convolution 3×3, two of stride 2 turned round, normed and bent between, tanh at the end."""
    f, net = nn.functional, awake(ConvDecoder(5, width=8)).double()
    z = torch.randn(2, 5, dtype=torch.float64)
    weights = iter(net.parameters())
    h = (z @ next(weights).T + next(weights)).reshape(2, 16, 7, 7)
    h = bent(f.group_norm(h, 8, next(weights), next(weights)))
    h = f.conv2d(h, next(weights), next(weights), padding=1)
    h = bent(f.group_norm(h, 8, next(weights), next(weights)))
    h = f.conv_transpose2d(h, next(weights), next(weights), stride=2, padding=1)
    h = bent(f.group_norm(h, 8, next(weights), next(weights)))
    h = f.conv_transpose2d(h, next(weights), next(weights), stride=2, padding=1)
    torch.testing.assert_close(net(z), 2 / (1 + (-2 * h).exp()) - 1, rtol=1e-10, atol=1e-12)


def test_decoder_stays_in_range():
    """Pixels lie in [−1, 1], however large the latent."""
    assert ConvDecoder(5, width=8)(1e3 * torch.randn(4, 5)).abs().max() <= 1


def test_coupler_by_hand():
    """enter; h + W₂∗SiLU(W₁∗SiLU(h)) for each block; leave, of SiLU(h)."""
    f, net = nn.functional, awake(ConvCoupler(3, 8, 2)).double()
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    own = dict(net.named_parameters())

    def conv(name, h):
        return f.conv2d(h, own[f"{name}.weight"], own[f"{name}.bias"], padding=1)

    h = conv("enter", x)
    for block in ("blocks.0", "blocks.1"):
        h = h + conv(f"{block}.3", bent(conv(f"{block}.1", bent(h))))
    torch.testing.assert_close(net(x), conv("leave", bent(h)), rtol=1e-12, atol=1e-12)


def test_coupler_starts_at_zero():
    """s = t = 0 at the start, each branch adds nothing, and the last layer learns from the first step on."""
    net, x = ConvCoupler(4, 16, 2), torch.randn(3, 4, 7, 7)
    assert torch.equal(net(x), torch.zeros(3, 8, 7, 7))
    for block in net.blocks:
        assert not block(torch.randn(2, 16, 7, 7)).any()
    (net(x) - 1).square().sum().backward()
    assert net.leave.weight.grad.abs().max() > 0
