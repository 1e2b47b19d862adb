"""Tests of prepare.py --crop auto on films as scanners write them: frames, side markers, burnt-in text, letterboxes."""

import itertools
import re

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

import prepare
import sources

TEETH = sources.draw_demo(40, seed=3)[:, 9:55]                              # the rows with teeth
TRUTH = np.array([0.27, 0.24, 0.74, 0.77])                                  # left, top, right, bottom


def film(k, dirt, random, height=360, width=736):
    """A radiograph twice as wide as high: teeth amid smooth bone, with grain; where the teeth are, as fractions."""
    scanner = k % 3 if "scanners" in dirt else 0
    height, width = int(height * (1 + 0.2 * scanner)), int(width * (1 - 0.1 * scanner))
    bone = Image.fromarray(random.randint(40, 80, (3, 6)).astype(np.uint8)).resize((width, height), 3)
    shift = np.tile(random.normal(0, 3, 2), 2)
    left, top, right, bottom = (np.tile([width, height], 2) * TRUTH + shift).astype(int)
    teeth = Image.fromarray(TEETH[k % len(TEETH)]).resize((right - left, bottom - top), 3)
    bone.paste(teeth.point(lambda v: 40 + 0.6 * v), (left, top))
    grain = random.normal(0, 5, (height, width))
    im = Image.fromarray((np.asarray(bone) * random.uniform(0.85, 1.15) + grain).clip(0, 255).astype(np.uint8))
    draw, font = ImageDraw.Draw(im), ImageFont.load_default(height / 8)
    if "frame" in dirt:
        draw.rectangle((0, 0, width - 1, height - 1), outline=255, width=5 + 4 * scanner)
    if "marker" in dirt:
        draw.text((width * (0.93 if scanner != 1 else 0.03), height * 0.45), "LRL"[scanner], 250, font)
    if "text" in dirt:
        draw.text((10, 8), "GENERAL HOSPITAL", 240, ImageFont.load_default(height / 20))
    truth = TRUTH
    if "letterbox" in dirt:
        wide = Image.new("L", (width + 120, height))
        wide.paste(im, (60, 0))
        im, truth = wide, (TRUTH * [width, 1, width, 1] + [60, 0, 60, 0]) / [width + 120, 1, width + 120, 1]
    return np.asarray(im), truth


def items(images):
    return [sources.Item(str(k), (), image.copy) for k, image in enumerate(images)]


@pytest.mark.parametrize("dirt", ["", "frame marker", "text", "letterbox marker", "scanners frame marker text"])
def test_the_teeth_are_found_and_not_what_all_films_share(dirt):
    random = np.random.RandomState(len(dirt))
    films, truths = zip(*(film(k, dirt.split(), random) for k in range(30)))
    crop, sure = prepare.find_crop(items(films))
    found = np.array([float(edge) for edge in crop.split(",")])
    assert np.abs(found - truths[0]).max() <= 0.05, (found, truths[0])
    assert re.search("in [678] of 8 random halves", sure) and float(sure.split("R^2 ")[1].split(",")[0]) >= 0.35


def test_no_window_is_guessed():
    random = np.random.RandomState(0)
    noise = random.randint(0, 256, (20, 90, 180)).astype(np.uint8)
    one = film(0, ["frame", "marker"], random)[0]
    for images in (noise, [one] * 10, np.full((10, 60, 60), 90, np.uint8), noise[:7]):
        crop, sure = prepare.find_crop(items(images))
        assert crop == "" and sure
    assert prepare.best_window(torch.ones(16, 16))[1] == prepare.best_window(torch.zeros(16, 16))[1] == 0


def test_best_window_against_all_windows():
    m = torch.rand(12, 12, generator=torch.Generator().manual_seed(1)) * 0.3
    m[3:8, 2:9] += 0.3 + torch.rand(5, 7, generator=torch.Generator().manual_seed(2))
    window, share = prepare.best_window(m)
    background = m.quantile(0.6)
    level, found = (m.clamp(background, 2 * background) / background).numpy(), {}
    for a, b, c, d in itertools.product(range(12), range(12), range(1, 13), range(1, 13)):
        inside = np.zeros((12, 12), bool)
        inside[b:d, a:c] = True
        x, y = level[inside], level[~inside]
        if 0.05 < inside.mean() < 0.95 and x.mean() > y.mean():
            found[a, b, c, d] = 1 - (x.var() * len(x) + y.var() * len(y)) / (level.var() * level.size)
    best = max(found, key=found.get)
    assert tuple(round(12 * edge) for edge in window) == best
    assert share == pytest.approx(found[best], abs=1e-4) and share > 0.3


def test_a_cell_counts_by_its_most_similar_neighbour():
    """Against loops: what two images share is 0, in copies of an image as well; the rest is clipped at 1."""
    random = np.random.RandomState(0)
    fine = random.randint(-40, 40, (6, 64, 64)).astype(np.int16)
    fine[:3, :8], fine[5] = fine[0, :8], fine[4]
    found = prepare.varying_detail(torch.from_numpy(fine), cells=8).numpy()
    cell = fine.reshape(6, 8, 8, 8, 8).transpose(0, 1, 3, 2, 4).reshape(6, 8, 8, 64).astype(float)
    for i in range(6):
        others = [j for j in range(6) if j != i and {i, j} != {4, 5}]
        least = np.min([((cell[i] - cell[j]) ** 2).sum(2) / ((cell[i] - cell[j]) ** 2).sum() for j in others], 0)
        assert found[i] == pytest.approx(np.minimum(1, least / np.quantile(least, 0.7)), abs=1e-4)
    assert (found[:3, 0] == 0).all() and (found[3, 0] > 0).all()


@pytest.mark.parametrize("again, r2, found", [(6, 0.4, True), (5, 0.4, False), (8, 0.34, False)])
def test_how_sure_is_sure(monkeypatch, again, r2, found):
    window = np.array([0.2, 0.3, 0.7, 0.8])
    answers = [(window, r2)] * 3 + [(window + [0.04, 0, 0, -0.04], 1)] * again + [(window + [0, 0.06, 0, 0], 1)] * 8
    monkeypatch.setattr(prepare, "best_window", lambda m: answers.pop(0))
    crop, sure = prepare.find_crop(items(TEETH[:9]))
    assert crop == "0.184,0.284,0.716,0.816" * found and f"in {again} of 8" in sure and f"R^2 {r2}" in sure
