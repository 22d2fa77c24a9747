"""What each kind of model is trained on, how its batches are drawn, and how it is scored.

A function here gets a card, the model and the training images, and returns three functions: the loss, a batch for each step,
and a score on test images.
"""

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dgm_course import (
    checkpoints,
    data,
    distilling,
    flows,
    gan,
    likelihood,
    losses,
    metrics,
    nets,
    samplers,
    training,
    vae,
)
from dgm_course.denoisers import Denoiser, clipped

__all__ = ["bits", "objective", "quality"]

JUDGED = 28  # the side of the images that the shipped classifiers were trained on
Objective = tuple[Callable, Callable, Callable]


def objective(card: dict, model: nn.Module, x: Tensor, y: Tensor) -> Objective:
    """Loss, batches and score that fit the model."""
    if "distils" in card:
        return *distilling.distilling(card, model, x, y), _student_score(card)
    if isinstance(model, Denoiser) and model.learned_variance:
        return _denoising_with_variance(card, model, x, y)
    kinds = {
        Denoiser: _denoising,
        flows.Flow: _flow,
        vae.VAE: _vae,
        gan.GAN: _gan,
        nets.LanguageModel: _language,
        nn.Module: _classification,
    }
    return next(kind for cls, kind in kinds.items() if isinstance(model, cls))(card, model, x, y)


