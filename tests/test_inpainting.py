"""Tests of inpainting.py."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import gan
import inpainting
import runtime
from conftest import holes, near, same, spoiled, untrained_enhancer


@pytest.mark.parametrize("kind, low, high", [("center", 0.25, 0.25), ("half", 0.5, 0.5), ("box", 0.06, 0.4),
                                             ("random", 0.8, 0.8), ("strokes", 0.1, 0.45)])
def test_masks(kind, low, high):
    masks = inpainting.masks(kind, 12, (32, 48), seed=5)
    assert masks.shape == (12, 1, 32, 48) and set(masks.unique().tolist()) == {0.0, 1.0}
    holes = 1 - masks.mean((1, 2, 3))
    assert holes.min() >= low - 0.01 and holes.max() <= high + 0.01
    assert torch.equal(masks[:4], inpainting.masks(kind, 4, (32, 48), seed=5))               # mask k whatever n
    assert kind == "center" or not torch.equal(masks, inpainting.masks(kind, 12, (32, 48), seed=6))
    if kind == "center":
        assert not masks[0, 0, 8:24, 12:36].any() and masks[0, 0, :8].all() and masks[0, 0, :, 36:].all()


def test_mask_from_a_file(here):
    Image.fromarray(np.repeat([[0, 255]], 4, 0).astype(np.uint8)).save("m.png")
    masks = inpainting.masks("m.png", 2, (8, 10))
    assert not masks[..., :5].any() and masks[..., 5:].all()
    with pytest.raises(runtime.UserError, match="--mask nothing.png: expected center, half"):
        inpainting.masks("nothing.png", 1, (8, 8))
    (here / "some").mkdir()
    for name, column in (("a.png", 0), ("b.png", 9)):
        mask = np.full((8, 10), 255, np.uint8)
        mask[:, column] = 0
        Image.fromarray(mask).save(f"some/{name}")
    masks = inpainting.masks("some", 3, (8, 10))                      # those of a folder are taken in turn
    assert (masks[0] == masks[2]).all() and not masks[0, ..., 0].any() and not masks[1, ..., 9].any()
    assert torch.equal(masks[:1], inpainting.masks("some", 1, (8, 10)))
    with pytest.raises(runtime.UserError, match="some/a.png: no hole or only hole at 2x1; black is the hole"):
        inpainting.masks("some", 1, (2, 1))


def test_nothing_inside_the_hole_gets_through():
    x, m = torch.randn(3, 2, 8, 9).clamp(-1, 1), inpainting.masks("box", 3, (8, 9))
    other = torch.where(m > 0, x, torch.randn_like(x) * 100)
    other[(m == 0).expand_as(x)] = torch.tensor([math.nan, math.inf, 5.0])[torch.arange(int((m == 0).sum() * 2)) % 3]
    a = inpainting.completion_input(x, m)
    assert torch.equal(a, inpainting.completion_input(other, m)) and a.shape == (3, 3, 8, 9)
    assert torch.equal(a[:, :2], x * m) and torch.equal(a[:, 2:], 2 * m - 1)
    y = torch.randn_like(x)
    assert torch.equal(inpainting.composite(x, y, m), x * m + y * (1 - m))
    assert torch.equal(inpainting.composite(other, y, m), inpainting.composite(x, y, m))
    U = gan.UNet(8, 3, 2, 4).eval()
    assert torch.equal(U(inpainting.completion_input(other, m)), U(inpainting.completion_input(x, m)))


@pytest.mark.parametrize("window, base", [(7, 0.2), (3, 0.0), (5, 1.0)])
def test_context_weights_against_a_loop(window, base):
    known, reach = holes(1), window // 2
    W = inpainting.context_weights(known, window, base)
    for n, (_, i, j) in [(n, place) for n in range(len(known)) for place in np.ndindex(1, 12, 14)]:
        around = known[n, 0, max(0, i - reach):i + reach + 1, max(0, j - reach):j + reach + 1]
        expected = base + 1 - around.mean() if known[n, 0, i, j] else 0.0
        assert W[n, 0, i, j] == pytest.approx(float(expected), abs=1e-6)


def test_the_weights_of_the_paper_sum_to_107_at_64_pixels():
    W = inpainting.context_weights(inpainting.masks("center", 1, (64, 64)), base=0)
    assert W.sum() == pytest.approx(107, abs=1) and (W > 0).sum() == 420


def test_context_loss_against_loops():
    known = holes(1)
    W = inpainting.context_weights(known)
    x, y = torch.randn(2, len(known), 3, 12, 14, dtype=torch.double)
    found = inpainting.context_loss(x, y, W, gradient=0.7)
    for n in range(len(known)):
        d, w = (x - y)[n], W[n, 0].double()
        plain = sum(w[i, j] * d[c, i, j].abs() for c, i, j in np.ndindex(3, 12, 14)) / (3 * w.sum())
        total = weight = 0.0
        for i, j in np.ndindex(12, 14):
            for a, b in near(i, j, (12, 14)):                         # each pair twice: it cancels
                v = min(w[i, j], w[a, b])
                total += v * sum((d[c, i, j] - d[c, a, b]).abs() for c in range(3))
                weight += 3 * v
        assert found[n] == pytest.approx(float(plain + 0.7 * (total / weight if weight else 0)), rel=1e-5)
    assert torch.equal(inpainting.context_loss(spoiled(x, known), spoiled(y, known, 7.0), W, 0.7), found)
    assert torch.allclose(inpainting.context_loss(x, y, 5 * W, 0.7), found)  # for every mask: it is normalised


def dense(target, guidance, known):
    """Poisson's equation as one system of linear equations per image and channel."""
    out = target.numpy().copy()
    for n, c in np.ndindex(out.shape[:2]):
        places = [tuple(place) for place in np.argwhere(known[n, 0].numpy() < 0.5)]
        number = {place: k for k, place in enumerate(places)}
        A, b = np.zeros((len(places), len(places))), np.zeros(len(places))
        for k, (i, j) in enumerate(places):
            for p in near(i, j, out.shape[2:]):
                A[k, k] += 1
                b[k] += guidance[n, c, i, j] - guidance[(n, c, *p)]
                if p in number:
                    A[k, number[p]] -= 1
                else:
                    b[k] += target[(n, c, *p)]
        for place, value in zip(places, np.linalg.solve(A, b)):
            out[(n, c, *place)] = value
    return torch.from_numpy(out)


