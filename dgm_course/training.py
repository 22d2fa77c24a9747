"""One training loop for the whole course, on Hugging Face Accelerate: a recipe runs on one CPU or on many GPUs."""

import copy
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from dgm_course import resume
from dgm_course.paths import DiscretePath, GaussianPath

__all__ = ["Fit", "batches", "fit", "scaled"]


@dataclass
class Fit:
    """What `fit` returns: the averaged model in eval mode, the loss of each step, how many steps, and their seconds."""

    ema: nn.Module
    losses: list[float] = field(default_factory=list)
    step: int = 0
    seconds: float = 0.0


def batches(
    x: Tensor,
    path: GaussianPath,
    *,
    size: int,
    y: Tensor | None = None,
    drop: float = 0.1,
    null: int | None = None,
    times: str = "uniform",
    seed: int = 0,
) -> Callable[[int], dict]:
    """Batches as a pure function of the step: data in a new order each epoch, with their times, noises and labels.

    As everything random is drawn here from (seed, step), a run can stop anywhere and go on as if it never had, and two
    processes that share a batch compute what one would.

    Arguments:
        x: The training data, shape (N, …).
        path: Times are drawn on it: evenly spread over (0, 1), or over 1 … T on a chain, and stratified within a batch.
        size: Samples in a batch, over all processes together.
        y: Labels, int64 (N,); without them the batches have none.
        drop: Share of labels that are replaced by the null label, for guidance.
        null: The null label, as a rule the number of classes.
        times: "uniform", or "logit-normal" for more in the middle: t = 1/(1 + e^{-z}) with z standard normal (Esser et al.,
            2024, eq. 19). The loss itself stays as it is, so this also weighs the middle more.
        seed: Seed of everything random.

    Returns:
        A function from the step, 0, 1, 2 …, to keyword arguments of `losses.simple`.

    Raises:
        ValueError: If the sizes do not fit, or labels come without a null label to drop them to.

    Example:
        >>> from dgm_course.paths import Straight
        >>> batch = batches(torch.zeros(10, 2), Straight(), size=4)(0)
        >>> {name: tuple(value.shape) for name, value in batch.items()}
        {'x0': (4, 2), 't': (4,), 'eps': (4, 2)}
    """
    if not 1 <= size <= len(x):
        raise ValueError(f"size must lie between 1 and the number of samples, {len(x)}; got {size}")
    if y is not None and len(y) != len(x):
        raise ValueError(f"y must have one label for each of the {len(x)} samples; got {len(y)}")
    if y is not None and drop and null is None:
        raise ValueError("null must be the null label where labels are dropped; got None")
    if times not in ("uniform", "logit-normal"):
        raise ValueError(f"times must be 'uniform' or 'logit-normal'; got {times!r}")
    per_epoch = len(x) // size

    def batch(step: int) -> dict:
        epoch, place = divmod(step, per_epoch)
        order = torch.randperm(len(x), generator=_generator(seed, 0, epoch))
        chosen = order[place * size : (place + 1) * size]
        g = _generator(seed, 1, step)
        strata = (torch.randperm(size, generator=g) + torch.rand(size, generator=g)) / size
        strata = strata.clamp(2**-24, 1 - 2**-24)  # rounding gives 0 and 1 too, where some rates are infinite
        if times == "logit-normal":
            strata = torch.special.ndtri(strata).sigmoid()
        t = (strata * path.T).ceil().long() if isinstance(path, DiscretePath) else strata
        out = {"x0": x[chosen], "t": t, "eps": torch.randn(x[chosen].shape, generator=g, dtype=x.dtype)}
        if y is not None:
            out["y"] = torch.where(torch.rand(size, generator=g) < drop, null, y[chosen]) if drop else y[chosen]
        return out

    return batch


