"""The tests: pytest test_gan.py. No GPU, no network, no pictures but those that a test draws; about a minute.

Equations are held against another spelling of the same equation (loops, closed forms, finite differences), with real
and fake different, so that a swapped sign or argument fails.
"""

import ast
import copy
import gzip
import io
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import data
import gan
import runtime
import train_wgan

HERE = Path(__file__).parent
README = (HERE / "README.md").read_text()
SIZES = [(8, 8), (9, 15), (16, 16), (28, 28), (31, 31), (33, 65), (64, 64), (96, 160), (100, 37), (128, 128),
         (287, 508), (240, 8), (511, 13), (512, 512), (1024, 9)]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def draw(folder, n=8, size=(20, 24), mode="RGB", suffix=".png"):
    """n pictures of noise, all different, in a new folder."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.RandomState(len(str(folder)))
    for k in range(n):
        pixels = random.randint(0, 256, (*size, 3)).astype(np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / f"{k:03d}{suffix}")
    return folder


# A run so small that a test can afford it. Odd batch and size on purpose.
TINY = ("--data pictures --size 9x12 --features 4 --latent 5 --batch 5 --n-critic 2 --log-every 2 --sample-every 3 "
        "--save-every 4 --holdout 0 --flip --augment color,translation,cutout --seed 3").split()


def train(*flags):
    train_wgan.main([*TINY, *flags])


def checkpoint(folder):
    return torch.load(Path(folder) / "checkpoint.pt", weights_only=True)


def same(a, b):
    """Whether two nests of dicts, lists, tensors and plain values are equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def mistake(capsys, call):
    """The sentence with which a user's mistake ends: exit status 2, one line, no traceback."""
    with pytest.raises(SystemExit) as stopped:
        call()
    text = capsys.readouterr().err
    assert stopped.value.code == 2 and text.count("\n") == 1 and ": error: " in text, text
    return text


# ---------------------------------------------------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------------------------------------------------

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
def test_critics_score_each_picture_by_itself(norm):
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
    lambda: gan.Generator(64, features=0), lambda: gan.Discriminator(3), lambda: gan.Discriminator(64, norm="group")])
def test_what_cannot_be_built_says_why(make):
    with pytest.raises(ValueError, match="nearest size that works is|is 'transposed' or|at least 1|norm is none"):
        make()


# ---------------------------------------------------------------------------------------------------------------------
# Losses and constraints
# ---------------------------------------------------------------------------------------------------------------------

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


class Linear(nn.Module):
    """D(x) = w . x + b, whose slope is w everywhere."""

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
        assert D(x).dtype == torch.bfloat16 or D(x).dtype == torch.float32
        penalty = gan.gradient_penalty(D, x, -x)
    assert penalty.dtype == torch.float32
    assert penalty.item() == pytest.approx((math.sqrt(7) / 2 - 1) ** 2, abs=1e-6)


def test_penalty_is_per_sample_and_over_all_pixels():
    """D(x) = a/2 ||x||^2 has the slope a ||x^||; with real = fake, x^ = x whatever eps."""
    a, x = 0.7, torch.randn(4, 3, 5, 6)
    scale = nn.Parameter(torch.tensor(a))
    penalty = gan.gradient_penalty(lambda x: scale / 2 * x.square().flatten(1).sum(1), x, x.clone())
    loop = [(a * math.sqrt(sum(v * v for v in picture.flatten().tolist())) - 1) ** 2 for picture in x]
    assert penalty.item() == pytest.approx(sum(loop) / 4, rel=1e-5)


def test_penalty_is_taken_between_real_and_fake():
    real, fake, seen = torch.full((500, 1, 2, 2), 1.0), torch.full((500, 1, 2, 2), -3.0), []
    w = nn.Parameter(torch.ones(4))
    gan.gradient_penalty(lambda x: (seen.append(x.detach()), (x.flatten(1) * w).sum(1))[1], real, fake)
    eps = (seen[0] + 3) / 4                                           # x^ = eps * 1 + (1 - eps) * -3
    assert torch.allclose(eps, eps[:, :1, :1, :1].expand_as(eps), atol=1e-6)          # one eps a picture
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


# ---------------------------------------------------------------------------------------------------------------------
# Augmentation and averaging
# ---------------------------------------------------------------------------------------------------------------------

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
    for picture in (out[:, 0] == 0):
        rows, cols = picture.any(1).nonzero().flatten(), picture.any(0).nonzero().flatten()
        assert picture[rows[0]:rows[-1] + 1, cols[0]:cols[-1] + 1].all() and picture.sum() == len(rows) * len(cols)
        assert len(rows) <= int(side / 2 + 0.5) and len(cols) <= 6
        centres.add(int(rows[0]) if len(rows) < int(side / 2 + 0.5) and rows[0] > 0 else -1)
    assert len(centres) > 2                                           # it hangs over the edge in some
    assert (out == 0).float().mean() == pytest.approx(0.25 * 0.78, abs=0.04)


