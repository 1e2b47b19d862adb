"""From a trained generator to pictures: sheets, single files, walks through latent space, a local web page.

    python generate.py                                       a sheet of 64 samples of the newest run
    python generate.py runs/wgan-teeth-1 --seed 7            of that run, other samples
    python generate.py --out ./fakes --n 1000                single PNG files, 8 bits, grey or colour as the run is
    python generate.py --nearest                             beside each sample the training picture most like it
    python generate.py --walk walk.gif                       from sample to sample and back to the first
    python generate.py --morph 3,17                          from sample 3 to sample 17, as a strip
    python generate.py --arithmetic 12+40-7                  z12 + z40 - z7
    python generate.py --progress progress.gif               how the run's samples grew
    python generate.py runs/a runs/b --compare compare.png   the same latents through several networks
    python generate.py --project picture.png                 the latent whose picture is most like a given one
    python generate.py --serve                               a web page on this machine: look, pick, slide, walk

Sample k of seed s is the same picture whatever is asked for beside it. A file out of a run's generators/ does for RUN.
"""

import argparse
import base64
import collections
import contextlib
import functools
import hashlib
import http.server
import io
import ipaddress
import itertools
import json
import math
import os
import re
import signal
import socket
import sys
import threading
import time
import urllib.parse
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw

import data
import gan
import runtime

SCRIPTS = ("train_wgan.py", "train_dcgan.py")                # whose networks make pictures from nothing but z
BLOCK = 16                                                   # samples that go through the network together, always
DIRECTIONS, REACH = 10, 6.0                                  # sliders of the web page, and how far each goes


def parse_arguments(argv=None):
    parser = runtime.Parser("generate.py", __doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="a run folder, or a file out of its generators/ (the "
                        "newest run)")
    add = parser.add_argument_group("what to make; a sheet of samples when nothing else is asked for") \
        .add_mutually_exclusive_group().add_argument
    add("--out", default="", metavar="DIR", help="single PNG files in DIR; files that are there are kept, so that the "
        "same command goes on after an interruption")
    add("--nearest", action="store_true", help="beside each sample the training picture with the least mean squared "
        "difference")
    add("--walk", default="", metavar="FILE", help="a looping animation, .gif or .webp: along great circles from "
        "sample to sample, equal angles from frame to frame")
    add("--morph", default="", metavar="A,B", help="a strip from sample A to sample B")
    add("--arithmetic", default="", metavar="A+B-C", help="the picture of a sum of samples' latents, brought to their "
        "mean length (Radford et al. 2015, section 6.3.2)")
    add("--progress", default="", metavar="FILE", help="an animation, .gif, of the samples the run saved on its way")
    add("--compare", default="", metavar="FILE", help="a row for each RUN, all at the same latents")
    add("--project", default="", metavar="PICTURE", help="look for the latent of PICTURE (Bora et al. 2017)")
    add("--serve", nargs="?", type=runtime.number(int, 0, 65536), const=8000, metavar="PORT", help="a web page on this "
        "machine (8000; 0: any free port)")
    add = parser.add_argument_group("which samples").add_argument
    add("--n", type=runtime.number(int, 1, 10**7 + 1), metavar="N", help="how many: samples 0 to N - 1 (64; 8 to walk "
        "through or to compare; 9 pictures of a morph)")
    add("--pick", default="", metavar="K,K,...", help="samples of these numbers instead")
    add("--seed", type=runtime.number(int, 0, 2**32), default=0, help="of the latents (%(default)s)")
    add("--truncation", type=runtime.number(float, 0, 10), default=1.0, metavar="PSI", help="z is multiplied by it: "
        "under 1 less variety and fewer oddities (%(default)s)")
    add = parser.add_argument_group("how").add_argument
    add("--sheet", default="", metavar="FILE", help="what sheets and strips are written to (samples.png, nearest.png, "
        "morph.png, arithmetic.png, project.png)")
    add("--batch", type=runtime.positive, default=64, help="pictures in hand at a time; changes no picture "
        "(%(default)s)")
    add("--frames", type=runtime.positive, default=24, help="of a walk, from one sample to the next (%(default)s)")
    add("--restarts", type=runtime.positive, default=8, help="latents that --project begins with; the best result is "
        "kept (%(default)s)")
    add("--iterations", type=runtime.positive, default=300, help="Adam's steps for each of them (%(default)s)")
    add("--data", default="", help="where the training pictures are now, for --nearest and --project (where the run "
        "found them)")
    add("--host", default="127.0.0.1", help="address that --serve listens at (%(default)s: this machine alone)")
    add("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu (%(default)s)")
    argv = list(sys.argv[1:] if argv is None else argv)
    for k, word in enumerate(argv):                          # `--serve runs/x`: the run is no port
        if word == "--serve" and not "".join(argv[k + 1:k + 2]).lstrip("-").isdigit():
            argv[k] = "--serve=8000"
    args = parser.parse_args(argv)
    for reason in contradictions(args):
        parser.error(reason)
    return args


def contradictions(args):
    """Why these flags do not go together, a sentence each."""
    if args.compare and len(args.runs) < 2:
        yield "--compare sets runs side by side: name two or more, as in generate.py runs/a runs/b --compare both.png"
    if len(args.runs) > 1 and not args.compare:
        yield f"{len(args.runs)} runs are named, and only --compare FILE takes more than one"
    made = [flag for flag in ("out", "walk", "progress", "compare", "serve") if getattr(args, flag) not in ("", None)]
    if args.sheet and made:
        yield f"--sheet names the file of a sheet or a strip, and --{made[0]} makes none"
    if args.pick and args.morph:
        yield "--pick and --morph both say which samples: give one of them"
    if args.n and args.pick:
        yield "--n and --pick both say which samples: give one of them"
    for flag, suffixes in (("walk", (".gif", ".webp")), ("progress", (".gif",)), ("compare", None), ("sheet", None)):
        name, known = getattr(args, flag), suffixes or [
            suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.SAVE]
        if name and Path(name).suffix.lower() not in known:
            yield f"--{flag} {name}: give a file name that ends in {' or '.join(suffixes or ['.png'])}"
    if args.host != "127.0.0.1" and args.serve is None:
        yield "--host is the address of --serve: give --serve as well"


def numbers_of(args, default):
    """The sample numbers that --pick or --n name."""
    if not args.pick:
        return range(args.n or default)
    if not re.fullmatch(r"\d{1,9}(,\d{1,9})*", args.pick):
        raise ValueError(f"--pick {args.pick}: write sample numbers with commas between them, as in 3,17,40")
    return [int(word) for word in args.pick.split(",")]


def refuse_more(count, most, what, instead="or single files by --out DIR"):
    if count > most:                                         # said before any is made: all are in memory at once
        raise ValueError(f"{what.format(count)} could not be looked at: up to {most}, {instead}")


# ---------------------------------------------------------------------------------------------------------------------
# The network
# ---------------------------------------------------------------------------------------------------------------------

class Source(NamedTuple):
    """A trained generator and where it comes from."""
    G: gan.Generator
    path: Path                                               # what was named
    folder: Path | None                                      # its run, if it lies in one
    flags: argparse.Namespace | None                         # the run's
    step: int | None


def open_source(path, device):
    """A run folder or a file of a generator ("": the newest run) -> `Source`. ValueError or OSError, one sentence."""
    path = Path(path) if path else runtime.find_run("", SCRIPTS)
    folder = path if path.is_dir() else next((f for f in path.parents[:2] if (f / "checkpoint.pt").exists()), None)
    saved = runtime.read_checkpoint(folder) if folder else {}
    script, steps = saved.get("script", SCRIPTS[0]), re.findall(r"^step-(\d+)$", path.stem)
    G = gan.load_generator(path, device) if script in SCRIPTS else None
    if not isinstance(G, gan.Generator):
        raise ValueError(f"{path} holds a network that makes pictures from pictures, not from noise: use python "
                         f"complete.py {folder or path}")
    flags = argparse.Namespace(**saved["flags"]) if saved else None
    step = int(steps[0]) if steps else saved.get("step") if path.is_dir() or path.stem == "checkpoint" else None
    return Source(G.to(memory_format=torch.channels_last), path, folder, flags, step)


def described(source):
    return f"{source.path}" + ("" if source.step is None else f", step {source.step}")


def folded(G):
    """G for drawing only: each BatchNorm multiplied into the convolution before it. The same function up to rounding.

    In eval mode BatchNorm is gain * x + shift with fixed numbers, and so the pass over the pictures can be saved.
    """
    fold = torch.nn.utils.fusion.fuse_conv_bn_eval
    G, plain = gan.Generator(**G.config).eval().requires_grad_(False).to(next(G.parameters()).device), G
    G.load_state_dict(plain.state_dict())
    for level in G.levels:
        if isinstance(level[0], torch.nn.ConvTranspose2d):
            level[0] = fold(level[0], level[1], transpose=True)
        else:
            level[0][1] = fold(level[0][1], level[1])
        level[1], level[2] = torch.nn.Identity(), torch.nn.ReLU(inplace=True)
    return G.to(memory_format=torch.channels_last)


