"""Look at a folder of pictures, and clean it."""

import argparse
import collections
import contextlib
import functools
import hashlib
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageStat

import data
import decode
import plots
import sources


def detail(im, side=64, fine=4):
    """Where a picture has fine detail: its squared gradient at side x fine pixels, pooled to (side, side), mean 1."""
    x = np.asarray(im.convert("L").resize((side * fine, side * fine), Image.Resampling.BOX), np.float64)
    energy = np.zeros_like(x)
    energy[:, 1:] += np.diff(x, axis=1) ** 2
    energy[1:] += np.diff(x, axis=0) ** 2
    energy = energy.reshape(side, fine, side, fine).mean((1, 3))
    return energy / max(energy.mean(), 1e-9)


def richest_window(energy, floor=1.2):
    """The rectangle with the largest sum of energy - floor x mean: (left, top, right, bottom) as fractions.

    All pairs of rows, and along them the largest run of columns (Kadane): the smallest window that leaves out only what
    has less detail than the picture has on average.
    """
    side = len(energy)
    gain = np.vstack([np.zeros(side), np.cumsum(energy - floor * energy.mean(), axis=0)])
    best = (0.0, 0, 0, side, side)                           # nothing stands out: all of it
    for top in range(side):
        sums = np.cumsum(gain[top + 1:] - gain[top], axis=1)                          # (rows below, columns)
        lowest = np.minimum.accumulate(np.hstack([np.zeros((len(sums), 1)), sums[:, :-1]]), axis=1)
        run = sums - lowest
        row, right = np.unravel_index(run.argmax(), run.shape)
        if run[row, right] > best[0]:
            left = int(np.argmin(np.hstack([0.0, sums[row, :right]]))) if right else 0
            best = (run[row, right], left, top, int(right) + 1, top + int(row) + 1)
    return tuple(round(edge / side, 4) for edge in best[1:])


def find_crop(items, most=256, margin=0.04):
    """The window of interest common to a set, from the detail of at most `most` of its pictures, as --crop's fractions.

    `margin` of the picture is added on all sides. Raises ValueError when none of them can be read.
    """
    maps = [energy for energy in data.parallel_map(_detail_of, plots.evenly_spaced(items, most)) if energy is not None]
    if not maps:
        raise ValueError("--crop auto: none of the pictures can be read")
    left, top, right, bottom = richest_window(np.mean(maps, axis=0))
    window = max(0, left - margin), max(0, top - margin), min(1, right + margin), min(1, bottom + margin)
    return ",".join(f"{edge:.4g}" for edge in window)


def _detail_of(item):
    try:
        im = decode.open_image(item.read())
        im.draft(None, (512, 512))
        return detail(decode.upright(im))
    except Exception:                                        # counted and named when the set itself is read
        return None


def move_window(im, fractions, reach=0.15):
    """The window of `fractions`, moved by at most `reach` of the picture to where this picture has most detail.

    Of places that have as much it takes the nearest: a blank picture's window stays.
    """
    left, top, right, bottom = fractions
    energy = np.pad(np.cumsum(np.cumsum(detail(im), 0), 1), ((1, 0), (1, 0)))
    side = len(energy) - 1
    w, h = max(1, round((right - left) * side)), max(1, round((bottom - top) * side))
    best = (-math.inf, 0, left, top)
    for y in range(max(0, round((top - reach) * side)), min(side - h, round((top + reach) * side)) + 1):
        for x in range(max(0, round((left - reach) * side)), min(side - w, round((left + reach) * side)) + 1):
            inside = energy[y + h, x + w] - energy[y, x + w] - energy[y + h, x] + energy[y, x]
            way = math.hypot(x / side - left, y / side - top)
            best = max(best, (round(inside, 6), -way, x / side, y / side))
    x, y = min(best[2], 1 - (right - left)), min(best[3], 1 - (bottom - top))
    return x, y, x + right - left, y + bottom - top


