"""Set evaluations beside the paper's four tables (arXiv 2504.09696).

    python -m lead_fast.evaluate --tables [LABEL=]DIR[,DIR...] ... [--output=DIR] [--groups=position]

DIR is an output folder of `lead_fast.evaluate`; a bare evaluation.json works too, with fewer tables. LABEL is a row of
the paper ("7B LEAD") or any other name; the default is the paper's row for that model if there is one, otherwise the
model's name. Results are printed and written to tables.md in --output.

An interval is the central 95 % over resamples of each problem's own responses: the problems are the paper's, so two
evaluations of one model differ only by the luck of their samples. For votes (Cons@k), and with fewer than 8 samples, it
is the wider interval of scores.py, over problems. A value is marked if the paper's lies outside its interval.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .runtime.jsonl import each_jsonl
from .scores import interval

# ------------------------------------------------------------------------------------------------- the paper's numbers


class Paper(NamedTuple):
    """A row of the paper on one set: shares from 0 to 1, mean length in tokens."""

    cons_at_k: float
    pass_at_1: float
    length_mean: float


SETS = ("AIME24", "AIME25")
TABLE_1 = {
    "7B base": (Paper(0.767, 0.431, 6990), Paper(0.467, 0.292, 7113)),
    "7B L": (Paper(0.767, 0.438, 5275), Paper(0.533, 0.308, 5210)),
    "7B L + AD": (Paper(0.767, 0.458, 5323), Paper(0.567, 0.325, 5437)),
    "7B LEAD": (Paper(0.800, 0.470, 6104), Paper(0.567, 0.345, 6308)),
}
TABLE_2 = {
    "14B base": (Paper(0.800, 0.614, 9182), Paper(0.633, 0.429, 10046)),
    "Light-R1-14B-DS": (Paper(0.833, 0.641, 9571), Paper(0.767, 0.505, 10194)),
    "LEAD-14B stage 1": (Paper(0.833, 0.629, 8790), Paper(0.767, 0.523, 9371)),
    "LEAD-14B stage 2": (Paper(0.867, 0.650, 8267), Paper(0.767, 0.539, 8668)),
}
TABLE_3 = {  # LiveCodeBench v5: Pass@1, tokens; tokens of easy, medium and hard problems
    "14B base": (0.5103, 5794, 3046, 6429, 7856),
    "LEAD-14B stage 2": (0.5156, 6322, 3998, 6912, 8000),
}
TABLE_4 = {  # AIME25 by position in the exam: Cons@32, mean correct and answered of 32, precision, Pass@1
    "7B base": {"1 to 5": (0.8, 18.8, 20.3, 0.708, 0.588), "6 to 10": (0.4, 8.3, 13.8, 0.404, 0.259),
                "11 to 15": (0.2, 0.9, 2.0, 0.230, 0.028)},
    "7B L + AD": {"1 to 5": (0.9, 20.1, 26.9, 0.687, 0.628), "6 to 10": (0.6, 9.8, 24.2, 0.448, 0.306),
                  "11 to 15": (0.2, 1.3, 14.6, 0.156, 0.041)},
    "7B LEAD": {"1 to 5": (0.8, 22.0, 24.5, 0.723, 0.688), "6 to 10": (0.6, 9.7, 20.0, 0.421, 0.303),
                "11 to 15": (0.4, 1.5, 7.7, 0.355, 0.047)},
}  # fmt: skip
KNOWN = {
    "deepseek-ai/deepseek-r1-distill-qwen-7b": "7B base",
    "deepseek-ai/deepseek-r1-distill-qwen-14b": "14B base",
    "qihoo360/light-r1-14b-ds": "Light-R1-14B-DS",
    "planepaper/lead-14b": "LEAD-14B stage 2",
}
SAMPLES = 32  # per problem in the paper
LIMITS = {"7B": (8000, 8192), "14B": (14000, 14336)}  # tokens; the paper writes 8k and 14k
DRAWS = 1000
LEAST_SAMPLES = 8  # with fewer, the scatter of a problem's own samples is unknown
MOST_GROUPS = 12  # a table of more would be unreadable
LEVELS = {1.0: "easy", 2.0: "medium", 3.0: "hard"}  # LiveCodeBench's


# -------------------------------------------------------------------------------------------------------- measurements


@dataclass(frozen=True)
class Measured:
    """A value with its interval; None if there is none."""

    value: float | None
    ci: Sequence[float] | None = None

    def cell(self, paper: float | None, digits: int, *, comparable: bool = True) -> str:
        """`ours [low, high] / paper`, marked if the paper's number, taking its rounding into account, lies outside."""
        if self.value is None:
            return "-" if paper is None else f"- / {paper:.{digits}f}"
        shown = f"{self.value:.{digits}f}" + (f" [{self.ci[0]:.{digits}f}, {self.ci[1]:.{digits}f}]" if self.ci else "")
        if paper is None:
            return shown
        half = 0.5 * 10**-digits
        out = bool(self.ci) and comparable and not self.ci[0] - half <= paper <= self.ci[1] + half  # type: ignore[index]
        return f"{shown} / {paper:.{digits}f}{' ≠' * out}"


