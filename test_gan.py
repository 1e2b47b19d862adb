"""What the papers say: equations, networks, both loops, exact resume. No GPU, no network, no images but drawn ones.

Equations are held against another spelling of the same equation (loops, closed forms, finite differences), with real
and fake different, so that a swapped sign or argument fails.
"""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import data
import gan
import inpainting
import metrics
import runs
from conftest import BOOSTED, SCRIPTS, Stub, checkpoint, draw, lively, same, train

SIZES = [(8, 8), (9, 15), (16, 16), (28, 28), (31, 31), (33, 65), (64, 64), (96, 160), (100, 37), (128, 128),
         (287, 508), (240, 8), (511, 13), (512, 512), (1024, 9)]


# ---- Networks

@pytest.mark.parametrize("size", SIZES)
def test_any_size_comes_out_exact(size):
    G = gan.Generator(size, channels=1, latent=6, features=2, max_features=4)
    D = gan.Discriminator(size, channels=1, features=2, max_features=4)
    x = G(torch.randn(2, 6))
    assert x.shape == (2, 1, *size) and x.abs().max() <= 1
    assert D(x).shape == (2,)
    assert 4 <= min(G.grids[0]) <= 7 and G.grids[-1] == size
    for (h0, w0), (h1, w1) in zip(G.grids, G.grids[1:]):
        assert 0 <= 2 * h0 - h1 <= 1 and 0 <= 2 * w0 - w1 <= 1        # no level wastes more than one row or column


def test_ladders_as_they_are_documented():
    assert gan.grid_sizes((64, 64)) == [(4, 4), (8, 8), (16, 16), (32, 32), (64, 64)]
    assert gan.grid_sizes((287, 508)) == [(5, 8), (9, 16), (18, 32), (36, 64), (72, 127), (144, 254), (287, 508)]
    assert gan.grid_sizes((28, 28)) == [(7, 7), (14, 14), (28, 28)]       # at most 7, not under 7


@pytest.mark.parametrize("size", [(16, 16), (21, 13)])
@pytest.mark.parametrize("upsample", ["transposed", "nearest"])
@pytest.mark.parametrize("norm", ["none", "batch", "instance", "layer", "spectral"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_option_runs_forwards_and_backwards(size, upsample, norm, channels):
    G = gan.Generator(size, channels, 5, 4, 16, upsample)
    D = gan.Discriminator(size, channels, 4, 16, norm)
    for amp in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            fake = G(torch.randn(3, 5))
            gan.generator_loss(D(fake)).backward()
            loss = gan.critic_loss(D(torch.rand_like(fake)), D(fake.detach()))
            if norm != "batch":
                loss = loss + gan.gradient_penalty(D, torch.rand_like(fake), fake.detach())
            loss.backward()
        assert fake.dtype == loss.dtype == torch.float32
        gradients = [w.grad for net in (G, D) for w in net.parameters()]
        assert all(g is not None and g.isfinite().all() for g in gradients)


def test_widths_double_towards_the_base_and_are_capped():
    G, D = gan.Generator(64, 3, 10, 8, 24), gan.Discriminator(64, 3, 8, 24)
    assert [m.in_channels for m in G.modules() if isinstance(m, nn.ConvTranspose2d)] == [24, 24, 16, 8]
    assert [m.in_channels for m in D.modules() if isinstance(m, nn.Conv2d)] == [3, 8, 16, 24, 24]


def test_size_of_the_published_dcgan():
    """Radford et al. 2015, figure 1: 100 -> 4x4x1024 -> 512 -> 256 -> 128 -> 3, kernels here 4 instead of 5."""
    G = gan.Generator(64, 3, 100, 128, 1024)
    convolutions = 100 * 16 * 1024 + 16 * (1024 * 512 + 512 * 256 + 256 * 128 + 128 * 3) + 3
    assert sum(w.numel() for w in G.parameters()) == convolutions + 2 * (1024 + 512 + 256 + 128)


def test_layers_are_the_published_ones():
    kinds = {"batch": nn.BatchNorm2d, "instance": nn.InstanceNorm2d, "layer": nn.GroupNorm}
    for norm in ("none", "batch", "instance", "layer", "spectral"):
        D = gan.Discriminator(32, 1, 4, norm=norm)
        layers = [type(m) for m in D.levels if not isinstance(m, nn.LeakyReLU)]
        first, between = layers[0], [kinds[norm]] if norm in kinds else []
        assert issubclass(first, nn.Conv2d) and len(layers) == 1 + 2 * (1 + len(between))
        assert all(m.negative_slope == 0.2 for m in D.levels if isinstance(m, nn.LeakyReLU))
        assert [m for m in layers if m in kinds.values()] == between * 2              # never on the first convolution
        assert sum(hasattr(m, "parametrizations") for m in D.modules()) == (4 if norm == "spectral" else 0)
    x = torch.randn(2, 8, 3, 3)
    layer = gan.norm_layer("layer", 8)(x)
    assert layer.mean((1, 2, 3)).abs().max() < 1e-5 and layer.mean((2, 3)).abs().max() > 0.05
    assert gan.norm_layer("instance", 8)(x).mean((2, 3)).abs().max() < 1e-5
    G = gan.Generator(32, 1, 5, 4)
    assert [[type(m) for m in level] for level in G.levels] == [[nn.ConvTranspose2d, nn.BatchNorm2d, nn.ReLU]] * 2


def test_spectral_norm_bounds_the_weights():
    D = gan.Discriminator(16, 1, 4, norm="spectral")
    for _ in range(50):
        D(torch.randn(2, 1, 16, 16))                                  # a power iteration each
    for m in D.modules():
        if isinstance(m, nn.Conv2d):
            assert torch.linalg.matrix_norm(m.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.05)


def test_initial_weights():
    G, D = gan.Generator(64, 3, 64, 64), gan.Discriminator(64, 3, 64, norm="batch")
    for module in [*G.modules(), *D.modules()]:
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)) and module.weight.numel() > 5000:
            assert abs(module.weight.std() - 0.02) < 0.001 and abs(module.weight.mean()) < 0.001
        if isinstance(module, nn.BatchNorm2d):
            assert abs(module.weight.mean() - 1) < 0.01 and module.weight.std() < 0.03
        if getattr(module, "bias", None) is not None:
            assert not module.bias.any()


