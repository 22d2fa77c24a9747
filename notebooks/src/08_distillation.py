# ---
# jupyter:
#   jupytext:
#     formats: notebooks//ipynb,notebooks/src//py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Distillation: from a thousand steps to a few
#
# The last notebook made do with fewer evaluations of a given network. This one trains a *new* network, a student, that needs fewer still: eight, four, two, one. At the end of it you will be able to
#
# - derive, line by line, what a student must say for one of its steps to equal two of its teacher's, and read the answer as a mean;
# - catch three faults of public distillation code, by an identity that is broken or by the size of what comes out;
# - halve sixteen steps down to one, exactly where the teacher is known, and with networks that you train here;
# - say which question a student answers, and why it is no longer "what is the mean of $x_0$?";
# - choose the weight of the loss, and say why a student must not predict noise;
# - put guidance into one evaluation, with its weight as an input, and sample such students with fresh noise;
# - derive the consistency function in one dimension, and say what its training has to carry from where to where;
# - measure what a student saves, and name what it loses.
#
# **Time:** three hours to read, with pen and paper; it runs in less than a minute on one core.
# **It builds on** [notebook 07](07_fast_sampling.ipynb): DDIM's step, orders, and counting evaluations; and on [notebook 06](06_guidance.ipynb): classifier-free guidance and its two weights.
# **Symbols** are those of the lecture; the README's [symbol ledger](../README.md#symbols) lists them all. $\alpha_t$ and $\sigma_t$ are short for $\alpha(t)$ and $\sigma(t)$.

# %%
import importlib.util

if importlib.util.find_spec("dgm_course") is None:  # Colab, or a fresh environment
    get_ipython().run_line_magic("pip", "install --quiet dgm-course")

# %%
import math
from itertools import pairwise

import sympy
import torch

from dgm_course import checkpoints, data, distillation, guidance, measures, nets, samplers, tables, toy, training
from dgm_course.checks import claim, show_source
from dgm_course.denoisers import Denoiser, clipped
from dgm_course.metrics import precision_recall
from dgm_course.paths import Cosine, DiscretePath
from dgm_course.schedules import linear_betas
from dgm_course.viz import plots, style, widgets

g = torch.Generator().manual_seed(0)  # where nearly all chance comes from
double, path = torch.float64, Cosine()


# %%
def normal(*shape):
    return torch.randn(*shape, generator=g, dtype=double)


# %% [markdown]
# ## 1. One step that equals two
#
# ### 1.1 The target, line by line
#
# The slide "Knowledge Distillation" has three lines. Train a teacher, a diffusion model like any other. Transfer its knowledge to a student, such that *one step of the student is equivalent to two steps of the teacher*. Make the student the teacher, and go back. After $k$ rounds a sampler of $2^k$ steps has become one of a single step.
#
# What does "equivalent" ask of the student? It should end at the same point. Two ends can be compared point by point only if nothing in the steps is random. So the steps here are DDIM's with $\eta = 0$. From $t$ to $s$, with the guess $\hat x_0 = \hat x_0(x_t, t)$:
#
# $$x_s = \alpha_s\,\hat x_0+\frac{\sigma_s}{\sigma_t}\,(x_t-\alpha_t\,\hat x_0).$$
#
# The teacher goes from $t$ to a time $m$ in between, and from $m$ to $s$, with $s<m<t$. It makes two guesses on its way, $\hat x_a = \hat x_0(x_t, t)$ and $\hat x_b = \hat x_0(x_m, m)$:
#
# $$x_m = \alpha_m\hat x_a+\frac{\sigma_m}{\sigma_t}(x_t-\alpha_t\hat x_a),\qquad x_s = \alpha_s\hat x_b+\frac{\sigma_s}{\sigma_m}(x_m-\alpha_m\hat x_b).$$
#
# The student has one step and one guess $\tilde x_0$ to get to the same $x_s$. *A step of DDIM is linear in its guess. So it can be solved for the guess.* Collect the terms:
#
# $$x_s = \frac{\sigma_s}{\sigma_t}\,x_t+\Bigl(\alpha_s-\frac{\sigma_s}{\sigma_t}\,\alpha_t\Bigr)\tilde x_0\qquad\Longleftrightarrow\qquad\tilde x_0 = \frac{x_s-(\sigma_s/\sigma_t)\,x_t}{\alpha_s-(\sigma_s/\sigma_t)\,\alpha_t}.$$
#
# That is the **target** of progressive distillation (Salimans and Ho). The student is trained to say $\tilde x_0$ at $(x_t, t)$.
#
# *The formula has an $x_t$ in it. Before you run the next cell: does the target depend on $x_t$, once the two guesses are given?*

# %%
a_t, a_m, a_s = sympy.symbols("alpha_t alpha_m alpha_s", positive=True)
s_t, s_m, s_s = sympy.symbols("sigma_t sigma_m sigma_s", positive=True)
XT, A, B = sympy.symbols("x_t x_a x_b")


def ddim(x, guess, a, s, a_to, s_to):
    """A step of DDIM in symbols, from α = a, σ = s to a_to, s_to."""
    return a_to * guess + s_to / s * (x - a * guess)


XM = ddim(XT, A, a_t, s_t, a_m, s_m)
XS = ddim(XM, B, a_m, s_m, a_s, s_s)
target = (XS - s_s / s_t * XT) / (a_s - s_s / s_t * a_t)
claim("one step with the target ends where the two end", sympy.simplify(ddim(XT, target, a_t, s_t, a_s, s_s) - XS) == 0)
claim("given the two guesses, the target has no x_t in it", sympy.simplify(sympy.diff(target, XT)) == 0)

# %%
show_source(distillation.progressive_target)

# %% [markdown]
# Now with numbers. Four Gaussians in the plane are our data; their ideal denoiser is known (`toy.GaussianMixture`), and it is the teacher. The path is the cosine path, here and in the whole notebook.

# %%
means = torch.tensor([[-1.3, -0.5], [-0.5, 1.1], [1.2, 0.9], [0.9, -1.0]], dtype=double)
variances = torch.tensor([0.03, 0.02, 0.04, 0.02], dtype=double)
mixture = toy.GaussianMixture(means, variances, torch.tensor([0.3, 0.2, 0.25, 0.25]))
teacher = mixture.denoiser(path)  # E[x_0 given x_t], exactly

for t, m, s in ((1.0, 0.9, 0.8), (0.6, 0.35, 0.3), (0.2, 0.1, 0.0)):
    xt = path.perturb(mixture.sample(500, g), t, normal(500, 2))
    xm = samplers.ddim_step(path, xt, teacher(xt, t), t, m)
    two = samplers.ddim_step(path, xm, teacher(xm, m), m, s)
    said = distillation.progressive_target(teacher, path, xt, t, m, s)
    off = (samplers.ddim_step(path, xt, said, t, s) - two).abs().max()
    claim(f"from {t} over {m} to {s}: one step is two steps, to 1e-12", off < 1e-12)

# %% [markdown]
# Note what did *not* matter: how long the two steps are, and where the path begins or ends. At $t = 1$ there is no signal, $\alpha_t = 0$. At $s = 0$ there is no noise, $\sigma_s = 0$. The formula stands at both.
#
# ### 1.2 A mean of the teacher's guesses
#
# The target has no $x_t$ in it, so it is made of the two guesses alone. How? Divide DDIM's step by $\sigma_s$, for $s>0$, and write $u = \alpha/\sigma$:
#
# $$\frac{x_s}{\sigma_s} = \frac{x_t}{\sigma_t}+(u_s-u_t)\,\hat x_0,\qquad u = \frac\alpha\sigma.$$
#
# A step of DDIM adds to $x/\sigma$ the guess times the length of the step in $u$. It is Euler's rule for $\dfrac{d(x/\sigma)}{du} = \hat x_0$, the twin of notebook 07, section 2.3, which had $x/\alpha$, $\sigma/\alpha$ and $\hat\epsilon$. (The letter $u$ was a velocity in notebook 05. Here it is a clock: $u = e^\lambda$ with notebook 07's $\lambda$, half the log-SNR. So $u^2$ is the signal-to-noise ratio, and $u$ grows on the way from noise to data, from 0 to infinity.)
#
# Two steps of the teacher add $(u_m-u_t)\,\hat x_a+(u_s-u_m)\,\hat x_b$. One step of the student has to add the same, and it adds $(u_s-u_t)\,\tilde x_0$. So
#
# $$\tilde x_0 = \frac{(u_m-u_t)\,\hat x_a+(u_s-u_m)\,\hat x_b}{u_s-u_t}.$$
#
# **The target is the mean of the teacher's guesses, weighted by the lengths of its steps in $u$.** Three things follow at once.
#
# - *Any number of steps.* $K$ steps of the teacher in one of the student: the mean of $K$ guesses, with the same kind of weights. Two is a choice.
# - *The range.* The weights are positive and sum to 1. If the teacher's guesses are clipped to $[-1, 1]$, so is the target.
# - *The limit.* With $K\to\infty$ it is $\int\hat x_0\,du\big/(u_s-u_t)$ along a path of the probability-flow ODE, for $0<s<t$.

# %%
u_t, u_m, u_s = a_t / s_t, a_m / s_m, a_s / s_s
mean = ((u_m - u_t) * A + (u_s - u_m) * B) / (u_s - u_t)
claim("the target is the mean with the weights of u", sympy.simplify(target - mean) == 0)
pieces = sympy.symbols("x_1:6")  # five guesses
alphas, sigmas = sympy.symbols("alpha_0:6", positive=True), sympy.symbols("sigma_0:6", positive=True)
x = XT
for i, guess in enumerate(pieces):
    x = ddim(x, guess, alphas[i], sigmas[i], alphas[i + 1], sigmas[i + 1])
keep = sigmas[5] / sigmas[0]
five = sympy.expand((x - keep * XT) / (alphas[5] - keep * alphas[0]))
u = [a / s for a, s in zip(alphas, sigmas, strict=True)]
mean = sum((u[i + 1] - u[i]) * guess for i, guess in enumerate(pieces)) / (u[5] - u[0])
claim("and so it is for five steps in one", sympy.simplify(five - mean) == 0)

# %% [markdown]
# A picture of it: one coordinate of the teacher's guess for one point, over the clock $u$, on the way from $t = 0.9$ to $s = 0.3$. Between two evaluations the guess is held, so it is a staircase. The student has one stair only. The area under both must be the same, for the area is what is added to $x/\sigma$. *Move the number of the teacher's steps. What does the student's height tend to?*

# %%
where = path.perturb(means[2:3], 0.9, torch.tensor([[0.5, -0.9]], dtype=double))


def stairs(steps):
    """The teacher's guesses on a grid of times, u on that grid, and the target for all its steps in one."""
    times = torch.linspace(0.9, 0.3, steps + 1, dtype=double)
    guesses, x = [], where
    for t, s in pairwise(times.tolist()):
        guesses.append(teacher(x, t))
        x = samplers.ddim_step(path, x, guesses[-1], t, s)
    student = distillation.step_x0(path, where, x, 0.9, 0.3)
    return torch.cat(guesses)[:, 0], path.alpha(times) / path.sigma(times), student


# %%
def staircase(steps):
    guesses, u, student = stairs(steps)
    made, (ax,) = plots.panels(1, width=6.4, height=3.4)
    ax.stairs(guesses, u, color=style.DATA, linewidth=2, fill=False, baseline=None)
    ax.stairs(guesses, u, color=style.DATA, alpha=0.15, fill=True)
    ax.plot(u[[0, -1]], student[0, 0].expand(2), color=style.MODEL, linewidth=2)
    ax.text(u[-1] + 0.03, student[0, 0], "student", color=style.MODEL, va="center")
    ax.text(u[-1] + 0.03, guesses[-1], "teacher", color=style.DATA, va="bottom" if steps > 1 else "top")
    ax.set(xlabel="u = α/σ", ylabel="guess of the first coordinate", ylim=(0, 1.35), xlim=(0.1, 2.25))
    return made