@dataclass
class Evaluation:
    """One model on one set: evaluation.json, and the problems of samples.jsonl without their responses."""

    label: str
    data: str
    record: dict[str, Any]
    rows: list[dict[str, Any]]
    asked: dict[str, Any]

    @property
    def samples(self) -> int:
        return int(self.record["samples"])

    @property
    def of_programs(self) -> bool:
        """Whether the references are tests of programs (data/livecodebench.py)."""
        named = self.data.lower().startswith("livecodebench")
        return named or bool(self.rows) and all(reference(r).startswith("tests ") for r in self.rows)

    def measure(self, key: str) -> Measured:
        """A value of the record with its interval, by its name there, such as pass_at_1."""
        ci = self.record.get(f"{key}_ci")
        if self.samples >= LEAST_SAMPLES and self.rows and key in ("pass_at_1", "length_mean"):
            ci = list(np.quantile(resampled(self.rows)[key], [0.025, 0.975]))
        return Measured(self.record.get(key), ci)


def reference(row: dict[str, Any]) -> str:
    """A row's reference; earlier versions stored it under the name answer."""
    return str(row.get("reference", row.get("answer", "")))


def resampled(rows: Sequence[dict[str, Any]], draws: int = DRAWS) -> dict[str, np.ndarray]:
    """Means over problems of `draws` evaluations, in which each problem's samples are redrawn from its own.

    Votes are left out: a majority of samples drawn with replacement behaves unlike one of as many fresh samples.
    """
    rng = np.random.default_rng(0)
    sums = {key: np.zeros(draws) for key in ("pass_at_1", "length_mean", "correct", "answered", "precision")}
    for r in rows:
        index = rng.integers(0, len(r["correct"]), (draws, len(r["correct"])))
        correct = np.array(r["correct"])[index].sum(1)
        answered = np.array([e is not None for e in r["extracted"]])[index].sum(1)
        sums["correct"] += correct
        sums["answered"] += answered
        sums["precision"] += correct / np.maximum(1, answered)
        sums["pass_at_1"] += correct / len(r["correct"])
        sums["length_mean"] += np.array(r["lengths"], dtype=float)[index].mean(1)
    return {key: total / len(rows) for key, total in sums.items()}


def read_evaluation(path: Path, label: str = "") -> Evaluation:
    """Read an evaluation from its folder, or from a bare evaluation.json. Raises ValueError."""
    file = path / "evaluation.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{path} holds no evaluation.json: give the --output of a lead_fast.evaluate run.")
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        data, model = str(record["data"]), str(record["model"])
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{file} was not written by lead_fast.evaluate ({type(e).__name__}: {e}).") from e
    rows: list[dict[str, Any]] = []
    asked: dict[str, Any] = {}
    samples = path / "samples.jsonl"
    if path.is_dir() and samples.is_file():
        for i, row in enumerate(each_jsonl(samples)):
            if i == 0:
                asked = row.get("asked", {})
            else:
                rows.append({k: v for k, v in row.items() if k != "texts"})
        if len(rows) != record["problems"]:
            raise ValueError(f"{samples} holds {len(rows)} problems and {file} {record['problems']}: evaluate again.")
    name = label or KNOWN.get(model.lower(), Path(model).name)
    return Evaluation(name, data, record, rows, asked)


