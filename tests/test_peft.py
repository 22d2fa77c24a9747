"""Fine-tuning beside a frozen base: explicit ΔW, attention by loops, autograd and Eckart-Young; the base comes back bit by bit."""

import copy
import hashlib
import json
import math
import os
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import typed_attention
from safetensors.torch import load_file, save_file
from scipy import optimize, stats
from torch import nn

from dgm_course import losses, training
from dgm_course.denoisers import Denoiser
from dgm_course.nets import DiT, LanguageModel, UNet
from dgm_course.nets.dit import Attention, attention_maps
from dgm_course.nets.language import CausalAttention
from dgm_course.paths import Cosine
from dgm_course.peft import (
    Adapter,
    LoRA,
    Prefix,
    PrefixAttention,
    activate,
    add_adapters,
    add_lora,
    add_prefix,
    fingerprint,
    fold,
    freeze,
    load_lora,
    merge,
    merged,
    save_lora,
    train_biases,
    trainable,
    unmerge,
)

F = nn.functional


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from one seed and leaves the global random state as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def wide(*shape) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def near(actual, expected, tolerance: float = 1e-10) -> None:
    """Up to the tolerance times the largest value."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * max(1.0, expected.abs().max().item()))


def lively(net: nn.Module) -> nn.Module:
    """The net with weights as large as trained ones."""
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    return net.eval()


def trained(model: nn.Module) -> nn.Module:
    """The model after a training, as it were: what can be trained is random."""
    for parameter in trainable(model).values():
        nn.init.normal_(parameter, std=0.3)
    return model


# Layers and models, with an input for each ----------------------------------------------------------------------------

CONV = (6, 5, 3)
LAYERS = {
    "linear": lambda: nn.Linear(7, 5),
    "linear without bias": lambda: nn.Linear(4, 9, bias=False),
    "convolution": lambda: nn.Conv2d(*CONV, padding=1),
    "strided": lambda: nn.Conv2d(*CONV, stride=2, padding=1, bias=False),
    "strided unevenly": lambda: nn.Conv2d(6, 5, (3, 2), stride=(1, 2), padding=(2, 0)),
    "dilated, circular": lambda: nn.Conv2d(*CONV, padding=2, dilation=2, padding_mode="circular"),
    "reflected": lambda: nn.Conv2d(*CONV, padding=1, padding_mode="reflect"),
    "replicated, same": lambda: nn.Conv2d(*CONV, padding="same", padding_mode="replicate"),
    "1×1": lambda: nn.Conv2d(6, 5, 1),
}
all_layers = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def food(layer: nn.Module) -> torch.Tensor:
    """Something for a layer to read."""
    return wide(3, 6, 9, 8) if isinstance(layer, nn.Conv2d) else wide(3, 2, layer.in_features)


def tiny_dit(kind: str = "adaLN-Zero") -> DiT:
    return lively(DiT(size=8, patch=4, width=16, depth=2, heads=2, ratio=2.5, num_classes=3, conditioning=kind))


IMAGES = (torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.linspace(0.1, 0.9, 4))
TOLD = (*IMAGES, torch.tensor([0, 3, 1, 2]))
TOKENS = (torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1)),)
TEXT = (torch.randint(256, (2, 7), generator=torch.Generator().manual_seed(1)),)
TRANSFORMERS = {
    **{kind: (lambda kind=kind: tiny_dit(kind), TOLD) for kind in ("adaLN-Zero", "cross-attention", "in-context")},
    "language": (lambda: lively(LanguageModel(16, 2, 2, 2.5, length=9)), TEXT),
}
all_transformers = pytest.mark.parametrize("make, given", TRANSFORMERS.values(), ids=TRANSFORMERS)
INSIDE = ("query", "key", "value", "attention.out", "perceptron.0", "perceptron.2")
TARGETS = {
    "DiT": (tiny_dit, TOLD, (*INSIDE, "modulation"), 15),
    "UNet": (
        lambda: lively(UNet(channels=(8, 16), blocks=(1, 1), attention=True, num_classes=3, condition=16)),
        TOLD,
        ("conv1", "conv2", "qkv", "shrink", "modulation", "grow.0"),
        12,
    ),
    "language": (*TRANSFORMERS["language"], INSIDE, 12),
    "attention": (lambda: lively(Attention(12, 3)), TOKENS, ("query", "value"), 2),
}
all_targets = pytest.mark.parametrize("make, given, targets, count", TARGETS.values(), ids=TARGETS)
PLACES = ("enter", "body.0", "body.2")


def updated(rank: int = 2, names: tuple[str, ...] = ("default",), dtype=torch.float32) -> nn.Module:
    """A small base with a trained update of each name on all three of its layers, the last name active."""
    model = nn.Sequential()
    model.enter, model.gelu = nn.Linear(6, 8), nn.GELU()
    model.body = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 5))
    model = model.to(dtype)
    for k, name in enumerate(names):
        trained(add_lora(model, PLACES, rank=rank + k, alpha=1.5 + k, name=name))
    return model


def layers_of(model: nn.Module) -> dict[str, LoRA]:
    return {place: layer for place, layer in model.named_modules() if isinstance(layer, LoRA)}


def numbers(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@contextmanager
def refused(model: nn.Module, message: str, error: type = ValueError):
    """What is done inside raises, says so, and leaves the model as it was."""

    def state():
        active = [(layer.active, layer.scaling, layer.kept is None) for layer in layers_of(model).values()]
        return repr(model), [p.requires_grad for p in model.parameters()], copy.deepcopy(active)

    before, weights = state(), numbers(model)
    with pytest.raises(error, match=message):
        yield
    assert state() == before and equal(numbers(model), weights)


# LoRA: what a layer says ----------------------------------------------------------------------------------------------


def typed_delta(layer: LoRA, weights: dict[str, float]) -> torch.Tensor:
    """Σ w (α/r) BA, an outer product for each of the r, in the shape of the weight."""
    delta = np.zeros(layer.base.weight.shape)
    for name, w in weights.items():
        a, b = (part[name].weight.detach().double().numpy() for part in (layer.down, layer.up))
        for j in range(len(a)):
            delta += w * layer.scaling[name] * np.multiply.outer(b[:, j].ravel(), a[j])
    return torch.from_numpy(delta)


def explicit(base: nn.Module, delta: torch.Tensor) -> nn.Module:
    """Torch's own layer with the weight W_0 + ΔW."""
    layer = copy.deepcopy(base)
    with torch.no_grad():
        layer.weight += delta
    return layer


@all_layers
def test_a_layer_starts_as_its_base(make):
    """Exactly, in float32 too: B is zero, A is not, α/r is the scale, and the new update is the active one."""
    for dtype in (torch.float32, torch.float64):
        base = make().to(dtype)
        layer, x = LoRA(base), food(base).to(dtype)
        expected = base(x)
        assert torch.equal(layer(x), expected)
        layer.add("bold", rank=2, alpha=3.0)
        assert torch.equal(layer(x), expected) and layer(x).dtype == dtype
        assert not layer.up["bold"].weight.any() and layer.down["bold"].weight.abs().min() > 0
        assert (layer.scaling, layer.active) == ({"bold": 1.5}, {"bold": 1.0})
        shape, rest = base.weight.shape, [1] * (base.weight.ndim - 2)
        assert layer.down["bold"].weight.shape == (2, *shape[1:]) and layer.up["bold"].weight.shape == (
            shape[0],
            2,
            *rest,
        )


@all_targets
def test_a_model_starts_as_its_base(make, given, targets, count):
    """Every layer that a target names gets an update, in place, and no bit of what the model says changes; after a training it does."""
    model = make()
    expected, before = model(*given), numbers(model)
    assert add_lora(model, targets, rank=2) is model
    assert len(layers_of(model)) == count and torch.equal(model(*given), expected)
    now = {name.replace(".base.", "."): value for name, value in model.state_dict().items()}
    assert equal({name: now[name] for name in before}, before)
    changed = trained(model)(*given) - expected
    assert changed.abs().max() > 0.01 and changed.isfinite().all()
    assert torch.equal(activate(model)(*given), expected)


