"""Pixels: a folder of pictures, an idx file or the built-in demo -> one uint8 array; sheets, animations and curves
back.

    pictures = load("teeth", size=(256, 256))      # decoded once: pictures.images is uint8 (N, C, H, W)
    for real in batches(pictures.images, 64): ...  # float (64, C, H, W) in [-1, 1], without end
    save_grid("sheet.png", real)

Needs torch, numpy and pillow. On disk and in the array pictures are uint8; inside the program they are float in [-1,
1]. Whatever is wrong with a source is a ValueError or an OSError of one sentence.
"""

import collections
import contextlib
import ctypes
import errno
import functools
import gzip
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import queue
import re
import signal
import sys
import threading
import time
import warnings
import weakref
import zlib
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import torch
from PIL import Image, ImageChops, ImageColor, ImageFile, ImageOps

import prepare

CACHE = "runs/.cache"                                        # decoded pictures; may be deleted at any time
SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm", ".pnm"}
RESAMPLE = Image.Resampling.BICUBIC                          # Pillow widens the kernel when it shrinks: antialiased


class Dataset(NamedTuple):
    """What `load` returns."""
    images: "ImageSubset"                                           # uint8 (N, C, H, W), rows of a memory-mapped file
    names: list                                              # N names, unique within the source
    held_out: int                                            # how many are on the other side of the split
    skipped: list                                           # (name, reason) of every file that is not in the array
    notes: list                                              # sentences a user should read
    fingerprint: list                                        # [N, C, H, W, crc32]: the same for the same pictures


class ImageSubset:
    """Chosen rows of an array (N, H, W, C), shown as (N, C, H, W); none of them is copied before it is asked for.

    The channels of a pixel lie side by side in memory, as torch's channels_last wants them: nothing is moved about.
    """

    def __init__(self, array, chosen):
        self.chosen = np.asarray(chosen, np.int64)
        if isinstance(array, ImageSubset):                          # rows of rows
            array, self.chosen = array.array, array.chosen[self.chosen]
        self.array = np.asarray(array)                       # numpy is twice as slow with its own class of mapped ones
        _, height, width, channels = self.array.shape
        self.shape, self.dtype = (len(self.chosen), channels, height, width), self.array.dtype

    def __len__(self):
        return len(self.chosen)

    def __getitem__(self, index):
        return np.moveaxis(self.array[self.chosen[index]], -1, -3)

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self[:], dtype)


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
        if (min(h, w) < 1 or not set(words) <= {"center", "top", "bottom", "left", "right"}
                or {"top", "bottom"} <= set(words) or {"left", "right"} <= set(words)):
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


def add_arguments(parser):
    """The flags that say which pictures, and what they are made into: those of `load`, which checks them."""
    add = parser.add_argument_group("pictures").add_argument
    add("--data", default="demo", help="a folder of pictures, an idx or idx.gz file, a .npy or .npz array, or demo: "
        "small drawn radiographs (%(default)s)")
    add("--classes", default="", help="only these sub-folders or labels, as in 3,7")
    add("--size", default="64", help="what pictures are brought to: 64, or HEIGHTxWIDTH as in 288x512 (%(default)s)")
    add("--fit", default="crop", choices=("crop", "squash", "pad"), help="centre crop, squash, or pad with black "
        "(%(default)s)")
    add("--crop", default="", help="first cut out LEFT,TOP,RIGHT,BOTTOM as fractions, HEIGHTxWIDTH@ANCHOR in pixels, "
        "auto (the window with most detail over the whole set), or auto-each (that window moved in each picture)")
    add("--channels", default="auto", choices=("auto", "1", "3"), help="grey, colour, or as the files are "
        "(%(default)s)")
    add("--background", default="white", help="what transparent pictures are laid on (%(default)s)")
    add("--range", default="", metavar="LOW,HIGH", help="what 16-bit and float grey is scaled over, as in 0,4095 (each "
        "picture's own range)")
    add("--denoise", default="", choices=("", "median", "nlm"), help="smooth the pictures: median of 3x3, or non-local "
        "means")
    add("--keep-truncated", action="store_true", help="keep what can be read of files that are cut short")
    add("--limit", type=int, metavar="N", help="only the first N pictures, for a dry run")
    add("--holdout", type=float, default=0.1, help="share of the pictures kept out of training, for the metrics "
        "(%(default)s)")
    add("--group", default="", metavar="REGEX", help="pictures whose names agree in the first group of REGEX stay on "
        "one side of the holdout: one patient, one video")


def load_from_args(args, part="all", at_least=1):
    """`load` with the flags of `add_arguments`."""
    return load(args.data, parse_size(args.size), args.fit, args.crop, args.channels, args.limit, args.holdout, part,
                at_least, args.group, args.background, args.range, args.keep_truncated, args.denoise,
                classes=getattr(args, "classes", ""))    # runs of before it was a flag have none


def parse_range(text):
    """"0,4095" -> (0.0, 4095.0): what 16-bit and float grey is scaled over. Raises ValueError for anything else."""
    try:
        low, high = (float(word) for word in text.split(","))
    except ValueError:
        low = high = math.nan
    if not low < high or not math.isfinite(high - low):
        raise ValueError(f"--range {text}: write LOW,HIGH, as in 0,4095")
    return low, high


