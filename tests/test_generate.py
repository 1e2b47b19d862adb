"""Tests of generate.py."""

import argparse
import math
import os
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import gan
import generate
import plots
import serve
import sources
from conftest import checkpoint, lively, make, mistake, pixels_of


def test_slerp_moves_along_the_great_circle_at_constant_speed():
    a, b = torch.randn(2, 7, dtype=torch.float64)
    u = a / a.norm()
    w = b - (b @ u) * u                                               # Gram-Schmidt: the plane of a and b
    w, angle = w / w.norm(), math.acos(float(a @ b / a.norm() / b.norm()))
    for t in (0.0, 0.2, 0.5, 0.9, 1.0):
        length = (1 - t) * a.norm() + t * b.norm()
        expected = length * (math.cos(t * angle) * u + math.sin(t * angle) * w)
        assert torch.allclose(generate.slerp(a, b, t), expected, atol=1e-12)
    assert torch.allclose(generate.slerp(a, a, 0.3), a, atol=1e-14)
    assert torch.isfinite(generate.slerp(torch.stack([0 * a, 0 * a]), torch.stack([b, 0 * b]), 0.3)).all()     # psi = 0
    near = a + 1e-9 * b
    assert torch.allclose(generate.slerp(a, near, 0.5), (a + near) / 2, atol=1e-14)
    near, half = (a.norm() * (math.cos(angle) * u + math.sin(angle) * w) for angle in (5e-3, 2.5e-3))
    assert torch.allclose(generate.slerp(a, near, 0.5), half, atol=1e-12)
    rows = generate.slerp(torch.stack([a, b]).float(), torch.stack([b, a]).float(), torch.tensor([[0.25], [0.75]]))
    assert rows.dtype == torch.float32 and torch.allclose(rows[0], rows[1], atol=1e-6)     # from the other end


def test_principal_directions_are_the_singular_vectors_of_the_first_layer():
    G = lively(gan.Generator((9, 12), 1, latent=6, features=4))
    V, shares = generate.principal_directions(G)

    def first_layer(z):
        h, w = G.grids[0]
        return G.norm(G.project(z[None]).view(1, h, w, -1).permute(0, 3, 1, 2)).flatten()

    A = torch.autograd.functional.jacobian(first_layer, torch.randn(6)).double()           # the layer is affine
    _, S, Vh = torch.linalg.svd(A, full_matrices=False)
    assert torch.allclose((V.double() @ Vh.T).abs(), torch.eye(6, dtype=torch.float64), atol=1e-4)
    assert torch.allclose(shares.double(), S**2 / (S**2).sum(), atol=1e-5)
    raw = torch.linalg.svd(G.project.weight.double(), full_matrices=False)[2]
    assert not torch.allclose((V.double() @ raw.T).abs(), torch.eye(6, dtype=torch.float64), atol=0.05)    # gains count
    assert (V.gather(1, V.abs().argmax(1, keepdim=True)) > 0).all()
    lengths = (A @ V.T.double()).norm(dim=0)
    assert (lengths[:-1] >= lengths[1:]).all()


def test_a_latent_is_a_function_of_seed_and_number():
    z = generate.latents(3, range(40), 16)
    assert torch.equal(generate.latents(3, [7, 39, 7], 16), z[[7, 39, 7]])
    assert torch.equal(generate.latents(3, [5], 16, 0.5)[0], 0.5 * z[5])
    expected = np.random.RandomState([3, 5]).standard_normal(16).astype(np.float32)        # guaranteed: never change it
    assert torch.equal(z[5], torch.from_numpy(expected)) and float(z[5, 0]) == pytest.approx(0.0528213, abs=1e-6)
    pairs = [(s, k) for s in (0, 1, 2, 2**31, 2**32 - 1) for k in (0, 1, 2, 999, 10**6)]
    drawn = torch.stack([generate.latents(s, [k], 16)[0] for s, k in pairs])
    assert torch.pdist(drawn).min() > 1                               # (1, 2) is not (2, 1); no two are equal
    many = generate.latents(0, range(2000), 16)
    assert abs(float(many.mean())) < 0.02 and float(many.std()) == pytest.approx(1, abs=0.02)
    corr = torch.corrcoef(many.T) - torch.eye(16)
    assert corr.abs().max() < 0.1 and abs(float((many[1:] * many[:-1]).mean())) < 0.02


