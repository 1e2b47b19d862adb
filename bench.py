"""How fast it is here: our loops beside the loop that most repositories copy.

    python bench.py                         the table of this machine: some tens of minutes on two cores
    python bench.py --sizes 64 --parts wgan dcgan --repeats 5 --json bench.json

Each figure is the median (lowest .. highest) of --repeats fresh processes; ours and the baseline take turns. A step of
WGAN-GP is n_critic = 5 updates of D and one of G, on 320 images at batch 64; one of DCGAN is one of each, on 64.

    baseline   the loop of most repositories: fp32, channels first, a DataLoader that decodes every image every epoch,
               fakes that carry G's graph into D's step, unfused Adam, .item() every step; the networks are ours
    ours       the loop of train_dcgan.py or train_wgan.py itself, with a `Run` that keeps the time and writes nothing:
               in fp32, then in bf16 where the hardware has it; "instance" is with the norm of the baseline's critic
"""

import contextlib
import io
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

import cli
import data
import gan
import runs
import runtime
import sources
import train_dcgan
import train_wgan

N_CRITIC, LAM = 5, 10.0


class ImageFolder(torch.utils.data.Dataset):
    """The baseline's: decode, resize, normalise, for every image, in every epoch."""

    def __init__(self, folder, size):
        self.files, self.size = [Path(folder) / name for name in sources.find_images(folder)], size

    def __len__(self):
        return len(self.files)

    def __getitem__(self, k):
        im = Image.open(self.files[k]).convert("RGB").resize((self.size, self.size), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(im)).permute(2, 0, 1).float().div(255).sub(0.5).div(0.5)


def endless_batches(args, size, device):
    loader = torch.utils.data.DataLoader(ImageFolder(args.data, size), args.batch, True, num_workers=2, drop_last=True)
    while True:
        yield from (real.to(device) for real in loader)


def baseline_dcgan(args, size, device, steps):
    G = gan.Generator((size, size), 3, 128, args.features).to(device)
    D = gan.Discriminator((size, size), 3, args.features, norm="batch").to(device)
    opt_G, opt_D = (torch.optim.Adam(net.parameters(), 2e-4, (0.5, 0.999)) for net in (G, D))
    criterion = nn.BCEWithLogitsLoss()
    for _, real in zip(steps, endless_batches(args, size, device)):
        fake = G(torch.randn(args.batch, 128, device=device))
        output = D(real)
        loss_real = criterion(output, torch.ones_like(output))
        output = D(fake)
        loss_fake = criterion(output, torch.zeros_like(output))
        loss_D = loss_real + loss_fake
        opt_D.zero_grad()
        loss_D.backward(retain_graph=True)                   # fake is not detached: G's gradients are computed too
        opt_D.step()
        output = D(fake)
        loss_G = criterion(output, torch.ones_like(output))
        opt_G.zero_grad()
        loss_G.backward()
        opt_G.step()
        loss_D.item(), loss_G.item()


def baseline_wgan(args, size, device, steps):
    G = gan.Generator((size, size), 3, 128, args.features).to(device)
    D = gan.Discriminator((size, size), 3, args.features, norm="instance").to(device)
    opt_G, opt_D = (torch.optim.Adam(net.parameters(), 1e-4, (0.0, 0.9)) for net in (G, D))
    for _, real in zip(steps, endless_batches(args, size, device)):
        for _ in range(N_CRITIC):                            # on the same real images
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


def ours(script, flags, steps):
    """The loop of a training script, with a `Run` that goes through `steps` and has no run folder."""
    class Timed(runs.Run):
        resume = write = due = lambda *_, **__: False

        def steps(self):
            for self.step, _ in enumerate(steps, 1):
                yield self.step

    runs.Run = Timed                                         # this process does nothing else
    with contextlib.redirect_stdout(io.StringIO()):
        script.main(flags)


def timed_steps(device, warm, timed, times):
    """Counts steps; the first `warm` ones warm up, the seconds of each of the others are appended to `times`."""
    synchronize = getattr(torch, device.type).synchronize    # on a CPU it does nothing
    for k in range(warm + timed):
        synchronize()
        if k == warm and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        begun = time.perf_counter()
        yield k
        synchronize()
        times += [time.perf_counter() - begun] * (k >= warm)


def measure(args, method, variant, size):
    """ms a step of a loop, and GB it held at most on a GPU; variant: "baseline" or "ours [NORM] PRECISION"."""
    device, times = runtime.pick_device(args.device), []
    steps = timed_steps(device, args.warm, args.timed, times)
    os.chdir(args.scratch)                                   # the cache of images goes there
    baseline, script = {"dcgan": (baseline_dcgan, train_dcgan), "wgan": (baseline_wgan, train_wgan)}[method]
    if variant == "baseline":
        baseline(args, size, device, steps)
    else:
        _, *norm, precision = variant.split()
        flags = (f"--size {size} --features {args.features} --batch {args.batch} --channels 3 --holdout 0 "
                 f"--device {device} --precision {precision}").split()
        ours(script, ["--data", args.data, *flags, *(["--norm", *norm] if norm else [])], steps)
    gb = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
    return dict(ms=statistics.median(times) * 1e3, gb=gb)