def open_image(raw):
    """A file's bytes (or a uint8 array) -> PIL picture, its pixels not decoded yet. ValueError, or whatever Pillow
    raises, for what is none."""
    if len(raw) == 0:
        raise ValueError("the file is empty")
    im = Image.fromarray(raw) if isinstance(raw, np.ndarray) else Image.open(io.BytesIO(raw))
    if im.format == "EPS":                                   # decoding it would run Ghostscript on the file
        raise ValueError("is a PostScript program, whatever its name says")
    if im.width * im.height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"claims {im.height}x{im.width} pixels, over the limit of {Image.MAX_IMAGE_PIXELS}")
    if min(im.size) < 2:
        raise ValueError(f"only {im.height}x{im.width} pixels")
    return im


def orientation(im):
    """How a JPEG lies, 1 (upright) to 8, by its EXIF; 1 where that is damaged."""
    try:
        return im.getexif().get(0x0112, 1)
    except Exception:                                        # Pillow's, of almost any kind
        return 1


def to_bytes(values, low, high):
    """A float array, low to high -> 0 to 255, uint8. Raises ValueError when a value is not finite."""
    if not np.isfinite([values.min(), values.max()]).all():
        raise ValueError("holds values that are not finite")
    return ((values - low) * (255 / max(high - low, 1e-12))).round().clip(0, 255).astype(np.uint8)


def upright(im, background="white", value_range=None):
    """An opened PIL picture of any mode -> mode L or RGB, turned as its EXIF says. Raises whatever Pillow raises.

    16-bit, 32-bit and float grey is scaled over value_range = (low, high), else over the picture's own range (Pillow's
    convert would clip it to white); transparent pictures are composited on `background`; of an animation the first
    frame is taken.
    """
    im.load()
    with contextlib.suppress(Exception):                     # a damaged EXIF says nothing, and hides no picture
        ImageOps.exif_transpose(im, in_place=True)
    if im.mode.startswith(("I", "F")):                       # 16 bits and more
        values = np.asarray(im).astype(np.float64)
        return Image.fromarray(to_bytes(values, *(value_range or (values.min(), values.max()))))
    mode = "L" if im.mode in ("1", "L", "LA", "La") else "RGB"
    if im.has_transparency_data:
        im = im.convert("RGBA")
        im = Image.alpha_composite(Image.new("RGBA", im.size, background), im)
    return im if im.mode == mode else im.convert(mode)


def crop_and_resize(im, size, fit="crop", box=None):
    """Cut `box` = (left, top, right, bottom) out of `im`, of mode L or RGB, and bring it to `size` = (height, width) by
    one resize -> uint8 (H, W) or (H, W, 3).

    fit "crop": the largest centred window of the target's shape; "squash": the whole box, proportions lost; "pad": the
    whole box, black beside it.
    """
    box = box or (0, 0, *im.size)
    if fit != "pad":
        return resize(im, size, center_box(box, size) if fit == "crop" else box)
    height, width = size
    w, h = box[2] - box[0], box[3] - box[1]
    scale = max(w / width, h / height)
    inner = max(1, round(h / scale)), max(1, round(w / scale))
    small = resize(im, inner, box)
    out = np.zeros((*size, *small.shape[2:]), np.uint8)
    top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
    out[top:top + inner[0], left:left + inner[1]] = small
    return out


def center_box(box, size):
    """The largest window of the shape of `size` = (height, width) in the middle of `box`."""
    left, top, right, bottom = box
    w, h = right - left, bottom - top
    scale = min(w / size[1], h / size[0])
    dx, dy = max(0, w - scale * size[1]) / 2, max(0, h - scale * size[0]) / 2
    return left + dx, top + dy, right - dx, bottom - dy


def resize(im, size, box):
    """`box` of a picture of mode L or RGB at `size` = (height, width): bicubic, antialiased -> uint8 (H, W[, 3]).

    Pillow's. Where the box lies on whole pixels torch's, which is as exact and two to five times as fast: both work in
    integers, one direction after the other, but not in the same order.
    """
    edges = [round(edge) for edge in box]
    if max(abs(a - b) for a, b in zip(box, edges)) > 1e-6:
        return np.asarray(im.resize(size[::-1], RESAMPLE, box))
    pixels = np.array(im if edges == [0, 0, *im.size] else im.crop(edges))
    x = torch.from_numpy(pixels.reshape(1, *pixels.shape[:2], -1)).permute(0, 3, 1, 2)
    x = torch.nn.functional.interpolate(x, size, mode="bicubic", antialias=True)
    return x[0].permute(1, 2, 0).reshape(*size, *pixels.shape[2:]).numpy()


def find_images(folder):
    """Names, relative to `folder`, of every file below it whose suffix, in any case, is a picture's; sorted.

    Linked folders are followed, each once. Hidden files and folders are passed over (".ipynb_checkpoints", "._x.jpg").
    """
    folder = str(folder)
    found, seen = [], {os.path.realpath(folder)}
    for root, folders, files in os.walk(folder, followlinks=True):
        for name in sorted(folders):
            path = os.path.realpath(os.path.join(root, name))
            if name.startswith(".") or path in seen:
                folders.remove(name)
            else:
                seen.add(path)
        folders.sort()                                       # else the file system chose which of two links is followed
        inside = os.path.relpath(root, folder).replace(os.sep, "/")
        found += [name if inside == "." else f"{inside}/{name}" for name in files
                  if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES]
    return sorted(found)


def read_bytes(path):
    """A file's bytes."""
    with open(path, "rb") as file:
        return file.read()


