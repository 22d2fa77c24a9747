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
# # Score-based models and stochastic differential equations
#
# Notebook 03 walked from data to noise in a thousand steps. Here the steps become infinitely many and infinitely small, and
# the walk becomes a stochastic differential equation. At the end of this notebook you will be able to
#
# - turn a chain into a differential equation and back, and say what is exact in this and what is a limit;
# - run an equation backwards in time, and name the one thing that this needs: the *score*;
# - derive four ways to learn a score, and prove that they have the same answer;
# - sample with Euler–Maruyama, with a predictor and a corrector, and with an equation that has no noise in it at all;
# - compute the exact log-density of a diffusion model, and its bits per dimension;
# - turn noise, clean data, $v$, score and velocity into one another, and say where that fails.
#
# **Time:** three to four hours to read, with pen and paper; it runs in about a minute on a processor.
# **It builds on** [notebook 03](03_ddpm.ipynb): the chain, the jump to $x_t$, the network that guesses $x_0$, the bound; and in section 6 on notebook 02: the change of variables.
# **Symbols** are those of the lecture; the README's [symbol ledger](../README.md#symbols) lists them all.

# %%
import importlib.util

if importlib.util.find_spec("dgm_course") is None:  # Colab, or a fresh environment
    get_ipython().run_line_magic("pip", "install --quiet dgm-course")

# %%
import math
import time

import sympy
import torch
from numpy.polynomial.hermite_e import hermegauss
from scipy import integrate, stats
from torchdiffeq import odeint

from dgm_course import checkpoints, data, likelihood, losses, measures, nets, samplers, tables, toy, training
from dgm_course.checks import claim, show_source
from dgm_course.denoisers import Denoiser, clipped, on_path, read_as
from dgm_course.paths import VE, VP, Cosine, DiscretePath, Straight, SubVP
from dgm_course.schedules import linear_betas
from dgm_course.viz import plots, style, widgets

g = torch.Generator().manual_seed(0)  # where nearly all chance comes from; g² of an SDE is g2 in code
double = torch.float64

# %% [markdown]
# ## 1. From a chain to an equation
#
# ### 1.1 How to read a stochastic differential equation
#
# The lecture writes the forward process as a *stochastic differential equation*, an SDE:
#
# $$dx = f(x, t)\,dt + g(t)\,dw.$$
#
# Read it as a recipe for one short step of length $h$:
#
# $$x_{t+h} \approx x_t + f(x_t, t)\,h + g(t)\,\sqrt h\;z,\qquad z\sim\mathcal N(0, I).$$
#
# The *drift* $f$ says where the state is heading. The *diffusion coefficient* $g$ says how strongly it is shaken. The noise $w$ is *Brownian motion*:
# it starts at 0, its increments $dw = w_{t+h} - w_t$ over steps that do not overlap are independent, and each is normal with variance $h$.
#
# **Why $\sqrt h$?** Variances of independent terms add. Cut a second into $n$ steps: to give the second a variance of 1, each step must have variance $1/n$, so deviation $1/\sqrt n$.
#
# The slides call the drift a metaphor for the mean, $g$ one for the standard deviation, and $dw$ the "derivative of Brownian motion". Each word needs a footnote:
#
# - the drift is the *rate* at which the mean moves, $\mathbb E[x_{t+h} - x_t\mid x_t] \approx f\,h$, not the mean;
# - $g^2$ is the *rate* at which variance is added;
# - $dw$ is an *increment*. A derivative $dw/dt$ does not exist: it would be a normal variable of deviation $\sqrt h/h = 1/\sqrt h$, which grows without bound as $h$ shrinks.
#
# The SDE stands for what these walks tend to as $h\to0$. The squares of their increments tell them from smooth curves: over $[0, 1]$ they sum to $n\cdot\frac1n = 1$, however many steps $n$ there are. For a smooth curve the sum goes to 0. We check this, and that $dw/dt$ grows.

# %%
steps = 2**16
dw = torch.randn(steps, generator=g, dtype=double) / math.sqrt(steps)  # Brownian motion on [0, 1], in 65,536 increments
w = dw.cumsum(0)
coarse = w[63::64].diff(prepend=torch.zeros(1))  # increments of the same motion, seen at every 64th time
claim("the squared increments sum to 1, the length of the interval, to 3 %", abs(dw.square().sum() - 1) < 0.03)
claim("and so do those of the coarser view, to 20 %", abs(coarse.square().sum() - 1) < 0.2)
speed = dw.std() * steps, coarse.std() * steps / 64
claim("64 times shorter steps: dw/dt is 8 times as large, to 10 %", abs(speed[0] / speed[1] / 8 - 1) < 0.1)

# %% [markdown]
# *What would you expect to see when you zoom in on a walk? A smooth curve looks straight from near enough.*


