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
# # Denoising diffusion: from noise to digits
#
# A diffusion model learns to undo noise, a little at a time. At the end of this notebook you will be able to
#
# - say what the forward and the reverse process are, and why the forward one needs no learning;
# - prove that *t* steps of noise have the same distribution as one jump, and check the proof by experiment;
# - derive the posterior $q(x_{t-1}\mid x_t, x_0)$, the target of the reverse step, and say how random that step is;
# - derive the bound on the likelihood, split it into its three terms, and compute each of them;
# - train a diffusion model with Algorithm 1 and sample from it with Algorithm 2;
# - draw handwritten digits of any class you ask for, and measure how good they are.
#
# **Time:** two to three hours to read, with pen and paper; it runs in under a minute on a processor.
# **It builds on** the VAE: what a latent variable is, and what a KL divergence measures.
# **Symbols** are those of the lecture; the README's [symbol ledger](../README.md#symbols) lists them all.

# %%
import importlib.util

if importlib.util.find_spec("dgm_course") is None:  # Colab, or a fresh environment
    get_ipython().run_line_magic("pip", "install --quiet dgm-course")

# %%
import contextlib
import math

import sympy
import torch
from scipy import stats

from dgm_course import checkpoints, data, likelihood, losses, metrics, nets, samplers, tables, toy, training
from dgm_course.checks import claim, show_source
from dgm_course.denoisers import Denoiser, clipped
from dgm_course.paths import VP, Cosine, DiscretePath
from dgm_course.schedules import constant_betas, linear_betas
from dgm_course.viz import plots, widgets

g = torch.Generator().manual_seed(0)  # where nearly all chance in this notebook comes from
digits, labels = data.images(data.load("mnist", "test"))

# %% [markdown]
# ## 1. What is diffusion?
#
# Drop ink into water. The drop spreads until the glass is evenly grey, whatever its first shape. Physics calls this
# *diffusion*, and the idea of the model comes from there: a complicated distribution, followed through many small random
# steps, turns into a simple one.
#
# (There are two ways to write this down: as a Markov chain of steps, as in this notebook, or as a stochastic differential equation, as in notebook 05. In the limit of many small steps they are the same.)
#
# A diffusion model has two processes.
#
# 1. **Forward:** add a little Gaussian noise to a clean image, again and again, until nothing but noise is left.
#    Nothing is learned here. The objective is to turn a complex distribution into a simple one.
# 2. **Reverse:** remove a little noise, again and again, until a clean image is left. This is what a network learns.
#    The objective is to turn noise, which we can draw, into an image, which we cannot ("to draw" will mean "to sample").
#
# The reverse task is hard to do in one go: a VAE's decoder and a GAN's generator must turn noise into an image at once.
# Diffusion cuts the task into a thousand easy ones.
#
# *Before you look:* the film below shows three digits at nine of 1000 steps. At which step would you no longer recognise
# them? Write a number down. (Values beyond $[-1, 1]$ are shown as black or white.)

# %%
chain = DiscretePath(linear_betas(1000))  # how much noise in which step: section 2.4
times = [0, 50, 100, 200, 300, 400, 600, 800, 1000]
eps = torch.randn(3, 1, 28, 28, generator=g)
film = [chain.perturb(digits[:3], t, eps) for t in times]
plots.film(film, times=times, rows=3, title="Forward: from data to noise")

# %% [markdown]
# Between step 300 and 400 the eye loses the class. After step 600 nothing can be seen of the digit, and the last column is noise.

# %% [markdown]
# ## 2. The forward process
#
# ### 2.1 One step
#
# Let $x_0$ be an image, its pixels scaled to $[-1, 1]$. One step shrinks the image a little and adds a little noise:
#
# $$x_t = \sqrt{1-\beta_t}\;x_{t-1} + \sqrt{\beta_t}\;\epsilon_t,\qquad \epsilon_t\sim\mathcal N(0, I),\qquad t = 1,\dots,T.$$
#
# The $\epsilon_t$ are independent of each other and of $x_0$.
#
# The number $\beta_t$ between 0 and 1 is the variance of the noise that step $t$ adds. We write $q$ for the distributions of this process, which
# are fixed and known; $p_\theta$, later, for those that are learned. With $\alpha_t = 1-\beta_t$, the step is $q(x_t\mid x_{t-1}) = \mathcal N\bigl(x_t;\ \sqrt{\alpha_t}\,x_{t-1},\ (1-\alpha_t)I\bigr)$.
#
# **Why the two square roots?** Variances of independent terms add, and a factor enters a variance squared. If a pixel of $x_{t-1}$ has variance 1, then
# $x_t$ has variance $(1-\beta_t)\cdot 1 + \beta_t = 1$ again. The image fades, and the total spread stays put. A pixel of another variance
# (those of digits have less) moves towards 1.

# %%
beta, variance = sympy.symbols("beta V", positive=True)
after = sympy.sqrt(1 - beta) ** 2 * variance + sympy.sqrt(beta) ** 2
# `claim` prints ✓ and its text if the condition holds, and stops the notebook if it does not.
claim("a variance of 1 stays 1", sympy.simplify(after.subs(variance, 1) - 1) == 0)
claim(
    "the distance of any variance from 1 shrinks by the factor 1 − β",
    sympy.simplify((after - 1) - (1 - beta) * (variance - 1)) == 0,
)

# %% [markdown]
# The step looks at $x_{t-1}$ and fresh noise only, not at what came before. So the forward process is a *Markov chain*, and the
# distribution of the whole walk is a product:
#
# $$q(x_{1:T}\mid x_0) = \prod_{t=1}^{T} q(x_t\mid x_{t-1}).$$
#
# In code, a walk is a loop around one line. Here the points of a spiral walk through the first 200 of 1000 steps.


# %%
def walk(x, steps, generator):
    for t in range(1, steps + 1):
        beta = float(chain.betas[t])
        x = (1 - beta) ** 0.5 * x + beta**0.5 * torch.randn(x.shape, generator=generator)
    return x


spiral = toy.swiss_roll(2_000, g)
walked = walk(spiral, 200, g)
plots.overlay(spiral[:1000], walked[:1000], labels=["x₀", "x₂₀₀"])

# %% [markdown]
# The arms of the spiral can no longer be told apart: the noise is wider than the gap between them.
#
# ### 2.2 One jump instead of *t* steps
#
# Training will need $x_t$ for a random $t$, millions of times. Walking there would cost hundreds of steps each time.
#
# **Claim.** For each $t$ by itself, $t$ steps give $x_t$ the same distribution as one jump:
#
# $$q(x_t\mid x_0) = \mathcal N\bigl(x_t;\ \sqrt{\bar\alpha_t}\;x_0,\ (1-\bar\alpha_t)\,I\bigr),\qquad \bar\alpha_t = \prod_{t'=1}^{t}\alpha_{t'}.$$
#
# *(The slide text reads $\sqrt{\bar\alpha_t}\,x_{t-1}$ for the mean, and $\prod\alpha'_t$ for $\prod\alpha_{t'}$. It is $x_0$ that is scaled; section 2.3 shows what the other formula does.)*
#
# **Proof, first two steps.** Put the first step into the second:
#
# $$x_2 = \sqrt{\alpha_2}\bigl(\sqrt{\alpha_1}\,x_0 + \sqrt{1-\alpha_1}\,\epsilon_1\bigr) + \sqrt{1-\alpha_2}\,\epsilon_2
#   = \sqrt{\alpha_2\alpha_1}\;x_0 + \underbrace{\sqrt{\alpha_2(1-\alpha_1)}\,\epsilon_1 + \sqrt{1-\alpha_2}\,\epsilon_2}_{\text{two independent Gaussian noises}}.$$
#
# A sum of *independent* Gaussians is Gaussian, and its variance is the sum of theirs. That sum collapses:

# %%
a, abar = sympy.symbols("alpha abar", positive=True)  # α_t of one step, and ᾱ of all steps before it
claim(
    "two noises merge: α₂(1 − α₁) + (1 − α₂) = 1 − α₁α₂", sympy.expand(a * (1 - abar) + (1 - a) - (1 - a * abar)) == 0
)

# %% [markdown]
# **Proof, all steps.** Suppose the claim holds at $t-1$: the noise so far has variance $1-\bar\alpha_{t-1}$. One more step multiplies this
# variance by $\alpha_t$ and adds $1-\alpha_t$. The line above, read with $\alpha_1$ replaced by $\bar\alpha_{t-1}$, says that the result is
# $1-\alpha_t\bar\alpha_{t-1} = 1-\bar\alpha_t$. The factor of $x_0$ becomes $\sqrt{\alpha_t}\sqrt{\bar\alpha_{t-1}} = \sqrt{\bar\alpha_t}$. By induction the claim holds for every $t$. ∎
#
# **The word that carries the proof is *independent*.** The slide adds the variances of any two Gaussians. Take $\epsilon_2 = -\epsilon_1$: both are
# Gaussian, each of variance 1, and their sum is not of variance 2. It is 0.

# %%
e1 = torch.randn(100_000, generator=g)
claim("independent noises: the variances add", abs((e1 + torch.randn(100_000, generator=g)).var() - 2) < 0.05)
print("variance of ε₁ + (−ε₁):", (e1 + (-e1)).var().item())

# %% [markdown]
# **By experiment.** 100,000 walks of 200 steps from one and the same point $x_0$, against 100,000 jumps from there. If the claim holds, the two are samples of one distribution. A Kolmogorov–Smirnov test looks for a difference between two samples; a p-value above a small threshold means that it sees none. (That is no proof, and it looks at one coordinate at a time.) With a threshold of 0.0005 for each of the two
# coordinates, it would cry wolf once in a thousand times. The test must also be able to fail: it has to find a jump whose noise is 5 % too large.

# %%
one_point = spiral[:1].expand(100_000, 2)
noise = torch.randn(one_point.shape, generator=g)
walked_from_one, jumped_from_one = walk(one_point, 200, g), chain.perturb(one_point, 200, noise)


def smallest_p(a, b):
    return min(stats.ks_2samp(a[:, i].numpy(), b[:, i].numpy()).pvalue for i in (0, 1))


claim("200 steps and one jump: no difference found", smallest_p(walked_from_one, jumped_from_one) > 0.0005)
louder = jumped_from_one + 0.05 * chain.sigma(200) * noise
claim("noise 5 % too large would be found", smallest_p(walked_from_one, louder) < 0.0005)

# %%
others = toy.swiss_roll(1000, g)
jumped = chain.perturb(others, 200, torch.randn(others.shape, generator=g))
plots.overlay(walked[:1000], jumped, labels=["200 steps", "one jump"])

# %% [markdown]
# The two clouds lie on each other. So training can jump to any $t$ at once, and one training step costs one call of the network, whatever $t$ is.
# The code is the equation:

# %%
show_source(chain.perturb)

# %% [markdown]
# Here `_alpha(t)` is $\sqrt{\bar\alpha_t}$ and `_sigma(t)` is $\sqrt{1-\bar\alpha_t}$; `expand` only brings them to the shape of the batch. You call them as
# `chain.alpha(t)` and `chain.sigma(t)`. Mind that `chain.alpha(t)` is not the lecture's $\alpha_t$, which is `1 - chain.betas[t]`.
#
# > **Two variables, one name.** The slides write $\epsilon_t$ for the noise of step $t$, and $\epsilon_t$ again in $x_t = \sqrt{\bar\alpha_t}\,x_0 + \sqrt{1-\bar\alpha_t}\,\epsilon_t$. The
# > second one is all the noise of $t$ steps, merged: $\sqrt{1-\bar\alpha_t}\,\epsilon = \sqrt{\alpha_t(1-\bar\alpha_{t-1})}\,\epsilon' + \sqrt{\beta_t}\,\epsilon_t$, where $\epsilon'$ is
# > merged up to $t-1$. So the two are different variables, with correlation $\sqrt{\beta_t/(1-\bar\alpha_t)}$, which is 0.11 at $t = 200$. In this course
# > $\epsilon$ without an index is the merged one, and it is the one that the network will predict.

# %%
before, step_noise = torch.randn(2, 100_000, generator=g).double()  # ε' and ε_t
beta = chain.betas[200]
merged = ((1 - beta).sqrt() * chain.sigma(199) * before + beta.sqrt() * step_noise) / chain.sigma(200)
measured = torch.corrcoef(torch.stack([step_noise, merged]))[0, 1]
claim("their correlation is √(β_t / (1 − ᾱ_t))", abs(measured - beta.sqrt() / chain.sigma(200)) < 0.015)

# %% [markdown]
# ### 2.3 Spot the bug
#
# Here is a step with three mistakes: `x + beta * torch.rand_like(x)`. (Two of them stood in a public tutorial.) Find all three, and say where the
# cloud will be after 1000 steps, before you run the cell. (The $\beta_t$ of our chain sum to 10.)

# %%
bug = spiral[:2000]
for t in range(1, 1001):
    bug = bug + float(chain.betas[t]) * torch.rand(bug.shape, generator=g)
right = chain.perturb(spiral[:2000], 1000, torch.randn(2000, 2, generator=g))
claim(
    "the right chain ends with mean 0 and deviation 1, nearly", abs(right.mean()) < 0.08 and abs(right.std() - 1) < 0.05
)
claim("the buggy one drifts by 5, on average over both coordinates", abs((bug - spiral[:2000]).mean() - 5) < 0.1)
claim(
    "and its first coordinate still follows the spiral's",
    torch.corrcoef(torch.stack([bug[:, 0], spiral[:2000, 0]]))[0, 1] > 0.9,
)
plots.overlay(right, bug, labels=["right", "buggy"])