# %%
for steps in (2, 5, 64):
    guesses, u, student = stairs(steps)
    gap = ((u.diff() * guesses).sum() - (u[-1] - u[0]) * student[0, 0]).abs()
    claim(f"{steps} steps: both areas are equal, to 1e-12", gap < 1e-12)
    claim("  and the target lies between the guesses", guesses.min() <= student[0, 0] <= guesses.max())
widgets.explore(staircase, steps=([1, 2, 4, 8, 16, 64], 4))

# %% [markdown]
# The more often the teacher is asked, the earlier it notices to which Gaussian this point goes. The student's height settles near the mean of the smooth curve. It is *not* what the teacher believes in the end, nor what it believes at the start: a student at $t = 0.9$ must say what its teacher will have believed on average, over $u$.
#
# **On the cosine path, half way.** With $\theta = \frac\pi2t$ we have $\alpha = \cos\theta$, $\sigma = \sin\theta$, and $u = \cot\theta$. A difference of cotangents is $\cot\theta_m-\cot\theta_t = \sin(\theta_t-\theta_m)/(\sin\theta_m\sin\theta_t)$. If $m$ lies half way between $s$ and $t$, the two differences have the same sine on top. Below it stands $\sigma_m\sigma_t$ in the first and $\sigma_s\sigma_m$ in the second. So the weights are as $1/\sigma_t$ to $1/\sigma_s$, that is as $\sigma_s$ to $\sigma_t$:
#
# $$\tilde x_0 = \frac{\sigma_s\,\hat x_a+\sigma_t\,\hat x_b}{\sigma_s+\sigma_t}.$$
#
# The second guess has the larger weight, for $\sigma_t>\sigma_s$. At $s = 0$ it has all the weight: **the target of the last step is the teacher's second guess**, and this needs no special case in the code. Nor does anything divide by $\sigma_s$.

# %%
theta_s, theta_t = sympy.symbols("theta_s theta_t", positive=True)
half = (theta_s + theta_t) / 2
first = (sympy.cot(half) - sympy.cot(theta_t)) / (sympy.cot(theta_s) - sympy.cot(theta_t))
short = sympy.sin(theta_s) / (sympy.sin(theta_s) + sympy.sin(theta_t))
numbers = [(0.3, 1.2), (0.01, 0.02), (1.4, math.pi / 2)]
off = [abs(sympy.N((first - short).subs({theta_s: a, theta_t: b}))) for a, b in numbers]
claim("half way: the first guess has the weight σ_s/(σ_s + σ_t), at three pairs of angles, to 1e-12", max(off) < 1e-12)
xt = path.perturb(mixture.sample(500, g), 0.25, normal(500, 2))
second = teacher(samplers.ddim_step(path, xt, teacher(xt, 0.25), 0.25, 0.125), 0.125)
said = distillation.progressive_target(teacher, path, xt, 0.25, 0.125, 0.0)
claim("s = 0: the target is the second guess, to 1e-12", (said - second).abs().max() < 1e-12)

# %% [markdown]
# ### 1.3 Three faults of public code
#
# > **Spot the bug.** The paper calls our $m$ and $s$ by $t'$ and $t''$. A public draft of this algorithm had the two swapped. Swap them in all its formulas. Then the first step goes all the way from $t$ to $s$; the teacher is asked there; the second step goes from $s$ *up* to $m$; and the target is solved for a step that ends at $m$. *Read the mean of 1.2 with $m$ and $s$ swapped. Which weights do the two guesses get?*


# %%
def swapped(x, t, m, s):
    """progressive_target with m and s exchanged, by hand: the kernel refuses it."""
    x_s = samplers.ddim_step(path, x, teacher(x, t), t, s)
    second = teacher(x_s, s)
    x_m = path.alpha(m) * second + path.sigma(m) / path.sigma(s) * (x_s - path.alpha(s) * second)
    return distillation.step_x0(path, x, x_m, t, m)


def ends_of(target, low=0.02, steps=8):
    """Where a student with this target ends: `steps` steps from 1 to just above 0 (at 0 the swapped one breaks)."""
    times, x = torch.linspace(1, low, 2 * steps + 1, dtype=double).tolist(), some_noise
    for t, m, s in zip(times[:-1:2], times[1::2], times[2::2], strict=True):
        x = samplers.ddim_step(path, x, target(x, t, m, s), t, s)
    return x


# %%
some_noise = normal(2000, 2)
right = ends_of(lambda x, t, m, s: distillation.progressive_target(teacher, path, x, t, m, s))
wrong = ends_of(swapped)
claim("swapped: the ends are off by more than 0.5 on average", (wrong - right).norm(dim=1).mean() > 0.5)
nearest = torch.cdist(wrong, means).argmin(1) != torch.cdist(right, means).argmin(1)
claim("a quarter of the points or more end at another Gaussian", nearest.double().mean() > 0.25)
claim("  and yet most end near one of the four", (torch.cdist(wrong, means).amin(1) < 0.5).double().mean() > 0.7)
u = [(path.alpha(t) / path.sigma(t)).item() for t in (1.0, 0.9375, 0.875)]
weights = [(u[2] - u[0]) / (u[1] - u[0]), (u[1] - u[2]) / (u[1] - u[0])]
claim("first of eight steps: the weights are 2.02 and −1.02", [round(w, 2) for w in weights] == [2.02, -1.02])
claim("at s = 0 it divides by σ_s = 0", not swapped(right, 0.25, 0.125, 0.0).isfinite().all())

# %% [markdown]
# The weights still sum to 1, but one is negative: the target is an *extrapolation*: at first about twice the first guess minus the second, and nearer to the data with still larger weights. It can leave the range of the data. And it turns the teacher's change of mind round: where the second guess moves one way from the first, the target moves the other way. Most ends still lie near some Gaussian, so a picture of samples would hardly tell. The identity of 1.1 does, at the first step. (Our kernel raises an error unless $s<m<t$.)
#
# > **Spot another.** A public implementation takes for the target the teacher's *second guess*, $\hat x_b$, at every step. By 1.2 this is right at $s = 0$. *What is it elsewhere? Is such a student worse than the right one?*


# %%
def second_guess(x, t, m, s):
    return teacher(samplers.ddim_step(path, x, teacher(x, t), t, m), m)


exact = samplers.last(samplers.dpm_solver_pp_2m(teacher, path, some_noise, torch.linspace(1, 0.02, 400, dtype=double)))
other = ends_of(second_guess)
off = {name: (x - exact).norm(dim=1).mean() for name, x in {"right": right, "second guess": other}.items()}
claim("not two steps in one: off the teacher's ends by more than 0.02", (other - right).norm(dim=1).mean() > 0.02)
claim("but they are nearer to the ODE's ends than the teacher's are", off["second guess"] < off["right"])

# %% [markdown]
# It is a fault against the definition: the student does not do what its teacher does. But a step to the middle, a look there, and then the whole step with what one saw, is the *midpoint rule*, a solver of second order like 2S of notebook 07. (Half way in $t$ is half way in $u$ up to a term of second order, and that is near enough.) So with an ideal teacher this student can end closer to the ODE than the teacher's own steps, and here it does. A student with the right target inherits the teacher's error of discretisation; this one trades it for another. (After one round the gift is used up: the next teacher is a student, and a student's guesses are no field to integrate. Section 2.2 says why.)
#
# > **And another.** In the same implementation the student predicts $v$, and the target is turned into $v$ by way of the noise, $\tilde\epsilon = (x_t-\alpha\,\tilde x_0)/\sigma$ and $\tilde v = \alpha\tilde\epsilon-\sigma\tilde x_0$. A user reports that the targets explode, where they should stay about as large as the data: the code divides by a `sigma_s` that may be as small as 0.01. *Which $\sigma$ belongs there, that of $t$ or that of $s$? What would the other one do? And is all well with the right one?* (In that code the letter s stands for the student, and `sigma_s` is the $\sigma$ of $x_t$.)

# %%
t, s = 0.0638, 0.00637  # σ_t = 0.1 and σ_s = 0.01: the last step of a student, if it stops just above the data
m = (t + s) / 2
xt = path.perturb(mixture.sample(5000, g), t, normal(5000, 2))
said = distillation.progressive_target(teacher, path, xt, t, m, s)
size = {at: ((xt - path.alpha(at) * said) / path.sigma(at)).square().mean().sqrt().item() for at in (t, s)}
claim("with α and σ of t, where x_t lives, the target's noise has a size below 1, as a guess of noise has", size[t] < 1)
claim("with those of s it is ten times as large, to 10 %", abs(size[s] / size[t] / 10 - 1) < 0.1)
slip = torch.full_like(said, 0.02)
noise_slip = ((xt - path.alpha(t) * (said + slip)) / path.sigma(t) - (xt - path.alpha(t) * said) / path.sigma(t)).abs()
claim("a slip of 0.02 in x̃_0 is one of 0.2 in the noise: divided by σ_t", (noise_slip.mean() - 0.2).abs() < 2e-3)

# %% [markdown]
# $x_t$ holds noise of size $\sigma_t$, so only $\sigma_t$ may divide it. Divided by $\sigma_s$, it is $\sigma_t/\sigma_s$ times too large, and without bound as $s\to0$. That code has the right one. But with the right $\sigma$, too, the division multiplies each slip of the target by $\alpha/\sigma$: from clipping, from float32, from the second guess in the place of the mean. The cure is to stay with $\tilde x_0$. As a mean of guesses it needs no division by a small number. How much a slip near the data shall count is then an open choice, that of a weight (section 3), and no accident of the conversion.
#
# ## 2. Sixteen, eight, four, two, one
#
# ### 2.1 The exact student
#
# If the teacher is known exactly, so is its student: the target itself, as a function of $x_t$ and $t$, *is* a denoiser. The next student is the target again, with this one as the teacher. No training is needed to see what a perfect one would do.


# %%
def halved(d, steps):
    """The exact student of d with so many steps, where d has twice as many."""
    h = 1 / steps
    return lambda x, t: distillation.progressive_target(d, path, x, t, t - h / 2, t - h)


exact_students = {16: teacher}
for steps in (8, 4, 2, 1):
    exact_students[steps] = halved(exact_students[2 * steps], steps)


def ways(d, steps, noise):
    """All states from the noise to the end, in so many steps of DDIM."""
    return [noise, *samplers.ddim(d, path, noise, path.times(steps))]


# %%
noise, asked = normal(400, 2), 0


def counted(x, t):
    global asked
    asked += 1
    return teacher(x, t)


# %%
taught = ways(teacher, 16, noise)[-1]
levels = (8, 4, 2, 1)
for i, steps in enumerate(levels):
    exact_student, asked = counted, 0
    for level in levels[: i + 1]:  # down from the teacher, which counts how often it is asked
        exact_student = halved(exact_student, level)
    off = (ways(exact_student, steps, noise)[-1] - taught).abs().max()
    claim(f"{steps} in place of 16 steps: the same ends, to 1e-10; the teacher is asked {asked} times", off < 1e-10)
gap = {n: (ways(teacher, n, noise)[-1] - taught).norm(dim=1).mean() for n in (8, 4, 2, 1)}
claim("the teacher itself with 4 steps is off by more than 0.1, with 1 by more than 1", gap[4] > 0.1 and gap[1] > 1)

# %% [markdown]
# The ends are the same at every level, and nothing is saved: the stacked student still asks the teacher sixteen times. **What there is to save is the asking.** A network has to *remember* the answers. That is all that training will do.
#
# Look at 40 paths from noise to data, over the data's density in blue. On the left are those of the exact student; with 16 steps it is the teacher itself. On the right the teacher is simply run with as few steps. *Before you move the slider: what will be left of a curved path after each halving? And where do the paths on the right end with one step?*

