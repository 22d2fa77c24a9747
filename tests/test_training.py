"""The loop against plain loops and closed forms; stopped anywhere, it goes on bit by bit as if it never had."""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import dgm_course
from dgm_course import checkpoints, cli, data, losses, recipes, training
from dgm_course.denoisers import Denoiser
from dgm_course.nets import MLP
from dgm_course.paths import Cosine, DiscretePath, Straight
from dgm_course.toy import two_moons
from dgm_course.training import Fit, batches, fit

STEPS, SAVE_EVERY, STOP = 40, 10, 23


def network() -> nn.Module:
    """A network with all that a saved state must hold: weights, buffers, and dropout's random numbers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Tanh(), nn.Linear(16, 1))


def line(step: int) -> dict:
    """A batch of a noisy regression problem."""
    g = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(8, 2, generator=g)
    return {"x": x, "target": 3 * x[:, :1] + torch.randn(8, 1, generator=g)}


def square(model: nn.Module, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (model(x) - target).square().mean()


def quick(model: nn.Module, loss=square, draw=line, **options) -> Fit:
    """`fit` with the settings of most tests here."""
    return fit(model, loss, draw, **{"steps": STEPS, "progress": False, "save_every": SAVE_EVERY} | options)


def stopping(signum: int, at: int = STOP):
    """Batches that send this process a signal while the one of step `at` is drawn, before that step is done."""

    def draw(step: int) -> dict:
        if step == at:
            signal.raise_signal(signum)
        return line(step)

    return draw


def elsewhere(*command: str, **variables: str) -> subprocess.CompletedProcess:
    """Run Python with these arguments; its code may import this file."""
    folders = [str(Path(__file__).parent), str(Path(dgm_course.__file__).parents[1])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"} | variables
    environment.pop("TQDM_DISABLE", None)
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


def same(a: nn.Module, b: nn.Module) -> bool:
    """Whether two modules have the same weights and buffers, bit by bit."""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def whole() -> tuple[nn.Module, Fit]:
    """A run that nothing stopped, without a state file: the model and its Fit."""
    model = network()
    return model, quick(model)


def assert_as_if_never_stopped(model: nn.Module, done: Fit, whole: tuple[nn.Module, Fit]) -> None:
    assert same(model, whole[0]) and same(done.ema, whole[1].ema)
    assert done.losses == whole[1].losses
    assert done.step == STEPS


def in_another_process(folder: str) -> None:
    """What the process of `elsewhere_run` does, one after the other."""
    quick(network())
    print("now with a bar", file=sys.stderr)
    quick(network(), progress=True)
    try:
        quick(network(), draw=stopping(signal.SIGTERM), state=f"{folder}/terminated.pt")
    except KeyboardInterrupt as stop:
        print(stop, flush=True)
    quick(network(), draw=stopping(signal.SIGKILL), state=f"{folder}/killed.pt")


@pytest.fixture(scope="module")
def elsewhere_run(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """One other process for all tests that need one, because it takes seconds to start; its folder and its end."""
    folder = tmp_path_factory.mktemp("elsewhere")
    code = f"import test_training; test_training.in_another_process({str(folder)!r})"
    return folder, elsewhere("-c", code)


# Stop and go on -----------------------------------------------------------------------------------------------------


def test_a_state_file_changes_nothing(tmp_path, whole):
    """Saving takes no part in training."""
    model = network()
    assert_as_if_never_stopped(model, quick(model, state=tmp_path / "new" / "folder" / "state.pt"), whole)


@pytest.mark.parametrize("at", [0, 1, SAVE_EVERY, STOP, STEPS - 1])
def test_ctrl_c_then_on_again(at, tmp_path, whole):
    """The step in which Ctrl-C comes is done and saved; the same call goes on from it."""
    state = tmp_path / "state.pt"
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt, match=f"after step {at + 1} of {STEPS}"):
        quick(network(), draw=stopping(signal.SIGINT, at), state=state)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    drawn, model = [], network()
    torch.manual_seed(99)  # all that the new process has of its own is overwritten
    for weight in model.parameters():
        nn.init.normal_(weight)
    done = quick(model, draw=lambda step: drawn.append(step) or line(step), state=state)
    assert drawn == list(range(at + 1, STEPS))
    assert_as_if_never_stopped(model, done, whole)


def test_ctrl_c_in_the_loss(tmp_path, whole):
    """The place within a step does not matter."""

    def interrupted(model, x, target):
        if torch.equal(x, line(STOP)["x"]):
            signal.raise_signal(signal.SIGINT)
        return square(model, x, target)

    with pytest.raises(KeyboardInterrupt, match=f"after step {STOP + 1} of"):
        quick(network(), interrupted, state=tmp_path / "state.pt")
    model = network()
    assert_as_if_never_stopped(model, quick(model, state=tmp_path / "state.pt"), whole)


@pytest.mark.parametrize("at", [7, STEPS])
def test_ctrl_c_while_watching(at, tmp_path):
    """No signal is lost between steps, nor after the last one, and what is drawn to watch changes nothing later."""
    ran = []

    def watch(done):
        torch.rand(5)
        if done.step == at:
            signal.raise_signal(signal.SIGINT)

    def count(step):
        ran.append(step)
        return line(step)

    with pytest.raises(KeyboardInterrupt, match=f"of {STEPS}"):
        quick(network(), draw=count, watch=watch, watch_every=1, state=tmp_path / "state.pt")
    assert at <= len(ran) <= at + 1
    model = network()
    first = quick(model, watch=lambda done: torch.rand(5), watch_every=1, state=tmp_path / "state.pt")
    uninterrupted = network()
    second = quick(uninterrupted, watch=lambda done: torch.rand(5), watch_every=1)
    assert_as_if_never_stopped(model, first, (uninterrupted, second))


def test_sigterm_in_another_process(elsewhere_run, whole):
    """A scheduler's polite stop is as good as Ctrl-C."""
    folder, done = elsewhere_run
    assert f"stopped after step {STOP + 1} of {STEPS}" in done.stdout
    assert torch.load(folder / "terminated.pt")["step"] == STOP + 1
    model = network()
    assert_as_if_never_stopped(model, quick(model, state=folder / "terminated.pt"), whole)


