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
import collections
import functools
import json
import math
import re
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

import cli
import data
import decode
import gan
import plots
import runs
import runtime
import serve
import sources


def slerp(a, b, t):
    """Spherical interpolation from a to b, (..., d) each; t in [0, 1] broadcasts over the last axis. Shoemake 1985.

    The direction goes along the great circle at constant speed, u(t) = (sin((1 - t) W) a/||a|| + sin(t W) b/||b||) /
    sin W, with W the angle between a and b; the length goes linearly from ||a|| to ||b||. (A straight line would pass
    through lengths that N(0, 1) in many dimensions never draws.) Opposite directions have no shortest way between them;
    what lies between is then arbitrary.
    """
    a, b, dtype = a.double(), b.double(), a.dtype
    length_a, length_b = a.norm(dim=-1, keepdim=True), b.norm(dim=-1, keepdim=True)
    u, v = a / length_a.clamp_min(1e-300), b / length_b.clamp_min(1e-300)             # the zero vector stays one
    W = 2 * torch.atan2((u - v).norm(dim=-1, keepdim=True), (u + v).norm(dim=-1, keepdim=True))    # exact near 0 too
    near = W < 1e-6
    sine = torch.where(near, 1.0, W.sin())
    direction = torch.where(near, u, ((1 - t) * W).sin() / sine * u + (t * W).sin() / sine * v)
    return (((1 - t) * length_a + t * length_b) * direction).to(dtype)


@torch.no_grad()
def principal_directions(G):
    """The directions of z that G's first layer answers to most: V (latent, latent), a unit row each, and their shares.

    G's first layer in eval mode is A z + b, A = diag(gamma / sqrt(var + eps)) W with W its weights and gamma, var of
    its BatchNorm. V are the eigenvectors of A'A, strongest first: v_1 = argmax ||A v||, v_2 the same orthogonal to it,
    and so on; the share of v_k is its eigenvalue over the sum of all. Shen & Zhou 2021 (SeFa); as z ~ N(0, 1)
    these are also the principal components of the first layer's output (GANSpace, Harkonen et al. 2020).
    Deviation: BatchNorm's gain is counted in. Signs are settled: the entry largest in size is positive.
    """
    norm = G.norm
    gain = (norm.weight / (norm.running_var + norm.eps).sqrt()).double().cpu()                    # (c,)
    A = G.project.weight.double().cpu().unflatten(0, (-1, len(gain))) * gain[:, None]             # (h w, c, latent)
    A = A.flatten(0, 1)
    values, vectors = torch.linalg.eigh(A.T @ A)                                                  # ascending
    V = vectors.T.flip(0)
    V = V * V.gather(1, V.abs().argmax(1, keepdim=True)).sign()
    shares = values.flip(0).clamp_min(0)
    return V.to(G.project.weight), (shares / shares.sum().clamp_min(1e-300)).float()


SCRIPTS = ("train_wgan.py", "train_dcgan.py")                # whose networks make pictures from nothing but z
BLOCK = 16                                                   # samples that go through the network together, always


def parse_arguments(argv=None):
    parser = cli.Parser("generate.py", __doc__)
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
    add("--serve", nargs="?", type=cli.number(int, 0, 65536), const=8000, metavar="PORT", help="a web page on this "
        "machine (8000; 0: any free port)")
    add = parser.add_argument_group("which samples").add_argument
    add("--n", type=cli.number(int, 1, 10**7 + 1), metavar="N", help="how many: samples 0 to N - 1 (64; 8 to walk "
        "through or to compare; 9 pictures of a morph)")
    add("--pick", default="", metavar="K,K,...", help="samples of these numbers instead")
    add("--seed", type=cli.number(int, 0, 2**32), default=0, help="of the latents (%(default)s)")
    add("--truncation", type=cli.number(float, 0, 10), default=1.0, metavar="PSI", help="z is multiplied by it: "
        "under 1 less variety and fewer oddities (%(default)s)")
    add = parser.add_argument_group("how").add_argument
    add("--sheet", default="", metavar="FILE", help="what sheets and strips are written to (samples.png, nearest.png, "
        "morph.png, arithmetic.png, project.png)")
    add("--batch", type=cli.positive_int, default=64, help="pictures in hand at a time; changes no picture "
        "(%(default)s)")
    add("--frames", type=cli.positive_int, default=24, help="of a walk, from one sample to the next (%(default)s)")
    add("--restarts", type=cli.positive_int, default=8, help="latents that --project begins with; the best result is "
        "kept (%(default)s)")
    add("--iterations", type=cli.positive_int, default=300, help="Adam's steps for each of them (%(default)s)")
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