# %%
def zoom(times):
    """The motion on [0, 1/times], in 256 steps; the vertical axis grows by √times, as deviations shrink by it."""
    length = steps // times
    seen = torch.cat([w.new_zeros(1), w])[: length + 1 : length // 256]
    made, (ax,) = plots.panels(1, width=6.0, height=3.0)
    plots.curves(torch.linspace(0, 1 / times, 257), {"w": seen}, "t", "w", ax=ax, title=f"zoomed in {times} times")
    ax.set_ylim(-2.5 / math.sqrt(times), 2.5 / math.sqrt(times))
    return made


widgets.explore(zoom, times=[1, 4, 16, 64, 256])

# %% [markdown]
# It looks the same from any distance: always as rough. So a slope does not exist anywhere.
#
# In this course the drift is linear, $f(x, t) = f(t)\,x$. Then $x_t$ given $x_0$ stays Gaussian, and everything can be worked out. In code $f(t)$ is `path.drift(t)` and $g^2(t)$ is `path.diffusion2(t)`.
#
# ### 1.2 The chain is an SDE already
#
# The lecture's chain is $x_i = \sqrt{1-\beta_i}\,x_{i-1} + \sqrt{\beta_i}\,\epsilon_i$ with $i = 1, \dots, T$ (the slide counts $N$ steps, we keep $T$). The slide lets $T\to\infty$ and gets
#
# $$dx = -\tfrac12\beta(t)\,x\,dt + \sqrt{\beta(t)}\,dw.$$
#
# It leaves open what $\beta(t)$ is. As $T$ grows, each step must get smaller, or the noise would be infinite: $\beta_i = \beta(i/T)/T$. With $h = 1/T$ and $\sqrt{1-\beta_i}\approx 1-\frac{\beta_i}2$, the step then is the recipe above.
#
# But no limit is needed. Solve the equation over one step of length $h = 1/T$, with $\beta(t) = b$ constant in it. Multiply by $e^{bt/2}$: the drift cancels, and
#
# $$d\bigl(e^{bt/2}x\bigr) = e^{bt/2}\sqrt b\,dw \quad\Longrightarrow\quad x_{t+h} = e^{-bh/2}\,x_t + \int_t^{t+h} e^{-b(t+h-u)/2}\sqrt b\,dw_u.$$
#
# The last term sums independent normal increments, so it is normal with mean 0, and its variances add: $\int_t^{t+h} e^{-b(t+h-u)}\,b\,du = 1-e^{-bh}$.
#
# **Claim.** With $b = -T\log(1-\beta_i)$ in the $i$-th interval, the solution at the times $i/T$ *is* the chain: the same factor, the same variance. An equation of this form is called an *Ornstein–Uhlenbeck process*. The chain is one, looked at $T$ times.

# %%
b, T, beta, u = sympy.symbols("b T beta u", positive=True)
factor, variance = sympy.exp(-b / T / 2), sympy.integrate(b * sympy.exp(-b * (1 / T - u)), (u, 0, 1 / T))
exact = {b: -T * sympy.log(1 - beta)}
claim("the factor of a step is √(1 − β_i)", sympy.simplify(factor.subs(exact) - sympy.sqrt(1 - beta)) == 0)
claim("its variance is β_i", sympy.simplify(variance.subs(exact) - beta) == 0)

# %% [markdown]
# So what is approximate? Two things.
#
# **First gap: $\beta(t)\approx T\beta_i$.** The SDE of the papers has $\beta(t) = T\beta_i$, a straight line from 0.1 to 20, in place of $-T\log(1-\beta_i) = T(\beta_i + \frac12\beta_i^2+\dots)$. So $\log\bar\alpha$ of the two differs, and the more so the larger the steps are. How much at $T = 1000$, and how does it fall?

# %%
counts = [50, 100, 200, 500, 1000, 2000, 5000]
gaps = []
for T in counts:
    chain = DiscretePath(linear_betas(T))
    i = torch.arange(T + 1)
    limit = VP()._log_alpha(i.double() / T) * 2  # log ᾱ of the SDE with β(t) = 0.1 + 19.9 t
    gaps.append((chain.alpha_bars.log() - limit).abs().max().item())
claim("T = 1000: log ᾱ differs by at most 0.068", abs(gaps[counts.index(1000)] - 0.068) < 0.0005)
claim("from 500 to 5,000 steps it falls to a tenth, nearly", abs(gaps[3] / gaps[6] / 10 - 1) < 0.05)
chain = DiscretePath(linear_betas(1000))
print(f"ᾱ at the end: {chain.alpha_bars[-1]:.2e} of the chain, {VP().alpha(1.0) ** 2:.2e} of its limit")

# %% [markdown]
# **Second gap: the reverse step.** The chain's *true* step back, $q(x_{i-1}\mid x_i)$, is not Gaussian (notebook 03, section 3.1), but the model's is. Take one-dimensional data with three modes. On a grid, Bayes' rule gives the true step exactly, and we compare it with the *best* Gaussian, of the same mean and variance: their KL divergence, averaged over $x_i$ and summed over all $T$ steps of $t\in[0.02, 1]$. *Will it fall as $T$ grows, when there are more and more steps to sum?*

# %%
modes = torch.tensor([-1.5, 0.3, 1.6], dtype=double)
variances, shares = torch.tensor([0.02, 0.06, 0.04], dtype=double), torch.tensor([0.4, 0.25, 0.35], dtype=double)
line = toy.GaussianMixture(modes[:, None], variances, shares)
x = torch.linspace(-5, 5, 301, dtype=double)
dx = x[1] - x[0]


def step_gap(s, t):
    path = VP()
    a, v = path.transition(s, t)
    earlier, later = x[:, None], x[None]  # rows x_s, columns x_t
    log_joint = line.log_prob(earlier, path, s)[:, None] - (later - a * earlier) ** 2 / (2 * v)
    back = log_joint.softmax(0)  # q(x_s given x_t) on the grid: each column sums to 1
    mean = (earlier * back).sum(0)
    var = ((earlier - mean) ** 2 * back).sum(0)
    log_normal = -((earlier - mean) ** 2) / (2 * var) - (2 * math.pi * var).log() / 2
    kl = torch.special.xlogy(back, back / dx).sum(0) - (back * log_normal).sum(0)
    return (kl * line.log_prob(x[:, None], path, t).exp()).sum() * dx


# %%
few = [5, 10, 20, 40, 80]
nats = []
for T in few:
    grid = torch.linspace(0.02, 1, T + 1, dtype=double)
    nats.append(sum(step_gap(s, t).item() for s, t in zip(grid[:-1], grid[1:], strict=True)))
claim("the sum over all steps falls faster than 1/T", all(b < a / 2 for a, b in zip(nats[:-1], nats[1:], strict=True)))
made, (left, right) = plots.panels(2, width=8.6, height=3.4)
plots.curves(
    torch.tensor(counts), {"log ᾱ": torch.tensor(gaps)}, "steps T", "largest |Δ log ᾱ|", logx=True, logy=True, ax=left
)
plots.curves(
    torch.tensor(few), {"KL": torch.tensor(nats)}, "steps T", "sum of KLs in nats", logx=True, logy=True, ax=right
)
left.set_title("β(t) ≈ Tβᵢ")
right.set_title("Gaussian steps back")
made

# %% [markdown]
# Yes, it falls: twice the steps divide the sum by about 3, as a step's KL falls faster than the number of steps grows. Both gaps close as $T$ grows, the left one like $1/T$. In the limit the chain and the SDE are one thing, described by two tools: the chain by the probability of a step, the SDE by its rates. This is what the slide's "equivalent" means. At a finite $T$ the *forward* processes still agree, with the $\beta(t)$ above. Only the reverse step is approximate. (A chain loses more than the figure shows, as it has one variance, $\beta_i$ or $\tilde\beta_i$, for all $x_i$; section 4 meets that loss again.)
#
# ### 1.3 Three equations and their marginals
#
# What does one gain? A process can now be designed by choosing two functions, $f(t)$ and $g(t)$. The mean and variance of $x_t$ given $x_0$ follow from the recipe of 1.1. One step multiplies the state by $1+fh$ and adds noise of variance $g^2h$, so with mean $m$ and variance $V$
#
# $$m_{t+h} = (1+fh)\,m_t,\qquad V_{t+h} = (1+fh)^2V_t + g^2h.$$
#
# Subtract, divide by $h$, and let $h\to0$. These are the **moment equations**:
#
# $$m' = f\,m,\qquad V' = 2f\,V + g^2.$$
#
# They start with $m = x_0$ and $V = 0$. With $m = \alpha(t)\,x_0$ and $V = \sigma^2(t)$ we are back at $x_t = \alpha x_0+\sigma\epsilon$. Read the other way, they give the SDE of any Gaussian path:
#
# $$f = \frac{\alpha'}{\alpha},\qquad g^2 = (\sigma^2)' - 2f\,\sigma^2.$$
#
# The paper of Song and others has three, with $\beta(t) = 0.1 + 19.9\,t$:
#
# | | $f(t)$ | $g^2(t)$ | $\alpha(t)$ | $\sigma^2(t)$ |
# |---|---|---|---|---|
# | VP, *variance preserving* | $-\frac12\beta$ | $\beta$ | $e^{-\frac12\int_0^t\beta}$ | $1-\alpha^2$ |
# | sub-VP | $-\frac12\beta$ | $\beta\,(1-\alpha^4)$ | as VP | $(1-\alpha^2)^2$ |
# | VE, *variance exploding* | $0$ | $(\sigma^2)'$ | $1$ | $\sigma_{\min}^2\bigl((\sigma_{\max}/\sigma_{\min})^{2t}-1\bigr)$ |
#
# VP is the chain's limit. Sub-VP has less noise on the way. VE leaves the data where they are and drowns them. (The paper's VE starts with noise $\sigma_{\min}$; ours starts at the data.)
#
# **Checked twice:** the moment equations, solved by a numerical solver that knows $f$ and $g^2$ only, and 20,000 walks by the recipe with 500 steps. A walk's own error is of the order of its step; section 5.1 says more.

# %%
three_sdes = {"VP": VP(), "sub-VP": SubVP(), "VE": VE(0.01, 10.0)}
for name, path in three_sdes.items():

    def rates(t, mV, path=path):
        f, g2 = path.drift(t).item(), path.diffusion2(t).item()
        return [f * mV[0], 2 * f * mV[1] + g2]

    m, V = integrate.solve_ivp(rates, (0, 1), [1.0, 0.0], rtol=1e-10, atol=1e-12).y[:, -1]
    off = abs(m - path.alpha(1.0)) + abs(V / path.sigma(1.0) ** 2 - 1)
    claim(f"{name}: the moment equations end in α and σ², to 1e-7", off < 1e-7)

# %%
ones = torch.ones(20_000, 1, dtype=double)
for name, path in three_sdes.items():
    walked = list(samplers.forward_euler_maruyama(path, ones, torch.linspace(0, 1, 501), generator=g))
    at = [(walked[round(500 * t) - 1], path.alpha(t), path.sigma(t)) for t in (0.25, 0.5, 1.0)]
    means = all(abs(x.mean() - alpha) < 0.022 * sigma + 0.01 * alpha for x, alpha, sigma in at)
    spreads = all(abs(x.std() / sigma - 1) < 0.026 for x, alpha, sigma in at)
    claim(
        f"{name}, t = ¼, ½ and 1: the means of the walks fit, to 3 σ/√n + 1 %, the deviations to 2.6 %",
        means and spreads,
    )

# %%
show_source(samplers.forward_euler_maruyama)

# %% [markdown]
# The code is the recipe. Now look at the three. In each picture the shade is the exact density $p_t(x)$ (at each time as a share of its largest value), and the lines are five live walks. *Move the first slider through the three, the second through other walks.*


# %%
def shade(ax, path, low, high, log=False):
    """The density of the three modes over time, each column scaled to its own maximum."""
    t, x = torch.linspace(0, 1, 201, dtype=double), torch.linspace(low, high, 241, dtype=double)
    columns = [line.log_prob(x[:, None], path, time.item()) for time in t]
    shown = torch.stack([(column - column.max()).exp() for column in columns], 1)
    ax.imshow(shown, extent=(0, 1, low, high), origin="lower", aspect="auto", cmap=style.DENSITY, vmax=1.3)
    ax.grid(False)


# %%
def live(sde, walk):
    path = {"VP": VP(), "sub-VP": SubVP(), "VE": VE(0.01, 3.0)}[sde]
    noise, times = torch.Generator().manual_seed(walk), torch.linspace(0, 1, 401, dtype=double)
    x0 = line.sample(5, noise)
    states = [x0, *samplers.forward_euler_maruyama(path, x0, times, generator=noise)]
    made, (ax,) = plots.panels(1, width=6.4, height=3.6)
    shade(ax, path, -4, 4)
    plots.trajectories(states, times=times, ax=ax, title=f"{sde}: five walks from data to noise")
    ax.set(xlim=(0, 1), ylim=(-4, 4))
    return made


widgets.explore(live, sde=["VP", "sub-VP", "VE"], walk=[1, 2, 3, 4, 5])

# %% [markdown]
# VP draws all walks into one standard normal cloud. Sub-VP does too, but keeps them closer together on the way: its noise comes later. VE never moves the modes; it only blurs them, until they cannot be told apart.
#
# ## 2. Backwards in time
#
# ### 2.1 The reverse SDE
#
# To sample, we must run the process backwards: start from noise at $t=1$ and end in data at $t=0$. A remarkable theorem (Anderson, 1982) says that the reverse of an SDE is an SDE again:
#
# $$dx = \bigl[f(t)\,x - g^2(t)\,\nabla_x\log p_t(x)\bigr]\,dt + g(t)\,d\bar w.$$
#
# Mind three things that the slide leaves unsaid. Here $dt$ is *negative*: time runs from 1 to 0. The noise is $\bar w$ (the slide writes $w$): a Brownian motion of its own that runs backwards in time, independent of the state it starts from. And one function in it is unknown, the **score** $\nabla_x\log p_t(x)$: the direction in which the density of the noisy data grows fastest.
#
# A step of length $h>0$ back in time therefore is
#
# $$x_{t-h} \approx x_t - \bigl[f\,x_t - g^2\,\nabla\log p_t(x_t)\bigr]h + g\sqrt h\,z.$$
#
# **Why this drift?** Do not ask how single walks move, ask how the *density* moves. Along an SDE the density obeys the **Fokker–Planck equation**
#
# $$\partial_t p = -\nabla\cdot(f x\,p) + \tfrac12 g^2\,\Delta p.$$
#
# Here $\nabla\cdot$ is the divergence $\sum_i\partial/\partial x_i$, and $\Delta p = \sum_i\partial^2p/\partial x_i^2$.
#
# The first term *carries*. In one dimension the flow of probability past a point is $p$ times the velocity $fx$. A short interval gains what flows in minus what flows out, which is $-\partial(fx\,p)/\partial x$. The second term *blurs*. The noise of a step takes $p(x)$ to the mean of $p(x-g\sqrt h\,z)$ over $z$. Expand: $p-g\sqrt h\,z\cdot\nabla p+\frac12g^2h\,z^\top(\nabla^2p)\,z$. With $\mathbb E z = 0$ and $\mathbb E zz^\top = I$ what is left is $p+\frac12g^2h\,\Delta p$.
#
# Now a small identity: $\nabla p = p\,\nabla\log p$, so $\Delta p = \nabla\cdot(p\,\nabla\log p)$. *Blurring is being carried down the score.* So for any number $\eta$ we may book a part of the blur as drift:
#
# $$\partial_t p = -\nabla\cdot\Bigl(\bigl[f x - \tfrac{1+\eta^2}{2}g^2\,\nabla\log p_t\bigr]p\Bigr) - \tfrac{\eta^2}2g^2\,\Delta p.$$
#
# Multiply out to check: the two new terms leave $\frac12g^2\Delta p$ in all. Now read this backwards in time, with $\tau = 1-t$ and $\partial_\tau = -\partial_t$:
#
# $$\partial_\tau p = -\nabla\cdot\Bigl(-\bigl[f x - \tfrac{1+\eta^2}{2}g^2\,\nabla\log p_t\bigr]p\Bigr) + \tfrac{\eta^2}2g^2\,\Delta p.$$
#
# This is the trick: the *minus* before the last term has become a *plus*, so that it is a true blur again. And this is the Fokker–Planck equation of a process that moves, in the time $\tau$, with minus the bracket, and is shaken with $\eta g$. In the time $t$, with $dt<0$, that is
#
# $$dx = \bigl[f x - \tfrac{1+\eta^2}{2}\,g^2\,\nabla\log p_t(x)\bigr]dt + \eta g\,d\bar w.$$
#
# Started from $p_1$, all these have the same densities $p_t$ at every $t$. $\eta = 1$ is the reverse SDE. $\eta = 0$ has no noise at all: it is called the **probability-flow ODE** (an *ordinary* differential equation), and we shall need it in sections 5 and 6. (The argument is about densities only. Anderson's theorem says more: for $\eta = 1$ whole walks have the law of the forward walks, read backwards. For other $\eta$ they do not, but a sampler does not need it.)
#
# **Checked on a mixture**, whose $p_t$ and score are known in closed form: both sides of the Fokker–Planck equation, and of the equation with $\eta$, at 200 points. Derivatives in $x$ by automatic differentiation, in $t$ by a small difference.

# %%
path, points, now = VP(), torch.linspace(-2.5, 2.5, 200, dtype=double)[:, None].requires_grad_(), 0.3


def slope(y):
    return torch.autograd.grad(y.sum(), points, create_graph=True)[0]


p = line.log_prob(points, path, now).exp()[:, None]
after, before = (line.log_prob(points, path, now + h).exp()[:, None] for h in (1e-4, -1e-4))
change, f, g2 = (after - before) / 2e-4, path.drift(now), path.diffusion2(now)
claim("Fokker–Planck holds", (change - (-slope(f * points * p) + g2 / 2 * slope(slope(p)))).abs().max() < 1e-5)
for eta in (0.0, 0.5, 1.0, 2.0):
    drift = f * points - (1 + eta**2) / 2 * g2 * slope(p.log())
    claim(
        f"and with η = {eta:g}: the same change of density",
        (change - (-slope(drift * p) - eta**2 / 2 * g2 * slope(slope(p)))).abs().max() < 1e-5,
    )

# %% [markdown]
# ### 2.2 There and back again
#
# We walk 5,000 points of the mixture to noise with the forward SDE, and another 5,000 points from noise (drawn from the exact $p_1$) back to data with the reverse one, with the exact score. (It stops at $t = 0.002$. Where data have no density, as grey levels, the score is infinite at 0, so every sampler of this notebook stops its equation at some $t_{\min}>0$; those that end at 0 jump from there to $\hat x_0$.) At every time on the way the two clouds must have the density $p_t$. The Kolmogorov–Smirnov distance is the largest gap between a cloud's distribution function and the exact one. Times $\sqrt n$, for $n$ exact samples, it exceeds 2 less than once in a thousand times; we allow 2.2, for the steps have an error of their own.
#
# `samplers.euler_maruyama` takes a denoiser and turns it into a score: $\nabla\log p_t(x) = \bigl(\alpha\,\mathbb E[x_0\mid x_t=x] - x\bigr)/\sigma^2$. Section 3.3 shows why.


# %%
def misfit(cloud, path, t):
    """The Kolmogorov–Smirnov distance of a cloud of n from p_t, times √n."""
    alpha, sigma = path.alpha(t), path.sigma(t)
    spread = (alpha**2 * variances + sigma**2).sqrt()

    def exact(x):
        return (shares * torch.special.ndtr((torch.as_tensor(x)[:, None] - alpha * modes) / spread)).sum(1).numpy()

    return stats.ks_1samp(cloud[:, 0].numpy(), exact).statistic * math.sqrt(len(cloud))


def normal(*shape):
    return torch.randn(*shape, generator=g, dtype=double)


# %%
path, times, number = VP(), torch.linspace(1, 0.002, 601, dtype=double), 5_000
start = path.perturb(line.sample(number, g), 1.0, normal(number, 1))
back = list(samplers.euler_maruyama(line.denoiser(path), path, start, times, generator=g))
first = path.perturb(line.sample(number, g), times[-1], normal(number, 1))
there = list(samplers.forward_euler_maruyama(path, first, times.flip(0), generator=g))
for i in (120, 300, 420, 510, 600):  # back[i - 1] is at times[i], and so is there[599 - i]
    t, forward = times[i].item(), there[599 - i] if i < 600 else first
    claim(
        f"t = {t:.2g}: both clouds have the density p_t",
        misfit(forward, path, t) < 2.2 and misfit(back[i - 1], path, t) < 2.2,
    )

# %% [markdown]
# The test must be able to fail. *Three people write the step back in other ways. What goes wrong with each?* The first forgets the score. The second takes the ODE's drift with the SDE's noise: $\frac12g^2$ for $g^2$. The third reads $d\bar w$ as the $dw$ of the way there and leaves the sign of $dt$ as it was.


# %%
def backwards(drift):
    """Euler–Maruyama by hand, from noise to data: drift(x, f, g², score) is what stands in the bracket."""
    x, coarse = start[:5000], times[::2].tolist()
    for t, s in zip(coarse[:-1], coarse[1:], strict=True):
        f, g2, score = path.drift(t), path.diffusion2(t), line.score(x, path, t)
        x = x - drift(x, f, g2, score) * (t - s) + (g2 * (t - s)).sqrt() * normal(*x.shape)
    return x


ends = {
    "right": backwards(lambda x, f, g2, score: f * x - g2 * score),
    "no score": backwards(lambda x, f, g2, score: f * x),
    "half the score": backwards(lambda x, f, g2, score: f * x - g2 / 2 * score),
}
wrong_way = backwards(lambda x, f, g2, score: -(f * x - g2 * score))

# %%
off = {name: misfit(x, path, times[-1].item()) for name, x in ends.items()}
claim("the right one fits", off["right"] < 2.2)
claim("without the score, and with half of it, nothing fits", min(off["no score"], off["half the score"]) > 10)
claim(
    "with the wrong sign of dt the cloud becomes more than 50 times too wide",
    wrong_way.std() > 50 * line.cov.sqrt().item(),
)
made, axes = plots.panels(3, width=9.6, height=2.8)
for ax, (name, cloud) in zip(axes, ends.items(), strict=True):
    plots.overlay(
        line.sample(20_000, g), cloud.clamp(-3, 3), labels=("data", "model"), extent=(-3.1, 3.1), ax=ax, title=name
    )
made

# %% [markdown]
# Without the score nothing pulls the points back to the modes: noise is added, and the drift, run backwards, only spreads them further (what flies beyond $\pm3$ is piled up at the edges). With half the score the modes are there, but far too wide, and the outer ones too far out. The third does not fit into a picture: its cloud ends more than 50 times too wide.
#
# And the other members of the family? *Move $\eta$ and watch the walks, then the histogram.*

# %%
few, few_times = start[:400], torch.linspace(1, 0.002, 101, dtype=double)


def family(eta):
    path, noise, x, states = VP(), torch.Generator().manual_seed(0), few, [few]
    for t, s in zip(few_times[:-1].tolist(), few_times[1:].tolist(), strict=True):
        f, g2, z = path.drift(t), path.diffusion2(t), torch.randn(few.shape, generator=noise, dtype=double)
        drift = f * x - (1 + eta**2) / 2 * g2 * line.score(x, path, t)
        x = x - drift * (t - s) + eta * (g2 * (t - s)).sqrt() * z
        states.append(x)
    made, (ax, end) = plots.panels(2, width=9.0, height=3.4)
    shade(ax, path, -4, 4)
    plots.trajectories(states, times=few_times, paths=8, ax=ax, title=f"η = {eta:g}: from t = 1 to the left")
    ax.set(xlim=(0, 1), ylim=(-4, 4))
    plots.overlay(line.sample(20_000, noise), x, ("data", "400 ends"), extent=(-3, 3), ax=end, title="where they end")
    return made


widgets.explore(family, eta=([0.0, 0.5, 1.0, 1.5], 0.0))

# %% [markdown]
# With $\eta = 0$ the walks are smooth, and never meet at the same $t$: where a point ends is decided by where it starts. With $\eta = 1$ they look like the forward walks of 1.3 (this *is* their reverse). Still the histograms at the end agree, whatever $\eta$ is.
#
# ## 3. How to learn a score
#
# ### 3.1 Why the score, and not the density?
#
# A network that gives a density must integrate to 1. Write it with an *energy*, $p_\theta(x) = e^{-f_\theta(x)}/Z_\theta$ (this $f_\theta$ is not the drift). Any function may be an energy, if only $e^{-f_\theta}$ has a finite integral; so nearly any network will do. But $Z_\theta = \int e^{-f_\theta(x)}dx$ is an integral over all images, and nobody can compute it.
#
# The score does not ask for it: $\nabla_x\log p_\theta = -\nabla_xf_\theta - \nabla_x\log Z_\theta$, and the last term is 0, for $Z_\theta$ does not depend on $x$.


# %%
def energy(x):
    return (x.square().sum(1) - 2).square() / 2 - x[:, 0] + 0.5 * x[:, 1]


def arrows(f, x):
    x = x.detach().requires_grad_()
    return -torch.autograd.grad(f(x).sum(), x)[0]


# %%
side = torch.linspace(-3, 3, 301)
plane = torch.cartesian_prod(side, side)
Z = (-energy(plane)).exp().sum() * (side[1] - side[0]) ** 2  # by brute force: possible in two dimensions only
claim("this energy has Z > 2: e^{−f} is no density", Z > 2)
lifted, points = (lambda x: energy(x) + 7), torch.randn(50, 2, generator=g)
fallen = Z / ((-lifted(plane)).exp().sum() * (side[1] - side[0]) ** 2)
claim("raise the energy by 7: Z falls by the factor e⁷", abs(fallen / math.exp(7) - 1) < 1e-3)
claim("and the score is the same", (arrows(lifted, points) - arrows(energy, points)).abs().max() < 1e-5)
coarse = torch.cartesian_prod(torch.linspace(-2.2, 2.2, 15), torch.linspace(-2.2, 2.2, 15))
made, (ax,) = plots.panels(1, width=4.8, height=4.4)
plots.density(lambda x: -energy(x), extent=(-2.4, 2.4, -2.4, 2.4), ax=ax, title="e^−f, not normalised, and its score")
look = arrows(energy, coarse)
ax.quiver(*coarse.T, *(look / (1 + look.norm(dim=1, keepdim=True) / 3)).T, color=style.MODEL, width=0.004)
made

# %% [markdown]
# The arrows point uphill, to the ridge, and along it to its highest place. They know where density is *relatively* high, and that is all a sampler needs. (Long arrows are drawn shorter.)
#
# ### 3.2 Explicit score matching
#
# We want $s_\theta(x)\approx\nabla\log p(x)$. The obvious loss has an unknown in it:
#
# $$J = \tfrac12\,\mathbb E_p\,\lVert s_\theta(x)-\nabla\log p(x)\rVert^2
#   = \tfrac12\mathbb E_p\lVert s_\theta\rVert^2 - \mathbb E_p\bigl[s_\theta\cdot\nabla\log p\bigr] + \underbrace{\tfrac12\mathbb E_p\lVert\nabla\log p\rVert^2}_{\text{no }\theta}.$$
#
# Only the middle term is a problem. Use $p\,\nabla\log p = \nabla p$ and integrate by parts, coordinate by coordinate:
#
# $$\mathbb E_p[s_\theta\cdot\nabla\log p] = \int s_\theta\cdot\nabla p\;dx = \underbrace{\oint p\,s_\theta}_{=\,0\text{ at infinity}} - \int p\;\mathrm{tr}(\nabla s_\theta)\,dx = -\mathbb E_p\,\mathrm{tr}(\nabla s_\theta).$$
#
# So, up to a number without $\theta$, $J$ is
#
# $$J_{ESM} = \mathbb E_p\bigl[\mathrm{tr}(\nabla s_\theta(x)) + \tfrac12\lVert s_\theta(x)\rVert^2\bigr],$$
#
# and in this the data's density occurs only as an average over data. The slide writes "$\Leftrightarrow$". That holds *up to a constant*, and *if the boundary term is 0*. Here is a case in which it is not: $p$ uniform on $[0, 1]$, so that $\nabla\log p = 0$, and the right answer is $s = 0$. Try $s(x) = -kx$.

# %%
k, x_ = sympy.symbols("k x")
trace_form = sympy.integrate(sympy.diff(-k * x_, x_) + (k * x_) ** 2 / 2, (x_, 0, 1))
best = sympy.solve(sympy.diff(trace_form, k), k)
claim("on a box the trace form is smallest at k = 3, and not at 0", best == [3])
claim("there it is −3/2, below the 0 of the right answer", trace_form.subs(k, 3) == -sympy.Rational(3, 2))

# %% [markdown]
# The density jumps at the edge, and the boundary term $p(1)\,s(1) = -k$ was dropped. Grey levels of images have such edges, and worse: they are numbers out of 256, so there is no density at all. Noise cures both. From here on we match the score of the *noised* density $p_t$, which is smooth and lives everywhere.
#
# The second problem stays: the trace $\mathrm{tr}(\nabla s_\theta) = \sum_i\partial s_i/\partial x_i$ takes one gradient for each of the $D$ coordinates.

# %%
show_source(losses.jacobian_trace)

# %% [markdown]
# ### 3.3 Denoising score matching
#
# For the noised density there is a way without any trace. The slides start with four lines that all have the *marginal* score $\nabla\log p_t(x_t)$ as the target: they rewrite the average over $x_t$ as one over $x_0$ and $x_t$. This is true (the tower rule), but nothing is gained: the target is as unknown in the last line as in the first. The step that matters is missing. Here it is, again for the middle term, with $p_t(x_t) = \int q(x_t\mid x_0)\,p(x_0)\,dx_0$, the density of $x_t$:
#
# $$\mathbb E\bigl[s_\theta\cdot\nabla\log p_t\bigr] = \int s_\theta\cdot\nabla p_t\,dx_t = \iint s_\theta\cdot\nabla q(x_t\mid x_0)\;p(x_0)\,dx_0\,dx_t = \mathbb E\bigl[s_\theta\cdot\nabla\log q(x_t\mid x_0)\bigr].$$
#
# (First $p_t\nabla\log p_t = \nabla p_t$; then $\nabla$ goes under the integral over $x_0$; last $\nabla q = q\,\nabla\log q$ for $q(x_t\mid x_0)$.)
#
# So the marginal score may be replaced by the **conditional** one, which we know, as $x_t$ given $x_0$ is $\mathcal N(\alpha x_0, \sigma^2I)$:
#
# $$\nabla_{x_t}\log q(x_t\mid x_0) = -\frac{x_t-\alpha x_0}{\sigma^2} = -\frac\epsilon\sigma.$$
#
# **Denoising score matching** is $J_{DSM} = \frac12\mathbb E\lVert s_\theta(x_t, t)+\epsilon/\sigma\rVert^2$. This is also what Algorithm 3 must have in its line 6, where the slide text has $\nabla\log p_t(x_t)$.
#
# Two things follow.
#
# **The gradients are the same, the losses are not.** The third term of $J$ has changed, from $\frac12\mathbb E\lVert\nabla\log p_t\rVert^2$ to $\frac12\mathbb E\lVert\nabla\log q(x_t\mid x_0)\rVert^2$. The difference is a variance: $J_{DSM} - J = \frac12\mathbb E\,\mathrm{tr}\,\mathrm{Cov}\bigl(\nabla\log q(x_t\mid x_0)\,\big|\,x_t\bigr)\ge0$. So a perfect network has a DSM loss above 0, and the loss alone does not tell how good it is.
#
# **The minimiser is a conditional mean.** A squared error is smallest at the mean of the target given the input: $\nabla\log p_t(x_t) = \mathbb E[-\epsilon/\sigma\mid x_t]$. With $\epsilon = (x_t-\alpha x_0)/\sigma$ this is the formula that section 2 used, known as Tweedie's:
#
# $$\nabla\log p_t(x_t) = \frac{\alpha\,\mathbb E[x_0\mid x_t]-x_t}{\sigma^2}.$$
#
# A denoiser *is* a score. The network of notebook 03 has learned one already.
#
# **Checked** without any sampling. For a mixture in the plane, averages over $x_0$ and $\epsilon$ are sums over Gauss–Hermite nodes, exact for all polynomials of moderate degree; the weights of the nodes enter the course's losses as `weight`. The networks are small and random. We check three things for each: $J_{DSM}-J$ and $J_{ESM}-J$ are the constants that were derived, and all gradients agree. (Given $x_t$, of the conditional score $(\alpha x_0-x_t)/\sigma^2$ only $\alpha x_0/\sigma^2$ varies, so its covariance is $\frac{\alpha^2}{\sigma^4}\mathrm{Cov}(x_0\mid x_t)$.)

# %%
nodes, ws = (torch.tensor(v) for v in hermegauss(14))  # for the weight e^{−x²/2}
square, square_weights = torch.cartesian_prod(nodes, nodes), torch.outer(ws, ws).flatten() / (2 * math.pi)
means = torch.tensor([[-1.0, -0.5], [1.2, 0.0], [0.0, 1.1]], dtype=double)
three = toy.GaussianMixture(
    means, torch.tensor([0.3, 0.2, 0.4], dtype=double), torch.tensor([0.5, 0.3, 0.2], dtype=double)
)
widths = torch.tensor([0.3, 0.2, 0.4], dtype=double).sqrt()
all_x0 = (
    (means[:, None] + widths[:, None, None] * square)[:, :, None].expand(3, 196, 196, 2).reshape(-1, 2)
)  # 196 = 14²
all_eps = square[None, None].expand(3, 196, 196, 2).reshape(-1, 2)
chance = torch.einsum("k,i,j->kij", three.weights, square_weights, square_weights).flatten()
weight, now = chance * len(chance), 0.4  # the losses take means: chance · number makes them expectations
xt = VP().perturb(all_x0, now, all_eps)
true = three.score(xt, VP(), now)


# %%
def small(seed):
    torch.manual_seed(seed)
    net = nets.perceptron(2, 16, 2).double()
    return Denoiser(lambda xt, t: net(xt), VP(), "score"), list(net.parameters())


def explicit(d):
    """J itself, with the true score."""
    return 0.5 * (chance * (d.output(xt, now) - true).square().sum(1)).sum()


# %%
sigma, alpha = VP().sigma(now), VP().alpha(now)
left_over = 0.5 * (2 / sigma**2 - (chance * true.square().sum(1)).sum())  # ½ E‖ε/σ‖² − ½ E‖∇log p_t‖²
posterior = three.denoiser(VP())(xt, now)  # E[x_0 given x_t]
cov = (chance * (all_x0 - posterior).square().sum(1)).sum()  # E tr Cov(x_0 given x_t)
claim(
    "the constant is ½ E tr Cov(∇log q(x_t | x_0) | x_t), to 1e-6",
    abs(0.5 * alpha**2 / sigma**4 * cov - left_over) < 1e-6,
)
# %%
for seed in (1, 2, 3):
    d, weights = small(seed)
    j, dsm, esm = explicit(d), losses.dsm(d, all_x0, now, all_eps, weight), losses.esm(d, all_x0, now, all_eps, weight)
    claim(f"network {seed}: J_DSM − J is that constant", abs(dsm - j - left_over) < 1e-6)
    claim(
        f"network {seed}: J_ESM − J is −½ E‖∇log p_t‖²",
        abs(esm - j + 0.5 * (chance * true.square().sum(1)).sum()) < 1e-5,
    )
    grads = [torch.cat([w.flatten() for w in torch.autograd.grad(loss, weights)]) for loss in (j, dsm, esm)]
    claim("  J, J_DSM and J_ESM have the same gradient", max((grads[0] - h).abs().max() for h in grads[1:]) < 1e-5)
best = Denoiser(lambda xt, t: three.score(xt, VP(), now), VP(), "score")
claim(
    "the true score has J = 0, and its J_DSM is the constant, above 0.05",
    abs(losses.dsm(best, all_x0, now, all_eps, weight) - left_over) < 1e-6 and left_over > 0.05,
)

# %% [markdown]
# > **What denoising learns.** The minimiser is the score of the *noised* density. It is not the score of the data, however long one trains; for that the noise must go to 0, and the second figure of section 3.5 shows what this does to the gradient.
#
# (If you are short of time, go on to section 4 from here: diffusion models are trained with DSM.)
#
# ### 3.4 Sliced score matching
#
# Is there a trace for the price of one gradient? Take a random vector $v$ with mean 0 and covariance $\mathbb E[vv^\top] = I$. For any matrix $A$
#
# $$\mathbb E\,v^\top\!A\,v = \mathbb E\,\mathrm{tr}(A\,vv^\top) = \mathrm{tr}(A\,\mathbb E[vv^\top]) = \mathrm{tr}\,A,$$
#
# and $v^\top\nabla s_\theta\,v = v\cdot\nabla_x(v\cdot s_\theta)$ is one gradient of one number. This is **sliced score matching**: match the scores along one random line at a time ($v$ is a direction here, not the $v$ of $v$-prediction),
#
# $$\tfrac12\,\mathbb E\bigl(v\cdot s_\theta - v\cdot\nabla\log p_t\bigr)^2
#  \;\longrightarrow\; J_{SSM} = \mathbb E\bigl[v^\top\nabla s_\theta\,v + \tfrac12(v\cdot s_\theta)^2\bigr],$$
#
# by the same integration by parts as in 3.2. The average of $(v\cdot s)^2$ over $v$ is known, it is $\lVert s\rVert^2$. Putting that in removes one source of noise: the **variance-reduced** form
#
# $$J_{SSM\text{-}VR} = \mathbb E\bigl[v^\top\nabla s_\theta\,v + \tfrac12\lVert s_\theta\rVert^2\bigr].$$
#
# This is the form on the slide, which does not say what $p_v$ is. It matters. With $\mathbb E[vv^\top] = I$ (normal numbers, or random signs) both are $J_{ESM}$ on average. With $v$ of *length one*, $\mathbb E[vv^\top] = I/D$: the plain form is then only divided by $D$, but in the reduced one the first term is, and the second is not. *What does it learn for $\mathcal N(0, I)$, whose score is $-x$? Try $s(x) = -cx$ before you run the cell.*

# %%
signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=double)] * 2)
d, weights = small(4)
esm = losses.esm(d, all_x0, now, all_eps, weight)
for reduced in (False, True):
    sliced = sum(losses.ssm(d, all_x0, now, all_eps, v.expand_as(all_x0), weight, reduced) for v in signs) / 4
    claim(f"{'reduced' if reduced else 'plain'}: the mean over all four signs is J_ESM", abs(sliced - esm) < 1e-10)

