"""Images to features: Inception-v3 with the published FID weights or random ones, or a network of the user's own.

    extract = load_features()                               # or load_features("random"), load_features("network.pt")
    features = extract(images)                              # uint8 (N, C, H, W) -> float32 (N, D)
"""

import hashlib
import math
import socket
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import runtime

WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"            # its name ends in the first digits of its sha256
ADDRESS = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS}"
RESIZES = ("pytorch-fid", "torch-fidelity", "clean-fid")


class Convolution(nn.Module):
    """ReLU(BatchNorm(convolution)); after `fuse_batchnorm`, ReLU(convolution)."""

    def __init__(self, c_in, c_out, kernel, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


def branches(kind, c):
    """{name of a branch: its layers (channels, kernel)}; two kernels: a fork, its ends concatenated; the last branch
    begins with a pooling. c: the number of channels that differs among blocks of a kind."""
    return {
        "A": {"branch1x1": [(64, 1)], "branch5x5": [(48, 1), (64, 5)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3)],
              "branch_pool": [(c, 1)]},
        "B": {"branch3x3": [(384, 3)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3)], "branch_pool": []},
        "C": {"branch1x1": [(192, 1)], "branch7x7": [(c, 1), (c, (1, 7)), (192, (7, 1))],
              "branch7x7dbl": [(c, 1), (c, (7, 1)), (c, (1, 7)), (c, (7, 1)), (192, (1, 7))],
              "branch_pool": [(192, 1)]},
        "D": {"branch3x3": [(192, 1), (320, 3)], "branch7x7x3": [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)],
              "branch_pool": []},
        "E": {"branch1x1": [(320, 1)], "branch3x3": [(384, 1), (384, (1, 3), (3, 1))],
              "branch3x3dbl": [(448, 1), (384, 3), (384, (1, 3), (3, 1))], "branch_pool": [(192, 1)]}}[kind]


class Mixed(nn.Module):
    """One Inception block: `branches` side by side. B and D halve the map: each of their branches ends in stride 2."""

    def __init__(self, c_in, kind, c=0, pool=None):
        super().__init__()
        halves, self.chains = kind in "BD", []
        self.pool = nn.MaxPool2d(3, 2) if halves else pool or nn.AvgPool2d(3, 1, 1, count_include_pad=False)
        for branch, layers in branches(kind, c).items():
            names, width = [], c_in
            for depth, (c_out, *kernels) in enumerate(layers, 1):      # branch3x3; or branch3x3_1, branch3x3_2a, _2b
                stride, padding = (2, 0) if halves and depth == len(layers) else (1, "same")
                suffix = f"_{depth}" * (len(layers) > 1)
                names.append([branch + suffix + end for end in ("ab" if len(kernels) > 1 else [""])])
                for name, kernel in zip(names[-1], kernels):
                    self.add_module(name, Convolution(width, c_out, kernel, stride, padding))
                width = c_out * len(kernels)
            self.chains.append(names)

    def forward(self, x):
        ends = []
        for chain in self.chains:
            y = self.pool(x) if chain is self.chains[-1] else x
            for names in chain:
                forks = [getattr(self, name)(y) for name in names]
                y = forks[0] if len(forks) == 1 else torch.cat(forks, 1)
            ends.append(y)
        return torch.cat(ends, 1)