@pytest.mark.parametrize("norm", ["none", "instance", "layer", "spectral"])
def test_critics_score_each_image_by_itself(norm):
    D = gan.Discriminator(16, 1, 4, norm=norm).eval()
    x = torch.randn(6, 1, 16, 16)
    assert torch.allclose(D(x)[:2], D(x[:2]), atol=1e-6)


def test_the_score_is_the_last_convolution_in_float32():
    D = gan.Discriminator(16, 1, 4)
    x = torch.randn(3, 1, 16, 16)
    assert torch.allclose(D(x), D.score(D.levels(x)).flatten(), atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert D(x).dtype == torch.float32


@pytest.mark.parametrize("make", [
    lambda: gan.Generator(3), lambda: gan.Generator((64, 5000)), lambda: gan.Generator(64, upsample="bilinear"),
    lambda: gan.Generator(64, features=0), lambda: gan.Discriminator(3), lambda: gan.Discriminator(64, norm="group"),
    lambda: gan.UNet(4), lambda: gan.UNet(64, norm="spectral"), lambda: gan.UNet(64, upsample="bilinear"),
    lambda: gan.UNet(64, depth=1), lambda: gan.UNet(64, features=0), lambda: gan.PatchGAN(norm="group")])
def test_what_cannot_be_built_says_why(make):
    with pytest.raises(ValueError, match="nearest size that works is|is 'transposed' or|at least 1|norm is none"):
        make()


# ---- Losses and constraints

def test_wasserstein_losses_against_loops_and_their_signs():
    f_real, f_fake = (torch.randn(7, requires_grad=True) for _ in range(2))
    loop = sum(f.item() for f in f_fake) / 7 - sum(f.item() for f in f_real) / 7
    loss = gan.critic_loss(f_real, f_fake)
    assert loss.item() == pytest.approx(loop, abs=1e-6)
    loss.backward()
    assert (f_real.grad < 0).all() and (f_fake.grad > 0).all()        # minimising it lifts real and lowers fake
    f_fake.grad = None
    loss = gan.generator_loss(f_fake)
    assert loss.item() == pytest.approx(-sum(f.item() for f in f_fake) / 7, abs=1e-6)
    loss.backward()
    assert (f_fake.grad < 0).all()                                    # minimising it lifts fake
    assert gan.critic_loss(f_real.bfloat16(), f_fake.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("smooth, two_sided", [(0.0, False), (0.1, False), (0.1, True)])
def test_bce_is_torchs_own_on_both_targets(smooth, two_sided):
    f_real, f_fake = (torch.randn(7, requires_grad=True) for _ in range(2))
    own = nn.BCELoss()                                                # on probabilities, another route than logits
    expected = (own(f_real.sigmoid(), torch.full((7,), 1 - smooth))
                + own(f_fake.sigmoid(), torch.full((7,), smooth if two_sided else 0.0)))
    assert gan.bce_discriminator_loss(f_real, f_fake, smooth, two_sided).item() == pytest.approx(expected.item(), 1e-5)
    assert gan.bce_generator_loss(f_fake).item() == pytest.approx(own(f_fake.sigmoid(), torch.ones(7)).item(), 1e-5)
    gan.bce_generator_loss(f_fake).backward()
    assert (f_fake.grad < 0).all()                                    # G wants its fakes scored higher
    far = torch.tensor([-50.0], requires_grad=True)
    gan.bce_generator_loss(far).backward()
    assert far.grad.item() == pytest.approx(-1)                       # non-saturating: no vanishing where D is sure


@pytest.mark.parametrize("smooth, two_sided", [(0.0, False), (0.1, False), (0.1, True)])
def test_the_best_discriminator_under_smoothing(smooth, two_sided):
    """On three points with densities p and q, minimising the loss gives s(D) = ((1 - s) p + u q) / (p + q)."""
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.1, 0.3, 0.6])
    real, fake = (torch.repeat_interleave(torch.arange(3), (10 * d).round().long()) for d in (p, q))
    f = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.LBFGS([f], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = gan.bce_discriminator_loss(f[real], f[fake], smooth, two_sided)
        loss.backward()
        return loss

    optimizer.step(closure)
    u = smooth if two_sided else 0.0
    assert torch.allclose(f.sigmoid(), ((1 - smooth) * p + u * q) / (p + q), atol=1e-3)


def test_losses_and_scores_are_float32_whatever_comes_in():
    f_real, f_fake = torch.randn(2, 6).bfloat16()
    y, fake = torch.randn(2, 3, 1, 8, 8).bfloat16()
    losses = [gan.critic_loss(f_real, f_fake), gan.generator_loss(f_fake), gan.bce_discriminator_loss(f_real, f_fake),
              gan.bce_generator_loss(f_fake), gan.hinge_discriminator_loss(f_real, f_fake),
              gan.relativistic_discriminator_loss(f_real, f_fake), gan.relativistic_generator_loss(f_real, f_fake),
              gan.l1_loss(y, fake), gan.l1_loss(y, fake, (y > 0).bfloat16())]
    with torch.autocast("cpu", torch.bfloat16):
        x = torch.randn(2, 3, 16, 16)
        scores = [gan.PatchGAN(3, 4, n_layers=1)(x), gan.Discriminator(16, 3, 4)(x), gan.UNet(16, features=4)(x)]
    assert {value.dtype for value in losses + scores} == {torch.float32}


def test_hinge_and_relativistic_losses_against_loops_and_their_signs():
    f_real, f_fake = (torch.randn(9, requires_grad=True) for _ in range(2))
    a, b = f_real.tolist(), f_fake.tolist()
    hinge = sum(max(0, 1 - r) for r in a) / 9 + sum(max(0, 1 + f) for f in b) / 9
    paired = sum(math.log(1 + math.exp(-(r - f))) for r, f in zip(a, b)) / 9
    turned = sum(math.log(1 + math.exp(-(f - r))) for r, f in zip(a, b)) / 9
    assert gan.hinge_discriminator_loss(f_real, f_fake).item() == pytest.approx(hinge, abs=1e-5)
    assert gan.relativistic_discriminator_loss(f_real, f_fake).item() == pytest.approx(paired, abs=1e-5)
    assert gan.relativistic_generator_loss(f_real, f_fake).item() == pytest.approx(turned, abs=1e-5)
    for loss, sign in ((gan.hinge_discriminator_loss, 1), (gan.relativistic_discriminator_loss, 1),
                       (gan.bce_discriminator_loss, 1), (gan.relativistic_generator_loss, -1)):
        f_real.grad = f_fake.grad = None
        loss(f_real, f_fake).backward()
        assert (sign * f_real.grad <= 0).all() and (sign * f_fake.grad >= 0).all()
        assert f_real.grad.any() and f_fake.grad.any()


def test_zero_centred_penalty_of_a_quadratic_discriminator():
    """D(x) = x.Ax / 2 with A symmetric has the gradient Ax, so that the penalty is E[||Ax||^2]."""
    A = torch.randn(12, 12)
    A = nn.Parameter(A + A.T)
    x = torch.randn(5, 3, 2, 2)
    penalty = gan.zero_centred_penalty(lambda x: (x.flatten(1) @ A * x.flatten(1)).sum(1) / 2, x)
    rows = [[sum(A[i, j].item() * v for j, v in enumerate(image)) for i in range(12)] for image in
            x.flatten(1).tolist()]
    assert penalty.item() == pytest.approx(sum(g * g for row in rows for g in row) / 5, rel=1e-4)
    penalty.backward()
    assert not x.requires_grad and x.grad is None                     # the caller's image is left as it was
    X = x.flatten(1)
    assert torch.allclose(A.grad, (A @ X.T @ X + X.T @ X @ A).detach() / 5, rtol=1e-3, atol=1e-3)


def test_minibatch_discrimination_against_a_loop():
    layer = gan.MinibatchDiscrimination(10, kernels=3, kernel_size=4)
    x = torch.randn(6, 10)
    o = layer(x)
    M = [[layer.T.weight[4 * b:4 * b + 4].detach() @ image for b in range(3)] for image in x]
    for i in range(6):
        for b in range(3):
            c = [math.exp(-sum(abs(u - v) for u, v in zip(M[i][b].tolist(), M[j][b].tolist())))
                 for j in range(6) if j != i]
            assert o[i, b].item() == pytest.approx(sum(c) / 5, abs=1e-5)


def test_minibatch_discrimination_tells_collapse_and_does_not_depend_on_the_batch_size():
    D = gan.Discriminator(16, 1, 4, minibatch=True)
    nn.init.normal_(D.score_minibatch.weight, 5.0)
    one = torch.randn(1, 1, 16, 16)
    varied, collapsed = torch.randn(12, 1, 16, 16), one.expand(12, 1, 16, 16)
    assert D.minibatch_discrimination(D.levels(collapsed).flatten(1)).min().item() == pytest.approx(1, abs=1e-4)
    assert D.minibatch_discrimination(D.levels(varied).flatten(1)).max().item() < 1 - 1e-4
    assert torch.allclose(D(collapsed)[:1], D(one.expand(3, 1, 16, 16))[:1], atol=1e-5)
    assert torch.allclose(D.minibatch_discrimination(D.levels(varied.repeat(9, 1, 1, 1)).flatten(1)).mean(),
                          D.minibatch_discrimination(D.levels(varied).flatten(1)).mean(), rtol=0.2)
    assert D(one).isfinite().all()                                    # a batch of one has no others
    D(varied).sum().backward()
    assert D.minibatch_discrimination.T.weight.grad.any()


def test_minibatch_discrimination_is_cheap_at_256():
    extra = [sum(w.numel() for w in gan.Discriminator(side, 3, 16, 128, minibatch=True).parameters())
             - sum(w.numel() for w in gan.Discriminator(side, 3, 16, 128).parameters()) for side in (64, 256)]
    assert extra[0] == extra[1] < 600_000                             # 201 million in one of the seeds of this project


class Linear(nn.Module):
    """D(x) = w . x + b, whose norm is w everywhere."""

    def __init__(self, w):
        super().__init__()
        self.w, self.b = nn.Parameter(w), nn.Parameter(torch.ones(()))

    def forward(self, x):
        return torch.nn.functional.linear(x.flatten(1), self.w[None]).flatten() + self.b


@pytest.mark.parametrize("length", [0.3, 1.0, 2.5])
def test_penalty_of_a_linear_critic(length):
    w = torch.randn(12)
    D = Linear(w / w.norm() * length)
    real, fake = torch.randn(5, 3, 2, 2), torch.randn(5, 3, 2, 2)
    assert gan.gradient_penalty(D, real, fake).item() == pytest.approx((length - 1) ** 2, abs=1e-5)
    one_sided = gan.gradient_penalty(D, real, fake, one_sided=True).item()
    assert one_sided == pytest.approx(max(0, length - 1) ** 2, abs=1e-5)


def test_penalty_is_float32_under_bf16():
    D = Linear(torch.full((7,), 0.5))                                 # exact in bf16; its norm, sqrt(7) / 2, is not
    x = torch.randn(4, 1, 1, 7)
    with torch.autocast("cpu", torch.bfloat16):
        penalty = gan.gradient_penalty(D, x, -x)
    assert penalty.dtype == torch.float32
    assert penalty.item() == pytest.approx((math.sqrt(7) / 2 - 1) ** 2, abs=1e-6)


def test_penalty_is_per_sample_and_over_all_pixels():
    """D(x) = a/2 ||x||^2 has the norm a ||x^||; with real = fake, x^ = x whatever eps."""
    a, x = 0.7, torch.randn(4, 3, 5, 6)
    scale = nn.Parameter(torch.tensor(a))
    penalty = gan.gradient_penalty(lambda x: scale / 2 * x.square().flatten(1).sum(1), x, x.clone())
    loop = [(a * math.sqrt(sum(v * v for v in image.flatten().tolist())) - 1) ** 2 for image in x]
    assert penalty.item() == pytest.approx(sum(loop) / 4, rel=1e-5)


def test_penalty_is_taken_between_real_and_fake():
    real, fake, seen = torch.full((500, 3, 2, 2), 1.0), torch.full((500, 3, 2, 2), -3.0), []
    w = nn.Parameter(torch.ones(12))
    gan.gradient_penalty(lambda x: (seen.append(x.detach()), (x.flatten(1) * w).sum(1))[1], real, fake)
    eps = (seen[0] + 3) / 4                                           # x^ = eps * 1 + (1 - eps) * -3
    assert torch.allclose(eps, eps[:, :1, :1, :1].expand_as(eps), atol=1e-6)          # one eps an image
    eps = eps[:, 0, 0, 0]
    assert eps.min() >= 0 and eps.max() <= 1 and abs(eps.mean() - 0.5) < 0.05 and abs(eps.std() - 12 ** -0.5) < 0.03


def test_gradient_of_the_penalty_against_finite_differences():
    D = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 1))
    real, fake = torch.randn(3, 2, 6, 6), torch.randn(3, 2, 6, 6)
    for one_sided in (False, True):
        with torch.no_grad():
            D[-1].weight.mul_(3.0)

        def penalty(one_sided=one_sided):
            torch.manual_seed(1)                                      # the same eps each time
            return gan.gradient_penalty(lambda x: D(x).flatten(), real, fake, one_sided)

        D.zero_grad()
        penalty().backward()
        step, direction = 3e-3, [torch.randn_like(w) for w in D.parameters()]
        analytic = sum((w.grad * d).sum().item() for w, d in zip(D.parameters(), direction) if w.grad is not None)
        values = []
        for sign in (1, -2):
            with torch.no_grad():
                for w, d in zip(D.parameters(), direction):
                    w.add_(sign * step * d)
            values.append(penalty().item())
        with torch.no_grad():
            for w, d in zip(D.parameters(), direction):
                w.add_(step * d)
        assert abs(analytic) > 1e-2 and (values[0] - values[1]) / (2 * step) == pytest.approx(analytic, rel=2e-2)


