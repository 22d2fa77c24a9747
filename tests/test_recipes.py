"""A recipe trains to a checkpoint that loads; stopped, it goes on to the very same one."""

import copy
import functools
import inspect
import itertools
import json
import math
import platform
import re
import signal

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy import stats

from dgm_course import (
    checkpoints,
    data,
    distillation,
    losses,
    measures,
    nets,
    objectives,
    paths,
    personal,
    recipes,
    tables,
    training,
)
from dgm_course.data import hands
from dgm_course.denoisers import Denoiser
from dgm_course.flows import Flow
from dgm_course.gan import GAN, ConvGAN
from dgm_course.paths import Cosine
from dgm_course.vae import VAE, ConvVAE

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
    """Each can be built and written as JSON; a U-Net has at most 0.6 million parameters, a flow 2, a DiT and all else 1.2."""
    monkeypatch.undo()
    assert {"mnist-unet", "mnist-dit", "mnist-classifier", "mnist-predictions", "mnist-realnvp"} <= set(recipes.names())
    for name in recipes.names():
        recipe = json.loads(json.dumps(recipes.RECIPES[name]))
        assert recipe == recipes.RECIPES[name]  # a tuple would come back as a list, and a stopped table not go on
        varied = [
            dict(zip(recipe.get("vary", {}), values, strict=True))
            for values in itertools.product(*recipe.get("vary", {}).values())
        ]
        assert len({json.dumps(values) for values in varied}) == len(varied) > 0
        assert recipe["data"] in (*data.NAMES, *data.TEXTS) and recipe["what"]
        if "checkpoint" in recipe:
            continue  # it trains nothing, see below
        for values in varied:
            card = recipe | values | recipe.get("kinds", {}).get(values.get("kind"), {})
            model = checkpoints.build(card)
            kinds = nets.Classifier if "classifies" in card else (Flow, VAE, GAN) if "model" in card else Denoiser
            assert isinstance(model, nets.LanguageModel if card["data"] in data.TEXTS else kinds) and (
                "model" in card
            ) != ("net" in card)
            inspect.signature(training.fit).bind(None, None, None, steps=card["steps"], **card.get("fit", {}))
            size = sum(p.numel() for p in model.parameters())
            unet = "net" in card and card["net"]["class"] == "UNet"
            assert size <= (0.6e6 if unet else 2e6 if isinstance(model, Flow) else 1.2e6)
            assert "seed" in card
            if "scored with" in card:
                plain = "model" in card or card["net"]["num_classes"] == 0  # scored without classes
                score, settings = objectives._realism if plain else objectives.quality, dict(card["scored with"])
                if low_high := card.get("distils", {}).get("weights"):
                    assert low_high[0] <= settings.pop("w") <= low_high[1]
                inspect.signature(score).bind(None, None, None, **settings)
                assert "classifies" in recipes.RECIPES[card["scored with"]["classifier"]]
                assert card["scored with"]["samples"] % 10 == 0 and (plain or card["net"]["num_classes"] == 10)
        assert recipe["steps"] > 0 and recipe["batch"] > 0


def test_shipped_measurements_name_what_there_is(monkeypatch):
    """Recipes without a net: a shipped class-conditional denoiser, a continuous path, known samplers, every one a fair share."""
    monkeypatch.undo()
    without = {name: recipe for name, recipe in recipes.RECIPES.items() if "checkpoint" in recipe}
    del without["mnist-users"]  # it trains what it measures, see below
    measured = (
        "mnist-sde mnist-fast mnist-guidance fashion-guidance mnist-variances mnist-distillation mnist-guided-students"
    )
    assert set(measured.split()) == without.keys()
    for name, recipe in without.items():
        assert not {"net", "model", "steps", "batch", "fit"} & recipe.keys()
        network = recipes.RECIPES[recipe["checkpoint"]]
        assert network["net"]["num_classes"] == 10 and network["data"] == recipe["data"]
        settings = dict(recipe["path"])
        path = getattr(paths, settings.pop("class"))(**settings)
        trained = getattr(paths, network["path"]["class"])()
        assert path.logsnr(1.0) >= trained.logsnr(1.0)
        assert repr(path) == repr(trained) or math.isfinite(path.drift(1.0))
        assert "classifies" in recipes.RECIPES[recipe["scored with"]["classifier"]]
        inspect.signature(objectives.quality).bind(None, None, None, **recipe["scored with"])
        ask_samplers(
            recipe["vary"].get("sampler", [recipe.get("sampler")]), all_of_them=name in ("mnist-sde", "mnist-fast")
        )
        for guidance in recipe["vary"].get("guidance", []):
            assert guidance.keys() == {"name", "scale"} and guidance["scale"] >= 0
            assert (
                guidance["name"] in ("classifier-free", "interval") or "path" in recipes.RECIPES[recipe["classifier"]]
            )
        if "variance" in recipe["vary"]:
            assert network["learned_variance"] and max(recipe["vary"]["steps"]) <= network["chain"]


def test_the_shipped_users_are_tuned_in_every_way(monkeypatch):
    """Every user, every kind made ready as its card says; what LoRA trains stays under 2 % up to r = 2; rates for each kind of training."""
    monkeypatch.undo()
    recipe = recipes.RECIPES["mnist-users"]
    assert set(recipe["vary"]["user"]) == set(hands.HANDS) and set(recipe["vary"]["kind"]) == set(recipe["kinds"])
    assert len(recipe["vary"]["seed"]) > 1 and recipe["keeps"] in recipe["kinds"]
    base = recipes.RECIPES[recipe["checkpoint"]]
    assert base["data"] == recipe["data"] and base["net"]["num_classes"] == recipe["null"]
    parameters = {}
    for kind, settings in recipe["kinds"].items():
        how = settings["tunes"]
        model = personal.tuned(checkpoints.build(base), how)
        parameters[kind] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if how["kind"] != "base":
            inspect.signature(training.fit).bind(
                None, None, None, steps=1, **recipe["fit"] | recipe["rates"][how["kind"]]
            )
    whole = parameters["full"]
    assert whole == sum(p.numel() for p in checkpoints.build(base).parameters())
    assert parameters["LoRA, r = 8"] == 4 * parameters["LoRA, r = 2"] == 8 * parameters["LoRA, r = 1"]
    assert parameters["LoRA, r = 2"] < 0.02 * whole and parameters["LoRA on attention, r = 4"] < 0.02 * whole
    for judge in recipe["judges"].values():
        assert "classifies" in recipes.RECIPES[judge]


def ask_samplers(settings, all_of_them):
    """Each is known, and where they are compared each one is there with the same numbers of evaluations, at least to 20."""
    counts = {}
    for sampler in filter(None, settings):
        if sampler["name"] == "dopri5":
            assert sampler.keys() == {"name", "tolerance"} and 0 < sampler["tolerance"] < 1
            continue
        if "checkpoint" in sampler or not all_of_them:
            ask_student(sampler)
            continue
        known = measures.FAST if "grid" in sampler else measures.SAMPLERS
        assert sampler.keys() - {"grid"} == {"name", "evaluations"} and sampler["name"] in known
        assert sampler.get("grid", "time") in ("time", "log-SNR") and sampler["evaluations"] % 2 == 0
        counts.setdefault((sampler["name"], sampler.get("grid")), []).append(sampler["evaluations"])
    if all_of_them:
        assert {name for name, _ in counts} == known.keys()
        assert len({tuple(n for n in sorted(numbers) if n <= 20) for numbers in counts.values()}) == 1


def ask_student(sampler):
    """A student is asked as often as it was trained to be; every other network by a sampler of `FAST`."""
    how = recipes.RECIPES[sampler.get("checkpoint", "mnist-unet")].get("distils", {})
    n = sampler["evaluations"]
    assert sampler["grid"] in ("time", "log-SNR") and n >= 1
    if how.get("kind") == "progressive":
        assert (sampler["name"], n) in {("DDIM", how["steps"]), ("stochastic", 2 * how["steps"] - 1)}
        assert sampler["name"] == "DDIM" or "weights" in how
    elif how.get("kind") == "consistency":
        assert sampler["name"] == "consistency" and how["steps"] % n == 0  # else it is asked at times it does not know
    else:
        assert sampler["name"] in measures.FAST


