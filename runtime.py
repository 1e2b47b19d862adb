"""The process a script runs in: a user's mistakes, devices, precision, processes side by side, what is printed."""

import argparse
import contextlib
import copy
import ctypes
import os
import re
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch

# Flags of the first edition, each with the value that changed nothing and what there is now.
PREPARE = "python prepare.py FOLDER --out CLEAN writes such images once; start a new run on them"
REMOVED_FLAGS = {"accumulate": (1, "start a new run with a smaller --batch"), "profile": (False, "see GUIDE.md"),
                 "background": ("white", PREPARE), "range": ("", PREPARE), "denoise": ("", PREPARE),
                 "keep_truncated": (False, PREPARE)}
# What errors that are no bugs have in their text, and what is said instead.
OUTSIDE = {"MemoryError|out of memory|allocate memory|ALLOC_FAILED|terminated abruptly|killed by signal":
           "out of memory: a smaller --batch, --features or --max-features needs less; what was saved is whole",
           "^RuntimeError.*Connection (closed|reset) by peer|ncclRemoteError":         # not a download's
           "another process of this run has ended, its own message says why; what was saved is whole"}


class UserError(argparse.ArgumentTypeError, ValueError):
    """A mistake of the user: one sentence that says what was expected, what was got, what to do."""


@contextlib.contextmanager
def exit_on_user_error(prog):
    """A script's main() within it ends by one sentence and exit status 2, without a traceback, for what is no bug: a
    mistake of the user, the system's refusal, no memory. As a decorator: @exit_on_user_error("train_wgan.py")."""
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(130) from None                      # before the loop: there is nothing to save yet
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        advice = next((OUTSIDE[text] for text in OUTSIDE if re.search(text, repr(error))), "")
        if isinstance(error, RuntimeError) and not advice:
            raise
        print(f"{prog}: error: {advice or describe_error(error)}", file=sys.stderr)
        raise SystemExit(2) from None


def describe_error(error):
    """What an exception says; of one by the system the file, with its folder, and what is wrong with it."""
    if isinstance(error, OSError) and error.strerror and isinstance(error.filename, (str, os.PathLike)):
        return f"{Path(error.filename).absolute()}: {error.strerror}"
    return str(error)


def first_line(error):
    """The first line of what an exception says, at most 120 characters of it."""
    return str(error).partition("\n")[0][:120] or type(error).__name__


def check_removed(flags, name=""):
    """Raises UserError if a run's saved flags hold one that is gone, but for those that changed nothing."""
    for flag, (harmless, instead) in REMOVED_FLAGS.items():
        if flags.get(flag, harmless) != harmless:
            raise UserError(f"{name or 'this run'} was begun with --{flag.replace('_', '-')} {flags[flag]}, a flag "
                            f"that is gone: {instead}")


def load_tensors(path, device="cpu", mmap=False):
    """torch.load of tensors and plain values alone, and only where the file's checksums are right: torch looks at none.
    Almost any exception for another file or a damaged one."""
    with zipfile.ZipFile(path) as file:
        if file.testzip():
            raise ValueError("a checksum is wrong")
    return torch.load(path, map_location=device, weights_only=True, mmap=mmap)


def rank_and_world_size():
    """(number of this process, how many there are) under torchrun; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@contextlib.contextmanager
def rank0_first():
    """The first process runs what is within, the others after it: they find its cache of decoded images."""
    rank, world_size = rank_and_world_size()
    if world_size > 1 and rank > 0:
        torch.distributed.barrier()
    yield
    if world_size > 1 and rank == 0:
        torch.distributed.barrier()


def average_gradients(optimizer, *_):
    """Every gradient of the optimizer becomes its mean over all processes, that of a batch N times as large: a hook to
    run before optimizer.step(). (Not DistributedDataParallel around a network: a gradient penalty calls the network in
    ways of its own. BatchNorm's statistics stay those of each process, as they do there.)"""
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
    """"auto" -> cuda, else mps, else cpu; any other name as torch spells it. UserError when it is not there.

    Under torchrun "auto" and "cuda" are the graphics card with the number of this process on its machine.
    """
    if name in ("auto", "cuda") and rank_and_world_size()[1] > 1 and torch.cuda.is_available():
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name.split(":")[0] not in ("cuda", "mps", "cpu"):
        raise UserError(f"--device: expected auto, cuda, cuda:1, mps or cpu, got {name!r}")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except Exception as error:
        raise UserError(f"--device {name} cannot be used here: {first_line(error)}") from error
    torch.backends.cudnn.allow_tf32 = False                  # fp32 is fp32: TF32 keeps 10 of its 23 bits
    return device


def has_bf16(device):
    """Whether `device` multiplies bf16 in hardware (Linux's CPUs: AVX512-BF16 or AMX), so that it beats float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    about = Path("/proc/cpuinfo")                            # torch 2.4 does not say
    return device.type == "cpu" and about.exists() and bool(re.search("avx512_bf16|amx_bf16", about.read_text()))


def keep_memory():
    """Have glibc keep freed memory for the next tensor; where there is no glibc nothing happens. It would give large
    blocks back to the system, which clears every page of the next one: 5 % of a step on a CPU."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)                                       # M_MMAP_MAX: no block outside the heap
        mallopt(-1, 2**31 - 1)                               # M_TRIM_THRESHOLD: the heap does not shrink


def layer_shapes(net, *shape):
    """What the layers with weights make of one x of `shape`, and how many weights they have: "128 -> 8192 -> ..."."""
    net, shapes = copy.deepcopy(net).eval(), [shape]         # a copy: its statistics and hooks concern nobody
    for layer in net.modules():
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d, torch.nn.ConvTranspose2d)):
            layer.register_forward_hook(lambda layer, x, y: shapes.append(y.shape[1:]))
    with torch.no_grad():
        net(torch.zeros(1, *shape, device=next(net.parameters()).device))
    weights = sum(w.numel() for w in net.parameters())
    return " -> ".join("x".join(map(str, shape)) for shape in shapes) + f"; {weights / 1e6:.2f} million weights"


def derive_seed(*numbers):
    """A seed that is a function of whole numbers. (torch on a CPU keeps only the lowest 32 bits of a seed.)"""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint32)[0])


def print_rank0(text, end="\n"):
    """print, in the first process under torchrun; go on when nobody listens any more: after Ctrl-C on `... | tee log`
    the tee is gone."""
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
