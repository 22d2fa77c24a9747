"""What students are trained on: batches on the jumps of a sampler, and losses worked out by hand on the circle."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from dgm_course import checkpoints, distillation, objectives, training
from dgm_course.denoisers import Denoiser
from dgm_course.distilling import distilling
from dgm_course.paths import Cosine

CARD = {"start": "teacher", "batch": 16, "seed": 3, "net": {"num_classes": 10}, "path": {"class": "Cosine"}}
KINDS = {
    "progressive": {"kind": "progressive", "steps": 4},
    "progressive, weights": {"kind": "progressive", "steps": 4, "weights": [0.5, 4.0]},
    "guidance": {"kind": "guidance", "weights": [0.5, 4.0]},
    "consistency": {"kind": "consistency", "steps": 16},
}
all_kinds = pytest.mark.parametrize("kind", KINDS)
on_jumps = pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "guidance"])


class Net(nn.Module):
    """v = a·x + b·label + c·w, told w or not; it notes what it was told."""

    def __init__(self, a, guided):
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.tensor(value)) for value in (a, 0.03, 0.2))
        self.guided, self.told = guided, []

    def forward(self, xt, t, y=None, w=None):
        assert (w is not None) == self.guided
        self.told.append((y, w, torch.is_grad_enabled()))
        y = torch.full((len(xt),), 10) if y is None else y
        return self.a * xt + self.b * column(y) + (self.c * column(w) if self.guided else 0)


def column(values):
    return values[:, None, None, None]


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=tolerance, atol=tolerance)


@pytest.fixture
def teacher(monkeypatch):
    """The checkpoint "teacher", in eval mode as loaded ones are."""
    models = {False: Denoiser(Net(-0.7, False), Cosine(), "v"), True: Denoiser(Net(-0.7, True), Cosine(), "v")}
    now = [False]

    def load(name):
        assert name == "teacher"
        return models[now[0]].requires_grad_(False)

    monkeypatch.setattr(checkpoints, "load", load)
    return lambda guided: now.__setitem__(0, guided) or models[guided]


def images(generator=None):
    g = generator or torch.Generator().manual_seed(0)
    return torch.rand(200, 1, 4, 4, generator=g) * 2 - 1, torch.arange(200) % 10


def set_up(kind, teacher, **changes):
    """The student, its teacher, and the loss and batches of a kind; a teacher is guided in stage two alone."""
    taught, student = (
        teacher(kind == "progressive, weights"),
        Denoiser(Net(0.4, "weights" in KINDS[kind]), Cosine(), "v"),
    )
    how = KINDS[kind] | changes.pop("distils", {})
    return student, taught, *distilling(CARD | {"distils": how} | changes, student, *images())


# Batches --------------------------------------------------------------------------------------------------------------


@all_kinds
def test_a_batch_is_that_of_a_denoiser(kind, teacher):
    """Images and noise are those of `training.batches`; labels are dropped, but for students of guidance, who need them all."""
    *_, draw = set_up(kind, teacher)
    guided = "weights" in KINDS[kind]
    x, y = images()
    plain = training.batches(x, Cosine(), size=16, y=y, null=10, drop=0 if guided else 0.1, seed=3)
    labels = []
    for step in range(30):
        batch, before = draw(step), plain(step)
        expected = {"x0", "t", "eps", "y"} | ({"w"} if guided else set()) | ({"s"} if kind != "guidance" else set())
        assert batch.keys() == expected
        assert all(torch.equal(batch[key], before[key]) for key in ("x0", "eps", "y"))
        if kind == "guidance":
            assert torch.equal(batch["t"], before["t"])
        labels += batch["y"].tolist()
    share = np.mean(np.array(labels) == 10)
    assert share == 0 if guided else 0.05 < share < 0.15


@on_jumps
def test_jumps(kind, teacher):
    """From multiples of 1/N down by 1/N; with weights from every multiple of 1/(2N) up to 1, as the stochastic sampler asks."""
    *_, draw = set_up(kind, teacher)
    jumps = KINDS[kind]["steps"]
    places = 2 * jumps if "weights" in KINDS[kind] else jumps
    counts = dict.fromkeys(range(places // jumps, places + 1), 0)
    for step in range(60):
        batch, before = (
            draw(step),
            training.batches(images()[0], Cosine(), size=16, y=images()[1], null=10, seed=3)(step),
        )
        t, s = batch["t"], batch["s"]
        assert t.dtype == s.dtype == torch.float64 and t.shape == s.shape == (16,)
        close(t - s, torch.full((16,), 1 / jumps), 1e-15)
        for time, drawn in zip(t.tolist(), before["t"].tolist(), strict=True):
            place = round(time * places)
            assert time == pytest.approx(place / places, abs=1e-15) and counts.keys() >= {place}
            counts[place] += 1
            first, last = min(counts), max(counts)
            assert place == first + math.ceil(drawn * (last - first + 1)) - 1  # strata stay in order
    each = 60 * 16 / len(counts)
    assert min(counts.values()) > 0.8 * each and max(counts.values()) < 1.2 * each
    if 16 % len(counts) == 0:  # stratified: as many of each in every batch
        assert set(counts.values()) == {each}


@pytest.mark.parametrize("jumps", [1, 2, 3, 5, 7, 8, 16, 64])
@pytest.mark.parametrize("weights", [{}, {"weights": [0.0, 1.0]}])
def test_jumps_stay_on_the_path(jumps, weights, teacher):
    """For any N: t reaches 1 and no further, s reaches 0 and no further; a student of one step starts at 1 only."""
    card = CARD | {"distils": {"kind": "progressive", "steps": jumps} | weights, "batch": 128}
    _, draw = distilling(card, Denoiser(Net(0.4, bool(weights)), Cosine(), "v"), *images())
    t, s = (torch.cat([draw(step)[key] for step in range(3)]) for key in "ts")
    assert t.max() <= 1 and t.max() == pytest.approx(1, abs=1e-12) and bool((s < t).all())
    assert s.min() == 0 and t.min() == pytest.approx(1 / jumps, abs=1e-12)
    if jumps == 1:
        assert bool((t == 1).all()) and bool((s == 0).all())


@pytest.mark.parametrize("kind", ["guidance", "progressive, weights"])
def test_weights_of_guidance(kind, teacher):
    """Even between the card's two, one for each sample, by seed and step; they have nothing to do with time and label."""
    (*_, draw), (*_, again), (*_, other) = (set_up(kind, teacher, seed=seed) for seed in (3, 3, 4))
    world = torch.random.get_rng_state()
    batches = [draw(step) for step in range(200)]
    for step in (7, 0, 3):
        assert all(torch.equal(again(step)[key], value) for key, value in batches[step].items())
        assert not torch.equal(other(step)["w"], batches[step]["w"])
    assert torch.equal(torch.random.get_rng_state(), world)
    w, t, y = (torch.cat([batch[key] for batch in batches]).double() for key in ("w", "t", "y"))
    assert batches[0]["w"].shape == (16,) and batches[0]["w"].dtype == torch.float32
    assert 0.5 <= w.min() < 0.51 and 3.99 < w.max() <= 4
    counts = torch.histc(w, 7, 0.5, 4.0) / len(w)
    assert (counts - 1 / 7).abs().max() < 0.03
    assert torch.corrcoef(torch.stack([w, t, y]))[0, 1:].abs().max() < 0.06
    assert len(set(w.tolist())) > 3000


