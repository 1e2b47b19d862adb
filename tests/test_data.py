"""Tests of data.py."""

import argparse
import errno
import functools
import os
import pickle
import signal
import subprocess
import sys
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import decode
import plots
import sources
from conftest import HERE, TINY, checkpoint, draw, train
from runtime import UserError


def test_folder_is_read_whole_and_bad_files_are_named(here):
    draw(here / "d" / "class_a", 3, suffix=".JPG")
    draw(here / "d" / "b", 2, mode="L", suffix=".tiff")
    draw(here / "d" / ".hidden", 1)
    (here / "d" / "notes.txt").write_text("not an image")
    (here / "d" / "text.jpg").write_text("not an image either")
    (here / "d" / "empty.png").write_bytes(b"")
    whole = (here / "d" / "class_a" / "000.JPG").read_bytes()
    (here / "d" / "cut.jpeg").write_bytes(whole[:len(whole) // 2])
    (here / "d" / "._hidden.png").write_bytes(whole)
    (here / "d" / "loop").symlink_to(here / "d", target_is_directory=True)
    (here / "d" / "twin").symlink_to(here / "d" / "b", target_is_directory=True)
    dataset = data.load("d", (16, 16))
    assert dataset.names == ["b/000.tiff", "b/001.tiff", "class_a/000.JPG", "class_a/001.JPG", "class_a/002.JPG"]
    assert dataset.images.shape == (5, 3, 16, 16) and dataset.images.dtype == np.uint8
    assert (dataset.images[0][0] == dataset.images[0][1]).all()     # the grey ones, in three equal channels
    assert {name: why.split()[0] for name, why in dataset.skipped} == {
        "cut.jpeg": "Truncated", "empty.png": "the", "text.jpg": "not"}
    first, second = data.describe("d", dataset).split("\n")
    assert "3 skipped" in first and "cut.jpeg" in second
    many = dataset._replace(images=np.zeros((100, 3, 16, 16), np.uint8))
    assert ["heart" in data.describe("d", some, 2) for some in (dataset, many)] == [True, False]    # said to who trains
    assert data.load("d", (16, 16), channels="1").images.shape == (5, 1, 16, 16)
    assert data.load("d", (16, 16), limit=3).names == dataset.names[:3]
    assert data.load("d/b", (16, 16)).images.shape == (2, 1, 16, 16)


def test_grey_content_in_rgb_files_is_grey(here):
    draw(here / "d", 4, mode="L")
    for file in (here / "d").iterdir():
        Image.open(file).convert("RGB").save(file.with_suffix(".jpg"), quality=80)
        file.unlink()
    assert data.load("d", (16, 16)).images.shape == (4, 1, 16, 16)
    Image.new("RGB", (20, 20), "red").save(here / "d" / "red.png")
    dataset = data.load("d", (16, 16))
    assert dataset.images.shape == (5, 3, 16, 16) and "red.png" not in str(dataset.notes)    # 1 of 5 is no exception
    faint = np.full((16, 16, 3), 100, np.uint8)
    faint[..., 0] += 20
    assert not decode.has_colour(faint) and decode.has_colour(faint + np.array([9, 0, 0], np.uint8))
    assert data.load("d", (16, 16), channels=1).images.shape == (5, 1, 16, 16)


def test_holdout_goes_by_content_and_is_stable(here):
    draw(here / "d", 60)
    for k in range(10):
        (here / "d" / f"copy{k}.png").write_bytes((here / "d" / f"{k:03d}.png").read_bytes())
    train, held = (data.load("d", (8, 8), holdout=0.3, part=part) for part in ("train", "heldout"))
    assert sorted(train.names + held.names) == [f"{k:03d}.png" for k in range(60)]    # each once, on one side
    assert 8 <= len(held.names) <= 28 and train.n_heldout == len(held.names)
    assert train.skipped == held.skipped == [(f"copy{k}.png", f"an exact copy of {k:03d}.png") for k in range(10)]
    assert len(data.load("d", (8, 8), holdout=0.8, part="heldout").names) > 35
    assert len(data.load("d", (8, 8)).names) == 60 and data.load("d", (8, 8), limit=64).skipped[-1][0] == "copy3.png"
    draw(here / "d" / "more", 30)
    assert set(held.names) <= set(data.load("d", (8, 8), holdout=0.3, part="heldout").names)


def test_groups_stay_on_one_side(here):
    for patient in range(30):
        draw(here / "d" / f"p{patient:02d}", 3)
    side = {name: "train" for name in data.load("d", (8, 8), holdout=0.5, part="train", group=r"(p\d+)/").names}
    side |= {name: "heldout" for name in data.load("d", (8, 8), holdout=0.5, part="heldout", group=r"(p\d+)/").names}
    assert len(side) == 90 and set(side.values()) == {"train", "heldout"}
    assert all(len({side[f"p{p:02d}/{k:03d}.png"] for k in range(3)}) == 1 for p in range(30))


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
    dataset = data.load("d", (16, 16))
    kept = set(dataset.names)
    assert {f"{k:03d}.png" for k in range(60)} <= kept                # all good ones
    named = {name for name, _ in dataset.skipped}
    assert kept | named == bad | {f"{k:03d}.png" for k in range(60)} and len(kept - named) == len(dataset.names)
    # A flipped bit may leave a file that decodes; then it is an image, and nobody can know better.
    assert all(name[3:].split(".")[0].isdigit() and int(name[3:].split(".")[0]) % 6 == 0 for name in kept & bad)
    assert len(kept & bad) < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - began < 400_000        # KB; 60000^2 would be 3.6 GB


def test_cache_is_built_once_and_follows_the_files(here, monkeypatch):
    draw(here / "d", 5)
    first = np.asarray(data.load("d", (16, 16)).images)
    built = []
    build = data.build
    monkeypatch.setattr(data, "build", lambda *args: (built.append(args), build(*args))[1])
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
    read = Path.read_bytes

    def denied(path):
        if path.name == "001.png":
            raise PermissionError(errno.EACCES, "Permission denied")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", denied)
    assert data.load("d", (8, 8)).names == ["000.png", "002.png"]
    assert os.name == "nt" or not list(Path("runs/.cache").iterdir())
    monkeypatch.setattr(Path, "read_bytes", read)
    assert data.load("d", (8, 8)).names == ["000.png", "001.png", "002.png"]


def test_what_will_not_pass_is_not_tried_again(here, monkeypatch):
    draw(here / "d", 3)
    (here / "d" / "dead.png").symlink_to("nowhere.png")
    (here / "d" / "round.png").symlink_to("round.png")
    built, build = [], data.build
    monkeypatch.setattr(data, "build", lambda *args: (built.append(args), build(*args))[1])
    for _ in range(2):
        dataset = data.load("d", (8, 8))
        assert len(dataset.names) == 3 and "cannot be opened" in dataset.skipped[0][1] and len(built) == 1
    (here / "nowhere.png").write_bytes((here / "d" / "001.png").read_bytes() + b"x")
    (here / "d" / "nowhere.png").symlink_to(here / "nowhere.png")
    assert "dead.png" in data.load("d", (8, 8)).names and len(built) == 2


def test_window_of_the_target_s_size_is_not_called_small(here):
    draw(here / "d", 2, (100, 100))
    crop = "0.25,0.25,0.57,0.57"                                      # 32 pixels, but for the last of sixteen digits
    assert data.load("d", (32, 32), crop=crop).notes == []
    assert data.load("d", (33, 33), crop=crop).notes
    draw(here / "long", 2, (40, 100))
    assert data.load("long", (64, 64), "squash").notes and not data.load("long", (64, 64), "pad").notes      # shrunk
    assert data.load("long", (64, 128), "pad").notes


@pytest.mark.skipif(sys.platform != "linux", reason="forks as Linux does")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_run_stopped_while_it_reads_leaves_nobody_behind(here, number):
    """Neither workers nor a wait for all that is under way; the next run begins at once."""
    draw(here / "images", 300, (8, 8))
    slow = ("import decode, os, sys, time, train_wgan\npixels = decode.Preprocess.pixels\n"
            "def late(*args):\n    os.write(1, b'reading\\n'); time.sleep(0.3); return pixels(*args)\n"
            "decode.Preprocess.pixels = late\n"
            "train_wgan.main(sys.argv[1:])")
    process = subprocess.Popen([sys.executable, "-c", slow, *TINY, "--steps", "1"], stdout=subprocess.PIPE, text=True,
                               stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(HERE)})
    assert process.stdout.readline() == "reading\n"
    process.send_signal(number)
    assert process.wait(timeout=120) in (130, -number)
    train("--steps", "1", "--out", "r")
    assert checkpoint("r")["step"] == 1


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_a_set_larger_than_memory(here):
    """400 MB of dataset in a process that may take 300 MB beyond what importing needs."""
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
            raise RuntimeError("no ninth")
        return torch.tensor([k])

    stream = data.read_ahead(read, 5)
    assert [int(next(stream)) for _ in range(4)] == [5, 6, 7, 8]
    with pytest.raises(RuntimeError, match="no ninth"):
        next(stream)


def test_every_image_once_an_epoch_in_an_order_of_seed_and_epoch():
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
    x = data.to_float(every)
    assert x.min() == -1 and 1 - 2e-7 < x.max() <= 1 and torch.equal(plots.to_uint8(x), every)
    assert (x - (every.double() / 127.5 - 1)).abs().max() < 2e-7
    assert plots.to_uint8(torch.tensor([-7.0, 0.0, 9.0])).tolist() == [0, 128, 255]


def test_two_processes_at_once_get_in_nobodys_way(here):
    """Both build; each array is whole, and one cache remains in use."""
    draw(here / "d", 12, mode="L")
    expected = np.asarray(data.load("d", (8, 8)).images)
    code = ("import data, glob, os, time\nreplace = os.replace\n"
            "def together(*args):\n    open(f'here-{os.getpid()}', 'w').close()\n"
            "    for _ in range(2000):\n        time.sleep(0.01 * (len(glob.glob('here-*')) < 2))\n"
            "    replace(*args)\n"
            "os.replace = together\nprint(int(data.load('d', (8, 8), cache='c').images[:].sum()))")
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
                             env={**os.environ, "PYTHONPATH": str(HERE)}) for _ in range(2)]
    assert [process.communicate(timeout=60)[0].strip() for process in both] == [str(expected.sum())] * 2
    assert np.array_equal(np.asarray(data.load("d", (8, 8), cache="c").images), expected)
    assert {path.suffix for path in (here / "c").iterdir()} == {".json", ".pixels"}


