"""Pixels: a folder of pictures, an idx file or the built-in demo -> one uint8 array; sheets, animations and curves
back.

    pictures = load("teeth", size=(256, 256))      # decoded once: pictures.images is uint8 (N, C, H, W)
    for real in batches(pictures.images, 64): ...  # float (64, C, H, W) in [-1, 1], without end
    save_grid("sheet.png", real)

Needs torch, numpy and pillow. On disk and in the array pictures are uint8; inside the program they are float in [-1,
1]. Whatever is wrong with a source is a ValueError or an OSError of one sentence.
"""

import functools
import gzip
import hashlib
import io
import itertools
import math
import os
import re
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm", ".pnm"}
RESAMPLE = Image.Resampling.BICUBIC                          # Pillow widens the kernel when it shrinks: antialiased


class Pictures(NamedTuple):
    """What `load` returns."""
    images: np.ndarray                                       # uint8 (N, C, H, W)
    names: list                                              # N names, unique within the source
    held_out: int                                            # how many were set aside by the holdout
    left_out: list                                           # (name, reason) of every file that is not in `images`
    notes: list                                              # sentences a user should read


# ---------------------------------------------------------------------------------------------------------------------
# The words of the command line
# ---------------------------------------------------------------------------------------------------------------------

def parse_size(text):
    """"288x512" or "64" -> (height, width). Raises ValueError for anything else."""
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", str(text).strip().lower())
    if not found:
        raise ValueError(f"--size {text}: write one number (64) or HEIGHTxWIDTH (288x512)")
    return int(found[1]), int(found[2] or found[1])


def parse_crop(text):
    """"0.1,0,0.9,1" (left, top, right, bottom as fractions) or "1024x1024@bottom" (pixels at an anchor) -> box
    function.

    The function takes (width, height) of a picture and returns (left, top, right, bottom) in pixels; it raises
    ValueError for a picture smaller than the window. Anchors: center, top, bottom, left, right, top-left ...
    """
    window = re.fullmatch(r"(\d+)x(\d+)(?:@([a-z-]+))?", text.strip().lower())
    if window:
        h, w, words = int(window[1]), int(window[2]), (window[3] or "center").split("-")
        if min(h, w) < 1 or not set(words) <= {"center", "top", "bottom", "left", "right"}:
            raise ValueError(f"--crop {text}: write HEIGHTxWIDTH@ANCHOR, the anchor center, top, bottom, left, right "
                             "or two of them joined, as in bottom-left")

        def box(width, height):
            if w > width or h > height:
                raise ValueError(f"smaller than the crop window: {height}x{width} against {h}x{w}")
            left = 0 if "left" in words else width - w if "right" in words else (width - w) // 2
            top = 0 if "top" in words else height - h if "bottom" in words else (height - h) // 2
            return left, top, left + w, top + h
        return box
    try:
        left, top, right, bottom = (float(word) for word in text.split(","))
    except ValueError:
        left = top = right = bottom = math.nan
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise ValueError(f"--crop {text}: write LEFT,TOP,RIGHT,BOTTOM as fractions, as in 0.1,0,0.9,1, "
                         "or pixels at an anchor, as in 1024x1024@bottom")
    return lambda width, height: (left * width, top * height, right * width, bottom * height)


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------

def read_picture(file):
    """An open file or a path -> a PIL picture of mode L or RGB, upright.

    16-bit and float grey is scaled over the picture's own range (Pillow's convert would clip it to white); transparent
    pictures are composited on white; of an animation the first frame is taken. Raises whatever Pillow raises.
    """
    with Image.open(file) as im:
        im.load()
        im = ImageOps.exif_transpose(im)
        if im.mode.startswith(("I", "F")):
            values = np.asarray(im).astype(np.float64)
            low, high = values.min(), values.max()
            if not np.isfinite([low, high]).all():
                raise ValueError("holds values that are not finite")
            return Image.fromarray(((values - low) * (255 / max(high - low, 1e-12))).round().astype(np.uint8))
        mode = "L" if im.mode in ("1", "L", "LA", "La") else "RGB"
        if im.has_transparency_data:
            im = im.convert("RGBA")
            im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im)
        return im.convert(mode)


