"""Compare GRPO, L, L + AD and LEAD, and as a control LEAD in which a missing answer costs as much as a wrong one.

    python bench/ablation.py [--seeds 0 1 2 3 4] [--jobs 2] [--quick] [--switches] [--runs runs/ablation]
                             [--out docs/evidence/ablation]

Every run trains the recipe `levels` from the same model on one CPU thread, with `--jobs` runs in parallel, and is then
evaluated on held-out problems: 1,000 hard ones (levels 4 to 6) x 4 samples, and 1,000 others x 2. The same command
resumes after an interruption, within a run too, and keeps results that exist, so more seeds can be added later. A run
takes five to seven minutes on one core. --quick: GRPO and LEAD on one seed, both in about six minutes on two.
--switches: LEAD, and LEAD with each of the switches of 2026, on three seeds.

It prints the tables and writes them to --out as table.md, with compare.png. Each run's metrics.jsonl and
evaluation.json are copied there, and --table makes the tables from them alone.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lead_fast.data.levels import FORMS, HARD, HOPELESS, HOPELESS_RATE, LEVELS, form_of
from lead_fast.report import BLUE, GREY, INK, ORANGE, STYLE, read_run
from lead_fast.runtime.jsonl import read_jsonl

VARIANTS = {
    "GRPO": ("grpo", ["--preset=grpo"]),
    "L": ("l", ["--preset=l"]),
    "L + AD": ("l-ad", ["--preset=l-ad"]),
    "LEAD": ("lead", ["--preset=paper"]),
    "LEAD, no answer is wrong": ("control", ["--preset=paper", "--reward.truncated=-1"]),
}
SWITCHES = {
    "a length advantage of its own": (
        "own-length",
        ["--advantage.length_reward=false", "--advantage.length_advantage=0.5"],
    ),
    "std over the batch": ("batch-std", ["--advantage.std=batch"]),
    "baseline weighted by length": ("length-baseline", ["--advantage.baseline=length"]),
    "guard on held-out accuracy": ("guard", ["--advantage.length_guard=0.05", "--evaluate.every=10"]),
}
"""Switches that are tried with LEAD: name of the runs, and the keys in addition to those of LEAD."""
EASY = [d for d in (*LEVELS, HOPELESS) if d not in HARD]
HARD_RATE = (1 - HOPELESS_RATE) * len(HARD) / len(LEVELS)  # of the task's problems
PARTS = {"hard": (HARD, 4, HARD_RATE), "others": (EASY, 2, 1 - HARD_RATE)}
"""The two sets of the final evaluation: levels, samples per problem, and their share of the task's problems."""

