"""Tests of data.py."""

import errno
import gzip
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import pairs
import plots
import prepare
from conftest import HERE, TINY, checkpoint, draw, pair_flags, read_picture, train, write_idx


def test_sizes_and_crops_as_they_are_written():
    assert data.parse_size("64") == (64, 64) and data.parse_size("288x512") == (288, 512)
    assert data.parse_crop("0.1,0,0.9,0.5")(100, 60) == pytest.approx((10, 0, 90, 30))
    assert data.parse_crop("20x10@bottom")(100, 60) == (45, 40, 55, 60)
    assert data.parse_crop("20x10@top-right")(100, 60) == (90, 0, 100, 20)
    assert data.parse_crop("20x10")(100, 60) == (45, 20, 55, 40)
    for parse, word in ((data.parse_size, "big"), (data.parse_size, "64x"), (data.parse_size, "-3"),
                        (data.parse_crop, "0.9,0,0.1,1"), (data.parse_crop, "1,2"), (data.parse_crop, "9x9@middle"),
                        (data.parse_crop, "9x9@top-bottom")):
        with pytest.raises(ValueError, match="write"):
            parse(word)
    with pytest.raises(ValueError, match="smaller than the crop window"):
        data.parse_crop("61x10")(100, 60)


def test_fits():
    """Left half black, right half white, 40 wide and 20 high."""
    im = Image.fromarray(np.repeat(np.repeat([[0, 255]], 20, 0), 20, 1).astype(np.uint8))
    crop = data.crop_and_resize(im, (10, 10), "crop")
    squash = data.crop_and_resize(im, (10, 10), "squash")
    pad = data.crop_and_resize(im, (20, 20), "pad")
    assert crop.shape == squash.shape == (10, 10) and (crop[:, :4] < 9).all() and (crop[:, 6:] > 246).all()
    assert (squash[:, :4] < 9).all() and (squash[:, 6:] > 246).all()
    assert (pad[:5] == 0).all() and (pad[15:] == 0).all() and (pad[6:14, 12:] > 250).all() and (pad[6:14, :8] < 5).all()
    right, half = (data.crop_and_resize(im, (8, 8), fit, data.parse_crop("0.5,0,1,1")(40, 20)) for fit in ("squash", "pad"))
    assert (half[:, 3:5] > 246).all()
    assert (right[:, 1:] == 255).all()


def test_every_shape_fits_every_size():
    """The window never leaves the picture by a rounding: 116 wide at 28 did."""
    for side in (*range(29, 700, 13), 116, 200, 640, 1935):
        im = Image.new("L", (side, 480))
        for size in ((28, 28), (29, 29), (100, 100), (64, 368), (113, 9)):
            assert data.crop_and_resize(im, size).shape[:2] == size
            assert data.crop_and_resize(im, size, "crop", (0.1 * side, 7.3, 0.7 * side, 480)).shape == size


def test_resize_is_antialiased():
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (64, 32)))
    small = data.crop_and_resize(stripes, (16, 16)).astype(float)
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
        found, pillow = data.resize(im, size, box), np.asarray(im.resize(size[::-1], Image.Resampling.BICUBIC, box))
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
    assert np.array_equal(np.asarray(read_picture(encoded(Image.fromarray(ramp))))[0], np.arange(256))
    floats = Image.fromarray(ramp.astype(np.float32) / 7)
    assert np.array_equal(np.asarray(read_picture(encoded(floats, "TIFF")))[0], np.arange(256))
    clear = Image.new("RGBA", (2, 1), (10, 20, 30, 0))
    clear.putpixel((1, 0), (10, 20, 30, 255))
    assert np.asarray(read_picture(encoded(clear))).tolist() == [[[255] * 3, [10, 20, 30]]]
    keyed = read_picture(encoded(Image.new("L", (2, 2), 0), transparency=0))
    assert keyed.mode == "L" and np.asarray(keyed).tolist() == [[255, 255]] * 2
    turned = Image.new("L", (6, 4), 9)
    exif = Image.Exif()
    exif[0x0112] = 6
    assert read_picture(encoded(turned, "JPEG", exif=exif)).size == (4, 6)
    for mode, expected in (("1", "L"), ("L", "L"), ("P", "RGB"), ("CMYK", "RGB"), ("LA", "L"), ("RGB", "RGB")):
        kind = "TIFF" if mode == "CMYK" else "PNG"
        assert read_picture(encoded(Image.new(mode, (3, 3)), kind)).mode == expected