@pytest.mark.parametrize("size", [(12, 14), (19, 9), (3, 2), (24, 24)])
def test_poisson_blending_equals_a_dense_solve(size):
    known = holes(2, size) if min(size) > 4 else torch.tensor([1.0, 0, 0, 0, 0, 1]).view(1, 1, 3, 2)
    target, guidance = torch.randn(2, len(known), 2, *size, dtype=torch.double)
    found = inpainting.poisson_blend(spoiled(target, known), guidance, known, tol=1e-9)
    assert (found - dense(target, guidance, known)).abs().max() < 1e-6
    fill = inpainting.harmonic_fill(spoiled(target, known), known, tol=1e-9)
    assert (fill - dense(target, torch.zeros_like(target), known)).abs().max() < 1e-6
    single = inpainting.poisson_blend(target.float(), guidance.float(), known)
    assert (single - found).abs().max() < 1e-4                        # far less than a grey level, 8e-3


def test_blending_an_image_alone_or_in_a_batch():
    known = holes(2, (40, 33))
    target, guidance = torch.randn(2, len(known), 3, 40, 33)
    together = inpainting.poisson_blend(target, guidance, known)
    for n in range(len(known)):                                       # some converge long before the others
        alone = inpainting.poisson_blend(target[n:n + 1], guidance[n:n + 1], known[n:n + 1])
        assert torch.equal(alone[0], together[n])
    nothing = torch.zeros(1, 1, 40, 33)
    assert torch.equal(inpainting.poisson_blend(target[:1], guidance[:1], nothing), guidance[:1])


def test_mean_fill_against_loops():
    known = holes(1, (16, 16))
    y = torch.rand(len(known), 3, 16, 16) * 2 - 1
    found = inpainting.mean_fill(spoiled(y, known), known)
    for n, c in np.ndindex(len(known), 3):
        there = known[n, 0] > 0.5
        assert torch.allclose(found[n, c][~there], y[n, c][there].mean(), atol=1e-5)
        assert torch.equal(found[n, c][there], y[n, c][there])
    assert (inpainting.mean_fill(y, torch.zeros_like(known)) == 0).all()              # nothing is known: mid-grey