@pytest.mark.parametrize("make, k", [
    (lambda: nn.Linear(600, 90), 600), (lambda: nn.Conv2d(40, 90, (3, 5)), 600), (lambda: nn.Conv2d(500, 90, 1), 500)
], ids=["linear", "convolution", "1×1"])  # fmt: skip
def test_a_is_gaussian(make, k):
    """With mean 0 and variance 1/k for k inputs, C·K² of a convolution, whatever r and α: by a Kolmogorov-Smirnov test."""
    layer, draws = LoRA(make()), []
    for rank, alpha in ((8, 1.0), (32, 100.0)):
        layer.add(f"{rank}", rank, alpha, torch.Generator().manual_seed(rank))
        draws.append(layer.down[f"{rank}"].weight.detach().flatten().numpy() * math.sqrt(k))
        assert stats.kstest(draws[-1], "norm").pvalue > 1e-3
    draws = np.concatenate(draws)
    assert abs(draws.var() - 1) < 4 * math.sqrt(2 / len(draws)) and abs(draws.mean()) < 4 / math.sqrt(len(draws))


def test_a_generator_makes_a_reproducible():
    """The same seed gives the same A in every layer, layers have different ones, and so have other seeds."""

    def drawn(seed):
        model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
        add_lora(model, ("0", "1"), rank=2, generator=torch.Generator().manual_seed(seed))
        return [layer.down["default"].weight for layer in layers_of(model).values()]

    (one, two), again, other = drawn(1), drawn(1), drawn(2)
    assert torch.equal(one, again[0]) and torch.equal(two, again[1])
    assert not torch.equal(one, two) and not torch.equal(one, other[0])


@all_layers
def test_an_update_is_an_explicit_weight(make):
    """What a layer says is what torch's own says with W_0 + ΔW, for one update, for several and for none, and for any w."""
    base = make().double()
    layer, x = LoRA(base), food(base)
    for k, name in enumerate(("bold", "thin")):
        layer.add(name, rank=2 + 18 * k, alpha=0.7 + k)  # more than the layers' sides, which does no harm
        assert layer.active == {name: 1.0}
    trained(layer)
    for weights in ({"thin": 1.0}, {"bold": 0.4}, {"bold": 0.5, "thin": -1.5}, {"thin": 2.0, "bold": 0.0}, {}):
        activate(layer, **weights)
        delta = typed_delta(layer, weights)
        near(layer.update(), delta)
        near(layer(x), explicit(base, delta)(x))
    assert np.linalg.matrix_rank(typed_delta(layer, {"bold": 1.0}).flatten(1)) == 2


def test_delta_of_a_convolution_by_torch():
    """ΔW convolved by itself with torch's function is what the update adds: nothing of the bias, strides and paddings alike."""
    base = nn.Conv2d(6, 5, 3, stride=2, padding=1).double()
    layer, x = LoRA(base), food(base)
    layer.add("default", rank=4, alpha=2.0)
    trained(layer)
    near(layer(x) - base(x), F.conv2d(x, typed_delta(layer, {"default": 1.0}), stride=2, padding=1))


def test_two_updates_are_one_of_both_ranks():
    """A stacked, B side by side, each with its own w·α/r: an update of rank r_1 + r_2 says the same as their sum."""
    model, x = updated(1, ("bold", "thin"), torch.float64), wide(4, 6)
    activate(model, bold=0.3, thin=2.0)
    expected = model(x)
    one = add_lora(copy.deepcopy(model), PLACES, rank=3, name="both")
    for layer in layers_of(one).values():
        with torch.no_grad():
            layer.down["both"].weight.copy_(torch.cat([layer.down[name].weight for name in ("bold", "thin")]))
            parts = [w * layer.scaling[name] * layer.up[name].weight for name, w in (("bold", 0.3), ("thin", 2.0))]
            layer.up["both"].weight.copy_(torch.cat(parts, 1))
    near(one(x), expected)


# LoRA: what learns ----------------------------------------------------------------------------------------------------


@all_layers
def test_slopes_are_autograds(make):
    """With G the slope in an explicit weight, those of A and B are s·BᵀG and s·GAᵀ; nothing else has one. At the start A has none."""
    base = make().double()
    model = add_lora(nn.Sequential(base), ("0",), rank=3, alpha=2.0)
    layer, x = model[0], food(base)
    for awake in (False, True):
        trained(model) if awake else None
        target = torch.randn_like(base(x))
        weight = explicit(base, typed_delta(layer, {"default": 1.0}))
        weight.weight.requires_grad_(True)
        (slope,) = torch.autograd.grad((weight(x) - target).square().sum(), weight.weight)
        model.zero_grad()
        (model(x) - target).square().sum().backward()
        a, b = layer.down["default"].weight, layer.up["default"].weight
        s, g = 2 / 3, slope.flatten(1)
        near(a.grad.flatten(1), s * b.detach().flatten(1).T @ g)
        near(b.grad.flatten(1), s * g @ a.detach().flatten(1).T)
        assert bool(a.grad.any()) == awake and b.grad.any()
        assert base.weight.grad is None and (base.bias is None or base.bias.grad is None)
    assert set(trainable(model)) == {"0.down.default.weight", "0.up.default.weight"}


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_best_update_is_eckart_youngs(rank):
    """Trained to its best on ‖W_0 + ΔW − M‖², rank r leaves Σ_{i>r} σ_i² of M − W_0, by numpy's singular values."""
    base, goal = nn.Linear(6, 5, bias=False).double(), wide(5, 6)
    layer = add_lora(nn.Sequential(base), ("0",), rank=rank, alpha=2.0)[0]
    a, b = layer.down["default"].weight, layer.up["default"].weight
    left = np.linalg.svd((goal - base.weight.detach()).numpy(), compute_uv=False)[rank:]

    def loss(values):
        with torch.no_grad():
            a.copy_(torch.from_numpy(values[: a.numel()]).view_as(a))
            b.copy_(torch.from_numpy(values[a.numel() :]).view_as(b))
        error = (layer(torch.eye(6, dtype=torch.float64)).T - goal).square().sum()
        slopes = torch.autograd.grad(error, [a, b])
        return error.item(), torch.cat([slope.flatten() for slope in slopes]).numpy()

    found = optimize.minimize(
        loss, np.random.default_rng(0).normal(size=rank * 11), jac=True, method="L-BFGS-B", tol=1e-14
    )
    assert found.fun == pytest.approx((left**2).sum(), rel=1e-6)


def test_parameters():
    """r(d + k) for a layer of d × k, r(CK² + d) for a convolution; only the newest update learns, and no base."""
    for make in LAYERS.values():
        base = make()
        model = add_lora(nn.Sequential(base), ("0",), rank=2)
        assert sum(p.numel() for p in trainable(model).values()) == 2 * (base.weight[0].numel() + len(base.weight))
    model = add_lora(model, ("0",), rank=1, name="newer")
    assert set(trainable(model)) == {"0.down.newer.weight", "0.up.newer.weight"}


@pytest.mark.parametrize("dtype, own", [
    (torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)
], ids=str)  # fmt: skip
@pytest.mark.parametrize("make", [LAYERS["linear"], LAYERS["convolution"]], ids=["linear", "convolution"])
def test_types(make, dtype, own):
    """A and B are in float32 at least, what is said stays in the base's type, and a small update of a coarse base is not lost."""
    base = make().to(dtype)
    model, x = add_lora(nn.Sequential(base), ("0",), rank=2), food(base).to(dtype)
    assert torch.equal(model(x), base(x)) and model(x).dtype == dtype
    a, b = model[0].down["default"].weight, trained(model)[0].up["default"].weight
    assert a.dtype == b.dtype == model[0].update().dtype == own
    expected = explicit(base.double(), model[0].update().double())(x.double())
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    base.to(dtype)
    near(model(x).double(), expected, tolerance)
    with torch.autocast("cpu", torch.bfloat16):
        near(model(x).double(), expected, 5e-2)


def test_an_update_goes_where_its_base_is():
    """On the base's device: with no storage of its own on the device that has none."""
    model = add_lora(nn.Sequential(nn.Linear(3, 4), nn.Conv2d(3, 4, 2)).to("meta"), ("0", "1"), rank=1)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    dit = DiT(size=8, width=16, depth=1).to("meta")
    for model in (add_adapters(copy.deepcopy(dit), bottleneck=2), add_prefix(dit, length=2, hidden=3)):
        assert {p.device.type for p in trainable(model).values()} == {"meta"}


# LoRA: which layers and updates ---------------------------------------------------------------------------------------


