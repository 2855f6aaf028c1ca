"""Make, filter, mix and describe training sets: `python -m lead_fast.data COMMAND`.

    check SOURCE [--model DIR] [--data.key=value ...]               # what a training run would see
    deepscaler [--source FILE] [--above 2.5] --out FILE.parquet     # the paper's set, by difficulty
    select SOURCE --rollouts RUN_DIR [--least 0 --most 0.75] --out FILE.parquet
    select SOURCE --samples EVALUATION_DIR ... --out FILE.parquet   # solve rates of a model sampled k times
    mix SOURCE ... [--hold_out N] --out FILE.parquet                # N rows go to FILE.held-out.parquet
    stats SOURCE [--model DIR] [--out FOLDER]
    arithmetic | levels | word_problems --out FOLDER                 # the embedded tasks as JSONL

Every set is a Parquet file with columns problem, answer, difficulty, solution, source. FILE.manifest.json beside it
records source and revision, filters, counts and a hash. Equal inputs give equal files.
"""

import argparse
import hashlib
import json
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from ..records import Problem
from ..runtime.jsonl import each_jsonl
from . import arithmetic, levels, word_problems
from .check import check
from .columns import DEFAULTS
from .prompts import tokenize_prompts
from .read import MADE, load_problems
from .references import unverifiable

DEEPSCALER = "agentica-org/DeepScaleR-Preview-Dataset"


