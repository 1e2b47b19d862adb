"""Tests of runtime.py."""

import argparse
import contextlib
import json
import math
import os
import re
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

import data
import gan
import plots
import runtime
import train_wgan
from conftest import HERE, README, SCRIPTS, TINY, checkpoint, draw, make_run, mistake, same, script, train


def torchrun(ranks, *command):
    """The output of a command run by so many processes of torchrun."""
    process = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                              str(ranks), *map(str, command)], capture_output=True, text=True, timeout=300,
                             env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)})
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


def test_two_processes_are_one_with_twice_the_batch(here):
    draw(here / "pictures", 9)
    (here / "step.py").write_text("""
import sys, torch, data, gan, runtime
torch.manual_seed(0)
D, x = gan.Discriminator((8, 8), 3, 4).double(), torch.randn(8, 3, 8, 8, dtype=torch.float64)
(r, n), opt = runtime.rank_and_world_size(), torch.optim.SGD(D.parameters(), 0.1)
if n > 1:
    runtime.init_distributed(torch.device("cpu"))
    opt.register_step_pre_hook(runtime.average_gradients)
part = x.chunk(n)[r]
slope = gan.input_gradient(D, part.requires_grad_()).flatten(1).norm(dim=1)      # the penalty, with no random numbers
(D(part).mean() + 10 * (slope - 1).square().mean()).backward()
opt.step()
pictures = data.load("pictures", (8, 8)).images
batches = data.batches(pictures, 4 // n, 1, 2, share=(r, n))
torch.save(([w for w in D.state_dict().values()], [next(batches) for _ in range(5)]), f"{n}-{r}.pt")
""")
    torchrun(1, "step.py"), torchrun(2, "step.py")
    (one, whole), (first, left), (second, right) = (torch.load(f"{name}.pt", weights_only=True)
                                                    for name in ("1-0", "2-0", "2-1"))
    assert same(first, second) and all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(one, first))
    assert all(torch.equal(a, torch.cat([b, c])) for a, b, c in zip(whole, left, right))


def test_training_by_two_processes(here):
    draw(here / "pictures", 9)
    said = torchrun(2, HERE / "train_wgan.py", *TINY, "--n-critic", 2, "--steps", 4, "--out", "runs/a")
    assert "2 processes" in said and said.count("done: 4 steps") == 1
    assert os.listdir("runs") == ["a"] or sorted(os.listdir("runs")) == [".cache", "a"]
    assert [row["step"] for row in map(json.loads, (here / "runs/a/log.jsonl").read_text().splitlines())] == [2, 4]
    said = torchrun(2, HERE / "train_wgan.py", "--resume", "runs/a", "--steps", 6)
    assert "going on after step 4" in said and checkpoint("runs/a")["step"] == 6
    train("--resume", "runs/a", "--steps", "7", "--device", "cpu")                    # and by one alone
    assert checkpoint("runs/a")["step"] == 7


def test_processes_draw_latents_of_their_own_and_train_the_same_network(here):
    draw(here / "pictures", 9)
    (here / "spy.py").write_text("""
import sys, torch, gan, runtime, train_dcgan
decisions, drawn, forward = [], [], gan.Generator.forward
gan.Generator.forward = lambda self, z: (drawn.append(z) if self.training else None, forward(self, z))[1]
for name in ("mode", "trains_D"):
    def spy(self, *loss, ask=getattr(train_dcgan.Schedule, name)):
        decisions.append(ask(self, *loss))
        return decisions[-1]
    setattr(train_dcgan.Schedule, name, spy)
for flags in ("--schedule boost --boost-d 0.3 --boost-g 0.3 --boost-length 2 --label-noise 0.4",
              "--schedule monitored --monitor-ratio 2"):
    train_dcgan.main([*sys.argv[1:], *flags.split()])
torch.save((decisions, drawn), f"{runtime.rank_and_world_size()[0]}.pt")
""")
    torchrun(2, "spy.py", *TINY, "--sample-every", 100, "--augment", "", "--steps", 15)
    (one, drawn), (other, more) = (torch.load(f"{k}.pt", weights_only=True) for k in (0, 1))
    assert one == other and {"both", "D", "G", True, False} == set(one)
    assert len(drawn) == len(more) > 20 and len({z.numpy().tobytes() for z in drawn + more}) == 2 * len(drawn)


