"""A checkpoint comes back as it was saved or not at all, and each shipped one is what its card says."""

import hashlib
import json
import math
import os
import shlex
from pathlib import Path

import pytest
import torch
from torch import nn

from dgm_course import checkpoints, data, flows, gan, losses, nets, recipes, training, vae
from dgm_course.denoisers import Denoiser
from dgm_course.paths import Cosine, DiscretePath

CARD = {
    "net": {"class": "MLP", "dim": 2, "width": 8, "depth": 1, "num_classes": 3},
    "path": {"class": "VP", "beta_max": 12.0},
    "predicts": "eps",
    "note": "größer",
}


def fresh(seed: int = 0) -> Denoiser:
    torch.manual_seed(seed)
    return checkpoints.build(CARD)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with one checkpoint, "tiny"."""
    checkpoints.save("tiny", fresh(), CARD, tmp_path)
    return tmp_path


def rewrite(file: Path, **changes) -> None:
    """Change entries of a card; None removes one."""
    card = json.loads(file.read_text(encoding="utf-8")) | changes
    file.write_text(json.dumps({key: value for key, value in card.items() if value is not None}), encoding="utf-8")


# Save and load ------------------------------------------------------------------------------------------------------


def test_round_trip(folder):
    """The weights are those that were saved, rounded to float16; ready to use."""
    saved, loaded = fresh(), checkpoints.load("tiny", folder)
    assert isinstance(loaded, Denoiser)
    assert saved.net.state_dict().keys() == loaded.net.state_dict().keys()
    for key, weight in loaded.net.state_dict().items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, saved.net.state_dict()[key].half().float()), key
    assert not any(part.training for part in loaded.modules())
    assert not any(p.requires_grad for p in loaded.parameters())
    assert loaded.path.alpha(1.0) == pytest.approx(math.exp(-(0.1 + 12) / 4))
    assert loaded.predicts == "eps" and isinstance(loaded.net, nets.MLP)

    xt, t, y = torch.randn(4, 2), torch.rand(4), torch.tensor([0, 1, 2, 3])
    torch.testing.assert_close(loaded(xt, t, y=y), saved(xt, t, y=y), rtol=0.01, atol=0.01)


def test_float16_weights_come_back_exactly(tmp_path):
    """Saving what was loaded writes the same bytes."""
    checkpoints.save("one", fresh(), CARD, tmp_path / "new" / "folder")
    one = checkpoints.load("one", tmp_path / "new" / "folder")
    checkpoints.save("two", one, CARD, tmp_path)
    assert (tmp_path / "two.safetensors").read_bytes() == (tmp_path / "new/folder/one.safetensors").read_bytes()


def test_card_comes_back(folder):
    """The card is what was given and the hash of the weights, in readable UTF-8; the given one is left alone."""
    found = hashlib.sha256((folder / "tiny.safetensors").read_bytes()).hexdigest()
    assert checkpoints.load("tiny", folder).card == CARD | {"sha256": found}
    assert "sha256" not in CARD
    text = (folder / "tiny.json").read_text(encoding="utf-8")
    assert "größer" in text and text.endswith("}\n") and json.loads(text)["path"] == CARD["path"]


def test_buffers_come_back(tmp_path, monkeypatch):
    """Running statistics belong to the weights, and whole numbers among them stay whole."""
    monkeypatch.setattr(nets, "Norm", lambda: nn.BatchNorm1d(2), raising=False)
    card = {"net": {"class": "Norm"}, "path": {"class": "Cosine"}, "predicts": "v"}
    denoiser = checkpoints.build(card)
    for _ in range(5):
        denoiser.net(torch.randn(8, 2))
    checkpoints.save("norm", denoiser, card, tmp_path)
    net = checkpoints.load("norm", tmp_path).net
    assert net.num_batches_tracked == 5 and net.num_batches_tracked.dtype == torch.int64
    assert torch.equal(net.running_mean, denoiser.net.running_mean.half().float())


def test_names(tmp_path, monkeypatch):
    """Each card in the folder is a name, in order; other files are none."""
    monkeypatch.setattr(checkpoints, "FOLDER", tmp_path / "weights")
    assert checkpoints.names() == []
    for name in ("b-net", "a-net"):
        checkpoints.save(name, fresh(), CARD, tmp_path / "weights")
    (tmp_path / "weights" / "notes.txt").write_text("x")
    assert checkpoints.names() == ["a-net", "b-net"]


def test_build():
    """Class and settings of network and path, for each kind of path; the weights are fresh."""
    card = {
        "net": {"class": "UNet", "channels": [8, 16], "blocks": [1, 2], "num_classes": 4, "condition": 16},
        "path": {"class": "DiscretePath", "betas": [0.1, 0.2]},
        "predicts": "v",
    }
    denoiser = checkpoints.build(card)
    assert isinstance(denoiser.net, nets.UNet) and isinstance(denoiser.path, DiscretePath)
    assert (denoiser.path.T, denoiser.predicts, denoiser.net.label.num_classes) == (2, "v", 4)
    assert len(denoiser.net.middle) == 2 and denoiser.net.enter.out_channels == 8
    assert card["net"]["class"] == "UNet" and card["path"]["class"] == "DiscretePath"  # left alone
    assert isinstance(checkpoints.build(card | {"path": {"class": "Cosine"}}).path, Cosine)
    assert not torch.equal(checkpoints.build(card).net.enter.weight, denoiser.net.enter.weight)


# Damage -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tinny", "", "tiny.json", None])
def test_unknown_name(name, folder):
    """The error names what came and what there is."""
    checkpoints.save("other", fresh(), CARD, folder)
    with pytest.raises(ValueError, match=f"name must be one of other, tiny; got {name!r}"):
        checkpoints.load(name, folder)


def test_empty_folder(tmp_path):
    """The error names the folder, be it empty or missing."""
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match="got 'tiny'") as failure:
            checkpoints.load("tiny", folder)
        assert f"none in {folder}" in str(failure.value)


@pytest.mark.parametrize("place", [0.0, 0.2, 0.999])
def test_one_flipped_byte_is_noticed(place, folder):
    """The error names the file."""
    file = folder / "tiny.safetensors"
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged") as failure:
        checkpoints.load("tiny", folder)
    assert str(file) in str(failure.value)


def test_truncated_weights_are_noticed(folder):
    """The error names the file."""
    file = folder / "tiny.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is damaged") as failure:
        checkpoints.load("tiny", folder)
    assert str(file) in str(failure.value)


def test_missing_weights_are_noticed(folder):
    """The error names the file."""
    file = folder / "tiny.safetensors"
    file.unlink()
    with pytest.raises(ValueError, match="is missing") as failure:
        checkpoints.load("tiny", folder)
    assert str(file) in str(failure.value)


def test_missing_card_is_noticed(folder):
    """Weights without a card are no checkpoint."""
    (folder / "tiny.json").unlink()
    with pytest.raises(ValueError, match="name must be one of .*got 'tiny'"):
        checkpoints.load("tiny", folder)


@pytest.mark.parametrize("settings", [{"width": 16}, {"depth": 2}, {"num_classes": 0}])
def test_another_network_in_the_card_is_noticed(settings, folder):
    """The weights do not fit the network; the error names their file."""
    rewrite(folder / "tiny.json", net=CARD["net"] | settings)
    with pytest.raises(ValueError, match="does not hold the network that its card describes") as failure:
        checkpoints.load("tiny", folder)
    assert str(folder / "tiny.safetensors") in str(failure.value)


def test_no_safetensors_in_the_file(folder):
    """A file of another kind, even with the right hash."""
    (folder / "tiny.safetensors").write_bytes(b"something else")
    rewrite(folder / "tiny.json", sha256=hashlib.sha256(b"something else").hexdigest())
    with pytest.raises(ValueError, match="does not hold the network that its card describes"):
        checkpoints.load("tiny", folder)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"net": {"class": "Net"}}, "Net"),
        ({"net": {"class": "MLP", "widht": 3}}, "widht"),
        ({"net": {"width": 3}}, "class"),
        ({"path": {"class": "Sine"}}, "Sine"),
        ({"predicts": "noise"}, "noise"),
        ({"predicts": None}, "predicts"),
        ({"path": None}, "path"),
        ({"sha256": None}, "sha256"),
    ],
)
def test_a_card_that_describes_nothing_is_noticed(changes, says, folder):
    """The error names the card and what is wrong in it."""
    rewrite(folder / "tiny.json", **changes)
    with pytest.raises(ValueError, match="describes no checkpoint") as failure:
        checkpoints.load("tiny", folder)
    assert str(folder / "tiny.json") in str(failure.value) and says in str(failure.value)


def test_half_a_card_is_noticed(folder):
    """The error names the card."""
    card = folder / "tiny.json"
    card.write_text(card.read_text(encoding="utf-8")[:40], encoding="utf-8")
    with pytest.raises(ValueError, match="describes no checkpoint") as failure:
        checkpoints.load("tiny", folder)
    assert str(card) in str(failure.value)


def test_a_classifier_comes_back_as_the_network_itself(tmp_path):
    """It has no path: its card says what it classifies, and its weights are rounded to float16 like all others."""
    torch.manual_seed(1)
    card = {"net": {"class": "Classifier", "width": 32}, "classifies": "digits"}
    saved = checkpoints.build(card)
    checkpoints.save("judge", saved, card, tmp_path)
    loaded = checkpoints.load("judge", tmp_path)
    assert isinstance(loaded, nets.Classifier) and loaded.card["classifies"] == "digits" and not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    for key, weight in loaded.state_dict().items():
        assert torch.equal(weight, saved.state_dict()[key].half().float()), key


def test_a_timed_classifier_comes_back_as_the_network_itself(tmp_path):
    """Its card names a path, the one whose noise it knows; it is a classifier all the same, and the path can be had."""
    torch.manual_seed(1)
    card = {
        "net": {"class": "Classifier", "width": 32, "timed": True},
        "path": {"class": "Cosine", "shift": -2.0},
        "classifies": "digits",
    }
    saved = checkpoints.build(card)
    checkpoints.save("judge", saved, card, tmp_path)
    loaded = checkpoints.load("judge", tmp_path)
    assert isinstance(loaded, nets.Classifier) and not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert loaded.state_dict().keys() == saved.state_dict().keys() > nets.Classifier(width=32).state_dict().keys()
    for key, weight in loaded.state_dict().items():
        assert torch.equal(weight, saved.state_dict()[key].half().float()), key
    path = checkpoints.path_of(loaded.card)
    assert isinstance(path, Cosine) and path.shift == -2.0
    assert card["path"] == loaded.card["path"] == {"class": "Cosine", "shift": -2.0}  # left alone


@pytest.mark.parametrize("learned", [True, False, None])
def test_a_learned_variance_comes_back(learned, tmp_path):
    """The card says whether the second half of the channels is one; a card without a word of it has none."""
    card = {
        "net": {
            "class": "UNet",
            "channels": [8, 8],
            "blocks": [1, 1],
            "condition": 16,
            "out_channels": 2 if learned else 1,
        },
        "path": {"class": "Cosine"},
        "predicts": "v",
    } | ({} if learned is None else {"learned_variance": learned})
    torch.manual_seed(1)
    saved = checkpoints.build(card)
    assert saved.learned_variance is bool(learned)
    with torch.no_grad():
        for p in saved.parameters():
            p.add_(0.1 * torch.randn_like(p))
    checkpoints.save("tiny", saved, card, tmp_path)
    loaded, x = checkpoints.load("tiny", tmp_path), torch.randn(2, 1, 4, 4)
    assert loaded.learned_variance is bool(learned) and loaded(x, 0.5).shape == x.shape
    if learned:
        for one, other in zip(loaded.with_variance(x, 0.5), saved.with_variance(x, 0.5), strict=True):
            assert one.shape == x.shape
            torch.testing.assert_close(one, other, rtol=0.02, atol=0.02)
        assert loaded.outputs(x, 0.5)[1].sub(0.5).abs().max() > 0.01
    else:
        with pytest.raises(ValueError, match="learned_variance=True"):
            loaded.with_variance(x, 0.5)


MODELS = {
    "RealNVP": ({"side": 8, "widths": [8, 8], "blocks": 1, "couplings": [2, 1, 2]}, flows.RealNVP, (1, 8, 8)),
    "ConvVAE": ({"latent": 3, "width": 8}, vae.ConvVAE, (1, 28, 28)),
    "ConvGAN": ({"latent": 5, "width": 8, "pack": 2}, gan.ConvGAN, (1, 28, 28)),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_whole_model_comes_back(name, tmp_path):
    """A flow, a VAE and a GAN have no path; each is built from its settings, draws samples, and keeps its weights."""
    settings, kind, shape = MODELS[name]
    card = {"model": {"class": name, **settings}}
    torch.manual_seed(2)
    saved = checkpoints.build(card)
    assert card == {"model": {"class": name, **settings}}  # left alone
    with torch.no_grad():
        for p in saved.parameters():
            p.add_(0.1 * torch.randn_like(p))
    checkpoints.save("whole", saved, card, tmp_path)
    loaded = checkpoints.load("whole", tmp_path)
    assert type(loaded) is kind and not loaded.training and loaded.card["model"] == card["model"]
    assert not any(p.requires_grad for p in loaded.parameters())
    assert loaded.state_dict().keys() == saved.state_dict().keys()
    for key, weight in loaded.state_dict().items():
        assert torch.equal(weight, saved.state_dict()[key].half().to(weight.dtype)), key
    assert loaded.sample(2).shape == (2, *shape)
    rewrite(tmp_path / "whole.json", model={"class": name, **settings, "hieght": 3})
    with pytest.raises(ValueError, match="describes no checkpoint.*hieght"):
        checkpoints.load("whole", tmp_path)
    rewrite(tmp_path / "whole.json", model={"class": "PixelCNN"})
    with pytest.raises(ValueError, match="describes no checkpoint.*PixelCNN"):
        checkpoints.load("whole", tmp_path)


def test_the_classifier_is_right_on_as_many_digits_as_its_card_says():
    """On the 2,000 embedded test digits, within 4 standard errors of the share that its card gives; at least 99.3 %."""
    judge = checkpoints.load("mnist-classifier")
    said = judge.card["scores"]["accuracy on the test set"]
    x, y = data.images(data.load("mnist", "test"))
    with torch.no_grad():
        right = (torch.cat([judge(part).argmax(1) for part in x.split(500)]) == y).double().mean().item()
    assert said >= 0.993 and abs(right - said) < 4 * math.sqrt(said * (1 - said) / len(y))


def test_the_noisy_classifier_is_right_about_as_often_as_its_card_says():
    """On 400 embedded test digits at each of the three noise levels, which are fewer and other ones than those of the card."""
    judge = checkpoints.load("mnist-noisy-classifier")
    x, y = data.images(data.load("mnist", "test").select(range(0, 2000, 5)))
    assert judge.card["path"] == checkpoints.load("mnist-unet").card["path"] == {"class": "Cosine"}
    g = torch.Generator().manual_seed(5)
    for t, off in ((0.25, 0.03), (0.5, 0.05), (0.75, 0.12)):
        said = judge.card["scores"][f"accuracy at t = {t}"]
        xt = math.cos(math.pi * t / 2) * x + math.sin(math.pi * t / 2) * torch.randn(x.shape, generator=g)
        with torch.no_grad():
            right = (judge(xt, torch.full((len(x),), t)).argmax(1) == y).double().mean().item()
        assert said > 0.7 and abs(right - said) < off, (t, right)


# Safe saving --------------------------------------------------------------------------------------------------------


def test_weights_are_written_first_and_the_card_last(tmp_path, monkeypatch):
    """A checkpoint is there only when all of it is there, and nothing is written in place."""
    moved, replace = [], os.replace

    def record(source, target):
        moved.append((Path(source).name != Path(target).name, Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "replace", record)
    checkpoints.save("tiny", fresh(), CARD, tmp_path)
    assert moved == [(True, "tiny.safetensors"), (True, "tiny.json")]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["tiny.json", "tiny.safetensors"]


@pytest.mark.parametrize("survives", [0, 1])
def test_a_crash_while_writing_leaves_no_half_file(survives, tmp_path, monkeypatch):
    """Half of a file is written when the disk is full: what was there is there still, and what was not is not."""
    checkpoints.save("old", fresh(), CARD, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    write, written = Path.write_bytes, []

    def crash(self, content):
        if len(written) == survives:
            write(self, content[: len(content) // 2])
            raise OSError("no space left on device")
        written.append(self)
        return write(self, content)

    for name in ("old", "new"):
        written.clear()
        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_bytes", crash)
            with pytest.raises(OSError, match="no space"):
                checkpoints.save(name, fresh(seed=1), CARD, tmp_path)
    assert (tmp_path / "old.json").read_bytes() == before["old.json"]
    assert not (tmp_path / "new.json").exists()
    if survives == 0:
        assert (tmp_path / "old.safetensors").read_bytes() == before["old.safetensors"]
        checkpoints.load("old", tmp_path)
    else:  # new weights beside the old card: seen by the hash
        with pytest.raises(ValueError, match="is damaged"):
            checkpoints.load("old", tmp_path)
    checkpoints.save("new", fresh(), CARD, tmp_path)
    checkpoints.load("new", tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf, 70_000.0])
def test_weights_that_float16_cannot_hold_are_refused(value, tmp_path):
    """The error names the weight; nothing is written."""
    denoiser = fresh()
    with torch.no_grad():
        denoiser.net.enter.weight[0, 0] = value
    with pytest.raises(ValueError, match="enter.weight is not finite in float16"):
        checkpoints.save("tiny", denoiser, CARD, tmp_path)
    assert list(tmp_path.iterdir()) == []


# The shipped checkpoints --------------------------------------------------------------------------------------------

SHIPPED = sorted({"mnist-unet", *checkpoints.names()})


def test_the_u_net_on_mnist_is_shipped():
    """The one that most notebooks use."""
    assert "mnist-unet" in checkpoints.names()


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_card_is_complete(name):
    """Network and path settings, or those of a whole model; recipe, seed, data, steps, minutes on what machine, a score."""
    card = checkpoints.load(name).card
    kinds = {"seed": int, "steps": int, "machine": str, "model" if "model" in card else "net": dict}
    diffusion = "net" in card and "classifies" not in card and card["net"]["class"] != "LanguageModel"
    for key, kind in (kinds | ({"path": dict, "predicts": str} if diffusion else {})).items():
        assert isinstance(card[key], kind) and card[key] != "", key
    for key in ("sha256", "data_sha256"):
        assert len(card[key]) == 64 and int(card[key], 16) >= 0, key
    assert card["steps"] > 0 and card["minutes"] > 0 and len(card["machine"]) > 5
    assert card["scores"] and all(math.isfinite(score) for score in card["scores"].values())


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipe_is_a_recipe(name):
    """The command in the card runs a recipe that there is, and the card says what that recipe says."""
    card = checkpoints.load(name).card
    command = shlex.split(card["recipe"])
    assert command[:2] == ["dgm-course", "train"] and command[2] in recipes.names()
    recipe = recipes.RECIPES[command[2]]
    assert {key: card[key] for key in recipe} == json.loads(json.dumps(recipe))


def test_all_weights_together_are_small():
    """At most 40 MB."""
    sizes = [(checkpoints.FOLDER / f"{name}.safetensors").stat().st_size for name in SHIPPED]
    assert sum(sizes) <= 40e6


def test_the_u_net_scores_what_its_card_says():
    """Its loss on 500 embedded test images is that of the whole test set, give or take a tenth."""
    denoiser = checkpoints.load("mnist-unet")
    x, y = data.images(data.load("mnist", "test").select(range(0, 2000, 4)))
    batch = training.batches(x, denoiser.path, size=500, y=y, drop=0, seed=7)(0)
    with torch.no_grad():
        assert losses.simple(denoiser, **batch).item() == pytest.approx(denoiser.card["scores"]["test loss"], rel=0.1)