def test_colour_stays_in_the_published_ranges():
    x = torch.rand(4000, 3, 2, 2) * 0.2
    x[:, 0] += 1
    out = gan.random_colour(x)
    shift = (out - x).mean((1, 2, 3))                                 # brightness alone moves the mean
    assert shift.min() > -0.5 and shift.max() < 0.5 and shift.std() == pytest.approx(12 ** -0.5, abs=0.02)
    grey = torch.rand(4000, 1, 2, 2)
    contrast = gan.random_colour(grey).std((1, 2, 3)) / grey.std((1, 2, 3))            # saturation does nothing to grey
    assert contrast.min() > 0.499 and contrast.max() < 1.501 and contrast.mean() == pytest.approx(1, abs=0.03)
    spread = (out.mean((2, 3)).std(1) / x.mean((2, 3)).std(1)) / (out.mean(1).flatten(1).std(1) /
                                                                  x.mean(1).flatten(1).std(1))
    assert spread.min() >= 0 and spread.max() < 2.001 and spread.mean() == pytest.approx(1, abs=0.05)


def test_augmentation_is_differentiable_and_optional():
    x = torch.randn(4, 3, 16, 16, requires_grad=True)
    assert gan.diff_augment(x, "") is x
    gan.diff_augment(x, "color,translation,cutout").square().sum().backward()
    assert x.grad.isfinite().all() and (x.grad != 0).any((1, 2, 3)).all()
    with pytest.raises(ValueError, match="not 'colour'"):
        gan.diff_augment(x, "colour")


def test_average_with_its_ramp_against_a_loop():
    G = nn.BatchNorm1d(1)
    G_ema, expected = copy.deepcopy(G), 1.0
    for step in range(1, 2001):
        value = math.sin(step)
        nn.init.constant_(G.weight, value)
        G.running_mean.fill_(value)
        gan.update_ema(G_ema, G, 0.99, step)
        b = min(0.99, (1 + step) / (10 + step))
        expected = b * expected + (1 - b) * value
        assert G_ema.weight.item() == pytest.approx(expected, abs=1e-5)
        assert G_ema.running_mean.item() == G.running_mean.item()     # copied, not averaged
        if step == 1:
            assert b == 2 / 11
    assert b == 0.99


def test_load_generator_gives_back_the_same_pictures(here):
    G = gan.Generator((9, 12), 1, 5, 4)
    G(torch.randn(20, 5))                                             # moves the running statistics
    torch.save(gan.saved_generator(G), "G.pt")
    torch.save({"config": G.config, "state": {"G_ema": G.state_dict()}}, "checkpoint.pt")
    z = torch.randn(3, 5)
    for path in ("G.pt", "checkpoint.pt", "."):
        loaded = gan.load_generator(path)
        assert not loaded.training and torch.equal(loaded(z), G.eval()(z))
    Path("text.pt").write_text("not a network")
    torch.save({"config": {**G.config, "features": 8}, "G_ema": G.state_dict()}, "other.pt")
    for path in ("text.pt", "other.pt"):
        with pytest.raises(ValueError, match="no file that a training script wrote, or it is damaged"):
            gan.load_generator(path)
    with pytest.raises(FileNotFoundError):
        gan.load_generator("nothing.pt")


def test_gan_py_runs_when_pasted():
    cell = {}
    exec((HERE / "gan.py").read_text(), cell)
    assert cell["Discriminator"](16)(cell["Generator"](16)(torch.randn(2, 128))).shape == (2,)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------

def test_sizes_and_crops_as_they_are_written():
    assert data.parse_size("64") == (64, 64) and data.parse_size("288x512") == (288, 512)
    assert data.parse_crop("0.1,0,0.9,0.5")(100, 60) == pytest.approx((10, 0, 90, 30))
    assert data.parse_crop("20x10@bottom")(100, 60) == (45, 40, 55, 60)
    assert data.parse_crop("20x10@top-right")(100, 60) == (90, 0, 100, 20)
    assert data.parse_crop("20x10")(100, 60) == (45, 20, 55, 40)
    for parse, word in ((data.parse_size, "big"), (data.parse_size, "64x"), (data.parse_size, "-3"),
                        (data.parse_crop, "0.9,0,0.1,1"), (data.parse_crop, "1,2"), (data.parse_crop, "9x9@middle")):
        with pytest.raises(ValueError, match="write"):
            parse(word)
    with pytest.raises(ValueError, match="smaller than the crop window"):
        data.parse_crop("61x10")(100, 60)


