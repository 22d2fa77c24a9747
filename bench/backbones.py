"""Our backbones beside diffusers' `UNet2DModel`: what a step costs in each number format, and which digits equal time buys.

Everything runs on one thread, and what is compared stands in one table, from one run. All times are those of the processor, so
a busy machine makes the run longer and changes the ratios little. Compiling takes some minutes for each network.

    python bench/backbones.py [MINUTES]
"""

import copy
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from diffusers import UNet2DModel
from rich.console import Console
from rich.table import Table
from torch import nn

from dgm_course import checkpoints, data, losses, objectives, recipes, training
from dgm_course.denoisers import Denoiser
from dgm_course.paths import Cosine, DiscretePath
from dgm_course.schedules import linear_betas

ROUNDS, MINUTES, BATCH = 7, 4.0, 128
SCORED = {"classifier": "mnist-classifier", "samples": 1000, "steps": 50, "draws": 1}


class Theirs(nn.Module):
    """A `UNet2DModel` as our `Denoiser` calls its network, with attention at its lowest level; label 10 is the null label."""

    def __init__(self, widths: tuple[int, ...], layers: int, norm: str = "default"):
        super().__init__()
        plain = len(widths) - 1
        self.net = UNet2DModel(
            sample_size=28,
            in_channels=1,
            out_channels=1,
            block_out_channels=widths,
            down_block_types=("DownBlock2D",) * plain + ("AttnDownBlock2D",),
            up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * plain,
            layers_per_block=layers,
            norm_num_groups=8,
            resnet_time_scale_shift=norm,
            num_class_embeds=11,
        )

    def forward(self, xt, t, y):
        return self.net(xt, 1000 * t, y).sample


def ours(recipe: str) -> Callable[[], nn.Module]:
    return lambda: checkpoints.build(recipes.RECIPES[recipe]).net


def millions(model: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f} M"


# Speed

NETS = {
    "ours: UNet of mnist-unet": ours("mnist-unet"),
    "ours: DiT of mnist-dit": ours("mnist-dit"),
    "UNet2DModel 24, 48, two layers": lambda: Theirs((24, 48), 2),
    "UNet2DModel 32, 56, one layer": lambda: Theirs((32, 56), 1),
    "UNet2DModel 16, 32, 40, two layers": lambda: Theirs((16, 32, 40), 2),
}
FORMATS = {  # bfloat16, channels-last, compiled
    "float32": (False, False, False),
    "float32, channels-last": (False, True, False),
    "bfloat16": (True, False, False),
    "bfloat16, channels-last": (True, True, False),
    "bfloat16, compiled": (True, False, True),
}