def test_graphs_are_left_where_there_is_no_card(here, capsys):
    draw(here / "pictures", 8)
    if not torch.cuda.is_available():
        train("--steps", "2", "--out", "a", "--graphs")
        shown = capsys.readouterr().out
        for name in ("critic_step", "generator_step"):
            assert f"--graphs: {name} runs one operation at a time, because there is no NVIDIA card here" in shown
        train("--steps", "2", "--out", "b")
        a, b = (checkpoint(name)["state"] for name in "ab")
        assert same(a, b)


@pytest.mark.parametrize("works", [True, False])
def test_what_a_graph_is_given_and_gives(monkeypatch, capsys, works):
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

    def step(x, y, sign=1):
        def operation():
            total.add_(sign * x * y)
            out.copy_(total)
        recording[-1].append(operation) if recording else operation()
        return out

    run = object.__new__(runtime.Run)
    run.args, run.device, run.world_size = argparse.Namespace(graphs=True), torch.device("cuda"), 1
    call, expected = run.capture(step), torch.zeros(2)
    for k in range(14):
        x, y, sign = torch.randn(2), torch.randn(2), 1 if k % 3 else -1
        expected += sign * x * y
        assert torch.equal(call(x, y, sign=sign), expected), k
    assert len(streams) == 2 * 3 * 2                         # to the side and back, three calls, for each sign
    said = "--graphs: step runs one operation at a time, because recording failed: operation not permitted when stream"
    assert capsys.readouterr().out.count(said) == (0 if works else 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA card")
@pytest.mark.parametrize("script", SCRIPTS)
def test_graphs_compute_what_the_loop_does(here, script):
    draw(here / "pictures", 40)
    flags = ["--device", "cuda", "--precision", "fp32", "--steps", "200", "--log-every", "10"]
    train(*flags, "--out", "eager", script=script)
    train(*flags, "--out", "graphs", "--graphs", script=script)
    rows = [[json.loads(line) for line in (here / name / "log.jsonl").read_text().splitlines()]
            for name in ("eager", "graphs")]
    for one, other in zip(*rows):
        assert abs(one["loss_D"] - other["loss_D"]) < 0.02 * (1 + abs(one["loss_D"])), one["step"]


def test_profile(here, capsys):
    draw(here / "pictures", 8)
    train("--steps", "6", "--out", "a", "--profile")
    shown = capsys.readouterr().out
    assert "steps 3 to 5" in shown and shown.count("aten::") >= 5 and "Self CPU" in shown
    events = json.loads((here / "a" / "profile.json").read_text())["traceEvents"]
    steps = {event["name"] for event in events if event["name"].startswith("ProfilerStep")}
    assert steps == {f"ProfilerStep#{k}" for k in (2, 3, 4)}          # counted from 0
    train("--steps", "4", "--out", "b", "--profile")                  # too few steps: what there was of them
    assert (here / "b" / "profile.json").exists() and "steps 3 to 4" in capsys.readouterr().out
    train("--steps", "2", "--out", "c", "--profile")
    assert "this start had 2" in capsys.readouterr().out and not (here / "c" / "profile.json").exists()


def test_everything_of_a_run_folder_is_there(here, capsys):
    draw(here / "pictures")
    train("--steps", "7", "--constraint", "clip")
    out = capsys.readouterr().out
    run = here / "runs" / "wgan-pictures-1"
    assert sorted(str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()) == [
        "args.txt", "checkpoint.pt", "generators/step-0000004.pt", "generators/step-0000007.pt", "log.jsonl",
        "losses.png", "progress.gif", "real.png", "samples/step-0000003.png",
        "samples/step-0000006.png", "samples/step-0000007.png"]
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text("utf-8").splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6, 7]
    assert set(rows[0]) == {"step", "loss_D", "loss_G", "wasserstein", "penalty", "images_per_sec", "time"}
    assert set(rows[1]) - set(rows[0]) == {"spread_fake", "spread_real"}              # with the sheet of step 3
    for key in rows[1]:
        assert f"`{key}`" in README                                   # every logged number is explained
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
def test_options_on_eight_odd_pictures(here, flags):
    draw(here / "pictures", 2)
    draw(here / "pictures" / "a", 2, (5, 40), "L", ".BMP")
    draw(here / "pictures" / "b", 2, (30, 9), "RGBA")
    draw(here / "pictures" / "c", 2, (2, 2), "P", ".gif")
    train("--steps", "2", "--out", "r", *flags.split())
    for row in map(json.loads, Path("r/log.jsonl").read_text("utf-8").splitlines()):
        assert row["loss_D"] == pytest.approx(-row["wasserstein"] + 10 * row["penalty"], abs=1e-3)
    assert gan.load_generator("r")(torch.randn(2, 5)).shape[2:] == (9, 12)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(here, number):
    draw(here / "pictures")
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
    code = ("import data, os, signal, runtime\n"
            f"signal.signal(signal.SIGHUP, signal.{before})\n"
            "parser = runtime.Parser('x.py', ''); data.add_arguments(parser); runtime.add_arguments(parser)\n"
            "run = runtime.Run(parser.parse_args(['--out', 'r', '--device', 'cpu', '--steps', '3']), 'x.py', 1)\n"
            "run.resume({})\n"
            "for step in run.steps():\n"
            "    os.kill(os.getpid(), signal.SIGHUP); print('still here', flush=True)\n"
            "    os.kill(os.getpid(), signal.SIGHUP); run.due(1)\n")
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                             env={**os.environ, "PYTHONPATH": str(HERE)})
    assert process.returncode == 0 and end in process.stdout, process.stdout + process.stderr


