"""One training loop for the whole course, on Hugging Face Accelerate: the same recipe runs on one CPU or on many GPUs."""

import copy
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from dgm_course.paths import DiscretePath, GaussianPath

__all__ = ["Fit", "batches", "fit"]


@dataclass
class Fit:
    """What `fit` returns: the averaged model in eval mode, the loss of each step, the steps done and the seconds they took."""

    ema: nn.Module
    losses: list[float] = field(default_factory=list)
    step: int = 0
    seconds: float = 0.0


def batches(
    x: Tensor, path: GaussianPath, *, size: int, y: Tensor | None = None, drop: float = 0.1, null: int | None = None, seed: int = 0
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
    per_epoch = len(x) // size

    def batch(step: int) -> dict:
        epoch, place = divmod(step, per_epoch)
        order = torch.randperm(len(x), generator=_generator(seed, 0, epoch))
        chosen = order[place * size : (place + 1) * size]
        g = _generator(seed, 1, step)
        strata = (torch.randperm(size, generator=g) + torch.rand(size, generator=g)) / size
        t = (strata * path.T).ceil().clamp(1, path.T).long() if isinstance(path, DiscretePath) else strata
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

    .. math:: \bar\theta \leftarrow m\,\bar\theta + (1-m)\,\theta, \qquad m = \min\bigl(\text{ema}, \tfrac{1+n}{10+n}\bigr)

    The learning rate rises linearly over `warmup` steps and falls linearly to `final` times its peak at the last.

    Arguments:
        model: The module to train, in place; a `Denoiser` as a rule.
        loss: `loss(model, **batch)`, a scalar.
        batches: A function from the step to a batch, a dict of tensors; it alone is random. See `batches`.
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
        FloatingPointError: If the loss is not finite; the state file then still holds the last good save.
        KeyboardInterrupt: After saving, if stopped.

    Source:
        | Slide "Algorithm 1 Training"; Ho et al. (2020), appendix B, for the average

    Example:
        >>> net = nn.Linear(1, 1)
        >>> done = fit(net, lambda m, x: m(x).square().mean(), lambda step: {"x": torch.ones(4, 1)}, steps=3, progress=False)
        >>> len(done.losses)
        3
    """
    if not (isinstance(steps, int) and steps >= 1):
        raise ValueError(f"steps must be a whole number of at least 1; got {steps!r}")
    from accelerate import Accelerator
    from tqdm.auto import tqdm

    accelerator = Accelerator(mixed_precision=_mixed(precision))
    done = Fit(ema=copy.deepcopy(model).requires_grad_(False).eval().to(accelerator.device))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas, weight_decay=weight_decay)
    objective, optimizer = accelerator.prepare(_Objective(model, loss), optimizer)
    if state is not None and Path(state).is_file():
        _load(Path(state), model, optimizer, done, steps)
    bar = tqdm(total=steps, initial=done.step, disable=not (progress and accelerator.is_main_process), leave=False)

    def save():
        if state is not None and accelerator.is_main_process:
            _save(Path(state), model, optimizer, done, steps)

    with _stop_signals(state is not None) as stopped:
        while done.step < steps and not stopped():
            for group in optimizer.param_groups:
                group["lr"] = lr * _rate(done.step, steps, warmup, final)
            began = time.perf_counter()
            value = objective(**_share(batches(done.step), accelerator))
            accelerator.backward(value)
            accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
            done.losses.append(accelerator.reduce(value.detach(), "mean").item())
            if not math.isfinite(done.losses[-1]):
                raise FloatingPointError(f"the loss is {done.losses[-1]} at step {done.step}; lower lr ({lr:g}) or clip ({clip:g})")
            done.step += 1
            _average(done.ema, model, min(ema, (1 + done.step) / (10 + done.step)))
            done.seconds += time.perf_counter() - began
            bar.update()
            if done.step % save_every == 0 or done.step == steps:
                save()
                bar.set_postfix(loss=f"{sum(done.losses[-200:]) / len(done.losses[-200:]):.4f}")
            if watch and (done.step % watch_every == 0 or done.step == steps):
                watch(done)
        if stopped():
            save()
            raise KeyboardInterrupt(f"stopped after step {done.step} of {steps}")
    bar.close()
    model.eval()
    return done


class _Objective(nn.Module):
    """The loss as the forward pass of a module, which is where data-parallel wrappers exchange gradients."""

    def __init__(self, model: nn.Module, loss: Callable):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, **batch) -> Tensor:
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
    return {name: value[rank::n].to(accelerator.device) for name, value in batch.items()}


def _mixed(precision: str) -> str:
    choices = {"float32": "no", "bfloat16": "bf16", "auto": "bf16" if _has_bfloat16() else "no"}
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


@contextmanager
def _stop_signals(active: bool) -> Iterator[Callable[[], bool]]:
    """While active, Ctrl-C and SIGTERM wait for the end of the step, so that what is saved is whole."""
    import threading

    caught = []
    if not active or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {s: signal.signal(s, lambda number, frame: caught.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(caught)
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def _save(file: Path, model: nn.Module, optimizer, done: Fit, steps: int) -> None:
    """Write the whole state to a file beside, then rename: a crash leaves the old file or the new one, never half of one."""
    content = {
        "model": model.state_dict(),
        "ema": done.ema.state_dict(),
        "optimizer": optimizer.state_dict(),
        "losses": torch.tensor(done.losses, dtype=torch.float64),
        "step": done.step,
        "seconds": done.seconds,
        "steps": steps,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    torch.save(content, part)
    os.replace(part, file)


def _load(file: Path, model: nn.Module, optimizer, done: Fit, steps: int) -> None:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
        if content["steps"] != steps:
            raise ValueError(f"it was saved for steps = {content['steps']}, asked are {steps}")
        model.load_state_dict(content["model"])
        done.ema.load_state_dict(content["ema"])
        optimizer.load_state_dict(content["optimizer"])
    except Exception as error:
        raise ValueError(f"state: cannot go on from {file}: {error}. Delete the file to start anew") from error
    done.losses, done.step = content["losses"].tolist(), content["step"]
    done.seconds = content["seconds"]