def test_targets_are_whole_names_or_their_ends():
    """A name, or what follows a dot; not a part of a word; an update's own layers are no targets; a layer named twice gets one."""

    def chosen(*targets):
        model = nn.ModuleDict({
            "out": nn.Linear(2, 2), "layout": nn.Linear(2, 2),
            "block": nn.ModuleDict({"out": nn.Linear(2, 2), "down": nn.Linear(2, 2), "base": nn.Linear(2, 2)}),
        })  # fmt: skip
        add_lora(model, ("out",), rank=1)
        add_lora(model, targets, rank=1, name="new")
        return {place for place, layer in layers_of(model).items() if "new" in layer.down}

    assert chosen("out") == {"out", "block.out"}
    assert chosen("block.out") == {"block.out"} == chosen("block.out", "block.out")
    assert chosen("layout") == {"layout"} and chosen("layout", "out") == {"layout", "out", "block.out"}
    assert chosen("base") == {"block.base"} and chosen("down") == {"block.down"}


def test_updates_are_chosen_and_added():
    """Each by its name, several by their weights, in every layer that has them; none is the base, bit by bit."""
    model, x = updated(1, (), torch.float64), wide(4, 6)
    alone = model(x)
    trained(add_lora(model, ("enter", "body.2"), rank=2, alpha=3.0, name="bold"))
    bold = model(x)
    trained(add_lora(model, ("body.0", "body.2"), rank=1, name="thin"))
    thin = model(x)
    places = {"bold": ("enter", "body.2"), "thin": ("body.0", "body.2")}
    for weights in ({"bold": 1.0}, {"thin": 1.0}, {"bold": 0.5, "thin": 0.25}, {"thin": -1.0, "bold": 2.0}, {}):
        assert activate(model, **weights) is model
        plain = copy.deepcopy(model)
        for place, layer in layers_of(model).items():
            here = {name: w for name, w in weights.items() if place in places[name]}
            assert layer.active == here
            plain.set_submodule(place, explicit(layer.base, typed_delta(layer, here)))
        near(model(x), plain(x))
    assert torch.equal(activate(model)(x), alone)
    assert torch.equal(activate(model, bold=1)(x), bold) and torch.equal(activate(model, thin=1)(x), thin)


UNKNOWN = r"^weights must name updates of the model, bold, thin; got 'blod'"


@pytest.mark.parametrize("change, message, error", [
    (lambda m: activate(m, blod=1.0), UNKNOWN, ValueError),
    (lambda m: activate(m, bold=1.0, blod=1.0), UNKNOWN, ValueError),
    (lambda m: add_lora(m, ("enter", "nope"), rank=1, name="new"), "^targets must name layers .* none is called 'nope'", ValueError),
    (lambda m: add_lora(m, ("enter", ""), rank=1, name="new"), "^targets must name layers .* none is called ''", ValueError),
    (lambda m: add_lora(m, (), rank=1, name="new"), "^targets must name layers", ValueError),
    (lambda m: add_lora(m, "enter", rank=1, name="new"), r"^targets must be several names, such as \('enter',\); got one", TypeError),
    (lambda m: add_lora(m, ("enter", "gelu"), rank=1, name="new"), "^base must be nn.Linear or nn.Conv2d; got GELU", TypeError),
    (lambda m: add_lora(m, ("enter", "body"), rank=1, name="new"), "^base must be nn.Linear or nn.Conv2d; got Sequential", TypeError),
    (lambda m: add_lora(m, ("enter",), rank=0, name="new"), "^rank must be a whole number of at least 1; got 0", ValueError),
    (lambda m: add_lora(m, ("enter",), rank=2.0, name="new"), "^rank must be a whole number of at least 1; got 2.0", ValueError),
    (lambda m: add_lora(m, ("enter", "body.2"), rank=1, name="thin"), "^name must be new; there is an update 'thin'", ValueError),
    (lambda m: add_lora(m, ("enter",), rank=1, name="bold"), "^name must be new; there is an update 'bold'", ValueError),
    (lambda m: add_lora(m, ("enter",), rank=1, name="a.b"), "^name must be a word without a dot; got 'a.b'", ValueError),
    (lambda m: add_lora(m, ("enter",), rank=1, name=""), "^name must be a word without a dot; got ''", ValueError),
    (lambda m: add_lora(m, ("enter",), rank=1, name="train"), "^name must .* got 'train'", ValueError),
    (lambda m: add_lora(m, ("enter",), rank=1, name="keys"), "^name must .* got 'keys'", ValueError),
    (lambda m: add_lora(m, ("enter",), rank=1, alpha="much", name="new"), "much", ValueError),
])  # fmt: skip
def test_a_wrong_wish_changes_nothing(change, message, error):
    """The error names the argument, what came and what is asked; whichever layer it is about, all are as they were."""
    model = updated(1, ("bold", "thin"))
    with refused(model, message, error):
        change(model)


def test_the_base_is_checked():
    """Other layers, and convolutions with groups, are refused; without any update the error says so."""
    for layer in (nn.Embedding(3, 4), nn.Conv1d(2, 2, 1), nn.ConvTranspose2d(2, 2, 1), nn.LayerNorm(3)):
        with pytest.raises(TypeError, match=f"^base must be nn.Linear or nn.Conv2d; got {type(layer).__name__}"):
            LoRA(layer)
    with refused(
        model := nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), "^base must be a convolution without groups; got 2"
    ):
        add_lora(model, ("0",), rank=1)
    with pytest.raises(ValueError, match="^weights must name updates of the model, which has none; got 'bold'"):
        activate(nn.Linear(2, 2), bold=1.0)
    assert set(trainable(model)) == {"0.weight", "0.bias"}


@pytest.mark.parametrize("name", ["model", "self", "name", "weights", "add", "größer", "two words"])
def test_any_other_word_is_a_name(name, tmp_path):
    """Also one that is the name of an argument: it can be added, chosen, saved and read."""
    model, x = updated(1, (name,)), torch.randn(2, 6)
    expected = model(x)
    assert torch.equal(activate(activate(model), **{name: 1.0})(x), expected)
    save_lora(model, tmp_path, name)
    assert torch.equal(load_lora(plain_of(model), tmp_path, name)(x), expected)


# LoRA: merging --------------------------------------------------------------------------------------------------------


@all_layers
def test_merged_is_unmerged(make):
    """The weight becomes W_0 + ΔW of what is active, the layer says the same, and costs one product."""
    base = make().double()
    model, x = trained(add_lora(nn.Sequential(base), ("0",), rank=2, alpha=3.0)), food(base)
    trained(add_lora(model, ("0",), rank=1, name="other"))
    for weights in ({"default": 1.0}, {"default": 0.5, "other": -2.0}, {}):
        expected, before = activate(model, **weights)(x), base.weight.clone()
        assert merge(model) is model
        near(base.weight.detach(), before + typed_delta(model[0], weights))
        near(model(x), expected)
        assert torch.equal(model(x), base(x))
        assert unmerge(model) is model and torch.equal(base.weight, before) and torch.equal(model(x), expected)


@all_targets
def test_a_merged_model(make, given, targets, count):
    """In the whole model merging changes nothing but rounding, twice is once, and the copy of `merged` is a model like its base."""
    base, given = make().double(), [part.double() if part.is_floating_point() else part for part in given]
    model = trained(add_lora(copy.deepcopy(base), targets, rank=2, alpha=3.0))
    expected, before = model(*given), numbers(model)
    plain = merged(model)
    assert equal(numbers(model), before) and torch.equal(model(*given), expected)
    assert repr(plain) == repr(base) and plain.state_dict().keys() == base.state_dict().keys()
    assert not layers_of(plain) and sum(p.numel() for p in plain.parameters()) == sum(
        p.numel() for p in base.parameters()
    )
    near(plain(*given), expected)
    merge(model)
    once = numbers(model)
    near(model(*given), expected)
    assert equal(numbers(merge(model)), once) and equal(numbers(merged(model)), numbers(plain))
    assert equal(numbers(unmerge(unmerge(model))), before) and torch.equal(model(*given), expected)
    with torch.no_grad():
        for p in plain.parameters():
            p.zero_()
    assert torch.equal(model(*given), expected)
    assert isinstance(merged(next(iter(layers_of(model).values()))), (nn.Linear, nn.Conv2d))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_hundred_switches_leave_no_trace(dtype):
    """Merged and unmerged a hundred times, now one update and now both: the base is the old one, bit by bit, and so is its print."""
    model = updated(1, ("bold", "thin"), dtype)
    before, print_before = numbers(model), fingerprint(model)
    for k in range(100):
        merge(activate(model, **({"bold": 1.0}, {"thin": 1.0}, {"bold": 0.5, "thin": 0.5})[k % 3]))
        assert k % 20 or fingerprint(model) == print_before and not equal(numbers(model), before)
        unmerge(model)
    assert equal(numbers(model), before) and fingerprint(model) == print_before


