"""Does `tiny` learn by vLLM the same with partial and with quantised rollouts? Each beside its own baseline.

    python bench/rollout_learning.py [--seeds 0 1 2] [--ranks 2] [--runs runs/rollout-learning]
                                     [--out docs/evidence/rollout-learning]

Finished runs are kept, so an interrupted comparison resumes. Writes a table (table.md), a picture (compare.png) and
every run's metrics.jsonl under --out. Needs vLLM (`make test-vllm` installs it for CPUs in an environment of its own).
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

VARIANTS = {
    "lock step": ("lock-step", []),
    "extra problems at 100 %": ("partial", ["--rollout.extra_problems=32"]),
    "lock step, bfloat16": ("bf16", ["--model.dtype=bfloat16"]),
    "weights and cache in fp8": (
        "fp8",
        ["--model.dtype=bfloat16", "--rollout.quantization=fp8_per_channel", "--rollout.kv_dtype=fp8"],
    ),
}


def main() -> None:
    p = argparse.ArgumentParser(description="Partial and quantised rollouts against lock step, on tiny by vLLM.")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--ranks", type=int, default=2)
    p.add_argument("--runs", type=Path, default=Path("runs/rollout-learning"))
    p.add_argument("--out", type=Path, default=Path("docs/evidence/rollout-learning"))
    a = p.parse_args()
    folders: dict[str, list[Path]] = {label: [] for label in VARIANTS}
    for seed in a.seeds:
        for label, (name, args) in VARIANTS.items():
            run = a.runs / f"{name}-{seed}"
            folders[label].append(run)
            if (run / "final").exists():
                continue
            shutil.rmtree(run, ignore_errors=True)
            command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={a.ranks}", "--standalone",
                       "-m", "lead_fast.train", "--recipe=tiny", "--rollout.engine=vllm", f"--seed={seed}", *args,
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
