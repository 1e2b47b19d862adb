"""Scores of generated images: FID, KID, IS, precision and recall, density and coverage, SSIM, t-SNE, memorisation.

    python evaluate.py                                      FID and KID of the newest run against its training images
    python evaluate.py runs/wgan-teeth-1 --all              every score, tsne.png, sweep.png, memorisation.png
    python evaluate.py --network random                     no download; scores compare only with one another
    python evaluate.py --real ./teeth --fake ./made         two folders, or arrays (.npy, .npz), or statistics (.npz)
    python evaluate.py --memorisation                       does it copy training images?

Real and fake images pass through the same code: uint8, one resize, one network. FID depends on the number of images,
the network and the resize: all are printed, and beside them the floor, which is what one half of the real images scores
against the other. The scores are functions of metrics.py, which cites the papers.
"""

import argparse
import contextlib
import functools
import json
import os
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

SCRIPTS = ("train_wgan.py", "train_dcgan.py")               # their generators draw from z
TSNE_IMAGES = 300                                           # of each kind

# One side of a comparison: uint8 images (N, C, H, W) and the names of their files, or only (mu, sigma) of features.
Source = namedtuple("Source", "label images names statistics", defaults=(None, None, None))


@torch.no_grad()
def sample(G, n, seed=0, batch=64, progress=""):
    """n images of G, as they would be on disk: uint8 (N, C, H, W), a function of (G, n, seed, batch) alone. G maps z
    (N, G.config["latent"]) to [-1, 1] and is in eval mode meanwhile, so that no image depends on its batch."""
    device, training = next(G.parameters()).device, G.training
    random, out = torch.Generator().manual_seed(seed), []
    G.eval()
    for rows in runtime.batched_slices(n, batch, progress):
        z = torch.randn(rows.stop - rows.start, G.config["latent"], generator=random)
        out.append(plots.to_uint8(G(z.to(device))).cpu().contiguous())
    G.train(training)
    return torch.cat(out).numpy()


def noise(kind, n, like, seed=0):
    """n images of noise, uint8, with the mean and deviation of the images `like` in each channel. kind: "gaussian",
    independent pixels; "radial", that noise times (1 - distance from the centre / the largest)."""
    random, (_, c, h, w) = np.random.RandomState(seed), like.shape
    some = np.asarray(like[:1000], np.float32)
    mean, std = (f((0, 2, 3), keepdims=True) for f in (some.mean, some.std))
    g = random.standard_normal((n, c, h, w)).astype(np.float32)
    if kind == "radial":
        g *= (1 - np.hypot(np.linspace(-1, 1, h)[:, None], np.linspace(-1, 1, w)) / 2**0.5).astype(np.float32)
    return (mean + std * g).round().clip(0, 255).astype(np.uint8)


def load_source(path, size=None, flag="--real"):
    """A Source from uint8 images (.npy, .npz), statistics (.npz with mu and sigma), or a folder or idx file: in colour,
    at size (height, width) or their own; exact copies count, as in an array."""
    if path.endswith((".npy", ".npz")):
        return load_array(path, flag)
    try:
        items = sources.find_items(path)
        size = size or common_size(items, path, flag)
        dataset = data.load(path, size, channels="3")
        array, found = data.load_cached(path, items, decode.Preprocess(tuple(size), channels="3"))    # with the copies
    except (OSError, runtime.UserError) as error:
        raise runtime.UserError(runtime.describe_error(error).replace("--data", flag)) from error
    for line in data.describe(path, dataset._replace(skipped=found["skipped"])).splitlines()[1:]:
        runtime.print_rank0(line)
    return Source(f"{len(array):,} images of {path}", data.ImageSubset(array, range(len(array))), found["names"])


