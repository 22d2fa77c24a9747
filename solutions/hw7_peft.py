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
# # Homework 7: parameter-efficient fine-tuning
#
# The notebook [*Parameter-efficient fine-tuning*](../notebooks/11_peft.ipynb) had it easy now and then. Its convolutions had no groups, $A$ was the half that began at random, all inputs of a layer counted alike, files agreed on their scale, and every text was as long as the others. Here they do not. You will practise
#
# - to merge an update into a convolution with groups, which a large library cannot do;
# - to work out a first step of training, and with it the scale that suits a start;
# - to find the best update of low rank for the inputs that a layer really sees;
# - to make one file of several, and to measure how much two updates have in common without ever writing them out;
# - to merge in bfloat16 with one rounding, and to keep what the rounding took;
# - to put a prefix before texts of different lengths, with a cache.
#
# | | you write | points | difficulty | minutes |
# |---|---|---|---|---|
# | 1 | `grouped_update` | 2 | ●●○○○ | 15 |
# | 2 | `first_step` | 4 | ●●●●○ | 30 |
# | 3 | `best_update` | 4 | ●●●●○ | 30 |
# | 4 | `joined` | 4 | ●●●○○ | 25 |
# | 5 | `merged_pair` | 2 | ●●○○○ | 15 |
# | 6 | `prefix_attention` | 4 | ●●●○○ | 25 |
# | | | **20** | | **140** |
#
# **Symbols** are those of the notebook: a weight $W$ has the shape $d\times k$, $A$ is $r\times k$, $B$ is $d\times r$, and $\Delta W = s\,BA$ with a scale $s$, mostly $\alpha/r$. New symbols are said where they first stand. You need pen and paper for 1 to 4.

# %% [markdown]
# ## How it works
#
# Replace each `raise NotImplementedError` by your code, and run the cell below it. `hw.check` tries your function on a few cases and says ✓, or ✗ and what differs (or · while nothing is written yet); some mistakes it knows by sight. When all is right, the cell goes on and draws a figure with *your* function.
#
# - **Keep names, arguments and results as they are asked for.** Work in as many cells as you like, and write helpers if you want them; the six functions are found by their names.
# - **Hidden cases count too.** In each exercise 1 point is for cases like those that you can try here, with other numbers. The rest is for cases you have not seen: other shapes, a single row, float64, the ends of a range.
# - **Leave inputs unchanged.** `x += 1` and functions that end in `_` change a tensor that is not yours.
# - **Results have the dtype of the tensors that came**, unless said otherwise. Good practice: work in float64, and cast last.
# - **Write the formulas out.** The course's kernels that do the same (`LoRA.update`, `peft.merge`, `PrefixAttention`, `later`, …) are refused inside your functions. Your own earlier functions are welcome, and so is all of PyTorch.
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
import copy
import math

import torch
from torch import Tensor, nn

from dgm_course import checkpoints, homework
from dgm_course.checks import claim
from dgm_course.denoisers import clipped
from dgm_course.viz import plots, style

hw = homework.load("hw7")
g = torch.Generator().manual_seed(7)  # where all chance in the figures comes from

# %% [markdown]
# The next cells of code serve the figures. Come back to them when you wonder what a figure shows.
#
# Exercises 3 to 5 need models that were fine-tuned *in full*. The course has some already, though nobody called them so: the students of notebook 08. `mnist-student-8` began with the weights of the digit model, `mnist-unet`, and learnt to draw in 8 steps. `mnist-student-4` began with the weights of `mnist-student-8`, and so on down to `mnist-student-1`. `mnist-consistency` began with those of `mnist-unet` again. So each of them is $W_0+\Delta W$, with the digit model as the base. We look at the 17 layers that have a 3×3 kernel, which hold two thirds of all numbers.

# %%
tuned = ["mnist-student-8", "mnist-student-4", "mnist-student-2", "mnist-student-1", "mnist-consistency"]
models = {name: checkpoints.load(name) for name in ["mnist-unet", *tuned]}


def convolutions(model):
    """The layers with a 3×3 kernel, by name."""
    layers = model.net.named_modules()
    return {place: layer for place, layer in layers if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3)}


base = {place: layer.weight.detach() for place, layer in convolutions(models["mnist-unet"]).items()}


def changes(name):
    """ΔW of each of these layers, by name."""
    return {place: layer.weight.detach() - base[place] for place, layer in convolutions(models[name]).items()}


# %%
@torch.no_grad()
def draw(model, noise):
    """What a model makes of pure noise in one evaluation, for the digits 0, 1, …, 9, 0, …"""
    return clipped(model)(noise, 1.0, y=torch.arange(len(noise)) % 10)


def patches_seen(model, noise, most=2000):
    """What goes into each of these layers while a model draws: for each some patches, (N, k)."""
    seen, hooks = {}, []
    for place, layer in convolutions(model).items():

        def look(layer, x, place=place):
            rows = nn.functional.unfold(x[0], 3, padding=layer.padding, stride=layer.stride).mT.flatten(0, 1)
            seen[place] = rows[torch.randperm(len(rows), generator=g)[:most]]

        hooks.append(layer.register_forward_pre_hook(look))
    draw(model, noise)
    for hook in hooks:
        hook.remove()
    return seen


# %%
def with_changes(name, low):
    """A model with other changes in these layers: W_0 + `low`. All its other parameters stay as they are."""
    model = copy.deepcopy(models[name])
    for place, layer in convolutions(model).items():
        layer.weight.data = base[place] + low[place]
    return model


def file_of(delta, rank, scale):
    """A and B for the best update of a rank, to be read with this scale."""
    U, sigma, Vt = torch.linalg.svd(delta.flatten(1), full_matrices=False)
    return Vt[:rank].contiguous(), U[:, :rank] * sigma[:rank] / scale


# %% [markdown]
# And for exercise 2: a training from either start.