def test_folder_is_read_whole_and_bad_files_are_named(here):
    draw(here / "d" / "class_a", 3, suffix=".JPG")
    draw(here / "d" / "b", 2, mode="L", suffix=".tiff")
    draw(here / "d" / ".hidden", 1)
    (here / "d" / "notes.txt").write_text("not a picture")
    (here / "d" / "text.jpg").write_text("not a picture either")
    (here / "d" / "empty.png").write_bytes(b"")
    whole = (here / "d" / "class_a" / "000.JPG").read_bytes()
    (here / "d" / "cut.jpeg").write_bytes(whole[:len(whole) // 2])
    (here / "d" / "._hidden.png").write_bytes(whole)
    (here / "d" / "loop").symlink_to(here / "d", target_is_directory=True)
    (here / "d" / "twin").symlink_to(here / "d" / "b", target_is_directory=True)
    pictures = data.load("d", (16, 16))
    assert pictures.names == ["b/000.tiff", "b/001.tiff", "class_a/000.JPG", "class_a/001.JPG", "class_a/002.JPG"]
    assert pictures.images.shape == (5, 3, 16, 16) and pictures.images.dtype == np.uint8
    assert (pictures.images[0][0] == pictures.images[0][1]).all()     # the grey ones, in three equal channels
    assert {name: why.split()[0] for name, why in pictures.skipped} == {
        "cut.jpeg": "Truncated", "empty.png": "the", "text.jpg": "not"}
    assert "3 left out" in data.describe("d", pictures)[0] and "cut.jpeg" in data.describe("d", pictures)[1]
    assert data.load("d", (16, 16), channels="1").images.shape == (5, 1, 16, 16)
    assert data.load("d", (16, 16), limit=3).names == pictures.names[:3]
    assert data.load("d/b", (16, 16)).images.shape == (2, 1, 16, 16)


def test_grey_content_in_rgb_files_is_grey(here):
    draw(here / "d", 4, mode="L")
    for file in (here / "d").iterdir():
        Image.open(file).convert("RGB").save(file.with_suffix(".jpg"), quality=80)
        file.unlink()
    assert data.load("d", (16, 16)).images.shape == (4, 1, 16, 16)
    Image.new("RGB", (20, 20), "red").save(here / "d" / "red.png")
    pictures = data.load("d", (16, 16))
    assert pictures.images.shape == (5, 3, 16, 16) and "red.png" not in str(pictures.notes)    # 1 of 5 is no exception
    faint = np.full((16, 16, 3), 100, np.uint8)
    faint[..., 0] += 20
    assert not data.has_colour(faint) and data.has_colour(faint + np.array([9, 0, 0], np.uint8))
    assert data.load("d", (16, 16), channels=1).images.shape == (5, 1, 16, 16)


def test_three_equal_channels_are_grey_and_one_pixel_of_colour_is_not():
    grey = np.repeat(np.random.RandomState(0).randint(0, 256, (9, 7, 1)).astype(np.uint8), 3, axis=2)
    assert data.all_grey(Image.fromarray(grey)) and not data.all_grey(Image.fromarray(grey).convert("L"))
    for row, column, channel in ((0, 0, 1), (4, 3, 0), (4, 6, 2), (8, 6, 2)):         # in the middle row and beside it
        odd = grey.copy()
        odd[row, column, channel] ^= 1
        assert not data.all_grey(Image.fromarray(odd))


def test_near_pairs_against_all_pairs():
    random = np.random.RandomState(0)
    thumbs = random.randint(20, 236, (80, 16, 17))
    for k, (noise, share) in enumerate(((2, 1), (9, 1), (40, 1), (90, 1), (200, 0.05), (0, 1))):
        change = random.randint(-noise, noise + 1, (16, 17)) * (random.rand(16, 17) < share)
        thumbs[70 - 7 * k] = (thumbs[k + 72] + change).clip(0, 255)   # near copies, and no longer so near ones
    thumbs[3], thumbs[50] = 90, 90                                    # blank ones are no pair
    thumbs, expected = thumbs.astype(np.uint8), []
    for i in range(80):
        for j in range(i + 1, 80):
            bits = ((np.diff(thumbs[i].astype(int)) > 0) != (np.diff(thumbs[j].astype(int)) > 0)).sum()
            if bits <= 24 and min(thumbs[i].std(), thumbs[j].std()) > 1 and \
                    np.corrcoef(thumbs[i].ravel(), thumbs[j].ravel())[0, 1] >= 0.985:
                expected.append((i, j))
    assert prepare.near_pairs(thumbs) == expected and 3 <= len(expected) < 6
    assert prepare.near_pairs(thumbs[:1]) == prepare.near_pairs(thumbs[:0]) == []


def test_holdout_goes_by_content_and_is_stable(here):
    draw(here / "d", 60)
    for k in range(10):
        (here / "d" / f"copy{k}.png").write_bytes((here / "d" / f"{k:03d}.png").read_bytes())
    train, held = (data.load("d", (8, 8), holdout=0.3, part=part) for part in ("train", "heldout"))
    assert sorted(train.names + held.names) == [f"{k:03d}.png" for k in range(60)]    # each once, on one side
    assert 8 <= len(held.names) <= 28 and train.held_out == len(held.names)
    assert train.skipped == held.skipped == [(f"copy{k}.png", f"an exact copy of {k:03d}.png") for k in range(10)]
    assert len(data.load("d", (8, 8), holdout=0.8, part="heldout").names) > 35
    assert len(data.load("d", (8, 8)).names) == 60 and data.load("d", (8, 8), limit=64).skipped[-1][0] == "copy3.png"
    draw(here / "d" / "more", 30)
    assert set(held.names) <= set(data.load("d", (8, 8), holdout=0.3, part="heldout").names)


def test_groups_and_near_copies_stay_on_one_side(here):
    for patient in range(30):
        draw(here / "d" / f"p{patient:02d}", 3)
    side = {name: "train" for name in data.load("d", (8, 8), holdout=0.5, part="train", group=r"(p\d+)/").names}
    side |= {name: "heldout" for name in data.load("d", (8, 8), holdout=0.5, part="heldout", group=r"(p\d+)/").names}
    assert len(side) == 90 and set(side.values()) == {"train", "heldout"}
    assert all(len({side[f"p{p:02d}/{k:03d}.png"] for k in range(3)}) == 1 for p in range(30))
    ramp = np.linspace(0, 200, 64)[None] * np.linspace(0.3, 1, 64)[:, None]
    (here / "e").mkdir()
    for k in range(40):
        waves = 50 * np.sin(np.arange(64) / (1 + k / 7))[:, None]
        picture = Image.fromarray((ramp + waves).clip(0, 255).astype(np.uint8))
        picture.save(here / "e" / f"{k:02d}.png")
        picture.save(here / "e" / f"{k:02d}-again.jpg", quality=80)
    sides = [set(data.load("e", (48, 48), holdout=0.5, part=part).names) for part in ("train", "heldout")]
    assert all(len(names) > 10 for names in sides)
    assert all((f"{k:02d}.png" in names) == (f"{k:02d}-again.jpg" in names) for k in range(40) for names in sides)


def test_the_share_held_out_is_the_share_asked_for(here):
    """Families of near copies weigh as one picture does; pictures that are mostly blank are no near copies."""
    names = [str(k) for k in range(20000)]
    digests = np.random.RandomState(0).randint(0, 2**62, 20000).tolist()
    families = [(k, k + 1) for k in range(20000) if k % 10 < 9]
    for alike in ((), families):
        assert data.heldout_mask(digests, names, 0.1, "", alike).mean() == pytest.approx(0.1, abs=0.025)
    dots = np.zeros((300, 1, 64, 64), np.uint8)
    for k, (y, x) in enumerate(np.random.RandomState(1).randint(2, 60, (300, 2))):
        dots[k, 0, y:y + 4, x:x + 4] = 255
    assert len(prepare.near_pairs(data.thumbnails(dots))) < 30


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
    half_and_half(mode).save(file, kind, **{"WEBP": {"lossless": True}, "JPEG": {"quality": 95}}.get(kind, {}))
    try:
        Image.open(file).load()
    except OSError as error:                                          # as Pillow 12.3 does with its own YCbCr TIFF
        pytest.skip(f"this Pillow does not read what it wrote: {error}")
    pictures = data.load("d", (10, 16))
    left, right = (np.asarray(pictures.images)[0, :, 1:9, cols].astype(float) for cols in (slice(0, 7), slice(9, 16)))
    dark, light = {"1": (0, 255), "I;16": (0, 255), "I": (0, 255), "F": (0, 255), "LA": (60, 255),
                   "RGBA": (60, 255)}.get(mode, (60, 200))
    if (kind, mode) == ("BMP", "RGBA"):
        light = np.unique(right)                                      # whether a BMP keeps its alpha is Pillow's choice
        assert light.size == 1 and light[0] in (200, 255)
    assert pictures.images.shape[1] == 1 and np.abs(left - dark).max() <= 6 and np.abs(right - light).max() <= 6


def test_sixteen_bits_keep_their_levels(here):
    (here / "d").mkdir()
    ramp = np.tile(np.linspace(300, 4000, 512).astype(np.uint16), (512, 1))
    for name in ("a.png", "b.tiff"):
        Image.fromarray(ramp).save(here / "d" / name)
    own = np.asarray(data.load("d", (512, 512)).images)
    assert all(len(np.unique(picture)) >= 250 for picture in own) and own.min() == 0 and own.max() == 255
    ranged = np.asarray(data.load("d", (512, 512), range="0,4095").images)
    assert ranged[0, 0, 0, 0] == round(300 / 4095 * 255) and ranged.max() == round(4000 / 4095 * 255)


def damage(raw, way, random):
    if way == "flip":
        raw = bytearray(raw)
        for place in random.randint(8, len(raw), 20):
            raw[place] ^= 1 << random.randint(8)
        return bytes(raw)
    if way == "cut":
        return raw[:random.randint(1, len(raw) - 20)]
    if way == "huge":                                                 # claims 60000 x 60000 pixels
        header = b"IHDR" + (60000).to_bytes(4, "big") * 2 + raw[24:29]
        return raw[:12] + header + zlib.crc32(header).to_bytes(4, "big") + raw[33:]
    return {"empty": b"", "text": b"hello\n" * random.randint(1, 50), "noise": random.bytes(500)}[way]


def test_five_hundred_damaged_files_among_good_ones(here, capsys):
    resource = pytest.importorskip("resource")
    good = draw(here / "d", 60, (24, 24))
    random, bad = np.random.RandomState(0), set()
    for k in range(500):
        way = ("flip", "cut", "huge", "empty", "text", "noise")[k % 6]
        name = f"bad{k}." + ("png" if k % 4 else "jpg")               # half of the suffixes are wrong besides
        (good / name).write_bytes(damage((good / f"{k % 60:03d}.png").read_bytes(), way, random))
        bad.add(name)
    began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pictures = data.load("d", (16, 16))
    kept = set(pictures.names)
    assert {f"{k:03d}.png" for k in range(60)} <= kept                # all good ones
    named = {name for name, _ in pictures.skipped}
    assert kept | named == bad | {f"{k:03d}.png" for k in range(60)} and len(kept - named) == len(pictures.names)
    # A flipped bit may leave a file that decodes; then it is a picture, and nobody can know better.
    assert all(name[3:].split(".")[0].isdigit() and int(name[3:].split(".")[0]) % 6 == 0 for name in kept & bad)
    assert len(kept & bad) < 60
    prepare.main(["d", "--size", "16"])
    report = json.loads(Path("report.json").read_text("utf-8"))
    listed = {entry[0] for entries in report["problems"].values() for entry in entries}
    assert named <= {entry[0] for entry in report["problems"]["unreadable"]} and bad - listed <= kept
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - began < 400_000        # KB; 60000^2 would be 3.6 GB


def test_truncated_files_can_be_kept(here):
    draw(here / "d", 3, (64, 64), suffix=".jpg")
    raw = (here / "d" / "001.jpg").read_bytes()
    (here / "d" / "001.jpg").write_bytes(raw[:len(raw) * 2 // 3])
    assert data.load("d", (16, 16)).names == ["000.jpg", "002.jpg"]
    assert data.load("d", (16, 16), keep_truncated=True).names == ["000.jpg", "001.jpg", "002.jpg"]
    assert data.load("d", (16, 16)).names == ["000.jpg", "002.jpg"]   # the switch does not stay on


def test_draft_decoding_changes_less_than_the_choice_of_a_filter():
    scene = Image.fromarray(data.draw_demo(1, side=64)[0]).resize((512, 512), Image.Resampling.BICUBIC)
    noise = np.random.RandomState(0).normal(0, 6, (512, 512))
    scene = Image.fromarray((np.asarray(scene) + noise).clip(0, 255).astype(np.uint8))
    raw = encoded(scene, "JPEG", quality=92).getvalue()
    drafted, small = data.Preprocess((128, 128)).pixels(raw)
    whole = Image.open(io.BytesIO(raw))
    bicubic, bilinear = (np.asarray(whole.resize((128, 128), f)).astype(float)
                        for f in (Image.Resampling.BICUBIC, Image.Resampling.BILINEAR))
    assert not small and np.abs(drafted - bicubic).mean() < np.abs(bicubic - bilinear).mean()
    cropped, _ = data.Preprocess((128, 128), crop="0.1,0.2,0.9,1").pixels(raw)
    expected = data.crop_and_resize(whole, (128, 128), "crop", (51.2, 102.4, 460.8, 512))
    assert np.abs(cropped - expected.astype(float)).mean() < np.abs(bicubic - bilinear).mean()


@pytest.mark.parametrize("size,channels", [(8, 3), (8, 1), (600, 3)])
def test_memory_of_a_batch_is_used_again_only_when_nobody_holds_it(size, channels):
    images = np.random.RandomState(0).randint(0, 256, (7, channels, size, size)).astype(np.uint8)

    def new():
        return data.batches(images, 4, flip=True)

    expected = [x.clone() for _, x in zip(range(8), new())]
    weight, kept = torch.ones(1, requires_grad=True), []
    for k, x in zip(range(8), new()):
        assert torch.equal(x, expected[k]) and x.is_contiguous(memory_format=torch.channels_last)
        kept.append((x, x[1:], x.numpy(), (x * weight).sum())[k % 4])      # a view, an array, what autograd saved
    for k, x in enumerate(kept):
        if k % 4 == 3:
            assert torch.allclose(torch.autograd.grad(x, weight)[0], expected[k].sum(), rtol=1e-3, atol=1)
        else:
            assert torch.equal(torch.as_tensor(x), expected[k][1 if k % 4 == 1 else 0:])
    addresses = {x.data_ptr() for _, x in zip(range(9), new())}
    assert len(addresses) < 9                                # else nothing would have been tested


def test_near_copies_are_looked_for_when_needed_and_kept(here, monkeypatch):
    draw(here / "d", 12)
    before, calls = prepare.near_pairs, []
    monkeypatch.setattr(prepare, "near_pairs", lambda thumbs: calls.append(len(thumbs)) or before(thumbs))
    data.load("d", (8, 8))
    assert calls == []                                                # nothing is held out
    first = data.load("d", (8, 8), holdout=0.3).names
    assert calls == [12] and data.load("d", (8, 8), holdout=0.3).names == first and calls == [12]
    kept, = Path("runs/.cache").glob("*.alike")
    kept.write_text("[[0,")                                           # cut short: worked out once more
    assert data.load("d", (8, 8), holdout=0.3).names == first and calls == [12, 12]
    (here / "d" / "new.png").write_bytes((here / "d" / "000.png").read_bytes() + b"x")
    data.load("d", (8, 8), holdout=0.3)
    assert calls == [12, 12, 13]


def test_cache_is_built_once_and_follows_the_files(here, monkeypatch):
    draw(here / "d", 5)
    first = np.asarray(data.load("d", (16, 16)).images)
    built = []
    build = data.build
    monkeypatch.setattr(data, "build", lambda *args: (built.append(args), build(*args)))
    assert np.array_equal(np.asarray(data.load("d", (16, 16)).images), first) and not built
    data.load("d", (16, 12))
    assert len(built) == 1                                            # another size is another cache
    Image.new("RGB", (20, 24), "red").save(here / "d" / "002.png")
    os.utime(here / "d" / "002.png", (1, 1))
    changed = np.asarray(data.load("d", (16, 16)).images)
    assert len(built) == 2 and not np.array_equal(changed[2], first[2]) and np.array_equal(changed[3], first[3])


def test_an_interrupted_build_starts_again(here, monkeypatch):
    draw(here / "d", 5)
    decode, calls = data.decode, []

    def fail(recipe, item):
        calls.append(item)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return decode(recipe, item)

    monkeypatch.setattr(data, "decode", fail)
    with pytest.raises(KeyboardInterrupt):
        data.load("d", (16, 16))
    assert not list((here / "runs" / ".cache").glob("*.json"))
    monkeypatch.setattr(data, "decode", decode)
    assert len(data.load("d", (16, 16)).names) == 5


def test_two_folders_are_never_taken_for_one_another(here):
    for name, grey in (("a", 20), ("b", 200)):
        (here / name).mkdir()
        Image.new("L", (8, 8), grey).save(here / name / "x.bmp")
        os.utime(here / name / "x.bmp", (1, 1))
    assert [int(data.load(name, (8, 8)).images[0].mean()) for name in "ab"] == [20, 200]


def test_what_may_pass_is_tried_again(here, monkeypatch):
    draw(here / "d", 3)
    read = data.read_bytes

    def denied(path):
        if path.endswith("001.png"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return read(path)

    monkeypatch.setattr(data, "read_bytes", denied)
    assert data.load("d", (8, 8)).names == ["000.png", "002.png"]
    monkeypatch.setattr(data, "read_bytes", read)
    assert data.load("d", (8, 8)).names == ["000.png", "001.png", "002.png"]


def test_what_will_not_pass_is_not_tried_again(here, monkeypatch):
    draw(here / "d", 3)
    (here / "d" / "dead.png").symlink_to("nowhere.png")
    (here / "d" / "round.png").symlink_to("round.png")
    built, build = [], data.build
    monkeypatch.setattr(data, "build", lambda *args: (built.append(args), build(*args)))
    for _ in range(2):
        pictures = data.load("d", (8, 8))
        assert len(pictures.names) == 3 and "cannot be opened" in pictures.skipped[0][1] and len(built) == 1
    (here / "nowhere.png").write_bytes((here / "d" / "001.png").read_bytes() + b"x")
    (here / "d" / "nowhere.png").symlink_to(here / "nowhere.png")
    assert "dead.png" in data.load("d", (8, 8)).names and len(built) == 2


def test_pairs_that_cannot_be_read_are_named_once(here, monkeypatch):
    for side in "AB":
        draw(here / "two" / side, 6)
    (here / "two/A/001.png").write_bytes((here / "two/A/001.png").read_bytes()[:200])
    (here / "two/A/002.png").unlink()
    Image.fromarray(np.full((20, 24), np.nan, np.float32)).save(here / "two/A/002.tif")
    (here / "two/B/003.png").write_bytes(b"text")
    (here / "two/B/004.png").write_bytes(b"")
    built, build = [], data.build
    monkeypatch.setattr(data, "build", lambda *args: (built.append(args), build(*args)))
    for _ in range(2):
        found, _ = pairs.load_pairs(pair_flags("--data", "two"))
        assert found.names == ["000", "005"] and len(built) == 2      # A and B
        assert {name: why.split()[0] for name, why in found.skipped} == {
            "001": "image", "002": "holds", "003": "not", "004": "the"}
    with pytest.raises(ValueError, match="--limit -3"):
        pairs.load_pairs(pair_flags("--data", "two", "--limit", "-3"))


def test_file_system_without_locks(here):
    """Two processes build at once then, and neither gets in the other's way."""
    pytest.importorskip("fcntl")
    draw(here / "d", 12, mode="L")
    expected = np.asarray(data.load("d", (8, 8)).images)
    code = ("import data, fcntl, glob, os, time\nreplace = os.replace\n"
            "def refuse(*args):\n    raise OSError(38, 'Function not implemented')\n"
            "def together(*args):\n    open(f'here-{os.getpid()}', 'w').close()\n"
            "    for _ in range(2000):\n        time.sleep(0.01 * (len(glob.glob('here-*')) < 2))\n"
            "    replace(*args)\n"
            "fcntl.flock, os.replace = refuse, together\n"
            "print(int(data.load('d', (8, 8), cache='c').images[:].sum()))")
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
                             env={**os.environ, "PYTHONPATH": str(HERE)}) for _ in range(2)]
    assert [process.communicate(timeout=60)[0].strip() for process in both] == [str(expected.sum())] * 2
    assert {path.suffix for path in (here / "c").iterdir()} == {".json", ".lock", ".pixels"}


def test_damaged_exif_hides_no_picture(here):
    (here / "d").mkdir()
    for k, suffix in enumerate(("jpg", "png", "webp")):
        Image.new("RGB", (20, 24), (90 * k, 20, 30)).save(here / "d" / f"{k}.{suffix}", exif=b"Exif\0\0rubbish",
                                                              dpi=(72, 72))
    assert data.load("d", (8, 8)).names == ["0.jpg", "1.png", "2.webp"]
    assert prepare.census(data.find_items("d"), data.Preprocess((8, 8)))[0]["usable"] == 3


def test_window_of_the_target_s_size_is_not_called_small(here):
    draw(here / "d", 2, (100, 100))
    crop = "0.25,0.25,0.57,0.57"                                      # 32 pixels, but for the last of sixteen digits
    assert data.load("d", (32, 32), crop=crop).notes == []
    assert not prepare.census(data.find_items("d"), data.Preprocess((32, 32), crop=crop))[0]["problems"]["small"]
    assert data.load("d", (33, 33), crop=crop).notes


def test_links_to_folders_are_followed_once_in_a_fixed_order(here):
    draw(here / "d" / ".store", 1)
    draw(here / "d" / "c" / "x", 1)
    for name in "bade":
        (here / "d" / name).mkdir()
        (here / "d" / name / "link").symlink_to(here / "d" / "c" / "x", target_is_directory=True)
    (here / "d" / "seen").symlink_to(".store", target_is_directory=True)       # hidden there, not by this name
    assert data.find_images(here / "d") == ["a/link/000.png", "seen/000.png"]


def test_two_lists_worked_out_side_by_side():
    numbers = list(range(100))
    assert list(zip(data.parallel_map(str, numbers), data.parallel_map(abs, numbers))) == [(str(k), k) for k in numbers]


def test_lent_memory_has_the_shape_asked_for():
    lend = data.lend()
    for shape in ((2, 3), (4, 5), (4, 5), (2, 3)):
        assert lend(*shape).shape == shape


@pytest.mark.skipif(sys.platform != "linux", reason="forks as Linux does")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_run_stopped_while_it_reads_leaves_nobody_behind(here, number):
    """Neither workers that hold the lock, nor a wait for all that is under way; the next run begins at once."""
    draw(here / "pictures", 200, (8, 8))
    slow = ("import data, sys, time, train_wgan\npixels = data.Preprocess.pixels\n"
            "def late(*args):\n    time.sleep(0.3); return pixels(*args)\n"
            "data.Preprocess.pixels = late\nimport runtime\nprint('reading', flush=True)\n"
            "runtime.run_main(lambda: train_wgan.main(sys.argv[1:]), 'train_wgan.py')")
    process = subprocess.Popen([sys.executable, "-c", slow, *TINY, "--steps", "1"], stdout=subprocess.PIPE, text=True,
                               stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(HERE)})
    assert process.stdout.readline() == "reading\n"
    for _ in range(300):                                              # until there are workers
        if any(path.read_text("utf-8").split() for path in Path("/proc").glob(f"{process.pid}/task/*/children")):
            break
        time.sleep(0.05)
    time.sleep(0.5)
    began = time.time()
    process.send_signal(number)
    assert process.wait(timeout=20) in (130, -number) and time.time() - began < 10
    train("--steps", "1", "--out", "r")                               # would wait for the lock
    assert checkpoint("r")["step"] == 1


def test_two_processes_at_once_build_once(here):
    draw(here / "d", 30)
    code = ("import data, time\nbuild = data.build\n"
            "def slow(*args):\n    open('built', 'a').write('x'); time.sleep(1.5); build(*args)\n"
            "data.build = slow\nprint(len(data.load('d', (16, 16)).names))")
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
                             env={**os.environ, "PYTHONPATH": str(HERE)}) for _ in range(2)]
    assert [process.communicate()[0].strip() for process in both] == ["30", "30"]
    assert (here / "built").read_text("utf-8") == "x"


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_a_set_larger_than_memory(here):
    """400 MB of pictures in a process that may take 300 MB beyond what importing needs."""
    draw(here / "d", 40, (8, 8), "L")
    for k in range(40, 1600):
        (here / "d" / f"{k:04d}.png").write_bytes((here / "d" / f"{k % 40:03d}.png").read_bytes() + b"%d" % k)
    code = ("import itertools, re, resource, data\n"
            "used = int(re.search(r'VmData:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024\n"
            "resource.setrlimit(resource.RLIMIT_DATA, (used + 300 * 2**20,) * 2)\n"
            "images = data.load('d', (512, 512), channels=1).images\n"
            "total = sum(float(x.mean()) for x in itertools.islice(data.batches(images, 16), 100))\n"
            "print(len(images), images.shape[2], total != 0)")
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                             env={**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1",
                                  "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"})       # freed is gone
    assert process.stdout.strip() == "1600 512 True", process.stderr[-500:]