def latents(seed, numbers, length, psi=1.0):
    """z of samples `numbers` of a seed, (n, length) ~ N(0, psi^2): each a function of (seed, its number) alone.

    NumPy's RandomState, whose stream is promised never to change, seeded by the pair: its key array mixes all bits of
    both. (torch's CPU generator keeps 32 bits of a seed, so that some among 100,000 samples would be twins.)
    psi is the truncation. Deviation from Brock et al. 2018, section 3.1, who draw anew each entry that lies beyond a
    threshold: all of z is shrunk, which leaves its direction, and so which picture it is, alone.
    """
    drawn = [np.random.RandomState([seed, k]).standard_normal(length) for k in numbers]
    return torch.from_numpy(np.array(drawn, np.float32).reshape(len(drawn), length)) * psi


@torch.inference_mode()
def draw(G, z):
    """G(z) as uint8 (n, C, H, W) on the CPU. z in any number; the network sees at most BLOCK rows at a time."""
    z = z.to(next(G.parameters()).device)
    return torch.cat([data.to_uint8(G(rows)) for rows in z.split(BLOCK)]).cpu()


def samples(G, seed, numbers, psi=1.0, batch=64):
    """Yields (numbers, uint8 (n, C, H, W)) with each of `numbers` once, ascending, about `batch` at a time.

    Which kernel a convolution takes, and so the last bits of its result, depends on how many pictures it is given.
    Sample k is therefore always row k mod BLOCK of block k // BLOCK, and blocks are always computed whole.
    """
    wanted, together = set(numbers), max(1, batch // BLOCK)
    blocks = sorted({k // BLOCK for k in wanted})
    for first in range(0, len(blocks), together):
        every = [b * BLOCK + row for b in blocks[first:first + together] for row in range(BLOCK)]
        rows = [row for row, k in enumerate(every) if k in wanted]
        yield [every[row] for row in rows], draw(G, latents(seed, every, G.config["latent"], psi))[rows]


def sample(G, seed, numbers, psi=1.0, batch=64):
    """Those samples in the order of `numbers`: uint8 (n, C, H, W)."""
    made = {k: pixels for ks, block in samples(G, seed, numbers, psi, batch) for k, pixels in zip(ks, block)}
    return torch.stack([made[k] for k in numbers])


# ---------------------------------------------------------------------------------------------------------------------
# Sheets and files
# ---------------------------------------------------------------------------------------------------------------------

def picture(pixels, scale=1):
    """uint8 (C, H, W) -> a PIL picture, L or RGB, each pixel a square of scale x scale."""
    im = Image.fromarray(pixels.permute(1, 2, 0).squeeze(2).numpy())
    return im.resize((im.width * scale, im.height * scale), Image.Resampling.NEAREST) if scale > 1 else im


def captioned(rows, side=128, pad=8):
    """A sheet on white: rows of (heading, uint8 pictures (n, C, H, W), a caption under each or None)."""
    small, rows = data.font(13), [(heading, [picture(x, max(1, side // max(x.shape[1:]))) for x in pixels], captions)
                                  for heading, pixels, captions in rows]
    heights = [pad + 20 * bool(heading) + max(im.height for im in ims) + 20 * bool(captions)
               for heading, ims, captions in rows]
    width = max(pad + max(sum(im.width + pad for im in ims), math.ceil(small.getlength(heading)) + pad)
                for heading, ims, _ in rows)
    sheet = Image.new("RGB", (width, sum(heights) + pad), "white")
    pen, top = ImageDraw.Draw(sheet), 0
    for (heading, ims, captions), height in zip(rows, heights):
        left, upper = pad, top + pad + 20 * bool(heading)
        pen.text((pad, top + pad), heading, "black", small)
        for im, caption in itertools.zip_longest(ims, captions or ()):
            sheet.paste(im, (left, upper))
            pen.text((left + im.width / 2, upper + im.height + 3), caption or "", "black", small, anchor="ma")
            left += im.width + pad
        top += height
    return sheet


def save_sheet(args, source, path):
    numbers = numbers_of(args, 64)
    refuse_more(len(numbers), 1024, "a sheet of {} samples")
    pixels = sample(folded(source.G), args.seed, numbers, args.truncation, args.batch)
    columns = max(8, math.isqrt(len(numbers)))
    runtime.write(path, lambda path: data.save_grid(path, data.to_float(pixels), columns))
    runtime.say(f"{path}: {len(numbers)} samples of {described(source)}, seed {args.seed}"
                + ("" if args.pick else f"; number 0 is at the top left, {len(numbers) - 1} the last"))


def fingerprint(G):
    """A number that another network would hardly share."""
    check = zlib.crc32(repr(sorted(G.config.items())).encode())
    for w in G.state_dict().values():
        check = zlib.crc32(w.detach().cpu().contiguous().numpy().tobytes(), check)
    return check


def save_files(args, source):
    """DIR/seed0-000012.png and so on, encoded by all cores while the network goes on; what is there stays."""
    folder, numbers = Path(args.out), numbers_of(args, 64)
    folder.mkdir(parents=True, exist_ok=True)
    about, here = folder / "generate.json", {"generator": fingerprint(source.G), "truncation": args.truncation}
    names = {path.name for path in folder.iterdir()}
    if about.exists():
        try:
            before = json.loads(about.read_text("utf-8"))
        except ValueError:
            before = {}
        if before != here:
            raise ValueError(f"--out {folder} holds pictures of another generator or --truncation: give another folder")
    elif names:
        raise ValueError(f"--out {folder} holds files that are not ours: give a new folder")
    runtime.write(about, lambda path: path.write_text(json.dumps(here), "utf-8"))

    def name(k):
        return f"seed{args.seed}-{k:06d}.png"

    def save(k, pixels):
        unfinished = folder / (name(k) + ".part")            # no suffix of a picture: nobody reads it by mistake
        picture(pixels).save(unfinished, "PNG", compress_level=3)
        unfinished.replace(folder / name(k))

    missing = [k for k in dict.fromkeys(numbers) if name(k) not in names]
    kept, began, done, shown = len(set(numbers)) - len(missing), time.perf_counter(), 0, 0.0
    pool, waiting = ThreadPoolExecutor(torch.get_num_threads() + 1), collections.deque()
    try:
        for ks, block in samples(folded(source.G), args.seed, missing, args.truncation, args.batch):
            waiting += [pool.submit(save, k, pixels) for k, pixels in zip(ks, block)]
            while len(waiting) > (args.batch if done + len(waiting) < len(missing) else 0):
                waiting.popleft().result()
                done += 1
            if sys.stdout.isatty() and time.perf_counter() - shown > 0.5:
                shown = time.perf_counter()
                runtime.say(f"\r{done} of {len(missing)}\033[K", end="")
    except KeyboardInterrupt:
        runtime.say(f"\n{folder}: stopped after {done} of {len(missing)} pictures; the same command goes on")
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    took = time.perf_counter() - began
    runtime.say("\r\033[K" * sys.stdout.isatty() + f"{folder}: {len(missing)} pictures of {described(source)}, seed "
                f"{args.seed}, in {runtime.clock(took)} ({len(missing) / took:.0f} a second)"
                + (f"; {kept} were there" if kept else ""))


def nearest(images, x, mirrored=False, block=256):
    """For each of uint8 x (n, C, H, W) the row of uint8 `images` with the least mean squared difference.

    -> rows (n,), whether it is the mirrored row (n,; only if `mirrored` allows it), root mean squared difference in
    grey levels (n,).
    """
    a = x.flatten(1).float() - 127.5
    best, row, turned = torch.full((len(x),), math.inf), torch.zeros(len(x), dtype=torch.long), torch.zeros(len(x)) > 0
    for first in range(0, len(images), block):
        part = torch.from_numpy(np.asarray(images[np.arange(first, min(first + block, len(images)))]))
        for flip in (False, True) if mirrored else (False,):
            b = (part.flip(3) if flip else part).flatten(1).float() - 127.5
            square = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T             # (n, block)
            least, k = square.min(1)
            row, turned = torch.where(least < best, first + k, row), torch.where(least < best, flip, turned)
            best = torch.minimum(best, least)
    return row, turned, (best.clamp_min(0) / a.shape[1]).sqrt()


def training_pictures(args, source, flag):
    """`data.Pictures` that the run was trained on."""
    if source.flags is None:
        raise ValueError(f"{flag} needs the run that {source.path} belongs to, for its pictures and how they were cut: "
                         f"name the run folder")
    flags = argparse.Namespace(**{**vars(source.flags), "data": args.data or source.flags.data})
    pictures = data.load_flags(flags, "train")
    shape = (source.G.config["channels"], *source.G.config["size"])
    if pictures.images.shape[1:] != shape:
        raise ValueError(f"the pictures in {flags.data} come out as {pictures.images.shape[1:]} and the generator's "
                         f"are {shape}: give the ones that it was trained on by --data")
    return pictures


def save_nearest(args, source, path):
    numbers = numbers_of(args, 32)
    refuse_more(len(numbers), 1024, "a sheet of {} samples")
    pictures = training_pictures(args, source, "--nearest")
    x = sample(folded(source.G), args.seed, numbers, args.truncation, args.batch)
    rows, turned, rms = nearest(pictures.images, x, source.flags.flip)
    found = torch.from_numpy(np.asarray(pictures.images[rows.numpy()]))
    found = torch.where(turned[:, None, None, None], found.flip(3), found)
    pairs = torch.stack([x, found], 1).flatten(0, 1)
    runtime.write(path, lambda path: data.save_grid(path, data.to_float(pairs)))
    runtime.say(f"{path}: {len(numbers)} pairs, the sample on the left, on the right the most similar of "
                f"{len(pictures.images)} training pictures; the closest, by the root mean square of their difference:")
    for k in rms.argsort()[:5].tolist():
        runtime.say(f"    sample {numbers[k]}: {pictures.names[rows[k]]}{', mirrored' * bool(turned[k])}, "
                    f"{rms[k]:.1f} of 255 grey levels")


# ---------------------------------------------------------------------------------------------------------------------
# Walks and sums
# ---------------------------------------------------------------------------------------------------------------------

def great_circles(points, frames):
    """A closed walk through `points` (n, d): `frames` latents, the same angle from each to the next. (frames, d).

    Along great circles from point to point and back to the first; frame j stands at j / frames of the whole angle, the
    first on the first point. (Two frames on either side of a corner are nearer to one another than the angle.)
    """
    ends = points.roll(-1, 0)
    u, v = (torch.nn.functional.normalize(p.double(), dim=1) for p in (points, ends))
    angles = 2 * torch.atan2((u - v).norm(dim=1), (u + v).norm(dim=1))
    begins = torch.cat([angles.new_zeros(1), angles.cumsum(0)])
    at = torch.arange(frames, dtype=torch.float64) / frames * begins[-1]
    leg = (torch.searchsorted(begins, at, right=True) - 1).clamp(0, len(points) - 1)
    t = (at - begins[leg]) / angles[leg].clamp_min(1e-12)
    return gan.slerp(points[leg], ends[leg], t[:, None])


def animate(file, pixels, kind="GIF", milliseconds=50):
    """A looping animation of uint8 (n, C, H, W), small pictures enlarged to about 256 pixels."""
    frames = [picture(x, max(1, 256 // max(x.shape[1:]))) for x in pixels]
    if kind == "GIF":                                        # its palettes have 256 colours: chosen for each frame
        frames = [im if im.mode == "L" else im.quantize(256, Image.Quantize.MEDIANCUT) for im in frames]
    more = dict(lossless=True, method=2) if kind == "WEBP" else dict(disposal=1)
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], loop=0, duration=milliseconds, **more)


def save_walk(args, source):
    numbers = numbers_of(args, 8)
    if len(set(numbers)) < 2:
        raise ValueError("--walk goes from sample to sample: it needs at least two, by --n or --pick")
    path, frames = Path(args.walk), args.frames * len(numbers)
    refuse_more(frames, 4800, "a walk of {} frames", "so give a smaller --n or --frames")    # four minutes
    z = latents(args.seed, numbers, source.G.config["latent"], args.truncation)
    pixels = draw(folded(source.G), great_circles(z, frames))
    runtime.write(path, lambda file: animate(file, pixels, path.suffix[1:].upper()))
    runtime.say(f"{path}: {frames} frames through samples {', '.join(map(str, numbers))} of {described(source)}")


def save_morph(args, source, path):
    if not re.fullmatch(r"\d{1,9},\d{1,9}", args.morph):
        raise ValueError(f"--morph {args.morph}: write two sample numbers, as in 3,17")
    refuse_more(args.n or 9, 1024, "a strip of {} pictures", "so give a smaller --n")
    ends = [int(word) for word in args.morph.split(",")]
    a, b = latents(args.seed, ends, source.G.config["latent"], args.truncation)
    pixels = draw(folded(source.G), gan.slerp(a, b, torch.linspace(0, 1, args.n or 9, dtype=torch.float64)[:, None]))
    captions = [str(ends[0])] + [""] * (len(pixels) - 2) + [str(ends[1])] * (len(pixels) > 1)
    runtime.write(path, captioned([("", pixels, captions)]).save)
    runtime.say(f"{path}: from sample {ends[0]} to sample {ends[1]} of {described(source)}, {len(pixels)} pictures")


def latent_sum(z, signs):
    """sum_i s_i z_i, (n, d) and signs (n,) -> (d,), brought to the mean length of the z_i.

    Radford et al. 2015, section 6.3.2. Deviation: the length. A sum of three has sqrt(3) times the length of any z that
    the network was trained with, and lies where it has never been.
    """
    total = (torch.as_tensor(signs, dtype=z.dtype)[:, None] * z).sum(0)
    return total / total.norm().clamp_min(1e-12) * z.norm(dim=1).mean()


def save_arithmetic(args, source, path):
    text = args.arithmetic.replace(" ", "")
    if not re.fullmatch(r"[+-]?\d{1,9}([+-]\d{1,9})+", text):
        raise ValueError(f"--arithmetic {args.arithmetic}: write sample numbers with + and - between them, as in "
                         f"12+40-7")
    terms = [(-1.0 if sign == "-" else 1.0, int(number)) for sign, number in re.findall(r"([+-]?)(\d+)", text)]
    z = latents(args.seed, [k for _, k in terms], source.G.config["latent"], args.truncation)
    total = latent_sum(z, [sign for sign, _ in terms])
    if total.norm() < 0.5 * z.norm(dim=1).mean():
        raise ValueError(f"--arithmetic {args.arithmetic} leaves nothing: the samples cancel one another")
    captions = [("" if sign > 0 and k == 0 else "+ " if sign > 0 else "- ") + str(number)
                for k, (sign, number) in enumerate(terms)]
    pixels = draw(folded(source.G), torch.cat([z, total[None]]))
    runtime.write(path, captioned([("", pixels, [*captions, "="])]).save)
    runtime.say(f"{path}: {' '.join(captions)}, samples of {described(source)}")


# ---------------------------------------------------------------------------------------------------------------------
# Progress, comparison, projection
# ---------------------------------------------------------------------------------------------------------------------

def save_progress(args, source):
    folder = source.folder
    if folder is None or not list((folder / "samples").glob("step-*.png")):
        raise ValueError(f"{source.path} has no samples/step-*.png to show: name a run folder")
    runtime.write(args.progress, lambda path: data.save_gif(path, folder / "samples"))
    runtime.say(f"{args.progress}: the samples that {folder} saved on its way")


def save_comparison(args, device):
    rows, numbers = [], numbers_of(args, 8)
    refuse_more(len(numbers), 1024, "a row of {} samples", "so give a smaller --n")
    for run in args.runs:
        source = open_source(run, device)
        pixels = sample(folded(source.G), args.seed, numbers, args.truncation, args.batch)
        rows.append((described(source), pixels, None))
    runtime.write(args.compare, captioned(rows).save)
    runtime.say(f"{args.compare}: {len(numbers)} latents through each of {len(rows)} networks"
                + ("" if len({tuple(x.shape[1:]) for _, x, _ in rows}) == 1 else ", whose pictures differ in size"))


def project(G, x, restarts=8, iterations=300, lam=1e-3, lr=0.1, seed=0):
    """The z whose picture is most like x (C, H, W) in [-1, 1], of several begun at samples 0, 1, ...: (z, squares).

    z* = argmin ||G(z) - x||^2 + lam ||z||^2, by Adam. Bora et al. 2017 with A the identity, and their lam for
    DCGAN; its second term is the prior N(0, 1). Deviation: the learning rate falls to 0 along half a cosine. -> every
    restart's z (restarts, latent) and mean squared difference (restarts,), the best first.
    """
    z = latents(seed, range(restarts), G.config["latent"]).to(x.device).requires_grad_(True)
    opt = torch.optim.Adam([z], lr=lr, betas=(0.9, 0.999))
    for step in range(iterations):
        opt.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / iterations)) / 2
        square = torch.cat([(G(rows) - x).square().sum((1, 2, 3)) for rows in z.split(BLOCK)])
        loss = (square + lam * z.square().sum(1)).sum()                               # each row for itself
        z.grad, = torch.autograd.grad(loss, [z])
        opt.step()
        if sys.stdout.isatty() and step % 10 == 0:
            runtime.say(f"\r{step} of {iterations} steps, mean square {square.min() / x.numel():.4f}\033[K", end="")
    with torch.no_grad():
        squares = torch.cat([(G(rows) - x).square().mean((1, 2, 3)) for rows in z.split(BLOCK)])
    order = squares.argsort()
    return z.detach()[order], squares[order]


def given_picture(args, source):
    """The picture of --project as training would see it: float (C, H, W) in [-1, 1]."""
    size, channels = source.G.config["size"], str(source.G.config["channels"])
    flags, names = source.flags, ("fit", "crop", "background", "range", "keep_truncated", "denoise")
    recipe = data.Recipe(tuple(size), channels=channels, **{name: getattr(flags, name) for name in names if flags})
    if recipe.crop.startswith("auto"):                       # what it chose depends on all of the run's pictures
        items = data.find_items(args.data or flags.data, getattr(flags, "classes", ""), flags.range)
        recipe, _ = data.settled(recipe, items[:flags.limit or None])
    decoded = data.decode(recipe, data.Item(args.project, (), functools.partial(data.read_bytes, args.project)))
    if decoded.pixels is None:
        raise ValueError(f"--project {args.project}: {decoded.why}")
    pixels = torch.from_numpy(np.atleast_3d(decoded.pixels).copy()).permute(2, 0, 1)
    return data.to_float(pixels)


def save_projection(args, source, path):
    x = given_picture(args, source).to(next(source.G.parameters()).device)
    began = time.perf_counter()
    G = folded(source.G)
    z, squares = project(G, x, args.restarts, args.iterations, seed=args.seed)
    psnr = -10 * torch.log10(squares.clamp_min(1e-12) / 4)   # of pictures that span 2, from -1 to 1
    pixels = torch.cat([data.to_uint8(x)[None].cpu(), draw(G, z[:1])])
    runtime.write(path, captioned([("", pixels, ["given", f"found, {psnr[0]:.1f} dB"])], side=256).save)
    others = f"; the other restarts {psnr[-1]:.1f} to {psnr[1]:.1f} dB" if len(psnr) > 1 else ""
    took = runtime.clock(time.perf_counter() - began)
    runtime.say("\r\033[K" * sys.stdout.isatty() + f"{path}: {args.project} and the nearest found that "
                f"{described(source)} draws, PSNR {psnr[0]:.2f} dB{others}; {took}")


# ---------------------------------------------------------------------------------------------------------------------
# The web page
# ---------------------------------------------------------------------------------------------------------------------

class Mistake(Exception):
    """A request that is answered by a status of 4xx and a sentence."""

    def __init__(self, status, sentence):
        super().__init__(sentence)
        self.status = status


def offsets(text):
    """"0.5,-1" -> how far to go along each principal direction."""
    words = text.split(",") if text else []
    if len(words) > DIRECTIONS:
        raise ValueError
    return [runtime.number(float, -REACH, REACH + 1e-6)(word) for word in words]


offsets.__name__ = f"list of at most {DIRECTIONS} numbers from {-REACH:g} to {REACH:g}"
SEED, NUMBER = runtime.number(int, 0, 2**32), runtime.number(int, 0, 10**6)
PSI, T = runtime.number(float, 0, 2.001), runtime.number(float, 0, 1.001)
POINT = {"seed": SEED, "k": NUMBER, "psi": PSI}              # which sample
END, MOVE = {"to_seed": SEED, "to": NUMBER}, {"d": offsets}  # ... and where from there
ROUTES = {                                                   # path: (parameters it needs, those it may have)
    "/": ({}, {}), "/info": ({}, {}), "/log": ({}, {}), "/history": ({}, {}), "/sheet": ({"i": NUMBER}, {}),
    "/samples": ({"seed": SEED, "psi": PSI}, {}), "/picture": (POINT, {**MOVE, **END, "t": T}),
    "/walk": ({**POINT, **END}, MOVE), "/walk.gif": ({**POINT, **END}, MOVE)}


class Gallery:
    """What the page asks for. `answer` may be called by any thread: one thread alone works the network.

    Nothing of a request ever becomes a part of a path: pictures of the run are asked for by their place in a listing.
    """

    def __init__(self, source):
        self.source, self.G, config = source, folded(source.G), source.G.config
        self.size, self.length = tuple(config["size"]), config["latent"]
        self.directions, shares = gan.principal_directions(source.G)
        self.directions, self.shares = self.directions[:DIRECTIONS].cpu(), shares[:DIRECTIONS].tolist()
        side, pixels = max(self.size), math.prod(self.size)
        self.n = 2 * BLOCK if side <= 128 else BLOCK                                  # samples on the page
        self.shrink = -(-side // 256)                                                 # for the grid alone
        self.frames = min(48, max(12, 2**21 // pixels))                               # of a walk
        self.worker = ThreadPoolExecutor(1)                  # one at a time; and torch's threads belong to one caller
        self.room = threading.Semaphore(256)                 # for so many that wait
        self.block = functools.lru_cache(max(4, 2**26 // (BLOCK * 3 * pixels)))(self._block)

    def answer(self, path, given):
        """(content type, bytes). Raises `Mistake`."""
        if path not in ROUTES:
            raise Mistake(404, "there is no such page")
        return getattr(self, "get_" + (path[1:].replace(".", "_") or "page"))(**arguments(path, given))

    def run(self, function, *args, **more):
        """function(*args, **more) by the one thread that works the network; 503 when too many wait for it already."""
        if not self.room.acquire(blocking=False):
            raise Mistake(503, "too many requests at a time: try again")
        try:
            return self.worker.submit(function, *args, **more).result()
        finally:
            self.room.release()

    # ---- pictures; only the worker calls what begins with an underscore

    def _block(self, seed, b, psi):
        return draw(self.G, latents(seed, range(b * BLOCK, (b + 1) * BLOCK), self.length, psi))

    def _sample(self, seed, k, psi):
        return self.block(seed, k // BLOCK, psi)[k % BLOCK]

    def _start(self, seed, k, psi, d):
        z = latents(seed, [k], self.length, psi)
        if len(d) > len(self.directions):
            raise Mistake(400, f"d has {len(d)} numbers, and there are {len(self.directions)} directions")
        return z + torch.tensor(d) @ self.directions[:len(d)] if any(d) else z

    def _picture(self, seed, k, psi, d=(), to_seed=None, to=None, t=0.0):
        if not any(d) and (t == 0 or to is None):
            return self._sample(seed, k, psi)                # the very picture of the sheet, and of --out
        z = self._start(seed, k, psi, d)
        if to is not None:
            z = gan.slerp(z, latents(to_seed, [to], self.length, psi), t)
        return draw(self.G, z)[0]

    def _walk(self, t, seed, k, psi, to_seed, to, d=()):
        return draw(self.G, gan.slerp(self._start(seed, k, psi, d), latents(to_seed, [to], self.length, psi), t))

    def _animation(self, t, **point):
        file = io.BytesIO()
        animate(file, self._walk(t, **point), milliseconds=2400 // self.frames)
        return file.getvalue()

    # ---- answers

    def get_page(self):
        return "text/html; charset=utf-8", PAGE.encode()

    def get_info(self):
        flags = self.source.flags
        source = Path(flags.data).resolve().name if flags and flags.data != "demo" else "demo" if flags else ""
        height, width = self.size
        name = (self.source.folder or self.source.path.with_suffix("")).resolve().name
        return as_json(dict(name=name, step=self.source.step, data=source, height=height, width=width, n=self.n,
                            length=self.length, shares=self.shares, reach=REACH, frames=self.frames,
                            run=self.source.folder is not None))

    def get_samples(self, seed, psi):
        pixels = torch.cat([self.run(self.block, seed, b, psi) for b in range(self.n // BLOCK)])
        ims = [picture(x).reduce(self.shrink) for x in pixels]
        return as_png(tiled(ims, 8))

    def get_picture(self, **point):
        if point.keys() & {*END, "t"} and not END.keys() <= point.keys():
            raise Mistake(400, "the end of a walk is named by to_seed and to")
        return as_png(picture(self.run(self._picture, **point)))

    def get_walk(self, **point):
        t = torch.linspace(0, 1, self.frames, dtype=torch.float64)[:, None]
        pixels = self.run(self._walk, t, **point)
        return as_png(tiled([picture(x).reduce(-(-max(self.size) // 512)) for x in pixels], 8))

    def get_walk_gif(self, **point):
        angles = torch.linspace(0, 2 * math.pi, self.frames + 1, dtype=torch.float64)[:-1, None]
        t = (1 - angles.cos()) / 2                                                    # there and back
        return "image/gif", self.run(self._animation, t, **point)

    def get_log(self):
        rows = [{name: v for name, v in row.items() if isinstance(v, (int, float)) and math.isfinite(v)}
                for row in (runtime.read_log(self.source.folder) if self.source.folder else [])]
        rows = [row for row in rows if "step" in row]
        # Some 1,500 points a curve, its last among them; FID and its like stand in few rows, which must not be lost.
        columns = ([k for k, row in enumerate(rows) if name in row] for name in set().union(*rows))
        kept = {k for column in columns for k in column[::-1][::-(-len(column) // 1500)]}
        return as_json([rows[k] for k in sorted(kept)])

    def _sheets(self):
        paths = (self.source.folder / "samples").glob("step-*.png") if self.source.folder else ()
        return sorted(path for path in paths if path.stem[5:].isdigit())

    def get_history(self):
        return as_json([int(path.stem[5:]) for path in self._sheets()])

    def get_sheet(self, i):
        sheets = self._sheets()
        if i >= len(sheets):
            raise Mistake(404, f"there are {len(sheets)} sheets of samples, counted from 0")
        return "image/png", sheets[i].read_bytes()


def arguments(path, given):
    """The query string of a request -> checked arguments. Raises `Mistake` for anything missing, unknown or wrong."""
    needed, allowed = ROUTES[path]
    kinds, found = {**needed, **allowed}, {}
    try:
        pairs = urllib.parse.parse_qsl(given, keep_blank_values=True, strict_parsing=bool(given), max_num_fields=16,
                                       errors="strict")
    except ValueError:
        raise Mistake(400, "the part after the question mark cannot be read") from None
    for name, text in pairs:
        if name not in kinds or name in found:
            raise Mistake(400, f"{name[:40]!r} is not wanted here" if name not in kinds else f"{name} is given twice")
        try:
            found[name] = kinds[name](text)
        except ValueError:
            raise Mistake(400, f"{name} has to be a {kinds[name].__name__}") from None
    for name in needed:
        if name not in found:
            raise Mistake(400, f"{name} is missing")
    return found


def as_json(value):
    return "application/json", json.dumps(value, allow_nan=False).encode()


def as_png(im):
    file = io.BytesIO()
    im.save(file, "PNG", compress_level=1)
    return "image/png", file.getvalue()


def tiled(ims, columns):
    """PIL pictures of one size side by side, row by row, no pixel between them."""
    width, height = ims[0].size
    sheet = Image.new(ims[0].mode, (width * min(columns, len(ims)), height * -(-len(ims) // columns)))
    for k, im in enumerate(ims):
        sheet.paste(im, (k % columns * width, k // columns * height))
    return sheet


def trusted(host, bound):
    """Whether a Host header names this machine by an address, as localhost, by its own name or by `bound`.

    A page elsewhere may let its own name lead to 127.0.0.1 and so read what is served here (DNS rebinding); such a
    name it cannot do without. The port may be another one, that of a tunnel.
    """
    name = re.sub(r":\d*$", "", host.strip().lower()) if host.count(":") < 2 or "]" in host else host
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(name.strip("[]")))
    return name in ("localhost", bound.lower(), socket.gethostname().lower())


class Handler(http.server.BaseHTTPRequestHandler):
    """GET of what is in ROUTES; everything else is refused by a sentence."""
    protocol_version, server_version, sys_version, timeout = "HTTP/1.1", "generate.py", "", 60
    disable_nagle_algorithm = True

    def __getattr__(self, name):
        if name.startswith("do_"):                           # every method but GET
            return lambda: self.refuse(405, "only GET is answered here")
        raise AttributeError(name)

    def do_GET(self):
        try:
            if len(self.path) > 2000:
                raise Mistake(414, "this address is too long")
            if not trusted(self.headers.get("Host", ""), self.server.bound):
                raise Mistake(421, "this name is not served here: use http://localhost or the machine's IP address")
            path, _, given = self.path.partition("?")
            if self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin") and path != "/":
                raise Mistake(403, "another site's page may not ask for this")
            kind, content = self.server.gallery.answer(path, given)
        except Mistake as mistake:
            return self.refuse(mistake.status, str(mistake))
        except Exception as error:                           # whatever it was, the next request is answered
            if self.server.closed:
                return self.refuse(503, "generate.py has been ended")
            print(f"generate.py: {self.path[:200]}: {type(error).__name__}: {error}", file=sys.stderr)
            return self.refuse(500, f"this went wrong here: {runtime.first_line(error)}")
        self.reply(200, kind, content)

    def reply(self, status, kind, content):
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), "Cache-Control": "no-store",
                            "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
                            "Cross-Origin-Resource-Policy": "same-origin",
                            "Content-Security-Policy": self.server.policy}.items():
            self.send_header(name, value)
        if status == 405:
            self.send_header("Allow", "GET")
        if status != 200:                                    # a body that came along would be read as a request
            self.send_header("Connection", "close")          # closes it, too
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, status, sentence):
        kind, content = as_json({"error": sentence})
        self.reply(status, kind, content)

    def send_error(self, code, message=None, explain=None):  # what the standard library refuses by itself
        self.refuse(code, message or "this request cannot be read")

    def handle(self):
        with contextlib.suppress(ConnectionError, TimeoutError):     # the browser has gone
            super().handle()

    def log_message(self, format, *args):
        pass


class Server(http.server.ThreadingHTTPServer):
    """A thread for each connection; all ask the one gallery."""
    daemon_threads, request_queue_size, allow_reuse_address = True, 128, sys.platform != "win32"

    def __init__(self, source, host="127.0.0.1", port=0):
        if ":" in host:
            self.address_family = socket.AF_INET6
        self.bound = host
        hashes = [f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
                  for tag, text in re.findall(r"<(script|style)>(.*?)</\1>", PAGE, re.S)]
        self.policy = "; ".join(["default-src 'none'", "img-src 'self' data:", "connect-src 'self'", "base-uri 'none'",
                                 "form-action 'none'", "frame-ancestors 'none'", *hashes])
        super().__init__((host, port), Handler)
        self.gallery, self.closed = Gallery(source), False

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    def server_close(self):
        super().server_close()
        if hasattr(self, "gallery"):                         # not when there was no room at the address
            self.closed = True
            self.gallery.worker.shutdown(wait=True, cancel_futures=True)


def serve(source, host, port):
    try:
        server = Server(source, host, port)
    except (OSError, OverflowError) as error:
        raise ValueError(f"--serve cannot listen at {host}, port {port}: {runtime.first_line(error)}; --serve 0 takes "
                         f"any free port") from error
    where = f"[{host}]" if ":" in host else host
    runtime.say(f"{described(source)} at http://{where}:{server.server_address[1]}/ (Ctrl-C ends)"
                + ("" if host in ("127.0.0.1", "::1", "localhost") else "; whoever reaches this machine can look"))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()
        runtime.say("\nended")
        os._exit(0)                                          # threads of open connections may be anywhere just now


PAGE = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>generate</title>
<link rel="icon" href="data:,">
<style>
:root { --ground: #f6f6f4; --panel: #ffffff; --ink: #1c1d20; --pale: #62656d; --line: #d9dadd; --accent: #1559c4;
  --on-accent: #ffffff; --second: #b1490c; --bad: #a8201a; --c0: #1f66c1; --c1: #c2410c; --c2: #2b8049; --c3: #7b4fb5; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #141518; --panel: #1d1f23; --ink: #e9eaec; --pale: #a3a7b0; --line: #383b42; --accent: #79abff;
    --on-accent: #0d1b33; --second: #ffa36b; --bad: #ff8b84; --c0: #79abff; --c1: #ff9d66; --c2: #70cf93;
    --c3: #c09bff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.45 system-ui, sans-serif; }
header, main { max-width: 1180px; margin: 0 auto; padding: 0 20px; }
header { display: flex; flex-wrap: wrap; align-items: baseline; gap: 4px 18px; padding-top: 18px; }
h1 { font-size: 20px; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 15px; margin: 0 0 8px; }
#about { color: var(--pale); margin: 0; flex: 1; min-width: 200px; }
[role=tablist] { display: flex; gap: 4px; }
[role=tab] { border: 0; border-bottom: 3px solid transparent; border-radius: 6px 6px 0 0; background: none; }
[role=tab][aria-selected=true] { border-color: var(--accent); font-weight: 600; }
main { padding-top: 14px; padding-bottom: 40px; }
button, input, a.button { font: inherit; color: inherit; }
button, a.button { display: inline-flex; align-items: center; justify-content: center; min-height: 40px;
  padding: 8px 14px; border: 1px solid var(--line); border-radius: 8px; background: var(--panel); cursor: pointer;
  text-decoration: none; white-space: nowrap; }
button:hover, a.button:hover { border-color: var(--pale); }
button:disabled { opacity: .5; cursor: default; }
button.primary { background: var(--accent); border-color: var(--accent); color: var(--on-accent); font-weight: 600; }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
input[type=number] { width: 8.5em; min-height: 40px; padding: 7px 9px; border: 1px solid var(--line);
  border-radius: 8px; background: var(--panel); }
input[type=range] { accent-color: var(--accent); min-width: 0; height: 30px; margin: 0; }
.bar { display: flex; flex-wrap: wrap; gap: 10px 16px; align-items: center; margin-bottom: 14px; }
.bar label { display: flex; align-items: center; gap: 8px; }
.bar output { width: 2.4em; font-variant-numeric: tabular-nums; }
.split { display: grid; grid-template-columns: minmax(0, 1fr) 360px; gap: 22px; align-items: start; }
.column { display: grid; gap: 14px; }
.panel { background: var(--panel); border: 1px solid var(--line); border-radius: 12px; padding: 16px; }
#grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(82px, 1fr)); gap: 6px; }
#grid button { display: block; position: relative; min-height: 0; padding: 0; border: 0; border-radius: 6px;
  overflow: hidden; background: var(--line); }
#grid canvas, #big, .end canvas { display: block; width: 100%; height: auto; }
#grid button::after { position: absolute; inset: 0; border-radius: 6px; content: ""; pointer-events: none; }
#grid button.a::after { box-shadow: inset 0 0 0 4px var(--accent); }
#grid button.b::after { box-shadow: inset 0 0 0 4px var(--second); }
#grid button.a.b::after { box-shadow: inset 0 0 0 4px var(--accent), inset 0 0 0 8px var(--second); }
#grid button:focus-visible { outline-offset: 1px; z-index: 1; }
.tag { position: absolute; left: 0; top: 0; padding: 0 8px; border-radius: 6px 0 8px 0; font-weight: 700; z-index: 1; }
.tag.a { background: var(--accent); color: var(--on-accent); }
.tag.b { background: var(--second); color: var(--panel); left: auto; right: 0; border-radius: 0 6px 0 8px; }
.hint { color: var(--pale); margin: 10px 0 0; font-size: 14px; }
#stage { border-radius: 8px; overflow: hidden; background: var(--line); }
#editor { position: sticky; top: 12px; }
#caption { margin: 8px 0; min-height: 2.9em; color: var(--pale); }
.row { display: flex; gap: 8px; flex-wrap: wrap; }
.row > * { flex: 1; }
summary { font-weight: 600; cursor: pointer; border-radius: 4px; }
#sliders { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 270px), 1fr)); gap: 0 28px;
  margin-top: 6px; }
#sliders label { display: grid; grid-template-columns: 1.4em 1fr 2.6em; gap: 8px; align-items: center; }
#sliders output { text-align: right; font-variant-numeric: tabular-nums; color: var(--pale); }
.walk { display: grid; grid-template-columns: 52px 1fr 52px; gap: 10px; align-items: center; margin-bottom: 8px; }
.end { position: relative; border-radius: 6px; overflow: hidden; background: var(--line); }
#status { position: fixed; left: 50%; bottom: 16px; transform: translateX(-50%); max-width: 92vw; margin: 0;
  padding: 8px 16px; border-radius: 8px; background: var(--bad); color: var(--ground); z-index: 3; }
#status:empty { display: none; }
#charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr)); gap: 16px; }
#history { grid-row: span 2; }
.chart svg { display: block; width: 100%; height: auto; touch-action: pan-y; }
.chart text { fill: var(--pale); font-size: 12px; }
.chart .lines { stroke: var(--line); }
.chart path, .chart circle { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.chart .cursor { stroke: var(--pale); stroke-dasharray: 3 3; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 0 0 4px; padding: 0; list-style: none;
  font-size: 14px; }
.legend i { display: inline-block; width: 14px; height: 4px; margin-right: 6px; border-radius: 2px;
  vertical-align: middle; }
.legend b { font-weight: 500; font-variant-numeric: tabular-nums; }
.c0 { stroke: var(--c0); background: var(--c0); } .c1 { stroke: var(--c1); background: var(--c1); }
.c2 { stroke: var(--c2); background: var(--c2); } .c3 { stroke: var(--c3); background: var(--c3); }
#sheet { display: block; width: 100%; height: auto; border-radius: 8px; background: var(--line); }
#history .bar { flex-wrap: nowrap; margin: 0 0 10px; }
#history input { flex: 1; }
#step { width: 6.5em; white-space: nowrap; }
[aria-busy=true] { opacity: .45; transition: opacity .3s .4s; }
[hidden] { display: none !important; }
@media (pointer: coarse) { .keys { display: none; } }
@media (max-width: 820px) {
  header, main { padding-left: 12px; padding-right: 12px; }
  .split { grid-template-columns: minmax(0, 1fr); gap: 12px; }
  .split > .column { display: contents; }
  #face, #walk, #moves { order: -2; padding: 12px; }
  #face { order: -3; }
  #moves { order: -1; }
  #face { position: sticky; top: 0; z-index: 2; display: grid; grid-template-columns: 36% 1fr; gap: 12px;
    align-items: center; }
  #face .row { flex-wrap: nowrap; }
  #face .row > * { padding: 8px; }
  #caption { margin-top: 0; font-size: 14px; min-height: 4.35em; }
  #grid { grid-template-columns: repeat(auto-fill, minmax(74px, 1fr)); }
  #new, .bar label:has(#truncation) { flex: 1 0 100%; }
  .bar label, .bar a, #truncation { flex: 1; }
}
</style>
</head>
<body>
<header>
  <h1 id="name">...</h1>
  <p id="about"></p>
  <div role="tablist" aria-label="What to look at">
    <button role="tab" id="tab-pictures" aria-controls="pictures" aria-selected="true">Pictures</button>
    <button role="tab" id="tab-training" aria-controls="training" aria-selected="false" tabindex="-1">Training</button>
  </div>
</header>
<main>
<section id="pictures" role="tabpanel" aria-labelledby="tab-pictures">
  <div class="bar">
    <button id="new" class="primary">New samples</button>
    <label>Seed <input id="seed" type="number" min="0" max="4294967295" step="1" inputmode="numeric"></label>
    <a id="all" class="button" download>Sheet as PNG</a>
    <label title="z is multiplied by it: under 1 less variety and fewer oddities">Truncation
      <input id="truncation" type="range" min="0.2" max="1.4" step="0.05" value="1"><output>1.00</output></label>
  </div>
  <div class="split">
    <div class="column">
      <div>
        <div id="grid" role="group"
          aria-label="Samples. Arrow keys move, Enter picks A, the key B picks the end of the walk"></div>
        <p class="hint"><span id="how">A click picks a picture (A).</span> <span class="keys">Shift and click, or the
          key B, picks where a walk ends (B). Arrow keys move, N makes new samples.</span></p>
      </div>
      <details id="moves" class="panel">
        <summary>Principal directions: move A along what the first layer answers to most</summary>
        <div id="sliders"></div>
      </details>
    </div>
    <div id="editor" class="column">
      <div id="face" class="panel">
        <div id="stage"><canvas id="big" role="img" aria-label="The picked picture"></canvas></div>
        <div>
          <p id="caption" aria-live="polite"></p>
          <div class="row"><a id="save" class="button" download>Save PNG</a>
            <button id="reset" title="All principal directions back to 0">Reset</button></div>
        </div>
      </div>
      <div id="walk" class="panel" role="group" aria-label="Walk from A to B">
        <div class="walk">
          <div class="end"><canvas id="end-a" role="img" aria-label="A"></canvas><span class="tag a">A</span></div>
          <input id="t" type="range" min="0" max="1000" value="0" aria-label="Place on the walk from A to B">
          <div class="end"><canvas id="end-b" role="img" aria-label="B"></canvas><span class="tag b">B</span></div>
        </div>
        <div class="row">
          <button id="play" aria-pressed="false">Play</button>
          <button id="choose" aria-pressed="false">Choose B</button>
          <a id="gif" class="button" download title="The walk from A to B and back as an animation">GIF</a>
        </div>
      </div>
    </div>
  </div>
</section>
<section id="training" role="tabpanel" aria-labelledby="tab-training" hidden>
  <p id="empty" hidden>This file belongs to no run folder, so there are no curves to show.</p>
  <div id="charts">
    <div id="history" class="panel" hidden>
      <h2>The same latents while the network learned</h2>
      <div class="bar">
        <button id="history-play" aria-pressed="false">Play</button>
        <input id="when" type="range" min="0" value="0" aria-label="Sheet of samples">
        <output id="step" for="when"></output>
      </div>
      <img id="sheet" alt="">
    </div>
  </div>
</section>
</main>
<p id="status" role="status"></p>
<script>
"use strict";
const $ = id => document.getElementById(id), clamp = (x, low, high) => Math.min(Math.max(x, low), high);
const make = (name, about) => Object.assign(document.createElement(name), about);
const state = { seed: 0, psi: 1, a: null, b: null, d: [], t: 0, choosing: false };
let info, strip = null, playing = 0, tiles = [];

// ---- asking the server

let quiet;
function say(text) { $("status").textContent = text; clearTimeout(quiet); if (text) quiet = setTimeout(say, 6000, ""); }

async function get(url) {
  let answer;
  try { answer = await fetch(url); } catch { throw Error("No answer: has generate.py been ended?"); }
  if (!answer.ok) throw Error((await answer.json().catch(() => ({}))).error || "The server said " + answer.status);
  return answer;
}

// However often it is called, one request is under way and the last one asked for comes next.
function latest(use, place) {
  let busy = null, next = null;
  async function work() {
    $(place).setAttribute("aria-busy", true);
    while (next !== null) {
      const url = next;
      next = null;
      try {
        await use(await createImageBitmap(await (await get(url)).blob()), url);
        say("");
      } catch (error) { say(error.message); }
    }
    $(place).setAttribute("aria-busy", false);
    busy = null;
  }
  return url => { next = url; busy = busy || work(); return busy; };
}

const moved = () => state.d.some(Boolean);
const point = () => `seed=${state.a.seed}&k=${state.a.k}&psi=${state.psi}` + (moved() ? "&d=" + state.d.join(",") : "");
const end = () => `&to_seed=${state.b.seed}&to=${state.b.k}`;
const pictureURL = () => "/picture?" + point() + (state.t ? end() + "&t=" + state.t : "");
const walkURL = () => "/walk?" + point() + end();

// ---- the grid

const showSamples = latest((bitmap, url) => {
  tiles.forEach((tile, k) => put(tile.firstChild, bitmap, k, info.n));
  tiles.seed = Number(new URL(url, location).searchParams.get("seed"));
  mark();
}, "grid");

// Picture k of the n that a bitmap holds, eight in a row.
function put(canvas, bitmap, k = 0, n = 1, alpha = 1) {
  const w = bitmap.width / Math.min(n, 8), h = bitmap.height / Math.ceil(n / 8), context = canvas.getContext("2d");
  if (canvas.width !== w || canvas.height !== h) { canvas.width = w; canvas.height = h; }
  context.globalAlpha = alpha;
  context.drawImage(bitmap, k % 8 * w, Math.floor(k / 8) * h, w, h, 0, 0, w, h);
}

function mark() {
  tiles.forEach((tile, k) => {
    const is = end => end.seed === tiles.seed && end.k === k, a = is(state.a), b = is(state.b);
    tile.className = (a ? "a " : "") + (b ? "b" : "");
    tile.setAttribute("aria-pressed", a || b);
    tile.setAttribute("aria-label", `Sample ${k}` + (a ? ", picked as A" : "") + (b ? ", end of the walk, B" : ""));
    tile.replaceChildren(tile.firstChild, ...[a && "A", b && "B"].filter(Boolean).map(name =>
      make("span", { className: "tag " + name.toLowerCase(), textContent: name })));
  });
}

function press(id, on, text) {
  $(id).setAttribute("aria-pressed", on);
  $(id).textContent = text;
}

function choosing(on) {
  state.choosing = on;
  press("choose", on, on ? "Click a sample" : "Choose B");
  $("how").textContent = on ? "The next click picks the end of the walk (B)." : "A click picks a picture (A).";
}

function pick(k, asEnd) {
  const isEnd = asEnd || state.choosing;
  state[isEnd ? "b" : "a"] = { seed: tiles.seed ?? state.seed, k };
  if (!isEnd) state.d = state.d.map(() => 0);
  if (!playing) state.t = 0;
  choosing(false);
  mark();
  ends();
  changed();
}

function focusTile(k) {
  tiles.forEach((tile, j) => { tile.tabIndex = j === k ? 0 : -1; });
  tiles[k].focus();
}

function makeGrid() {
  tiles = Array.from({ length: info.n }, (_, k) => {
    const tile = make("button", { tabIndex: k ? -1 : 0 });
    tile.append(make("canvas", { width: info.width, height: info.height }));
    tile.addEventListener("click", event => { focusTile(k); pick(k, event.shiftKey); });
    return tile;
  });
  $("grid").append(...tiles);
  $("grid").addEventListener("keydown", event => {
    const at = tiles.indexOf(document.activeElement);
    const columns = getComputedStyle($("grid")).gridTemplateColumns.split(" ").length;
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, ArrowDown: at + columns, ArrowUp: at - columns,
      Home: 0, End: tiles.length - 1 }[event.key];
    if (at < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
    if (to !== undefined) { event.preventDefault(); if (tiles[to]) focusTile(to); }
    if (event.key.toLowerCase() === "b") pick(at, true);
  });
}

function samples() {
  const url = `/samples?seed=${state.seed}&psi=${state.psi}`;
  $("seed").value = state.seed;
  $("truncation").nextSibling.textContent = state.psi.toFixed(2);
  $("all").href = url;
  $("all").download = `${info.name}-seed${state.seed}.png`;
  remember();
  return showSamples(url);
}

// ---- the picked picture, its sliders, the walk

const showPicture = latest(bitmap => { if (!playing && !frame()) put($("big"), bitmap); }, "stage");
const [showA, showB] = ["end-a", "end-b"].map(id => latest(bitmap => put($(id), bitmap), id));
const loadStrip = latest((bitmap, url) => { strip = { bitmap, url }; frame(); }, "walk");
const stripFits = () => strip?.url === walkURL();

function ends() {
  showA("/picture?" + point());
  showB(`/picture?seed=${state.b.seed}&k=${state.b.k}&psi=${state.psi}`);
}

// A place on the walk lies between two frames of the strip: one is drawn over the other.
function frame() {
  if (!stripFits()) return false;
  const place = state.t * (info.frames - 1), k = Math.min(Math.floor(place), info.frames - 2);
  put($("big"), strip.bitmap, k, info.frames);
  put($("big"), strip.bitmap, k + 1, info.frames, place - k);
  return true;
}

// Where Save PNG and GIF lead; a walk that plays goes on, so that a click asks once more.
function aim() {
  const named = `${info.name}-seed${state.a.seed}-${state.a.k}`;
  const onTheWay = state.t ? `-to${state.b.k}-${Math.round(1000 * state.t)}` : "";
  $("save").href = pictureURL();
  $("save").download = named + (moved() ? "-moved" : "") + onTheWay + ".png";
  $("gif").href = "/walk.gif?" + point() + end();
  $("gif").download = `${named}-to${state.b.k}.gif`;
}

function changed(walking = playing) {
  const from = `Sample ${state.a.k} of seed ${state.a.seed}` + (moved() ? ", moved" : "");
  const to = `sample ${state.b.k}` + (state.b.seed === state.a.seed ? "" : ` of seed ${state.b.seed}`);
  const text = playing ? `${from}, to ${to} and back` : state.t === 0 ? from : state.t === 1 ? "S" + to.slice(1)
    : `${from}, ${Math.round(100 * state.t)} % of the way to ${to}`;
  if ($("caption").textContent !== text) $("caption").textContent = text;
  $("big").setAttribute("aria-label", text);
  aim();
  $("t").value = 1000 * state.t;
  $("t").setAttribute("aria-valuetext", `${Math.round(100 * state.t)} %`);
  $("sliders").querySelectorAll("input").forEach((input, j) => {
    input.value = state.d[j];
    input.parentNode.lastChild.textContent = state.d[j].toFixed(1);
  });
  $("reset").disabled = !moved();
  if (walking && !stripFits()) loadStrip(walkURL());
  if (!frame() && !playing) showPicture(pictureURL());
  if (!playing) remember();
}

function makeSliders() {
  state.d = info.shares.map(() => 0);
  info.shares.forEach((share, j) => {
    const label = make("label"), input = make("input", { type: "range", min: -info.reach, max: info.reach, step: 0.1 });
    input.setAttribute("aria-label", `Direction ${j + 1}`);
    input.addEventListener("input", () => { state.d[j] = Number(input.value); changed(); });
    input.addEventListener("change", ends);
    input.addEventListener("dblclick", () => { state.d[j] = 0; changed(); ends(); });
    label.append(String(j + 1), input, make("output"));
    label.title = `${(100 * share).toFixed(1)} % of the variance of the first layer; a double click sets it to 0`;
    $("sliders").append(label);
  });
}

const SECONDS = 3;                                          // from A to B
function play(on) {
  cancelAnimationFrame(playing);
  playing = 0;
  press("play", on, on ? "Pause" : "Play");
  if (!on) return changed();
  let phase = Math.acos(1 - 2 * state.t), before = null;
  const move = now => {
    playing = requestAnimationFrame(move);
    if (stripFits() && before !== null) phase += Math.PI * Math.min(now - before, 100) / 1000 / SECONDS;
    before = now;
    state.t = (1 - Math.cos(phase)) / 2;
    $("t").value = 1000 * state.t;
    frame();
  };
  playing = requestAnimationFrame(move);
  changed();
}

// ---- the address remembers what is shown

function remember() {
  const hash = `#seed=${state.seed}&psi=${state.psi}&a=${state.a.seed}.${state.a.k}&b=${state.b.seed}.${state.b.k}`;
  clearTimeout(remember.timer);
  remember.timer = setTimeout(() => history.replaceState(null, "", hash), 300);
}

const isSeed = text => /^\d{1,10}$/.test(text ?? "") && Number(text) < 2 ** 32;

function recall() {
  const given = new URLSearchParams(location.hash.slice(1)), psi = Number(given.get("psi") ?? 1);
  if (isSeed(given.get("seed"))) state.seed = Number(given.get("seed"));
  if (psi >= 0.2 && psi <= 1.4) state.psi = psi;
  for (const name of ["a", "b"]) {
    const found = /^(\d{1,10})\.(\d{1,6})$/.exec(given.get(name) ?? "");
    const first = { seed: state.seed, k: name === "b" ? 1 : 0 };
    state[name] = found && isSeed(found[1]) ? { seed: Number(found[1]), k: Number(found[2]) } : first;
  }
}

// ---- training

const GROUPS = [["Estimate of the Wasserstein distance", ["wasserstein"]], ["Losses", ["loss_D", "loss_G"]],
  ["Scores of D before the update", ["D_x", "D_G_z"]], ["Gradient penalty, without lambda", ["penalty"]],
  ["Spread: how far two pictures lie apart", ["spread_fake", "spread_real"]],
  ["FID of the averaged G", ["fid"]], ["KID of the same", ["kid"]],
  ["Pictures per second", ["images_per_sec"]]];
const NS = "http://www.w3.org/2000/svg";
const short = x => x !== 0 && (Math.abs(x) < 0.001 || Math.abs(x) >= 1e5) ? x.toExponential(1)
  : String(Number(x.toPrecision(4)));

function svg(name, attributes, parent, text) {
  const made = document.createElementNS(NS, name);
  for (const key in attributes) made.setAttribute(key, attributes[key]);
  if (text !== undefined) made.textContent = text;
  parent?.append(made);
  return made;
}

function ticks(low, high, about, least = 0) {
  const power = 10 ** Math.floor(Math.log10((high - low) / about)), found = [];
  const apart = Math.max(least, [1, 2, 5, 10].map(k => k * power).find(step => step >= (high - low) / about * 0.999));
  for (let k = Math.ceil(low / apart - 1e-9); k <= high / apart + 1e-9; k++) found.push(k * apart);
  return found;
}

function chart(title, names, rows) {
  const W = innerWidth < 500 ? 340 : 480, H = 230, left = 52, right = W - 18, top = 8, bottom = H - 24;
  const lines = names.map(name => rows.filter(row => name in row).map(row => [row.step, row[name]]));
  const all = lines.flat(), ys = all.map(p => p[1]).sort((a, b) => a - b);
  const quantile = q => ys[Math.round(q * (ys.length - 1))];
  const steps = [...new Set(all.map(p => p[0]))].sort((a, b) => a - b), x0 = steps[0];
  const x1 = Math.max(steps.at(-1), x0 + 1);
  let y0 = quantile(0.005), y1 = quantile(0.995);           // one outlier does not flatten the rest
  const margin = 0.05 * (y1 - y0) || 0.1 * Math.abs(y0) || 1;
  y0 -= margin; y1 += margin;
  const X = x => left + (x - x0) / (x1 - x0) * (right - left);
  const Y = y => clamp(bottom - (y - y0) / (y1 - y0) * (bottom - top), top, bottom);
  const box = make("div", { className: "panel chart" }), legend = make("ul", { className: "legend" });
  const finals = names.map((name, j) => `${name} ${short(lines[j].at(-1)[1])}`).join(", ");
  const picture = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", tabindex: 0,
    "aria-label": `${title}, steps ${x0} to ${x1}; at the end ${finals}. Arrow keys read values` });
  for (const y of ticks(y0, y1, 5)) {
    svg("line", { class: "lines", x1: left, x2: right, y1: Y(y), y2: Y(y) }, picture);
    svg("text", { x: left - 6, y: Y(y) + 4, "text-anchor": "end" }, picture, short(Math.abs(y) < 1e-12 ? 0 : y));
  }
  for (const x of ticks(x0, x1, W / 80, 1)) {
    svg("text", { x: X(x), y: H - 6, "text-anchor": "middle" }, picture, x >= 1e5 ? x / 1000 + "k" : x);
  }
  lines.forEach((line, j) => {
    const d = "M" + line.map(([x, y]) => X(x).toFixed(1) + " " + Y(y).toFixed(1)).join("L");
    if (line.length > 1) svg("path", { class: "c" + j, d }, picture);
    else svg("circle", { class: "c" + j, cx: X(line[0][0]), cy: Y(line[0][1]), r: 3 }, picture);
  });
  const values = names.map((name, j) => {
    const item = make("li"), value = make("b");
    item.append(make("i", { className: "c" + j }), name + " ", value);
    legend.append(item);
    return value;
  });
  const when = make("li"), cursor = svg("line", { class: "cursor", y1: top, y2: bottom }, picture);
  legend.append(when);
  let here = steps.length - 1;
  function read(k) {
    const on = k !== null;
    here = on ? clamp(k, 0, steps.length - 1) : steps.length - 1;
    cursor.setAttribute("visibility", on ? "visible" : "hidden");
    cursor.setAttribute("x1", X(steps[here])); cursor.setAttribute("x2", X(steps[here]));
    lines.forEach((line, j) => {
      const p = line.findLast(p => p[0] <= steps[here]);
      values[j].textContent = p ? short(p[1]) : "";
    });
    when.textContent = on ? "step " + steps[here] : "";
  }
  picture.addEventListener("pointermove", event => {
    const bounds = picture.getBoundingClientRect(), u = (event.clientX - bounds.left) / bounds.width * W;
    const x = x0 + (u - left) / (right - left) * (x1 - x0);
    read(steps.reduce((best, step, k) => Math.abs(step - x) < Math.abs(steps[best] - x) ? k : best, 0));
  });
  for (const away of ["pointerleave", "blur"]) picture.addEventListener(away, () => read(null));
  picture.addEventListener("keydown", event => {
    const by = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (by) { event.preventDefault(); read(here + by); }
  });
  read(null);
  box.append(make("h2", { textContent: title }), legend, picture);
  return box;
}

let known = 0, steps = [], showing = 0;
async function training() {
  if (!info.run) { $("empty").hidden = false; return; }
  try {
    const [rows, found] = await Promise.all([get("/log").then(r => r.json()), get("/history").then(r => r.json())]);
    const focused = document.activeElement?.closest?.(".chart");
    const stamp = rows.at(-1)?.step ?? 0;
    if (stamp !== known && !focused) {
      known = stamp;
      const has = name => rows.some(row => name in row);
      const groups = GROUPS.map(([title, names]) => [title, names.filter(has)]).filter(([, names]) => names.length);
      $("charts").replaceChildren($("history"), ...groups.map(([title, names]) => chart(title, names, rows)));
    }
    $("empty").hidden = rows.length + found.length > 0;
    if (!rows.length) $("empty").textContent = "This run has written no numbers yet.";
    if (found.length !== steps.length) {
      const atEnd = !steps.length || showing === steps.length - 1;
      steps = found;
      $("history").hidden = !steps.length;
      $("when").max = steps.length - 1;
      if (steps.length && atEnd) look(steps.length - 1);
    }
  } catch (error) { say(error.message); }
}

function look(k) {
  showing = k;
  $("when").value = k;
  $("step").textContent = `step ${steps[k]}`;
  $("when").setAttribute("aria-valuetext", `step ${steps[k]}`);
  $("sheet").src = "/sheet?i=" + k;
  $("sheet").alt = `Samples after step ${steps[k]}`;
}

let film = 0;
function playHistory(on) {
  clearTimeout(film);
  film = 0;
  press("history-play", on, on ? "Pause" : "Play");
  if (!on) return;
  let k = showing >= steps.length - 1 ? 0 : showing;
  const pause = Math.max(120, Math.min(500, 8000 / steps.length));
  (async function next() {
    look(k);
    await $("sheet").decode().catch(() => {});
    if ($("history-play").getAttribute("aria-pressed") !== "true") return;
    if (++k >= steps.length) return playHistory(false);
    film = setTimeout(next, pause);
  })();
}

function tab(name) {
  for (const each of ["pictures", "training"]) {
    $(each).hidden = each !== name;
    $("tab-" + each).setAttribute("aria-selected", each === name);
    $("tab-" + each).tabIndex = each === name ? 0 : -1;
  }
  if (name === "training") { play(false); training(); } else playHistory(false);
}

// ---- go

async function start() {
  try {
    info = await (await get("/info")).json();
  } catch (error) { say(error.message); return setTimeout(start, 3000); }
  document.title = info.name;
  $("name").textContent = info.name;
  $("about").textContent = [info.step === null ? "" : `step ${info.step}`, info.data && `trained on ${info.data}`,
    `${info.height} x ${info.width} pixels`, `z of length ${info.length}`].filter(Boolean).join(", ");
  recall();
  $("moves").open = innerWidth > 820;
  makeGrid();
  makeSliders();
  $("truncation").value = state.psi;
  $("new").addEventListener("click", () => { state.seed = (state.seed + 1) % 2 ** 32; samples(); });
  $("seed").addEventListener("change", () => {
    if (isSeed($("seed").value)) { state.seed = Number($("seed").value); samples(); return; }
    say("A seed is a whole number from 0 to 4294967295.");
    $("seed").value = state.seed;
  });
  $("truncation").addEventListener("input", () => {
    state.psi = Number($("truncation").value);
    samples(); ends(); changed();
  });
  $("t").addEventListener("input", () => {
    const t = $("t").value / 1000;                          // read before the walk puts it elsewhere
    if (playing) play(false);
    state.t = t;
    changed(true);
  });
  $("save").addEventListener("click", aim);
  $("play").addEventListener("click", () => play(!playing));
  $("choose").addEventListener("click", () => choosing(!state.choosing));
  $("reset").addEventListener("click", () => { state.d = state.d.map(() => 0); changed(); ends(); });
  $("when").addEventListener("input", () => { playHistory(false); look(Number($("when").value)); });
  $("history-play").addEventListener("click", () => playHistory(!film));
  for (const name of ["pictures", "training"]) $("tab-" + name).addEventListener("click", () => tab(name));
  document.querySelector("[role=tablist]").addEventListener("keydown", event => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    const other = $("pictures").hidden ? "pictures" : "training";
    tab(other);
    $("tab-" + other).focus();
  });
  document.addEventListener("keydown", event => {
    const meant = !(event.ctrlKey || event.metaKey || event.altKey) && event.target.type !== "number";
    if (event.key.toLowerCase() === "n" && meant && !$("pictures").hidden) $("new").click();
  });
  addEventListener("hashchange", () => location.reload());  // another address, pasted over this one
  setInterval(() => { if (!$("training").hidden && !document.hidden) training(); }, 10000);
  await samples();
  ends();
  changed();
}
start();
</script>
</body>
</html>
"""


def main(argv=None):
    args = parse_arguments(argv)
    with runtime.plain_errors("generate.py"):
        device = runtime.pick_device(args.device)
        if args.compare:
            return save_comparison(args, device)
        source = open_source(args.runs[0] if args.runs else "", device)
        if args.progress:
            return save_progress(args, source)
        if args.serve is not None:
            return serve(source, args.host, args.serve)
        if args.out:
            return save_files(args, source)
        if args.walk:
            return save_walk(args, source)
        kinds = dict(nearest=save_nearest, morph=save_morph, arithmetic=save_arithmetic, project=save_projection)
        kind = next((kind for kind in kinds if getattr(args, kind)), "samples")
        kinds.get(kind, save_sheet)(args, source, args.sheet or f"{kind}.png")


if __name__ == "__main__":
    runtime.call(main, "generate.py")
