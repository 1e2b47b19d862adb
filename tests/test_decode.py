"""Tests of decode.py."""

import io
import math
import sys

import numpy as np
import pytest
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

import data
import decode
import sources
from conftest import draw, read_image
from runtime import UserError


def test_sizes_and_crops_as_they_are_written():
    assert decode.parse_size("64") == (64, 64) and decode.parse_size("288x512") == (288, 512)
    assert decode.parse_crop("0.1,0,0.9,0.5")(100, 60) == pytest.approx((10, 0, 90, 30))
    assert decode.parse_crop("20x10@bottom")(100, 60) == (45, 40, 55, 60)
    assert decode.parse_crop("20x10@top-right")(100, 60) == (90, 0, 100, 20)
    assert decode.parse_crop("20x10")(100, 60) == (45, 20, 55, 40)
    for parse, word in ((decode.parse_size, "big"), (decode.parse_size, "64x"), (decode.parse_size, "-3"),
                        (decode.parse_crop, "0.9,0,0.1,1"), (decode.parse_crop, "1,2"),
                        (decode.parse_crop, "9x9@middle"),
                        (decode.parse_crop, "9x9@top-bottom")):
        with pytest.raises(UserError, match="expected"):
            parse(word)
    with pytest.raises(UserError, match="smaller than the crop window"):
        decode.parse_crop("61x10")(100, 60)


def test_fits():
    """Left half black, right half white, 40 wide and 20 high."""
    im = Image.fromarray(np.repeat(np.repeat([[0, 255]], 20, 0), 20, 1).astype(np.uint8))
    crop = decode.crop_and_resize(im, (10, 10), "crop")
    squash = decode.crop_and_resize(im, (10, 10), "squash")
    pad = decode.crop_and_resize(im, (20, 20), "pad")
    assert crop.shape == squash.shape == (10, 10) and (crop[:, :4] < 9).all() and (crop[:, 6:] > 246).all()
    assert (squash[:, :4] < 9).all() and (squash[:, 6:] > 246).all()
    assert (pad[:5] == 0).all() and (pad[15:] == 0).all() and (pad[6:14, 12:] > 250).all() and (pad[6:14, :8] < 5).all()
    window = decode.parse_crop("0.5,0,1,1")(40, 20)
    right, half = (decode.crop_and_resize(im, (8, 8), fit, window) for fit in ("squash", "pad"))
    assert (half[:, 3:5] > 246).all()
    assert (right[:, 1:] == 255).all()


def test_every_shape_fits_every_size():
    """The window never leaves the image by a rounding: 116 wide at 28 did."""
    for side in (*range(29, 700, 13), 116, 200, 640, 1935):
        im = Image.new("L", (side, 480))
        for size in ((28, 28), (29, 29), (100, 100), (64, 368), (113, 9)):
            assert decode.crop_and_resize(im, size).shape[:2] == size
            assert decode.crop_and_resize(im, size, "crop", (0.1 * side, 7.3, 0.7 * side, 480)).shape == size


def test_resize_is_antialiased():
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (64, 32)))
    small = decode.crop_and_resize(stripes, (16, 16)).astype(float)
    assert abs(small - 127.5).max() < 16                              # picking pixels would give 0 or 255


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_resize_is_bicubic(mode):
    """Against the same kernel in float64, written out (Keys 1981, a = -1/2, widened when it shrinks), and Pillow's."""
    def weights(n, small):
        scale = max(1, n / small)
        x = np.abs((np.arange(n) + 0.5 - (np.arange(small)[:, None] + 0.5) * n / small) / scale)
        w = np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))
        return w / w.sum(1, keepdims=True)

    y, x = np.mgrid[:90, :110] / 9                           # smooth: what is rounded in between hardly matters
    planes = np.stack([128 + 90 * np.sin(x + 2 * y + c) * np.cos(x * y / 4) for c in range(3)], -1).round()
    im = Image.fromarray(planes.astype(np.uint8)).convert(mode)
    for size, box in (((45, 55), (0, 0, 110, 90)), ((64, 64), (10, 0, 100, 90)), ((23, 100), (0, 0, 110, 90)),
                      ((120, 130), (0, 0, 110, 90)), ((40, 40), (10.5, 0, 100.5, 90))):
        left, top, right, bottom = (math.floor(edge) for edge in box)
        given = np.asarray(im, float)[top:bottom, left:right]
        expected = np.einsum("ij,jk...->ik...", weights(bottom - top, size[0]), given)
        expected = np.einsum("ij,kj...->ki...", weights(right - left, size[1]), expected).clip(0, 255)
        found, pillow = decode.resize(im, size, box), np.asarray(im.resize(size[::-1], Image.Resampling.BICUBIC, box))
        assert found.dtype == np.uint8 and found.shape == pillow.shape
        assert abs(found.astype(float) - pillow)[2:-2, 2:-2].max() <= 2
        if left == box[0]:
            assert abs(found - expected).max() < 1.6
            other = im.resize(size[::-1], Image.Resampling.BILINEAR, box)
            assert abs(np.asarray(other, float) - expected).max() > 1.6             # it tells filters apart


