"""How the shipped checkpoints were trained and the shipped tables measured.

`dgm-course train NAME` runs a recipe; stopped, it goes on where it was.
"""

import hashlib
import itertools
import json
import platform
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor, nn

from dgm_course import checkpoints, data, losses, metrics, samplers, tables, training
from dgm_course.denoisers import Denoiser, clipped

__all__ = ["RECIPES", "names", "quality", "train"]

RECIPES = {
    "mnist-classifier": {
        "what": "classifier of MNIST, whose features score generated digits; trained on slightly moved digits",
        "data": "mnist",
        "net": {"class": "Classifier"},
        "classifies": "digits",
        "steps": 6000,
        "batch": 128,
        "seed": 0,
    },
    "mnist-predictions": {
        "what": "noise, clean image or v predicted by the same network with the same data and budget, over seeds",
        "data": "mnist",
        "net": {"class": "UNet", "channels": [16, 32], "blocks": [2, 2], "num_classes": 10},
        "path": {"class": "VP"},
        "vary": {"predicts": ["eps", "x0", "v"], "seed": [0, 1, 2, 3, 4]},
        "steps": 600,
        "batch": 128,
        "fit": {"precision": "float32", "ema": 0.99},
        "scored with": {"classifier": "mnist-classifier", "samples": 1000, "steps": 50, "draws": 1},
    },
    "mnist-unet": {
        "what": "class-conditional U-Net on MNIST, v-prediction on the cosine path, labels dropped 10 %",
        "helped": [
            "times logit-normal and not uniform: Fréchet distance 0.218 and not 0.297 after 1,500 steps, as asked 89 % in both",
            "40 channels at the first level and not 32, for a fifth more time a step: not measured by itself",
            "32,000 steps and not 7,000, in about the same minutes: bfloat16 where the processor multiplies it natively",
            "DDIM with eta 0.5 and not 0: Fréchet distance 0.0442 and not 0.0464, as asked 98.1 % and not 98.0 %, 3 draws each",
        ],
        "data": "mnist",
        "net": {"class": "UNet", "channels": [40, 64], "blocks": [2, 3], "attention": True, "num_classes": 10},
        "path": {"class": "Cosine"},
        "predicts": "v",
        "times": "logit-normal",
        "steps": 32000,
        "batch": 128,
        "seed": 0,
        "fit": {"ema": 0.9995},
        "scored with": {"classifier": "mnist-classifier", "samples": 2000, "steps": 50, "eta": 0.5, "draws": 3},
    },
}


def names() -> list[str]:
    """The names of the recipes."""
    return sorted(RECIPES)


