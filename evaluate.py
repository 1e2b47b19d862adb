"""Numbers that make_evaluator generated pictures, with nothing to install: FID, KID, IS, precision and recall, density and
coverage, SSIM, t-SNE and a check for copies.

    python evaluate.py                                      FID and KID of the newest run against its training pictures
    python evaluate.py runs/wgan-teeth-1 --all              every number, tsne.png, sweep.png, memorisation.png
    python evaluate.py --features random                    no download; compares with itself only
    python evaluate.py --real ./teeth --fake ./made         two folders, or arrays (.npy, .npz), or statistics (.npz)
    python evaluate.py --memorisation                       are training pictures being copied?

Real and fake pass through the same lines: uint8 pictures, one resize, one network. FID depends on the number of
pictures, on the network and on the resize, so all three are printed with it, and beside it the floor: one half of the
real pictures against the other, at the same number.

The functions above the last section take arrays or tensors and may be pasted elsewhere.

    Wang et al. 2004           Image quality assessment: from error visibility to structural similarity
    van der Maaten et al. 2008 Visualizing data using t-SNE                          JMLR 9
    Szegedy et al. 2016        Rethinking the Inception architecture                 arXiv 1512.00567
    Salimans et al. 2016       Improved techniques for training GANs                 arXiv 1606.03498
    Heusel et al. 2017         GANs trained by a two time-scale update rule          arXiv 1706.08500
    Binkowski et al. 2018      Demystifying MMD GANs                                 arXiv 1801.01401
    Kynkaanniemi et al. 2019   Improved precision and recall metric                  arXiv 1904.06991
    Naeem et al. 2020          Reliable fidelity and diversity metrics               arXiv 2002.09797
    Alaa et al. 2022           How faithful is your synthetic data?                  arXiv 2102.08921
"""

import argparse
import contextlib
import io
import json
import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import cli
import data
import decode
import gan
import inception
import metrics
import plots
import runs
import runtime
import sources

DRAWN = 300                                                 # pictures of a kind that t-SNE is made of


# ---------------------------------------------------------------------------------------------------------------------
# Pictures to compare
# ---------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def sample(G, n, seed=0, batch=64, progress=False):
    """n pictures of G, as they would be on disk: uint8 array (N, C, H, W). The same for the same (G, n, seed, batch).

    G: z (N, G.config["latent"]) -> [-1, 1]. It is in eval mode while it draws, so that BatchNorm uses its running
    statistics and no picture depends on its batch, and then as it was. Only an own stream of random numbers is used.
    """
    device, training = next(G.parameters()).device, G.training
    stream, out = torch.Generator().manual_seed(seed), []
    G.eval()
    try:
        for rows in runtime.batched_slices(n, batch, "sampling" if progress else ""):
            z = torch.randn(rows.stop - rows.start, G.config["latent"], generator=stream)
            out.append(plots.to_uint8(G(z.to(device))).cpu().contiguous())
    finally:
        G.train(training)
    return torch.cat(out).numpy()


def noise(kind, n, like, seed=0):
    """What FID is at worst: n pictures of noise with the mean and deviation of `like` in each channel, uint8.

    kind: "gaussian", each pixel by itself; "radial", that noise x (1 - distance from the centre / the largest).
    """
    random, (_, c, h, w) = np.random.RandomState(seed), like.shape
    some = np.asarray(like[:min(len(like), 1000)], np.float32)
    mean, std = (f((0, 2, 3))[None, :, None, None] for f in (some.mean, some.std))
    g = random.standard_normal((n, c, h, w)).astype(np.float32)
    if kind == "radial":
        y, x = np.meshgrid(np.linspace(-1, 1, h), np.linspace(-1, 1, w), indexing="ij")
        g *= (1 - np.hypot(x, y) / math.sqrt(2)).astype(np.float32)
    return (mean + std * g).round().clip(0, 255).astype(np.uint8)


class Source(NamedTuple):
    """One side of a comparison: pictures, or only the statistics of their features."""
    label: str
    images: object = None                                    # uint8 (N, C, H, W), an array or data.ImageSubset
    names: list = None                                       # of files
    statistics: tuple = None                                 # (mu, sigma)

    def pictures(self):
        """Its pictures. ValueError when it has only statistics."""
        if self.images is None:
            raise ValueError(f"{self.label}: statistics do for --fid alone")
        return self.images


