"""Tests of the house: sizes, arrows between the files, the two loops side by side, every flag's help, words."""

import argparse
import ast
import importlib
import re
import subprocess
import sys

import pytest

import train_dcgan
import train_wgan
from conftest import GUIDE, HERE, README

PRODUCT = sorted(path.stem for path in HERE.glob("*.py") if path.stem not in ("conftest", "test_gan"))
COMMANDS = ("train_dcgan", "train_wgan", "train_pix2pix", "evaluate", "generate", "serve", "complete", "prepare",
            "bench", "baseline")
# Scripts that know of other scripts: bench and baseline run loops, serve asks for samples, --evaluate-every for scores.
ALLOWED = {("bench", "baseline"), ("baseline", "train_dcgan"), ("baseline", "train_wgan"), ("serve", "generate"),
           ("train_dcgan", "evaluate"), ("train_wgan", "evaluate")}


def lines(path):
    return path.read_text("utf-8").count("\n")


def arrows():
    """{file: the files of ours it imports}."""
    found = {}
    for name in PRODUCT:
        tree = ast.parse((HERE / f"{name}.py").read_text("utf-8"))
        named = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        named += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        found[name] = set(named) & set(PRODUCT)
    return found


def test_every_room_is_small():
    for path in [*HERE.glob("*.py"), *HERE.glob("tests/*.py")]:
        assert lines(path) <= (900 if path.name == "test_gan.py" else 500), path.name
    assert sum(lines(HERE / f"{name}.py") for name in PRODUCT) < 6000
    core = ("gan", "data", "runtime", "train_dcgan", "train_wgan", "plots", "metrics")
    assert sum(lines(HERE / f"{name}.py") for name in core) < 2400


def test_no_arrow_goes_up_or_round():
    graph, done = arrows(), set()
    for name in ("gan", "metrics", "plots", "runtime"):
        assert not graph[name], name
    for name, imported in graph.items():
        for other in imported & set(COMMANDS):
            assert (name, other) in ALLOWED, (name, other)
    while len(done) < len(graph):                                     # what imports only what is done is done
        ready = {name for name, imported in graph.items() if name not in done and imported <= done}
        assert ready, f"a circle among {set(graph) - done}"
        done |= ready


def test_the_plumbing_knows_nothing_of_the_papers():
    for name in ("runtime", "runs"):
        assert not re.search(r"generator\b|critic|loss\b", (HERE / f"{name}.py").read_text("utf-8").lower()), name


def test_importing_does_nothing():
    code = ("import torch; torch.manual_seed(5); before = torch.get_rng_state(); "
            f"import {', '.join(PRODUCT)}; assert torch.equal(before, torch.get_rng_state()); "
            "assert not torch.cuda.is_initialized()")
    process = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert process.returncode == 0 and process.stdout == process.stderr == "", process.stderr


def test_the_two_loops_keep_the_same_books():
    """What stands below the ruled line is at most a dozen lines, the same in both scripts."""
    below = []
    for script in (train_dcgan, train_wgan):
        code = open(script.__file__, encoding="utf-8").read().split("the rest is bookkeeping ---")[1]
        block = [line for line in code.split("\n    run.write(")[0].splitlines()[1:] if line.strip()]
        below.append(block)
    assert below[0] == below[1] and 8 <= len(below[0]) <= 13


@pytest.mark.parametrize("script", COMMANDS)
def test_every_flag_has_a_help_that_names_its_default(monkeypatch, script):
    parsers = []

    def stop(self, *args):
        parsers.append(self)
        raise KeyboardInterrupt

    module = importlib.import_module(script)
    monkeypatch.setattr(argparse.ArgumentParser, "_read_args_from_files", stop)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        module.parse_arguments([])
    for action in parsers[0]._actions:
        if action.option_strings and action.dest != "help" and action.help != argparse.SUPPRESS:
            group = next(group for group in parsers[0]._action_groups if action in group._group_actions)
            assert "default" in action.help + (group.title or ""), (action.option_strings, action.help)
            assert not re.search(r"\b(picture|sheet|slope|spread)s?\b", action.help), action.help


def test_settings_that_follow_from_others():
    clip = train_wgan.parse_arguments(["--data", "x", "--constraint", "clip"])
    assert (clip.lr, clip.norm) == (5e-5, "batch")
    assert train_wgan.parse_arguments(["--constraint", "clip"]).lr == 2e-4
    hinge, relativistic = (train_dcgan.parse_arguments(["--loss", loss]) for loss in ("hinge", "relativistic"))
    assert (hinge.norm, hinge.r1) == ("spectral", 0) and (relativistic.norm, relativistic.r1, relativistic.r2) == (
        "none", 1, 1)
    assert train_dcgan.parse_arguments(["--loss", "relativistic", "--r1", "0.1"]).r1 == 0.1


def test_the_images_of_the_documents_are_small():
    assert sum(path.stat().st_size for path in (HERE / "images").iterdir()) < 1_000_000


def test_the_documents_name_no_picture():
    for text in (README, GUIDE, *((HERE / f"{name}.py").read_text("utf-8") for name in PRODUCT)):
        assert not re.findall(r'(?<!")\bpictures?\b', text, re.I)
