"""Measured samplers: how often they ask, where they end on Gaussian data, and what a row of the table says."""

import math

import numpy as np
import pytest
import torch
from oracles import known, path_of

from dgm_course import checkpoints, measures
from dgm_course.paths import VP, Cosine

MADE = {  # evaluations of a sampler that is asked for an even number n
    "Euler–Maruyama": lambda n: n,
    "ancestral": lambda n: n,
    "predictor–corrector": lambda n: n - 1,
    "corrector–predictor": lambda n: n,
    "Heun": lambda n: n - 1,
}
SETTINGS = [{"name": name, "evaluations": 20} for name in MADE] + [{"name": "dopri5", "tolerance": 1e-1}]
every_setting = pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting["name"])
LEVELS = torch.linspace(-0.9, 0.9, 10)  # the brightness of each class below


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def gaussian(name, mean, std):
    """The denoiser of data N(mean, std²), by the normal equations; it notes when it is asked."""

    def denoise(xt, t):
        denoise.asked.append(float(t))
        alpha, sigma = known(name, float(t))
        return mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (xt - alpha * mean)

    denoise.asked = []
    return denoise


@pytest.mark.parametrize("steps", [1, 2, 5, 100])
def test_grid(steps):
    """`steps` times from 1, the last of them 0.001 if there is more than one, equally spaced; then 0."""
    expected = [1 - (1 - 0.001) * k / max(steps - 1, 1) for k in range(steps)] + [0.0]
    assert measures.grid(steps).dtype == torch.float64
    assert measures.grid(steps).tolist() == pytest.approx(expected, abs=1e-15)


def test_every_sampler_is_counted_here():
    assert MADE.keys() == measures.SAMPLERS.keys()


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("asked", [10, 20, 50])
def test_evaluations(name, asked):
    """As many as asked for, or the odd number below where the last step has one stage; all in [0.001, 1]."""
    d = gaussian("VP", 0.2, 0.5)
    measures.draw({"name": name, "evaluations": asked}, d, VP(), torch.randn(2, 3, generator=seeded(0)), seeded(1))
    assert len(d.asked) == MADE[name](asked)
    assert d.asked[0] == 1 and min(d.asked) == pytest.approx(1e-3) and d.asked == sorted(d.asked, reverse=True)


@every_setting
@pytest.mark.parametrize("name", ["VP", "VE"])
def test_what_is_drawn(setting, name):
    """It starts from noise of deviation σ(1), has the noise's shape and type, and takes all else from the generator."""
    seen, noise = [], torch.randn(4, 1, 2, 2, generator=seeded(0))
    d = gaussian(name, 0.2, 0.5)

    def noted(xt, t):
        seen.append(xt.clone())
        assert not torch.is_grad_enabled()
        return d(xt, t)

    world = torch.random.get_rng_state()
    runs = [measures.draw(setting, noted, path_of(name), noise, seeded(k)) for k in (1, 1, 2)]
    torch.testing.assert_close(seen[0], known(name, 1)[1] * noise)
    assert torch.equal(torch.random.get_rng_state(), world)
    assert runs[0].shape == noise.shape and runs[0].dtype == torch.float32 and not runs[0].requires_grad
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2]) == (setting["name"] in ("Heun", "dopri5"))


def exact_end(name, mean, std, noise):
    """The ODE's exact map for N(mean, std²), from σ(1)·noise at t = 1 to 0.001, and x̂_0 there."""
    (a, s), (a_end, s_end) = known(name, 1), known(name, 1e-3)
    ratio = math.sqrt((a_end**2 * std**2 + s_end**2) / (a**2 * std**2 + s**2))
    return gaussian(name, mean, std)(a_end * mean + ratio * (s * noise - a * mean), 1e-3)


@pytest.mark.parametrize("name", ["VP", "SubVP", "VE"])
def test_dopri5_reaches_the_end_of_the_ode(name):
    """The nearer, the smaller its tolerance, with more evaluations; it never asks outside [0.001, 1]."""
    noise, counts, errors = torch.randn(64, 2, generator=seeded(0)), [], []
    expected = exact_end(name, 0.2, 0.5, noise)
    for tolerance in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5):
        d = gaussian(name, 0.2, 0.5)
        found = measures.draw({"name": "dopri5", "tolerance": tolerance}, d, path_of(name), noise, seeded(1))
        assert min(d.asked) == pytest.approx(1e-3, rel=1e-6) and max(d.asked) <= 1
        counts.append(len(d.asked))
        errors.append((found - expected).abs().max().item())
    assert errors[0] > errors[2] > errors[4] and errors[4] < 1e-3, errors
    assert counts[0] < counts[2] < counts[4] < 300, counts


