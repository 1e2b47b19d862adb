"""How fast it is here: our loops, the loop that everybody copies, and what this machine could do at most.

    python bench.py                         the table of this machine: twenty minutes on two cores
    python bench.py --sizes 64 --parts wgan dcgan --repeats 5
    python bench.py --json bench.json

Everything is measured in one go: each figure is the median of --repeats fresh processes, ours and the copied loop
taking turns, so that what else the machine does falls on both. A step of WGAN-GP is n_critic = 5 updates of D and one
of G, on 320 pictures at batch 64; a step of DCGAN is one of each, on 64.

    ours     the loop of train_dcgan.py or train_wgan.py itself, with a `Run` that looks at the clock and writes nothing
    copied   written out below as it stands in most repositories: fp32, channels first, a DataLoader that decodes every
             picture again in every epoch, fakes that carry G's graph into D's step, unfused Adam, .item() every step
    limit    the convolutions of the step, forward and backward, at the rate that these networks' own convolutions
             reach alone, at the machine's best precision: the time that no arrangement of the rest can beat
"""

import argparse
import contextlib
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import cli
import data
import gan
import inception
import runs
import runtime
import sources
import train_dcgan
import train_wgan

N_CRITIC, LAM = 5, 10.0


# ---------------------------------------------------------------------------------------------------------------------
# The copied loop
# ---------------------------------------------------------------------------------------------------------------------

class ImageFolder(torch.utils.data.Dataset):
    """Decode, resize, normalise: for every picture, in every epoch."""

    def __init__(self, folder, size):
        self.files, self.size = [Path(folder) / name for name in sources.find_images(folder)], size

    def __len__(self):
        return len(self.files)

    def __getitem__(self, k):
        im = Image.open(self.files[k]).convert("RGB").resize((self.size, self.size), Image.Resampling.BILINEAR)
        x = torch.from_numpy(np.array(im)).permute(2, 0, 1).float().div(255)
        return (x - 0.5) / 0.5


def forever(loader):
    while True:
        yield from loader


def copied_dcgan(args, device, steps):
    """DCGAN as it is copied, but for one thing: the networks are ours, so that the arithmetic is the same."""
    G = gan.Generator((args.size, args.size), 3, 128, args.features).to(device)
    D = gan.Discriminator((args.size, args.size), 3, args.features, norm="batch").to(device)
    opt_G = torch.optim.Adam(G.parameters(), 2e-4, (0.5, 0.999))
    opt_D = torch.optim.Adam(D.parameters(), 2e-4, (0.5, 0.999))
    criterion = nn.BCEWithLogitsLoss()
    loader = torch.utils.data.DataLoader(ImageFolder(args.data, args.size), args.batch, shuffle=True, num_workers=2,
                                         drop_last=True)
    for _, real in zip(steps, forever(loader)):
        real = real.to(device)
        fake = G(torch.randn(args.batch, 128, device=device))
        output = D(real)
        loss_real = criterion(output, torch.ones_like(output))
        output = D(fake)
        loss_fake = criterion(output, torch.zeros_like(output))
        loss_D = loss_real + loss_fake
        opt_D.zero_grad()
        loss_D.backward(retain_graph=True)                   # fake is not detached: G's gradients are worked out too
        opt_D.step()
        output = D(fake)
        loss_G = criterion(output, torch.ones_like(output))
        opt_G.zero_grad()
        loss_G.backward()
        opt_G.step()
        loss_D.item(), loss_G.item()


def copied_wgan(args, device, steps):
    """WGAN-GP as it is copied; the critic has InstanceNorm there."""
    G = gan.Generator((args.size, args.size), 3, 128, args.features).to(device)
    D = gan.Discriminator((args.size, args.size), 3, args.features, norm="instance").to(device)
    opt_G = torch.optim.Adam(G.parameters(), 1e-4, (0.0, 0.9))
    opt_D = torch.optim.Adam(D.parameters(), 1e-4, (0.0, 0.9))
    loader = torch.utils.data.DataLoader(ImageFolder(args.data, args.size), args.batch, shuffle=True, num_workers=2,
                                         drop_last=True)
    for _, real in zip(steps, forever(loader)):
        real = real.to(device)
        for _ in range(N_CRITIC):                            # on the same real pictures
            fake = G(torch.randn(args.batch, 128, device=device))
            alpha = torch.rand(args.batch, 1, 1, 1, device=device)
            mixed = alpha * real + (1 - alpha) * fake
            scores = D(mixed)
            gradient = torch.autograd.grad(scores, mixed, torch.ones_like(scores), True, True)[0]
            penalty = ((gradient.view(len(gradient), -1).norm(2, dim=1) - 1) ** 2).mean()
            loss_D = -(D(real).mean() - D(fake).mean()) + LAM * penalty
            opt_D.zero_grad()
            loss_D.backward(retain_graph=True)
            opt_D.step()
        loss_G = -D(fake).mean()                             # the last of D's fakes
        opt_G.zero_grad()
        loss_G.backward()
        opt_G.step()
        loss_D.item(), loss_G.item()


