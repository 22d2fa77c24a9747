"""The references of homework 6 against other derivations: the kernels, steps walked, differences, ODEs solved, Gaussians."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from scipy.integrate import solve_ivp

from dgm_course import distillation, samplers
from dgm_course.denoisers import clipped
from dgm_course.grading.exercise import load
from dgm_course.guidance import classifier_free
from dgm_course.homework import Affine
from dgm_course.paths import VE, VP, Cosine, Straight
from dgm_course.paths.base import GaussianPath
from dgm_course.toy import GaussianMixture

EXERCISES = load(Path(__file__).parent / "hw6.py")
REFERENCE = {name: exercise.reference for name, exercise in EXERCISES.items()}
PATHS = [Cosine(), Straight(), VE(sigma_max=8.0), VP()]
each_path = pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)


def near(actual, expected, tolerance=1e-10):
    actual, expected = (torch.as_tensor(value, dtype=torch.float64) for value in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tensor(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def grid(path, steps):
    times = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    return path.alpha(times), path.sigma(times)


def wavy(x, t):
    """Some denoiser, not affine."""
    return torch.tanh(1.3 * x + t) - 0.2 * x.mean(1, keepdim=True)


# network_target -------------------------------------------------------------------------------------------------------

T, S = tensor(0.9, 0.5, 1.0, 0.4), tensor(0.4, 0.1, 0.0, 0.0)


def forms(path, t):
    """(of_x0, of_eps) of what networks predict; the velocity by differences."""
    h = 1e-6
    low, high = (t - h).clamp(min=0), (t + h).clamp(max=1)
    velocity = [(f(high) - f(low)) / (high - low) for f in (path.alpha, path.sigma)]
    one, none = torch.ones_like(t), torch.zeros_like(t)
    return {"x0": (one, none), "eps": (none, one), "v": (-path.sigma(t), path.alpha(t)), "velocity": velocity}


def target_of(path, xt, xs, t, s, form):
    return REFERENCE["network_target"](xt, xs, path.alpha(t), path.sigma(t), path.alpha(s), path.sigma(s), *form)


@each_path
@pytest.mark.parametrize("quantity", ["x0", "eps", "v", "velocity"])
def test_the_target_is_that_of_the_kernels_converted(path, quantity):
    xt, xs = randn(4, 3), randn(4, 3, seed=1)
    x0 = distillation.step_x0(path, xt, xs, T, S)
    expected = path.convert(x0, xt, T, given="x0", to=quantity) if quantity != "x0" else x0
    near(target_of(path, xt, xs, T, S, forms(path, T)[quantity]), expected, 1e-5 if quantity == "velocity" else 1e-9)


@each_path
def test_a_student_that_says_it_lands_in_x_s(path):
    xt, xs = randn(4, 3), randn(4, 3, seed=1)
    v = target_of(path, xt, xs, T, S, forms(path, T)["v"])
    near(samplers.ddim_step(path, xt, path.convert(v, xt, T, given="v", to="x0"), T, S), xs, 1e-8)


def test_with_the_true_pair_it_is_the_truth_and_on_straight_lines_the_slope_of_the_chord():
    x0, eps = randn(4, 3), randn(4, 3, seed=1)
    for path in PATHS:
        xt, xs = path.perturb(x0, T, eps), path.perturb(x0, S, eps)
        near(target_of(path, xt, xs, T, S, (tensor(2, 2, 2, 2), tensor(-3, -3, -3, -3))), 2 * x0 - 3 * eps)
    xt, xs = randn(4, 3, seed=2), randn(4, 3, seed=3)
    one = torch.ones(4, dtype=torch.float64)
    near(target_of(Straight(), xt, xs, T, S, (-one, one)), (xt - xs) / (T - S)[:, None])


# many_in_one ----------------------------------------------------------------------------------------------------------


def walked(path, x, unit):
    """The guesses on the way of 2M, step by step with the kernel, and its end."""
    guesses, state, before = [], x, {}
    for t, s in itertools.pairwise(unit.tolist()):
        guesses.append(wavy(state, t))
        state = samplers.dpm_solver_pp_2m_step(path, state, guesses[-1], t, s, **before)
        before = {"x0_before": guesses[-1], "t_before": t}
    return guesses, state


@each_path
@pytest.mark.parametrize("times", [[10, 9, 5, 4, 1], [8, 7, 3, 0], [10, 8, 2, 0], [10, 0], [6, 5], [9, 4, 3]], ids=str)
def test_one_ddim_step_leads_where_the_teachers_steps_of_2m_do(path, times):
    x, unit = randn(5, 2), tensor(*times) / 10
    guesses, end = walked(path, x, unit)
    near(samplers.last(samplers.dpm_solver_pp_2m(wavy, path, x, unit)), end, 1e-8)
    tables = grid(path, 10)
    target, weights = REFERENCE["many_in_one"](lambda x, t: wavy(x, t / 10), x, torch.tensor(times), *tables)
    near(samplers.ddim_step(path, x, target, unit[0].item(), unit[-1].item()), end, 1e-8)
    near(weights.sum(), 1.0)
    near(target, torch.einsum("k,kbd->bd", weights, torch.stack(guesses)), 1e-8)


@each_path
def test_the_weights_are_what_a_change_of_one_guess_does(path):
    """The network is replaced by one that answers 1 at one of the times, and 0 else."""
    times, x = torch.tensor([9, 7, 6, 2]), torch.zeros(1, 1, dtype=torch.float64)
    found = [
        REFERENCE["many_in_one"](lambda x, t, hit=hit: torch.full_like(x, float(t == hit)), x, times, *grid(path, 10))
        for hit in times[:-1].tolist()
    ]
    near(torch.cat([target[0] for target, _ in found]), found[0][1])
    ends = [
        samplers.last(
            samplers.dpm_solver_pp_2m(
                lambda x, t, hit=hit: torch.full_like(x, float(abs(10 * t - hit) < 0.5)), path, x, times.double() / 10
            )
        )
        for hit in times[:-1].tolist()
    ]
    near([distillation.step_x0(path, x, end, 0.9, 0.2).item() for end in ends], found[0][1], 1e-8)


def test_one_step_and_two_from_pure_noise_are_those_of_ddim():
    x, (alphas, sigmas) = randn(5, 2), grid(Cosine(), 10)
    target, weights = REFERENCE["many_in_one"](wavy, x, torch.tensor([7, 2]), alphas, sigmas)
    near(target, wavy(x, 7))
    near(weights, [1.0])
    for times in ([10, 6, 2], [8, 5, 0]):
        target, _ = REFERENCE["many_in_one"](lambda x, t: wavy(x, t / 10), x, torch.tensor(times), alphas, sigmas)
        near(target, distillation.progressive_target(wavy, Cosine(), x, *(t / 10 for t in times)), 1e-8)


def test_equal_steps_in_lambda_longer_than_log_2_have_a_negative_weight():
    for h in (0.5, 0.69, 0.7, 1.0):
        lam = torch.arange(3, dtype=torch.float64).flip(0) * h - h
        alphas, sigmas = torch.sigmoid(2 * lam).sqrt(), torch.sigmoid(-2 * lam).sqrt()
        _, weights = REFERENCE["many_in_one"](wavy, randn(1, 1), torch.tensor([2, 1, 0]), alphas, sigmas)
        near(weights[0], (1 - math.exp(h) / 2) / (1 + math.exp(h)))


# network_weight -------------------------------------------------------------------------------------------------------


@each_path
@pytest.mark.parametrize("quantity", ["x0", "eps", "v", "velocity"])
def test_both_losses_are_the_same(path, quantity):
    """The kernel's weight on an error of x̂_0; the network's word is changed by the kernel's conversion."""
    t, x0, xt = tensor(0.3, 0.6, 0.9), randn(3, 2), randn(3, 2, seed=1)
    other = x0 + 0.1 * randn(3, 2, seed=2)
    said, wrong = (path.convert(x, xt, t, given="x0", to=quantity) if quantity != "x0" else x for x in (x0, other))
    weight = REFERENCE["network_weight"](path.alpha(t), path.sigma(t), *forms(path, t)[quantity], 1.0)
    loss = distillation.matching(lambda xt, t: other, xt, t, x0, distillation.truncated_snr(path, t))
    near((weight[:, None] * (said - wrong) ** 2).mean(), loss, 1e-6)