def test_without_weights_there_is_none(teacher):
    *_, draw = set_up("progressive", teacher)
    assert "w" not in draw(0)


# Losses ---------------------------------------------------------------------------------------------------------------


def guess(net, x, t, y=None, w=None, cut=True):
    """x̂_0 = αx − σv of a `Net` on the circle, typed; cut to [−1, 1] as it is sampled."""
    angle = math.pi / 2 * column(t.double())
    y = torch.full((len(x),), 10) if y is None else y
    v = net.a.item() * x + net.b.item() * column(y) + (net.c.item() * column(w) if net.guided else 0)
    out = angle.cos() * x - angle.sin() * v
    return out.clamp(-1, 1) if cut else out


def step(x, x0, t, s):
    """A DDIM step on the circle."""
    turn_t, turn_s = (math.pi / 2 * column(time.double()) for time in (t, s))
    return turn_s.cos() * x0 + turn_s.sin() * (x - turn_t.cos() * x0) / turn_t.sin()


def noised(batch):
    angle = math.pi / 2 * column(batch["t"].double())
    return angle.cos() * batch["x0"].double() + angle.sin() * batch["eps"].double()


def typed_target(kind, student, teacher, batch):
    x, t, s, y, w = (noised(batch), *(batch.get(key) for key in ("t", "s", "y", "w")))
    if kind == "guidance":
        with_label, without = guess(teacher.net, x, t, y, cut=False), guess(teacher.net, x, t, cut=False)
        return ((1 + column(w)) * with_label - column(w) * without).clamp(-1, 1)
    if kind == "consistency":
        xs = step(x, guess(teacher.net, x, t, y), t, s)
        return guess(student.net, xs, s, y)
    w, m = (w if teacher.net.guided else None), (t + s) / 2
    xm = step(x, guess(teacher.net, x, t, y, w), t, m)
    xs = step(xm, guess(teacher.net, xm, m, y, w), m, s)
    turn_t, turn_s = (math.pi / 2 * column(time) for time in (t, s))
    ratio = turn_s.sin() / turn_t.sin()
    return (xs - ratio * x) / (turn_s.cos() - ratio * turn_t.cos())


