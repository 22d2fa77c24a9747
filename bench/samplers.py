"""What a sampler adds to the network: microseconds for a step on 16×1×28×28, one thread, beside diffusers in the same run.

The network is replaced by one that returns a tensor it already has, so that what is left is the work of the sampler and
of the conversion where the network predicts ε and not x_0. What is done once for a run, the tables here and `set_timesteps`
there, is timed apart. Rounds alternate between the two libraries; medians are printed.
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


@torch.no_grad()
def theirs(scheduler, x, net) -> None:
    for t in scheduler.timesteps:
        x = scheduler.step(net(x, t), t, x).prev_sample


def micros(run, *args, per: int = STEPS) -> float:
    began = time.perf_counter()
    run(*args)
    return 1e6 * (time.perf_counter() - began) / per


def main() -> None:
    torch.set_num_threads(1)
    betas, x = linear_betas(1000), torch.randn(16, 1, 28, 28)
    answer = 0.1 * torch.randn_like(x)
    net = lambda xt, t: answer  # noqa: E731
    kinds = {
        "DDPM": (samplers.ddpm, DDPMScheduler, {"clip_sample": False}),
        "DDIM": (samplers.ddim, DDIMScheduler, {"clip_sample": False}),
        "DPM-Solver++(2M)": (samplers.dpm_solver_pp_2m, DPMSolverMultistepScheduler, {"final_sigmas_type": "zero"}),
    }
    table = Table(
        "sampler", "given", "ours", "of it noise", "diffusers", "ratio without noise", "set-up ours", "theirs"
    )
    table.title = f"µs for a step of {STEPS}, and for the set-up of a run"
    draw = statistics.median(micros(lambda: [torch.randn(x.shape) for _ in range(STEPS)]) for _ in range(ROUNDS))
    for name, (sampler, scheduler_class, options) in kinds.items():
        for given, theirs_given in {"x0": "sample", "eps": "epsilon"}.items():
            scheduler = scheduler_class(trained_betas=betas.float().numpy(), prediction_type=theirs_given, **options)
            rounds = []
            for _ in range(ROUNDS):
                path = DiscretePath(betas)
                denoiser = net if given == "x0" else Denoiser(net, path, predicts=given)
                began = micros(sampler, denoiser, path, x, path.times(STEPS), per=1)
                mine = micros(samplers.last, sampler(denoiser, path, x, path.times(STEPS)))
                set_up = micros(scheduler.set_timesteps, STEPS, per=1)
                rounds.append((mine, micros(theirs, scheduler, x, net), began, set_up))
            mine, other, began, set_up = (statistics.median(column) for column in zip(*rounds, strict=True))
            noise = draw if name == "DDPM" else 0.0
            ratio = (other - noise) / (mine - noise)
            table.add_row(name, given, *(f"{value:.1f}" for value in (mine, noise, other, ratio, began, set_up)))
    Console().print(table)


if __name__ == "__main__":
    main()
