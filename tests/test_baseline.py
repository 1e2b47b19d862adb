"""Tests of baseline.py: it is right where it is copied from, and its runs are read as ours are."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import baseline
import data
import evaluate
import gan
from conftest import LOADER, draw, mistake

TINY = "--data images --size 16 --features 4 --batch 4 --steps 3 --log-every 1 --device cpu --out run".split()


@pytest.fixture
def images(here, monkeypatch):
    monkeypatch.setattr(torch.utils.data, "DataLoader",               # no processes for so little
                        lambda *args, num_workers, **more: LOADER(*args, **more))
    return draw(here / "images", 24, (20, 16))


@pytest.mark.parametrize("method, flags", [("dcgan", []), ("wgan", ["--n-critic", "2"])])
def test_its_runs_are_runs(images, method, flags, capsys):
    baseline.main([method, *TINY, *flags])
    saved = evaluate.open_run("run").saved
    assert saved["script"] == f"baseline.py {method}" and saved["step"] == 3 and saved["flags"]["precision"] == "fp32"
    state = saved["state"]
    assert all(torch.equal(w, state["G"][name]) for name, w in state["G_ema"].items())       # the latest weights
    rows = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and all(math.isfinite(row["loss_D"]) and math.isfinite(row["loss_G"]) for row in rows)
    baseline.main([method, "--resume", "run", "--steps", "4"])
    evaluate.main(["run", "--network", "random", "--device", "cpu"])
    out = capsys.readouterr().out
    assert "FID" in out and f"python baseline.py {method} --resume run" in out and evaluate.open_run("run").step == 4
    script = baseline.METHODS[method][0]                              # neither loop goes on with the other's run
    assert "does not fit" in mistake(capsys, lambda: script.main(["--resume", "run", "--steps", "5"]))
    script.main([*TINY[:-1], "ours", *flags])
    assert "does not fit" in mistake(capsys, lambda: baseline.main([method, "--resume", "ours", "--steps", "5"]))


def test_its_images_are_those_of_the_run(images):
    train = data.load("images", (16, 16), holdout=0.3, part="train")
    theirs = baseline.Images("images", (16, 16), 3, names=train.names)
    x = data.to_float(torch.from_numpy(np.asarray(train.images)))
    assert 0 < len(theirs) == len(train.images) < 24
    torch.testing.assert_close(torch.stack([theirs[k] for k in range(len(theirs))]), x, rtol=0, atol=1e-6)
    assert len(baseline.Images("images", (16, 16))) == 24 and theirs[0].std() > 0.1


def networks(norm):
    torch.manual_seed(0)
    G, D = gan.Generator((16, 16), 3, 8, 4), gan.Discriminator((16, 16), 3, 4, norm=norm)
    return G, D, torch.rand(6, 3, 16, 16) * 2 - 1, torch.randn(6, 8)


class Never:
    """An optimizer that changes nothing."""
    zero_grad = step = lambda self: None


def test_its_losses_are_those_of_the_papers(monkeypatch):
    G, D, real, z = networks("instance")
    monkeypatch.setattr(torch, "rand", lambda *shape, device=None: torch.full(shape, 0.25))
    args = type("args", (), dict(n_critic=1, lam=10.0))
    found = baseline.wgan_step(args, G, D, Never(), Never(), real, lambda: z)
    fake, x_hat = G(z), (0.25 * real + 0.75 * G(z)).detach().requires_grad_()
    norms = torch.autograd.grad(D(x_hat).sum(), x_hat)[0].flatten(1).norm(dim=1)
    expected = gan.critic_loss(D(real), D(fake)) + 10 * (norms - 1).square().mean()
    assert found["loss_D"] == pytest.approx(expected.item(), rel=1e-4)
    assert found["loss_G"] == pytest.approx(gan.generator_loss(D(fake)).item(), rel=1e-4)
    G, D, real, z = networks("batch")
    found = baseline.dcgan_step(None, G, D, Never(), Never(), real, lambda: z)
    f_real, f_fake = D(real), D(G(z))
    assert found["loss_D"] == pytest.approx(gan.bce_discriminator_loss(f_real, f_fake).item(), rel=1e-4)
    assert found["loss_G"] == pytest.approx(gan.bce_generator_loss(f_fake).item(), rel=1e-4)


@pytest.mark.parametrize("flags, words", [
    ([], "required: method"), (["vae"], "invalid choice: 'vae'"), (["wgan", "--data", "nowhere"], "nowhere"),
    (["dcgan", "--n-critic", "2"], "unrecognized arguments: --n-critic"),
    (["wgan", "--constraint", "lp"], "only --constraint gp"), (["dcgan", "--loss", "hinge"], "--loss bce of dcgan"),
    (["wgan", *TINY, "--batch", "400"], "at least 400 are needed")])
def test_user_errors(images, capsys, flags, words):
    assert words in mistake(capsys, lambda: baseline.main(flags))