# -------------------------------------------------------------------------------------------------- Table 4, any set


@dataclass(frozen=True)
class Group:
    """Problems of one difficulty: shares from 0 to 1, mean counts of samples per problem; `ci` holds their intervals.

    precision is the mean over problems of correct / answered, and 0 for a problem without answers; pooled_precision is
    correct / answered over all problems together.
    """

    problems: int
    samples: int
    cons_at_k: float | None
    correct: float
    answered: float
    precision: float
    pooled_precision: float
    pass_at_1: float
    length_mean: float
    ci: dict[str, Sequence[float] | None]

    def measure(self, key: str, scale: float = 1.0) -> Measured:
        value, ci = getattr(self, key), self.ci.get(key)
        return Measured(None if value is None else scale * value, ci and [scale * x for x in ci])


def group(rows: Sequence[dict[str, Any]]) -> Group:
    samples = len(rows[0]["correct"])
    correct = np.array([sum(r["correct"]) for r in rows], dtype=float)
    answered = np.array([sum(e is not None for e in r["extracted"]) for r in rows], dtype=float)
    by_problem = {
        "correct": correct,
        "answered": answered,
        "precision": correct / np.maximum(1, answered),
        "pass_at_1": correct / samples,
        "length_mean": np.array([np.mean(r["lengths"]) for r in rows]),
    }
    if all(r["votes"] is not None for r in rows):
        by_problem["cons_at_k"] = np.array([r["votes"] for r in rows], dtype=float)
    draws = resampled(rows) if samples >= LEAST_SAMPLES else {}
    ci: dict[str, Sequence[float] | None] = {}
    for key, values in by_problem.items():
        drawn = draws.get(key)
        ci[key] = interval(values) if drawn is None else list(np.quantile(drawn, [0.025, 0.975]))
    means: dict[str, Any] = {"cons_at_k": None} | {key: float(values.mean()) for key, values in by_problem.items()}
    pooled = float(correct.sum() / max(1, answered.sum()))
    return Group(len(rows), samples, pooled_precision=pooled, ci=ci, **means)


