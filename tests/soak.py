"""Run the long reliability tests: many steps, kills and gradings. `make soak` writes docs/evidence/soak.json.

    python tests/soak.py [--steps 500] [--kills 25] [--gradings 100000] [--out docs/evidence/soak.json]

A part with 0 is skipped, and an earlier result of it is kept. The exit code is not 0 if a promise of
docs/reliability.md was broken.
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

import hostile
import numpy as np
from jobs import Job, faulty, same, small, weights

from lead_fast.records import Response
from lead_fast.reward.grading import score
from lead_fast.reward.verifier import Verifier
from lead_fast.runtime.jsonl import read_jsonl

ROOT = Path(__file__).parent.parent
FULL = {"steps": 500, "kills": 25, "gradings": 100_000}
PHASES = [
    "rollout",
    "reward",
    "advantage",
    "pack",
    "forward",
    "backward",
    "optim",
    "sync",
    "save",
    "writing",
    "written",
    "listed",
    "renamed",
]
MB = 1 << 20


def resident_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / MB


def open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def slope(x: list[float], y: list[float]) -> float:
    return float(np.polyfit(x, y, 1)[0])


def many_steps(steps: int, folder: Path) -> tuple[dict, list[str]]:
    """Measure memory, open files and step times of a long run on two ranks; the first fifth counts as warm-up."""
    run = folder / "steps"
    args = small(
        folder,
        f"--output={run}",
        f"--steps={steps}",
        "--checkpoint_every=50",
        "--optim.lr=1e-4",
        "--evaluate.every=100",
        "--evaluate.problems=16",
    )
    job = Job(2, "-m", "lead_fast.train", *args, out=folder / "out.txt")
    rows: dict[str, list[tuple[int, float, int]]] = {}
    load = []  # load of the machine: other work on it slows steps too
    while job.process.poll() is None:
        time.sleep(1)
        load.append(os.getloadavg()[0])
        path = run / "metrics.jsonl"
        step = path.read_bytes().count(b'"kind": "train"') if path.exists() else 0
        ranks = job.ranks()
        for i, pid in enumerate([*ranks, *job.checkers()]):
            try:
                name = f"rank {i}" if i < len(ranks) else f"checker {i - len(ranks)}"
                if mb := resident_mb(pid):  # 0: the process is a zombie
                    rows.setdefault(f"{name} ({pid})", []).append((step, mb, open_files(pid)))
            except OSError:  # the process has just ended
                continue
    job.wait()
    records = [r for r in read_jsonl(run / "metrics.jsonl") if r["kind"] == "train"]
    seconds = [sum(s for phase, s in r["seconds"].items() if phase not in ("save", "evaluate")) for r in records]
    median = statistics.median(seconds)
    slow = [r["step"] for r, s in zip(records, seconds, strict=True) if s > 5 * median]
    processes, broken = {}, []
    for name, samples in rows.items():
        warm = [s for s in samples if steps / 5 <= s[0] < steps]  # the export at the end is not a step
        if len(warm) < 10:
            continue
        at, mb, files = zip(*warm, strict=True)
        grown = slope(at, mb)
        processes[name.split(" (")[0]] = {
            "resident_mb_first": round(mb[0], 1),
            "resident_mb_last": round(mb[-1], 1),
            "slope_mb_per_100_steps": round(100 * grown, 3),
            "open_files_min": min(files),
            "open_files_max": max(files),
            "samples": len(warm),
        }
        if 100 * grown > 0.02 * mb[0]:
            broken.append(f"{name} grows by {100 * grown:.1f} MB in 100 steps")
        if statistics.median(files[-10:]) > statistics.median(files[:10]) + 2:
            broken.append(f"{name} keeps opening files: {files[0]} to {files[-1]}")
    if job.code or len(records) != steps or job.alive():
        broken.append(f"the run ended with {job.code} after {len(records)} steps")
    if slow[1:]:  # the first step of a process is warm-up
        broken.append(f"steps slower than 5 times the median: {slow}")
    measured = {
        "steps": len(records),
        "median_step_s": round(median, 3),
        "slowest_over_median": round(max(seconds) / median, 2),
        "steps_over_5_medians": slow,
        "load_average_max": round(max(load), 1),
        "processes": processes,
    }
    return measured, broken


def many_kills(kills: int, folder: Path, rng: random.Random) -> tuple[dict, list[str]]:
    """Send SIGKILL to a rank in every phase, then at random times; compare final weights with an uninterrupted run."""
    steps = 2 * kills + 10
    job = Job(2, "-m", "lead_fast.train", *small(folder, f"--output={folder / 'unbroken'}", f"--steps={steps}"))
    job.wait()
    assert job.code == 0
    wanted = weights(folder / "unbroken")
    log, broken, ends, compared, run = [], [], [], 0, folder / "killed-0"
    while len(log) < kills:
        args = small(folder, f"--output={run}", f"--steps={steps}", "--resume")
        rank = rng.randrange(2)
        if len(log) < len(PHASES):
            phase, step = PHASES[len(log)], len(log) + 2
            job = Job(2, *faulty([{"do": "kill", "at": phase, "step": step, "rank": rank}]), *args)
            how = f"{phase}, step {step}, rank {rank}"
            job_out = job.wait(timeout=180)
            killed = f"fault: kill at {phase}" in job_out
            took = None
        else:
            delay = rng.uniform(0, 14)
            job = Job(2, "-m", "lead_fast.train", *args)
            until = time.monotonic() + 60
            while len(job.ranks()) < 2 and time.monotonic() < until:
                time.sleep(0.05)
            time.sleep(delay)
            pids = job.ranks()
            killed = len(pids) == 2 and job.process.poll() is None
            if killed:
                os.kill(pids[rank], signal.SIGKILL)
            began = time.monotonic()
            job.wait(timeout=180)
            took = round(time.monotonic() - began, 1)
            how = f"{delay:.1f} s after its start, rank {rank}"
        if killed and job.code:
            log.append(how)
            if took is not None:
                ends.append(took)
        left = job.alive()
        if left:
            broken.append(f"killed at {how}: processes {left} were left")
        if killed and not job.code and not (run / "final").exists():
            broken.append(f"killed at {how}: the job ended with 0")
        if (
            run / "final" / "model.safetensors"
        ).exists() and not job.code:  # the job had finished: the next kill hits the next job
            compared += 1
            if not same(weights(run), wanted):
                broken.append(f"{run.name}: other weights than the unbroken run")
            run = folder / f"killed-{compared}"
        print(f"kill {len(log)}/{kills}: {how}, exit {job.code}", flush=True)
    job = Job(2, "-m", "lead_fast.train", *small(folder, f"--output={run}", f"--steps={steps}", "--resume"))
    job.wait()
    compared += 1
    if job.code or not same(weights(run), wanted):
        broken.append("the last run's weights are not those of the unbroken run")
    measured = {
        "kills": len(log),
        "at_a_phase": min(len(log), len(PHASES)),
        "runs_compared_bit_for_bit": compared,
        "where": log,
        "seconds_from_kill_to_exit_max": max(ends, default=None),
    }
    return measured, broken


def many_gradings(n: int, folder: Path, rng: random.Random) -> tuple[dict, list[str]]:
    """Grade fractions whose equality is known, and one hostile answer per hundred, with one Verifier."""
    mark = folder / "mark"
    harm = hostile.generated(n // 100 + 1, seed=1)
    mistakes: list[str] = []
    grader_mb, checker = [], []
    with Verifier(timeout_s=20.0) as v:
        v.grade([(r"\sum_{k=1}^{3} k", "6")])  # starts the worker
        v.timeout_s = 2.0
        for i in range(n):
            a, b, k = rng.randint(1, 10**6), rng.randint(2, 10**4), rng.randint(2, 99)
            if i % 100 == 99:
                text, gold, right = next(harm).replace("MARK", str(mark)), rng.choice(hostile.GOLDS), False
            else:
                right = rng.random() < 0.5
                text = f"so \\boxed{{\\frac{{{k * a}}}{{{k * b}}}}}"
                gold = f"\\frac{{{a if right else a + 1}}}{{{b}}}"
            (s,) = score([Response([1], [-0.1], "stop", text, 0)], [gold], v)
            if s.correct != right:
                mistakes.append(f"{text[:100]!r} against {gold!r}: {s.correct}")
            if i % max(1, n // 100) == 0:
                grader_mb.append(resident_mb(os.getpid()))
                if v.worker.process:
                    checker.append(resident_mb(v.worker.process.pid))
            if i % max(1, n // 10) == 0:
                print(f"gradings {i}/{n}, {v.kills} checkers replaced", flush=True)
        kills = v.kills
    warm = grader_mb[len(grader_mb) // 5 :]
    measured = {
        "gradings": n,
        "mistakes": len(mistakes),
        "false_correct": sum(": True" in m for m in mistakes),
        "checkers_replaced": kills,
        "resident_mb_first_warm_last_max": [
            round(x, 1) for x in (grader_mb[0], warm[0], grader_mb[-1], max(grader_mb))
        ],
        "checker_resident_mb_min_max": [round(min(checker), 1), round(max(checker), 1)],
        "slope_mb_per_10000": round(slope(list(range(len(warm))), warm) / (n / 100) * 10_000, 3),
    }
    broken = [f"graded wrong: {m}" for m in mistakes[:5]] + (["code in an answer was run"] if mark.exists() else [])
    if max(grader_mb) - warm[0] > 150 or max(checker) > 1500:
        broken.append(f"memory of gradings grows: {measured}")
    return measured, broken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for part, most in FULL.items():
        parser.add_argument(f"--{part}", type=int, default=most)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "evidence" / "soak.json")
    asked = parser.parse_args()
    result = json.loads(asked.out.read_text()) if asked.out.exists() else {}
    rng, folder, failed = random.Random(7), Path(tempfile.mkdtemp(prefix="soak-")), []
    parts = {
        "steps": lambda n: many_steps(n, folder),
        "kills": lambda n: many_kills(n, folder, rng),
        "gradings": lambda n: many_gradings(n, folder, rng),
    }
    for part, run in parts.items():
        if n := getattr(asked, part):
            began = time.monotonic()
            measured, broken = run(n)
            failed += broken
            result[part] = {
                "date": time.strftime("%Y-%m-%d"),
                "command": f"python tests/soak.py --{part} {n}",
                "full": FULL[part],
                "cores": os.cpu_count(),
                "took_s": round(time.monotonic() - began),
                "broken": broken,
                **measured,
            }
            asked.out.write_text(json.dumps(result, indent=1) + "\n")
            print(json.dumps({part: result[part]}, indent=1), flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    sys.exit("\n".join(failed) if failed else 0)


if __name__ == "__main__":
    main()
