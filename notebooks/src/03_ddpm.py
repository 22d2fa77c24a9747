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
# - derive the posterior $q(x_{t-1}\mid x_t, x_0)$, the target of the reverse step;
# - train a diffusion model with Algorithm 1 and sample from it with Algorithm 2;
# - draw handwritten digits of any class you ask for.
#
# **Time:** 60 to 90 minutes to read; it runs in under a minute on a processor.
# **It builds on** the VAE: what a latent variable is, and what a KL divergence measures.
# **Symbols** are those of the lecture; the README's [symbol ledger](../README.md#symbols) lists them all.

# %%
import importlib.util

if importlib.util.find_spec("dgm_course") is None:  # Colab, or a fresh environment
    get_ipython().run_line_magic("pip", "install --quiet dgm-course")

# %%
import sympy
import torch
from scipy import stats

from dgm_course import checkpoints, data, losses, nets, samplers, toy, training
from dgm_course.checks import claim, show_source
from dgm_course.denoisers import Denoiser, clipped
from dgm_course.paths import Cosine, DiscretePath
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
# A diffusion model has two processes.
#
# 1. **Forward:** add a little Gaussian noise to a clean image, again and again, until nothing but noise is left.
#    Nothing is learned here. The objective is to turn a complex distribution into a simple one.
# 2. **Reverse:** remove a little noise, again and again, until a clean image is left. This is what a network learns.
#    The objective is to turn noise, which we can draw, into an image, which we cannot.
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
plots.film(film, times=times, rows=3, title="Forward: from data to noise");

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
claim("any other variance moves towards 1", sympy.simplify((after - 1) - (1 - beta) * (variance - 1)) == 0)

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


spiral = toy.swiss_roll(20_000, g)
walked = walk(spiral, 200, g)
plots.overlay(spiral[:2000], walked[:2000], labels=["x₀", "x₂₀₀"]);

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
# *(The slide text reads $\sqrt{\bar\alpha_t}\,x_{t-1}$ for the mean. It is $x_0$ that is scaled; section 2.3 shows what the other formula does.)*
#
# **Proof, first two steps.** Put the first step into the second:
#
# $$x_2 = \sqrt{\alpha_2}\bigl(\sqrt{\alpha_1}\,x_0 + \sqrt{1-\alpha_1}\,\epsilon_1\bigr) + \sqrt{1-\alpha_2}\,\epsilon_2
#   = \sqrt{\alpha_2\alpha_1}\;x_0 + \underbrace{\sqrt{\alpha_2(1-\alpha_1)}\,\epsilon_1 + \sqrt{1-\alpha_2}\,\epsilon_2}_{\text{two independent Gaussian noises}}.$$
#
# A sum of *independent* Gaussians is Gaussian, and its variance is the sum of theirs. That sum collapses:

# %%
a, abar = sympy.symbols("alpha abar", positive=True)  # α_t of one step, and ᾱ of all steps before it
claim("two noises merge: α₂(1 − α₁) + (1 − α₂) = 1 − α₁α₂", sympy.expand(a * (1 - abar) + (1 - a) - (1 - a * abar)) == 0)

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
# **By experiment.** 20,000 points walked 200 steps. If the claim holds, what they have gained, $(x_{200}-\sqrt{\bar\alpha_{200}}\,x_0)/\sqrt{1-\bar\alpha_{200}}$, is standard normal noise. A
# Kolmogorov–Smirnov test looks for a difference; with so many points it would see noise that is 5 % too large. A p-value above 1 % means that it sees none.

# %%
gained = (walked - chain.alpha(200) * spiral) / chain.sigma(200)
p_value = stats.kstest(gained.flatten().numpy(), "norm").pvalue
claim("what 200 steps have added is N(0, 1) noise (test at 1 %)", p_value > 0.01)
jumped = chain.perturb(spiral, 200, torch.randn(spiral.shape, generator=g))
plots.overlay(walked[:2000], jumped[:2000], labels=["200 steps", "one jump"]);

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
# A public tutorial carried this step for years: `x + beta * torch.rand_like(x)`. Three things are wrong with it. Find them, and say where the
# cloud will be after 1000 steps, before you run the cell.