# %%
def gone(start, rule, rank, steps=5, rate=0.003, repeats=8):
    """Which share of a loss is gone after some steps of Adam, from a Gaussian `start`, "A" or "B", with the scale r^-rule."""
    shares = []
    for seed in range(repeats):
        own = torch.Generator().manual_seed(seed)
        goal, A = torch.randn(32, 48, generator=own) / 7, torch.randn(rank, 48, generator=own) / 48**0.5
        B = torch.randn(32, rank, generator=own) / rank**0.5
        A, B = (half.requires_grad_() for half in ((A, 0 * B) if start == "A" else (0 * A, B)))
        optimizer = torch.optim.Adam([A, B], rate)
        losses = []
        for _ in range(steps + 1):
            optimizer.zero_grad()
            losses.append((rank**-rule * B @ A - goal).square().sum())
            losses[-1].backward()
            optimizer.step()
        shares.append(1 - losses[-1].item() / losses[0].item())
    return sum(shares) / repeats


# %% [markdown]
# ## 1. A convolution with groups (2 points)
#
# ●●○○○ · 15 minutes · read again: section 2.3 of the notebook
#
# A convolution of $C$ channels to $d$ with $g$ groups is $g$ small convolutions side by side: the first $C/g$ channels go to the first $d/g$ outputs, the next to the next, and nothing crosses over. Its weight has the shape $(d, C/g, K, K')$. `peft.LoRA` refuses such a layer. A widely used library accepts it, warns, and then cannot merge: its $A$ has no groups, so each output sees all channels, and such an update does not fit into the weight.
#
# Give *both* layers of the update $g$ groups. $A$ is a convolution from $C$ channels to $r$, with the layer's own kernel, and $B$ one from $r$ to $d$ with kernel 1. Then the two, one after the other and times $\alpha/r$, are again one convolution with $g$ groups.
#
# **Write** `grouped_update(A, B, alpha, groups)`, which gives its weight, $\Delta W$.
#
# - `A`: $(r, C/g, K, K')$. `B`: $(d, r/g, 1, 1)$. These are the weights as `nn.Conv2d(..., groups=g)` stores them, float32 or float64. `alpha`: a Python float. `groups`: $g\ge1$, a divisor of $C$, $r$ and $d$.
# - $r$ is the number of channels in the middle, in all groups together.
# - Returns $\Delta W$, of shape $(d, C/g, K, K')$.
#
# <details><summary>Hint</summary>
#
# First let $g = 1$: what are the shapes of the two matrices? With more groups there are $g$ pairs of smaller matrices, and PyTorch multiplies a stack of matrices with a stack of matrices.
#
# </details>


