"""Statistics of sampled responses: Pass@1, pass@k, Cons@k, lengths, by difficulty and token budget, with intervals.

Legend: P problems, K samples of each, B bootstrap draws. Every interval is the central 95 % of a bootstrap over
problems (a problem's samples stay together).
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .report import BLUE, LINES, STYLE, band

DRAWS = 2000
BUDGETS = 16  # points on the curve of accuracy over token budget
Equal = Callable[[str, str], bool]


@dataclass(frozen=True)
class Answered:
    """One problem's graded samples; every list has K elements, lengths are in tokens.

    extracted: the answers found in the responses.
    votes: expected fraction of majority votes that are right (see `vote`), or None if they were not counted.
    """

    id: str
    problem: str
    reference: str
    difficulty: float | None
    correct: list[bool]
    lengths: list[int]
    truncated: list[bool]
    extracted: list[str | None]
    texts: list[str] = field(default_factory=list)
    votes: float | None = None


def vote(extracted: Sequence[str | None], correct: Sequence[bool], equal: Equal) -> float:
    """Majority vote over mathematically equal answers.

    Args:
        extracted: the answers; None if a response has no answer, and so no vote.
        correct: whether each answer equals the reference; the correct ones are one candidate.
        equal: whether two wrong answers are the same answer.
    Returns:
        1.0 if the correct answer has the most votes, 0.0 if it does not, and 1/n if it ties with n - 1 others.
    """
    right = sum(1 for e, ok in zip(extracted, correct, strict=True) if ok)
    wrong = Counter(e.strip() for e, ok in zip(extracted, correct, strict=True) if e is not None and not ok)
    candidates: list[tuple[str, int]] = []
    for text, votes in wrong.most_common():
        for i, (other, so_far) in enumerate(candidates):
            if equal(text, other):
                candidates[i] = (other, so_far + votes)
                break
        else:
            candidates.append((text, votes))
    most = max([right, *(v for _, v in candidates)])
    ties = sum(v == most for _, v in candidates) + (right == most)
    return 1.0 / ties if right and right == most else 0.0


def pass_at_k(n: int, right: int, k: int) -> float:
    """Unbiased estimate of the chance that k of n samples, `right` of them correct, include a correct one."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def interval(top: np.ndarray, bottom: np.ndarray | None = None, draws: int = DRAWS) -> list[float] | None:
    """Bootstrap 95 % interval over problems of mean(top_P), or of sum(top_P) / sum(bottom_P)."""
    if not len(top):
        return None
    index = np.random.default_rng(0).integers(0, len(top), (draws, len(top)))
    below = bottom[index].sum(1) if bottom is not None else np.full(draws, len(top))
    values = top[index].sum(1)[below > 0] / below[below > 0]
    return [float(x) for x in np.quantile(values, [0.025, 0.975])] if len(values) else None


def summary(answered: Sequence[Answered], max_tokens: int) -> dict[str, Any]:
    """Summarise one model on one set: every value beside its interval (`..._ci`), shares from 0 to 1.

    Args:
        answered: problems with K samples each, the same K for all.
        max_tokens: the limit on a response, which is also the largest token budget.
    """
    correct = np.array([a.correct for a in answered], dtype=float)
    lengths = np.array([a.lengths for a in answered], dtype=float)
    samples = correct.shape[1]
    out: dict[str, Any] = {"problems": len(answered), "samples": samples}

    def put(name: str, top: np.ndarray, bottom: np.ndarray | None = None) -> None:
        total = bottom.sum() if bottom is not None else len(top)
        out[name] = float(top.sum() / total) if total else None
        out[f"{name}_ci"] = interval(top, bottom) if total else None

    put("pass_at_1", correct.mean(1))
    put("length_correct", (lengths * correct).sum(1), correct.sum(1))
    put("length_wrong", (lengths * (1 - correct)).sum(1), (1 - correct).sum(1))
    put("length_mean", lengths.mean(1))
    put("truncated_share", np.array([np.mean(a.truncated) for a in answered]))
    put("no_answer_share", np.array([np.mean([e is None for e in a.extracted]) for a in answered]))
    if all(a.votes is not None for a in answered):
        put("cons_at_k", np.array([a.votes for a in answered], dtype=float))
    ks = [k for k in (2**i for i in range(1, 12)) if k < samples] + [samples] * (samples > 1)
    for k in ks:
        put(f"pass_at_{k}", np.array([pass_at_k(samples, int(r), k) for r in correct.sum(1)]))
    out["budget"] = []
    for tokens in sorted({max(1, round(max_tokens * i / BUDGETS)) for i in range(1, BUDGETS + 1)}):
        within = (correct * (lengths <= tokens)).mean(1)  # an unfinished response counts as wrong
        out["budget"].append({"tokens": tokens, "accuracy": float(within.mean()), "accuracy_ci": interval(within)})
    groups: dict[str, list[int]] = defaultdict(list)
    for i, a in enumerate(answered):
        if a.difficulty is not None:
            groups[f"{a.difficulty:g}"].append(i)
    out["by_difficulty"] = {}
    for level, rows in sorted(groups.items(), key=lambda kv: float(kv[0])):
        right, tokens = correct[rows], lengths[rows]
        out["by_difficulty"][level] = {
            "problems": len(rows),
            "pass_at_1": float(right.mean()),
            "pass_at_1_ci": interval(right.mean(1)),
            "length_correct": float((tokens * right).sum() / right.sum()) if right.sum() else None,
            "length_mean": float(tokens.mean()),
        }
    return out