def fit_picture(im, size, fit="crop", box=None):
    """Cut `box` = (left, top, right, bottom) out of `im`, then bring it to `size` = (height, width) with one resize.

    fit "crop": the largest centred window of the target's shape; "squash": the whole box, proportions lost; "pad": the
    whole box, black beside it.
    """
    height, width = size
    left, top, right, bottom = box or (0, 0, *im.size)
    w, h = right - left, bottom - top
    if fit == "crop":
        scale = min(w / width, h / height)
        dx, dy = (max(0, side - scale * target) / 2 for side, target in ((w, width), (h, height)))
        left, top, right, bottom = left + dx, top + dy, right - dx, bottom - dy
    if fit != "pad":
        return im.resize((width, height), RESAMPLE, (left, top, right, bottom))
    scale = max(w / width, h / height)
    inner = max(1, round(w / scale)), max(1, round(h / scale))
    canvas = Image.new(im.mode, (width, height))
    canvas.paste(im.resize(inner, RESAMPLE, (left, top, right, bottom)),
                 ((width - inner[0]) // 2, (height - inner[1]) // 2))
    return canvas


def find_pictures(folder):
    """Every file below `folder` whose suffix, in any case, is a picture's; sorted by its path within the folder.

    Linked folders are followed, each once. Hidden files and folders are passed over (".ipynb_checkpoints", "._x.jpg").
    """
    found, seen = [], {os.path.realpath(folder)}
    for root, folders, files in os.walk(folder, followlinks=True):
        for name in sorted(folders):
            path = os.path.realpath(os.path.join(root, name))
            if name.startswith(".") or path in seen:
                folders.remove(name)
            seen.add(path)
        found += [Path(root) / name for name in files
                  if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def read_idx(path):
    """An idx or idx.gz file of pictures (MNIST's format) -> uint8 (N, H, W), or (N, H, W, 3) for a fourth dimension.

    Bytes 0 0, type 8 (unsigned byte), the number of dimensions, each dimension as a big-endian int32, the values.
    Raises ValueError when the file is damaged, holds labels, or is no idx file at all.
    """
    raw = Path(path).read_bytes()
    try:
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is a damaged gzip file: {error}") from error
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is no idx file of bytes: give a folder of pictures, an idx or idx.gz file, or 'demo'")
    shape = [int.from_bytes(raw[4 + 4 * k:8 + 4 * k], "big") for k in range(raw[3])]
    if len(shape) == 1:
        raise ValueError(f"{path} holds {shape[0]} labels, not pictures: give the file with 'images' in its name")
    if len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] != 3):
        raise ValueError(f"{path} has dimensions {shape}: expected (N, H, W) or (N, H, W, 3)")
    if len(raw) - 4 - 4 * len(shape) != math.prod(shape):
        raise ValueError(f"{path} is cut short: {len(raw)} bytes for pictures of {shape}")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


# ---------------------------------------------------------------------------------------------------------------------
# The demo
# ---------------------------------------------------------------------------------------------------------------------

def draw_demo(n=2000, side=64, seed=0):
    """n small grey pictures in the manner of a panoramic dental radiograph -> uint8 (n, side, side).

    Two rows of six teeth along a smile curve, each with a bright crown, a tapering root and a dark pulp, in a jaw with
    grain. What varies is known: curve, height, tilt, width and length of each tooth, missing teeth (8 %), fillings
    (10 %), exposure. Edges are linear ramps and the numbers come from numpy's frozen RandomState, so that every machine
    draws the same pictures.
    """
    random = np.random.RandomState(seed)
    y, x = np.mgrid[0:side, 0:side] / (side - 1.0)
    pictures = np.empty((n, side, side), np.uint8)

    def inside(distance, softness=0.012):                    # 1 well inside (distance > 0), 0 well outside
        return np.clip(0.5 + distance / (2 * softness), 0, 1)

    for k in range(n):
        smile, middle, tilt, exposure = random.uniform([0.1, 0.46, -0.06, 0.85], [0.3, 0.54, 0.06, 1.1])
        bite = middle + smile * ((x - 0.5) ** 2 - 0.08) * -1 + tilt * (x - 0.5)      # where the two rows meet
        v = np.abs(y - bite)                                 # distance from the bite: crowns first, then roots
        bone = 0.34 - 0.22 * np.clip((v - 0.3) / 0.25, 0, 1)
        picture = bone * (0.8 + 0.2 * np.clip(1 - 2 * np.abs(x - 0.5), 0, 1))
        picture = picture * inside(v - 0.03, 0.02)           # the dark line between the rows
        for row in (-1, 1):
            here = inside(row * (y - bite) - 0.018)
            edges = np.cumsum(random.uniform(0.8, 1.2, 6))
            edges = np.concatenate([[0], edges / edges[-1]]) * 0.92 + 0.04
            for left, right in zip(edges, edges[1:]):
                missing, filling, length, shade = random.uniform([0, 0, 0.27, 0.86], [1, 1, 0.38, 1.0])
                if missing < 0.08:
                    continue
                half = (right - left) / 2 - 0.016
                taper = 1 - 0.5 * np.clip((v - 0.14) / (length - 0.14), 0, 1)
                across = np.abs(x - (left + right) / 2)
                tooth = here * inside(half * taper - across) * inside(length - v, 0.02)
                light = shade * np.where(v < 0.15, 0.86, 0.6) - 0.28 * inside(0.012 - across) * inside(v - 0.08, 0.02)
                if filling < 0.10:
                    light = light + 0.3 * inside(0.6 * half - across) * inside(0.085 - v)
                picture = picture + tooth * (light - picture)
        grain = random.normal(0, 0.02, picture.shape)
        pictures[k] = (np.clip(exposure * picture + grain, 0, 1) * 255).round()
    return pictures


# ---------------------------------------------------------------------------------------------------------------------
# One source -> one array
# ---------------------------------------------------------------------------------------------------------------------

def find_items(source):
    """A source -> [(name, read)], where read() gives a file's bytes or one picture's uint8 array.

    source: "demo", a folder of pictures (or, where it holds none, of idx files), or one idx or idx.gz file.
    Raises FileNotFoundError or ValueError with the sentence for the user.
    """
    if str(source) == "demo":
        return [(f"demo-{k:04d}", lambda picture=picture: picture) for k, picture in enumerate(draw_demo())]
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"--data {source}: there is no such folder or file (looked in {Path.cwd()})")
    idx = [path]
    if path.is_dir():
        files = find_pictures(path)
        if files:
            return [(file.relative_to(path).as_posix(), file.read_bytes) for file in files]
        idx = sorted(file for file in path.iterdir() if "idx3" in file.name or "idx4" in file.name)
        if not idx:
            raise ValueError(f"--data {source}: no pictures in this folder or below it "
                             f"(looked for {' '.join(sorted(SUFFIXES))}, in capitals too)")
    elif path.suffix.lower() in SUFFIXES:
        raise ValueError(f"--data {source} is one picture: give the folder that holds the pictures")
    return [(f"{file.name}-{k:05d}", lambda picture=picture: picture)
            for file in idx for k, picture in enumerate(read_idx(file))]


