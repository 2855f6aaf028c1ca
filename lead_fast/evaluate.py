"""Held-out accuracy on the raw 0/1 score: pass@1, its confidence interval, lengths, and both by difficulty.

python -m lead_fast.evaluate --model DIR [--data.test=FILE] [--evaluate.samples=32] [--output=DIR]
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

from .config import Config, check, load_config
from .data import load_problems, tokenize_prompts
from .distributed import Ranks, complaint, start, stop
from .engine import Engine, Progress, Sampling, make_engine, silent
from .model import load_tokenizer
from .reward import Verifier
from .rollout import Batch, gather, grade, rollout
from .schema import Problem


def sampling(c: Config) -> Sampling:
    e, r = c.evaluate, c.rollout
    return Sampling(r.max_tokens, e.temperature, min_p=e.min_p, stop=r.stop)


def load_test(c: Config, tokenizer) -> tuple[list[Problem], list[list[int]]]:
    """Held-out problems and their prompts; those over the prompt limit are refused as in training."""
    problems = load_problems(
        c.data.test,
        split="test",
        problem_column=c.data.problem_column,
        answer_column=c.data.answer_column,
        difficulty_column=c.data.difficulty_column,
        limit=c.evaluate.problems or None,
    )
    return tokenize_prompts(
        problems,
        tokenizer,
        instruction=c.data.instruction,
        max_prompt_tokens=c.data.max_prompt_tokens,
        drop_long=c.data.drop_long_prompts,
    )


def evaluate(
    engine: Engine,
    problems: list[Problem],
    prompts: list[list[int]],
    verifier: Verifier,
    c: Config,
    ranks: Ranks,
    progress: Progress = silent,
) -> tuple[dict, Batch]:
    """Sample every problem `evaluate.samples` times and grade. A collective; the same seed every time.

    Returns:
        the record that metrics.jsonl keeps (see `summary`), and the graded answers.
    """
    share = rollout(
        engine,
        problems,
        prompts,
        c.evaluate.samples,
        sampling(c),
        c.seed + 1,
        ranks,
        progress,
        shared_by=c.rollout.tensor_parallel,
    )
    batch = gather(share, grade(share.groups, verifier, c), ranks)
    return summary(batch, c.evaluate.samples), batch


def summary(batch: Batch, samples: int, resamples: int = 2000) -> dict:
    """Pass@1 with a bootstrap 95 % interval over problems, lengths in tokens, and both by difficulty."""
    correct = np.array([s.correct for s in batch.scores], dtype=float)
    lengths = np.array(batch.lengths, dtype=float)
    rate = correct.reshape(-1, samples).mean(1)
    draws = np.random.default_rng(0).integers(0, len(rate), (resamples, len(rate)))
    low, high = np.quantile(rate[draws].mean(1), [0.025, 0.975])

    def mean(x: np.ndarray) -> float | None:
        return float(x.mean()) if x.size else None

    levels: dict[str, list[int]] = defaultdict(list)
    for i, g in enumerate(batch.groups):
        if g.problem.difficulty is not None:
            levels[f"{g.problem.difficulty:g}"] += range(i * samples, (i + 1) * samples)
    return {
        "problems": len(rate),
        "samples": samples,
        "pass_at_1": float(rate.mean()),
        "pass_at_1_ci": [float(low), float(high)],
        "length_correct": mean(lengths[correct == 1]),
        "length_wrong": mean(lengths[correct == 0]),
        "length_mean": float(lengths.mean()),
        "truncated_share": float(np.mean([s.truncated for s in batch.scores])),
        "by_difficulty": {
            level: {
                "problems": len(rows) // samples,
                "pass_at_1": float(correct[rows].mean()),
                "length_correct": mean(lengths[rows][correct[rows] == 1]),
            }
            for level, rows in sorted(levels.items(), key=lambda kv: float(kv[0]))
        },
    }


def main(args: list[str] | None = None) -> None:
    c = load_config(args, prog="lead_fast.evaluate")
    ranks = start()
    check(c, 1)
    tokenizer = load_tokenizer(c.model)
    problems, prompts = load_test(c, tokenizer)
    engine = make_engine(c, tokenizer, ranks)
    with Verifier(timeout_s=c.reward.verifier_timeout_s) as verifier:
        record, _ = evaluate(engine, problems, prompts, verifier, c, ranks)
    if ranks.main:
        print(json.dumps(record, indent=2))
        if c.output:
            Path(c.output).mkdir(parents=True, exist_ok=True)
            (Path(c.output) / "evaluation.json").write_text(json.dumps(record, indent=2))
    stop()


if __name__ == "__main__":
    try:
        main()
    except ValueError as e:
        sys.exit(complaint(e))