def test_the_weight_of_v_is_even_and_that_of_noise_is_not():
    path, t = Cosine(), torch.linspace(0, 1, 101, dtype=torch.float64)
    alpha, sigma = path.alpha(t), path.sigma(t)
    weight = REFERENCE["network_weight"](alpha, sigma, -sigma, alpha, 1.0)
    near(weight, torch.maximum(alpha**2, sigma**2))
    near([weight.min(), weight.max()], [0.5, 1.0])
    one, none = torch.ones_like(t), torch.zeros_like(t)
    inner = slice(0, -1)
    of_eps = REFERENCE["network_weight"](alpha[inner], sigma[inner], none[inner], one[inner], 1.0)
    assert of_eps.max() > 1000 and of_eps.min() >= 1
    for at, form in ((-1, (none, one)), (0, (one, none))):
        with pytest.raises(ValueError, match="of_x0.*of_eps"):
            REFERENCE["network_weight"](alpha[[at]], sigma[[at]], form[0][[at]], form[1][[at]], 1.0)


def test_at_the_data_it_is_the_limit():
    near_by, there = (
        REFERENCE["network_weight"](tensor(1.0), tensor(sigma), tensor(-0.7), tensor(1.3), 1.0) for sigma in (1e-9, 0.0)
    )
    near(there, near_by, 1e-7)
    near(there, [1 / 1.3**2])