def child(args, *loop):
    """measure(args, *loop) in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, args, *loop).result()


def report(results, **row):
    """Append a row to the results and print it; of a list the median (lowest .. highest) is shown."""
    def text(value):
        if isinstance(value, list):
            return f"{text(statistics.median(value))} ({text(min(value))} .. {text(max(value))})"
        return f"{value:{',.0f' if value >= 1000 else '.3g'}}" if isinstance(value, float) else str(value)

    widths = [max(len(name), {list: 24, str: 18}.get(type(value), 8)) for name, value in row.items()]
    if not results or results[-1].keys() != row.keys():
        print("\n" + " ".join(f"{name:>{width}}" for name, width in zip(row, widths)))
    print(" ".join(f"{text(value):>{width}}" for value, width in zip(row.values(), widths)), flush=True)
    results.append(row)


def loops(method, args, device, results):
    """Ours and the baseline, taking turns; like for like first."""
    precisions = ["fp32", *["bf16"] * runtime.has_bf16(device)] if args.precision == "auto" else [args.precision]
    norms, updates = (["instance ", ""], N_CRITIC) if method == "wgan" else ([""], 1)
    variants = ["baseline", *(f"ours {norm}{precision}" for precision in precisions for norm in norms)]
    for size in args.sizes:
        turns = [[child(args, method, variant, size) for variant in variants] for _ in range(args.repeats)]
        for k, variant in enumerate(variants):
            ms = [turn[k]["ms"] for turn in turns]
            report(results, method=method, size=size, loop=variant, ms_per_step=ms,
                   speedup=[turn[0]["ms"] / turn[k]["ms"] for turn in turns],
                   images_per_s=args.batch * updates / statistics.median(ms) * 1e3,
                   **{"gb": max(turn[k]["gb"] for turn in turns)} if device.type == "cuda" else {})


def reading(method, args, device, results):
    """Images a second: the DataLoader's epoch, our first pass, which decodes and caches, and every later one."""
    for size in args.sizes:
        rates = []
        for _ in range(args.repeats):
            loader = torch.utils.data.DataLoader(ImageFolder(args.data, size), args.batch, True, num_workers=2)
            times = [time.perf_counter()]
            n = sum(len(x) for x in loader)
            times.append(time.perf_counter())
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:       # Windows: it is mapped
                images = data.load(args.data, (size, size), channels="3", cache=cache).images
                batches, per_epoch = data.batches(images, args.batch), -(-n // args.batch)
                for _ in range(2):
                    for _ in range(per_epoch):               # the whole set, and what fills its last batch
                        next(batches)
                    times.append(time.perf_counter())
            rates.append([k / (b - a) for k, a, b in zip((n, n, per_epoch * args.batch), times, times[1:])])
        loader, first, later = map(list, zip(*rates))
        report(results, method=method, size=size, loader=loader, first=first, later=later,
               speedup_first=[a / b for a, b in zip(first, loader)],
               speedup_later=[a / b for a, b in zip(later, loader)])


PARTS = dict(dcgan=loops, wgan=loops, reading=reading)


def parse_arguments(argv=None):
    parser = cli.Parser("bench.py", __doc__)
    add = parser.add_argument
    add("--parts", nargs="+", default=list(PARTS), choices=PARTS, help="what to measure (default: all of it)")
    add("--sizes", type=cli.number(int, gan.MIN_SIDE, gan.MAX_SIDE + 1), nargs="+", metavar="SIZE", help="heights of "
        "the square images in pixels (default: 64 128; on a GPU 64 128 256)")
    add("--features", type=cli.positive_int, default=64, help="channels at half the size (default: 64)")
    add("--batch", type=cli.positive_int, default=64, help="images in a batch (default: 64)")
    add("--repeats", type=cli.positive_int, default=3, help="processes that measure each figure (default: 3)")
    add("--data", default="", help="a folder of image files (default: the demo's, in a temporary folder)")
    add("--device", default="auto", help="where to train: auto, cuda, cuda:1, mps or cpu (default: auto)")
    add("--precision", default="auto", choices=("auto", "bf16", "fp32"), help="precision of our loops; auto is fp32 "
        "and, where the hardware has it, bf16 (default: auto)")
    add("--json", default="", metavar="FILE", help="write the figures to this file as well (default: only print them)")
    return parser.parse_args(argv)


@runtime.exit_on_user_error("bench.py")
def main(argv=None):
    args = parse_arguments(argv)
    device, results = runtime.pick_device(args.device), []
    gpu = device.type == "cuda"
    args.sizes = args.sizes or ([64, 128, 256] if gpu else [64, 128])
    args.warm, args.timed = (10, 20) if gpu else (1, 2)      # steps of each process
    if args.data and len(sources.find_images(args.data)) < args.batch:
        raise runtime.UserError(f"--data {args.data}: expected a folder of {args.batch} images or more (--batch)")
    name = torch.cuda.get_device_name(device) if gpu else f"{os.cpu_count()} cores, {platform.machine()}"
    machine = f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(machine)
    with tempfile.TemporaryDirectory() as args.scratch:
        for k, image in enumerate(() if args.data else sources.draw_demo(max(1000, args.batch), 128)):
            Image.fromarray(image).convert("RGB").save(Path(args.scratch) / f"{k:04d}.jpg", quality=90)
        args.data = str(Path(args.data or args.scratch).resolve())           # the processes that measure work elsewhere
        for part in args.parts:
            PARTS[part](part, args, device, results)
    if args.json:
        text = json.dumps(dict(machine=machine, settings=vars(args), results=results), indent=1)
        runs.write_atomically(args.json, lambda path: path.write_text(text))


if __name__ == "__main__":
    main()
