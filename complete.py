"""Fill the hole in a picture: by a search in the latent space of a trained GAN, or by a trained pix2pix network.

    python complete.py runs/wgan-faces-1                               some held-out pictures of the run, a square hole
    python complete.py runs/wgan-faces-1 --images ./holiday --mask mask.png --out done
    python complete.py runs/pix2pix-faces-1 --images ./holiday --mask strokes --enhance
    python complete.py runs/pix2pix-faces-1 --evaluate --mask center   numbers on held-out pictures, beside baselines

The search is Yeh et al. 2017 (arXiv 1607.07539): the latent whose picture agrees best with what is known. A run of
train_wgan.py or train_dcgan.py brings its generator and its critic; a run of train_pix2pix.py --task complete fills the
hole in one pass. Black in a mask is the hole. Nothing inside a hole is ever read.
"""

import collections
import contextlib
import json
import math
import time
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

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

SEARCH, FORWARD = ("train_wgan.py", "train_dcgan.py"), "train_pix2pix.py"
KINDS = ("center", "half", "box", "random", "strokes")
TRAINED, HELD_OUT = 10**6, 2 * 10**6                        # added to --seed: masks that no training script has drawn


def parse_arguments(argv=None):
    parser = cli.Parser("complete.py", __doc__)
    add = parser.add_argument
    add("run", nargs="?", default="", help="a run of train_wgan.py, train_dcgan.py or train_pix2pix.py --task complete "
        "(the newest)")
    add("--images", default="", help="a picture, or a folder of pictures (some held-out ones of the run)")
    add("--mask", default="center", help="center, half, box, random, strokes; a picture, black in the hole; or a "
        "folder of such with the names of the pictures (%(default)s)")
    add("--out", default="", help="folder to make for the completed pictures (RUN/completed-1, -2, ...)")
    add("--evaluate", action="store_true", help="measure on the run's held-out pictures and write RUN/completion.json")
    add("--n", type=cli.positive_int, metavar="N", help="only the first N pictures (all; without --images 16)")
    add("--data", default="", help="where the run's pictures are now, if they have moved")
    add = parser.add_argument_group("how").add_argument
    add("--restarts", type=cli.positive_int, default=16, help="latents that are refined for a fifth of the iterations; "
        f"the best {inpainting.KEPT} of them go on (%(default)s)")
    add("--iterations", type=cli.positive_int, default=100, help="of the search; Yeh et al. take 1500 (%(default)s)")
    add("--prior", type=cli.nonnegative, default=0.003, help="weight of the critic's score, in units of its spread, "
        "against the context (%(default)s)")
    add("--blend", default="poisson", choices=("poisson", "paste"), help="what puts the content into the hole "
        "(%(default)s)")
    add("--enhance", action="store_true", help="a second network corrects what was completed; trained on the run's "
        "pictures when first asked for, and kept in the run folder")
    add("--window", default="run", choices=("run", "hole"), help="what of a large picture the networks see: the window "
        "that training would cut, or one about the hole, twice as large (%(default)s)")
    add("--alternatives", default="", metavar="RUN", help="with a pix2pix run, which has one answer: a WGAN or DCGAN "
        "run of the same size, whose search fills the sheet's other columns")
    add("--features", default="", help="that KID is measured in: random, inception, a file, or none (inception where "
        "--weights is given, else random)")
    add("--weights", default="", help="file with Inception's weights")
    add("--batch", type=cli.positive_int, default=16, help="pictures at a time (%(default)s)")
    add("--seed", type=cli.number(int, 0, 2**31), default=0, help="of masks and restarts (%(default)s)")
    add("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu (%(default)s)")
    add("--precision", default="auto", choices=("auto", "bf16", "fp32"), help="of the search; auto: bf16 where "
        "hardware has it (%(default)s)")
    args = parser.parse_args(argv)
    if args.evaluate and (args.images or args.out or args.alternatives):
        parser.error("--evaluate measures on the run's held-out pictures and writes into the run folder: leave "
                     "--images, --out and --alternatives away")
    return args


