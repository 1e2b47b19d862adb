"""The command line: types, a parser that answers mistakes with one sentence, the flags all training scripts share."""

import argparse
import contextlib
import difflib
import math
import os
import re
import shlex
import sys
from pathlib import Path

from runs import read_checkpoint
from runtime import REMOVED_FLAGS, UserError, check_removed

# What a resumed run may change: how long, how often, where. Everything else decides what comes out.
FLAGS_RESUME_MAY_CHANGE = {"steps", "log_every", "sample_every", "save_every", "evaluate_every", "evaluate_n",
                           "evaluate_network", "device", "data", "tensorboard", "graphs", "resume"}
# What a run did whose checkpoint is from before the flag.
BEFORE_THE_FLAG = {"jitter": 1.0, "decay": 0.0}
RENAMED = {"--sheet": ["--grid"], "--features": ["--network"], "--held-out": ["--heldout"], "--serve": ["serve.py"],
           "--evaluate-features": ["--evaluate-network"], "--real": ["evaluate.py REAL FAKE"], "--fake": ["REAL FAKE"],
           **dict.fromkeys(("--loss", "--schedule"), ["train_dcgan.py"]), "--task": ["train_pix2pix.py"],
           **dict.fromkeys(("--n-critic", "--constraint"), ["train_wgan.py"])}


def number(kind, low, high=math.inf):
    """An argparse type: an int or a float with low <= value < high."""
    expected = f"{'an integer' if kind is int else 'a number'} >= {low}" + f" and < {high}" * (high < math.inf)

    def parse(text):
        with contextlib.suppress(ValueError):
            if low <= kind(text) < high:                     # not a number is refused too
                return kind(text)
        raise UserError(f"expected {expected}, got {text!r}")

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
            words = shlex.split(line, comments=True)
        except ValueError as error:
            self.error(f"a line of the @file cannot be read: {line!r} ({error})")
        if words in [[f"--{flag}", str(harmless)] for flag, (harmless, _) in REMOVED_FLAGS.items()]:
            return []                                        # an args.txt of the first edition
        return ["--evaluate-network", *words[1:]] if words[:1] == ["--evaluate-features"] else words

    def _read_args_from_files(self, words):                  # every way to parse calls it
        try:
            return super()._read_args_from_files(words)
        except (UnicodeDecodeError, RecursionError):
            self.error("an @file is no text, or it names itself: expected flags, one a line")

    def error(self, message):
        for flag in re.findall(r"--[\w-]+", message) if message.startswith("unrecognized") else []:
            name = flag[2:].replace("-", "_")
            near = RENAMED.get(flag) or difflib.get_close_matches(flag, self._option_string_actions, 1)
            message += (f"; {flag} is gone: {REMOVED_FLAGS[name][1]}" if name in REMOVED_FLAGS else
                        f"; did you mean {near[0]}?" if near else "")
        word = message.removeprefix("unrecognized arguments: ")
        if word != message and os.path.exists(word) and not self._get_positional_actions():
            message += f"; did you mean {'@' if word.endswith('.txt') else '--data '}{word}?"
        print(f"{self.prog}: error: {message.removeprefix('argument ')} (python {self.prog} --help lists the flags)",
              file=sys.stderr)
        raise SystemExit(2)


