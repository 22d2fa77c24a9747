"""What a sampler makes of a shipped network, against how often it asks it."""

from collections.abc import Callable

import torch
from torch import Tensor
from torchdiffeq import odeint

from dgm_course import checkpoints, objectives, paths, samplers
from dgm_course.denoisers import clipped, on_path, read_as

__all__ = ["SAMPLERS", "draw", "first", "grid", "measure"]

T_MIN = 1e-3  # where the samplers stop; the last evaluation takes them from there to x̂_0


def grid(steps: int) -> Tensor:
    """`steps` steps from 1 to 0: equal ones to T_MIN, then one to 0.

    Example:
        >>> grid(3).tolist()
        [1.0, 0.5005, 0.001, 0.0]
    """
    return torch.cat([torch.linspace(1, T_MIN, steps, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])


# Each draws from (denoiser, path, noise, evaluations, generator). Heun, and the predictor first, make an odd number: n − 1 for an even n.
SAMPLERS = {
    "Euler–Maruyama": lambda d, path, x, n, g: samplers.euler_maruyama(d, path, x, grid(n), generator=g),
    "ancestral": lambda d, path, x, n, g: samplers.ddpm(d, path, x, grid(n), generator=g),
    "predictor–corrector": lambda d, path, x, n, g: samplers.predictor_corrector(
        d, path, x, grid((n + 1) // 2), generator=g
    ),
    "corrector–predictor": lambda d, path, x, n, g: samplers.predictor_corrector(
        d, path, x, grid(n // 2), order="corrector first", generator=g
    ),
    "Heun": lambda d, path, x, n, g: samplers.heun(d, path, x, grid((n + 1) // 2)),
}


def draw(setting: dict, d: Callable, path: paths.GaussianPath, noise: Tensor, generator: torch.Generator) -> Tensor:
    """Samples by a named sampler with so many evaluations, or by torchdiffeq's adaptive solver to a tolerance.

    Arguments:
        setting: {"name": one of `SAMPLERS`, "evaluations": N}, or {"name": "dopri5", "tolerance": of its two kinds}.
        d: A denoiser on `path`.
        path: A path with a finite drift at 1.
        noise: Standard normal noise, (B, …).
        generator: Source of the fresh noise.
    """
    x = noise * path.sigma(1.0).item()
    if setting["name"] != "dopri5":
        return samplers.last(SAMPLERS[setting["name"]](d, path, x, setting["evaluations"], generator))
    velocity, tolerance = read_as("velocity", d, path), setting["tolerance"]
    ends = torch.tensor([1.0, T_MIN])
    inside = {"first_step": 0.01, "step_t": ends[1:]}  # else its first step, or its last, may end at a t below 0
    with torch.no_grad():
        x = odeint(lambda t, x: velocity(x, t), x, ends, rtol=tolerance, atol=tolerance, options=inside)[-1]
        return d(x, T_MIN)


def measure(card: dict, x: Tensor, y: Tensor) -> dict:
    """Score one sampler on the card's checkpoint, moved to the card's path, against test images.

    Returns:
        The scores of `objectives.quality`, the evaluations made, and the brightness of the first 20 samples, by which a
        reader can check a row in a second.
    """
    network = checkpoints.load(card["checkpoint"])
    path = checkpoints.path_of(card)
    count = 0

    def counted(xt, t, y):
        nonlocal count
        count += len(xt)
        return on_path(network, network.path, path)(xt, t, y=y)

    def sampler(d, noise, generator):
        return draw(card["sampler"], d, path, noise, generator)

    scores = objectives.quality(counted, x, y, sampler=sampler, seed=card["seed"], **card["scored with"])
    made = count / card["scored with"]["samples"] / card["scored with"]["draws"]
    return scores | {
        "evaluations": round(made, 1),
        "first samples": first(card["sampler"], network, path, card["seed"]),
    }


def first(setting: dict, network: Callable, path: paths.GaussianPath, seed: int) -> list[float]:
    """The brightness of 20 samples, two of each class."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(10).repeat_interleave(2)
    d = clipped(on_path(lambda xt, t: network(xt, t, y=labels), network.path, path))
    drawn = draw(setting, d, path, torch.randn(20, 1, 28, 28, generator=g), g)
    return [round(value, 4) for value in drawn.flatten(1).mean(1).tolist()]
