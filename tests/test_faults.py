"""Test faults in long runs (docs/reliability.md): kills, interrupts, hangs, full disks, damaged files, NaN."""

import io
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from jobs import ROOT, STEPS, Job, environment, faulty, launcher, python, records, same, small, weights

from lead_fast.cli import load_config
from lead_fast.data.order import ProblemStream
from lead_fast.learner import checkpoint
from lead_fast.learner.model import load_model, load_tokenizer
from lead_fast.learner.optimizer import make_optimizer, update
from lead_fast.learner.policy import load_policy
from lead_fast.runtime.health import Health, must_be_finite
from lead_fast.runtime.jsonl import read_jsonl
from lead_fast.runtime.metrics import Metrics

# --------------------------------------------------------------------------------------------------------------- kills


KILLS = [
    {"do": "kill", "at": "rollout", "step": 2, "rank": 1, "restart": 0},
    {"do": "kill", "at": "backward", "step": 3, "rank": 0, "restart": 1},
    {"do": "kill", "at": "written", "step": 4, "rank": 1, "restart": 2},
]


@pytest.fixture(scope="module")
def killed(tiny_run) -> SimpleNamespace:
    """A job that torchrun restarts twice and that dies at the third kill, and a job that resumes from its folder."""
    run = tiny_run.parent / "killed"
    args = small(tiny_run.parent, f"--output={run}", "--resume")
    first, checkers = Job(2, *faulty(KILLS), *args, restarts=2), set()
    while first.process.poll() is None and not checkers:  # the checkers run while the job does
        checkers |= set(first.checkers())
        time.sleep(0.05)
    first_out, first_left = first.wait(), first.alive()
    again = Job(2, "-m", "lead_fast.train", *args)
    out = again.wait()
    assert again.code == 0 and not again.alive(), out[-3000:]
    return SimpleNamespace(run=run, job=first, first_out=first_out, left=first_left, checkers=checkers, out=out)


def test_killed_in_rollout_backward_and_save_the_job_resumes_to_the_same_weights(killed, tiny_run):
    said = [killed.first_out.count(f"fault: kill at {f['at']}, step {f['step']}") for f in KILLS]
    assert said == [1, 1, 1], killed.first_out[-3000:]
    assert "checkpoint step-4.partial is skipped (its writing was interrupted" in killed.out
    assert "resuming from step-3" in killed.out
    assert same(weights(killed.run), weights(tiny_run))
    resumed, unbroken = records(killed.run, "train"), records(tiny_run, "train")
    assert [r["step"] for r in resumed] == [*range(1, STEPS + 1)]
    assert [r["accuracy"] for r in resumed] == [r["accuracy"] for r in unbroken]
    kept = [{p.name: p.read_bytes() for p in (run / "rollouts").iterdir()} for run in (killed.run, tiny_run)]
    assert len(kept[0]) == STEPS + 1 and kept[0] == kept[1]


def test_a_killed_rank_ends_the_job_and_leaves_no_process(killed):
    assert killed.checkers, "no checker ran: this tests nothing of them"
    assert killed.job.code != 0 and not killed.left, killed.first_out[-3000:]


def test_sigterm_to_the_ranks_of_a_job_saves_and_ends_with_0(tiny_run):
    run = tiny_run.parent / "asked"
    job = Job(2, "-m", "lead_fast.train", *small(tiny_run.parent, f"--output={run}", "--steps=500"))
    while job.process.poll() is None and not (run / "metrics.jsonl").exists():
        time.sleep(0.1)
    for pid in job.ranks():
        os.kill(pid, signal.SIGTERM)
    out = job.wait(timeout=120)
    assert job.code == 0 and "Asked to stop: saved after step" in out and not job.alive(), out[-3000:]
    assert f"--output={run} --resume" in out
    assert (run / "checkpoints" / "latest").read_text() == checkpoint.finished(run)[0].name


OWN = """
def reward(response, correct):
    return {"right": correct, "brief": 0.1 * (len(response) < 60)}
"""


