"""One image file -> pixels: open it, turn it upright, crop, resize.

    pixels, window = Preprocess(size=(64, 64)).pixels(Path("tooth.jpg").read_bytes())     # uint8 (64, 64[, 3])
"""

import contextlib
import dataclasses
import io
import math
import re

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from runtime import UserError, first_line


def parse_size(text):
    """"288x512" or "64" -> (height, width)."""
    found = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", str(text).strip().lower())
    if not found:
        raise UserError(f"--size: expected one number (64) or HEIGHTxWIDTH (288x512), got {text!r}")
    return int(found[1]), int(found[2] or found[1])


def parse_crop(text):
    """"0.1,0,0.9,1" (left, top, right, bottom as fractions) or "1024x1024@bottom" (pixels at an anchor) -> a function.

    It takes (width, height), returns (left, top, right, bottom) in pixels; UserError if the image is smaller than that.
    """
    with contextlib.suppress(ValueError):
        left, top, right, bottom = (float(word) for word in text.split(","))
        if 0 <= left < right <= 1 and 0 <= top < bottom <= 1:
            return lambda width, height: (left * width, top * height, right * width, bottom * height)
    window = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)(?:@([a-z-]+))?", text.strip().lower())
    at = set((window[3] or "center").split("-")) if window else {""}
    if not at <= {"center", "top", "bottom", "left", "right"} or at >= {"top", "bottom"} or at >= {"left", "right"}:
        raise UserError("--crop: expected LEFT,TOP,RIGHT,BOTTOM as fractions (python prepare.py FOLDER --crop auto "
                        f"finds them), or pixels at an anchor, as in 1024x1024 or 1024x1024@bottom-left, got {text!r}")
    h, w = int(window[1]), int(window[2])

    def box(width, height):
        if w > width or h > height:
            raise UserError(f"smaller than the crop window: {height}x{width} against {h}x{w}")
        left = 0 if "left" in at else width - w if "right" in at else (width - w) // 2
        top = 0 if "top" in at else height - h if "bottom" in at else (height - h) // 2
        return left, top, left + w, top + h
    return box


def open_image(raw):
    """A file's bytes (or a uint8 array) -> PIL image, not decoded yet. Raises UserError, or whatever Pillow raises."""
    if len(raw) == 0:
        raise UserError("the file is empty")
    if isinstance(raw, np.ndarray):
        im = Image.fromarray(raw)
    else:
        im = open_dicom(raw) if raw[128:132] == b"DICM" else Image.open(io.BytesIO(raw))
    if im.format == "EPS":                                   # decoding it would run Ghostscript on the file
        raise UserError("is a PostScript program, whatever its name says")
    if im.width * im.height > Image.MAX_IMAGE_PIXELS:
        raise UserError(f"claims {im.height}x{im.width} pixels, over the limit of {Image.MAX_IMAGE_PIXELS}")
    if min(im.size) < 2:
        raise UserError(f"only {im.height}x{im.width} pixels")
    return im


def open_dicom(raw):
    """A DICOM file's bytes -> its first frame, a PIL image: RGB, or float after the modality's rescale and the VOI
    window, which `upright` scales, and inverts if it is MONOCHROME1. ImportError without pydicom."""
    try:
        from pydicom import dcmread, pixels
    except ImportError:
        raise ImportError("is DICOM, which needs a package that is not here: pip install pydicom") from None
    file = dcmread(io.BytesIO(raw))
    if file.Rows * file.Columns > Image.MAX_IMAGE_PIXELS:
        raise UserError(f"claims {file.Rows}x{file.Columns} pixels, over the limit of {Image.MAX_IMAGE_PIXELS}")
    x, colours = file.pixel_array, file.PhotometricInterpretation
    x = x[0] if int(file.get("NumberOfFrames") or 1) > 1 else x
    if colours.startswith("MONOCHROME"):
        x = pixels.apply_voi_lut(pixels.apply_modality_lut(x, file), file).astype(np.float32)
    elif colours == "PALETTE COLOR":
        x = pixels.apply_color_lut(x, file)
    im = Image.fromarray((x >> 8).astype(np.uint8) if x.dtype == np.uint16 else x)
    im.format, im.inverted = "DICOM", colours == "MONOCHROME1"
    return im


def upright(im, background="white", value_range=None):
    """An opened PIL image of any mode -> mode L or RGB, turned as its EXIF says. Raises whatever Pillow raises.

    16-bit, 32-bit and float grey is scaled over value_range = (low, high), else over the image's own range (Pillow's
    convert would clip it to white); transparent images are composited on `background`.
    """
    im.load()
    with contextlib.suppress(Exception):                     # a damaged EXIF says nothing, and hides no image
        ImageOps.exif_transpose(im, in_place=True)
    if im.mode.startswith(("I", "F")):                       # 16 bits and more
        values = np.asarray(im).astype(np.float64)
        pixels = scale_to_uint8(values, *(value_range or (values.min(), values.max())))
        return Image.fromarray(255 - pixels if getattr(im, "inverted", False) else pixels)
    mode = "L" if im.mode in ("1", "L", "LA", "La") else "RGB"
    if im.has_transparency_data:
        im = im.convert("RGBA")
        im = Image.alpha_composite(Image.new("RGBA", im.size, background), im)
    return im if im.mode == mode else im.convert(mode)