# %%
D, grid = 4, torch.linspace(0, 2, 201, dtype=double)
on_signs = torch.cartesian_prod(
    *[torch.tensor([-1.0, 1.0], dtype=double)] * D
)  # as ε: ‖ε‖² = D for each, as N(0, I) has on average
still = torch.zeros_like(on_signs)
unit = torch.nn.functional.normalize(normal(*on_signs.shape), dim=1)


def learned(v, reduced):
    """Which c makes the sliced loss of s(x) = −c·x smallest; at t = 1 x_t is ε, nearly."""
    tried = [Denoiser(lambda xt, t, c=c: -c * xt, VP(), "score") for c in grid]
    values = torch.stack([losses.ssm(d, still, 1.0, on_signs, v, None, reduced) for d in tried])
    return grid[values.argmin()].item()


claim("v of random signs: c = 1 is learned, as it should be", abs(learned(on_signs.flip(0), True) - 1) < 0.011)
claim("v of length one, reduced form: c = 1/D is learned", abs(learned(unit, True) - 1 / D) < 0.011)

# %% [markdown]
# With $\lVert v\rVert = 1$ the first term is $-c$, where it should be $-cD$; the second is $\frac12c^2D$ on average. The sum is smallest at $c = 1/D$: a score that is $D$ times too small.
#
# ### 3.5 What each of them costs
#
# DSM takes one pass through the network, a sliced form a gradient on top, ESM a gradient for every coordinate. The figure times one evaluation of each loss, with 64 samples, as $D$ grows. (Each training step then differentiates once more, through all of it.)