def test_reading_ahead_keeps_the_order_and_passes_errors_on():
    def read(k):
        if k == 9:
            raise ValueError("no ninth")
        return torch.tensor([k])

    stream = data.read_ahead(read, 5, "cpu")
    assert [int(next(stream)) for _ in range(4)] == [5, 6, 7, 8]
    with pytest.raises(ValueError, match="no ninth"):
        next(stream)


def test_idx_files(here):
    digits = np.random.RandomState(0).randint(0, 256, (6, 28, 28)).astype(np.uint8)
    write_idx(here / "t-images-idx3-ubyte", digits)
    write_idx(here / "t-images-idx3-ubyte.gz", digits)
    for source in ("t-images-idx3-ubyte", "t-images-idx3-ubyte.gz"):
        assert np.array_equal(np.asarray(data.load(source, (28, 28)).images)[:, 0], digits)
    write_idx(here / "u-images-idx3-ubyte", 255 - digits)
    assert data.load(".", (8, 8)).images.shape == (12, 1, 8, 8)       # all, but no .gz of one that is there
    write_idx(here / "digits.idx", digits)
    write_idx(here / "digits.idx.gz", digits)                         # no labels, though it lies beside
    assert len(data.load("digits.idx", (28, 28)).names) == len(data.load("digits.idx.gz", (28, 28)).names) == 6
    assert prepare.census(data.find_items("digits.idx"), data.Preprocess((28, 28)))[0]["bytes"] == digits.nbytes
    write_idx(here / "labels", digits[:, 0, 0])
    write_idx(here / "cut", digits, -5)
    (here / "words.txt").write_text("hello")
    (here / "bad.gz").write_bytes(gzip.compress(b"x" * 99)[:-9])
    (here / "flipped.gz").write_bytes(gzip.compress(b"x" * 99)[:12] + b"\xff" * 20)
    for name, why in (("labels", "6 labels"), ("cut", "cut short"), ("words.txt", "no idx"), ("bad.gz", "damaged"),
                      ("flipped.gz", "damaged")):
        with pytest.raises(ValueError, match=why):
            data.load(name, (8, 8))