def test_a_reader_that_goes_away_costs_nothing(here):
    """Ctrl-C on `python train_wgan.py | tee log` ends the tee too: the run must still save."""
    draw(here / "pictures")
    process = script(*TINY, "--steps", "1000000", "--out", "r")
    for line in process.stdout:
        if line.startswith("step"):
            break
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) in (0, 120) and checkpoint("r")["step"] >= 1


def test_a_second_signal_is_obeyed_at_once(here):
    code = ("import data, os, signal, time, runtime\n"
            "parser = runtime.Parser('x.py', ''); data.add_arguments(parser); runtime.add_arguments(parser)\n"
            "run = runtime.Run(parser.parse_args(['--out', 'r', '--device', 'cpu']), 'x.py', 1); run.resume({})\n"
            "for step in run.steps():\n"
            "    os.kill(os.getpid(), signal.SIGINT); print('still here', flush=True)\n"
            "    os.kill(os.getpid(), signal.SIGINT); time.sleep(30)\n")
    began = time.time()
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                             env={**os.environ, "PYTHONPATH": str(HERE)})
    assert process.returncode == -signal.SIGINT and "still here" in process.stdout and time.time() - began < 25


def test_everything_periodic_also_falls_on_the_last_step(here):
    run = make_run("--steps", "7", "--log-every", "1000")
    due = {every: [] for every in (2, 1000)}
    for step in run.steps():
        run.log(value=torch.tensor(float(step)))
        for every, steps in due.items():
            steps += [step] if run.due(every) else []
    assert due == {2: [2, 4, 6, 7], 1000: [7]}
    row, = run.history()
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


