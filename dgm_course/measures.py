"""What a sampler makes of a shipped network, against how often it asks it; what guidance does; what a learned variance gains."""

from collections.abc import Callable

import torch
from torch import Tensor
from torchdiffeq import odeint

from dgm_course import checkpoints, data, guidance, objectives, paths, samplers
from dgm_course.denoisers import Denoiser, clipped, on_path, read_as

__all__ = ["FAST", "SAMPLERS", "STUDENTS", "draw", "fast_times", "first", "grid", "guided", "measure"]

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

# The same on a grid that ends in 0 after equal steps of t, or of the log-SNR: from (denoiser, path, first state, times, generator).
FAST = {
    "DDIM": lambda d, path, x, times, g: samplers.ddim(d, path, x, times),
    "DDPM, β": lambda d, path, x, times, g: samplers.ddpm(d, path, x, times, generator=g),
    "DDPM, β̃": lambda d, path, x, times, g: samplers.ddpm(d, path, x, times, variance="posterior", generator=g),
    "Heun": lambda d, path, x, times, g: samplers.heun(d, path, x, times),
    "DPM-Solver++(2S)": lambda d, path, x, times, g: samplers.dpm_solver_pp_2s(d, path, x, times),
    "DPM-Solver++(2M)": lambda d, path, x, times, g: samplers.dpm_solver_pp_2m(d, path, x, times),
}

# For students: jumps that go as far as they were trained to, and noise that brings each back up to the next time.
STUDENTS = {
    "stochastic": lambda d, path, x, times, g: samplers.overshoot(
        d, path, x, times, low=times[:-1] - times[-2], generator=g
    ),
    "consistency": lambda d, path, x, times, g: samplers.overshoot(
        d, path, x, times, low=torch.zeros(len(times) - 1), generator=g
    ),
}