def test_enhancer_begins_as_the_identity_and_its_loss_against_a_loop():
    known = holes(1)
    x, real = torch.randn(2, len(known), 3, 12, 14)
    assert torch.equal(inpainting.Enhancer(3, 8, 5)(x, known), x)
    assert len([m for m in inpainting.Enhancer().modules() if isinstance(m, nn.Conv2d)]) == 5
    total = count = 0.0
    for n, (i, j) in [(n, place) for n in range(len(known)) for place in np.ndindex(12, 14)]:
        if known[n, 0, max(0, i - 2):i + 3, max(0, j - 2):j + 3].min() < 0.5:
            total, count = total + (x - real)[n, :, i, j].abs().sum(), count + 3
    assert inpainting.enhancement_loss(x, real, known, ring=2) == pytest.approx(float(total / count), rel=1e-5)


def trained_like(size=(16, 20), channels=3, norm="layer"):
    """A generator whose samples differ and fill the range, and a critic, without training."""
    G, D = gan.Generator(size, channels, 6, 8), gan.Discriminator(size, channels, 8, norm=norm)
    G.to_image.weight.data *= 20
    for _ in range(50):
        G(torch.randn(32, 6))                                         # BatchNorm learns its running statistics
        D(torch.rand(8, channels, *size))
    return G.eval().requires_grad_(False), D.eval().requires_grad_(False)


def forward_pass(U):
    return lambda y, known: U(inpainting.completion_input(y, known)).unsqueeze(1)


def search(G, D, *, restarts=6, iterations=20, **options):
    return inpainting.LatentSearch(G, D, restarts, iterations, **options)


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_search_finds_an_image_that_the_generator_can_draw(norm, monkeypatch):
    monkeypatch.setattr(inpainting, "POOL", 64)
    G, D = trained_like(norm=norm)
    y, known = G(inpainting.project_to_sphere(torch.randn(4, 6))), holes(1, (16, 20))[:4]
    before = {name: tensor.clone() for net in (G, D) for name, tensor in net.state_dict().items()}
    method = search(G, D, iterations=80, prior=0.0)
    found = method(spoiled(y, known), known)
    assert found.shape == (4, 4, 3, 16, 20)
    error = ((found[:, 0] - y).abs() * (1 - known)).sum((1, 2, 3))
    plain = ((inpainting.mean_fill(y, known) - y).abs() * (1 - known)).sum((1, 2, 3))
    start = ((method.samples[0] - y).abs() * (1 - known)).sum((1, 2, 3))
    assert (error < 0.5 * plain).all() and (error < 0.5 * start).all()
    after = {name: tensor for net in (G, D) for name, tensor in net.state_dict().items()}
    assert same(before, after)                                        # nothing trains, BatchNorm counts nothing


def test_search_orders_its_answers_by_what_is_known_and_stays_on_the_sphere(monkeypatch):
    monkeypatch.setattr(inpainting, "POOL", 64)
    G, D = trained_like()
    y, known = torch.rand(3, 3, 16, 20) * 2 - 1, holes(1, (16, 20))[:3]
    method, W = search(G, D), inpainting.context_weights(known)
    inputs = y, known
    found = method(*inputs)
    context = torch.stack([inpainting.context_loss(found[:, k], y, W) for k in range(4)], 1)
    assert (context.diff(dim=1) >= 0).all() and (context[:, 0] < context[:, 3]).all()
    y = G(torch.randn(3, 6))
    z, loss, x = search(G, D, prior=0.0).refine(method.pool[:6].view(3, 2, 6), y, W, range(20))
    assert torch.allclose(z.norm(dim=2), torch.tensor(6**0.5)) and torch.allclose(G(z[1]), x[1], atol=1e-5)
    first = inpainting.context_loss(G(method.pool[:6]), y.repeat_interleave(2, 0), W.repeat_interleave(2, 0)).view(3, 2)
    assert (loss < first).all()
    one = inpainting.LatentSearch(G, D, 1, 3)(y, known)
    method.chunk = 6                                                # one image after the other
    assert torch.allclose(method(*inputs), found, atol=1e-3)
    assert one.shape == (3, 1, 3, 16, 20)


