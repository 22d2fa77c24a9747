"""Grading a class: 40 submissions of hw3, half of them good, half bad in assorted ways, two at a time.

Endless loops are left out, for they take as long as they are allowed to. The gradebook is checked: whoever should have all
points has them, and the others have the points that their faults leave.
"""

import csv
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

ROOT = Path(__file__).parents[1]
SOLUTION, STUB = ROOT / "solutions" / "hw3_ddpm.ipynb", ROOT / "homework" / "hw3_ddpm.ipynb"
WRONG = "def complete(xt, value, given, alpha_bar):\n    return xt, value, value"
SPY = "def x0_weight(s, t, alpha_bars, variance):\n    return open('tests/hidden/hw3.py').read()"
KERNEL = (
    "def skip_posterior(xt, x0, s, t, alpha_bars):\n    from dgm_course.paths import DiscretePath\n"
    "    return DiscretePath(1 - alpha_bars[1:] / alpha_bars[:-1]).posterior(xt, x0, s, t)"
)
EXTRA = {  # a cell at the end, and the points that are left of 20
    "in another way wrong": (WRONG, 18),
    "a spy": (SPY, 11),  # gaussian_bound calls it
    "a kernel": (KERNEL, 13),  # sample_subset calls it
    "an exit": ("import os; os._exit(0)", 0),
    "memory": ("import torch; x = torch.ones(2**33)", 20),
    "noise": ("for i in range(10_000): print('x' * 10_000)", 20),
    "in place": ("def perturb_zero_snr(x0, t, eps, alpha_bars):\n    return x0.mul_(0)", 18),
}


def main() -> None:
    solution, stub = SOLUTION.read_text(encoding="utf-8"), STUB.read_text(encoding="utf-8")
    classes = {f"good {i:02d}": (solution, 20) for i in range(20)}
    for i, (what, (cell, points)) in enumerate(2 * list(EXTRA.items())):
        classes[f"bad {i:02d} {what}"] = (with_cell(solution, cell), points)
    for i, text in enumerate(["", "{'cells'", '{"cells": 3}', stub, stub, stub]):
        classes[f"empty {i}"] = (text, 0)
    with tempfile.TemporaryDirectory() as folder:
        for name, (text, _) in classes.items():
            file = Path(folder) / "submissions" / f"{name}.ipynb"
            file.parent.mkdir(exist_ok=True)
            file.write_text(text, encoding="utf-8")
        words = ["grade", f"{folder}/submissions", "--homework", "hw3", "--out", f"{folder}/grades", "--jobs", "2"]
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "dgm_course.cli", *words], cwd=ROOT, check=True, capture_output=True)
        seconds = time.perf_counter() - began
        with open(f"{folder}/grades/gradebook.csv", encoding="utf-8-sig", newline="") as file:
            found = {Path(row["file"]).stem: float(row["score"]) for row in csv.DictReader(file)}
    wrong = {name: (found.get(name), points) for name, (_, points) in classes.items() if found.get(name) != points}
    console = Console(highlight=False)
    console.print(
        f"{len(classes)} submissions of hw3 graded in {seconds:.0f} s: {seconds / len(classes):.2f} s for each"
    )
    if wrong:
        console.print(f"wrong in the gradebook (got, should be): {wrong}")
        raise SystemExit(1)


def with_cell(notebook: str, source: str) -> str:
    """A notebook with one more code cell."""
    content = json.loads(notebook)
    cell = {"cell_type": "code", "id": "more", "metadata": {}, "outputs": [], "execution_count": None, "source": source}
    content["cells"].append(cell)
    return json.dumps(content)


if __name__ == "__main__":
    main()