def encoded(im, kind="PNG", **options):
    file = io.BytesIO()
    im.save(file, kind, **options)
    file.seek(0)
    return file


def test_what_pillow_clips_or_turns_is_read_right():
    ramp = np.arange(256, dtype=np.uint16)[None] * 100 + 1000
    assert np.array_equal(np.asarray(read_image(encoded(Image.fromarray(ramp))))[0], np.arange(256))
    floats = Image.fromarray(ramp.astype(np.float32) / 7)
    assert np.array_equal(np.asarray(read_image(encoded(floats, "TIFF")))[0], np.arange(256))
    clear = Image.new("RGBA", (2, 1), (10, 20, 30, 0))
    clear.putpixel((1, 0), (10, 20, 30, 255))
    assert np.asarray(read_image(encoded(clear))).tolist() == [[[255] * 3, [10, 20, 30]]]
    keyed = read_image(encoded(Image.new("L", (2, 2), 0), transparency=0))
    assert keyed.mode == "L" and np.asarray(keyed).tolist() == [[255, 255]] * 2
    turned = Image.new("L", (6, 4), 9)
    exif = Image.Exif()
    exif[0x0112] = 6
    assert read_image(encoded(turned, "JPEG", exif=exif)).size == (4, 6)
    for mode, expected in (("1", "L"), ("L", "L"), ("P", "RGB"), ("CMYK", "RGB"), ("LA", "L"), ("RGB", "RGB")):
        kind = "TIFF" if mode == "CMYK" else "PNG"
        assert read_image(encoded(Image.new(mode, (3, 3)), kind)).mode == expected


def half_and_half(mode):
    """16 wide, 10 high: left half dark (60), right half light (200), in the given mode; 16-bit: 256 times that."""
    values = np.repeat(np.repeat([[60, 200]], 10, 0), 8, 1)
    if mode in ("I;16", "I"):
        return Image.fromarray((values * 256).astype(np.uint16 if mode == "I;16" else np.int32))
    if mode == "F":
        return Image.fromarray((values / 1000).astype(np.float32))
    im = Image.fromarray(values.astype(np.uint8))
    if mode == "1":
        return im.point(lambda v: 255 * (v > 128)).convert("1")
    if mode in ("LA", "RGBA"):                                        # the right half is clear: white shows through
        im = im.convert(mode)
        im.putalpha(Image.fromarray(np.where(values > 100, 0, 255).astype(np.uint8)))
    return im.convert(mode)