def test_fits():
    """Left half black, right half white, 40 wide and 20 high."""
    im = Image.fromarray(np.repeat(np.repeat([[0, 255]], 20, 0), 20, 1).astype(np.uint8))
    crop = np.asarray(data.fit_picture(im, (10, 10), "crop"))
    squash = np.asarray(data.fit_picture(im, (10, 10), "squash"))
    pad = np.asarray(data.fit_picture(im, (20, 20), "pad"))
    assert crop.shape == squash.shape == (10, 10) and (crop[:, :4] < 9).all() and (crop[:, 6:] > 246).all()
    assert (squash[:, :4] < 9).all() and (squash[:, 6:] > 246).all()
    assert (pad[:5] == 0).all() and (pad[15:] == 0).all() and (pad[6:14, 12:] > 250).all() and (pad[6:14, :8] < 5).all()
    right = data.fit_picture(im, (8, 8), "squash", data.parse_crop("0.5,0,1,1"))
    assert (np.asarray(right)[:, 1:] == 255).all()


def test_resize_is_antialiased():
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (64, 32)))
    small = np.asarray(data.fit_picture(stripes, (16, 16))).astype(float)
    assert abs(small - 127.5).max() < 16                              # picking pixels would give 0 or 255


def encoded(im, kind="PNG", **options):
    file = io.BytesIO()
    im.save(file, kind, **options)
    file.seek(0)
    return file


def test_what_pillow_clips_or_turns_is_read_right():
    ramp = np.arange(256, dtype=np.uint16)[None] * 100 + 1000
    assert np.array_equal(np.asarray(data.read_picture(encoded(Image.fromarray(ramp))))[0], np.arange(256))
    floats = Image.fromarray(ramp.astype(np.float32) / 7)
    assert np.array_equal(np.asarray(data.read_picture(encoded(floats, "TIFF")))[0], np.arange(256))
    clear = Image.new("RGBA", (2, 1), (10, 20, 30, 0))
    clear.putpixel((1, 0), (10, 20, 30, 255))
    assert np.asarray(data.read_picture(encoded(clear))).tolist() == [[[255] * 3, [10, 20, 30]]]
    turned = Image.new("L", (6, 4), 9)
    exif = Image.Exif()
    exif[0x0112] = 6
    assert data.read_picture(encoded(turned, "JPEG", exif=exif)).size == (4, 6)
    for mode, expected in (("1", "L"), ("L", "L"), ("P", "RGB"), ("CMYK", "RGB"), ("LA", "RGB"), ("RGB", "RGB")):
        kind = "TIFF" if mode == "CMYK" else "PNG"
        assert data.read_picture(encoded(Image.new(mode, (3, 3)), kind)).mode == expected


