"""Commands, ranks and small runs for the tests, without pytest so that soak.py can use them too."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import torch
from safetensors.torch import load_file

from lead_fast.data.arithmetic import make_problems
from lead_fast.runtime.metric_table import metric, paths

ROOT = Path(__file__).resolve().parent.parent
STEPS = 5  # steps of a small run


def environment(**more: str) -> dict[str, str]:
    """Environment of a child process: the working tree's modules, one thread, no rank inherited from a test."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "tests")))
    return kept | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | more


def launcher(ranks: int, *more: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *more]


def run(command: list[str], timeout: float = 900, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(**env), timeout=timeout)


def python(*args: str, timeout: float = 900, **env: str) -> subprocess.CompletedProcess:
    return run([sys.executable, *args], timeout, **env)


def torchrun(ranks: int, *args: str, timeout: float = 900, **env: str) -> subprocess.CompletedProcess:
    return run([*launcher(ranks), *args], timeout, **env)


def succeeded(done: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    assert done.returncode == 0, done.stderr[-4000:]
    return done


COMMANDS = """
import contextlib, io, json, runpy, sys
ended = []
for module, *args in json.loads(sys.argv[1]):
    sys.argv, code, out = [module, *args], 0, io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            runpy.run_module(module, run_name="__main__")
        except SystemExit as e:
            code = e.code
    ended.append([code or 0, out.getvalue()])
print(json.dumps(ended))
"""


def commands(*lines: list[str], **env: str) -> list[list]:
    """Run command lines, [module, *arguments], one after another in one process.

    Returns what each passes to sys.exit (0 or a message) and what it prints. A traceback fails the test.
    """
    return json.loads(succeeded(python("-c", COMMANDS, json.dumps(lines), **env)).stdout.splitlines()[-1])


class Job:
    """A torchrun job in a separate session; its processes are found by a mark in their environment."""

    def __init__(self, ranks: int, *args: str, restarts: int = 0, out: Path | None = None):
        self.mark = uuid.uuid4().hex
        self.process = subprocess.Popen(
            [*launcher(ranks, f"--max-restarts={restarts}"), *args], env=environment(LEAD_TEST_MARK=self.mark),
            cwd=ROOT, stdout=out.open("w") if out else subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def wait(self, timeout: float = 300) -> str:
        """Wait for the job to end, within a time limit, and return everything that it printed."""
        try:
            return self.process.communicate(timeout=timeout)[0]
        finally:
            for pid in self.alive():  # the job did not end: the test has failed and cleans up
                os.kill(pid, signal.SIGKILL)

    @property
    def code(self) -> int:
        return self.process.returncode

    def alive(self, patience_s: float = 10.0) -> list[int]:
        """Processes of the job that are still alive, checked until there are none or a time limit passes."""
        until = time.monotonic() + patience_s
        while (found := self.pids()) and self.process.returncode is not None and time.monotonic() < until:
            time.sleep(0.1)
        return found

    def pids(self) -> list[int]:
        out = []
        for p in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (p / "environ").read_bytes():
                    out.append(int(p.name))
            except OSError:  # the process has ended, or belongs to another user
                continue
        return out

    def ranks(self) -> list[int]:
        """Process ids of the ranks."""
        return [pid for pid in self.pids() if _variable(pid, "RANK") and b"worker()" not in _command(pid)]

    def checkers(self) -> list[int]:
        return [pid for pid in self.pids() if b"worker()" in _command(pid)]


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _variable(pid: int, name: str) -> str:
    try:
        rows = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return ""
    return next((r.partition(b"=")[2].decode() for r in rows if r.startswith(name.encode() + b"=")), "")


def small(folder: Path, *more: str) -> list[str]:
    """Arguments of a run of a few seconds, whose references (limits) are graded in the checker's process."""
    data = folder / "problems.jsonl"
    if not data.exists():
        rows = make_problems(64, seed=1, split="train")
        data.write_text("".join(json.dumps(r | {"answer": rf"\lim_{{x\to 0}} {r['answer']}"}) + "\n" for r in rows))
    return ["--rollout.problems=4", "--rollout.group_size=4", "--rollout.max_tokens=48", "--evaluate.every=0",
            f"--data.train={data}", "--optim.lr=1e-3", f"--steps={STEPS}", "--checkpoint_every=1", *more]  # fmt: skip


def faulty(faults: list[dict]) -> list[str]:
    return [str(ROOT / "tests" / "faults.py"), json.dumps(faults)]


def records(run_folder: Path, kind: str | None = None) -> list[dict]:
    """Read the records of metrics.jsonl, or those of one kind; asserts that every key is documented."""
    rows = [*map(json.loads, (run_folder / "metrics.jsonl").read_text().splitlines())]
    for row in rows:
        assert [metric(path, row["kind"]) for path in paths(row)]
    return [r for r in rows if kind is None or r["kind"] == kind]


def weights(run_folder: Path) -> dict[str, torch.Tensor]:
    return load_file(run_folder / "final" / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---------------------------------------------------------------------------------------------------- packages


def constraints(name: str) -> dict[str, str]:
    """Versions by name that a file in .ci pins."""
    rows = [line.split("==") for line in (ROOT / ".ci" / name).read_text().splitlines() if "==" in line]
    return {re.sub(r"[-_.]+", "-", k).lower(): v for k, v in rows}