# %%
box = (-2.8, 2.8, -2.8, 2.8)


def paths_of(steps):
    made, axes = plots.panels(2, width=8.4, height=4.3)
    for ax, d, name in zip(axes, (exact_students[steps], teacher), ("student", "teacher"), strict=True):
        plots.density(lambda x: mixture.log_prob(x.double()), extent=box, resolution=100, ax=ax)
        word = f"{name}, {steps} step" + "s" * (steps > 1)
        plots.trajectories(ways(d, steps, noise[:40]), extent=box, ax=ax, title=word)
    return made


widgets.explore(paths_of, steps=([16, 8, 4, 2, 1], 2))


# %%
def lengths(steps):
    states = ways(exact_students[steps], steps, noise)
    return sum((b - a).norm(dim=1) for a, b in pairwise(states)).sum() / (states[-1] - states[0]).norm(dim=1).sum()


relative = [lengths(steps).item() for steps in (16, 8, 4, 2, 1)]
claim("each halving makes the paths shorter", all(a > b for a, b in pairwise(relative)))
claim("16 steps: 11 % longer than straight lines, to 2 %", abs(relative[0] - 1.11) < 0.02)
claim("1 step: straight lines", abs(relative[-1] - 1) < 1e-12)

# %% [markdown]
# Each halving leaves out every second corner. In the end there is one straight line from each noise to its sample: the same sample as with sixteen steps. The teacher, run with few steps, ends elsewhere. With one step it ends in a single point, the mean of the data, whatever the noise was.
#
# ### 2.2 What a student says
#
# That last remark deserves a second look. *At $t = 1$ there is no signal in $x_t$. So what can a denoiser know there?* The teacher says $\mathbb E[x_0\mid x_1] = \mathbb E[x_0]$: one answer for all noises. The student of one step, asked the same, names the point at which the path *ends*: a sample.

# %%
names = {16: "teacher", 4: "4 steps", 2: "2 steps", 1: "1 step"}
told = {name: exact_students[n](noise, 1.0) for n, name in names.items()}
claim("t = 1: the teacher says the data's mean for every noise", (told["teacher"] - mixture.mean).abs().max() < 1e-12)
claim("the student of 1 step says a sample: the teacher's end", (told["1 step"] - taught).abs().max() < 1e-10)
made, axes = plots.panels(4, width=10.4, height=3.0, share=True)
for ax, (name, said) in zip(axes, told.items(), strict=True):
    plots.density(lambda x: mixture.log_prob(x.double()), extent=(-2, 2, -2, 2), resolution=80, ax=ax)
    plots.scatter(said, color=style.MODEL, extent=(-2, 2, -2, 2), ax=ax, title=name)
    ax.label_outer()
made

# %% [markdown]
# All four are asked at $t = 1$ with the same 400 noises. From left to right the answer goes from a mean to a sample. **A student answers another question:** not "what is the mean of the $x_0$ behind this $x_t$?", but "with which $\hat x_0$ does *my* step end where my teacher ends?". Hence:
#
# - *No score.* By Tweedie's formula $\hat x_0$ gives the score only if it is $\mathbb E[x_0\mid x_t]$. With a student there is no ODE and no SDE in continuous time, no ancestral sampling, no Heun and no 2M, and no likelihood (section 7.2). Nor is there an $\eta$ to turn: fresh noise needs another way in (section 5.3).
# - *No other steps.* The answer belongs to a jump from $t$ to $s$. Asked at other times, or for a shorter jump, it is a wrong one.

# %%
quarter = exact_students[4]


def anywhere(x, t):
    """The exact student for jumps of 1/4 (or down to 0), at any t."""
    h = min(0.25, t)
    twice = lambda x, t: distillation.progressive_target(teacher, path, x, t, t - h / 4, t - h / 2)  # noqa: E731
    return distillation.progressive_target(twice, path, x, t, t - h / 2, t - h)


claim("at its own times it is the student of 4 steps", (anywhere(noise, 1.0) - quarter(noise, 1.0)).abs().max() < 1e-12)
more = {"DDIM in 4 steps": samplers.ddim(anywhere, path, noise, path.times(4))}
more |= {"DDIM in 8 steps": samplers.ddim(anywhere, path, noise, path.times(8))}
more |= {"Heun in 4 steps": samplers.heun(anywhere, path, noise, path.times(4))}
off = {name: (samplers.last(states) - taught).norm(dim=1).mean().item() for name, states in more.items()}
claim("4 steps, its own: exact, to 1e-10", off["DDIM in 4 steps"] < 1e-10)
claim("8 steps: off by more than 0.05, worse than the teacher with 8 steps", off["DDIM in 8 steps"] > max(0.05, gap[8]))
claim("Heun's rule: off by more than 0.08", off["Heun in 4 steps"] > 0.08)

# %% [markdown]
# More work, worse samples. For a diffusion model a finer grid leads to the ODE. For a student the number of steps is part of what it is.
#
# ### 2.3 Students that are trained
#
# Now networks that remember. A batch for a student of $N$ steps: draw data $x_0$, one of *its* times $t\in\{\frac1N, \dots, 1\}$, and noise; make $x_t$ as always; ask the teacher twice; and let the student say the mean of the two answers. (The weight is section 3's.) Each student starts with the weights of its teacher. Only the first does not: its teacher is no network.


# %%
def students_batch(steps, size=256):
    def batch(step):
        own = torch.Generator().manual_seed(1000 * steps + step)
        t = (torch.randint(steps, (size,), generator=own) + 1).double() / steps
        return {"x0": mixture.sample(size, own).float(), "t": t, "eps": torch.randn(size, 2, generator=own)}

    return batch


def students_loss(taught_by, steps):
    def loss(student, x0, t, eps):
        xt = path.perturb(x0, t, eps)
        said = distillation.progressive_target(taught_by, path, xt, t, t - 0.5 / steps, t - 1 / steps)
        return distillation.matching(student, xt, t, said, distillation.truncated_snr(path, t))

    return loss


# %%
torch.manual_seed(0)
model, trained, losses_of = Denoiser(nets.MLP(2, width=64, depth=2), path, predicts="v"), {16: teacher}, {}
for steps in (8, 4, 2, 1):
    done = training.fit(
        model,
        students_loss(trained[2 * steps], steps),
        students_batch(steps),
        steps=training.scaled(cpu=300 if steps < 8 else 400, gpu=5000),
        lr=4e-3,
        ema=0.99,
        precision="float32",
        progress=False,
    )
    trained[steps], losses_of[steps] = done.ema, done.losses
    model.load_state_dict(done.ema.state_dict())  # the next one begins where its teacher stands

# %% [markdown]
# That was a few seconds. Why does it go so fast? Compare with the training of a denoiser. There the target is $x_0$, which $x_t$ does not determine: the loss has a floor, the mean of $\mathrm{Var}(x_0\mid x_t)$, and every gradient is full of its noise. Here **the target is a function of what the student sees**. The loss of a perfect student is 0, and each sample tells it the right answer exactly.
#
# Where do the students end, from the same 2,000 noises? For comparison, the teacher with as few steps.

# %%
ends = {16: ways(teacher, 16, some_noise)[-1]}
with torch.no_grad():
    ends |= {n: ways(trained[n], n, some_noise.float())[-1].double() for n in (8, 4, 2, 1)}
undistilled = {n: ways(teacher, n, some_noise)[-1] for n in (8, 4, 2, 1)}
far = {n: (ends[n] - ends[16]).norm(dim=1) for n in (8, 4, 2, 1)}
left_alone = {n: (undistilled[n] - ends[16]).norm(dim=1) for n in (8, 4, 2, 1)}
for n in (4, 2, 1):
    word = f"{n} step" + "s" * (n > 1)
    claim(f"{word}: the student's ends are off by less than 0.1 on average", far[n].mean() < 0.1)
    claim("  the teacher's with as many steps by more than twice as much", left_alone[n].mean() > 2 * far[n].mean())
claim(
    "8 steps: distilling hardly pays; student and teacher are both off by less than 0.06",
    max(far[8].mean(), left_alone[8].mean()) < 0.06,
)
claim("errors pile up: the student of 1 step is farther off than that of 8", far[1].mean() > far[8].mean())

# %%
made, axes = plots.panels(4, 2, width=10.4, height=5.4, share=True)
for row, group, color in ((0, ends, style.MODEL), (1, undistilled, style.NOISE)):
    for ax, n in zip(axes[4 * row : 4 * row + 4], (8, 4, 2, 1), strict=True):
        plots.density(lambda x: mixture.log_prob(x.double()), extent=(-2, 2, -2, 2), resolution=80, ax=ax)
        ax.scatter(*group[n][:500].T, s=4, color=color, alpha=0.6, linewidths=0)
        word = f"{n} step" + "s" * (n > 1)
        ax.set(title=f"student, {word}" if row == 0 else f"DDIM, {word}", xlim=(-2, 2), ylim=(-2, 2))
made

# %% [markdown]
# Above the students, below the teacher with as many evaluations. From 4 steps down distillation is worth its training; with a single one the teacher has nothing to say, and the student still draws all four Gaussians. What the students do wrong is hard to see here: a few points on the bridges between two Gaussians. There the exact map from noise to data is nearly a cliff, and a network draws a slope. Section 7 comes back to these points.
#
# **Why halve?** By 1.2 one could learn sixteen steps in one at once. For a training sample that asks the teacher sixteen times, and for a teacher of 1024 steps a thousand times. Halving asks *twice* for a sample, at each level, and has $\log_2N$ levels: for 1024 steps, 20 evaluations instead of 1024, if each level is trained on as many samples. And every student begins near its target: it has to learn only how two steps of its teacher differ from one.
#
# ## 3. The weight, and why not noise
#
# ### 3.1 How much is an error worth?
#
# The loss is $\mathbb E\bigl[w\,\lVert\hat x_0-\tilde x_0\rVert^2\bigr]$, over all $t$. Which $w(t)$? (This $w$ weighs a loss. The $w$ of guidance comes back in section 5.) An error $\delta$ in $\hat x_0$ is, at fixed $x_t$, an error $-\frac\alpha\sigma\delta$ in $\hat\epsilon = (x_t-\alpha\hat x_0)/\sigma$. So
#
# - $w = \alpha^2/\sigma^2 = \mathrm{SNR}$ makes it the loss of notebook 03, in $\epsilon$;
# - for $v = \alpha\epsilon-\sigma x_0$ the error is $-\bigl(\frac{\alpha^2}\sigma+\sigma\bigr)\delta = -\frac\delta\sigma$, on a path with $\alpha^2+\sigma^2 = 1$: $w = 1/\sigma^2 = \mathrm{SNR}+1$.
#
# *What is wrong with the first one?* At $t = 1$ it is 0. The teacher does not mind: the first of its many steps has hardly a say. For a student of one step $t = 1$ is all there is, and it would not be trained at all. Salimans and Ho propose two ways out, $\mathrm{SNR}+1$ and the **truncated SNR**, $w = \max(\mathrm{SNR}, 1)$. They differ little: the truncated one lies between half of the other and the whole of it, as $\max(r, 1)\le r+1\le2\max(r, 1)$ for $r = \mathrm{SNR}$.

# %%
delta, alpha, sigma, x0_hat, x_now = sympy.symbols("delta alpha sigma xhat x", positive=True)


def noise_of(guess):
    return (x_now - alpha * guess) / sigma


