"""The paper's ablation at the scale of `tiny`: plain GRPO, L, L + AD, LEAD, the same budget and seeds.

    python bench/ablation.py [--seeds 0 1 2] [--ranks 2] [--runs runs/ablation] [--out docs/ablation]

Finished runs are kept, so an interrupted ablation resumes. Writes a table (table.md), a
picture (compare.png) and every run's metrics.jsonl under --out.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

VARIANTS = {"GRPO": "grpo", "L": "l", "L + AD": "l-ad", "LEAD": "paper"}


def main() -> None:
    p = argparse.ArgumentParser(description="The paper's ablation at the scale of tiny.")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--ranks", type=int, default=2)
    p.add_argument("--recipe", default="tiny")
    p.add_argument("--runs", type=Path, default=Path("runs/ablation"))
    p.add_argument("--out", type=Path, default=Path("docs/ablation"))
    a = p.parse_args()
    folders: dict[str, list[Path]] = {label: [] for label in VARIANTS}
    for seed in a.seeds:  # seed by seed, so that a part of the ablation compares all variants
        for label, preset in VARIANTS.items():
            run = a.runs / f"{preset}-{seed}"
            folders[label].append(run)
            if (run / "final").exists():
                continue
            shutil.rmtree(run, ignore_errors=True)
            command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={a.ranks}", "--standalone",
                       "-m", "lead_fast.train", f"--recipe={a.recipe}", f"--preset={preset}", f"--seed={seed}",
                       f"--output={run}"]  # fmt: skip
            print(" ".join(command[1:]), flush=True)
            subprocess.run(command, check=True)
    for runs in folders.values():
        for run in runs:
            (a.out / run.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(run / "metrics.jsonl", a.out / run.name / "metrics.jsonl")
    compare = [f"{label}={','.join(str(a.out / r.name) for r in runs)}" for label, runs in folders.items()]
    subprocess.run([sys.executable, "-m", "lead_fast.report", "--compare", *compare, "--out", str(a.out)], check=True)


if __name__ == "__main__":
    main()