def test_folder_is_read_whole_and_bad_files_are_named(here):
    draw(here / "d" / "class_a", 3, suffix=".JPG")
    draw(here / "d" / "b", 2, mode="L", suffix=".tiff")
    draw(here / "d" / ".hidden", 1)
    (here / "d" / "notes.txt").write_text("not a picture")
    (here / "d" / "text.jpg").write_text("not a picture either")
    (here / "d" / "empty.png").write_bytes(b"")
    whole = (here / "d" / "class_a" / "000.JPG").read_bytes()
    (here / "d" / "cut.jpeg").write_bytes(whole[:len(whole) // 2])
    (here / "d" / "loop").symlink_to(here / "d", target_is_directory=True)
    pictures = data.load("d", (16, 16))
    assert pictures.names == ["b/000.tiff", "b/001.tiff", "class_a/000.JPG", "class_a/001.JPG", "class_a/002.JPG"]
    assert pictures.images.shape == (5, 3, 16, 16) and pictures.images.dtype == np.uint8
    assert (pictures.images[0][0] == pictures.images[0][1]).all()     # the grey ones, in three equal channels
    assert {name: why.split()[0] for name, why in pictures.left_out} == {
        "cut.jpeg": "Truncated", "empty.png": "the", "text.jpg": "not"}
    assert "3 left out" in data.describe("d", pictures)[0] and "cut.jpeg" in data.describe("d", pictures)[1]
    assert data.load("d", (16, 16), channels="1").images.shape == (5, 1, 16, 16)
    assert data.load("d", (16, 16), limit=3).names == pictures.names[:3]
    assert data.load("d/b", (16, 16)).images.shape == (2, 1, 16, 16)


def test_grey_content_in_rgb_files_is_grey(here):
    draw(here / "d", 4, mode="L")
    for file in (here / "d").iterdir():
        Image.open(file).convert("RGB").save(file.with_suffix(".jpg"), quality=80)
        file.unlink()
    assert data.load("d", (16, 16)).images.shape == (4, 1, 16, 16)
    Image.new("RGB", (20, 20), "red").save(here / "d" / "red.png")
    pictures = data.load("d", (16, 16))
    assert pictures.images.shape == (5, 3, 16, 16)
    assert data.load("d", (16, 16), channels=1).images.shape == (5, 1, 16, 16)


def test_holdout_goes_by_content_and_is_stable(here):
    draw(here / "d", 60)
    for k in range(10):
        (here / "d" / f"copy{k}.png").write_bytes((here / "d" / f"{k:03d}.png").read_bytes())
    train, held = (data.load("d", (8, 8), holdout=0.3, part=part) for part in ("train", "heldout"))
    assert len(train.names) + len(held.names) == 70 and not set(train.names) & set(held.names)
    assert 10 <= len(held.names) <= 32 and train.held_out == len(held.names)
    for k in range(10):
        assert (f"copy{k}.png" in held.names) == (f"{k:03d}.png" in held.names)
    draw(here / "d" / "more", 30)
    assert set(held.names) <= set(data.load("d", (8, 8), holdout=0.3, part="heldout").names)


def write_idx(path, array, cut=None):
    raw = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(raw[:cut]) if path.suffix == ".gz" else raw[:cut])


def test_idx_files(here):
    digits = np.random.RandomState(0).randint(0, 256, (6, 28, 28)).astype(np.uint8)
    write_idx(here / "t-images-idx3-ubyte", digits)
    write_idx(here / "t-images-idx3-ubyte.gz", digits)
    for source in ("t-images-idx3-ubyte", "t-images-idx3-ubyte.gz"):
        assert np.array_equal(data.load(source, (28, 28)).images[:, 0], digits)
    assert data.load(".", (8, 8)).images.shape == (12, 1, 8, 8)       # a folder of idx files: all of them
    write_idx(here / "labels", digits[:, 0, 0])
    write_idx(here / "cut", digits, -5)
    (here / "words.txt").write_text("hello")
    (here / "bad.gz").write_bytes(gzip.compress(b"x" * 99)[:-9])
    for name, why in (("labels", "6 labels"), ("cut", "cut short"), ("words.txt", "no idx"), ("bad.gz", "damaged")):
        with pytest.raises(ValueError, match=why):
            data.load(name, (8, 8))


def test_demo_is_the_same_everywhere_and_varies():
    first = data.draw_demo(12)
    assert first.shape == (12, 64, 64) and np.array_equal(first, data.draw_demo(12))
    # Origin of the numbers: this function, numpy 2.4.6 on x86-64. A pixel may round otherwise elsewhere, no more.
    assert first.mean() == pytest.approx(94.2255, abs=0.01)
    assert first[3, 20, ::8].tolist() == pytest.approx([64, 124, 167, 135, 83, 92, 97, 161], abs=1)
    assert np.std(first.astype(float), axis=0).mean() > 15 and not np.array_equal(data.draw_demo(12, seed=1), first)


def test_every_picture_once_an_epoch_in_an_order_of_seed_and_epoch():
    images = np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1).repeat(8, 2).repeat(8, 3)
    stream = data.batches(images, 4, seed=1)
    drawn = [data.to_uint8(next(stream))[:, 0, 0, 0].tolist() for _ in range(10)]
    flat = sum(drawn, [])
    epochs = [flat[10 * k:10 * k + 10] for k in range(4)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and len({tuple(epoch) for epoch in epochs}) == 4
    later = data.batches(images, 4, seed=1, start=7)                  # goes on exactly there
    assert data.to_uint8(next(later))[:, 0, 0, 0].tolist() == drawn[7]
    assert data.to_uint8(next(data.batches(images, 4, seed=2)))[:, 0, 0, 0].tolist() != drawn[0]
    assert next(data.batches(images, 25)).shape == (25, 1, 8, 8)      # a batch larger than the set


def test_flip_mirrors_about_half_and_nothing_else():
    images = np.random.RandomState(0).randint(0, 256, (200, 1, 8, 8)).astype(np.uint8)
    plain, flipped = (next(data.batches(images, 200, flip=flip)) for flip in (False, True))
    mirrored = [torch.equal(a.flip(2), b) for a, b in zip(plain, flipped)]
    assert all(m or torch.equal(a, b) for m, a, b in zip(mirrored, plain, flipped)) and 70 < sum(mirrored) < 130


def test_range_conventions():
    every = torch.arange(256, dtype=torch.uint8)
    x = data.to_float(every)
    assert x.min() == -1 and x.max() == 1 and torch.equal(data.to_uint8(x), every)
    assert data.to_uint8(torch.tensor([-7.0, 0.0, 9.0])).tolist() == [0, 128, 255]


def test_grid_has_a_fixed_range():
    x = torch.zeros(5, 1, 4, 6)
    x[1] = 0.1
    sheet = np.asarray(data.grid(x, columns=3, pad=2))
    assert sheet.shape == (2 * 6 + 2, 3 * 8 + 2)
    assert (sheet[2:6, 2:8] == 128).all() and (sheet[2:6, 10:16] == 140).all()         # 0.1 is 140, not white
    assert np.asarray(data.grid(torch.ones(2, 3, 4, 4))).shape == (8, 14, 3)


def test_gif_has_a_frame_a_sheet_and_its_step(here):
    for k in range(4):
        data.save_grid(here / f"{k}.png", torch.full((4, 1, 8, 8), k / 4))
    sheets = sorted(here.glob("*.png"))
    data.save_gif("p.gif", sheets, [f"step {k}" for k in range(4)])
    with Image.open("p.gif") as gif, Image.open(sheets[0]) as sheet:
        assert gif.n_frames == 4 and gif.size == (sheet.width, sheet.height + 24)
        labels = []
        for k in range(4):
            gif.seek(k)
            labels.append(np.asarray(gif.convert("L"))[sheet.height:].tobytes())
    assert len(set(labels)) == 4                                      # the written steps differ


def test_curves_are_drawn(here):
    xs = list(range(50))
    series = {"loss_D": (xs, [math.sin(x / 5) for x in xs]), "loss_G": (xs, [math.nan] + [2.0] * 49)}
    data.save_curves("c.png", [("losses", series), ("one", {"a": ([1], [3.0])}), ("none", {"a": ([], [])})])
    chart = np.asarray(Image.open("c.png"))
    assert chart.shape == (900, 900, 3)
    assert (chart == (31, 119, 180)).all(2).sum() > 500 and (chart == (214, 69, 65)).all(2).sum() > 500
    assert data.ticks(0.3, 9.7) == [2, 4, 6, 8] and data.ticks(-1, 1) == pytest.approx([-1, -0.5, 0, 0.5, 1])


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------

def test_everything_of_a_run_folder_is_there(here, capsys):
    draw(here / "pictures")
    train("--steps", "7", "--constraint", "clip")
    out = capsys.readouterr().out
    run = here / "runs" / "wgan-pictures-1"
    assert sorted(str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()) == [
        "args.txt", "checkpoint.pt", "generators/step-0000004.pt", "generators/step-0000007.pt", "log.jsonl",
        "losses.png", "progress.gif", "real.png", "samples/step-0000003.png",
        "samples/step-0000006.png", "samples/step-0000007.png"]
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6, 7]
    assert set(rows[0]) == {"step", "loss_D", "loss_G", "wasserstein", "penalty", "images_per_sec", "time"}
    for key in rows[0]:
        assert f"`{key}`" in README                                   # every logged number is explained
    assert out.count("images/s") == 5 and "--resume" in out
    assert all(w.abs().max() <= 0.01 for name, w in checkpoint(run)["state"]["D"].items() if "running" not in name
               and "num_batches" not in name)                        # clipped after the update
    G = gan.load_generator(run)
    shown = torch.randn(64, 5, generator=torch.Generator().manual_seed(3))
    expected = data.grid(G(shown))
    last = Image.open(run / "samples" / "step-0000007.png")
    assert np.array_equal(np.asarray(expected.resize(last.size, Image.Resampling.NEAREST)), np.asarray(last))


