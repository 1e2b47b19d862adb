"""Images: a folder, an idx file, an array or the built-in demo -> one uint8 array -> batches of floats.

    dataset = load("teeth", size=(256, 256))       # decoded once; dataset.images is uint8 (N, C, H, W)
    for real in batches(dataset.images, 64): ...   # float (64, C, H, W) in [-1, 1], without end

On disk and in the array images are uint8; inside the program they are float in [-1, 1]. Whatever is wrong with a
source is a `UserError` or an `OSError` of one sentence.
"""

import collections
import contextlib
import errno
import functools
import hashlib
import itertools
import json
import math
import os
import re
import time
import warnings
import zlib
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image
import torch

from cli import number
from decode import Preprocess, describe_decode_error, has_colour, parse_size
from runtime import UserError, batched_slices, check_removed
from sources import find_items

CACHE = "runs/.cache"                                        # decoded images; may be deleted at any time


class Dataset(NamedTuple):
    """What `load` returns."""
    images: "ImageSubset"                                    # uint8 (N, C, H, W), rows of a memory-mapped file
    names: list                                              # N names, unique within the source
    n_heldout: int                                           # how many are on the other side of the split
    skipped: list                                            # (name, reason) of every file that is not in the array
    notes: list                                              # sentences that a user should read
    fingerprint: list                                        # [N, C, H, W, crc32]: the same for the same images


class ImageSubset:
    """Chosen rows of an array (N, H, W, C), seen as (N, C, H, W); a row is copied when it is asked for.

    The channels of a pixel lie side by side in memory, as torch's channels_last wants them.
    """

    def __init__(self, array, rows):
        self.rows = np.asarray(rows, np.int64)
        if isinstance(array, ImageSubset):                   # rows of rows
            array, self.rows = array.array, array.rows[self.rows]
        self.array = np.asarray(array)                       # numpy is twice as slow with its class of mapped ones
        self.shape = (len(self.rows), array.shape[3], *array.shape[1:3])
        self.dtype = self.array.dtype

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return np.moveaxis(self.array[self.rows[index]], -1, -3)

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self[:], dtype)


def add_arguments(parser):
    """The flags that say which images, and what they are made into: those of `load`."""
    add = parser.add_argument_group("images").add_argument
    add("--data", default="demo", help="folder of images, idx or idx.gz file, .npy or .npz array, or demo: small drawn "
        "radiographs (default: %(default)s)")
    add("--classes", default="", metavar="A,B", help="only these sub-folders or labels, as in 3,7 (default: all)")
    add("--size", default="64", help="resize images to SIZE, 64 or HEIGHTxWIDTH as in 288x512 (default: %(default)s)")
    add("--fit", default="crop", choices=("crop", "squash", "pad"), help="how an image of another shape becomes "
        "--size: centre crop, squash, or pad with black (default: %(default)s)")
    add("--crop", default="", help="first cut out LEFT,TOP,RIGHT,BOTTOM as fractions, or HEIGHTxWIDTH@ANCHOR in "
        "pixels, as in 1024x1024@bottom (default: the whole image)")
    add("--channels", default="auto", choices=("auto", "1", "3"), help="1 grey, 3 colour; auto: grey if no image has "
        "colour (default: %(default)s)")
    add("--limit", type=number(int, 0), metavar="N", help="only the first N files, for a dry run (default: all)")
    add("--holdout", type=number(float, 0, 1), default=0.1, help="share of the images kept out of training, "
        "for the metrics (default: %(default)s)")
    add("--group", default="", metavar="REGEX", help="images whose names agree in the first group of REGEX stay on one "
        "side of the split: one patient, one video (default: each image by itself)")


def load_from_args(args, part="all", at_least=1):
    """`load` with the flags of `add_arguments`. UserError for a run that was begun with a flag that is gone."""
    check_removed(vars(args))
    return load(args.data, parse_size(args.size), args.fit, args.crop, args.channels, args.limit, args.holdout, part,
                at_least, args.group, getattr(args, "classes", ""))


def load_of_run(saved, where=""):
    """The training and the held-out images of a run, two `Dataset`s, from its checkpoint; where: they are there now.

    UserError when they are not those the run was trained on: held-out images might have been trained on.
    """
    flags = Namespace(**{**saved["flags"], "data": where or saved["flags"]["data"]})
    train, heldout = load_from_args(flags, "train"), load_from_args(flags, "heldout", 0)
    if train.fingerprint != saved["same"]["images"]:
        raise UserError(f"--data {flags.data}: not the images the run was trained on ({train.fingerprint} now, "
                        f"{saved['same']['images']} then): say where those are by --data")
    return train, heldout