@pytest.mark.parametrize("std", [1.0, 1.00001, 1.001, 1.1, 3.0])
def test_dopri5_stays_inside(std):
    """Data of about the noise's size hardly move on VP, and an adaptive solver would try a very long first step."""
    d = gaussian("VP", 0.0, std)
    noise = torch.randn(8, 2, generator=seeded(0))
    for tolerance in (1e-1, 1e-3):
        found = measures.draw({"name": "dopri5", "tolerance": tolerance}, d, VP(), noise, seeded(1))
        assert min(d.asked) == pytest.approx(1e-3, rel=1e-6) and max(d.asked) <= 1
        torch.testing.assert_close(found, exact_end("VP", 0.0, std, noise), rtol=0, atol=0.3 * std)


def test_heun_reaches_the_end_of_the_ode():
    """With 199 evaluations, to a percent."""
    noise = torch.randn(64, 2, generator=seeded(0))
    found = measures.draw({"name": "Heun", "evaluations": 200}, gaussian("VP", 0.2, 0.5), VP(), noise, seeded(1))
    torch.testing.assert_close(found, exact_end("VP", 0.2, 0.5, noise), rtol=0, atol=0.01)


@pytest.mark.parametrize("name", ["Euler–Maruyama", "ancestral", "predictor–corrector", "corrector–predictor"])
def test_random_samplers_draw_from_the_data(name):
    """20,000 samples of N(0.2, 0.25) with 200 evaluations: mean and deviation within 3 % of 0.5."""
    noise = torch.randn(20_000, 1, generator=seeded(0))
    found = measures.draw({"name": name, "evaluations": 200}, gaussian("VP", 0.2, 0.5), VP(), noise, seeded(1))
    assert found.mean().item() == pytest.approx(0.2, abs=0.015)
    assert found.std().item() == pytest.approx(0.5, abs=0.015)


# A row of the table ---------------------------------------------------------------------------------------------------


class Levels:
    """In place of a shipped network: for each label an image of one brightness, and a little of x_t. It notes its inputs."""

    path = Cosine()

    def __init__(self):
        self.seen, self.level = [], 0.0

    def __call__(self, xt, t, y=None):
        y = torch.full((len(xt),), 5) if y is None else y
        self.seen.append((xt, t, y))
        return self.level + LEVELS[y].reshape(-1, 1, 1, 1) + 0.05 * xt


class Judge(torch.nn.Module):
    """A classifier by brightness."""

    def features(self, x):
        return x.flatten(1)[:, :4]

    def forward(self, x):
        return -((x.flatten(1).mean(1, keepdim=True) - LEVELS) ** 2)


@pytest.fixture
def network(monkeypatch):
    """The stand-ins, in place of the checkpoints "network" and "judge"."""
    network = Levels()
    monkeypatch.setattr(checkpoints, "load", {"network": network, "judge": Judge()}.__getitem__)
    return network


def card(setting, seed=0):
    return {
        "checkpoint": "network",
        "path": {"class": "VP", "beta_max": 8.0},
        "sampler": setting,
        "seed": seed,
        "scored with": {"classifier": "judge", "samples": 20, "draws": 2},
    }


def images():
    y = torch.arange(10).repeat_interleave(4)
    return LEVELS[y].reshape(-1, 1, 1, 1) + 0.1 * torch.randn(40, 1, 28, 28, generator=seeded(0)), y


@every_setting
def test_a_row(setting, network):
    """Its scores are the classifier's, its evaluations those made for a sample, its 20 brightnesses those of the classes."""
    row = measures.measure(card(setting), *images())
    assert list(row) == ["classified as asked", "Fréchet distance", "evaluations", "first samples"]
    assert row["classified as asked"] == 1 and 0 < row["Fréchet distance"] < 1
    assert row["first samples"] == pytest.approx(LEVELS.repeat_interleave(2).tolist(), abs=0.06)
    assert all(round(value, 4) == value for value in row["first samples"])
    labels = [y for *_, y in network.seen]
    two, of_first = torch.arange(10).repeat_interleave(2), len(network.seen) / 3
    assert all(torch.equal(y, two) for y in labels)
    assert row["evaluations"] == pytest.approx(
        of_first, abs=0.05
    )  # three equal batches: two draws and the first samples
    if setting["name"] in MADE:
        assert row["evaluations"] == MADE[setting["name"]](20)