def test_ctrl_c_on_torchrun_saves_and_the_graders_outlive_it(tiny_run):
    """torchrun interrupts each rank's process group; verifier and reward function belong to none of them."""
    run = tiny_run.parent / "interrupted"
    (tiny_run.parent / "own.py").write_text(OWN)
    job = Job(2, "-m", "lead_fast.train", *small(tiny_run.parent, f"--output={run}", "--steps=500"),
              f"--reward.function={tiny_run.parent / 'own.py'}:reward")  # fmt: skip
    while job.process.poll() is None and not (run / "metrics.jsonl").exists():
        time.sleep(0.1)
    job.process.send_signal(signal.SIGINT)
    out = job.wait(timeout=120)
    assert "SignalException" in out and not job.alive(), out[-3000:]  # torchrun's own last message
    assert out.count("Asked to stop: the step is finished first") == out.count("Asked to stop: saved after step") == 1
    steps = records(run, "train")
    assert checkpoint.finished(run)[0].name == f"step-{len(steps)}"
    assert {r["reward_function_failed"] for r in steps} == {0} and "Warning: reward.function" not in out
    assert all(set(r["reward_terms"]) == {"reward", "right", "brief"} for r in steps)
    assert all(r["accuracy"] >= r["reward_terms"]["right"] for r in steps)  # 0.1 is above 0 too


@pytest.mark.parametrize("ranks", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_second_ctrl_c_ends_a_run_that_hangs_at_once(ranks, tiny_run):
    """0 ranks: plain python, whose process group receives the interrupt as from a terminal; 2 ranks: torchrun."""
    run = tiny_run.parent / f"twice-{ranks}"
    command = [*faulty([{"do": "hang", "at": "optim", "step": 2}]), *small(tiny_run.parent, f"--output={run}")]
    command = [*(launcher(ranks) if ranks else [sys.executable]), *command]
    with (tiny_run.parent / f"twice-{ranks}.txt").open("w+") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=out, stderr=out, start_new_session=True)

        def said() -> str:
            return Path(out.name).read_text()

        for text in ("fault: hang", "Asked to stop: the step is finished first"):
            while process.poll() is None and text not in said():
                time.sleep(0.1)
            assert process.poll() is None, said()[-3000:]
            os.killpg(process.pid, signal.SIGINT)
        began = time.monotonic()
        code = process.wait(timeout=60)
    assert code == (1 if ranks else 130) and time.monotonic() - began < 15, said()[-3000:]
    assert not (run / "checkpoints" / "step-2").exists()


TWICE = """
import os, signal, sys, time
import torch
from lead_fast.runtime.ranks import start, stop
from lead_fast.runtime.signals import stop_on_signals
before = signal.getsignal(signal.SIGTERM)
ranks = start()
caught = stop_on_signals(ranks)
print("threads", torch.get_num_threads(), flush=True)
for _ in range(3):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.3)
print(len(caught), flush=True)
if len(sys.argv) > 1:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
stop()
print(signal.getsignal(signal.SIGTERM) == before, flush=True)
"""


def test_sigterm_may_come_twice_and_an_interrupt_after_it_ends_the_process():
    done = python("-c", TWICE, timeout=60)
    assert done.returncode == 0 and done.stdout.splitlines()[-2:] == ["3", "True"], done.stderr
    assert done.stdout.count("Ctrl-C exits at once") == 1
    assert "threads 1\n" in done.stdout  # a single process obeys OMP_NUM_THREADS, which `environment` sets
    done = python("-c", TWICE, "interrupt", timeout=60)
    assert done.returncode == 130 and done.stdout.splitlines()[-1] == "3"