def load_method(folder, args, device):
    """A run folder -> (its checkpoint, (channels, height, width), contents function)."""
    saved = runs.read_checkpoint(folder)
    flags, G = saved["flags"], gan.load_generator(folder, device)
    if saved["script"] == FORWARD:
        if flags["task"] != "complete":
            raise ValueError(f"{folder} is a run of --task {flags['task']}: give one of train_pix2pix.py --task "
                             "complete")
        return saved, (G.config["c_out"], *G.config["size"]), inpainting.Forward(G)
    config = G.config
    D = gan.Discriminator(config["size"], config["channels"], flags["features"], flags["max_features"], flags["norm"],
                          flags.get("minibatch_discrimination", False))
    try:
        D.load_state_dict(saved["state"]["D"])
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{folder}: its critic does not fit its flags ({runtime.first_line(error)})") from error
    D.minibatch_discrimination = None                                          # it scores a picture by the others beside it; none of ours
    D = D.to(device).eval().requires_grad_(False)            # BatchNorm by its running statistics
    G, D = (net.to(memory_format=torch.channels_last) for net in (G, D))
    bf16 = args.precision == "bf16" or (args.precision == "auto" and runtime.has_bf16(device))
    amp = torch.autocast(device.type, torch.bfloat16) if bf16 else None
    search = inpainting.Search(G, D, args.restarts, args.iterations, args.prior, seed=args.seed, amp=amp)
    return saved, (config["channels"], *config["size"]), search


# ---------------------------------------------------------------------------------------------------------------------
# The second stage
# ---------------------------------------------------------------------------------------------------------------------

def load_enhancer(folder, saved, method, size, args, device, steps=400, batch=16):
    """The enhancement network of a run for a kind of mask, trained when there is none yet or the run has gone on."""
    masks = run_masks(args.mask, 512, size, args.seed + TRAINED)
    name = f"enhance-{Path(args.mask).stem}-{args.blend}.pt"
    made_for = dict(step=saved["step"], masks=zlib.crc32(masks.numpy().tobytes()))
    with contextlib.suppress(Exception):                     # a damaged file makes torch.load raise almost anything
        kept = torch.load(folder / name, map_location=device, weights_only=True)
        if kept["made_for"] == made_for:
            net = inpainting.Enhancer(**kept["config"]).to(device)
            net.load_state_dict(kept["state"])
            return net.eval().requires_grad_(False)
    pictures = run_pictures(saved, args, "train")
    n = min(len(pictures), 1024 if isinstance(method, inpainting.Forward) else 256)   # a search takes its time
    chosen = np.random.RandomState(args.seed).permutation(len(pictures))[:n]
    real = data.to_float(torch.from_numpy(pictures[np.sort(chosen)]))
    known = masks[torch.arange(n) % len(masks)]
    runtime.print_rank0(f"enhancement: no {name} in {folder} for step {saved['step']} yet; completing {n} training pictures")
    real, known = real.to(device), known.to(device)
    x = torch.cat([inpainting.complete_batch(method, real[rows], known[rows], args.blend)[:, 0]
                   for rows in runtime.batched_slices(n, args.batch, "pictures")])
    net = inpainting.train_enhancer(x, real, known, steps, batch, args.seed, bf16=runtime.has_bf16(device))
    runs.write_atomically(folder / name, lambda path: torch.save(dict(config=net.config, state=net.state_dict(),
                                                              made_for=made_for), path))
    return net


# ---------------------------------------------------------------------------------------------------------------------
# Pictures and masks of any size
# ---------------------------------------------------------------------------------------------------------------------

def run_flags(saved, args):
    """The flags of a run as `data.load_from_args` takes them, --data where it is now."""
    flags = type(args)(**saved["flags"])
    flags.data = args.data or flags.data
    return flags