moved = noise_of(x0_hat + delta) - noise_of(x0_hat)
in_v = alpha * moved - sigma * delta
claim("an error δ in x̂_0 is −(α/σ) δ in ε̂", sympy.simplify(moved + alpha / sigma * delta) == 0)
one = {alpha: sympy.sqrt(1 - sigma**2)}
claim("and −δ/σ in v, where α² + σ² = 1", sympy.simplify((in_v + delta / sigma).subs(one)) == 0)
ts = torch.linspace(0.02, 1, 400, dtype=double)
snr = (path.alpha(ts) / path.sigma(ts)) ** 2
truncated = distillation.truncated_snr(path, ts)
claim("max(SNR, 1) lies between ½ and 1 of SNR + 1", ((truncated / (snr + 1) >= 0.5) & (truncated <= snr + 1)).all())
lines = {"SNR": snr.clamp(min=1e-4), "SNR + 1": snr + 1, "truncated": truncated}
figure = plots.curves(ts, lines, "t", "weight of an error in x̂_0", logy=True, colors={"truncated": style.EXACT})
figure.axes[0].set_ylim(1e-2, 2e3)
figure

# %% [markdown]
# Near the data all three are the same. Towards $t = 1$ the SNR goes to 0, and the others stay at 1 and more.
#
# ### 3.2 Why a student must not predict noise
#
# A network may *predict* one quantity and be *scored* in another. Whatever the weight, what does it mean to predict $\epsilon$? Then $\hat x_0 = (x_t-\sigma\hat\epsilon)/\alpha$, and an error in $\hat\epsilon$ is $\sigma/\alpha = 1/\sqrt{\mathrm{SNR}}$ times as large in $\hat x_0$. In a sampler the guess then gets the factor $\alpha_s-\frac{\sigma_s}{\sigma_t}\alpha_t$, "pull". With many steps pull is small in the first steps, where $\sigma/\alpha$ is large; the two make up for each other. With one step pull is 1.
#
# *On the lecture's linear chain $\alpha(1000) = 0.006$. A network predicts noise, with an error of 0.01. How wrong is the end after a single step?*

# %%
chain = DiscretePath(linear_betas(1000))
amplified = (chain.sigma(1000) / chain.alpha(1000)).item()
claim("linear chain, t = 1000: an error in ε̂ is 157 times as large in x̂_0", round(amplified) == 157)
reach = {}
for steps in (1000, 50, 4, 2, 1):
    s = 1000 - 1000 // steps
    reach[steps] = (chain.alpha(s) - chain.sigma(s) / chain.sigma(1000) * chain.alpha(1000)).item() * amplified * 0.01
claim("the first of 1000 steps: the error 0.01 in ε̂ moves the state by 0.0001", abs(reach[1000] - 1e-4) < 2e-5)
claim("the first of 50: by 0.002", abs(reach[50] - 0.002) < 5e-4)
claim("the first of 4: by less than 0.1", reach[4] < 0.1)
claim("the first of 2: by more than 0.4", reach[2] > 0.4)
claim("a single step: by 1.57, more than half of the range of an image", abs(reach[1] - 1.57) < 0.01)
told_noise = Denoiser(lambda x, t: x, path, predicts="eps")
try:
    told_noise(noise, 1.0)
    refused = False
except ValueError:
    refused = True
claim("cosine path, t = 1: no ε̂ at all determines x̂_0, and the course's Denoiser says so", refused)

# %% [markdown]
# At $\alpha = 0$ a network that predicts noise has nothing to say: $x_1$ *is* the noise, the best answer is $\hat\epsilon = x_1$, and of the image it says nothing. With $\alpha = 0.006$ a student of one step would have to hide the image in the third decimal place of the noise; with $\alpha = 0$ it cannot. (At such an end the *teacher* must not predict noise either, but there the first guess may be replaced by anything sensible, even by 0.)
#
# Students here predict $v$: at $t = 1$ it is $-x_0$, at $t = 0$ it is $\epsilon$, and $\hat x_0 = \alpha x_t-\sigma\hat v$ divides by nothing. The paper's two other choices need no division either: $x_0$ itself, or both $x_0$ and $\epsilon$, mixed with weights that do not grow.
#
# ## 4. Digits
#
# ### 4.1 Four students
#
# The teacher is `mnist-unet`, the best model of this course, in 16 steps of DDIM, its guesses clipped. (By notebook 07 it is as good with 10 to 20 steps as with 100.) `mnist-student-8` was trained from it, `-4` from that one, and so on, by the recipe of section 2.3: truncated SNR, $v$, the start at the teacher's weights. All rows below start from the same ten noises. *Which rows can you tell from the teacher's?*

# %%
digit_teacher = checkpoints.load("mnist-unet")
students = {n: checkpoints.load(f"mnist-student-{n}") for n in (8, 4, 2, 1)}
judge = checkpoints.load("mnist-classifier")
start, ten = torch.randn(10, 1, 28, 28, generator=g), torch.arange(10)


def draw(network, steps, labels=ten, begin=None):
    """Digits in so many steps of DDIM, with clipped guesses."""
    d = clipped(lambda xt, t: network(xt, t, y=labels))
    return samplers.last(samplers.ddim(d, path, start if begin is None else begin, path.times(steps)))


rows = {"teacher, 16": draw(digit_teacher, 16)}
rows |= {f"student, {n}": draw(students[n], n) for n in (8, 4, 2, 1)}
rows |= {f"DDIM, {n}": draw(digit_teacher, n) for n in (4, 2, 1)}
plots.rows(list(rows.values()), labels=list(rows))

# %%
off = {name: (x - rows["teacher, 16"]).abs().mean().item() for name, x in rows.items()}
for n in (4, 2, 1):
    claim(f"{n}: the student is nearer to the teacher's digits than DDIM", off[f"student, {n}"] < off[f"DDIM, {n}"])
farther = all(off[f"student, {a}"] < off[f"student, {b}"] for a, b in pairwise((8, 4, 2, 1)))
claim("the fewer steps, the farther from the teacher", farther)
read = {name: (judge(x).argmax(1) == ten).double().mean().item() for name, x in rows.items()}
claim(
    "the classifier reads at least 9 of the 10 digits of each student as asked",
    min(read[f"student, {n}"] for n in students) >= 0.9,
)

# %% [markdown]
# The rows of the students show the teacher's ten digits, in all four numbers of steps. DDIM on the teacher still gets most of them with 4 steps. With 2, strokes break and grey is left between them. With 1 it draws the mean of all digits of a class, a blur that hardly changes with the noise.
#
# *Your own noises:* above the students, below the teacher with as many evaluations.


# %%
def beside(evaluations, seed):
    begin = torch.randn(10, 1, 28, 28, generator=torch.Generator().manual_seed(seed))
    pair = [draw(students[evaluations], evaluations, begin=begin), draw(digit_teacher, evaluations, begin=begin)]
    return plots.rows([draw(digit_teacher, 16, begin=begin), *pair], labels=["teacher, 16", "student", "DDIM"])


widgets.explore(beside, evaluations=([8, 4, 2, 1], 2), seed=([1, 2, 3, 4, 5], 1))

# %% [markdown]
# ### 4.2 Quality against evaluations
#
# Now with 2,000 digits a point and two seeds (of the noise; each network was trained once): the Fréchet distance of notebook 04 against how often a network is asked. Beside the students stand DDIM and DPM-Solver++(2M) on the teacher, and a student of section 6, "consistency". The grey line is the floor, real digits against real digits; the dashed one is the students' teacher, DDIM with 16 evaluations.
#
# *Before you look: with how many evaluations does distillation begin to pay, compared with the best solver without it?*

# %%
table = tables.load("mnist-distillation")
print(table["what"])
print(table["recipe"])


def measured(table, what, across, **chosen):
    """Of the rows that have what is chosen: `across`, in order (N,), and what was measured there (seeds, N)."""
    rows = [{"checkpoint": None} | row["sampler"] | row for row in table["rows"]]  # flat; None: mnist-unet
    rows = [row for row in rows if all(row[key] == value for key, value in chosen.items())]
    rows.sort(key=lambda row: (row["seed"], row[across]))
    values = torch.tensor([[row[across], row[what]] for row in rows], dtype=double)
    values = values.reshape(len({row["seed"] for row in rows}), -1, 2)
    return values[0, :, 0], values[..., 1]


# %%
def lines_of(what):
    """For each kind of sampler its evaluations and what was measured."""
    kinds = {
        "DDIM": {"name": "DDIM", "checkpoint": None},
        "2M": {"name": "DPM-Solver++(2M)", "grid": "time"},
        "consistency": {"name": "consistency"},
    }
    found = {label: measured(table, what, "evaluations", **chosen) for label, chosen in kinds.items()}
    each = [measured(table, what, "evaluations", checkpoint=f"mnist-student-{n}") for n in (1, 2, 4, 8)]
    found["students"] = torch.cat([n for n, _ in each]), torch.cat([values for _, values in each], 1)
    return {label: n for label, (n, _) in found.items()}, {label: values for label, (_, values) in found.items()}


inks = {"DDIM": style.DATA, "2M": style.GUIDED, "students": style.MODEL, "consistency": "#CC79A7"}
asked, distance = lines_of("Fréchet distance")
mean_fd = {
    label: dict(zip(asked[label].int().tolist(), values.mean(0).tolist(), strict=True))
    for label, values in distance.items()
}

# %%
made, (ax,) = plots.panels(1, width=8.0, height=4.6)
plots.curves(asked, distance, "evaluations", "Fréchet distance", logx=True, logy=True, colors=inks, ax=ax)
ax.axhline(table["Fréchet distance of real images"], color=style.NOISE, linewidth=1)
ax.axhline(mean_fd["DDIM"][16], color=style.DATA, linewidth=1, linestyle="--")
ax.set_xticks([1, 2, 4, 8, 16, 32, 64], ["1", "2", "4", "8", "16", "32", "64"])
ax.set_xticks([], minor=True)
made

# %%
four = [row for row in table["rows"] if row["sampler"]["evaluations"] == 4 and "checkpoint" not in row["sampler"]]
best = {seed: min(row["Fréchet distance"] for row in four if row["seed"] == seed) for seed in (0, 1)}
claim("seven samplers without a student were tried at 4 evaluations", len(four) == 7 * len(best))
of_four = dict(zip((0, 1), distance["students"][:, asked["students"].tolist().index(4)].tolist(), strict=True))
claim("4: the student's distance is below the best of them, in both seeds", all(of_four[i] < best[i] for i in best))
full = mean_fd["DDIM"][64]
claim("4: it lies within 10 % of the teacher's with 64 evaluations", mean_fd["students"][4] < 1.1 * full)
claim("8: DDIM without a student is as good, to 10 %", abs(mean_fd["students"][8] / mean_fd["DDIM"][8] - 1) < 0.1)
for n in (1, 2):
    claim(f"{n}: the student's distance is less than half of DDIM's", mean_fd["students"][n] < mean_fd["DDIM"][n] / 2)
behind = [mean_fd["consistency"][n] - mean_fd["students"][n] for n in (1, 2, 4)]
claim("consistency: behind the student of 1 step, by more than 0.01", behind[0] > 0.01)
claim("  and not behind those of 2 and 4, to 0.002", max(behind[1:]) < 0.002)

# %% [markdown]
# With 8 evaluations a student gains nothing here: DDIM alone is as good. With 4 it gains a little, about a tenth over 2M, the best of the seven samplers in the table. With 2 and 1 it gains almost everything: there the solvers' strokes break, and then they have little more than the mean of a class to offer, whatever their order. (Digits are easy for a solver. Where it needs 50 steps, as for large images, a student pays earlier.)
#
# A student is taught to end where its teacher ends. So the dashed line is the goal, and how far a student lies above it is what its training did not manage. The line of DDIM is lowest near 8 and 16 evaluations and then rises a little: with this network the ODE itself is not the best sampler (notebook 07, section 5.1).
#
# Is the table about this code? The first samples of two rows, drawn anew:

