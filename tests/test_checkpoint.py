"""Test checkpoints that are written while the run continues: contents, failures, kills."""

import json
import resource
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from jobs import Job, faulty, python, same, small, weights

from lead_fast import train
from lead_fast.cli import load_config
from lead_fast.learner import checkpoint
from lead_fast.learner.checkpoint import Checkpoints
from lead_fast.learner.optimizer import make_optimizer, update
from lead_fast.learner.policy import load_policy
from lead_fast.runtime.ranks import at_stop


@pytest.fixture(scope="module")
def trained(single_rank):
    """A job of one rank in this process, with a model and its optimiser."""
    c = load_config([])
    policy = load_policy(c.model, c.parallel, single_rank)
    return single_rank, policy, make_optimizer(policy, c.optim)


@pytest.fixture
def writer(trained, tmp_path):
    checkpoints = Checkpoints(tmp_path, trained[0])
    yield checkpoints
    checkpoints.close()
    at_stop.remove(checkpoints.close)


def take_a_step(policy, optimizer) -> dict[str, torch.Tensor]:
    for p in policy.parameters():
        p.grad = torch.ones_like(p)
    update(policy, optimizer, 1e-2, 1.0)
    return state_of(policy, optimizer)


def state_of(policy, optimizer) -> dict[str, torch.Tensor]:
    out = {k: v.full_tensor().clone() for k, v in policy.named_parameters()}
    for name, p in policy.named_parameters():
        out |= {
            f"{name} {k}": getattr(v, "full_tensor", lambda v=v: v)().clone() for k, v in optimizer.state[p].items()
        }
    return out


@pytest.fixture
def slow_disk(monkeypatch):
    """A disk that accepts no data until the event is set."""
    go, write = threading.Event(), checkpoint._HashedStream.write

    def slow(self, data):
        assert go.wait(60)
        return write(self, data)

    monkeypatch.setattr(checkpoint._HashedStream, "write", slow)
    yield go
    go.set()


def test_the_run_continues_while_a_checkpoint_of_the_step_before_is_written(writer, trained, tmp_path, slow_disk):
    ranks, policy, optimizer = trained
    before = take_a_step(policy, optimizer)
    began = time.monotonic()
    assert writer.save(1, policy, optimizer, {"mark": 11}, wait=False)
    assert time.monotonic() - began < 20 and not checkpoint.finished(tmp_path)
    after = take_a_step(policy, optimizer)  # while nothing is on disk yet
    assert not same(before, after) and writer.failures() == []
    slow_disk.set()
    assert writer.finish() and [p.name for p in checkpoint.finished(tmp_path)] == ["step-1"]
    state = checkpoint.load(tmp_path, policy, optimizer, ranks)
    assert state and state["mark"] == 11 and same(state_of(policy, optimizer), before)
    continued = take_a_step(policy, optimizer)
    assert same(continued, after)  # the same step from the checkpoint: bit for bit


def test_one_write_is_under_way_at_a_time_and_the_newest_two_stay(writer, trained, tmp_path):
    _, policy, optimizer = trained
    for step in (1, 2, 3):
        take_a_step(policy, optimizer)
        assert writer.save(step, policy, optimizer, {}, wait=False)
    assert writer.finish() and writer.failures() == []
    assert [p.name for p in checkpoint.finished(tmp_path)] == ["step-3", "step-2"]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-3"
    written = checkpoint.finished(tmp_path)[0].stat().st_mtime_ns
    assert writer.save(3, policy, optimizer, {}, wait=True)  # asked to stop just after: the checkpoint exists already
    assert checkpoint.finished(tmp_path)[0].stat().st_mtime_ns == written