def load_array(path, flag):
    try:
        loaded = np.load(path)
        arrays = dict(loaded) if hasattr(loaded, "files") else {"": loaded}
    except Exception as error:
        raise runtime.UserError(f"{flag} {path} cannot be read ({runtime.first_line(error)})") from error
    if {"mu", "sigma"} <= arrays.keys():
        return Source(f"statistics in {path}", statistics=(arrays["mu"], arrays["sigma"]))
    images = next((x for x in arrays.values() if x.ndim == 4 and x.dtype == np.uint8), np.empty((0, 1, 1, 1)))
    images = images if images.shape[1] in (1, 3) else images.transpose(0, 3, 1, 2)
    if images.shape[1] not in (1, 3) or not len(images):
        raise runtime.UserError(f"{flag} {path} holds neither statistics (mu, sigma) nor images: expected uint8 "
                                "(N, C, H, W) or (N, H, W, C) with 1 or 3 channels")
    return Source(f"{len(images):,} images of {path}", images)


def common_size(items, path, flag):
    """(height, width), if all images have the same."""
    sizes = set()
    for item in items:
        with contextlib.suppress(Exception):                 # unreadable files are skipped later, and named
            im = decode.open_image(item.read())
            sizes.add(im.size if im.getexif().get(0x0112, 1) >= 5 else im.size[::-1])
    if len(sizes) > 1:
        raise runtime.UserError(f"{flag} {path} holds images of {len(sizes)} sizes: bring them to one, as in --size 64")
    return sizes.pop() if sizes else (64, 64)                # `load` says why none can be read


def shuffled(source, n, seed):
    """The source with at most n of its images, in random order, so that halves of them are fair."""
    if source.statistics:
        return source
    order = np.random.RandomState(seed).permutation(len(source.images))[:n]
    images = source.images if isinstance(source.images, data.ImageSubset) else np.moveaxis(source.images, 1, 3)
    label = source.label if n >= len(images) else f"{n:,} of {source.label}"
    return source._replace(images=data.ImageSubset(images, order), label=label)


def load_run(path, where="", device="cpu"):
    """The run folder `path` ("": the newest), or one file of its generators/; where: its images are there now. Returns
    folder, step, G (the averaged generator), real (a Source, its training images), heldout and flip."""
    file = Path(path) if path.endswith(".pt") and Path(path).is_file() else None
    folder = runs.find_run(os.path.relpath(file.absolute().parent.parent) if file else path, SCRIPTS)
    saved = runs.read_checkpoint(folder)
    flags = argparse.Namespace(**{**saved["flags"], **({"data": where} if where else {})})
    G, step = gan.load_generator(file or folder, device), saved["step"]
    if file:
        step = int(file.stem[5:]) if file.stem[5:].isdigit() else torch.load(file, weights_only=True).get("step", step)
    train, heldout = data.load_from_args(flags, "train"), data.load_from_args(flags, "heldout", 0).images
    real = Source(f"{len(train.images):,} training images of {flags.data}", train.images, train.names)
    return argparse.Namespace(folder=folder, G=G, step=step, real=real, heldout=heldout, flip=flags.flip)


def extract_features(network, images, what):
    return network(images, runtime.batched_slices(len(images), network.batch, f"features of {what}"))


def make_evaluator(args, run, images):
    """For --evaluate-every: a function of (G, step) which logs `fid` and `kid` of --evaluate-n images of G and as many
    training images, and keeps the G of lowest KID as best.pt: a noisy minimum, so score it again by another --seed."""
    extract = inception.load_features(args.evaluate_network, device=run.device)
    chosen = np.sort(np.random.RandomState(args.seed).permutation(len(images))[:args.evaluate_n])
    real = extract_features(extract, images[chosen], "real images")
    how = f"{len(real):,} real images v {args.evaluate_n:,} drawn, through {extract.name}"
    runtime.print_rank0(f"FID and KID: {how}")

    def evaluate_generator(G, step):
        fake = extract(sample(G, args.evaluate_n, args.seed, args.batch))
        scores = dict(fid=metrics.fid(real, fake), kid=metrics.kid(real, fake)[0])
        run.log_once(**scores)
        path = run.folder / "generators" / "best.pt"
        best = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else {}
        if scores["kid"] < best.get("kid", np.inf) or best["how"] != how:           # measured otherwise: replace it
            run.write("generators/best.pt", lambda path: gan.save_generator(path, G, **scores, step=step, how=how))

    return evaluate_generator