# %%
def seconds(loss, *given):
    loss(*given)
    took = []
    for _ in range(3):
        began = time.perf_counter()
        loss(*given)
        took.append(time.perf_counter() - began)
    return sorted(took)[1]


# %%
kinds = {"DSM": losses.dsm, "sliced, VR": losses.ssm, "ESM": losses.esm}
sizes, took = [2, 8, 32, 128], {name: [] for name in kinds}
for D in sizes:
    model, (x0, eps, v) = Denoiser(nets.MLP(D, width=64, depth=2), VP(), "score"), torch.randn(3, 64, D, generator=g)
    for name, loss in kinds.items():
        given = (model, x0, 0.5, eps, v) if loss is losses.ssm else (model, x0, 0.5, eps)
        took[name].append(seconds(loss, *given))
claim("from 2 to 128 coordinates ESM becomes more than 10 times slower", took["ESM"][-1] > 10 * took["ESM"][0])
claim("the sliced loss less than 5 times", took["sliced, VR"][-1] < 5 * took["sliced, VR"][0])
inks = {"DSM": style.DATA, "ESM": style.EXACT, "sliced": style.MODEL, "sliced, VR": style.GUIDED}
relative = {name: torch.tensor(values) / took["DSM"][0] for name, values in took.items()}
plots.curves(
    torch.tensor(sizes),
    relative,
    "values in a sample, D",
    "time, in units of DSM at D = 2",
    logx=True,
    logy=True,
    colors=inks,
)

# %% [markdown]
# The line of ESM rises with a slope of about 1: for an image of 784 pixels it would take some 784 gradients. This is what "high dimension" under the slide's formula means.
#
# So why not always DSM? Because its target is noisy. *How noisy is each gradient, and how does this depend on $t$? Think of $\epsilon/\sigma$ for $t\to0$.* We take one network, 60 batches of 64 at each $t$, and look how far a batch's gradient is from the mean of all.


# %%
def scatter_of(loss, t, batches=60, size=64):
    """How far the gradient of one batch is from the mean gradient, as a root mean square."""
    d, weights = small(5)
    rows = []
    for _ in range(batches):
        x0, eps = three.sample(size, g), normal(size, 2)
        grad = torch.autograd.grad(loss(d, x0, t, eps), weights)
        rows.append(torch.cat([part.flatten() for part in grad]))
    rows = torch.stack(rows)
    return (rows - rows.mean(0)).square().sum(1).mean().sqrt().item()


# %%
def sliced(reduced):
    return lambda d, x0, t, eps: losses.ssm(
        d, x0, t, eps, torch.randn(eps.shape, generator=g, dtype=double).sign(), None, reduced
    )


kinds = {"DSM": losses.dsm, "ESM": losses.esm, "sliced": sliced(False), "sliced, VR": sliced(True)}
moments = [0.003, 0.01, 0.03, 0.1, 0.3, 1.0]
noise_of = {name: torch.tensor([scatter_of(loss, t) for t in moments]) for name, loss in kinds.items()}
claim(
    "t = 0.003: the gradient of DSM is more than 5 times as noisy as that of ESM",
    noise_of["DSM"][0] > 5 * noise_of["ESM"][0],
)
plots.curves(torch.tensor(moments), noise_of, "t", "deviation of a batch's gradient", logx=True, logy=True, colors=inks)

# %% [markdown]
# As $t\to0$ the target $-\epsilon/\sigma$ of DSM grows without bound, and its gradient drowns in noise; the other three hardly notice. (Here, for data with a smooth density and an untrained network. Images lie near a surface; there the true score itself grows like $1/\sigma$, and the others get noisy as well.) Diffusion models live with the noise: they give such $t$ little weight (section 4), and stop at some $t_{\min}$ above 0. The reduced form is a little quieter than the plain one, and the exact trace quieter than both.
#
# ### 3.6 Train each of them
#
# Six Gaussians on a circle, the same network, batches and steps for all four, with the weight $\lambda = \sigma^2$ (section 4 says why). The network's output is read as $\hat\epsilon$, so that its size stays of order 1. We know the true score, so we can measure the squared error of $\hat\epsilon$, which is $\sigma^2\lVert s_\theta-\nabla\log p_t\rVert^2$, where the data are and where they are not. For comparison: how large is the true $\hat\epsilon$ itself?

# %%
circle = toy.ring(6, std=0.3)
path, on_circle = VP(), circle.sample(20_000, g)
plain = training.batches(on_circle, path, size=256)


def with_weight(step):
    batch = plain(step)
    return batch | {"weight": path.sigma(batch["t"]) ** 2}


def with_slices(step):
    signs = torch.randint(2, (256, 2), generator=torch.Generator().manual_seed(step)) * 2.0 - 1
    return with_weight(step) | {"v": signs}


# %%
def trained(loss, batch):
    torch.manual_seed(0)
    model = Denoiser(nets.MLP(2, width=64, depth=1), path, predicts="eps")
    return training.fit(model, loss, batch, steps=250, lr=5e-3, ema=0.99, precision="float32", progress=False).ema


def plain_slices(d, **batch):
    return losses.ssm(d, **batch, reduced=False)


models = {
    "DSM": trained(losses.dsm, with_weight),
    "ESM": trained(losses.esm, with_weight),
    "sliced": trained(plain_slices, with_slices),
    "sliced, VR": trained(losses.ssm, with_slices),
}


# %%
def error_at(model, x, t):
    with torch.no_grad():
        off = read_as("score", model, VP())(x, t) - circle.score(x, VP(), t)
    return VP().sigma(t).item() ** 2 * off.square().sum(1).mean().item()


# %%
moments, size = [0.03, 0.1, 0.2, 0.3, 0.5, 0.8], []
on_data, elsewhere = {name: [] for name in models}, {name: [] for name in models}
for t in moments:
    seen = VP().perturb(circle.sample(2000, g), t, torch.randn(2000, 2, generator=g))
    anywhere = 8 * torch.rand(2000, 2, generator=g) - 4
    size.append(VP().sigma(t).item() ** 2 * circle.score(seen, VP(), t).square().sum(1).mean().item())
    for name, model in models.items():
        on_data[name].append(error_at(model, seen, t))
        elsewhere[name].append(error_at(model, anywhere, t))
last = {name: errors[-1] / size[-1] for name, errors in on_data.items()}
claim("t = 0.8, on the data: less than 1 % of the mean square is missed", max(last.values()) < 0.01)
claim("t = 0.1, on the data: more than 10 %", min(errors[1] for errors in on_data.values()) > 0.1 * size[1])
claim(
    "elsewhere the error is larger at every t, for all four",
    all(a < b for n in models for a, b in zip(on_data[n], elsewhere[n], strict=True)),
)

# %%
made, axes = plots.panels(2, width=9.0, height=3.4)
inks["true ε̂, size"] = style.NOISE
for ax, part, title in zip(axes, (on_data, elsewhere), ("where the data are", "anywhere in [−4, 4]²"), strict=True):
    lines = {name: torch.tensor(errors) for name, errors in {**part, "true ε̂, size": size}.items()}
    plots.curves(
        torch.tensor(moments), lines, "t", "mean squared error of ε̂", logy=True, colors=inks, ax=ax, title=title
    )
    ax.set_ylim(1e-4, 20)
made

# %% [markdown]
# (Grey: the mean square of the true $\hat\epsilon$ on the data.) All four learn the same thing, nearly equally well for $t\le0.1$. With much noise DSM is the best and the two sliced forms are the worst. This does not contradict the figure of 3.5, which had an untrained network: once the network fits, $x_t$ nearly gives $\epsilon$ away, the target of DSM is met, and its gradient becomes quiet. The gradients with a trace keep their noise, and the slices add theirs. With little noise much of the score is still missed, for so few steps; and anywhere else the error is larger, by a factor of about 3 to 30: *where there are no data, nobody tells the network what the score is*. With much noise both errors are small, and then a sampler seldom is elsewhere: at each $t$ it needs the score where $p_t$ has its mass. This is why scores are learned at many noise levels.
#
# ## 4. How to weigh the times
#
# One loss for all $t$ needs a weight $\lambda(t)$:
#
# $$L = \mathbb E_t\;\lambda(t)\;\mathbb E\,\lVert s_\theta(x_t,t)+\epsilon/\sigma_t\rVert^2.$$
#
# Three choices have a meaning.
#
# - $\lambda = 1$: nobody's choice. The target has the size $1/\sigma$, so small $t$ would be all that counts.
# - $\lambda = \sigma^2$: then $\lambda\lVert s_\theta+\epsilon/\sigma\rVert^2 = \lVert\epsilon-\hat\epsilon\rVert^2$ with $\hat\epsilon = -\sigma s_\theta$. **This is $L_{simple}$**, the loss of DDPM's Algorithm 1.
# - $\lambda = g^2$: the *bound* on the likelihood. The slide says that it "is equal to the DDPM loss".
#
# Which DDPM loss is equal to $\lambda = g^2$? Not $L_{simple}$. Take one term of the bound of notebook 03, a step from $t$ back to an earlier time $s$ with $\Sigma_\theta = \tilde\beta$. It is a factor times $\lVert x_0-\hat x_0\rVert^2$, and the factor is half of what the step gains in signal-to-noise ratio:
#
# $$L_{t-1} = \tfrac12\Bigl(\frac{\alpha^2(s)}{\sigma^2(s)}-\frac{\alpha^2(t)}{\sigma^2(t)}\Bigr)\lVert x_0-\hat x_0\rVert^2.$$
#
# For a short step $h$ the bracket is $-h$ times the derivative of $\alpha^2/\sigma^2$. And $g^2$ is hidden in that derivative: with $f = \alpha'/\alpha$ and $g^2 = (\sigma^2)'-2f\sigma^2$,
#
# $$-\frac{d}{dt}\frac{\alpha^2}{\sigma^2} = \frac{\alpha^2}{\sigma^4}\bigl((\sigma^2)'-2f\sigma^2\bigr) = g^2\,\frac{\alpha^2}{\sigma^4},
#   \qquad\text{while}\qquad s_\theta+\frac\epsilon\sigma = -\frac\alpha{\sigma^2}\bigl(x_0-\hat x_0\bigr).$$
#
# So $L_{t-1}\approx\frac12\,g^2\,\lVert s_\theta+\epsilon/\sigma\rVert^2\,h$. Sum over all steps: as $T\to\infty$, **the sum of the $L_{t-1}$ tends to *half* of the loss with $\lambda = g^2$**. (Our `losses.dsm` has the half in it, as the slide that introduces it. The loss here is the integral over $t$; for $t$ uniform on $[t_{\min}, 1]$ it is $1-t_{\min}$ times the mean.) The condition is that $t$ starts at some $t_{\min}>0$: for data with a density the integral diverges at 0. (With $\Sigma_\theta = \beta$ in place of $\tilde\beta$ each term has the factor $\tilde\beta/\beta$, and a constant comes on top. Both differences go to 0 with the step.)
#
# **Checked:** the factor by SymPy; then the sum against the integral (`path.logsnr` is $\log(\alpha^2/\sigma^2)$), for the best denoiser of the line with three modes, whose error is $\mathbb E\,\mathrm{Var}(x_0\mid x_t)$.

# %%
al_s, al_t, sg_s, sg_t = sympy.symbols("alpha_s alpha_t sigma_s sigma_t", positive=True)
v = sg_t**2 - (al_t / al_s) ** 2 * sg_s**2  # of q(x_t given x_s)
pull, beta_tilde = al_s * v / sg_t**2, v * sg_s**2 / sg_t**2  # x_0's factor in the posterior's mean, and its variance
gain = al_s**2 / sg_s**2 - al_t**2 / sg_t**2
claim(
    "pull² / 2β̃ is half the gain in signal-to-noise ratio", sympy.simplify(pull**2 / (2 * beta_tilde) - gain / 2) == 0
)

# %%
path, wide = VP(), torch.linspace(-6, 6, 601, dtype=double)
step, second_moment = wide[1] - wide[0], (line.cov + line.mean.square()).item()


# %%
def left(t):
    """E Var(x_0 given x_t), of the three modes: E x_0² minus the mean square of the best guess, summed over a grid."""
    path = VP()
    p = line.log_prob(wide[:, None], path, t).exp()
    return second_moment - (line.denoiser(path)(wide[:, None], t)[:, 0].square() * p * step).sum().item()


def sum_of_terms(T, start):
    """Σ L_{t−1} over T equal steps from 1 down to `start`."""
    grid = torch.linspace(start, 1, T + 1, dtype=double)
    ratio = path.logsnr(grid).exp()
    return sum(-0.5 * gain.item() * left(t.item()) for gain, t in zip(ratio.diff(), grid[1:], strict=True))


# %%
def half_of_g2(t):
    return 0.5 * path.diffusion2(t).item() * (path.alpha(t) / path.sigma(t) ** 2).item() ** 2 * left(t)


integral = integrate.quad(half_of_g2, 0.01, 1, epsrel=1e-7)[0]
off = [abs(sum_of_terms(T, 0.01) / integral - 1) for T in (200, 400, 800, 1600)]
claim("t in [0.01, 1], T = 1,600: the sum is half the loss with λ = g², to 2 %", off[-1] < 0.02)
claim("twice the steps, half the difference", abs(off[-2] / off[-1] - 2) < 0.2)