# -------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.slow
def test_a_two_rank_checkpoint_resumes_on_four_at_the_same_place_in_the_data(tiny_run):
    run = tiny_run.parent / "four"
    shutil.copytree(tiny_run, run)
    for folder in checkpoint.finished(run)[:1]:  # remove step 5, keep step 4
        shutil.rmtree(folder)
    job = Job(4, "-m", "lead_fast.train", *small(tiny_run.parent, f"--output={run}", "--resume"))
    out = job.wait()
    assert job.code == 0 and not job.alive(), out[-3000:]
    assert [r["step"] for r in records(run, "train")] == [*range(1, STEPS + 1)]
    resumed, unbroken = (
        {r["problem"] for r in read_jsonl(folder / "responses.jsonl") if (r["step"], r["split"]) == (STEPS, "train")}
        for folder in (run, tiny_run)
    )
    assert resumed == unbroken and len(resumed) == 4
    assert ProblemStream(64, 4, 0).batch(4) != ProblemStream(64, 4, 0).batch(0)


@pytest.fixture(scope="module")
def alone(single_rank):
    """A job of one rank in this process, with a model and its optimiser."""
    c = load_config([])
    policy = load_policy(c.model, c.parallel, single_rank)
    return single_rank, policy, make_optimizer(policy, c.optim)


def take_a_step(policy, optimizer) -> dict[str, torch.Tensor]:
    for p in policy.parameters():
        p.grad = torch.ones_like(p)
    update(policy, optimizer, 1e-2, 1.0)
    return {k: v.full_tensor().clone() for k, v in policy.named_parameters()}


def saved(run: Path, alone, steps: int = 3) -> list[dict[str, torch.Tensor]]:
    """Save checkpoints of steps 1 to `steps`, of which two are kept; returns the weights at each step."""
    ranks, policy, optimizer = alone
    out = []
    for step in range(1, steps + 1):
        out.append(take_a_step(policy, optimizer))
        assert checkpoint.save(run, step, policy, optimizer, {"mark": step * 11}, ranks)
    return out


def reload(run: Path, alone) -> tuple[dict | None, dict[str, torch.Tensor]]:
    ranks, policy, optimizer = alone
    for p in policy.parameters():
        p.data.fill_(7.0)
    found = checkpoint.load(run, policy, optimizer, ranks)
    return found, {k: v.full_tensor().clone() for k, v in policy.named_parameters()}


