"""Tests of complete.py."""

import argparse
import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import complete
import data
import decode
import inception
import inpainting
import metrics
import sources
import train_pix2pix
from conftest import checkpoint, draw, holes, mistake, train, untrained_enhancer
from runs import read_checkpoint


def test_scores_of_completions_against_loops(here):
    known = holes(1, (16, 20))
    real, fake = np.random.RandomState(0).randint(0, 256, (2, len(known), 3, 16, 20)).astype(np.uint8)
    where = {"psnr": lambda n, i, j: True, "hole_psnr": lambda n, i, j: known[n, 0, i, j] < 0.5}
    for pasted in (False, True):
        fake = np.where(known.numpy() > 0.5, real, fake) if pasted else fake
        found, expected = complete.compare(real, fake, known), {name: [] for name in (*where, "l1", "hole_l1")}
        for n, name in [(n, name) for n in range(len(known)) for name in where]:
            d = [float(real[n, c, i, j]) - fake[n, c, i, j] for c, i, j in np.ndindex(3, 16, 20)
                 if where[name](n, i, j)]
            expected[name].append(10 * math.log10(255**2 * len(d) / sum(v * v for v in d)))
            expected[name.replace("psnr", "l1")].append(100 / 255 * sum(map(abs, d)) / len(d))
        for name, values in expected.items():
            assert found[name] == pytest.approx(np.mean(values))
    assert found["hole_ssim"] < found["ssim"] < 1
    assert complete.compare(real, real, known)["ssim"] == pytest.approx(1)
    known = inpainting.masks("center", 1, (20, 20))                         # just where the windows have their centres
    real, fake = np.random.RandomState(1).randint(0, 256, (2, 1, 1, 20, 20)).astype(np.uint8)
    inside = metrics.ssim(torch.from_numpy(real).double(), torch.from_numpy(fake).double(), 255)
    assert complete.compare(real, fake, known)["hole_ssim"] == pytest.approx(float(inside))
    assert "ssim" not in complete.compare(real[..., :9], fake[..., :9], known[..., :9])


WHOLE = decode.Preprocess((32, 32), "squash")


@pytest.mark.parametrize("size, hole, preprocess, about, box", [
    ((64, 64), (16, 48, 16, 48), decode.Preprocess((32, 32)), "run", (0, 0, 64, 64)),
    ((90, 120), (30, 60, 40, 80), decode.Preprocess((32, 32)), "run", (15, 0, 105, 90)),    # training's own centre crop
    ((90, 120), (30, 60, 80, 118), decode.Preprocess((32, 32)), "run", (28, 0, 118, 90)),   # moved to where the hole is
    ((90, 120), (0, 10, 0, 20), decode.Preprocess((32, 32)), "run", (0, 0, 90, 90)),
    ((90, 120), (0, 90, 10, 110), decode.Preprocess((32, 32)), "run", (0, 0, 120, 90)),     # too wide for it: squashed
    ((90, 120), (30, 60, 40, 80), WHOLE, "run", (0, 0, 120, 90)),
    ((90, 120), (30, 60, 40, 80), decode.Preprocess((32, 32), "pad"), "run", (0, -15, 120, 105)),
    ((90, 120), (30, 60, 40, 80), decode.Preprocess((32, 32), crop="0.25,0,1,1"), "run", (30, 0, 120, 90)),
    ((90, 120), (30, 60, 5, 30), decode.Preprocess((32, 32), crop="0.25,0,1,1"), "run", (5, 0, 95, 90)),
    ((400, 400), (100, 150, 200, 240), decode.Preprocess((32, 32)), "hole", (170, 75, 270, 175)),
    ((400, 400), (0, 4, 0, 4), decode.Preprocess((32, 32)), "hole", (0, 0, 32, 32)),        # never enlarged
    ((90, 120), (30, 60, 40, 80), decode.Preprocess((32, 32), crop="500x500@bottom"), "hole", (20, 5, 100, 85)),
    ((400, 400), (0, 300, 0, 300), decode.Preprocess((32, 32)), "hole", (0, 0, 400, 400))])
