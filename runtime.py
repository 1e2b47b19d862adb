"""What surrounds a training loop and stands in no paper: flags, device, precision, run folder, checkpoints, log, stop.

    run = Run(args, "train_wgan.py", images_per_step=64)
    run.resume(state)                     # makes the run folder, or loads the checkpoint of --resume into `state`
    for step in run.steps():              # ends early, between two steps, on Ctrl-C or SIGTERM
        ...
        run.log(name=value)               # every step: the mean goes to the screen and to log.jsonl when it is due
        if run.due(every): run.save(state)

It never owns the loop and has no callbacks: replace `Run` by a dozen lines that do nothing and a script still trains.
"""

import argparse
import contextlib
import ctypes
import difflib
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

# What a resumed run may change: how long, how often, where. Everything else decides what comes out.
FLAGS_RESUME_MAY_CHANGE = {"steps", "log_every", "sample_every", "save_every", "evaluate_every", "evaluate_n", "evaluate_features",
              "device", "data", "tensorboard", "profile", "graphs", "resume"}


# ---------------------------------------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------------------------------------

class UserError(argparse.ArgumentTypeError, ValueError):
    """A text that is not what it should be: argparse shows its words as they are."""


def number(kind, low, high=math.inf):
    """An argparse type: an int or a float from `low` up to, not including, `high`."""
    what = f"{'whole ' * (kind is int)}number from {low:g}" + f" to under {high:g}" * (high < math.inf)

    def parse(text):
        with contextlib.suppress(ValueError):
            if low <= kind(text) < high:                     # not a number is refused too
                return kind(text)
        raise UserError(f"{text!r} is no {what}")

    parse.__name__ = what
    return parse


positive_int, nonnegative, fraction = number(int, 1), number(float, 0), number(float, 0, 1)


