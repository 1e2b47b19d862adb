"""Scores of generated images: FID, KID, IS, precision and recall, density and coverage, SSIM, t-SNE, memorisation.

    python evaluate.py                                      FID and KID of the newest run against its training images
    python evaluate.py --reference heldout                  the same against the images it held out
    python evaluate.py --memorisation                       does it copy training images?
    python evaluate.py runs/wgan-teeth-1 --all              every score, tsne.png, sweep.png, memorisation.png
    python evaluate.py runs/wgan-* --csv runs.csv           a table over runs; beside it runs.png, samples of each
    python evaluate.py ./teeth ./made                       REAL FAKE: folders, arrays (.npy, .npz), statistics (.npz)
    python evaluate.py ./teeth runs/wgan-teeth-1            the images of a run against other real images
    python evaluate.py ./teeth --save-stats teeth.npz       statistics, as pytorch-fid saves and reads them

FID depends on the number of images, the feature network and the resize: all are printed, and beside them the floor,
which is what one half of the real images scores against the other. metrics.py has the equations and cites the papers.
"""

import contextlib
import csv
import json
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch

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

TSNE_IMAGES = 300                                           # of each kind

# One side of a comparison: uint8 images (N, C, H, W) and the names of their files, or only (mu, sigma) of features.
Source = namedtuple("Source", "label images names statistics", defaults=(None, None, None))


@torch.no_grad()
def sample(G, n, seed=0, batch=64, progress=""):
    """n images of G, as they would be on disk: uint8 (N, C, H, W), a function of (G, n, seed, batch) alone. G, in eval
    mode, so that no image depends on its batch, maps z (N, G.config["latent"]) to [-1, 1]."""
    device, random, out = next(G.parameters()).device, torch.Generator().manual_seed(seed), []
    for rows in runtime.batched_slices(n, batch, progress):
        z = torch.randn(rows.stop - rows.start, G.config["latent"], generator=random)
        out.append(plots.to_uint8(G(z.to(device))).cpu().contiguous())
    return torch.cat(out).numpy()


def load_source(path, size=None, flag="REAL", run=None):
    """A Source from uint8 images (.npy, .npz), statistics (.npz with mu and sigma), or a folder or idx file: in colour,
    at size (height, width) or the one that all have, cut as the images of `run`; exact copies count, as in an array."""
    cut = [run.saved["flags"][name] for name in ("fit", "crop")] if run else ["crop", ""]
    if path.endswith((".npy", ".npz")) and Path(path).exists():
        with contextlib.suppress(Exception):                 # it holds no statistics
            file = np.load(path, mmap_mode="r")
            return Source(f"statistics in {path}", statistics=(file["mu"], file["sigma"]))
        x = sources.read_array(Path(path))[0]
        if x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] == 4 or len(x) < 2:
            raise runtime.UserError(f"{flag} {path}: expected mu and sigma, or at least two images, uint8 (N, H, W, C) "
                                    f"or (N, C, H, W) with 1 or 3 channels, got {x.dtype} {x.shape}")
        return Source(f"{len(x):,} images of {path}", data.ImageSubset(x, range(len(x))))
    try:
        items, sizes = sources.find_items(path), {size} if size else set()
        for item in () if size else items:
            with contextlib.suppress(Exception):             # unreadable files are skipped later, and named
                im = decode.open_image(item.read())
                sizes.add(im.size if im.getexif().get(0x0112, 1) >= 5 else im.size[::-1])
        if len(sizes) > 1:
            raise runtime.UserError(f"--data {path}: images of {len(sizes)} sizes; bring them to one, as in --size 64")
        size = sizes.pop() if sizes else (64, 64)            # `load` says why none can be read
        dataset = data.load(path, size, *cut, channels="3", at_least=2)
        array, found = data.load_cached(path, items, decode.Preprocess(tuple(size), *cut, "3"))       # with the copies
    except (OSError, runtime.UserError) as error:
        raise runtime.UserError(runtime.describe_error(error).replace("--data", flag)) from error
    for line in data.describe(path, dataset._replace(skipped=found["skipped"])).splitlines()[1:]:
        runtime.print_rank0(line)
    return Source(f"{len(array):,} images of {path}", data.ImageSubset(array, range(len(array))), found["names"])


