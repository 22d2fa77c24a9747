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
# # Fast sampling: fewer steps, better steps, steps side by side
#
# A diffusion model asks its network again and again before a picture is done. This notebook is about asking less often. At the end of it you will be able to
#
# - count what a sample costs, and say what happens to a chain when most of its steps are dropped;
# - say which variance a step back should have, derive it, and let a network learn it;
# - derive DDIM line by line, and use it to skip steps, to encode images and to mix them;
# - say why DPM-Solver is more exact than DDIM with as many evaluations, and measure that it is;
# - catch faults in a solver that a test of its order lets through;
# - sample all steps at once, although the chain is a Markov chain;
# - choose a sampler for a given number of evaluations.
#
# **Time:** three to four hours to read, with pen and paper; it runs in about 40 seconds on one core.
# **It builds on** [notebook 03](03_ddpm.ipynb): the chain, the posterior, the two variances, the bound; [notebook 05](05_score_sde.ipynb): the probability-flow ODE and Heun's rule; and for one count on [notebook 06](06_guidance.ipynb).
# **Symbols** are those of the lecture; the README's [symbol ledger](../README.md#symbols) lists them all.

# %%
import importlib.util

if importlib.util.find_spec("dgm_course") is None:  # Colab, or a fresh environment
    get_ipython().run_line_magic("pip", "install --quiet dgm-course")

# %%
import math
import time
from itertools import pairwise

import sympy
import torch
from torchdiffeq import odeint

from dgm_course import checkpoints, data, guidance, losses, measures, nets, objectives, paths, samplers, tables, toy
from dgm_course.checks import claim, show_source
from dgm_course.denoisers import Denoiser, clipped, read_as
from dgm_course.paths import Cosine, DiscretePath
from dgm_course.schedules import linear_betas
from dgm_course.viz import plots, style, widgets

g = torch.Generator().manual_seed(0)  # where nearly all chance comes from
double = torch.float64

# %% [markdown]
# ## 1. What a sample costs, and what is lost with fewer steps
#
# ### 1.1 Count evaluations, not seconds
#
# The slides name the main trouble of diffusion models: inference is slow, for it takes several steps, where a GAN takes one. What is the right unit for this? Seconds depend on the machine. What does not is the number of **evaluations**: how often the network is asked for each sample. We wrap a denoiser so that it counts.
#
# A count does not depend on what the network says. So three bumps on a line will do as data; their ideal denoiser is known. The path is the cosine path $\alpha = \cos\frac{\pi t}2$, $\sigma = \sin\frac{\pi t}2$ here and in most of the notebook. A *chain of $S$ steps* means $S$ equal steps of $t$ from 1 to 0. *How many evaluations do you expect in each line below?* Ancestral sampling and Heun's rule you know; DDIM, 2M and 2S come in sections 2 and 3, so there you must guess.

# %%
modes, widths = torch.tensor([-1.07, 0.18, 1.09], dtype=double), torch.tensor([0.10, 0.17, 0.14], dtype=double)
shares = torch.tensor([0.40, 0.25, 0.35], dtype=double)
line, path = toy.GaussianMixture(modes[:, None], widths**2, shares), Cosine()
d = line.denoiser(path)  # E[x_0 given x_t], exactly


def normal(*shape):
    return torch.randn(*shape, generator=g, dtype=double)


# %%
def count(sampler, steps, wrap=lambda d: d):
    """How often `sampler` asks the denoiser in so many steps, for each sample."""
    asked = 0

    def counted(xt, t):
        nonlocal asked
        asked += len(xt) // 4  # of 4 samples, each counts once
        return d(xt, t)

    samplers.last(sampler(wrap(counted), path, normal(4, 1), path.times(steps)))
    return asked


# %%
def guided(d):
    return guidance.classifier_free(d, d, scale=2.0)  # the two would differ in the label; for a count they need not


counts = {
    "ancestral sampling, 1000 steps": count(samplers.ddpm, 1000),
    "DDIM, 25 steps": count(samplers.ddim, 25),
    "DPM-Solver++(2M), 25 steps": count(samplers.dpm_solver_pp_2m, 25),
    "DPM-Solver++(2S), 25 steps": count(samplers.dpm_solver_pp_2s, 25),
    "Heun, 25 steps": count(samplers.heun, 25),
    "DDIM, 25 steps, guided": count(samplers.ddim, 25, guided),
}
for name, evaluations in counts.items():
    print(f"{name:>31}: {evaluations:4d} evaluations")

# %% [markdown]
# Heun and 2S ask twice in a step, but only once in the first and in the last one: there $\alpha = 0$ or $\sigma = 0$, and a plain step must do. **A guided step counts two evaluations**, one with the label and one without. Whoever compares samplers by *steps* gives a present to those that ask twice.
#
# Is it fair to forget the rest of a step, the arithmetic between two evaluations? We time both, in one run and on this machine; only the ratio matters.

# %%
digit_model = checkpoints.load("mnist-unet")
start, ten = torch.randn(10, 1, 28, 28, generator=g), torch.arange(10)


def seconds(denoiser, steps=10):
    began = time.perf_counter()
    samplers.last(samplers.ddim(denoiser, path, start, path.times(steps)))
    return (time.perf_counter() - began) / steps


with_network = seconds(lambda xt, t: digit_model(xt, t, y=ten))
arithmetic = min(seconds(lambda xt, t: xt, 100) for _ in range(3))  # a denoiser that costs nothing
claim(
    "ten digits: an evaluation takes more than 50 times as long as the rest of a step", with_network > 50 * arithmetic
)

# %% [markdown]
# So evaluations are the cost. There are three ways to have fewer of them to wait for: drop steps and repair what that breaks (sections 1 and 2), take better steps (section 3), or take the steps at the same time (section 4). A fourth, to train a new network that needs few steps, is a later notebook's.
#
# ### 1.2 "Only $S$ of $N$ steps?"
#
# The slide asks: *"Is it possible to perform only S step (S < N) when inference? (with a fixed variance)"*. The slide text answers: *"No, it is inappropriate to do so … the gap between the upperbound and lowerbound becomes larger and larger when the diffusion step is small."* The bounds are those of notebook 03, section 3.4: the variance of a true step lies between $\tilde\beta$ and $\beta$, on average. We look at both halves of the sentence: is it impossible, and what happens to the gap?
#
# A step from $t$ to any earlier $s$ has its own $\beta$ and $\tilde\beta$. Notebook 03 derived them for one step of the chain; for steps of any length they read as follows. ($\alpha_t$ is short for $\alpha(t)$ here and $\sigma_t$ for $\sigma(t)$: the factors of $x_0$ and of the noise in $x_t$, not the slides' letters.)
#
# $$\beta = \sigma_t^2-\frac{\alpha_t^2}{\alpha_s^2}\,\sigma_s^2,\qquad \tilde\beta = \beta\,\frac{\sigma_s^2}{\sigma_t^2},\qquad c = \frac{\alpha_s\,\beta}{\sigma_t^2},$$
#
# where $c$ is the weight of $x_0$ in the posterior mean. In code, $\beta$ comes from `path.transition(s, t)`, the other two from `path.bridge(s, t)`. Notebook 03 also showed which variance the true step has:
#
# $$\mathrm{Var}(x_s\mid x_t) = \tilde\beta+c^2\,\mathrm{Var}(x_0\mid x_t).$$
#
# That was exact, at every $x_t$, and nowhere did it ask for a *short* step. So nothing in them forbids to skip: **$\beta$ and $\tilde\beta$ of the longer step are other numbers, and one must compute them anew.** What a long step does lose is its Gaussian shape; section 1.3 looks at that.
#
# **The gap.** From the formulas, $\beta/\tilde\beta = \sigma_t^2/\sigma_s^2$. So $\log(\beta/\tilde\beta) = \log\sigma_t^2-\log\sigma_s^2$: the gap in logarithms is a *difference*, and over the steps of a chain it adds up to a sum that telescopes. With times $1 = t_S>\dots>t_1>t_0 = 0$,
#
# $$\sum_{i=2}^S\log\frac{\beta}{\tilde\beta}\Big|_{t_i\to t_{i-1}} = \log\sigma^2(1)-\log\sigma^2(t_1).$$
#
# On our path $\sigma(1) = 1$ and $\sigma(t_1) = \sin\frac\pi{2S}\approx\frac\pi{2S}$, so this is about $2\log S-0.9$. A chain of 1000 steps has 12.9 to share out, and one of 10 steps still 3.7. That makes 0.013 for each of the many steps, and 0.4 for each of the few. In this the slide is right.
#
# The last step, to $t_0 = 0$, is left out of the sum. There $\tilde\beta = 0$, and the gap is infinite *whatever* the number of steps.

# %%
a_s, a_t = sympy.symbols("alpha_s alpha_t", positive=True)
v_s, v_t = 1 - a_s**2, 1 - a_t**2  # σ² of the two times, where α² + σ² = 1
B = v_t - a_t**2 / a_s**2 * v_s
B_tilde, C = B * v_s / v_t, a_s * B / v_t
claim("β/β̃ is σ_t²/σ_s²", sympy.simplify(B / B_tilde - v_t / v_s) == 0)


def variances(t, s):
    """β, β̃ and c of the step from t to s."""
    return path.transition(s, t)[1], path.bridge(s, t)[2], path.bridge(s, t)[1]


numbers = [1000, 100, 25, 10]
gaps = {}
for S in numbers:
    t = path.times(S)[:-1]
    gaps[S] = torch.stack([torch.log(b / bt) for b, bt, _ in (variances(*ends) for ends in pairwise(t.tolist()))])
    whole = (path.sigma(1.0) / path.sigma(t[-1])).log() * 2
    claim(f"{S} steps: all gaps together are log σ²(1) − log σ²(t_1) = {whole:.1f}", abs(gaps[S].sum() - whole) < 1e-9)

# %% [markdown]
# **Where between the bounds?** That depends on how much a guess of $x_0$ can still be wrong. On a path with $\alpha^2+\sigma^2 = 1$ the answer is surprisingly simple.
#
# **Claim.** $\displaystyle\quad\mathrm{Var}(x_s\mid x_t) = \tilde\beta+\kappa\,(\beta-\tilde\beta)\quad\text{with}\quad \kappa = \frac{\mathrm{Var}(x_0\mid x_t)}{\sigma_t^2}.$
#
# **Why.** All that is needed is $c^2\sigma_t^2 = \beta-\tilde\beta$. With $\tilde\beta = \beta\sigma_s^2/\sigma_t^2$ the right side is $\beta\,(\sigma_t^2-\sigma_s^2)/\sigma_t^2$; the left side is $\beta\cdot\alpha_s^2\beta/\sigma_t^2$. And $\alpha_s^2\beta = \alpha_s^2\sigma_t^2-\alpha_t^2\sigma_s^2 = \sigma_t^2-\sigma_s^2$, when $\alpha^2 = 1-\sigma^2$.
#
# The fraction $\kappa$ has *no $s$ in it*. Where between $\beta$ and $\tilde\beta$ the true variance lies does not depend on how long the step is. If a network knows it for short steps, it knows it for long ones.

# %%
claim("c²σ_t² = β − β̃", sympy.simplify(C**2 * v_t - (B - B_tilde)) == 0)


def variance_of_x0(xt, t, d=d):
    """Var(x_0 given x_t) of an ideal denoiser: σ²/α times the slope of the guess."""
    with torch.enable_grad():
        xt = xt.detach().requires_grad_()
        (slope,) = torch.autograd.grad(d(xt, t).sum(), xt)
    return path.sigma(t) ** 2 / path.alpha(t) * slope


# %% [markdown]
# The code uses a companion of Tweedie's formula (notebook 05), for data on a line: $\mathrm{Var}(x_0\mid x_t) = \frac{\sigma^2}\alpha\,\frac{\partial\hat x_0}{\partial x_t}$. A guess that moves quickly with $x_t$ is an unsure one.
#
# **Why.** By Bayes' rule $\hat x_0(x) = \int x_0\,p(x_0)\,e^{-(x-\alpha x_0)^2/2\sigma^2}dx_0\big/\int p(x_0)\,e^{-(x-\alpha x_0)^2/2\sigma^2}dx_0$. Differentiating an exponent brings down $-(x-\alpha x_0)/\sigma^2$, so the derivative of the quotient is the covariance of $x_0$ with that, given $x$: $\frac\alpha{\sigma^2}\mathrm{Var}(x_0\mid x)$.
#
# We check it by integrals on a grid, first this formula, then the whole claim: Bayes' rule gives the moments of $x_0$ and of $x_s$, given $x_t$.

# %%
grid = torch.linspace(-6, 6, 6001, dtype=double)
t, s, here = 0.5, 0.3, torch.tensor([[0.35]], dtype=double)