def test_backbones_are_compared_at_equal_size(monkeypatch):
    """Their parameters lie within 5 % of each other, each kind is another network, and all else is the same for all."""
    monkeypatch.undo()
    recipe = recipes.RECIPES["mnist-backbones"]
    assert recipe["vary"]["kind"] == list(recipe["kinds"]) and all(
        set(kind) == {"net"} for kind in recipe["kinds"].values()
    )
    made = {name: checkpoints.build(recipe | kind | {"seed": 0}) for name, kind in recipe["kinds"].items()}
    sizes = [sum(p.numel() for p in model.parameters()) for model in made.values()]
    assert max(sizes) / min(sizes) < 1.05, dict(zip(made, sizes, strict=True))
    x, t, y = torch.zeros(2, 1, 28, 28), torch.tensor([0.2, 0.7]), torch.tensor([3, 10])
    with torch.no_grad():
        assert all(model(x, t, y=y).shape == x.shape for model in made.values())
    kinds = {name: (type(model.net), getattr(model.net, "skip", None)) for name, model in made.items()}
    assert kinds["U-Net"] == (nets.UNet, True) and kinds["U-Net without skip"] == (nets.UNet, False)
    dits = [name for name, (cls, _) in kinds.items() if cls is nets.DiT]
    assert [recipe["kinds"][name]["net"].get("conditioning", "adaLN-Zero") for name in dits] == [
        name.removeprefix("DiT, ") for name in dits
    ] and len(dits) == 3


def test_resolutions_differ_in_the_images_alone(monkeypatch):
    """Every size is folded to 14×14, so the bodies are the same and only the first and last layer grow with the pixels."""
    monkeypatch.undo()
    recipe = recipes.RECIPES["mnist-resolutions"]
    assert recipe["vary"]["kind"] == list(recipe["kinds"])
    bodies, shifts = [], [path["shift"] for path in recipe["vary"]["path"]]
    for name, kind in recipe["kinds"].items():
        model = checkpoints.build(recipe | kind | {"seed": 0, "path": recipe["vary"]["path"][0]})
        assert model.path.shift == shifts[0] and name == f"{kind['size']} px"
        with torch.no_grad():
            x = torch.zeros(2, 1, kind["size"], kind["size"])
            folded = torch.nn.functional.pixel_unshuffle(x, model.net.fold)
            assert folded.shape[2:] == (14, 14) and model(x, 0.5, y=torch.tensor([3, 10])).shape == x.shape
        bodies.append({
            key: value.shape
            for key, value in model.net.state_dict().items()
            if not key.startswith(("enter", "leave.2"))
        })  # fmt: skip
    assert all(body == bodies[0] for body in bodies) and len(bodies) == 3
    assert len(set(shifts)) == 5 and {0.0, -2.0, 2.0} <= set(shifts)


def test_times_and_scores_of_a_recipe(tmp_path, monkeypatch):
    """ "times" reaches the batches that are trained on, "scored with" the function that scores; the loss stays as it is."""
    asked, drawn, batches = [], [], training.batches

    def recorded(x, path, **options):
        drawn.append(options)
        return batches(x, path, **options)

    def quality(denoiser, x, y, **settings):
        asked.append((denoiser, len(x), len(y), settings))
        return {"beauty": 7.0}

    monkeypatch.setattr(objectives, "quality", quality)
    monkeypatch.setattr(recipes, "_floor", lambda card, train, test: {"floor": 1.0} if "scored with" in card else {})
    monkeypatch.setattr(training, "batches", recorded)
    settings = {"classifier": "judge", "samples": 20, "steps": 2, "draws": 1}
    plain = recipes.train("tiny", out=tmp_path)["scores"]
    assert asked == [] and list(plain) == ["test loss"]
    recipes.RECIPES["tiny"] = TINY | {"scored with": settings}
    assert recipes.train("tiny", out=tmp_path)["scores"] == plain | {"beauty": 7.0, "floor": 1.0}
    ((denoiser, *rest),) = asked
    assert isinstance(denoiser, Denoiser) and rest == [500, 500, settings]
    recipes.RECIPES["tiny"] = TINY | {"times": "logit-normal"}
    assert recipes.train("tiny", out=tmp_path)["scores"] != plain
    assert [options.get("times", "uniform") for options in drawn] == ["uniform"] * 4 + ["logit-normal", "uniform"]


# A classifier -------------------------------------------------------------------------------------------------------

JUDGE = {
    "what": "a tiny classifier",
    "data": "mnist",
    "net": {"class": "Classifier", "width": 32},
    "classifies": "digits",
    "steps": 4,
    "batch": 8,
    "seed": 3,
}


@pytest.fixture
def fits(monkeypatch):
    """Every training that is asked for: (model, loss, draw, options, what came back)."""
    calls, fit = [], training.fit

    def recorded(model, loss, draw, **options):
        done = fit(model, loss, draw, **options)
        calls.append((model, loss, draw, options, done))
        return done

    monkeypatch.setattr(training, "fit", recorded)
    return calls


def test_a_classifier_is_a_recipe_too(tmp_path, fits):
    """Its checkpoint loads as the network itself, and its card says how many test images the averaged weights get right."""
    recipes.RECIPES["tiny"] = JUDGE | {"steps": 12, "fit": {"precision": "float32"}}
    card = recipes.train("tiny", out=tmp_path)
    net = checkpoints.load("tiny", tmp_path)
    assert isinstance(net, nets.Classifier) and not net.training and net.head[1].out_features == 10
    assert {key: value for key, value in net.card.items() if key != "sha256"} == card
    assert sorted(file.name for file in tmp_path.iterdir()) == ["tiny.json", "tiny.safetensors"]
    ((_, _, _, options, done),) = fits
    assert options["steps"] == 12 and options["precision"] == "float32"
    average, (x, y) = done.ema, data.images(part("mnist"))
    for key, weight in average.state_dict().items():
        assert torch.equal(net.state_dict()[key], weight.half().float())
    with torch.no_grad():
        right = sum(average(image[None]).argmax().item() == label for image, label in zip(x, y.tolist(), strict=True))
    assert card["scores"] == {"accuracy on the test set": right / 500}


def test_a_classifier_learns_from_moved_images(tmp_path, fits, monkeypatch):
    """Each batch is a pure function of seed and step: images of the data, moved, with their labels; the loss is −log p(y)."""
    shown = []
    monkeypatch.setattr(objectives, "_moved", lambda x, g: shown.append((x, g)) or x + 0.25)
    for name, seed in (("tiny", 3), ("another", 4)):
        recipes.RECIPES[name] = JUDGE | {"seed": seed, "steps": 1}
        recipes.train(name, out=tmp_path)
    (model, loss, draw, *_), (_, _, other, *_) = fits
    x, y = data.images(part("mnist"))
    labels = {image.numpy().tobytes(): label for image, label in zip(x, y.tolist(), strict=True)}
    shown.clear()
    forward = [draw(step) for step in range(30)]
    assert [labels[image.numpy().tobytes()] for x, _ in shown for image in x] == [
        label for batch in forward for label in batch["y"].tolist()
    ]
    for batch, (image, g) in zip(forward, shown, strict=True):
        assert batch.keys() == {"x", "y"} and len(batch["y"]) == 8 and isinstance(g, torch.Generator)
        assert torch.equal(batch["x"], image + 0.25)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    for step in reversed(range(30)):
        assert all(torch.equal(value, forward[step][key]) for key, value in draw(step).items())
        assert not torch.equal(other(step)["x"], forward[step]["x"])
    assert torch.equal(torch.get_rng_state(), state)
    assert len({batch["x"].sum().item() for batch in forward}) == 30
    p = model.eval()(forward[0]["x"]).detach().double().exp().numpy()
    p = p / p.sum(1, keepdims=True)
    expected = -np.log(p[np.arange(8), forward[0]["y"]]).mean()
    assert loss(model, **forward[0]).item() == pytest.approx(expected, rel=1e-5)


