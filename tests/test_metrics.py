"""Scores against scipy's matrix root, singular values, entropies and nearest neighbours, and against closed forms."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy import stats
from scipy.spatial import cKDTree

from dgm_course import metrics
from dgm_course.metrics import frechet_distance, frechet_without_bias, inception_score, precision_recall


def normals(*shape, generator):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def cloud(mean, root, count, generator):
    """Points whose sample mean and covariance are `mean` and root·rootᵀ up to rounding."""
    white = normals(count, len(mean), generator=generator)
    white, _ = torch.linalg.qr(white - white.mean(0))  # orthonormal columns, still of mean 0
    return white * math.sqrt(count - 1) @ torch.as_tensor(root).T + torch.as_tensor(mean)


# The Fréchet distance -------------------------------------------------------------------------------------------------


def by_matrix_root(a, b):
    """The general root of the product of the covariances, which is not symmetric, by scipy."""
    a, b = a.double().numpy(), b.double().numpy()
    cov_a, cov_b = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    root = scipy.linalg.sqrtm(cov_a @ cov_b)
    assert np.abs(np.imag(root)).max() < 1e-6
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root.real)


def by_singular_values(a, b):
    """No covariance at all: the trace of the root is the sum of the singular values of the centred points' products."""
    a, b = a.double().numpy(), b.double().numpy()
    x, y = ((p - p.mean(0)) / math.sqrt(len(p) - 1) for p in (a, b))
    overlap = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + (x**2).sum() + (y**2).sum() - 2 * overlap


@pytest.mark.parametrize("n, m, d", [(50, 50, 3), (200, 70, 8), (40, 90, 20), (6, 5, 2)])
def test_frechet_distance(n, m, d, generator):
    """Correlated clouds of unequal sizes: two oracles, which know nothing of each other."""
    a = normals(n, d, generator=generator) @ normals(d, d, generator=generator)
    b = normals(m, d, generator=generator) @ normals(d, d, generator=generator) + normals(d, generator=generator)
    assert frechet_distance(a, b) == pytest.approx(by_matrix_root(a, b), rel=1e-8)
    assert frechet_distance(a, b) == pytest.approx(by_singular_values(a, b), rel=1e-8)


@pytest.mark.parametrize("d", [2, 5])
def test_frechet_distance_of_diagonal_covariances(d, generator):
    """Σ (m_a − m_b)² + (s_a − s_b)², from clouds whose means and deviations are just these."""
    m_a, m_b, s_a, s_b = (normals(d, generator=generator).abs() + 0.1 for _ in range(4))
    a, b = cloud(m_a, s_a.diag(), 30, generator), cloud(m_b, s_b.diag(), 17, generator)
    expected = ((m_a - m_b) ** 2 + (s_a - s_b) ** 2).sum().item()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_one_feature():
    """D = 1 by hand: {0, 2} has mean 1 and variance 2, {3, 5, 7} has 5 and 4."""
    a, b = torch.tensor([[0.0], [2.0]]), torch.tensor([[3.0], [5.0], [7.0]])
    assert frechet_distance(a, b) == pytest.approx(16 + (2 - math.sqrt(2)) ** 2)


def test_frechet_distance_of_a_shift_and_of_a_scale(generator):
    """A shift costs its squared length, the factor c about the mean (c − 1)²·tr C, and scaling both by c all of it c²."""
    a, shift = normals(30, 4, generator=generator) @ normals(4, 4, generator=generator), torch.arange(4.0).double()
    b = normals(25, 4, generator=generator) + 1
    trace = float(np.trace(np.cov(a.numpy(), rowvar=False)))
    assert frechet_distance(a, a + shift) == pytest.approx(14)
    assert frechet_distance(a, 3 * (a - a.mean(0)) + a.mean(0)) == pytest.approx(4 * trace)
    assert frechet_distance(10 * a, 10 * b) == pytest.approx(100 * by_matrix_root(a, b), rel=1e-8)