# %%
bug = spiral[:2000]
for t in range(1, 1001):
    bug = bug + float(chain.betas[t]) * torch.rand(bug.shape, generator=g)
right = chain.perturb(spiral[:2000], 1000, torch.randn(2000, 2, generator=g))
claim("the right chain ends with mean 0 and deviation 1, nearly", abs(right.mean()) < 0.05 and abs(right.std() - 1) < 0.05)
claim("the buggy one drifts by 5", abs((bug - spiral[:2000]).mean() - 5) < 0.1)
claim("and is still the spiral", torch.corrcoef(torch.stack([bug[:, 0], spiral[:2000, 0]]))[0, 1] > 0.9)
plots.overlay(right, bug, labels=["right", "buggy"]);

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
claim("with the slide text's formula almost nothing of x_0 is left by then", kept > 0.8 and wrong < 1e-4)

# %% [markdown]
# ### 2.4 The end of the chain must be noise
#
# Sampling will start from $\mathcal N(0, I)$. So the chain must end there: $\bar\alpha_T \approx 0$. What remains of the image at $T$ is the factor $\sqrt{\bar\alpha_T}$.
#
# The authors of DDPM (*denoising diffusion probabilistic models*, Ho et al., 2020) let $\beta_t$ rise linearly from $10^{-4}$ to $0.02$ over $T = 1000$ steps. This is our `chain`. With another $T$,
# `linear_betas(T)` multiplies every $\beta_t$ by $1000/T$, so that the chain still ends in noise.
#
# The slide asks that $\alpha_t$ be a decreasing sequence. What is needed is less: every $\alpha_t$ between 0 and 1, so that $\bar\alpha_t$ falls by itself, and
# enough steps that it falls to about 0. A constant $\alpha_t$ will do, and even one that increases.

# %%
schedules = {
    "linear β": chain,
    "constant β": DiscretePath(constant_betas(1000)),
    "falling β": DiscretePath(linear_betas(1000).flip(0)),  # here α_t increases
}
for name, path in schedules.items():
    claim(f"{name}: ᾱ_t falls at every step, to below 1e-4", (path.alpha_bars.diff() < 0).all() and path.alpha_bars[-1] < 1e-4)
t = torch.arange(1001)
plots.curves(t, {name: path.alpha_bars for name, path in schedules.items()}, "t", "share of the image's variance, ᾱ");

# %% [markdown]
# All end near 0. The constant schedule spends half of its steps on what is noise already, and falling β is worse; the linear one spreads the loss of the image over more of them.
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
# **Why may it be Gaussian?** In general it may not. It may when the step is small. Take the logarithm of Bayes' rule: up to a constant, $\log q(x_{t-1}\mid x_t)$ is a
# parabola of width about $\sqrt{\beta_t}$, from the first factor, plus $\log q(x_{t-1})$. If $\beta_t$ is small, the second is nearly a straight line across
# that width, and a parabola plus a straight line is a parabola again: a Gaussian.
#
# Here is a world where the exact answer is known: data at $-1$ and $+1$, each a little blurred. We stand at $x_{400} = 0.2$ and ask for the exact
# distribution some steps earlier. *What would you expect* for one step back, and for all 400?

# %%
two = toy.GaussianMixture(torch.tensor([[-1.0], [1.0]], dtype=torch.float64), 0.15**2)
line = torch.linspace(-2, 2, 40_001, dtype=torch.float64)


def exact_and_gaussian(steps, t=400, xt=0.2):
    """log q(x_s | x_t) on the line, for s = t − steps, and the Gaussian of the same mean and variance."""
    shrink, v = chain.transition(t - steps, t)  # x_t given x_s has mean shrink·x_s and variance v
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
    return plots.curves(line[::20], {"exact": log_q[::20].exp(), "Gaussian": log_p[::20].exp()}, "x", "density")


claim("one step back is nearly a Gaussian (KL below 1e-6 nats)", kl(*exact_and_gaussian(1)) < 1e-6)
claim("400 steps back it is not (KL above 0.5 nats)", kl(*exact_and_gaussian(400)) > 0.5)
widgets.explore(back, steps=([1, 10, 30, 100, 200, 300, 350, 400], 400))