def has_colour(pixels):
    """Whether more than 0.2 % of the pixels of a uint8 (H, W, 3) array have channels that lie over 24 levels apart."""
    return pixels.ndim == 3 and bool((np.ptp(pixels, axis=2) > 24).mean() > 0.002)


def held_out(raw, share):
    """Whether bytes (or an array) belong to the held-out `share`: a hash of the content decides, whatever its name."""
    return int.from_bytes(hashlib.blake2b(raw, digest_size=4).digest(), "big") < share * 2**32


def load(source, size, fit="crop", crop="", channels="auto", limit=0, holdout=0.0, part="all", at_least=1):
    """One uint8 array (N, C, H, W) from a folder (recursive), an idx or idx.gz file, or "demo"; see `Pictures`.

    size: (height, width). fit, crop: see `fit_picture`, `parse_crop`. channels: 1, 3 or "auto" (1 when no picture of
    the source has colour). limit: only the first so many files. holdout: the share set aside, stable when files are
    added, exact copies on one side; part: "train", "heldout" or "all". at_least: fewer pictures than that are an error.
    Files that cannot be read are left out and named in `left_out`, never fatal; ValueError when too few remain.
    """
    if str(channels) not in ("auto", "1", "3"):
        raise ValueError(f"--channels is 1, 3 or auto, not {channels}")
    if fit not in ("crop", "squash", "pad"):
        raise ValueError(f"--fit is crop, squash or pad, not {fit}")
    if not 0 <= holdout < 1:
        raise ValueError(f"--holdout {holdout:g}: a share from 0 up to, not including, 1")
    window = parse_crop(crop) if crop else lambda width, height: (0, 0, width, height)
    mode = {"1": "L", "3": "RGB"}.get(str(channels))
    height, width = size

    def decode(item):                                        # -> name, pixels or None, why it is left out, small?
        name, read = item
        try:
            raw = read()
            if part != "all" and held_out(raw, holdout) != (part == "heldout"):
                return name, None, None, False
            if len(raw) == 0:
                return name, None, "the file is empty", False
            im = Image.fromarray(raw) if isinstance(raw, np.ndarray) else read_picture(io.BytesIO(raw))
            if min(im.size) < 2:
                return name, None, f"only {im.height}x{im.width} pixels", False
            im = im.convert(mode) if mode else im
            left, top, right, bottom = box = window(*im.size)
            small = right - left < width or bottom - top < height
            return name, np.asarray(fit_picture(im, size, fit, box)), None, small
        except UnidentifiedImageError:
            return name, None, "not a picture, whatever its name says", False
        except Exception as error:                           # a damaged file makes Pillow raise almost anything
            return name, None, str(error).partition("\n")[0][:120] or type(error).__name__, False

    items = find_items(source)
    items = items[:limit] if limit else items
    with ThreadPoolExecutor(os.cpu_count()) as pool:         # Pillow decodes and resizes outside the interpreter's lock
        decoded = list(pool.map(decode, items))
    kept = [(name, pixels) for name, pixels, _, _ in decoded if pixels is not None]
    left_out = [(name, why) for name, _, why, _ in decoded if why]
    aside = len(decoded) - len(kept) - len(left_out)
    if len(kept) < at_least:
        why = f"; {left_out[0][0]}: {left_out[0][1]}" if left_out else ""
        raise ValueError(f"--data {source}: {len(kept)} of {len(items)} pictures can be used and at least {at_least} "
                         f"are needed ({len(left_out)} cannot be read, {aside} are held out by "
                         f"--holdout {holdout:g}){why}")

    notes = []
    coloured = [name for name, pixels in kept if has_colour(pixels)] if mode is None else []
    mode = mode or ("RGB" if coloured else "L")
    if 0 < len(coloured) < 0.1 * len(kept):
        notes.append(f"colour because of {len(coloured)} of {len(kept)} pictures, {coloured[0]} for one; "
                     "--channels 1 makes all grey")
    small = sum(enlarged for _, _, _, enlarged in decoded)
    if small:
        notes.append(f"{small} of {len(kept)} are smaller than {height}x{width} and were enlarged")
    images = np.empty((len(kept), 1 if mode == "L" else 3, height, width), np.uint8)
    for k, (_, pixels) in enumerate(kept):
        if mode == "L" and pixels.ndim == 3:
            pixels = np.asarray(Image.fromarray(pixels).convert("L"))
        images[k] = pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels
    return Pictures(images, [name for name, _ in kept], aside, left_out, notes)


