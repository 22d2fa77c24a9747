"""Picard iteration against DDIM, typed by hand and one step after the other, and against the same iteration typed on lists."""

import math

import pytest
import torch
from oracles import PATHS, bayes_on_a_grid, forward_kernel, known, path_of, time_on

from dgm_course.paths import VP, Cosine, DiscretePath
from dgm_course.samplers import picard
from dgm_course.schedules import linear_betas

UNITS = [1.0, 0.85, 0.6, 0.55, 0.3, 0.1, 0.0]  # six uneven steps, from one end to the other
STEPS = len(UNITS) - 1
all_paths = pytest.mark.parametrize("name", PATHS)
etas = pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
windows = pytest.mark.parametrize("window", [1, 2, 3, STEPS, STEPS + 5, None])


def normals(*shape, generator):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=tolerance, atol=tolerance)


def grid_of(name):
    return [time_on(name, unit) for unit in UNITS]


def wavy(x, t):
    """A denoiser that depends on the state and the time, with a time for each sample or one for all."""
    t = torch.as_tensor(t, dtype=torch.float64)
    return torch.sin(1.3 * x + 0.2 * t.reshape(-1, *[1] * (x.ndim - 1))).to(x.dtype)


def recorded(calls, denoiser=wavy):
    """The denoiser, which writes down what it was asked."""

    def asked(x, t):
        calls.append((x.clone(), t.clone()))
        return denoiser(x, t)

    return asked


def step(name, t, s, eta):
    """Factors (of x_t, of x̂_0, of the noise) of DDIM's step, from the closed forms and Bayes."""
    (alpha_s, sigma_s), (alpha_t, sigma_t) = known(name, s), known(name, t)
    std = eta * sigma_s / sigma_t * math.sqrt(forward_kernel(name, s, t)[1])
    keep = math.sqrt(max(sigma_s**2 - std**2, 0.0)) / sigma_t
    return keep, alpha_s - keep * alpha_t, std


def noises(x, steps, seed):
    """DDIM draws noise in each step that has some, one after the other."""
    g = seeded(seed)
    return [torch.randn(x.shape, generator=g, dtype=x.dtype) if std else 0.0 for *_, std in steps]


def one_by_one(name, x, times, eta=0.0, seed=0, denoiser=wavy):
    """All states of DDIM, the first included."""
    steps = [step(name, t, s, eta) for t, s in zip(times, times[1:], strict=False)]
    states = [x]
    for (keep, pull, std), z, t in zip(steps, noises(x, steps, seed), times, strict=False):
        states.append(keep * states[-1] + pull * denoiser(states[-1], t) + std * z)
    return states


def typed_rounds(name, x, times, window, tol, eta=0.0, seed=0, denoiser=wavy):
    """Picard iteration on a list of states, one evaluation after the other: the state at the end of the window in each round.

    A state is done when all states of this round up to it moved by at most `tol`; the first is done in any case.
    """
    steps = [step(name, t, s, eta) for t, s in zip(times, times[1:], strict=False)]
    z, total = noises(x, steps, seed), len(steps)
    way, done, ends = [x] * (total + 1), 0, []
    while done < total:
        stop = min(done + (window or total), total)
        guesses = {i: denoiser(way[i], times[i]) for i in range(done, stop)}
        moved = []
        for i in range(done, stop):
            keep, pull, std = steps[i]
            new = keep * way[i] + pull * guesses[i] + std * z[i]
            moved.append(max(float((a - b).pow(2).mean().sqrt()) for a, b in zip(new, way[i + 1], strict=True)))
            way[i + 1] = new
        for i in range(stop + 1, total + 1):
            way[i] = way[stop]
        ends.append(way[stop])
        still = [m <= tol for m in moved]
        done += 1 if not still[0] else next((i for i, one in enumerate(still) if not one), len(still))
    return ends


# Exactly DDIM ---------------------------------------------------------------------------------------------------------


@all_paths
@etas
@windows
def test_without_tolerance_it_is_ddim(name, eta, window, generator):
    """With tol = 0 the last round is DDIM's sample with the same noises, after at most N rounds, whatever the window."""
    times = grid_of(name)
    scale = known(name, times[0])[1]
    x = scale * normals(3, 2, generator=generator)
    rounds = list(picard(wavy, path_of(name), x, times, window=window, tol=0, eta=eta, generator=seeded(3)))
    assert len(rounds) <= STEPS if window != 1 else len(rounds) == STEPS
    close(rounds[-1], one_by_one(name, x, times, eta, 3)[-1], 1e-9 * max(1.0, scale))


