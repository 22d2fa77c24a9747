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
# # VAE and GAN: what they aim at, and why we go on
#
# Part 2 of the course begins where part 1 ended: with two ways to draw an image from noise. At the end of this notebook you will be able to
#
# - derive the VAE's bound from $q^* = \arg\min_q \mathrm{KL}[q(z\mid x)\,\Vert\,p(z\mid x)]$, and say what its gap is;
# - say exactly what the slide's "~L2" means, and which variance it hides;
# - predict what a fit by $D_{KL}(p\Vert q)$ looks like, and what one by $D_{KL}(q\Vert p)$;
# - derive the GAN's two losses from binary cross-entropy, and say what the best discriminator measures;
# - see posterior collapse and mode collapse happen, and name a cause of each;
# - compare a VAE, a GAN and a diffusion model of one size on quality, stability and speed.
#
# **Time:** two to three hours to read, with pen and paper; it runs in under a minute on a processor.
# **It builds on** part 1: what a density is, what a neural network is, how gradient descent trains it.
# **Symbols** are those of the lecture; the README's [symbol ledger](../README.md#symbols) lists them all.

# %%
import importlib.util

if importlib.util.find_spec("dgm_course") is None:  # Colab, or a fresh environment
    get_ipython().run_line_magic("pip", "install --quiet dgm-course")

# %%
import math

import sympy
import torch
from torch import nn

from dgm_course import checkpoints, data, divergences, gan, nets, paths, samplers, tables, toy, training, vae
from dgm_course.checks import claim, show_source
from dgm_course.viz import plots, style, widgets

g = torch.Generator().manual_seed(0)  # where nearly all chance in this notebook comes from
digits, labels = data.images(data.load("mnist", "test"))
train_digits, _ = data.images(data.load("mnist", "train"))

# %% [markdown]
# In the cells below, `claim(text, condition)` prints ✓ if the condition holds and stops the notebook if not; `show_source` prints the code of one of the course's functions.
#
# ## 1. The VAE
#
# We want a model of images $x$. A *latent variable* model tells a story in two steps: draw a few numbers $z$ from the *prior* $p(z) = \mathcal N(0, I)$,
# then draw the image from $p(x\mid z)$, whose mean a network, the *decoder*, computes from $z$.
#
# To train it we would maximize the *evidence* $p(x) = \int p(x\mid z)\,p(z)\,dz$ of the images we have. The integral runs over every $z$,
# and almost every $z$ gives a wrong image. We would like to look only where $z$ could have made this $x$. That is the *posterior*
# $p(z\mid x) = p(x\mid z)\,p(z)/p(x)$. And it has the same unknown $p(x)$ in it.
#
# The way out: choose a family of simple distributions $q(z\mid x)$, and take the member that is closest to the posterior.
#
# ### 1.1 From argmin KL to the ELBO
#
# "Close" is measured by the Kullback–Leibler divergence, $D_{KL}(q\Vert p) = \mathbb E_q[\log q - \log p]$. It is never negative, and 0 only for $q = p$. (Logarithms are natural, so divergences are in *nats*; 1 nat is 1.44 bits. The slides write $\mathrm{KL}[q\Vert p]$ and $D_{KL}(q\Vert p)$ for the same thing. $\mathbb E_q$ is the mean over $z\sim q(z\mid x)$.) The slide asks for
#
# $$q^*(z\mid x) = \arg\min_q\ \mathrm{KL}\bigl[q(z\mid x)\,\Vert\,p(z\mid x)\bigr].$$
#
# The target is unknown. Four lines turn this into something we can compute. In each line, look for what changed.
#
# $$\begin{aligned}
# \mathrm{KL}\bigl[q(z\mid x)\Vert p(z\mid x)\bigr]
# &= \mathbb E_q\bigl[\log q(z\mid x) - \log p(z\mid x)\bigr] &&(1)\\
# &= \mathbb E_q\bigl[\log q(z\mid x) - \log p(x\mid z) - \log p(z)\bigr] + \log p(x) &&(2)\\
# &= \mathrm{KL}\bigl[q(z\mid x)\Vert p(z)\bigr] - \mathbb E_q[\log p(x\mid z)] + \log p(x) &&(3)\\
# \log p(x) &= \underbrace{\mathbb E_q[\log p(x\mid z)] - \mathrm{KL}\bigl[q(z\mid x)\Vert p(z)\bigr]}_{\mathrm{ELBO}} + \mathrm{KL}\bigl[q(z\mid x)\Vert p(z\mid x)\bigr] &&(4)
# \end{aligned}$$
#
# Line 1 is the definition. Line 2 puts in Bayes' rule, and takes $\log p(x)$, which has no $z$, out of the mean. Line 3 is the definition once more, read backwards. Line 4 rearranges.
#
# To check four lines, we need a world in which nothing is hidden. Let $z$ take five values and $x$ four, with tables drawn at random. Then every expectation is a short sum.

# %%
p_z = torch.rand(5, generator=g).double().softmax(0)
p_x_given_z = torch.rand(5, 4, generator=g).double().mul(3).softmax(1)
q = torch.rand(5, generator=g).double().mul(3).softmax(0)  # any q(z | x) at all
x = 2  # the x that was observed

p_x = p_z @ p_x_given_z[:, x]
posterior = p_z * p_x_given_z[:, x] / p_x
kl_posterior = (q * (q.log() - posterior.log())).sum()
bayes = (q * (q.log() - p_x_given_z[:, x].log() - p_z.log())).sum() + p_x.log()
kl_prior, fit = (q * (q.log() - p_z.log())).sum(), (q * p_x_given_z[:, x].log()).sum()
claim("line 2 equals line 1", abs(bayes - kl_posterior) < 1e-12)
claim("line 3 equals line 2", abs(kl_prior - fit + p_x.log() - bayes) < 1e-12)
claim("line 4: log p(x) = ELBO + KL to the posterior", abs(fit - kl_prior + kl_posterior - p_x.log()) < 1e-12)

# %% [markdown]
# The underbraced part is the *evidence lower bound*, or ELBO. Line 4 is worth a pause. Its left side has no $q$ in it. So the two terms on the right always have the same sum: what the ELBO gains, the KL to the posterior loses.
# Minimizing the KL that we cannot compute *is* maximizing the ELBO, which we can. The slide writes it as
#
# $$\min_q\ \mathrm{KL}\bigl[q(z\mid x)\,\Vert\,p(z)\bigr] - \mathbb E_q[\log p(x\mid z)].$$
#
# The first term keeps $q(z\mid x)$ close to the prior. The second asks that an image can be told from its code.
#
# As a KL is never negative, the ELBO is a *lower bound*: $\mathrm{ELBO} \le \log p(x)$, with equality exactly for $q = p(z\mid x)$. A simple family of $q$ may not contain the posterior; then its best member leaves a rest.
#
# *(Beside the expression that is minimized the slide text reads "ELBO". With the sign above it is −ELBO: what is minimized is an upper bound on $-\log p(x)$.)*
#
# The decoder is trained on the same number. Written as $\log p_\theta(x) - \mathrm{KL}[q\Vert p_\theta(z\mid x)]$, where $\theta$ are the decoder's weights, the bound says what a step that raises it does: it raises the evidence, or it tightens the bound. This is a compromise. A decoder whose posteriors are nearly Gaussian is preferred to one that explains the data a little better.

# %%
best = (posterior * (p_x_given_z[:, x].log() + p_z.log() - posterior.log())).sum()
claim("another q: the ELBO lies below log p(x)", fit - kl_prior < p_x.log())
claim("q = posterior: the ELBO is log p(x)", abs(best - p_x.log()) < 1e-12)

# %% [markdown]
# ### 1.2 The KL of Gaussians in closed form
#
# The slide notes "force to be Gaussian": $q(z\mid x) = \mathcal N(m, \mathrm{diag}\,s^2)$, where a network, the *encoder*, computes $m$ and $\log s^2$ from $x$. ("diag" means no correlations between latents. The posterior may well have some; homework 1 asks what this costs.)
# Then the first term needs no sampling. For one coordinate the logarithm of the ratio is
#
# $$\log\frac{q(z)}{p(z)} = -\frac{(z-m)^2}{2s^2} - \log s + \frac{z^2}{2},$$
#
# as the two $\frac12\log 2\pi$ cancel. Under $q$ we have $\mathbb E[(z-m)^2] = s^2$ and $\mathbb E[z^2] = m^2+s^2$. Put these in:
#
# $$\mathrm{KL}\bigl[\mathcal N(m,s^2)\Vert\mathcal N(0,1)\bigr] = \tfrac12\bigl(m^2 + s^2 - 1 - \log s^2\bigr).$$
#
# Each part has a job. $m^2$ pulls the mean to 0. $s^2 - 1 - \log s^2$ is 0 at $s = 1$, and grows on both sides. Independent coordinates simply add up.

# %%
z, m = sympy.symbols("z m", real=True)
s = sympy.symbols("s", positive=True)
normal = sympy.exp(-((z - m) ** 2) / (2 * s**2)) / (s * sympy.sqrt(2 * sympy.pi))
log_ratio = -((z - m) ** 2) / (2 * s**2) - sympy.log(s) + z**2 / 2
integral = sympy.integrate(sympy.expand(log_ratio * normal), (z, -sympy.oo, sympy.oo))
closed = (m**2 + s**2 - 1 - sympy.log(s**2)) / 2
claim("the integral is the closed form", sympy.simplify(sympy.expand_log(integral - closed, force=True)) == 0)

