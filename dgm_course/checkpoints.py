"""Trained models that are shipped with the course: safetensors for the weights, and a JSON card that describes them."""

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as read_tensors
from safetensors.torch import save as write_tensors
from torch import nn

from dgm_course import flows, gan, nets, paths, vae
from dgm_course.denoisers import Denoiser

__all__ = ["build", "load", "names", "path_of", "save"]

FOLDER = Path(__file__).parent / "weights"


def names() -> list[str]:
    """The names of the shipped checkpoints.

    Example:
        >>> "mnist-unet" in names()
        True
    """
    return sorted(card.stem for card in FOLDER.glob("*.json"))


def load(name: str, folder: str | Path = FOLDER) -> Denoiser | nn.Module:
    """A trained denoiser in eval mode, float32, with its path as `.path` and its card as `.card`.

    A classifier, a flow, a VAE and a GAN have no path: they come as they are, with their card.

    Arguments:
        name: One of `names()`.
        folder: Where to look; the shipped checkpoints unless you trained your own.

    Raises:
        ValueError: If there is no such checkpoint, or its files are damaged or do not fit each other.

    Example:
        >>> load("mnist-unet").card["predicts"]
        'v'
    """
    folder = Path(folder)
    known = sorted(card.stem for card in folder.glob("*.json"))
    if name not in known:
        raise ValueError(f"name must be one of {', '.join(known) or f'(none in {folder})'}; got {name!r}")
    file = folder / f"{name}.safetensors"
    try:
        card = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        model, expected = build(card), card["sha256"]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / name}.json describes no checkpoint: {type(error).__name__}, {error}") from error
    if not file.is_file():
        raise ValueError(f"{file} is missing; its card is there")
    content = file.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise ValueError(f"{file} is damaged: its SHA-256 is {found[:12]}…, its card says {expected[:12]}…")
    try:
        _net(model).load_state_dict(read_tensors(content))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{file} does not hold the network that its card describes: {error}") from error
    model.card = card
    return model.to(memory_format=torch.channels_last).eval().requires_grad_(False)  # faster (bench/backbones.py)


def build(card: dict) -> Denoiser | nn.Module:
    """The denoiser that a card describes, with fresh weights; or the network itself, if it `"classifies"` or is a language model.

    A card names the class and the settings of the network, `"net": {"class": "UNet", …}`, and likewise of the path; or
    of a whole `"model"`, a flow, a VAE or a GAN.
    """
    if "model" in card:
        model = dict(card["model"])
        return {"RealNVP": flows.RealNVP, "ConvVAE": vae.ConvVAE, "ConvGAN": gan.ConvGAN}[model.pop("class")](**model)
    net = dict(card["net"])
    net = getattr(nets, net.pop("class"))(**net)
    if "classifies" in card or isinstance(net, nets.LanguageModel):
        return net
    return Denoiser(net, path_of(card), predicts=card["predicts"], learned_variance=card.get("learned_variance", False))


def path_of(card: dict) -> paths.GaussianPath:
    """The path that a card names, `"path": {"class": "Cosine", …}`."""
    settings = dict(card["path"])
    return getattr(paths, settings.pop("class"))(**settings)


def save(name: str, model: Denoiser | nn.Module, card: dict, folder: str | Path) -> None:
    """Write `<name>.safetensors`, in float16, and `<name>.json`, which is the card and the hash of the weights.

    Raises:
        ValueError: If a weight is not finite in float16, whose largest number is 65,504.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.to("cpu", torch.float16).contiguous() for key, value in _net(model).state_dict().items()}
    for key, value in tensors.items():
        if not value.isfinite().all():
            raise ValueError(f"model: its weight {key} is not finite in float16")
    content = write_tensors(tensors)
    card = {**card, "sha256": hashlib.sha256(content).hexdigest()}
    replace(folder / f"{name}.safetensors", content)
    replace(folder / f"{name}.json", (json.dumps(card, indent=2, ensure_ascii=False) + "\n").encode())


def _net(model: Denoiser | nn.Module) -> nn.Module:
    return model.net if isinstance(model, Denoiser) else model


def replace(file: Path, content: bytes) -> None:
    """Write beside, then rename: a crash leaves the old file or the new one, never half of one."""
    part = file.with_name(file.name + ".part")
    part.write_bytes(content)
    os.replace(part, file)