def test_sigkill_in_another_process(elsewhere_run, whole):
    """A hard kill costs the steps since the last save, and nothing else."""
    folder, done = elsewhere_run
    assert done.returncode == -signal.SIGKILL
    assert torch.load(folder / "killed.pt")["step"] == STOP - STOP % SAVE_EVERY
    model = network()
    assert_as_if_never_stopped(model, quick(model, state=folder / "killed.pt"), whole)


def test_stopped_many_times(tmp_path, whole):
    """Losses, averages and seconds go on through several stops."""
    seconds = [0.0]
    for at in (3, 4, 17):
        with pytest.raises(KeyboardInterrupt):
            quick(network(), draw=stopping(signal.SIGINT, at), state=tmp_path / "state.pt")
        seconds.append(torch.load(tmp_path / "state.pt")["seconds"])
    model = network()
    done = quick(model, state=tmp_path / "state.pt")
    assert_as_if_never_stopped(model, done, whole)
    assert all(a < b for a, b in zip(seconds, [*seconds[1:], done.seconds], strict=True))


def test_a_finished_run_is_not_run_again(tmp_path, whole):
    """The last step is always saved, and its state gives the result without a step."""
    quick(network(), state=tmp_path / "state.pt", save_every=STEPS - 7)
    model = network()
    done = quick(model, draw=lambda step: pytest.fail("a step was done"), state=tmp_path / "state.pt")
    assert_as_if_never_stopped(model, done, whole)
    assert not model.training and not done.ema.training


def test_without_a_state_ctrl_c_is_immediate():
    """Nothing waits for the end of the step if there is nothing to save."""
    ran = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts its background jobs without it
    try:
        with pytest.raises(KeyboardInterrupt):
            quick(network(), lambda *_, **batch: ran.append(1), stopping(signal.SIGINT, 0))
    finally:
        signal.signal(signal.SIGINT, before)
    assert ran == []


def test_a_crash_while_saving_leaves_the_last_state(tmp_path, whole, monkeypatch):
    """A save that breaks off leaves a .part beside, which does no harm."""
    state, write = tmp_path / "state.pt", torch.save

    def crash(content, file):
        write(content, file)
        if content["step"] == 30:
            Path(file).write_bytes(Path(file).read_bytes()[:100])
            raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(OSError, match="no space"):
        quick(network(), state=state)
    assert [file.name for file in tmp_path.iterdir() if file != state] == ["state.pt.part"]
    monkeypatch.undo()
    assert torch.load(state)["step"] == 20
    model = network()
    assert_as_if_never_stopped(model, quick(model, state=state), whole)
    assert list(tmp_path.iterdir()) == [state]