def describe(source, pictures):
    """What `load` found, as the lines to print: one for the array, one for what was left out, one a note."""
    n, c, h, w = pictures.images.shape
    lines = [f"data: {n} pictures from {source}, {h}x{w}, {'grey' if c == 1 else 'colour'}; "
             f"{pictures.held_out} held out, {len(pictures.left_out)} left out"]
    if pictures.left_out:
        shown = "; ".join(f"{name} ({why})" for name, why in pictures.left_out[:5])
        more = len(pictures.left_out) - 5
        lines.append(f"data: left out: {shown}" + (f"; and {more} more" if more > 0 else ""))
    return lines + [f"data: {note}" for note in pictures.notes]


def fingerprint(images):
    """[N, C, H, W, crc32 of the bytes]: whether two arrays are the same pictures in the same order."""
    return [*images.shape, zlib.crc32(images)]


# ---------------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------------

def to_float(images):
    """uint8 {0..255} -> float32 [-1, 1]: x / 127.5 - 1."""
    return images.to(torch.float32) / 127.5 - 1


def to_uint8(x):
    """float [-1, 1] -> uint8, rounded, clamped: the inverse of `to_float`; 0 becomes 128, whatever lies beside it."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@functools.lru_cache(4)
def epoch_order(n, seed, epoch):
    """The order of n pictures in an epoch: a permutation, a function of (seed, epoch) alone."""
    return np.random.RandomState([seed, epoch]).permutation(n)


def batches(images, batch, seed=0, start=0, flip=False, device="cpu"):
    """Endless batches of a uint8 array (N, C, H, W): float (batch, C, H, W) in [-1, 1] on `device`, channels last.

    Every picture is drawn once an epoch. Epochs follow one another without a gap, so that all batches are full, a batch
    may straddle two epochs, and `batch` may exceed N. Batch number k is a function of (images, batch, seed, k): `start`
    goes on where an interrupted run stopped. flip: mirror each picture left to right with probability 1/2.
    """
    pixels, n = torch.from_numpy(images).to(device), len(images)
    for k in itertools.count(start):
        draw = np.arange(k * batch, (k + 1) * batch)
        index = np.concatenate([epoch_order(n, seed, int(e))[draw[draw // n == e] % n] for e in np.unique(draw // n)])
        x = to_float(pixels[torch.from_numpy(index).to(device)])
        if flip:
            mirrored = torch.from_numpy(np.random.RandomState([seed, k, 1]).rand(batch, 1, 1, 1) < 0.5).to(device)
            x = torch.where(mirrored, x.flip(3), x)
        yield x.contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures back to disk
# ---------------------------------------------------------------------------------------------------------------------

def grid(x, columns=8, pad=2):
    """A sheet of float pictures (N, C, H, W) in [-1, 1] as one PIL picture, row by row, `pad` grey pixels between.

    The range is fixed: a sheet never rescales its pictures, so that too dark or too flat looks too dark or too flat.
    """
    pixels = to_uint8(x.detach()).cpu().permute(0, 2, 3, 1).numpy()                   # (N, H, W, C)
    n, h, w, c = pixels.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    sheet = np.full((rows * (h + pad) + pad, columns * (w + pad) + pad, c), 64, np.uint8)
    for k, picture in enumerate(pixels):
        top, left = pad + k // columns * (h + pad), pad + k % columns * (w + pad)
        sheet[top:top + h, left:left + w] = picture
    return Image.fromarray(sheet[..., 0] if c == 1 else sheet)


def save_grid(path, x, columns=8, pad=2):
    """`grid` to a file; a sheet under 800 pixels is shown 2, 3 or 4 times as large, each pixel a square."""
    sheet = grid(x, columns, pad)
    k = max(1, min(4, 800 // max(sheet.size)))
    sheet.resize((sheet.width * k, sheet.height * k), Image.Resampling.NEAREST).save(path)


def font(size):
    """Pillow's own font; its bitmap font where Pillow was built without FreeType."""
    try:
        return ImageFont.load_default(size)
    except (TypeError, OSError, ImportError):
        return ImageFont.load_default()


