"""Look at a folder of images and clean it: what is in it, what is wrong with it, where to crop, a clean copy.

    python prepare.py teeth                                     what is in the folder and what is wrong with it
    python prepare.py teeth --crop auto --preview crop.png      find the region with the most detail and draw it
    python prepare.py teeth --crop auto --size 256 --out clean  write the images that pass, as training will see them

The folder itself is only read. Without --preview, --report and --out nothing is written.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import shlex
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageChops, ImageColor, ImageDraw, ImageFile, ImageFilter, ImageOps, ImageStat

import cli
import data
import decode
import plots
import runs
import runtime
import sources


@dataclasses.dataclass(frozen=True)
class Preprocess(decode.Preprocess):
    """`decode.Preprocess` with the decisions about a data set that training does not take."""
    background: str = "white"                                # below transparent pixels
    value_range: tuple = None                                # (low, high) of 16-bit and float grey; None: of each image
    denoise: str = ""                                        # "median" or "nlm"
    draft = property(lambda self: not self.denoise)          # whether a JPEG may be decoded at a reduced size

    def upright(self, im):
        im = decode.upright(im, self.background, self.value_range)
        if self.denoise:
            grey = im.convert("L")                           # a third of the work where it loses nothing
            coloured = self.channels != "1" and ImageChops.difference(im, grey.convert(im.mode)).getbbox()
            im = denoise(im if coloured else grey, self.denoise)
        return im


def denoise(im, method):
    """"median": of 3x3 pixels. "nlm": non-local means (Buades et al. 2005), patches of 3x3 in a window of 11x11.

    Non-local means: out(p) = sum_q w(p, q) in(q) / sum_q w(p, q), w = exp(-max(0, d - 2 s^2) / h^2), d the mean squared
    difference of the patches around p and q, s the standard deviation of the noise, estimated from the image (Immerkaer
    1996), h = 0.8 s. Mode L or RGB in and out; each channel is filtered separately.
    """
    if method == "median":
        return im.filter(ImageFilter.MedianFilter(3))
    x = np.atleast_3d(np.asarray(im, np.float32))
    h, w = x.shape[:2]
    if min(h, w) < 8:
        return im
    sigma = math.sqrt(math.pi / 2) / 6 * np.abs(np.diff(np.diff(x, 2, 0), 2, 1)).mean()
    if sigma < 0.1:
        return im
    reach = 5
    padded = np.pad(x, ((reach + 1, reach + 1), (reach + 1, reach + 1), (0, 0)), "reflect")
    centre = padded[reach:reach + h + 2, reach:reach + w + 2]
    total, weights = np.zeros_like(x), np.zeros_like(x)
    for dy, dx in np.ndindex(2 * reach + 1, 2 * reach + 1):
        shifted = padded[dy:dy + h + 2, dx:dx + w + 2]
        square = (shifted - centre) ** 2
        rows = square[:-2] + square[1:-1] + square[2:]
        d = (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]) / 9
        weight = np.exp(-np.maximum(d - 2 * sigma**2, 0) / (0.8 * sigma) ** 2)
        total += weight * shifted[1:-1, 1:-1]
        weights += weight
    out = (total / weights).round().clip(0, 255).astype(np.uint8)
    return Image.fromarray(out[..., 0] if im.mode == "L" else out)


def detail(im, side=64, fine=4):
    """Where an image has fine detail: its squared gradient at side x fine pixels, pooled to (side, side), mean 1."""
    x = np.asarray(im.convert("L").resize((side * fine, side * fine), Image.Resampling.BOX), np.float64)
    energy = np.diff(x, axis=1, prepend=x[:, :1]) ** 2 + np.diff(x, axis=0, prepend=x[:1]) ** 2
    energy = energy.reshape(side, fine, side, fine).mean((1, 3))
    return energy / max(energy.mean(), 1e-9)


def window_of_detail(energy, floor=1.2):
    """The rectangle with the largest sum of energy - floor x mean: (left, top, right, bottom) as fractions.

    Searches all pairs of rows and, along them, the largest run of columns (Kadane): the smallest window that leaves out
    only what has less detail than the image has on average.
    """
    side = len(energy)
    gain = np.pad(np.cumsum(energy - floor * energy.mean(), axis=0), ((1, 0), (0, 0)))
    best = (0.0, 0, 0, side, side)                           # if no part has more detail than another: all of it
    for top in range(side):
        sums = np.cumsum(gain[top + 1:] - gain[top], axis=1)                          # (rows below, columns)
        before = np.pad(sums, ((0, 0), (1, 0)))[:, :-1]
        run = sums - np.minimum.accumulate(before, axis=1)
        row, right = map(int, np.unravel_index(run.argmax(), run.shape))
        if run[row, right] > best[0]:
            best = (run[row, right], int(before[row, :right + 1].argmin()), top, right + 1, top + row + 1)
    return tuple(round(edge / side, 4) for edge in best[1:])


def find_crop(items, most=256, margin=0.04):
    """The window of interest common to a set, from the detail of at most `most` of its images, as --crop's fractions.

    `margin` (a fraction of the image) is added on all sides. Raises UserError if none of them can be read.
    """
    maps = [energy for energy in data.parallel_map(_detail_of, plots.evenly_spaced(items, most)) if energy is not None]
    if not maps:
        raise runtime.UserError("--crop auto: none of the images can be read")
    left, top, right, bottom = window_of_detail(np.mean(maps, axis=0))
    window = max(0, left - margin), max(0, top - margin), min(1, right + margin), min(1, bottom + margin)
    return ",".join(f"{edge:.4g}" for edge in window)


def _detail_of(item):
    with contextlib.suppress(Exception):                     # an unreadable file is listed by the census
        im = decode.open_image(item.read())
        im.draft(None, (512, 512))
        return detail(decode.upright(im))


# What an image may be an outlier in: the least difference from the median that counts, and how to print a value.
MEASURES = {"size": (0.2, lambda log: f"{math.exp(log) / 1e6:.2f} Mpixel"),
            "aspect": (0.05, lambda log: f"{math.exp(log):.2f}:1"), "brightness": (2, "{:.0f}".format),
            "contrast": (2, "{:.0f}".format), "colour": (3, "{:.0f}".format)}


def inspect_file(preprocess, item):
    """What a census needs to know of an `Item`, as a dict; with "problem" if training will not use it. Never raises.

    The shape is that of the upright image. "thumb", for `near_pairs`: grey, uint8 (16, 17).
    """
    file = dict(name=item.name, bytes=item.stamp[0] if item.stamp else 0)
    try:
        raw = item.read()
        file |= dict(digest=hashlib.blake2b(raw, digest_size=8).hexdigest(), bytes=memoryview(raw).nbytes)
        im = decode.open_image(raw)
        width, height = im.size
        file |= dict(format=im.format or "array", mode=im.mode)
        kind = "JPEG" if im.format == "MPO" else im.format                            # several JPEGs in one file
        if kind and Image.registered_extensions().get(Path(item.name).suffix.lower(), kind) != kind:
            file["suffix"] = f"is {im.format}"
        pixels, small = preprocess.pixels(raw)               # what training makes of it, or why it will not use it
        im.draft(None, (256, 256))
        before = im.size
        im = preprocess.upright(im)
        if im.size != before:                                # turned by EXIF
            width, height = height, width
        x = np.asarray(im.convert("RGB").resize((48, 48), Image.Resampling.BOX), np.float64)
        im = im.convert("L")
        file |= dict(shape=f"{height}x{width}", size=math.log(height * width), aspect=math.log(width / height),
                     small=small, coloured=decode.has_colour(pixels), colour=np.ptp(x, 2).mean(), brightness=x.mean(),
                     contrast=ImageStat.Stat(im).stddev[0],
                     thumb=np.asarray(im.resize((17, 16), Image.Resampling.BOX)))
    except Exception as error:                               # a damaged file makes Pillow raise almost anything
        file["problem"] = decode.describe_decode_error(error)
    return file


def near_pairs(thumbs, bits=24, likeness=0.985):
    """Which images are copies of an earlier one but for coding or size: uint8 (N, 16, 17) -> [(i, j), ...], i < j.

    Each j occurs once, with the first i it is a copy of. Two images are near copies if their difference hashes of 256
    bits (is a pixel brighter than its left neighbour?) differ in at most `bits`, their thumbnails correlate by at least
    `likeness`, and neither is nearly blank. All pairs are compared, by matrix products of bounded size.
    """
    n, pairs = len(thumbs), []
    hashes = torch.from_numpy(thumbs[:, :, 1:] > thumbs[:, :, :-1]).reshape(n, 256).float() * 2 - 1
    flat = torch.from_numpy(thumbs).reshape(n, 272).float()
    flat -= flat.mean(1, keepdim=True)
    length = flat.norm(dim=1, keepdim=True)
    flat = torch.where(length > 16, flat / length, 0)
    for part in runtime.batched_slices(n, max(1, 2**24 // max(1, n)), "images compared"):
        alike = (flat[part] @ flat[:part.stop].T >= likeness).tril(part.start - 1)    # to earlier images
        rows = alike.any(1).nonzero()[:, 0]
        alike = alike[rows] & (hashes[part][rows] @ hashes[:part.stop].T >= 256 - 2 * bits)
        pairs += [(int(row.argmax()), part.start + k) for row, k in zip(alike.numpy(), rows.tolist()) if row.any()]
    return sorted(pairs)


def census(items, preprocess):
    """What is in a set and what is wrong with it: (report, inspected files).

    report: a dict with files, usable, bytes, formats, modes, sizes, and "problems": {kind: [(file name, detail), ...]}.
    A near duplicate is named beside the first image it is a copy of, where one too small does not come before one that
    is large enough.
    """
    results = iter(data.parallel_map(functools.partial(inspect_file, preprocess), items))
    files = [next(results) for _ in runtime.batched_slices(len(items), 1, "files inspected")]
    good = [file for file in files if "problem" not in file]
    first = {file["digest"]: file["name"] for file in reversed(good)}                 # the first with this content
    unique = sorted((file for file in good if file["contrast"] >= 3 and first[file["digest"]] == file["name"]),
                    key=lambda file: file["small"])
    pairs = near_pairs(np.array([file["thumb"] for file in unique], np.uint8).reshape(-1, 16, 17))
    problems = {
        "unreadable": [(file["name"], file["problem"]) for file in files if "problem" in file],
        "wrong suffix": [(file["name"], file["suffix"]) for file in good if "suffix" in file],
        "small": [(file["name"], file["shape"] + ", cropped to less" * bool(preprocess.crop))
                  for file in good if file["small"]],
        "blank": [(file["name"], f"contrast {file['contrast']:.1f}") for file in good if file["contrast"] < 3],
        "exact duplicate": [(file["name"], first[file["digest"]]) for file in good
                            if first[file["digest"]] != file["name"]],
        "near duplicate": [(unique[j]["name"], unique[i]["name"]) for i, j in pairs],
        "odd": []}
    for name, (least, show) in MEASURES.items() if len(good) >= 8 else ():
        values = np.array([file[name] for file in good])
        usual = np.median(values)
        distance = np.abs(values - usual)                    # 1.4826 of its median: a robust standard deviation
        odd = distance > max(6 * 1.4826 * np.median(distance), 0.12 * abs(usual), least)
        problems["odd"] += [(good[k]["name"], f"{name} {show(values[k])}, usually {show(usual)}")
                            for k in np.flatnonzero(odd)]
    counts = {name: dict(collections.Counter(file[key] for file in good).most_common())
              for name, key in (("formats", "format"), ("modes", "mode"), ("sizes", "shape"))}
    return dict(files=len(files), usable=len(good), bytes=sum(file["bytes"] for file in files), **counts,
                problems=problems), files


def report_lines(source, report, most=6):
    """A census as the lines to print."""
    yield f"{source}: {report['files']} files, {report['bytes'] / 1e6:.1f} MB; {report['usable']} can be used"
    for kind in ("formats", "modes", "sizes"):
        counts = [f"{count} {name}" for name, count in report[kind].items()]
        yield f"  {kind}: {', '.join(counts[:most])}" + f", and {len(counts) - most} others" * (len(counts) > most)
    for kind, entries in report["problems"].items():
        if entries:
            shown = "; ".join(f"{name} ({why})" for name, why in entries[:most])
            yield f"  {kind}: {len(entries)}: {shown}" + f"; and {len(entries) - most} more" * (len(entries) > most)


def preview(items, preprocess, most=48, side=160):
    """A grid of up to `most` images of a set, evenly chosen, with the crop in yellow and what --fit leaves in green."""
    tiles = data.parallel_map(functools.partial(_tile, preprocess, side), plots.evenly_spaced(items, most))
    pixels = np.stack([tile for tile in tiles if tile is not None]).transpose(0, 3, 1, 2)
    return plots.grid(data.to_float(torch.from_numpy(pixels)), columns=8, pad=4)


def _tile(preprocess, side, item):
    with contextlib.suppress(Exception):                     # an unreadable file is listed by the census
        im = preprocess.upright(decode.open_image(item.read())).convert("RGB")
        boxes, scale = [preprocess.window()(*im.size)], (side - 1) / max(im.size)
        boxes += [decode.center_box(boxes[0], preprocess.size)] * (preprocess.fit == "crop")
        im = ImageOps.contain(im, (side, side))
        for box, colour in zip(boxes, ((255, 200, 0), (0, 220, 120))):
            ImageDraw.Draw(im).rectangle([edge * scale for edge in box], None, colour, 2)
        return np.asarray(ImageOps.pad(im, (side, side), color=(64, 64, 64)))


def clean(items, files, report, preprocess, out, keep_small=False, keep_copies=False):
    """Write the images that pass to the folder `out` as PNG -> (written, were there already, {name: why left out}).

    files, report: from `census`. What passes can be read, is not blank, no exact copy of an earlier image, no near copy
    (unless keep_copies) and not smaller than the target (unless keep_small). It keeps its name, with .png as suffix, or
    appended where two names would become one. manifest.jsonl says where each file came from; a file it lists with
    the same source and settings is not written again: an interrupted run goes on, and two runs give identical files.
    """
    out, manifest = Path(out), Path(out) / "manifest.jsonl"
    kinds = ["near duplicate"] * (not keep_copies) + ["unreadable", "exact duplicate", "blank"]
    kinds += ["small"] * (not keep_small)                    # of several reasons the last is given
    reasons = {name: kind for kind in kinds for name, _ in report["problems"][kind]}
    passing = [(item, file) for item, file in zip(items, files) if item.name not in reasons]
    coloured = preprocess.channels == "auto" and any(file["coloured"] for _, file in passing)
    mode = "RGB" if coloured or preprocess.channels == "3" else "L"
    settings = hashlib.blake2b(repr((preprocess, mode)).encode(), digest_size=6).hexdigest()
    stems, made = {item.name: os.path.splitext(item.name)[0] for item, _ in passing}, {}
    taken = collections.Counter(form.lower() for pair in stems.items() for form in set(pair))
    for line in manifest.read_text("utf-8").splitlines() if manifest.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):      # the last line of an interrupted run
            row = json.loads(line)
            made[row["file"]] = row

    def write(entry):
        item, file = entry
        name, stem = item.name, stems[item.name]
        row = dict(file=f"{stem if taken[stem.lower()] == 1 else name}.png", source=name,
                   digest=file["digest"], settings=settings)
        target = out / row["file"]
        if made.get(row["file"]) == row and target.exists():
            return row, False
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_suffix(".unfinished")
        Image.fromarray(preprocess.pixels(item.read())[0]).convert(mode).save(unfinished, "PNG")
        os.replace(unfinished, target)
        return row, True

    out.mkdir(parents=True, exist_ok=True)
    lines, written, results = [], 0, iter(data.parallel_map(write, passing))
    with open(manifest, "a", encoding="utf-8") as file:
        for _ in runtime.batched_slices(len(passing), 1, "images written"):
            row, new = next(results)
            lines.append(json.dumps(row) + "\n")
            print(lines[-1], end="", file=file, flush=True)
            written += new
    runs.write_atomically(manifest, lambda path: path.write_text("".join(sorted(lines)), "utf-8"))
    return written, len(lines) - written, reasons


def colour(text):
    """An argparse type: a colour as Pillow spells it."""
    with contextlib.suppress(ValueError):
        return ImageColor.getrgb(text) and text
    raise runtime.UserError(f"expected a colour, as in white or #808080, got {text!r}")


def value_range(text):
    """An argparse type: "0,4095" -> (0.0, 4095.0)."""
    with contextlib.suppress(ValueError):
        low, high = map(float, text.split(","))
        if low < high and math.isfinite(high - low):
            return low, high
    raise runtime.UserError(f"expected LOW,HIGH with LOW < HIGH, as in 0,4095, got {text!r}")


def parse_arguments(argv=None):
    parser = cli.Parser("prepare.py", __doc__)
    add = parser.add_argument
    add("source", metavar="FOLDER", help="a folder of images, an idx or idx.gz file, a .npy or .npz array, or demo")
    add("--classes", default="", help="only these sub-folders or labels, separated by commas, as in 3,7 (default: all)")
    add("--size", default="64", help="size of the images for training: 64, or HEIGHTxWIDTH as in 288x512 (default: 64)")
    add("--fit", default="crop", choices=("crop", "squash", "pad"), help="how images of another shape are brought to "
        "--size: centre crop, squash, or pad with black (default: crop)")
    add("--crop", default="", help="cut this out of each image first: LEFT,TOP,RIGHT,BOTTOM as fractions, HEIGHTxWIDTH@"
        "ANCHOR in pixels, or auto, the window with the most detail over the whole set (default: all of the image)")
    add("--channels", default="auto", choices=("auto", "1", "3"), help="1 for grey, 3 for colour, auto for grey unless "
        "an image has colour (default: auto)")
    add("--background", default="white", type=colour, help="colour below transparent images (default: white)")
    add("--range", type=value_range, metavar="LOW,HIGH", help="values of 16-bit and float files that become black and "
        "white, as in 0,4095 (default: the lowest and highest of each image)")
    add("--denoise", default="", choices=("median", "nlm"), help="filter the images of --out by a median of 3x3 pixels "
        "or by non-local means (default: no filter)")
    add("--keep-truncated", action="store_true", help="use what can be read of files cut short (default: unreadable)")
    add("--limit", type=cli.positive_int, metavar="N", help="use only the first N files (default: all)")
    add("--keep-small", action="store_true", help="--out has images smaller than --size too (default: left out)")
    add("--keep-copies", action="store_true", help="--out has near copies of earlier images too (default: left out)")
    add("--preview", default="", metavar="FILE.png", help="write a sample grid of up to 48 originals with the crop in "
        "yellow and what --fit crop leaves of it in green (default: none)")
    add("--report", default="", metavar="FILE.json", help="write all that was found (default: none)")
    add("--out", default="", metavar="CLEAN", help="a folder to write the images that pass into (default: none)")
    return parser.parse_args(argv)


def check_paths(args):
    """Raises UserError for an output of the wrong suffix or inside the source, which is only read."""
    source = Path(args.source).resolve()
    for flag, path, suffix in (("--preview", args.preview, ".png"), ("--report", args.report, ".json"),
                               ("--out", args.out, "")):
        target = Path(path).resolve()
        if path and not path.lower().endswith(suffix):
            raise runtime.UserError(f"{flag}: expected a file name that ends in {suffix}, got {path!r}")
        if path and source.is_dir() and (target == source or source in target.parents or target in source.parents):
            raise runtime.UserError(f"{flag} {path} is inside {args.source} or contains it: choose a place beside it")
    if args.range and source.suffix in (".npy", ".npz"):
        raise runtime.UserError(f"--range is for image files, and {args.source} is an array: scale it to uint8 first")


def prepare(args):
    """The census, and what --crop auto, --report, --preview and --out ask for."""
    auto, say = args.crop == "auto", runtime.print_rank0     # which goes on when `| head` has closed its end
    preprocess = Preprocess(decode.parse_size(args.size), args.fit, "" if auto else args.crop, args.channels,
                            args.background, args.range, args.denoise)
    preprocess.check()
    check_paths(args)
    items = sources.find_items(args.source, args.classes)[:args.limit]
    if auto:
        preprocess = dataclasses.replace(preprocess, crop=find_crop(items))
    original = dataclasses.replace(preprocess, denoise="")   # denoising is slow and changes nothing in the report
    report, files = census(items, original)
    say("\n".join(report_lines(args.source, report)))
    if args.report:
        runs.write_atomically(args.report, lambda path: path.write_text(json.dumps(report, indent=1), "utf-8"))
        say(f"wrote {args.report}")
    if not report["usable"]:
        raise runtime.UserError(f"{args.source}: none of the {len(items)} files can be read")
    if auto:
        say(f"the window with the most detail (left, top, right, bottom), for training:\n    --crop {preprocess.crop}")
    if args.preview:
        usable = [item for item, file in zip(items, files) if "problem" not in file]
        runs.write_atomically(args.preview, lambda path: preview(usable, original).save(path))
        say(f"wrote {args.preview}: yellow is the crop" + ", green what --fit crop leaves of it" * (args.fit == "crop"))
    if args.out:
        written, there, reasons = clean(items, files, report, preprocess, args.out, args.keep_small, args.keep_copies)
        counts = ", ".join(f"{count} {reason}" for reason, count in collections.Counter(reasons.values()).items())
        say(f"wrote {written} images to {args.out} ({there} more were there already); left out {len(reasons)}"
            + f": {counts}" * bool(reasons))
        if not written + there:
            raise runtime.UserError(f"no image of {args.source} passes; --keep-small keeps those below {args.size}")
        others = len(sources.find_images(args.out)) - written - there
        if others:
            say(f"{args.out} also holds {others} images that are not of this run: delete them or choose another --out")
        channels = f" --channels {args.channels}" * (args.channels != "auto")
        say(f"train on it:\n    python train_wgan.py --data {shlex.quote(args.out)} --size {args.size}{channels}")


def main(argv=None):
    args = parse_arguments(argv)
    with runtime.exit_on_user_error("prepare.py"), contextlib.ExitStack() as stack:
        stack.callback(setattr, ImageFile, "LOAD_TRUNCATED_IMAGES", ImageFile.LOAD_TRUNCATED_IMAGES)
        ImageFile.LOAD_TRUNCATED_IMAGES = args.keep_truncated
        prepare(args)


if __name__ == "__main__":
    main()