def test_a_sample_does_not_depend_on_the_others(capsys):
    G, sizes = lively(gan.Generator(64, 3, 8, features=8)), []
    G.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    expected = generate.sample(G, 5, range(70))
    assert len({x.numpy().tobytes() for x in expected}) == 70 and expected.dtype == torch.uint8
    for batch in (1, 16, 33, 1000):
        numbers, images = zip(*generate.sample_batches(G, 5, range(70), batch=batch))
        assert torch.equal(torch.cat(images), expected) and sum(numbers, []) == list(range(70))
        assert all(len(part) <= max(batch, generate.BLOCK) for part in images)
    for numbers in ([69, 3, 3], [17], list(range(50, 60))):
        assert torch.equal(generate.sample(G, 5, numbers), expected[numbers])
    assert set(sizes) == {generate.BLOCK}                             # the same kernels always
    assert not torch.equal(generate.sample(G, 6, [3]), expected[[3]])
    assert not torch.equal(generate.sample(G, 5, [3], 0.5), expected[[3]])
    z = generate.latents(5, range(70), 8)
    assert (expected.int() - plots.to_uint8(G(z)).int()).abs().max() <= 1
    got = [(ks, len(x)) for ks, x in generate.sample_batches(G, 5, [40, 2, 2, 18], batch=32)]
    assert got == [([2, 18], 2), ([40], 1)]