def save_gif(path, folder, seconds=12.0, most=60, side=640):
    """An animation of the sheets folder/step-0000100.png ..., the step written under each; at most `most` of them.

    Frames are shrunk to `side` pixels; the last one stays for two seconds. Sheets of another size than the last are
    left out; without any sheet nothing is written.
    """
    sheets = sorted(Path(folder).glob("step-*.png"))
    keep = np.unique(np.linspace(0, len(sheets) - 1, min(most, len(sheets))).round().astype(int))
    frames = []
    for k in reversed(keep):
        with Image.open(sheets[k]) as im:
            im = im.convert("L" if im.mode == "L" else "RGB")
        im.thumbnail((side, side))
        if frames and (im.width, im.height + 24) != frames[0].size:
            continue
        frame = Image.new(im.mode, (im.width, im.height + 24), "white")
        frame.paste(im, (0, 0))
        ImageDraw.Draw(frame).text((6, im.height + 3), f"step {int(sheets[k].stem[5:])}", "black", font(15))
        frames.insert(0, frame)
    if not frames:
        return
    frames = [frame if frame.mode == "L" else frame.quantize(method=Image.Quantize.FASTOCTREE) for frame in frames]
    each = int(min(500, max(40, 1000 * seconds / len(frames))))
    frames[0].save(path, save_all=True, append_images=frames[1:], loop=0, duration=[each] * (len(frames) - 1) + [2000])