def test_penalty_refuses_a_gradient_without_a_graph():
    D = Linear(torch.randn(4))
    x = torch.randn(2, 1, 2, 2)
    with pytest.raises(RuntimeError, match="carries no graph"):
        gan.gradient_penalty(D.requires_grad_(False), x, -x)


def test_clipping_puts_every_parameter_in_the_box_and_moves_no_other():
    D = gan.Discriminator(16, 1, 8, norm="batch")
    before = [w.detach().clone() for w in D.parameters()]
    gan.clip_weights(D, 0.01)
    assert any((w.abs() > 0.01).any() for w in before)
    for w, old in zip(D.parameters(), before):
        assert torch.equal(w, old.minimum(torch.tensor(0.01)).maximum(torch.tensor(-0.01)))


# ---- Augmentation and averaging

def test_translation_is_a_whole_shift_with_zeros_behind_it():
    x = torch.rand(300, 2, 16, 24) + 1
    out, shifts = gan.random_translation(x), set()
    for a, b in zip(x, out):
        rows, cols = (b.sum((0, 2)) > 0).nonzero().flatten(), (b.sum((0, 1)) > 0).nonzero().flatten()
        h, w = len(rows), len(cols)
        found = [(dy, dx) for dy in {16 - h, h - 16} for dx in {24 - w, w - 24}
                 if torch.equal(b[:, max(dy, 0):16 + min(dy, 0), max(dx, 0):24 + min(dx, 0)],
                                a[:, max(-dy, 0):16 - max(dy, 0), max(-dx, 0):24 - max(dx, 0)])]
        assert len(found) == 1 and torch.count_nonzero(b) == 2 * h * w
        shifts.add(found[0])
    assert {dy for dy, _ in shifts} == set(range(-2, 3)) and {dx for _, dx in shifts} == set(range(-3, 4))