@pytest.mark.parametrize("place", [0.1, 0.3, 0.5, 0.7])
def test_one_flipped_byte_in_the_state_is_noticed(place, tmp_path):
    """Not even one wrong digit of one weight gets in; the error names the file."""
    state = tmp_path / "state.pt"
    big = nn.Linear(100, 1)  # so that most of the file is numbers
    quick(big, lambda model, x: model(x).mean(), lambda step: {"x": torch.ones(2, 100)}, state=state)
    content = bytearray(state.read_bytes())
    weights = big.weight.detach().numpy().tobytes()
    assert weights in content
    content[content.find(weights) + int(place * len(weights))] ^= 1
    state.write_bytes(content)
    with pytest.raises(ValueError, match="state: cannot go on from") as failure:
        quick(big, lambda model, x: model(x).mean(), lambda step: {"x": torch.ones(2, 100)}, state=state)
    assert str(state) in str(failure.value) and "Delete the file" in str(failure.value)


@pytest.mark.parametrize("damage", [lambda content: content[:-50], lambda content: b"", lambda content: b"junk" * 99])
def test_a_damaged_state_is_refused(damage, tmp_path):
    """The error names the file."""
    state = tmp_path / "state.pt"
    quick(network(), state=state)
    state.write_bytes(damage(state.read_bytes()))
    with pytest.raises(ValueError, match="state: cannot go on from") as failure:
        quick(network(), state=state)
    assert str(state) in str(failure.value)


def test_a_state_for_other_steps_is_refused(tmp_path):
    """The learning rate depends on the number of steps, so the run would be neither."""
    quick(network(), state=tmp_path / "state.pt")
    with pytest.raises(ValueError, match=f"saved for steps = {STEPS}, asked are {STEPS + 1}") as failure:
        quick(network(), state=tmp_path / "state.pt", steps=STEPS + 1)
    assert str(tmp_path / "state.pt") in str(failure.value)


@pytest.mark.parametrize("other", [nn.Linear(2, 1), nn.Sequential(nn.Linear(2, 17), nn.BatchNorm1d(17))])
def test_a_state_of_another_model_is_refused(other, tmp_path):
    """The error names the file and what does not fit."""
    quick(network(), state=tmp_path / "state.pt")
    with pytest.raises(ValueError, match="state: cannot go on from .*state_dict") as failure:
        quick(other, state=tmp_path / "state.pt")
    assert str(tmp_path / "state.pt") in str(failure.value)


# What a step does ---------------------------------------------------------------------------------------------------