def test_frechet_distance_is_a_distance_of_clouds(generator):
    """Symmetric, 0 on itself, blind to the order of samples and to a rotation or shift of both clouds."""
    a, b = normals(60, 6, generator=generator), 2 * normals(40, 6, generator=generator) - 1
    rotation, _ = torch.linalg.qr(normals(6, 6, generator=generator))
    expected = by_matrix_root(a, b)
    for x, y in (
        (b, a),
        (a[torch.randperm(60, generator=generator)], b[torch.randperm(40, generator=generator)]),
        (a @ rotation, b @ rotation),
        (a + 7, b + 7),
    ):
        assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(a, a @ rotation) > 0.1  # of one cloud alone it is seen


@pytest.mark.parametrize("n, m", [(5, 9), (2, 2), (5, 100)])
def test_frechet_distance_of_fewer_samples_than_features(n, m, generator):
    """Covariances of low rank, whose roots have no digits to spare, and a feature that never changes."""
    a, b = normals(n, 30, generator=generator), normals(m, 30, generator=generator) + 0.5
    a[:, 3] = b[:, 3] = 1.0
    assert frechet_distance(a, b) == pytest.approx(by_singular_values(a, b), rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-5)


def test_frechet_distance_works_in_float64(generator):
    """float32 and whole-number features are computed with all digits; a Python float comes back, without a gradient."""
    a = (1000 + normals(50, 4, generator=generator)).float().requires_grad_()
    b = (1000 + 2 * normals(50, 4, generator=generator)).float()
    value = frechet_distance(a, b)
    assert type(value) is float and value == pytest.approx(by_matrix_root(a.detach(), b), rel=1e-9)
    whole = torch.randint(-5, 5, (20, 3), generator=generator)
    assert frechet_distance(whole, 2 * whole) == pytest.approx(by_matrix_root(whole, 2 * whole))


def test_frechet_distance_counts_the_sample_covariance():
    """Divided by N − 1: {0, 2} and the same points stretched to {−3, 5}, standard deviations √2 and 4√2."""
    a, b = torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.tensor([[-3.0, 0.0], [5.0, 0.0]])
    assert frechet_distance(a, b) == pytest.approx(18)


# The Fréchet distance without its bias --------------------------------------------------------------------------------


def test_without_bias_is_a_line_in_one_over_n(generator, monkeypatch):
    """Scores 3 + 7/n give 3; of scores with errors, numpy's line in 1/n at 0. Each is of n different samples."""
    real, generated, seen = normals(30, 2, generator=generator), torch.arange(200.0)[:, None].expand(-1, 2), []
    wrong = {40: 0.3, 50: -0.2, 100: 0.1, 200: -0.05}

    def score(a, b, errors=0.0):
        assert torch.equal(a, real) and len(b.unique(dim=0)) == len(b) and set(b[:, 0].tolist()) <= set(range(200))
        seen.append(b)
        return 3 + 7 / len(b) + errors * wrong[len(b)]

    monkeypatch.setattr(metrics, "frechet_distance", score)
    sizes = [40, 100, 50, 200, 100]
    assert frechet_without_bias(real, generated, sizes, generator) == pytest.approx(3, rel=1e-10)
    assert [len(b) for b in seen] == sizes
    assert not torch.equal(seen[1], seen[4])  # the same n is drawn anew
    assert not torch.equal(seen[0], generated[:40])
    monkeypatch.setattr(metrics, "frechet_distance", lambda a, b: score(a, b, 1.0))
    values = [3 + 7 / n + wrong[n] for n in sizes]
    expected = np.polyfit([1 / n for n in sizes], values, 1)[1]
    assert frechet_without_bias(real, generated, sizes, generator) == pytest.approx(expected, rel=1e-9)