# ---------------------------------------------------------------------------------------------------------------------
# One measurement, in a process of its own
# ---------------------------------------------------------------------------------------------------------------------

def peak_memory():
    """The most bytes that this process has held; not a number on Windows, which tells it otherwise."""
    try:
        import resource
    except ImportError:
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Clock:
    """Counts steps off; the first ones warm up, the others are timed one by one."""

    def __init__(self, device, warm, timed):
        self.device, self.warm, self.timed, self.times = device, warm, timed, []

    def now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def __iter__(self):
        for k in range(self.warm):
            yield k
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for k in range(self.timed):
            begun = self.now()
            yield k
            self.times.append(self.now() - begun)

    def result(self):
        memory = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else peak_memory()
        return dict(ms=statistics.median(self.times) * 1e3, gb=memory / 1e9)


def ours(script, flags, device, clock):
    """The loop of a training script, with a `Run` that keeps the time instead of a run folder."""
    class Watch(runs.Run):
        def resume(self, state, **same):
            self.same = same

        def steps(self):
            for self.step in clock:
                self.step += 1
                yield self.step

        def due(self, every):
            return False

        def log(self, **scalars):                            # as the real one between two lines: no wait for the device
            for name, value in scalars.items():
                total, count = self._sums.get(name, (0.0, 0))
                self._sums[name] = total + (value.detach() if isinstance(value, torch.Tensor) else value), count + 1

        def write(self, *_):
            pass

    before, runs.Run = runs.Run, Watch
    try:
        with contextlib.redirect_stdout(sys.stderr):
            script.main([*flags, "--device", str(device)])
    finally:
        runs.Run = before


def measure(args):
    """What a child process does: one of the figures, as JSON on standard output."""
    device = runtime.pick_device(args.device)
    clock = Clock(device, args.warm, args.timed)
    method, variant = args.one.split(":")
    if variant == "copied":
        {"dcgan": copied_dcgan, "wgan": copied_wgan}[method](args, device, clock)
    else:
        flags = (f"--size {args.size} --features {args.features} --batch {args.batch} --channels 3 --holdout 0 "
                 f"--precision {args.precision}" + f" --norm {variant}" * (variant in ("instance", "none"))).split()
        ours({"dcgan": train_dcgan, "wgan": train_wgan}[method], ["--data", args.data, *flags], device, clock)
    print(json.dumps(clock.result()))


def child(args, one, size, **more):
    """One figure, measured in a fresh process, which keeps its cache of pictures in args.scratch."""
    settings = dict(one=one, size=size, data=args.data, features=args.features, batch=args.batch, device=args.device,
                    precision=args.precision, warm=args.warm, timed=args.timed) | more
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    process = subprocess.run([sys.executable, Path(__file__).resolve(), *flags], capture_output=True, text=True,
                             cwd=args.scratch)
    if process.returncode:
        if "out of memory" in process.stderr.lower() or process.returncode == -9:
            return None
        raise SystemExit(process.stderr[-2000:])
    return json.loads(process.stdout.splitlines()[-1])


# ---------------------------------------------------------------------------------------------------------------------
# What the machine could do
# ---------------------------------------------------------------------------------------------------------------------

def best_time(work, device, repeats=5):
    """Median seconds of work(), warmed up."""
    times = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        begun = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])


class Operations(TorchDispatchMode):
    """Inside, `total` counts the floating-point operations of convolutions and matrix products, all derivatives too.

    (torch's own FlopCounterMode does not take autograd.grad, which a gradient penalty needs.)
    """

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        count = flop_registry.get(function._overloadpacket)
        self.total += count(*args, **(kwargs or {}), out_val=out) if count else 0
        return out