def plain(model, draw, rates, clip=None, betas=(0.9, 0.99), weight_decay=0.01) -> list[float]:
    """AdamW in a loop that anyone would write; returns the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=betas, weight_decay=weight_decay)
    values = []
    for step, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        value = square(model, **draw(step))
        value.backward()
        if clip is not None:
            norm = torch.sqrt(sum(p.grad.square().sum() for p in model.parameters()))
            for p in model.parameters():
                p.grad *= min(1.0, clip / norm.item())
        optimizer.step()
        values.append(value.item())
    return values


def hand_rates(steps, lr, warmup, final):
    """The learning rate of each step: up to its peak in warmup + 1 even parts, then on a line to final at `steps`."""
    return [
        lr * (k + 1) / (warmup + 1) if k < warmup else lr * (1 + (final - 1) * (k - warmup) / (steps - warmup))
        for k in range(steps)
    ]


def linear() -> nn.Module:
    torch.manual_seed(1)
    return nn.Linear(2, 1).double()


def precise(step: int) -> dict:
    """A batch in float64 whose gradients are of a different size at each step."""
    return {name: (1 + step % 5) * value.double() for name, value in line(step).items()}


def test_rates():
    """Warm-up and decay, worked out by hand."""
    rates = [training._rate(step, 100, 4, 0.02) for step in range(100)]
    assert rates[:6] == pytest.approx([1 / 5, 2 / 5, 3 / 5, 4 / 5, 1, 1 - 0.98 / 96])
    assert rates[52] == pytest.approx(0.51) and rates[99] == pytest.approx(0.02 + 0.98 / 96)
    assert [training._rate(step, 4, 200, 0.0) for step in range(4)] == [1, 0.75, 0.5, 0.25]  # too short to warm up
    assert training._rate(0, 20, 200, 0.02) == pytest.approx(1 / 3)  # warms up over a tenth at most
    assert training._rate(0, 1, 0, 0.02) == 1


def test_adamw_equals_a_plain_loop():
    """Without clipping: the same weights and losses as the loop written out above, with all options given."""
    ours, theirs = linear(), linear()
    options = {"betas": (0.8, 0.95), "weight_decay": 0.3}
    done = quick(ours, draw=precise, steps=60, lr=0.05, warmup=4, final=0.1, clip=math.inf, **options)
    values = plain(theirs, precise, hand_rates(60, 0.05, 4, 0.1), **options)
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.bias, theirs.bias, rtol=0, atol=1e-12)
    assert done.losses == pytest.approx(values, rel=1e-12)


def test_defaults_equal_a_plain_loop():
    """The defaults are those that the signature states."""
    ours, theirs = linear(), linear()
    fit(ours, square, precise, steps=60, progress=False)
    plain(theirs, precise, hand_rates(60, 2e-3, 6, 0.02), clip=1.0)
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=0, atol=1e-9)


def test_gradients_are_clipped():
    """As in a plain loop that scales them by hand, and not as in one that does not."""
    ours, clipped, free = linear(), linear(), linear()
    quick(ours, draw=precise, lr=0.05, warmup=0, final=1.0, clip=0.5)
    plain(clipped, precise, [0.05] * STEPS, clip=0.5)
    plain(free, precise, [0.05] * STEPS)
    torch.testing.assert_close(ours.weight, clipped.weight, rtol=0, atol=1e-5)  # PyTorch adds 1e-6 to the norm
    assert (ours.weight - free.weight).abs().max() > 0.01


@pytest.mark.parametrize("largest", [0.999, 0.5, 0.0])
def test_average_is_the_recursion(largest):
    """θ̄ ← m·θ̄ + (1 − m)·θ with m = min(ema, (1 + n)/(10 + n)), in NumPy, from the weights of each step."""
    model, seen, kept = linear(), [], []

    def watch(done):
        seen.append(model.weight.detach().numpy().copy())
        kept.append(done.ema.weight.numpy().copy())

    average = model.weight.detach().numpy().copy()
    done = quick(model, draw=precise, lr=0.1, ema=largest, watch=watch, watch_every=1)
    for n, (weight, ours) in enumerate(zip(seen, kept, strict=True), start=1):
        m = min(largest, (1 + n) / (10 + n))
        average = m * average + (1 - m) * weight
        np.testing.assert_allclose(ours, average, rtol=0, atol=1e-13)
    np.testing.assert_array_equal(done.ema.weight.numpy(), kept[-1])
    assert np.abs(seen[-1] - kept[-1]).max() > 0.001 or largest == 0


def test_average_takes_buffers_as_they_are():
    """Running statistics are averages already."""
    model = network()
    done = quick(model)
    assert torch.equal(done.ema[1].running_mean, model[1].running_mean)
    assert done.ema[1].num_batches_tracked == STEPS


def test_frozen_weights_stay():
    """What needs no gradient is left as it is, and still needs none after; the average needs none at all."""
    model = network()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    done = quick(model)
    assert torch.equal(model[0].weight, before) and torch.equal(done.ema[0].weight, before)
    assert [p.requires_grad for p in model.parameters()] == [False] * 2 + [True] * 4
    assert not any(p.requires_grad for p in done.ema.parameters())


def test_modes():
    """Training mode in each step, eval mode for what comes back; the average is another module."""
    model, modes = network().eval(), []
    done = quick(model, lambda m, **batch: modes.append(m.training) or square(m, **batch))
    assert modes == [True] * STEPS
    assert not any(part.training for part in [*model.modules(), *done.ema.modules()])
    assert done.ema is not model and type(done.ema) is type(model)


# What can go wrong --------------------------------------------------------------------------------------------------


def no_loss(model, value):
    """The gradient stays finite."""
    return value + math.nan


def no_gradient(model, value):
    """The loss stays finite, but the root has an infinite slope at 0."""
    return value + (0 * model[0].weight.sum()).abs().sqrt()


@pytest.mark.parametrize("spoil", [no_loss, no_gradient])
@pytest.mark.parametrize("at", [17, 2 * SAVE_EVERY - 1])
def test_a_loss_that_is_not_finite(spoil, at, tmp_path, whole):
    """Training stops with the step named, before the weights are spoilt, and the state is the last good one."""
    model, weights = network(), []

    def loss(model, x, target):
        value = square(model, x, target)
        return spoil(model, value) if torch.equal(x, line(at)["x"]) else value

    def watch(done):
        weights.append(model[0].weight.detach().clone())

    with pytest.raises(FloatingPointError, match=f"at step {at}; lower lr"):
        quick(model, loss, state=tmp_path / "state.pt", watch=watch, watch_every=1)
    assert len(weights) == at and torch.equal(model[0].weight, weights[-1])
    assert torch.load(tmp_path / "state.pt")["step"] == SAVE_EVERY
    again = network()
    assert_as_if_never_stopped(again, quick(again, state=tmp_path / "state.pt"), whole)


@pytest.mark.parametrize("name", ["steps", "save_every", "watch_every"])
@pytest.mark.parametrize("value", [0, -1, 2.0, None])
def test_numbers_of_steps_are_checked(name, value):
    """The error names the argument and what came."""
    with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1; got {value!r}"):
        quick(network(), **{name: value})


@pytest.mark.parametrize("precision", ["float16", "bf16", None])
def test_unknown_precision(precision):
    """The error names what came and what there is."""
    with pytest.raises(ValueError, match=f"precision must be one of float32, bfloat16, auto; got {precision!r}"):
        quick(network(), precision=precision)


def test_precisions_in_one_process():
    """One after the other, in any order: bfloat16 in the forward pass only, and weights stay in float32."""
    seen = {}
    for precision in ("auto", "bfloat16", "float32", "bfloat16"):
        model = nn.Linear(2, 1)

        def loss(model, x, target, precision=precision):
            seen[precision] = model(x).dtype
            return (model(x) - target).square().mean()

        done = quick(model, loss, precision=precision, steps=2)
        assert model.weight.dtype == done.ema.weight.dtype == torch.float32
    assert seen["bfloat16"] == torch.bfloat16 and seen["float32"] == torch.float32
    assert seen["auto"] == (torch.bfloat16 if training._has_bfloat16() else torch.float32)


# What one sees ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "every", "expected"), [(10, 4, [4, 8, 10]), (8, 4, [4, 8]), (3, 100, [3])])
def test_watch_is_called_when_promised(steps, every, expected):
    """Every `watch_every` steps and at the end, with the losses so far."""
    seen = []
    done = quick(network(), steps=steps, watch=lambda d: seen.append((d.step, len(d.losses))), watch_every=every)
    assert seen == [(step, step) for step in expected]
    assert len(done.losses) == done.step == steps and done.seconds > 0


def test_progress_bar(elsewhere_run):
    """A bar on the error stream if one is wanted, else nothing; and nothing on the output."""
    before, after = elsewhere_run[1].stderr.split("now with a bar\n")
    assert before == "" and f"/{STEPS} [" in after
    assert elsewhere_run[1].stdout.startswith("stopped after")


def test_progress_bars_obey_the_environment(capfd):
    """The test run sets TQDM_DISABLE, as the build of the notebooks does: no bar gets into stored outputs."""
    assert os.environ["TQDM_DISABLE"] == "1"
    quick(network(), progress=True)
    assert capfd.readouterr() == ("", "")


def test_an_mlp_learns_two_moons():
    """In a few hundred steps the loss is well below where it began, and so is the average's."""
    x, path = two_moons(2000, generator=torch.Generator().manual_seed(0)), Cosine()
    torch.manual_seed(0)
    model = Denoiser(MLP(2, width=32, depth=2), path, predicts="v")
    draw = batches(x, path, size=128)
    test = batches(x, path, size=1000, seed=1)(0)
    before = losses.simple(model, **test).item()
    done = fit(model, losses.simple, draw, steps=400, lr=5e-3, precision="float32", progress=False)
    assert sum(done.losses[-50:]) / 50 < 0.75 * sum(done.losses[:5]) / 5
    assert losses.simple(done.ema, **test).item() < 0.75 * before


