"""Tests of evaluate.py."""

import argparse
import contextlib
import copy
import csv
import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import data
import evaluate
import gan
import inception
import metrics
import plots
import runs
import runtime
import train_wgan
from conftest import SCRIPTS, checkpoint, draw, images_of, mistake, same, train


def test_samples_depend_on_the_seed_alone():
    G = gan.Generator(16, 1, 5, 4, 8)
    for norm in G.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.running_mean), nn.init.uniform_(norm.running_var, 0.5, 2)
    before, state = copy.deepcopy(G.state_dict()), torch.get_rng_state()
    images = evaluate.sample(G.eval(), 11, seed=4, batch=4)
    assert same(before, G.state_dict()) and torch.equal(state, torch.get_rng_state())
    stream = torch.Generator().manual_seed(4)
    z = torch.cat([torch.randn(k, 5, generator=stream) for k in (4, 4, 3)])
    expected = torch.cat([G(one[None]) for one in z])          # alone: no image depends on its batch
    assert images.dtype == np.uint8 and np.abs(images - plots.to_uint8(expected).numpy().astype(int)).max() <= 1


def test_real_and_fake_pass_one_code_path(tiny, capsys):
    """The same images as a folder, as arrays of both layouts and as statistics: FID 0 whichever is called fake."""
    images = images_of(40)
    images[20:] = images[0]                                           # half of them copies, and each of them counts
    Path("folder").mkdir()
    for k, x in enumerate(images):
        Image.fromarray(x.transpose(1, 2, 0)).save(f"folder/{k:03d}.png")
    np.save("first.npy", images)
    np.savez("last.npz", images.transpose(0, 2, 3, 1))
    evaluate.main(["folder", "--save-stats", "stats", "--network", tiny])
    with np.load("stats.npz") as file:                                # as pytorch-fid computes and names them
        features = inception.load_features(tiny)(images).double().numpy()
        assert set(file) == {"mu", "sigma"} and np.allclose(file["mu"], features.mean(0))
        assert np.allclose(file["sigma"], np.cov(features, rowvar=False)) and file["sigma"].dtype == np.float64
    for real, fake in (("folder", "first.npy"), ("last.npz", "folder"), ("stats.npz", "folder"),
                       ("folder", "stats.npz")):
        evaluate.main([real, fake, "--network", tiny, "--json", "found.json"])
        assert abs(json.loads(Path("found.json").read_text())["fid"]["value"]) < 1e-6
    out = capsys.readouterr().out
    assert "floor at N = 20" in out and "under 2,048" in out and "suspect copying" in out and "tiny.pt" in out
    assert out.count("\nKID") == 2                                     # not of statistics


