"""How the shipped checkpoints were trained and the shipped tables measured.

`dgm-course train NAME` runs a recipe; stopped, it goes on where it was.
"""

import hashlib
import itertools
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor

from dgm_course import checkpoints, data, measures, metrics, objectives, personal, tables, training
from dgm_course.data import hands
from dgm_course.denoisers import Denoiser
from dgm_course.recipes.measurements import MEASUREMENTS
from dgm_course.recipes.networks import NETWORKS

__all__ = ["RECIPES", "names", "train"]

RECIPES = NETWORKS | MEASUREMENTS


def names() -> list[str]:
    """The names of the recipes."""
    return sorted(RECIPES)


def train(name: str, source: str | None = None, out: str | Path = "runs", steps: int | None = None) -> dict:
    """Run a recipe to its end, write the checkpoint and its card to `out`, and return the card.

    A recipe that says what to `vary` trains once for each combination, keeps the scores alone, and writes them as a table.
    One that names a `checkpoint` trains no network from scratch: it measures what each sampler makes of it, or fine-tunes it for users.

    Arguments:
        name: One of `names()`.
        source: The data to train on, as in `data.load`; the shipped checkpoints used the full set.
        out: Folder for the checkpoint and, while training, for the state that a stopped run goes on from: the same
            recipe, data and steps find it again.
        steps: Steps of training instead of the recipe's.

    Raises:
        ValueError: If there is no such recipe, one that varies something is run by several processes, or steps are asked of
            one that trains nothing.
        KeyboardInterrupt: If stopped; the state is saved first.
    """
    if name not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(names())}; got {name!r}")
    card = dict(RECIPES[name])
    if steps and "steps" not in card:
        raise ValueError(f"recipe {name} trains nothing, so it has no steps; got {steps}")
    if "distils" in card:
        card["teacher_sha256"] = checkpoints.load(card["start"]).card["sha256"]
    if steps:
        card["steps"] = steps
    x, y = _data(card, "train", source)
    card["images" if x.ndim > 1 else "bytes"], card["data_sha256"] = len(x), data.content_hash(x, y)
    card["recipe"] = f"dgm-course train {name}" + " --source hub" * bool(source) + f" --steps {steps}" * bool(steps)
    if "vary" in card:
        if PartialState().num_processes > 1:
            raise ValueError(
                f"recipe {name} trains many models one after the other, in one process; start it without a launcher"
            )
        return _table(name, card, (x, y), _data(card, "test", source), Path(out), source)
    state = Path(out) / f"{name}-{hashlib.sha256(json.dumps(card).encode()).hexdigest()[:8]}.state.pt"
    done, score = _fit(card, x, y, state)
    if PartialState().is_main_process:
        card["minutes"], card["machine"] = round(done.seconds / 60, 1), _machine(card)
        test = _data(card, "test", source)
        card["scores"] = score(done.ema.cpu(), *test) | _floor(card, (x, y), test)
        checkpoints.save(name, done.ema, card, out)
        state.unlink()
    return card


def _data(card: dict, split: str, source: str | None) -> tuple[Tensor, Tensor]:
    """Images and labels, in a user's hand if the card names one; or a text's bytes, which are what is read and what is to be said."""
    if card["data"] in data.TEXTS:
        x = data.text(card["data"], split)
        return x, x
    if "hand" in card and split == "train":
        return personal.few(card["hand"], card["seed"], card["images for a user"], source)
    if "hand" in card:
        return hands.pages(card["hand"], split, source)
    return data.images(data.load(card["data"], split, source))


def _fit(card: dict, x: Tensor, y: Tensor, state: Path | None = None) -> tuple[training.Fit, Callable]:
    """Train what a card describes; returns the result and the function that scores it on test images."""
    torch.manual_seed(card["seed"])
    model = checkpoints.build(card)
    if "start" in card:
        _start(model, checkpoints.load(card["start"]))
    loss, draw, score = objectives.objective(card, model, x, y)
    return training.fit(model, loss, draw, steps=card["steps"], state=state, **card.get("fit", {})), score


def _start(model: Denoiser, trained: Denoiser) -> None:
    """Give a network the weights of another, which may have fewer channels in its output, or know no weight of guidance.

    What is new stays as it is: zero in what it adds.
    """
    new, old = dict(model.net.named_parameters()), dict(trained.net.named_parameters())
    if strange := [name for name in new.keys() ^ old.keys() if name not in new or not name.startswith("weight.")]:
        raise ValueError(f"start must be a checkpoint of the same network; these weights differ: {sorted(strange)}")
    for name, values in old.items():
        if new[name].shape != values.shape and not name.startswith("leave."):
            raise ValueError(f"start must be a checkpoint of the same network; {name} has another shape there")
    with torch.no_grad():
        for name, values in old.items():
            new[name][: len(values)] = values


def _table(
    name: str, card: dict, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], out: Path, source=None
) -> dict:
    """Try every combination of what varies, and write the table after each, so that a stopped run goes on."""
    card |= {"machine": _machine(card), **_floor(card, train, test), "rows": []}
    file = out / f"{name}.json"
    if file.is_file() and (before := tables.read(file)) == card | {"rows": before["rows"]}:
        card = before
    for values in list(itertools.product(*card["vary"].values()))[len(card["rows"]) :]:
        row = dict(zip(card["vary"], values, strict=True))
        settings, began = card | row | card.get("kinds", {}).get(row.get("kind"), {}), time.perf_counter()
        if "tunes" in settings:
            row |= personal.personalise(settings, source, _kept(row, card, out))
        elif "checkpoint" in card:
            row |= measures.measure(settings, *test) | {"minutes": round((time.perf_counter() - began) / 60, 2)}
        else:
            done, score = _fit(settings, *train)
            first = [round(value, 5) for value in done.losses[:3]]
            row |= score(done.ema.cpu(), *test) | {"first losses": first, "minutes": round(done.seconds / 60, 2)}
        card["rows"].append(row)
        tables.write(file, card)
    return card


def _kept(row: dict, card: dict, out: Path) -> Path | None:
    """Where a user's file is kept: for the first seed and the kind that the card names."""
    chosen = (row["kind"], row["seed"]) == (card["keeps"], 0)
    return out / "users" / row["user"] if chosen else None


def _floor(card: dict, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> dict[str, float]:
    """What real images score against real images, with the numbers that the card is scored with: as low as a score can be."""
    if "classifier" not in card.get("scored with", {}) or "hand" in card:  # a user has too few images
        return {}
    settings, g = card["scored with"], torch.Generator().manual_seed(0)
    judge = checkpoints.load(settings["classifier"])
    with torch.no_grad():
        pairs = [
            [judge.features(data.balanced(*images, settings["samples"], g)[0]) for images in (train, test)]
            for _ in range(max(8, settings["draws"]))
        ]
    distances = [metrics.frechet_distance(a, b) for a, b in pairs]
    return {"Fréchet distance of real images": round(sum(distances) / len(distances), 4)}


def _machine(card: dict) -> str:
    precision = "float32" if "checkpoint" in card else card.get("fit", {}).get("precision", "auto")
    number = "bfloat16" if training._bfloat16(precision) else "float32"
    return f"{platform.machine()}, {torch.get_num_threads()} thread(s), {number}, torch {torch.__version__}"
