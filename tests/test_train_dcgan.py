"""Tests of train_dcgan.py."""

import argparse
import copy

import pytest
import torch

import gan
import runs
import train_dcgan
from conftest import BOOSTED, GUIDE, Stub, draw, mistake, same, train


def boost(p_d, p_g, length):
    return train_dcgan.Schedule(argparse.Namespace(schedule="boost", boost_d=p_d, boost_g=p_g, boost_length=length))


@pytest.mark.parametrize("p_d, p_g, length", [(0.0009, 0.0001, 100), (0.02, 0.01, 10), (0.0, 0.05, 7)])
def test_long_run_rates_of_boost(p_d, p_g, length):
    schedule, steps = boost(p_d, p_g, length), 400_000
    drawn = [schedule.next_mode() for _ in range(steps)]
    cycle = (p_d + p_g) * length + 1 - p_d - p_g                      # steps for one draw, on average
    for mode, p in (("D", p_d), ("G", p_g)):
        expected, runs_of_it = p * length / cycle, steps * p / cycle
        assert drawn.count(mode) / steps == pytest.approx(expected, abs=4.5 * expected / max(runs_of_it, 1) ** 0.5)
    for k in range(1, steps):                                         # runs are whole: no network sneaks in
        if drawn[k] != drawn[k - 1] and drawn[k - 1] != "both":
            assert len({*drawn[max(0, k - length):k]}) == 1


def test_boost_goes_on_where_it_was():
    schedule, other = boost(0.1, 0.1, 9), boost(0.1, 0.1, 9)
    for _ in range(57):
        schedule.next_mode()
    other.load_state_dict(schedule.state_dict())
    state = torch.get_rng_state()
    ahead = [schedule.next_mode() for _ in range(200)]
    torch.set_rng_state(state)
    assert ahead == [other.next_mode() for _ in range(200)] and len(set(ahead)) == 3


def test_monitored_compares_this_loss_of_d_with_the_last_of_g():
    schedule = train_dcgan.Schedule(argparse.Namespace(schedule="monitored", monitor_ratio=0.8))
    assert schedule.trains_D(torch.tensor(0.0))                       # nothing to compare with yet
    schedule.last_loss_G = torch.tensor(2.0)
    assert [schedule.trains_D(torch.tensor(v)) for v in (1.59, 1.61)] == [False, True]
    for p in (0.1, 0.5, 0.9):                                         # losses uniform on [0, 1): chance 1 - p
        schedule.last_loss_G = torch.tensor(p / 0.8)
        share = sum(map(schedule.trains_D, torch.rand(4000))) / 4000
        assert share == pytest.approx(1 - p, abs=0.03)


@pytest.mark.parametrize("loss", ["bce", "relativistic"])
def test_monitored_rests_d_and_logs_it(here, monkeypatch, loss):
    """A step whose D rests updates G alone and leaves D's weights and moments as they are; its log says so."""
    draw(here / "images")
    answers, seen = iter([True, False, False, True]), []
    monkeypatch.setattr(train_dcgan.Schedule, "trains_D", lambda self, loss_D: next(answers))
    monkeypatch.setattr(runs, "Run", Stub)
    monkeypatch.setattr(Stub, "log", lambda self, **scalars: seen.append((scalars, copy.deepcopy(
        [Stub.state[name].state_dict() for name in ("D", "opt_D")]))), raising=False)
    train("--steps", "4", "--schedule", "monitored", "--loss", loss, "--norm", "none", script="dcgan")
    scalars, states = zip(*seen)
    assert [one["trained_D"] for one in scalars] == [1, 0, 0, 1] and all(one["trained_G"] == 1 for one in scalars)
    assert same(states[0], states[1]) and same(states[1], states[2]) and not same(states[2], states[3])
    assert all(0 < one["D_x"] < 1 for one in scalars) == (loss == "bce")
    assert all(torch.isfinite(one["loss_D"]) for one in scalars)


def test_the_classic_step_is_not_wrapped(here, monkeypatch):
    draw(here / "images")
    monkeypatch.setattr(train_dcgan.Schedule, "wrap", None)           # would raise if it were called
    monkeypatch.setattr(runs, "Run", Stub)
    train("--steps", "1", script="dcgan")