def test_merging_rounds_once():
    """A bfloat16 weight plus ΔW is the nearest bfloat16 to their sum, worked out exactly, although BA by itself is not one."""
    base = nn.Linear(32, 24, bias=False).bfloat16()
    model = trained(add_lora(nn.Sequential(base), ("0",), rank=4, alpha=1.0))
    with torch.no_grad():
        model[0].up["default"].weight.mul_(0.02)
    exact = base.weight.detach().double() + typed_delta(model[0], {"default": 1.0})
    merge(model)
    up, down = (torch.nextafter(base.weight.detach(), torch.tensor(sign * torch.inf)).double() for sign in (1, -1))
    found = base.weight.detach().double()
    assert ((found - exact).abs() <= torch.minimum((up - exact).abs(), (down - exact).abs())).all()
    rounded = model[0].kept + typed_delta(model[0], {"default": 1.0}).bfloat16()
    assert not torch.equal(rounded, base.weight)


def test_while_merged_nothing_else_is_chosen():
    """Other updates, and other choices, wait for `unmerge`; what is said stays what was merged."""
    model, x = merge(updated(1, ("bold", "thin"))), torch.randn(2, 6)
    expected = model(x)
    for change in (
        lambda: activate(model, bold=1.0),
        lambda: activate(model),
        lambda: add_lora(model, ("enter",), rank=1, name="new"),
    ):
        with refused(model, "^model must not be merged for .*; call unmerge first"):
            change()
    assert torch.equal(model(x), expected)
    unmerge(model)
    near(activate(model, thin=1.0)(x), expected, 1e-5)


def test_a_merged_model_can_be_moved():
    """The kept weight follows the model to another type, and comes back with it; a state dict holds no copy of it."""
    model = updated(1)
    keys = list(model.state_dict())
    merge(model).double()
    assert list(model.state_dict()) == keys
    before = {name: value.double() for name, value in numbers(unmerge(copy.deepcopy(model))).items()}
    assert fingerprint(model) == fingerprint(unmerge(copy.deepcopy(model)))
    assert equal(numbers(unmerge(model)), before) and not equal(numbers(merge(model)), before)


def test_a_deep_copy_is_independent():
    """Trained, switched or merged, a copy leaves the first model alone."""
    model, x = updated(1, ("bold", "thin")), torch.randn(2, 6)
    expected, other = model(x), copy.deepcopy(model)
    assert torch.equal(other(x), expected)
    trained(other)
    assert torch.equal(model(x), expected) and not torch.equal(other(x), expected)
    merge(activate(other, bold=1.0))
    assert torch.equal(model(x), expected) and layers_of(model)["enter"].active == {"thin": 1.0}
    unmerge(model)
    assert layers_of(other)["enter"].kept is not None


# Adapters -------------------------------------------------------------------------------------------------------------


def typed_adapter(adapter: Adapter, h: torch.Tensor) -> torch.Tensor:
    """h + W_up GELU(W_down h + b_down) + b_up, with GELU(x) = x Φ(x)."""
    own = dict(adapter.named_parameters())
    inside = h @ own["down.weight"].T + own["down.bias"]
    inside = inside * (1 + torch.erf(inside / math.sqrt(2))) / 2
    return h + inside @ own["up.weight"].T + own["up.bias"]


@pytest.mark.parametrize("bottleneck", [1, 3, 12])
def test_an_adapter(bottleneck):
    """Exactly the identity at the start, when only what leads up has a slope; then its formula. It is not linear."""
    h = wide(2, 5, 8)
    adapter = Adapter(8, bottleneck).double()
    assert torch.equal(adapter(h), h)
    adapter(h).square().sum().backward()
    assert [bool(p.grad.any()) for p in adapter.parameters()] == [False, False, True, True]
    near(lively(adapter)(h), typed_adapter(adapter, h), 1e-12)
    assert (
        adapter(2 * h) - adapter(torch.zeros_like(h)) - 2 * (adapter(h) - adapter(torch.zeros_like(h)))
    ).abs().max() > 1e-3


@all_transformers
@pytest.mark.parametrize("placement, number", [("Houlsby", 2), ("Pfeiffer", 1)])
def test_adapters_stand_at_the_ends_of_the_branches(make, given, placement, number):
    """A model starts as its base, bit by bit. Then it is its base with what attention and perceptron say sent through an adapter each."""
    model = make()
    base, expected = copy.deepcopy(model), model(*given)
    assert add_adapters(model, bottleneck=3, placement=placement) is model
    assert torch.equal(model(*given), expected)
    found = [layer for layer in trained(model).modules() if isinstance(layer, Adapter)]
    assert len(found) == 2 * number and all(layer.down.weight.shape == (3, 16) for layer in found)
    assert sum(p.numel() for p in trainable(model).values()) == 2 * number * (2 * 3 * 16 + 3 + 16)
    for k, block in enumerate(base.blocks):
        for branch, adapter in zip((block.attention, block.perceptron)[-number:], found[number * k :], strict=False):
            branch.register_forward_hook(lambda module, given, out, adapter=adapter: typed_adapter(adapter, out))
    assert not torch.allclose(base(*given), expected, atol=0.01)
    near(model(*given), base(*given), 1e-5)


def test_adapters_take_the_base_as_it_is():
    """Of its type; its weights are frozen and stay, a cross-attention has none, and of Houlsby's placement is the default."""
    model = tiny_dit("cross-attention").double()
    before = numbers(model)
    add_adapters(model, bottleneck=2)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    after = {name.replace("attention.out.0.", "attention.out."): value for name, value in model.state_dict().items()}
    assert equal({name: after[name] for name in before}, before)
    layers = {name.split(".", 2)[2].rsplit(".", 1)[0] for name in trainable(model)}
    assert layers == {f"{place}.{layer}" for place in ("attention.out.1", "perceptron.3") for layer in ("down", "up")}


@pytest.mark.parametrize("settings, message", [
    ({"placement": "houlsby"}, "^placement must be one of Houlsby, Pfeiffer; got 'houlsby'"),
    ({"placement": None}, "^placement must be one of Houlsby, Pfeiffer; got None"),
    ({"bottleneck": 0}, "^bottleneck must be a whole number of at least 1; got 0"),
    ({"bottleneck": 2.5}, "^bottleneck must be a whole number of at least 1; got 2.5"),
])  # fmt: skip
def test_adapters_are_checked(settings, message):
    """A wrong wish, or a second one, changes nothing."""
    model = tiny_dit()
    with refused(model, message):
        add_adapters(model, **{"bottleneck": 2} | settings)
    add_adapters(model, bottleneck=2, placement="Pfeiffer")
    with refused(model, "^model must not have adapters yet"):
        add_adapters(model, bottleneck=2)


class Blocks(nn.Module):
    """A model with blocks that are no transformer's."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(2, 2)])


@pytest.mark.parametrize("make", [
    Blocks, lambda: nn.Linear(2, 2), lambda: UNet(channels=(8, 8), blocks=(1, 1)), lambda: nn.TransformerEncoderLayer(4, 1)
], ids=["Blocks", "Linear", "UNet", "TransformerEncoderLayer"])  # fmt: skip
@pytest.mark.parametrize(
    "add", [lambda m: add_adapters(m, bottleneck=1), lambda m: add_prefix(m, length=1)], ids=["adapters", "prefix"]
)
def test_only_transformers_of_the_course(add, make):
    """Another model is refused and named, and stays as it was."""
    with refused(
        model := make(), f"^model must be a transformer of the course, .* got {type(model).__name__}", TypeError
    ):
        add(model)


# Prefix tuning: one attention -----------------------------------------------------------------------------------------


def prefixed(kind: type, heads: int, length: int) -> tuple[PrefixAttention, torch.Tensor]:
    """An attention of width 12 with random keys and values before its own."""
    prefix = wide(2, length, 12)
    return PrefixAttention(lively(kind(12, heads)).double(), lambda: prefix), prefix


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize(
    "kind, others", [(Attention, None), (Attention, 7), (CausalAttention, None)], ids=["own", "context", "causal"]
)
def test_prefix_attention_by_loops(length, heads, kind, others):
    """N × (P + M) weights that sum to 1 and the output, head by head and token by token; all of the prefix is in every token's sight."""
    attention, prefix = prefixed(kind, heads, length)
    h, context = wide(2, 4, 12), None if others is None else wide(2, others, 12)
    weights, out = typed_attention(attention.attention, h, context, prefix, causal=kind is CausalAttention)
    found = attention.weights(h, context)
    assert found.shape == (2, heads, 4, length + (others or 4)) and (found[..., :length] > 0).all()
    near(found, weights, 1e-12)
    near(found.sum(-1), torch.ones(2, heads, 4).double(), 1e-14)
    near(attention(h, context), out, 1e-12)