@pytest.mark.parametrize("constraint", ["gp", "clip"])
def test_six_and_six_steps_are_twelve(here, constraint):
    draw(here / "pictures")
    train("--steps", "12", "--out", "a", "--constraint", constraint)
    train("--steps", "6", "--out", "b", "--constraint", constraint)
    train_wgan.main(["--resume", "b", "--steps", "12"])
    a, b = checkpoint("a"), checkpoint("b")
    assert a["step"] == b["step"] == 12
    assert all(same(a[key], b[key]) for key in ("state", "random", "same", "config"))
    steps = [json.loads(line)["step"] for line in Path("b/log.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 6, 8, 10, 12]
    train_wgan.main(["@a/args.txt", "--out", "c"])                    # and the same run once more
    assert same(checkpoint("c")["state"], a["state"])
    train("--steps", "12", "--out", "d", "--constraint", constraint, "--seed", "4")
    assert not same(checkpoint("d")["state"], a["state"])


@pytest.mark.parametrize("flags", ["--constraint lp --norm layer", "--norm instance --upsample nearest --channels 1",
                                   "--norm spectral --precision bf16 --fit squash", "--precision fp32 --batch 11",
                                   "--crop 0.1,0,0.9,1 --limit 5 --fit pad"])
def test_options_on_eight_odd_pictures(here, flags):
    draw(here / "pictures", 2)
    draw(here / "pictures" / "a", 2, (5, 40), "L", ".BMP")
    draw(here / "pictures" / "b", 2, (30, 9), "RGBA")
    draw(here / "pictures" / "c", 2, (2, 2), "P", ".gif")
    train("--steps", "2", "--out", "r", *flags.split())
    assert gan.load_generator("r")(torch.randn(2, 5)).shape[2:] == (9, 12)


def script(*flags, **options):
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen([sys.executable, HERE / "train_wgan.py", *flags], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, env=environment, **options)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(here, number):
    draw(here / "pictures")
    process = script(*TINY, "--steps", "1000000", "--out", "r")
    for line in process.stdout:
        if line.startswith("step"):
            break
    process.send_signal(number)
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and "python train_wgan.py --resume r" in rest and "Traceback" not in rest
    done = checkpoint("r")["step"]
    assert done >= 2 and (here / "r" / "samples" / f"step-{done:07d}.png").exists()
    train_wgan.main(["--resume", "r", "--steps", str(done + 1)])
    assert checkpoint("r")["step"] == done + 1


def test_a_second_signal_is_obeyed_at_once(here):
    code = ("import argparse, os, signal, time, runtime\n"
            "parser = runtime.Parser('x.py', ''); runtime.add_arguments(parser)\n"
            "run = runtime.Run(parser.parse_args(['--out', 'r', '--device', 'cpu']), 'x.py', 1); run.resume({})\n"
            "for step in run.steps():\n"
            "    os.kill(os.getpid(), signal.SIGINT); print('still here', flush=True)\n"
            "    os.kill(os.getpid(), signal.SIGINT); time.sleep(30)\n")
    began = time.time()
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                             env={**os.environ, "PYTHONPATH": str(HERE)})
    assert process.returncode == -signal.SIGINT and "still here" in process.stdout and time.time() - began < 25


def make_run(*flags):
    parser = runtime.Parser("x.py", "")
    runtime.add_arguments(parser)
    run = runtime.Run(parser.parse_args(["--device", "cpu", *flags]), "x.py", 10)
    run.resume({})
    return run


def test_everything_periodic_also_falls_on_the_last_step(here):
    run = make_run("--steps", "7", "--log-every", "1000")
    due = {every: [] for every in (2, 1000)}
    for step in run.steps():
        run.log(value=torch.tensor(float(step)))
        for every, steps in due.items():
            steps += [step] if run.due(every) else []
    assert due == {2: [2, 4, 6, 7], 1000: [7]}
    row, = run.history()
    assert row["value"] == 4.0 and row["step"] == 7                   # the mean of 1..7


def test_a_signal_late_in_a_step_still_gets_a_complete_last_step(here):
    run = make_run("--steps", "100", "--log-every", "1000")
    for step in run.steps():
        saved = run.due(1000)
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)                      # after this step's due() said no
    assert step == 4 and saved
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL         # put back