def center_box(box, size):
    """The largest window of the shape of `size` = (height, width) in the middle of `box`."""
    left, top, right, bottom = box
    w, h = right - left, bottom - top
    scale = min(w / size[1], h / size[0])
    dx, dy = max(0, w - scale * size[1]) / 2, max(0, h - scale * size[0]) / 2
    return left + dx, top + dy, right - dx, bottom - dy


def crop_and_resize(im, size, fit="crop", box=None):
    """`box` = (left, top, right, bottom) of `im`, of mode L or RGB, at `size` = (height, width) -> uint8 (H, W[, 3]).

    fit "crop": its largest centred window of the target's shape; "squash": all of it; "pad": all, black beside it.
    """
    box = box or (0, 0, *im.size)
    if fit != "pad":
        return resize(im, size, center_box(box, size) if fit == "crop" else box)
    scale = max((box[2] - box[0]) / size[1], (box[3] - box[1]) / size[0])
    inner = [max(1, round(side / scale)) for side in (box[3] - box[1], box[2] - box[0])]
    small = resize(im, tuple(inner), box)
    pads = [((side - few) // 2, (side - few + 1) // 2) for side, few in zip(size, inner)] + [(0, 0)] * (small.ndim - 2)
    return np.pad(small, pads)


def resize(im, size, box):
    """`box` of an image of mode L or RGB at `size` = (height, width): bicubic, antialiased -> uint8 (H, W[, 3])."""
    return np.asarray(im.resize(size[::-1], Image.Resampling.BICUBIC, box))


def has_colour(pixels):
    """Whether more than 0.2 % of the pixels of a uint8 (H, W, 3) array have channels that lie over 24 levels apart."""
    return pixels.ndim == 3 and (np.ptp(pixels.transpose(2, 0, 1).copy(), 0) > 24).mean() > 0.002      # planes: faster


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """Everything that decides what a file's pixels become: the flags of the same names."""
    size: tuple                                              # (height, width)
    fit: str = "crop"
    crop: str = ""
    channels: str = "auto"
    draft = True                                             # whether large JPEGs are decoded at a smaller size

    def __post_init__(self):
        """Raises UserError for a field that means nothing."""
        for name, known in (("channels", ("auto", "1", "3")), ("fit", ("crop", "squash", "pad"))):
            if getattr(self, name) not in known:
                raise UserError(f"--{name}: expected {', '.join(known)}, got {getattr(self, name)!r}")
        self.window()

    def window(self):
        """--crop as a function of an upright image's (width, height): see `parse_crop`."""
        return parse_crop(self.crop or "0,0,1,1")

    def upright(self, im):
        """An opened image of any mode -> mode L or RGB."""
        return upright(im)

    def pixels(self, raw):
        """A file's bytes (or a uint8 array) -> uint8 (H, W) or (H, W, 3), and (height, width) of the window it shows.

        A JPEG much larger than the target is decoded at 1/2, 1/4 or 1/8 of its size by its own transform (Pillow's
        draft), never below the target: that changes less than bilinear for bicubic. Raises as `open_image` does.
        """
        im, window = open_image(raw), self.window()
        full = im.size
        if self.draft and im.format == "JPEG":
            with contextlib.suppress(Exception):             # a damaged EXIF; and a turned image is decoded whole
                left, top, right, bottom = window(*full)
                spare = min((right - left) / self.size[1], (bottom - top) / self.size[0])
                if im.getexif().get(0x0112, 1) == 1 and spare >= 2:
                    im.draft(None, (math.ceil(full[0] / spare), math.ceil(full[1] / spare)))
        im = self.upright(im)
        mode = {"1": "L", "3": "RGB"}.get(str(self.channels), im.mode)
        im = im if im.mode == mode else im.convert(mode)
        full = im.size if im.size == full[::-1] else full    # turned by EXIF; or else, perhaps, drafted
        left, top, right, bottom = window(*full)
        across, down = im.width / full[0], im.height / full[1]
        box = left * across, top * down, right * across, bottom * down
        return crop_and_resize(im, self.size, self.fit, box), (round(bottom - top), round(right - left))


def describe_decode_error(error):
    """Why a file cannot be used, in a few words: of what reading it raised."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image, whatever its name says"
    kind = "cannot be opened: " if getattr(error, "errno", None) is not None else ""
    return kind + first_line(error)


def scale_to_uint8(values, low, high):
    """A float array, low to high -> 0 to 255, uint8. Raises UserError when a value is not finite."""
    if not np.isfinite([values.min(), values.max()]).all():
        raise UserError("holds values that are not finite")
    return ((values - low) * (255 / max(high - low, 1e-12))).round().clip(0, 255).astype(np.uint8)
