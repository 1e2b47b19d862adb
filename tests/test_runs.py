"""Tests of runs.py."""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import cli
import data
import gan
import plots
import runs
import runtime
import train_wgan
from conftest import GUIDE, HERE, TINY, checkpoint, draw, make_run, mistake, script, train
from runtime import UserError


@pytest.mark.parametrize("works", [True, False])
def test_what_a_graph_is_given_and_gives(monkeypatch, works):
    """`capture` on a make-believe card: while it records, operations are noted down and none of them is run."""
    recording, streams = [], []

    class Graph:
        def __init__(self):
            self.operations = []

        def replay(self):
            for operation in self.operations:
                operation()

    @contextlib.contextmanager
    def graph(it, capture_error_mode):
        if not works:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        recording.append(it.operations)
        yield
        recording.pop()

    class Stream:
        def wait_stream(self, other):
            streams.append(other)

    for name, stand_in in dict(CUDAGraph=Graph, graph=graph, Stream=Stream, current_stream=Stream,
                               stream=contextlib.nullcontext).items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    total, out = torch.zeros(2), torch.zeros(2)              # what a step changes in place, and what it returns

    def step(x, y):
        def operation():
            total.add_(x * y)
            out.copy_(total)
        recording[-1].append(operation) if recording else operation()
        return out

    run = object.__new__(runs.Run)
    run.graphs = True
    call, expected = run.capture(step), torch.zeros(2)
    for k in range(14 if works else 3):
        x, y = torch.randn(2), torch.randn(2)
        expected += x * y
        assert torch.equal(call(x, y), expected), k
    assert len(streams) == 2 * 3                             # to the side and back, three calls
    if not works:
        with pytest.raises(UserError, match="step cannot be recorded .operation not permitted.*: run without --graphs"):
            call(x, y)
    run.graphs = False
    assert run.capture(step) is step


def test_everything_of_a_run_folder_is_there(here, capsys):
    draw(here / "images")
    train("--steps", "7", "--constraint", "clip")
    out = capsys.readouterr().out
    run = here / "runs" / "wgan-images-1"
    assert sorted(str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()) == [
        "args.txt", "checkpoint.pt", "generators/step-0000004.pt", "generators/step-0000007.pt", "log.jsonl",
        "losses.png", "progress.gif", "real.png", "samples/step-0000003.png",
        "samples/step-0000006.png", "samples/step-0000007.png"]
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text("utf-8").splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6, 7]
    assert set(rows[0]) == {"step", "loss_D", "loss_G", "wasserstein", "images_per_sec", "seconds"}
    assert set(rows[1]) - set(rows[0]) == {"diversity_fake", "diversity_real"}        # with the samples of step 3
    for key in rows[1]:
        assert f"`{key}`" in GUIDE                                    # every logged number is explained
    assert out.count("images/s") == 5 and "--resume" in out
    assert all(w.abs().max() <= 0.01 for name, w in checkpoint(run)["state"]["D"].items() if "running" not in name
               and "num_batches" not in name)                        # clipped after the update
    G = gan.load_generator(run)
    shown = torch.randn(64, 5, generator=torch.Generator().manual_seed(3))
    expected = plots.grid(G(shown))
    last = Image.open(run / "samples" / "step-0000007.png")
    assert np.array_equal(np.asarray(expected.resize(last.size, Image.Resampling.NEAREST)), np.asarray(last))


@pytest.mark.parametrize("flags", ["--constraint lp --norm layer", "--norm instance --upsample nearest --channels 1",
                                   "--norm spectral --precision bf16 --fit squash", "--precision fp32 --batch 11",
                                   "--crop 0.1,0,0.9,1 --limit 5 --fit pad"])
def test_options_on_eight_odd_images(here, flags):
    draw(here / "images", 2)
    draw(here / "images" / "a", 2, (5, 40), "L", ".BMP")
    draw(here / "images" / "b", 2, (30, 9), "RGBA")
    draw(here / "images" / "c", 2, (2, 2), "P", ".gif")
    train("--steps", "2", "--out", "r", *flags.split())
    for row in map(json.loads, Path("r/log.jsonl").read_text("utf-8").splitlines()):
        assert row["loss_D"] == pytest.approx(-row["wasserstein"] + 10 * row["penalty"], abs=1e-3)
    assert gan.load_generator("r")(torch.randn(2, 5)).shape[2:] == (9, 12)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(here, number):
    draw(here / "images")
    process = script(*TINY, "--n-critic", "2", "--steps", "1000000", "--out", "r")
    for line in process.stdout:
        if line.startswith("step"):
            break
    process.send_signal(number)
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and "python train_wgan.py --resume r" in rest and "Traceback" not in rest
    done = checkpoint("r")["step"]
    assert done >= 2 and (here / "r" / "samples" / f"step-{done:07d}.png").exists()
    train_wgan.main(["--resume", "r", "--steps", str(done + 1)])
    assert checkpoint("r")["step"] == done + 1


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no terminals that hang up here")
@pytest.mark.parametrize("before, end", [("SIG_IGN", "done: 3 steps"),
                                         ("SIG_DFL", "stopped by SIGHUP after step 1 of 3")])
