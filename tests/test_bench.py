"""Tests of bench.py."""

import argparse
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

import bench
import gan
from conftest import LOADER, draw, mistake


def test_bench_counts_operations():
    x, layer = torch.randn(3, 2, 9, 9, requires_grad=True), nn.Conv2d(2, 5, 4, 2, 1)
    product = 2 * 3 * 5 * 4 * 4 * 2 * 4 * 4                           # multiply and add, for each output and weight
    with bench.Operations() as forward:
        y = layer(x).sum()
    with bench.Operations() as backward:
        y.backward()
    assert forward.total == product and backward.total == 2 * product          # by x, and by the weights
    with bench.Operations() as matrix:
        torch.randn(3, 4) @ torch.randn(4, 5)
    assert matrix.total == 2 * 3 * 4 * 5
    count = {(method, batch): bench.step_operations(method, argparse.Namespace(features=4, batch=batch), 16)
             for method in ("dcgan", "wgan") for batch in (8, 16)}
    assert count["wgan", 16] == 2 * count["wgan", 8] and count["dcgan", 16] == 2 * count["dcgan", 8]
    D_with_penalty, D_without, G = 12, 7, 5                           # forward passes' worth, G and D much of a size
    assert count["wgan", 8] / count["dcgan", 8] == pytest.approx((5 * D_with_penalty + G) / (D_without + G), rel=0.05)


@pytest.mark.parametrize("one", ["dcgan:copied", "dcgan:default", "wgan:copied", "wgan:default", "wgan:instance"])
def test_bench_measures_one_loop(here, capsys, one, monkeypatch):
    draw(here / "pictures", 9, (16, 16))
    monkeypatch.setattr(torch.utils.data, "DataLoader",               # no processes for so little
                        lambda *args, num_workers, **more: LOADER(*args, **more))
    seen, forward = [], gan.Discriminator.forward
    monkeypatch.setattr(gan.Discriminator, "forward", lambda D, x: seen.append(len(x)) or forward(D, x))
    bench.main(f"--one {one} --size 16 --features 4 --batch 4 --data pictures --device cpu --warm 1 --timed 2".split())
    figure = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 < figure["ms"] < 1e5 and 0.01 < figure["gb"] < 100
    per_step = {"dcgan:copied": 3, "dcgan:default": 3, "wgan:copied": 16, "wgan:default": 11, "wgan:instance": 11}
    assert len(seen) == 3 * per_step[one]                             # D is called so often in a step, in three steps


def test_bench_table(here, capsys, monkeypatch):
    draw(here / "pictures", 9, (16, 16))
    took = {"copied": 300.0, "default": 100.0, "instance": 150.0}
    monkeypatch.setattr(bench, "child", lambda args, one, size, **_: dict(ms=took[one.split(":")[1]], gb=1.5))
    bench.main("--parts wgan reading --sizes 16 --features 4 --batch 4 --repeats 2 --data pictures --device cpu "
               "--json bench.json".split())
    rows = {row.get("loop"): row for row in json.loads(Path("bench.json").read_text())["results"]}
    assert rows["default"]["ratio"] == [3.0, 3.0] and rows["instance"]["ratio"] == [2.0, 2.0]
    assert rows["copied"]["pictures_per_second"] == pytest.approx(20 / 0.3)
    shown = capsys.readouterr().out
    assert "ours, default" in shown and "3 (3 .. 3)" in shown and "DataLoader" in shown
    monkeypatch.setattr(bench, "child", lambda args, one, size, **_: None)
    bench.main("--parts wgan --sizes 16 --features 4 --batch 4 --repeats 1 --data pictures --device cpu".split())
    assert "out of memory" in capsys.readouterr().out
    assert "invalid choice: 'all'" in mistake(capsys, lambda: bench.main(["--parts", "all"]))
    assert "no such folder" in mistake(capsys, lambda: bench.main(["--data", "nowhere"]))
    assert "smaller --batch" in mistake(capsys, lambda: bench.main(["--data", "pictures", "--batch", "10"]))
    assert "--timed" in mistake(capsys, lambda: bench.main(["--timed", "0"]))
    assert "nearest size that works is 8x8" in mistake(capsys, lambda: bench.main(["--sizes", "64", "4"]))
    assert "no such folder" in mistake(capsys, lambda: bench.main(["--json", "nowhere/bench.json"]))
    args = bench.parse_arguments(["--repeats", "2"])
    bench.scaling(args, [])
    assert capsys.readouterr().out.count("out of memory") == 6


def test_bench_runs_children_on_a_folder_named_from_here(here, monkeypatch):
    draw(here / "my pictures", 9, (16, 16))
    (here / "my pictures" / "notes.txt").write_text("no picture")
    assert len(bench.ImageFolder("my pictures", 16)) == 9
    asked, scratch = [], []

    def run(command, cwd, **_):
        asked.append(bench.parse_arguments(command[2:]))
        scratch.append(Path(cwd).is_dir() and Path(cwd))              # where the cache goes, and is gone with it
        return argparse.Namespace(returncode=0, stdout='{"ms": 5.0, "gb": 1.0}')

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(bench, "matrix_rate", lambda *_: 1e12)
    bench.main(["--data", "my pictures", "--json", "bench.json",
                *"--parts dcgan start --sizes 16 --features 4 --batch 4 --repeats 1 --device cpu".split()])
    rows = json.loads(Path("bench.json").read_text())["results"]
    assert [row.get("loop") for row in rows] == [None, "copied", "default", None] and 0 < rows[-1]["seconds"][0] < 600
    assert [args.one for args in asked] == ["dcgan:copied", "dcgan:default"]
    assert all(args.data == str(here / "my pictures") for args in asked)
    assert all(scratch) and not any(folder.exists() for folder in scratch)
    assert sorted(os.listdir(here)) == ["bench.json", "my pictures"]
