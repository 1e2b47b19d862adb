"""Tests of pairs.py."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import data
import inpainting
import pairs
import runtime
import train_pix2pix
from conftest import draw, draw_pairs, images_of, mistake, pair_flags, write_pairs


def test_pairs_made_of_single_images():
    pixels = np.random.RandomState(0).randint(0, 256, (2, 3, 24, 36)).astype(np.uint8)
    y = data.to_float(torch.from_numpy(pixels))
    for k in range(2):
        im = Image.fromarray(pixels[k].transpose(1, 2, 0).copy())
        assert np.abs(np.asarray(im.convert("L")) - (pairs.to_grey(y)[k, 0].numpy() + 1) * 127.5).max() < 1
        planes = [Image.fromarray(plane.numpy(), "F") for plane in y[k]]
        small = [plane.resize((9, 6), Image.Resampling.BICUBIC) for plane in planes]
        large = [Image.fromarray(np.asarray(plane).clip(-1, 1)).resize((36, 24), Image.Resampling.BICUBIC)
                 for plane in small]
        small = pairs.degrade(y, 4)[k].numpy()
        assert np.abs(small - np.stack([np.asarray(p) for p in large]).clip(-1, 1)).max() < 1e-4
    noisy, again = (pairs.degrade(y * 0.2, 4, 0.1, torch.Generator().manual_seed(3)) for _ in range(2))
    noise = 0.1 * torch.randn((2, 3, 6, 9), generator=torch.Generator().manual_seed(3))
    noise = nn.functional.interpolate(noise, (24, 36), mode="bicubic", antialias=True)
    assert torch.equal(noisy, again) and (noisy - pairs.degrade(y * 0.2, 4) - noise).abs().max() < 1e-6
    assert pairs.degrade(y, 1.5).shape == y.shape and pairs.degrade(y, 100).shape == y.shape

    x = torch.zeros(1, 3, 9, 10)
    x[..., 5:] = 0.5                                                  # an edge between two columns
    drawing = pairs.line_drawing(x)
    assert drawing.shape == (1, 1, 9, 10) and (drawing[..., 4:6] < -0.5).all() and (drawing[..., :3] == 1).all()
    assert torch.allclose(drawing, pairs.line_drawing(x * 0.3), atol=1e-4) and (pairs.line_drawing(x * 0) == 1).all()
    x = torch.randn(1, 1, 7, 6)
    padded, g = np.pad(x[0, 0].numpy(), 2, "edge"), np.zeros((7, 6))
    blur = sum(a * b * padded[i:i + 9, j:j + 8] for i, a in enumerate((0.25, 0.5, 0.25))
               for j, b in enumerate((0.25, 0.5, 0.25)))
    for i in range(7):
        for j in range(6):
            window = blur[i:i + 3, j:j + 3]
            g[i, j] = np.hypot(*(np.dot(side[2] - side[0], (0.25, 0.5, 0.25)) for side in (window, window.T)))
    expected = 1 - 2 * np.minimum(1, g / (4 * g.mean()))
    assert np.allclose(pairs.line_drawing(x)[0, 0].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("size", [(8, 8), (9, 13), (40, 24), (8, 1024)])
def test_jitter_enlarges_and_crops_at_random(size):
    x = torch.randn(300, 2, *size).clamp(-1, 1)
    large = torch.nn.functional.interpolate(x, [round(1.117 * side) for side in size], mode="bicubic").clamp(-1, 1)
    found = pairs.jitter(x, 1.117, torch.Generator().manual_seed(1))
    assert found.shape == x.shape and found.abs().max() <= 1
    most, places = [b - a for a, b in zip(size, large.shape[2:])], set()
    for one, whole in zip(found, large):
        i, j = next((i, j) for i in range(most[0] + 1) for j in range(most[1] + 1)
                    if torch.equal(one, whole[:, i:i + size[0], j:j + size[1]]))
        places.add((i, j))
    assert most[0] > 0 and most[1] > 0
    assert {i for i, _ in places} == set(range(most[0] + 1)) and len(places) > 2 * most[0]
    assert {0, most[1]} <= {j for _, j in places} or most[1] > 99
    assert torch.equal(pairs.jitter(x, 1.01, torch.Generator()), x) == (max(size) < 50)           # not a pixel more


def test_all_of_a_pair_gets_one_jitter_and_what_is_looked_at_none(monkeypatch):
    y = data.to_float(torch.from_numpy(images_of(40, size=(20, 24))))
    for task in ("complete", "edges", "enhance", "colorize"):
        args = train_pix2pix.parse_arguments(["--data", "x", "--task", task, "--noise", "0"])
        x, target, m = (make := pairs.PairMaker(args, y))(y, 1)
        assert torch.equal(make(y, 0)[1], y) and torch.equal(target, y) == (task in ("colorize", "enhance"))
        expected = inpainting.completion_input(target, m) if task == "complete" else {
            "edges": pairs.line_drawing, "enhance": pairs.degrade, "colorize": pairs.to_grey}[task](target)
        assert torch.allclose(x, expected, atol=1e-6)
    twice = pairs.JoinedChannels(y, y)

    def drawn(step, *flags, rank=0):
        monkeypatch.setenv("RANK", str(rank))
        return pairs.PairMaker(pair_flags("--data", "x", *flags), twice)(torch.cat([y, y], 1), step)[:2]

    x, target = drawn(1)
    assert torch.equal(x, target) and not torch.equal(x, y) and torch.equal(drawn(1)[0], x)
    others = [x, drawn(2)[0], drawn(1, "--seed", "5")[0], drawn(1, rank=1)[0], drawn(1, "--jitter", "1.3")[0]]
    assert not any(torch.equal(a, b) for k, a in enumerate(others) for b in others[:k])
    assert torch.equal(drawn(1, "--jitter", "1")[0], y) and torch.equal(drawn(0)[0], y)


def test_pairs_on_disk(here):
    drawn = draw_pairs(40)
    write_pairs(here, drawn)
    a = np.stack([np.asarray(im).transpose(2, 0, 1) for im, _ in drawn])
    b = np.stack([np.asarray(im)[None] for _, im in drawn])
    order = sorted(range(40), key=str)
    for folder in ("two", "wide"):
        found, turned = (pairs.load_pairs(pair_flags("--data", folder, "--direction", direction))
                         for direction in ("AtoB", "BtoA"))
        assert found.images.channels == (3, 1) and turned.images.channels == (1, 3)
        assert found.images.shape == turned.images.shape == (40, 4, 20, 24)
        assert np.array_equal(found.images[np.arange(40)], np.concatenate([a, b], 1)[order])
        assert np.array_equal(turned.images[np.arange(40)], np.concatenate([b, a], 1)[order])
        parts = [pairs.load_pairs(pair_flags("--data", folder, "--holdout", "0.3"), part)
                 for part in ("train", "heldout", "all")]
        names = [set(part.names) for part in parts]
        assert names[0] | names[1] == names[2] and not names[0] & names[1] and 4 <= len(names[1]) <= 20
        assert parts[0].n_heldout == len(names[1]) and parts[0].fingerprint != parts[1].fingerprint
    (here / "two/A/x/3.png").write_bytes(b"broken")                   # its partner goes with it
    found = pairs.load_pairs(pair_flags("--data", "two"))
    order.remove(3)
    assert np.array_equal(found.images[np.arange(39)], np.concatenate([a, b], 1)[order]) and len(found.skipped) == 1
    assert pairs.load_pairs(pair_flags("--data", "two", "--limit", "24")).images.shape[0] == 23


def test_pairs_that_share_an_input_or_a_target_are_held_out_together(here):
    random = np.random.RandomState(3)
    a, b = (images_of(60, seed, (8, 8)).transpose(0, 2, 3, 1) for seed in (0, 1))
    drawn = [(k, k) for k in range(20)]                               # nothing shared, then chains of all lengths
    drawn += [tuple(20 + random.randint(0, 40, 2)) for _ in range(45)]
    for side, images, rows in (("A", a, [x for x, _ in drawn]), ("B", b, [y for _, y in drawn])):
        (here / "two" / side).mkdir(parents=True)
        for k, row in enumerate(rows):
            Image.fromarray(images[row]).save(here / f"two/{side}/{k:02d}.png")
    groups = [{k} for k in range(len(drawn))]
    for k, one in enumerate(drawn):
        joined = [group for group in groups if any(one[0] == drawn[j][0] or one[1] == drawn[j][1] for j in group)]
        groups = [group for group in groups if group not in joined] + [set().union({k}, *joined)]
    assert 25 < len(groups) < 55 and max(map(len, groups)) > 8
    for direction in ("AtoB", "BtoA"):
        flags = pair_flags("--data", "two", "--size", "8", "--holdout", "0.4", "--direction", direction)
        train, held = ({int(name) for name in pairs.load_pairs(flags, part).names} for part in ("train", "heldout"))
        assert train | held == set(range(len(drawn))) and not train & held and min(len(train), len(held)) > 9
        assert all(group <= train or group <= held for group in groups)
        targets = (b if direction == "AtoB" else a)[:20]              # a pair by itself: the hash of its target
        alone = data.heldout_mask([data.hash_bytes(image.tobytes()) for image in targets], [""] * 20, 0.4)
        assert {k for k in held if k < 20} == set(np.flatnonzero(alone))


def refused(capsys, *flags):
    return mistake(capsys, lambda: train_pix2pix.main(["--device", "cpu", "--steps", "1", "--features", "4", *flags]))


def test_single_masked_images_are_no_pairs(here, capsys):
    """What ended a student's project: masked faces, a file each, given to pix2pix, which took halves for pairs."""
    (here / "faces").mkdir()
    (here / "wide").mkdir()
    for k, (a, _) in enumerate(draw_pairs(9, (64, 64))):
        a.paste((0, 0, 0), (16, 16, 48, 48))
        a.save(here / f"faces/{k}.png")
    text = refused(capsys, "--data", "faces", "--task", "pairs")
    assert "got single images, not pairs (each half would have 64x32 pixels). Rename or link" in text
    assert "python train_pix2pix.py --data faces --task complete" in text and not list(here.glob("runs/pix2pix*"))
    flags = "--device cpu --features 4 --steps 1 --holdout 0 --out".split()
    train_pix2pix.main(["--data", "faces", *flags, "holes"])          # a warning: it may be a plain background
    assert "100 % of the middle is the same in all images: if a hole" in capsys.readouterr().out
    draw(here / "whole", 9, (64, 64))
    train_pix2pix.main(["--data", "whole", *flags, "none"])
    assert "of the middle" not in capsys.readouterr().out
    for k, (a, _) in enumerate(draw_pairs(6, (40, 100))):       # wide single images: no edge in the middle
        a.save(here / f"wide/{k}.png")
    assert "goes on into the right half without an edge" in refused(capsys, "--data", "wide", "--task", "pairs")