def test_the_window_that_the_networks_see(size, hole, preprocess, about, box):
    known = np.ones(size, bool)
    known[hole[0]:hole[1], hole[2]:hole[3]] = False
    assert tuple(complete.find_window(known, preprocess, about)) == box


def test_resizing_never_mixes_in_the_hole():
    random = np.random.RandomState(0)
    pixels, known = random.randint(0, 256, (40, 60, 3)).astype(np.uint8), random.rand(40, 60) < 0.6
    known[10:25, 20:40] = False
    box = (0, 0, 60, 40)
    x, m = complete.resize_known(pixels, known, box, (40, 60))        # its own size: itself
    assert torch.equal(m[0] > 0.5, torch.from_numpy(known))
    assert torch.allclose(x, data.to_float(torch.from_numpy(pixels).permute(2, 0, 1)) * m, atol=1e-6)
    x, m = complete.resize_known(pixels, known, box, (8, 12))
    other, _ = complete.resize_known(np.where(known[..., None], pixels, 255 - pixels), known, box, (8, 12))
    assert torch.equal(x, other) and 0 < m.mean() < 1 and (x.abs() <= 1).all()
    flat, _ = complete.resize_known(np.where(known, 200, 0).astype(np.uint8), known, box, (8, 12))
    assert torch.allclose(flat[:, m[0] > 0], torch.tensor(200 / 127.5 - 1), atol=1e-5)


