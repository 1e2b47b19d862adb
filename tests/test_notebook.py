"""Tests of notebook.ipynb, and what writes it: `python tests/test_notebook.py`."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

HERE = Path(__file__).resolve().parents[1]
NOTEBOOK = HERE / "notebook.ipynb"

# The cells that hold functions of ours: which, of what file, in the order in which they stand in the cell.
CUT = {
    "drawing": [("sources", "SUFFIXES"), ("data", "to_float"), ("plots", "to_uint8 grid save_grid"),
                ("sources", "draw_demo")],
    "networks": [("gan", "MIN_SIDE grid_sizes channel_widths init_weights upsample_layer Generator norm_layer "
                         "downsample_layers MinibatchDiscrimination Discriminator")],
    "losses": [("gan", "critic_loss generator_loss input_gradient gradient_penalty update_ema save_generator")],
}


def cut(module, names):
    """The source of a module's top-level functions, classes and constants, to the letter, in the order of `names`."""
    lines, found = (HERE / f"{module}.py").read_text("utf-8").splitlines(), {}
    for node in ast.parse("\n".join(lines)).body:
        first = min([node.lineno, *(line.lineno for line in getattr(node, "decorator_list", []))])
        targets = [n.id for t in getattr(node, "targets", []) for n in ast.walk(t) if isinstance(n, ast.Name)]
        for name in [getattr(node, "name", None), *targets]:
            found[name] = "\n".join(lines[first - 1:node.end_lineno])
    return [found[name] for name in names.split()]


def build():
    """The JSON of notebook.ipynb: prose, settings and loop as they stand there, the cells of `CUT` cut out of the files
    anew; without outputs, so that it may be edited and run in Jupyter."""
    notebook = json.loads(NOTEBOOK.read_text("utf-8"))
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        if cell["id"] in CUT:
            text = "\n\n\n".join(part for module, names in CUT[cell["id"]] for part in cut(module, names))
        cell.update(source=text.splitlines(keepends=True), metadata={})
        if cell["cell_type"] == "code":
            cell.update(outputs=[], execution_count=None)
    notebook["metadata"] = dict(kernelspec=dict(display_name="Python 3", language="python", name="python3"),
                                language_info=dict(name="python"))
    return json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def test_the_notebook_is_cut_from_the_sources():
    assert NOTEBOOK.read_text("utf-8") == build(), "python tests/test_notebook.py writes it anew"
    assert CUT.keys() <= {cell["id"] for cell in json.loads(build())["cells"]}


EXECUTE = """
import json, sys
sys.modules.update(dict.fromkeys(["matplotlib", "IPython", "gan", "data", "plots", "sources"]))    # none of these
cells = {}
for cell in json.load(sys.stdin):
    exec(cell, cells)
G_ema, z = cells["G_ema"], cells["torch"].randn(3, cells["latent"], device=cells["device"])
assert G_ema(z).shape == (3, cells["channels"], 32, 32) and G_ema(z).isfinite().all()
"""
SHORT = dict(steps=4, features=4, batch=8, n_demo=32, sample_every=2)


@pytest.mark.parametrize("folder", ["", "images"])
def test_the_notebook_runs_by_itself(folder, tmp_path):
    if folder:
        (tmp_path / folder / "deeper").mkdir(parents=True)
        Image.new("RGB", (50, 40), "red").save(tmp_path / folder / "deeper/red.JPG", "jpeg")
        Image.fromarray(np.arange(900, dtype=np.uint8).reshape(30, 30)).save(tmp_path / folder / "grey.png")
        (tmp_path / folder / "broken.png").write_bytes(b"no image")
    cells = {cell["id"]: "".join(cell["source"]) for cell in json.loads(build())["cells"] if "outputs" in cell}
    for name, value in (SHORT | dict(FOLDER=repr(folder))).items():
        cells["settings"], n = re.subn(rf"(?m)^{name} = \S+", f"{name} = {value}", cells["settings"])
        assert n == 1
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    process = subprocess.run([sys.executable, "-c", EXECUTE], cwd=tmp_path, env=environment, text=True,
                             input=json.dumps(list(cells.values())), capture_output=True)
    assert process.returncode == 0, process.stderr
    assert f"{2 if folder else 32} images" in process.stdout and ("skipped" in process.stdout) == bool(folder)
    for name in ("real.png", "samples.png", "samples/step-0000002.png", "samples/step-0000004.png"):
        with Image.open(tmp_path / name) as im:
            assert im.mode == ("RGB" if folder else "L") and len(np.unique(im)) > 2
    assert len(list(tmp_path.glob("samples/00*.png"))) == 16 and (tmp_path / "generator.pt").exists()


if __name__ == "__main__":
    NOTEBOOK.write_text(build(), "utf-8", newline="\n")
