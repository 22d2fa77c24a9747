"""What each kind of model is trained on and scored by: on few small images, against values worked out by hand."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy.stats import norm
from torch import nn
from torch.distributions import Normal, kl_divergence

from dgm_course import checkpoints, data, flows, gan, losses, objectives, vae
from dgm_course.denoisers import Denoiser
from dgm_course.paths import Cosine

SCORED = {"classifier": "judge", "samples": 50, "draws": 2}
CARD = {"batch": 16, "seed": 3, "net": {"num_classes": 10}}


def close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=tolerance, atol=tolerance)


CARDS = {  # what the cards of these kinds say besides
    "denoiser with a variance": {"chain": 8},
    "noisy classifier": {"path": {"class": "Cosine"}},
}


class Judge(nn.Module):
    """Stands in for every classifier; its features are five sums over fixed parts of the image."""

    def features(self, x):
        return x.flatten(1) @ torch.cos(torch.outer(torch.arange(64.0), torch.arange(1.0, 6.0)))


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    """No shipped checkpoint is read; returns the names that were asked for."""
    names = []
    monkeypatch.setattr(checkpoints, "load", lambda name: names.append(name) or Judge())
    return names


@pytest.fixture
def images(generator):
    """500 images (1, 8, 8) in 256 grey levels, 50 of each class: a bright row where the class says, and noise."""
    y = torch.arange(500) % 10
    level = torch.randint(0, 120, (500, 1, 8, 8), generator=generator)
    level[torch.arange(500), 0, y % 8] += 100
    return level / 255 * 2 - 1, y


class Still(nn.Module):
    """A tiny network for a denoiser: one convolution, a time and perhaps a label."""

    def __init__(self, labels=True):
        super().__init__()
        self.mix, self.label = nn.Conv2d(1, 1, 3, padding=1), nn.Embedding(11, 1) if labels else None

    def forward(self, xt, t, y=None):
        out = self.mix(xt) + t.reshape(-1, 1, 1, 1)
        return out + self.label(y)[:, :, None, None] if self.label else out


class Timed(nn.Module):
    """A linear classifier of 8×8 pixels, moved by the time."""

    def __init__(self):
        super().__init__()
        self.map, self.late = nn.Linear(64, 10), nn.Parameter(torch.randn(10))

    def forward(self, x, t):
        return self.map(x.flatten(1)) + t[:, None] * self.late


class Twice(nn.Module):
    """What `Still` says, and as much again for the variance."""

    def __init__(self):
        super().__init__()
        self.one, self.other = Still(), Still()

    def forward(self, xt, t, y=None):
        return torch.cat([self.one(xt, t, y), self.other(xt, t, y)], 1)


def model_of(kind):
    """A model of each kind, for images of 8×8, as small as can be."""
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(4, 64), nn.Unflatten(1, (1, 8, 8)))
    return {
        "flow": lambda: flows.RealNVP(side=8, widths=(8, 8), blocks=1, couplings=(2, 2, 2)),
        "VAE": lambda: vae.VAE(nn.Sequential(nn.Flatten(), nn.Linear(64, 8)), decoder, 4),
        "GAN": lambda: gan.GAN(decoder, nn.Sequential(nn.Flatten(), nn.Linear(64, 1)), 4),
        "denoiser": lambda: Denoiser(Still(), Cosine(), predicts="v"),
        "denoiser without labels": lambda: Denoiser(Still(labels=False), Cosine(), predicts="v"),
        "denoiser with a variance": lambda: Denoiser(Twice(), Cosine(), predicts="v", learned_variance=True),
        "noisy classifier": Timed,
        "classifier": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)),
    }[kind]()


REALISM = {"Fréchet distance", "precision", "recall", "seconds for 1000 samples"}
KEYS = {
    "flow": {"test bits per pixel"} | REALISM,
    "VAE": {"ELBO in nats", "KL in nats", "latents in use", "error of reconstruction"} | REALISM,
    "GAN": REALISM,
    "denoiser": {"test loss"},
    "denoiser without labels": {"test loss"} | REALISM,
    "denoiser with a variance": {"bits per dimension"},
    "noisy classifier": {"accuracy at t = 0.25", "accuracy at t = 0.5", "accuracy at t = 0.75"},
    "classifier": {"accuracy on the test set"},
}
GENERATIVE = ("flow", "VAE", "GAN", "denoiser without labels")


def set_up(kind, images, **changes):
    """The model and its loss, batches and score."""
    model = model_of(kind)
    card = CARD | CARDS.get(kind, {}) | ({"scored with": SCORED} if kind in GENERATIVE else {}) | changes
    if kind == "denoiser without labels":
        card["net"] = {"num_classes": 0}
    return model, *objectives.objective(card, model, *images)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


# All of them --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KEYS)
def test_a_batch_is_a_function_of_seed_and_step(kind, images):
    """In any order and whatever else is drawn, a step has its batch; other steps and other seeds have others."""
    _, _, draw, _ = set_up(kind, images)
    _, _, again, _ = set_up(kind, images)
    _, _, other, _ = set_up(kind, images, seed=4)
    forward = [draw(step) for step in range(20)]
    torch.manual_seed(7)
    state = torch.get_rng_state()
    for step in reversed(range(20)):
        assert same(draw(step), forward[step]) and same(again(step), forward[step])
        assert not same(other(step), forward[step])
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(same(forward[i], forward[j]) for i in range(20) for j in range(i))
    assert all(len(value) == 16 for batch in forward for value in batch.values())


@pytest.mark.parametrize("kind", KEYS)
def test_loss_and_score(kind, images, asked):
    """The loss is one finite number with a gradient for each parameter; the score has what its card promises, as numbers."""
    model, loss, draw, score = set_up(kind, images)
    value = loss(model, **draw(0))
    value.backward()
    assert value.shape == () and value.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    scores = score(model.eval(), *images)
    assert scores.keys() == KEYS[kind] and all(math.isfinite(number) for number in scores.values())
    assert asked == (["judge"] if kind in GENERATIVE else [])
    again = score(model, *images)  # all that is random comes from generators of its own
    assert all(again[key] == scores[key] for key in scores if "seconds" not in key)


@pytest.mark.parametrize("kind, drop", [("flow", 0.1), ("VAE", 0.3)])
def test_training_lowers_the_loss(kind, drop, images):
    """30 steps of Adam, and the loss on batches that were not trained on is lower by more than its noise."""
    model, loss, draw, _ = set_up(kind, images)

    def measured():
        with torch.no_grad():
            return np.mean([loss(model, **draw(1000 + step)).item() for step in range(5)])

    before, optimizer = measured(), torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(30):
        optimizer.zero_grad()
        loss(model, **draw(step)).backward()
        optimizer.step()
    assert measured() < before - drop


# Flow ---------------------------------------------------------------------------------------------------------------


class Known(flows.Transform):
    """Every pixel y = F(z) by itself, with F the normal distribution function: y is uniform, and its density 1."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, z):
        return torch.special.ndtr(z), self._slope(z)

    def inverse(self, x):
        z = torch.special.ndtri(x)
        return z, -self._slope(z)

    def _slope(self, z):
        return Normal(0.0, 1.0).log_prob(z).flatten(1).sum(1)