class Comparison:
    """Real and fake images, their features (extracted on first use), and the lines of the report."""

    def __init__(self, args, network, real, fake, run):
        self.args, self.network, self.run = args, network, run
        self.train = run.real if run else real              # all of them: --n must not hide an original
        self.real, self.fake = real, fake = shuffled(real, args.n, args.seed), shuffled(fake, args.n, args.seed)
        self.folder = run.folder if run else Path(".")
        self.json_path = Path(args.json) if args.json else run.folder / "metrics.json" if run else None
        self.about = dict(real_is=real.label, fake_is=fake.label, seed=args.seed,
                          **(dict(features=network.name, resize=args.resize) if network else {}),
                          **(dict(step=run.step) if run else {}))

    @functools.cached_property
    def features(self):                                     # of the real and of the fake images
        return [extract_features(self.network, side.images, side.label) for side in (self.real, self.fake)]

    def halves(self):
        """Two disjoint sets of real features and one of fake, all of one size."""
        real, fake = self.features
        n = min(len(real) // 2, len(fake))
        if n < 2:
            raise metrics.NotDefined(f"too few to compare: {len(real)} real, {len(fake)} fake; take at least 4 and 2")
        return real[:n], real[n:2 * n], fake[:n]

    def noise_features(self, kind, n):
        return extract_features(self.network, noise(kind, n, self.real.images, self.args.seed), f"{kind} noise")

    def add(self, title, value, note="", name="", digits=4, **more):
        """Print a line; with a name, value (if a number) and more also go into the JSON file, at once."""
        text, more = (f"{value:.{digits}f}", dict(value=value, **more)) if isinstance(value, float) else (value, more)
        runtime.print_rank0(f"{title:<26} {text:>15}   {note}".rstrip())
        if name and self.json_path:
            scores = json.loads(self.json_path.read_text("utf-8")) if self.json_path.exists() else {}
            text = json.dumps({**scores, name: {**more, **self.about}}, indent=1) + "\n"
            runs.write_atomically(self.json_path, lambda path: path.write_text(text, "utf-8"))


def report_fid(c):
    """Frechet Inception distance and its floor (Heusel et al. 2017)"""
    if c.real.statistics or c.fake.statistics:
        sides = [side.statistics or metrics.statistics(extract_features(c.network, side.images, side.label))
                 for side in (c.real, c.fake)]
        return c.add("FID", metrics.frechet_distance(*sides[0], *sides[1]), f"{c.real.label} v {c.fake.label}", "fid")
    (real, fake), (a, b, half) = c.features, c.halves()
    n, r, f = len(a), len(real), len(fake)
    c.add("FID", metrics.fid(real, fake), f"{r:,} real v {f:,} fake", "fid", real=r, fake=f)
    c.add(f"  at N = {n:,}", metrics.fid(a, half), f"{n:,} real v {n:,} fake", "fid_half", n=n)
    c.add(f"  floor at N = {n:,}", metrics.fid(a, b), "real v other real; below it, suspect copying", "fid_floor", n=n)
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
    if c.network.fc is None:
        raise runtime.UserError("--is needs the classes of inception: not with a network of your own")
    if min(map(len, c.features)) < 100:
        raise metrics.NotDefined("--is takes means over ten parts: it needs at least 100 images of each kind")
    (top, top_std), (mean, std) = (metrics.inception_score(f @ c.network.fc.cpu().T) for f in c.features)
    note = f"+- {std:.4f} over 10 parts; real images {top:.4f} +- {top_std:.4f}"
    c.add("Inception Score", mean, note, "is", std=std, real=top, real_std=top_std)


def report_pr(c):
    """precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020)"""
    a, b, half = c.halves()
    for k, names, measure in ((3, ("precision", "recall"), metrics.precision_recall),
                              (5, ("density", "coverage"), metrics.density_coverage)):
        for name, value, top in zip(names, measure(a, half, k), measure(a, b, k)):
            c.add(name, value, f"k = {k}, N = {len(a):,}; other real images {top:.4f}", name, real=top, k=k, n=len(a))


def report_ssim(c):
    """MS-SSIM between two fakes, and between two real images; with --pairs PSNR, SSIM and MS-SSIM of the pairs"""
    real, fake = c.real.images, c.fake.images
    scales = max(1, sum(min(*real.shape[2:], *fake.shape[2:]) >= 11 * 2**j for j in range(5)))
    if c.args.pairs:
        psnr, ssim, ms_ssim = mean_similarity(real, fake, scales)
        c.add("PSNR of pairs", psnr, "dB, whole images", "psnr")
        c.add("SSIM of pairs", ssim, "1: equal", "ssim")
        return c.add("MS-SSIM of pairs", ms_ssim, f"over {scales} scales", "ms_ssim", scales=scales)
    if min(len(real), len(fake)) < 2:
        raise metrics.NotDefined("--ssim needs at least two images of each kind")
    top, value = (mean_similarity(x[:half], x[half:2 * half], scales)[2]              # in random order: any two
                  for x, half in ((x, min(len(x), 1000) // 2) for x in (real, fake)))
    c.add("MS-SSIM between fakes", value, f"between real images {top:.4f}, over {scales} scales; well above: too alike",
          "ms_ssim_diversity", real=top, scales=scales)


def mean_similarity(a, b, scales):
    """Mean PSNR, SSIM and MS-SSIM of uint8 pairs."""
    parts = [torch.stack([metrics.psnr(x, y, 255), metrics.ssim(x, y, 255), metrics.ms_ssim(x, y, 255, scales)])
             for x, y in ((a[rows], b[rows]) for rows in runtime.batched_slices(len(a), 64))]
    return torch.cat(parts, 1).mean(1).tolist()


def report_ceiling(c):
    """FID of noise, the other end of the scale"""
    real, n = c.features[0], len(c.fake.images)
    for kind in ("gaussian", "radial"):
        value = metrics.fid(real, c.noise_features(kind, n))
        c.add(f"FID of {kind} noise", value, f"{len(real):,} real v {n:,}", f"fid_{kind}_noise")


def report_memorisation(c):
    """does the generator copy training images? Calibrated on held-out images"""
    train, fake, args = c.train.images, c.fake.images, c.args
    heldout = load_source(args.heldout, args.size, "--heldout").images if args.heldout else c.run and c.run.heldout
    if heldout is None:
        raise runtime.UserError("--memorisation compares with real images not trained on: name them with --heldout")
    m = metrics.memorisation(train, heldout, fake, bool(c.run and c.run.flip))
    pairs, path = m.pop("pairs"), c.folder / "memorisation.png"
    c.add("nearer than held-out", f"{m['share']:.2%}", f"of {m['fakes']:,} fakes; 95 %: {m['low']:.2%} to "
          f"{m['high']:.2%}; {m['expected']:.2%} expected of honest ones", "memorisation", **m)
    c.add("AuthPct", f"{m['authentic']:.2%}", f"of {m['held_out']:,} held-out images {m['authentic_held_out']:.2%}")
    c.add("median distance", m["ratio"], "x that of held-out images; far above 1: unlike any real one")
    originals = [train[k][..., ::-1] if mirrored else train[k] for _, k, _, mirrored in pairs]
    plots.captioned_grid([(title, [torch.from_numpy(x.copy()) for x in images], None) for title, images in (
        ("fakes", [fake[k] for k, *_ in pairs]), ("nearest training images", originals))]).save(path)
    verdict = "ALARM: too many fakes are too near to training images" if m["alarm"] else "no evidence of copying"
    runtime.print_rank0(f"  {verdict} at 32x32 pixels (p-value {m['chance']:.2g}); the eight closest are in {path}")


def report_sweep(c):
    """sweep.png: FID against the number of real images, and over the run"""
    real, fake = c.features
    other, rows, path = real[len(real) // 2:], [], c.folder / "sweep.png"
    for n in np.unique(np.linspace(max(2, len(real) // 20), len(real), 10).round().astype(int)):
        rows.append({"reals": int(n), "fake": metrics.fid(real[:n], fake)})
        if n <= len(real) // 2:
            rows[-1]["other reals"] = metrics.fid(real[:n], other)
    against = f"{len(real):,} real v {len(fake):,} fake"
    for file in plots.evenly_spaced(sorted(c.folder.glob("generators/step-*.pt")), 12) if c.run else []:
        step, G = int(file.stem[5:]), gan.load_generator(file, c.network.device)
        made = extract_features(c.network, sample(G, len(fake), c.args.seed), f"images at step {step}")
        rows.append({"step": step, "FID": metrics.fid(real, made)})
        c.add(f"FID at step {step}", rows[-1]["FID"], against)
    plots.save_curves(path, rows, [(f"FID of {len(fake):,} fakes, and of {len(other):,} other reals, against N reals",
                                    ("fake", "other reals"), "reals"), (f"FID over the run, {against}", ("FID",))])
    c.add("sweep", f"{len(rows)} points", f"drawn in {path}", "sweep", points=rows)


def report_tsne(c):
    """draw real, fake and noise in the plane by t-SNE, into FILE (van der Maaten and Hinton 2008)"""
    path = c.args.tsne or c.folder / "tsne.png"
    groups = {side: features[:TSNE_IMAGES] for side, features in zip(("real", "fake"), c.features)}
    groups |= {f"{kind} noise": c.noise_features(kind, TSNE_IMAGES // 6) for kind in ("gaussian", "radial")}
    y = metrics.tsne(torch.cat(list(groups.values())), c.args.perplexity, seed=c.args.seed, progress=lambda steps: (
        rows.start for rows in runtime.batched_slices(len(steps), 1, "t-SNE")))
    plots.scatter(path, dict(zip(groups, y.split([len(f) for f in groups.values()]))))
    c.add("t-SNE", f"{len(y):,} points", f"drawn in {path}; perplexity {c.args.perplexity:g}, seed {c.args.seed}")


REPORTS = {report.__name__.removeprefix("report_"): report for report in (
    report_fid, report_kid, report_is, report_pr, report_ssim, report_ceiling, report_memorisation, report_sweep,
    report_tsne)}


def parse_arguments(argv=None):
    parser = cli.Parser("evaluate.py", __doc__)
    parser.add_argument("run", nargs="?", default="", help="run folder or file of its generators/ (default: newest)")
    add = parser.add_argument_group("scores (default: --fid --kid)").add_argument
    for name, report in REPORTS.items():
        add(f"--{name}", help=report.__doc__, **dict(metavar="FILE") if name == "tsne" else dict(action="store_true"))
    add("--all", action="store_true", help="all of these, t-SNE into tsne.png (default: off)")
    add("--json", default="", metavar="FILE", help="where the scores go (default: metrics.json of the run)")
    add("--save-stats", default="", metavar="NPZ", help="write mu and sigma of real images, no scores (default: no)")
    add = parser.add_argument_group("images").add_argument
    add("--data", default="", help="where the run's images are now (default: where they were when it was trained)")
    add("--real", default="", help="real images: a folder, idx file, array (.npy, .npz) or statistics (.npz of mu, "
        "sigma) (default: the run's training images)")
    add("--fake", default="", help="generated images, as in --real (default: drawn from the run's generator)")
    add("--heldout", default="", metavar="DIR", help="real images not trained on, to find copies (default: the run's)")
    add("--pairs", action="store_true", help="image k of --real belongs to image k of --fake (default: no pairs)")
    add("--size", type=decode.parse_size, help="resize the images of folders first, to 64 or 288x512 (default: do not)")
    add("--n", type=cli.positive_int, help="images of each kind (default: as many as are real, at most 10,000)")
    add("--seed", type=cli.number(int, 0, 2**32), default=0, help="seed of all random draws (default: %(default)s)")
    add = parser.add_argument_group("feature network").add_argument
    add("--network", default="inception", help="inception; random, that with random weights; or your own file, "
        "TorchScript or torch.export (default: %(default)s)")
    add("--weights", default="", metavar="FILE", help="weights of inception (default: torch's cache, else a download)")
    add("--resize", default="pytorch-fid", choices=inception.RESIZES, help="whose resize to use (default: %(default)s)")
    add("--batch", type=cli.number(int, 0), default=0, help="images per pass; 0: 16 on CPU, else 128 (default: 0)")
    add("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu (default: %(default)s)")
    add("--perplexity", type=cli.number(float, 1), default=30.0, help="perplexity of t-SNE (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.save_stats and not args.save_stats.endswith(".npz"):
        parser.error(f"--save-stats: expected a file that ends in .npz, got {args.save_stats!r}")
    if args.run and args.real and args.fake:
        parser.error("with --real and --fake there is nothing to take from a run: leave it out")
    if args.pairs and not (args.real and args.fake):
        parser.error("--pairs compares image by image: give --real and --fake")
    return args


def check_pairs(real, fake):
    """UserError unless image k of --real belongs to image k of --fake: of one name (files), of one number and size."""
    stems = [{str(Path(name).with_suffix("")) for name in source.names or ()} for source in (real, fake)]
    odd = sorted(stems[0] ^ stems[1])
    if odd:
        raise runtime.UserError(f"--pairs: files pair by name, and {len(odd)} have no partner, {odd[0]} for one")
    if real.statistics or fake.statistics or real.images.shape != fake.images.shape:
        raise runtime.UserError(f"--pairs: {real.label} and {fake.label} are not images of one number and size")


def main(argv=None):
    args = parse_arguments(argv)
    with runtime.exit_on_user_error("evaluate.py"):
        device = runtime.pick_device(args.device)
        run = None if args.real and (args.fake or args.save_stats) else load_run(args.run, args.data, device)
        size = args.size or (run.real.images.shape[2:] if run else None)
        real = load_source(args.real, size, "--real") if args.real else run.real
        fake = load_source(args.fake, size, "--fake") if args.fake and not args.save_stats else None
        if args.pairs and fake:
            check_pairs(real, fake)
        statistics = [source.label for source in (real, fake) if source and source.statistics]
        chosen = [name for name in REPORTS if args.all or getattr(args, name)]
        chosen = chosen or (["fid"] if statistics else ["fid", "kid"])
        if args.save_stats and (statistics or len(real.images) < 2):
            raise runtime.UserError(f"--save-stats: expected at least two images, got {real.label}")
        if statistics and chosen != ["fid"]:
            raise runtime.UserError(f"{statistics[0]}: statistics do for --fid alone; give images for anything else")
        network = None
        if args.save_stats or set(chosen) - {"ssim", "memorisation"}:
            network = inception.load_features(args.network, args.weights, args.resize, device)
            network.batch = args.batch or network.batch
            runtime.print_rank0(f"features: {network.name}")
        if args.save_stats:
            mu, sigma = metrics.statistics(extract_features(network, real.images, "real images"))
            runs.write_atomically(args.save_stats, lambda path: np.savez_compressed(path, mu=mu, sigma=sigma))
            return runtime.print_rank0(f"mu and sigma of {real.label} are in {args.save_stats}")
        limit = TSNE_IMAGES if chosen == ["tsne"] else 10_000
        args.n = args.n or (limit if statistics else min(limit, len(real.images)))
        fake = fake or Source(f"{args.n:,} images of {run.folder} at step {run.step}",
                              sample(run.G, args.n, args.seed, progress="sampling"))
        c = Comparison(args, network, real, fake, run)
        runtime.print_rank0(f"real: {c.real.label}\nfake: {c.fake.label}\njson: {c.json_path or 'none'}")
        sizes = {side.images.shape[2:] for side in (c.real, c.fake) if side.images}
        if len(sizes) == 2:
            runtime.print_rank0(f"note: real and fake images have two sizes, {sorted(sizes)}; --size makes it one")
        for name in chosen:
            try:
                REPORTS[name](c)
            except (metrics.NotDefined, runtime.UserError) as error:
                if not args.all:
                    raise runtime.UserError(str(error)) from error
                runtime.print_rank0(f"{name}: skipped: {error}")


if __name__ == "__main__":
    main()
