# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Homework 6: distillation
#
# The notebook [*Distillation*](../notebooks/08_distillation.ipynb) taught students to do in one evaluation what their teacher does in several. Its teachers took DDIM's steps, its targets were guesses of $x_0$, and its path was the cosine path from the data to the noise. Here you do without these comforts. You will practise
#
# - to say what a student must say, in any parameterisation and on any path;
# - to put any number of steps of a better solver into one;
# - to weigh an error in the units of the network;
# - to write the loss of a guided student so that it can be tested to the last digit;
# - to find which jumps a student must learn to be sampled with a given $\eta$;
# - to train a consistency function on a path that does not begin at the data.
#
# | | you write | points | difficulty | minutes |
# |---|---|---|---|---|
# | 1 | `network_target` | 2 | ●●○○○ | 15 |
# | 2 | `many_in_one` | 4 | ●●●●○ | 30 |
# | 3 | `network_weight` | 3 | ●●●○○ | 20 |
# | 4 | `guided_gradient` | 4 | ●●●○○ | 25 |
# | 5 | `jumps_for` | 3 | ●●●○○ | 20 |
# | 6 | `consistency_gradient` | 4 | ●●●●○ | 30 |
# | | | **20** | | **140** |
#
# **Symbols** are those of the lecture and of the README's [symbol ledger](../README.md#symbols): $t = 0$ is data, $x_t = \alpha_t x_0+\sigma_t\epsilon$, and of the two times of a step, $t$ is the noisier one and $s<t$ the other. New symbols are said where they first stand. You need pen and paper for all six.

# %% [markdown]
# ## How it works
#
# Replace each `raise NotImplementedError` by your code, and run the cell below it. `hw.check` tries your function on a few cases and says ✓, or ✗ and what differs (or · while nothing is written yet); some mistakes it knows by sight. When all is right, the cell goes on and draws a figure with *your* function.
#
# - **Keep names, arguments and results as they are asked for.** Work in as many cells as you like, and write helpers if you want them; the six functions are found by their names.
# - **Hidden cases count too.** In each exercise 1 point is for cases like those that you can try here, with other numbers. The rest is for cases you have not seen: other shapes, a batch of one, float64, the ends of a range.
# - **Leave inputs unchanged.** `x += 1` and functions that end in `_` change a tensor that is not yours.
# - **Results have the dtype of the samples**, unless said otherwise. Good practice: work out coefficients in float64, and cast them last.
# - **Write the formulas out.** The course's kernels that do the same (`distillation.step_x0`, `distillation.matching`, `path.convert`, …) are refused inside your functions. Your own earlier functions are welcome, and so is all of PyTorch.
# - **Limits, unless your instructor says otherwise:** 60 seconds for the notebook from top to bottom, 10 seconds for the cases of one exercise, 6 GB of memory. A notebook that takes longer than its 60 seconds is not graded at all, so delete slow cells before you hand in. (Figures are not drawn while it is graded.)
#
# Each exercise ends with a short question, which the minutes do not include. It carries no points, but it is where the thinking is. Answer it before you go on.
#
# **To hand in**, run all cells once more from the top, save, and hand in this file as it is.

# %%
import importlib.util

if importlib.util.find_spec("dgm_course") is None:  # Colab, or a fresh environment
    get_ipython().run_line_magic("pip", "install --quiet dgm-course")

# %%
import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from dgm_course import checkpoints, distillation, homework, samplers
from dgm_course.checks import claim
from dgm_course.denoisers import clipped
from dgm_course.paths import Cosine, Straight
from dgm_course.toy import GaussianMixture
from dgm_course.viz import plots, style

hw = homework.load("hw6")
g = torch.Generator().manual_seed(6)  # where all chance in the figures comes from

# %% [markdown]
# Wherever they stand, `alphas` and `sigmas` are tables of $\alpha_0, \dots, \alpha_T$ and $\sigma_0, \dots, \sigma_T$ in float64, of shape (T + 1,): a path, read at T + 1 times. Unless said otherwise **the path may be any**: $\alpha^2+\sigma^2$ need not be 1. What holds on every path: $\alpha/\sigma$ falls from each time to the next, $\alpha_0 = 1$ and $\sigma_0 = 0$ at the data, and $\alpha_T = 0$ is allowed at the last time.
#
# Samples have shape (B, …), whatever comes after B. Where **each sample of a batch has a number of its own**, the numbers have shape (B,), and cannot be multiplied with the samples as they are. This helper does it; you may use it wherever you like.


# %%
def per_sample(coefficient: Tensor, like: Tensor) -> Tensor:
    """A number for each sample, (B,), in the dtype of `like` and shaped to multiply it: (B, 1, …, 1)."""
    return coefficient.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def tables(path, steps: int) -> tuple[Tensor, Tensor]:
    """The path at steps + 1 times, from the data to the noise."""
    times = torch.arange(steps + 1, dtype=torch.float64) / steps
    return path.alpha(times), path.sigma(times)


# %% [markdown]
# The next cells of code serve the figures. Come back to them when you wonder what a figure shows.
#
# For exercises 2 and 5: the course's digit model is the teacher, clipped, asked for the digits 0 to 9. It predicts $v$ on the cosine path, and exercise 2 reads this path at 33 places. A student needs no training to look at what it would do: it lets the teacher walk, and says in one what the walk was.

# %%
digit_model = checkpoints.load("mnist-unet")
path, (alphas, sigmas) = digit_model.path, tables(digit_model.path, 32)


@torch.no_grad()
def guess(x, t):
    """The teacher's x̂_0 for ten images at a time between 0 and 1."""
    return clipped(digit_model)(x, t, y=torch.arange(10))


def guess_at(x, t):
    """The same at step t of 32."""
    return guess(x, t / 32)


def stops(first, last, steps):
    """A list of times from `first` down to `last`."""
    return torch.linspace(first, last, steps + 1).round().long()


# %%
def student_of(times, low, steps):
    """A student without a network, for a jump from each of the times to its low: so many DDIM steps of the teacher."""
    ends = dict(zip(times.tolist(), low.tolist(), strict=False))

    def student(x, t):
        stops = torch.linspace(float(t), ends[float(t)], steps + 1, dtype=torch.float64)
        end = samplers.last(samplers.ddim(guess, path, x, stops))
        return distillation.step_x0(path, x, end, stops[0].item(), stops[-1].item())

    return student


# %% [markdown]
# For exercise 4: networks small enough to be written down. For each class and each time they have four numbers, and say $v$ of a sample of class $y$ at time $t$, for the weight $w$, as
#
# $$v = (a+w\,b)\,x_t+c+w\,d,\qquad (a, b, c, d) = \theta_{\,\cdot\,, y, t}.$$
#
# The table `theta` has the shape (4, C + 1, T + 1). The last of its C + 1 rows, C, is the null label, "no class". For data that are Gaussian within each class such a network is not even a toy: with the right numbers it is the best there is.