def read_idx(path, labels=False):
    """An idx or idx.gz file (MNIST's format) of pictures -> uint8 (N, H, W), or (N, H, W, 3); of labels -> uint8 (N,).

    Bytes 0 0, type 8 (unsigned byte), the number of dimensions, each dimension as a big-endian int32, the values.
    Raises ValueError when the file is damaged, is no idx file at all, or holds the other kind.
    """
    raw = Path(path).read_bytes()
    try:
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is a damaged gzip file: {error}") from error
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is no idx file of bytes: give a folder of pictures, an idx or idx.gz file, a .npy or "
                         ".npz array, or 'demo'")
    shape = [int.from_bytes(raw[4 + 4 * k:8 + 4 * k], "big") for k in range(raw[3])]
    if len(shape) == 1 and not labels:
        raise ValueError(f"{path} holds {shape[0]} labels, not pictures: give the file with 'images' in its name")
    if labels and len(shape) != 1:
        raise ValueError(f"{path} should hold labels, and has dimensions {shape}")
    if not labels and (len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] != 3)):
        raise ValueError(f"{path} has dimensions {shape}: expected (N, H, W) or (N, H, W, 3)")
    if len(raw) - 4 - 4 * len(shape) != math.prod(shape):
        raise ValueError(f"{path} is cut short: {len(raw)} bytes for an array of {shape}")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def idx_labels(path):
    """The labels that lie beside an idx file of pictures under MNIST's naming, or None."""
    name = re.sub("idx[34]", "idx1", path.name.replace("images", "labels")).removesuffix(".gz")
    if name == path.name.removesuffix(".gz"):                # not MNIST's naming
        return None
    beside = [path.with_name(other) for other in (name, name + ".gz")]
    return next((read_idx(file, labels=True) for file in beside if file.exists()), None)


def read_array(path, value_range=""):
    """A .npy or .npz file -> pictures that give uint8 (H, W) or (H, W, C) by their number, and labels or None.

    The array is (N, H, W), (N, H, W, C) or (N, C, H, W) with C of 1, 3 or 4. What is not uint8 is scaled over
    value_range = "LOW,HIGH", else over the whole array's range: of floats in [-1, 1], -1 becomes 0 and 1 becomes 255.
    A .npy stays on the disk until a picture is asked for. Raises ValueError for anything else.
    """
    try:
        loaded = np.load(path, mmap_mode="r" if path.suffix == ".npy" else None, allow_pickle=False)
        arrays = {"": loaded} if path.suffix == ".npy" else dict(loaded)
    except Exception as error:                               # a damaged file makes numpy raise almost anything
        raise ValueError(f"{path} is damaged, or no array of numbers ({type(error).__name__})") from error
    found = [name for name, array in arrays.items() if array.ndim in (3, 4) and array.dtype.kind in "buif"]
    if len(found) != 1:
        kinds = ", ".join(f"{name or 'it'} has shape {array.shape}" for name, array in arrays.items())
        raise ValueError(f"{path} should hold one array of pictures, (N, H, W), (N, H, W, C) or (N, C, H, W): {kinds}")
    array = arrays.pop(found[0])
    if array.ndim == 4 and array.shape[3] not in (1, 3, 4):
        if array.shape[1] not in (1, 3, 4):
            raise ValueError(f"{path} has shape {array.shape}: one of its axes must be the channels, 1, 3 or 4 of them")
        array = np.moveaxis(array, 1, 3)
    low, high = 0.0, 255.0
    if array.dtype != np.uint8 and array.size:
        low, high = parse_range(value_range) if value_range else (float(array.min()), float(array.max()))
        if not math.isfinite(low) or not math.isfinite(high):
            raise ValueError(f"{path} holds values that are not finite")
    labels = next((arrays[name] for name in ("labels", "y") if name in arrays and arrays[name].ndim == 1), None)
    return _Pixels(array, low, high), labels


class _Pixels:
    """The pictures of an array, scaled one by one."""

    def __init__(self, array, low, high):
        self.array, self.low, self.high = array, low, high

    def __len__(self):
        return len(self.array)

    def __getitem__(self, k):
        picture = self.array[k]
        picture = picture[..., 0] if picture.shape[2:] == (1,) else picture
        if picture.dtype != np.uint8:
            picture = to_bytes(picture.astype(np.float64), self.low, self.high)
        return np.ascontiguousarray(picture)


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

class Item(NamedTuple):
    """One picture of a source, not read yet."""
    name: str
    stamp: tuple                                             # (size, time) of its file: another stamp, another picture
    read: object                                             # () -> the file's bytes, or a uint8 array


def find_items(source, classes="", value_range=""):
    """A source -> list of `Item`.

    source: "demo", a folder of pictures (or, where it holds none, of idx files), one idx or idx.gz file, or a .npy or
    .npz array. A folder's first sub-folders are its classes; those of an idx file stand in the labels' file beside it,
    those of a .npz in its array "labels" or "y". classes: the ones to keep, as in "3,7". value_range: see `read_array`.
    Raises FileNotFoundError or ValueError with the sentence for the user.
    """
    items = _all_items(source, value_range)
    if not classes:
        return items
    wanted = [word.strip() for word in classes.split(",")]
    there = sorted({item.name.split("/")[0] for item in items if "/" in item.name})
    if not there:
        raise ValueError(f"--classes {classes}: {source} has no sub-folders and no file of labels")
    for word in wanted:
        if word not in there:
            raise ValueError(f"--classes {word}: {source} has the classes {' '.join(there[:20])}"
                             + (f" and {len(there) - 20} more" if len(there) > 20 else ""))
    return [item for item in items if "/" in item.name and item.name.split("/")[0] in wanted]