def test_an_even_guess_costs_8_bits(images):
    """A uniform density gives each of 256 grey levels the same probability."""
    x, y = images
    x = x.clamp(-0.99, 0.99)
    x = ((x + 1) / 2 * 255).round() / 255 * 2 - 1
    flow = flows.Flow(Known(), (1, 8, 8))
    loss, draw, score = objectives.objective(CARD | {"scored with": SCORED}, flow, x, y)
    assert loss(flow, **draw(0)).item() == pytest.approx(8, abs=1e-4)
    assert score(flow, x, y)["test bits per pixel"] == pytest.approx(8, abs=2e-4)


def test_bits_of_a_known_density(images):
    """y = logistic-normal by pixel: the mean of −log₂ p over the noise in each grey level, by a sum over 200 places in it."""
    x, y = images
    margin = 0.05
    flow = flows.Flow(flows.Composed(flows.ActNorm(1), flows.Logit(margin)), (1, 8, 8))
    loss, draw, score = objectives.objective(CARD | {"scored with": SCORED}, flow, x, y)
    first = draw(-1)["y"]
    z = torch.logit(margin + (1 - 2 * margin) * first)  # the flow was set by this batch
    mean, std = z.mean().item(), z.std().item()
    level = ((x + 1) / 2 * 255).round().numpy()[..., None]
    u = (np.arange(200) + 0.5) / 200
    s = margin + (1 - 2 * margin) * (level + u) / 256
    log_p = norm.logpdf(np.log(s / (1 - s)), mean, std) - np.log(s * (1 - s)) + math.log(1 - 2 * margin)
    bits = 8 - log_p / math.log(2)  # p of a grey level is about p(y)/256
    expected, error = bits.mean(), bits.std(-1).mean() / math.sqrt(x.numel())
    assert 5 < expected < 8 and 5 * error < 0.01
    assert score(flow, x, y)["test bits per pixel"] == pytest.approx(expected, abs=5 * error + 6e-5)
    batch = draw(2)["y"]
    s = (margin + (1 - 2 * margin) * batch).double().numpy()
    log_p = norm.logpdf(np.log(s / (1 - s)), mean, std) - np.log(s * (1 - s)) + math.log(1 - 2 * margin)
    assert loss(flow, batch).item() == pytest.approx(8 - log_p.mean() / math.log(2), abs=1e-4)