def sample_numbers(args, default):
    """The sample numbers that --pick or --n name."""
    if not args.pick:
        return range(args.n or default)
    if not re.fullmatch(r"\d{1,9}(,\d{1,9})*", args.pick):
        raise ValueError(f"--pick {args.pick}: write sample numbers with commas between them, as in 3,17,40")
    return [int(word) for word in args.pick.split(",")]


def check_count(count, most, what, instead="or single files by --out DIR"):
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
    path = Path(path) if path else runs.find_run("", SCRIPTS)
    folder = path if path.is_dir() else next((f for f in path.parents[:2] if (f / "checkpoint.pt").exists()), None)
    saved = runs.read_checkpoint(folder) if folder else {}
    script, steps = saved.get("script", SCRIPTS[0]), re.findall(r"^step-(\d+)$", path.stem)
    G = gan.load_generator(path, device) if script in SCRIPTS else None
    if not isinstance(G, gan.Generator):
        raise ValueError(f"{path} holds a network that makes pictures from pictures, not from noise: use python "
                         f"complete.py {folder or path}")
    flags = argparse.Namespace(**saved["flags"]) if saved else None
    step = int(steps[0]) if steps else saved.get("step") if path.is_dir() or path.stem == "checkpoint" else None
    return Source(G.to(memory_format=torch.channels_last), path, folder, flags, step)


def describe_source(source):
    return f"{source.path}" + ("" if source.step is None else f", step {source.step}")


def fuse_batchnorm(G):
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
    return torch.cat([plots.to_uint8(G(rows)) for rows in z.split(BLOCK)]).cpu()


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


def save_sheet(args, source, path):
    numbers = sample_numbers(args, 64)
    check_count(len(numbers), 1024, "a sheet of {} samples")
    pixels = sample(fuse_batchnorm(source.G), args.seed, numbers, args.truncation, args.batch)
    columns = max(8, math.isqrt(len(numbers)))
    runs.write_atomically(path, lambda path: plots.save_grid(path, data.to_float(pixels), columns))
    runtime.print_rank0(f"{path}: {len(numbers)} samples of {describe_source(source)}, seed {args.seed}"
                + ("" if args.pick else f"; number 0 is at the top left, {len(numbers) - 1} the last"))


def fingerprint(G):
    """A number that another network would hardly share."""
    check = zlib.crc32(repr(sorted(G.config.items())).encode())
    for w in G.state_dict().values():
        check = zlib.crc32(w.detach().cpu().contiguous().numpy().tobytes(), check)
    return check