def test_what_is_not_finite_ends_the_run_and_keeps_the_checkpoint(here):
    run = make_run("--steps", "9", "--log-every", "5")
    with pytest.raises(SystemExit, match="loss stopped being finite"):
        for step in run.steps():
            run.log(loss=torch.tensor(math.nan if step == 3 else 1.0), other=1.0)
            if run.due(2):
                run.save({})
    assert checkpoint(run.folder)["step"] == 2


def test_a_file_is_never_half_written(here):
    run = make_run()
    run.write("a.txt", lambda path: path.write_text("whole"))

    def fail(path):
        path.write_text("ha")
        raise OSError("disk full")

    with pytest.raises(OSError):
        run.write("a.txt", fail)
    assert (run.folder / "a.txt").read_text() == "whole"


def test_status_line_on_a_terminal_is_one_line(here, monkeypatch, capsys):
    run = make_run("--steps", "4", "--log-every", "1")
    capsys.readouterr()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    for _ in run.steps():
        run.log(value=1.0)
    shown = capsys.readouterr().out.split("done:")[0]
    assert shown.count("\r") == 4 and shown.count("\n") == 1 and "left" in shown
    assert len(run.history()) == 4


def test_default_folders_never_collide(here):
    folders = [make_run("--data", "some/Teeth").folder for _ in range(3)]
    assert [str(folder) for folder in folders] == ["runs/x-Teeth-1", "runs/x-Teeth-2", "runs/x-Teeth-3"]


