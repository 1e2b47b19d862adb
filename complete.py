"""Fill the hole in an image: by a search in the latent space of a trained GAN, or by a trained pix2pix network.

    python complete.py runs/wgan-faces-1                               some held-out images, a hole in the middle
    python complete.py runs/wgan-faces-1 --images ./holiday --mask mask.png --out done
    python complete.py runs/pix2pix-faces-1 --images ./holiday --mask strokes --enhance
    python complete.py runs/pix2pix-faces-1 --evaluate --mask center   scores on held-out images, beside baselines

A run of train_wgan.py or train_dcgan.py is searched for the latent whose image agrees best with the known pixels (Yeh
et al. 2017, arXiv 1607.07539); a run of train_pix2pix.py --task complete fills the hole in one pass. Black in a mask is
the hole. What an image has inside its hole is never read, and its known pixels are kept to the byte,
at 8 bits, and in grey if the run is grey.
"""

import collections
import contextlib
import itertools
import json
import os
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import cli
import data
import decode
import gan
import inception
import inpainting
import metrics
import plots
import runs
import runtime
import sources

TRAIN_MASKS, HELDOUT_MASKS = 10**6, 2 * 10**6               # added to --seed: masks that no training script has drawn
SCORES = dict(hole_psnr=".2f", psnr=".2f", hole_ssim=".3f", ssim=".3f", hole_l1=".2f", l1=".2f", kid=".2g",
              kid_std=".2g")


def parse_arguments(argv=None):
    parser = cli.Parser("complete.py", __doc__)
    add = parser.add_argument
    add("run", nargs="?", default="", help="run folder of a training script (default: the newest run)")
    add("--images", default="", help="an image or a folder of images (default: held-out images of the run)")
    add("--mask", default="center", help="center, half, box, random, strokes; an image, black in the hole; or a folder "
        "of such, named like the images, with --evaluate in turn (default: %(default)s)")
    add("--out", default="", help="folder to make for the completed images (default: RUN/completed-1, -2, ...)")
    add("--evaluate", action="store_true", help="score held-out completions, write RUN/completion.json (default: off)")
    add("--n", type=cli.positive_int, metavar="N", help="images (default: all, for --images and --evaluate, or 16)")
    add("--data", default="", help="where the images of the run are now (default: where they were)")
    add("--restarts", type=cli.positive_int, default=16, help="of the search: latents to begin with (default: 16)")
    add("--iterations", type=cli.positive_int, default=100, help="of the search (default: 100; Yeh et al.: 1500)")
    add("--prior", type=cli.nonnegative, default=0.003, help="of the search: weight of the critic (default: 0.003)")
    add("--blend", default="poisson", choices=("poisson", "paste"), help="how the hole is filled in (default: poisson)")
    add("--enhance", action="store_true", help="correct completions by a second network, kept in RUN (default: off)")
    add("--window", default="run", choices=("run", "hole"), help="what the networks see of a large image: run, what "
        "training would cut out; hole, a window about the hole, twice its size (default: %(default)s)")
    add("--network", default="", help="feature network of the KID: inception, random, a file, or none for no KID "
        "(default: inception with --weights, else random)")
    add("--weights", default="", help="file of Inception's weights (default: torch's cache, else downloaded)")
    add("--batch", type=cli.positive_int, default=16, help="images at a time (default: %(default)s)")
    add("--seed", type=cli.number(int, 0, 2**31), default=0, help="of masks and restarts (default: %(default)s)")
    add("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu (default: %(default)s)")
    return parser.parse_args(argv)


def load_method(folder, args, device):
    """A run folder -> (its checkpoint, (channels, height, width), method of `inpainting.complete_batch`)."""
    saved = runs.read_checkpoint(folder)
    flags = saved["flags"]
    if flags.get("task", "complete") != "complete":
        raise runtime.UserError(f"{folder} is a run of --task {flags['task']}: give one of --task complete")
    try:
        G = gan.load_generator(folder, device)
        if saved["script"] == "train_pix2pix.py":            # one answer for each image
            return saved, (G.config["c_out"], *G.config["size"]), (
                lambda y, known: G(inpainting.completion_input(y, known)).unsqueeze(1))
        size, channels = G.config["size"], G.config["channels"]
        D = gan.Discriminator(size, channels, flags["features"], flags["max_features"], flags["norm"])
        D.load_state_dict({name: saved["state"]["D"][name] for name in D.state_dict()})
    except (KeyError, RuntimeError, ValueError) as error:
        raise runtime.UserError(f"{folder}: its networks do not fit its flags ({runtime.first_line(error)})") from error
    # Minibatch discrimination, if D has it, is left out: it would make the score of an image depend on the others.
    G, D = (net.to(device, memory_format=torch.channels_last).eval().requires_grad_(False) for net in (G, D))
    return saved, (channels, *size), inpainting.LatentSearch(
        G, D, args.restarts, args.iterations, args.prior, seed=args.seed, bf16=runtime.has_bf16(device))


