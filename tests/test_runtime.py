"""Tests of runtime.py."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch
from torch import nn

import gan
import runs
import runtime
from conftest import HERE, TINY, checkpoint, draw, make_run, mistake, same, train


def torchrun(ranks, *command):
    """The output of a command run by so many processes of torchrun."""
    process = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                              str(ranks), *map(str, command)], capture_output=True, text=True, timeout=300,
                             env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)})
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


def test_two_processes_are_one_with_twice_the_batch(here):
    draw(here / "images", 9)
    (here / "step.py").write_text("""
import sys, time, torch, data, gan, runtime
torch.manual_seed(0)
D, x = gan.Discriminator((8, 8), 3, 4).double(), torch.randn(8, 3, 8, 8, dtype=torch.float64)
(r, n), opt = runtime.rank_and_world_size(), torch.optim.SGD(D.parameters(), 0.1)
if n > 1:
    torch.distributed.init_process_group("gloo")
    opt.register_step_pre_hook(runtime.average_gradients)
part = x.chunk(n)[r]
norm = gan.input_gradient(D, part.requires_grad_()).flatten(1).norm(dim=1)      # the penalty, with no random numbers
(D(part).mean() + 10 * (norm - 1).square().mean()).backward()
opt.step()
images = data.load("images", (8, 8)).images
batches = data.batches(images, 4 // n, 1, 2, share=(r, n))
torch.save(([w for w in D.state_dict().values()], [next(batches) for _ in range(5)]), f"{n}-{r}.pt")
if n > 1:
    time.sleep(0.2)                                                             # torch 2.4 aborts without, now and then
    torch.distributed.destroy_process_group()
""")
    torchrun(1, "step.py"), torchrun(2, "step.py")
    (one, whole), (first, left), (second, right) = (torch.load(f"{name}.pt", weights_only=True)
                                                    for name in ("1-0", "2-0", "2-1"))
    assert same(first, second) and all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(one, first))
    assert all(torch.equal(a, torch.cat([b, c])) for a, b, c in zip(whole, left, right))


@pytest.mark.slow
@pytest.mark.parametrize("command, batchnorm", [
    ("train_wgan --n-critic 2", False), ("train_wgan --constraint clip --lr 1e-3", False), ("train_dcgan", False),
    ("train_dcgan --loss relativistic", False), ("train_pix2pix --task colorize --dropout 0 --jitter 1", False),
    ("train_wgan --n-critic 2", True), ("train_dcgan", True)])
def test_whole_runs_of_two_processes_are_those_of_one_with_twice_the_batch(here, command, batchnorm):
    """In float64, the same latents shared out. BatchNorm's statistics are those of each process: another run."""
    draw(here / "images", 9)
    (here / "ranks.py").write_text(f"""
import importlib, sys, torch, runtime
torch.set_default_dtype(torch.float64)
torch.Tensor.float = torch.Tensor.double
r, n = runtime.rank_and_world_size()
shared = torch.Generator().manual_seed(1)
def shared_out(draw):
    def drawn(*shape, generator=None, device=None):
        if generator is not None:
            return draw(*shape, generator=generator)
        return draw(n * shape[0], *shape[1:], generator=shared).chunk(n)[r]
    return drawn
torch.randn, torch.rand = shared_out(torch.randn), shared_out(torch.rand)
if not {batchnorm}:
    torch.nn.BatchNorm2d.forward = lambda self, x: torch.nn.functional.batch_norm(
        x, self.running_mean, self.running_var, self.weight, self.bias)
importlib.import_module(sys.argv[1]).main(sys.argv[2:])
""")
    module, *flags = command.split()
    flags += ["--data", "images", "--device", "cpu", "--precision", "fp32", "--size", "9x12", "--features", "4",
              "--holdout", "0.2", "--steps", "6"]
    for ranks, batch in ((1, 8), (2, 4)):
        torchrun(ranks, "ranks.py", module, *flags, "--batch", batch, "--out", f"runs/{ranks}")
    one, two = (checkpoint(f"runs/{ranks}")["state"] for ranks in (1, 2))
    far = max((a - two[net][name]).abs().max().item() for net in ("G", "D", "G_ema") for name, a in one[net].items())
    print(f"{command}{', BatchNorm of each process' * batchnorm}: {far:.2e}")
    assert all(w.dtype in (torch.float64, torch.int64) for w in one["G"].values())
    assert far > 1e-5 if batchnorm else far < 1e-6


def test_training_by_two_processes(here, capsys):
    draw(here / "images", 9)
    said = torchrun(2, HERE / "train_wgan.py", *TINY, "--n-critic", 2, "--steps", 4, "--out", "runs/a")
    assert "2 processes" in said and said.count("done: 4 steps") == 1
    assert os.listdir("runs") == ["a"] or sorted(os.listdir("runs")) == [".cache", "a"]
    assert [row["step"] for row in map(json.loads, (here / "runs/a/log.jsonl").read_text().splitlines())] == [2, 4]
    said = torchrun(2, HERE / "train_wgan.py", "--resume", "runs/a", "--steps", 6)
    assert "going on after step 4" in said and checkpoint("runs/a")["step"] == 6
    train("--resume", "runs/a", "--steps", "7", "--device", "cpu")                    # and by one alone
    assert "was trained by 2 processes, now by 1: a step sees 0.5 times the images" in capsys.readouterr().out
    assert checkpoint("runs/a")["step"] == 7


@pytest.mark.slow
def test_two_processes_go_on_exactly(here):
    draw(here / "images", 9)
    for flags in ([*TINY, "--steps", 4, "--out", "parts"], ["--steps", 6, "--resume", "parts"],
                  [*TINY, "--steps", 6, "--out", "whole"]):
        torchrun(2, HERE / "train_wgan.py", *flags)
    assert all(same(checkpoint("parts")[key], checkpoint("whole")[key]) for key in ("state", "random"))


@pytest.mark.slow
@pytest.mark.parametrize("fate", ["rank 0 is killed", "rank 1 is killed", "rank 1 is asked to stop"])
def test_what_happens_to_one_process_ends_the_others(here, fate):
    """Killed: the other ends with a sentence. Asked to stop: both stop after the same step and save."""
    draw(here / "images", 9)
    (here / "rank.py").write_text("import os, runtime, train_wgan\n"
                                  "open(f'{runtime.rank_and_world_size()[0]}.pid', 'w').write(str(os.getpid()))\n"
                                  "train_wgan.main()\n")
    process = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                                "rank.py", *TINY, "--steps", "100000", "--out", "run"], stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)})
    while not Path("run/checkpoint.pt").exists():
        time.sleep(0.1)
    os.kill(int(Path(f"{fate[5]}.pid").read_text()), signal.SIGKILL if "killed" in fate else signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    step = checkpoint("run")["step"]
    if "killed" in fate:
        assert process.returncode != 0 and "error: another process of this run has ended" in said
        assert step % 4 == 0 and "[rank" not in said                                  # no traceback of ours
    else:
        assert process.returncode == 0 and f"after step {step} of 100000; everything is saved" in said, said


def test_processes_draw_latents_of_their_own_and_train_the_same_network(here):
    draw(here / "images", 9)
    (here / "spy.py").write_text("""
import sys, torch, gan, runtime, train_dcgan
decisions, drawn, forward = [], [], gan.Generator.forward
gan.Generator.forward = lambda self, z: (drawn.append(z) if self.training else None, forward(self, z))[1]
for name in ("next_mode", "trains_D"):
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


def test_a_full_disk_is_one_sentence(capsys):
    @runtime.exit_on_user_error("x.py")
    def main(error):
        raise error

    assert mistake(capsys, lambda: main(OSError(28, "No space left on device"))) == \
        "x.py: error: [Errno 28] No space left on device\n"
    for error in (MemoryError(), RuntimeError("CUDA out of memory. Tried"), RuntimeError("can't allocate memory"),
                  BrokenProcessPool("A process in the process pool was terminated abruptly.")):
        assert "out of memory: a smaller --batch" in mistake(capsys, lambda error=error: main(error))
    for error in (RuntimeError("mat1 and mat2"), ValueError("a bug"), KeyError("a bug")):      # keep their tracebacks
        with pytest.raises(type(error)):
            main(error)
    with pytest.raises(SystemExit, match="130"):
        main(KeyboardInterrupt())


def test_torchs_word_for_a_full_disk_is_one_sentence(here, capsys):
    resource = pytest.importorskip("resource")
    runs.write_atomically("checkpoint.pt", lambda path: torch.save(torch.zeros(9), path))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))    # as if no more would fit
    try:
        write = runtime.exit_on_user_error("x.py")(runs.write_atomically)
        text = mistake(capsys, lambda: write("checkpoint.pt", lambda path: torch.save(torch.zeros(99_999), path)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "checkpoint.pt cannot be written: is the disk or the quota full" in text
    assert os.listdir(here) == ["checkpoint.pt"] and len(torch.load("checkpoint.pt", weights_only=True)) == 9


@pytest.mark.parametrize("flags, has", [("fpu avx512_bf16 avx2", True), ("amx_bf16", True), ("avx512f avx2", False)])
def test_bf16_is_found_as_the_system_names_it(monkeypatch, flags, has):
    monkeypatch.setattr(Path, "exists", lambda self: True)
    monkeypatch.setattr(Path, "read_text", lambda self: f"flags : {flags}\n")
    assert runtime.has_bf16(torch.device("cpu")) is has and not runtime.has_bf16(torch.device("mps"))


def test_what_the_system_says_names_the_place(here, capsys):
    error = OSError(30, "Read-only file system", "runs")

    def fail():
        with runtime.exit_on_user_error("x.py"):
            raise error

    assert mistake(capsys, fail) == f"x.py: error: {here / 'runs'}: Read-only file system\n"
    for error in (OSError("said by us"), ValueError("said by us")):
        assert runtime.describe_error(error) == "said by us"


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


def test_layer_shapes_are_those_of_the_network():
    G, D = gan.Generator((17, 30), 3, 5, 8), gan.Discriminator((17, 30), 3, 8, norm="spectral", minibatch=True)
    before = copy.deepcopy([G.state_dict(), D.state_dict()])
    assert runtime.layer_shapes(G, 5) == "5 -> 640 -> 8x10x16 -> 3x18x30; 0.01 million weights"
    text = runtime.layer_shapes(D, 3, 17, 30)
    assert text.startswith("3x17x30 -> 8x8x15 -> 16x4x7 -> 256; ") and float(text.split()[-3]) == round(
        sum(w.numel() for w in D.parameters()) / 1e6, 2) > 0.1
    assert same(before, [G.state_dict(), D.state_dict()]) and G.training    # not even the power iteration has moved


def test_what_is_told_of_the_precision(here, monkeypatch, capsys):
    for hardware in (True, False):
        monkeypatch.setattr(runtime, "has_bf16", lambda device: hardware)          # noqa: B023
        for flag, expected in (("auto", "bf16" if hardware else "fp32"), ("bf16", "bf16"), ("fp32", "fp32")):
            run = make_run("--precision", flag)
            assert run.precision == expected + " (no bf16 in hardware here)" * (not hardware)
            assert f"cpu, {run.precision}\n" in capsys.readouterr().out
            with run.amp:
                assert (nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.bfloat16) == (expected == "bf16")
    assert not torch.backends.cudnn.allow_tf32