def groups(e: Evaluation, by: str | None = None) -> dict[str, Group]:
    """Groups by position in the exam (`position`: AIME's 1 to 5, 6 to 10, 11 to 15) or by the column of difficulties.

    None means position for AIME25, whose problems are in the exam's order, and the column for any other set.

    Raises:
        ValueError: `position` is asked for, and the number of problems is not a multiple of 15.
    """
    if by is None:
        by = "position" if e.data.upper() == "AIME25" and len(e.rows) % 15 == 0 else "column"
    by_group: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    if by == "position":
        if len(e.rows) % 15:
            raise ValueError(f"{e.data} has {len(e.rows)} problems, not a multiple of 15: group by --groups=column.")
        for i, row in enumerate(e.rows):
            by_group[i % 15 // 5].append(row)
        return {f"{5 * k + 1} to {5 * k + 5}": group(rows) for k, rows in sorted(by_group.items())}
    for row in e.rows:
        if row["difficulty"] is not None:
            by_group[row["difficulty"]].append(row)
    names = LEVELS if e.of_programs else {}
    return {names.get(level, f"{level:g}"): group(rows) for level, rows in sorted(by_group.items())}


def groups_table(folder: Path, by: str | None = None) -> str:
    """The groups of one evaluation as Markdown; empty if its set has no difficulties, or too many for a table."""
    made = groups(read_evaluation(folder), by)
    return _groups_markdown(made) if 0 < len(made) <= MOST_GROUPS else ""


def _groups_markdown(made: dict[str, Group]) -> str:
    k = next(iter(made.values())).samples
    head = ["difficulty", "problems", f"Cons@{k}", f"correct of {k}", f"answered of {k}",
            "precision, mean over problems", "precision, pooled", "Pass@1", "tokens"]  # fmt: skip
    shown = (("cons_at_k", 3), ("correct", 1), ("answered", 1), ("precision", 3), ("pooled_precision", 3),
             ("pass_at_1", 3), ("length_mean", 0))  # fmt: skip
    rows = [[name, str(g.problems), *(g.measure(key).cell(None, digits) for key, digits in shown)]
            for name, g in made.items()]  # fmt: skip
    return _markdown(head, rows)


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


# ------------------------------------------------------------------------------------------------------- Tables 1 to 4


def accuracy_table(rows: dict[str, tuple[Paper, Paper]], evaluations: dict[tuple[str, str], Evaluation]) -> str:
    """Tables 1 and 2: Cons@32, Pass@1 and length on both exams."""
    out = []
    for label, papers in rows.items():
        line = [label]
        for data, paper in zip(SETS, papers, strict=True):
            e = evaluations.get((label, data))
            for key, digits in (("cons_at_k", 3), ("pass_at_1", 3), ("length_mean", 0)):
                ours = e.measure(key) if e else Measured(None)
                same = key != "cons_at_k" or (e is not None and e.samples == SAMPLES)
                line.append(ours.cell(getattr(paper, key), digits, comparable=same))
        out.append(line)
    return _markdown(["", *(f"{d} {m}" for d in SETS for m in ("Cons@32", "Pass@1", "tokens"))], out)


def code_table(evaluations: dict[tuple[str, str], Evaluation]) -> str:
    """Table 3: programs, and their length by difficulty."""
    out = []
    for label, (pass_at_1, *lengths) in TABLE_3.items():
        e = evaluations.get((label, "LiveCodeBench"))
        line = [label, (e.measure("pass_at_1") if e else Measured(None)).cell(pass_at_1, 4)]
        line.append((e.measure("length_mean") if e else Measured(None)).cell(lengths[0], 0))
        made = groups(e) if e else {}
        for level, paper in zip(LEVELS.values(), lengths[1:], strict=True):
            ours = made[level].measure("length_mean") if level in made else Measured(None)
            line.append(ours.cell(paper, 0))
        out.append(line)
    return _markdown(["", "Pass@1", "tokens", *(f"tokens, {level}" for level in LEVELS.values())], out)


def difficulty_table(evaluations: dict[tuple[str, str], Evaluation], by: str | None) -> str:
    """Table 4: AIME25 by position in the exam. Counts are scaled to 32 samples."""
    out = []
    for label, papers in TABLE_4.items():
        e = evaluations.get((label, "AIME25"))
        made = groups(e, by) if e and e.rows else {}
        for name, (cons, correct, answered, precision, pass_at_1) in papers.items():
            g = made.get(name)
            scale = SAMPLES / g.samples if g else 1.0
            line = [label, name]
            for key, paper, digits, factor in (
                ("cons_at_k", cons, 1, 1.0), ("correct", correct, 1, scale), ("answered", answered, 1, scale),
                ("precision", precision, 3, 1.0), ("pooled_precision", None, 3, 1.0), ("pass_at_1", pass_at_1, 3, 1.0),
            ):  # fmt: skip
                ours = g.measure(key, factor) if g else Measured(None)
                same = key != "cons_at_k" or (g is not None and g.samples == SAMPLES)
                line.append(ours.cell(paper, digits, comparable=same))
            out.append(line)
    return _markdown(["", "problems", "Cons@32", "correct of 32", "answered of 32", "precision, mean over problems",
                      "precision, pooled", "Pass@1"], out)  # fmt: skip


def other_table(evaluations: Sequence[Evaluation]) -> str:
    """Evaluations for which the paper has no number."""
    out = []
    for e in evaluations:
        size = f"{e.record['problems']} x {e.samples}"
        cells = [e.measure(key).cell(None, digits) for key, digits in
                 (("cons_at_k", 3), ("pass_at_1", 3), ("length_mean", 0))]  # fmt: skip
        out.append([e.label, e.data, size, *cells])
    return _markdown(["", "set", "problems x samples", "Cons@k", "Pass@1", "tokens"], out)


def unlike_the_paper(e: Evaluation) -> list[str]:
    """Settings of an evaluation that differ from the paper's, one sentence each."""
    size = "7B" if e.label.startswith("7B") else "14B"
    wanted: dict[str, tuple] = {
        "evaluate.samples": (SAMPLES,),
        "evaluate.temperature": (0.6,),
        "evaluate.min_p": (0.01,),
    }
    wanted["rollout.max_tokens"] = LIMITS[size]
    if e.of_programs:
        wanted = {}  # the paper does not say how it sampled programs
    return [f"{e.label}, {e.data}: {key} is {e.asked[key]}, in the paper {values[-1]}."
            for key, values in wanted.items() if key in e.asked and e.asked[key] not in values]  # fmt: skip


def tables(evaluations: Sequence[Evaluation], by: str | None = None) -> str:
    """All tables as Markdown. Raises ValueError for two evaluations of one model on one set."""
    in_paper: dict[tuple[str, str], Evaluation] = {}
    rest = []
    known = {"AIME24": {**TABLE_1, **TABLE_2}, "AIME25": {**TABLE_1, **TABLE_2}, "LiveCodeBench": TABLE_3}
    for e in evaluations:
        data = next((d for d in known if e.data.lower().partition(":")[0].partition("?")[0] == d.lower()), e.data)
        if (e.label, data) in in_paper or any((e.label, e.data) == (r.label, r.data) for r in rest):
            raise ValueError(f"{e.label} has two evaluations on {e.data}: give one of them, or each a LABEL.")
        if data in known and e.label in known[data]:
            in_paper[e.label, data] = e
        else:
            rest.append(e)
    parts: list[tuple[str, Callable[[], str]]] = [
        ("Table 1: what each part adds, 7B", lambda: accuracy_table(TABLE_1, in_paper)),
        ("Table 2: 14B", lambda: accuracy_table(TABLE_2, in_paper)),
        ("Table 3: LiveCodeBench v5", lambda: code_table(in_paper)),
        ("Table 4: AIME25 by position in the exam, 7B", lambda: difficulty_table(in_paper, by)),
    ]
    if rest:
        parts.append(("Not in the paper", lambda: other_table(rest)))
    text = "".join(f"## {title}\n\n{make()}\n" for title, make in parts)
    for e in rest:
        if 0 < len(made := groups(e)) <= MOST_GROUPS:
            text += f"### {e.label} on {e.data} by difficulty\n\n{_groups_markdown(made)}\n"
    notes = [note for e in in_paper.values() for note in unlike_the_paper(e)]
    notes.append("Cells: ours [95 % interval] / the paper's; ≠: the paper's value lies outside the interval.")
    return text + "".join(f"- {note}\n" for note in notes)


def main(args: list[str]) -> None:
    p = argparse.ArgumentParser(prog="python -m lead_fast.evaluate", description=(__doc__ or "").splitlines()[0])
    p.add_argument("--tables", nargs="+", metavar="[LABEL=]DIR[,DIR...]", required=True, help="folders of evaluations")
    p.add_argument("--output", default=".", help="folder for tables.md")
    p.add_argument(
        "--groups", choices=("position", "column"), help="grouping of Table 4; default: position, for AIME25"
    )
    a = p.parse_args(args)
    evaluations = []
    for given in a.tables:
        label, _, folders = given.rpartition("=")
        evaluations += [read_evaluation(Path(f), label) for f in folders.split(",") if f]
    text = tables(evaluations, a.groups)
    folder = Path(a.output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tables.md").write_text(text, encoding="utf-8")
    print(text)