@windows
@etas
def test_after_k_rounds_k_states_are_exact(window, eta, generator):
    """Each round asks at times[done] with the very state of DDIM there; k rounds are enough for k states."""
    calls, times, x = [], grid_of("Cosine"), normals(3, 2, generator=generator)
    states = one_by_one("Cosine", x, times, eta, 3)
    for _ in picard(recorded(calls), Cosine(), x, times, window=window, tol=0, eta=eta, generator=seeded(3)):
        pass
    at = {t: i for i, t in enumerate(times)}
    for k, (asked, t) in enumerate(calls):
        first = at[t[0].item()]
        assert first >= k
        close(asked[:3], states[first], 1e-12)
    assert [at[t[0].item()] for _, t in calls] == sorted({at[t[0].item()] for _, t in calls})


def test_a_window_of_one_is_ddim(generator):
    """Then each round is one step for the whole batch, and every state comes out."""
    calls, times, x = [], grid_of("Cosine"), normals(3, 2, generator=generator)
    rounds = list(picard(recorded(calls), Cosine(), x, times, window=1, tol=100.0))
    for one, other in zip(rounds, one_by_one("Cosine", x, times)[1:], strict=True):
        close(one, other, 1e-12)
    assert [(len(x), t.tolist()) for x, t in calls] == [(3, [t] * 3) for t in times[:-1]]


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_noise_is_that_of_bayes(eta):
    """One step of a perfect denoiser with η = 1 has the mean and the variance of Bayes on a grid; with η = 0 no noise."""
    s, t, x0 = 0.3, 0.6, 0.8
    (alpha_s, sigma_s), (alpha_t, sigma_t) = known("VP", s), known("VP", t)
    xt = alpha_t * x0 + 0.7 * sigma_t
    start, z = torch.full((1, 1), xt, dtype=torch.float64), torch.randn(1, 1, generator=seeded(5), dtype=torch.float64)
    (out,) = picard(lambda x, t: torch.full_like(x, x0), VP(), start, [t, s], eta=eta, generator=seeded(5))
    mean, var = bayes_on_a_grid(alpha_s, sigma_s, *forward_kernel("VP", s, t), xt, x0)
    expected = mean + math.sqrt(var) * z.item() if eta else alpha_s * x0 + 0.7 * sigma_s
    close(out, [[expected]], 1e-8)


# Round by round -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["VP", "Cosine", "VE narrow", "Straight", "chain"])
@pytest.mark.parametrize("window", [1, 2, 4, None])
@pytest.mark.parametrize("tol", [0.0, 1e-3, 0.05, 0.5])
def test_rounds_by_hand(name, window, tol, generator):
    """Every round is that of the iteration typed on lists: what is guessed, what counts as done, where the window goes on."""
    times, x = grid_of(name), known(name, time_on(name, 1.0))[1] * normals(3, 2, generator=generator)
    rounds = list(picard(wavy, path_of(name), x, times, window=window, tol=tol, eta=0.7, generator=seeded(2)))
    expected = typed_rounds(name, x, times, window, tol, 0.7, 2)
    assert len(rounds) == len(expected)
    for one, other in zip(rounds, expected, strict=True):
        close(one, other, 1e-9)


def test_how_much_it_moved_is_of_the_sample_that_moved_most():
    """Root mean square over its values: 63 samples that stand still do not hide the one that moves, but 15 values of it do."""
    times, tols = [1.0, 0.7, 0.5, 0.3, 0.1], (0.3, 0.1, 0.03)

    def denoiser(x, t):
        return torch.sin(3 * x)  # 0 stays 0

    still, moving, partly = torch.zeros(3, 64, 16, dtype=torch.float64)
    moving[17], partly[17, 3] = 1.0, 1.0
    counts = [
        [len(list(picard(denoiser, Cosine(), x, times, tol=tol))) for tol in tols] for x in (still, moving, partly)
    ]
    lone = torch.ones(1, 1, dtype=torch.float64)
    whole, a_quarter = (
        [len(typed_rounds("Cosine", lone, times, None, factor * tol, denoiser=denoiser)) for tol in tols]
        for factor in (1, 4)
    )
    assert counts[0] == [1, 1, 1] and counts[1] == whole == [3, 4, 4]
    assert (
        len(list(picard(denoiser, Cosine(), still, times, tol=0))) == 1
    )  # what does not move at all needs no tolerance
    assert counts[2] == a_quarter == [1, 3, 4]  # one value of 16 counts by the root of a sixteenth


