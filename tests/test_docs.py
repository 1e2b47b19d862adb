"""Tests of README.md, GUIDE.md and the scripts' docstrings against the code."""

import csv
import importlib
import io
import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import complete
import data
import evaluate
import generate
import inception
import runs
import serve
import train_pix2pix
from conftest import GUIDE, HERE, PIX, README, TINY, Tiny, draw, train

SCRIPTS = "train_dcgan train_wgan train_pix2pix evaluate generate serve complete prepare bench baseline".split()
PRETRAINED = (HERE / "pretrained/README.md").read_text("utf-8")
DOCUMENTS = {"README.md": README, "GUIDE.md": GUIDE, "pretrained/README.md": PRETRAINED,
             **{f"{name}.py": importlib.import_module(name).__doc__ for name in SCRIPTS}}
WGAN, DCGAN, PIX2PIX = "runs/wgan-teeth-1", "runs/dcgan-sprites-1", "runs/pix2pix-faces-1"


@pytest.fixture(scope="module", autouse=True)
def the_runs_that_the_documents_name(tmp_path_factory):
    """The current folder of all tests here: a run of each script, one step long, that logs all it can log."""
    folder = tmp_path_factory.mktemp("documents")
    draw(folder / "images", 120)
    draw(folder / "others", 24)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(inception, "load_features", lambda *_, **__: inception.Features(
            Tiny(), data.to_float, "cpu", "a tiny network", torch.randn(1008, 48)))
        Path("small.txt").write_text((HERE / "small.txt").read_text("utf-8"))
        Path("common.txt").write_text(re.search(r"```\n(--.*?)```", section("Recipes"), re.S)[1])
        train("--steps", "1", "--size", "12x16", "--out", WGAN, "--evaluate-every", "1", "--evaluate-n", "4")
        train("--steps", "1", "--out", DCGAN, "--schedule", "monitored", script="dcgan")
        train_pix2pix.main([*PIX, "--steps", "1", "--out", PIX2PIX])
        yield


def commands():
    """(document, script, its arguments) of every command, without the comment behind it."""
    for name, text in DOCUMENTS.items():
        for script, rest in re.findall(rf"(?:python|torchrun .*) ({'|'.join(SCRIPTS)})\.py\b([^`#\n]*)", text):
            yield name, script, shlex.split(re.split(" {2,}", rest + "  ")[0])


def snippets(text):
    return re.findall(r"```python\n(.*?)```", text, re.S)


def section(title):
    """What stands below a heading of GUIDE.md."""
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", GUIDE, re.S | re.M)[1]


def explained(title):
    """The keys that the list in a section of GUIDE.md explains: - `one`, `another`: what they are."""
    return {key for keys in re.findall(r"^- ((?:`\w+`(?:, )?)+):", section(title), re.M)
            for key in re.findall(r"\w+", keys)}


def test_every_command_parses(capsys):
    found = list(commands())
    assert len(found) >= 100 and {script for _, script, _ in found} == set(SCRIPTS)
    assert len([words for *_, words in found if "--resume" in words]) >= 5
    assert len([words for *_, words in found if "@" in "".join(words[:1])]) >= 3
    for name, script, words in found:
        try:
            importlib.import_module(script).parse_arguments(words)
        except SystemExit:
            pytest.fail(f"{name}: {script}.py {shlex.join(words)}: {capsys.readouterr().err}")


def test_every_flag_in_the_text_exists():
    sources = "".join((HERE / f"{name}.py").read_text("utf-8") for name in (*SCRIPTS, "cli", "data"))
    known = {*re.findall(r'"(--[a-z][\w-]*)"', sources), *(f"--{name}" for name in evaluate.REPORTS), "--help"}
    text = README + GUIDE.replace(section("Changes since the first edition"), "")
    others = {"--nproc-per-node", "--no-deps", "--slow"}              # torchrun's, pip's, pytest's
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) - known == others