def test_a_flow_learns_from_grey_levels_with_noise(images):
    """What it is shown, cut to grey levels, are images of the set; the noise in them is uniform; it is set by a first batch."""
    model, _, draw, _ = set_up("flow", images)
    stored = {((x + 1) / 2 * 255).round().to(torch.uint8).numpy().tobytes() for x in images[0]}
    shown = torch.cat([draw(step)["y"] for step in range(20)])
    levels = (256 * shown).floor()
    assert all(image.to(torch.uint8).numpy().tobytes() in stored for image in levels)
    noise = 256 * shown - levels
    assert 0 <= noise.min() and noise.max() < 1 and abs(noise.mean() - 0.5) < 0.01 and abs(noise.var() - 1 / 12) < 0.003
    z = model.transform.inverse(draw(-1)["y"])[0]
    assert abs(z.mean()) < 1e-3 and abs(z.std() - 1) < 0.01


# VAE ----------------------------------------------------------------------------------------------------------------


def test_beta_of_the_card(images):
    """Each β more adds the KL for each pixel once more, by torch.distributions; without one β is 1, and σ is learned."""
    model, loss, draw, _ = set_up("VAE", images)
    held, four, _, _ = set_up("VAE", images, beta=4.0)
    assert model.log_var.requires_grad and not held.log_var.requires_grad
    batch = draw(0)
    assert batch.keys() == {"x", "eps"}
    mean, log_var = model.encode(batch["x"])
    kl = kl_divergence(Normal(mean, (log_var / 2).exp()), Normal(0.0, 1.0)).sum(1).mean()
    close(four(model, **batch) - loss(model, **batch), 3 * kl / 64, 1e-5)
    image = model.decode(mean + (log_var / 2).exp() * batch["eps"])
    likelihood = Normal(image, (model.log_var / 2).exp()).log_prob(batch["x"]).flatten(1).sum(1).mean()
    close(loss(model, **batch), (kl - likelihood) / 64, 1e-5)