def denoise(im, method):
    """"median": of 3x3 pixels. "nlm": non-local means (Buades et al. 2005), patches of 3x3 in a window of 11x11.

    Non-local means: out(p) = sum_q w(p, q) in(q) / sum_q w(p, q), w = exp(-max(0, d - 2 s^2) / h^2), d the mean squared
    difference of the patches about p and q, s the noise's standard deviation, estimated from the picture (Immerkaer
    1996), h = 0.8 s. mode L or RGB in and out; each channel by itself.
    """
    if method == "median":
        return im.filter(ImageFilter.MedianFilter(3))
    x = np.atleast_3d(np.asarray(im, np.float32))
    h, w = x.shape[:2]
    if min(h, w) < 8:
        return im
    laplace = (x[:-2, :-2] + x[:-2, 2:] + x[2:, :-2] + x[2:, 2:] - 2 * (x[:-2, 1:-1] + x[2:, 1:-1] + x[1:-1, :-2]
               + x[1:-1, 2:]) + 4 * x[1:-1, 1:-1])
    sigma = math.sqrt(math.pi / 2) / 6 * np.abs(laplace).mean()
    if sigma < 0.1:
        return im
    reach = 5
    padded = np.pad(x, ((reach + 1, reach + 1), (reach + 1, reach + 1), (0, 0)), "reflect")
    centre = padded[reach:reach + h + 2, reach:reach + w + 2]
    total, weights = np.zeros_like(x), np.zeros_like(x)
    for dy in range(2 * reach + 1):
        for dx in range(2 * reach + 1):
            moved = padded[dy:dy + h + 2, dx:dx + w + 2]
            square = (moved - centre) ** 2
            rows = square[:-2] + square[1:-1] + square[2:]
            d = (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]) / 9
            weight = np.exp(-np.maximum(d - 2 * sigma**2, 0) / (0.8 * sigma) ** 2)
            total += weight * moved[1:-1, 1:-1]
            weights += weight
    out = (total / weights).round().clip(0, 255).astype(np.uint8)
    return Image.fromarray(out[..., 0] if im.mode == "L" else out)


def examine(recipe, item):
    """An `Item` -> what a census wants to know of it, as a dict; "problem" where it cannot be used. Never raises.

    Height and width are those of the upright picture.
    """
    about = dict(name=item.name, bytes=item.stamp[0] if item.stamp else 0)
    try:
        raw = item.read()
        about |= dict(digest=hashlib.blake2b(raw, digest_size=8).hexdigest(), bytes=memoryview(raw).nbytes)
        im = decode.open_image(raw)
        about |= dict(format=im.format or "array", mode=im.mode, height=im.height, width=im.width)
        suffix = Path(item.name).suffix.lower().lstrip(".")
        kind = "JPEG" if im.format == "MPO" else im.format                            # several JPEGs in one file
        if kind and suffix and Image.registered_extensions().get("." + suffix, kind) != kind:
            about["suffix"] = f"is {im.format}"
        im.draft(None, (256, 256))
        lying = im.size
        im = recipe.upright(im)
        if im.size != lying:                                 # turned by EXIF
            about |= dict(height=about["width"], width=about["height"])
        about["small"] = recipe.enlarges(about["width"], about["height"])
        x = np.asarray(im.convert("RGB").resize((48, 48), Image.Resampling.BOX), np.float64)
        about |= dict(brightness=float(x.mean()), contrast=ImageStat.Stat(im.convert("L")).stddev[0],
                      colour=float(np.ptp(x, 2).mean()), thumb=thumbnail(im))
    except Exception as error:                               # a damaged file makes Pillow raise almost anything
        about["problem"] = decode.describe_decode_error(error)
    return about


def thumbnail(im):
    """What `near_pairs` compares: grey, uint8 (16, 17)."""
    return np.asarray(im.convert("L").resize((17, 16), Image.Resampling.BOX))