def write_set(out: Path, rows: list[dict], manifest: dict[str, Any]) -> None:
    """Write the rows as Parquet with a manifest; an interrupted write leaves no file of that name."""
    import pyarrow as pa
    from pyarrow import parquet

    if out.suffix != ".parquet":
        raise ValueError(f"--out is {out}: give a name that ends in .parquet.")
    if not rows:
        raise ValueError(
            f"No row is left for {out} ({described(manifest)}): loosen the filters ({manifest['filters']})."
        )
    schema = pa.schema([("problem", pa.string()), ("answer", pa.string()), ("difficulty", pa.float64()),
                        ("solution", pa.string()), ("source", pa.string())])  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_suffix(".partial")
    parquet.write_table(pa.Table.from_pylist(rows, schema=schema), partial)
    partial.rename(out)
    text = json.dumps(rows, sort_keys=True).encode()
    manifest |= {"rows": len(rows), "sha256_rows": hashlib.sha256(text).hexdigest(), "sha256_file": file_hash(out)}
    out.with_suffix(".manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    print(f"{out}: {len(rows)} rows; {described(manifest)}")


def described(manifest: dict[str, Any]) -> str:
    """A manifest's counts on one line."""
    return ", ".join(f"{k} {v}" for k, v in manifest["counts"].items())


def columns(a: argparse.Namespace) -> dict[str, Any]:
    return {k: v for k, v in vars(a).items() if k.endswith("_column")}


def row(p: Problem, source: str) -> dict:
    """Convert a problem to a row of a set. Raises ValueError for a prompt that the set's columns cannot hold."""
    if p.messages:
        raise ValueError(
            f"{source}, row {p.id}: the prompt has a system message or several turns, which a set made here cannot "
            "hold: train on the source itself, or on one without them."
        )
    return {"problem": p.problem, "answer": p.reference, "difficulty": p.difficulty, "solution": p.solution,
            "source": source}  # fmt: skip


def file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def origin(source: str) -> dict[str, Any]:
    """The source and revision of rows: a file's hash, the manifest beside it, or the hub's commit."""
    path = Path(source)
    if path.is_file():
        beside = path.with_suffix(".manifest.json")
        made = {"manifest": json.loads(beside.read_text(encoding="utf-8"))} if beside.is_file() else {}
        return {"source": source, "revision": f"sha256:{file_hash(path)}"} | made
    if source.startswith(MADE) or path.is_dir():
        return {"source": source, "revision": None}
    from huggingface_hub import HfApi

    try:
        return {"source": source, "revision": HfApi().dataset_info(source.partition(":")[0]).sha}
    except Exception:  # anything that the hub's client raises without a network: the rows came from the cache
        return {"source": source, "revision": None}


def deepscaler(a: argparse.Namespace) -> None:
    """Write DeepScaleR-like rows above a difficulty, without duplicates and unverifiable references."""
    problems = load_problems(a.source, references=False, **columns(a))
    graded = [p for p in problems if p.difficulty is not None]
    if not graded and a.above is not None:
        raise ValueError(
            f"{a.source} has no difficulty in column {a.difficulty_column}: give a file that has one with --source, "
            "another --difficulty_column, or --above=none to keep all."
        )
    hard = [p for p in graded if p.difficulty > a.above] if a.above is not None else problems  # type: ignore[operator]
    unique = list({p.problem: p for p in reversed(hard)}.values())[::-1]
    bad = unverifiable(p.reference for p in unique)
    kept = [p for p in unique if p.reference not in bad]
    counts = {"read": len(problems), "without difficulty": len(problems) - len(graded), "above": len(hard),
              "duplicates": len(hard) - len(unique), "unverifiable references": len(unique) - len(kept)}  # fmt: skip
    filters = {"difficulty_above": a.above, "reference_verifiable": True, "unique_problem": True}
    write_set(a.out, [row(p, a.source) for p in kept], origin(a.source) | {"filters": filters, "counts": counts})


def solve_rates(rollouts: list[Path], samples: list[Path]) -> dict[str, float]:
    """Share of correct responses by a problem's text, over everything that was sampled for it."""
    right: dict[str, int] = defaultdict(int)
    asked: Counter[str] = Counter()
    for folder in rollouts:
        path = folder / "solved.jsonl"
        if not path.is_file():
            raise ValueError(f"{folder} has no solved.jsonl: give the run directory of a lead_fast.train run.")
        for r in each_jsonl(path):
            right[r["problem"]] += r["correct"]
            asked[r["problem"]] += r["sampled"]
    for folder in samples:
        path = folder / "samples.jsonl"
        if not path.is_file():
            raise ValueError(f"{folder} has no samples.jsonl: give the --output of a lead_fast.evaluate run.")
        for r in each_jsonl(path):
            if "correct" in r:  # unlike the first line, which records the settings
                right[r["problem"]] += sum(r["correct"])
                asked[r["problem"]] += len(r["correct"])
    return {problem: right[problem] / n for problem, n in asked.items()}


def select(a: argparse.Namespace) -> None:
    """Select problems whose measured solve rate lies in [least, most]; those never sampled are left out and counted."""
    if not a.rollouts and not a.samples:
        raise ValueError("select needs solve rates: give --rollouts RUN_DIR or --samples EVALUATION_DIR.")
    problems = load_problems(a.source, **columns(a))
    rates = solve_rates(a.rollouts, a.samples)
    seen = [p for p in problems if p.problem in rates]
    kept = [p for p in seen if a.least <= rates[p.problem] <= a.most]
    counts = {"read": len(problems), "never sampled": len(problems) - len(seen),
              "outside": len(seen) - len(kept)}  # fmt: skip
    filters = {"solve_rate_least": a.least, "solve_rate_most": a.most,
               "measured_by": [str(f) for f in [*a.rollouts, *a.samples]]}  # fmt: skip
    write_set(a.out, [row(p, a.source) for p in kept], origin(a.source) | {"filters": filters, "counts": counts})


def mix(a: argparse.Namespace) -> None:
    """Mix all sources: each problem once, no rows without reference and solution; hold some out if asked."""
    seen: set[str] = set()
    rows, counts = [], {}
    for source in a.sources:
        problems = load_problems(source, references=False, **columns(a))
        known = [p for p in problems if p.reference or p.solution]
        new = list({p.problem: p for p in reversed(known) if p.problem not in seen}.values())[::-1]
        seen |= {p.problem for p in new}
        rows += [row(p, source) for p in new]
        counts |= {f"read from {source}": len(problems),
                   f"without reference and solution, {source}": len(problems) - len(known),
                   f"already there, {source}": len(known) - len(new)}  # fmt: skip
    if not 0 <= a.hold_out < max(1, len(rows)):
        raise ValueError(f"--hold_out is {a.hold_out} of {len(rows)} rows: give fewer, and 0 or more.")
    by_hash = sorted(rows, key=lambda r: hashlib.sha256(r["problem"].encode()).digest())
    apart = {r["problem"] for r in by_hash[: a.hold_out]}  # independent of the order of the sources
    manifest = {"sources": [origin(s) for s in a.sources], "counts": counts}
    for out, held in ((a.out, False), (a.out.with_suffix(".held-out.parquet"), True))[: 1 + bool(apart)]:
        part = [r for r in rows if (r["problem"] in apart) == held]
        write_set(out, part, manifest | {"filters": {"unique_problem": True, "held_out": a.hold_out if held else 0}})


def stats(a: argparse.Namespace) -> None:
    """Describe a set by counts, difficulties and lengths, as a table and a picture; in tokens with --model."""
    import matplotlib
    import numpy as np

    from ..report import BLUE, STYLE, figure

    problems = load_problems(a.source, references=False, **columns(a))
    levels = [p.difficulty for p in problems if p.difficulty is not None]
    unit = "characters"
    sizes = [len(p.problem) for p in problems]
    if a.model:
        from ..config import DataConfig, ModelConfig
        from ..learner.model import load_tokenizer

        unit, tokenizer = "tokens", load_tokenizer(ModelConfig(path=a.model))
        _, prompts = tokenize_prompts(problems, tokenizer, instruction=DataConfig.instruction, max_prompt_tokens=10**9)
        sizes = [len(ids) for ids in prompts]
    record = {
        "source": a.source,
        "problems": len(problems),
        "unique problems": len({p.problem for p in problems}),
        "with difficulty": len(levels),
        "with solution": sum(p.solution is not None for p in problems),
        "integer references": sum(re.fullmatch(r"-?\d+", p.reference) is not None for p in problems),
        f"prompt length, {unit}: median, 95 %, longest": [int(x) for x in np.quantile(sizes, [0.5, 0.95, 1])],
        "difficulty: 5 %, median, 95 %": [float(x) for x in np.quantile(levels, [0.05, 0.5, 0.95])] if levels else None,
    }
    a.out.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        fig, axes = figure(10.4, 3.8, 2 if levels else 1)
        axes[0].hist(sizes, bins=min(40, len(set(sizes))), color=BLUE)
        axes[0].set(title="Length of prompts", xlabel=unit, ylabel="problems")
        if levels:
            axes[1].hist(levels, bins=min(40, len(set(levels))), color=BLUE)
            axes[1].set(title="Difficulty", xlabel="difficulty", ylabel="problems")
        fig.savefig(a.out / "stats.png")
    (a.out / "stats.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print("\n".join(f"{k:50} {v}" for k, v in record.items()))
    print(a.out / "stats.png")


TASKS = {
    "arithmetic": arithmetic.make_problems,
    "levels": levels.make_problems,
    "word_problems": word_problems.make_problems,
}


def write_task(a: argparse.Namespace) -> None:
    a.out.mkdir(parents=True, exist_ok=True)
    for split, n in (("train", a.train), ("test", a.test)):
        rows = TASKS[a.task](n, seed=a.seed, split=split)
        (a.out / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


def number_or_none(text: str) -> float | None:
    return None if text.lower() == "none" else float(text)


def main(args: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(prog="python -m lead_fast.data", description=(__doc__ or "").splitlines()[0])
    commands = p.add_subparsers(
        required=True, metavar="check | deepscaler | select | mix | stats | arithmetic | levels | word_problems"
    )

    def command(run: Any, *, takes_columns: bool = True) -> argparse.ArgumentParser:
        parser = commands.add_parser(
            run.__name__, help=run.__doc__.splitlines()[0], description=run.__doc__, allow_abbrev=False
        )
        parser.set_defaults(run=run)
        for name, column in DEFAULTS.items() if takes_columns else ():
            parser.add_argument(f"--{name}_column", default=column, metavar="NAME", help=f"column with the {name}")
        return parser

    c = command(check, takes_columns=False)
    c.add_argument("source", help="a value of data.train, as a run would be given it")
    c.add_argument("--model", help="measure prompts in this model's tokens, and refuse those over the limit")
    c.add_argument("--split", default="train", help="split of a hub dataset")
    c = command(deepscaler)
    c.add_argument("--source", default=DEEPSCALER, help="hub set, .jsonl or .parquet file with the same columns")
    c.add_argument("--above", type=number_or_none, default=2.5, help="keep difficulties above this; none keeps all")
    c.add_argument("--out", type=Path, required=True, help="file to write, FILE.parquet")
    c = command(select)
    c.add_argument("source")
    c.add_argument("--rollouts", type=Path, nargs="+", default=[], help="run folders of lead_fast.train")
    c.add_argument("--samples", type=Path, nargs="+", default=[], help="output folders of lead_fast.evaluate")
    c.add_argument("--least", type=float, default=0.0, help="lowest solve rate to keep")
    c.add_argument("--most", type=float, default=0.75, help="highest solve rate to keep; 0.75 in the paper's stage 2")
    c.add_argument("--out", type=Path, required=True, help="file to write, FILE.parquet")
    c = command(mix)
    c.add_argument("sources", nargs="+")
    c.add_argument(
        "--hold_out", type=int, default=0, help="number of rows to write to a separate file, OUT.held-out.parquet"
    )
    c.add_argument("--out", type=Path, required=True, help="file to write, FILE.parquet")
    c = command(stats)
    c.add_argument("source")
    c.add_argument("--model", help="measure prompts in this model's tokens, its chat template included")
    c.add_argument("--out", type=Path, default=Path("."), help="folder for stats.png and stats.json")
    for task in TASKS:
        c = commands.add_parser(task, help=f"Write the embedded task {task} as JSONL: train.jsonl, test.jsonl.")
        c.set_defaults(run=write_task, task=task)
        c.add_argument("--out", type=Path, required=True, help="folder to write to")
        c.add_argument("--train", type=int, default=4000, help="training problems")
        c.add_argument("--test", type=int, default=256, help="held-out problems")
        c.add_argument("--seed", type=int, default=1, help="seed of the problems")
    a, settings = p.parse_known_args(args)
    if settings and a.run is not check:
        p.error(f"unrecognized arguments: {' '.join(settings)}")
    a.settings = settings
    try:
        a.run(a)
    except ValueError as e:
        sys.exit(f"error: {e}")