# %% [markdown]
# All 400 steps back the answer has two humps, and no Gaussian fits. One step back the two curves are the same line; from here, 30 steps at once would still do. The
# finer the data, the smaller the steps have to be, and this is why diffusion takes many. **Averaged over $x_t$, a Gaussian is a very good model of each small step, and exact in the limit $\beta_t\to 0$.** (At
# rare places, between the humps and near the data, even one step is not Gaussian.)

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
# *(In the slide text the second coefficient lacks $x_0$.)* With $\alpha_t\bar\alpha_{t-1} = \bar\alpha_t$ this becomes
#
# $$\tilde\mu_t = \frac{\sqrt{\alpha_t}\,(1-\bar\alpha_{t-1})}{1-\bar\alpha_t}\,x_t + \frac{\sqrt{\bar\alpha_{t-1}}\,\beta_t}{1-\bar\alpha_t}\,x_0,\qquad
#   \tilde\beta_t = \frac{1-\bar\alpha_{t-1}}{1-\bar\alpha_t}\,\beta_t.$$
#
# At $t = 1$ read it as the limit: $x_0$, with variance 0. And the term without $x_{t-1}$? A computer algebra system finds that nothing is left over:

# %%
X0, XS, XT = sympy.symbols("x_0 x_s x_t", real=True)  # XS stands for x_{t−1}, abar for ᾱ_{t−1}
abar_t = a * abar
left = (XT - sympy.sqrt(a) * XS) ** 2 / (1 - a) + (XS - sympy.sqrt(abar) * X0) ** 2 / (1 - abar)
left -= (XT - sympy.sqrt(abar_t) * X0) ** 2 / (1 - abar_t)
mu_tilde = (sympy.sqrt(a) * (1 - abar) * XT + sympy.sqrt(abar) * (1 - a) * X0) / (1 - abar_t)
beta_tilde = (1 - abar) / (1 - abar_t) * (1 - a)
claim("the square is complete, with remainder 0", sympy.simplify(left - (XS - mu_tilde) ** 2 / beta_tilde) == 0)

# %% [markdown]
# A second, independent check: Bayes' rule by brute force, with numbers on a fine grid, against the kernel of the course.

# %%
t, xt_value, x0_value = 300, 0.4, -0.7
likelihood = torch.distributions.Normal((1 - chain.betas[t]).sqrt() * line, chain.betas[t].sqrt()).log_prob(torch.tensor(xt_value, dtype=torch.float64))
prior = torch.distributions.Normal(chain.alpha(t - 1) * x0_value, chain.sigma(t - 1)).log_prob(line)
bayes = (likelihood + prior).exp()
bayes = bayes / torch.trapezoid(bayes, line)
mean = torch.trapezoid(bayes * line, line)
var = torch.trapezoid(bayes * (line - mean) ** 2, line)
formula = chain.posterior(torch.tensor([xt_value], dtype=torch.float64), torch.tensor([x0_value], dtype=torch.float64), s=t - 1, t=t)
claim("posterior mean: formula = brute force, to 1e-8", abs(formula[0].item() - mean) < 1e-8)
claim("posterior variance: formula = brute force, to 1e-8", abs(formula[1].item() - var) < 1e-8)

# %% [markdown]
# What does $\tilde\mu_t$ say? It is a weighted sum of where we are, $x_t$, and where we want to go, $x_0$. At $t = 1$ it is $x_0$ itself, and $\tilde\beta_1 = 0$: given $x_0$,
# nothing is left to chance at the last step.

# %%
t = torch.arange(1, 1001)
keep, pull, variances = chain.bridge(t - 1, t)  # the weights of x_t and x_0 in the mean, and β̃_t
claim("at t = 1 the posterior is x_0, with variance 0", keep[0] == 0 and pull[0] == 1 and variances[0] == 0)
weights = {"of xₜ": keep[:60], "of x₀": pull[:60]}
plots.curves(t[:60], weights, "t", "weight in the posterior mean");

# %% [markdown]
# Near the data $x_0$ decides. Thirty steps away its weight is down to 0.06, and far out a single step moves hardly at all. But there are many, and their small pulls add up.