def test_an_array_of_no_pictures_is_one_sentence(here):
    np.save("empty.npy", np.zeros((0, 8, 8), np.uint8))
    write_idx(here / "e-images-idx3-ubyte", np.zeros((0, 8, 8), np.uint8))
    for name in ("empty.npy", "e-images-idx3-ubyte"):
        with pytest.raises(ValueError, match=f"--data {name} holds no pictures"):
            data.load(name, (8, 8))


def test_classes_of_folders_and_labels(here):
    digits = np.random.RandomState(0).randint(0, 256, (6, 8, 8)).astype(np.uint8)
    write_idx(here / "t-images-idx3-ubyte", digits)
    write_idx(here / "t-labels-idx1-ubyte", np.array([3, 1, 3, 7, 1, 10], np.uint8))
    threes = data.load("t-images-idx3-ubyte", (8, 8), classes="3")
    assert np.array_equal(np.asarray(threes.images)[:, 0], digits[[0, 2]])
    assert len(data.load("t-images-idx3-ubyte", (8, 8), classes="1, 10").images) == 3
    assert len(data.load(".", (8, 8)).images) == 6
    np.savez(here / "a.npz", x=digits, y=np.array(["cat", "dog", "cat", "cat", "dog", "eel"]))
    assert np.array_equal(np.asarray(data.load("a.npz", (8, 8), classes="dog,eel").images)[:, 0], digits[[1, 4, 5]])
    write_idx(here / "s-images-idx3-ubyte", digits)
    write_idx(here / "s-labels-idx1-ubyte", np.array([3, 1], np.uint8))
    draw(here / "d" / "cats", 3), draw(here / "d" / "dogs" / "small", 4), draw(here / "d", 2)
    assert len(data.load("d", (8, 8)).images) == 9
    assert data.load("d", (8, 8), classes="dogs").names == [f"dogs/small/00{k}.png" for k in range(4)]
    for source, classes, why in (("d", "dog", "--classes dog: d has the classes cats dogs"), ("demo", "1", "no sub-f"),
                                 ("t-images-idx3-ubyte", "30", "has the classes 1 10 3 7"),
                                 ("s-images-idx3-ubyte", "", "6 pictures, and there are 2 labels")):
        with pytest.raises(ValueError, match=why):
            data.load(source, (8, 8), classes=classes)


