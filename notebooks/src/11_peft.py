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
# # Parameter-efficient fine-tuning: one base, many users
#
# A model was trained once, at great cost. Now each of a million users wants it a little different. This notebook is about the "little". At the end of it you will be able to
#
# - write LoRA for a linear layer, a convolution and an attention, and say why it starts as the model it tunes, and which of its two factors moves first;
# - merge an update into a model, take it out again bit for bit, keep several of them on one base, and send one as a file that knows its base;
# - measure how low the rank of a full fine-tune's update is, and say what that does and does not prove;
# - say exactly in which sense LoRA's $\alpha$ is a learning rate, under SGD and under Adam;
# - put adapters into a transformer, and say why they cannot be merged;
# - write prefix tuning, get its mask right, and say why no prefix starts as the identity;
# - tune a diffusion transformer to a user's hand from a hundred images, and a language model to code, and say what each method costs a user and what the base forgets;
# - say of flow, diffusion, GAN and VAE what in them is exact, what is a bound and what is approximate, and name the cell of this course that shows it.
#
# **Time:** three hours to read, with pen and paper; it runs in less than a minute on one core.
# **It builds on** [notebook 04](04_schedules_and_backbones.ipynb): attention, the diffusion transformer (DiT), the Fréchet distance; and on [notebook 03](03_ddpm.ipynb): the loss. Section 9 looks back on all notebooks.
# **Symbols** are those of the lecture; the README's [symbol ledger](../README.md#symbols) lists them all. Three letters change their meaning here, as in the papers. $\alpha$ is a number that scales LoRA, not the factor of $x_0$. $d\times k$ is the shape of a weight. And $x$ is what goes into a layer.

# %%
import importlib.util

if importlib.util.find_spec("dgm_course") is None:  # Colab, or a fresh environment
    get_ipython().run_line_magic("pip", "install --quiet dgm-course")

# %%
import copy
import json
import math
import tempfile
from pathlib import Path

import torch
from matplotlib.patches import Circle, FancyBboxPatch
from torch import nn

from dgm_course import checkpoints, data, likelihood, losses, nets, peft, personal, samplers, tables, toy, training
from dgm_course.checks import claim, show_source
from dgm_course.data import hands
from dgm_course.denoisers import clipped
from dgm_course.nets.dit import Attention, attention_maps
from dgm_course.nets.language import CausalAttention, generate, later
from dgm_course.paths import Cosine
from dgm_course.viz import plots, style, widgets

g = torch.Generator().manual_seed(0)  # where nearly all chance comes from
double = torch.float64
base = checkpoints.load("mnist-dit")  # a diffusion transformer that draws digits


# %%
def normal(*shape):
    return torch.randn(*shape, generator=g, dtype=double)


def count(parameters):
    return sum(p.numel() for p in parameters)


# %% [markdown]
# ## 1. A model for each user
#
# ### 1.1 What a user costs
#
# "To finetune the model to a particular task is very cumbersome", says the slide, and another: "If we want to deploy a personalized large language model, we need to separately deploy each model for each user." *Fine-tuning* means to go on training a trained model, the *base*, on a few data of one's own. Let us count what that costs for the course's diffusion transformer, which is tiny.

# %%
size = count(base.net.parameters())
print(f"the base:                       {size:9,} numbers, {4 * size / 1e6:.1f} MB in float32")
print(f"a model for each of a million:  {4 * size / 1e6:9.1f} TB")
print(f"the same for 7 billion numbers: {2 * 7e9 * 1e6 / 1e15:9.0f} PB, in float16")