# %% [markdown]
# ### 3.3 Let the network guess the noise
#
# When we sample, nobody tells us $x_0$. So a network guesses it, and the guess goes into $\tilde\mu_t$. The network may guess $x_0$, or equally well the noise
# $\epsilon$ that is in $x_t$, for, given $x_t$ and while $\bar\alpha_t > 0$, each gives the other: $x_0 = (x_t-\sqrt{1-\bar\alpha_t}\,\epsilon)/\sqrt{\bar\alpha_t}$. DDPM lets it guess the noise, $\epsilon_\theta(x_t, t)$. One network serves
# all $t$: the time is one of its inputs. Put into $\tilde\mu_t$, the guess gives
#
# $$\mu_\theta(x_t, t) = \frac{1}{\sqrt{\alpha_t}}\Bigl(x_t - \frac{1-\alpha_t}{\sqrt{1-\bar\alpha_t}}\,\epsilon_\theta(x_t, t)\Bigr).$$

# %%
eps_true, eps_guess = sympy.symbols("epsilon epsilon_theta", real=True)
from_noise = (XT - sympy.sqrt(1 - abar_t) * eps_true) / sympy.sqrt(abar_t)
mu = (XT - (1 - a) / sympy.sqrt(1 - abar_t) * eps_true) / sympy.sqrt(a)
claim("the posterior mean in terms of the noise", sympy.simplify(mu_tilde.subs(X0, from_noise) - mu) == 0)

# %% [markdown]
# In code, a `Denoiser` puts a network and a path together. `predicts="eps"` says what the network's output means. Called as `denoiser(xt, t)`, it gives the guess of the clean data,
# $\hat x_0 = (x_t-\sqrt{1-\bar\alpha_t}\,\epsilon_\theta)/\sqrt{\bar\alpha_t}$, whatever the network predicts.

# %% [markdown]
# ## 4. The loss
#
# This is a VAE with the latent variables $x_1,\dots,x_T$, an encoder $q(x_{1:T}\mid x_0)$ that is fixed, and the decoder
# $p_\theta(x_{0:T}) = p(x_T)\prod_{t=1}^T p_\theta(x_{t-1}\mid x_t)$, where $p(x_T) = \mathcal N(0, I)$. As for every VAE, the likelihood is out of reach and a bound takes its place:
#
# $$-\log p_\theta(x_0) \le \mathbb E_{q(x_{1:T}\mid x_0)}\bigl[\log q(x_{1:T}\mid x_0) - \log p_\theta(x_{0:T})\bigr].$$
#
# Equality holds if $p_\theta(x_{1:T}\mid x_0) = q(x_{1:T}\mid x_0)$. *(The slide text reads <.)* The right side is $-$ELBO. Now turn each forward factor round by Bayes' rule, for $t\ge 2$: $q(x_t\mid x_{t-1}) = q(x_{t-1}\mid x_t, x_0)\,q(x_t\mid x_0)/q(x_{t-1}\mid x_0)$. In the product over $t$ the marginals
# cancel, all but the last, and the bound falls into three parts:
#
# $$\mathbb E_q\Bigl[\underbrace{D_{KL}\bigl(q(x_T\mid x_0)\,\Vert\,p(x_T)\bigr)}_{L_T}
#   + \sum_{t=2}^{T}\underbrace{D_{KL}\bigl(q(x_{t-1}\mid x_t,x_0)\,\Vert\,p_\theta(x_{t-1}\mid x_t)\bigr)}_{L_{t-1}}\ \underbrace{-\log p_\theta(x_0\mid x_1)}_{L_0}\Bigr].$$
#
# - $L_T$ has no parameters, and it is about 0 because the chain ends in noise.
# - $L_{t-1}$ compares two Gaussians: the posterior, which knows $x_0$, and the model, which does not.
# - $L_0$ is the last step to the data. As $\tilde\beta_1 = 0$, it needs another variance, $\sigma_1^2 = \beta_1$.
#
# Let both Gaussians in $L_{t-1}$ have the variance $\tilde\beta_t$. (This is a choice, $\Sigma_\theta = \tilde\beta_t$.) Then their KL divergence is the squared distance of their means over $2\tilde\beta_t$. Both
# means have the form of section 3.3, one with $\epsilon$ and one with $\epsilon_\theta$, so they differ by
# $\tilde\mu_t-\mu_\theta = \frac{\beta_t}{\sqrt{\alpha_t}\sqrt{1-\bar\alpha_t}}(\epsilon_\theta-\epsilon)$, and
#
# $$L_{t-1} = \frac{1}{2\tilde\beta_t}\lVert\tilde\mu_t-\mu_\theta\rVert^2 = \frac{\beta_t^2}{2\tilde\beta_t\,\alpha_t(1-\bar\alpha_t)}\,\lVert\epsilon-\epsilon_\theta(x_t,t)\rVert^2.$$