def test_a_row_is_measured_on_the_cards_path(network):
    """The network of a circle is asked at the times of VP's log-SNRs, with a state of length 1, as it was trained."""
    measures.measure(card({"name": "Euler–Maruyama", "evaluations": 10}), *images())
    times = [t.item() for _, t, _ in network.seen]
    for unit, tau in zip(np.linspace(1, 1e-3, 10), times[:10], strict=True):
        integral = 0.1 * unit + (8.0 - 0.1) * unit**2 / 2  # of β: σ²/α² = e^{integral} − 1
        assert tau == pytest.approx(2 / math.pi * math.atan(math.sqrt(math.expm1(integral))), rel=1e-9)
    assert times[:10] == times[10:20] == times[20:] and len(times) == 30
    xt = network.seen[0][0]
    assert xt.std().item() == pytest.approx(math.sqrt(-math.expm1(-(0.1 + 7.9 / 2))), rel=0.03)


def test_a_row_is_decided_by_its_seed(network):
    """The same row for one seed, another for another; the global generator is left alone."""
    world, setting = torch.random.get_rng_state(), {"name": "ancestral", "evaluations": 10}
    one, same, other = (measures.measure(card(setting, seed), *images()) for seed in (3, 3, 4))
    assert one == same and one["first samples"] != other["first samples"]
    assert one["Fréchet distance"] != other["Fréchet distance"]
    assert torch.equal(torch.random.get_rng_state(), world)


@every_setting
def test_first_samples(setting, network):
    """20 numbers that are the same each time, for two samples of each class; what is brighter than 1 is cut."""
    one, same, other = (measures.first(setting, network, VP(), seed) for seed in (0, 0, 1))
    assert one == same and one != other and len(one) == 20
    assert all(torch.equal(y, torch.arange(10).repeat_interleave(2)) for *_, y in network.seen)
    network.level = 7.0
    assert measures.first(setting, network, VP(), 0) == [1.0] * 20


# Few steps, guidance, learned variances -------------------------------------------------------------------------------

each_fast = pytest.mark.parametrize("name", measures.FAST)


@each_fast
@pytest.mark.parametrize("asked", [4, 10, 20])
@pytest.mark.parametrize("grid, path", [("time", "Cosine"), ("time", "VP"), ("log-SNR", "Cosine")])
def test_fast_samplers_make_no_more_evaluations_than_asked(name, asked, grid, path):
    """All of them from a start without signal; elsewhere Heun and 2S make the odd number below."""
    d, noise = gaussian(path, 0.2, 0.5), torch.randn(2, 3, generator=seeded(0))
    measures.draw({"name": name, "grid": grid, "evaluations": asked}, d, path_of(path), noise, seeded(1))
    two_a_step = name in ("Heun", "DPM-Solver++(2S)")
    assert len(d.asked) == asked - (two_a_step and (grid, path) != ("time", "Cosine"))
    assert d.asked[0] == (1 if grid == "time" else 0.99)


@pytest.mark.parametrize(
    "name", [name for name in measures.FAST if name != "consistency"]
)  # which is for students alone
@pytest.mark.parametrize("grid", ["time", "log-SNR"])
def test_fast_samplers_draw_from_the_data(name, grid):
    """20,000 samples of N(0.2, 0.25) with 200 evaluations: mean and deviation within 4 % of 0.5."""
    noise, setting = torch.randn(20_000, 1, generator=seeded(0)), {"name": name, "grid": grid, "evaluations": 200}
    found = measures.draw(setting, gaussian("Cosine", 0.2, 0.5), Cosine(), noise, seeded(1))
    assert found.mean().item() == pytest.approx(0.2, abs=0.02) and found.std().item() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("t", [0.2, 0.25, 0.5, 0.75, 0.8])
def test_guided_denoisers(t, monkeypatch):
    """Each kind against its formula; the classifier's gradient is that of a linear one, by hand."""
    weights, y = torch.randn(3, 10, generator=seeded(2)), torch.tensor([3, 7])
    monkeypatch.setattr(checkpoints, "load", {"judge": lambda xt, unit: unit[:, None] * (xt @ weights)}.__getitem__)
    x = torch.randn(2, 3, generator=seeded(3))

    def network(xt, time, y=None):
        return 0.3 * xt if y is None else 0.5 * xt + y[:, None]

    def found(name):
        settings = {"guidance": {"name": name, "scale": 4.0}, "classifier": "judge"}
        return measures.guided(settings, network, Cosine(), y)(x, t)

    without, with_label = 0.3 * x, 0.5 * x + y[:, None]
    strong = without + 4 * (with_label - without)
    torch.testing.assert_close(found("classifier-free"), strong)
    torch.testing.assert_close(found("interval"), strong if 0.25 <= t <= 0.75 else with_label)
    alpha, sigma = known("Cosine", t)
    slope = t * (weights[:, y].T - (t * x @ weights).softmax(1) @ weights.T)
    torch.testing.assert_close(found("classifier"), without + 4 * sigma**2 / alpha * slope, rtol=1e-4, atol=1e-4)