WRITTEN = {"levels 1 to 3": LEVELS[:3], "levels 4 to 6": HARD, "hopeless": (HOPELESS,)}
"""Groups of problems for which the forms of responses are counted."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Effect:
    """A part of the algorithm, the two variants that differ in it, and the measure in which it should show.

    wanted: sign of the difference, 0 for none. least: its least size, in standard errors.
    """

    name: str
    before: str
    after: str
    measure: str
    wanted: int
    least: float = 0.0


MEASURES: dict[str, tuple[str, float]] = {
    "pass_at_1": ("pass@1, %", 100),
    "pass_at_1_hard": ("pass@1 on levels 4 to 6, %", 100),
    "length_correct": ("length of correct responses, tokens", 1),
    "answered": ("answered, %", 100),
    "precision": ("precision, pooled, %", 100),
    "precision_problems": ("precision, mean over problems, %", 100),
}
E_CHANGES = ("precision", "precision_problems", "answered")
EFFECTS = (
    Effect("L", "GRPO", "L", "length_correct", -1, 3),
    Effect("L", "GRPO", "L", "pass_at_1", 0),
    Effect("AD", "L", "L + AD", "pass_at_1_hard", 1, 2),
    Effect("AD", "L", "L + AD", "length_correct", 1),
    Effect("E", "L + AD", "LEAD", "precision", 1, 3),
    Effect("E", "L + AD", "LEAD", "precision_problems", 1, 3),
    Effect("E", "L + AD", "LEAD", "answered", -1),
    Effect("E", "L + AD", "LEAD", "pass_at_1", 0),
    *(Effect("control", "L + AD", "LEAD, no answer is wrong", m, 0) for m in E_CHANGES),
    Effect("all", "GRPO", "LEAD", "length_correct", -1),
    Effect("all", "GRPO", "LEAD", "pass_at_1", 0),
    Effect("all", "GRPO", "LEAD", "precision", 1),
)
BESIDE_LEAD = tuple(
    Effect("switch", "LEAD", label, m, 0)
    for label in SWITCHES
    for m in ("pass_at_1", "pass_at_1_hard", "length_correct", "precision")
)


def train_and_evaluate(run: Path, args: list[str], seed: int, recipe: str) -> None:
    """Train one variant on one seed and evaluate its model; a step whose result exists is skipped."""
    own = {**os.environ, "OMP_NUM_THREADS": "1"}
    train(run, [f"--recipe={recipe}", *args, f"--seed={seed}"], own)
    for name, (levels, samples, _) in PARTS.items():
        if not (run / name / "evaluation.json").exists():
            test = f"levels:test?n=1000&seed=5&difficulties={'-'.join(map(str, levels))}"
            given = [f"--recipe={recipe}", f"--model={run / 'final'}", f"--data.test={test}", "--seed=0"]
            execute("evaluate", [*given, f"--evaluate.samples={samples}", f"--output={run / name}"], own, run)


def train(run: Path, args: list[str], environment: dict[str, str], ranks: int = 1) -> None:
    """Train a run to its end, resuming one that was stopped; a finished run is left as it is."""
    if not (run / "final").exists():
        begun = ["--resume"] if run.exists() else []
        execute("train", [*args, f"--output={run}", *begun], environment, run, ranks)


def execute(command: str, args: list[str], environment: dict[str, str], run: Path, ranks: int = 1) -> None:
    """Run a command of lead_fast; its output is appended to a log file beside the run's folder."""
    log = run.parent / f"{run.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"lead_fast.{command} {' '.join(args)}", flush=True)
    start = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"] if ranks > 1 else []
    with log.open("a", encoding="utf-8") as out:
        done = subprocess.run([sys.executable, *start, "-m", f"lead_fast.{command}", *args], env=environment,
                              stdout=out, stderr=out)  # fmt: skip
    if done.returncode:
        raise ValueError(f"lead_fast.{command} of {run} failed: see {log}.")


# ---------------------------------------------------------------------------------------------------------- measures


def measured(run: Path) -> Row:
    """Measures of a run's final evaluation: its two sets, weighted by their shares of the task."""
    rows = {name: [r for r in read_jsonl(run / name / "samples.jsonl") if "correct" in r] for name in PARTS}
    weights = {name: part / len(rows[name]) for name, (*_, part) in PARTS.items()}
    problems = [(weights[name], r) for name, of_part in rows.items() for r in of_part]
    correct = sum(w * statistics.fmean(r["correct"]) for w, r in problems)
    answers = sum(w * answered(r) / len(r["correct"]) for w, r in problems)
    tokens = sum(w * sum(n for n, ok in zip(r["lengths"], r["correct"], strict=True) if ok) / len(r["correct"])
                 for w, r in problems)  # fmt: skip
    some = [(w, sum(r["correct"]) / answered(r)) for w, r in problems if answered(r)]
    by_level: dict[str, list[float]] = {}
    for _, r in problems:
        by_level.setdefault(f"{r['difficulty']:g}", []).append(statistics.fmean(r["correct"]))
    forms: dict[str, dict[str, list[bool]]] = {name: {} for name in WRITTEN}
    for _, r in problems:
        name = next(name for name, levels in WRITTEN.items() if r["difficulty"] in levels)
        for text, ok in zip(r["texts"], r["correct"], strict=True):
            forms[name].setdefault(form_of(text), []).append(ok)
    return {
        "pass_at_1": correct,
        "pass_at_1_hard": statistics.fmean(statistics.fmean(r["correct"]) for r in rows["hard"]),
        "length_correct": tokens / correct if correct else None,
        "answered": answers,
        "precision": correct / answers if answers else None,
        "precision_problems": sum(w * p for w, p in some) / sum(w for w, _ in some) if some else None,
        "by_level": {k: statistics.fmean(v) for k, v in sorted(by_level.items(), key=lambda kv: float(kv[0]))},
        "forms": {
            name: {
                form: [len(oks) / sum(map(len, drawn.values())), statistics.fmean(oks)] for form, oks in drawn.items()
            }
            for name, drawn in forms.items()
        },
        "problems": {name: len(r) for name, r in rows.items()},
    }


