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
from conftest import README, SCRIPTS, checkpoint, draw, mistake, pictures_of, same, train


def test_batchnorm_is_in_eval_mode_while_sampling():
    G = gan.Generator(16, 1, 5, 4, 8).train()
    for norm in G.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.running_mean), nn.init.uniform_(norm.running_var, 0.5, 2)
    before, state = copy.deepcopy(G.state_dict()), torch.get_rng_state()
    images = evaluate.sample(G, 11, seed=4, batch=4)
    assert G.training and same(before, G.state_dict()) and torch.equal(state, torch.get_rng_state())
    stream = torch.Generator().manual_seed(4)
    z = torch.cat([torch.randn(k, 5, generator=stream) for k in (4, 4, 3)])
    expected = torch.cat([G.eval()(one[None]) for one in z])          # alone: no picture depends on its batch
    assert images.dtype == np.uint8 and np.abs(images - plots.to_uint8(expected).numpy().astype(int)).max() <= 1


def test_real_and_fake_pass_one_code_path(tiny, capsys):
    """The same pictures as a folder, as arrays of both layouts and as statistics: FID 0 whichever is called fake."""
    images = pictures_of(40)
    images[20:] = images[0]                                           # half of them copies, and each of them counts
    Path("folder").mkdir()
    for k, x in enumerate(images):
        Image.fromarray(x.transpose(1, 2, 0)).save(f"folder/{k:03d}.png")
    np.save("first.npy", images)
    np.savez("last.npz", images.transpose(0, 2, 3, 1))
    evaluate.main(["--real", "folder", "--save-stats", "stats.npz", "--features", tiny])
    with np.load("stats.npz") as file:                                # as pytorch-fid computes and names them
        features = inception.load_features(tiny)(images).double().numpy()
        assert set(file) == {"mu", "sigma"} and np.allclose(file["mu"], features.mean(0))
        assert np.allclose(file["sigma"], np.cov(features, rowvar=False)) and file["sigma"].dtype == np.float64
    for real, fake in (("folder", "first.npy"), ("last.npz", "folder"), ("stats.npz", "folder"),
                       ("folder", "stats.npz")):
        evaluate.main(["--real", real, "--fake", fake, "--features", tiny, "--json", "found.json"])
        assert abs(json.loads(Path("found.json").read_text())["fid"]["value"]) < 1e-6
    out = capsys.readouterr().out
    assert "floor at N = 20" in out and "fewer than 2,048" in out and "KID: left out" in out and "tiny.pt" in out


def test_every_number_of_a_run(here, tiny, capsys):
    draw(here / "pictures", 150, (12, 16))
    train_wgan.main("--device cpu --data pictures --size 12x16 --features 4 --latent 5 --batch 5 --steps 2 "
                    "--n-critic 1 --holdout 0.3 --save-every 1 --out runs/one".split())
    capsys.readouterr()
    evaluate.main(["--fid", "--kid", "--pr", "--ssim", "--memorisation", "--ceiling", "--sweep", "--tsne", "t.png",
                   "--features", tiny, "--n", "60", "--perplexity", "5"])
    out = capsys.readouterr().out
    found = json.loads((here / "runs/one/metrics.json").read_text())
    assert set(found) == {"fid", "fid_half", "fid_floor", "kid", "kid_floor", "precision", "recall", "density",
                          "coverage", "ms_ssim_diversity", "fid_gaussian_noise", "fid_radial_noise", "memorisation",
                          "sweep"}
    for name, entry in found.items():
        assert f"`{name}`" in README and entry["step"] == 2 and "tiny.pt" in entry["features"]
        assert entry["seed"] == 0 and entry["resize"] == "pytorch-fid"
    for words in ("60 real v 60 fake", "floor at N = 30", "fewer than 2,048", "compare only with scores through it"):
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
    assert len(run.real.images) + len(run.held_out) == 150 and 20 < len(run.held_out) < 75
    evaluate.main(["runs/one/generators/step-0000001.pt", "--fid", "--features", tiny, "--n", "60"])
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
    assert found["psnr"]["real_is"] == "3 of 4 pictures of a.npy"
    assert "not of one number" in mistake(capsys, lambda: evaluate.main(
        "--real a.npy --fake few.npy --pairs --ssim".split()))
    (here / "b" / "000.png").unlink()
    assert "have no partner" in mistake(capsys, lambda: evaluate.main("--real a --fake b --pairs --ssim".split()))


def test_copies_are_looked_for_in_all_training_pictures_whatever_n_is(here):
    images = pictures_of(80)
    np.save("real.npy", images[:50]), np.save("held.npy", images[50:]), np.save("fake.npy", images[49:19:-1])
    evaluate.main("--real real.npy --fake fake.npy --held-out held.npy --memorisation --n 5 --json f.json".split())
    found = json.loads(Path("f.json").read_text())["memorisation"]
    assert (found["train"], found["fakes"], found["share"]) == (50, 5, 1)


def test_tsne_alone_takes_no_more_pictures_than_it_draws(here, tiny, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "DRAWN", 12)
    for name, seed in (("real.npy", 0), ("fake.npy", 1)):
        np.save(name, pictures_of(30, seed))
    command = ["--real", "real.npy", "--fake", "fake.npy", "--features", tiny, "--tsne", "t.png"]
    evaluate.main(command)
    said = capsys.readouterr().out
    assert "12 of 30 pictures of real.npy" in said and "28 points" in said            # two of each noise
    evaluate.main([*command, "--fid"])
    said = capsys.readouterr().out
    assert "real: 30 pictures" in said and "28 points" in said