def shard_of(folder: Path) -> Path:
    return next(folder.glob("__0_*"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


SPOILT = {
    "truncated": (lambda f: os.truncate(shard_of(f), 1000), "has 1000 bytes of"),
    "one bit": (lambda f: flip(shard_of(f)), "was changed after it was written"),
    "missing": (lambda f: shard_of(f).unlink(), "is missing"),
    "metadata": (lambda f: os.truncate(f / ".metadata", 50), "has 50 bytes of"),
    "half a list": (lambda f: os.truncate(f / "extra.json", 20), "list of files cannot be read"),
    "no list": (lambda f: (f / "extra.json").unlink(), "list of files cannot be read"),
    "empty list": (lambda f: (f / "extra.json").write_text('{"files": {}}'), "list of files is incomplete"),
    "cut short": (lambda f: f.rename(f.with_suffix(".partial")), "its writing was interrupted"),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_a_damaged_checkpoint_is_skipped_for_the_last_complete_one(kind, alone, tmp_path, capsys):
    spoil, why = SPOILT[kind]
    states = saved(tmp_path, alone)
    assert [p.name for p in checkpoint.finished(tmp_path)] == ["step-3", "step-2"]
    found, state = reload(tmp_path, alone)
    assert found and found["step"] == 3 and found["mark"] == 33 and same(state, states[2])
    capsys.readouterr()
    spoil(tmp_path / "checkpoints" / "step-3")
    found, state = reload(tmp_path, alone)
    assert found and found["step"] == 2 and found["mark"] == 22 and same(state, states[1])
    said = capsys.readouterr().out
    assert said.count("Warning") == 1 and why in said and "step-3" in said and "resuming from step-2" in said


def test_where_no_checkpoint_is_whole_the_run_stops_with_a_sentence(alone, tmp_path):
    saved(tmp_path, alone, steps=1)
    flip(shard_of(tmp_path / "checkpoints" / "step-1"))
    with pytest.raises(ValueError, match="No checkpoint in .* is complete .*step-1"):
        reload(tmp_path, alone)
    shutil.rmtree(tmp_path / "checkpoints")
    assert reload(tmp_path, alone)[0] is None


def test_a_full_disk_keeps_the_old_checkpoint_and_the_run(alone, tmp_path, capfd):
    """Uses a real limit on file size, at which a write fails as on a full disk."""
    ranks, policy, optimizer = alone
    states = saved(tmp_path, alone, steps=1)
    take_a_step(policy, optimizer)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        assert not checkpoint.save(tmp_path, 2, policy, optimizer, {}, ranks)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capfd.readouterr().out
    assert "checkpoint of step 2 was not written" in said and "newest one kept: step-1" in said
    assert [p.name for p in (tmp_path / "checkpoints").glob("step-*")] == ["step-1"]
    found, state = reload(tmp_path, alone)
    assert found and found["step"] == 1 and same(state, states[0])
    assert checkpoint.save(tmp_path, 3, policy, optimizer, {}, ranks)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 64 MB; skips if this process may not mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(disk)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.slow
def test_a_run_on_a_disk_that_fills_up_is_trained_to_its_end(small_disk, tiny_run):
    """There is room at first; then other files fill the disk until only one checkpoint and the final model fit."""
    run = small_disk / "run"
    job = Job(2, "-m", "lead_fast.train", *small(tiny_run.parent, f"--output={run}"))
    while job.process.poll() is None and not (run / "config.toml").exists():
        time.sleep(0.05)
    (small_disk / "others").write_bytes(bytes(48 << 20))
    out = job.wait()
    assert job.code == 0 and out.count("was not written") == STEPS - 1 and "kept: step-1" in out, out[-3000:]
    assert same(weights(run), weights(tiny_run))
    assert [p.name for p in checkpoint.finished(run)] == ["step-1"] and not [*run.glob("checkpoints/*.partial")]


def test_records_wait_for_room_on_the_disk(tmp_path, capsys):
    """/dev/full fails every write like a full disk."""
    m = Metrics(tmp_path, total_steps=3, tensorboard=False)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    m.train(1, {"loss": 1.0})
    m.train(2, {"loss": 2.0})
    assert "2 records of metrics.jsonl cannot be written yet" in capsys.readouterr().out
    (tmp_path / "metrics.jsonl").unlink()
    m.train(3, {"loss": 3.0})
    assert [r["loss"] for r in read_jsonl(tmp_path / "metrics.jsonl")] == [1.0, 2.0, 3.0]


# --------------------------------------------------------------------------------------------------------------- hangs


def test_the_watchdog_names_every_ranks_phase_and_stack_and_ends_the_job(tiny_run):
    run = tiny_run.parent / "hung"
    fault = {"do": "hang", "at": "optim", "step": 2, "rank": 1}
    job = Job(2, *faulty([fault]), *small(tiny_run.parent, f"--output={run}", "--watchdog_s=6"))
    out = job.wait(timeout=150)
    assert job.code != 0 and not job.alive(), out[-3000:]
    for rank in (0, 1):
        assert f"rank {rank} made no progress" in out, out[-3000:]
    assert out.count("phase optim, step 2") == 2
    assert "in hang" in out and "all_reduce" in out  # the stack of rank 1, and of rank 0, which waits for it


LOCKED = """
import ctypes
from lead_fast.runtime.ranks import start
from lead_fast.runtime.watchdog import Watchdog
dog = Watchdog(2.0, start())
dog.beat("reward", 7)
ctypes.PyDLL(None).sleep(60)  # keeps the interpreter's lock: no Python thread runs
"""


def test_code_that_keeps_the_interpreters_lock_is_ended_too():
    done = python("-c", LOCKED, timeout=50)
    assert done.returncode != 0 and "Timeout (0:00:04)!" in done.stderr and "<string>" in done.stderr


ENDING = """
import time
from lead_fast.runtime import watchdog
from lead_fast.runtime.ranks import start

class Busy:  # always inside the store's C++, so also when the interpreter ends
    def __init__(self, store): self.store = store
    def check(self, keys):
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            self.store.check(keys)
    def add(self, key, n): return self.store.add(key, n)

dog = watchdog.Watchdog(5.0, start())
dog._store = Busy(dog._store)
time.sleep(1.5)
"""


def test_a_process_ends_cleanly_while_the_watchdog_looks_into_the_store():
    done = python("-c", ENDING, timeout=50)
    assert done.returncode == 0 and "terminate" not in done.stderr, done.stderr


# ------------------------------------------------------------------------------------------------------------- numbers


def test_non_finite_updates_are_skipped_on_all_ranks_counted_and_kept_and_many_stop_the_run(tiny_run):
    run = tiny_run.parent / "nonfinite"
    faults = [{"do": "inf", "step": 2, "rank": 1}, {"do": "nan", "step": 4, "rank": 0}]
    faults += [{"do": "nan", "step": 5, "rank": 1}]
    args = small(tiny_run.parent, f"--output={run}", "--optim.max_skipped=2", "--steps=9", "--advantage.std=none",
                 "--loss.entropy_coef=1e-3")  # fmt: skip
    job = Job(2, *faulty(faults), *args)
    out = job.wait()
    assert job.code != 0 and not job.alive(), out[-3000:]
    assert "not finite in 2 consecutive steps, the last of them step 5" in out and "optim.max_skipped" in out
    steps = read_jsonl(run / "metrics.jsonl")
    assert [r["updates_skipped"] for r in steps] == [0, 1, 0, 1, 1]
    assert [r["grad_norm"] is None for r in steps] == [False, True, False, True, True]
    for step in (2, 4, 5):
        kept = json.loads((run / "nonfinite" / f"step-{step}.json").read_text())
        assert len(kept["groups"]) == 4 and len(kept["advantage"]) == 16
        assert (
            kept["groups"][0]["samples"][0]["response"]["text"]
            and "correct" in kept["groups"][0]["samples"][0]["score"]
        )
    # The engine had the ranks' weights at every step: they would differ if only one rank had taken its step.
    assert max(r["logprob_diff_max"] for r in steps) < 1e-3


def test_debug_mode_ends_a_run_whose_kernel_gives_log_probs_above_0(tiny_run):
    run = tiny_run.parent / "debug"
    fault = {"do": "above0", "step": 1, "rank": 0}
    job = Job(1, *faulty([fault]), *small(tiny_run.parent, f"--output={run}", "--debug", "--loss.entropy_coef=1e-3"))
    out = job.wait()
    assert job.code != 0 and "log-probs of a pack of 16 sequences on rank 0" in out, out[-3000:]


@pytest.mark.slow
def test_an_engine_that_dies_in_an_evaluation_costs_no_step(tiny_run):
    run = tiny_run.parent / "engine"
    fault = {"do": "engine", "at": "evaluate", "step": 2, "rank": 1}
    more = (f"--output={run}", "--checkpoint_every=0", "--evaluate.every=2", "--evaluate.problems=4")
    job = Job(2, *faulty([fault]), *small(tiny_run.parent, *more))
    out = job.wait()
    said = (
        "In the evaluation after step 2 the engine of rank 1 died (RuntimeError: out of patience): saved after step 2"
    )
    assert job.code != 0 and said in out and f"resume with --output={run} --resume" in out, out[-3000:]
    assert (run / "checkpoints" / "latest").read_text() == "step-2"


def test_a_clip_of_0_is_off_and_a_norm_above_0_clips(alone):
    _, policy, optimizer = alone
    for clip, kept in ((0.0, 1.0), (1e9, 1.0), (0.5, None)):
        optimizer.state.clear()
        for p in policy.parameters():
            p.grad = torch.full_like(p, 3.0)
        norm = update(policy, optimizer, 0.0, clip)
        first = torch.cat([s["exp_avg"].full_tensor().flatten() for s in optimizer.state.values()])
        assert norm == pytest.approx(3.0 * first.numel() ** 0.5, rel=1e-5)
        torch.testing.assert_close(first, torch.full_like(first, 0.3 * (kept or clip / norm)), rtol=1e-4, atol=0)


def test_a_step_that_is_not_finite_leaves_weights_and_moments_as_they_were(alone):
    _, policy, optimizer = alone
    before = take_a_step(policy, optimizer)
    moments = [s["exp_avg"].full_tensor().clone() for s in optimizer.state.values()]
    for spoil, loss in ((torch.nan, 0.0), (torch.inf, 0.0), (1.0, torch.nan), (1.0, torch.inf)):
        for p in policy.parameters():
            p.grad = torch.full_like(p, spoil)
        assert not torch.tensor(update(policy, optimizer, 1e-2, 1.0, float(loss))).isfinite()
        assert same(before, {k: v.full_tensor() for k, v in policy.named_parameters()})
        after = [s["exp_avg"].full_tensor() for s in optimizer.state.values()]
        assert all(torch.equal(a, b) for a, b in zip(moments, after, strict=True))


def test_spikes_and_exploded_ratios_are_reported_and_ordinary_steps_are_not(tmp_path):
    health = Health(tmp_path, 3)
    usual = {"loss": -0.02, "grad_norm": 0.3, "logprob_diff_mean": 1e-4, "logprob_diff_max": 1e-2}
    assert [health.look(s, usual | {"grad_norm": 0.3 + s / 100}) for s in range(20)] == [[]] * 20
    (alert,) = health.look(20, usual | {"grad_norm": 30.0})
    assert "step 20: grad_norm is 30" in alert
    (alert,) = health.look(21, usual | {"loss": 2.0})
    assert "loss is 2" in alert
    (alert,) = health.look(22, usual | {"logprob_diff_mean": 0.9, "logprob_diff_max": 8.0})
    assert "0.9 nats on average, 8 at most" in alert
    (alert,) = health.look(23, usual | {"reward_function_failed": 3})
    assert "the reward function failed for 3 responses" in alert
    nothing = {"loss": float("nan"), "grad_norm": float("nan"), "logprob_diff_mean": float("nan")}
    assert health.look(23, nothing) == [] and health.look(24, {}) == [] and health.look(25, usual) == []


def test_consecutive_skipped_steps_are_counted_and_few_batches_are_kept(tmp_path):
    health = Health(tmp_path, 2, skipped=4)
    for step, n in enumerate((1, 0, 1, 0)):
        health.count(step, n, None)
    assert health.skipped == 6
    health.count(4, 1, None)
    with pytest.raises(ValueError, match="2 consecutive steps"):
        health.count(5, 1, None)
    assert sum(health.keep(s, {"x": torch.tensor([float("nan")])}) is not None for s in range(9)) == 5
    assert json.loads((tmp_path / "nonfinite" / "step-0.json").read_text()) == {"x": [None]}


def test_debug_mode_looks_for_values_above_a_bound_and_not_finite():
    must_be_finite("x", torch.tensor([-1.0, 0.0]), None, torch.empty(0), most=0.0)
    for bad in (0.1, float("nan"), float("inf"), float("-inf")):
        with pytest.raises(FloatingPointError, match="x: 1 of 2 values"):
            must_be_finite("x", torch.tensor([-1.0, bad]), most=0.0)


# --------------------------------------------------------------------------------------------------------------- trust


class Evil:
    """A pickle that leaves a mark if it is loaded."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def test_a_checkpoint_is_never_executed(alone, tmp_path):
    mark = tmp_path / "mark"
    pickle.loads(pickle.dumps(Evil(mark)))
    assert mark.exists()
    mark.unlink()
    saved(tmp_path, alone, steps=1)
    folder = tmp_path / "checkpoints" / "step-1"
    (folder / ".metadata").write_bytes(pickle.dumps(Evil(mark)))
    listed = json.loads((folder / "extra.json").read_text())
    path = folder / ".metadata"
    listed["files"][".metadata"] = {"bytes": path.stat().st_size, "sha256": checkpoint.digest(path)}
    (folder / "extra.json").write_text(json.dumps(listed))
    with pytest.raises(ValueError, match="no checkpoint needs"):
        reload(tmp_path, alone)
    assert not mark.exists()


def test_a_checkpoints_getattr_reaches_enumerations_only():
    """Some Python versions pickle a member of an enumeration as getattr(class, name)."""
    encoding = b"ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\n"
    member = b"cbuiltins\ngetattr\n(" + encoding + b"S'TORCH_PRESERVE_FORMAT'\ntR."
    assert checkpoint._Unpickler(io.BytesIO(member)).load().name == "TORCH_PRESERVE_FORMAT"
    method = b"cbuiltins\ngetattr\n(cpathlib\nPosixPath\nS'cwd'\ntR."
    with pytest.raises(pickle.UnpicklingError, match="not an enumeration"):
        checkpoint._Unpickler(io.BytesIO(method)).load()


def test_objects_other_than_tensors_in_a_checkpoint_are_not_executed(alone, tmp_path):
    """Settings and notes of the optimiser are pickles inside the shards, which DCP would load without restriction."""
    ranks, policy, optimizer = alone
    mark = tmp_path / "mark"
    take_a_step(policy, optimizer)
    optimizer.param_groups[0]["eps"], eps = Evil(mark), optimizer.param_groups[0]["eps"]
    assert checkpoint.save(tmp_path, 1, policy, optimizer, {}, ranks)
    optimizer.param_groups[0]["eps"] = eps
    reload(tmp_path, alone)  # settings come from the configuration and are not read at all
    assert not mark.exists() and optimizer.param_groups[0]["eps"] == eps
    state = next(iter(optimizer.state.values()))
    state["note"] = Evil(mark)
    assert checkpoint.save(tmp_path, 2, policy, optimizer, {}, ranks)
    state["note"] = "harmless"  # so that the key is requested
    try:
        with pytest.raises(ValueError, match="(?i)weights.only|unsupported|cannot be read"):
            reload(tmp_path, alone)
    finally:
        state.pop("note")
    assert not mark.exists()


def test_a_pickled_model_is_refused_and_not_loaded(tmp_path):
    source = Path(load_tokenizer(load_config([]).model).name_or_path)
    folder, mark = tmp_path / "model", tmp_path / "mark"
    shutil.copytree(source, folder)
    (folder / "model.safetensors").unlink()
    torch.save({"x": Evil(mark)}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="model.path .* cannot be loaded"):
        load_model(load_config([f"--model={folder}"]).model)
    assert not mark.exists()


def test_a_models_own_code_is_not_run_unless_asked_for(tmp_path):
    source = Path(load_tokenizer(load_config([]).model).name_or_path)
    folder, mark = tmp_path / "model", tmp_path / "mark"
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(mark)!r}, 'w')\n")
    with pytest.raises(ValueError, match="(?i)code|mine"):
        load_model(load_config([f"--model={folder}"]).model)
    assert not mark.exists()


def test_a_configuration_is_data(tmp_path):
    mark = tmp_path / "mark"
    path = tmp_path / "c.toml"
    path.write_text(f"recipe = \"__import__('pathlib').Path('{mark}').touch()\"\n")
    load_config(["--config", str(path), f'--rollout.stop=["$(touch {mark})"]'])
    with pytest.raises(ValueError, match="steps"):
        load_config(["--config", str(path), f"--steps=__import__('pathlib').Path('{mark}').touch()"])
    assert not mark.exists()


def test_a_run_directory_belongs_to_one_run(tmp_path):
    run = tmp_path / "run"
    lock = checkpoint.claim(run, resume=False)
    assert (run / "lock").read_text() == f"{os.getpid()}\n"
    for resume in (True, False):
        with pytest.raises(ValueError, match=f"in use by another run .process {os.getpid()}."):
            checkpoint.claim(run, resume)
    lock.close()
    checkpoint.claim(run, resume=True).close()
    (run / "config.toml").write_text("")
    with pytest.raises(ValueError, match="already holds a run"):
        checkpoint.claim(run, resume=False)
