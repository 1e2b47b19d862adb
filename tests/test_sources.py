"""Tests of sources.py."""

import gzip
from pathlib import Path

import numpy as np
import pytest

import data
import decode
import sources
from conftest import draw, write_idx
from runtime import UserError


def test_links_to_folders_are_followed_once_in_a_fixed_order(here):
    draw(here / "d" / ".store", 1)
    draw(here / "d" / "c" / "x", 1)
    for name in "bade":
        (here / "d" / name).mkdir()
        (here / "d" / name / "link").symlink_to(here / "d" / "c" / "x", target_is_directory=True)
    (here / "d" / "seen").symlink_to(".store", target_is_directory=True)       # hidden there, not by this name
    assert sources.find_images(here / "d") == ["a/link/000.png", "seen/000.png"]


def test_idx_files(here):
    digits = np.random.RandomState(0).randint(0, 256, (6, 28, 28)).astype(np.uint8)
    write_idx(here / "t-images-idx3-ubyte", digits)
    write_idx(here / "t-images-idx3-ubyte.gz", digits)
    for source in ("t-images-idx3-ubyte", "t-images-idx3-ubyte.gz"):
        assert np.array_equal(np.asarray(data.load(source, (28, 28)).images)[:, 0], digits)
    write_idx(here / "u-images-idx3-ubyte", 255 - digits)
    (here / "t-images.idx3-ubyte").mkdir()                            # as some archives are unpacked
    assert data.load(".", (8, 8)).images.shape == (12, 1, 8, 8)       # all, but no .gz of one that is there
    write_idx(here / "digits.idx", digits)
    write_idx(here / "digits.idx.gz", digits)                         # no labels, though it lies beside
    assert len(data.load("digits.idx", (28, 28)).names) == len(data.load("digits.idx.gz", (28, 28)).names) == 6
    write_idx(here / "labels", digits[:, 0, 0])
    write_idx(here / "cut", digits, -5)
    (here / "words.txt").write_text("hello")
    (here / "bad.gz").write_bytes(gzip.compress(b"x" * 99)[:-9])
    (here / "flipped.gz").write_bytes(gzip.compress(b"x" * 99)[:12] + b"\xff" * 20)
    for name, why in (("labels", "in the file with .images."), ("cut", "cut short"),
                      ("words.txt", "expected a folder"), ("bad.gz", "damaged"), ("flipped.gz", "damaged")):
        with pytest.raises(UserError, match=why):
            data.load(name, (8, 8))


def test_an_array_of_no_images_is_one_sentence(here):
    np.save("empty.npy", np.zeros((0, 8, 8), np.uint8))
    write_idx(here / "e-images-idx3-ubyte", np.zeros((0, 8, 8), np.uint8))
    for name in ("empty.npy", "e-images-idx3-ubyte"):
        with pytest.raises(UserError, match=f"--data {name} holds no images"):
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
                                 ("s-images-idx3-ubyte", "", "6 images, and there are 2 labels")):
        with pytest.raises(UserError, match=why):
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
    *scaled, _ = sources.read_array(Path("half.npy"), (-3, 1))
    assert min(sources.image_of_array(*scaled, k).min() for k in range(5)) == 128
    hurt = half.copy()
    hurt[2, 3, 3] = np.nan
    np.save(here / "hurt.npy", hurt)
    *scaled, _ = sources.read_array(Path("hurt.npy"), (-1, 1))
    assert [k for k in range(5) if "not finite" in data.decode(decode.Preprocess((8, 9)), sources.Item(
        "", (), lambda k=k: sources.image_of_array(*scaled, k))).why] == [2]
    np.savez(here / "two.npz", x=np.zeros((5, 2, 28, 20), np.uint8))
    np.save(here / "flat.npy", grey[0])
    np.save(here / "odd.npy", random.rand(2, 5, 6, 7))
    np.save(here / "nan.npy", half * np.nan)
    np.save(here / "words.npy", np.array(["a"]))
    np.savez(here / "statistics.npz", mu=np.zeros(9), sigma=np.eye(9))
    (here / "broken.npz").write_bytes(b"PK no zip")
    np.savez(here / "called", x=grey)
    assert np.array_equal(np.asarray(data.load((here / "called.npz").rename("called.npy"), (8, 9)).images)[:, 0], grey)
    for name, why in (("flat.npy", "it has shape"), ("odd.npy", "must be the channels"), ("nan.npy", "not finite"),
                      ("two.npz", r"shape \(5, 2, 28, 20\)"),
                      ("words.npy", "expected one array"), ("statistics.npz", "sigma has shape"),
                      ("broken.npz", "is damaged")):
        with pytest.raises(UserError, match=why):
            data.load(name, (8, 9))


def test_demo_is_the_same_everywhere_and_varies():
    first = sources.draw_demo(12)
    assert first.shape == (12, 64, 64) and np.array_equal(first, sources.draw_demo(12))
    # Origin of the numbers: this function, numpy 2.4.6 on x86-64. A pixel may round otherwise elsewhere, no more.
    assert first.mean() == pytest.approx(94.2255, abs=0.01)
    assert first[3, 20, ::8].tolist() == pytest.approx([64, 124, 167, 135, 83, 92, 97, 161], abs=1)
    assert np.std(first.astype(float), axis=0).mean() > 15 and not np.array_equal(sources.draw_demo(12, seed=1), first)