def images_of_run(saved, args):
    """The training and the held-out images of the run, uint8 (N, C, h, w) each. UserError if it held none out."""
    train, heldout = data.load_of_run(saved, args.data)
    if not heldout.names:
        raise runtime.UserError("the run held no image out (--holdout 0): give --images, or train with --holdout 0.1")
    return train.images, heldout.images


def load_enhancer(folder, saved, method, size, args, device):
    """The enhancement network of a run for a kind of mask; trained if there is none for this step, masks and search."""
    masks = inpainting.masks(args.mask, 512, size[1:], args.seed + TRAIN_MASKS)
    path = folder / f"enhance-{Path(args.mask).stem}-{args.blend}.pt"
    made_for = dict(step=saved["step"], masks=zlib.crc32(masks.numpy().tobytes()),
                    search=isinstance(method, inpainting.LatentSearch) and [args.restarts, args.iterations, args.prior])
    with contextlib.suppress(Exception):                     # a damaged file raises almost anything
        kept = runtime.load_tensors(path, device)
        if kept["made_for"] == made_for:
            net = inpainting.Enhancer(size[0]).to(device)
            net.load_state_dict(kept["state"])
            return net.eval().requires_grad_(False)
    images = data.load_of_run(saved, args.data)[0].images
    n = min(len(images), 256 if isinstance(method, inpainting.LatentSearch) else 1024)    # a search is slow
    runtime.print_rank0(f"no {path.name} for step {saved['step']} in {folder} yet: training it on {n} training images")
    chosen = np.random.RandomState(args.seed).permutation(len(images))[:n]
    real = data.to_float(torch.from_numpy(images[np.sort(chosen)])).to(device)
    known = masks[torch.arange(n) % len(masks)].to(device)
    x = torch.cat([inpainting.complete_batch(method, real[rows], known[rows], args.blend)[:, 0]
                   for rows in runtime.batched_slices(n, args.batch, "images")])
    net = inpainting.train_enhancer(x, real, known, seed=args.seed, bf16=runtime.has_bf16(device))
    try:
        runs.write_atomically(path, lambda path: torch.save(dict(state=net.state_dict(), made_for=made_for), path))
    except OSError as error:                                 # a run folder that is only read
        runtime.print_rank0(f"{path.name} is not kept: {runtime.describe_error(error)}")
    return net


def image_size(path):
    """(height, width) of an image file; None if there is no such file or it is no image."""
    with contextlib.suppress(OSError), Image.open(path) as im:
        return im.size[::-1]


def find_window(known, preprocess, about="run"):
    """The window of an upright image that the networks see: (left, top, right, bottom), whole pixels.

    about "run": what training would cut out, moved to hold the hole of known (H, W); "hole": centred on the hole, twice
    its size, never enlarged. Where that cannot hold the hole: the whole image. --fit pad may extend beyond the image.
    """
    target, side = np.array(preprocess.size[::-1]), np.array(known.shape[::-1])       # (width, height)
    hole = np.reshape(Image.fromarray(~known).getbbox(), (2, 2))                      # (left, top), (right, bottom)
    window = hole if about == "hole" else np.reshape(preprocess.window()(*side), (2, 2))
    scale = (window[1] - window[0]) / target
    if about == "hole":
        scale = max(1.0, 2 * scale.max())
    elif preprocess.fit != "squash":
        scale = scale.max() if preprocess.fit == "pad" else scale.min()
    length = np.maximum(1, np.round(scale * target)).astype(int)
    start = np.round((window.sum(0) - length) / 2).astype(int)
    start = np.maximum(np.minimum(start, hole[0]), hole[1] - length)         # hold the hole first, then stay inside
    start = np.where(length > side, start, np.maximum(0, np.minimum(start, side - length)))
    holds = (start <= hole[0]) & (start + length >= hole[1]) & ((length <= side) | (preprocess.fit == "pad"))
    return tuple(np.append(start, start + length).tolist()) if holds.all() else (0, 0, *known.shape[::-1])


