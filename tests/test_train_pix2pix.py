"""Tests of train_pix2pix.py."""

import copy
import json
import math
import re
import shlex
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import gan
import inpainting
import metrics
import pairs
import plots
import runs
import train_pix2pix
from conftest import GUIDE, PIX, Stub, checkpoint, draw, draw_pairs, mistake, same, write_pairs


@pytest.mark.parametrize("flags", ["--task complete --mask center,box,random", "--task enhance --dropout 0.1",
                                   "--task edges --norm spectral", "--task colorize --norm none --upsample nearest",
                                   "--task pairs --data wide --direction BtoA"])
def test_six_and_six_steps_of_pix2pix_are_twelve(here, monkeypatch, flags):
    draw(here / "images", 12)
    write_pairs(here, draw_pairs(12))
    make = pairs.PairMaker.__call__

    def interrupted(self, y, step):
        if step == 6:
            signal.raise_signal(signal.SIGINT)
        return make(self, y, step)

    train_pix2pix.main([*PIX, *flags.split(), "--steps", "12", "--out", "a"])
    with monkeypatch.context() as patch:
        patch.setattr(pairs.PairMaker, "__call__", interrupted)
        train_pix2pix.main([*PIX, *flags.split(), "--steps", "12", "--out", "b"])
    assert checkpoint("b")["step"] == 6
    train_pix2pix.main(["--resume", "b"])
    a, b = checkpoint("a"), checkpoint("b")
    assert a["step"] == b["step"] == 12 and a["network"] == "UNet"
    assert all(same(a[key], b[key]) for key in ("state", "random", "same", "config", "network"))
    rows = [[json.loads(line) for line in Path(run, "log.jsonl").read_text().splitlines()] for run in "ab"]
    for a, b in zip(*rows):
        assert {**a, "seconds": 0, "images_per_sec": 0} == {**b, "seconds": 0, "images_per_sec": 0}
    assert set(rows[0][0]) == {"step", "l1", "images_per_sec", "seconds"}                # warm-up: L1 alone
    assert set(rows[0][1]) - set(rows[0][0]) == {"loss_D", "loss_G", "D_x", "D_G_z", "psnr_heldout", "psnr_baseline",
                                                 "l1_heldout"}
    assert rows[0][1]["loss_D"] == pytest.approx(math.log(2), abs=0.1)                # halved: a D that guesses
    assert {str(p.relative_to("a")) for p in Path("a").rglob("*") if p.is_file()} == {
        "args.txt", "checkpoint.pt", "log.jsonl", "losses.png", "pairs.png", "progress.gif",
        *(f"generators/step-{k:07d}.pt" for k in (4, 8, 12)), *(f"samples/step-{k:07d}.png" for k in (3, 6, 9, 12))}
    G = gan.load_generator("a")
    assert G(torch.randn(2, G.config["c_in"], 17, 12)).shape == (2, G.config["c_out"], 17, 12)


def test_sample_grid_and_heldout_scores_of_pix2pix(here):
    """The grid shows, of held-out images, x | G(x) | y of the averaged network, and the log measures just these."""
    draw(here / "images", 12)
    train_pix2pix.main([*PIX, "--steps", "5", "--out", "a"])
    args = train_pix2pix.parse_arguments([*PIX, "--steps", "5"])
    unseen = data.load_from_args(args, "heldout").images
    assert 1 <= len(unseen) <= 8
    y = next(data.batches(unseen, len(unseen), 3))
    x, _, m = pairs.PairMaker(args, unseen)(y, 0)
    out = torch.where(m > 0, y, torch.cat([gan.load_generator("a")(x[k:k + 3]) for k in range(0, len(x), 3)]))
    last = json.loads(Path("a/log.jsonl").read_text().splitlines()[-1])
    assert last["psnr_heldout"] == pytest.approx(metrics.psnr(y, out, 2, m).mean().item(), abs=1e-3)
    assert last["l1_heldout"] == pytest.approx(gan.l1_loss(y, out, m).item(), rel=1e-4)
    mean = torch.stack([torch.stack([p[c][k[0] > 0].mean() for c in range(3)]) for p, k in zip(y, m)])[..., None, None]
    assert last["psnr_baseline"] == pytest.approx(metrics.psnr(y, mean.expand_as(y), 2, m).mean().item(), abs=1e-3)
    shown = plots.grid(torch.stack([x[:, :3], out, y], 1).flatten(0, 1), 12)
    grid = Image.open("a/samples/step-0000005.png")
    assert np.array_equal(np.asarray(shown.resize(grid.size, Image.Resampling.NEAREST)), np.asarray(grid))
    assert (x[:, :3][(m == 0).expand(-1, 3, -1, -1)] == 0).all()


