"""A run and its folder: checkpoint, log, stop, CUDA graphs.

    run = Run(args, "train_wgan.py", images_per_step=64)
    run.resume(state)                     # makes the run folder, or loads the checkpoint of --resume into `state`
    for step in run.steps():              # ends early, between two steps, on Ctrl-C or SIGTERM
        ...
        run.log(name=value)               # every step: means go to the screen and to log.jsonl when they are due
        if run.due(every): run.save(state)

It never owns the loop and has no callbacks: replace `Run` by a dozen lines that do nothing and a script still trains.
"""

import argparse
import atexit
import contextlib
import datetime
import importlib
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import runtime
from runtime import UserError, print_rank0

VERSION = 2                                                  # of checkpoint.pt; the first edition wrote none


class Run:
    """One training run.

    device, precision, amp (the autocast context of a step), rank, world_size, step (from 1), folder: a Path.
    """

    def __init__(self, args, script, images_per_step):
        self.args, self.script = args, script
        self.rank, self.world_size = runtime.rank_and_world_size()
        self.images_per_step = images_per_step * self.world_size
        self.device = runtime.pick_device(args.device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)               # what is recorded or allocated without a name goes there
            torch.backends.cudnn.benchmark = True            # shapes stay: the fastest algorithm is worth looking for
        elif self.device.type == "cpu":
            runtime.keep_memory()
        if self.world_size > 1 and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo",
                                                 timeout=datetime.timedelta(hours=6))         # the first one decodes
            atexit.register(torch.distributed.destroy_process_group)
            atexit.register(time.sleep, 0.2)                 # before that: torch 2.4 hangs if gloo still holds a tensor
        self.graphs = getattr(args, "graphs", False)
        if self.graphs and (self.device.type != "cuda" or self.world_size > 1):
            raise UserError("--graphs needs one NVIDIA card and one process: leave it out (--no-graphs)")
        hardware = runtime.has_bf16(self.device)
        bf16 = args.precision == "bf16" or (args.precision == "auto" and hardware)
        self.precision = ("bf16" if bf16 else "fp32") + " (no bf16 in hardware here)" * (not hardware)
        self.amp = torch.autocast(self.device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()
        self.folder = self._choose_folder()
        self.same, self.step, self._first, self._last, self._signal = {}, 0, 0, False, None
        self._sums, self._summed, self._since, self._shown, self._once = {}, 0, 0.0, 0.0, {}
        self._seconds = self._start = 0.0                    # of training before --resume; the clock less those
        self._tensorboard, self._unlock = None, lambda: None
        if args.tensorboard and self.rank == 0:
            try:
                self._tensorboard = importlib.import_module("torch.utils.tensorboard").SummaryWriter
            except ImportError:
                raise UserError("--tensorboard needs a package that is not here: pip install tensorboard") from None
        torch.manual_seed(args.seed)

    def _choose_folder(self):
        out = self.args.out
        if out and not self.args.resume and Path(out).exists() and self.rank == 0:
            raise UserError(f"--out {out} exists already and is left as it is: give another name, or --resume {out}")
        if out or self.args.resume:
            return Path(self.args.resume or out)
        method = Path(self.script).stem.removeprefix("train_")
        source = Path(self.args.data).resolve().name.split(".")[0] or "data"
        numbered = (Path("runs") / f"{method}-{source}-{k}" for k in itertools.count(1))
        return next(folder for folder in numbered if not folder.exists())

    def resume(self, state, **same):
        """Make the run folder; with --resume, load its checkpoint into `state` = {name: object with load_state_dict}.

        same: plain values that must be equal to the checkpoint's, such as a fingerprint of the images, else UserError.
        To be called when everything is built and before the loop: it puts back the state of the random numbers.
        """
        self.same = same
        if self.world_size > 1:                              # each draws a z of its own
            torch.manual_seed(runtime.derive_seed(self.args.seed, self.rank))
        if self.rank == 0:
            self.folder = self._choose_folder()              # another run may have made the first choice by now
            self.folder.mkdir(parents=True, exist_ok=bool(self.args.resume))
            self._lock_folder()
        if self.args.resume:
            try:
                self._load(state)
            except UserError:
                self._unlock()                               # in a notebook the next try is of the same process
                raise
        for optimizer in [thing for thing in state.values() if isinstance(thing, torch.optim.Optimizer)]:
            for group in optimizer.param_groups:
                group["capturable"] = self.graphs
            for known in optimizer.state.values() if self.graphs else ():
                known["step"] = known["step"].to(self.device)          # RMSprop's were left on the CPU by --resume
            if self.world_size > 1:
                optimizer.register_step_pre_hook(runtime.average_gradients)
        self.write("args.txt", lambda path: path.write_text(flag_lines(self.args), "utf-8", "surrogateescape"))
        if self._tensorboard:
            self._tensorboard = self._tensorboard(str(self.folder / "tensorboard"), purge_step=self.step + 1)
        print_rank0(f"run:  {self.folder}, {self.device.type}, {self.precision}"
                    + f", {self.world_size} processes" * (self.world_size > 1)
                    + f", going on after step {self.step}" * (self.step > 0))

    def _lock_folder(self):
        """UserError if another process trains in the folder, where the system can tell."""
        with contextlib.suppress(ImportError, OSError):      # not on Windows, nor on some network drives
            import fcntl
            held = os.open(self.folder, os.O_RDONLY)
            self._unlock = weakref.finalize(self, os.close, held)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another process is training in {self.folder}: wait for its end, or stop it") from None

    def _load(self, state):
        saved = read_checkpoint(self.folder, mmap=False)    # its tensors live on in the optimizers
        for name, value in self.same.items():
            if saved["same"].get(name) != value:
                raise UserError(f"{self.folder} began with other {name} ({saved['same'].get(name)} then, {value} now), "
                                f"so it cannot go on exactly: start a new run")
        if saved["step"] >= self.args.steps:
            raise UserError(f"{self.folder} has done {saved['step']} steps, and --steps {self.args.steps} asks for no "
                            f"more: say how many it shall have in all, as in --steps {2 * saved['step']}")
        try:
            for name, thing in state.items():
                thing.load_state_dict(saved["state"][name])
        except (RuntimeError, KeyError, ValueError) as error:
            raise UserError(f"{self.folder / 'checkpoint.pt'} does not fit what its flags build: "
                            f"{runtime.first_line(error)}") from error
        self._first = self.step = saved["step"]
        self._seconds = saved.get("seconds", 0.0)            # the first edition counted none
        randoms = saved["random"] if isinstance(saved["random"], list) else [saved["random"]]     # of the first edition
        if len(randoms) != self.world_size:
            print_rank0(f"{self.folder} was trained by {len(randoms)} processes, now by {self.world_size}: a step sees "
                        f"{self.world_size / len(randoms):g} times the images, and draws other random numbers")
            torch.manual_seed(runtime.derive_seed(self.args.seed, self.rank, self.step))
        for kind, random in randoms[self.rank].items() if len(randoms) == self.world_size else ():
            if kind in ("cpu", self.device.type):            # what another kind of device left is passed over
                getattr(torch, kind if kind != "cpu" else "random").set_rng_state(random)
        lines = [json.dumps(row) + "\n" for row in read_log(self.folder) if row["step"] <= self.step]
        self.write("log.jsonl", lambda path: path.write_text("".join(lines)))

    def save(self, state, **extra):
        """Write checkpoint.pt: the state_dict of every object in `state`, step, random state, flags, and `extra`. A
        weight that is not finite ends the run and leaves the last checkpoint as it is."""
        random = {"cpu": torch.get_rng_state()}
        if self.device.type != "cpu":
            random[self.device.type] = getattr(torch, self.device.type).get_rng_state()
        randoms = [random] * self.world_size
        if self.world_size > 1:
            torch.distributed.all_gather_object(randoms, random)
        if self.rank:
            return
        state_dicts = {name: thing.state_dict() for name, thing in state.items()}
        self._check_finite(**{name: state_dicts[name] for name in state if isinstance(state[name], torch.nn.Module)})
        saved = dict(version=VERSION, script=self.script, step=self.step, flags={**vars(self.args), "resume": ""},
                     same=self.same, seconds=time.perf_counter() - self._start, random=randoms, state=state_dicts,
                     **extra)
        write_atomically(self.folder / "checkpoint.pt", lambda path: torch.save(saved, path))

    def write(self, name, save, *args):
        """`write_atomically` to folder/name, and images to TensorBoard too. In the loop the disk may refuse it."""
        if self.rank:
            return
        path = self.folder / name
        with self._optional(path):
            write_atomically(path, save, *args)
            if self._tensorboard and self.step and path.suffix == ".png":
                pixels = np.asarray(Image.open(path).convert("RGB"))
                tag = path.stem if path.parent == self.folder else path.parent.name
                self._tensorboard.add_image(tag, pixels, self.step, dataformats="HWC")

    @contextlib.contextmanager
    def _optional(self, path):
        try:
            yield
        except OSError as error:
            if self.step == self._first:                     # before the loop: the user is there and mends it
                self._unlock()
                raise
            print_rank0(f"\n{path} is not written, the training goes on: {runtime.describe_error(error)}")

    def capture(self, work):
        """`work` itself; with --graphs as a CUDA graph: the first three calls run as they are, the fourth is recorded,
        and from then on a call replays the record.

        work: a function of tensors whose shapes stay; everything it does it does on the device, in place for what
        outlives it, with no branch on a tensor's value. What it returns carries no graph and lies in the same memory at
        each call. To be called after `resume`: a checkpoint loaded later would go unseen.
        """
        if not self.graphs:
            return work
        calls, stream, graph, static, out = 0, torch.cuda.Stream(), torch.cuda.CUDAGraph(), [], None

        def call(*inputs):
            nonlocal calls, static, out
            calls += 1
            if calls <= 3:                                   # warm-up, on a stream of its own as recording is
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    warm = work(*inputs)
                torch.cuda.current_stream().wait_stream(stream)
                return warm
            if calls == 4:
                static = [x.clone() for x in inputs]
                try:
                    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                        out = work(*static)
                except RuntimeError as error:                # the stream may be left in recording: no way back
                    raise UserError(f"--graphs: {work.__name__} cannot be recorded ({runtime.first_line(error)}): run "
                                    "without --graphs") from error
            for own, x in zip(static, inputs):
                own.copy_(x)
            graph.replay()
            return out

        return call

    def steps(self):
        """The step numbers still to do. Ends early, after the present step, on SIGINT, SIGTERM, or SIGHUP (the terminal
        was closed; not under nohup); a second SIGINT or SIGTERM kills."""
        ends = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            ends.append(signal.SIGHUP)
        before = {number: signal.signal(number, self._on_signal) for number in ends} \
            if threading.current_thread() is threading.main_thread() else {}
        began = self._since = self._shown = time.perf_counter()
        self._start = began - self._seconds
        try:
            while not self._last:
                self.step += 1
                self._last = None                            # settled by the first due() of the step
                yield self.step
                self._is_last()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self._unlock()
        command = f"    python {self.script} --resume {shlex.quote(str(self.folder))}"
        if self.step < self.args.steps:
            print_rank0(f"stopped by {self._signal or 'another process'} after step {self.step} of {self.args.steps}; "
                        f"everything is saved. Go on with\n{command}")
        else:
            took = runtime.format_duration(time.perf_counter() - began)
            print_rank0(f"done: {self.step - self._first} steps in {took}; look at {self.folder}, go on "
                        f"with\n{command} --steps {2 * self.step}"
                        + f"\nyour own images:\n    python {self.script} --data YOUR_FOLDER --size 64"
                        * (self.args.data == "demo"))
        if self._tensorboard:
            self._tensorboard.close()

    def _on_signal(self, number, frame):
        name = signal.Signals(number).name
        if not self._signal:
            self._signal = name
            with contextlib.suppress(OSError):               # not print(): it may have been interrupted itself
                os.write(2, f"\n{name}: finishing this step and saving; once more stops at once\n".encode())
        elif name != "SIGHUP":                               # which a shell that ends sends more than once
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _is_last(self):
        if self._last is None:                               # once a step, so that all of its bookkeeping agrees
            last = torch.tensor(float(self.step >= self.args.steps or self._signal is not None))
            if self.world_size > 1:                          # all stop after the same step
                torch.distributed.all_reduce(last, torch.distributed.ReduceOp.MAX)
            self._last = last.item() > 0
        return self._last

    def due(self, every):
        """Whether something periodic is due: at every multiple of `every` and on the last step; never if it is 0."""
        return every > 0 and (self._is_last() or self.step % every == 0)

    def log(self, **scalars):
        """Call it at each step. When --log-every is due, the means since the last time go to the screen and log.jsonl,
        each over the steps that had it. Values may be tensors on the device; nothing waits for the device until a line
        is due. On a terminal the one status line is also renewed every two seconds."""
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
        means = {name: float(total) / count for name, (total, count) in self._sums.items()} | self._once
        epoch = self.step * self.images_per_step / self.same["images"][0] if "images" in self.same else 0
        line = " | ".join([f"step {self.step}/{self.args.steps}" + f", epoch {epoch:.1f}" * (epoch > 0),
                           f"{runtime.format_duration((self.args.steps - self.step) / rate)} left",
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
                       images_per_sec=round(rate * self.images_per_step, 1), seconds=round(now - self._start, 1))
            with self._optional("log.jsonl"), open(self.folder / "log.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
            for name, mean in means.items() if self._tensorboard else ():
                self._tensorboard.add_scalar(name, mean, self.step)
        if due:
            self._sums, self._summed, self._since, self._once = {}, 0, now, {}

    def log_once(self, **scalars):
        """Numbers that are measured now and then: they go into the next line of the log as they are."""
        self._check_finite(**scalars)
        self._once.update({name: float(value) for name, value in scalars.items()})

    def _check_finite(self, **more):
        values = {name: total for name, (total, _) in self._sums.items()} | more
        wrong = [name for name, value in values.items() if not is_finite(value)]
        if wrong:
            raise SystemExit(f"\n{' and '.join(wrong)} stopped being finite by step {self.step}: the training has "
                             f"diverged and ends here. Nothing saved before is touched; start again with a lower --lr "
                             f"or with --precision fp32, or look at the last good files in {self.folder}")


# ---- The files of a run

def newest_run(scripts=()):
    """The folder in runs/ whose checkpoint is newest, of one of `scripts`, if given; else UserError."""
    for file in sorted(Path("runs").glob("*/checkpoint.pt"), key=os.path.getmtime, reverse=True):
        with contextlib.suppress(UserError):                 # a damaged one is passed over
            if read_checkpoint(file.parent)["script"] in scripts or not scripts:
                return file.parent
    raise UserError(f"there is no run{' of '.join(['', *scripts[:1]])} in runs/ yet: train one (python train_wgan.py), "
                    "or name a run folder")


def open_trained(path="", scripts=("train_wgan.py", "train_dcgan.py", "baseline.py wgan", "baseline.py dcgan")):
    """A run folder ("": the newest), its checkpoint.pt or a file as in generators/ -> path, folder and step (None where
    unknown), saved (the checkpoint's dict, or {}), label."""
    path = Path(path) if path else newest_run(scripts)
    folder = path if path.is_dir() else next((f for f in path.parents[:2] if (f / "checkpoint.pt").exists()), None)
    saved = read_checkpoint(folder) if folder else {}
    if scripts and saved.get("script", scripts[0]) not in scripts:
        raise UserError(f"{folder} is a run of {saved['script']}: give one of {' or '.join(scripts)}")
    step = saved.get("step")
    if path.is_file() and path.name != "checkpoint.pt":      # step-0002000.pt, or best.pt, which holds its own
        step, number = None, re.fullmatch(r"step-(\d+)", path.stem)
        with contextlib.suppress(Exception):                 # of a damaged file: loading it says so
            step = int(number[1]) if number else runtime.load_tensors(path).get("step")
    label = f"{path}" + f", step {step}" * (step is not None)
    return argparse.Namespace(path=path, folder=folder, saved=saved, step=step, label=label)


def read_checkpoint(folder, mmap=True):
    """The dict in folder/checkpoint.pt, tensors on the CPU: flags, script, step, state and more; UserError for another
    file. mmap: tensors stay in the file until they are used; the checksums read all of it once."""
    if folder.is_file():
        raise UserError(f"{folder} is a file: give the run folder that holds it, if there is one")
    path = folder / "checkpoint.pt"
    if not path.exists():
        begun = folder / "args.txt"
        raise UserError(f"{folder}: there is no " + ("such run folder" if not folder.is_dir() else f"{path.name} in it")
                        + f"; begin again with its training script and @{begun}" * begun.exists())
    try:
        saved = runtime.load_tensors(path, mmap=mmap)
        flags, _ = saved["flags"], (saved["script"], saved["step"], saved["state"])
        if "evaluate_features" in flags:                     # of the first edition
            flags["evaluate_network"] = flags.pop("evaluate_features")
        if "pictures" in saved.get("same", {}):
            saved["same"]["images"] = saved["same"].pop("pictures")
            D = saved["state"].get("D", {})
            for name, new in (("others.T", "minibatch_discrimination.T"), ("score_others", "score_minibatch")):
                D.update({f"{new}.weight": D.pop(f"{name}.weight")} if f"{name}.weight" in D else {})
    except Exception as error:                               # a damaged file raises almost anything
        raise UserError(f"{path} is damaged or was not written by a training script ({type(error).__name__}: "
                        f"{runtime.first_line(error)})") from error
    if saved.get("version", 1) > VERSION:
        raise UserError(f"{path} is of version {saved['version']}, and this edition reads {VERSION} at most: update it")
    return saved


def read_log(folder):
    """The rows of folder/log.jsonl, as dicts; a line cut short or garbled by a crash is passed over."""
    path, rows = folder / "log.jsonl", []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):                # not JSON, or not even text
            row = json.loads(line)
            rows += [row] if isinstance(row, dict) and isinstance(row.get("step"), int) else []
    return rows


def flag_lines(args):
    """The flags, one a line, as `python SCRIPT @args.txt` reads them; without --out and --resume, to repeat the run."""
    lines = []
    for name, value in vars(args).items():
        if name in ("out", "resume") or value is None or value is False or value == "":
            continue                                         # not `in`: 0.0 == False, and --holdout 0 is a choice
        lines.append(f"--{name.replace('_', '-')}" + ("" if value is True else f"={shlex.quote(str(value))}") + "\n")
    return "".join(lines)


def is_finite(value):
    """Whether a number, a tensor, or all tensors of a state_dict are finite."""
    if isinstance(value, dict):
        return all(map(is_finite, value.values()))
    return bool(torch.isfinite(torch.as_tensor(value)).all())


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
            raise OSError(f"{path} cannot be written: is the disk or the quota full, or the folder read-only? What "
                          "was saved before is whole") from error
        raise