def test_without_bias_on_known_gaussians(generator):
    """Over 100 clouds: the mean is the exact distance within its error, where the plain score is too high by many errors."""
    d, runs, sizes = 10, 100, [100, 150, 200, 300]
    root_a, root_b = (torch.eye(d).double() + 0.1 * normals(d, d, generator=generator) for _ in "ab")
    cov_a, cov_b = (root.numpy() @ root.numpy().T for root in (root_a, root_b))
    exact = 0.1**2 * d + np.trace(cov_a + cov_b - 2 * scipy.linalg.sqrtm(cov_a @ cov_b).real)
    real = cloud(torch.zeros(d), root_a, 400, generator)  # with this very mean and covariance, so without a bias
    plain, better = [], []
    for _ in range(runs):
        generated = normals(300, d, generator=generator) @ root_b.T + 0.1
        plain.append(frechet_distance(real, generated) - exact)
        better.append(frechet_without_bias(real, generated, sizes, generator) - exact)
    assert np.mean(plain) > 6 * np.std(plain, ddof=1) / math.sqrt(runs)
    assert abs(np.mean(better)) < 4 * np.std(better, ddof=1) / math.sqrt(runs)
    assert abs(np.mean(better)) < 0.4 * np.mean(plain)


def test_without_bias_is_decided_by_its_generator(generator):
    """One seed, one number; the global generator is left alone; a float comes back."""
    real, generated = normals(50, 3, generator=generator), normals(60, 3, generator=generator)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    one, two, other = (
        frechet_without_bias(real, generated, (20, 40), torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert one == two != other and type(one) is float and torch.equal(torch.get_rng_state(), state)


# The inception score --------------------------------------------------------------------------------------------------


def by_entropy(logits):
    """scipy's KL divergence of each row of the softmax from their mean."""
    p = scipy.special.softmax(logits.double().numpy(), axis=1)
    return math.exp(np.mean([stats.entropy(row, p.mean(0)) for row in p]))


@pytest.mark.parametrize("shape", [(1, 4), (7, 2), (100, 10), (1500, 3)])
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_inception_score(shape, scale, generator):
    """Against scipy, from unsure to sure classifiers; float32 in between is as good."""
    logits = scale * normals(*shape, generator=generator)
    assert inception_score(logits) == pytest.approx(by_entropy(logits), rel=1e-10)
    assert inception_score(logits.float()) == pytest.approx(by_entropy(logits.float()), rel=1e-10)
    assert 1 - 1e-12 <= inception_score(logits) <= shape[1] + 1e-12


def test_inception_score_is_mutual_information(generator):
    """exp(H(mean) − mean H), the same written with entropies, by loops."""
    logits = 3 * normals(20, 5, generator=generator)
    rows = [[math.exp(value) for value in row] for row in logits.tolist()]
    rows = [[value / sum(row) for value in row] for row in rows]
    mean = [sum(column) / 20 for column in zip(*rows, strict=True)]
    own = [-sum(p * math.log(p) for p in row) for row in rows]
    expected = math.exp(-sum(p * math.log(p) for p in mean) - sum(own) / 20)
    assert inception_score(logits) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_extremes_of_the_inception_score(classes, generator):
    """1 if all samples look the same, sure or not; the number of classes if each is sure and all are found alike."""
    for row in (torch.zeros(classes), 500 * torch.eye(classes)[0], normals(classes, generator=generator)):
        assert inception_score(row.double().expand(30, -1)) == pytest.approx(1, abs=1e-12)
    every = 1e4 * torch.eye(classes).repeat(4, 1)
    assert inception_score(every) == pytest.approx(classes, rel=1e-12)
    assert inception_score(every[: 4 * classes : classes]) == pytest.approx(1, abs=1e-12)  # one class only


@pytest.mark.parametrize("size", [1e3, 1e30])
def test_inception_score_of_huge_logits(size):
    """No overflow: 3 samples of one class and 1 of another have the entropy of (¾, ¼), and a constant changes nothing."""
    logits = size * torch.tensor([[1.0, 0, 0], [1.0, 0, 0], [1.0, 0, 0], [0, 1.0, 0]], dtype=torch.float64)
    expected = math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert inception_score(logits) == pytest.approx(expected, rel=1e-12)
    assert inception_score(logits - 5 * size) == pytest.approx(expected, rel=1e-12)


# Precision and recall -------------------------------------------------------------------------------------------------


def share_inside(points, territory, k):
    """Loops over scipy's nearest neighbours: how many points lie in some ball of the territory."""
    radius = cKDTree(territory).query(territory, k + 1)[0][:, k]
    inside = [any(np.sqrt(((p - c) ** 2).sum()) <= r for c, r in zip(territory, radius, strict=True)) for p in points]
    return sum(inside) / len(points)


@pytest.mark.parametrize("n, m, d", [(60, 60, 2), (40, 90, 5), (90, 40, 1), (5, 5, 3)])
@pytest.mark.parametrize("k", [1, 3])
def test_precision_recall(n, m, d, k, generator):
    """Overlapping clouds of unequal sizes against brute force, each number in its place."""
    real, generated = normals(n, d, generator=generator), 0.6 * normals(m, d, generator=generator) + 0.5
    expected = share_inside(generated.numpy(), real.numpy(), k), share_inside(real.numpy(), generated.numpy(), k)
    assert precision_recall(real, generated, k) == pytest.approx(expected, abs=1e-12)
    assert precision_recall(generated, real, k) == pytest.approx(expected[::-1], abs=1e-12)
    if k == 3:
        assert precision_recall(real, generated) == precision_recall(real, generated, 3)


@pytest.mark.parametrize("n, m", [(1001, 30), (30, 1001), (1000, 2000), (2345, 40)])
def test_precision_recall_of_many_points(n, m, generator):
    """More than a thousand points, on either side, with vectorised distances by scipy."""
    real, generated = normals(n, 3, generator=generator), normals(m, 3, generator=generator) + 1

    def share(points, territory):
        radius = cKDTree(territory).query(territory, 4)[0][:, 3]
        return (scipy.spatial.distance.cdist(points, territory) <= radius).any(1).mean()

    real_, generated_ = real.numpy(), generated.numpy()
    expected = share(generated_, real_), share(real_, generated_)
    assert precision_recall(real, generated) == pytest.approx(expected, abs=1e-12)


def test_precision_recall_by_hand():
    """Real 0, 1, 3 with k = 1: balls of radius 1, 1, 2. Generated 3.5, 4, 9: radius ½, ½, 5. Edges count."""
    real, generated = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[3.5], [4.0], [9.0]])
    assert precision_recall(real, generated, 1) == pytest.approx((2 / 3, 1 / 3))
    edge = torch.tensor([[5.0], [60.0], [61.0], [-1.0]])  # 5 and −1 lie just on the edge of a ball
    assert precision_recall(real, edge, 1)[0] == pytest.approx(2 / 4)