@pytest.mark.parametrize("channels", [1, 3])
def test_png_files_equal_the_sample_grid(here, capsys, channels):
    gan.save_generator("g.pt", lively(gan.Generator((9, 12), channels, 5, 4)))
    make("g.pt", "--n", "20", "--seed", "4", "--grid", "grid.png")
    make("g.pt", "--n", "7", "--seed", "4", "--out", "files")
    assert "7 images" in capsys.readouterr().out
    stamp = (here / "files/seed4-000003.png").stat().st_mtime_ns
    (here / "files/seed4-000002.png").unlink()
    (here / "files/seed4-000002.png.part").write_bytes(b"half")
    make("g.pt", "--n", "20", "--seed", "4", "--out", "files")        # continues: existing files stay
    assert re.search("14 images .*; 6 were there already", capsys.readouterr().out)
    assert (here / "files/seed4-000003.png").stat().st_mtime_ns == stamp
    names = sorted(path.name for path in (here / "files").glob("*.png"))
    assert names == [f"seed4-{k:06d}.png" for k in range(20)]
    grid = pixels_of("grid.png")
    k = grid.shape[1] // (8 * 14 + 2)                                 # enlarged so many times
    for j, name in enumerate(names):
        tile = grid[::k, ::k][2 + j // 8 * 11:][:9, 2 + j % 8 * 14:][:, :12]
        assert np.array_equal(tile, pixels_of(f"files/{name}")) and tile.std() > 1
        with Image.open(f"files/{name}") as im:
            assert im.mode == ("L" if channels == 1 else "RGB") and im.size == (12, 9)
    make("g.pt", "--seed", "9", "--pick", "3,1", "--out", "files")    # another seed may be in the same folder
    assert len(list((here / "files").glob("seed9-*.png"))) == 2
    assert len(sources.find_items("files")) == 22 and not list((here / "files").glob("*.part"))
    make("g.pt", "--n", "20", "--seed", "4", "--out", "files")        # nothing is left to do
    assert "0 images" in capsys.readouterr().out
    gan.save_generator("h.pt", lively(gan.Generator((9, 12), channels, 5, 4)))
    for name, *flags in (("g.pt", "--out", "files", "--truncation", 0.5), ("h.pt", "--out", "files"),
                         ("h.pt", "--out", ".")):
        assert "was not written by this generator" in mistake(capsys, lambda name=name, flags=flags: make(name, *flags))
    assert not list(here.glob("seed*.png"))


def test_a_failed_write_ends_with_one_sentence(here, capsys, monkeypatch):
    gan.save_generator("g.pt", gan.Generator(8, 1, 4, 2))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    for flags in (["--n", "40"], ["--n", "2"]):                       # in the batch before, in the last batch
        assert "No space left" in mistake(capsys, lambda flags=flags: make("g.pt", "--out", "files", *flags))


def test_the_newest_run_is_taken_and_its_grid_is_deterministic(at_runs, capsys, tmp_path):
    os.utime("runs/b/checkpoint.pt", (1, 1))
    for k in range(2):
        make("--n", "9", "--grid", tmp_path / f"{k}.png")
    assert "9 samples of runs/a, step 8, seed 0" in capsys.readouterr().out.replace("\\", "/")
    assert (tmp_path / "0.png").read_bytes() == (tmp_path / "1.png").read_bytes()
    make("runs/a/generators/step-0000004.pt", "--grid", tmp_path / "2.png")
    assert "step 4" in capsys.readouterr().out
    assert generate.open_generator("runs/a/generators/step-0000004.pt", "cpu").folder == Path("runs/a")


def test_grids_go_into_the_run_folder_unless_a_file_is_named(at_runs, tmp_path, monkeypatch, capsys):
    run, alone = at_runs / "runs/a", tmp_path / "alone/g.pt"
    alone.parent.mkdir()
    shutil.copy(run / "generators/step-0000004.pt", alone)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for given, flags, path in ((run, ["--n", "2"], run / "samples.png"),
                               (run, ["--nearest", "--n", "2", "--data", at_runs / "images"], run / "nearest.png"),
                               (run / "generators/step-0000004.pt", ["--morph", "1,2"], run / "morph.png"),
                               (run / "checkpoint.pt", ["--arithmetic", "1+2"], run / "arithmetic.png"),
                               (alone, ["--n", "2"], tmp_path / "alone/samples.png")):
        make(given, *flags)
        assert capsys.readouterr().out.startswith(f"{path}: ") and path.is_file()
        path.unlink()
    assert all(".cache" in str(file) for file in Path(".").rglob("*.*"))                # nothing beside the cache
    make(run, "--n", "2", "--grid", "here.png")
    assert Path("here.png").is_file() and not (run / "samples.png").exists() and (run / "samples").is_dir()


def test_walks(at_runs, tmp_path, capsys):
    make("runs/a", "--walk", tmp_path / "w.gif", "--pick", "3,1,4", "--frames", "5")
    make("runs/a", "--walk", tmp_path / "w.webp", "--pick", "3,1,4", "--frames", "5")
    G = generate.open_generator("runs/a", "cpu").G
    samples = [plots.to_pil(x, 256 // 12) for x in generate.sample(G, 0, [3, 1, 4])]
    for name in ("w.gif", "w.webp"):
        with Image.open(tmp_path / name) as im:
            assert im.n_frames == 15 and im.info.get("loop") == 0
            for k, sample in enumerate(samples):
                im.seek(5 * k)                                        # each is passed through
                shown = np.asarray(im.convert("RGB")).astype(int)
                assert np.abs(shown - np.asarray(sample)).mean() < (3 if name.endswith("gif") else 1e-9)
    make("runs/a", "--morph", "3,1", "--grid", tmp_path / "m.png", "--n", "5")
    strip = pixels_of(tmp_path / "m.png")
    ends = generate.sample(G, 0, [3, 1])
    k = 128 // 12
    for x, left in ((ends[0], 8), (ends[1], 8 + 4 * (12 * k + 8))):
        tile = strip[8:8 + 9 * k:k, left:left + 12 * k:k].astype(int)
        assert np.abs(tile - x.permute(1, 2, 0).numpy()).max() <= 1
    assert strip.shape[1] == 8 + 5 * (12 * k + 8)


def test_latent_arithmetic(at_runs, tmp_path):
    z = torch.randn(3, 5)
    total = generate.latent_sum(z, [1.0, 1.0, -1.0])
    plain = z[0] + z[1] - z[2]
    assert torch.allclose(total / total.norm(), plain / plain.norm(), atol=1e-6)
    assert float(total.norm()) == pytest.approx(float(z.norm(dim=1).mean()), rel=1e-5)
    make("runs/a", "--arithmetic", "12+40-7", "--grid", tmp_path / "x.png")
    G = generate.open_generator("runs/a", "cpu").G
    z = generate.latents(0, [12, 40, 7], 5)
    expected = generate.draw(G, torch.cat([z, generate.latent_sum(z, [1, 1, -1])[None]]))
    shown, k = pixels_of(tmp_path / "x.png"), 128 // 12
    for j in range(4):
        left = 8 + j * (12 * k + 8)
        assert np.array_equal(shown[8:8 + 9 * k:k, left:left + 12 * k:k], expected[j].permute(1, 2, 0).numpy())


def test_nearest_images_against_loops():
    random = np.random.RandomState(0)
    images, x = (random.randint(0, 256, (n, 3, 5, 6)).astype(np.uint8) for n in (40, 7))
    x[2] = images[11][:, :, ::-1]                                     # a mirrored copy
    x[3] = images[39]
    for mirrored in (False, True):
        rows, flipped, rms = generate.nearest_images(images, torch.from_numpy(x), mirrored, block=16)
        for k in range(7):
            found = [(math.sqrt(((y[:, :, ::step].astype(float) - x[k]) ** 2).mean()), j, step < 0)
                     for step in ((1, -1) if mirrored else (1,)) for j, y in enumerate(images)]
            best = min(found)
            assert (int(rows[k]), bool(flipped[k])) == best[1:] and float(rms[k]) == pytest.approx(best[0], abs=0.02)
    assert bool(flipped[2]) and float(rms[2]) == 0 and not bool(flipped[3])


def test_nearest_training_images_of_a_run(at_runs, tmp_path, capsys):
    make("runs/a", "--nearest", "--n", "4", "--grid", tmp_path / "n.png")
    text = capsys.readouterr().out
    assert "4 pairs" in text and "of 12 training images" in text
    printed = re.findall(r"sample (\d): (\S+?\.png)(, mirrored)?, .* ([\d.]+) of 255", text)
    assert len(printed) == 4 and any(mirrored for _, _, mirrored, _ in printed)
    grid = pixels_of(tmp_path / "n.png")
    scale = grid.shape[1] // (8 * 14 + 2)
    tiles = [grid[::scale, ::scale][2:11, 2 + 14 * j:14 + 14 * j].astype(float) for j in range(8)]
    dataset = data.load_from_args(argparse.Namespace(**checkpoint("runs/a")["flags"]), "train")
    for k, name, mirrored, rms in printed:
        a, b = tiles[2 * int(k)], tiles[2 * int(k) + 1]
        assert math.sqrt(((a - b) ** 2).mean()) == pytest.approx(float(rms), abs=0.06)
        real = dataset.images[dataset.names.index(name)].transpose(1, 2, 0)
        assert np.array_equal(b, real[:, ::-1] if mirrored else real)
    moved = at_runs / "elsewhere"
    (at_runs / "images").rename(moved)
    try:
        assert "no such folder" in mistake(capsys, lambda: make("runs/a", "--nearest"))
        make("runs/a", "--nearest", "--n", "4", "--data", "elsewhere", "--grid", tmp_path / "n2.png")
    finally:
        moved.rename(at_runs / "images")
    assert (tmp_path / "n.png").read_bytes() == (tmp_path / "n2.png").read_bytes()
    (tmp_path / "grey").mkdir()
    for k in range(3):
        Image.fromarray(np.full((9, 12), 80 * k, np.uint8)).save(tmp_path / f"grey/{k}.png")
    assert "not the images the run was trained on ([3, 1, 9, 12, " in mistake(
        capsys, lambda: make("runs/a", "--nearest", "--data", tmp_path / "grey"))


def test_networks_that_take_images_are_refused(at_runs, tmp_path, capsys):
    net = gan.UNet((9, 12), features=2).eval()
    (tmp_path / "pix").mkdir()
    torch.save({**checkpoint("runs/a"), "script": "train_pix2pix.py", "network": "UNet", "config": net.config,
                "state": {"G_ema": net.state_dict()}}, tmp_path / "pix/checkpoint.pt")
    gan.save_generator(tmp_path / "g.pt", net)           # elsewhere, in no run
    for name in ("pix", "g.pt"):
        assert "python complete.py" in mistake(capsys, lambda name=name: make(tmp_path / name))
    assert "python complete.py" in mistake(capsys, lambda: serve.main([str(tmp_path / "pix"), "--device", "cpu"]))


@pytest.mark.parametrize("flags, answer", [
    (["nowhere"], "nowhere does not exist"),
    (["images"], "there is no checkpoint.pt"),
    (["images/000.png"], "no file that a training script wrote"),
    (["runs/a", "runs/b"], "unrecognized arguments: runs/b"),
    (["runs/a", "--walk", "w.gif", "--grid", "s.png"], "--walk makes none"),
    (["runs/a", "--morph", "1,2", "--pick", "3"], "--pick and --morph both select"),
    (["runs/a", "--n", "0"], "--n"),
    (["runs/a", "--n", "2", "--pick", "1"], "--pick and --n both select"),
    (["runs/a", "--pick", "1,b"], "--pick: expected sample numbers, as in 3,17,40, got '1,b'"),
    (["runs/a", "--n", "2000"], "expected at most 1024 samples in one file, got 2000"),
    (["runs/a", "--n", "1000000", "--walk", "w.gif"], "expected at most 200 samples in one file, got 1000000"),
    (["runs/a", "--frames", "2400", "--walk", "w.gif", "--pick", "1,2,3"], "give a smaller --n or --frames"),
    (["runs/a", "--frames", "2401", "--walk", "w.gif"], "--frames: expected an integer >= 1 and < 2401"),
    (["runs/a", "--n", "99999999999999", "--out", "files"], "--n"),
    (["runs/a", "--truncation", "nan"], "--truncation"),
    (["runs/a", "--seed", "-1"], "--seed"),
    (["runs/a", "--walk", "w.mp4"], "expected a file name ending in .gif or .webp, got 'w.mp4'"),
    (["runs/a", "--grid", "x.webp"], "ending in .png"),               # has no room for a long strip
    (["runs/a", "--grid", "x.psd"], "ending in .png"),                # Pillow reads it and does not write it
    (["runs/a", "--morph", "1"], "two sample numbers"),
    (["runs/a", "--arithmetic", "1*2"], "as in 12+40-7"),
    (["runs/a", "--arithmetic", "3-3"], "cancel one another"),
    (["runs/a", "--morph", "1,2", "--walk", "w.gif"], "not allowed with"),
    (["runs/a", "--grid", "images/000.png/x.png"], "images"),
    (["runs/a", "--nearest", "--data", "nowhere"], "no such folder"),
])
def test_user_errors(at_runs, capsys, flags, answer):
    before = sorted(at_runs.rglob("*"))
    assert answer in mistake(capsys, lambda: make(*flags))
    assert sorted(path for path in at_runs.rglob("*") if ".cache" not in str(path)) == [
        path for path in before if ".cache" not in str(path)]


def test_generate_without_any_run(here, capsys):
    assert "there is no run" in mistake(capsys, make)
    gan.save_generator("g.pt", gan.Generator(8, 1, 4, 2))
    assert "run folder" in mistake(capsys, lambda: make("g.pt", "--nearest"))


def test_commands_of_the_docstring_parse():
    commands = re.findall(r"python generate\.py((?: [^\s`#|]+)*)", generate.__doc__)
    assert len(commands) == 7
    parsed = [generate.parse_arguments(shlex.split(flags)) for flags in commands]
    assert [args.mode for args in parsed[2:6]] == ["out", "nearest", "walk", "morph"]
    assert [args.mode for args in parsed[6:]] == ["arithmetic"]
    assert [len(args.numbers) for args in parsed] == [64, 64, 1000, 32, 8, 9, 64]
    assert [args.path for args in parsed[2:7]] == ["./fakes", None, "walk.gif", None, None]