def test_numpy_arrays(here):
    random = np.random.RandomState(0)
    grey, colour = (random.randint(0, 256, shape).astype(np.uint8) for shape in ((5, 8, 9), (5, 8, 9, 3)))
    colour[0, 0, 0], colour[0, 0, 1] = 0, 255                         # so that the range of the whole is all of it
    half = colour / 127.5 - 1
    for name, array in dict(grey=grey, hwc=colour, chw=colour.transpose(0, 3, 1, 2), one=grey[..., None], half=half,
                            wide=colour.astype(np.uint16) * 257, unit=(colour / 255).astype(np.float32),
                            transparent=np.concatenate([colour, np.full((5, 8, 9, 1), 255, np.uint8)], 3)).items():
        np.save(here / f"{name}.npy", array)
        images = np.asarray(data.load(f"{name}.npy", (8, 9)).images)
        assert np.array_equal(images, grey[:, None] if name in ("grey", "one") else colour.transpose(0, 3, 1, 2)), name
    assert np.asarray(data.load("half.npy", (8, 9), range="-3,1").images).min() == 128
    hurt = half.copy()
    hurt[2, 3, 3] = np.nan
    np.save(here / "hurt.npy", hurt)
    left_out, = data.load("hurt.npy", (8, 9), range="-1,1").skipped
    assert list(left_out) == ["hurt.npy-00002", "holds values that are not finite"]
    np.savez(here / "two.npz", x=np.zeros((5, 2, 28, 20), np.uint8))
    np.save(here / "flat.npy", grey[0])
    np.save(here / "odd.npy", random.rand(2, 5, 6, 7))
    np.save(here / "nan.npy", half * np.nan)
    np.save(here / "words.npy", np.array(["a"]))
    np.savez(here / "statistics.npz", mu=np.zeros(9), sigma=np.eye(9))
    (here / "broken.npz").write_bytes(b"PK no zip")
    for name, why in (("flat.npy", "it has shape"), ("odd.npy", "must be the channels"), ("nan.npy", "not finite"),
                      ("two.npz", r"shape \(5, 2, 28, 20\)"),
                      ("words.npy", "should hold one array"), ("statistics.npz", "sigma has shape"),
                      ("broken.npz", "is damaged")):
        with pytest.raises(ValueError, match=why):
            data.load(name, (8, 9))