def test_precision_recall_of_extreme_clouds(generator):
    """Identical clouds (1, 1), in any order; far ones (0, 0); a model of one half of the data is precise and forgets."""
    x = normals(50, 4, generator=generator)
    assert precision_recall(x, x) == precision_recall(x, x[torch.randperm(50, generator=generator)]) == (1.0, 1.0)
    assert precision_recall(x, x + 100) == (0.0, 0.0)
    halves = torch.cat([x, x + 100])
    assert precision_recall(halves, x) == (1.0, 0.5)
    assert precision_recall(x, halves) == (0.5, 1.0)


def test_precision_recall_of_duplicates():
    """A copy is a neighbour at distance 0: k copies beside a point make its ball a point, and k − 1 do not."""
    real = torch.tensor([[0.0], [0.0], [0.0], [4.0], [5.0]])
    near = torch.tensor([[0.1], [0.1], [0.1], [0.1], [0.0]])
    assert precision_recall(real, near, 2)[0] == pytest.approx(share_inside(near.numpy(), real.numpy(), 2))
    assert precision_recall(real[:3], near, 2) == pytest.approx((1 / 5, 1.0))
    assert precision_recall(real, near, 3)[0] == 1.0
    assert precision_recall(torch.zeros(4, 2), torch.zeros(6, 2)) == (1.0, 1.0)


def test_precision_recall_far_from_the_origin(generator):
    """Points near 1000 that are 1e-5 apart keep their digits, which products of them would lose."""
    real = 1000 + 1e-5 * normals(40, 8, generator=generator)
    generated = 1000 + 1e-5 * normals(40, 8, generator=generator) + 5e-6
    x, y = real.numpy(), generated.numpy()
    expected = share_inside(y, x, 3), share_inside(x, y, 3)
    assert precision_recall(real, generated) == pytest.approx(expected) and 0 < min(expected) < max(expected) < 1
    assert precision_recall(real, real) == precision_recall(real.float(), real.float()) == (1.0, 1.0)