def test_scores_of_a_linear_vae(images):
    """KL, error and the number of latents in use by hand; the ELBO in closed form, within 5 standard errors of one draw."""
    model, _, _, score = set_up("VAE", images)
    x = images[0]
    with torch.no_grad():
        for rows in (model.encoder[1].weight, model.encoder[1].bias):
            rows[[1, 5]] = 0  # the second latent says nothing: its q is the prior
        scores = score(model, *images)
        mean, log_var = model.encode(x)
        kl = kl_divergence(Normal(mean, (log_var / 2).exp()), Normal(0.0, 1.0)).double()
        missed = (x - model.decode(mean)).flatten(1)
        spread = (model.decoder[0].weight.square() @ log_var.exp().T).sum(0)
        fit = -(missed.square().sum(1) + spread) / 2 - 32 * math.log(2 * math.pi)  # σ² = 1
        noise = (spread.mean() + missed.square().sum(1).mean()).sqrt().item()
    assert scores["KL in nats"] == pytest.approx(kl.sum(1).mean().item(), abs=0.006)
    assert scores["latents in use"] == int((kl.mean(0) > 0.01).sum()) <= 3
    assert scores["error of reconstruction"] == pytest.approx(missed.square().mean().sqrt().item(), abs=6e-5)
    exact = (fit - kl.sum(1)).mean().item()
    assert scores["ELBO in nats"] == pytest.approx(exact, abs=5 * noise / math.sqrt(500) + 0.06)


# GAN ----------------------------------------------------------------------------------------------------------------


def test_penalty_of_the_card(images):
    """γ/2 of the squared slope is added, ‖w‖² for a linear discriminator; without one nothing is."""
    model, loss, draw, _ = set_up("GAN", images)
    _, steep, _, _ = set_up("GAN", images, penalty=3.0)
    batch = draw(0)
    assert batch.keys() == {"x", "z"} and batch["z"].shape == (16, 4)
    squared = model.discriminator[1].weight.square().sum()
    close(steep(model, **batch) - loss(model, **batch), 1.5 * squared, 1e-5)
    real, fake = model.discriminator(batch["x"]), model.discriminator(model.generator(batch["z"]))
    judged = nn.functional.binary_cross_entropy_with_logits(
        torch.cat([real, fake]), torch.tensor([1.0, 0.0]).repeat_interleave(16)[:, None]
    )
    close(loss(model, **batch), 2 * judged - fake.sigmoid().log().mean(), 1e-5)


# Denoiser and classifier --------------------------------------------------------------------------------------------


def test_accuracy_by_hand(images):
    """One that reads the class off the bright row is right for 8 of 10 classes, and for the last 2 never."""
    x, y = images
    model, _, _, score = set_up("classifier", images)
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.copy_(torch.tensor([0.0] * 8 + [-1e6] * 2))
        for c in range(8):
            model[1].weight[c, 8 * c : 8 * c + 8] = 1.0
    right = np.mean([int(image[0].sum(1).argmax()) == int(label) for image, label in zip(x, y, strict=True)])
    assert 0.7 < right <= 0.8 and score(model.eval(), x, y) == {"accuracy on the test set": round(right, 4)}


def test_loss_of_a_denoiser_that_says_nothing(images):
    """It predicts v = 0, so the squared error is E[v²] = E[α²]·1 + E[σ²]·E[x₀²], with α² and σ² one half on average."""
    model, _, _, score = set_up("denoiser", images)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    model.net.forward = lambda xt, t, y=None: 0 * xt
    expected = 0.5 + 0.5 * images[0].square().mean().item()
    assert score(model.eval(), *images)["test loss"] == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("size", [4, 16])
def test_images_of_another_size(size, images, monkeypatch):
    """Batches and the test loss are of resized images, in which their means are kept; so is what the samples are scored by."""
    seen = []
    monkeypatch.setattr(objectives, "quality", lambda model, x, y, **settings: seen.append(x) or {})
    model, loss, draw, score = set_up("denoiser", images, size=size, **{"scored with": {"steps": 7}})
    _, _, plain, _ = set_up("denoiser", images)
    batch, before = draw(3), plain(3)
    whole, told = before["x0"], (batch["y"] < 10) & (before["y"] < 10)  # which labels are dropped may differ
    assert batch["x0"].shape == batch["eps"].shape == (16, 1, size, size)
    assert torch.equal(batch["t"], before["t"]) and torch.equal(batch["y"][told], before["y"][told]) and told.any()
    if size == 4:
        close(batch["x0"][:, 0], whole.reshape(16, 4, 2, 4, 2).mean((2, 4)), 1e-5)
    else:  # new pixels lie in fours between the centres of four old ones, with their mean
        close(batch["x0"][..., 1:-1, 1:-1].reshape(16, 7, 2, 7, 2).mean((2, 4)), between(whole), 1e-5)
    assert loss(model, **batch).isfinite() and math.isfinite(score(model.eval(), *images)["test loss"])
    assert seen[0].shape == (500, 1, size, size) and images[0].shape == (500, 1, 8, 8)