# %%
for setting in (
    {"name": "DDIM", "grid": "time", "evaluations": 2, "checkpoint": "mnist-student-2"},
    {"name": "DPM-Solver++(2M)", "grid": "time", "evaluations": 8},
):
    (row,) = (r for r in table["rows"] if r["sampler"] == setting and r["seed"] == 0)
    network = checkpoints.load(setting.get("checkpoint", "mnist-unet"))
    drawn = torch.tensor(measures.first(setting, network, path, seed=0))
    same = (drawn - torch.tensor(row["first samples"])).abs().max() < 2e-3
    claim(f"{setting.get('checkpoint', '2M')}: the brightness of the row's first 20 digits agrees to 0.002", same)

# %% [markdown]
# **What did it cost?** From the cards, in steps of training, and in minutes on the machine that the card names, which had other work to do. Each step of a student's training asks the teacher twice.

# %%
cards = {name: checkpoints.load(name).card for name in ["mnist-unet"] + [f"mnist-student-{n}" for n in (8, 4, 2, 1)]}
for name, card in cards.items():
    print(f"{name:>16}: {card['steps']:6d} steps of {card['batch']:3d} samples, {card['minutes']:5.1f} minutes")
chain_steps = sum(card["steps"] * card["batch"] for name, card in cards.items() if name != "mnist-unet")
share = chain_steps / (cards["mnist-unet"]["steps"] * cards["mnist-unet"]["batch"])
claim("all four students together saw less than a sixth of the samples that the teacher saw", share < 1 / 6)

# %% [markdown]
# ## 5. Guidance in one evaluation
#
# ### 5.1 Stage one
#
# A guided step costs two evaluations (notebook 06). The slide's "stage-one distillation" gets rid of one of them: a student learns the *guided* guess,
#
# $$\hat{\mathbf x}^w_{c,\theta}(\mathbf z_t) = (1+w)\,\hat{\mathbf x}_{c,\theta}(\mathbf z_t)-w\,\hat{\mathbf x}_\theta(\mathbf z_t),$$
#
# for *all* $w$ of an interval, and $w$ is one of its inputs. In our letters $\mathbf z_t$ is $x_t$, $c$ is the label $y$, and the guess without $c$ has the null label. The slide's loss reads
#
# $$\mathbb E_{w\sim U[w_{\min}, w_{\max}],\ t\sim U[0, 1],\ \mathbf x\sim p_{\text{data}}(\mathbf x)}\bigl[w(\lambda_t)\,\lVert\hat{\mathbf x}_{\eta_1}(\mathbf z_t, w)-\hat{\mathbf x}^w_{c,\theta}(\mathbf z_t)\rVert_2^2\bigr].$$
#
# **Why is this allowed?** The argument is short: given $x_t$, $t$, $y$ and $w$, the guided guess is *determined*. It is a function of the student's inputs, so some student has loss 0. Whatever guidance does to the densities (notebook 06, section 2.4), the student does the same. It learns the field, faults and all.
#
# Read the slide with care; four small things.
#
# | the slide text reads | what holds |
# |---|---|
# | the student predicts *"interpolated noise"* | the formula is about $\hat x_0$, not noise; the same formula holds for both (notebook 06, section 2.3). And for $w>0$ the weights $1+w$ and $-w$ *extrapolate* |
# | $w\sim U[w_{\min}, w_{\max}]$ and $w(\lambda_t)$ | two $w$ in one line: the weight of guidance, drawn at random; and the weight of the loss, a function of the log-SNR $\lambda_t$, such as section 3's |
# | $\mathbb E_{w, t, \mathbf x}[\dots]$ | the loss is about $\mathbf z_t$, and nothing says where $\mathbf z_t$ comes from: it takes $\mathbf z_t\sim q(\mathbf z_t\mid\mathbf x)$ under the $\mathbb E$. And $c$ is the label that came with $\mathbf x$ |
# | $\hat{\mathbf x}_{\eta_1}$; "1. Stage-two distillation" | $\eta_1$ is the name of the student's parameters, not DDIM's $\eta$; and stage two has the number 1 as stage one has |
#
# And the paper's $w$ is that of "Algorithm 2" in notebook 06: `guidance.classifier_free` calls $1+w$ its `scale`. In this section $w$ is the paper's.
#
# **Does it matter where $\mathbf z_t$ comes from?** *Think of a student that can learn anything. Then think of one that cannot.* For the first the loss is 0 at the same function, wherever the $\mathbf z_t$ are drawn, as long as they come everywhere. For the second it matters. As a counterexample take data on a line, two classes, $w = 3$, $t = 0.4$, and a student that can only say $a+b\,x_t$.

# %%
both, right_one = (toy.GaussianMixture(torch.tensor(m, dtype=double), 0.1) for m in ([[-1.0], [1.0]], [[1.0]]))
t, own = 0.4, torch.Generator().manual_seed(7)
guided = guidance.classifier_free(right_one.denoiser(path), both.denoiser(path), 4.0)  # scale = 1 + w


def line_for(z):
    """The best a + b·z for the guided guess, in the mean square over these z."""
    return torch.linalg.lstsq(torch.cat([torch.ones_like(z), z], 1), guided(z, t)).solution[:, 0]


x, eps = right_one.sample(20_000, own), torch.randn(20_000, 1, generator=own, dtype=double)
stop = torch.linspace(1, t, 41, dtype=double)
laws = {"q(z_t | x) of the class": path.perturb(x, t, eps), "pure noise": eps}
laws["states of guided sampling"] = samplers.last(samplers.ddim(guided, path, eps, stop))
slopes = {name: line_for(z)[1].item() for name, z in laws.items()}
for name, slope in slopes.items():
    print(f"{name:>25}: slope {slope:.1f}")
apart = [b - a for a, b in pairwise(sorted(slopes.values()))]
claim("three laws of z_t, three students: their slopes differ by more than 0.2", min(apart) > 0.2)

# %% [markdown]
# Three different best lines, one of them even with another sign. A network lies between the two cases. It is trained on the first law, and while sampling it sees the third one: where guidance is strong they are not the same, and the student must extrapolate. Mind the reading, too: "$\mathbf x\sim p_{\text{data}}$" is all the slide text says, and with pure noise for $\mathbf z_t$ one would obey it to the letter.
#
# ### 5.2 How a network is told $w$
#
# As it is told $t$: by sines and cosines of several frequencies and two linear layers, added to the embedding of time and label. With one care: **the second layer starts at zero**. The student starts with the teacher's weights, and what the teacher never had, an opinion on $w$, begins as nothing.

# %%
show_source(nets.WeightEmbedding)

# %%
settings = {name: value for name, value in digit_teacher.card["net"].items() if name != "class"}
fresh = Denoiser(nets.UNet(**settings, guided=True), path, "v")
missing = fresh.net.load_state_dict(digit_teacher.net.state_dict(), strict=False).missing_keys
in_weight = all(name.startswith("weight.") for name in missing)  # `weight`: the net's WeightEmbedding
claim("all that the student has and its teacher lacks is the embedding of w", in_weight)
with torch.no_grad():
    same = [fresh(start, 0.7, y=ten, w=torch.full((10,), w)) for w in (0.0, 1.0, 4.0)]
    plain = digit_teacher(start, 0.7, y=ten)
claim("at the start it is its teacher, at every w", max((x - plain).abs().max() for x in same) < 1e-5)

# %% [markdown]
# `mnist-guided` is this student after stage one, with $w\sim U[0, 4]$. Does it follow its teacher? Fifty noisy test digits; the root mean square of the student's guess minus the guided one. Beside it, for scale, the *unguided* guess minus the guided one: so far off would be a student without an ear for $w$. *The training stopped at $w = 4$. What do you expect beyond? And where should a student follow more easily, near the noise or near the data?*

# %%
told_w = checkpoints.load("mnist-guided")
pictures, labels = data.balanced(*data.images(data.load("mnist", "test")), 50, g)
weights, off = [0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0], {}


def far_from(guess, target):
    return (guess.clamp(-1, 1) - target).square().mean().sqrt().double()


for t in (0.9, 0.3):
    xt = path.perturb(pictures, t, torch.randn(pictures.shape, generator=g))
    with torch.no_grad():
        cond, none = digit_teacher(xt, t, y=labels), digit_teacher(xt, t)
        said = [told_w(xt, t, y=labels, w=torch.full((50,), w)) for w in weights]
    targets = [((1 + w) * cond - w * none).clamp(-1, 1) for w in weights]
    off["student", t] = torch.stack([far_from(a, b) for a, b in zip(said, targets, strict=True)])
    off["unguided", t] = torch.stack([far_from(cond, b) for b in targets])

# %%
made, axes = plots.panels(2, width=9.8, height=3.4)
two_inks = {"student": style.MODEL, "unguided": style.NOISE}
for ax, t in zip(axes, (0.9, 0.3), strict=True):
    lines = {who: off[who, t] for who in two_inks}
    plots.curves(torch.tensor(weights), lines, "w", "off the guided guess", colors=two_inks, ax=ax, title=f"t = {t}")
    ax.axvline(4, color=style.NOISE, linewidth=1, linestyle="--")
made

# %%
heard = {t: off["student", t] / off["unguided", t] for t in (0.9, 0.3)}
claim(
    "t = 0.9, w from 1 to 4: the student is off by less than half of what guidance changes", heard[0.9][2:6].max() < 0.5
)
claim("w = 8, where it was not trained: off by more than at w = 4", off["student", 0.9][-1] > off["student", 0.9][5])
claim("  and yet nearer than the unguided guess", heard[0.9][-1] < 1)
changes = [off["unguided", t][2] for t in (0.9, 0.3)]
claim(
    "w = 1: guidance changes the guess at t = 0.9 more than five times as much as at t = 0.3",
    changes[0] > 5 * changes[1],
)
claim("t = 0.3: the student follows less well", (heard[0.3][2:6] > heard[0.9][2:6]).all())

# %% [markdown]
# Near the noise, where guidance decides what is drawn, the student follows, though not exactly: its error is less than half of what guidance changes. Near the data guidance changes little (mind the scales). A loss of squared errors makes a network learn the large ones first, and so small a change the student has learned only in part. At $w = 0$ it should be the teacher that it started from, and it has drifted off a little. Beyond the dashed line it goes on in the right direction, and falls behind.
#
# ### 5.3 Stage two, and a sampler with fresh noise
#
# Stage two is section 2 again: the student of stage one becomes the teacher, and two of its steps become one, with $w$ passed through to both. Together, a guided sample of 16 steps, 32 evaluations, becomes one of 8, 4 or 2.
#
# The paper adds a **stochastic sampler** for such students. A student's jump has a fixed length. To put in fresh noise one cannot simply make the jump shorter. Instead: *jump all the way from $t$ down to $l$, and then go up again to $s$ by the forward process*, $l\le s<t$:
#
# $$x_l = \alpha_l\hat x_0+\sigma_l\,\hat\epsilon,\qquad x_s = \frac{\alpha_s}{\alpha_l}\,x_l+\varsigma\,z,\qquad\varsigma^2 = \sigma_s^2-\frac{\alpha_s^2}{\alpha_l^2}\sigma_l^2.$$
#
# The second formula is the path's transition from $l$ to $s$ (notebook 07, section 1.2: there $\varsigma^2$ is called $\beta$). Put the first into it:
#
# $$x_s = \alpha_s\hat x_0+\frac{\alpha_s}{\alpha_l}\sigma_l\;\hat\epsilon+\varsigma\,z,\qquad\text{and}\qquad\Bigl(\frac{\alpha_s}{\alpha_l}\sigma_l\Bigr)^2 = \sigma_s^2-\varsigma^2.$$
#
# *Look familiar?* It is DDIM's family of notebook 07, section 2.1, letter by letter: old noise $\sqrt{\sigma_s^2-\varsigma^2}$, fresh noise $\varsigma$. Down and up again is **DDIM with another $\eta$**, which may be above 1. Three cases:
#
# - $l = s$: no way up, $\varsigma = 0$, plain DDIM;
# - $l = 0$: all old noise is forgotten, $\varsigma = \sigma_s$;
# - and in between there is an $l$ with $\eta = 1$, ancestral sampling with variance $\tilde\beta$.
#
# **Which $l$ is it?** Compare the factors of $\hat\epsilon$. In the family it is $\sqrt{\sigma_s^2-\varsigma^2} = \rho\,\sigma_s$, and by notebook 07, section 2.1, ancestral sampling is the member with $\alpha_t = \sigma_t\,\rho\,\alpha_s/\sigma_s$, that is $\rho = u_t/u_s$. Down and up has the factor $\frac{\alpha_s}{\alpha_l}\sigma_l = \frac{u_s}{u_l}\sigma_s$. The two agree when $u_s^2 = u_t\,u_l$. In $\lambda = \log u$ this reads $\lambda_s = \frac12(\lambda_t+\lambda_l)$: $s$ is half way. **Ancestral sampling jumps twice as far in $\lambda$ as its step is long, and goes half of it back.**