def ticks(low, high, about=5):
    """Round numbers (1, 2 or 5 times a power of ten apart) that lie in [low, high]."""
    span = (high - low) / about
    power = 10.0 ** math.floor(math.log10(span))
    apart = next(step * power for step in (1, 2, 5, 10) if step * power >= span * 0.999)
    return [k * apart for k in range(math.ceil(low / apart - 1e-9), math.floor(high / apart + 1e-9) + 1)]


def save_curves(path, rows, panels, width=900, height=300):
    """Line charts over the step, one above the other, with axes, round ticks and a legend.

    rows: the dicts of log.jsonl. panels: [(title, names of numbers in the rows)]; a chart none of whose numbers occurs
    is left away. The vertical range covers the middle 99 % of the values, so that one outlier does not flatten the
    rest.
    """
    panels = [(title, {name: [(row["step"], row[name]) for row in rows if name in row] for name in names})
              for title, names in panels]
    panels = [(title, points) for title, points in panels if any(points.values())]
    ink, pale, colours = (40, 40, 40), (225, 225, 225), [(31, 119, 180), (214, 69, 65), (44, 140, 80), (148, 103, 189)]
    small, title_font = font(13), font(15)
    chart = Image.new("RGB", (width, height * max(1, len(panels))), "white")
    draw = ImageDraw.Draw(chart)
    for p, (title, points) in enumerate(panels):
        left, right, top, bottom = 78, width - 18, height * p + 34, height * (p + 1) - 44
        xs, ys = zip(*itertools.chain(*points.values()))
        draw.text((left, top - 26), title, ink, title_font)
        (x0, x1), (y0, y1) = (min(xs), max(xs)), np.percentile(ys, [0.5, 99.5])
        x1 = x1 if x1 > x0 else x0 + 1
        margin = 0.05 * (y1 - y0) or abs(y0) * 0.1 or 1.0
        y0, y1 = y0 - margin, y1 + margin

        def place(x, y, box=(left, right, top, bottom), x0=x0, x1=x1, y0=y0, y1=y1):
            return (box[0] + (x - x0) / (x1 - x0) * (box[1] - box[0]),
                    min(max(box[3] - (y - y0) / (y1 - y0) * (box[3] - box[2]), box[2]), box[3]))

        for y in ticks(y0, y1):
            _, v = place(x0, y)
            draw.line((left, v, right, v), pale)
            draw.text((left - 8, v), f"{y:g}" if abs(y) >= 1e-9 else "0", ink, small, anchor="rm")
        for x in ticks(x0, x1, 8):
            u, _ = place(x, y0)
            draw.line((u, bottom, u, bottom + 4), ink)
            draw.text((u, bottom + 7), f"{x:g}" if x < 1e5 else f"{x / 1000:g}k", ink, small, anchor="ma")
        draw.text(((left + right) / 2, bottom + 25), "step", ink, small, anchor="ma")
        draw.rectangle((left, top, right, bottom), outline=ink)
        label = right
        for (name, pts), colour in reversed(list(zip(points.items(), colours))):
            if len(pts) > 1:
                draw.line([place(*pt) for pt in pts], colour, 2)
            elif pts:
                u, v = place(*pts[0])
                draw.ellipse((u - 3, v - 3, u + 3, v + 3), colour)
            label -= draw.textlength(name, small) + 34
            draw.line((label, top - 14, label + 18, top - 14), colour, 3)
            draw.text((label + 23, top - 14), name, ink, small, anchor="lm")
    chart.save(path)
