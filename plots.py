"""Arrays to files: grids, animations, curves, scatter plots, captioned grids."""

import itertools
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

font = ImageFont.load_default
# The charts of losses.png that both kinds of GAN have: title and names of the numbers.
QUALITY_PANELS = [("diversity: mean distance of two images", ("diversity_fake", "diversity_real")),
                  ("FID of the averaged G, at --evaluate-n images", ("fid",)), ("KID of the same", ("kid",))]


def evenly_spaced(items, most):
    """At most `most` of a list, evenly spread over it, the first and the last among them."""
    return [items[k] for k in np.unique(np.linspace(0, len(items) - 1, min(most, len(items))).round().astype(int))]


def to_uint8(x):
    """float [-1, 1] -> uint8, rounded, clamped: the inverse of `to_float`; 0 becomes 128."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def grid(x, columns=8, pad=2):
    """A grid of float images (N, C, H, W) in [-1, 1] as one PIL image, row by row, `pad` grey pixels between.

    The range is fixed: a grid never rescales its images, so that too dark or too flat looks too dark or too flat.
    """
    pixels = to_uint8(x.detach()).cpu().permute(0, 2, 3, 1).numpy()                   # (N, H, W, C)
    n, h, w, c = pixels.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    canvas = np.full((rows * (h + pad) + pad, columns * (w + pad) + pad, c), 64, np.uint8)
    for k, image in enumerate(pixels):
        top, left = pad + k // columns * (h + pad), pad + k % columns * (w + pad)
        canvas[top:top + h, left:left + w] = image
    return Image.fromarray(canvas[..., 0] if c == 1 else canvas)


def save_grid(path, x, columns=8, pad=2):
    """`grid` to a file; a grid of at most 400 pixels is shown 2, 3 or 4 times as large, each pixel a square."""
    canvas = grid(x, columns, pad)
    k = max(1, min(4, 800 // max(canvas.size)))
    canvas.resize((canvas.width * k, canvas.height * k), Image.Resampling.NEAREST).save(path)


def saved_grids(folder):
    """The sample grids folder/step-0000100.png ... of a run, in order."""
    return sorted(path for path in Path(folder).glob("step-*.png") if path.stem[5:].isdigit())


def save_gif(path, folder, seconds=12.0, most=60, side=640):
    """A GIF of at most `most` of a folder's `saved_grids`, those as large as the last, the step written under each."""
    frames = []
    for file in evenly_spaced(saved_grids(folder), most):
        im = Image.open(file)
        im.thumbnail((side, side))
        frame = ImageOps.expand(im, (0, 0, 0, 24), "white")
        ImageDraw.Draw(frame).text((6, im.height + 3), f"step {int(file.stem[5:])}", "black", font(15))
        frames.append(frame if frame.mode == "L" else frame.quantize(method=Image.Quantize.FASTOCTREE))
    frames = [frame for frame in frames if frame.size == frames[-1].size]
    if frames:
        times = [int(min(500, max(40, 1000 * seconds / len(frames))))] * (len(frames) - 1) + [2000]
        frames[0].save(path, save_all=True, append_images=frames[1:], loop=0, duration=times)


def ticks(low, high, about=5):
    """Round numbers (1, 2 or 5 times a power of ten apart) that lie in [low, high]."""
    span = (high - low) / about
    power = 10.0 ** math.floor(math.log10(span))
    apart = next(step * power for step in (1, 2, 5, 10) if step * power >= span * 0.999)
    return [k * apart for k in range(math.ceil(low / apart - 1e-9), math.floor(high / apart + 1e-9) + 1)]