# %%
def grouped_update(A: Tensor, B: Tensor, alpha: float, groups: int) -> Tensor:
    """What an update of two convolutions with groups adds to the weight, (d, C/g, K, K').

    Arguments:
        A, B: Weights of the two, (r, C/g, K, K') and (d, r/g, 1, 1).
        alpha: α of the scale α/r.
        groups: g.
    """
    # BEGIN SOLUTION
    r = A.shape[0]
    downs, ups = A.reshape(groups, r // groups, -1), B.reshape(groups, -1, r // groups)
    return (alpha / r * torch.bmm(ups, downs)).reshape(B.shape[0], *A.shape[1:])
    # END SOLUTION


# %%
if hw.check(grouped_update):
    maps, same = {}, []
    for groups in (1, 2, 4, 8):
        A, B = torch.randn(8, 16 // groups, 3, 5, generator=g), torch.randn(16, 8 // groups, 1, 1, generator=g)
        x, update = torch.randn(2, 16, 20, 20, generator=g), grouped_update(A, B, 4.0, groups)
        for how in ({"padding": 1}, {"stride": 2}, {"dilation": (3, 2), "padding": (1, 2), "stride": (1, 2)}):
            middle = nn.functional.conv2d(x, A, groups=groups, **how)
            two = 4.0 / 8 * nn.functional.conv2d(middle, B, groups=groups)
            same.append((nn.functional.conv2d(x, update, groups=groups, **how) - two).abs().max() / two.abs().max())
        sizes = update.flatten(2).norm(dim=2)  # of each kernel, (d, C/g)
        maps[f"g = {groups}"] = torch.block_diag(*sizes.chunk(groups)) / sizes.max() * 2 - 1
    claim("two convolutions with groups are one, with any stride, padding and dilation", max(same) < 1e-5)
    plots.grid(torch.stack(list(maps.values()))[:, None], labels=list(maps), scale=2.5)

# %% [markdown]
# **What to see.** How large each kernel of $\Delta W$ is, from 16 channels (across) to 16 outputs (down); black is nothing. With more groups there are fewer kernels, in blocks along the diagonal. At $g = 8$ the two rows of a block are multiples of each other: there is one channel in the middle, $r/g = 1$, and it leaves no more.
#
# **Question.** (a) Which share of the numbers of $\Delta W$ do $A$ and $B$ have, and how does it depend on $g$? (b) A *depthwise* convolution has $g = C = d$: a kernel for each channel. What does LoRA save there, with the least $r$ that is possible? (c) Stride, padding and dilation belong to $A$. What would go wrong if $B$, too, had the layer's stride?
#
# <!-- BEGIN SOLUTION -->
# (a) $\Delta W$ has $dCKK'/g$ numbers, $A$ has $rCKK'/g$ and $B$ has $dr/g$. The share, $r\,(CKK'+d)/(dCKK')$, does not depend on $g$. But $r$ must be a multiple of $g$, so with many groups it cannot be small. (b) Nothing. The least $r$ is $g = C$, so that $A$ has $CKK'$ numbers, as many as $\Delta W$ itself, and $B$ another $C$. A group's kernel is a matrix with one row, of rank 1 already. Such layers hold few numbers; one trains them as they are. (c) Every output of $A$ lies at an output of the layer already. A second stride would throw away most of them, and the sizes would not fit. $B$ has to be a matrix at each place, so that the two in a row are a convolution with $A$'s geometry.
# <!-- END SOLUTION -->

# %% [markdown]
# ## 2. The other half begins at random (4 points)
#
# ●●●●○ · 30 minutes · read again: sections 2.2 and 4.2 of the notebook
#
# The notebook let $A$ be Gaussian and $B$ zero. The model starts as its base just as well with **$A$ zero and $B$ Gaussian**, and both starts have been compared in the literature ([Hayou et al., 2024](https://arxiv.org/abs/2406.08447)). They look like mirror images. Are they? As is usual, let a random layer have entries of variance one over the number of its *inputs*. $A$ has $k$ inputs, but $B$ has $r$: so
#
# $$A = 0,\qquad B_{ij}\sim\mathcal N\bigl(0, \tfrac1r\bigr)\ \text{independent},\qquad\Delta W = s\,BA .$$
#
# Now take one step with the learning rate $\eta$, by SGD or by Adam, for a loss with the gradient $G = \partial L/\partial W$ at $W = W_0$. Both $A$ and $B$ are trained. Adam has its corrections for the start ($\hat m$ and $\hat v$), and its $\epsilon$ is 0. A number whose gradient is 0 does not move.
#
# **Write** `first_step(grad, B, scale, rate, optimizer)`, which gives $\Delta W_1$ after this step, for the $B$ that came; and its mean $\mathbb E[\Delta W_1]$ over all such random $B$.
#
# - `grad`: $G$, $(d, k)$. `B`: $(d, r)$. Both are float32, or both float64. `scale`, `rate`: $s$ and $\eta$, Python floats above 0. `optimizer`: `"sgd"` or `"adam"`.
# - Some columns of $G$ may be zero: those of inputs that were zero all the time.
# - Returns `(update, mean)`, both $(d, k)$, in the dtype of `grad`. Both are formulas: no draws.
#
# <details><summary>Hint 1</summary>
#
# Which of the two has a gradient in the first step? Write it down with its $s$. Adam's first step does not know how large a gradient is, only its sign. And the layer sees $A$ through $B$, and once more through $s$.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# Look at one column $c$ of $\Delta W_1$ and one column $b$ of $B$ at a time. For Adam, turn the axes so that the first lies along $\hat g = g/\lVert g\rVert$, where $g$ is the column $c$ of $G$: $b$ has the coordinate $\hat g\cdot b$ there. What is left of the mean in the other directions? And $\mathbb E|z| = \sqrt{2/\pi}$ for $z\sim\mathcal N(0, 1)$.
#
# </details>


# %%
def first_step(grad: Tensor, B: Tensor, scale: float, rate: float, optimizer: str) -> tuple[Tensor, Tensor]:
    """ΔW after one step from A = 0, and its mean over Gaussian B of variance 1/r.

    Arguments:
        grad: The gradient by the weight, (d, k).
        B: (d, r).
        scale, rate: The scale s of BA, and the learning rate η.
        optimizer: "sgd" or "adam".
    """
    # BEGIN SOLUTION
    r = B.shape[1]
    if optimizer == "sgd":
        return -rate * scale**2 * B @ (B.mT @ grad), -rate * scale**2 * grad  # E[BBᵀ] is r times I/r
    signs, length = (B.mT @ grad).sign(), grad.norm(dim=0)
    along = torch.where(length > 0, grad / length, torch.zeros_like(grad))
    return -rate * scale * B @ signs, -rate * scale * math.sqrt(2 * r / math.pi) * along
    # END SOLUTION


# %%
if hw.check(first_step):
    grad, ranks, off = torch.randn(12, 10, generator=g, dtype=torch.float64), torch.tensor([1, 2, 4, 8, 16, 32]), []
    _, panels = plots.panels(2, width=9.8, height=3.6)
    for name, ax in zip(("sgd", "adam"), panels, strict=True):
        sizes = {"s = 1": [], "s = 1/√r": [], "s = 1/r": []}
        for r in ranks.tolist():
            starts = torch.randn(1000, 12, r, generator=g, dtype=torch.float64) / r**0.5
            _, mean = first_step(grad, starts[0], 1.0, 1.0, name)
            drawn = torch.stack([first_step(grad, B, 1.0, 1.0, name)[0] for B in starts]).mean(0)
            off.append((drawn - mean).norm() / mean.norm())
            for rule, line in zip((0, 0.5, 1), sizes.values(), strict=True):
                line.append(first_step(grad, starts[0], r**-rule, 1.0, name)[1].norm())
        lines = {rule: torch.stack(line) for rule, line in sizes.items()}
        flat = [rule for rule, line in lines.items() if (line / line[0] - 1).abs().max() < 1e-9]
        claim(f"{name}: only {' and '.join(flat)} makes a mean step that does not depend on r", len(flat) == 1)
        plots.curves(ranks, lines, "r", "size of the mean first step", logx=True, logy=True, ax=ax, title=name)
    claim("the means over 1,000 draws of B are your means, to 20 %", max(off) < 0.2)
    runs = {f"{half} random, s = {name}": (half, p) for half in "AB" for name, p in (("1/√r", 0.5), ("1/r", 1))}
    plots.curves(ranks, {name: torch.tensor([gone(*run, r) for r in ranks.tolist()]) for name, run in runs.items()}, "r", "share of the loss that is gone", logx=True, logy=True)

# %% [markdown]
# **What to see.** Above: the size of the mean step over $r$. No line is flat in both panels, and in each panel the flat one is not the notebook's for that optimizer. Below: a training of five steps by Adam on a least-squares problem, $\lVert sBA-D\rVert^2$, from both starts. With $A$ random $1/r$ keeps the pace at all ranks, and $1/\sqrt r$ gets faster with the rank. With $B$ random $1/r$ gets slower, and $1/\sqrt r$ keeps the pace (nearly: five steps are not one). Each rule fits its start.
#
# **Question.** (a) Under Adam, for which $s$ does the mean step not depend on $r$ if $A$ is random, and for which if $B$ is random? Where does the difference come from, as the two halves look like mirror images? (b) Below, the training with $B$ random is faster at each rank, for the same scale and the same learning rate. Is it the better start?
#
# <!-- BEGIN SOLUTION -->
# (a) $\alpha/r$ if $A$ is random, $\alpha/\sqrt r$ if $B$ is. What differs is the variance. Each of the $r$ directions adds the mean size of its coordinate along $\hat g$: $\sqrt{2/\pi k}$ for $A$, where there is no $r$ in it, so the sum grows like $r$; and $\sqrt{2/\pi r}$ for $B$, so the sum grows like $\sqrt r$. (Under SGD: $\alpha/\sqrt r$ and $\alpha$.) Had one drawn $B$ with variance $1/d$, the two starts would be mirror images. So a rule for the scale is a rule for a start and an optimizer. (b) Not for that. Its first step is larger: for a $G$ without rows or columns of zeros, the two mean steps have the sizes $\eta s\sqrt{2r/\pi}\,\sqrt k$ and $\eta s\,r\sqrt{2/\pi k}\,\sqrt d$, and the first is $k/\sqrt{dr}$ times the second. A larger learning rate would do the same for the other start. A comparison is fair if each start has its own best rate, and the paper finds $A$ random to be better then.
# <!-- END SOLUTION -->

# %% [markdown]
# ## 3. The best update for what the layer sees (4 points)
#
# ●●●●○ · 30 minutes · read again: sections 3.1 to 3.3 of the notebook
#
# Somebody has fine-tuned a model in full, and wants to send it as a small file. The notebook cut $\Delta W$ to its first singular values. That is the best matrix of its rank if all entries count alike. But a layer does not multiply all vectors. It multiplies its own inputs, $x_1, \dots, x_N$, and some directions are large in them, others nearly empty. What counts is
#
# $$E(M) = \frac1N\sum_{i=1}^N\lVert(\Delta W-M)\,x_i\rVert^2 .$$
#
# **Write** `best_update(delta, inputs, budget)`, which gives the $M$ with the least $E(M)$ that fits into a file; and the least error of each rank.
#
# - `delta`: $\Delta W$, $(d, \dots)$, float32 or float64: the weight of a linear layer, $(d, k)$, or of a convolution, $(d, C, K, K')$, which is a matrix with $k = CKK'$ columns. `inputs`: the $x_i$, $(N, k)$, for a convolution its flattened patches. They span all $k$ directions.
# - `budget`: an int, how many numbers the file may hold. $M$ is stored as $B$ and $A$, $d\times r$ and $r\times k$; take the largest $r$ that fits, but no more than $\min(d, k)$. If nothing fits, $M = 0$. (In every case there is exactly one best $M$.)
# - Returns `(update, left)`: $M$, of the shape and dtype of `delta`; and $E$ of the best $M$ of rank 0, 1, …, $\min(d, k)$, of shape $(\min(d, k)+1,)$, in the same dtype.
#
# <details><summary>Hint 1</summary>
#
# Put the inputs side by side, as $X$ with a column for each input. Then $E(M) = \frac1N\lVert\Delta W X-MX\rVert^2$, where the norm is the root of the sum of all squares, as in the notebook. $MX$ has at most rank $r$. Which matrix of rank $r$ is nearest to $\Delta WX$? That bounds $E$ from below.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# The nearest one can be written as a projection, from the left, of $\Delta WX$. Is it $MX$ for some $M$? (There are other ways, by making the inputs round first. They need an inverse; this one does not.)
#
# </details>


# %%
def best_update(delta: Tensor, inputs: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    """The update of low rank that is nearest to ΔW on a layer's inputs, and the least error of each rank.

    Arguments:
        delta: ΔW, (d, k) or (d, C, K, K').
        inputs: What the layer sees, (N, k).
        budget: How many numbers A and B may have together.
    """
    # BEGIN SOLUTION
    W, X = delta.flatten(1).double(), inputs.double().mT
    (d, k), most = W.shape, min(W.shape)
    U, sigma, _ = torch.linalg.svd(W @ X / X.shape[1] ** 0.5, full_matrices=False)
    U, squares = U[:, : min(budget // (d + k), most)], sigma[:most] ** 2
    errors = [squares[r:].sum() for r in range(most + 1)]
    return (U @ (U.mT @ W)).view(delta.shape).to(delta), torch.stack(errors).to(delta)
    # END SOLUTION


# %%
if hw.check(best_update):
    student, noise, fresh = models["mnist-student-1"], *torch.randn(2, 40, 1, 28, 28, generator=g)
    seen, wanted, ranks = patches_seen(student, noise), changes("mnist-student-1"), [0, 1, 2, 4, 8, 16]
    goal, errors, images = draw(student, fresh), {"all inputs alike": [], "what the layer sees": []}, {}
    for r in ranks:
        for name, line in errors.items():
            low = {}
            for place, delta in wanted.items():
                d, k = delta.flatten(1).shape
                low[place], _ = best_update(delta, seen[place] if "sees" in name else torch.eye(k), r * (d + k))
            images[r, name] = draw(with_changes("mnist-student-1", low), fresh)
            line.append((images[r, name] - goal).square().mean())
    errors = {name: torch.stack(line) for name, line in errors.items()}
    claim("at each rank the files for what the layers see draw nearer to the student", (errors["what the layer sees"] < 0.8 * errors["all inputs alike"])[1:].all())
    claim("up to rank 4 they are as good, to 20 %, as files of twice the rank", (errors["what the layer sees"][1:4] < 1.2 * errors["all inputs alike"][2:5]).all())
    plots.curves(torch.tensor(ranks), errors, "rank", "squared error of the images", logy=True)
    rows = {f"rank {r}": images[r, "what the layer sees"][:10] for r in (0, 1, 4, 16)} | {"student": goal[:10]}
    plots.rows(list(rows.values()), labels=list(rows))

# %% [markdown]
# **What to see.** `mnist-student-1` draws a digit in one evaluation, which its base cannot. The changes of its 17 convolutions are cut to a rank. (The other parameters, a third of all, are the student's own, also at rank 0.) Above: how far the images are from the student's, on other noise than the layers' inputs came from. If the cut knows what the layers see, half the rank does as well, or nearly. Below: at rank 0 the digits are grey and uncertain, at rank 16 they are nearly the student's. There is no rank from which on nothing is missing: the change is not of low rank, some of it is only more important.
#
# **Question.** (a) What does your function become for inputs with $\frac1N\sum_ix_ix_i^\top = I$? (b) Why does the mean of the inputs not have to be taken away first, as one does before a principal component analysis? When would it be right to do so? (c) All layers got the same rank. How would you share one budget among layers of the *same* shape, so that the sum of their errors is least? Is it still easy if their shapes differ?
#
# <!-- BEGIN SOLUTION -->
# (a) The truncated SVD of $\Delta W$: then $E(M) = \lVert\Delta W-M\rVert^2$, and the projection on the first $r$ left singular vectors cuts the sum. (b) The layer multiplies $x$ itself, so an error on the mean is an error in every output. If the layer's *bias* may be sent as well, it can take up $(\Delta W-M)\,\bar x$ exactly; then only the deviations from the mean are left to the rank, and the mean should be taken away. (c) Take the squared singular values of $\Delta W X/\sqrt N$ of all layers, and keep the largest ones, as many as can be paid: every direction costs the same, $d+k$, and within a layer they come in the right order. If shapes differ, directions have different prices, and to fill a budget exactly is a knapsack problem. Taking them by gain for each number, $\sigma^2/(d+k)$, is the best for whatever that happens to cost. (And the sum of layers' errors is not yet the error of the images. That took a measurement.)
# <!-- END SOLUTION -->

# %% [markdown]
# ## 4. Several files in one (4 points)
#
# ●●●○○ · 25 minutes · read again: sections 2.5 and 2.6 of the notebook
#
# You have $n$ files for one layer: $A_i$ of shape $(r_i, k)$, $B_i$ of shape $(d, r_i)$ and $\alpha_i$. Most are plain, with the scale $s_i = \alpha_i/r_i$; some were trained as rank-stabilised LoRA, with $s_i = \alpha_i/\sqrt{r_i}$. You want *one* file, which any reader of plain files understands, that does the same as all of them together with weights $w_i$:
#
# $$\frac\alpha R\,BA = \sum_iw_is_iB_iA_i,\qquad R = r_1+\dots+r_n .$$
#
# The $\alpha$ of the new file is given, too. And before you add updates, you want to know how much they have in common. One measure is the inner product of two matrices, the sum of the products of their entries:
#
# $$\langle P, Q\rangle = \sum_{ij}P_{ij}Q_{ij} = \mathrm{tr}(P^\top Q).$$
#
# **Write** `joined(downs, ups, alphas, rooted, weights, alpha)`, which gives $A$, $B$, and the matrix of all $\langle s_iB_iA_i,\,s_jB_jA_j\rangle$.
#
# - `downs`, `ups`: lists of the $A_i$ and the $B_i$, all float32 or all float64. The ranks may differ. `alphas`, `weights`: float64, $(n,)$; weights may be negative or 0. `rooted`: bool, $(n,)$, True where $s_i = \alpha_i/\sqrt{r_i}$. `alpha`: a Python float above 0.
# - So that the answer is one and no other: $A$ is the old $A_i$ **as they are**, the first on top, and all numbers go into $B$.
# - Returns `(A, B, overlap)`: $(R, k)$ and $(d, R)$ in the dtype of the files, and $(n, n)$ in float64. The overlap is that of the files as they are, without the $w_i$.
# - In one hidden case the layer is very wide: $d = 50{,}000$ and $k = 60{,}000$. A single matrix $(d, k)$ does not fit into the memory there.
#
# <details><summary>Hint</summary>
#
# In $\mathrm{tr}(A_i^\top B_i^\top\,B_jA_j)$ one may move the last factor to the front. Which products of two matrices are small?
#
# </details>


# %%
def joined(
    downs: list[Tensor], ups: list[Tensor], alphas: Tensor, rooted: Tensor, weights: Tensor, alpha: float
) -> tuple[Tensor, Tensor, Tensor]:
    """A and B of one plain file for a weighted sum of updates, and the inner products of the updates, (n, n).

    Arguments:
        downs, ups: A and B of each file, (r_i, k) and (d, r_i).
        alphas, rooted, weights: α, whether the scale is α/√r, and the weight, of each file, (n,).
        alpha: α of the new file.
    """
    # BEGIN SOLUTION
    ranks = torch.tensor([len(A) for A in downs])
    s = alphas / torch.where(rooted, ranks.double().sqrt(), ranks.double())
    wide = [c * B for c, B in zip((weights * s * ranks.sum() / alpha).tolist(), ups, strict=True)]
    files = [(A.double(), c * B.double()) for A, B, c in zip(downs, ups, s.tolist(), strict=True)]
    overlap = [[((B.mT @ D) * (A @ C.mT)).sum() for C, D in files] for A, B in files]
    return torch.cat(downs), torch.cat(wide, 1), torch.stack([torch.stack(row) for row in overlap])
    # END SOLUTION


# %%
if hw.check(joined):
    two, plain = torch.tensor([1.0, 1.0], dtype=torch.float64), torch.tensor([False, True])
    place, total = "middle.1.conv1", torch.zeros(5, 5, dtype=torch.float64)
    deltas = [changes(name) for name in tuned]
    first, second = file_of(deltas[2][place], 8, 3.0 / 8), file_of(deltas[3][place] - deltas[2][place], 4, 2.0 / 4**0.5)
    A, B, _ = joined(*zip(first, second, strict=True), torch.tensor([3.0, 2.0], dtype=torch.float64), plain, two, 6.0)
    apart = 3.0 / 8 * first[1] @ first[0] + 2.0 / 4**0.5 * second[1] @ second[0]
    claim("the new file, read as a plain one of rank 12, is the sum", torch.allclose(6.0 / 12 * B @ A, apart, atol=1e-6))
    for place in base:
        downs, ups = zip(*(file_of(delta[place], 16, 1.0) for delta in deltas), strict=True)
        ranks = torch.tensor([len(A) for A in downs], dtype=torch.float64)
        total += joined(downs, ups, ranks, ranks < 0, 0 * ranks, 1.0)[2]
    cosines = total / total.diagonal().sqrt() / total.diagonal().sqrt()[:, None]
    claim("each student has more in common with its teacher than with any earlier one", all((row[: i + 1].diff() > 0).all() for i, row in enumerate(cosines[:4])))
    claim("and more than any of them has with the consistency model, which began at the base", cosines.diagonal(-1)[:3].min() > cosines[4, :4].max())
    lines = {name.removeprefix("mnist-"): row[:4].flip(0) for name, row in zip(tuned, cosines, strict=True)}
    plots.curves(torch.tensor([1, 2, 4, 8]), lines, "steps of the student", "cosine with the student's update", logx=True)

# %% [markdown]
# **What to see.** Cosines between the updates of five fine-tuned models, that is, the inner product over both lengths, with all 17 layers taken together and each update as a file of rank 16. Along the chain of students neighbours are much alike, for each began where its teacher ended. The consistency model began at the base and never saw a student. Still its update has much in common with theirs, the more the fewer steps they make: it, too, learnt to go far at once.
#
# **Question.** (a) Two random updates of this size have a cosine of nearly 0. Why? (b) A public library also offers to add the $A_i$ and the $B_i$ *each by itself*, with the roots of the weights, which keeps the rank small. What does the product hold, besides the sum of the updates? When is it harmless? (c) Let $\langle\Delta W_1, \Delta W_2\rangle = 0$. Does user 1's style then survive if user 2's update is added?
#
# <!-- BEGIN SOLUTION -->
# (a) $B_1^\top B_2$ has entries of the size $\sqrt d$ with random signs, $A_1A_2^\top$ of the size $\sqrt k$, and $r^2$ products of them sum to about $r\sqrt{dk}$. The squared lengths are $r\,dk$. So the cosine is of the size $1/\sqrt{dk}$, as for any two random vectors of $dk$ numbers, whatever the rank: 0.005 for a layer of 64 × 576. (b) $(B_1+B_2)(A_1+A_2)$ holds $B_1A_2$ and $B_2A_1$ as well: one user's directions in are sent to the other's directions out, which nobody trained. It is harmless if the crossed terms vanish, and exact if all files share the same $A$ (or the same $B$), so that $\sum_iw_iB_iA = (\sum_iw_iB_i)A$; then one has to add one of the halves only. (c) Not in general. Orthogonal means that the sum's squared length is the sum of the squared lengths. The layer is linear, but the network is not, and both updates act on the same inputs: for the same $x$ user 1 wants $\Delta W_1x$ and gets $\Delta W_2x$ on top. It would be safe if $\Delta W_2x = 0$ for all inputs that matter to user 1, which is a condition on the inputs again (exercise 3).
# <!-- END SOLUTION -->

# %% [markdown]
# ## 5. Merging in bfloat16 (2 points)
#
# ●●○○○ · 15 minutes · read again: section 2.4 of the notebook
#
# A base in bfloat16 has 8 bits for the digits of a number. An update adds a hundredth of a weight to it, or a thousandth, and much of that falls off the end. Let $n$ updates be merged at once. There are many places where one could round, and one where one must: the sum $W+\Delta W$ has to be a number of bfloat16 in the end. Whatever is rounded before that is lost for nothing.
#
# And what falls off in the end need not be lost. It is a small number with digits of its own, so keep it as a *second* number of bfloat16. Both together hold the sum to about 16 bits.
#
# **Write** `merged_pair(weight, downs, ups, scales)`, which gives $W+\sum_is_iB_iA_i$ rounded to bfloat16, once; and what this rounding took away, rounded to bfloat16.
#
# - `weight`: $(d, k)$, float32, but each entry is a number of bfloat16. `downs`, `ups`: the $A_i$, $(n, r, k)$, and the $B_i$, $(n, d, r)$, float32. `scales`: $s_i$, float64, $(n,)$.
# - All is summed in float32 (or float64), before anything is rounded.
# - Returns `(merged, rest)`, both $(d, k)$, **in float32**, with entries that are numbers of bfloat16. `merged + rest` is the sum, as nearly as two such numbers can say it. (The check compares arrays of NumPy, which has no bfloat16.)
#
# <details><summary>Hint</summary>
#
# `x.bfloat16().float()` rounds to the nearest number of bfloat16, and comes back. The difference of the sum and its rounded self is exact in float32.
#
# </details>


# %%
def merged_pair(weight: Tensor, downs: Tensor, ups: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """A base in bfloat16 with all updates merged, rounded once, and what the rounding took, in bfloat16, too.

    Arguments:
        weight: (d, k), numbers of bfloat16 in float32.
        downs, ups: A and B of each update, (n, r, k) and (n, d, r).
        scales: The scale of each, float64 (n,).
    """
    # BEGIN SOLUTION
    update = (scales.float()[:, None, None] * ups @ downs).sum(0)
    exact = weight + update
    merged = exact.bfloat16().float()
    return merged, (exact - merged).bfloat16().float()
    # END SOLUTION


# %%
if hw.check(merged_pair):
    W, near = base["middle.1.conv1"].flatten(1).bfloat16().float(), lambda x: x.bfloat16().float()
    A, B = file_of(changes("mnist-student-1")["middle.1.conv1"], 16, 1.0)
    A, B, powers = A.unflatten(0, (8, 2)), torch.stack(B.chunk(8, 1)), -torch.arange(10)  # 8 updates of rank 2
    wrong, still = {"one after the other": [], "rounded once": [], "with the rest": []}, []
    for c in (2.0**powers).tolist():
        merged, rest = merged_pair(W, A, B, torch.full((8,), c, dtype=torch.float64))
        in_turn = W
        for a, b in zip(A, B, strict=True):
            in_turn = near(in_turn + c * b @ a)
        exact, size = W.double() + c * (B.double() @ A.double()).sum(0), c * (B @ A).sum(0).norm()
        for line, value in zip(wrong.values(), (in_turn, merged, merged.double() + rest), strict=True):
            line.append((value - exact).norm() / size)
        still.append((merged == W).double().mean())
    wrong = {name: torch.stack(line) for name, line in wrong.items()} | {"weights that stay": torch.stack(still)}
    relative = (2.0**powers) * (B @ A).sum(0).norm() / W.norm()
    claim("one after the other: more than twice the error of one rounding", (wrong["one after the other"] > 2 * wrong["rounded once"])[:3].all())
    claim("with the rest: less than a hundredth of it", (wrong["with the rest"] < wrong["rounded once"] / 100).all())
    plots.curves(relative, wrong, "size of the update / size of the weight", "error / size of the update", logx=True, logy=True)

# %% [markdown]
# **What to see.** A layer of the digit model in bfloat16, and `mnist-student-1`'s change of it in eight updates of rank 2, made smaller and smaller to the left. The error is measured in sizes of the update: at 1 it is as if nothing had been merged. One line is no error but a share: the weights that do not move at all. It rises with the errors. With the rest, the error stays below two thousandths everywhere.
#
# **Question.** (a) At the right end, eight updates merged one after the other have about three times the error of one rounding. Why about three? (b) Rounding the update by itself to bfloat16, and then the sum, is a mistake in this exercise. In the figure its line would lie on that of one rounding. Why does it cost so little here, while merging in turn costs so much? (c) Somebody unmerges by subtracting the same update in float32, and rounds. Try it with the weights above: 9 of 10 weights or more come back exactly. Which ones do not?
#
# <!-- BEGIN SOLUTION -->
# (a) Each rounding adds an error of about the same size, with a random sign. Eight independent ones add up like $\sqrt8\approx2.8$. (b) The error of a rounding is relative to what is rounded. The update is an eighth of the weight or less, so its own rounding costs about an eighth of what that of the sum costs, or less, and added as squares it hardly shows. Merging in turn rounds the *sum*, eight times. Still, what the first rounding takes is lost for nothing, and with an update as large as the weight it would show. (c) `merged` is $W+\Delta W+e$ with an error $e$ of at most half a step of the numbers around it. Take $\Delta W$ away, and $W+e$ is left, which is rounded to $W$, as long as half a step there is more than $|e|$. This fails where the sum has moved up to the next power of two: there the steps are twice as long, so $e$ may be as large as a whole step around $W$. (It can also fail where $W$ itself is a power of two, below which steps are shorter. Few weights are.) So unmerging seems to work, and after many users the base is full of small errors. Keep the old weight.
# <!-- END SOLUTION -->

# %% [markdown]
# ## 6. A prefix before texts of different lengths (4 points)
#
# ●●●○○ · 25 minutes · read again: sections 6.1 to 6.3 of the notebook
#
# The notebook's texts were all of one length, and all their tokens were there at once. In use it is different. Texts of a batch have different lengths, so the shorter ones are filled up *at their front* with padding, which nobody may look at. And a model that writes keeps the keys and values of what was written in a **cache**, so that there are only a few queries, for the last tokens, and many keys.
#
# So there are $N$ queries and $M\ge N$ keys of a text's own. The last $N$ keys belong to the queries: query $i$, counted from 0, stands at the key $M-N+i$. Before all of them stand $P$ keys and values of a prefix, the same for each text of the batch. A query sees
#
# - all of the prefix, always;
# - of its own keys those up to its own place, if they are no padding.
#
# There are $H$ heads, and in each the scores are $q\cdot k/\sqrt{D/H}$, for the prefix's keys as for the others.
#
# **Write** `prefix_attention(q, k, v, prefix, real, heads)`, which gives what the attention says, before its output layer; and $\lambda$, the share of the softmax's mass that the prefix takes.
#
# - `q`: $(T, N, D)$ for $T$ texts. `k`, `v`: $(T, M, D)$. `prefix`: $(2, P, D)$, first the keys, then the values, $P\ge1$. All float32, or all float64. `real`: bool, $(T, M)$, False where there is padding. `heads`: $H$, an int that divides $D$. A head has $D/H$ numbers in a row of each vector, the first head the first ones.
# - A query may itself be padding, and even all of a text may be: then it sees the prefix alone.
# - Returns `(out, share)`: $(T, N, D)$, the heads side by side again, and $\lambda$, $(T, H, N)$.
#
# <details><summary>Hint</summary>
#
# Make the mask of what is hidden in two parts, each for the $M$ own keys: what is later, from two ranges of numbers, and what is padding. Then put $P$ columns in front of it. PyTorch's own attention, `scaled_dot_product_attention`, takes such a mask, but look up where its `is_causal` begins to count. It does not return its weights.
#
# </details>


# %%
def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, prefix: Tensor, real: Tensor, heads: int
) -> tuple[Tensor, Tensor]:
    """Causal attention behind a prefix, (T, N, D), and the prefix's share of the softmax, (T, heads, N).

    Arguments:
        q, k, v: Queries, (T, N, D), and the keys and values of the texts so far, (T, M, D).
        prefix: Keys and values of the prefix, (2, P, D).
        real: Which keys are no padding, bool (T, M).
        heads: How many heads share D.
    """
    # BEGIN SOLUTION
    (batch, N, _), M, P = q.shape, k.shape[1], prefix.shape[1]
    keys, values = (torch.cat([one.expand(batch, -1, -1), own], 1) for one, own in zip(prefix, (k, v), strict=True))
    Q, K, V = (h.unflatten(2, (heads, -1)).transpose(1, 2) for h in (q, keys, values))
    late = torch.arange(M) > torch.arange(M - N, M)[:, None]
    hidden = nn.functional.pad(late | ~real[:, None], (P, 0))  # nothing of the prefix
    weights = (Q @ K.mT / Q.shape[-1] ** 0.5).masked_fill(hidden[:, None], -torch.inf).softmax(-1)
    return (weights @ V).transpose(1, 2).flatten(2), weights[..., :P].sum(-1)
    # END SOLUTION


# %%
if hw.check(prefix_attention):
    N, D, P = 64, 32, 4
    q, k, v = torch.randn(3, 50, N, D, generator=g, dtype=torch.float64)
    own, some = torch.ones(50, N, dtype=torch.bool), torch.randn(2, P, D, generator=g, dtype=torch.float64)
    prefixes = {"zero keys": torch.stack([0 * some[0], some[1]]), "random": some, "3 × random": 3 * some}
    shares = {name: prefix_attention(q, k, v, prefix, own, 4)[1].mean((0, 1)) for name, prefix in prefixes.items()}
    full, share = prefix_attention(q, k, v, some, own, 4)
    step, _ = prefix_attention(q[:, -1:], k, v, some, own, 4)
    claim("one query with a cache says what the last of all says", torch.allclose(step, full[:, -1:]))
    padded = [torch.cat([torch.zeros(50, 9, D, dtype=torch.float64), x], 1) for x in (q, k, v)]
    longer, _ = prefix_attention(*padded, some, torch.arange(N + 9).expand(50, -1) >= 9, 4)
    claim("with nine tokens of padding in front it says the same", torch.allclose(longer[:, 9:], full))
    claim("a prefix of zeros is not nothing: at the first token it takes more than half", shares["zero keys"][0] > 0.5)
    even = P / (P + torch.arange(1, N + 1))
    plots.curves(torch.arange(1, N + 1), shares | {"equal scores": even}, "token", "share of the prefix", logx=True, logy=True, colors={"equal scores": style.EXACT})

# %% [markdown]
# **What to see.** The share of a prefix of four, over the place in the text, for random queries and keys. The black line is $P/(P+n)$, where all scores are equal. A prefix is loud at the beginning of a text, and gets fainter with every token that is written. Large keys hold on longer. And zeros, the only start that looks harmless, take a large part of the first tokens' attention.
#
# **Question.** (a) Let keys *and* values of the prefix be zero. Write what a token hears as a multiple of what it heard before. Why can no small step repair this, as it could for LoRA and an adapter? (b) The prefix's share falls over the text. LoRA's does not. What would you expect of a style that was learnt by a prefix, in a long text? (c) A batch holds texts of a thousand users, each with an update of its own. For which of LoRA, merged or not, adapter and prefix can one batch serve them all?
#
# <!-- BEGIN SOLUTION -->
# (a) $(1-\lambda)$ times: the softmax is shared out between own keys and zeros, and the values of the zeros add nothing. It is a matter of the start, not of the step: LoRA and the adapter begin with an exact 0, and the first step moves them as little as one likes. A prefix would need $\lambda = 0$, keys with scores of $-\infty$ for all queries, which are no numbers; and where $\lambda$ is nearly 0, its gradients are nearly 0, too, so that it would never wake. (b) That it fades: the further on, the more a token listens to the text instead. (The text itself may carry the style on, once it has begun in it. And keys can be learnt that many queries agree with.) (c) Not for merged LoRA: there is one weight for the whole batch. For all others yes. Unmerged LoRA and the adapter are small products that can be made for each text with its own matrices; for the prefix it is easiest, as it is nothing but other keys and values in the cache, and no layer has to know of it.
# <!-- END SOLUTION -->

# %% [markdown]
# ## Recap
#
# - An update has to have the structure of the weight that it is added to. With groups in both its layers a convolution's update can be merged; without, it cannot.
# - A scale fits a start and an optimizer. With Adam, $\alpha/r$ is for a random $A$ of variance $1/k$, $\alpha/\sqrt r$ for a random $B$ of variance $1/r$.
# - "The best of rank $r$" is a sentence without an end: best for which inputs? The projection on the first left singular vectors of $\Delta WX$ is the answer for those that the layer sees.
# - A sum of updates is an update, of at most the sum of the ranks. All that one wants to know of large products of thin matrices can be had from small ones.
# - Round once, at the end. What the rounding takes is a number, and can be kept.
# - A prefix stands before everything: before the cache, before the padding, and before the first token that counts.
#
# **Pitfalls**
#
# - $r$ is the rank of the whole update. What a layer with groups stores is $r/g$.
# - The scale before $BA$ and the scale in the gradient are two: $s^2$ under SGD, $s$ under Adam.
# - $\mathbb E[xx^\top]$ is not the covariance: the mean is in it. And the error weighs $\Delta W-M$ with its root.
# - Files differ in their scale. Numbers that are multiplied into $A$ *and* $B$ count twice.
# - A mask is as wide as there are keys, and counts from the end.
#
# ## Hand in
#
# Restart the kernel, run all cells, and look for the six lines with ✓ and the name of a function. (The other lines with ✓ are claims about the figures.) Save, and hand in this file as it is: `hw7_peft.ipynb`. Functions are found by name, so do not rename them. An exercise that you did not finish may stay as it is; it costs its own points and no others.