# Batches ------------------------------------------------------------------------------------------------------------

CHAIN = DiscretePath(torch.full((12,), 0.1))


def test_batches_are_a_function_of_seed_and_step():
    """In any order, from any copy, whatever the global generator does; and it is left alone."""
    x, y = torch.randn(50, 3), torch.arange(50) % 10
    one, two, other = (batches(x, Straight(), size=8, y=y, null=10, seed=seed) for seed in (3, 3, 4))
    forward = [one(step) for step in range(20)]
    torch.manual_seed(5)
    backward = [two(step) for step in reversed(range(20))][::-1]
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))
    for a, b in zip(forward, backward, strict=True):
        assert a.keys() == b.keys() == {"x0", "t", "eps", "y"} and all(torch.equal(a[key], b[key]) for key in a)
    assert not any(torch.equal(a["eps"], b["eps"]) for a, b in zip(forward, forward[1:], strict=False))
    assert not torch.equal(forward[0]["eps"], other(0)["eps"]) and not torch.equal(forward[0]["x0"], other(0)["x0"])
    assert len({a["eps"].sum().item() for a in forward}) == len({a["t"].sum().item() for a in forward}) == 20


@pytest.mark.parametrize(("count", "size"), [(20, 4), (10, 4), (7, 7), (5, 1)])
def test_epochs_are_permutations(count, size):
    """Each epoch has every sample at most once, all of them if the size divides their number, in a new order."""
    x = torch.arange(float(count))[:, None]
    batch, per_epoch = batches(x, Straight(), size=size), count // size
    epochs = [torch.cat([batch(e * per_epoch + k)["x0"] for k in range(per_epoch)])[:, 0].tolist() for e in range(6)]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) == per_epoch * size
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert {sample for epoch in epochs for sample in epoch} == set(x[:, 0].tolist())