def test_names_that_the_terminal_cannot_show(here, tiny, monkeypatch):
    draw(here / "zähne", 6, (16, 16))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    evaluate.main(["--real", "zähne", "--fake", "zähne", "--features", tiny])
    sys.stdout.seek(0)
    assert "real: 6 pictures of z\\xe4hne" in sys.stdout.read()


@pytest.mark.parametrize("flags, words", [
    ("--real nowhere --fake one", "--real nowhere: there is no such"), ("--real one --fake several", "as in --size 64"),
    ("", "there is no run of train_wgan.py or train_dcgan.py"), ("--real bad.npz --fake one", "holds neither"),
    ("--real broken.npy --fake one", "cannot be read"), ("runs/x --real one --fake one", "nothing to take from a run"),
    ("--pairs", "give --real and --fake"), ("--real one --save-stats here.txt", "ends in .npz"),
    ("--features nonsense --real one --fake one", "take inception, random"), ("--dims 5", "invalid choice"),
    ("--real one --fake one --features tiny.pt --is", "needs the classes"),
    ("--real one --fake stats.npz --features tiny.pt --kid", "statistics do for --fid alone"),
    ("--real one --fake one --memorisation", "with --held-out"),
    ("--real one --fake one --features tiny.pt --n 1", "too few to compare"),
    ("--real one --fake one --features tiny.pt --n 1 --sweep", "at least two pictures"),
    ("--real stats.npz --save-stats s.npz --features tiny.pt", "statistics already"),
    ("--real one --fake odd.npz --features tiny.pt --fid", "cannot be compared"), ("--fdi", "did you mean --fid?")])
def test_mistakes_with_evaluate_py(here, tiny, capsys, flags, words):
    draw(here / "one", 6, (16, 16))
    draw(here / "several", 2), draw(here / "several" / "deeper", 2, (30, 30))
    np.savez("bad.npz", np.zeros(5))
    np.savez("stats.npz", mu=np.zeros(48), sigma=np.eye(48))
    np.savez("odd.npz", mu=np.zeros(5), sigma=np.eye(5))
    Path("broken.npy").write_text("words")
    assert words in mistake(capsys, lambda: evaluate.main(shlex.split(flags)))


@pytest.mark.parametrize("script", SCRIPTS)
def test_evaluation_while_training_changes_nothing_and_keeps_the_best(here, tiny, script):
    draw(here / "pictures", 12)
    module, _ = SCRIPTS[script]
    judged = ["--evaluate-every", "3", "--evaluate-n", "10", "--evaluate-features", tiny]
    train("--steps", "12", "--out", "plain", script=script)
    train("--steps", "12", "--out", "a", *judged, script=script)
    train("--steps", "6", "--out", "b", *judged, script=script)
    module.main(["--resume", "b", "--steps", "12"])
    plain, a, b = checkpoint("plain"), checkpoint("a"), checkpoint("b")
    assert same(plain["state"], a["state"]) and same(plain["random"], a["random"])
    assert same(a["state"], b["state"]) and same(a["random"], b["random"])
    rows = [json.loads(line) for line in Path("a/log.jsonl").read_text().splitlines()]
    scores = [(row["fid"], row["kid"]) for row in rows if "kid" in row]
    assert len(scores) == 4 and "`fid`" in README and "`kid`" in README
    best = torch.load("a/generators/best.pt", weights_only=True)
    assert best["kid"] == pytest.approx(min(k for _, k in scores), rel=1e-5, abs=1e-5)
    assert same(best, torch.load("b/generators/best.pt", weights_only=True))
    made = evaluate.sample(gan.load_generator("a/generators/best.pt"), 10, 3, 5)
    pictures = data.load("pictures", (9, 12))
    real = pictures.images[np.sort(np.random.RandomState(3).permutation(12)[:10])]
    extract = inception.load_features(tiny)
    assert best["fid"] == pytest.approx(metrics.fid(extract(real), extract(made)))
    train("--steps", "2", "--out", "c", "--evaluate-every", "1", "--evaluate-features", tiny, script=script)
    first = torch.load("c/generators/best.pt", weights_only=True)     # more pictures asked for than there are
    assert "12 real pictures v 1,000 drawn" in first["how"]
    module.main(["--resume", "c", "--steps", "3", "--evaluate-n", "8", "--evaluate-every", "3"])
    assert torch.load("c/generators/best.pt", weights_only=True)["step"] == 3         # another measure starts anew


def test_commands_and_flags_of_evaluate_in_the_readme(here):
    text = README + evaluate.__doc__
    commands = re.findall(r"python evaluate\.py((?: [^\s`#|]+)*)", text)
    assert len(commands) >= 8
    for flags in commands:
        evaluate.parse_arguments(shlex.split(flags))
    rows = README.split("`evaluate.py`; ", 1)[1].split("\n\n")[1]
    table = dict(re.findall(r"^\| `--([\w-]+)` \|([^|]*)\|", rows, re.M))
    defaults = {name: value for name, value in vars(evaluate.parse_arguments(["--is"])).items() if name != "run"}
    assert {name.replace("-", "_") for name in table} == set(defaults)
    for name, cell in table.items():
        value = defaults[name.replace("-", "_")]
        assert cell.strip() == ("" if value is None or isinstance(value, bool) else f"{value:g}" if isinstance(
            value, float) else str(value)), name