def test_files_are_hashed_while_they_are_written_and_not_read_again(writer, trained, tmp_path, monkeypatch):
    digest = checkpoint.digest
    monkeypatch.setattr(checkpoint, "digest", lambda path: pytest.fail("a file was read again"))
    assert writer.save(1, trained[1], trained[2], {}, wait=True)
    folder = tmp_path / "checkpoints" / "step-1"
    files = json.loads((folder / "extra.json").read_text())["files"]
    assert {*files} == {p.name for p in folder.iterdir()} - {"extra.json"} and ".metadata" in files
    for name, listed in files.items():
        assert listed == {"bytes": (folder / name).stat().st_size, "sha256": digest(folder / name)}


def test_a_failed_write_is_reported_once_and_the_last_good_checkpoint_stays(writer, trained, tmp_path):
    ranks, policy, optimizer = trained
    good = take_a_step(policy, optimizer)
    assert writer.save(1, policy, optimizer, {}, wait=True)
    take_a_step(policy, optimizer)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))  # like a disk that fills up during the write
    try:
        assert writer.save(2, policy, optimizer, {}, wait=False)  # the write has only begun
        until = time.monotonic() + 60
        while not (sentences := writer.failures()) and time.monotonic() < until:
            time.sleep(0.05)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(sentences) == 1 and "checkpoint of step 2 was not written" in sentences[0]
    assert sentences[0].endswith("newest one kept: step-1.") and writer.failures() == []
    assert not [*(tmp_path / "checkpoints").glob("*.partial")]
    assert checkpoint.load(tmp_path, policy, optimizer, ranks) and same(state_of(policy, optimizer), good)
    assert writer.save(3, policy, optimizer, {}, wait=True)


def test_a_checkpoint_that_does_not_fit_on_the_disk_is_not_staged(writer, trained, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=5 << 20))
    monkeypatch.setattr(writer._stager, "stage", lambda state: pytest.fail("staged in vain"))
    assert not writer.save(1, trained[1], trained[2], {}, wait=False)
    (sentence,) = writer.failures()
    assert "the disk has 0.00488 GiB free and it needs 0.00" in sentence and "kept: none" in sentence


def test_the_run_waits_for_the_write_if_host_memory_is_short(writer, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "available_bytes", lambda: 1e6)
    monkeypatch.setattr(writer._stager, "stage", lambda state: pytest.fail("staged where there is no room"))
    assert writer.save(1, trained[1], trained[2], {}, wait=False)
    assert [p.name for p in checkpoint.finished(tmp_path)] == ["step-1"]  # before any wait
    assert "too little host memory is free" in capsys.readouterr().out


def test_the_copy_in_host_memory_is_kept_and_not_counted_twice(writer, trained, monkeypatch):
    assert writer.save(1, trained[1], trained[2], {}, wait=True)
    monkeypatch.setattr(checkpoint, "available_bytes", lambda: 1e6)
    staged, stage = [], writer._stager.stage
    monkeypatch.setattr(writer._stager, "stage", lambda state: staged.append(stage(state)) or staged[-1])
    assert writer.save(2, trained[1], trained[2], {}, wait=True) and writer.save(3, *trained[1:], {}, wait=True)
    first, second = (next(iter(state["model"].values())).to_local() for state in staged)
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()


def test_leaving_waits_for_the_write_and_says_what_failed(trained, tmp_path, slow_disk, monkeypatch, capsys):
    checkpoints = Checkpoints(tmp_path, trained[0])
    assert checkpoints.save(1, trained[1], trained[2], {}, wait=False)
    threading.Timer(0.7, slow_disk.set).start()
    checkpoints.close()
    at_stop.remove(checkpoints.close)
    assert [p.name for p in checkpoint.finished(tmp_path)] == ["step-1"]


