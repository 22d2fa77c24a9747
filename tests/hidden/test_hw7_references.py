"""The references of homework 7 against other derivations: layers that are run, PyTorch's optimizers, searches, fractions, kernels."""

import itertools
import json
import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dgm_course import peft
from dgm_course.grading.exercise import load
from dgm_course.nets.language import CausalAttention

EXERCISES = load(Path(__file__).parent / "hw7.py")
REFERENCE = {name: exercise.reference for name, exercise in EXERCISES.items()}
DOUBLE = torch.float64


def near(actual, expected, tolerance=1e-10):
    actual, expected = (torch.as_tensor(value, dtype=DOUBLE) for value in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


# grouped_update -------------------------------------------------------------------------------------------------------

GEOMETRIES = [
    {},
    {"stride": 2, "padding": 1},
    {"stride": (1, 3), "padding": (2, 0), "dilation": (2, 1)},
    {"padding": 1, "padding_mode": "circular"},
]


@pytest.mark.parametrize("how", GEOMETRIES, ids=str)
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_two_convolutions_with_groups_are_one(groups, how):
    torch.manual_seed(0)
    A = nn.Conv2d(12, 6, (3, 2), groups=groups, bias=False, dtype=DOUBLE, **how)
    B = nn.Conv2d(6, 18, 1, groups=groups, bias=False, dtype=DOUBLE)
    one = nn.Conv2d(12, 18, (3, 2), groups=groups, dtype=DOUBLE, **how)
    x = randn(2, 12, 11, 9)
    with torch.no_grad():
        apart = one(x) + 5.0 / 6 * B(A(x))
        one.weight += REFERENCE["grouped_update"](A.weight, B.weight, 5.0, groups)
        near(one(x), apart)


def test_with_one_group_it_is_the_layers_own_update():
    layer = peft.LoRA(nn.Conv2d(4, 7, 3, stride=2, padding=1, dtype=DOUBLE))
    layer.add("x", rank=3, alpha=4.0)
    nn.init.normal_(layer.up["x"].weight)
    A, B = layer.down["x"].weight.detach(), layer.up["x"].weight.detach()
    near(REFERENCE["grouped_update"](A, B, 4.0, 1), layer.update().detach())


def test_a_channel_for_each_group_loses_nothing():
    """Every depthwise weight is such an update, with r = g."""
    weight = randn(5, 1, 3, 3)
    near(REFERENCE["grouped_update"](weight, torch.ones(5, 1, 1, 1, dtype=DOUBLE), 5.0, 5), weight)


# first_step -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_it_is_a_step_of_pytorch_on_a_real_layer(optimizer):
    """The layer with its own base and scale; A and B both given to the optimizer."""
    layer = peft.LoRA(nn.Linear(6, 4, dtype=DOUBLE))
    layer.add("x", rank=3, alpha=5.1)
    A, B = layer.down["x"].weight, layer.up["x"].weight
    start = randn(4, 3, seed=1) / 3**0.5
    with torch.no_grad():
        A.zero_()
        B.copy_(start)
    x, weights = randn(20, 6, seed=2), randn(20, 4, seed=3)
    x[:, 2] = 0  # an input that never speaks
    layer.base.weight.requires_grad_()

    def loss():
        return (weights * layer(x).sin()).sum()

    (grad,) = torch.autograd.grad(loss(), layer.base.weight)
    made = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer](
        [A, B], 0.02, **({} if optimizer == "sgd" else {"eps": 1e-30})
    )
    loss().backward()
    made.step()
    near(B, start)
    update, _ = REFERENCE["first_step"](grad, start, 5.1 / 3, 0.02, optimizer)
    near(update, layer.update().detach())


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_the_mean_is_that_of_many_draws(optimizer, rank):
    grad, draws = randn(3, 4), 20_000
    grad[:, 1] = 0
    starts = randn(draws, 3, rank, seed=5) / rank**0.5
    slope = starts.mT @ grad
    steps = -0.3 * 1.7 * starts @ (1.7 * slope if optimizer == "sgd" else slope.sign())
    update, mean = REFERENCE["first_step"](grad, starts[0], 1.7, 0.3, optimizer)
    near(update, steps[0])
    assert ((steps.mean(0) - mean).abs() <= 5 * steps.std(0) / draws**0.5 + 1e-12).all()
    assert (mean[:, 1] == 0).all()


def test_which_scale_makes_the_mean_the_same_for_all_ranks():
    grad = randn(6, 5)
    for optimizer, rule in (("sgd", 0.0), ("adam", 0.5)):
        means = [REFERENCE["first_step"](grad, randn(6, r), 2.0 * r**-rule, 0.1, optimizer)[1] for r in (1, 2, 5, 30)]
        for mean in means[1:]:
            near(mean, means[0])


