"""Tests of what goes wrong outside: damaged and hostile files, the disk, divergence."""

import functools
import importlib
import io
import math
import os
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_decode import dicom

import complete
import data
import decode
import evaluate
import gan
import generate
import runs
import train_dcgan
import train_pix2pix
import train_wgan
from conftest import HERE, PIX, TINY, checkpoint, draw, mistake, same, train
from runtime import UserError


def mutations(raw, n, seed=0):
    """n damaged copies of a file: cut, 1 to 2,000 bits flipped anywhere or in the last 2,000 bytes, 4,000 bytes
    overwritten, bytes put in or left out."""
    random = np.random.RandomState(seed)
    for k in range(n):
        array = np.frombuffer(raw, np.uint8).copy()
        at = random.randint(len(array))
        if k % 6 == 0:
            yield raw[:at]
        elif k % 6 == 1:
            yield raw[:at] + random.bytes(random.randint(1, 100)) + raw[at:]
        elif k % 6 == 2:
            yield raw[:at] + raw[at + random.randint(1, 100):]
        elif k % 6 == 3:
            array[at:at + 4000] = np.frombuffer(random.bytes(len(array[at:at + 4000])), np.uint8)
            yield array.tobytes()
        else:
            low = 0 if k % 6 == 4 else len(array) - 2000
            where = random.randint(low, len(array), int(2000 ** random.rand()))
            array[where] ^= np.uint8(1) << random.randint(0, 8, len(where)).astype(np.uint8)
            yield array.tobytes()


@pytest.mark.parametrize("n", [40, pytest.param(400, marks=pytest.mark.slow)])
def test_a_damaged_checkpoint_is_refused_or_whole(at_runs, tmp_path, n):
    """Refused with the sentence; or what was hit is read by nobody, and every value is that of the original."""
    right, weights, refused = checkpoint("runs/a"), gan.load_generator("runs/a").state_dict(), 0
    for raw in mutations(Path("runs/a/checkpoint.pt").read_bytes(), n):
        (tmp_path / "checkpoint.pt").write_bytes(raw)
        try:
            assert same(runs.read_checkpoint(tmp_path, mmap=False), right)
        except UserError as error:
            assert "is damaged" in str(error) and "\n" not in str(error)
            refused += 1
        try:
            assert same(dict(gan.load_generator(tmp_path).state_dict()), dict(weights))
        except OSError as error:
            assert "it is damaged" in str(error) and "\n" not in str(error)
    assert refused > 0.75 * n


def test_damaged_images_are_skipped_with_a_word_or_are_images(here):
    random = np.random.RandomState(0)
    image = Image.fromarray((random.rand(60, 80, 3) * 60 + np.linspace(0, 190, 80)[:, None]).astype(np.uint8))
    for kind, options in (("PNG", {}), ("JPEG", {}), ("JPEG", dict(progressive=True)), ("WEBP", {}), ("GIF", {}),
                          ("TIFF", dict(compression="tiff_lzw")), ("TIFF", {}), ("BMP", {}), ("DICOM", {})):
        file, read = io.BytesIO(), 0
        if kind != "DICOM":
            image.save(file, kind, **options)
        raw = file.getvalue() or dicom((random.rand(40, 50) * 4000).astype(np.uint16), bits=12)
        for mutated in mutations(raw, 40):
            found = data.decode(decode.Preprocess((16, 16)), Namespace(read=lambda: mutated))  # noqa: B023
            assert found.why and "\n" not in found.why if found.pixels is None else found.pixels.shape[:2] == (16, 16)
            read += found.pixels is not None
        assert read < 40


class Hostile:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_code_in_a_file_is_never_run(at_runs, capsys):
    """Checkpoints, generators, arrays and statistics whose pickle would run a command."""
    before = Path(shutil.copytree("runs/a", "runs/hostile"))
    saved = checkpoint("runs/a")
    torch.save(saved | dict(same=Hostile()), before / "checkpoint.pt")
    torch.save(dict(config=saved["config"], G_ema=Hostile()), "hostile.pt")
    np.savez("hostile.npz", mu=np.array([Hostile()]), sigma=np.array([Hostile()]))
    np.save("hostile.npy", np.array([Hostile()]))
    for command in ("train_wgan --resume runs/hostile", "generate runs/hostile", "generate hostile.pt", "evaluate "
                    "runs/hostile", "evaluate hostile.npz hostile.npz", "complete runs/hostile", "train_wgan --data "
                    "hostile.npy", "evaluate runs/a --network hostile.pt", "evaluate runs/a --weights hostile.pt",
                    "serve hostile.pt"):
        module, *flags = command.split()
        mistake(capsys, functools.partial(importlib.import_module(module).main, flags))
    assert not Path("executed").exists()
    os.system("touch executed")
    assert Path("executed").exists()


def test_a_file_of_flags_that_names_itself(here, capsys):
    Path("self.txt").write_text("--batch 3\n@self.txt\n")
    assert "names itself" in mistake(capsys, lambda: train("@self.txt"))


def test_samples_that_the_disk_refuses_stop_nothing(here, capsys, monkeypatch):
    """And the checkpoint, which it refuses later, ends the run; the last good one goes on to the same weights."""
    draw(here / "images")
    train("--steps", "12", "--out", "whole")
    full = 5

    def write_atomically(path, save, *args, write=runs.write_atomically):
        if len(list(here.glob("run/generators/*"))) and full:
            raise OSError(28, "No space left on device", str(path))
        write(path, save, *args)

    monkeypatch.setattr(runs, "write_atomically", write_atomically)
    text = mistake(capsys, lambda: train("--steps", "12", "--out", "run"))
    assert "run/checkpoint.pt: No space left" in text
    full = 0
    train("--resume", "run", "--steps", "12")
    assert same(checkpoint("run")["state"], checkpoint("whole")["state"])