def add_arguments(parser, without=()):
    """The flags that all training scripts share, but for those of the images and for those in `without`."""
    def add(flag, **about):
        if flag not in without:
            group.add_argument(flag, **about)

    default, steps = "(default: %(default)s)", "steps (default: %(default)s)"
    group = parser.add_argument_group("networks")
    add("--features", type=positive_int, default=64, help=f"channels at half the size; twice as many a level {default}")
    add("--max-features", type=positive_int, default=512, help=f"the most channels of any layer {default}")
    add("--latent", type=positive_int, default=128, help=f"length of z {default}")
    add("--norm", choices=("none", "batch", "instance", "layer", "spectral"), help="normalisation in D, of pix2pix in "
        "G too (default: see below)")
    add("--minibatch-discrimination", action="store_true", help="D sees how alike a batch's images are (default: off)")
    add("--upsample", default="transposed", choices=("transposed", "nearest"), help="how G doubles the grid: "
        f"transposed convolution, or nearest neighbour and a convolution, which avoids checkerboards {default}")
    group = parser.add_argument_group("training")
    add("--flip", action="store_true", help="mirror half of the images left to right (default: off)")
    add("--augment", default="", metavar="NAMES", help="DiffAugment (Zhao et al. 2020) of all that D sees: names out "
        "of color,translation,cutout; with fewer than some thousand images, translation,cutout helps (default: none)")
    add("--batch", type=positive_int, default=64, help=f"images in a batch {default}")
    add("--steps", type=positive_int, default=100_000, help="updates of G in all, those before a --resume included "
        f"{default}")
    add("--lr", type=nonnegative, help="learning rate of both optimizers (default: see below)")
    add("--ema", type=fraction, default=0.999, help=f"decay of the averaged G that draws the samples {default}")
    add("--seed", type=number(int, 0, 2**32), default=0, help=f"seed of everything that is random {default}")
    group = parser.add_argument_group("the run")
    add("--device", default="auto", help=f"auto, cuda, cuda:1, mps or cpu {default}")
    add("--precision", default="auto", choices=("auto", "bf16", "fp32"), help="of the networks' arithmetic; auto: bf16 "
        f"where the hardware has it {default}")
    add("--out", default="", help="run folder to make (default: runs/SCRIPT-DATA-1, -2, ...)")
    add("--resume", default="", metavar="RUN", help="go on with this run folder; all flags come from it, and only how "
        "long, how often and where may be changed (default: a new run)")
    add("--log-every", type=positive_int, default=50, metavar="K", help=f"a line of the log every K {steps}")
    add("--sample-every", type=positive_int, default=500, metavar="K", help=f"a sample grid every K {steps}")
    add("--save-every", type=positive_int, default=2000, metavar="K", help=f"a checkpoint every K {steps}")
    add("--evaluate-every", type=number(int, 0), default=0, metavar="K", help="FID and KID of the averaged G into the "
        "log every K steps, the best so far kept as best.pt (default: 0, never)")
    add("--evaluate-n", type=number(int, 2), default=1000, metavar="N", help="number of images of each kind for "
        f"--evaluate-every {default}")
    add("--evaluate-network", default="inception", metavar="NAME", help="feature network of --evaluate-every: "
        f"inception, random (no download; compares only with itself), or a file {default}")
    add("--graphs", action=argparse.BooleanOptionalAction, default=False, help="on an NVIDIA card, run each step as "
        "one CUDA graph; new and little tested (default: off)")
    add("--tensorboard", action=argparse.BooleanOptionalAction, default=False, help="write scalars and samples for "
        "TensorBoard too (default: off)")


def parse_arguments(parser, argv, presets, check):
    """Parse, filling what was not given from the checkpoint of --resume, else from presets(args), else the defaults.

    presets: args -> the defaults which follow from others (a learning rate from an optimizer). check(args) raises
    ValueError where they contradict one another. A flag beside --resume that would change what the run computes is
    refused.
    """
    args = parser.parse_args(argv)
    if args.resume:
        saved = read_checkpoint(Path(args.resume))
        if saved["script"].split()[0] not in (parser.prog, "baseline.py"):       # the latter has the flags of both
            raise UserError(f"{args.resume} is a run of {saved['script']}: go on with python {saved['script']} "
                            f"--resume {args.resume}")
        check_removed(saved["flags"], args.resume)
        flags = {name: value for name, value in {**BEFORE_THE_FLAG, **saved["flags"]}.items() if hasattr(args, name)}
        args = parser.parse_args(argv, argparse.Namespace(**{**vars(args), **flags}))     # what is given wins
        for name, value in flags.items():
            if name not in FLAGS_RESUME_MAY_CHANGE and getattr(args, name) != value:
                raise UserError(f"--{name.replace('_', '-')} is {value!r} in {args.resume} and cannot become "
                                f"{getattr(args, name)!r} when going on with it: start a new run")
    else:
        parser.set_defaults(**presets(args))
        args = parser.parse_args(argv)
    try:
        check(args)
    except ValueError as error:
        parser.error(str(error))
    return args