def test_the_snippet_of_the_readme_runs_beside_gan_and_below_its_text(monkeypatch, capsys):
    snippet, = snippets(README)
    for pattern, short in ((r"\b2000\b", "20"), ("= 5000, 64, 5,", "= 2, 8, 2,"), ("features=32", "features=4"),
                           ("% 100", "% 2")):
        snippet, n = re.subn(pattern, short, snippet)
        assert n, pattern
    grids = []
    for code in (snippet, (HERE / "gan.py").read_text("utf-8") + snippet):
        torch.manual_seed(0)
        exec(code, {"__name__": "__main__"})
        assert "step 2 | loss_D" in capsys.readouterr().out
        grids.append(np.asarray(Image.open("samples.png")))
        monkeypatch.setitem(sys.modules, "gan", None)                 # from now on it cannot be imported
    assert grids[0].shape == (256, 256) and np.array_equal(*grids) and len(np.unique(grids[0])) > 1


def test_the_snippets_of_the_guide_run(capsys):
    cells = {}
    for code in snippets(GUIDE):
        exec(code.replace('["--steps", "5"]', repr([*TINY, "--steps", "1"])), cells)
    inside = (cells["m"] == 0).expand_as(cells["x"])                  # inpainting
    assert torch.equal(cells["completed"][~inside], cells["x"][~inside])
    assert (cells["completed"] != cells["x"])[inside].float().mean() > 0.9
    assert cells["G"](torch.randn(16, 5)).shape == (16, 3, 12, 16) and cells["G"].config["latent"] == 5
    assert "done: 1 steps" in (out := capsys.readouterr().out) and "Self CPU time total" in out       # the profiler


def test_the_trained_generators_draw_and_are_described(tmp_path):
    files = sorted((HERE / "pretrained").glob("*.pt"))
    assert [file.name for file in files] == re.findall(r"^\| `([\w-]+\.pt)` \|", PRETRAINED, re.M) and len(files) == 2
    for file in files:
        assert file.stat().st_size < 3e6 and f"pretrained/{file.name}" in PRETRAINED
        generate.main([str(file), "--grid", str(tmp_path / "grid.png"), "--n", "16", "--device", "cpu"])
        pixels = np.asarray(Image.open(tmp_path / "grid.png").convert("L"), np.float32)
        assert pixels.std() > 20                                      # no grey mush
        kind, png = serve.App(generate.open_generator(str(file), "cpu")).answer("/image", "seed=0&k=3&psi=1")
        assert kind == "image/png" and Image.open(io.BytesIO(png)).size == (64, 64)


def test_the_rows_of_the_results_parse():
    text = (HERE / "images/results.sh").read_text("utf-8")
    ours = re.search(r'^ours="(.*)"$', text, re.M)[1]
    rows = re.findall(r'^    ([\w-]+)\) +script="?(\w+)\.py ?(\w*)"? flags="?([^";]*?)"? ;;$', text, re.M)
    assert len(rows) == text.count(" ;;") - 1 and len({name for name, *_ in rows}) == len(rows) >= 14
    for _, script, method, flags in rows:
        importlib.import_module(script).parse_arguments([*method.split(), *shlex.split(flags.replace("$ours", ours))])


def test_the_tables_of_results_are_those_of_the_csv():
    with open(HERE / "images/results.csv", newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["minutes"] in "15 7.2 7.3 7.5 7.9 9.4 10.6".split()]
    measured = {(row["row"], row["seed"], row["set"]): row for row in rows}
    table = re.findall(r"^\| `([\w-]+)` \| (\d) \| (.*) \| (.*) \| (.*) \|$", GUIDE, re.M)
    assert len(table) >= 5
    for name, seed, *cells in table:
        for source, cell in zip(("mnist", "celeba", "teeth"), cells):
            row = measured.get((name, seed, source))
            assert (row is None) == (cell == "-"), (name, seed, source)
            if row:
                fd, kid, precision, recall = (float(row[key]) for key in ("fid", "kid", "precision", "recall"))
                assert cell == f"{fd:.{fd < 20:d}f} · {1000 * kid:.0f} · {precision:.2f} · {recall:.2f}", (name, seed)
    short = re.findall(r"^\| .*\(`([\w-]+)`\) \| (.*) \| (.*) \| (.*) \|$", README, re.M)
    assert len(short) >= 3
    for name, *cells in short:
        for source, cell in zip(("mnist", "celeba", "teeth"), cells):
            row = measured.get((name, "0", source))
            assert cell == (f"{float(row['fid']):.{float(row['fid']) < 20:d}f}" if row else "-"), (name, source)


