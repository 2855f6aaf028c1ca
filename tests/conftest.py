"""Fixtures that several test files share; helpers that do not need pytest are in jobs.py."""

import fcntl
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

# Threads that wait for one another sleep, because with many processes on few cores spinning takes most of the time.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from jobs import ROOT, Job, records, small

from lead_fast.runtime.ranks import Ranks, start, stop


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """Make a folder that is filled once per session, even if pytest-xdist's workers share the session."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "made").exists():
            folder.mkdir(exist_ok=True)
            make(folder)
            (folder / "made").touch()
    return folder


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of five steps on two ranks, with a checkpoint after every step; read it or copy it.

    The folder above it holds what the run printed (out.txt), and the problems of `small(tiny_run.parent, ...)`.
    """

    def make(folder: Path) -> None:
        more = (f"--output={folder / 'run'}", "--evaluate.every=5", "--evaluate.problems=16")
        job = Job(2, "-m", "lead_fast.train", *small(folder, *more))
        out = job.wait()
        (folder / "out.txt").write_text(out)
        assert job.code == 0 and not job.alive(), out[-3000:]
        moved = sum(r["grad_norm"] > 0 for r in records(folder / "run", "train"))
        assert moved >= 2, "the weights hardly move: equal weights would say nothing"

    return once(tmp_path_factory, "tiny", make) / "run"


@pytest.fixture(scope="module")
def single_rank() -> Iterator[Ranks]:
    """A job of one rank in this process. It ends with the test file and restores the environment."""
    threads = torch.get_num_threads()
    with mock.patch.dict(os.environ):
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)
        yield start()
        stop()
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def resolve() -> Callable[..., dict[str, str]]:
    def resolve(*arguments: str) -> dict[str, str]:
        """Resolve what pip would install, by name; skips the test if no index answers."""
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        command += ["--report", "-", "--only-binary", ":all:", "--no-build-isolation", "--retries", "1"]
        command += ["--timeout", "15", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        if done.returncode and re.search(
            r"from versions: none|NewConnectionError|Temporary failure|timed out", done.stderr
        ):
            pytest.skip("no package index answers here, so nothing can be resolved")
        assert done.returncode == 0, done.stderr[-2000:]
        return {
            re.sub(r"[-_.]+", "-", i["metadata"]["name"]).lower(): i["metadata"]["version"]
            for i in json.loads(done.stdout)["install"]
        }

    return resolve
