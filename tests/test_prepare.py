"""Tests of prepare.py."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
import prepare
import sources
from conftest import draw, mistake


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
    i, j, top, below = 17, 14, 0.0, 0.0                               # one pixel by the formula
    patch = x[i - 1:i + 2, j - 1:j + 2]
    for a in range(i - 5, i + 6):
        for b in range(j - 5, j + 6):
            d = ((x[a - 1:a + 2, b - 1:b + 2] - patch) ** 2).mean()
            w = math.exp(-max(0, d - 2 * s * s) / (0.8 * s) ** 2)
            top, below = top + w * x[a, b], below + w
    assert out[i, j] == pytest.approx(top / below, abs=0.51)
    flat = Image.new("RGB", (20, 20), "red")
    assert prepare.denoise(flat, "nlm").tobytes() == flat.tobytes()


def test_crop_auto_finds_where_the_detail_is(here):
    random = np.random.RandomState(0)
    (here / "d").mkdir()
    for k in range(12):
        picture = np.full((100, 160), 90, np.uint8)
        dx = 8 * (k % 3 - 1)
        picture[30:80, 50 + dx:110 + dx] = random.randint(0, 256, (50, 60))
        Image.fromarray(picture).save(here / "d" / f"{k}.png")
    pictures = data.load("d", (16, 16), crop="auto")
    window = [float(v) for v in re.search(r"window ([\d.,]+)", pictures.notes[0])[1].split(",")]
    assert window == pytest.approx([42 / 160 - 0.04, 0.26, 118 / 160 + 0.04, 0.84], abs=0.06)
    assert np.array_equal(pictures.images, data.load("d", (16, 16), crop=",".join(map(str, window))).images)
    one = prepare.move_window(Image.open(here / "d" / "0.png"), (50 / 160, 0.3, 110 / 160, 0.8))
    other = prepare.move_window(Image.open(here / "d" / "2.png"), (50 / 160, 0.3, 110 / 160, 0.8))
    assert one[0] == pytest.approx(42 / 160, abs=0.02) and other[0] == pytest.approx(58 / 160, abs=0.02)
    assert not np.array_equal(data.load("d", (16, 16), crop="auto-each").images, pictures.images)
    stays = 0.2, 0.3, 0.6, 0.7                                        # where there is nothing to choose by
    assert prepare.move_window(Image.new("L", (100, 100), 128), stays) == pytest.approx(stays, abs=0.01)
    assert prepare.richest_window(np.ones((64, 64))) == prepare.richest_window(np.zeros((64, 64))) == (0, 0, 1, 1)


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
    prepare.main(["d", "--size", "32", "--report", "r"])
    out = capsys.readouterr().out
    problems = {kind: [entry[0] for entry in entries] for kind, entries in
                json.loads((here / "r" / "report.json").read_text("utf-8"))["problems"].items()}
    assert problems["unreadable"] == ["text.png"] and problems["blank"] == ["blank.png"]
    assert problems["exact duplicate"] == ["copy.png"] and problems["small"] == ["small/000.png"]
    assert problems["wrong suffix"] == ["liar.png"] and "wide.png" in problems["odd"]
    assert {"scene.png", "scene-again.jpg"} & set(problems["near duplicate"])
    assert all(word in out for word in ("20 files", "19 can be used", "near duplicate", "text.png", "report.json"))
    assert Image.open(here / "r" / "sheet.png").width > 400
    prepare.main(["d", "--size", "32", "--report", "r", "--out", "clean", "--crop", "0.1,0,0.9,1", "--preview"])
    assert (here / "r" / "preview.png").exists()
    names = sorted(str(path.relative_to(here / "clean")) for path in (here / "clean").rglob("*.png"))
    others = ["liar.png", "scene-again.png", "scene.png", "wide.png"]
    assert names == sorted([f"{k:03d}.png" for k in range(12)] + others)
    assert all(Image.open(here / "clean" / name).size == (32, 32) for name in names)
    trained = data.load("d", (32, 32), crop="0.1,0,0.9,1")
    row = trained.names.index("scene.png")
    assert np.array_equal(np.asarray(Image.open(here / "clean" / "scene.png")).transpose(2, 0, 1),
                          np.asarray(trained.images)[row])            # as training would see it
    first = {path: path.read_bytes() for path in (here / "clean").rglob("*") if path.is_file()}
    (here / "clean" / "005.png").unlink()
    capsys.readouterr()
    prepare.main(["d", "--size", "32", "--report", "r", "--out", "clean", "--crop", "0.1,0,0.9,1"])
    assert "wrote 1 pictures to clean (15 more were there already)" in capsys.readouterr().out
    assert first == {path: path.read_bytes() for path in (here / "clean").rglob("*") if path.is_file()}
    assert before == {path: path.read_bytes() for path in (here / "d").rglob("*") if path.is_file()}


@pytest.mark.parametrize("flags, words", [("nowhere", "no such folder"), ("d --out d/inside", "take a folder beside"),
                                          ("d --size big", "write one number"), ("d --crop 7", "write LEFT"),
                                          ("d --out c --size 64", "--keep-small lets those"),
                                          ("d --size 0", "at least one pixel"),
                                          ("d --limit -3", "a number of pictures")])
def test_mistakes_with_data_py(here, capsys, flags, words):
    draw(here / "d", 3)
    assert words in mistake(capsys, lambda: prepare.main(flags.split()))


def test_clean_keeps_the_names_of_different_files_apart(here):
    for k, name in enumerate(("a.jpg", "a.png", "a.jpg.png", "b.png")):
        (here / "d").mkdir(exist_ok=True)
        Image.fromarray(np.random.RandomState(k).randint(0, 256, (20, 20)).astype(np.uint8)).save(here / "d" / name)
    Image.new("L", (1, 1)).save(here / "d" / "speck.png")
    prepare.main(["d", "--size", "16", "--out", "c"])
    report = json.loads(Path("report.json").read_text("utf-8"))
    assert report["problems"]["unreadable"] == [["speck.png", "only 1x1 pixels"]]     # as `load` says
    assert {path.name for path in (here / "c").glob("*.png")} == {"a.jpg.png", "a.png.png", "a.jpg.png.png", "b.png"}