def near_pairs(thumbs, bits=24, likeness=0.985, neighbours=12):
    """Index pairs (i, j), i < j, of pictures that are copies of one another but for coding or size: uint8 (N, 16, 17).

    A difference hash of 256 bits (is a pixel brighter than its left neighbour?). Pairs at most `bits` apart, neither of
    them nearly blank, whose thumbnails correlate by at least `likeness`. To stay fast for large sets only hashes are
    compared that stand close together when sorted by one of their sixteen words, so that a rare pair can be missed.
    """
    if len(thumbs) < 2:
        return []
    hashes = np.packbits(thumbs[:, :, 1:] > thumbs[:, :, :-1], axis=2).reshape(len(thumbs), 32)
    longs = hashes.view(np.uint64)
    table = np.unpackbits(np.arange(2**16, dtype=np.uint16).view(np.uint8)).reshape(-1, 16).sum(1, dtype=np.uint8)
    ones = getattr(np, "bitwise_count", lambda words: table[words.view(np.uint16)].reshape(*words.shape, 4).sum(-1))
    flat = thumbs.reshape(len(thumbs), -1).astype(np.float32)
    flat = flat - flat.mean(1, keepdims=True)
    length = np.linalg.norm(flat, axis=1)
    flat = flat / np.maximum(length, 1e-6)[:, None]
    found = set()
    for first in range(0, 32, 2):
        order = np.argsort(np.roll(hashes, -first, axis=1)[:, :8].copy().view(">u8")[:, 0], kind="stable")
        part = longs[order, first // 8]
        for shift in range(1, min(neighbours, len(order) - 1) + 1):
            different = part[:-shift] ^ part[shift:]         # 64 of the 256 bits: most are done with after these
            close = np.flatnonzero(ones(different) <= bits)
            a, b = order[close], order[close + shift]
            close = ones(longs[a] ^ longs[b]).sum(1) <= bits
            a, b = a[close], b[close]
            alike = (flat[a] * flat[b]).sum(1) * (np.minimum(length[a], length[b]) > 16) >= likeness
            found |= {(int(min(i, j)), int(max(i, j))) for i, j in zip(a[alike], b[alike])}
    return sorted(found)


def outliers(values, limit=6.0):
    """Which values lie over `limit` robust standard deviations (1.4826 x median distance) from the median: booleans."""
    distance = np.abs(values - np.median(values))
    return distance > limit * max(1.4826 * float(np.median(distance)), 0.02 * max(abs(float(np.median(values))), 1e-9))


def census(items, recipe, progress=True):
    """All that is to be said about a set: a dict with files, formats, modes, sizes, and "problems" {kind: [...]}.

    Of a problem's entries the first element is always the name of the file. Also returned: the examined files.
    """
    files = data.parallel_map(functools.partial(examine, recipe), items)
    files = list(data.counted(files, len(items), "examined") if progress else files)
    good = [about for about in files if "problem" not in about]
    first = {about["digest"]: about["name"] for about in reversed(good)}              # the first to have this content
    unique = [about for about in good if about["contrast"] >= 3 and first[about["digest"]] == about["name"]]
    pairs = near_pairs(np.array([about["thumb"] for about in unique], np.uint8).reshape(-1, 16, 17))
    problems = {
        "unreadable": [(about["name"], about["problem"]) for about in files if "problem" in about],
        "wrong suffix": [(about["name"], about["suffix"]) for about in good if "suffix" in about],
        "small": [(about["name"], f"{about['height']}x{about['width']}" + ", cropped to less" * bool(recipe.crop))
                  for about in good if about["small"]],
        "blank": [(about["name"], f"contrast {about['contrast']:.1f}") for about in good if about["contrast"] < 3],
        "exact duplicate": [(about["name"], first[about["digest"]]) for about in good
                            if first[about["digest"]] != about["name"]],
        "near duplicate": [(unique[j]["name"], unique[i]["name"]) for i, j in pairs],
        "odd": []}
    if len(good) >= 8:
        height, width, brightness, contrast, colour = (
            np.array([about[what] for about in good])
            for what in ("height", "width", "brightness", "contrast", "colour"))
        for what, values, spare in (("size", np.log(height * width), 0.2), ("aspect", np.log(width / height), 0.05),
                                    ("brightness", brightness, 2), ("contrast", contrast, 2), ("colour", colour, 3)):
            usual = float(np.median(values))
            odd = outliers(values) & (np.abs(values - usual) > spare)
            problems["odd"] += [(good[k]["name"], f"{what} {_plainly(what, values[k])}, "
                                 f"usually {_plainly(what, usual)}") for k in np.flatnonzero(odd)]

    def count(values):
        return dict(collections.Counter(values).most_common())

    return dict(files=len(files), usable=len(good), bytes=sum(about["bytes"] for about in files),
                formats=count(about["format"] for about in good), modes=count(about["mode"] for about in good),
                sizes=count(f"{about['height']}x{about['width']}" for about in good), problems=problems), files


def _plainly(what, value):
    if what == "size":
        return f"{math.exp(value) / 1e6:.2f} Mpixel"
    return f"{math.exp(value):.2f}:1" if what == "aspect" else f"{value:.0f}"


def contact_sheet(items, draw=None, most=48, side=160, columns=8):
    """Up to `most` pictures of a set, evenly chosen, on one PIL sheet. draw(picture, ImageDraw) may mark them."""
    tiles = []
    for item in plots.evenly_spaced(items, most):
        with contextlib.suppress(Exception):                 # what cannot be read is in the report, not on the sheet
            im = decode.upright(decode.open_image(item.read())).convert("RGB")
            if draw:
                draw(im, ImageDraw.Draw(im))
            im.thumbnail((side, side))
            tiles.append(im)
    rows = -(-max(1, len(tiles)) // columns)
    sheet = Image.new("RGB", (columns * (side + 4) + 4, rows * (side + 4) + 4), (64, 64, 64))
    for k, im in enumerate(tiles):
        sheet.paste(im, (4 + k % columns * (side + 4) + (side - im.width) // 2,
                         4 + k // columns * (side + 4) + (side - im.height) // 2))
    return sheet


def clean(pictures, digests, report, recipe, out, keep_small=False):
    """Write the pictures that pass, as training sees them, to the folder `out` as PNG: (written, there already,
    reasons).

    pictures: what `load` made of the source; digests: {name: hash of the file}; report: its `census`. A picture passes
    that can be read, is not blank, no exact copy of an earlier one, and not smaller than the target (unless
    keep_small). Names are the source's, with .png for the suffix, or after it where two would become one.
    manifest.jsonl says of each file where it came from; what stands in it already, from the same bytes and by the same
    recipe, is not made again. Two runs give identical files.
    """
    problems = report["problems"]
    reasons = {name: "unreadable" for name, _ in problems["unreadable"] + list(pictures.skipped)}
    reasons |= {name: "exact copy" for name, _ in problems["exact duplicate"]}
    reasons |= {name: "blank" for name, _ in problems["blank"]}
    if not keep_small:
        reasons |= {name: "smaller than the target" for name, _ in problems["small"]}
    passing = [(k, name) for k, name in enumerate(pictures.names) if name not in reasons]
    taken = collections.Counter(form.lower() for _, name in passing for form in {os.path.splitext(name)[0], name})
    settings = hashlib.blake2b(json.dumps([recipe, pictures.images.shape[1]]).encode(), digest_size=6).hexdigest()
    manifest, rows, made = Path(out) / "manifest.jsonl", [], {}
    for line in manifest.read_text("utf-8").splitlines() if manifest.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):      # its last line, if a run was cut off
            row = json.loads(line)
            made[row["file"]] = row

    def make(numbered):
        k, name = numbered
        base = os.path.splitext(name)[0]
        row = dict(file=(base if taken[base.lower()] == 1 else name) + ".png", source=name, digest=digests[name],
                   recipe=settings)
        target = Path(out) / row["file"]
        if made.get(row["file"]) == row and target.exists():
            return row, False
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_suffix(".unfinished")
        planes = pictures.images[k]
        Image.fromarray(planes[0] if len(planes) == 1 else planes.transpose(1, 2, 0).copy()).save(unfinished, "PNG")
        os.replace(unfinished, target)
        return row, True

    Path(out).mkdir(parents=True, exist_ok=True)
    with open(manifest, "a", encoding="utf-8") as file:      # as it goes, so that an interrupted run is not lost
        for row, new in data.parallel_map(make, passing):
            rows.append((row, new))
            if new:
                file.write(json.dumps(row) + "\n")
                file.flush()
    data.write_whole(manifest, "".join(sorted(json.dumps(row) + "\n" for row, _ in rows)))
    return sum(new for _, new in rows), sum(not new for _, new in rows), reasons


def main(argv=None):
    """python data.py FOLDER: a census of the folder, sheet.png, report.json; --preview, and --out CLEAN to write it."""
    parser = argparse.ArgumentParser(
        "data.py", "data.py FOLDER [flags]; --help lists them", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Look at a folder of pictures, and clean it.\n\n"
        "    python data.py teeth                                     what is in it, and what is wrong with it\n"
        "    python data.py teeth --crop auto --preview               where the crop falls, drawn on the originals\n"
        "    python data.py teeth --out clean --size 256 --crop auto  the pictures that pass, as training sees them\n")
    parser.add_argument("source", metavar="FOLDER", help="a folder of pictures, an idx or idx.gz file, a .npy "
                        "or .npz array, or demo")
    parser.add_argument("--out", default="", help="write the pictures that pass into this folder, beside the source")
    parser.add_argument("--preview", action="store_true", help="write preview.png: the crop drawn on the originals")
    parser.add_argument("--keep-small", action="store_true", help="let pictures smaller than --size pass")
    parser.add_argument("--report", default=".", metavar="DIR", help="where sheet.png, report.json, preview.png go (.)")
    data.add_arguments(parser)
    args = parser.parse_args(argv)
    args.data = args.source
    for stream in (sys.stdout, sys.stderr):                  # a file name may hold what the terminal cannot show
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        with data.truncated_files(args.keep_truncated):
            look(args)
    except KeyboardInterrupt:
        os._exit(130)                                        # what is written is whole; there is no pool to wait for
    except BrokenPipeError:                                  # as in python data.py FOLDER | head
        sys.stdout = open(os.devnull, "w")
    except (ValueError, OSError) as error:
        print(f"data.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def look(args):
    """The census of a source, its sheet and report; the preview; the clean folder: what `main` does with the flags."""
    recipe = data.recipe_of(args)
    data.check_counts(args.limit, args.holdout)
    if args.out and Path(args.source).is_dir():
        source, out = Path(args.source).resolve(), Path(args.out).resolve()
        if out == source or source in out.parents or out in source.parents:
            raise ValueError(f"--out {args.out} lies in {args.source}, or the other way round: take a folder beside it")
    items = sources.find_items(args.source, args.classes, args.range)[:args.limit or None]
    recipe, notes = data.resolve_crop(recipe, items)
    report, files = census(items, recipe)
    for line in report_lines(args.source, report):
        print(line)
    place = Path(args.report)
    place.mkdir(parents=True, exist_ok=True)
    usable = [item for item, about in zip(items, files) if "problem" not in about]
    if not usable:
        raise ValueError(f"{args.source}: none of the {len(items)} files can be read")
    contact_sheet(usable).save(place / "sheet.png")
    (place / "report.json").write_text(json.dumps(report, indent=1), "utf-8")
    print(f"wrote {place / 'sheet.png'} and {place / 'report.json'}")
    print(*notes, sep="\n", end="\n" * bool(notes))
    if args.preview:
        contact_sheet(usable, lambda im, draw: mark(im, draw, recipe)).save(place / "preview.png")
        print(f"wrote {place / 'preview.png'}: in yellow the crop, in green what --fit leaves of it")
    if args.out:
        digests = {about["name"]: about.get("digest") for about in files}
        written, already, reasons = clean(data.load_from_args(args), digests, report, recipe, args.out, args.keep_small)
        kinds = collections.Counter(reasons.values())
        print(f"wrote {written} pictures to {args.out} ({already} more were there already); passed over {len(reasons)}"
              + (": " + ", ".join(f"{count} {kind}" for kind, count in kinds.items()) if kinds else ""))
        if not written + already:
            raise ValueError(f"no picture of {args.source} passes"
                             + f"; --keep-small lets those under {args.size} pass" * bool(report["problems"]["small"]))


def mark(im, draw, recipe):
    """The window that `recipe` cuts out, and within it what the fit leaves, as two frames on the picture."""
    box, wide = recipe.box(im), max(2, max(im.size) // 100)
    draw.rectangle(box, outline=(255, 200, 0), width=wide)
    if recipe.fit == "crop":
        draw.rectangle(decode.center_box(box, recipe.size), outline=(0, 220, 120), width=wide)


def report_lines(source, report, most=6):
    """A census as the lines to print."""
    def table(counts):
        shown = ", ".join(f"{count} {name}" for name, count in list(counts.items())[:most])
        return shown + (f", and {len(counts) - most} other kinds" if len(counts) > most else "")

    yield f"{source}: {report['files']} files, {report['bytes'] / 1e6:.1f} MB; {report['usable']} can be used"
    for kind in ("formats", "modes", "sizes"):
        yield f"  {kind}: {table(report[kind])}"
    for kind, entries in report["problems"].items():
        if entries:
            yield f"  {kind}: {len(entries)}: {data.summarize_skipped(entries, most)}"


if __name__ == "__main__":
    main()
