"""Tests of cli.py."""

import os
import subprocess
import sys

import pytest
import torch

import train_wgan
from conftest import HERE, TINY, checkpoint, draw, mistake, train


def test_names_that_a_terminal_cannot_show(here):
    draw(here / "牙", 3)
    (here / "牙" / "é牙.jpg").write_bytes(b"broken")
    process = subprocess.run([sys.executable, HERE / "train_wgan.py", *TINY, "--data", "牙", "--steps", "1"],
                             capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert process.returncode == 0 and "\\u7259" in process.stdout and "--data='牙'" in next(
        (here / "runs").glob("*/args.txt")).read_text("utf-8")


@pytest.mark.parametrize("flags, words", [
    ("--clip -1", "a number >= 1e-09"), ("--ema nan", "a number >= 0 and < 1"), ("--lam -1", "a number >= 0"),
    ("--seed -1", "an integer >= 0"), ("--resume text.txt", "is a file: give the run folder"),
    ("--resume hollow", "is damaged"), ("@quote.txt", "cannot be read"), ("--device meta", "expected auto, cuda"),
    ("--data nowhere", "there is no such folder"), ("--data=", "(empty): there is no such folder"),
    ("--data empty", "no images in this folder"),
    ("--data broken", "0 of 2 images can be used"), ("--data one", "1 of 1 images can be used and at least 2"),
    ("--data images/000.png", "1 of 1 images can be used"), ("--size 3", "the nearest size that works is 8x8"),
    ("--size 5000", "the nearest size that works is 1024x1024"), ("--size big", "expected one number"),
    ("--stpes 5", "did you mean --steps?"), ("--batch 0", "--batch: expected an integer >= 1, got '0'"),
    ("--constraint gq", "invalid choice"),
    ("one", "did you mean --data one?"), ("text.txt", "did you mean @text.txt?"),
    ("--loss hinge", "mean train_dcgan.py?"),
    ("y" * 300, "unrecognized arguments: yyy"),
    ("--seed 4294967296", "and < 4294967296, got"),
    ("--resume begun", "begin again with its training script and @begun"),
    ("--evaluate-every 5 --evaluate-network it", "feature network: expected inception, random"),
    ("--out taken", "exists already"), ("--norm batch", "do not go with a gradient penalty"),
    ("--minibatch-discrimination", "do not go with a gradient penalty"),
    ("--augment colour", "not 'colour'"), ("--crop 5", "expected LEFT,TOP,RIGHT"),
    ("--holdout 1", "--holdout: expected a number >= 0 and < 1"), ("--range 5", "--range is gone: python prepare.py"),
    ("--background mud", "--background is gone: python prepare.py"),
    ("--crop auto", "prepare.py FOLDER --crop auto"), ("--group (", "no regular expression"),
    ("--group q+", "matches no name"),
    ("--crop 99x99", "smaller than the crop window"), ("--device cuda:77", "cannot be used here"),
    ("--resume nowhere", "there is no such run folder"), ("--resume taken", "there is no checkpoint.pt in it"),
    ("--resume garbage", "is damaged"), ("@nofile.txt", "nofile.txt"), ("--tensorboard", "pip install tensorboard"),
    ("--accumulate 4", "gone: start a new run with a smaller --batch"),
    ("--graphs", "needs one NVIDIA card"), ("@binary", "@file")])
def test_one_sentence_and_exit_status_2(here, capsys, monkeypatch, flags, words):
    draw(here / "images")
    draw(here / "one", 1)
    for name in ("empty", "taken", "broken", "garbage", "hollow", "begun"):
        (here / name).mkdir()
    (here / "begun" / "args.txt").touch()
    (here / "text.txt").write_text("words")
    (here / "binary").write_bytes(bytes(range(256)))
    (here / "quote.txt").write_text("--data it's\n")
    (here / "hollow" / "checkpoint.pt").touch()
    (here / "broken" / "a.jpg").write_text("words")
    (here / "broken" / "b.png").write_bytes(b"")
    (here / "garbage" / "checkpoint.pt").write_bytes(b"\x80\x02garbage")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)                 # as if it were not installed
    def listing():
        return sorted(path for path in here.rglob("*") if "runs" not in path.parts or path.name == "args.txt")

    before = listing()
    assert words in mistake(capsys, lambda: train("--steps", "1", *flags.split()))
    assert listing() == before                                        # no run begun, nothing lost


def test_mistakes_when_going_on(here, capsys):
    draw(here / "images")
    train("--steps", "2", "--out", "r")
    capsys.readouterr()
    raw = (here / "r" / "checkpoint.pt").read_bytes()

    def resume(*flags):
        return mistake(capsys, lambda: train_wgan.main(["--resume", "r", *flags]))

    assert "has done 2 steps" in resume()
    assert "--size is '9x12' in r and cannot become '64'" in resume("--steps", "4", "--size", "64")
    assert "--lam is" in resume("--steps", "4", "--lam", "1") and "--out is" in resume("--steps", "4", "--out", "s")
    draw(here / "others", 9)
    assert "other images" in resume("--steps", "4", "--data", "others")
    saved = checkpoint("r")
    torch.save({**saved, "script": "train_dcgan.py"}, "r/checkpoint.pt")
    assert "is a run of train_dcgan.py" in resume("--steps", "4")
    torch.save({**saved, "flags": {**saved["flags"], "features": 8}}, "r/checkpoint.pt")
    assert "does not fit what its flags build" in resume("--steps", "4")
    (here / "r" / "checkpoint.pt").write_bytes(raw)
    (here / "images").rename(here / "moved")
    capsys.readouterr()
    train_wgan.main(["--resume", "r", "--steps", "3", "--data", "moved"])              # the same images elsewhere
    assert checkpoint("r")["step"] == 3 and "done: 1 steps" in capsys.readouterr().out   # those of this start


def test_a_run_begun_with_a_flag_that_is_gone_says_so(here, capsys):
    draw(here / "images")
    train("--steps", "2", "--out", "r")
    saved, old = checkpoint("r"), dict(accumulate=1, background="white", evaluate_features="random", profile=False)
    flags = {name: value for name, value in saved["flags"].items() if name != "evaluate_network"}
    first = {**saved, "same": {"images": saved["same"]["images"]}}  # as the first edition wrote it
    torch.save({**first, "flags": {**flags, **old, "accumulate": 4}}, "r/checkpoint.pt")
    resume = lambda *more: train_wgan.main(["--resume", "r", "--steps", "3", *more])  # noqa: E731
    assert "r was begun with --accumulate 4, a flag that is gone: start a new run" in mistake(capsys, resume)
    torch.save({**first, "flags": {**flags, **old}}, "r/checkpoint.pt")
    resume()
    assert checkpoint("r")["step"] == 3 and checkpoint("r")["flags"]["evaluate_network"] == "random"
    assert not {"accumulate", "evaluate_features"} & checkpoint("r")["flags"].keys()
    (here / "args.txt").write_text("--accumulate 1\n--background white\n--evaluate-features random\n--data images\n")
    args = train_wgan.parse_arguments(["@args.txt"])
    assert (args.data, args.evaluate_network) == ("images", "random")
    (here / "args.txt").write_text("--denoise nlm\n")
    assert "--denoise is gone: python prepare.py" in mistake(capsys, lambda: train_wgan.parse_arguments(["@args.txt"]))