def between(x):
    """Means of all squares of 2×2 pixels, overlapping."""
    return (x[:, 0, :-1, :-1] + x[:, 0, 1:, :-1] + x[:, 0, :-1, 1:] + x[:, 0, 1:, 1:]) / 4


def test_a_denoiser_can_be_scored_by_its_samples(images, monkeypatch):
    """Only if the card says with what."""
    monkeypatch.setattr(objectives, "quality", lambda model, x, y, **settings: {"beauty": settings["steps"]})
    _, _, _, score = set_up("denoiser", images, **{"scored with": {"steps": 7}})
    model = model_of("denoiser").eval()
    assert score(model, *images).keys() == {"test loss", "beauty"} and score(model, *images)["beauty"] == 7


def test_samples_of_a_denoiser_without_labels():
    """One that always says the same image draws that image, cut to [−1, 1]; 25 steps for each part of at most 250."""
    asked, image = [], torch.linspace(-3, 3, 64).reshape(1, 1, 8, 8)

    class Says(nn.Module):
        path = Cosine()

        def forward(self, xt, t, y=None):
            asked.append((len(xt), float(t)))
            return image.expand(xt.shape)

    drawn = objectives._ddim(Says(), (300, 1, 8, 8), torch.Generator().manual_seed(0))
    close(drawn, image.clamp(-1, 1).expand(300, 1, 8, 8), 1e-5)
    assert [size for size, _ in asked] == [250] * 25 + [50] * 25
    times = [t for _, t in asked]
    assert times[:25] == times[25:] == sorted(times[:25], reverse=True) and times[0] == 1


# A learned variance -------------------------------------------------------------------------------------------------


def test_steps_of_a_chain(images):
    """Images, noise and labels are those of a denoiser's batch; the time is rounded up to the end of its step, of 8 equal ones."""
    _, loss, draw, _ = set_up("denoiser with a variance", images)
    _, _, plain, _ = set_up("denoiser", images)
    assert loss is losses.hybrid
    ends = []
    for step in range(30):
        batch, before = draw(step), plain(step)
        assert batch.keys() == {"x0", "s", "t", "eps", "y"} and all(
            torch.equal(batch[key], before[key]) for key in ("x0", "eps", "y")
        )
        s, t = batch["s"], batch["t"]
        assert (
            s.dtype == t.dtype == torch.float64
            and torch.equal((8 * s).round() + 1, 8 * t)
            and torch.equal(8 * t, (8 * t).round())
        )
        assert bool(((s < before["t"]) & (before["t"] <= t)).all())
        ends += (8 * t).tolist()
    assert set(ends) == set(range(1, 9)) and bool(
        (torch.tensor(ends).long().bincount()[1:] == 60).all()
    )  # stratified, 2 of 16 each


SAID = {"the middle": (0.0, 0.0), "β": (0.2, 1.0), "β̃, clipped": (-1.5, -1.0), "beyond": (0.5, 1.6)}