def difference(a: Sequence[Answered], b: Sequence[Answered]) -> tuple[float, list[float]] | None:
    """Pass@1 of b minus that of a, with a paired bootstrap interval; None if their problems differ."""
    first = {x.id: x for x in a}
    if [x.problem for x in b] != [first[x.id].problem for x in b if x.id in first] or len(a) != len(b):
        return None
    gain = np.array([np.mean(x.correct) - np.mean(first[x.id].correct) for x in b])
    ci = interval(gain)
    return (float(gain.mean()), ci) if ci else None


# -------------------------------------------------------------------------------------------------- table and picture


def table(records: dict[str, dict], gains: dict[str, tuple[float, list[float]] | None] | None = None) -> str:
    """Models side by side, as Markdown: percentages and tokens, intervals in brackets."""
    rows: dict[str, list[str]] = {"problems x samples": [f"{r['problems']} x {r['samples']}" for r in records.values()]}
    names = {"pass_at_1": ("Pass@1, %", 100), "cons_at_k": ("Cons@k, %", 100)}
    ks = sorted({int(k.removeprefix("pass_at_")) for r in records.values() for k in r if k.startswith("pass_at_")
                 and not k.endswith("_ci")} - {1})  # fmt: skip
    names |= {f"pass_at_{k}": (f"pass@{k}, %", 100) for k in ks}
    names |= {"length_mean": ("tokens, mean", 1), "length_correct": ("tokens, correct", 1)}
    names |= {"length_wrong": ("tokens, wrong", 1), "truncated_share": ("truncated, %", 100)}
    names |= {"no_answer_share": ("no answer found, %", 100)}
    for key, (label, scale) in names.items():
        if any(key in r for r in records.values()):
            rows[label] = [_cell(r.get(key), r.get(f"{key}_ci"), scale) for r in records.values()]
    levels = sorted({level for r in records.values() for level in r["by_difficulty"]}, key=float)
    for level in levels if len(levels) <= 12 else []:
        groups = [r["by_difficulty"].get(level, {}) for r in records.values()]
        rows[f"Pass@1 at difficulty {level}, %"] = [
            _cell(g.get("pass_at_1"), g.get("pass_at_1_ci"), 100) for g in groups
        ]
    if gains:
        shown = [_cell(*g, 100, "+") if (g := gains.get(label)) else "-" for label in records]
        rows[f"Pass@1 against {next(iter(records))}, points, paired"] = shown
    head = f"| | {' | '.join(records)} |\n|---|{'---|' * len(records)}\n"
    return head + "".join(f"| {label} | {' | '.join(cells)} |\n" for label, cells in rows.items())


def _cell(value: float | None, ci: Sequence[float] | None, scale: float, sign: str = "") -> str:
    if value is None:
        return "-"
    bounds = f" [{scale * ci[0]:{sign}.1f}, {scale * ci[1]:{sign}.1f}]" if ci else ""
    return f"{scale * value:{sign}.1f}{bounds}"


def draw(records: dict[str, dict], path: Path) -> None:
    """Draw accuracy over token budget, and by difficulty if there is one, models side by side."""
    import matplotlib
    from matplotlib.figure import Figure

    banded = {label: band([(float(k), v["problems"], v["pass_at_1"]) for k, v in r["by_difficulty"].items()])
              for label, r in records.items()}  # fmt: skip
    graded = bool(next(iter(banded.values())))
    with matplotlib.rc_context(STYLE):
        fig: Figure = Figure(figsize=(10.4 if graded else 6.4, 4.2), layout="constrained")
        axes = list(fig.subplots(1, 2 if graded else 1, squeeze=False)[0])
        for i, (label, r) in enumerate(records.items()):
            color = LINES[i % len(LINES)] if len(records) > 1 else BLUE
            tokens = [p["tokens"] for p in r["budget"]]
            low, high = zip(*(p["accuracy_ci"] for p in r["budget"]), strict=True)
            axes[0].plot(tokens, [100 * p["accuracy"] for p in r["budget"]], "os^Dv<>"[i % 7] + "-", color=color,
                         label=label)  # fmt: skip
            axes[0].fill_between(tokens, [100 * x for x in low], [100 * x for x in high], color=color, alpha=0.13,
                                 linewidth=0)  # fmt: skip
            if graded:
                width = 0.8 / len(records)
                at = [x + (i - (len(records) - 1) / 2) * width for x in range(len(banded[label]))]
                drawn = axes[1].bar(at, [100 * b[2] for b in banded[label]], 0.92 * width, color=color)
                axes[1].bar_label(drawn, fmt="%.0f", fontsize=8, padding=2)
        axes[0].set(title="Accuracy within a token budget", xlabel="tokens allowed", ylabel="correct responses (%)")
        axes[0].set_ylim(bottom=0)
        if graded:
            rows = next(iter(banded.values()))
            axes[1].set_xticks(range(len(rows)), [f"{name}\nn={n}" for name, n, _ in rows])
            axes[1].grid(axis="x", visible=False)
            axes[1].set(title="By difficulty", xlabel="difficulty (n: problems)", ylabel="Pass@1 (%)", ylim=(0, 109))
        if len(records) > 1:
            fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(4, len(records)))
        fig.savefig(path)
