"""A recipe trains to a checkpoint that loads; stopped, it goes on to the very same one."""

import functools
import json
import math
import platform
import re
import signal

import pytest
import torch

from dgm_course import checkpoints, data, losses, recipes, training
from dgm_course.paths import Cosine

TINY = {
    "what": "a tiny U-Net",
    "data": "mnist",
    "net": {"class": "UNet", "channels": [8, 8], "blocks": [1, 1], "num_classes": 10, "condition": 16},
    "path": {"class": "Cosine"},
    "predicts": "v",
    "steps": 4,
    "batch": 8,
    "seed": 3,
}
load = data.load  # as it is before a test replaces it


@functools.cache
def part(name: str):
    """500 test images of a set, in place of all the sets that a recipe asks for."""
    return load(name, "test").select(range(500))


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    """Only the tiny recipe, on little data; returns what was asked of `data.load`."""
    calls = []

    def little(*arguments):
        calls.append(arguments)
        return part("fashion_mnist" if "other" in arguments else "mnist")

    monkeypatch.setattr(recipes, "RECIPES", {"tiny": TINY, "another": TINY})
    monkeypatch.setattr(data, "load", little)
    return calls


@pytest.fixture
def stop(monkeypatch):
    """Send this process SIGINT in the third training step; the function takes that back."""
    count, simple = [], losses.simple

    def stopping(*arguments, **batch):
        count.append(1)
        if len(count) == 3:
            signal.raise_signal(signal.SIGINT)
        return simple(*arguments, **batch)

    monkeypatch.setattr(losses, "simple", stopping)
    return lambda: monkeypatch.setattr(losses, "simple", simple)


def weights(folder) -> bytes:
    return (folder / "tiny.safetensors").read_bytes()


def test_a_recipe_writes_a_checkpoint(tmp_path, asked):
    """It loads, its card says all there is to say, and nothing else is left in the folder."""
    card = recipes.train("tiny", out=tmp_path / "runs", steps=2)
    denoiser = checkpoints.load("tiny", tmp_path / "runs")
    assert {key: value for key, value in denoiser.card.items() if key != "sha256"} == card
    assert card == TINY | {key: card[key] for key in card if key not in TINY} | {"steps": 2}
    assert card["recipe"] == "dgm-course train tiny --steps 2"
    assert card["images"] == 500 and card["data_sha256"] == data.content_hash(*data.images(part("mnist")))
    assert card["minutes"] >= 0 and platform.machine() in card["machine"] and torch.__version__ in card["machine"]
    assert sorted(file.name for file in (tmp_path / "runs").iterdir()) == ["tiny.json", "tiny.safetensors"]
    assert asked == [("mnist", "train", None), ("mnist", "test", None)]


def test_the_score_is_the_mean_loss_on_test_images(tmp_path):
    """Of the averaged weights, with labels; worked out here with other times and noise, so only about the same."""
    score = recipes.train("tiny", out=tmp_path)["scores"]["test loss"]
    denoiser = checkpoints.load("tiny", tmp_path)
    x, y = data.images(part("mnist"))
    t, g = (torch.arange(500) + 0.5) / 500, torch.Generator().manual_seed(0)
    with torch.no_grad():
        value = losses.simple(denoiser, x, t, torch.randn(x.shape, generator=g), y=y).item()
    assert math.isfinite(score) and score == pytest.approx(value, rel=0.03)


def test_what_is_trained_on_saved_and_scored(tmp_path, monkeypatch):
    """Training sees the recipe's batches with dropped labels; the average is saved, and scored with all labels."""
    fit, simple, fits, calls = training.fit, losses.simple, [], []

    def recorded_fit(*arguments, **options):
        fits.append(fit(*arguments, **options))
        return fits[-1]

    def recorded_loss(model, **batch):
        value = simple(model, **batch)
        calls.append((model, batch, value.item()))
        return value

    monkeypatch.setattr(training, "fit", recorded_fit)
    monkeypatch.setattr(losses, "simple", recorded_loss)
    card = recipes.train("tiny", out=tmp_path)
    x, y = data.images(part("mnist"))
    expected = training.batches(x, Cosine(), size=8, y=y, null=10, seed=3)
    for step, (_, batch, _) in enumerate(calls[:4]):
        assert all(torch.equal(batch[key], value) for key, value in expected(step).items())
    average = fits[0].ema
    for model, batch, _ in calls[4:]:
        assert model is average and torch.equal(batch["y"].sort().values, y.sort().values)
    assert len(calls[4:]) == 4
    assert card["scores"]["test loss"] == pytest.approx(sum(value for *_, value in calls[4:]) / 4, abs=1e-4)
    saved = checkpoints.load("tiny", tmp_path).net.state_dict()
    assert all(torch.equal(saved[key], weight.half().float()) for key, weight in average.net.state_dict().items())