def test_a_closed_terminal_says_so_twice_and_nohup_is_heard(here, before, end):
    code = ("import cli, data, os, runs, signal\n"
            f"signal.signal(signal.SIGHUP, signal.{before})\n"
            "parser = cli.Parser('x.py', ''); data.add_arguments(parser); cli.add_arguments(parser)\n"
            "run = runs.Run(parser.parse_args(['--out', 'r', '--device', 'cpu', '--steps', '3']), 'x.py', 1)\n"
            "run.resume({})\n"
            "for step in run.steps():\n"
            "    os.kill(os.getpid(), signal.SIGHUP); print('still here', flush=True)\n"
            "    os.kill(os.getpid(), signal.SIGHUP); run.due(1)\n")
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                             env={**os.environ, "PYTHONPATH": str(HERE)})
    assert process.returncode == 0 and end in process.stdout, process.stdout + process.stderr


def test_a_reader_that_goes_away_costs_nothing(here):
    """Ctrl-C on `python train_wgan.py | tee log` ends the tee too: the run must still save."""
    draw(here / "images")
    process = script(*TINY, "--steps", "1000000", "--out", "r")
    for line in process.stdout:
        if line.startswith("step"):
            break
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) in (0, 120) and checkpoint("r")["step"] >= 1


def test_a_second_signal_is_obeyed_at_once(here):
    code = ("import cli, data, os, runs, signal, time\n"
            "parser = cli.Parser('x.py', ''); data.add_arguments(parser); cli.add_arguments(parser)\n"
            "run = runs.Run(parser.parse_args(['--out', 'r', '--device', 'cpu']), 'x.py', 1); run.resume({})\n"
            "for step in run.steps():\n"
            "    os.kill(os.getpid(), signal.SIGINT); print('still here', flush=True)\n"
            "    os.kill(os.getpid(), signal.SIGINT); time.sleep(30)\n")
    began = time.time()
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                             env={**os.environ, "PYTHONPATH": str(HERE)})
    assert process.returncode == -signal.SIGINT and "still here" in process.stdout and time.time() - began < 25


def test_everything_periodic_also_falls_on_the_last_step(here):
    run = make_run("--steps", "7", "--log-every", "1000")
    due = {every: [] for every in (0, 2, 1000)}
    for step in run.steps():
        run.log(value=torch.tensor(float(step)))
        for every, steps in due.items():
            steps += [step] if run.due(every) else []
    assert due == {0: [], 2: [2, 4, 6, 7], 1000: [7]}
    row, = runs.read_log(run.folder)
    assert row["value"] == 4.0 and row["step"] == 7                   # the mean of 1..7


def test_a_signal_late_in_a_step_still_gets_a_complete_last_step(here):
    run = make_run("--steps", "100", "--log-every", "1000")
    for step in run.steps():
        saved = run.due(1000)
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)                      # after this step's due() said no
    assert step == 4 and saved
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL         # put back


def test_what_is_not_finite_ends_the_run_and_keeps_the_checkpoint(here):
    run = make_run("--steps", "9", "--log-every", "5")
    with pytest.raises(SystemExit, match="loss stopped being finite"):
        for step in run.steps():
            run.log(loss=torch.tensor(math.nan if step == 3 else 1.0), other=1.0)
            if run.due(2):
                run.save({})
    assert checkpoint(run.folder)["step"] == 2


def test_weights_that_are_not_finite_are_never_saved(here):
    run, net = make_run("--steps", "2"), nn.Linear(1, 1)
    with pytest.raises(SystemExit, match="G stopped being finite"):
        for _ in run.steps():
            run.save({"G": net})
            net.weight.data.fill_(math.inf)
    assert checkpoint(run.folder)["step"] == 1


