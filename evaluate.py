"""Numbers that judge generated pictures, with nothing to install: FID, KID, IS, precision and recall, density and
coverage, SSIM, t-SNE and a check for copies.

    python evaluate.py                                      FID and KID of the newest run against its training pictures
    python evaluate.py runs/wgan-teeth-1 --all              every number, tsne.png, sweep.png, memorisation.png
    python evaluate.py --features random                    no download; compares with itself only
    python evaluate.py --real ./teeth --fake ./made         two folders, or arrays (.npy, .npz), or statistics (.npz)
    python evaluate.py --memorisation                       are training pictures being copied?

Real and fake pass through the same lines: uint8 pictures, one resize, one network. FID depends on the number of pictures,
on the network and on the resize, so all three are printed with it, and beside it the floor: one half of the real pictures
against the other, at the same number.

The functions above the last section take arrays or tensors and may be pasted elsewhere.

    Wang et al. 2004           Image quality assessment: from error visibility to structural similarity
    van der Maaten et al. 2008 Visualizing data using t-SNE                          JMLR 9
    Szegedy et al. 2016        Rethinking the Inception architecture                 arXiv 1512.00567
    Salimans et al. 2016       Improved techniques for training GANs                 arXiv 1606.03498
    Heusel et al. 2017         GANs trained by a two time-scale update rule          arXiv 1706.08500
    Binkowski et al. 2018      Demystifying MMD GANs                                 arXiv 1801.01401
    Kynkaanniemi et al. 2019   Improved precision and recall metric                  arXiv 1904.06991
    Naeem et al. 2020          Reliable fidelity and diversity metrics               arXiv 2002.09797
    Alaa et al. 2022           How faithful is your synthetic data?                  arXiv 2102.08921
"""

import argparse
import contextlib
import hashlib
import io
import json
import math
import os
import socket
import sys
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn

import data
import gan
import runtime

WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"            # its name ends in the first digits of its sha256
ADDRESS = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS}"
DIALECTS = ("pytorch-fid", "torch-fidelity", "clean-fid")
DIMS = (64, 192, 768, 2048)


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


def branches(kind, c):
    """The branches of an Inception block, each a chain of (name, channels, kernel); a list is a fork, its ends joined.

    The last branch begins with a pooling. c: what differs among blocks of a kind.
    """
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
        if isinstance(module, Convolution):                 # in float64, so that each weight is rounded once
            module.conv = nn.utils.fuse_conv_bn_eval(module.conv.double(), module.bn.double()).float()
            module.bn = nn.Identity()
    return net


def random_weights(seed=0):
    """A state_dict for `Inception` that needs no download and is the same on every machine, to rounding.

    W ~ U(-a, a), a = sqrt(6 / fan_in) (He et al. 2015, arXiv 1502.01852), from numpy's RandomState, whose stream is
    frozen. Mean and variance of each BatchNorm are those of four synthetic pictures, so that activations stay in range
    and pictures stay apart: without it all features of all pictures would be nearly one vector.
    """
    random = np.random.RandomState(seed)
    with torch.device("meta"):                              # torch's own random numbers are left alone
        net = Inception()
    net.to_empty(device="cpu").requires_grad_(False)
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            a = math.sqrt(6 / module.weight[0].numel())
            module.weight.copy_(torch.from_numpy(random.uniform(-a, a, tuple(module.weight.shape))))
        if isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
            module.momentum = 1.0                           # the running statistics become those of the next batch
    net.fc.bias.zero_()
    x = sum(F.interpolate(torch.from_numpy(random.uniform(-1, 1, (4, 3, side, side))).float(), (299, 299),
                          mode="bilinear") for side in (3, 6, 12, 24, 48, 96)) / 2
    net.train()(x.clamp(-1, 1).contiguous(memory_format=torch.channels_last))
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


def chunks(n, size, what=""):
    """Slices of at most `size` that cover 0..n. With `what`, says now and then how far it is and how long it takes."""
    began = shown = time.monotonic()
    terminal = sys.stderr.isatty()
    for k in range(0, n, size):
        yield slice(k, min(k + size, n))
        now, done = time.monotonic(), min(k + size, n)
        if what and now - shown > (1 if terminal else 15):
            shown, left = now, runtime.clock((now - began) / done * (n - done))
            print(f"{what}: {done:,} of {n:,}, {left} left" + (" " * 12 + "\r") * terminal, file=sys.stderr, flush=True,
                  end="" if terminal else "\n")
    if what and terminal and shown > began:
        print(" " * 60, end="\r", file=sys.stderr, flush=True)


class Features:
    """extract = load_features(); extract(images) -> (N, D). See `load_features`.

    name: what to print with a score. fc: (1008, 2048), from features to the logits of the Inception Score, or None.
    """

    def __init__(self, net, prepare, device, name, fc=None):
        self.net, self.prepare, self.device, self.name, self.fc = net, prepare, torch.device(device), name, fc

    @torch.inference_mode()
    def __call__(self, images, batch=0, progress=False):
        """uint8 (N, 1 or 3, H, W), an array or `data.Rows` -> float32 tensor (N, D) on the CPU.

        batch: pictures at a time, 0 for what suits the device. progress: True, or a word to show it with.
        """
        if images.dtype != np.uint8 or len(images.shape) != 4 or images.shape[1] not in (1, 3) or not len(images):
            raise ValueError(f"features are taken of pictures uint8 (N, 1 or 3, H, W), not of {images.dtype} "
                             f"{tuple(images.shape)}")
        batch, out = batch or (16 if self.device.type == "cpu" else 128), []
        what = "features" if progress is True else progress or ""
        exact = contextlib.nullcontext() if self.device.type != "cuda" else torch.backends.cudnn.flags(
            enabled=True, allow_tf32=False)                  # TF32 has 10 bits; for this while only
        with exact:
            for rows in chunks(len(images), batch, what):
                pixels = torch.from_numpy(np.ascontiguousarray(images[rows])).to(self.device)
                x = self.prepare(pixels).contiguous(memory_format=torch.channels_last)
                y = self.net(x)
                y = y[0] if isinstance(y, (tuple, list)) else y
                out.append((y.mean((2, 3)) if y.ndim == 4 else y.flatten(1)).float().cpu())
        return torch.cat(out).clone()                       # a plain tensor, not one of inference mode


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else hashlib.sha256(
            file.read()).hexdigest()


