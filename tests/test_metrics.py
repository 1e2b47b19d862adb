"""Tests of metrics.py."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import metrics
from conftest import images_of


def test_diversity_against_a_loop_and_on_collapse():
    x = torch.randn(6, 3, 4, 5)
    pairs = [(x[i] - x[j]).square().mean().sqrt().item() for i in range(6) for j in range(i)]
    assert metrics.diversity(x).item() == pytest.approx(sum(pairs) / 15, rel=1e-5)
    assert metrics.diversity(x.numpy()) == metrics.diversity(x)
    assert metrics.diversity(x[:1].expand(6, 3, 4, 5)).item() == pytest.approx(0, abs=1e-6)


PRDC = [1.0, 2 / 3, 1.304, 0.8]                                       # precision, recall, density, coverage; k = 5


def exactly(n, mean, cov, seed=0):
    """n points whose sample mean and covariance (n - 1) are exactly these."""
    x = torch.randn(n, len(mean), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x = x - x.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T @ x / (n - 1)), x.T, upper=False).T
    return white @ torch.linalg.cholesky(cov).T + mean


def test_fid_of_gaussians_in_closed_form():
    mean = torch.tensor([[1.0, -2.0], [0.5, 1.0]], dtype=torch.float64)
    a = torch.tensor([[2.0, 0.6], [0.6, 1.0]], dtype=torch.float64)
    b = torch.tensor([[0.5, -0.3], [-0.3, 3.0]], dtype=torch.float64)
    product = a @ b                                                   # tr sqrt(M) = sqrt(tr M + 2 sqrt det M), 2x2
    expected = float((mean[0] - mean[1]).square().sum() + a.trace() + b.trace()
                     - 2 * (product.trace() + 2 * torch.linalg.det(product).sqrt()).sqrt())
    real, fake = exactly(50, mean[0], a), exactly(70, mean[1], b, 1)
    assert metrics.fid(real, fake) == pytest.approx(expected, rel=1e-10)
    assert metrics.fid(fake.numpy(), real.numpy()) == pytest.approx(expected, rel=1e-10)
    assert metrics.frechet_distance(mean[0], a, mean[1].numpy(), b.numpy()) == pytest.approx(expected, rel=1e-10)
    widths = torch.arange(1.0, 6, dtype=torch.float64)                # diagonal: sum of (s - t)^2
    real, fake = (exactly(40, torch.zeros(5, dtype=torch.float64), torch.diag(s**2), k)
                  for k, s in enumerate((widths, widths.flip(0))))
    assert metrics.fid(real, fake) == pytest.approx(float((widths - widths.flip(0)).square().sum()), rel=1e-9)


@pytest.mark.parametrize("n, m", [(7, 9), (12, 60), (60, 12), (80, 90)])
def test_fid_below_the_dimension_and_of_a_set_with_itself(n, m):
    real, fake = torch.randn(n, 40), torch.randn(m, 40) * 1.5 + 0.2
    one, two = (np.cov(x.numpy(), rowvar=False) for x in (real, fake))
    eigenvalues = np.linalg.eigvals(one @ two).real                   # nobody's square roots but numpy's eigenvalues
    expected = (((real.mean(0) - fake.mean(0)) ** 2).sum().item() + np.trace(one) + np.trace(two)
                - 2 * np.sqrt(eigenvalues.clip(0)).sum())
    assert metrics.fid(real, fake) == pytest.approx(expected, rel=1e-4)
    assert metrics.frechet_distance(real.mean(0), one, fake.mean(0), two) == pytest.approx(expected, rel=1e-4)
    assert abs(metrics.fid(real, real.clone())) < 1e-6 and metrics.fid(real, fake) > 1
    constant = torch.cat([torch.randn(90, 3), torch.zeros(90, 2)], 1)                 # features that never vary
    assert abs(metrics.fid(constant, constant)) < 1e-6


def test_kid_against_a_loop_and_of_a_set_with_itself():
    real, fake = np.random.RandomState(0).randn(9, 4), np.random.RandomState(1).randn(9, 4) + 0.5

    def k(x, y):
        return (x @ y / 4 + 1) ** 3

    within = sum(k(x[i], x[j]) for x in (real, fake) for i in range(9) for j in range(9) if i != j) / 72
    across = sum(k(x, y) for x in real for y in fake) / 81
    assert metrics.kid(real, fake) == (pytest.approx(within - 2 * across), 0.0)
    itself = 2 * sum(k(x, y) for x in real for y in real)
    diagonal = sum(k(x, x) for x in real)                             # pairs of an image with itself count only across
    assert metrics.kid(real, real)[0] == pytest.approx((itself - 2 * diagonal) / 72 - itself / 81)
    subsets, random = [], np.random.RandomState(3)
    for _ in range(20):
        i, j = random.permutation(9)[:5], random.permutation(9)[:5]
        subsets.append(metrics.kid(real[i], fake[j])[0])
    assert metrics.kid(real, fake, 20, 5, seed=3) == pytest.approx((np.mean(subsets), np.std(subsets)))
    same_law = [metrics.kid(*np.random.RandomState(s).randn(2, 60, 4))[0] for s in range(40)]
    assert abs(np.mean(same_law)) < 3 * np.std(same_law) / 40**0.5 < 0.05 < metrics.kid(real, fake + 1)[0]
    for score in (metrics.kid, metrics.fid):
        with pytest.raises(metrics.NotDefined, match="at least two"):
            score(real[:1], fake)


def test_inception_score_against_a_loop():
    logits = np.random.RandomState(0).randn(23, 6) * 2
    parts = np.array_split(np.arange(23), [23 * k // 5 for k in range(1, 5)])
    scores = []
    for part in parts:
        p = np.exp(logits[part]) / np.exp(logits[part]).sum(1, keepdims=True)
        scores.append(np.exp(np.mean([sum(q * np.log(q / r) for q, r in zip(row, p.mean(0))) for row in p])))
    order = np.random.RandomState(2020).permutation(23)
    ordered = np.empty_like(logits)
    ordered[order] = logits                                           # so that the shuffle gives back `logits`
    assert metrics.inception_score(ordered, 5) == pytest.approx((np.mean(scores), np.std(scores)))
    assert metrics.inception_score(np.eye(8).repeat(5, 0) * 100, 1)[0] == pytest.approx(8)        # sure and varied
    assert metrics.inception_score(np.ones((40, 8)), 2)[0] == pytest.approx(1)
    never = np.eye(8)[:4].repeat(5, 0) * 1000                         # no image is of the other four classes
    assert metrics.inception_score(never, 1)[0] == pytest.approx(4)


def test_precision_recall_density_coverage_against_loops():
    real, fake = np.random.RandomState(0).randn(30, 3), np.random.RandomState(1).randn(25, 3) * 0.7 + 0.5

    def radius(x, k):
        return [sorted(np.linalg.norm(p - q) for q in x)[k] for p in x]               # the first is p itself

    def within(points, centres, radii):
        return np.array([[np.linalg.norm(p - c) <= r for c, r in zip(centres, radii)] for p in points])

    precision = within(fake, real, radius(real, 3)).any(1).mean()
    recall = within(real, fake, radius(fake, 3)).any(1).mean()
    assert precision != recall and metrics.precision_recall(real, fake, 3, block=7) == (precision, recall)
    inside = within(fake, real, radius(real, 5))
    density, coverage = inside.sum() / (5 * 25), inside.any(0).mean()
    assert metrics.density_coverage(real, fake, 5, block=7) == pytest.approx((density, coverage))
    assert PRDC == pytest.approx([*metrics.precision_recall(real, fake, 5), density, coverage])
    modes = np.array([[0, 0], [9, 0], [0, 9], [9, 9.0]]).repeat(50, 0) + np.random.RandomState(2).rand(200, 2)
    half = modes[:100] + 0.01                                         # two of the four modes: precise, little recall
    assert metrics.precision_recall(modes, half) == (pytest.approx(1, abs=0.1), pytest.approx(0.5, abs=0.05))
    assert metrics.precision_recall(half, modes) == (pytest.approx(0.5, abs=0.05), pytest.approx(1, abs=0.1))
    assert metrics.density_coverage(modes, half)[1] == pytest.approx(0.5, abs=0.05)
    with pytest.raises(metrics.NotDefined, match="more than 3"):
        metrics.precision_recall(real[:3], fake)


def test_ssim_and_psnr_against_a_loop():
    a, b = np.random.RandomState(0).rand(2, 2, 3, 13, 12)
    b = 0.6 * a + 0.4 * b
    g = np.array([[math.exp(-(i * i + j * j) / 4.5) for j in range(-5, 6)] for i in range(-5, 6)])
    g /= g.sum()

    def window(x, y):
        mx, my = (g * x).sum(), (g * y).sum()
        vx, vy, cov = (g * (x - mx) ** 2).sum(), (g * (y - my) ** 2).sum(), (g * (x - mx) * (y - my)).sum()
        return (2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))

    expected = [np.mean([window(x[c, i:i + 11, j:j + 11], y[c, i:i + 11, j:j + 11]) for c in range(3)
                         for i in range(3) for j in range(2)]) for x, y in zip(a, b)]
    assert metrics.ssim(a, b, 1.0).numpy() == pytest.approx(expected)
    assert metrics.ssim(255 * a, 255 * b, 255).numpy() == pytest.approx(expected)    # the range is what counts
    assert metrics.ssim(a, a, 1.0).numpy() == pytest.approx([1, 1])
    mse = [np.mean((x - y) ** 2) for x, y in zip(a, b)]
    assert metrics.psnr(a * 2, b * 2, 2).numpy() == pytest.approx([-10 * math.log10(e) for e in mse])
    assert metrics.psnr(a, a, 255).isfinite().all() and metrics.psnr(a, a, 255).min() > 140
    known = np.ones((2, 1, 13, 12))
    known[:, :, 2:5, 3:9] = 0
    mse = [np.mean((x - y)[:, 2:5, 3:9] ** 2) for x, y in zip(a, b)]
    assert metrics.psnr(a, b, 1, known).numpy() == pytest.approx([-10 * math.log10(e) for e in mse])
    assert metrics.ssim(a[..., :11, :11], b[..., :11, :11], 1).numpy() == pytest.approx(
        metrics.similarity_maps(a, b, 1)[0][..., 0, 0].mean(1))       # one window
    for make in (lambda: metrics.ssim(a[..., :10], b[..., :10], 1), lambda: metrics.ms_ssim(a, b, 1, 2)):
        with pytest.raises(metrics.NotDefined, match="images are"):
            make()


def test_ms_ssim_over_two_scales_and_against_halving():
    a, b = np.random.RandomState(0).rand(2, 1, 1, 24, 26)
    b = 0.7 * a + 0.3 * b
    halved = [x.reshape(1, 1, 12, 2, 13, 2).mean((3, 5)) for x in (a, b)]
    structure = metrics.similarity_maps(a, b, 1.0)[1].mean()
    total = 0.0448 + 0.2856
    expected = structure ** (0.0448 / total) * metrics.ssim(*halved, 1.0) ** (0.2856 / total)
    assert metrics.ms_ssim(a, b, 1.0, 2).item() == pytest.approx(expected.item())
    assert metrics.ms_ssim(a, b, 1.0, 1).item() == pytest.approx(metrics.ssim(a, b, 1.0).item())
    assert sum(metrics.MS_SSIM_WEIGHTS) == pytest.approx(1, abs=1e-3)


def test_tsne_keeps_clusters_apart_and_repeats():
    x = torch.cat([torch.randn(25, 30) + 8 * k for k in range(3)])
    p = metrics.affinities(torch.cdist(x.double(), x.double()).square(), 10.0)
    entropy = -(p * p.clamp(min=1e-300).log()).sum(1)
    assert torch.allclose(entropy.exp(), torch.full((75,), 10.0, dtype=torch.float64), rtol=1e-6)
    assert p.diagonal().abs().max() == 0 and torch.allclose(p.sum(1), torch.ones(75, dtype=torch.float64))
    y = metrics.tsne(x, 10)                                           # at 250 steps one run of four tears a cluster
    assert torch.equal(y, metrics.tsne(x, 10)) and not torch.equal(y, metrics.tsne(x, 10, seed=1))
    d = torch.cdist(y, y)
    alike = torch.arange(75) // 25 == (torch.arange(75) // 25)[:, None]
    assert d[alike].max() < d[~alike].min()

    def cost(y):                                                      # KL(P || Q) by loops over nothing but pairs
        joint = (p + p.T) / 150
        w = (1 / (1 + torch.cdist(y, y).square())).fill_diagonal_(0)
        return float((joint * ((joint + 1e-300) / (w / w.sum() + 1e-300)).log()).sum())

    assert cost(y) < cost(metrics.tsne(x, 10, steps=100)) and all(
        cost(y) < cost(y + 0.05 * y.std() * torch.randn(75, 2)) for _ in range(5))     # a minimum
    assert metrics.tsne(torch.eye(40), steps=8).isfinite().all()     # all equally far: no width has the perplexity
    with pytest.raises(metrics.NotDefined, match="at least 4"):
        metrics.tsne(x[:3])


def test_the_file_may_be_pasted():
    cell = {}
    exec(Path(metrics.__file__).read_text("utf-8"), cell)
    assert not re.search(r"^(import|from) (?!math|numpy|torch)", Path(metrics.__file__).read_text("utf-8"), re.M)
    assert cell["fid"](torch.eye(5), torch.eye(5) + 1) == pytest.approx(5)


def test_planted_copies_raise_the_alarm_and_honest_images_do_not():
    real = images_of(1400, 1, channels=1)
    train, heldout, honest = real[:700], real[700:1000], real[1000:]
    calm = metrics.memorisation(train, heldout, honest)
    assert not calm["alarm"] and calm["share"] < 0.03 and calm["chance"] > 0.05
    assert calm["expected"] == 3 / 301                                # the third smallest of 300
    assert abs(calm["authentic"] - calm["authentic_held_out"]) < 0.1 and calm["ratio"] == pytest.approx(1, abs=0.1)
    planted = honest.copy()
    copies = np.clip(train[40:60].astype(int) + np.random.RandomState(0).randint(-9, 10, (20, 1, 16, 16)), 0, 255)
    planted[100:120] = copies                                         # 5 %, with grain on them
    alarm = metrics.memorisation(train, heldout, planted)
    assert alarm["alarm"] and alarm["share"] - calm["share"] == pytest.approx(0.05, abs=0.01)
    assert {(k, t) for k, t, *_ in alarm["pairs"]} <= {(100 + k, 40 + k) for k in range(20)}
    mirrored = honest.copy()
    mirrored[:20] = train[40:60, ..., ::-1]
    assert not metrics.memorisation(train, heldout, mirrored)["alarm"]
    found = metrics.memorisation(train, heldout, mirrored, mirror=True)
    assert found["alarm"] and all(turned and t == 40 + k for k, t, _, turned in found["pairs"])
    leaked = metrics.memorisation(train, np.concatenate([heldout, train[:5]]), planted)
    assert {**leaked, "pairs": 0} == {**alarm, "pairs": 0}            # held-out images that are not: passed over
    colours = np.random.RandomState(1).randint(100, 140, (300, 3, 32, 32)).astype(np.uint8)
    grey = np.stack([np.asarray(Image.fromarray(x.transpose(1, 2, 0)).convert("L"))[None] for x in colours])
    assert metrics.memorisation(grey[:100], colours[50:], grey[250:])["held_out"] == 200       # the same, made grey
    with pytest.raises(metrics.NotDefined, match="20 held-out images that are no training images, got 19"):
        metrics.memorisation(train, np.concatenate([heldout[:19], train]), honest)


def test_authpct_against_a_loop():
    train, heldout, fake = images_of(30, 1), images_of(25, 2), images_of(22, 3)
    a, h, f = (metrics.fingerprints(x).double() for x in (train, heldout, fake))
    assert torch.allclose(f.norm(dim=1), torch.ones(22, dtype=torch.float64)) and f.mean(1).abs().max() < 1e-6

    def authentic(x):
        count = 0
        for row in x:
            d = [float((row - t).norm()) for t in a]
            r = int(np.argmin(d))
            count += min(float((a[r] - a[j]).norm()) for j in range(30) if j != r) < d[r]
        return count / len(x)

    found = metrics.memorisation(train, heldout, fake)
    assert (found["authentic"], found["authentic_held_out"]) == pytest.approx((authentic(f), authentic(h)))


def test_interval_and_chance():
    assert metrics.wilson_interval(5, 50) == pytest.approx((0.0434, 0.2136), abs=1e-4)         # a textbook's
    assert metrics.wilson_interval(0, 20)[0] == 0
    random, n, r, h = np.random.RandomState(0), 30, 2, 25             # by drawing: ranks of one distribution
    counts = [(random.rand(n) < np.sort(random.rand(h))[r - 1]).sum() for _ in range(20000)]
    for c in (0, 1, 3, 6):
        assert metrics.rank_p_value(c, n, r, h) == pytest.approx(np.mean(np.array(counts) >= c), abs=0.012)
    assert metrics.rank_p_value(0, n, r, h) == pytest.approx(1)