# %%
difference = mu - mu.subs(eps_true, eps_guess)
factor = (1 - a) / (sympy.sqrt(a) * sympy.sqrt(1 - abar_t))
claim("the means differ by the error of the noise alone", sympy.simplify(difference - factor * (eps_guess - eps_true)) == 0)

# %% [markdown]
# This holds for every $t\ge 2$, $x_0$ and $\epsilon$, without an average. With another variance $\Sigma_\theta = \sigma_t^2 I$ the weight is $\beta_t^2/(2\sigma_t^2\alpha_t(1-\bar\alpha_t))$, and a constant without $\theta$ is
# added. Now in numbers, with a network that is wrong on purpose: it says 0.9 times the true noise.

# %%
t = 300
x0 = digits[:4].double()
eps = torch.randn(x0.shape, generator=g, dtype=torch.float64)
xt = chain.perturb(x0, t, eps)
wrong_by_a_tenth = Denoiser(lambda xt, t: 0.9 * eps, chain, predicts="eps")
term = losses.bound_term(wrong_by_a_tenth, chain, x0, xt, t - 1, t, variance="posterior")
beta, alpha, var = chain.betas[t], 1 - chain.betas[t], chain.posterior(xt, x0, t - 1, t)[1]
posterior, guess = (torch.distributions.Normal(chain.posterior(xt, clean, t - 1, t)[0], var.sqrt())
                    for clean in (x0, wrong_by_a_tenth(xt, t)))  # fmt: skip
exact = torch.distributions.kl_divergence(posterior, guess).flatten(1).sum(1)
by_formula = beta**2 / (2 * var * alpha * chain.sigma(t) ** 2) * (0.1 * eps).square().flatten(1).sum(1)
claim("KL of the two Gaussians = weight × squared error of the noise", torch.allclose(exact, by_formula, rtol=1e-10))
claim("and the course's bound_term is the same number", torch.allclose(term, exact, rtol=1e-10))

# %% [markdown]
# DDPM then drops the weight. What is left is the simplest loss one could think of: **add noise, guess the noise, take the squared error.**
#
# $$L_{simple} = \mathbb E_{\,t\sim\mathrm{Uniform}\{1,\dots,T\},\ x_0,\ \epsilon}\ \bigl\lVert\epsilon-\epsilon_\theta\bigl(\sqrt{\bar\alpha_t}\,x_0+\sqrt{1-\bar\alpha_t}\,\epsilon,\ t\bigr)\bigr\rVert^2$$
#
# *(The slide text reads Uniform(0, T). The sum over $t$ in the bound is $T$ times a mean over $1,\dots,T$.)* The code divides by the number of values as well, which moves no minimum. How much was dropped?

# %%
t = torch.arange(2, 1001)
weight = chain.betas[t] ** 2 / (2 * chain.bridge(t - 1, t)[2] * (1 - chain.betas[t]) * chain.sigma(t) ** 2)
plots.curves(t, {"weight": weight}, "t", "weight of the squared error", logx=True, logy=True);

# %% [markdown]
# In the bound, the smallest noise levels count a hundred times more than those in the middle. Without the weight it is no longer the bound. It is another weighting of the same terms: small noise levels count
# less, large ones more, and there an image gets its shape.
#
# **What does the ideal network say?** A squared error is smallest at the mean. So the ideal $\epsilon_\theta$ is $\mathbb E[\epsilon\mid x_t]$, and the ideal $\hat x_0$ is $\mathbb E[x_0\mid x_t]$: the *average* of all
# clean images that fit. Keep this in mind for the pictures below.
#
# > **Algorithm 1, Training.** Repeat: draw $x_0$ from the data, $t$ from $\{1,\dots,T\}$ and $\epsilon\sim\mathcal N(0, I)$; take a gradient step on $\lVert\epsilon-\epsilon_\theta(\sqrt{\bar\alpha_t}x_0+\sqrt{1-\bar\alpha_t}\epsilon, t)\rVert^2$.