def find_weights(path=""):
    """The file of the published weights: `path`, else the one in torch's hub cache, else downloaded there and checked.

    Raises OSError with the address and the place when it is not there and cannot be fetched.
    """
    if path:
        if not Path(path).is_file():
            raise FileNotFoundError(f"--weights {path}: there is no such file; the published one is {ADDRESS}")
        return Path(path)
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    for name in (WEIGHTS, WEIGHTS.replace("pt_", "weights-", 1)):                     # torch-fidelity's copy of it
        if (folder / name).is_file():
            return folder / name
    before = socket.getdefaulttimeout()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(20)
        runtime.say(f"downloading {ADDRESS} (91 MB) to {folder}")
        torch.hub.download_url_to_file(ADDRESS, str(folder / WEIGHTS), hash_prefix="6726825d")
    except (OSError, RuntimeError) as error:                 # no network; or a hash that does not fit
        raise OSError(f"the Inception weights are not here and cannot be downloaded ({runtime.first_line(error)}): put "
                      f"{ADDRESS} at {folder / WEIGHTS} or name it with --weights FILE; or take --features random, "
                      "which needs none but compares only with itself") from error
    finally:
        socket.setdefaulttimeout(before)
    return folder / WEIGHTS


def read_weights(path):
    """A state_dict that fits `Inception` out of a file. ValueError when it holds something else."""
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        with torch.device("meta"):
            expected = Inception().state_dict()
        weights = {key: value for key, value in weights.items() if not key.startswith("AuxLogits.")}
        wrong = [key for key in sorted(weights.keys() | expected.keys()) if not key.endswith("num_batches_tracked")
                 and (key not in weights or key not in expected or weights[key].shape != expected[key].shape)]
    except Exception as error:                               # a damaged file makes torch.load raise almost anything
        raise ValueError(f"{path} cannot be read as weights ({runtime.first_line(error)}); the published file is "
                         f"{ADDRESS}") from error
    if wrong:
        raise ValueError(f"{path} does not hold the weights of the FID network ({wrong[0]} and {len(wrong) - 1} more "
                         f"are missing, too many or of another shape); the published file is {ADDRESS}")
    return {key: value for key, value in weights.items() if key in expected}


def read_network(path):
    """A network of the user's: TorchScript, or torch.export.save's. Returns x -> features."""
    errors = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                      # newer torch advises against TorchScript
        for load in (lambda: torch.jit.load(path, map_location="cpu").eval(), lambda: torch.export.load(path).module()):
            try:
                return load()
            except Exception as error:
                errors.append(runtime.first_line(error))
    raise ValueError(f"--features {path} is neither TorchScript nor an exported program ({'; '.join(errors)})")


def load_features(name="inception", weights="", resize="pytorch-fid", device="cpu", dims=2048):
    """The network that pictures are compared through: extract = load_features(); extract(images) -> (N, D).

    name: "inception", the FID network, weights from the file `weights`, else torch's hub cache, else a download;
    "random", the same network with fixed random weights (see `random_weights`): no download, numbers that compare only
    with one another; or a file with a network of your own (TorchScript or torch.export), which is given float32
    (N, 3, H, W) in [-1, 1] at the pictures' size.
    resize: "pytorch-fid", "torch-fidelity" or "clean-fid", see `inception_input`. dims: 64, 192, 768 or 2048.
    Raises OSError or ValueError with a sentence for the user.
    """
    if resize not in DIALECTS or dims not in DIMS:
        raise ValueError(f"resize is one of {', '.join(DIALECTS)} and dims one of {DIMS}, not {resize!r} and {dims!r}")
    if name not in ("inception", "random"):
        if not Path(name).is_file():
            raise FileNotFoundError(f"--features {name}: take inception, random, or the file of a network")
        net = read_network(name)
        return Features(net.to(device), lambda images: data.to_float(images.float()).expand(-1, 3, -1, -1), device,
                        f"the network {Path(name).name} (compare only with scores through it)")
    if name == "random":
        state, words = random_weights(), "random Inception-v3 (compare only with scores through it)"
    else:
        path = find_weights(weights)
        state, words = read_weights(path), "Inception-v3 of 2015"
        if not sha256(path).startswith("6726825d"):
            words += f" with the weights of {path.name}, which are not the published ones"
    with torch.device("meta"):
        net = Inception(dims)
    net.load_state_dict(state, assign=True)
    net = net.float().eval().requires_grad_(False)
    fc = net.fc.weight if dims == 2048 else None
    return Features(fold(net).to(device, memory_format=torch.channels_last),
                    lambda images: inception_input(images, resize), device,
                    f"{words}, {dims} features, resized as {resize} does", fc)


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
