"""The references of homework 5 against other derivations: mixtures, Bayes point by point, quadrature, ODEs solved, the kernels."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from scipy.integrate import quad, solve_ivp
from torch.distributions import Normal, kl_divergence

from dgm_course import guidance, samplers
from dgm_course.grading.exercise import load
from dgm_course.homework import Affine
from dgm_course.paths import VP, Cosine, DiscretePath
from dgm_course.schedules import linear_betas
from dgm_course.toy import GaussianMixture

EXERCISES = load(Path(__file__).parent / "hw5.py")
REFERENCE = {name: exercise.reference for name, exercise in EXERCISES.items()}
CHAIN = DiscretePath([0.05, 0.1, 0.2, 0.15, 0.3, 0.25, 0.2, 0.35, 0.1, 0.3])
ABARS = CHAIN.alpha_bars


def near(actual, expected, tolerance=1e-10):
    actual, expected = (torch.as_tensor(value, dtype=torch.float64) for value in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tensor(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


# guided_v -------------------------------------------------------------------------------------------------------------

CORNERS = tensor([-1.5, -1.0], [-1.5, 1.2], [2.0, -1.0], [2.0, 1.2])


def corners(keep, weights):
    keep = list(keep)
    return GaussianMixture(CORNERS[keep], torch.diag(tensor(0.3, 0.2)).expand(len(keep), 2, 2), weights[keep])


def v_of(mixture, path, x, t):
    """From the score alone: ε = −σ s, x_0 = (x − σ ε)/α, v = α ε − σ x_0."""
    alpha, sigma = path.alpha(t), path.sigma(t)
    eps = -sigma * mixture.score(x, path, t)
    return alpha * eps - sigma * (x - sigma * eps) / alpha


def given_top(path, t, weights):
    """log p_t(top | x), by Bayes from densities."""
    top, everything = corners([1, 3], weights), corners(range(4), weights)
    share = weights[[1, 3]].sum() / weights.sum()
    return lambda x: top.log_prob(x, path, t) - everything.log_prob(x, path, t) + share.log()


@pytest.mark.parametrize("weights", [tensor(0.1, 0.2, 0.3, 0.4), tensor(0.45, 0.05, 0.05, 0.45)], ids=str)
@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_the_guided_v_says_the_score_with_both_pushes(weights, t):
    path, x = Cosine(), randn(6, 2)
    both, right = corners(range(4), weights), corners([2, 3], weights)
    point = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(given_top(path, t, weights)(point).sum(), point)
    alpha_bar = (path.alpha(t) ** 2).expand(6)
    v = REFERENCE["guided_v"](v_of(both, path, x, t), v_of(right, path, x, t), gradient, alpha_bar, 0.7, 1.9)
    score = (path.alpha(t) * (path.alpha(t) * x - path.sigma(t) * v) - x) / path.sigma(t) ** 2
    free = 1.7 * right.score(x, path, t) - 0.7 * both.score(x, path, t)
    near(score, free + 1.9 * gradient, 1e-9)


def test_for_independent_conditions_both_together_are_the_corner():
    path, t, x = Cosine(), 0.6, randn(6, 2)
    for weights, exact in ((tensor(0.12, 0.28, 0.18, 0.42), True), (tensor(0.45, 0.05, 0.05, 0.45), False)):
        point = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(given_top(path, t, weights)(point).sum(), point)
        parts = [v_of(corners(keep, weights), path, x, t) for keep in (range(4), [2, 3], [3])]
        v = REFERENCE["guided_v"](*parts[:2], gradient, (path.alpha(t) ** 2).expand(6), 0.0, 1.0)
        assert torch.allclose(v, parts[2], rtol=1e-8) == exact


def test_pure_noise_is_not_pushed_and_data_are_not_either():
    v, v_class, gradient = randn(2, 3), randn(2, 3, seed=1), randn(2, 3, seed=2)
    both = REFERENCE["guided_v"](v, v_class, gradient, tensor(0.0, 1.0), 0.5, 3.0)
    near(both, 1.5 * v_class - 0.5 * v)


# classifier_step ------------------------------------------------------------------------------------------------------

WANTED = torch.tensor([[1, 0, 1], [0, 1, 0], [0, 1, 1], [1, 1, 0]]).bool()


def bent(x, t):
    """Logits of 3 classes, not affine."""
    return torch.tanh(x @ randn(2, 3, seed=5) * (1 + 0.1 * t)) * 2 - randn(3, seed=6)


def log_any(x):
    p = bent(x, 6).exp()
    return ((p * WANTED).sum(1) / p.sum(1)).log()


@pytest.mark.parametrize(("s", "t"), [(2, 6), (5, 6), (0, 6)])
def test_the_step_is_the_posterior_with_x0_pushed_along_the_slope_at_x_t(s, t):
    x, x0, z = randn(4, 2), randn(4, 2, seed=1), randn(4, 2, seed=2)
    h = 1e-5
    slope = torch.stack(
        [(log_any(x + step) - log_any(x - step)) / (2 * h) for step in h * torch.eye(2).double()], dim=1
    )
    pushed = x0 + 1.7 * CHAIN.sigma(t) ** 2 / CHAIN.alpha(t) * slope
    mean, var = CHAIN.posterior(x, pushed, s, t)
    moved = REFERENCE["classifier_step"](bent, x, x0, WANTED, s, t, ABARS, 1.7, z)
    near(moved, mean + var.sqrt() * z, 1e-8)


@pytest.mark.parametrize(("s", "t"), [(2, 6), (0, 6)])
def test_on_a_mixture_the_step_is_that_of_the_wanted_components(s, t):
    """With scale 1 and the exact classifier, for two of the four corners; and the kernel says the same."""
    weights, x, z = tensor(0.1, 0.2, 0.3, 0.4), randn(5, 2), randn(5, 2, seed=1)
    each, whole, some = [corners([k], weights) for k in range(4)], corners(range(4), weights), corners([0, 3], weights)

    def logits(x, t):
        return torch.stack([one.log_prob(x, CHAIN, t) + weights[k].log() for k, one in enumerate(each)], dim=1)

    wanted = torch.tensor([True, False, False, True]).expand(5, 4)
    moved = REFERENCE["classifier_step"](logits, x, whole.denoiser(CHAIN)(x, t), wanted, s, t, ABARS, 1.0, z)
    mean, var = CHAIN.posterior(x, some.denoiser(CHAIN)(x, t), s, t)
    near(moved, mean + var.sqrt() * z)

    def log_prob(x, t):
        return logits(x, t)[:, [0, 3]].logsumexp(1) - logits(x, t).logsumexp(1)

    strong = guidance.classifier(whole.denoiser(CHAIN), CHAIN, log_prob, 2.5)
    kernel = samplers.ddpm_step(CHAIN, x, strong(x, t), t, s, variance="posterior", noise=z)
    moved = REFERENCE["classifier_step"](logits, x, whole.denoiser(CHAIN)(x, t), wanted, s, t, ABARS, 2.5, z)
    near(moved, kernel)


def test_pure_noise_gets_no_push():
    abars = torch.cat([ABARS, tensor(0.0)])
    x, x0, z = randn(4, 2), randn(4, 2, seed=1), randn(4, 2, seed=2)
    mean, var = DiscretePath(1 - abars[1:] / abars[:-1]).posterior(x, x0, 6, 11)
    near(REFERENCE["classifier_step"](bent, x, x0, WANTED, 6, 11, abars, 1.7, z), mean + var.sqrt() * z)


# guided_moments -------------------------------------------------------------------------------------------------------


def moments(w, times, chain=CHAIN, eta=0.0):
    return REFERENCE["guided_moments"](0.3, 1.4, 1.2, 0.5, tensor(*w), chain.alpha_bars, torch.tensor(times), eta)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_the_moments_are_those_of_the_kernels_samples(eta):
    """The last state is affine in the start and in each noise; the kernel is asked with one of them at a time."""
    data, label = GaussianMixture(tensor([0.3]), 1.4), GaussianMixture(tensor([1.2]), 0.5)
    times = [10, 7, 4, 3, 1]
    for w, mean, var, *_ in zip([0.5, 1.0, 3.0], *moments([0.5, 1.0, 3.0], times, eta=eta), strict=True):
        d = guidance.classifier_free(label.denoiser(CHAIN), data.denoiser(CHAIN), w)
        single = torch.cat([torch.zeros(1, 5), torch.eye(5)]).double()[:, :, None]  # none, then one at a time
        x = single[:, 0]
        for i, (t, s) in enumerate(itertools.pairwise(times)):
            x = samplers.ddim_step(CHAIN, x, d(x, t), t, s, eta, noise=single[:, i + 1])
        near(mean, x[0].squeeze())
        near(var, (x[1:] - x[0]).square().sum())
        if eta == 0:
            end = samplers.last(samplers.ddim(d, CHAIN, randn(5, 1), times))
            near(end, mean + var.sqrt() * randn(5, 1), 1e-9)  # increasing


@pytest.mark.parametrize("w", [0.0, 1.0, 2.0, 4.0])
def test_with_many_steps_they_solve_the_guided_ode(w):
    """In x̄ = x/α and ς = σ/α the ODE is dx̄/dς = ε̂, and for N(m, V) data ε̂ = ς(x̄ − m)/(V + ς²)."""
    chain = DiscretePath(linear_betas(4000))
    first, last = ((1 - chain.alpha_bars[t]).sqrt() / chain.alpha_bars[t].sqrt() for t in (4000, 0))

    def rate(sigma, y):
        return [sigma * ((1 - w) * (x - 0.3) / (1.4 + sigma**2) + w * (x - 1.2) / (0.5 + sigma**2)) for x in y]

    ends = tensor(0.0, 1.0) / chain.alpha_bars[4000].sqrt()
    zero, one = solve_ivp(rate, (first.item(), last.item()), ends, rtol=1e-10, atol=1e-10).y[:, -1]
    mean, var, *_ = moments([w], list(range(4000, -1, -1)), chain)
    near([mean.item(), var.item()], [zero, (one - zero) ** 2], 5e-3)
    near(var.item(), 1.4 ** (1 - w) * 0.5**w, 1e-2)  # the geometric mean
    if w in (0.0, 1.0):  # the plain models sample their own density, with and without new noise
        for eta in (0.0, 1.0):
            mean, var, *_ = moments([w], list(range(4000, -1, -1)), chain, eta)
            near([mean.item(), var.item()], [(0.3, 1.4), (1.2, 0.5)][int(w)], 2e-2)


@pytest.mark.parametrize("w", [2.0, 4.0])
def test_with_many_steps_and_all_noise_they_solve_the_reverse_sde(w):
    """In τ = ς² a step down multiplies by 1 − h/S and adds h, with 1/S = w/(V_y + τ) + (1 − w)/(V + τ)."""

    def rate(tau, y):
        pull = [(1 - w) / (1.4 + tau), w / (0.5 + tau)]
        drift = pull[0] * (y[0] - 0.3) + pull[1] * (y[0] - 1.2)
        return [drift, 2 * sum(pull) * y[1] - 1]

    chain = DiscretePath(linear_betas(4000))
    far = (1 / chain.alpha_bars[4000] - 1).item()
    start = [0.0, 1 / chain.alpha_bars[4000].item()]
    mean, var = solve_ivp(rate, (far, 0.0), start, rtol=1e-10, atol=1e-12, method="LSODA").y[:, -1]
    found = moments([w], list(range(4000, -1, -1)), chain, 1.0)
    near([found[0].item(), found[1].item()], [mean, var], 2e-2)


@pytest.mark.parametrize("w", [0.3, 1.0, 2.5])
def test_the_sharpened_density_is_the_product_normalised(w):
    place = torch.linspace(-15, 15, 20_001, dtype=torch.float64)
    data, label = (-0.5 * (place - mean) ** 2 / var for mean, var in ((0.3, 1.4), (1.2, 0.5)))
    weight = (data + w * (label - data)).softmax(0)
    mean = (weight * place).sum()
    _, _, sharp_mean, sharp_var = moments([w], [10, 5])
    near(sharp_mean, mean[None], 1e-8)
    near(sharp_var, (weight * (place - mean) ** 2).sum()[None], 1e-8)


def test_guided_samples_are_not_those_of_the_sharpened_density():
    chain = DiscretePath(linear_betas(1000))
    for eta in (0.0, 1.0):
        mean, var, sharp_mean, sharp_var = moments([3.0], list(range(1000, -1, -1)), chain, eta)
        assert mean > sharp_mean + 0.1 and var < 0.9 * sharp_var


# best_variance --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("V", [0.2, 1.0, 3.0])
@pytest.mark.parametrize("times", [[10, 6, 3, 0], [9, 8, 5, 4, 1, 0]], ids=str)
def test_for_gaussian_data_it_is_the_true_variance_of_the_step_back(V, times):
    """From the joint Gaussian of x_s and x_t."""
    a = ABARS[torch.tensor(times)]
    a_t, a_s = a[:-1], a[1:]
    var_t, var_s, cov = a_t * V + 1 - a_t, a_s * V + 1 - a_s, (a_t / a_s).sqrt() * (a_s * V + 1 - a_s)
    mse = V - a_t * V**2 / var_t
    variance, fraction, extra = REFERENCE["best_variance"](mse, torch.tensor(times), ABARS)
    near(variance, var_s - cov**2 / var_t)
    if V == 1.0:
        near(fraction[:-1], torch.ones(len(times) - 2))
        near(extra, torch.zeros(len(times) - 1))
    assert bool((fraction[:-1] > 1).all()) == (V > 1)


def test_no_other_variance_costs_less():
    """The KL divergence on average over errors ±√mse of x̂_0, of torch's two Gaussians."""
    times, mse = [10, 7, 3, 1, 0], tensor(0.8, 0.4, 0.2, 0.1)
    variance, _, extra = REFERENCE["best_variance"](mse, torch.tensor(times), ABARS)
    costs = []
    for (t, s), error, best in zip(itertools.pairwise(times[:-1]), mse, variance, strict=False):
        true, spread = CHAIN.posterior(tensor([0.3]), tensor([0.7]), s, t)

        def cost(var, t=t, s=s, error=error, true=true, spread=spread):
            guesses = [CHAIN.posterior(tensor([0.3]), tensor([0.7]) + sign * error.sqrt(), s, t)[0] for sign in (-1, 1)]
            q = Normal(true, spread.sqrt())
            return sum(kl_divergence(q, Normal(guess, var.sqrt())).item() for guess in guesses) / 2

        assert cost(best) < min(cost(0.97 * best), cost(1.03 * best))
        costs.append((cost(CHAIN.transition(s, t)[1]) - cost(best)) / math.log(2))
    wide, narrow = (
        Normal(tensor(0.0), CHAIN.sigma(1)),
        Normal(tensor(0.0), mse[-1].sqrt()),
    )  # of x_0 − x̂_0 in the last step
    costs.append(
        sum(narrow.log_prob(d) - wide.log_prob(d) for d in (mse[-1].sqrt(), -mse[-1].sqrt())).item() / 2 / math.log(2)
    )
    near(variance[-1], mse[-1])
    near(extra, costs, 1e-6)