def test_the_demo_is_drawn_once_by_all_threads(monkeypatch):
    drawn = []
    monkeypatch.setattr(sources, "_drawn", functools.cache(lambda: time.sleep(0.05) or drawn.append(1) or [7, 8, 9]))
    reads = [item.read for item in sources.find_items("demo")[:3]]
    assert list(data.parallel_map(lambda read: read(), reads)) == [7, 8, 9] and drawn == [1]
    assert pickle.loads(pickle.dumps(reads[1]))() == 8                # to processes that read


def test_an_error_in_a_map_is_raised_and_warnings_come_back():
    def fails(k):
        warnings.warn(f"{k}", stacklevel=1)
        return 1 / (k - 70)

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with pytest.raises(ZeroDivisionError):
            list(data.parallel_map(fails, list(range(200))))
        warnings.warn("mine", stacklevel=1)
    assert [str(warning.message) for warning in seen] == ["mine"]


def test_runs_begun_with_flags_that_are_gone_say_so(here):
    draw(here / "d", 4)
    flags = dict(data="d", size="8", fit="crop", crop="", channels="auto", limit=None, holdout=0.0, group="")
    harmless = dict(background="white", range="", denoise="", keep_truncated=False, accumulate=1, profile=False)
    assert len(data.load_from_args(argparse.Namespace(**flags, **harmless)).names) == 4
    for name, value in (("denoise", "nlm"), ("background", "black"), ("keep_truncated", True), ("range", "0,9")):
        with pytest.raises(UserError, match=f"--{name.replace('_', '-')} {value}, a flag that is gone"):
            data.load_from_args(argparse.Namespace(**flags, **{**harmless, name: value}))
    with pytest.raises(UserError, match="prepare.py FOLDER --crop auto"):
        data.load_from_args(argparse.Namespace(**{**flags, "crop": "auto"}))


