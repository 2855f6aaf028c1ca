"""Checks that need a GPU, in ten minutes: seven parts, the most important first, each a process with a time limit.

    python bench/gpu.py [--device cuda|cpu] [--parts 1,3] [--limit_s 600] [--out FOLDER]

1 kernels      the tests of tests/device on this device: kernels, attention, a small policy's gradient, FSDP2
2 iterations   an iteration of vLLM with 8, 32 and 64 sequences on 1, 2 and 4 GPUs, Qwen2.5-14B's shape
3 rows         the row kernel beside a copy of the logits, and where Nsight Compute is there the bytes it moves
4 head         head and loss beside three bare products and Liger, by rows of a chunk; d(head) in float32 and bfloat16
5 step         a training step of Qwen2.5-14B's shape on one GPU, 8,192 and 14,336 tokens, without an optimiser
6 engine       sleep, wake, sync and canary of vLLM beside a trainer, `tiny`
7 attention    each installed implementation against plain attention, and its rate forward and backward

Every part writes its result (in FOLDER, default bench/results, as JSON) after each measurement, so that a
machine that is taken away leaves what was measured. A part that lacks something says so in a sentence and the next one
runs; one that crashes or reaches its limit does not stop the next. `python -m lead_fast.plan` reads the results of its
device. On a CPU the shapes are small and the times mean nothing: it shows that the way there works.
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
CPU_PATIENCE = 4  # times a part's limit, where the device is not what the limits are for
START_S = 10  # in which a part's process has started and imported torch
LEAST_S = 5  # what is left of the whole time when no further part is begun


@dataclass(frozen=True)
class Part:
    """number and name of a part, and its limit in seconds; together they fit ten minutes."""

    number: int
    name: str
    limit_s: float


PARTS = (Part(1, "kernels", 110), Part(2, "iterations", 165), Part(3, "rows", 40), Part(4, "head", 60),
         Part(5, "step", 110), Part(6, "engine", 75), Part(7, "attention", 40))  # fmt: skip


def device_key(device: str) -> str:
    """What files of this device begin with: `cpu`, or `gpu-` and the device's name as lead_fast.plan knows it."""
    if device == "cpu":
        return "cpu"
    name = torch.cuda.get_device_name().lower()
    model = re.search(r"\b(?:[abhlg]{1,2}|rtx |mi)\d+\w*\b", name)
    kind = next((f"-{k}" for k in ("pcie", "nvl", "40gb") if k in name), "")  # other rates than those of SXM
    return "gpu-" + re.sub(r"[^a-z0-9]+", "-", model[0] if model else name).strip("-") + kind


def command_of(part: Part, device: str, file: Path, limit_s: float) -> list[str]:
    return [sys.executable, "-W", "ignore", str(HERE / "gpu_parts.py"), part.name, f"--device={device}",
            f"--file={file}", f"--limit_s={max(limit_s / 2, limit_s - START_S):.0f}"]  # fmt: skip


def run_part(command: Sequence[str], file: Path, limit_s: float, about: dict[str, Any]) -> dict[str, Any]:
    """Run a part in a session of its own, no longer than its limit; complete its file with how it ended.

    Returns:
        what the file holds: `status` is measured, skipped, cut (at its limit) or failed, `reason` says why.
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
    """End a part and what it started: torchrun's ranks are in sessions of their own, and carry the part's mark."""
    child.kill()
    child.wait()
    for p in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended meanwhile, or another user's
            if f"{MARK}={mark}".encode() in (p / "environ").read_bytes():
                os.kill(int(p.name), signal.SIGKILL)


def last_words(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return (lines or ["it said nothing"])[-1].strip()[:300]


def table(results: Sequence[tuple[Part, dict[str, Any]]]) -> str:
    """Goals of all parts: what was aimed at, what was measured, and the share of the goal that was reached."""
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
    """The parts of a list such as "1,3", in their own order. Raises ValueError for one that does not exist."""
    wanted = [w.strip() for w in text.split(",") if w.strip()]
    known = {str(p.number): p for p in PARTS}
    if not wanted or (unknown := [w for w in wanted if w not in known]):
        first = unknown[0] if wanted else text
        raise ValueError(f"--parts is {text!r}, and {first!r} is no part: give numbers of {', '.join(known)}.")
    return [p for number, p in known.items() if number in wanted]


def main(args: list[str] | None = None) -> int:
    cuda = torch.cuda.is_available()
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--device", default="cuda" if cuda else "cpu", choices=["cuda", "cpu"])
    p.add_argument("--parts", default=",".join(str(part.number) for part in PARTS), help="such as 1,3; default: all")
    p.add_argument("--limit_s", type=float, default=600, help="of all parts together, seconds")
    p.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    a = p.parse_args(args)
    if a.device == "cuda" and not cuda:
        raise ValueError("--device is cuda, and torch sees no GPU here: give --device cpu, which tries the way there.")
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
            result: dict[str, Any] = {"status": "skipped", "reason": f"no time was left of {a.limit_s:g} s"}
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