# best_update ----------------------------------------------------------------------------------------------------------


def error(delta, low, inputs):
    return ((delta - low).flatten(1) @ inputs.mT).square().sum(0).mean()


def oblique(N, k, seed=0):
    return randn(N, k, seed=seed) @ randn(k, k, seed=seed + 1) + randn(k, seed=seed + 2)


@pytest.mark.parametrize("shape", [(5, 4), (3, 7), (4, 2, 2, 1)], ids=str)
def test_the_errors_are_those_of_the_updates_and_the_budget_is_kept(shape):
    delta = randn(*shape)
    d, k = delta.flatten(1).shape
    inputs = oblique(30, k)
    for r in range(min(d, k) + 1):
        for budget in (r * (d + k), (r + 1) * (d + k) - 1):
            low, left = REFERENCE["best_update"](delta, inputs, budget)
            assert low.shape == delta.shape and torch.linalg.matrix_rank(low.flatten(1)) == r
            near(error(delta, low, inputs), left[r], 1e-8)
    near(left[0], error(delta, 0 * delta, inputs), 1e-8)
    near(REFERENCE["best_update"](delta, inputs, 10**9)[0], delta)


def test_for_round_inputs_it_is_the_truncated_svd():
    delta = randn(6, 5)
    U, sigma, Vt = torch.linalg.svd(delta, full_matrices=False)
    low, left = REFERENCE["best_update"](delta, 5**0.5 * torch.eye(5, dtype=DOUBLE), 2 * 11 + 10)
    near(low, U[:, :2] * sigma[:2] @ Vt[:2])
    near(left, [(sigma[r:] ** 2).sum() for r in range(6)])


def test_a_search_over_both_factors_ends_at_it_and_never_below():
    """With A held the best B is a regression, and the other way round."""
    delta, inputs = randn(5, 6), oblique(40, 6)
    C = inputs.mT @ inputs / 40
    low, left = REFERENCE["best_update"](delta, inputs, 2 * 11)
    for seed in range(3):
        A = randn(2, 6, seed=seed)
        for _ in range(3000):
            B = delta @ C @ A.mT @ torch.linalg.inv(A @ C @ A.mT)
            A = torch.linalg.inv(B.mT @ B) @ B.mT @ delta
        assert error(delta, B @ A, inputs) > left[2] - 1e-9
        near(B @ A, low, 1e-4)


def test_the_singular_vectors_signs_and_the_order_of_the_inputs_do_not_matter():
    delta, inputs = randn(4, 5), oblique(12, 5)
    low, left = REFERENCE["best_update"](delta, inputs, 20)
    other, same = REFERENCE["best_update"](-delta, -inputs.flip(0), 20)
    near(other, -low)
    near(same, left)


# joined ---------------------------------------------------------------------------------------------------------------

RANKS, ROOTED = (3, 1, 2), torch.tensor([True, False, True])
ALPHAS, WEIGHTS = torch.tensor([4.0, 3.0, 5.0], dtype=DOUBLE), torch.tensor([1.0, -0.5, 2.0], dtype=DOUBLE)


def some_files(d=4, k=5):
    return [randn(r, k, seed=r) for r in RANKS], [randn(d, r, seed=10 + r) for r in RANKS]


def written_out(downs, ups):
    scales = [a / (r**0.5 if root else r) for a, r, root in zip(ALPHAS.tolist(), RANKS, ROOTED, strict=True)]
    return torch.stack([s * B @ A for s, A, B in zip(scales, downs, ups, strict=True)])


def test_the_new_file_is_the_sum_and_the_overlap_that_of_the_matrices_written_out():
    downs, ups = some_files()
    A, B, overlap = REFERENCE["joined"](downs, ups, ALPHAS, ROOTED, WEIGHTS, 7.0)
    each = written_out(downs, ups)
    near(7.0 / 6 * B @ A, torch.einsum("n,ndk->dk", WEIGHTS, each))
    near(A, torch.cat(downs))
    near(overlap, torch.einsum("idk,jdk->ij", each, each))
    assert torch.linalg.eigvalsh(overlap).min() > 0