def bits_by_hand(x, guess, share, steps):
    """The bound of a model that says x̂_0 = guess and v = share everywhere: Gaussians' divergences and a bin's mass, with numpy."""
    x, nats = x.double().numpy(), 0.0
    for k in range(steps, 0, -1):
        (a_s, s_s), (a_t, s_t) = (
            (math.cos(math.pi / 2 * u / steps), math.sin(math.pi / 2 * u / steps)) for u in (k - 1, k)
        )
        beta = s_t**2 - (a_t / a_s) ** 2 * s_s**2
        if k == 1:
            std, half = math.sqrt(beta), 1 / 255
            above = np.where(x > 1 - half, np.inf, (x + half - guess) / std)
            below = np.where(x < -1 + half, -np.inf, (x - half - guess) / std)
            nats = nats - np.log(
                np.where(below > 0, norm.sf(below) - norm.sf(above), norm.cdf(above) - norm.cdf(below))
            )
            continue
        tilde = beta * s_s**2 / s_t**2
        var = beta**share * tilde ** (1 - share)
        gap = a_s * beta / s_t**2 * (x - guess)
        nats = nats + 0.5 * (gap**2 / var + tilde / var - 1 - math.log(tilde / var))
    return nats.mean() / math.log(2)  # pure noise at t = 1 costs nothing


@pytest.mark.parametrize("said", SAID)
def test_bits_of_a_known_model(said, images):
    """Whatever the noise, a model that always says the same costs what is worked out by hand; on labelled images, its x̂_0 clipped."""
    (guess, raw), asked, (x, y) = SAID[said], [], images

    def net(xt, t, y):
        asked.append(y)
        return torch.cat([torch.full_like(xt, guess), torch.full_like(xt, raw)], 1)

    d = Denoiser(net, Cosine(), "x0", learned_variance=True)
    x, y = x[:40], y[:40]
    for name, share in (("learned", (raw + 1) / 2), ("beta", 1.0), ("posterior", 0.0)):
        found = objectives.bits(d, x, y, Cosine().times(8), name, seed=3)
        assert found == pytest.approx(bits_by_hand(x, max(guess, -1.0), share, 8), rel=1e-4)
    assert len(asked) == 24 and all(labels is y for labels in asked)


def test_bits_depend_on_the_seed_alone(images):
    """The noise is drawn from the seed: the same bits for the same seed, other ones for another."""
    model, (x, y) = model_of("denoiser with a variance").eval(), images
    with torch.no_grad():
        one, again, other = (
            objectives.bits(model, x[:50], y[:50], Cosine().times(4), "learned", seed=s) for s in (0, 0, 1)
        )
    assert one == again != other


def test_score_of_a_learned_variance(images):
    """200 of the test images, 20 of each class, on the chain of the card, with the variance that is learned."""
    model, _, _, score = set_up("denoiser with a variance", images)
    model.net.forward = lambda xt, t, y=None: torch.cat([0 * xt, 0 * xt + 0.4], 1)
    model.predicts = "x0"
    x, _ = data.balanced(*images, 200, torch.Generator().manual_seed(0))
    assert score(model.eval(), *images) == {"bits per dimension": pytest.approx(bits_by_hand(x, 0.0, 0.7, 8), abs=2e-4)}


# A classifier of noisy images ---------------------------------------------------------------------------------------


def test_loss_of_a_noisy_classifier(images):
    """−log p(y | x_t) in the mean, at times spread over the path, with all labels; it is told the time."""
    model, loss, draw, _ = set_up("noisy classifier", images)
    told = []
    for step in range(20):
        batch = draw(step)
        assert batch.keys() == {"x0", "t", "eps", "y"} and bool((batch["y"] < 10).all())
        angle = math.pi / 2 * batch["t"][:, None]
        xt = angle.cos() * batch["x0"].flatten(1) + angle.sin() * batch["eps"].flatten(1)
        logits = xt @ model.map.weight.T + model.map.bias + batch["t"][:, None] * model.late
        expected = logits.logsumexp(1) - logits[torch.arange(16), batch["y"]]
        close(loss(model, **batch), expected.mean(), 1e-5)
        told += batch["t"].tolist()
    counts, _ = np.histogram(told, bins=16, range=(0, 1))
    assert (counts == 20).all()