def shuffled(source, n, seed):
    """The source with at most n of its images, in random order, so that halves of them are fair."""
    if source.statistics:
        return source
    order = np.random.RandomState(seed).permutation(len(source.images))[:n]
    label = source.label if n >= len(source.images) else f"{n:,} of {source.label}"
    return source._replace(images=data.ImageSubset(source.images, order), label=label)


def open_run(path):
    """`runs.open_trained` of a run folder ("": the newest), its checkpoint.pt or a file in its generators/; None for
    anything else."""
    places = Path(path).parents[:2] if path.endswith(".pt") else [Path(path)]
    return runs.open_trained(path) if not path or any((f / "checkpoint.pt").is_file() for f in places) else None


def training_time(run):
    """Up to its step, without the pauses before a --resume; "-" where the log does not say."""
    seconds = [row.get("seconds") for row in runs.read_log(run.folder) if row["step"] <= (run.step or 0)]
    return runtime.format_duration(seconds[-1]) if seconds and seconds[-1] is not None else "-"


def make_evaluator(args, run, images):
    """For --evaluate-every: a function of (G, step) which logs `fid` and `kid` of --evaluate-n images of G, at latents
    that evaluate.py does not draw, and as many training images, and keeps the G of lowest KID as best.pt: a noisy
    minimum, scored against training images, which rewards copying."""
    extract = inception.load_features(args.evaluate_network, device=run.device)
    chosen = np.sort(np.random.RandomState(args.seed).permutation(len(images))[:args.evaluate_n])
    real = extract(images[chosen], "features of real images")
    seed = runtime.derive_seed(args.seed, 1)
    how = f"{len(real):,} real images v {args.evaluate_n:,} drawn by seed {seed}, through {extract.name}"
    runtime.print_rank0(f"FID and KID: {how}")

    def evaluate_generator(G, step):
        fake = extract(sample(G, args.evaluate_n, seed, args.batch))
        scores = dict(fid=metrics.fid(real, fake), kid=metrics.kid(real, fake)[0])
        run.log_once(**scores)
        best = {}
        with contextlib.suppress(Exception):                 # there is none yet, or it is damaged
            best = runtime.load_tensors(run.folder / "generators/best.pt")
        if best.get("how") != how or scores["kid"] < best["kid"]:                   # measured otherwise: replace it
            run.write("generators/best.pt", lambda path: gan.save_generator(path, G, **scores, step=step, how=how))

    return evaluate_generator


