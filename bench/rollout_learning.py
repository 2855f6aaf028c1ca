"""Compare what `tiny` learns from vLLM with partial and with quantised rollouts, each against its own baseline.

    python bench/rollout_learning.py [--seeds 0 1 2] [--ranks 2] [--runs runs/rollout-learning]
                                     [--out docs/evidence/rollout-learning] [--table]

Trains four variants per seed; the recorded 12 runs took 21 minutes in all. Finished work is kept, so the same command
resumes, also within a run. Prints a table with paired differences and writes it (table.md), a picture (compare.png) and
every run's metrics.jsonl under --out. With --table it trains nothing and only makes table and picture from the records
there. Needs vLLM (`make test-vllm` installs it for CPUs in a separate environment).
"""

import argparse
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from ablation import paired, train

from lead_fast.report import Run, compare, read_run

VARIANTS = {
    "lock step": ("lock-step", []),
    "extra problems at 100 %": ("partial", ["--rollout.extra_problems=32"]),
    "lock step, bfloat16": ("bf16", ["--model.dtype=bfloat16"]),
    "weights and cache in fp8": (
        "fp8",
        ["--model.dtype=bfloat16", "--rollout.quantization=fp8_per_channel", "--rollout.kv_dtype=fp8"],
    ),
}
PAIRS = (("lock step", "extra problems at 100 %"), ("lock step, bfloat16", "weights and cache in fp8"))
MEASURES: dict[str, Callable[[Run], float]] = {
    "pass@1, %": lambda run: 100 * run.evals[-1]["pass_at_1"],
    "gain in pass@1 since the start, points": lambda run: (
        100 * (run.evals[-1]["pass_at_1"] - run.evals[0]["pass_at_1"])
    ),
    "length of correct responses, tokens": lambda run: run.evals[-1]["length_correct"],
}


def differences_table(folders: dict[str, list[Path]]) -> str:
    """Format a Markdown table of what each way of sampling changed, paired by seed."""
    out = "| from → to | at the end | seeds | difference | standard error | values |\n|:--|:--|--:|--:|--:|:--|\n"
    for before, after in PAIRS:
        for name, measure in MEASURES.items():
            a, b = ([measure(read_run(folder)) for folder in folders[label]] for label in (before, after))
            mean, error = paired(a, b)
            each = ", ".join(f"{x:.1f} → {y:.1f}" for x, y in zip(a, b, strict=True))
            shown = "-" if error is None else f"{error:.2f}"
            out += f"| {before} → {after} | {name} | {len(a)} | {mean:+.1f} | {shown} | {each} |\n"
    return out


def main() -> None:
    p = argparse.ArgumentParser(description="Compare partial and quantised rollouts with lock step, on tiny with vLLM.")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--ranks", type=int, default=2)
    p.add_argument("--runs", type=Path, default=Path("runs/rollout-learning"))
    p.add_argument("--out", type=Path, default=Path("docs/evidence/rollout-learning"))
    p.add_argument(
        "--table", action="store_true", help="train nothing; make table and picture from the records in --out"
    )
    a = p.parse_args()
    for seed in a.seeds if not a.table else ():
        for name, args in VARIANTS.values():
            run = a.runs / f"{name}-{seed}"
            train(run, ["--recipe=tiny", "--rollout.engine=vllm", f"--seed={seed}", *args], dict(os.environ), a.ranks)
            (a.out / run.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(run / "metrics.jsonl", a.out / run.name / "metrics.jsonl")
    folders = {label: [a.out / f"{name}-{seed}" for seed in a.seeds] for label, (name, _) in VARIANTS.items()}
    table, _ = compare(folders, a.out)
    with table.open("a", encoding="utf-8") as f:
        f.write(
            f"\n{differences_table(folders)}\nMean paired difference over seeds, and its standard error. A run is "
            "evaluated by its own engine: one with fp8 from rounded weights and a rounded cache, at the start too.\n"
        )
    print(table.read_text(encoding="utf-8"))


if __name__ == "__main__":
    try:
        main()
    except ValueError as e:
        sys.exit(f"error: {e}")
