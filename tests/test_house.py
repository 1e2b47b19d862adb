"""Tests of house.py."""

import re
import shlex
import subprocess
import sys

import pytest
import torch
from PIL import Image, ImageOps

import prepare
import train_dcgan
import train_pix2pix
import train_wgan
from conftest import HERE, MODULES, PIX, README, SCRIPTS, draw, train


def test_runtime_knows_nothing_of_the_papers():
    text = (HERE / "runtime.py").read_text("utf-8").lower()
    assert not re.search(r"generator|critic|loss", text)
    for module in ("gan", "data", "runtime"):
        ours = r"^\s*(import|from) (gan|data|runtime|train_\w+)\b"
        assert not re.search(ours, (HERE / f"{module}.py").read_text("utf-8"), re.M)


def test_importing_does_nothing():
    code = ("import torch; torch.manual_seed(5); before = torch.get_rng_state(); import gan, data, runtime; "
            "import train_dcgan, train_wgan, evaluate; assert torch.equal(before, torch.get_rng_state()); "
            "import generate, train_dcgan, train_wgan; assert torch.equal(before, torch.get_rng_state()); "
            "import train_dcgan, train_pix2pix, train_wgan; assert torch.equal(before, torch.get_rng_state()); "
            "import train_dcgan, train_pix2pix, train_wgan, evaluate, complete; "
            "assert torch.equal(before, torch.get_rng_state()); "
            "assert not torch.cuda.is_initialized()")
    process = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert process.returncode == 0 and process.stdout == process.stderr == ""


@pytest.mark.parametrize("script", MODULES)
def test_default_flags_are_those_of_the_readme(script):
    def table(opening):
        rows = README.split(opening, 1)[1].split("\n\n")[1]
        return {name.replace("-", "_"): (default.strip(), demo.strip() or default.strip())
                for name, default, demo in re.findall(r"^\| `--([\w-]+)` \|([^|]*)\|([^|]*)\|", rows, re.M)}

    def text(value):
        return "" if value is None or value is False else f"{value:g}" if isinstance(value, float) else str(value)

    parse, expected = MODULES[script].parse_arguments, table("All three scripts") | table(f"`train_{script}.py`; with")
    if script == "pix2pix":
        del expected["augment"]
    for column, flags in enumerate((["--data", "x"], [])):
        found = {name: text(value) for name, value in vars(parse(flags)).items()}
        assert {**found, "data": "demo"} == {name: cells[column] for name, cells in expected.items()}


def test_settings_that_follow_from_others():
    clip = train_wgan.parse_arguments(["--data", "x", "--constraint", "clip"])
    assert (clip.lr, clip.norm) == (5e-5, "batch")
    assert train_wgan.parse_arguments(["--constraint", "clip"]).lr == 2e-4
    hinge, relativistic = (train_dcgan.parse_arguments(["--loss", loss]) for loss in ("hinge", "relativistic"))
    assert (hinge.norm, hinge.r1) == ("spectral", 0) and (relativistic.norm, relativistic.r1, relativistic.r2) == (
        "none", 1, 1)
    assert train_dcgan.parse_arguments(["--loss", "relativistic", "--r1", "0.1"]).r1 == 0.1


def test_every_command_in_the_readme_and_the_docstrings_parses(here):
    draw(here / "images")
    for script in SCRIPTS:                                            # what --resume and @args.txt refer to
        for source in ("teeth", "sprites"):
            train("--steps", "1", "--out", f"runs/{script}-{source}-1", script=script)
    train_pix2pix.main([*PIX, "--steps", "1", "--out", "runs/pix2pix-faces-1"])
    text = README + "".join(module.__doc__ for module in MODULES.values())
    commands = re.findall(r"python train_(\w+)\.py((?: [^\s`#|]+)*)", text)
    assert len(commands) > 20 and sum("--resume" in flags for _, flags in commands) >= 3
    for script, flags in commands:
        MODULES[script].parse_arguments(shlex.split(flags))
    draw(here / "teeth", 6, (500, 510))
    for file in (here / "teeth").iterdir():                           # detail in the middle, for --crop auto to find
        ImageOps.expand(Image.open(file), 120, "grey").save(file)
    commands = re.findall(r"python data\.py((?: [^\s`#|]+)*)", README)
    assert len(commands) >= 4
    for flags in commands:
        prepare.main(shlex.split(flags))                                 # these are quick: run, not only parsed


def test_the_notebook_loop_of_the_readme_runs(here, monkeypatch):
    code = next(block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "gradient_penalty" in block)
    assert 25 <= len([line for line in code.splitlines() if line.strip()]) <= 40
    short = code.replace("= 5000, 64, 5, 10.0", "= 2, 8, 2, 10.0")
    assert short != code
    monkeypatch.syspath_prepend(HERE)
    cell = {}
    exec(short, cell)
    assert cell["G"](torch.randn(2, cell["G"].config["latent"])).isfinite().all()


def test_every_file_stands_in_the_readme():
    for path in HERE.glob("*.py"):
        assert f"`{path.name}`" in README
    for picture in re.findall(r"\((images/[^)]+)\)", README):
        assert (HERE / picture).exists()
    assert sum(path.stat().st_size for path in (HERE / "images").iterdir()) < 1_000_000
