"""Tests of prepare.py --crop auto on films as scanners write them: frames, side markers, burnt-in text, letterboxes."""

import itertools
import re

import numpy as np
import pytest
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
    assert re.search("[678] of 8 halves", sure) and int(sure.split("%")[0].split()[-1]) >= 30


def test_no_window_is_guessed():
    random = np.random.RandomState(0)
    noise = random.randint(0, 256, (20, 90, 180)).astype(np.uint8)
    one = film(0, ["frame", "marker"], random)[0]
    for images in (noise, [one] * 10, np.full((10, 60, 60), 90, np.uint8), noise[:3]):
        crop, sure = prepare.find_crop(items(images))
        assert crop == "" and sure
    assert prepare.best_window(np.ones((16, 16)))[1] == prepare.best_window(np.zeros((16, 16)))[1] == 0


def test_best_window_against_all_windows():
    random = np.random.RandomState(1)
    m = random.rand(12, 12) * 0.3
    m[3:8, 2:9] += random.rand(5, 7)
    m[:, 11] = 0
    window, share = prepare.best_window(m)
    level, found = np.maximum(0, m - np.median(m)), {}
    for a, b, c, d in itertools.product(range(12), range(12), range(1, 13), range(1, 13)):
        inside = np.zeros((12, 12), bool)
        inside[b:d, a:c] = True
        x, y = level[inside], level[~inside]
        if 0.02 < inside.mean() < 0.95 and x.mean() > y.mean():
            found[a, b, c, d] = 1 - (x.var() * len(x) + y.var() * len(y)) / (level.var() * level.size)
    best = max(found, key=found.get)
    assert tuple(round(12 * edge) for edge in window) == best and share == pytest.approx(found[best]) and share > 0.3