def matrix_rate(dtype, device, n):
    """Floating-point operations a second of an n x n matrix product."""
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / best_time(lambda: a @ b, device)


def convolution_rate(nets, inputs, dtype, device):
    """Operations a second of the networks' own convolutions, alone, forward and backward, one after the other."""
    layers = []

    def note(layer, given, _):
        layers.append((layer, given[0].shape))

    for net, x in zip(nets, inputs):
        hooks = [layer.register_forward_hook(note) for layer in net.modules()
                 if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))]
        with torch.no_grad():
            net(x)
        for hook in hooks:
            hook.remove()
    operations = seconds = 0.0
    for layer, shape in layers:
        layer = type(layer)(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding,
                            bias=False).to(device, dtype, memory_format=torch.channels_last)
        x = torch.randn(shape, device=device).to(dtype, memory_format=torch.channels_last).requires_grad_()
        dy = torch.randn_like(layer(x))

        def work(layer=layer, x=x, dy=dy):
            layer(x).backward(dy)

        with Operations() as counted:
            work()
        operations += counted.total
        seconds += best_time(work, device, 3)
    return operations / seconds


def step_operations(method, args, size):
    """Floating-point operations of one of our steps, as torch counts them: convolutions and matrix products only."""
    G = gan.Generator((size, size), 3, 128, args.features)
    D = gan.Discriminator((size, size), 3, args.features, norm="batch" if method == "dcgan" else "layer")
    n = 4                                                    # linear in the batch: a test says so
    real, z = torch.randn(n, 3, size, size), torch.randn(n, 128)
    with Operations() as critic:
        with torch.no_grad():
            fake = G(z)
        loss = gan.critic_loss(D(real), D(fake))
        if method == "wgan":
            loss = loss + LAM * gan.gradient_penalty(D, real, fake)
        loss.backward()
    with Operations() as generator:
        gan.generator_loss(D(G(z))).backward(inputs=list(G.parameters()))
    per_step = critic.total * (N_CRITIC if method == "wgan" else 1) + generator.total
    return per_step * args.batch / n


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------

def spread(values):
    """"median (lowest .. highest)"."""
    return f"{statistics.median(values):.3g} ({min(values):.3g} .. {max(values):.3g})"


def machine(device):
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "processor") if Path("/proc/cpuinfo").exists() else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def loops(args, device, results):
    """Ours against the copied loop, taking turns."""
    for method in ("dcgan", "wgan"):
        if method not in args.parts:
            continue
        variants = ["copied", "default"] + (["instance"] if method == "wgan" else [])
        pictures = args.batch * (N_CRITIC if method == "wgan" else 1)
        print(f"\n{method}, features {args.features}, batch {args.batch}\n"
              f"{'size':>5} {'loop':>14} {'ms a step':>28} {'pictures/s':>11} {'GB':>6} {'of limit':>9}  times copied")
        for size in args.sizes:
            figures = {variant: [] for variant in variants}
            for _ in range(args.repeats):
                for variant in variants:
                    figures[variant].append(child(args, f"{method}:{variant}", size))
            best = torch.bfloat16 if runtime.has_bf16(device) else torch.float32
            side = torch.randn(args.batch, 3, size, size, device=device)
            nets = (gan.Generator((size, size), 3, 128, args.features).to(device),
                    gan.Discriminator((size, size), 3, args.features).to(device))
            rate = convolution_rate(nets, (torch.randn(args.batch, 128, device=device), side), best, device)
            limit = step_operations(method, args, size) / rate * 1e3               # ms
            for variant in variants:
                if None in figures[variant]:
                    print(f"{size:5d} {variant:>14} out of memory")
                    continue
                ms = [figure["ms"] for figure in figures[variant]]
                ratio = [figures["copied"][k]["ms"] / ms[k] for k in range(args.repeats)] \
                    if None not in figures["copied"] else [float("nan")]
                row = dict(method=method, size=size, loop=variant, ms=ms, gb=max(f["gb"] for f in figures[variant]),
                           pictures_per_second=pictures / statistics.median(ms) * 1e3, ratio=ratio,
                           of_limit=limit / statistics.median(ms))
                results.append(row)
                print(f"{size:5d} {variant if variant == 'copied' else 'ours, ' + variant:>14} {spread(ms):>28} "
                      f"{row['pictures_per_second']:11.0f} {row['gb']:6.2f} {row['of_limit']:9.0%}  {spread(ratio)}",
                      flush=True)