# %% [markdown]
# Now by experiment. *Before you look:* with 100,000 draws from $q$, how far off will the mean of $\log q - \log p$ be? (For one draw it has a standard deviation of about 1 nat.) And if someone averages over draws from $p$ instead?

# %%
mean, log_var = torch.tensor(1.5).double(), torch.tensor(-1.0).double()
noise = torch.randn(100_000, generator=g).double()


def log_ratio_at(z):
    return vae.gaussian_log_prob(z[:, None], mean, log_var) - vae.gaussian_log_prob(z[:, None], 0 * mean, 0 * mean)


draws = log_ratio_at(mean + (log_var / 2).exp() * noise)
exact = divergences.standard_kl(mean, log_var)
count = torch.arange(1, len(draws) + 1)
claim("Monte Carlo agrees, within four standard errors", abs(draws.mean() - exact) < 4 * draws.std() / len(draws) ** 0.5)
from_p = log_ratio_at(noise)  # the noise itself is a sample of p
other = divergences.gaussian_kl(0 * mean[None], torch.eye(1).double(), mean[None], log_var.exp().reshape(1, 1))
claim("draws from p measure −KL(p‖q), within four standard errors", abs(from_p.mean() + other) < 4 * from_p.std() / len(draws) ** 0.5)
print(f"KL(q‖p) = {exact:.2f},  −KL(p‖q) = {-other:.2f}: even the sign differs")
at = torch.unique(torch.logspace(1, 5, 200).long()) - 1
lines = {"mean so far": draws.cumsum(0)[at] / count[at], "closed form": exact.expand(len(at))}
plots.curves(count[at], lines, "draws from q", "KL in nats", logx=True, colors={"closed form": style.EXACT});

# %% [markdown]
# With $n$ draws the error is about $1/\sqrt n$ nats: 0.003 for 100,000, a whole nat for one. (Averaging over $p$ gives $\mathbb E_p[\log q-\log p] = -D_{KL}(p\Vert q)$, which is negative.) The closed form needs no draws. In training, every image gets *one* draw, so what can be had in closed form should be.
#
# Between two arbitrary Gaussians, with means $m_p, m_q$ and covariances $C_p, C_q$, the four parts remain. Here $p$ is the first argument:
#
# $$D_{KL}(p\Vert q) = \tfrac12\Bigl((m_q-m_p)^\top C_q^{-1}(m_q-m_p) + \mathrm{tr}\,C_q^{-1}C_p - d + \log\tfrac{\det C_q}{\det C_p}\Bigr)$$
#
# in $d$ dimensions. $m^2$ has become a distance measured in $q$'s units, $s^2$ a trace. A KL is not symmetric:

# %%
wide, narrow = 4 * torch.eye(2).double(), torch.eye(2).double()
origin, there = torch.zeros(2).double(), torch.tensor([3.0, 0.0]).double()
forward = divergences.gaussian_kl(origin, narrow, there, wide)
backward = divergences.gaussian_kl(there, wide, origin, narrow)
print(f"KL(narrow ‖ wide) = {forward:.3f} nats,  KL(wide ‖ narrow) = {backward:.3f} nats")
theirs = torch.distributions.MultivariateNormal
same = torch.distributions.kl_divergence(theirs(origin, narrow), theirs(there, wide))
claim("the closed form is that of torch.distributions", abs(same - forward) < 1e-12)
claim("swapped, it is another number", abs(forward - backward) > 0.1)

# %% [markdown]
# The second is larger: half of the wide one's draws land where the narrow one says "almost impossible".
#
# ### 1.3 What "~L2" means
#
# The slide writes "~L2" under $-\mathbb E_q[\log p(x\mid z)]$. Which L2? Take a decoder that says $p(x\mid z) = \mathcal N(\hat x(z), \sigma^2 I)$, for an image of $D$ pixels. (This $\sigma$ belongs to the decoder; the $s$ of section 1.2 belongs to $q(z\mid x)$.)
#
# $$-\log p(x\mid z) = \frac{\lVert x - \hat x\rVert^2}{2\sigma^2} + \frac D2\log(2\pi\sigma^2).$$
#
# So it is the squared error, *if we say what $\sigma^2$ is*. Three answers are in use.
#
# 1. **$\sigma^2 = \tfrac12$**: exactly the squared error, plus a constant. This is what code that adds "MSE + KL" assumes, if it sums over pixels.
#    If it averages over pixels, it has assumed $\sigma^2 = D/2$: with 784 pixels, 392. The KL then weighs 784 times as much.
# 2. **$\sigma^2$ as a knob.** Multiply everything by $2\sigma^2$: squared error $+\ 2\sigma^2\,\mathrm{KL}$. Weighting the KL by a number β is called a β-VAE (Higgins et al., 2017); here β $= 2\sigma^2$.
# 3. **$\sigma^2$ fitted.** Set the derivative to zero: $\sigma^2 = \lVert x-\hat x\rVert^2/D$, the mean squared error. Then the term is $\frac D2\log(2\pi e\,\mathrm{MSE})$, a *logarithm* of the squared error.
#    (For one image and one $z$. One $\sigma^2$ for all of them becomes the mean of the squared error over the data *and* over the draws of $z$.)

# %%
error, var, size = sympy.symbols("E s D", positive=True)  # squared error, variance, number of pixels
nll = error / (2 * var) + size / 2 * sympy.log(2 * sympy.pi * var)
claim("σ² = ½ is the squared error, up to a constant", sympy.diff(nll.subs(var, sympy.Rational(1, 2)), error) == 1)
claim("mean over pixels + KL is the variance D/2", sympy.diff(nll.subs(var, size / 2), error) == 1 / size)
claim("the best variance is the mean squared error", sympy.solve(sympy.diff(nll, var), var) == [error / size])
at_best = nll.subs(var, error / size) - size / 2 * sympy.log(2 * sympy.pi * sympy.E * error / size)
claim("there the term is D/2 · log(2πe·MSE)", sympy.simplify(sympy.expand_log(at_best)) == 0)

# %% [markdown]
# The same on a digit. We compress digits to 16 numbers by principal axes (section 1.4 says what that has to do with a VAE), and ask how $-\log p$ of one digit depends on the variance that we claim.

# %%
flat = train_digits.flatten(1).double()
axes16 = vae.principal(flat, 16, var=1e-3)
one = digits[:1].flatten(1).double()
code, _ = axes16.posterior(one)
rebuilt = code @ axes16.weight.T + axes16.bias
mse = (one - rebuilt).square().mean()
claimed = torch.logspace(-2, 0.5, 200).double()
per_pixel = torch.stack([-vae.gaussian_log_prob(one, rebuilt, v.log())[0] / 784 for v in claimed])
fig = plots.curves(claimed, {"this digit": per_pixel}, "variance σ² that is claimed", "−log p per pixel", logx=True)
fig.axes[0].plot(mse, 0.5 * (2 * math.pi * math.e * mse).log(), "o", color=style.EXACT)
fig.axes[0].annotate("σ² = MSE", (mse, 0.5), color=style.EXACT)
claim("the minimum lies at the mean squared error", abs(claimed[per_pixel.argmin()] / mse - 1) < 0.02)

# %% [markdown]
# Claim too small a variance, and every error costs dearly. Claim too large a one, and you pay for uncertainty that is not there. The VAE below learns $\sigma^2$, one number for all pixels.
#
# ### 1.4 A model where the gap can be seen
#
# In general neither evidence nor posterior is known. There is one model where both are: the linear one.
#
# $$z\sim\mathcal N(0, I),\qquad x = Wz + b + \sigma\,\epsilon.$$
#
# Everything in it is Gaussian, so (Tipping and Bishop, 1999)
#
# $$p(x) = \mathcal N(b,\ WW^\top+\sigma^2 I),\qquad p(z\mid x) = \mathcal N\bigl(M^{-1}W^\top(x-b),\ \sigma^2M^{-1}\bigr),\qquad M = W^\top W+\sigma^2 I.$$
#
# The first is clear: covariances of independent parts add. For the second, collect the terms of $\log p(x\mid z)+\log p(z)$ that are quadratic in $z$: they are $-\frac1{2\sigma^2}z^\top Mz$.
#
# For fixed $\sigma^2$, a $W$ that makes the data most probable is made of principal axes, the directions in which the data vary most (`vae.principal`). This is a VAE whose encoder and decoder are linear. Its ELBO can be computed without sampling, for any Gaussian $q = \mathcal N(m, C)$: the mean of the squared error is that at the mean plus a spread, $\mathbb E_q\lVert x-b-Wz\rVert^2 = \lVert x-b-Wm\rVert^2+\mathrm{tr}\,WCW^\top$. (The `einsum` is this trace.)

# %%
show_source(vae.LinearGaussian.terms)

# %% [markdown]
# Now line 4 of section 1.1 on real digits, shrunk to 7×7 pixels, with a model of 8 latents. We take any $q$ we like: a random mean and a random covariance.