# %%
a_l, s_l, EPS, Z = sympy.symbols("alpha_l sigma_l epsilon z", positive=True)
var = s_s**2 - a_s**2 / a_l**2 * s_l**2
guess = sympy.symbols("xhat_0")
up = sympy.expand(a_s / a_l * (a_l * guess + s_l * EPS))
claim("x̂_0 keeps the factor α_s", sympy.simplify(up.coeff(guess) - a_s) == 0)
claim("old noise and fresh noise: variances σ_s² − ς² and ς²", sympy.simplify(up.coeff(EPS) ** 2 - (s_s**2 - var)) == 0)
beta_tilde = (s_t**2 - a_t**2 / a_s**2 * s_s**2) * s_s**2 / s_t**2
far_l = {a_l: s_l * (a_s / s_s) ** 2 * s_t / a_t}  # u_l = u_s²/u_t
claim("u_s² = u_t u_l: ς² is β̃, so η = 1", sympy.simplify((var - beta_tilde).subs(far_l)) == 0)
t, s = 0.6, 0.45
low = path.time_at(2 * path.logsnr(s) - path.logsnr(t)).item()
xt, x0, z = normal(50, 2), normal(50, 2), normal(50, 2)
there_and_back = samplers.overshoot_step(path, xt, x0, t, low, s, z)
ancestral = samplers.ddpm_step(path, xt, x0, t, s, variance="posterior", noise=z)
claim(
    "in code: down to that l and up again is the ancestral step, to 1e-10",
    (there_and_back - ancestral).abs().max() < 1e-10,
)
no_way_up = samplers.overshoot_step(path, xt, x0, t, s, s) - samplers.ddim_step(path, xt, x0, t, s)
claim("l = s is DDIM, to 1e-12", no_way_up.abs().max() < 1e-12)

# %%
show_source(samplers.overshoot)

# %% [markdown]
# The paper's rule is a jump twice as long as the step, and half of it back. On our grid a student for jumps of $\frac1N$ is asked at $1, 1-\frac1{2N}, \dots, \frac1N$. Each time it goes down by $\frac1N$ and up by $\frac1{2N}$; only the last jump, from $\frac1N$ to 0, is not followed by a way up. That makes $2N-1$ evaluations. (At the end of the grid the paper does it a little differently. Our students with $w$ were trained on jumps from all these times.) Which $\eta$ is that?

# %%
N, etas = 4, []
for i in range(2 * N, 2, -1):  # all but the last step, to 0
    t, s, low = i / (2 * N), (i - 1) / (2 * N), (i - 2) / (2 * N)
    fresh_var = path.sigma(s) ** 2 - (path.alpha(s) / path.alpha(low)) ** 2 * path.sigma(low) ** 2
    etas.append((fresh_var / path.bridge(s, t)[2]).sqrt().item())  # ς² over β̃
claim("N = 4: in all steps but the last η lies between 0.85 and 1.15", 0.85 < min(etas) < max(etas) < 1.15)
claim("in the step from 5/8 to 4/8, whose jump goes to 3/8, it is 1, to 1e-10", abs(etas[3] - 1) < 1e-10)

# %% [markdown]
# So the stochastic sampler is, nearly, DDPM's ancestral sampler with $\tilde\beta$, made of jumps that the student knows. (In 2.2 there was no ancestral sampling: its step of $\frac1{2N}$ asks for a jump of about $\frac1N$. It is this length that makes it possible.) The grid has $s$ half way between $t$ and $l$ in *time*. Where $\lambda$ is nearly a straight line in $t$, that is half way in $\lambda$, too. Around $t = \frac12$ it is so exactly: $\lambda(\frac12) = 0$, and $\lambda(\frac58) = -\lambda(\frac38)$.
#
# ### 5.4 Quality over $w$
#
# 1,000 samples a point (so the floor is higher than in 4.2) and two seeds: the teacher with 16 guided steps (32 evaluations, 16 at $w = 0$), the student of stage one with 16, and those of stage two; left by DDIM, right by the stochastic sampler. The teacher's line is the same in both, by DDIM. The number behind each name counts evaluations. *A large $w$ hurts the Fréchet distance of the teacher (notebook 06). Do students suffer more, or less?*

# %%
over_w = tables.load("mnist-guided-students")
print(over_w["what"])
print(over_w["recipe"])


def by_w(what, checkpoint=None, name="DDIM"):
    return measured(over_w, what, "w", checkpoint=checkpoint, name=name)


deterministic = {"teacher, 32": by_w("Fréchet distance"), "stage one, 16": by_w("Fréchet distance", "mnist-guided")}
deterministic |= {f"student, {n}": by_w("Fréchet distance", f"mnist-guided-{n}") for n in (8, 4, 2)}
random = {"teacher, 32": deterministic["teacher, 32"]}
random |= {f"student, {2 * n - 1}": by_w("Fréchet distance", f"mnist-guided-{n}", "stochastic") for n in (8, 4, 2)}

# %%
made, axes = plots.panels(2, width=10.6, height=4.0)
for ax, group, name in zip(axes, (deterministic, random), ("DDIM", "stochastic"), strict=True):
    lines = {label: values for label, (_, values) in group.items()}
    inks_w = {"teacher, 32": style.EXACT}
    plots.curves(
        deterministic["teacher, 32"][0], lines, "w", "Fréchet distance", logy=True, ax=ax, title=name, colors=inks_w
    )
    ax.axhline(over_w["Fréchet distance of real images"], color=style.NOISE, linewidth=1)
made

# %%
w_at = deterministic["teacher, 32"][0].tolist()
guided_fd = deterministic["teacher, 32"][1].mean(0)
claim("the teacher: more guidance than w = 1, larger distance", (guided_fd[w_at.index(1.0) :].diff() > 0).all())
counted_w = measured(over_w, "evaluations", "w", checkpoint=None, name="DDIM")[1]
ratio = torch.stack([deterministic[name][1].mean(0) for name in list(deterministic)[1:]]) / guided_fd
claim(
    "w = 1, 2 and 4: every student's distance is within 20 % of the teacher's", ((ratio[:, 1:] - 1).abs() < 0.2).all()
)

# %%
noisy = torch.stack([random[f"student, {n}"][1].mean(0) for n in (3, 7)]) / guided_fd
claim(
    "fresh noise, w = 1, 2, 4: with 3 and 7 evaluations within 5 % of the teacher",
    ((noisy[:, 1:] - 1).abs() < 0.05).all(),
)
claim(
    "DDIM, from w = 1 to 4: each student's distance grows faster than the teacher's, by 2 to 8 %",
    (ratio[:, 3] / ratio[:, 1]).sub(1.05).abs().max() < 0.03,
)
claim("w = 0, without guidance: the student of 2 steps is at least 20 % above the teacher", ratio[3, 0] > 1.2)
claim(
    "the teacher was asked 16 times for a sample at w = 0, and 32 times with guidance",
    counted_w[0].tolist() == [16, 32, 32, 32],
)

# %% [markdown]
# **The students follow their teacher.** With guidance the distance grows with $w$; on the left a little faster for the students. There the student of two steps lies 13 to 17 % above its teacher, at a sixteenth of the evaluations. More than half of this is there after stage one already: the guided guess is the hard part, as section 5.2 showed, and not the halving. At $w = 0$, without guidance, the teacher is at its best, and here it is the halving that costs: with 4 and 2 steps the students are 18 and 30 % above it, while what separates stage one from it is within chance.
#
# On the right fresh noise is drawn between the jumps. The students of two and four steps, with 3 and 7 evaluations, now lie on their teacher's line for $w\ge1$, to 3 %. That of eight, with 15, lies above it, and nothing in the table says why. Noise between jumps can mend some of what the jump before did wrong; section 6.3 meets this again.
#
# **The saving.** In evaluations it is exact: 32 against 2, 4, 8 or 16. In seconds it is nearly the same: on one thread, for 100 digits with $w = 2$, the students of stage one, 8, 4 and 2 steps were 2.0, 4.0, 8.1 and 16.1 times as fast as the guided teacher (medians of seven rounds in one run of `bench/distillation.py`). And the digits, with $w = 1$, from the same noises:

# %%
guided_students = {n: checkpoints.load(f"mnist-guided-{n}") for n in (8, 4, 2)}
strength = torch.full((10,), 1.0)


def guided_teacher(xt, t):
    return guidance.classifier_free(lambda x, t: digit_teacher(x, t, y=ten), digit_teacher, 2.0)(xt, t)  # scale 1 + w


def guided_student(n):
    return lambda xt, t: guided_students[n](xt, t, y=ten, w=strength)


def shown_by(d, steps):
    return samplers.last(samplers.ddim(clipped(d), path, start, path.times(steps)))


# %%
shown = {"teacher, 32": shown_by(guided_teacher, 16)}
shown |= {f"student, {n}": shown_by(guided_student(n), n) for n in (8, 4, 2)}
right = {name: (judge(x).argmax(1) == ten).double().mean().item() for name, x in shown.items()}
claim("of each row the classifier reads at least 9 of 10 as asked", min(right.values()) >= 0.9)
plots.rows(list(shown.values()), labels=list(shown))

# %% [markdown]
# The same noises again give the same digits.
#
# ## 6. Consistency: every point knows the end
#
# ### 6.1 The function, exactly, on a line
#
# The student of one step answers at $t = 1$ only: "where does the path from here end?". **Consistency models** ask this at *every* $t$. The consistency function $f(x_t, t)$ is the state at $t = 0$ of the path of the probability-flow ODE through $x_t$. This goes one step beyond the lecture. Two properties define it:
#
# $$f(x_t, t) = f(x_s, s)\ \text{ along a path (self-consistency)},\qquad f(x, 0) = x\ \text{ (boundary)}.$$
#
# **In one dimension it has a closed form.** Paths of an ODE with a smooth velocity never cross, so on a line they keep their order. And the ODE carries the density $p_t$ to $p_0$ (notebook 05). So the share of the data to the left of a path never changes: with the distribution functions $F_t$,
#
# $$F_0\bigl(f(x_t, t)\bigr) = F_t(x_t)\qquad\Longleftrightarrow\qquad f(\cdot, t) = F_0^{-1}\circ F_t.$$
#
# For a mixture of Gaussians $F_t$ is a sum of normal distribution functions, and its inverse is found by bisection: `toy.GaussianMixture.cdf` and `quantile`. We compare with `distillation.consistency_function`, which knows nothing of this: it solves the ODE with an adaptive solver.

# %%
modes, widths = torch.tensor([-1.07, 0.18, 1.09], dtype=double), torch.tensor([0.10, 0.17, 0.14], dtype=double)
line = toy.GaussianMixture(modes[:, None], widths**2, torch.tensor([0.40, 0.25, 0.35]))
on_line = line.denoiser(path)