def test_noise_is_standard_normal_and_of_the_data_type():
    """Mean, variance and a Kolmogorov–Smirnov test over many batches; float64 data get float64 noise."""
    batch = batches(torch.zeros(64, 5, dtype=torch.float64), Straight(), size=64)
    eps = torch.stack([batch(step)["eps"] for step in range(50)])
    assert eps.dtype == torch.float64
    assert stats.kstest(eps.flatten().numpy(), "norm").pvalue > 1e-4
    assert batches(torch.zeros(4, 1, 2, 2), Straight(), size=2)(0)["eps"].shape == (2, 1, 2, 2)
    assert batches(torch.zeros(4, 2), Straight(), size=2)(0)["eps"].dtype == torch.float32


def test_continuous_times_are_stratified_and_uniform():
    """One time in each of `size` equal parts of (0, 1), in random order; each place in the batch is uniform."""
    batch = batches(torch.zeros(16, 1), Straight(), size=16)
    t = torch.stack([batch(step)["t"] for step in range(2000)])
    assert t.dtype == torch.float32 and 0 < t.min() and t.max() < 1
    assert torch.equal((t.sort(1).values * 16).floor(), torch.arange(16.0).expand(2000, 16))
    for place in (0, 7, 15):
        assert stats.kstest(t[:, place].numpy(), "uniform").pvalue > 1e-4
    assert stats.kstest((t * 16 % 1).flatten().numpy(), "uniform").pvalue > 1e-4  # within a part too


@pytest.mark.parametrize("size", [5, 12, 32])
def test_chain_times_are_whole_and_uniform(size):
    """All of 1 … T equally often (chi-square at 1e-4), over whole batches and at each place; 0 never."""
    batch = batches(torch.zeros(size, 1), CHAIN, size=size)
    t = torch.stack([batch(step)["t"] for step in range(1500)])
    assert t.dtype == torch.int64 and t.min() == 1 and t.max() == CHAIN.T
    for times in (t.flatten(), t[:, 0], t[:, -1]):
        assert stats.chisquare(times.bincount(minlength=13)[1:].numpy()).pvalue > 1e-4
    if size == CHAIN.T:
        assert torch.equal(t.sort(1).values, torch.arange(1, 13).expand(1500, 12))


@pytest.mark.parametrize("u", [0.0, 1 - 2**-24])
def test_times_at_the_edge_of_the_random_numbers(u, monkeypatch):
    """The least and largest number that float32 generators give: no time is 0 or 1, where some rates are infinite."""
    monkeypatch.setattr(torch, "rand", lambda size, generator: torch.full((size,), u))
    t = batches(torch.zeros(128, 1), Straight(), size=128)(0)["t"]
    assert 0 < t.min() and t.max() < 1
    t = batches(torch.zeros(128, 1), CHAIN, size=128)(0)["t"]
    assert t.min() == 1 and t.max() == 12


def logit_normal(t: np.ndarray) -> np.ndarray:
    """The distribution function of 1/(1 + e^(−z)) with z standard normal."""
    return stats.norm.cdf(np.log(t) - np.log1p(-t))


def test_logit_normal_times():
    """Their logits are standard normal, at each place and within each of `size` parts of equal probability."""
    batch = batches(torch.zeros(16, 1), Straight(), size=16, times="logit-normal")
    t = torch.stack([batch(step)["t"] for step in range(2000)])
    assert t.dtype == torch.float32 and 0 < t.min() and t.max() < 1
    u = logit_normal(t.double().numpy())
    assert (np.sort(np.floor(16 * u)) == np.arange(16)).mean() > 0.9999  # up to rounding at an edge
    for place in (0, 7, 15):
        assert stats.kstest(t[:, place].double().numpy(), logit_normal).pvalue > 1e-4
    assert stats.kstest((16 * u % 1).flatten(), "uniform").pvalue > 1e-4
    inner = (t > 1 / (1 + math.e)) & (t < 1 / (1 + 1 / math.e))  # |z| < 1
    assert inner.double().mean().item() == pytest.approx(0.6827, abs=0.004)