# %%
small = nn.functional.avg_pool2d(train_digits, 4).flatten(1).double()
model = vae.principal(small, 8, var=0.05)
seen = small[:100]
root = torch.randn(8, 8, generator=g).double()
mean, cov = torch.randn(100, 8, generator=g).double(), root @ root.T / 8 + 0.1 * torch.eye(8)
fit, kl = model.terms(seen, mean, cov)
gap = model.log_evidence(seen) - (fit - kl)
to_posterior = divergences.gaussian_kl(mean, cov, *model.posterior(seen))
claim("the gap of the bound is the KL to the posterior, to 1e-10", (gap - to_posterior).abs().max() < 1e-10)
fit, kl = model.terms(seen, *model.posterior(seen))
claim("q = posterior closes the gap, to 1e-10", (model.log_evidence(seen) - fit + kl).abs().max() < 1e-10)
weight = model.weight.clone().requires_grad_()
average = vae.LinearGaussian(weight, model.bias, model.var).log_evidence(small).mean()
claim("no small change of W raises the mean evidence: its gradient is 0", torch.autograd.grad(average, weight)[0].abs().max() < 1e-8)

# %% [markdown]
# *Before you move the slider:* $q$ is the posterior with its standard deviation multiplied by a factor. At which factor does the gap close? Which costs more, half the deviation or twice the deviation?


# %%
def elbo_at(factor):
    mean, cov = model.posterior(seen)
    fit, kl = model.terms(seen, mean, factor**2 * cov)
    return (fit - kl).mean()


def draw_gap(factor):
    factors, evidence = torch.linspace(0.15, 2.6, 100).double(), model.log_evidence(seen).mean()
    lines = {"log p(x)": evidence.expand(100), "ELBO": torch.stack([elbo_at(f) for f in factors])}
    colors = {"log p(x)": style.EXACT, "ELBO": style.DATA}
    made = plots.curves(factors, lines, "deviation of q, times the posterior's", "nats for a digit", colors=colors)
    made.axes[0].plot([factor] * 2, [elbo_at(factor), evidence], color=style.MODEL, linewidth=4, label="KL to the posterior")
    made.axes[0].legend(loc="lower left")
    return made


widgets.explore(draw_gap, factor=([0.2, 0.4, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 2.5], 0.4))

# %% [markdown]
# The orange bar fills what the ELBO lacks, exactly, and vanishes at factor 1. For a factor $f$ and $k$ latents it is $\frac k2(f^2-1-\log f^2)$: half the deviation costs 0.32 nats for each latent, twice costs 0.81. (This is section 1.2 with mean 0 and deviation $f$: a KL does not change when $z$ is rescaled. And $\log p(x)$ may well be positive: a density can exceed 1.)
#
# ### 1.5 A convolutional VAE on digits
#
# With networks in place of matrices nothing changes in the recipe. The only new thing is how the gradient passes a random draw: write $z = m + s\,\epsilon$ with $\epsilon\sim\mathcal N(0, I)$ (the *reparameterization trick*).
# The chance is now in $\epsilon$, which has no parameters, and $z$ is an ordinary function of $m$ and $s$.

# %%
show_source(vae.VAE.terms)
show_source(vae.loss)

# %% [markdown]
# The loss divides *both* terms by the number of pixels, so their balance stays that of the ELBO. Dividing only one would be the mistake of section 1.3.

# %% [markdown]
# A short live training shows the two terms at work. *Before you look:* minus the ELBO is the sum of two terms. While it falls, must both of them fall? (`training.fit` asks `batch(step)` for a dictionary and hands it to the loss by name; `watch` is called now and then; `scaled` picks a short training on a processor and a longer one on a GPU.)


# %%
def batch(step):
    chosen = torch.randint(len(train_digits), (128,), generator=torch.Generator().manual_seed(step))
    eps = torch.randn(128, 16, generator=torch.Generator().manual_seed(1_000_000 + step))
    return {"x": train_digits[chosen], "eps": eps}


def watch(fit):
    with torch.no_grad():
        reconstruction, kl = live.terms(digits[:500], fixed_eps)
    steps.append(fit.step)
    costs.append([-reconstruction.mean().item(), kl.sum(1).mean().item()])


# %%
fixed_eps = torch.randn(500, 16, generator=g)
torch.manual_seed(0)
live, steps, costs = vae.ConvVAE(latent=16, width=16), [], []
training.fit(live, vae.loss, batch, steps=training.scaled(cpu=120, gpu=5000), precision="float32", watch=watch, watch_every=8)
made, (left, right) = plots.panels(2, width=8.0, height=3.0)
cost = torch.tensor(costs).T
plots.curves(torch.tensor(steps), {"−log p(x | z)": cost[0]}, "training step", "nats", ax=left)
plots.curves(torch.tensor(steps), {"KL": cost[1]}, "training step", "nats", ax=right)
claim("the reconstruction term falls", cost[0, -1] < 0.5 * cost[0, 0])
claim("the KL ends well above its lowest value", cost[1, -1] > 1.3 * cost[1].min() and cost[1].argmin() < len(steps) - 3)

# %% [markdown]
# No. The KL first falls, while the encoder has nothing to say yet, and then rises. All that the decoder learns about the digit has to pass through $z$, and the KL is its price. It is worth paying as long as a nat of KL saves more than one in the other term. (The left curve may well go below 0 later, as a density can exceed 1.)
#
# The rest of this section uses a VAE that was trained for 6,000 steps (`dgm-course train mnist-vae`). First its reconstructions: encode a digit, decode the mean of $q$.

# %%
trained = checkpoints.load("mnist-vae")
with torch.no_grad():
    again = trained.decode(trained.encode(digits[:10])[0])
plots.rows([digits[:10], again], ["digit", "decoded"])

# %%
noise = torch.randn(10, 16, generator=g)
with torch.no_grad():
    means = trained.decode(noise)
    drawn = means + (0.5 * trained.log_var).exp() * torch.randn(means.shape, generator=g)
claim("the pixels' learned deviation lies between 0.1 and 0.3", 0.1 < (0.5 * trained.log_var).exp() < 0.3)
plots.rows([means, drawn], ["mean of p(x | z)", "drawn from p(x | z)"])

# %% [markdown]
# Reconstructions are good and a little soft. Among the samples of the first row many are no digit: the prior also draws codes that lie between those of real digits. Papers show this row. The second row is what the model really says: the mean *and* independent noise on every pixel.
# A Gaussian with independent pixels cannot say "the stroke is here or there". Where it is unsure it answers with the mean of the two, and the mean of two sharp strokes is a blur.
#
# With two latents only, the whole latent space fits on a page (`dgm-course train mnist-vae-2d`). We decode a grid of points, spaced so that each cell has the same probability under the prior. *Before you look:* which classes will be neighbours? Which one will stand alone?

# %%
flatland = checkpoints.load("mnist-vae-2d")
quantiles = torch.special.ndtri(torch.linspace(1 / 30, 29 / 30, 15))
corners = torch.stack(torch.meshgrid(quantiles, quantiles.flip(0), indexing="xy"), -1).reshape(-1, 2)
with torch.no_grad():
    tiles = flatland.decode(corners).reshape(15, 15, 28, 28).transpose(1, 2).reshape(15 * 28, 15 * 28)
    codes, _ = flatland.encode(digits)
made, (left, right) = plots.panels(2, width=9.0, height=4.4)
left.imshow(tiles, cmap="gray", vmin=-1, vmax=1)
left.set(xticks=[], yticks=[], title="decoded from a grid")
for digit in range(10):
    right.plot(*codes[labels == digit][:120].T, ".", markersize=4, color=f"C{digit}" if digit < 8 else ["#6A3D9A", "#B15928"][digit - 8])
    right.annotate(str(digit), codes[labels == digit].median(0).values.tolist(), fontsize=15, weight="bold")
right.plot([-1.83, 1.83, 1.83, -1.83, -1.83], [-1.83, -1.83, 1.83, 1.83, -1.83], ":", color=style.EXACT)
right.set(xlabel="z₁", ylabel="z₂", title="where digits are encoded", xlim=(-4.5, 4.5), ylim=(-4.5, 4.5))
made

# %% [markdown]
# 4, 9 and 7 share one region, 3, 5 and 8 another: these are the digits that look alike. The ones stand alone, far to the right, where the prior hardly ever draws. On the way from one class to another there are shapes that are neither. The right picture shows where the encoder puts test digits, each at the mean of its $q$. It reaches further than the left one, which covers the dotted square.
#
# ### 1.6 Posterior collapse
#
# A latent costs KL. If using it saves less than it costs, the best thing to do with it is nothing: $q(z_i\mid x) = p(z_i)$ for every $x$, at a cost of 0. The latent has *collapsed*.
#
# The linear model with a fixed $\sigma^2$ says exactly when. In one dimension it is easy to see. The model gives the data the variance $w^2+\sigma^2$, and this should be their variance $\lambda$. So $w^2 = \lambda-\sigma^2$ if that is positive, and otherwise $w = 0$. In more dimensions the same happens on each principal axis.
#
# Now give the KL a weight $\beta$ (Higgins et al., 2017). Dividing $\lVert\cdot\rVert^2/2\sigma^2 + \beta\,\mathrm{KL}$ by $\beta$ shows that the best $W$ is that of a plain model with the variance $\beta\sigma^2$ (Tipping and Bishop, 1999; Lucas et al., 2019):
#
# $$W = U\,(\Lambda-\beta\sigma^2 I)_+^{1/2}.$$
#
# The columns of $U$ are the principal axes of the data (eigenvectors of their covariance), and $\Lambda$ holds the variances $\lambda_i$ along them (the eigenvalues). $(\cdot)_+$ replaces negative numbers by 0. An axis with $\lambda_i \le \beta\sigma^2$ gets length 0. Here collapse is no accident of training: it is the optimum. (In a deep VAE, training can also get stuck in a collapse that is not optimal.) And an axis in use carries, on average over the data, a KL of exactly $\frac12\log\frac{\lambda_i}{\beta\sigma^2}$. (The posterior's variance is $s^2 = \beta\sigma^2/\lambda_i$. On average over the data $m^2+s^2 = 1$, so of section 1.2's formula only $-\frac12\log s^2$ is left.)