def f_exact(x, t):
    return line.quantile(line.cdf(x, path, t)) if t > 0 else x


for t in (1.0, 0.7, 0.4, 0.1):
    at = path.perturb(line.sample(200, g), t, normal(200, 1))
    off = (distillation.consistency_function(on_line, path, at, t) - f_exact(at, t)).abs().max()
    claim(f"t = {t}: the ODE's end is F_0⁻¹(F_t(x)), to 1e-8", off < 1e-8)

# %% [markdown]
# On the left some paths, each a curve of constant $F_t$; the upright line is the time of the slider. On the right, at that time, the map from $x_t$ to the end of its path in blue, and the teacher's guess $\mathbb E[x_0\mid x_t]$ in grey. *At $t = 1$ the map must turn one bell into three bumps. What shape will it have? And at $t\to0$?*

# %%
shares, tails = (torch.linspace(a, 1 - a, n, dtype=double)[:, None] for a, n in ((0.02, 25), (0.002, 2)))
clock = torch.linspace(0, 1, 41, dtype=double)
fan = torch.stack([line.quantile(shares, path, t) for t in clock.tolist()])


def map_at(t):
    made, (left, right) = plots.panels(2, width=9.6, height=3.6)
    left.plot(clock, fan[:, :, 0], color=style.DATA, linewidth=1)
    left.axvline(t, color=style.MODEL, linewidth=1.5)
    left.set(xlabel="t", ylabel="x_t", title="paths of the ODE")
    x = torch.linspace(*line.quantile(tails, path, t)[:, 0].tolist(), 401, dtype=double)[:, None]
    maps = {"end of the path": f_exact(x, t)[:, 0], "E[x_0 | x_t]": on_line(x, t)[:, 0]}
    inks = {"end of the path": style.DATA, "E[x_0 | x_t]": style.NOISE}
    plots.curves(x[:, 0], maps, "x_t", "x at t = 0", colors=inks, ax=right, title=f"t = {t:g}")
    right.set_ylim(-1.7, 1.7)
    return made


widgets.explore(map_at, t=([0.05, 0.2, 0.4, 0.6, 0.8, 1.0], 1.0))

# %% [markdown]
# At $t = 1$ the map is a staircase: most noises go to one of three bumps, and in between it is steep, as hardly any data lie there. The mean, in grey, does not look at the noise at all. Near $t = 0$ both are nearly the identity, but for a steep piece in each gap. Both pull a little towards the bumps, the mean about twice as far.
#
# ### 6.2 The loss
#
# The function is unknown where it matters. But its two properties can be trained. Take a point $x_t$, let the teacher make one short step to $x_s$, and ask the student *itself* there. With $f_\theta$ for the student's $\hat x_0$:
#
# $$L = \mathbb E\,\Bigl[w\,\bigl\lVert f_\theta(x_t, t)-\mathrm{stop}\bigl[f_\theta(x_s, s)\bigr]\bigr\rVert^2\Bigr],\qquad x_s = \mathrm{DDIM}(x_t;\ t\to s)\ \text{with the teacher}.$$
#
# "Stop" means that the target gets no gradient, and $w$ is the weight of section 3. *What keeps a lazy student from saying 0 everywhere?* Self-consistency does not: every constant has it. **Only the boundary does**, so it must not be left to training.

# %%
show_source(distillation.consistency_target)

# %%
x = normal(100, 2)
lazy = lambda x, t: torch.zeros_like(x)  # noqa: E731
for t, s in ((0.5, 0.4), (0.1, 0.0)):
    lazy_target = distillation.consistency_target(lazy, teacher, path, x, t, s)
    claim(f"from {t} to {s}: a lazy student has loss 0", distillation.matching(lazy, x, t, lazy_target) == 0)
free = Denoiser(nets.MLP(2, width=16, depth=1), path, predicts="v")
with torch.no_grad():
    claim(
        "a network that predicts v says x at t = 0, whatever its weights",
        (free(x.float(), 0.0) - x.float()).abs().max() < 1e-6,
    )
    other = Denoiser(nets.MLP(2, width=16, depth=1), path, predicts="x0")
    claim("one that predicts x_0 does not", (other(x.float(), 0.0) - x.float()).abs().max() > 0.5)

# %% [markdown]
# With $v$ the boundary comes for free: $\hat x_0 = \alpha x_t-\sigma v$, and at $t = 0$ this is $1\cdot x-0\cdot v$. (The paper writes $f = c_{skip}(t)\,x+c_{out}(t)\cdot$ network, with $c_{skip} = 1$ and $c_{out} = 0$ at the smallest time. Ours is the same thing with $c_{skip} = \alpha$ and $c_{out} = -\sigma$.)
#
# **What does loss 0 mean?** Let the teacher have $N$ steps. At $t = \frac1N$ the target is the student at 0, that is $x_0$ of the teacher's last step: right. At $\frac2N$ the target is the student at $\frac1N$, which is right, one step on. And so on up to $t = 1$: by induction $f_\theta(x_t, t)$ is the end of the *teacher's* steps from $x_t$. At $t = 1$ it is the same as the one-step student of section 2. Both inherit the teacher's steps, not the ODE.
#
# **And errors?** The induction also says what is hard: *the truth comes in at $t = 0$ and has to be carried up, step by step, through the student's own answers.* See it with a perfect learner: in each round the student takes over its targets exactly, at all $N = 16$ times at once, as made from its answers of the round before. It starts as the teacher itself, which the shipped one does, too. Unrolled, its answer after $k$ rounds is what the teacher would say after $k$ of its steps from $x_t$. The data are those of 6.1. *After how many rounds is it right at $t = 1$?*

# %%
N = 16


def after_rounds(x, i, rounds):
    """What a perfect learner says at t = i/N: `rounds` teacher's steps towards the data, then its first answer."""
    for k in range(i, max(i - rounds, 0), -1):
        x = samplers.ddim_step(path, x, on_line(x, k / N), k / N, (k - 1) / N)
    return on_line(x, (i - rounds) / N) if rounds < i else x


error = torch.zeros(N + 1, N, dtype=double)
for i in range(1, N + 1):
    at = path.perturb(line.sample(500, g), i / N, normal(500, 1))
    right = after_rounds(at, i, i)
    for rounds in range(N + 1):
        error[rounds, i - 1] = (after_rounds(at, i, rounds) - right).abs().mean()
claim("after k rounds it is right up to t = k/N, to 1e-12", all(error[k, :k].max() < 1e-12 for k in range(1, N + 1)))
claim("after 8 of 16 rounds a quarter or more of the error at t = 1 is left", error[8, -1] > error[0, -1] / 4)

# %%
made, (left, right) = plots.panels(2, width=10.0, height=3.6)
ts = torch.arange(1, N + 1) / N
shown = {f"{k} rounds": error[k] for k in (0, 4, 8, 12)}
plots.curves(ts, shown, "t", "error of the student's end", ax=left)
z = torch.linspace(-2.4, 2.4, 301, dtype=double)[:, None]
maps = {f"{k} rounds": after_rounds(z, N, k)[:, 0] for k in (0, 4, 8, 12, 16)}
plots.curves(z[:, 0], maps, "x_1", "student at t = 1", ax=right)
made

# %% [markdown]
# Left: after $k$ rounds the error is 0 up to $t = k/16$, and beyond that it grows with $t$. Right: the answer at $t = 1$ begins as the data's mean, and gets its three stairs only in the last rounds.
#
# It is a wave of truth that moves from the data towards the noise, one time a round. Notebook 07, section 4.1, had such a wave in the other direction: there a way was iterated as a whole, and the truth came from the noise. For a network a round is not one step of training but many. The one-step student has to wait for all the others. That is the price of asking at every $t$, and progressive distillation pays it openly, level by level.
#
# And how much error does an end inherit from the teacher's steps? On the line we can measure it: the mean distance of the ends of $N$ steps of DDIM from the exact $F_0^{-1}\circ F_1$.

# %%
z = torch.special.ndtri((torch.arange(400, dtype=double) + 0.5) / 400)[:, None]  # normal noise, evenly spread
inherited = {n: (ways(on_line, n, z)[-1] - f_exact(z, 1.0)).abs().mean().item() for n in (8, 16, 32, 64)}
claim("16 steps: a perfect student is off from the exact map by 0.04, to 0.01", abs(inherited[16] - 0.04) < 0.01)
halvings = [inherited[n] / inherited[2 * n] / 2 for n in (8, 16, 32)]
claim("twice the teacher's steps: half as far off, to 10 %; first order", all(abs(h - 1) < 0.1 for h in halvings))

# %% [markdown]
# ### 6.3 More than one step
#
# As $f$ answers at every $t$, one may trade evaluations for quality: jump to the end, go up to a smaller $t$ with fresh noise, jump again. This is 5.3's sampler with $l = 0$: $x_s = \alpha_s\hat x_0+\sigma_sz$. With the exact $f$ each jump gives a true sample of the data, and each return a true sample of $p_s$, so nothing is gained. With an imperfect one, a jump from a smaller $t$ is an easier one. And it is the later jump whose mistakes count: those of the first are mostly covered by the fresh noise.
#
# `mnist-consistency` was trained so, from the same teacher in 16 steps. Its line is in the figure of section 4.2, at 1, 2 and 4 evaluations. Here are ten of its digits.

# %%
consistency = checkpoints.load("mnist-consistency")
shown = {"teacher, 16": rows["teacher, 16"], "student, 1": rows["student, 1"]}
for evaluations in (1, 2, 4):
    setting = {"name": "consistency", "grid": "time", "evaluations": evaluations}
    d = clipped(lambda xt, t: consistency(xt, t, y=ten))
    shown[f"consistency, {evaluations}"] = measures.draw(setting, d, path, start, torch.Generator().manual_seed(1))
plots.rows(list(shown.values()), labels=list(shown))

# %%
with torch.no_grad():
    states = ways(clipped(lambda xt, t: digit_teacher(xt, t, y=ten)), 16, start)
    said = [clipped(consistency)(x, 1 - i / 16, y=ten) for i, x in enumerate(states[:-1])]
off = torch.stack([(x - states[-1]).abs().mean() for x in said])
claim("asked along the teacher's ways, the student is farther off their ends at t = 1 than at t = ½", off[0] > off[8])
claim("  and at t = ½ farther than at t = ⅛", off[8] > off[14])

# %% [markdown]
# The truth has come up to $t = 1$, but some of it was lost on the way: with one evaluation the consistency student is behind the progressive one. With 2 it is a little better and with 4 as good, and one network serves all three. The second jump helps most: it takes the distance from 0.097 to 0.055. (Section 4.2 has the figure. Both had the same teacher, but not the same training: 3,000 steps here, 8,500 in the chain of four.)
#
# ## 7. What is lost
#
# ### 7.1 Sharpness first
#
# The Fréchet distance mixes two things. Precision asks whether a sample could be a real digit, recall whether a real digit could be a sample (notebook 04). It is often said that distillation costs diversity. *Which of the two do you expect to suffer first?*

# %%
made, axes = plots.panels(2, width=10.4, height=3.8)
for ax, what in zip(axes, ("precision", "recall"), strict=True):
    asked, values = lines_of(what)
    plots.curves(asked, values, "evaluations", what, logx=True, colors=inks, ax=ax)
    ax.set_xticks([1, 4, 16, 64], ["1", "4", "16", "64"])
    ax.set_xticks([], minor=True)
    ax.set_ylim(0.68, 0.94)
made

# %%
spread = {}
for what in ("precision", "recall"):
    asked, values = lines_of(what)
    spread[what] = {
        kind: dict(zip(n.int().tolist(), values[kind].mean(0).tolist(), strict=True)) for kind, n in asked.items()
    }