class Parser(argparse.ArgumentParser):
    """argparse that answers a mistake with one sentence, not with the usage, and reads flags from @file, one a line."""

    def __init__(self, prog, description, presets=None):
        """presets: {flag and value: {flag: default}}, the defaults that follow from another flag, for --help."""
        for stream in (sys.stdout, sys.stderr):              # a file name may hold what the terminal cannot show
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        lines = [f"with {given}: " + " ".join(f"--{name.replace('_', '-')} {value}" for name, value in defaults.items())
                 for given, defaults in (presets or {}).items()]
        super().__init__(prog=prog, description=description, fromfile_prefix_chars="@", allow_abbrev=False,
                         epilog="\n".join(["defaults that follow from another flag:", *lines]) if lines else None,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def convert_arg_line_to_args(self, line):
        try:
            return shlex.split(line, comments=True)
        except ValueError as error:
            self.error(f"a line of the @file cannot be read: {line!r} ({error})")

    def error(self, message):
        for flag in re.findall(r"--[\w-]+", message) if message.startswith("unrecognized") else []:
            near = difflib.get_close_matches(flag, self._option_string_actions, 1)
            message += f"; did you mean {near[0]}?" if near else ""
        word = message.removeprefix("unrecognized arguments: ")
        if word != message and "--data" in self._option_string_actions and Path(word).exists():
            message += f"; did you mean --data {word}?"
        print(f"{self.prog}: error: {message} (python {self.prog} --help lists the flags)", file=sys.stderr)
        raise SystemExit(2)


def add_arguments(parser, without=()):
    """The flags that all training scripts share, but for those of the pictures and for those in `without`.

    A script may set its own defaults.
    """
    def add(flag, **about):
        if flag not in without:
            group.add_argument(flag, **about)

    group = parser.add_argument_group("networks")
    add("--features", type=positive_int, default=64, help="channels at half the size; doubled at each halving "
        "(%(default)s)")
    add("--max-features", type=positive_int, default=512, help="the most channels anywhere (%(default)s)")
    add("--latent", type=positive_int, default=128, help="length of z (%(default)s)")
    add("--norm", choices=("none", "batch", "instance", "layer", "spectral"), help="normalisation in D; "
        "of pix2pix in G too")
    add("--upsample", default="transposed", choices=("transposed", "nearest"), help="in G (%(default)s); "
        "nearest avoids checkerboards")
    group = parser.add_argument_group("training")
    add("--flip", action="store_true", help="mirror half of the pictures left to right")
    add("--augment", default="", help="what D sees, real and fake: names out of color,translation,cutout (Zhao et al. "
        "2020); with fewer than some thousand pictures, translation,cutout helps")
    add("--batch", type=positive_int, default=64, help="pictures in a batch (%(default)s)")
    add("--steps", type=positive_int, default=100_000, help="updates of G in all, those before a --resume included "
        "(%(default)s)")
    add("--lr", type=nonnegative, help="learning rate of both optimizers")
    add("--ema", type=fraction, default=0.999, help="decay of the averaged G that draws the samples (%(default)s)")
    add("--seed", type=number(int, 0, 2**32), default=0, help="of everything that is random (%(default)s)")
    group = parser.add_argument_group("the run")
    add("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu (%(default)s)")
    add("--precision", default="auto", choices=("auto", "bf16", "fp32"), help="auto: bf16 where hardware has "
        "it (%(default)s)")
    add("--out", default="", help="run folder to make (runs/SCRIPT-DATA-1, -2, ...)")
    add("--resume", default="", metavar="RUN", help="go on with a run folder; every flag comes from it, and only how "
        "long and how often may be changed beside it")
    add("--log-every", type=positive_int, default=50, help="steps (%(default)s)")
    add("--sample-every", type=positive_int, default=500, help="steps (%(default)s)")
    add("--save-every", type=positive_int, default=2000, help="steps (%(default)s)")
    add("--evaluate-every", type=number(int, 0), default=0, metavar="K", help="steps; FID and KID of the "
        "averaged G into the log, the best so far kept as best.pt (%(default)s: never)")
    add("--evaluate-n", type=number(int, 2), default=1000, metavar="N", help="pictures of each kind for that "
        "(%(default)s)")
    add("--evaluate-features", default="inception", help="what they are compared through: inception, random (no "
        "download; compares with itself only), or a network's file (%(default)s)")
    add("--graphs", action="store_true", help="on an NVIDIA card: each step as one CUDA graph, which spares the "
        "launch of its hundreds of operations; new, and off unless asked for")
    add("--profile", action="store_true", help="measure steps 3 to 5: a table of the ten heaviest operations, and "
        "profile.json for chrome://tracing or Perfetto")
    add("--tensorboard", action=argparse.BooleanOptionalAction, default=False, help="write scalars and "
        "samples for TensorBoard too")


def parse_arguments(parser, argv=None, presets=None):
    """Parse, filling what was not given from the checkpoint of --resume, else from presets(args), else the defaults.

    presets: a function of the arguments that returns the flags which follow from others (a learning rate from an
    optimizer). A flag beside --resume that would change what the run computes ends the program with one sentence, as a
    typo does.
    """
    with exit_on_user_error(parser.prog):
        args = parser.parse_args(argv)
        if not args.resume:
            if presets:
                parser.set_defaults(**presets(args))
            return parser.parse_args(argv)
        saved = read_checkpoint(Path(args.resume))
        if saved["script"] != parser.prog:
            raise ValueError(f"{args.resume} is a run of {saved['script']}: go on with python {saved['script']} "
                             f"--resume {args.resume}")
    given = parser.parse_args(argv, type(args)(**saved["flags"]))    # argparse keeps what the namespace has already
    for name, value in saved["flags"].items():
        if name not in FLAGS_RESUME_MAY_CHANGE and getattr(given, name) != value:
            parser.error(f"--{name.replace('_', '-')} is {value!r} in {args.resume} and cannot become "
                         f"{getattr(given, name)!r} when going on with it: start a new run")
    return given


def flag_lines(args):
    """The flags, one a line, as `python SCRIPT @args.txt` reads them; without --out and --resume, to repeat the run."""
    lines = []
    for name, value in vars(args).items():
        if name in ("out", "resume") or value is None or value is False or value == "":
            continue                                         # not `in`: 0.0 == False, and --holdout 0 is a choice
        lines.append(f"--{name.replace('_', '-')}" + ("" if value is True else f" {shlex.quote(str(value))}") + "\n")
    return "".join(lines)


def run_main(main, prog):
    """main(), and one sentence for what may end a run in its middle: no memory, no disk, Ctrl-C before the loop."""
    try:
        main()
    except KeyboardInterrupt:
        os._exit(130)                                        # nothing to save yet, and no pool of readers to wait for
    except (OSError, MemoryError, RuntimeError) as error:
        memory = isinstance(error, MemoryError) or re.search("out of memory|allocate memory|ALLOC_FAILED", str(error))
        if not (memory or isinstance(error, OSError)):
            raise
        advice = "out of memory: a smaller --batch, --features or --max-features needs less" if memory else describe_error(error)
        print(f"{prog}: error: {advice}; what was saved before is whole", file=sys.stderr)
        raise SystemExit(2) from None


@contextlib.contextmanager
def exit_on_user_error(prog):
    """Inside, a ValueError or OSError is the user's mistake: one sentence, exit status 2, no traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"{prog}: error: {describe_error(error)}", file=sys.stderr)
        raise SystemExit(2) from None


def describe_error(error):
    """What an exception says; of one by the system the file, with its folder, and what is wrong with it."""
    if isinstance(error, OSError) and error.strerror and isinstance(error.filename, (str, os.PathLike)):
        return f"{Path(error.filename).absolute()}: {error.strerror}"
    return str(error)


# ---------------------------------------------------------------------------------------------------------------------
# Device and precision
# ---------------------------------------------------------------------------------------------------------------------

def rank_and_world_size():
    """(number of this process, how many there are) under torchrun; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def init_distributed(device):
    """Under torchrun: meet the other processes, once."""
    if rank_and_world_size()[1] > 1 and not torch.distributed.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")


def average_gradients(optimizer, *_):
    """Every gradient of the optimizer becomes its mean over all processes: a hook to run before optimizer.step().

    Of a mean over a batch of n that is what one process would find with a batch of N n. (A hook here, and
    not torch's DistributedDataParallel around a network, because a gradient penalty calls the network in ways of its
    own; BatchNorm's statistics stay those of each process, as they do there.)
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
        gradient.copy_(mean.view(gradient.shape))


def broadcast_from_rank0(value):
    """`value` as the first process has it: what decides which weights a step trains has to be the same in all."""
    if rank_and_world_size()[1] > 1:
        value = torch.tensor(float(value))
        torch.distributed.broadcast(value, 0)
    return float(value)


def pick_device(name):
    """"auto" -> cuda, else mps, else cpu; any other name as torch spells it. ValueError when it is not there.

    Under torchrun "auto" and "cuda" are the graphics card with the number of this process on its machine.
    """
    if name in ("auto", "cuda") and rank_and_world_size()[1] > 1 and torch.cuda.is_available():
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except Exception as error:
        raise ValueError(f"--device {name} cannot be used here: {first_line(error)}") from error
    if device.type not in ("cuda", "mps", "cpu"):
        raise ValueError(f"--device {name} cannot be used here: take auto, cuda, mps or cpu")
    return device


def has_bf16(device):
    """Whether `device` multiplies bf16 in hardware (on a CPU: AVX512-BF16 or AMX), so that it beats float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    if any(hasattr(torch.cpu, name) for name in names):
        return any(getattr(torch.cpu, name, bool)() for name in names)
    about = Path("/proc/cpuinfo")                            # for torch 2.4, which does not say
    return about.exists() and re.search("avx512_bf16|amx_bf16", about.read_text()) is not None


def keep_memory():
    """Have glibc keep freed memory for the next tensor; where there is no glibc nothing happens.

    It would give large blocks back to the system, which clears every page of the next one: 5 % of a step on a CPU.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)                                       # M_MMAP_MAX: no block outside the heap
        mallopt(-1, 2**31 - 1)                               # M_TRIM_THRESHOLD: the heap does not shrink


def derive_seed(*numbers):
    """A seed that is a function of whole numbers. (torch on a CPU keeps only the lowest 32 bits of a seed.)"""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint32)[0])


def random_state(device):
    """The states of torch's random numbers, as tensors."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(state, device):
    """Put back what `random_state` gave; what another kind of device left is passed over."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    elif device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"])


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------

def find_run(path="", scripts=(), folder="runs"):
    """The run folder `path`; with "", the one under `folder` whose checkpoint is newest.

    scripts: the names of the training scripts whose runs will do; all when empty. FileNotFoundError or ValueError, with
    one sentence, when there is none or when it is of another kind.
    """
    if path:
        script = read_checkpoint(Path(path))["script"]
        if scripts and script not in scripts:
            raise ValueError(f"{path} is a run of {script}: give one of {' or '.join(scripts)}")
        return Path(path)
    found = sorted(Path(folder).glob("*/checkpoint.pt"), key=lambda file: file.stat().st_mtime, reverse=True)
    for file in found:
        with contextlib.suppress(ValueError):                # a damaged one is passed over
            if not scripts or read_checkpoint(file.parent)["script"] in scripts:
                return file.parent
    kind = f" of {' or '.join(scripts)}" if scripts else ""
    raise FileNotFoundError(f"there is no run{kind} in {folder}/ yet: train one, as in python train_wgan.py, or name a "
                            f"run folder")


def read_checkpoint(folder, mmap=True):
    """The dict in folder/checkpoint.pt, tensors on the CPU: flags, script, step, state and more.

    mmap: tensors are read from the file when they are used, so that looking at the flags of a large run costs nothing.
    FileNotFoundError or ValueError with one sentence.
    """
    if folder.is_file():
        raise ValueError(f"{folder} is a file: give the run folder that holds it")
    path = folder / "checkpoint.pt"
    if not path.exists():
        begun = folder / "args.txt"
        raise FileNotFoundError(f"{folder}: there is no such run folder" if not folder.is_dir() else
                                f"{folder}: there is no {path.name} in it" + (f"; the run ended before it saved: begin "
                                f"again with its training script and @{begun}" if begun.exists() else ""))
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        saved["flags"], saved["script"], saved["step"], saved["state"]
    except Exception as error:                               # a damaged file makes torch.load raise almost anything
        raise ValueError(f"{path} is damaged or was not written by a training script "
                         f"({type(error).__name__}: {first_line(error)})") from error
    return saved


def read_log(folder):
    """The rows of folder/log.jsonl, as dicts; a line cut short or garbled by a crash is passed over."""
    path, rows = folder / "log.jsonl", []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):                # not JSON, or not even text
            row = json.loads(line)
            rows += [row] if isinstance(row, dict) and isinstance(row.get("step"), int) else []
    return rows


def is_finite(value):
    """Whether a number, a tensor, or all tensors of a state_dict are finite."""
    if isinstance(value, dict):
        return all(map(is_finite, value.values()))
    return bool(torch.isfinite(torch.as_tensor(value)).all())


def summary_writer():
    """TensorBoard's writer class. ValueError when the package is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("--tensorboard needs a package that is not here: pip install tensorboard") from None
    return SummaryWriter


def first_line(error):
    """The first line of what an exception says, at most 120 characters of it."""
    return str(error).partition("\n")[0][:120] or type(error).__name__


def print_rank0(text, end="\n"):
    """print, and go on when nobody listens any more: after Ctrl-C on `... | tee log` the tee is gone.

    Under torchrun the first process speaks for all.
    """
    if rank_and_world_size()[0]:
        return
    try:
        print(text, end=end, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")


def format_duration(seconds):
    """75 -> "1 min 15 s"."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours} h {m:02d} min" if hours else f"{m} min {s:02d} s" if m else f"{s} s"


def batched_slices(n, size, what=""):
    """Slices of at most `size` that cover 0..n. With `what`, says now and then how far it is and how long it takes."""
    began = shown = time.monotonic()
    terminal, what = sys.stderr.isatty(), "" if rank_and_world_size()[0] else what
    for k in range(0, n, size):
        done = min(k + size, n)
        yield slice(k, done)
        now = time.monotonic()
        if what and now - shown > (1 if terminal else 15):
            shown, left = now, format_duration((now - began) / done * (n - done))
            print(f"{what}: {done:,} of {n:,}, {left} left", end=" " * 12 + "\r" if terminal else "\n",
                  file=sys.stderr, flush=True)
    if what and terminal and shown > began:
        print(" " * 60, end="\r", file=sys.stderr, flush=True)


def write_atomically(path, save, *args):
    """save(path, *args) to a temporary path beside it, flushed, then renamed: never a file half written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name("unfinished-" + path.name)
    try:
        save(unfinished, *args)
        with open(unfinished, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):                   # on a full disk half a file is in the way
            unfinished.unlink()
        if re.search("iostream|inline_container|PytorchStreamWriter|cannot be opened", str(error)):     # torch.save's
            raise OSError(f"{path} cannot be written: is the disk full, or the folder read-only?") from error
        raise


class Run:
    """One training run.

    device, precision; amp: the autocast context of a step; step: the number of the present step, from 1; folder: a
    Path. images_per_step: pictures that a step takes, for images per second. A ValueError says what is wrong with the
    flags.
    """

    def __init__(self, args, script, images_per_step):
        self.args, self.script, self.images_per_step = args, script, images_per_step * rank_and_world_size()[1]
        self.device = pick_device(args.device)
        self.rank, self.world_size = rank_and_world_size()
        init_distributed(self.device)
        if self.device.type == "cpu":
            keep_memory()
        bf16 = args.precision == "bf16" or (args.precision == "auto" and has_bf16(self.device))
        self.precision = "bf16" if bf16 else "fp32"
        self.amp = torch.autocast(self.device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()
        self.folder = self._choose_folder()
        self.step, self._first, self._last, self._signal = 0, 0, False, None
        self._sums, self._summed, self._since, self._shown, self._remarks = {}, 0, 0.0, 0.0, {}
        self._tensorboard = summary_writer() if args.tensorboard and self.rank == 0 else None
        torch.manual_seed(args.seed)

    def _choose_folder(self):
        if self.args.resume:
            return Path(self.args.resume)
        if self.args.out:
            if Path(self.args.out).exists() and self.rank == 0:
                raise ValueError(f"--out {self.args.out} exists already and is left as it is: give another name, or go "
                                 f"on with it by --resume {self.args.out}")
            return Path(self.args.out)
        method = Path(self.script).stem.removeprefix("train_")
        source = Path(self.args.data).resolve().name.split(".")[0] or "data"
        numbered = (Path("runs") / f"{method}-{source}-{k}" for k in itertools.count(1))
        return next(folder for folder in numbered if not folder.exists())

    def resume(self, state, **same):
        """Make the run folder; with --resume, load its checkpoint into `state` = {name: object with load_state_dict}.

        same: plain values that must be equal to the checkpoint's, such as a fingerprint of the pictures, else
        ValueError. To be called when everything is built and before the loop: it puts back the state of the random
        numbers.
        """
        self.same = same
        if self.args.resume:
            self._load(state)
        elif self.rank == 0:
            self._make_folder()
        optimizers = [thing for thing in state.values() if isinstance(thing, torch.optim.Optimizer)]
        capturable = bool(getattr(self.args, "graphs", False)) and self.device.type == "cuda"
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["capturable"] = capturable
            for known in optimizer.state.values() if capturable else ():
                known["step"] = known["step"].to(self.device)          # RMSprop's were left on the CPU by --resume
        if self.world_size > 1:
            torch.manual_seed(derive_seed(self.args.seed, self.rank, self.step))       # each draws a z of its own
            for optimizer in optimizers:
                optimizer.register_step_pre_hook(average_gradients)
        self.write("args.txt", lambda path: path.write_text(flag_lines(self.args), "utf-8", "surrogateescape"))
        if self._tensorboard:
            self._tensorboard = self._tensorboard(str(self.folder / "tensorboard"), purge_step=self.step + 1)
        print_rank0(f"run:  {self.folder}, {self.device.type}, {self.precision}"
            + (f", {self.world_size} processes" if self.world_size > 1 else "")
            + (f", going on after step {self.step}" if self.step else ""))

    def _make_folder(self):
        while True:
            try:
                return self.folder.mkdir(parents=True)
            except FileExistsError:                          # another run, begun at the same time, was faster
                if self.args.out:
                    raise
                self.folder = self._choose_folder()

    def _load(self, state):
        saved = read_checkpoint(self.folder, mmap=False)    # its tensors live on in the optimizers
        for name, value in self.same.items():
            if saved["same"].get(name) != value:
                raise ValueError(f"{self.folder} began with other {name} than it finds now ({saved['same'].get(name)} "
                                 f"then, {value} now), so it cannot go on exactly: start a new run")
        if saved["step"] >= self.args.steps:
            raise ValueError(f"{self.folder} has done {saved['step']} steps, and --steps {self.args.steps} asks for no "
                             f"more: say how many it shall have in all, as in --steps {2 * saved['step']}")
        try:
            for name, thing in state.items():
                thing.load_state_dict(saved["state"][name])
        except (RuntimeError, KeyError, ValueError) as error:
            raise ValueError(f"{self.folder / 'checkpoint.pt'} does not fit what its flags build: "
                             f"{first_line(error)}") from error
        set_random_state(saved["random"], self.device)
        self.step = self._first = saved["step"]
        lines = [json.dumps(row) + "\n" for row in self.history() if row["step"] <= self.step]
        self.write("log.jsonl", lambda path: path.write_text("".join(lines)))

    def save(self, state, **extra):
        """Write checkpoint.pt: the state_dict of every object in `state`, step, random state, flags, and `extra`.

        Ends the run, and leaves the last checkpoint as it is, when a weight is not finite.
        """
        if self.rank:
            return
        self._check_finite(**{name: thing.state_dict() for name, thing in state.items()
                              if isinstance(thing, torch.nn.Module)})
        flags = {**vars(self.args), "resume": ""}
        saved = dict(script=self.script, step=self.step, flags=flags, same=self.same, random=random_state(self.device),
                     state={name: thing.state_dict() for name, thing in state.items()}, **extra)
        self.write("checkpoint.pt", lambda path: torch.save(saved, path))

    def write(self, name, save, *args):
        """`write` to folder/name, and pictures to TensorBoard too."""
        if self.rank:
            return
        path = self.folder / name
        write_atomically(path, save, *args)
        if self._tensorboard and self.step and path.suffix == ".png":
            pixels = np.asarray(Image.open(path).convert("RGB"))
            tag = path.stem if path.parent == self.folder else path.parent.name
            self._tensorboard.add_image(tag, pixels, self.step, dataformats="HWC")

    # ---- the loop's side

    def capture(self, work, because=""):
        """`work`, as a CUDA graph under --graphs: the first three calls run as they are, the fourth is recorded, and
        from then on a run_main replays the record. `work` itself where that cannot be, and a line that says why.

        work: a function of tensors whose shapes stay, and of keyword arguments that are plain values (a record is made
        for each of their values); everything it does it does on the device, in place for what outlives it, with no
        branch on a tensor's value. What it returns carries no graph (whose nodes would tie the next run_main to this one's
        stream) and lies in the same memory at each run_main. because: why it cannot be recorded, if the caller knows a
        reason. To be called after `resume`: a checkpoint loaded later would go unseen.
        """
        if not getattr(self.args, "graphs", False):
            return work
        because = because or ("there is no NVIDIA card here" if self.device.type != "cuda" else
                              "processes side by side are not tried with it" if self.world_size > 1 else "")
        if because:
            print_rank0(f"--graphs: {work.__name__} runs one operation at a time, because {because}")
            return work
        records = {}

        def run_main(*inputs, **plain):
            record = records.setdefault(tuple(sorted(plain.items())), dict(calls=0, graph=None))
            record["calls"] += 1
            if record["calls"] <= 3:                         # warm-up, on a stream of its own as recording is
                stream = torch.cuda.Stream()
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    out = work(*inputs, **plain)
                torch.cuda.current_stream().wait_stream(stream)
                return out
            if record["calls"] == 4:
                try:
                    graph, static = torch.cuda.CUDAGraph(), [x.clone() for x in inputs]
                    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                        record["out"] = work(*static, **plain)
                    record.update(graph=graph, static=static)
                except RuntimeError as error:
                    print_rank0(f"--graphs: {work.__name__} runs one operation at a time, because recording failed: "
                        f"{first_line(error)}")
            if record["graph"] is None:
                return work(*inputs, **plain)
            for own, x in zip(record["static"], inputs):
                own.copy_(x)
            record["graph"].replay()
            return record["out"]

        return run_main

    def steps(self):
        """The step numbers still to do. Ends early, after the present step, on SIGINT or SIGTERM; a second kills.

        So it does on SIGHUP, when the terminal is closed, but under nohup.
        """
        ends = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            ends.append(signal.SIGHUP)
        before = {number: signal.getsignal(number) for number in ends} \
            if threading.current_thread() is threading.main_thread() else {}
        for number in before:
            signal.signal(number, self._on_signal)
        began = self._since = self._shown = time.perf_counter()
        self._last = False
        try:
            with self._profiler() as profiler:
                while not self._last:
                    self.step += 1
                    self._last = None                        # settled by the first due() of the step
                    yield self.step
                    self._is_last()
                    if profiler:
                        profiler.step()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        took = format_duration(time.perf_counter() - began)
        command = f"    python {self.script} --resume {shlex.quote(str(self.folder))}"
        if self.step < self.args.steps:
            print_rank0(f"stopped by {self._signal} after step {self.step} of {self.args.steps}; everything is saved. Go on "
                f"with\n{command}")
        else:
            print_rank0(f"done: {self.step - self._first} steps in {took}; look at {self.folder / 'samples'}, go on with\n"
                f"{command} --steps {2 * self.step}")
        if self._tensorboard:
            self._tensorboard.close()

    def _profiler(self):
        if not getattr(self.args, "profile", False):
            return contextlib.nullcontext()
        activities = [torch.profiler.ProfilerActivity.CPU] + (
            [torch.profiler.ProfilerActivity.CUDA] if self.device.type == "cuda" else [])
        heaviest = f"self_{'cuda' if self.device.type == 'cuda' else 'cpu'}_time_total"

        def show(profiler):
            last, rows = self.step - self._first, profiler.key_averages()
            if last < 3:
                return print_rank0(f"--profile measures steps 3 to 5, and this start had {last}")
            print_rank0(f"steps 3 to {last} of this start, by the time of each operation itself:\n"
                f"{rows.table(sort_by=heaviest, row_limit=10, max_name_column_width=60)}")
            self.write("profile.json", lambda path: profiler.export_chrome_trace(str(path)))
            print_rank0(f"wrote {self.folder / 'profile.json'}: open it in chrome://tracing or ui.perfetto.dev")

        return torch.profiler.profile(activities=activities, on_trace_ready=show,
                                      schedule=torch.profiler.schedule(wait=1, warmup=1, active=3, repeat=1))

    def _on_signal(self, number, frame):
        if self._signal == signal.Signals(number).name == "SIGHUP":
            return                                           # a shell that ends sends it more than once
        if self._signal:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self._signal = signal.Signals(number).name
        with contextlib.suppress(OSError):                   # not print(): it may have been interrupted itself
            os.write(2, f"\n{self._signal}: finishing this step and saving; once more stops at once\n".encode())

    def _is_last(self):
        if self._last is None:                               # once a step, so that all of its bookkeeping agrees
            last = self.step >= self.args.steps or self._signal is not None
            if self.world_size > 1:                               # all stop after the same step
                broadcast_from_rank0 = torch.tensor(float(last))
                torch.distributed.all_reduce(broadcast_from_rank0, torch.distributed.ReduceOp.MAX)
                last = broadcast_from_rank0.item() > 0
            self._last = last
        return self._last

    def due(self, every):
        """Whether something periodic is due: at every multiple of `every`, and always on the last step."""
        return self._is_last() or self.step % every == 0

    def log(self, **scalars):
        """Call it at each step. When --log-every is due, the means since the last time go to the screen and log.jsonl.

        A number that is not given in every step is averaged over those that had it. Values may be tensors on the
        device; nothing waits for the device until a line is due. On a terminal the one status line is also renewed
        every two seconds.
        """
        for name, value in scalars.items():
            value = value.detach() if isinstance(value, torch.Tensor) else value
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = total + value, count + 1
        self._summed += 1
        now, due = time.perf_counter(), self.due(self.args.log_every)
        terminal = sys.stdout.isatty()
        if not (due or self.step == self._first + 1 or (terminal and now - self._shown > 2)):
            return                                           # the first step shows that it moves, and how fast
        self._check_finite()
        rate = self._summed / max(now - self._since, 1e-9)   # steps per second
        means = {name: float(total) / count for name, (total, count) in self._sums.items()} | self._remarks
        line = " | ".join([f"step {self.step}/{self.args.steps}",
                           f"{format_duration((self.args.steps - self.step) / rate)} left",
                           f"{rate * self.images_per_step:.0f} images/s",
                           *(f"{name} {mean:.4g}" for name, mean in means.items())])
        if terminal:
            width = shutil.get_terminal_size().columns - 1   # a line that wraps could not be written over
            print_rank0(f"\r{line[:width]}\033[K", end="\n" if self._is_last() else "")
        else:
            print_rank0(line)
        self._shown = now
        if due and self.rank == 0:
            row = dict(step=self.step, **{name: float(f"{mean:.6g}") for name, mean in means.items()},
                       images_per_sec=round(rate * self.images_per_step, 1), time=round(time.time(), 1))
            with open(self.folder / "log.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
            for name, mean in means.items() if self._tensorboard else ():
                self._tensorboard.add_scalar(name, mean, self.step)
        if due:
            self._sums, self._summed, self._since, self._remarks = {}, 0, now, {}

    def log_once(self, **scalars):
        """Numbers that are measured now and then: they go into the next line of the log as they are."""
        self._check_finite(**scalars)
        self._remarks.update({name: float(value) for name, value in scalars.items()})

    def _check_finite(self, **more):
        values = {name: total for name, (total, _) in self._sums.items()} | more
        wrong = [name for name, value in values.items() if not is_finite(value)]
        if wrong:
            raise SystemExit(f"\n{' and '.join(wrong)} stopped being finite by step {self.step}: the training has "
                             f"diverged and ends here. Nothing saved before is touched; start again with a lower --lr "
                             f"or with --precision fp32, or look at the last good files in {self.folder}")

    def history(self):
        """The rows of log.jsonl so far."""
        return read_log(self.folder)