def work(net: nn.Module, bfloat16: bool, channels_last: bool, compiled: bool) -> tuple[Callable, Callable]:
    """A step of training, and one evaluation without gradients, of a copy of the network."""
    net = copy.deepcopy(net)
    if channels_last:
        net = net.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-4)
    call = torch.compile(net) if compiled else net
    x, t, y = torch.randn(BATCH, 1, 28, 28), torch.rand(BATCH), torch.arange(BATCH) % 11

    def step():
        with torch.autocast("cpu", torch.bfloat16) if bfloat16 else nullcontext():
            loss = (call(x, t, y) - x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def draw():
        with torch.autocast("cpu", torch.bfloat16) if bfloat16 else nullcontext():
            call(x, t, y)

    return step, draw


def rate(run: Callable) -> float:
    """Images in a second."""
    began = time.process_time()
    run()
    return BATCH / (time.process_time() - began)


def speed() -> Table:
    """Images/s; rounds go through all networks and formats in turn, and medians are printed."""
    runs, failed, sizes = {}, {}, {}
    for name, make in NETS.items():
        net = make()
        sizes[name] = millions(net)
        convolves = any(isinstance(module, nn.Conv2d) for module in net.modules())
        for form, settings in FORMATS.items():
            if settings[1] and not convolves:
                continue
            try:
                for kind, run in zip(("training", "sampling"), work(net, *settings), strict=True):
                    run()  # the first call is slower, and compiles
                    runs[name, kind, form] = run
            except Exception as error:  # no compiler for C++, or one that a layer is too much for
                failed[name, form] = f"no: {type(error).__name__}"
    rounds = [{key: rate(run) for key, run in runs.items()} for _ in range(ROUNDS)]
    default = "bfloat16" if training._bfloat16("auto") else "float32"
    table = Table("network", "parameters", "", *FORMATS)
    table.title = f'images/s, batches of {BATCH}; training.fit(precision="auto") takes {default} here'
    for name in NETS:
        for kind in ("training", "sampling"):
            cells = (
                f"{statistics.median(row[name, kind, form] for row in rounds):.0f}"
                if (name, kind, form) in runs
                else failed.get((name, form), "–")
                for form in FORMATS
            )
            table.add_row(name, sizes[name], kind, *cells)
    return table


# Equal time

RECIPE = recipes.RECIPES["mnist-unet"]


def ours_denoiser() -> Denoiser:
    return checkpoints.build(RECIPE)


def their_best() -> Denoiser:
    """With our path, prediction, times and schedule of the learning rate."""
    return Denoiser(Theirs((16, 32, 40), 2).to(memory_format=torch.channels_last), Cosine(), predicts="v")


def their_default() -> Denoiser:
    """As in diffusers' example of unconditional training: the linear chain, noise predicted, uniform times."""
    return Denoiser(Theirs((16, 32, 40), 2), DiscretePath(linear_betas(1000)), predicts="eps")


# Tried, 60 s of the processor each: steps; v-loss on the test images at uniform times; Fréchet distance of 300 samples, 10 steps of
# DDIM. UNet2DModel in float32, channels-last, with our path, times and schedule of the learning rate:
#     16, 32, 40, two layers, lr 1e-3              50 steps   0.333   9.39
#     16, 32, 40, two layers, lr 2e-3              57 steps   0.259   8.34
#     16, 32, 40, two layers, lr 4e-3              59 steps   0.230   8.63
#     24, 32, 48, one layer, lr 2e-3               62 steps   0.233   8.70
#     8, 32, 56, one layer, scale-shift, lr 2e-3   77 steps   0.305   8.60
#     ours, as in its recipe                      213 steps   0.189   4.58
CONTESTANTS = {
    "ours: UNet of mnist-unet": (ours_denoiser, RECIPE["times"], {}),
    "UNet2DModel, tuned": (their_best, RECIPE["times"], {"lr": 2e-3, "precision": "float32"}),
    "UNet2DModel, its example": (
        their_default,
        "uniform",
        {"lr": 1e-4, "betas": (0.95, 0.999), "weight_decay": 1e-6, "warmup": 500, "final": 0.0, "precision": "float32"},
    ),
}


def trained(denoiser: Denoiser, times: str, x, y, seconds: float, **settings) -> tuple[training.Fit, float]:
    """Train for so many seconds of the processor, and say how many they were.

    The average of the weights reaches over a sixteenth of the steps, as in the recipe: 2,000 of 32,000.
    """
    draw = training.batches(x, denoiser.path, size=BATCH, y=y, null=10, times=times)

    def fit(model, steps):
        began, ema = time.process_time(), max(0.0, 1 - 16 / steps)
        done = training.fit(model, losses.simple, draw, steps=steps, ema=ema, progress=False, **settings)
        return done, time.process_time() - began

    spare = copy.deepcopy(denoiser)
    fit(spare, 3)  # the first steps are slower
    pace = fit(spare, 10)[1] / 10
    return fit(denoiser, max(1, round(seconds / pace)))


def contest(minutes: float) -> Table:
    """Ours and theirs on MNIST: the same images, batches and seconds, about as many parameters, the same sampler."""
    (x, y), test = (data.images(data.load("mnist", split)) for split in ("train", "test"))
    floor = recipes._floor({"scored with": SCORED}, (x, y), test)["Fréchet distance of real images"]
    table = Table("network", "parameters", "steps", "seconds", "Fréchet distance", "classified as asked")
    table.title = (
        f"MNIST, {len(x):,} images, {minutes:g} minutes each; real images have a Fréchet distance of {floor:.3f}"
    )
    for name, (make, times, settings) in CONTESTANTS.items():
        torch.manual_seed(0)
        denoiser = make()
        done, spent = trained(denoiser, times, x, y, 60 * minutes, **settings)
        score = objectives.quality(done.ema, *test, **SCORED)
        row = f"{done.step}", f"{spent:.0f}", f"{score['Fréchet distance']:.3f}", f"{score['classified as asked']:.1%}"
        table.add_row(name, millions(denoiser), *row)
    return table


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    Console().print(speed())
    Console().print(contest(float(sys.argv[1]) if len(sys.argv) > 1 else MINUTES))


if __name__ == "__main__":
    main()