class Inception(nn.Module):
    """Inception-v3, TensorFlow's FID network of 2015: x (N, 3, 299, 299) in [-1, 1] -> (N, 2048).

    Szegedy et al. 2016, Rethinking the Inception architecture (arXiv 1512.00567). Unlike torchvision's: average pooling
    excludes the padding, the last block pools by maximum, 1008 classes. Names are those of the published weight file.
    """

    def __init__(self):
        super().__init__()
        layers = dict(
            Conv2d_1a_3x3=Convolution(3, 32, 3, 2), Conv2d_2a_3x3=Convolution(32, 32, 3),
            Conv2d_2b_3x3=Convolution(32, 64, 3, padding=1), maxpool1=nn.MaxPool2d(3, 2),                  # 73x73
            Conv2d_3b_1x1=Convolution(64, 80, 1), Conv2d_4a_3x3=Convolution(80, 192, 3), maxpool2=nn.MaxPool2d(3, 2),
            Mixed_5b=Mixed(192, "A", 32), Mixed_5c=Mixed(256, "A", 64), Mixed_5d=Mixed(288, "A", 64),      # 35x35
            Mixed_6a=Mixed(288, "B"), Mixed_6b=Mixed(768, "C", 128), Mixed_6c=Mixed(768, "C", 160),
            Mixed_6d=Mixed(768, "C", 160), Mixed_6e=Mixed(768, "C", 192), Mixed_7a=Mixed(768, "D"),        # 17x17, 8x8
            Mixed_7b=Mixed(1280, "E"), Mixed_7c=Mixed(2048, "E", pool=nn.MaxPool2d(3, 1, 1)))              # 8x8
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x):
        for layer in list(self.children())[:-1]:            # all but fc
            x = layer(x)
        return x.mean((2, 3))                                                         # (N, 2048, 8, 8) -> (N, 2048)


def fuse_batchnorm(net):
    """Fuse each BatchNorm into the convolution before it: the same function in fewer passes over memory."""
    for module in net.modules():
        if isinstance(module, Convolution):                 # in float64, so that each weight is rounded once
            module.conv = nn.utils.fuse_conv_bn_eval(module.conv.double(), module.bn.double()).float()
            module.bn = nn.Identity()
    return net


def random_weights(seed=0):
    """A state_dict for `Inception` that needs no download and is the same on every machine, to rounding.

    W ~ U(-a, a), a = sqrt(6 / fan_in) (He et al. 2015, arXiv 1502.01852). Each BatchNorm divides by the root mean
    square of its input for four synthetic images. Deviation: one number per layer, for a mean and variance per channel
    would amplify small differences until the scores meant nothing.
    """
    random = np.random.RandomState(seed)
    with torch.device("meta"):                              # leaves torch's random state alone
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


def inception_input(images, resize="pytorch-fid"):
    """uint8 (N, 1 or 3, H, W) -> float32 (N, 3, 299, 299), about [-1, 1], as the package does it. pytorch-fid: bilinear
    without antialiasing, 2 x / 255 - 1. torch-fidelity: TensorFlow 1's bilinear, (x - 128) / 128. clean-fid:
    antialiased bicubic, clipped to 0..255, (x - 128) / 128."""
    x = images.float()
    if resize == "pytorch-fid":
        x = F.interpolate(x / 255, (299, 299), mode="bilinear") * 2 - 1
    elif resize == "torch-fidelity":
        # TensorFlow 1 reads row i at i * H / 299; so does align_corners from H + 1 rows to 300.
        x = F.interpolate(F.pad(x, (0, 1, 0, 1), "replicate"), (300, 300), mode="bilinear", align_corners=True)
        x = (x[..., :299, :299] - 128) / 128
    elif resize == "clean-fid":
        x = (F.interpolate(x, (299, 299), mode="bicubic", antialias=True).clamp(0, 255) - 128) / 128
    else:
        raise ValueError(f"resize: expected one of {', '.join(RESIZES)}, got {resize!r}")
    return x.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)


class Features:
    """A feature network with its preprocessing, see `load_features`. batch: images at a time. name: to print beside a
    score. fc: (1008, 2048), from features to the logits of the Inception Score, or None."""

    def __init__(self, net, prepare, device, name, fc=None):
        self.net, self.prepare, self.device, self.name, self.fc = net, prepare, torch.device(device), name, fc
        self.batch = 16 if self.device.type == "cpu" else 128

    @torch.no_grad()
    def __call__(self, images, what=""):
        """uint8 (N, 1 or 3, H, W), an array or `data.ImageSubset` -> float32 (N, D) on the CPU. what: for progress."""
        if images.dtype != np.uint8 or len(images.shape) != 4 or images.shape[1] not in (1, 3) or not len(images):
            raise ValueError(f"expected NumPy images, uint8 (N, 1|3, H, W), got {images.dtype} {tuple(images.shape)}")
        out = []
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):               # TF32 keeps 10 bits
            for rows in runtime.batched_slices(len(images), self.batch, what):
                pixels = torch.from_numpy(np.ascontiguousarray(images[rows])).to(self.device)
                x = self.prepare(pixels)
                try:
                    y = self.net(x)
                    y = y[0] if isinstance(y, (tuple, list)) else y
                    out.append((y.mean((2, 3)) if y.ndim == 4 else y.flatten(1)).float().cpu())
                except Exception as error:                   # of one's own: it takes one size or batch, or gives a dict
                    raise runtime.UserError(f"{self.name}: given a batch of {tuple(x.shape)}, it fails: "
                                            f"{str(error).strip().rpartition(chr(10))[2]}") from error
        return torch.cat(out)


