"""The tests: pytest test_gan.py. No GPU, no network, no pictures but those that a test draws; about a minute.

Equations are held against another spelling of the same equation (loops, closed forms, finite differences), with real
and fake different, so that a swapped sign or argument fails.
"""

import argparse
import base64
import contextlib
import copy
import errno
import gzip
import hashlib
import http.client
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import nn

import bench
import complete
import data
import evaluate
import gan
import generate
import runtime
import train_dcgan
import train_pix2pix
import train_wgan

HERE = Path(__file__).parent
LOADER = torch.utils.data.DataLoader
README = (HERE / "README.md").read_text("utf-8")
SIZES = [(8, 8), (9, 15), (16, 16), (28, 28), (31, 31), (33, 65), (64, 64), (96, 160), (100, 37), (128, 128),
         (287, 508), (240, 8), (511, 13), (512, 512), (1024, 9)]

torch.set_num_threads(1)                                             # nets this small are slower on two


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
    random = np.random.RandomState(zlib.crc32(folder.name.encode()))
    for k in range(n):
        pixels = random.randint(0, 256, (*size, 3)).astype(np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / f"{k:03d}{suffix}")
    return folder


class Stub:
    """All that a loop needs of `Run`: it counts steps."""
    device, step, amp, folder = torch.device("cpu"), 0, contextlib.nullcontext(), Path(".")
    rank, ranks = 0, 1

    def __init__(self, args, *_, **__):
        self.args = args

    def resume(self, state, **_):
        Stub.state, Stub.before = state, copy.deepcopy({name: thing.state_dict() for name, thing in state.items()})

    def steps(self):
        return range(1, self.args.steps + 1)

    def nothing(self, *_, **__):
        return False

    due = log = remark = write = save = nothing

    def capture(self, work, because=""):
        def call(*inputs, **plain):
            out = work(*inputs, **plain)
            values = out.values() if isinstance(out, dict) else [out]
            assert not any(getattr(value, "requires_grad", False) for value in values)     # no graph leaves a step
            return out
        return call


# A run so small that a test can afford it. Odd batch and size on purpose.
TINY = ("--device cpu --data pictures --size 9x12 --features 4 --latent 5 --batch 5 --log-every 2 --sample-every 3 "
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


def test_a_step_by_parts_is_the_step(here):
    torch.manual_seed(3)
    D = gan.Discriminator((8, 8), 2, 4).double()
    x = torch.randn(12, 2, 8, 8, dtype=torch.float64, requires_grad=True)

    def loss(x):
        return gan.generator_loss(D(x).square())

    for parts in (1, 2, 3, 5):                                        # 5: the last part is smaller
        whole, = torch.autograd.grad(loss(x), x)
        value = gan.by_parts(loss, 1 * x, parts) * 3.0
        slope, = torch.autograd.grad(value, x)
        assert torch.allclose(value, 3 * loss(x)) and torch.allclose(slope, 3 * whole, rtol=1e-12)
    draw(here / "pictures", 8)
    flags = ["--augment", "", "--batch", "6", "--precision", "fp32", "--norm", "layer", "--steps", "3"]
    for constraint in ("gp", "clip"):                                 # the same random numbers, the same weights
        norm = ["--constraint", constraint]
        train(*flags, *norm, "--out", f"{constraint}1")
        train(*flags, *norm, "--out", f"{constraint}3", "--accumulate", "3")
        one, three = (checkpoint(f"{constraint}{k}")["state"] for k in (1, 3))
        train(*flags, *norm, "--out", f"{constraint}0", "--steps", "1", "--lr", "0")
        start = checkpoint(f"{constraint}0")["state"]
        for net in "GD":                                              # not each weight: Adam makes much of rounding
            a, b, c = (torch.cat([w.flatten().float() for w in state[net].values()]) for state in (start, one, three))
            assert (b - c).norm() < 0.05 * (b - a).norm(), (constraint, net, (b - c).norm() / (b - a).norm())
            moments = [torch.cat([v.flatten() for known in state[f"opt_{net}"]["state"].values()   # of the gradients,
                                  for name, v in known.items() if name.endswith("_avg")])             # whose size does
                       for state in (one, three)]                     # not show in the weights
            assert (moments[0] - moments[1]).norm() < 0.05 * moments[0].norm(), (constraint, net)
        assert not same(one["D"], three["D"])                         # it did go another way
        one, three = (runtime.read_log(here / f"{constraint}{k}") for k in (1, 3))     # and its log is of the batch
        for a, b in zip(one, three):
            assert all(a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-4) for name in ("loss_D", "penalty"))


def torchrun(ranks, *command):
    """The output of a command run by so many processes of torchrun."""
    process = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                              str(ranks), *map(str, command)], capture_output=True, text=True, timeout=300,
                             env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)})
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


def test_two_processes_are_one_with_twice_the_batch(here):
    draw(here / "pictures", 9)
    (here / "step.py").write_text("""
import sys, torch, data, gan, runtime
torch.manual_seed(0)
D, x = gan.Discriminator((8, 8), 3, 4).double(), torch.randn(8, 3, 8, 8, dtype=torch.float64)
(r, n), opt = runtime.rank(), torch.optim.SGD(D.parameters(), 0.1)
if n > 1:
    runtime.join_ranks(torch.device("cpu"))
    opt.register_step_pre_hook(runtime.average_gradients)
part = x.chunk(n)[r]
slope = gan.input_gradient(D, part.requires_grad_()).flatten(1).norm(dim=1)      # the penalty, with no random numbers
(D(part).mean() + 10 * (slope - 1).square().mean()).backward()
opt.step()
pictures = data.load("pictures", (8, 8)).images
batches = data.batches(pictures, 4 // n, 1, 2, share=(r, n))
torch.save(([w for w in D.state_dict().values()], [next(batches) for _ in range(5)]), f"{n}-{r}.pt")
""")
    torchrun(1, "step.py"), torchrun(2, "step.py")
    (one, whole), (first, left), (second, right) = (torch.load(f"{name}.pt", weights_only=True)
                                                    for name in ("1-0", "2-0", "2-1"))
    assert same(first, second) and all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(one, first))
    assert all(torch.equal(a, torch.cat([b, c])) for a, b, c in zip(whole, left, right))


def test_training_by_two_processes(here):
    draw(here / "pictures", 9)
    said = torchrun(2, HERE / "train_wgan.py", *TINY, "--n-critic", 2, "--steps", 4, "--out", "runs/a")
    assert "2 processes" in said and said.count("done: 4 steps") == 1
    assert os.listdir("runs") == ["a"] or sorted(os.listdir("runs")) == [".cache", "a"]
    assert [row["step"] for row in map(json.loads, (here / "runs/a/log.jsonl").read_text().splitlines())] == [2, 4]
    said = torchrun(2, HERE / "train_wgan.py", "--resume", "runs/a", "--steps", 6)
    assert "going on after step 4" in said and checkpoint("runs/a")["step"] == 6
    train("--resume", "runs/a", "--steps", "7", "--device", "cpu")                    # and by one alone
    assert checkpoint("runs/a")["step"] == 7


def test_processes_draw_latents_of_their_own_and_train_the_same_network(here):
    draw(here / "pictures", 9)
    (here / "spy.py").write_text("""
import sys, torch, gan, runtime, train_dcgan
decisions, drawn, forward = [], [], gan.Generator.forward
gan.Generator.forward = lambda self, z: (drawn.append(z) if self.training else None, forward(self, z))[1]
for name in ("mode", "trains_D"):
    def spy(self, *loss, ask=getattr(train_dcgan.Schedule, name)):
        decisions.append(ask(self, *loss))
        return decisions[-1]
    setattr(train_dcgan.Schedule, name, spy)
for flags in ("--schedule boost --boost-d 0.3 --boost-g 0.3 --boost-length 2 --label-noise 0.4",
              "--schedule monitored --monitor-ratio 2"):
    train_dcgan.main([*sys.argv[1:], *flags.split()])
torch.save((decisions, drawn), f"{runtime.rank()[0]}.pt")
""")
    torchrun(2, "spy.py", *TINY, "--sample-every", 100, "--augment", "", "--steps", 15)
    (one, drawn), (other, more) = (torch.load(f"{k}.pt", weights_only=True) for k in (0, 1))
    assert one == other and {"both", "D", "G", True, False} == set(one)
    assert len(drawn) == len(more) > 20 and len({z.numpy().tobytes() for z in drawn + more}) == 2 * len(drawn)


def test_graphs_are_left_where_there_is_no_card(here, capsys):
    draw(here / "pictures", 8)
    if not torch.cuda.is_available():
        train("--steps", "2", "--out", "a", "--graphs")
        shown = capsys.readouterr().out
        for name in ("critic_step", "generator_step"):
            assert f"--graphs: {name} runs one operation at a time, because there is no NVIDIA card here" in shown
        train("--steps", "2", "--out", "b")
        a, b = (checkpoint(name)["state"] for name in "ab")
        assert same(a, b)


@pytest.mark.parametrize("works", [True, False])
def test_what_a_graph_is_given_and_gives(monkeypatch, capsys, works):
    """`capture` on a make-believe card: while it records, operations are noted down and none of them is run."""
    recording, streams = [], []

    class Graph:
        def __init__(self):
            self.operations = []

        def replay(self):
            for operation in self.operations:
                operation()

    @contextlib.contextmanager
    def graph(it, capture_error_mode):
        if not works:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        recording.append(it.operations)
        yield
        recording.pop()

    class Stream:
        def wait_stream(self, other):
            streams.append(other)

    for name, stand_in in dict(CUDAGraph=Graph, graph=graph, Stream=Stream, current_stream=Stream,
                               stream=contextlib.nullcontext).items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    total, out = torch.zeros(2), torch.zeros(2)              # what a step changes in place, and what it returns

    def step(x, y, sign=1):
        def operation():
            total.add_(sign * x * y)
            out.copy_(total)
        recording[-1].append(operation) if recording else operation()
        return out

    run = object.__new__(runtime.Run)
    run.args, run.device, run.ranks = argparse.Namespace(graphs=True), torch.device("cuda"), 1
    call, expected = run.capture(step), torch.zeros(2)
    for k in range(14):
        x, y, sign = torch.randn(2), torch.randn(2), 1 if k % 3 else -1
        expected += sign * x * y
        assert torch.equal(call(x, y, sign=sign), expected), k
    assert len(streams) == 2 * 3 * 2                         # to the side and back, three calls, for each sign
    said = "--graphs: step runs one operation at a time, because recording failed: operation not permitted when stream"
    assert capsys.readouterr().out.count(said) == (0 if works else 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA card")
@pytest.mark.parametrize("script", SCRIPTS)
def test_graphs_compute_what_the_loop_does(here, script):
    draw(here / "pictures", 40)
    flags = ["--device", "cuda", "--precision", "fp32", "--steps", "200", "--log-every", "10"]
    train(*flags, "--out", "eager", script=script)
    train(*flags, "--out", "graphs", "--graphs", script=script)
    rows = [[json.loads(line) for line in (here / name / "log.jsonl").read_text().splitlines()]
            for name in ("eager", "graphs")]
    for one, other in zip(*rows):
        assert abs(one["loss_D"] - other["loss_D"]) < 0.02 * (1 + abs(one["loss_D"])), one["step"]


def test_profile(here, capsys):
    draw(here / "pictures", 8)
    train("--steps", "6", "--out", "a", "--profile")
    shown = capsys.readouterr().out
    assert "steps 3 to 5" in shown and shown.count("aten::") >= 5 and "Self CPU" in shown
    events = json.loads((here / "a" / "profile.json").read_text())["traceEvents"]
    steps = {event["name"] for event in events if event["name"].startswith("ProfilerStep")}
    assert steps == {f"ProfilerStep#{k}" for k in (2, 3, 4)}          # counted from 0
    train("--steps", "4", "--out", "b", "--profile")                  # too few steps: what there was of them
    assert (here / "b" / "profile.json").exists() and "steps 3 to 4" in capsys.readouterr().out
    train("--steps", "2", "--out", "c", "--profile")
    assert "this start had 2" in capsys.readouterr().out and not (here / "c" / "profile.json").exists()


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


def test_ladders_as_they_are_documented():
    assert gan.ladder((64, 64)) == [(4, 4), (8, 8), (16, 16), (32, 32), (64, 64)]
    assert gan.ladder((287, 508)) == [(5, 8), (9, 16), (18, 32), (36, 64), (72, 127), (144, 254), (287, 508)]
    assert gan.ladder((28, 28)) == [(7, 7), (14, 14), (28, 28)]       # at most 7, not under 7


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
    layer = gan.normalisation("layer", 8)(x)
    assert layer.mean((1, 2, 3)).abs().max() < 1e-5 and layer.mean((2, 3)).abs().max() > 0.05
    assert gan.normalisation("instance", 8)(x).mean((2, 3)).abs().max() < 1e-5
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
    points = torch.arange(3).repeat_interleave(10)
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
    assert len(points) == 30 and torch.allclose(f.sigmoid(), ((1 - smooth) * p + u * q) / (p + q), atol=1e-3)


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
    rows = [[sum(A[i, j].item() * v for j, v in enumerate(picture)) for i in range(12)] for picture in
            x.flatten(1).tolist()]
    assert penalty.item() == pytest.approx(sum(g * g for row in rows for g in row) / 5, rel=1e-4)
    penalty.backward()
    assert not x.requires_grad and x.grad is None                     # the caller's picture is left as it was
    X = x.flatten(1)
    assert torch.allclose(A.grad, (A @ X.T @ X + X.T @ X @ A).detach() / 5, rtol=1e-3, atol=1e-3)


def test_minibatch_discrimination_against_a_loop():
    layer = gan.MinibatchDiscrimination(10, kernels=3, kernel_size=4)
    x = torch.randn(6, 10)
    o = layer(x)
    M = [[layer.T.weight[4 * b:4 * b + 4].detach() @ picture for b in range(3)] for picture in x]
    for i in range(6):
        for b in range(3):
            c = [math.exp(-sum(abs(u - v) for u, v in zip(M[i][b].tolist(), M[j][b].tolist())))
                 for j in range(6) if j != i]
            assert o[i, b].item() == pytest.approx(sum(c) / 5, abs=1e-5)


def test_minibatch_discrimination_tells_collapse_and_does_not_depend_on_the_batch_size():
    D = gan.Discriminator(16, 1, 4, minibatch=True)
    nn.init.normal_(D.score_others.weight, 5.0)
    one = torch.randn(1, 1, 16, 16)
    varied, collapsed = torch.randn(12, 1, 16, 16), one.expand(12, 1, 16, 16)
    assert D.others(D.levels(collapsed).flatten(1)).min().item() == pytest.approx(1, abs=1e-4)
    assert D.others(D.levels(varied).flatten(1)).max().item() < 1 - 1e-4
    assert torch.allclose(D(collapsed)[:1], D(one.expand(3, 1, 16, 16))[:1], atol=1e-5)
    assert torch.allclose(D.others(D.levels(varied.repeat(9, 1, 1, 1)).flatten(1)).mean(),
                          D.others(D.levels(varied).flatten(1)).mean(), rtol=0.2)
    assert D(one).isfinite().all()                                    # a batch of one has no others
    D(varied).sum().backward()
    assert D.others.T.weight.grad.any()


def test_minibatch_discrimination_is_cheap_at_256():
    extra = [sum(w.numel() for w in gan.Discriminator(side, 3, 16, 128, minibatch=True).parameters())
             - sum(w.numel() for w in gan.Discriminator(side, 3, 16, 128).parameters()) for side in (64, 256)]
    assert extra[0] == extra[1] < 600_000                             # 201 million in one of the seeds of this project


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
    real, fake, seen = torch.full((500, 3, 2, 2), 1.0), torch.full((500, 3, 2, 2), -3.0), []
    w = nn.Parameter(torch.ones(12))
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
    length, last = int(side / 2 + 0.5), side - 1 if side % 2 else side                # centres, as published: 0 .. last
    tops = {int(picture.any(1).nonzero()[0]) for picture in out[:, 0] == 0}
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


def test_spread_against_a_loop_and_on_collapse():
    x = torch.randn(6, 3, 4, 5)
    pairs = [(x[i] - x[j]).square().mean().sqrt().item() for i in range(6) for j in range(i)]
    assert gan.spread(x).item() == pytest.approx(sum(pairs) / 15, rel=1e-5)
    assert gan.spread(x[:1].expand(6, 3, 4, 5)).item() == pytest.approx(0, abs=1e-6)


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
        assert not any(w.requires_grad for w in loaded.parameters())
    Path("text.pt").write_text("not a network")
    torch.save({"config": {**G.config, "features": 8}, "G_ema": G.state_dict()}, "other.pt")
    for path in ("text.pt", "other.pt"):
        with pytest.raises(ValueError, match="no file that a training script wrote, or it is damaged"):
            gan.load_generator(path)
    with pytest.raises(FileNotFoundError):
        gan.load_generator("nothing.pt")


def test_gan_py_runs_when_pasted():
    cell = {}
    exec((HERE / "gan.py").read_text("utf-8"), cell)
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
                        (data.parse_crop, "0.9,0,0.1,1"), (data.parse_crop, "1,2"), (data.parse_crop, "9x9@middle"),
                        (data.parse_crop, "9x9@top-bottom")):
        with pytest.raises(ValueError, match="write"):
            parse(word)
    with pytest.raises(ValueError, match="smaller than the crop window"):
        data.parse_crop("61x10")(100, 60)


def test_fits():
    """Left half black, right half white, 40 wide and 20 high."""
    im = Image.fromarray(np.repeat(np.repeat([[0, 255]], 20, 0), 20, 1).astype(np.uint8))
    crop = data.fit_picture(im, (10, 10), "crop")
    squash = data.fit_picture(im, (10, 10), "squash")
    pad = data.fit_picture(im, (20, 20), "pad")
    assert crop.shape == squash.shape == (10, 10) and (crop[:, :4] < 9).all() and (crop[:, 6:] > 246).all()
    assert (squash[:, :4] < 9).all() and (squash[:, 6:] > 246).all()
    assert (pad[:5] == 0).all() and (pad[15:] == 0).all() and (pad[6:14, 12:] > 250).all() and (pad[6:14, :8] < 5).all()
    right, half = (data.fit_picture(im, (8, 8), fit, data.parse_crop("0.5,0,1,1")(40, 20)) for fit in ("squash", "pad"))
    assert (half[:, 3:5] > 246).all()
    assert (right[:, 1:] == 255).all()


def test_every_shape_fits_every_size():
    """The window never leaves the picture by a rounding: 116 wide at 28 did."""
    for side in (*range(29, 700, 13), 116, 200, 640, 1935):
        im = Image.new("L", (side, 480))
        for size in ((28, 28), (29, 29), (100, 100), (64, 368), (113, 9)):
            assert data.fit_picture(im, size).shape[:2] == size
            assert data.fit_picture(im, size, "crop", (0.1 * side, 7.3, 0.7 * side, 480)).shape == size


def test_resize_is_antialiased():
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (64, 32)))
    small = data.fit_picture(stripes, (16, 16)).astype(float)
    assert abs(small - 127.5).max() < 16                              # picking pixels would give 0 or 255


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_resize_is_bicubic(mode):
    """Against the same kernel in float64, written out (Keys 1981, a = -1/2, widened when it shrinks), and Pillow's."""
    def weights(n, small):
        scale = max(1, n / small)
        x = np.abs((np.arange(n) + 0.5 - (np.arange(small)[:, None] + 0.5) * n / small) / scale)
        w = np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))
        return w / w.sum(1, keepdims=True)

    y, x = np.mgrid[:90, :110] / 9                           # smooth: what is rounded in between hardly matters
    planes = np.stack([128 + 90 * np.sin(x + 2 * y + c) * np.cos(x * y / 4) for c in range(3)], -1).round()
    im = Image.fromarray(planes.astype(np.uint8)).convert(mode)
    for size, box in (((45, 55), (0, 0, 110, 90)), ((64, 64), (10, 0, 100, 90)), ((23, 100), (0, 0, 110, 90)),
                      ((120, 130), (0, 0, 110, 90)), ((40, 40), (10.5, 0, 100.5, 90))):
        left, top, right, bottom = (math.floor(edge) for edge in box)
        given = np.asarray(im, float)[top:bottom, left:right]
        expected = np.einsum("ij,jk...->ik...", weights(bottom - top, size[0]), given)
        expected = np.einsum("ij,kj...->ki...", weights(right - left, size[1]), expected).clip(0, 255)
        found, pillow = data.resize(im, size, box), np.asarray(im.resize(size[::-1], Image.Resampling.BICUBIC, box))
        assert found.dtype == np.uint8 and found.shape == pillow.shape
        assert abs(found.astype(float) - pillow)[2:-2, 2:-2].max() <= 2
        if left == box[0]:
            assert abs(found - expected).max() < 1.6
            other = im.resize(size[::-1], Image.Resampling.BILINEAR, box)
            assert abs(np.asarray(other, float) - expected).max() > 1.6             # it tells filters apart


def read_picture(file, **options):
    return data.upright(Image.open(file), **options)


def encoded(im, kind="PNG", **options):
    file = io.BytesIO()
    im.save(file, kind, **options)
    file.seek(0)
    return file


def test_what_pillow_clips_or_turns_is_read_right():
    ramp = np.arange(256, dtype=np.uint16)[None] * 100 + 1000
    assert np.array_equal(np.asarray(read_picture(encoded(Image.fromarray(ramp))))[0], np.arange(256))
    floats = Image.fromarray(ramp.astype(np.float32) / 7)
    assert np.array_equal(np.asarray(read_picture(encoded(floats, "TIFF")))[0], np.arange(256))
    clear = Image.new("RGBA", (2, 1), (10, 20, 30, 0))
    clear.putpixel((1, 0), (10, 20, 30, 255))
    assert np.asarray(read_picture(encoded(clear))).tolist() == [[[255] * 3, [10, 20, 30]]]
    keyed = read_picture(encoded(Image.new("L", (2, 2), 0), transparency=0))
    assert keyed.mode == "L" and np.asarray(keyed).tolist() == [[255, 255]] * 2
    turned = Image.new("L", (6, 4), 9)
    exif = Image.Exif()
    exif[0x0112] = 6
    assert read_picture(encoded(turned, "JPEG", exif=exif)).size == (4, 6)
    for mode, expected in (("1", "L"), ("L", "L"), ("P", "RGB"), ("CMYK", "RGB"), ("LA", "L"), ("RGB", "RGB")):
        kind = "TIFF" if mode == "CMYK" else "PNG"
        assert read_picture(encoded(Image.new(mode, (3, 3)), kind)).mode == expected