def test_examples_of_grey_and_of_colour(here):
    grey, colour = (torch.rand(4, c, 9, 10) * 2 - 1 for c in (1, 3))
    mask = torch.ones(4, 1, 9, 10)
    for columns, expected in (                                        # grey images with their mask stay grey
            ((torch.cat([grey, mask], 1), grey, grey * 0.5), (grey, grey, grey * 0.5)),
            ((grey, torch.cat([colour, mask], 1), colour), (grey.expand(-1, 3, -1, -1), colour, colour))):
        train_pix2pix.save_examples("found.png", *columns)
        plots.save_grid("expected.png", torch.stack(expected, 1).flatten(0, 1), 12)
        found, expected = (Image.open(name) for name in ("found.png", "expected.png"))
        assert found.mode == expected.mode and np.array_equal(np.asarray(found), np.asarray(expected))


def test_a_run_from_before_jitter_and_decay_goes_on_without_them(here, capsys):
    draw(here / "images", 12)
    off = ["--jitter", "1", "--decay", "0"]
    train_pix2pix.main([*PIX, *off, "--steps", "6", "--out", "a"])
    train_pix2pix.main([*PIX, *off, "--steps", "3", "--out", "b"])
    train_pix2pix.main([*PIX, "--steps", "3", "--out", "c"])
    before = checkpoint("b")
    for flag in ("jitter", "decay"):
        del before["flags"][flag]
    torch.save(before, "b/checkpoint.pt")
    again = ["--resume", "b", "--steps", "6"]
    assert "--jitter is 1.0 in b and cannot become 1.117" in mistake(
        capsys, lambda: train_pix2pix.main([*again, "--jitter", "1.117"]))
    assert "--decay is 0.0 in b and cannot become 0.5" in mistake(
        capsys, lambda: train_pix2pix.main([*again, "--decay", "0.5"]))
    for run in "bc":
        train_pix2pix.main(["--resume", run, "--steps", "6"])
    flags = [[checkpoint(run)["flags"][flag] for flag in ("jitter", "decay")] for run in "bc"]
    assert flags == [[1.0, 0.0], [1.117, 0.5]]
    assert same(checkpoint("a")["state"], checkpoint("b")["state"])
    assert not same(checkpoint("a")["state"]["G"], checkpoint("c")["state"]["G"])


def test_the_rate_follows_the_steps_asked_for_on_resume(here):
    draw(here / "images", 12)
    train_pix2pix.main([*PIX, "--steps", "6", "--lr", "1e-3", "--out", "a"])
    rates = []
    for steps in (None, "8", "16"):
        if steps:
            train_pix2pix.main(["--resume", "a", "--steps", steps])
        rates.append([checkpoint("a")["state"][name]["param_groups"][0]["lr"] for name in ("opt_G", "opt_D")])
    assert rates == [pytest.approx([rate, rate]) for rate in (1e-3 / 3, 1e-3 / 4, 1e-3 / 8)]


@pytest.mark.parametrize("flags, rates", [("--task complete --norm layer --l1 30", (1, 1, 1, 1 / 2)),
                                          ("--task colorize --norm instance --l1 7 --decay 0", (1, 1, 1, 1)),
                                          ("--task complete --mask strokes --norm none --decay 0.75 --jitter 1.2",
                                           (1, 1, 2 / 3, 1 / 3))])
