"""How the shipped checkpoints were trained. `dgm-course train NAME` runs a recipe; stopped, it goes on where it was."""

import hashlib
import json
import platform
from pathlib import Path

import torch
from accelerate import PartialState

from dgm_course import checkpoints, data, losses, training

__all__ = ["RECIPES", "names", "train"]

RECIPES = {
    "mnist-unet": {
        "what": "class-conditional U-Net on MNIST, v-prediction on the cosine path, labels dropped 10 %",
        "data": "mnist",
        "net": {"class": "UNet", "channels": [32, 64], "blocks": [2, 3], "attention": True, "num_classes": 10},
        "path": {"class": "Cosine"},
        "predicts": "v",
        "steps": 7000,
        "batch": 128,
        "seed": 0,
    },
}


def names() -> list[str]:
    """The names of the recipes."""
    return sorted(RECIPES)


def train(name: str, source: str | None = None, out: str | Path = "runs", steps: int | None = None) -> dict:
    """Run a recipe to its end, write the checkpoint and its card to `out`, and return the card.

    Arguments:
        name: One of `names()`.
        source: The data to train on, as in `data.load`; the shipped checkpoints used the full set.
        out: Folder for the checkpoint and, while training, for the state that a stopped run goes on from: the same
            recipe, data and steps find it again.
        steps: Steps instead of the recipe's.

    Raises:
        ValueError: If there is no such recipe.
        KeyboardInterrupt: If stopped; the state is saved first.
    """
    if name not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(names())}; got {name!r}")
    card = {**RECIPES[name], "steps": steps or RECIPES[name]["steps"]}
    x, y = data.images(data.load(card["data"], "train", source))
    card["images"], card["data_sha256"] = len(x), data.content_hash(x, y)
    state = Path(out) / f"{name}-{hashlib.sha256(json.dumps(card).encode()).hexdigest()[:8]}.state.pt"
    torch.manual_seed(card["seed"])
    denoiser = checkpoints.build(card)
    null = card["net"]["num_classes"]
    draw = training.batches(x, denoiser.path, size=card["batch"], y=y, null=null, seed=card["seed"])
    done = training.fit(denoiser, losses.simple, draw, steps=card["steps"], state=state)
    if PartialState().is_main_process:
        options = " --source hub" * bool(source) + f" --steps {steps}" * bool(steps)
        card["recipe"] = f"dgm-course train {name}" + options
        card["minutes"] = round(done.seconds / 60, 1)
        card["machine"] = f"{platform.machine()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"
        card["scores"] = {"test loss": round(held_out_loss(done.ema.cpu(), card["data"], source), 4)}
        checkpoints.save(name, done.ema, card, out)
        state.unlink()
    return card


def held_out_loss(denoiser, name: str, source: str | None = None) -> float:
    """`losses.simple` on the test images with their labels, each at 4 stratified times."""
    x, y = data.images(data.load(name, "test", source))
    draw = training.batches(x, denoiser.path, size=500, y=y, drop=0, seed=1)
    with torch.no_grad():
        values = [losses.simple(denoiser, **draw(step)).item() for step in range(4 * len(x) // 500)]
    return sum(values) / len(values)
