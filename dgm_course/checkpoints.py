"""Trained models that are shipped with the course: safetensors for the weights, and a JSON card that says what they are."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as read_tensors
from safetensors.torch import save as write_tensors

from dgm_course import nets, paths
from dgm_course.denoisers import Denoiser

__all__ = ["build", "load", "names", "save"]

FOLDER = Path(__file__).parent / "weights"


def names() -> list[str]:
    """The names of the shipped checkpoints.

    Example:
        >>> "mnist-unet" in names()
        True
    """
    return sorted(card.stem for card in FOLDER.glob("*.json"))


def load(name: str, folder: str | Path = FOLDER) -> Denoiser:
    """A trained denoiser in eval mode, float32, with its path as `.path` and its card as `.card`.

    Arguments:
        name: One of `names()`.
        folder: Where to look; the shipped checkpoints unless you trained your own.

    Raises:
        ValueError: If there is no such checkpoint, or its file is not the one that its card describes.

    Example:
        >>> load("mnist-unet").card["predicts"]
        'v'
    """
    folder = Path(folder)
    known = sorted(card.stem for card in folder.glob("*.json"))
    if name not in known:
        raise ValueError(f"name must be one of {', '.join(known) or f'(none in {folder})'}; got {name!r}")
    file = folder / f"{name}.safetensors"
    card = json.loads((folder / f"{name}.json").read_text())
    content = file.read_bytes() if file.is_file() else b""
    found = hashlib.sha256(content).hexdigest()
    if found != card["sha256"]:
        raise ValueError(f"{file} is damaged or missing: its SHA-256 is {found[:12]}…, its card says {card['sha256'][:12]}…")
    denoiser = build(card)
    try:
        denoiser.net.load_state_dict({key: value.float() for key, value in read_tensors(content).items()})
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{file} does not hold the network that its card describes: {error}") from error
    denoiser.card = card
    return denoiser.eval().requires_grad_(False)


def build(card: dict) -> Denoiser:
    """The denoiser that a card describes, with fresh weights.

    A card names the class and the settings of the network, `"net": {"class": "UNet", …}`, and likewise of the path.
    """
    net, path = dict(card["net"]), dict(card["path"])
    net = getattr(nets, net.pop("class"))(**net)
    path = getattr(paths, path.pop("class"))(**path)
    return Denoiser(net, path, predicts=card["predicts"])


def save(name: str, denoiser: Denoiser, card: dict, folder: str | Path) -> None:
    """Write `<name>.safetensors`, in float16, and `<name>.json`, which is the card and the hash of the weights."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.to("cpu", torch.float16).contiguous() for key, value in denoiser.net.state_dict().items()}
    content = write_tensors(tensors)
    card = {**card, "sha256": hashlib.sha256(content).hexdigest()}
    (folder / f"{name}.safetensors").write_bytes(content)
    (folder / f"{name}.json").write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n")