def test_every_number_of_a_run(here, tiny, capsys):
    draw(here / "images", 150, (12, 16))
    train_wgan.main("--device cpu --data images --size 12x16 --features 4 --latent 5 --batch 5 --steps 2 "
                    "--n-critic 1 --holdout 0.3 --save-every 1 --out runs/one".split())
    capsys.readouterr()
    evaluate.main(["--fid", "--kid", "--pr", "--ssim", "--memorisation", "--ceiling", "--sweep", "--tsne", "t.png",
                   "--network", tiny, "--n", "60"])
    out = capsys.readouterr().out
    found = json.loads((here / "runs/one/metrics.json").read_text())
    assert set(found) == {"fid", "fid_half", "fid_floor", "kid", "kid_floor", "precision", "recall", "density",
                          "coverage", "diversity", "ms_ssim_diversity", "fid_gaussian_noise", "fid_radial_noise",
                          "memorisation", "sweep"}
    for entry in found.values():
        assert entry["step"] == 2 and "tiny.pt" in entry["features"]
        assert entry["seed"] == 0 and entry["resize"] == "pytorch-fid"
    for words in ("60 real v 60 fake", "floor at N = 30", "under 2,048", "compare only with scores through it"):
        assert words in out
    train, heldout = data.load_of_run(checkpoint("runs/one"))
    G, real = gan.load_generator("runs/one"), train.images[np.random.RandomState(0).permutation(len(train.images))[:60]]
    fake = evaluate.sample(G, 60)[np.random.RandomState(0).permutation(60)]
    spread = [metrics.diversity(torch.from_numpy(x)).item() for x in (fake, real)]
    assert found["diversity"]["value"] == pytest.approx(spread[0] / spread[1])
    real, fake = (inception.load_features(tiny)(x) for x in (real, fake))
    assert found["fid"]["value"] == pytest.approx(metrics.fid(real, fake))
    assert found["fid_floor"]["value"] == pytest.approx(metrics.fid(real[:30], real[30:]))
    assert found["fid_half"]["value"] == pytest.approx(metrics.fid(real[:30], fake[:30]))
    assert found["kid"]["value"] == pytest.approx(metrics.kid(real, fake)[0])
    assert found["fid_gaussian_noise"]["value"] > 0 and len(found["sweep"]["points"]) == 12
    for name in ("runs/one/sweep.png", "runs/one/memorisation.png", "t.png"):
        assert np.asarray(Image.open(name).convert("L")).std() > 5
    assert len(train.images) + len(heldout.images) == 150 and 20 < len(heldout.images) < 75
    evaluate.main(["runs/one/generators/step-0000001.pt", "--fid", "--network", tiny, "--n", "60"])
    again = json.loads((here / "runs/one/metrics.json").read_text())
    assert again["fid"]["step"] == 1 and again["kid"] == found["kid"]
    assert again["fid"]["value"] != pytest.approx(found["fid"]["value"])


