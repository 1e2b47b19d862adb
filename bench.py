"""How fast it is here: our loops beside the loop that most repositories copy.

    python bench.py                         the table of this machine: some tens of minutes on two cores
    python bench.py --sizes 64 --parts wgan dcgan --repeats 5 --json bench.json

Each figure is the median (lowest .. highest) of --repeats fresh processes; ours and the baseline take turns. A step of
WGAN-GP is n_critic = 5 updates of D and one of G: D is given 320 images at batch 64, five batches, in the baseline one
batch five times. One of DCGAN is one of each, on 64.

    baseline   the loop of most repositories, of baseline.py, with our networks
    ours       the loop of train_dcgan.py or train_wgan.py, in fp32, then in bf16 where the hardware has it; "instance"
               is with the norm of the baseline's critic
"""

import contextlib
import io
import json
import multiprocessing
import os
import platform
import re
import shlex
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from PIL import Image

import baseline
import cli
import gan
import runs
import runtime
import sources


def measure(args, method, variant, size):
    """ms a step of a loop, and GB it held at most on a GPU; variant: "baseline" or "ours [NORM] PRECISION". The loop
    gets a `Run` that times steps and has no run folder; this process does nothing else."""
    device, times = runtime.pick_device(args.device), []
    synchronize = getattr(torch, device.type).synchronize    # on a CPU it does nothing

    class Timed(runs.Run):
        resume = write = due = lambda *_, **__: False

        def steps(self):
            for self.step in range(1, args.warm + args.timed + 1):                    # the first ones warm up
                synchronize()
                if self.step == args.warm + 1 and device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
                begun = time.perf_counter()
                yield self.step
                synchronize()
                if self.step > args.warm:
                    times.append(time.perf_counter() - begun)

    runs.Run = Timed
    os.chdir(args.scratch)                                   # the cache of images goes there
    kind, *norm, precision = (variant + " fp32" * (variant == "baseline")).split()
    flags = (f"--data {shlex.quote(args.data)} --size {size} --features {args.features} --batch {args.batch} --latent "
             f"128 --channels 3 --holdout 0 --device {device} --precision {precision}" + " --norm instance" * len(norm))
    with contextlib.redirect_stdout(io.StringIO()):
        script = baseline.METHODS[method][0] if kind == "ours" else baseline
        script.main([method] * (kind != "ours") + shlex.split(flags))
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
    norms, updates = (["instance ", ""], 5) if method == "wgan" else ([""], 1)
    variants = ["baseline", *(f"ours {norm}{precision}" for precision in ["fp32", "bf16"][:1 + runtime.has_bf16(device)]
                 for norm in norms)]
    for size in args.sizes:
        turns = [[child(args, method, variant, size) for variant in variants] for _ in range(args.repeats)]
        for k, variant in enumerate(variants):
            ms = [turn[k]["ms"] for turn in turns]
            report(results, method=method, size=size, loop=variant, ms_per_step=ms,
                   speedup=[turn[0]["ms"] / turn[k]["ms"] for turn in turns],
                   images_per_s=args.batch * updates / statistics.median(ms) * 1e3,
                   **{"gb": max(turn[k]["gb"] for turn in turns)} if device.type == "cuda" else {})


def parse_arguments(argv=None):
    parser = cli.Parser("bench.py", __doc__)
    add = parser.add_argument
    add("--parts", nargs="+", default=[*baseline.METHODS], choices=baseline.METHODS, help="methods (default: both)")
    add("--sizes", type=cli.number(int, gan.MIN_SIDE, gan.MAX_SIDE + 1), nargs="+", metavar="SIZE", help="heights of "
        "the square images in pixels (default: 64 128; on a GPU 64 128 256)")
    add("--features", type=cli.positive_int, default=64, help="channels at half the size (default: 64)")
    add("--batch", type=cli.positive_int, default=64, help="images in a batch (default: 64)")
    add("--repeats", type=cli.positive_int, default=3, help="processes that measure each figure (default: 3)")
    add("--data", default="", help="a folder of image files (default: the demo's, in a temporary folder)")
    add("--device", default="auto", help="where to train: auto, cuda, cuda:1, mps or cpu (default: auto)")
    add("--json", default="", metavar="FILE", help="write the figures to this file as well (default: only print them)")
    return parser.parse_args(argv)


@runtime.exit_on_user_error("bench.py")
def main(argv=None):
    args = parse_arguments(argv)
    device, results = runtime.pick_device(args.device), []
    gpu = device.type == "cuda"
    args.sizes = args.sizes or ([64, 128, 256] if gpu else [64, 128])
    args.warm, args.timed = (10, 20) if gpu else (1, 2)      # steps of each process
    about = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = re.search(r"model name\s*: (.+)|$", about)[1] or platform.machine()
    name = torch.cuda.get_device_name(device) if gpu else f"{os.cpu_count()} cores of {cpu}"
    machine = f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(machine)
    with tempfile.TemporaryDirectory() as args.scratch:
        for k, image in enumerate(() if args.data else sources.draw_demo(max(1000, args.batch), 128)):
            Image.fromarray(image).convert("RGB").save(Path(args.scratch) / f"{k:04d}.jpg", quality=90)
        args.data = str(Path(args.data or args.scratch).resolve())           # the processes that measure work elsewhere
        for part in args.parts:
            loops(part, args, device, results)
    if args.json:
        text = json.dumps(dict(machine=machine, settings=vars(args), results=results), indent=1)
        runs.write_atomically(args.json, lambda path: path.write_text(text))


if __name__ == "__main__":
    main()
