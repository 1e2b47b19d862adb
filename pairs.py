"""pix2pix's data: pairs on disk, pairs made of single images, and what is checked before training."""

import collections
import contextlib
import functools
import os
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import data
import decode
import inpainting
import runtime
import sources


class JoinedChannels:
    """Two arrays of images (N, C, H, W) as one with the channels of both; rows are copied only when asked for."""

    def __init__(self, first, second):
        self.parts, self.channels = (first, second), (first.shape[1], second.shape[1])
        self.shape = (len(first), sum(self.channels), *first.shape[2:])

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, index):
        return np.concatenate([part[index] for part in self.parts], axis=-3)


def read_upright(path, half=None):
    """A file's upright pixels, uint8 (H, W[, 3]). half: 0, the left half of its width; 1, the right; else all."""
    pixels = np.asarray(decode.upright(decode.open_image(Path(path).read_bytes())))
    width = pixels.shape[1] // 2
    return np.ascontiguousarray({0: pixels[:, :width], 1: pixels[:, -width:]}.get(half, pixels))


def find_pairs(source):
    """A folder of pairs -> two lists of `sources.Item`, A and B, in the same order.

    source holds the folders A and B with images of the same names (suffixes may differ), or files that are pairs side
    by side, A on the left. Raises runtime.UserError for a folder that holds neither.
    """
    path = Path(source)
    if not path.is_dir():
        raise runtime.UserError(f"--data {source}: --task pairs needs a folder (looked in {Path.cwd()})")
    if (path / "A").is_dir() and (path / "B").is_dir():
        sides = [sorted((os.path.splitext(name)[0], path / side / name, side)
                        for name in sources.find_images(path / side)) for side in "AB"]
        a, b = (collections.Counter(stem for stem, *_ in side) for side in sides)
        odd = sorted(stem for stem in {*a, *b} if (a[stem], b[stem]) != (1, 1))
        if odd or not a:
            raise runtime.UserError(f"--data {source}: expected images of the same names in A and B, each once; "
                                    f"{len(odd)} are not: {', '.join(odd[:3]) or 'both are empty'}")
    else:
        names = [item.name for item in sources.find_items(source)]
        why = why_not_pairs([path / name for name in names])
        if why:
            raise runtime.UserError(
                f"--data {source}: expected pairs side by side, or folders A and B with images of the same names, got "
                f"single images, not pairs ({why}). Rename or link two folders of pairs to A and B, or take another "
                "--task for single images; to fill holes give whole images, not masked ones: "
                f"python train_pix2pix.py --data {source} --task complete")
        sides = [[(name, path / name, half) for name in names] for half in (0, 1)]
    return [[sources.Item(name, (*sources.file_stamp(file), side), functools.partial(read_upright, file, side))
             for name, file, side in items] for items in sides]