def test_folder_is_read_whole_and_bad_files_are_named(here):
    draw(here / "d" / "class_a", 3, suffix=".JPG")
    draw(here / "d" / "b", 2, mode="L", suffix=".tiff")
    draw(here / "d" / ".hidden", 1)
    (here / "d" / "notes.txt").write_text("not a picture")
    (here / "d" / "text.jpg").write_text("not a picture either")
    (here / "d" / "empty.png").write_bytes(b"")
    whole = (here / "d" / "class_a" / "000.JPG").read_bytes()
    (here / "d" / "cut.jpeg").write_bytes(whole[:len(whole) // 2])
    (here / "d" / "._hidden.png").write_bytes(whole)
    (here / "d" / "loop").symlink_to(here / "d", target_is_directory=True)
    (here / "d" / "twin").symlink_to(here / "d" / "b", target_is_directory=True)
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
    assert pictures.images.shape == (5, 3, 16, 16) and "red.png" not in str(pictures.notes)    # 1 of 5 is no exception
    faint = np.full((16, 16, 3), 100, np.uint8)
    faint[..., 0] += 20
    assert not data.has_colour(faint) and data.has_colour(faint + np.array([9, 0, 0], np.uint8))
    assert data.load("d", (16, 16), channels=1).images.shape == (5, 1, 16, 16)


def test_three_equal_channels_are_grey_and_one_pixel_of_colour_is_not():
    grey = np.repeat(np.random.RandomState(0).randint(0, 256, (9, 7, 1)).astype(np.uint8), 3, axis=2)
    assert data.all_grey(Image.fromarray(grey)) and not data.all_grey(Image.fromarray(grey).convert("L"))
    for row, column, channel in ((0, 0, 1), (4, 3, 0), (4, 6, 2), (8, 6, 2)):         # in the middle row and beside it
        odd = grey.copy()
        odd[row, column, channel] ^= 1
        assert not data.all_grey(Image.fromarray(odd))


def test_near_pairs_against_all_pairs():
    random = np.random.RandomState(0)
    thumbs = random.randint(20, 236, (80, 16, 17))
    for k, (noise, share) in enumerate(((2, 1), (9, 1), (40, 1), (90, 1), (200, 0.05), (0, 1))):
        change = random.randint(-noise, noise + 1, (16, 17)) * (random.rand(16, 17) < share)
        thumbs[70 - 7 * k] = (thumbs[k + 72] + change).clip(0, 255)   # near copies, and no longer so near ones
    thumbs[3], thumbs[50] = 90, 90                                    # blank ones are no pair
    thumbs, expected = thumbs.astype(np.uint8), []
    for i in range(80):
        for j in range(i + 1, 80):
            bits = ((np.diff(thumbs[i].astype(int)) > 0) != (np.diff(thumbs[j].astype(int)) > 0)).sum()
            if bits <= 24 and min(thumbs[i].std(), thumbs[j].std()) > 1 and \
                    np.corrcoef(thumbs[i].ravel(), thumbs[j].ravel())[0, 1] >= 0.985:
                expected.append((i, j))
    assert data.near_pairs(thumbs) == expected and 3 <= len(expected) < 6
    assert data.near_pairs(thumbs[:1]) == data.near_pairs(thumbs[:0]) == []


def test_holdout_goes_by_content_and_is_stable(here):
    draw(here / "d", 60)
    for k in range(10):
        (here / "d" / f"copy{k}.png").write_bytes((here / "d" / f"{k:03d}.png").read_bytes())
    train, held = (data.load("d", (8, 8), holdout=0.3, part=part) for part in ("train", "heldout"))
    assert sorted(train.names + held.names) == [f"{k:03d}.png" for k in range(60)]    # each once, on one side
    assert 8 <= len(held.names) <= 28 and train.held_out == len(held.names)
    assert train.left_out == held.left_out == [(f"copy{k}.png", f"an exact copy of {k:03d}.png") for k in range(10)]
    assert len(data.load("d", (8, 8), holdout=0.8, part="heldout").names) > 35
    assert len(data.load("d", (8, 8)).names) == 60 and data.load("d", (8, 8), limit=64).left_out[-1][0] == "copy3.png"
    draw(here / "d" / "more", 30)
    assert set(held.names) <= set(data.load("d", (8, 8), holdout=0.3, part="heldout").names)


def test_groups_and_near_copies_stay_on_one_side(here):
    for patient in range(30):
        draw(here / "d" / f"p{patient:02d}", 3)
    side = {name: "train" for name in data.load("d", (8, 8), holdout=0.5, part="train", group=r"(p\d+)/").names}
    side |= {name: "heldout" for name in data.load("d", (8, 8), holdout=0.5, part="heldout", group=r"(p\d+)/").names}
    assert len(side) == 90 and set(side.values()) == {"train", "heldout"}
    assert all(len({side[f"p{p:02d}/{k:03d}.png"] for k in range(3)}) == 1 for p in range(30))
    ramp = np.linspace(0, 200, 64)[None] * np.linspace(0.3, 1, 64)[:, None]
    (here / "e").mkdir()
    for k in range(40):
        waves = 50 * np.sin(np.arange(64) / (1 + k / 7))[:, None]
        picture = Image.fromarray((ramp + waves).clip(0, 255).astype(np.uint8))
        picture.save(here / "e" / f"{k:02d}.png")
        picture.save(here / "e" / f"{k:02d}-again.jpg", quality=80)
    sides = [set(data.load("e", (48, 48), holdout=0.5, part=part).names) for part in ("train", "heldout")]
    assert all(len(names) > 10 for names in sides)
    assert all((f"{k:02d}.png" in names) == (f"{k:02d}-again.jpg" in names) for k in range(40) for names in sides)


def test_the_share_held_out_is_the_share_asked_for(here):
    """Families of near copies weigh as one picture does; pictures that are mostly blank are no near copies."""
    names = [str(k) for k in range(20000)]
    digests = np.random.RandomState(0).randint(0, 2**62, 20000).tolist()
    families = [(k, k + 1) for k in range(20000) if k % 10 < 9]
    for alike in ((), families):
        assert data.held_out(digests, names, 0.1, "", alike).mean() == pytest.approx(0.1, abs=0.025)
    dots = np.zeros((300, 1, 64, 64), np.uint8)
    for k, (y, x) in enumerate(np.random.RandomState(1).randint(2, 60, (300, 2))):
        dots[k, 0, y:y + 4, x:x + 4] = 255
    assert len(data.near_pairs(data.thumbnails(dots))) < 30


def half_and_half(mode):
    """16 wide, 10 high: left half dark (60), right half light (200), in the given mode; 16-bit: 256 times that."""
    values = np.repeat(np.repeat([[60, 200]], 10, 0), 8, 1)
    if mode in ("I;16", "I"):
        return Image.fromarray((values * 256).astype(np.uint16 if mode == "I;16" else np.int32))
    if mode == "F":
        return Image.fromarray((values / 1000).astype(np.float32))
    im = Image.fromarray(values.astype(np.uint8))
    if mode == "1":
        return im.point(lambda v: 255 * (v > 128)).convert("1")
    if mode in ("LA", "RGBA"):                                        # the right half is clear: white shows through
        im = im.convert(mode)
        im.putalpha(Image.fromarray(np.where(values > 100, 0, 255).astype(np.uint8)))
    return im.convert(mode)


FORMATS = [("PNG", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")] + [
    ("TIFF", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I", "F")] + [
    ("JPEG", mode) for mode in ("L", "RGB", "CMYK", "YCbCr")] + [("WEBP", mode) for mode in ("RGB", "RGBA")] + [
    ("BMP", mode) for mode in ("1", "L", "P", "RGB", "RGBA")] + [("GIF", mode) for mode in ("1", "L", "P", "RGB")] + [
    ("PPM", mode) for mode in ("1", "L", "RGB", "I;16")]


@pytest.mark.parametrize("kind, mode", FORMATS)
def test_every_pixel_mode_in_every_format(here, kind, mode):
    """What comes out of the 38 combinations: dark left, light right, grey where the file is grey."""
    assert len(FORMATS) == 38
    (here / "d").mkdir()
    file = here / "d" / f"a.{kind.lower()}"
    half_and_half(mode).save(file, kind, **{"WEBP": {"lossless": True}, "JPEG": {"quality": 95}}.get(kind, {}))
    try:
        Image.open(file).load()
    except OSError as error:                                          # as Pillow 12.3 does with its own YCbCr TIFF
        pytest.skip(f"this Pillow does not read what it wrote: {error}")
    pictures = data.load("d", (10, 16))
    left, right = (np.asarray(pictures.images)[0, :, 1:9, cols].astype(float) for cols in (slice(0, 7), slice(9, 16)))
    dark, light = {"1": (0, 255), "I;16": (0, 255), "I": (0, 255), "F": (0, 255), "LA": (60, 255),
                   "RGBA": (60, 255)}.get(mode, (60, 200))
    if (kind, mode) == ("BMP", "RGBA"):
        light = np.unique(right)                                      # whether a BMP keeps its alpha is Pillow's choice
        assert light.size == 1 and light[0] in (200, 255)
    assert pictures.images.shape[1] == 1 and np.abs(left - dark).max() <= 6 and np.abs(right - light).max() <= 6


def test_sixteen_bits_keep_their_levels(here):
    (here / "d").mkdir()
    ramp = np.tile(np.linspace(300, 4000, 512).astype(np.uint16), (512, 1))
    for name in ("a.png", "b.tiff"):
        Image.fromarray(ramp).save(here / "d" / name)
    own = np.asarray(data.load("d", (512, 512)).images)
    assert all(len(np.unique(picture)) >= 250 for picture in own) and own.min() == 0 and own.max() == 255
    ranged = np.asarray(data.load("d", (512, 512), range="0,4095").images)
    assert ranged[0, 0, 0, 0] == round(300 / 4095 * 255) and ranged.max() == round(4000 / 4095 * 255)


def damage(raw, way, random):
    if way == "flip":
        raw = bytearray(raw)
        for place in random.randint(8, len(raw), 20):
            raw[place] ^= 1 << random.randint(8)
        return bytes(raw)
    if way == "cut":
        return raw[:random.randint(1, len(raw) - 20)]
    if way == "huge":                                                 # claims 60000 x 60000 pixels
        header = b"IHDR" + (60000).to_bytes(4, "big") * 2 + raw[24:29]
        return raw[:12] + header + zlib.crc32(header).to_bytes(4, "big") + raw[33:]
    return {"empty": b"", "text": b"hello\n" * random.randint(1, 50), "noise": random.bytes(500)}[way]


def test_five_hundred_damaged_files_among_good_ones(here, capsys):
    resource = pytest.importorskip("resource")
    good = draw(here / "d", 60, (24, 24))
    random, bad = np.random.RandomState(0), set()
    for k in range(500):
        way = ("flip", "cut", "huge", "empty", "text", "noise")[k % 6]
        name = f"bad{k}." + ("png" if k % 4 else "jpg")               # half of the suffixes are wrong besides
        (good / name).write_bytes(damage((good / f"{k % 60:03d}.png").read_bytes(), way, random))
        bad.add(name)
    began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pictures = data.load("d", (16, 16))
    kept = set(pictures.names)
    assert {f"{k:03d}.png" for k in range(60)} <= kept                # all good ones
    named = {name for name, _ in pictures.left_out}
    assert kept | named == bad | {f"{k:03d}.png" for k in range(60)} and len(kept - named) == len(pictures.names)
    # A flipped bit may leave a file that decodes; then it is a picture, and nobody can know better.
    assert all(name[3:].split(".")[0].isdigit() and int(name[3:].split(".")[0]) % 6 == 0 for name in kept & bad)
    assert len(kept & bad) < 60
    data.main(["d", "--size", "16"])
    report = json.loads(Path("report.json").read_text("utf-8"))
    listed = {entry[0] for entries in report["problems"].values() for entry in entries}
    assert named <= {entry[0] for entry in report["problems"]["unreadable"]} and bad - listed <= kept
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - began < 400_000        # KB; 60000^2 would be 3.6 GB


def test_truncated_files_can_be_kept(here):
    draw(here / "d", 3, (64, 64), suffix=".jpg")
    raw = (here / "d" / "001.jpg").read_bytes()
    (here / "d" / "001.jpg").write_bytes(raw[:len(raw) * 2 // 3])
    assert data.load("d", (16, 16)).names == ["000.jpg", "002.jpg"]
    assert data.load("d", (16, 16), keep_truncated=True).names == ["000.jpg", "001.jpg", "002.jpg"]
    assert data.load("d", (16, 16)).names == ["000.jpg", "002.jpg"]   # the switch does not stay on


def test_draft_decoding_changes_less_than_the_choice_of_a_filter():
    scene = Image.fromarray(data.draw_demo(1, side=64)[0]).resize((512, 512), Image.Resampling.BICUBIC)
    noise = np.random.RandomState(0).normal(0, 6, (512, 512))
    scene = Image.fromarray((np.asarray(scene) + noise).clip(0, 255).astype(np.uint8))
    raw = encoded(scene, "JPEG", quality=92).getvalue()
    drafted, small = data.Recipe((128, 128)).pixels(raw)
    whole = Image.open(io.BytesIO(raw))
    bicubic, bilinear = (np.asarray(whole.resize((128, 128), f)).astype(float)
                        for f in (Image.Resampling.BICUBIC, Image.Resampling.BILINEAR))
    assert not small and np.abs(drafted - bicubic).mean() < np.abs(bicubic - bilinear).mean()
    cropped, _ = data.Recipe((128, 128), crop="0.1,0.2,0.9,1").pixels(raw)
    expected = data.fit_picture(whole, (128, 128), "crop", (51.2, 102.4, 460.8, 512))
    assert np.abs(cropped - expected.astype(float)).mean() < np.abs(bicubic - bilinear).mean()


@pytest.mark.parametrize("size,channels", [(8, 3), (8, 1), (600, 3)])
def test_memory_of_a_batch_is_used_again_only_when_nobody_holds_it(size, channels):
    images = np.random.RandomState(0).randint(0, 256, (7, channels, size, size)).astype(np.uint8)

    def new():
        return data.batches(images, 4, flip=True)

    expected = [x.clone() for _, x in zip(range(8), new())]
    weight, kept = torch.ones(1, requires_grad=True), []
    for k, x in zip(range(8), new()):
        assert torch.equal(x, expected[k]) and x.is_contiguous(memory_format=torch.channels_last)
        kept.append((x, x[1:], x.numpy(), (x * weight).sum())[k % 4])      # a view, an array, what autograd saved
    for k, x in enumerate(kept):
        if k % 4 == 3:
            assert torch.allclose(torch.autograd.grad(x, weight)[0], expected[k].sum(), rtol=1e-3, atol=1)
        else:
            assert torch.equal(torch.as_tensor(x), expected[k][1 if k % 4 == 1 else 0:])
    addresses = {x.data_ptr() for _, x in zip(range(9), new())}
    assert len(addresses) < 9                                # else nothing would have been tested


def test_near_copies_are_looked_for_when_needed_and_kept(here, monkeypatch):
    draw(here / "d", 12)
    before, calls = data.near_pairs, []
    monkeypatch.setattr(data, "near_pairs", lambda thumbs: calls.append(len(thumbs)) or before(thumbs))
    data.load("d", (8, 8))
    assert calls == []                                                # nothing is held out
    first = data.load("d", (8, 8), holdout=0.3).names
    assert calls == [12] and data.load("d", (8, 8), holdout=0.3).names == first and calls == [12]
    kept, = Path("runs/.cache").glob("*.alike")
    kept.write_text("[[0,")                                           # cut short: worked out once more
    assert data.load("d", (8, 8), holdout=0.3).names == first and calls == [12, 12]
    (here / "d" / "new.png").write_bytes((here / "d" / "000.png").read_bytes() + b"x")
    data.load("d", (8, 8), holdout=0.3)
    assert calls == [12, 12, 13]


def test_cache_is_built_once_and_follows_the_files(here, monkeypatch):
    draw(here / "d", 5)
    first = np.asarray(data.load("d", (16, 16)).images)
    built = []
    build = data.build
    monkeypatch.setattr(data, "build", lambda *args: (built.append(args), build(*args)))
    assert np.array_equal(np.asarray(data.load("d", (16, 16)).images), first) and not built
    data.load("d", (16, 12))
    assert len(built) == 1                                            # another size is another cache
    Image.new("RGB", (20, 24), "red").save(here / "d" / "002.png")
    os.utime(here / "d" / "002.png", (1, 1))
    changed = np.asarray(data.load("d", (16, 16)).images)
    assert len(built) == 2 and not np.array_equal(changed[2], first[2]) and np.array_equal(changed[3], first[3])


def test_an_interrupted_build_starts_again(here, monkeypatch):
    draw(here / "d", 5)
    decode, calls = data.decode, []

    def fail(recipe, item):
        calls.append(item)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return decode(recipe, item)

    monkeypatch.setattr(data, "decode", fail)
    with pytest.raises(KeyboardInterrupt):
        data.load("d", (16, 16))
    assert not list((here / "runs" / ".cache").glob("*.json"))
    monkeypatch.setattr(data, "decode", decode)
    assert len(data.load("d", (16, 16)).names) == 5


def test_two_folders_are_never_taken_for_one_another(here):
    for name, grey in (("a", 20), ("b", 200)):
        (here / name).mkdir()
        Image.new("L", (8, 8), grey).save(here / name / "x.bmp")
        os.utime(here / name / "x.bmp", (1, 1))
    assert [int(data.load(name, (8, 8)).images[0].mean()) for name in "ab"] == [20, 200]


def test_what_may_pass_is_tried_again(here, monkeypatch):
    draw(here / "d", 3)
    read = data.read_bytes

    def denied(path):
        if path.endswith("001.png"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return read(path)

    monkeypatch.setattr(data, "read_bytes", denied)
    assert data.load("d", (8, 8)).names == ["000.png", "002.png"]
    monkeypatch.setattr(data, "read_bytes", read)
    assert data.load("d", (8, 8)).names == ["000.png", "001.png", "002.png"]


def test_what_will_not_pass_is_not_tried_again(here, monkeypatch):
    draw(here / "d", 3)
    (here / "d" / "dead.png").symlink_to("nowhere.png")
    (here / "d" / "round.png").symlink_to("round.png")
    built, build = [], data.build
    monkeypatch.setattr(data, "build", lambda *args: (built.append(args), build(*args)))
    for _ in range(2):
        pictures = data.load("d", (8, 8))
        assert len(pictures.names) == 3 and "cannot be opened" in pictures.left_out[0][1] and len(built) == 1
    (here / "nowhere.png").write_bytes((here / "d" / "001.png").read_bytes() + b"x")
    (here / "d" / "nowhere.png").symlink_to(here / "nowhere.png")
    assert "dead.png" in data.load("d", (8, 8)).names and len(built) == 2


def test_pairs_that_cannot_be_read_are_named_once(here, monkeypatch):
    for side in "AB":
        draw(here / "two" / side, 6)
    (here / "two/A/001.png").write_bytes((here / "two/A/001.png").read_bytes()[:200])
    (here / "two/A/002.png").unlink()
    Image.fromarray(np.full((20, 24), np.nan, np.float32)).save(here / "two/A/002.tif")
    (here / "two/B/003.png").write_bytes(b"text")
    (here / "two/B/004.png").write_bytes(b"")
    built, build = [], data.build
    monkeypatch.setattr(data, "build", lambda *args: (built.append(args), build(*args)))
    for _ in range(2):
        found, _ = data.load_pairs(pair_flags("--data", "two"))
        assert found.names == ["000", "005"] and len(built) == 2      # A and B
        assert {name: why.split()[0] for name, why in found.left_out} == {
            "001": "image", "002": "holds", "003": "not", "004": "the"}
    with pytest.raises(ValueError, match="--limit -3"):
        data.load_pairs(pair_flags("--data", "two", "--limit", "-3"))


def test_file_system_without_locks(here):
    """Two processes build at once then, and neither gets in the other's way."""
    pytest.importorskip("fcntl")
    draw(here / "d", 12, mode="L")
    expected = np.asarray(data.load("d", (8, 8)).images)
    code = ("import data, fcntl, glob, os, time\nreplace = os.replace\n"
            "def refuse(*args):\n    raise OSError(38, 'Function not implemented')\n"
            "def together(*args):\n    open(f'here-{os.getpid()}', 'w').close()\n"
            "    for _ in range(2000):\n        time.sleep(0.01 * (len(glob.glob('here-*')) < 2))\n"
            "    replace(*args)\n"
            "fcntl.flock, os.replace = refuse, together\n"
            "print(int(data.load('d', (8, 8), cache='c').images[:].sum()))")
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
                             env={**os.environ, "PYTHONPATH": str(HERE)}) for _ in range(2)]
    assert [process.communicate(timeout=60)[0].strip() for process in both] == [str(expected.sum())] * 2
    assert {path.suffix for path in (here / "c").iterdir()} == {".json", ".lock", ".pixels"}


def test_damaged_exif_hides_no_picture(here):
    (here / "d").mkdir()
    for k, suffix in enumerate(("jpg", "png", "webp")):
        Image.new("RGB", (20, 24), (90 * k, 20, 30)).save(here / "d" / f"{k}.{suffix}", exif=b"Exif\0\0rubbish",
                                                              dpi=(72, 72))
    assert data.load("d", (8, 8)).names == ["0.jpg", "1.png", "2.webp"]
    assert data.census(data.find_items("d"), data.Recipe((8, 8)))[0]["usable"] == 3


def test_window_of_the_target_s_size_is_not_called_small(here):
    draw(here / "d", 2, (100, 100))
    crop = "0.25,0.25,0.57,0.57"                                      # 32 pixels, but for the last of sixteen digits
    assert data.load("d", (32, 32), crop=crop).notes == []
    assert not data.census(data.find_items("d"), data.Recipe((32, 32), crop=crop))[0]["problems"]["small"]
    assert data.load("d", (33, 33), crop=crop).notes


def test_links_to_folders_are_followed_once_in_a_fixed_order(here):
    draw(here / "d" / ".store", 1)
    draw(here / "d" / "c" / "x", 1)
    for name in "bade":
        (here / "d" / name).mkdir()
        (here / "d" / name / "link").symlink_to(here / "d" / "c" / "x", target_is_directory=True)
    (here / "d" / "seen").symlink_to(".store", target_is_directory=True)       # hidden there, not by this name
    assert data.find_pictures(here / "d") == ["a/link/000.png", "seen/000.png"]


def test_two_lists_worked_out_side_by_side():
    numbers = list(range(100))
    assert list(zip(data.in_order(str, numbers), data.in_order(abs, numbers))) == [(str(k), k) for k in numbers]


def test_lent_memory_has_the_shape_asked_for():
    lend = data.lend()
    for shape in ((2, 3), (4, 5), (4, 5), (2, 3)):
        assert lend(*shape).shape == shape


@pytest.mark.skipif(sys.platform != "linux", reason="forks as Linux does")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_run_stopped_while_it_reads_leaves_nobody_behind(here, number):
    """Neither workers that hold the lock, nor a wait for all that is under way; the next run begins at once."""
    draw(here / "pictures", 200, (8, 8))
    slow = ("import data, sys, time, train_wgan\npixels = data.Recipe.pixels\n"
            "def late(*args):\n    time.sleep(0.3); return pixels(*args)\n"
            "data.Recipe.pixels = late\nimport runtime\nprint('reading', flush=True)\n"
            "runtime.call(lambda: train_wgan.main(sys.argv[1:]), 'train_wgan.py')")
    process = subprocess.Popen([sys.executable, "-c", slow, *TINY, "--steps", "1"], stdout=subprocess.PIPE, text=True,
                               stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(HERE)})
    assert process.stdout.readline() == "reading\n"
    for _ in range(300):                                              # until there are workers
        if any(path.read_text("utf-8").split() for path in Path("/proc").glob(f"{process.pid}/task/*/children")):
            break
        time.sleep(0.05)
    time.sleep(0.5)
    began = time.time()
    process.send_signal(number)
    assert process.wait(timeout=20) in (130, -number) and time.time() - began < 10
    train("--steps", "1", "--out", "r")                               # would wait for the lock
    assert checkpoint("r")["step"] == 1


def test_two_processes_at_once_build_once(here):
    draw(here / "d", 30)
    code = ("import data, time\nbuild = data.build\n"
            "def slow(*args):\n    open('built', 'a').write('x'); time.sleep(1.5); build(*args)\n"
            "data.build = slow\nprint(len(data.load('d', (16, 16)).names))")
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
                             env={**os.environ, "PYTHONPATH": str(HERE)}) for _ in range(2)]
    assert [process.communicate()[0].strip() for process in both] == ["30", "30"]
    assert (here / "built").read_text("utf-8") == "x"


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_a_set_larger_than_memory(here):
    """400 MB of pictures in a process that may take 300 MB beyond what importing needs."""
    draw(here / "d", 40, (8, 8), "L")
    for k in range(40, 1600):
        (here / "d" / f"{k:04d}.png").write_bytes((here / "d" / f"{k % 40:03d}.png").read_bytes() + b"%d" % k)
    code = ("import itertools, re, resource, data\n"
            "used = int(re.search(r'VmData:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024\n"
            "resource.setrlimit(resource.RLIMIT_DATA, (used + 300 * 2**20,) * 2)\n"
            "images = data.load('d', (512, 512), channels=1).images\n"
            "total = sum(float(x.mean()) for x in itertools.islice(data.batches(images, 16), 100))\n"
            "print(len(images), images.shape[2], total != 0)")
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                             env={**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1",
                                  "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"})       # freed is gone
    assert process.stdout.strip() == "1600 512 True", process.stderr[-500:]


def test_reading_ahead_keeps_the_order_and_passes_errors_on():
    def read(k):
        if k == 9:
            raise ValueError("no ninth")
        return torch.tensor([k])

    stream = data.read_ahead(read, 5, "cpu")
    assert [int(next(stream)) for _ in range(4)] == [5, 6, 7, 8]
    with pytest.raises(ValueError, match="no ninth"):
        next(stream)


def test_median_and_non_local_means():
    random = np.random.RandomState(0)
    clean = np.full((40, 40), 60.0)
    clean[:, 20:] = 180
    noisy = Image.fromarray((clean + random.normal(0, 12, clean.shape)).clip(0, 255).astype(np.uint8))
    x = np.asarray(noisy).astype(int)
    median = np.asarray(data.denoise(noisy, "median"))
    assert all(median[i, j] == np.median(x[i - 1:i + 2, j - 1:j + 2]) for i in range(1, 39) for j in range(1, 39))
    out = np.asarray(data.denoise(noisy, "nlm")).astype(float)
    before, after = ((np.asarray(im) - clean).std() for im in (noisy, out))
    assert after < 0.45 * before and out[:, 21].mean() - out[:, 18].mean() > 110       # less noise, and still an edge
    s = math.sqrt(math.pi / 2) / 6 * np.mean([abs(sum(
        weight * x[i + a, j + b] for (a, b), weight in {(-1, -1): 1, (-1, 0): -2, (-1, 1): 1, (0, -1): -2, (0, 0): 4,
                                                        (0, 1): -2, (1, -1): 1, (1, 0): -2, (1, 1): 1}.items()))
        for i in range(1, 39) for j in range(1, 39)])
    i, j, top, below = 17, 14, 0.0, 0.0                               # one pixel by the formula
    patch = x[i - 1:i + 2, j - 1:j + 2]
    for a in range(i - 5, i + 6):
        for b in range(j - 5, j + 6):
            d = ((x[a - 1:a + 2, b - 1:b + 2] - patch) ** 2).mean()
            w = math.exp(-max(0, d - 2 * s * s) / (0.8 * s) ** 2)
            top, below = top + w * x[a, b], below + w
    assert out[i, j] == pytest.approx(top / below, abs=0.51)
    flat = Image.new("RGB", (20, 20), "red")
    assert data.denoise(flat, "nlm").tobytes() == flat.tobytes()


def test_crop_auto_finds_where_the_detail_is(here):
    random = np.random.RandomState(0)
    (here / "d").mkdir()
    for k in range(12):
        picture = np.full((100, 160), 90, np.uint8)
        dx = 8 * (k % 3 - 1)
        picture[30:80, 50 + dx:110 + dx] = random.randint(0, 256, (50, 60))
        Image.fromarray(picture).save(here / "d" / f"{k}.png")
    pictures = data.load("d", (16, 16), crop="auto")
    window = [float(v) for v in re.search(r"window ([\d.,]+)", pictures.notes[0])[1].split(",")]
    assert window == pytest.approx([42 / 160 - 0.04, 0.26, 118 / 160 + 0.04, 0.84], abs=0.06)
    assert np.array_equal(pictures.images, data.load("d", (16, 16), crop=",".join(map(str, window))).images)
    one = data.move_window(Image.open(here / "d" / "0.png"), (50 / 160, 0.3, 110 / 160, 0.8))
    other = data.move_window(Image.open(here / "d" / "2.png"), (50 / 160, 0.3, 110 / 160, 0.8))
    assert one[0] == pytest.approx(42 / 160, abs=0.02) and other[0] == pytest.approx(58 / 160, abs=0.02)
    assert not np.array_equal(data.load("d", (16, 16), crop="auto-each").images, pictures.images)
    stays = 0.2, 0.3, 0.6, 0.7                                        # where there is nothing to choose by
    assert data.move_window(Image.new("L", (100, 100), 128), stays) == pytest.approx(stays, abs=0.01)
    assert data.richest_window(np.ones((64, 64))) == data.richest_window(np.zeros((64, 64))) == (0, 0, 1, 1)


def test_census_of_a_folder_with_everything_wrong(here, capsys):
    draw(here / "d", 12, (40, 40))
    scene = Image.fromarray(data.draw_demo(1)[0])
    scene.save(here / "d" / "scene.png")
    scene.resize((90, 90)).save(here / "d" / "scene-again.jpg", quality=85)
    (here / "d" / "copy.png").write_bytes((here / "d" / "003.png").read_bytes())
    Image.new("L", (40, 40), 7).save(here / "d" / "blank.png")
    Image.fromarray(np.random.RandomState(1).randint(0, 256, (40, 400)).astype(np.uint8)).save(here / "d" / "wide.png")
    draw(here / "d" / "small", 1, (9, 9))
    (here / "d" / "text.png").write_text("words")
    scene.convert("RGB").save(here / "d" / "liar.png", "JPEG")
    before = {path: path.read_bytes() for path in (here / "d").rglob("*") if path.is_file()}
    data.main(["d", "--size", "32", "--report", "r"])
    out = capsys.readouterr().out
    problems = {kind: [entry[0] for entry in entries] for kind, entries in
                json.loads((here / "r" / "report.json").read_text("utf-8"))["problems"].items()}
    assert problems["unreadable"] == ["text.png"] and problems["blank"] == ["blank.png"]
    assert problems["exact duplicate"] == ["copy.png"] and problems["small"] == ["small/000.png"]
    assert problems["wrong suffix"] == ["liar.png"] and "wide.png" in problems["odd"]
    assert {"scene.png", "scene-again.jpg"} & set(problems["near duplicate"])
    assert all(word in out for word in ("20 files", "19 can be used", "near duplicate", "text.png", "report.json"))
    assert Image.open(here / "r" / "sheet.png").width > 400
    data.main(["d", "--size", "32", "--report", "r", "--out", "clean", "--crop", "0.1,0,0.9,1", "--preview"])
    assert (here / "r" / "preview.png").exists()
    names = sorted(str(path.relative_to(here / "clean")) for path in (here / "clean").rglob("*.png"))
    others = ["liar.png", "scene-again.png", "scene.png", "wide.png"]
    assert names == sorted([f"{k:03d}.png" for k in range(12)] + others)
    assert all(Image.open(here / "clean" / name).size == (32, 32) for name in names)
    trained = data.load("d", (32, 32), crop="0.1,0,0.9,1")
    row = trained.names.index("scene.png")
    assert np.array_equal(np.asarray(Image.open(here / "clean" / "scene.png")).transpose(2, 0, 1),
                          np.asarray(trained.images)[row])            # as training would see it
    first = {path: path.read_bytes() for path in (here / "clean").rglob("*") if path.is_file()}
    (here / "clean" / "005.png").unlink()
    capsys.readouterr()
    data.main(["d", "--size", "32", "--report", "r", "--out", "clean", "--crop", "0.1,0,0.9,1"])
    assert "wrote 1 pictures to clean (15 more were there already)" in capsys.readouterr().out
    assert first == {path: path.read_bytes() for path in (here / "clean").rglob("*") if path.is_file()}
    assert before == {path: path.read_bytes() for path in (here / "d").rglob("*") if path.is_file()}


@pytest.mark.parametrize("flags, words", [("nowhere", "no such folder"), ("d --out d/inside", "take a folder beside"),
                                          ("d --size big", "write one number"), ("d --crop 7", "write LEFT"),
                                          ("d --out c --size 64", "--keep-small lets those"),
                                          ("d --size 0", "at least one pixel"),
                                          ("d --limit -3", "a number of pictures")])
def test_mistakes_with_data_py(here, capsys, flags, words):
    draw(here / "d", 3)
    assert words in mistake(capsys, lambda: data.main(flags.split()))


@pytest.mark.parametrize("kind, low, high", [("center", 0.25, 0.25), ("half", 0.5, 0.5), ("box", 0.06, 0.4),
                                             ("random", 0.8, 0.8), ("strokes", 0.1, 0.45)])
def test_masks(kind, low, high):
    masks = data.masks(kind, 12, (32, 48), seed=5)
    assert masks.shape == (12, 1, 32, 48) and set(masks.unique().tolist()) == {0.0, 1.0}
    holes = 1 - masks.mean((1, 2, 3))
    assert holes.min() >= low - 0.01 and holes.max() <= high + 0.01
    assert torch.equal(masks[:4], data.masks(kind, 4, (32, 48), seed=5))               # mask k whatever n
    assert kind == "center" or not torch.equal(masks, data.masks(kind, 12, (32, 48), seed=6))
    if kind == "center":
        assert not masks[0, 0, 8:24, 12:36].any() and masks[0, 0, :8].all() and masks[0, 0, :, 36:].all()


def test_mask_from_a_file(here):
    Image.fromarray(np.repeat([[0, 255]], 4, 0).astype(np.uint8)).save("m.png")
    masks = data.masks("m.png", 2, (8, 10))
    assert not masks[..., :5].any() and masks[..., 5:].all()
    with pytest.raises(ValueError, match="--mask nothing.png"):
        data.masks("nothing.png", 1, (8, 8))


def write_idx(path, array, cut=None):
    raw = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(raw[:cut]) if path.suffix == ".gz" else raw[:cut])


def test_clean_keeps_the_names_of_different_files_apart(here):
    for k, name in enumerate(("a.jpg", "a.png", "a.jpg.png", "b.png")):
        (here / "d").mkdir(exist_ok=True)
        Image.fromarray(np.random.RandomState(k).randint(0, 256, (20, 20)).astype(np.uint8)).save(here / "d" / name)
    Image.new("L", (1, 1)).save(here / "d" / "speck.png")
    data.main(["d", "--size", "16", "--out", "c"])
    report = json.loads(Path("report.json").read_text("utf-8"))
    assert report["problems"]["unreadable"] == [["speck.png", "only 1x1 pixels"]]     # as `load` says
    assert {path.name for path in (here / "c").glob("*.png")} == {"a.jpg.png", "a.png.png", "a.jpg.png.png", "b.png"}


def test_idx_files(here):
    digits = np.random.RandomState(0).randint(0, 256, (6, 28, 28)).astype(np.uint8)
    write_idx(here / "t-images-idx3-ubyte", digits)
    write_idx(here / "t-images-idx3-ubyte.gz", digits)
    for source in ("t-images-idx3-ubyte", "t-images-idx3-ubyte.gz"):
        assert np.array_equal(np.asarray(data.load(source, (28, 28)).images)[:, 0], digits)
    write_idx(here / "u-images-idx3-ubyte", 255 - digits)
    assert data.load(".", (8, 8)).images.shape == (12, 1, 8, 8)       # all, but no .gz of one that is there
    write_idx(here / "digits.idx", digits)
    write_idx(here / "digits.idx.gz", digits)                         # no labels, though it lies beside
    assert len(data.load("digits.idx", (28, 28)).names) == len(data.load("digits.idx.gz", (28, 28)).names) == 6
    assert data.census(data.find_items("digits.idx"), data.Recipe((28, 28)))[0]["bytes"] == digits.nbytes
    write_idx(here / "labels", digits[:, 0, 0])
    write_idx(here / "cut", digits, -5)
    (here / "words.txt").write_text("hello")
    (here / "bad.gz").write_bytes(gzip.compress(b"x" * 99)[:-9])
    (here / "flipped.gz").write_bytes(gzip.compress(b"x" * 99)[:12] + b"\xff" * 20)
    for name, why in (("labels", "6 labels"), ("cut", "cut short"), ("words.txt", "no idx"), ("bad.gz", "damaged"),
                      ("flipped.gz", "damaged")):
        with pytest.raises(ValueError, match=why):
            data.load(name, (8, 8))


def test_an_array_of_no_pictures_is_one_sentence(here):
    np.save("empty.npy", np.zeros((0, 8, 8), np.uint8))
    write_idx(here / "e-images-idx3-ubyte", np.zeros((0, 8, 8), np.uint8))
    for name in ("empty.npy", "e-images-idx3-ubyte"):
        with pytest.raises(ValueError, match=f"--data {name} holds no pictures"):
            data.load(name, (8, 8))