def fast_times(setting: dict, path: paths.GaussianPath) -> Tensor:
    """The grid for a setting of `FAST` or `STUDENTS`, {"name": …, "grid": "time" | "log-SNR", "evaluations": N}, for at most N of them.

    Heun and 2S make two in a step, but one in the last and where α = 0. "stochastic" is for students: its jumps of 2/(N + 1) start at
    every multiple of 1/(N + 1).

    Example:
        >>> fast_times({"name": "Heun", "grid": "time", "evaluations": 6}, paths.Cosine()).tolist()
        [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    steps, equal = setting["evaluations"], setting["grid"] == "time"
    if setting["name"] == "stochastic":
        return torch.cat([torch.linspace(1, 2 / (steps + 1), steps, dtype=torch.float64), torch.zeros(1)])
    if setting["name"] in ("Heun", "DPM-Solver++(2S)"):
        steps = (steps + 1 + (equal and path.alpha(1.0).item() == 0)) // 2
    return path.times(steps) if equal else samplers.logsnr_times(path, steps, start=0.99, end=0.02)


def draw(setting: dict, d: Callable, path: paths.GaussianPath, noise: Tensor, generator: torch.Generator) -> Tensor:
    """Samples by a named sampler with so many evaluations, or by torchdiffeq's adaptive solver to a tolerance.

    Arguments:
        setting: {"name": one of `SAMPLERS`, "evaluations": N}, or {"name": "dopri5", "tolerance": of its two kinds}; with a "grid",
            one of `FAST` or `STUDENTS`, see `fast_times`.
        d: A denoiser on `path`.
        path: A path, with a finite drift at 1 unless there is a "grid".
        noise: Standard normal noise, (B, …).
        generator: Source of the fresh noise.
    """
    if "grid" in setting:
        times = fast_times(setting, path)
        return samplers.last(
            (FAST | STUDENTS)[setting["name"]](d, path, noise * path.sigma(times[0]).item(), times, generator)
        )
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
    """Measure one row of a table on the card's checkpoint against test images: its "sampler", "guidance" or "variance".

    A sampler may name a "checkpoint" of its own, a student. With a "w" in the row a student that knows weights is told it, and another
    network is guided with the scale 1 + w.

    Returns:
        The scores of `objectives.quality`, and the evaluations made for a sample. For a sampler, also the brightness of the first
        20 samples, by which a reader can check a row in a second; for a variance, the bits per dimension.
    """
    network, path = (
        checkpoints.load(card.get("sampler", {}).get("checkpoint", card["checkpoint"])),
        checkpoints.path_of(card),
    )
    settings = {"spread": "guidance" in card} | card["scored with"] | {"seed": card["seed"]}
    if "variance" in card:
        return _with_variance(card, network, x, y, settings)
    count = 0

    def counted(xt, t, **cond):
        nonlocal count
        count += len(xt)
        return placed(xt, t, **cond)

    def sampler(d, noise, generator):
        return draw(card["sampler"], d, path, noise, generator)

    placed = _placed(network, path)
    if "w" in card:
        d = _weighted(network, counted, card["w"])
    else:
        d = (lambda xt, t, y: guided(card, counted, path, y)(xt, t)) if "guidance" in card else counted
    scores = objectives.quality(d, x, y, sampler=sampler, **settings)
    made = count / settings["samples"] / settings["draws"]
    scores |= {"evaluations": round(made, 1)}
    if "guidance" in card or "w" in card:
        return scores
    return scores | {"first samples": first(card["sampler"], network, path, card["seed"])}


def _placed(network: Callable, path: paths.GaussianPath) -> Callable:
    """A network on a path, its own or another."""
    return network if repr(path) == repr(network.path) else on_path(network, network.path, path)


def guided(card: dict, network: Callable, path: paths.GaussianPath, y: Tensor) -> Callable:
    """The denoiser of a guidance with labels y: {"name": "classifier-free" | "interval" | "classifier", "scale": w}.

    "interval" guides at 0.25 ≤ t ≤ 0.75 only. "classifier" guides the network without labels by the card's classifier.
    """
    setting = card["guidance"]
    if setting["name"] == "classifier":
        judge = checkpoints.load(card["classifier"])

        def log_prob(xt, t):
            return judge(xt, path.units(t, len(xt), xt.device)).log_softmax(1)[torch.arange(len(y)), y]

        return guidance.classifier(network, path, log_prob, setting["scale"])
    scale = guidance.interval(setting["scale"], 0.25, 0.75) if setting["name"] == "interval" else setting["scale"]
    return guidance.classifier_free(lambda xt, t: network(xt, t, y=y), network, scale)


def _weighted(network: Denoiser, asked: Callable, w: float) -> Callable:
    """A denoiser with labels, guided with weight w: in one evaluation if the network was told weights, else in two."""
    if "weights" in network.card.get("distils", {}):
        return lambda xt, t, y: asked(xt, t, y=y, w=torch.full((len(xt),), w))
    return lambda xt, t, y: guidance.classifier_free(lambda xt, t: asked(xt, t, y=y), asked, 1 + w)(xt, t)


def _with_variance(card: dict, network: Callable, x: Tensor, y: Tensor, settings: dict) -> dict:
    """Quality and bits per dimension of ancestral sampling on so many steps of the network's chain, with one choice of Σ_θ."""
    variance, times = card["variance"], network.path.times(card["steps"])

    def sampler(d, noise, generator):
        return samplers.last(samplers.ddpm(d, network.path, noise, times, variance=variance, generator=generator))

    read = network.with_variance if variance == "learned" else network
    scores = objectives.quality(read, x, y, sampler=sampler, **settings)
    some = data.balanced(x, y, card["images for bits"], torch.Generator().manual_seed(0))
    return scores | {"bits per dimension": round(objectives.bits(network, *some, times, variance), 4)}


def first(setting: dict, network: Callable, path: paths.GaussianPath, seed: int) -> list[float]:
    """The brightness of 20 samples, two of each class."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(10).repeat_interleave(2)
    placed = _placed(network, path)
    d = clipped(lambda xt, t: placed(xt, t, y=labels))
    drawn = draw(setting, d, path, torch.randn(20, 1, 28, 28, generator=g), g)
    return [round(value, 4) for value in drawn.flatten(1).mean(1).tolist()]