@pytest.mark.parametrize("flags, words", [
    ("--minibatch-discrimination --r1 1 --norm none",
     "--r1, --r2 do not go with --norm batch or --minibatch-discrimination"),
    ("--r2 1", "take --norm none, layer"), ("--loss relativistic --norm batch", "do not go with --norm batch"),
    ("--loss hinge --smooth 0.1", "hinge has no targets"), ("--two-sided", "give --smooth too"),
    ("--smooth 0.6", "expected a number >= 0 and < 0.5"), ("--label-noise 0.5", "expected a number >= 0 and < 0.5"),
    ("--boost-d 0.6 --boost-g 0.6", "their sum is at most 1"), ("--graphs --label-noise 0.1", "records one order"),
    ("--loss hinge --schedule monitored", "no lower bound"),
    ("--r1 -1 --norm none", "expected a number >= 0"), ("--augment colour", "not 'colour'")])
def test_contradictions_are_refused_with_the_reason(here, capsys, flags, words):
    draw(here / "images")
    assert words in mistake(capsys, lambda: train("--steps", "1", *flags.split(), script="dcgan"))


@pytest.mark.parametrize("flags", ["--loss hinge --label-noise 0.4", "--loss relativistic --norm layer --batch 2",
                                   "--norm instance --r1 0.5", BOOSTED + " --minibatch-discrimination"])
def test_dcgan_options_on_odd_images(here, flags):
    draw(here / "images", 3, (30, 9), "LA")
    train("--steps", "4", "--out", "r", *flags.split(), script="dcgan")
    for key in {key for row in runs.read_log(here / "r") for key in row}:
        assert f"`{key}`" in GUIDE                                    # every logged number is explained
    assert gan.load_generator("r")(torch.randn(2, 5)).shape[2:] == (9, 12)


def test_a_step_trains_what_the_schedule_says(here, monkeypatch):
    draw(here / "images")
    modes = iter(["both", "D", "D", "G", "both"])
    monkeypatch.setattr(train_dcgan.Schedule, "next_mode", lambda self: setattr(self, "mode", next(modes)))
    monkeypatch.setattr(runs, "Run", Stub)
    updates, logged, step = [], [], torch.optim.Adam.step
    monkeypatch.setattr(Stub, "log", lambda self, **scalars: logged.append(scalars), raising=False)

    def spy(self, *args, **kwargs):
        updates.append("G" if self is Stub.state["opt_G"] else "D")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    train("--steps", "5", "--schedule", "boost", script="dcgan")
    assert "".join(updates) == "DG" + "D" + "D" + "G" + "DG"
    assert [(row["trained_D"], row["trained_G"]) for row in logged] == [(1, 1), (1, 0), (1, 0), (0, 1), (1, 1)]


def test_noisy_labels_swap_real_and_fake_in_a_share_of_the_steps(here, monkeypatch):
    """And `monitored` is asked about the loss with the true labels: else it would rest on those alone."""
    draw(here / "images")
    calls, asked, scores, loss, forward = [], [], [], gan.bce_discriminator_loss, gan.Discriminator.forward

    def spy(a, b, *rest):
        calls.append((a is scores[-2], loss(a, b, *rest)))
        return calls[-1][1]

    monkeypatch.setattr(gan.Discriminator, "forward", lambda self, x: (scores.append(forward(self, x)), scores[-1])[1])
    monkeypatch.setattr(gan, "bce_discriminator_loss", spy)
    monkeypatch.setattr(train_dcgan.Schedule, "trains_D", lambda self, loss_D: asked.append(loss_D) or True)
    monkeypatch.setattr(runs, "Run", Stub)
    train("--steps", "300", "--label-noise", "0.3", "--augment", "", "--size", "8", script="dcgan")
    honest = [value for real_first, value in calls if real_first]
    assert len(asked) == len(honest) == 300 and all(a is b for a, b in zip(asked, honest))
    assert (len(calls) - 300) / 300 == pytest.approx(0.3, abs=0.1)


def test_the_penalties_are_logged_where_there_are_any(here):
    draw(here / "images")
    for flags, has in (("--loss relativistic", True), ("--loss bce", False)):
        train("--steps", "2", "--out", flags[7:], *flags.split(), script="dcgan")
        assert ("penalty" in runs.read_log(here / flags[7:])[-1]) == has