def answered(row: Row) -> int:
    """Number of a problem's responses from which an answer was extracted."""
    return sum(e is not None for e in row["extracted"])


def paired(a: Sequence[float], b: Sequence[float]) -> tuple[float, float | None]:
    """Mean over seeds of b - a, and its standard error (None for one seed)."""
    differences = [y - x for x, y in zip(a, b, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None
    return statistics.fmean(differences), error


def values(finals: dict[str, dict[int, Row]], e: Effect) -> tuple[list[int], list[float], list[float]]:
    """Seeds of both variants of an effect, and each variant's values of its measure."""
    scale = MEASURES[e.measure][1]
    seeds = sorted(set(finals.get(e.before, {})) & set(finals.get(e.after, {})))
    a, b = ([scale * finals[v][s][e.measure] for s in seeds] for v in (e.before, e.after))
    return seeds, a, b


# --------------------------------------------------------------------------------------------------- table and picture


def variants_table(finals: dict[str, dict[int, Row]]) -> str:
    """Markdown: each variant's measures, mean ± sample standard deviation over seeds."""
    out = f"| | seeds | {' | '.join(name for name, _ in MEASURES.values())} |\n|:--|{'--:|' * (1 + len(MEASURES))}\n"
    for label, seeds in finals.items():
        cells = [spread([scale * row[key] for row in seeds.values()]) for key, (_, scale) in MEASURES.items()]
        out += f"| {label} | {len(seeds)} | {' | '.join(cells)} |\n"
    return out


def levels_table(finals: dict[str, dict[int, Row]]) -> str:
    """Markdown: pass@1 by level, mean over seeds."""
    names = [str(d) for d in (*LEVELS, HOPELESS)]
    head = " | ".join("hopeless" if d == str(HOPELESS) else f"level {d}" for d in names)
    out = f"| pass@1, % | {head} |\n|:--|{'--:|' * len(names)}\n"
    for label, seeds in finals.items():
        cells = [f"{100 * statistics.fmean(row['by_level'].get(d, 0.0) for row in seeds.values()):.1f}" for d in names]
        out += f"| {label} | {' | '.join(cells)} |\n"
    return out


def forms_table(finals: dict[str, dict[int, Row]]) -> str:
    """Markdown: shares of the forms of responses, and the share of each that is right, mean over seeds."""
    names = [*FORMS, "other"]
    out = f"| responses, % (of them right, %) | on | {' | '.join(names)} |\n|:--|:--|{'--:|' * len(names)}\n"
    for label, seeds in finals.items():
        for where in WRITTEN:
            drawn = [row["forms"][where] for row in seeds.values()]
            cells = []
            for form in names:
                of_form = [d[form] for d in drawn if form in d]
                count = sum(part for part, _ in of_form)
                right = f" ({100 * sum(part * ok for part, ok in of_form) / count:.0f})" if count else ""
                cells.append(f"{100 * count / len(drawn):.1f}{right}")
            out += f"| {label} | {where} | {' | '.join(cells)} |\n"
    return out


def spread(xs: list[float]) -> str:
    return f"{statistics.fmean(xs):.1f}" + (f" ± {statistics.stdev(xs):.1f}" if len(xs) > 1 else "")


def effects_table(finals: dict[str, dict[int, Row]], effects: Sequence[Effect] = EFFECTS) -> str:
    """Markdown: each effect's mean paired difference, its standard error, and every seed's values of both variants."""
    out = (
        "| part | from → to | measure | seeds | difference | standard error | in standard errors | wanted | values |\n"
    )
    out += "|:--|:--|:--|--:|--:|--:|--:|:--|:--|\n"
    for e in effects:
        seeds, a, b = values(finals, e)
        if not seeds:
            continue
        mean, error = paired(a, b)
        wanted = {1: "more", -1: "less", 0: "none" if e.name == "control" else "-"}[e.wanted]
        wanted += f", {e.least:g} standard errors" if e.least else ""
        each = ", ".join(f"{x:.1f} → {y:.1f}" for x, y in zip(a, b, strict=True))
        cells = [e.name, f"{e.before} → {e.after}", MEASURES[e.measure][0], str(len(seeds)), f"{mean:+.1f}"]
        cells += [f"{error:.2f}" if error is not None else "-", f"{mean / error:+.1f}" if error else "-", wanted, each]
        out += f"| {' | '.join(cells)} |\n"
    return out


def draw(finals: dict[str, dict[int, Row]], path: Path) -> None:
    """Draw one panel per part of the algorithm: each seed's two values joined by a line, and the mean difference."""
    import matplotlib
    from matplotlib.figure import Figure

    panels = (
        ("L: length", EFFECTS[0]),
        ("AD: accuracy on hard problems", EFFECTS[2]),
        ("E: precision of answers", EFFECTS[4]),
        ("E: responses with an answer", EFFECTS[6]),
    )
    shown = [(title, e) for title, e in panels if values(finals, e)[0]]
    if not shown:
        return
    with matplotlib.rc_context(STYLE):
        fig: Figure = Figure(figsize=(3.4 * len(shown), 3.9), layout="constrained")
        for ax, (title, e) in zip(fig.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
            seeds, a, b = values(finals, e)
            mean, error = paired(a, b)
            for x, y in zip(a, b, strict=True):
                ax.plot([0, 1], [x, y], "-", color=GREY, linewidth=1, zorder=1)
            ax.scatter([0] * len(a), a, color=ORANGE, zorder=2)
            ax.scatter([1] * len(b), b, color=BLUE, zorder=2)
            ax.plot([0, 1], [statistics.fmean(a), statistics.fmean(b)], color=INK, linewidth=2.5, zorder=3)
            ax.set_xticks([0, 1], [e.before, e.after])
            ax.set_xlim(-0.35, 1.35)
            low, high = min(*a, *b), max(*a, *b)
            ax.set_ylim(low - 0.25 * (high - low or 1), high + 0.35 * (high - low or 1))
            ax.set_ylabel(MEASURES[e.measure][0], fontsize=9)
            ax.set_title(title, fontsize=9.5)
            unit = " tokens" if "tokens" in MEASURES[e.measure][0] else " points"
            text = f"{mean:+.1f}" + (f" ± {error:.1f}" if error is not None else "") + unit
            ax.text(0.5, 0.95, text, transform=ax.transAxes, ha="center", va="top", fontsize=11, weight="bold")
        fig.savefig(path)


# -------------------------------------------------------------------------------------------------------------- main


def main() -> None:
    p = argparse.ArgumentParser(description="Compare GRPO-LEAD's parts on the recipe levels.")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    p.add_argument("--jobs", type=int, default=2, help="runs in parallel, one CPU thread each")
    choice = p.add_mutually_exclusive_group()
    choice.add_argument("--quick", action="store_true", help="only GRPO and LEAD, on the first seed")
    choice.add_argument(
        "--variants",
        nargs="+",
        choices=[name for name, _ in (VARIANTS | SWITCHES).values()],
        help="default: all except the switches",
    )
    choice.add_argument("--switches", action="store_true", help="LEAD and each switch, on the first three seeds")
    p.add_argument("--recipe", default="levels")
    p.add_argument("--runs", type=Path, default=Path("runs/ablation"))
    p.add_argument("--out", type=Path, default=Path("docs/evidence/ablation"))
    p.add_argument(
        "--table", action="store_true", help="train nothing; make tables and picture from the records in --out"
    )
    a = p.parse_args()
    names = ["grpo", "lead"] if a.quick else a.variants or [name for name, _ in VARIANTS.values()]
    if a.quick:
        a.seeds, a.out = a.seeds[:1], a.runs / "quick" if a.out == Path("docs/evidence/ablation") else a.out
    if a.switches:
        names, a.seeds = ["lead", *(name for name, _ in SWITCHES.values())], a.seeds[:3]
    arguments = dict(VARIANTS.values()) | {name: [*VARIANTS["LEAD"][1], *args] for name, args in SWITCHES.values()}
    jobs = [(a.runs / f"{name}-{seed}", args, seed) for seed in a.seeds for name, args in arguments.items()
            if name in names]  # fmt: skip
    a.out.mkdir(parents=True, exist_ok=True)
    if not a.table:
        with ThreadPoolExecutor(a.jobs) as pool:
            for done in [pool.submit(partial(one, a.out, a.recipe), *job) for job in jobs]:
                done.result()
    print(write(a.out))


def one(out: Path, recipe: str, run: Path, args: list[str], seed: int) -> None:
    """Train and evaluate one run, and copy its records to `out`."""
    train_and_evaluate(run, args, seed, recipe)
    kept = out / run.name
    kept.mkdir(parents=True, exist_ok=True)
    shutil.copy(run / "metrics.jsonl", kept / "metrics.jsonl")
    (kept / "evaluation.json").write_text(json.dumps(measured(run), indent=1) + "\n", encoding="utf-8")


def write(out: Path) -> str:
    """Write tables and picture of all records in `out`; return the tables."""
    finals: dict[str, dict[int, Row]] = {}
    for label, (name, _) in (VARIANTS | SWITCHES).items():
        for path in sorted(out.glob(f"{name}-[0-9]*/evaluation.json")):
            seed = path.parent.name.removeprefix(f"{name}-")
            finals.setdefault(label, {})[int(seed)] = json.loads(path.read_text(encoding="utf-8"))
    first = [run.evals[0] for path in out.glob("*/metrics.jsonl") if (run := read_run(path.parent)).evals]
    start = f"{100 * statistics.fmean(r['pass_at_1'] for r in first):.1f} %" if first else "unknown"
    steps = {run.train[-1]["step"] for path in out.glob("*/metrics.jsonl") if (run := read_run(path.parent)).train}
    counted = ", ".join(map(str, sorted(steps)))
    text = (
        f"`python bench/ablation.py`: recipe `levels`, {counted} steps, pass@1 {start} at the start (256 x 2). "
        "At the end 1,000 held-out problems of levels 4 to 6 x 4 samples and 1,000 others x 2; numbers over all "
        "problems weigh the two sets as the task has them.\n\n"
        f"{variants_table(finals)}\nMean ± sample standard deviation over seeds.\n\n"
        f"{levels_table(finals)}\n{forms_table(finals)}\n"
        f"{effects_table(finals)}\nMean paired difference over seeds, and its standard error; `values`: each seed's.\n"
    )
    if any(label in finals for label in SWITCHES):
        keys = "; ".join(f"{label}: `{' '.join(args)}`" for label, (_, args) in SWITCHES.items())
        text += f"\n`--switches`: LEAD with one more key each. {keys}.\n\n{effects_table(finals, BESIDE_LEAD)}"
    (out / "table.md").write_text(text, encoding="utf-8")
    draw(finals, out / "compare.png")
    return text


if __name__ == "__main__":
    try:
        main()
    except ValueError as e:
        sys.exit(f"error: {e}")