def test_the_fraction_is_that_of_the_learned_variance():
    times, mse = [10, 6, 4, 1, 0], tensor(0.5, 0.4, 0.2, 0.1)
    variance, fraction, extra = REFERENCE["best_variance"](mse, torch.tensor(times), ABARS)
    for (t, s), v, best in list(zip(itertools.pairwise(times), fraction, variance, strict=True))[:-1]:
        near(CHAIN.log_variance(s, t, v.item()), best.log())
    clip = CHAIN.posterior(tensor([0.0]), tensor([0.0]), 1, 4)[1]
    near((fraction[-1] * (1 - ABARS[1]).log() + (1 - fraction[-1]) * clip.log()).exp(), variance[-1:].squeeze())


# exact_inversion ------------------------------------------------------------------------------------------------------


def wavy(x, t):
    """Some noise, not affine, that changes slowly enough with x."""
    return 0.8 * torch.sin(x + t) + 0.3 * x.mean(1, keepdim=True)


def down(x, times):
    """By the kernel."""
    d = lambda x, t: (x - CHAIN.sigma(t) * wavy(x, t)) / CHAIN.alpha(t)  # noqa: E731
    return samplers.last(samplers.ddim(d, CHAIN, x, times))


@pytest.mark.parametrize("times", [[1, 2, 5, 6, 10], [0, 3, 10], [4, 9]], ids=str)
def test_with_many_rounds_ddim_leads_back(times):
    x = randn(4, 3)
    up = REFERENCE["exact_inversion"](wavy, x, torch.tensor(times), ABARS, 200)
    near(down(up, times[::-1]), x, 1e-9)
    gaps = [
        (down(REFERENCE["exact_inversion"](wavy, x, torch.tensor(times), ABARS, rounds), times[::-1]) - x).abs().max()
        for rounds in (2, 5, 10, 20)
    ]
    assert all(after < before for before, after in itertools.pairwise(gaps)) and gaps[-1] < 0.05 * gaps[0]


