"""Held-out accuracy on the raw 0/1 score: Pass@1, pass@k, Cons@k and lengths, with intervals (see scores.py).

    torchrun --nproc_per_node N -m lead_fast.evaluate --model DIR --data.test=AIME24 [--evaluate.samples=32 ...]
    ... -m lead_fast.evaluate --model DIR --data.test=LiveCodeBench --allow_code        # docs/livecodebench.md
    python -m lead_fast.evaluate --compare LABEL=DIR LABEL=DIR [--output=DIR]
    python -m lead_fast.evaluate --tables [LABEL=]DIR[,DIR...] ... [--output=DIR]        # docs/tables.md
    python -m lead_fast.evaluate --lighteval DIR [--python=FILE] [--output=DIR]

The set is AIME24, AIME25, MATH500, AMC23, Minerva, OlympiadBench, LiveCodeBench, a hub set or a file. The output folder
gets samples.jsonl (every graded response), evaluation.json, table.md and evaluation.png. Responses that samples.jsonl
already holds are not sampled again, so the same command resumes an evaluation that was stopped. If no recipe is named,
a run directory's own configuration applies (its lengths, instruction and grading, but not the quantisation of its
rollouts), otherwise the recipe `tiny`.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from . import crosscheck, tables
from .checks import check, check_folder, chosen_engine, quantized, responses_at_once
from .cli import dump, load_config, take_dry_run
from .command import run_command
from .config import Config
from .data.livecodebench import load_code_test, parse_source
from .data.prompts import load_test
from .learner.model import load_tokenizer, resolve
from .machine import look_at_machine
from .records import Batch, Problem, Sample
from .report import parse_labelled, samples_rounded
from .reward.function import RewardFunction
from .reward.grading import grade
from .reward.programs import Programs, counted, protection
from .reward.verifier import Verifier
from .rollout.collect import gather, rollout
from .rollout.engine import Engine, EngineFailure, Progress, Sampling, silent
from .rollout.engines import check_engine, make_engine
from .runtime.ranks import Ranks, start, stop
from .runtime.signals import any_rank_caught, stop_on_signals
from .scores import Answered, difference, draw, summary, table, vote


def sampling(c: Config) -> Sampling:
    own, rollout = c.evaluate, c.rollout
    return Sampling(rollout.max_tokens, own.temperature, min_p=own.min_p, stop=rollout.stop)


class Samples:
    """The graded responses in samples.jsonl, one problem per line: existing ones are kept and new ones appended.

    Their texts stay in the file: tens of thousands of problems with long responses would fill a machine's memory.

    Args:
        path: the file; created with the first responses.
        asked: everything that the responses depend on; a file with other values is refused. {} accepts any file.
    """

    def __init__(self, path: Path, asked: dict):
        self.path, self.head = path, {"asked": asked}
        self.done: dict[str, Answered] = {}
        self.complete_bytes = 0  # half a line may follow, left by a kill
        with path.open("rb") if path.is_file() else contextlib.nullcontext([]) as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                if self.complete_bytes:
                    answered = Answered(**{**json.loads(line), "texts": []})
                    self.done[answered.id] = answered
                else:
                    old = json.loads(line).get("asked", {})
                    other = [k for k in {**asked, **old} if old.get(k) != asked.get(k)] if asked else []
                    if other:
                        raise ValueError(
                            f"{path} holds responses sampled with another {other[0]} ({old.get(other[0])!r}, now "
                            f"{asked.get(other[0])!r}): give another --output, or remove the file."
                        )
                self.complete_bytes += len(line)

    def add(self, answered: list[Answered]) -> None:
        """Append complete problems; a kill after this call loses none of them."""
        rows = [json.dumps(dataclasses.asdict(a)) for a in answered]
        text = "".join(line + "\n" for line in ([] if self.complete_bytes else [json.dumps(self.head)]) + rows)
        with self.path.open("r+b" if self.path.is_file() else "wb") as f:
            f.truncate(self.complete_bytes)
            f.seek(self.complete_bytes)
            self.complete_bytes += f.write(text.encode())
        self.done |= {a.id: dataclasses.replace(a, texts=[]) for a in answered}


def majority(samples: list[Sample], verifier: Verifier) -> float | None:
    """A group's majority vote (`scores.vote`); None with fewer than three samples."""
    if len(samples) < 3:
        return None
    return vote([s.score.extracted for s in samples], [s.score.correct for s in samples], verifier.same)


