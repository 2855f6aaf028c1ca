"""Compare two commits: the same short training runs must give the same numbers, bit for bit.

    python tests/guard.py [OLD] [NEW] [--jobs paper,sft]

OLD defaults to HEAD, NEW to the working tree with its uncommitted and untracked files. Each side is checked out into a
temporary folder, where its C++ extension is built and every job runs from its command line, on two CPU ranks. It
compares metrics.jsonl without the values that differ between any two runs (CLOCKS), responses.jsonl and the final
weights. A key that only NEW has is reported and allowed; a key that only OLD has, or a different value, ends in exit
code 1.
"""

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
CLOCKS = {"elapsed_s", "rollout_idle_share", "seconds", "sync_gb_per_s", "sync_s", "tokens_per_s"}
STEPS = 6
RL = f"""lead_fast.train --recipe tiny --steps={STEPS} --optim.lr=1e-3 --parallel.pack_tokens=256
    --rollout.problems=8 --rollout.group_size=4 --rollout.max_tokens=64 --reward.verifier_timeout_s=60
    --evaluate.every=4 --evaluate.samples=1 --data.train=arithmetic:train?n=64&seed=1
    --data.test=arithmetic:test?n=16&seed=2"""
JOBS = {
    "paper": f"{RL} --preset paper",
    # `tiny` writes no </think>, so every reward would be 0 unless the whole response is graded.
    "official": f"{RL} --preset official --reward.grade=all --rollout.stop=[] --advantage.length_gate=24",
    "grpo": f"{RL} --preset grpo",
    # Options that no preset turns on.
    "clips": f"""{RL} --preset paper --optim.updates=2 --loss.clip_low=0.02 --loss.clip_high=0.03 --loss.dual_clip=1.05
        --advantage.std=mad --advantage.group_filter=uniform --rollout.refill=1 --data.sampling=solve_rate""",
    "recompute": f"""{RL} --preset paper --optim.updates=2 --loss.old_logprobs=recompute --loss.importance_cap=1.02
        --loss.kl_coef=0.01 --loss.mean=constant --rollout.top_k=20 --reward.overlong_buffer=32
        --model.activation_checkpointing=full""",
    "sft": f"""lead_fast.sft --recipe tiny --steps={STEPS} --batch_tokens=1024 --parallel.pack_tokens=256
        --validate_every=3 --optim.warmup_steps=2 --export_dtype=float32 --data.train=arithmetic:train?n=256&seed=11
        --data.test=arithmetic:test?n=16&seed=2""",
}


# Python runs this file first. Otherwise an editable installation would supply any module that a checkout lacks.
SITECUSTOMIZE = """import sys
sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")]
"""


def git(*args: str) -> bytes:
    done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True)
    if done.returncode:
        sys.exit(f"error: git {args[0]}: {done.stderr.decode().strip()}")
    return done.stdout


def check_out(commit: str | None, folder: Path) -> None:
    """Write the files of a commit, or of the working tree, to a folder."""
    if commit:
        tarfile.open(fileobj=io.BytesIO(git("archive", commit))).extractall(folder, filter="data")
        return
    for name in git("ls-files", "-co", "--exclude-standard", "-z").decode().split("\0"):
        if (ROOT / name).is_file():  # a removed file stays listed until the removal is staged
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


