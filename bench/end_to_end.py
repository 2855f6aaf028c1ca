"""Seconds per step and until 80 % of held-out problems are solved, compared with TRL's GRPOTrainer in one run.

    python bench/end_to_end.py [--steps 10] [--turns 3] [--to 0.8] [--model DIR]
        [--engines transformers vllm]

The job is bench/frozen_tiny.toml: 32 problems with 8 responses each per step, the embedded model in float32, two ranks
with one thread each. All contestants train the same model on the same problems with the same number of responses, the
same limit on their tokens, AdamW at the same rate and our verifier's verdict (1 for correct, -1 for wrong); lead-fast
adds its length reward and difficulty weight. Runs take turns; the first two steps of each are left out. Seconds to an
accuracy are those of training alone: evaluations (every 5 steps, 256 problems with two responses each) are not counted.

With --model DIR, or --model smollm2 after `make smollm2`, that model is timed: 4 problems with 4 responses of at most
128 tokens per step, and no accuracy.

TRL is measured where it is installed (pip install trl==1.16.0 accelerate), vLLM where it is.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import RESULTS, machine, write_json
from pipeline import pretrained

ROOT = Path(__file__).resolve().parent.parent
FROZEN = ROOT / "bench" / "frozen_tiny.toml"
WARM_UP = 2  # steps left out of the seconds per step


def launch(ranks: int, *command: str) -> None:
    """Run a command under torchrun, one thread per rank."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"]
    done = subprocess.run([*torchrun, *command], env=env, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        )


def job(a: argparse.Namespace) -> list[str]:
    """Return the keys that turn the frozen job into the requested one."""
    if not a.model:
        return [f"--steps={a.steps}"]
    return [f"--steps={a.steps}", f"--model={a.model}", "--rollout.problems=4", "--rollout.group_size=4",
            "--evaluate.every=0", "--data.instruction=Put the final answer within \\boxed{}"]  # fmt: skip


def lead_fast(a: argparse.Namespace, engine: str, every: int) -> dict[str, Any]:
    """Seconds of each step by the run's own clock, and accuracies by step."""
    with tempfile.TemporaryDirectory() as folder:
        keys = [*job(a), f"--output={folder}/run", f"--rollout.engine={engine}", f"--evaluate.every={every}"]
        launch(a.ranks, "-m", "lead_fast.train", f"--config={FROZEN}", *keys)
        rows = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    train = [r for r in rows if r["kind"] == "train"]
    return {
        "seconds": [sum(s for phase, s in r["seconds"].items() if phase not in ("evaluate", "save")) for r in train],
        "rollout": [r["seconds"]["rollout"] for r in train],
        "accuracy": {r["step"]: r["pass_at_1"] for r in rows if r["kind"] == "eval"},
    }


def trl(a: argparse.Namespace, every: int) -> dict[str, Any]:
    """Measure the same of TRL's GRPOTrainer, in its own processes."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [f"--{k}={getattr(a, k)}" for k in ("steps", "ranks", "model") if getattr(a, k)]
        launch(
            a.ranks, str(ROOT / "bench" / "end_to_end.py"), f"--trl={folder}/out.json", f"--every={every}", *arguments
        )
        return json.loads((Path(folder) / "out.json").read_text())


def run_trl(a: argparse.Namespace) -> None:
    """Train by GRPOTrainer and write its seconds and accuracies; one rank of a torchrun job."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer  # type: ignore

    from lead_fast.cli import load_config
    from lead_fast.data.prompts import load_test, load_train
    from lead_fast.learner.model import load_tokenizer, resolve
    from lead_fast.reward.extraction import extract_boxed
    from lead_fast.reward.verifier import Verifier
    from lead_fast.rollout.engine import token_id

    torch.set_num_threads(1)
    config = load_config([f"--config={FROZEN}", *job(a)])
    tokenizer = load_tokenizer(config.model)
    problems, prompts = load_train(config, tokenizer)
    test, test_prompts = load_test(config, tokenizer)
    rows = config.rollout.problems * config.rollout.group_size // a.ranks
    stack = contextlib.ExitStack()
    verifier = stack.enter_context(Verifier())

    def right(texts: list[str], references: list[str]) -> list[bool]:
        return verifier.grade(list(zip(map(extract_boxed, texts), references, strict=True)))

    def reward(completions: list[str], reference: list[str], **_: Any) -> list[float]:
        return [1.0 if ok else -1.0 for ok in right(completions, reference)]

    settings = GRPOConfig(
        output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, per_device_train_batch_size=rows, max_steps=a.steps,
        num_generations=config.rollout.group_size, max_completion_length=config.rollout.max_tokens, beta=0.0,
        temperature=config.rollout.temperature, learning_rate=config.optim.lr, lr_scheduler_type="constant",
        loss_type="grpo", gradient_checkpointing=False, report_to=[], save_strategy="no", logging_strategy="no",
        disable_tqdm=True, max_grad_norm=config.optim.grad_clip, adam_beta2=config.optim.betas[1],
        weight_decay=config.optim.weight_decay,
    )  # fmt: skip
    data = Dataset.from_list(
        [{"prompt": tokenizer.decode(ids), "reference": p.reference} for ids, p in zip(prompts, problems, strict=True)]
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(resolve(config.model.path), dtype=torch.float32),
        reward_funcs=reward, processing_class=tokenizer, args=settings, train_dataset=data,
    )  # fmt: skip
    seconds, accuracy = [], {}

    def evaluate(model: Any, step: int) -> None:
        places = range(trainer.accelerator.process_index, len(test), a.ranks)
        pad = token_id(tokenizer, "pad")
        longest = max(len(test_prompts[i]) for i in places)
        ids = torch.tensor([[pad] * (longest - len(test_prompts[i])) + test_prompts[i] for i in places])
        out = model.generate(
            input_ids=ids, attention_mask=torch.ne(ids, pad).to(torch.int64), do_sample=True, temperature=1.0,
            num_return_sequences=2, max_new_tokens=config.rollout.max_tokens, top_k=0,
            pad_token_id=pad,
        )  # fmt: skip
        texts = tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
        ok = torch.tensor([float(sum(right(texts, [test[i].reference for i in places for _ in range(2)])))])
        torch.distributed.all_reduce(ok)
        accuracy[step] = ok.item() / (2 * len(test))

    class Clock(TrainerCallback):
        began = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            torch.distributed.barrier()
            self.began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            torch.distributed.barrier()
            seconds.append(time.perf_counter() - self.began)
            if a.every and state.global_step % a.every == 0:
                inner = trainer.accelerator.unwrap_model(trainer.model)
                inner.eval()
                with torch.no_grad():
                    evaluate(inner, state.global_step)
                inner.train()

    trainer.add_callback(Clock())
    trainer.train()
    if trainer.accelerator.is_main_process:
        Path(a.trl).write_text(json.dumps({"seconds": seconds, "accuracy": accuracy}))
    stack.close()