def test_the_loop_of_pix2pix_against_a_plain_one(here, monkeypatch, flags, rates):
    """Same seed, same pairs, the objective as the paper writes it: the weights of G, D and G_ema must agree."""
    draw(here / "images", 12)
    flags = [*PIX, *flags.split(), *"--steps 4 --lr 1e-3 --ema 0.9 --warm-up 1 --precision fp32".split()]
    monkeypatch.setattr(runs, "Run", Stub)
    gradients, clear = [], torch.optim.Optimizer.zero_grad

    def watch(self, *args, **kwargs):
        if self is Stub.state["opt_G"]:                               # after D's step, before G's backward pass
            gradients.append([w.grad if w.grad is None else w.grad.clone() for w in Stub.state["D"].parameters()])
        return clear(self, *args, **kwargs)

    torch.manual_seed(11)
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Optimizer, "zero_grad", watch)
        train_pix2pix.main(flags)
    found = Stub.state
    assert all(torch.equal(w.grad, g) for w, g in zip(found["D"].parameters(), gradients[-1]))   # G's left them alone
    torch.manual_seed(11)
    args = train_pix2pix.parse_arguments(flags)
    dataset = data.load_from_args(args, "train").images
    make = pairs.PairMaker(args, dataset)
    G = gan.UNet((17, 12), make.channels[0], 3, 4, norm=args.norm)
    D = gan.PatchGAN(sum(make.channels), 4, n_layers=1, norm=args.norm)
    G_ema = copy.deepcopy(G).eval()
    opt_G, opt_D = (torch.optim.Adam(net.parameters(), 1e-3, (0.5, 0.999)) for net in (G, D))
    images = data.batches(dataset, 3, seed=3, flip=True)
    for step in range(1, 5):
        for opt in (opt_G, opt_D):
            opt.param_groups[0]["lr"] = 1e-3 * rates[step - 1]
        x, y, m = make(next(images), step)
        fake = G(x)
        if m is not None:
            fake = m * y + (1 - m) * fake
        if step > 1:
            p_real, p_fake = D(torch.cat([x, y], 1)).sigmoid(), D(torch.cat([x, fake], 1).detach()).sigmoid()
            opt_D.zero_grad()
            (-0.5 * (p_real.log().mean() + (1 - p_fake).log().mean())).backward()
            opt_D.step()
        loss = args.l1 * (y - fake).abs().sum() / (y.numel() if m is None else 3 * (m == 0).sum())
        if step > 1:
            loss = loss - D(torch.cat([x, fake], 1)).sigmoid().log().mean()
        opt_G.zero_grad()
        loss.backward()
        opt_G.step()
        gan.update_ema(G_ema, G, 0.9, step)
    for name, net in (("G", G), ("D", D), ("G_ema", G_ema)):
        for (key, w), expected in zip(found[name].named_parameters(), net.parameters()):
            assert torch.allclose(w, expected, rtol=1e-3, atol=2e-4), (name, key)
            moved = (w - Stub.before[name][key]).abs().max()
            assert moved > 5e-4 or w.ndim == 1


def test_masks_are_drawn_of_all_kinds_and_anew_each_step(here):
    args = train_pix2pix.parse_arguments(["--data", "x", "--mask", "center,center,half", "--seed", "4294967295"])
    y = torch.randn(4000, 1, 16, 16)
    make = pairs.PairMaker(args, y)
    (x, target, m), (_, _, again), (_, _, other) = make(y, 5), make(y, 5), make(y, 6)
    assert torch.equal(m, again) and not torch.equal(m, other)
    assert torch.equal(x, inpainting.completion_input(target, m))            # outside the hole input and target agree
    share = (m == 0).float().mean((1, 2, 3))
    assert (share == 0.25).float().mean().item() == pytest.approx(2 / 3, abs=0.03)    # a kind named twice
    assert ((share == 0.25) | (share == 0.5)).all()


def test_eight_pairs_are_learned_by_the_command_of_the_guide(here):
    write_pairs(here, draw_pairs(12))
    command, = re.findall(r"train_pix2pix.py (--data ./maps .*--limit 8 .*?) +#", GUIDE)
    train_pix2pix.main([*PIX, *shlex.split(command), "--data", "wide", "--features", "16", "--lr", "2e-3",
                        "--sample-every", "300", "--log-every", "50", "--out", "run"])
    first, last = (json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()[::5])
    assert last["l1"] < first["l1"] / 2 and last["psnr_heldout"] > last["psnr_baseline"] + 6
