"""What distillation saves: seconds for 100 digits with guidance w = 2, teacher and students, one thread, in the same run.

The teacher takes 16 steps of DDIM, each with two evaluations. Rounds alternate between all; medians are printed.
"""

import statistics
import time

import torch
from rich.console import Console
from rich.table import Table

from dgm_course import checkpoints, samplers
from dgm_course.denoisers import clipped
from dgm_course.guidance import classifier_free

ROUNDS, W = 7, 2.0


def main() -> None:
    torch.set_num_threads(1)
    noise, labels = torch.randn(100, 1, 28, 28), torch.arange(10).repeat(10)
    teacher = checkpoints.load("mnist-unet")
    guided = classifier_free(lambda xt, t: teacher(xt, t, y=labels), teacher, 1 + W)
    runs = {"mnist-unet, guided": (guided, 16, 32)}
    for name, steps in (("mnist-guided", 16), ("mnist-guided-8", 8), ("mnist-guided-4", 4), ("mnist-guided-2", 2)):
        student = checkpoints.load(name)
        told = lambda xt, t, d=student: d(xt, t, y=labels, w=torch.full((len(xt),), W))  # noqa: E731
        runs[name] = told, steps, steps
    seconds = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, (d, steps, _) in runs.items():
            began = time.perf_counter()
            samplers.last(samplers.ddim(clipped(d), teacher.path, noise, teacher.path.times(steps)))
            seconds[name].append(time.perf_counter() - began)
    table = Table("network", "steps", "evaluations", "seconds", "times faster", title=f"100 digits, w = {W:g}")
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, (_, steps, evaluations) in runs.items():
        faster = medians["mnist-unet, guided"] / medians[name]
        table.add_row(name, str(steps), str(evaluations), f"{medians[name]:.2f}", f"{faster:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