def answered(batch: Batch, votes: dict[int, float | None], *, texts: bool) -> list[Answered]:
    """The groups of a batch as records; `votes` is indexed by position in the batch's problems."""
    return [
        Answered(
            g.problem.id,
            g.problem.problem,
            g.problem.reference,
            g.problem.difficulty,
            [s.score.correct for s in g.samples],
            [s.response.length for s in g.samples],
            [s.score.truncated for s in g.samples],
            [s.score.extracted for s in g.samples],
            [s.response.text for s in g.samples] if texts else [],
            votes[i],
        )
        for i, g in zip(batch.indices, batch.groups, strict=True)
    ]


def evaluate(
    engine: Engine,
    problems: list[Problem],
    prompts: list[list[int]],
    verifier: Verifier | Programs,
    c: Config,
    ranks: Ranks,
    progress: Progress = silent,
    samples: Samples | None = None,
    *,
    function: RewardFunction | None = None,
    leaving: Callable[[], bool] = lambda: False,
) -> tuple[dict, Batch]:
    """Sample every problem `evaluate.samples` times and grade the responses. A collective; always uses the same seed.

    The verifier decides what is correct, whatever reward.mode says.

    Args:
        samples: existing responses, to which new ones are added (on the first rank); None keeps none.
        function: the user's reward function, whose terms are stored with the scores; None: it is not called.
        leaving: whether to stop before the next portion of the problems, the same on every rank.
    Returns:
        the record for metrics.jsonl (see scores.summary; empty if the evaluation was stopped), and the graded responses
        that were sampled last; without `samples`, all of them.
    """
    batches = 8 if chosen_engine(c, ranks.device.type) == "vllm" else 1
    at_once = responses_at_once(c.rollout, ranks.world) * ranks.world * batches
    size = max(1, at_once // c.evaluate.samples if samples else len(problems))  # of a portion: what a kill can lose
    done: dict[str, Answered] = dict(samples.done) if samples else {}
    missing = [i for i, p in enumerate(problems) if p.id not in done]
    batch = Batch([])
    for at in range(0, len(missing), size):
        if leaving():
            return {}, batch
        progress(len(problems) - len(missing) + at, len(problems))
        portion = missing[at : at + size]
        asked = [problems[i] for i in portion], [prompts[i] for i in portion]
        part = rollout(
            engine,
            asked[1],
            c.evaluate.samples,
            sampling(c),
            c.seed + 7919 * portion[0] + 1,
            ranks,
            progress if samples is None else silent,
            shared_by=c.rollout.tensor_parallel,
        )
        if isinstance(verifier, Programs):
            graded = verifier.grade(asked[0], part.responses, c.reward)
            own: dict[int, float | None] = dict.fromkeys(graded)  # programs do not vote
        else:
            graded = grade(asked[0], part.responses, verifier, c.reward, function, trains=False)
            own = {i: majority(samples, verifier) for i, samples in graded.items()}
        batch = gather(part, graded, *asked, ranks)
        votes = {i: v for rank in ranks.gather_objects(own) for i, v in rank.items()}
        if ranks.main:
            new = answered(batch, votes, texts=samples is not None)
            done |= {a.id: dataclasses.replace(a, texts=[]) for a in new}
            if samples:
                samples.add(new)
    record = summary([done[p.id] for p in problems], c.rollout.max_tokens) if ranks.main else {}
    return record, batch


def weights(model: str) -> str | None:
    """A hash of a local model's configuration and of its files' sizes and ends; None for a model on the hub."""
    folder = Path(resolve(model))
    if not folder.is_dir():
        return None
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        with path.open("rb") as f:
            f.seek(max(0, size - 2**20))
            digest.update(f"{path.name} {size}".encode() + f.read())
    return digest.hexdigest()[:16]


def own_settings(args: list[str]) -> list[str]:
    """Arguments that replace a recipe if `args` name none: a run directory's own configuration.

    The saved weights are evaluated: quantised rollouts made the run faster, but are not part of its model.
    """
    if any(a.split("=")[0] in ("--recipe", "--config") for a in args):
        return []
    named = [b if a in ("--model", "--model.path") else a.partition("=")[2]
             for a, b in zip(args, [*args[1:], ""], strict=True)
             if a in ("--model", "--model.path") or a.startswith(("--model=", "--model.path="))]  # fmt: skip
    path = Path(named[-1]) / "config.toml" if named else None
    if path is None or not path.is_file() or "rollout" not in tomllib.loads(path.read_text(encoding="utf-8")):
        return []
    return [f"--config={path}", "--output=", "--rollout.quantization=none", "--rollout.kv_dtype=auto"]


def settings(c: Config) -> str:
    """Say where the settings come from, and whether weights or cache are rounded, here and in the model's own run."""
    text = f"Settings of recipe {c.recipe}."
    if quantized(c):
        text += (
            f"\nSamples from rounded weights or a rounded cache (rollout.quantization={c.rollout.quantization}, "
            f"rollout.kv_dtype={c.rollout.kv_dtype}): none and auto evaluate the model as it is saved."
        )
    elif samples_rounded(Path(c.model.path)):
        text += "\nThe run sampled from rounded weights or a rounded cache; its model is evaluated as it is saved."
    return text


def asked(c: Config, problems: list[Problem]) -> dict:
    """Everything that the responses and their grades depend on, for Samples."""
    text = json.dumps([[p.id, p.problem, p.reference, *(p.messages or ())] for p in problems])
    return {
        "model.path": c.model.path,
        "weights": weights(c.model.path),
        "data.test": c.data.test,
        "problems": hashlib.sha256(text.encode()).hexdigest()[:16],
        "evaluate.samples": c.evaluate.samples,
        "evaluate.temperature": c.evaluate.temperature,
        "evaluate.min_p": c.evaluate.min_p,
        "rollout.max_tokens": c.rollout.max_tokens,
        "rollout.stop": list(c.rollout.stop),
        "reward.grade": c.reward.grade,
        "data.instruction": c.data.instruction,
        **({"data.template": c.data.template} if c.data.template else {}),
        **({"rollout.quantization": c.rollout.quantization} if c.rollout.quantization != "none" else {}),
        **({"rollout.kv_dtype": c.rollout.kv_dtype} if c.rollout.kv_dtype != "auto" else {}),
        "seed": c.seed,
    }


def write(folder: Path, records: dict[str, dict], gains: dict | None = None) -> str:
    """Write table.md and evaluation.png with the models side by side; returns the table."""
    folder.mkdir(parents=True, exist_ok=True)
    text = table(records, gains)
    (folder / "table.md").write_text(text, encoding="utf-8")
    draw(records, folder / "evaluation.png")
    return text


def compare(args: list[str]) -> None:
    """Print and write finished evaluations side by side, with each one's gain over the first, paired by problem."""
    p = argparse.ArgumentParser(prog="python -m lead_fast.evaluate", description="Finished evaluations side by side.")
    p.add_argument("--compare", nargs="+", metavar="LABEL=DIR", required=True, help="output folders of evaluations")
    p.add_argument("--output", default=".", help="folder for table.md and evaluation.png")
    given = p.parse_args(args)
    check_folder("--output", given.output)
    records, rows = {}, {}
    for label, (folder, *more) in parse_labelled(given.compare).items():
        if more or not (folder / "evaluation.json").is_file():
            raise ValueError(f"{folder} holds no evaluation.json: give the --output of a lead_fast.evaluate run.")
        records[label] = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        rows[label] = list(Samples(folder / "samples.jsonl", {}).done.values())
    first = next(iter(rows))
    gains = {label: difference(rows[first], rows[label]) for label in rows if label != first}
    print(write(Path(given.output), records, gains))


def main(args: list[str] | None = None) -> None:
    dry, args = take_dry_run(args)
    if any(a.startswith("--compare") for a in args):
        return compare(args)
    for flag, command in (("--tables", tables.main), ("--lighteval", crosscheck.main)):
        if any(a.split("=")[0] == flag for a in args):
            return command(args)
    allowed, args = "--allow_code" in args, [a for a in args if a != "--allow_code"]
    c: Config = load_config([*own_settings(args), *args], about=__doc__)
    alone: dict[str, Any] = {"extra_problems": 0, "gpu_memory": c.evaluate.gpu_memory}  # no trainer on this GPU
    c = dataclasses.replace(c, rollout=dataclasses.replace(c.rollout, **alone))
    ranks = start()
    asked_to_stop = stop_on_signals(ranks, "portion of the problems that is being sampled")
    check(c, ranks.world, trains=False, device_type=ranks.device.type)
    if ranks.main:
        print(settings(c), flush=True)
    shape = look_at_machine(c.model, ranks, engine=chosen_engine(c, ranks.device.type))
    code = parse_source(c.data.test) is not None
    if code and not allowed:
        raise ValueError(
            f"{c.data.test} is graded by running programs that the model wrote: allow it with --allow_code."
        )
    if code:
        guard = protection()
        if ranks.main:
            print(guard, flush=True)
    if dry:
        if ranks.main:
            print(dump(c))
        return stop()
    check_engine(shape, c, ranks.device.type, c.data.max_prompt_tokens + c.rollout.max_tokens)
    tokenizer = load_tokenizer(c.model)
    grader: Verifier | Programs
    if code:
        problems, prompts, tests = load_code_test(c, tokenizer)
        grader = Programs(tests)
    else:
        problems, prompts = load_test(c, tokenizer, ranks)
        grader = Verifier(timeout_s=c.reward.verifier_timeout_s)
    folder = Path(c.output or f"runs/evaluate-{Path(c.model.path).name}-{Path(c.data.test).stem}")
    folder.mkdir(parents=True, exist_ok=True)
    samples = Samples(folder / "samples.jsonl", asked(c, problems))
    if ranks.main and samples.done:
        print(f"{len(samples.done)} of {len(problems)} problems are already in {samples.path}.", flush=True)
    ranks.barrier()  # all have read before the first rank writes

    def progress(at: int, of: int) -> None:
        if ranks.main:
            print(f"evaluate {at}/{of}", flush=True)

    leaving = partial(any_rank_caught, asked_to_stop, ranks)
    with grader as verifier:
        engine = make_engine(c, tokenizer, ranks)
        try:
            record, _ = evaluate(engine, problems, prompts, verifier, c, ranks, progress, samples, leaving=leaving)
        except EngineFailure as e:
            raise ValueError(f"{e}: complete problems are in {samples.path}; the same command resumes.") from e
    if isinstance(grader, Programs):
        counts = counted(ranks.gather_objects(grader.reasons))
        if ranks.main:
            print(counts, flush=True)
    if ranks.main and not record:
        done = f"{len(samples.done)} of {len(problems)} problems are in {samples.path}"
        print(f"Asked to stop: {done}; the same command resumes.", flush=True)
    elif ranks.main:
        record = {"model": c.model.path, "data": c.data.test} | record
        (folder / "evaluation.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        print(write(folder, {Path(c.model.path).name: record}))
        print(tables.groups_table(folder))
        print(f"Evaluation: {folder}", flush=True)
    stop()


if __name__ == "__main__":
    run_command(main)
