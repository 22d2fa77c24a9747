"""How the embedded cuts were made: `python -m dgm_course.data.cut FOLDER`, where FOLDER holds the full sets.

With `python -m dgm_course.data.cut text NOTEBOOKS` the texts, from a folder with notebooks. Both keep the other's files.
"""

import hashlib
import json
import re
import sys
from pathlib import Path

import numpy as np

from dgm_course.data import FOLDER, NAMES, SPLITS, load

PER_CLASS = {"train": 1000, "test": 200}


def cut(source: str) -> None:
    """Write the first images of each class of every set, in their original order, and the hashes of the files."""
    hashes = json.loads((FOLDER / "hashes.json").read_text())
    for name in NAMES:
        for split in SPLITS:
            dataset = load(name, split, source=source)
            labels = np.array(dataset["label"])
            chosen = np.sort(np.concatenate([np.flatnonzero(labels == c)[: PER_CLASS[split]] for c in range(10)]))
            file = FOLDER / f"{name}-{split}.parquet"
            dataset.select(chosen).to_parquet(str(file))
            hashes[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    (FOLDER / "hashes.json").write_text(json.dumps(hashes, indent=2) + "\n")


def cut_text(notebooks: str) -> None:
    """Write the prose of all notebooks, without displayed formulas, and the beginning of their code, and the hashes."""
    most = {"prose": None, "code": 120_000}
    files = sorted(Path(notebooks).glob("*.ipynb"))
    cells = [cell for file in files for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]]
    prose = re.sub(r"\n*\$\$.*?\$\$\n*", "\n\n", _joined(cells, "markdown"), flags=re.S)
    hashes = json.loads((FOLDER / "hashes.json").read_text())
    for name, whole in {"prose": prose, "code": _joined(cells, "code")}.items():
        content = whole.encode()[: most[name]].decode(errors="ignore").encode()
        (FOLDER / f"{name}.txt").write_bytes(content)
        hashes[f"{name}.txt"] = hashlib.sha256(content).hexdigest()
    (FOLDER / "hashes.json").write_text(json.dumps(hashes, indent=2) + "\n")


def _joined(cells: list, kind: str) -> str:
    """The cells of a kind, each that was not there before, as one text."""
    return "\n\n".join(dict.fromkeys("".join(cell["source"]).strip() for cell in cells if cell["cell_type"] == kind))


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == "text":
        cut_text(sys.argv[2])
    elif len(sys.argv) == 2:
        cut(sys.argv[1])
    else:
        sys.exit(
            "usage: python -m dgm_course.data.cut FOLDER, where FOLDER holds mnist/train.parquet and so on; or text NOTEBOOKS"
        )