def test_a_garbled_log_is_read_past(here):
    (here / "log.jsonl").write_bytes(b'{"step": 1, "loss_D": 0.5}\n12\n{"loss_D": 1}\n\xff\xfe\0\n[1, 2]\n'
                                     b'{"step": "x"}\n{"step": 3, "lo\n{"step": 2, "loss_D": 0.25}\n')
    assert runs.read_log(here) == [{"step": 1, "loss_D": 0.5}, {"step": 2, "loss_D": 0.25}]


def test_a_file_is_never_half_written(here):
    run = make_run()
    run.write("a.txt", lambda path: path.write_text("whole"))

    def fail(path):
        path.write_text("ha")
        raise OSError("disk full")

    with pytest.raises(OSError):
        run.write("a.txt", fail)
    assert (run.folder / "a.txt").read_text("utf-8") == "whole"


def test_status_line_on_a_terminal_is_one_line(here, monkeypatch, capsys):
    run = make_run("--steps", "4", "--log-every", "1")
    capsys.readouterr()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    for _ in run.steps():
        run.log(value=1.0)
    shown = capsys.readouterr().out.split("done:")[0]
    assert shown.count("\r") == 4 and shown.count("\n") == 1 and "left" in shown
    assert len(runs.read_log(run.folder)) == 4


