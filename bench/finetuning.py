"""What an update costs when the model is asked: seconds of a DiT with its update beside, merged, and with the other methods.

64 digits, one thread, in the same run. Rounds alternate between all; medians and their ratios to the base are printed. The updates
are not trained: their cost does not depend on their values.
"""

import statistics
import time

import torch
from rich.console import Console
from rich.table import Table

from dgm_course import checkpoints, peft
from dgm_course.personal import TARGETS, tuned

ROUNDS, ASKED = 15, 5


def main() -> None:
    torch.set_num_threads(1)
    xt, t, y = torch.randn(64, 1, 28, 28), torch.rand(64), torch.arange(64) % 10

    def base():
        return checkpoints.load("mnist-dit")

    two = tuned(base(), {"kind": "LoRA", "rank": 4})
    peft.add_lora(two.net, TARGETS, rank=4, name="second")
    peft.activate(two.net, default=0.5, second=0.5)
    folded = tuned(base(), {"kind": "prefix", "length": 16, "hidden": 128})
    peft.fold(folded.net)
    runs = {
        "base": base(),
        "LoRA, r = 1": tuned(base(), {"kind": "LoRA", "rank": 1}),
        "LoRA, r = 8": tuned(base(), {"kind": "LoRA", "rank": 8}),
        "two LoRAs, r = 4": two,
        "LoRA, r = 8, merged in place": peft.merge(tuned(base(), {"kind": "LoRA", "rank": 8})),
        "LoRA, r = 8, merged copy": peft.merged(tuned(base(), {"kind": "LoRA", "rank": 8})),
        "Houlsby": tuned(base(), {"kind": "adapters", "bottleneck": 8, "placement": "Houlsby"}),
        "Pfeiffer": tuned(base(), {"kind": "adapters", "bottleneck": 16, "placement": "Pfeiffer"}),
        "prefix of 16, with its perceptron": tuned(base(), {"kind": "prefix", "length": 16, "hidden": 128}),
        "prefix of 16, folded": folded,
    }
    seconds = {name: [] for name in runs}
    with torch.no_grad():
        for _ in range(ROUNDS):
            for name, model in runs.items():
                began = time.perf_counter()
                for _ in range(ASKED):
                    model(xt, t, y=y)
                seconds[name].append((time.perf_counter() - began) / ASKED)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    table = Table("model", "milliseconds", "of the base's", title="64 digits, one evaluation")
    for name, value in medians.items():
        table.add_row(name, f"{1000 * value:.1f}", f"{value / medians['base']:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