# %% [markdown]
# **The end at 0.** For small $t$ the error of the best denoiser is about $\sigma^2/\alpha^2$, as the data have a density: $x_0$ is known as well as the noise allows. And $\sigma^2\approx\beta(0)\,t$. So the integrand is $\frac12g^2/\sigma^2\approx\frac1{2t}$ for each coordinate, and its integral from $t_{\min}$ grows like $\frac12\log\frac1{t_{\min}}$. A chain goes on to 0. Its sum grows like $\frac12\log T$: with every doubling of $T$ come about $\frac12\log2 = 0.347$ nats. (This is no scandal: the last step, $L_0$, falls by as much. But it is why the limit needs a $t_{\min}$.)

# %%
more = sum_of_terms(1600, 1 / 1600) - sum_of_terms(800, 1 / 800)
claim("from 800 to 1,600 steps: 0.347 nats more, to 10 %", abs(more / (math.log(2) / 2) - 1) < 0.1)

# %% [markdown]
# What do the three weights make of a *perfect* network? The figure shows each weight times the loss that is left, $\mathbb E\lVert\nabla\log p_t+\epsilon/\sigma\rVert^2 = \frac{\alpha^2}{\sigma^4}\mathbb E\,\mathrm{Var}(x_0\mid x_t)$: this is the floor of each loss over $t$.

# %%
t = torch.linspace(0.005, 1, 150, dtype=double)
floor = path.alpha(t) ** 2 / path.sigma(t) ** 4 * torch.tensor([left(now.item()) for now in t], dtype=double)
weights = {"λ = 1": torch.ones_like(t), "λ = g²": path.diffusion2(t), "λ = σ²": path.sigma(t) ** 2}
claim("λ = σ²: the loss left lies between 0 and 1 at every t", ((weights["λ = σ²"] * floor < 1) & (floor > 0)).all())
plots.curves(t, {name: weight * floor for name, weight in weights.items()}, "t", "λ(t) × loss that is left", logy=True)

# %% [markdown]
# $\lambda = \sigma^2$ is the only one that stays below 1. It "balances the magnitude of the loss across time", as the slide asks, and gives the middle of the path its due. $\lambda = g^2$ spends itself on small $t$, where fine detail is settled: good for likelihood, less so for the eye. This is the observation of notebook 03, section 8, in the language of SDEs.
#
# ## 5. Samplers
#
# ### 5.1 The predictor: Euler–Maruyama
#
# The slide's predictor is the reverse SDE's recipe with a step of length $h$. How wrong is it? There are two ways to ask.
#
# - **Strong error:** does a *walk* end where the exact walk with the same noise ends? $\mathbb E\,\lvert x^{(h)}-x\rvert$.
# - **Weak error:** is the *distribution* right? $\lvert\mathbb E\,\varphi(x^{(h)})-\mathbb E\,\varphi(x)\rvert$ for a function such as $\varphi(x) = x^2$.
#
# A sampler only cares for the second. A method has order $k$ if its error falls like $h^k$. Euler–Maruyama has weak order 1. In general its strong order is $\frac12$, but here $g$ does not depend on $x$, and then it is 1, too. *Which of the two would you expect to be easier to measure?*
#
# Strong: a reference walk with 2,048 steps; coarser walks get the sums of its noise. Weak: no chance at all. On a grid, a step maps a density to the sum of the Gaussians that the recipe makes of each point, so we can push the *whole density* through the sampler and integrate $x^2$ in the end.

# %%
path, top, low = VP(), 0.6, 0.02
d = line.denoiser(path)


def walks(count, increments):
    """`count` steps; `increments` (2048, N, 1) are the reference's Brownian increments."""
    times = torch.linspace(top, low, count + 1, dtype=double).tolist()
    x, merged = many, increments.unflatten(0, (count, -1)).sum(1)
    for t, s, dw in zip(times[:-1], times[1:], merged, strict=True):
        x = samplers.euler_maruyama_step(path, x, d(x, t), t, s, dw / math.sqrt(t - s))
    return x


# %%
fine = torch.linspace(-4.5, 4.5, 901, dtype=double)[:, None]


def spread_out(p, mean, deviation):
    """The masses p on the grid, after each point has become a normal cloud with this mean and deviation."""
    kernel = (-((fine - mean.T) ** 2) / (2 * deviation**2)).exp()
    return kernel / kernel.sum(0) @ p


def predicted(p, t, s):
    mean = samplers.euler_maruyama_step(VP(), fine, line.denoiser(VP())(fine, t), t, s)
    return spread_out(p, mean, (VP().diffusion2(t) * (t - s)).sqrt())


# %%
def masses(t):
    return line.log_prob(fine, VP(), t).softmax(0)


def second_moment_after(count):
    p, times = masses(top), torch.linspace(top, low, count + 1, dtype=double).tolist()
    for t, s in zip(times[:-1], times[1:], strict=True):
        p = predicted(p, t, s)
    return (fine[:, 0] ** 2 * p).sum().item()


# %%
exact = (path.alpha(low) ** 2 * (line.cov + line.mean**2) + path.sigma(low) ** 2).item()
counts = [16, 32, 64, 128]
weak = torch.tensor([abs(second_moment_after(n) - exact) for n in counts])
many = path.perturb(line.sample(1500, g), top, normal(1500, 1))
brownian = normal(2048, 1500, 1) * math.sqrt((top - low) / 2048)
reference = walks(2048, brownian)
strong = torch.tensor([(walks(n, brownian) - reference).abs().mean() for n in counts])
for name, error in (("weak", weak), ("strong", strong)):
    order = (error[0] / error[-1]).log2() / 3
    claim(f"{name} order 1, measured over three halvings, to 0.2", abs(order - 1) < 0.2)
plots.curves(
    torch.tensor(counts), {"weak": weak, "strong": strong}, "steps", "|Δ E x²|, and E |Δx|", logx=True, logy=True
)

# %% [markdown]
# Both orders are 1: twice the steps, half the error. (The two measure different things, $\lvert x\rvert$ and $x^2$, so their heights do not compare.) By sampling, the strong error is the easier one to measure: both walks share their noise, and chance cancels. A weak error of 0.003 drowns in the chance of the sample, unless there are millions of points. This is why the density itself was pushed. Order 1 is slow; and notebook 03's ancestral sampler is no better in this respect. The paper's ancestral step for VP, in terms of the score, *is* Algorithm 2 with $\Sigma_\theta = \beta_t$:
#
# $$x_{t-1} = \frac{x_t+\beta_t\,\nabla\log p_t(x_t)}{\sqrt{1-\beta_t}} + \sqrt{\beta_t}\,z.$$

# %%
chain = DiscretePath(linear_betas(50))
xt, z, t = normal(100, 1), normal(100, 1), 30
beta, score = chain.betas[t], line.score(xt, chain, t)
theirs = (xt + beta * score) / (1 - beta).sqrt() + beta.sqrt() * z
ours = samplers.ddpm_step(chain, xt, line.denoiser(chain)(xt, t), t, t - 1, variance="beta", noise=z)
claim("ancestral sampling by the score is Algorithm 2, to 1e-12", (theirs - ours).abs().max() < 1e-12)

# %% [markdown]
# ### 5.2 The corrector: Langevin dynamics
#
# The predictor makes errors, and they add up. A score can repair them. Stay at one $t$, and repeat
#
# $$x \leftarrow x + \delta\,\nabla\log p_t(x) + \sqrt{2\delta}\,z.$$
#
# This is **Langevin dynamics**. It is the SDE $dx = \nabla\log p_t\,d\tau+\sqrt2\,dw$ in a time of its own, while $t$ stands still. In its Fokker–Planck equation the drift carries exactly what the blur spreads: with $\Delta p = \nabla\cdot(p\nabla\log p)$ the right side is 0 for $p = p_t$. So $p_t$ stays as it is, and anything else moves towards it: quickly within a mode, and slowly where a walk must cross the valley between two.
#
# *(The slide text reads $x_{t+1}\leftarrow x_t+s_\theta\Delta t+\sqrt{2\Delta t}\,\epsilon$. Here $t+1$ counts repetitions, the score stays at the same $t$, and $\Delta t$ is a positive step $\delta$, not the predictor's $\Delta t$, which is negative: with that one the square root has no value, and the score's sign is turned.)*

# %%
path, now = VP(), 0.3
d, number = line.denoiser(path), 10_000
spoiled = path.perturb(line.sample(number, g), now, normal(number, 1)) * 1.4 + 0.3  # a cloud that is off


def follow(x, step, count=60):
    for _ in range(count):
        x = x + step * line.score(x, path, now) + math.sqrt(2 * abs(step)) * normal(*x.shape)
    return x


mended = samplers.last(samplers.langevin(d, path, spoiled, now, snr=0.2, steps=100, generator=g))
before, after = misfit(spoiled, path, now), misfit(mended, path, now)
claim("100 steps of the corrector bring the misfit to less than a fifth", after < before / 5)
claim("with the predictor's sign (and |δ| under the root) the cloud leaves", follow(spoiled, -0.02).abs().max() > 8)

# %% [markdown]
# **How long a step?** The paper sets $\delta$ by a *signal-to-noise ratio* $r$: how long is the score's part of a step, compared with the noise's? (It has nothing to do with $\alpha^2/\sigma^2$.) Noised images have a score of size $\lVert\nabla\log p_t\rVert\approx\lVert z\rVert/\sigma(t)$ (data with a smooth density have less), and with $\delta = 2(r\sigma(t))^2$ the ratio $\delta\lVert\nabla\log p_t\rVert/(\sqrt{2\delta}\lVert z\rVert)$ is $r$. Each sample's step depends on its own $t$ only.
#
# A step of finite length leaves a slightly wrong density unchanged. For $p_t = \mathcal N(0,\sigma^2)$ it can be worked out. A step multiplies $x$ by $1-\delta/\sigma^2 = 1-2r^2$ and adds variance $2\delta = 4r^2\sigma^2$. The variance that stays is too large by the factor $1/(1-r^2)$: 2.6 % for a usual $r = 0.16$. The bias goes to 0 with $r$.

# %%
V, r, S = sympy.symbols("V r sigma", positive=True)
(stays,) = sympy.solve(sympy.Eq(V, (1 - 2 * r**2) ** 2 * V + 4 * r**2 * S**2), V)
claim("the variance that a step leaves unchanged is σ²/(1 − r²)", sympy.simplify(stays - S**2 / (1 - r**2)) == 0)

# %% [markdown]
# For the three modes we let the density settle: 16,384 steps of the corrector on the grid, by squaring the matrix of one step 14 times.


# %%
def corrected(p, t, r):
    """One step of the corrector on the masses p; `p` may be the identity, and what comes out is the step's matrix."""
    sigma, score = VP().sigma(t), line.score(fine, VP(), t)
    mean = samplers.langevin_step(fine, score, 2 * (r * sigma) ** 2, torch.zeros_like(fine))
    return spread_out(p, mean, 2 * r * sigma)


def bias(r):
    step = corrected(torch.eye(len(fine), dtype=double), now, r)
    for _ in range(14):
        step = step @ step
    return (step.mean(1) - masses(now)).abs().sum().item()


ratios = [0.32, 0.16, 0.08]
biases = [bias(r) for r in ratios]
orders = [math.log2(biases[0] / biases[1]), math.log2(biases[1] / biases[2])]
claim("half of r, a quarter of the bias, to 10 %", all(abs(order - 2) < 0.14 for order in orders))

# %% [markdown]
# > **Spot the bug.** The paper's rule has *measured* norms, $\delta = 2\,(r\lVert z\rVert/\lVert\nabla\log p_t\rVert)^2$, and the code of the paper averages them over the batch. *What does the batch average do to a sample? And what if, to avoid this, each sample uses its own norms?* Think of a sample where the score is nearly 0.
#
# To answer the second question we run both rules for $\mathcal N(0, I)$ in $D$ dimensions, with $r = 0.1$, until the clouds have settled, and measure the variance of a coordinate, which should be 1.