# %%
beta_var = 0.8  # β·σ²
model = vae.principal(flat, 60, beta_var)
mean, cov = model.posterior(flat)
carried = divergences.standard_kl(mean, cov.diagonal().log().expand_as(mean)).mean(0)
eigenvalues, eigenvectors = torch.linalg.eigh((flat - flat.mean(0)).T @ (flat - flat.mean(0)) / len(flat))
all_variances, axes_of_data = eigenvalues.flip(0)[:64], eigenvectors.flip(1)[:, :64]
predicted = 0.5 * (all_variances[:60] / beta_var).clamp(min=1).log()
claim("KL of each latent = ½ log(λ / βσ²), and 0 below", (carried - predicted).abs().max() < 1e-8 and 0 in predicted)
print("largest variances of the axes:", [round(v, 1) for v in all_variances[:4].tolist()])

# %% [markdown]
# *Before you move the slider:* with σ² = 0.1 and the variances above, at which β has every latent collapsed? And at which can you no longer read the digits?


# %%
def collapse(beta):
    weight = axes_of_data * (all_variances - 0.1 * beta).clamp(min=0).sqrt()  # W, as above
    model = vae.LinearGaussian(weight, flat.mean(0), 0.1 * beta)
    mean, _ = model.posterior(digits[:6].flatten(1).double())
    shown = (mean @ model.weight.T + model.bias).float().reshape(6, 1, 28, 28)
    used = 0.5 * (all_variances / (0.1 * beta)).clamp(min=1).log()
    made, axes = plots.panels(2, width=9.0, height=2.8)
    axes[0].imshow(torch.cat([digits[:6], shown]).reshape(2, 6, 28, 28).transpose(1, 2).reshape(56, 168), vmin=-1, vmax=1)
    axes[0].set(xticks=[], yticks=[], title=f"digits, and decoded at β = {beta}")
    axes[1].bar(range(1, 65), used, color=style.MODEL)
    axes[1].set(xlabel="latent", ylabel="KL in nats", ylim=(0, 4), title=f"{int((used > 0).sum())} of 64 latents in use")
    return made


widgets.explore(collapse, beta=([1, 3, 10, 20, 40, 80, 120, 160, 240], 10))

# %% [markdown]
# As β grows the latents go out one after the other, the least important first. The largest variance is 21.1, so the last one goes out at β = 211, and then every digit is decoded to the same thing: the mean of the data. At β = 40 twelve are left; the 2 is decoded as something like a 3, the 4 as something like a 9.
#
# Does a convolutional VAE do the same? Here it was trained anew for seven values of β, with σ² held fixed (`dgm-course train mnist-collapse`).

# %%
table = tables.load("mnist-collapse")
beta = torch.tensor([row["beta"] for row in table["rows"]])
used = torch.tensor([row["latents in use"] for row in table["rows"]]).float()
sigma2 = math.exp(-2.0)  # the variance that was held fixed
linear = torch.tensor([int((all_variances[:16] > b * sigma2).sum()) for b in beta]).float()
lines = {"convolutional VAE": used, "linear model": linear}
plots.curves(beta, lines, "β", "latents in use, of 16", logx=True, colors={"linear model": style.EXACT})

# %% [markdown]
# A latent counts as used if it carries more than 0.01 nats, in the linear model if $\lambda_i>\beta\sigma^2$. Only at β = 30 do the two differ: 16 in use, where the linear model keeps 12. A decoder that can bend need not drop a latent where a straight axis must. (One run for each β, of 800 steps.)
#
# ### 1.7 Importance weighting: a bound that tightens
#
# The ELBO is the mean, under $q$, of $\log w$ with $w = p(x\mid z)p(z)/q(z\mid x)$, while the evidence is the logarithm of the mean of the same $w$, as $\mathbb E_q[w] = \int p(x\mid z)\,p(z)\,dz = p(x)$. By Jensen's inequality a mean of logarithms is at most the logarithm of the mean. So average a few weights *before* taking the logarithm (Burda et al., 2016):
#
# $$L_K = \mathbb E\Bigl[\log\frac1K\sum_{j=1}^K \frac{p(x\mid z_j)\,p(z_j)}{q(z_j\mid x)}\Bigr],\qquad \mathrm{ELBO} = L_1 \le L_2 \le \dots \to \log p(x).$$
#
# The bounds never fall as $K$ grows. That they reach the evidence needs a condition, for example that $w$ is bounded, as it is for a $q$ wider than the posterior.
#
# Where the evidence is known, we can watch it arrive: the linear model on 7×7 digits, with a $q$ that has the right mean and twice the right deviation.

# %%
model = vae.principal(small, 8, var=0.05)
_, posterior_cov = model.posterior(seen)
twice = (4 * posterior_cov.diagonal()).log()  # log-variances for twice the deviation


def encode(x):
    return torch.cat([model.posterior(x)[0], twice.expand(len(x), 8)], dim=1)


linear_vae = vae.VAE(encode, lambda z: z @ model.weight.T + model.bias, 8, math.log(0.05)).double()
powers = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
eps = torch.randn(512, 100, 8, generator=g).double()
with torch.no_grad():
    bounds = torch.stack([vae.importance_bound(linear_vae, seen, eps[:k]).mean() for k in powers])
evidence = model.log_evidence(seen).mean()
lines = {"bound": bounds, "log p(x)": evidence.expand(len(powers))}
plots.curves(torch.tensor(powers), lines, "K, draws for each digit", "nats", logx=True, colors={"log p(x)": style.EXACT})

# %%
claim("512 draws come within 0.2 nats of the evidence", evidence - bounds[-1] < 0.2)
expected_gap = 8 / 2 * (4 - 1 - math.log(4))  # of the ELBO, by the formula of section 1.4 for the factor 2 and 8 latents
one_draw = torch.stack([vae.importance_bound(linear_vae, seen, eps[k : k + 1]) for k in range(100)]).mean(1)
claim("one draw lacks 6.45 nats on average, as section 1.4 says", abs(evidence - one_draw.mean() - expected_gap) < 4 * one_draw.std() / 10)

# %% [markdown]
# Most of the gap is gone after some dozens of draws. For the convolutional VAE the evidence is unknown, and the largest of these lower bounds is the tightest:

# %%
with torch.no_grad():
    eps = torch.randn(64, 50, 16, generator=g)
    tighter = [vae.importance_bound(trained, digits[:50], eps[:k]).mean().item() for k in (1, 8, 64)]
claim("L₁ < L₈ < L₆₄ on 50 digits", tighter[0] < tighter[1] < tighter[2])
print("L₁, L₈, L₆₄ in nats for a digit:", [round(value) for value in tighter])

# %% [markdown]
# ## 2. Effect of framing
#
# We fitted $q$ to the posterior by $D_{KL}(q\Vert p)$. Why not $D_{KL}(p\Vert q)$? The slide asks it as a riddle. Data come from a mixture of two Gaussians, drawn below. We may use *one* Gaussian $q$.
# Which $q$ minimizes $D_{KL}(p\Vert q)$, and which $D_{KL}(q\Vert p)$? Three candidates are drawn: in blue the data's density $p$, in orange, for each candidate $q$, the ellipse at two standard deviations. **Write down your two answers before you read on.**

# %%
means = torch.tensor([[-2.0, -1.0], [2.0, 1.0]]).double()
p = toy.GaussianMixture(means, torch.tensor([0.6, 0.6]).double())
angle = torch.linspace(0, 2 * math.pi, 100).double()


def ellipse(ax, mean, cov, **look):
    circle = 2 * torch.stack([angle.cos(), angle.sin()])
    ax.plot(*(mean[:, None] + torch.linalg.cholesky(cov) @ circle), **look)


made, axes = plots.panels(3, width=9.5, height=3.2, share=True)
candidates = [(p.mean, p.cov), (means[0], 0.6 * torch.eye(2).double()), (p.mean, 0.3 * torch.eye(2).double())]
for ax, (mean, cov), name in zip(axes, candidates, "ABC", strict=True):
    plots.density(p.log_prob, extent=(-5, 5, -4, 4), ax=ax, title=name)
    ellipse(ax, mean, cov, color=style.MODEL)