def load_source(path, size="", flag="--real"):
    """A folder or idx file, an array of uint8 pictures (.npy, .npz), or statistics (.npz with mu and sigma).

    Pictures of a folder are taken in colour and at their own size, which must be one, unless `size` says otherwise.
    Exact copies count, as they do in an array: a generator that repeats itself is judged by its repetitions too.
    """
    path = str(path)
    if path.endswith((".npy", ".npz")):
        return load_arrays(path, flag)
    try:
        items = sources.find_items(path)
        recipe = decode.Preprocess(decode.parse_size(size or own_size(items, path, flag)), channels="3")
        pictures = data.load(path, recipe.size, channels="3")
        array, found = data.load_cached(path, items, recipe)      # what `load` has just read, with the copies
    except (OSError, ValueError) as error:
        raise type(error)(str(error).replace("--data", flag)) from error
    for line in data.describe(path, pictures._replace(skipped=found["skipped"]))[1:]:
        runtime.print_rank0(line)
    return Source(f"{len(found['rows']):,} pictures of {path}", data.ImageSubset(array, found["rows"]), found["names"])


def load_arrays(path, flag):
    try:
        with np.load(path) if path.endswith(".npz") else contextlib.nullcontext({"": np.load(path)}) as file:
            arrays = {name: file[name] for name in file}
    except Exception as error:
        raise ValueError(f"{flag} {path} cannot be read ({runtime.first_line(error)})") from error
    if {"mu", "sigma"} <= arrays.keys():
        return Source(f"statistics in {path}", statistics=(arrays["mu"], arrays["sigma"]))
    images = next((x for x in arrays.values() if x.ndim == 4 and x.dtype == np.uint8), None)
    if images is not None and images.shape[1] not in (1, 3) and images.shape[3] in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    if images is None or images.shape[1] not in (1, 3):
        raise ValueError(f"{flag} {path} holds neither statistics (mu, sigma) nor pictures: uint8 (N, C, H, W) or "
                         f"(N, H, W, C) with 1 or 3 channels")
    return Source(f"{len(images):,} pictures of {path}", images)


def own_size(items, path, flag):
    """The one size that all pictures have, as text."""
    sizes = set()
    for item in items:
        with contextlib.suppress(Exception):                 # what cannot be read is left out later, and named
            raw = item.read()
            with Image.fromarray(raw) if isinstance(raw, np.ndarray) else Image.open(io.BytesIO(raw)) as im:
                turned = im.getexif().get(0x0112, 1) >= 5
                sizes.add((im.width, im.height) if turned else (im.height, im.width))
    if len(sizes) != 1:
        some = ", ".join("x".join(map(str, size)) for size in sorted(sizes)[:3])
        raise ValueError(f"{flag} {path} holds pictures of several sizes ({some} ...): say what to bring them to, as "
                         "in --size 64" if sizes else f"{flag} {path}: none of its files can be read")
    return "x".join(map(str, sizes.pop()))


SCRIPTS = ("train_wgan.py", "train_dcgan.py")


class TrainedRun(NamedTuple):
    """A run to be judged."""
    folder: Path
    G: nn.Module                                             # the averaged generator
    step: int
    real: Source                                             # its training pictures
    held_out: object                                         # uint8 (N, C, H, W)
    mirror: bool                                             # whether it mirrored them


def load_run(path, where="", device="cpu"):
    """The run folder `path` ("": the newest), or one file of its generators/. where: where its pictures are now."""
    file = Path(path) if path.endswith(".pt") and Path(path).is_file() else None
    folder = runs.find_run(os.path.relpath(file.absolute().parent.parent) if file else path, SCRIPTS)
    saved = runs.read_checkpoint(folder)
    flags = argparse.Namespace(**{**saved["flags"], **({"data": where} if where else {})})
    G, step = gan.load_generator(file or folder, device), saved["step"]
    if file:
        step = int(file.stem[5:]) if file.stem[5:].isdigit() else torch.load(file, weights_only=True).get("step", step)
    train = data.load_from_args(flags, "train")
    held_out = data.load_from_args(flags, "heldout", 0)
    real = Source(f"{len(train.images):,} training pictures of {flags.data}", train.images, train.names)
    return TrainedRun(folder, G, step, real, held_out.images, flags.flip)