@all_kinds
@pytest.mark.parametrize("number", [0, 1, 5])
def test_loss_by_hand(kind, number, teacher):
    """The mean of max(SNR, 1)·(x̂_0 − target)², the student as it is and the targets of clipped models; with its gradient."""
    student, taught, loss, draw = set_up(kind, teacher)
    batch = draw(number)
    target = typed_target(kind, student, taught, batch)
    said = guess(student.net, noised(batch), batch["t"], batch["y"], batch.get("w"), cut=False)
    snr = (math.pi / 2 * batch["t"].double()).tan() ** -2
    weight = snr.clamp(min=1)
    value = loss(student, **batch)
    assert value.item() == pytest.approx((column(weight) * (said - target) ** 2).mean().item(), rel=2e-4)
    value.backward()
    sigma = (math.pi / 2 * column(batch["t"].double())).sin()
    by_v = -2 * column(weight) * (said - target) * sigma / said.numel()  # the loss by each v
    assert student.net.a.grad.item() == pytest.approx((by_v * noised(batch)).sum().item(), rel=1e-3, abs=1e-5)
    assert student.net.b.grad.item() == pytest.approx((by_v * column(batch["y"])).sum().item(), rel=1e-3, abs=1e-4)
    if student.net.guided:
        assert student.net.c.grad.item() == pytest.approx((by_v * column(batch["w"])).sum().item(), rel=1e-3, abs=1e-5)
    assert (target.abs() == 1).any() or kind == "progressive", "the clip is seen in the test"


@all_kinds
def test_who_is_asked(kind, teacher):
    """The student once with gradients, and once without for consistency; the teacher never with, as often as its steps are."""
    student, taught, loss, draw = set_up(kind, teacher)
    batch = draw(0)
    loss(student, **batch)
    assert [grad for *_, grad in student.net.told].count(True) == 1
    assert len(student.net.told) == (2 if kind == "consistency" else 1)
    assert len(taught.net.told) == (1 if kind == "consistency" else 2) and not any(grad for *_, grad in taught.net.told)
    labels = [y for y, *_ in taught.net.told]
    if kind == "guidance":
        assert sum(y is None for y in labels) == 1
        labels = [y for y in labels if y is not None]
    assert all(torch.equal(y, batch["y"]) for y in labels)
    for y, w, _ in student.net.told:
        assert torch.equal(y, batch["y"]) and (w is None or torch.equal(w, batch["w"]))


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind != "consistency"]
)  # whose target moves with the student
def test_loss_in_training(kind, teacher):
    """Fifty steps of Adam bring the loss down on batches it has not seen; the teacher stays what it was."""
    student, taught, loss, draw = set_up(kind, teacher)
    before = {key: value.clone() for key, value in taught.state_dict().items()}

    def measured():
        with torch.no_grad():
            return np.mean([loss(student, **draw(1000 + step)).item() for step in range(5)])

    start, optimizer = measured(), torch.optim.Adam(student.parameters(), lr=0.05)
    for number in range(50):
        optimizer.zero_grad()
        loss(student, **draw(number)).backward()
        optimizer.step()
    assert measured() < 0.7 * start
    assert all(torch.equal(before[key], value) for key, value in taught.state_dict().items())
    assert not any(p.requires_grad for p in taught.parameters())