def save_files(args, source):
    """DIR/seed0-000012.png and so on, encoded by all cores while the network goes on; what is there stays."""
    folder, numbers = Path(args.out), sample_numbers(args, 64)
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
    runs.write_atomically(about, lambda path: path.write_text(json.dumps(here), "utf-8"))

    def name(k):
        return f"seed{args.seed}-{k:06d}.png"

    def save(k, pixels):
        unfinished = folder / (name(k) + ".part")            # no suffix of a picture: nobody reads it by mistake
        plots.to_pil(pixels).save(unfinished, "PNG", compress_level=3)
        unfinished.replace(folder / name(k))

    missing = [k for k in dict.fromkeys(numbers) if name(k) not in names]
    kept, began, done, shown = len(set(numbers)) - len(missing), time.perf_counter(), 0, 0.0
    pool, waiting = ThreadPoolExecutor(torch.get_num_threads() + 1), collections.deque()
    try:
        for ks, block in samples(fuse_batchnorm(source.G), args.seed, missing, args.truncation, args.batch):
            waiting += [pool.submit(save, k, pixels) for k, pixels in zip(ks, block)]
            while len(waiting) > (args.batch if done + len(waiting) < len(missing) else 0):
                waiting.popleft().result()
                done += 1
            if sys.stdout.isatty() and time.perf_counter() - shown > 0.5:
                shown = time.perf_counter()
                runtime.print_rank0(f"\r{done} of {len(missing)}\033[K", end="")
    except KeyboardInterrupt:
        runtime.print_rank0(f"\n{folder}: stopped after {done} of {len(missing)} pictures; the same command goes on")
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    took = time.perf_counter() - began
    runtime.print_rank0("\r\033[K" * sys.stdout.isatty() + f"{folder}: {len(missing)} pictures of {describe_source(source)}, seed "
                f"{args.seed}, in {runtime.format_duration(took)} ({len(missing) / took:.0f} a second)"
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
    """`data.Dataset` that the run was trained on."""
    if source.flags is None:
        raise ValueError(f"{flag} needs the run that {source.path} belongs to, for its pictures and how they were cut: "
                         f"name the run folder")
    flags = argparse.Namespace(**{**vars(source.flags), "data": args.data or source.flags.data})
    pictures = data.load_from_args(flags, "train")
    shape = (source.G.config["channels"], *source.G.config["size"])
    if pictures.images.shape[1:] != shape:
        raise ValueError(f"the pictures in {flags.data} come out as {pictures.images.shape[1:]} and the generator's "
                         f"are {shape}: give the ones that it was trained on by --data")
    return pictures


def save_nearest(args, source, path):
    numbers = sample_numbers(args, 32)
    check_count(len(numbers), 1024, "a sheet of {} samples")
    pictures = training_pictures(args, source, "--nearest")
    x = sample(fuse_batchnorm(source.G), args.seed, numbers, args.truncation, args.batch)
    rows, turned, rms = nearest(pictures.images, x, source.flags.flip)
    found = torch.from_numpy(np.asarray(pictures.images[rows.numpy()]))
    found = torch.where(turned[:, None, None, None], found.flip(3), found)
    pairs = torch.stack([x, found], 1).flatten(0, 1)
    runs.write_atomically(path, lambda path: plots.save_grid(path, data.to_float(pairs)))
    runtime.print_rank0(f"{path}: {len(numbers)} pairs, the sample on the left, on the right the most similar of "
                f"{len(pictures.images)} training pictures; the closest, by the root mean square of their difference:")
    for k in rms.argsort()[:5].tolist():
        runtime.print_rank0(f"    sample {numbers[k]}: {pictures.names[rows[k]]}{', mirrored' * bool(turned[k])}, "
                    f"{rms[k]:.1f} of 255 grey levels")


# ---------------------------------------------------------------------------------------------------------------------
# Walks and sums
# ---------------------------------------------------------------------------------------------------------------------

def great_circle_walk(points, frames):
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
    return slerp(points[leg], ends[leg], t[:, None])


def save_walk(args, source):
    numbers = sample_numbers(args, 8)
    if len(set(numbers)) < 2:
        raise ValueError("--walk goes from sample to sample: it needs at least two, by --n or --pick")
    path, frames = Path(args.walk), args.frames * len(numbers)
    check_count(frames, 4800, "a walk of {} frames", "so give a smaller --n or --frames")    # four minutes
    z = latents(args.seed, numbers, source.G.config["latent"], args.truncation)
    pixels = draw(fuse_batchnorm(source.G), great_circle_walk(z, frames))
    runs.write_atomically(path, lambda file: plots.save_animation(file, pixels, path.suffix[1:].upper()))
    runtime.print_rank0(f"{path}: {frames} frames through samples {', '.join(map(str, numbers))} of {describe_source(source)}")


def save_morph(args, source, path):
    if not re.fullmatch(r"\d{1,9},\d{1,9}", args.morph):
        raise ValueError(f"--morph {args.morph}: write two sample numbers, as in 3,17")
    check_count(args.n or 9, 1024, "a strip of {} pictures", "so give a smaller --n")
    ends = [int(word) for word in args.morph.split(",")]
    a, b = latents(args.seed, ends, source.G.config["latent"], args.truncation)
    pixels = draw(fuse_batchnorm(source.G), slerp(a, b, torch.linspace(0, 1, args.n or 9, dtype=torch.float64)[:, None]))
    captions = [str(ends[0])] + [""] * (len(pixels) - 2) + [str(ends[1])] * (len(pixels) > 1)
    runs.write_atomically(path, plots.captioned_grid([("", pixels, captions)]).save)
    runtime.print_rank0(f"{path}: from sample {ends[0]} to sample {ends[1]} of {describe_source(source)}, {len(pixels)} pictures")


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
    pixels = draw(fuse_batchnorm(source.G), torch.cat([z, total[None]]))
    runs.write_atomically(path, plots.captioned_grid([("", pixels, [*captions, "="])]).save)
    runtime.print_rank0(f"{path}: {' '.join(captions)}, samples of {describe_source(source)}")


# ---------------------------------------------------------------------------------------------------------------------
# Progress, comparison, projection
# ---------------------------------------------------------------------------------------------------------------------

def save_progress(args, source):
    folder = source.folder
    if folder is None or not list((folder / "samples").glob("step-*.png")):
        raise ValueError(f"{source.path} has no samples/step-*.png to show: name a run folder")
    runs.write_atomically(args.progress, lambda path: plots.save_gif(path, folder / "samples"))
    runtime.print_rank0(f"{args.progress}: the samples that {folder} saved on its way")


def save_comparison(args, device):
    rows, numbers = [], sample_numbers(args, 8)
    check_count(len(numbers), 1024, "a row of {} samples", "so give a smaller --n")
    for run in args.runs:
        source = open_source(run, device)
        pixels = sample(fuse_batchnorm(source.G), args.seed, numbers, args.truncation, args.batch)
        rows.append((describe_source(source), pixels, None))
    runs.write_atomically(args.compare, plots.captioned_grid(rows).save)
    runtime.print_rank0(f"{args.compare}: {len(numbers)} latents through each of {len(rows)} networks"
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
            runtime.print_rank0(f"\r{step} of {iterations} steps, mean square {square.min() / x.numel():.4f}\033[K", end="")
    with torch.no_grad():
        squares = torch.cat([(G(rows) - x).square().mean((1, 2, 3)) for rows in z.split(BLOCK)])
    order = squares.argsort()
    return z.detach()[order], squares[order]


def given_picture(args, source):
    """The picture of --project as training would see it: float (C, H, W) in [-1, 1]."""
    size, channels = source.G.config["size"], str(source.G.config["channels"])
    flags, names = source.flags, ("fit", "crop", "background", "range", "keep_truncated", "denoise")
    recipe = decode.Preprocess(tuple(size), channels=channels, **{name: getattr(flags, name) for name in names if flags})
    if recipe.crop.startswith("auto"):                       # what it chose depends on all of the run's pictures
        items = sources.find_items(args.data or flags.data, getattr(flags, "classes", ""), flags.range)
        recipe, _ = data.resolve_crop(recipe, items[:flags.limit or None])
    decoded = data.decode(recipe, sources.Item(args.project, (), functools.partial(sources.read_bytes, args.project)))
    if decoded.pixels is None:
        raise ValueError(f"--project {args.project}: {decoded.why}")
    pixels = torch.from_numpy(np.atleast_3d(decoded.pixels).copy()).permute(2, 0, 1)
    return data.to_float(pixels)


def save_projection(args, source, path):
    x = given_picture(args, source).to(next(source.G.parameters()).device)
    began = time.perf_counter()
    G = fuse_batchnorm(source.G)
    z, squares = project(G, x, args.restarts, args.iterations, seed=args.seed)
    psnr = -10 * torch.log10(squares.clamp_min(1e-12) / 4)   # of pictures that span 2, from -1 to 1
    pixels = torch.cat([plots.to_uint8(x)[None].cpu(), draw(G, z[:1])])
    runs.write_atomically(path, plots.captioned_grid([("", pixels, ["given", f"found, {psnr[0]:.1f} dB"])], side=256).save)
    others = f"; the other restarts {psnr[-1]:.1f} to {psnr[1]:.1f} dB" if len(psnr) > 1 else ""
    took = runtime.format_duration(time.perf_counter() - began)
    runtime.print_rank0("\r\033[K" * sys.stdout.isatty() + f"{path}: {args.project} and the nearest found that "
                f"{describe_source(source)} draws, PSNR {psnr[0]:.2f} dB{others}; {took}")


def main(argv=None):
    args = parse_arguments(argv)
    with runtime.exit_on_user_error("generate.py"):
        device = runtime.pick_device(args.device)
        if args.compare:
            return save_comparison(args, device)
        source = open_source(args.runs[0] if args.runs else "", device)
        if args.progress:
            return save_progress(args, source)
        if args.serve is not None:
            return serve.serve(source, args.host, args.serve)
        if args.out:
            return save_files(args, source)
        if args.walk:
            return save_walk(args, source)
        kinds = dict(nearest=save_nearest, morph=save_morph, arithmetic=save_arithmetic, project=save_projection)
        kind = next((kind for kind in kinds if getattr(args, kind)), "samples")
        kinds.get(kind, save_sheet)(args, source, args.sheet or f"{kind}.png")


if __name__ == "__main__":
    main()
