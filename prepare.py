"""Look at a folder of images and clean it: what is in it, what is wrong with it, where to crop, a clean copy.

    python prepare.py teeth                                     what is in the folder and what is wrong with it
    python prepare.py teeth --crop auto --preview crop.png      find the region where the images differ and draw it
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
import shlex
from os.path import splitext
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFile, ImageFilter, ImageOps, ImageStat

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
            grey = self.channels == "1" or len({band.tobytes() for band in im.split()}) == 1     # a third of the work
            im = denoise(im.convert("L") if grey else im, self.denoise)
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
    sigma = 0 if min(h, w) < 8 else math.sqrt(math.pi / 2) / 6 * np.abs(np.diff(np.diff(x, 2, 0), 2, 1)).mean()
    if sigma < 0.1:
        return im
    padded = np.pad(x, ((6, 6), (6, 6), (0, 0)), "reflect")  # 5 of the window and 1 of the patch
    centre = padded[5:h + 7, 5:w + 7]
    total, weights = np.zeros_like(x), np.zeros_like(x)
    for dy, dx in np.ndindex(11, 11):
        shifted = padded[dy:dy + h + 2, dx:dx + w + 2]
        square = (shifted - centre) ** 2
        rows = square[:-2] + square[1:-1] + square[2:]
        d = (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]) / 9
        weight = np.exp(-np.maximum(d - 2 * sigma**2, 0) / (0.8 * sigma) ** 2)
        total += weight * shifted[1:-1, 1:-1]
        weights += weight
    out = (total / weights).round().clip(0, 255).astype(np.uint8)
    return Image.fromarray(out[..., 0] if im.mode == "L" else out)


def fine_detail(pixels):
    """What a pixel of uint8 (s, s) differs by from the mean of 5x5, at the sides s, s / 2 and s / 4: int16 arrays."""
    return [np.subtract(x, x.filter(ImageFilter.BoxBlur(2)), dtype=np.int16)
            for x in map(Image.fromarray(pixels).reduce, (1, 2, 4))]


def varying_detail(fine, cells=64, most=32):
    """The detail that no other image has in the same place: int16 (n, side, side) -> (n, cells, cells) in [0, 1].

    What counts of a cell is its squared distance to the most similar of `most` images there, over the distance of the
    whole images: what another image has too, a frame, a marker, text, a bar, counts nothing. It is clipped at the 70 %
    quantile of its image, so that a few strong edges do not win.
    """
    def parts(x):                                            # (cells^2, n, pixels of a cell), and the sums of squares
        x = x.float().reshape(len(x), cells, -1, cells, x.shape[2] // cells).permute(1, 3, 0, 2, 4).flatten(3)
        return x.flatten(0, 1), x.square().sum(3).flatten(0, 1)

    (y, y2), maps = parts(fine[plots.evenly_spaced(range(len(fine)), most)]), []
    for x, x2 in map(parts, fine.split(32)):
        distance = torch.baddbmm(x2[:, :, None] + y2[:, None], x, y.mT, alpha=-2)     # exact: integers below 2^24
        whole = distance.sum(0)
        own = whole <= 1e-3 * whole.median()                 # the image itself, and copies of it
        least = (distance / whole).masked_fill(own, math.inf).amin(2).T.nan_to_num(posinf=0)
        maps.append((least / least.quantile(0.7, 1, keepdim=True).clamp(min=1e-12)).clamp(max=1))
    return torch.cat(maps).reshape(-1, cells, cells)


def best_window(m):
    """The rectangle that splits a map (s, s) best in two levels: (left, top, right, bottom) as fractions, and its R^2.

    Of all rectangles of 5 to 95 % of the area, the share of the variance it explains (Otsu 1979, over rectangles):
    R^2 = S^2 / (A (1 - A) N sum m^2), m the map less its mean, N its cells, S the sum of m inside, A the share of area.
    The map counts from its 60 % quantile, the level of the background, up to twice that.
    """
    m, side = (m / m.quantile(0.6).clamp(min=1e-9) - 1).clamp(0, 1), len(m)
    m -= m.mean()
    first, last = torch.triu_indices(side + 1, side + 1, 1)  # all pairs of edges
    sums = torch.nn.functional.pad(m.cumsum(0).cumsum(1), (1, 0, 1, 0))
    sums = (sums[last] - sums[first]).T
    sums = sums[last] - sums[first]                          # (pairs of columns, pairs of rows)
    area = torch.outer(last - first, last - first) / side**2
    r = sums * (area * (1 - area)).rsqrt().masked_fill((area < 0.05) | (area > 0.95), 0)
    columns, rows = divmod(int(r.argmax()), len(first))
    window = np.array([first[columns], first[rows], last[columns], last[rows]]) / side
    return window, float(r.max()**2 / (side**2 * m.square().sum().clamp(min=1e-9)))


def find_crop(items, most=256, margin=1 / 64):
    """The window in which at most `most` of a set vary, as --crop takes it ("": none found), and how sure that is.

    Of three scales it is the finest whose window explains 60 % of what the best explains. With R^2 < 0.35, or if fewer
    than 6 of 8 random halves of the set agree within 0.05 on each edge, no window is clearly better than another.
    """
    square = functools.partial(data.decode, decode.Preprocess((512, 512), "squash", channels="1"))
    fine = [fine_detail(x.pixels) for x in data.parallel_map(square, plots.evenly_spaced(items, most)) if not x.why]
    if len(fine) < 8:
        return "", f"{len(fine)} of the 8 images it needs can be read"
    maps = [varying_detail(torch.from_numpy(np.stack(scale))) for scale in zip(*fine)]
    found, random = [best_window(m.mean(0)) for m in maps], np.random.RandomState(0)
    maps, (window, r2) = next(pair for pair in zip(maps, found) if pair[1][1] >= 0.6 * max(r2 for _, r2 in found))
    halves = [best_window(maps[random.permutation(len(maps))[::2]].mean(0))[0] for _ in range(8)]
    again = sum(np.abs(half - window).max() <= 0.05 for half in halves)
    sure = f"found again within 0.05 in {again} of 8 random halves of the set; R^2 {r2:.3f}, 1 if nothing else varied"
    crop = ",".join(f"{edge:.3g}" for edge in np.add(window, (-margin, -margin, margin, margin)).clip(0, 1))
    return crop if r2 >= 0.35 and again >= 6 else "", sure


# What an image may be an outlier in: the least difference from the median that counts, and how to print a value.
MEASURES = {"size": (0.2, lambda log: f"{math.exp(log) / 1e6:.2f} Mpixel"),
            "aspect": (0.05, lambda log: f"{math.exp(log):.2f}:1"), "brightness": (2, "{:.0f}".format),
            "contrast": (2, "{:.0f}".format), "colour": (3, "{:.0f}".format)}


def inspect_file(preprocess, item):
    """What a census needs to know of an `Item`, as a dict, with "problems": {kind: detail}. Never raises."""
    file = dict(name=item.name, bytes=0, problems={})
    try:
        raw = item.read()
        file["bytes"] = memoryview(raw).nbytes
        pixels, window = preprocess.pixels(raw)              # what training makes of it, or why it will not use it
        opened = decode.open_image(raw)
        full = opened.size
        opened.draft(None, (256, 256))
        drafted = opened.size
        im = preprocess.upright(opened)
        width, height = full if im.size == drafted else full[::-1]                    # turned by EXIF
        x = np.asarray(im.convert("RGB").resize((48, 48), Image.Resampling.BOX), np.float64)
        im = im.convert("L")
        file |= dict(digest=hashlib.blake2b(raw, digest_size=8).hexdigest(), format=opened.format or "array",
                     mode=opened.mode, shape=f"{height}x{width}", coloured=decode.has_colour(pixels),
                     size=math.log(height * width), aspect=math.log(width / height), brightness=x.mean(),
                     contrast=ImageStat.Stat(im).stddev[0], colour=np.ptp(x, 2).mean(),
                     thumb=np.asarray(im.resize((17, 16), Image.Resampling.BOX)))
        expected = Image.registered_extensions().get(Path(item.name).suffix.lower(), opened.format)
        if opened.format not in (expected, "MPO"):           # several JPEGs in one file, whose suffix is .jpg
            file["problems"]["wrong suffix"] = f"is {opened.format}"
        if (all if preprocess.fit == "pad" else any)(few < side for few, side in zip(window, preprocess.size)):
            file["problems"]["small"] = file["shape"] + ", cropped to less" * bool(preprocess.crop)
        if file["contrast"] < 3:
            file["problems"]["blank"] = f"contrast {file['contrast']:.1f}"
    except Exception as error:                               # a damaged file makes Pillow raise almost anything
        file["problems"]["unreadable"] = decode.describe_decode_error(error)
    return file


def near_pairs(thumbs, bits=24, likeness=0.985):
    """Which images are copies of an earlier one but for coding or size: uint8 (N, 16, 17) -> [(i, j), ...], i < j.

    Each j occurs once, with the first i it is a copy of: their difference hashes of 256 bits (is a pixel brighter than
    its left neighbour?) differ in at most `bits`, they correlate by at least `likeness`, and neither is nearly blank.
    """
    n, pairs = len(thumbs), []
    hashes = torch.from_numpy(thumbs[:, :, 1:] > thumbs[:, :, :-1]).reshape(n, 256).float() * 2 - 1
    flat = torch.from_numpy(thumbs).reshape(n, 272).float()
    flat = torch.nn.functional.normalize(flat - flat.mean(1, keepdim=True), eps=16)   # nearly blank: correlates less
    for part in runtime.batched_slices(n, max(1, 2**24 // max(1, n)), "images compared"):
        alike = flat[part] @ flat[:part.stop].T >= likeness
        alike &= hashes[part] @ hashes[:part.stop].T >= 256 - 2 * bits
        for j, row in enumerate(alike.tril(part.start - 1).numpy(), part.start):      # with earlier images only
            pairs += [(int(row.argmax()), j)] * bool(row.any())
    return sorted(pairs)


def census(items, preprocess):
    """What is in a set and what is wrong with it: (report, inspected files).

    report: a dict with files, usable, bytes, formats, modes, sizes, and "problems": {kind: [(file name, detail), ...]}.
    A near duplicate is named beside the first image it is a copy of, those that are large enough before small ones.
    """
    inspected = data.parallel_map(lambda item: inspect_file(preprocess, item), items)
    files = [file for _, file in zip(runtime.batched_slices(len(items), 1, "files inspected"), inspected)]
    good, first = [file for file in files if "unreadable" not in file["problems"]], {}
    odd = collections.defaultdict(list)
    for file in good:
        original = first.setdefault(file["digest"], file["name"])
        if original != file["name"]:
            file["problems"]["exact duplicate"] = original
    unique = sorted((file for file in good if not {"blank", "exact duplicate"} & file["problems"].keys()),
                    key=lambda file: "small" in file["problems"])
    for i, j in near_pairs(np.array([file["thumb"] for file in unique], np.uint8).reshape(-1, 16, 17)):
        unique[j]["problems"]["near duplicate"] = unique[i]["name"]
    for name, (least, show) in MEASURES.items() if len(good) >= 8 else ():
        values = np.array([file[name] for file in good])
        usual = np.median(values)
        distance = np.abs(values - usual)                    # 1.4826 of its median: a robust standard deviation
        share = 0.12 * abs(usual) if least >= 1 else 0       # of a logarithm a share says nothing
        outliers = distance > max(6 * 1.4826 * np.median(distance), share, least)
        for k in np.flatnonzero(outliers):
            odd[good[k]["name"]].append(f"{name} {show(values[k])}, usually {show(usual)}")
    report = dict(files=len(files), usable=len(good), bytes=sum(file["bytes"] for file in files))
    for name, key in (("formats", "format"), ("modes", "mode"), ("sizes", "shape")):
        report[name] = dict(collections.Counter(file[key] for file in good).most_common())
    kinds = ("unreadable", "wrong suffix", "small", "blank", "exact duplicate", "near duplicate")
    report["problems"] = {kind: [(file["name"], file["problems"][kind]) for file in files if kind in file["problems"]]
                          for kind in kinds} | dict(odd=[(name, ", ".join(reasons)) for name, reasons in odd.items()])
    return report, files


def preview(items, preprocess, most=48, side=160):
    """A grid of up to `most` images of a set, evenly chosen, with the crop in yellow and what --fit leaves in green."""
    def tile(item):
        im = preprocess.upright(decode.open_image(item.read())).convert("RGB")
        boxes, scale = [preprocess.window()(*im.size)], (side - 1) / max(im.size)
        boxes += [decode.center_box(boxes[0], preprocess.size)] * (preprocess.fit == "crop")
        im = ImageOps.contain(im, (side, side))
        for box, colour in zip(boxes, ((255, 200, 0), (0, 220, 120))):
            ImageDraw.Draw(im).rectangle([edge * scale for edge in box], None, colour, 2)
        return np.asarray(ImageOps.pad(im, (side, side), color=(64, 64, 64)))

    pixels = np.stack(list(data.parallel_map(tile, plots.evenly_spaced(items, most)))).transpose(0, 3, 1, 2)
    return plots.grid(data.to_float(torch.from_numpy(pixels)), columns=8, pad=4)


def clean(items, files, report, preprocess, out, keep_small=False, keep_copies=False):
    """Write the images that pass to the folder `out` as PNG -> (written, were there already, {name: why left out}).

    files, report: from `census`. Left out is what is unreadable, blank, an exact copy, a near copy (unless keep_copies)
    or smaller than the target (unless keep_small). An image keeps its name, with .png as suffix, or appended where two
    names would become one. manifest.jsonl says where each file came from; one it lists with the same source and
    settings is not written again: an interrupted run goes on, and two runs give identical files.
    """
    out, manifest = Path(out), Path(out) / "manifest.jsonl"
    kinds = ["near duplicate"] * (not keep_copies) + ["unreadable", "exact duplicate", "blank"]
    kinds += ["small"] * (not keep_small)                    # of several reasons the last is given
    reasons = {name: kind for kind in kinds for name, _ in report["problems"][kind]}
    passing = [(item, file) for item, file in zip(items, files) if item.name not in reasons]
    mode = "RGB" if preprocess.channels == "3" or any(file["coloured"] for _, file in passing) else "L"
    settings = hashlib.blake2b(repr((preprocess, mode)).encode(), digest_size=6).hexdigest()
    taken = collections.Counter(form.lower() for item, _ in passing for form in {item.name, splitext(item.name)[0]})
    lines = {}                                               # of the manifest: (file to write, item)
    for item, file in passing:
        stem = splitext(item.name)[0]
        row = dict(file=f"{stem if taken[stem.lower()] == 1 else item.name}.png", source=item.name,
                   digest=file["digest"], settings=settings)
        lines[json.dumps(row) + "\n"] = out / row["file"], item

    def write(line):
        target, item = lines[line]
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(preprocess.pixels(item.read())[0]).convert(mode).save(target)

    out.mkdir(parents=True, exist_ok=True)
    listed = manifest.read_text("utf-8", "replace").splitlines(keepends=True) if manifest.exists() else ["no manifest"]
    ours = not listed or listed[0].startswith('{"file": ')   # empty: a first run was killed at once
    if not ours and any(not path.name.startswith(".") for path in out.iterdir()):
        raise runtime.UserError(f"--out {out} holds files from elsewhere: give another folder")
    there = {line for line in listed if line in lines and lines[line][0].exists()}
    new = [line for line in lines if line not in there]
    with open(manifest, "w", encoding="utf-8") as file:      # lists no file that is to be replaced
        print("".join(there), end="", file=file, flush=True)
        for rows, _ in zip(runtime.batched_slices(len(new), 1, "images written"), data.parallel_map(write, new)):
            print(new[rows.start], end="", file=file, flush=True)
    runs.write_atomically(manifest, lambda path: path.write_text("".join(sorted(lines)), "utf-8"))
    return len(new), len(there), reasons


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
        "ANCHOR in pixels, or auto, the window in which the images of the set differ most (default: all of the image)")
    add("--channels", default="auto", choices=("auto", "1", "3"), help="1 grey, 3 colour, auto: as is (default: auto)")
    add("--background", default="white", type=colour, help="colour below transparent images (default: white)")
    add("--range", type=value_range, metavar="LOW,HIGH", help="values of 16-bit and float files that become black and "
        "white, as in 0,4095 (default: the lowest and highest of each image, or of the array)")
    add("--denoise", default="", choices=("median", "nlm"), help="3x3 median or non-local means (default: no filter)")
    add("--keep-truncated", action="store_true", help="use what can be read of files cut short (default: unreadable)")
    add("--limit", type=cli.positive_int, metavar="N", help="use only the first N files (default: all)")
    add("--keep-small", action="store_true", help="--out has images smaller than --size too (default: left out)")
    add("--keep-copies", action="store_true", help="--out has near copies of earlier images too (default: left out)")
    add("--preview", default="", metavar="FILE.png", help="write a sample grid of up to 48 originals with the crop in "
        "yellow and what --fit crop leaves of it in green (default: none)")
    add("--report", default="", metavar="FILE.json", help="write all that was found (default: none)")
    add("--out", default="", metavar="CLEAN", help="a folder to write the images that pass into (default: none)")
    return parser.parse_args(argv)


@runtime.exit_on_user_error("prepare.py")
def main(argv=None):
    args, say = parse_arguments(argv), runtime.print_rank0   # which goes on when `| head` has closed its end
    ImageFile.LOAD_TRUNCATED_IMAGES = args.keep_truncated
    source, size = Path(args.source).resolve(), decode.parse_size(args.size)
    for flag, path, suffix in ("--preview", args.preview, ".png"), ("--report", args.report, ".json"):
        if path and not path.lower().endswith(suffix):
            raise runtime.UserError(f"{flag}: expected a file name that ends in {suffix}, got {path!r}")
    for path in (args.preview, args.report, args.out):
        target = Path(path).resolve()
        if path and source.exists() and (target.is_relative_to(source) or source.is_relative_to(target)):
            raise runtime.UserError(f"{path} is inside {args.source} or contains it: choose a place beside it")
    items = sources.find_items(args.source, args.classes, args.range, "FOLDER")[:args.limit]
    crop, sure = find_crop(items) if args.crop == "auto" else (args.crop, "")
    original = Preprocess(size, args.fit, crop, args.channels, args.background, args.range)
    report, files = census(items, original)
    say(f"{args.source}: {len(items)} files, {report['bytes'] / 1e6:.1f} MB; {report['usable']} can be used")
    for kind in ("formats", "modes", "sizes"):
        say(f"  {kind}: {data.summarize_skipped(list(report[kind].items()), 6)}")
    for kind, entries in report["problems"].items():
        if entries:
            say(f"  {kind}: {len(entries)}: {data.summarize_skipped(entries, 6)}")
    if args.report:
        runs.write_atomically(args.report, lambda path: path.write_text(json.dumps(report, indent=1), "utf-8"))
        say(f"wrote {args.report}")
    if not report["usable"]:
        raise runtime.UserError(f"{args.source}: none of the {len(items)} files can be read")
    if args.crop == "auto":
        say(f"the window that varies most from image to image, for training:\n    --crop {crop}\nhow sure: {sure}"
            if crop else f"--crop auto: no window varies clearly more than the rest: {sure}")
    if args.preview:
        usable = [item for item, file in zip(items, files) if "unreadable" not in file["problems"]]
        runs.write_atomically(args.preview, lambda path: preview(usable, original).save(path))
        say(f"wrote {args.preview}: yellow is the crop" + ", green what --fit crop leaves of it" * (args.fit == "crop"))
    if args.out:
        filtered = dataclasses.replace(original, denoise=args.denoise)                # slow, and told by no report
        written, there, reasons = clean(items, files, report, filtered, args.out, args.keep_small, args.keep_copies)
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


if __name__ == "__main__":
    main()