def test_score_of_a_noisy_classifier(images):
    """The share that it gets right at t = ¼, ½ and ¾, of all test images with noise of one generator, in this order."""
    model, _, _, score = set_up("noisy classifier", images)
    seen, forward = [], model.forward
    model.forward = lambda x, t: seen.append((x, t)) or forward(x, t)
    found, (x, y) = score(model.eval(), *images), images
    g, shares = torch.Generator().manual_seed(0), {}
    for t, (xt, told) in zip((0.25, 0.5, 0.75), seen, strict=True):
        close(xt, math.cos(math.pi / 2 * t) * x + math.sin(math.pi / 2 * t) * torch.randn(x.shape, generator=g), 1e-5)
        assert told.tolist() == [t] * 500
        logits = xt.flatten(1) @ model.map.weight.T + model.map.bias + t * model.late
        shares[f"accuracy at t = {t}"] = round((logits.argmax(1) == y).double().mean().item(), 4)
    assert found == shares and len(set(shares.values())) > 1


# Realism ------------------------------------------------------------------------------------------------------------


def distance(a, b):
    """The Fréchet distance with the root of the product of the covariances by scipy."""
    a, b = (x.double().numpy() for x in (a, b))
    (m_a, c_a), (m_b, c_b) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (a, b))
    return ((m_a - m_b) ** 2).sum() + np.trace(c_a + c_b - 2 * scipy.linalg.sqrtm(c_a @ c_b).real)


def test_realism_of_the_real_images(images):
    """All of them, in another order: distance 0, and each lies among the others."""
    scores = objectives._realism(lambda n, g: images[0].flip(0)[:n], *images, classifier="judge", samples=500, draws=1)
    assert scores["Fréchet distance"] == pytest.approx(0, abs=1e-3)
    assert scores["precision"] == scores["recall"] == 1


def test_realism_of_samples_far_away(images):
    """Nothing in common, and the distance by scipy; the same number of samples and of images, in every draw new ones."""
    seen = []

    def draw(number, g):
        seen.append(20 + torch.randn(number, 1, 8, 8, generator=g))
        return seen[-1]

    scores = objectives._realism(draw, *images, classifier="judge", samples=500, draws=2)
    features = Judge().features
    expected = np.mean([distance(features(images[0]), features(drawn)) for drawn in seen])
    assert scores["Fréchet distance"] == pytest.approx(expected, rel=1e-4)
    assert scores["precision"] == scores["recall"] == 0
    assert [len(drawn) for drawn in seen] == [500, 500] and not torch.equal(*seen)


def test_realism_of_a_collapsed_model(images):
    """Samples that all but repeat one real image are all credible, and cover next to nothing."""

    def draw(number, g):
        return images[0][:1] + 1e-3 * torch.randn(number, 1, 8, 8, generator=g)

    scores = objectives._realism(draw, *images, classifier="judge", samples=500, draws=1)
    assert scores["precision"] == 1 and scores["recall"] < 0.02


def test_the_time_that_samples_take(images, monkeypatch):
    """A quarter of a second for each draw of 50 is 5 seconds for 1000, whatever the scoring takes."""
    now = [0.0]
    monkeypatch.setattr(objectives.time, "perf_counter", lambda: now[0])

    def draw(number, g):
        now[0] += 0.25
        return torch.randn(number, 1, 8, 8, generator=g)

    scores = objectives._realism(draw, *images, **SCORED)
    assert scores["seconds for 1000 samples"] == 5


def test_realism_compares_equal_parts_of_each_class(images, monkeypatch):
    """As many real images as samples, of all classes alike; the score is the mean of the draws' distances."""
    chosen, balanced = [], data.balanced

    def recorded(x, y, number, g):
        chosen.append(balanced(x, y, number, g))
        return chosen[-1]

    monkeypatch.setattr(data, "balanced", recorded)
    samples = torch.randn(3, 50, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    left = list(samples)
    scores = objectives._realism(lambda n, g: left.pop(0), *images, classifier="judge", samples=50, draws=3)
    features = Judge().features
    each = [distance(features(x), features(drawn)) for (x, _), drawn in zip(chosen, samples, strict=True)]
    assert all(torch.equal(y.bincount(), torch.full((10,), 5)) for _, y in chosen)
    assert scores["Fréchet distance"] == pytest.approx(np.mean(each), rel=1e-4)