@pytest.mark.parametrize("side", [16, 9])
def test_cutout_is_one_rectangle_of_half_the_side(side):
    out = gan.random_cutout(torch.ones(2000, 1, side, 12))
    centres = set()
    for image in (out[:, 0] == 0):
        rows, cols = image.any(1).nonzero().flatten(), image.any(0).nonzero().flatten()
        assert image[rows[0]:rows[-1] + 1, cols[0]:cols[-1] + 1].all() and image.sum() == len(rows) * len(cols)
        assert len(rows) <= int(side / 2 + 0.5) and len(cols) <= 6
        centres.add(int(rows[0]) if len(rows) < int(side / 2 + 0.5) and rows[0] > 0 else -1)
    length, last = int(side / 2 + 0.5), side - 1 if side % 2 else side                # centres, as published: 0 .. last
    tops = {int(image.any(1).nonzero()[0]) for image in out[:, 0] == 0}
    assert tops == set(range(0, last - length // 2 + 1)) and len(centres) > 2
    assert (out == 0).float().mean() == pytest.approx(0.25 * 0.78, abs=0.04)


def test_colour_stays_in_the_published_ranges():
    x = torch.rand(4000, 3, 2, 2) * 0.2
    x[:, 0] += 1
    out = gan.random_colour(x)
    shift = (out - x).mean((1, 2, 3))                                 # brightness alone moves the mean
    assert -0.501 < shift.min() < -0.49 and 0.49 < shift.max() < 0.501
    assert shift.std() == pytest.approx(12 ** -0.5, abs=0.02)
    grey = torch.rand(4000, 1, 2, 2)
    contrast = gan.random_colour(grey).std((1, 2, 3)) / grey.std((1, 2, 3))            # saturation does nothing to grey
    assert 0.499 < contrast.min() < 0.51 and 1.49 < contrast.max() < 1.501
    assert contrast.mean() == pytest.approx(1, abs=0.03)
    spread = (out.mean((2, 3)).std(1) / x.mean((2, 3)).std(1)) / (out.mean(1).flatten(1).std(1) /
                                                                  x.mean(1).flatten(1).std(1))
    assert 0 <= spread.min() < 0.02 and 1.98 < spread.max() < 2.001 and spread.mean() == pytest.approx(1, abs=0.05)


def test_augmentation_is_differentiable_and_optional():
    x = torch.randn(4, 3, 16, 16, requires_grad=True)
    assert gan.diff_augment(x, "") is x
    gan.diff_augment(x, "color,translation,cutout").square().sum().backward()
    assert x.grad.isfinite().all() and (x.grad != 0).any((1, 2, 3)).all()
    with pytest.raises(ValueError, match="not 'colour'"):
        gan.diff_augment(x, "colour")


def test_average_with_its_ramp_against_a_loop():
    G = nn.BatchNorm1d(1)
    G_ema, expected, mean = copy.deepcopy(G), 1.0, 0.0
    for step in range(1, 2001):
        value = math.sin(step)
        nn.init.constant_(G.weight, value)
        G.running_mean.fill_(value)
        G.num_batches_tracked.fill_(step)
        gan.update_ema(G_ema, G, 0.99, step)
        b = min(0.99, (1 + step) / (10 + step))
        expected, mean = b * expected + (1 - b) * value, b * mean + (1 - b) * value
        assert G_ema.weight.item() == pytest.approx(expected, abs=1e-5)
        assert G_ema.running_mean.item() == pytest.approx(mean, abs=1e-5)
        assert G_ema.num_batches_tracked.item() == step               # a count has no average
        if step == 1:
            assert b == 2 / 11
    assert b == 0.99


def test_load_generator_gives_back_the_same_images(here):
    G = gan.Generator((9, 12), 1, 5, 4)
    G(torch.randn(20, 5))                                             # moves the running statistics
    gan.save_generator("G.pt", G)
    torch.save({"config": G.config, "state": {"G_ema": G.state_dict()}}, "checkpoint.pt")
    z = torch.randn(3, 5)
    for path in ("G.pt", "checkpoint.pt", "."):
        loaded = gan.load_generator(path)
        assert not loaded.training and torch.equal(loaded(z), G.eval()(z))
        assert not any(w.requires_grad for w in loaded.parameters())
    Path("text.pt").write_text("not a network")
    torch.save({"config": {**G.config, "features": 8}, "G_ema": G.state_dict()}, "other.pt")
    for path in ("text.pt", "other.pt"):
        with pytest.raises(OSError, match="no file that a training script wrote, or it is damaged"):
            gan.load_generator(path)
    with pytest.raises(FileNotFoundError):
        gan.load_generator("nothing.pt")


def test_a_generator_in_half_precision_is_half_as_large_and_draws_the_same_in_float32(here):
    torch.manual_seed(0)
    G, z = lively(gan.Generator((16, 12), 3, 8, 16)).eval(), torch.randn(5, 8)
    gan.save_generator("G.pt", G)
    gan.save_generator("half.pt", copy.deepcopy(G).half(), note="trained on nothing")
    back = gan.load_generator("half.pt")
    assert Path("half.pt").stat().st_size < 0.6 * Path("G.pt").stat().st_size
    assert {w.dtype for w in back.parameters()} == {torch.float32}
    torch.testing.assert_close(back(z), G(z), rtol=0, atol=2e-3)
    assert back(z).std() > 0.1


@pytest.mark.parametrize("script, flags", [
    ("wgan", "--constraint gp"), ("wgan", "--constraint clip"), ("dcgan", BOOSTED), ("dcgan", "--schedule monitored"),
    ("dcgan", "--loss relativistic"), ("dcgan", "--minibatch-discrimination --smooth 0.1 --two-sided")])
def test_six_and_six_steps_are_twelve(here, script, flags):
    draw(here / "images")
    module, _ = SCRIPTS[script]
    train("--steps", "12", "--out", "a", *flags.split(), script=script)
    train("--steps", "6", "--out", "b", *flags.split(), script=script)
    if flags == BOOSTED:                                              # interrupted inside a run of one network
        assert checkpoint("b")["state"]["schedule"]["left"] in (1, 2, 3)
    module.main(["--resume", "b", "--steps", "12"])
    a, b = checkpoint("a"), checkpoint("b")
    assert a["step"] == b["step"] == 12
    assert all(same(a[key], b[key]) for key in ("state", "random", "same", "config"))
    steps = [json.loads(line)["step"] for line in Path("b/log.jsonl").read_text("utf-8").splitlines()]
    assert steps == [2, 4, 6, 8, 10, 12]
    module.main(["@a/args.txt", "--out", "c"])                        # and the same run once more
    assert same(checkpoint("c")["state"], a["state"])
    train("--steps", "12", "--out", "d", *flags.split(), "--seed", "4", script=script)
    assert not same(checkpoint("d")["state"], a["state"])


# ---- The house

@pytest.mark.parametrize("script, flags, per_step", [
    ("wgan", "", [False, False, True]), ("wgan", "--constraint clip", [False, False, True]),
    ("dcgan", "", [False, True]), ("dcgan", "--loss relativistic", [False, True]),
    ("dcgan", "--loss hinge --minibatch-discrimination", [False, True])])
def test_the_loop_owes_nothing_to_the_plumbing(here, monkeypatch, script, flags, per_step):
    """With `Run` replaced by a stub the scripts train; D's step builds no graph of G; G's step leaves D as it is."""
    draw(here / "images")
    monkeypatch.setattr(runs, "Run", Stub)
    graphs, gradients, forward, step = [], [], gan.Generator.forward, torch.optim.Optimizer.zero_grad

    def spy(self, z):
        x = forward(self, z)
        graphs.extend([x.requires_grad] if len(z) > 1 else [])        # one is drawn to print the layers
        return x

    def watch(self, *args, **kwargs):
        if self is Stub.state["opt_G"]:                               # between G's forward and backward pass
            gradients.append([w.grad.clone() for w in Stub.state["D"].parameters()])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(gan.Generator, "forward", spy)
    monkeypatch.setattr(torch.optim.Optimizer, "zero_grad", watch)
    train("--steps", "3", *flags.split(), script=script)
    assert graphs == per_step * 3
    assert all(torch.equal(w.grad, g) for w, g in zip(Stub.state["D"].parameters(), gradients[-1]))
    for name in ("G", "D", "G_ema"):
        now = Stub.state[name].state_dict()
        assert all(v.isfinite().all() for v in now.values()) and not same(now, Stub.before[name])


@pytest.mark.parametrize("script, draws", [("wgan", (4, 6)), ("dcgan", (2, 4))])
def test_each_step_sees_fresh_images_and_fresh_latents(here, monkeypatch, script, draws):
    draw(here / "images", 40)
    seen, latents, batches, forward = [], [], data.batches, gan.Generator.forward

    def spy(*args, **kwargs):
        for x in batches(*args, **kwargs):
            seen.extend([x] if len(x) == 5 else [])                   # not the grid_image of real images
            yield x

    monkeypatch.setattr(data, "batches", spy)
    monkeypatch.setattr(gan.Generator, "forward", lambda self, z: (
        latents.extend([z] if len(z) > 1 else []), forward(self, z))[1])      # one is drawn to print the layers
    monkeypatch.setattr(runs, "Run", Stub)
    train("--steps", "2", script=script)
    assert (len(seen), len(latents)) == draws and 2 * Stub.images_per_step == 5 * len(seen)
    assert all(not torch.equal(a, b) for k, a in enumerate(seen) for b in seen[:k])
    assert all(not torch.equal(a, b) for k, a in enumerate(latents) for b in latents[:k])


def replay_wgan(args, G, D, images):
    """Algorithm 1 of both papers once more, written out with torch alone but for the networks and the augmentation."""
    G_ema = copy.deepcopy(G).eval()
    if args.constraint == "clip":
        opt_G, opt_D = (torch.optim.RMSprop(net.parameters(), 1e-3) for net in (G, D))
    else:
        opt_G, opt_D = (torch.optim.Adam(net.parameters(), 1e-3, (0.0, 0.9)) for net in (G, D))
    for step in range(1, args.steps + 1):
        for _ in range(args.n_critic):
            real, fake = next(images), G(torch.randn(5, 5)).detach()
            real, fake = (gan.diff_augment(x, args.augment) for x in (real, fake))
            apart = args.norm == "batch" or args.minibatch_discrimination
            f_real, f_fake = (D(real), D(fake)) if apart else D(torch.cat([real, fake])).view(2, 5)
            loss = -(f_real.sum() - f_fake.sum()) / 5                 # in one pass too: Adam makes much of rounding
            if args.constraint != "clip":
                eps = torch.rand(5, 1, 1, 1)
                x_hat = torch.lerp(fake, real, eps).requires_grad_()
                grad, = torch.autograd.grad(D(x_hat), x_hat, torch.ones(5), create_graph=True)
                excess = grad.square().sum((1, 2, 3)).sqrt() - 1
                excess = excess.clamp(min=0) if args.constraint == "lp" else excess
                loss = loss + args.lam * (excess ** 2).mean()
            opt_D.zero_grad()
            loss.backward()
            opt_D.step()
            if args.constraint == "clip":
                for w in D.parameters():
                    w.data = w.data.clamp(-args.clip, args.clip)
        opt_G.zero_grad()
        (-D(gan.diff_augment(G(torch.randn(5, 5)), args.augment)).mean()).backward()
        opt_G.step()
        gan.update_ema(G_ema, G, args.ema, step)
    return G_ema


def replay_dcgan(args, G, D, images):
    """Algorithm 1 of Goodfellow et al. 2014 with the losses as the papers write them."""
    G_ema = copy.deepcopy(G).eval()
    betas = {"bce": (0.5, 0.999), "hinge": (0.0, 0.9), "relativistic": (0.0, 0.99)}[args.loss]
    opt_G, opt_D = (torch.optim.Adam(net.parameters(), 1e-3, betas) for net in (G, D))
    for step in range(1, args.steps + 1):
        real, fake = next(images), G(torch.randn(5, 5)).detach()
        real_T, fake_T = (gan.diff_augment(x, args.augment).requires_grad_() for x in (real, fake))
        f_real, f_fake = D(real_T), D(fake_T)
        if args.loss == "bce":
            t = 1 - args.smooth
            loss = -(t * torch.log(f_real.sigmoid()) + (1 - t) * torch.log(1 - f_real.sigmoid())).mean() \
                - torch.log(1 - f_fake.sigmoid()).mean()
        elif args.loss == "hinge":
            loss = (1 - f_real).clamp(min=0).mean() + (1 + f_fake).clamp(min=0).mean()
        else:
            loss = torch.log(1 + torch.exp(f_fake - f_real)).mean()
        for gamma, f, x in ((args.r1, f_real, real_T), (args.r2, f_fake, fake_T)):
            if gamma:
                grad, = torch.autograd.grad(f.sum(), x, create_graph=True)
                loss = loss + gamma / 2 * (grad ** 2).sum() / 5
        opt_D.zero_grad()
        loss.backward()
        opt_D.step()
        f_fake = D(gan.diff_augment(G(torch.randn(5, 5)), args.augment))
        if args.loss == "relativistic":
            loss = torch.log(1 + torch.exp(D(gan.diff_augment(real, args.augment)) - f_fake)).mean()
        else:
            loss = -torch.log(f_fake.sigmoid()).mean() if args.loss == "bce" else -f_fake.mean()
        opt_G.zero_grad()
        loss.backward()
        opt_G.step()
        gan.update_ema(G_ema, G, args.ema, step)
    return G_ema


@pytest.mark.parametrize("script, flags", [
    ("wgan", "--constraint gp --norm instance --lam 3"), ("wgan", "--constraint lp --norm none --lam 7"),
    ("wgan", "--constraint clip --clip 0.02"), ("dcgan", "--loss bce --smooth 0.2"),
    ("wgan", "--constraint clip --clip 0.3 --norm instance --minibatch-discrimination"),
    ("dcgan", "--loss bce --minibatch-discrimination"),
    ("dcgan", "--loss hinge --norm layer"), ("dcgan", "--loss relativistic --r1 0.7 --r2 2.5")])
def test_the_loops_against_a_plain_one(here, monkeypatch, script, flags):
    """Same seed, same images, another spelling of everything between: the weights of G, D and G_ema must agree."""
    draw(here / "images", 30)
    flags = f"{flags} --steps 3 --lr 1e-3 --size 18x20 --upsample nearest --fit squash --ema 0.3 --holdout 0.3".split()
    monkeypatch.setattr(runs, "Run", Stub)
    torch.manual_seed(11)
    train(*flags, script=script)
    found = Stub.state
    torch.manual_seed(11)
    module, tiny = SCRIPTS[script]
    args = module.parse_arguments([*tiny, *flags])
    G = gan.Generator((18, 20), 3, 5, 4, upsample="nearest")
    D = gan.Discriminator((18, 20), 3, 4, norm=args.norm, minibatch=args.minibatch_discrimination)
    images = data.load("images", (18, 20), "squash", holdout=0.3, part="train")
    assert len(list(found["D"].parameters())) == len(list(D.parameters()))
    assert 10 < len(images.images) < 30
    images = data.batches(images.images, 5, seed=3, flip=True)
    G_ema = (replay_wgan if script == "wgan" else replay_dcgan)(args, G, D, images)
    for name, net in (("G", G), ("D", D), ("G_ema", G_ema)):
        for (key, w), expected in zip(found[name].named_parameters(), net.parameters()):
            assert torch.allclose(w, expected, rtol=1e-3, atol=1e-4), (name, key)
            moved = (w - Stub.before[name][key]).abs().max()
            assert moved > 5e-4 or w.ndim == 1                        # by more than the tolerance; a bias may rest


# ---- pix2pix

def count(net):
    return sum(w.numel() for w in net.parameters())


def test_parameters_and_layers_of_the_published_pix2pix():
    with torch.device("meta"):                                        # 54 million numbers need not be drawn
        assert [count(gan.UNet(side, norm="batch")) for side in (64, 128, 256, 512)] == [
            29_244_611, 41_829_571, 54_414_531, 54_414_531]           # Isola et al.'s code: 54.414 M at 256 px
        assert [count(gan.PatchGAN(n_layers=n, norm="batch")) for n in (1, 2, 3)] == [139_585, 666_433, 2_768_705]
        U, small = gan.UNet(256), gan.UNet((64, 128))

    def layers(net, kind):
        return [module for module in net.modules() if isinstance(module, kind)]

    downs, ups = layers(U, nn.Conv2d), layers(U, nn.ConvTranspose2d)
    assert [c.out_channels for c in downs] == [64, 128, 256, 512, 512, 512, 512, 512]
    assert [(c.in_channels, c.out_channels) for c in ups] == [(512, 512), *[(1024, 512)] * 3, (1024, 256), (512, 128),
                                                              (256, 64), (128, 3)]
    assert {(c.kernel_size, c.stride, c.padding) for c in downs + ups} == {((4, 4), (2, 2), (1, 1))}
    kinds = [[type(layer).__name__ for layer in level] for level in [*U.downs, *U.ups]]
    down, up = ["LeakyReLU", "Conv2d", "InstanceNorm2d"], ["ReLU", "ConvTranspose2d", "InstanceNorm2d"]
    assert kinds == [["Conv2d"], *[down] * 6, down[:2], up, *[[*up, "Dropout"]] * 3, *[up] * 3, up[:2]]
    assert [c.bias is None for c in downs] == [False, *[True] * 6, False]
    assert [c.bias is None for c in ups] == [*[True] * 7, False]
    assert len(small.downs) == 6 and len(layers(small, nn.Dropout)) == 1
    D = gan.PatchGAN()
    assert [(c.out_channels, c.stride[0], c.bias is None) for c in layers(D, nn.Conv2d)] == [
        (64, 2, False), (128, 2, True), (256, 2, True), (512, 1, True), (1, 1, False)]
    assert [type(layer).__name__ for layer in D.levels] == ["Conv2d", "LeakyReLU", *(
        ["Conv2d", "InstanceNorm2d", "LeakyReLU"] * 3), "Conv2d"]
    assert {layer.negative_slope for net in (U, D) for layer in layers(net, nn.LeakyReLU)} == {0.2}


@pytest.mark.parametrize("norm", ["instance", "layer", "none"])
def test_unet_against_the_recursive_one(norm):
    """The U as the authors' code has it: a block holds the next inner one, and gives its input beside its output."""
    U = gan.UNet(16, 2, 3, 4, max_features=8, norm=norm).eval()
    for w in U.parameters():
        nn.init.normal_(w, 0.1, 0.3)

    def normal(x, layer):
        if layer is None:
            return x
        dims = (1, 2, 3) if norm == "layer" else (2, 3)
        x = (x - x.mean(dims, keepdim=True)) / (x.var(dims, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * layer.weight.view(1, -1, 1, 1) + layer.bias.view(1, -1, 1, 1)

    def block(x, k):
        """(4, 2, 1) down, what lies deeper, (4, 2, 1) up: of level k, the image's being 0."""
        down, up = U.downs[k], U.ups[3 - k]
        conv = down[0] if k == 0 else down[1]
        inner = nn.functional.conv2d(x if k == 0 else torch.where(x > 0, x, 0.2 * x), conv.weight, conv.bias, 2, 1)
        if k in (1, 2):
            inner = normal(inner, down[2] if norm != "none" else None)
        if k < 3:
            inner = block(inner, k + 1)
        out = nn.functional.conv_transpose2d(inner.clamp(min=0), up[1].weight, up[1].bias, 2, 1)
        if k == 0:
            return torch.tanh(out)
        return torch.cat([normal(out, up[2] if norm != "none" else None), x], 1)

    x = torch.randn(3, 2, 16, 32)
    assert torch.allclose(U(x), block(x, 0), atol=1e-5)
    assert torch.allclose(U(x)[1:2], U(x[1:2]), atol=1e-5)            # each image by itself


def test_unet_takes_any_size_padding_by_reflection():
    U = gan.UNet((20, 24), 1, 2, 4).eval()                            # four halvings
    for h, w in ((16, 32), (20, 24), (33, 17), (5, 7), (1, 3), (2, 50)):
        x = torch.randn(2, 1, h, w)
        rows = np.pad(np.arange(h), (0, -h % 16), "reflect" if h > 1 else "edge")
        cols = np.pad(np.arange(w), (0, -w % 16), "reflect" if w > 1 else "edge")
        assert torch.equal(U(x), U(x[:, :, rows][..., cols])[..., :h, :w]) and U(x).shape == (2, 2, h, w)
    assert 0 < U(torch.randn(1, 1, 16, 16) * 100).abs().max() <= 1
    noisy = gan.UNet(64, 1, 1, 4)
    x = torch.randn(1, 1, 64, 64)
    assert not torch.equal(noisy(x), noisy(x))                        # dropout is the noise ...
    assert torch.equal(noisy.eval()(x), noisy(x))                     # ... and rests when the network is used


@pytest.mark.parametrize("n_layers, field, maps", [(1, 16, (30, 62, 126)), (2, 34, (14, 30, 62)), (3, 70, (6, 14, 30))])
def test_receptive_field_of_patchgan(n_layers, field, maps):
    D = gan.PatchGAN(2, 4, n_layers=n_layers, norm="none")
    for w in D.parameters():
        nn.init.uniform_(w, 0.1, 1)                                   # no cancellation
    assert tuple(D(torch.zeros(1, 2, side, side)).shape[-1] for side in (64, 128, 256)) == maps
    x = torch.zeros(1, 2, 160, 160, requires_grad=True)
    scores = D(x)
    grad, = torch.autograd.grad(scores[0, scores.shape[1] // 2, scores.shape[2] // 2], x)
    rows, cols = (grad[0, 0].abs().amax(dim).nonzero().flatten() for dim in (1, 0))
    assert len(rows) == len(cols) == field == rows[-1] - rows[0] + 1 == cols[-1] - cols[0] + 1


@pytest.mark.parametrize("norm", ["instance", "layer", "batch", "spectral", "none"])
def test_pix2pix_networks_of_every_size_and_the_deepest_train(norm):
    for size in ((8, 8), (9, 15), (12, 40), (64, 64)):
        most = (min(size) // 3).bit_length() - 1                      # what the script allows, and no more
        x = torch.randn(1, 3, *size)
        for n_layers in {1, most}:
            D = gan.PatchGAN(3, 4, n_layers=n_layers, norm=norm)
            assert min(D(x).shape[1:]) >= 1
        with pytest.raises((RuntimeError, ValueError)):
            D = gan.PatchGAN(3, 4, n_layers=most + 1, norm="instance")
            if 0 in D(x).shape:
                raise RuntimeError
        U = gan.UNet(size, 3, 1, 4, norm="none" if norm == "spectral" else norm)
        U(x).sum().backward()
        assert all(w.grad.isfinite().all() for w in U.parameters())


def test_l1_and_psnr_against_loops():
    y, fake, m = torch.randn(4, 3, 6, 8), torch.randn(4, 3, 6, 8), inpainting.masks("box", 4, (6, 8), seed=2)
    total = number = 0
    for n in range(4):
        inside = [(y[n, c, i, j] - fake[n, c, i, j]).item() for c in range(3) for i in range(6) for j in range(8)
                  if m[n, 0, i, j] == 0]
        total, number = total + sum(map(abs, inside)), number + len(inside)
        expected = 10 * math.log10(4 / (sum(d * d for d in inside) / len(inside)))
        assert metrics.psnr(y, fake, 2, m)[n].item() == pytest.approx(expected, abs=1e-4)
    assert gan.l1_loss(y, fake, m).item() == pytest.approx(total / number, rel=1e-5)
    assert gan.l1_loss(y, fake).item() == pytest.approx((y - fake).abs().mean().item(), rel=1e-6)
    center = inpainting.masks("center", 4, (8, 8))                          # a quarter: 4 times the L1, 6.02 dB less
    y, fake = torch.randn(2, 4, 3, 8, 8)
    fake = inpainting.composite(y, fake, center)
    assert gan.l1_loss(y, fake, center).item() == pytest.approx(4 * gan.l1_loss(y, fake).item(), rel=1e-5)
    more = metrics.psnr(y, fake, 2) - metrics.psnr(y, fake, 2, center)
    assert torch.allclose(more, torch.full_like(more, 10 * math.log10(4)), atol=1e-4)
    assert metrics.psnr(y, y, 2).tolist() == pytest.approx([10 * math.log10(4e10)] * 4, abs=1e-3)


def test_load_generator_knows_the_unet(here):
    U, G = gan.UNet((12, 9), 4, 3, 4, depth=2, norm="layer"), gan.Generator(8, 1, 5, 4)
    for net, x in ((U, torch.randn(2, 4, 12, 9)), (G, torch.randn(2, 5))):
        gan.save_generator("g.pt", net)
        back = gan.load_generator("g.pt")
        assert type(back) is type(net) and torch.equal(back(x), net.eval()(x))
    gan.save_generator("g.pt", U, network="Transformer")
    with pytest.raises(OSError, match="no file that a training script wrote"):
        gan.load_generator("g.pt")
    gan.save_generator("g.pt", G)
    saved = torch.load("g.pt", weights_only=True)
    del saved["network"]                                              # as older files are
    torch.save(saved, "g.pt")
    assert type(gan.load_generator("g.pt")) is gan.Generator
