"""Where images come from: a folder, an idx file, an array or the built-in demo -> a list of items, not decoded yet."""

import functools
import gzip
import math
import os
import re
import threading
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from decode import scale_to_uint8
from runtime import UserError

SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm", ".pnm",
            ".dcm", ".dicom"}


class Item(NamedTuple):
    """One image of a source, not read yet."""
    name: str
    stamp: tuple                                             # (size, times) of its file: another stamp, another image
    read: object                                             # () -> the file's bytes, or a uint8 array


def find_items(source, classes="", value_range=None, flag="--data"):
    """A source -> list of `Item`.

    source: "demo", an image, a folder of images (or of idx files), an idx, idx.gz, .npy or .npz file.
    Classes are a folder's first sub-folders, the labels' file beside an idx file, or the array "labels" or "y" of a
    .npz; classes: the ones to keep, as in "3,7". value_range: see `read_array`. flag: its name in errors.
    """
    items = _all_items(source, value_range, flag)
    if not classes:
        return items
    wanted = [word.strip() for word in classes.split(",")]
    there = sorted({item.name.split("/")[0] for item in items if "/" in item.name})
    for word in wanted:
        if word not in there:
            known = "the classes " + " ".join(there[:20]) + " ..." * (len(there) > 20)
            raise UserError(f"--classes {word}: {source} has {known if there else 'no sub-folders and no labels'}")
    return [item for item in items if item.name.split("/")[0] in wanted]


def _all_items(source, value_range, flag):
    if str(source) == "demo":
        return [Item(f"demo-{k:04d}", (), functools.partial(demo_image, k)) for k in range(2000)]
    path = Path(source)
    if not str(source).strip() or not path.exists():
        raise UserError(f"{flag} {source or '(empty)'}: there is no such folder or file (looked in {Path.cwd()})")
    files = [path]
    if path.is_dir():
        found = [Item(name, file_stamp(path / name), (path / name).read_bytes) for name in find_images(path)]
        if found:
            return found
        files = sorted(file for file in path.iterdir() if re.search("idx[34]", file.name) and file.is_file())
        files = [file for file in files if file.suffix != ".gz" or file.with_suffix("") not in files]
        if not files:
            raise UserError(f"{flag} {source}: no images in this folder or below it ({' '.join(sorted(SUFFIXES))})")
    elif path.suffix.lower() in SUFFIXES:
        return [Item(path.name, file_stamp(path), path.read_bytes)]
    items = []
    for file in files:
        images, low, high, labels = (read_array(file, value_range) if file.suffix in (".npy", ".npz")
                                     else (read_idx(file), 0, 255, idx_labels(file)))
        if labels is not None and len(labels) != len(images):
            raise UserError(f"{file} holds {len(images)} images, and there are {len(labels)} labels for them")
        stamp = file_stamp(file)
        items += [Item(("" if labels is None else f"{labels[k]}/") + f"{file.name}-{k:05d}", stamp,
                       functools.partial(image_of_array, images, low, high, k)) for k in range(len(images))]
    if not items:
        raise UserError(f"{flag} {source} holds no images: an array of none")
    return items


def find_images(folder):
    """Names, relative to `folder`, of every file below it whose suffix, in any case, is an image's; sorted.

    Linked folders are followed, each once. Hidden files and folders are passed over (".ipynb_checkpoints", "._x.jpg").
    """
    folder = os.path.join(folder, "")
    found, seen = [], {os.path.realpath(folder)}
    for root, folders, files in os.walk(folder, followlinks=True):
        inside = {os.path.realpath(os.path.join(root, name)): name for name in sorted(folders, reverse=True)
                  if not name.startswith(".")}               # of two links to a folder the first by name is followed
        folders[:] = sorted(name for path, name in inside.items() if path not in seen)
        seen |= inside.keys()
        found += [os.path.join(root, name)[len(folder):].replace(os.sep, "/") for name in files
                  if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES]
    return sorted(found)


def file_stamp(path):
    """(size, times of the last change of content and of anything) of a file; zeros for a link that leads nowhere."""
    try:
        about = os.stat(path)
        return about.st_size, about.st_mtime_ns, about.st_ctime_ns
    except OSError:
        return 0, 0, 0