def save_curves(path, rows, panels, width=900, height=300):
    """Line charts over the step, one above the other, with axes, round ticks and a legend.

    rows: the dicts of log.jsonl. panels: [(title, names of numbers in the rows)], with a third where they are drawn
    over something else than the step; a chart without numbers is left out. The vertical range covers the middle 99 %.
    """
    panels = [(title, {name: [(row[over], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]
                      for name in names}, over)
              for title, names, over in ((*panel, "step")[:3] for panel in panels)]
    panels = [panel for panel in panels if any(panel[1].values())]
    canvas = Image.new("RGB", (width, height * max(1, len(panels))), "white")
    for p, panel in enumerate(panels):
        draw_chart(ImageDraw.Draw(canvas), (78, height * p + 34, width - 18, height * (p + 1) - 44), *panel)
    canvas.save(path)


def draw_chart(draw, box, title, points, over):
    """One chart of `save_curves`, its axes along `box`; points: {name: [(x, y), ...]}."""
    (left, top, right, bottom), small, ink, pale = box, font(13), "#282828", "#e1e1e1"
    xs, ys = zip(*itertools.chain(*points.values()))
    (y0, y1), x0, x1 = np.percentile(ys, [0.5, 99.5]), min(xs), max(max(xs), min(xs) + 1)
    margin = 0.05 * (y1 - y0) or abs(y0) * 0.1 or 1.0
    y0, y1 = y0 - margin, y1 + margin

    def place(x, y):
        return np.interp(x, (x0, x1), (left, right)), np.interp(y, (y0, y1), (bottom, top))     # clipped to the box

    draw.text((left, top - 26), title, ink, font(15))
    for y in ticks(y0, y1):
        _, v = place(x0, y)
        draw.line((left, v, right, v), pale)
        draw.text((left - 8, v), f"{y:g}" if abs(y) >= 1e-9 else "0", ink, small, anchor="rm")
    for x in ticks(x0, x1, 8):
        u, _ = place(x, y0)
        draw.line((u, bottom, u, bottom + 4), ink)
        draw.text((u, bottom + 7), f"{x:g}" if x < 1e5 else f"{x / 1000:g}k", ink, small, anchor="ma")
    draw.text(((left + right) / 2, bottom + 25), over, ink, small, anchor="ma")
    draw.rectangle(box, outline=ink)
    label = right
    for (name, pts), colour in reversed(list(zip(points.items(), ("#1f77b4", "#d64541", "#2c8c50", "#9467bd")))):
        if len(pts) > 1:
            draw.line([place(*pt) for pt in pts], colour, 2)
        elif pts:
            draw.ellipse([c + d for d in (-3, 3) for c in place(*pts[0])], colour)
        label -= draw.textlength(name, small) + 34
        draw.line((label, top - 14, label + 18, top - 14), colour, 3)
        draw.text((label + 23, top - 14), name, ink, small, anchor="lm")


def scatter(path, groups, side=800):
    """Points {name: (N, 2)} in colours, with a legend."""
    y = torch.cat(list(groups.values()))
    low, span = y.amin(0), (y.amax(0) - y.amin(0)).max().clamp(min=1e-9)
    chart = Image.new("RGB", (side, side + 40), "white")
    draw, left = ImageDraw.Draw(chart), 20
    for (name, points), colour in zip(groups.items(), ("#1f77b4", "#d64541", "#787878", "#dea528")):
        words = f"{name} ({len(points)})"
        for u, v in ((points - low) / span * (side - 40) + 20).tolist():
            draw.ellipse((u - 3, 40 + v - 3, u + 3, 40 + v + 3), colour)
        draw.ellipse((left, 15, left + 10, 25), colour)
        draw.text((left + 16, 20), words, (40, 40, 40), font(15), anchor="lm")
        left += 40 + draw.textlength(words, font(15))
    chart.save(path)


def to_pil(pixels, scale=1):
    """uint8 (C, H, W) -> a PIL image, L or RGB, each pixel a square of scale x scale."""
    return ImageOps.scale(Image.fromarray(pixels.permute(1, 2, 0).squeeze(2).numpy()), scale, Image.Resampling.NEAREST)


def captioned_grid(rows, side=128, pad=8):
    """Images on white, in rows of (heading, uint8 images (n, C, H, W), a caption under each or None)."""
    small, rows = font(13), [(heading, [to_pil(x, max(1, side // max(x.shape[1:]))) for x in pixels], captions)
                                  for heading, pixels, captions in rows]
    heights = [pad + 20 * (bool(title) + bool(under)) + max(im.height for im in ims) for title, ims, under in rows]
    width = max(pad + max(sum(im.width + pad for im in ims), math.ceil(small.getlength(heading)) + pad)
                for heading, ims, _ in rows)
    canvas = Image.new("RGB", (width, sum(heights) + pad), "white")
    pen, top = ImageDraw.Draw(canvas), 0
    for (heading, ims, captions), height in zip(rows, heights):
        left, upper = pad, top + pad + 20 * bool(heading)
        pen.text((pad, top + pad), heading, "black", small)
        for im, caption in itertools.zip_longest(ims, captions or ()):
            canvas.paste(im, (left, upper))
            pen.text((left + im.width / 2, upper + im.height + 3), caption or "", "black", small, anchor="ma")
            left += im.width + pad
        top += height
    return canvas


def save_animation(file, pixels, kind="GIF", milliseconds=50):
    """A looping animation of uint8 (n, C, H, W), small images enlarged to about 256 pixels."""
    frames = [to_pil(x, max(1, 256 // max(x.shape[1:]))) for x in pixels]
    if kind == "GIF":                                        # its palettes have 256 colours: chosen for each frame
        frames = [im if im.mode == "L" else im.quantize(256, Image.Quantize.MEDIANCUT) for im in frames]
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], loop=0, duration=milliseconds,
                   disposal=1, lossless=True, method=2)      # the first for GIF, the others for WebP