def test_every_key_of_the_log_is_explained_and_no_other():
    written = {key for run in (WGAN, DCGAN, PIX2PIX) for row in runs.read_log(Path(run)) for key in row}
    assert len(written) > 15 and written == explained("The log")
    assert set(re.findall(r"`(\w+)`", README.split("## How to read the log")[1].split("##")[0])) <= written


def test_every_score_is_explained_and_no_other(monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "TSNE_IMAGES", 12)
    evaluate.main([WGAN, "--all", "--heldout", "others", "--device", "cpu"])
    assert "skipped" not in capsys.readouterr().out
    evaluate.main(["images", "images", "--pairs", "--ssim", "--json", f"{WGAN}/metrics.json"])
    assert set(json.loads(Path(WGAN, "metrics.json").read_text("utf-8"))) == explained("Scores")
    assert complete.SCORES.keys() - {"kid_std"} == explained("Filling holes")


def test_every_link_leads_somewhere():
    def anchors(text):
        return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
                for title in re.findall(r"^#+ (.*)", re.sub("```.*?```", "", text, flags=re.S), re.M)}

    for name, text in (("README.md", README), ("GUIDE.md", GUIDE)):
        links = re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text)
        assert len(links) >= 5
        for file, anchor in links:
            assert (HERE / file).exists(), (name, file)
            assert not anchor or anchor in anchors(DOCUMENTS[file or name]), (name, file, anchor)


def test_the_readme_is_short_and_counts_the_lines_of_every_file():
    assert README.count("\n") <= 250
    counted = {}
    for files, lines in re.findall(r"^\| (`.*?) \| .* \| ([\d,]+) \|$", README.split("## Results")[0], re.M):
        paths = [path for file in re.findall("`(.*?)`", files)
                 for path in (HERE.glob("tests/*.py") if file == "tests/" else [HERE / file])]
        counted |= dict.fromkeys(paths)
        lines, found = int(lines.replace(",", "")), sum(path.read_text("utf-8").count("\n") for path in paths)
        assert abs(lines - found) <= max(10, found / 10), (files, found)
    assert counted.keys() >= {*HERE.glob("*.py"), *HERE.glob("tests/*.py"), HERE / "page.html"}


def recipes():
    return re.findall(r"`python (train_\w+)\.py (.*?)`", section("Recipes"))


@pytest.mark.parametrize("script, flags", [recipe for recipe in recipes() if recipe[1][0] != "@"])
def test_the_recipes_train(script, flags, tmp_path):
    small = "--device cpu --data images --size 16 --crop= --features 4 --max-features 16 --batch 4 --steps 2 --out"
    module = importlib.import_module(script)
    args = module.parse_arguments(shlex.split(flags))
    assert args.data in ("./teeth", "./art", "./mnist", "./sprites")
    module.main([*shlex.split(flags), *small.split(), str(tmp_path / "run")])
    assert (tmp_path / "run/checkpoint.pt").exists()


def test_two_scripts_read_their_flags_from_one_file():
    dcgan, wgan = (importlib.import_module(script).parse_arguments(shlex.split(flags))
                   for script, flags in recipes() if flags[0] == "@")
    assert (dcgan.data, dcgan.size, dcgan.holdout) == (wgan.data, wgan.size, wgan.holdout) == ("./art", "128", 0.2)
    assert (dcgan.batch, wgan.batch) == (128, 32)
