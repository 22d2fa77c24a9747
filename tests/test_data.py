"""The embedded images are the ones that were shipped, and arrive as kernels want them."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import einops
import numpy as np
import PIL.Image
import pyarrow.parquet
import pytest
import torch

import dgm_course
from dgm_course import data
from dgm_course.data import cut

FILES = [(name, split) for name in ("mnist", "fashion_mnist") for split in ("train", "test")]
EACH = {"train": 1000, "test": 200}


def tiny(count: int, start: int = 0, classes: int = 10) -> datasets.Dataset:
    """Images of one grey level each, which is also their number, and labels that run through the classes."""
    levels = range(start, start + count)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(c) for c in range(classes)])}
    )
    images = [PIL.Image.fromarray(np.full((28, 28), level, np.uint8)) for level in levels]
    return datasets.Dataset.from_dict({"image": images, "label": [i % classes for i in levels]}, features=features)


@pytest.fixture
def source(tmp_path):
    """A folder of full sets, as `source` wants it; the full sets are tiny."""
    for number, (name, split) in enumerate(FILES):
        (tmp_path / name).mkdir(exist_ok=True)
        tiny(50, start=50 * number).to_parquet(str(tmp_path / name / f"{split}.parquet"))
    return tmp_path


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of the embedded files, which a test may damage; `data` reads it."""
    for file in data.FOLDER.glob("*.*"):
        shutil.copy(file, tmp_path)
    monkeypatch.setattr(data, "FOLDER", tmp_path)
    return tmp_path


# The embedded cuts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "split"), FILES)
def test_embedded_images(name, split):
    """Every pixel is the PNG's, read here without `datasets`; classes are balanced, types and range as asked."""
    table = pyarrow.parquet.read_table(data.FOLDER / f"{name}-{split}.parquet")
    pixels = np.stack([np.array(PIL.Image.open(io.BytesIO(row["bytes"]))) for row in table["image"].to_pylist()])
    labels = table["label"].to_numpy()

    dataset = data.load(name, split)
    assert isinstance(dataset, datasets.Dataset)
    assert dataset.column_names == ["image", "label"]
    assert isinstance(dataset.features["image"], datasets.Image)
    assert isinstance(dataset.features["label"], datasets.ClassLabel)
    assert dataset[3]["image"].size == (28, 28)

    x, y = data.images(dataset)
    assert x.shape == (10 * EACH[split], 1, 28, 28) and x.dtype == torch.float32 and x.is_contiguous()
    assert y.shape == (10 * EACH[split],) and y.dtype == torch.int64
    assert x.min() == -1 and x.max() == 1
    np.testing.assert_allclose(x[:, 0].double().numpy(), pixels / 127.5 - 1, rtol=0, atol=1e-7)
    assert y.tolist() == labels.tolist()
    assert y.bincount().tolist() == [EACH[split]] * 10

    content = pixels.astype(np.uint8).tobytes() + labels.astype(np.uint8).tobytes()
    assert data.content_hash(x, y) == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(("name", "split"), FILES)
def test_embedded_files_have_the_listed_hashes(name, split):
    """`hashes.json` lists the SHA-256 sum of each file."""
    file = data.FOLDER / f"{name}-{split}.parquet"
    listed = json.loads((data.FOLDER / "hashes.json").read_text())
    assert listed[file.name] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert sorted(listed) == sorted(f"{name}-{split}.parquet" for name, split in FILES)


def test_mnist_is_mnist():
    """The well-known first labels, mean and standard deviation of the training set."""
    x, y = data.images(data.load("mnist").select(range(2000)))
    assert y[:6].tolist() == [5, 0, 4, 1, 9, 2]
    assert ((x + 1) / 2).mean() == pytest.approx(0.1307, abs=0.004)
    assert ((x + 1) / 2).std() == pytest.approx(0.3081, abs=0.004)


def test_content_hash_sees_every_change():
    """One grey level or one label more is another hash; the format that holds the images is not in it."""
    x, y = data.images(tiny(20))
    before = data.content_hash(x, y)
    assert data.content_hash(x.double(), y.int()) == before
    brighter, other = x.clone(), y.clone()
    brighter[7, 0, 3, 3] += 2 / 255
    other[7] = 8
    assert len({before, data.content_hash(brighter, y), data.content_hash(x, other)}) == 3


def test_notice_names_sources_and_licences():
    """What the licences ask to be told is told, and so is the shuffled split."""
    notice = (data.FOLDER / "NOTICE.md").read_text(encoding="utf-8")
    for said in ("LeCun", "CC BY-SA 3.0", "Copyright © 2017 Zalando SE, https://tech.zalando.com", "hashes.json"):
        assert said in notice
    assert "Permission is hereby granted, free of charge" in notice and "not the original one" in notice


