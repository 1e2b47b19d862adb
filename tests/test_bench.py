"""Tests of bench.py."""

import argparse
import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

import baseline
import bench
import gan
import runs
from conftest import LOADER, draw, mistake

TINY = "--sizes 16 --features 4 --batch 4 --data images --device cpu".split()


@pytest.fixture
def images(here):
    return draw(here / "images", 9, (16, 16))


@pytest.mark.parametrize("method, variant, calls", [
    ("dcgan", "baseline", 3), ("dcgan", "ours fp32", 3), ("wgan", "baseline", 16), ("wgan", "ours fp32", 11),
    ("wgan", "ours bf16", 11), ("wgan", "ours instance fp32", 11)])
def test_one_loop_is_measured(images, here, monkeypatch, capsys, method, variant, calls):
    monkeypatch.setattr(torch.utils.data, "DataLoader",               # no processes for so little
                        lambda *args, num_workers, **more: LOADER(*args, **more))
    monkeypatch.setattr(runs, "Run", runs.Run)                        # put back at the end
    seen, forward = [], gan.Discriminator.forward
    monkeypatch.setattr(gan.Discriminator, "forward", lambda D, x: (
        len(x) > 1 and seen.append((len(x), D))) or forward(D, x))       # one to print the layers
    args = bench.parse_arguments(TINY)
    args.warm, args.timed = 1, 2
    args.scratch, args.data = str(here / "scratch"), str(images)
    Path(args.scratch).mkdir()
    figure = bench.measure(args, method, variant, 16)
    assert 0 < figure["ms"] < 1e5 and figure["gb"] is None            # memory is counted on a GPU
    assert len(seen) == 3 * calls                                     # D is called so often in a step, in three steps
    instance = any(isinstance(layer, nn.InstanceNorm2d) for layer in seen[0][1].modules())
    assert instance == (method == "wgan" and variant != "ours fp32" and variant != "ours bf16")
    assert capsys.readouterr().out == ""
    assert sorted(os.listdir(here)) == ["images", "scratch"]          # the cache of images is in scratch


def test_steps_are_timed_one_by_one(images, monkeypatch):
    now, args = [0.0], bench.parse_arguments(TINY)
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(runs, "Run", runs.Run)                        # put back at the end

    def main(flags):
        for k in object.__new__(runs.Run).steps():
            now[0] += 10 ** (k - 1)

    monkeypatch.setattr(baseline, "main", main)
    args.warm, args.timed, args.scratch = 2, 3, "."
    assert bench.measure(args, "dcgan", "baseline", 16)["ms"] == 1e6    # the median of 100, 1000 and 10,000 s


def test_table(images, capsys, monkeypatch):
    took = {"baseline": 300.0, "ours instance fp32": 200.0, "ours fp32": 150.0, "ours instance bf16": 120.0,
            "ours bf16": 100.0}
    monkeypatch.setattr(bench, "child", lambda args, method, variant, *_: dict(ms=took[variant], gb=1.5))
    monkeypatch.setattr(bench.runtime, "has_bf16", lambda device: True)
    bench.main([*TINY, *"--parts wgan --repeats 2 --json bench.json".split()])
    saved = json.loads(Path("bench.json").read_text())
    rows = {row["loop"]: row for row in saved["results"] if "loop" in row}
    assert list(rows) == list(took)                                   # like for like is read first
    assert [row["speedup"] for row in rows.values()] == [[300 / ms] * 2 for ms in took.values()]
    assert rows["baseline"]["images_per_s"] == pytest.approx(20 / 0.3)
    assert saved["machine"] and saved["settings"]["batch"] == 4
    shown = capsys.readouterr().out
    assert "ours bf16" in shown and "3 (3 .. 3)" in shown and "speedup" in shown
    for bf16, loops in ((False, ["baseline", "ours fp32"]), (True, ["baseline", *list(took)[2::2]])):
        monkeypatch.setattr(bench.runtime, "has_bf16", lambda device, bf16=bf16: bf16)
        bench.main([*TINY, *"--parts dcgan --repeats 1 --json bench.json".split()])
        assert [row["loop"] for row in json.loads(Path("bench.json").read_text())["results"]] == loops


@pytest.mark.parametrize("flags, words", [
    ("--parts all", "invalid choice: 'all'"),
    ("--sizes 64 4", "--sizes: expected an integer >= 8 and < 1025, got '4'"),
    ("--device gpu", "got 'gpu'")])
def test_user_errors(images, capsys, flags, words):
    assert words in mistake(capsys, lambda: bench.main(flags.split()))


def fails(args, *_):
    raise RuntimeError(args.json)


def test_processes_that_measure_get_a_folder_named_from_here(images, here, monkeypatch):
    (images / "notes.txt").write_text("no image")
    images.rename(here / "my images")
    assert len(baseline.Images("my images", (16, 16))) == 9
    asked, scratch = [], []

    class Pool(bench.ProcessPoolExecutor):
        def submit(self, work, args, *loop):
            asked.append((args.data, *loop))
            scratch.append(Path(args.scratch).is_dir() and Path(args.scratch))        # where the cache goes
            return argparse.Namespace(result=lambda: dict(ms=5.0, gb=1.0))

    monkeypatch.setattr(bench, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(bench.runtime, "has_bf16", lambda device: False)
    bench.main([*TINY, *"--parts dcgan --repeats 1 --json bench.json".split(),
                "--data", "my images"])
    rows = json.loads(Path("bench.json").read_text())["results"]
    assert [row.get("loop") for row in rows] == ["baseline", "ours fp32"]
    assert asked == [(str(here / "my images"), "dcgan", variant, 16) for variant in ("baseline", "ours fp32")]
    assert all(scratch) and not any(folder.exists() for folder in scratch)    # and is gone with it
    assert sorted(os.listdir(here)) == ["bench.json", "my images"]


def test_a_fresh_process_measures_one_loop(images, here, monkeypatch, capsys):
    args = bench.parse_arguments(TINY)
    args.warm, args.timed = 0, 1
    args.scratch, args.data = str(here), str(images)
    assert 0 < bench.child(args, "dcgan", "baseline", 16)["ms"] < 1e5
    monkeypatch.setattr(bench, "measure", fails)
    assert "a smaller --batch" in mistake(capsys, lambda: bench.main([*TINY, "--json", "CUDA out of memory"]))
    with pytest.raises(RuntimeError, match="a bug"):                  # keeps its traceback
        bench.main([*TINY, "--json", "a bug"])