class Decoded(NamedTuple):
    """What became of an `Item`."""
    digest: int = 0                                          # of its content
    pixels: np.ndarray = None                                # uint8 (H, W) or (H, W, 3); None when it is skipped
    why: str = ""                                            # the reason, when it is skipped
    window: tuple = (0, 0)                                   # (height, width) of what it shows of the file's pixels
    coloured: bool = False
    transient: bool = False                                  # what went wrong may be right the next time


def hash_bytes(raw, size=8):
    """A hash of bytes, as an integer of `size` bytes."""
    return int.from_bytes(hashlib.blake2b(raw, digest_size=size).digest(), "big")


def decode(preprocess, item):
    """An `Item` -> `Decoded`. Never raises."""
    digest = 0
    try:
        raw = item.read()
        digest = hash_bytes(raw)
        pixels, window = preprocess.pixels(raw)
        return Decoded(digest, pixels, "", window, preprocess.channels == "auto" and bool(has_colour(pixels)))
    except Exception as error:                               # a damaged file makes Pillow raise almost anything
        number = getattr(error, "errno", None)               # the system's; Pillow's own errors have none
        dead_link = number in (errno.ENOENT, errno.ELOOP)    # mended, it has another stamp
        return Decoded(digest, why=describe_decode_error(error),
                       transient=isinstance(error, (MemoryError, ImportError)) or number is not None and not dead_link)