@pytest.mark.parametrize("kind", [Attention, CausalAttention])
def test_prefix_attention_by_torchs_functions(kind):
    """Torch's scaled dot product with P columns of its mask open to all; for P = 1 its module with one more key and value."""
    attention, prefix = prefixed(kind, 3, 5)
    own, h = attention.attention, wide(2, 4, 12)
    k, v = (
        torch.cat([part.expand(2, -1, -1), layer(h)], 1)
        for part, layer in zip(prefix, (own.key, own.value), strict=True)
    )
    heads = [part.unflatten(2, (3, 4)).transpose(1, 2) for part in (own.query(h), k, v)]
    sight = torch.ones(4, 4, dtype=torch.bool)
    sight = torch.cat([torch.ones(4, 5, dtype=torch.bool), sight.tril() if kind is CausalAttention else sight], 1)
    mixed = F.scaled_dot_product_attention(*heads, attn_mask=sight)
    near(attention(h), own.out(mixed.transpose(1, 2).flatten(2)), 1e-12)
    attention, prefix = prefixed(kind, 3, 1)
    own, theirs = attention.attention, nn.MultiheadAttention(12, 3, batch_first=True, add_bias_kv=True).double()
    parts = (own.query, own.key, own.value)
    theirs.load_state_dict({
        "in_proj_weight": torch.cat([part.weight for part in parts]), "in_proj_bias": torch.cat([part.bias for part in parts]),
        "out_proj.weight": own.out.weight, "out_proj.bias": own.out.bias, "bias_k": prefix[0][None], "bias_v": prefix[1][None],
    })  # fmt: skip
    out, weights = theirs(h, h, h, attn_mask=~sight[:, 5:], average_attn_weights=False)
    near(attention(h), out, 1e-12)
    near(attention.weights(h), weights.roll(1, -1), 1e-12)


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("kind", [Attention, CausalAttention])
def test_a_prefix_takes_its_share(length, kind):
    """(1 − λ)·attention + λ·attention to the prefix, λ the prefix's part of the softmax from both log-sum-exps (He et al., eq. 7)."""
    attention, prefix = prefixed(kind, 1, length)
    own, h = attention.attention, wide(2, 4, 12)
    own.out = nn.Identity()
    q, k = own.query(h), own.key(h)
    scores = torch.einsum("bnd,bmd->bnm", q, k) / math.sqrt(12)
    if kind is CausalAttention:
        scores = scores + torch.full((4, 4), -torch.inf, dtype=torch.float64).triu(1)
    to_prefix = torch.einsum("bnd,pd->bnp", q, prefix[0]) / math.sqrt(12)
    of_own, of_prefix = scores.logsumexp(2, keepdim=True), to_prefix.logsumexp(2, keepdim=True)
    share = (of_prefix - of_own).sigmoid()
    near(attention(h), (1 - share) * own(h) + share * (to_prefix.softmax(2) @ prefix[1]))
    near(attention.weights(h)[:, 0, :, :length].sum(2, keepdim=True), share)


@pytest.mark.parametrize("length", [1, 5])
def test_zero_keys_and_values_are_not_the_identity(length):
    """A zero key takes e⁰ of the softmax, so P of them leave Σ/(P + Σ) of what was said, with Σ the sum of the own exponentials."""
    attention, _ = prefixed(Attention, 1, length)
    attention.read = lambda: torch.zeros(2, length, 12, dtype=torch.float64)
    own, h = attention.attention, wide(2, 4, 12)
    own.out = nn.Identity()
    total = (own.query(h) @ own.key(h).mT / math.sqrt(12)).exp().sum(2, keepdim=True)
    near(attention(h), own(h) * total / (length + total))
    assert (attention(h) - own(h)).abs().max() > 0.05


@pytest.mark.parametrize("kind", [Attention, CausalAttention])
def test_keys_and_values_of_tokens_are_those_tokens(kind):
    """If the prefix is what the layer makes of more tokens, the rest says what it would say behind them: only then it is a prompt."""
    attention, _ = prefixed(kind, 3, 1)
    own, before, h = attention.attention, wide(1, 5, 12), wide(1, 4, 12)
    attention.read = lambda: torch.stack([own.key(before)[0], own.value(before)[0]])
    whole = torch.cat([before, h], 1)
    near(attention(h), own(whole)[:, 5:], 1e-12)
    near(attention.weights(h), own.weights(whole)[:, :, 5:], 1e-12)


def test_a_prefix_of_a_whole_model_is_a_cache():
    """With what each layer made of a beginning as its prefix, the language model's blocks go on as if they had read it."""
    model, x = TRANSFORMERS["language"][0]().double(), torch.randint(256, (1, 9))
    h = model.table(x) + model.positions.weight
    expected, rest, seen = h, h[:, 4:], []
    for block in model.blocks:
        inside = block.norm1(expected)[:, :4]
        seen.append([block.attention.key(inside)[0], block.attention.value(inside)[0]])
        expected = block(expected, None)
    add_prefix(model, length=4)
    with torch.no_grad():
        model.prefix.table.weight.copy_(torch.cat([part for pair in seen for part in pair], 1))
    for block in model.blocks:
        rest = block(rest, None)
    near(rest, expected[:, 4:], 1e-11)


# Prefix tuning: the table, and the model ------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [None, 7])
def test_a_prefix_is_a_table(hidden):
    """A row for each token: keys and values of layer after layer; with a perceptron, W_2 tanh(W_1 E + b_1) + b_2 writes the rows."""
    prefix = lively(Prefix(5, layers=3, width=4, hidden=hidden)).double()
    own = dict(prefix.named_parameters())
    rows = own["table.weight"]
    assert rows.shape == ((5, 24) if hidden is None else (5, 4))
    if hidden is not None:
        rows = torch.tanh(rows @ own["transform.0.weight"].T + own["transform.0.bias"])
        rows = rows @ own["transform.2.weight"].T + own["transform.2.bias"]
    for layer in range(3):
        for which in range(2):
            columns = 4 * (2 * layer + which)
            near(prefix()[layer, which], rows[:, columns : columns + 4], 1e-14)
        assert torch.equal(prefix.layer(layer), prefix()[layer])
    prefix().square().sum().backward()
    assert all(p.grad.any() for p in prefix.parameters())


@all_transformers
@pytest.mark.parametrize("hidden", [None, 6])
def test_every_block_reads_its_part(make, given, hidden):
    """The model is its base with each block's self-attention by loops behind keys and values of its own: not the identity, not before
    a training and not after; a cross-attention is left alone."""
    model = make().double()
    given = [part.double() if part.is_floating_point() else part for part in given]
    base, before = copy.deepcopy(model), model(*given)
    assert add_prefix(model, length=3, hidden=hidden) is model
    for awake in (False, True):
        out = (trained(model) if awake else model)(*given)
        typed = copy.deepcopy(base)
        for block, keys_values in zip(typed.blocks, model.prefix(), strict=True):
            causal = isinstance(block.attention, CausalAttention)
            block.attention.forward = lambda h, own=block.attention, part=keys_values, causal=causal: typed_attention(
                own, h, None, part, causal
            )[1]
        near(out, typed(*given))
        assert (out - before).abs().max() > 1e-3
    size = 3 * 2 * 2 * 16 if hidden is None else 3 * 16 + (16 + 1) * 6 + (6 + 1) * 2 * 2 * 16
    assert sum(p.numel() for p in trainable(model).values()) == size
    assert set(trainable(model)) == {f"prefix.{name}" for name, _ in model.prefix.named_parameters()}


@pytest.mark.parametrize("kind, tokens", [("adaLN-Zero", 4), ("cross-attention", 4), ("in-context", 6)])
def test_maps_of_a_prefix(kind, tokens):
    """As many queries as before, and P more keys, in each block."""
    model = add_prefix(tiny_dit(kind), length=3)
    maps = attention_maps(model, *TOLD)
    assert [tuple(one.shape) for one in maps] == 2 * [(4, 2, tokens, 3 + tokens)]
    for one in maps:
        torch.testing.assert_close(one.sum(-1), torch.ones(4, 2, tokens))


