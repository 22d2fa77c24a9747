r"""LoRA: the change of a weight written as a product of two thin matrices, :math:`\Delta W = \tfrac{\alpha}{r} BA`."""

import copy

import torch
from torch import Tensor, nn

from dgm_course.peft.freezing import freeze

__all__ = ["LoRA", "activate", "add_lora", "merge", "merged", "unmerge"]


class LoRA(nn.Module):
    r"""A frozen layer, and beside it any number of low-rank updates, of which some are active.

    .. math:: h = W_0 x + \sum_i w_i\,\frac{\alpha_i}{r_i}\,B_i A_i x

    A is Gaussian with variance 1/k for k inputs, B is zero: the layer starts as it was. A convolution with kernel K has
    its A as a convolution with the same kernel to r channels and its B as one with kernel 1; seen as a matrix of C·K² columns, its
    ΔW is again (α/r)BA.

    Arguments:
        base: The layer: `nn.Linear`, or `nn.Conv2d` without groups.

    Attributes:
        down, up: A and B of each update, by name.
        scaling: α/r of each update.
        active: w of each update that is added; empty for the base alone.

    Shapes:
        As the base's; A (r, k), B (d, r) for W_0 (d, k).

    Raises:
        TypeError: If `base` is another kind of layer.
        ValueError: If it is a convolution with groups.

    Source:
        | Slides "Low-Rank Adaptation"; LoRA (Hu et al., 2021), eq. 3 and section 4.1

    Example:
        >>> layer = LoRA(nn.Linear(8, 4))
        >>> layer.add("bold", rank=2, alpha=2.0)
        >>> (layer(torch.ones(1, 8)) == layer.base(torch.ones(1, 8))).all().item()
        True
    """

    def __init__(self, base: nn.Linear | nn.Conv2d):
        super().__init__()
        if not isinstance(base, (nn.Linear, nn.Conv2d)):
            raise TypeError(f"base must be nn.Linear or nn.Conv2d; got {type(base).__name__}")
        if isinstance(base, nn.Conv2d) and base.groups != 1:
            raise ValueError(f"base must be a convolution without groups; got {base.groups} groups")
        self.base = base
        self.down, self.up = nn.ModuleDict(), nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self.active: dict[str, float] = {}
        self.register_buffer("kept", None, persistent=False)  # the base's weight, while an update is merged into it

    def check(self, name: str, rank: int) -> None:
        """Raise a ValueError if no update of this name and rank can be added."""
        if not (isinstance(rank, int) and rank >= 1):
            raise ValueError(f"rank must be a whole number of at least 1; got {rank!r}")
        if name in self.down:
            raise ValueError(f"name must be new; there is an update {name!r} already")
        if hasattr(self.down, name):  # a module of that name would hide what every module has
            raise ValueError(f"name must not be one that every module has, such as 'train'; got {name!r}")

    def add(self, name: str, rank: int, alpha: float, generator: torch.Generator | None = None) -> None:
        """Add an update; it becomes the only active one."""
        self.check(name, rank)
        if isinstance(self.base, nn.Conv2d):
            same = {key: getattr(self.base, key) for key in ("stride", "padding", "dilation", "padding_mode")}
            a = nn.Conv2d(self.base.in_channels, rank, self.base.kernel_size, bias=False, **same)
            b = nn.Conv2d(rank, self.base.out_channels, 1, bias=False)
        else:
            a = nn.Linear(self.base.in_features, rank, bias=False)
            b = nn.Linear(rank, self.base.out_features, bias=False)
        weight = self.base.weight
        nn.init.normal_(a.weight, std=weight[0].numel() ** -0.5, generator=generator)
        nn.init.zeros_(b.weight)
        precision = torch.promote_types(weight.dtype, torch.float32)  # a small update would be lost in a lower one
        self.down[name], self.up[name] = a.to(weight.device, precision), b.to(weight.device, precision)
        self.scaling[name] = alpha / rank
        self.active = {name: 1.0}

    def forward(self, x: Tensor) -> Tensor:
        h = self.base(x)
        if self.kept is not None:  # what is active is in the base's weight
            return h
        for name, w in self.active.items():
            a, b = self.down[name], self.up[name]
            h = h + (w * self.scaling[name] * b(a(x.to(a.weight.dtype)))).to(h.dtype)
        return h

    def update(self) -> Tensor:
        r"""What the active updates add to the weight, :math:`\Delta W = \sum_i w_i\,(\alpha_i/r_i)\,B_i A_i`, of its shape."""
        total = torch.zeros_like(self.base.weight, dtype=torch.promote_types(self.base.weight.dtype, torch.float32))
        for name, w in self.active.items():
            product = self.up[name].weight.flatten(1) @ self.down[name].weight.flatten(1)
            total += w * self.scaling[name] * product.view_as(total)
        return total

    @torch.no_grad()
    def merge(self) -> None:
        """Put the active updates into the base's weight. The sum is rounded once, and a second call changes nothing."""
        if self.kept is None:
            self.kept = self.base.weight.detach().clone()
            self.base.weight.copy_(self.kept + self.update())

    @torch.no_grad()
    def unmerge(self) -> None:
        """Give the base its weight back, bit for bit: taking ΔW away again would leave the rounding of two sums."""
        if self.kept is not None:
            self.base.weight.copy_(self.kept)
            self.kept = None