def test_a_tolerance_saves_rounds_and_costs_little(generator):
    """100 steps of a smooth denoiser take a fraction of 100 rounds; a smaller tolerance takes more, and comes nearer to DDIM."""
    times, x = torch.linspace(1, 0, 101, dtype=torch.float64), normals(4, 2, generator=generator)
    exact = one_by_one("Cosine", x, times.tolist())[-1]
    counts, errors = [], []
    for tol in (1e-1, 1e-3, 1e-6):
        rounds = list(picard(wavy, Cosine(), x, times, tol=tol))
        counts.append(len(rounds))
        errors.append((rounds[-1] - exact).square().mean(1).max().sqrt().item())
        assert errors[-1] < 10 * tol
    assert counts == sorted(counts) and counts[0] < counts[-1] < 40
    assert errors == sorted(errors, reverse=True)


def test_the_first_state_of_a_round_may_have_moved():
    """What comes after it was asked at its old place, so it is not done although it stands still: here the last step, which
    keeps nothing of x_t, gives 1 at the old place as at the start, and 0.5 at the new one."""

    def denoiser(x, t):
        return torch.where(torch.as_tensor(t).reshape(-1, 1) > 0.9, -0.5, x.clamp(-1, 1))

    times, x = [1.0, 0.6, 0.0], torch.ones(1, 1, dtype=torch.float64)
    exact = one_by_one("Cosine", x, times, denoiser=denoiser)[-1]
    assert abs(exact.item()) < 0.6
    for tol in (0.0, 1e-3):
        close(list(picard(denoiser, Cosine(), x, times, tol=tol))[-1], exact)


# What it asks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 2), (2, 1, 4, 4), (1, 1)])
@pytest.mark.parametrize("window", [2, None])
def test_what_the_denoiser_is_asked(shape, window, generator):
    """W·B samples and as many times: all of one time after all of another; in the first round all at the start."""
    calls, times, x = [], grid_of("Cosine"), normals(*shape, generator=generator)
    for state in picard(recorded(calls), Cosine(), x, times, window=window, tol=0):
        assert state.shape == shape
    for asked, t in calls:
        assert t.shape == (len(asked),) and len(asked) % len(x) == 0 and asked.shape[1:] == x.shape[1:]
        blocks = t.reshape(-1, len(x))
        assert (blocks == blocks[:, :1]).all()
        first = times.index(blocks[0, 0].item())
        assert blocks[:, 0].tolist() == times[first : first + len(blocks)]
        assert len(blocks) == min(window or STEPS, STEPS - first)
    assert torch.equal(calls[0][0], x.repeat(window or STEPS, *[1] * (x.ndim - 1)))


