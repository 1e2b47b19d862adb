"""Tests of prepare.py."""

import errno
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

import data
import decode
import prepare
import sources
from conftest import draw, mistake, write_idx

SMALL = decode.Preprocess((16, 16))


def test_median_and_non_local_means():
    random = np.random.RandomState(0)
    clean = np.full((40, 40), 60.0)
    clean[:, 20:] = 180
    noisy = Image.fromarray((clean + random.normal(0, 12, clean.shape)).clip(0, 255).astype(np.uint8))
    x = np.asarray(noisy).astype(int)
    median = np.asarray(prepare.denoise(noisy, "median"))
    assert all(median[i, j] == np.median(x[i - 1:i + 2, j - 1:j + 2]) for i in range(1, 39) for j in range(1, 39))
    out = np.asarray(prepare.denoise(noisy, "nlm")).astype(float)
    before, after = ((np.asarray(im) - clean).std() for im in (noisy, out))
    assert after < 0.45 * before and out[:, 21].mean() - out[:, 18].mean() > 110       # less noise, and still an edge
    s = math.sqrt(math.pi / 2) / 6 * np.mean([abs(sum(
        weight * x[i + a, j + b] for (a, b), weight in {(-1, -1): 1, (-1, 0): -2, (-1, 1): 1, (0, -1): -2, (0, 0): 4,
                                                        (0, 1): -2, (1, -1): 1, (1, 0): -2, (1, 1): 1}.items()))
        for i in range(1, 39) for j in range(1, 39)])
    for i, j in ((17, 14), (17, 19), (18, 20), (30, 21), (9, 25)):    # pixels by the formula, at the edge and off it
        patch, top, below = x[i - 1:i + 2, j - 1:j + 2], 0.0, 0.0
        for a in range(i - 5, i + 6):
            for b in range(j - 5, j + 6):
                d = ((x[a - 1:a + 2, b - 1:b + 2] - patch) ** 2).mean()
                w = math.exp(-max(0, d - 2 * s * s) / (0.8 * s) ** 2)
                top, below = top + w * x[a, b], below + w
        assert out[i, j] == pytest.approx(top / below, abs=0.51)
    flat = Image.new("RGB", (20, 20), "red")
    assert prepare.denoise(flat, "nlm").tobytes() == flat.tobytes()
    colour = Image.merge("RGB", [noisy, noisy.rotate(90), noisy.rotate(180)])
    filtered = np.asarray(prepare.denoise(colour, "nlm")).astype(float)
    assert np.abs(filtered[..., 0] - clean)[:, [5, 30]].mean() < 5 and np.abs(filtered[..., 2] - clean).mean() > 50


def blobs(k, size=(64, 64)):
    """A smooth image that differs for each k: no near copy of another."""
    coarse = np.random.RandomState(k).randint(0, 256, (6, 6)).astype(np.uint8)
    return Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC)


def saved(folder, **images):
    folder.mkdir(parents=True, exist_ok=True)
    for name, im in images.items():
        im.save(folder / f"{name}.png")


def pngs(folder):
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*.png"))


def problems_of(report):
    return {kind: [entry[0] for entry in entries]
            for kind, entries in json.loads(Path(report).read_text("utf-8"))["problems"].items()}


def test_crop_auto_finds_where_the_detail_is(here, capsys):
    random = np.random.RandomState(0)
    (here / "d").mkdir()
    for k in range(12):
        image = np.full((100, 160), 90, np.uint8)
        dx = 8 * (k % 3 - 1)
        image[30:80, 50 + dx:110 + dx] = random.randint(0, 256, (50, 60))
        Image.fromarray(image).save(here / "d" / f"{k:02d}.png")
    prepare.main("d --size 16 --crop auto --out c --keep-copies".split())
    crop = re.search(r"^    --crop ([\d.,]+)$", capsys.readouterr().out, re.M)[1]     # the line to copy
    window = [float(v) for v in crop.split(",")]
    assert window == pytest.approx([42 / 160 - 0.04, 0.26, 118 / 160 + 0.04, 0.84], abs=0.06)
    trained = data.load("d", (16, 16), crop=crop)
    assert [f"{name[:-4]}.png" for name in trained.names] == pngs("c")
    assert all(np.array_equal(image[0], np.asarray(Image.open(here / "c" / name)))
               for image, name in zip(np.asarray(trained.images), pngs("c")))
    (here / "e").mkdir()
    (here / "e" / "a.png").write_text("words")
    for flags in ("e --crop auto", "e"):
        assert "none of the 1 files" in mistake(capsys, lambda flags=flags: prepare.main(flags.split()))