# %% [markdown]
# ### 2.1 KL(p‖q): the fit that must cover
#
# Write it out: $D_{KL}(p\Vert q) = \mathbb E_p[\log p] - \mathbb E_p[\log q]$. The first part has no $q$. For a Gaussian $q$ with mean $m$ and covariance $C$ the second is
#
# $$-\mathbb E_p[\log q] = \tfrac12\log\det(2\pi C) + \tfrac12\,\mathbb E_p\bigl[(x-m)^\top C^{-1}(x-m)\bigr],$$
#
# which asks of $p$ nothing but its mean and covariance. Setting the derivatives to zero gives $m = \mathbb E_p[x]$ and $C = \mathrm{Cov}_p[x]$: **match the moments**. Call this Gaussian $q^*$.
#
# It is the only minimum. As $\log q$ is quadratic in $x$, its mean under $p$ is its mean under $q^*$, which has the same moments. Hence $\mathbb E_p[\log q^*-\log q] = \mathbb E_{q^*}[\log q^*-\log q]$, and for every Gaussian $q$ we have $D_{KL}(p\Vert q) = D_{KL}(p\Vert q^*) + D_{KL}(q^*\Vert q)$, and the last term is 0 for $q = q^*$ only. For a mixture the covariance is that *within* the components plus that *between* their means.

# %%
line = torch.linspace(-9, 9, 181, dtype=torch.float64)
plane = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).reshape(-1, 2)
cell = (line[1] - line[0]).item() ** 2


def log_normal(mean, cov):
    return torch.distributions.MultivariateNormal(mean, cov).log_prob(plane)


mean, root = p.mean.clone().requires_grad_(), torch.linalg.cholesky(p.cov).clone().requires_grad_()
covering = divergences.kl(p.log_prob(plane), log_normal(mean, root @ root.T), cell)
slope = torch.autograd.grad(covering, [mean, root])
claim("at the moments of p both gradients vanish", all(s.abs().max() < 1e-6 for s in slope))
others = [(p.mean + 0.3, p.cov), (p.mean, 1.3 * p.cov), (p.mean, 0.8 * p.cov), candidates[1], candidates[2]]
for m, c in others:
    worse = divergences.kl(p.log_prob(plane), log_normal(m, c), cell) - covering
    claim("another Gaussian is worse, by KL(q*‖q)", abs(worse - divergences.gaussian_kl(p.mean, p.cov, m, c)) < 1e-6)

# %% [markdown]
# So the answer to the first question is **A**. Why must it cover? Where $p(x) > 0$ and $q(x)\to0$, the ratio $\log p/q$ explodes. $D_{KL}(p\Vert q)$ punishes a $q$ that calls data impossible, and hardly minds one that puts mass where there are no data.
# Fitting by maximum likelihood is this divergence: $-\mathbb E_p[\log q]$ is the negative log-likelihood of data under the model $q$.
#
# ### 2.2 KL(q‖p): the fit that may choose
#
# Now the expectation is under $q$: $D_{KL}(q\Vert p) = \mathbb E_q[\log q - \log p]$. There is no closed form, so we descend, from several starts. *How many different ends do you expect?*

# %%
starts = torch.tensor([[-3.0, 0.0], [3.0, 0.5], [-0.5, 2.0], [0.6, -2.0], [1.0, 3.0], [-1.0, -3.0]]).double()
found = [divergences.nearest_reverse(p.log_prob, start, torch.eye(2).double()) for start in starts]
made, axes = plots.panels(2, width=8.4, height=3.6, share=True)
for ax, name in zip(axes, ["KL(p‖q): one answer", "KL(q‖p): six starts"], strict=True):
    plots.density(p.log_prob, extent=(-5, 5, -4, 4), ax=ax, title=name)
ellipse(axes[0], p.mean, p.cov, color=style.MODEL)
for start, (mean, cov, _) in zip(starts, found, strict=True):
    ellipse(axes[1], mean, cov, color=style.MODEL)
    axes[1].annotate("", mean.tolist(), start.tolist(), arrowprops={"arrowstyle": "->", "color": style.NOISE})

# %%
on_mode = [bool((mean - means).norm(dim=1).min() < 0.05) for mean, *_ in found]
values = torch.stack([value for *_, value in found])
sides = sorted(float(mean[0].sign()) for (mean, *_), on in zip(found, on_mode, strict=True) if on)
claim("two starts end on each component, two between them", sides == [-1, -1, 1, 1])
claim("on a component the divergence is log 2, to 0.01", (values[on_mode] - math.log(2)).abs().max() < 0.01)
claim("the end in between is a worse minimum", all(values[[not on for on in on_mode]] > 0.74))
c_mean, c_cov = candidates[2]
for_c = divergences.kl(log_normal(c_mean, c_cov), p.log_prob(plane), cell)
claim("candidate C is worse than all of them", for_c > values.max() + 1)

# %% [markdown]
# Each arrow leads from a start to the mean where its descent ends. Three ends, and the start decides. (These modes are 5.8 standard deviations apart, and the end in between is only a little worse: 0.75 against 0.69. Section 2.4 varies the distance.) The two best are **B** and its mirror image, with the same divergence. Between the components lies a third, local minimum.
# Where $q(x) > 0$ and $p(x)\to0$, now $\log q/p$ explodes: $D_{KL}(q\Vert p)$ punishes a $q$ that puts mass where there are no data, and hardly minds one that misses half of them.
# Missing half costs just $\log 2 = 0.69$: on its mode $q$ is *twice* $p$, so $\log q/p \approx \log 2$ everywhere it looks.
#
# **Candidate C** is the answer to neither question.
#
# This is the VAE's divergence, between $q(z\mid x)$ and the posterior. If a digit could have come from two codes that lie far enough apart, a Gaussian $q$ picks one of them. And why not the other way round? $D_{KL}(p\Vert q)$ asks for draws from $p$, here the posterior, and those we do not have.
#
# ### 2.3 Jensen–Shannon, between the two
#
# Section 3 will show that a GAN aims at a third divergence. With the mixture $\bar p = \frac12(p+q)$,
#
# $$JS(p,q) = \tfrac12 D_{KL}(p\Vert \bar p) + \tfrac12 D_{KL}(q\Vert \bar p)\ \le\ \log 2.$$
#
# It is symmetric and never infinite, as $\bar p$ is positive wherever $p$ or $q$ is; it is at most $\log2$ since $p/\bar p\le2$. Does its best Gaussian cover or choose? We minimize it on the grid, from two starts: the covering answer, and a mode.


