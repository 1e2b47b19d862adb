"""Tests of evaluate.py."""

import copy
import io
import json
import re
import shlex
import shutil
import sys
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
    evaluate.main(["--real", "folder", "--save-stats", "stats", "--network", tiny])
    with np.load("stats.npz") as file:                                # as pytorch-fid computes and names them
        features = inception.load_features(tiny)(images).double().numpy()
        assert set(file) == {"mu", "sigma"} and np.allclose(file["mu"], features.mean(0))
        assert np.allclose(file["sigma"], np.cov(features, rowvar=False)) and file["sigma"].dtype == np.float64
    for real, fake in (("folder", "first.npy"), ("last.npz", "folder"), ("stats.npz", "folder"),
                       ("folder", "stats.npz")):
        evaluate.main(["--real", real, "--fake", fake, "--network", tiny, "--json", "found.json"])
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
                   "--network", tiny, "--n", "60", "--perplexity", "5"])
    out = capsys.readouterr().out
    found = json.loads((here / "runs/one/metrics.json").read_text())
    assert set(found) == {"fid", "fid_half", "fid_floor", "kid", "kid_floor", "precision", "recall", "density",
                          "coverage", "ms_ssim_diversity", "fid_gaussian_noise", "fid_radial_noise", "memorisation",
                          "sweep"}
    for entry in found.values():
        assert entry["step"] == 2 and "tiny.pt" in entry["features"]
        assert entry["seed"] == 0 and entry["resize"] == "pytorch-fid"
    for words in ("60 real v 60 fake", "floor at N = 30", "under 2,048", "compare only with scores through it"):
        assert words in out
    run = evaluate.load_run("")
    real, fake = (inception.load_features(tiny)(x) for x in (
        run.real.images[np.random.RandomState(0).permutation(len(run.real.images))[:60]],
        evaluate.sample(run.G, 60)[np.random.RandomState(0).permutation(60)]))
    assert found["fid"]["value"] == pytest.approx(metrics.fid(real, fake))
    assert found["fid_floor"]["value"] == pytest.approx(metrics.fid(real[:30], real[30:]))
    assert found["fid_half"]["value"] == pytest.approx(metrics.fid(real[:30], fake[:30]))
    assert found["kid"]["value"] == pytest.approx(metrics.kid(real, fake)[0])
    assert found["fid_gaussian_noise"]["value"] > 0 and len(found["sweep"]["points"]) == 12
    for name in ("runs/one/sweep.png", "runs/one/memorisation.png", "t.png"):
        assert np.asarray(Image.open(name).convert("L")).std() > 5
    assert len(run.real.images) + len(run.heldout) == 150 and 20 < len(run.heldout) < 75
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
    evaluate.main(["--real", "a", "--fake", "b", "--pairs", "--ssim", "--json", "found.json"])
    found = json.loads(Path("found.json").read_text())
    a, b = (np.stack([np.asarray(Image.open(path)).transpose(2, 0, 1) for path in sorted((here / name).iterdir())])
            for name in "ab")
    assert found["ssim"]["value"] == pytest.approx(metrics.ssim(a, b, 255).mean().item())
    assert found["psnr"]["value"] == pytest.approx(metrics.psnr(a, b, 255).mean().item())
    assert found["ms_ssim"]["scales"] == 2
    np.save("a.npy", a), np.save("b.npy", b), np.save("few.npy", b[:3])
    chosen = np.random.RandomState(7).permutation(4)[:3]              # arrays have no names: by number
    evaluate.main("--real a.npy --fake b.npy --pairs --ssim --n 3 --seed 7 --json found.json".split())
    found = json.loads(Path("found.json").read_text())
    assert found["psnr"]["value"] == pytest.approx(metrics.psnr(a[chosen], b[chosen], 255).mean().item())
    assert found["psnr"]["real_is"] == "3 of 4 images of a.npy"
    assert "differ in number, size or names" in mistake(capsys, lambda: evaluate.main(
        "--real a.npy --fake few.npy --pairs --ssim".split()))
    (here / "b" / "000.png").unlink()
    assert "differ in number, size or names" in mistake(capsys, lambda: evaluate.main(
        "--real a --fake b --pairs --ssim".split()))


def test_copies_are_looked_for_in_all_training_images_whatever_n_is(here):
    images = images_of(80)
    np.save("real.npy", images[:50]), np.save("held.npy", images[50:]), np.save("fake.npy", images[49:19:-1])
    evaluate.main("--real real.npy --fake fake.npy --heldout held.npy --memorisation --n 5 --json f.json".split())
    found = json.loads(Path("f.json").read_text())["memorisation"]
    assert (found["train"], found["fakes"], found["share"]) == (50, 5, 1)


def test_tsne_alone_takes_no_more_images_than_it_draws(here, tiny, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "TSNE_IMAGES", 12)
    for name, seed in (("real.npy", 0), ("fake.npy", 1)):
        np.save(name, images_of(30, seed))
    command = ["--real", "real.npy", "--fake", "fake.npy", "--network", tiny, "--tsne", "t.png"]
    evaluate.main(command)
    said = capsys.readouterr().out
    assert "12 of 30 images of real.npy" in said and "28 points" in said            # two of each noise
    evaluate.main([*command, "--fid"])
    said = capsys.readouterr().out
    assert "real: 30 images" in said and "28 points" in said