def test_for_an_affine_noise_it_is_the_geometric_series():
    """y ← a x_s + c(k y + b) from y = x_s, in closed form."""
    model = Affine(torch.full((11,), 0.6, dtype=torch.float64), torch.arange(11).double() / 7)
    x, rounds = randn(3, 2), 4
    alpha, sigma = CHAIN.alpha(torch.tensor([3, 8])), CHAIN.sigma(torch.tensor([3, 8]))
    a = alpha[1] / alpha[0]
    c = sigma[1] - a * sigma[0]
    fixed = (a * x + c * 8 / 7) / (1 - 0.6 * c)
    near(
        REFERENCE["exact_inversion"](model, x, torch.tensor([3, 8]), ABARS, rounds),
        fixed + (0.6 * c) ** rounds * (x - fixed),
    )


def test_one_round_is_the_explicit_step_that_asks_x_s_at_t():
    x = randn(3, 2)
    eps = wavy(x, 8)
    x0 = (x - CHAIN.sigma(3) * eps) / CHAIN.alpha(3)
    near(
        REFERENCE["exact_inversion"](wavy, x, torch.tensor([3, 8]), ABARS, 1),
        CHAIN.alpha(8) * x0 + CHAIN.sigma(8) * eps,
    )


# sample_linear --------------------------------------------------------------------------------------------------------