def test_classes_of_folders_and_labels(here):
    digits = np.random.RandomState(0).randint(0, 256, (6, 8, 8)).astype(np.uint8)
    write_idx(here / "t-images-idx3-ubyte", digits)
    write_idx(here / "t-labels-idx1-ubyte", np.array([3, 1, 3, 7, 1, 10], np.uint8))
    threes = data.load("t-images-idx3-ubyte", (8, 8), classes="3")
    assert np.array_equal(np.asarray(threes.images)[:, 0], digits[[0, 2]])
    assert len(data.load("t-images-idx3-ubyte", (8, 8), classes="1, 10").images) == 3
    assert len(data.load(".", (8, 8)).images) == 6
    np.savez(here / "a.npz", x=digits, y=np.array(["cat", "dog", "cat", "cat", "dog", "eel"]))
    assert np.array_equal(np.asarray(data.load("a.npz", (8, 8), classes="dog,eel").images)[:, 0], digits[[1, 4, 5]])
    write_idx(here / "s-images-idx3-ubyte", digits)
    write_idx(here / "s-labels-idx1-ubyte", np.array([3, 1], np.uint8))
    draw(here / "d" / "cats", 3), draw(here / "d" / "dogs" / "small", 4), draw(here / "d", 2)
    assert len(data.load("d", (8, 8)).images) == 9
    assert data.load("d", (8, 8), classes="dogs").names == [f"dogs/small/00{k}.png" for k in range(4)]
    for source, classes, why in (("d", "dog", "--classes dog: d has the classes cats dogs"), ("demo", "1", "no sub-f"),
                                 ("t-images-idx3-ubyte", "30", "has the classes 1 10 3 7"),
                                 ("s-images-idx3-ubyte", "", "6 pictures, and there are 2 labels")):
        with pytest.raises(ValueError, match=why):
            data.load(source, (8, 8), classes=classes)


def test_numpy_arrays(here):
    random = np.random.RandomState(0)
    grey, colour = (random.randint(0, 256, shape).astype(np.uint8) for shape in ((5, 8, 9), (5, 8, 9, 3)))
    colour[0, 0, 0], colour[0, 0, 1] = 0, 255                         # so that the range of the whole is all of it
    half = colour / 127.5 - 1
    for name, array in dict(grey=grey, hwc=colour, chw=colour.transpose(0, 3, 1, 2), one=grey[..., None], half=half,
                            wide=colour.astype(np.uint16) * 257, unit=(colour / 255).astype(np.float32),
                            transparent=np.concatenate([colour, np.full((5, 8, 9, 1), 255, np.uint8)], 3)).items():
        np.save(here / f"{name}.npy", array)
        images = np.asarray(data.load(f"{name}.npy", (8, 9)).images)
        assert np.array_equal(images, grey[:, None] if name in ("grey", "one") else colour.transpose(0, 3, 1, 2)), name
    assert np.asarray(data.load("half.npy", (8, 9), range="-3,1").images).min() == 128
    hurt = half.copy()
    hurt[2, 3, 3] = np.nan
    np.save(here / "hurt.npy", hurt)
    left_out, = data.load("hurt.npy", (8, 9), range="-1,1").left_out
    assert list(left_out) == ["hurt.npy-00002", "holds values that are not finite"]
    np.savez(here / "two.npz", x=np.zeros((5, 2, 28, 20), np.uint8))
    np.save(here / "flat.npy", grey[0])
    np.save(here / "odd.npy", random.rand(2, 5, 6, 7))
    np.save(here / "nan.npy", half * np.nan)
    np.save(here / "words.npy", np.array(["a"]))
    np.savez(here / "statistics.npz", mu=np.zeros(9), sigma=np.eye(9))
    (here / "broken.npz").write_bytes(b"PK no zip")
    for name, why in (("flat.npy", "it has shape"), ("odd.npy", "must be the channels"), ("nan.npy", "not finite"),
                      ("two.npz", r"shape \(5, 2, 28, 20\)"),
                      ("words.npy", "should hold one array"), ("statistics.npz", "sigma has shape"),
                      ("broken.npz", "is damaged")):
        with pytest.raises(ValueError, match=why):
            data.load(name, (8, 9))


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
    every = torch.arange(256, dtype=torch.uint8).repeat(3)[5:]               # an odd number: the vector units' rest too
    x, into = data.to_float(every), torch.empty(len(every))
    assert x.min() == -1 and 1 - 2e-7 < x.max() <= 1 and torch.equal(data.to_uint8(x), every)
    assert (x - (every.double() / 127.5 - 1)).abs().max() < 2e-7
    assert data.to_float(every, out=into) is into and torch.equal(into, x)
    assert data.to_uint8(torch.tensor([-7.0, 0.0, 9.0])).tolist() == [0, 128, 255]


def test_grid_has_a_fixed_range(here):
    x = torch.zeros(5, 1, 4, 6)
    x[1] = 0.1
    sheet = np.asarray(data.grid(x, columns=3, pad=2))
    assert sheet.shape == (2 * 6 + 2, 3 * 8 + 2)
    data.save_grid("sheet.png", x, columns=3)
    assert Image.open("sheet.png").size == (26 * 4, 14 * 4)           # small ones are shown larger
    assert (sheet[2:6, 2:8] == 128).all() and (sheet[2:6, 10:16] == 140).all()         # 0.1 is 140, not white
    assert np.asarray(data.grid(torch.ones(2, 3, 4, 4))).shape == (8, 14, 3)


def test_gif_has_a_frame_a_sheet_and_its_step(here):
    for k in range(4):
        data.save_grid(here / f"step-{k:03d}.png", torch.full((4, 1, 8, 8), k / 4))
    (here / "step-copy.png").write_bytes((here / "step-000.png").read_bytes())        # no sheet of the run's
    data.save_gif("p.gif", here)
    with Image.open("p.gif") as gif, Image.open("step-000.png") as sheet:
        assert gif.n_frames == 4 and gif.size == (sheet.width, sheet.height + 24)
        labels, shades, times = [], [], []
        for k in range(4):
            gif.seek(k)
            frame = np.asarray(gif.convert("L"))
            labels.append(frame[sheet.height:].tobytes())
            shades.append(int(frame[12, 12]))
            times.append(gif.info["duration"])
    assert shades == sorted(shades) and times == [500, 500, 500, 2000]
    assert len(set(labels)) == 4                                      # the written steps differ


def test_curves_are_drawn(here):
    rows = [{"step": k, "loss_D": math.sin(k / 5), **({"loss_G": 2.0} if k % 3 else {})} for k in range(50)]
    rows[7]["now_and_then"] = 3.0
    rows += [{"step": 50, "loss_D": math.nan}, {"step": 51, "loss_D": math.inf}]
    data.save_curves("c.png", rows, [("two", ("loss_D", "loss_G")), ("one", ("now_and_then",)), ("none", ("x",))])
    chart = np.asarray(Image.open("c.png"))
    assert chart.shape == (600, 900, 3)                               # a chart without values is left away
    data.save_curves("c.png", [], [("none", ("x",))])
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
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text("utf-8").splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6, 7]
    assert set(rows[0]) == {"step", "loss_D", "loss_G", "wasserstein", "penalty", "images_per_sec", "time"}
    assert set(rows[1]) - set(rows[0]) == {"spread_fake", "spread_real"}              # with the sheet of step 3
    for key in rows[1]:
        assert f"`{key}`" in README                                   # every logged number is explained
    assert out.count("images/s") == 5 and "--resume" in out
    assert all(w.abs().max() <= 0.01 for name, w in checkpoint(run)["state"]["D"].items() if "running" not in name
               and "num_batches" not in name)                        # clipped after the update
    G = gan.load_generator(run)
    shown = torch.randn(64, 5, generator=torch.Generator().manual_seed(3))
    expected = data.grid(G(shown))
    last = Image.open(run / "samples" / "step-0000007.png")
    assert np.array_equal(np.asarray(expected.resize(last.size, Image.Resampling.NEAREST)), np.asarray(last))


BOOSTED = "--schedule boost --boost-d 0.2 --boost-g 0.2 --boost-length 4 --label-noise 0.3 --smooth 0.1"


@pytest.mark.parametrize("script, flags", [
    ("wgan", "--constraint gp"), ("wgan", "--constraint clip"), ("dcgan", BOOSTED), ("dcgan", "--schedule monitored"),
    ("dcgan", "--loss relativistic"), ("dcgan", "--minibatch-discrimination --smooth 0.1 --two-sided")])
def test_six_and_six_steps_are_twelve(here, script, flags):
    draw(here / "pictures")
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


@pytest.mark.parametrize("flags", ["--constraint lp --norm layer", "--norm instance --upsample nearest --channels 1",
                                   "--norm spectral --precision bf16 --fit squash", "--precision fp32 --batch 11",
                                   "--crop 0.1,0,0.9,1 --limit 5 --fit pad"])
def test_options_on_eight_odd_pictures(here, flags):
    draw(here / "pictures", 2)
    draw(here / "pictures" / "a", 2, (5, 40), "L", ".BMP")
    draw(here / "pictures" / "b", 2, (30, 9), "RGBA")
    draw(here / "pictures" / "c", 2, (2, 2), "P", ".gif")
    train("--steps", "2", "--out", "r", *flags.split())
    for row in map(json.loads, Path("r/log.jsonl").read_text("utf-8").splitlines()):
        assert row["loss_D"] == pytest.approx(-row["wasserstein"] + 10 * row["penalty"], abs=1e-3)
    assert gan.load_generator("r")(torch.randn(2, 5)).shape[2:] == (9, 12)


def script(*flags, **options):
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen([sys.executable, HERE / "train_wgan.py", *flags], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, env=environment, **options)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(here, number):
    draw(here / "pictures")
    process = script(*TINY, "--n-critic", "2", "--steps", "1000000", "--out", "r")
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


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no terminals that hang up here")
@pytest.mark.parametrize("before, end", [("SIG_IGN", "done: 3 steps"),
                                         ("SIG_DFL", "stopped by SIGHUP after step 1 of 3")])
def test_a_closed_terminal_says_so_twice_and_nohup_is_heard(here, before, end):
    code = ("import data, os, signal, runtime\n"
            f"signal.signal(signal.SIGHUP, signal.{before})\n"
            "parser = runtime.Parser('x.py', ''); data.add_arguments(parser); runtime.add_arguments(parser)\n"
            "run = runtime.Run(parser.parse_args(['--out', 'r', '--device', 'cpu', '--steps', '3']), 'x.py', 1)\n"
            "run.resume({})\n"
            "for step in run.steps():\n"
            "    os.kill(os.getpid(), signal.SIGHUP); print('still here', flush=True)\n"
            "    os.kill(os.getpid(), signal.SIGHUP); run.due(1)\n")
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                             env={**os.environ, "PYTHONPATH": str(HERE)})
    assert process.returncode == 0 and end in process.stdout, process.stdout + process.stderr


def test_a_reader_that_goes_away_costs_nothing(here):
    """Ctrl-C on `python train_wgan.py | tee log` ends the tee too: the run must still save."""
    draw(here / "pictures")
    process = script(*TINY, "--steps", "1000000", "--out", "r")
    for line in process.stdout:
        if line.startswith("step"):
            break
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) in (0, 120) and checkpoint("r")["step"] >= 1


def test_a_second_signal_is_obeyed_at_once(here):
    code = ("import data, os, signal, time, runtime\n"
            "parser = runtime.Parser('x.py', ''); data.add_arguments(parser); runtime.add_arguments(parser)\n"
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
    data.add_arguments(parser)
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


def test_weights_that_are_not_finite_are_never_saved(here):
    run, net = make_run("--steps", "2"), nn.Linear(1, 1)
    with pytest.raises(SystemExit, match="G stopped being finite"):
        for _ in run.steps():
            run.save({"G": net})
            net.weight.data.fill_(math.inf)
    assert checkpoint(run.folder)["step"] == 1


def test_names_that_a_terminal_cannot_show(here):
    draw(here / "牙", 3)
    (here / "牙" / "é牙.jpg").write_bytes(b"broken")
    process = subprocess.run([sys.executable, HERE / "train_wgan.py", *TINY, "--data", "牙", "--steps", "1"],
                             capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert process.returncode == 0 and "\\u7259" in process.stdout and "--data '牙'" in next(
        (here / "runs").glob("*/args.txt")).read_text("utf-8")


def test_a_save_before_the_first_sheet(here):
    draw(here / "pictures")
    train("--steps", "5", "--save-every", "2", "--sample-every", "4", "--out", "r")
    assert len(list((here / "r" / "generators").iterdir())) == 3 and (here / "r" / "progress.gif").exists()


def test_a_full_disk_is_one_sentence(capsys):
    def main():
        raise OSError(28, "No space left on device")

    assert "what was saved before is whole" in mistake(capsys, lambda: runtime.call(main, "train_wgan.py"))
    with pytest.raises(RuntimeError):                                 # a real defect keeps its traceback
        runtime.call(lambda: torch.zeros(2) @ torch.zeros(3), "train_wgan.py")


def test_torchs_word_for_a_full_disk_is_one_sentence(here, capsys):
    resource = pytest.importorskip("resource")
    runtime.write("checkpoint.pt", lambda path: torch.save(torch.zeros(9), path))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))    # as if no more would fit
    try:
        text = mistake(capsys, lambda: runtime.call(lambda: runtime.write(
            "checkpoint.pt", lambda path: torch.save(torch.zeros(99_999), path)), "train_wgan.py"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "checkpoint.pt cannot be written: is the disk full" in text and "what was saved before is whole" in text
    assert os.listdir(here) == ["checkpoint.pt"] and len(torch.load("checkpoint.pt", weights_only=True)) == 9


def test_a_garbled_log_is_read_past(here):
    (here / "log.jsonl").write_bytes(b'{"step": 1, "loss_D": 0.5}\n12\n{"loss_D": 1}\n\xff\xfe\0\n[1, 2]\n'
                                     b'{"step": "x"}\n{"step": 3, "lo\n{"step": 2, "loss_D": 0.25}\n')
    assert runtime.read_log(here) == [{"step": 1, "loss_D": 0.5}, {"step": 2, "loss_D": 0.25}]


def test_a_file_is_never_half_written(here):
    run = make_run()
    run.write("a.txt", lambda path: path.write_text("whole"))

    def fail(path):
        path.write_text("ha")
        raise OSError("disk full")

    with pytest.raises(OSError):
        run.write("a.txt", fail)
    assert (run.folder / "a.txt").read_text("utf-8") == "whole"


def test_status_line_on_a_terminal_is_one_line(here, monkeypatch, capsys):
    run = make_run("--steps", "4", "--log-every", "1")
    capsys.readouterr()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    for _ in run.steps():
        run.log(value=1.0)
    shown = capsys.readouterr().out.split("done:")[0]
    assert shown.count("\r") == 4 and shown.count("\n") == 1 and "left" in shown
    assert len(run.history()) == 4


def test_the_log_has_means_and_rates_since_its_last_line(here, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    run = make_run("--steps", "4", "--log-every", "2")                # 10 pictures a step
    for step in run.steps():
        now[0] += step
        run.log(a=step, **({"b": step} if step % 2 else {}))          # b is the mean of the steps that have it
    rows = [{name: row[name] for name in ("step", "a", "b", "images_per_sec")} for row in run.history()]
    assert rows == [dict(step=2, a=1.5, b=1.0, images_per_sec=6.7), dict(step=4, a=3.5, b=3.0, images_per_sec=2.9)]


def test_status_line_is_renewed_every_two_seconds(here, monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    run = make_run("--steps", "10", "--log-every", "1000")
    for _ in run.steps():
        now[0] += 1
        run.log(value=1.0)
    assert re.findall(r"\rstep (\d+)/", capsys.readouterr().out) == ["1", "4", "7", "10"]


def test_default_folders_never_collide(here):
    folders = [make_run("--data", "some/Teeth").folder for _ in range(3)]
    assert [str(folder) for folder in folders] == ["runs/x-Teeth-1", "runs/x-Teeth-2", "runs/x-Teeth-3"]
    parser = runtime.Parser("x.py", "")
    data.add_arguments(parser)
    runtime.add_arguments(parser)
    at_once = [runtime.Run(parser.parse_args(["--device", "cpu"]), "x.py", 1) for _ in range(2)]
    for run in at_once:
        run.resume({})
    assert [str(run.folder) for run in at_once] == ["runs/x-demo-1", "runs/x-demo-2"]


def test_precision_and_device_choices(here):
    assert make_run("--precision", "fp32").precision == "fp32"
    run = make_run("--precision", "bf16")
    with run.amp:
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="--device nonsense cannot be used here"):
        make_run("--device", "nonsense")


@pytest.mark.parametrize("flags, has", [("fpu avx512_bf16 avx2", True), ("amx_bf16", True), ("avx512f avx2", False)])
def test_bf16_is_found_without_torchs_word(monkeypatch, flags, has):
    """torch 2.4 does not say whether the processor has it; the system does."""
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    monkeypatch.setattr(Path, "exists", lambda self: True)
    monkeypatch.setattr(Path, "read_text", lambda self: f"flags : {flags}\n")
    assert runtime.has_bf16(torch.device("cpu")) is has and not runtime.has_bf16(torch.device("mps"))


# ---------------------------------------------------------------------------------------------------------------------
# DCGAN's schedules
# ---------------------------------------------------------------------------------------------------------------------

def test_classic_trains_both_always():
    schedule = train_dcgan.Schedule("classic")
    schedule.last_loss_G = torch.tensor(100.0)
    before = torch.get_rng_state()
    assert {schedule.mode() for _ in range(500)} == {"both"} and schedule.trains_D(torch.tensor(0.0))
    assert torch.equal(torch.get_rng_state(), before)                 # and draws nothing


@pytest.mark.parametrize("p_d, p_g, length", [(0.0009, 0.0001, 100), (0.02, 0.01, 10), (0.0, 0.05, 7)])
def test_long_run_rates_of_boost(p_d, p_g, length):
    schedule, steps = train_dcgan.Schedule("boost", 0.8, p_d, p_g, length), 400_000
    drawn = [schedule.mode() for _ in range(steps)]
    cycle = (p_d + p_g) * length + 1 - p_d - p_g                      # steps for one draw, on average
    for mode, p in (("D", p_d), ("G", p_g)):
        expected, runs = p * length / cycle, steps * p / cycle
        assert drawn.count(mode) / steps == pytest.approx(expected, abs=4.5 * expected / max(runs, 1) ** 0.5)
    for k in range(1, steps):                                         # runs are whole: no network sneaks in
        if drawn[k] != drawn[k - 1] and drawn[k - 1] != "both":
            assert len({*drawn[max(0, k - length):k]}) == 1


def test_boost_goes_on_where_it_was():
    schedule, other = (train_dcgan.Schedule("boost", 0.8, 0.1, 0.1, 9) for _ in range(2))
    for _ in range(57):
        schedule.mode()
    other.load_state_dict(schedule.state_dict())
    state = torch.get_rng_state()
    ahead = [schedule.mode() for _ in range(200)]
    torch.set_rng_state(state)
    assert ahead == [other.mode() for _ in range(200)] and len(set(ahead)) == 3


def test_monitored_compares_this_loss_of_d_with_the_last_of_g():
    schedule = train_dcgan.Schedule("monitored", ratio=0.8)
    assert schedule.trains_D(torch.tensor(0.0))                       # nothing to compare with yet
    schedule.last_loss_G = torch.tensor(2.0)
    assert [schedule.trains_D(torch.tensor(v)) for v in (1.59, 1.61)] == [False, True]
    for p in (0.1, 0.5, 0.9):                                         # losses uniform on [0, 1): chance 1 - p
        schedule.last_loss_G = torch.tensor(p / 0.8)
        share = sum(map(schedule.trains_D, torch.rand(4000))) / 4000
        assert share == pytest.approx(1 - p, abs=0.03)


@pytest.mark.parametrize("flags, words", [
    ("--minibatch-discrimination --r1 1 --norm none", "--minibatch-discrimination cannot go with the penalties --r1 1"),
    ("--r2 1", "take --norm none, layer"), ("--loss relativistic --norm batch", "--norm batch cannot"),
    ("--loss hinge --smooth 0.1", "hinge has no targets"), ("--two-sided", "give --smooth as well"),
    ("--smooth 0.6", "number from 0 to under 0.5"), ("--label-noise 0.5", "number from 0 to under 0.5"),
    ("--boost-d 0.6 --boost-g 0.6", "their sum is at most 1"),
    ("--loss hinge --schedule monitored", "no lower bound"), ("--r1 -1 --norm none", "number from 0")])
def test_contradictions_are_refused_with_the_reason(here, capsys, flags, words):
    draw(here / "pictures")
    assert words in mistake(capsys, lambda: train("--steps", "1", *flags.split(), script="dcgan"))


@pytest.mark.parametrize("flags", ["--loss hinge --label-noise 0.4", "--loss relativistic --norm layer --batch 2",
                                   "--norm instance --r1 0.5", BOOSTED + " --minibatch-discrimination"])
def test_dcgan_options_on_odd_pictures(here, flags):
    draw(here / "pictures", 3, (30, 9), "LA")
    train("--steps", "4", "--out", "r", *flags.split(), script="dcgan")
    rows = [json.loads(line) for line in Path("r/log.jsonl").read_text("utf-8").splitlines()]
    for key in {key for row in rows for key in row}:
        assert f"`{key}`" in README                                   # every logged number is explained
    assert gan.load_generator("r")(torch.randn(2, 5)).shape[2:] == (9, 12)


def test_a_step_trains_what_the_schedule_says(here, monkeypatch):
    draw(here / "pictures")
    modes = iter(["both", "D", "D", "G", "both"])
    monkeypatch.setattr(train_dcgan.Schedule, "mode", lambda self: next(modes))
    monkeypatch.setattr(runtime, "Run", Stub)
    updates, step = [], torch.optim.Adam.step

    def spy(self, *args, **kwargs):
        updates.append("G" if self is Stub.state["opt_G"] else "D")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    train("--steps", "5", script="dcgan")
    assert "".join(updates) == "DG" + "D" + "D" + "G" + "DG"


def test_noisy_labels_swap_real_and_fake_in_a_share_of_the_steps(here, monkeypatch):
    """And `monitored` is asked about the loss with the true labels: else it would rest on those alone."""
    draw(here / "pictures")
    calls, asked, scores, loss, forward = [], [], [], gan.bce_discriminator_loss, gan.Discriminator.forward

    def spy(a, b, *rest):
        calls.append((a is scores[-2], loss(a, b, *rest)))
        return calls[-1][1]

    monkeypatch.setattr(gan.Discriminator, "forward", lambda self, x: (scores.append(forward(self, x)), scores[-1])[1])
    monkeypatch.setattr(gan, "bce_discriminator_loss", spy)
    monkeypatch.setattr(train_dcgan.Schedule, "trains_D", lambda self, loss_D: asked.append(loss_D) or True)
    monkeypatch.setattr(runtime, "Run", Stub)
    train("--steps", "300", "--label-noise", "0.3", "--augment", "", "--size", "8", script="dcgan")
    honest = [value for real_first, value in calls if real_first]
    assert len(asked) == len(honest) == 300 and all(a is b for a, b in zip(asked, honest))
    assert (len(calls) - 300) / 300 == pytest.approx(0.3, abs=0.1)


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes of a user
# ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, words", [
    ("--clip -1", "number from 1e-09"), ("--ema nan", "number from 0 to under 1"), ("--lam -1", "number from 0"),
    ("--seed -1", "whole number from 0"), ("--resume text.txt", "is a file: give the run folder"),
    ("--resume hollow", "is damaged"), ("@quote.txt", "cannot be read"), ("--device meta", "take auto"),
    ("--data nowhere", "there is no such folder"), ("--data empty", "no pictures in this folder"),
    ("--data broken", "0 of 2 pictures can be used"), ("--data one", "1 of 1 pictures can be used and at least 2"),
    ("--data pictures/000.png", "give the folder"), ("--size 3", "the nearest size that works is 8x8"),
    ("--size 5000", "the nearest size that works is 1024x1024"), ("--size big", "write one number"),
    ("--stpes 5", "did you mean --steps?"), ("--batch 0", "'0' is no whole number from 1"),
    ("--constraint gq", "invalid choice"),
    ("one", "did you mean --data one?"), ("--resume begun", "begin again with its training script and @begun"),
    ("--evaluate-every 5 --evaluate-features it", "--evaluate-features it: take inception"),
    ("--out taken", "exists already"), ("--norm batch", "does not go with a gradient penalty"),
    ("--augment colour", "not 'colour'"), ("--crop 5", "write LEFT,TOP,RIGHT"),
    ("--holdout 1", "a share from 0"), ("--range 5", "write LOW,HIGH"),
    ("--background mud", "write a colour"), ("--group (", "no regular expression"), ("--group q+", "matches no name"),
    ("--crop 99x99", "smaller than the crop window"), ("--device cuda:77", "cannot be used here"),
    ("--resume nowhere", "there is no such run folder"), ("--resume taken", "there is no checkpoint.pt in it"),
    ("--resume garbage", "is damaged"), ("@nofile.txt", "nofile.txt"), ("--tensorboard", "pip install tensorboard")])
def test_one_sentence_and_exit_status_2(here, capsys, monkeypatch, flags, words):
    draw(here / "pictures")
    draw(here / "one", 1)
    for name in ("empty", "taken", "broken", "garbage", "hollow", "begun"):
        (here / name).mkdir()
    (here / "begun" / "args.txt").touch()
    (here / "text.txt").write_text("words")
    (here / "quote.txt").write_text("--data it's\n")
    (here / "hollow" / "checkpoint.pt").touch()
    (here / "broken" / "a.jpg").write_text("words")
    (here / "broken" / "b.png").write_bytes(b"")
    (here / "garbage" / "checkpoint.pt").write_bytes(b"\x80\x02garbage")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)                 # as if it were not installed
    def listing():
        return sorted(path for path in here.rglob("*") if "runs" not in path.parts or path.name == "args.txt")

    before = listing()
    assert words in mistake(capsys, lambda: train("--steps", "1", *flags.split()))
    assert listing() == before                                        # no run begun, nothing lost



def test_the_newest_run_of_a_kind_is_found(here, capsys):
    with pytest.raises(FileNotFoundError, match="there is no run of train_wgan.py in runs/ yet"):
        runtime.find_run("", ["train_wgan.py"])
    for k, script in enumerate(["train_wgan.py", "train_wgan.py", "train_dcgan.py", "train_dcgan.py"]):
        (here / f"runs/{k}").mkdir(parents=True)
        torch.save(dict(flags={}, script=script, step=1, state={}), here / f"runs/{k}/checkpoint.pt")
        os.utime(here / f"runs/{k}/checkpoint.pt", (1e9 + k, 1e9 + k))
    (here / "runs/3/checkpoint.pt").write_bytes(b"broken")
    os.utime(here / "runs/3/checkpoint.pt", (2e9, 2e9))
    assert runtime.find_run("", ["train_wgan.py"]) == Path("runs/1")
    assert runtime.find_run("", ["train_wgan.py", "train_dcgan.py"]) == Path("runs/2") == runtime.find_run("runs/2")
    with pytest.raises(ValueError, match="runs/2 is a run of train_dcgan.py: give one of train_wgan.py"):
        runtime.find_run("runs/2", ["train_wgan.py"])
    with pytest.raises(FileNotFoundError, match="no such run folder"):
        runtime.find_run("runs/7")

def test_what_the_system_says_names_the_place(here, capsys):
    error = OSError(30, "Read-only file system", "runs")

    def fail():
        with runtime.plain_errors("x.py"):
            raise error

    assert mistake(capsys, fail) == f"x.py: error: {here / 'runs'}: Read-only file system\n"
    assert runtime.words(OSError("said by us")) == "said by us" and runtime.words(ValueError("a")) == "a"


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

@pytest.mark.parametrize("script, flags, per_step", [
    ("wgan", "", [False, False, True]), ("wgan", "--constraint clip", [False, False, True]),
    ("dcgan", "", [False, True]), ("dcgan", "--loss relativistic", [False, True]),
    ("dcgan", "--loss hinge --minibatch-discrimination", [False, True])])
def test_the_loop_owes_nothing_to_the_plumbing(here, monkeypatch, script, flags, per_step):
    """With `Run` replaced by a stub the scripts train; D's step builds no graph of G; G's step leaves D as it is."""
    draw(here / "pictures")
    monkeypatch.setattr(runtime, "Run", Stub)
    graphs, gradients, forward, step = [], [], gan.Generator.forward, torch.optim.Optimizer.zero_grad

    def spy(self, z):
        x = forward(self, z)
        graphs.append(x.requires_grad)
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
def test_each_step_sees_fresh_pictures_and_fresh_latents(here, monkeypatch, script, draws):
    draw(here / "pictures", 40)
    seen, latents, batches, forward = [], [], data.batches, gan.Generator.forward

    def spy(*args, **kwargs):
        for x in batches(*args, **kwargs):
            seen.extend([x] if len(x) == 5 else [])                   # not the sheet of real pictures
            yield x

    monkeypatch.setattr(data, "batches", spy)
    monkeypatch.setattr(gan.Generator, "forward", lambda self, z: (latents.append(z), forward(self, z))[1])
    monkeypatch.setattr(runtime, "Run", Stub)
    train("--steps", "2", script=script)
    assert (len(seen), len(latents)) == draws
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
            f_real, f_fake = D(torch.cat([real, fake])).view(2, 5) if args.norm != "batch" else (D(real), D(fake))
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
    ("dcgan", "--loss bce --minibatch-discrimination"),
    ("dcgan", "--loss hinge --norm layer"), ("dcgan", "--loss relativistic --r1 0.7 --r2 2.5")])
