"""A user's model is the base until it is trained, and what its row counts is what a user's file holds."""

import pytest
import torch
from safetensors.torch import load_file

from dgm_course import checkpoints, data, losses, nets, objectives, peft, personal, recipes, tables, training
from dgm_course.data import hands

USERS = recipes.RECIPES["mnist-users"]
TINY = USERS | {"steps": 3, "scored with": {"samples": 20, "draws": 1, "steps": 2}}
UPDATE = 2 * (2 * (32 + 96) + 7 * 32 + 3 * 32)  # numbers in a LoRA of rank 2 on the small base
KINDS = list(USERS["kinds"])
load = data.load  # as it is before a test replaces it


CARD = recipes.RECIPES["mnist-dit"] | {
    "net": {"class": "DiT", "width": 32, "depth": 1, "heads": 4, "ratio": 3, "num_classes": 10}
}


def base():
    """A small DiT whose every weight says something, in place of mnist-dit."""
    torch.manual_seed(9)
    d = checkpoints.build(CARD).eval().requires_grad_(False)
    for p in d.parameters():
        p.add_(0.1 * torch.randn_like(p))
    d.card = CARD | {"sha256": "0"}
    return d


@pytest.fixture(autouse=True)
def little(monkeypatch):
    """A small base, and 500 test images in place of every set."""
    shipped = checkpoints.load
    monkeypatch.setattr(
        checkpoints, "load", lambda name, *folder: base() if name == "mnist-dit" else shipped(name, *folder)
    )
    parts = {name: load(name, "test").select(range(500)) for name in data.NAMES}
    monkeypatch.setattr(data, "load", lambda name, *_: parts[name])
    monkeypatch.setattr(hands, "thickened", lambda x, pixels: x * 0.9)  # the other takes its time
    monkeypatch.setattr(hands, "load", lambda name, *_: parts[name])


@pytest.fixture
def unscored(monkeypatch):
    """Rows without scores, which take longest."""
    monkeypatch.setattr(objectives, "quality", lambda *_, **settings: {})
    monkeypatch.setattr(personal, "_loss", lambda *_: 0.0)


@pytest.fixture
def fits(monkeypatch):
    """What `training.fit` was given and gave."""
    calls, fit = [], training.fit

    def recorded(model, loss, draw, **options):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        calls.append((model, before, draw, options, fit(model, loss, draw, progress=False, **options)))
        return calls[-1][-1]

    monkeypatch.setattr(training, "fit", recorded)
    return calls


def row(kind, user="bold", seed=0, **change):
    return personal.personalise(TINY | USERS["kinds"][kind] | {"user": user, "seed": seed} | change)