# guided_gradient ------------------------------------------------------------------------------------------------------

LABELS, TIMES, WEIGHTS = (
    torch.tensor([0, 1, 2, 1, 0, 2]),
    torch.tensor([1, 3, 8, 4, 8, 5]),
    tensor(0.5, 2, 0, 4, 1, 3),
)


def said(theta, x, t, y, w):
    """v of the small network, sample by sample."""
    rows = []
    for i in range(len(x)):
        a, b, c, d = (theta[k, y[i], t[i]] for k in range(4))
        rows.append((a + w[i] * b) * x[i] + c + w[i] * d)
    return torch.stack(rows)


def small_networks():
    theta, teacher = randn(4, 3, 9, seed=3), randn(4, 3, 9, seed=4)
    teacher[[1, 3]] = 0
    return theta, teacher


def stage_one(theta, limit=1.0):
    _, teacher = small_networks()
    x0, eps = randn(6, 3), randn(6, 3, seed=1)
    tables = grid(Cosine(), 8)
    return REFERENCE["guided_gradient"](theta, teacher, x0, eps, TIMES, LABELS, WEIGHTS, *tables, limit)


def test_loss_and_gradient_are_those_of_the_kernels():
    theta, teacher = small_networks()
    path, unit = Cosine(), TIMES.double() / 8
    xt = path.perturb(randn(6, 3), unit, randn(6, 3, seed=1))
    leaf = theta.clone().requires_grad_()

    def x0_of(numbers, y, w):
        return lambda xt, t: path.convert(said(numbers, xt, TIMES, y, w), xt, t, given="v", to="x0")

    zero = 0 * WEIGHTS
    both = [x0_of(teacher, y, zero) for y in (LABELS, torch.full((6,), 2))]
    target = clipped(classifier_free(*both, 1 + WEIGHTS))(xt, unit)
    weight = distillation.truncated_snr(path, unit)
    expected = distillation.matching(x0_of(leaf, LABELS, WEIGHTS), xt, unit, target, weight)
    expected.backward()
    gradient, loss = stage_one(theta)
    near(loss, expected.item(), 1e-9)
    near(gradient, leaf.grad, 1e-9)
    assert not loss.requires_grad and not gradient.requires_grad and not theta.requires_grad


def test_the_gradient_is_what_differences_say():
    theta, h = small_networks()[0], 1e-6
    gradient, _ = stage_one(theta, limit=0.7)
    for place in ((0, 1, 3), (1, 0, 1), (2, 2, 8), (3, 1, 4), (1, 1, 5)):
        step = torch.zeros_like(theta)
        step[place] = h
        near(gradient[place], (stage_one(theta + step, 0.7)[1] - stage_one(theta - step, 0.7)[1]) / (2 * h), 1e-6)


def test_a_student_with_the_right_numbers_has_no_loss():
    """Unclipped, the guided v is a straight line in x_t and in w."""
    _, teacher = small_networks()
    push = teacher - teacher[:, -1:]
    theta = torch.stack([teacher[0], push[0], teacher[2], push[2]])
    gradient, loss = stage_one(theta, math.inf)
    near(loss, 0.0, 1e-20)
    near(gradient, torch.zeros_like(theta))


# jumps_for ------------------------------------------------------------------------------------------------------------

GRIDS = [[0.9, 0.7, 0.45, 0.2], [1.0, 0.8, 0.3, 0.0], [0.6, 0.5], [0.4, 0.0]]