def test_nothing_inside_the_hole_is_ever_read(monkeypatch):
    monkeypatch.setattr(inpainting, "POOL", 64)
    G, D = trained_like()
    U, known = gan.UNet((16, 20), 4, 3, 4).eval().requires_grad_(False), holes(1, (16, 20))
    enhancer = untrained_enhancer(torch.zeros(1, 3, 16, 20))
    y = torch.rand(len(known), 3, 16, 20) * 2 - 1
    for method, blend in ((search(G, D, restarts=3, iterations=5), "poisson"), (forward_pass(U), "poisson"),
                          (forward_pass(U), "paste")):
        found = inpainting.complete_batch(method, y, known, blend, enhancer)
        for other in (torch.where(known > 0.5, y, torch.rand_like(y)), spoiled(y, known)):
            assert torch.equal(method(other, known), method(y, known))
            assert torch.equal(inpainting.complete_batch(method, other, known, blend, enhancer), found)
        assert torch.equal((found * known[:, None]), (y * known)[:, None].expand_as(found)) and found.isfinite().all()
    touched = torch.where(known.roll(1, 3) > 0.5, y, -y)              # and that the test can fail: known pixels differ
    assert not torch.equal(inpainting.complete_batch(method, touched, known, blend), inpainting.complete_batch(
        method, y, known, blend))


def test_the_prior_counts_in_units_of_the_critics_own_deviation(monkeypatch):
    monkeypatch.setattr(inpainting, "POOL", 64)
    G, D = trained_like()
    y, known = torch.rand(2, 3, 16, 20) * 2 - 1, holes(1, (16, 20))[:2]

    class Scaled(nn.Module):
        def forward(self, x):
            return 128 * D(x) + 1024

    plain, scaled = search(G, D, prior=0.5), search(G, Scaled(), prior=0.5)
    assert scaled.std == pytest.approx(128 * plain.std.item(), rel=1e-3)
    start, W = plain.pool[:8].view(2, 4, 6), inpainting.context_weights(known)
    (a, _, x), (b, _, _) = (method.refine(start, y, W, range(5)) for method in (plain, scaled))
    assert torch.allclose(a, b, atol=5e-3) and not torch.allclose(a, start, atol=5e-3)
    scores = [D(search(G, D, prior=prior).refine(start, y, W, range(20))[2].flatten(0, 1)).mean()
              for prior in (0.0, 5.0)]
    assert scores[1] > scores[0] + 0.5 * plain.std                    # D is high on real: the prior raises the score


@pytest.mark.parametrize("kind", ["search", "forward"])
def test_an_image_alone_or_in_a_batch_is_completed_alike(kind, monkeypatch):
    monkeypatch.setattr(inpainting, "POOL", 64)
    G, D = trained_like(norm="batch")
    known = holes(1, (16, 20))
    y = torch.rand(len(known), 3, 16, 20) * 2 - 1
    method = search(G, D) if kind == "search" else forward_pass(gan.UNet((16, 20), 4, 3, 4).eval())
    together = inpainting.complete_batch(method, y, known, "poisson")
    for n in range(len(known)):
        alone = inpainting.complete_batch(method, y[n:n + 1], known[n:n + 1], "poisson")
        assert torch.allclose(alone[0], together[n], atol=1e-3)       # equal but for the rounding of the convolutions


def test_enhancement_learns_what_is_always_wrong():
    known = holes(4, (16, 16))
    real = (torch.rand(len(known), 3, 4, 4) * 1.6 - 0.8).repeat_interleave(4, 2).repeat_interleave(4, 3)
    x = inpainting.composite(real, 0.5 * real + 0.2, known)                  # too flat and too light in the hole
    net = inpainting.train_enhancer(x, real, known, steps=80)
    better = inpainting.composite(x, net(x, known).clamp(-1, 1), known)
    assert torch.equal(better * known, real * known) and not net.training
    assert inpainting.enhancement_loss(better, real, known) < 0.56 * inpainting.enhancement_loss(x, real, known)
    assert (net.correction[:-1](torch.cat([x, known], 1)) > 0).float().mean() > 0.2        # with ReLU units die