def train(name: str, source: str | None = None, out: str | Path = "runs", steps: int | None = None) -> dict:
    """Run a recipe to its end, write the checkpoint and its card to `out`, and return the card.

    A recipe that says what to `vary` trains once for each combination, keeps the scores alone, and writes them as a table.

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
    card["recipe"] = f"dgm-course train {name}" + " --source hub" * bool(source) + f" --steps {steps}" * bool(steps)
    if "vary" in card:
        return _table(name, card, (x, y), data.images(data.load(card["data"], "test", source)), Path(out))
    state = Path(out) / f"{name}-{hashlib.sha256(json.dumps(card).encode()).hexdigest()[:8]}.state.pt"
    done, score = _fit(card, x, y, state)
    if PartialState().is_main_process:
        card["minutes"], card["machine"] = round(done.seconds / 60, 1), _machine()
        test = data.images(data.load(card["data"], "test", source))
        card["scores"] = score(done.ema.cpu(), *test) | _floor(card, (x, y), test)
        checkpoints.save(name, done.ema, card, out)
        state.unlink()
    return card


def _fit(card: dict, x: Tensor, y: Tensor, state: Path | None = None) -> tuple[training.Fit, Callable]:
    """Train what a card describes; returns the result and the function that scores it on test images."""
    torch.manual_seed(card["seed"])
    model = checkpoints.build(card)
    loss, draw, score = (_classification if "classifies" in card else _denoising)(card, model, x, y)
    return training.fit(model, loss, draw, steps=card["steps"], state=state, **card.get("fit", {})), score


def _table(name: str, card: dict, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], out: Path) -> dict:
    """Train and score every combination of what varies, and write the table after each, so that a stopped run goes on."""
    card |= {"machine": _machine(), **_floor(card, train, test), "rows": []}
    file = out / f"{name}.json"
    if file.is_file() and (before := tables.read(file)) == card | {"rows": before["rows"]}:
        card = before
    for values in list(itertools.product(*card["vary"].values()))[len(card["rows"]) :]:
        row = dict(zip(card["vary"], values, strict=True))
        done, score = _fit(card | row, *train)
        first = [round(value, 5) for value in done.losses[:3]]
        card["rows"].append(
            row | score(done.ema, *test) | {"first losses": first, "minutes": round(done.seconds / 60, 2)}
        )
        tables.write(file, card)
    return card


def _floor(card: dict, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> dict[str, float]:
    """What real images score against real images, with the numbers that the card is scored with: as low as a score can be."""
    if "scored with" not in card:
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


def _machine() -> str:
    return f"{platform.machine()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"


def _denoising(card: dict, denoiser: nn.Module, x: Tensor, y: Tensor) -> tuple[Callable, Callable, Callable]:
    """Loss, batches and score of a denoiser: `losses.simple`, on the test set at 4 stratified times for each image."""
    settings = {"size": card["batch"], "times": card.get("times", "uniform"), "seed": card["seed"]}
    draw = training.batches(x, denoiser.path, y=y, null=card["net"]["num_classes"], **settings)

    def score(denoiser, x, y):
        batch = training.batches(x, denoiser.path, size=500, y=y, drop=0, seed=1)
        with torch.no_grad():
            values = [losses.simple(denoiser, **batch(step)).item() for step in range(4 * len(x) // 500)]
        scores = {"test loss": round(sum(values) / len(values), 4)}
        return scores | quality(denoiser, x, y, **card["scored with"]) if "scored with" in card else scores

    return losses.simple, draw, score


def _classification(card: dict, classifier: nn.Module, x: Tensor, y: Tensor) -> tuple[Callable, Callable, Callable]:
    """Loss, batches and score of a classifier: cross-entropy on moved images; the share of test images it gets right."""

    def draw(step):
        g = torch.Generator().manual_seed(1_000_000 * card["seed"] + step)  # a pure function of the step, for resuming
        chosen = torch.randint(len(x), (card["batch"],), generator=g)
        return {"x": _moved(x[chosen], g), "y": y[chosen]}

    def loss(model, x, y):
        return nn.functional.cross_entropy(model(x), y)

    def score(classifier, x, y):
        with torch.no_grad():
            right = torch.cat([classifier(part).argmax(1) for part in x.split(500)]) == y
        return {"accuracy on the test set": round(right.double().mean().item(), 4)}

    return loss, draw, score


def quality(
    denoiser: Denoiser,
    x: Tensor,
    y: Tensor,
    *,
    classifier: str,
    samples: int,
    steps: int,
    draws: int,
    eta: float = 0.0,
    seed: int = 0,
) -> dict[str, float]:
    """How good a class-conditional model's samples are, to a shipped classifier: as many of each class, by DDIM.

    Arguments:
        denoiser: A denoiser with labels; its guesses are clipped to [−1, 1].
        x, y: Real images that it was not trained on, and their labels.
        classifier: Name of the checkpoint whose features and answers are used.
        samples: Samples in a draw, in equal parts of every class, compared with as many of `x`.
        steps: Steps of DDIM, equally spaced.
        eta: DDIM's share of fresh noise.
        draws: Independent draws of samples and of images; the scores are their means.

    Returns:
        The share classified as asked for, and the Fréchet distance to the real images.
    """
    judge, g = checkpoints.load(classifier), torch.Generator().manual_seed(seed)
    asked = torch.arange(int(y.max()) + 1).repeat_interleave(samples // (int(y.max()) + 1))
    right, distance = [], []
    for _ in range(draws):
        drawn, real = [], data.balanced(x, y, samples, g)[0]
        for labels in asked.split(250):
            conditional = clipped(lambda xt, t, labels=labels: denoiser(xt, t, y=labels))
            noise = torch.randn(len(labels), *x.shape[1:], generator=g)
            times = denoiser.path.times(steps)
            states = samplers.ddim(conditional, denoiser.path, noise, times, eta=eta, generator=g)
            drawn.append(samplers.last(states))
        drawn = torch.cat(drawn)
        with torch.no_grad():
            right.append((judge(drawn).argmax(1) == asked).double().mean().item())
            distance.append(metrics.frechet_distance(judge.features(drawn), judge.features(real)))
    mean = {"classified as asked": sum(right) / draws, "Fréchet distance": sum(distance) / draws}
    return {name: round(value, 4) for name, value in mean.items()}


def _moved(x: Tensor, generator: torch.Generator) -> Tensor:
    """Images shifted by up to a fourteenth of their side, then turned by up to 0.2 rad and scaled by up to 10 %, at random."""
    angle, log_scale, right, down = (2 * torch.rand(4, len(x), generator=generator) - 1) * torch.tensor(
        [[0.2], [0.1], [1 / 7], [1 / 7]]
    )
    cos, sin = log_scale.exp() * angle.cos(), log_scale.exp() * angle.sin()
    rows = torch.stack([torch.stack([cos, -sin, right], 1), torch.stack([sin, cos, down], 1)], 1)
    grid = nn.functional.affine_grid(rows, list(x.shape), align_corners=False)
    return nn.functional.grid_sample(x + 1, grid, align_corners=False) - 1  # outside is 0, the background −1