# Images -------------------------------------------------------------------------------------------------------------


def test_images_of_a_part():
    """A selection is taken in its own order, also after another format was set."""
    dataset = tiny(30).with_format("numpy").select([4, 29, 0])
    x, y = data.images(dataset)
    assert y.tolist() == [4, 9, 0]
    assert ((x[:, 0, 14, 14] + 1) * 127.5).round().tolist() == [4, 29, 0]
    assert dataset.format["type"] == "numpy"


def test_images_from_files(tmp_path):
    """A dataset that holds paths of files instead of their bytes, as `datasets` makes from a folder."""
    PIL.Image.fromarray(np.full((28, 28), 51, np.uint8)).save(tmp_path / "grey.png")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    dataset = datasets.Dataset.from_dict({"image": [str(tmp_path / "grey.png")], "label": [3]}, features=features)
    x, y = data.images(dataset)
    assert y.tolist() == [3]
    torch.testing.assert_close(x, torch.full((1, 1, 28, 28), -0.6))


# Other resolutions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 4, 7, 14, 28])
@pytest.mark.parametrize("channels", [1, 3])
def test_smaller_images_are_means_over_squares(size, channels, generator):
    """By einops, and with it the same mean of the whole image; 28 is the image itself."""
    x = torch.randn(3, channels, 28, 28, generator=generator, dtype=torch.float64)
    small = data.resized(x, size)
    expected = einops.reduce(x, "b c (h p) (w q) -> b c h w", "mean", h=size, w=size)
    torch.testing.assert_close(small, expected, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(small.mean((2, 3)), x.mean((2, 3)), rtol=1e-12, atol=1e-13)
    if size == 28:
        assert torch.equal(small, x)


@pytest.mark.parametrize("side, times", [(4, 2), (3, 3), (2, 4), (1, 5)])
def test_larger_images_are_bilinear(side, times, generator):
    """Each new pixel lies between the centres of four old ones, by loops; outside the last centres the edge goes on."""
    x = torch.randn(2, 1, side, side, generator=generator, dtype=torch.float64)
    large = data.resized(x, times * side)
    assert large.shape == (2, 1, times * side, times * side)

    def weights(k):
        place = min(max((k + 0.5) / times - 0.5, 0.0), side - 1.0)  # of a new centre, counted in old ones
        low = min(int(place), max(side - 2, 0))
        return [(low, 1 - place + low), (min(low + 1, side - 1), place - low)]

    for i in range(times * side):
        for j in range(times * side):
            value = sum(p * q * x[:, 0, r, c] for r, p in weights(i) for c, q in weights(j))
            torch.testing.assert_close(large[:, 0, i, j], value, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("size", [14, 28, 56])
def test_resized_images_keep_type_and_range(size):
    """Digits stay float32 in [−1, 1], and an even image is even at every size."""
    x, _ = data.images(data.load("mnist", "test").select(range(5)))
    other = data.resized(x, size)
    assert other.shape == (5, 1, size, size) and other.dtype == torch.float32
    assert -1 <= other.min() and other.max() <= 1
    torch.testing.assert_close(
        data.resized(torch.full((1, 1, 28, 28), -0.3), size), torch.full((1, 1, size, size), -0.3)
    )


def test_down_undoes_copying_pixels(generator):
    """Means over squares of copies are the pixels."""
    x = torch.randn(2, 1, 14, 14, generator=generator, dtype=torch.float64)
    copies = x.repeat_interleave(4, 2).repeat_interleave(4, 3)
    torch.testing.assert_close(data.resized(copies, 14), x, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("size", [0, -28, 3, 27, 29, 42])
def test_resized_checks_the_size(size):
    """Neither a divisor nor a multiple: the error says what came and what is asked."""
    with pytest.raises(ValueError, match=f"^size must be a divisor or a multiple of 28; got {size}"):
        data.resized(torch.zeros(1, 1, 28, 28), size)


# Sources ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "name", "split"), [(n, *file) for n, file in enumerate(FILES)])
def test_source_folder(number, name, split, source):
    """The set comes from the folder, whole and in its order."""
    for folder in (source, str(source)):
        x, y = data.images(data.load(name, split, source=folder))
        assert ((x[:, 0, 0, 0] + 1) * 127.5).round().tolist() == list(range(50 * number, 50 * number + 50))
        assert y.tolist() == [i % 10 for i in range(50)]


def test_source_hub_asks_for_the_right_set(monkeypatch):
    """The full sets are asked for by their names on the hub; no network is touched here."""
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: asked.append((args, options)) or "full set")
    assert data.load("mnist", "test", source="hub") == "full set"
    assert data.load("fashion_mnist", source="hub") == "full set"
    assert asked == [
        (("ylecun/mnist",), {"split": "test"}),
        (("zalando-datasets/fashion_mnist",), {"split": "train"}),
    ]


def test_no_source_asks_no_network(monkeypatch):
    """Neither the embedded cut nor a folder goes through `load_dataset`."""
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: pytest.fail("the hub was asked"))
    assert len(data.load("mnist", "test")) == 2000


def test_source_folder_without_the_file(source):
    """The error names the file that is not there."""
    file = source / "mnist" / "test.parquet"
    file.unlink()
    with pytest.raises(FileNotFoundError, match="source") as failure:
        data.load("mnist", "test", source=source)
    assert str(file) in str(failure.value)


@pytest.mark.parametrize("damage", [lambda content: content[:-100], lambda content: b"", lambda content: b"no parquet"])
def test_source_folder_with_a_damaged_file(damage, source):
    """The error names the file that is no parquet file."""
    file = source / "mnist" / "test.parquet"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match="is no parquet file") as failure:
        data.load("mnist", "test", source=source)
    assert str(file) in str(failure.value)


