"""Tests of plots.py."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

import plots


def test_grid_has_a_fixed_range(here):
    x = torch.zeros(5, 1, 4, 6)
    x[1] = 0.1
    grid_image = np.asarray(plots.grid(x, columns=3, pad=2))
    assert grid_image.shape == (2 * 6 + 2, 3 * 8 + 2)
    plots.save_grid("grid_image.png", x, columns=3)
    assert Image.open("grid_image.png").size == (26 * 4, 14 * 4)           # small ones are shown larger
    assert (grid_image[2:6, 2:8] == 128).all() and (grid_image[2:6, 10:16] == 140).all()         # 0.1 is 140, not white
    assert np.asarray(plots.grid(torch.ones(2, 3, 4, 4))).shape == (8, 14, 3)


def test_gif_has_a_frame_a_grid_and_its_step(here):
    for k in range(4):
        plots.save_grid(here / f"step-{k:03d}.png", torch.full((4, 1, 8, 8), k / 4))
    (here / "step-copy.png").write_bytes((here / "step-000.png").read_bytes())        # no grid_image of the run's
    plots.save_gif("p.gif", here)
    with Image.open("p.gif") as gif, Image.open("step-000.png") as grid_image:
        assert gif.n_frames == 4 and gif.size == (grid_image.width, grid_image.height + 24)
        labels, shades, times = [], [], []
        for k in range(4):
            gif.seek(k)
            frame = np.asarray(gif.convert("L"))
            labels.append(frame[grid_image.height:].tobytes())
            shades.append(int(frame[12, 12]))
            times.append(gif.info["duration"])
    assert shades == sorted(shades) and times == [500, 500, 500, 2000]
    assert len(set(labels)) == 4                                      # the written steps differ


def test_curves_are_drawn(here):
    rows = [{"step": k, "loss_D": math.sin(k / 5), **({"loss_G": 2.0} if k % 3 else {})} for k in range(50)]
    rows[7]["now_and_then"] = 3.0
    rows += [{"step": 50, "loss_D": math.nan}, {"step": 51, "loss_D": math.inf}]
    plots.save_curves("c.png", rows, [("two", ("loss_D", "loss_G")), ("one", ("now_and_then",)), ("none", ("x",))])
    chart = np.asarray(Image.open("c.png"))
    assert chart.shape == (600, 900, 3)                               # a chart without values is left away
    plots.save_curves("c.png", [], [("none", ("x",))])
    assert (chart == (31, 119, 180)).all(2).sum() > 500 and (chart == (214, 69, 65)).all(2).sum() > 500
    assert plots.ticks(0.3, 9.7) == [2, 4, 6, 8] and plots.ticks(-1, 1) == pytest.approx([-1, -0.5, 0, 0.5, 1])