def fit(
    model: nn.Module,
    loss: Callable,
    batches: Callable[[int], dict],
    *,
    steps: int,
    lr: float = 2e-3,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.01,
    warmup: int = 200,
    final: float = 0.02,
    clip: float = 1.0,
    ema: float = 0.999,
    precision: str = "auto",
    state: str | Path | None = None,
    save_every: int = 500,
    watch: Callable[[Fit], None] | None = None,
    watch_every: int = 100,
    progress: bool = True,
) -> Fit:
    r"""Train a model with AdamW, and keep an exponential moving average of its weights.

    .. math:: \bar\theta \leftarrow m\,\bar\theta + (1-m)\,\theta, \qquad
              m = \min\bigl(\text{ema}, \tfrac{1+n}{10+n}\bigr)\ \text{after}\ n\ \text{steps}

    The learning rate rises linearly over the first `warmup` steps, or a tenth of all if that is less, and then falls
    linearly towards `final` times its peak.

    Arguments:
        model: The module to train, in place; a `Denoiser` as a rule.
        loss: `loss(model, **batch)`, a scalar.
        batches: A function from the step to a batch, a dict of tensors. See `batches`.
        steps: Number of steps in all.
        lr, betas, weight_decay: AdamW's.
        warmup, final: Shape of the learning rate.
        clip: Largest norm of the gradient.
        ema: Largest m of the average.
        precision: "float32", "bfloat16" (autocast), or "auto": bfloat16 where the processor multiplies it natively.
        state: A file to save to, every `save_every` steps and when stopped (Ctrl-C, SIGTERM). If it is there, training
            goes on from it, bit by bit as if it had not stopped.
        watch: Called with the `Fit` so far, every `watch_every` steps and at the end.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If an argument is out of range, or `state` belongs to another model or is damaged.
        FloatingPointError: If the loss or its gradient is not finite; model and state file are as before that step.
        KeyboardInterrupt: After saving, if stopped.

    Source:
        | Slide "Algorithm 1 Training"; Ho et al. (2020), appendix B, for the average

    Example:
        >>> net = nn.Linear(1, 1)
        >>> done = fit(net, lambda m, x: m(x).square().mean(), lambda step: {"x": torch.ones(4, 1)}, steps=3)
        >>> len(done.losses)
        3
    """
    for name, value in {"steps": steps, "save_every": save_every, "watch_every": watch_every}.items():
        if not (isinstance(value, int) and value >= 1):
            raise ValueError(f"{name} must be a whole number of at least 1; got {value!r}")
    from accelerate import Accelerator
    from tqdm.auto import tqdm

    bfloat16 = _bfloat16(precision)
    accelerator = Accelerator(mixed_precision="no")  # it allows one precision in a process, so `_Objective` has its own
    if not bfloat16:
        model.to(memory_format=torch.channels_last)  # a fifth faster; in bfloat16 it is slower (bench/backbones.py)
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas, weight_decay=weight_decay)
    objective, optimizer = accelerator.prepare(_Objective(model, loss, bfloat16).train(), optimizer)
    done = Fit(ema=copy.deepcopy(model).requires_grad_(False).eval())
    if state is not None and Path(state).is_file():
        resume.load(Path(state), model, optimizer, done, steps)
    quiet = not progress or not accelerator.is_main_process or "TQDM_DISABLE" in os.environ
    halt = False

    def save():
        if state is not None and accelerator.is_main_process:
            resume.save(Path(state), model, optimizer, done, steps)

    with (
        resume.stop_signals(state is not None) as stopped,
        tqdm(total=steps, initial=done.step, leave=False, disable=quiet) as bar,
    ):
        while done.step < steps and not halt:
            for group in optimizer.param_groups:
                group["lr"] = lr * _rate(done.step, steps, warmup, final)
            began = time.perf_counter()
            value = objective(**_share(batches(done.step), accelerator))
            accelerator.backward(value)
            norm = accelerator.clip_grad_norm_(model.parameters(), clip)
            told = torch.stack([value.detach(), norm.to(value), value.new_tensor(stopped())])
            value, norm, halt = accelerator.reduce(told, "mean").tolist()  # so that all processes stop at the same step
            if not math.isfinite(value + norm):
                raise FloatingPointError(
                    f"the loss is {value}, the norm of its gradient {norm}, at step {done.step}; lower lr ({lr:g})"
                )
            optimizer.step()
            optimizer.zero_grad()
            done.losses.append(value)
            done.step += 1
            _average(done.ema, model, min(ema, (1 + done.step) / (10 + done.step)))
            done.seconds += time.perf_counter() - began
            bar.update()
            if watch and (done.step % watch_every == 0 or done.step == steps):
                watch(done)
            if done.step % save_every == 0 or done.step == steps:
                save()
                bar.set_postfix(loss=f"{sum(done.losses[-200:]) / len(done.losses[-200:]):.4f}")
        if halt or stopped():
            save()
            raise KeyboardInterrupt(f"stopped after step {done.step} of {steps}")
    model.eval()
    return done


def scaled(cpu: int, gpu: int) -> int:
    """The size of a live training: `cpu`, or `gpu` where the environment variable DGM_PROFILE is "gpu".

    Example:
        >>> scaled(cpu=500, gpu=20_000)
        500
    """
    profile = os.environ.get("DGM_PROFILE", "cpu")
    if profile not in ("cpu", "gpu"):
        raise ValueError(f"DGM_PROFILE must be cpu or gpu; got {profile!r}")
    return {"cpu": cpu, "gpu": gpu}[profile]


class _Objective(nn.Module):
    """The loss as the forward pass of a module, which is where data-parallel wrappers exchange gradients."""

    def __init__(self, model: nn.Module, loss: Callable, bfloat16: bool):
        super().__init__()
        self.model, self.loss, self.bfloat16 = model, loss, bfloat16

    def forward(self, **batch) -> Tensor:
        if not self.bfloat16:
            return self.loss(self.model, **batch)
        with torch.autocast(next(self.model.parameters()).device.type, torch.bfloat16):
            return self.loss(self.model, **batch)


def _rate(step: int, steps: int, warmup: int, final: float) -> float:
    warmup = min(warmup, steps // 10)
    rise = (step + 1) / (warmup + 1)
    fall = 1 - (1 - final) * (step - warmup) / max(1, steps - warmup)
    return min(rise, fall)


def _average(ema: nn.Module, model: nn.Module, m: float) -> None:
    with torch.no_grad():
        for kept, new in zip(ema.parameters(), model.parameters(), strict=True):
            kept.lerp_(new, 1 - m)
        for kept, new in zip(ema.buffers(), model.buffers(), strict=True):
            kept.copy_(new)


def _share(batch: dict, accelerator) -> dict:
    """This process's part of the batch that all processes drew alike."""
    n, rank = accelerator.num_processes, accelerator.process_index
    for name, value in batch.items():
        if len(value) % n:  # gradients are averaged over processes, so each must have as many samples
            raise ValueError(f"batches must give {name} a length that {n} processes can share; got {len(value)}")
    return {name: value[rank::n].to(accelerator.device) for name, value in batch.items()}


def _bfloat16(precision: str) -> bool:
    choices = {"float32": False, "bfloat16": True, "auto": _has_bfloat16()}
    if precision not in choices:
        raise ValueError(f"precision must be one of {', '.join(choices)}; got {precision!r}")
    return choices[precision]


def _has_bfloat16() -> bool:
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()  # without AMX it is slower than float32


def _generator(*key: int) -> torch.Generator:
    """A generator seeded by several numbers; NumPy's SeedSequence mixes them well."""
    import numpy as np

    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))