def test_it_is_what_a_layer_adds_that_has_read_the_files(tmp_path):
    """Files in PEFT's form, rank-stabilised ones among them, are read; all are active; the new file is read by another layer."""
    downs, ups = some_files(7, 9)
    base = nn.Sequential(nn.Linear(9, 7, bias=False))
    for i, (A, B) in enumerate(zip(downs, ups, strict=True)):
        write(tmp_path / str(i), A, B, ALPHAS[i].item(), bool(ROOTED[i]))
        peft.load_lora(base, tmp_path / str(i), name=f"file{i}")
    peft.activate(base, **{f"file{i}": w for i, w in enumerate(WEIGHTS.tolist())})
    A, B, _ = REFERENCE["joined"](downs, ups, ALPHAS, ROOTED, WEIGHTS, 7.0)
    write(tmp_path / "new", A, B, 7.0, False)
    other = peft.load_lora(nn.Sequential(nn.Linear(9, 7, bias=False)), tmp_path / "new")
    near(other[0].update().detach(), base[0].update().detach(), 1e-5)


def write(folder, A, B, alpha, rooted):
    folder.mkdir()
    names = {"base_model.model.0.lora_A.weight": A, "base_model.model.0.lora_B.weight": B}
    save_file({name: one.float().contiguous() for name, one in names.items()}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": len(A), "lora_alpha": alpha, "use_rslora": rooted, "target_modules": ["0"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def test_adding_the_halves_each_by_itself_has_crossed_terms():
    """Unless the files share their A."""
    (A1, A2), (B1, B2) = randn(2, 2, 5), randn(2, 4, 2, seed=1)
    mistake = EXERCISES["joined"].mistakes["you added the A and the B"][0]
    one, plain = torch.ones(2, dtype=DOUBLE), torch.zeros(2, dtype=torch.bool)
    for A, crossed in ((A2, B1 @ A2 + B2 @ A1), (A1, B1 @ A1 + B2 @ A1)):
        halves = mistake([A1, A], [B1, B2], 2 * one, plain, one, 2.0)
        near(halves[1] @ halves[0], B1 @ A1 + B2 @ A + crossed)


# merged_pair ----------------------------------------------------------------------------------------------------------


def exactly(weight, downs, ups, scales):
    """The sum as a fraction, for each entry."""
    n, rank = downs.shape[:2]
    for d, k in itertools.product(*map(range, weight.shape)):
        terms = (
            Fraction(scales[i].item()) * Fraction(ups[i, d, j].item()) * Fraction(downs[i, j, k].item())
            for i in range(n)
            for j in range(rank)
        )
        yield (d, k), Fraction(weight[d, k].item()) + sum(terms)


def nearest(value: Fraction) -> Fraction:
    """The nearest number with 8 bits, the even one of two; by whole numbers alone."""
    if value == 0:
        return value
    step = Fraction(1)
    while abs(value) / step >= 256:
        step *= 2
    while abs(value) / step < 128:
        step /= 2
    return round(value / step) * step  # Python rounds halves to the even one


@pytest.mark.parametrize("label", EXERCISES["merged_pair"].groups)
def test_both_numbers_are_the_nearest_by_exact_arithmetic(label):
    for case in EXERCISES["merged_pair"].cases(label, 5):
        merged, rest = case["expected"]["value"]
        for place, total in exactly(**case["inputs"]):
            assert Fraction(merged[place].item()) == nearest(total)
            assert Fraction(rest[place].item()) == nearest(total - nearest(total))
            assert abs(total - Fraction(merged[place].item()) - Fraction(rest[place].item())) <= abs(total) / 2**17


def test_the_first_is_what_a_layer_in_bfloat16_has_after_merging():
    case = EXERCISES["merged_pair"].cases("like the visible cases", 9)[0]["inputs"]
    layer = peft.LoRA(nn.Linear(case["weight"].shape[1], len(case["weight"]), bias=False).bfloat16())
    with torch.no_grad():
        layer.base.weight.copy_(case["weight"])
        for i, (A, B, s) in enumerate(zip(case["downs"], case["ups"], case["scales"].tolist(), strict=True)):
            layer.add(f"u{i}", rank=len(A), alpha=s * len(A))
            layer.down[f"u{i}"].weight.copy_(A)
            layer.up[f"u{i}"].weight.copy_(B)
    peft.activate(layer, **{f"u{i}": 1.0 for i in range(len(case["downs"]))})
    peft.merge(layer)
    near(REFERENCE["merged_pair"](**case)[0], layer.base.weight.double(), 0)


def test_a_change_of_less_than_a_512th_moves_nothing_and_the_rest_has_it():
    weight = torch.tensor([[1.0, 1.5, -1.9921875]])
    A, B = torch.ones(1, 1, 3), torch.ones(1, 1, 1)
    merged, rest = REFERENCE["merged_pair"](weight, A, B, torch.tensor([2.0**-10], dtype=DOUBLE))
    near(merged, weight, 0)
    near(rest, torch.full((1, 3), 2.0**-10), 0)


def test_what_the_text_says_of_unmerging():
    """Subtracted in float32, the update comes out again but for sums that have grown past a power of two, and powers of two."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(200_000, generator=g).bfloat16().float()
    update = 0.1 * torch.randn(200_000, generator=g)
    merged = (weight + update).bfloat16().float()
    back = (merged - update).bfloat16().float()
    lost = back != weight
    assert 0.01 < lost.float().mean() < 0.1
    grown = torch.frexp(merged)[1] > torch.frexp(weight)[1]
    assert grown[lost].float().mean() > 0.9


# prefix_attention -----------------------------------------------------------------------------------------------------


def unmixed(kind, width, heads):
    """An attention whose four layers do nothing."""
    attention = kind(width, heads).double()
    for layer in (attention.query, attention.key, attention.value, attention.out):
        nn.init.eye_(layer.weight)
        nn.init.zeros_(layer.bias)
    return attention


@pytest.mark.parametrize(("P", "heads"), [(1, 1), (3, 2), (5, 4)])
def test_without_padding_and_cache_it_is_the_kernels(P, heads):
    h, prefix = randn(2, 6, 8), randn(2, P, 8, seed=1)
    layer = peft.PrefixAttention(unmixed(CausalAttention, 8, heads), lambda: prefix)
    out, share = REFERENCE["prefix_attention"](h, h, h, prefix, torch.ones(2, 6, dtype=torch.bool), heads)
    near(out, layer(h).detach())
    near(share, layer.weights(h)[..., :P].sum(-1).detach())


def test_a_padded_text_says_what_it_says_alone_and_a_cache_what_all_queries_say():
    q, k, v, prefix = *randn(3, 1, 5, 6), randn(2, 3, 6, seed=1)
    alone = REFERENCE["prefix_attention"](q, k, v, prefix, torch.ones(1, 5, dtype=torch.bool), 2)
    padded = [torch.cat([randn(1, 4, 6, seed=seed), one], 1) for seed, one in enumerate((q, k, v), 5)]
    real = torch.arange(9)[None] >= 4
    out, share = REFERENCE["prefix_attention"](*padded, prefix, real, 2)
    near(out[:, 4:], alone[0])
    near(share[..., 4:], alone[1])
    near(share[..., :4], torch.ones(1, 2, 4))
    for n in (1, 3):
        cached = REFERENCE["prefix_attention"](padded[0][:, -n:], *padded[1:], prefix, real, 2)
        near(cached[0], out[:, -n:])
        near(cached[1], share[..., -n:])


def test_it_is_a_mixture_of_the_attention_without_and_the_attention_to_the_prefix():
    q, k, v, prefix = *randn(3, 2, 4, 6), randn(2, 3, 6, seed=1)
    real = torch.ones(2, 4, dtype=torch.bool)
    out, share = REFERENCE["prefix_attention"](q, k, v, prefix, real, 2)
    heads = lambda h: h.unflatten(-1, (2, 3)).transpose(-2, -3)  # noqa: E731
    own = nn.functional.scaled_dot_product_attention(*map(heads, (q, k, v)), is_causal=True)
    to_prefix = nn.functional.scaled_dot_product_attention(
        heads(q), *(heads(one).expand(2, -1, -1, -1) for one in prefix)
    )
    near(heads(out), (1 - share[..., None]) * own + share[..., None] * to_prefix)


def test_a_prefix_of_zeros_shrinks_what_a_token_hears():
    q, k, v = randn(3, 2, 4, 6)
    out, share = REFERENCE["prefix_attention"](
        q, k, v, torch.zeros(2, 5, 6, dtype=DOUBLE), torch.ones(2, 4, dtype=torch.bool), 1
    )
    plain = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    near(out, (1 - share[:, 0, :, None]) * plain)
    assert share.min() > 0.1


def test_the_order_of_the_prefix_does_not_matter_and_a_query_far_from_it_hears_little():
    q, k, v, prefix = *randn(3, 1, 3, 4), randn(2, 6, 4, seed=1)
    real = torch.ones(1, 3, dtype=torch.bool)
    out, share = REFERENCE["prefix_attention"](q, k, v, prefix, real, 1)
    near(REFERENCE["prefix_attention"](q, k, v, prefix.flip(1), real, 1)[0], out)
    away = torch.stack([prefix[0] * 0 - 50 * q[0, :1] / math.sqrt(4), prefix[1]])
    assert REFERENCE["prefix_attention"](q, k, v, away, real, 1)[1][0, 0, 0] < 1e-6 < share[0, 0, 0]