@pytest.mark.parametrize("size", [5, 32])
def test_logit_normal_times_on_a_chain(size):
    """Whole numbers 1 … T, each with the probability of its part (t − 1, t]/T; chi-square at 1e-4."""
    batch = batches(torch.zeros(size, 1), CHAIN, size=size, times="logit-normal")
    t = torch.stack([batch(step)["t"] for step in range(1500)])
    assert t.dtype == torch.int64 and t.min() == 1 and t.max() == CHAIN.T
    inner = logit_normal(np.arange(1, 12) / 12)
    share = np.diff([0.0, *inner, 1.0])
    for times in (t.flatten(), t[:, 0], t[:, -1]):
        found = times.bincount(minlength=13)[1:].numpy()
        assert stats.chisquare(found, share * len(times)).pvalue > 1e-4


def test_kind_of_times_changes_nothing_else():
    """Samples, noises and labels are those of uniform times, and the times come in the same order."""
    x, y = torch.randn(50, 3), torch.arange(50) % 10
    one, two = (batches(x, Straight(), size=8, y=y, null=10, times=kind)(3) for kind in ("uniform", "logit-normal"))
    assert all(torch.equal(one[key], two[key]) for key in ("x0", "eps", "y"))
    np.testing.assert_allclose(logit_normal(two["t"].double().numpy()), one["t"], atol=1e-5)


@pytest.mark.parametrize("u", [0.0, 1 - 2**-24])
def test_logit_normal_times_at_the_edge_of_the_random_numbers(u, monkeypatch):
    """The least and largest number that float32 generators give: no time is 0 or 1."""
    monkeypatch.setattr(torch, "rand", lambda size, generator: torch.full((size,), u))
    t = batches(torch.zeros(128, 1), Straight(), size=128, times="logit-normal")(0)["t"]
    assert 0.004 < t.min() and t.max() < 0.996
    t = batches(torch.zeros(128, 1), CHAIN, size=128, times="logit-normal")(0)["t"]
    assert 1 <= t.min() and t.max() <= 12


def test_labels_are_dropped():
    """A tenth of them becomes the null label, anew in each epoch; the others stay with their samples."""
    x, y = torch.arange(100.0)[:, None], torch.arange(100) % 10
    batch = batches(x, Straight(), size=50, y=y, null=10)
    drawn = [batch(step) for step in range(400)]
    labels, truth = torch.cat([b["y"] for b in drawn]), torch.cat([b["x0"] for b in drawn])[:, 0].long() % 10
    dropped = labels == 10
    assert labels.dtype == torch.int64
    assert torch.equal(labels[~dropped], truth[~dropped])
    assert dropped.double().mean() == pytest.approx(0.1, abs=0.009)  # 4.2 standard deviations of 20,000 draws
    assert truth[dropped].bincount(minlength=10).min() > 120


@pytest.mark.parametrize(("drop", "expected"), [(0, [3] * 6), (0.0, [3] * 6), (1.0, [7] * 6)])
def test_no_and_all_labels_dropped(drop, expected):
    """Without dropping no null label is asked for."""
    null = 7 if drop else None
    batch = batches(torch.zeros(6, 1), Straight(), size=6, y=torch.full((6,), 3), drop=drop, null=null)
    assert batch(0)["y"].tolist() == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size must lie between 1 and the number of samples, 10; got 0"),
        ({"size": 11}, "size must lie between 1 and the number of samples, 10; got 11"),
        ({"size": 5, "y": torch.zeros(9), "null": 10}, "y must have one label for each of the 10 samples; got 9"),
        ({"size": 5, "y": torch.zeros(10)}, "null must be the null label"),
        ({"size": 5, "times": "normal"}, "times must be 'uniform' or 'logit-normal'; got 'normal'"),
        ({"size": 5, "times": None}, "times must be 'uniform' or 'logit-normal'; got None"),
    ],
)
def test_batches_check_their_arguments(options, message):
    """At the call, not at the first batch."""
    with pytest.raises(ValueError, match=message):
        batches(torch.zeros(10, 2), Straight(), **options)


# Several processes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_shares_are_disjoint_and_cover_the_batch(processes):
    """Each sample goes, with its time and label, to one process."""
    batch = {"x0": torch.arange(12.0)[:, None], "t": torch.arange(12) / 12, "y": torch.arange(12)}
    accelerators = [
        SimpleNamespace(num_processes=processes, process_index=rank, device="cpu") for rank in range(processes)
    ]
    shares = [training._share(batch, accelerator) for accelerator in accelerators]
    assert sorted(torch.cat([share["y"] for share in shares]).tolist()) == list(range(12))
    for share in shares:
        assert len(share["y"]) == 12 // processes
        assert torch.equal(share["x0"][:, 0], share["y"]) and torch.equal(share["t"] * 12, share["y"])