# %%
def algorithm_1(network, path, points, steps, generator):
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    for _ in range(steps):
        x0 = points[torch.randint(len(points), (256,), generator=generator)]
        t = torch.randint(1, path.T + 1, (256,), generator=generator)
        eps = torch.randn(x0.shape, generator=generator)
        xt = path.perturb(x0, t, eps)
        loss = (eps - network(xt, path.unit(t))).square().mean()  # path.unit(t) is t/T: networks like small numbers
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


# %% [markdown]
# ## 5. Train one, now
#
# Two moons: 20,000 points, a chain of 200 steps, and a small network that takes a point and a time and answers with a noise. First a hundred steps of the loop above.

# %%
torch.manual_seed(0)
moons = 1.2 * toy.two_moons(20_000, g)  # variances 1.1 and 0.4
short = DiscretePath(linear_betas(200))
claim("a hundred steps of Algorithm 1 beat the answer 0, whose loss is 1", algorithm_1(nets.MLP(dim=2), short, moons, 100, g) < 0.6)

# %% [markdown]
# It works. `training.fit` is the same loop with what one wants in practice: a progress bar, stop and resume, a learning rate that rises and falls, and `ema`, a running average of the
# weights, which as a rule draws better than the weights themselves. It calls `watch` from time to time, and there we draw from the model. *Which will it learn first: the overall shape of the cloud, or the gap
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
plots.film_points(list(snapshots.values()), times=list(snapshots), columns=6, title="What the model draws, as it learns");

# %% [markdown]
# The shape comes first, the gap later: coarse before fine. Even at the end a few points lie in the gap. The loss would not have told you:

# %%
smooth = torch.tensor(trained.losses).unfold(0, 50, 50).mean(1)
plots.curves(50 * torch.arange(1, len(smooth) + 1), {"loss": smooth}, "training step", "mean of 50 losses");

# %% [markdown]
# It falls fast, then hardly moves, and stays far from 0. $x_t$ mixes data and noise, and even the ideal network cannot take them apart again: its loss here is about 0.2.

# %% [markdown]
# ## 6. Sampling
#
# > **Algorithm 2, Sampling.** Draw $x_T\sim\mathcal N(0, I)$. For $t = T,\dots,1$: draw $z\sim\mathcal N(0, I)$ if $t>1$, else $z = 0$;
# > $x_{t-1} = \frac{1}{\sqrt{\alpha_t}}\bigl(x_t-\frac{1-\alpha_t}{\sqrt{1-\bar\alpha_t}}\,\epsilon_\theta(x_t,t)\bigr)+\sigma_t z$. Return $x_0$.
#
# Here $\sigma_t^2 I = \Sigma_\theta$ is the variance of one reverse step, not the `chain.sigma` of the noise in $x_t$. Below it is $\beta_t$. Algorithm 2 word by word, and the sampler of the course, which works
# with $\hat x_0$ in place of $\epsilon_\theta$ and takes the same steps:

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


by_the_slide = algorithm_2(trained.ema.net, short, start, torch.Generator().manual_seed(2))
states = list(samplers.ddpm(trained.ema, short, start, short.times(200), generator=torch.Generator().manual_seed(2)))
claim("Algorithm 2 and the course's sampler end at the same points", torch.allclose(by_the_slide, states[-1], atol=1e-4))

# %%
shown = [200, 80, 50, 30, 15, 0]
plots.film_points([[start, *states][200 - t] for t in shown], times=shown, columns=6, title="Reverse: from noise to data");

# %% [markdown]
# Until $t = 80$ the eye sees no change. Then the cloud tilts, the moons appear, and the last steps sharpen them.
#
# > **Spot the bug.** The slide text of Algorithm 2 has $\bar\alpha_t$ in both places where $\alpha_t$ belongs:
# > $x_{t-1} = \frac{1}{\sqrt{\bar\alpha_t}}\bigl(x_t-\frac{1-\bar\alpha_t}{\sqrt{1-\bar\alpha_t}}\,\epsilon_\theta\bigr)+\sigma_t z$. What is this the formula of? What will it draw?
#
# To blame the line and not the training, we take data whose ideal denoiser is known: eight Gaussians on a ring.