def _all_items(source, value_range):
    if str(source) == "demo":
        drawn, lock = functools.cache(draw_demo), threading.Lock()

        def read(k):
            with lock:                                       # drawn when the first is asked for, and once
                return drawn()[k]
        return [Item(f"demo-{k:04d}", (), functools.partial(read, k)) for k in range(2000)]
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"--data {source}: there is no such folder or file (looked in {Path.cwd()})")
    files = [path]
    if path.is_dir():
        found = [(name, os.path.join(path, name)) for name in find_images(path)]
        if found:
            return [Item(name, file_stamp(file), functools.partial(read_bytes, file)) for name, file in found]
        files = sorted(file for file in path.iterdir() if "idx3" in file.name or "idx4" in file.name)
        files = [file for file in files if file.suffix != ".gz" or file.with_suffix("") not in files]
        if not files:
            raise ValueError(f"--data {source}: no pictures in this folder or below it "
                             f"(looked for {' '.join(sorted(SUFFIXES))}, in capitals too)")
    elif path.suffix.lower() in SUFFIXES:
        raise ValueError(f"--data {source} is one picture: give the folder that holds the pictures")
    items = []
    for file in files:
        pictures, labels = (read_array(file, value_range) if file.suffix in (".npy", ".npz")
                            else (read_idx(file), idx_labels(file)))
        if labels is not None and len(labels) != len(pictures):
            raise ValueError(f"{file} holds {len(pictures)} pictures, and there are {len(labels)} labels for them")
        of_file = file_stamp(file)
        items += [Item(("" if labels is None else f"{labels[k]}/") + f"{file.name}-{k:05d}", of_file,
                       functools.partial(pictures.__getitem__, k)) for k in range(len(pictures))]
    if not items:
        raise ValueError(f"--data {source} holds no pictures: an array of none")
    return items


def file_stamp(path):
    """(size, times of the last change of content and of anything) of a file; zeros for a link that leads nowhere."""
    try:
        about = os.stat(path)
        return about.st_size, about.st_mtime_ns, about.st_ctime_ns
    except OSError:
        return 0, 0, 0


def has_colour(pixels):
    """Whether more than 0.2 % of the pixels of a uint8 (H, W, 3) array have channels that lie over 24 levels apart."""
    if pixels.ndim == 2:
        return False
    red, green, blue = (pixels[..., c] for c in range(3))
    apart = np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)
    return np.count_nonzero(apart > 24) > 0.002 * apart.size