def test_precision_and_device_choices(here):
    assert make_run("--precision", "fp32").precision == "fp32"
    run = make_run("--precision", "bf16")
    with run.amp:
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="--device nonsense cannot be used here"):
        make_run("--device", "nonsense")


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes of a user
# ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, words", [
    ("--data nowhere", "there is no such folder"), ("--data empty", "no pictures in this folder"),
    ("--data broken", "0 of 2 pictures can be used"), ("--data one", "1 of 1 pictures can be used and at least 2"),
    ("--data pictures/000.png", "give the folder"), ("--size 3", "the nearest size that works is 8x8"),
    ("--size 5000", "the nearest size that works is 1024x1024"), ("--size big", "write one number"),
    ("--stpes 5", "did you mean --steps?"), ("--batch 0", "whole number from 1"), ("--constraint gq", "invalid choice"),
    ("--out taken", "exists already"), ("--norm batch", "does not go with a gradient penalty"),
    ("--augment colour", "not 'colour'"), ("--crop 5", "write LEFT,TOP,RIGHT,BOTTOM"), ("--holdout 1", "a share from"),
    ("--crop 99x99", "smaller than the crop window"), ("--device cuda:77", "cannot be used here"),
    ("--resume nowhere", "there is no such run folder"), ("--resume taken", "there is no checkpoint.pt in it"),
    ("--resume garbage", "is damaged"), ("@nofile.txt", "nofile.txt"), ("--tensorboard", "pip install tensorboard")])
def test_one_sentence_and_exit_status_2(here, capsys, monkeypatch, flags, words):
    draw(here / "pictures")
    draw(here / "one", 1)
    for name in ("empty", "taken", "broken", "garbage"):
        (here / name).mkdir()
    (here / "broken" / "a.jpg").write_text("words")
    (here / "broken" / "b.png").write_bytes(b"")
    (here / "garbage" / "checkpoint.pt").write_bytes(b"\x80\x02garbage")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)                 # as if it were not installed
    before = sorted(here.rglob("*"))
    assert words in mistake(capsys, lambda: train("--steps", "1", *flags.split()))
    assert sorted(here.rglob("*")) == before                          # nothing made, nothing lost


def test_mistakes_when_going_on(here, capsys):
    draw(here / "pictures")
    train("--steps", "2", "--out", "r")
    capsys.readouterr()
    raw = (here / "r" / "checkpoint.pt").read_bytes()

    def resume(*flags):
        return mistake(capsys, lambda: train_wgan.main(["--resume", "r", *flags]))

    assert "has done 2 steps" in resume()
    assert "--size is '9x12' in r and cannot become '64'" in resume("--steps", "4", "--size", "64")
    assert "--lam is" in resume("--steps", "4", "--lam", "1") and "--out is" in resume("--steps", "4", "--out", "s")
    draw(here / "others", 9)
    assert "other pictures" in resume("--steps", "4", "--data", "others")
    saved = checkpoint("r")
    torch.save({**saved, "script": "train_dcgan.py"}, "r/checkpoint.pt")
    assert "is a run of train_dcgan.py" in resume("--steps", "4")
    torch.save({**saved, "flags": {**saved["flags"], "features": 8}}, "r/checkpoint.pt")
    assert "does not fit what its flags build" in resume("--steps", "4")
    (here / "r" / "checkpoint.pt").write_bytes(raw)
    (here / "pictures").rename(here / "moved")
    train_wgan.main(["--resume", "r", "--steps", "3", "--data", "moved"])              # the same pictures elsewhere
    assert checkpoint("r")["step"] == 3


# ---------------------------------------------------------------------------------------------------------------------
# The house
# ---------------------------------------------------------------------------------------------------------------------

class Stub:
    """All that a loop needs of `Run`: it counts steps."""
    device, step, amp, folder = torch.device("cpu"), 0, torch.autocast("cpu", torch.bfloat16, enabled=False), Path(".")

    def __init__(self, args, *_, **__):
        self.args = args

    def resume(self, state, **_):
        Stub.state, Stub.before = state, copy.deepcopy({name: thing.state_dict() for name, thing in state.items()})

    def steps(self):
        return range(1, self.args.steps + 1)

    def due(self, every):
        return False

    def log(self, **_):
        pass

    write = save = log


Stub.write = Stub.save = lambda self, *_, **__: None


def test_the_loop_owes_nothing_to_the_plumbing(here, monkeypatch):
    """With `Run` replaced by a stub the script trains; a critic step builds no graph of G; G's step leaves D."""
    draw(here / "pictures")
    monkeypatch.setattr(runtime, "Run", Stub)
    graphs, gradients, forward, loss = [], [], gan.Generator.forward, gan.generator_loss

    def spy(self, z):
        x = forward(self, z)
        graphs.append(x.requires_grad)
        return x

    def watch(f_fake):
        D = Stub.state["D"]
        gradients.append((D, [w.grad.clone() for w in D.parameters()]))
        return loss(f_fake)

    monkeypatch.setattr(gan.Generator, "forward", spy)
    monkeypatch.setattr(gan, "generator_loss", watch)
    train("--steps", "3")
    assert graphs == [False, False, True] * 3                         # n_critic is 2
    D, last = gradients[-1]
    assert all(torch.equal(w.grad, g) for w, g in zip(D.parameters(), last))
    for name in ("G", "D", "G_ema"):
        now = Stub.state[name].state_dict()
        assert all(v.isfinite().all() for v in now.values()) and not same(now, Stub.before[name])


