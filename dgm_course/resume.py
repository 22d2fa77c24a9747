"""Stop a training anywhere, and go on as if it never had: its whole state in one file, safe against crashes."""

import os
import signal
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

__all__ = ["load", "save", "stop_signals"]


@contextmanager
def stop_signals(active: bool) -> Iterator[Callable[[], bool]]:
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


def save(file: Path, model: nn.Module, optimizer, done, steps: int) -> None:
    """Write the state, `done` being a `training.Fit`.

    To a file beside, then renamed: a crash leaves the old file or the new one, never half of one.
    """
    content = {
        "model": model.state_dict(),
        "ema": done.ema.state_dict(),
        "optimizer": optimizer.state_dict(),
        "losses": torch.tensor(done.losses, dtype=torch.float64),
        "step": done.step,
        "seconds": done.seconds,
        "steps": steps,
        "random": [torch.get_rng_state(), *torch.cuda.get_rng_state_all()],  # dropout draws from these
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    torch.save(content, part)
    os.replace(part, file)


def load(file: Path, model: nn.Module, optimizer, done, steps: int) -> None:
    """Put the state of a file into model, optimizer and `done`, a `training.Fit`.

    Raises:
        ValueError: If the file is damaged, or belongs to another model or another number of steps.
    """
    try:
        with zipfile.ZipFile(file) as parts:  # `torch.load` does not look at their checksums
            if damaged := parts.testzip():
                raise ValueError(f"its part {damaged} is damaged")
        content = torch.load(file, map_location="cpu", weights_only=True)
        if content["steps"] != steps:
            raise ValueError(f"it was saved for steps = {content['steps']}, asked are {steps}")
        model.load_state_dict(content["model"])
        done.ema.load_state_dict(content["ema"])
        optimizer.load_state_dict(content["optimizer"])
        done.losses, done.step, done.seconds = content["losses"].tolist(), content["step"], content["seconds"]
        processor, *others = content["random"]
        torch.set_rng_state(processor)
        torch.cuda.set_rng_state_all(others)
    except Exception as error:
        raise ValueError(f"state: cannot go on from {file}: {error}. Delete the file to start anew") from error