# %%
def settled_variance(D, own_norms, r=0.1, steps=200, number=3000):
    x, seen = torch.randn(number, D, generator=g), []
    for _ in range(steps):
        z = torch.randn(number, D, generator=g)
        ratio = z.norm(dim=1) / x.norm(dim=1) if own_norms else torch.ones(number)  # the score is −x
        x = samplers.langevin_step(x, -x, 2 * (r * ratio) ** 2, z)
        seen.append(x.square().mean())
    return torch.stack(seen[steps // 2 :]).mean()


sizes = torch.tensor([4, 8, 16, 32, 64, 128])
own, by_sigma = (torch.stack([settled_variance(D, rule) for D in sizes.tolist()]) for rule in (True, False))
claim("2(rσ)²: the variance is 1/(1 − r²), to 2 %, in every dimension", (by_sigma * 0.99 - 1).abs().max() < 0.02)
claim("own norms: it is (1 + 2/D)², to 8 %", (own / (1 + 2 / sizes) ** 2 - 1).abs().max() < 0.08)
lines = {"own norms": own, "(1 + 2/D)²": (1 + 2 / sizes) ** 2, "2(rσ)²": by_sigma}
plots.curves(sizes, lines, "dimensions, D", "variance of a coordinate", logx=True, colors={"(1 + 2/D)²": style.EXACT})

# %% [markdown]
# With norms of its own a cloud in four dimensions gets more than twice the variance that it should have, and a smaller $r$ does not help. With many dimensions the error is small: for 784 pixels half a per cent, so with images nobody notices.
#
# <details><summary>What is wrong</summary>
#
# With the batch average a sample depends on who else is in the batch: draw it alone, and it comes out different.
#
# With norms of its own, a sample takes long steps where the score is small, and short ones where it is large. It hurries away from the middle and lingers outside. For small $r$ this can be worked out. Write $s$ for the score and average over $z$. The mean of a step is $2r^2D\,s/\lVert s\rVert^2$. Its variance in each direction is $4r^2\,\mathbb E[\lVert z\rVert^2z_i^2]/\lVert s\rVert^2 = 4r^2(D+2)/\lVert s\rVert^2$. A density $p_*$ stays if what the drift carries is what the noise spreads (Fokker–Planck again): $D\,\frac{s}{\lVert s\rVert^2}\,p_* = (D+2)\,\nabla\frac{p_*}{\lVert s\rVert^2}$. With $s = \nabla\log p$ the solution is
#
# $$p_*\propto p^{D/(D+2)}\,\lVert\nabla\log p\rVert^2.$$
#
# No $r$ is left in it. For $\mathcal N(0, I)$ its variance is $(1+2/D)^2$. (This holds for $D\ge3$. In one and two dimensions no density stays at all: near a mode a step may be of any length, and the way back takes ever longer.) `samplers.langevin` has a step that depends on $t$ alone, and its bias goes to 0 with $r$.
#
# </details>

# %%
show_source(samplers.langevin_step)

# %% [markdown]
# ### 5.3 Predictor and corrector
#
# Algorithm 4: a predictor step to the next time, then a corrector step there. (The slide text has $t$ in both lines; after the predictor the state is at $t-1$, and the corrector must have the score of that time.) (The paper's *code* has the two in the other order, corrector first; so `order` is an argument.) With the exact score and 16 predictor steps, short ones near the data, how far is the density from $p_t$ in the end? We push densities, as in 5.1, and take the largest gap between the distribution functions. The corrector has $r = 0.35$, which suits these few steps; with a smaller $r$ it does less, and with $r = 0.6$ its own bias shows. *Would you rather spend the corrector's evaluations on more predictor steps?*


# %%
def law_after(count, corrections=0, order="predictor first", r=0.35):
    """The masses at t = 0.02 after `count` steps of predictor and corrector, pushed as in 5.1."""
    p, times = masses(1.0), (0.02 + 0.98 * torch.linspace(1, 0, count + 1, dtype=double) ** 2).tolist()
    for t, s in zip(times[:-1], times[1:], strict=True):
        if order == "predictor first":
            p = predicted(p, t, s)
        for _ in range(corrections):
            p = corrected(p, s if order == "predictor first" else t, r)
        if order == "corrector first":
            p = predicted(p, t, s)
    return p


# %%
wanted = masses(0.02).cumsum(0)
variants = {
    "none": (16, 0),
    "after each": (16, 1),
    "before each": (16, 1, "corrector first"),
    "two after each": (16, 2),
}
variants |= {"none, 32 steps": (32, 0), "none, 48 steps": (48, 0)}
gap = {name: (law_after(*settings).cumsum(0) - wanted).abs().max().item() for name, settings in variants.items()}
for name, value in gap.items():
    print(f"correction {name:>15}: {value:.4f}")

# %%
claim(
    "a correction takes away more than a quarter of the gap, two of them more than half",
    gap["after each"] < 0.75 * gap["none"] and gap["two after each"] < 0.5 * gap["none"],
)
claim("after is a little better than before, as then the end is corrected, too", gap["after each"] < gap["before each"])
claim(
    "at equal evaluations more predictor steps are better: 32, and 48",
    gap["none, 32 steps"] < gap["after each"] and gap["none, 48 steps"] < gap["two after each"],
)

# %% [markdown]
# With the exact score the corrector repairs what the predictor's long steps break. But here its evaluations would be better spent on shorter steps. What speaks for it is that it also works against errors that come from elsewhere, and that its noise forgets: errors of the past do not add up (section 6.4).
#
# ### 5.4 The probability-flow ODE
#
# With $\eta = 0$ in section 2.1 the noise is gone:
#
# $$\frac{dx}{dt} = f(t)\,x-\tfrac12g^2(t)\,\nabla\log p_t(x).$$
#
# This **probability-flow ODE** has the same densities $p_t$, and an ordinary equation can be solved by any solver for such equations. What moves the point has another reading. Take $x_t = \alpha x_0+\sigma\epsilon$; its velocity along its own straight or curved line is $\alpha'x_0+\sigma'\epsilon$. The ODE moves each point with the *mean* velocity of all the lines that pass there:
#
# $$f x-\tfrac12g^2\,\nabla\log p_t = \mathbb E[\alpha'x_0+\sigma'\epsilon\mid x_t = x] = \alpha'\hat x_0+\sigma'\hat\epsilon.$$
#
# (Put in Tweedie's formula for $\nabla\log p_t$, and $f$ and $g^2$ from 1.3.) In code: `read_as("velocity", d, path)`.
#
# A **solver** turns $dx/dt = u$ into steps. *Euler's*, on the way down, is $x-h\,u(x, t)$, of order 1. *Heun's* takes that step, looks at the velocity where it ends, goes back, and steps with the mean of both: two evaluations, order 2. The classical *Runge–Kutta* rule looks four times and has order 4. *dopri5*, the default of the library `torchdiffeq`, makes two guesses of different orders from the same evaluations, and chooses $h$ so that they agree to a tolerance. (Our `samplers.heun` does Heun's step in the variables $x/\alpha$ and $\sigma/\alpha$, in which the ODE is simplest; see 5.5.)
#
# In one dimension the exact solution is known. Points that move smoothly cannot pass each other, so each keeps its rank: the share of points below it. The ODE's map is the one that keeps $F_t(x_t)$, the distribution function.

# %%
path = VP()
u = read_as("velocity", line.denoiser(path), path)
starts = torch.linspace(-2, 2, 41, dtype=double)[:, None]


def rank(x, t):
    spread = (path.alpha(t) ** 2 * variances + path.sigma(t) ** 2).sqrt()
    return (shares * torch.special.ndtr((x - path.alpha(t) * modes) / spread)).sum(1)


f, half = path.drift(now), path.diffusion2(now) / 2
slow = f * starts - half * line.score(starts, path, now)
claim("α'x̂_0 + σ'ε̂ is f x − ½ g² score", (u(starts, now) - slow).abs().max() < 1e-10)
calls = 0


def counted(t, x):
    global calls
    calls += 1
    return u(x, t)


# %%
ends = torch.tensor([1.0, 0.01], dtype=double)
inside = {"first_step": 0.01, "step_t": ends[1:]}  # else its first step, or its last, may end at a t below 0
library = odeint(counted, starts, ends, rtol=1e-9, atol=1e-9, options=inside)[-1]
claim(
    "the ends of torchdiffeq's solver have the ranks of the starts, to 1e-6",
    (rank(library, 0.01) - rank(starts, 1.0)).abs().max() < 1e-6,
)
counts, errors = [20, 40, 80, 160], []
for n in counts:
    grid = 0.01 + 0.99 * torch.linspace(1, 0, n + 1, dtype=double) ** 2
    errors.append((samplers.last(samplers.heun(line.denoiser(path), path, starts, grid)) - library).abs().mean().item())
order = math.log2(errors[1] / errors[3]) / 2
claim("Heun, over two halvings: order 2, to 0.3", abs(order - 2) < 0.3)
print(f"torchdiffeq asked for the velocity {calls} times")

# %% [markdown]
# `torchdiffeq` chooses its own steps to meet a tolerance. One trap: left alone, it may try a step *beyond* the end and interpolate. For a diffusion model that means a negative time, where the path does not exist. The two options keep it inside.
#
# ### 5.5 On digits
#
# Now the network of notebook 03. It was trained on the cosine path, where the drift is infinite at $t=1$ (no signal is left), so the reverse SDE cannot start there. But what does a denoiser know of a path? It sees a mixture of signal and noise, and needs to know their ratio. So at a time with the *same signal-to-noise ratio* $\alpha^2/\sigma^2$ it serves any other path; only the size of the input must be adapted. `path.logsnr` is the logarithm of that ratio, and `path.time_at` finds the time at which a path has it.

# %%
show_source(on_path)

# %%
digit_model = checkpoints.load("mnist-unet")
labels = torch.arange(10)
eps = torch.randn(10, 1, 28, 28, generator=g)
rows = {}
for name, path in {"cosine": Cosine(), "VP": VP(), "sub-VP": SubVP(), "VE": VE(0.01, 150.0)}.items():
    d = clipped(on_path(lambda xt, t: digit_model(xt, t, y=labels), digit_model.path, path))
    bottom, top = path.time_at(torch.tensor([9.0, -10.0])).tolist()  # where log-SNR is 9 and −10
    grid = torch.linspace(top, bottom, 21, dtype=double).tolist()  # equal steps by the path's own clock
    start = path.sigma(grid[0]).item() * eps
    rows[name] = samplers.last(samplers.heun(d, path, start, [*grid, 0.0]))
apart = max((rows["cosine"] - row).abs().mean() for row in rows.values())
claim("each path by its own clock, the same digits: pixels differ by less than 0.05 on average", apart < 0.05)
plots.rows(list(rows.values()), labels=list(rows))

# %% [markdown]
# *The same digits four times?* Yes, up to what the solver's few steps get wrong. In the variables $x/\alpha$ and $\sigma/\alpha$ the ODE of every Gaussian path is the same equation,
#
# $$\Bigl(\frac x\alpha\Bigr)' = \frac{\alpha'\hat x_0+\sigma'\hat\epsilon}\alpha-\frac{\alpha'}{\alpha^2}(\alpha\hat x_0+\sigma\hat\epsilon) = \hat\epsilon\,\Bigl(\frac\sigma\alpha\Bigr)',$$
#
# and a path only says how fast it is run through. The same holds for the SDE. As $g^2 = \alpha^2(\sigma^2/\alpha^2)'$, forwards $x/\alpha$ is a Brownian motion in the clock $\sigma^2/\alpha^2$, on every path. So a path is a clock and a size, for both; only a solver, with its finite steps, can tell one from another.
#
# **How good, for how many evaluations?** The table has all samplers of this section on the VP path, with equal steps in $t$ down to 0.001, and one evaluation more for the end. A corrector's evaluations count, and Heun's two a step. The corrector has $r = 0.16$. Each point: Fréchet distance of 1,000 digits, by the classifier's features, the mean over two seeds; the bands hold both. *Before you look: which one do you expect in front with 10 evaluations, and which with 200?*

# %%
table = tables.load("mnist-sde")
print(table["what"])
print(table["recipe"])
floor = table["Fréchet distance of real images"]
asked, distance = {}, {}
for kind in dict.fromkeys(row["sampler"]["name"] for row in table["rows"]):
    rows_of = [
        [r for r in table["rows"] if r["sampler"]["name"] == kind and r["seed"] == s] for s in table["vary"]["seed"]
    ]
    asked[kind] = torch.tensor([r["evaluations"] for r in rows_of[0]])
    distance[kind] = torch.tensor([[r["Fréchet distance"] for r in one] for one in rows_of])
figure = plots.curves(asked, distance, "evaluations of the network", "Fréchet distance", logx=True, logy=True)
figure.axes[0].axhline(floor, color=style.NOISE, linewidth=1)
figure

# %%
mean = {
    name: dict(zip(asked[name].round().int().tolist(), values.mean(0).tolist(), strict=True))
    for name, values in distance.items()
}
for evaluations in (10, 20):
    order = sorted(
        measures.SAMPLERS, key=lambda name: min(v for n, v in mean[name].items() if n in (evaluations - 1, evaluations))
    )
    claim(
        f"{evaluations} evaluations: Heun first, then ancestral sampling, then Euler–Maruyama",
        order[:3] == ["Heun", "ancestral", "Euler–Maruyama"],
    )
claim(
    "50 evaluations: the two with a corrector are last",
    min(mean["predictor–corrector"][49], mean["corrector–predictor"][50])
    > max(mean["Heun"][49], mean["ancestral"][50], mean["Euler–Maruyama"][50]),
)
late = [value for name in distance for evaluations, value in mean[name].items() if evaluations >= 99]
claim("from 100 evaluations on: all within 0.03 of the floor", max(abs(value - floor) for value in late) < 0.03)
claim("dopri5 makes more than 60 evaluations, whatever the tolerance", min(mean["dopri5"]) > 60)

# %% [markdown]
# Is the table about this code? We draw the first digits of two of its rows again.

# %%
for setting in ({"name": "Heun", "evaluations": 10}, {"name": "Euler–Maruyama", "evaluations": 10}):
    (row,) = (r for r in table["rows"] if r["sampler"] == setting and r["seed"] == 0)
    now_drawn = torch.tensor(measures.first(setting, digit_model, VP(), seed=0))
    same = (now_drawn - torch.tensor(row["first samples"])).abs().max() < 2e-3
    claim(f"{setting['name']}: the brightness of the row's first 20 digits, drawn anew, agrees to 0.002", same)

# %% [markdown]
# With 10 or 20 evaluations the ODE is in front: Heun's order is 2, that of the others 1. Ancestral sampling comes next. Euler–Maruyama needs about 50, for a step of $h = 0.1$ at $\beta\approx20$ makes $\frac12\beta h = 1$, and that should be far below 1. At equal evaluations the two with a corrector have half the predictor steps, and steps twice as long; so up to 50 they come last. (Measured once: with ancestral sampling as the predictor a corrector gets 0.9 with 20 evaluations, and not 8; ancestral sampling alone gets 0.2.) From 100 evaluations on all are about as near to real digits as real digits are (grey line, the floor of 1,000 against 1,000), and what differs is within the chance of this measure: at 200 evaluations two seeds of one sampler are 0.06 apart. `dopri5` pays for its caution: it makes more than 60 evaluations even when asked for little.
#
# Song and others found the corrector worth its price, with far more evaluations, on another network and other images. An experiment answers the question that was asked.
#
# ## 6. Exact likelihood
#
# ### 6.1 A flow that never stops
#
# The ODE moves points smoothly and can be run both ways. So it is an invertible map from data to noise: a *normalizing flow*, as in notebook 02, made of infinitely many layers. Take one short step, $x' = x+h\,u(x, t)$. The change of variables asks for its log-determinant, and for a matrix near $I$ that is a trace:
#
# $$\log p_{t+h}(x') = \log p_t(x)-\log\bigl|\det(I+h\nabla u)\bigr|,\qquad \log\det(I+hA) = h\,\mathrm{tr}A+O(h^2).$$
#
# Solve for $\log p_t(x) = \log p_{t+h}(x')+h\,\mathrm{tr}\nabla u$, and sum over all steps:
#
# $$\log p_{t_{\min}}(x_{t_{\min}}) = \log p_1(x_1)+\int_{t_{\min}}^1\mathrm{tr}\,\nabla u(x_t, t)\,dt.$$
#
# No layer had to be built so that its determinant is cheap. This is called a **continuous normalizing flow**. Where does it stop? At some $t_{\min}$ above 0, the $\epsilon$ of the papers. At 0 grey levels have no density; and for VP the formula fails there ($\sigma' = \infty$, $\hat\epsilon = 0$), even where the velocity has a limit.

# %%
show_source(likelihood.ode_log_prob)

# %% [markdown]
# **Checked** where the answer is known: log-densities of the three modes in the plane, on five paths. There are two sources of error, and they must be kept apart. One is the solver. The other is the end: the model puts a normal density there, $\mathcal N(0, \sigma^2(1)I)$, but the path's true $p_1$ is not exactly that.

# %%
points, lost = three.sample(20, g), {}
for path in (VP(), SubVP(), VE(0.01, 10.0), Cosine(), Straight()):
    reached = []

    def true_end(x, path=path, reached=reached):
        reached.append(x)
        return three.log_prob(x, path, 1.0)

    log_p = likelihood.ode_log_prob(three.denoiser(path), path, points, prior_log_prob=true_end)
    exact, name = three.log_prob(points, path, 1e-5), type(path).__name__  # 1e-5 is where it stops
    claim(f"{name}: with the true p_1, exact to 1e-4", (log_p - exact).abs().max() < 1e-4)
    end = torch.distributions.Normal(0.0, path.sigma(1.0)).log_prob(reached[0]).sum(1)
    lost[name] = (end - three.log_prob(reached[0], path, 1.0)).abs().max()

# %%
claim(
    "N(0, σ(1)² I) in place of p_1: no change above 1e-6 on the cosine and the straight path",
    lost["Cosine"] + lost["Straight"] < 1e-6,
)
claim(
    "on VP and sub-VP it is a few thousandths of a nat",
    1e-3 < min(lost["VP"], lost["SubVP"]) and max(lost["VP"], lost["SubVP"]) < 0.01,
)
claim("on VE with σ_max = 10 it is more than 0.01", lost["VE"] > 0.01)

# %% [markdown]
# The cosine path and the straight one end in noise exactly; VP keeps a trace of the data, $\alpha(1) = 0.0066$; VE with this $\sigma_{\max}$ keeps much more, as its noise is only about ten times as wide as the data.
#
# ### 6.2 Hutchinson's estimate
#
# For an image the exact trace takes 784 gradients at every evaluation. Section 3.4 has the remedy: $\mathrm{tr}A = \mathbb E\,v^\top\!Av$. How noisy is it? With random signs $v_i = \pm1$
#
# $$v^\top\!Av-\mathrm{tr}A = \sum_{i\ne j}A_{ij}v_iv_j,\qquad \mathrm{Var} = \tfrac12\sum_{i\ne j}(A_{ij}+A_{ji})^2,$$
#
# as the diagonal has no chance in it ($v_i^2 = 1$). With normal $v$ the diagonal adds $2\sum_iA_{ii}^2$. So signs are better, and for a diagonal matrix exact. The mean of $K$ estimates has a $K$-th of the variance.

# %%
A = normal(6, 6)
v = {"signs": normal(200_000, 6).sign(), "normal": normal(200_000, 6)}
estimates = {name: torch.einsum("ni,ij,nj->n", w, A, w) for name, w in v.items()}
both = A + A.T
off_diagonal = (both.square().sum() - both.diagonal().square().sum()) / 2
expected = {"signs": off_diagonal, "normal": off_diagonal + 2 * A.diagonal().square().sum()}
for name, values in estimates.items():
    claim(
        f"{name}: the mean is the trace, to 5 standard errors",
        abs(values.mean() - A.trace()) < 5 * values.std() / len(values) ** 0.5,
    )
    claim(f"{name}: the variance is as derived, to 3 %", abs(values.var() / expected[name] - 1) < 0.03)
groups = estimates["signs"].unflatten(0, (-1, 10)).mean(1)
claim("means of ten: a tenth of the variance, to 5 %", abs(groups.var() / expected["signs"] * 10 - 1) < 0.05)

# %% [markdown]
# ### 6.3 Bits per dimension of digits
#
# A density is not a probability. An image is one of $256^{784}$ grey images, and we want $-\log P(x_0)$ of that. So we must say how the ODE's density at $t_{\min}$ becomes a probability. Two ways:
#
# - **Uniform dequantisation.** Spread each grey level evenly over its bin of width $2/255$, by a uniform $\xi$, and take the density there: $-\log P(x_0)\le-\mathbb E\log p_{t_{\min}}(x_0+\xi) - 784\log\frac2{255}$. This is what notebook 02 did with its flow. But our network has never seen such noise. It thinks that pixels are exact grey levels plus Gaussian noise of deviation $\sigma(t_{\min})$.
# - **The path's own noise.** Draw $x_{t_{\min}} = \alpha x_0+\sigma\epsilon$, as in training, and go from there to the grey level with the last step $L_0$ of notebook 03, section 8. By Jensen's inequality $-\log P(x_0)\le\mathbb E\bigl[\log q(x_{t_{\min}}\mid x_0)-\log p_{t_{\min}}(x_{t_{\min}})+L_0\bigr]$. This is a bound for the model "ODE from 1 to $t_{\min}$, then one noisy step".
#
# We take $t_{\min} = 0.01$, where $\sigma$ is 0.0157 (twice the width of a bin), ten digits with their labels given, one probe for each, and 8 Runge–Kutta steps. (Measured once: with 20 steps the result changes by 0.02. A probe is drawn once and kept on the whole way, so that what is integrated stays smooth in $t$.) Beside it stands the bound of the chain, the *SDE's* counterpart: the same $t_{\min}$, the same last step, and 25 or 100 steps.

# %%
pictures, classes = data.images(data.load("mnist", "test"))
chosen, whose = data.balanced(pictures, classes, 10, g)
path, t_min, d = digit_model.path, 0.01, lambda xt, t: digit_model(xt, t, y=whose)


def squared(steps):
    return t_min + (1 - t_min) * torch.linspace(1, 0, steps + 1, dtype=double) ** 2


# %%
z = torch.randn(chosen.shape, generator=g)
noised = path.perturb(chosen, t_min, z)
log_p = likelihood.ode_log_prob(d, path, noised, squared(8), probes=1, generator=g)
log_q = torch.distributions.Normal(0.0, 1.0).log_prob(z).flatten(1).sum(1) - 784 * math.log(path.sigma(t_min))
with torch.no_grad():
    end = losses.bound_term(d, path, chosen, noised, 0.0, t_min, bins=256)
bits = {"ODE": likelihood.bits_per_dim(log_q - log_p + end, chosen)}
for steps in (25, 100):
    terms = likelihood.bound(
        d, path, chosen, [*squared(steps).tolist(), 0.0], variance="posterior", bins=256, generator=g
    )
    bits[f"chain, {steps} steps"] = likelihood.bits_per_dim(terms.sum(0), chosen)
evenly = chosen + (torch.rand(chosen.shape, generator=g) - 0.5) * 2 / 255
log_p = likelihood.ode_log_prob(d, path, evenly, squared(8), probes=1, generator=g)
bits["ODE, uniform"] = likelihood.bits_per_dim(-log_p, chosen) + math.log2(255 / 2)

# %%
for name, value in bits.items():
    print(f"{name:>17}: {value.mean():.1f} bits per dimension, ± {value.std() / 10**0.5:.1f} for the choice of digits")
claim(
    "on average the ODE's bound is below the chain's of 100 steps",
    bits["ODE"].mean() < bits["chain, 100 steps"].mean() - 0.02,
)
claim("the chain's bound falls with its steps", bits["chain, 25 steps"].mean() > bits["chain, 100 steps"].mean())
# %%
sure = likelihood.bits_per_dim(
    losses.bound_term(lambda xt, t: chosen, path, chosen, noised, 0.0, t_min, bins=256), chosen
)
blur = torch.distributions.Normal(0.0, path.sigma(t_min)).log_prob(evenly - chosen).flatten(1).sum(1)
sure_evenly = likelihood.bits_per_dim(-blur, chosen) + math.log2(255 / 2)
claim(
    "a model that knew each pixel: 1.0 bits by the path's noise, 2.3 by uniform noise, to 0.1",
    abs(sure.mean() - 1.0) < 0.1 and abs(sure_evenly.mean() - 2.3) < 0.1,
)
claim(
    "more than half of the ODE's bits are those of the last step",
    likelihood.bits_per_dim(end, chosen).mean() > bits["ODE"].mean() / 2,
)
claim("uniform dequantisation costs more than half a bit", bits["ODE, uniform"].mean() > bits["ODE"].mean() + 0.5)

# %% [markdown]
# The ODE needs about 2 bits. The chain comes down as its steps get shorter: with few steps it pays for $\Sigma_\theta = \tilde\beta$, which is narrower than the true step back. This is the sum above the integral in section 4, and it falls like $1/T$. But the chain stays above the ODE. In notebook 03 the chain had 200 equal steps down to 0 and a bound of about 2.6 bits: at the smallest $t$, where the noise is as fine as the grey levels, this network is not good, and every error is expensive. So **a number of bits means nothing without $t_{\min}$, the dequantisation and the steps**.
#
# Uniform dequantisation costs a whole bit here, and not by the network's fault: even a model that *knew* every pixel would need 2.3 bits with it, and 1.0 with the path's own noise, as the claim shows. Its density at $t_{\min}$ is blurred by noise twice as wide as a bin, so only a fifth of it lies in the right bin: $\log_25 = 2.3$ bits. The path's own noise does better for two reasons. $\log q$ takes the blur off again; and the first bin of $L_0$ reaches to $-\infty$ and the last to $\infty$: four fifths of the pixels are black, so they lie in the first. Still, more than half of the ODE's bits are $L_0$, the price of stopping at $t_{\min} = 0.01$.
#
# ### 6.4 The ODE's density is not the SDE's
#
# With the exact score, ODE and SDE have the same densities at every $t$. A network is not exact, and then *the two are different models*. The smallest example: data $\mathcal N(0, 1)$ on VP, where $p_t = \mathcal N(0, 1)$ at every $t$ and the score is $-x$. Suppose the network says $s_\theta = -cx$ with $c = 1.1$. Both start from $\mathcal N(0, 1)$. *Which of the two ends nearer to the data?*
#
# The ODE is $dx/dt = -\frac12\beta x+\frac12\beta c x$. Its variance obeys $V' = (c-1)\beta V$. Going down from 1 to 0 it shrinks all the way, and the errors of all times multiply: it ends as $e^{-(c-1)B}$ with $B = \int_0^1\beta = 10.05$. The reverse SDE adds fresh noise at every time. In the time $\tau = 1-t$ its drift is $-(c-\frac12)\beta x$, so by the moment equation $dV/d\tau = -(2c-1)\beta V+\beta$, and that settles at $1/(2c-1)$.

# %%
path, c = VP(), 1.1
B = -2 * path._log_alpha(torch.tensor(1.0)).item()
ode_end = math.exp(-(c - 1) * B)
sde_end = 1 / (2 * c - 1) + (1 - 1 / (2 * c - 1)) * math.exp(-(2 * c - 1) * B)


def wrong(xt, t):
    """The denoiser whose score is −c·x."""
    return path.convert(-c * xt, xt, t, given="score", to="x0")


claim(
    "variance of the ODE's samples: 0.37; of the SDE's: 0.83; of the data: 1",
    abs(ode_end - 0.366) < 1e-3 and abs(sde_end - 0.833) < 1e-3,
)
# %%
start = normal(20_000, 1)
drawn = samplers.last(samplers.euler_maruyama(wrong, path, start, torch.linspace(1, 1e-3, 501), generator=g))
claim("Euler–Maruyama draws with the SDE's variance, to 5 %", abs(drawn.var() / sde_end - 1) < 0.05)
x = torch.linspace(-1.5, 1.5, 7, dtype=double)[:, None]
log_p = likelihood.ode_log_prob(wrong, path, x)
of_the_ode = torch.distributions.Normal(0.0, math.sqrt(ode_end)).log_prob(x)[:, 0]
claim("ode_log_prob is the log-density of the ODE's model, to 1e-3", (log_p - of_the_ode).abs().max() < 1e-3)


# %%
def both_ends(c):
    """The densities that the ODE and the SDE end with, for the score −c·x."""
    x, exponent = torch.linspace(-4, 4, 201), 2 * c - 1
    variances = {
        "data": 1.0,
        "ODE": math.exp(-(c - 1) * B),
        "SDE": (1 - math.exp(-exponent * B)) / exponent + math.exp(-exponent * B),
    }
    lines = {name: (-(x**2) / (2 * v)).exp() / math.sqrt(2 * math.pi * v) for name, v in variances.items()}
    colors = {"data": style.DATA, "ODE": style.MODEL, "SDE": style.GUIDED}
    return plots.curves(x, lines, "x", "density", colors=colors, title=f"score −c·x with c = {c}")


widgets.explore(both_ends, c=([0.9, 0.95, 1.0, 1.05, 1.1, 1.2], 1.1))

# %% [markdown]
# The ODE's samples have variance 0.37, the SDE's 0.83, the data 1. (*Move $c$:* below 1 both come out too wide, above 1 too narrow, and the SDE is always the nearer one.) Here *the SDE forgets*: its drift pulls inwards, $-(c-\frac12)\beta x$, so what went wrong early fades, and fresh noise sets the width. The ODE carries every error to the end. So `ode_log_prob` says how probable the data are under the *ODE's* model. The bound of notebook 03 belongs to the chain, the *SDE's* model. The two numbers of section 6.3 answer two questions, and neither of them bounds the other.
#
# ### 6.5 Encode and interpolate
#
# An invertible map gives every image a code: run the ODE up. Two images can then be mixed in the space of codes. A straight line between two codes of 784 normal numbers passes too near to 0, where no code lies (their length is about $\sqrt{784} = 28$, nearly always). So one walks along the arc: $\cos\phi\;z_a+\sin\phi\;z_b$ with $\phi$ from 0 to $\pi/2$. The label is the null label (10), "no class", both ways.

# %%
path, t_min = digit_model.path, 0.01
none = clipped(lambda xt, t: digit_model(xt, t, y=torch.full((len(xt),), 10)))
velocity = read_as("velocity", none, path)
up = t_min + (1 - t_min) * torch.linspace(0, 1, 21) ** 2


def along(x, times):
    with torch.no_grad():
        return odeint(lambda t, x: velocity(x, t), x, times, method="midpoint")[-1]


# %%
clean = torch.stack([pictures[classes == digit][0] for digit in (4, 1, 3, 9, 7, 8)])
at_bottom = path.perturb(clean, t_min, torch.randn(clean.shape, generator=g))  # the little noise that p_t has there
codes = along(at_bottom, up)
again = along(codes, up.flip(0))
claim("coded and decoded, the pixels are back to 0.03 on average", (again - at_bottom).abs().mean() < 0.03)
length = codes.flatten(1).norm(dim=1)
claim(
    "codes look like noise: mean 0 to 0.15, length 28 to 10 %",
    abs(codes.mean()) < 0.15 and (length / 28 - 1).abs().max() < 0.1,
)
# %%
phi = torch.linspace(0, math.pi / 2, 8)[:, None, None, None]
between = [along(phi.cos() * a + phi.sin() * b, up.flip(0)) for a, b in zip(codes[:3], codes[3:], strict=True)]
plots.rows(between, labels=["4 → 9", "1 → 7", "3 → 8"])

# %% [markdown]
# The ends are the two digits. What lies between is no cross-fade, as mixed pixels would be. Mostly it is a sharp sign of one class or another, and it changes its class in one or two steps. On the way it may pass by a third class, and now and then it is no digit at all.
#
# ## 7. Flows meet diffusion
#
# ### 7.1 The third view: flow matching
#
# Three roads have led to one model. Notebook 03 came from a chain and a bound; this one from an SDE and its score. The third starts from the ODE itself: *learn the velocity.* Each pair of a datum and a noise has its own line, $x_t = \alpha x_0+\sigma\epsilon$, with velocity $\alpha'x_0+\sigma'\epsilon$. The velocity of the flow is the mean of these, given $x_t$ (5.4), and a squared error learns a conditional mean:
#
# $$L_{FM} = \mathbb E\,\bigl\lVert u_\theta(x_t, t)-(\alpha'x_0+\sigma'\epsilon)\bigr\rVert^2.$$
#
# This is **flow matching**. It has the form of denoising score matching, with another target. On the **straight path** $x_t = (1-t)\,x_0+t\,\epsilon$ the target is just $\epsilon-x_0$. It is the same loss in other units: since $\epsilon-\hat\epsilon = -\frac\alpha\sigma(x_0-\hat x_0)$ makes $u-u_\theta = (\alpha'-\sigma'\frac\alpha\sigma)(x_0-\hat x_0)$,
#
# $$\lVert u-u_\theta\rVert^2 = \Bigl(\frac W\sigma\Bigr)^2\lVert x_0-\hat x_0\rVert^2,\qquad W = \alpha\sigma'-\alpha'\sigma;\qquad\text{on the straight path it is }\frac1{t^2}\lVert x_0-\hat x_0\rVert^2.$$
#
# In code it is `losses.simple` with another path and another word. We train it on the circle of section 3.6, with that network, and draw with few steps.

# %%
straight = Straight()
torch.manual_seed(0)
model = Denoiser(nets.MLP(2, width=64, depth=1), straight, predicts="velocity")
batch = training.batches(on_circle, straight, size=256)
flow = training.fit(model, losses.simple, batch, steps=500, lr=5e-3, ema=0.99, precision="float32", progress=False).ema
x0, eps = torch.randn(2, 500, 2, generator=g)
t = torch.rand(500, generator=g) * 0.98 + 0.01
times_w = (1 / t.square() * (x0 - flow(straight.perturb(x0, t, eps), t)).square().sum(1) / 2).mean()
claim(
    "flow matching is the x_0 loss with weight 1/t², to 0.1 %",
    abs(losses.simple(flow, x0, t, eps) / times_w - 1) < 1e-3,
)

# %%
start = torch.randn(400, 2, generator=g)
runs = {
    "straight, learned": (flow, straight, 10),
    "straight, exact": (circle.denoiser(straight), straight, 100),
    "VP, exact": (circle.denoiser(VP()), VP(), 100),
}
made, axes = plots.panels(3, width=10.2, height=3.6)
detour, errors = {}, {}
for ax, (name, (d, path, steps)) in zip(axes, runs.items(), strict=True):
    states = [start, *samplers.heun(d, path, start, path.times(steps))]
    plots.scatter(states[-1], color=style.NOISE, ax=ax, extent=(-3.2, 3.2, -3.2, 3.2))
    plots.trajectories(states, paths=30, ax=ax, extent=(-3.2, 3.2, -3.2, 3.2), title=f"{name}, {steps} steps")
    way = torch.stack(states)
    detour[name] = (way.diff(dim=0).norm(dim=2).sum(0) / (way[-1] - way[0]).norm(dim=1)).median()
    quick = samplers.last(samplers.heun(d, path, start, path.times(10)))
    errors[name] = (quick - states[-1]).norm(dim=1).mean()

# %%
claim(
    "straight path: length over distance is larger than on VP",
    detour["straight, exact"] > detour["VP, exact"],
)
claim("and yet 10 equal steps of Heun err less on them", errors["straight, exact"] < errors["VP, exact"] / 2)

# %% [markdown]
# Grey: where 400 points end; lines: the ways of 30 of them, from open markers to filled ones. *Did you expect straight ways?* Each *pair* of a datum and a noise has a straight line. The flow follows the mean of many lines, and that is not straight: on the straight path, where all is noise, the mean of the data is the best guess, so every point first heads for the middle, and turns when it can tell the modes apart. (On VP it stays about where it is until then.) By 5.5 the flow is VP's own in another size and by another clock. What the straight path has to offer is that clock: with equal steps in $t$ the solver's error is smaller.
#
# ### 7.2 One table
#
# A network may learn $\epsilon$, $x_0$, $v$, the score $s$ or the velocity $u$. Given $x_t$, each is a linear form in $x_0$ and $\epsilon$:
#
# $$x_t = \alpha x_0+\sigma\epsilon,\qquad v = \alpha\epsilon-\sigma x_0,\qquad s = -\epsilon/\sigma,\qquad u = \alpha'x_0+\sigma'\epsilon.$$
#
# So $x_t$ and any one of them are two equations for two unknowns, and every other follows. With $\rho = \alpha^2+\sigma^2$ and $W = \alpha\sigma'-\alpha'\sigma$ (and $x$ for $x_t$):
#
# | given → | $\epsilon$ | $x_0$ | $v$ | $s$ | $u$ |
# |---|---|---|---|---|---|
# | **to** $\epsilon$ | | $(x-\alpha x_0)/\sigma$ | $(\sigma x+\alpha v)/\rho$ | $-\sigma s$ | $(\alpha u-\alpha'x)/W$ |
# | **to** $x_0$ | $(x-\sigma\epsilon)/\alpha$ | | $(\alpha x-\sigma v)/\rho$ | $(x+\sigma^2s)/\alpha$ | $(\sigma'x-\sigma u)/W$ |
# | **to** $v$ | $(\rho\,\epsilon-\sigma x)/\alpha$ | $(\alpha x-\rho\,x_0)/\sigma$ | | $-\sigma(x+\rho\,s)/\alpha$ | $\bigl(\rho\,u-(\alpha\alpha'+\sigma\sigma')x\bigr)/W$ |
# | **to** $s$ | $-\epsilon/\sigma$ | $(\alpha x_0-x)/\sigma^2$ | $-(\sigma x+\alpha v)/(\sigma\rho)$ | | $(\alpha'x-\alpha u)/(\sigma W)$ |
# | **to** $u$ | $(\alpha'x+W\epsilon)/\alpha$ | $(\sigma'x-Wx_0)/\sigma$ | $\bigl((\alpha\alpha'+\sigma\sigma')x+Wv\bigr)/\rho$ | $(\alpha'x-\sigma W s)/\alpha$ | |
#
# Where is an entry undefined? Where it divides by 0, and there *no* formula can help: $x_t$ and the given one say the same thing.
#
# - $\alpha = 0$ (the end of the cosine and the straight path): $x_t$ *is* the noise, and $\epsilon$ or $s$ tell nothing of $x_0$. This is why noise prediction breaks on schedules with no signal left (notebook 04).
# - $\sigma = 0$ (the data's end): $x_t$ is $x_0$, which tells nothing of $\epsilon$; and there is no score.
# - $W = 0$: nowhere between the ends, as $W = -\frac12\alpha\sigma\cdot\frac{d}{dt}\log\mathrm{SNR}$ and the signal-to-noise ratio falls. At an end where a rate is infinite (VP and VE at 0) the entries with $u$ fail, even where $u$ has a limit.
# - $v$ always gives $\epsilon$ and $x_0$, as $\rho>0$: this is its charm. Where $\alpha = 0$, $x_0$, $v$ and $u$ are what can be predicted.
#
# Every entry is linear, so the table holds for the conditional means, too: for what an ideal network says.


# %%
def by_hand(a, S, da, dS):
    """The table, with a = α, S = σ and their rates: (given, to) → function of x_t and the given one."""
    R, W, m = a**2 + S**2, a * dS - da * S, a * da + S * dS
    return {
        ("eps", "x0"): lambda x, e: (x - S * e) / a, ("eps", "v"): lambda x, e: (R * e - S * x) / a,
        ("eps", "score"): lambda x, e: -e / S, ("eps", "velocity"): lambda x, e: (da * x + W * e) / a,
        ("x0", "eps"): lambda x, c: (x - a * c) / S, ("x0", "v"): lambda x, c: (a * x - R * c) / S,
        ("x0", "score"): lambda x, c: (a * c - x) / S**2, ("x0", "velocity"): lambda x, c: (dS * x - W * c) / S,
        ("v", "eps"): lambda x, v: (S * x + a * v) / R, ("v", "x0"): lambda x, v: (a * x - S * v) / R,
        ("v", "score"): lambda x, v: -(S * x + a * v) / (S * R), ("v", "velocity"): lambda x, v: (m * x + W * v) / R,
        ("score", "eps"): lambda x, s: -S * s, ("score", "x0"): lambda x, s: (x + S**2 * s) / a,
        ("score", "v"): lambda x, s: -S * (x + R * s) / a, ("score", "velocity"): lambda x, s: (da * x - S * W * s) / a,
        ("velocity", "eps"): lambda x, u: (a * u - da * x) / W, ("velocity", "x0"): lambda x, u: (dS * x - S * u) / W,
        ("velocity", "v"): lambda x, u: (R * u - m * x) / W, ("velocity", "score"): lambda x, u: (da * x - a * u) / (S * W),
    }  # fmt: skip


# %%
x0, eps, t, one, nil = normal(5, 2), normal(5, 2), 0.37, torch.ones(1, 1, dtype=double), torch.zeros(1, 1, dtype=double)
for path in (VP(), SubVP(), VE(0.01, 10.0), Cosine(), Straight()):
    alpha, sigma = path.alpha(t), path.sigma(t)
    formulas = by_hand(alpha, sigma, *(path.quantity("velocity", *pair, t)[0, 0] for pair in ((one, nil), (nil, one))))
    xt = path.perturb(x0, t, eps)
    known = {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0, "score": -eps / sigma}
    known["velocity"] = path.quantity("velocity", x0, eps, t)
    wrong = [pair for pair, f in formulas.items() if (f(xt, known[pair[0]]) - known[pair[1]]).abs().max() > 1e-10]
    claim(f"{type(path).__name__}: all {len(formulas)} entries hold, to 1e-10", not wrong)

# %% [markdown]
# ## 8. Recap
#
# - An SDE is a recipe for short steps: a drift, which is the rate of the mean, and noise, whose variance has the rate $g^2$. The lecture's chain *is* an Ornstein–Uhlenbeck process, seen at $T$ times.
# - Backwards in time one needs the score, and nothing else. All members of the $\eta$ family have the same densities; $\eta = 0$ is an ODE.
# - A score needs no normaliser. Explicit, denoising and sliced score matching have the same gradient on average; they differ in cost and in noise, and by a constant in value.
# - A denoiser is a score: $\nabla\log p_t = (\alpha\hat x_0-x_t)/\sigma^2$.
# - $\lambda = \sigma^2$ is $L_{simple}$. $\lambda = g^2$ is twice the sum of the $L_{t-1}$, in the limit and away from $t = 0$.
# - Euler–Maruyama has order 1, Heun on the ODE order 2. A corrector repairs the cloud at a fixed $t$.
# - The ODE is a continuous normalizing flow, with exact densities. Its model is not the SDE's, unless the score is exact.
# - Chain, SDE, flow: three roads to one conditional mean. One table turns their networks into one another.
#
# **Pitfalls**
#
# - $dt<0$ on the way back, and the noise's $\sqrt{|dt|}$. A corrector's step is positive and leaves $t$ alone.
# - $g^2$ with noise, $\frac12g^2$ without.
# - The target of denoising score matching is the *conditional* score. Its loss has a floor above 0.
# - Reduced sliced score matching needs $\mathbb E[vv^\top] = I$; length one will not do.
# - A step that depends on the sample's own norms changes the density, and one that depends on the batch's changes with the batch.
# - What predicts noise is $-\sigma$ times a score. Mixed up, the sign and the size are wrong.
# - Adaptive solvers may try times outside $[0, 1]$.
# - Bits per dimension need $t_{\min}$ and the dequantisation beside them.
#
# **Homework:** [six exercises](../homework/hw4_score_sde.ipynb) next to this notebook: the moments of a new SDE, the SDE of a path whose centre moves, score matching with correlated noise, a corrector, the family between ODE and SDE, and a log-density with its standard error.
#
# **References**
#
# - Song, Sohl-Dickstein, Kingma, Kumar, Ermon, Poole: [*Score-Based Generative Modeling through Stochastic Differential Equations*](https://arxiv.org/abs/2011.13456), 2021. The lecture's source for all of this.
# - Anderson: *Reverse-time diffusion equation models*, Stochastic Processes and their Applications 12, 1982.
# - Hyvärinen: [*Estimation of Non-Normalized Statistical Models by Score Matching*](https://jmlr.org/papers/v6/hyvarinen05a.html), 2005.
# - Vincent: *A Connection Between Score Matching and Denoising Autoencoders*, Neural Computation 23, 2011.
# - Song, Garg, Shi, Ermon: [*Sliced Score Matching*](https://arxiv.org/abs/1905.07088), 2019.
# - Song, Ermon: [*Generative Modeling by Estimating Gradients of the Data Distribution*](https://arxiv.org/abs/1907.05600), 2019. Many noise levels, and why.
# - Song, Durkan, Murray, Ermon: [*Maximum Likelihood Training of Score-Based Diffusion Models*](https://arxiv.org/abs/2101.09258), 2021. The weight $g^2$.
# - Kingma, Salimans, Poole, Ho: [*Variational Diffusion Models*](https://arxiv.org/abs/2107.00630), 2021. The bound as an integral over the signal-to-noise ratio.
# - Chen, Rubanova, Bettencourt, Duvenaud: [*Neural Ordinary Differential Equations*](https://arxiv.org/abs/1806.07366), 2018; Grathwohl and others: [*FFJORD*](https://arxiv.org/abs/1810.01367), 2019. Continuous flows, and Hutchinson's trace in them.
# - Karras, Aittala, Aila, Laine: [*Elucidating the Design Space of Diffusion-Based Generative Models*](https://arxiv.org/abs/2206.00364), 2022. One network on many paths.
# - Liu, Gong, Liu: [*Flow Straight and Fast*](https://arxiv.org/abs/2209.03003), 2023. The straight path, under the name of rectified flow.
# - Lipman, Chen, Ben-Hamu, Nickel, Le: [*Flow Matching for Generative Modeling*](https://arxiv.org/abs/2210.02747), 2023.