def build(folder: Path, built: Path | None) -> None:
    """Build the extension in place, or copy it from the checkout `built` where its sources are the same."""
    inputs = ("setup.py", "pyproject.toml", "csrc/*")
    sources = [[(f.name, f.read_bytes()) for i in inputs for f in sorted(d.glob(i))] for d in (folder, built or folder)]
    if built and sources[0] == sources[1]:
        for so in (built / "kernels").rglob("*.so"):
            shutil.copy(so, folder / so.relative_to(built))
        return
    done = run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], folder)
    if done.returncode or not [*(folder / "kernels").rglob("*.so")]:  # setup.py only warns where compiling fails
        sys.exit(f"The C++ extension was not built:\n{done.stderr[-3000:]}")


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess:
    """Run a command on the code of a checkout, one thread per process, without a GPU or a model hub."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(folder / "kernels")])}
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def train(job: str, folder: Path) -> Path:
    """Run a job on two ranks; returns its run directory."""
    out, began = folder / "runs" / job, time.monotonic()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    done = run([*torchrun, *JOBS[job].split(), f"--output={out}"], folder)
    if done.returncode:
        raise ValueError(f"the {folder.name} run ended with exit code {done.returncode}:\n{done.stderr[-3000:]}")
    print(f"{job}: the {folder.name} run took {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return out


def compare(old: object, new: object, where: str, added: set[str], key: str = "") -> None:
    """Compare two values of a record down to their leaves; keys that only the new one has are added to `added`.

    Raises:
        ValueError: with the first key that differs, its location, and both values.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        added |= {f"{key}{name}" for name in new.keys() - old.keys()}
        for name, value in old.items():
            if name not in new:
                raise ValueError(f"{where}: key {key}{name} vanished, its value was {value!r}")
            if key + name not in CLOCKS:
                compare(value, new[name], where, added, f"{key}{name}.")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            compare(a, b, where, added, f"{key}{i}.")
    elif repr(old) != repr(new):
        raise ValueError(f"{where}: {key.rstrip('.')} was {old!r} and is {new!r}")


def compare_lines(old: Path, new: Path, added: set[str]) -> int:
    """Compare two JSONL files record by record; returns how many there are."""
    a, b = ([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] for path in (old, new))
    for x, y in zip(a, b, strict=False):  # a differing value says more than a differing number of records
        compare(x, y, f"{old.name}, {'evaluation after ' * (x.get('kind') == 'eval')}step {x['step']}", added)
    if len(a) != len(b) or not a:
        raise ValueError(f"{old.name} had {len(a)} records and has {len(b)}")
    return len(a)


def compare_runs(old: Path, new: Path) -> str:
    """Compare metrics, answers and weights of two runs; returns what was compared and equal."""
    added: set[str] = set()
    records = compare_lines(old / "metrics.jsonl", new / "metrics.jsonl", added)
    if (old / "responses.jsonl").exists():  # SFT has none
        compare_lines(old / "responses.jsonl", new / "responses.jsonl", added)
    a, b = (load_file(run / "final" / "model.safetensors") for run in (old, new))
    for name in sorted(a.keys() | b.keys()):
        x, y = (weights.get(name, torch.empty(0)) for weights in (a, b))
        if (x.dtype, x.shape) != (y.dtype, y.shape):
            raise ValueError(f"final weights: {name} was {x.dtype} {[*x.shape]} and is {y.dtype} {[*y.shape]}")
        differ = x.flatten().view(torch.uint8) != y.flatten().view(torch.uint8)
        if differ.any():
            values = [t.flatten()[int(differ.int().argmax()) // t.element_size()].item() for t in (x, y)]
            raise ValueError(f"final weights: a value of {name} was {values[0]!r} and is {values[1]!r}")
    size = sum(x.nbytes for x in a.values())
    new_keys = f"; new keys: {', '.join(sorted(added))}" if added else ""
    return f"{STEPS} steps, {records} records, {size:,} bytes of weights{new_keys}"


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("old", nargs="?", default="HEAD", help="a commit")
    p.add_argument("new", nargs="?", help="a commit; the working tree if absent")
    p.add_argument("--jobs", default=",".join(JOBS), help=f"comma-separated; all: {','.join(JOBS)}")
    a = p.parse_args()
    if unknown := set(a.jobs.split(",")) - JOBS.keys():
        p.error(f"unknown jobs {', '.join(sorted(unknown))}: give some of {', '.join(JOBS)}")
    equal = True
    with tempfile.TemporaryDirectory(prefix="guard-") as folder:
        old, new = Path(folder, "old"), Path(folder, "new")
        for side, commit, built in ((old, a.old, None), (new, a.new, old)):
            check_out(commit, side)
            (side / "sitecustomize.py").write_text(SITECUSTOMIZE)
            build(side, built)
        for job in a.jobs.split(","):
            try:
                print(f"{job}: equal: {compare_runs(train(job, old), train(job, new))}", flush=True)
            except (ValueError, OSError) as e:
                equal = False
                print(f"{job}: different: {e}", flush=True)
    sys.exit(0 if equal else 1)


if __name__ == "__main__":
    main()