def test_a_stopped_classifier_goes_on(tmp_path, monkeypatch):
    """Dropout and moved images included, it ends with the very weights of a run that was not stopped."""
    recipes.RECIPES["tiny"] = JUDGE
    count, loss = [], torch.nn.functional.cross_entropy

    def stopping(*arguments):
        count.append(1)
        if len(count) == 3:
            signal.raise_signal(signal.SIGINT)
        return loss(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "cross_entropy", stopping)
        with pytest.raises(KeyboardInterrupt, match="after step 3 of 4"):
            recipes.train("tiny", out=tmp_path / "stopped")
    recipes.train("tiny", out=tmp_path / "stopped")
    recipes.train("tiny", out=tmp_path / "whole")
    assert weights(tmp_path / "stopped") == weights(tmp_path / "whole")


# A classifier of noisy images ---------------------------------------------------------------------------------------

NOISY = JUDGE | {"net": {"class": "Classifier", "width": 32, "timed": True}, "path": {"class": "Cosine"}}


def test_a_classifier_of_noisy_images(tmp_path, fits):
    """Its checkpoint is a network that is told the time; it learns from the images as they are, at times on its path."""
    recipes.RECIPES["tiny"] = NOISY
    card = recipes.train("tiny", out=tmp_path)
    net = checkpoints.load("tiny", tmp_path)
    assert isinstance(net, nets.Classifier) and net.time is not None and not net.training
    assert {key: value for key, value in net.card.items() if key != "sha256"} == card
    ((_, _, draw, _, done),) = fits
    x, y = data.images(part("mnist"))
    expected = training.batches(x, Cosine(), size=8, y=y, drop=0, seed=3)
    for step in range(4):
        assert all(torch.equal(draw(step)[key], value) for key, value in expected(step).items())
    for key, weight in done.ema.state_dict().items():
        assert torch.equal(net.state_dict()[key], weight.half().float())
    assert list(card["scores"]) == [f"accuracy at t = {t}" for t in (0.25, 0.5, 0.75)]
    assert all(
        0 <= share <= 1 and round(500 * share) / 500 == pytest.approx(share) for share in card["scores"].values()
    )


# A network that is trained on ---------------------------------------------------------------------------------------

IMPROVED = TINY | {
    "start": "base",
    "net": TINY["net"] | {"out_channels": 2},
    "learned_variance": True,
    "chain": 3,
    "fit": {"lr": 1e-3},
}


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A shipped checkpoint "base" of the tiny U-Net, with no weight left at zero."""
    monkeypatch.setattr(checkpoints, "load", functools.partial(checkpoints.load, folder=tmp_path / "shipped"))
    torch.manual_seed(7)
    denoiser = checkpoints.build(TINY)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    checkpoints.save("base", denoiser, TINY, tmp_path / "shipped")
    recipes.RECIPES["tiny"] = IMPROVED
    return checkpoints.load("base")


def test_training_starts_from_another_checkpoint(tmp_path, base, fits, monkeypatch):
    """Before the first step the network says what the other one said, and the variance's half is even: v = ½ everywhere."""
    started, fit = [], training.fit
    monkeypatch.setattr(objectives, "bits", lambda *_: 1.0)

    def looked_at(model, *arguments, **options):
        started.append(copy.deepcopy(model).eval())
        return fit(model, *arguments, **options)

    monkeypatch.setattr(training, "fit", looked_at)
    card = recipes.train("tiny", out=tmp_path / "runs")
    x, y = data.images(part("mnist").select(range(4)))
    with torch.no_grad():
        for t in (0.1, 0.9):
            output, fraction = started[0].outputs(x, t, y=y)
            torch.testing.assert_close(output, base.output(x, t, y=y), rtol=1e-4, atol=1e-5)
            assert output.abs().max() > 0.1 and bool((fraction == 0.5).all())
    assert not any(p.requires_grad for p in base.parameters()) and all(p.requires_grad for p in started[0].parameters())
    trained = checkpoints.load("tiny", folder=tmp_path / "runs")
    assert trained.learned_variance and trained.card["start"] == card["start"] == "base"
    assert not torch.equal(trained.with_variance(x, 0.5, y=y)[1], torch.full_like(x, 0.5))


def test_what_the_improved_network_is_trained_on_and_scored_by(tmp_path, base, fits):
    """The hybrid loss on steps of a chain, dropped labels among them; the score are the bits of the averaged weights on 200 images."""
    card = recipes.train("tiny", out=tmp_path / "runs")
    ((_, loss, draw, options, done),) = fits
    assert loss is losses.hybrid and options["lr"] == 1e-3
    x, y = data.images(part("mnist"))
    expected = training.batches(x, Cosine(), size=8, y=y, null=10, seed=3)
    for step in range(4):
        batch, plain = draw(step), expected(step)
        assert all(torch.equal(batch[key], plain[key]) for key in ("x0", "eps", "y"))
        assert torch.equal(batch["t"], (3 * plain["t"].double()).ceil() / 3)
        torch.testing.assert_close(batch["t"] - batch["s"], torch.full((8,), 1 / 3, dtype=torch.float64))
    with torch.no_grad():
        few = data.balanced(x, y, 200, torch.Generator().manual_seed(0))
        found = objectives.bits(done.ema, *few, Cosine().times(3), "learned")
    assert card["scores"] == {"bits per dimension": round(found, 4)} and 0 < found < 30


def test_a_stopped_improved_network_goes_on(tmp_path, base, monkeypatch):
    """Stopped, it ends with the very weights of a run that was not, and does not start from the other checkpoint again."""
    count, hybrid = [], losses.hybrid
    monkeypatch.setattr(objectives, "bits", lambda *_: 1.0)

    def stopping(*arguments, **batch):
        count.append(1)
        if len(count) == 3:
            signal.raise_signal(signal.SIGINT)
        return hybrid(*arguments, **batch)

    with monkeypatch.context() as patch:
        patch.setattr(losses, "hybrid", stopping)
        with pytest.raises(KeyboardInterrupt, match="after step 3 of 4"):
            recipes.train("tiny", out=tmp_path / "stopped")
    recipes.train("tiny", out=tmp_path / "stopped")
    recipes.train("tiny", out=tmp_path / "whole")
    assert weights(tmp_path / "stopped") == weights(tmp_path / "whole")