def run_pictures(saved, args, part):
    """The run's own pictures as training saw them, uint8 rows (N, C, h, w); ValueError when it held none out."""
    flags = run_flags(saved, args)
    if part == "heldout" and not flags.holdout:
        raise ValueError("the run held no picture out (--holdout 0), and those it was trained on prove nothing: give "
                         "--images, or train with --holdout 0.1")
    return data.load_from_args(flags, part).images


def run_masks(mask, n, size, seed):
    """n masks at the run's size (channels, h, w): float (n, 1, h, w). A folder's masks are taken in turn."""
    if not Path(mask).is_dir():
        known = inpainting.masks(mask, n, size[1:], seed)
    else:
        few = torch.cat([inpainting.masks(file, 1, size[1:]) for file in list(find_masks(mask).values())[:n]])
        known = few[torch.arange(n) % len(few)]
    if (known.flatten(1).amin(1) > 0.5).any() or (known.flatten(1).amax(1) < 0.5).any():
        raise ValueError(f"--mask {mask}: at {size[1]}x{size[2]} a mask has no hole, or nothing but hole; black is the "
                         "hole, white is known")
    return known


def stem(name):
    """A picture's name without its suffix: what its mask and its completion are named by."""
    return Path(name).with_suffix("").as_posix()


def find_masks(folder):
    """The masks in a folder: {`stem`: file}. ValueError when there is none."""
    names = sources.find_images(folder)
    if not names:
        raise ValueError(f"--mask {folder}: no pictures in this folder")
    return {stem(name): str(Path(folder) / name) for name in names}


def choose_masks(mask, items):
    """What `data.masks` takes for each picture: --mask itself, or the file of the picture's name in the folder."""
    if not Path(mask).is_dir():
        return [mask] * len(items)
    there = find_masks(mask)
    missing = [item.name for item in items if stem(item.name) not in there]
    if missing:
        raise ValueError(f"--mask {mask}: no mask has the name of {missing[0]}"
                         + f" and of {len(missing) - 1} more pictures" * (len(missing) > 1))
    return [there[stem(item.name)] for item in items]


def find_mask(mask, size, seed):
    """A mask at a picture's own size (height, width): bool (H, W), True where known. ValueError without a hole."""
    known = inpainting.masks(mask, 1, size, seed)[0, 0].numpy() > 0.5
    if known.all() or not known.any():
        raise ValueError(f"--mask {mask}: {'no hole in it' if known.all() else 'nothing but hole'}; black is the hole, "
                         "white is known")
    return known


def warps(mask, shape):
    """Whether a mask out of a file has other proportions than the picture it is brought to."""
    if not Path(mask).is_file():
        return False
    with Image.open(mask) as im:
        return abs(math.log(im.width / im.height * shape[0] / shape[1])) > 0.02


def check_mask(mask, size):
    """Raises ValueError for a --mask that is none, or is a picture without a hole at its own size. size: of a kind."""
    if Path(mask).is_dir():
        find_masks(mask)
        return
    with contextlib.suppress(OSError):                       # what is no picture is named by `find_mask`
        with Image.open(mask) as im:
            size = im.size[::-1]                             # a small hole may be lost at the run's
    find_mask(mask, size, 0)