def test_names_that_a_terminal_cannot_show(here):
    draw(here / "牙", 3)
    (here / "牙" / "é牙.jpg").write_bytes(b"broken")
    process = subprocess.run([sys.executable, HERE / "train_wgan.py", *TINY, "--data", "牙", "--steps", "1"],
                             capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert process.returncode == 0 and "\\u7259" in process.stdout and "--data '牙'" in next(
        (here / "runs").glob("*/args.txt")).read_text("utf-8")


def test_a_save_before_the_first_sheet(here):
    draw(here / "pictures")
    train("--steps", "5", "--save-every", "2", "--sample-every", "4", "--out", "r")
    assert len(list((here / "r" / "generators").iterdir())) == 3 and (here / "r" / "progress.gif").exists()


def test_a_full_disk_is_one_sentence(capsys):
    def main():
        raise OSError(28, "No space left on device")

    assert "what was saved before is whole" in mistake(capsys, lambda: runtime.run_main(main, "train_wgan.py"))
    with pytest.raises(RuntimeError):                                 # a real defect keeps its traceback
        runtime.run_main(lambda: torch.zeros(2) @ torch.zeros(3), "train_wgan.py")


def test_torchs_word_for_a_full_disk_is_one_sentence(here, capsys):
    resource = pytest.importorskip("resource")
    runtime.write_atomically("checkpoint.pt", lambda path: torch.save(torch.zeros(9), path))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))    # as if no more would fit
    try:
        text = mistake(capsys, lambda: runtime.run_main(lambda: runtime.write_atomically(
            "checkpoint.pt", lambda path: torch.save(torch.zeros(99_999), path)), "train_wgan.py"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "checkpoint.pt cannot be written: is the disk full" in text and "what was saved before is whole" in text
    assert os.listdir(here) == ["checkpoint.pt"] and len(torch.load("checkpoint.pt", weights_only=True)) == 9


def test_a_garbled_log_is_read_past(here):
    (here / "log.jsonl").write_bytes(b'{"step": 1, "loss_D": 0.5}\n12\n{"loss_D": 1}\n\xff\xfe\0\n[1, 2]\n'
                                     b'{"step": "x"}\n{"step": 3, "lo\n{"step": 2, "loss_D": 0.25}\n')
    assert runtime.read_log(here) == [{"step": 1, "loss_D": 0.5}, {"step": 2, "loss_D": 0.25}]


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
    assert len(run.history()) == 4


def test_the_log_has_means_and_rates_since_its_last_line(here, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    run = make_run("--steps", "4", "--log-every", "2")                # 10 pictures a step
    for step in run.steps():
        now[0] += step
        run.log(a=step, **({"b": step} if step % 2 else {}))          # b is the mean of the steps that have it
    rows = [{name: row[name] for name in ("step", "a", "b", "images_per_sec")} for row in run.history()]
    assert rows == [dict(step=2, a=1.5, b=1.0, images_per_sec=6.7), dict(step=4, a=3.5, b=3.0, images_per_sec=2.9)]


def test_status_line_is_renewed_every_two_seconds(here, monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    run = make_run("--steps", "10", "--log-every", "1000")
    for _ in run.steps():
        now[0] += 1
        run.log(value=1.0)
    assert re.findall(r"\rstep (\d+)/", capsys.readouterr().out) == ["1", "4", "7", "10"]


def test_default_folders_never_collide(here):
    folders = [make_run("--data", "some/Teeth").folder for _ in range(3)]
    assert [str(folder) for folder in folders] == ["runs/x-Teeth-1", "runs/x-Teeth-2", "runs/x-Teeth-3"]
    parser = runtime.Parser("x.py", "")
    data.add_arguments(parser)
    runtime.add_arguments(parser)
    at_once = [runtime.Run(parser.parse_args(["--device", "cpu"]), "x.py", 1) for _ in range(2)]
    for run in at_once:
        run.resume({})
    assert [str(run.folder) for run in at_once] == ["runs/x-demo-1", "runs/x-demo-2"]


def test_precision_and_device_choices(here):
    assert make_run("--precision", "fp32").precision == "fp32"
    run = make_run("--precision", "bf16")
    with run.amp:
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="--device nonsense cannot be used here"):
        make_run("--device", "nonsense")


@pytest.mark.parametrize("flags, has", [("fpu avx512_bf16 avx2", True), ("amx_bf16", True), ("avx512f avx2", False)])
def test_bf16_is_found_without_torchs_word(monkeypatch, flags, has):
    """torch 2.4 does not say whether the processor has it; the system does."""
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    monkeypatch.setattr(Path, "exists", lambda self: True)
    monkeypatch.setattr(Path, "read_text", lambda self: f"flags : {flags}\n")
    assert runtime.has_bf16(torch.device("cpu")) is has and not runtime.has_bf16(torch.device("mps"))


@pytest.mark.parametrize("flags, words", [
    ("--clip -1", "number from 1e-09"), ("--ema nan", "number from 0 to under 1"), ("--lam -1", "number from 0"),
    ("--seed -1", "whole number from 0"), ("--resume text.txt", "is a file: give the run folder"),
    ("--resume hollow", "is damaged"), ("@quote.txt", "cannot be read"), ("--device meta", "take auto"),
    ("--data nowhere", "there is no such folder"), ("--data empty", "no pictures in this folder"),
    ("--data broken", "0 of 2 pictures can be used"), ("--data one", "1 of 1 pictures can be used and at least 2"),
    ("--data pictures/000.png", "give the folder"), ("--size 3", "the nearest size that works is 8x8"),
    ("--size 5000", "the nearest size that works is 1024x1024"), ("--size big", "write one number"),
    ("--stpes 5", "did you mean --steps?"), ("--batch 0", "'0' is no whole number from 1"),
    ("--constraint gq", "invalid choice"),
    ("one", "did you mean --data one?"), ("--resume begun", "begin again with its training script and @begun"),
    ("--evaluate-every 5 --evaluate-features it", "--evaluate-features it: take inception"),
    ("--out taken", "exists already"), ("--norm batch", "does not go with a gradient penalty"),
    ("--augment colour", "not 'colour'"), ("--crop 5", "write LEFT,TOP,RIGHT"),
    ("--holdout 1", "a share from 0"), ("--range 5", "write LOW,HIGH"),
    ("--background mud", "write a colour"), ("--group (", "no regular expression"), ("--group q+", "matches no name"),
    ("--crop 99x99", "smaller than the crop window"), ("--device cuda:77", "cannot be used here"),
    ("--resume nowhere", "there is no such run folder"), ("--resume taken", "there is no checkpoint.pt in it"),
    ("--resume garbage", "is damaged"), ("@nofile.txt", "nofile.txt"), ("--tensorboard", "pip install tensorboard")])
def test_one_sentence_and_exit_status_2(here, capsys, monkeypatch, flags, words):
    draw(here / "pictures")
    draw(here / "one", 1)
    for name in ("empty", "taken", "broken", "garbage", "hollow", "begun"):
        (here / name).mkdir()
    (here / "begun" / "args.txt").touch()
    (here / "text.txt").write_text("words")
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


def test_the_newest_run_of_a_kind_is_found(here, capsys):
    with pytest.raises(FileNotFoundError, match="there is no run of train_wgan.py in runs/ yet"):
        runtime.find_run("", ["train_wgan.py"])
    for k, kind in enumerate(["train_wgan.py", "train_wgan.py", "train_dcgan.py", "train_dcgan.py"]):
        (here / f"runs/{k}").mkdir(parents=True)
        torch.save(dict(flags={}, script=kind, step=1, state={}), here / f"runs/{k}/checkpoint.pt")
        os.utime(here / f"runs/{k}/checkpoint.pt", (1e9 + k, 1e9 + k))
    (here / "runs/3/checkpoint.pt").write_bytes(b"broken")
    os.utime(here / "runs/3/checkpoint.pt", (2e9, 2e9))
    assert runtime.find_run("", ["train_wgan.py"]) == Path("runs/1")
    assert runtime.find_run("", ["train_wgan.py", "train_dcgan.py"]) == Path("runs/2") == runtime.find_run("runs/2")
    with pytest.raises(ValueError, match="runs/2 is a run of train_dcgan.py: give one of train_wgan.py"):
        runtime.find_run("runs/2", ["train_wgan.py"])
    with pytest.raises(FileNotFoundError, match="no such run folder"):
        runtime.find_run("runs/7")


def test_what_the_system_says_names_the_place(here, capsys):
    error = OSError(30, "Read-only file system", "runs")

    def fail():
        with runtime.exit_on_user_error("x.py"):
            raise error

    assert mistake(capsys, fail) == f"x.py: error: {here / 'runs'}: Read-only file system\n"
    assert runtime.describe_error(OSError("said by us")) == "said by us" and runtime.describe_error(ValueError("a")) == "a"


def test_mistakes_when_going_on(here, capsys):
    draw(here / "pictures")
    train("--steps", "2", "--out", "r")
    capsys.readouterr()
    raw = (here / "r" / "checkpoint.pt").read_bytes()

    def resume(*flags):
        return mistake(capsys, lambda: train_wgan.main(["--resume", "r", *flags]))

    assert "has done 2 steps" in resume()
    assert "--size is '9x12' in r and cannot become '64'" in resume("--steps", "4", "--size", "64")
    assert "--lam is" in resume("--steps", "4", "--lam", "1") and "--out is" in resume("--steps", "4", "--out", "s")
    draw(here / "others", 9)
    assert "other pictures" in resume("--steps", "4", "--data", "others")
    saved = checkpoint("r")
    torch.save({**saved, "script": "train_dcgan.py"}, "r/checkpoint.pt")
    assert "is a run of train_dcgan.py" in resume("--steps", "4")
    torch.save({**saved, "flags": {**saved["flags"], "features": 8}}, "r/checkpoint.pt")
    assert "does not fit what its flags build" in resume("--steps", "4")
    (here / "r" / "checkpoint.pt").write_bytes(raw)
    (here / "pictures").rename(here / "moved")
    train_wgan.main(["--resume", "r", "--steps", "3", "--data", "moved"])              # the same pictures elsewhere
    assert checkpoint("r")["step"] == 3


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
def test_memory_is_kept_for_the_next_tensor():
    code = ("import resource, sys, torch, runtime\n"
            "if sys.argv[1] == 'kept': runtime.keep_memory()\n"
            "for k in range(21):\n"
            "    torch.zeros(2**24)\n"                                     # 64 MB: over all that glibc would keep
            "    if k == 0: before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)")
    faults = [int(subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True, check=True,
                                 env={**os.environ, "PYTHONPATH": str(HERE)}).stdout) for how in ("kept", "given back")]
    assert faults[0] < faults[1] / 2, faults
