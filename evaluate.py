"""Numbers that judge generated pictures, self-contained: Inception-v3, FID, KID, PSNR, SSIM."""

import contextlib
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import runtime

WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"            # its name ends in the first digits of its sha256
ADDRESS = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS}"
DIALECTS = ("pytorch-fid", "torch-fidelity", "clean-fid")


# ---------------------------------------------------------------------------------------------------------------------
# Inception-v3
# ---------------------------------------------------------------------------------------------------------------------

class Convolution(nn.Module):
    """ReLU(BatchNorm(convolution)); after `fold`, ReLU(convolution)."""

    def __init__(self, c_in, c_out, kernel, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


# The branches of each kind of block: chains of (name, channels, kernel). A list in a chain is a fork whose ends are
# joined. C stands for the width of the 7x7 convolutions. The last entry of a kind is what happens to its pooling
# branch: the pooling, and whether a 1x1 convolution follows.
def branches(kind, c):
    """The branches of an Inception block, each a chain of (name, channels, kernel); a list is a fork, ends joined."""
    if kind == "A":
        return [[("branch1x1", 64, 1)], [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
                [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
                [("branch_pool", c, 1)]]
    if kind == "B":
        return [[("branch3x3", 384, 3)],
                [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)], []]
    if kind == "C":
        return [[("branch1x1", 192, 1)],
                [("branch7x7_1", c, 1), ("branch7x7_2", c, (1, 7)), ("branch7x7_3", 192, (7, 1))],
                [("branch7x7dbl_1", c, 1), ("branch7x7dbl_2", c, (7, 1)), ("branch7x7dbl_3", c, (1, 7)),
                 ("branch7x7dbl_4", c, (7, 1)), ("branch7x7dbl_5", 192, (1, 7))],
                [("branch_pool", 192, 1)]]
    if kind == "D":
        return [[("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3)],
                [("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, (1, 7)), ("branch7x7x3_3", 192, (7, 1)),
                 ("branch7x7x3_4", 192, 3)], []]
    return [[("branch1x1", 320, 1)],
            [("branch3x3_1", 384, 1), [("branch3x3_2a", 384, (1, 3)), ("branch3x3_2b", 384, (3, 1))]],
            [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3),
             [("branch3x3dbl_3a", 384, (1, 3)), ("branch3x3dbl_3b", 384, (3, 1))]],
            [("branch_pool", 192, 1)]]


class Mixed(nn.Module):
    """One Inception block: branches side by side, joined along the channels; the last one begins with a pooling."""

    def __init__(self, c_in, kind, c=0, pool="average"):
        super().__init__()
        self.pool, self.chains, self.c_out = pool, [], 0
        shrinks = kind in "BD"                              # each branch but the pooling one ends in stride 2
        for chain in branches(kind, c):
            names, width = [], c_in
            for place, step in enumerate(chain):
                fork = step if isinstance(step, list) else [step]
                for name, c_out, kernel in fork:
                    last = shrinks and place == len(chain) - 1
                    k = kernel if isinstance(kernel, tuple) else (kernel, kernel)
                    padding = (0, 0) if last else (k[0] // 2, k[1] // 2)
                    self.add_module(name, Convolution(width, c_out, k, 2 if last else 1, padding))
                names.append([name for name, _, _ in fork])
                width = sum(c_out for _, c_out, _ in fork)
            self.chains.append(names)
            self.c_out += width

    def forward(self, x):
        ends = []
        for chain in self.chains:
            y = x
            if chain is self.chains[-1]:
                if self.pool == "average":
                    y = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
                else:
                    y = F.max_pool2d(x, 3, *((2, 0) if self.pool == "shrink" else (1, 1)))
            for names in chain:
                forks = [getattr(self, name)(y) for name in names]
                y = forks[0] if len(forks) == 1 else torch.cat(forks, 1)
            ends.append(y)
        return torch.cat(ends, 1)


class Inception(nn.Module):
    """Inception-v3 as TensorFlow's FID network of 2015 has it: x (N, 3, 299, 299) in [-1, 1] -> (N, dims).

    Szegedy et al. 2016 (arXiv 1512.00567). Against the usual torch networks: average pooling leaves the padding out,
    the last block pools by the maximum, 1008 classes. Modules are named as in the published weight file.
    dims: 64, 192, 768 (means over the map after the first and the second pooling, and after Mixed_6e) or 2048 (the last
    mean, which FID is defined on).
    """

    def __init__(self, dims=2048):
        super().__init__()
        self.dims = dims
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3)
        c = 192
        for name, *block in (("5b", "A", 32), ("5c", "A", 64), ("5d", "A", 64), ("6a", "B", 0, "shrink"),
                             ("6b", "C", 128), ("6c", "C", 160), ("6d", "C", 160), ("6e", "C", 192),
                             ("7a", "D", 0, "shrink"), ("7b", "E"), ("7c", "E", 0, "maximum")):
            self.add_module(f"Mixed_{name}", Mixed(c, *block))
            c = getattr(self, f"Mixed_{name}").c_out
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x):
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))             # (N, 64, 147, 147)
        x = F.max_pool2d(x, 3, 2)                                                     # (N, 64, 73, 73)
        if self.dims > 64:
            x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)         # (N, 192, 35, 35)
        if self.dims > 192:
            for name in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e"):
                x = getattr(self, f"Mixed_{name}")(x)                                 # (N, 768, 17, 17) in the end
        if self.dims > 768:
            for name in ("7a", "7b", "7c"):
                x = getattr(self, f"Mixed_{name}")(x)                                 # (N, 2048, 8, 8) in the end
        return x.mean((2, 3))