def test_near_pairs_against_all_pairs():
    random = np.random.RandomState(0)
    thumbs = random.randint(20, 236, (80, 16, 17))
    for k, (noise, share) in enumerate(((2, 1), (9, 1), (40, 1), (90, 1), (200, 0.05), (0, 1))):
        change = random.randint(-noise, noise + 1, (16, 17)) * (random.rand(16, 17) < share)
        thumbs[70 - 7 * k] = (thumbs[k + 72] + change).clip(0, 255)   # near copies, and images that are not quite
    thumbs[60], thumbs[79] = thumbs[72], thumbs[72] + 1               # four of one group
    thumbs[3], thumbs[50] = 90, 90                                    # blank ones are no pair
    thumbs, expected = thumbs.astype(np.uint8), []
    for i in range(80):
        for j in range(i + 1, 80):
            bits = ((np.diff(thumbs[i].astype(int)) > 0) != (np.diff(thumbs[j].astype(int)) > 0)).sum()
            if bits <= 24 and min(thumbs[i].std(), thumbs[j].std()) > 1 and \
                    np.corrcoef(thumbs[i].ravel(), thumbs[j].ravel())[0, 1] >= 0.985:
                expected.append((i, j))
    assert {(60, 70), (60, 72), (70, 72), (72, 79)} <= set(expected) and 8 <= len(expected) < 12
    first = {j: i for i, j in reversed(expected)}                     # each with the first image it is a copy of
    assert prepare.near_pairs(thumbs) == sorted((i, j) for j, i in first.items())
    assert prepare.near_pairs(thumbs[:1]) == prepare.near_pairs(thumbs[:0]) == []


def test_images_that_are_mostly_blank_are_no_near_copies(here):
    dots = np.zeros((300, 64, 64), np.uint8)
    for k, (y, x) in enumerate(np.random.RandomState(1).randint(2, 60, (300, 2))):
        dots[k, y:y + 4, x:x + 4] = 255
    np.save("dots.npy", dots)
    assert len(prepare.census(sources.find_items("dots.npy"), SMALL)[0]["problems"]["near duplicate"]) < 30


def test_images_of_half_or_twice_the_pixels_are_odd(here):
    draw(here / "d", 12, (100, 200))
    for name, size in ("half", (70, 140)), ("twice", (142, 284)), ("near", (95, 190)):
        draw(here / "d" / name, 1, size)
    report, _ = prepare.census(sources.find_items("d"), SMALL)
    assert [name for name, why in report["problems"]["odd"] if "Mpixel" in why] == ["half/000.png", "twice/000.png"]
    padded = decode.Preprocess((150, 150), "pad")                     # shrunk, all but the "half"
    assert prepare.census(sources.find_items("d"), padded)[0]["problems"]["small"] == [("half/000.png", "70x140")]


