"""What only an NVIDIA card can show; skipped without one. With the speeds printed: pytest tests/test_cuda.py -s"""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import data
import evaluate
import gan
import generate
import inception
import inpainting
import runs
import sources
import train_pix2pix
import train_wgan
from conftest import HERE, PIX, SCRIPTS, TINY, checkpoint, draw, pixels_of

CARD = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA card")
MODULES = {**SCRIPTS, "pix2pix": (train_pix2pix, PIX)}
LOSSES = [("wgan", "--constraint gp"), ("wgan", "--constraint lp"), ("wgan", "--constraint clip"),
          ("wgan", "--constraint clip --minibatch-discrimination"), ("dcgan", "--loss bce --smooth 0.1"),
          ("dcgan", "--loss bce --minibatch-discrimination"), ("dcgan", "--loss hinge"),
          ("dcgan", "--loss relativistic")]


def train(script, *flags, card=CARD):
    module, tiny = MODULES[script]
    module.main([*tiny, "--device", card, *map(str, flags)])


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("script", MODULES)
def test_the_loops_train_save_and_resume(here, script, precision):
    draw(here / "images", 30)
    train(script, "--steps", 8, "--precision", precision, "--out", "whole")
    train(script, "--steps", 4, "--precision", precision, "--out", "parts")
    train(script, "--steps", 8, "--resume", "parts")
    whole, parts = checkpoint("whole"), checkpoint("parts")
    for name in ("G", "D", "G_ema"):                         # a card's sums are not in a fixed order
        for key, w in whole["state"][name].items():
            assert torch.allclose(w.float(), parts["state"][name][key].float(), rtol=0.05, atol=0.02), (name, key)
    assert whole["step"] == parts["step"] == 8 and torch.equal(whole["random"][0]["cuda"], parts["random"][0]["cuda"])
    assert all(np.isfinite(value) for row in runs.read_log(here / "parts") for value in row.values())
    G = gan.load_generator(here / "parts", CARD)
    assert next(G.parameters()).is_cuda


@pytest.mark.parametrize("flags", ["", "--schedule monitored --label-noise 0.2", "--schedule boost --boost-d 0.3"])
def test_schedules_on_a_card(here, flags):
    draw(here / "images", 20)
    train("dcgan", "--steps", 12, "--out", "run", *flags.split())
    assert all(np.isfinite(row["loss_D"]) for row in runs.read_log(here / "run") if "loss_D" in row)


def test_fp32_is_fp32(here):
    draw(here / "images", 8)
    train("wgan", "--steps", 1, "--precision", "fp32")       # sets what holds for the whole process
    x, w = torch.randn(4, 64, 32, 32, device=CARD), torch.randn(64, 64, 4, 4, device=CARD)
    exact = torch.nn.functional.conv2d(x.double(), w.double(), padding=1)
    assert (torch.nn.functional.conv2d(x, w, padding=1) - exact).abs().max() < 1e-5 * exact.abs().max()
    assert (x[0, 0] @ w[0].flatten(1)[:32, :8].repeat(1, 2) - (
        x[0, 0].double() @ w[0].flatten(1)[:32, :8].repeat(1, 2).double())).abs().max() < 1e-5
    assert torch.backends.cudnn.benchmark


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("share", [(0, 1), (1, 2)])
def test_batches_are_those_of_the_cpu(monkeypatch, resident, share):
    images = np.random.RandomState(0).randint(0, 256, (50, 3, 9, 12)).astype(np.uint8)
    if not resident:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    sides = [data.batches(images, 16, 3, 2, True, device, share) for device in ("cpu", CARD)]
    for _ in range(12):
        expected, found = (next(side) for side in sides)
        assert found.is_cuda and torch.equal(found.cpu(), expected)
        assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("script, flags", LOSSES)