@pytest.mark.parametrize("eta", [0.0, 0.4, 0.8, 0.97])
@pytest.mark.parametrize("times", GRIDS, ids=str)
def test_down_to_the_end_of_the_jump_and_up_again_is_ddim(eta, times):
    path, x, x0, z = Cosine(), randn(5, 2), randn(5, 2, seed=1), randn(5, 2, seed=2)
    low, most = REFERENCE["jumps_for"](torch.full((len(times) - 1,), eta, dtype=torch.float64), tensor(*times))
    for (t, s), end in zip(itertools.pairwise(times), low.tolist(), strict=True):
        jump = samplers.overshoot_step(path, x, x0, t, end, s, noise=z)
        near(jump, samplers.ddim_step(path, x, x0, t, s, eta=eta, noise=z), 1e-7)
    assert bool((most >= 1).all()) and bool((low <= tensor(*times[1:]) + 1e-12).all())


@pytest.mark.parametrize("times", [[0.9, 0.7, 0.45, 0.2], [0.6, 0.5, 0.1]], ids=str)
def test_with_all_new_noise_the_jump_ends_in_the_data_and_more_is_refused(times):
    times = tensor(*times)
    _, most = REFERENCE["jumps_for"](torch.zeros(len(times) - 1, dtype=torch.float64), times)
    path = Cosine()
    new = [path.bridge(s, t)[2].sqrt() for t, s in itertools.pairwise(times.tolist())]
    near(most * torch.stack(new), path.sigma(times[1:]))
    low, _ = REFERENCE["jumps_for"](most * (1 - 1e-13), times)
    assert low.max() < 1e-5
    for place in range(len(most)):
        with pytest.raises(ValueError, match="eta"):
            REFERENCE["jumps_for"](torch.where(torch.arange(len(most)) == place, 1.01 * most, 0.5), times)


def test_eta_1_goes_as_far_again_in_the_log_snr():
    path, times = Cosine(), tensor(0.9, 0.7, 0.5, 0.4)
    low, _ = REFERENCE["jumps_for"](torch.ones(3, dtype=torch.float64), times)
    near(path.logsnr(low) - path.logsnr(times[1:]), path.logsnr(times[1:]) - path.logsnr(times[:-1]), 1e-9)
    near(REFERENCE["jumps_for"](tensor(1.0), tensor(0.625, 0.5))[0], [0.375])


def test_a_perfect_students_samples_have_the_datas_variance_and_its_teachers_have_not():
    """Data N(0, V): the ODE multiplies deviations; up again adds noise. The teacher puts its mean into DDIM's formula."""
    V, path, times = 0.3, Cosine(), torch.linspace(1, 0, 5, dtype=torch.float64)
    low, _ = REFERENCE["jumps_for"](torch.full((4,), 0.9, dtype=torch.float64), times)
    spread = lambda t: path.alpha(t) ** 2 * V + path.sigma(t) ** 2  # noqa: E731
    student = teacher = tensor(1.0)
    for (t, s), end in zip(itertools.pairwise(times.tolist()), low.tolist(), strict=True):
        up = path.alpha(s) / path.alpha(end)
        student = up**2 * student * spread(end) / spread(t) + path.sigma(s) ** 2 - up**2 * path.sigma(end) ** 2
        new = 0.9**2 * path.bridge(s, t)[2]
        old = (path.sigma(s) ** 2 - new).sqrt()
        gain = path.alpha(t) * V / spread(t)
        slope = path.alpha(s) * gain + old * (1 - path.alpha(t) * gain) / path.sigma(t)
        teacher = slope**2 * teacher + new
    near(student, [V])
    assert abs(teacher.item() / V - 1) > 0.1


# consistency_gradient -------------------------------------------------------------------------------------------------


class Late(GaussianPath):
    """A quarter turn that begins at an angle, with noise."""

    def _alpha(self, t):
        return torch.sin((math.pi / 2 - 0.2) * (1 - t))

    def _sigma(self, t):
        return torch.cos((math.pi / 2 - 0.2) * (1 - t))


LATE = Late()


def student_of(theta, steps):
    """x → the end of one DDIM step by its v, with the kernels; at the time 0, x itself."""

    def f(x, t):
        index = (t * steps).round().long()
        v = theta[0, index, None] * x + theta[1, index, None]
        x0 = LATE.convert(v, x, t, given="v", to="x0")
        above = t > 0
        moved = samplers.ddim_step(LATE, x, x0, torch.where(above, t, 1.0), torch.zeros_like(t))
        return torch.where(above[:, None], moved, x)

    return f


def agreement(theta, t, s, xt, steps=8):
    return REFERENCE["consistency_gradient"](
        theta, lambda x, t: wavy(x, t[:, None] / steps), xt, t, s, *grid(LATE, steps)
    )