@pytest.mark.parametrize("names", ["train trainannot", "labels images", "input target", "train_A train_B"])
def test_pairs_in_folders_of_other_names(here, capsys, names):
    """Told apart from single images in folders, and from pairs side by side in the folders of a split."""
    for k, (a, b) in enumerate(draw_pairs(12, (60, 80))):
        both = Image.new("RGB", (160, 60))
        both.paste(a, (0, 0))
        both.paste(b, (80, 0))
        for folder, image in zip(names.split(), (a, b)):
            for path in (here / "x" / folder / f"{k}.png", here / "more" / folder / "x" / f"{k}.png",
                         here / "y" / ("val", "test")[k % 2] / f"{k // 2}{folder}.png",
                         here / "singles" / folder / f"{folder}{k}.png"):
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path)
        path = here / "side by side" / ("train" if k < 7 else "val") / f"{k % 7}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        both.save(path)
    for source in ("x", "more", "singles"):
        assert "Rename or link two folders of pairs to A and B" in refused(capsys, "--data", source, "--task", "pairs")
    for name, side in zip(sorted(names.split()), "AB"):
        (here / "more" / side).symlink_to(name)
    assert len(pairs.load_pairs(pair_flags("--data", "more")).names) == 12
    found = pairs.load_pairs(pair_flags("--data", "side by side"))
    assert len(found.names) == 12 and found.images.shape[1] == 4