def fold(net):
    """Puts each BatchNorm into the convolution before it: the same function, fewer passes over memory."""
    for module in net.modules():
        if isinstance(module, Convolution):
            module.conv = nn.utils.fuse_conv_bn_eval(module.conv, module.bn)
            module.bn = nn.Identity()
    return net


def random_weights(seed=0):
    """A state_dict for `Inception` that needs no download and is the same everywhere.

    W ~ U(-a, a), a = sqrt(6 / fan_in) (He et al. 2015), from numpy's RandomState, whose stream is frozen. BatchNorm's
    mean and variance are then set, layer by layer, to what four synthetic pictures give, so that activations stay in
    range and pictures are told apart.
    """
    random, net = np.random.RandomState(seed), Inception()
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            a = math.sqrt(6 / module.weight[0].numel())
            module.weight.data = torch.from_numpy(random.uniform(-a, a, tuple(module.weight.shape))).float()
    nn.init.zeros_(net.fc.bias)
    x = sum(F.interpolate(torch.from_numpy(random.uniform(-1, 1, (4, 3, side, side))).float(), (299, 299),
                          mode="bilinear") for side in (3, 6, 12, 24, 48, 96)) / 2
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        net.train()(x.clamp(-1, 1))
    return net.state_dict()


# ---------------------------------------------------------------------------------------------------------------------
# Features
# ---------------------------------------------------------------------------------------------------------------------

def resize_tf1(x, side=299):
    """Bilinear as TensorFlow 1 had it, source = target x (in / out), corners not aligned: (N, C, H, W) -> side^2."""
    for dim in (2, 3):
        place = torch.arange(side, device=x.device) * (x.shape[dim] / side)
        low = place.long()
        high = (low + 1).clamp(max=x.shape[dim] - 1)
        t = (place - low).view((-1, 1) if dim == 2 else (-1,))
        x = torch.lerp(x.index_select(dim, low), x.index_select(dim, high), t)
    return x


def inception_input(images, resize="pytorch-fid"):
    """uint8 (N, 1 or 3, H, W) -> float32 (N, 3, 299, 299), about [-1, 1], as the named package does it.

    pytorch-fid: bilinear without antialiasing, 2 x / 255 - 1. torch-fidelity: TensorFlow 1's bilinear, (x - 128) / 128.
    clean-fid: antialiased bicubic, clipped to 0..255, (x - 128) / 128.
    """
    x = images.float()
    if resize == "pytorch-fid":
        x = F.interpolate(x / 255, (299, 299), mode="bilinear", align_corners=False) * 2 - 1
    elif resize == "torch-fidelity":
        x = (resize_tf1(x) - 128) / 128
    else:
        x = F.interpolate(x, (299, 299), mode="bicubic", align_corners=False, antialias=True)
        x = (x.clamp(0, 255) - 128) / 128
    return x.expand(-1, 3, -1, -1)


class Features:
    """What `load_features` returns: extract(images) -> features."""

    def __init__(self, net, prepare, device, label, fc=None):
        self.net, self.prepare, self.device, self.label, self.fc = net, prepare, torch.device(device), label, fc

    @torch.inference_mode()
    def __call__(self, images, batch=0, progress=False):
        """uint8 (N, C, H, W), an array or `data.Rows` -> float32 tensor (N, D) on the CPU."""
        batch, out, shown = batch or (8 if self.device.type == "cpu" else 64), [], time.monotonic()
        exact = contextlib.nullcontext() if self.device.type != "cuda" else torch.backends.cudnn.flags(
            enabled=True, allow_tf32=False)
        with exact:
            for k in range(0, len(images), batch):
                pixels = torch.from_numpy(np.ascontiguousarray(images[k:k + batch])).to(self.device)
                if pixels.dtype != torch.uint8:
                    raise ValueError(f"features are taken of uint8 pictures, not of {pixels.dtype}")
                y = self.net(self.prepare(pixels).contiguous(memory_format=torch.channels_last))
                out.append(y.float().cpu())
        return torch.cat(out).clone()


def find_weights(path=""):
    """The published weights as a state_dict."""
    return torch.load(path, map_location="cpu", weights_only=True)