def all_grey(im):
    """Whether an RGB picture has three equal channels. Most that have not are found out by one pixel, or one row."""
    if im.mode != "RGB" or len(set(im.getpixel((im.width // 2, im.height // 2)))) > 1:
        return False
    row = im.crop((0, im.height // 2, im.width, im.height // 2 + 1)).tobytes()
    if not row[::3] == row[1::3] == row[2::3]:
        return False
    red, green, blue = im.split()
    return not any(ImageChops.difference(red, other).getbbox() for other in (green, blue))


class Preprocess(NamedTuple):
    """Everything that decides what a file's pixels become: the flags of the same names."""
    size: tuple                                              # (height, width)
    fit: str = "crop"
    crop: str = ""
    channels: str = "auto"
    background: str = "white"
    range: str = ""
    keep_truncated: bool = False
    denoise: str = ""

    def check(self):
        """Raises ValueError, one sentence, for a field that means nothing."""
        if min(self.size) < 1:
            raise ValueError(f"--size {self.size[0]}x{self.size[1]}: a picture has at least one pixel each way")
        if str(self.channels) not in ("auto", "1", "3"):
            raise ValueError(f"--channels is 1, 3 or auto, not {self.channels}")
        if self.fit not in ("crop", "squash", "pad"):
            raise ValueError(f"--fit is crop, squash or pad, not {self.fit}")
        if self.denoise not in ("", "median", "nlm"):
            raise ValueError(f"--denoise is median or nlm, not {self.denoise}")
        try:
            ImageColor.getrgb(self.background)
        except ValueError:
            raise ValueError(f"--background {self.background}: write a colour, as in white or #808080") from None
        if self.crop not in ("auto", "auto-each"):
            self.window()
        if self.range:
            parse_range(self.range)

    def window(self):
        """--crop as a box function, of (width, height) of an upright picture."""
        return parse_crop(self.crop.removeprefix("auto-each:") or "0,0,1,1")

    def enlarges(self, width, height):
        """Whether the window in an upright picture of this size is smaller than the target."""
        left, top, right, bottom = self.window()(width, height)
        return bottom - top < self.size[0] - 1e-6 or right - left < self.size[1] - 1e-6     # fractions are not exact

    def upright(self, im):
        """`upright`, by the recipe."""
        return upright(im, self.background, parse_range(self.range) if self.range else None)

    def box(self, im):
        """The window in an upright picture, (left, top, right, bottom) in pixels."""
        if self.crop.startswith("auto-each:"):
            left, top, right, bottom = prepare.move_window(im, self.window()(1, 1))
            return left * im.width, top * im.height, right * im.width, bottom * im.height
        return self.window()(*im.size)

    def pixels(self, raw):
        """A file's bytes (or a uint8 array) -> uint8 (H, W) or (H, W, 3), and whether it had to be enlarged.

        A JPEG much larger than the target is decoded at a half, a quarter or an eighth of its size by its own transform
        (Pillow's draft), never below the target: that changes less than bilinear instead of bicubic would. Raises
        ValueError, or whatever Pillow raises, for a bad file.
        """
        height, width = self.size
        im, window = open_image(raw), self.window()
        full = im.size
        if im.format == "JPEG" and orientation(im) == 1 and not self.denoise:
            left, top, right, bottom = window(*full)
            spare = min((right - left) / width, (bottom - top) / height)
            if spare >= 2:
                im.draft(None, (math.ceil(full[0] / spare), math.ceil(full[1] / spare)))
        im = self.upright(im)
        if all_grey(im):
            im = im.getchannel(0)                            # the same pixels for a third of the work
        mode = {"1": "L", "3": "RGB"}.get(str(self.channels), im.mode)
        im = im if im.mode == mode else im.convert(mode)
        if self.denoise:
            im = prepare.denoise(im, self.denoise)
        full = im.size if im.size == full[::-1] else full    # turned by EXIF; or else, perhaps, drafted
        box, small = window(*full), self.enlarges(*full)
        if self.crop.startswith("auto-each:"):
            box = self.box(im)
        elif im.size != full:
            across, down = im.width / full[0], im.height / full[1]
            box = tuple(v * k for v, k in zip(box, (across, down, across, down)))
        return crop_and_resize(im, self.size, self.fit, box), small


def recipe_of(args):
    """The `Recipe` of the flags. Raises ValueError for one that means nothing."""
    recipe = Preprocess(parse_size(args.size), *(getattr(args, name) for name in Preprocess._fields[1:]))
    recipe.check()
    return recipe


class Decoded(NamedTuple):
    """What became of an `Item`."""
    digest: int = 0                                          # of its content
    pixels: np.ndarray = None                                # uint8 (H, W) or (H, W, 3); None when it is left out
    why: str = ""                                            # the reason, when it is left out
    small: bool = False                                      # had to be enlarged
    coloured: bool = False
    passing: bool = False                                    # what went wrong may have passed the next time


def reason(error):
    """Why a file cannot be used, in a few words: of what reading it raised."""
    if isinstance(error, PIL.UnidentifiedImageError):
        return "not a picture, whatever its name says"
    kind = "cannot be opened: " if getattr(error, "errno", None) is not None else ""
    return (kind + str(error).partition("\n")[0])[:120] or type(error).__name__


def hashed(raw, size=8):
    """A hash of bytes, as an integer of `size` bytes."""
    return int.from_bytes(hashlib.blake2b(raw, digest_size=size).digest(), "big")


def decode(recipe, item):
    """An `Item` -> `Decoded`. Never raises."""
    digest = 0
    try:
        raw = item.read()
        digest = hashed(raw)
        pixels, small = recipe.pixels(raw)
        return Decoded(digest, pixels, "", small, recipe.channels == "auto" and has_colour(pixels))
    except Exception as error:                               # a damaged file makes Pillow raise almost anything
        number = getattr(error, "errno", None)               # the system's; Pillow's own errors have none
        dead_link = number in (errno.ENOENT, errno.ELOOP)    # mended, it has another stamp
        return Decoded(digest, why=reason(error),
                       passing=isinstance(error, MemoryError) or number is not None and not dead_link)


_writing = threading.Lock()


def _worker(*work):
    """In a forked process: Ctrl-C is for the parent to answer, and the parent's death ends this one too."""
    global _work
    _work = work
    torch.set_num_threads(1)                                 # those of the parent are not in a fork
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)           # PR_SET_PDEATHSIG


def _chunk(first, last):
    function, items = _work
    return [function(item) for item in items[first:last]]


def parallel_map(function, items, chunk=64):
    """function(item) for each of a list, in order, worked out by all cores; few results wait at any time.

    On Linux by forked processes, which share the list and need nothing pickled but the results; elsewhere, and for
    short lists, by threads, of which Pillow lets several decode at a time. chunk: the most items handed over at once.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if sys.platform == "linux" and len(items) > min(128, 4 * chunk):
        chunk = max(1, min(chunk, len(items) // (16 * cores)))
        fork = multiprocessing.get_context("fork")
        pool, work = ProcessPoolExecutor(cores, fork, _worker, (function, items)), _chunk
    else:
        chunk, pool, work = 1, ThreadPoolExecutor(cores), lambda k, _: [function(items[k])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                      # Pillow's, of damaged files, and Python's, of forking
        waiting = collections.deque()
        try:
            for first in range(0, len(items), chunk):
                waiting.append(pool.submit(work, first, first + chunk))
                if len(waiting) > 4 * cores:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        except BrokenProcessPool as error:
            raise OSError("a process that read pictures was killed, probably for want of memory") from error
        except BaseException:                                # Ctrl-C, say: nobody waits for what is under way
            for process in list((getattr(pool, "_processes", None) or {}).values()):
                process.terminate()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        pool.shutdown()


def counted(results, n, done):
    """Passes the results for n files on; after five seconds, and every two from then on, says how many there were."""
    shown = time.monotonic() + 3
    for k, result in enumerate(results):
        if time.monotonic() - shown > 2:
            shown = time.monotonic()
            print(f"data: {k} of {n} files {done}", file=sys.stderr, flush=True)
        yield result


@contextlib.contextmanager
def locked(path):
    """Holds `path` as a lock between processes; it is free again when the process ends, however it ends.

    Yields whether it is held: there are file systems without locks, where two processes may do the same at once.
    """
    with open(path, "a+b") as file:
        held = True
        if os.name == "nt":
            import msvcrt
            while True:
                try:
                    msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
                    break
                except OSError:                              # it gives up after ten seconds; a build may take longer
                    continue
        else:
            import fcntl
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print("data: another process is reading the same pictures; waiting for it", file=sys.stderr, flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:
                held = False
        yield held


def load_cached(source, items, recipe, folder=CACHE):
    """The pixels of all items as a memory-mapped uint8 array (N, H, W, C), and what is known of each, from the cache.

    Built once, by whichever process comes first, into folder/KEY.pixels and folder/KEY.json; the key is a hash of the
    recipe, the place and each item's name, size and times, so that any change builds another. The .json is written
    last, by renaming: an interrupted build leaves none, and the next begins anew. Memory stays bounded: pictures go
    straight to the file. Returns (array, dict with shape, rows, names, digests, left_out, small,
    coloured); rows: which of the array's have a picture in them, and are described by names and digests.
    """
    stamps = [(item.name, item.stamp) for item in items]
    text = json.dumps([10, PIL.__version__, torch.__version__, recipe, os.path.realpath(source), stamps])
    key = hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    about = folder / f"{key}.json"
    with locked(folder / f"{key}.lock") as alone:
        found = json.loads(about.read_text("utf-8")) if about.exists() else {"passing": True}
        if found["passing"] or not (folder / f"{key}.pixels").exists():
            build(items, recipe, folder / f"{key}.pixels", about, "" if alone else f"-{os.getpid()}")
            found = json.loads(about.read_text("utf-8"))
    return np.memmap(folder / f"{key}.pixels", np.uint8, "r", shape=tuple(found["shape"])), {**found, "key": key}


def decode_row(recipe, file, channels, numbered):
    """`decode`; the pixels go to row k of `file`, and only what is known of them comes back."""
    k, item = numbered
    made = decode(recipe, item)
    if made.pixels is not None:
        planes = made.pixels if made.pixels.ndim == 3 else made.pixels[..., None]
        write_at(file, k * math.prod(recipe.size) * channels,
                 np.ascontiguousarray(np.broadcast_to(planes, (*recipe.size, channels))))
    return made._replace(pixels=None)


def write_at(file, offset, block):
    """Write a block into an open file, whatever other threads or processes write into it meanwhile."""
    if hasattr(os, "pwrite"):
        if os.pwrite(file.fileno(), block, offset) < block.nbytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    else:
        with _writing:                                       # Windows, where threads read
            file.seek(offset)
            file.write(block)


@contextlib.contextmanager
def truncated_files(kept):
    """Within it Pillow keeps what can be read of files that are cut short, or does not."""
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, kept
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def write_whole(path, text):
    """A text file that is there whole or not at all, whoever else writes it meanwhile."""
    draft = path.with_name(f"{path.name}-{os.getpid()}")
    draft.write_text(text, "utf-8")
    os.replace(draft, path)


def blocks(array):
    """The rows (n, H, W, ...) of an array, some megabytes at a time."""
    few = max(1, 2**20 // math.prod(array.shape[1:3]))
    return (array[k:k + few] for k in range(0, len(array), few))


def build(items, recipe, pixels_path, about_path, whose=""):
    """What `cached` does when there is nothing yet. Colour is decided at the end: a grey set is written once more.

    whose: what tells the unfinished files of one process from those of another.
    """
    with contextlib.suppress(Exception):
        items[0].read()                                      # the demo is drawn here, once, not in each worker
    channels = 1 if recipe.channels == "1" else 3
    unfinished = pixels_path.with_suffix(f".unfinished{whose}")
    n = len(items)
    with open(unfinished, "wb", buffering=0) as file, truncated_files(recipe.keep_truncated):
        file.truncate(n * math.prod(recipe.size) * channels)
        work = functools.partial(decode_row, recipe, file, channels)
        results = parallel_map(work, list(enumerate(items)), 1 if recipe.denoise else 64)
        made = []
        for one in counted(results, n, "read"):
            made.append(one)
            if len(made) % 512 == 0 or len(made) == n:
                os.fsync(file.fileno())                      # the disk is at work while the next ones are decoded
    rows = [k for k in range(n) if not made[k].why]
    found = dict(rows=rows, names=[items[k].name for k in rows], digests=[made[k].digest for k in rows],
                 skipped=[(item.name, one.why) for item, one in zip(items, made) if one.why],
                 coloured=[items[k].name for k in rows if made[k].coloured],
                 small=sum(one.small for one in made), passing=any(one.passing for one in made))
    if recipe.channels == "auto" and not found["coloured"]:
        array = np.memmap(unfinished, np.uint8, "r", shape=(n, *recipe.size, channels))
        channels, thin = 1, pixels_path.with_suffix(f".thin{whose}")
        with open(thin, "wb") as file:
            for block in blocks(array):
                file.write(grey(block).data)
            os.fsync(file.fileno())
        del array, block                                     # Windows removes no file that is mapped
        unfinished.unlink()
        unfinished = thin
    os.replace(unfinished, pixels_path)
    write_whole(about_path, json.dumps({**found, "shape": [n, *recipe.size, channels]}))


def near_copies(array, found, folder=CACHE):
    """`near_pairs` of what `cached` returned; worked out when first asked for, then kept beside it."""
    kept = Path(folder) / f"{found['key']}.alike"
    with contextlib.suppress(OSError, ValueError):
        return json.loads(kept.read_text("utf-8"))
    pairs = prepare.near_pairs(np.concatenate([thumbnails(block) for block in blocks(array)])[found["rows"]])
    write_whole(kept, json.dumps(pairs))
    return pairs


def grey(images):
    """uint8 (N, H, W, 3) -> (N, H, W, 1) by the weights of Pillow's convert("L"): ITU-R 601, in its integers."""
    total = np.full((*images.shape[:3], 1), 0x8000, np.uint32)
    for c, weight in enumerate((19595, 38470, 7471)):
        total += images[..., c:c + 1] * np.uint32(weight)
    return (total >> 16).astype(np.uint8)


def heldout_mask(digests, names, share, group="", alike=()):
    """Which pictures belong to the held-out `share`: a boolean array. A hash of the content decides, never the name.

    Exact copies have one digest and so land on one side; so do pictures that are near copies (`alike`: index pairs),
    drawn by the smallest of their hashes. group: a regular expression; pictures whose names it matches with equal first
    groups (or equal matches, if it has none) stay together, and a hash of that group decides. Adding files moves no
    picture that was there, unless a near copy of it is added.
    """
    keys = np.array(digests, np.uint64)
    if not share and not group:
        return np.zeros(len(keys), bool)
    if group:
        try:
            pattern = re.compile(group)
        except re.error as error:
            raise ValueError(f"--group {group}: no regular expression ({error})") from None
        matches = [pattern.search(name) for name in names]
        if not any(matches):
            raise ValueError(f"--group {group}: matches no name, {names[0]} for one")
        for k, match in enumerate(matches):
            key = match and (match[1] if pattern.groups else match[0])
            if key:
                keys[k] = hashed(key.encode("utf-8", "surrogateescape"))
    kin = {}                                                 # key -> the smallest key it has to stay with

    def root(key):
        while kin.get(key, key) != key:
            key = kin[key]
        return key

    for i, j in alike:
        a, b = sorted((root(int(keys[i])), root(int(keys[j]))))
        kin[b] = a
    # Hashed once more: the smallest of many hashes is a small number, and would mostly be held out.
    return np.array([hashed(root(int(key)).to_bytes(8, "big"), 4) for key in keys]) < share * 2**32


def resolve_crop(recipe, items):
    """The recipe with "auto" and "auto-each" replaced by the window they find in the set, and a note that says so."""
    if recipe.crop not in ("auto", "auto-each"):
        return recipe, []
    crop = prepare.find_crop(items)
    return (recipe._replace(crop=crop if recipe.crop == "auto" else f"auto-each:{crop}"),
            [f"--crop {recipe.crop} chose the window {crop} (left, top, right, bottom)"])


def check_counts(limit, holdout):
    """Raises ValueError for a --limit or --holdout that means nothing."""
    if not 0 <= holdout < 1:
        raise ValueError(f"--holdout {holdout:g}: a share from 0 up to, not including, 1")
    if limit is not None and limit < 0:
        raise ValueError(f"--limit {limit}: a number of pictures")


def load(source, size, fit="crop", crop="", channels="auto", limit=0, holdout=0.0, part="all", at_least=1, group="",
         background="white", range="", keep_truncated=False, denoise="", cache=CACHE, classes=""):
    """One uint8 array (N, C, H, W) from a folder (recursive), an idx or idx.gz file, a .npy or .npz array, or "demo".

    size: (height, width). fit, crop: see `fit_picture`, `parse_crop`. channels: 1, 3 or "auto" (1 when no picture of
    the source has colour). background, range, keep_truncated, denoise: see `upright`, `denoise`. limit: only the first
    so many files. holdout, group: see `held_out`; part: "train", "heldout" or "all". at_least: fewer pictures than that
    are an error. cache: where `cached` keeps the pixels. classes: see `find_items`.
    Returns `Pictures`. Files that cannot be read and exact copies of earlier ones are left out and named in `left_out`,
    never fatal; ValueError when too few remain.
    """
    recipe = Preprocess(tuple(size), fit, crop, str(channels), background, range, keep_truncated, denoise)
    recipe.check()
    check_counts(limit, holdout)
    items = find_items(source, classes, range)[:limit or None]
    recipe, notes = resolve_crop(recipe, items)
    array, found = load_cached(source, items, recipe, cache)
    names, left_out = found["names"], found["skipped"]
    first = dict(zip(reversed(found["digests"]), reversed(names)))                    # digest -> the first to have it
    alike = near_copies(array, found, cache) if names and holdout else ()
    aside = heldout_mask(found["digests"], names, holdout, group, alike) if names else np.zeros(0, bool)
    copies = np.array([first[digest] != name for name, digest in zip(names, found["digests"])], bool)
    left_out = left_out + [(names[k], f"an exact copy of {first[found['digests'][k]]}") for k in np.flatnonzero(copies)]
    chosen = np.flatnonzero(~copies & (aside if part == "heldout" else ~aside if part == "train" else True))
    aside = len(names) - len(chosen) - int(copies.sum())
    if len(chosen) < at_least:
        why = f"; {left_out[0][0]}: {left_out[0][1]}" if left_out else ""
        raise ValueError(f"--data {source}: {len(chosen)} of {len(items)} pictures can be used and at least {at_least} "
                         f"are needed ({len(left_out)} cannot be used, {aside} are held out by --holdout "
                         f"{holdout:g}){why}")
    coloured = found["coloured"]
    if 0 < len(coloured) < 0.1 * len(names):
        notes.append(f"colour because of {len(coloured)} of {len(names)} pictures, {coloured[0]} for one; "
                     "--channels 1 makes all grey")
    if found["small"]:
        notes.append(f"{found['small']} of {len(names)} are smaller than {size[0]}x{size[1]} and were enlarged")
    images = ImageSubset(array, np.array(found["rows"], np.int64)[chosen])
    check = zlib.crc32(np.array(found["digests"], np.uint64)[chosen].tobytes())
    return Dataset(images, [names[k] for k in chosen], aside, left_out, notes,
                    [*images.shape, check])


def summarize_skipped(entries, most):
    """The first of a list of (name, reason), and how many more there are, on one line."""
    shown = "; ".join(f"{name} ({why})" for name, why in entries[:most])
    return shown + (f"; and {len(entries) - most} more" if len(entries) > most else "")


def describe(source, pictures):
    """What `load` found, as the lines to print: one for the array, one for what was left out, one a note."""
    n, c, h, w = pictures.images.shape
    lines = [f"data: {n} pictures from {source}, {h}x{w}, {'grey' if c == 1 else 'colour'}; "
             f"{pictures.held_out} held out, {len(pictures.skipped)} left out"]
    if pictures.skipped:
        lines.append(f"data: left out: {summarize_skipped(pictures.skipped, 5)}")
    return lines + [f"data: {note}" for note in pictures.notes]


# ---------------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------------

def to_float(images, out=None):
    """uint8 {0..255} -> float32 in [-1, 1]: x / 127.5 - 1 (to 2e-7), into `out` if given. The memory format stays."""
    x = images.float() if out is None else out.copy_(images)
    down = 0.0078431367                                      # 1 / 127.5 rounded down: white is not above 1
    return torch.add(x.new_full((), -1.0), x, alpha=down, out=x)                      # one pass over the memory


@functools.lru_cache(4)
def epoch_order(n, seed, epoch):
    """The order of n pictures in an epoch: a permutation, a function of (seed, epoch) alone."""
    return np.random.RandomState([seed, epoch]).permutation(n)


def batches(images, batch, seed=0, start=0, flip=False, device="cpu", share=(0, 1)):
    """Endless batches of uint8 (N, C, H, W), an array or `Rows`: float (batch, C, H, W) in [-1, 1], channels last.

    Every picture is drawn once an epoch. Epochs follow one another without a gap, so that all batches are full, a batch
    may straddle two epochs, and `batch` may exceed N. Batch number k is a function of (images, batch, seed, k): `start`
    goes on where an interrupted run stopped. flip: mirror each picture left to right with probability 1/2.

    share = (r, N): the r-th of N equal parts of a batch N times as large, for N processes that work side by side.

    On a GPU whose free memory is over three times the array, the array lives there; otherwise a thread reads ahead into
    pinned memory, so that the GPU does not wait.
    """
    device, n = torch.device(device), len(images)

    def index(k):
        draw = (k * share[1] + share[0]) * batch + np.arange(batch)
        return np.concatenate([epoch_order(n, seed, int(e))[draw[draw // n == e] % n] for e in np.unique(draw // n)])

    def mirrored(k, pixels, part=slice(None)):
        if not flip:
            return pixels
        coins = np.random.RandomState([seed, k, 1 + share[0]]).rand(batch, 1, 1, 1)[part]
        return torch.where(torch.from_numpy(coins < 0.5).to(device), pixels.flip(3), pixels)

    if device.type == "cpu":
        floats, few = lend(), max(1, 2**20 // math.prod(images.shape[1:]))           # so many stay in the cache
        for k in itertools.count(start):
            chosen, x = index(k), floats(batch, *images.shape[2:], images.shape[1]).permute(0, 3, 1, 2)
            for part in (slice(first, first + few) for first in range(0, batch, few)):
                to_float(mirrored(k, torch.from_numpy(images[chosen[part]]), part), out=x[part])
            yield x
            del x                                            # its memory is free for the next, if nobody else holds it
    if device.type != "cuda":
        drawn = (torch.from_numpy(images[index(k)]).to(device) for k in itertools.count(start))
    elif math.prod(images.shape) * 3 < torch.cuda.mem_get_info(device)[0]:
        resident = torch.empty((n, *images.shape[2:], images.shape[1]), dtype=torch.uint8, device=device)
        for k in range(0, n, 1024):                          # never all of it in the host's memory
            resident[k:k + 1024] = torch.from_numpy(np.moveaxis(images[k:k + 1024], 1, 3))            # (N, H, W, C)
        drawn = (resident.index_select(0, torch.from_numpy(index(k)).to(device, non_blocking=True)).permute(0, 3, 1, 2)
                 for k in itertools.count(start))
    else:
        drawn = read_ahead(lambda k: torch.from_numpy(images[index(k)]).pin_memory(), start, device)
    for k, pixels in zip(itertools.count(start), drawn):
        yield to_float(mirrored(k, pixels).contiguous(memory_format=torch.channels_last))


def lend(most=4):
    """-> function (*shape) -> float32 tensor, its values unset, in memory that an earlier one has left.

    Fresh memory costs five times what filling it does: the system clears every page. Of the tensors that nobody holds
    any more, no view of them either, the memory of `most` is kept.
    """
    left = []

    def keep(memory):
        if len(left) < most:
            left.append(memory)

    def tensor(*shape):
        memory = left.pop() if left and left[-1].shape == shape else np.empty(shape, np.float32)
        lent = memory.view()                                 # torch holds it for as long as it needs it
        weakref.finalize(lent, keep, memory).atexit = False
        return torch.from_numpy(lent)
    return tensor


def read_ahead(read, start, device, depth=4):
    """read(start), read(start + 1), ... on `device`, `depth` of them read by a thread before they are asked for."""
    ready = queue.Queue(depth)

    def work():
        try:
            for k in itertools.count(start):
                ready.put(read(k))
        except Exception as error:                           # goes to the loop, which would wait for ever
            ready.put(error)

    threading.Thread(target=work, daemon=True).start()
    while True:
        x = ready.get()
        if isinstance(x, Exception):
            raise x
        yield x.to(device, non_blocking=True)


def thumbnails(images):
    """Much the same of uint8 (N, H, W, C), all at a time, from the green channel alone: uint8 (N, 16, 17)."""
    def shares(bins, side):                                  # (bins, side): how much of each bin a pixel makes up
        edges, pixel = np.arange(bins + 1)[:, None] * side / bins, np.arange(side)
        inside = np.minimum(edges[1:], pixel + 1) - np.maximum(edges[:-1], pixel)
        return (inside.clip(0) * bins / side).astype(np.float32)

    green = images[..., images.shape[3] // 2].astype(np.float32)
    return (shares(16, green.shape[1]) @ green @ shares(17, green.shape[2]).T + 0.5).astype(np.uint8)