def test_census_of_a_folder_with_everything_wrong(here, capsys):
    draw(here / "d", 12, (40, 40))
    scene = Image.fromarray(sources.draw_demo(1)[0])
    scene.save(here / "d" / "scene.png")
    scene.resize((90, 90)).save(here / "d" / "scene-again.jpg", quality=85)
    (here / "d" / "copy.png").write_bytes((here / "d" / "003.png").read_bytes())
    Image.new("L", (40, 40), 7).save(here / "d" / "blank.png")
    Image.fromarray(np.random.RandomState(1).randint(0, 256, (40, 400)).astype(np.uint8)).save(here / "d" / "wide.png")
    draw(here / "d" / "small", 1, (9, 9))
    (here / "d" / "text.png").write_text("words")
    scene.convert("RGB").save(here / "d" / "liar.png", "JPEG")
    before = {path: path.read_bytes() for path in (here / "d").rglob("*") if path.is_file()}
    prepare.main(["d", "--size", "32"])
    assert os.listdir(here) == ["d"]                                  # it only prints
    prepare.main(["d", "--size", "32", "--report", "r/report.json"])
    out, problems = capsys.readouterr().out, problems_of("r/report.json")
    assert problems["unreadable"] == ["text.png"] and problems["blank"] == ["blank.png"]
    assert problems["exact duplicate"] == ["copy.png"] and problems["small"] == ["small/000.png"]
    assert problems["wrong suffix"] == ["liar.png"] and problems["odd"].count("wide.png") == 1
    assert problems["near duplicate"] == ["scene-again.jpg", "scene.png"]
    assert all(word in out for word in ("20 files", "19 can be used", "near duplicate", "text.png", "report.json"))
    flags = "d --size 32 --out clean --crop 0.1,0,0.9,1".split()
    prepare.main([*flags, "--preview", "r/preview.png"])
    assert sorted(path.name for path in (here / "r").iterdir()) == ["preview.png", "report.json"]
    out = capsys.readouterr().out
    assert "left out 6: " in out and "2 near duplicate" in out
    assert out.endswith("    python train_wgan.py --data clean --size 32\n")
    assert pngs("clean") == sorted([f"{k:03d}.png" for k in range(12)] + ["liar.png", "wide.png"])
    prepare.main([*flags, "--keep-copies"])
    assert "wrote 2 images to clean (14 more were there already)" in capsys.readouterr().out
    prepare.main([*flags, "--keep-copies", "--keep-small"])
    expected = [f"{k:03d}.png" for k in range(12)] + ["liar.png", "scene-again.png", "scene.png", "wide.png"]
    assert pngs("clean") == sorted([*expected, "small/000.png"])
    assert all(Image.open(here / "clean" / name).size == (32, 32) for name in pngs("clean"))
    trained = data.load("d", (32, 32), crop="0.1,0,0.9,1")
    row = trained.names.index("scene.png")
    assert np.array_equal(np.asarray(Image.open(here / "clean" / "scene.png")).transpose(2, 0, 1),
                          np.asarray(trained.images)[row])            # as training would see it
    first = {path: path.read_bytes() for path in (here / "clean").rglob("*") if path.is_file()}
    (here / "clean" / "005.png").unlink()
    capsys.readouterr()
    prepare.main([*flags, "--keep-copies", "--keep-small"])
    assert "wrote 1 images to clean (16 more were there already)" in capsys.readouterr().out
    assert first == {path: path.read_bytes() for path in (here / "clean").rglob("*") if path.is_file()}
    prepare.main(flags)
    assert "clean also holds 3 images that are not of this run" in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in (here / "d").rglob("*") if path.is_file()}


def test_an_interrupted_run_goes_on(here, monkeypatch, capsys):
    saved(here / "d", **{f"i{k}": blobs(k) for k in range(5)})
    save = Image.Image.save

    def stop(im, path):
        save(im, path)
        if path.name == "i2.png":                                     # as far as it fits
            path.write_bytes(path.read_bytes()[:99])
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Image.Image, "save", stop)
    monkeypatch.setattr(data, "parallel_map", map)
    assert "No space left" in mistake(capsys, lambda: prepare.main("d --out c".split()))
    manifest = here / "c" / "manifest.jsonl"
    assert len(manifest.read_text().splitlines()) == 2 and pngs("c") == ["i0.png", "i1.png", "i2.png"]
    manifest.write_text(manifest.read_text()[:-9])                    # its last line was cut off too
    monkeypatch.setattr(Image.Image, "save", save)
    prepare.main("d --out c".split())
    assert "wrote 4 images to c (1 more were there already)" in capsys.readouterr().out
    prepare.main("d --out whole".split())
    assert manifest.read_text() == (here / "whole" / "manifest.jsonl").read_text()
    assert all((here / "c" / name).read_bytes() == (here / "whole" / name).read_bytes() for name in pngs("whole"))
    prepare.main("d --out c --fit pad".split())                       # other settings: all of them are made again
    assert "wrote 5 images to c (0 more" in capsys.readouterr().out