class Comparison:
    """Real and fake images, their features, the lines of the report. run: of either, or None; drawn: of the fakes."""

    def __init__(self, args, network, real, features, fake, run, drawn):
        self.args, self.network, self.run, self.drawn, self.found = args, network, run, drawn, {}
        self.real, self.fake = real, fake = real, shuffled(fake, args.n, args.seed)
        self.json_path = Path(args.json) if args.json else run.folder / "metrics.json" if drawn else None
        self.folder = run.folder if drawn else self.json_path and self.json_path.parent         # of what is drawn
        self.about = dict(real_is=real.label, fake_is=fake.label, seed=args.seed, step=run.step if drawn else None)
        self.about |= dict(features=network.name, resize=args.resize) if network else {}
        runtime.print_rank0(f"real: {real.label}\nfake: {fake.label}\njson: {self.json_path or 'none'}")
        self.features = network and (features, fake.images and network(fake.images, f"features of {fake.label}"))

    def halves(self):
        """Two disjoint sets of real features and one of fake, all of one size."""
        real, fake = self.features
        n = min(len(real) // 2, len(fake))
        return real[:n], real[n:2 * n], fake[:n]

    def noise_features(self, kind, n):
        """Features of noise with the mean and deviation of the real images in each channel. kind: "gaussian",
        independent pixels; "radial", that times (1 - distance from the centre / the largest)."""
        some, (_, c, h, w) = np.asarray(self.real.images[:1000], np.float32), self.real.images.shape
        x = np.random.RandomState(self.args.seed).standard_normal((n, c, h, w)).astype(np.float32)
        if kind == "radial":
            x *= (1 - np.hypot(np.linspace(-1, 1, h)[:, None], np.linspace(-1, 1, w)) / 2**0.5).astype(np.float32)
        x = some.mean((0, 2, 3), keepdims=True) + some.std((0, 2, 3), keepdims=True) * x
        return self.network(x.round().clip(0, 255).astype(np.uint8), f"features of {kind} noise")

    def add(self, title, value, note="", name="", digits=4, **more):
        """Print a line. With a name, it also goes into the table, value (if a number) and more into the JSON file."""
        text, more = (f"{value:.{digits}f}", dict(value=value, **more)) if isinstance(value, float) else (value, more)
        runtime.print_rank0(f"{title:<26} {text:>15}   {note}".rstrip())
        self.found[name] = text
        if name and self.json_path:
            try:
                scores = json.loads(self.json_path.read_text("utf-8")) if self.json_path.exists() else {}
                text = json.dumps({**scores, name: {**more, **self.about}}, indent=1) + "\n"
            except (ValueError, TypeError):
                raise runtime.UserError(f"--json {self.json_path}: expected scores, or no such file yet") from None
            try:
                runs.write_atomically(self.json_path, lambda path: path.write_text(text, "utf-8"))
            except OSError as error:                         # the scores to come are still worth their time
                runtime.print_rank0(f"the scores are printed only: {runtime.describe_error(error)}")
                self.json_path = None


def report_fid(c):
    """Frechet Inception distance and its floor (Heusel et al. 2017)"""
    if c.real.statistics or c.fake.statistics:
        a, b = (side.statistics or metrics.statistics(f) for side, f in zip((c.real, c.fake), c.features))
        return c.add("FID", metrics.frechet_distance(*a, *b), f"{c.real.label} v {c.fake.label}", "fid")
    (real, fake), (a, b, half) = c.features, c.halves()
    n, r, f = len(a), len(real), len(fake)
    below = "; below it, suspect copying" * (c.args.reference == "training")
    c.add("FID", metrics.fid(real, fake), f"{r:,} real v {f:,} fake", "fid", real=r, fake=f)
    c.add(f"  at N = {n:,}", metrics.fid(a, half), f"{n:,} real v {n:,} fake", "fid_half", n=n)
    c.add(f"  floor at N = {n:,}", metrics.fid(a, b), "real v other real" + below, "fid_floor", n=n)
    if min(r, f) < 2048:
        runtime.print_rank0("  note: under 2,048 images FID is too high: compare it only at the same N, or use KID")


def report_kid(c):
    """Kernel Inception distance and its floor, which is 0 up to chance (Binkowski et al. 2018)"""
    a, b, _ = c.halves()
    for title, name, x, y in (("KID", "kid", *c.features), (f"  floor at N = {len(a):,}", "kid_floor", a, b)):
        (mean, std), m = metrics.kid(x, y, seed=c.args.seed), min(1000, len(x), len(y))
        how = f"all {m:,} v {m:,} at once" if len(x) == len(y) == m else f"+- {std:.5f} over 100 subsets of {m:,}"
        c.add(title, mean, how, name, digits=5, std=std, subset=m)


def report_is(c):
    """Inception Score, for images of many classes (Salimans et al. 2016)"""
    if c.network.fc is None or min(map(len, c.features)) < 100:
        raise runtime.UserError("--is needs the classes of --network inception or random, and 100 images of each kind")
    (top, top_std), (mean, std) = (metrics.inception_score(f @ c.network.fc.cpu().T) for f in c.features)
    note = f"+- {std:.4f} over 10 parts; real images {top:.4f} +- {top_std:.4f}"
    c.add("Inception Score", mean, note, "is", std=std, real=top, real_std=top_std)


def report_pr(c):
    """precision, recall (Kynkaanniemi et al. 2019), density, coverage (Naeem et al. 2020); diversity of the pixels"""
    a, b, half = c.halves()
    for k, names, measure in ((3, ("precision", "recall"), metrics.precision_recall),
                              (5, ("density", "coverage"), metrics.density_coverage)):
        for name, value, top in zip(names, measure(a, half, k), measure(a, b, k)):
            c.add(name, value, f"k = {k}, N = {len(a):,}; other real images {top:.4f}", name, real=top, k=k, n=len(a))
    fake, top = (metrics.diversity(side.images[:256]).item() for side in (c.fake, c.real))
    if not top:
        raise metrics.NotDefined("all real images are alike, and diversity is measured by theirs")
    c.add("diversity", fake / top, "of that of real images; far under 1: mode collapse", "diversity", fake=fake)


def report_ssim(c):
    """MS-SSIM between two fakes, and between two real images; with --pairs PSNR, SSIM and MS-SSIM of the pairs"""
    real, fake = c.real.images, c.fake.images
    scales = max(1, sum(min(*real.shape[2:], *fake.shape[2:]) >= 11 * 2**j for j in range(5)))

    def mean(score, a, b, *more):
        return torch.cat([score(a[k], b[k], 255, *more) for k in runtime.batched_slices(len(a), 64)]).mean().item()

    if c.args.pairs:
        c.add("PSNR of pairs", mean(metrics.psnr, real, fake), "dB, whole images", "psnr")
        c.add("SSIM of pairs", mean(metrics.ssim, real, fake), "1: equal", "ssim")
        value, note = mean(metrics.ms_ssim, real, fake, scales), f"over {scales} scales"
        return c.add("MS-SSIM of pairs", value, note, "ms_ssim", scales=scales)
    top, value = (mean(metrics.ms_ssim, x[:half], x[half:2 * half], scales)           # in random order: any two
                  for x, half in ((x, min(len(x), 1000) // 2) for x in (real, fake)))
    c.add("MS-SSIM between fakes", value, f"between real images {top:.4f}, over {scales} scales; well above: too alike",
          "ms_ssim_diversity", real=top, scales=scales)


def report_ceiling(c):
    """FID of noise, the other end of the scale"""
    real, n = c.features[0], len(c.fake.images)
    for kind in ("gaussian", "radial"):
        value = metrics.fid(real, c.noise_features(kind, n))
        c.add(f"FID of {kind} noise", value, f"{len(real):,} real v {n:,}", f"fid_{kind}_noise")


def report_memorisation(c):
    """does the generator copy training images? Calibrated on held-out images"""
    fake, args, known = c.fake.images, c.args, c.real.images.array       # all of it: --n must not hide an original
    train, heldout = [part.images for part in data.load_of_run(c.run.saved, args.data)] if c.run else [
        data.ImageSubset(known, range(len(known))), None]
    if args.heldout:
        heldout = load_source(args.heldout, args.size or c.real.images.shape[2:], "--heldout", c.run).images
    if not heldout:
        raise runtime.UserError("--memorisation compares with real images not trained on: name them with --heldout")
    m = metrics.memorisation(train, heldout, fake, bool(c.run and c.run.saved["flags"]["flip"]))
    pairs, path = m.pop("pairs"), c.folder and c.folder / "memorisation.png"
    c.add("nearer than held-out", f"{m['share']:.2%}", f"of {m['fakes']:,} fakes; 95 %: {m['low']:.2%} to "
          f"{m['high']:.2%}; {m['expected']:.2%} expected of honest ones", "memorisation", **m)
    c.add("AuthPct", f"{m['authentic']:.2%}", f"of {m['held_out']:,} held-out images {m['authentic_held_out']:.2%}")
    c.add("median distance", m["ratio"], "x that of held-out images; far above 1: unlike any real one")
    verdict = "ALARM: too many fakes are too near to training images" if m["alarm"] else "no evidence of copying"
    runtime.print_rank0(f"  {verdict} at 32x32 pixels (p-value {m['chance']:.2g}); the eight closest are "
                        f"{f'in {path}' if path else 'drawn beside --json FILE'}")
    if path:
        nearest = np.stack([train[k][..., ::-1] if mirrored else train[k] for _, k, _, mirrored in pairs])
        rows = ("fakes", fake[[k for k, *_ in pairs]]), ("nearest training images", nearest)
        runs.write_atomically(path, plots.captioned_grid([(t, torch.from_numpy(x), None) for t, x in rows]).save)


def report_sweep(c):
    """sweep.png: FID against the number of real images, and over the run"""
    real, fake = c.features
    other, rows, path = real[len(real) // 2:], [], c.folder / "sweep.png"
    for n in np.unique(np.linspace(max(2, len(real) // 20), len(real), 10).round().astype(int)):
        rows.append({"reals": int(n), "fake": metrics.fid(real[:n], fake)})
        if n <= len(real) // 2:
            rows[-1]["other reals"] = metrics.fid(real[:n], other)
    against = f"{len(real):,} real v {len(fake):,} fake"
    files = sorted(file for file in c.folder.glob("generators/step-*.pt") if file.stem[5:].isdigit())
    for file in plots.evenly_spaced(files, 12) if c.drawn else []:
        step, G = int(file.stem[5:]), gan.load_generator(file, c.network.device)
        made = fake if step == c.run.step else c.network(sample(G, len(fake), c.args.seed), f"features at step {step}")
        rows.append({"step": step, "FID": metrics.fid(real, made)})
        c.add(f"FID at step {step}", rows[-1]["FID"], against)
    title = f"FID of {len(fake):,} fakes, and of {len(other):,} other reals, against N reals"
    runs.write_atomically(path, plots.save_curves, rows, [(title, ("fake", "other reals"), "reals"),
                                                          (f"FID over the run, {against}", ("FID",))])
    c.add("sweep", f"{len(rows)} points", f"drawn in {path}", "sweep", points=rows)


def report_tsne(c):
    """draw real, fake and noise in the plane by t-SNE, into FILE (van der Maaten and Hinton 2008)"""
    path = Path(c.args.tsne or c.folder / "tsne.png")
    groups = {side: features[:TSNE_IMAGES] for side, features in zip(("real", "fake"), c.features)}
    groups |= {f"{kind} noise": c.noise_features(kind, TSNE_IMAGES // 6) for kind in ("gaussian", "radial")}
    y = metrics.tsne(torch.cat(list(groups.values())), seed=c.args.seed)
    runs.write_atomically(path, plots.scatter, dict(zip(groups, y.split([len(f) for f in groups.values()]))))
    perplexity = min(30, (len(y) - 1) / 3)
    c.add("t-SNE", f"{len(y):,} points", f"drawn in {path}; perplexity {perplexity:g}, seed {c.args.seed}")


REPORTS = {"fid": report_fid, "kid": report_kid, "is": report_is, "pr": report_pr, "ssim": report_ssim,
           "ceiling": report_ceiling, "memorisation": report_memorisation, "sweep": report_sweep, "tsne": report_tsne}


def report_table(args, network, rows):
    """Rows (run, {score: text}, eight images) as Markdown, and as --csv FILE with a strip of the images beside it."""
    names = "fid", "fid_half", "fid_floor", "kid", "kid_floor", "precision", "recall", "diversity"
    cells = [["run", "script", "data", "size", "step", "training time", "N", *names]]
    for run, found, _ in rows:
        flags, scores = run.saved["flags"], [found.get(name, "-") for name in names]
        cells.append([f"{run.path}", run.saved["script"], flags["data"], flags["size"], f"{run.step or '-'}",
                      training_time(run), f"{args.n}", *scores])
    widths = [max(map(len, column)) for column in zip(*cells)]
    for line in (cells[0], ["-" * width for width in widths], *cells[1:]):
        runtime.print_rank0("| " + " | ".join(map(str.ljust, line, widths)) + " |")
    runtime.print_rank0(f"fid_half, precision, recall and the floors (real v other real) are at N = {args.n // 2:,}; "
                        f"features: {network.name if network else 'none'}")
    if args.csv:
        path = args.csv[:-4] + ".png"
        strip = [(run.label, torch.from_numpy(images), None) for run, _, images in rows]
        runs.write_atomically(path, plots.captioned_grid(strip).save)
        with open(args.csv, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(cells)
        runtime.print_rank0(f"the table is in {args.csv}, samples of each run in {path}")


def parse_arguments(argv=None):
    parser = cli.Parser("evaluate.py", __doc__)
    parser.add_argument("sources", nargs="*", help="REAL FAKE: folders, arrays or runs; or runs (default: newest run)")
    default = "default: --fid --kid; of several runs also --pr; of --pairs --ssim"
    add = parser.add_argument_group(f"scores ({default})").add_argument
    for name, report in REPORTS.items():
        add(f"--{name}", help=report.__doc__, **dict(metavar="FILE") if name == "tsne" else dict(action="store_true"))
    add("--all", action="store_true", help="all of these, t-SNE into tsne.png (default: off)")
    add("--json", default="", metavar="FILE", help="where the scores go (default: metrics.json of the run)")
    add("--csv", default="", metavar="FILE", help="write the table over runs, samples beside it (default: print only)")
    add("--save-stats", default="", metavar="NPZ", help="write mu and sigma of real images, no scores (default: no)")
    add = parser.add_argument_group("images").add_argument
    add("--data", default="", help="where the run's images are now (default: where they were when it was trained)")
    add("--reference", default="training", choices=("training", "heldout"), help="a run's real set (default: training)")
    add("--heldout", default="", metavar="DIR", help="real images not trained on, to find copies (default: the run's)")
    add("--pairs", action="store_true", help="image k of REAL belongs to image k of FAKE (default: no pairs)")
    add("--size", default="", help="resize the images of folders first, to 64 or 288x512 (default: do not)")
    add("--n", type=cli.number(int, 2), help="images of each kind (default: as many as are real, at most 10,000)")
    add("--seed", type=cli.number(int, 0, 2**32), default=0, help="seed of all random draws (default: %(default)s)")
    add = parser.add_argument_group("feature network").add_argument
    add("--network", default="inception", help="inception, random or a TorchScript or .pt2 file (default: %(default)s)")
    add("--weights", default="", metavar="FILE", help="weights of inception (default: torch's cache, else a download)")
    add("--resize", default="pytorch-fid", choices=inception.RESIZES, help="whose resize to use (default: %(default)s)")
    add("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu (default: %(default)s)")
    args = parser.parse_intermixed_args(argv)
    args.size = args.size and decode.parse_size(args.size)
    return args


def check_sources(args, given, opened):
    """UserError for sources that make no comparison. opened: `open_run` of each of those given."""
    others, several = [path for path, run in zip(given, opened) if not run], len(given) > 1
    last = ["", *others][-1]
    same = {"{} images, {} channels, {}x{}, checksum {}, --fit {fit}, --crop {crop!r}".format(
        *run.saved["same"]["images"], **run.saved["flags"]): path for path, run in zip(given, opened) if run}
    for is_wrong, sentence in (
            (args.csv and not args.csv.lower().endswith(".csv"), f"--csv: expected FILE.csv, got {args.csv}"),
            (several and args.save_stats, f"--save-stats: expected one source, got {len(given)}"),
            (last.endswith(".pt"), f"{last}: in no run folder; draw its images with generate.py --out"),
            (others and (len(given) != 2 or args.csv) and not args.save_stats,
             f"expected REAL FAKE, or runs alone; {' and '.join(others)}: no checkpoint.pt there, so no run"),
            (args.reference == "heldout" and not opened[0], f"--reference heldout: expected a run, got {given[0]}"),
            ((args.all or args.sweep) and not (opened[-1] or args.json), "--all and --sweep need a place: --json FILE"),
            (several and not others and (args.json or args.tsne), "--json FILE and --tsne FILE are of one run"),
            (args.tsne and Path(args.tsne).suffix.lower() not in (".png", ".jpg"), "--tsne: expected FILE.png, .jpg"),
            (len(same) > 1, "expected runs on the same images; " + "; ".join(f"{same[key]}: {key}" for key in same))):
        if is_wrong:
            raise runtime.UserError(sentence)


@runtime.exit_on_user_error("evaluate.py")
def main(argv=None):
    args = parse_arguments(argv)
    given, device = args.sources or [""], runtime.pick_device(args.device)
    opened = [open_run(path) for path in given]
    check_sources(args, given, opened)
    drawn = [(one, gan.load_generator(one.path, device)) for one in opened if one and opened[-1]]     # it may yet train
    run, table = next(filter(None, opened), None), args.csv or len(opened) > 1 and all(opened)
    size, heldout = args.size or run and tuple(run.saved["same"]["images"][2:4]), args.reference == "heldout"
    part = opened[0] and data.load_of_run(run.saved, args.data)[heldout]
    real = load_source(given[0], size, "REAL", run) if not part else Source(
        f"{len(part.images):,} {args.reference} images of {args.data or run.saved['flags']['data']}"
        f"{', the most that N can be' * heldout}", part.images)
    fake = None if opened[-1] or args.save_stats else load_source(given[1], size, "FAKE")
    statistics = [source.label for source in (real, fake) if source and source.statistics]
    usual = ["ssim"] if args.pairs else ["fid"] + ["kid"] * (not statistics) + ["pr"] * bool(table)
    chosen = [name for name in REPORTS if args.all or getattr(args, name)] or usual
    if statistics and (args.save_stats or args.pairs or chosen != ["fid"]):
        raise runtime.UserError(f"{statistics[0]}: statistics do for --fid alone; give images for anything else")
    stems = [[name.rpartition(".")[0] for name in source.names or ()] for source in (real, fake) if source]
    if args.pairs and (not fake or stems[0] != stems[1] or real.images.shape != fake.images.shape):
        raise runtime.UserError("--pairs: expected REAL FAKE, images of one number, one size, and the same names")
    network = None
    if args.save_stats or set(chosen) - {"ssim", "memorisation"}:
        network = inception.load_features(args.network, args.weights, args.resize, device)
        runtime.print_rank0(f"features: {network.name}")
    if args.save_stats:
        mu, sigma = metrics.statistics(network(real.images, "features of real images"))
        path = args.save_stats.removesuffix(".npz") + ".npz"                          # numpy insists
        runs.write_atomically(path, lambda path: np.savez_compressed(path, mu=mu, sigma=sigma))
        return runtime.print_rank0(f"mu and sigma of {real.label} are in {path}")
    most = args.n or (TSNE_IMAGES if chosen == ["tsne"] else 10_000)
    args.n = most if statistics or args.n and not table and not heldout else min(most, len(real.images))
    if args.n < 2:
        raise runtime.UserError(f"{real.label}: at least two are needed")
    real, rows = shuffled(real, args.n, args.seed), []
    features = network and real.images and network(real.images, f"features of {real.label}")
    for one, G in drawn or [(run, None)]:
        x = None if fake else sample(G, args.n, args.seed, progress="sampling")
        made = fake or Source(
            f"{len(x):,} images of {one.label}", data.ImageSubset(np.moveaxis(x, 1, 3), range(len(x))))
        if not statistics and real.images.shape[2:] != made.images.shape[2:]:
            runtime.print_rank0(f"note: {real.images.shape[2:]} v {made.images.shape[2:]} pixels; --size makes it one")
        c = Comparison(args, network, real, features, made, one, drawn=not fake)
        for name in chosen:
            try:
                REPORTS[name](c)
            except (metrics.NotDefined, runtime.UserError, OSError) as error:        # OSError: a folder only read
                if not args.all and (getattr(args, name) or not table):
                    raise runtime.UserError(runtime.describe_error(error)) from error
                runtime.print_rank0(f"{name}: skipped: {runtime.describe_error(error)}")
        rows.append((one, c.found, c.fake.images and c.fake.images[:8]))
    if table:
        report_table(args, network, rows)


if __name__ == "__main__":
    main()