LAMBDA = (ABARS / (1 - ABARS)).log() / 2


def test_it_is_exact_where_the_noise_is_a_straight_line_in_lambda():
    """On an irregular grid. A step from x_t: x_s/α_s = x_t/α_t − ∫ e^{−λ} ε(λ) dλ, by quadrature."""
    a, b, times = 0.7, -1.3, [10, 9, 5, 4, 1]
    x, alpha = randn(3, 2), ABARS.sqrt()
    found = REFERENCE["sample_linear"](lambda x, t: a + b * LAMBDA[t] + 0 * x, x, torch.tensor(times), ABARS)
    y = samplers.ddim_step(CHAIN, x, (x - CHAIN.sigma(10) * (a + b * LAMBDA[10])) / alpha[10], 10, 9)
    for t, s in itertools.pairwise(times[1:]):
        change, _ = quad(lambda lam: math.exp(-lam) * (a + b * lam), LAMBDA[t], LAMBDA[s], epsabs=1e-13)
        y = alpha[s] * (y / alpha[t] - change)
    near(found, y, 1e-9)


def test_known_mistakes_of_second_order_are_not_exact_there():
    """An order test would pass them; this is why the exercise asks for the exact integral."""
    times, x = torch.tensor([10, 9, 5, 4, 1]), randn(3, 2)
    answers = {"reference": REFERENCE["sample_linear"]}
    answers |= {name: wrong for name, (wrong, _) in EXERCISES["sample_linear"].mistakes.items()}
    right, *others = (answer(lambda x, t: LAMBDA[t] + 0 * x, x, times, ABARS) for answer in answers.values())
    same = [name for name, other in zip(list(answers)[1:], others, strict=True) if torch.allclose(right, other)]
    assert same == ["you let λ = ∞ into the formula", "you extended the line to λ = ∞"]  # they fail at the data only