away = {what: [spread[what]["students"][n] - spread[what]["DDIM"][16] for n in (8, 4, 2, 1)] for what in spread}
claim("recall: the students of 8, 4 and 2 steps keep the teacher's, to 0.01", max(map(abs, away["recall"][:3])) < 0.01)
claim("  that of 1 step, to 0.02", abs(away["recall"][3]) < 0.02)
claim(
    "DDIM with 2 evaluations has lost more than 0.1 of it",
    spread["recall"]["DDIM"][2] < spread["recall"]["DDIM"][16] - 0.1,
)
claim("precision: those of 2 and 1 steps have lost more than 0.02", max(away["precision"][2:]) < -0.02)

# %% [markdown]
# (DDIM with one evaluation lies far below both pictures: its recall is 0.) For these students it is the other way round. **Precision falls first.** With 2 steps it has fallen by 0.03, and recall is the teacher's. With 1 step recall may have begun to fall: not at all in one seed, by 0.03 in the other. DDIM with few steps loses recall: what it draws is clean, and too much alike.
#
# Look again at the rows of section 4.1. The digits of one step are the teacher's, with smudges. Where the map from noise to digit is steep, a network that is not sharp enough says something in between, though each target is one digit. Is a smudge a matter of precision, then? Test the measure itself. Take real digits, put blurred noise on them, and compare them with other real digits.

# %%
pool, kinds_of = data.images(data.load("mnist", "test"))
mixed = torch.randperm(len(pool), generator=torch.Generator().manual_seed(0))
others, digits = judge.features(pool[mixed[:1000]]), pool[mixed[1000:2000]]
grain = torch.randn(digits.shape, generator=torch.Generator().manual_seed(1))
smudge = 0.6 * torch.nn.functional.avg_pool2d(grain, 3, stride=1, padding=1)
clean, smudged = (precision_recall(others, judge.features(x)) for x in (digits, (digits + smudge).clamp(-1, 1)))
claim("smudged real digits: precision falls by more than 0.04", smudged[0] < clean[0] - 0.04)
claim("their recall stays, to 0.03", abs(smudged[1] - clean[1]) < 0.03)

# %% [markdown]
# So smudges alone give this pattern. Mind what recall does not see. It counts a real digit as reached if it lies in a ball around some sample, and the balls are as wide as samples are apart. It would not notice that a rare kind of digit is drawn half as often. A kind that only a small region of noises leads to, with steep places all around, may be smoothed away: the points on the bridges in section 2.3 are of this sort.
#
# ### 7.2 Likelihood
#
# A diffusion model has a likelihood by its ODE, and a bound by its chain (notebooks 03 and 05). Both would still give a number with a student's guesses, but it is about another model: the ODE, or the chain, that has these guesses in every short step. Nobody samples from that, and as the guesses are not $\mathbb E[x_0\mid x_t]$ it is a bad one. It says nothing about the student's own samples. But is a one-step student not simpler, a map from noise to data, like a flow of notebook 02? Then change of variables would do: $\log p(x) = \log\mathcal N(z)-\log\lvert\det\frac{\partial x}{\partial z}\rvert$, at the noise $z$ that $x$ came from. **It needs a map that is one to one.** We look at three.
#
# *The exact map on the line* is. Its slope is $p_1(z)/p_0(x)$, by differentiating $F_0(f) = F_1$, and the formula gives the data's density.

# %%
z, h = torch.linspace(-2.5, 2.5, 201, dtype=double)[:, None], 1e-5
slope = (f_exact(z + h, 1.0) - f_exact(z - h, 1.0)) / (2 * h)
log_p = -(z**2) / 2 - math.log(2 * math.pi) / 2 - slope.log()
off = (log_p[:, 0] - line.log_prob(f_exact(z, 1.0))).abs().max()
claim("on the line: change of variables gives the data's log-density, to 1e-4", off < 1e-4)

# %% [markdown]
# *The teacher's own steps* are one to one, too, **if the denoiser is ideal** and the data fill the space, with any number of steps from two on. (One step alone sends all noises to the mean.) By the companion of Tweedie's formula (notebook 07, section 1.2; in more dimensions $\frac{\partial\hat x_0}{\partial x_t} = \frac{\alpha_t}{\sigma_t^2}\mathrm{Cov}(x_0\mid x_t)$) a step of DDIM has the Jacobian
#
# $$\frac{\partial x_s}{\partial x_t} = \underbrace{\frac{\sigma_s}{\sigma_t}}_{\ge0}I+\underbrace{\Bigl(\alpha_s-\frac{\sigma_s}{\sigma_t}\alpha_t\Bigr)}_{>0}\;\underbrace{\frac{\alpha_t}{\sigma_t^2}}_{\ge0}\,\mathrm{Cov}(x_0\mid x_t).$$
#
# The first term vanishes at $s = 0$ only, the second at $t = 1$ only. So the matrix is symmetric with positive eigenvalues, and a step never turns space over. Nor do two different points ever meet: along the straight line from one to the other, the step's image moves on in that direction all the way. A chain of such steps has a determinant above 0, the product of theirs. The exact student of section 2.1 is the same map. *And the network that learned it, from samples?* Nothing in its loss speaks of invertibility. We take the student of one step of section 2.3 and measure the determinant over the noises.

# %%
side = torch.linspace(-3, 3, 121, dtype=double)
plane = torch.cartesian_prod(side, side)


def determinant(f, z):
    """det of the Jacobian of a map of the plane, at each of the points."""
    z = z.clone().requires_grad_()
    x = f(z)
    rows = [torch.autograd.grad(x[:, i].sum(), z, retain_graph=True)[0] for i in range(2)]
    return torch.linalg.det(torch.stack(rows, 1)).detach()


# %%
def teachers_map(z):
    for t, s in pairwise(path.times(16).tolist()):
        z = samplers.ddim_step(path, z, teacher(z, t), t, s)
    return z


exact_det = determinant(teachers_map, plane)
student_det = determinant(lambda z: trained[1](z, 1.0), plane.float()).double()
mass = torch.exp(-plane.square().sum(1) / 2)
folded = (mass * (student_det < 0)).sum() / mass.sum()

# %%
claim("the teacher's 16 steps: the determinant is positive at all points", exact_det.min() > 0)
claim("the trained student turns space over for 0.5 % of all noises, or more", folded > 0.005)
made, axes = plots.panels(2, width=9.2, height=4.2)
for ax, det, name in zip(axes, (exact_det, student_det), ("teacher, 16 steps", "trained student, 1 step"), strict=True):
    shown = det.abs().clamp(1e-3, 1e2).log10().reshape(121, 121).T
    image = ax.imshow(shown, extent=(-3, 3, -3, 3), origin="lower", cmap=style.DENSITY, vmin=-3, vmax=1)
    negative = (det < 0).double().reshape(121, 121).T
    ax.contourf(side, side, negative, levels=[0.5, 1.5], colors=[style.MODEL])
    ax.set(title=name, xlabel="first coordinate of the noise", ylabel="second coordinate")
    ax.grid(False)
made.colorbar(image, ax=axes, label="log₁₀ |det|")
made

# %% [markdown]
# In blue, how much the map stretches the plane; the ridges between the basins of the four Gaussians are the cliffs. In orange, where the trained student's determinant is *negative*: there the map folds the plane over. A sample from a fold has several noises behind it. Its density is the sum over all of them. In the plane one could search for them; in the 784 dimensions of a digit there is no way to know that one has them all. So: no tractable likelihood. It is the network that lost it, not the idea: for the exact map change of variables held.
#
# ### 7.3 The teacher's errors stay
#
# Nothing in distillation looks at the data's density again: the data only serve to make $x_t$. So a student has, at best, the faults of its teacher's steps. DDIM with 16 steps makes clouds too narrow (notebook 07, section 2.4), and so does every exact student.

# %%
many = normal(20_000, 2)


def width(x):
    """The deviation within each of the four clouds, as a share of the right one."""
    near = torch.cdist(x, means).argmin(1)
    return torch.stack([x[near == k].var(0).mean().sqrt() / variances[k].sqrt() for k in range(4)])


narrow = {n: width(ways(exact_students[n], n, many)[-1]) for n in (16, 4, 1)}
claim("16 steps: all four clouds are too narrow, by 5 to 16 %", 0.84 < narrow[16].min() and narrow[16].max() < 0.95)
claim(
    "the exact students of 4 and 1 steps: just as narrow, to 1e-9",
    max((narrow[n] - narrow[16]).abs().max() for n in (4, 1)) < 1e-9,
)
claim("the teacher with 256 steps: right, to 3 %", (width(ways(teacher, 256, many[:8000])[-1]) - 1).abs().max() < 0.03)

# %% [markdown]
# A better teacher costs nothing while sampling: one could begin at 256 steps instead of 16 and halve four times more. It costs training.
#
# ## 8. Recap
#
# - One step of DDIM is linear in its guess. Solved for the guess, it gives the student's target: the mean of the teacher's guesses, weighted by the lengths of its steps in $u = \alpha/\sigma$. It holds for any number of steps in one, at $\alpha = 0$ and at $\sigma = 0$.
# - The exact student ends where the teacher ends, and asks as often. A trained network saves the asking, because it remembers.
# - A student's $\hat x_0$ is not $\mathbb E[x_0\mid x_t]$. It belongs to its own jumps; there is no score in it.
# - Its target is a function of its inputs: the loss can reach 0, and training is short.
# - The weight must not vanish at $t = 1$, and the network must not predict noise there.
# - Stage one folds guidance and its weight into one evaluation; stage two halves the steps. Down and up again is DDIM with fresh noise; ancestral sampling jumps twice as far in $\lambda$ and goes half of it back.
# - A consistency function sends each point to the end of its path; in one dimension it is $F_0^{-1}\circ F_t$. In its training the truth travels up from $t = 0$.
# - Lost are some sharpness, the likelihood, the freedom to choose the steps; and the teacher's faults stay. Recall was hardly lost here; DDIM with 4 evaluations or fewer loses it.
#
# **Pitfalls**
#
# - $t'$ and $t''$ swapped: plausible samples, wrong student. Test one step against two.
# - The target turned into noise by the $\sigma$ of the wrong time, or by a tiny one.
# - A student run with more steps than it was trained for, or with Heun or 2M.
# - The student compared with DDIM of 1000 steps by *steps*: compare with a good solver at as many evaluations.
# - The paper's $w$ typed where code wants $1+w$.
# - The teacher sampled with clipping and distilled without it: the student learns another teacher.
# - The boundary of a consistency model left to training.
# - A teacher with too few steps: its error of discretisation is what the student learns.
#
# **Homework:** [the exercises](../homework/hw6_distillation.ipynb) next to this notebook.
#
# **References**
#
# - Salimans, Ho: [*Progressive Distillation for Fast Sampling of Diffusion Models*](https://arxiv.org/abs/2202.00512), 2022. The target, the weights, $v$.
# - Meng, Rombach, Gao, Kingma, Ermon, Ho, Salimans: [*On Distillation of Guided Diffusion Models*](https://arxiv.org/abs/2210.03142), 2023. Both stages, the stochastic sampler.
# - Song, Dhariwal, Chen, Sutskever: [*Consistency Models*](https://arxiv.org/abs/2303.01469), 2023.
# - Luhman, Luhman: [*Knowledge Distillation in Iterative Generative Models for Improved Sampling Speed*](https://arxiv.org/abs/2101.02388), 2021. All steps in one at once.
# - Hinton, Vinyals, Dean: [*Distilling the Knowledge in a Neural Network*](https://arxiv.org/abs/1503.02531), 2015. Where the name comes from.
# - Song, Meng, Ermon: [*Denoising Diffusion Implicit Models*](https://arxiv.org/abs/2010.02502), 2021. The step that is distilled.