# %%
def network_v(theta: Tensor, x: Tensor, t: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """What the small network says, (B, …).

    Arguments:
        theta: Its numbers, (4, C + 1, T + 1).
        x: Noisy samples, (B, …).
        t, y, w: Times and classes, int64 (B,), and weights, (B,); one for each sample.
    """
    a, b, c, d = theta[:, y, t]
    return per_sample(a + w * b, x) * x + per_sample(c + w * d, x)


# %%
class_mean, class_var = torch.tensor([[-0.5, 0.6], [0.05, 0.12]], dtype=torch.float64)  # two classes on the line
turn_a, turn_b = tables(Cosine(), 16)


def exact_teacher():
    """The numbers of the best network of this kind for the two classes, and for both together."""
    mean, var = class_mean.mean(), class_var.mean() + class_mean.var(correction=0)
    m, V = (torch.cat([both, one[None]])[:, None] for both, one in ((class_mean, mean), (class_var, var)))
    slope = turn_a * V / (turn_a**2 * V + turn_b**2)  # x̂_0 = slope·x_t + rest, and v = (α x_t − x̂_0)/σ
    rest = m - slope * turn_a * m
    theta = torch.stack([turn_a - slope, 0 * slope, -rest, 0 * slope]) / turn_b
    return theta.nan_to_num(0.0, 0.0, 0.0)  # at the data nobody asks


# %%
def class_batch(count):
    """Data of both classes, noise, times, labels and weights from 0 to 4."""
    y, t = torch.randint(2, (count,), generator=g), torch.randint(1, 17, (count,), generator=g)
    z, eps = torch.randn(2, count, 1, generator=g, dtype=torch.float64)
    x0 = class_mean[y][:, None] + class_var[y][:, None].sqrt() * z
    return x0, eps, t, y, 4 * torch.rand(count, generator=g, dtype=torch.float64)


def guided_samples(theta, w, y, two, steps, count=4000):
    """Mean and deviation of DDIM samples; with `two` evaluations in a step, or by a student that is told w."""
    x = torch.randn(count, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels, weights = torch.full((count,), y), torch.full((count,), w, dtype=torch.float64)
    for t, s in pairwise(torch.linspace(16, 0, steps + 1).round().long().tolist()):
        here = torch.full((count,), t)
        v = network_v(theta, x, here, labels, 0 * weights if two else weights)
        if two:
            v = (1 + w) * v - w * network_v(theta, x, here, torch.full((count,), 2), 0 * weights)
        x0, eps = turn_a[t] * x - turn_b[t] * v, turn_b[t] * x + turn_a[t] * v
        x = turn_a[s] * x0 + turn_b[s] * eps
    return torch.stack([x.mean(), x.std()])


# %% [markdown]
# For exercise 6: Gaussian data $\mathcal N(0.5, 0.3)$, on the cosine path from $t = 0.05$ on, read at 13 places. The teacher is exact.

# %%
late = torch.linspace(0.05, 1, 13, dtype=torch.float64)
late_a, late_b, bell = path.alpha(late), path.sigma(late), GaussianMixture(torch.tensor([[0.5]], dtype=torch.float64), 0.3)


def exact_denoiser(x, t):
    return bell.denoiser(path)(x, late[t])


def where_the_teacher_ends(x, t):
    """From place t, step by step, down to the place 0."""
    return samplers.last(samplers.ddim(bell.denoiser(path), path, x, late[: t + 1].flip(0)))


# %%
def where_the_path_ends(x, t):
    """The solution of the ODE: it keeps the share of the data to the left of each point."""
    return bell.quantile(bell.cdf(x, path, late[t]), path, late[0])


def where_the_student_ends(theta, x, t):
    x0 = path.convert(theta[0, t] * x + theta[1, t], x, late[t], given="v", to="x0")
    return samplers.ddim_step(path, x, x0, late[t], late[0])


torch.func.grad(torch.sum)(torch.ones(1))  # its first call loads for seconds: better here than inside your function

# %% [markdown]
# ## 1. What the student must say (2 points)
#
# ●●○○○ · 15 minutes · read again: sections 1.1 and 1.3 of notebook 08
#
# The teacher has led $x_t$ to $x_s$, in as many steps as it liked. The student is to go there in one DDIM step, $x_s = \alpha_s\tilde x_0+\sigma_s\tilde\epsilon$, and it sees $x_t = \alpha_t\tilde x_0+\sigma_t\tilde\epsilon$. These are two equations for what it has to have in mind, $\tilde x_0$ and $\tilde\epsilon$. What it has to *say* depends on what its network predicts, and that is always some
#
# $$r = c\,x_0+d\,\epsilon,$$
#
# with $(c, d) = (1, 0)$ for $x_0$, $(0, 1)$ for $\epsilon$, $(-\sigma_t, \alpha_t)$ for $v$ and $(\alpha'_t, \sigma'_t)$ for the velocity of $x_t$.
#
# It looks natural to work out $\tilde x_0$ first, and then $\tilde\epsilon = (x_s-\alpha_s\tilde x_0)/\sigma_s$. But $\sigma_s$ is small or 0 at the end of every sampler. (The public code at the end of the notebook's section 1.3 is another case. Its `sigma_s` is the $\sigma$ of $x_t$, the right one, and even so it may become tiny.) To divide by $\alpha_t$ fails at the other end.
#
# **Write** `network_target(xt, xs, alpha_t, sigma_t, alpha_s, sigma_s, of_x0, of_eps)`, which gives the $r$ that a student must say at $x_t$ to land in $x_s$.
#
# - `xt`, `xs`: (B, …), float32 or float64. `alpha_t`, `sigma_t`, `alpha_s`, `sigma_s`: float64, (B,), the numbers of each sample on **any path**, $\alpha_s\sigma_t>\alpha_t\sigma_s$. $\sigma_s = 0$ and $\alpha_t = 0$ are allowed, both at once too. `of_x0`, `of_eps`: $c$ and $d$ of each sample, float64, (B,).
# - Returns $r$, (B, …), in the dtype of `xt`.
#
# <details><summary>Hint</summary>
#
# Solve the two equations as a 2×2 system, by its determinant. Which products of α and σ can be 0 here, and which cannot? In $r$ collect what multiplies $x_t$, and what multiplies $x_s$.
#
# </details>


# %%
def network_target(
    xt: Tensor, xs: Tensor, alpha_t: Tensor, sigma_t: Tensor, alpha_s: Tensor, sigma_s: Tensor, of_x0: Tensor, of_eps: Tensor
) -> Tensor:
    """What a network that predicts of_x0 · x_0 + of_eps · ε must say at x_t for one DDIM step to lead to x_s.

    Arguments:
        xt, xs: States at both ends of the step, (B, …).
        alpha_t, sigma_t, alpha_s, sigma_s: The path at both ends, float64 (B,).
        of_x0, of_eps: What the network predicts, float64 (B,).
    """
    # BEGIN SOLUTION
    determinant = alpha_s * sigma_t - alpha_t * sigma_s
    from_xt = (of_eps * alpha_s - of_x0 * sigma_s) / determinant
    from_xs = (of_x0 * sigma_t - of_eps * alpha_t) / determinant
    return per_sample(from_xt, xt) * xt + per_sample(from_xs, xt) * xs
    # END SOLUTION


# %%
if hw.check(network_target):
    ends, off = 10 ** -torch.linspace(0.5, 6, 12, dtype=torch.float64), {"dividing by σ_s": [], "yours": []}
    x0, eps = torch.randn(2, 500, 2, generator=g, dtype=torch.float64)
    for s in ends.tolist():
        xt, xs = Cosine().perturb(x0, 0.6, eps).float(), Cosine().perturb(x0, s, eps).float()
        a_t, b_t, a_s, b_s = (f(u).item() for u in (0.6, s) for f in (Cosine().alpha, Cosine().sigma))
        mine = network_target(xt, xs, *(torch.full((500,), k, dtype=torch.float64) for k in (a_t, b_t, a_s, b_s, -b_t, a_t)))
        clean = (xs - b_s / b_t * xt) / (a_s - b_s / b_t * a_t)
        theirs = a_t * (xs - a_s * clean) / b_s - b_t * clean
        for v, found in zip((theirs, mine), off.values(), strict=True):
            found.append((v - (a_t * eps - b_t * x0)).abs().max())
    off = {name: torch.stack(found) for name, found in off.items()}
    claim("at σ_s below 1e-5 the division costs a factor of 1,000 and more", off["dividing by σ_s"][-1] > 1000 * off["yours"][-1])
    plots.curves(Cosine().sigma(ends), off, "σ_s", "largest error of v", logx=True, logy=True)

# %% [markdown]
# **What to see.** The largest error of the target $v$ over 1,000 numbers in float32, for steps from $t = 0.6$ down to ever cleaner $x_s$. Both formulas are the same on paper. One of them loses a digit whenever $\sigma_s$ loses one: $x_s$ is known to seven digits, and what it tells of the noise is in the last of them. (In float16, in which large networks often run, there are little more than three digits in all.)
#
# **Question.** On `Straight()`, with $\alpha = 1-t$ and $\sigma = t$, let the student predict the velocity, $(c, d) = (-1, 1)$. What does your formula become? And if the teacher makes several steps from $t$ to $s$: which mean of the teacher's own velocities is the target?
#
# <!-- BEGIN SOLUTION -->
# The determinant is $(1-s)\,t-(1-t)\,s = t-s$, the factor of $x_t$ is $(1-s+s)/(t-s)$, and that of $x_s$ is $-(t+1-t)/(t-s)$: the target is $(x_t-x_s)/(t-s)$, the slope of the chord. A DDIM step on this path is an Euler step, $x_m = x_t-(t-m)\,u$ with the teacher's velocity $u$. So the target is the mean of the teacher's velocities, weighted by the lengths of its steps in *time*. The student learns to take the straight way between two points of the teacher's curve, and a teacher whose paths are straight already has nothing to teach.
# <!-- END SOLUTION -->

# %% [markdown]
# ## 2. Many better steps in one (4 points)
#
# ●●●●○ · 30 minutes · read again: section 1.2 of notebook 08, section 3.3 of notebook 07
#
# Notebook 08 put any number of DDIM steps into one. But who would sample a teacher by DDIM, if 2M gets as far with fewer questions? Let the teacher go down a list of times $t_0>t_1>\dots>t_K$ by 2M. At each stop it makes a guess, $\hat x_i = \mathtt{teacher}(x_{t_i}, t_i)$. The step from $t_i$ to $t_{i+1}$ is DDIM's, with the guess replaced by
#
# $$D_i = \Bigl(1+\frac1{2r_i}\Bigr)\hat x_i-\frac1{2r_i}\hat x_{i-1},\qquad r_i = \frac{\lambda_{t_i}-\lambda_{t_{i-1}}}{\lambda_{t_{i+1}}-\lambda_{t_i}},\qquad\lambda = \log\frac\alpha\sigma .$$
#
# The student is as before: it makes **one DDIM step** from $t_0$ to $t_K$. What it must say is again a sum of the teacher's guesses, $\tilde x_0 = \sum_i w_i\,\hat x_i$, with weights that depend on the times and the path alone and sum to 1. But they are others.
#
# **Write** `many_in_one(teacher, x, times, alphas, sigmas)`, which gives the target and the weights.
#
# - `teacher`: a function of samples (B, …) and a time, a Python int, that returns $\hat x_0$, (B, …). It is asked K times.
# - `x`: the state at `times[0]`, (B, …), float32 or float64. `times`: int64, (K + 1,), descending, K ≥ 1, with steps of different lengths; the last may be 0. `alphas`, `sigmas`: any path.
# - $D_i = \hat x_i$ in the first step, which has no past; in a step to $\sigma = 0$, where $\lambda$ is infinite; and in the second step, if the first began at $\alpha = 0$ (there $1/r_1 = 0$).
# - Returns `(target, weights)`: $\tilde x_0$, (B, …), in the dtype of `x`, and $w_0, \dots, w_{K-1}$, float64, (K,).
#
# <details><summary>Hint 1</summary>
#
# First forget $\hat x_i$ and think in $D_i$. Divide a step by the σ of its end: what does it add to $x/\sigma$? Then add up the steps. If $\sigma_{t_K} = 0$, the last length is infinite. So multiply all lengths by $\sigma_{t_K}$ on paper, before it becomes 0: their ratios stay.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# Now put the guesses in. $\hat x_i$ stands in the $D$ of two steps: with $1+\frac1{2r_i}$ in its own, with $-\frac1{2r_{i+1}}$ in the next.
#
# </details>


# %%
def many_in_one(teacher: Callable, x: Tensor, times: Tensor, alphas: Tensor, sigmas: Tensor) -> tuple[Tensor, Tensor]:
    """What a student must say for one DDIM step to equal all its teacher's steps of 2M, and how much each guess counts.

    Arguments:
        teacher, x: (x, t) → x̂_0, with t a Python int, and the state at times[0], (B, …).
        times: int64 (K + 1,), descending.
        alphas, sigmas: The path, float64 (T + 1,).
    """
    # BEGIN SOLUTION
    a, b, h = alphas[times], sigmas[times], (alphas[times] / sigmas[times]).log().diff()
    places = torch.cat([b[-1] * a[:-1] / b[:-1], a[-1:]])  # σ of the last time, times α/σ
    shares = places.diff() / (places[-1] - places[0])
    back = torch.cat([0 * shares[:1], torch.where(b[2:] > 0, h[1:] / h[:-1], 0) / 2])
    weights, target, last = shares * (1 + back) - torch.cat([(shares * back)[1:], 0 * shares[:1]]), 0, 0
    for i, t in enumerate(times[:-1].tolist()):
        x0 = teacher(x, t)
        target = target + weights[i].item() * x0
        D = x0 + back[i].item() * (x0 - last)
        x, last = a[i + 1].item() * D + (b[i + 1] / b[i]).item() * (x - a[i].item() * D), x0
    return target, weights
    # END SOLUTION


# %%
if hw.check(many_in_one):
    start, counts = torch.randn(10, 1, 28, 28, generator=g), [1, 2, 4, 8, 16]
    said = [many_in_one(guess_at, start, stops(32, 0, k), alphas, sigmas)[0] for k in counts]
    plots.rows(said, labels=[f"K = {k}" for k in counts], title="what a student of one step must say about pure noise")
    half, _ = many_in_one(guess_at, start, stops(32, 16, 4), alphas, sigmas)
    one = path.alpha(0.5).float() * half + path.sigma(0.5).float() * start  # a DDIM step from α = 0, σ = 1
    end = samplers.last(samplers.dpm_solver_pp_2m(guess, path, start, torch.linspace(1, 0.5, 5)))
    claim("one DDIM step with your target ends where four steps of 2M do", torch.allclose(one, end, atol=1e-4))
    shares = {k: many_in_one(lambda x, t: x, half[0, 0], stops(24, 4, k), alphas, sigmas)[1] for k in (2, 4, 10)}
    claim("with 2 steps the first guess has a negative weight; with 10 none has", shares[2][0] < 0 < shares[10].min())
    places = {f"{k} steps": stops(24, 4, k)[:-1] / 32 for k in shares}
    plots.curves(places, dict(zip(places, shares.values(), strict=True)), "t of the guess", "weight")

# %% [markdown]
# **What to see.** Above: what a student of one step must say about the same pure noise, if its teacher makes K steps of 2M. For K = 1 it is nearly the mean of all digits of the class, whatever the noise is. For K = 16 it is one digit, and the noise decides which. Below: how much each guess counts, on the way from $t = \frac34$ to $\frac18$. The last counts for most, however many there are. With two or four long steps the one before it counts *against* what it says.
#
# **Question.** (a) Take two steps of equal length $h$ in $\lambda$, at neither end of the path. For which $h$ is the weight of the first guess negative? The teacher is clipped: do its targets stay in $[-1, 1]$? (b) Back to DDIM steps, and let teacher and student predict $v$ on a path with $\alpha^2+\sigma^2 = 1$. Is the student's target a mean of the teacher's two $v$, with weights that sum to 1? Take two steps of equal angle $\delta$, and use that a step turns: $x_s = \cos\delta\,x_t-\sin\delta\,v$.
#
# <!-- BEGIN SOLUTION -->
# (a) $r = 1$, and $u = e^\lambda$ grows by $u(e^h-1)$ in the first step and by $e^h$ times that in the second. The weight of the first guess is proportional to $1-\frac12e^h$, so it is negative for $h>\log2$: as soon as $\alpha/\sigma$ more than doubles in a step. Then the other weight is above 1, and the target may leave the range that all guesses stay in. (It has to be so. 2M itself leaves it, and the student does what 2M does. Clip the target, and it is another student.) (b) No. Two steps give $\cos^2\delta\,x_t-\cos\delta\sin\delta\,v_1-\sin\delta\,v_2$, and the one step $\cos2\delta\,x_t-\sin2\delta\,\tilde v$. So $\tilde v = \frac{\cos\delta\,v_1+v_2-\sin\delta\,x_t}{2\cos\delta}$: the weights $\frac12$ and $\frac1{2\cos\delta}$ sum to more than 1, and $x_t$ comes in. The two $v$ are measured at different angles, and the second has to be turned back to the first.
# <!-- END SOLUTION -->

# %% [markdown]
# ## 3. The weight, in the units of the network (3 points)
#
# ●●●○○ · 20 minutes · read again: section 3 of notebook 08
#
# A student's error in $\hat x_0$ gets the weight $\max(\mathrm{SNR}, \gamma)$, with $\mathrm{SNR} = \alpha^2/\sigma^2$ and the floor $\gamma = 1$ in the paper. Many training loops compute the squared error in what the network *says*, in $r = c\,x_0+d\,\epsilon$ of exercise 1. With which weight $w_r$ is it the same loss,
#
# $$w_r\,(r-\hat r)^2 = \max(\mathrm{SNR}, \gamma)\,(x_0-\hat x_0)^2\ ?$$
#
# While the network is wrong, $x_t$ stays what it is. So if $\hat x_0$ is off by some $\delta$, $\hat\epsilon$ is off as well, and $\hat r$ feels both.
#
# **Write** `network_weight(alpha, sigma, of_x0, of_eps, least)`, which gives $w_r$.
#
# - `alpha`, `sigma`, `of_x0`, `of_eps`: $\alpha, \sigma, c, d$ of each sample, float64, (B,), on **any path**. `least`: $\gamma\ge0$, a Python float.
# - Returns $w_r$, float64, (B,). Each sample has its own.
# - $\sigma = 0$ is allowed where the network says something about $\epsilon$. There SNR is infinite, and the error of $\hat x_0$ is 0 all the same, because $x_t$ gives $x_0$ away: $w_r$ is finite. $\alpha = 0$ is allowed where the network says something about $x_0$.
# - If for *any* sample $r$ is a multiple of $x_t$ ($\epsilon$ at $\alpha = 0$, $x_0$ at $\sigma = 0$), it says nothing that $x_t$ does not, and no finite weight makes the losses the same. Raise a `ValueError` whose message names `of_x0` and `of_eps`, whatever $\gamma$ is.
#
# <details><summary>Hint</summary>
#
# If $\hat x_0$ is off by $\delta$, by how much is $\hat\epsilon$ off, so that $\alpha\hat x_0+\sigma\hat\epsilon$ stays? Put both into $r$. Then multiply numerator and denominator of $w_r$ by $\sigma^2$: nothing is infinite any more.
#
# </details>


# %%
def network_weight(alpha: Tensor, sigma: Tensor, of_x0: Tensor, of_eps: Tensor, least: float) -> Tensor:
    """The weight of an error in of_x0 · x_0 + of_eps · ε that makes it one in x̂_0 with the weight max(SNR, least).

    Arguments:
        alpha, sigma: The path at the time of each sample, float64 (B,).
        of_x0, of_eps: What the network predicts, float64 (B,).
        least: The floor under the SNR.

    Raises:
        ValueError: If for any sample the network's output is a multiple of x_t.
    """
    # BEGIN SOLUTION
    lever = of_x0 * sigma - of_eps * alpha  # σ times what δ does to the output
    if (lever == 0).any():
        raise ValueError(f"of_x0 and of_eps must say more than x_t; got {of_x0.tolist()} and {of_eps.tolist()}")
    return (alpha**2).maximum(least * sigma**2) / lever**2
    # END SOLUTION


# %%
if hw.check(network_weight):
    t, one = torch.linspace(0.03, 0.97, 60, dtype=torch.float64), torch.ones(60, dtype=torch.float64)
    for route in (Cosine(), Straight()):
        a, b = route.alpha(t), route.sigma(t)
        outputs = {"x₀": (one, 0 * one), "ε": (0 * one, one), "v": (-b, a)}
        if isinstance(route, Straight):
            outputs["velocity"] = (-one, one)
        weights = {name: network_weight(a, b, *output, 1.0) for name, output in outputs.items()}
        name, uneven = type(route).__name__, {name: w.max() / w.min() for name, w in weights.items()}
        claim(f"{name}: the weight of v is the most even", min(uneven, key=uneven.get) == "v")
        claim(f"{name}: it changes by no more than a factor of 2", uneven["v"] < 2.001)
        plots.curves(t, weights, "t", f"weight on {name}", logy=True)

# %% [markdown]
# **What to see.** The weights that make one loss of four: what a network would have to be trained with to care for the same errors. For $x_0$ it rises without bound to the data, for $\epsilon$ to the noise. For $v$ it hardly changes, on either path, and for the velocity by a factor of 4 at most.
#
# **Question.** (a) On `Cosine()`, between which numbers does the weight of $v$ lie, and where is it smallest? What does a training loop do that takes the plain squared error of $v$? (b) With the weight you found, a network that predicts $\epsilon$ is trained for the same errors as the others. Why is it still no good as a student of one step, starting at $\alpha = 0$?
#
# <!-- BEGIN SOLUTION -->
# (a) With $\alpha^2+\sigma^2 = 1$ the lever of $v$ is $-\sigma^2-\alpha^2 = -1$, so the weight is $\max(\alpha^2, \sigma^2)$: between $\frac12$ in the middle, where SNR = 1, and 1 at both ends. The plain squared error of $v$ is the weight $1/\sigma^2 = \mathrm{SNR}+1$ of $\hat x_0$'s error. So it is the truncated SNR up to a factor between 1 and 2, without any weight in the code. (b) At $\alpha = 0$ the state *is* the noise. The perfect $\hat\epsilon$ is $x_t$ itself, and $\hat x_0 = (x_t-\hat\epsilon)/0$ says nothing; no weight can change that. Close to it, where the weight is finite, it is so large that it multiplies the network's smallest errors: to have $\hat x_0$ right to 0.1 at $\alpha = 0.001$, $\hat\epsilon$ must be right to 0.0001. A sampler with many steps forgives the first ones. A student of one step has no other.
# <!-- END SOLUTION -->

# %% [markdown]
# ## 4. A student that knows every weight (4 points)
#
# ●●●○○ · 25 minutes · read again: section 5.1 of notebook 08
#
# Guidance costs two evaluations in each step. In stage one, a student that is told $w$ learns to say both at once. A loss that runs is soon written; that it is *this* loss, with each sample's own $w$, label, time and weight, and with the target in the range where the teacher is sampled, is for a test to say. So you give the gradient and the loss, as exact functions of all that is random.
#
# Teacher and student are the small networks `network_v` of above. Both say $v$, on a path with $\alpha^2+\sigma^2 = 1$, so $\hat x_0 = \alpha x_t-\sigma v$. The teacher does not care for $w$: its $b$ and $d$ are 0. (These are numbers of the network; the $c, d$ of exercise 1 are others.) With the $w$ of Algorithm 2 of the guidance slides (0 is the plain conditional model; the slide of stage one has the same),
#
# $$\hat x_0^w = \mathrm{clip}\bigl((1+w)\,\hat x_0(x_t, y)-w\,\hat x_0(x_t, \emptyset)\bigr),\qquad L = \mathbb E\,\bigl[\max(\mathrm{SNR}, 1)\,\bigl(\hat x_0^{student}(x_t, y, w)-\hat x_0^w\bigr)^2\bigr].$$
#
# The mean is over samples *and* values, so that $L$ does not grow with the size of the images.
#
# **Write** `guided_gradient(theta, teacher, x0, eps, t, y, w, alphas, sigmas, limit)`, which gives the gradient of $L$, and $L$.
#
# - `theta`, `teacher`: the numbers of student and teacher, (4, C + 1, T + 1). `x0`, `eps`: data and noise, (B, …). `w`: (B,). All are float32, or all float64.
# - `t`, `y`: int64, (B,), with 1 ≤ t ≤ T and 0 ≤ y ≤ C. A sample may have the null label, C. `alphas`, `sigmas`: a path with $\alpha^2+\sigma^2 = 1$; $\alpha_T = 0$ is allowed. `limit`: a Python float, maybe infinite: clip holds the guided guess in [−limit, limit].
# - Returns `(gradient, loss)`: $\partial L/\partial\theta$, of the shape of `theta`, and $L$, of shape (). Neither is to carry a graph of its own.
#
# <details><summary>Hint 1</summary>
#
# `theta` comes without `requires_grad`, and is not yours to change: work with `theta.detach().clone().requires_grad_()`, and use `torch.autograd.grad(loss, leaf)`. The loss itself can then be detached.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# Two shapes of (B, …) and (B,) meet in four places: α, σ, $w$ in the target, and the weight. What does the student say of a sample with the null label, if all goes well?
#
# </details>


# %%
def guided_gradient(
    theta: Tensor, teacher: Tensor, x0: Tensor, eps: Tensor, t: Tensor, y: Tensor, w: Tensor, alphas: Tensor, sigmas: Tensor, limit: float
) -> tuple[Tensor, Tensor]:
    """The gradient of stage one's loss by the student's numbers, and the loss.

    Arguments:
        theta, teacher: Numbers of student and teacher, (4, C + 1, T + 1).
        x0, eps, t, y, w: Data and noise, (B, …); times, labels and weights of guidance, (B,).
        alphas, sigmas, limit: The path, float64 (T + 1,), and the bound on the guided guess.
    """
    # BEGIN SOLUTION
    alpha, sigma = per_sample(alphas[t], x0), per_sample(sigmas[t], x0)
    xt, null, strength = alpha * x0 + sigma * eps, torch.full_like(y, teacher.shape[1] - 1), per_sample(w, x0)
    tied, free = (alpha * xt - sigma * network_v(teacher, xt, t, label, 0 * w) for label in (y, null))
    aim = (tied + strength * (tied - free)).clamp(-limit, limit)
    leaf = theta.detach().clone().requires_grad_()
    gap = alpha * xt - sigma * network_v(leaf, xt, t, y, w) - aim
    snr = per_sample((alphas[t] / sigmas[t]) ** 2, x0)
    loss = (snr.clamp(min=1) * gap**2).mean()
    return torch.autograd.grad(loss, leaf)[0], loss.detach()
    # END SOLUTION


# %%
if hw.check(guided_gradient):
    taught, learner, losses = exact_teacher(), exact_teacher(), []
    optimizer = torch.optim.Adam([learner], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 500)
    for _ in range(500):
        learner.grad, loss = guided_gradient(learner, taught, *class_batch(512), turn_a, turn_b, math.inf)
        losses.append(loss)
        optimizer.step()
        schedule.step()
    weights, lines, apart = torch.arange(0, 4.1, 0.5), {}, []
    for y in (0, 1):
        theirs, mine = (
            torch.stack([guided_samples(numbers, w, y, two, 16) for w in weights.tolist()]).T
            for numbers, two in ((taught, True), (learner, False))
        )
        apart.append((mine - theirs).abs().max())
        lines |= {f"class {y}, teacher": theirs[0], f"class {y}, student": mine[0]}
    claim("16 evaluations of the student give the teacher's 32, in mean and deviation, to 0.02", max(apart) < 0.02)
    plots.curves(torch.arange(1, 501), {"loss": torch.stack(losses)}, "step of training", "loss", logy=True)
    plots.curves(weights, lines, "w", "mean of the samples")

# %% [markdown]
# **What to see.** Above: the loss falls by orders of magnitude. There is nothing to be averaged over, because the target is a function of what the student sees, and this student can represent it. (A loss against the data, or against noise, could never do so.) Below: the means of guided samples over $w$, from 32 evaluations of the teacher and from 16 of the student. The lines lie on each other.
#
# **Question.** (a) What would the student learn if it were not told $w$? (b) Without the clipping the target is a straight line in $w$. So one could do without telling $w$: let a network have two outputs, $\hat x_0(x_t, y)$ and $\hat x_0(x_t, y)-\hat x_0(x_t, \emptyset)$, and mix them afterwards with any $w$. That works for stage one. Why not for stage two, where two steps become one?
#
# <!-- BEGIN SOLUTION -->
# (a) The mean of the targets over the $w$ of the training: without clipping the target for the mean $w$, 2 here, whatever is asked for later. (b) In stage two the target is a mean of two guided guesses. The first, at $x_t$, is a straight line in $w$. But the second is made at $x_m$, to which the first has led, and so $x_m$ depends on $w$; the teacher's answer there is no straight line of $x_m$, and its factor $w$ comes once more. Each halving makes the target bend more in $w$: one number for each power of $w$ would not do, the network has to be told. (Clipping bends the target in stage one already.)
# <!-- END SOLUTION -->

# %% [markdown]
# ## 5. The student that a sampler needs (3 points)
#
# ●●●○○ · 20 minutes · read again: section 5.3 of notebook 08, section 2.1 of notebook 07
#
# Notebook 08 sampled students with fresh noise: from $t$ down to some $l$ by DDIM, and up again to $s$ by the forward process. That is a step of DDIM's family from $t$ to $s$, and for a student of jumps $\frac1N$ that is asked at all multiples of $\frac1{2N}$, $\eta$ came out near 1, but not at it. Now the other way round. Somebody wants to sample on a given list of times, and with a given $\eta$ in each step:
#
# $$x_s = \alpha_s\hat x_0+\sqrt{\sigma_s^2-\eta^2\tilde\beta}\;\hat\epsilon+\eta\sqrt{\tilde\beta}\,z,\qquad\tilde\beta = \sigma_s^2\,\Bigl(1-\frac{\tau_s}{\tau_t}\Bigr),\qquad\tau = \frac{\sigma^2}{\alpha^2} .$$
#
# You have to train the student for it. **Which jumps must it learn**, that is, where does $l$ lie for each step? And which $\eta$ is the largest that a step can have? (Above 1 nothing is wrong, as long as what stands under the first root is not negative.)
#
# The path is `Cosine()`: $\alpha = \cos\frac{\pi t}2$ and $\sigma = \sin\frac{\pi t}2$, with $t$ from 0 to 1.
#
# **Write** `jumps_for(eta, times)`, which gives the end of each jump, and the largest $\eta$ of each step.
#
# - `eta`: float64, (N,), at least 0: one for each step. `times`: float64, (N + 1,), descending. They may begin at 1 and end at 0.
# - Returns `(low, most)`: the times $l$ and the largest $\eta$, both float64, (N,).
# - In a step to $s = 0$ nothing is left to choose: $l = 0$. The formula for the largest $\eta$ has a value there, too; return it.
# - If any $\eta$ is above the largest of its step, in the step to 0 too, refuse it: raise a `ValueError` whose message names `eta`.
#
# <details><summary>Hint 1</summary>
#
# The way up multiplies the state by $\alpha_s/\alpha_l$, with the noise $\sigma_l\hat\epsilon$ in it. That is the old noise in $x_s$. The other way of writing it is the first root.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# Divide both by $\sigma_s$ and square: $\tau_l/\tau_s$ is all that is left of $l$. Then find the time from $\tau = \tan^2\frac{\pi t}2$. At $t = 1$ the tangent is a huge number in float64, and that does no harm.
#
# </details>


# %%
def jumps_for(eta: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """Where a student's jumps must end for DDIM with η on these times, on the cosine path; and the largest η.

    Arguments:
        eta: One for each step, float64 (N,).
        times: float64 (N + 1,), descending.

    Returns:
        The ends of the jumps and the largest η, both float64 (N,).

    Raises:
        ValueError: If an η is above the largest of its step.
    """
    # BEGIN SOLUTION
    tau = (math.pi / 2 * times).tan() ** 2
    room = 1 - tau[1:] / tau[:-1]  # β̃/σ_s²
    most = room**-0.5
    if (eta > most).any():
        raise ValueError(f"eta must be at most {most.tolist()}; got {eta.tolist()}")
    old = (1 - eta**2 * room).clamp(min=0)  # at the largest η, rounding may leave it just below 0
    return (tau[1:] * old).sqrt().atan() * 2 / math.pi, most
    # END SOLUTION


# %%
if hw.check(jumps_for):
    times, ends, gaps, drawn = torch.linspace(1, 0, 17, dtype=torch.float64), {}, [], {}
    for eta in (0.0, 0.5, 0.9, 1.0):
        ends[f"η = {eta:g}"], _ = jumps_for(torch.full((16,), eta, dtype=torch.float64), times)
    x, x0, z = torch.randn(3, 5, 2, generator=g, dtype=torch.float64)
    for (t, s), low in zip(pairwise(times[:-1].tolist()), ends["η = 0.5"].tolist(), strict=False):
        jump = samplers.overshoot_step(path, x, x0, t, low, s, z)
        gaps.append((jump - samplers.ddim_step(path, x, x0, t, s, 0.5, z)).abs().max())
    claim("down to your times and up again is DDIM with η = 0.5, in each step", max(gaps) < 1e-9)
    plots.curves(times[:-1], ends, "asked at t", "the jump ends at")
    start, times = torch.randn(10, 1, 28, 28, generator=g), torch.linspace(1, 0, 5, dtype=torch.float64)
    for eta, name in ((0.0, "η = 0"), (0.5, "η = 0.5"), (0.5, "again"), (1.0, "η = 1"), (1.0, "again, η = 1")):
        low, _ = jumps_for(torch.full((4,), eta, dtype=torch.float64), times)
        student = student_of(times, low, 4)
        drawn[name] = samplers.last(samplers.overshoot(student, path, start, times, low=low, generator=g))
    plots.rows(list(drawn.values()), labels=list(drawn), title="four evaluations of a student, from the same start")

# %% [markdown]
# **What to see.** Above: where the jumps end, for sixteen equal steps. With $\eta = 0$ each ends at the next time, as in DDIM. With $\eta = 1$ it goes about twice as far; and the first one goes all the way to the data. Below: digits in four evaluations, all from the same pure noise. The "student" is the teacher with four DDIM steps to a jump, so nothing is lost by training. The two draws with $\eta = 0.5$ differ in details from each other and from $\eta = 0$, those with $\eta = 1$ in more.
#
# **Question.** (a) Let the first step begin at $t = 1$, in pure noise, and $\eta = 1$. Where does the jump end, and what does this say about a student that is to be sampled like DDPM? (b) With the largest $\eta$ in each step, which sampler of notebook 08 is this? (c) Take a perfect student of the ODE, and its perfect teacher. Sample the teacher by DDIM with $\eta = 1$ in four steps, and the student by jumps with the same $\eta$. Both add the same noise in each step. Which of the two draws from $p_0$?
#
# <!-- BEGIN SOLUTION -->
# (a) $\tau_t$ is infinite, so $\tau_l = \tau_s\,(1-\eta^2) = 0$: it ends in the data. DDPM's first step forgets the pure noise but for what $\hat x_0$ says. So the student needs a one-step student inside it, for its very first answer. (b) Multistep consistency sampling: $\sigma_s^2 = \eta^2\tilde\beta$ leaves no old noise, all jumps end in the data, and $x_s = \alpha_s\hat x_0+\sigma_sz$. (c) The student. Its jump carries $p_t$ exactly to $p_l$, and the forward process carries $p_l$ exactly to $p_s$, in four steps or in one. The teacher puts $\mathbb E[x_0\mid x_t]$ into the same formula. But $q(x_s\mid x_t)$ is no Gaussian, and its variance is above $\tilde\beta$; only for short steps does that not matter (notebook 07, section 1.2). One formula, two meanings of $\hat x_0$.
# <!-- END SOLUTION -->

# %% [markdown]
# ## 6. Consistency, from a path that begins with noise (4 points)
#
# ●●●●○ · 30 minutes · read again: sections 6.1 and 6.2 of notebook 08
#
# A consistency function says where the path of the ODE from $x_t$ ends. It agrees with itself all along a path, and at the end it says the state itself. Agreement alone is easy to have: a function that always says 7 agrees with itself. The end is what ties it to the truth, so it had better be built in. In notebook 08 it came for free, since $\alpha x-\sigma v$ is $x$ where $\sigma = 0$. In practice one often stops a little above the data, at a time with $\sigma>0$: further down the slope of the ODE is made with a division by a tiny $\sigma$, and the teacher's errors grow with it. Let the table begin at such a time: **in this exercise $\sigma_0>0$**, and still $\alpha^2+\sigma^2 = 1$.
#
# The student's network says $v$, by two numbers for each time: $F(x, t) = \theta_{0, t}\,x+\theta_{1, t}$. Its consistency function is where **one DDIM step from $t$ to the time 0** would lead, if $F$ were the $v$:
#
# $$f_\theta(x, t) = c_{\text{skip}}(t)\,x+c_{\text{out}}(t)\,F(x, t).$$
#
# Find the two coefficients. They have to be such that $f_\theta(x, 0) = x$, whatever the network says. Then train it to agree with itself one step of the teacher further on:
#
# $$L = \mathbb E\,\bigl(f_\theta(x_t, t)-f_{\bar\theta}(x_s, s)\bigr)^2,\qquad x_s = \text{one DDIM step of the teacher from } x_t .$$
#
# $\bar\theta$ has the same numbers as $\theta$, and gets no gradient. The mean is over samples and values.
#
# **Write** `consistency_gradient(theta, teacher, xt, t, s, alphas, sigmas)`, which gives the gradient of $L$, and $L$.
#
# - `theta`: (2, T + 1). `xt`: (B, …). Both are float32, or both float64. `t`, `s`: int64, (B,), with 0 ≤ s < t ≤ T: each sample has a step of its own. `alphas`, `sigmas`: the path of this exercise, with $\sigma_0>0$ and $\alpha^2+\sigma^2 = 1$; $\alpha_T = 0$ is allowed.
# - `teacher`: a function of samples (B, …) and their times, int64 (B,), that returns $\hat x_0$, (B, …).
# - Returns `(gradient, loss)`: $\partial L/\partial\theta$, of the shape of `theta`, and $L$, of shape (). Neither is to carry a graph of its own.
#
# <details><summary>Hint 1</summary>
#
# From $v$ come $\hat x_0 = \alpha_t x-\sigma_t v$ and $\hat\epsilon = \sigma_t x+\alpha_t v$. At the time 0 the state is $\alpha_0\hat x_0+\sigma_0\hat\epsilon$. Collect; with angles you will recognise what you get.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# Write $f$ as a function of (numbers, x, t), and call it twice: with a leaf that requires a gradient, and with `theta` as it is. No special case is needed for $s = 0$.
#
# </details>


# %%
def consistency_gradient(
    theta: Tensor, teacher: Callable, xt: Tensor, t: Tensor, s: Tensor, alphas: Tensor, sigmas: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradient of the consistency loss by the student's numbers, and the loss.

    Arguments:
        theta, teacher: The student's numbers, (2, T + 1), and (x, t) → x̂_0, with t int64 (B,).
        xt, t, s: States at t, (B, …), and both ends of the teacher's step, int64 (B,), 0 ≤ s < t.
        alphas, sigmas: The path, float64 (T + 1,), with σ_0 > 0.
    """
    # BEGIN SOLUTION
    def f(numbers, x, time):
        turn_back, drift = alphas[time] * alphas[0] + sigmas[time] * sigmas[0], sigmas[time] * alphas[0] - alphas[time] * sigmas[0]
        v = per_sample(numbers[0, time], x) * x + per_sample(numbers[1, time], x)
        return per_sample(turn_back, x) * x - per_sample(drift, x) * v  # cos δ · x − sin δ · v
    x0 = teacher(xt, t)
    eps = (xt - per_sample(alphas[t], xt) * x0) / per_sample(sigmas[t], xt)
    xs = per_sample(alphas[s], xt) * x0 + per_sample(sigmas[s], xt) * eps
    learns = theta.detach().clone().requires_grad_()
    loss = (f(learns, xt, t) - f(theta.detach(), xs, s)).square().mean()
    return torch.autograd.grad(loss, learns)[0], loss.detach()
    # END SOLUTION


# %%
if hw.check(consistency_gradient):
    learner, shown = torch.zeros(2, 13, dtype=torch.float64), (1, 4, 8, 12)
    optimizer, ends, errors = torch.optim.Adam([learner], lr=0.03), torch.tensor([[-1.0], [1.0]], dtype=torch.float64), []
    goal = {t: where_the_teacher_ends(ends, t) for t in shown}
    for _ in range(400):
        t, (z, eps) = torch.randint(1, 13, (256,), generator=g), torch.randn(2, 256, 1, generator=g, dtype=torch.float64)
        xt = path.perturb(0.5 + 0.3**0.5 * z, late[t], eps)
        learner.grad, _ = consistency_gradient(learner, exact_denoiser, xt, t, t - 1, late_a, late_b)
        optimizer.step()
        errors.append(torch.stack([(where_the_student_ends(learner, ends, t) - goal[t]).abs().max() for t in shown]))
    errors = torch.stack(errors).clamp(min=1e-6).T
    learnt = [int((error > 0.01).nonzero().max()) for error in errors]
    claim("the nearer to the end of the path, the sooner a time is learnt, to 0.01", learnt == sorted(learnt) and learnt[-1] < 399)
    curves = {f"place {t}": error for t, error in zip(shown, errors, strict=True)}
    plots.curves(torch.arange(1, 401), curves, "step of training", "error of the student", logy=True)
    x, exact = torch.linspace(-2.5, 2.5, 21, dtype=torch.float64)[:, None], {f"exact, {t}": t for t in (2, 6, 12)}
    lines = {f"place {t}": where_the_student_ends(learner, x, t)[:, 0] for t in (2, 6, 12)}
    lines |= {name: where_the_path_ends(x, t)[:, 0] for name, t in exact.items()}
    plots.curves(x[:, 0], lines, "x", "where its path ends", colors=dict.fromkeys(exact, style.EXACT))

# %% [markdown]
# **What to see.** Above: how far the student is from where the teacher's own steps lead, at $x = \pm1$ and at four of the 13 places of the table. The wave of notebook 08, section 6.2, with a gradient instead of a perfect learner: the truth comes in at the place 0, where it is built in, and is carried from there to the noise. Place 1 is learnt first, place 12 last. None can be right before the one that it is compared with. Below: the student's answers in the end, and in black where the ODE's paths really end. The gap between them is not the student's fault. It is what twelve DDIM steps of the teacher miss, and no student of this loss can be better than they are.
#
# **Question.** (a) Suppose that the network said $f$ itself, without $c_{\text{skip}}$ and $c_{\text{out}}$. Which students have the loss 0? (b) Let the gradient flow into the target, too. In this training the loss then falls below 0.001 in 50 steps, where with the stopped gradient it is still more than ten times as large. Yet after those 50 steps the student is further off at the place 1 than yours is, by more than a factor of five. How can both be? Which of the two numbers would you watch?
#
# <!-- BEGIN SOLUTION -->
# (a) Every one that is constant along the teacher's paths: all constants, and any function of where the path ends. The loss asks for agreement alone. (b) The steps are short, so neighbours in time see nearly the same state, and a student of any smooth kind nearly agrees with itself: the loss is small whether it is right or not. With the gradient in both, the two sides of each pair move towards each other. That makes the loss fall fast, and it pulls the answers at the place 1 as much towards the wrong ones at 2 as those at 2 towards the right ones at 1; what is known at the end of the path is diluted. (At the places 8 and 12, where after 50 steps neither student is right, this one may even be the nearer.) With the stopped gradient information flows one way, from the end of the path upwards; a time that is right stays right. (Here both arrive in the end, for there is a student with the loss 0. A real network has none, and then it matters who gives way.) So watch what you want: here the errors against the teacher's ends, at all places, and for images the quality of samples. A consistency loss is comparable only with itself.
# <!-- END SOLUTION -->

# %% [markdown]
# ## Recap
#
# - A student's target is fixed by the two ends of its step. Solve them for $x_0$ and $\epsilon$ by the determinant, and nothing is divided by a σ or an α that may be 0.
# - Any number of linear steps is one, with a sum of the guesses whose weights sum to 1. After DDIM steps they are positive; after steps of 2M they need not be.
# - One error has a weight in the units of each network. $v$ needs hardly any, and $\epsilon$ one without bound: a student of one step cannot predict noise.
# - What is random goes into a loss as an argument; then the loss and its gradient can be tested to the last digit.
# - A jump that is too long, and noise to come back up, is a step of DDIM's family. The wanted $\eta$ says where the jump must end, and so what to train.
# - Agreement along a path is worth as much as its end. Build the end in, and let the gradient flow one way.
#
# **Pitfalls**
#
# - $s$ or $t$, and stops between them: each coefficient belongs to one of them, and the teacher's second question is about the state at the first stop.
# - $\alpha/\sigma$ for guesses of $x_0$, $\sigma/\alpha$ for guesses of $\epsilon$, time for velocities on `Straight()`.
# - The range belongs to the guided guess, not to each of the two it is made of, and not to a student in training.
# - A floor under SNR makes it larger. (Some weights for teachers have a ceiling instead.)
# - Each sample has its own $t$, $w$ and weight; the mean comes last.
#
# ## Hand in
#
# Restart the kernel, run all cells, and look for the six lines with ✓ and the name of a function. (The other lines with ✓ are claims about the figures.) Save, and hand in this file as it is: `hw6_distillation.ipynb`. Functions are found by name, so do not rename them. An exercise that you did not finish may stay as it is; it costs its own points and no others.