def size(width=32, blocks=1, ratio=3):
    """Parameters of each kind, counted by hand."""
    hidden, bias = ratio * width, blocks * ((4 + 6 + 1) * width + ratio * width)
    lora = blocks * (2 * (width + hidden) + 7 * width) + 3 * width  # for each unit of rank: perceptron, modulations
    outside = 7 * width - 5 * width + 2 * width + 16  # biases of time's two layers, of enter, of modulation, of leave
    return {
        "base": 0,
        "full": sum(p.numel() for p in base().parameters()),
        **{f"LoRA, r = {r}": r * lora for r in (1, 2, 4, 8)},
        "LoRA on attention, r = 4": 4 * blocks * 4 * 2 * width,
        "Houlsby": 2 * blocks * (2 * 8 * width + 8 + width),
        "Pfeiffer": blocks * (2 * 16 * width + 16 + width),
        "prefix": 16 * 2 * blocks * width,
        "biases": bias + outside + width,
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_counts_what_is_trained_and_nothing_else_moves(kind, fits, unscored):
    found = row(kind)
    assert found["parameters"] == size()[kind] and found["bytes"] == 4 * found["parameters"]
    if kind == "base":
        assert not fits and "first losses" not in found
        return
    ((model, before, _, options, done),) = fits
    assert options["steps"] == 3 and options["lr"] == USERS["rates"][USERS["kinds"][kind]["tunes"]["kind"]]["lr"]
    assert found["first losses"] == [round(value, 5) for value in done.losses]
    after = dict(model.named_parameters())
    moved = {name for name, p in before.items() if not torch.equal(p, after[name])}
    assert moved and moved <= set(peft.trainable(model))
    if kind not in ("full", "biases"):  # all of the base is as it was
        assert not any(torch.equal(p, q) for name in moved for p in [before[name]] for q in [after[name]])
        frozen = [p for p in after.values() if not p.requires_grad]
        assert all(torch.equal(p, q) for p, q in zip(base().parameters(), frozen, strict=True))


def test_all_but_a_prefix_begin_as_the_base(unscored):
    """The first loss is the base's own, to the digits of a table; a prefix changes it before it has learned anything."""
    first = {kind: row(kind, steps=1)["first losses"][0] for kind in KINDS if kind != "base"}
    d = base()
    x, y = personal.few("bold", 0, 100)
    batch = training.batches(x, d.path, size=32, y=y, null=10, times="logit-normal", seed=0)(0)
    expected = losses.simple(d, **batch).item()
    away = {kind for kind, value in first.items() if abs(value - expected) > 2e-5}
    assert away == {"prefix"}


def test_the_scores_are_of_the_users_hand_and_of_plain_digits(fits, monkeypatch):
    asked, quality = [], objectives.quality
    monkeypatch.setattr(
        objectives,
        "quality",
        lambda d, x, y, **settings: asked.append((d, x, y, settings)) or quality(d, x, y, **settings),
    )
    found = row("LoRA, r = 2", user="thin", seed=1)
    ((d, x, y, settings),) = asked
    assert settings == {"samples": 20, "draws": 1, "steps": 2, "classifier": "mnist-classifier", "seed": 1}
    own, plain = hands.pages("thin", "test"), data.images(data.load("mnist"))
    assert torch.equal(x, own[0]) and torch.equal(y, own[1])
    for name, (x, y) in {"test loss": own, "plain test loss": plain}.items():
        t, g = (torch.arange(500) + 0.5) / 500, torch.Generator().manual_seed(5)
        with torch.no_grad():
            other = losses.simple(d, x, t, torch.randn(x.shape, generator=g), y=y).item()
        assert found[name] == pytest.approx(other, rel=0.1)
    assert row("base", user="clothes")["Fréchet distance"] > 1 and asked[-1][3]["classifier"] == "fashion-classifier"


def test_few_images_are_a_users_own_and_another_seed_draws_others():
    x, y = hands.pages("shoe", "train")
    some, labels = personal.few("shoe", 0, 100)
    assert labels.bincount().tolist() == [10] * 10
    for image, label in zip(some[::13], labels[::13], strict=True):
        same = (x == image).flatten(1).all(1)
        assert same.any() and label in y[same]
    assert not torch.equal(some, personal.few("shoe", 1, 100)[0])
    assert torch.equal(some, personal.few("shoe", 0, 100)[0])


def test_a_kept_file_is_the_averaged_update(tmp_path, fits, unscored):
    """In PEFT's form; on a fresh base it says what the model said that was scored."""
    personal.personalise(TINY | USERS["kinds"]["LoRA, r = 2"] | {"user": "bold", "seed": 0}, out=tmp_path)
    assert sum(t.numel() for t in load_file(tmp_path / "adapter_model.safetensors").values()) == UPDATE
    d, ema = base(), fits[0][-1].ema
    peft.load_lora(d.net, tmp_path)
    x, t, y = torch.randn(3, 1, 28, 28), torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0, 5, 10])
    with torch.no_grad():
        assert torch.equal(d(x, t, y=y), ema(x, t, y=y))


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="^kind must be base, full, biases, LoRA, adapters or prefix; got 'IA3'"):
        personal.tuned(base(), {"kind": "IA3"})


