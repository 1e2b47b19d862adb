"""Inception-v3, its weights, the three resizes, a network of the user's own: images to features."""

import contextlib
import hashlib
import math
import socket
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data
import runtime

WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"            # its name ends in the first digits of its sha256
ADDRESS = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS}"
DIALECTS = ("pytorch-fid", "torch-fidelity", "clean-fid")
DIMS = (64, 192, 768, 2048)


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
        """uint8 (N, 1 or 3, H, W), an array or `data.ImageSubset` -> float32 tensor (N, D) on the CPU.

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
            for rows in runtime.batched_slices(len(images), batch, what):
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
        runtime.print_rank0(f"downloading {ADDRESS} (91 MB) to {folder}")
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