def _denoising(card: dict, denoiser: nn.Module, x: Tensor, y: Tensor) -> Objective:
    """Loss, batches and score of a denoiser: `losses.simple`, on the test set at 4 stratified times for each image."""
    settings = {"size": card["batch"], "times": card.get("times", "uniform"), "seed": card["seed"]}
    null, size = card["net"]["num_classes"], card.get("size", x.shape[-1])
    x = data.resized(x, size)
    draw = training.batches(x, denoiser.path, y=y if null else None, null=null, **settings)

    def score(denoiser, x, y):
        x = data.resized(x, size)
        batch = training.batches(x, denoiser.path, size=500, y=y if null else None, drop=0, seed=1)
        with torch.no_grad():
            values = [losses.simple(denoiser, **batch(step)).item() for step in range(4 * len(x) // 500)]
        scores = {"test loss": round(sum(values) / len(values), 4)}
        if not null:
            return scores | _realism(lambda n, g: _ddim(denoiser, (n, *x.shape[1:]), g), x, y, **card["scored with"])
        return scores | quality(denoiser, x, y, **card["scored with"]) if "scored with" in card else scores

    return losses.simple, draw, score


def _student_score(card: dict) -> Callable:
    """Samples of a student by its own number of DDIM steps, at one weight of guidance if it is told one."""

    def score(student, x, y):
        settings = dict(card["scored with"])
        steps, w = settings.pop("steps"), settings.pop("w", None)

        def d(xt, t, y):
            return student(xt, t, y=y) if w is None else student(xt, t, y=y, w=torch.full((len(xt),), w))

        def ddim(d, noise, g):
            return samplers.last(samplers.ddim(d, student.path, noise, student.path.times(steps)))

        return quality(d, x, y, sampler=ddim, **settings)

    return score


def _denoising_with_variance(card: dict, denoiser: nn.Module, x: Tensor, y: Tensor) -> Objective:
    """`losses.hybrid` on a chain of `card["chain"]` equal steps; scored by the bound of that chain, in bits per dimension."""
    path, null, steps = denoiser.path, card["net"]["num_classes"], card["chain"]
    draw = training.batches(x, path, size=card["batch"], y=y, null=null, seed=card["seed"])

    def on_chain(step):
        batch = draw(step)
        end = (batch.pop("t").double() * steps).ceil()
        return batch | {"s": (end - 1) / steps, "t": end / steps}

    def score(denoiser, x, y):
        x, y = data.balanced(x, y, 200, torch.Generator().manual_seed(0))
        return {"bits per dimension": round(bits(denoiser, x, y, path.times(steps), "learned"), 4)}

    return losses.hybrid, on_chain, score


def bits(denoiser: Denoiser, x: Tensor, y: Tensor, times: Tensor, variance: str, seed: int = 0) -> float:
    """Bits per dimension of images with their labels, by the bound of the chain on this grid; Σ_θ as in `losses.bound_term`."""
    g = torch.Generator().manual_seed(seed)
    read = denoiser.with_variance if variance == "learned" else denoiser
    terms = likelihood.bound(
        clipped(lambda xt, t: read(xt, t, y=y)), denoiser.path, x, times, variance=variance, bins=256, generator=g
    )
    return likelihood.bits_per_dim(terms.sum(0), x).mean().item()


def _classification(card: dict, classifier: nn.Module, x: Tensor, y: Tensor) -> Objective:
    """Loss, batches and score of a classifier: cross-entropy on moved images; the share of test images it gets right."""
    if "path" in card:
        return _noisy_classification(card, x, y)

    def draw(step):
        chosen, g = _chosen(card, len(x), step)
        return {"x": _moved(x[chosen], g), "y": y[chosen]}

    def loss(model, x, y):
        return nn.functional.cross_entropy(model(x), y)

    def score(classifier, x, y):
        with torch.no_grad():
            right = torch.cat([classifier(part).argmax(1) for part in x.split(500)]) == y
        return {"accuracy on the test set": round(right.double().mean().item(), 4)}

    return loss, draw, score


def _noisy_classification(card: dict, x: Tensor, y: Tensor) -> Objective:
    """The same on images with noise, at times spread over the path; scored at three of them."""
    path = checkpoints.path_of(card)
    draw = training.batches(x, path, size=card["batch"], y=y, drop=0, seed=card["seed"])

    def loss(model, x0, t, eps, y):
        return nn.functional.cross_entropy(model(path.perturb(x0, t, eps), path.unit(t)), y)

    def score(classifier, x, y):
        g, shares = torch.Generator().manual_seed(0), {}
        for t in (0.25, 0.5, 0.75):
            xt = path.perturb(x, t, torch.randn(x.shape, generator=g))
            with torch.no_grad():
                guesses = torch.cat(
                    [classifier(part, path.units(t, len(part), part.device)).argmax(1) for part in xt.split(500)]
                )
            shares[f"accuracy at t = {t}"] = round((guesses == y).double().mean().item(), 4)
        return shares

    return loss, draw, score


def _language(card: dict, model: nn.Module, x: Tensor, y: Tensor) -> Objective:
    """The cross-entropy of the next byte, in pieces of the text that start anywhere; scored in bits for each byte of a test text."""
    offsets = torch.arange(model.length + 1)

    def draw(step):
        g = _chosen(card, len(x), step)[1]
        return {"x": x[torch.randint(len(x) - model.length, (card["batch"], 1), generator=g) + offsets]}

    def loss(model, x):
        return nn.functional.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())

    def score(model, x, y):
        pieces = x[: len(x) // len(offsets) * len(offsets)].view(-1, len(offsets))
        with torch.no_grad():
            nats = torch.cat([loss(model, part)[None] * len(part) for part in pieces.split(64)]).sum() / len(pieces)
        return {"test bits per byte": round(nats.item() / math.log(2), 4)}

    return loss, draw, score


def _flow(card: dict, flow: nn.Module, x: Tensor, y: Tensor) -> Objective:
    """The bound on −log P in bits for each pixel, of images with uniform noise within their grey levels."""

    def draw(step):
        chosen, g = _chosen(card, len(x), step)
        return {"y": flows.dequantize(x[chosen], torch.rand(x[chosen].shape, generator=g))}

    def loss(flow, y):
        return likelihood.bits_per_dim(-flow.log_prob(y).mean(), y) + 8  # 8 = log₂ 256, the grey levels

    def score(flow, x, y):
        g = torch.Generator().manual_seed(0)
        with torch.no_grad():
            bits = [
                likelihood.bits_per_dim(
                    -flow.log_prob(flows.dequantize(part, torch.rand(part.shape, generator=g))), part
                )
                + 8
                for part in x.split(500)
            ]
        scores = {"test bits per pixel": round(torch.cat(bits).double().mean().item(), 4)}
        return scores | _realism(lambda n, g: flows.quantize(flow.sample(n, generator=g)), x, y, **card["scored with"])

    flow.transform.initialize(draw(-1)["y"])
    return loss, draw, score


def _vae(card: dict, model: nn.Module, x: Tensor, y: Tensor) -> Objective:
    """The negative ELBO for each pixel, with the card's β."""

    def draw(step):
        chosen, g = _chosen(card, len(x), step)
        return {"x": x[chosen], "eps": torch.randn(len(chosen), model.latent, generator=g)}

    def loss(model, x, eps):
        return vae.loss(model, x, eps, card.get("beta", 1.0))

    if "beta" in card:
        model.log_var.requires_grad_(False)  # else it would answer to β, and hide what β does

    def score(model, x, y):
        g = torch.Generator().manual_seed(0)
        with torch.no_grad():
            reconstruction, kl = model.terms(x, torch.randn(len(x), model.latent, generator=g))
            away = (model.decode(model.encode(x)[0]) - x).square().mean().sqrt()
        scores = {
            "ELBO in nats": round((reconstruction - kl.sum(1)).mean().item(), 1),
            "KL in nats": round(kl.sum(1).mean().item(), 2),
            "latents in use": int((kl.mean(0) > 0.01).sum()),
            "error of reconstruction": round(away.item(), 4),
        }
        return scores | _realism(lambda n, g: model.sample(n, generator=g), x, y, **card["scored with"])

    return loss, draw, score


def _gan(card: dict, model: nn.Module, x: Tensor, y: Tensor) -> Objective:
    """Both players' losses; the score is of the samples, as there is no likelihood."""

    def draw(step):
        chosen, g = _chosen(card, len(x), step)
        return {"x": x[chosen], "z": torch.randn(len(chosen), model.latent, generator=g)}

    def loss(model, x, z):
        return gan.loss(model, x, z, penalty=card.get("penalty", 0.0))

    def score(model, x, y):
        return _realism(lambda n, g: model.sample(n, generator=g), x, y, **card["scored with"])

    return loss, draw, score


def _realism(draw: Callable, x: Tensor, y: Tensor, *, classifier: str, samples: int, draws: int) -> dict[str, float]:
    """How far samples without a class are from real images, to a shipped classifier; `draw` gets a number and a generator."""
    judge, g = checkpoints.load(classifier), torch.Generator().manual_seed(0)
    rows, seconds = [], 0.0
    for _ in range(draws):
        began = time.perf_counter()
        drawn = draw(samples, g)
        seconds += time.perf_counter() - began
        real = data.balanced(x, y, samples, g)[0]
        with torch.no_grad():
            a, b = judge.features(real), judge.features(drawn)
        rows.append([metrics.frechet_distance(a, b), *metrics.precision_recall(a, b)])
    means = torch.tensor(rows, dtype=torch.float64).mean(0).tolist()
    scores = {k: round(v, 4) for k, v in zip(["Fréchet distance", "precision", "recall"], means, strict=True)}
    return scores | {"seconds for 1000 samples": round(1000 * seconds / samples / draws, 3)}


@torch.no_grad()
def _ddim(denoiser: Denoiser, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Samples without a class: 25 steps, with half of DDPM's fresh noise."""
    path, noise = denoiser.path, torch.randn(shape, generator=generator)
    times = path.times(25)
    parts = noise.split(250)
    return torch.cat(
        [samplers.last(samplers.ddim(clipped(denoiser), path, z, times, eta=0.5, generator=generator)) for z in parts]
    )


def _chosen(card: dict, number: int, step: int) -> tuple[Tensor, torch.Generator]:
    """Which images a step is trained on, and a generator for all else in it: a pure function of the step, for resuming."""
    g = torch.Generator().manual_seed(1_000_000 * card["seed"] + step % 1_000_000)
    return torch.randint(number, (card["batch"],), generator=g), g


def quality(
    denoiser: Denoiser,
    x: Tensor,
    y: Tensor,
    *,
    classifier: str,
    samples: int,
    draws: int,
    steps: int = 50,
    eta: float = 0.0,
    seed: int = 0,
    sampler: Callable | None = None,
    spread: bool = False,
) -> dict[str, float]:
    """How good a class-conditional model's samples are, to a shipped classifier: as many of each class.

    Arguments:
        denoiser: A denoiser with labels; its guesses are clipped to [−1, 1].
        x, y: Real images that it was not trained on, and their labels. Of another side than 28, they and the samples are
            resized to 28 for the classifier.
        classifier: Name of the checkpoint whose features and answers are used.
        samples: Samples in a draw, in equal parts of every class, compared with as many of `x`.
        draws: Independent draws of samples and of images; the scores are their means.
        steps, eta: Steps of DDIM, equally spaced, and its share of fresh noise.
        sampler: A function (denoiser, standard normal noise, generator) → samples, instead of DDIM.
        spread: Whether to score precision and recall too.

    Returns:
        The share classified as asked for, and the Fréchet distance to the real images; precision and recall if asked.
    """

    def ddim(d, noise, g):
        path = denoiser.path
        return samplers.last(samplers.ddim(d, path, noise, path.times(steps), eta=eta, generator=g))

    judge, g = checkpoints.load(classifier), torch.Generator().manual_seed(seed)
    asked = torch.arange(int(y.max()) + 1).repeat_interleave(samples // (int(y.max()) + 1))
    rows = []
    for _ in range(draws):
        drawn, real = [], data.balanced(x, y, samples, g)[0]
        for labels in asked.split(250):
            conditional = clipped(lambda xt, t, labels=labels: denoiser(xt, t, y=labels))
            noise = torch.randn(len(labels), *x.shape[1:], generator=g)
            drawn.append((sampler or ddim)(conditional, noise, g))
        drawn, real = (data.resized(images, JUDGED) for images in (torch.cat(drawn), real))
        with torch.no_grad():
            right = (judge(drawn).argmax(1) == asked).double().mean().item()
            a, b = judge.features(drawn), judge.features(real)
        rows.append([right, metrics.frechet_distance(a, b), *(metrics.precision_recall(b, a) if spread else ())])
    names = ["classified as asked", "Fréchet distance", "precision", "recall"][: len(rows[0])]
    means = torch.tensor(rows, dtype=torch.float64).mean(0).tolist()
    return {name: round(value, 4) for name, value in zip(names, means, strict=True)}


def _moved(x: Tensor, generator: torch.Generator) -> Tensor:
    """Images shifted by up to a fourteenth of their side, then turned by up to 0.2 rad and scaled by up to 10 %, at random."""
    angle, log_scale, right, down = (2 * torch.rand(4, len(x), generator=generator) - 1) * torch.tensor(
        [[0.2], [0.1], [1 / 7], [1 / 7]]
    )
    cos, sin = log_scale.exp() * angle.cos(), log_scale.exp() * angle.sin()
    rows = torch.stack([torch.stack([cos, -sin, right], 1), torch.stack([sin, cos, down], 1)], 1)
    grid = nn.functional.affine_grid(rows, list(x.shape), align_corners=False)
    return nn.functional.grid_sample(x + 1, grid, align_corners=False) - 1  # outside is 0, the background −1