FORMATS = [("PNG", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")] + [
    ("TIFF", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I", "F")] + [
    ("JPEG", mode) for mode in ("L", "RGB", "CMYK", "YCbCr")] + [("WEBP", mode) for mode in ("RGB", "RGBA")] + [
    ("BMP", mode) for mode in ("1", "L", "P", "RGB", "RGBA")] + [("GIF", mode) for mode in ("1", "L", "P", "RGB")] + [
    ("PPM", mode) for mode in ("1", "L", "RGB", "I;16")]


@pytest.mark.parametrize("kind, mode", FORMATS)
def test_every_pixel_mode_in_every_format(here, kind, mode):
    """What comes out of the 38 combinations: dark left, light right, grey where the file is grey."""
    assert len(FORMATS) == 38
    (here / "d").mkdir()
    file = here / "d" / f"a.{kind.lower()}"
    try:
        half_and_half(mode).save(file, kind, **{"WEBP": {"lossless": True}, "JPEG": {"quality": 95}}.get(kind, {}))
        Image.open(file).load()
    except (OSError, ValueError) as error:                            # as Pillow 12.3 does with its own YCbCr TIFF
        pytest.skip(f"this Pillow does not write it, or not read what it wrote: {error}")
    images = data.load("d", (10, 16))
    left, right = (np.asarray(images.images)[0, :, 1:9, cols].astype(float) for cols in (slice(0, 7), slice(9, 16)))
    dark, light = {"1": (0, 255), "I;16": (0, 255), "I": (0, 255), "F": (0, 255), "LA": (60, 255),
                   "RGBA": (60, 255)}.get(mode, (60, 200))
    if (kind, mode) == ("BMP", "RGBA"):
        light = np.unique(right)                                      # whether a BMP keeps its alpha is Pillow's choice
        assert light.size == 1 and light[0] in (200, 255)
    assert images.images.shape[1] == 1 and np.abs(left - dark).max() <= 6 and np.abs(right - light).max() <= 6


def test_sixteen_bits_keep_their_levels(here):
    (here / "d").mkdir()
    ramp = np.tile(np.linspace(300, 4000, 512).astype(np.uint16), (512, 1))
    for name in ("a.png", "b.tiff"):
        Image.fromarray(ramp).save(here / "d" / name)
    own = np.asarray(data.load("d", (512, 512)).images)
    assert all(len(np.unique(image)) >= 250 for image in own) and own.min() == 0 and own.max() == 255
    ranged = np.asarray(decode.upright(Image.open("d/a.png"), value_range=(0, 4095)))
    assert ranged[0, 0] == round(300 / 4095 * 255) and ranged.max() == round(4000 / 4095 * 255)


def test_draft_decoding_changes_less_than_the_choice_of_a_filter(monkeypatch):
    asked, draft = [], JpegImageFile.draft
    monkeypatch.setattr(JpegImageFile, "draft", lambda im, mode, size: asked.append(size) or draft(im, mode, size))
    scene = Image.fromarray(sources.draw_demo(1, side=64)[0]).resize((512, 512), Image.Resampling.BICUBIC)
    noise = np.random.RandomState(0).normal(0, 6, (512, 512))
    scene = Image.fromarray((np.asarray(scene) + noise).clip(0, 255).astype(np.uint8))
    raw = encoded(scene, "JPEG", quality=92).getvalue()
    drafted, window = decode.Preprocess((128, 128)).pixels(raw)
    assert asked == [(128, 128)]
    whole = Image.open(io.BytesIO(raw))
    bicubic, bilinear = (np.asarray(whole.resize((128, 128), f)).astype(float)
                        for f in (Image.Resampling.BICUBIC, Image.Resampling.BILINEAR))
    assert window == (512, 512) and np.abs(drafted - bicubic).mean() < np.abs(bicubic - bilinear).mean()
    cropped, _ = decode.Preprocess((128, 128), crop="0.1,0.2,0.9,1").pixels(raw)
    expected = decode.crop_and_resize(whole, (128, 128), "crop", (51.2, 102.4, 460.8, 512))
    assert np.abs(cropped - expected.astype(float)).mean() < np.abs(bicubic - bilinear).mean()


def test_damaged_exif_hides_no_image(here):
    (here / "d").mkdir()
    for k, suffix in enumerate(("jpg", "png", "webp")):
        Image.new("RGB", (20, 24), (90 * k, 20, 30)).save(here / "d" / f"{k}.{suffix}", exif=b"Exif\0\0rubbish",
                                                              dpi=(72, 72))
    assert data.load("d", (8, 8)).names == ["0.jpg", "1.png", "2.webp"]


def dicom(pixels, colours="MONOCHROME2", bits=None, frames=0, **more):
    """A DICOM file, explicit little endian, written by hand: its bytes. more: group_element=(representation, value)."""
    rows, columns = pixels.shape[frames > 0:][:2]
    size = 8 * pixels.dtype.itemsize
    elements = {"0028_0002": ("US", 1 if colours.startswith("M") else 3), "0028_0004": ("CS", colours),
                "0028_0010": ("US", rows), "0028_0011": ("US", columns), "0028_0100": ("US", size),
                "0028_0101": ("US", bits or size), "0028_0102": ("US", (bits or size) - 1),
                "0028_0103": ("US", int(pixels.dtype.kind == "i")), "7FE0_0010": ("OW", pixels.tobytes()), **more}
    if not colours.startswith("M"):
        elements["0028_0006"] = "US", 0
    if frames:
        elements["0028_0008"] = "IS", str(frames)

    def element(tag, kind, value):
        group, number = (int(part, 16) for part in tag.split("_"))
        value = value.to_bytes(2, "little") if isinstance(value, int) else value
        value = value.encode() if isinstance(value, str) else value
        value += b" " * (len(value) % 2)
        length = bytes(2) + len(value).to_bytes(4, "little") if kind == "OW" else len(value).to_bytes(2, "little")
        return group.to_bytes(2, "little") + number.to_bytes(2, "little") + kind.encode() + length + value

    meta = element("0002_0010", "UI", "1.2.840.10008.1.2.1\0")
    meta = element("0002_0000", "UL", len(meta).to_bytes(4, "little")) + meta
    return bytes(128) + b"DICM" + meta + b"".join(element(tag, *elements[tag]) for tag in sorted(elements))


def test_dicom_files_are_read_like_others(here):
    pytest.importorskip("pydicom")
    x = np.random.RandomState(0).randint(0, 4096, (20, 30)).astype(np.uint16)
    x[0, :2] = 0, 4095
    scaled = (x * (255 / 4095)).round()
    window = {"0028_1050": ("DS", "1000"), "0028_1051": ("DS", "200")}      # centre and width: all else black or white
    signed, rescale = (x.astype(np.int32) - 2000).astype(np.int16), {"0028_1052": ("DS", "-1024"),
                                                                     "0028_1053": ("DS", "2")}
    rgb = np.random.RandomState(1).randint(0, 256, (20, 30, 3)).astype(np.uint8)
    for raw, expected in (
            (dicom(x, bits=12), scaled), (dicom(x, "MONOCHROME1", 12), 255 - scaled), (dicom(x), scaled),
            (dicom(signed), scaled), (dicom(x, bits=12, **rescale), scaled), (dicom(rgb, "RGB"), rgb),
            (dicom(np.stack([x, x[::-1]]), bits=12, frames=2), scaled),
            (dicom(x, bits=12, **window), ((x - 899.5) / 199 * 255).round().clip(0, 255))):
        assert len(raw) % 2 == 0
        pixels, shape = decode.Preprocess((20, 30)).pixels(raw)
        assert shape == (20, 30) and pixels.shape == expected.shape and np.abs(pixels - expected).max() <= 1
    dark = decode.open_image(dicom(np.minimum(x, 2000), "MONOCHROME1", 12))            # on the scale of all films
    assert np.abs(np.asarray(decode.upright(dark, value_range=(0, 4095))) - (255 - scaled))[x < 2000].max() <= 1
    draw(here / "d", 3, mode="L")
    (here / "d" / "film.DCM").write_bytes(dicom(x, bits=12))
    (here / "d" / "cut.dcm").write_bytes(dicom(x, bits=12)[:-100])
    (here / "d" / "huge.dcm").write_bytes(dicom(x, **{"0028_0010": ("US", 65000), "0028_0011": ("US", 65000)}))
    found = data.load("d", (16, 16))
    assert "film.DCM" in found.names and sorted(name for name, _ in found.skipped) == ["cut.dcm", "huge.dcm"]
    assert "over the limit" in dict(found.skipped)["huge.dcm"]


def test_dicom_files_without_pydicom_are_named_and_read_once_it_is_there(here, monkeypatch):
    draw(here / "d", 3, mode="L")
    (here / "d" / "film.dcm").write_bytes(dicom(np.arange(600, dtype=np.uint16).reshape(20, 30)))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pydicom", None)
        (name, why), = data.load("d", (16, 16)).skipped
        assert name == "film.dcm" and "pip install pydicom" in why
    pytest.importorskip("pydicom")
    assert not data.load("d", (16, 16)).skipped                             # no cache remembers that it was missing