def test_a_start_must_fit(tmp_path, base):
    """Another network than the one that it starts from, but for more channels at its end, is refused before any training."""
    for change in ({"channels": [16, 16]}, {"condition": 32}, {"fold": 1}, {"num_classes": 20}):
        recipes.RECIPES["tiny"] = IMPROVED | {"net": IMPROVED["net"] | change}
        with pytest.raises((ValueError, RuntimeError)):
            recipes.train("tiny", out=tmp_path / "runs")
    for change in (
        {"blocks": [1, 2]},
        {"blocks": [2, 1]},
        {"attention": True},
        {"num_classes": 0},
    ):
        recipes.RECIPES["tiny"] = IMPROVED | {"net": IMPROVED["net"] | change}
        with pytest.raises(
            ValueError, match="^start must be a checkpoint of the same network; these weights differ: \\['"
        ):
            recipes.train("tiny", out=tmp_path / "runs")
    recipes.RECIPES["tiny"] = IMPROVED | {"start": "nonesuch"}
    with pytest.raises(ValueError, match="^name must be one of base; got 'nonesuch'"):
        recipes.train("tiny", out=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_shipped_starts_are_shipped(monkeypatch):
    """What a recipe starts from is a recipe on the same data and path, of the same network but for the channels at its end, or for w."""
    monkeypatch.undo()
    starting = {name: recipe for name, recipe in recipes.RECIPES.items() if "start" in recipe}
    tuned = starting.pop("mnist-dit-bold")  # the same network, trained on in another hand
    assert tuned["net"] == recipes.RECIPES[tuned["start"]]["net"] and tuned["hand"] in hands.HANDS
    assert {
        "mnist-improved",
        "mnist-student-1",
        "mnist-guided",
        "mnist-guided-2",
        "mnist-consistency",
    } <= starting.keys()
    for recipe in starting.values():
        before = recipes.RECIPES[recipe["start"]]
        first = before
        while "start" in first:
            first = recipes.RECIPES[first["start"]]
        assert first == recipes.RECIPES["mnist-unet"] and recipe["start"] in checkpoints.names()
        assert all(recipe[key] == before[key] for key in ("data", "path", "predicts"))
        grown = {key: recipe["net"][key] for key in ("out_channels", "guided") if key in recipe["net"]}
        assert recipe["net"] == before["net"] | grown and ("distils" in recipe) != ("chain" in recipe)
        new, old = (dict(checkpoints.build(card).net.named_parameters()) for card in (recipe, before))
        fresh, wider = new.keys() - old.keys(), [new[name].shape for name in old if new[name].shape != old[name].shape]
        if "distils" in recipe:
            assert wider == [] and not recipe.get("learned_variance")
            assert {name.split(".")[0] for name in fresh} == ({"weight"} if before["net"] != recipe["net"] else set())
        else:
            assert recipe["learned_variance"] and recipe["chain"] > 1 and grown == {"out_channels": 2}
            assert not fresh and [shape[0] for shape in wider] == [8, 8]  # of the last layer, 2 channels of 2×2 pixels


def test_shipped_students_halve_their_teachers_steps(monkeypatch):
    """From 16 DDIM steps of mnist-unet, or of mnist-guided, down by halves; each is scored by its own steps, at a weight that it knows."""
    monkeypatch.undo()
    students = {name: recipe for name, recipe in recipes.RECIPES.items() if "distils" in recipe}
    assert len(students) == 9
    for name, recipe in students.items():
        how, before = recipe["distils"], recipes.RECIPES[recipe["start"]].get("distils", {})
        guided = recipe["net"].get("guided", False)
        assert guided == ("weights" in how) and how["kind"] in ("progressive", "guidance", "consistency")
        assert how.keys() == {"kind"} | ({"steps"} if how["kind"] != "guidance" else set()) | (
            {"weights"} if guided else set()
        )
        assert recipe["predicts"] == "v"  # so that x̂_0 is x_t itself at t = 0, and anything at α = 0
        if how["kind"] == "progressive":
            assert before.get("steps", 16) == 2 * how["steps"] == 2 * recipe["scored with"]["steps"]
            assert name.endswith(f"-{how['steps']}") and before.get("weights") == how.get("weights")
        if guided:
            low, high = how["weights"]
            assert 0 <= low <= recipe["scored with"]["w"] <= high


def test_shipped_measurements_ask_students_as_they_were_trained(monkeypatch):
    """A student is asked by its own number of DDIM steps, 2N − 1 of the stochastic sampler, and by "consistency" if trained for it."""
    monkeypatch.undo()
    asked = set()
    for table in ("mnist-distillation", "mnist-guided-students"):
        recipe = recipes.RECIPES[table]
        for sampler in recipe["vary"]["sampler"]:
            if "checkpoint" not in sampler:
                continue
            student = recipes.RECIPES[sampler["checkpoint"]]
            how, number = student["distils"], sampler["evaluations"]
            asked.add(sampler["checkpoint"])
            assert sampler["grid"] == "time" and ("weights" in how) == ("w" in recipe["vary"])
            if how["kind"] == "consistency":
                assert sampler["name"] == "consistency" and how["steps"] % number == 0
            elif how["kind"] == "guidance":
                assert (sampler["name"], number) == ("DDIM", 16)
            else:
                assert number == {"DDIM": how["steps"], "stochastic": 2 * how["steps"] - 1}[sampler["name"]]
                assert sampler["name"] == "DDIM" or "weights" in how
            if "w" in recipe["vary"]:
                low, high = how["weights"]
                assert low <= min(recipe["vary"]["w"]) and max(recipe["vary"]["w"]) <= high
    assert asked == {name for name, recipe in recipes.RECIPES.items() if "distils" in recipe}


def test_shipped_students_know_their_teachers(monkeypatch):
    """The card of each student holds the hash of the very weights that are shipped as its teacher's."""
    monkeypatch.undo()
    for name in checkpoints.names():
        card = checkpoints.load(name).card
        assert ("teacher_sha256" in card) == ("distils" in card)
        if "distils" in card:
            assert card["teacher_sha256"] == checkpoints.load(card["start"]).card["sha256"]


# Students -----------------------------------------------------------------------------------------------------------

PLAIN = TINY | {
    "start": "base",
    "distils": {"kind": "progressive", "steps": 4},
    "fit": {"lr": 1e-3, "precision": "float32"},
    "scored with": {"classifier": "judge", "samples": 20, "draws": 1, "steps": 2},
}
TOLD = PLAIN | {
    "net": TINY["net"] | {"guided": True},
    "scored with": PLAIN["scored with"] | {"w": 1.5},
}
STUDENTS = {
    "progressive": PLAIN,
    "consistency": PLAIN | {"distils": {"kind": "consistency", "steps": 8}},
    "guidance": TOLD | {"distils": {"kind": "guidance", "weights": [0.0, 4.0]}},
}
all_students = pytest.mark.parametrize("kind", STUDENTS)


@pytest.fixture
def quiet(monkeypatch):
    """Scores without a classifier; returns what was scored, and with which settings."""
    scored = []

    def quality(d, x, y, *, sampler, **settings):
        noise = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(1))
        drawn = sampler(lambda xt, t: d(xt, t, y=torch.tensor([3, 10])), noise, None)
        scored.append(settings)
        return {"brightness": drawn.mean().item()}

    monkeypatch.setattr(objectives, "quality", quality)
    monkeypatch.setattr(recipes, "_floor", lambda *_: {"floor": 1.0})
    return scored


@all_students
def test_a_student_starts_as_its_teacher(kind, tmp_path, base, quiet, monkeypatch):
    """Before the first step it says what its teacher says, at every weight; then it is trained, and its teacher is not."""
    recipes.RECIPES["tiny"] = STUDENTS[kind]
    started, fit = [], training.fit

    def looked_at(model, *arguments, **options):
        started.append(copy.deepcopy(model).eval())
        return fit(model, *arguments, **options)

    monkeypatch.setattr(training, "fit", looked_at)
    recipes.train("tiny", out=tmp_path / "runs")
    x, y = data.images(part("mnist").select(range(4)))
    guided, trained = "guided" in STUDENTS[kind]["net"], checkpoints.load("tiny", folder=tmp_path / "runs")
    for w in (0.0, 3.0):
        told = {"w": torch.full((4,), w)} if guided else {}
        with torch.no_grad():
            said, taught = started[0](x, 0.6, y=y, **told), base(x, 0.6, y=y)
            torch.testing.assert_close(said, taught, rtol=1e-4, atol=1e-5)
            assert not torch.allclose(trained(x, 0.6, y=y, **told), taught, rtol=1e-4, atol=1e-5)
    assert torch.equal(checkpoints.load("base")(x, 0.6, y=y), base(x, 0.6, y=y))


@all_students
def test_the_card_of_a_student(kind, tmp_path, base, quiet):
    """It says what it distils, from whom, the hash of the very teacher, and its score by its own steps, at its own weight."""
    recipes.RECIPES["tiny"] = STUDENTS[kind]
    card = recipes.train("tiny", out=tmp_path / "runs")
    student = checkpoints.load("tiny", folder=tmp_path / "runs")
    assert {key: value for key, value in student.card.items() if key != "sha256"} == card
    assert card["distils"] == STUDENTS[kind]["distils"] and card["start"] == "base"
    assert (
        card["teacher_sha256"]
        == base.card["sha256"]
        == json.loads((tmp_path / "shipped/base.json").read_text())["sha256"]
    )
    assert card["scores"].keys() == {"brightness", "floor"} and card["scored with"] == STUDENTS[kind]["scored with"]
    assert quiet == [{"classifier": "judge", "samples": 20, "draws": 1}]
    assert "teacher_sha256" not in STUDENTS[kind]
    recipes.RECIPES["tiny"] = TINY
    assert "teacher_sha256" not in recipes.train("tiny", out=tmp_path / "other", steps=1)