def why_not_pairs(paths, most=64):
    """Why most of these files are single images and not pairs side by side; "" when they may be pairs.

    Either they are hardly wider than high; or the left half continues into the right one without an edge (the step
    across the middle is no larger than those beside it) and the halves' gradient energies correlate by under a half.
    """
    shapes, steps, correlations = [], [], []
    for path in paths[::-(-len(paths) // most)]:
        with contextlib.suppress(Exception):                 # unreadable files are named when the set is read
            x = np.asarray(Image.fromarray(read_upright(path)).convert("L"), np.float64)
            height, width = x.shape
            shapes.append((height, width))
            step = np.abs(np.diff(x, axis=1)).mean(0)        # from each column to the next
            beside = (step[width // 2 - 2] + step[width // 2]) / 2
            if beside > 0.5:                                 # a plain background says nothing
                steps.append(step[width // 2 - 1] / beside)
            left, right = (gradient_energy(half) for half in (x[:, :width // 2], x[:, -(width // 2):]))
            if left.any() and right.any():
                correlations.append(np.corrcoef(left, right)[0, 1])
    narrow = [f"each half would have {height}x{width // 2} pixels" for height, width in shapes if width < 1.25 * height]
    if 2 * len(narrow) > len(shapes):
        return narrow[0]
    if 2 * len(steps) >= len(shapes) > 0 and np.median(steps) < 1.6 and correlations and np.median(correlations) < 0.5:
        return "the left half goes on into the right half without an edge"
    return ""


def gradient_energy(x):
    """Grey pixels (H, W) -> their squared gradient at 64x64, averaged over 4x4: (256,)."""
    x = np.asarray(Image.fromarray(x.astype(np.uint8)).resize((64, 64), Image.Resampling.BOX), np.float64)
    energy = np.diff(x, axis=1, prepend=x[:, :1]) ** 2 + np.diff(x, axis=0, prepend=x[:1]) ** 2
    return energy.reshape(16, 4, 16, 4).mean((1, 3)).ravel()


def load_pairs(args, part="all", at_least=1):
    """`data.load_from_args` for pairs: a `data.Dataset` whose images are `JoinedChannels` of inputs and targets.

    The hash of the target decides which pairs are held out; pairs linked by a common input or target stay together.
    """
    preprocess = decode.Preprocess(decode.parse_size(args.size), args.fit, args.crop, args.channels)
    a, b = find_pairs(args.data)
    inputs, targets = (items[:args.limit or None] for items in ((a, b) if args.direction == "AtoB" else (b, a)))
    (x, in_x), (y, in_y) = (data.load_cached(args.data, items, preprocess) for items in (inputs, targets))
    row_x = {name: row for row, name in enumerate(in_x["names"])}
    rows = np.array([(row_x[name], row) for row, name in enumerate(in_y["names"]) if name in row_x], int).reshape(-1, 2)
    names = [in_y["names"][row] for _, row in rows]
    digests = np.array([(in_x["digests"][i], in_y["digests"][j]) for i, j in rows], np.uint64).reshape(-1, 2)
    keys, before = {}, None
    while keys != before:                                    # each takes the smallest target that it is joined to
        before = dict(keys)
        for i, j in digests.tolist():
            keys[~i] = keys[j] = min(keys.get(~i, j), keys.get(j, j))
    heldout = data.heldout_mask([keys[j] for _, j in digests.tolist()], names, args.holdout, args.group)
    chosen = np.flatnonzero({"train": ~heldout, "heldout": heldout}.get(part, heldout | True))
    skipped = [*in_x["skipped"], *in_y["skipped"]]
    if len(chosen) < at_least:
        raise runtime.UserError(f"--data {args.data}: {len(chosen)} of {len(targets)} pairs can be used and at least "
                                f"{at_least} are needed (others are held out by --holdout {args.holdout:g}, or cannot "
                                f"be read: {data.summarize_skipped(skipped, 5) or 'none'})")
    images = JoinedChannels(*(data.ImageSubset(array, rows[chosen, side]) for side, array in enumerate((x, y))))
    return data.Dataset(images, [names[k] for k in chosen], len(rows) - len(chosen), skipped, [],
                        [*images.shape, zlib.crc32(digests[chosen].tobytes())])


def to_grey(x):
    """Float (N, 3, H, W) -> (N, 1, H, W) by the weights of ITU-R 601, as Pillow's convert("L")."""
    return (x * torch.tensor([0.299, 0.587, 0.114], device=x.device).view(1, 3, 1, 1)).sum(1, keepdim=True)


def degrade(x, factor=4, noise=0.0, random=None):
    """x (N, C, H, W) in [-1, 1] downsampled by `factor`, noise of that standard deviation added, upsampled; bicubic."""
    size = [max(1, round(side / factor)) for side in x.shape[2:]]
    small = F.interpolate(x, size, mode="bicubic", antialias=True)
    small = small + noise * torch.randn(small.shape, generator=random).to(x.device)
    return F.interpolate(small.clamp(-1, 1), x.shape[2:], mode="bicubic", antialias=True).clamp(-1, 1)


def jitter(x, factor, random):
    """x (N, C, H, W) in [-1, 1] enlarged by `factor`, bicubic, and each image cropped to (H, W) at a random place."""
    h, w = x.shape[2:]
    large = F.interpolate(x, [round(factor * h), round(factor * w)], mode="bicubic").clamp(-1, 1)
    places = [torch.randint(a - b + 1, (len(x),), generator=random).tolist() for a, b in zip(large.shape[2:], (h, w))]
    return torch.stack([image[:, i:i + h, j:j + w] for image, i, j in zip(large, *places)])


def line_drawing(x):
    """x (N, C, H, W) in [-1, 1] -> (N, 1, H, W): dark lines on white at the edges of the image.

    1 - 2 min(1, g / (4 mean g)), g the norm of the Sobel gradient of the grey image, smoothed by (1 2 1)/4 both ways.
    """
    x = F.pad(to_grey(x) if x.shape[1] == 3 else x, (2, 2, 2, 2), mode="replicate")
    smooth, difference = torch.tensor([[0.25, 0.5, 0.25], [-1.0, 0.0, 1.0]], device=x.device)
    blur = F.conv2d(x, (smooth[:, None] * smooth)[None, None])
    dy, dx = (F.conv2d(blur, kernel[None, None])
              for kernel in (difference[:, None] * smooth, smooth[:, None] * difference))
    g = (dx.square() + dy.square()).sqrt()
    return 1 - 2 * (g / (4 * g.mean((1, 2, 3), keepdim=True)).clamp(min=1e-6)).clamp(max=1)


class PairMaker:
    """make_pairs(y, step) -> (x, y, m) of a batch of images y, or of joined pairs: input, target and mask.

    images: the training images, (N, C, H, W); for --task pairs `JoinedChannels`. m is None except for --task complete,
    where it is 1 in the known pixels and 0 in the hole. channels: of x and y. Step 0: no --jitter. Random numbers are a
    function of (seed, rank, step) alone: a resumed run draws the same. Raises runtime.UserError for a wrong task.
    """

    def __init__(self, args, images):
        self.args, self.pool, channels = args, None, images.shape[1]
        if args.task == "complete":                          # drawn once: strokes take longer than a step on a GPU
            self.pool = torch.cat([inpainting.masks(kind, 256, images.shape[2:], (args.seed + k) % 2**32)
                                   for k, kind in enumerate(args.mask.split(","))]).to(torch.uint8)
        if args.task == "colorize" and channels == 1:
            raise runtime.UserError(f"--task colorize: the images of {args.data} are grey, there is no colour to learn")
        self.channels = images.channels if args.task == "pairs" else (
            {"complete": channels + 1, "enhance": channels}.get(args.task, 1), channels)

    def __call__(self, y, step):
        args, m = self.args, None
        seed = runtime.derive_seed(args.seed, runtime.rank_and_world_size()[0], step)
        random = torch.Generator().manual_seed(seed)
        if step and args.jitter > 1:                         # before all else: x, y and m stay aligned
            y = jitter(y, args.jitter, random)
        if args.task == "complete":
            m = self.pool[torch.randint(len(self.pool), (len(y),), generator=random)].to(y.device, y.dtype)
            x = inpainting.completion_input(y, m)
        elif args.task == "colorize":
            x = to_grey(y)
        elif args.task == "edges":
            x = line_drawing(y)
        elif args.task == "enhance":
            x = degrade(y, args.factor, args.noise, random)
        else:
            x, y = y.split(self.channels, 1)
        return *(t.contiguous(memory_format=torch.channels_last) for t in (x, y)), m


def baseline(x, y, m):
    """The output without any learning: holes filled with the mean of what is known; else x, in y's channels."""
    if m is not None:
        return inpainting.mean_fill(y, m)
    return x if x.shape[1] == y.shape[1] else x.mean(1, keepdim=True).expand_as(y)


def check_pairs(x, y, m, source):
    """Raises runtime.UserError for pairs from which nothing can be learned."""
    for name, t in (("input", x), ("target", y)):
        low, high = ((edge((1, 2, 3)) + 1) * 127.5 for edge in (t.amin, t.amax))
        blank = (high - low < 3) | (high < 31.5)             # flat, or class numbers up to 20 and what resizing adds
        if blank.float().mean() > 0.5:
            raise runtime.UserError(f"--data {source}: in {int(blank.sum())} of {len(blank)} pairs the {name} is flat "
                                    f"or black, levels {low[blank].min():.0f} to {high[blank].max():.0f}: spread them "
                                    "over 0 to 255, the K class numbers of a label map by times 255 // (K - 1)")
    h, w = (side // 4 for side in y.shape[2:])
    same = ((y.amax(0) - y.amin(0)).amax(0)[h:-h, w:-w] < 8 / 127.5).float().mean()
    if m is not None and len(y) >= 8 and same > 0.1:
        runtime.print_rank0(f"data: {100 * same:.0f} % of the middle is the same in all images: if a hole has been cut "
                            f"into those of {source}, give the whole images, as --task complete cuts the holes")
    same = (x - y).abs().amax((1, 2, 3)) < 1 / 127.5 if m is None and x.shape == y.shape else torch.zeros(1)
    if same.float().mean() > 0.5:
        raise runtime.UserError(f"--data {source}: in {int(same.sum())} of {len(same)} pairs input and target are the "
                                "same image, so there is nothing to learn; was the change made to both?")
