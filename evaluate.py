"""Numbers that judge generated pictures, with nothing to install: FID, KID, IS, precision and recall, density and
coverage, SSIM, t-SNE and a check for copies.

    python evaluate.py                                      FID and KID of the newest run against its training pictures
    python evaluate.py runs/wgan-teeth-1 --all              every number, tsne.png, sweep.png, memorisation.png
    python evaluate.py --features random                    no download; compares with itself only
    python evaluate.py --real ./teeth --fake ./made         two folders, or arrays (.npy, .npz), or statistics (.npz)
    python evaluate.py --memorisation                       are training pictures being copied?

Real and fake pass through the same lines: uint8 pictures, one resize, one network. FID depends on the number of
pictures, on the network and on the resize, so all three are printed with it, and beside it the floor: one half of the
real pictures against the other, at the same number.

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
DRAWN = 300                                                 # pictures of a kind that t-SNE is made of


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
        for chain in branches(kind, c):
            names, width = [], c_in
            for place, step in enumerate(chain):
                fork = step if isinstance(step, list) else [step]
                shrinks = kind in "BD" and place == len(chain) - 1                    # each branch ends in stride 2
                for name, c_out, kernel in fork:
                    self.add_module(name, Convolution(width, c_out, kernel, *((2, 0) if shrinks else (1, "same"))))
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
    frozen. Each BatchNorm divides by one number a layer, the root mean square that four synthetic pictures give there,
    so that activations stay in range. Nothing is centred: mean and variance a channel, one after the other, would
    amplify small differences from layer to layer until the scores told of nothing else.
    """
    random = np.random.RandomState(seed)
    with torch.device("meta"):                              # torch's own random numbers are left alone
        net = Inception()
    net.to_empty(device="cpu").requires_grad_(False).eval()

    def rescale(norm, inputs):
        norm.reset_parameters()
        norm.running_var.fill_(inputs[0].square().mean())

    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            a = math.sqrt(6 / module.weight[0].numel())
            module.weight.copy_(torch.from_numpy(random.uniform(-a, a, tuple(module.weight.shape))))
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(rescale)
    net.fc.bias.zero_()
    x = sum(F.interpolate(torch.from_numpy(random.uniform(-1, 1, (4, 3, side, side))).float(), (299, 299),
                          mode="bilinear") for side in (3, 6, 12, 24, 48, 96)) / 2
    net(x.clamp(-1, 1).contiguous(memory_format=torch.channels_last))
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
    """extract = load_features(); extract(images) -> (N, D). See `load_features`.

    name: what to print with a score. fc: (1008, 2048), from features to the logits of the Inception Score, or None.
    """

    def __init__(self, net, prepare, device, name, fc=None):
        self.net, self.prepare, self.device, self.name, self.fc = net, prepare, torch.device(device), name, fc

    @torch.no_grad()
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
            for rows in runtime.chunks(len(images), batch, what):
                pixels = torch.from_numpy(np.ascontiguousarray(images[rows])).to(self.device)
                y = self.net(self.prepare(pixels))
                y = y[0] if isinstance(y, (tuple, list)) else y
                out.append((y.mean((2, 3)) if y.ndim == 4 else y.flatten(1)).float().cpu())
        return torch.cat(out)


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
        return Features(net.to(device), lambda x: data.to_float(x).expand(-1, 3, -1, -1).contiguous(), device,
                        f"the network {Path(name).name} (compare only with scores through it)")
    if name == "random":
        state, words = random_weights(), "random Inception-v3 (compare only with scores through it)"
    else:
        path = find_weights(weights)
        state, words = read_weights(path), "Inception-v3 of 2015"
        if not hashlib.sha256(path.read_bytes()).hexdigest().startswith("6726825d"):
            words += f" with the weights of {path.name}, which are not the published ones"
    with torch.device("meta"):
        net = Inception(dims)
    net.load_state_dict(state, assign=True)
    net = net.float().eval().requires_grad_(False)
    fc = net.fc.weight if dims == 2048 else None
    return Features(fold(net).to(device, memory_format=torch.channels_last),
                    lambda x: inception_input(x, resize).contiguous(memory_format=torch.channels_last), device,
                    f"{words}, {dims} features, resized as {resize} does", fc)


# ---------------------------------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------------------------------

def double(x):
    """An array or a tensor as a float64 tensor on the CPU: statistics are always taken in float64."""
    return torch.as_tensor(x).detach().cpu().double()


