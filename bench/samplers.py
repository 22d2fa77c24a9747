"""What a sampler adds to the network: microseconds for a step on 16×1×28×28, one thread, beside diffusers in the same run.

The network is replaced by one that returns a tensor it already has, so that what is left is the work of the sampler and
of the conversion from what the network predicts. Rounds alternate between the two libraries; medians are printed.
"""

import statistics
import time

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from rich.console import Console
from rich.table import Table

from dgm_course import samplers
from dgm_course.denoisers import Denoiser
from dgm_course.paths import DiscretePath
from dgm_course.schedules import linear_betas

STEPS, ROUNDS = 50, 21


def ours(sampler, path, x, times, net) -> None:
    samplers.last(sampler(Denoiser(net, path, predicts="eps"), path, x, times))


@torch.no_grad()
def theirs(scheduler, x, net) -> None:
    for t in scheduler.timesteps:
        x = scheduler.step(net(x, t), t, x).prev_sample


def seconds(run, *args) -> float:
    began = time.perf_counter()
    run(*args)
    return (time.perf_counter() - began) / STEPS


def main() -> None:
    torch.set_num_threads(1)
    betas = linear_betas(1000)
    path, x = DiscretePath(betas), torch.randn(16, 1, 28, 28)
    answer = 0.1 * torch.randn_like(x)
    net = lambda xt, t: answer  # noqa: E731
    options = {"trained_betas": betas.float().numpy(), "clip_sample": False}
    pairs = {
        "DDPM": (samplers.ddpm, DDPMScheduler(**options)),
        "DDIM": (samplers.ddim, DDIMScheduler(**options)),
        "DPM-Solver++(2M)": (
            samplers.dpm_solver_pp_2m,
            DPMSolverMultistepScheduler(trained_betas=betas.float().numpy(), final_sigmas_type="zero"),
        ),
    }
    table = Table("sampler", "ours, µs", "of it noise, µs", "diffusers, µs", "ratio")
    draw = statistics.median(seconds(lambda: [torch.randn(x.shape) for _ in range(STEPS)]) for _ in range(ROUNDS))
    for name, (sampler, scheduler) in pairs.items():
        measured = []
        for _ in range(ROUNDS):
            scheduler.set_timesteps(STEPS)
            mine = seconds(ours, sampler, DiscretePath(betas), x, path.times(STEPS), net)
            measured.append((mine, seconds(theirs, scheduler, x, net)))
        mine, other = (1e6 * statistics.median(column) for column in zip(*measured, strict=True))
        noise = 1e6 * draw if name == "DDPM" else 0.0
        table.add_row(name, f"{mine:.1f}", f"{noise:.1f}", f"{other:.1f}", f"{other / mine:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