# %% [markdown]
# <details><summary>What is wrong</summary>
#
# The buggy cloud has moved up and to the right, and it is still a spiral. `rand` draws from $[0, 1]$, whose mean is not 0, so every step pushes the same
# way. `beta` stands where $\sqrt\beta$ should, so the noise is far too small. And nothing shrinks $x$: its variance can only grow, and never settles at 1. With noise this small the data are never forgotten.
#
# </details>
#
# The formula of the slide text, $\mathcal N(\sqrt{\bar\alpha_t}\,x_{t-1}, \dots)$, forgets too fast instead. It shrinks by the whole $\sqrt{\bar\alpha_t}$ in every single step.

# %%
kept, wrong = 1.0, 1.0
for t in range(1, 201):
    kept *= (1 - float(chain.betas[t])) ** 0.5
    wrong *= float(chain.alpha(t))
claim("the factor of x_0 after 200 steps is √ᾱ_200", abs(kept - float(chain.alpha(200))) < 1e-12)
claim("that is above 0.8, and with the slide text's formula below 1e-4", kept > 0.8 and wrong < 1e-4)

# %% [markdown]
# ### 2.4 The end of the chain must be noise
#
# Sampling will start from $\mathcal N(0, I)$. So the chain must end there: $\bar\alpha_T \approx 0$. At step $t$ the image is left with the factor $\sqrt{\bar\alpha_t}$. Its square $\bar\alpha_t$ is the share of the variance of $x_t$ that still comes from the image (for a pixel of variance 1).
#
# The authors of DDPM (*denoising diffusion probabilistic models*, Ho et al., 2020) let $\beta_t$ rise linearly from $10^{-4}$ to $0.02$ over $T = 1000$ steps. This is our `chain`. With another $T$,
# `linear_betas(T)` multiplies every $\beta_t$ by $1000/T$, so that the chain still ends in noise.
#
# The slide asks that $\alpha_t$ be a decreasing sequence. What is needed is less: every $\alpha_t$ between 0 and 1, so that $\bar\alpha_t$ falls by itself, and
# enough steps that it falls to about 0. A constant $\alpha_t$ will do, and even one that increases. (For the way back, each step must also be small; section 3.1 says why.)

# %%
schedules = {
    "linear β": chain,
    "constant β": DiscretePath(constant_betas(1000)),
    "falling β": DiscretePath(linear_betas(1000).flip(0)),  # here α_t increases
}
for name, path in schedules.items():
    claim(
        f"{name}: ᾱ_t falls at every step, to below 1e-4",
        (path.alpha_bars.diff() < 0).all() and path.alpha_bars[-1] < 1e-4,
    )
t = torch.arange(1001)
plots.curves(t, {name: path.alpha_bars for name, path in schedules.items()}, "t", "share of the image's variance, ᾱ")

# %% [markdown]
# All end near 0. The constant schedule spends half of its steps on what is noise already, and falling β is worse; the linear one lets the image fade over more of them. Only 1 % of the image's variance is left from step 459 on (constant β), 263 (falling β), 674 (linear β).
#
# Now move $t$ yourself. At which $t$ does each digit lose its class? Compare with the number you wrote down.

# %%
chosen = torch.stack([digits[labels == c][0] for c in range(10)])
fixed = torch.randn(chosen.shape, generator=g)


def noised(t):
    return plots.grid(chain.perturb(chosen, t, fixed), columns=5)


widgets.explore(noised, t=([0, 50, 100, 150, 200, 250, 300, 400, 500, 600, 800, 1000], 200))

# %% [markdown]
# ## 3. The reverse process
#
# ### 3.1 What we would like to have
#
# To generate, start from noise $x_T\sim\mathcal N(0, I)$ and go back: draw $x_{T-1}$, then $x_{T-2}$, down to $x_0$. For each step we need
# $q(x_{t-1}\mid x_t)$: *given this noisy image, how did it look one step before?* By Bayes' rule
#
# $$q(x_{t-1}\mid x_t) = \frac{q(x_t\mid x_{t-1})\;q(x_{t-1})}{q(x_t)}.$$
#
# The first factor is known. But $q(x_{t-1})$ is the distribution of noisy *images*, all of them. Nobody knows it. So this step back cannot be computed.
# We learn it, with a model of the form
#
# $$p_\theta(x_{t-1}\mid x_t) = \mathcal N\bigl(x_{t-1};\ \mu_\theta(x_t, t),\ \Sigma_\theta(x_t, t)\bigr).$$
#
# **Why may it be Gaussian?** In general it may not. It may when the step is small. Take the logarithm of Bayes' rule: up to a constant, $\log q(x_{t-1}\mid x_t)$ is
# the parabola of a Gaussian with standard deviation about $\sqrt{\beta_t}$ (the first factor), plus $\log q(x_{t-1})$. If $\beta_t$ is small, the second is nearly a straight line across
# that width, and a parabola plus a straight line is a parabola again: a Gaussian.
#
# A KL divergence will say how far the Gaussian is from the exact answer: 0 if they are equal. With the natural logarithm its unit is the *nat* (1 nat = 1.44 bits).
#
# Here is a world where the exact answer is known: data at $-1$ and $+1$, each a little blurred. We stand at $x_{400} = 0.2$ and ask for the exact
# distribution some steps earlier. *What would you expect* for one step back, and for all 400?

# %%
two = toy.GaussianMixture(torch.tensor([[-1.0], [1.0]], dtype=torch.float64), 0.15**2)
line = torch.linspace(-3, 3, 60_001, dtype=torch.float64)


def exact_and_gaussian(steps, t=400, xt=0.2):
    """log q(x_s | x_t) on the line, for s = t − steps, and the Gaussian of the same mean and variance."""
    shrink, v = chain.transition(t - steps, t)  # x_t given x_s has mean shrink·x_s and variance v
    # Bayes: log q(x_s) of the noised data, plus log q(x_t | x_s); then normalise
    log_q = two.log_prob(line[:, None], chain, t - steps) - (xt - shrink * line) ** 2 / (2 * v)
    log_q = log_q - torch.trapezoid(log_q.exp(), line).log()
    mean = torch.trapezoid(log_q.exp() * line, line)
    std = torch.trapezoid(log_q.exp() * (line - mean) ** 2, line).sqrt()
    return log_q, torch.distributions.Normal(mean, std).log_prob(line)


# %%
def kl(log_q, log_p):
    return torch.trapezoid(log_q.exp() * (log_q - log_p), line)


def back(steps):
    log_q, log_p = exact_and_gaussian(steps)
    return plots.curves(line[::30], {"exact": log_q[::30].exp(), "Gaussian": log_p[::30].exp()}, "x", "density")


claim("one step back is nearly a Gaussian (KL below 1e-6 nats)", kl(*exact_and_gaussian(1)) < 1e-6)
places = torch.linspace(-2, 2, 41, dtype=torch.float64)  # to average the KL over x_100
seen_there = two.log_prob(places[:, None], chain, 100).softmax(0)
average = sum(w * kl(*exact_and_gaussian(1, 100, x.item())) for w, x in zip(seen_there, places, strict=True))
claim("averaged over x_100, one step back is nearly a Gaussian too", average < 1e-5)
claim("400 steps back it is not (KL above 0.5 nats)", kl(*exact_and_gaussian(400)) > 0.5)
widgets.explore(back, steps=([1, 10, 30, 100, 200, 300, 350, 400], 400))

# %% [markdown]
# All 400 steps back the answer has two humps, and no Gaussian fits. One step back the two curves are the same line; from here, 30 steps at once would still do. The
# narrower the humps of the data, the smaller the steps have to be, and this is why diffusion takes many. **Averaged over $x_t$, a Gaussian is a very good model of a small step, and it is exact in the limit of small steps
# at a fixed noise level above 0.** (Noised data always have a smooth density. The last step, to the data, needs data that have one themselves; grey levels do not, and section 4.5 treats them apart.) At single places it may fail: section 3.4 has one where a step has two humps.

# %% [markdown]
# ### 3.2 The posterior: one step back when $x_0$ is known
#
# We cannot compute $q(x_{t-1}\mid x_t)$. But if someone tells us the clean image as well, we can:
#
# $$q(x_{t-1}\mid x_t, x_0) = \frac{q(x_t\mid x_{t-1})\;q(x_{t-1}\mid x_0)}{q(x_t\mid x_0)}.$$
#
# All three factors are Gaussians of section 2. (In the first one $x_0$ is dropped: the chain is Markov.) Look at one pixel. $-2$ times the logarithm of the right side is, up to a
# constant,
#
# $$\frac{(x_t-\sqrt{\alpha_t}\,x_{t-1})^2}{\beta_t} + \frac{(x_{t-1}-\sqrt{\bar\alpha_{t-1}}\,x_0)^2}{1-\bar\alpha_{t-1}} - \frac{(x_t-\sqrt{\bar\alpha_t}\,x_0)^2}{1-\bar\alpha_t}.$$
#
# This is quadratic in $x_{t-1}$, so the left side is a Gaussian: up to a term without $x_{t-1}$, the expression is $(x_{t-1}-\tilde\mu_t)^2/\tilde\beta_t$ for some $\tilde\mu_t$ and $\tilde\beta_t$. Compare what stands
# with $x_{t-1}^2$ and with $x_{t-1}$, for $t\ge 2$:
#
# $$\frac{1}{\tilde\beta_t} = \frac{\alpha_t}{\beta_t}+\frac{1}{1-\bar\alpha_{t-1}},\qquad
#   \frac{\tilde\mu_t}{\tilde\beta_t} = \frac{\sqrt{\alpha_t}}{\beta_t}\,x_t+\frac{\sqrt{\bar\alpha_{t-1}}}{1-\bar\alpha_{t-1}}\,x_0.$$
#
# *(In the slide text the second coefficient lacks $x_0$.)* Over one denominator, $\frac1{\tilde\beta_t}=\frac{\alpha_t(1-\bar\alpha_{t-1})+\beta_t}{\beta_t(1-\bar\alpha_{t-1})}$, and with $\alpha_t\bar\alpha_{t-1}=\bar\alpha_t$ the numerator is $1-\bar\alpha_t$. So
#
# $$\tilde\mu_t = \frac{\sqrt{\alpha_t}\,(1-\bar\alpha_{t-1})}{1-\bar\alpha_t}\,x_t + \frac{\sqrt{\bar\alpha_{t-1}}\,\beta_t}{1-\bar\alpha_t}\,x_0,\qquad
#   \tilde\beta_t = \frac{1-\bar\alpha_{t-1}}{1-\bar\alpha_t}\,\beta_t.$$
#
# At $t = 1$ read it as the limit: $x_0$, with variance 0. And the term without $x_{t-1}$? The slide drops it. A computer algebra system finds that nothing was there to drop: the remainder is exactly 0. With the slide text's coefficient it is not. (The slide also completes $ax^2+bx+c$ with a $b$ that it had defined by $-bx$; that would turn the sign of the mean.)

# %%
X0, XS, XT = sympy.symbols("x_0 x_s x_t", real=True)  # XS stands for x_{t−1}, abar for ᾱ_{t−1}
abar_t = a * abar
left = (XT - sympy.sqrt(a) * XS) ** 2 / (1 - a) + (XS - sympy.sqrt(abar) * X0) ** 2 / (1 - abar)
left -= (XT - sympy.sqrt(abar_t) * X0) ** 2 / (1 - abar_t)
mu_tilde = (sympy.sqrt(a) * (1 - abar) * XT + sympy.sqrt(abar) * (1 - a) * X0) / (1 - abar_t)
beta_tilde = (1 - abar) / (1 - abar_t) * (1 - a)
claim("the square is complete, with remainder 0", sympy.simplify(left - (XS - mu_tilde) ** 2 / beta_tilde) == 0)
in_front = (1 - abar_t) / ((1 - a) * (1 - abar))  # the square of the three factors in front of the exponential
claim("the factor in front of the exponential fits: it is 1/√β̃", sympy.simplify(in_front * beta_tilde) == 1)


# %%
def slope(last):  # what stands with x_{t−1}; `last` is x_0, which the slide text leaves out
    return sympy.sqrt(a) / (1 - a) * XT + sympy.sqrt(abar) / (1 - abar) * last


curvature = a / (1 - a) + 1 / (1 - abar)
claim(
    "slope / curvature is μ̃; without x_0 it is not",
    sympy.simplify(slope(X0) / curvature - mu_tilde) == 0 and sympy.simplify(slope(1) / curvature - mu_tilde) != 0,
)
rest = sympy.expand(left - (curvature * XS**2 - 2 * slope(X0) * XS))  # the terms without x_{t−1}
claim("what completing the square leaves is 0", sympy.simplify(rest - slope(X0) ** 2 / curvature) == 0)
claim("with the slide text's coefficient it is not", sympy.simplify(rest - slope(1) ** 2 / curvature) != 0)

# %% [markdown]
# A second, independent check: Bayes' rule by brute force, with numbers on a fine grid, against the course's code, `chain.posterior`. Algebra checks the formula; numbers check the code.