def moments(log_weights):
    p = (log_weights - log_weights.max()).exp()
    p = p / torch.trapezoid(p, grid)
    mean = torch.trapezoid(p * grid, grid)
    return mean, torch.trapezoid(p * (grid - mean) ** 2, grid)


a, b = path.transition(s, t)
_, exact = moments(line.log_prob(grid[:, None]) - (here[0] - path.alpha(t) * grid) ** 2 / (2 * path.sigma(t) ** 2))
claim("Var(x_0 | x_t) is σ²/α times the slope of the guess", abs(variance_of_x0(here, t) - exact).item() < 1e-9)
_, exact = moments(line.log_prob(grid[:, None], path, s) - (here[0] - a * grid) ** 2 / (2 * b))
beta, beta_tilde, _ = variances(t, s)
kappa = variance_of_x0(here, t) / path.sigma(t) ** 2
claim("Var(x_s | x_t) = β̃ + κ (β − β̃)", abs(beta_tilde + kappa * (beta - beta_tilde) - exact).item() < 1e-9)

# %% [markdown]
# Now averaged over $x_t$, for all times and for chains of 1000, 100, 25 and 10 steps. On the left the gap of a step that begins at $t$. On the right the place of $\Sigma$, the mean true variance, between the two bounds. We measure it *on a logarithmic scale*, as the slide's formula in 1.4 will: $v = \log(\Sigma/\tilde\beta)/\log(\beta/\tilde\beta)$, 0 for $\tilde\beta$ and 1 for $\beta$.
#
# *On a plain scale the place is the mean of $\kappa$, and does not depend on the number of steps. What would you expect of $v$?*


# %%
def mean_kappa(t):
    """E Var(x_0 given x_t)/σ_t², by E x_0² − E x̂_0²."""
    q = line.log_prob(grid[:, None], path, t).exp()
    second = (line.cov + line.mean**2).squeeze()
    return (second - torch.trapezoid(q * d(grid[:, None], t)[:, 0] ** 2, grid)) / path.sigma(t) ** 2


def place_of(S, t):
    """Where E Var(x_s given x_t) lies between β̃ (0) and β (1), in logarithms, for a step of length 1/S."""
    gap = torch.log(path.sigma(t) ** 2 / path.sigma(t - 1 / S) ** 2)
    return torch.log1p(mean_kappa(t) * gap.expm1()) / gap  # Σ/β̃ = 1 + κ (β/β̃ − 1)