@pytest.mark.parametrize("damage", ["", "[]", "{", '{"file": "nowhere", "shape": [3, 1, 8, 8]}', "short"])
def test_a_damaged_cache_is_built_again(here, damage):
    draw(here / "d", 3, mode="L")
    expected = np.asarray(data.load("d", (8, 8)).images)
    about, = Path("runs/.cache").glob("*.json")
    pixels, = Path("runs/.cache").glob("*.pixels")
    pixels.write_bytes(pixels.read_bytes()[:-9]) if damage == "short" else about.write_text(damage)
    assert np.array_equal(np.asarray(data.load("d", (8, 8)).images), expected)


def test_what_killed_builds_left_is_removed_when_it_is_old(here):
    draw(here / "d", 3)
    data.load("d", (8, 8))
    about, = Path("runs/.cache").glob("*.json")
    old, new = (about.with_name(f"{about.stem}-{k}.pixels") for k in (1, 2))
    for path in (old, new):
        path.touch()
    os.utime(old, (1, 1))
    about.unlink()
    data.load("d", (8, 8))
    assert not old.exists() and new.exists()


def test_the_share_held_out_is_the_share_asked_for():
    names, digests = [str(k) for k in range(20000)], np.random.RandomState(0).randint(0, 2**62, 20000).tolist()
    for share in (0.0, 0.1, 0.6):
        assert data.heldout_mask(digests, names, share).mean() == pytest.approx(share, abs=0.01)