def test_class_numbers_are_no_levels(here, capsys):
    """Refused, on either side, resized or not; what is spread, dark or of little contrast is taken."""
    scene = images_of(10, 5, (40, 48), 1)[:, 0].astype(int)
    palette = np.random.RandomState(0).randint(0, 256, 768).astype(np.uint8).tolist()
    kinds = {"twelve": (scene * 12 // 256, 0), "twenty-one": (scene * 21 // 256, 0), "two": (scene // 128, 0),
             "spread": (scene * 12 // 256 * (255 // 11), 1), "palette": (scene * 12 // 256, 1),
             "mask": (scene // 128 * 255, 1), "lines": (255 - 255 * (scene % 32 == 0), 1),
             "dark": (scene // 6, 1), "fog": (180 + scene // 12, 1)}
    for kind, (pixels, taken) in kinds.items():
        for side in "AB":
            (here / kind / side).mkdir(parents=True)
        for k, (a, _) in enumerate(draw_pairs(10, (40, 48))):
            a.save(here / kind / "A" / f"{k}.png")
            labels = Image.fromarray(pixels[k].astype(np.uint8))
            if kind == "palette":
                labels.putpalette(palette)
            labels.save(here / kind / "B" / f"{k}.png")
        for flags in ([], ["--size", "40x48"], ["--direction", "BtoA"]):
            args = pair_flags("--data", kind, *flags)
            images = pairs.load_pairs(args).images
            x, y, m = pairs.PairMaker(args, images)(data.to_float(torch.from_numpy(images[:])), 0)
            if taken:
                pairs.check_pairs(x, y, m, kind)
                continue
            with pytest.raises(runtime.UserError, match="10 of 10 pairs the (input|target) is flat or black") as error:
                pairs.check_pairs(x, y, m, kind)
            assert ("input" if "BtoA" in flags else "target") in str(error.value)
    assert "levels 0 to 11: spread them over 0 to 255, the K class numbers of a label map by times 255 // (K - 1)" in (
        refused(capsys, "--data", "twelve", "--task", "pairs", "--size", "40x48"))


def test_a_name_stands_once_on_each_side(here):
    for name in ("A/x.png", "B/x.png", "B/x.jpg"):
        (here / name).parent.mkdir(exist_ok=True)
        Image.new("L", (16, 16), 99).save(here / name)
    with pytest.raises(runtime.UserError, match="each once; 1 are not: x"):
        pairs.find_pairs(here)


def test_a_postscript_program_with_the_suffix_of_an_image_is_not_run(here):
    (here / "d").mkdir()
    Image.new("RGB", (16, 16), "red").save(here / "d" / "a.png")
    Image.new("RGB", (16, 16), "red").save(here / "d" / "b.png", "EPS")
    (name, why), = data.load("d", (16, 16)).skipped
    assert name == "b.png" and "PostScript" in why


def test_what_is_a_pair_is_taken(here):
    random = np.random.RandomState(0)
    for kind in ("negative", "grainy", "plain", "unlike"):
        (here / kind).mkdir()
        for k, (a, b) in enumerate(draw_pairs(6, (32, 40), seed=len(kind))):
            x = np.asarray(a.convert("L"), np.float64)
            if kind == "negative":
                y = np.asarray(b)
            elif kind == "grainy":                                    # no edge in so much grain, but one thing twice
                x = random.uniform(0, 255, x.shape)
                y = 0.9 * x
            elif kind == "unlike":                                    # but for the edge, nothing speaks for a pair
                y = 255 * (random.rand() > 0.5) + random.normal(0, 9, x.shape)
            else:                                                     # objects on white: the seam says nothing
                x[:, :4] = x[:, -4:] = 255
                y = 255 - np.abs(np.diff(x, axis=1, prepend=255))
            Image.fromarray(np.hstack([x, y]).clip(0, 255).astype(np.uint8)).save(here / kind / f"{k}.png")
        assert pairs.why_not_pairs(sorted((here / kind).iterdir())) == "", kind


def test_mistakes_with_pairs(here, capsys):
    write_pairs(here, draw_pairs())
    draw(here / "unpaired/trainA")
    draw(here / "unpaired/trainB")
    assert "A and B" in refused(capsys, "--data", "unpaired", "--task", "pairs")
    (here / "two/A/x/3.png").unlink()
    assert "1 are not: x/3" in refused(capsys, "--data", "two", "--task", "pairs")
    assert "the demo has single images" in refused(capsys, "--task", "pairs")
    assert "--classes chooses among such" in refused(capsys, "--data", "wide", "--task", "pairs", "--classes", "3")
    assert "needs a folder" in refused(capsys, "--data", "nowhere", "--task", "pairs")
    assert "--crop" in refused(capsys, "--data", "wide", "--task", "pairs", "--crop", "0.5")
    assert "--holdout" in refused(capsys, "--data", "wide", "--task", "pairs", "--holdout", "1")
    assert "0 of 8 pairs can be used" in refused(capsys, "--data", "wide", "--task", "pairs", "--holdout", "0.99999")
    for name, change in (("same", lambda a: a), ("flat", lambda a: a.convert("L").point(lambda v: v // 128))):
        (here / name / "A").mkdir(parents=True)
        (here / name / "B").mkdir()
        for k, (a, _) in enumerate(draw_pairs()):
            a.save(here / name / f"A/{k}.png")
            change(a).save(here / name / f"B/{k}.png")
    assert "the same image, so there is nothing to learn" in refused(capsys, "--data", "same", "--task", "pairs")
    text = refused(capsys, "--data", "flat", "--task", "pairs")
    assert "the target is flat or black, levels 0 to 1:" in text
    draw(here / "images", mode="L")
    Image.new("L", (8, 8), 255).save("white.png")
    for flags, words in (("--task colorize", "are grey, there is no colour"), ("--mask white.png", "no hole or only"),
                         ("--depth 7", "--depth: expected 0 or 2 to 6 at --size 64, got 7"), ("--depth 1", "got 1"),
                         ("--n-layers 5", "--n-layers: expected 0 or 1 to 4 at --size 64, got 5"),
                         ("--factor 0.5", "--factor"), ("--mask center,middle", "--mask middle: expected center, half"),
                         ("--jitter 0.9", "--jitter: expected a number >= 1 and < 2, got '0.9'"),
                         ("--decay 1", "--decay: expected a number >= 0 and < 1, got '1'"),
                         ("--size 4", "nearest size that works is 8x8")):
        assert words in refused(capsys, "--data", "images", *flags.split())
    for flag in ("--evaluate-every", "--evaluate-n", "--evaluate-network", "--latent", "--graphs", "--profile"):
        assert f"unrecognized arguments: {flag}" in refused(capsys, "--data", "images", flag, "5")
    assert not list(here.glob("runs/pix2pix*"))


def test_pairs_that_cannot_be_read_are_named_once(here, monkeypatch):
    for side in "AB":
        draw(here / "two" / side, 6)
    (here / "two/A/001.png").write_bytes((here / "two/A/001.png").read_bytes()[:200])
    (here / "two/A/002.png").unlink()
    Image.fromarray(np.full((20, 24), np.nan, np.float32)).save(here / "two/A/002.tif")
    (here / "two/B/003.png").write_bytes(b"text")
    (here / "two/B/004.png").write_bytes(b"")
    built, build = [], data.build
    monkeypatch.setattr(data, "build", lambda *args: (built.append(args), build(*args))[1])
    for _ in range(2):
        found = pairs.load_pairs(pair_flags("--data", "two"))
        assert found.names == ["000", "005"] and len(built) == 2      # A and B
        assert {name: why.split()[0] for name, why in found.skipped} == {
            "001": "image", "002": "holds", "003": "not", "004": "the"}
