"""How the embedded cuts were made: `python -m dgm_course.data.cut FOLDER`, where FOLDER holds the full sets."""

import hashlib
import json
import sys

import numpy as np

from dgm_course.data import FOLDER, NAMES, SPLITS, load

PER_CLASS = {"train": 1000, "test": 200}


def cut(source: str) -> None:
    """Write the first images of each class of every set, in their original order, and the hashes of the files."""
    hashes = {}
    for name in NAMES:
        for split in SPLITS:
            dataset = load(name, split, source=source)
            labels = np.array(dataset["label"])
            chosen = np.sort(np.concatenate([np.flatnonzero(labels == c)[: PER_CLASS[split]] for c in range(10)]))
            file = FOLDER / f"{name}-{split}.parquet"
            dataset.select(chosen).to_parquet(str(file))
            hashes[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    (FOLDER / "hashes.json").write_text(json.dumps(hashes, indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m dgm_course.data.cut FOLDER, where FOLDER holds mnist/train.parquet and so on")
    cut(sys.argv[1])