@torch.no_grad()
def test_a_prefix_keeps_the_language_model_causal():
    """Every byte sees the whole prefix, the first too, and none sees a later byte."""
    model, x = add_prefix(TRANSFORMERS["language"][0]().double(), length=4), torch.randint(256, (1, 7))
    out = model(x)
    for place in range(7):
        other = x.clone()
        other[:, place] = (other[:, place] + 1) % 256
        changed = (model(other) - out).abs().amax((0, 2))
        assert (changed[:place] < 1e-12).all() and (changed[place:] > 1e-3).all()
    for token in range(4):
        before = model.prefix.table.weight[token].clone()
        model.prefix.table.weight[token] += 1
        assert ((model(x) - out).abs().amax((0, 2)) > 1e-4).all()
        model.prefix.table.weight[token] = before


@all_transformers
def test_a_folded_prefix_says_the_same(make, given):
    """The table alone, bit by bit; as many numbers as 2LPd; it can be trained on, folded again, and a table has nothing to fold."""
    model = trained(add_prefix(make(), length=3, hidden=5))
    expected, table = model(*given), model.prefix()
    assert fold(model) is model
    assert torch.equal(model(*given), expected) and torch.equal(model.prefix(), table)
    assert set(trainable(model)) == {"prefix.table.weight"} and model.prefix.table.weight.shape == (3, 2 * 2 * 16)
    folded = model.prefix.table
    assert torch.equal(fold(model)(*given), expected) and model.prefix.table is folded
    model(*given).square().sum().backward()
    assert model.prefix.table.weight.grad.any()


def test_the_prefix_of_a_copy_belongs_to_the_copy():
    """Changed, or folded, it leaves the first model alone, and the other way round."""
    for hidden in (None, 4):
        model = trained(add_prefix(tiny_dit(), length=2, hidden=hidden))
        other, expected = copy.deepcopy(model), model(*TOLD)
        assert torch.equal(other(*TOLD), expected)
        trained(other)
        assert torch.equal(model(*TOLD), expected) and not torch.allclose(other(*TOLD), expected, atol=1e-3)
        changed = fold(other)(*TOLD)
        trained(model)
        assert torch.equal(other(*TOLD), changed) and not torch.allclose(model(*TOLD), expected, atol=1e-3)


@pytest.mark.parametrize("name", ["length", "layers", "width", "hidden"])
@pytest.mark.parametrize("value", [0, -1, 1.5, None])
def test_sizes_of_a_prefix(name, value):
    """Each is a whole number of at least 1; only without `hidden` there is no perceptron."""
    settings = {"length": 2, "layers": 2, "width": 4, "hidden": 3} | {name: value}
    if (name, value) == ("hidden", None):
        assert Prefix(**settings).transform is None
        return
    with pytest.raises(ValueError, match=f"^{name} must be a whole number of at least 1; got {value}"):
        Prefix(**settings)
    if name in ("length", "hidden"):
        with refused(model := tiny_dit(), f"^{name} must be a whole number of at least 1; got {value}"):
            add_prefix(model, **{"length": 2, name: value})


def test_a_second_prefix_is_refused():
    """One prefix for a model, of its type; and a model without one has none to fold."""
    model = tiny_dit().double()
    with refused(model, "^model must have a prefix; this DiT has none"):
        fold(model)
    add_prefix(model, length=2, hidden=3)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    with refused(model, "^model must not have a prefix yet"):
        add_prefix(model, length=2)


# What is frozen -------------------------------------------------------------------------------------------------------


def test_freeze_and_trainable():
    """Freezing holds all, in place, keeps what is said, and `trainable` names what is left: the very parameters."""
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    assert {name: id(p) for name, p in trainable(model).items()} == {
        name: id(p) for name, p in model.named_parameters()
    }
    assert freeze(model) is model and trainable(model) == {}
    model[1].bias.requires_grad_(True)
    assert trainable(model) == {"1.bias": model[1].bias}


@pytest.mark.parametrize(
    "make", [tiny_dit, TRANSFORMERS["language"][0], TARGETS["UNet"][0]], ids=["DiT", "language", "UNet"]
)
def test_biases_alone(make):
    """Every parameter that is called bias, and no other; also after all were frozen."""
    model = make()
    assert train_biases(freeze(model)) is model
    assert set(trainable(model)) == {name for name, _ in model.named_parameters() if name.endswith(".bias")}
    assert all(p.ndim == 1 for p in trainable(model).values())


def test_only_what_is_called_bias():
    """A model that is a layer itself has one; a word that ends so is none; a model without any is refused and stays as it was."""
    assert set(trainable(train_biases(nn.Linear(2, 2)))) == {"bias"}
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
    model[1].register_parameter("unbias", nn.Parameter(torch.zeros(2)))
    assert set(trainable(train_biases(model))) == {"0.bias"}
    with refused(model := nn.Linear(2, 2, bias=False), "^model must have biases; this Linear has none"):
        train_biases(model)


KINDS = {
    "LoRA": lambda m: add_lora(m, ("query", "value", "perceptron.0"), rank=2),
    "Houlsby": lambda m: add_adapters(m, bottleneck=2),
    "Pfeiffer": lambda m: add_adapters(m, bottleneck=2, placement="Pfeiffer"),
    "prefix": lambda m: add_prefix(m, length=2),
    "prefix by a perceptron": lambda m: add_prefix(m, length=2, hidden=4),
    "biases": train_biases,
}
all_kinds = pytest.mark.parametrize("add", KINDS.values(), ids=KINDS)


def fitted(model: nn.Module) -> training.Fit:
    """A few steps of the course's own training: of a DiT in a denoiser, or of a language model."""
    settings = {"steps": 4, "lr": 1e-2, "weight_decay": 0.1, "progress": False, "precision": "float32"}
    if isinstance(model, LanguageModel):

        def loss(m, x):
            return F.cross_entropy(m(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())

        return training.fit(model, loss, lambda step: {"x": TEXT[0]}, **settings)
    d = Denoiser(model, Cosine(), "v")
    return training.fit(d, losses.simple, training.batches(TOLD[0], d.path, size=4, y=TOLD[2], null=3), **settings)


@pytest.mark.parametrize("make, given", [TRANSFORMERS["adaLN-Zero"], TRANSFORMERS["language"]], ids=["DiT", "language"])
@all_kinds
def test_a_training_leaves_the_base_alone(make, given, add):
    """The course's own loop, with weight decay: what is frozen is the same bit by bit, all that is trained has moved; the average is a
    model of its own, with its own prefix."""
    model = add(make())
    frozen, free = {}, {}
    for name, p in model.named_parameters():
        (free if p.requires_grad else frozen)[name] = p.detach().clone()
    done = fitted(model)
    average = done.ema if isinstance(model, LanguageModel) else done.ema.net
    for which in (model, average):
        now = dict(which.named_parameters())
        assert equal({name: now[name].detach() for name in frozen}, frozen)
        assert all(not torch.equal(now[name], free[name]) for name in free if not name.endswith("key.bias"))
    assert set(trainable(model)) == set(free) and not trainable(average)
    said = average(*given)
    trained(model)
    assert torch.equal(average(*given), said)
    lively(average.requires_grad_(True))
    assert not torch.allclose(average(*given), said, atol=1e-3)


PAIRS = [
    ("LoRA", "Houlsby"),
    ("LoRA", "prefix"),
    ("Houlsby", "LoRA"),
    ("Houlsby", "prefix"),
    ("prefix", "LoRA"),
    ("prefix", "Pfeiffer"),
]


@pytest.mark.parametrize("first, second", [*PAIRS, ("prefix by a perceptron", "Houlsby")])
def test_one_beside_another(first, second):
    """An update, adapters and a prefix can stand in one model: each starts as it would alone, and only the newest is trained."""
    model = trained(KINDS[first](tiny_dit()))
    before, said = {name: p.detach().clone() for name, p in trainable(model).items()}, model(*TOLD)
    KINDS[second](model)
    assert torch.equal(model(*TOLD), said) == (second != "prefix")
    assert trainable(model) and not set(trainable(model)) & set(before)
    changed = trained(model)(*TOLD)
    assert not torch.allclose(changed, said, atol=1e-3)


# Files ----------------------------------------------------------------------------------------------------------------

ROOT = "base_model.model."
FILES = ("adapter_config.json", "adapter_model.safetensors")


def plain_of(model: nn.Module) -> nn.Module:
    """The base of a model, without its updates."""
    model = copy.deepcopy(unmerge(model))
    for place, layer in layers_of(model).items():
        model.set_submodule(place, layer.base)
    return model


def rewritten(folder: Path, config=None, tensors=None, metadata=None) -> None:
    """Change entries of the settings, None takes one away; put other tensors, and other metadata, in the file of weights."""
    file = folder / FILES[0]
    settings = json.loads(file.read_text()) | (config or {})
    file.write_text(
        json.dumps({key: value for key, value in settings.items() if value is not None or key not in (config or {})})
    )
    if tensors is not None or metadata is not None:
        found = load_file(folder / FILES[1]) if tensors is None else tensors
        save_file(
            {key: value.clone().contiguous() for key, value in found.items()}, folder / FILES[1], metadata=metadata
        )


@pytest.fixture
def model() -> nn.Module:
    """A base with the trained updates "bold", of rank 2, and "thin", of rank 3, which is active."""
    return updated(2, ("bold", "thin"))


@pytest.fixture
def folder(model, tmp_path) -> Path:
    """A folder with "thin"."""
    save_lora(model, tmp_path / "thin", "thin")
    return tmp_path / "thin"


def test_a_file_holds_a_and_b_alone(model, tmp_path):
    """Two files: A and B of each layer bit by bit, nothing of the base and of other updates; r, α and the names of the layers."""
    file = save_lora(model, str(tmp_path / "new" / "folder"), "bold")
    assert file == tmp_path / "new" / "folder" / FILES[1] and sorted(
        path.name for path in file.parent.iterdir()
    ) == list(FILES)
    expected = {}
    for place in ("enter", "body.0", "body.2"):
        layer = model.get_submodule(place)
        expected |= {
            f"{ROOT}{place}.lora_A.weight": layer.down["bold"].weight,
            f"{ROOT}{place}.lora_B.weight": layer.up["bold"].weight,
        }
    assert equal(load_file(file), expected)
    assert file.stat().st_size < 4 * sum(t.numel() for t in expected.values()) + 1500
    config = json.loads((file.parent / FILES[0]).read_text())
    asked = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 1.5,
        "target_modules": ["body.0", "body.2", "enter"],
        "bias": "none",
        "use_dora": False,
    }
    assert config | asked == config and not config["use_rslora"] and config["lora_dropout"] == 0


