"""A model of a user's own: a base fine-tuned on a handful of images in the user's hand, in full or by a few parameters.

The card's "tunes" says how, {"kind": "base"}, "full", "biases", "LoRA" with "rank", "alpha" and "targets", "adapters" with "bottleneck" and
"placement", or "prefix" with its "length" and "hidden", the width of its perceptron or null.
"""

from pathlib import Path

import torch
from torch import Tensor

from dgm_course import checkpoints, data, losses, objectives, peft, training
from dgm_course.data import hands
from dgm_course.denoisers import Denoiser

__all__ = ["TARGETS", "few", "personalise", "tuned"]

TARGETS = ("perceptron.0", "perceptron.2", "modulation")


def few(user: str, seed: int, number: int, source: str | None = None) -> tuple[Tensor, Tensor]:
    """So many training images in a user's hand, as many of each label; another seed draws others."""
    x, y = data.balanced(*hands.originals(user, "train", source), number, torch.Generator().manual_seed(seed))
    return hands.written(user, x), y


def tuned(base: Denoiser, how: dict, seed: int = 0) -> Denoiser:
    """A base made ready for fine-tuning, in place: what is to be trained is trainable, the rest is frozen."""
    how, net = dict(how), base.net
    kind = how.pop("kind")
    torch.manual_seed(seed)
    if kind == "full":
        net.requires_grad_(True)
    elif kind == "biases":
        peft.train_biases(net)
    elif kind == "LoRA":
        peft.add_lora(net, **{"targets": TARGETS} | how)
    elif kind == "adapters":
        peft.add_adapters(net, **how)
    elif kind == "prefix":
        peft.add_prefix(net, **how)
    elif kind != "base":
        raise ValueError(f"kind must be base, full, biases, LoRA, adapters or prefix; got {kind!r}")
    return base


def personalise(card: dict, source: str | None = None, out: Path | None = None) -> dict:
    """Fine-tune the card's base for its "user" as it "tunes", and score it: one row of a table.

    Arguments:
        card: A row of a recipe such as `mnist-users`, whose settings it has.
        source: The data, as in `data.load`.
        out: Folder for a LoRA, in PEFT's form; None to keep the scores alone.

    Returns:
        Parameters and bytes of the user's file; quality in the user's hand on held-out images; the denoising loss on the same, and
        on test images of the base's own data; the losses of the first steps, by which a reader can check a row; minutes.
    """
    how, seed, user = card["tunes"], card["seed"], card["user"]
    d = tuned(checkpoints.load(card["checkpoint"]), how, seed)
    parameters, done = 0, None
    x, y = few(user, seed, card["images for a user"], source)
    if how["kind"] != "base":
        draw = training.batches(x, d.path, size=card["batch"], y=y, null=card["null"], times=card["times"], seed=seed)
        done = training.fit(d, losses.simple, draw, steps=card["steps"], **card["fit"] | card["rates"][how["kind"]])
        d, kept = done.ema.cpu(), peft.trainable(d).values()
        if how["kind"] == "prefix":
            kept = peft.fold(d.net).prefix.parameters()
        parameters = sum(p.numel() for p in kept)
    test, plain = hands.pages(user, "test", source), data.images(data.load(card["data"], "test", source))
    row = {"parameters": parameters, "bytes": 4 * parameters}
    scored = dict(card["scored with"]) | {"classifier": card["judges"][hands.HANDS[user].get("data", card["data"])]}
    row |= objectives.quality(d, *test, seed=seed, **scored)
    row |= {"test loss": _loss(d, *test), "plain test loss": _loss(d, *plain)}
    if done:
        row |= {"first losses": [round(value, 5) for value in done.losses[:3]], "minutes": round(done.seconds / 60, 2)}
    if out is not None and how["kind"] == "LoRA":
        peft.save_lora(d.net, out)
    return row


def _loss(d: Denoiser, x: Tensor, y: Tensor) -> float:
    """`losses.simple` on 2,000 images at stratified times."""
    draw = training.batches(x, d.path, size=500, y=y, drop=0, seed=1)
    with torch.no_grad():
        return round(sum(losses.simple(d, **draw(step)).item() for step in range(4)) / 4, 4)