def statistics(x):
    """Mean (D,) and covariance (D, D) with N - 1, both float64, of features (N, D). ValueError for a single picture."""
    x = double(x)
    if len(x) < 2:
        raise ValueError("FID needs at least two pictures of each kind")
    mu = x.mean(0)
    return mu, (x - mu).T @ (x - mu) / (len(x) - 1)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """||mu1 - mu2||^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2) of two Gaussians. Dowson and Landau 1982.

    tr (S1 S2)^(1/2) is the sum of the roots of the eigenvalues of R^T S2 R, which is symmetric, for any R R^T = S1.
    mu: (D,), sigma: (D, D), arrays or tensors.
    """
    mu1, sigma1, mu2, sigma2 = map(double, (mu1, sigma1, mu2, sigma2))
    if sigma1.shape != sigma2.shape:
        raise ValueError(f"statistics of {len(mu1)} and of {len(mu2)} features cannot be compared")
    root, failed = torch.linalg.cholesky_ex(sigma1)
    if failed:                                              # singular: some features never vary
        values, vectors = torch.linalg.eigh(sigma1)
        root = vectors * values.clamp(min=0).sqrt()
    trace = torch.linalg.eigvalsh(root.T @ sigma2 @ root).clamp(min=0).sqrt().sum()
    return float((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace)


def fid(real, fake):
    """Frechet Inception distance of features (N, D) and (M, D). Heusel et al. 2017 (arXiv 1706.08500), eq. 6.

    With fewer pictures than dimensions the trace is the sum of the singular values of X Y^T / sqrt((N - 1)(M - 1)), X
    and Y centred: the same number, free of the rounding of eigenvalues that should be 0.
    """
    real, fake = double(real), double(fake)
    if not 2 <= min(len(real), len(fake)) < real.shape[1]:
        return frechet_distance(*statistics(real), *statistics(fake))
    x, y = ((f - f.mean(0)) / (len(f) - 1) ** 0.5 for f in (real, fake))
    trace = torch.linalg.svdvals(x @ y.T).sum()
    return float((real.mean(0) - fake.mean(0)).square().sum() + x.square().sum() + y.square().sum() - 2 * trace)


def kid(real, fake, subsets=100, subset_size=1000, seed=0):
    """Kernel Inception distance: (mean, standard deviation) over subsets. Binkowski et al. 2018 (arXiv 1801.01401).

    MMD^2 = sum over i != j of [k(x_i, x_j) + k(y_i, y_j)] / (m (m - 1)) - 2 / m^2 sum over i, j of k(x_i, y_j), with
    k(x, y) = (x . y / D + 1)^3 and subsets of m = min(N, M, subset_size) drawn without replacement. Unbiased, so it may
    be slightly negative.
    """
    real, fake, random = double(real), double(fake), np.random.RandomState(seed)
    m = min(len(real), len(fake), subset_size)
    if m < 2:
        raise ValueError("KID needs at least two pictures of each kind")
    if m == len(real) == len(fake):
        subsets = 1                                         # every subset is the whole set
    chosen = [torch.zeros(subsets, len(f), dtype=torch.float64) for f in (real, fake)]
    for i, j in zip(*chosen):                               # a row for each subset, 1 where it has the picture
        i[random.permutation(len(i))[:m]] = j[random.permutation(len(j))[:m]] = 1

    def sums(x, y, in_x, in_y):
        total = 0
        for rows in runtime.chunks(len(x), 1024):
            k = (x[rows] @ y.T / x.shape[1] + 1) ** 3
            if x is y:
                k[torch.arange(len(k)), torch.arange(rows.start, rows.stop)] = 0
            total = total + (in_x[:, rows] @ k * in_y).sum(1)
        return total                                        # (subsets,)

    (i, j), within = chosen, m * (m - 1)
    values = (sums(real, real, i, i) + sums(fake, fake, j, j)) / within - 2 / m**2 * sums(real, fake, i, j)
    return float(values.mean()), float(values.std(correction=0))


def inception_score(logits, splits=10, seed=2020):
    """exp E_x KL(p(y|x) || p(y)), (mean, standard deviation) over `splits` parts. Salimans et al. 2016, section 4.

    logits: (N, classes), without the bias of the last layer, as in the published code; float64 from there on. The order
    is shuffled first (torch-fidelity's seed; None leaves it).
    """
    logits, scores = double(logits), []
    if seed is not None:
        logits = logits[torch.from_numpy(np.random.RandomState(seed).permutation(len(logits)))]
    for k in range(splits):
        log_p = logits[k * len(logits) // splits:(k + 1) * len(logits) // splits].log_softmax(1)
        log_q = log_p.logsumexp(0) - math.log(len(log_p))   # finite for classes that nothing is likely to be
        scores.append(float((log_p.exp() * (log_p - log_q)).sum(1).mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))


def distances(x, y):
    """||x_i - y_j|| of (N, D) and (M, D) -> (N, M), float64."""
    return (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T).clamp(min=0).sqrt()


def radii(x, k, block=1024):
    """Distance of each x_i to its k-th nearest neighbour among the others: (N, D) -> (N,)."""
    if len(x) <= k:
        raise ValueError(f"the {k}-th nearest neighbour needs more than {k} pictures; there are {len(x)}")
    return torch.cat([distances(x[rows], x).kthvalue(k + 1, 1).values for rows in runtime.chunks(len(x), block)])


def precision_recall(real, fake, k=3, block=1024):
    """Share of fakes within the real manifold, and of reals within the fake one. Kynkaanniemi et al. 2019, eq. 1, 2.

    A manifold is the union of the balls about its points that reach to their k-th neighbour.
    """
    real, fake = double(real), double(fake)
    real_radius, fake_radius = radii(real, k), radii(fake, k)
    inside = torch.zeros(len(fake), dtype=torch.bool)
    covered = []
    for rows in runtime.chunks(len(real), block):
        d = distances(real[rows], fake)
        inside |= (d <= real_radius[rows, None]).any(0)
        covered.append((d <= fake_radius).any(1))
    return float(inside.double().mean()), float(torch.cat(covered).double().mean())


def density_coverage(real, fake, k=5, block=1024):
    """Density: real balls that a fake lies in, over k. Coverage: share of real balls with a fake in them. Naeem et al.
    2020, eq. 3, 4. Density may exceed 1."""
    real, fake = double(real), double(fake)
    radius, hits, covered = radii(real, k), 0, []
    for rows in runtime.chunks(len(real), block):
        within = distances(real[rows], fake) < radius[rows, None]
        hits += int(within.sum())
        covered.append(within.any(1))
    return hits / (k * len(fake)), float(torch.cat(covered).double().mean())


def psnr(a, b, data_range):
    """10 log10(data_range^2 / mean (a - b)^2) in dB of each pair, over all pixels: (N, C, H, W) twice -> (N,)."""
    a, b = double(a), double(b)
    return 10 * torch.log10(data_range**2 / (a - b).square().flatten(1).mean(1))


def ssim(a, b, data_range):
    """Structural similarity of each pair, (N, C, H, W) twice -> (N,). Wang et al. 2004, eq. 13.

    Windows: Gaussian, 11x11, sigma 1.5, those that lie inside the picture; C1 = (0.01 L)^2, C2 = (0.03 L)^2, L =
    data_range (2 for [-1, 1], 255 for uint8); means over windows and channels. ValueError for sides under 11.
    """
    return similarity_maps(a, b, data_range)[0].mean((1, 2, 3))


def similarity_maps(a, b, data_range):
    """SSIM of each window, and its contrast-structure factor alone: (N, C, H - 10, W - 10) each."""
    a, b = double(a), double(b)
    if min(a.shape[2:]) < 11:
        raise ValueError(f"SSIM looks through windows of 11x11 pixels, and the pictures are {a.shape[2]}x{a.shape[3]}")
    g = torch.exp(-(torch.arange(11, dtype=a.dtype) - 5).square() / (2 * 1.5**2))
    g = (g / g.sum()).expand(a.shape[1], 1, 1, 11)

    def blur(x):
        return F.conv2d(F.conv2d(x, g, groups=x.shape[1]), g.transpose(2, 3), groups=x.shape[1])

    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    structure = (2 * cov + c2) / (var_a + var_b + c2)
    return (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1) * structure, structure


SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)           # the exponents of Wang et al. 2003


def ms_ssim(a, b, data_range, scales=5):
    """SSIM over scales of each pair, (N, C, H, W) twice -> (N,). Wang et al. 2003 (Asilomar), eq. 7.

    The product over scales j of structure_j^w_j, SSIM itself at the last; halved by 2x2 means in between; per channel,
    then the mean. scales under 5 take the first exponents, scaled to sum to 1: a number of its own. Negative structure
    counts as 0. ValueError when a side is under 11 x 2^(scales - 1).
    """
    a, b = double(a), double(b)
    if min(a.shape[2:]) < 11 * 2 ** (scales - 1):
        raise ValueError(f"{scales} scales need sides of {11 * 2 ** (scales - 1)} and more, and the pictures are "
                         f"{a.shape[2]}x{a.shape[3]}")
    product = 1
    for j, w in enumerate(SCALES[:scales]):
        whole, structure = (x.mean((2, 3)).clamp(min=0) for x in similarity_maps(a, b, data_range))
        product = product * (whole if j == scales - 1 else structure) ** (w / sum(SCALES[:scales]))
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return product.mean(1)                                                            # (N, C) -> (N,)


def tsne(x, perplexity=30.0, steps=1000, seed=0, progress=False):
    """Exact t-SNE: (N, D) -> (N, 2), float64. van der Maaten and Hinton 2008, algorithm 1.

    x is first brought to at most 50 dimensions by PCA. p_ij from Gaussians whose widths give each point the perplexity;
    minimised is KL(P || Q), q_ij ~ 1 / (1 + ||y_i - y_j||^2); gradient 4 sum_j (p_ij - q_ij)(y_i - y_j) / (1 + ||y_i -
    y_j||^2). Learning rate N / 12 and at least 50, P times 12 in the first quarter, momentum 0.5, later 0.8, and gains,
    as usual today; it starts from the first two principal components with a little noise of `seed`.
    """
    x = double(x)
    n = len(x)
    if n < 4:
        raise ValueError(f"t-SNE needs at least 4 pictures; there are {n}")
    perplexity = min(perplexity, (n - 1) / 3)
    u, s, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    x = u[:, :50] * s[:50]                                                            # (N, 50)
    p = affinities(distances(x, x).square(), perplexity)
    p = (p + p.T) / (2 * n)
    noise = torch.from_numpy(np.random.RandomState(seed).standard_normal((n, 2)))
    y = 1e-4 * (x[:, :2] / x[:, 0].std() + 0.1 * noise)
    step, gains = torch.zeros_like(y), torch.ones_like(y)
    for rows in runtime.chunks(steps, 1, "t-SNE" if progress else ""):
        early = rows.start < steps // 4
        w = 1 / (1 + distances(y, y).square())
        w.fill_diagonal_(0)
        pull = ((12 if early else 1) * p - w / w.sum()) * w
        grad = 4 * (pull.sum(1, keepdim=True) * y - pull @ y)                         # (N, 2)
        gains = torch.where((grad > 0) == (step > 0), gains * 0.8, gains + 0.2).clamp(min=0.01)
        step = (0.5 if early else 0.8) * step - max(n / 12, 50) * gains * grad
        y = y + step
        y = y - y.mean(0)
    return y


def affinities(d2, perplexity):
    """p_j|i ~ exp(-beta_i d2_ij), rows sum to 1, beta_i by bisection so that the entropy of each is log perplexity."""
    d2 = (d2 / d2.mean()).fill_diagonal_(math.inf)          # p_i|i = 0
    low, high = (torch.full((len(d2), 1), end, dtype=d2.dtype) for end in (-60.0, 60.0))              # of log beta
    for _ in range(60):
        middle = (low + high) / 2
        p = (-middle.exp() * d2).softmax(1)
        wide = -(p * p.clamp(min=1e-300).log()).sum(1, keepdim=True) > math.log(perplexity)
        low, high = torch.where(wide, middle, low), torch.where(wide, high, middle)
    return p


# ---------------------------------------------------------------------------------------------------------------------
# Memorisation
# ---------------------------------------------------------------------------------------------------------------------

def fingerprints(images):
    """uint8 (N, C, H, W) -> float32 (N, 1024): grey, 32x32 by area, mean 0, length 1. Dot products are correlations."""
    out = []
    for rows in runtime.chunks(len(images), 256):
        x = torch.from_numpy(np.ascontiguousarray(images[rows])).float()
        if x.shape[1] == 3:
            x = (x * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
        x = F.adaptive_avg_pool2d(x, (32, 32)).flatten(1)
        out.append(F.normalize(x - x.mean(1, keepdim=True), dim=1, eps=1e-3))
    return torch.cat(out)


def nearest(x, y, itself=False, block=1024):
    """Of each x_i the nearest y_j: distances (N,) and places j (N,), for rows of length 1, ||x - y||^2 = 2 - 2 x . y.

    itself: x and y are the same rows, and a row is not its own neighbour.
    """
    found = []
    for rows in runtime.chunks(len(x), block):
        likeness = x[rows] @ y.T
        if itself:
            likeness[torch.arange(len(likeness)), torch.arange(rows.start, rows.stop)] = -2
        found.append(likeness.max(1))
    best, place = (torch.cat(parts) for parts in zip(*found))
    return (2 - 2 * best).clamp(min=0).sqrt(), place


def memorisation(train, held_out, fake, mirror=False):
    """Whether generated pictures are copies of training pictures: a dict of numbers. uint8 (N, C, H, W) each.

    d(x): distance of x to the nearest training picture, by `fingerprints`. Real pictures that were held out say what is
    usual: about 1 % of honest fakes lie nearer than the 1st percentile of theirs, and a share c of copies makes that
    about 1 % + c.
      share     of the fakes nearer than that; low, high: its 95 % interval (Wilson); expected: r / (H + 1), where the
                percentile is the r-th smallest of H
      chance    to find so many or more if fakes and held-out pictures came from one distribution (exact: ranks).
                alarm: it is under 1 %
      authentic, authentic_held_out: AuthPct (Alaa et al. 2022): pictures whose nearest training picture has a training
                neighbour nearer than they are. To be read beside one another only
      ratio     median d of fakes over that of held-out pictures; far over 1: the fakes are unlike any real picture
      pairs     (fake, training picture, d, mirrored) of the eight closest
    mirror: also compare with the training pictures mirrored. Raises ValueError for fewer than 20 held out.
    """
    if len(held_out) < 20 or len(train) < 2:
        raise ValueError(f"the check for copies is calibrated on held-out pictures and needs 20 of them; there are "
                         f"{len(held_out)}")
    bank = known = fingerprints(train)
    if mirror:
        bank = torch.cat([known, known.view(-1, 32, 32).flip(2).flatten(1)])
    own, _ = nearest(known, known, itself=True)
    d_held_out, place_held_out = nearest(fingerprints(held_out), bank)
    d_fake, place = nearest(fingerprints(fake), bank)
    n, h = len(d_fake), len(d_held_out)
    r = max(1, round(h / 100))
    below = int((d_fake < d_held_out.sort().values[r - 1]).sum())
    low, high = wilson(below, n)
    chance = rank_chance(below, n, r, h)
    closest = d_fake.argsort()[:8]
    return dict(
        share=below / n, low=low, high=high, expected=r / (h + 1), chance=chance, alarm=chance < 0.01,
        authentic=float((d_fake > own[place % len(known)]).double().mean()),
        authentic_held_out=float((d_held_out > own[place_held_out % len(known)]).double().mean()),
        ratio=float(d_fake.median() / d_held_out.median().clamp(min=1e-6)), fakes=n, held_out=h, train=len(known),
        pairs=[(int(k), int(place[k]) % len(known), float(d_fake[k]), bool(place[k] >= len(known))) for k in closest])


def wilson(k, n, z=1.96):
    """Interval for a share of which k of n were found. Wilson 1927."""
    p, centre = k / n, (k / n + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def rank_chance(c, n, r, h):
    """P(at least c of n fakes lie below the r-th smallest of h held-out values), if all n + h come from one
    distribution: among the first c + r - 1 of all there are then at most r - 1 held out. Hypergeometric."""
    def log_choose(a, b):
        return math.lgamma(a + 1) - math.lgamma(b + 1) - math.lgamma(a - b + 1)

    first = c + r - 1
    return min(1.0, sum(math.exp(log_choose(h, j) + log_choose(n, first - j) - log_choose(n + h, first))
                        for j in range(min(r, first + 1)) if first - j <= n))


# ---------------------------------------------------------------------------------------------------------------------
# Pictures to compare
# ---------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def sample(G, n, seed=0, batch=64, progress=False):
    """n pictures of G, as they would be on disk: uint8 array (N, C, H, W). The same for the same (G, n, seed, batch).

    G: z (N, G.config["latent"]) -> [-1, 1]. It is in eval mode while it draws, so that BatchNorm uses its running
    statistics and no picture depends on its batch, and then as it was. Only an own stream of random numbers is used.
    """
    device, training = next(G.parameters()).device, G.training
    stream, out = torch.Generator().manual_seed(seed), []
    G.eval()
    try:
        for rows in runtime.chunks(n, batch, "sampling" if progress else ""):
            z = torch.randn(rows.stop - rows.start, G.config["latent"], generator=stream)
            out.append(data.to_uint8(G(z.to(device))).cpu().contiguous())
    finally:
        G.train(training)
    return torch.cat(out).numpy()


def noise(kind, n, like, seed=0):
    """What FID is at worst: n pictures of noise with the mean and deviation of `like` in each channel, uint8.

    kind: "gaussian", each pixel by itself; "radial", that noise x (1 - distance from the centre / the largest).
    """
    random, (_, c, h, w) = np.random.RandomState(seed), like.shape
    some = np.asarray(like[:min(len(like), 1000)], np.float32)
    mean, std = (f((0, 2, 3))[None, :, None, None] for f in (some.mean, some.std))
    g = random.standard_normal((n, c, h, w)).astype(np.float32)
    if kind == "radial":
        y, x = np.meshgrid(np.linspace(-1, 1, h), np.linspace(-1, 1, w), indexing="ij")
        g *= (1 - np.hypot(x, y) / math.sqrt(2)).astype(np.float32)
    return (mean + std * g).round().clip(0, 255).astype(np.uint8)


class Source(NamedTuple):
    """One side of a comparison: pictures, or only the statistics of their features."""
    label: str
    images: object = None                                    # uint8 (N, C, H, W), an array or data.Rows
    names: list = None                                       # of files
    statistics: tuple = None                                 # (mu, sigma)

    def pictures(self):
        """Its pictures. ValueError when it has only statistics."""
        if self.images is None:
            raise ValueError(f"{self.label}: statistics do for --fid alone")
        return self.images


def load_source(path, size="", flag="--real"):
    """A folder or idx file, an array of uint8 pictures (.npy, .npz), or statistics (.npz with mu and sigma).

    Pictures of a folder are taken in colour and at their own size, which must be one, unless `size` says otherwise.
    Exact copies count, as they do in an array: a generator that repeats itself is judged by its repetitions too.
    """
    path = str(path)
    if path.endswith((".npy", ".npz")):
        return load_arrays(path, flag)
    try:
        items = data.find_items(path)
        recipe = data.Recipe(data.parse_size(size or own_size(items, path, flag)), channels="3")
        pictures = data.load(path, recipe.size, channels="3")
        array, found = data.cached(path, items, recipe)      # what `load` has just read, with the copies
    except (OSError, ValueError) as error:
        raise type(error)(str(error).replace("--data", flag)) from error
    for line in data.describe(path, pictures._replace(left_out=found["left_out"]))[1:]:
        runtime.say(line)
    return Source(f"{len(found['rows']):,} pictures of {path}", data.Rows(array, found["rows"]), found["names"])


def load_arrays(path, flag):
    try:
        with np.load(path) if path.endswith(".npz") else contextlib.nullcontext({"": np.load(path)}) as file:
            arrays = {name: file[name] for name in file}
    except Exception as error:
        raise ValueError(f"{flag} {path} cannot be read ({runtime.first_line(error)})") from error
    if {"mu", "sigma"} <= arrays.keys():
        return Source(f"statistics in {path}", statistics=(arrays["mu"], arrays["sigma"]))
    images = next((x for x in arrays.values() if x.ndim == 4 and x.dtype == np.uint8), None)
    if images is not None and images.shape[1] not in (1, 3) and images.shape[3] in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    if images is None or images.shape[1] not in (1, 3):
        raise ValueError(f"{flag} {path} holds neither statistics (mu, sigma) nor pictures: uint8 (N, C, H, W) or "
                         f"(N, H, W, C) with 1 or 3 channels")
    return Source(f"{len(images):,} pictures of {path}", images)


def own_size(items, path, flag):
    """The one size that all pictures have, as text."""
    sizes = set()
    for item in items:
        with contextlib.suppress(Exception):                 # what cannot be read is left out later, and named
            raw = item.read()
            with Image.fromarray(raw) if isinstance(raw, np.ndarray) else Image.open(io.BytesIO(raw)) as im:
                turned = im.getexif().get(0x0112, 1) >= 5
                sizes.add((im.width, im.height) if turned else (im.height, im.width))
    if len(sizes) != 1:
        some = ", ".join("x".join(map(str, size)) for size in sorted(sizes)[:3])
        raise ValueError(f"{flag} {path} holds pictures of several sizes ({some} ...): say what to bring them to, as "
                         "in --size 64" if sizes else f"{flag} {path}: none of its files can be read")
    return "x".join(map(str, sizes.pop()))


SCRIPTS = ("train_wgan.py", "train_dcgan.py")


class TrainedRun(NamedTuple):
    """A run to be judged."""
    folder: Path
    G: nn.Module                                             # the averaged generator
    step: int
    real: Source                                             # its training pictures
    held_out: object                                         # uint8 (N, C, H, W)
    mirror: bool                                             # whether it mirrored them


def load_run(path, where="", device="cpu"):
    """The run folder `path` ("": the newest), or one file of its generators/. where: where its pictures are now."""
    file = Path(path) if path.endswith(".pt") and Path(path).is_file() else None
    folder = runtime.find_run(os.path.relpath(file.absolute().parent.parent) if file else path, SCRIPTS)
    saved = runtime.read_checkpoint(folder)
    flags = argparse.Namespace(**{**saved["flags"], **({"data": where} if where else {})})
    G, step = gan.load_generator(file or folder, device), saved["step"]
    if file:
        step = int(file.stem[5:]) if file.stem[5:].isdigit() else torch.load(file, weights_only=True).get("step", step)
    train = data.load_flags(flags, "train")
    held_out = data.load_flags(flags, "heldout", 0)
    real = Source(f"{len(train.images):,} training pictures of {flags.data}", train.images, train.names)
    return TrainedRun(folder, G, step, real, held_out.images, flags.flip)


# ---------------------------------------------------------------------------------------------------------------------
# Scores during training
# ---------------------------------------------------------------------------------------------------------------------

def judge(args, run, images):
    """For the training scripts' --evaluate-every: a function of (G, step) that logs FID and KID as `fid` and `kid`.

    --evaluate-n training pictures (`images`) against as many of G, through --evaluate-features. The generator with the
    lowest KID, which does not depend on their number, is kept as generators/best.pt. Leaves all random numbers alone.
    """
    try:
        extract = load_features(args.evaluate_features, device=run.device)
    except (OSError, ValueError) as error:                   # its advice names the flags of this script
        advice = str(error).replace(" or name it with --weights FILE", "").replace("--features", "--evaluate-features")
        raise type(error)(advice) from None
    chosen = np.random.RandomState(args.seed).permutation(len(images))[:args.evaluate_n]
    real = extract(images[np.sort(chosen)], progress="features of real pictures")
    how = f"{len(real):,} real pictures v {args.evaluate_n:,} drawn, through {extract.name}"
    runtime.say(f"FID and KID: {how}")

    def measure(G, step):
        fake = extract(sample(G, args.evaluate_n, args.seed, args.batch))
        now = dict(fid=fid(real, fake), kid=kid(real, fake)[0])
        run.remark(**now)
        kept = run.folder / "generators" / "best.pt"
        best = torch.load(kept, map_location="cpu", weights_only=True) if kept.exists() else {}
        if now["kid"] < best.get("kid", math.inf) or best["how"] != how:            # one measured otherwise is no rival
            saved = {**gan.saved_generator(G), **now, "step": step, "how": how}
            run.write("generators/best.pt", lambda path: torch.save(saved, path))

    return measure


# ---------------------------------------------------------------------------------------------------------------------
# python evaluate.py
# ---------------------------------------------------------------------------------------------------------------------

WHAT = {"fid": "FID (Heusel et al. 2017)", "kid": "KID (Binkowski et al. 2018)",
        "is": "Inception Score (Salimans et al. 2016)", "pr": "precision and recall, density and coverage",
        "ssim": "how alike two pictures of a kind are, by SSIM; with --pairs, how alike the two of a pair are",
        "memorisation": "are training pictures copied? Measured against held-out ones",
        "ceiling": "FID of noise, too", "sweep": "sweep.png: FID against the number of real pictures and over the run"}


def parse_arguments(argv=None):
    parser = runtime.Parser("evaluate.py", __doc__)
    parser.add_argument("run", nargs="?", default="", help="a run folder, or a file of its generators/ (the "
                        "newest run)")
    add = parser.add_argument_group("numbers (--fid --kid when none is named)").add_argument
    for name, words in WHAT.items():
        add(f"--{name}", action="store_true", help=words)
    add("--tsne", default="", metavar="FILE", help="draw real, fake and noise in the plane (van der Maaten et al. "
        "2008)")
    add("--all", action="store_true", help="all of these; --tsne into tsne.png")
    add = parser.add_argument_group("pictures").add_argument
    add("--data", default="", help="where the pictures of the run are now, when they have moved")
    add("--real", default="", help="a folder, an idx file, uint8 pictures (.npy, .npz) or statistics (.npz: mu, sigma)")
    add("--fake", default="", help="the same, in the place of a run")
    add("--held-out", default="", metavar="FOLDER", help="real pictures that were not trained on, when there is no run")
    add("--pairs", action="store_true", help="picture k of --real belongs to picture k of --fake")
    add("--size", default="", help="bring the pictures of folders to 64 or 288x512 first (their own size)")
    add("--n", type=runtime.positive, metavar="N", help="pictures of a kind (as many as there are real, up to 10000)")
    add("--seed", type=runtime.number(int, 0, 2**32), default=0, help="of all that is drawn (%(default)s)")
    add = parser.add_argument_group("the network").add_argument
    add("--features", default="inception", help="inception; random, which needs no download; or a file of your own, "
        "TorchScript or torch.export (%(default)s)")
    add("--dims", type=int, default=2048, choices=DIMS, help="which layer (%(default)s)")
    add("--weights", default="", metavar="FILE", help="of inception (torch's cache, else a download)")
    add("--resize", default=DIALECTS[0], choices=DIALECTS, help="whose way to 299x299 (%(default)s)")
    add("--batch", type=runtime.number(int, 0), default=0, help="pictures at a time; 0, what suits the device (0)")
    add("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu (%(default)s)")
    add("--perplexity", type=runtime.number(float, 1), default=30.0, help="of t-SNE (%(default)s)")
    add = parser.add_argument_group("files").add_argument
    add("--json", default="", metavar="FILE", help="where the numbers go (metrics.json of the run)")
    add("--save-stats", default="", metavar="FILE", help="only write mu and sigma of the real pictures, as pytorch-fid "
        "reads them (.npz)")
    args = parser.parse_args(argv)
    if args.all or not (args.tsne or any(getattr(args, name) for name in WHAT)):
        for name in WHAT if args.all else ("fid", "kid"):
            setattr(args, name, True)
    if args.save_stats and not args.save_stats.endswith(".npz"):
        parser.error("--save-stats FILE ends in .npz")
    if args.run and args.real and args.fake:
        parser.error("with --real and --fake there is nothing to take from a run: leave it out")
    if args.pairs and not (args.real and args.fake):
        parser.error("--pairs compares picture by picture: give --real and --fake")
    return args


class Comparison:
    """Real beside fake: their features, taken when they are asked for and once, and the table of what was found."""

    def __init__(self, args, network, real, fake, run):
        self.args, self.network, self.run, self.taken = args, network, run, {}
        self.train = run.real if run else real              # all of them: --n leaves none of the possible originals out
        self.real, self.fake = of_one_number(args, real, fake, run)
        self.folder = run.folder if run else Path(".")
        self.json_path = Path(args.json) if args.json else run.folder / "metrics.json" if run else None
        self.about = dict(real_is=self.real.label, fake_is=self.fake.label, seed=args.seed,
                          **({"features": network.name, "resize": args.resize} if network else {}),
                          **({"step": run.step} if run else {}))

    def extract(self, images, what):
        return self.network(images, self.args.batch, what)

    def features(self, side):
        if side not in self.taken:
            self.taken[side] = self.extract(getattr(self, side).pictures(), f"features of {side} pictures")
        return self.taken[side]

    def both(self):
        return self.features("real"), self.features("fake")

    def halves(self):
        """Two disjoint sets of real features and one of fake, all of one size."""
        real, fake = self.both()
        n = min(len(real) // 2, len(fake))
        if n < 2:
            raise ValueError(f"{self.real.label} and {self.fake.label} are too few to compare: take at least 4 and 2")
        return real[:n], real[n:2 * n], fake[:n]

    def tell(self, words, text, note="", name="", **value):
        """A line of the table; one with a name goes into the json file too, at once."""
        runtime.say(f"{words:<26} {text:>15}   {note}".rstrip())
        if not (name and self.json_path):
            return
        found = {}
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(self.json_path.read_text("utf-8"))
        found[name] = {**value, **self.about}
        runtime.write(self.json_path, lambda path: path.write_text(json.dumps(found, indent=1) + "\n", "utf-8"))


def tell_fid(c):
    """FID; and at half the number, where there are two sets of real pictures, beside its floor."""
    if c.real.statistics or c.fake.statistics:
        sides = [getattr(c, side).statistics or statistics(c.features(side)) for side in ("real", "fake")]
        value = frechet_distance(*sides[0], *sides[1])
        c.tell("FID", f"{value:.4f}", f"{c.real.label} v {c.fake.label}", "fid", value=value)
        return
    (real, fake), (a, b, half) = c.both(), c.halves()
    value, same, floor = fid(real, fake), fid(a, half), fid(a, b)
    c.tell("FID", f"{value:.4f}", f"{len(real):,} real v {len(fake):,} fake", "fid", value=value, real=len(real),
           fake=len(fake))
    c.tell(f"  at N = {len(a):,}", f"{same:.4f}", f"{len(a):,} real v {len(a):,} fake", "fid_half", value=same,
           n=len(a))
    c.tell(f"  floor at N = {len(a):,}", f"{floor:.4f}", "real v other real: what no generator can better", "fid_floor",
           value=floor, n=len(a))
    if min(len(real), len(fake)) < 2048:
        runtime.say(f"  note: with fewer than 2,048 pictures (here {min(len(real), len(fake)):,}) FID comes out too "
                    "high, the more so the fewer: compare it only at the same N; KID is free of that")


def tell_kid(c):
    if c.args.fid and (c.real.statistics or c.fake.statistics):
        return runtime.say("KID: left out: statistics do for FID alone")
    a, b, _ = c.halves()
    for words, name, x, y, note in (("KID", "kid", *c.both(), ""),
                                    (f"  floor at N = {len(a):,}", "kid_floor", a, b, "; 0 but for chance")):
        (mean, std), m = kid(x, y, seed=c.args.seed), min(1000, len(x), len(y))
        how = f"all {m:,} v {m:,} at once" if len(x) == len(y) == m else f"+- {std:.5f} over 100 subsets of {m:,}"
        c.tell(words, f"{mean:.5f}", how + note, name, value=mean, std=std, subset=m)


def tell_is(c):
    real, fake = c.both()
    if c.network.fc is None:
        raise ValueError("--is needs the classes of inception: not with a network of your own, nor with --dims")
    if min(len(real), len(fake)) < 100:
        raise ValueError("--is takes means over ten parts: at least 100 pictures of each kind")
    fc = c.network.fc.cpu()
    (mean, std), (top, top_std) = (inception_score(f @ fc.T) for f in (fake, real))
    c.tell("Inception Score", f"{mean:.4f}", f"+- {std:.4f} over 10 parts; real pictures {top:.4f} +- {top_std:.4f}; "
           "says little of pictures of one kind of thing", "is", value=mean, std=std, real=top, real_std=top_std)


def tell_pr(c):
    a, b, half = c.halves()
    for k, names, measure in ((3, ("precision", "recall"), precision_recall),
                              (5, ("density", "coverage"), density_coverage)):
        for name, value, top in zip(names, measure(a, half, k), measure(a, b, k)):
            c.tell(name, f"{value:.4f}", f"k = {k}, N = {len(a):,}; real v other real {top:.4f}", name, value=value,
                   real=top, k=k, n=len(a))


def tell_ssim(c):
    """Aligned pairs, or how alike two pictures of a kind are: a low value for the fakes is variety."""
    real, fake = c.real.pictures(), c.fake.pictures()
    side = min(*real.shape[2:], *fake.shape[2:])
    scales = max((s for s in range(1, 6) if side >= 11 * 2 ** (s - 1)), default=1)
    if c.args.pairs:
        psnrs, ssims, msssims = in_pairs(real, fake, scales)
        c.tell("PSNR of pairs", f"{psnrs:.4f}", "dB, whole pictures", "psnr", value=psnrs)
        c.tell("SSIM of pairs", f"{ssims:.4f}", "1: equal", "ssim", value=ssims)
        c.tell("MS-SSIM of pairs", f"{msssims:.4f}", f"over {scales} scales", "ms_ssim", value=msssims, scales=scales)
        return
    found = []
    for source in (c.real, c.fake):                          # in an order drawn at random: neighbours are any two
        half = min(len(source.images), 1000) // 2
        if not half:
            raise ValueError(f"{source.label}: --ssim needs at least two")
        found.append(in_pairs(source.images[:half], source.images[half:2 * half], scales)[2])
    c.tell("MS-SSIM between fakes", f"{found[1]:.4f}", f"between reals {found[0]:.4f}, over {scales} scales; "
           "well above: too alike", "ms_ssim_diversity", value=found[1], real=found[0], scales=scales)


def in_pairs(a, b, scales, block=64):
    """Mean PSNR, SSIM and MS-SSIM of uint8 pairs."""
    if a.shape != b.shape:
        raise ValueError(f"pairs are of one number and size, not {tuple(a.shape)} and {tuple(b.shape)}")
    pairs = [(a[rows], b[rows]) for rows in runtime.chunks(len(a), block)]
    return [float(torch.cat([measure(x, y, 255, *more) for x, y in pairs]).mean())
            for measure, *more in ((psnr,), (ssim,), (ms_ssim, scales))]


def tell_ceiling(c):
    real = c.features("real")
    for kind in ("gaussian", "radial"):
        made = noise(kind, len(real if c.fake.images is None else c.fake.images), c.real.images, c.args.seed)
        value = fid(real, c.extract(made, f"features of {kind} noise"))
        c.tell(f"FID of {kind} noise", f"{value:.4f}", f"{len(real):,} real v {len(made):,}", f"fid_{kind}_noise",
               value=value)


def tell_memorisation(c):
    if not (c.run or c.args.held_out):
        raise ValueError("--memorisation is calibrated on real pictures that were not trained on: name their folder "
                         "with --held-out")
    held_out = c.run.held_out if c.run else load_source(c.args.held_out, c.args.size, "--held-out").pictures()
    train, fake = c.train.pictures(), c.fake.pictures()
    found = memorisation(train, held_out, fake, bool(c.run and c.run.mirror))
    pairs = found.pop("pairs")
    c.tell("nearer than held-out", f"{found['share']:.2%}", f"of {found['fakes']:,} fakes; 95 %: {found['low']:.2%} to "
           f"{found['high']:.2%}; {found['expected']:.2%} expected of honest ones", "memorisation", **found)
    c.tell("AuthPct", f"{found['authentic']:.2%}", f"of {found['held_out']:,} held-out pictures "
           f"{found['authentic_held_out']:.2%}")
    c.tell("median distance", f"{found['ratio']:.3f}", "x that of held-out pictures; far over 1: unlike any real one")
    made = [fake[k] for k, *_ in pairs]
    kept = [train[k][..., ::-1] if mirrored else train[k] for _, k, _, mirrored in pairs]
    sheet = torch.cat([F.interpolate(torch.from_numpy(x.copy())[None].float(), train.shape[2:]).expand(-1, 3, -1, -1)
                       for x in made + kept])
    out = c.folder / "memorisation.png"
    data.save_grid(out, data.to_float(sheet), columns=len(pairs))
    verdict = "ALARM: too many fakes lie too near to training pictures" if found["alarm"] else \
        "no evidence of copying at 32x32 pixels"
    runtime.say(f"  {verdict} (so many by accident: chance {found['chance']:.2g}); the eight closest, above the "
                f"training pictures they are closest to: {out}")


def tell_sweep(c):
    """sweep.png: how FID falls with the number of real pictures, for fakes and for other reals; FID over the run."""
    real, fake = c.both()
    other, rows = real[len(real) // 2:], []
    for n in np.unique(np.linspace(max(2, len(real) // 20), len(real), 10).round().astype(int)):
        rows.append({"reals": int(n), "fake": fid(real[:n], fake)})
        if n <= len(real) // 2:
            rows[-1]["other reals"] = fid(real[:n], other)
    for file in saved_generators(c.run.folder) if c.run else []:
        made = sample(gan.load_generator(file, c.network.device), len(fake), c.args.seed)
        step = int(file.stem[5:])
        rows.append({"step": step, "FID": fid(real, c.extract(made, f"features at step {step}"))})
        c.tell(f"FID at step {step}", f"{rows[-1]['FID']:.4f}", f"{len(real):,} real v {len(fake):,} fake")
    out = c.folder / "sweep.png"
    data.save_curves(out, rows, [(f"FID of {len(fake):,} fakes, and of {len(other):,} other reals, against N reals",
                                  ("fake", "other reals"), "reals"),
                                 (f"FID over the run, {len(real):,} real v {len(fake):,} fake", ("FID",))])
    c.tell("sweep", f"{len(rows)} points", f"drawn in {out}", "sweep", points=rows)


def saved_generators(folder, most=12):
    files = sorted((folder / "generators").glob("step-*.pt"))
    return data.spread(files, most)


def tell_tsne(c):
    path = c.args.tsne or c.folder / "tsne.png"
    sides = {side: c.features(side)[:DRAWN] for side in ("real", "fake")}
    for kind in ("gaussian", "radial"):
        sides[f"{kind} noise"] = c.extract(noise(kind, DRAWN // 6, c.real.images, c.args.seed), f"{kind} noise")
    y = tsne(torch.cat(list(sides.values())), c.args.perplexity, seed=c.args.seed, progress=True)
    scatter(path, dict(zip(sides, y.split([len(f) for f in sides.values()]))))
    c.tell("t-SNE", f"{len(y):,} points", f"drawn in {path}; perplexity {c.args.perplexity:g}, seed {c.args.seed}")


def scatter(path, groups, side=800):
    """Points {name: (N, 2)} in colours, with a legend."""
    colours = [(31, 119, 180), (214, 69, 65), (120, 120, 120), (222, 165, 40)]
    y = torch.cat(list(groups.values()))
    low, span = y.amin(0), (y.amax(0) - y.amin(0)).max().clamp(min=1e-9)
    chart = Image.new("RGB", (side, side + 40), "white")
    draw, left = ImageDraw.Draw(chart), 20
    for (name, points), colour in zip(groups.items(), colours):
        words = f"{name} ({len(points)})"
        for u, v in ((points - low) / span * (side - 40) + 20).tolist():
            draw.ellipse((u - 3, 40 + v - 3, u + 3, 40 + v + 3), colour)
        draw.ellipse((left, 15, left + 10, 25), colour)
        draw.text((left + 16, 20), words, (40, 40, 40), data.font(15), anchor="lm")
        left += 40 + draw.textlength(words, data.font(15))
    chart.save(path)


def shuffled(source, n, seed):
    """A source with at most n of its pictures, in an order drawn at random: halves of it are fair."""
    if source.images is None:
        return source
    order = np.random.RandomState(seed).permutation(len(source.images))[:n]
    images = source.images if isinstance(source.images, data.Rows) else np.moveaxis(source.images, 1, 3)
    label = source.label if n >= len(source.images) else f"{n:,} of {source.label}"
    return source._replace(images=data.Rows(images, order), label=label)


def check_pairs(real, fake):
    """Raises ValueError unless picture k of --real belongs to picture k of --fake: one name, or one number of rows."""
    stems = [[str(Path(name).with_suffix("")) for name in source.names or ()] for source in (real, fake)]
    if stems[0] != stems[1]:
        odd = sorted(set(stems[0]) ^ set(stems[1]))
        raise ValueError(f"--pairs: a picture of --real belongs to that of --fake which has its name, and {len(odd)} "
                         f"have no partner, {odd[0] if odd else '(order)'} for one")
    if len(real.pictures()) != len(fake.pictures()):
        raise ValueError(f"--pairs: {real.label} and {fake.label} are not of one number")


def open_sources(args, device):
    """(real, fake, run), None for a fake that is still to be drawn and where no run is needed."""
    run = None if args.real and (args.fake or args.save_stats) else load_run(args.run, args.data, device)
    size = args.size or ("x".join(map(str, run.real.images.shape[2:])) if run else "")
    real = load_source(args.real, size, "--real") if args.real else run.real
    fake = load_source(args.fake, size, "--fake") if args.fake and not args.save_stats else None
    if args.pairs and fake:
        check_pairs(real, fake)
    return real, fake, run


def of_one_number(args, real, fake, run):
    """Both sides with --n pictures, in random order, which is the same for pairs; those of a run are drawn."""
    most = 10_000 if any(getattr(args, name) for name in WHAT) else DRAWN             # --tsne alone takes no more
    n = args.n or (most if real.images is None else min(most, len(real.images)))
    if fake is None:
        fake = Source(f"{n:,} pictures of {run.folder} at step {run.step}", sample(run.G, n, args.seed, progress=True))
    return shuffled(real, n, args.seed), shuffled(fake, n, args.seed)


def main(argv=None):
    args = parse_arguments(argv)
    with runtime.plain_errors("evaluate.py"):
        device = runtime.pick_device(args.device)
        real, fake, run = open_sources(args, device)
        network = None
        if args.save_stats or args.tsne or any(getattr(args, name) for name in set(WHAT) - {"ssim", "memorisation"}):
            network = load_features(args.features, args.weights, args.resize, device, args.dims)
            runtime.say(f"seen through: {network.name}")
        if args.save_stats:
            if real.images is None:
                raise ValueError(f"{real.label}: these are statistics already")
            mu, sigma = statistics(network(real.images, args.batch, "features"))
            runtime.write(args.save_stats, lambda path: np.savez_compressed(path, mu=mu, sigma=sigma))
            return runtime.say(f"mu and sigma of {real.label} are in {args.save_stats}")
        c = Comparison(args, network, real, fake, run)
        runtime.say(f"real: {c.real.label}\nfake: {c.fake.label}")
        sizes = [source.images.shape[2:] for source in (c.real, c.fake) if source.images is not None]
        if len(set(sizes)) == 2:
            runtime.say("note: real {}x{}, fake {}x{}, each brought to 299x299 by itself; --size makes both one size "
                        "first".format(*sizes[0], *sizes[1]))
        table = {"fid": tell_fid, "kid": tell_kid, "is": tell_is, "pr": tell_pr, "ssim": tell_ssim,
                 "ceiling": tell_ceiling, "memorisation": tell_memorisation, "sweep": tell_sweep, "tsne": tell_tsne}
        for name, tell in table.items():
            if getattr(args, name) or args.all:
                try:
                    tell(c)
                except ValueError as error:
                    if not args.all:
                        raise
                    runtime.say(f"{name}: left out: {error}")
        if c.json_path:
            runtime.say(f"all of it is in {c.json_path}")


if __name__ == "__main__":
    runtime.call(main, "evaluate.py")