def resize_known(pixels, known, box, size):
    """The window `box` of uint8 (H, W[, 3]) and known (H, W) -> float (C, h, w) in [-1, 1] and known (1, h, w).

    Antialiased: a pixel is the mean over the known pixels beneath it. It is known itself if an eighth of what lies
    beneath it is, else it is 0. Beyond the border of the image all is known and black, as with --fit pad in training.
    """
    def resize(plane):
        return np.asarray(Image.fromarray(plane.astype(np.float32)).resize(size[::-1], Image.Resampling.HAMMING))

    pixels, hole = (np.asarray(Image.fromarray(array).crop(box)) for array in (pixels, ~known))
    share = resize(~hole)
    planes = [resize(np.where(hole, 0, plane)) for plane in np.moveaxis(np.atleast_3d(pixels), 2, 0)]
    m = share >= 1 / 8
    x = np.where(m, np.stack(planes) / np.maximum(share, 1 / 8) / 127.5 - 1, 0.0)
    return torch.from_numpy(x).float(), torch.from_numpy(m[None]).float()


def put_back(pixels, known, box, x, blend="poisson"):
    """The completed window x (C, h, w) blended into the hole of uint8 (H, W[, 3]); known pixels stay to the byte."""
    left, top, right, bottom = box
    content = F.interpolate(x[None].float(), (bottom - top, right - left), mode="bicubic", antialias=True)
    content = F.pad(content, (1, 1, 1, 1), "replicate")      # the rim of the hole may lie beside the window
    rows, columns = (slice(max(0, index[0] - 1), index[-1] + 2) for index in (
        np.flatnonzero(~known.all(axis)) for axis in (1, 0)))                         # the hole and one pixel about it
    out = np.atleast_3d(pixels).copy()
    y = data.to_float(torch.from_numpy(out[rows, columns]).permute(2, 0, 1)[None].float())
    m = torch.from_numpy(known[None, None, rows, columns]).float()
    content = content[..., rows.start - top + 1:, columns.start - left + 1:][..., :y.shape[2], :y.shape[3]]
    filled = plots.to_uint8(inpainting.blend_into_hole(content, y, m, blend)[0])       # to float and back is exact
    out[rows, columns] = filled.permute(1, 2, 0).numpy()
    return out.reshape(pixels.shape)


def prepare_input(item, mask, seed, preprocess, about="run"):
    """An item -> uint8 pixels (H, W[, 3]), known (H, W), the window, and it resized: y (C, h, w), m (1, h, w)."""
    im = preprocess.upright(decode.open_image(item.read()))
    pixels = np.asarray(im.convert("L" if preprocess.channels == "1" else "RGB"))
    known = inpainting.masks(mask, 1, pixels.shape[:2], seed)[0, 0].numpy() > 0.5
    box = find_window(known, preprocess, about)
    return pixels, known, box, *resize_known(pixels, known, box, preprocess.size)