def test_loss_and_gradient_of_consistency_are_those_of_the_kernels():
    theta, xt = randn(2, 9, seed=3), randn(5, 3)
    t, s = torch.tensor([8, 5, 3, 1, 8]), torch.tensor([6, 4, 0, 0, 1])
    leaf = theta.clone().requires_grad_()
    f = student_of(leaf, 8)
    teacher = lambda x, t: wavy(x, t[:, None])  # noqa: E731
    target = distillation.consistency_target(f, teacher, LATE, xt, t / 8, s / 8)
    expected = distillation.matching(f, xt, t / 8, target)
    expected.backward()
    gradient, loss = agreement(theta, t, s, xt)
    near(loss, expected.item(), 1e-9)
    near(gradient, leaf.grad, 1e-9)
    assert not loss.requires_grad and not gradient.requires_grad


def test_the_gradient_is_that_of_the_student_alone():
    """By differences, at a time at which no target is asked; where both ends are asked, the loss changes by more."""
    theta, xt, h = randn(2, 9, seed=3), randn(4, 3), 1e-6
    t, s = torch.tensor([8, 6, 6, 4]), torch.tensor([6, 4, 2, 0])
    gradient, _ = agreement(theta, t, s, xt)

    def difference(place):
        step = torch.zeros_like(theta)
        step[place] = h
        return (agreement(theta + step, t, s, xt)[1] - agreement(theta - step, t, s, xt)[1]) / (2 * h)

    for row in (0, 1):
        near(gradient[row, 8], difference((row, 8)), 1e-7)
        assert abs(gradient[row, 6] - difference((row, 6))) > 1e-3
        near(gradient[row, [0, 1, 2, 3, 5, 7]], torch.zeros(6))


def test_for_gaussian_data_and_short_steps_the_exact_function_has_no_loss():
    """f = F_0⁻¹∘F_t is a straight line, which the student can say; against the ODE, solved."""
    steps, m, V = 4000, 0.5, 0.3
    one, (alphas, sigmas) = GaussianMixture(tensor([m]), V), grid(LATE, 4000)
    spread = (alphas**2 * V + sigmas**2).sqrt()
    slope = spread[0] / spread
    rest = alphas[0] * m - slope * alphas * m
    angle = torch.atan2(sigmas, alphas) - torch.atan2(sigmas[0], alphas[0])
    theta = torch.stack([(angle.cos() - slope) / angle.sin(), -rest / angle.sin()]).nan_to_num(0, 0, 0)

    def velocity(u, y):
        x = torch.tensor(y, dtype=torch.float64)[:, None]
        x0 = one.denoiser(LATE)(x, min(max(u, 0.0), 1.0))
        eps = (x - LATE.alpha(u) * x0) / LATE.sigma(u)
        turn = math.pi / 2 - 0.2
        return (turn * (LATE.alpha(u) * eps - LATE.sigma(u) * x0))[:, 0].numpy()

    x = randn(7, 1)
    end = solve_ivp(velocity, (1 - 1e-12, 0.0), x[:, 0].numpy(), rtol=1e-10, atol=1e-10).y[:, -1]
    near(slope[-1] * x[:, 0] + rest[-1], torch.from_numpy(end), 1e-6)
    t = torch.tensor([4000, 3000, 2000, 1000, 500, 50, 1])
    gain = alphas * V / spread**2
    _, loss = REFERENCE["consistency_gradient"](theta, Affine(gain, m - gain * alphas * m), x, t, t - 1, alphas, sigmas)
    assert loss < 1e-12
    constant = torch.stack([1 / angle.tan(), -7 / angle.sin()]).nan_to_num(0, 0, 0)  # always says 7, but at the end
    _, agrees = REFERENCE["consistency_gradient"](
        constant, Affine(gain, m - gain * alphas * m), x[:-1], t[:-1], t[:-1] - 1, alphas, sigmas
    )
    assert agrees < 1e-12 and steps == len(alphas) - 1


def test_the_student_says_x_at_the_time_0_whatever_its_numbers_are():
    """So the target of a step to 0 is x_0 of the teacher's step, and the loss has no number of the time 0 in it."""
    theta, xt, t = randn(2, 9, seed=3), randn(3, 2), torch.tensor([8, 4, 1])
    other = theta.clone()
    other[:, 0] += 5
    first, second = (agreement(numbers, t, torch.zeros(3).long(), xt)[1] for numbers in (theta, other))
    near(first, second, 1e-14)