def test_each_critic_step_sees_fresh_pictures_and_fresh_latents(here, monkeypatch):
    draw(here / "pictures", 40)
    seen, latents, loss, forward = [], [], gan.critic_loss, gan.Generator.forward
    batches = data.batches

    def spy(*args, **kwargs):
        for x in batches(*args, **kwargs):
            seen.append(x)
            yield x

    monkeypatch.setattr(data, "batches", spy)
    monkeypatch.setattr(gan.Generator, "forward", lambda self, z: (latents.append(z), forward(self, z))[1])
    monkeypatch.setattr(runtime, "Run", Stub)
    train("--steps", "2")
    assert len(seen) == 4 and len(latents) == 6 and loss is gan.critic_loss
    assert all(not torch.equal(a, b) for k, a in enumerate(seen) for b in seen[:k])
    assert all(not torch.equal(a, b) for k, a in enumerate(latents) for b in latents[:k])


def test_runtime_knows_nothing_of_the_papers():
    text = (HERE / "runtime.py").read_text().lower()
    assert not re.search(r"generator|critic|loss", text)
    for module in ("gan", "data", "runtime"):
        ours = r"^\s*(import|from) (gan|data|runtime|train_\w+)\b"
        assert not re.search(ours, (HERE / f"{module}.py").read_text(), re.M)


def test_importing_does_nothing():
    code = ("import torch; torch.manual_seed(5); before = torch.get_rng_state(); import gan, data, runtime; "
            "import train_wgan; assert torch.equal(before, torch.get_rng_state()) and not torch.cuda.is_initialized()")
    process = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert process.returncode == 0 and process.stdout == process.stderr == ""


def test_default_flags_are_those_of_the_readme():
    rows = re.findall(r"^\| `--([\w-]+)` \|([^|]*)\|([^|]*)\|", README, re.M)
    ours, demo = train_wgan.parse_arguments(["--data", "x"]), train_wgan.parse_arguments([])

    def text(value):
        return "" if value is None or value is False else f"{value:g}" if isinstance(value, float) else str(value)

    assert {name.replace("-", "_") for name, _, _ in rows} == set(vars(ours))
    for name, default, for_demo in rows:
        key = name.replace("-", "_")
        if key == "data":
            continue
        assert text(vars(ours)[key]) == default.strip().strip("`")
        assert text(vars(demo)[key]) == (for_demo.strip().strip("`") or default.strip().strip("`")), name
    clip = train_wgan.parse_arguments(["--data", "x", "--constraint", "clip"])
    assert (clip.lr, clip.norm) == (5e-5, "batch") and (ours.lr, ours.norm) == (1e-4, "layer")


def test_every_command_in_the_readme_and_the_docstrings_parses(here):
    draw(here / "pictures")
    train("--steps", "1", "--out", "runs/wgan-teeth-1")               # what --resume and @args.txt refer to
    text = README + ast.get_docstring(ast.parse((HERE / "train_wgan.py").read_text()))
    commands = re.findall(r"python train_wgan\.py((?: [^\s`#|]+)*)", text)
    assert len(commands) > 12 and sum("--resume" in flags for flags in commands) >= 2
    for flags in commands:
        if "--help" in flags:
            with pytest.raises(SystemExit, match="0"):
                train_wgan.parse_arguments(["--help"])
        else:
            train_wgan.parse_arguments(shlex.split(flags))


def test_the_notebook_loop_of_the_readme_runs(here, monkeypatch):
    code = next(block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "gradient_penalty" in block)
    assert 25 <= len([line for line in code.splitlines() if line.strip()]) <= 40
    short = code.replace("= 5000, 64, 5, 10.0", "= 2, 8, 2, 10.0")
    assert short != code
    monkeypatch.syspath_prepend(HERE)
    cell = {}
    exec(short, cell)
    assert cell["G"](torch.randn(2, cell["G"].config["latent"])).isfinite().all()


def test_every_file_stands_in_the_readme():
    for path in HERE.glob("*.py"):
        assert f"`{path.name}`" in README
    for picture in re.findall(r"\((images/[^)]+)\)", README):
        assert (HERE / picture).exists()
    assert sum(path.stat().st_size for path in (HERE / "images").iterdir()) < 1_000_000