def test_conditions_follow(generator):
    """Labels repeated as the docstring says belong to the samples: each sample's run is that of its label alone."""
    labels, x, times = torch.tensor([0, 1, 2]), normals(3, 2, generator=generator), grid_of("Cosine")
    targets = torch.tensor([[-1.0, 2.0], [0.5, 0.0], [3.0, 1.0]], dtype=torch.float64)

    def net(x, t, y):
        return wavy(x, t) + targets[y]

    rounds = list(picard(lambda x, t: net(x, t, labels.repeat(len(x) // len(labels))), Cosine(), x, times, tol=0))
    for i in range(3):
        alone = one_by_one("Cosine", x[i : i + 1], times, denoiser=lambda x, t, i=i: net(x, t, labels[i : i + 1]))
        close(rounds[-1][i], alone[-1][0])


def test_whole_times_of_a_chain(generator):
    """They are whole numbers for the denoiser as well, so that a table can be indexed by them."""
    chain, calls = DiscretePath(linear_betas(50)), []
    table = torch.linspace(0, 1, 51, dtype=torch.float64)
    denoiser = recorded(calls, lambda x, t: table[t.long()][:, None] * torch.tanh(x))
    out = list(picard(denoiser, chain, normals(2, 2, generator=generator), chain.times(10), tol=0))
    assert 1 < len(out) <= 10
    assert all(torch.equal(t, t.round()) for _, t in calls)


# What a sampler promises ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("window", [2, None])
def test_states(dtype, window, generator):
    """Of x's type and shape, each in its own memory, which may be written on; x is left alone."""
    x = torch.randn(3, 1, 2, 2, generator=generator, dtype=dtype)
    before, kept, rounds = x.clone(), [], []
    for state in picard(wavy, Cosine(), x, grid_of("Cosine"), window=window, tol=0, eta=0.5, generator=seeded(1)):
        kept.append(state.clone())
        state.fill_(7.0)
        rounds.append(state)
    again = list(picard(wavy, Cosine(), x, grid_of("Cosine"), window=window, tol=0, eta=0.5, generator=seeded(1)))
    assert torch.equal(x, before) and len({state.data_ptr() for state in (x, *rounds)}) == len(rounds) + 1
    for one, other in zip(kept, again, strict=True):
        assert torch.equal(one, other) and one.dtype == dtype and one.shape == x.shape


def test_random_numbers(generator):
    """From the generator alone: one seed one result, the global state untouched; without noise nothing is drawn at all."""
    x, times = normals(3, 2, generator=generator), grid_of("Cosine")

    def run(seed, eta=1.0, window=None):
        return list(picard(wavy, Cosine(), x, times, eta=eta, tol=0, window=window, generator=seeded(seed)))[-1]

    state = torch.get_rng_state()
    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
    close(run(1, window=2), run(1))
    g = seeded(1)
    list(picard(wavy, Cosine(), x, times, generator=g))
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(g.get_state(), seeded(1).get_state())


def test_gradients():
    """Off in the denoiser, on where it turns them on, and as they were between rounds and after a run left early."""
    seen, x = [], torch.ones(2, 2, requires_grad=True)

    def denoiser(x, t):
        seen.append(torch.is_grad_enabled())
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            return torch.autograd.grad((0.25 * leaf**2).sum(), leaf)[0]

    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            for state in picard(denoiser, Cosine(), x, grid_of("Cosine"), tol=0):
                assert torch.is_grad_enabled() is grad and not state.requires_grad
            assert torch.is_grad_enabled() is grad
    rounds = picard(denoiser, Cosine(), x, grid_of("Cosine"))
    next(rounds)
    rounds.close()
    assert torch.is_grad_enabled() and seen and not any(seen)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("window, in_round", [(None, 1), (2, 3), (1, 4)])
def test_a_state_that_is_not_finite(bad, window, in_round):
    """One bad value in one sample raises in the round where it came, which the message names."""

    def denoiser(x, t):
        x0 = wavy(x, t)
        x0[(t == 0.55) & (torch.arange(len(x)) % 2 == 1), 1] = bad
        return x0

    rounds = picard(denoiser, Cosine(), torch.ones(2, 3), grid_of("Cosine"), window=window, tol=0)
    for _ in range(in_round - 1):
        assert next(rounds).isfinite().all()
    with pytest.raises(FloatingPointError, match=f"^a state is not finite in round {in_round}, between t = "):
        next(rounds)


def test_arguments_are_checked_at_the_call():
    """What does not fit raises before any round, and is named."""
    x, path, times = torch.ones(2, 3), Cosine(), [1.0, 0.5, 0.0]

    def run(path=path, x=x, times=times, **options):
        def never(x, t):
            raise AssertionError("the denoiser was called")

        return lambda: picard(never, path, x, times, **options)

    cases = [
        *[(ValueError, f"^window must be a whole number of at least 1; got {window}", run(window=window))
          for window in (0, -1, 2.0)],
        (ValueError, "^tol must not be negative; got -0.1", run(tol=-0.1)),
        (ValueError, "^tol must not be negative; got nan", run(tol=math.nan)),
        (ValueError, r"^eta must lie in \[0, 1\]; got 1.5", run(eta=1.5)),
        (ValueError, "^times must be strictly descending", run(times=[0.0, 0.5, 1.0])),
        (ValueError, "^times must be strictly descending", run(times=[0.5, 0.5])),
        (ValueError, "^times must be strictly descending", run(times=[0.5])),
        (ValueError, r"^times must lie in \[0, 1\]", run(times=[1.1, 0.0])),
        (ValueError, "^times must be a whole number", run(path=DiscretePath([0.1] * 4), times=[4, 1.5, 0])),
        (TypeError, "^x must be a floating-point tensor", run(x=x.long())),
        (TypeError, "^path must be a GaussianPath; got str", run(path="cosine")),
    ]  # fmt: skip
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()