def save_columns(path, rows, titles):
    """A grid of images (C, h, w) in [-1, 1], row by row, with the titles of the columns under the first row."""
    height, width = rows[0][0].shape[1:]
    grid = plots.captioned_grid([("", plots.to_uint8(torch.stack(row)), None if k else titles)
                                 for k, row in enumerate(rows)], max(height, width) * -(-125 // width))
    runs.write_atomically(path, grid.save)


def complete_images(args, folder, saved, size, method, device):
    """Complete --images, or some held-out images of the run: files and a grid in a new folder."""
    mask_files = {} if args.mask in inpainting.MASK_KINDS else {
        os.path.splitext(name)[0]: os.path.join(args.mask, name) for name in sources.find_images(args.mask)}
    if not mask_files:                                       # a mistake is reported before anything is read
        inpainting.masks(args.mask, 1, image_size(args.mask) or size[1:])
    fit, crop = (saved["flags"]["fit"], saved["flags"]["crop"]) if args.images else ("squash", "")
    preprocess = decode.Preprocess(size[1:], fit, crop, str(size[0]))
    items = sources.find_items(args.images, flag="--images")[:args.n] if args.images else [
        sources.Item(f"heldout-{k:04d}", (), np.moveaxis(x, 0, 2).squeeze().copy)
        for k, x in enumerate(images_of_run(saved, args)[1][:args.n or 16])]
    stems = [os.path.splitext(item.name)[0] for item in items]
    masks = [mask_files.get(name) if mask_files else args.mask for name in stems]
    if None in masks:
        raise runtime.UserError(f"--mask {args.mask}: no mask has the name of {stems[masks.index(None)]}")
    numbered = (folder / f"completed-{k}" for k in itertools.count(1))
    if args.out and Path(args.out).exists():
        raise runtime.UserError(f"--out {args.out}: expected a new folder, and it exists already; give another name")
    enhancer = load_enhancer(folder, saved, method, size, args, device) if args.enhance else None
    out = Path(args.out or next(path for path in numbered if not path.exists()))
    out.mkdir(parents=True)                                  # at once, or another process takes the same
    runtime.print_rank0(f"completing {len(items)} images with {folder} (step {saved['step']}), {device.type}")
    rows, skipped, notes, same_stem = [], [], collections.Counter(), collections.Counter(
        form.lower() for item, stem in zip(items, stems) for form in {item.name, stem})
    for batch in runtime.batched_slices(len(items), args.batch, "images"):
        prepared = []
        for k in range(batch.start, batch.stop):
            try:
                prepared.append((k, *prepare_input(items[k], masks[k], args.seed + k, preprocess, args.window)))
            except Exception as error:                       # Pillow raises almost anything for a damaged file
                skipped.append((items[k].name, decode.describe_decode_error(error)))
        if not prepared:
            continue
        y, m = (torch.stack(column).to(device) for column in list(zip(*prepared))[-2:])
        answers = inpainting.complete_batch(method, y, m, args.blend, enhancer).cpu()
        for (k, pixels, known, box, _, m), x in zip(prepared, answers):
            filled = put_back(pixels, known, box, x[0], args.blend)
            name = stems[k] if same_stem[stems[k].lower()] == 1 else items[k].name
            runs.write_atomically(out / "completed" / f"{name}.png", Image.fromarray(filled).save)
            if len(rows) < 16:
                before, after = (resize_known(x, np.ones_like(known), box, size[1:])[0] for x in (pixels, filled))
                rows.append([before, before * m, after, *x[1:]])
            (h, w), (left, top, right, bottom) = image_size(masks[k]) or known.shape, box
            notes["the mask has another aspect ratio and was stretched: check where the hole is"] += (
                not 0.98 < w * known.shape[0] / (h * known.shape[1]) < 1.02)
            notes[f"completed whole, squashed to {size[1]}x{size[2]}: no window of that shape holds the hole"] += (
                preprocess.fit != "squash" and not 0.9 < (right - left) * size[1] / ((bottom - top) * size[2]) < 1.1)
    if skipped:
        runtime.print_rank0(f"skipped {len(skipped)}: {data.summarize_skipped(skipped, 5)}")
    n = len(items) - len(skipped)
    if not n:
        out.rmdir()
        raise runtime.UserError(f"none of the {len(items)} images could be completed")
    for note, count in (+notes).items():
        runtime.print_rank0(f"{count} of {n} images: {note}")
    save_columns(out / "grid.png", rows, ["original", "masked", "completed", *(
        f"alternative {k}" for k in range(1, len(rows[0]) - 2))])
    runtime.print_rank0(f"wrote {n} images to {out / 'completed'}; look at {out / 'grid.png'}")


def compare(real, fake, known):
    """PSNR (dB), L1 (% of 255) and SSIM of uint8 fake against real (N, C, h, w), over the hole and whole: {name: mean
    over images}. SSIM of the hole: over the 11x11 windows centred in it; none for images with a side under 11."""
    a, b = (torch.from_numpy(np.asarray(x)).double() for x in (real, fake))
    hole, distance = (known < 0.5).double().expand_as(a), 100 / 255 * (a - b).abs()
    scores = dict(hole_psnr=metrics.psnr(a, b, 255, known), psnr=metrics.psnr(a, b, 255),
                  hole_l1=(distance * hole).sum((1, 2, 3)) / hole.sum((1, 2, 3)), l1=distance.mean((1, 2, 3)))
    if min(a.shape[2:]) >= 11:
        windows, hole = metrics.similarity_maps(a, b, 255)[0].mean(1), hole[:, 0, 5:-5, 5:-5]
        scores |= dict(ssim=windows.mean((1, 2)), hole_ssim=(windows * hole).sum((1, 2)) / hole.sum((1, 2)))
    return {name: float(values.nanmean()) for name, values in scores.items() if not values.isnan().all()}


def evaluate_run(args, folder, saved, size, method, device):
    """--evaluate: completions of held-out images beside three baselines: a table, completion.json, a grid."""
    train, real = images_of_run(saved, args)
    real = real[:args.n]
    known, n = inpainting.masks(args.mask, len(real), size[1:], args.seed + HELDOUT_MASKS), len(real)
    mean = data.to_float(torch.from_numpy(sum(x.astype(np.float64) for x in train) / len(train))).to(device)
    network = "none" if n < 2 else args.network or ("inception" if args.weights else "random")         # KID needs two
    extract = None if network == "none" else inception.load_features(network, args.weights, device=device)
    enhancer = load_enhancer(folder, saved, method, size, args, device) if args.enhance else None
    runtime.print_rank0(f"completing {n} held-out images of {folder} (step {saved['step']}), mask {args.mask}")
    parts, began = [], time.monotonic()
    for rows in runtime.batched_slices(n, args.batch, "images"):
        m = known[rows].to(device)
        y = inpainting.composite(data.to_float(torch.from_numpy(real[rows])).to(device), 0.0, m)
        content = method(y, m)[:, 0]
        completed = {"mean fill": inpainting.mean_fill(y, m), "harmonic fill": inpainting.harmonic_fill(y, m),
                     "mean image + Poisson": inpainting.blend_into_hole(mean.expand_as(y), y, m),
                     "this run, pasted": inpainting.blend_into_hole(content, y, m, "paste"),
                     "this run, + Poisson": inpainting.blend_into_hole(content, y, m)}
        if enhancer:                                         # given what it was trained on
            blended = completed["this run, pasted" if args.blend == "paste" else "this run, + Poisson"]
            completed["this run, + enhancement"] = inpainting.composite(blended, enhancer(blended, m).clamp(-1, 1), m)
        parts.append({name: plots.to_uint8(x).cpu().numpy() for name, x in completed.items()})
    seconds = time.monotonic() - began
    found = {name: np.concatenate([part[name] for part in parts]) for name in completed}
    shown = [data.to_float(torch.from_numpy(np.asarray(x[:12]))) for x in (real, *found.values())]
    grid, path = folder / f"completion-{Path(args.mask).stem}.png", folder / "completion.json"
    scores = {name: compare(real, fake, known) for name, fake in found.items()}
    search = ("restarts", "iterations", "prior") if isinstance(method, inpainting.LatentSearch) else ()
    result = dict(n=n, seed=args.seed, step=saved["step"], seconds=round(seconds, 1), features="none",
                  search={name: getattr(args, name) for name in search} or None, scores=scores)
    try:
        if extract:                                          # against training images: the originals would be too near
            chosen = np.random.RandomState(args.seed).permutation(len(train))[:2 * n]
            features = {name: extract(images, f"features, {name or 'training images'}")
                        for name, images in {"": train[np.sort(chosen)], "the originals": real, **found}.items()}
            for name in ("the originals", *found):
                mean, std = metrics.kid(features[""], features[name], subset_size=min(1000, n))
                scores.setdefault(name, {}).update(kid=mean, kid_std=std)
            result |= dict(features=extract.name, against=len(chosen))
    finally:                                                 # features take a while: nothing is to be lost
        runtime.print_rank0(f"{n} held-out images, mask {args.mask}; PSNR in dB, L1 in %; KID against training images, "
                            f"features: {result['features']}\n{'':26}" + "".join(f"{name:>11}" for name in SCORES))
        for name, row in scores.items():
            cells = (f"{row[key]:>11{form}}" if key in row else " " * 11 for key, form in SCORES.items())
            runtime.print_rank0(f"{name:26}" + "".join(cells))
        entries = {}
        with contextlib.suppress(OSError, ValueError):       # none yet, or a damaged one
            entries = json.loads(path.read_text())
        runs.write_atomically(path, lambda path: path.write_text(json.dumps({**entries, args.mask: result}, indent=1)))
        save_columns(grid, list(zip(shown[0], shown[0] * known[:12], *shown[1:])),
                     ["original", "masked", *(name.removeprefix("this run, ") for name in found)])
    runtime.print_rank0(f"wrote {path} and {grid}; {seconds / n:.2f} s per image")


@runtime.exit_on_user_error("complete.py")
def main(argv=None):
    args = parse_arguments(argv)
    if args.evaluate and (args.images or args.out):
        raise runtime.UserError("--evaluate scores held-out images into the run folder: give no --images and --out")
    folder, device = Path(args.run) if args.run else runs.newest_run(), runtime.pick_device(args.device)
    saved, size, method = load_method(folder, args, device)
    (evaluate_run if args.evaluate else complete_images)(args, folder, saved, size, method, device)


if __name__ == "__main__":
    main()