def test_what_the_centre_crop_costs_is_said(here):
    draw(here / "wide", 5, (48, 100))
    draw(here / "wide", 1, (60, 48), suffix=".bmp")                          # one that loses exactly a fifth
    def notes(**how):
        return [note for note in data.load("wide", **{"size": (16, 16), **how}).notes if "--fit crop" in note]
    assert notes() == ["--fit crop cuts off a fifth or more of 6 of 6 images, of 000.bmp (60x48) for one; --size 16x34"
                       ", --fit squash or --fit pad keeps all of it"]
    (note,) = notes(size=(16, 34))                                           # the tall one does not fit
    assert "of 1 of 6 images, of 000.bmp" in note and "--size 20x16" in note
    assert not notes(fit="squash") and not notes(fit="pad")
    assert "--size 481x1022" in notes(size=(512, 512))[0]                    # no side over 1024
    (note,) = notes(size=(20, 17), crop="0,0,0.4,1")                         # what counts is the window of --crop
    assert "of 1 of 6 images, of 000.bmp (60x19)" in note
    draw(here / "square", 3, (48, 59))                                       # under a fifth
    assert not any("--fit" in note for note in data.load("square", (16, 16)).notes)
    draw(here / "square", 17, (48, 59), suffix=".bmp")
    draw(here / "square", 2, (48, 99), suffix=".tif")                        # a tenth of the images is no advice
    assert not any("--fit" in note for note in data.load("square", (16, 16)).notes)


def test_a_folder_that_changed_is_not_taken_for_that_of_the_run(here):
    draw(here / "d", 12)
    flags = dict(data="d", size="8", fit="crop", crop="", channels="auto", limit=None, holdout=0.3, group="")
    began = data.load_from_args(argparse.Namespace(**flags), "train")
    saved = {"flags": flags, "same": {"images": began.fingerprint}}
    train, heldout = data.load_of_run(saved)
    assert train.names == began.names and len(train.names) + len(heldout.names) == 12 and heldout.names
    (here / "d").rename(here / "moved")
    assert data.load_of_run(saved, "moved")[1].names == heldout.names
    (here / "moved" / began.names[0]).unlink()                               # others are held out still, and yet
    with pytest.raises(UserError, match="not the images the run was trained on"):
        data.load_of_run(saved, "moved")