# %%
at = {S: path.times(S)[:-2].flip(0)[:: max(1, S // 50)] for S in numbers}  # where steps begin, upwards from t_2
gap = {S: gaps[S].flip(0)[:: max(1, S // 50)] for S in numbers}
place = {S: torch.stack([place_of(S, t) for t in at[S].tolist()]) for S in numbers}
made, (left, right) = plots.panels(2, width=9.4, height=3.5)
for ax, what, log, label in ((left, gap, True, "log(β/β̃)"), (right, place, False, "place v between β̃ and β")):
    named = [{f"{S} steps": values[S] for S in numbers} for values in (at, what)]
    plots.curves(*named, "t", label, logy=log, ax=ax)
left.set_title("the gap of a step")
right.set_title("where the true variance lies")
made

# %%
claim("the mean true variance lies between the bounds, at all steps", all(0 < v < 1 for S in numbers for v in place[S]))
claim("with 10 steps the gap is more than 50 times that with 1000, at t = ½", gaps[10][5] > 50 * gaps[1000][500])
moved = [abs(place_of(25, t) - place_of(1000, t)) for t in (0.12, 0.2, 0.4, 0.6, 0.8, 0.96)]
claim("t from 0.12 to 0.96: v with 25 steps differs by less than 0.12 from v with 1000", max(moved) < 0.12)

# %% [markdown]
# Left: with a tenth of the steps each has ten times the gap, about. Right: the true variance lies between the bounds, and *where* it lies moves little when steps are dropped, as long as the gap is small.
#
# But it is not the same place at all times. Where there is much noise it is nine tenths of the way to $\beta$; at $t = 0.12$ about half way: there one can mostly tell which bump a point belongs to, and the noise is still about as wide as a bump. Nearer to the data it rises to $\beta$: there $\mathrm{Var}(x_0\mid x_t)\approx\sigma_t^2$, for the noise is narrower than a bump, and nothing else hides $x_0$. With 1000 steps the place does not matter, for $\beta$ and $\tilde\beta$ are nearly one number. With 10 steps it does.
#
# > **Two footnotes to the slides.** An earlier slide calls the range between the bounds *"extremely small when diffusion step is large"*. Large means *many* steps. And $\beta$ is an upper bound *on average over $x_t$, for a coordinate of variance at most 1*. Pointwise $\kappa$ may be far above 1: between two bumps the next state may go either way.

# %%
xt = path.perturb(line.sample(20_000, g), 0.2, normal(20_000, 1))
kappa = variance_of_x0(xt, 0.2) / path.sigma(0.2) ** 2
claim("t = 0.2: κ is below 1 on average", kappa.mean() < 1)
claim("and above 2 at its largest", kappa.max() > 2)

# %% [markdown]
# ### 1.3 What goes wrong, in numbers
#
# Gaussian data $\mathcal N(0, V)$ can be followed through a chain without drawing anything. The ideal guess is $\hat x_0 = k_tx_t$ with $k_t = \alpha_tV/(\alpha_t^2V+\sigma_t^2)$. So each step multiplies the variance by a square and adds $\Sigma$, the variance of what it draws. Notebook 03 did this with $\beta$ and with $\tilde\beta$, and neither was exact, *although the denoiser was perfect*. Now a third choice: $\Sigma = \tilde\beta+c^2\,\mathrm{Var}(x_0\mid x_t)$, where $\mathrm{Var}(x_0\mid x_t) = V\sigma_t^2/(\alpha_t^2V+\sigma_t^2)$. *Three choices, with $V = 0.25$: which of them are off, and which way?*


# %%
def drawn_variance(S, choice, V=0.25):
    """The variance of what S steps draw from N(0, V) data with the ideal denoiser, divided by V."""
    now = 1.0
    for t, s in pairwise(path.times(S)):
        beta, beta_tilde, c = variances(t, s)
        keep, total = path.bridge(s, t)[0], path.alpha(t) ** 2 * V + path.sigma(t) ** 2
        true = beta_tilde + c**2 * V * path.sigma(t) ** 2 / total
        Sigma = {"β": beta if s > 0 else 0, "β̃": beta_tilde, "β̃ + c² Var": true}[choice]
        now = (keep + c * path.alpha(t) * V / total) ** 2 * now + Sigma
    return now / V


tried = [5, 10, 25, 50, 100, 250]
ends = {choice: torch.tensor([drawn_variance(S, choice) for S in tried]) for choice in ("β", "β̃", "β̃ + c² Var")}
claim("with β the spread is too large, with β̃ too small", ends["β"].min() > 1 and ends["β̃"].max() < 1)
claim("with β̃ + c² Var it is exact, for any number of steps, to 1e-12", (ends["β̃ + c² Var"] - 1).abs().max() < 1e-12)
colors = {"β̃ + c² Var": style.EXACT}
plots.curves(torch.tensor(tried), ends, "steps S", "variance drawn / variance", logx=True, colors=colors)

# %% [markdown]
# With $\tilde\beta$ ten steps lose 40 % of the variance; with $\beta$ they make 10 % too much. (That is so for $V<1$. For $V>1$ the true variance lies above $\beta$, and both choices lose.) With the true variance even *five* steps are exact: for Gaussian data the true step is Gaussian, so its mean and variance are all there is to know.
#
# The last step has a part in this. With $\beta$ and with $\tilde\beta$ it draws nothing, as in all our samplers: the sample is $\hat x_0$, and $\mathrm{Var}(x_0\mid x_{t_1})$ is lost. That is why $\beta$ does less harm with five steps than with ten. For images the loss is small, as they have hardly any noise of their own. The true variance draws in the last step, too.
#
# So the answer to the slide's question is not "no": with $\beta$ and $\tilde\beta$ recomputed it *is* possible. Quality falls as the gap grows, and a better variance gives much of it back.
#
# For other data a long step is not Gaussian, so no variance makes it exact. *How much does the right one help there? Move the number of steps.* The histograms are 10,000 points each, and all stop at $t = 0.02$.

# %%
number, low = 10_000, 0.02
begin = path.perturb(line.sample(number, g), 0.99, normal(number, 1))
wanted = path.perturb(line.sample(number, g), low, normal(number, 1))[:, 0]


def true_variance(x, x0, t, s):
    _, beta_tilde, c = variances(t, s)
    return beta_tilde + c**2 * variance_of_x0(x, t)


def best_number(x, x0, t, s):
    beta, beta_tilde, _ = variances(t, s)
    return beta_tilde + (beta - beta_tilde) * mean_kappa(t)  # the mean of the true variance, the same for all x_t


rules = {"β": "beta", "β̃": "posterior", "β̃ + c² Var(x_0 | x_t)": true_variance}  # for variance= of samplers.ddpm


# %%
def run(rule, S):
    times = torch.linspace(0.99, low, S + 1, dtype=double)
    noise = torch.Generator().manual_seed(1)
    return samplers.last(samplers.ddpm(d, path, begin, times, variance=rule, generator=noise))[:, 0]


def misfit(x):
    """The largest distance between the distribution functions of a cloud and of the data at t = 0.02."""
    spread = (path.alpha(low) ** 2 * widths**2 + path.sigma(low) ** 2).sqrt()
    exact = (shares * torch.special.ndtr((x.sort().values[:, None] - path.alpha(low) * modes) / spread)).sum(1)
    return (exact - (torch.arange(len(x)) + 0.5) / len(x)).abs().max()


# %%
def few_steps(steps):
    made, axes = plots.panels(3, width=10.2, height=2.8)
    for ax, (name, rule) in zip(axes, rules.items(), strict=True):
        plots.overlay(wanted, run(rule, steps), ax=ax, extent=(-1.7, 1.7), title=name)
        ax.set_ylim(0, 2.4)
    return made


upper, lower, true, number_ = (misfit(run(rule, 10)) for rule in (*rules.values(), best_number))
claim("10 steps: the true variance at each x_t leaves less than half the misfit of β̃", true < lower / 2)
claim("and less than a third of that of β", true < upper / 3)
claim("the best single number for each step leaves more than twice as much", number_ > 2 * true)
widgets.explore(few_steps, steps=([5, 10, 25, 50, 100], 10))

# %% [markdown]
# With ten steps $\beta$ makes the bumps too wide and fills the valleys between them. $\tilde\beta$ makes the bumps too narrow. The best single number between the two does no better than $\tilde\beta$ here, for the bumps and the valleys need different variances. The variance that *knows where it is* keeps the bumps apart, at their width. With five steps none of them does: so long a step is far from Gaussian.
#
# A variance that depends on $x_t$ must come from somewhere. A network could learn it.
#
# ### 1.4 Improved DDPM: learn the variance
#
# The slide's formula lets a second output $v_\theta$ of the network interpolate between the bounds, in the log domain:
#
# $$\Sigma_\theta(x_t, t) = \exp\bigl(v_\theta\log\beta_t+(1-v_\theta)\log\tilde\beta_t\bigr).$$
#
# This is the $v$ of the figure in 1.2, not the $v$ that the digit network predicts. It is one number for each pixel.
#
# **Why not learn $\Sigma$ itself?** Its values span many powers of ten over $t$, while at each $t$ only a narrow range is reasonable: the slide's "infinitesimal range of reasonable values".
#
# **Why the log domain?** An exponential is positive whatever the network says. An error in $v$ is then an error by a *factor*, of the same size at both ends. With $\Sigma = v\beta+(1-v)\tilde\beta$, where $\tilde\beta$ is far below $\beta$, a $v$ slightly below 0 would mean a negative variance.
#
# **One place where the formula has no value.** In the last step down, from $t = 1$ of the chain, $\tilde\beta_1 = 0$, for there is no noise at $t = 0$. So $\log\tilde\beta_1 = -\infty$, and the formula gives $\Sigma = 0$ for all $v<1$. A convention is needed. The paper's code takes $\tilde\beta_2$ for $\tilde\beta_1$. This course takes $\Sigma = \beta_1$, whatever $v$ is:

# %%
show_source(paths.GaussianPath.log_variance)

# %%
first = [path.log_variance(0.0, 0.001, v) for v in (0.0, 0.5, 1.0)]
claim(
    "at the last step log Σ is log β_1 for every v",
    all(value == path.transition(0.0, 0.001)[1].log() for value in first),
)
_, beta_tilde, _ = variances(0.001, 0.0)
claim("there log β̃ is −∞", beta_tilde.log() == -math.inf)
chain_beta, chain_posterior, _ = variances(0.002, 0.001)
claim(
    "cosine path, 1000 steps: the paper's β̃_2 is three quarters of β_1, to 1 %",
    abs(chain_posterior / path.transition(0.0, 0.001)[1] - 0.75) < 0.01,
)

# %% [markdown]
# **What is there to learn $v$ from?** Not $L_{simple}$, which has no variance in it. But the bound has. Its term for a step is the KL divergence of two Gaussians with variances $\tilde\beta$ and $\Sigma$ and means that differ by $c\,(x_0-\hat x_0)$. For one coordinate:
#
# $$L = \frac12\Bigl[\frac{\tilde\beta}{\Sigma}+\frac{c^2(x_0-\hat x_0)^2}{\Sigma}-1-\log\frac{\tilde\beta}{\Sigma}\Bigr].$$
#
# Take the mean given $x_t$ and set the derivative in $\Sigma$ to 0: $\;\Sigma^* = \tilde\beta+c^2\,\mathbb E[(x_0-\hat x_0)^2\mid x_t]$. For an ideal network this is $\tilde\beta+c^2\,\mathrm{Var}(x_0\mid x_t)$, the true variance. For any other one, it counts the network's own error, too.

# %%
Sigma, bt, E = sympy.symbols("Sigma betatilde E", positive=True)  # E is c² E[(x_0 − x̂_0)² | x_t]
term = (bt / Sigma + E / Sigma - 1 - sympy.log(bt / Sigma)) / 2
claim(
    "the term of the bound is flat in Σ at β̃ + E, and only there",
    sympy.solve(sympy.diff(term, Sigma), Sigma) == [bt + E],
)
claim(
    "and that is its minimum", sympy.simplify(sympy.diff(term, Sigma, 2).subs(Sigma, bt + E) * 2 * (bt + E) ** 2) == 1
)

# %% [markdown]
# **The hybrid loss.** $L_{hybrid} = L_{simple}+\lambda L_{vlb}$, where $L_{vlb}$ is the bound of notebook 03 and $\lambda$ a small weight (in section 3 the letter is a clock). The mean shall learn from $L_{simple}$ alone, whose weights suit it (notebook 03, section 4.7). So in $L_{vlb}$ the mean is taken as a constant: its gradient is stopped. The slide says that the weighted loss "is used to train variance specifically". This is how.
#
# $L_{vlb}$ is a sum over $T$ steps. One step drawn at random therefore stands for $T$ of them, and gets the factor $\lambda T$. With the paper's $\lambda = 0.001$ and $T = 1000$ that is 1. Both losses are means over the pixels, and the bound is counted in bits: hence the division in the code's last line.

# %%
show_source(losses.hybrid)

# %% [markdown]
# **Checked by automatic differentiation**, with a network whose two outputs are plain numbers that we may differentiate by.

# %%
x0, eps = torch.randn(2, 6, 1, generator=g)
says = torch.randn(6, 2, generator=g).requires_grad_()
free = Denoiser(lambda xt, t: says, path, predicts="eps", learned_variance=True)
plain = torch.autograd.grad((says[:, :1] - eps).square().mean(), says)[0]  # of L_simple alone
both = torch.autograd.grad(losses.hybrid(free, x0, 0.48, 0.5, eps, bins=None), says)[0]
claim(
    "the bound adds exactly 0 to the gradient of the mean: it is that of L_simple",
    torch.equal(both[:, :1], plain[:, :1]),
)
claim("the variance has a gradient, from the bound only", both[:, 1:].abs().min() > 0 and plain[:, 1:].abs().max() == 0)
xt = path.perturb(x0, 0.5, eps)
unstopped = losses.bound_term(free.with_variance, path, x0, xt, 0.48, 0.5, variance="learned").mean()
claim(
    "without the stop the bound would pull at the mean", torch.autograd.grad(unstopped, says)[0][:, :1].abs().min() > 0
)

# %% [markdown]
# **Let a small network learn $v$**, live. The mean is the ideal denoiser of the three bumps, so that nothing is left to learn but the variance; the chain has 25 steps. Then we compare with the true variance, at a time when the bumps still overlap. *Where along $x_t$ do you expect the largest variance?*


# %%
class WithVariance(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fraction = nets.MLP(1, width=64, depth=1)

    def forward(self, xt, t):
        return torch.cat([d(xt, t), self.fraction(xt, t)], 1)


# %%
S = 25
torch.manual_seed(0)
model = Denoiser(WithVariance(), path, predicts="x0", learned_variance=True)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=400)
for _ in range(400):
    i = torch.randint(2, S + 1, (512,), generator=g).double()  # the last step has no choice to learn
    x0, eps = line.sample(512, g).float(), torch.randn(512, 1, generator=g)
    optimizer.zero_grad()
    losses.hybrid(model, x0, (i - 1) / S, i / S, eps, bins=None).backward()
    optimizer.step()
    schedule.step()

# %%
t, s = 0.4, 0.36
beta, beta_tilde, _ = variances(t, s)
x = torch.linspace(-1.5, 1.5, 301, dtype=double)[:, None]
true = beta_tilde + (beta - beta_tilde) * variance_of_x0(x, t) / path.sigma(t) ** 2
with torch.no_grad():
    learned = path.log_variance(s, t, model.with_variance(x.float(), t)[1]).exp().double()
q = line.log_prob(x, path, t).exp()
wrong = (q * (learned / true - 1).abs()[:, 0]).sum() / q.sum()
claim("where points are, the learned variance is the true one, to 3 % on average", wrong < 0.03)
claim("the true variance changes by more than 20 % along x_t", true.max() > 1.2 * true.min())
lines = {"true": true[:, 0], "learned": learned[:, 0], "β": beta.expand(301), "β̃": beta_tilde.expand(301)}
inks = {"true": style.EXACT, "learned": style.MODEL, "β": style.NOISE, "β̃": style.NOISE}
plots.curves(x[:, 0], lines, "x_t", "variance of the step", colors=inks)

# %% [markdown]
# The variance is largest in the middle, where it is open to which bump a point belongs; there it even exceeds $\beta$. The small network has found this, roughly, from single pairs $(x_0, x_t)$. It was never shown a variance. (Mind the vertical axis, which does not begin at 0.)
#
# ### 1.5 Respacing
#
# A network trained on 1000 steps is now run with 25. Three rules:
#
# - the guess $\hat x_0$ stays: it depends on $x_t$ and $t$, not on where the step goes;
# - the *fraction* $v$ stays. By the claim in 1.2 the place of the true variance does not depend on the step: exactly so on a plain scale, nearly so in logarithms, where the gap of the new step is small;
# - $\beta$, $\tilde\beta$ and the factors in the mean are those of the *new* steps.
#
# > **Spot the bug.** A public library skipped steps and recomputed $\beta$ of the longer step for its fixed variance. But its learned variance read the upper end from the *training* table, `betas[t]`. With 25 steps of 1000: what is the variance then?

# %%
t, s = 0.4, 0.36
upper, lower, _ = variances(t, s)
training_beta, _, _ = variances(t, t - 0.001)
claim("25 of 1000 steps: the table's β is more than 30 times too small", upper > 30 * training_beta)
claim("the 'upper' bound lies far below the lower one", training_beta < lower / 20)

# %% [markdown]
# The interval is upside down. For every $v$ above 0 the variance falls below $\tilde\beta$, and the samples are too narrow, like those of section 1.3 and worse.
#
# > **Spot another.** The same library once interpolated the variances where its networks had learned to interpolate their logarithms: $v\beta+(1-v)\tilde\beta$. *Which of the two is larger? When would you notice?*

# %%
gap = torch.tensor([gaps[1000][500], gaps[25][12], gaps[25][-1]])  # log(β/β̃) at t = ½, and in the last but one step
ratio = (gap / 2).cosh()  # (β + β̃)/2 over √(ββ̃): v = ½, near the worst case
claim("v = ½: the ratio of the two is cosh of half the gap, never below 1", ratio.min() >= 1)
claim("1000 steps, t = ½: they differ by less than one in 100,000", ratio[0] - 1 < 1e-5)
claim(
    "25 steps: 0.2 % there, and 25 % in the last but one step",
    abs(ratio[1] - 1.002) < 5e-4 and abs(ratio[2] - 1.25) < 0.01,
)

# %% [markdown]
# An arithmetic mean is never below a geometric one. With 1000 steps nobody sees the difference, and with 25 it changes most steps by a few per cent at most: a silent fault.
#
# Which rule is *better*? By 1.2 the true variance is the plain interpolation, with a $\kappa$ that does not depend on the step. A network learns its $v$ on short steps. Their gaps are small, and there $v$ and $\kappa$ are the same number, whichever rule it was trained with. So on *long* steps the plain rule ought to be the more exact one, although it is the fault! We check it on the bumps: the best $v$ for steps of 1/1000, used in a step of 1/25.

# %%
own = torch.Generator().manual_seed(4)
t = 0.12
xt = path.perturb(line.sample(5000, own), t, torch.randn(5000, 1, generator=own, dtype=double))
kappa = variance_of_x0(xt, t) / path.sigma(t) ** 2
small, large = gaps[1000][880], gaps[25][22]  # log(β/β̃) of the steps that begin at t
v = torch.log1p(kappa * small.expm1()) / small  # what there is to learn on the short step
true, plain, logs = 1 + kappa * large.expm1(), 1 + v * large.expm1(), (v * large).exp()  # Σ/β̃ of the long one
off = [(rule / true - 1).abs().mean() for rule in (plain, logs)]
claim("the plain rule misses the true variance of the long step by less than 1 % on average", off[0] < 0.01)
claim("the rule of the logarithms by more than 5 %", off[1] > 0.05)

# %% [markdown]
# So a fault may help, with an ideal $v$. Two things speak against relying on it. Right at the data even the training steps have large gaps, and there $v$ is not $\kappa$. And a network's $v$ may fall below 0, where the plain rule can give a negative variance.
#
# ### 1.6 On digits
#
# The checkpoint `mnist-improved` is `mnist-unet`, trained on with a second output and the hybrid loss on a chain of 1000 steps. Its chain is then cut to 10, 25, 50 and 100 steps, with each of the three variances. *Where do you expect the variance to matter more: in how digits look, or in how many bits they cost?*

# %%
improved = checkpoints.load("mnist-improved")
print(improved.card["what"])
print(improved.card["recipe"])
claim("on 1000 steps it needs 1.63 bits", round(improved.card["scores"]["bits per dimension"], 2) == 1.63)
table = tables.load("mnist-variances")
print(table["what"])
names = {"beta": "β", "posterior": "β̃", "learned": "learned"}


def measured(table, what, across, **chosen):
    """Of the rows that have what is chosen: `across`, in order (N,), and what was measured there (seeds, N)."""
    rows = [row for row in table["rows"] if all(row[key] == value for key, value in chosen.items())]
    rows.sort(key=lambda row: (row["seed"], row[across]))
    seeds = {row["seed"] for row in rows}
    values = torch.tensor([[row[across], row[what]] for row in rows]).reshape(len(seeds), -1, 2)
    return values[0, :, 0], values[..., 1]


# %%
made, axes = plots.panels(2, width=9.4, height=3.5)
found = {}
for ax, what in zip(axes, ("Fréchet distance", "bits per dimension"), strict=True):
    for kind in names:
        steps, found[kind, what] = measured(table, what, "steps", variance=kind)
    lines = {names[kind]: found[kind, what] for kind in names}
    plots.curves(steps, lines, "steps S", what, logx=True, ax=ax)
axes[0].axhline(table["Fréchet distance of real images"], color=style.NOISE, linewidth=1)
made

# %%
bits = {kind: found[kind, "bits per dimension"].mean(0) for kind in names}
fixed = torch.minimum(bits["beta"], bits["posterior"])
claim("bits: learned is below both fixed variances, for every number of steps", (bits["learned"] < fixed).all())
ten_steps = {kind: found[kind, "Fréchet distance"].mean(0)[0] for kind in names}
claim("10 steps: β has the largest Fréchet distance", max(ten_steps, key=ten_steps.get) == "beta")
claim("β costs more than half a bit more than the learned variance", (bits["beta"] - bits["learned"]).min() > 0.5)

# %% [markdown]
# Left: with 10 steps $\beta$ is behind, and from 25 steps on all three are at the floor, the grey line, up to chance. A learned variance and $\tilde\beta$ are near each other throughout. Where they differ most is in the last steps, and that is grain that is hardly seen.
#
# Right: bits per dimension are about just this grain. The learned variance is ahead of both others with any number of steps, and its lead over $\tilde\beta$ grows with them: more of the steps then lie near the data. $\beta$ costs more than half a bit, and more steps hardly help it. (One seed, 1,000 digits for the distance and 100 for the bits.) On all 1000 steps of its chain the network needs 1.63 bits; its card has the number.
#
# And the two rules of 1.5? On 50 digits with 10 steps this network's $v$ gives 2.185 bits by the logarithms and 2.202 by the plain rule; with 25 steps, 2.090 and 2.091. Near the data, where most of the bits are, even the training steps had large gaps, and there $v$ means what it was trained to mean.
#
# Is the table about this code? Ten test digits, one of each class, and their bound with 25 steps, for each of the three variances:

# %%
pictures, classes = data.images(data.load("mnist", "test"))
real = torch.stack([pictures[classes == digit][0] for digit in range(10)])
now = {kind: objectives.bits(improved, real, ten, path.times(25), kind) for kind in names}
claim("ten digits, 25 steps: learned needs fewer bits than β", now["learned"] < now["beta"])
claim("and fewer than β̃", now["learned"] < now["posterior"])

# %% [markdown]
# ## 2. DDIM
#
# ### 2.1 A family with equal marginals
#
# Look at what training uses. $L_{simple}$ draws $x_0$, $t$ and $\epsilon$, and jumps to $x_t = \alpha_tx_0+\sigma_t\epsilon$. It never walks. All that it knows of the forward process are the **marginals** $q(x_t\mid x_0)$, one at a time, and not how $x_t$ and $x_s$ belong together. So a trained network belongs to *every* process with these marginals, and we are free to choose one whose reverse is easier.
#
# **Which step from $t$ to $s$ keeps the marginals?** Let it be Gaussian, and let it know $x_0$. From $x_t$ and $x_0$ it knows the noise, $\epsilon = (x_t-\alpha_tx_0)/\sigma_t$. Keep a part of this old noise, and add a part of fresh noise $z$, with deviation $\varsigma$:
#
# $$x_s = \alpha_s\,x_0+\sqrt{\sigma_s^2-\varsigma^2}\;\frac{x_t-\alpha_tx_0}{\sigma_t}+\varsigma\,z.$$
#
# Given $x_0$, the fraction is standard normal, and independent of $z$. The mean is $\alpha_sx_0$. The variance is $(\sigma_s^2-\varsigma^2)+\varsigma^2 = \sigma_s^2$. So if $x_t$ has its marginal, $x_s$ has its own, *for every $\varsigma$ between 0 and $\sigma_s$*; and by induction all on the way down have. This is the slide's formula:
#
# $$q_\sigma(x_{t-1}\mid x_t, x_0) = \mathcal N\Bigl(\sqrt{\alpha_{t-1}}\,x_0+\sqrt{1-\alpha_{t-1}-\sigma_t^2}\cdot\frac{x_t-\sqrt{\alpha_t}\,x_0}{\sqrt{1-\alpha_t}},\ \sigma_t^2I\Bigr),$$
#
# with two letters to translate. Its $\sigma_t$ is the fresh noise, our $\varsigma$ (the third σ of the ledger). And **its $\alpha_t$ is the lecture's $\bar\alpha_t$**: the slide text has the letters of DDIM's paper.

# %%
XT, X0, EPS, Z, s_s, s_t, fresh = sympy.symbols("x_t x_0 epsilon z sigma_s sigma_t varsigma", positive=True)
step = a_s * X0 + sympy.sqrt(s_s**2 - fresh**2) * (XT - a_t * X0) / s_t + fresh * Z
after = sympy.expand(step.subs(XT, a_t * X0 + s_t * EPS))
claim("x_0 has the factor α_s", sympy.simplify(after.coeff(X0) - a_s) == 0)
claim(
    "the two noises have variance σ_s² together",
    sympy.simplify(after.coeff(EPS) ** 2 + after.coeff(Z) ** 2 - s_s**2) == 0,
)

# %% [markdown]
# DDIM's paper writes $\varsigma = \eta\sqrt{\tilde\beta}$ and turns the number $\eta$. We check the marginals by walking: 20,000 walks down from noise to the *same* $x_0 = 0.7$, in ten steps, with $\eta = 0$, ½ and 1.

# %%
number, x0 = 20_000, torch.full((20_000, 1), 0.7, dtype=double)
for share_of_noise in (0.0, 0.5, 1.0):
    x, off = normal(number, 1), []  # at t = 1 the marginal is N(0, 1) for every x_0
    for t, s in pairwise(path.times(10)[:-1].tolist()):
        x = samplers.ddim_step(path, x, x0, t, s, share_of_noise, normal(number, 1))
        off += [abs(x.mean() - path.alpha(s) * 0.7) / path.sigma(s), abs(x.std() / path.sigma(s) - 1)]
    claim(
        f"η = {share_of_noise:g}: at every time on the way the mean is α x_0 and the deviation σ, to 2.5 %",
        max(off) < 0.025,
    )

# %% [markdown]
# > **What if one reads the slide's $\alpha_t$ as DDPM's $1-\beta_t$?** On the linear chain, take $\eta = 1$: fresh noise of variance $\tilde\beta_t$. What stands under the root, and what is the factor of $x_0$ in front?

# %%
chain = DiscretePath(linear_betas(1000))
t = torch.arange(2, 1001)
root = chain.betas[t - 1] - chain.bridge(t - 1, t)[2]  # 1 − α_{t−1} − σ_t² with α = 1 − β
claim("the root is of a negative number, for more than half of all t", (root < 0).double().mean() > 0.5)
claim(
    "x_0 has a factor of at least 0.989 at all times, even at t = 1000, where it should be 0.006",
    (1 - chain.betas[1:]).sqrt().min() > 0.989 and chain.alpha(1000) < 0.007,
)

# %% [markdown]
# **Two members.** With $\eta = 1$ the step *is* DDPM's posterior, of mean $\tilde\mu$ and variance $\tilde\beta$. With $\eta = 0$ no fresh noise is drawn: $x_s$ is a function of $x_t$ and $x_0$.
#
# **Not a Markov chain.** Run the family forwards: how is $x_t$ distributed when $x_s$ is known? In a Markov chain $x_0$ tells nothing more then. Here, given $x_0$, all the noise in $x_s$ and all the noise in $x_t$ have the correlation $\rho = \sqrt{\sigma_s^2-\varsigma^2}/\sigma_s$, so
#
# $$\mathbb E[x_t\mid x_s, x_0] = \alpha_tx_0+\sigma_t\,\rho\,\frac{x_s-\alpha_sx_0}{\sigma_s}.$$
#
# Is there a $\varsigma$ for which $x_0$ drops out? It takes $\alpha_t = \sigma_t\,\rho\,\alpha_s/\sigma_s$. Solved for $\varsigma$ this is $\varsigma^2 = \tilde\beta$, and no other. **DDPM's chain is the one Markov process of this family.** The slide's words "modified to be non-Markovian" mean the others. Nobody ever runs them forwards; they only justify the way back.

# %%
beta_tilde = (s_t**2 - a_t**2 / a_s**2 * s_s**2) * s_s**2 / s_t**2
keep, pull = a_t * s_s**2 / (a_s * s_t**2), a_s * (s_t**2 - a_t**2 / a_s**2 * s_s**2) / s_t**2  # the posterior's
claim(
    "η = 1: x_t has the posterior's factor (both are positive, and their squares agree)",
    sympy.simplify((s_s**2 - beta_tilde) / s_t**2 - keep**2) == 0,
)
claim("and x_0 has the rest, α_s − keep α_t, in both", sympy.simplify(a_s - keep * a_t - pull) == 0)
rho2 = (s_s**2 - fresh**2) / s_s**2
no_x0 = sympy.Eq(rho2, (a_t * s_s / (a_s * s_t)) ** 2)  # α_t = σ_t ρ α_s / σ_s: the factor of x_0 is 0
(only,) = sympy.solve(no_x0, fresh)  # among positive ς
claim("x_0 drops out for ς² = β̃ only", sympy.simplify(only**2 - beta_tilde) == 0)
x0, xt, z = normal(50, 1), normal(50, 1), normal(50, 1)
ddim, ddpm = (
    samplers.ddim_step(path, xt, x0, 0.6, 0.3, 1.0, z),
    samplers.ddpm_step(path, xt, x0, 0.6, 0.3, variance="posterior", noise=z),
)
claim("in code: DDIM with η = 1 is the ancestral step with β̃, to 1e-12", (ddim - ddpm).abs().max() < 1e-12)

# %% [markdown]
# **Why the training stays the same.** The best guess under a squared error is $\mathbb E[x_0\mid x_t]$, at each $t$ on its own. It depends on the marginals $q(x_t\mid x_0)$ only, and all members have the same. The bound says so, too: for $\eta>0$, a term is the KL divergence of two Gaussians with *equal* variance $\eta^2\tilde\beta$, whose means differ by a factor times $x_0-\hat x_0$,
#
# $$L = \frac{\bigl(\alpha_s-\alpha_t\sqrt{\sigma_s^2-\eta^2\tilde\beta}/\sigma_t\bigr)^2}{2\eta^2\tilde\beta}\,\lVert x_0-\hat x_0\rVert^2.$$
#
# Only the weight depends on $\eta$. A network that is free at each $t$ has the same minimiser for every weight; and $L_{simple}$ drops the weights anyway. (For $\eta = 0$ the weight is infinite, so the bound itself says nothing there.)

# %%
guess = torch.randn(50, 1, generator=g, dtype=double)
for share_of_noise in (0.5, 1.0):
    mean, other = (samplers.ddim_step(path, xt, x, 0.6, 0.3, share_of_noise, torch.zeros_like(z)) for x in (x0, guess))
    std = share_of_noise * path.bridge(0.3, 0.6)[2].sqrt()
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, std), torch.distributions.Normal(other, std)
    )
    old = (path.sigma(0.3) ** 2 - std**2).sqrt()
    weight = (path.alpha(0.3) - path.alpha(0.6) * old / path.sigma(0.6)) ** 2 / (2 * std**2)
    off = (kl - weight * (x0 - guess) ** 2).abs().max()
    claim(f"η = {share_of_noise:g}: the KL is the weight times (x_0 − x̂_0)², to 1e-12", off < 1e-12)
by_course = losses.bound_term(lambda *_: guess, path, x0, xt, 0.3, 0.6, variance="posterior")
claim("η = 1: it is the bound's term of notebook 03", (kl[:, 0] - by_course).abs().max() < 1e-12)

# %% [markdown]
# ### 2.2 The sampler
#
# Sampling does not know $x_0$. The network's guess takes its place, as in DDPM:
#
# $$x_s = \alpha_s\hat x_0+\sqrt{\sigma_s^2-\eta^2\tilde\beta}\;\hat\epsilon+\eta\sqrt{\tilde\beta}\,z,\qquad\hat\epsilon = \frac{x_t-\alpha_t\hat x_0}{\sigma_t}.$$
#
# In words: *guess the clean image, guess the noise, and put them together again for an earlier time.* Nothing in it asks for $s = t-1$. Any descending list of times will do: this is the slide's "only a subset of the sequence".

# %%
show_source(samplers.ddim)

# %% [markdown]
# `keep`, `pull` and `std` are the factors of $x_t$, $\hat x_0$ and $z$ after $\hat\epsilon$ has been put in. With $\eta = 0$ the sample is a function of the first noise. *The same noise in 5, 10, 20 and 50 steps: four different rows of digits, or one?*

# %%
conditional = clipped(lambda xt, t: digit_model(xt, t, y=ten))
rows = {S: samplers.last(samplers.ddim(conditional, path, start, path.times(S))) for S in (5, 10, 20, 50)}
judge = checkpoints.load("mnist-classifier")
claim(
    "the classifier reads at least 38 of the 40 digits as what was asked for",
    sum((judge(x).argmax(1) == ten).sum() for x in rows.values()) >= 38,
)
apart = [(rows[S] - rows[50]).abs().mean() for S in (5, 10, 20)]
claim("the more steps, the nearer to the row of 50 steps", apart[0] > apart[1] > apart[2])
plots.rows(list(rows.values()), labels=[f"{S} steps" for S in rows])

# %% [markdown]
# One row of digits, drawn with more and more care. They agree in what is drawn and how, and differ in thickness and detail: the 7 gets its bar late. So they seem to tend to something as the steps get shorter. Section 2.3 says to what.
#
# > **Spot the bug.** A public library lets the user choose how times are spaced. For the step it computed the time it goes to as `prev = t - T // n`, for every spacing. Its issue tracker has this fault several times over. And its default spacing was "leading": with $T = 1000$ and $n = 5$ the network is asked at 801, 601, 401, 201 and 1. *Two faults, rows A and B below. What does each do to the digits, and why?*

# %%
T, n = 1000, 5
evenly = torch.linspace(T, 1, n).round().long().tolist()  # 1000, 750, …, 1: what the network is asked for
leading = [i * (T // n) + 1 for i in reversed(range(n))]  # 801, 601, …, 1
ways = {
    "right": [(t, s) for t, s in pairwise([*evenly, 0])],
    "A": [(t, max(t - T // n, 0)) for t in evenly],
    "B": list(pairwise([*leading, 0])),
}
spoiled = {}
for name, steps in ways.items():
    x = start
    with torch.no_grad():
        for t, s in steps:
            x = samplers.ddim_step(path, x, conditional(x, t / T), t / T, s / T)
    spoiled[name] = x
plots.rows(list(spoiled.values()), labels=list(spoiled))

# %%
brightness = {name: x.mean().item() for name, x in spoiled.items()}
claim(
    "real test digits have a mean pixel of −0.76, the right row comes within 0.03",
    abs(brightness["right"] - pictures.mean()) < 0.03,
)
claim("A is brighter than the right row by more than 0.03", brightness["A"] > brightness["right"] + 0.03)
claim("B by more than 0.08", brightness["B"] > brightness["right"] + 0.08)
rest = [(spoiled[name][real.max(0).values.expand(10, 1, 28, 28) == -1] + 1).mean() for name in ("right", "A")]
claim(
    "A: pixels that are black in all ten real digits have more than five times the grey of the right row",
    rest[1] > 5 * rest[0],
)

# %% [markdown]
# <details><summary>What is wrong</summary>
#
# **A** is the fixed stride. The times are 250 apart, and each step goes down by 200. So a state made for $t-200$ is read as one of $t-250$: it holds more noise than the network believes, and some of it is never taken out. The grain in the background tells.
#
# **B** starts at $t = 801$ with pure noise. There a state should still hold a third of the image: the network takes the missing trace of a mostly black image as real. Its digits come out too bright, with strokes that belong to nothing. The pure noise of the end, $t = T$, is never visited.
#
# `path.times(n)` visits both ends, and a sampler goes to the next time of its list. Then neither can happen.
#
# </details>
#
# ### 2.3 It is Euler's rule
#
# Divide the step with $\eta = 0$ by $\alpha_s$, and put in $\hat x_0 = (x_t-\sigma_t\hat\epsilon)/\alpha_t$:
#
# $$\frac{x_s}{\alpha_s} = \hat x_0+\frac{\sigma_s}{\alpha_s}\hat\epsilon = \frac{x_t}{\alpha_t}+\Bigl(\frac{\sigma_s}{\alpha_s}-\frac{\sigma_t}{\alpha_t}\Bigr)\hat\epsilon.$$
#
# This is Euler's rule for $\dfrac{d(x/\alpha)}{d(\sigma/\alpha)} = \hat\epsilon$, and that is the probability-flow ODE of notebook 05, section 5.5, in the variables in which it is simplest. So DDIM with $\eta = 0$ is a **first-order solver of the ODE**. (At $t = 1$ of our path $\alpha = 0$, and one may not divide by it. The step itself is in order there, too.) With more steps its samples tend to the ODE's, for the same noise: this is why the rows above agree.

# %%
xt, guess = normal(50, 1), normal(50, 1)
t, s = 0.6, 0.3
moved = samplers.ddim_step(path, xt, guess, t, s) / path.alpha(s)
eps_hat = (xt - path.alpha(t) * guess) / path.sigma(t)
euler = xt / path.alpha(t) + (path.sigma(s) / path.alpha(s) - path.sigma(t) / path.alpha(t)) * eps_hat
claim("a DDIM step is a step of Euler's rule in x/α over σ/α, to 1e-12", (moved - euler).abs().max() < 1e-12)

# %% [markdown]
# ### 2.4 DDIM is not exact
#
# A wrong conclusion is near: "all members of the family have the right marginals, so DDIM has them in any number of steps". The family has them with the *true* $x_0$. With the guess it does not, *not even if the guess is perfect*.
#
# **An example to follow by hand.** Data $\mathcal N(0,1)$: the ideal guess is $\hat x_0 = \alpha_tx_t$, and then $\hat\epsilon = \sigma_tx_t$. So
#
# $$x_s = \alpha_s\hat x_0+\sigma_s\hat\epsilon = (\alpha_s\alpha_t+\sigma_s\sigma_t)\,x_t = \cos\bigl(\tfrac\pi2(t-s)\bigr)\,x_t,$$
#
# on the cosine path. Every $x_t$ ought to be $\mathcal N(0,1)$, but each step shrinks it. With $S$ equal steps the deviation at the end is $\cos^S\frac\pi{2S}\approx1-\frac{\pi^2}{8S}$. **Why?** $\hat x_0$ and $\hat\epsilon$ are means, and a mean varies less than what it is the mean of: $\mathrm{Var}\,\hat x_0 = \alpha_t^2$ and $\mathrm{Var}\,\hat\epsilon = \sigma_t^2$, where both should be 1. In return they are not independent, as $x_0$ and $\epsilon$ are: both are multiples of $x_t$. For $s\to t$ the one makes up for the other, and so the ODE itself is exact. A finite step falls short by $1-\cos\frac\pi2(t-s)$, which is of *second* order in its length. $S$ such steps lose something like $1/S$: twice the steps halve the loss, as it must be with Euler's rule.

# %%
theta, phi = sympy.symbols("theta phi")
claim(
    "α_s α_t + σ_s σ_t is the cosine of the difference of the angles",
    sympy.simplify(sympy.cos(theta) * sympy.cos(phi) + sympy.sin(theta) * sympy.sin(phi) - sympy.cos(theta - phi)) == 0,
)
unit, one = toy.GaussianMixture(torch.zeros(1, 1, dtype=double), 1.0), torch.ones(1, 1, dtype=double)


def deviation(path, S):
    return samplers.last(samplers.ddim(unit.denoiser(path), path, one, path.times(S))).item()


claim("cosine path, 10 steps: cos(π/20)¹⁰ = 0.883", abs(deviation(path, 10) - math.cos(math.pi / 20) ** 10) < 1e-12)
claim("the lecture's linear chain, 10 of its 1000 steps: 0.829", abs(deviation(chain, 10) - 0.829) < 5e-4)
loss = [1 - deviation(path, S) for S in (20, 40, 80)]
claim("twice the steps, half the loss, to 3 %", all(abs(a / b / 2 - 1) < 0.03 for a, b in pairwise(loss)))

# %% [markdown]
# ### 2.5 There and back: inversion
#
# Euler's rule can also be run upwards, from data to noise. That gives an image a **code**, the noise it would be drawn from:
#
# $$x_t = \alpha_t\,\hat x_0(x_s, s)+\sigma_t\,\hat\epsilon(x_s, s),\qquad s<t.$$
#
# It is the inverse of a DDIM step only nearly: the way down asks the network at $t$, the way up at $s$. So decoding the code does not give the image back exactly. *How does the error depend on the number of steps?* Five real digits, with their labels, up and down again, in 20, 40 and 80 steps. (They start at $t = 0.02$ with the little noise that belongs there.)

# %%
five, t_min = torch.tensor([1, 4, 5, 7, 9]), 0.02
encoded = real[five]
bottom = path.perturb(encoded, t_min, torch.randn(encoded.shape, generator=torch.Generator().manual_seed(2)))


def labelled(xt, t):
    return digit_model(xt, t, y=five)


codes, decoded, errors = {}, {}, []
for S in (20, 40, 80):
    up = torch.linspace(t_min, 1, S + 1, dtype=double)
    codes[S] = samplers.last(samplers.ddim_inversion(labelled, path, bottom, up))
    decoded[S] = samplers.last(samplers.ddim(labelled, path, codes[S], up.flip(0)))
    errors.append((decoded[S] - bottom).abs().flatten(1).mean(1))

# %%
claim("80 steps: all five come back, their pixels to 0.02 on average", errors[-1].max() < 0.02)
halved = [a.median() / b.median() / 2 for a, b in pairwise(errors)]
claim("twice the steps, half the median error, to 25 %: first order", all(abs(h - 1) < 0.25 for h in halved))
claim("20 steps: one of them is off by more than 0.1", errors[0].max() > 0.1)
claim("the codes look like noise: their deviation is 1, to 5 %", abs(codes[80].std() - 1) < 0.05)
no_noise = samplers.last(samplers.ddim_inversion(labelled, path, encoded, torch.linspace(t_min, 1, 21, dtype=double)))
claim("clean digits, without that little noise: the codes have a deviation below 0.7", no_noise.std() < 0.7)
plots.rows([encoded, codes[80] / 3, decoded[20], decoded[80]], labels=["digit", "code", "20 steps", "80 steps"])

# %% [markdown]
# The codes show no digit (they are drawn at a third of their contrast), and yet all of it is in them. With 20 steps the 9 comes back as another 9: its way seems to run close to where ways part, and there a small error grows. So the error is of first order *once the steps are short enough*.
#
# A pitfall, in the last claim: a *clean* digit is not what the network expects at $t_{\min}$. It holds too little noise there, and the ODE draws none of its own: what it can stretch stays too little. Such a code still decodes. But who changes it, or mixes it with another, starts from noise that the model hardly knows.
#
# ### 2.6 Between two images
#
# Two codes can be mixed. Typical noise of $D = 784$ numbers has length about $\sqrt D = 28$, nearly always, for the squares of $D$ numbers add up to $D$ with a deviation of $\sqrt{2D}$. Halfway between two independent codes a *straight* line has length $28/\sqrt2$, too short for any noise. So one goes along an arc, **spherically**: with the angle $\phi$ between the codes,
#
# $$z(u) = \frac{\sin((1-u)\phi)}{\sin\phi}\,z_a+\frac{\sin(u\phi)}{\sin\phi}\,z_b.$$
#
# First an arc from a 7 to a 9. The label is the null label, both ways; without a label more ways part, and 90 steps are needed to come back to both.


# %%
def none(xt, t):
    return digit_model(xt, t, y=torch.full((len(xt),), 10))


up = torch.linspace(t_min, 1, 91, dtype=double)
z_a, z_b = samplers.last(samplers.ddim_inversion(none, path, bottom[[3, 4]], up))
phi = torch.acos((z_a * z_b).sum() / (z_a.norm() * z_b.norm()))
u = torch.linspace(0, 1, 6)[:, None, None, None]
arc = (torch.sin((1 - u) * phi) * z_a + torch.sin(u * phi) * z_b) / torch.sin(phi)
claim("on the arc all lengths are within 3 of 28", (arc.flatten(1).norm(dim=1) - 28).abs().max() < 3)
claim("half way along the straight line it is below 23", ((z_a + z_b) / 2).norm() < 23)
between = samplers.last(samplers.ddim(none, path, arc, up.flip(0)))
claim("both ends come back, to 0.02", (between[[0, -1]] - bottom[[3, 4]]).abs().mean() < 0.02)
plots.rows([between], labels=["7 → 9"])

# %% [markdown]
# The 7 bends a hook and closes it to a loop. Each picture between is a digit, and not two faint ones on top of each other, as mixed pixels would be. (Mostly: section 6.5 of notebook 05 has more.)
#
# Now half way between two *random* codes, 30 times, of which ten are shown: above the middles of straight lines, below those of arcs between the same codes. *What will too short a noise draw?*

# %%
one, other = torch.randn(2, 30, 1, 28, 28, generator=g)  # the angle between them is a right one, nearly
half_way = {"straight": (one + other) / 2, "arc": (one + other) / math.sqrt(2)}
down = torch.linspace(1, t_min, 13, dtype=double)
middles = {name: samplers.last(samplers.ddim(none, path, z, down)) for name, z in half_way.items()}
ink = {name: (x.mean() + 1) / 2 for name, x in middles.items()}
claim("straight lines: less ink than on arcs, by 10 % or more", ink["straight"] < 0.9 * ink["arc"])
plots.rows([x[:10] for x in middles.values()], labels=list(middles))

# %% [markdown]
# From too short a noise come thinner strokes and plainer digits. (Not that those from the arcs are all good: without a label, and in 12 steps, this network often draws such signs.) Each picture above may pass for a digit; all of them together are not distributed as digits are. Measured once, with 100 pairs: the straight lines draw 22 ones and 2 zeros, the arcs 13 and 8.
#
# ## 3. DPM-Solver
#
# ### 3.1 Solve what can be solved
#
# DDIM treats the ODE by Euler's rule. Can one do better with the same evaluations? Look at the ODE as notebook 05 wrote it, $\frac{dx}{dt} = f(t)\,x-\frac12g^2\,\nabla\log p_t(x)$. It has a *linear* part, known exactly and sometimes violent ($f$ is infinite at $t = 1$ of our path), and a part from the network, which changes gently. An **exponential integrator** solves the first exactly and approximates the second only.
#
# Take as the clock $\lambda = \log(\alpha/\sigma)$, **half the log-SNR**; it grows on the way from noise to data. By 2.3, $d(x/\alpha) = \hat\epsilon\,d(\sigma/\alpha)$, and $\sigma/\alpha = e^{-\lambda}$. So
#
# $$\frac{d}{d\lambda}\,\frac x\alpha = -e^{-\lambda}\,\hat\epsilon.$$
#
# That is the form for the guess of the noise. For the guess of the data note that $\frac x\sigma = e^\lambda\frac x\alpha$, and use the product rule:
#
# $$\frac{d}{d\lambda}\,\frac x\sigma = e^\lambda\frac x\alpha-e^\lambda e^{-\lambda}\hat\epsilon = \frac{x-\sigma\hat\epsilon}{\sigma} = e^\lambda\,\hat x_0.$$
#
# On the right sides $x$ is gone, except inside the network. The name for this is *variation of constants*. Integrate over a step from $t$ to $s$:
#
# $$\frac{x_s}{\sigma_s} = \frac{x_t}{\sigma_t}+\int_{\lambda_t}^{\lambda_s}e^\lambda\,\hat x_0\;d\lambda,\qquad\qquad \frac{x_s}{\alpha_s} = \frac{x_t}{\alpha_t}-\int_{\lambda_t}^{\lambda_s}e^{-\lambda}\,\hat\epsilon\;d\lambda.$$
#
# *Both are exact.* We check them on solutions of the ODE that come from a solver that knows nothing of $\lambda$, and integrate by Simpson's rule.

# %%
velocity = read_as("velocity", d, path)
t, s = 0.8, 0.3
ends = path.logsnr(torch.tensor([t, s], dtype=double)) / 2
clock = torch.linspace(*ends.tolist(), 201, dtype=double)  # λ at equal distances, for Simpson's rule
way = torch.cat([torch.tensor([t], dtype=double), path.time_at(2 * clock[1:-1]), torch.tensor([s], dtype=double)])
x = odeint(lambda t, x: velocity(x, t), normal(30, 1), way, rtol=1e-10, atol=1e-10)
guesses = torch.stack([d(x_, t_) for x_, t_ in zip(x, way.tolist(), strict=True)])
noises = torch.stack([read_as("eps", d, path)(x_, t_) for x_, t_ in zip(x, way.tolist(), strict=True)])
simpson = torch.ones(201, dtype=double)
simpson[1:-1:2], simpson[2:-1:2] = 4, 2
simpson = (simpson * (clock[1] - clock[0]) / 3)[:, None, None]
by_data = x[0] / path.sigma(t) + (simpson * clock.exp()[:, None, None] * guesses).sum(0)
by_noise = x[0] / path.alpha(t) - (simpson * (-clock).exp()[:, None, None] * noises).sum(0)
claim("x_s/σ_s is x_t/σ_t plus the integral of e^λ x̂_0, to 1e-6", (by_data - x[-1] / path.sigma(s)).abs().max() < 1e-6)
claim("x_s/α_s is x_t/α_t minus the integral of e^−λ ε̂, to 1e-6", (by_noise - x[-1] / path.alpha(s)).abs().max() < 1e-6)

# %% [markdown]
# ### 3.2 First order: DDIM again, from both sides
#
# Now approximate the network's answer within a step. The simplest way: keep it constant. With $h = \lambda_s-\lambda_t$ the integrals are $e^{\lambda_s}-e^{\lambda_t}$ and $e^{-\lambda_t}-e^{-\lambda_s}$, so
#
# $$x_s = \frac{\sigma_s}{\sigma_t}x_t-\alpha_s(e^{-h}-1)\,\hat x_0,\qquad\qquad x_s = \frac{\alpha_s}{\alpha_t}x_t-\sigma_s(e^h-1)\,\hat\epsilon.$$
#
# One formula holds $\hat x_0$ constant, the other $\hat\epsilon$; on the true way neither is constant. **Both are DDIM.** One evaluation at $t$ gives $\hat x_0$ and $\hat\epsilon$, each from the other, and the two steps agree.
#
# Only from second order on there are two different solvers, DPM-Solver for $\hat\epsilon$ and DPM-Solver++ for $\hat x_0$. Guidance can push either of them too far. But images have a known range to which $\hat x_0$ can be clipped, and noise has none. We use $\hat x_0$.

# %%
lam_s, lam_t, h, A, D1 = sympy.symbols("lambda_s lambda_t h A D1", real=True)
hop = {a_s: s_s * sympy.exp(lam_s), a_t: s_t * sympy.exp(lam_t)}  # α = σ e^λ
EH = sympy.exp(lam_s - lam_t)
by_data = s_s / s_t * XT - a_s * (1 / EH - 1) * X0
by_noise = a_s / a_t * XT - s_s * (EH - 1) * (XT - a_t * X0) / s_t
ddim = a_s * X0 + s_s * (XT - a_t * X0) / s_t
claim("x̂_0 held constant is DDIM", sympy.simplify((by_data - ddim).subs(hop)) == 0)
claim("ε̂ held constant is DDIM", sympy.simplify((by_noise - ddim).subs(hop)) == 0)

# %% [markdown]
# ### 3.3 Second order
#
# Let the guess change along a line in $\lambda$: $\hat x_0 = A+D_1\,(\lambda-\lambda_t)$, with the guess $A$ at $t$ and a slope $D_1$. DPM-Solver++ does not even integrate the line exactly. It takes the guess *in the middle of the step*, $D = A+D_1\frac h2$, as if it were constant. What does that cost? With $u = \lambda-\lambda_t$, and up to the common factor $e^{\lambda_t}$:
#
# $$\int_0^he^u(A+D_1u)\,du-(e^h-1)\Bigl(A+D_1\frac h2\Bigr) = D_1\,\frac{h^3}{12}+O(h^4).$$
#
# So a step errs by $O(h^3)$. The curvature of $\hat x_0$, which the line leaves out, costs as much. All steps together err by $O(h^2)$: second order.
#
# There are two ways to find the guess in the middle:
#
# - **Multistep, 2M.** Draw the line through this guess and the *last* one, and extend it by half a step. With $h_{last}$ the length of the last step and $r = h_{last}/h$: $D = \hat x_0+\frac h2\cdot\frac{\hat x_0-\hat x_0^{last}}{h_{last}} = \bigl(1+\frac1{2r}\bigr)\hat x_0-\frac1{2r}\hat x_0^{last}$. It costs one evaluation a step. The first step has no past and is DDIM's; a single error of $O(h^2)$ does not spoil the order.
# - **Singlestep, 2S.** Go half a step, in $\lambda$, by DDIM, ask there, and take that answer. Two evaluations a step, and no memory.
#
# In both the last step, to $t = 0$, is DDIM's, for there $h = \infty$. So is a first step from $\alpha = 0$.

# %%
U = sympy.symbols("u", real=True)
exact = sympy.integrate(sympy.exp(U) * (A + D1 * U), (U, 0, h))
gap = sympy.series(exact - (sympy.exp(h) - 1) * (A + D1 * h / 2), h, 0, 4).removeO()
claim("the middle of the line costs D_1 h³/12", sympy.simplify(gap - D1 * h**3 / 12) == 0)
H_LAST, LAST = sympy.symbols("h_last x_last", real=True)
extended, r = X0 + h / 2 * (X0 - LAST) / H_LAST, H_LAST / h
claim("2M: the line, extended by half a step", sympy.simplify((1 + 1 / (2 * r)) * X0 - LAST / (2 * r) - extended) == 0)

# %%
show_source(samplers.dpm_solver_pp_2m)

# %% [markdown]
# The whole solver is DDIM with one more term. The factors come from a table, worked out once in float64.
#
# ### 3.4 Orders, measured
#
# A claim of order is easy to test where the answer is known: halve the length of the steps, and once they are short the error must fall by $2^p$. On the three bumps, in float64, from $\lambda = -2.5$ to $\lambda = 3$ with equal steps in $\lambda$; the reference is 2M with 4,000 steps. *Guess the four slopes. And then: which line lies lowest at equal evaluations?*


# %%
def even(S, weights=None):
    """S steps from λ = −2.5 to 3, equal in λ, or in proportion to the weights."""
    w = (
        torch.ones(S, dtype=double)
        if weights is None
        else torch.tensor(weights, dtype=double).repeat(S // len(weights))
    )
    part = torch.cat([torch.zeros(1, dtype=double), w.cumsum(0) / w.sum()])
    return path.time_at(2 * (-2.5 + 5.5 * part))


seeds = torch.linspace(-2, 2, 41, dtype=double)[:, None]
reference = samplers.last(samplers.dpm_solver_pp_2m(d, path, seeds, even(4000)))
# %%
solvers = {
    "DDIM": (samplers.ddim, 1, 1),  # evaluations a step, order
    "Heun": (samplers.heun, 2, 2),
    "2M": (samplers.dpm_solver_pp_2m, 1, 2),
    "2S": (samplers.dpm_solver_pp_2s, 2, 2),
}
tried = [20, 40, 80, 160]
errors, asked = {}, {}
for name, (solver, each, _) in solvers.items():
    runs = [samplers.last(solver(d, path, seeds, even(S))) for S in tried]
    errors[name] = torch.stack([(x - reference).abs().mean() for x in runs])
    asked[name] = each * torch.tensor(tried)

# %%
for name, (_, _, order) in solvers.items():
    slopes = (errors[name][1:-1] / errors[name][2:]).log2()
    claim(f"{name}: order {order}, over two halvings, to 0.15", (slopes - order).abs().max() < 0.15)
claim("80 evaluations: 2M errs less than 2S, 2S less than Heun", errors["2M"][2] < errors["2S"][1] < errors["Heun"][1])
figure = plots.curves(asked, errors, "evaluations", "mean error of the end", logx=True, logy=True)
figure.axes[0].set_xticks([20, 40, 80, 160, 320], ["20", "40", "80", "160", "320"])
figure.axes[0].set_xticks([], minor=True)
figure

# %% [markdown]
# DDIM's line falls with slope 1, the other three with slope 2. At equal evaluations 2M lies lowest. At equal *steps* 2S is a little better (compare its point at 40 evaluations with that of 2M at 20), but it asks twice.
#
# Order is a statement about short steps. How far to the left of such a figure it still tells anything is for an experiment to say (section 5).
#
# ### 3.5 What a test of order does not see
#
# > **Spot the bug.** In a long public discussion of a 2M sampler people swap $h$ and $h_{last}$ and compare pictures. Suppose somebody has $r = h/h_{last}$, upside down, and somebody else leaves $r$ out, as if it were 1. *You test the order of both. What do you see? And on a grid whose steps are not equal?*


# %%
def two_m(x, times, one_over_2r):
    """2M by hand, so that it can be broken: one_over_2r(h, h_last) is what stands for 1/(2r)."""
    last, h_last = None, None
    for t, s in pairwise(times.tolist()):
        x0, h = d(x, t), (path.logsnr(s) - path.logsnr(t)).item() / 2
        k = 0.0 if last is None else one_over_2r(h, h_last)
        x = samplers.ddim_step(path, x, (1 + k) * x0 - k * last if k else x0, t, s)
        last, h_last = x0, h
    return x


variants = {
    "right": lambda h, h_last: h / h_last / 2,
    "inverted": lambda h, h_last: h_last / h / 2,
    "no r": lambda h, h_last: 0.5,
}


# %%
def order_of(variant, weights):
    error = [(two_m(seeds, even(S, weights), variants[variant]) - reference).abs().mean() for S in (40, 80, 160)]
    return [math.log2(a / b) for a, b in pairwise(error)]


for variant in variants:
    claim(f"{variant}: order 2 on equal steps", all(abs(p - 2) < 0.15 for p in order_of(variant, [1])))
claim("steps of 1 and 3 in turn: the right one has order 2", all(abs(p - 2) < 0.15 for p in order_of("right", [1, 3])))
claim("the inverted one has order 2 as well", all(abs(p - 2) < 0.15 for p in order_of("inverted", [1, 3])))
claim("without r the order falls to 1", all(abs(p - 1) < 0.15 for p in order_of("no r", [1, 3])))

# %% [markdown]
# *The inverted formula passes.* On equal steps $r = 1$, and all three are the same. On steps of 1 and 3 in turn, the inverted one is too bold in one step and too timid in the next, and to leading order the two slips cancel.
#
# **Why.** In a step it puts $\frac{h_{last}}{2h}$ where $\frac h{2h_{last}}$ belongs, so the line is extended by $\frac{h_{last}^2}{2h}$ instead of $\frac h2$. Times the step's length $h$, the error is $\frac12(h_{last}^2-h^2)$ times the slope. Summed over steps this telescopes: what is left are the two ends, and the changes of the slope, which are small.
#
# So test the *step* itself, not the way's end. **If $\hat x_0$ changes along a line in $\lambda$, the extended guess is exact:** $D = \hat x_0(\lambda_{mid})$ with $\lambda_{mid} = \frac12(\lambda_t+\lambda_s)$, on any grid. That is one line of algebra, and where $h_{last}\ne h$ no formula with a wrong $r$ obeys it.

# %%
t_before, t, s = 0.7, 0.45, 0.4  # an irregular grid: h_last is far longer than h


def affine(lam):
    return 0.3 - 0.2 * lam


lam = {time: path.logsnr(time).item() / 2 for time in (t_before, t, s)}
middle = affine((lam[t] + lam[s]) / 2)
xt = torch.zeros(1, 1, dtype=double)
now, last = (torch.full((1, 1), affine(lam[time]), dtype=double) for time in (t, t_before))
moved = samplers.dpm_solver_pp_2m_step(path, xt, now, t, s, x0_before=last, t_before=t_before)
used = moved / samplers.ddim_step(path, xt, torch.ones_like(xt), t, s)  # x_t = 0: what stood in the place of x̂_0
claim("the course's step extends the line to the middle, to 1e-12", (used - middle).abs().max() < 1e-12)

# %%
h, h_last = lam[s] - lam[t], lam[t] - lam[t_before]
for variant, one_over_2r in variants.items():
    k = one_over_2r(h, h_last)
    off = abs(((1 + k) * now - k * last).item() - middle)
    if variant == "right":
        claim("the right r: exact", off < 1e-12)
    else:
        claim(f"{variant}: off by more than 10 % of the change over the step", off > 0.1 * 0.2 * h)

# %% [markdown]
# > **Spot another.** A public Heun sampler computed the slope at the *end* of the trial step as $(x_s-\hat x_0)/\sigma$ with the $\sigma$ of the *start*. Its networks predicted noise, and all was well. Then came networks that predict $v$, and pictures were noisy. *Why did noise prediction hide it? Would a test of order have caught it?*


# %%
def heun_by_hand(x, times, fault):
    for t, s in pairwise(times.tolist()):
        start_, end = path.sigma(t) / path.alpha(t), path.sigma(s) / path.alpha(s)
        slope = (x / path.alpha(t) - d(x, t)) / start_
        trial = x / path.alpha(t) + (end - start_) * slope
        second = (trial - d(path.alpha(s) * trial, s)) / (start_ if fault else end)
        x = path.alpha(s) * (x / path.alpha(t) + (end - start_) * (slope + second) / 2)
    return x


for fault, order in ((False, 2), (True, 1)):
    error = [(heun_by_hand(seeds, even(S), fault) - reference).abs().mean() for S in (40, 80, 160)]
    slopes = [math.log2(a / b) for a, b in pairwise(error)]
    claim(f"{'with the fault' if fault else 'right'}: order {order}", all(abs(p - order) < 0.15 for p in slopes))

# %% [markdown]
# It would: the order falls to 1. And with noise prediction that line was the identity in disguise. In its variables, our $x/\alpha$ and $\sigma/\alpha$, the code first made $\hat x_0 = x-\sigma\hat\epsilon$ with the wrong $\sigma$, and then divided $x-\hat x_0$ by the *same* wrong $\sigma$: what came out was $\hat\epsilon$, untouched. So test a sampler with more than one kind of prediction; a denoiser that *is* $\hat x_0$, as here, leaves nowhere to hide.
#
# ### 3.6 Where to put the steps
#
# The error of a step depends on its length in $\lambda$. Equal steps in $t$ are not equal in $\lambda$: near the ends of the path $\lambda$ runs off to $\pm\infty$. `samplers.logsnr_times` makes equal steps in $\lambda$ between two times and one step to 0. *Ten steps on either grid: where do they spend their evaluations?*

# %%
by_time, by_lambda = path.times(10), samplers.logsnr_times(path, 10, start=0.99, end=0.02)
made, (left, right) = plots.panels(2, width=9.4, height=2.6)
for ax, label, what in ((left, "t", lambda t: t), (right, "λ", lambda t: path.logsnr(t) / 2)):
    for height, times in enumerate((by_lambda, by_time)):
        at = what(times)
        at = at[at.isfinite()]  # λ is infinite at t = 0, and at t = 1
        ax.plot(at, torch.full_like(at, height), "o", color=(style.MODEL, style.DATA)[height])
    ax.set(xlabel=label, yticks=[0, 1], yticklabels=["equal in λ", "equal in t"], ylim=(-0.6, 1.6))
made

# %%
inner = [(path.logsnr(t[1:-1]) / 2).diff() for t in (by_time, by_lambda)]  # without the first step and the last
claim("equal in λ: the inner steps have one length, to 1e-9", inner[1].max() - inner[1].min() < 1e-9)
claim("equal in t: the longest of them is more than twice the shortest", inner[0].max() > 2 * inner[0].min())
near_data = [((0 < t) & (t < 0.15)).sum().item() for t in (by_time, by_lambda)]
claim("between 0 and 0.15 lies 1 of the times equal in t, and 3 of those equal in λ", near_data == [1, 3])

# %%
z = torch.special.ndtri((torch.arange(400, dtype=double) + 0.5) / 400)[:, None]  # normal noise, evenly spread
answer = samplers.last(samplers.dpm_solver_pp_2m(d, path, z, path.times(1000)))
off = {}
for S in (5, 20):
    for clock, times in (("t", path.times(S)), ("λ", samplers.logsnr_times(path, S, start=0.99, end=0.02))):
        off[S, clock] = (samplers.last(samplers.dpm_solver_pp_2m(d, path, z, times)) - answer).abs().mean()
claim("2M on the bumps, 20 steps: equal in λ errs less than half as much", off[20, "λ"] < off[20, "t"] / 2)
claim("with 5 steps it is equal in t that errs less than half as much", off[5, "t"] < off[5, "λ"] / 2)

# %% [markdown]
# Equal steps in $\lambda$ ask many questions near the data and near pure noise, few in between. On the right the ends at $t = 0$ and $t = 1$ are missing, for there $\lambda$ is infinite. On the exact bumps this suits 2M when there are many steps. When there are few, each is long in $\lambda$, also in the middle, where the bumps merge and part. (With 10 steps the two grids are even. Measured once: DDIM does better with equal $t$ in all three cases.) For a network on images it depends: near the data there is little left to decide, and evaluations there may be better spent. Section 5 has both grids.
#
# ## 4. All steps at once
#
# ### 4.1 A fixed point
#
# The slide says: *"The diffusion model cannot be parallelized due to its Markovian nature."* It seems obvious. Call the states on the way $X_0$, which is the noise, $X_1$, and so on to $X_S$, the sample. ($X_i$ is the state at $t_i$. So in this section $t_0 = 1$ and $t_S = 0$, in the order of the steps.) $X_{i+1}$ needs $X_i$, which needs $X_{i-1}$, and a thousand evaluations must wait for each other. But is it *impossible*?
#
# Write down what is wanted, with the factors of DDIM's step from section 2.2. A way is right if every step fits:
#
# $$X_{i+1} = \text{keep}_i\;X_i+\text{pull}_i\;\hat x_0(X_i, t_i)+\text{std}_i\;z_i\qquad\text{for all }i.$$
#
# These are $S$ equations for $S$ unknown states: a **fixed-point problem** for the way as a whole. Guess a way, ask the network at *all* its states at once, and walk the way anew with these answers. Repeat:
#
# $$X^{(k+1)}_{i+1} = \text{keep}_i\;X^{(k+1)}_i+\text{pull}_i\;\hat x_0\bigl(X^{(k)}_i, t_i\bigr)+\text{std}_i\;z_i.$$
#
# This is **Picard iteration**, known from the proof that ODEs have solutions; for diffusion models it was proposed under the name ParaDiGMS. (There the whole step is taken from the old way. Here only the network's answer is old, and the linear part is walked anew, in the spirit of 3.1.) All evaluations of a *round* are independent of each other: one batch.
#
# **It always ends.** $X_0$ is known, so after one round $X_1$ is exact, after two rounds $X_2$, and so on: after $S$ rounds at the latest all is exact. In the worst case nothing is gained. How is it in practice?
#
# **And the noise?** With $\eta = 1$ this is DDPM's Markov chain, with fresh noise in each step. Draw all $z_i$ *beforehand*. Then the chain is a function of numbers that are known, and the same argument holds. To be Markov is no obstacle.

# %%
show_source(samplers.parallel._rounds)

# %% [markdown]
# Mind the window in the code: with little memory, only the next $W$ steps are iterated, and the window moves on over states that do not change any more.
#
# We look at the whole way, on the three bumps with 50 steps, where every round is cheap. The picture shows how far each state is from the sequential one, by round. *What shape do you expect? Where is it exact from the start?*


# %%
def rounds_of(x, times, eta, fresh, rounds):
    """Picard's whole way after each round: by hand, as the kernel shows its last state only."""
    keep, pull, std = samplers.ode.ddim_coefficients(path, times[:-1], times[1:], eta)
    way, times = [x] * len(times), times.tolist()
    for _ in range(rounds):
        guesses = [d(x, t) for x, t in zip(way[:-1], times[:-1], strict=True)]  # independent of each other: one batch
        new = [x]
        for i, x0 in enumerate(guesses):
            new.append(keep[i] * new[i] + pull[i] * x0 + std[i] * fresh[i])
        way = new
        yield torch.stack(way)


S, x, fresh = 50, normal(200, 1), normal(50, 200, 1)
times = path.times(S)
far, needed = {}, {}
for name, eta in {"η = 0": 0.0, "η = 1": 1.0}.items():
    *_, exact = rounds_of(x, times, eta, fresh, S)  # S rounds are exact
    far[name] = torch.stack([(way - exact).abs().mean((1, 2)) for way in rounds_of(x, times, eta, fresh, 30)])
    needed[name] = int((far[name][:, -1] > 1e-3).sum()) + 1

# %%
one_by_one = samplers.last(samplers.ddim(d, path, x, times))
*_, exact = rounds_of(x, times, 0.0, fresh, S)
claim("S rounds give the sequential sampler's end, to 1e-12", (exact[-1] - one_by_one).abs().max() < 1e-12)
promised = max(far[name][k, : k + 2].max() for name in far for k in range(30))
claim("after k rounds the first k states after the noise are exact, to 1e-12", promised < 1e-12)
claim("η = 0: 13 rounds or fewer to an error of 0.001, for 50 steps", needed["η = 0"] <= 13)
claim("η = 1: 18 rounds or fewer", needed["η = 1"] <= 18)

# %%
made, axes = plots.panels(2, width=9.4, height=3.4)
look = {
    "origin": "lower",
    "aspect": "auto",
    "cmap": style.DENSITY,
    "vmin": -8,
    "vmax": 0,
    "extent": (-0.5, S + 0.5, 0.5, 30.5),
}
for ax, (name, error) in zip(axes, far.items(), strict=True):
    shown = ax.imshow(error.clamp(1e-8).log10(), **look)
    ax.plot([0, 30], [0.5, 30.5], "--", color=style.EXACT, linewidth=1)
    ax.set(xlabel="state, from noise to data", ylabel="round", title=name)
    ax.grid(False)
made.colorbar(shown, ax=axes, label="log₁₀ of the error")
made

# %% [markdown]
# Dark is wrong; where it is white the error is below $10^{-8}$. On the dashed line the $k$-th state has had its $k$ rounds: what lies above and to the left of it must be exact, that much was promised. But much more of the picture is white. With $\eta = 0$ the whole way is right to a thousandth after a dozen rounds, where the sequential sampler needs 50 evaluations one after the other. With noise it takes one and a half times as many. Slower, but not impossible.
#
# ### 4.2 On digits
#
# Two digits, 40 steps, with `samplers.picard`, until no state moves by more than 0.001 (root mean square over its pixels). We count rounds, and the evaluations of all rounds together. *How many of each do you expect, without fresh noise and with it?*

# %%
two, asked = torch.tensor([3, 8]), []


def counted(xt, t):
    asked.append(len(xt) // 2)
    return digit_model(xt, t, y=two.repeat(len(xt) // 2))


# %%
S, pair, films = 40, torch.randn(2, 1, 28, 28, generator=g), {}
for eta in (0.0, 1.0):
    asked.clear()
    noise = torch.Generator().manual_seed(3)
    films[eta] = list(samplers.picard(clipped(counted), path, pair, path.times(S), tol=1e-3, eta=eta, generator=noise))
    rounds, evaluations = len(asked), sum(asked)
    asked.clear()
    noise = torch.Generator().manual_seed(3)
    one_by_one = samplers.last(samplers.ddim(clipped(counted), path, pair, path.times(S), eta=eta, generator=noise))
    off = (films[eta][-1] - one_by_one).square().mean().sqrt()
    claim(f"η = {eta:g}: the same digits as one by one, to 0.02", off < 0.02)
    claim(f"  fewer than 30 rounds, where {len(asked)} evaluations had to wait for each other", rounds < 30)
    claim("  but more than 5 times as many evaluations in all", evaluations > 5 * sum(asked))


# %%
def after(round):
    shown = torch.cat([films[eta][min(round, len(films[eta])) - 1] for eta in (0.0, 1.0)])
    return plots.grid(shown, labels=["η = 0", "η = 0", "η = 1", "η = 1"], scale=2)


widgets.explore(after, round=([1, 2, 4, 6, 8, 10, 13, 16, 20, 25], 8))

# %% [markdown]
# *Move the round.* What is shown is the last state of the way. It is noise for some rounds, then a digit in pieces, and then it hardly changes any more: after about 10 rounds without fresh noise, after about 16 with it.
#
# So what the slide calls impossible is possible, and what it costs is clear: **fewer rounds, more evaluations.** A processor that asks its network for fifty states in the time of one gains. Two cores gain nothing: for them fifty states in one batch take nearly as long as one by one, and as there are several times as many evaluations, seconds go *up*. And the rival is not DDIM with 40 steps one by one, but a better solver with 10.
#
# ## 5. What to use when
#
# ### 5.1 Measured
#
# All samplers on one network, `mnist-unet`, on its own path. The steps are equal in $t$, and for 2M on a second line equal in $\lambda$ from $t = 0.99$ to $0.02$. Heun and 2S have about half as many steps for the same number of evaluations. Each point is the Fréchet distance of 1,000 digits, the mean over two seeds. The grey line is the floor: real digits against real digits.
#
# *Before you look: who is in front with 4 evaluations? Does a sampler of order 2 always beat one of order 1? And do more evaluations always help?*

# %%
table = tables.load("mnist-fast")
print(table["what"])
print(table["recipe"])
flat = {"rows": [row | row["sampler"] for row in table["rows"]]}
kinds = {
    (row["name"], row["grid"]): row["name"] + (", log-SNR" if row["grid"] != "time" else "") for row in flat["rows"]
}
found = {
    label: measured(flat, "Fréchet distance", "evaluations", name=name, grid=grid)
    for (name, grid), label in kinds.items()
}
mean = {
    label: dict(zip(n.int().tolist(), values.mean(0).tolist(), strict=True)) for label, (n, values) in found.items()
}

# %%
made, (ax,) = plots.panels(1, width=8.0, height=4.8)
asked, lines = {label: n for label, (n, _) in found.items()}, {label: v.mean(0) for label, (_, v) in found.items()}
plots.curves(asked, lines, "evaluations", "Fréchet distance", logx=True, logy=True, ax=ax)
floor = table["Fréchet distance of real images"]
ax.axhline(floor, color=style.NOISE, linewidth=1)
ax.set_ylim(0.06, 0.8)
for ticks, set_ticks in (([2, 4, 6, 10, 20, 50, 100], ax.set_xticks), ([0.07, 0.1, 0.2, 0.4, 0.8], ax.set_yticks)):
    set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    set_ticks([], minor=True)
made

# %%
ode = ["DDIM", "Heun", "DPM-Solver++(2S)", "DPM-Solver++(2M)"]
claim("2 evaluations: the four without fresh noise are one and the same sampler", len({mean[n][2] for n in ode}) == 1)
first = min(mean, key=lambda name: mean[name][4])
claim("4 evaluations: 2M with steps equal in t is first", first == "DPM-Solver++(2M)")
claim("and ancestral sampling with β last", max(mean, key=lambda name: mean[name][4]) == "DDPM, β")
best = min(values[10] for values in mean.values())
claim("the best with 10 evaluations is within 10 % of DDIM with 100, or below it", best < 1.1 * mean["DDIM"][100])
late = [mean[name][n] for name in ode for n in (10, 20)]
claim("with 10 and 20 all four without fresh noise are within 15 % of it", max(late) < 1.15 * mean["DDIM"][100])
claim("DDIM with 10 evaluations is below DDIM with 100", mean["DDIM"][10] < mean["DDIM"][100])
claim(
    "and so are both kinds of ancestral sampling with 50",
    max(mean[f"DDPM, {v}"][50] for v in "β β̃".split()) < mean["DDIM"][100],
)

# %% [markdown]
# With 2 evaluations all four ways without fresh noise are DDIM: a first and a last step, and nothing between. With 4 they part, and 2M is in front; ancestral sampling with $\beta$ is far behind. With 10 all four are as good as 100 steps of DDIM.
#
# *More evaluations do not always help.* DDIM is at its best with about 10 and then gets slightly worse. With many steps every solver draws the digits of *this network's ODE*, and these are not quite those of the data. 2M is there with 10 or 20 evaluations, DDIM with 50. Ancestral sampling starts far behind and ends below the others, near the floor. A likely reason: the network errs, its errors add up along a deterministic way, and fresh noise forgets old errors (notebook 05, section 6.4). Of the two kinds $\tilde\beta$ needs fewer steps, as section 1 leads one to expect.
#
# Equal steps in $\lambda$ are worse here than equal steps in $t$, with few evaluations by far: with 2 the distance is 2.7, above the frame. They put most of their steps near both ends, where there is hardly any noise, or hardly any signal.
#
# *Where is the second order of section 3?* The Fréchet distance does not ask for it. It compares distributions, and a digit that is not exactly the one of the ODE may be as good a digit. To see the order at work, measure how far the digits are from the ODE's: the same noise, and 60 steps of 2M as the answer.

# %%
answer = samplers.last(samplers.dpm_solver_pp_2m(conditional, path, start, path.times(60)))
off = {}
for name in ("DDIM", "DPM-Solver++(2M)", "Heun"):
    setting = {"name": name, "grid": "time", "evaluations": 10}
    off[name] = (measures.draw(setting, conditional, path, start, None) - answer).abs().mean()
claim(
    "10 evaluations: 2M is nearer to the ODE's digits than DDIM, by more than 10 %",
    off["DPM-Solver++(2M)"] < 0.9 * off["DDIM"],
)
claim("Heun is not: it is farther away", off["Heun"] > off["DDIM"])

# %% [markdown]
# With 10 evaluations Heun takes six steps where the others take ten, and so long a step does not yet keep what its order promises. (Measured once: with 20 evaluations Heun and 2S are nearer than DDIM, and 2M nearest.) 2M pays nothing for its order, so it is the one to try first.
#
# Two limits of this figure. It is about small images with a label, where little is left to decide. Larger images and strong guidance need more: the paper of DPM-Solver++ speaks of 15 to 20 steps. And seeds: with 1,000 digits the score itself may move by 0.01 or 0.02 from one seed to the next, with very few steps by more.
#
# *And the arithmetic beside the network?* Measured once with a network that answers at once, on 16 digits and one thread: a step of DDIM takes 11 µs here, and 84 µs in the library diffusers in the same run; a step of 2M, 14 and 124 µs. The table of factors is why. It costs 0.3 to 0.7 ms once in a run, where diffusers sets up in less than half of that. All of this is little beside the network, which takes some 25 ms for the 16 digits. `make bench` measures it anew.
#
# Is the table about this code? The first samples of two of its rows, drawn anew:

# %%
for name, grid in (("DDIM", "time"), ("DPM-Solver++(2M)", "log-SNR")):
    setting = {"name": name, "grid": grid, "evaluations": 10}
    (row,) = (r for r in table["rows"] if r["sampler"] == setting and r["seed"] == 0)
    drawn = torch.tensor(measures.first(setting, digit_model, path, seed=0))
    same = (drawn - torch.tensor(row["first samples"])).abs().max() < 2e-3
    claim(f"{name}: the brightness of the row's first 20 digits, drawn anew, agrees to 0.002", same)

# %% [markdown]
# ### 5.2 See for yourself
#
# The same ten noises, by sampler and number of evaluations. *Which sampler is the first to draw ten good digits? What do the random ones look like with few evaluations?*


# %%
def drawn(sampler, evaluations):
    setting = {"name": sampler, "grid": "time", "evaluations": evaluations}
    return measures.draw(setting, conditional, path, start, torch.Generator().manual_seed(5))


widgets.explore(drawn, sampler=(list(measures.FAST), "DPM-Solver++(2M)"), evaluations=([4, 6, 10, 20, 50], 6))

# %% [markdown]
# With 6 evaluations the ways without fresh noise all draw the same ten digits, and cleanly; they differ in small things such as the bar of the 7. Those with fresh noise draw other ones: with $\beta$ there is grain left all over, for their states hold more noise than the network believes, and it leaves the rest; with $\tilde\beta$ the digits are clean but thin, and here and there broken.
#
# ### 5.3 A table to keep
#
# | you have | use | because |
# |---|---|---|
# | 4 to 20 evaluations | DPM-Solver++(2M) | second order for the price of first order |
# | 50 or more, and want it simple | DDIM, $\eta = 0$ | nothing to tune; near enough to the ODE (on our digits from 10 on) |
# | strong guidance, few steps | DPM-Solver++ on $\hat x_0$, with clipping | $\hat x_0$ stays in its range, $\hat\epsilon$ need not; a guided step counts two evaluations |
# | no past to lean on (adaptive steps, a change on the way) | DPM-Solver++(2S) or Heun, 20 evaluations and more | each step stands alone; it costs two |
# | many evaluations, and a network that errs | ancestral sampling, or DDIM with $\eta>0$ | fresh noise forgets errors (notebook 05, section 6.4) |
# | ancestral sampling with 25 to 100 steps | a learned variance, or $\tilde\beta$ and $\beta$ of the *new* steps | section 1 |
# | bits per dimension from few steps | a learned variance | the bound is least at the variance it learns |
# | to edit, encode or mix real images | DDIM inversion, 50 steps and more | deterministic both ways; first order |
# | many processors and one image to wait for | Picard iteration on one of the above | fewer rounds, more evaluations |
#
# ## 6. Recap
#
# - Count evaluations. A guided step counts two, and so does a step of Heun or 2S.
# - To skip steps *is* possible: with $\beta$ and $\tilde\beta$ of the longer steps. The gap between the two grows: all gaps together are about $2\log S-0.9$ on our path, which falls only slowly with $S$, and few steps share it.
# - The variance of a true step is $\tilde\beta+c^2\,\mathrm{Var}(x_0\mid x_t)$. On a path with $\alpha^2+\sigma^2 = 1$ it divides the gap in a ratio that does not depend on the step.
# - Improved DDPM learns where between the bounds the variance lies, by a term of the bound whose gradient does not reach the mean.
# - Training knows marginals only. DDIM chooses another process with the same ones, given the true $x_0$. With the guess in its place and $\eta = 0$ it is Euler's rule for the probability-flow ODE, and errs like $1/S$.
# - In $\lambda$, half the log-SNR, the ODE's linear part is solved exactly. What is left to approximate is $\hat x_0$: constant, it is DDIM; along a line, DPM-Solver++ of second order.
# - A solver has an order *and* obeys identities in each single step. A test of these finds faults that a test of the order lets through.
# - A chain, even a random one, is a fixed point. Picard iteration trades evaluations for waiting.
#
# **Pitfalls**
#
# - $\beta$ from the training table in a chain with skipped steps.
# - Variances interpolated where their logarithms were learned.
# - $\log\tilde\beta_1 = -\infty$ in the last step.
# - Three σ and two α: DDIM's paper has $\alpha_t$ for $\bar\alpha_t$ and $\sigma_t$ for the fresh noise.
# - A step to `t - T // n` on a grid that does not have this time. A grid that never visits the end of the path.
# - "The marginals are right, so the samples are": only with the true $x_0$.
# - A clean image encoded as if it were the state at $t_{\min}$. Codes mixed along a straight line.
# - An order test on equal steps only.
# - Samplers compared by steps, or by seconds of two different runs.
#
# **Homework:** [six exercises](../homework/hw5_guidance_sampling.ipynb) next to this notebook and the last one.
#
# **References**
#
# - Nichol, Dhariwal: [*Improved Denoising Diffusion Probabilistic Models*](https://arxiv.org/abs/2102.09672), 2021. Learned variances, the hybrid loss, respacing.
# - Bao, Li, Zhu, Zhang: [*Analytic-DPM: an Analytic Estimate of the Optimal Reverse Variance in Diffusion Probabilistic Models*](https://arxiv.org/abs/2201.06503), 2022. The best variance from the score, without training.
# - Song, Meng, Ermon: [*Denoising Diffusion Implicit Models*](https://arxiv.org/abs/2010.02502), 2021.
# - Lu, Zhou, Bao, Chen, Li, Zhu: [*DPM-Solver*](https://arxiv.org/abs/2206.00927), 2022, and [*DPM-Solver++*](https://arxiv.org/abs/2211.01095), 2022.
# - Karras, Aittala, Aila, Laine: [*Elucidating the Design Space of Diffusion-Based Generative Models*](https://arxiv.org/abs/2206.00364), 2022. Heun's rule, and where to put the steps.
# - Hochbruck, Ostermann: *Exponential integrators*, Acta Numerica 19, 2010.
# - Lin, Liu, Li, Yang: [*Common Diffusion Noise Schedules and Sample Steps are Flawed*](https://arxiv.org/abs/2305.08891), 2024. What never visiting the end does.
# - Shih, Belkhale, Ermon, Sadigh, Anari: [*Parallel Sampling of Diffusion Models*](https://arxiv.org/abs/2305.16317), 2023.
# - Ho, Jain, Abbeel: [*Denoising Diffusion Probabilistic Models*](https://arxiv.org/abs/2006.11239), 2020. The two fixed variances.
