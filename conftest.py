"""What the tests share: small runs, drawn images, a stub of `Run`."""

import contextlib
import copy
import gzip
import math
import os
import signal
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import nn

import cli
import data
import decode
import generate
import inception
import inpainting
import runs
import train_dcgan
import train_pix2pix
import train_wgan

HERE = Path(__file__).parent
LOADER = torch.utils.data.DataLoader
README, GUIDE = ((HERE / name).read_text("utf-8") for name in ("README.md", "GUIDE.md"))
torch.set_num_threads(1)                                             # nets this small are slower on two
for name, handler in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
    if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) == signal.SIG_IGN:
        signal.signal(getattr(signal, name), handler)                # under nohup, or in the background of a script


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="the tests that take longer too")


def pytest_collection_modifyitems(config, items):
    for item in items if not config.getoption("--slow") else ():
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: pytest --slow"))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def draw(folder, n=8, size=(20, 24), mode="RGB", suffix=".png"):
    """n images of noise, all different, in a new folder."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.RandomState(zlib.crc32(folder.name.encode()))
    for k in range(n):
        pixels = random.randint(0, 256, (*size, 3)).astype(np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / f"{k:03d}{suffix}")
    return folder


class Stub:
    """All that a loop needs of `Run`: it counts steps."""
    device, step, amp, folder = torch.device("cpu"), 0, contextlib.nullcontext(), Path(".")
    rank, world_size = 0, 1

    def __init__(self, args, script, images_per_step):
        self.args, Stub.images_per_step = args, images_per_step

    def resume(self, state, **_):
        Stub.state, Stub.before = state, copy.deepcopy({name: thing.state_dict() for name, thing in state.items()})

    def steps(self):
        return range(1, self.args.steps + 1)

    def nothing(self, *_, **__):
        return False

    due = log = log_once = write = save = nothing

    def capture(self, work):
        def call(*inputs):
            out = work(*inputs)
            assert not any(value.requires_grad for value in out.values())               # no graph leaves a step
            return out
        return call


# A run so small that a test can afford it. Odd batch and size on purpose.
TINY = ("--device cpu --data images --size 9x12 --features 4 --latent 5 --batch 5 --log-every 2 --sample-every 3 "
        "--save-every 4 --holdout 0 --flip --augment color,translation,cutout --seed 3").split()
SCRIPTS = {"wgan": (train_wgan, [*TINY, "--n-critic", "2"]), "dcgan": (train_dcgan, TINY)}


def train(*flags, script="wgan"):
    module, tiny = SCRIPTS[script]
    module.main([*tiny, *flags])


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


def read_image(file, **options):
    return decode.upright(Image.open(file), **options)


def write_idx(path, array, cut=None):
    raw = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(raw[:cut]) if path.suffix == ".gz" else raw[:cut])


BOOSTED = "--schedule boost --boost-d 0.2 --boost-g 0.2 --boost-length 4 --label-noise 0.3 --smooth 0.1"


def script(*flags, **options):
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen([sys.executable, HERE / "train_wgan.py", *flags], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, env=environment, **options)


def make_run(*flags):
    parser = cli.Parser("x.py", "")
    data.add_arguments(parser)
    cli.add_arguments(parser)
    run = runs.Run(parser.parse_args(["--device", "cpu", *flags]), "x.py", 10)
    run.resume({})
    return run


def draw_pairs(n=8, size=(20, 24), seed=0):
    """n smooth coloured images A and what is to be made of them, B: the negative, in grey; uint8."""
    random = np.random.RandomState(seed)
    coarse = [Image.fromarray(random.randint(0, 256, (4, 5, 3)).astype(np.uint8)) for _ in range(n)]
    soft = [im.resize(size[::-1], Image.Resampling.BICUBIC) for im in coarse]
    return [(im, ImageOps.invert(im.convert("L"))) for im in soft]


def write_pairs(here, pairs):
    """The same pairs in the two layouts: here/two/A, here/two/B and here/wide."""
    for folder in ("two/A/x", "two/B/x", "wide"):
        (here / folder).mkdir(parents=True)
    for k, (a, b) in enumerate(pairs):
        a.save(here / f"two/A/x/{k}.png")
        b.save(here / f"two/B/x/{k}.bmp")
        both = Image.new("RGB", (2 * a.width, a.height))
        both.paste(a, (0, 0))
        both.paste(b.convert("RGB"), (a.width, 0))
        both.save(here / f"wide/{k}.png")


def pair_flags(*flags):
    return train_pix2pix.parse_arguments(["--task", "pairs", "--size", "20x24", "--holdout", "0", *flags])


PIX = ("--device cpu --data images --size 17x12 --features 4 --batch 3 --log-every 2 --sample-every 3 --save-every 4 "
       "--flip --seed 3 --holdout 0.3 --warm-up 2").split()


class Tiny(nn.Module):
    """Features of images that cost nothing: means over a 4x4 grid."""

    def forward(self, x):
        return nn.functional.adaptive_avg_pool2d(x, 4).flatten(1)


@pytest.fixture
def tiny(here):
    """The file of such a network, for --network."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(Tiny(), torch.zeros(2, 3, 16, 16)), "tiny.pt")
    return "tiny.pt"


@pytest.fixture(scope="module")
def weights():
    return inception.random_weights()


def images_of(n, seed=0, size=(16, 16), channels=3, smooth=True):
    """uint8 (n, channels, *size): blobs, so that two of them differ by more than noise."""
    x = np.random.RandomState(seed).rand(n, channels, 5, 5) if smooth else np.random.RandomState(seed).rand(
        n, channels, *size)
    x = nn.functional.interpolate(torch.from_numpy(x), size, mode="bilinear")
    return (x * 255).round().to(torch.uint8).numpy()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with two tiny runs, runs/a (colour, wgan) and runs/b (dcgan), and their images."""
    folder = tmp_path_factory.mktemp("trained")
    draw(folder / "images", 12)
    before = os.getcwd()
    os.chdir(folder)
    try:
        train("--steps", "8", "--out", "runs/a")
        train("--steps", "2", "--out", "runs/b", script="dcgan")
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def at_runs(trained, monkeypatch):
    monkeypatch.chdir(trained)
    return trained


def make(*flags):
    generate.main(["--device", "cpu", *map(str, flags)])


def pixels_of(path):
    with Image.open(path) as im:
        return np.asarray(im)


def lively(G):
    """G with weights and BatchNorm statistics that show: images of contrast, means far from 0, gains far from 1."""
    for module in G.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.05, 0.4)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
        elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.normal_(module.weight, 0, 0.2)
    return G.eval().requires_grad_(False)


def holes(n=3, size=(12, 14)):
    """Masks of every kind, n of each, at the border of the image and inside it."""
    return torch.cat([inpainting.masks(kind, n, size, 5) for kind in inpainting.MASK_KINDS])


def spoiled(x, known, value=math.nan):
    """x with something else in the hole."""
    return torch.where(known > 0.5, x, torch.full_like(x, value))


def near(i, j, size):
    """The neighbours of a pixel that lie inside the image."""
    return [(a, b) for a, b in ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1))
            if 0 <= a < size[0] and 0 <= b < size[1]]


def untrained_enhancer(x, *_, **__):
    """One that changes something."""
    net = inpainting.Enhancer(x.shape[1]).requires_grad_(False)
    nn.init.normal_(net.correction[-1].weight, std=0.5)
    return net.eval()