def load_features(name="inception", weights="", resize="pytorch-fid", device="cpu", dims=2048):
    """The network that FID and its kin look through; extract = load_features(); extract(images) -> (N, D)."""
    net = Inception(dims)
    net.load_state_dict(random_weights() if name == "random" else find_weights(weights))
    fc = net.fc.weight.detach()
    net = fold(net.eval().requires_grad_(False)).to(device, memory_format=torch.channels_last)
    return Features(net, lambda images: inception_input(images, resize), device, name, fc)


# ---------------------------------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------------------------------

def double(x):
    return torch.as_tensor(x).double()


def statistics(x):
    """Mean (D,) and covariance (D, D) with N - 1, both float64, of features (N, D)."""
    x = double(x)
    mu = x.mean(0)
    centred = x - mu
    return mu, centred.T @ centred / (len(x) - 1)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """||mu1 - mu2||^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2) of two Gaussians. Dowson and Landau 1982.

    tr (S1 S2)^(1/2) is the sum of the roots of the eigenvalues of R S2 R, R = S1^(1/2), which is symmetric.
    """
    mu1, sigma1, mu2, sigma2 = map(double, (mu1, sigma1, mu2, sigma2))
    values, vectors = torch.linalg.eigh(sigma1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    trace = torch.linalg.eigvalsh(root @ sigma2 @ root).clamp(min=0).sqrt().sum()
    return float((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace)


def fid(real, fake):
    """Frechet Inception distance of features (N, D) and (M, D). Heusel et al. 2017 (arXiv 1706.08500), eq. 6.

    With fewer pictures than dimensions the trace is the sum of the singular values of X Y^T / sqrt((N - 1)(M - 1)), X
    and Y centred: the same number, free of the rounding of eigenvalues that should be 0.
    """
    real, fake = double(real), double(fake)
    if min(len(real), len(fake)) >= real.shape[1]:
        return frechet_distance(*statistics(real), *statistics(fake))
    mean_real, mean_fake = real.mean(0), fake.mean(0)
    x, y = (real - mean_real) / (len(real) - 1) ** 0.5, (fake - mean_fake) / (len(fake) - 1) ** 0.5
    trace = torch.linalg.svdvals(x @ y.T).sum()
    return float((mean_real - mean_fake).square().sum() + x.square().sum() + y.square().sum() - 2 * trace)


def kid(real, fake, subsets=100, subset_size=1000, seed=0):
    """Kernel Inception distance: (mean, standard deviation) over subsets. Binkowski et al. 2018 (arXiv 1801.01401).

    MMD^2 = sum over i != j of [k(x_i, x_j) + k(y_i, y_j)] / (m (m - 1)) - 2 / m^2 sum over i, j of k(x_i, y_j), with
    k(x, y) = (x . y / D + 1)^3 and subsets of m = min(N, M, subset_size) drawn without replacement. Unbiased, so it may
    be slightly negative.
    """
    real, fake, random = double(real), double(fake), np.random.RandomState(seed)
    m, values = min(len(real), len(fake), subset_size), []
    if m < 2:
        raise ValueError("KID needs at least two pictures of each kind")
    for _ in range(subsets):
        x, y = (f[torch.from_numpy(random.permutation(len(f))[:m])] for f in (real, fake))
        xx, yy, xy = ((a @ b.T / a.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        within = xx.sum() - xx.trace() + yy.sum() - yy.trace()
        values.append(float(within / (m * (m - 1)) - 2 * xy.mean()))
        if m == len(real) == len(fake):
            break                                           # every subset is the whole set
    return float(np.mean(values)), float(np.std(values))


def psnr(a, b, data_range):
    """Peak signal to noise ratio in dB of each pair, 10 log10(data_range^2 / mean (a - b)^2): (N, C, H, W) -> (N,)."""
    a, b = double(a), double(b)
    return 10 * torch.log10(data_range**2 / (a - b).square().flatten(1).mean(1))


def ssim(a, b, data_range):
    """Structural similarity of each pair, (N, C, H, W) twice -> (N,). Wang et al. 2004, eq. 13.

    Windows: Gaussian, 11x11, sigma 1.5, those that lie inside the picture; C1 = (0.01 L)^2, C2 = (0.03 L)^2, L =
    data_range (2 for [-1, 1], 255 for uint8); means over windows and channels. ValueError for sides under 11.
    """
    return _similarity(double(a), double(b), data_range)[0].mean(1)


def _similarity(a, b, data_range):
    """(SSIM, its contrast-structure factor), each (N, C), means over the windows."""
    if min(a.shape[2:]) < 11:
        raise ValueError(f"SSIM looks through windows of 11x11 pixels; pictures of {a.shape[2]}x{a.shape[3]} are "
                         "smaller")
    g = torch.exp(-(torch.arange(11, dtype=a.dtype, device=a.device) - 5).square() / (2 * 1.5**2))
    g = (g / g.sum()).expand(a.shape[1], 1, 1, 11)

    def blur(x):
        return F.conv2d(F.conv2d(x, g, groups=x.shape[1]), g.transpose(2, 3), groups=x.shape[1])

    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    cs = (2 * cov + c2) / (var_a + var_b + c2)
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return (luminance * cs).mean((2, 3)), cs.mean((2, 3))