# %% [markdown]
# The numbers of all users are nearly the same numbers, for all users start from one base. So write a user's weights as
#
# $$W_{user} = W_0+\Delta W,$$
#
# keep $W_0$ once, and look for a $\Delta W$ that takes few numbers to write down. That is the whole idea. There are three families: low-rank updates (LoRA), adapters, prefixes.
#
# **What is saved.** A user's file. While training: the gradients and Adam's two running means, three numbers for each *trained* parameter. While serving: one base in memory, whatever the number of users.
#
# **What is not.** The slide calls these methods "model compressions". *Is anything compressed?* The base is as large as before, and a user's file alone can draw nothing. What is small is the *difference*. Nor is there much less to compute. Each step of training still runs through the whole base, forwards and back. Only the gradients of the frozen weights themselves fall away, about a third of the work.
#
# ### 1.2 Three ways into one block
#
# The lecture shows a figure of the transformer block and of where each method sits in it. Here it is for the blocks of this course, drawn anew. Solid boxes are the base and stay frozen. Dashed ones are new, and only they are trained. *Follow one token upwards: what does each method change for it?*


# %%
def box(ax, x, y, text, width=1.5, height=0.62, color=None):
    """A box about (x, y): grey and solid for the base, coloured and dashed for what is added."""
    look = {"fc": "#F1F1F1", "ec": "#777777", "lw": 1.2} if color is None else {"fc": "white", "ec": color, "lw": 1.8}
    corner, dashes = (x - width / 2, y - height / 2), "--" if color else "-"
    shape = FancyBboxPatch(corner, width, height, boxstyle="round,pad=0,rounding_size=0.12", ls=dashes, zorder=2, **look)
    ax.add_patch(shape)
    ax.text(x, y, text, ha="center", va="center", color=color or "#222222", size=11, zorder=3)