@pytest.mark.parametrize("flags, words", [
    ("nowhere", "no such folder"), ("d --out d/inside", "choose a place beside"), ("d --out .", "or contains it"),
    ("d --preview d/p.png", "choose a place beside"), ("d --preview p.bmp", "--preview: expected a file name"),
    ("d --report d/r.json", "choose a place beside"), ("d --size big", "--size"), ("d --crop 7", "LEFT,TOP"),
    ("d --out c --size 64", "--keep-small keeps those"), ("d --size 0", "HEIGHTxWIDTH (288x512), got '0'"),
    ("d --limit -3", "--limit"), ("d --limit 0", "--limit"), ("d --background no", "--background: expected a colour"),
    ("d --range 9,3", "--range: expected LOW,HIGH"), ("d --range 9", "--range: expected"), ("", "FOLDER"),
    ("d --crop auto-each", "got 'auto-each'"),
    ("d --report README.md", "--report: expected a file name that ends in .json"),
    ("d --out mine --size 16", "--out mine holds files from elsewhere"),
    ("d --out other --size 16", "--out other holds files from elsewhere"),
    ("d/000.png --preview d/000.png", "choose a place beside"),
    ("d --keep-copy", "did you mean --keep-copies?")])
def test_user_errors(here, capsys, flags, words):
    draw(here / "d", 3), draw(here / "mine", 1)
    np.save("a.npy", np.zeros((3, 8, 8)))
    (here / "other").mkdir()
    (here / "other" / "manifest.jsonl").write_bytes('{"text": "légende"}\n'.encode("latin-1"))
    assert words in mistake(capsys, lambda: prepare.main(flags.split()))


def test_clean_keeps_the_names_of_different_files_apart(here):
    for k, name in enumerate(("a.jpg", "a.png", "a.jpg.png", "b.png")):
        (here / "d").mkdir(exist_ok=True)
        Image.fromarray(np.random.RandomState(k).randint(0, 256, (20, 20)).astype(np.uint8)).save(here / "d" / name)
    Image.new("L", (1, 1)).save(here / "d" / "speck.png")
    prepare.main("d --size 16 --out c --report r.json".split())
    assert json.loads(Path("r.json").read_text())["problems"]["unreadable"] == [["speck.png", "only 1x1 pixels"]]
    assert pngs("c") == ["a.jpg.png", "a.jpg.png.png", "a.png.png", "b.png"]


def test_a_small_copy_does_not_replace_a_large_image(here):
    saved(here / "d", a=blobs(1, (20, 20)), b=blobs(1, (64, 64)), c=blobs(1, (80, 80)), d=blobs(2))
    for flags in ("", "--keep-small"):
        prepare.main(f"d --size 32 --out c{flags} --report r.json {flags}".split())
        assert pngs(f"c{flags}") == ["b.png", "d.png"]
        assert problems_of("r.json")["near duplicate"] == ["a.png", "c.png"]


def test_channels_are_decided_for_the_set(here, capsys):
    def modes(flags):
        out = f"c{flags.replace(' ', '')}"
        prepare.main(f"d --size 32 --out {out} {flags}".split())
        return {Image.open(path).mode for path in (here / out).glob("*.png")}

    tint = Image.merge("RGB", [blobs(1), blobs(1).point(lambda v: min(255, v + 9)), blobs(1)])
    saved(here / "d", grey=blobs(0), tint=tint)
    assert modes("") == {"L"}                                         # the tint is too faint to count
    assert np.array_equal(np.asarray(Image.open(here / "c" / "tint.png")),
                          np.asarray(data.load("d", (32, 32)).images)[1, 0])
    saved(here / "d", colour=Image.merge("RGB", [blobs(2), blobs(3), blobs(4)]))
    assert modes("--fit squash") == {"RGB"} and modes("--channels 1") == {"L"}
    capsys.readouterr()
    assert modes("--channels 3 --limit 1") == {"RGB"}
    assert "--size 32 --channels 3\n" in capsys.readouterr().out      # auto would make it grey
    saved(here / "d", colour=Image.merge("RGB", [blobs(k, (16, 16)) for k in (2, 3, 4)]))
    assert modes("--fit pad") == {"L"}                                # what is left out decides nothing