def test_pairs_of_one_name(here, capsys):
    draw(here / "a", 4, (24, 24))
    shutil.copy(here / "a/000.png", here / "a/001.png")               # two that are equal, each with a partner
    (here / "b").mkdir()
    for path in (here / "a").iterdir():
        grey = 64 + 9 * int(path.stem)
        Image.open(path).point(lambda v, grey=grey: min(255, v // 2 + grey)).save(here / "b" / path.name)
    evaluate.main(["a", "b", "--pairs", "--json", "found.json"])       # which means --ssim
    found = json.loads(Path("found.json").read_text())
    a, b = (np.stack([np.asarray(Image.open(path)).transpose(2, 0, 1) for path in sorted((here / name).iterdir())])
            for name in "ab")
    assert found["ssim"]["value"] == pytest.approx(metrics.ssim(a, b, 255).mean().item())
    assert found["psnr"]["value"] == pytest.approx(metrics.psnr(a, b, 255).mean().item())
    assert found["ms_ssim"]["scales"] == 2
    np.save("a.npy", a), np.save("b.npy", b), np.save("few.npy", b[:3])
    chosen = np.random.RandomState(7).permutation(4)[:3]              # arrays have no names: by number
    evaluate.main("a.npy b.npy --pairs --ssim --n 3 --seed 7 --json found.json".split())
    found = json.loads(Path("found.json").read_text())
    assert found["psnr"]["value"] == pytest.approx(metrics.psnr(a[chosen], b[chosen], 255).mean().item())
    assert found["psnr"]["real_is"] == "3 of 4 images of a.npy"
    assert "the same names" in mistake(capsys, lambda: evaluate.main("a.npy few.npy --pairs --ssim".split()))
    (here / "b" / "000.png").unlink()
    assert "the same names" in mistake(capsys, lambda: evaluate.main("a b --pairs --ssim".split()))


def test_noise_has_the_moments_of_the_images_and_radial_noise_fades_from_the_centre():
    seen = []
    real = argparse.Namespace(images=images_of(400, size=(12, 16)))
    c = argparse.Namespace(real=real, args=argparse.Namespace(seed=3), network=lambda x, what: seen.append(x))
    for kind in ("gaussian", "radial"):
        evaluate.Comparison.noise_features(c, kind, 300)
    flat, radial = (x.astype(float).std((0, 1)) for x in seen)        # over images and channels, (12, 16)
    assert abs(seen[0].mean() - real.images.mean()) < 2 and abs(flat.mean() - real.images.std()) < 3
    assert flat.std() < 3 and radial[5:7, 7:9].mean() > 0.85 * flat.mean() > 5 * radial[::11, ::15].mean()


def test_copies_are_looked_for_in_all_training_images_whatever_n_is(here):
    images = images_of(80)
    np.save("real.npy", images[:50]), np.save("held.npy", images[50:]), np.save("fake.npy", images[49:19:-1])
    evaluate.main("real.npy fake.npy --heldout held.npy --memorisation --n 5 --json f.json".split())
    found = json.loads(Path("f.json").read_text())["memorisation"]
    assert (found["train"], found["fakes"], found["share"]) == (50, 5, 1)


def test_real_images_of_a_folder_are_cut_as_those_of_the_run(here, tiny, capsys):
    """Held-out images of a run, called fakes, are no copies beside themselves as files, and have one floor."""
    images = images_of(200, size=(24, 32))
    np.save("images.npy", images)
    flags = "--data images.npy --steps 1 --size 12x9 --crop 0.5,0.5,1,1 --holdout 0.3 --out r"
    train(*flags.split())
    heldout = data.load_of_run(checkpoint("r"))[1]
    Path("others").mkdir()
    for name in heldout.names:
        plots.to_pil(torch.from_numpy(images[int(name.split("-")[1])])).save(f"others/{name}.png")
    np.save("heldout.npy", heldout.images[:])
    evaluate.main("r heldout.npy --memorisation --heldout others --json f.json".split())
    assert json.loads(Path("f.json").read_text())["memorisation"]["share"] < 0.1
    floors = []
    for real in ("others", "heldout.npy"):
        evaluate.main([real, "r", "--fid", "--network", tiny])
        floors.append(json.loads(Path("r/metrics.json").read_text())["fid_floor"]["value"])
    assert floors[0] == pytest.approx(floors[1])
    for text in ("words", "[1]"):
        Path("f.json").write_text(text)
        assert "--json f.json: expected scores" in mistake(
            capsys, lambda: evaluate.main("r heldout.npy --memorisation --json f.json".split()))


def test_tsne_alone_takes_no_more_images_than_it_draws(here, tiny, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "TSNE_IMAGES", 12)
    for name, seed in (("real.npy", 0), ("fake.npy", 1)):
        np.save(name, images_of(30, seed))
    command = ["real.npy", "fake.npy", "--network", tiny, "--tsne", "t.png"]
    evaluate.main(command)
    said = capsys.readouterr().out
    assert "12 of 30 images of real.npy" in said
    assert "28 points" in said and "perplexity 9," in said            # two of each noise
    evaluate.main([*command, "--fid"])
    said = capsys.readouterr().out
    assert "real: 30 images" in said and "28 points" in said


def test_all_skips_what_a_few_images_do_not_allow(here, tiny, capsys):
    np.save("real.npy", images_of(30, 0, (24, 24))), np.save("fake.npy", images_of(30, 1, (12, 12)))
    evaluate.main(["real.npy", "fake.npy", "--network", tiny, "--all", "--json", "out/s.json"])
    out = capsys.readouterr().out
    assert "is: skipped: --is needs the classes" in out and "memorisation: skipped: " in out
    assert "note: (24, 24) v (12, 12) pixels" in out and "over 1 scales" in out
    assert all(Path("out", name).exists() and f"out/{name}" in out for name in ("s.json", "tsne.png", "sweep.png"))


def counted(monkeypatch):
    """How many images the feature network is given from now on, a pass after the other."""
    passes, call = [], inception.Features.__call__
    monkeypatch.setattr(inception.Features, "__call__",
                        lambda self, images, what="": (passes.append(len(images)), call(self, images, what))[1])
    return passes


def score(*words):
    evaluate.main(["--network", "tiny.pt", "--device", "cpu", *words])


def scores(file):
    return {name: entry["value"] for name, entry in json.loads(Path(file).read_text()).items() if "value" in entry}


def test_a_table_over_runs(tiny, here, at_runs, monkeypatch, capsys):
    shutil.copy(here / tiny, tiny)
    passes, before = counted(monkeypatch), set(Path(".").iterdir())
    score("runs/a", "runs/b", "runs/a/generators/step-0000004.pt")
    out = capsys.readouterr().out
    assert passes == [12] * 4 and set(Path(".").iterdir()) == before          # once the real ones; no file of the table
    head, rule, *rows, floor = [line for line in out.splitlines() if line.startswith(("| ", "fid_half, "))]
    assert len({len(line) for line in (head, rule, *rows)}) == 1 and set(rule) == set("|- ")
    names, *cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (head, *rows)]
    assert names == [*"run script data size step".split(), "training time", "N",
                     *"fid fid_half fid_floor kid kid_floor precision recall diversity".split()]
    assert [row[:5] for row in cells] == [["runs/a", "train_wgan.py", "images", "9x12", "8"],
                                          ["runs/b", "train_dcgan.py", "images", "9x12", "2"],
                                          ["runs/a/generators/step-0000004.pt", "train_wgan.py", "images", "9x12", "4"]]
    assert {row[6] for row in cells} == {"12"} and cells[0][7:] != cells[2][7:]
    assert "at N = 6" in floor and "tiny.pt" in floor and len({row[9] for row in cells}) == 1       # one floor
    score("runs/b", "--fid", "--kid", "--pr", "--json", "alone.json")           # a row is what the run alone scores
    alone = scores("alone.json")
    assert [float(cell) for cell in cells[1][7:]] == pytest.approx([alone[name] for name in names[7:]], abs=1e-4)
    Path("alone.json").unlink()
    assert "5-th nearest neighbour" in mistake(capsys, lambda: score("runs/a", "runs/b", "--pr", "--n", "10"))
    score("runs/a", "runs/b", "--csv", "made/table.csv", "--n", "10", "--seed", "4")
    table = list(csv.reader(open("made/table.csv", encoding="utf-8")))
    assert table[0] == names and [row[0] for row in table[1:]] == ["runs/a", "runs/b"] and table[1][6] == "10"
    out = capsys.readouterr().out
    assert f"| {table[1][7]} |" in out and "made/table.csv" in out and "made/table.png" in out
    assert "pr: skipped: the 5-th" in out                                       # but only what nobody asked for
    order = np.random.RandomState(4).permutation(10)[:8]
    rows = [(f"runs/{name}, step {step}", evaluate.sample(gan.load_generator(f"runs/{name}"), 10, 4)[order])
            for name, step in (("a", 8), ("b", 2))]                             # at the same z
    strip = plots.captioned_grid([(title, torch.from_numpy(x), None) for title, x in rows])
    assert np.array_equal(np.asarray(strip), np.asarray(Image.open("made/table.png")))
    passes.clear()
    score("runs/a", "--csv", "one.csv", "--fid", "--sweep")                     # a table of one, of what was asked for
    assert passes == [12] * 3 and len(list(Path("runs/a/generators").iterdir())) == 2  # the last G is not drawn twice
    assert [row[10:] for row in csv.reader(open("one.csv"))][1] == ["-"] * 5
    for name in ("mine.pt", "step-0000004 copy.pt"):                           # of no known step
        shutil.copy("runs/a/generators/step-0000004.pt", f"runs/a/generators/{name}")
    score("runs/a", "runs/a/generators/mine.pt", "--csv", "two.csv", "--fid")
    assert [row[4:6] for row in csv.reader(open("two.csv", encoding="utf-8"))][2] == ["-", "-"]
    score("runs/a", "--csv", "three.csv", "--fid", "--sweep")


def test_what_goes_into_no_table_together(tiny, here, at_runs, capsys):
    shutil.copy(here / tiny, tiny)
    train("--steps", "1", "--out", "other/size", "--size", "10x12")
    train("--steps", "1", "--out", "other/share", "--holdout", "0.4")
    train("--steps", "1", "--out", "other/fit", "--fit", "squash")
    train("--steps", "1", "--out", "other/same", "--latent", "3", "--features", "3")
    for run, one, other in (("size", "9x12", "10x12"), ("share", "12 images", "images,"),
                            ("fit", "--fit crop", "--fit squash")):
        text = mistake(capsys, lambda run=run: score("runs/a", f"other/{run}"))
        assert "runs on the same images" in text and one in text and other in text
    score("runs/a", "other/same")                                              # the networks may differ
    for flags, words in (("--json f.json", "of one run"), ("--tsne t.png", "of one run"),
                         ("images", "images: no checkpoint.pt"), ("alone.pt", "alone.pt: in no run folder; draw"),
                         ("--save-stats s.npz", "expected one source")):
        assert words in mistake(capsys, lambda flags=flags: score("runs/a", "other/same", *flags.split()))
    saved = checkpoint("runs/a")
    torch.save({**saved, "script": "train_pix2pix.py"}, Path("other", "checkpoint.pt"))
    assert "is a run of train_pix2pix.py" in mistake(capsys, lambda: score("runs/a", "other"))


def test_a_run_against_other_images(here, tiny, monkeypatch, capsys):
    draw(here / "images", 150), draw(here / "others", 30, (9, 12)), draw(here / "large", 30, (18, 24))
    train("--steps", "1", "--out", "r", "--holdout", "0.3")
    score("r", "--fid", "--json", "itself.json")
    assert "training images of images" in capsys.readouterr().out
    score("r", "others", "--fid", "--kid", "--memorisation", "--json", "fake.json")    # the run's are the real ones
    out = capsys.readouterr().out
    assert "training images of images" in out and "fake: 30 of" not in out and "fake: 30 images of others" in out
    train_images, heldout = data.load_of_run(checkpoint("r"))
    found = json.loads(Path("fake.json").read_text())["memorisation"]
    assert (found["train"], found["held_out"], found["fakes"]) == (len(train_images.images), len(heldout.images), 30)
    score("r", "others", "--fid")
    assert "json: none" in capsys.readouterr().out and not Path("r/metrics.json").exists()          # not of the run
    assert Path("memorisation.png").exists() and not Path("r/memorisation.png").exists()
    (here / "images").rename("moved")                                 # not needed for other real images
    passes = counted(monkeypatch)
    score("large", "r", "--fid")                                      # brought to the run's size
    assert passes == [30, 30] and "note:" not in capsys.readouterr().out.split("FID")[0]
    assert json.loads(Path("r/metrics.json").read_text())["fid"]["real_is"] == "30 images of large"
    score("large", "--size", "9x12", "--save-stats", "stats")
    score("stats.npz", "r", "--n", "30", "--json", "stats.json", "--fid")                # interspersed
    assert scores("stats.json")["fid"] == pytest.approx(scores("r/metrics.json")["fid"], rel=1e-5)
    assert "images" in mistake(capsys, lambda: score("r", "others"))
    score("r", "others", "--data", "moved", "--fid")


def test_the_held_out_images_as_reference(here, tiny, capsys):
    draw(here / "images", 60)
    train("--steps", "1", "--out", "r", "--holdout", "0.3"), train("--steps", "1", "--out", "none")
    heldout = data.load_of_run(checkpoint("r"))[1].images
    n = len(heldout)
    score("r", "--reference", "heldout", "--n", "1000")
    assert f"real: {n} heldout images of images, the most that N can be\nfake: {n} images" in capsys.readouterr().out
    extract, order = inception.load_features(tiny), np.random.RandomState(0).permutation(n)
    fake = evaluate.sample(gan.load_generator("r"), n)
    assert scores("r/metrics.json")["fid"] == pytest.approx(metrics.fid(extract(heldout[order]), extract(fake)))
    score("r", "r/generators/step-0000001.pt", "--reference", "heldout")
    assert f"| {n} | {scores('r/metrics.json')['fid']:.4f}" in " ".join(capsys.readouterr().out.split())
    score("r", "--n", "20")
    assert "real: 20 of" in (out := capsys.readouterr().out) and "training images" in out and "N can be" not in out
    assert "real v other real; below it, suspect copying" in out
    score("r", "--reference", "heldout")
    assert "real v other real\n" in capsys.readouterr().out            # copies of others come no nearer
    assert "at least two are needed" in mistake(capsys, lambda: score("none", "--reference", "heldout"))


def test_nothing_is_written_where_nothing_is_named(here, tiny, capsys):
    for name, seed in (("real", 0), ("fake", 1), ("held", 2)):
        np.save(f"{name}.npy", images_of(30, seed))
    command = "real.npy fake.npy --fid --ssim --memorisation --heldout held.npy".split()
    before = set(here.iterdir())
    score(*command)
    assert "nearer than held-out" in (out := capsys.readouterr().out) and "drawn beside --json FILE" in out
    assert set(here.iterdir()) == before
    score(*command, "--sweep", "--json", "out/scores.json")
    assert {path.name for path in Path("out").iterdir()} == {"scores.json", "memorisation.png", "sweep.png"}
    assert set(here.iterdir()) - before == {here / "out"} and "in out/memorisation.png" in capsys.readouterr().out


def test_a_folder_that_changed_is_refused(tiny, here, at_runs, capsys):
    shutil.copy(here / tiny, tiny)
    shutil.copytree("images", "fewer")
    next(Path("fewer").glob("*.png")).unlink()
    for reference in ("training", "heldout"):
        assert "--data fewer: not the images the run was trained on" in mistake(
            capsys, lambda reference=reference: score("runs/a", "--data", "fewer", "--reference", reference))
    shutil.rmtree("fewer")


def test_training_time(here):
    def took(*rows, step=100):
        Path("log.jsonl").write_text("".join(json.dumps(dict(step=k, **more)) + "\n" for k, more in rows))
        return evaluate.training_time(argparse.Namespace(folder=here, step=step))

    rows = (50, dict(seconds=100.0)), (100, dict(seconds=200.0))
    assert took(*rows) == "3 min 20 s" and took(*rows, step=50) == "1 min 40 s"
    assert took() == took((100, {})) == "-"


def test_scores_that_cannot_be_written_are_printed(here, tiny, at_runs, capsys, monkeypatch):
    def refuse(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(runs, "write_atomically", refuse)
    evaluate.main(["runs/a", "--network", str(here / tiny), "--fid", "--kid"])
    out = capsys.readouterr().out
    assert out.count("the scores are printed only") == 1 and "FID" in out and "KID" in out
    draw(here / "held", 24, (9, 12))
    for what, ends in (("--memorisation", True), ("--all", False)):
        with pytest.raises(SystemExit) if ends else contextlib.nullcontext():
            evaluate.main(["runs/a", "--network", str(here / tiny), what, "--heldout", str(here / "held")])
        assert "copying at 32x32" in (out := capsys.readouterr().out) or "ALARM" in out
    assert out.count("skipped: ") > 3 and "sweep.png: Permission denied" in out and "tsne.png: Permission denied" in out


def test_a_run_that_trains_on_is_scored_at_the_step_that_is_named(here, tiny, at_runs, monkeypatch):
    shutil.copytree("runs/a", here / "run")
    network, load = str(here / tiny), inception.load_features
    evaluate.main([str(here / "run"), "--network", network, "--n", "9"])
    before = json.loads((here / "run/metrics.json").read_text())

    def meanwhile(*args, **more):
        train_wgan.main(["--resume", str(here / "run"), "--steps", "12"])
        return load(*args, **more)

    monkeypatch.setattr(inception, "load_features", meanwhile)
    evaluate.main([str(here / "run"), "--network", network, "--n", "9"])
    assert checkpoint(here / "run")["step"] == 12 and json.loads((here / "run/metrics.json").read_text()) == before


def test_what_is_a_run(at_runs):
    assert evaluate.open_run("").folder.name in ("a", "b") and evaluate.open_run("runs/a").step == 8
    assert evaluate.open_run("runs/a/generators/step-0000004.pt").step == 4
    assert evaluate.open_run("runs/a/checkpoint.pt").step == 8
    for path in ("images", "runs", "runs/a/samples", "runs/no", "no.pt"):
        assert evaluate.open_run(path) is None
    shutil.copytree("images", "both"), shutil.copy("runs/a/checkpoint.pt", "both/other.pt")
    assert evaluate.open_run("both") is None
    Path("alone/generators").mkdir(parents=True)                      # not of a run
    shutil.copy("runs/a/generators/step-0000004.pt", "alone/generators")
    assert evaluate.open_run("alone/generators/step-0000004.pt") is None
    shutil.rmtree("alone"), shutil.rmtree("both")


@pytest.mark.parametrize("flags, words", [
    ("nowhere one", "REAL nowhere: there is no such"), ("one nowhere", "FAKE nowhere: there is no such"),
    ("no.npz one", "REAL no.npz: there is no such"), ("one several", "as in --size 64"), ("one broken", "0 of 1"),
    ("one", "one: no checkpoint.pt there, so no run"),
    ("", "there is no run of train_wgan.py"), ("bad.npz one", "expected one array of images"),
    ("broken.npy one", "is damaged"), ("one one one", "REAL FAKE, or runs alone"),
    ("one --pairs --save-stats s.npz", "expected REAL FAKE, images of one number"),
    ("one one --save-stats s.npz", "expected one source, got 2"), ("one one --csv t.csv", "or runs alone"),
    ("one --csv it.pt", "--csv: expected FILE.csv, got it.pt"),
    ("one one --reference heldout", "expected a run, got one"), ("one one --sweep", "need a place: --json FILE"),
    ("one one --all", "need a place: --json FILE"), ("one one --tsne map", "--tsne: expected FILE.png"),
    ("--real one --fake one", "did you mean evaluate.py REAL FAKE?"), ("--fake one", "did you mean REAL FAKE?"),
    ("one stats.npz --pairs", "statistics do for --fid alone"),
    ("--network nonsense one one", "expected inception, random"), ("--resize nearest", "invalid choice"),
    ("one one --network tiny.pt --is", "needs the classes"),
    ("one stats.npz --network tiny.pt --kid", "statistics do for --fid alone"),
    ("one one --memorisation", "with --heldout"),
    ("one one --memorisation --heldout stats.npz", "with --heldout"),
    ("one one --memorisation --heldout one", "needs 20 held-out images"),
    ("small.npy small.npy --ssim", "images are 8x8"), ("--size big", "error: --size: expected one number (64)"),
    ("one stats.npz --network tiny.pt --fid --kid", "statistics do for --fid alone"),
    ("single.npy --save-stats s.npz --network tiny.pt", "at least two images"),
    ("none.npy one", "got uint8 (0, 8, 8, 3)"),
    ("flat.npy flat.npy --pr --network tiny.pt", "all real images are alike"),
    ("one one --network tiny.pt --n 1", "expected an integer >= 2"),
    ("one one --network tiny.pt --n 3", "at least two images"),
    ("stats.npz --save-stats s.npz --network tiny.pt", "statistics do for --fid alone"),
    ("one odd.npz --network tiny.pt --fid", "cannot be compared"), ("--fdi", "did you mean --fid?")])
def test_mistakes_with_evaluate_py(here, tiny, capsys, flags, words):
    draw(here / "one", 6, (16, 16))
    draw(here / "several", 2), draw(here / "several" / "deeper", 2, (30, 30))
    (here / "broken").mkdir()
    (here / "broken" / "a.png").write_text("words")
    np.save("none.npy", np.zeros((0, 3, 8, 8), np.uint8)), np.save("single.npy", np.zeros((1, 3, 8, 8), np.uint8))
    np.save("small.npy", np.zeros((4, 3, 8, 8), np.uint8))
    np.savez("bad.npz", np.zeros(5)), np.save("flat.npy", np.full((12, 8, 8, 3), 7, np.uint8))
    np.savez("stats.npz", mu=np.zeros(48), sigma=np.eye(48))
    np.savez("odd.npz", mu=np.zeros(5), sigma=np.eye(5))
    Path("broken.npy").write_text("words")
    assert words in mistake(capsys, lambda: evaluate.main(shlex.split(flags)))


@pytest.mark.parametrize("script", SCRIPTS)
def test_evaluation_while_training_changes_nothing_and_keeps_the_best(here, tiny, script):
    draw(here / "images", 12)
    module, _ = SCRIPTS[script]
    judged = ["--evaluate-every", "3", "--evaluate-n", "10", "--evaluate-network", tiny]
    train("--steps", "12", "--out", "plain", script=script)
    train("--steps", "12", "--out", "a", *judged, script=script)
    train("--steps", "6", "--out", "b", *judged, script=script)
    module.main(["--resume", "b", "--steps", "12"])
    plain, a, b = checkpoint("plain"), checkpoint("a"), checkpoint("b")
    assert same(plain["state"], a["state"]) and same(plain["random"], a["random"])
    assert same(a["state"], b["state"]) and same(a["random"], b["random"])
    rows = [json.loads(line) for line in Path("a/log.jsonl").read_text().splitlines()]
    scores = [(row["fid"], row["kid"]) for row in rows if "kid" in row]
    assert len(scores) == 4
    best = torch.load("a/generators/best.pt", weights_only=True)
    assert best["kid"] == pytest.approx(min(k for _, k in scores), rel=1e-5, abs=1e-5)
    assert same(best, torch.load("b/generators/best.pt", weights_only=True))
    made, usual = (evaluate.sample(gan.load_generator("a/generators/best.pt"), 10, seed, 5)
                   for seed in (runtime.derive_seed(3, 1), 3))
    real = data.load("images", (9, 12)).images[np.sort(np.random.RandomState(3).permutation(12)[:10])]
    extract = inception.load_features(tiny)
    assert best["fid"] == pytest.approx(metrics.fid(extract(real), extract(made)))
    assert best["fid"] != pytest.approx(metrics.fid(extract(real), extract(usual)))       # not what --seed 3 draws
    train("--steps", "2", "--out", "c", "--evaluate-every", "1", "--evaluate-network", tiny, script=script)
    first = torch.load("c/generators/best.pt", weights_only=True)     # more images asked for than there are
    assert "12 real images v 1,000 drawn" in first["how"]
    module.main(["--resume", "c", "--steps", "3", "--evaluate-n", "8", "--evaluate-every", "3"])
    best = torch.load("c/generators/best.pt", weights_only=True)
    assert best.pop("how") and best["step"] == 3                      # another measure starts anew
    torch.save(best | dict(kid=-9.0), "c/generators/best.pt")         # of an unknown measure, as earlier ones were
    module.main(["--resume", "c", "--steps", "4", "--evaluate-every", "4"])
    assert torch.load("c/generators/best.pt", weights_only=True)["step"] == 4