# ---------------------------------------------------------------------------------------------------------------------
# Scores during training
# ---------------------------------------------------------------------------------------------------------------------

def make_evaluator(args, run, images):
    """For the training scripts' --evaluate-every: a function of (G, step) that logs FID and KID as `fid` and `kid`.

    --evaluate-n training pictures (`images`) against as many of G, through --evaluate-features. The generator with the
    lowest KID, which does not depend on their number, is kept as generators/best.pt. Leaves all random numbers alone.
    """
    try:
        extract = inception.load_features(args.evaluate_features, device=run.device)
    except (OSError, ValueError) as error:                   # its advice names the flags of this script
        advice = str(error).replace(" or name it with --weights FILE", "").replace("--features", "--evaluate-features")
        raise type(error)(advice) from None
    chosen = np.random.RandomState(args.seed).permutation(len(images))[:args.evaluate_n]
    real = extract(images[np.sort(chosen)], progress="features of real pictures")
    how = f"{len(real):,} real pictures v {args.evaluate_n:,} drawn, through {extract.name}"
    runtime.print_rank0(f"FID and KID: {how}")

    def measure(G, step):
        fake = extract(sample(G, args.evaluate_n, args.seed, args.batch))
        now = dict(fid=metrics.fid(real, fake), kid=metrics.kid(real, fake)[0])
        run.log_once(**now)
        kept = run.folder / "generators" / "best.pt"
        best = torch.load(kept, map_location="cpu", weights_only=True) if kept.exists() else {}
        if now["kid"] < best.get("kid", math.inf) or best["how"] != how:            # one measured otherwise is no rival
            saved = {**gan.generator_state(G), **now, "step": step, "how": how}
            run.write("generators/best.pt", lambda path: torch.save(saved, path))

    return measure


# ---------------------------------------------------------------------------------------------------------------------
# python evaluate.py
# ---------------------------------------------------------------------------------------------------------------------

WHAT = {"fid": "FID (Heusel et al. 2017)", "kid": "KID (Binkowski et al. 2018)",
        "is": "Inception Score (Salimans et al. 2016)", "pr": "precision and recall, density and coverage",
        "ssim": "how alike two pictures of a kind are, by SSIM; with --pairs, how alike the two of a pair are",
        "memorisation": "are training pictures copied? Measured against held-out ones",
        "ceiling": "FID of noise, too", "sweep": "sweep.png: FID against the number of real pictures and over the run"}


def parse_arguments(argv=None):
    parser = cli.Parser("evaluate.py", __doc__)
    parser.add_argument("run", nargs="?", default="", help="a run folder, or a file of its generators/ (the "
                        "newest run)")
    add = parser.add_argument_group("numbers (--fid --kid when none is named)").add_argument
    for name, words in WHAT.items():
        add(f"--{name}", action="store_true", help=words)
    add("--tsne", default="", metavar="FILE", help="draw real, fake and noise in the plane (van der Maaten et al. "
        "2008)")
    add("--all", action="store_true", help="all of these; --tsne into tsne.png")
    add = parser.add_argument_group("pictures").add_argument
    add("--data", default="", help="where the pictures of the run are now, when they have moved")
    add("--real", default="", help="a folder, an idx file, uint8 pictures (.npy, .npz) or statistics (.npz: mu, sigma)")
    add("--fake", default="", help="the same, in the place of a run")
    add("--held-out", default="", metavar="FOLDER", help="real pictures that were not trained on, when there is no run")
    add("--pairs", action="store_true", help="picture k of --real belongs to picture k of --fake")
    add("--size", default="", help="bring the pictures of folders to 64 or 288x512 first (their own size)")
    add("--n", type=cli.positive_int, metavar="N", help="pictures of a kind (as many as there are real, up to 10000)")
    add("--seed", type=cli.number(int, 0, 2**32), default=0, help="of all that is drawn (%(default)s)")
    add = parser.add_argument_group("the network").add_argument
    add("--features", default="inception", help="inception; random, which needs no download; or a file of your own, "
        "TorchScript or torch.export (%(default)s)")
    add("--dims", type=int, default=2048, choices=inception.DIMS, help="which layer (%(default)s)")
    add("--weights", default="", metavar="FILE", help="of inception (torch's cache, else a download)")
    add("--resize", default=inception.DIALECTS[0], choices=inception.DIALECTS, help="whose way to 299x299 "
        "(%(default)s)")
    add("--batch", type=cli.number(int, 0), default=0, help="pictures at a time; 0, what suits the device (0)")
    add("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu (%(default)s)")
    add("--perplexity", type=cli.number(float, 1), default=30.0, help="of t-SNE (%(default)s)")
    add = parser.add_argument_group("files").add_argument
    add("--json", default="", metavar="FILE", help="where the numbers go (metrics.json of the run)")
    add("--save-stats", default="", metavar="FILE", help="only write mu and sigma of the real pictures, as pytorch-fid "
        "reads them (.npz)")
    args = parser.parse_args(argv)
    if args.all or not (args.tsne or any(getattr(args, name) for name in WHAT)):
        for name in WHAT if args.all else ("fid", "kid"):
            setattr(args, name, True)
    if args.save_stats and not args.save_stats.endswith(".npz"):
        parser.error("--save-stats FILE ends in .npz")
    if args.run and args.real and args.fake:
        parser.error("with --real and --fake there is nothing to take from a run: leave it out")
    if args.pairs and not (args.real and args.fake):
        parser.error("--pairs compares picture by picture: give --real and --fake")
    return args