def find_window(im, known, recipe, about="run"):
    """The window of an upright picture that the networks see: (left, top, right, bottom), whole pixels, holding the
    hole.

    "run": what training would cut out, moved to where the hole is if need be; "hole": about the hole, twice its size,
    but never enlarged. Where such a window cannot hold the hole, or --fit squash says so: the whole picture, squashed.
    It may reach out of the picture with --fit pad.
    """
    height, width = recipe.size
    hole = Image.fromarray(~known).getbbox()
    im = Image.composite(im, Image.new(im.mode, im.size), Image.fromarray(known))     # --crop auto-each looks at it
    try:
        left, top, right, bottom = recipe.box(im)
    except ValueError:                                       # smaller than the window of --crop
        left, top, right, bottom = 0, 0, im.width, im.height
    ratios = (right - left) / width, (bottom - top) / height
    if about == "hole":
        scale = max(1.0, 2 * max((hole[2] - hole[0]) / width, (hole[3] - hole[1]) / height))
        w, h = (round(scale * side) for side in (width, height))
        left, top, right, bottom = hole
    elif recipe.fit == "squash":
        w, h = round(right - left), round(bottom - top)
    else:
        scale = max(ratios) if recipe.fit == "pad" else min(ratios)
        w, h = (max(1, round(scale * side)) for side in (width, height))
    box = []
    for first, last, length, low, high, side in ((left, right, w, hole[0], hole[2], im.width),
                                                 (top, bottom, h, hole[1], hole[3], im.height)):
        place = round((first + last - length) / 2)
        place = max(min(place, low), high - length)          # the hole first, then the picture's border
        if length <= side:
            place = max(0, min(place, side - length))
        box.append((place, place + length))
    (left, right), (top, bottom) = box
    holds = left <= hole[0] and top <= hole[1] and right >= hole[2] and bottom >= hole[3]
    outside = left < 0 or top < 0 or right > im.width or bottom > im.height
    if not holds or (outside and recipe.fit != "pad"):
        return 0, 0, im.width, im.height
    return left, top, right, bottom


def cut_out(pixels, box):
    """The window `box` of (H, W) or (H, W, C); 0 where it reaches out of the picture, as with --fit pad in training."""
    left, top, right, bottom = box
    height, width = pixels.shape[:2]
    outside = (max(0, -top), max(0, bottom - height)), (max(0, -left), max(0, right - width)), (0, 0)
    return np.pad(pixels[max(0, top):bottom, max(0, left):right], outside[:pixels.ndim])


def shrink(pixels, known, size):
    """uint8 (H, W, C) and known (H, W) -> float (C, h, w) in [-1, 1] and known (1, h, w), by one antialiased resize.

    A pixel is the mean over what is known beneath it, so that no hole gets into it, and is known itself if an eighth of
    what lies beneath is; else it is 0. known: None where all is.
    """
    known = np.ones(pixels.shape[:2], bool) if known is None else known

    def resize(plane):
        plane = Image.fromarray(np.ascontiguousarray(plane, np.float32))
        return np.asarray(plane.resize(size[::-1], Image.Resampling.HAMMING))

    share = resize(known)
    planes = [resize(np.where(known, pixels[..., c], 0)) for c in range(pixels.shape[2])]
    m = share >= 1 / 8
    x = np.where(m, np.stack(planes) / np.maximum(share, 1 / 8) / 127.5 - 1, 0.0)
    return torch.from_numpy(x).float(), torch.from_numpy(m[None]).float()


def put_back(pixels, known, box, x, blend="poisson"):
    """The completed window x (C, h, w) put into the hole of uint8 (H, W, C) at full size; known pixels to the byte.

    What of the window lies out of the picture has no say in it.
    """
    left, top, right, bottom = box
    full = F.interpolate(x[None].float().cpu(), (bottom - top, right - left), mode="bicubic", antialias=True)
    full = F.pad(full, (1, 1, 1, 1), "replicate")            # the rim of the hole may lie beside the window
    first, t, last, b = Image.fromarray(~known).getbbox()
    first, t, last, b = max(0, first - 1), max(0, t - 1), min(known.shape[1], last + 1), min(len(known), b + 1)
    guidance = full[..., t - top + 1:b - top + 1, first - left + 1:last - left + 1]
    there, m = pixels[t:b, first:last], known[t:b, first:last]
    target = data.to_float(torch.from_numpy(there.copy()).permute(2, 0, 1)[None].float())
    u = inpainting.blend_into_hole(guidance[:, None], target, torch.from_numpy(m[None, None]).float(), blend)[0, 0]
    out = pixels.copy()
    out[t:b, first:last] = plots.to_uint8(u).permute(1, 2, 0).numpy()                  # exact where known: to and fro
    return out