def test_the_recipe_alone_decides(tmp_path):
    """Weights and score are the same in a second run, and others for another seed."""
    one = recipes.train("tiny", out=tmp_path / "one")
    torch.manual_seed(99)
    two = recipes.train("tiny", out=tmp_path / "two")
    assert one["steps"] == 4 and one["recipe"] == "dgm-course train tiny"
    assert weights(tmp_path / "one") == weights(tmp_path / "two") and one["scores"] == two["scores"]
    recipes.RECIPES["tiny"] = TINY | {"seed": 4}
    recipes.train("tiny", out=tmp_path / "three")
    assert weights(tmp_path / "one") != weights(tmp_path / "three")


def test_a_stopped_recipe_goes_on(tmp_path, stop):
    """The same call ends with the very weights of a run that was not stopped, and the state file is gone."""
    with pytest.raises(KeyboardInterrupt, match="after step 3 of 4"):
        recipes.train("tiny", out=tmp_path / "stopped")
    (state,) = (tmp_path / "stopped").iterdir()
    assert torch.load(state)["step"] == 3
    stop()
    recipes.train("tiny", out=tmp_path / "stopped")
    assert not state.exists()
    recipes.train("tiny", out=tmp_path / "whole")
    assert weights(tmp_path / "stopped") == weights(tmp_path / "whole")


@pytest.mark.parametrize("change", [{"source": "other"}, {"steps": 5}, {"batch": 16}])
def test_a_state_is_for_one_recipe_and_one_set_of_data(change, tmp_path, stop):
    """Asked for other data, other steps or after a change of the recipe, training does not go on from the old state."""
    with pytest.raises(KeyboardInterrupt):
        recipes.train("tiny", out=tmp_path / "stopped")
    stop()
    if "batch" in change:
        recipes.RECIPES["tiny"] = TINY | change
        change = {}
    card = recipes.train("tiny", out=tmp_path / "stopped", **change)
    recipes.train("tiny", out=tmp_path / "whole", **change)
    assert weights(tmp_path / "stopped") == weights(tmp_path / "whole")
    assert card["data_sha256"] == data.content_hash(
        *data.images(part("fashion_mnist" if "source" in change else "mnist"))
    )


def test_source_is_passed_on_and_not_written_down(tmp_path, asked):
    """The card says that the full set was used; where it lay on this machine is nobody's business."""
    card = recipes.train("tiny", source="other", out=tmp_path, steps=1)
    assert asked == [("mnist", "train", "other"), ("mnist", "test", "other")]
    assert card["recipe"] == "dgm-course train tiny --source hub --steps 1"
    assert "other" not in (tmp_path / "tiny.json").read_text()


@pytest.mark.parametrize("name", ["mnist_unet", "", None])
def test_unknown_recipe(name, tmp_path):
    """The error names what came and what there is; nothing is written."""
    with pytest.raises(ValueError, match=re.escape(f"recipe must be one of another, tiny; got {name!r}")):
        recipes.train(name, out=tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert recipes.names() == ["another", "tiny"]


def test_shipped_recipes_fit_the_budget(monkeypatch):
    """Each can be built and written as JSON; a U-Net has at most 0.6 million parameters, anything at most 1.2."""
    monkeypatch.undo()
    assert "mnist-unet" in recipes.names()
    for name in recipes.names():
        recipe = recipes.RECIPES[name]
        net = checkpoints.build(json.loads(json.dumps(recipe))).net
        assert sum(p.numel() for p in net.parameters()) <= (0.6e6 if recipe["net"]["class"] == "UNet" else 1.2e6)
        assert recipe["data"] in data.NAMES and recipe["steps"] > 0 and recipe["what"]