# %%
def nearest_js(two, points, cell, mean, cov):
    mean, root = mean.clone().requires_grad_(), torch.linalg.cholesky(cov).contiguous().requires_grad_()
    optimizer = torch.optim.LBFGS([mean, root], max_iter=60, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        log_q = torch.distributions.MultivariateNormal(mean, root @ root.T).log_prob(points)
        value = divergences.jensen_shannon(two.log_prob(points), log_q, cell)
        value.backward()
        return value

    optimizer.step(closure)
    return mean.detach(), (root @ root.T).detach(), closure().item()


# %%
from_cover = nearest_js(p, plane, cell, p.mean, p.cov)
from_mode = nearest_js(p, plane, cell, means[0], 0.6 * torch.eye(2).double())
claim("two minima: one between the modes, one on a mode", from_cover[0].norm() < 0.01 and from_mode[0].norm() > 1)
claim("the lower one lies between the modes", from_cover[2] < from_mode[2])
far_apart = [log_normal(torch.tensor([side, 0.0]).double(), 0.3 * torch.eye(2).double()) for side in (-6.0, 6.0)]
claim("two densities far apart: log 2, to 1e-6", abs(divergences.jensen_shannon(*far_apart, cell) - math.log(2)) < 1e-6)

# %% [markdown]
# Both kinds of answer are minima. For these modes the covering one is the better, so Jensen–Shannon sides with $D_{KL}(p\Vert q)$ here, while $D_{KL}(q\Vert p)$ has already chosen. It stands between the two.
#
# ### 2.4 When the answers part
#
# With modes close together, all three agree: one Gaussian is then nearly right. Move them apart on a line, and watch when the answers part ways. *At which distance, in standard deviations, do you expect it?*


# %%
xs = torch.linspace(-14, 14, 2801, dtype=torch.float64)[:, None]
step = 0.01
mode_start, wide_start = torch.tensor([[1.0]]).double(), torch.tensor([[6.0]]).double()


def pair_of_modes(distance):
    return toy.GaussianMixture(torch.tensor([[-distance / 2], [distance / 2]]).double(), torch.ones(2).double())


# %%
def apart(distance):
    two, mode = pair_of_modes(distance), torch.tensor([distance / 2]).double()
    starts = [(mode, mode_start), (0 * mode, wide_start)]
    reverse = min((divergences.nearest_reverse(two.log_prob, *s, nodes=120) for s in starts), key=lambda end: end[2])
    between = min((nearest_js(two, xs, step, *s) for s in starts), key=lambda end: end[2])
    fits = {"KL(p‖q)": (two.mean, two.cov), "KL(q‖p)": reverse, "Jensen–Shannon": between}
    log_qs = {name: toy.GaussianMixture(mean[None], cov[None]).log_prob(xs) for name, (mean, cov, *_) in fits.items()}
    shown = (xs[:, 0].abs() < 8).nonzero()[:, 0]
    lines = {name: log_q.exp()[shown] for name, log_q in log_qs.items()}
    made = plots.curves(xs[shown, 0], lines, "x", "density", colors=dict(zip(fits, [style.EXACT, style.MODEL, style.GUIDED], strict=True)))
    made.axes[0].fill_between(xs[shown, 0], two.log_prob(xs).exp()[shown], color=style.DATA, alpha=0.25)
    return made


widgets.explore(apart, distance=([0.0, 2.0, 3.0, 4.0, 5.0, 5.5, 6.0, 7.0, 8.0, 9.0], 4.0))

# %% [markdown]
# In blue the data, with three best fits (for the last two the better of two minima). Up to a distance of about 4 they are close to each other. At about 5.6 $D_{KL}(q\Vert p)$ jumps from the middle onto a mode. Jensen–Shannon follows, between 8 and 9. $D_{KL}(p\Vert q)$ never does. (Both modes are equally good; the start decides which one is shown.) The next figure shows the jump of $D_{KL}(q\Vert p)$.

# %%
distances = torch.arange(3.0, 7.6, 0.25).double()
ends = {"best q between the modes": [], "best q on a mode": []}
for d in distances:
    two = pair_of_modes(d)
    middle = divergences.nearest_reverse(two.log_prob, torch.zeros(1).double(), wide_start, nodes=120)
    right = divergences.nearest_reverse(two.log_prob, d[None] / 2, mode_start, nodes=120)
    ends["best q between the modes"].append(middle[2])
    ends["best q on a mode"].append(right[2] if right[0] > 1 else torch.tensor(torch.nan))
lines = {name: torch.stack(values) for name, values in ends.items()}
plots.curves(distances, lines, "distance of the modes, in standard deviations", "KL(q‖p) in nats")
on_a_mode, between = lines["best q on a mode"], lines["best q between the modes"]
claim("at 4 there is no minimum on a mode", on_a_mode[4].isnan())
claim("at 5 there is one, but it is the worse of the two", on_a_mode[8] > between[8])
claim("at 6 it is the better one", on_a_mode[12] < between[12])

# %% [markdown]
# The curve of the modes begins at 5 (in steps of 0.25; the minimum appears between 4.80 and 4.85): closer together, a descent from a mode slides to the middle. From there to about 5.6 the middle is still better; beyond, choosing costs $\log 2$ and no more, while bridging the gap costs ever more.
#
# **What to keep.** Maximum likelihood, exact in flows and through a bound in VAE and diffusion, fits the *model* by $D_{KL}(p\Vert q)$: it is punished for what it forgets, and would rather blur. (The VAE holds both: its model is fitted to the data this way round, its $q(z\mid x)$ to the posterior the other way round.) A fit by $D_{KL}(q\Vert p)$ is punished for what it invents, and would rather forget. Section 3.3 says where a GAN stands.
#
# ## 3. GAN
#
# A GAN gives up on densities. The *generator* $G$, the money faker, turns noise $z$ into a sample $G(z)$. The *discriminator* $D$, the police, is a classifier: $D(x)$ is the probability that it gives to "$x$ is real".
#
# ### 3.1 From cross-entropy to minimax
#
# A classifier is trained by binary cross-entropy, $-[y\log D + (1-y)\log(1-D)]$, with $y = 1$ for real and $y = 0$ for generated samples. Take the mean over the real ones and the mean over the generated ones, add them, and turn the sign:
#
# $$\max_D\ \mathbb E_{x\sim p_{\text{data}}}[\log D(x)] + \mathbb E_z[\log(1-D(G(z)))].$$
#
# The generator wants the opposite. Only the second term depends on it: $\min_G \mathbb E_z[\log(1-D(G(z)))]$. Together this is the slide's minimax game. In code the network gives the *logit* $\ell$, with $D = 1/(1+e^{-\ell})$. With $\mathrm{softplus}(u) = \log(1+e^u)$ we get $-\log D = \mathrm{softplus}(-\ell)$ and $-\log(1-D) = \mathrm{softplus}(\ell)$, which PyTorch computes without overflow.

# %%
real, fake = 3 * torch.randn(200, generator=g).double(), 3 * torch.randn(300, generator=g).double()
bce = nn.functional.binary_cross_entropy_with_logits
by_labels = bce(real, torch.ones_like(real)) + bce(fake, torch.zeros_like(fake))
claim("the discriminator's loss is cross-entropy with labels 1 and 0", abs(gan.discriminator_loss(real, fake) - by_labels) < 1e-12)
slide = (1 - fake.sigmoid()).log().mean()
claim("the saturating generator's loss is the slide's E[log(1 − D)]", abs(gan.generator_loss(fake, saturating=True) - slide) < 1e-10)

# %% [markdown]
# ### 3.2 The best discriminator
#
# From here on $p$ is the density of the data, and $q$ that of generated samples (no longer the encoder's). In these, the discriminator's value is $\int p\log D+q\log(1-D)\,dx$. $D$ is free at each $x$, so we maximize under the integral. The derivative $p/D - q/(1-D)$ is zero at
#
# $$D^*(x) = \frac{p(x)}{p(x)+q(x)},\qquad\text{that is}\qquad \ell^*(x) = \log p(x) - \log q(x).$$
#
# The best logit *is* the log-ratio of the densities: a discriminator is an estimate of a density ratio. Put it back, with $\bar p = \frac12(p+q)$:
#
# $$\mathbb E_p\Bigl[\log\frac{p}{2\bar p}\Bigr] + \mathbb E_q\Bigl[\log\frac{q}{2\bar p}\Bigr] = 2\,JS(p,q) - \log 4.$$
#
# So against a perfect police, a faker who minimizes the slide's loss minimizes the Jensen–Shannon divergence. (All this is for as many real samples as generated ones; homework 1 asks about other shares.)
#
# One warning: this supposes that $q$ is a density. A generator with 16 noise numbers and 784 pixels has none. Its samples lie on a thin surface, and a perfect police tells everything apart. Noise on the samples gives it one, which is one reason for the remedy of section 3.4.

# %%
p_x, q_x, D = sympy.symbols("p q D", positive=True)
slope = sympy.diff(p_x * sympy.log(D) + q_x * sympy.log(1 - D), D)
claim("D* = p/(p + q)", sympy.simplify(sympy.solve(slope, D)[0] - p_x / (p_x + q_x)) == 0)

p1 = toy.GaussianMixture(torch.tensor([[-1.5], [1.5]]).double(), torch.tensor([0.25, 0.25]).double())
q1 = toy.GaussianMixture(torch.tensor([[0.5]]).double(), torch.tensor([1.5]).double())
xs = torch.linspace(-9, 9, 4001, dtype=torch.float64)[:, None]
log_p, log_q, dx = p1.log_prob(xs), q1.log_prob(xs), (xs[1] - xs[0]).item()
logit = gan.optimal_logit(log_p, log_q)
softplus = nn.functional.softplus
value = -(log_p.exp() * softplus(-logit) + log_q.exp() * softplus(logit)).sum() * dx
claim("the value at D* is 2·JS − log 4, to 1e-10", abs(value - 2 * divergences.jensen_shannon(log_p, log_q, dx) + math.log(4)) < 1e-10)

# %% [markdown]
# That is theory. Does training get there? A small network sees samples of $p$ and $q$, never a density.

# %%
torch.manual_seed(0)
police = nets.perceptron(1, 64, 64, 1)


def pair(step):
    chance = torch.Generator().manual_seed(step)
    return {"x": p1.sample(512, chance).float(), "y": q1.sample(512, chance).float()}


def tell_apart(net, x, y):
    return gan.discriminator_loss(net(x), net(y))


done = training.fit(police, tell_apart, pair, steps=training.scaled(cpu=600, gpu=5000), ema=0.99, precision="float32")
with torch.no_grad():
    learned = done.ema(xs.float())[:, 0].double()
at = (xs[:, 0].abs() < 3.5).nonzero()[:, 0]
plots.curves(xs[at, 0], {"trained": learned[at].sigmoid(), "p/(p + q)": logit[at].sigmoid()}, "x", "D(x)", colors={"p/(p + q)": style.EXACT})
reached = -(log_p.exp() * softplus(-learned) + log_q.exp() * softplus(learned)).sum() * dx
claim("training reaches the best value to 0.01 from below", 0 <= value - reached < 0.01)

# %% [markdown]
# The trained network comes close to the formula where there are data. It leaves it at the left end, below about $-2.5$, where both densities had few samples to teach it.
#
# ### 3.3 Two losses for the generator
#
# Early in training fakes are bad, and the police is sure of it: $D(G(z))\approx 0$. The generator learns through $\ell$, so look at the slopes:
#
# $$\frac{d}{d\ell}\log(1-D) = -D\ \to\ 0,\qquad\qquad \frac{d}{d\ell}(-\log D) = -(1-D)\ \to\ -1.$$
#
# The slide's loss *saturates*: the worse the fake, the smaller the gradient. Minimizing $-\log D$ instead has the same end, $q = p$, and a gradient where it is needed. This is the *non-saturating* loss.
#
# It no longer aims at Jensen–Shannon. Write $-\log D = \bigl[\log(1-D)-\log D\bigr] - \log(1-D)$. At the best $D$ the bracket is $\log q/p$, so the generator's gradient is that of $D_{KL}(q\Vert p) - 2\,JS(p,q)$ (Arjovsky and Bottou, 2017). (The police stands still while the generator moves. This loses nothing: what is left out of the gradient of $D_{KL}(q\Vert p)$ is $\mathbb E_q[\nabla\log q] = \nabla\!\int q = 0$, and for the last part it is 0 because $D^*$ is a maximum.) In the sense of section 2, it leans to the side that chooses.
#
# Measured: data are $\mathcal N(0,1)$, the generator draws $a + z$, and the police is perfect. How strongly is $a$ pulled back, as a function of its distance? Here $D_{KL}(q\Vert p) = a^2/2$ has the gradient $a$, so the two pulls must add up to $a$.

# %%
places = torch.linspace(-8, 8, 1601, dtype=torch.float64)  # of the generator's noise, with its probabilities
weights = (-0.5 * places**2).softmax(0)


def pull(a, saturating):
    a = torch.tensor(a).double()
    shift = a.clone().requires_grad_()  # the generator's parameter; the police knows a, but does not move with it
    x = shift + places
    fake = gan.optimal_logit(-0.5 * x**2, -0.5 * (x - a) ** 2)
    each = -softplus(fake) if saturating else softplus(-fake)
    return torch.autograd.grad(weights @ each, shift)[0].abs()


away = torch.linspace(0.25, 8, 60)
lines = {name: torch.stack([pull(a.item(), s) for a in away]) for name, s in [("log(1 − D)", True), ("−log D", False)]}
plots.curves(away, lines, "distance a of the fakes from the data", "gradient that pulls a back", logy=True);
claim("near the data both pull alike", abs(lines["log(1 − D)"][0] / lines["−log D"][0] - 1) < 0.1)
claim("at distance 8 the slide's loss has lost its pull", lines["log(1 − D)"][-1] < 1e-3 and lines["−log D"][-1] > 5)
claim("the two pulls add up to a, the gradient of KL(q‖p)", (lines["log(1 − D)"] + lines["−log D"] - away).abs().max() < 1e-4)

# %% [markdown]
# Close to the data the two are the same. Far away, the saturating gradient falls like a Gaussian tail, and the other grows with the distance. Of the two, practice uses the second.
#
# > **Spot the bug.** One optimizer holds the weights of both players, and steps on `discriminator_loss(D(real), D(G(z))) + generator_loss(D(G(z)))`. Nothing is detached. What does the first loss do to the generator, and the second to the discriminator? *(Each pulls the other player against its own aim: the faker towards fakes that are easy to tell, the police towards believing them. `gan.loss` cuts one path with `detach`, and the other by holding the discriminator's weights constant.)*

# %%
show_source(gan.loss)

# %% [markdown]
# `functional_call` runs the discriminator with weights that are constants. `pack` is 1 in this notebook, so `_packed` changes nothing; `penalty` comes in section 3.5.

# %% [markdown]
# ### 3.4 Mode collapse
#
# The generator is paid for fooling the police *now*. If all its samples land on one mode of the data, and the police has not noticed yet, that is a success. Then the police learns, and the faker moves to the next mode.
#
# Against a police that stands still, the best move is to put every sample on the one point where $D$ is largest. Only a police that is at its best *at every moment* makes the faker cover all modes. In training the two move at the same time, each against the other's last position, and that safeguard is lost.
#
# The classic test is a ring of eight Gaussians. *How many of them will the generator find?* Beside the plain GAN we try a remedy: **add noise to what the police sees**, real and fake alike, much at first and none at the end (*instance noise*, Sønderby et al., 2017). Under noise the eight islands merge into one closed ring, and there is no mode to hide in.
#
# One run says little, as the game is chaotic. So we play six at once: `Players` is a stack of six independent networks, three games without noise and three with. (Three against three is a hint, no proof. Change the seed and play again.)


# %%
class Players(nn.Module):
    """k independent networks at once, (k, B, widths[0]) → (k, B, widths[-1]), that see their input through noise."""

    def __init__(self, k, *widths):
        super().__init__()
        layers = [[nn.Linear(*pair) for _ in range(k)] for pair in zip(widths, widths[1:], strict=False)]
        self.weights = nn.ParameterList(torch.stack([one.weight.detach().T for one in layer]) for layer in layers)
        self.biases = nn.ParameterList(torch.stack([one.bias.detach()[None] for one in layer]) for layer in layers)
        self.noise = 0.0

    def forward(self, x):
        x = x + self.noise * torch.randn_like(x)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            # bias + x @ weight, for the k networks at once
            x = torch.baddbmm(bias, nn.functional.silu(x) if i else x, weight)
        return x


# %%
ring = toy.ring(8, radius=8.0, std=0.2)
games = training.scaled(cpu=1000, gpu=10_000)
strength = torch.tensor([0.0, 0.0, 0.0, 4.0, 4.0, 4.0])[:, None, None]  # of the noise, in each of the six games


def deal(step):
    chance = torch.Generator().manual_seed(step)
    left = torch.full((6,), max(0.0, 1 - step / (0.8 * games)))  # of the noise
    return {"x": ring.sample(768, chance).reshape(6, 128, 2), "z": torch.randn(6, 128, 2, generator=chance), "left": left}


def play(model, x, z, left):
    model.discriminator.noise = strength * left[0]
    return gan.loss(model, x, z)


# %%
torch.manual_seed(0)
model = gan.GAN(Players(6, 2, 128, 128, 2), Players(6, 2, 128, 128, 128, 1), latent=2)
# Adam alone: the schedule, weight decay and clipping of `fit` are switched off.
plain_adam = {"lr": 1e-3, "betas": (0.5, 0.99), "weight_decay": 0, "warmup": 0, "final": 1.0, "clip": 1e9}
played = training.fit(model, play, deal, steps=games, precision="float32", **plain_adam)

# %%
with torch.no_grad():
    fakes = model.generator(torch.randn(6, 2000, 2, generator=torch.Generator().manual_seed(1)))
distance, nearest = (fakes[:, :, None] - ring.means).norm(dim=3).min(2)
near = (distance < 0.8).double().mean(1).tolist()
served = [int((torch.bincount(n[d < 0.8], minlength=8) >= 80).sum()) for d, n in zip(distance, nearest, strict=True)]
made, axes = plots.panels(3, 2, width=9.0, height=6.0, share=True)
for ax, x, count, share, name in zip(axes, fakes, served, near, ["plain"] * 3 + ["noise"] * 3, strict=True):
    ax.plot(*x[:600].T, ".", markersize=3, alpha=0.5, color=style.MODEL)
    ax.plot(*ring.means.T, "o", markersize=9, markerfacecolor="none", color=style.DATA)
    ax.set(title=f"{name}: {count} of 8, {share:.0%} near", xlim=(-12, 12), ylim=(-12, 12), aspect="equal")
claim("three games without noise serve fewer modes than three with", sum(served[:3]) < sum(served[3:]))

# %% [markdown]
# In orange the generator's samples, as circles the eight modes. The titles count the modes that get at least 4 % of the samples (a fair share is 12.5 %), and the samples that lie near a mode at all. Without noise a game ends on one to three modes, with noise on three or four. But look between the circles: without noise 14 to 50 % of the samples belong to no mode, with noise more than half. In these games noise bought more modes and paid with more samples between them. It is a help, and far from a cure. This is what people mean when they call GANs hard to train.
#
# Keep the remedy in mind. *Blur the data with noise until the problem is easy, then take the noise away* is, in one sentence, the idea of diffusion, from notebook 03 on.
#
# ### 3.5 A GAN on digits
#
# The same two halves as in the VAE, decoder as generator and encoder as discriminator, trained for 3,000 steps with a penalty on steep discriminators, $\frac\gamma2\,\mathbb E\lVert\nabla_x\ell(x)\rVert^2$ over real images, with the weight $\gamma = 1$ (Mescheder et al., 2018; `dgm-course train mnist-gan`). Compare these samples with the VAE's in section 1.5.

# %%
faker = checkpoints.load("mnist-gan")
fakes = faker.sample(40, generator=g)
plots.grid(fakes, columns=10)

# %% [markdown]
# Sharp strokes, no blur, and here and there a shape that is no digit. No pixel-wise error was computed, so nothing pays for the mean of two strokes.
#
# Did it forget whole classes? We ask a classifier how often each one comes. (It may still forget ways of writing a digit; the recall of section 4 sees those.)

# %%
judge = checkpoints.load("mnist-classifier")
with torch.no_grad():
    classes = judge(faker.sample(1000, generator=g)).argmax(1)
share = torch.bincount(classes, minlength=10) / 1000
made, (ax,) = plots.panels(width=5.6, height=2.6)
ax.bar(range(10), share, color=style.MODEL)
ax.axhline(0.1, color=style.EXACT)
ax.set(xticks=range(10), xlabel="class, to the classifier", ylabel="share of 1,000 samples")
claim("every class comes up", share.min() > 0.02)

# %% [markdown]
# All ten come up, and none much more or less often than it should. This GAN, with its penalty, has not forgotten a class.
#
# ## 4. Why diffusion?
#
# The lecture names two benefits of diffusion models: high quality, and stable training compared to a GAN. The price is speed. Let us measure all three, on the same data. We train a VAE, a GAN and a small diffusion model, each of 200 to 300 thousand weights and for about 130 seconds of processor time (two to four minutes by the clock, as the machine had other work), from four seeds (`dgm-course train mnist-generators`).
#
# - *Quality* is the Fréchet distance of 1,000 samples to real digits (lower is better), on the features of a classifier; notebook 04 says what it is. The row "real" is the distance between two sets of real digits.
# - *Precision* is the share of samples whose features lie close to those of real digits, *recall* the share of real digits with features close to those of samples.
# - *Speed* is the time for 1,000 samples, on one core; the diffusion model takes 25 steps.
# - *Stability* has two sides: the spread over four seeds, and what happens when nobody tunes the optimizer. The VAE and the diffusion model share one setting of AdamW. The GAN's own setting was searched for (a smaller step, no momentum); the row "GAN, plain Adam" has that of the others.
#
# (The GAN is that of section 3.5 with fewer noise numbers and without the penalty.) *Before you look:* rank them in each column.

# %%
table = tables.load("mnist-generators")
floor = table["Fréchet distance of real images"]
rows = {kind: [row for row in table["rows"] if row["kind"] == kind] for kind in table["vary"]["kind"]}


def column(kind, name):
    return torch.tensor([row[name] for row in rows[kind]])


print(f"{'':>15}  Fréchet distance   precision   recall   seconds for 1000")
for kind in rows:
    distance = column(kind, "Fréchet distance")
    spread = f"{distance.mean():.2f} ({distance.min():.2f}–{distance.max():.2f})"
    others = [column(kind, name).mean().item() for name in ("precision", "recall", "seconds for 1000 samples")]
    print(f"{kind:>15}  {spread:>16}   {others[0]:9.2f}   {others[1]:6.2f}   {others[2]:16.2f}")
print(f"{'real':>15}  {floor:>16.2f}")

# %%
made, axes = plots.panels(3, width=9.6, height=3.0)
for ax, name in zip(axes, ["Fréchet distance", "recall", "seconds for 1000 samples"], strict=True):
    for place, kind in enumerate(rows):
        ax.plot([place] * len(rows[kind]), column(kind, name), "o", color=f"C{place}")
    ax.set(xticks=range(len(rows)), ylabel=name, xlim=(-0.5, len(rows) - 0.5))
    ax.set_xticklabels([kind.replace(", ", ",\n") for kind in rows], rotation=30)
axes[0].set(ylim=0)
axes[1].set(ylim=(0, 1.02))
axes[2].set(yscale="log")
made

# %% [markdown]
# Row by row. The **VAE** ends at the same place from every seed and draws fast, and its samples are the least real of the three: that is the price of section 1.5. The **GAN** with its own setting is the best here, as fast, and hardly varies. So a GAN is not unstable by nature. But with the setting that served the other two it ends anywhere between 8 and 38, with a recall below 0.2: it lost most ways of writing a digit, and nothing in its loss said so. The **diffusion** model took the setting that it was given. It has the highest precision, its distance lies between the two, and it takes about 60 times as long to draw.
#
# So of the lecture's two benefits the table shows one, stable training, and half of the other. Two minutes of one core are little for a diffusion model. Given more, it is the one that goes on: the checkpoints have Fréchet distances of about 3.1 (VAE), 0.28 (GAN) and 0.044 (the diffusion model of notebook 03; it is larger, was trained longest, and gets the class as an input, so this is no fair race either). These are from 2,000 samples, for which real digits have 0.038 and not 0.07. The VAE has stopped improving: its bound pays for other things than sharp samples.
#
# ### 4.1 What is diffusion? The opening
#
# The name comes from physics, from non-equilibrium thermodynamics. Ink in water spreads until it is even: a complicated distribution becomes a simple one by many small random steps. A diffusion model has two processes, with two objectives:
#
# 1. **Forward:** add Gaussian noise, a little at a time. Objective: turn the complex distribution of clean data into a simple one.
# 2. **Reverse:** remove noise, a little at a time. Objective: turn a sample of noise into a new sample of data.
#
# On the ring of section 3.4, drawn five times smaller, the ideal reverse process is known exactly, so we can watch both without training anything. Time $t$ runs from 0, data, to 1, noise. (Do not study the code: notebook 03 builds each part.)

# %%
path, islands = paths.Cosine(), toy.ring(8, radius=1.6, std=0.04)
points = islands.sample(600, g)
levels = [0.0, 0.1, 0.25, 0.5, 1.0]
there = [path.perturb(points, t, torch.randn(600, 2, generator=g)) for t in levels]
states = [torch.randn(600, 2, generator=g)]
states += list(samplers.ddim(islands.denoiser(path), path, states[0], path.times(40), generator=g))
back = [states[round(40 * (1 - t))] for t in reversed(levels)]
made, axes = plots.panels(5, 2, width=10.0, height=4.4, share=True)
names = [f"forward, t = {t}" for t in levels] + [f"reverse, t = {t}" for t in reversed(levels)]
for ax, x, name, color in zip(axes, there + back, names, [style.DATA] * 5 + [style.MODEL] * 5, strict=True):
    ax.plot(*x.T, ".", markersize=3, alpha=0.6, color=color)
    ax.set(title=name, xlim=(-3, 3), ylim=(-3, 3), aspect="equal")
found = torch.bincount((states[-1][:, None] - islands.means).norm(dim=2).argmin(1), minlength=8)
claim("all eight modes are found, each with its share", (found / 600 - 1 / 8).abs().max() < 0.06)

# %% [markdown]
# Upper row: data turn into noise. Lower row, from left to right: noise turns into data, and every mode gets its share. No player had to be fooled, and no density was cut down to one Gaussian. Each small step is an easy problem. (Here the step was given, not learned, so this shows what the method aims at. What a trained one keeps is in the recall above.) That is what the rest of the course is about.
#
# ## 5. Recap
#
# - $\log p(x) = \mathrm{ELBO} + \mathrm{KL}[q\Vert p(z\mid x)]$, for every $q$. The gap of the bound *is* the KL; it closes only for $q$ = posterior, which a simple family may not contain.
# - "~L2" is the squared error over $2\sigma^2$. The variance decides how much the KL weighs, and the best one is the mean squared error, over data and draws of $z$.
# - A latent is used if it saves more than it costs. In the linear model with fixed $\sigma^2$: exactly if $\lambda_i > \beta\sigma^2$. Otherwise it collapses, and that is the optimum.
# - $D_{KL}(p\Vert q)$ covers, by matching moments. $D_{KL}(q\Vert p)$ chooses, and the start decides. They agree while one Gaussian is nearly right.
# - A discriminator's logit estimates $\log p - \log q$. At its best the game's value is $2JS-\log4$.
# - $-\log D$ pulls where $\log(1-D)$ has lost its gradient, and aims at $D_{KL}(q\Vert p) - 2JS$ instead of $2JS$.
#
# **Pitfalls**
#
# - A KL is not symmetric. Say which argument is which, and from which one the samples come.
# - $s$, $s^2$ or $\log s^2$? Encoders give $\log s^2$; the draw needs $s = e^{\frac12\log s^2}$.
# - A mean over pixels beside a sum over latents makes the KL 784 times heavier than with $\sigma^2 = \frac12$. On these digits, whose largest variance along an axis is 21 and not 392, all of the linear model's latents collapse.
# - Detach the fakes in the discriminator's loss; freeze the discriminator in the generator's.
# - A GAN's loss curve says nothing about the samples. Look at samples, and at how many modes they cover.
#
# **Homework:** [six exercises](../homework/hw1_vae_gan.ipynb): other priors, what "~L2" leaves out, the bound for black-and-white images, what independent latents cost, divergences from a discriminator, and where a generator stops learning.
#
# **References**
#
# - Kingma, Welling: [*Auto-Encoding Variational Bayes*](https://arxiv.org/abs/1312.6114), 2014. The VAE.
# - Tipping, Bishop: *Probabilistic Principal Component Analysis*, Journal of the Royal Statistical Society B 61, 1999. The linear model.
# - Lucas, Tucker, Grosse, Norouzi: [*Don't Blame the ELBO! A Linear VAE Perspective on Posterior Collapse*](https://arxiv.org/abs/1911.02469), 2019.
# - Higgins and others: *beta-VAE: Learning Basic Visual Concepts with a Constrained Variational Framework*, 2017.
# - Rybkin, Daniilidis, Levine: [*Simple and Effective VAE Training with Calibrated Decoders*](https://arxiv.org/abs/2006.13202), 2021. The variance fitted.
# - Burda, Grosse, Salakhutdinov: [*Importance Weighted Autoencoders*](https://arxiv.org/abs/1509.00519), 2016.
# - Goodfellow and others: [*Generative Adversarial Nets*](https://arxiv.org/abs/1406.2661), 2014.
# - Arjovsky, Bottou: [*Towards Principled Methods for Training Generative Adversarial Networks*](https://arxiv.org/abs/1701.04862), 2017. What $-\log D$ aims at.
# - Sønderby, Caballero, Theis, Shi, Huszár: [*Amortised MAP Inference for Image Super-resolution*](https://arxiv.org/abs/1610.04490), 2017. Noise for the discriminator.
# - Mescheder, Geiger, Nowozin: [*Which Training Methods for GANs do actually Converge?*](https://arxiv.org/abs/1801.04406), 2018. The gradient penalty.
# - Sohl-Dickstein, Weiss, Maheswaranathan, Ganguli: [*Deep Unsupervised Learning using Nonequilibrium Thermodynamics*](https://arxiv.org/abs/1503.03585), 2015.