def test_the_loops_against_a_plain_one(here, monkeypatch, script, flags):
    """Same seed, same pictures, another spelling of everything between: the weights of G, D and G_ema must agree."""
    draw(here / "pictures", 30)
    flags = f"{flags} --steps 3 --lr 1e-3 --size 18x20 --upsample nearest --fit squash --ema 0.3 --holdout 0.3".split()
    monkeypatch.setattr(runtime, "Run", Stub)
    torch.manual_seed(11)
    train(*flags, script=script)
    found = Stub.state
    torch.manual_seed(11)
    module, tiny = SCRIPTS[script]
    args = module.parse_arguments([*tiny, *flags])
    G = gan.Generator((18, 20), 3, 5, 4, upsample="nearest")
    D = gan.Discriminator((18, 20), 3, 4, norm=args.norm, minibatch=getattr(args, "minibatch_discrimination", False))
    pictures = data.load("pictures", (18, 20), "squash", holdout=0.3, part="train")
    assert len(list(found["D"].parameters())) == len(list(D.parameters()))
    assert 10 < len(pictures.images) < 30
    images = data.batches(pictures.images, 5, seed=3, flip=True)
    G_ema = (replay_wgan if script == "wgan" else replay_dcgan)(args, G, D, images)
    for name, net in (("G", G), ("D", D), ("G_ema", G_ema)):
        for (key, w), expected in zip(found[name].named_parameters(), net.parameters()):
            assert torch.allclose(w, expected, rtol=1e-3, atol=1e-4), (name, key)
            moved = (w - Stub.before[name][key]).abs().max()
            assert moved > 5e-4 or w.ndim == 1                        # by more than the tolerance; a bias may rest


def test_runtime_knows_nothing_of_the_papers():
    text = (HERE / "runtime.py").read_text("utf-8").lower()
    assert not re.search(r"generator|critic|loss", text)
    for module in ("gan", "data", "runtime"):
        ours = r"^\s*(import|from) (gan|data|runtime|train_\w+)\b"
        assert not re.search(ours, (HERE / f"{module}.py").read_text("utf-8"), re.M)


def test_importing_does_nothing():
    code = ("import torch; torch.manual_seed(5); before = torch.get_rng_state(); import gan, data, runtime; "
            "import train_dcgan, train_wgan, evaluate; assert torch.equal(before, torch.get_rng_state()); "
            "import generate, train_dcgan, train_wgan; assert torch.equal(before, torch.get_rng_state()); "
            "import train_dcgan, train_pix2pix, train_wgan; assert torch.equal(before, torch.get_rng_state()); "
            "import train_dcgan, train_pix2pix, train_wgan, evaluate, complete; "
            "assert torch.equal(before, torch.get_rng_state()); "
            "assert not torch.cuda.is_initialized()")
    process = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert process.returncode == 0 and process.stdout == process.stderr == ""


MODULES = {**{name: module for name, (module, _) in SCRIPTS.items()}, "pix2pix": train_pix2pix}


@pytest.mark.parametrize("script", MODULES)
def test_default_flags_are_those_of_the_readme(script):
    def table(opening):
        rows = README.split(opening, 1)[1].split("\n\n")[1]
        return {name.replace("-", "_"): (default.strip(), demo.strip() or default.strip())
                for name, default, demo in re.findall(r"^\| `--([\w-]+)` \|([^|]*)\|([^|]*)\|", rows, re.M)}

    def text(value):
        return "" if value is None or value is False else f"{value:g}" if isinstance(value, float) else str(value)

    parse, expected = MODULES[script].parse_arguments, table("All three scripts") | table(f"`train_{script}.py`; with")
    if script == "pix2pix":
        del expected["augment"]
    for column, flags in enumerate((["--data", "x"], [])):
        found = {name: text(value) for name, value in vars(parse(flags)).items()}
        assert {**found, "data": "demo"} == {name: cells[column] for name, cells in expected.items()}


def test_settings_that_follow_from_others():
    clip = train_wgan.parse_arguments(["--data", "x", "--constraint", "clip"])
    assert (clip.lr, clip.norm) == (5e-5, "batch")
    assert train_wgan.parse_arguments(["--constraint", "clip"]).lr == 2e-4
    hinge, relativistic = (train_dcgan.parse_arguments(["--loss", loss]) for loss in ("hinge", "relativistic"))
    assert (hinge.norm, hinge.r1) == ("spectral", 0) and (relativistic.norm, relativistic.r1, relativistic.r2) == (
        "none", 1, 1)
    assert train_dcgan.parse_arguments(["--loss", "relativistic", "--r1", "0.1"]).r1 == 0.1


def test_every_command_in_the_readme_and_the_docstrings_parses(here):
    draw(here / "pictures")
    for script in SCRIPTS:                                            # what --resume and @args.txt refer to
        for source in ("teeth", "sprites"):
            train("--steps", "1", "--out", f"runs/{script}-{source}-1", script=script)
    train_pix2pix.main([*PIX, "--steps", "1", "--out", "runs/pix2pix-faces-1"])
    text = README + "".join(module.__doc__ for module in MODULES.values())
    commands = re.findall(r"python train_(\w+)\.py((?: [^\s`#|]+)*)", text)
    assert len(commands) > 20 and sum("--resume" in flags for _, flags in commands) >= 3
    for script, flags in commands:
        MODULES[script].parse_arguments(shlex.split(flags))
    draw(here / "teeth", 6, (500, 510))
    for file in (here / "teeth").iterdir():                           # detail in the middle, for --crop auto to find
        ImageOps.expand(Image.open(file), 120, "grey").save(file)
    commands = re.findall(r"python data\.py((?: [^\s`#|]+)*)", README)
    assert len(commands) >= 4
    for flags in commands:
        data.main(shlex.split(flags))                                 # these are quick: run, not only parsed


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


# ---------------------------------------------------------------------------------------------------------------------
# pix2pix
# ---------------------------------------------------------------------------------------------------------------------

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
        """(4, 2, 1) down, what lies deeper, (4, 2, 1) up: of level k, the picture's being 0."""
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
    assert torch.allclose(U(x)[1:2], U(x[1:2]), atol=1e-5)            # each picture by itself


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


@pytest.mark.parametrize("make", [
    lambda: gan.UNet(4), lambda: gan.UNet(64, norm="spectral"), lambda: gan.UNet(64, upsample="bilinear"),
    lambda: gan.UNet(64, depth=1), lambda: gan.UNet(64, features=0), lambda: gan.PatchGAN(norm="group"),
    lambda: gan.PatchGAN(n_layers=0)])
def test_pix2pix_networks_that_cannot_be_built_say_why(make):
    with pytest.raises(ValueError):
        make()


def test_nothing_inside_the_hole_gets_through():
    x, m = torch.randn(3, 2, 8, 9).clamp(-1, 1), data.masks("box", 3, (8, 9))
    other = torch.where(m > 0, x, torch.randn_like(x) * 100)
    other[(m == 0).expand_as(x)] = torch.tensor([math.nan, math.inf, 5.0])[torch.arange(int((m == 0).sum() * 2)) % 3]
    a = gan.completion_input(x, m)
    assert torch.equal(a, gan.completion_input(other, m)) and a.shape == (3, 3, 8, 9)
    assert torch.equal(a[:, :2], x * m) and torch.equal(a[:, 2:], 2 * m - 1)
    y = torch.randn_like(x)
    assert torch.equal(gan.composite(x, y, m), x * m + y * (1 - m))
    assert torch.equal(gan.composite(other, y, m), gan.composite(x, y, m))
    U = gan.UNet(8, 3, 2, 4).eval()
    assert torch.equal(U(gan.completion_input(other, m)), U(gan.completion_input(x, m)))


def test_l1_and_psnr_against_loops():
    y, fake, m = torch.randn(4, 3, 6, 8), torch.randn(4, 3, 6, 8), data.masks("box", 4, (6, 8), seed=2)
    total = number = 0
    for n in range(4):
        inside = [(y[n, c, i, j] - fake[n, c, i, j]).item() for c in range(3) for i in range(6) for j in range(8)
                  if m[n, 0, i, j] == 0]
        total, number = total + sum(map(abs, inside)), number + len(inside)
        expected = 10 * math.log10(4 / (sum(d * d for d in inside) / len(inside)))
        assert gan.psnr(y, fake, m)[n].item() == pytest.approx(expected, abs=1e-4)
    assert gan.l1_loss(y, fake, m).item() == pytest.approx(total / number, rel=1e-5)
    assert gan.l1_loss(y, fake).item() == pytest.approx((y - fake).abs().mean().item(), rel=1e-6)
    center = data.masks("center", 4, (8, 8))                          # a quarter: 4 times the L1, 6.02 dB less
    y, fake = torch.randn(2, 4, 3, 8, 8)
    fake = gan.composite(y, fake, center)
    assert gan.l1_loss(y, fake, center).item() == pytest.approx(4 * gan.l1_loss(y, fake).item(), rel=1e-5)
    more = gan.psnr(y, fake) - gan.psnr(y, fake, center)
    assert torch.allclose(more, torch.full((4,), 10 * math.log10(4)), atol=1e-4)
    assert gan.psnr(y, y).tolist() == pytest.approx([10 * math.log10(4e10)] * 4, abs=1e-3)


def test_load_generator_knows_the_unet(here):
    U, G = gan.UNet((12, 9), 4, 3, 4, depth=2, norm="layer"), gan.Generator(8, 1, 5, 4)
    for net, x in ((U, torch.randn(2, 4, 12, 9)), (G, torch.randn(2, 5))):
        torch.save(gan.saved_generator(net), "g.pt")
        back = gan.load_generator("g.pt")
        assert type(back) is type(net) and torch.equal(back(x), net.eval()(x))
    torch.save({**gan.saved_generator(U), "network": "Transformer"}, "g.pt")
    with pytest.raises(ValueError, match="no file that a training script wrote"):
        gan.load_generator("g.pt")
    saved = gan.saved_generator(G)
    del saved["network"]                                              # as older files are
    torch.save(saved, "g.pt")
    assert type(gan.load_generator("g.pt")) is gan.Generator


def test_pairs_made_of_single_pictures():
    pixels = np.random.RandomState(0).randint(0, 256, (2, 3, 24, 36)).astype(np.uint8)
    y = data.to_float(torch.from_numpy(pixels))
    for k in range(2):
        im = Image.fromarray(pixels[k].transpose(1, 2, 0).copy())
        assert np.abs(np.asarray(im.convert("L")) - (data.to_grey(y)[k, 0].numpy() + 1) * 127.5).max() < 1
        planes = [Image.fromarray(plane.numpy(), "F") for plane in y[k]]
        small = [plane.resize((9, 6), Image.Resampling.BICUBIC) for plane in planes]
        large = [Image.fromarray(np.asarray(plane).clip(-1, 1)).resize((36, 24), Image.Resampling.BICUBIC)
                 for plane in small]
        assert np.abs(data.degrade(y, 4)[k].numpy() - np.stack([np.asarray(p) for p in large]).clip(-1, 1)).max() < 1e-4
    noise = torch.full((2, 3, 6, 9), 0.1)
    assert (data.degrade(y * 0.5, 4, noise) - data.degrade(y * 0.5, 4)).mean().item() == pytest.approx(0.1, abs=1e-3)
    assert data.degrade(y, 1.5).shape == y.shape and data.degrade(y, 100).shape == y.shape

    x = torch.zeros(1, 3, 9, 10)
    x[..., 5:] = 0.5                                                  # an edge between two columns
    drawing = data.line_drawing(x)
    assert drawing.shape == (1, 1, 9, 10) and (drawing[..., 4:6] < -0.5).all() and (drawing[..., :3] == 1).all()
    assert torch.allclose(drawing, data.line_drawing(x * 0.3), atol=1e-4) and (data.line_drawing(x * 0) == 1).all()
    x = torch.randn(1, 1, 7, 6)
    padded, g = np.pad(x[0, 0].numpy(), 2, "edge"), np.zeros((7, 6))
    blur = sum(a * b * padded[i:i + 9, j:j + 8] for i, a in enumerate((0.25, 0.5, 0.25))
               for j, b in enumerate((0.25, 0.5, 0.25)))
    for i in range(7):
        for j in range(6):
            window = blur[i:i + 3, j:j + 3]
            g[i, j] = np.hypot(*(np.dot(side[2] - side[0], (0.25, 0.5, 0.25)) for side in (window, window.T)))
    expected = 1 - 2 * np.minimum(1, g / (4 * g.mean()))
    assert np.allclose(data.line_drawing(x)[0, 0].numpy(), expected, atol=1e-5)


def draw_pairs(folder, n=8, size=(20, 24), seed=0):
    """n smooth coloured pictures A and what is to be made of them, B: the negative, in grey; uint8."""
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


def test_pairs_on_disk(here):
    pairs = draw_pairs(here, 40)
    write_pairs(here, pairs)
    a = np.stack([np.asarray(im).transpose(2, 0, 1) for im, _ in pairs])
    b = np.stack([np.asarray(im)[None] for _, im in pairs])
    order = sorted(range(40), key=str)
    for folder in ("two", "wide"):
        (found, channels), (turned, other) = (data.load_pairs(pair_flags("--data", folder, "--direction", direction))
                                              for direction in ("AtoB", "BtoA"))
        assert (channels, other) == (3, 1) and found.images.shape == turned.images.shape == (40, 4, 20, 24)
        assert np.array_equal(np.asarray(found.images), np.concatenate([a, b], 1)[order])
        assert np.array_equal(turned.images[np.arange(40)], np.concatenate([b, a], 1)[order])
        parts = [data.load_pairs(pair_flags("--data", folder, "--holdout", "0.3"), part)[0]
                 for part in ("train", "heldout", "all")]
        names = [set(part.names) for part in parts]
        assert names[0] | names[1] == names[2] and not names[0] & names[1] and 4 <= len(names[1]) <= 20
        assert parts[0].held_out == len(names[1]) and parts[0].fingerprint != parts[1].fingerprint
    (here / "two/A/x/3.png").write_bytes(b"broken")                   # its partner goes with it
    found, _ = data.load_pairs(pair_flags("--data", "two"))
    order.remove(3)
    assert np.array_equal(found.images[np.arange(39)], np.concatenate([a, b], 1)[order]) and len(found.left_out) == 1
    assert data.load_pairs(pair_flags("--data", "two", "--limit", "24"))[0].images.shape[0] == 23


def refused(capsys, *flags):
    return mistake(capsys, lambda: train_pix2pix.main(["--device", "cpu", "--steps", "1", "--features", "4", *flags]))


def test_single_masked_pictures_are_no_pairs(here, capsys):
    """What ended a student's project: masked faces, a file each, given to pix2pix, which took halves for pairs."""
    (here / "faces").mkdir()
    (here / "wide").mkdir()
    for k, (a, _) in enumerate(draw_pairs(here, 9, (64, 64))):
        a.paste((0, 0, 0), (16, 16, 48, 48))
        a.save(here / f"faces/{k}.png")
    text = refused(capsys, "--data", "faces", "--task", "pairs")
    assert "single pictures, not pairs" in text and "each half would have 64x32" in text
    assert "python train_pix2pix.py --data faces --task complete" in text and not list(here.glob("runs/pix2pix*"))
    text = refused(capsys, "--data", "faces", "--task", "complete", "--holdout", "0", "--limit", "9")
    assert "100 % of the middle is the same in all pictures" in text and "give the whole pictures" in text
    for k, (a, _) in enumerate(draw_pairs(here, 6, (40, 100))):       # wide single pictures: no edge in the middle
        a.save(here / f"wide/{k}.png")
    assert "goes on into the right half without an edge" in refused(capsys, "--data", "wide", "--task", "pairs")


def test_a_name_stands_once_on_each_side(here):
    for name in ("A/x.png", "B/x.png", "B/x.jpg"):
        (here / name).parent.mkdir(exist_ok=True)
        Image.new("L", (16, 16), 99).save(here / name)
    with pytest.raises(ValueError, match="B holds x.jpg and another picture of that name"):
        data.find_pairs(here)


def test_a_program_in_a_pictures_clothes_is_not_run(here):
    (here / "d").mkdir()
    Image.new("RGB", (16, 16), "red").save(here / "d" / "a.png")
    Image.new("RGB", (16, 16), "red").save(here / "d" / "b.png", "EPS")
    (name, why), = data.load("d", (16, 16)).left_out
    assert name == "b.png" and "PostScript" in why


def test_what_is_a_pair_is_taken(here):
    random = np.random.RandomState(0)
    for kind in ("negative", "grainy", "plain", "unlike"):
        (here / kind).mkdir()
        for k, (a, b) in enumerate(draw_pairs(here, 6, (32, 40), seed=len(kind))):
            x = np.asarray(a.convert("L"), np.float64)
            if kind == "negative":
                y = np.asarray(b)
            elif kind == "grainy":                                    # no edge in so much grain, but one thing twice
                x = random.uniform(0, 255, x.shape)
                y = 0.9 * x
            elif kind == "unlike":                                    # but for the edge, nothing speaks for a pair
                y = 255 * (random.rand() > 0.5) + random.normal(0, 9, x.shape)
            else:                                                     # objects on white: the seam says nothing
                x[:, :4] = x[:, -4:] = 255
                y = 255 - np.abs(np.diff(x, axis=1, prepend=255))
            Image.fromarray(np.hstack([x, y]).clip(0, 255).astype(np.uint8)).save(here / kind / f"{k}.png")
        assert data.single_pictures(sorted((here / kind).iterdir())) == "", kind