def add_lora(
    model: nn.Module,
    targets: tuple[str, ...] | list[str],
    *,
    rank: int,
    alpha: float | None = None,
    name: str = "default",
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Freeze a model and put an update of low rank beside each target layer, in place. Only the new update is trained.

    Arguments:
        model: Any module; one that has updates already gets another.
        targets: Names of layers; a layer matches if its name is one of them or ends in a dot and one of them.
        rank: r; more than the least side of a weight is of no use.
        alpha: α of the scale α/r; None for α = r.
        name: Name of the update; the only active one afterwards.
        generator: Source of A.

    Returns:
        The model.

    Raises:
        ValueError: If a target names no layer, `rank` is out of range, `name` is taken, has a dot or is empty, or updates are
            merged. The model is as before.
        TypeError: If a target is a layer of another kind, or `targets` is one string.

    Source:
        | Slides "Low-Rank Adaptation"; LoRA (Hu et al., 2021), section 4

    Example:
        >>> from dgm_course.nets.dit import Attention
        >>> layer = add_lora(Attention(32, 4), ("query", "value"), rank=2)
        >>> sum(p.numel() for p in layer.parameters() if p.requires_grad)
        256
    """
    if isinstance(targets, str):
        raise TypeError(f"targets must be several names, such as ({targets!r},); got one string")
    layers = dict(model.named_modules())
    inside = tuple(f"{place}." for place, layer in layers.items() if isinstance(layer, LoRA))
    found = {}
    for target in targets:
        chosen = {
            place: layer
            for place, layer in layers.items()
            if place and (place == target or place.endswith("." + target)) and not place.startswith(inside)
        }
        if not chosen:
            raise ValueError(f"targets must name layers of the model; none is called {target!r}")
        found |= chosen
    return put_lora(model, found, rank, float(rank if alpha is None else alpha), name, generator)


def put_lora(
    model: nn.Module,
    layers: dict[str, nn.Module],
    rank: int,
    alpha: float,
    name: str,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """`add_lora` for layers by their whole names, and no others."""
    if not name or "." in name:
        raise ValueError(f"name must be a word without a dot; got {name!r}")
    if not layers:
        raise ValueError("targets must name layers of the model; got none")
    new = {place: layer if isinstance(layer, LoRA) else LoRA(layer) for place, layer in layers.items()}
    _unmerged(model, "adding an update")
    for layer in new.values():  # all before one is put in place, so that an error leaves the model as it was
        layer.check(name, rank)
    freeze(model)
    for place, layer in new.items():
        layer.add(name, rank, alpha, generator)
        parent, _, child = place.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    return activate(model, **{name: 1.0})


def activate(model: nn.Module, /, **weights: float) -> nn.Module:
    """Choose which updates are added, and how much of each, in every layer of a model: `activate(model, bold=1.0)`.

    Several are added: `activate(model, bold=0.5, thin=0.5)`. None is the base alone: `activate(model)`.

    Raises:
        ValueError: If no layer has an update of that name, or updates are merged.

    Example:
        >>> model = add_lora(nn.Sequential(nn.Linear(2, 2)), ["0"], rank=1, name="bold")
        >>> activate(model)[0].active, activate(model, bold=0.5)[0].active
        ({}, {'bold': 0.5})
    """
    layers = lora_layers(model)
    known = sorted({name for layer in layers for name in layer.down})
    if unknown := [name for name in weights if name not in known]:
        raise ValueError(
            f"weights must name updates of the model, {', '.join(known) or 'which has none'}; got {unknown[0]!r}"
        )
    _unmerged(model, "another choice of updates")
    for layer in layers:
        layer.active = {name: float(w) for name, w in weights.items() if name in layer.down}
    return model


def merge(model: nn.Module) -> nn.Module:
    """Put the active updates into the weights, in place: the model then costs what its base costs.

    Each layer keeps its old weight for `unmerge`. Merging twice changes nothing. For a model without traces, see `merged`.

    Source:
        | LoRA (Hu et al., 2021), section 4.1, "No Additional Inference Latency"
    """
    for layer in lora_layers(model):
        layer.merge()
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Give every layer of a merged model its old weight back, bit for bit, in place."""
    for layer in lora_layers(model):
        layer.unmerge()
    return model


def merged(model: nn.Module) -> nn.Module:
    """A copy of the model with plain layers, whose weights are W_0 + ΔW: the same modules, sizes and cost as its base.

    Example:
        >>> model = add_lora(nn.Sequential(nn.Linear(2, 2)), ["0"], rank=1)
        >>> merged(model)
        Sequential(
          (0): Linear(in_features=2, out_features=2, bias=True)
        )
    """
    model = merge(copy.deepcopy(model))
    if isinstance(model, LoRA):
        return model.base
    for place, layer in list(model.named_modules()):
        if isinstance(layer, LoRA):
            parent, _, child = place.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.base)
    return model


def lora_layers(model: nn.Module) -> list[LoRA]:
    """The layers of a model that have updates."""
    return [layer for layer in model.modules() if isinstance(layer, LoRA)]


def _unmerged(model: nn.Module, wish: str) -> None:
    if any(layer.kept is not None for layer in lora_layers(model)):
        raise ValueError(f"model must not be merged for {wish}; call unmerge first")