def read_idx(path, labels=False):
    """An idx or idx.gz file (MNIST's format) of images -> uint8 (N, H, W), or (N, H, W, 3); of labels -> uint8 (N,).

    Bytes 0 0, type 8 (unsigned byte), the number of dimensions, each dimension as a big-endian int32, the values.
    """
    raw = Path(path).read_bytes()
    try:
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is a damaged gzip file: {error}") from error
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise UserError(f"{path}: expected a folder of images, an idx file of bytes, a .npy or .npz array, or 'demo'")
    shape = [int.from_bytes(raw[4 + 4 * k:8 + 4 * k], "big") for k in range(raw[3])]
    if (len(shape) != 1) if labels else (len(shape) not in (3, 4) or shape[3:] not in ([], [3])):
        raise UserError(f"{path} holds an array of {shape}: expected (N,) of labels or, in the file with 'images' in "
                        "its name, (N, H, W) or (N, H, W, 3)")
    if len(raw) - 4 - 4 * len(shape) != math.prod(shape):
        raise UserError(f"{path} is cut short: {len(raw)} bytes for an array of {shape}")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def idx_labels(path):
    """The labels that lie beside an idx file of images under MNIST's naming, or None."""
    name = path.name.removesuffix(".gz")
    labels = re.sub("idx[34]", "idx1", name.replace("images", "labels"))
    beside = [path.with_name(labels + suffix) for suffix in ("", ".gz") if labels != name]
    return next((read_idx(file, labels=True) for file in beside if file.exists()), None)


def read_array(path, value_range=None):
    """A .npy or .npz file -> array (N, H, W) or (N, H, W, C), the values that become 0 and 255, and labels or None.

    The file's array may be (N, C, H, W) too; C is 1, 3 or 4. What is not uint8 is scaled over value_range = (low,
    high), else over the whole array's range. A .npy stays on the disk until an image is asked for.
    """
    try:
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)                     # a .npz takes no notice of it
        arrays = {"": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
    except Exception as error:                               # a damaged file makes numpy raise almost anything
        raise UserError(f"{path} is damaged, or no array of numbers ({type(error).__name__})") from error
    found = [name for name, array in arrays.items() if array.ndim in (3, 4) and array.dtype.kind in "buif"]
    if len(found) != 1:
        kinds = ", ".join(f"{name or 'it'} has shape {array.shape}" for name, array in arrays.items())
        raise UserError(f"{path}: expected one array of images, (N, H, W), (N, H, W, C) or (N, C, H, W), got: {kinds}")
    array = arrays.pop(found[0])
    if array.ndim == 4 and array.shape[3] not in (1, 3, 4):
        if array.shape[1] not in (1, 3, 4):
            raise UserError(f"{path} has shape {array.shape}: one of its axes must be the channels, 1, 3 or 4 of them")
        array = np.moveaxis(array, 1, 3)
    low, high = 0.0, 255.0
    if array.dtype != np.uint8 and array.size:
        low, high = value_range or (float(array.min()), float(array.max()))
        if not math.isfinite(low) or not math.isfinite(high):
            raise UserError(f"{path} holds values that are not finite")
    labels = next((arrays[name] for name in ("labels", "y") if name in arrays and arrays[name].ndim == 1), None)
    return array, low, high, labels


def image_of_array(array, low, high, k):
    """Image k of what `read_array` returns: uint8 (H, W) or (H, W, C)."""
    image = array[k, ..., 0] if array.shape[3:] == (1,) else array[k]
    return np.ascontiguousarray(image if image.dtype == np.uint8 else scale_to_uint8(image.astype(float), low, high))


def draw_demo(n=2000, side=64, seed=0):
    """n small grey images in the manner of a panoramic dental radiograph -> uint8 (n, side, side).

    Two rows of six teeth along a smile curve, each with a bright crown, a tapering root and a dark pulp, in a jaw with
    grain. What varies is known: curve, height, tilt, width and length of each tooth, missing teeth (8 %), fillings
    (10 %), exposure. The numbers come from numpy's frozen RandomState: every machine draws the same images.
    """
    random = np.random.RandomState(seed)
    y, x = np.mgrid[0:side, 0:side] / (side - 1.0)
    images = np.empty((n, side, side), np.uint8)

    def inside(distance, softness=0.012):                    # 1 well inside (distance > 0), 0 well outside
        return np.clip(0.5 + distance / (2 * softness), 0, 1)

    for k in range(n):
        smile, middle, tilt, exposure = random.uniform([0.1, 0.46, -0.06, 0.85], [0.3, 0.54, 0.06, 1.1])
        bite = middle + smile * ((x - 0.5) ** 2 - 0.08) * -1 + tilt * (x - 0.5)      # where the two rows meet
        v = np.abs(y - bite)                                 # distance from the bite: crowns first, then roots
        bone = 0.34 - 0.22 * np.clip((v - 0.3) / 0.25, 0, 1)
        image = bone * (0.8 + 0.2 * np.clip(1 - 2 * np.abs(x - 0.5), 0, 1)) * inside(v - 0.03, 0.02)
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
                image = image + tooth * (light - image)
        images[k] = (np.clip(exposure * image + random.normal(0, 0.02, image.shape), 0, 1) * 255).round()
    return images


_drawn, _lock = functools.cache(draw_demo), threading.Lock()


def demo_image(k):
    with _lock:                                              # else each thread that reads would draw all of them
        return _drawn()[k]