def test_it_has_order_2_on_a_mixture():
    path = VP()
    mixture = GaussianMixture(tensor([-1.0, 0.5], [1.2, -0.3], [0.2, 1.4]), tensor(0.1, 0.3, 0.2))
    abars = path.alpha(torch.arange(1921, dtype=torch.float64) / 1920) ** 2

    def eps(x, t):
        return -path.sigma(t / 1920) * mixture.score(x, path, t / 1920)

    def ode(t, y):
        x = torch.from_numpy(y).reshape(-1, 2)
        f, g2 = path.drift(t), path.diffusion2(t)
        return (f * x - g2 / 2 * mixture.score(x, path, t)).numpy().ravel()

    x = randn(16, 2)
    start, end = 1600 / 1920, 160 / 1920
    exact = torch.from_numpy(solve_ivp(ode, (start, end), x.numpy().ravel(), rtol=1e-11, atol=1e-12).y[:, -1])
    gaps = []
    for steps in (45, 90, 180, 360):
        times = torch.arange(1600, 159, -1440 // steps)
        gaps.append((REFERENCE["sample_linear"](eps, x, times, abars).ravel() - exact).abs().mean())
    orders = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(gaps)]
    assert all(abs(order - 2) < 0.15 for order in orders[1:]), orders


def test_one_step_is_ddims_and_a_step_to_the_data_is_x0():
    x, eps = randn(3, 2), Affine(0.3 * torch.ones(11).double(), torch.arange(11).double() / 5)
    x0 = (x - CHAIN.sigma(8) * eps(x, 8)) / CHAIN.alpha(8)
    near(REFERENCE["sample_linear"](eps, x, torch.tensor([8, 3]), ABARS), samplers.ddim_step(CHAIN, x, x0, 8, 3))
    near(REFERENCE["sample_linear"](eps, x, torch.tensor([8, 0]), ABARS), x0)
    middle = REFERENCE["sample_linear"](eps, x, torch.tensor([8, 5, 3]), ABARS)
    end = (middle - CHAIN.sigma(3) * eps(middle, 3)) / CHAIN.alpha(3)
    near(REFERENCE["sample_linear"](eps, x, torch.tensor([8, 5, 3, 0]), ABARS), end)
