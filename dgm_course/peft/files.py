"""Files that hold an update alone, in the form of the library PEFT: `adapter_config.json` and `adapter_model.safetensors`."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as write_tensors
from torch import nn

from dgm_course.checkpoints import replace
from dgm_course.peft.lora import LoRA, activate, lora_layers, put_lora

__all__ = ["fingerprint", "load_lora", "save_lora"]

ROOT = "base_model.model."  # what PEFT's wrappers put before a layer's name
UNREAD = {"use_dora": False, "bias": "none", "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {}}
REFUSED = UNREAD | {"alora_invocation_tokens": None, "use_bdlora": None, "kasa_config": None}
BEGINNINGS = (True, False, None, "gaussian", "orthogonal", "eva")  # others change the base's weights too


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the base's weights, without any updates: what an update was trained on.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> from dgm_course.peft import add_lora
        >>> before = fingerprint(model)
        >>> fingerprint(add_lora(model, ["0"], rank=1)) == before
        True
    """
    layers = lora_layers(model)
    updates = {id(p) for layer in layers for part in (layer.down, layer.up) for p in part.parameters()}
    kept = {id(layer.base.weight): layer.kept for layer in layers if layer.kept is not None}
    digest = hashlib.sha256()
    for p in model.parameters():
        if id(p) not in updates:
            weight = kept.get(id(p), p).detach().cpu() + 0  # −0 becomes the 0 that it equals
            digest.update(weight.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_lora(model: nn.Module, folder: str | Path, name: str = "default") -> Path:
    """Write one update to a folder: its A and B in each layer, r and α, and the fingerprint of the base.

    PEFT reads it with `PeftModel.from_pretrained(base, folder)`.

    Returns:
        The file with the weights.

    Raises:
        ValueError: If the model has no update of that name, or its layers differ in rank or scale.
    """
    layers = {place: layer for place, layer in model.named_modules() if isinstance(layer, LoRA) and name in layer.down}
    if not layers:
        known = sorted({name for layer in lora_layers(model) for name in layer.down})
        raise ValueError(f"name must be an update of the model, {', '.join(known) or 'which has none'}; got {name!r}")
    kinds = {(layer.down[name].weight.shape[0], layer.scaling[name]) for layer in layers.values()}
    if len(kinds) > 1:
        raise ValueError(f"the layers of update {name!r} must have one rank and one scale; got {sorted(kinds)}")
    rank, scaling = kinds.pop()
    tensors = {}
    for place, layer in layers.items():
        tensors[f"{ROOT}{place}.lora_A.weight"] = layer.down[name].weight.detach().cpu().contiguous()
        tensors[f"{ROOT}{place}.lora_B.weight"] = layer.up[name].weight.detach().cpu().contiguous()
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": scaling * rank,
        "target_modules": sorted(layers),
        "lora_dropout": 0.0,
        "use_rslora": False,
        "inference_mode": True,
        "base_model_name_or_path": None,
    } | UNREAD
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    replace(folder / "adapter_model.safetensors", write_tensors(tensors, {"format": "pt", "base": fingerprint(model)}))
    replace(folder / "adapter_config.json", (json.dumps(config, indent=2) + "\n").encode())
    return folder / "adapter_model.safetensors"


@torch.no_grad()
def load_lora(model: nn.Module, folder: str | Path, name: str = "default") -> nn.Module:
    """Read an update, by `save_lora` or by PEFT, and add it to a model, in place; it becomes the only active one.

    Arguments:
        model: The base that it was trained on, with other updates or without.
        folder: Where the two files are.
        name: Name under which to add it; the file does not say one.

    Returns:
        The model.

    Raises:
        FileNotFoundError: If one of the files is missing.
        ValueError: If the files are damaged, ask for more than LoRA, or belong to another base: its fingerprint (files by PEFT
            have none), the names or the shapes of its layers differ. The model is as before.
    """
    folder = Path(folder)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / file).is_file():
            raise FileNotFoundError(
                f"folder must hold adapter_config.json and adapter_model.safetensors; there is no {folder / file}"
            )
    rank, alpha, tensors, base = _read(folder)
    if base is not None and base != fingerprint(model):
        raise ValueError(
            f"{folder} was trained on another base: fingerprint {base[:12]}…, this model's is {fingerprint(model)[:12]}…"
        )
    places = sorted({key.removeprefix(ROOT)[: -len(".lora_A.weight")] for key in tensors})
    layers = {place: _fitting(model, place, rank, tensors, folder) for place in places}
    put_lora(model, layers, rank, alpha, name)
    for place in places:
        layer = model.get_submodule(place)
        layer.down[name].weight.copy_(tensors[f"{ROOT}{place}.lora_A.weight"])
        layer.up[name].weight.copy_(tensors[f"{ROOT}{place}.lora_B.weight"])
    return activate(model, **{name: 1.0})


def _read(folder: Path) -> tuple[int, float, dict, str | None]:
    """Rank, α, the tensors and the base's fingerprint; refused if damaged or if they ask for more than LoRA."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            tensors, base = {key: file.get_tensor(key) for key in file.keys()}, (file.metadata() or {}).get("base")
        lora = config.get("peft_type") == "LORA"
        rank, alpha = (int(config["r"]), float(config["lora_alpha"])) if lora else (0, 0.0)
        more = {key: config[key] for key, usual in REFUSED.items() if config.get(key) not in (usual, None)}
        if (beginning := config.get("init_lora_weights")) not in BEGINNINGS:
            more["init_lora_weights"] = beginning
    except (SafetensorError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{folder} holds no update that can be read: {type(error).__name__}, {error}") from error
    if not lora or more:
        raise ValueError(f"{folder} must hold a plain LoRA; got {more or config.get('peft_type')}")
    strange = [
        key for key in tensors if not key.endswith((".lora_A.weight", ".lora_B.weight")) or not key.startswith(ROOT)
    ]
    if (
        strange
        or not tensors
        or any(key.replace(".lora_A.", ".lora_B.") not in tensors for key in tensors)
        or any(key.replace(".lora_B.", ".lora_A.") not in tensors for key in tensors)
    ):
        raise ValueError(
            f"{folder} must hold lora_A of rank {rank} and lora_B for each layer; got {strange or sorted(tensors)}"
        )
    return rank, alpha * (rank**0.5 if config.get("use_rslora") else 1), tensors, base


def _fitting(model: nn.Module, place: str, rank: int, tensors: dict, folder: Path) -> nn.Module:
    """The layer of the model, if it has one there of which A and B have the shape."""
    layers = dict(model.named_modules())
    layer, around = layers.get(place), layers.get(place.rpartition(".")[0])
    if layer is None or isinstance(around, LoRA):
        raise ValueError(f"{folder} was trained on another base: this model has no layer {place}")
    weight = getattr(layer.base if isinstance(layer, LoRA) else layer, "weight", None)
    a, b = (tuple(tensors[f"{ROOT}{place}.lora_{letter}.weight"].shape) for letter in "AB")
    found = None if weight is None else tuple(weight.shape)
    if found is None or a != (rank, *found[1:]) or b != (found[0], rank, *[1] * len(found[2:])):
        raise ValueError(
            f"{folder} was trained on another base, or with another rank than {rank}: "
            f"{place} has shape {found}, its A and B {a} and {b}"
        )
    return layer