KILLED = """
import os, signal, sys
from pathlib import Path
from lead_fast.cli import load_config
from lead_fast.learner import checkpoint
from lead_fast.learner.optimizer import make_optimizer, update
from lead_fast.learner.policy import load_policy
from lead_fast.runtime.ranks import start

ranks, c = start(), load_config([])
policy = load_policy(c.model, c.parallel, ranks)
optimizer = make_optimizer(policy, c.optim)
checkpoints = checkpoint.Checkpoints(Path(sys.argv[1]), ranks)
assert checkpoints.save(1, policy, optimizer, {}, wait=True)
write = checkpoint._HashedStream.write
def dying(self, data):
    if self.hashes.bytes > 1 << 20:
        self.raw.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    return write(self, data)
checkpoint._HashedStream.write = dying
checkpoints.save(2, policy, optimizer, {}, wait=True)
"""


def test_killed_in_the_middle_of_a_write_the_checkpoint_before_is_resumed(trained, tmp_path, capsys):
    done = python("-c", KILLED, str(tmp_path), timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    partial = tmp_path / "checkpoints" / "step-2.partial"
    assert partial.is_dir() and any(p.stat().st_size > 0 for p in partial.iterdir())
    ranks, policy, optimizer = trained
    state = checkpoint.load(tmp_path, policy, optimizer, ranks)
    assert state and state["step"] == 1
    assert "step-2.partial is skipped (its writing was interrupted): resuming" in capsys.readouterr().out


@pytest.mark.slow
def test_killed_at_every_stage_of_a_write_the_job_restarts_to_the_weights_of_an_unbroken_one(tiny_run):
    """Two ranks. Steps do not wait for the write, so the kill comes in the middle of a later step."""
    stages = {"writing": 1, "written": 0, "listed": 0, "renamed": 0}
    faults = [
        {"do": "kill", "at": at, "step": step, "rank": rank, "restart": restart}
        for restart, (step, (at, rank)) in enumerate(zip((2, 3, 4, 4), stages.items(), strict=True))
    ]
    run = tiny_run.parent / "stages"
    job = Job(2, *faulty(faults), *small(tiny_run.parent, f"--output={run}", "--resume"), restarts=4)
    out = job.wait(timeout=400)
    assert job.code == 0 and not job.alive(), out[-3000:]
    for fault in faults:
        assert out.count(f"fault: kill at {fault['at']}, step {fault['step']}") == 1, out[-3000:]
    assert "checkpoint step-2.partial is skipped (its writing was interrupted" in out and same(
        weights(run), weights(tiny_run)
    )


def test_all_ranks_resume_from_what_the_first_one_sees(trained, tmp_path, monkeypatch):
    """Another machine may see a shared folder later; if each rank used its own listing, they would diverge."""
    ranks, policy, optimizer = trained
    assert checkpoint.save(tmp_path, 1, policy, optimizer, {}, ranks)
    listed = []
    monkeypatch.setattr(checkpoint, "finished", lambda run: listed.append(run) or [])
    gather = type(ranks).gather_objects
    seen = [tmp_path / "checkpoints" / "step-1"]

    def first_ranks(self, x, group=None):
        return [([], seen)] if isinstance(x, tuple) and isinstance(x[0], list) else gather(self, x, group)

    monkeypatch.setattr(type(ranks), "gather_objects", first_ranks)
    state = checkpoint.load(tmp_path, policy, optimizer, ranks)
    assert state and state["step"] == 1


def test_a_checkpoint_is_read_before_an_engine_shares_the_gpu(trained, tmp_path, monkeypatch):
    order: list[str] = []
    c = load_config(["--resume", "--evaluate.every=0"])

    def learner(c, ranks, journal):
        made = type("Learner", (), {"c": c, "policy": None, "resume": lambda self: order.append("resume") or {}})
        return made()

    def engine(*args):
        order.append("engine")
        raise RuntimeError("enough")

    monkeypatch.setattr(train, "Learner", learner)
    monkeypatch.setattr(train, "make_engine", engine)
    monkeypatch.setattr(train, "stop_on_signals", lambda ranks: [])
    with pytest.raises(RuntimeError, match="enough"):
        train.train(c, trained[0], Path(tmp_path))
    assert order == ["resume", "engine"]