def test_a_perfect_student_of_guidance_loses_nothing(teacher):
    """A student that says (1 + w)·cond − w·uncond, of a network whose v is linear in the label: v moves by b·(1 + w)·(y − null)."""
    taught = teacher(False)
    with torch.no_grad():
        taught.net.b.fill_(0.001)
        taught.net.a.fill_(-0.1)
    _, draw = distilling(CARD | {"distils": KINDS["guidance"]}, taught, *images())

    class Told(nn.Module):
        def forward(self, xt, t, y, w):
            return -0.1 * xt + 0.001 * column(10 + (1 + w) * (y - 10))

    loss, _ = distilling(CARD | {"distils": KINDS["guidance"]}, taught, *images())
    batch = draw(0)
    batch["x0"], batch["eps"] = 0.2 * batch["x0"], 0.2 * batch["eps"]  # so that nothing is clipped
    assert loss(Denoiser(Told(), Cosine(), "v"), **batch) < 1e-9


@all_kinds
def test_the_student_needs_no_data(kind, teacher, monkeypatch):
    """Targets come from the teacher alone: with other images behind the same x_t the loss is the same."""
    student, _, loss, draw = set_up(kind, teacher)
    batch = draw(0)
    value = loss(student, **batch)
    angle = math.pi / 2 * column(batch["t"].double())
    shift = 0.3
    moved = batch | {
        "x0": (batch["x0"] + shift * angle.sin()).float(),
        "eps": (batch["eps"] - shift * angle.cos()).float(),
    }
    assert loss(student, **moved).item() == pytest.approx(value.item(), rel=1e-3)


# Card and score -------------------------------------------------------------------------------------------------------


@all_kinds
def test_a_card_that_distils(kind, teacher, monkeypatch):
    """`objective` gives these losses and batches, and scores a student by its own number of steps, at the card's weight."""
    asked = []

    def quality(d, x, y, *, sampler, **settings):
        noise = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(1))
        asked.append((sampler(lambda xt, t: d(xt, t, y=torch.tensor([1, 2, 10])), noise, None), noise, settings))
        return {"beauty": 7.0}

    monkeypatch.setattr(objectives, "quality", quality)
    guided, taught = "weights" in KINDS[kind], teacher(kind == "progressive, weights")
    student = Denoiser(Net(0.4, guided), Cosine(), "v")
    scored = {"classifier": "judge", "samples": 20, "draws": 2, "steps": 3} | ({"w": 1.5} if guided else {})
    card = CARD | {"distils": KINDS[kind], "scored with": scored}
    loss, draw, score = objectives.objective(card, student, *images())
    *_, same = distilling(card, student, *images())
    assert all(torch.equal(draw(2)[key], value) for key, value in same(2).items())
    assert loss(student, **draw(2)).isfinite() and taught.net.told
    student.net.told.clear()
    with torch.no_grad():
        assert score(student, *images()) == {"beauty": 7.0}
    ((drawn, noise, settings),) = asked
    assert settings == {"classifier": "judge", "samples": 20, "draws": 2}
    assert scored["steps"] == 3 and ("w" in scored) == guided  # the card is left as it was
    assert len(student.net.told) == 3
    for _, w, _ in student.net.told:
        assert w is None if not guided else torch.equal(w, torch.full((3,), 1.5))
    x, labels, w = noise.double(), torch.tensor([1, 2, 10]), torch.full((3,), 1.5) if guided else None
    for k in (3, 2, 1):
        t, s = (torch.full((3,), time / 3, dtype=torch.float64) for time in (k, k - 1))
        x = step(x, guess(student.net, x, t, labels, w, cut=False), t, s)
    close(drawn.double(), x, 1e-4)


def test_the_kernels_are_those_of_distillation(teacher, monkeypatch):
    """A student's target is asked of the kernels that are tested by themselves, with m half way in t."""
    seen = []
    monkeypatch.setattr(
        distillation,
        "progressive_target",
        lambda d, path, x, t, m, s: seen.append((path, t, m, s)) or torch.zeros_like(x),
    )
    student, _, loss, draw = set_up("progressive", teacher)
    batch = draw(0)
    loss(student, **batch)
    ((path, t, m, s),) = seen
    assert path is student.path and torch.equal(t, batch["t"]) and torch.equal(s, batch["s"])
    assert torch.equal(m, (t + s) / 2)