def test_prints_are_sha256_of_the_weights(model):
    """Of the base's parameters in their order, byte by byte, whatever stands beside them, is merged, or how they lie in memory; of 0
    and −0, which are equal, both are 0."""
    base = plain_of(model)
    expected = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in base.parameters())).hexdigest()
    assert {
        fingerprint(base),
        fingerprint(model),
        fingerprint(activate(model)),
        fingerprint(merge(activate(model, bold=1.0))),
    } == {expected}
    assert fingerprint(copy.deepcopy(model)) == expected == fingerprint(unmerge(model))
    assert fingerprint(merged(activate(model, bold=1.0))) != expected
    image = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Conv2d(4, 3, 1)).requires_grad_(False)
    image[0].bias[1] = 0.0
    before = fingerprint(image)
    image[0].bias[1] = -0.0
    assert fingerprint(image.to(memory_format=torch.channels_last)) == before != fingerprint(image.bfloat16())


def test_every_weight_is_in_the_print(model):
    """One last bit of any parameter of the base is another print: weights, biases, norms and single numbers; A and B are not in it."""
    model.norm = nn.LayerNorm(5)
    model.register_parameter("single", nn.Parameter(torch.tensor(1.5)))
    before = fingerprint(model)
    for name, p in model.named_parameters():
        kept = p.detach().clone()
        p.data.view(-1)[-1] = torch.nextafter(kept.view(-1)[-1], torch.tensor(9.0))
        assert (fingerprint(model) == before) == (".down." in name or ".up." in name), name
        p.data.copy_(kept)
    assert fingerprint(model) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_round_trip(dtype, tmp_path):
    """On a fresh copy of the base under another name: A, B and the scale bit by bit; saved once more the files say the same."""
    model, x = updated(3, ("bold",), dtype), torch.randn(2, 6).to(dtype)
    fresh = plain_of(model)
    first = save_lora(merge(model), tmp_path / "one", "bold")
    assert load_lora(fresh, tmp_path / "one", name="again") is fresh
    for one, other in zip(layers_of(unmerge(model)).values(), layers_of(fresh).values(), strict=True):
        assert other.active == {"again": 1.0} and one.scaling["bold"] == other.scaling["again"]
        assert (
            torch.equal(one.down["bold"].weight, other.down["again"].weight)
            and one.up["bold"].weight.dtype == other.up["again"].weight.dtype
        )
    assert torch.equal(fresh(x), model(x)) and set(trainable(fresh)) == {
        name for name in dict(fresh.named_parameters()) if "again" in name
    }
    second = save_lora(fresh, tmp_path / "two", "again")
    assert equal(load_file(first), load_file(second))
    assert (first.parent / FILES[0]).read_bytes() == (second.parent / FILES[0]).read_bytes()


@pytest.mark.parametrize("alpha, rank", [(29, 7), (1, 3), (0.1, 6), (58, 7), (16.0, 8)])
def test_scales_come_back(alpha, rank, tmp_path):
    """α/r to the last bit, though it is α that is written."""
    model = add_lora(nn.Sequential(nn.Linear(8, 8)), ("0",), rank=rank, alpha=alpha)
    save_lora(model, tmp_path)
    assert load_lora(plain_of(model), tmp_path)[0].scaling["default"] == alpha / rank
    assert json.loads((tmp_path / FILES[0]).read_text())["lora_alpha"] == pytest.approx(alpha, rel=1e-15)


def test_convolutions_come_back(tmp_path):
    """The whole U-Net, with convolutions that a training laid out in another order."""
    make, given, targets, _ = TARGETS["UNet"]
    model = make()
    fresh = copy.deepcopy(model)
    trained(add_lora(model, targets, rank=2, alpha=1.0)).to(memory_format=torch.channels_last)
    save_lora(model, tmp_path)
    torch.testing.assert_close(load_lora(fresh, tmp_path)(*given), model(*given), rtol=1e-4, atol=1e-5)


def test_many_users_on_one_base(model, tmp_path):
    """Read one after the other onto one base, each is what it was; all can be switched, added and taken off."""
    x, base = torch.randn(2, 6), plain_of(model)
    alone = base(x)
    said = {name: activate(model, **{name: 1.0})(x) for name in ("bold", "thin")}
    both = activate(model, bold=0.5, thin=0.5)(x)
    for name in ("bold", "thin"):
        save_lora(model, tmp_path / name, name)
        load_lora(base, tmp_path / name, name)
        assert torch.equal(base(x), said[name])
    assert torch.equal(activate(base, bold=1.0)(x), said["bold"]) and torch.equal(
        activate(base, bold=0.5, thin=0.5)(x), both
    )
    assert torch.equal(activate(base)(x), alone)


def test_only_its_layers_get_an_update(tmp_path):
    """Those of the file by their whole names: a layer whose name ends alike gets none, be it a layer that could have one or not."""
    for other in (nn.Linear(4, 4), nn.ReLU()):
        base = nn.Sequential(nn.Linear(4, 4), nn.Sequential(other))
        model = freeze(copy.deepcopy(base))
        model[0] = LoRA(model[0])
        model[0].add("default", rank=2, alpha=1.0)
        save_lora(trained(model), tmp_path)
        assert set(layers_of(load_lora(base, tmp_path))) == {"0"}


class Crash(Exception):
    pass