def test_a_row_of_guidance(network):
    """Precision and recall are told; a guided step counts two evaluations, and a plain one counts one."""
    sampler = {"name": "DDIM", "grid": "time", "evaluations": 6}
    for scale, made in ((1.0, 6), (1.1, 12)):
        asked = card(sampler) | {"path": {"class": "Cosine"}, "guidance": {"name": "classifier-free", "scale": scale}}
        row = measures.measure(asked, *images())
        assert list(row) == ["classified as asked", "Fréchet distance", "precision", "recall", "evaluations"]
        assert row["evaluations"] == made and row["classified as asked"] >= 0.8
        assert 0 <= row["precision"] <= 1 and 0 <= row["recall"] <= 1


@pytest.mark.parametrize("variance", ["beta", "posterior", "learned"])
def test_a_row_of_variances(variance, network):
    """The network is asked for its fraction if, and only if, the variance is learned; the bits are those of so many steps."""
    told = []
    network.with_variance = lambda xt, t, y: told.append(t) or (network(xt, t, y), torch.full_like(xt, 0.5))
    asked = card({}) | {"path": {"class": "Cosine"}, "variance": variance, "steps": 4, "images for bits": 10}
    row = measures.measure(asked, *images())
    assert list(row) == ["classified as asked", "Fréchet distance", "bits per dimension"]
    times = {round(float(t), 6) for _, t, _ in network.seen}
    assert times == {0.25, 0.5, 0.75, 1.0} and bool(told) == (variance == "learned")
    assert row["classified as asked"] == 1 and row["bits per dimension"] > 0


# Students -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("evaluations", [1, 2, 3, 7, 15, 16])
def test_grid_of_the_stochastic_sampler(evaluations):
    """Every multiple of 1/(n + 1) from 1 down to two of them, then 0: a student for jumps of two, asked at every one."""
    times = measures.fast_times({"name": "stochastic", "grid": "time", "evaluations": evaluations}, Cosine())
    expected = [k / (evaluations + 1) for k in range(evaluations + 1, 1, -1)] + [0.0]
    assert times.dtype == torch.float64 and times.tolist() == pytest.approx(expected, abs=1e-15)
    assert len(times) == evaluations + 1


@pytest.mark.parametrize("name", ["DDIM", "consistency"])
def test_grid_of_students(name):
    """Equal steps of t, as many as evaluations."""
    times = measures.fast_times({"name": name, "grid": "time", "evaluations": 4}, Cosine())
    assert times.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]


def exact_jump(mean, std, length):
    """The x̂_0 with which DDIM goes from t to t − length, or to 0, along the exact ODE of data N(mean, std²) on the circle."""

    def student(xt, t):
        student.asked.append(t)
        low = max(t - length, 0.0)
        (a, s), (a_low, s_low) = known("Cosine", t), known("Cosine", low)
        ratio = math.sqrt((a_low**2 * std**2 + s_low**2) / (a**2 * std**2 + s**2))
        end = a_low * mean + ratio * (xt - a * mean)
        return (s * end - s_low * xt) / (s * a_low - s_low * a)

    student.asked = []
    return student