# %%
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
claim("the slide text's line loses at least 0.4 of it", blur(x) < 0.6 * 0.25)
plots.overlay(right, x, labels=["Algorithm 2", "slide text"]);

# %% [markdown]
# The line jumps to $\hat x_0$, the *mean* of all clean points that fit, and pretends that this is $x_{t-1}$. Each step draws an
# average, and more than half of the blur is gone. On images we expect pictures that are too smooth.
#
# **Which variance?** One slide sets $\Sigma_\theta$ to the upper bound $\beta_t$, a later one to $\tilde\beta_t$. Averaged over $x_t$, and for data whose coordinates have variance at most 1, the best constant lies between them: $\tilde\beta_t$ if the data
# were a single point, so that $x_0$ is known; $\beta_t$ if they were $\mathcal N(0, I)$. At a single $x_t$ the true variance may exceed $\beta_t$. Section 4 took the lower end, Algorithm 2 above the upper. With many steps they differ only near the data, and both work.

# %%
with_posterior = samplers.last(samplers.ddpm(trained.ema, short, start, short.times(200), variance="posterior", generator=g))
for name, drawn in {"β": states[-1], "β̃": with_posterior}.items():
    gap = torch.cdist(moons[:5000], drawn)
    claim(f"{name}: on average a data point has a sample within 0.045", gap.min(dim=1).values.mean() < 0.045)
    claim(f"{name}: on average a sample has a data point within 0.03", gap.min(dim=0).values.mean() < 0.03)
t = torch.arange(1, 201)
ratio = short.bridge(t - 1, t)[2] / short.betas[t]
claim("T = 200: β̃/β is 0 at t = 1 and above 0.9 from t = 20 on", ratio[0] == 0 and ratio[19:].min() > 0.9)
plots.curves(t, {"β̃ / β": ratio}, "t", "ratio of the two variances", logx=True);

# %% [markdown]
# ## 7. Digits
#
# Now the same with images. A network for 28×28 pixels takes longer than half a minute to train, so a trained one comes with the course. Its card says what it is.

# %%
digit_model = checkpoints.load("mnist-unet")
card = digit_model.card
print(card["what"])
print(f"{sum(p.numel() for p in digit_model.parameters()):,} parameters, {card['steps']:,} steps, trained on {card['images']:,} images")
print("train it again:", card["recipe"])

# %% [markdown]
# Three things are new.
#
# - **The path.** The model was trained on the *cosine path*, where $\alpha(t) = \cos(\pi t/2)$ and $\sigma(t) = \sin(\pi t/2)$ for $t$ from 0 to 1. Read $\alpha(t)$ as $\sqrt{\bar\alpha_t}$ and $\sigma(t)$ as
#   $\sqrt{1-\bar\alpha_t}$, and the formulas in $\hat x_0$ stay. (Those in $\epsilon$ divide by $\alpha$, which is 0 at $t = 1$.) For a step from $t$ to an earlier $s$, write $\alpha(t)^2/\alpha(s)^2$ where $\alpha_t$ stood. So any descending list of times is a chain, and we choose its length when we draw.
# - **What it predicts.** Not $\epsilon$ but $v = \alpha(t)\,\epsilon - \sigma(t)\,x_0$. Given $x_t$, each of $x_0$, $\epsilon$ and $v$ gives the others, except at the ends. At $t = 1$ $x_t = \epsilon$, so predicting the noise is no task and says
#   nothing about $x_0$; but $v = -x_0$.
# - **The class.** The network is told the label $y$. One label in ten was replaced by the number 10, "no label", while it learned, so it can also draw without one.

# %%
t = torch.linspace(0, 1, 101)
curves = {"chain, linear β": chain.alpha_bars[::10], "cosine path": Cosine().alpha(t) ** 2}
plots.curves(t, curves, "t / T", "share of the image's variance, α²");

# %% [markdown]
# Before we let it draw, look at what it knows. Below, each column is a real test image, noised to time $t$ (top), and the network's guess $\hat x_0$ (bottom). Move $t$. *Where does
# it stop copying and start inventing?*

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
# We draw four digits of each class in 100 steps. `clipped` holds the guess $\hat x_0$ in $[-1, 1]$, where pixels live.