def test_the_log_has_means_and_rates_since_its_last_line(here, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    run = make_run("--steps", "4", "--log-every", "2")                # 10 images a step
    for step in run.steps():
        now[0] += step
        run.log(a=step, **({"b": step} if step % 2 else {}))          # b is the mean of the steps that have it
    rows = [{name: row[name] for name in ("step", "a", "b", "images_per_sec")} for row in runs.read_log(run.folder)]
    assert rows == [dict(step=2, a=1.5, b=1.0, images_per_sec=6.7), dict(step=4, a=3.5, b=3.0, images_per_sec=2.9)]
    assert [row["seconds"] for row in runs.read_log(run.folder)] == [3.0, 10.0]


def test_seconds_of_training_leave_pauses_out(here, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def train(*flags):
        run = make_run("--log-every", "1", *flags)
        for _ in run.steps():
            now[0] += 5
            run.log(a=1)
            now[0] += 1                                               # samples, a checkpoint
            if run.due(100):
                run.save({})
        now[0] += 1000
        return run.folder, [row.get("seconds") for row in runs.read_log(run.folder)]

    folder, seconds = train("--steps", "2")
    assert seconds == [5, 11]
    saved = runs.read_checkpoint(folder, mmap=False)
    assert saved["seconds"] == 12 and train("--resume", str(folder), "--steps", "4")[1] == [5, 11, 17, 23]
    del saved["seconds"]                                              # of the first edition
    torch.save(saved, folder / "checkpoint.pt")
    assert train("--resume", str(folder), "--steps", "3")[1] == [5, 11, 5]


def test_what_can_be_opened(at_runs, tmp_path):
    """step and label of a run folder, its checkpoint, generators in it and elsewhere."""
    def opened(path):
        trained = runs.open_trained(str(path))
        assert trained.label == f"{Path(path)}" + f", step {trained.step}" * (trained.step is not None)
        assert bool(trained.saved) == (trained.folder is not None)
        return trained.folder, trained.step

    run, there = Path("runs/a"), tmp_path / "runs"
    step4 = run / "generators/step-0000004.pt"
    best = torch.load(step4, weights_only=True)
    there.mkdir()
    for folder in (run / "generators", there):
        torch.save(best | dict(step=6), folder / "best.pt")
        torch.save(best, folder / "mine.pt")
        (folder / "broken.pt").write_text("x")
    shutil.copy(step4, there)
    shutil.copytree(run, there / "generators")
    found = {path: opened(path) for path in (run, run / "checkpoint.pt", step4, *(
        folder / name for folder in (run / "generators", there) for name in ("best.pt", "mine.pt", "broken.pt")),
        there / step4.name, there / "generators/checkpoint.pt")}
    for name in ("best.pt", "mine.pt", "broken.pt"):
        (run / "generators" / name).unlink()
    assert list(found.values()) == [(run, 8), (run, 8), (run, 4), (run, 6), (run, None), (run, None),
                                    (None, 6), (None, None), (None, None), (None, 4), (there / "generators", 8)]


def test_status_line_is_renewed_every_two_seconds(here, monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    run = make_run("--steps", "10", "--log-every", "1000")
    for _ in run.steps():
        now[0] += 1
        run.log(value=1.0)
    assert re.findall(r"\rstep (\d+)/", capsys.readouterr().out) == ["1", "4", "7", "10"]


@pytest.mark.skipif(sys.platform == "win32", reason="locks no folder")
def test_one_process_at_a_time_trains_in_a_folder(here, capsys, monkeypatch):
    import fcntl
    read = runs.read_checkpoint

    def read_when_held(folder, **more):
        with pytest.raises(BlockingIOError):
            fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
        return read(folder, **more)

    monkeypatch.setattr(runs, "read_checkpoint", read_when_held)      # by Run, after the command line's own reading
    draw(here / "images")
    train("--steps", "1", "--out", "r")
    held = os.open("r", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)                  # the run that is over holds it no more
    assert "another process is training in r" in mistake(capsys, lambda: train_wgan.main(
        ["--resume", "r", "--steps", "2"]))
    os.close(held)
    assert "has done 1 steps" in mistake(capsys, lambda: train_wgan.main(["--resume", "r"]))        # and holds nothing
    train_wgan.main(["--resume", "r", "--steps", "2"])
    run = make_run("--out", "q", "--steps", "3")
    held = os.open("q", os.O_RDONLY)
    for _ in run.steps():
        with pytest.raises(BlockingIOError):
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)                  # free, though `run` is still there
    run = make_run("--out", "p")
    with pytest.raises(FileNotFoundError):                            # so, too, after a failure before the loop
        run.write("real.png", lambda path: os.stat("nowhere"))
    fcntl.flock(os.open("p", os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_default_folders_never_collide(here):
    folders = [make_run("--data", "some/Teeth").folder for _ in range(3)]
    assert [str(folder) for folder in folders] == ["runs/x-Teeth-1", "runs/x-Teeth-2", "runs/x-Teeth-3"]
    parser = cli.Parser("x.py", "")
    data.add_arguments(parser)
    cli.add_arguments(parser)
    at_once = [runs.Run(parser.parse_args(["--device", "cpu"]), "x.py", 1) for _ in range(2)]
    for run in at_once:
        run.resume({})
    assert [str(run.folder) for run in at_once] == ["runs/x-demo-1", "runs/x-demo-2"]


def test_the_newest_run_of_a_kind_is_found(here, capsys):
    with pytest.raises(UserError, match="there is no run of train_wgan.py in runs/ yet"):
        runs.newest_run(["train_wgan.py"])
    for k, kind in enumerate(["train_wgan.py", "train_wgan.py", "train_dcgan.py", "train_dcgan.py"]):
        (here / f"runs/{k}").mkdir(parents=True)
        torch.save(dict(flags={}, script=kind, step=1, state={}), here / f"runs/{k}/checkpoint.pt")
        os.utime(here / f"runs/{k}/checkpoint.pt", (1e9 + k, 1e9 + k))
    (here / "runs/3/checkpoint.pt").write_bytes(b"broken")
    os.utime(here / "runs/3/checkpoint.pt", (2e9, 2e9))
    assert runs.newest_run(["train_wgan.py"]) == Path("runs/1")
    assert runs.newest_run(["train_wgan.py", "train_dcgan.py"]) == Path("runs/2") == runs.newest_run()


def test_one_process_loads_first(monkeypatch):
    """Under torchrun the others wait for the first before what is within, and the first tells them after it."""
    order = []
    monkeypatch.setattr(torch.distributed, "barrier", lambda: order.append("barrier"))
    for rank, world_size, expected in ((0, 1, ["load"]), (0, 2, ["load", "barrier"]), (1, 2, ["barrier", "load"])):
        monkeypatch.setattr(runtime, "rank_and_world_size", lambda r=rank, w=world_size: (r, w))
        order.clear()
        with runtime.rank0_first():
            order.append("load")
        assert order == expected


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no terminals that hang up here")
def test_a_terminal_closed_after_ctrl_c_kills_nothing(here):
    run = make_run("--steps", "9")
    done = []
    for step in run.steps():
        done.append(step)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGHUP)
        run.due(1)
    assert done == [1]


def test_a_run_folder_in_a_place_that_cannot_be_made(here):
    (here / "link").symlink_to("nowhere")
    with pytest.raises(OSError):                                      # and no endless loop
        make_run("--out", "link/x")


def test_the_epoch_stands_in_the_status_line(here, capsys):
    run = make_run("--steps", "6", "--log-every", "3")                     # 10 images a step
    run.same = {"images": [40, 3, 8, 8, 0]}
    for _ in run.steps():
        run.log(value=1.0)
    out = capsys.readouterr().out
    assert "step 3/6, epoch 0.8 |" in out and "step 6/6, epoch 1.5 |" in out