def test_shares_must_be_equal():
    """Gradients are averaged over processes: of unequal shares, samples would not count alike."""
    with pytest.raises(ValueError, match="length that 2 processes can share; got 5"):
        training._share({"x": torch.zeros(5)}, SimpleNamespace(num_processes=2, process_index=0, device="cpu"))


TINY = {
    "what": "a tiny DiT",
    "data": "mnist",
    "net": {"class": "DiT", "width": 16, "depth": 1, "heads": 2, "num_classes": 10},
    "path": {"class": "Cosine"},
    "predicts": "v",
    "steps": 4,
    "batch": 8,
    "seed": 3,
    "fit": {"precision": "float32"},
}


def tiny_recipe(folder: str) -> list[float]:
    """Train a tiny recipe on 500 images by the command line; the losses."""
    images, fits, fit = data.load("mnist", "test").select(range(500)), [], training.fit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipes, "RECIPES", {"tiny": TINY})
        patch.setattr(data, "load", lambda *_: images)
        patch.setattr(training, "fit", lambda *given, **options: fits.append(fit(*given, **options)) or fits[-1])
        cli.app(["train", "tiny", "--out", folder], standalone_mode=False)
    return fits[0].losses


def two_processes(folder: str) -> None:
    """Train in two processes: to the end, until one of the two is told to stop, and a recipe by the command line."""
    from accelerate import Accelerator

    assert Accelerator().num_processes == 2
    rank = Accelerator().process_index
    torch.manual_seed(rank)  # different first weights: those of the first process count
    model = nn.Linear(2, 1).double() if rank else linear()
    done = quick(model, draw=precise, lr=0.05)
    torch.save((model.state_dict(), done.ema.state_dict(), done.losses), f"{folder}/{rank}.pt")

    def draw(step):
        if step == STOP and rank == 1:
            signal.raise_signal(signal.SIGTERM)
        return precise(step)

    try:
        quick(linear(), draw=draw, lr=0.05, state=f"{folder}/state.pt")
    except KeyboardInterrupt as stop:
        Path(f"{folder}/{rank}.txt").write_text(str(stop))
    torch.save(tiny_recipe(f"{folder}/runs"), f"{folder}/recipe-{rank}.pt")


def test_two_launched_processes_equal_one(tmp_path):
    """By `accelerate launch` they share each batch; all that comes out is as from one process, also after a stop of one.

    Without a GPU the launcher has to be told by ACCELERATE_USE_CPU: its option --cpu starts one process, whatever the number asked.
    """
    script = tmp_path / "script.py"
    script.write_text(f"import test_training\ntest_training.two_processes({str(tmp_path)!r})\n")
    launch = "-m accelerate.commands.accelerate_cli launch --multi_gpu --num_processes 2 --num_machines 1".split()
    plain = "--mixed_precision no --dynamo_backend no --main_process_port 0".split()  # port 0: any that is free
    done = elsewhere(*launch, *plain, str(script), ACCELERATE_USE_CPU="true", HF_HOME=str(tmp_path / "hf"))
    assert done.returncode == 0, done.stderr
    model = linear()
    one = quick(model, draw=precise, lr=0.05)
    for rank in (0, 1):
        weights, average, values = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(weights, dict(model.state_dict()), rtol=0, atol=1e-12)
        torch.testing.assert_close(average, dict(one.ema.state_dict()), rtol=0, atol=1e-12)
        assert values == pytest.approx(one.losses, rel=1e-12)
        assert (tmp_path / f"{rank}.txt").read_text() == f"stopped after step {STOP + 1} of {STEPS}"
    resumed = linear()
    quick(resumed, draw=precise, lr=0.05, state=tmp_path / "state.pt")
    torch.testing.assert_close(resumed.weight, model.weight, rtol=0, atol=1e-12)
    expected = tiny_recipe(str(tmp_path / "alone"))
    for rank in (0, 1):
        assert torch.load(tmp_path / f"recipe-{rank}.pt") == pytest.approx(expected, rel=1e-5)
    assert sorted(file.name for file in (tmp_path / "runs").iterdir()) == ["tiny.json", "tiny.safetensors"]
    together, alone = (checkpoints.load("tiny", tmp_path / folder) for folder in ("runs", "alone"))
    torch.testing.assert_close(together.state_dict(), alone.state_dict(), rtol=0, atol=2e-3)  # stored in 16 bits
    assert together.card["scores"]["test loss"] == pytest.approx(alone.card["scores"]["test loss"], abs=2e-4)