# %%
asked = torch.arange(10).repeat_interleave(4)
times = digit_model.path.times(100)
noise = torch.randn(40, 1, 28, 28, generator=g)
conditional = clipped(lambda xt, t: digit_model(xt, t, y=asked))
states = [noise, *samplers.ddpm(conditional, digit_model.path, noise, times, variance="posterior", generator=g)]
plots.rows(list(states[-1].unflatten(0, (10, 4))), labels=list(range(10)), title="Asked for, and drawn")

# %% [markdown]
# Each row is one class. Are they what was asked for? A simple judge: find the most similar of 10,000 training images, and take its label. First we judge the judge, on real test images.

# %%
train_digits, train_labels = data.images(data.load("mnist", "train"))


def judge(images):
    return train_labels[torch.cdist(images.flatten(1), train_digits.flatten(1)).argmin(dim=1)]


claim("the judge is right on at least 9 of 10 test images", (judge(digits[:500]) == labels[:500]).float().mean() > 0.9)
claim("at least 32 of the 40 digits are what was asked for", (judge(states[-1]) == asked).sum() >= 32)

# %% [markdown]
# Now the way back of two of them: above, the state $x_t$; below, the network's guess $\hat x_0$ at that moment. *When is it decided how the digit is written?*

# %%
pick, frames, shown = [8, 17], [], range(0, 100, 12)
for i in shown:
    x0_hat = conditional(states[i], times[i].item())
    frames.append(torch.stack([states[i][pick], x0_hat[pick]], dim=1).flatten(0, 1))  # state and guess in turn

plots.film(frames, times=[f"{times[i]:.2f}" for i in shown], labels=["xₜ", "guess"] * 2, title="Reverse: from noise to digits")

# %% [markdown]
# The guess begins as the blurred mean of the class. By the middle of the way its strokes are in place, while $x_t$ is still mostly noise. The rest is detail. As with the moons: coarse before fine.

# %%
plots.animate([x[::2] for x in states], times=times.tolist(), seconds=6)

# %% [markdown]
# ## 8. Recap
#
# - The forward process adds noise in small steps. It has a closed form, so training jumps to any $t$ at once.
# - One step back is nearly Gaussian, on average and for small $\beta_t$. Given $x_0$ it is exactly Gaussian, with mean $\tilde\mu_t$ and variance $\tilde\beta_t$.
# - The network's guess takes the place of $x_0$. With $\Sigma_\theta$ fixed, each $L_{t-1}$ becomes a squared error of the noise, and DDPM drops the weights.
# - Algorithm 1: add noise, guess it, square the error. Algorithm 2: guess, step back, add a little noise, again.
#
# **Pitfalls**
#
# - $\beta$ or $\sqrt\beta$? A variance or a deviation? A common slip, and the code still draws something.
# - $\alpha_t$ (one step) is not $\bar\alpha_t$ (all steps so far). The slide text of Algorithm 2 shows how easily the bar slips in.
# - No noise at the last step: $z = 0$ at $t = 1$.
# - $\bar\alpha_0 = 1$ belongs in the table. Code that starts its table at $\bar\alpha_1$ needs a special case in every formula with $\bar\alpha_{t-1}$.
# - With another number of steps, scale $\beta$: $\bar\alpha_T$ must stay near 0.
#
# **References**
#
# - Ho, Jain, Abbeel: [*Denoising Diffusion Probabilistic Models*](https://arxiv.org/abs/2006.11239), 2020. The lecture's main source.
# - Sohl-Dickstein, Weiss, Maheswaranathan, Ganguli: [*Deep Unsupervised Learning using Nonequilibrium Thermodynamics*](https://arxiv.org/abs/1503.03585), 2015. Where the idea began.
# - Nichol, Dhariwal: [*Improved Denoising Diffusion Probabilistic Models*](https://arxiv.org/abs/2102.09672), 2021. The cosine schedule.
# - Salimans, Ho: [*Progressive Distillation for Fast Sampling of Diffusion Models*](https://arxiv.org/abs/2202.00512), 2022. The prediction of $v$.