def test_a_table_of_users_keeps_the_files_of_one_kind_and_seed(tmp_path, monkeypatch, fits, unscored):
    """And goes on where it stopped."""
    tiny = TINY | {
        "vary": {"seed": [0, 1], "user": ["bold", "shoe"], "kind": ["LoRA, r = 1", "LoRA, r = 2"]},
        "steps": 2,
    }
    monkeypatch.setattr(recipes, "RECIPES", {"tiny": tiny})
    card = recipes.train("tiny", out=tmp_path)
    assert [(row["seed"], row["user"], row["parameters"]) for row in card["rows"]] == [
        (seed, user, parameters) for seed in (0, 1) for user in ("bold", "shoe") for parameters in (UPDATE // 2, UPDATE)
    ]
    assert sorted(folder.name for folder in (tmp_path / "users").iterdir()) == ["bold", "shoe"]
    for user in ("bold", "shoe"):
        net = peft.load_lora(base().net, tmp_path / "users" / user)
        assert sum(p.numel() for p in peft.trainable(net).values()) == UPDATE
    tables.write(tmp_path / "tiny.json", card | {"rows": card["rows"][:7]})
    before = len(fits)
    again = recipes.train("tiny", out=tmp_path)
    assert len(fits) == before + 1 and again["rows"][-1]["first losses"] == card["rows"][-1]["first losses"]


def test_all_weights_tuned_on_a_users_images(tmp_path, monkeypatch, fits):
    """A checkpoint like another, from the base's weights; a user has too few images for a floor."""
    whole = recipes.RECIPES["mnist-dit-bold"] | {
        "net": CARD["net"],
        "steps": 2,
        "scored with": {"classifier": "mnist-classifier", "samples": 20, "draws": 1, "steps": 2},
    }
    monkeypatch.setattr(recipes, "RECIPES", {"tiny": whole})
    card = recipes.train("tiny", out=tmp_path)
    _, before, draw, _, _ = fits[0]
    for name, p in base().named_parameters():
        assert torch.equal(before[name], p)
    x, _ = personal.few("bold", 0, 100)
    assert card["images"] == 100 and (draw(0)["x0"][0] == x).flatten(1).all(1).any()
    assert set(card["scores"]) == {"test loss", "classified as asked", "Fréchet distance"}
    assert checkpoints.load("tiny", tmp_path).card["hand"] == "bold"


# A language model


def test_a_language_model_trains_to_a_checkpoint(tmp_path, monkeypatch, fits):
    """It learns which bytes are common, and its score is the mean of −log₂ p of each byte in pieces of a text it has not read."""
    tiny = recipes.RECIPES["language"] | {"steps": 30, "batch": 4}
    tiny["net"] = {"class": "LanguageModel", "width": 16, "depth": 1, "heads": 2, "length": 16}
    monkeypatch.setattr(recipes, "RECIPES", {"tiny": tiny})
    card = recipes.train("tiny", out=tmp_path)
    model = checkpoints.load("tiny", tmp_path)
    assert isinstance(model, nets.LanguageModel) and card["bytes"] == len(data.text("prose")) and "images" not in card
    _, _, draw, _, done = fits[0]
    assert (
        done.losses[0] == pytest.approx(torch.tensor(256.0).log().item(), abs=0.8)
        and done.losses[-1] < done.losses[0] - 1
    )
    text = bytes(data.text("prose").tolist())
    pieces = [bytes(piece.tolist()) for piece in torch.cat([draw(step)["x"] for step in range(3)])]
    assert len(set(pieces)) == 12 and all(len(piece) == 17 and piece in text for piece in pieces)
    test, nats = data.text("prose", "test"), 0.0
    pieces = test[: len(test) // 17 * 17].view(-1, 17)
    for n in range(1, 17):  # each byte by itself, from those before it
        with torch.no_grad():
            logits = done.ema(pieces[:, :n])[:, -1].double()
        nats -= logits.log_softmax(1)[torch.arange(len(pieces)), pieces[:, n]].sum().item()
    bits = nats / len(pieces) / 16 / torch.tensor(2.0).log().item()
    assert card["scores"]["test bits per byte"] == pytest.approx(bits, abs=1e-3)


@pytest.mark.parametrize("user", hands.HANDS)
def test_the_shipped_files_fit_the_shipped_base(user, monkeypatch):
    """An update of rank 2 for each user: it lowers the base's loss on held-out images to what the table says."""
    monkeypatch.undo()
    d = checkpoints.load("mnist-dit")
    x, y = hands.pages(user, "test")
    chosen = torch.arange(0, len(x), 20)
    batch = training.batches(x[chosen], d.path, size=100, y=y[chosen], drop=0, seed=2)(0)
    with torch.no_grad():
        before = losses.simple(d, **batch).item()
        peft.load_lora(d.net, checkpoints.FOLDER / "users" / user)
        after = losses.simple(d, **batch).item()
    kept = [
        r for r in tables.load("mnist-users")["rows"] if (r["user"], r["kind"], r["seed"]) == (user, "LoRA, r = 2", 0)
    ]
    assert kept[0]["parameters"] == sum(p.numel() for p in peft.trainable(d).values()) == 16_128
    assert after == pytest.approx(kept[0]["test loss"], rel=0.12) and after < 0.97 * before