def test_background_range_and_denoise(here):
    clear = blobs(0).convert("RGBA")
    clear.putalpha(Image.new("L", clear.size, 0))
    clear.putpixel((0, 0), (0, 0, 0, 255))
    clear.paste((0, 0, 0, 255), (0, 0, 16, 16))
    ramp = Image.fromarray(np.tile(np.linspace(300, 4000, 64).astype(np.uint16), (64, 1)))
    noisy = Image.fromarray(np.random.RandomState(0).randint(90, 130, (64, 64)).astype(np.uint8))
    saved(here / "d", clear=clear, noisy=noisy, ramp=ramp)
    noisy.convert("RGB").save(here / "d" / "rgb.png")

    def pixels(name, flags):
        prepare.main(f"d --out c --keep-copies --size 64 {flags}".split())
        return np.asarray(Image.open(here / "c" / f"{name}.png"))

    assert pixels("clear", "")[40, 40] == 255 and pixels("clear", "--background #404040")[40, 40] == 0x40
    assert np.ptp(pixels("ramp", "")) == 255
    assert pixels("ramp", "--range 0,4095")[0, [0, -1]].tolist() == [round(300 / 4095 * 255), round(4000 / 4095 * 255)]
    np.save("grey.npy", np.linspace(0, 100, 64 * 64, dtype=np.float32).reshape(1, 64, 64))
    prepare.main("grey.npy --size 64 --out g --range 0,400".split())
    assert np.asarray(Image.open(here / "g" / pngs("g")[0])).max() == 64
    for method in ("median", "nlm"):
        expected = np.asarray(prepare.denoise(noisy, method))
        assert np.array_equal(pixels("noisy", f"--denoise {method}"), expected)
        assert np.array_equal(pixels("rgb", f"--denoise {method}"), expected)
        assert np.array_equal(pixels("rgb", f"--denoise {method} --channels 3"), np.repeat(expected[..., None], 3, 2))
    colour = Image.merge("RGB", [noisy, blobs(1), blobs(2)])
    assert np.array_equal(prepare.Preprocess((64, 64), denoise="median").upright(colour),
                          prepare.denoise(colour, "median"))
    scene = Image.fromarray(sources.draw_demo(1)[0]).resize((256, 256))
    scene.save(here / "scene.jpg", quality=95)
    raw, whole = (here / "scene.jpg").read_bytes(), prepare.Preprocess((64, 64), channels="1", denoise="median")
    assert np.array_equal(whole.pixels(raw)[0], decode.crop_and_resize(      # never decoded at a reduced size
        prepare.denoise(Image.open(here / "scene.jpg"), "median"), (64, 64)))