def test_demo_is_the_same_everywhere_and_varies():
    first = data.draw_demo(12)
    assert first.shape == (12, 64, 64) and np.array_equal(first, data.draw_demo(12))
    # Origin of the numbers: this function, numpy 2.4.6 on x86-64. A pixel may round otherwise elsewhere, no more.
    assert first.mean() == pytest.approx(94.2255, abs=0.01)
    assert first[3, 20, ::8].tolist() == pytest.approx([64, 124, 167, 135, 83, 92, 97, 161], abs=1)
    assert np.std(first.astype(float), axis=0).mean() > 15 and not np.array_equal(data.draw_demo(12, seed=1), first)


def test_every_picture_once_an_epoch_in_an_order_of_seed_and_epoch():
    images = np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1).repeat(8, 2).repeat(8, 3)
    stream = data.batches(images, 4, seed=1)
    drawn = [plots.to_uint8(next(stream))[:, 0, 0, 0].tolist() for _ in range(10)]
    flat = sum(drawn, [])
    epochs = [flat[10 * k:10 * k + 10] for k in range(4)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and len({tuple(epoch) for epoch in epochs}) == 4
    later = data.batches(images, 4, seed=1, start=7)                  # goes on exactly there
    assert plots.to_uint8(next(later))[:, 0, 0, 0].tolist() == drawn[7]
    assert plots.to_uint8(next(data.batches(images, 4, seed=2)))[:, 0, 0, 0].tolist() != drawn[0]
    assert next(data.batches(images, 25)).shape == (25, 1, 8, 8)      # a batch larger than the set


def test_flip_mirrors_about_half_and_nothing_else():
    images = np.random.RandomState(0).randint(0, 256, (200, 1, 8, 8)).astype(np.uint8)
    plain, flipped = (next(data.batches(images, 200, flip=flip)) for flip in (False, True))
    mirrored = [torch.equal(a.flip(2), b) for a, b in zip(plain, flipped)]
    assert all(m or torch.equal(a, b) for m, a, b in zip(mirrored, plain, flipped)) and 70 < sum(mirrored) < 130


def test_range_conventions():
    every = torch.arange(256, dtype=torch.uint8).repeat(3)[5:]               # an odd number: the vector units' rest too
    x, into = data.to_float(every), torch.empty(len(every))
    assert x.min() == -1 and 1 - 2e-7 < x.max() <= 1 and torch.equal(plots.to_uint8(x), every)
    assert (x - (every.double() / 127.5 - 1)).abs().max() < 2e-7
    assert data.to_float(every, out=into) is into and torch.equal(into, x)
    assert plots.to_uint8(torch.tensor([-7.0, 0.0, 9.0])).tolist() == [0, 128, 255]