def test_source_folder_with_other_columns(source):
    """The error names the file and the columns that it should have; further columns do no harm."""
    file = source / "mnist" / "test.parquet"
    tiny(5).add_column("number", list(range(5))).to_parquet(str(file))
    assert data.load("mnist", "test", source=source).column_names == ["image", "label"]
    tiny(5).rename_column("label", "digit").to_parquet(str(file))
    with pytest.raises(ValueError, match="columns image and label") as failure:
        data.load("mnist", "test", source=source)
    assert str(file) in str(failure.value)


@pytest.mark.parametrize("name", ["MNIST", "cifar10", "", None])
def test_unknown_name(name):
    """The error names what came and what there is."""
    with pytest.raises(ValueError, match=f"name must be one of mnist, fashion_mnist; got {name!r}"):
        data.load(name)


@pytest.mark.parametrize("split", ["validation", "Train", "", None])
def test_unknown_split(split):
    """The error names what came and what there is."""
    with pytest.raises(ValueError, match=f"split must be one of train, test; got {split!r}"):
        data.load("mnist", split)


# Damage -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0.001, 0.5, 0.999])
def test_one_flipped_byte_is_noticed(place, copy):
    """The error names the file, and only that file is refused."""
    file = copy / "mnist-test.parquet"
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged.*reinstall") as failure:
        data.load("mnist", "test")
    assert str(file) in str(failure.value)
    assert len(data.load("fashion_mnist", "test")) == 2000


def test_truncated_file_is_noticed(copy):
    """The error names the file."""
    file = copy / "mnist-test.parquet"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is damaged.*reinstall") as failure:
        data.load("mnist", "test")
    assert str(file) in str(failure.value)


def test_missing_file_is_noticed(copy):
    """The error names the file."""
    file = copy / "mnist-test.parquet"
    file.unlink()
    with pytest.raises(FileNotFoundError, match="is missing.*reinstall") as failure:
        data.load("mnist", "test")
    assert str(file) in str(failure.value)


# What loading leaves behind -----------------------------------------------------------------------------------------


def test_loading_is_silent_and_leaves_no_files(tmp_path):
    """No progress bar on a notebook's error stream, and no cache in the user's home."""
    code = "from dgm_course import data; data.images(data.load('mnist', 'test').select(range(100, 400, 2)))"
    hidden = {"TQDM_DISABLE", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"}  # a user has none of them
    environment = {key: value for key, value in os.environ.items() if key not in hidden} | {
        "HOME": str(tmp_path),
        "HF_HOME": str(tmp_path / "hf"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "PYTHONPATH": str(Path(dgm_course.__file__).parents[1]),
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.rglob("*")) == []


# How the cuts were made ---------------------------------------------------------------------------------------------


def test_cut_takes_the_first_of_each_class_in_order(source, tmp_path, monkeypatch):
    """The files that it writes are what `load` then finds, and their hashes fit."""
    embedded = tmp_path / "embedded"
    embedded.mkdir()
    monkeypatch.setattr(data, "FOLDER", embedded)
    monkeypatch.setattr(cut, "FOLDER", embedded)
    monkeypatch.setattr(cut, "PER_CLASS", {"train": 2, "test": 1})
    mixed = tiny(50).select(np.random.default_rng(0).permutation(50))
    mixed.to_parquet(str(source / "mnist" / "train.parquet"))
    cut.cut(source)

    labels = mixed["label"][:]
    expected = [i for i in range(50) if labels[:i].count(labels[i]) < 2]  # fewer than two of its class came before
    x, y = data.images(data.load("mnist", "train"))
    assert len(x) == 20
    assert torch.equal(x, data.images(mixed)[0][expected])
    assert y.tolist() == [labels[i] for i in expected]
    assert len(data.load("fashion_mnist", "test")) == 10