def test_mistakes_with_pairs(here, capsys):
    write_pairs(here, draw_pairs(here))
    draw(here / "unpaired/trainA")
    draw(here / "unpaired/trainB")
    assert "need no pairs" in refused(capsys, "--data", "unpaired", "--task", "pairs")
    (here / "two/A/x/3.png").unlink()
    assert "x/3 for one" in refused(capsys, "--data", "two", "--task", "pairs")
    assert "the demo has single pictures" in refused(capsys, "--task", "pairs")
    assert "needs a folder" in refused(capsys, "--data", "nowhere", "--task", "pairs")
    assert "cut the two pictures" in refused(capsys, "--data", "wide", "--task", "pairs", "--crop", "auto-each")
    for name, picture in (("same", lambda a: a), ("flat", lambda a: a.convert("L").point(lambda v: v // 128))):
        (here / name / "A").mkdir(parents=True)
        (here / name / "B").mkdir()
        for k, (a, _) in enumerate(draw_pairs(here)):
            a.save(here / name / f"A/{k}.png")
            picture(a).save(here / name / f"B/{k}.png")
    assert "the same picture, so there is nothing to learn" in refused(capsys, "--data", "same", "--task", "pairs")
    text = refused(capsys, "--data", "flat", "--task", "pairs")
    assert "the target is one flat colour (its levels are 0 to 1" in text
    draw(here / "pictures", mode="L")
    Image.new("L", (8, 8), 255).save("white.png")
    for flags, words in (("--task colorize", "are grey, so there is no colour"), ("--mask white.png", "has no hole"),
                         ("--depth 7", "--depth 7: at --size 64 it can be 2 to 6"), ("--depth 1", "it can be 2 to 6"),
                         ("--n-layers 5", "at --size 64 it can be 1 to 4"), ("--factor 0.5", "number from 1"),
                         ("--mask center,middle", "take center, half")):
        assert words in refused(capsys, "--data", "pictures", *flags.split())
    assert "PSNR and L1 on held-out" in refused(capsys, "--data", "pictures", "--evaluate-every", "5")
    assert "auto" not in refused(capsys, "--data", "pictures", "--latent", "5")     # a flag of the other scripts
    assert not list(here.glob("runs/pix2pix*"))


PIX = ("--device cpu --data pictures --size 17x12 --features 4 --batch 3 --log-every 2 --sample-every 3 --save-every 4 "
       "--flip --seed 3 --holdout 0.3 --warm-up 2").split()


@pytest.mark.parametrize("flags", ["--task complete --mask center,box,random", "--task enhance --dropout 0.1",
                                   "--task edges --norm spectral", "--task colorize --norm none --upsample nearest",
                                   "--task pairs --data wide --direction BtoA"])
def test_six_and_six_steps_of_pix2pix_are_twelve(here, flags):
    draw(here / "pictures", 12)
    write_pairs(here, draw_pairs(here, 12))
    train_pix2pix.main([*PIX, *flags.split(), "--steps", "12", "--out", "a"])
    train_pix2pix.main([*PIX, *flags.split(), "--steps", "6", "--out", "b"])
    train_pix2pix.main(["--resume", "b", "--steps", "12"])
    a, b = checkpoint("a"), checkpoint("b")
    assert a["step"] == b["step"] == 12 and a["network"] == "UNet"
    assert all(same(a[key], b[key]) for key in ("state", "random", "same", "config", "network"))
    rows = [[json.loads(line) for line in Path(run, "log.jsonl").read_text().splitlines()] for run in "ab"]
    for a, b in zip(*rows):
        assert {**a, "time": 0, "images_per_sec": 0} == {**b, "time": 0, "images_per_sec": 0}
    assert set(rows[0][0]) == {"step", "l1", "images_per_sec", "time"}                # warm-up: L1 alone
    assert set(rows[0][1]) - set(rows[0][0]) == {"loss_D", "loss_G", "D_x", "D_G_z", "psnr_heldout", "psnr_trivial",
                                                 "l1_heldout"}
    assert rows[0][1]["loss_D"] == pytest.approx(math.log(2), abs=0.1)                # halved: a D that guesses
    for key in rows[0][1]:
        assert f"`{key}`" in README                                   # every logged number is explained
    assert {str(p.relative_to("a")) for p in Path("a").rglob("*") if p.is_file()} == {
        "args.txt", "checkpoint.pt", "log.jsonl", "losses.png", "pairs.png", "progress.gif",
        *(f"generators/step-{k:07d}.pt" for k in (4, 8, 12)), *(f"samples/step-{k:07d}.png" for k in (3, 6, 9, 12))}
    G = gan.load_generator("a")
    assert G(torch.randn(2, G.config["c_in"], 17, 12)).shape == (2, G.config["c_out"], 17, 12)


def test_sheet_and_held_out_numbers_of_pix2pix(here):
    """The sheet shows, of held-out pictures, x | G(x) | y of the averaged network, and the log measures just these."""
    draw(here / "pictures", 12)
    train_pix2pix.main([*PIX, "--steps", "5", "--out", "a"])
    args = train_pix2pix.parse_arguments([*PIX, "--steps", "5"])
    unseen = data.load_flags(args, "heldout").images
    assert 1 <= len(unseen) <= 8
    y = next(data.batches(unseen, len(unseen), 3))
    x, _, m = train_pix2pix.Pairs(args, (17, 12), 3, 0)(y, 0)
    out = torch.where(m > 0, y, torch.cat([gan.load_generator("a")(x[k:k + 3]) for k in range(0, len(x), 3)]))
    last = json.loads(Path("a/log.jsonl").read_text().splitlines()[-1])
    assert last["psnr_heldout"] == pytest.approx(gan.psnr(y, out, m).mean().item(), abs=1e-3)
    assert last["l1_heldout"] == pytest.approx(gan.l1_loss(y, out, m).item(), rel=1e-4)
    mean = torch.stack([torch.stack([p[c][k[0] > 0].mean() for c in range(3)]) for p, k in zip(y, m)])[..., None, None]
    assert last["psnr_trivial"] == pytest.approx(gan.psnr(y, mean.expand_as(y), m).mean().item(), abs=1e-3)
    shown = data.grid(torch.stack([x[:, :3], out, y], 1).flatten(0, 1), 12)
    sheet = Image.open("a/samples/step-0000005.png")
    assert np.array_equal(np.asarray(shown.resize(sheet.size, Image.Resampling.NEAREST)), np.asarray(sheet))
    assert (x[:, :3][(m == 0).expand(-1, 3, -1, -1)] == 0).all()


def test_sheets_of_grey_and_of_colour():
    grey, colour = torch.rand(4, 1, 2, 3), torch.rand(4, 3, 2, 3)
    masked = torch.cat([grey, torch.ones(4, 1, 2, 3)], 1), torch.cat([colour, torch.ones(4, 1, 2, 3)], 1)
    sheet = train_pix2pix.sheet(masked[0], grey, grey * 0.5)          # grey pictures with their mask stay grey
    assert sheet.shape == (12, 1, 2, 3) and torch.equal(sheet[3], grey[1]) and torch.equal(sheet[5], grey[1] * 0.5)
    sheet = train_pix2pix.sheet(grey, masked[1], colour)
    assert sheet.shape == (12, 3, 2, 3) and torch.equal(sheet[3], grey[1].expand(3, -1, -1))
    assert torch.equal(sheet[4], colour[1]) and torch.equal(sheet[5], colour[1])


@pytest.mark.parametrize("flags", ["--task complete --norm layer --l1 30", "--task colorize --norm instance --l1 7",
                                   "--task complete --mask strokes --norm none"])
def test_the_loop_of_pix2pix_against_a_plain_one(here, monkeypatch, flags):
    """Same seed, same pairs, the objective as the paper writes it: the weights of G, D and G_ema must agree."""
    draw(here / "pictures", 12)
    flags = [*PIX, *flags.split(), *"--steps 4 --lr 1e-3 --ema 0.9 --warm-up 1 --precision fp32".split()]
    monkeypatch.setattr(runtime, "Run", Stub)
    gradients, clear = [], torch.optim.Optimizer.zero_grad

    def watch(self, *args, **kwargs):
        if self is Stub.state["opt_G"]:                               # after D's step, before G's backward pass
            gradients.append([w.grad if w.grad is None else w.grad.clone() for w in Stub.state["D"].parameters()])
        return clear(self, *args, **kwargs)

    torch.manual_seed(11)
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Optimizer, "zero_grad", watch)
        train_pix2pix.main(flags)
    found = Stub.state
    assert all(torch.equal(w.grad, g) for w, g in zip(found["D"].parameters(), gradients[-1]))   # G's left them alone
    torch.manual_seed(11)
    args = train_pix2pix.parse_arguments(flags)
    pictures = data.load_flags(args, "train").images
    pairs = train_pix2pix.Pairs(args, (17, 12), 3, 0)
    G = gan.UNet((17, 12), pairs.channels_x, 3, 4, norm=args.norm)
    D = gan.PatchGAN(pairs.channels_x + 3, 4, n_layers=1, norm=args.norm)
    G_ema = copy.deepcopy(G).eval()
    opt_G, opt_D = (torch.optim.Adam(net.parameters(), 1e-3, (0.5, 0.999)) for net in (G, D))
    images = data.batches(pictures, 3, seed=3, flip=True)
    for step in range(1, 5):
        x, y, m = pairs(next(images), step)
        fake = G(x)
        if m is not None:
            fake = m * y + (1 - m) * fake
        if step > 1:
            p_real, p_fake = D(torch.cat([x, y], 1)).sigmoid(), D(torch.cat([x, fake], 1).detach()).sigmoid()
            opt_D.zero_grad()
            (-0.5 * (p_real.log().mean() + (1 - p_fake).log().mean())).backward()
            opt_D.step()
        loss = args.l1 * (y - fake).abs().sum() / (y.numel() if m is None else 3 * (m == 0).sum())
        if step > 1:
            loss = loss - D(torch.cat([x, fake], 1)).sigmoid().log().mean()
        opt_G.zero_grad()
        loss.backward()
        opt_G.step()
        gan.update_ema(G_ema, G, 0.9, step)
    for name, net in (("G", G), ("D", D), ("G_ema", G_ema)):
        for (key, w), expected in zip(found[name].named_parameters(), net.parameters()):
            assert torch.allclose(w, expected, rtol=1e-3, atol=2e-4), (name, key)
            moved = (w - Stub.before[name][key]).abs().max()
            assert moved > 5e-4 or w.ndim == 1


def test_masks_are_drawn_of_all_kinds_and_anew_each_step(here):
    args = train_pix2pix.parse_arguments(["--data", "x", "--mask", "center,center,half"])
    pairs, y = train_pix2pix.Pairs(args, (16, 16), 1, 0), torch.randn(4000, 1, 16, 16)
    (x, target, m), (_, _, again), (_, _, other) = pairs(y, 5), pairs(y, 5), pairs(y, 6)
    assert torch.equal(m, again) and not torch.equal(m, other) and torch.equal(target, y)
    assert torch.equal(x, gan.completion_input(y, m))                 # outside the hole input and target agree
    share = (m == 0).float().mean((1, 2, 3))
    assert (share == 0.25).float().mean().item() == pytest.approx(2 / 3, abs=0.03)    # a kind named twice
    assert ((share == 0.25) | (share == 0.5)).all()


def test_every_seed_and_every_process_draws_masks_of_its_own(monkeypatch):
    def drawn(seed, process):
        monkeypatch.setenv("RANK", str(process))
        args = train_pix2pix.parse_arguments(["--data", "x", "--mask", "center,half", "--seed", str(seed)])
        pairs = train_pix2pix.Pairs(args, (16, 16), 1, 0)
        pairs.pool = torch.arange(256).view(-1, 1, 1, 1).expand(-1, 1, 16, 16)
        return pairs(torch.zeros(16, 1, 16, 16), 5)[2][:, 0, 0, 0]

    draws = [drawn(seed, process) for seed in (0, 1, 2, 2**32 - 1) for process in (0, 1)]
    assert all(not torch.equal(a, b) for k, a in enumerate(draws) for b in draws[:k])
    assert torch.equal(drawn(2, 1), draws[5])


def test_the_completion_of_the_readme_runs(here, monkeypatch):
    code = next(block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "completion_input" in block)
    draw(here / "pictures", 12)
    train_pix2pix.main([*PIX, "--steps", "1", "--out", "runs/pix2pix-faces-1"])
    monkeypatch.syspath_prepend(HERE)
    cell = {}
    exec(code, cell)
    inside = (cell["m"] == 0).expand_as(cell["x"])
    assert torch.equal(cell["completed"][~inside], cell["x"][~inside])
    assert (cell["completed"] != cell["x"])[inside].float().mean() > 0.9


def test_overfit_check(here, capsys):
    draw(here / "noise", 12, (8, 8))
    write_pairs(here, draw_pairs(here, 12))
    for flags, status, words in ((["--data", "wide", "--features", "16"], 0, "passed"),
                                 (["--data", "wide", "--lr", "1e-7"], 1, "FAILED")):
        with pytest.raises(SystemExit) as stopped:
            train_pix2pix.main([*PIX, "--task", "pairs", *flags, "--lr", "2e-3", "--overfit-check",
                                *(["--lr", "1e-7"] if status else [])])
        assert stopped.value.code == status and words in capsys.readouterr().out
    assert not list(here.glob("runs/pix2pix*"))                       # no run is made


# ---------------------------------------------------------------------------------------------------------------------
# evaluate.py: the network and the resizes
# ---------------------------------------------------------------------------------------------------------------------

# Of pytorch-fid 0.3.0 with the weights of evaluate.random_weights(): the number of names in its network's state_dict
# and the crc32 of names and shapes; every (dims / 8)-th feature of a picture and the mean of the last dims / 8.
# PRDC: prdc 0.2 on the two sets below.
KEYS_OF_PYTORCH_FID = (566, 832996088)
FEATURES_OF_PYTORCH_FID = {
    64: [0.022596, 0.00084597, 0.093486, 0.73797, 0.85392, 0.11693, 0.41315, 0.95328, 0.3627959],
    192: [0.021706, 0.47176, 0.1914, 0.31815, 0.016957, 0.55221, 0.025151, 0.15522, 0.3436883],
    768: [0.24402, 0.022263, 0.07429, 0.081583, 1.0292, 0.00063889, 0.020331, 0.033609, 0.2220525],
    2048: [0.0064534, 0, 0, 0.16878, 0.0066635, 0, 0.0031269, 0, 0.2505267]}
PRDC = [1.0, 2 / 3, 1.304, 0.8]                                       # precision, recall, density, coverage; k = 5

class Tiny(nn.Module):
    """Features of pictures that cost nothing: means over a 4x4 grid."""

    def forward(self, x):
        return nn.functional.adaptive_avg_pool2d(x, 4).flatten(1)


@pytest.fixture
def tiny(here):
    """The file of such a network, for --features."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(Tiny(), torch.zeros(2, 3, 16, 16)), "tiny.pt")
    return "tiny.pt"


@pytest.fixture(scope="module")
def weights():
    return evaluate.random_weights()


def pictures_of(n, seed=0, size=(16, 16), channels=3, smooth=True):
    """uint8 (n, channels, *size): blobs, so that two of them differ by more than noise."""
    x = np.random.RandomState(seed).rand(n, channels, 5, 5) if smooth else np.random.RandomState(seed).rand(
        n, channels, *size)
    x = nn.functional.interpolate(torch.from_numpy(x), size, mode="bilinear")
    return (x * 255).round().to(torch.uint8).numpy()


def test_the_network_is_the_published_one(weights):
    listing = "".join(f"{key} {tuple(value.shape)}\n" for key, value in sorted(weights.items()))
    assert (len(weights), zlib.crc32(listing.encode())) == KEYS_OF_PYTORCH_FID
    picture = pictures_of(1, 5, (40, 50))
    for dims, expected in FEATURES_OF_PYTORCH_FID.items():
        net = evaluate.Inception(dims).eval()
        net.load_state_dict(weights)
        x = evaluate.inception_input(torch.from_numpy(picture))
        with torch.no_grad():
            found = net(x)
            folded = evaluate.fold(net)(x)
        assert found.shape == (1, dims)
        seen = torch.cat([found[0, dims // 8 - 1::dims // 8], found[0, -dims // 8:].mean(0, keepdim=True)])
        assert torch.allclose(seen, torch.tensor(expected), rtol=1e-4, atol=1e-5)
        assert (found - folded).abs().max() <= 1e-5


def test_random_weights_are_the_same_everywhere_and_leave_random_numbers_alone(weights):
    before = torch.get_rng_state()
    assert same(evaluate.random_weights()["Conv2d_1a_3x3.conv.weight"], weights["Conv2d_1a_3x3.conv.weight"])
    assert torch.equal(before, torch.get_rng_state())
    first = weights["Conv2d_1a_3x3.conv.weight"].flatten()
    a = math.sqrt(6 / 27)
    assert torch.allclose(first[:3], torch.from_numpy(np.random.RandomState(0).uniform(-a, a, 3)).float())


@pytest.mark.parametrize("side", [7, 32, 299, 310])
def test_resizes_against_loops_and_pillow(side):
    images = torch.from_numpy(pictures_of(2, 1, (side, 11), smooth=False))
    x = images.double()
    tf1, clean, torchs = (evaluate.inception_input(images, name) for name in ("torch-fidelity", "clean-fid",
                                                                              "pytorch-fid"))
    random = np.random.RandomState(0)
    for _ in range(60):
        n, c, i, j = random.randint(2), random.randint(3), random.randint(299), random.randint(299)

        def bilinear(y, u, n=n, c=c):
            y, u = min(max(y, 0), side - 1), min(max(u, 0), 10)
            top, left = int(y), int(u)
            t, s, low, right = y - top, u - left, min(top + 1, side - 1), min(left + 1, 10)
            return ((1 - t) * (1 - s) * x[n, c, top, left] + (1 - t) * s * x[n, c, top, right]
                    + t * (1 - s) * x[n, c, low, left] + t * s * x[n, c, low, right])

        assert tf1[n, c, i, j] == pytest.approx(float((bilinear(i * side / 299, j * 11 / 299) - 128) / 128), abs=1e-4)
        half = bilinear((i + 0.5) * side / 299 - 0.5, (j + 0.5) * 11 / 299 - 0.5)
        assert torchs[n, c, i, j] == pytest.approx(float(half / 127.5 - 1), abs=1e-4)
    with_pillow = np.asarray(Image.fromarray(x[1, 2].float().numpy()).resize((299, 299), Image.Resampling.BICUBIC))
    assert np.abs((with_pillow.clip(0, 255) - 128) / 128 - clean[1, 2].numpy()).max() < 2e-3
    assert evaluate.inception_input(images[:, :1]).shape == (2, 3, 299, 299)


def test_weights_are_found_checked_and_missed_with_one_sentence(here, weights, capsys, monkeypatch):
    torch.save({**weights, "AuxLogits.fc.weight": torch.zeros(1008, 768)}, "published.pth")
    extract = evaluate.load_features(weights="published.pth", dims=64)
    assert "not the published ones" in extract.name
    grey = pictures_of(3, channels=1)
    a, b = extract(grey, batch=2), evaluate.load_features("random", dims=64)(np.repeat(grey, 3, 1))
    assert a.shape == (3, 64) and torch.allclose(a, b, atol=1e-4)
    monkeypatch.setenv("TORCH_HOME", str(here / "home"))
    folder = here / "home" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    cached = folder / "weights-inception-2015-12-05-6726825d.pth"
    cached.write_bytes(b"")
    assert evaluate.find_weights() == cached
    cached.unlink()

    def no_network(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    for path, words in (("", f"put {evaluate.ADDRESS} at {folder}"), ("nowhere.pth", "there is no such file"),
                        ("torchvision.pth", "does not hold the weights"), ("text.pth", "cannot be read")):
        torch.save({**weights, "fc.weight": torch.zeros(1000, 2048)}, "torchvision.pth")
        Path("text.pth").write_text("words")
        with pytest.raises((OSError, ValueError), match=re.escape(words)):
            evaluate.load_features(weights=path)
    draw(here / "pictures", 4)
    text = mistake(capsys, lambda: evaluate.main(["--real", "pictures", "--fake", "pictures"]))
    assert "--features random" in text and "--weights FILE" in text


def test_features_refuse_what_is_no_uint8_picture(tiny):
    extract = evaluate.load_features(tiny)
    for images in (np.zeros((2, 3, 8, 8)), np.zeros((2, 8, 8, 3), np.uint8), np.zeros((0, 3, 8, 8), np.uint8)):
        with pytest.raises(ValueError, match="uint8"):
            extract(images)
    with pytest.raises(ValueError, match="neither TorchScript nor"):
        evaluate.load_features(__file__)
    torch.export.save(torch.export.export(Tiny(), (torch.zeros(2, 3, 16, 16),)), "exported.pt2")
    images = pictures_of(2)
    assert torch.equal(evaluate.load_features("exported.pt2")(images), extract(images))


# ---------------------------------------------------------------------------------------------------------------------
# evaluate.py: scores
# ---------------------------------------------------------------------------------------------------------------------

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
    assert evaluate.fid(real, fake) == pytest.approx(expected, rel=1e-10)
    assert evaluate.fid(fake.numpy(), real.numpy()) == pytest.approx(expected, rel=1e-10)
    assert evaluate.frechet_distance(mean[0], a, mean[1].numpy(), b.numpy()) == pytest.approx(expected, rel=1e-10)
    widths = torch.arange(1.0, 6, dtype=torch.float64)                # diagonal: sum of (s - t)^2
    real, fake = (exactly(40, torch.zeros(5, dtype=torch.float64), torch.diag(s**2), k)
                  for k, s in enumerate((widths, widths.flip(0))))
    assert evaluate.fid(real, fake) == pytest.approx(float((widths - widths.flip(0)).square().sum()), rel=1e-9)


@pytest.mark.parametrize("n, m", [(7, 9), (12, 60), (60, 12), (80, 90)])
def test_fid_below_the_dimension_and_of_a_set_with_itself(n, m):
    real, fake = torch.randn(n, 40), torch.randn(m, 40) * 1.5 + 0.2
    one, two = (np.cov(x.numpy(), rowvar=False) for x in (real, fake))
    eigenvalues = np.linalg.eigvals(one @ two).real                   # nobody's square roots but numpy's eigenvalues
    expected = (((real.mean(0) - fake.mean(0)) ** 2).sum().item() + np.trace(one) + np.trace(two)
                - 2 * np.sqrt(eigenvalues.clip(0)).sum())
    assert evaluate.fid(real, fake) == pytest.approx(expected, rel=1e-4)
    assert evaluate.frechet_distance(real.mean(0), one, fake.mean(0), two) == pytest.approx(expected, rel=1e-4)
    assert abs(evaluate.fid(real, real.clone())) < 1e-6 and evaluate.fid(real, fake) > 1
    constant = torch.cat([torch.randn(90, 3), torch.zeros(90, 2)], 1)                 # features that never vary
    assert abs(evaluate.fid(constant, constant)) < 1e-6


def test_kid_against_a_loop_and_of_a_set_with_itself():
    real, fake = np.random.RandomState(0).randn(9, 4), np.random.RandomState(1).randn(9, 4) + 0.5

    def k(x, y):
        return (x @ y / 4 + 1) ** 3

    within = sum(k(x[i], x[j]) for x in (real, fake) for i in range(9) for j in range(9) if i != j) / 72
    across = sum(k(x, y) for x in real for y in fake) / 81
    assert evaluate.kid(real, fake) == (pytest.approx(within - 2 * across), 0.0)
    itself = 2 * sum(k(x, y) for x in real for y in real)
    diagonal = sum(k(x, x) for x in real)                             # pairs of a picture with itself count only across
    assert evaluate.kid(real, real)[0] == pytest.approx((itself - 2 * diagonal) / 72 - itself / 81)
    subsets, random = [], np.random.RandomState(3)
    for _ in range(20):
        i, j = random.permutation(9)[:5], random.permutation(9)[:5]
        subsets.append(evaluate.kid(real[i], fake[j])[0])
    assert evaluate.kid(real, fake, 20, 5, seed=3) == pytest.approx((np.mean(subsets), np.std(subsets)))
    same_law = [evaluate.kid(*np.random.RandomState(s).randn(2, 60, 4))[0] for s in range(40)]
    assert abs(np.mean(same_law)) < 3 * np.std(same_law) / 40**0.5 < 0.05 < evaluate.kid(real, fake + 1)[0]
    with pytest.raises(ValueError, match="at least two"):
        evaluate.kid(real[:1], fake)


def test_inception_score_against_a_loop():
    logits = np.random.RandomState(0).randn(23, 6) * 2
    parts = np.array_split(np.arange(23), [23 * k // 5 for k in range(1, 5)])
    scores = []
    for part in parts:
        p = np.exp(logits[part]) / np.exp(logits[part]).sum(1, keepdims=True)
        scores.append(np.exp(np.mean([sum(q * np.log(q / r) for q, r in zip(row, p.mean(0))) for row in p])))
    assert evaluate.inception_score(logits, 5, seed=None) == pytest.approx((np.mean(scores), np.std(scores)))
    shuffled = logits[np.random.RandomState(2020).permutation(23)]
    assert evaluate.inception_score(logits, 5) == evaluate.inception_score(shuffled, 5, seed=None)
    assert evaluate.inception_score(np.eye(8).repeat(5, 0) * 100, 1)[0] == pytest.approx(8)        # sure and varied
    assert evaluate.inception_score(np.ones((40, 8)), 2)[0] == pytest.approx(1)
    never = np.eye(8)[:4].repeat(5, 0) * 1000                         # no picture is of the other four classes
    assert evaluate.inception_score(never, 1)[0] == pytest.approx(4)


def test_precision_recall_density_coverage_against_loops():
    real, fake = np.random.RandomState(0).randn(30, 3), np.random.RandomState(1).randn(25, 3) * 0.7 + 0.5

    def radius(x, k):
        return [sorted(np.linalg.norm(p - q) for q in x)[k] for p in x]               # the first is p itself

    def within(points, centres, radii):
        return np.array([[np.linalg.norm(p - c) <= r for c, r in zip(centres, radii)] for p in points])

    precision = within(fake, real, radius(real, 3)).any(1).mean()
    recall = within(real, fake, radius(fake, 3)).any(1).mean()
    assert precision != recall and evaluate.precision_recall(real, fake, 3, block=7) == (precision, recall)
    inside = within(fake, real, radius(real, 5))
    density, coverage = inside.sum() / (5 * 25), inside.any(0).mean()
    assert evaluate.density_coverage(real, fake, 5, block=7) == pytest.approx((density, coverage))
    assert PRDC == pytest.approx([*evaluate.precision_recall(real, fake, 5), density, coverage])
    modes = np.array([[0, 0], [9, 0], [0, 9], [9, 9.0]]).repeat(50, 0) + np.random.RandomState(2).rand(200, 2)
    half = modes[:100] + 0.01                                         # two of the four modes: precise, little recall
    assert evaluate.precision_recall(modes, half) == (pytest.approx(1, abs=0.1), pytest.approx(0.5, abs=0.05))
    assert evaluate.precision_recall(half, modes) == (pytest.approx(0.5, abs=0.05), pytest.approx(1, abs=0.1))
    assert evaluate.density_coverage(modes, half)[1] == pytest.approx(0.5, abs=0.05)
    with pytest.raises(ValueError, match="more than 3"):
        evaluate.precision_recall(real[:3], fake)


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
    assert evaluate.ssim(a, b, 1.0).numpy() == pytest.approx(expected)
    assert evaluate.ssim(255 * a, 255 * b, 255).numpy() == pytest.approx(expected)    # the range is what counts
    assert evaluate.ssim(a, a, 1.0).numpy() == pytest.approx([1, 1])
    mse = [np.mean((x - y) ** 2) for x, y in zip(a, b)]
    assert evaluate.psnr(a * 2, b * 2, 2).numpy() == pytest.approx([-10 * math.log10(e) for e in mse])
    for make in (lambda: evaluate.ssim(a[..., :10], b[..., :10], 1), lambda: evaluate.ms_ssim(a, b, 1, 2)):
        with pytest.raises(ValueError, match="pictures are"):
            make()


def test_ms_ssim_over_two_scales_and_on_smoothed_pictures():
    a, b = np.random.RandomState(0).rand(2, 1, 1, 24, 26)
    b = 0.7 * a + 0.3 * b
    halved = [x.reshape(1, 1, 12, 2, 13, 2).mean((3, 5)) for x in (a, b)]
    structure = evaluate.similarity_maps(a, b, 1.0)[1].mean()
    total = 0.0448 + 0.2856
    expected = structure ** (0.0448 / total) * evaluate.ssim(*halved, 1.0) ** (0.2856 / total)
    assert evaluate.ms_ssim(a, b, 1.0, 2).item() == pytest.approx(expected.item())
    assert evaluate.ms_ssim(a, b, 1.0, 1).item() == pytest.approx(evaluate.ssim(a, b, 1.0).item())
    assert sum(evaluate.SCALES) == pytest.approx(1, abs=1e-3)


def test_tsne_keeps_clusters_apart_and_repeats():
    x = torch.cat([torch.randn(25, 30) + 8 * k for k in range(3)])
    p = evaluate.affinities(evaluate.distances(x.double(), x.double()).square(), 10.0)
    entropy = -(p * p.clamp(min=1e-300).log()).sum(1)
    assert torch.allclose(entropy.exp(), torch.full((75,), 10.0, dtype=torch.float64), rtol=1e-6)
    assert p.diagonal().abs().max() == 0 and torch.allclose(p.sum(1), torch.ones(75, dtype=torch.float64))
    y = evaluate.tsne(x, 10, steps=250)
    assert torch.equal(y, evaluate.tsne(x, 10, steps=250)) and not torch.equal(y, evaluate.tsne(x, 10, 250, seed=1))
    d = evaluate.distances(y, y)
    alike = torch.arange(75) // 25 == (torch.arange(75) // 25)[:, None]
    assert d[alike].max() < d[~alike].min()

    def cost(y):                                                      # KL(P || Q) by loops over nothing but pairs
        joint = (p + p.T) / 150
        w = (1 / (1 + evaluate.distances(y, y).square())).fill_diagonal_(0)
        return float((joint * ((joint + 1e-300) / (w / w.sum() + 1e-300)).log()).sum())

    assert cost(y) < cost(evaluate.tsne(x, 10, steps=100)) and all(
        cost(y) < cost(y + 0.05 * y.std() * torch.randn(75, 2)) for _ in range(5))     # a minimum
    assert evaluate.tsne(torch.eye(40), steps=8).isfinite().all()     # all equally far: no width has the perplexity


# ---------------------------------------------------------------------------------------------------------------------
# evaluate.py: copies
# ---------------------------------------------------------------------------------------------------------------------

def test_planted_copies_raise_the_alarm_and_honest_pictures_do_not():
    real = pictures_of(1400, 1, channels=1)
    train, held_out, honest = real[:700], real[700:1000], real[1000:]
    calm = evaluate.memorisation(train, held_out, honest)
    assert not calm["alarm"] and calm["share"] < 0.03 and calm["chance"] > 0.05
    assert abs(calm["authentic"] - calm["authentic_held_out"]) < 0.1 and calm["ratio"] == pytest.approx(1, abs=0.1)
    planted = honest.copy()
    copies = np.clip(train[40:60].astype(int) + np.random.RandomState(0).randint(-9, 10, (20, 1, 16, 16)), 0, 255)
    planted[100:120] = copies                                         # 5 %, with grain on them
    alarm = evaluate.memorisation(train, held_out, planted)
    assert alarm["alarm"] and alarm["share"] - calm["share"] == pytest.approx(0.05, abs=0.01)
    assert {(k, t) for k, t, *_ in alarm["pairs"]} <= {(100 + k, 40 + k) for k in range(20)}
    mirrored = honest.copy()
    mirrored[:20] = train[40:60, ..., ::-1]
    assert not evaluate.memorisation(train, held_out, mirrored)["alarm"]
    found = evaluate.memorisation(train, held_out, mirrored, mirror=True)
    assert found["alarm"] and all(turned and t == 40 + k for k, t, _, turned in found["pairs"])
    with pytest.raises(ValueError, match="needs 20 of them"):
        evaluate.memorisation(train, held_out[:19], honest)


def test_authpct_against_a_loop():
    train, held_out, fake = pictures_of(30, 1), pictures_of(25, 2), pictures_of(22, 3)
    a, h, f = (evaluate.fingerprints(x).double() for x in (train, held_out, fake))
    assert torch.allclose(f.norm(dim=1), torch.ones(22, dtype=torch.float64)) and f.mean(1).abs().max() < 1e-6

    def authentic(x):
        count = 0
        for row in x:
            d = [float((row - t).norm()) for t in a]
            r = int(np.argmin(d))
            count += min(float((a[r] - a[j]).norm()) for j in range(30) if j != r) < d[r]
        return count / len(x)

    found = evaluate.memorisation(train, held_out, fake)
    assert (found["authentic"], found["authentic_held_out"]) == pytest.approx((authentic(f), authentic(h)))


def test_interval_and_chance():
    assert evaluate.wilson(5, 50) == pytest.approx((0.0434, 0.2136), abs=1e-4)         # a textbook's
    assert evaluate.wilson(0, 20)[0] == 0
    random, n, r, h = np.random.RandomState(0), 30, 2, 25             # by drawing: ranks of one distribution
    counts = [(random.rand(n) < np.sort(random.rand(h))[r - 1]).sum() for _ in range(20000)]
    for c in (0, 1, 3, 6):
        assert evaluate.rank_chance(c, n, r, h) == pytest.approx(np.mean(np.array(counts) >= c), abs=0.012)
    assert evaluate.rank_chance(0, n, r, h) == pytest.approx(1)


# ---------------------------------------------------------------------------------------------------------------------
# evaluate.py: the script
# ---------------------------------------------------------------------------------------------------------------------

def test_batchnorm_is_in_eval_mode_while_sampling():
    G = gan.Generator(16, 1, 5, 4, 8).train()
    for norm in G.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.running_mean), nn.init.uniform_(norm.running_var, 0.5, 2)
    before, state = copy.deepcopy(G.state_dict()), torch.get_rng_state()
    images = evaluate.sample(G, 11, seed=4, batch=4)
    assert G.training and same(before, G.state_dict()) and torch.equal(state, torch.get_rng_state())
    stream = torch.Generator().manual_seed(4)
    z = torch.cat([torch.randn(k, 5, generator=stream) for k in (4, 4, 3)])
    expected = torch.cat([G.eval()(one[None]) for one in z])          # alone: no picture depends on its batch
    assert images.dtype == np.uint8 and np.abs(images - data.to_uint8(expected).numpy().astype(int)).max() <= 1


def test_real_and_fake_pass_one_code_path(tiny, capsys):
    """The same pictures as a folder, as arrays of both layouts and as statistics: FID 0 whichever is called fake."""
    images = pictures_of(40)
    images[20:] = images[0]                                           # half of them copies, and each of them counts
    Path("folder").mkdir()
    for k, x in enumerate(images):
        Image.fromarray(x.transpose(1, 2, 0)).save(f"folder/{k:03d}.png")
    np.save("first.npy", images)
    np.savez("last.npz", images.transpose(0, 2, 3, 1))
    evaluate.main(["--real", "folder", "--save-stats", "stats.npz", "--features", tiny])
    with np.load("stats.npz") as file:                                # as pytorch-fid computes and names them
        features = evaluate.load_features(tiny)(images).double().numpy()
        assert set(file) == {"mu", "sigma"} and np.allclose(file["mu"], features.mean(0))
        assert np.allclose(file["sigma"], np.cov(features, rowvar=False)) and file["sigma"].dtype == np.float64
    for real, fake in (("folder", "first.npy"), ("last.npz", "folder"), ("stats.npz", "folder"),
                       ("folder", "stats.npz")):
        evaluate.main(["--real", real, "--fake", fake, "--features", tiny, "--json", "found.json"])
        assert abs(json.loads(Path("found.json").read_text())["fid"]["value"]) < 1e-6
    out = capsys.readouterr().out
    assert "floor at N = 20" in out and "fewer than 2,048" in out and "KID: left out" in out and "tiny.pt" in out


def test_every_number_of_a_run(here, tiny, capsys):
    draw(here / "pictures", 150, (12, 16))
    train_wgan.main("--device cpu --data pictures --size 12x16 --features 4 --latent 5 --batch 5 --steps 2 "
                    "--n-critic 1 --holdout 0.3 --save-every 1 --out runs/one".split())
    capsys.readouterr()
    evaluate.main(["--fid", "--kid", "--pr", "--ssim", "--memorisation", "--ceiling", "--sweep", "--tsne", "t.png",
                   "--features", tiny, "--n", "60", "--perplexity", "5"])
    out = capsys.readouterr().out
    found = json.loads((here / "runs/one/metrics.json").read_text())
    assert set(found) == {"fid", "fid_half", "fid_floor", "kid", "kid_floor", "precision", "recall", "density",
                          "coverage", "ms_ssim_diversity", "fid_gaussian_noise", "fid_radial_noise", "memorisation",
                          "sweep"}
    for name, entry in found.items():
        assert f"`{name}`" in README and entry["step"] == 2 and "tiny.pt" in entry["features"]
        assert entry["seed"] == 0 and entry["resize"] == "pytorch-fid"
    for words in ("60 real v 60 fake", "floor at N = 30", "fewer than 2,048", "compare only with scores through it"):
        assert words in out
    run = evaluate.load_run("")
    real, fake = (evaluate.load_features(tiny)(x) for x in (
        run.real.images[np.random.RandomState(0).permutation(len(run.real.images))[:60]],
        evaluate.sample(run.G, 60)[np.random.RandomState(0).permutation(60)]))
    assert found["fid"]["value"] == pytest.approx(evaluate.fid(real, fake))
    assert found["fid_floor"]["value"] == pytest.approx(evaluate.fid(real[:30], real[30:]))
    assert found["fid_half"]["value"] == pytest.approx(evaluate.fid(real[:30], fake[:30]))
    assert found["kid"]["value"] == pytest.approx(evaluate.kid(real, fake)[0])
    assert found["fid_gaussian_noise"]["value"] > 0 and len(found["sweep"]["points"]) == 12
    for name in ("runs/one/sweep.png", "runs/one/memorisation.png", "t.png"):
        assert np.asarray(Image.open(name).convert("L")).std() > 5
    assert len(run.real.images) + len(run.held_out) == 150 and 20 < len(run.held_out) < 75
    evaluate.main(["runs/one/generators/step-0000001.pt", "--fid", "--features", tiny, "--n", "60"])
    again = json.loads((here / "runs/one/metrics.json").read_text())
    assert again["fid"]["step"] == 1 and again["kid"] == found["kid"]
    assert again["fid"]["value"] != pytest.approx(found["fid"]["value"])


def test_pairs_of_one_name(here, capsys):
    draw(here / "a", 4, (24, 24))
    shutil.copy(here / "a/000.png", here / "a/001.png")               # two that are equal, each with a partner
    (here / "b").mkdir()
    for path in (here / "a").iterdir():
        grey = 64 + 9 * int(path.stem)
        Image.open(path).point(lambda v, grey=grey: min(255, v // 2 + grey)).save(here / "b" / path.name)
    evaluate.main(["--real", "a", "--fake", "b", "--pairs", "--ssim", "--json", "found.json"])
    found = json.loads(Path("found.json").read_text())
    a, b = (np.stack([np.asarray(Image.open(path)).transpose(2, 0, 1) for path in sorted((here / name).iterdir())])
            for name in "ab")
    assert found["ssim"]["value"] == pytest.approx(evaluate.ssim(a, b, 255).mean().item())
    assert found["psnr"]["value"] == pytest.approx(evaluate.psnr(a, b, 255).mean().item())
    assert found["ms_ssim"]["scales"] == 2
    np.save("a.npy", a), np.save("b.npy", b), np.save("few.npy", b[:3])
    chosen = np.random.RandomState(7).permutation(4)[:3]              # arrays have no names: by number
    evaluate.main("--real a.npy --fake b.npy --pairs --ssim --n 3 --seed 7 --json found.json".split())
    found = json.loads(Path("found.json").read_text())
    assert found["psnr"]["value"] == pytest.approx(evaluate.psnr(a[chosen], b[chosen], 255).mean().item())
    assert found["psnr"]["real_is"] == "3 of 4 pictures of a.npy"
    assert "not of one number" in mistake(capsys, lambda: evaluate.main(
        "--real a.npy --fake few.npy --pairs --ssim".split()))
    (here / "b" / "000.png").unlink()
    assert "have no partner" in mistake(capsys, lambda: evaluate.main("--real a --fake b --pairs --ssim".split()))


def test_copies_are_looked_for_in_all_training_pictures_whatever_n_is(here):
    images = pictures_of(80)
    np.save("real.npy", images[:50]), np.save("held.npy", images[50:]), np.save("fake.npy", images[49:19:-1])
    evaluate.main("--real real.npy --fake fake.npy --held-out held.npy --memorisation --n 5 --json f.json".split())
    found = json.loads(Path("f.json").read_text())["memorisation"]
    assert (found["train"], found["fakes"], found["share"]) == (50, 5, 1)


def test_tsne_alone_takes_no_more_pictures_than_it_draws(here, tiny, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "DRAWN", 12)
    for name, seed in (("real.npy", 0), ("fake.npy", 1)):
        np.save(name, pictures_of(30, seed))
    command = ["--real", "real.npy", "--fake", "fake.npy", "--features", tiny, "--tsne", "t.png"]
    evaluate.main(command)
    said = capsys.readouterr().out
    assert "12 of 30 pictures of real.npy" in said and "28 points" in said            # two of each noise
    evaluate.main([*command, "--fid"])
    said = capsys.readouterr().out
    assert "real: 30 pictures" in said and "28 points" in said


def test_names_that_the_terminal_cannot_show(here, tiny, monkeypatch):
    draw(here / "zähne", 6, (16, 16))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    evaluate.main(["--real", "zähne", "--fake", "zähne", "--features", tiny])
    sys.stdout.seek(0)
    assert "real: 6 pictures of z\\xe4hne" in sys.stdout.read()


@pytest.mark.parametrize("flags, words", [
    ("--real nowhere --fake one", "--real nowhere: there is no such"), ("--real one --fake several", "as in --size 64"),
    ("", "there is no run of train_wgan.py or train_dcgan.py"), ("--real bad.npz --fake one", "holds neither"),
    ("--real broken.npy --fake one", "cannot be read"), ("runs/x --real one --fake one", "nothing to take from a run"),
    ("--pairs", "give --real and --fake"), ("--real one --save-stats here.txt", "ends in .npz"),
    ("--features nonsense --real one --fake one", "take inception, random"), ("--dims 5", "invalid choice"),
    ("--real one --fake one --features tiny.pt --is", "needs the classes"),
    ("--real one --fake stats.npz --features tiny.pt --kid", "statistics do for --fid alone"),
    ("--real one --fake one --memorisation", "with --held-out"),
    ("--real one --fake one --features tiny.pt --n 1", "too few to compare"),
    ("--real one --fake one --features tiny.pt --n 1 --sweep", "at least two pictures"),
    ("--real stats.npz --save-stats s.npz --features tiny.pt", "statistics already"),
    ("--real one --fake odd.npz --features tiny.pt --fid", "cannot be compared"), ("--fdi", "did you mean --fid?")])
def test_mistakes_with_evaluate_py(here, tiny, capsys, flags, words):
    draw(here / "one", 6, (16, 16))
    draw(here / "several", 2), draw(here / "several" / "deeper", 2, (30, 30))
    np.savez("bad.npz", np.zeros(5))
    np.savez("stats.npz", mu=np.zeros(48), sigma=np.eye(48))
    np.savez("odd.npz", mu=np.zeros(5), sigma=np.eye(5))
    Path("broken.npy").write_text("words")
    assert words in mistake(capsys, lambda: evaluate.main(shlex.split(flags)))


@pytest.mark.parametrize("script", SCRIPTS)
def test_evaluation_while_training_changes_nothing_and_keeps_the_best(here, tiny, script):
    draw(here / "pictures", 12)
    module, _ = SCRIPTS[script]
    judged = ["--evaluate-every", "3", "--evaluate-n", "10", "--evaluate-features", tiny]
    train("--steps", "12", "--out", "plain", script=script)
    train("--steps", "12", "--out", "a", *judged, script=script)
    train("--steps", "6", "--out", "b", *judged, script=script)
    module.main(["--resume", "b", "--steps", "12"])
    plain, a, b = checkpoint("plain"), checkpoint("a"), checkpoint("b")
    assert same(plain["state"], a["state"]) and same(plain["random"], a["random"])
    assert same(a["state"], b["state"]) and same(a["random"], b["random"])
    rows = [json.loads(line) for line in Path("a/log.jsonl").read_text().splitlines()]
    scores = [(row["fid"], row["kid"]) for row in rows if "kid" in row]
    assert len(scores) == 4 and "`fid`" in README and "`kid`" in README
    best = torch.load("a/generators/best.pt", weights_only=True)
    assert best["kid"] == pytest.approx(min(k for _, k in scores), rel=1e-5, abs=1e-5)
    assert same(best, torch.load("b/generators/best.pt", weights_only=True))
    made = evaluate.sample(gan.load_generator("a/generators/best.pt"), 10, 3, 5)
    pictures = data.load("pictures", (9, 12))
    real = pictures.images[np.sort(np.random.RandomState(3).permutation(12)[:10])]
    extract = evaluate.load_features(tiny)
    assert best["fid"] == pytest.approx(evaluate.fid(extract(real), extract(made)))
    train("--steps", "2", "--out", "c", "--evaluate-every", "1", "--evaluate-features", tiny, script=script)
    first = torch.load("c/generators/best.pt", weights_only=True)     # more pictures asked for than there are
    assert "12 real pictures v 1,000 drawn" in first["how"]
    module.main(["--resume", "c", "--steps", "3", "--evaluate-n", "8", "--evaluate-every", "3"])
    assert torch.load("c/generators/best.pt", weights_only=True)["step"] == 3         # another measure starts anew


def test_commands_and_flags_of_evaluate_in_the_readme(here):
    text = README + evaluate.__doc__
    commands = re.findall(r"python evaluate\.py((?: [^\s`#|]+)*)", text)
    assert len(commands) >= 8
    for flags in commands:
        evaluate.parse_arguments(shlex.split(flags))
    rows = README.split("`evaluate.py`; ", 1)[1].split("\n\n")[1]
    table = dict(re.findall(r"^\| `--([\w-]+)` \|([^|]*)\|", rows, re.M))
    defaults = {name: value for name, value in vars(evaluate.parse_arguments(["--is"])).items() if name != "run"}
    assert {name.replace("-", "_") for name in table} == set(defaults)
    for name, cell in table.items():
        value = defaults[name.replace("-", "_")]
        assert cell.strip() == ("" if value is None or isinstance(value, bool) else f"{value:g}" if isinstance(
            value, float) else str(value)), name


# ---------------------------------------------------------------------------------------------------------------------
# Speed
# ---------------------------------------------------------------------------------------------------------------------

def test_bench_counts_operations():
    x, layer = torch.randn(3, 2, 9, 9, requires_grad=True), nn.Conv2d(2, 5, 4, 2, 1)
    product = 2 * 3 * 5 * 4 * 4 * 2 * 4 * 4                           # multiply and add, for each output and weight
    with bench.Operations() as forward:
        y = layer(x).sum()
    with bench.Operations() as backward:
        y.backward()
    assert forward.total == product and backward.total == 2 * product          # by x, and by the weights
    with bench.Operations() as matrix:
        torch.randn(3, 4) @ torch.randn(4, 5)
    assert matrix.total == 2 * 3 * 4 * 5
    count = {(method, batch): bench.step_operations(method, argparse.Namespace(features=4, batch=batch), 16)
             for method in ("dcgan", "wgan") for batch in (8, 16)}
    assert count["wgan", 16] == 2 * count["wgan", 8] and count["dcgan", 16] == 2 * count["dcgan", 8]
    D_with_penalty, D_without, G = 12, 7, 5                           # forward passes' worth, G and D much of a size
    assert count["wgan", 8] / count["dcgan", 8] == pytest.approx((5 * D_with_penalty + G) / (D_without + G), rel=0.05)


@pytest.mark.parametrize("one", ["dcgan:copied", "dcgan:default", "wgan:copied", "wgan:default", "wgan:instance"])
def test_bench_measures_one_loop(here, capsys, one, monkeypatch):
    draw(here / "pictures", 9, (16, 16))
    monkeypatch.setattr(torch.utils.data, "DataLoader",               # no processes for so little
                        lambda *args, num_workers, **more: LOADER(*args, **more))
    seen, forward = [], gan.Discriminator.forward
    monkeypatch.setattr(gan.Discriminator, "forward", lambda D, x: seen.append(len(x)) or forward(D, x))
    bench.main(f"--one {one} --size 16 --features 4 --batch 4 --data pictures --device cpu --warm 1 --timed 2".split())
    figure = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 < figure["ms"] < 1e5 and 0.01 < figure["gb"] < 100
    per_step = {"dcgan:copied": 3, "dcgan:default": 3, "wgan:copied": 16, "wgan:default": 11, "wgan:instance": 11}
    assert len(seen) == 3 * per_step[one]                             # D is called so often in a step, in three steps


def test_bench_table(here, capsys, monkeypatch):
    draw(here / "pictures", 9, (16, 16))
    took = {"copied": 300.0, "default": 100.0, "instance": 150.0}
    monkeypatch.setattr(bench, "child", lambda args, one, size, **_: dict(ms=took[one.split(":")[1]], gb=1.5))
    bench.main("--parts wgan reading --sizes 16 --features 4 --batch 4 --repeats 2 --data pictures --device cpu "
               "--json bench.json".split())
    rows = {row.get("loop"): row for row in json.loads(Path("bench.json").read_text())["results"]}
    assert rows["default"]["ratio"] == [3.0, 3.0] and rows["instance"]["ratio"] == [2.0, 2.0]
    assert rows["copied"]["pictures_per_second"] == pytest.approx(20 / 0.3)
    shown = capsys.readouterr().out
    assert "ours, default" in shown and "3 (3 .. 3)" in shown and "DataLoader" in shown
    monkeypatch.setattr(bench, "child", lambda args, one, size, **_: None)
    bench.main("--parts wgan --sizes 16 --features 4 --batch 4 --repeats 1 --data pictures --device cpu".split())
    assert "out of memory" in capsys.readouterr().out
    assert "invalid choice: 'all'" in mistake(capsys, lambda: bench.main(["--parts", "all"]))
    assert "no such folder" in mistake(capsys, lambda: bench.main(["--data", "nowhere"]))
    assert "smaller --batch" in mistake(capsys, lambda: bench.main(["--data", "pictures", "--batch", "10"]))
    assert "--timed" in mistake(capsys, lambda: bench.main(["--timed", "0"]))
    assert "nearest size that works is 8x8" in mistake(capsys, lambda: bench.main(["--sizes", "64", "4"]))
    assert "no such folder" in mistake(capsys, lambda: bench.main(["--json", "nowhere/bench.json"]))
    args = bench.parse_arguments(["--repeats", "2"])
    bench.scaling(args, [])
    assert capsys.readouterr().out.count("out of memory") == 6


def test_bench_runs_children_on_a_folder_named_from_here(here, monkeypatch):
    draw(here / "my pictures", 9, (16, 16))
    (here / "my pictures" / "notes.txt").write_text("no picture")
    assert len(bench.PictureFolder("my pictures", 16)) == 9
    asked, scratch = [], []

    def run(command, cwd, **_):
        asked.append(bench.parse_arguments(command[2:]))
        scratch.append(Path(cwd).is_dir() and Path(cwd))              # where the cache goes, and is gone with it
        return argparse.Namespace(returncode=0, stdout='{"ms": 5.0, "gb": 1.0}')

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(bench, "matrix_rate", lambda *_: 1e12)
    bench.main(["--data", "my pictures", "--json", "bench.json",
                *"--parts dcgan start --sizes 16 --features 4 --batch 4 --repeats 1 --device cpu".split()])
    rows = json.loads(Path("bench.json").read_text())["results"]
    assert [row.get("loop") for row in rows] == [None, "copied", "default", None] and 0 < rows[-1]["seconds"][0] < 600
    assert [args.one for args in asked] == ["dcgan:copied", "dcgan:default"]
    assert all(args.data == str(here / "my pictures") for args in asked)
    assert all(scratch) and not any(folder.exists() for folder in scratch)
    assert sorted(os.listdir(here)) == ["bench.json", "my pictures"]


# ---------------------------------------------------------------------------------------------------------------------
# From a trained generator to pictures
# ---------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with two tiny runs, runs/a (colour, wgan) and runs/b (dcgan), and their pictures."""
    folder = tmp_path_factory.mktemp("trained")
    draw(folder / "pictures", 12)
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


def pixels_of(path, mode=None):
    with Image.open(path) as im:
        return np.asarray(im if mode is None else im.convert(mode))


def lively(G):
    """G with weights and BatchNorm statistics that show: pictures of contrast, means far from 0, gains far from 1."""
    for module in G.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.05, 0.4)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
        elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.normal_(module.weight, 0, 0.2)
    return G.eval().requires_grad_(False)


def test_slerp_goes_round_at_constant_speed():
    a, b = torch.randn(2, 7, dtype=torch.float64)
    u = a / a.norm()
    w = b - (b @ u) * u                                               # Gram-Schmidt: the plane of a and b
    w, angle = w / w.norm(), math.acos(float(a @ b / a.norm() / b.norm()))
    for t in (0.0, 0.2, 0.5, 0.9, 1.0):
        length = (1 - t) * a.norm() + t * b.norm()
        expected = length * (math.cos(t * angle) * u + math.sin(t * angle) * w)
        assert torch.allclose(gan.slerp(a, b, t), expected, atol=1e-12)
    assert torch.allclose(gan.slerp(a, a, 0.3), a, atol=1e-14)
    assert torch.isfinite(gan.slerp(torch.stack([0 * a, 0 * a]), torch.stack([b, 0 * b]), 0.3)).all()     # psi = 0
    near = a + 1e-9 * b
    assert torch.allclose(gan.slerp(a, near, 0.5), (a + near) / 2, atol=1e-14)
    near, half = (a.norm() * (math.cos(angle) * u + math.sin(angle) * w) for angle in (5e-3, 2.5e-3))
    assert torch.allclose(gan.slerp(a, near, 0.5), half, atol=1e-12)
    rows = gan.slerp(torch.stack([a, b]).float(), torch.stack([b, a]).float(), torch.tensor([[0.25], [0.75]]))
    assert rows.dtype == torch.float32 and torch.allclose(rows[0], rows[1], atol=1e-6)     # from the other end


def test_principal_directions_are_those_of_the_first_layer():
    G = lively(gan.Generator((9, 12), 1, latent=6, features=4))
    V, shares = gan.principal_directions(G)

    def first_layer(z):
        h, w = G.grids[0]
        return G.norm(G.project(z[None]).view(1, h, w, -1).permute(0, 3, 1, 2)).flatten()

    A = torch.autograd.functional.jacobian(first_layer, torch.randn(6)).double()           # the layer is affine
    _, S, Vh = torch.linalg.svd(A, full_matrices=False)
    assert torch.allclose((V.double() @ Vh.T).abs(), torch.eye(6, dtype=torch.float64), atol=1e-4)
    assert torch.allclose(shares.double(), S**2 / (S**2).sum(), atol=1e-5)
    raw = torch.linalg.svd(G.project.weight.double(), full_matrices=False)[2]
    assert not torch.allclose((V.double() @ raw.T).abs(), torch.eye(6, dtype=torch.float64), atol=0.05)    # gains count
    assert (V.gather(1, V.abs().argmax(1, keepdim=True)) > 0).all()
    lengths = (A @ V.T.double()).norm(dim=0)
    assert (lengths[:-1] >= lengths[1:]).all()


def test_a_latent_is_a_function_of_seed_and_number():
    z = generate.latents(3, range(40), 16)
    assert torch.equal(generate.latents(3, [7, 39, 7], 16), z[[7, 39, 7]])
    assert torch.equal(generate.latents(3, [5], 16, 0.5)[0], 0.5 * z[5])
    expected = np.random.RandomState([3, 5]).standard_normal(16).astype(np.float32)        # a promise: never change it
    assert torch.equal(z[5], torch.from_numpy(expected)) and float(z[5, 0]) == pytest.approx(0.0528213, abs=1e-6)
    pairs = [(s, k) for s in (0, 1, 2, 2**31, 2**32 - 1) for k in (0, 1, 2, 999, 10**6)]
    drawn = torch.stack([generate.latents(s, [k], 16)[0] for s, k in pairs])
    assert torch.pdist(drawn).min() > 1                               # (1, 2) is not (2, 1), nor anything else's twin
    many = generate.latents(0, range(2000), 16)
    assert abs(float(many.mean())) < 0.02 and float(many.std()) == pytest.approx(1, abs=0.02)
    corr = torch.corrcoef(many.T) - torch.eye(16)
    assert corr.abs().max() < 0.1 and abs(float((many[1:] * many[:-1]).mean())) < 0.02


@pytest.mark.parametrize("upsample", ["transposed", "nearest"])
@pytest.mark.parametrize("size", [(8, 8), (32, 32), (40, 21)])
def test_folding_changes_nothing(upsample, size):
    G = lively(gan.Generator(size, 3, 5, 4, upsample=upsample))
    folded, z = generate.folded(G), torch.randn(4, 5)
    assert torch.allclose(folded(z), G(z), atol=2e-5) and not any(
        isinstance(module, nn.BatchNorm2d) for level in folded.levels for module in level.modules())
    assert all(isinstance(level[1], nn.BatchNorm2d) for level in G.levels) and float(G(z).std()) > 0.05


def test_a_sample_does_not_depend_on_what_is_made_beside_it():
    G, sizes = lively(gan.Generator(64, 3, 8, features=8)), []
    G.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    expected = generate.sample(G, 5, range(70))
    assert len({x.numpy().tobytes() for x in expected}) == 70 and expected.dtype == torch.uint8
    for batch in (1, 16, 33, 1000):
        assert torch.equal(generate.sample(G, 5, range(70), batch=batch), expected)
    for numbers in ([69, 3, 3], [17], list(range(50, 60))):
        assert torch.equal(generate.sample(G, 5, numbers), expected[numbers])
    assert set(sizes) == {generate.BLOCK}                             # the same kernels always, whatever was asked for
    assert not torch.equal(generate.sample(G, 6, [3]), expected[[3]])
    assert not torch.equal(generate.sample(G, 5, [3], 0.5), expected[[3]])
    z = generate.latents(5, range(70), 8)
    assert (expected.int() - data.to_uint8(G(z)).int()).abs().max() <= 1
    got = [(ks, len(x)) for ks, x in generate.samples(G, 5, [40, 2, 2, 18], batch=32)]
    assert got == [([2, 18], 2), ([40], 1)]


@pytest.mark.parametrize("channels", [1, 3])
def test_single_files_are_what_the_sheet_shows(here, capsys, channels):
    torch.save(gan.saved_generator(lively(gan.Generator((9, 12), channels, 5, 4))), "g.pt")
    make("g.pt", "--n", "20", "--seed", "4", "--sheet", "sheet.png")
    make("g.pt", "--n", "7", "--seed", "4", "--out", "files", "--batch", "5")
    assert "7 pictures" in capsys.readouterr().out
    stamp = (here / "files/seed4-000003.png").stat().st_mtime_ns
    (here / "files/seed4-000002.png").unlink()
    (here / "files/seed4-000002.png.part").write_bytes(b"half")
    make("g.pt", "--n", "20", "--seed", "4", "--out", "files")        # goes on: what is there stays
    assert "14 pictures" in capsys.readouterr().out
    assert (here / "files/seed4-000003.png").stat().st_mtime_ns == stamp
    names = sorted(path.name for path in (here / "files").glob("*.png"))
    assert names == [f"seed4-{k:06d}.png" for k in range(20)]
    sheet = pixels_of("sheet.png")
    k = sheet.shape[1] // (8 * 14 + 2)                                # enlarged so many times
    for j, name in enumerate(names):
        tile = sheet[::k, ::k][2 + j // 8 * 11:][:9, 2 + j % 8 * 14:][:, :12]
        assert np.array_equal(tile, pixels_of(f"files/{name}")) and tile.std() > 1
        with Image.open(f"files/{name}") as im:
            assert im.mode == ("L" if channels == 1 else "RGB") and im.size == (12, 9)
    make("g.pt", "--seed", "9", "--pick", "3,1", "--out", "files")    # another seed may lie beside it
    assert len(list((here / "files").glob("seed9-*.png"))) == 2
    assert len(data.find_items("files")) == 22 and not list((here / "files").glob("*.part"))
    make("g.pt", "--n", "20", "--seed", "4", "--out", "files")        # nothing is left to do
    assert "0 pictures" in capsys.readouterr().out
    assert "another generator" in mistake(capsys, lambda: make("g.pt", "--out", "files", "--truncation", 0.5))
    torch.save(gan.saved_generator(lively(gan.Generator((9, 12), channels, 5, 4))), "h.pt")
    assert "another generator" in mistake(capsys, lambda: make("h.pt", "--out", "files"))
    assert "not ours" in mistake(capsys, lambda: make("h.pt", "--out", "."))


def test_the_newest_run_is_taken_and_its_sheet_is_deterministic(at_runs, capsys, tmp_path):
    os.utime("runs/b/checkpoint.pt", (1, 1))
    for k in range(2):
        make("--n", "9", "--sheet", tmp_path / f"{k}.png", "--batch", 1 + 60 * k)
    assert "9 samples of runs/a, step 8, seed 0" in capsys.readouterr().out.replace("\\", "/")
    assert (tmp_path / "0.png").read_bytes() == (tmp_path / "1.png").read_bytes()
    make("runs/a/generators/step-0000004.pt", "--sheet", tmp_path / "2.png")
    assert "step 4" in capsys.readouterr().out
    assert generate.open_source("runs/a/generators/step-0000004.pt", "cpu").folder == Path("runs/a")


def test_great_circles_are_walked_in_equal_angles():
    points = torch.randn(4, 6) * torch.tensor([[1.0], [2.0], [0.5], [1.0]])
    z = generate.great_circles(points, 200).double()
    u = z / z.norm(dim=1, keepdim=True)
    steps = torch.arccos((u * u.roll(-1, 0)).sum(1).clamp(-1, 1))
    corners = torch.nn.functional.normalize(points.double(), dim=1)
    whole = sum(math.acos(float(corners[k] @ corners[(k + 1) % 4])) for k in range(4))
    even = (steps - whole / 200).abs() < 1e-5
    assert int(even.sum()) >= 200 - 4 and (steps < whole / 200 + 1e-5).all()      # a corner is cut by one step at most
    assert torch.allclose(z[0], points[0].double(), atol=1e-6)
    for corner in corners:                                            # it passes through every point
        assert torch.arccos((u @ corner).clamp(-1, 1)).min() <= whole / 400 + 1e-5
    lengths, ends = z.norm(dim=1), points.norm(dim=1)
    assert lengths.min() >= ends.min() - 1e-6 and lengths.max() <= ends.max() + 1e-6
    assert torch.isfinite(generate.great_circles(points[[0, 0, 1]], 30)).all()    # a point named twice


def test_walks(at_runs, tmp_path, capsys):
    make("runs/a", "--walk", tmp_path / "w.gif", "--pick", "3,1,4", "--frames", "5")
    make("runs/a", "--walk", tmp_path / "w.webp", "--pick", "3,1,4", "--frames", "5")
    first = generate.sample(generate.folded(gan.load_generator("runs/a")), 0, [3])[0]
    large = generate.picture(first, 256 // 12)
    for name in ("w.gif", "w.webp"):
        with Image.open(tmp_path / name) as im:
            assert im.n_frames == 15 and im.info.get("loop") == 0 and im.size == large.size
            shown = np.asarray(im.convert("RGB")).astype(int)
        assert np.abs(shown - np.asarray(large)).mean() < (3 if name.endswith("gif") else 1e-9)
    make("runs/a", "--morph", "3,1", "--sheet", tmp_path / "m.png", "--n", "5")
    strip = pixels_of(tmp_path / "m.png")
    ends = generate.sample(generate.folded(gan.load_generator("runs/a")), 0, [3, 1])
    k = 128 // 12
    for x, left in ((ends[0], 8), (ends[1], 8 + 4 * (12 * k + 8))):
        tile = strip[8:8 + 9 * k:k, left:left + 12 * k:k].astype(int)
        assert np.abs(tile - x.permute(1, 2, 0).numpy()).max() <= 1
    assert strip.shape[1] == 8 + 5 * (12 * k + 8)


def test_latent_arithmetic(at_runs, tmp_path):
    z = torch.randn(3, 5)
    total = generate.latent_sum(z, [1.0, 1.0, -1.0])
    plain = z[0] + z[1] - z[2]
    assert torch.allclose(total / total.norm(), plain / plain.norm(), atol=1e-6)
    assert float(total.norm()) == pytest.approx(float(z.norm(dim=1).mean()), rel=1e-5)
    make("runs/a", "--arithmetic", "12+40-7", "--sheet", tmp_path / "x.png")
    G = generate.folded(gan.load_generator("runs/a"))
    z = generate.latents(0, [12, 40, 7], 5)
    expected = generate.draw(G, torch.cat([z, generate.latent_sum(z, [1, 1, -1])[None]]))
    shown, k = pixels_of(tmp_path / "x.png"), 128 // 12
    for j in range(4):
        left = 8 + j * (12 * k + 8)
        assert np.array_equal(shown[8:8 + 9 * k:k, left:left + 12 * k:k], expected[j].permute(1, 2, 0).numpy())


def test_nearest_against_loops(at_runs, tmp_path, capsys):
    random = np.random.RandomState(0)
    images, x = (random.randint(0, 256, (n, 3, 5, 6)).astype(np.uint8) for n in (40, 7))
    x[2] = images[11][:, :, ::-1]                                     # a mirrored copy
    x[3] = images[39]
    for mirrored in (False, True):
        rows, turned, rms = generate.nearest(images, torch.from_numpy(x), mirrored, block=16)
        for k in range(7):
            found = [(math.sqrt(((y[:, :, ::step].astype(float) - x[k]) ** 2).mean()), j, step < 0)
                     for step in ((1, -1) if mirrored else (1,)) for j, y in enumerate(images)]
            best = min(found)
            assert (int(rows[k]), bool(turned[k])) == best[1:] and float(rms[k]) == pytest.approx(best[0], abs=0.02)
    assert bool(turned[2]) and float(rms[2]) == 0 and not bool(turned[3])
    make("runs/a", "--nearest", "--n", "4", "--sheet", tmp_path / "n.png")
    text = capsys.readouterr().out
    assert "4 pairs" in text and "of 12 training pictures" in text
    told = re.findall(r"sample (\d): (\S+?\.png)(, mirrored)?, ([\d.]+) of 255", text)
    assert len(told) == 4 and any(mirrored for _, _, mirrored, _ in told)
    sheet = pixels_of(tmp_path / "n.png")
    scale = sheet.shape[1] // (8 * 14 + 2)
    tiles = [sheet[::scale, ::scale][2:11, 2 + 14 * j:14 + 14 * j].astype(float) for j in range(8)]
    for k, name, mirrored, rms in told:
        a, b = tiles[2 * int(k)], tiles[2 * int(k) + 1]
        assert math.sqrt(((a - b) ** 2).mean()) == pytest.approx(float(rms), abs=0.06)
        pictures = data.load_flags(generate.argparse.Namespace(**checkpoint("runs/a")["flags"]), "train")
        real = pictures.images[pictures.names.index(name)].transpose(1, 2, 0)
        assert np.array_equal(b, real[:, ::-1] if mirrored else real)
    moved = at_runs / "elsewhere"
    (at_runs / "pictures").rename(moved)
    try:
        assert "no such folder" in mistake(capsys, lambda: make("runs/a", "--nearest"))
        make("runs/a", "--nearest", "--n", "4", "--data", "elsewhere", "--sheet", tmp_path / "n2.png")
    finally:
        moved.rename(at_runs / "pictures")
    assert (tmp_path / "n.png").read_bytes() == (tmp_path / "n2.png").read_bytes()


def test_projection_is_ridge_regression_when_the_network_is_linear():
    class Linear(nn.Module):
        config = {"latent": 4}

        def __init__(self):
            super().__init__()
            self.A = torch.randn(30, 4)

        def forward(self, z):
            return (z @ self.A.T).view(-1, 3, 2, 5)

    G, x, lam = Linear(), torch.randn(3, 2, 5), 2.0
    z, squares = generate.project(G, x, restarts=18, iterations=600, lam=lam)
    best = torch.linalg.solve(G.A.T @ G.A + lam * torch.eye(4), G.A.T @ x.flatten())
    assert z.shape == (18, 4) and torch.allclose(z, best.expand(18, 4), atol=1e-3)
    assert float(squares[0]) == pytest.approx(float((G.A @ best - x.flatten()).square().mean()), rel=1e-3)
    assert (best - torch.linalg.lstsq(G.A, x.flatten()[:, None]).solution[:, 0]).norm() > 0.005     # lam matters
    z, squares = generate.project(G, x, restarts=5, iterations=3)
    assert (squares[:-1] <= squares[1:]).all()
    assert torch.allclose(squares, (G(z) - x).square().mean((1, 2, 3)))


def test_projection_finds_a_picture_that_the_network_made(here, capsys):
    torch.save(gan.saved_generator(lively(gan.Generator((9, 12), 3, 5, 4))), "g.pt")
    make("g.pt", "--pick", "21", "--out", "one")
    psnr = []
    for iterations in (150, 20):
        make("g.pt", "--project", "one/seed0-000021.png", "--restarts", "6", "--iterations", iterations)
        psnr.append(float(re.search(r"PSNR ([\d.]+) dB", capsys.readouterr().out)[1]))
    pair, k = pixels_of("project.png")[8:8 + 9 * 21].astype(float), 21
    assert pair.shape[1] == 2 * 12 * k + 24
    given, found = (pair[::k, left:left + 12 * k:k] for left in (8, 16 + 12 * k))
    assert np.array_equal(given, pixels_of("one/seed0-000021.png")) and psnr[0] > 40 > psnr[1]
    assert psnr[1] == pytest.approx(10 * math.log10(255**2 / ((given - found) ** 2).mean()), abs=0.3)
    Path("bad.png").write_bytes(b"no picture")
    for name in ("bad.png", "absent.png"):
        assert f"--project {name}: " in mistake(capsys, lambda name=name: make("g.pt", "--project", name))
    Image.fromarray(np.zeros((40, 30), np.uint8)).save("grey.png")    # other mode and size: brought to the network's
    make("g.pt", "--project", "grey.png", "--restarts", "1", "--iterations", "2")


def test_projection_crops_as_the_run_did(trained, monkeypatch):
    """--crop auto rests on the pictures that the run took, not on all that lie there."""
    monkeypatch.chdir(trained)
    for k in range(2):
        draw(Path("sorted", str(k)), 6)
    source, seen = generate.open_source("runs/a", "cpu"), []
    flags = argparse.Namespace(**{**vars(source.flags), "crop": "auto", "classes": "1", "limit": 4, "data": "sorted"})
    monkeypatch.setattr(data, "settled", lambda recipe, items: (seen.append([item.name for item in items]),
                                                                (recipe._replace(crop="0,0,1,1"), []))[1])
    data.load_flags(flags, "train")
    x = generate.given_picture(argparse.Namespace(project="pictures/000.png", data=""), source._replace(flags=flags))
    assert seen[0] == seen[1] == [f"1/{k:03d}.png" for k in range(4)] and x.shape == (3, 9, 12)


def test_progress_and_comparison(at_runs, tmp_path, capsys):
    make("runs/a", "--progress", tmp_path / "p.gif")
    with Image.open(tmp_path / "p.gif") as im:
        assert im.n_frames == len(list(Path("runs/a/samples").glob("*.png"))) > 1
    make("runs/a", "runs/b", "runs/a/generators/step-0000004.pt", "--compare", tmp_path / "c.png", "--n", "3")
    sheet, k = pixels_of(tmp_path / "c.png"), 128 // 12
    for row, run in enumerate(("runs/a", "runs/b", "runs/a/generators/step-0000004.pt")):
        x = generate.sample(generate.folded(gan.load_generator(run)), 0, range(3))
        top = 28 + row * (28 + 9 * k)
        for j in range(3):
            left = 8 + j * (12 * k + 8)
            assert np.array_equal(sheet[top:top + 9 * k:k, left:left + 12 * k:k], x[j].permute(1, 2, 0).numpy())
    make("runs/a", "runs/a/generators/step-0000004.pt", "--compare", tmp_path / "narrow.png", "--n", "1")
    heading = data.font(13).getlength("runs/a/generators/step-0000004.pt, step 4")
    assert pixels_of(tmp_path / "narrow.png").shape[1] >= heading + 2 * 8      # a heading is not cut off


def test_networks_that_take_pictures_are_refused(at_runs, tmp_path, capsys, monkeypatch):
    saved = checkpoint("runs/a")
    (tmp_path / "pix").mkdir()
    torch.save({**saved, "script": "train_pix2pix.py"}, tmp_path / "pix/checkpoint.pt")
    for flags in ([], ["--progress", "p.gif"], ["--serve", "0"]):
        assert "python complete.py" in mistake(capsys, lambda flags=flags: make(tmp_path / "pix", *flags))
    monkeypatch.setattr(gan, "load_generator", lambda path, device: nn.Conv2d(1, 1, 1))    # a file of one, elsewhere
    (tmp_path / "g.pt").write_bytes(b"")
    assert "python complete.py" in mistake(capsys, lambda: make(tmp_path / "g.pt"))


@pytest.mark.parametrize("flags, answer", [
    (["nowhere"], "does not exist"),
    (["pictures"], "there is no checkpoint.pt"),
    (["pictures/000.png"], "no file that a training script wrote"),
    (["runs/a", "runs/b"], "only --compare FILE takes more than one"),
    (["runs/a", "--compare", "c.png"], "name two or more"),
    (["runs/a", "--walk", "w.gif", "--sheet", "s.png"], "--walk makes none"),
    (["runs/a", "--serve", "0", "--sheet", "s.png"], "--serve makes none"),
    (["runs/a", "--morph", "1,2", "--pick", "3"], "--pick and --morph both say"),
    (["runs/a", "--n", "0"], "whole number from 1"),
    (["runs/a", "--n", "2", "--pick", "1"], "give one of them"),
    (["runs/a", "--pick", "1,b"], "write sample numbers with commas"),
    (["runs/a", "--n", "2000"], "could not be looked at"),
    (["runs/a", "--n", "1000000", "--nearest"], "a sheet of 1000000 samples could not be looked at: up to 1024"),
    (["runs/a", "--n", "1000000", "--walk", "w.gif"], "a walk of 24000000 frames could not be looked at: up to 4800"),
    (["runs/a", "--frames", "2401", "--walk", "w.gif", "--pick", "1,2"], "a walk of 4802 frames"),
    (["runs/a", "--n", "1000000", "--morph", "1,2"], "a strip of 1000000 pictures could not be looked at"),
    (["runs/a", "runs/b", "--n", "1000000", "--compare", "c.png"], "a row of 1000000 samples could not be looked at"),
    (["runs/a", "--n", "99999999999999", "--out", "files"], "--n"),
    (["runs/a", "--truncation", "nan"], "--truncation"),
    (["runs/a", "--seed", "-1"], "--seed"),
    (["runs/a", "--walk", "w.mp4"], "ends in .gif or .webp"),
    (["runs/a", "--walk", "w.gif", "--n", "1"], "at least two"),
    (["runs/a", "--walk", "w.gif", "--pick", "4,4"], "at least two"),
    (["runs/a", "--progress", "w.png"], "ends in .gif"),
    (["runs/a", "--sheet", "x.xyz"], "ends in .png"),
    (["runs/a", "--sheet", "x"], "ends in .png"),
    (["runs/a", "--sheet", "x.psd"], "ends in .png"),                 # Pillow reads it and does not write it
    (["runs/a", "--morph", "1"], "two sample numbers"),
    (["runs/a", "--arithmetic", "1*2"], "with + and - between"),
    (["runs/a", "--arithmetic", "3-3"], "cancel one another"),
    (["runs/a", "--morph", "1,2", "--walk", "w.gif"], "not allowed with"),
    (["runs/a", "--host", "0.0.0.0"], "give --serve as well"),
    (["runs/a", "--serve", "99999"], "--serve"),
    (["runs/a", "--serve", "0", "--host", "no.such.host.invalid"], "cannot listen"),
    (["runs/a", "--device", "tpu"], "--device tpu"),
    (["runs/a", "--sheet", "pictures/000.png/x.png"], "pictures"),
    (["runs/a", "--nearest", "--data", "nowhere"], "no such folder"),
    (["runs/a", "--resolution", "3"], "unrecognized"),
])
def test_wrong_words_for_generate(at_runs, capsys, flags, answer):
    before = sorted(at_runs.rglob("*"))
    assert answer in mistake(capsys, lambda: make(*flags))
    assert sorted(path for path in at_runs.rglob("*") if ".cache" not in str(path)) == [
        path for path in before if ".cache" not in str(path)]


def test_generate_without_any_run(here, capsys):
    assert "there is no run" in mistake(capsys, make)
    assert generate.parse_arguments(["--serve", "runs/x"]).runs == ["runs/x"]
    assert generate.parse_arguments(["runs/x", "--serve"]).serve == 8000
    assert generate.parse_arguments(["--serve", "0", "runs/x"]).serve == 0
    torch.save(gan.saved_generator(gan.Generator(8, 1, 4, 2)), "g.pt")
    for flag in ("--nearest", "--progress=p.gif"):
        assert "run folder" in mistake(capsys, lambda flag=flag: make("g.pt", flag))


# ---------------------------------------------------------------------------------------------------------------------
# The web page
# ---------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def server(trained):
    log = trained / "runs/a/log.jsonl"
    log.write_text(log.read_text() + '{"step": 9, "loss_D": NaN, "loss_G": 1.5, "note": "x"}\n{"step": 10, "lo')
    (trained / "runs/a/samples/step-secret.png").write_text("not of the run")
    server = generate.Server(generate.open_source(trained / "runs/a", "cpu"))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def ask(server, path, method="GET", headers=None, body=None):
    """(status, headers, content) of one request over a connection of its own."""
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=30)
    try:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


def ask_json(server, path):
    status, headers, content = ask(server, path)
    assert status == 200 and headers["Content-Type"] == "application/json"
    return json.loads(content, parse_constant=pytest.fail)            # NaN is no JSON


def shown(server, path):
    """The pixels that a PNG from the server holds, (H, W, C)."""
    status, headers, content = ask(server, path)
    assert status == 200 and headers["Content-Type"] == "image/png", content
    return np.asarray(Image.open(io.BytesIO(content)))


def raw(server, sent, wait=5.0):
    """What comes back for bytes that need not be a request."""
    with socket.create_connection(server.server_address[:2], timeout=wait) as connection:
        connection.sendall(sent)
        with contextlib.suppress(TimeoutError, ConnectionError):
            got = b""
            while part := connection.recv(65536):
                got += part
    return got


def test_the_page_shows_what_the_files_hold(server, trained, at_runs, tmp_path):
    info = ask_json(server, "/info")
    assert (info["name"], info["step"], info["height"], info["width"], info["n"]) == ("a", 8, 9, 12, 32)
    make("runs/a", "--seed", "7", "--n", "40", "--out", tmp_path / "files", "--truncation", "0.75")
    sheet = shown(server, "/samples?seed=7&psi=0.75")
    assert sheet.shape == (4 * 9, 8 * 12, 3)
    for k in range(40):
        expected = pixels_of(tmp_path / f"files/seed7-{k:06d}.png")
        if k < 32:
            assert np.array_equal(sheet[k // 8 * 9:][:9, k % 8 * 12:][:, :12], expected)
        assert np.array_equal(shown(server, f"/picture?seed=7&k={k}&psi=0.75"), expected)
        assert k > 2 or np.array_equal(shown(server, f"/picture?seed=7&k={k}&psi=0.75&d=0,0"), expected)


def test_sliders_and_walks_of_the_page(server):
    G = generate.folded(gan.load_generator(server.gallery.source.path))
    V, _ = gan.principal_directions(server.gallery.source.G)
    a, b = generate.latents(2, [5], 5)[0] + 1.5 * V[0] - 2 * V[2], generate.latents(3, [6], 5)[0]

    def pixels(z):
        return generate.draw(G, z[None])[0].permute(1, 2, 0).numpy().astype(int)

    moved = shown(server, "/picture?seed=2&k=5&psi=1&d=1.5,0,-2")
    assert np.abs(moved - pixels(a)).max() <= 1 and np.abs(moved - pixels(generate.latents(2, [5], 5)[0])).max() > 3
    end = "&to_seed=3&to=6"
    for t in (0.0, 0.3, 1.0):
        found = shown(server, f"/picture?seed=2&k=5&psi=1&d=1.5,0,-2{end}&t={t}")
        assert np.abs(found - pixels(gan.slerp(a, b, t))).max() <= 1
    frames = ask_json(server, "/info")["frames"]
    strip = shown(server, "/walk?seed=2&k=5&psi=1&d=1.5,0,-2" + end)
    assert frames == 48 and strip.shape == (6 * 9, 8 * 12, 3)
    for j in (0, 1, 20, 47):
        frame = strip[j // 8 * 9:][:9, j % 8 * 12:][:, :12]
        assert np.abs(frame - pixels(gan.slerp(a, b, j / 47))).max() <= 1
    status, headers, content = ask(server, "/walk.gif?seed=2&k=5&psi=1" + end)
    with Image.open(io.BytesIO(content)) as im:
        assert headers["Content-Type"] == "image/gif" and im.n_frames > 40 and im.info["loop"] == 0
    large = generate.Gallery(generate.open_source(server.gallery.source.path, "cpu")._replace(
        G=gan.Generator(512, 1, 5, 1, 1).eval().requires_grad_(False)))               # fewer frames, as of its strip
    with Image.open(io.BytesIO(large.answer("/walk.gif", "seed=2&k=5&psi=1" + end)[1])) as im:
        assert im.n_frames <= large.frames < 48
    large.worker.shutdown()


def test_the_training_tab_gets_numbers_and_sheets_by_index(server, trained):
    rows = ask_json(server, "/log")
    assert rows[-1] == {"step": 9, "loss_G": 1.5} and {"loss_D", "wasserstein"} <= rows[0].keys()
    steps = ask_json(server, "/history")
    assert steps == sorted(steps) and steps[-1] == 8 and len(steps) >= 2
    for k, step in enumerate(steps):
        status, headers, content = ask(server, f"/sheet?i={k}")
        assert content == (trained / f"runs/a/samples/step-{step:07d}.png").read_bytes()
    assert ask(server, f"/sheet?i={len(steps)}")[0] == 404
    alone = generate.Gallery(generate.open_source(trained / "runs/a", "cpu")._replace(folder=None, flags=None))
    assert [json.loads(alone.answer(path, "")[1]) for path in ("/log", "/history")] == [[], []]
    with pytest.raises(generate.Mistake):
        alone.answer("/sheet", "i=0")
    assert json.loads(alone.answer("/info", "")[1])["run"] is False
    alone.worker.shutdown()


def test_a_long_log_is_thinned_and_keeps_what_is_measured_now_and_then(server, tmp_path, monkeypatch):
    rows = [{"step": 50 * k, "loss_D": k / 7} | ({"fid": 100 / k} if k % 100 == 0 else {}) for k in range(1, 6002)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(server.gallery, "source", server.gallery.source._replace(folder=tmp_path))
    shown = ask_json(server, "/log")
    assert [row for row in shown if "fid" in row] == [row for row in rows if "fid" in row] and shown[-1] == rows[-1]
    assert 1000 < len(shown) < 1700 and shown == sorted(shown, key=lambda row: row["step"])


POINT = "seed=1&k=2&psi=1"
WRONG = {
    404: ["/nothing", "/../runs/a/args.txt", "/runs/a/checkpoint.pt", "//etc/passwd", "/page", "/%2e%2e/args.txt",
          "/answer", "/__init__", "/sheet?i=99"],
    400: ["/sheet", "/sheet?i=../args.txt", "/sheet?i=-1", "/sheet?i=0&i=1", "/sheet?i=1.5", "/sheet?i=", "/?x",
          "/sheet?i=0&path=/etc/passwd", "/samples?seed=%00&psi=1", "/samples?seed=%ff&psi=1", "/log?x=1",
          "/samples?seed=0&psi=1&n=9", "/log?" + "&".join(f"x{k}=1" for k in range(40)), "/picture",
          "/picture?seed=1&k=2", f"/walk?{POINT}", f"/walk?{POINT}&to=3&to_seed=1&t=0.5",
          *(f"/picture?{POINT}&d={d}" for d in ("9", "nan", "1,,1", "1,1,1,1,1,1", ",".join("1" * 11))),
          *(f"/picture?{POINT}&{end}" for end in ("t=0.5", "to=3", "to_seed=3", "to=3&to_seed=1&t=1.5",
                                                  "to=3&to_seed=1&t=inf", "to=x&to_seed=1")),
          "/picture?seed=-1&k=2&psi=1", "/picture?seed=4294967296&k=2&psi=1", "/picture?seed=1&k=1000000&psi=1",
          "/picture?seed=1&k=2&psi=5", "/picture?seed=1&k=2&psi=1e999", "/picture?seed=1&k=2&psi=nan",
          "/picture?k=2&psi=1&seed=" + "9" * 1500],
    414: ["/picture?k=2&psi=1&seed=" + "9" * 2000, "/" + "x" * 9000]}


@pytest.mark.parametrize("status, path", [(status, path) for status, paths in WRONG.items() for path in paths],
                         ids=lambda value: str(value)[:40])
def test_wrong_requests_are_answered_plainly(server, status, path):
    found, headers, content = ask(server, path)
    assert found == status and headers["Content-Type"] == "application/json"
    assert 10 < len(json.loads(content)["error"]) < 120 and ask(server, "/info")[0] == 200


def test_only_get_and_only_from_here(server, capsys):
    for method in ("HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "BREW"):
        status, headers, content = ask(server, "/info", method, body=b"x=1" if method == "POST" else None)
        assert (status, headers["Allow"]) == (405, "GET") and (content == b"") == (method == "HEAD")
    assert raw(server, b"HEAD /info HTTP/1.1\r\nHost: localhost\r\n\r\n").endswith(b"\r\n\r\n")      # no body
    second = b"GET /log HTTP/1.1\r\nHost: localhost\r\n\r\n"
    smuggled = raw(server, b"POST /info HTTP/1.1\r\nHost: localhost\r\nContent-Length: 40\r\n\r\n" + second)
    assert smuggled.count(b"HTTP/1.1 ") == 1 and smuggled.startswith(b"HTTP/1.1 405")
    port = server.server_address[1]
    for host, status in (("evil.example", 421), (f"evil.example:{port}", 421), ("127.0.0.1.evil.org", 421), ("", 421),
                         (f"localhost:{port}", 200), ("127.0.0.1", 200), ("[::1]:9", 200), ("192.168.1.7:80", 200),
                         (socket.gethostname(), 200)):
        assert ask(server, "/info", headers={"Host": host})[0] == status, host
    for site, status in (("cross-site", 403), ("same-site", 403), ("same-origin", 200), ("none", 200)):
        assert ask(server, "/info", headers={"Sec-Fetch-Site": site})[0] == status
    assert ask(server, "/", headers={"Sec-Fetch-Site": "cross-site"})[0] == 200      # a link that leads here
    for sent in (b"\x16\x03\x01\x00garbage\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"):
        assert b'{"error": ' in raw(server, sent)
    for sent, status in ((b"GET /info HTTP/1.1\r\n\r\n", 421), (b"GET /" + b"x" * 5000 + b" HTTP/1.1\r\n\r\n", 414),
                         (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n", 431)):
        answer = raw(server, sent)
        assert answer.startswith(b"HTTP/1.1 %d " % status) and b'{"error": ' in answer
    raw(server, b"GET /" + b"x" * 70000 + b" HTTP/1.1\r\n\r\n")
    raw(server, b"GET /info HTT", 0.1)                                # and away
    with socket.create_connection(server.server_address[:2]) as connection:           # asks, and does not wait
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.sendall(b"GET /samples?seed=77&psi=1 HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert ask(server, "/info")[0] == 200
    assert capsys.readouterr() == ("", "")


def test_the_page_is_one_string_without_the_outside(server):
    status, headers, content = ask(server, "/")
    page = content.decode()
    assert status == 200 and page == generate.PAGE and headers["Content-Type"] == "text/html; charset=utf-8"
    assert set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+", page)) == {"http://www.w3.org"}      # SVG's name, no address
    assert not re.search(r"\son\w+=|style=|@import|url\(|eval\(|innerHTML", page)
    for tag in ("script", "style"):
        text = re.search(f"<{tag}>(.*?)</{tag}>", page, re.S)[1]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in headers["Content-Security-Policy"]
    assert "default-src 'none'" in headers["Content-Security-Policy"] and headers["X-Content-Type-Options"] == "nosniff"
    ids = re.findall(r'\sid="([\w-]+)"', page)
    assert len(ids) == len(set(ids)) and set(re.findall(r'\$\("([\w-]+)"\)', page)) <= set(ids)
    assert set(re.findall(r'[`"](/[\w.]+)[?`"]', page)) == set(generate.ROUTES) - {"/"}
    for field in re.findall(r'(?:for|aria-controls|aria-labelledby)="([\w-]+)"', page):
        assert field in ids
    assert set(re.findall(r"info\.(\w+)", page)) <= ask_json(server, "/info").keys()
    assert re.search(r'"dblclick".*changed\(\); ends\(\);', page)     # the small A goes back with the large one
    assert '$("save").addEventListener("click", aim);' in page         # in the middle of a walk, too
    assert '"hashchange"' in page                                     # an address pasted over another is gone to


@pytest.mark.skipif(not shutil.which("node"), reason="node is not here")
def test_the_curves_are_marked_at_whole_steps():
    ticks = re.search(r"^function ticks.*?^}$", generate.PAGE, re.M | re.S)[0]
    ranges = [[50, 51, 6, 1], [1, 3, 6, 1], [0, 3000, 6, 1], [-0.05, 0.21, 5]]       # a run's first line of numbers
    out = subprocess.run(["node", "-e", f"{ticks} console.log(JSON.stringify({ranges}.map(r => ticks(...r))))"],
                         stdout=subprocess.PIPE, check=True, text=True).stdout
    steps, few, many, values = json.loads(out)
    assert (steps, few, many) == ([50, 51], [1, 2, 3], [0, 500, 1000, 1500, 2000, 2500, 3000])
    assert values == pytest.approx([0, 0.1, 0.2])


def test_two_browsers_and_quick_clicks(server):
    expected, found = {}, []
    for seed in range(100, 110):
        expected[seed] = shown(server, f"/samples?seed={seed}&psi=1").tobytes()
    server.gallery.block.cache_clear()

    def click(browser):
        connection = http.client.HTTPConnection(*server.server_address[:2], timeout=60)       # kept alive
        for k in range(25):
            seed = 100 + (k * 7 + browser) % 10
            connection.request("GET", f"/samples?seed={seed}&psi=1")
            content = connection.getresponse().read()
            found.append(np.asarray(Image.open(io.BytesIO(content))).tobytes() == expected[seed])
        connection.close()

    threads = [threading.Thread(target=click, args=(browser,)) for browser in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 100


def test_animations_are_made_one_at_a_time(server, monkeypatch):
    """Each holds all of its frames: so many clicks are no more memory."""
    now, most, animate, answers = [], [], generate.animate, []

    def spy(*args, **more):
        now.append(1)
        most.append(len(now))
        animate(*args, **more)
        now.pop()

    monkeypatch.setattr(generate, "animate", spy)
    path = "/walk.gif?seed=2&k=%d&psi=1&to_seed=3&to=6"
    threads = [threading.Thread(target=lambda k=k: answers.append(ask(server, path % k)[0])) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [200] * 8 and most == [1] * 8


def test_a_request_that_breaks_inside_breaks_nothing(server, monkeypatch, capsys):
    def broken(*_):
        raise MemoryError("no more")

    monkeypatch.setattr(generate, "draw", broken)
    status, _, content = ask(server, "/picture?seed=987654&k=2&psi=1")
    assert status == 500 and json.loads(content)["error"].endswith("no more")
    assert "MemoryError" in capsys.readouterr().err
    monkeypatch.undo()
    assert ask(server, "/picture?seed=987654&k=2&psi=1")[0] == 200
    monkeypatch.setattr(server.gallery, "room", threading.Semaphore(0))
    assert ask(server, "/picture?seed=987655&k=2&psi=1")[0] == 503


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_page_ends_cleanly(trained, number):
    process = subprocess.Popen([sys.executable, HERE / "generate.py", "runs/a", "--serve", "0", "--device", "cpu"],
                               cwd=trained, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    waiting = []
    try:
        line = process.stdout.readline()
        port = int(re.search(r"http://127\.0\.0\.1:(\d+)/", line)[1])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("GET", "/info")
        assert json.loads(connection.getresponse().read())["name"] == "a"      # and the connection stays open
        for k in range(20):                                  # and others wait for pictures
            other = socket.create_connection(("127.0.0.1", port))
            other.sendall(b"GET /walk?seed=%d&k=1&psi=1&to_seed=0&to=2 HTTP/1.1\r\nHost: localhost\r\n\r\n" % k)
            waiting.append(other)
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
        for other in waiting:
            other.close()
    assert (process.returncode, err) == (0, "") and "ended" in out


def test_generate_in_the_readme(at_runs, monkeypatch):
    opening = "`generate.py`; the first"
    rows = README.split(opening, 1)[1].split("\n\n")[1]
    table = dict(re.findall(r"^\| `--([\w-]+)` \| ?([^|]*?) ?\|", rows, re.M))
    args = vars(generate.parse_arguments([]))
    args.pop("runs")
    args = {name: f"{value:g}" if isinstance(value, float) else value for name, value in args.items()}
    assert table == {name: "" if value in (None, False) else str(value) for name, value in args.items()}
    commands = re.findall(r"python generate\.py((?: [^\s`#|]+)*)", README + generate.__doc__)
    assert len(commands) > 15
    for flags in commands:
        generate.parse_arguments(shlex.split(flags))
    code = next(block for block in re.findall(r"```python\n(.*?)```", README, re.S)
                if 'load_generator("runs/wgan' in block)
    monkeypatch.syspath_prepend(HERE)
    *lines, last = code.replace("runs/wgan-teeth-1", "runs/a").strip().splitlines()
    cell = {}
    exec("\n".join(lines), cell)
    sheet = eval(last, cell)                                          # what a notebook shows
    torch.manual_seed(7)
    assert np.array_equal(sheet, data.grid(gan.load_generator("runs/a")(torch.randn(16, 5))))


# ---------------------------------------------------------------------------------------------------------------------
# pix2pix


# ---------------------------------------------------------------------------------------------------------------------
# Completion
# ---------------------------------------------------------------------------------------------------------------------

def holes(n=3, size=(12, 14)):
    """Masks of every kind, n of each, at the border of the picture and inside it."""
    return torch.cat([data.masks(kind, n, size, 5) for kind in complete.KINDS])


def spoiled(x, known, value=math.nan):
    """x with something else in the hole."""
    return torch.where(known > 0.5, x, torch.full_like(x, value))


def near(i, j, size):
    """The neighbours of a pixel that lie inside the picture."""
    return [(a, b) for a, b in ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1))
            if 0 <= a < size[0] and 0 <= b < size[1]]


@pytest.mark.parametrize("window, base", [(7, 0.2), (3, 0.0), (5, 1.0)])
def test_context_weights_against_a_loop(window, base):
    known, reach = holes(1), window // 2
    W = gan.context_weights(known, window, base)
    for n, (_, i, j) in [(n, place) for n in range(len(known)) for place in np.ndindex(1, 12, 14)]:
        around = known[n, 0, max(0, i - reach):i + reach + 1, max(0, j - reach):j + reach + 1]
        expected = base + 1 - around.mean() if known[n, 0, i, j] else 0.0
        assert W[n, 0, i, j] == pytest.approx(float(expected), abs=1e-6)


def test_the_weights_of_the_paper_sum_to_107_at_64_pixels():
    W = gan.context_weights(data.masks("center", 1, (64, 64)), base=0)
    assert W.sum() == pytest.approx(107, abs=1) and (W > 0).sum() == 420


def test_context_loss_against_loops():
    known = holes(1)
    W = gan.context_weights(known)
    x, y = torch.randn(2, len(known), 3, 12, 14, dtype=torch.double)
    found = gan.context_loss(x, y, W, gradient=0.7)
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
    assert torch.equal(gan.context_loss(spoiled(x, known), spoiled(y, known, 7.0), W, 0.7), found)
    assert torch.allclose(gan.context_loss(x, y, 5 * W, 0.7), found)  # one meaning for every mask: it is normalised


def dense(target, guidance, known):
    """Poisson's equation as one system of linear equations per picture and channel, by Gauss."""
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


@pytest.mark.parametrize("size", [(12, 14), (19, 9), (3, 2)])
def test_poisson_blending_equals_a_dense_solve(size):
    known = holes(2, size) if min(size) > 4 else torch.tensor([1.0, 0, 0, 0, 0, 1]).view(1, 1, 3, 2)
    target, guidance = torch.randn(2, len(known), 2, *size, dtype=torch.double)
    found = gan.poisson_blend(spoiled(target, known), guidance, known, tol=1e-9)
    assert (found - dense(target, guidance, known)).abs().max() < 1e-6
    fill = gan.harmonic_fill(spoiled(target, known), known, tol=1e-9)
    assert (fill - dense(target, torch.zeros_like(target), known)).abs().max() < 1e-6
    single = gan.poisson_blend(target.float(), guidance.float(), known)
    assert (single - found).abs().max() < 1e-4                        # far less than a grey level, 8e-3


def test_blending_a_picture_alone_or_in_a_batch():
    known = holes(2, (40, 33))
    target, guidance = torch.randn(2, len(known), 3, 40, 33)
    together = gan.poisson_blend(target, guidance, known)
    for n in range(len(known)):                                       # some converge long before the others
        alone = gan.poisson_blend(target[n:n + 1], guidance[n:n + 1], known[n:n + 1])
        assert torch.equal(alone[0], together[n])
    nothing = torch.zeros(1, 1, 40, 33)
    assert torch.equal(gan.poisson_blend(target[:1], guidance[:1], nothing), guidance[:1])


def test_blending_takes_the_colours_of_the_rim_and_the_gradients_of_the_guidance():
    known = data.masks("center", 1, (32, 32))
    ramp = torch.linspace(-1, 1, 32).expand(1, 1, 32, 32)
    assert torch.allclose(gan.harmonic_fill(spoiled(ramp, known), known), ramp, atol=1e-4)
    wave = torch.sin(torch.arange(32.0)).expand(1, 1, 32, 32) * 0.3
    for offset in (0.0, 0.5):                                         # its own level does not matter
        assert torch.allclose(gan.poisson_blend(wave + ramp, wave + offset, known), wave + ramp, atol=1e-4)
    assert (gan.poisson_blend(ramp, ramp + 0.5, known) - ramp).abs().max() < 1e-4


def test_enhancer_begins_as_the_identity_and_its_loss_against_a_loop():
    known = holes(1)
    x, real = torch.randn(2, len(known), 3, 12, 14)
    assert torch.equal(gan.Enhancer(3, 8, 5)(x, known), x)
    assert len([m for m in gan.Enhancer().modules() if isinstance(m, nn.Conv2d)]) == 5
    total = count = 0.0
    for n, (i, j) in [(n, place) for n in range(len(known)) for place in np.ndindex(12, 14)]:
        if known[n, 0, max(0, i - 2):i + 3, max(0, j - 2):j + 3].min() < 0.5:
            total, count = total + (x - real)[n, :, i, j].abs().sum(), count + 3
    assert gan.enhancement_loss(x, real, known, ring=2) == pytest.approx(float(total / count), rel=1e-5)


def trained_like(size=(16, 20), channels=3, norm="layer"):
    """A generator whose pictures differ and fill the range, and a critic, without training."""
    G, D = gan.Generator(size, channels, 6, 8), gan.Discriminator(size, channels, 8, norm=norm)
    G.to_image.weight.data *= 20
    for _ in range(50):
        G(torch.randn(32, 6))                                         # BatchNorm learns its running statistics
        D(torch.rand(8, channels, *size))
    return G.eval().requires_grad_(False), D.eval().requires_grad_(False)


def search(G, D, *, restarts=6, iterations=20, **options):
    return complete.Search(G, D, restarts, iterations, **options)


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_search_finds_a_picture_that_the_generator_can_draw(norm, monkeypatch):
    monkeypatch.setattr(complete, "POOL", 64)
    G, D = trained_like(norm=norm)
    y, known = G(complete.on_sphere(torch.randn(4, 6))), holes(1, (16, 20))[:4]
    before = {name: tensor.clone() for net in (G, D) for name, tensor in net.state_dict().items()}
    method = search(G, D, iterations=80, prior=0.0)
    found = method(spoiled(y, known), known)
    assert found.shape == (4, 4, 3, 16, 20)
    error = ((found[:, 0] - y).abs() * (1 - known)).sum((1, 2, 3))
    plain = ((complete.mean_fill(y, known) - y).abs() * (1 - known)).sum((1, 2, 3))
    start = ((method.drawn[0] - y).abs() * (1 - known)).sum((1, 2, 3))
    assert (error < 0.5 * plain).all() and (error < 0.5 * start).all()
    after = {name: tensor for net in (G, D) for name, tensor in net.state_dict().items()}
    assert same(before, after)                                        # nobody trains, BatchNorm counts nothing


def test_search_orders_its_answers_by_what_is_known_and_stays_on_the_sphere(monkeypatch):
    monkeypatch.setattr(complete, "POOL", 64)
    G, D = trained_like()
    y, known = torch.rand(3, 3, 16, 20) * 2 - 1, holes(1, (16, 20))[:3]
    method, W = search(G, D), gan.context_weights(known)
    inputs = y, known
    found = method(*inputs)
    context = torch.stack([gan.context_loss(found[:, k], y, W) for k in range(4)], 1)
    assert (context.diff(dim=1) >= 0).all() and (context[:, 0] < context[:, 3]).all()
    y = G(torch.randn(3, 6))
    z, loss, x = search(G, D, prior=0.0).refine(method.pool[:6].view(3, 2, 6), y, W, range(20))
    assert torch.allclose(z.norm(dim=2), torch.tensor(6**0.5)) and torch.allclose(G(z[1]), x[1], atol=1e-5)
    first = gan.context_loss(G(method.pool[:6]), y.repeat_interleave(2, 0), W.repeat_interleave(2, 0)).view(3, 2)
    assert (loss < first).all()
    one = complete.Search(G, D, 1, 3)(y, known)
    method.at_once = 6                                                # one picture after the other
    assert torch.allclose(method(*inputs), found, atol=1e-3)
    assert one.shape == (3, 1, 3, 16, 20) and complete.best_first(torch.tensor([[3.0, 1, 2]]), 2).tolist() == [[1, 2]]


def test_nothing_inside_the_hole_is_ever_read(monkeypatch):
    monkeypatch.setattr(complete, "POOL", 64)
    G, D = trained_like()
    U, known = gan.UNet((16, 20), 4, 3, 4).eval().requires_grad_(False), holes(1, (16, 20))
    enhancer = untrained_enhancer(torch.zeros(1, 3, 16, 20))
    y = torch.rand(len(known), 3, 16, 20) * 2 - 1
    for method, blend in ((search(G, D, restarts=3, iterations=5), "poisson"), (complete.Forward(U), "poisson"),
                          (complete.Forward(U), "paste")):
        found = complete.completed(method, y, known, blend, enhancer)
        for other in (torch.where(known > 0.5, y, torch.rand_like(y)), spoiled(y, known)):
            assert torch.equal(method(other, known), method(y, known))
            assert torch.equal(complete.completed(method, other, known, blend, enhancer), found)
        assert torch.equal((found * known[:, None]), (y * known)[:, None].expand_as(found)) and found.isfinite().all()
    touched = torch.where(known.roll(1, 3) > 0.5, y, -y)              # and that the test can fail: known pixels differ
    assert not torch.equal(complete.completed(method, touched, known, blend), complete.completed(
        method, y, known, blend))


def test_the_prior_counts_in_units_of_the_critics_own_spread(monkeypatch):
    monkeypatch.setattr(complete, "POOL", 64)
    G, D = trained_like()
    y, known = torch.rand(2, 3, 16, 20) * 2 - 1, holes(1, (16, 20))[:2]

    class Scaled(nn.Module):
        def forward(self, x):
            return 128 * D(x) + 1024

    plain, scaled = search(G, D, prior=0.5), search(G, Scaled(), prior=0.5)
    assert scaled.std == pytest.approx(128 * plain.std.item(), rel=1e-3)
    start, W = plain.pool[:8].view(2, 4, 6), gan.context_weights(known)
    (a, _, x), (b, _, _) = (method.refine(start, y, W, range(5)) for method in (plain, scaled))
    assert torch.allclose(a, b, atol=5e-3) and not torch.allclose(a, start, atol=5e-3)
    scores = [D(search(G, D, prior=prior).refine(start, y, W, range(20))[2].flatten(0, 1)).mean()
              for prior in (0.0, 5.0)]
    assert scores[1] > scores[0] + 0.5 * plain.std                    # D is high on real: the prior raises the score


@pytest.mark.parametrize("kind", ["search", "forward"])
def test_a_picture_alone_or_in_a_batch_is_completed_alike(kind, monkeypatch):
    monkeypatch.setattr(complete, "POOL", 64)
    G, D = trained_like(norm="batch")
    known = holes(1, (16, 20))
    y = torch.rand(len(known), 3, 16, 20) * 2 - 1
    method = search(G, D) if kind == "search" else complete.Forward(gan.UNet((16, 20), 4, 3, 4).eval())
    together = complete.completed(method, y, known, "poisson")
    for n in range(len(known)):
        alone = complete.completed(method, y[n:n + 1], known[n:n + 1], "poisson")
        assert torch.allclose(alone[0], together[n], atol=1e-3)       # equal but for the rounding of the convolutions


def test_enhancement_learns_what_is_always_wrong():
    known = holes(4, (16, 16))
    real = (torch.rand(len(known), 3, 4, 4) * 1.6 - 0.8).repeat_interleave(4, 2).repeat_interleave(4, 3)
    x = gan.composite(real, 0.5 * real + 0.2, known)                  # too flat and too light in the hole
    net = complete.train_enhancer(x, real, known, steps=100, lr=3e-3)
    better = complete.enhance(net, x[:, None], known)[:, 0]
    assert torch.equal(better * known, real * known) and not net.training
    assert gan.enhancement_loss(better, real, known) < 0.75 * gan.enhancement_loss(x, real, known)


def test_scores_of_completions_against_loops(here):
    known = holes(1, (16, 20))
    real, fake = np.random.RandomState(0).randint(0, 256, (2, len(known), 3, 16, 20)).astype(np.uint8)
    where = {"psnr": lambda n, i, j: True, "hole_psnr": lambda n, i, j: known[n, 0, i, j] < 0.5}
    for pasted in (False, True):
        fake = np.where(known.numpy() > 0.5, real, fake) if pasted else fake
        found, expected = complete.compare(real, fake, known), {name: [] for name in (*where, "l1", "hole_l1")}
        for n, name in [(n, name) for n in range(len(known)) for name in where]:
            d = [float(real[n, c, i, j]) - fake[n, c, i, j] for c, i, j in np.ndindex(3, 16, 20)
                 if where[name](n, i, j)]
            expected[name].append(10 * math.log10(255**2 * len(d) / sum(v * v for v in d)))
            expected[name.replace("psnr", "l1")].append(100 / 255 * sum(map(abs, d)) / len(d))
        for name, values in expected.items():
            assert found[name] == pytest.approx(np.mean(values))
    assert found["hole_ssim"] < found["ssim"] < 1
    assert complete.compare(real, real, known)["ssim"] == pytest.approx(1)
    known = data.masks("center", 1, (20, 20))                         # just where the windows have their centres
    real, fake = np.random.RandomState(1).randint(0, 256, (2, 1, 1, 20, 20)).astype(np.uint8)
    inside = evaluate.ssim(torch.from_numpy(real).double(), torch.from_numpy(fake).double(), 255)
    assert complete.compare(real, fake, known)["hole_ssim"] == pytest.approx(float(inside))
    assert "ssim" not in complete.compare(real[..., :9], fake[..., :9], known[..., :9])


WHOLE = data.Recipe((32, 32), "squash")


@pytest.mark.parametrize("size, hole, recipe, about, box", [
    ((64, 64), (16, 48, 16, 48), data.Recipe((32, 32)), "run", (0, 0, 64, 64)),
    ((90, 120), (30, 60, 40, 80), data.Recipe((32, 32)), "run", (15, 0, 105, 90)),    # training's own centre crop
    ((90, 120), (30, 60, 80, 118), data.Recipe((32, 32)), "run", (28, 0, 118, 90)),   # moved to where the hole is
    ((90, 120), (0, 10, 0, 20), data.Recipe((32, 32)), "run", (0, 0, 90, 90)),
    ((90, 120), (0, 90, 10, 110), data.Recipe((32, 32)), "run", (0, 0, 120, 90)),     # too wide for it: squashed
    ((90, 120), (30, 60, 40, 80), WHOLE, "run", (0, 0, 120, 90)),
    ((90, 120), (30, 60, 40, 80), data.Recipe((32, 32), "pad"), "run", (0, -15, 120, 105)),
    ((90, 120), (30, 60, 40, 80), data.Recipe((32, 32), crop="0.25,0,1,1"), "run", (30, 0, 120, 90)),
    ((90, 120), (30, 60, 5, 30), data.Recipe((32, 32), crop="0.25,0,1,1"), "run", (5, 0, 95, 90)),
    ((20, 20), (5, 9, 5, 9), data.Recipe((32, 32), crop="30x30@top"), "run", (0, 0, 20, 20)),
    ((400, 400), (100, 150, 200, 240), data.Recipe((32, 32)), "hole", (170, 75, 270, 175)),
    ((400, 400), (0, 4, 0, 4), data.Recipe((32, 32)), "hole", (0, 0, 32, 32)),        # never enlarged
    ((400, 400), (0, 300, 0, 300), data.Recipe((32, 32)), "hole", (0, 0, 400, 400))])
def test_the_window_that_the_networks_see(size, hole, recipe, about, box):
    known = np.ones(size, bool)
    known[hole[0]:hole[1], hole[2]:hole[3]] = False
    assert tuple(complete.find_window(Image.new("L", size[::-1]), known, recipe, about)) == box


def test_the_window_is_not_chosen_by_what_is_in_the_hole():
    random, known, boxes = np.random.RandomState(0), np.ones((120, 160), bool), []
    known[50:70, 64:104] = False
    recipe = data.Recipe((32, 32), crop="auto-each:0.3,0.3,0.6,0.7")
    pixels = np.full((120, 160), 128, np.uint8)
    pixels[40:80, 24:40] = random.randint(100, 156, (40, 16))         # detail that draws the window to the left
    for spoilt in (False, True):
        if spoilt:
            pixels[50:70, 94:104] = random.randint(0, 2, (20, 10)) * 255              # more of it, to the right
        boxes.append(complete.find_window(Image.fromarray(pixels), known, recipe))
    assert boxes[0] == boxes[1]


def test_shrinking_never_mixes_in_the_hole():
    random = np.random.RandomState(0)
    pixels, known = random.randint(0, 256, (40, 60, 3)).astype(np.uint8), random.rand(40, 60) < 0.6
    known[10:25, 20:40] = False
    x, m = complete.shrink(pixels, known, (40, 60))                   # its own size: itself
    assert torch.equal(m[0] > 0.5, torch.from_numpy(known))
    assert torch.allclose(x, data.to_float(torch.from_numpy(pixels).permute(2, 0, 1)) * m, atol=1e-6)
    x, m = complete.shrink(pixels, known, (8, 12))
    other, _ = complete.shrink(np.where(known[..., None], pixels, 255 - pixels), known, (8, 12))
    assert torch.equal(x, other) and 0 < m.mean() < 1 and (x.abs() <= 1).all()
    flat, _ = complete.shrink(np.where(known[..., None], 200, 0).astype(np.uint8), known, (8, 12))
    assert torch.allclose(flat[:, m[0] > 0], torch.tensor(200 / 127.5 - 1), atol=1e-5)


@pytest.mark.parametrize("blend", ["poisson", "paste"])
def test_putting_back_keeps_known_pixels_to_the_byte(blend):
    random = np.random.RandomState(0)
    pixels, known = random.randint(0, 256, (50, 70, 3)).astype(np.uint8), np.ones((50, 70), bool)
    known[0:20, 30:60] = False
    x = torch.rand(3, 16, 16) * 2 - 1
    out = complete.put_back(pixels, known, (10, 0, 60, 50), x, blend)
    assert out.dtype == np.uint8 and (out[known] == pixels[known]).all()
    assert np.mean(out[~known] != pixels[~known]) > 0.9
    assert (out == complete.put_back(np.where(known[..., None], pixels, 7), known, (10, 0, 60, 50), x, blend)).all()
    whole = data.to_float(torch.from_numpy(pixels).permute(2, 0, 1).float())          # its own content: itself
    assert (complete.put_back(pixels, known, (0, 0, 70, 50), whole, blend) == pixels).all()
    grey = np.full((50, 70, 3), 200, np.uint8)                        # a hole at the border of the window, not of the
    inside = complete.put_back(grey, known, (30, 0, 60, 50), torch.full((3, 16, 16), 200 / 127.5 - 1), blend)
    assert np.abs(inside[:30, 20:].astype(int) - 200).max() <= 1      # picture: there is nothing dark beside it
    lighter = complete.put_back(pixels, known, (0, 0, 70, 50), whole * 0.5 + 0.2, blend).astype(int)
    offset = np.abs(complete.put_back(pixels // 2, known, (0, 0, 70, 50), whole * 0.5 + 0.2, blend).astype(int)
                    - pixels // 2)[~known].max()
    assert offset <= 1 if blend == "poisson" else offset > 20         # a hole that is known as one: blended, not pasted
    assert np.abs(lighter - pixels)[~known].max() > 20


def test_what_lies_beside_the_picture_does_not_darken_it(here):
    draw(here / "one", 1, (120, 90))
    Image.new("RGB", (120, 90), (200, 200, 200)).save(here / "one/000.png")
    mask = np.ones((90, 120), bool)
    mask[:20, 40:80] = False
    Image.fromarray(mask).save("mask.png")
    recipe = data.Recipe((32, 32), "pad")                             # its window reaches 15 pixels over the border
    flags = argparse.Namespace(background="white", range="")
    pixels, known, box, y, m = complete.placed(complete.find_images("one")[0], "mask.png", 0, recipe, "run",
                                               (3, 32, 32), flags)
    assert box == (0, -15, 120, 105) and (known == mask).all() and pixels.shape == (90, 120, 3)
    assert (y[:, :3] == -1).all() and (m[:, :3] == 1).all()           # black, and known to be, as in training
    there, _ = complete.shrink(complete.cut_out(pixels, box), None, (32, 32))         # what a perfect network draws
    for x, most in ((there, 7), (torch.full_like(there, 200 / 127.5 - 1), 0)):
        out = complete.put_back(pixels, known, box, x).astype(int)
        assert (out[known] == 200).all() and np.abs(out - 200)[~known].mean() <= most


def test_the_window_of_crop_auto_is_sought_where_training_sought_it(here, monkeypatch):
    monkeypatch.setattr(complete, "POOL", 8)
    for name, n in (("a", 9), ("b", 3)):
        draw(here / "pictures" / name, n, (20, 24))
    seen = []
    monkeypatch.setattr(data, "find_crop", lambda items: seen.append([item.name for item in items]) or "0,0,1,1")
    train("--data", "pictures", "--classes", "a", "--limit", "7", "--crop", "auto", "--steps", "1", "--out", "run")
    complete_it("run", "--images", "pictures/b", "--out", "done")
    assert len(seen) == 2 and seen[0] == seen[1] == [f"a/{k:03d}.png" for k in range(7)]


def test_a_hole_that_the_runs_size_loses_is_filled_all_the_same(runs, capsys):
    draw(runs / "large", 1, (240, 320))
    mask = np.ones((240, 320), bool)
    mask[2:6, 102:106] = False                                        # the run's pixels are 20 across
    Image.fromarray(mask).save("small.png")
    was = np.asarray(Image.open("large/000.png"))
    for window in ("run", "hole"):
        complete_it("wgan", "--images", "large", "--mask", "small.png", "--window", window, "--out", window)
        now = np.asarray(Image.open(f"{window}/completed/000.png"))
        assert (now[mask] == was[mask]).all() and (now[~mask] != was[~mask]).any()
    capsys.readouterr()
    assert "at 12x16 a mask has no hole" in mistake(capsys, lambda: complete_it("wgan", "--evaluate", "--mask",
                                                                               "small.png"))


def untrained_enhancer(x, *_, **__):
    """One that changes something."""
    net = gan.Enhancer(x.shape[1], 4, 3).requires_grad_(False)
    nn.init.normal_(net.correction[-1].weight, std=0.5)
    return net.eval()


def make_runs(here, size="12x16", channels="3"):
    """Run folders of all three training scripts on the same pictures."""
    draw(here / "pictures", 14, (20, 24))
    common = ["--data", "pictures", "--size", size, "--channels", channels, "--holdout", "0.4", "--steps", "2"]
    for script, flags in (("wgan", []), ("dcgan", ["--minibatch-discrimination"])):
        train(*common, *flags, "--out", script, script=script)
    train_pix2pix.main(["--device", "cpu", "--task", "complete", "--features", "4", "--batch", "2", "--log-every", "9",
                        *common, "--out", "pix2pix"])


QUICK = ["--device", "cpu", "--restarts", "2", "--iterations", "3", "--features", "none"]


def complete_it(*flags):
    complete.main([*QUICK, *flags])


@pytest.fixture
def runs(here, monkeypatch):
    monkeypatch.setattr(complete, "POOL", 8)
    make_runs(here)
    return here


def test_pictures_of_any_size_are_completed_by_any_run(runs, capsys):
    shapes = {"a.png": ("RGB", (30, 50)), "b.jpg": ("RGB", (61, 40)), "c.png": ("L", (16, 12)), "sub/a.png": ("RGBA", (
        20, 90)), "c.bmp": ("RGB", (33, 33))}
    for k, (name, (mode, size)) in enumerate(shapes.items()):
        (runs / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.RandomState(k).randint(0, 256, (size[1], size[0], len(mode))).astype(np.uint8)
        Image.fromarray(pixels[..., 0] if mode == "L" else pixels, mode).save(runs / "mine" / name)
    (runs / "mine" / "broken.png").write_text("words")
    for run, flags in (("wgan", ["--mask", "half"]), ("dcgan", ["--blend", "paste"]), ("pix2pix", ["--window", "hole"]),
                       ("pix2pix", ["--mask", "random", "--alternatives", "wgan"])):
        capsys.readouterr()
        complete_it(run, "--images", "mine", "--batch", "2", "--out", "out", *flags)
        said = capsys.readouterr().out
        assert "left out: broken.png" in said and "wrote 5 pictures" in said
        assert "squashed to 12x16" in said or run != "wgan"
        assert ("one answer" in said) == (run == "pix2pix" and "--alternatives" not in flags)
        made = sorted(file.relative_to(runs / "out/completed").as_posix() for file in (runs / "out").rglob("*.png")
                      if file.name != "sheet.png")
        assert made == ["a.png", "b.png", "c.bmp.png", "c.png.png", "sub/a.png"]
        mask = flags[1] if "--mask" in flags else "center"
        for k, item in enumerate(complete.find_images("mine")):
            if item.name == "broken.png":
                continue
            name = f"{item.name}.png" if item.name.startswith("c.") else item.name.replace(".jpg", ".png")
            was = np.asarray(data.upright(Image.open(runs / "mine" / item.name)).convert("RGB"))
            now = np.asarray(Image.open(runs / "out/completed" / name))
            known = complete.find_mask(mask, was.shape[:2], k)
            assert now.shape == was.shape and (now[known] == was[known]).all()
            assert (now[~known] != was[~known]).mean() > 0.5
        columns = 4 if run != "pix2pix" else 5 if "--alternatives" in flags else 3    # --restarts 2 has one alternative
        sheet = Image.open(runs / "out/sheet.png")
        assert sheet.height - 20 == sheet.width // (columns * 18 + 2) * (5 * 14 + 2)
        shutil.rmtree(runs / "out")


def test_a_grey_run_makes_grey_pictures_and_the_newest_is_taken(here, monkeypatch, capsys):
    monkeypatch.setattr(complete, "POOL", 8)
    draw(here / "pictures", 14, (20, 24))
    train("--data", "pictures", "--channels", "1", "--holdout", "0.4", "--steps", "1", "--out", "runs/grey")
    complete_it("--n", "3", "--out", "done")                          # held-out pictures of the newest run
    assert "3 pictures with runs/grey (step 1), cpu, in grey" in capsys.readouterr().out
    complete_it("--images", "pictures", "--n", "2")
    made = [Image.open(file) for name in ("done", "runs/grey/completed-1") for file in sorted(
        (here / name / "completed").iterdir())]
    assert [(im.mode, im.size) for im in made] == [("L", (12, 9))] * 3 + [("L", (24, 20))] * 2


def test_holes_in_files_are_never_read_and_masks_come_from_files(runs, capsys, monkeypatch):
    monkeypatch.setattr(complete, "train_enhancer", untrained_enhancer)
    draw(runs / "mine", 3, (30, 40))
    (runs / "masks").mkdir()
    for k in range(3):
        mask = np.full((30, 40), 255, np.uint8)
        mask[3 + k:20, 5:25 + k] = 0
        Image.fromarray(mask).save(runs / "masks" / f"{k:03d}.bmp")
    Image.fromarray(mask).save(runs / "one.png")
    for run, flags in (("wgan", ["--mask", "masks"]), ("pix2pix", ["--mask", "one.png"]),
                       ("pix2pix", ["--mask", "masks", "--enhance"])):
        complete_it(run, "--images", "mine", *flags, "--out", "before")
        for k in range(3):                                            # something else in the hole
            file, mask = runs / "mine" / f"{k:03d}.png", flags[1] if "." in flags[1] else f"masks/{k:03d}.bmp"
            pixels, known = np.array(Image.open(file)), np.asarray(Image.open(mask)) > 128
            assert (np.array(Image.open(runs / f"before/completed/{k:03d}.png"))[known] == pixels[known]).all()
            pixels[~known] = np.random.RandomState(k).randint(0, 256, pixels[~known].shape)
            Image.fromarray(pixels).save(file)
        complete_it(run, "--images", "mine", *flags, "--out", "after")
        for k in range(3):
            before, after = (np.asarray(Image.open(runs / f"{name}/completed/{k:03d}.png")) for name in ("before",
                                                                                                     "after"))
            assert (before == after).all()
        shutil.rmtree("before")
        shutil.rmtree("after")
    assert (runs / "pix2pix/enhance-masks-poisson.pt").exists()
    assert "squashed" not in capsys.readouterr().out
    complete_it("pix2pix", "--images", "mine", "--mask", "masks", "--enhance")        # it is there already
    assert "training pictures" not in capsys.readouterr().out and (runs / "pix2pix/completed-1/sheet.png").exists()
    (runs / "pix2pix/enhance-masks-poisson.pt").write_text("words")                   # damaged: trained anew
    complete_it("pix2pix", "--images", "mine", "--mask", "masks", "--enhance", "--out", "again")
    assert "training pictures" in capsys.readouterr().out
    complete_it("pix2pix", "--images", "mine/000.png")
    assert (runs / "pix2pix/completed-2/completed/000.png").exists()


def test_the_critic_of_a_run_scores_each_picture_by_itself(here, monkeypatch):
    monkeypatch.setattr(complete, "POOL", 8)
    make_runs(here, "16x20")                                          # two levels: the second has a BatchNorm
    x = torch.rand(5, 3, 16, 20) * 2 - 1
    for run in ("wgan", "dcgan"):                                     # minibatch discrimination, too
        _, size, method = complete.load_method(here / run, complete.parse_arguments(QUICK), torch.device("cpu"))
        assert size == (3, 16, 20) and torch.allclose(method.D(x)[2:3], method.D(x[2:3]), atol=1e-5)
        saved = checkpoint(run)["state"]
        assert torch.equal(method.D.score.weight, saved["D"]["score.weight"])
        assert torch.equal(method.G.to_image.weight, saved["G_ema"]["to_image.weight"])


def test_numbers_of_a_run_beside_the_baselines(runs, capsys, monkeypatch):
    seen = []

    class Extract(evaluate.Features):
        def __call__(self, images, **options):
            seen.append(np.asarray(images))
            return super().__call__(images, **options)

    monkeypatch.setattr(evaluate, "load_features", lambda *_, **__: Extract(
        lambda x: x[..., ::4, ::4].flatten(1), lambda x: x / 255, "cpu", "every fourth pixel"))
    monkeypatch.setattr(complete, "train_enhancer", untrained_enhancer)
    n = len(complete.run_pictures(runtime.read_checkpoint(runs / "wgan"), complete.parse_arguments([]), "heldout"))
    for run in ("wgan", "pix2pix"):
        complete.main([*QUICK[:-2], run, "--evaluate", "--batch", "3", "--enhance"])
        complete_it(run, "--evaluate", "--mask", "random", "--n", "2")
        found = json.loads((runs / run / "completion.json").read_text())
        assert (found["center"]["n"], found["random"]["n"]) == (n, 2) and (found["center"]["search"] is None) == (
            run == "pix2pix")
        scores = found["center"]["scores"]
        assert list(scores) == ["mean fill", "harmonic fill", "mean image + Poisson", "this run, pasted",
                                "this run, + Poisson", "this run, + enhancement", "the originals"]
        for name, row in scores.items():
            assert name == "the originals" or row["psnr"] == pytest.approx(row["hole_psnr"] + 10 * math.log10(4))
            assert ("kid" in row) and "kid" not in found["random"]["scores"]["mean fill"]
        checkpoint_there = runtime.read_checkpoint(runs / run)
        train = np.asarray(complete.run_pictures(checkpoint_there, complete.parse_arguments([]), "train"))
        assert all((x == train).all((1, 2, 3)).any() for x in seen[0]) and len(seen[0]) == min(len(train), 2 * n)
        assert not any((x == train).all((1, 2, 3)).any() for x in seen[1]) and len(seen) == 8
        seen.clear()
        assert len({row.get("hole_psnr") for row in scores.values()}) == 7
        assert (runs / run / "completion-center.png").exists()
    said = capsys.readouterr().out
    for words in ("mean image + Poisson", f"{n} held-out pictures", "KID against", "every fourth pixel"):
        assert words in said
    complete.main([*QUICK[:-2], "wgan", "--evaluate", "--n", "1"])    # of one picture there is no KID, but the rest
    assert "no KID" in capsys.readouterr().out


@pytest.mark.parametrize("blend, before", [("poisson", "this run, + Poisson"), ("paste", "this run, pasted")])
def test_the_enhancement_that_is_measured_corrects_what_it_was_trained_on(runs, monkeypatch, blend, before):
    monkeypatch.setattr(complete, "train_enhancer", lambda x, *_, **__: gan.Enhancer(x.shape[1]).eval())
    complete_it("wgan", "--evaluate", "--enhance", "--blend", blend)  # untrained, it changes nothing
    scores = json.loads((runs / "wgan/completion.json").read_text())["center"]["scores"]
    assert scores["this run, + enhancement"] == scores[before]
    assert scores["this run, pasted"] != scores["this run, + Poisson"]


def test_baselines_against_loops():
    known = holes(1, (16, 16))
    images = np.random.RandomState(0).randint(0, 256, (700, 3, 16, 16)).astype(np.uint8)
    assert torch.allclose(complete.mean_picture(images), data.to_float(torch.from_numpy(images).float()).mean(
        0, keepdim=True), atol=1e-5)
    y = data.to_float(torch.from_numpy(images[:len(known)]))
    found = complete.mean_fill(spoiled(y, known), known)
    for n, c in np.ndindex(len(known), 3):
        there = known[n, 0] > 0.5
        assert torch.allclose(found[n, c][~there], y[n, c][there].mean(), atol=1e-5)
        assert torch.equal(found[n, c][there], y[n, c][there])


MISTAKES_WHEN_COMPLETING = [
    ("nowhere", "no such run folder"), ("wgan --images nowhere", "--images nowhere: there is no such"),
    ("wgan --mask square", "--mask square: take center"), ("wgan --mask words.txt", "no picture that can be read"),
    ("wgan --mask white.png", "black is the hole"),
    ("wgan --mask black.png", "nothing but hole"), ("wgan --images pictures --mask some", "no mask has the name of 0"),
    ("wgan --mask empty", "no pictures in this folder"), ("wgan --out pictures", "exists already"),
    ("wgan --restarts 0", "whole number from 1"), ("wgan --evaluate --images pictures", "leave --im"),
    ("wgan --alternatives wgan", "alternatives of its own"),
    ("pix2pix --alternatives pix2pix", "give one of train_wgan.py"),
    ("pix2pix --alternatives larger", "it has to be the same"), ("colour", "is a run of --task colorize"),
    ("wgan --images bad", "none of the 1 pictures could be completed"), ("all", "held no picture out"),
    ("wgan --data nowhere", "there is no such folder"), ("wgan --device cuda:77", "cannot be used here")]


def test_a_mask_of_another_shape_is_spoken_of(runs, capsys):
    draw(runs / "mine", 2, (20, 24))
    for name, size, said in (("same", (24, 20), False), ("half", (12, 10), False), ("square", (20, 20), True)):
        im = Image.new("L", size, 255)
        im.paste(0, (2, 2, 9, 9))
        im.save(f"{name}.png")
        complete_it("pix2pix", "--images", "mine", "--mask", f"{name}.png", "--out", name)
        assert ("another shape than 2 of 2 pictures, 000.png for one" in capsys.readouterr().out) == said


def test_mistakes_when_completing(runs, capsys):
    Image.new("L", (20, 20), 255).save("white.png")
    Image.new("L", (20, 20), 0).save("black.png")
    (runs / "empty").mkdir()
    draw(runs / "some", 1)
    (runs / "some/000.png").rename(runs / "some/zzz.png")
    (runs / "bad").mkdir()
    (runs / "bad/a.png").write_text("words")
    (runs / "words.txt").write_text("words")
    train("--data", "pictures", "--size", "16", "--steps", "1", "--out", "larger")
    saved = checkpoint("pix2pix")
    for name, change in (("colour", {"task": "colorize"}), ("all", {"holdout": 0.0})):
        (runs / name).mkdir()
        torch.save({**saved, "flags": {**saved["flags"], **change}}, runs / name / "checkpoint.pt")
    capsys.readouterr()
    for flags, words in MISTAKES_WHEN_COMPLETING:
        before = sorted(runs.rglob("*"))
        assert words in mistake(capsys, lambda: complete_it(*flags.split()))          # noqa: B023
        assert sorted(runs.rglob("*")) == before


def test_flags_and_commands_of_complete_are_those_of_the_readme(here):
    rows = README.split("`complete.py [RUN]`; the run", 1)[1].split("\n\n")[1]
    table = {name: default.strip() for name, default in re.findall(r"^\| `--([\w-]+)` \|([^|]*)\|", rows, re.M)}
    found = {name: "" if value is None or value is False else str(value)
             for name, value in vars(complete.parse_arguments([])).items() if name != "run"}
    assert found == table
    commands = re.findall(r"python complete\.py((?: [^\s`#|]+)*)", README + complete.__doc__)
    assert len(commands) >= 8
    for flags in commands:
        complete.parse_arguments(shlex.split(flags))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
def test_memory_is_kept_for_the_next_tensor():
    code = ("import resource, sys, torch, runtime\n"
            "if sys.argv[1] == 'kept': runtime.keep_memory()\n"
            "for k in range(21):\n"
            "    torch.zeros(2**24)\n"                                     # 64 MB: over all that glibc would keep
            "    if k == 0: before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)")
    faults = [int(subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True, check=True,
                                 env={**os.environ, "PYTHONPATH": str(HERE)}).stdout) for how in ("kept", "given back")]
    assert faults[0] < faults[1] / 2, faults