def test_more_neighbours_never_lower_the_scores(generator):
    """The balls grow with k; with the largest k, one less than the points, clouds that touch cover each other."""
    real, generated = normals(12, 2, generator=generator), normals(15, 2, generator=generator) + 1.5
    scores = np.array([precision_recall(real, generated, k) for k in range(1, 12)])
    assert (np.diff(scores, axis=0) >= 0).all() and scores[0].min() < 0.5 and (scores[-1] > 0.9).all()


# Errors ---------------------------------------------------------------------------------------------------------------


def test_arguments_are_checked():
    """The message names the argument, says what is asked and what came."""
    x, spoilt = torch.ones(4, 3), torch.ones(4, 3)
    spoilt[0, 1], spoilt[2, 2] = math.nan, math.inf
    cases = [
        (r"^a must have shape \(N, 3\) with N ≥ 2; got \(1, 3\)", lambda: frechet_distance(x[:1], x)),
        (r"^b must have shape \(N, 3\) with N ≥ 2; got \(1, 3\)", lambda: frechet_distance(x, x[:1])),
        (r"^b must have shape \(N, 3\) with N ≥ 2; got \(4, 2\)", lambda: frechet_distance(x, x[:, :2])),
        (r"^a must have shape .*; got \(3,\)", lambda: frechet_distance(x[0], x)),
        (r"^a must have shape \(N, D\) with N ≥ 2; got \(\)", lambda: frechet_distance(x[0, 0], x)),
        (r"^b must have shape .*; got \(4, 3, 3\)", lambda: frechet_distance(x, torch.ones(4, 3, 3))),
        (r"^a must be finite; 2 of its values are not", lambda: frechet_distance(spoilt, x)),
        (r"^b must be finite; 2 of its values are not", lambda: frechet_distance(x, spoilt)),
        (r"^logits must have shape \(N, 3\) with N ≥ 1; got \(0, 3\)", lambda: inception_score(x[:0])),
        (r"^logits must have shape .*; got \(3,\)", lambda: inception_score(x[0])),
        (r"^logits must be finite; 2 of its values are not", lambda: inception_score(spoilt)),
        (r"^generated must have shape \(N, 3\) with N ≥ 2; got \(4, 2\)", lambda: precision_recall(x, x[:, :2])),
        (r"^real must have shape \(N, 3\) with N ≥ 2; got \(1, 3\)", lambda: precision_recall(x[:1], x)),
        (r"^real must be finite; 2 of its values are not", lambda: precision_recall(spoilt, x)),
        (r"^generated must be finite; 2 of its values are not", lambda: precision_recall(x, spoilt)),
        (r"^k must lie between 1 and 3; got 0", lambda: precision_recall(x, x, 0)),
        (r"^k must lie between 1 and 3; got 4", lambda: precision_recall(x, x, 4)),
        (r"^k must lie between 1 and 2; got 3", lambda: precision_recall(x, x[:3])),
        (r"^k must lie between 1 and 1; got 3", lambda: precision_recall(x[:2], x)),
        (r"^sizes must be two or more, between 2 and 4; got \[3\]", lambda: frechet_without_bias(x, x, [3])),
        (r"^sizes must be two or more, .*; got \[3, 3\]", lambda: frechet_without_bias(x, x, [3, 3])),
        (r"^sizes must be two or more, .*; got \[\]", lambda: frechet_without_bias(x, x, [])),
        (r"^sizes must be two or more, between 2 and 4; got \[2, 5\]", lambda: frechet_without_bias(x, x, (2, 5))),
        (r"^sizes must be two or more, between 2 and 4; got \[1, 3\]", lambda: frechet_without_bias(x, x, [1, 3])),
        (r"must have shape \(N, 3\) with N ≥ 2; got", lambda: frechet_without_bias(x, x[:, :2], [2, 3])),
        (r"must be finite; \d of its values are not", lambda: frechet_without_bias(spoilt, x, [2, 3])),
    ]
    for message, call in cases:
        with pytest.raises(ValueError, match=message):
            call()