def pipeline(args, results):
    """Reading pictures: the DataLoader's epoch, our first pass, which decodes and caches, and every later one."""
    print(f"\nreading {args.data}, pictures/s\n{'size':>5} {'DataLoader':>24} {'ours, first':>24} "
          f"{'ours, later':>24}   times DataLoader, first and later")
    for size in args.sizes:
        rows = []
        for _ in range(args.repeats):
            loader = torch.utils.data.DataLoader(ImageFolder(args.data, size), args.batch, True, num_workers=2)
            seconds = [time.perf_counter()]
            n = sum(len(x) for x in loader)
            seconds.append(time.perf_counter())
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:       # Windows: it is mapped
                pictures = data.load(args.data, (size, size), channels=args.channels, cache=cache)
                batches = data.batches(pictures.images, args.batch)
                for _ in range(2):
                    for _ in range(-(-n // args.batch)):     # the whole set, and what fills its last batch
                        next(batches)
                    seconds.append(time.perf_counter())
            drawn = -(-n // args.batch) * args.batch
            rows.append([k / (b - a) for k, a, b in zip((n, n, drawn), seconds, seconds[1:])])
        loader, first, later = (list(column) for column in zip(*rows))
        ratios = [[a / b for a, b in zip(column, loader)] for column in (first, later)]
        results.append(dict(method="reading", size=size, loader=loader, first=first, later=later))
        print(f"{size:5d} {spread(loader):>24} {spread(first):>24} {spread(later):>24}   "
              f"{spread(ratios[0])}, {spread(ratios[1])}", flush=True)


def sampling(args, device, results):
    """Pictures a second out of G, and through the features that FID compares."""
    print(f"\n{'size':>5} {'samples/s':>24} {'FID features/s':>24}")
    extract = inception.load_features("random", device=str(device))
    for size in args.sizes:
        G = gan.Generator((size, size), 3, 128, args.features).to(device, memory_format=torch.channels_last).eval()
        z = torch.randn(args.batch, 128, device=device)
        amp = torch.autocast(device.type, torch.bfloat16) if runtime.has_bf16(device) else contextlib.nullcontext()
        pixels = np.random.RandomState(0).randint(0, 256, (32, 3, size, size)).astype(np.uint8)

        def draw(G=G, z=z, amp=amp):
            with torch.inference_mode(), amp:
                G(z)

        samples = [args.batch / best_time(draw, device, 3) for _ in range(args.repeats)]
        features = [len(pixels) / best_time(lambda pixels=pixels: extract(pixels), device, 1)
                    for _ in range(args.repeats)]
        results.append(dict(method="sampling", size=size, samples=samples, features=features))
        print(f"{size:5d} {spread(samples):>24} {spread(features):>24}", flush=True)


def scaling(args, results):
    """What a step costs when the batch or the pictures grow."""
    print(f"\ncost of a step of DCGAN\n{'size':>5} {'batch':>6} {'ms':>8} {'microseconds a pixel':>22}")
    for size, batch in ((32, 64), (64, 16), (64, 32), (64, 64), (64, 128), (128, 64)):
        figures = [child(args, "dcgan:default", size, batch=batch) for _ in range(args.repeats)]
        if None in figures:
            print(f"{size:5d} {batch:6d} out of memory")
            continue
        ms = statistics.median(figure["ms"] for figure in figures)
        results.append(dict(method="scaling", size=size, batch=batch, ms=ms))
        print(f"{size:5d} {batch:6d} {ms:8.1f} {ms * 1e3 / (batch * size**2):22.3f}", flush=True)


def start_up(args, results):
    """From typing the command to the end of the first step, pictures cached."""
    with tempfile.TemporaryDirectory() as folder:
        seconds = []
        for k in range(args.repeats + 1):
            flags = f"--size 64 --features 16 --batch 8 --n-critic 1 --steps 1 --holdout 0 --out {k}".split()
            begun = time.perf_counter()
            process = subprocess.Popen([sys.executable, Path(train_wgan.__file__).resolve(), *flags,
                                        "--data", args.data, "--device", args.device], cwd=folder,
                                       stdout=subprocess.PIPE, text=True)
            for line in process.stdout:
                if line.startswith("step 1/"):
                    seconds.append(time.perf_counter() - begun)
            process.wait()
    results.append(dict(method="start", seconds=seconds[1:]))
    print(f"\nfrom the command to the first step, pictures cached: {spread(seconds[1:])} s")


def parse_arguments(argv=None):
    parser = cli.Parser("bench.py", __doc__)
    add = parser.add_argument
    add("--parts", nargs="+", default=["dcgan", "wgan", "reading", "sampling", "scaling", "start"],
        choices=("dcgan", "wgan", "reading", "sampling", "scaling", "start"), help="what to measure (all)")
    add("--sizes", type=cli.positive_int, nargs="+", help="pixels (64 128; on a GPU 64 128 256 512)")
    add("--features", type=cli.positive_int, default=64, help="channels at half the size (%(default)s)")
    add("--batch", type=cli.positive_int, default=64, help="pictures in a batch (%(default)s)")
    add("--repeats", type=cli.positive_int, default=3, help="processes for each figure (%(default)s)")
    add("--data", default="", help="a folder of picture files (the demo's, drawn into a temporary folder)")
    add("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu (%(default)s)")
    add("--precision", default="auto", choices=("auto", "bf16", "fp32"), help="of ours (%(default)s)")
    add("--channels", default="3", choices=("auto", "1", "3"), help="of our pictures in the part reading (%(default)s)")
    add("--warm", type=cli.number(int, 0), help="steps before the clock starts, in each process")
    add("--timed", type=cli.positive_int, help="steps timed, in each process")
    add("--json", default="", metavar="FILE", help="write the figures there as well")
    add("--one", default="", help=argparse.SUPPRESS)
    add("--size", type=int, default=64, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_arguments(argv)
    with runtime.exit_on_user_error("bench.py"):
        device = runtime.pick_device(args.device)
        if args.data and not Path(args.data).is_dir():
            raise ValueError(f"--data {args.data}: there is no such folder")
        if args.data and len(sources.find_images(args.data)) < args.batch:
            raise ValueError(f"--data {args.data} holds fewer pictures than one batch of {args.batch}: take a smaller "
                             "--batch")
        if args.json and not Path(args.json).resolve().parent.is_dir():
            raise ValueError(f"--json {args.json}: there is no such folder")
        on_gpu, results = device.type == "cuda", []
        args.sizes = args.sizes or ([64, 128, 256, 512] if on_gpu else [64, 128])
        for size in args.sizes:
            gan.grid_sizes((size, size))                         # a mistake is said before measuring
    args.warm = (10 if on_gpu else 1) if args.warm is None else args.warm
    args.timed = (20 if on_gpu else 2) if args.timed is None else args.timed
    if args.one:
        return measure(args)
    with contextlib.ExitStack() as stack:
        args.scratch = stack.enter_context(tempfile.TemporaryDirectory())
        if args.data:
            args.data = str(Path(args.data).resolve())       # the children work elsewhere
        else:
            args.data = stack.enter_context(tempfile.TemporaryDirectory())
            for k, picture in enumerate(sources.draw_demo(max(1000, args.batch), 128)):
                Image.fromarray(picture).convert("RGB").save(Path(args.data) / f"{k:04d}.jpg", quality=90)
        print(machine(device))
        n = 8192 if on_gpu else 2048
        rates = {str(dtype).removeprefix("torch."): matrix_rate(dtype, device, n) / 1e12
                 for dtype in (torch.float32, torch.bfloat16)}
        print(f"matrix product {n}x{n}: " + ", ".join(f"{name} {rate:.3g} TFLOP/s" for name, rate in rates.items()))
        results.append(dict(method="matrix", **rates))
        loops(args, device, results)
        for part, work in (("reading", pipeline), ("scaling", scaling), ("start", start_up)):
            if part in args.parts:
                work(args, results)
        if "sampling" in args.parts:
            sampling(args, device, results)
    if args.json:
        Path(args.json).write_text(json.dumps(dict(machine=machine(device), settings=vars(args), results=results),
                                              indent=1))


if __name__ == "__main__":
    main()