@pytest.mark.parametrize("blend", ["poisson", "paste"])
def test_putting_back_keeps_known_pixels_to_the_byte(blend):
    random = np.random.RandomState(0)
    pixels, known = random.randint(0, 256, (50, 70, 3)).astype(np.uint8), np.ones((50, 70), bool)
    known[0:20, 30:60] = False
    x = torch.rand(3, 16, 16) * 2 - 1
    out = complete.put_back(pixels, known, (10, 0, 60, 50), x, blend)
    assert out.dtype == np.uint8 and (out[known] == pixels[known]).all()
    assert np.mean(out[~known] != pixels[~known]) > 0.9
    assert (out == complete.put_back(np.where(known[..., None], pixels, 7), known, (10, 0, 60, 50), x, blend)).all()
    whole = data.to_float(torch.from_numpy(pixels).permute(2, 0, 1).float())          # its own content: itself
    assert (complete.put_back(pixels, known, (0, 0, 70, 50), whole, blend) == pixels).all()
    grey = np.full((50, 70, 3), 200, np.uint8)                        # a hole at the border of the window, not of the
    inside = complete.put_back(grey, known, (30, 0, 60, 50), torch.full((3, 16, 16), 200 / 127.5 - 1), blend)
    assert np.abs(inside[:30, 20:].astype(int) - 200).max() <= 1      # image: there is nothing dark beside it
    lighter = complete.put_back(pixels, known, (0, 0, 70, 50), whole * 0.5 + 0.2, blend).astype(int)
    offset = np.abs(complete.put_back(pixels // 2, known, (0, 0, 70, 50), whole * 0.5 + 0.2, blend).astype(int)
                    - pixels // 2)[~known].max()
    assert offset <= 1 if blend == "poisson" else offset > 20         # a hole that is known as one: blended, not pasted
    assert np.abs(lighter - pixels)[~known].max() > 20


def test_what_lies_beside_the_image_does_not_darken_it(here):
    draw(here / "one", 1, (120, 90))
    Image.new("RGB", (120, 90), (200, 200, 200)).save(here / "one/000.png")
    mask = np.ones((90, 120), bool)
    mask[:20, 40:80] = False
    Image.fromarray(mask).save("mask.png")
    preprocess = decode.Preprocess((32, 32), "pad", channels="3")       # its window reaches 15 pixels over the border
    pixels, known, box, y, m = complete.prepare_input(sources.find_items("one")[0], "mask.png", 0, preprocess)
    assert box == (0, -15, 120, 105) and (known == mask).all() and pixels.shape == (90, 120, 3)
    assert (y[:, :3] == -1).all() and (m[:, :3] == 1).all()           # black, and known to be, as in training
    there, _ = complete.resize_known(pixels, np.ones_like(known), box, (32, 32))      # what a perfect network draws
    for x, most in ((there, 7), (torch.full_like(there, 200 / 127.5 - 1), 0)):
        out = complete.put_back(pixels, known, box, x).astype(int)
        assert (out[known] == 200).all() and np.abs(out - 200)[~known].mean() <= most


def test_a_hole_that_the_runs_size_loses_is_filled_all_the_same(runs, capsys):
    draw(runs / "large", 1, (240, 320))
    mask = np.ones((240, 320), bool)
    mask[2:6, 102:106] = False                                        # the run's pixels are 20 across
    Image.fromarray(mask).save("small.png")
    was = np.asarray(Image.open("large/000.png"))
    for window in ("run", "hole"):
        complete_it("wgan", "--images", "large", "--mask", "small.png", "--window", window, "--out", window)
        now = np.asarray(Image.open(f"{window}/completed/000.png"))
        assert (now[mask] == was[mask]).all() and (now[~mask] != was[~mask]).any()
    capsys.readouterr()
    assert "no hole or only hole at 12x16" in mistake(capsys, lambda: complete_it("wgan", "--evaluate", "--mask",
                                                                               "small.png"))


def make_runs(here, size="12x16", channels="3"):
    """Run folders of all three training scripts on the same images."""
    draw(here / "images", 24, (20, 24))
    common = ["--data", "images", "--size", size, "--channels", channels, "--holdout", "0.4", "--steps", "2"]
    for script, flags in (("wgan", []), ("dcgan", ["--minibatch-discrimination"])):
        train(*common, *flags, "--out", script, script=script)
    train_pix2pix.main(["--device", "cpu", "--task", "complete", "--features", "4", "--batch", "2", "--log-every", "9",
                        *common, "--out", "pix2pix"])


QUICK = ["--device", "cpu", "--restarts", "2", "--iterations", "3", "--network", "none"]


def complete_it(*flags):
    complete.main([*QUICK, *flags])


@pytest.fixture
def runs(here, monkeypatch):
    monkeypatch.setattr(inpainting, "POOL", 8)
    make_runs(here)
    return here


def test_images_of_any_size_are_completed_by_any_run(runs, capsys):
    shapes = {"a.png": ("RGB", (30, 50)), "b.jpg": ("RGB", (61, 40)), "c.png": ("L", (16, 12)), "sub/a.png": ("RGBA", (
        20, 90)), "c.bmp": ("RGB", (33, 33)), "c.png.png": ("RGB", (20, 20))}
    for k, (name, (mode, size)) in enumerate(shapes.items()):
        (runs / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.RandomState(k).randint(0, 256, (size[1], size[0], len(mode))).astype(np.uint8)
        Image.fromarray(pixels[..., 0] if mode == "L" else pixels, mode).save(runs / "mine" / name)
    (runs / "mine" / "broken.png").write_text("words")
    for run, flags in (("wgan", ["--mask", "half"]), ("dcgan", ["--blend", "paste"]), ("pix2pix", ["--window", "hole"]),
                       ("pix2pix", ["--mask", "random"])):
        capsys.readouterr()
        complete_it(run, "--images", "mine", "--batch", "2", "--out", "out", *flags)
        said = capsys.readouterr().out
        assert "skipped 1: broken.png" in said and "wrote 6 images" in said
        assert "squashed to 12x16" in said or run != "wgan"
        made = sorted(file.relative_to(runs / "out/completed").as_posix() for file in (runs / "out").rglob("*.png")
                      if file.name != "grid.png")
        assert made == ["a.png", "b.png", "c.bmp.png", "c.png.png", "c.png.png.png", "sub/a.png"]
        mask = flags[1] if "--mask" in flags else "center"
        for k, item in enumerate(sources.find_items("mine")):
            if item.name == "broken.png":
                continue
            name = f"{item.name}.png" if item.name.startswith("c.") else item.name.replace(".jpg", ".png")
            was = np.asarray(decode.upright(Image.open(runs / "mine" / item.name)).convert("RGB"))
            now = np.asarray(Image.open(runs / "out/completed" / name))
            known = inpainting.masks(mask, 1, was.shape[:2], k)[0, 0].numpy() > 0.5
            assert now.shape == was.shape and (now[known] == was[known]).all()
            assert (now[~known] != was[~known]).mean() > 0.5
        columns = 4 if run != "pix2pix" else 3                        # --restarts 2 has one alternative
        grid = Image.open(runs / "out/grid.png")                      # images 8 times as large, captions under one row
        assert grid.size == (8 + columns * (16 * 8 + 8), 8 + 6 * (12 * 8 + 8) + 20)
        shutil.rmtree(runs / "out")


def test_a_grey_run_makes_grey_images_and_the_newest_run_is_taken(here, monkeypatch, capsys):
    monkeypatch.setattr(inpainting, "POOL", 8)
    draw(here / "images", 24, (20, 24))
    train("--data", "images", "--channels", "1", "--holdout", "0.4", "--steps", "1", "--out", "runs/grey")
    draw(here / "center", 1)                                          # the kind of mask, not a folder of that name
    complete_it("--n", "3", "--out", "done")                          # held-out images of the newest run
    assert "3 images with runs/grey (step 1), cpu" in capsys.readouterr().out
    complete_it("--images", "images", "--n", "2")
    made = [Image.open(file) for name in ("done", "runs/grey/completed-1") for file in sorted(
        (here / name / "completed").iterdir())]
    assert [(im.mode, im.size) for im in made] == [("L", (12, 9))] * 3 + [("L", (24, 20))] * 2


def test_holes_in_files_are_never_read_and_masks_come_from_files(runs, capsys, monkeypatch):
    monkeypatch.setattr(inpainting, "train_enhancer", untrained_enhancer)
    draw(runs / "mine", 3, (30, 40))
    (runs / "masks").mkdir()
    for k in range(3):
        mask = np.full((30, 40), 255, np.uint8)
        mask[3 + k:20, 5:25 + k] = 0
        Image.fromarray(mask).save(runs / "masks" / f"{k:03d}.bmp")
    Image.fromarray(mask).save(runs / "one.png")
    for run, flags in (("wgan", ["--mask", "masks"]), ("pix2pix", ["--mask", "one.png"]),
                       ("pix2pix", ["--mask", "masks", "--enhance"])):
        complete_it(run, "--images", "mine", *flags, "--out", "before")
        for k in range(3):                                            # something else in the hole
            file, mask = runs / "mine" / f"{k:03d}.png", flags[1] if "." in flags[1] else f"masks/{k:03d}.bmp"
            pixels, known = np.array(Image.open(file)), np.asarray(Image.open(mask)) > 128
            assert (np.array(Image.open(runs / f"before/completed/{k:03d}.png"))[known] == pixels[known]).all()
            pixels[~known] = np.random.RandomState(k).randint(0, 256, pixels[~known].shape)
            Image.fromarray(pixels).save(file)
        complete_it(run, "--images", "mine", *flags, "--out", "after")
        for k in range(3):
            before, after = (np.asarray(Image.open(runs / f"{name}/completed/{k:03d}.png")) for name in ("before",
                                                                                                     "after"))
            assert (before == after).all()
        shutil.rmtree("before")
        shutil.rmtree("after")
    assert (runs / "pix2pix/enhance-masks-poisson.pt").exists()
    assert "squashed" not in capsys.readouterr().out
    complete_it("pix2pix", "--images", "mine", "--mask", "masks", "--enhance")        # it is there already
    assert "training images" not in capsys.readouterr().out and (runs / "pix2pix/completed-1/grid.png").exists()
    (runs / "pix2pix/enhance-masks-poisson.pt").write_text("words")                   # damaged: trained anew
    for run, more, trains in (("pix2pix", (), True), ("pix2pix", ("--prior", "0.5"), False), ("wgan", (), True),
                              ("wgan", (), False), ("wgan", ("--prior", "0.5"), True)):       # of another search, too
        complete_it(run, "--images", "mine", "--mask", "masks", "--enhance", "--out", f"{run}{more}{trains}", *more)
        assert ("training images" in capsys.readouterr().out) == trains
    complete_it("pix2pix", "--images", "mine/000.png")
    assert (runs / "pix2pix/completed-2/completed/000.png").exists()


def test_two_at_once_take_two_folders(runs, monkeypatch):
    prepare = complete.prepare_input

    def meanwhile(*args):
        monkeypatch.setattr(complete, "prepare_input", prepare)
        complete_it("pix2pix", "--n", "2")
        return prepare(*args)

    monkeypatch.setattr(complete, "prepare_input", meanwhile)
    complete_it("pix2pix", "--n", "2")
    assert all((runs / f"pix2pix/completed-{k}/grid.png").exists() for k in (1, 2))


def test_a_run_folder_that_is_only_read(runs, monkeypatch, capsys):
    monkeypatch.setattr(inpainting, "train_enhancer", untrained_enhancer)
    write = complete.runs.write_atomically

    def refuse(path, *rest):
        if "pix2pix" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        write(path, *rest)

    monkeypatch.setattr(complete.runs, "write_atomically", refuse)
    complete_it("pix2pix", "--enhance", "--out", "done")
    assert "enhance-center-poisson.pt is not kept: " in capsys.readouterr().out and (runs / "done/grid.png").exists()
    with pytest.raises(SystemExit):
        complete_it("pix2pix", "--evaluate")
    assert "this run, + Poisson" in (said := capsys.readouterr()).out and "Permission denied" in said.err


def test_the_critic_of_a_run_scores_each_image_by_itself(here, monkeypatch):
    monkeypatch.setattr(inpainting, "POOL", 8)
    make_runs(here, "16x20")                                          # two levels: the second has a BatchNorm
    x = torch.rand(5, 3, 16, 20) * 2 - 1
    for run in ("wgan", "dcgan"):                                     # with minibatch discrimination, too
        _, size, method = complete.load_method(here / run, complete.parse_arguments(QUICK), torch.device("cpu"))
        assert size == (3, 16, 20) and torch.allclose(method.D(x)[2:3], method.D(x[2:3]), atol=1e-5)
        saved = checkpoint(run)["state"]
        assert torch.equal(method.D.score.weight, saved["D"]["score.weight"])
        assert torch.equal(method.G.to_image.weight, saved["G_ema"]["to_image.weight"])


def test_numbers_of_a_run_beside_the_baselines(runs, capsys, monkeypatch):
    seen = []

    class Extract(inception.Features):
        def __call__(self, images, *slices):
            seen.append(np.asarray(images))
            return super().__call__(images, *slices)

    monkeypatch.setattr(inception, "load_features", lambda *_, **__: Extract(
        lambda x: x[..., ::4, ::4].flatten(1), lambda x: x / 255, "cpu", "every fourth pixel"))
    monkeypatch.setattr(inpainting, "train_enhancer", untrained_enhancer)
    n = len(complete.images_of_run(read_checkpoint(runs / "wgan"), complete.parse_arguments([]))[1])
    for run in ("wgan", "pix2pix"):
        complete.main([*QUICK[:-2], run, "--evaluate", "--batch", "3", "--enhance"])
        complete_it(run, "--evaluate", "--mask", "random", "--n", "2")
        found = json.loads((runs / run / "completion.json").read_text())
        assert (found["center"]["n"], found["random"]["n"]) == (n, 2) and (found["center"]["search"] is None) == (
            run == "pix2pix")
        scores = found["center"]["scores"]
        assert list(scores) == ["mean fill", "harmonic fill", "mean image + Poisson", "this run, pasted",
                                "this run, + Poisson", "this run, + enhancement", "the originals"]
        for name, row in scores.items():
            assert name == "the originals" or row["psnr"] == pytest.approx(row["hole_psnr"] + 10 * math.log10(4))
            assert ("kid" in row) and "kid" not in found["random"]["scores"]["mean fill"]
        checkpoint_there = read_checkpoint(runs / run)
        train = np.asarray(data.load_of_run(checkpoint_there)[0].images)
        assert all((x == train).all((1, 2, 3)).any() for x in seen[0]) and len(seen[0]) == min(len(train), 2 * n)
        assert not any((x == train).all((1, 2, 3)).any() for x in seen[1]) and len(seen) == 8
        seen.clear()
        assert len({row.get("hole_psnr") for row in scores.values()}) == 7
        assert (runs / run / "completion-center.png").exists()
    said = capsys.readouterr().out
    for words in ("mean image + Poisson", f"{n} held-out images", "KID against", "every fourth pixel"):
        assert words in said
    complete.main([*QUICK[:-2], "wgan", "--evaluate", "--n", "1"])    # one image has no KID, but the other scores
    assert "features: none" in capsys.readouterr().out and "kid" not in json.loads(
        (runs / "wgan/completion.json").read_text())["center"]["scores"]["mean fill"]


@pytest.mark.parametrize("blend, before", [("poisson", "this run, + Poisson"), ("paste", "this run, pasted")])
def test_the_enhancement_that_is_measured_corrects_what_it_was_trained_on(runs, monkeypatch, blend, before):
    monkeypatch.setattr(inpainting, "train_enhancer", lambda x, *_, **__: inpainting.Enhancer(x.shape[1]).eval())
    complete_it("wgan", "--evaluate", "--enhance", "--blend", blend)  # untrained, it changes nothing
    scores = json.loads((runs / "wgan/completion.json").read_text())["center"]["scores"]
    assert scores["this run, + enhancement"] == scores[before]
    assert scores["this run, pasted"] != scores["this run, + Poisson"]


MISTAKES = [
    ("nowhere", "no such run folder"), ("wgan --images nowhere", "--images nowhere: there is no such"),
    ("wgan --mask square", "--mask square: expected center"), ("wgan --mask words.txt", "--mask words.txt: expected"),
    ("wgan --mask white.png", "black is the hole"), ("wgan --mask images/000.png", "a fifth and more of it is grey"),
    ("wgan --mask black.png", "only hole"),
    ("wgan --images images --mask some", "no mask has the name of 0"), ("wgan --out images", "exists already"),
    ("wgan --mask empty", "--mask empty: expected center"), ("wgan --restarts 0", "--restarts"),
    ("wgan --evaluate --images images", "no --images"), ("colour", "is a run of --task colorize"),
    ("broken", "networks do not fit its flags"), ("auto --images images", "got 'auto'"),
    ("wgan --images bad", "none of the 1 images could be completed"), ("all", "held no image out"),
    ("wgan --data nowhere", "there is no such folder"), ("wgan --device cuda:77", "cannot be used here"),
    ("wgan --alternatives pix2pix", "unrecognized arguments"), ("wgan --features none", "unrecognized arguments")]


def test_a_mask_of_another_shape_is_spoken_of(runs, capsys):
    draw(runs / "mine", 2, (20, 24))
    for name, size, said in (("same", (24, 20), False), ("half", (12, 10), False), ("square", (20, 20), True)):
        im = Image.new("L", size, 255)
        im.paste(0, (2, 2, 9, 9))
        im.save(f"{name}.png")
        complete_it("pix2pix", "--images", "mine", "--mask", f"{name}.png", "--out", name)
        assert ("2 of 2 images: the mask has another aspect ratio" in capsys.readouterr().out) == said


def test_mistakes_when_completing(runs, capsys):
    Image.new("L", (20, 20), 255).save("white.png")
    Image.new("L", (20, 20), 0).save("black.png")
    (runs / "empty").mkdir()
    draw(runs / "some", 1)
    (runs / "some/000.png").rename(runs / "some/zzz.png")
    (runs / "bad").mkdir()
    (runs / "bad/a.png").write_text("words")
    (runs / "words.txt").write_text("words")
    saved, broken = checkpoint("pix2pix"), checkpoint("wgan")
    for name, change in (("colour", {"task": "colorize"}), ("all", {"holdout": 0.0}), ("auto", {"crop": "auto"})):
        (runs / name).mkdir()
        flags, same = {**saved["flags"], **change}, saved["same"]
        if name == "all":
            same = {"images": data.load_from_args(argparse.Namespace(**flags)).fingerprint}
        torch.save({**saved, "flags": flags, "same": same}, runs / name / "checkpoint.pt")
    (runs / "broken").mkdir()
    torch.save({**broken, "state": {**broken["state"], "D": {}}}, runs / "broken/checkpoint.pt")
    capsys.readouterr()
    for flags, words in MISTAKES:
        before = sorted(runs.rglob("*"))
        assert words in mistake(capsys, lambda: complete_it(*flags.split()))          # noqa: B023
        assert sorted(runs.rglob("*")) == before