def test_a_run_folder_that_is_gone_is_made_anew(here, capsys, monkeypatch):
    draw(here / "images")
    save = gan.save_generator

    def save_generator(*args):
        save(*args)
        if checkpoint("run")["step"] == 4:
            shutil.copytree("run", "kept")
            shutil.rmtree("run")

    monkeypatch.setattr(gan, "save_generator", save_generator)
    train("--steps", "10", "--out", "run")
    assert "is not written, the training goes on" in capsys.readouterr().out
    train("--steps", "10", "--out", "whole")
    assert same(checkpoint("run")["state"], checkpoint("whole")["state"])


@pytest.mark.parametrize("module, flags", [
    (train_wgan, [*TINY, "--n-critic", "2"]), (train_wgan, [*TINY, "--constraint", "clip"]), (train_dcgan, TINY),
    (train_dcgan, [*TINY, "--loss", "relativistic"]), (train_pix2pix, PIX)])
@pytest.mark.parametrize("where, value", [("gradient", math.nan), ("weight", math.inf)])
def test_what_is_not_finite_ends_the_run_by_the_next_log(here, monkeypatch, module, flags, where, value):
    draw(here / "images")
    calls = []
    for kind in (torch.optim.Adam, torch.optim.RMSprop):
        def step(optimizer, *args, own=kind.step):
            weight = optimizer.param_groups[0]["params"][0]
            calls.append(optimizer)
            if len(calls) > 15 and where == "gradient":
                weight.grad[(0,) * weight.ndim] = value
            own(optimizer, *args)
            if len(calls) > 15 and where == "weight":
                weight.data[(0,) * weight.ndim] = value
        monkeypatch.setattr(kind, "step", step)
    with pytest.raises(SystemExit, match="stopped being finite by step"):
        module.main([*flags, "--out", "run", "--steps", "12"])


def test_a_checkpoint_of_a_later_edition_is_refused(at_runs, capsys):
    shutil.copytree("runs/a", "runs/later")
    torch.save(checkpoint("runs/a") | dict(version=runs.VERSION + 1), "runs/later/checkpoint.pt")
    for module, *flags in (("train_wgan", "--resume", "runs/later"), ("generate", "runs/later")):
        text = mistake(capsys, functools.partial(importlib.import_module(module).main, flags))
        assert f"is of version {runs.VERSION + 1}, and this edition reads {runs.VERSION} at most" in text


def test_a_checkpoint_of_the_first_edition_goes_on_draws_is_scored_and_completes(here, tiny):
    """Of commit 1d8f200, 6 steps: --data demo --limit 40 --size 16 --features 4 --max-features 8 --n-critic 2 ..."""
    shutil.copytree(HERE / "tests/first_edition", "run")
    before = checkpoint("run")
    train_wgan.main(["--resume", "run", "--steps", "8"])
    after = checkpoint("run")
    assert (before["step"], after["step"], after["version"]) == (6, 8, runs.VERSION) and "version" not in before
    assert not torch.equal(before["state"]["G"]["project.weight"], after["state"]["G"]["project.weight"])
    generate.main(["run", "--n", "4", "--device", "cpu"])
    evaluate.main(["run", "--network", tiny, "--n", "8", "--device", "cpu"])
    complete.main(["run", "--n", "2", "--iterations", "2", "--device", "cpu"])
    assert {"samples.png", "metrics.json", "completed-1"} <= set(os.listdir("run"))


def footprint(pid):
    """MB of memory of its own, threads and open files of a process."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) / 1024, int(status["Threads"]), len(os.listdir(f"/proc/{pid}/fd"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts by /proc, which is Linux's")
def test_more_images_than_memory_for_ten_thousand_steps(here):
    """300,000 colour images, 3.7 GB at 64 px, under a limit of 2 GB: after the first thousand steps memory, threads and
    open files stay as they are, also when the cache is deleted."""
    import resource
    n, file = 300_000, io.BytesIO()
    Image.fromarray(np.random.RandomState(0).randint(0, 256, (8, 8, 3)).astype(np.uint8)).resize((64, 64)).save(
        file, "JPEG")
    for k in range(n):                                                # what follows the end of a JPEG is not read
        Path(f"many/{k // 1000:03d}").mkdir(parents=True, exist_ok=True) if k % 1000 == 0 else None
        Path(f"many/{k // 1000:03d}/{k:06d}.jpg").write_bytes(file.getvalue() + b"%d" % k)
    began, found = time.monotonic(), []
    process = subprocess.Popen(
        [sys.executable, HERE / "train_wgan.py", *"--data many --holdout 0 --device cpu --features 4 --max-features 8 "
         "--latent 4 --batch 4 --n-critic 1 --norm none --precision fp32 --steps 10000 --log-every 100 "
         "--out run".split()],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (2 * 2**30, 2 * 2**30)))
    while process.poll() is None:
        rows = runs.read_log(Path("run"))
        if rows and rows[-1]["step"] > 1000 + 100 * len(found):
            found.append(footprint(process.pid))
            if len(found) == 1:
                print(f"\nthe first 1,000 steps done after {time.monotonic() - began:.0f} s")
            if len(found) == 30:
                shutil.rmtree("runs/.cache")
        time.sleep(0.1)
    assert process.returncode == 0, process.stderr.read()
    memory, threads, files = np.array(found).T
    print(f"memory {memory.min():.0f} to {memory.max():.0f} MB, threads {set(threads)}, open files {set(files)}")
    assert len(found) > 60 and memory[10:].max() < memory[:10].max() + 30
    assert np.ptp(threads) <= 1 and np.ptp(files) <= 2
