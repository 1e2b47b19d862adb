"""Tests of train_dcgan.py."""

import json
from pathlib import Path

import pytest
import torch

import gan
import runtime
import train_dcgan
from conftest import BOOSTED, README, Stub, draw, mistake, train


def test_classic_trains_both_always():
    schedule = train_dcgan.Schedule("classic")
    schedule.last_loss_G = torch.tensor(100.0)
    before = torch.get_rng_state()
    assert {schedule.mode() for _ in range(500)} == {"both"} and schedule.trains_D(torch.tensor(0.0))
    assert torch.equal(torch.get_rng_state(), before)                 # and draws nothing


@pytest.mark.parametrize("p_d, p_g, length", [(0.0009, 0.0001, 100), (0.02, 0.01, 10), (0.0, 0.05, 7)])
def test_long_run_rates_of_boost(p_d, p_g, length):
    schedule, steps = train_dcgan.Schedule("boost", 0.8, p_d, p_g, length), 400_000
    drawn = [schedule.mode() for _ in range(steps)]
    cycle = (p_d + p_g) * length + 1 - p_d - p_g                      # steps for one draw, on average
    for mode, p in (("D", p_d), ("G", p_g)):
        expected, runs = p * length / cycle, steps * p / cycle
        assert drawn.count(mode) / steps == pytest.approx(expected, abs=4.5 * expected / max(runs, 1) ** 0.5)
    for k in range(1, steps):                                         # runs are whole: no network sneaks in
        if drawn[k] != drawn[k - 1] and drawn[k - 1] != "both":
            assert len({*drawn[max(0, k - length):k]}) == 1


def test_boost_goes_on_where_it_was():
    schedule, other = (train_dcgan.Schedule("boost", 0.8, 0.1, 0.1, 9) for _ in range(2))
    for _ in range(57):
        schedule.mode()
    other.load_state_dict(schedule.state_dict())
    state = torch.get_rng_state()
    ahead = [schedule.mode() for _ in range(200)]
    torch.set_rng_state(state)
    assert ahead == [other.mode() for _ in range(200)] and len(set(ahead)) == 3


def test_monitored_compares_this_loss_of_d_with_the_last_of_g():
    schedule = train_dcgan.Schedule("monitored", ratio=0.8)
    assert schedule.trains_D(torch.tensor(0.0))                       # nothing to compare with yet
    schedule.last_loss_G = torch.tensor(2.0)
    assert [schedule.trains_D(torch.tensor(v)) for v in (1.59, 1.61)] == [False, True]
    for p in (0.1, 0.5, 0.9):                                         # losses uniform on [0, 1): chance 1 - p
        schedule.last_loss_G = torch.tensor(p / 0.8)
        share = sum(map(schedule.trains_D, torch.rand(4000))) / 4000
        assert share == pytest.approx(1 - p, abs=0.03)


@pytest.mark.parametrize("flags, words", [
    ("--minibatch-discrimination --r1 1 --norm none", "--minibatch-discrimination cannot go with the penalties --r1 1"),
    ("--r2 1", "take --norm none, layer"), ("--loss relativistic --norm batch", "--norm batch cannot"),
    ("--loss hinge --smooth 0.1", "hinge has no targets"), ("--two-sided", "give --smooth as well"),
    ("--smooth 0.6", "number from 0 to under 0.5"), ("--label-noise 0.5", "number from 0 to under 0.5"),
    ("--boost-d 0.6 --boost-g 0.6", "their sum is at most 1"),
    ("--loss hinge --schedule monitored", "no lower bound"), ("--r1 -1 --norm none", "number from 0")])
def test_contradictions_are_refused_with_the_reason(here, capsys, flags, words):
    draw(here / "pictures")
    assert words in mistake(capsys, lambda: train("--steps", "1", *flags.split(), script="dcgan"))


@pytest.mark.parametrize("flags", ["--loss hinge --label-noise 0.4", "--loss relativistic --norm layer --batch 2",
                                   "--norm instance --r1 0.5", BOOSTED + " --minibatch-discrimination"])
def test_dcgan_options_on_odd_pictures(here, flags):
    draw(here / "pictures", 3, (30, 9), "LA")
    train("--steps", "4", "--out", "r", *flags.split(), script="dcgan")
    rows = [json.loads(line) for line in Path("r/log.jsonl").read_text("utf-8").splitlines()]
    for key in {key for row in rows for key in row}:
        assert f"`{key}`" in README                                   # every logged number is explained
    assert gan.load_generator("r")(torch.randn(2, 5)).shape[2:] == (9, 12)


def test_a_step_trains_what_the_schedule_says(here, monkeypatch):
    draw(here / "pictures")
    modes = iter(["both", "D", "D", "G", "both"])
    monkeypatch.setattr(train_dcgan.Schedule, "mode", lambda self: next(modes))
    monkeypatch.setattr(runtime, "Run", Stub)
    updates, step = [], torch.optim.Adam.step

    def spy(self, *args, **kwargs):
        updates.append("G" if self is Stub.state["opt_G"] else "D")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    train("--steps", "5", script="dcgan")
    assert "".join(updates) == "DG" + "D" + "D" + "G" + "DG"


def test_noisy_labels_swap_real_and_fake_in_a_share_of_the_steps(here, monkeypatch):
    """And `monitored` is asked about the loss with the true labels: else it would rest on those alone."""
    draw(here / "pictures")
    calls, asked, scores, loss, forward = [], [], [], gan.bce_discriminator_loss, gan.Discriminator.forward

    def spy(a, b, *rest):
        calls.append((a is scores[-2], loss(a, b, *rest)))
        return calls[-1][1]

    monkeypatch.setattr(gan.Discriminator, "forward", lambda self, x: (scores.append(forward(self, x)), scores[-1])[1])
    monkeypatch.setattr(gan, "bce_discriminator_loss", spy)
    monkeypatch.setattr(train_dcgan.Schedule, "trains_D", lambda self, loss_D: asked.append(loss_D) or True)
    monkeypatch.setattr(runtime, "Run", Stub)
    train("--steps", "300", "--label-noise", "0.3", "--augment", "", "--size", "8", script="dcgan")
    honest = [value for real_first, value in calls if real_first]
    assert len(asked) == len(honest) == 300 and all(a is b for a, b in zip(asked, honest))
    assert (len(calls) - 300) / 300 == pytest.approx(0.3, abs=0.1)