def find_weights():
    """The file of the published weights in torch's hub cache, where it is downloaded to, and verified, if need be.
    UserError, with the address and the path where it is expected."""
    folder, timeout = Path(torch.hub.get_dir()) / "checkpoints", socket.getdefaulttimeout()
    for name in (WEIGHTS, WEIGHTS.replace("pt_", "weights-", 1)):                     # the second is torch-fidelity's
        if (folder / name).is_file():
            return folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(20)
        runtime.print_rank0(f"downloading {ADDRESS} (91 MB) to {folder}")
        torch.hub.download_url_to_file(ADDRESS, str(folder / WEIGHTS), hash_prefix="6726825d")
    except (OSError, RuntimeError) as error:                 # no network, or a hash that does not match
        raise runtime.UserError(f"{ADDRESS} cannot be downloaded ({runtime.first_line(error)}): put it at "
                                f"{folder / WEIGHTS} (evaluate.py, complete.py: or --weights FILE), or use the feature "
                                "network random, whose scores compare only with one another") from error
    finally:
        socket.setdefaulttimeout(timeout)
    return folder / WEIGHTS


def build(weights):
    """`Inception` in eval mode with the tensors of a state_dict. RuntimeError if they do not fit."""
    with torch.device("meta"):
        net = Inception()
    net.load_state_dict(weights, assign=True)
    return net.float().eval().requires_grad_(False)


def read_network(path):
    """A network of the user's own from a file of torch.export.save (its name ends in .pt2) or torch.jit.save."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                      # newer torch deprecates TorchScript
        try:
            return (torch.export.load(path).module() if str(path).endswith(".pt2") else
                    torch.jit.load(path, map_location="cpu").eval())
        except Exception as error:
            raise runtime.UserError("feature network: expected inception, random, an exported program (.pt2) or a file "
                                    f"of TorchScript, got {path!r}: {runtime.first_line(error)}") from error


def load_features(name="inception", weights="", resize="pytorch-fid", device="cpu"):
    """The feature network that images are compared through: extract = load_features(); extract(images) -> (N, D).

    name: "inception", its weights from a file or by `find_weights`; "random", the same with `random_weights`; or a file
    of your own network, given float32 (N, 3, H, W) in [-1, 1]. resize: see `inception_input`. Raises UserError.
    """
    if name not in ("inception", "random"):                 # 1 / 127.5 rounded down: white is not above 1
        return Features(read_network(name).to(device),
                        lambda x: (x.float() * 0.0078431367 - 1).expand(-1, 3, -1, -1).contiguous(), device,
                        f"the network {Path(name).name} (compare only with scores through it)")
    if name == "random":
        net, description = build(random_weights()), "random Inception-v3 (compare only with scores through it)"
    else:
        path, description = Path(weights) if weights else find_weights(), "Inception-v3 of 2015"
        try:
            net = build(torch.load(path, map_location="cpu", weights_only=True))
        except Exception as error:                           # a damaged file makes torch.load raise almost anything
            raise runtime.UserError(f"{path} cannot be read as weights of the FID network, as {ADDRESS} can "
                                    f"({' '.join(str(error).split())[:160]})") from error
        if not hashlib.sha256(path.read_bytes()).hexdigest().startswith("6726825d"):
            description += f" with the weights of {path.name}, which are not the published ones"
    return Features(fuse_batchnorm(net).to(device, memory_format=torch.channels_last),
                    lambda x: inception_input(x, resize), device,
                    f"{description}, 2048 features, resized as {resize} does", net.fc.weight)