def parallel_map(function, items, block=64):
    """function(item) for each of a list, in order; few results wait at any time. By a thread for each core: Pillow
    and numpy let several work at a time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with warnings.catch_warnings(), ThreadPoolExecutor(cores) as pool:
        warnings.simplefilter("ignore")                      # Pillow's, of damaged files
        for first in range(0, len(items), block):
            yield from pool.map(function, items[first:first + block])


# ---- The cache: a source -> one memory-mapped array

def load_cached(source, items, preprocess, folder=CACHE):
    """Everything that can be decoded as a memory-mapped uint8 array (n, H, W, C), and a dict of what is known of it:
    shape, names, digests and windows of its n rows, skipped [(name, reason)], coloured [names].

    Built once into folder/KEY-*.pixels and folder/KEY.json; the key is a hash of the preprocessing, the place and each
    item's name, size and times. The .json, which names the other file, is written last, by an atomic rename: an
    interrupted build leaves none, and two processes may build at once. Memory is bounded.
    """
    folder, stamps = Path(folder), [(item.name, item.stamp) for item in items]
    text = json.dumps([13, PIL.__version__, repr(preprocess), os.path.realpath(source), stamps])
    key = hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
    about, pixels = folder / f"{key}.json", folder / f"{key}-{os.getpid()}.pixels"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):                # none there, or a damaged one
        found = json.loads(about.read_text("utf-8"))
        return map_pixels(folder / found["file"], found["shape"]), found
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob(f"{key}-*"):                     # left by a build that was killed
        if time.time() - path.stat().st_mtime > 24 * 3600:
            path.unlink(missing_ok=True)
    try:
        found, transient = build(items, preprocess, pixels)
        array = map_pixels(pixels, found["shape"])
        if transient:                                        # the next start tries again
            with contextlib.suppress(OSError):               # Windows keeps what is mapped
                pixels.unlink()
        else:
            draft = pixels.with_suffix(".json")
            draft.write_text(json.dumps(found), "utf-8")
            os.replace(draft, about)
    except BaseException as error:
        pixels.unlink(missing_ok=True)
        if isinstance(error, OSError) and not error.filename:          # as of a full disk
            error.filename = str(folder)
        raise
    return array, found


def map_pixels(path, shape):
    """The array of `shape` in a file, memory-mapped. ValueError or OSError if it is not as large."""
    return np.memmap(path, np.uint8, "r", shape=tuple(shape)) if shape[0] else np.zeros(shape, np.uint8)


def build(items, preprocess, path):
    """Decode all items into the file `path`: (what `load_cached` returns beside the array, whether to try again).

    Whether a set is grey is known at the end: then it is written once more.
    """
    channels = 1 if preprocess.channels == "1" else 3
    found = dict(file=path.name, names=[], digests=[], windows=[], skipped=[], coloured=[])
    transient, results = False, parallel_map(functools.partial(decode, preprocess), items)
    with open(path, "wb") as file:
        for rows, one in zip(batched_slices(len(items), 1, "reading images"), results):
            item, transient = items[rows.start], transient or one.transient
            if one.why:
                found["skipped"].append((item.name, one.why))
                continue
            file.write(np.broadcast_to(np.atleast_3d(one.pixels), (*preprocess.size, channels)).tobytes())
            found["names"].append(item.name)
            found["digests"].append(one.digest)
            found["coloured"] += [item.name] * one.coloured
            found["windows"].append(one.window)
        os.fsync(file.fileno())
    shape = (len(found["names"]), *preprocess.size, channels)
    if preprocess.channels == "auto" and found["names"] and not found["coloured"]:
        array, thin = np.memmap(path, np.uint8, "r", shape=shape), path.with_suffix(".thin")
        with open(thin, "wb") as file:
            file.writelines(PIL.Image.fromarray(pixels).convert("L").tobytes() for pixels in array)
        del array                                            # Windows replaces no file that is mapped
        os.replace(thin, path)
        shape = (*shape[:3], 1)
    return {**found, "shape": shape}, transient


# ---- The split, and all of it together

def heldout_mask(digests, names, share, group=""):
    """Which images belong to the held-out `share`: a boolean array. A hash of the content decides, never the name.

    Exact copies have one digest and so land on one side. group: a regular expression; images whose names it matches
    with equal first groups (or equal matches, if it has none) stay together, and a hash of that group decides. Adding
    files moves no image that was there.
    """
    keys = [int(digest) for digest in digests]
    if group:
        try:
            matches = [re.search(group, name) for name in names]
        except re.error as error:
            raise UserError(f"--group {group}: no regular expression ({error})") from None
        if names and not any(matches):
            raise UserError(f"--group {group}: matches no name, {names[0]} for one")
        for k, match in enumerate(matches):
            word = match and match[min(1, match.re.groups)]
            if word:
                keys[k] = hash_bytes(word.encode("utf-8", "surrogateescape"))
    return np.array([hash_bytes(key.to_bytes(8, "big"), 4) < share * 2**32 for key in keys], bool)


def load(source, size, fit="crop", crop="", channels="auto", limit=0, holdout=0.0, part="all", at_least=1, group="",
         classes="", cache=CACHE):
    """One uint8 array (N, C, H, W) from a folder (recursive), an idx or idx.gz file, a .npy or .npz array, or "demo".

    size: (height, width). fit, crop: see `crop_and_resize`, `parse_crop`. channels: 1, 3 or "auto" (1 when no image of
    the source has colour). limit: only the first so many files. holdout, group: see `heldout_mask`; part: "train",
    "heldout" or "all". at_least: fewer images than that are an error. classes: see `sources.find_items`. cache: the
    folder of `load_cached`.
    Returns a `Dataset`. Files that cannot be read and exact copies of earlier ones are skipped and named, never fatal;
    UserError when too few remain.
    """
    preprocess = Preprocess(tuple(size), fit, crop, str(channels))
    items = find_items(source, classes)[:limit or None]
    array, found = load_cached(source, items, preprocess, cache)
    names, digests, skipped = found["names"], found["digests"], found["skipped"]
    first = dict(zip(reversed(digests), reversed(names)))                             # digest -> the first to have it
    copies = np.array([first[digest] != name for name, digest in zip(names, digests)], bool)
    aside = heldout_mask(digests, names, holdout, group)
    skipped = skipped + [(names[k], f"an exact copy of {first[digests[k]]}") for k in np.flatnonzero(copies)]
    chosen = np.flatnonzero(~copies & (aside if part == "heldout" else ~aside if part == "train" else True))
    n_heldout = len(names) - len(chosen) - int(copies.sum())
    if len(chosen) < at_least:
        raise UserError(f"--data {source}: {len(chosen)} of {len(items)} images can be used and at least {at_least} "
                        f"are needed ({len(skipped)} cannot be used, {n_heldout} are held out by --holdout {holdout:g})"
                        + (f"; {skipped[0][0]}: {skipped[0][1]}" if skipped else ""))
    notes, coloured = [], found["coloured"]
    if 0 < len(coloured) < 0.1 * len(names):
        notes.append(f"colour because of {len(coloured)} of {len(names)} images, {coloured[0]} for one; --channels 1 "
                     "makes all grey")
    windows = np.array(found["windows"]).reshape(-1, 2)
    scales = windows / size                                  # how much smaller an image becomes, along each side
    enlarged = int(((scales.max(1) if fit == "pad" else scales.min(1)) < 1).sum())
    if enlarged:
        notes.append(f"{enlarged} of {len(names)} are smaller than {size[0]}x{size[1]} and were enlarged")
    cut = np.flatnonzero(scales.min(1)**2 * math.prod(size) <= 0.8 * windows.prod(1)) if fit == "crop" else ()
    if len(cut) > 0.1 * len(names):
        usual, of_one = np.median(windows[cut], 0), "x".join(map(str, windows[cut[0]]))
        eighths = (8 * usual / usual.min()).round().astype(int)                       # and no side over 1024
        shape = "x".join(map(str, eighths * min(*size, 8192 // eighths.max()) // 8))
        notes.append(f"--fit crop cuts off a fifth or more of {len(cut)} of {len(names)} images, of {names[cut[0]]} "
                     f"({of_one}) for one; --size {shape}, --fit squash or --fit pad keeps all of it")
    images = ImageSubset(array, chosen)
    check = zlib.crc32(np.array(digests, np.uint64)[chosen].tobytes())
    return Dataset(images, [names[k] for k in chosen], n_heldout, skipped, notes, [*images.shape, check])


def describe(source, dataset, images_per_step=0):
    """What `load` found, as text to print: a line for the array, one for what was skipped, one a note."""
    n, c, h, w = dataset.images.shape
    lines = [f"data: {n} images from {source}, {h}x{w}, {'grey' if c == 1 else 'colour'}; {dataset.n_heldout} held "
             f"out, {len(dataset.skipped)} skipped"
             + (f"; 1 epoch = {n / images_per_step:.4g} steps" if images_per_step else "")]
    lines += [f"data: skipped: {summarize_skipped(dataset.skipped, 5)}"] * bool(dataset.skipped)
    few = ["so few are soon learnt by heart: see GUIDE.md, When it goes wrong"] * (n < 100 and images_per_step > 0)
    return "\n".join(lines + [f"data: {note}" for note in (*dataset.notes, *few)])


def summarize_skipped(entries, most):
    """The first of a list of (name, reason), and how many more there are, on one line."""
    shown = "; ".join(f"{name} ({why})" for name, why in entries[:most])
    return shown + (f"; and {len(entries) - most} more" if len(entries) > most else "")


# ---- Batches

def to_float(images):
    """uint8 {0..255} -> float32 in [-1, 1]: x / 127.5 - 1 (to 2e-7). The memory format stays."""
    return images.float().mul_(0.0078431367).sub_(1)         # 1 / 127.5 rounded down: white is not above 1


@functools.lru_cache(4)
def epoch_order(n, seed, epoch):
    """The order of n images in an epoch: a permutation, a function of (seed, epoch) alone."""
    return np.random.RandomState([seed, epoch]).permutation(n)


def batches(images, batch, seed=0, start=0, flip=False, device="cpu", share=(0, 1)):
    """uint8 (N, C, H, W) -> endless batches: float (batch, C, H, W) in [-1, 1], channels last.

    Every image is drawn once an epoch. Epochs follow one another without a gap, so that all batches are full, a batch
    may straddle two epochs, and `batch` may exceed N. Batch number k is a function of (images, batch, seed, k): `start`
    goes on where an interrupted run stopped. flip: mirror each image left to right with probability 1/2. share = (r,
    W): the r-th of W equal parts of a batch W times as large, for W processes that work side by side.

    On a GPU whose free memory is over eight times the array, the array lives there; otherwise a thread reads ahead into
    pinned memory, so that the GPU does not wait.
    """
    device, n = torch.device(device), len(images)
    cuda, resident = device.type == "cuda", None
    if cuda and math.prod(images.shape) * 8 < torch.cuda.mem_get_info(device)[0]:
        resident = torch.cat([torch.from_numpy(images[k:k + 1024]).to(device) for k in range(0, n, 1024)])

    def upload(array):
        x = torch.from_numpy(array)
        return x.pin_memory().to(device, non_blocking=True) if cuda else x.to(device)

    def read(k):
        draw = (k * share[1] + share[0]) * batch + np.arange(batch)
        index = np.concatenate([epoch_order(n, seed, int(e))[draw[draw // n == e] % n] for e in np.unique(draw // n)])
        coins = upload(np.random.RandomState([seed, k, 1 + share[0]]).rand(batch, 1, 1, 1) < 0.5) if flip else None
        return upload(images[index]) if resident is None else resident[upload(index)], coins

    for pixels, coins in read_ahead(read, start) if cuda and resident is None else map(read, itertools.count(start)):
        pixels = torch.where(coins, pixels.flip(3), pixels) if flip else pixels
        yield to_float(pixels.contiguous(memory_format=torch.channels_last))


def read_ahead(read, start, depth=4):
    """read(start), read(start + 1), ..., `depth` of them worked out by a thread before they are asked for."""
    with ThreadPoolExecutor(1) as pool:
        waiting = collections.deque(pool.submit(read, k) for k in range(start, start + depth))
        for k in itertools.count(start + depth):
            waiting.append(pool.submit(read, k))
            yield waiting.popleft().result()