class Comparison:
    """Real beside fake: their features, taken when they are asked for and once, and the table of what was found."""

    def __init__(self, args, network, real, fake, run):
        self.args, self.network, self.run, self.taken = args, network, run, {}
        self.train = run.real if run else real              # all of them: --n leaves none of the possible originals out
        self.real, self.fake = of_one_number(args, real, fake, run)
        self.folder = run.folder if run else Path(".")
        self.json_path = Path(args.json) if args.json else run.folder / "metrics.json" if run else None
        self.about = dict(real_is=self.real.label, fake_is=self.fake.label, seed=args.seed,
                          **({"features": network.name, "resize": args.resize} if network else {}),
                          **({"step": run.step} if run else {}))

    def extract(self, images, what):
        return self.network(images, self.args.batch, what)

    def features(self, side):
        if side not in self.taken:
            self.taken[side] = self.extract(getattr(self, side).pictures(), f"features of {side} pictures")
        return self.taken[side]

    def both(self):
        return self.features("real"), self.features("fake")

    def halves(self):
        """Two disjoint sets of real features and one of fake, all of one size."""
        real, fake = self.both()
        n = min(len(real) // 2, len(fake))
        if n < 2:
            raise ValueError(f"{self.real.label} and {self.fake.label} are too few to compare: take at least 4 and 2")
        return real[:n], real[n:2 * n], fake[:n]

    def tell(self, words, text, note="", name="", **value):
        """A line of the table; one with a name goes into the json file too, at once."""
        runtime.print_rank0(f"{words:<26} {text:>15}   {note}".rstrip())
        if not (name and self.json_path):
            return
        found = {}
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(self.json_path.read_text("utf-8"))
        found[name] = {**value, **self.about}
        runs.write_atomically(self.json_path, lambda path: path.write_text(json.dumps(found, indent=1) + "\n", "utf-8"))


def report_fid(c):
    """FID; and at half the number, where there are two sets of real pictures, beside its floor."""
    if c.real.statistics or c.fake.statistics:
        sides = [getattr(c, side).statistics or metrics.statistics(c.features(side)) for side in ("real", "fake")]
        value = metrics.frechet_distance(*sides[0], *sides[1])
        c.tell("FID", f"{value:.4f}", f"{c.real.label} v {c.fake.label}", "fid", value=value)
        return
    (real, fake), (a, b, half) = c.both(), c.halves()
    value, same, floor = metrics.fid(real, fake), metrics.fid(a, half), metrics.fid(a, b)
    c.tell("FID", f"{value:.4f}", f"{len(real):,} real v {len(fake):,} fake", "fid", value=value, real=len(real),
           fake=len(fake))
    c.tell(f"  at N = {len(a):,}", f"{same:.4f}", f"{len(a):,} real v {len(a):,} fake", "fid_half", value=same,
           n=len(a))
    c.tell(f"  floor at N = {len(a):,}", f"{floor:.4f}", "real v other real: what no generator can better", "fid_floor",
           value=floor, n=len(a))
    if min(len(real), len(fake)) < 2048:
        runtime.print_rank0(f"  note: with fewer than 2,048 pictures (here {min(len(real), len(fake)):,}) FID comes out too "
                    "high, the more so the fewer: compare it only at the same N; KID is free of that")


def report_kid(c):
    if c.args.fid and (c.real.statistics or c.fake.statistics):
        return runtime.print_rank0("KID: left out: statistics do for FID alone")
    a, b, _ = c.halves()
    for words, name, x, y, note in (("KID", "kid", *c.both(), ""),
                                    (f"  floor at N = {len(a):,}", "kid_floor", a, b, "; 0 but for chance")):
        (mean, std), m = metrics.kid(x, y, seed=c.args.seed), min(1000, len(x), len(y))
        how = f"all {m:,} v {m:,} at once" if len(x) == len(y) == m else f"+- {std:.5f} over 100 subsets of {m:,}"
        c.tell(words, f"{mean:.5f}", how + note, name, value=mean, std=std, subset=m)


def report_is(c):
    real, fake = c.both()
    if c.network.fc is None:
        raise ValueError("--is needs the classes of inception: not with a network of your own, nor with --dims")
    if min(len(real), len(fake)) < 100:
        raise ValueError("--is takes means over ten parts: at least 100 pictures of each kind")
    fc = c.network.fc.cpu()
    (mean, std), (top, top_std) = (metrics.inception_score(f @ fc.T) for f in (fake, real))
    c.tell("Inception Score", f"{mean:.4f}", f"+- {std:.4f} over 10 parts; real pictures {top:.4f} +- {top_std:.4f}; "
           "says little of pictures of one kind of thing", "is", value=mean, std=std, real=top, real_std=top_std)


def report_pr(c):
    a, b, half = c.halves()
    for k, names, measure in ((3, ("precision", "recall"), metrics.precision_recall),
                              (5, ("density", "coverage"), metrics.density_coverage)):
        for name, value, top in zip(names, measure(a, half, k), measure(a, b, k)):
            c.tell(name, f"{value:.4f}", f"k = {k}, N = {len(a):,}; real v other real {top:.4f}", name, value=value,
                   real=top, k=k, n=len(a))


def report_ssim(c):
    """Aligned pairs, or how alike two pictures of a kind are: a low value for the fakes is variety."""
    real, fake = c.real.pictures(), c.fake.pictures()
    side = min(*real.shape[2:], *fake.shape[2:])
    scales = max((s for s in range(1, 6) if side >= 11 * 2 ** (s - 1)), default=1)
    if c.args.pairs:
        psnrs, ssims, msssims = in_pairs(real, fake, scales)
        c.tell("PSNR of pairs", f"{psnrs:.4f}", "dB, whole pictures", "psnr", value=psnrs)
        c.tell("SSIM of pairs", f"{ssims:.4f}", "1: equal", "ssim", value=ssims)
        c.tell("MS-SSIM of pairs", f"{msssims:.4f}", f"over {scales} scales", "ms_ssim", value=msssims, scales=scales)
        return
    found = []
    for source in (c.real, c.fake):                          # in an order drawn at random: neighbours are any two
        half = min(len(source.images), 1000) // 2
        if not half:
            raise ValueError(f"{source.label}: --ssim needs at least two")
        found.append(in_pairs(source.images[:half], source.images[half:2 * half], scales)[2])
    c.tell("MS-SSIM between fakes", f"{found[1]:.4f}", f"between reals {found[0]:.4f}, over {scales} scales; "
           "well above: too alike", "ms_ssim_diversity", value=found[1], real=found[0], scales=scales)


def in_pairs(a, b, scales, block=64):
    """Mean PSNR, SSIM and MS-SSIM of uint8 pairs."""
    if a.shape != b.shape:
        raise ValueError(f"pairs are of one number and size, not {tuple(a.shape)} and {tuple(b.shape)}")
    pairs = [(a[rows], b[rows]) for rows in runtime.batched_slices(len(a), block)]
    return [float(torch.cat([measure(x, y, 255, *more) for x, y in pairs]).mean())
            for measure, *more in ((metrics.psnr,), (metrics.ssim,), (metrics.ms_ssim, scales))]


def report_ceiling(c):
    real = c.features("real")
    for kind in ("gaussian", "radial"):
        made = noise(kind, len(real if c.fake.images is None else c.fake.images), c.real.images, c.args.seed)
        value = metrics.fid(real, c.extract(made, f"features of {kind} noise"))
        c.tell(f"FID of {kind} noise", f"{value:.4f}", f"{len(real):,} real v {len(made):,}", f"fid_{kind}_noise",
               value=value)


def report_memorisation(c):
    if not (c.run or c.args.held_out):
        raise ValueError("--memorisation is calibrated on real pictures that were not trained on: name their folder "
                         "with --held-out")
    held_out = c.run.held_out if c.run else load_source(c.args.held_out, c.args.size, "--held-out").pictures()
    train, fake = c.train.pictures(), c.fake.pictures()
    found = metrics.memorisation(train, held_out, fake, bool(c.run and c.run.mirror))
    pairs = found.pop("pairs")
    c.tell("nearer than held-out", f"{found['share']:.2%}", f"of {found['fakes']:,} fakes; 95 %: {found['low']:.2%} to "
           f"{found['high']:.2%}; {found['expected']:.2%} expected of honest ones", "memorisation", **found)
    c.tell("AuthPct", f"{found['authentic']:.2%}", f"of {found['held_out']:,} held-out pictures "
           f"{found['authentic_held_out']:.2%}")
    c.tell("median distance", f"{found['ratio']:.3f}", "x that of held-out pictures; far over 1: unlike any real one")
    made = [fake[k] for k, *_ in pairs]
    kept = [train[k][..., ::-1] if mirrored else train[k] for _, k, _, mirrored in pairs]
    sheet = torch.cat([F.interpolate(torch.from_numpy(x.copy())[None].float(), train.shape[2:]).expand(-1, 3, -1, -1)
                       for x in made + kept])
    out = c.folder / "memorisation.png"
    plots.save_grid(out, data.to_float(sheet), columns=len(pairs))
    verdict = "ALARM: too many fakes lie too near to training pictures" if found["alarm"] else \
        "no evidence of copying at 32x32 pixels"
    runtime.print_rank0(f"  {verdict} (so many by accident: chance {found['chance']:.2g}); the eight closest, above the "
                f"training pictures they are closest to: {out}")


def report_sweep(c):
    """sweep.png: how FID falls with the number of real pictures, for fakes and for other reals; FID over the run."""
    real, fake = c.both()
    other, rows = real[len(real) // 2:], []
    for n in np.unique(np.linspace(max(2, len(real) // 20), len(real), 10).round().astype(int)):
        rows.append({"reals": int(n), "fake": metrics.fid(real[:n], fake)})
        if n <= len(real) // 2:
            rows[-1]["other reals"] = metrics.fid(real[:n], other)
    for file in saved_generators(c.run.folder) if c.run else []:
        made = sample(gan.load_generator(file, c.network.device), len(fake), c.args.seed)
        step = int(file.stem[5:])
        rows.append({"step": step, "FID": metrics.fid(real, c.extract(made, f"features at step {step}"))})
        c.tell(f"FID at step {step}", f"{rows[-1]['FID']:.4f}", f"{len(real):,} real v {len(fake):,} fake")
    out = c.folder / "sweep.png"
    plots.save_curves(out, rows, [(f"FID of {len(fake):,} fakes, and of {len(other):,} other reals, against N reals",
                                  ("fake", "other reals"), "reals"),
                                 (f"FID over the run, {len(real):,} real v {len(fake):,} fake", ("FID",))])
    c.tell("sweep", f"{len(rows)} points", f"drawn in {out}", "sweep", points=rows)


def saved_generators(folder, most=12):
    files = sorted((folder / "generators").glob("step-*.pt"))
    return plots.evenly_spaced(files, most)


def report_tsne(c):
    path = c.args.tsne or c.folder / "tsne.png"
    sides = {side: c.features(side)[:DRAWN] for side in ("real", "fake")}
    for kind in ("gaussian", "radial"):
        sides[f"{kind} noise"] = c.extract(noise(kind, DRAWN // 6, c.real.images, c.args.seed), f"{kind} noise")
    y = metrics.tsne(torch.cat(list(sides.values())), c.args.perplexity, seed=c.args.seed, progress=True)
    plots.scatter(path, dict(zip(sides, y.split([len(f) for f in sides.values()]))))
    c.tell("t-SNE", f"{len(y):,} points", f"drawn in {path}; perplexity {c.args.perplexity:g}, seed {c.args.seed}")


def shuffled(source, n, seed):
    """A source with at most n of its pictures, in an order drawn at random: halves of it are fair."""
    if source.images is None:
        return source
    order = np.random.RandomState(seed).permutation(len(source.images))[:n]
    images = source.images if isinstance(source.images, data.ImageSubset) else np.moveaxis(source.images, 1, 3)
    label = source.label if n >= len(source.images) else f"{n:,} of {source.label}"
    return source._replace(images=data.ImageSubset(images, order), label=label)


def check_pairs(real, fake):
    """Raises ValueError unless picture k of --real belongs to picture k of --fake: one name, or one number of rows."""
    stems = [[str(Path(name).with_suffix("")) for name in source.names or ()] for source in (real, fake)]
    if stems[0] != stems[1]:
        odd = sorted(set(stems[0]) ^ set(stems[1]))
        raise ValueError(f"--pairs: a picture of --real belongs to that of --fake which has its name, and {len(odd)} "
                         f"have no partner, {odd[0] if odd else '(order)'} for one")
    if len(real.pictures()) != len(fake.pictures()):
        raise ValueError(f"--pairs: {real.label} and {fake.label} are not of one number")


def open_sources(args, device):
    """(real, fake, run), None for a fake that is still to be drawn and where no run is needed."""
    run = None if args.real and (args.fake or args.save_stats) else load_run(args.run, args.data, device)
    size = args.size or ("x".join(map(str, run.real.images.shape[2:])) if run else "")
    real = load_source(args.real, size, "--real") if args.real else run.real
    fake = load_source(args.fake, size, "--fake") if args.fake and not args.save_stats else None
    if args.pairs and fake:
        check_pairs(real, fake)
    return real, fake, run


def of_one_number(args, real, fake, run):
    """Both sides with --n pictures, in random order, which is the same for pairs; those of a run are drawn."""
    most = 10_000 if any(getattr(args, name) for name in WHAT) else DRAWN             # --tsne alone takes no more
    n = args.n or (most if real.images is None else min(most, len(real.images)))
    if fake is None:
        fake = Source(f"{n:,} pictures of {run.folder} at step {run.step}", sample(run.G, n, args.seed, progress=True))
    return shuffled(real, n, args.seed), shuffled(fake, n, args.seed)


def main(argv=None):
    args = parse_arguments(argv)
    with runtime.exit_on_user_error("evaluate.py"):
        device = runtime.pick_device(args.device)
        real, fake, run = open_sources(args, device)
        network = None
        if args.save_stats or args.tsne or any(getattr(args, name) for name in set(WHAT) - {"ssim", "memorisation"}):
            network = inception.load_features(args.features, args.weights, args.resize, device, args.dims)
            runtime.print_rank0(f"seen through: {network.name}")
        if args.save_stats:
            if real.images is None:
                raise ValueError(f"{real.label}: these are statistics already")
            mu, sigma = metrics.statistics(network(real.images, args.batch, "features"))
            runs.write_atomically(args.save_stats, lambda path: np.savez_compressed(path, mu=mu, sigma=sigma))
            return runtime.print_rank0(f"mu and sigma of {real.label} are in {args.save_stats}")
        c = Comparison(args, network, real, fake, run)
        runtime.print_rank0(f"real: {c.real.label}\nfake: {c.fake.label}")
        sizes = [source.images.shape[2:] for source in (c.real, c.fake) if source.images is not None]
        if len(set(sizes)) == 2:
            runtime.print_rank0("note: real {}x{}, fake {}x{}, each brought to 299x299 by itself; --size makes both one size "
                        "first".format(*sizes[0], *sizes[1]))
        table = {"fid": report_fid, "kid": report_kid, "is": report_is, "pr": report_pr, "ssim": report_ssim,
                 "ceiling": report_ceiling, "memorisation": report_memorisation, "sweep": report_sweep, "tsne": report_tsne}
        for name, tell in table.items():
            if getattr(args, name) or args.all:
                try:
                    tell(c)
                except ValueError as error:
                    if not args.all:
                        raise
                    runtime.print_rank0(f"{name}: left out: {error}")
        if c.json_path:
            runtime.print_rank0(f"all of it is in {c.json_path}")


if __name__ == "__main__":
    main()