# %%
t, xt_value, x0_value = 300, 0.4, -0.7
of_xt = torch.distributions.Normal((1 - chain.betas[t]).sqrt() * line, chain.betas[t].sqrt()).log_prob(
    torch.tensor(xt_value, dtype=torch.float64)
)
prior = torch.distributions.Normal(chain.alpha(t - 1) * x0_value, chain.sigma(t - 1)).log_prob(line)
bayes = (of_xt + prior).exp()
bayes = bayes / torch.trapezoid(bayes, line)
mean = torch.trapezoid(bayes * line, line)
var = torch.trapezoid(bayes * (line - mean) ** 2, line)
formula = chain.posterior(
    torch.tensor([xt_value], dtype=torch.float64), torch.tensor([x0_value], dtype=torch.float64), s=t - 1, t=t
)
claim("posterior mean: formula = brute force, to 1e-8", abs(formula[0].item() - mean) < 1e-8)
claim("posterior variance: formula = brute force, to 1e-8", abs(formula[1].item() - var) < 1e-8)

# %% [markdown]
# What does $\tilde\mu_t$ say? It is a weighted sum of where we are, $x_t$, and where we want to go, $x_0$. At $t = 1$ it is $x_0$ itself, and $\tilde\beta_1 = 0$: given $x_0$,
# nothing is left to chance at the last step. The figure shows the two weights near the data. *Where do they cross?*

# %%
t = torch.arange(1, 1001)
keep, pull, variances = chain.bridge(t - 1, t)  # the weights of x_t and x_0 in the mean, and β̃_t
claim("at t = 1 the posterior is x_0, with variance 0", keep[0] == 0 and pull[0] == 1 and variances[0] == 0)
weights = {"of xₜ": keep[:60], "of x₀": pull[:60]}
plots.curves(t[:60], weights, "t", "weight in the posterior mean")

# %% [markdown]
# They cross between $t = 2$ and $t = 3$: only in the last two steps does $x_0$ weigh more than $x_t$. At $t = 30$ its weight is down to 0.06, and far out $x_0$ hardly moves the mean in a single step. But there are many, and their small pulls add up.

# %% [markdown]
# ### 3.3 Let the network guess the noise
#
# When we sample, nobody tells us $x_0$. So a network guesses it, and the guess goes into $\tilde\mu_t$. The network may guess $x_0$ or the noise
# $\epsilon$ in $x_t$. While $\bar\alpha_t > 0$, $x_t$ and one of them give the other: $x_0 = (x_t-\sqrt{1-\bar\alpha_t}\,\epsilon)/\sqrt{\bar\alpha_t}$. DDPM lets it guess the noise, $\epsilon_\theta(x_t, t)$. One network serves
# all $t$: the time is one of its inputs. Put into $\tilde\mu_t$, the guess gives
#
# $$\mu_\theta(x_t, t) = \frac{1}{\sqrt{\alpha_t}}\Bigl(x_t - \frac{1-\alpha_t}{\sqrt{1-\bar\alpha_t}}\,\epsilon_\theta(x_t, t)\Bigr).$$
#
# By hand: put $x_0=(x_t-\sqrt{1-\bar\alpha_t}\,\epsilon)/\sqrt{\bar\alpha_t}$ into $\tilde\mu_t$. The factor of $x_t$ becomes $\frac{\alpha_t(1-\bar\alpha_{t-1})+\beta_t}{\sqrt{\alpha_t}(1-\bar\alpha_t)}=\frac1{\sqrt{\alpha_t}}$, as the numerator is $1-\bar\alpha_t$; that of $\epsilon$ becomes $-\frac{\beta_t}{\sqrt{\alpha_t}\sqrt{1-\bar\alpha_t}}$.

# %%
eps_true, eps_guess = sympy.symbols("epsilon epsilon_theta", real=True)
from_noise = (XT - sympy.sqrt(1 - abar_t) * eps_true) / sympy.sqrt(abar_t)
mu = (XT - (1 - a) / sympy.sqrt(1 - abar_t) * eps_true) / sympy.sqrt(a)
claim("the posterior mean in terms of the noise", sympy.simplify(mu_tilde.subs(X0, from_noise) - mu) == 0)

# %% [markdown]
# In code, a `Denoiser` puts a network and a path together. `predicts="eps"` says what the network's output means. Called as `denoiser(xt, t)`, it gives the guess of the clean data,
# $\hat x_0 = (x_t-\sqrt{1-\bar\alpha_t}\,\epsilon_\theta)/\sqrt{\bar\alpha_t}$, whatever the network predicts.

# %% [markdown]
# ### 3.4 How random is one step back?
#
# The mean of the reverse step is what the network gives. What about its variance? The true one is not known either, but it can be boxed in. Take one coordinate. The *law of total variance* splits its variance by what is known; here everything is given $x_t$: $\mathrm{Var}(x_{t-1}) = \mathbb E[\mathrm{Var}(x_{t-1}\mid x_0)]+\mathrm{Var}(\mathbb E[x_{t-1}\mid x_0])$. By section 3.2,
# $x_{t-1}$ has variance $\tilde\beta_t$ once $x_0$ is known, and its mean moves with $x_0$ by the factor $c_t = \sqrt{\bar\alpha_{t-1}}\,\beta_t/(1-\bar\alpha_t)$. So
#
# $$\mathrm{Var}(x_{t-1}\mid x_t) = \tilde\beta_t + c_t^2\;\mathrm{Var}(x_0\mid x_t).$$
#
# This is exact, for any data and at every $x_t$. On the line we can look at both sides, with the densities of section 3.1 that Bayes' rule gave:


# %%
def variance_back(steps):
    density = exact_and_gaussian(steps)[0].exp()  # of x_{400 − steps}, given x_400 = 0.2
    mean = torch.trapezoid(density * line, line)
    return torch.trapezoid(density * (line - mean) ** 2, line)


_, c_400, beta_tilde_400 = chain.bridge(399, 400)
both_sides = variance_back(1), beta_tilde_400 + c_400**2 * variance_back(400)
claim("Var(x_399 | x_400) = β̃ + c² Var(x_0 | x_400)", abs(both_sides[0] - both_sides[1]) < 1e-12)

# %% [markdown]
# **From below.** A variance is not negative, so $\mathrm{Var}(x_{t-1}\mid x_t)\ge\tilde\beta_t$. This holds *pointwise*, with equality if $x_0$ is one fixed point.
#
# **From above.** A squared error is smallest at the mean. So the best guess of $x_0$ from $x_t$, the $\hat x_0$ of an ideal network, is $\hat x_0^* = \mathbb E[x_0\mid x_t]$, and its mean squared error is $\mathbb E\,\mathrm{Var}(x_0\mid x_t)$. A guess of the form $k\,x_t$ cannot do better. For $x_0$ of mean 0 and variance $V$ its error is
# $V(1-k\sqrt{\bar\alpha_t})^2+k^2(1-\bar\alpha_t)$, which is least at $k_t = \sqrt{\bar\alpha_t}\,V/(\bar\alpha_t V+1-\bar\alpha_t)$, where it is $V(1-\bar\alpha_t)/(\bar\alpha_t V+1-\bar\alpha_t)$. (A mean other than 0 only shifts the guess.) A pixel in $[-1, 1]$ always has $V\le 1$. Then that is at most $1-\bar\alpha_t$. So $\mathbb E\,\mathrm{Var}(x_{t-1}\mid x_t)\le\tilde\beta_t+c_t^2(1-\bar\alpha_t)$, and this is $\beta_t$:

# %%
c = sympy.sqrt(abar) * (1 - a) / (1 - abar_t)
claim("β̃ + c²(1 − ᾱ) = β", sympy.simplify(beta_tilde + c**2 * (1 - abar_t) - (1 - a)) == 0)
V, k = sympy.symbols("V k", positive=True)
error = V * (1 - k * sympy.sqrt(abar_t)) ** 2 + k**2 * (1 - abar_t)
best_k = sympy.sqrt(abar_t) * V / (abar_t * V + 1 - abar_t)
linear = V * (1 - abar_t) / (abar_t * V + 1 - abar_t)
claim("the error is flat at k_t", sympy.simplify(error.diff(k).subs(k, best_k)) == 0)
claim("and there it is V(1 − ᾱ)/(ᾱV + 1 − ᾱ)", sympy.simplify(error.subs(k, best_k) - linear) == 0)
slack = (1 - V) * (1 - abar_t) ** 2 / (abar_t * V + 1 - abar_t)  # not negative for V ≤ 1
claim("the best linear guess leaves at most 1 − ᾱ if V ≤ 1", sympy.simplify(1 - abar_t - linear - slack) == 0)

# %% [markdown]
# For $\mathcal N(0, 1)$ data the best guess *is* linear and $V = 1$: the upper bound is reached. So $\tilde\beta_t\le\mathbb E\,\mathrm{Var}(x_{t-1}\mid x_t)\le\beta_t$, **on average over $x_t$, for a coordinate of variance at most 1**.
#
# We check it on data whose best guess is known in closed form. As $\mathrm{Var}(x_0\mid x_t)=\mathbb E[x_0^2\mid x_t]-(\hat x_0^*)^2$, its average is $\mathbb E x_0^2-\mathbb E(\hat x_0^*)^2$: two integrals on the line. Three kinds of data: two humps at $\pm 0.95$ (variance 0.93), $\mathcal N(0, 1)$, and $\mathcal N(0, 4)$, which the bound does not cover.

# %%
wide_line = torch.linspace(-24, 24, 9601, dtype=torch.float64)


def mean_variance(mixture, t):
    """E Var(x_{t−1} | x_t) = β̃_t + c_t² (E x_0² − E x̂*_0²), by integrals on a grid."""
    q = mixture.log_prob(wide_line[:, None], chain, t).exp()
    guess = mixture.denoiser(chain)(wide_line[:, None], t)[:, 0]  # E[x_0 | x_t], exactly
    second_moment = torch.trapezoid(mixture.log_prob(wide_line[:, None]).exp() * wide_line**2, wide_line)
    _, c, beta_tilde = chain.bridge(t - 1, t)
    return beta_tilde + c**2 * (second_moment - torch.trapezoid(q * guess**2, wide_line))


def on_a_line(means, std):
    return toy.GaussianMixture(torch.tensor(means, dtype=torch.float64)[:, None], std**2)


laws = {"two humps": on_a_line([-0.95, 0.95], 0.15), "N(0, 1)": on_a_line([0.0], 1.0), "N(0, 4)": on_a_line([0.0], 2.0)}

