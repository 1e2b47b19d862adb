"""pix2pix's data: pairs on disk, pairs made of single pictures, the checks before training."""

import contextlib
import functools
import os
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import data
import decode
import inpainting
import plots
import prepare
import runtime
import sources


class Joined:
    """Two arrays of as many rows each, (N, C, H, W), side by side in their channels; rows are copied when asked for."""

    def __init__(self, first, second):
        self.parts = first, second
        self.shape = (len(first), first.shape[1] + second.shape[1], *first.shape[2:])

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, index):
        return np.concatenate([part[index] for part in self.parts], axis=-3)

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self[np.arange(len(self))], dtype)


def read_upright(path, background="white", value_range=None, half=None):
    """A file's pixels, upright: uint8 (H, W) or (H, W, 3). half: 0 the left half of its width, 1 the right one."""
    pixels = np.asarray(decode.upright(decode.open_image(sources.read_bytes(path)), background, value_range))
    width = pixels.shape[1] // 2
    return np.ascontiguousarray(pixels if half is None else pixels[:, :width] if half == 0 else pixels[:, -width:])


def find_pairs(source, background="white", value_range=None):
    """A folder of pairs -> two lists of `Item`, A and B, in the same order.

    source: holds the folders A and B with pictures of the same names (suffixes may differ), or files that are pairs
    side by side, A on the left. Raises FileNotFoundError or ValueError with the sentence for the user: no such
    folder, names without a partner, the unpaired layout trainA / trainB, single pictures in place of pairs.
    """
    path = Path(source)
    if not path.is_dir():
        raise FileNotFoundError(f"--data {source}: --task pairs needs a folder (looked in {Path.cwd()})")
    folders = {child.name for child in path.iterdir() if child.is_dir()}
    if {"trainA", "trainB"} <= folders:
        raise ValueError(f"--data {source}: trainA and trainB are for methods that need no pairs, as CycleGAN; pix2pix "
                         "learns from pairs: put them into folders A and B, the two pictures of a pair by one name")
    read = functools.partial(read_upright, background=background, value_range=value_range)
    if {"A", "B"} <= folders:
        sides = [{os.path.splitext(name)[0]: path / side / name for name in sources.find_images(path / side)}
                 for side in "AB"]
        for side, files in zip("AB", sides):
            for name in sources.find_images(path / side):
                if files[os.path.splitext(name)[0]] != path / side / name:
                    raise ValueError(f"--data {source}: {side} holds {name} and another picture of that name: the two "
                                     "of a pair have one name, so each may stand there once")
        lonely = sorted(set(sides[0]) ^ set(sides[1]))
        if lonely:
            raise ValueError(f"--data {source}: {len(lonely)} pictures stand in A or in B only, {lonely[0]} for one; "
                             "the two of a pair have one name")
        if not sides[0]:
            raise ValueError(f"--data {source}: no pictures in A and B")
        return [[sources.Item(stem, (*sources.file_stamp(file), side), functools.partial(read, file))
                 for stem, file in sorted(files.items())] for side, files in zip("AB", sides)]
    names = sources.find_images(path)
    if not names:
        raise ValueError(f"--data {source}: no pictures in this folder or below it")
    why = single_pictures([path / name for name in names])
    if why:
        raise ValueError(f"--data {source} holds single pictures, not pairs side by side: {why}. Pairs are made of "
                         f"single pictures with another --task; to fill holes, give the whole pictures, not masked "
                         f"ones: python train_pix2pix.py --data {source} --task complete")
    return [[sources.Item(name, (*sources.file_stamp(path / name), half), functools.partial(read, path / name, half=half))
             for name in names] for half in (0, 1)]


