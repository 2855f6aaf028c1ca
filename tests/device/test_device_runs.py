"""Test `tiny` end to end on every device: saved, resumed with the engine present, and killed."""

import importlib.util
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from jobs import Job, records, small, succeeded, torchrun

VLLM = importlib.util.find_spec("vllm") is not None
MOST_NATS = {"cpu": 1e-3, "cuda": 2e-2}  # between engine and trainer with equal float32 weights


def on_gpus(*args: str) -> tuple[int, tuple[str, ...]]:
    """Ranks and arguments of a job on at most two of this machine's GPUs."""
    return min(2, torch.cuda.device_count()), (*args, f"--rollout.engine={'vllm' if VLLM else 'transformers'}")


@pytest.fixture(scope="module")
def run(device, request, tmp_path_factory) -> Path:
    """A run of five steps with a checkpoint after every step; on a CPU the run that other tests share."""
    if device.type == "cpu":
        return request.getfixturevalue("tiny_run")
    folder = tmp_path_factory.mktemp("cuda")
    ranks, args = on_gpus(f"--output={folder / 'run'}", "--evaluate.every=5", "--evaluate.problems=16")
    done = succeeded(torchrun(ranks, "-m", "lead_fast.train", *small(folder, *args)))
    (folder / "out.txt").write_text(done.stdout)
    return folder / "run"


def check_steps(folder: Path, device: torch.device, steps: int) -> None:
    """Check that every step learned, and that the engine had the trainer's weights."""
    rows = records(folder, "train")
    assert [r["step"] for r in rows] == list(range(1, steps + 1)) and sum(r["grad_norm"] > 0 for r in rows) >= 2
    differences = [r["logprob_diff_max"] for r in rows if r["logprob_diff_max"] is not None]
    assert differences and max(differences) < MOST_NATS[device.type]
    assert all(r["sync_bytes"] > 0 and r["updates_skipped"] == 0 for r in rows)
    assert (folder / "final" / "model.safetensors").stat().st_size > 0


def test_tiny_learns_from_end_to_end(run, device):
    check_steps(run, device, 5)
    said = (run.parent / "out.txt").read_text()
    assert ("Kernels: Triton" in said) == (device.type == "cuda") and "Attention: torch's" in said
    assert [r["step"] for r in records(run, "eval")] == [0, 5]


def test_a_checkpoint_resumes_on_one_rank_with_the_engine_present(run, device, tmp_path):
    """A finished run is asked for one more step."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    more = ("--steps=6", "--checkpoint_every=0", f"--output={folder}", "--resume")
    _, args = on_gpus(*more) if device.type == "cuda" else (1, more)
    succeeded(torchrun(1, "-m", "lead_fast.train", *small(run.parent, *args)))
    check_steps(folder, device, 6)


def test_after_a_kill_no_process_and_no_memory_of_the_gpu_stays(gpu, tmp_path):
    """tests/test_faults.py kills ranks on the CPU; here the engine and NCCL are running too."""
    before = torch.cuda.mem_get_info()[0]
    ranks, args = on_gpus(f"--output={tmp_path / 'run'}", "--steps=1000")
    job = Job(ranks, "-m", "lead_fast.train", *small(tmp_path, *args), out=tmp_path / "out.txt")
    try:
        until = time.monotonic() + 300
        while not ((tmp_path / "run" / "metrics.jsonl").exists() and records(tmp_path / "run", "train")):
            assert job.process.poll() is None and time.monotonic() < until, (tmp_path / "out.txt").read_text()[-3000:]
            time.sleep(0.5)
        os.kill(job.ranks()[-1], signal.SIGKILL)
    finally:
        job.wait(60)
    assert job.code != 0 and not job.alive()
    until = time.monotonic() + 20
    while torch.cuda.mem_get_info()[0] < before - (64 << 20) and time.monotonic() < until:
        time.sleep(0.5)
    assert torch.cuda.mem_get_info()[0] >= before - (64 << 20)