def way(ax, *points, color="#777777"):
    """A line through the points, with an arrow at its end."""
    for a, b in zip(points[:-2], points[1:-1], strict=True):
        ax.plot(*zip(a, b, strict=True), color=color, lw=1.2, zorder=1)
    look = {"arrowstyle": "-|>", "color": color, "lw": 1.2, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", points[-1], points[-2], arrowprops=look, zorder=1)


# %%
def branch_of_attention(ax):
    lora, prefix = style.DATA, style.GUIDED
    box(ax, 4.6, 1.0, "norm")
    for x, name in ((2.6, "$W_q$"), (4.6, "$W_k$"), (6.6, "$W_v$")):
        way(ax, (4.6, 1.31), (4.6, 1.65), (x, 1.65), (x, 2.04))
        box(ax, x, 2.35, name, 0.9)
        way(ax, (x, 2.66), (x, 4.39))
    for x in (2.6, 6.6):  # LoRA beside the queries and the values, as in its paper
        way(ax, (x, 1.65), (x + 0.95, 1.65), (x + 0.95, 2.04), color=lora)
        box(ax, x + 0.95, 2.35, "$A, B$", 0.75, color=lora)
        way(ax, (x + 0.95, 2.66), (x + 0.95, 2.95), (x, 2.95), color=lora)
    for x, name in ((4.6, "$P_K$"), (6.6, "$P_V$")):
        box(ax, x - 1.0, 3.65, name, 0.75, color=prefix)
        way(ax, (x - 0.62, 3.65), (x, 3.65), color=prefix)
    box(ax, 4.6, 4.7, "softmax$(QK^{\\top}/\\sqrt{d})\\;V$", 4.9)
    way(ax, (4.6, 5.01), (4.6, 5.34))
    box(ax, 4.6, 5.65, "$W_o$", 0.9)
    way(ax, (4.6, 5.96), (4.6, 6.29))


# %%
def block():
    made, (ax,) = plots.panels(1, width=7.6, height=7.6)
    made.alt = "a transformer block with the places of LoRA, prefix and adapters"
    branch_of_attention(ax)
    for y in (6.6, 10.6):
        box(ax, 4.6, y, "adapter", 2.0, color=style.MODEL)
        way(ax, (4.6, y + 0.31), (4.6, y + 0.8), (1.18, y + 0.8))
        ax.add_patch(Circle((1.0, y + 0.8), 0.18, fc="white", ec="#777777", lw=1.2, zorder=3))
        ax.text(1.0, y + 0.78, "+", ha="center", va="center", size=13, zorder=4)
    box(ax, 4.6, 8.4, "norm")
    box(ax, 4.6, 9.5, "perceptron", 2.6)
    for points in (((4.6, 8.71), (4.6, 9.19)), ((4.6, 9.81), (4.6, 10.29)), ((1.0, 7.58), (1.0, 11.22))):
        way(ax, *points)
    way(ax, (1.0, -0.1), (1.0, 7.22))
    way(ax, (1.0, 0.3), (4.6, 0.3), (4.6, 0.69))
    way(ax, (1.0, 7.8), (4.6, 7.8), (4.6, 8.09))
    way(ax, (1.0, 11.58), (1.0, 12.1))
    return made, ax


# %%
made, ax = block()
ax.text(1.15, -0.1, "h", size=13, style="italic")
for x, y, text, color in (
    (8.15, 2.35, "LoRA: $W x$ becomes\n$W x + \\frac{\\alpha}{r}\\,BAx$", style.DATA),
    (8.15, 3.65, "prefix: more keys\nand values", style.GUIDED),
    (5.85, 6.6, "the same\n(Houlsby only)", style.MODEL),
    (5.85, 10.6, "adapter: a small detour\n(Houlsby and Pfeiffer)", style.MODEL),
):
    ax.text(x, y, text, color=color, va="center", size=11)
ax.set(xlim=(0.4, 11.2), ylim=(-0.3, 12.2), aspect="equal")
ax.axis("off")
made

# %% [markdown]
# **LoRA** runs beside a weight, and changes what is computed *from* a token. A **prefix** gives all tokens something more to look *at*. An **adapter** stands in the way of what a branch has to say, and changes it *after* the fact. The stream on the left, which adds everything up, is never touched.
#
# ## 2. LoRA
#
# ### 2.1 The equation, line by line
#
# The slide's formula:
#
# $$h = W_0x+\frac\alpha r\,BA\,x,\qquad B\in\mathbb R^{d\times r},\quad A\in\mathbb R^{r\times k}.$$
#
# - $W_0\in\mathbb R^{d\times k}$ is the base's weight: $k$ numbers in, $d$ numbers out. It stays as it is.
# - $Ax$ is $r$ numbers. $A$ decides what the update looks at.
# - $B$ makes $d$ numbers of them. It decides what the update says.
# - $\alpha/r$ is a fixed number. We call it $s$; section 4 is about it.
# - $\Delta W = sBA$ is a matrix of the shape of $W_0$, but of **rank at most $r$**: each of its rows is a mixture of the $r$ rows of $A$.
#
# (The slide text reads $A\in\mathbb R^{r\times d}$. That is right for a square weight, $k = d$. It also puts "(gradient)" behind the adaptation weight. $\Delta W$ is no gradient. It is the sum of all steps of a training, of which each was taken at another place.)
#
# $A$ and $B$ have $r(d+k)$ numbers where $\Delta W$ has $dk$. *When is this a saving?* For $r<dk/(d+k)$: for a square matrix, up to half of its side.

# %%
show_source(peft.LoRA.forward)

# %%
layer = peft.LoRA(nn.Linear(6, 4)).double()  # k = 6, d = 4
layer.add("mine", rank=2, alpha=3.0, generator=g)
x = normal(5, 6)
claim("at the start the layer is its base, exactly", torch.equal(layer(x), layer.base(x)))
A, B = layer.down["mine"].weight.data, layer.up["mine"].weight.data
B.copy_(normal(4, 2))
by_hand = x @ (layer.base.weight + 3.0 / 2 * B @ A).T + layer.base.bias
claim("h = (W_0 + α/r BA) x + b, to 1e-12", (layer(x) - by_hand).abs().max() < 1e-12)
claim("ΔW has rank 2, at most r", torch.linalg.matrix_rank(layer.update()) == 2)
claim("A and B have r(d + k) = 20 numbers, of which ΔW has 24", A.numel() + B.numel() == 2 * (4 + 6) == 20)

# %% [markdown]
# ### 2.2 The start, and the first step
#
# $A$ begins as Gaussian noise and $B$ as zero. So $\Delta W = 0$, and "the model is initialized to be identical to the pretrained weights", as the slide says. *But if $BA = 0$, how can it learn? And why not the other way round, or both zero?*
#
# Let $G = \partial L/\partial W$ be the gradient of the loss in the weight, a $d\times k$ matrix, taken at $W = W_0+sBA$. It is what full fine-tuning would follow. By the chain rule
#
# $$\frac{\partial L}{\partial B} = s\,G A^\top,\qquad\frac{\partial L}{\partial A} = s\,B^\top G.$$
#
# At the start $B = 0$, so $\partial L/\partial A = 0$ and $\partial L/\partial B = sGA^\top\ne0$. **In the first step only $B$ moves.** In the second, $B$ is no longer zero, and $A$ moves, too. With $A = 0$ and $B$ Gaussian it would be the other way round. With both zero *neither* ever moves. With both Gaussian both move, but the start is another model.

# %%
W0, D_goal, x = normal(4, 6), normal(4, 6), normal(50, 6)
s, Gaussian = 1.5, (normal(2, 6) / 6**0.5, normal(4, 2) / 2**0.5)
zero = torch.zeros(2, 6, dtype=double), torch.zeros(4, 2, dtype=double)


def gradients(A, B):
    """∂L/∂A, ∂L/∂B and G of a squared error, by automatic differentiation."""
    A, B = A.clone().requires_grad_(), B.clone().requires_grad_()
    W = W0 + s * B @ A
    loss = (x @ (W - W0 - D_goal).T).square().mean()
    return torch.autograd.grad(loss, (A, B, W))


# %%
for name, A, B in (
    ("A Gaussian, B zero", Gaussian[0], zero[1]),
    ("A zero, B Gaussian", zero[0], Gaussian[1]),
    ("both zero", *zero),
    ("both Gaussian", *Gaussian),
):
    gA, gB, G = gradients(A, B)
    formula = max((gA - s * B.T @ G).abs().max(), (gB - s * G @ A.T).abs().max())
    claim(f"{name}: both formulas hold, to 1e-12", formula < 1e-12)
    moves = [f"{n} moves" for n, gradient in (("A", gA), ("B", gB)) if gradient.abs().max() > 0]
    print(f"    {' and '.join(moves) or 'nothing moves'}, from {'the base' if not (B @ A).any() else 'another model'}")

# %% [markdown]
# The first two starts are both sound. The paper takes the first.
#
# ### 2.3 Convolutions and attention
#
# **A convolution** is a linear map of patches. Write its weight of shape $d\times C\times K\times K$ as a matrix of $d$ rows and $CK^2$ columns, one row for each channel that goes out. Then $\Delta W = sBA$ with $A\in\mathbb R^{r\times CK^2}$ and $B\in\mathbb R^{d\times r}$ as before. And the two factors are convolutions themselves: $A$ has the same $K\times K$ kernel, the same stride and padding, and $r$ channels; $B$ is $1\times1$.

# %%
conv = peft.LoRA(nn.Conv2d(3, 8, 3, stride=2, padding=1, dilation=2)).double()
conv.add("mine", rank=2, alpha=3.0, generator=g)
A, B = conv.down["mine"].weight.data, conv.up["mine"].weight.data
B.copy_(normal(*B.shape))
print(f"A {tuple(A.shape)}, B {tuple(B.shape)}, W {tuple(conv.base.weight.shape)}")
x, plain = normal(2, 3, 11, 9), copy.deepcopy(conv.base)
plain.weight.data += (1.5 * B.flatten(1) @ A.flatten(1)).view_as(plain.weight)
claim("the two convolutions are one with W_0 + ΔW, to 1e-12", (conv(x) - plain(x)).abs().max() < 1e-12)
claim("ΔW as an 8 × 27 matrix has rank 2", torch.linalg.matrix_rank(conv.update().flatten(1)) == 2)

# %% [markdown]
# **An attention** has four linear layers, for query, key, value and output. `add_lora` takes the names of layers. It freezes the model, and puts an update beside each layer whose name ends so. The same call serves the U-Net and the DiT.

# %%
unet, dit = checkpoints.load("mnist-unet"), copy.deepcopy(base)
noisy, ten = torch.randn(10, 1, 28, 28, generator=g), torch.arange(10)
places = (unet, ("conv1", "conv2", "qkv")), (dit, ("query", "value")), (copy.deepcopy(base), personal.TARGETS)
for d, targets in places:
    all_of, before = count(d.net.parameters()), d(noisy, 0.5, y=ten)
    peft.add_lora(d.net, targets, rank=2, generator=g)
    trained = count(peft.trainable(d.net).values())
    print(f"{', '.join(targets)}: {trained:,} numbers are trained, {100 * trained / all_of:.1f} % of the base")
    claim("    and it still draws the same, exactly", torch.equal(d(noisy, 0.5, y=ten), before))

# %% [markdown]
# (`modulation` is the layer of a DiT that turns time and label into scales and shifts; notebook 04, section 3.3.) The paper tunes queries and values only. In section 7 the updates sit on the layers of the third line. Which layers pay is a question to the experiment, and the table there asks it.
#
# The U-Net's attention computes query, key and value in *one* layer of $3d$ outputs, `qkv`. With rank $r$ all three then read the same $r$ numbers $Ax$. Three separate layers would read $r$ numbers each.
#
# > **Spot the bug.** Some layers store their weight the other way round, $k\times d$ (GPT-2's do, and so did a merged `qkv` of the first LoRA library). To such a weight one must add $(sBA)^\top$. A public implementation added $sBA$. *When does this raise an error? What happens if not?*

# %%
layer = peft.LoRA(nn.Linear(6, 6)).double()  # a square one
layer.add("mine", rank=2, alpha=2.0, generator=g)
layer.up["mine"].weight.data.copy_(normal(6, 2))
x, stored = normal(200, 6), layer.base.weight.data.T  # as such a library stores it
right, wrong = (x @ (stored + change) + layer.base.bias for change in (layer.update().T, layer.update()))
claim("added transposed: the layer's answer, to 1e-12", (layer(x) - right).abs().max() < 1e-12)
apart = (layer(x) - wrong).square().mean() / (layer(x) - layer.base(x)).square().mean()
claim("added as it is: no error, and the answer is wrong by more than the update itself", apart > 1)

# %% [markdown]
# Only a weight that is not square raises an error. On the square ones, those of query, key and value, the merged model is silently wrong. A test that compares merged and unmerged answers finds it at once.
#
# ### 2.4 Merge, and take apart
#
# $W_0+\Delta W$ is a matrix like any other. So after training an update can be **merged**: the sum takes the place of $W_0$, and the model costs exactly what its base costs. This is LoRA's great advantage. (While it is *not* merged, each layer computes two small products more.)
#
# Merging is a sum in floating point, so it rounds. *How would you take $\Delta W$ out again?* Subtract it? Let us do both, in float32 and in bfloat16, which keeps only 8 binary digits of a number.

# %%
show_source(peft.LoRA.merge)
show_source(peft.LoRA.unmerge)


# %%
def trained_like(d, scale=0.02, name="mine", rank=4, seed=1):
    """A model with an update that looks trained: B random, with numbers of size `scale`."""
    own = torch.Generator().manual_seed(seed)
    peft.add_lora(d.net, personal.TARGETS, rank=rank, name=name, generator=own)
    for layer in d.net.modules():
        if isinstance(layer, peft.LoRA) and name in layer.up:
            layer.up[name].weight.data.copy_(scale * torch.randn(layer.up[name].weight.shape, generator=own))
    return d


d = trained_like(copy.deepcopy(base))
unmerged = d(noisy, 0.5, y=ten)
claim("the update changes what is drawn", (unmerged - base(noisy, 0.5, y=ten)).abs().max() > 0.01)
peft.merge(d.net)
claim("merged, float32: the same to 1e-4", (d(noisy, 0.5, y=ten) - unmerged).abs().max() < 1e-4)
peft.unmerge(d.net)
claim("taken apart again: the same, bit for bit", torch.equal(d(noisy, 0.5, y=ten), unmerged))
plain = peft.merged(d.net)
claim("a merged copy has the base's layers and as many numbers", count(plain.parameters()) == size)

# %%
for dtype in (torch.float32, torch.bfloat16):
    W = base.net.blocks[0].perceptron[0].weight.to(dtype)
    layer = peft.LoRA(nn.Linear(128, 384).to(dtype))
    layer.base.weight.data.copy_(W)
    layer.add("mine", rank=4, alpha=4.0, generator=g)
    layer.up["mine"].weight.data.copy_(0.002 * torch.randn(384, 4, generator=g))
    change = layer.update()
    merged_weight = (W + change).to(dtype)
    subtracted = (merged_weight - change).to(dtype)
    lost = (merged_weight == W).double().mean()
    print(f"{dtype}: {'some' if lost > 0.01 else 'hardly any'} weights did not move at all")
    claim("    subtracting gives not all of W_0 back", not torch.equal(subtracted, W))
    layer.merge()
    layer.unmerge()
    claim("    keeping the old weight does", torch.equal(layer.base.weight, W))
claim("bfloat16: more than a fifth of the weights did not move", lost > 0.2)

# %% [markdown]
# In bfloat16 the neighbours of a number lie a 128th to a 256th of its size apart. A change of less than half of that is rounded away: $|\Delta W|<2^{-9}|W|$ always vanishes. Here that is more than a fifth of all weights. Unmerged, nothing of the sort happens: $\Delta W\,x$ is computed in float32, and only the sum of both answers is rounded. So in bfloat16 *a merged model is not quite the model that was trained*, and users of large libraries have reported exactly this. The cure is to merge in float32, and to compare.
#
# > **Spot the bug.** A public training script merges its update before each evaluation: `weight += s * B @ A`. One run evaluates twice. *What is the model now?*

# %%
d = trained_like(copy.deepcopy(base))
layer = d.net.blocks[0].perceptron[0]
W, change = layer.base.weight.clone(), layer.update()
naive = W + change + change  # merged, and merged again
peft.merge(peft.merge(d.net))
claim("twice by hand: W_0 + 2 ΔW, as if α were doubled", torch.allclose(naive, W + 2 * change, atol=1e-6))
claim("`merge` knows that it has been called: W_0 + ΔW", torch.equal(layer.base.weight, W + change))

# %% [markdown]
# (Section 7.4 shows what two times a user's update looks like.) A weight does not say whether something was merged into it. Somebody must remember: our layer keeps its old weight, and *that it has one* is the note.
#
# > **Spot another.** A library wants to merge whenever a model is set to evaluation. Its layer has a method `eval`, which merges and then calls `super().eval()`. On the layer alone it works. In a model nothing is ever merged. *Why?*


# %%
class Merging(nn.Linear):
    has_merged = False

    def eval(self):
        self.has_merged = True  # here it would add ΔW to its weight
        return super().eval()


alone, model = Merging(2, 2).eval(), nn.Sequential(Merging(2, 2)).eval()
claim("the layer by itself merges", alone.has_merged)
claim("inside a model it is in evaluation mode, and has not merged", not model[0].training and not model[0].has_merged)

# %% [markdown]
# `model.eval()` is `model.train(False)`, and that calls `train(False)` of all parts, never their `eval`. So one has to write `train`. Nobody saw this for a long time: an unmerged layer gives the right answer, only more slowly. Better not to hide a change of the weights behind a word that means something else.
#
# ### 2.5 Several updates on one base
#
# An update has a name. `activate` says which ones are added, and how much of each:
#
# $$h = W_0x+\sum_iw_i\,\frac{\alpha_i}{r_i}\,B_iA_i\,x.$$
#
# All users share one base in memory, and to serve another user is to activate another name. (This $w$ is a weight of an update. Guidance had one, too.)
#
# Two updates that are added are *one* update. Put $A_1$ on top of $A_2$, and $B_1$ beside $B_2$: $\ s_1B_1A_1+s_2B_2A_2 = \begin{pmatrix}s_1B_1&s_2B_2\end{pmatrix}\begin{pmatrix}A_1\\A_2\end{pmatrix}$. Its rank is at most $r_1+r_2$.

# %%
d = trained_like(trained_like(copy.deepcopy(base), name="one", rank=2), name="two", rank=3, seed=2)
layer = d.net.blocks[0].attention.query
claim("the one that came last is active", layer.active == {"two": 1.0})
peft.activate(d.net)
claim("none: the base, exactly", torch.equal(d(noisy, 0.5, y=ten), base(noisy, 0.5, y=ten)))
peft.activate(d.net, one=1.0, two=0.5)
stacked_A = torch.cat([layer.down["one"].weight, layer.down["two"].weight])
side_by_side = torch.cat([layer.up["one"].weight, 0.5 * layer.up["two"].weight], 1)
claim("both: one update with stacked A and B, to 1e-6", torch.allclose(side_by_side @ stacked_A, layer.update(), atol=1e-6))
claim("of rank 2 + 3", torch.linalg.matrix_rank(layer.update(), rtol=1e-4) == 5)

# %% [markdown]
# ### 2.6 The file
#
# What does a user keep? $A$ and $B$ of each layer, $r$, $\alpha$ and the names of the layers. `save_lora` writes two files, in the form of the library PEFT, so that both can read what the other wrote (section 8.3).

# %%
folder = Path(tempfile.mkdtemp())
d = trained_like(copy.deepcopy(base), rank=1)
file = peft.save_lora(d.net, folder, "mine")
settings = json.loads((folder / "adapter_config.json").read_text())
print(f"r = {settings['r']}, α = {settings['lora_alpha']:g}, {len(settings['target_modules'])} layers")
trained = count(peft.trainable(d.net).values())
claim("the file holds A and B, and little else: 4 bytes a number, and 5 kB", 0 < file.stat().st_size - 4 * trained < 5000)
print(f"{file.stat().st_size / 1000:.0f} kB, where the base has {4 * size / 1e6:.1f} MB")
again = peft.load_lora(copy.deepcopy(base).net, folder, name="mine")
peft.activate(d.net, mine=1.0)
claim("read again: the same answers, exactly", torch.equal(again(noisy, torch.full((10,), 0.5), ten), d.net(noisy, torch.full((10,), 0.5), ten)))

# %% [markdown]
# **An update belongs to its base.** Added to another model of the same shape it raises no error by itself: it draws *something*. So the file carries a fingerprint of the base, a hash of all its weights, and is refused elsewhere.

# %%
other = copy.deepcopy(base).net
other.blocks[3].perceptron[2].bias.data[0] += 1e-3  # one of a million numbers
for model, what in ((other, "another base"), (unet.net, "another network")):
    try:
        peft.load_lora(model, folder)
    except ValueError as error:
        print(f"{what}: {str(error).replace(str(folder), 'the file')[:88]}…")

