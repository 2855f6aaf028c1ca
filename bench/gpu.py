"""Measure on a GPU in at most ten minutes: tests, row kernel, head, training step, vLLM, attention; seven parts.

    python bench/gpu.py [--device cuda|cpu] [--parts 1,3] [--limit_s 600] [--out FOLDER]

1 kernels      runs the tests of tests/device: kernels, attention, a small policy's gradient, FSDP2
2 iterations   times a vLLM iteration with 8, 32 and 64 sequences on 1, 2 and 4 GPUs, in Qwen2.5-14B's shape
3 rows         times the row kernel against a copy of the logits; counts its bytes if Nsight Compute is installed
4 head         times head and loss against three bare products and Liger, by rows per chunk; d(head) in two dtypes
5 step         times a training step in Qwen2.5-14B's shape on one GPU, 8,192 and 14,336 tokens, no optimiser
6 engine       runs sleep, wake, sync and canary of vLLM beside a trainer of `tiny`
7 attention    checks each installed implementation against plain attention and times it, forward and backward

Parts run in order of importance, each in a process with a time limit. It prints a line per part, and at the end a table
of every goal with the value measured and the share of the goal reached. A part writes its result as JSON to FOLDER
(default: bench/results) after each measurement, so nothing measured is lost if the machine is taken away. A part that
lacks a requirement says so in one sentence, and a part that crashes or reaches its limit does not stop the next.
`python -m lead_fast.plan` reads the results of its device. On a CPU the shapes are small and the times mean nothing:
such a run only shows that the parts work.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, machine, write_json

HERE = Path(__file__).resolve().parent
MARK = "LEAD_GPU_PART"  # environment variable of every process of a part
CPU_PATIENCE = 4  # factor on a part's limit on a CPU: the limits are meant for a GPU
START_S = 10  # within this time a part's process has started and imported torch
LEAST_S = 5  # no part is started with less time left than this


@dataclass(frozen=True)
class Part:
    """Number and name of a part, and its time limit in seconds; all limits together are within ten minutes."""

    number: int
    name: str
    limit_s: float


PARTS = (Part(1, "kernels", 110), Part(2, "iterations", 165), Part(3, "rows", 40), Part(4, "head", 60),
         Part(5, "step", 110), Part(6, "engine", 75), Part(7, "attention", 40))  # fmt: skip


def device_key(device: str) -> str:
    """Prefix of this device's result files: `cpu`, or `gpu-` and the device's name in lead_fast.plan."""
    if device == "cpu":
        return "cpu"
    name = torch.cuda.get_device_name().lower()
    model = re.search(r"\b(?:[abhlg]{1,2}|rtx |mi)\d+\w*\b", name)
    kind = next((f"-{k}" for k in ("pcie", "nvl", "40gb") if k in name), "")  # whose rates differ from SXM's
    return "gpu-" + re.sub(r"[^a-z0-9]+", "-", model[0] if model else name).strip("-") + kind


def command_of(part: Part, device: str, file: Path, limit_s: float) -> list[str]:
    return [sys.executable, "-W", "ignore", str(HERE / "gpu_parts.py"), part.name, f"--device={device}",
            f"--file={file}", f"--limit_s={max(limit_s / 2, limit_s - START_S):.0f}"]  # fmt: skip


def run_part(command: Sequence[str], file: Path, limit_s: float, about: dict[str, Any]) -> dict[str, Any]:
    """Run a part in a new session, no longer than its limit; add to its file how it ended.

    Returns:
        the file's content: `status` is measured, skipped, cut (at its limit) or failed; `reason` says why.
    """
    file.unlink(missing_ok=True)
    began, log, mark = time.monotonic(), file.with_suffix(".log"), uuid.uuid4().hex
    with log.open("w") as out:
        child = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | {MARK: mark})
        try:
            code = child.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end_processes(child, mark)
    result = about | (json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {})
    if code is None:
        result |= {"status": "cut", "reason": f"it reached its limit of {limit_s:.0f} s"}
    elif code or "status" not in result:
        result |= {"status": "failed", "reason": last_words(log)}
    result["seconds"] = round(time.monotonic() - began, 1)
    write_json(file, result, quiet=True)
    if result.get("status") in ("measured", "skipped"):
        log.unlink()
    return result


def end_processes(child: subprocess.Popen, mark: str) -> None:
    """Kill a part and what it started: torchrun's ranks run in other sessions, but carry the part's mark."""
    child.kill()
    child.wait()
    for p in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # the process has ended, or belongs to another user
            if f"{MARK}={mark}".encode() in (p / "environ").read_bytes():
                os.kill(int(p.name), signal.SIGKILL)


def last_words(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return (lines or ["it printed nothing"])[-1].strip()[:300]


def table(results: Sequence[tuple[Part, dict[str, Any]]]) -> str:
    """Format the goals of all parts: aim, measured value, and share of the goal that was reached."""
    lines = [f"{'goal':58} {'aim':>12} {'measured':>12} {'share':>7}"]
    for part, result in results:
        for g in result.get("goals", []):
            lines.append(f"{part.number} {g['goal'][:56]:56} {number(g['aim'], g['unit']):>12} "
                         f"{number(g['measured'], g['unit']):>12} {100 * g['share']:6.0f}%")  # fmt: skip
        if result["status"] != "measured":
            lines.append(f"{part.number} {part.name}: {result['status']}, {result['reason']}")
        lines += [f"  {sentence}" for sentence in result.get("left_out", [])]
    return "\n".join(lines)


def number(value: float, unit: str) -> str:
    return f"{value:,.{0 if value >= 1000 or unit == 'tests' else 2}f} {unit}"


def asked_parts(text: str) -> list[Part]:
    """Parts named in a list such as "1,3", in order of importance. Raises ValueError for a part that does not exist."""
    wanted = [w.strip() for w in text.split(",") if w.strip()]
    known = {str(p.number): p for p in PARTS}
    if not wanted or (unknown := [w for w in wanted if w not in known]):
        first = unknown[0] if wanted else text
        raise ValueError(f"--parts is {text!r}, and {first!r} is not a part: give numbers from {', '.join(known)}.")
    return [p for number, p in known.items() if number in wanted]


def main(args: list[str] | None = None) -> int:
    cuda = torch.cuda.is_available()
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--device", default="cuda" if cuda else "cpu", choices=["cuda", "cpu"])
    p.add_argument(
        "--parts", default=",".join(str(part.number) for part in PARTS), help="parts to run, such as 1,3; default: all"
    )
    p.add_argument("--limit_s", type=float, default=600, help="time limit of all parts together, seconds")
    p.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    a = p.parse_args(args)
    if a.device == "cuda" and not cuda:
        raise ValueError(
            "--device is cuda, but torch sees no GPU: give --device cpu, which tries the parts on small shapes."
        )
    if a.limit_s <= 0:
        raise ValueError(f"--limit_s is {a.limit_s:g}: give seconds above 0.")
    parts, until = asked_parts(a.parts), time.monotonic() + a.limit_s
    a.out.mkdir(parents=True, exist_ok=True)
    about = machine(a.device)
    print(f"{about['device']}, torch {torch.__version__}; results in {a.out}", flush=True)
    results: list[tuple[Part, dict[str, Any]]] = []
    for part in parts:
        file = a.out / f"{device_key(a.device)}-{part.number}-{part.name}.json"
        left = until - time.monotonic()
        if left < LEAST_S:
            result: dict[str, Any] = {"status": "skipped", "reason": f"--limit_s of {a.limit_s:g} s was used up"}
        else:
            limit = min(part.limit_s * (1 if a.device == "cuda" else CPU_PATIENCE), left)
            command = command_of(part, a.device, file, limit)
            result = run_part(command, file, limit, about | {"part": part.number, "name": part.name})
        results.append((part, result))
        print(f"{part.number} {part.name}: {result['status']}"
              + (f", {result['reason']}" if result["status"] != "measured" else f" in {result['seconds']:.0f} s"),
              flush=True)  # fmt: skip
    print("\n" + table(results), flush=True)
    return int(any(result["status"] == "failed" for _, result in results))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as e:
        sys.exit(f"error: {e}")