@pytest.mark.parametrize("where", ["write", "replace"])
def test_a_crash_leaves_the_old_files_or_the_new(where, model, folder, monkeypatch):
    """While a file is written, or before it takes its place: the folder can be read, and says what it said."""
    before = {name: (folder / name).read_bytes() for name in FILES}
    write = Path.write_bytes

    def half(self, content):
        write(self, content[: len(content) // 2])
        raise Crash

    def crash(*arguments):
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(*(Path, "write_bytes", half) if where == "write" else (os, "replace", crash))
        with pytest.raises(Crash):
            save_lora(trained(copy.deepcopy(model)), folder, "thin")
    assert {name: (folder / name).read_bytes() for name in FILES} == before
    save_lora(model, folder, "bold")
    assert sorted(path.name for path in folder.iterdir() if path.suffix != ".part") == list(FILES)
    assert layers_of(load_lora(plain_of(model), folder))["enter"].down["default"].weight.shape == (2, 6)


@pytest.mark.parametrize("name, message", [
    ("blod", "^name must be an update of the model, bold, thin; got 'blod'"),
    ("uneven", "^the layers of update 'uneven' must have one rank and one scale"),
    ("louder", "^the layers of update 'louder' must have one rank and one scale"),
])  # fmt: skip
def test_what_cannot_be_saved(name, message, model, tmp_path):
    """An update that is not there, or that has no one rank and scale; nothing is written."""
    layer, other = layers_of(model)["enter"], layers_of(model)["body.0"]
    if name != "blod":
        layer.add(name, 2, 2.0)
        other.add(name, *((1, 1.0) if name == "uneven" else (2, 4.0)))
        message += r"; got \["
    with pytest.raises(ValueError, match=message):
        save_lora(model, tmp_path / "new", name)
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="^name must be an update of the model, which has none; got 'default'"):
        save_lora(nn.Linear(2, 2), tmp_path / "new")


OTHER = "was trained on another base.*"
BASES = {
    "other weights": lambda m: m.body[2].bias.data.view(-1)[-1:].add_(1e-3),
    "one bit": lambda m: m.enter.weight.data.view(torch.int32)[0, 0].bitwise_xor_(1),
    "another type": lambda m: m.double(),
    "one parameter more": lambda m: setattr(m, "more", nn.Linear(5, 5)),
    "another width": lambda m: m.body.__setitem__(2, nn.Linear(8, 6)),
}


@pytest.mark.parametrize("change", BASES.values(), ids=BASES)
def test_another_base_is_refused(change, model, folder):
    """The print tells, before anything is changed, and both prints are said."""
    base = plain_of(model)
    change(base)
    with refused(
        base,
        f"was trained on another base: fingerprint {fingerprint(model)[:12]}…, this model's is {fingerprint(base)[:12]}…",
    ):
        load_lora(base, folder)


@pytest.mark.parametrize("change, message", [
    (lambda m: m.body.__setitem__(2, nn.Linear(8, 6)), OTHER + r"body\.2 has shape \(6, 8\), its A and B \(3, 8\) and \(5, 3\)"),
    (lambda m: setattr(m, "enter", nn.Linear(7, 8)), OTHER + r"enter has shape \(8, 7\), its A and B \(3, 6\) and \(8, 3\)"),
    (lambda m: setattr(m, "enter", nn.Conv2d(6, 8, 1)), OTHER + r"enter has shape \(8, 6, 1, 1\)"),
    (lambda m: setattr(m, "body", nn.Sequential(nn.Linear(8, 8))), OTHER + r"this model has no layer body\.2"),
    (lambda m: m.body.__setitem__(0, nn.GELU()), OTHER + r"body\.0 has shape None"),
], ids=["d", "k", "kind", "missing", "no weight"])  # fmt: skip
def test_without_a_print_names_and_shapes_tell(change, message, model, folder):
    """As in files by PEFT: what does not fit is named, and no layer is changed."""
    rewritten(folder, metadata={"format": "pt"})
    base = plain_of(model)
    assert layers_of(load_lora(copy.deepcopy(base), folder)).keys() == set(PLACES)
    change(base)
    with refused(base, message):
        load_lora(base, folder)


MORE = {
    "DoRA": {"use_dora": True}, "biases": {"bias": "all"}, "biases of LoRA": {"bias": "lora_only"},
    "further layers": {"modules_to_save": ["head"]}, "ranks": {"rank_pattern": {"enter": 1}}, "scales": {"alpha_pattern": {"enter": 1}},
    "after a word": {"alora_invocation_tokens": [1]}, "from the base's own directions": {"init_lora_weights": "pissa"},
    "from its QR": {"init_lora_weights": "olora"}, "another method": {"peft_type": "LOHA"}, "no method": {"peft_type": None},
}  # fmt: skip


@pytest.mark.parametrize("config", MORE.values(), ids=MORE)
def test_more_than_lora_is_refused(config, model, folder):
    """What would be read wrong is not read: the error says what the file asks for, and the model is as it was."""
    rewritten(folder, config)
    with refused(model, "must hold a plain LoRA; got"):
        load_lora(model, folder, "new")


@pytest.mark.parametrize("config", [
    {"lora_dropout": 0.1}, {"use_dora": None, "bias": None, "rank_pattern": None}, {"inference_mode": False}, {"unheard_of": 1},
    {"init_lora_weights": "gaussian"}, {"init_lora_weights": False},
], ids=str)  # fmt: skip
def test_what_changes_nothing_is_read(config, model, folder):
    """Dropout, notes of PEFT, and settings that are missing because the file is older."""
    x = torch.randn(2, 6)
    expected = model(x)
    rewritten(folder, config)
    assert torch.equal(load_lora(plain_of(model), folder)(x), expected)


def test_rank_stabilised(model, folder):
    """With "use_rslora" the scale is α/√r."""
    rewritten(folder, {"use_rslora": True, "lora_alpha": 5})
    assert layers_of(load_lora(plain_of(model), folder))["body.0"].scaling["default"] == pytest.approx(
        5 / math.sqrt(3), rel=1e-15
    )


A, B = f"{ROOT}body.0.lora_A.weight", f"{ROOT}body.0.lora_B.weight"
DAMAGE = {
    "a B less": lambda s: {key: value for key, value in s.items() if key != B},
    "an A less": lambda s: {key: value for key, value in s.items() if key != A},
    "no A": lambda s: {key: value for key, value in s.items() if ".lora_B." in key},
    "nothing": lambda s: {},
    "a tensor more": lambda s: s | {f"{ROOT}body.0.lora_magnitude_vector": torch.ones(8)},
    "a bias more": lambda s: s | {f"{ROOT}body.0.lora_B.bias": torch.ones(8)},
    "a weight of the base": lambda s: s | {f"{ROOT}body.0.weight": torch.ones(8, 8)},
    "without the root": lambda s: {key.removeprefix(ROOT): value for key, value in s.items()},
    "a layer of an update": lambda s: {key.replace("body.0", "body.0.base"): value for key, value in s.items()},
    "another rank in A": lambda s: s | {A: torch.ones(2, 8)},
    "another rank in B": lambda s: s | {B: torch.ones(8, 2)},
    "another rank in both": lambda s: s | {A: torch.ones(2, 8), B: torch.ones(8, 2)},
    "A is no matrix": lambda s: s | {A: torch.ones(3)},
    "B is no matrix": lambda s: s | {B: torch.ones(8)},
    "B is a convolution's": lambda s: s | {B: torch.ones(8, 3, 1, 1)},
    "a row for a matrix": lambda s: s | {B: torch.ones(1, 3)},
}  # fmt: skip


@pytest.mark.parametrize("printed", [True, False], ids=["ours", "PEFT's"])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_tensors_that_do_not_fit(damage, printed, model, folder):
    """Too few, too many or in other shapes than the settings and the layers ask for: refused before any layer is changed."""
    metadata = {"base": fingerprint(model)} if printed else {"format": "pt"}
    rewritten(folder, tensors=damage(load_file(folder / FILES[1])), metadata=metadata)
    with refused(model, "must hold lora_A|was trained on another base|is incomplete"):
        load_lora(model, folder, "new")


@pytest.mark.parametrize("file, content", [
    (FILES[0], b""), (FILES[0], b"{"), (FILES[0], b"[]"), (FILES[0], b"3"), (FILES[0], b"\xff\xfe"), (FILES[0], b'{"peft_type": "LORA"}'),
    (FILES[0], b'{"peft_type": "LORA", "r": 3}'), (FILES[0], b'{"peft_type": "LORA", "r": 3, "lora_alpha": null}'),
    (FILES[0], b'{"peft_type": "LORA", "r": 3, "lora_alpha": "much"}'), (FILES[0], b'{"peft_type": "LORA", "r": null, "lora_alpha": 3}'),
    (FILES[1], b""), (FILES[1], b"no weights"), (FILES[1], None),
])  # fmt: skip
def test_damaged_files(file, content, model, folder):
    """No JSON, no settings, or no whole file of weights: a ValueError that names the folder, and the model is as it was."""
    (folder / file).write_bytes((folder / file).read_bytes()[:-7] if content is None else content)
    with refused(model, f"^{folder} holds no update that can be read"):
        load_lora(model, folder, "new")


@pytest.mark.parametrize("file", FILES)
def test_missing_files(file, model, folder):
    """The error says which, and what the folder must hold."""
    (folder / file).unlink()
    with refused(model, f"^folder must hold {FILES[0]} and {FILES[1]}; there is no {folder / file}", FileNotFoundError):
        load_lora(model, str(folder), "new")


@pytest.mark.parametrize(
    "name, message", [("thin", "^name must be new"), ("a.b", "^name must be a word without a dot"), ("", "^name must")]
)
def test_names_of_what_is_read(name, message, model, folder):
    """One that is taken, or that is no word, is refused; so is any while updates are merged."""
    with refused(model, message):
        load_lora(model, folder, name)
    with refused(merge(model), "^model must not be merged"):
        load_lora(model, folder, "new")