def seconds_to(run: dict[str, Any], accuracy: float) -> float | None:
    """Seconds of training until an evaluation reaches this accuracy; None if none does."""
    reached = [int(step) for step, value in run["accuracy"].items() if value >= accuracy]
    return sum(run["seconds"][: min(reached)]) if reached else None


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("--steps", type=int, default=0, help="steps of a run; default 30, with --model 5")
    p.add_argument("--turns", type=int, default=3, help="runs of every contestant")
    p.add_argument("--ranks", type=int, default=2)
    p.add_argument("--to", type=float, default=0.8, help="accuracy to reach")
    p.add_argument("--model", default="", help="smollm2, or folder of another model; seconds per step alone")
    p.add_argument("--engines", nargs="+", default=["transformers"], help="of lead-fast: transformers vllm")
    p.add_argument("--out", type=Path, default=None, help="JSON file; default bench/results/end_to_end-MODEL.json")
    p.add_argument("--trl", default="", help=argparse.SUPPRESS)
    p.add_argument("--every", type=int, default=0, help=argparse.SUPPRESS)
    a = p.parse_args()
    a.steps = a.steps or (5 if a.model else 30)
    if a.trl:
        return run_trl(a)
    name = Path(a.model).name or "tiny"
    if a.model == "smollm2":
        a.model = pretrained(ROOT / "runs" / "pipeline" / "base")
    every = 0 if a.model else 5
    contestants: dict[str, Any] = {f"lead-fast, {e}": (lambda e=e: lead_fast(a, e, every)) for e in a.engines}
    if importlib.util.find_spec("trl"):
        contestants["TRL"] = lambda: trl(a, every)
    else:
        print("TRL is not installed and not measured: pip install trl==1.16.0 accelerate")
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in contestants}
    for turn in range(a.turns):
        for contestant, run in contestants.items():
            runs[contestant].append(run())
            seconds = statistics.median(runs[contestant][-1]["seconds"][WARM_UP:])
            print(f"turn {turn + 1}, {contestant}: {seconds:.2f} s per step", flush=True)
    table = {}
    for contestant, those in runs.items():
        steps = [statistics.median(r["seconds"][WARM_UP:]) for r in those]
        reached = [s for r in those if (s := seconds_to(r, a.to)) is not None]
        table[contestant] = {
            "seconds_per_step": statistics.median(steps),
            "least": min(steps),
            "most": max(steps),
            "rollout_s": statistics.median(s for r in those for s in r["rollout"][WARM_UP:])
            if "rollout" in those[0]
            else None,
            f"seconds_to_{a.to:g}": statistics.median(reached) if len(reached) == len(those) else None,
        }
    best = table[next(iter(table))]
    print(f"\n{'':24}{'s per step':>12}{'least':>8}{'most':>8}{'rollout':>9}{f's to {100 * a.to:g} %':>12}{'ratio':>8}")
    for contestant, r in table.items():
        reached = r[f"seconds_to_{a.to:g}"]
        print(
            f"{contestant:24}{r['seconds_per_step']:12.2f}{r['least']:8.2f}{r['most']:8.2f}"
            f"{'-' if r['rollout_s'] is None else format(r['rollout_s'], '.2f'):>9}"
            f"{'-' if reached is None else format(reached, '.1f'):>12}"
            f"{r['seconds_per_step'] / best['seconds_per_step']:8.2f}"
        )
    write_json(
        a.out or RESULTS / f"end_to_end-{name}.json", {**machine("cpu"), "steps": a.steps, "table": table, "runs": runs}
    )


if __name__ == "__main__":
    main()
