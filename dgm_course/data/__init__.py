"""Real images and text without a network: balanced cuts of MNIST and Fashion-MNIST, and the course's own words, in this folder.

Each cut holds the first 1,000 images of each class of the training set and the first 200 of the test set. Fashion-MNIST
was cut from files in a shuffled order, so its split is not the original one. `NOTICE.md` has sources and licences.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["NAMES", "TEXTS", "balanced", "content_hash", "images", "load", "resized", "text"]

FOLDER = Path(__file__).parent
NAMES = {"mnist": "ylecun/mnist", "fashion_mnist": "zalando-datasets/fashion_mnist"}  # with their names on the hub
TEXTS = ("prose", "code")
SPLITS = ("train", "test")


def load(name: str, split: str = "train", source: str | Path | None = None):
    """The images and labels of one split, as a `datasets.Dataset` with the columns `image` and `label`.

    Arguments:
        name: "mnist" or "fashion_mnist".
        split: "train" (10,000 images in the embedded cut) or "test" (2,000).
        source: None for the embedded cut; "hub" for the full set from the Hugging Face hub (needs a network); or a
            folder with the full set as `<name>/<split>.parquet`.

    Raises:
        ValueError: If the name or the split is unknown, or the embedded file is not the one that was shipped.
        FileNotFoundError: If the folder has no such file.

    Example:
        >>> digits = load("mnist", "test")
        >>> len(digits), digits.column_names
        (2000, ['image', 'label'])
    """
    if name not in NAMES:
        raise ValueError(f"name must be one of {', '.join(NAMES)}; got {name!r}")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
    import datasets  # slow to import, so only where it is needed

    if source == "hub":
        return datasets.load_dataset(NAMES[name], split=split)
    if source is None:
        file = FOLDER / f"{name}-{split}.parquet"
        _verify(file)
    else:
        file = Path(source) / name / f"{split}.parquet"
        if not file.is_file():
            raise FileNotFoundError(f"source must be None, 'hub' or a folder of full sets; there is no {file}")
    import pyarrow.parquet

    try:  # through Arrow, in memory: `Dataset.from_parquet` would leave a copy in a cache folder of the user's home
        return datasets.Dataset(pyarrow.parquet.read_table(file)).select_columns(["image", "label"])
    except (OSError, ValueError) as error:  # Arrow's errors are ValueErrors
        raise ValueError(f"{file} is no parquet file with the columns image and label: {error}") from error


def text(name: str, split: str = "train") -> Tensor:
    """The bytes of a text: what the notebooks of this course say ("prose", without displayed formulas), or what they run ("code").

    Arguments:
        name: "prose" or "code".
        split: "train", the first nine tenths, or "test", the rest.

    Returns:
        UTF-8 bytes, int64 (N,).

    Raises:
        ValueError: If the name or the split is unknown, or the file is not the one that was shipped.

    Example:
        >>> bytes(text("code")[:17].tolist()).decode()
        'import importlib.'
    """
    if name not in TEXTS:
        raise ValueError(f"name must be one of {', '.join(TEXTS)}; got {name!r}")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
    file = FOLDER / f"{name}.txt"
    _verify(file)
    whole = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8).long()
    end = len(whole) * 9 // 10
    return whole[:end] if split == "train" else whole[end:]


def images(dataset, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
    """All images of a dataset as kernels want them, and their labels.

    Arguments:
        dataset: What `load` returns, or a part of it.

    Returns:
        Images, float32 (B, 1, 28, 28) in [−1, 1], and labels, int64 (B,).

    Example:
        >>> x, y = images(load("mnist", "test").select(range(3)))
        >>> x.shape, x.min().item(), x.max().item(), y.dtype
        (torch.Size([3, 1, 28, 28]), -1.0, 1.0, torch.int64)
    """
    from datasets import Image

    table = dataset.with_format("arrow")[:]  # the bytes as they are stored; decoded here, it takes half the time
    pixels = np.stack([np.asarray(Image().decode_example(image)) for image in table["image"].to_pylist()])
    x = torch.from_numpy(pixels)[:, None].to(device, torch.float32) / 127.5 - 1
    return x, torch.tensor(table["label"].to_pylist(), device=device)


def balanced(x: Tensor, y: Tensor, number: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """`number` of the images and their labels, as many of each class, drawn without replacement and in order of class.

    Raises:
        ValueError: If there are not enough of a class, or `number` is not a multiple of the number of classes.

    Example:
        >>> x, y = balanced(torch.zeros(6, 1, 28, 28), torch.tensor([0, 1, 0, 1, 1, 0]), 4)
        >>> len(x), y.tolist()
        (4, [0, 0, 1, 1])
    """
    classes = int(y.max()) + 1
    if number < 1 or number % classes or number // classes > y.bincount().min():
        asked = f"a positive multiple of {classes}, and at most {classes * int(y.bincount().min())}"
        raise ValueError(f"number must be {asked}; got {number}")
    chosen = []
    for c in range(classes):
        members = (y == c).nonzero()[:, 0]
        chosen.append(members[torch.randperm(len(members), generator=generator)[: number // classes]])
    chosen = torch.cat(chosen)
    return x[chosen], y[chosen]


def resized(x: Tensor, size: int) -> Tensor:
    """Images at another resolution: means over squares of pixels for a smaller one, bilinear for a larger one.

    Arguments:
        x: Shape (B, C, H, W).
        size: The new width, a divisor or a multiple of W; the height changes alike.

    Raises:
        ValueError: If `size` is neither.

    Example:
        >>> resized(torch.zeros(2, 1, 28, 28), 7).shape, resized(torch.zeros(2, 1, 28, 28), 56).shape
        (torch.Size([2, 1, 7, 7]), torch.Size([2, 1, 56, 56]))
    """
    side = x.shape[-1]
    if size < 1 or (side % size and size % side):
        raise ValueError(f"size must be a divisor or a multiple of {side}; got {size}")
    if size <= side:
        return torch.nn.functional.avg_pool2d(x, side // size)
    return torch.nn.functional.interpolate(x, scale_factor=size // side, mode="bilinear")


def content_hash(x: Tensor, y: Tensor) -> str:
    """SHA-256 of images and labels as 8-bit numbers: the same for every file format that holds the same images."""
    digest = hashlib.sha256()
    digest.update(((x.cpu() + 1) * 127.5).round().to(torch.uint8).numpy().tobytes())
    digest.update(y.cpu().to(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _verify(file: Path) -> None:
    expected = json.loads((FOLDER / "hashes.json").read_text())[file.name]
    if not file.is_file():
        raise FileNotFoundError(f"the embedded file {file} is missing; reinstall dgm-course")
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != expected:
        raise ValueError(f"{file} is damaged: its SHA-256 is {found[:12]}…, not {expected[:12]}…; reinstall dgm-course")