def test_truncated_files_can_be_kept(here, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)    # and again for the tests that follow
    draw(here / "d", 3, (64, 64), suffix=".jpg")
    raw = (here / "d" / "001.jpg").read_bytes()
    (here / "d" / "001.jpg").write_bytes(raw[:len(raw) * 2 // 3])
    for flags, names in (("--keep-truncated", ["000.png", "001.png", "002.png"]), ("", ["000.png", "002.png"])):
        prepare.main(f"d --size 16 --out c{flags} {flags}".split())
        assert pngs(f"c{flags}") == names


def test_the_census_finds_unreadable_what_training_does(here):
    draw(here / "d", 8, (24, 24), suffix=".jpg")
    random = np.random.RandomState(0)
    for k in range(40):
        raw = bytearray((here / "d" / f"00{k % 8}.jpg").read_bytes())
        for place in random.randint(8, len(raw), 20 * (k % 2)):
            raw[place] ^= 1 << random.randint(8)
        (here / "d" / f"bad{k}.{'jpg' if k % 4 else 'png'}").write_bytes(raw[:random.randint(1, 2 * len(raw))])
    Image.new("RGB", (20, 24), "red").save(here / "d" / "exif.png", exif=b"Exif\0\0rubbish")
    report, files = prepare.census(sources.find_items("d"), SMALL)
    unreadable = dict(report["problems"]["unreadable"])
    loaded = data.load("d", (16, 16))
    assert 10 < len(unreadable) < 40 and "exif.png" not in unreadable
    assert unreadable == {name: why for name, why in loaded.skipped if not why.startswith("an exact copy")}
    assert report["usable"] == len(files) - len(unreadable)


def test_sizes_after_turning_and_cropping(here):
    draw(here / "d", 2, (100, 100))
    crop = "0.25,0.25,0.57,0.57"                                      # 32 pixels, but for the last of sixteen digits
    for side, small in ((32, 0), (33, 2)):
        report, _ = prepare.census(sources.find_items("d"), decode.Preprocess((side, side), crop=crop))
        assert len(report["problems"]["small"]) == small
    exif = Image.Exif()
    exif[0x0112] = 6                                                  # lies on its side
    blobs(1, (20, 40)).save(here / "d" / "turned.jpg", exif=exif)
    report, _ = prepare.census(sources.find_items("d"), SMALL)
    assert report["sizes"] == {"100x100": 2, "40x20": 1}


def test_arrays_and_classes(here, capsys):
    digits = np.random.RandomState(0).randint(0, 256, (6, 28, 28)).astype(np.uint8)
    write_idx(here / "t-images-idx3-ubyte", digits)
    write_idx(here / "t-labels-idx1-ubyte", np.array([3, 1, 3, 7, 1, 10], np.uint8))
    report, _ = prepare.census(sources.find_items("t-images-idx3-ubyte"), SMALL)
    assert report["bytes"] == digits.nbytes and report["formats"] == {"array": 6}
    prepare.main("t-images-idx3-ubyte --classes 3,7 --size 28 --out c".split())
    assert {Path(name).parent.name for name in pngs("c")} == {"3", "7"} and len(pngs("c")) == 3
    assert np.array_equal(np.asarray(Image.open(sorted((here / "c" / "3").iterdir())[0])), digits[0])


def test_preview_draws_the_crop_on_the_originals(here):
    grey = Image.fromarray(np.repeat(np.linspace(60, 90, 100)[None], 50, 0).astype(np.uint8))
    saved(here / "d", **{f"i{k}": grey for k in range(60)})
    yellow, green = (255, 200, 0), (0, 220, 120)
    for flags, colours in (("--crop 0.1,0.2,0.9,0.8 --size 32", (yellow, green)), ("--fit pad", (yellow,))):
        prepare.main(f"d --preview p.png {flags}".split())
        im = Image.open(here / "p.png")
        assert im.size == (8 * 164 + 4, 6 * 164 + 4)                  # 48 of them
        found = {colour for _, colour in im.getcolors(1 << 20)}
        assert {colour for colour in (yellow, green) if colour in found} == set(colours)
    prepare.main("d --crop 0.1,0.2,0.9,0.8 --size 32 --preview p.png".split())
    tile = np.asarray(Image.open(here / "p.png"))[4:164, 4:164].astype(int)
    marked = np.argwhere((tile == yellow).all(2))                     # 160 x 80, in the middle of 160 x 160
    assert marked.min(0).tolist() == pytest.approx([40 + 16, 16], abs=1)
    assert marked.max(0).tolist() == pytest.approx([40 + 63, 143], abs=1)
    marked = np.argwhere((tile == green).all(2))
    assert marked.min(0).tolist() == pytest.approx([40 + 16, 80 - 24], abs=1)