# %%
t = torch.arange(1, 1001)
lower, upper = chain.bridge(t - 1, t)[2], chain.betas[t]
some = torch.logspace(0.4, 3, 30).long().unique()  # from 2 to 1000
found = {name: torch.stack([mean_variance(law, k) for k in some.tolist()]) for name, law in laws.items()}
inside = (found["two humps"] > lower[some - 1]) & (found["two humps"] < upper[some - 1])
claim("two humps: β̃ < E Var < β, at every t tried", inside.all())
claim("N(0, 1): E Var = β, to 1e-9 of it", torch.allclose(found["N(0, 1)"], upper[some - 1], rtol=1e-9, atol=0))
claim("N(0, 4): the upper bound fails at every t tried", (found["N(0, 4)"] > upper[some - 1]).all())
at_a_tenth = [
    path.bridge(path.T // 10 - 1, path.T // 10)[2] / path.betas[path.T // 10]
    for path in map(DiscretePath, map(linear_betas, (50, 200, 1000)))
]
claim("at t = T/10, β̃/β rises with the number of steps", at_a_tenth[0] < at_a_tenth[1] < at_a_tenth[2])
claim("β̃/β is 0 at t = 1 and above 0.9 from t = 20 on", lower[0] == 0 and (lower / upper)[19:].min() > 0.9)
plots.curves(t[:100], {"β̃ / β": (lower / upper)[:100]}, "t", "ratio of the two bounds")

# %% [markdown]
# The gap between the bounds is whole at $t = 1$ (0 against $\beta_1$), and below 10 % from $t = 20$ on. *(The slide says that the range is small "when diffusion step is large": with many steps, at a fixed share $t/T > 0$. At $t = 2$ the ratio tends to ½, and not to 1, as the number of steps grows: 0.33 for 200 steps, 0.45 for 1000.)*
#
# **On average is not pointwise.** Take data at $-1$ and $+1$ and stand at $x_{10} = 0$, right between. *Guess: how does $\mathrm{Var}(x_9\mid x_{10} = 0)$ compare with $\beta_{10}$?* (Here $\beta_{10}\approx 0.00028$ and $c_{10}\approx 0.15$.) Given $x_{10} = 0$, $x_0$ is $-1$ or $+1$ with equal chance, so its variance is 1, and
# the formula above gives the answer.

# %%
_, c, beta_tilde_10 = chain.bridge(9, 10)
ratio = (beta_tilde_10 + c**2 * 1.0) / chain.betas[10]
claim("at x_10 = 0 the true variance is about 78 times β_10", 78 < ratio < 79)

# %% [markdown]
# Given $x_{10} = 0$, $x_9$ is near $+0.15$ or near $-0.15$, each with a deviation of only $\sqrt{\tilde\beta_{10}}\approx 0.015$: two humps, and no Gaussian. Such places are rare: hardly any point is there. That is why an average may stay below $\beta_t$ all the same.
#
# So $\tilde\beta_t$ and $\beta_t$ are two sensible constants for $\Sigma_\theta$. One slide takes the upper one, a later slide the lower one. It is a choice, and we state it each time.

# %% [markdown]
# ## 4. The loss
#
# ### 4.1 A bound on the likelihood
#
# The model is $p_\theta(x_{0:T}) = p(x_T)\prod_{t=1}^T p_\theta(x_{t-1}\mid x_t)$ with $p(x_T) = \mathcal N(0, I)$. Read it as a VAE with the latent variables $x_1,\dots,x_T$ and an encoder $q(x_{1:T}\mid x_0)$ that is fixed. We
# would like a small $-\log p_\theta(x_0)$ for real images. But $p_\theta(x_0) = \int p_\theta(x_0\mid x_{1:T})\,p_\theta(x_{1:T})\,dx_{1:T}$ is an integral over all walks, out of reach; and the data distribution $q(x_0)$ is known by samples only. As for every VAE, a bound takes its place.
#
# **First, why a KL divergence is never negative.** For every $z > 0$: $-\log z\ge 1-z$, with equality at $z = 1$ only. Put in $z = p/q$ and average over $q$:
# $$D_{KL}(q\Vert p) = \mathbb E_q\Bigl[-\log\frac{p}{q}\Bigr] \ge \mathbb E_q\Bigl[1-\frac{p}{q}\Bigr] \ge 1 - 1 = 0.$$
# ($\mathbb E_q[p/q]$ is the integral of $p$ over the places where $q>0$, so at most 1.)

# %%
z = sympy.symbols("z", positive=True)
gap = -sympy.log(z) - (1 - z)
claim(
    "−log z − (1 − z) has its only flat point at z = 1, where it is 0",
    sympy.solve(gap.diff(z), z) == [1] and gap.subs(z, 1) == 0,
)
claim("and it is convex, so it is never negative", sympy.simplify(gap.diff(z, 2) * z**2) == 1)

# %% [markdown]
# **Now the bound.** Compare the two distributions of the walk, the one we know and the one of the model, for one fixed $x_0$:
#
# $$\begin{aligned}
# 0 &\le D_{KL}\bigl(q(x_{1:T}\mid x_0)\,\Vert\,p_\theta(x_{1:T}\mid x_0)\bigr)\\
#   &= \mathbb E_{q(x_{1:T}\mid x_0)}\bigl[\log q(x_{1:T}\mid x_0)-\log p_\theta(x_{1:T}\mid x_0)\bigr] &&\text{definition}\\
#   &= \mathbb E_{q(x_{1:T}\mid x_0)}\Bigl[\log q(x_{1:T}\mid x_0)-\log\frac{p_\theta(x_{0:T})}{p_\theta(x_0)}\Bigr] &&\text{conditional density}\\
#   &= \mathbb E_{q(x_{1:T}\mid x_0)}\bigl[\log q(x_{1:T}\mid x_0)-\log p_\theta(x_{0:T})\bigr] + \log p_\theta(x_0). &&\text{the last term has no walk in it}
# \end{aligned}$$
#
# So for **every single $x_0$**
#
# $$-\log p_\theta(x_0)\ \le\ \mathbb E_{q(x_{1:T}\mid x_0)}\bigl[\log q(x_{1:T}\mid x_0)-\log p_\theta(x_{0:T})\bigr],$$
#
# and the gap is the KL divergence that we started from. Both sides may be averaged over the data, which gives the slide's formula. *(The slide text reads <. It is ≤, with equality if $p_\theta(x_{1:T}\mid x_0) = q(x_{1:T}\mid x_0)$. What is made small, the right side, is $-$ELBO: the
# ELBO itself is a bound on $+\log p_\theta$ from below.)*
#
# ### 4.2 Three terms
#
# The bound compares a forward $q(x_t\mid x_{t-1})$ with a backward $p_\theta(x_{t-1}\mid x_t)$. To compare like with like, turn $q$ round. The chain is Markov, so $q(x_t\mid x_{t-1}) = q(x_t\mid x_{t-1}, x_0)$, and Bayes' rule gives, for $t\ge 2$ (at $t = 1$ the denominator would be $q(x_0\mid x_0)$, which is no density),
#
# $$q(x_t\mid x_{t-1}) = q(x_{t-1}\mid x_t, x_0)\;\frac{q(x_t\mid x_0)}{q(x_{t-1}\mid x_0)}.$$
#
# Multiply over $t = 2,\dots,T$. In the product of fractions each denominator cancels the numerator before it; $q(x_T\mid x_0)/q(x_1\mid x_0)$ is left. With the first factor, $q(x_1\mid x_0)$,
#
# $$q(x_{1:T}\mid x_0) = q(x_1\mid x_0)\cdot\frac{q(x_T\mid x_0)}{q(x_1\mid x_0)}\prod_{t=2}^T q(x_{t-1}\mid x_t,x_0) = q(x_T\mid x_0)\prod_{t=2}^T q(x_{t-1}\mid x_t,x_0).$$
#
# This holds *pointwise*: for every walk, likely or not. Let us see it on three walks of 50 steps that this chain would practically never take.

# %%
little = DiscretePath(linear_betas(50))
normal = torch.distributions.Normal
odd = torch.randn(51, 3, 1, generator=g, dtype=torch.float64).cumsum(0)  # odd[t] is x_t of three odd walks
forwards = backwards = 0
for t in range(1, 51):
    shrink, step_var = little.transition(t - 1, t)  # √α_t and β_t
    forwards = forwards + normal(shrink * odd[t - 1], step_var.sqrt()).log_prob(odd[t])
    if t > 1:
        mean, var = little.posterior(odd[t], odd[0], t - 1, t)
        backwards = backwards + normal(mean, var.sqrt()).log_prob(odd[t - 1])
backwards = backwards + normal(little.alpha(50) * odd[0], little.sigma(50)).log_prob(odd[50])
claim(
    "Σ log q(x_t | x_{t−1}) = log q(x_T | x_0) + Σ log q(x_{t−1} | x_t, x_0), walk by walk",
    torch.allclose(forwards, backwards, rtol=1e-10),
)

# %% [markdown]
# With this in hand, a case where the bound is *equal* to $-\log p_\theta(x_0)$, even walk by walk: $\mathcal N(0,1)$ data with the best guess $\sqrt{\bar\alpha_t}\,x_t$ and $\Sigma_\theta = \beta_t$. Then $p_\theta$ runs $q$ exactly backwards.

# %%
model = normal(0.0, 1.0).log_prob(odd[50])
for t in range(1, 51):
    keep, pull, _ = little.bridge(t - 1, t)
    mean = (keep + pull * little.alpha(t)) * odd[t]
    model = model + normal(mean, little.betas[t].sqrt()).log_prob(odd[t - 1])
claim(
    "log q(x_{1:T} | x_0) − log p_θ(x_{0:T}) = −log p_θ(x_0), walk by walk",
    torch.allclose(forwards - model, -normal(0.0, 1.0).log_prob(odd[0]), rtol=1e-10),
)

# %% [markdown]
# Put the product into the bound, together with $p_\theta(x_{0:T}) = p(x_T)\,\prod_{t=2}^T p_\theta(x_{t-1}\mid x_t)\cdot p_\theta(x_0\mid x_1)$, and pair the factors:
#
# $$\mathbb E_q\Bigl[\log\frac{q(x_T\mid x_0)}{p(x_T)} + \sum_{t=2}^T\log\frac{q(x_{t-1}\mid x_t,x_0)}{p_\theta(x_{t-1}\mid x_t)} - \log p_\theta(x_0\mid x_1)\Bigr].$$
#
# *(In the slide text the product sign stands outside of the logarithm: $\log p(x_T)\prod_t p$ must be read as $\log[\,p(x_T)\prod_t p\,]$.)* Last step: in the term of $t$, average over $x_{t-1}$ first, with $x_t$ and $x_0$ held. That inner average is a KL divergence, by definition. So the bound is
#
# $$\begin{aligned}
# &\underbrace{D_{KL}\bigl(q(x_T\mid x_0)\,\Vert\,p(x_T)\bigr)}_{L_T}
#   + \sum_{t=2}^{T}\mathbb E_{q(x_t\mid x_0)}\underbrace{D_{KL}\bigl(q(x_{t-1}\mid x_t,x_0)\,\Vert\,p_\theta(x_{t-1}\mid x_t)\bigr)}_{L_{t-1}}\\
# &\quad+\ \mathbb E_{q(x_1\mid x_0)}\bigl[\underbrace{-\log p_\theta(x_0\mid x_1)}_{L_0}\bigr].
# \end{aligned}$$
#
# - $L_T$, the prior term, has no parameters, and it is about 0 because the chain ends in noise.
# - $L_{t-1}$ compares two Gaussians: the posterior, which knows $x_0$, and the model, which does not.
# - $L_0$ is the last step, to the data.
#
# The step from pairs to KL divergences holds *on average*, not walk by walk. What one gains is terms that can be drawn and trained one at a time. Each term by itself also becomes calmer, as its inner average is now a formula. Their *sum* need not: along a walk the errors of the terms partly cancel, and section 4.3 shows a case where whole walks vary less.

# %% [markdown]
# ### 4.3 The bound, computed
#
# In one dimension everything can be computed. The data are those of section 3.1, `two`; the chain has 50 steps, and the model uses $\Sigma_\theta = \beta_t$ and a guess that is wrong on purpose: 0.9 times the best one. Now $p_\theta(x_0)$ *can* be
# computed. Put $p(x_T)$ on a grid, and integrate one step after the other: $p_\theta(x_{t-1}) = \int p_\theta(x_{t-1}\mid x_t)\,p_\theta(x_t)\,dx_t$.

# %%
best = two.denoiser(little)
grid = torch.linspace(-6, 6, 1201, dtype=torch.float64)


def poor(xt, t):
    return 0.9 * best(xt, t)


def reverse_step(xt, t):
    """p_θ(x_{t−1} | x_t): the posterior with the guess in place of x_0, and the variance β_t."""
    keep, pull, _ = little.bridge(t - 1, t)
    return normal(keep * xt + pull * poor(xt, t), little.betas[t].sqrt())


p_grid = normal(0.0, 1.0).log_prob(grid).exp()
for t in range(50, 0, -1):
    p_grid = torch.trapezoid(reverse_step(grid[:, None], t).log_prob(grid).exp() * p_grid[:, None], grid, dim=0)
claim("the model's density p_θ(x_0) integrates to 1", abs(torch.trapezoid(p_grid, grid) - 1) < 1e-6)

# %% [markdown]
# Now the bound, for nine values of $x_0$ with 4,000 walks each, in two ways: *directly*, from the densities of whole walks; and as the *sum of the three terms*, which `likelihood.bound` gives, one row for each term, each with a fresh $x_t$. Each mean has a standard error, and they should agree within a few of these.


# %%
def direct(x):
    """log q(x_{1:T} | x_0) − log p_θ(x_{0:T}), each along one walk."""
    total = 0
    for t in range(1, 51):
        shrink, step_var = little.transition(t - 1, t)
        forward = normal(shrink * x, step_var.sqrt())
        new = forward.mean + forward.stddev * torch.randn(x.shape, generator=g, dtype=x.dtype)
        total = total + forward.log_prob(new) - reverse_step(new, t).log_prob(x)
        x = new
    return total - normal(0.0, 1.0).log_prob(x)


x0 = torch.linspace(-1.6, 1.6, 9, dtype=torch.float64)
many = x0.repeat_interleave(4000)[:, None]
whole_walks = direct(many).reshape(9, 4000)
three_terms = likelihood.bound(poor, little, many, little.times(50), generator=g).sum(0).reshape(9, 4000)
log_p = p_grid[(grid - x0[:, None]).abs().argmin(1)].log()

# %%
error = ((whole_walks.var(1) + three_terms.var(1)) / 4000).sqrt()
claim(
    "both ways agree within 5 standard errors, at each x_0",
    ((whole_walks.mean(1) - three_terms.mean(1)).abs() < 5 * error).all(),
)
claim(
    "on average over these x_0, whole walks vary less than the sum of terms",
    whole_walks.var(1).mean() < three_terms.var(1).mean(),
)
claim("−log p_θ(x_0) ≤ the bound, at each x_0 (pointwise)", (-log_p < three_terms.mean(1)).all())
plots.curves(x0, {"the bound": three_terms.mean(1), "−log p_θ(x₀)": -log_p}, "x₀", "nats")

# %% [markdown]
# The bound lies above at each $x_0$, and the gap is the KL divergence of section 4.1. (A density may exceed 1, so $-\log p$ may be negative.)
#
# And $-\log q(x_0)$, the truth? *Can the model's $-\log p_\theta(x_0)$ be below it, at some $x_0$?* Yes: where the model puts more than there is. **On average over the data it cannot**: the difference of the averages is $D_{KL}(q(x_0)\Vert p_\theta(x_0))\ge 0$.

# %%
log_q = two.log_prob(grid[:, None])
average = [-torch.trapezoid(log_q.exp() * log, grid) for log in (log_q, p_grid.log())]
claim(
    "pointwise, −log p_θ(x_0) is below −log q(x_0) somewhere between the humps",
    (p_grid.log() > log_q)[grid.abs() < 0.5].any(),
)
claim("on average over the data it is not", average[0] < average[1])

# %% [markdown]
# So the chain of averages is $\mathbb E[-\log q]\le\mathbb E[-\log p_\theta]\le\mathbb E[\text{bound}]$. Training lowers the last. The first cannot be lowered: it is the entropy of the data.

# %% [markdown]
# ### 4.4 One term: two Gaussians
#
# The posterior is $\mathcal N(\tilde\mu_t, \tilde\beta_t I)$ and the model $\mathcal N(\mu_\theta, \sigma_t^2 I)$ with some $\Sigma_\theta = \sigma_t^2 I$. (This $\sigma_t$ belongs to one reverse step. It is not `chain.sigma(t)`, which is $\sqrt{1-\bar\alpha_t}$.) In $d$ dimensions, the logarithm of their ratio is
#
# $$\log\Bigl[\Bigl(\frac{\sigma_t^2}{\tilde\beta_t}\Bigr)^{d/2}\exp\Bigl(-\frac{\lVert x_{t-1}-\tilde\mu_t\rVert^2}{2\tilde\beta_t}+\frac{\lVert x_{t-1}-\mu_\theta\rVert^2}{2\sigma_t^2}\Bigr)\Bigr].$$
#
# *(The slide writes it for one dimension, and the bracket after the logarithm is missing.)* Average over the posterior, coordinate by coordinate: $x_{t-1} = \tilde\mu_t+\sqrt{\tilde\beta_t}\,z$ with $\mathbb E z = 0$ and $\mathbb E z^2 = 1$. The result, for any $\sigma_t^2$:
#
# $$L_{t-1} = \frac{1}{2\sigma_t^2}\lVert\tilde\mu_t-\mu_\theta\rVert^2 + C,\qquad C = \frac d2\Bigl(\frac{\tilde\beta_t}{\sigma_t^2}-1-\log\frac{\tilde\beta_t}{\sigma_t^2}\Bigr).$$

# %%
m1, m2, noise = sympy.symbols("mu1 mu2 z", real=True)
s1, s2 = sympy.symbols("s1 s2", positive=True)  # β̃ and σ²
x = m1 + sympy.sqrt(s1) * noise
log_ratio = sympy.log(s2 / s1) / 2 - (x - m1) ** 2 / (2 * s1) + (x - m2) ** 2 / (2 * s2)
in_z = sympy.Poly(sympy.expand(log_ratio), noise)
average = in_z.coeff_monomial(1) + in_z.coeff_monomial(noise**2)  # E z = 0, E z² = 1
C = (s1 / s2 - 1 - sympy.log(s1 / s2)) / 2
claim(
    "KL = (μ̃ − μ_θ)²/(2σ²) + C, for any σ²",
    sympy.simplify(sympy.expand_log(average - (m1 - m2) ** 2 / (2 * s2) - C)) == 0,
)
claim("C vanishes for σ² = β̃", C.subs(s2, s1) == 0)
prior = average.subs({m1: sympy.sqrt(abar) * X0, s1: 1 - abar, m2: 0, s2: 1})  # abar is ᾱ_T here
by_hand = (abar * X0**2 - abar - sympy.log(1 - abar)) / 2
claim("L_T = (ᾱ x_0² − ᾱ − log(1 − ᾱ))/2 for each value", sympy.simplify(sympy.expand_log(prior - by_hand)) == 0)

# %% [markdown]
# The slide's weight $1/(2\tilde\beta_t)$ belongs to the choice $\Sigma_\theta = \tilde\beta_t$ alone, and there $C = 0$. In general the weight is $1/(2\sigma_t^2)$, and $C > 0$ for $\sigma_t^2\ne\tilde\beta_t$. As long as $\Sigma_\theta$ is fixed, $C$ has no $\theta$: it moves the value of the loss and *not its gradient*.
#
# The same average gives the first term, with $q(x_T\mid x_0) = \mathcal N(\sqrt{\bar\alpha_T}\,x_0, (1-\bar\alpha_T)I)$ in place of the posterior and $\mathcal N(0, I)$ in place of the model:
# $L_T = \frac12\bigl(\bar\alpha_T\lVert x_0\rVert^2 - d\,\bar\alpha_T - d\log(1-\bar\alpha_T)\bigr)$.
#
# > **Spot the bug.** In a public DDPM the formula for $L_T$ took the logarithm of the wrong quantity, where $\log(1-\bar\alpha_T)$ belongs. Models trained with it were as good as before. Why? And which check would have shown the mistake?
#
# <details><summary>Answer</summary>
#
# $L_T$ has no $\theta$, so its gradient is 0, right or wrong; only the reported bits were off. A check against the definition shows it, and so does a simpler one: the KL divergence of a Gaussian with itself must be 0.
#
# </details>
#
# Both means have the form of section 3.3, one with $\epsilon$ and one with $\epsilon_\theta$. So they differ by
# $\tilde\mu_t-\mu_\theta = \frac{\beta_t}{\sqrt{\alpha_t}\sqrt{1-\bar\alpha_t}}(\epsilon_\theta-\epsilon)$, and
#
# $$L_{t-1} = \frac{\beta_t^2}{2\sigma_t^2\,\alpha_t(1-\bar\alpha_t)}\,\lVert\epsilon-\epsilon_\theta(x_t,t)\rVert^2 + C.$$

# %%
difference = mu - mu.subs(eps_true, eps_guess)
factor = (1 - a) / (sympy.sqrt(a) * sympy.sqrt(1 - abar_t))
claim(
    "the means differ by the error of the noise alone",
    sympy.simplify(difference - factor * (eps_guess - eps_true)) == 0,
)

# %% [markdown]
# This holds for every $t\ge 2$, $x_0$ and $\epsilon$, without an average. Now in numbers, on real digits, with a network that is wrong on purpose: it says 0.9 times the true noise. PyTorch's own KL divergence is the judge.

# %%
t, x0 = 300, digits[:4].double()
eps = torch.randn(x0.shape, generator=g, dtype=torch.float64)
xt = chain.perturb(x0, t, eps)
wrong_by_a_tenth = Denoiser(lambda xt, t: 0.9 * eps, chain, predicts="eps")
mean, var = chain.posterior(xt, x0, t - 1, t)
mean_guess, _ = chain.posterior(xt, wrong_by_a_tenth(xt, t), t - 1, t)
for variance, sigma2 in {"posterior": var, "beta": chain.betas[t]}.items():
    exact = (
        torch.distributions.kl_divergence(normal(mean, var.sqrt()), normal(mean_guess, sigma2.sqrt())).flatten(1).sum(1)
    )
    weight = chain.betas[t] ** 2 / (2 * sigma2 * (1 - chain.betas[t]) * chain.sigma(t) ** 2)
    C = 784 / 2 * (var / sigma2 - 1 - (var / sigma2).log()).squeeze()
    formula = weight * (0.1 * eps).square().flatten(1).sum(1) + C
    term = losses.bound_term(wrong_by_a_tenth, chain, x0, xt, t - 1, t, variance=variance)
    claim(f"Σ_θ = {variance}: KL = weight × squared error of the noise + C", torch.allclose(exact, formula, rtol=1e-9))
    claim(f"Σ_θ = {variance}: the course's bound_term is the same number", torch.allclose(term, exact, rtol=1e-9))

# %% [markdown]
# ### 4.5 The last term, $L_0$
#
# $L_0 = -\log p_\theta(x_0\mid x_1) = \frac{1}{2\sigma_1^2}\lVert x_0-\mu_\theta(x_1, 1)\rVert^2 + \frac d2\log(2\pi\sigma_1^2)$. *(The slide text has the plus sign in front of the square for $\log p$. It belongs to the loss, $-\log p$.)*
#
# **Which $\sigma_1^2$?** The slide takes $\tilde\beta_1$. But $\bar\alpha_0 = 1$, so $\tilde\beta_1 = \beta_1(1-\bar\alpha_0)/(1-\bar\alpha_1) = 0$, and the weight $1/(2\tilde\beta_1)$ is infinite. With $\sigma_t^2 = \beta_t$ in all steps it is $\sigma_1^2 = \beta_1$, and so it is here. (The authors' code for DDPM puts $\tilde\beta_2$ in this one place.)
#
# At $t = 1$ the weights of the posterior mean are 0 and 1, so that $\mu_\theta(x_1, 1) = \hat x_0$. With $\sigma_1^2 = \beta_1$ the square is then $\frac{1}{2\alpha_1}\lVert\epsilon-\epsilon_\theta\rVert^2$, which is the formula of $L_{t-1}$, read at $t = 1$. So, as a density, $L_0$ is one more term of the same sum, and the loss is, up to terms without $\theta$,
#
# $$T\;\mathbb E_{t\sim\mathrm{Uniform}\{1,\dots,T\},\,x_0,\,\epsilon}\Bigl[\frac{\beta_t^2}{2\sigma_t^2\,\alpha_t(1-\bar\alpha_t)}\,\lVert\epsilon-\epsilon_\theta(x_t,t)\rVert^2\Bigr].$$

# %%
x0_of_noise = (XT - sympy.sqrt(1 - a) * eps_true) / sympy.sqrt(a)  # at t = 1, where ᾱ_1 = α_1
square = (x0_of_noise - x0_of_noise.subs(eps_true, eps_guess)) ** 2 / (2 * (1 - a))
claim("L_0's square is (ε − ε_θ)² / (2α_1)", sympy.simplify(square - (eps_true - eps_guess) ** 2 / (2 * a)) == 0)
claim(
    "the weight at t = 1, with σ² = β, is 1 / (2α_1) as well",
    sympy.simplify((factor**2 / (2 * (1 - a))).subs(abar, 1) - 1 / (2 * a)) == 0,
)
claim("β̃ is 0 there, so with σ² = β̃ the weight would be infinite", beta_tilde.subs(abar, 1) == 0)
loss_1 = (0.5 - 0.3) ** 2 / (2 * 0.1**2) + math.log(2 * math.pi * 0.1**2) / 2  # x_0 = 0.5, μ = 0.3, σ_1 = 0.1, d = 1
claim("−log p has the plus sign", abs(loss_1 + normal(0.3, 0.1).log_prob(torch.tensor(0.5)).item()) < 1e-5)

# %% [markdown]
# **Density or probability?** A pixel is one of 256 grey levels, and $x_0$ is a point on a grid. A density at such a point can be as large as you like: a model that puts narrow peaks on the grid has a $-\log p$ without a floor. So one asks for the *probability* of the level: the Gaussian's mass
# between the midpoints to its neighbours, where the darkest and the brightest level take all that lies beyond,
#
# $$p_\theta(x_0\mid x_1) = \prod_i\Bigl[\Phi\Bigl(\frac{x_{0,i}+\frac1{255}-\mu_i}{\sigma_1}\Bigr)-\Phi\Bigl(\frac{x_{0,i}-\frac1{255}-\mu_i}{\sigma_1}\Bigr)\Bigr],\qquad \mu = \mu_\theta(x_1, 1).$$
#
# $\Phi$ is the cumulative distribution of $\mathcal N(0,1)$; for the brightest level the first $\Phi$ is 1, for the darkest the second is 0.
#
# Probabilities sum to 1. Does it hold for the course's code, `losses.bound_term`, for a pixel with the guess 0.3, and one at the edge, with the guess 1?

# %%
levels = (torch.arange(256, dtype=torch.float64) / 127.5 - 1)[:, None]  # as 256 samples of one pixel
one_pixel = {}
for guess in (0.3, 1.0):
    terms = [
        losses.bound_term(lambda xt, t, guess=guess: torch.full_like(xt, guess), chain, levels, levels, 0, 1, bins=bins)
        for bins in (256, None)
    ]
    claim(f"guess {guess}: the 256 probabilities sum to 1", abs((-terms[0]).exp().sum() - 1) < 1e-12)
    one_pixel[guess] = (2 / 255 * (-terms[1]).exp()).sum()  # density times width of a level
claim("guess 0.3: density × width sums to 1, to 1 %", abs(one_pixel[0.3] - 1) < 0.01)
claim("guess 1: a third is missing", 0.33 < 1 - one_pixel[1.0] < 0.36)

# %% [markdown]
# In the middle, density times width is nearly the same. At the edges, where most pixels of a digit are, a third of the mass is lost.

# %% [markdown]
# ### 4.6 What may the network predict?
#
# The slide lets it predict $\epsilon$. It may as well predict $x_0$, the mean $\mu$, or $v = \sqrt{\bar\alpha_t}\,\epsilon-\sqrt{1-\bar\alpha_t}\,x_0$. Given $x_t$, each gives the others while $0<\bar\alpha_t<1$. And an error of one is an error of the others, times a factor of $t$:
#
# $$\tilde\mu_t-\mu_\theta = c_t\,(x_0-\hat x_0),\qquad x_0-\hat x_0 = -\tfrac{\sqrt{1-\bar\alpha_t}}{\sqrt{\bar\alpha_t}}\,(\epsilon-\epsilon_\theta) = -\sqrt{1-\bar\alpha_t}\;(v-v_\theta).$$

# %%
v_true, x_guess = sympy.symbols("v x_guess", real=True)
from_v = sympy.sqrt(abar_t) * XT - sympy.sqrt(1 - abar_t) * v_true  # x_0, if v is known
v = sympy.sqrt(abar_t) * eps_true - sympy.sqrt(1 - abar_t) * X0
noisy = sympy.sqrt(abar_t) * X0 + sympy.sqrt(1 - abar_t) * eps_true
claim("x_0 = √ᾱ x_t − √(1 − ᾱ) v", sympy.simplify(from_v.subs({XT: noisy, v_true: v}) - X0) == 0)
step = mu_tilde - mu_tilde.subs(X0, x_guess)
claim(
    "μ̃ − μ_θ = c_t (x_0 − x̂_0)", sympy.simplify(step - sympy.sqrt(abar) * (1 - a) / (1 - abar_t) * (X0 - x_guess)) == 0
)

# %% [markdown]
# So the same bound weighs the squared error of each with another function of $t$, $L_{t-1}-C = w_\mu\lVert\tilde\mu-\mu_\theta\rVert^2 = w_{x_0}\lVert x_0-\hat x_0\rVert^2 = w_\epsilon\lVert\epsilon-\epsilon_\theta\rVert^2 = w_v\lVert v-v_\theta\rVert^2$ with
#
# $$w_\mu = \frac1{2\sigma_t^2},\qquad w_{x_0} = c_t^2\,w_\mu,\qquad w_\epsilon = \frac{1-\bar\alpha_t}{\bar\alpha_t}\,w_{x_0},\qquad w_v = (1-\bar\alpha_t)\,w_{x_0}.$$
#
# We take $\Sigma_\theta = \tilde\beta_t$; then $w_\epsilon = \beta_t/(2\alpha_t(1-\bar\alpha_{t-1}))$. *Three of the four fall all the way. Which one falls and then rises?* (Hint: which part of $w_\epsilon$ grows with $t$, and which starts near 0?)

# %%
t = torch.arange(2, 1001)
_, c, beta_tilde_t = chain.bridge(t - 1, t)
w_x0 = c**2 / (2 * beta_tilde_t)
weights = {
    "w of μ": 1 / (2 * beta_tilde_t),
    "w of x₀": w_x0,
    "w of ε": w_x0 * chain.sigma(t) ** 2 / chain.alpha(t) ** 2,
    "w of v": w_x0 * chain.sigma(t) ** 2,
}
plots.curves(t, weights, "t", "weight in the bound", logx=True, logy=True)

# %%
by_slide = chain.betas[t] ** 2 / (2 * beta_tilde_t * (1 - chain.betas[t]) * chain.sigma(t) ** 2)
claim("w of ε is the slide's weight", torch.allclose(weights["w of ε"], by_slide, rtol=1e-9))
falls = by_slide.diff() < 0
claim("it falls up to t = 350, then rises: it is not monotone", falls[:348].all() and not falls[348:].any())
flattest = min(weights, key=lambda name: (weights[name].max() / weights[name].min()).item())
claim("w of ε is the flattest of the four", flattest == "w of ε")
snr = chain.alpha_bars / (1 - chain.alpha_bars)
claim(
    "w of x₀ is half of what the signal-to-noise ratio ᾱ/(1 − ᾱ) loses in the step",
    torch.allclose(w_x0, (snr[t - 1] - snr[t]) / 2),
)
claim("the other three fall all the way", all((w.diff() < 0).all() for name, w in weights.items() if name != "w of ε"))

# %% [markdown]
# An error in $x_0$ counts more than a billion times as much at $t = 2$ as at $t = 1000$. For the noise the weight changes by a factor of 120 only, the least of the four, which is one reason to predict it. It is least at $t = 350$ and then doubles towards the end. The weights of $\epsilon$ and $v$ agree while the image is hardly noisy, and those of $x_0$ and $v$ when it is nearly all noise.
#
# Predicting something else than $\epsilon$ changes nothing in the bound. It changes what a plain, *unweighted* squared error means: unweighted in $\epsilon$ is another loss than unweighted in $v$. Section 9 puts them side by side.

# %% [markdown]
# ### 4.7 The simple loss
#
# DDPM predicts the noise and drops the weight. What is left is the simplest loss one could think of: **add noise, guess the noise, take the squared error.**
#
# $$L_{simple} = \mathbb E_{\,t\sim\mathrm{Uniform}\{1,\dots,T\},\ x_0,\ \epsilon}\ \bigl\lVert\epsilon-\epsilon_\theta\bigl(\sqrt{\bar\alpha_t}\,x_0+\sqrt{1-\bar\alpha_t}\,\epsilon,\ t\bigr)\bigr\rVert^2$$
#
# *(The slide text reads Uniform(0, T). The sum over $t$ in the bound is $T$ times a mean over $1,\dots,T$.)* The code divides by the number of values as well, which moves no minimum.
#
# Without the weight it is no longer the bound. It is another weighting of the same terms: small noise levels count less than before, large ones more, and there an image gets its shape. The slide calls this a focus on "more
# challenging" steps.

# %%
claim("t = 0 is not among the times: there is no noise in x_0 to guess", chain.sigma(0) == 0 and chain.alpha(0) == 1)

# %% [markdown]
# **What does the ideal network say?** A squared error is smallest at the mean. So the ideal $\epsilon_\theta$ is $\mathbb E[\epsilon\mid x_t]$, and the ideal $\hat x_0$ is $\mathbb E[x_0\mid x_t]$: the *average* of all
# clean images that fit. Keep this in mind for the pictures below. On the line we can compute both sides; and we find what the slide calls a nice theoretical interpretation: the ideal noise is, up to the factor $-\sqrt{1-\bar\alpha_t}$, the gradient of the log-density of the noisy data, $\nabla\log q(x_t)$, called the *score*. Notebook 05
# starts from there.

# %%
x_100 = torch.tensor([[0.2]], dtype=torch.float64)
of_x0 = exact_and_gaussian(100, 100, 0.2)[0].exp()  # the density of x_0, given x_100 = 0.2
mean_x0 = torch.trapezoid(of_x0 * line, line)
mean_noise = (0.2 - chain.alpha(100) * mean_x0) / chain.sigma(100)
claim("the course's ideal denoiser is E[x_0 | x_t]", abs(two.denoiser(chain)(x_100, 100).item() - mean_x0) < 1e-8)
claim(
    "E[ε | x_t] = −√(1 − ᾱ_t) · score", abs(mean_noise + chain.sigma(100) * two.score(x_100, chain, 100).item()) < 1e-8
)

# %% [markdown]
# > **Algorithm 1, Training.** Repeat: draw $x_0$ from the data, $t$ from $\{1,\dots,T\}$ and $\epsilon\sim\mathcal N(0, I)$; take a gradient step on $\lVert\epsilon-\epsilon_\theta(\sqrt{\bar\alpha_t}x_0+\sqrt{1-\bar\alpha_t}\epsilon, t)\rVert^2$.


# %%
def algorithm_1(network, path, points, steps, generator):
    optimizer, seen = torch.optim.Adam(network.parameters(), lr=2e-3), []
    for _ in range(steps):
        x0 = points[torch.randint(len(points), (256,), generator=generator)]
        t = torch.randint(1, path.T + 1, (256,), generator=generator)
        eps = torch.randn(x0.shape, generator=generator)
        xt = path.perturb(x0, t, eps)
        loss = (eps - network(xt, path.unit(t))).square().mean()  # path.unit(t) is t/T: networks like small numbers
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen = [*seen[-19:], loss.item()]
    return sum(seen) / len(seen)  # the mean of the last 20 losses


# %% [markdown]
# ## 5. Train one, now
#
# Two moons: 20,000 points, a chain of 200 steps, and a small network that takes a point and a time and answers with a noise. First a hundred steps of the loop above.

# %%
torch.manual_seed(0)
moons = 1.2 * toy.two_moons(20_000, g)  # so that the wider coordinate has variance about 1
short = DiscretePath(linear_betas(200))
claim(
    "after a hundred steps of Algorithm 1 the loss is below 0.6 (the answer 0 has 1)",
    algorithm_1(nets.MLP(dim=2), short, moons, 100, g) < 0.6,
)

# %% [markdown]
# It works. `training.fit` is the same loop with what one wants in practice: a progress bar, stop and resume, a learning rate that rises and falls, and `ema`, a running average of the
# weights, which as a rule draws better than the weights themselves. It calls `watch` from time to time, and there we draw from the model, with $\Sigma_\theta = \beta_t$. *Which will it learn first: the overall shape of the cloud, or the gap
# between the moons?*

# %%
model = Denoiser(nets.MLP(dim=2), short, predicts="eps")
batch = training.batches(moons, short, size=256)  # from the step's number to its x0, t and eps
seen, start = {}, torch.randn(1000, 2, generator=g)


def draw(fit):
    noise = torch.Generator().manual_seed(1)
    states = samplers.ddpm(fit.ema, short, start, short.times(200), generator=noise)  # Algorithm 2, section 6
    seen[fit.step] = samplers.last(states)


steps = training.scaled(cpu=1000, gpu=20_000)
trained = training.fit(model, losses.simple, batch, steps=steps, ema=0.99, watch=draw, watch_every=steps // 4)

# %%
snapshots = {"noise": start} | {f"{step} steps": x for step, x in seen.items()} | {"data": moons[:1000]}
plots.film_points(
    list(snapshots.values()), times=list(snapshots), columns=6, title="What the model draws, as it learns"
)

# %% [markdown]
# The shape comes first, the gap later: coarse before fine. Even at the end a few points lie in the gap. The loss would not have told you:

# %%
smooth = torch.tensor(trained.losses).unfold(0, 50, 50).mean(1)
plots.curves(50 * torch.arange(1, len(smooth) + 1), {"loss": smooth}, "training step", "mean of 50 losses")

# %% [markdown]
# It falls fast, then hardly moves, and stays far from 0. $x_t$ mixes data and noise, and even the ideal network cannot take them apart again: its loss here, computed from the points themselves, is about 0.2.

# %% [markdown]
# ## 6. Sampling
#
# > **Algorithm 2, Sampling.** Draw $x_T\sim\mathcal N(0, I)$. For $t = T,\dots,1$: draw $z\sim\mathcal N(0, I)$ if $t>1$, else $z = 0$;
# > $x_{t-1} = \frac{1}{\sqrt{\alpha_t}}\bigl(x_t-\frac{1-\alpha_t}{\sqrt{1-\bar\alpha_t}}\,\epsilon_\theta(x_t,t)\bigr)+\sigma_t z$. Return $x_0$.
#
# > **Three quantities, one letter.** Here $\sigma_t^2 I = \Sigma_\theta$ is the variance of one reverse *step*, $\beta_t$ or $\tilde\beta_t$. The slides on guidance (notebook 06) write $\sigma_t$ for $\sqrt{1-\bar\alpha_t}$, *all* the noise in $x_t$, and `path.sigma(t)` means that. DDIM's $\sigma_t$ (notebook 07) is
# > a third one: as much fresh noise as one chooses. (The letter $w$ has the same trouble: a weight in the loss, and the strength of guidance. And the slides on guidance let $t$ run from noise to data.) At $t = 100$ of 1000 the first is 0.05 and the second 0.32.
#
# Below $\Sigma_\theta = \beta_t I$. First Algorithm 2 word by word, then the course's sampler, which computes the same step from $\hat x_0$:


# %%
@torch.no_grad()
def algorithm_2(network, path, x, generator):
    for t in range(path.T, 0, -1):
        alpha, alpha_bar = 1 - path.betas[t].item(), path.alpha_bars[t].item()
        noise = network(x, path.unit(t).expand(len(x)))
        x = (x - (1 - alpha) / (1 - alpha_bar) ** 0.5 * noise) / alpha**0.5
        if t > 1:
            x = x + path.betas[t].item() ** 0.5 * torch.randn(x.shape, generator=generator)
    return x


step_std, all_std = chain.betas[100].sqrt(), chain.sigma(100)
claim("at t = 100 one step has deviation 0.05, all the noise 0.32", abs(step_std - 0.05) < 0.005 and abs(all_std - 0.32) < 0.005)
by_the_slide = algorithm_2(trained.ema.net, short, start, torch.Generator().manual_seed(2))
states = list(samplers.ddpm(trained.ema, short, start, short.times(200), generator=torch.Generator().manual_seed(2)))
claim(
    "Algorithm 2 and the course's sampler end at the same points", torch.allclose(by_the_slide, states[-1], atol=1e-4)
)

# %%
shown = [200, 80, 50, 30, 15, 0]
plots.film_points(
    [[start, *states][200 - t] for t in shown], times=shown, columns=6, title="Reverse: from noise to data"
)

# %% [markdown]
# Until $t = 80$ the eye sees no change. Then the cloud tilts, the moons appear, and the last steps sharpen them.
#
# > **Spot the bug.** The slide text of Algorithm 2 has $\bar\alpha_t$ in both places where $\alpha_t$ belongs:
# > $x_{t-1} = \frac{1}{\sqrt{\bar\alpha_t}}\bigl(x_t-\frac{1-\bar\alpha_t}{\sqrt{1-\bar\alpha_t}}\,\epsilon_\theta\bigr)+\sigma_t z$. What is this the formula of? What will it draw?
#
# It is the formula of $\hat x_0$, not of $\mu_\theta$: `claim` says so below. To blame the line and not the training, we take data whose ideal denoiser is known: eight Gaussians on a ring.

# %%
slide_text = (XT - (1 - abar_t) / sympy.sqrt(1 - abar_t) * eps_true) / sympy.sqrt(abar_t)
claim("the slide text's mean is x̂_0", sympy.simplify(slide_text - from_noise) == 0)
ring = toy.ring(count=8, radius=1.5, std=0.25)
ideal = ring.denoiser(short)  # E[x_0 | x_t], exactly
right = samplers.last(samplers.ddpm(ideal, short, start, short.times(200), generator=g))
x = start
for t in range(200, 0, -1):
    x = ideal(x, t)  # (x_t − √(1−ᾱ_t)·ε) / √ᾱ_t is x̂_0, and not the mean of x_{t−1}
    if t > 1:
        x = x + short.betas[t].item() ** 0.5 * torch.randn(x.shape, generator=g)


def blur(x):  # the distance of a point to the nearest of the eight centres, root mean square, one coordinate
    return (torch.cdist(x, ring.means).min(dim=1).values.square().mean() / 2).sqrt()


claim("Algorithm 2 keeps the blur of the data, 0.25", abs(blur(right) - 0.25) < 0.03)
claim("the slide text's line loses more than half of it", blur(x) < 0.5 * 0.25)
plots.overlay(right, x, labels=["Algorithm 2", "slide text"])

# %% [markdown]
# The line jumps to $\hat x_0$, the *mean* of all clean points that fit, and pretends that this is $x_{t-1}$. Each step draws an
# average, and more than half of the blur is gone. (On images one would expect pictures that are too smooth; we have not tried it.)
#
# **Which variance?** Section 3.4 found two candidates, $\beta_t$ and $\tilde\beta_t$. Algorithm 2 above took the upper one. With many steps both work:

# %%
with_posterior = samplers.last(
    samplers.ddpm(trained.ema, short, start, short.times(200), variance="posterior", generator=g)
)
for name, drawn in {"β": states[-1], "β̃": with_posterior}.items():
    gap = torch.cdist(moons[:5000], drawn)
    claim(
        f"{name}: on average a data point has a sample within 0.045 (a real point: 0.031)",
        gap.min(dim=1).values.mean() < 0.045,
    )
    claim(
        f"{name}: on average a sample has a data point within 0.03 (a real point: 0.014)",
        gap.min(dim=0).values.mean() < 0.03,
    )

# %% [markdown]
# **Why so many steps?** Take $\mathcal N(0, 0.25)$ data, whose best guess is $\hat x_0 = k_t x_t$ with the $k_t$ of section 3.4. Then one step is $x_{t-1} = (b_t+c_t k_t)\,x_t+\sigma_t z$, with the weights $b_t$ of $x_t$ and $c_t$ of $x_0$ in $\tilde\mu_t$ (`keep` and `pull` in the code). So every $x_t$ is Gaussian, and its variance is multiplied by the square of the bracket and raised by $\sigma_t^2$. We can follow it without drawing anything. *What do you expect: is a chain with a perfect
# network exact?*


# %%
def drawn_variance(T, choice):
    path, V = DiscretePath(linear_betas(T)), 0.25
    variance = 1.0  # x_T is N(0, 1)
    for t in range(T, 0, -1):
        keep, pull, lower = path.bridge(t - 1, t)
        k = path.alpha(t) * V / (path.alpha(t) ** 2 * V + path.sigma(t) ** 2)
        sigma2 = 0 if t == 1 else {"β": path.betas[t], "β̃": lower}[choice]
        variance = (keep + pull * k) ** 2 * variance + sigma2
    return variance


# %%
steps_tried = [25, 50, 100, 200, 500, 1000]
ends = {choice: torch.tensor([drawn_variance(T, choice) for T in steps_tried]) for choice in ("β", "β̃")}
claim("with β the spread is too large, with β̃ too small", (ends["β"] > 0.25).all() and (ends["β̃"] < 0.25).all())
off = {choice: (variance / 0.25 - 1).abs() for choice, variance in ends.items()}
claim("the error falls with every larger T", all((error.diff() < 0).all() for error in off.values()))
claim("at 1000 steps β is within 0.5 % of the truth, β̃ within 2 %", (off["β"][-1] < 0.005) & (off["β̃"][-1] < 0.02))
plots.curves(
    torch.tensor(steps_tried),
    ends | {"truth": torch.full((6,), 0.25)},
    "number of steps T",
    "variance of what is drawn",
    logx=True,
)

# %% [markdown]
# It is not exact: the true variance of a step lies between the two. With $\beta_t$ the error falls like $1/T$, with $\tilde\beta_t$ a little more slowly, like $(\log T)/T$: near the data each step lacks about $\beta_t^2/(1-\bar\alpha_t)$, which is of order $1/(Tt)$. **In the limit** only the little remains that $\bar\alpha_T$ leaves of the data in $x_T$. Later notebooks do better with few steps.

# %% [markdown]
# ## 7. Digits
#
# Now the same with images. A network for 28×28 pixels takes longer than half a minute to train, so a trained one comes with the course. Its card says what it is.

# %%
digit_model = checkpoints.load("mnist-unet")
card = digit_model.card
print(card["what"])
print(
    f"{sum(p.numel() for p in digit_model.parameters()):,} parameters, {card['steps']:,} steps, trained on {card['images']:,} images"
)
print("train it again:", card["recipe"])

# %% [markdown]
# Four things are new.
#
# - **The path.** The model was trained on the *cosine path*, where $\alpha(t) = \cos(\pi t/2)$ and $\sigma(t) = \sin(\pi t/2)$ for $t$ from 0 to 1. Read $\alpha(t)$ as $\sqrt{\bar\alpha_t}$ and $\sigma(t)$ as
#   $\sqrt{1-\bar\alpha_t}$, and the formulas in $\hat x_0$ stay. (Those in $\epsilon$ divide by $\alpha$, which is 0 at $t = 1$.) For a step from $t$ to an earlier $s$, write $\alpha(t)^2/\alpha(s)^2$ where $\alpha_t$ stood. So any descending list of times is a chain, and we choose its length when we draw.
# - **What it predicts.** Not $\epsilon$ but $v = \alpha(t)\,\epsilon - \sigma(t)\,x_0$. Given $x_t$, $v$ gives both $x_0 = \alpha x_t-\sigma v$ and $\epsilon = \sigma x_t+\alpha v$, at every $t$. The noise does not: at $t = 1$ $x_t = \epsilon$, so guessing it is no task and says nothing about $x_0$.
# - **The class.** The network is told the label $y$. One label in ten was replaced by the number 10, "no label", while it learned, so it can also draw without one.
# - **The times.** In training $t$ was not drawn uniformly but more often from the middle: $t = 1/(1+e^{-z})$ with $z\sim\mathcal N(0,1)$. As in section 4.7, this is another weighting of the same terms.

# %%
t = torch.linspace(0, 1, 101)
curves = {"chain, linear β": chain.alpha_bars[::10], "cosine path": Cosine().alpha(t) ** 2}
plots.curves(t, curves, "t / T", "share of the image's variance, α²")

# %% [markdown]
# The cosine path lets the image fade more slowly: linear β is down to a tenth of the variance at $t/T = 0.48$, the cosine path only at 0.80.
#
# > **Spot the bug.** A public library let a network that predicts *noise* sample from a chain with $\bar\alpha_T = 0$ exactly. Its formula for the guess was the usual one, $\hat x_0 = (x_T-\sqrt{1-\bar\alpha_T}\,\epsilon_\theta)/\sqrt{\bar\alpha_T}$, and nobody saw an error. What was $\hat x_0$, and what
# > hid it?

# %%
pure_noise = torch.randn(4, 1, 28, 28, generator=g)
nearly_right = 0.99 * pure_noise  # a network that is off by one per cent
x0_hat = (pure_noise - nearly_right) / Cosine().alpha(1.0).float()
claim("every pixel of the guess is infinite", x0_hat.isinf().all())
claim("clipping to [−1, 1] makes an image of it: black and white noise", (x0_hat.clamp(-1, 1).abs() == 1).all())
try:
    Denoiser(lambda xt, t: nearly_right, Cosine(), predicts="eps")(pure_noise, 1.0)
except ValueError as error:
    print("The course's Denoiser:", error)

# %% [markdown]
# The clip hid it. A check of the state *before* clipping would have caught it, and the course's `Denoiser` refuses the question.
#
# Before we let our model draw, look at what it knows. Below, each column is a real test image, noised to time $t$ (top), and the network's guess $\hat x_0$ (bottom). Move $t$. *From
# which $t$ on is the guess no copy any more, and what is it instead?*


# %%
@torch.no_grad()
def guess(t):
    xt = digit_model.path.perturb(chosen, t, fixed)
    x0_hat = clipped(digit_model)(xt, t, y=torch.arange(10))
    return plots.rows([xt, x0_hat], labels=["xₜ", "guess"])


widgets.explore(guess, t=([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0], 0.7))

# %% [markdown]
# With little noise the guess is a copy. With much noise it is blurred: the network cannot know which "4" it was, and answers with the average
# of all that fit. At $t = 1$ it knows the label only, and answers with the mean image of the class. A single guess from noise is no good sample. The way back, step by step, gives one.
#
# We draw four digits of each class in 100 steps, with $\Sigma_\theta = \tilde\beta_t$. `clipped` holds the guess $\hat x_0$ in $[-1, 1]$, where pixels live.

# %%
asked = torch.arange(10).repeat_interleave(4)
times = digit_model.path.times(100)
noise = torch.randn(40, 1, 28, 28, generator=g)
conditional = clipped(lambda xt, t: digit_model(xt, t, y=asked))
states = [noise, *samplers.ddpm(conditional, digit_model.path, noise, times, variance="posterior", generator=g)]
plots.rows(list(states[-1].unflatten(0, (10, 4))), labels=list(range(10)), title="Asked for, and drawn")

# %% [markdown]
# Each row is one class. Are they what was asked for? A second network says so: a classifier that was trained on real digits only.

# %%
judge = checkpoints.load("mnist-classifier")
claim(
    "the judge is right on at least 99 % of 1,000 real test digits",
    (judge(digits[::2]).argmax(1) == labels[::2]).float().mean() > 0.99,
)
claim("at least 36 of the 40 digits are what was asked for", (judge(states[-1]).argmax(1) == asked).sum() >= 36)

# %% [markdown]
# Now the way back of two of them: above, the state $x_t$; below, the network's guess $\hat x_0$ at that moment. *When is it decided how the digit is written?*

# %%
pick, frames, shown = [8, 17], [], range(0, 100, 12)
for i in shown:
    x0_hat = conditional(states[i], times[i].item())
    frames.append(torch.stack([states[i][pick], x0_hat[pick]], dim=1).flatten(0, 1))  # state and guess in turn

plots.film(
    frames, times=[f"{times[i]:.2f}" for i in shown], labels=["xₜ", "guess"] * 2, title="Reverse: from noise to digits"
)

# %% [markdown]
# The guess begins as the blurred mean of the class. Well before the middle, at about $t = 0.7$, its strokes are in place, while $x_t$ still looks like little but noise. The rest is detail. As with the moons: coarse before fine.
#
# The same for half of the 40 digits, as a film. *When do you first know each class?*

# %%
plots.animate([x[::2] for x in states], times=times.tolist(), seconds=6)

# %% [markdown]
# ### How good are they?
#
# "As asked" is not enough: a model that draws the same perfect 7 every time would pass. We want the *distribution* of the drawn digits to be that of the real ones. The usual score compares two clouds of points: each image becomes a point, the 128 numbers that the classifier computes before its last
# layer. Each cloud is summed up by a mean $m$ and a covariance $C$. How far the two Gaussians with these means and covariances are apart is the **Fréchet distance**; following common usage, we mean its square by that name:
#
# $$F = \lVert m_a-m_b\rVert^2 + \mathrm{tr}\bigl(C_a+C_b-2(C_aC_b)^{1/2}\bigr).$$
#
# With a network called Inception in place of our classifier it is the well-known FID. Its value depends on the network and on the number of images, so a value alone says nothing. We compare with the **floor**: the score that real digits get against other real digits.
#
# The **Inception score** asks the classifier only: is each answer sure, and are all answers equally frequent? It lies between 1 and 10: it is $\exp\,\mathbb E_x D_{KL}(p(y\mid x)\Vert p(y))$, and sure answers spread evenly over $k$ classes score $k$.
#
# **Precision** is the share of drawn digits that lie among real ones, **recall** the share of real ones that lie among drawn ones. A point lies among a cloud if it is nearer to some point of the cloud than that point's third neighbour in the cloud is.
#
# *Which of the four would notice a model that forgot the digit 4? And one that draws each digit in one style only?* To find out, let real training digits play three models: an honest one, one that forgot the 4, and one that knows a single style of each digit: of 100, the 20 whose features are nearest to those of the first (itself included).

# %%
train_digits, train_labels = data.images(data.load("mnist", "train"))
real = data.balanced(digits, labels, 200, g)[0]  # 20 of each class, in order of class
others = [data.balanced(train_digits, train_labels, 200, g)[0] for _ in range(5)]
with torch.no_grad():
    real_f, *others_f = (judge.features(x) for x in (real, *others))
pool = torch.stack(others_f).unflatten(1, (10, 20)).transpose(0, 1).flatten(1, 2)  # (10 classes, 100 digits, 128)
alike = torch.cdist(pool[:, :1], pool)[:, 0].argsort(1)[:, :20]
players = {
    "honest": others_f[0],
    "no 4": others_f[0][torch.arange(10).repeat_interleave(20) != 4],
    "one style": pool.gather(1, alike[..., None].expand(-1, -1, 128)).flatten(0, 1),
}

# %%
floor = sum(metrics.frechet_distance(other, real_f) for other in others_f) / 5
frechet = {name: metrics.frechet_distance(f, real_f) for name, f in players.items()}
surety = {name: metrics.inception_score(judge.head(f)) for name, f in players.items()}  # head: from features to logits
precision, recall = ({name: metrics.precision_recall(real_f, f)[i] for name, f in players.items()} for i in (0, 1))
claim("no 4: the Fréchet distance is above 2.5 floors", frechet["no 4"] > 2.5 * floor)
claim("no 4: the Inception score falls by at least 0.6", surety["no 4"] < surety["honest"] - 0.6)
claim("no 4: recall falls by at least 0.03", recall["no 4"] < recall["honest"] - 0.03)
claim("no 4: precision hardly changes", abs(precision["no 4"] - precision["honest"]) < 0.04)
claim("one style: the Fréchet distance is above 1.4 floors", frechet["one style"] > 1.4 * floor)
claim("one style: recall falls by at least 0.3", recall["one style"] < recall["honest"] - 0.3)
claim(
    "one style: precision and Inception score see nothing wrong",
    precision["one style"] > 0.8 and surety["one style"] > 9.7,
)

# %% [markdown]
# The Fréchet distance and recall notice both. Precision notices neither: all that was drawn is real. The Inception score notices the missing class alone, as it never looks at real digits.
#
# Now our model. To save time we draw with DDIM in 20 steps, a sampler that notebook 07 explains.

# %%
many_labels = torch.arange(10).repeat_interleave(20)
drawn_with_labels = clipped(lambda xt, t: digit_model(xt, t, y=many_labels))
noise = torch.randn(200, 1, 28, 28, generator=g)
drawn = samplers.last(samplers.ddim(drawn_with_labels, digit_model.path, noise, digit_model.path.times(20)))
with torch.no_grad():
    drawn_f = judge.features(drawn)
claim("our model: the Fréchet distance is below 1.6 floors", metrics.frechet_distance(drawn_f, real_f) < 1.6 * floor)
claim("our model: precision and recall above 0.7", min(metrics.precision_recall(real_f, drawn_f)) > 0.7)
claim("our model: the Inception score is above 9.5", metrics.inception_score(judge.head(drawn_f)) > 9.5)

# %% [markdown]
# Few images make a noisy score, and a Fréchet distance that is too large on average; only equal numbers may be compared. So the model's card holds the scores from 2,000 digits, the means of several draws. (50 steps of DDIM with a share of fresh noise, $\eta = \frac12$; notebook 07 says what that is.)

# %%
for name, value in card["scores"].items():
    print(f"{name}: {value}")

# %% [markdown]
# ## 8. The bound on real digits
#
# Now `likelihood.bound` on ten test digits, one of each class. The chain has 200 steps of the cosine path, the last term counts grey levels, and $\Sigma_\theta = \tilde\beta_t$ (at the last step, where that is 0, $\beta_1$). The sum over the terms is in nats for an image; divided by $784\log 2$ it is in **bits per dimension**: at most about so large, per pixel, would a file be if this model
# compressed the image. Guessing all 256 levels alike costs 8. *Where in time does the bound spend its bits?*

# %%
path, with_class = digit_model.path, lambda xt, t: digit_model(xt, t, y=torch.arange(10))
terms = likelihood.bound(with_class, path, chosen, path.times(200), variance="posterior", bins=256, generator=g)
bits = likelihood.bits_per_dim(terms, chosen).mean(1)
claim("L_T is 0: the path ends in noise, exactly", terms[0].max() == 0)
claim("no KL divergence is negative", terms[:-1].min() >= 0)
claim("the whole bound is below 3 bits for a pixel", bits.sum() < 3)
plots.curves(
    path.times(200)[1:-1].flip(0),
    {"L": bits[1:-1].flip(0)},
    "t, where the step ends",
    "bits per dimension of a step",
    logy=True,
)

# %% [markdown]
# The curve shows the KL terms; $L_T$ is 0, and $L_0$, the last step, about 1 bit, would lie above the curve. More than half of the bits go to the last two steps, and more than four fifths to the last twenty, where fine detail is settled that no eye can see. The upper half of the path, which decides *what* is drawn, costs next to nothing. So the bound cares little for what we care about, and a model with fewer bits need not draw better digits. This is one reason to
# drop the weight.

# %%
share = bits.flip(0).cumsum(0) / bits.sum()  # of the last step, the last two, …
claim("the last two steps cost more than half of the bits", share[1] > 0.5)
claim("the last 20 of 200 steps cost more than 80 %", share[19] > 0.8)
claim("the first 100 cost less than 5 %", 1 - share[99] < 0.05)

# %% [markdown]
# > **Spot the bug.** A public DDPM lets you choose $T$, and always spreads $\beta_t$ from $10^{-4}$ to $0.02$ over it. With $T = 1000$ all is well. Which of the three terms shows that something is wrong at $T = 100$?

# %%
unscaled = {T: DiscretePath(torch.linspace(1e-4, 0.02, T, dtype=torch.float64)) for T in (1000, 100)}
prior = {T: likelihood.bits_per_dim(likelihood.prior_term(p, chosen, T), chosen).mean() for T, p in unscaled.items()}
claim("T = 1000: L_T is below 0.0001 bits per dimension", prior[1000] < 1e-4)
claim(
    "T = 100: L_T is above 0.25, and more than a third of the image's variance is still there",
    prior[100] > 0.25 and unscaled[100].alpha_bars[-1] > 1 / 3,
)

# %% [markdown]
# $L_T$ does. Sampling starts from pure noise, which this chain never reaches, so the network sees at $T$ what it was never trained on.
#
# > **Spot another.** A public DDPM measures all terms in a loop over $t$, but fills its tensor of times once, *before* the loop. What would the figure above look like? (A flat line with some scatter: the same term, again and again. The sum looks like a number of bits, and no error is raised. That is why we draw the terms and do not only
# > print their sum.)

# %% [markdown]
# ## 9. Does it matter what the network predicts?
#
# "Modelling the noise leads to easier learning", says the slide, and adds a doubt: "not always". This is a question for an experiment. Same network, same 10,000 digits, same number of steps, and the same path, `VP()`: the limit of the linear-β chain for many small steps, with $t$ from 0 to 1. Only the prediction changes, and with it the plain squared error that is made small. Five seeds each, for the answer may be luck. Each model is scored on 1,000 digits, drawn by DDIM in 50 steps with clipped guesses. It takes a while, so the course
# ships the table that the recipe wrote. *Rank the three, $\epsilon$, $x_0$ and $v$, before you look.*

# %%
table = tables.load("mnist-predictions")
print(table["what"], f"({table['steps']} steps of {table['batch']}, {len(table['vary']['seed'])} seeds)")
print(table["recipe"])
print("Fréchet distance of real digits, 1,000 against 1,000:", table["Fréchet distance of real images"])
for predicts in table["vary"]["predicts"]:
    rows = [row for row in table["rows"] if row["predicts"] == predicts]
    asked_for, distance = (
        torch.tensor([row[name] for row in rows]) for name in ("classified as asked", "Fréchet distance")
    )
    print(
        f"{predicts:>4}: as asked {asked_for.mean():.0%} ± {asked_for.std():.0%},  Fréchet distance {distance.mean():.2f} ± {distance.std():.2f}"
    )

# %% [markdown]
# With this small budget $x_0$ comes first, then $v$, and the noise last: in all five runs the judge finds what was asked for about as often as by chance (10 %), and the Fréchet distance is above 10, against 0.15 for real digits. The spread over seeds is far smaller than the gaps between the three. So "easier" it is not here.
#
# Why? In terms of $\hat x_0$, the plain squared error of $x_0$ weighs all $t$ alike, that of $v$ by $1/\sigma^2$, and that of $\epsilon$ by $\alpha^2/\sigma^2$. The last one hardly asks for anything where there is much noise, and there the image gets its shape. Sampling feels it at once: $x_0-\hat x_0 = -\frac{\sigma}{\alpha}(\epsilon-\epsilon_\theta)$, and where
# this path starts, $\sigma/\alpha$ is 152. An error of 0.01 in the noise of a pixel is an error of 1.5 in its guess, before it is clipped to $[-1, 1]$. The weight of $v$ asks as much as that of $x_0$ where there is much noise, but far more near the data, so most of its effort goes there. This fits the order; we have not tested that it is the reason.
#
# The table is about 600 training steps of a small network on one path, and 50 steps of DDIM. DDPM trained far longer, drew in 1000 steps, and its noise prediction drew very good images. An experiment answers the question that was asked, and no other.
#
# To show that the table's runs start from this code, we repeat their first three steps. (A run with another seed would fail this check.)

# %%
claim("σ/α where the VP path starts is 152", 151.5 < VP().sigma(1.0) / VP().alpha(1.0) < 152.5)


def first_losses(predicts):
    torch.manual_seed(0)
    model = Denoiser(nets.UNet(channels=(16, 32), blocks=(2, 2), num_classes=10), VP(), predicts=predicts)
    batch = training.batches(train_digits, model.path, size=128, y=train_labels, null=10, seed=0)
    seen = []

    def stop(fit):
        seen.extend(fit.losses)
        raise StopIteration  # planned are all steps, as the learning rate depends on them; three are enough

    with contextlib.suppress(StopIteration):
        training.fit(model, losses.simple, batch, steps=600, precision="float32", watch=stop, watch_every=3)
    return torch.tensor(seen)


# %%
for row in table["rows"]:
    if row["seed"] == 0:
        same = torch.allclose(first_losses(row["predicts"]), torch.tensor(row["first losses"]), rtol=1e-3)
        claim(f"{row['predicts']}: trained anew, the first three losses (seed 0) are those of the table, to 0.1 %", same)

# %% [markdown]
# ## 10. Recap
#
# - The forward process adds noise in small steps. It has a closed form, so training jumps to any $t$ at once.
# - One step back is nearly Gaussian, on average and for small $\beta_t$. Given $x_0$ it is exactly Gaussian, with mean $\tilde\mu_t$ and variance $\tilde\beta_t$.
# - The true variance of a step lies between $\tilde\beta_t$, pointwise, and $\beta_t$, on average for pixels of variance at most 1.
# - The bound lies above $-\log p_\theta(x_0)$ at every $x_0$, and falls into $L_T$, the $L_{t-1}$ and $L_0$. On digits nearly all of it is fine detail.
# - The network's guess takes the place of $x_0$. With $\Sigma_\theta$ fixed, each $L_{t-1}$ becomes a squared error of the noise, and DDPM drops the weights.
# - Algorithm 1: add noise, guess it, square the error. Algorithm 2: guess, step back, add a little noise, again.
# - A score needs a floor beside it: what real images get. What a network predicts sets what its plain loss weighs.
#
# **Pitfalls**
#
# - $\beta$ or $\sqrt\beta$? A variance or a deviation? A common slip, and the code still draws something.
# - $\alpha_t$ (one step) is not $\bar\alpha_t$ (all steps so far). The slide text of Algorithm 2 shows how easily the bar slips in.
# - No noise at the last step: $z = 0$ at $t = 1$.
# - $\bar\alpha_0 = 1$ belongs in the table. Code that starts its table at $\bar\alpha_1$ needs a special case in every formula with $\bar\alpha_{t-1}$.
# - With another number of steps, scale $\beta$: $\bar\alpha_T$ must stay near 0.
#
# **Homework:** [six exercises](../homework/hw3_ddpm.ipynb) next to this notebook: noise schedules that end in pure noise, skipped steps, $v$, the weights of the bound.
#
# **References**
#
# - Ho, Jain, Abbeel: [*Denoising Diffusion Probabilistic Models*](https://arxiv.org/abs/2006.11239), 2020. The lecture's main source.
# - Sohl-Dickstein, Weiss, Maheswaranathan, Ganguli: [*Deep Unsupervised Learning using Nonequilibrium Thermodynamics*](https://arxiv.org/abs/1503.03585), 2015. Where the idea began.
# - Nichol, Dhariwal: [*Improved Denoising Diffusion Probabilistic Models*](https://arxiv.org/abs/2102.09672), 2021. The first cosine schedule, and bits per dimension.
# - Salimans, Ho: [*Progressive Distillation for Fast Sampling of Diffusion Models*](https://arxiv.org/abs/2202.00512), 2022. The prediction of $v$, and the cosine path in the form used here.
# - Heusel and others: [*GANs Trained by a Two Time-Scale Update Rule*](https://arxiv.org/abs/1706.08500), 2017. The Fréchet distance as a score.
# - Salimans and others: [*Improved Techniques for Training GANs*](https://arxiv.org/abs/1606.03498), 2016. The Inception score.
# - Kynkäänniemi and others: [*Improved Precision and Recall Metric for Assessing Generative Models*](https://arxiv.org/abs/1904.06991), 2019.
# - Kingma, Salimans, Poole, Ho: [*Variational Diffusion Models*](https://arxiv.org/abs/2107.00630), 2021. The bound in terms of the signal-to-noise ratio.