@pytest.mark.parametrize("name, evaluations, length", [
    ("DDIM", 4, 1 / 4), ("DDIM", 1, 1.0), ("stochastic", 7, 1 / 4), ("stochastic", 3, 1 / 2), ("stochastic", 1, 1.0),
    ("consistency", 1, 1.0), ("consistency", 4, 1.0),
])  # fmt: skip
def test_students_draw_from_the_data(name, evaluations, length):
    """Exact students of the jumps that a sampler makes, 1/N for `DDIM` and 2N − 1 evaluations of "stochastic", to 0 for "consistency"."""
    noise, student = torch.randn(20_000, 1, generator=seeded(0)), exact_jump(0.2, 0.5, length)
    found = measures.draw(
        {"name": name, "grid": "time", "evaluations": evaluations}, student, Cosine(), noise, seeded(1)
    )
    assert len(student.asked) == evaluations and student.asked[0] == 1
    assert found.mean().item() == pytest.approx(0.2, abs=0.015) and found.std().item() == pytest.approx(0.5, abs=0.015)
    again, other = (
        measures.draw({"name": name, "grid": "time", "evaluations": evaluations}, student, Cosine(), noise, seeded(k))
        for k in (1, 2)
    )
    assert torch.equal(found, again) and torch.equal(found, other) == (name == "DDIM" or evaluations == 1)
    far = measures.draw(
        {"name": name, "grid": "time", "evaluations": evaluations}, student, Cosine(), 0 * noise, seeded(1)
    )
    spread = far.std().item()  # what the noise on the way alone makes of one start
    if name == "consistency" and evaluations > 1:
        assert spread == pytest.approx(0.5, abs=0.06)
    else:
        assert (spread < 1e-6) == (name == "DDIM" or evaluations == 1) and spread < 0.5


class Student(Levels):
    """In place of a student: it is brighter by a fifth of its weight, if it is told one."""

    def __init__(self, weights):
        super().__init__()
        self.card, self.told = {"distils": {"kind": "guidance"} | ({"weights": [0, 4]} if weights else {})}, []

    def __call__(self, xt, t, y=None, w=None):
        self.told.append(w)
        out = super().__call__(xt, t, y)
        return out if w is None else out + 0.02 * w.reshape(-1, 1, 1, 1)


@pytest.fixture
def students(network, monkeypatch):
    """The teacher "network", and two students of it."""
    network.card = {}
    made = {"network": network, "judge": Judge(), "student": Student(False), "guided": Student(True)}
    monkeypatch.setattr(checkpoints, "load", made.__getitem__)
    return made


def row_of(setting, **changes):
    asked = card(setting, seed=1) | {"path": {"class": "Cosine"}} | changes
    return measures.measure(asked, *images())


@pytest.mark.parametrize("name", ["DDIM", "stochastic", "consistency"])
def test_a_row_may_name_a_student(name, students):
    """Its own checkpoint is asked, and not the card's; without one, the card's."""
    setting = {"name": name, "grid": "time", "evaluations": 4}
    row = row_of(setting | {"checkpoint": "student"})
    assert not students["network"].seen and len(students["student"].seen) == 12
    assert row["evaluations"] == 4 and len(row["first samples"]) == 20
    assert all(w is None for w in students["student"].told)
    assert row_of(setting) == row and len(students["network"].seen) == 12  # the two stand-ins say the same


@pytest.mark.parametrize("w", [0.0, 0.5, 1.0, 4.0])
def test_a_row_with_a_weight(w, students):
    """A student is told it, once a step; another is guided with the scale 1 + w, twice a step, but once at w = 0. No first samples."""
    setting = {"name": "DDIM", "grid": "time", "evaluations": 3}
    scored = {"classifier": "judge", "samples": 20, "draws": 2, "spread": True}
    row = row_of(setting | {"checkpoint": "guided"}, w=w, **{"scored with": scored})
    assert list(row) == ["classified as asked", "Fréchet distance", "precision", "recall", "evaluations"]
    assert row["evaluations"] == 3 and not students["network"].seen
    told = students["guided"].told
    assert len(told) == 6 and all(torch.equal(one, torch.full((20,), w)) for one in told)
    plain = row_of(setting, w=w, **{"scored with": scored})
    assert plain["evaluations"] == (3 if w == 0 else 6)
    students["network"].seen.clear()
    unknowing = row_of(setting | {"checkpoint": "student"}, w=w, **{"scored with": scored})
    assert unknowing["evaluations"] == plain["evaluations"] and not students["network"].seen
    assert all(one is None for one in students["student"].told)


@pytest.mark.parametrize("w", [0.0, 0.5, 2.0])
def test_the_weight_of_a_row_is_the_papers(w, students):
    """(1 + w)·cond − w·uncond: here the teacher's guess is brighter than that of no label, 5, by a known step of its class."""
    x, y = torch.zeros(2, 1, 1, 1), torch.tensor([1, 9])
    asked = students["network"]
    found = measures._weighted(asked, asked, w)(x, 0.5, y)
    expected = (1 + w) * LEVELS[y] - w * LEVELS[5]
    torch.testing.assert_close(found.flatten(), expected)
    told = measures._weighted(students["guided"], students["guided"], w)(x, 0.5, y)
    torch.testing.assert_close(told.flatten(), LEVELS[y] + 0.02 * w)