def read(item, channels, flags):
    """An `Item` -> an upright PIL picture of as many channels as the run has. Raises whatever Pillow raises."""
    raw = item.read()
    im = Image.fromarray(raw) if isinstance(raw, np.ndarray) else Image.open(BytesIO(raw))
    if im.width * im.height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"claims {im.height}x{im.width} pixels, over the limit of {Image.MAX_IMAGE_PIXELS}")
    return decode.upright(im, flags.background, data.parse_range(flags.range) if flags.range else None).convert(
        "L" if channels == 1 else "RGB")


def find_images(images):
    """--images -> list of `sources.Item`: a folder's pictures, or the one that is named."""
    path = Path(images)
    if path.is_file() and path.suffix.lower() in sources.SUFFIXES:
        return [sources.Item(path.name, sources.file_stamp(path), path.read_bytes)]
    try:
        return sources.find_items(images)
    except (ValueError, OSError) as error:
        raise type(error)(str(error).replace("--data", "--images")) from None


# ---------------------------------------------------------------------------------------------------------------------
# Using it
# ---------------------------------------------------------------------------------------------------------------------

def prepare_input(item, mask, seed, recipe, about, size, flags):
    """A picture made ready: (pixels (H, W, C), known (H, W), box, y (C, h, w), m (1, h, w))."""
    im = read(item, size[0], flags)
    pixels = np.asarray(im).reshape(im.height, im.width, -1)
    known = find_mask(mask, pixels.shape[:2], seed)
    box = find_window(im, known, recipe, about)
    return pixels, known, box, *shrink(cut_out(pixels, box), ~cut_out(~known, box), size[1:])


def fill(items, masks, recipe, methods, enhancer, args, size, flags, device, out):
    """Completes the pictures and writes them: (names written, (name, reason) of those left out, rows of the sheet)."""
    written, left_out, rows, squashed, warped = [], [], [], 0, []
    stems = collections.Counter(stem(item.name).lower() for item in items)
    for part in runtime.batched_slices(len(items), args.batch, "pictures"):
        ready = []
        for k, item, mask in zip(range(part.start, part.stop), items[part], masks[part]):
            try:
                ready.append((item.name, *prepare_input(item, mask, args.seed + k, recipe, args.window, size, flags)))
                warped += [item.name] if warps(mask, ready[-1][1].shape) else []
            except Exception as error:                       # a damaged file makes Pillow raise almost anything
                left_out.append((item.name, runtime.first_line(error)))
        if not ready:
            continue
        *_, y, m = zip(*ready)
        y, m = torch.stack(y).to(device), torch.stack(m).to(device)
        answers = [inpainting.complete_batch(method, y, m, args.blend, None if k else enhancer)
                   for k, method in enumerate(methods)]
        x = torch.cat(answers, 1)[:, :inpainting.KEPT].cpu()
        for (name, pixels, known, box, _, small), found in zip(ready, x):
            whole = put_back(pixels, known, box, found[0], args.blend)
            left, top, right, bottom = box
            stretched = (right - left) / (bottom - top) * size[1] / size[2]
            squashed += recipe.fit != "squash" and abs(math.log(stretched)) > 0.1
            if len(rows) < 16:
                original, seen = (shrink(cut_out(picture, box), None, size[1:])[0] for picture in (pixels, whole))
                rows.append([original, original * small, seen, *found[1:]])
            base = stem(name) if stems[stem(name).lower()] == 1 else name
            file = Image.fromarray(whole[..., 0] if size[0] == 1 else whole)
            runs.write_atomically(out / "completed" / f"{base}.png", file.save)
            written.append(name)
    if warped:
        runtime.print_rank0(f"the mask has another shape than {len(warped)} of {len(written)} pictures, {warped[0]} for one, "
                    "and was stretched: look whether the hole is where you want it")
    if squashed:
        runtime.print_rank0(f"{squashed} of {len(written)} pictures were worked on whole, squashed to {size[1]}x{size[2]}: no "
                    "window of the run's shape holds their hole, and what is made so fits less well")
    return written, left_out, rows