def single_pictures(paths, most=64):
    """Why most of these files are single pictures, not pairs side by side; "" when they may be pairs.

    Either they are hardly wider than high; or the left half goes on into the right one without an edge (the step from
    the one to the other is no larger than those beside it) and the two do not show the same thing (their gradients
    correlate by less than a half).
    """
    shapes, seams, likeness = [], [], []
    for path in plots.evenly_spaced(paths, most):
        with contextlib.suppress(Exception):                 # what cannot be read is named when all are read
            x = np.asarray(decode.upright(decode.open_image(sources.read_bytes(path))).convert("L"), np.float64)
            height, width = x.shape
            shapes.append((height, width))
            step = np.abs(np.diff(x, axis=1)).mean(0)        # from each column to the next
            beside = (step[width // 2 - 2] + step[width // 2]) / 2
            if beside > 0.5:                                 # else the edge of the picture is plain, and says nothing
                seams.append(step[width // 2 - 1] / beside)
            halves = (Image.fromarray(half.astype(np.uint8)) for half in (x[:, :width // 2], x[:, -(width // 2):]))
            one, other = (prepare.detail(half, 16).ravel() for half in halves)
            if one.any() and other.any():                    # a blank half is like nothing
                likeness.append(np.corrcoef(one, other)[0, 1])
    narrow = [(height, width) for height, width in shapes if width < 1.25 * height]
    if 2 * len(narrow) > len(shapes):
        height, width = narrow[0]
        return f"of {height}x{width} pixels, for one, each half would have {height}x{width // 2}"
    if 2 * len(seams) >= len(shapes) > 0 and np.median(seams) < 1.6 and likeness and np.median(likeness) < 0.5:
        return "the left half goes on into the right half without an edge"
    return ""


def load_pairs(args, part="all", at_least=1):
    """`load_flags` for pairs: (Pictures, channels of the input). The input's channels come first in its images.

    args.direction: AtoB or BtoA. What is held out is decided by the target.
    """
    recipe = data.recipe_of(args)
    data.check_counts(args.limit, args.holdout)
    if args.crop == "auto-each":
        raise ValueError("--crop auto-each would cut the two pictures of a pair differently: take auto")
    a, b = find_pairs(args.data, args.background, data.parse_range(args.range) if args.range else None)
    inputs, targets = (items[:args.limit or None] for items in ((a, b) if args.direction == "AtoB" else (b, a)))
    recipe, notes = data.resolve_crop(recipe, targets)
    (x, in_x), (y, in_y) = (data.load_cached(args.data, items, recipe) for items in (inputs, targets))
    rows_x, rows_y = (dict(zip(found["names"], found["rows"])) for found in (in_x, in_y))
    digests_x, digests_y = (dict(zip(found["names"], found["digests"])) for found in (in_x, in_y))
    alike = data.near_copies(y, in_y) if rows_y and args.holdout else ()
    aside = data.heldout_mask(in_y["digests"], in_y["names"], args.holdout, args.group, alike) if rows_y else []
    names = [name for name, away in zip(in_y["names"], aside)
             if name in rows_x and (part == "all" or bool(away) == (part == "heldout"))]
    left_out = [entry for found in (in_x, in_y) for entry in found["skipped"]]
    if len(names) < at_least:
        why = f"; {left_out[0][0]}: {left_out[0][1]}" if left_out else ""
        raise ValueError(f"--data {args.data}: {len(names)} of {len(targets)} pairs can be used and at least "
                         f"{at_least} are needed ({len(left_out)} files cannot be read, others are held out by "
                         f"--holdout {args.holdout:g}){why}")
    images = Joined(data.ImageSubset(x, [rows_x[name] for name in names]), data.ImageSubset(y, [rows_y[name] for name in names]))
    digests = np.array([[digests_x[name], digests_y[name]] for name in names], np.uint64)
    held = len(set(rows_x) & set(rows_y)) - len(names)
    fingerprint = [*images.shape, zlib.crc32(digests.tobytes())]
    return data.Dataset(images, names, held, left_out, notes, fingerprint), x.shape[3]


def to_grey(x):
    """Float (N, 3, H, W) -> (N, 1, H, W) by the weights of ITU-R 601, as Pillow's convert("L")."""
    return (x * torch.tensor([0.299, 0.587, 0.114], device=x.device).view(1, 3, 1, 1)).sum(1, keepdim=True)


def degrade(x, factor=4, noise=None):
    """Float (N, C, H, W) in [-1, 1] made small (bicubic, antialiased), noise (N, C, H / factor, W / factor) added, and
    enlarged again (bicubic): what a small and grainy picture holds, at the size of the large one."""
    small = torch.nn.functional.interpolate(x, small_size(x.shape[2:], factor), mode="bicubic", antialias=True)
    small = (small if noise is None else small + noise).clamp(-1, 1)
    return torch.nn.functional.interpolate(small, x.shape[2:], mode="bicubic", antialias=True).clamp(-1, 1)


def small_size(size, factor):
    """(height, width) divided by factor, at least 1."""
    return tuple(max(1, round(side / factor)) for side in size)


def line_drawing(x):
    """Float (N, C, H, W) in [-1, 1] -> (N, 1, H, W): dark lines on white where the picture has edges.

    Length g of the Sobel gradient of the grey picture, smoothed by (1 2 1)/4 both ways: 1 - 2 min(1, g / (4 mean g)).
    """
    x = to_grey(x) if x.shape[1] == 3 else x
    x = torch.nn.functional.pad(x, (2, 2, 2, 2), mode="replicate")
    smooth, slope = torch.tensor([1.0, 2.0, 1.0], device=x.device) / 4, torch.tensor([-1.0, 0.0, 1.0], device=x.device)
    blur = torch.nn.functional.conv2d(x, (smooth[:, None] * smooth)[None, None])
    dy, dx = (torch.nn.functional.conv2d(blur, kernel[None, None])
              for kernel in (slope[:, None] * smooth, smooth[:, None] * slope))
    g = (dx.square() + dy.square()).sqrt()
    return 1 - 2 * (g / (4 * g.mean((1, 2, 3), keepdim=True)).clamp(min=1e-6)).clamp(max=1)


class Pairs:
    """Makes (x, y, m) of a batch of pictures y, or of joined pairs: what G sees, what it shall give, and the mask.

    m is None but for complete, where it is 1 in the known pixels and 0 in the hole. What is random is a function of
    (seed, step) alone, so that a resumed run draws the same; under torchrun each process draws its own. channels: of
    the pictures, or of x and y joined; channels_x: of x, for pairs.
    """

    def __init__(self, args, size, channels, channels_x):
        self.args, self.pool = args, None
        if args.task == "complete":                          # drawn once: strokes take longer than a step of a GPU
            kinds = args.mask.split(",")
            drawn = [inpainting.masks(kind, 256, size, (args.seed + k) % 2**32) for k, kind in enumerate(kinds)]
            self.pool = torch.cat(drawn).to(torch.uint8)
            for kind, masks in zip(kinds, drawn):
                if not 0 < masks.mean() < 1:
                    raise ValueError(f"--mask {kind}: has no hole, or nothing but a hole; black is the hole")
        if args.task == "colorize" and channels == 1:
            raise ValueError(f"--task colorize: the pictures of {args.data} are grey, so there is no colour to learn")
        self.channels_x = {"complete": channels + 1, "enhance": channels, "pairs": channels_x}.get(args.task, 1)
        self.channels_y = channels - channels_x if args.task == "pairs" else channels

    def __call__(self, y, step):
        task, m = self.args.task, None
        random = torch.Generator().manual_seed(runtime.derive_seed(self.args.seed, runtime.rank_and_world_size()[0], step))
        if task == "complete":
            k = torch.randint(len(self.pool), (len(y),), generator=random)
            m = self.pool[k].to(y.device, y.dtype)
            x = inpainting.completion_input(y, m)
        elif task == "colorize":
            x = to_grey(y)
        elif task == "edges":
            x = line_drawing(y)
        elif task == "enhance":
            noise = torch.randn(*y.shape[:2], *small_size(y.shape[2:], self.args.factor), generator=random)
            x = degrade(y, self.args.factor, self.args.noise * noise.to(y.device))
        else:
            x, y = y.split((self.channels_x, self.channels_y), 1)
        x, y = (t.contiguous(memory_format=torch.channels_last) for t in (x, y))
        return x, y, m


def trivial(x, y, m):
    """What next to no method gives: holes filled with the mean of what is known; else x itself, in y's channels."""
    if m is not None:
        mean = (y * m).sum((2, 3), keepdim=True) / m.sum((2, 3), keepdim=True).clamp(min=1)
        return inpainting.composite(y, mean.expand_as(y), m)
    return x if x.shape[1] == y.shape[1] else x.mean(1, keepdim=True).expand_as(y)


def preflight(x, y, m, source):
    """Refuse pairs from which nothing can be learned. Raises ValueError with one sentence."""
    for name, t in (("input", x), ("target", y)):
        blank = t.amax((1, 2, 3)) - t.amin((1, 2, 3)) < 3 / 127.5
        if blank.float().mean() > 0.5:
            low, high = (plots.to_uint8(edge(t)).item() for edge in (torch.amin, torch.amax))
            raise ValueError(f"--data {source}: in {int(blank.sum())} of {len(blank)} pairs the {name} is one flat "
                             f"colour (its levels are {low} to {high} of 0 to 255): label maps saved as 0, 1, 2, ... "
                             "have to be spread over 0 to 255 first")
    height, width = y.shape[2:]
    middle = y[..., height // 4:height - height // 4, width // 4:width - width // 4]
    alike = (middle.amax(0) - middle.amin(0)).amax(0) < 8 / 127.5
    if m is not None and len(y) >= 8 and alike.float().mean() > 0.1:
        raise ValueError(f"--data {source}: {100 * alike.float().mean():.0f} % of the middle is the same in all "
                         "pictures, as if a hole were cut into them already: give the whole pictures; --task complete "
                         "cuts the holes itself, as --mask says, and learns from what was there")
    if m is None and x.shape == y.shape:
        same = (x - y).abs().amax((1, 2, 3)) < 1 / 127.5
        if same.float().mean() > 0.5:
            raise ValueError(f"--data {source}: in {int(same.sum())} of {len(same)} pairs input and target are the "
                             "same picture, so there is nothing to learn; was the change made to both?")