@all_students
def test_a_stopped_student_goes_on(kind, tmp_path, base, quiet, monkeypatch):
    """To the very weights of a run that was not stopped; a second whole run gives them too."""
    recipes.RECIPES["tiny"] = STUDENTS[kind]
    count, matching = [], distillation.matching

    def stopping(*arguments, **options):
        count.append(1)
        if len(count) == 3:
            signal.raise_signal(signal.SIGINT)
        return matching(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(distillation, "matching", stopping)
        with pytest.raises(KeyboardInterrupt, match="after step 3 of 4"):
            recipes.train("tiny", out=tmp_path / "stopped")
    stopped = recipes.train("tiny", out=tmp_path / "stopped")
    torch.manual_seed(99)
    whole = recipes.train("tiny", out=tmp_path / "whole")
    assert weights(tmp_path / "stopped") == weights(tmp_path / "whole") and stopped["scores"] == whole["scores"]
    assert sorted(file.name for file in (tmp_path / "stopped").iterdir()) == ["tiny.json", "tiny.safetensors"]


def test_a_state_is_for_one_teacher(tmp_path, base, quiet, monkeypatch):
    """Taught by a teacher with other weights, a student begins anew, and its card names the new one."""
    recipes.RECIPES["tiny"] = PLAIN
    count, matching = [], distillation.matching

    def stopping(*arguments, **options):
        count.append(1)
        if len(count) == 3:
            signal.raise_signal(signal.SIGINT)
        return matching(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(distillation, "matching", stopping)
        with pytest.raises(KeyboardInterrupt):
            recipes.train("tiny", out=tmp_path / "stopped")
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(1.1)
    checkpoints.save("base", base, TINY, tmp_path / "shipped")
    card = recipes.train("tiny", out=tmp_path / "stopped")
    recipes.train("tiny", out=tmp_path / "whole")
    assert weights(tmp_path / "stopped") == weights(tmp_path / "whole")
    assert card["teacher_sha256"] == checkpoints.load("base").card["sha256"] != base.card["sha256"]


def test_a_student_of_a_student(tmp_path, base, quiet):
    """Stage two: the student of stage one is loaded as the teacher, told w, and its student starts from it, weights of w and all."""
    recipes.RECIPES["tiny"] = STUDENTS["guidance"]
    recipes.train("tiny", out=tmp_path / "shipped")
    recipes.RECIPES["another"] = TOLD | {
        "start": "tiny",
        "distils": {"kind": "progressive", "steps": 2, "weights": [0.0, 4.0]},
        "steps": 1,
        "fit": {"lr": 1e-9},
    }
    card = recipes.train("another", out=tmp_path / "runs")
    first, second = checkpoints.load("tiny"), checkpoints.load("another", folder=tmp_path / "runs")
    assert card["teacher_sha256"] == first.card["sha256"]
    assert first.net.weight.layers[-1].weight.any()
    for old, new in zip(first.net.parameters(), second.net.parameters(), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("change", [{"guided": True}, {"out_channels": 2}, {}])
def test_a_start_goes_by_name(change, base):
    """All of the other's weights, in any order; what is new stays as it was, zero in what it adds, so the first channels are the same."""
    torch.manual_seed(1)
    model = checkpoints.build(TINY | {"net": TINY["net"] | change, "learned_variance": "out_channels" in change})
    fresh = {name: value.clone() for name, value in model.net.named_parameters()}
    shuffled = dict(reversed(list(base.net.named_parameters())))
    base.net.named_parameters = lambda: shuffled.items()
    recipes._start(model, base)
    for name, value in model.net.named_parameters():
        known = len(shuffled.get(name, ()))
        assert torch.equal(value[:known], shuffled[name] if known else value[:0])
        assert torch.equal(value[known:], fresh[name][known:]) and value.requires_grad and value.is_leaf
    x, y = data.images(part("mnist").select(range(3)))
    told = {"w": torch.tensor([0.0, 1.0, 4.0])} if "guided" in change else {}
    with torch.no_grad():
        torch.testing.assert_close(model(x, 0.3, y=y, **told), base(x, 0.3, y=y), rtol=1e-4, atol=1e-5)


def test_a_student_that_is_not_told_has_no_teacher_that_is(tmp_path, base, quiet):
    """A teacher that knows weights of guidance cannot start a student that does not: which w should it be?"""
    torch.manual_seed(5)
    checkpoints.save("told", checkpoints.build(STUDENTS["guidance"]), STUDENTS["guidance"], tmp_path / "shipped")
    recipes.RECIPES["tiny"] = PLAIN | {"start": "told"}
    with pytest.raises(
        ValueError, match="^start must be a checkpoint of the same network; these weights differ: \\['weight"
    ):
        recipes.train("tiny", out=tmp_path / "runs")


def test_the_noisy_classifier_knows_the_noise_of_the_network_it_guides(monkeypatch):
    """One path for both, and the same data."""
    monkeypatch.undo()
    judges = [recipe for recipe in recipes.RECIPES.values() if "classifies" in recipe and "path" in recipe]
    assert len(judges) == 1
    for recipe in judges:
        assert recipe["net"]["timed"] and recipe["path"] == recipes.RECIPES["mnist-unet"]["path"]
        assert recipe["data"] == recipes.RECIPES["mnist-unet"]["data"]
    timed = [name for name, recipe in recipes.RECIPES.items() if recipe.get("net", {}).get("timed")]
    assert timed == ["mnist-noisy-classifier"]


# Moved images -------------------------------------------------------------------------------------------------------


def spots(*places, batch=1):
    """Images of one soft spot on the background, at (right, down) pixels from the centre."""
    axis = torch.arange(28.0) - 13.5
    out = []
    for right, down in places:
        spot = torch.exp(-((axis[None, :] - right) ** 2 + (axis[:, None] - down) ** 2) / 4)
        out.append(torch.where(spot > 1e-3, 2 * spot, 0) - 1)
    return torch.stack(out)[:, None].repeat(batch, 1, 1, 1)


def places(x):
    """Where the spots are: their centres of mass, as complex numbers, pixels to the right + i · pixels down."""
    axis, mass = torch.arange(28.0) - 13.5, x[:, 0] + 1
    right, down = (mass * axis).sum((1, 2)), (mass * axis[:, None]).sum((1, 2))
    return torch.complex(right, down) / mass.sum((1, 2))


def dice(monkeypatch, *values):
    """Make the four random numbers of a movement, angle, size, right and down, these for every image."""
    numbers = torch.tensor(values)[:, None]
    monkeypatch.setattr(torch, "rand", lambda *shape, generator: numbers.expand(*shape).clone())


def test_images_stay_where_chance_is_in_the_middle(monkeypatch, generator):
    """With all random numbers one half, digits come back as they are, up to the rounding of places in float32."""
    dice(monkeypatch, 0.5, 0.5, 0.5, 0.5)
    x, _ = data.images(part("mnist"))
    torch.testing.assert_close(objectives._moved(x[:20], generator), x[:20], rtol=0, atol=1e-4)


@pytest.mark.parametrize("end", [0.0, 1.0])
def test_the_furthest_that_images_move(end, monkeypatch, generator):
    """One by one: a shift by two pixels of 28, the very image; a turn by 0.2 rad; a size of e^±0.1 times."""
    x, far = spots((2, -3)), spots((9, 0), (0, -9))
    for shift, axis in (((0.5, 0.5, end, 0.5), 3), ((0.5, 0.5, 0.5, end), 2)):
        dice(monkeypatch, *shift)
        moved = objectives._moved(x, generator)
        assert any(torch.allclose(moved, x.roll(by, axis), atol=1e-4) for by in ((2,), (-2,)))
    dice(monkeypatch, end, 0.5, 0.5, 0.5)
    ratio = places(objectives._moved(far, generator)) / places(far)
    assert ratio.abs().sub(1).abs().max() < 0.01 and ratio.angle().abs().sub(0.2).abs().max() < 0.01
    assert (ratio.angle()[0] - ratio.angle()[1]).abs() < 0.01
    dice(monkeypatch, 0.5, end, 0.5, 0.5)
    ratio = places(objectives._moved(far, generator)) / places(far)
    assert ratio.angle().abs().max() < 0.01 and ratio.abs().log().abs().sub(0.1).abs().max() < 0.01


def test_images_move_no_further_at_random(generator):
    """Of 400 images none turns, grows or moves beyond its bounds, some come near, and the four have nothing in common."""
    seed = generator.initial_seed()
    here, there = (
        places(objectives._moved(spots(place, batch=400), torch.Generator().manual_seed(seed)))
        for place in ((0, 0), (8, 0))
    )
    turn = (there - here) / 8  # what the map does to directions; the rest is the shift, turned and scaled after it
    angle, size, shift = turn.angle(), turn.abs().log(), here / turn
    for value, bound in ((angle, 0.2), (size, 0.1), (shift.real, 2.0), (shift.imag, 2.0)):
        assert value.abs().max() < 1.05 * bound and value.max() > 0.9 * bound and value.min() < -0.9 * bound
        assert value.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    common = torch.corrcoef(torch.stack([angle, size, shift.real, shift.imag])) - torch.eye(4)
    assert common.abs().max() < 0.2


def test_background_stays_background(generator):
    """An empty image stays empty, what is uncovered is background, and no grey level is left."""
    assert torch.equal(objectives._moved(-torch.ones(50, 1, 28, 28), generator), -torch.ones(50, 1, 28, 28))
    full = objectives._moved(torch.ones(50, 1, 28, 28), generator)
    assert full.min() == -1 and full.max() <= 1 + 1e-6 and (full[:, 0, 8:20, 8:20] > 1 - 1e-5).all()
    x, _ = data.images(part("mnist"))
    moved = objectives._moved(x, generator)
    assert moved.shape == x.shape and moved.dtype == x.dtype
    assert moved.min() >= -1 and moved.max() <= 1 + 1e-6 and (moved[:, 0, 0, 0] == -1).all()


def test_each_image_moves_by_itself(generator):
    """Equal images part ways; an image moves the same whatever its neighbours are; the generator alone decides."""
    seed = generator.initial_seed()

    def moved(x):
        return objectives._moved(x, torch.Generator().manual_seed(seed))

    one = moved(spots((3, 1), batch=20))
    assert len({image.sum().item() for image in one}) == 20
    others = spots((-4, 2), batch=20)
    others[7] = spots((3, 1))[0]
    assert torch.equal(moved(others)[7], one[7])
    torch.manual_seed(5)
    assert torch.equal(moved(spots((3, 1), batch=20)), one)
    assert not torch.equal(objectives._moved(spots((3, 1), batch=20), torch.Generator().manual_seed(1)), one)


# Balanced choice ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [3, 12, 30])
def test_balanced(number, generator):
    """As many of each class, in order of class, each image with its label and none twice, in a new choice each time."""
    y = torch.arange(47).flip(0) % 3
    x = torch.arange(47.0)[:, None, None, None].expand(-1, 1, 2, 2)
    draws = [data.balanced(x, y, number, generator) for _ in range(40)]
    for chosen, labels in draws:
        assert labels.tolist() == [c for c in range(3) for _ in range(number // 3)]
        kept = chosen[:, 0, 0, 0].long()
        assert torch.equal(y[kept], labels) and len(kept.unique()) == number and chosen.shape == (number, 1, 2, 2)
    assert len({tuple(chosen[:, 0, 0, 0].tolist()) for chosen, _ in draws}) > 1
    if number > 3:
        assert len(torch.cat([chosen for chosen, _ in draws])[:, 0, 0, 0].unique()) == 47


def test_balanced_can_take_everything(generator):
    """As many as there are: every image once; one seed, one choice."""
    y = torch.arange(40) % 4
    x = torch.arange(40.0)
    chosen, _ = data.balanced(x, y, 40, generator)
    assert torch.equal(chosen.sort().values, x)
    one, two = (data.balanced(x, y, 8, torch.Generator().manual_seed(1))[0] for _ in "ab")
    assert torch.equal(one, two)


@pytest.mark.parametrize("number", [7, 9, 45])
def test_balanced_checks_the_number(number):
    """Not a multiple, or more than the least class has: the error says what is asked and what came."""
    y = torch.tensor([0] * 20 + [1] * 4)
    with pytest.raises(ValueError, match=f"^number must be a positive multiple of 2, and at most 8; got {number}"):
        data.balanced(torch.zeros(24, 1), y, number)
    with pytest.raises(ValueError, match="a positive multiple of 3, and at most 0; got 3"):  # none is a 1
        data.balanced(torch.zeros(2, 1), torch.tensor([0, 2]), 3)


# Quality of samples -------------------------------------------------------------------------------------------------


class Judge(torch.nn.Module):
    """Features are five sums over fixed parts of the image; the answer is the brightest tenth of it. Keeps what it saw."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def features(self, x):
        self.seen.append(x)
        return x.flatten(1) @ torch.cos(torch.outer(torch.arange(40.0), torch.arange(1.0, 6.0)))

    def forward(self, x):
        return x.flatten(1).reshape(len(x), 10, 4).sum(2)


class Memory:
    """A denoiser that says the same stored images whatever it is shown, in the order in which samples are drawn."""

    def __init__(self, stored):
        self.path, self.stored, self.times, self.labels, self.noise, self.end = Cosine(), stored, [], [], [], 0

    def __call__(self, xt, t, y):
        if t == 1:
            self.start, self.end = self.end, self.end + len(y)
            self.labels.append(y)
            self.noise.append(xt)
        self.times.append(float(t))
        return self.stored[self.start : self.end]


@pytest.fixture
def judge(monkeypatch):
    """In place of every classifier that is asked for."""
    judge = Judge()
    judge.asked = []
    monkeypatch.setattr(objectives, "JUDGED", 8)  # the side of the images below, so that they are left as they are
    monkeypatch.setattr(checkpoints, "load", lambda name: judge.asked.append(name) or judge)
    return judge


def few(count, generator):
    """`count` images with 40 pixels of each of 10 classes, whose class the judge sees two times out of three or so."""
    y = torch.arange(10).repeat_interleave(count)
    x = 0.3 * torch.randn(10 * count, 10, 4, generator=generator)
    x[torch.arange(10 * count), y] += 0.3
    return x.clamp(-1, 1).reshape(-1, 1, 5, 8), y


def distance(a, b):
    """The Fréchet distance with the root of the product of the covariances by scipy."""
    a, b = (x.double().numpy() for x in (a, b))
    (m_a, c_a), (m_b, c_b) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (a, b))
    return ((m_a - m_b) ** 2).sum() + np.trace(c_a + c_b - 2 * scipy.linalg.sqrtm(c_a @ c_b).real)


def test_quality_of_known_samples(judge, generator):
    """A model that remembers 300 images: the judge's own answers on them, and their distance to the real ones, by scipy."""
    (x, y), (stored, asked) = few(30, generator), few(30, generator)
    memory = Memory(stored)
    scores = objectives.quality(memory, x, y, classifier="judge", samples=300, steps=4, draws=1)
    assert judge.asked == ["judge"] and memory.times == [1.0, 0.75, 0.5, 0.25] * 2
    assert torch.equal(torch.cat(memory.labels), asked)
    right = np.mean([image.reshape(10, 4).sum(1).argmax() == label for image, label in zip(stored, asked, strict=True)])
    assert scores.keys() == {"classified as asked", "Fréchet distance"} and 0.3 < right < 0.95
    assert scores["classified as asked"] == pytest.approx(right, abs=6e-5)
    assert scores["Fréchet distance"] == pytest.approx(distance(judge.features(stored), judge.features(x)), abs=6e-5)
    assert scores["Fréchet distance"] > 0.05
    noise = torch.cat(memory.noise)
    assert noise.shape == x.shape and stats.kstest(noise.flatten().numpy(), "norm").pvalue > 1e-4


def test_quality_of_the_real_images(judge, generator):
    """Samples that are the real images have the judge's accuracy and distance 0; labels of the next class are all wrong."""
    x, y = few(20, generator)
    x = (x + 3 * torch.nn.functional.one_hot(y, 10)[:, :, None].expand(-1, -1, 4).reshape(x.shape)).clamp(-1, 1)
    settings = {"classifier": "judge", "samples": 200, "steps": 2, "draws": 1}
    scores = objectives.quality(Memory(x), x, y, **settings)
    assert scores["classified as asked"] == 1 and scores["Fréchet distance"] == pytest.approx(0, abs=1e-4)
    scores = objectives.quality(Memory(x.roll(20, 0)), x, y, **settings)
    assert scores["classified as asked"] == 0 and scores["Fréchet distance"] == pytest.approx(0, abs=1e-4)


def test_quality_is_a_mean_over_draws_of_clipped_samples(judge, generator):
    """Two draws with noise and real images of their own, equal parts of each class; guesses beyond ±1 are cut."""
    (x, y), (one, asked), (two, _) = few(30, generator), few(6, generator), few(6, generator)
    memory = Memory(5 * torch.cat([one, two]))
    scores = objectives.quality(memory, x, y, classifier="judge", samples=60, steps=1, draws=2)
    seen = judge.seen
    right, gap = [], []
    for k, stored in enumerate((one, two)):
        stored = (5 * stored).clamp(-1, 1)
        drawn, real = seen[2 * k : 2 * k + 2]
        assert torch.equal(drawn, stored)
        where = (real[:, None] == x).flatten(2).all(2)
        assert (where.sum(1) == 1).all() and torch.equal(y[where.int().argmax(1)], asked)
        right.append((judge(stored).argmax(1) == asked).double().mean().item())
        gap.append(distance(judge.features(drawn), judge.features(real)))
    assert not torch.equal(seen[1], seen[3]) and not torch.equal(memory.noise[0], memory.noise[1])
    assert scores["classified as asked"] == pytest.approx(sum(right) / 2, abs=6e-5) and right[0] != right[1]
    assert scores["Fréchet distance"] == pytest.approx(sum(gap) / 2, abs=6e-5)


def test_quality_is_decided_by_its_seed(judge, generator):
    """The same noise and images for one seed, others for another; the global generator is left alone."""
    x, y = few(30, generator)
    settings = {"classifier": "judge", "samples": 50, "steps": 1, "draws": 1}
    torch.manual_seed(0)
    state, runs = torch.get_rng_state(), []
    for seed in (1, 1, 2):
        memory = Memory(x[::6])
        runs.append((objectives.quality(memory, x, y, seed=seed, **settings), memory.noise[0]))
    assert torch.equal(torch.get_rng_state(), state)
    assert runs[0][0] == runs[1][0] != runs[2][0]
    assert torch.equal(runs[0][1], runs[1][1]) and not torch.equal(runs[0][1], runs[2][1])


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_quality_draws_with_the_eta_it_is_given(eta, judge, generator, monkeypatch):
    """DDIM's share of fresh noise, from the generator of the draw and not from the global one."""
    ddim, seen = objectives.samplers.ddim, []

    def recorded(*arguments, **options):
        seen.append(options)
        return ddim(*arguments, **options)

    monkeypatch.setattr(objectives.samplers, "ddim", recorded)
    x, y = few(30, generator)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    objectives.quality(Memory(x), x, y, classifier="judge", samples=50, steps=2, draws=1, eta=eta)
    assert torch.equal(torch.get_rng_state(), state)
    assert [options["eta"] for options in seen] == [eta] and isinstance(seen[0]["generator"], torch.Generator)


@pytest.mark.parametrize("size", [14, 28, 56])
def test_quality_is_judged_at_28_pixels(size, generator, monkeypatch):
    """The classifier sees samples and real images of its own size, whatever size the model makes."""
    seen = []

    class Counts(torch.nn.Module):
        def features(self, x):
            seen.append(x)
            return x.flatten(1)[:, :5]

        def forward(self, x):
            return self.features(x).repeat(1, 2)

    monkeypatch.setattr(checkpoints, "load", lambda name: Counts())
    x, y = torch.rand(40, 1, size, size, generator=generator), torch.arange(40) % 10
    stored = torch.rand(40, 1, size, size, generator=generator)
    memory = Memory(stored)
    objectives.quality(memory, x, y, classifier="judge", samples=40, steps=1, draws=1)
    assert memory.noise[0].shape == (40, 1, size, size) and all(part.shape == (40, 1, 28, 28) for part in seen)
    if size == 28:
        assert torch.equal(seen[0], stored)
    if size == 56:
        torch.testing.assert_close(seen[0][:, 0], stored.reshape(40, 28, 2, 28, 2).mean((2, 4)))
    torch.testing.assert_close(seen[0].mean(), stored.mean(), rtol=1e-2, atol=0)


def test_floor_of_real_images(judge, generator):
    """All images of both sets drawn: their distance by scipy; of part of them, equal parts of each class, from each set."""
    train, test = few(30, generator), few(30, generator)
    card = {"scored with": {"classifier": "judge", "samples": 300, "steps": 4, "draws": 1}}
    expected = distance(judge.features(train[0]), judge.features(test[0]))
    assert recipes._floor(card, train, test) == {"Fréchet distance of real images": pytest.approx(expected, abs=6e-5)}
    assert recipes._floor(card, train, train)["Fréchet distance of real images"] == pytest.approx(0, abs=1e-4)
    assert recipes._floor({}, train, test) == {}
    judge.seen.clear()
    card["scored with"]["samples"] = 60
    found = recipes._floor(card, train, test)["Fréchet distance of real images"]
    pairs = list(zip(judge.seen[::2], judge.seen[1::2], strict=True))
    for pair in pairs:
        for chosen, (x, y) in zip(pair, (train, test), strict=True):
            where = (chosen[:, None] == x).flatten(2).all(2)
            assert (where.sum(1) == 1).all() and (where.sum(0) <= 1).all()
            assert y[where.int().argmax(1)].tolist() == [c for c in range(10) for _ in range(6)]
    assert len({pair[0].sum().item() for pair in pairs}) == len(pairs) >= 8
    assert found == pytest.approx(np.mean([distance(judge.features(a), judge.features(b)) for a, b in pairs]), abs=6e-5)


# A table ------------------------------------------------------------------------------------------------------------

TABLE = {key: value for key, value in TINY.items() if key not in ("predicts", "seed")} | {
    "what": "two predictions of a tiny U-Net over seeds",
    "vary": {"predicts": ["eps", "v"], "seed": [1, 0]},
    "steps": 3,
    "batch": 4,
}
ORDER = [("eps", 1), ("eps", 0), ("v", 1), ("v", 0)]


def timeless(table):
    """A table without what differs from run to run."""
    rows = [{key: value for key, value in row.items() if key != "minutes"} for row in table["rows"]]
    return table | {"rows": rows}


def test_a_recipe_that_varies_writes_a_table(tmp_path, fits, asked):
    """One row for each combination, in order, like a run of that recipe alone; no checkpoint and no state is left."""
    recipes.RECIPES["tiny"] = TABLE
    card = recipes.train("tiny", out=tmp_path / "runs")
    assert [file.name for file in (tmp_path / "runs").iterdir()] == ["tiny.json"]
    assert tables.read(tmp_path / "runs" / "tiny.json") == card
    assert card == TABLE | {key: card[key] for key in card if key not in TABLE}
    assert card["recipe"] == "dgm-course train tiny" and platform.machine() in card["machine"]
    assert card["images"] == 500 and card["data_sha256"] == data.content_hash(*data.images(part("mnist")))
    assert asked == [("mnist", "train", None), ("mnist", "test", None)]
    assert [(row["predicts"], row["seed"]) for row in card["rows"]] == ORDER
    together = fits[:]
    for row, (predicts, seed), (*_, done) in zip(card["rows"], ORDER, together, strict=True):
        recipes.RECIPES["alone"] = TINY | {"steps": 3, "batch": 4, "predicts": predicts, "seed": seed}
        alone = recipes.train("alone", out=tmp_path)
        assert row.keys() == {"predicts", "seed", "test loss", "first losses", "minutes"} and row["minutes"] >= 0
        assert row["test loss"] == alone["scores"]["test loss"]
        assert (
            row["first losses"] == pytest.approx(fits[-1][-1].losses, abs=6e-6) and done.losses == fits[-1][-1].losses
        )
    assert len({row["test loss"] for row in card["rows"]}) == 4


def test_a_table_of_several_kinds_of_model(tmp_path, fits, monkeypatch):
    """Each kind brings its model, its steps and its ways of training; what it does not say is the recipe's."""
    monkeypatch.setattr(objectives, "_realism", lambda draw, x, y, **settings: {"drawn": len(draw(3, None))} | settings)
    monkeypatch.setattr(recipes, "_floor", lambda *_: {})
    recipes.RECIPES["tiny"] = {
        "what": "a VAE beside a GAN",
        "data": "mnist",
        "vary": {"kind": ["VAE", "GAN"], "seed": [1, 0]},
        "kinds": {
            "VAE": {"model": {"class": "ConvVAE", "latent": 2, "width": 8}},
            "GAN": {"model": {"class": "ConvGAN", "latent": 3, "width": 8}, "steps": 2, "fit": {"lr": 1e-3}},
        },
        "steps": 3,
        "batch": 4,
        "fit": {"precision": "float32"},
        "scored with": {"samples": 20},
    }
    card = recipes.train("tiny", out=tmp_path)
    assert [(row["kind"], row["seed"]) for row in card["rows"]] == [("VAE", 1), ("VAE", 0), ("GAN", 1), ("GAN", 0)]
    assert all(row["drawn"] == 3 and row["samples"] == 20 for row in card["rows"])
    assert [type(model) for model, *_ in fits] == [ConvVAE] * 2 + [ConvGAN] * 2
    assert [options["steps"] for *_, options, _ in fits] == [3, 3, 2, 2]
    assert fits[0][3]["precision"] == "float32" and "lr" not in fits[0][3] and fits[2][3]["lr"] == 1e-3
    assert card["rows"][0]["first losses"] != card["rows"][1]["first losses"]
    assert [len(row["first losses"]) for row in card["rows"]] == [3, 3, 2, 2]
    assert tables.read(tmp_path / "tiny.json") == card


@pytest.mark.parametrize("survive", [0, 2, 3])
def test_a_stopped_table_goes_on(survive, tmp_path, fits, monkeypatch):
    """Rows that were done are kept and not trained again; the table is that of a run which was not stopped."""
    recipes.RECIPES["tiny"] = TABLE
    with monkeypatch.context() as patch:
        fit = training.fit

        def stopping(*arguments, **options):
            if len(fits) == survive:
                raise KeyboardInterrupt
            return fit(*arguments, **options)

        patch.setattr(training, "fit", stopping)
        with pytest.raises(KeyboardInterrupt):
            recipes.train("tiny", out=tmp_path / "stopped")
    if survive:
        kept = tables.read(tmp_path / "stopped" / "tiny.json")["rows"]
        assert [(row["predicts"], row["seed"]) for row in kept] == ORDER[:survive]
    fits.clear()
    card = recipes.train("tiny", out=tmp_path / "stopped")
    assert len(fits) == 4 - survive and (not survive or card["rows"][:survive] == kept)
    assert timeless(card) == timeless(recipes.train("tiny", out=tmp_path / "whole"))
    assert tables.read(tmp_path / "stopped" / "tiny.json") == card
    fits.clear()
    assert recipes.train("tiny", out=tmp_path / "stopped") == card and fits == []  # nothing is left to do


@pytest.mark.parametrize(
    "change",
    [{"source": "other"}, {"steps": 2}, {"batch": 3}, {"vary": {"predicts": ["eps"], "seed": [1]}}, {"machine": 0}],
)
def test_a_table_is_for_one_recipe_one_set_of_data_and_one_machine(change, tmp_path, fits, monkeypatch):
    """Rows of other data, steps or settings, or measured elsewhere, are not mixed with new ones."""
    recipes.RECIPES["tiny"] = TABLE | {"vary": {"predicts": ["eps"], "seed": [1, 0]}}
    recipes.train("tiny", out=tmp_path)
    fits.clear()
    if "machine" in change:
        monkeypatch.setattr(recipes, "_machine", lambda card: "a faster one")
        change = {}
    elif "batch" in change or "vary" in change:
        recipes.RECIPES["tiny"] = recipes.RECIPES["tiny"] | change
        change = {}
    card = recipes.train("tiny", out=tmp_path, **change)
    count = len(recipes.RECIPES["tiny"]["vary"]["seed"])
    assert len(fits) == len(card["rows"]) == count and tables.read(tmp_path / "tiny.json") == card


# A table of samplers ------------------------------------------------------------------------------------------------

MEASURED = {
    "what": "two samplers of a network over seeds",
    "data": "mnist",
    "checkpoint": "network",
    "path": {"class": "VP"},
    "vary": {
        "seed": [1, 0],
        "sampler": [{"name": "Euler–Maruyama", "evaluations": 4}, {"name": "dopri5", "tolerance": 0.1}],
    },
    "scored with": {"classifier": "judge", "samples": 20, "draws": 1},
}
TRIED = [(1, "Euler–Maruyama"), (1, "dopri5"), (0, "Euler–Maruyama"), (0, "dopri5")]


@pytest.fixture
def shipped(monkeypatch):
    """In place of the checkpoints: a network that shrinks what it sees, on a circle, and a classifier of means."""

    class Network:
        path = Cosine()

        def __call__(self, xt, t, y):
            return 0.5 * xt + 0.1 * (y - 4.5).reshape(-1, 1, 1, 1)

    class Means(torch.nn.Module):
        def features(self, x):
            return x.flatten(1)[:, 300:304]

        def forward(self, x):
            return x.flatten(1)[:, :10]

    monkeypatch.setattr(checkpoints, "load", {"network": Network(), "judge": Means()}.__getitem__)
    monkeypatch.setattr(training, "fit", None)  # nothing is trained
    monkeypatch.setattr(training, "_bfloat16", lambda precision: precision != "float32")  # as on a newer processor


def test_a_measuring_recipe_writes_a_table(tmp_path, asked, shipped):
    """A row for each sampler and seed, in order, as `measures.measure` gives it, with its minutes; no steps, no batches."""
    recipes.RECIPES["tiny"] = MEASURED
    card = recipes.train("tiny", out=tmp_path / "runs")
    assert [file.name for file in (tmp_path / "runs").iterdir()] == ["tiny.json"]
    assert tables.read(tmp_path / "runs" / "tiny.json") == card
    said = {"images", "data_sha256", "recipe", "machine", "Fréchet distance of real images", "rows"}
    assert card.keys() == MEASURED.keys() | said and {key: card[key] for key in MEASURED} == MEASURED
    assert card["recipe"] == "dgm-course train tiny" and card["images"] == 500
    assert platform.machine() in card["machine"] and "float32" in card["machine"]
    assert asked == [("mnist", "train", None), ("mnist", "test", None)]
    assert [(row["seed"], row["sampler"]["name"]) for row in card["rows"]] == TRIED
    test = data.images(part("mnist"))
    for row in card["rows"]:
        alone = measures.measure(MEASURED | {"seed": row["seed"], "sampler": row["sampler"]}, *test)
        assert row == alone | {"seed": row["seed"], "sampler": row["sampler"], "minutes": row["minutes"]}
        assert 0 <= row["minutes"] < 1
    assert card["rows"][0]["evaluations"] == 4 and len({row["Fréchet distance"] for row in card["rows"]}) == 4


@pytest.mark.parametrize("survive", [1, 3])
def test_a_stopped_measurement_goes_on(survive, tmp_path, shipped, monkeypatch):
    """Rows that were measured are kept and not measured again."""
    recipes.RECIPES["tiny"], measure, calls = MEASURED, measures.measure, []

    def counted(*arguments):
        if len(calls) == survive and not (tmp_path / "again").exists():
            raise KeyboardInterrupt
        calls.append(arguments[0]["sampler"])
        return measure(*arguments)

    monkeypatch.setattr(measures, "measure", counted)
    with pytest.raises(KeyboardInterrupt):
        recipes.train("tiny", out=tmp_path)
    kept = tables.read(tmp_path / "tiny.json")["rows"]
    assert [(row["seed"], row["sampler"]["name"]) for row in kept] == TRIED[:survive]
    (tmp_path / "again").touch()
    card = recipes.train("tiny", out=tmp_path)
    assert len(calls) == 4 and card["rows"][:survive] == kept
    assert [(row["seed"], row["sampler"]["name"]) for row in card["rows"]] == TRIED
    assert tables.read(tmp_path / "tiny.json") == card
    assert recipes.train("tiny", out=tmp_path) == card and len(calls) == 4


def test_a_measurement_has_no_steps(tmp_path, asked, shipped):
    """Steps asked of it are refused, before any data are read."""
    recipes.RECIPES["tiny"] = MEASURED
    with pytest.raises(ValueError, match="^recipe tiny trains nothing, so it has no steps; got 5"):
        recipes.train("tiny", out=tmp_path, steps=5)
    assert asked == [] and list(tmp_path.iterdir()) == []