def save_sheet(path, rows, titles):
    """Rows of pictures (C, h, w) under the titles of their columns."""
    sheet = plots.grid(torch.stack([x for row in rows for x in row]), len(rows[0]))
    k = max(1, min(4, 800 // max(sheet.size)), -(-125 * len(rows[0]) // sheet.width))     # room for the titles
    sheet = sheet.resize((sheet.width * k, sheet.height * k), Image.Resampling.NEAREST)
    page = Image.new(sheet.mode, (sheet.width, sheet.height + 20), "white")
    page.paste(sheet, (0, 20))
    draw = ImageDraw.Draw(page)
    for column, title in enumerate(titles):
        draw.text((sheet.width * column // len(titles) + 4, 3), title, "black", plots.font(12))
    runs.write_atomically(path, page.save)


def use(args, folder, saved, size, method, device):
    """Complete --images, or some held-out pictures of the run."""
    flags = run_flags(saved, args)
    check_mask(args.mask, size[1:])                          # a mistake is said before anything is read
    methods = [method]
    if args.alternatives and isinstance(method, inpainting.Search):
        raise ValueError("--alternatives goes with a pix2pix run; a search has alternatives of its own")
    if args.alternatives:
        other = runs.find_run(args.alternatives, SEARCH)
        _, size_there, searcher = load_method(other, args, device)
        if size_there != size:
            raise ValueError(f"--alternatives {args.alternatives} draws {size_there} (channels, height, width), and "
                             f"{folder} {size}: it has to be the same")
        methods.append(searcher)
    if args.images:
        items, recipe = find_images(args.images), decode.Preprocess(size[1:], flags.fit, flags.crop, str(size[0]))
        if flags.crop in ("auto", "auto-each"):
            trained = sources.find_items(flags.data, getattr(flags, "classes", ""), flags.range)
            recipe, _ = data.resolve_crop(recipe, trained[:flags.limit] if flags.limit else trained)
        items = items[:args.n]
    else:
        pictures = run_pictures(saved, args, "heldout")[:args.n or 16]
        planes = [np.ascontiguousarray(x[0] if size[0] == 1 else x.transpose(1, 2, 0)) for x in pictures]
        items = [sources.Item(f"heldout-{k:04d}", (), lambda x=x: x) for k, x in enumerate(planes)]
        recipe = decode.Preprocess(size[1:], "squash")
    masks = choose_masks(args.mask, items)
    numbered = (folder / f"completed-{k}" for k in range(1, 10**6))
    out = Path(args.out) if args.out else next(path for path in numbered if not path.exists())
    if out.exists():
        raise ValueError(f"--out {out} exists already and is left as it is: give another name")
    enhancer = load_enhancer(folder, saved, method, size, args, device) if args.enhance else None
    runtime.print_rank0(f"completing {len(items)} pictures with {folder} (step {saved['step']}), {device.type}"
                + ", in grey as the run is" * (size[0] == 1))
    written, left_out, rows = fill(items, masks, recipe, methods, enhancer, args, size, flags, device, out)
    if left_out:
        runtime.print_rank0(f"left out: {'; '.join(f'{name} ({why})' for name, why in left_out[:5])}"
                    + f"; and {len(left_out) - 5} more" * (len(left_out) > 5))
    if not written:
        raise ValueError(f"none of the {len(items)} pictures could be completed")
    titles = ["original", "masked", "completed", *(f"alternative {k}" for k in range(1, len(rows[0]) - 2))]
    save_sheet(out / "sheet.png", rows, titles)
    if len(titles) == 3:
        runtime.print_rank0("a pix2pix network has one answer; for others beside it name a WGAN or DCGAN run with "
                    "--alternatives" if isinstance(method, inpainting.Forward) else "one restart, one answer")
    runtime.print_rank0(f"wrote {len(written)} pictures to {out / 'completed'}; look at {out / 'sheet.png'}")


# ---------------------------------------------------------------------------------------------------------------------
# Measuring it
# ---------------------------------------------------------------------------------------------------------------------

def mean_fill(y, known):
    """The mean colour of the known pixels in the hole."""
    total = inpainting.composite(y, torch.zeros_like(y), known).sum((2, 3), keepdim=True)
    mean = total / known.sum((2, 3), keepdim=True)
    return inpainting.composite(y, mean, known)


def mean_picture(images, batch=256):
    """The mean of uint8 rows (N, C, h, w), float (1, C, h, w) in [-1, 1]."""
    total = sum(images[k:k + batch].astype(np.float64).sum(0) for k in range(0, len(images), batch))
    return data.to_float(torch.from_numpy(total / len(images)).float())[None]


def compare(real, fake, known):
    """PSNR, SSIM and L1 of uint8 fake against real (N, C, h, w), over the hole and whole: {name: mean over pictures}.

    PSNR in dB with 255 as the peak, 10 log10(255^2 / mean squared error) of each picture; L1 in % of 255. SSIM of the
    hole is the mean over the windows of 11x11 with their centres in it. Sides under 11 have no SSIM.
    """
    a, b = torch.from_numpy(np.asarray(real)).double(), torch.from_numpy(np.asarray(fake)).double()
    hole = (known < 0.5).double().expand_as(a)
    square, share = (a - b).square(), hole.flatten(1).sum(1)
    scores = {"hole_psnr": 10 * torch.log10(255**2 / ((square * hole).flatten(1).sum(1) / share).clamp_min(1e-9)),
              "psnr": metrics.psnr(a, b, 255).clamp_max(158),
              "hole_l1": 100 / 255 * ((a - b).abs() * hole).flatten(1).sum(1) / share,
              "l1": 100 / 255 * (a - b).abs().flatten(1).mean(1)}
    scores = {name: float(values.mean()) for name, values in scores.items()}
    if min(a.shape[2:]) >= 11:
        windows, hole = metrics.similarity_maps(a, b, 255)[0].mean(1), hole[:, 0, 5:-5, 5:-5]
        scores["ssim"] = float(windows.mean())
        if hole.any():
            of_each = (windows * hole).sum((1, 2)) / hole.sum((1, 2))
            scores["hole_ssim"] = float(of_each.nanmean())
    return scores


def measure(args, folder, saved, size, method, device):
    """--evaluate: completions of held-out pictures beside three baselines; the table, completion.json, a sheet."""
    real = run_pictures(saved, args, "heldout")[:args.n]
    train = run_pictures(saved, args, "train")
    known = run_masks(args.mask, len(real), size, args.seed + HELD_OUT)
    features, extract = args.features or ("inception" if args.weights else "random"), None
    if features != "none" and len(real) > 1:                 # of one picture there is no KID
        extract = inception.load_features(features, args.weights, device=device)
    enhancer = load_enhancer(folder, saved, method, size, args, device) if args.enhance else None
    average = mean_picture(train)
    runtime.print_rank0(f"completing {len(real)} held-out pictures of {folder} (step {saved['step']}), mask {args.mask}")
    found, began = {}, time.monotonic()
    for part in runtime.batched_slices(len(real), args.batch, "pictures"):
        y, m = data.to_float(torch.from_numpy(real[part])), known[part]
        y = inpainting.composite(y, torch.zeros_like(y), m)
        there, hole = y.to(device), m.to(device)
        content = method(there, hole)[:, :1]
        ours = {"pasted": inpainting.blend_into_hole(content, there, hole, "paste"),
                "+ Poisson": inpainting.blend_into_hole(content, there, hole)}
        if enhancer:                                         # corrects what it was trained on
            ours["+ enhancement"] = inpainting.enhance(
                enhancer, ours["pasted" if args.blend == "paste" else "+ Poisson"], hole)
        for name, x in {"mean fill": mean_fill(y, m), "harmonic fill": inpainting.harmonic_fill(y, m),
                        "mean image + Poisson": inpainting.poisson_blend(y, average.expand_as(y), m).clamp(-1, 1),
                        **{f"this run, {name}": x[:, 0].cpu() for name, x in ours.items()}}.items():
            found.setdefault(name, []).append(plots.to_uint8(x).numpy())
    took = time.monotonic() - began
    found = {name: np.concatenate(parts) for name, parts in found.items()}
    rows = {name: compare(real, fake, known) for name, fake in found.items()}
    shown = [data.to_float(torch.from_numpy(np.asarray(x[:12]))) for x in (real, *found.values())]
    shown.insert(1, shown[0] * known[:len(shown[0])])
    sheet, path = folder / f"completion-{Path(args.mask).stem}.png", folder / "completion.json"
    save_sheet(sheet, [list(row) for row in zip(*shown)], ["original", "masked", *(name.removeprefix("this run, ")
                                                                             for name in found)])
    about = dict(n=len(real), seed=args.seed, step=saved["step"], seconds=round(took, 1), features="none",
                 search=None if isinstance(method, inpainting.Forward) else dict(
                     restarts=args.restarts, iterations=args.iterations, prior=args.prior, precision=args.precision),
                 scores=rows)
    keep(path, args.mask, about)                             # features take a while, and nothing is to be lost
    kind = "no KID"
    if extract:
        # Held against training pictures: against its own original each completion would look too good.
        chosen = np.random.RandomState(args.seed).permutation(len(train))[:2 * len(real)]
        against = len(chosen)
        runtime.print_rank0(f"features of {against + len(real) * (len(found) + 1)} pictures for KID")
        reference = extract(train[np.sort(chosen)], progress=True)
        for name, fake in {"the originals": real, **found}.items():
            mean, std = metrics.kid(reference, extract(fake, progress=True), subset_size=min(1000, len(real)))
            rows.setdefault(name, {}).update(kid=mean, kid_std=std)
        keep(path, args.mask, {**about, "features": extract.name, "against": against})
        kind = f"KID against {against} training pictures; features: {extract.name}"
    runtime.print_rank0(f"{len(real)} held-out pictures, mask {args.mask}; PSNR in dB, L1 in %; {kind}\n{table(rows)}\n"
                f"wrote {path} and {sheet}; {took / len(real):.2f} s a picture")


def keep(path, mask, about):
    """`about` under the name of its mask into a JSON file, beside what stands there of other masks."""
    whole = {}
    with contextlib.suppress(OSError, json.JSONDecodeError):
        whole = json.loads(path.read_text("utf-8"))
    text = json.dumps({**whole, mask: about}, indent=1)
    runs.write_atomically(path, lambda path: path.write_text(text, "utf-8"))


def table(rows):
    """The scores as lines to print."""
    columns = (("hole_psnr", "{:.2f}"), ("psnr", "{:.2f}"), ("hole_ssim", "{:.3f}"), ("ssim", "{:.3f}"),
               ("hole_l1", "{:.2f}"), ("l1", "{:.2f}"), ("kid", "{:.2g}"), ("kid_std", "{:.2g}"))
    lines = [" " * 26 + "".join(f"{name:>11}" for name, _ in columns)]
    for name, scores in rows.items():
        cells = [form.format(scores[key]) if key in scores else "" for key, form in columns]
        lines.append(f"{name:26}" + "".join(f"{cell:>11}" for cell in cells))
    return "\n".join(lines)


def main(argv=None):
    args = parse_arguments(argv)
    with runtime.exit_on_user_error("complete.py"):
        folder = runs.find_run(args.run, (*SEARCH, FORWARD))
        device = runtime.pick_device(args.device)
        saved, size, method = load_method(folder, args, device)
        (measure if args.evaluate else use)(args, folder, saved, size, method, device)


if __name__ == "__main__":
    main()