def test_all_skips_what_a_few_images_do_not_allow(here, tiny, capsys):
    np.save("real.npy", images_of(30, 0, (24, 24))), np.save("fake.npy", images_of(30, 1, (12, 12)))
    evaluate.main(["--real", "real.npy", "--fake", "fake.npy", "--network", tiny, "--all", "--perplexity", "5"])
    out = capsys.readouterr().out
    assert "is: skipped: --is needs the classes" in out and "memorisation: skipped: " in out
    assert "note: images of (24, 24) v (12, 12)" in out and "json: none" in out
    assert Path("tsne.png").exists() and Path("sweep.png").exists() and "over 1 scales" in out


def test_names_that_the_terminal_cannot_show(here, tiny, monkeypatch):
    draw(here / "zähne", 6, (16, 16))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    evaluate.main(["--real", "zähne", "--fake", "zähne", "--network", tiny])
    sys.stdout.seek(0)
    assert "real: 6 images of z\\xe4hne" in sys.stdout.read()


@pytest.mark.parametrize("flags, words", [
    ("--real nowhere --fake one", "--real nowhere: there is no such"), ("--real one --fake several", "as in --size 64"),
    ("--real one --fake broken", "0 of 1"),
    ("", "there is no run of train_wgan.py or train_dcgan.py"), ("--real bad.npz --fake one", "holds neither"),
    ("--real broken.npy --fake one", "cannot be read"), ("runs/x --real one --fake one", "nothing to take from a run"),
    ("--pairs", "give --real and --fake"), ("--real one --fake stats.npz --pairs", "statistics do for --fid alone"),
    ("--network nonsense --real one --fake one", "expected inception, random"), ("--resize nearest", "invalid choice"),
    ("--real one --fake one --network tiny.pt --is", "needs the classes"),
    ("--real one --fake stats.npz --network tiny.pt --kid", "statistics do for --fid alone"),
    ("--real one --fake one --memorisation", "with --heldout"),
    ("--real one --fake one --memorisation --heldout stats.npz", "with --heldout"),
    ("--real one --fake one --memorisation --heldout one", "needs 20 held-out images"),
    ("--real small.npy --fake small.npy --ssim", "images are 8x8"), ("--size big", "--size"),
    ("--real one --fake stats.npz --network tiny.pt --fid --kid", "statistics do for --fid alone"),
    ("--real single.npy --save-stats s.npz --network tiny.pt", "at least two images"),
    ("--real none.npy --fake one", "holds neither"),
    ("--real one --fake one --network tiny.pt --n 1", "expected an integer >= 2"),
    ("--real one --fake one --network tiny.pt --n 3", "at least two images"),
    ("--real stats.npz --save-stats s.npz --network tiny.pt", "statistics do for --fid alone"),
    ("--real one --fake odd.npz --network tiny.pt --fid", "cannot be compared"), ("--fdi", "did you mean --fid?")])
def test_mistakes_with_evaluate_py(here, tiny, capsys, flags, words):
    draw(here / "one", 6, (16, 16))
    draw(here / "several", 2), draw(here / "several" / "deeper", 2, (30, 30))
    (here / "broken").mkdir()
    (here / "broken" / "a.png").write_text("words")
    np.save("none.npy", np.zeros((0, 3, 8, 8), np.uint8)), np.save("single.npy", np.zeros((1, 3, 8, 8), np.uint8))
    np.save("small.npy", np.zeros((4, 3, 8, 8), np.uint8))
    np.savez("bad.npz", np.zeros(5))
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
    made = evaluate.sample(gan.load_generator("a/generators/best.pt"), 10, 3, 5)
    real = data.load("images", (9, 12)).images[np.sort(np.random.RandomState(3).permutation(12)[:10])]
    extract = inception.load_features(tiny)
    assert best["fid"] == pytest.approx(metrics.fid(extract(real), extract(made)))
    train("--steps", "2", "--out", "c", "--evaluate-every", "1", "--evaluate-network", tiny, script=script)
    first = torch.load("c/generators/best.pt", weights_only=True)     # more images asked for than there are
    assert "12 real images v 1,000 drawn" in first["how"]
    module.main(["--resume", "c", "--steps", "3", "--evaluate-n", "8", "--evaluate-every", "3"])
    assert torch.load("c/generators/best.pt", weights_only=True)["step"] == 3         # another measure starts anew


def test_every_command_of_the_docstring_parses_and_every_flag_names_its_default(capsys):
    commands = re.findall(r"python evaluate\.py((?: [^\s`#|]+)*)", evaluate.__doc__)
    assert len(commands) == 5
    for flags in commands:
        evaluate.parse_arguments(shlex.split(flags))
    with pytest.raises(SystemExit):
        evaluate.parse_arguments(["--help"])
    flags = dict(re.findall(r"\n  --([\w-]+)(.*?)(?=\n  --|\n\n|$)", capsys.readouterr().out, re.S))
    scores = {"all", *evaluate.REPORTS}
    assert scores < set(flags) and all("(default: " in " ".join(flags[name].split()) for name in set(flags) - scores)