def test_graphs_compute_what_the_loop_does(here, capsys, script, flags):
    draw(here / "images", 40)
    flags = [*flags.split(), "--precision", "fp32", "--steps", 200, "--log-every", 10, "--save-every", 200]
    train(script, *flags, "--out", "eager")
    train(script, *flags, "--out", "graphs", "--graphs")
    apart = [abs(one["loss_D"] - other["loss_D"]) / (1 + abs(one["loss_D"]))
             for one, other in zip(runs.read_log(here / "eager"), runs.read_log(here / "graphs"))]
    speed = [runs.read_log(here / name)[-1]["images_per_sec"] for name in ("eager", "graphs")]
    with capsys.disabled():
        print(f"\n{script} {' '.join(flags[:3])}: losses at most {max(apart):.2g} apart; images/s {speed}")
    assert len(apart) == 20 and max(apart[:2]) < 2e-3 and max(apart) < 0.02


def test_a_graph_that_cannot_be_recorded_ends_with_one_sentence(here):
    draw(here / "images", 20)
    (here / "waits.py").write_text("""
import sys, gan, train_wgan
loss = gan.critic_loss
gan.critic_loss = lambda f_real, f_fake: loss(f_real, f_fake) * float(f_real.mean() < 1e9)      # waits for the card
train_wgan.main(sys.argv[1:])
""")
    process = subprocess.run([sys.executable, "waits.py", *TINY, "--device", CARD, "--graphs", "--steps", "9"],
                             capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(HERE)})
    assert process.returncode == 2 and process.stderr.count("\n") == 1, process.stderr
    assert "cannot be recorded" in process.stderr and "run without --graphs" in process.stderr


def test_features_samples_and_completions_are_those_of_the_cpu(here):
    draw(here / "images", 30)
    train("wgan", "--steps", 20, "--size", 32, "--out", "run")
    images = sources.draw_demo(24)[:, None].repeat(3, 1)
    on_cpu, on_card = (inception.load_features("random", device=device)(images) for device in ("cpu", CARD))
    assert (on_cpu - on_card.cpu()).abs().max() < 1e-4 * on_cpu.abs().max()
    Gs = [gan.load_generator("run", device) for device in ("cpu", CARD)]
    one, other = (evaluate.sample(G, 40, 1).astype(int) for G in Gs)
    assert np.abs(one - other).max() <= 1
    for device in ("cpu", CARD):
        generate.main(["run", "--device", device, "--grid", f"{device}.png", "--n", "16"])
    assert np.abs(pixels_of("cpu.png").astype(int) - pixels_of(f"{CARD}.png")).max() <= 1
    y, m = data.to_float(torch.from_numpy(images[:4, :, :32, :32])), inpainting.masks("center", 4, (32, 32), 0)
    fills = [inpainting.harmonic_fill(y.to(device), m.to(device)).cpu() for device in ("cpu", CARD)]
    assert (fills[0] - fills[1]).abs().max() < 1e-3


@pytest.mark.parametrize("size", [64, 256])
@pytest.mark.parametrize("flags", ["", "--norm none", "--precision fp32", "--graphs"])
def test_speed_and_memory_are_printed(here, capsys, size, flags):
    """The main job on drawn images. GroupNorm, the critic's LayerNorm, is slower on some cards: compare --norm none."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    flags = f"--limit 256 --size {size} --features 64 --steps 40 --log-every 20 --out run {flags}"
    train_wgan.main(["--device", CARD, *flags.split()])
    memory = torch.cuda.max_memory_allocated() / 2**30
    with capsys.disabled():
        print(f"\ntrain_wgan.py {flags}: {runs.read_log(here / 'run')[-1]['images_per_sec']:.0f} images/s, "
              f"{memory:.2f} GiB")
    assert memory < 0.9 * torch.cuda.get_device_properties(0).total_memory / 2**30


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA cards")
@pytest.mark.parametrize("flags", [[], ["--graphs"]])
def test_the_second_card_does_the_work(here, flags):
    draw(here / "images", 20)
    torch.cuda.reset_peak_memory_stats(1)
    train("wgan", "--steps", 20, "--out", "run", *flags, card="cuda:1")
    assert torch.cuda.max_memory_allocated(1) > 0
    first, last = (torch.load(here / f"run/generators/step-{step:07d}.pt", weights_only=True) for step in (4, 20))
    assert not torch.equal(first["G_ema"]["project.weight"], last["G_ema"]["project.weight"])
