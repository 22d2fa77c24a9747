"""What the students of `distillation` are trained on.

The card's "distils" says how: {"kind": "progressive", "steps": N}, "guidance" or "consistency"; with "weights", [low, high], the student is
told a weight of guidance. The checkpoint that it starts from is its teacher.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dgm_course import checkpoints, distillation, training
from dgm_course.denoisers import Denoiser, clipped
from dgm_course.guidance import classifier_free

__all__ = ["distilling"]


def distilling(card: dict, student: Denoiser, x: Tensor, y: Tensor) -> tuple[Callable, Callable]:
    """Loss and batches of a student, whose batches carry the ends of its step, t and s, beside what `training.batches` draws.

    Its teacher is clipped, as it is when it is sampled. Steps of 1/N start at every multiple of 1/N; for a student with a weight, at
    every multiple of 1/(2N), for the stochastic sampler. All are weighted by the truncated SNR.
    """
    how, path, null = card["distils"], student.path, card["net"]["num_classes"]
    teacher, weights, jumps = checkpoints.load(card["start"]), how.get("weights"), how.get("steps")
    drawn = training.batches(x, path, size=card["batch"], y=y, null=null, drop=0 if weights else 0.1, seed=card["seed"])

    def batch(step):
        out = drawn(step)
        if weights:
            g = torch.Generator().manual_seed(1_000_000 * card["seed"] + step)
            out["w"] = weights[0] + (weights[1] - weights[0]) * torch.rand(card["batch"], generator=g)
        if "steps" in how:
            count, gap = (2 * jumps - 1, 0.5 / jumps) if weights else (jumps, 1 / jumps)
            t = (1 / jumps + ((out["t"].double() * count).ceil() - 1) * gap).clamp(max=1)
            out |= {"t": t, "s": (t - 1 / jumps).clamp(min=0)}
        return out

    def loss(student, x0, t, eps, s=None, **cond):
        taught = clipped(_told(teacher.to(x0.device), **cond))
        xt = path.perturb(x0, t, eps)
        if how["kind"] == "consistency":
            target = distillation.consistency_target(clipped(_told(student, **cond)), taught, path, xt, t, s)
        elif how["kind"] == "guidance":
            with torch.no_grad():
                target = clipped(classifier_free(_told(teacher, y=cond["y"]), teacher, 1 + cond["w"]))(xt, t)
        else:
            target = distillation.progressive_target(taught, path, xt, t, (t + s) / 2, s)
        return distillation.matching(student, xt, t, target, distillation.truncated_snr(path, t), **cond)

    return loss, batch


def _told(d: Callable, **cond) -> Callable:
    """The denoiser with its conditions bound."""
    return lambda xt, t: d(xt, t, **cond)
