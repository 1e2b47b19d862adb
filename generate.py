"""Images from a trained generator: sample grids, PNG files, walks through latent space, nearest training images.

    python generate.py                                       a grid of 64 samples of the newest run
    python generate.py runs/wgan-teeth-1 --seed 7            other samples, of this run
    python generate.py --out ./fakes --n 1000                PNG files, 8 bits, grey or colour as in training
    python generate.py --nearest                             each sample beside the most similar training image
    python generate.py --walk walk.gif                       from sample to sample and back to the first
    python generate.py --morph 3,17                          from sample 3 to sample 17, as a strip
    python generate.py --arithmetic 12+40-7                  G(z12 + z40 - z7)

Sample k of a seed is the same image in every command. RUN may also be a file in a run's generators/.
"""

import json
import math
import re
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

import cli
import data
import gan
import plots
import runs
import runtime

BLOCK = 16                                                   # images per forward pass, always; see `sample_batches`


def text_matching(pattern, expected):
    """An argparse type: a text that matches all of the regular expression `pattern`."""
    def parse(text):
        if not re.fullmatch(pattern, text, re.IGNORECASE):
            raise runtime.UserError(f"expected {expected}, got {text!r}")
        return text
    return parse


def parse_arguments(argv=None):
    """The flags, and derived from them: mode (a key of MODES), numbers (of the samples), path (to write, if named)."""
    parser = cli.Parser("generate.py", __doc__)
    image = text_matching(r".+\.(png|jpe?g|tif|bmp)", "a file name ending in .png, .jpg, .tif or .bmp")
    parser.add_argument("run", nargs="?", default="", help="run folder or generator file (default: the newest run)")
    add = parser.add_argument_group("what to make (default: a sample grid)").add_mutually_exclusive_group().add_argument
    add("--out", metavar="DIR", help="PNG files in DIR; those that exist are kept: the same command continues")
    add("--nearest", action="store_true", help="a grid of samples, each beside the training image nearest in pixels")
    add("--walk", type=text_matching(r".+\.(gif|webp)", "a file name ending in .gif or .webp"), metavar="FILE",
        help="an animation (.gif, .webp) along great circles between samples")
    add("--morph", type=text_matching(r"\d{1,9},\d{1,9}", "two sample numbers, as in 3,17"), metavar="A,B",
        help="a strip of images from sample A to sample B")
    add("--arithmetic", type=text_matching(r"[+-]?\d{1,9}( *[+-] *\d{1,9})+", "sample numbers, as in 12+40-7"),
        metavar="A+B-C", help="the image of a sum of latents (Radford et al. 2015, section 6.3.2)")
    add = parser.add_argument_group("which samples").add_argument
    add("--n", type=cli.number(int, 1, 10**7 + 1), help="how many (default: 64; nearest 32, morph 9, walk 8)")
    add("--pick", type=text_matching(r"\d{1,9}(,\d{1,9})*", "sample numbers, as in 3,17,40"), metavar="K,K,...",
        help="sample numbers (default: 0 to N - 1)")
    add("--seed", type=cli.number(int, 0, 2**32), default=0, help="seed of the latents (default: %(default)s)")
    add("--truncation", type=cli.number(float, 0, 10), default=1.0, metavar="PSI",
        help="factor on z; below 1 less diversity and fewer failures (default: %(default)s)")
    add = parser.add_argument_group("how").add_argument
    add("--grid", type=image, metavar="FILE", help="grid or strip (default: RUN/samples.png, RUN/nearest.png, ...)")
    add("--frames", type=cli.number(int, 1, 2401), default=24, help="frames between samples of --walk (default: 24)")
    add("--data", default="", help="training images for --nearest (default: where the run read them)")
    add("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu (default: auto)")
    args = parser.parse_args(argv)
    mode = args.mode = next((mode for mode in MODES if getattr(args, mode, None)), "samples")
    args.path = args.out or args.walk or args.grid
    n = args.n or dict(nearest=32, morph=9, walk=8).get(mode, 64)
    args.numbers = [int(k) for k in args.pick.split(",")] if args.pick else range(n)
    if args.grid and mode in ("out", "walk"):
        parser.error(f"--grid names the file of a sample grid or strip, and --{mode} makes none: remove one of them")
    if args.pick and (args.n or args.morph):
        parser.error(f"--pick and --{'n' if args.n else 'morph'} both select samples: give one of them")
    most = {"out": 10**7, "walk": 4800 // args.frames}.get(mode, 1024)       # all images of one file are in memory
    if len(args.numbers) > most:
        parser.error(f"expected at most {most} samples in one file, got {len(args.numbers)}: give a smaller --n or "
                     "--frames, or write PNG files by --out DIR")
    return args


def open_generator(path, device):
    """`runs.open_trained` of a run folder or generator file ("": the newest run), and its G. UserError."""
    trained = runs.open_trained(path, scripts=()) if path else runs.open_trained()
    trained.G = gan.load_generator(trained.path, device).to(memory_format=torch.channels_last)
    if not isinstance(trained.G, gan.Generator):
        raise runtime.UserError(f"{trained.path} makes images from images, not noise: use python complete.py "
                                f"{trained.folder or trained.path}")
    return trained


@torch.no_grad()
def principal_directions(G):
    """The directions of z to which G's first layer responds most: V (latent, latent), unit rows, and their shares.

    G's first layer in eval mode is A z + b, A = diag(gamma / sqrt(var + eps)) W. V are the eigenvectors of A'A, the
    strongest first, the entry largest in magnitude positive; shares: their eigenvalues over the sum of all. Shen & Zhou
    2021 (SeFa); as z ~ N(0, 1) also the principal components of the first layer's output (GANSpace, Harkonen et al.
    2020). Deviation: BatchNorm's gain is included.
    """
    norm, W = G.norm, G.project.weight.cpu().double()
    gain = (norm.weight / (norm.running_var + norm.eps).sqrt()).cpu().double()                    # (c,)
    A = (W.unflatten(0, (-1, len(gain))) * gain[:, None]).flatten(0, 1)                           # (h w c, latent)
    values, vectors = torch.linalg.eigh(A.T @ A)                                                  # ascending
    V, shares = vectors.T.flip(0), values.flip(0).clamp_min(0)
    V = V * V.gather(1, V.abs().argmax(1, keepdim=True)).sign()
    return V.to(G.project.weight), (shares / shares.sum().clamp_min(1e-300)).float()


def latents(seed, numbers, length, psi=1.0):
    """z of the samples `numbers` of a seed, (n, length) ~ N(0, psi^2): each a function of (seed, its number) alone.

    Deviation from Brock et al. 2018, section 3.1: psi, the truncation, scales z, and no entry is resampled.
    """
    z = [np.random.RandomState([seed, k]).standard_normal(length) for k in numbers]        # a stream that never changes
    return torch.from_numpy(np.array(z, np.float32).reshape(len(z), length)) * psi


@torch.inference_mode()
def draw(G, z):
    """G(z) as uint8 (n, C, H, W) on the CPU, for any number of rows of z; at most BLOCK in a forward pass."""
    z = z.to(next(G.parameters()).device)
    return torch.cat([plots.to_uint8(G(rows)) for rows in z.split(BLOCK)]).cpu()


def sample_batches(G, seed, numbers, psi=1.0, batch=64):
    """Yields (numbers, uint8 (n, C, H, W)) with each of `numbers` once, ascending, about `batch` at a time.

    A convolution's last bits depend on the batch's size: sample k is always row k mod BLOCK of whole block k // BLOCK.
    """
    wanted = set(numbers)
    blocks = sorted({k // BLOCK for k in wanted})
    for part in runtime.batched_slices(len(blocks), max(1, batch // BLOCK), f"blocks of {BLOCK} samples"):
        block = [b * BLOCK + row for b in blocks[part] for row in range(BLOCK)]
        rows = [row for row, k in enumerate(block) if k in wanted]
        yield [block[row] for row in rows], draw(G, latents(seed, block, G.config["latent"], psi))[rows]


def sample(G, seed, numbers, psi=1.0):
    """The samples in the order of `numbers`: uint8 (n, C, H, W)."""
    images = {k: image for ks, batch in sample_batches(G, seed, numbers, psi) for k, image in zip(ks, batch)}
    return torch.stack([images[k] for k in numbers])


def save_samples(args, trained):
    images = sample(trained.G, args.seed, args.numbers, args.truncation)
    runs.write_atomically(args.path, plots.save_grid, data.to_float(images), max(8, math.isqrt(len(images))))
    print(f"{args.path}: {len(images)} samples of {trained.label}, seed {args.seed}")


def save_files(args, trained):
    """DIR/seed0-000012.png and so on, encoded by all cores while the next batch is computed; existing files stay."""
    folder, about, G = args.path, args.path / "generate.json", trained.G
    weights = (w.cpu().contiguous().numpy().tobytes() for w in G.state_dict().values())
    checksum = zlib.crc32(b"".join([repr(sorted(G.config.items())).encode(), *weights]))
    settings = json.dumps({"generator": checksum, "truncation": args.truncation}).encode()
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()) and not (about.exists() and about.read_bytes() == settings):
        raise runtime.UserError(f"--out {folder} was not written by this generator at this --truncation: give another")
    runs.write_atomically(about, Path.write_bytes, settings)

    def path(k):
        return folder / f"seed{args.seed}-{k:06d}.png"

    def save(k, image):
        unfinished = path(k).with_suffix(".png.part")        # not the suffix of an image: nobody reads it by mistake
        plots.to_pil(image).save(unfinished, "PNG", compress_level=3)
        unfinished.replace(path(k))

    missing, pending = {k for k in args.numbers if not path(k).exists()}, ()
    with ThreadPoolExecutor(torch.get_num_threads() + 1) as pool:
        for numbers, images in sample_batches(G, args.seed, missing, args.truncation):
            list(pending)                                    # the batch before is written, or its error is raised
            pending = pool.map(save, numbers, images)
        list(pending)
    kept = len(set(args.numbers) - missing)
    print(f"{folder}: {len(missing)} images of {trained.label}, seed {args.seed}; {kept} were there already")


def nearest_images(images, x, mirrored=False, block=256):
    """For each of uint8 x (n, C, H, W) the row of uint8 `images` with the smallest mean squared difference.

    -> rows, whether they are mirrored (only if `mirrored`), root mean squared difference in grey levels; (n,) each.
    """
    a, best = x.flatten(1).float() - 127.5, torch.full((3, len(x)), math.inf)
    for first in range(0, len(images), block):
        part = torch.from_numpy(np.asarray(images[first:first + block]))
        for flip in (False, True) if mirrored else (False,):
            b = (part.flip(3) if flip else part).flatten(1).float() - 127.5
            squares, k = (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).min(1)    # over (n, block)
            best = torch.where(squares < best[0], torch.stack([squares, first + k, 0 * k + flip]), best)
    return best[1].long(), best[2] > 0, (best[0].clamp_min(0) / a.shape[1]).sqrt()


def save_nearest(args, trained):
    if not trained.folder:
        raise runtime.UserError(f"--nearest: {trained.path} is in no run folder, which would name its training images")
    dataset, _ = data.load_of_run(trained.saved, args.data)
    x = sample(trained.G, args.seed, args.numbers, args.truncation)
    rows, flipped, rms = nearest_images(dataset.images, x, trained.saved["flags"]["flip"])
    found = torch.from_numpy(np.asarray(dataset.images[rows.numpy()]))
    found = torch.where(flipped[:, None, None, None], found.flip(3), found)
    runs.write_atomically(args.path, plots.save_grid, data.to_float(torch.stack([x, found], 1).flatten(0, 1)))
    print(f"{args.path}: {len(x)} pairs of a sample and the nearest of {len(dataset.images)} training images; closest:")
    for k in rms.argsort()[:5].tolist():
        name = dataset.names[rows[k]] + ", mirrored" * bool(flipped[k])
        print(f"    sample {args.numbers[k]}: {name}, root mean squared difference {rms[k]:.1f} of 255 grey levels")


def slerp(a, b, t):
    """Spherical interpolation from a to b, (..., d) each; t in [0, 1] broadcasts over the last axis. Shoemake 1985.

    The direction moves along the great circle at constant speed, u(t) = (sin((1 - t) W) a/||a|| + sin(t W) b/||b||) /
    sin W, W the angle between a and b (arbitrary where they are opposite); the length, linearly from ||a|| to ||b||.
    """
    length_a, length_b = (x.double().norm(dim=-1, keepdim=True) for x in (a, b))
    u, v = a / length_a.clamp_min(1e-300), b / length_b.clamp_min(1e-300)             # float64; zero stays zero
    W = 2 * torch.atan2((u - v).norm(dim=-1, keepdim=True), (u + v).norm(dim=-1, keepdim=True))    # exact near 0 too
    of_u, of_v = (s * torch.sinc(s * W / torch.pi) / torch.sinc(W / torch.pi) for s in (1 - t, t))  # sin(s W) / sin W
    return (((1 - t) * length_a + t * length_b) * (of_u * u + of_v * v)).to(a.dtype)


def latent_sum(z, signs):
    """sum_i s_i z_i, (n, d) and signs (n,) -> (d,), scaled to the mean length of the z_i.

    Radford et al. 2015, section 6.3.2. Deviation: the length. A sum of three is sqrt(3) times as long as z in training.
    """
    total = (torch.as_tensor(signs, dtype=z.dtype)[:, None] * z).sum(0)
    return total / total.norm().clamp_min(1e-12) * z.norm(dim=1).mean()


def save_walk(args, trained):
    z = latents(args.seed, args.numbers, trained.G.config["latent"], args.truncation)
    t = torch.arange(args.frames, dtype=torch.float64)[:, None] / args.frames         # of the way to the next sample
    images = draw(trained.G, slerp(z[:, None], z.roll(-1, 0)[:, None], t).flatten(0, 1))
    runs.write_atomically(args.path, plots.save_animation, images, args.path.suffix[1:].upper())
    print(f"{args.path}: {len(images)} frames through samples {', '.join(map(str, args.numbers))} of {trained.label}")


def save_morph(args, trained):
    first, last = map(int, args.morph.split(","))
    a, b = latents(args.seed, [first, last], trained.G.config["latent"], args.truncation)
    t = torch.linspace(0, 1, len(args.numbers), dtype=torch.float64)[:, None]
    images = draw(trained.G, slerp(a, b, t))
    captions = [str(first), *[""] * (len(images) - 2), str(last)][:len(images)]
    runs.write_atomically(args.path, plots.captioned_grid([("", images, captions)]).save)
    print(f"{args.path}: {len(images)} images from sample {first} to sample {last} of {trained.label}")


def save_arithmetic(args, trained):
    terms = re.findall(r"([+-]?) *(\d+)", args.arithmetic)
    z = latents(args.seed, [int(k) for _, k in terms], trained.G.config["latent"], args.truncation)
    total = latent_sum(z, [-1.0 if sign == "-" else 1.0 for sign, _ in terms])
    if total.norm() < 0.5 * z.norm(dim=1).mean():
        raise runtime.UserError(f"--arithmetic {args.arithmetic}: the samples cancel one another: give another sum")
    captions = [f"{sign} {int(k)}".strip() for sign, k in terms]
    images = draw(trained.G, torch.cat([z, total[None]]))
    runs.write_atomically(args.path, plots.captioned_grid([("", images, [*captions, "="])]).save)
    print(f"{args.path}: {' '.join(captions)}, samples of {trained.label}")


MODES = dict(out=save_files, nearest=save_nearest, walk=save_walk, morph=save_morph, arithmetic=save_arithmetic,
             samples=save_samples)


@runtime.exit_on_user_error("generate.py")
def main(argv=None):
    args = parse_arguments(argv)
    trained = open_generator(args.run, runtime.pick_device(args.device))
    args.path = Path(args.path or (trained.folder or trained.path.parent) / f"{args.mode}.png")
    MODES[args.mode](args, trained)


if __name__ == "__main__":
    main()
