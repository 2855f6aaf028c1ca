"""Show a finished run as one HTML page with PNGs, or several runs as a table and a picture.

    python -m lead_fast.report RUN_DIR [--out DIR]
    python -m lead_fast.report RUN_DIR --serve [--port PORT]
    python -m lead_fast.report --compare LABEL=RUN_DIR[,RUN_DIR...] ... --out DIR

The page is one file: pictures are inline, all text is escaped, nothing is fetched. Runs under one LABEL differ only in
their seed: their mean and spread are shown.
"""

import argparse
import base64
import html
import statistics
import sys
import tempfile
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .runtime.console import clock
from .runtime.jsonl import read_jsonl
from .runtime.metric_table import answers_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


Record = dict[str, Any]


# Okabe and Ito's palette, whose colours colour-blind readers can distinguish.
BLUE, ORANGE, GREEN, PURPLE, SKY, AMBER, GREY = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#AA4499",
    "#56B4E9",
    "#E69F00",
    "#8A8F98",
)
LINES = (BLUE, ORANGE, GREEN, PURPLE, AMBER, SKY, GREY)
PHASES = {
    "rollout": BLUE,
    "reward": SKY,
    "advantage": "#F0E442",
    "pack": "#CC79A7",
    "train": ORANGE,
    "optim": AMBER,
    "sync": GREEN,
    "keep": "#882255",
    "evaluate": GREY,
    "save": "#3B3F46",
}
INK, FAINT = "#24292F", "#D9DCE1"
STYLE: dict[Any, Any] = {
    "figure.dpi": 160,
    "figure.facecolor": "white",
    "font.size": 10,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#9AA0A8",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 2,
    "lines.markersize": 5,
}
BAND_LEVELS = 12  # more difficulties than this are merged into BANDS bands of about equally many problems
BANDS = 8
WIDE = 14.6  # inches; a picture that spans two columns has letters of the same size as the others


@dataclass(frozen=True)
class Run:
    """What a run's folder holds, records in the order of steps."""

    folder: Path
    train: list[Record]
    evals: list[Record]

    @property
    def ends(self) -> tuple[Record, Record]:
        """First and last evaluation; in a run without any, the first and last training batch instead."""
        records = self.evals or [r | {"pass_at_1": r.get("accuracy")} for r in self.train]
        return records[0], records[-1]


def read_run(run_dir: str | Path) -> Run:
    """Read RUN_DIR/metrics.jsonl; if a step was recorded twice, the later record counts.

    Raises:
        ValueError: the file is missing, or holds no record of training or evaluation.
    """
    folder = Path(run_dir)
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{folder} has no metrics.jsonl: give the run directory of a lead_fast.train run.")
    by_step = {(r.get("kind"), r["step"]): r for r in read_jsonl(path)}
    kinds = [[by_step[key] for key in sorted(k for k in by_step if k[0] == kind)] for kind in ("train", "eval")]
    if not kinds[0] and not kinds[1]:
        if by_step:
            raise ValueError(
                f"{folder} is a run of lead_fast.sft, which has no responses to report: see its TensorBoard logs."
            )
        raise ValueError(f"{path} holds no step and no evaluation yet: let the run finish its first step.")
    return Run(folder, kinds[0], [r | answers_of(r) | half_limit(r) for r in kinds[1]])


def half_limit(record: Record) -> Record:
    """The share of responses that are correct within half of the longest budget; {} where no budget was recorded."""
    points = record.get("budget") or []
    half = [p["accuracy"] for p in points if 2 * p["tokens"] == points[-1]["tokens"]]
    return {"pass_at_half_limit": half[0]} if half else {}


# ---------------------------------------------------------------------------------------------------------- pictures


def line(records: Sequence[Record], key: str, scale: float = 1.0) -> tuple[list[int], list[float]]:
    """Steps at which `key` has a value, and the values."""
    kept = [r for r in records if r.get(key) is not None]
    return [r["step"] for r in kept], [scale * r[key] for r in kept]


def trend(values: list[float]) -> list[float]:
    """Running mean over a tenth of the steps, centred."""
    half = max(1, len(values) // 20)
    return [statistics.fmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def noisy(ax: "Axes", records: Sequence[Record], key: str, color: str, label: str | None, scale: float = 1.0) -> None:
    """Draw a value of every training batch, faint, with its running mean."""
    x, y = line(records, key, scale)
    if y:
        ax.plot(x, y, color=color, alpha=0.25, linewidth=1)
        ax.plot(x, trend(y), "s" if len(y) == 1 else "-", color=color, linewidth=1.6, alpha=0.75, label=label)


def held_out(ax: "Axes", run: Run, key: str, color: str, label: str, scale: float = 1.0, style: str = "o-") -> None:
    """Draw a value of every evaluation."""
    x, y = line(run.evals, key, scale)
    if y:
        ax.plot(x, y, style, color=color, label=label)


def stacked(ax: "Axes", steps: list[int], parts: Sequence[tuple[str, str, list[float]]]) -> None:
    """Stack values on top of each other, one unit wide per step; `parts` holds (label, color, values) from the bottom.

    Each part is one area: a bar per step and part would take minutes for a run of thousands of steps.
    """
    edges = [step + side for step in steps for side in (-0.5, 0.5)]
    bottom = [0.0] * len(edges)
    for label, color, values in parts:
        top = [low + v for low, v in zip(bottom, (v for v in values for _ in range(2)), strict=True)]
        ax.fill_between(edges, bottom, top, color=color, linewidth=0, label=label)
        bottom = top


def integer_steps(ax: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    ax.set_xlabel("step")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.margins(x=0.02)


def legend(ax: "Axes", **kw: Any) -> None:
    if ax.get_legend_handles_labels()[1]:
        ax.legend(**{"loc": "best"} | kw)


def figure(width: float, height: float, columns: int = 1, **kw: Any) -> tuple["Figure", list["Axes"]]:
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width, height), layout="constrained")
    return fig, list(fig.subplots(1, columns, squeeze=False, **kw)[0])


def draw_accuracy(run: Run) -> "Figure":
    fig, (ax,) = figure(7.2, 3.9)
    noisy(ax, run.train, "accuracy", SKY, "training batches", 100)
    held_out(ax, run, "pass_at_1", BLUE, "held-out pass@1", 100)
    if banded := [r for r in run.evals if r.get("pass_at_1_ci") and None not in r["pass_at_1_ci"]]:
        steps, low, high = zip(*((r["step"], *(100 * x for x in r["pass_at_1_ci"])) for r in banded), strict=True)
        ax.fill_between(steps, low, high, color=BLUE, alpha=0.15, linewidth=0, label="95 % interval")
    ax.set(title="Accuracy", ylabel="correct responses (%)")
    integer_steps(ax)
    legend(ax, loc="lower right")
    return fig


def draw_length(run: Run) -> "Figure":
    fig, (ax,) = figure(7.2, 3.9)
    for key, name, color in (("length_correct", "correct", BLUE), ("length_wrong", "wrong", ORANGE)):
        noisy(ax, run.train, key, color, f"{name}, training batches")
        held_out(ax, run, key, color, f"{name}, held out")
    ax.set(title="Length of responses", ylabel="mean length (tokens)")
    ax.set_ylim(bottom=0)
    integer_steps(ax)
    legend(ax, ncols=2, fontsize=9, loc="upper right", bbox_to_anchor=(1, 1.17))
    return fig


def draw_answers(run: Run) -> "Figure | None":
    """Held-out responses that have an answer, and the correct ones among them: what E trades against each other."""
    if not any(r.get("precision") is not None for r in run.evals):
        return None
    fig, (ax,) = figure(7.2, 3.9)
    held_out(ax, run, "answered_share", GREEN, "answered", 100)
    held_out(ax, run, "precision", PURPLE, "precision: correct among these", 100)
    held_out(ax, run, "pass_at_1", BLUE, "pass@1: their product", 100, "o:")  # covers precision where all are answered
    ax.set(title="Answers", ylabel="held out (%)", ylim=(0, 105))
    integer_steps(ax)
    legend(ax, fontsize=9, ncols=3, loc="upper right", bbox_to_anchor=(1, 1.14), columnspacing=1.2)
    return fig


def draw_budget(run: Run) -> "Figure | None":
    """Held-out accuracy when a response counts only up to a number of tokens, in the first and last evaluation."""
    ends = [r for r in run.ends if r.get("budget")]
    if not ends:
        return None
    fig, (ax,) = figure(7.2, 3.9)
    for record, color in zip(ends[-1:] if ends[0] is ends[-1] else ends, (GREY, BLUE), strict=False):
        points = [(0, 0.0)] + [(p["tokens"], 100 * p["accuracy"]) for p in record["budget"]]
        ax.plot(*zip(*points, strict=True), "o-", color=color, markersize=4, label=f"step {record['step']}")
        banded = [
            (p["tokens"], *p["accuracy_ci"]) for p in record["budget"] if None not in p.get("accuracy_ci", [None])
        ]
        if banded:
            at, low, high = zip(*banded, strict=True)
            ax.fill_between(at, [100 * x for x in low], [100 * x for x in high], color=color, alpha=0.15, linewidth=0)
    ax.set(title="Accuracy within a token budget", xlabel="tokens allowed", ylabel="correct within the budget (%)")
    ax.set_ylim(0, 105)
    legend(ax, loc="lower right")
    return fig


def levels(record: Record) -> list[tuple[float, int, float]]:
    """(difficulty, problems, pass@1), easiest first."""
    rows = ((float(k), v["problems"], v["pass_at_1"]) for k, v in (record.get("by_difficulty") or {}).items())
    return sorted(row for row in rows if row[2] is not None)


def band(rows: list[tuple[float, int, float]]) -> list[tuple[str, int, float]]:
    """(name, problems, pass@1) by difficulty; many levels are merged into bands of about equally many problems."""
    if len(rows) <= BAND_LEVELS:
        return [(f"{level:g}", n, rate) for level, n, rate in rows]
    problems = sum(n for _, n, _ in rows)
    bands: list[list[tuple[float, int, float]]] = [[] for _ in range(BANDS)]
    before = 0
    for row in rows:
        bands[min(BANDS - 1, before * BANDS // problems)].append(row)
        before += row[1]
    out = []
    for members in filter(None, bands):
        n = sum(m[1] for m in members)
        name = f"{members[0][0]:g}" + (f"–{members[-1][0]:g}" if len(members) > 1 else "")
        out.append((name, n, sum(m[1] * m[2] for m in members) / n))
    return out


def draw_difficulty(run: Run) -> "Figure | None":
    """Held-out pass@1 by difficulty, first and last evaluation; None if problems have no difficulty."""
    first, last = run.ends
    bars = [(r, band(levels(r)), color) for r, color in ((first, FAINT), (last, BLUE))][: 1 if first is last else 2]
    if not bars[0][1]:
        return None
    fig, (ax,) = figure(7.2, 3.9)
    width = 0.8 / len(bars)
    for i, (record, rows, color) in enumerate(bars):
        at = [x + (i - (len(bars) - 1) / 2) * width for x in range(len(rows))]
        color = "#A9B4C0" if color == FAINT else color
        drawn = ax.bar(at, [100 * rate for *_, rate in rows], width * 0.94, color=color, label=f"step {record['step']}")
        ax.bar_label(drawn, fmt="%.0f", fontsize=8, padding=2)
    names = [f"{name}\nn={n}" for name, n, _ in bars[-1][1]]
    ax.set_xticks(range(len(names)), names, fontsize=9 if len(names) <= 9 else 8)
    ax.grid(axis="x", visible=False)
    ax.set(title="Solve rate by difficulty", xlabel="difficulty (n: held-out problems)", ylabel="held-out pass@1 (%)")
    ax.set_ylim(0, 109)
    ax.set_yticks(range(0, 101, 20))
    ax.legend(loc="upper right", bbox_to_anchor=(1, 1.14), ncols=2)
    return fig


def draw_groups(run: Run) -> "Figure":
    """Groups by outcome over the steps: only mixed groups show what is right."""
    fig, (ax,) = figure(7.2, 3.9)
    kept = [r for r in run.train if r.get("solve_rate_histogram")]
    shares = [[100 * n / sum(r["solve_rate_histogram"]) for n in r["solve_rate_histogram"]] for r in kept]
    parts = ("all wrong", ORANGE, 0, 1), ("mixed", FAINT, 1, -1), ("all correct", GREEN, -1, None)
    stacked(
        ax,
        [r["step"] for r in kept],
        [(name, color, [sum(s[first:last]) for s in shares]) for name, color, first, last in parts],
    )
    ax.set(title="Outcome of groups", ylabel="groups (%)", ylim=(0, 100))
    integer_steps(ax)
    ax.margins(x=0)
    if kept:
        ax.legend(loc="upper right", bbox_to_anchor=(1, 1.14), ncols=3, columnspacing=1.2, handlelength=1.2)
    return fig


def draw_time(run: Run) -> "Figure":
    """Mean seconds of each phase, and all phases over the steps."""
    fig, (ax, over) = figure(WIDE, 3.9, 2, width_ratios=(1, 1.25))
    seconds = {p: [r.get("seconds", {}).get(p) or 0.0 for r in run.train] for p in phases(run)}
    means = {p: statistics.fmean(values) for p, values in seconds.items()}
    step_s = sum(means.values()) or 1.0
    colors = [PHASES.get(p, GREY) for p in means]
    drawn = ax.barh(list(means), list(means.values()), color=colors)
    ax.bar_label(drawn, [f"{v:.2f} s  ({100 * v / step_s:.0f} %)" for v in means.values()], padding=4, fontsize=9)
    ax.invert_yaxis()
    ax.set_xlim(0, 1.45 * max(means.values(), default=1.0) or 1.0)
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)
    ax.set(title="Time per phase", xlabel="mean seconds per step")
    stacked(over, [r["step"] for r in run.train], [(p, PHASES.get(p, GREY), values) for p, values in seconds.items()])
    over.set_ylim(0, 1.06 * max(map(sum, zip(*seconds.values(), strict=True)), default=1.0) or 1.0)
    over.set(title="Over the run", ylabel="seconds per step")
    integer_steps(over)
    return fig


def phases(run: Run) -> list[str]:
    """Phases that took time, in the order in which a step runs them."""
    took = {p for r in run.train for p, v in r.get("seconds", {}).items() if v}
    return [p for p in PHASES if p in took] + sorted(took - set(PHASES))


def draw_terms(run: Run) -> "Figure | None":
    """Mean terms of the user's reward function; None for a run without one."""
    names = list(dict.fromkeys(k for r in run.train + run.evals for k in r.get("reward_terms") or {}))
    if not names:
        return None
    fig, (ax,) = figure(7.2, 3.9)
    for i, name in enumerate(names):
        rows = [[{"step": r["step"], name: (r.get("reward_terms") or {}).get(name)} for r in rs]
                for rs in (run.train, run.evals)]  # fmt: skip
        label, color = "total" if name == "reward" else name, LINES[i % len(LINES)]
        noisy(ax, rows[0], name, color, label)
        x, y = line(rows[1], name)
        ax.plot(x, y, "o", color=color)
    ax.set(title="Reward function", ylabel="mean (line: training, dots: held out)")
    integer_steps(ax)
    legend(ax, fontsize=9)
    return fig


def draw_signal(run: Run) -> "Figure | None":
    """What lengths and outcomes leave to learn from; None for an older run, which did not record it."""
    if not any(r.get("groups_with_gradient") is not None for r in run.train):
        return None
    fig, (moving, correlation, spread) = figure(WIDE, 3.9, 3)
    noisy(moving, run.train, "groups_with_gradient", BLUE, None, 100)
    moving.set(title="Groups with a gradient", ylabel="groups (%)", ylim=(0, 105))
    noisy(correlation, run.train, "length_correctness", PURPLE, None)
    correlation.axhline(0, color=INK, linewidth=0.8)
    correlation.set(title="Length and correctness", ylabel="correlation within groups", ylim=(-1.05, 1.05))
    for height, words in ((0.97, "shorter responses are more often wrong"), (0.03, "longer ones are more often wrong")):
        correlation.text(0.02, height, words, transform=correlation.transAxes, fontsize=9, color=GREY,
                         va="top" if height > 0.5 else "bottom")  # fmt: skip
    noisy(spread, run.train, "length_spread", GREEN, None, 100)
    spread.set(title="Spread of a group's correct lengths", ylabel="standard deviation / mean (%)")
    spread.set_ylim(bottom=0)
    for ax in (moving, correlation, spread):
        integer_steps(ax)
    return fig


def draw_optimisation(run: Run) -> "Figure":
    fig, (left, right) = figure(WIDE, 3.9, 2)
    noisy(left, run.train, "entropy", BLUE, None)
    left.set(title="Entropy of the policy", ylabel="nats per token")
    noisy(right, run.train, "grad_norm", ORANGE, None)
    right.set(title="Gradient norm, before clipping", ylabel="norm")
    for ax in (left, right):
        ax.set_ylim(bottom=0)
        integer_steps(ax)
    return fig


DRAWINGS: dict[str, tuple[Callable[[Run], "Figure | None"], str]] = {
    "accuracy": (draw_accuracy, "Correct responses over the steps, in per cent"),
    "length": (draw_length, "Mean length of correct and of wrong responses over the steps"),
    "answers": (draw_answers, "Share of responses with an answer, and of those the correct ones, over the steps"),
    "budget": (draw_budget, "Correct responses within a token budget, before and after training"),
    "difficulty": (draw_difficulty, "Held-out pass@1 by difficulty, before and after training"),
    "terms": (draw_terms, "Mean terms of the reward function over the steps"),
    "groups": (draw_groups, "Groups whose responses are all wrong, mixed and all correct, in per cent"),
    "signal": (draw_signal, "Groups with a gradient, correlation of length and correctness, spread of correct lengths"),
    "time": (draw_time, "Seconds of each phase"),
    "optimisation": (draw_optimisation, "Entropy and gradient norm over the steps"),
}
NEED_TRAINING = {"groups", "signal", "time", "optimisation"}
BROAD = {"signal", "time", "optimisation"}


def draw(run: Run, out: Path) -> dict[str, Path]:
    """Draw every picture for which the run has records; returns name -> PNG."""
    import matplotlib

    written = {}
    with matplotlib.rc_context(STYLE):
        for name, (make, _) in DRAWINGS.items():
            if (run.train or name not in NEED_TRAINING) and (fig := make(run)) is not None:
                written[name] = out / f"{name}.png"
                fig.savefig(written[name])
    return written


def pictures(run_dir: str | Path) -> dict[str, tuple[str, bytes]]:
    """The pictures of a run so far: name -> (alternative text, PNG). Raises ValueError without records."""
    with tempfile.TemporaryDirectory() as folder:
        drawn = draw(read_run(run_dir), Path(folder))
        return {name: (DRAWINGS[name][1], path.read_bytes()) for name, path in drawn.items()}


# -------------------------------------------------------------------------------------------------------------- page


CSS = """
body { font: 16px/1.5 system-ui, sans-serif; color: #24292f; max-width: 1060px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.faint { color: #66707b; } img { max-width: 100%; height: auto; }
.pictures img { width: 49%; } .pictures .wide { width: 98%; }
@media (max-width: 800px) { .pictures img { width: 100%; } }
table { border-collapse: collapse; } th, td { padding: .3rem 1.2rem .3rem 0; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } tr { border-bottom: 1px solid #d9dce1; }
pre { background: #f6f7f9; padding: .7rem; overflow: auto; max-height: 28em; white-space: pre-wrap; font-size: .82rem;
  overflow-wrap: anywhere; margin: .4rem 0; }
.responses { display: flex; flex-wrap: wrap; gap: 1rem; } .response { flex: 1 1 420px; min-width: 0; }
.right { color: #00684c; font-weight: 600; } .wrong { color: #b04a00; font-weight: 600; }
"""


def write_report(run_dir: str | Path, out: str | Path | None = None) -> Path:
    """Write report.html and its pictures.

    Args:
        run_dir: folder with metrics.jsonl and, if present, config.toml (or config.json) and responses.jsonl.
        out: folder to write to; None means run_dir.
    Returns:
        the path of report.html, which depends on no other file.
    Raises:
        ValueError: the folder has no records.
    """
    run = read_run(run_dir)
    folder = make_folder(out or run_dir)
    pictures = draw(run, folder)
    images = "\n".join(
        f'<img class="{"wide" if name in BROAD else ""}" alt="{DRAWINGS[name][1]}"'
        f' src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
        for name, path in pictures.items()
    )
    name = html.escape(run.folder.resolve().name)
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{name}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width"><style>{CSS}</style></head><body>
<h1>{name}</h1>
<p class="faint">{html.escape(facts(run))}</p>
{summary_table(run)}
<h2>Pictures</h2>
<div class="pictures">{images}</div>
{responses_section(run)}
{configuration_section(run)}
</body></html>
"""
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8", errors="replace")
    return path


def make_folder(out: str | Path) -> Path:
    """The folder to write to, created if it is missing. Raises ValueError if it cannot be created."""
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ValueError(f"--out is {out}, which cannot be created ({e.strerror}): give another folder.") from e
    return Path(out)


def facts(run: Run) -> str:
    """One line about the run: steps, time, tokens, and how the held-out problems were measured."""
    records = sorted(run.train + run.evals, key=lambda r: r["step"])
    facts = [f"{records[-1]['step']} steps"]
    if elapsed := max((r.get("elapsed_s") or 0.0 for r in records), default=0.0):
        facts.append(f"{clock(elapsed)} from start to end")
    if tokens := sum(r.get("tokens") or 0 for r in run.train):
        facts.append(f"{tokens:,} tokens")
    if failed := sum(r.get("reward_function_failed") or 0 for r in run.train):
        facts.append(f"the reward function failed for {failed:,} responses")
    if speeds := line(run.train, "tokens_per_s")[1]:
        facts.append(f"{statistics.fmean(speeds):,.0f} tokens/s")
    if run.evals and run.evals[-1].get("problems"):
        last = run.evals[-1]
        facts.append(f"held out: {last['problems']} problems, each sampled {last.get('samples', 1)} x, scored 0 or 1")
        if run.train and samples_rounded(run.folder):
            facts.append("sampled by the run's own engine, with rounded weights or a rounded cache")
    else:
        facts.append("the run has no evaluation, so the table shows training batches")
    return " · ".join(facts)


def samples_rounded(folder: Path) -> bool:
    """Whether a run's engine rounds its weights or its cache."""
    try:
        rollout = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8")).get("rollout", {})
    except (OSError, ValueError):
        return False
    return rollout.get("quantization", "none") != "none" or rollout.get("kv_dtype", "auto") != "auto"


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def tokens(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


def correlation(value: float) -> str:
    return f"{value:+.2f}"


def decimals(value: float) -> str:
    return f"{value:.3f}"


ROWS = (
    ("pass_at_1", "pass@1", percent),
    ("length_correct", "length of correct responses, tokens", tokens),
    ("length_wrong", "length of wrong responses, tokens", tokens),
    ("length_mean", "length of all responses, tokens", tokens),
    ("truncated_share", "truncated responses", percent),
    ("answered_share", "responses with an answer", percent),
    ("precision", "precision: answers that are correct", percent),
    ("pass_at_half_limit", "correct within half of the token limit", percent),
)
OPTIONAL = {"answered_share", "precision", "pass_at_half_limit"}  # recorded only by newer evaluations
TRAINING_ROWS = (
    ("groups_with_gradient", "groups with a gradient", percent),
    ("length_correctness", "correlation of length and correctness within groups", correlation),
    ("length_spread", "spread of a group's correct lengths, relative to their mean", percent),
    ("entropy", "entropy, nats per token", decimals),
)


def summary_table(run: Run) -> str:
    first, last = run.ends
    rows = ""
    for key, name, show in ROWS:
        a, b = first.get(key), last.get(key)
        if key in OPTIONAL and a is None and b is None:
            continue
        cells = [interval(r, key, show) for r in (first, last)]
        rows += f"<tr><td>{name}</td><td>{cells[0]}</td><td>{cells[1]}</td><td>{change(a, b, show)}</td></tr>\n"
    head = f"<tr><th></th><th>step {first['step']}</th><th>step {last['step']}</th><th>change</th></tr>"
    return f"<table>{head}\n{rows}{training_rows(run)}</table>"


def training_rows(run: Run) -> str:
    """Rows of means over the first and the last tenth of the training batches; empty with fewer than two batches."""
    n = max(1, len(run.train) // 10)
    early, late = run.train[:n], run.train[-n:]
    rows = ""
    for key, name, show in TRAINING_ROWS if len(run.train) > 1 else ():
        a, b = (statistics.fmean(y) if (y := line(part, key)[1]) else None for part in (early, late))
        if a is not None or b is not None:
            cells = ["–" if x is None else show(x) for x in (a, b)]
            rows += f"<tr><td>{name}</td><td>{cells[0]}</td><td>{cells[1]}</td><td>{change(a, b, show)}</td></tr>\n"
    spans = [f"step {p[0]['step']}" if n == 1 else f"steps {p[0]['step']}–{p[-1]['step']}" for p in (early, late) if p]
    head = f"<tr><th>training batches</th>{''.join(f'<th>{s}</th>' for s in spans)}<th>change</th></tr>\n"
    return head + rows if rows else ""


def interval(record: Record, key: str, show: Callable[[float], str]) -> str:
    if record.get(key) is None:
        return "–"
    ci = record.get("pass_at_1_ci") if key == "pass_at_1" else None
    between = f' <span class="faint">({100 * ci[0]:.1f} to {100 * ci[1]:.1f})</span>' if ci and None not in ci else ""
    return show(record[key]) + between


def change(a: float | None, b: float | None, show: Callable[[float], str]) -> str:
    """Format a change: shares in points, correlations as differences, lengths in per cent."""
    if a is None or b is None:
        return "–"
    if show is percent:
        return f"{100 * (b - a):+.1f} points"
    if show is correlation:
        return f"{b - a:+.2f}"
    return f"{100 * (b / a - 1):+.1f} %" if a else "–"


def responses_section(run: Run, most: int = 6) -> str:
    """Responses of the first and last sampled step, those to the same problem side by side."""
    path = run.folder / "responses.jsonl"
    rows = read_jsonl(path) if path.is_file() else []
    rows = [r for r in rows if r.get("split") == "test"] or rows
    if not rows:
        return ""
    shown = {min(r["step"] for r in rows), max(r["step"] for r in rows)}
    by_problem: dict[str, dict[tuple[int, str], Record]] = {}
    for r in rows:
        if r["step"] in shown:  # a step that was repeated after a resume is shown once
            by_problem.setdefault(str(r.get("problem")), {})[r["step"], str(r.get("response"))] = r
    out = '<h2 id="responses">Sample of responses</h2>\n'
    for problem, responses in list(by_problem.items())[:most]:
        cards = "".join(response_card(r) for r in responses.values())
        out += f'<pre><b>{html.escape(problem)}</b></pre>\n<div class="responses">{cards}</div>\n'
    return out


def response_card(r: Record) -> str:
    verdict = '<span class="right">correct</span>' if r.get("correct") else '<span class="wrong">wrong</span>'
    facts = [f"step {r['step']}", f"answer: {r.get('extracted')}", f"reference: {r.get('reference')}"]
    facts += [f"{r['tokens']} tokens"] if r.get("tokens") is not None else []
    facts += [f"reward {r['reward']:.3f}"] if isinstance(r.get("reward"), (int, float)) else []
    facts += [
        f"{'function' if k == 'reward' else k} {v:.3f}" for k, v in (r.get("terms") or {}).items() if v is not None
    ]
    facts += ["truncated"] if r.get("finish_reason") == "length" else []
    note, response = html.escape(" · ".join(facts)), html.escape(str(r.get("response")))
    return f'<div class="response">{verdict} <span class="faint">{note}</span><pre>{response}</pre></div>'


def configuration_section(run: Run) -> str:
    for name in ("config.toml", "config.json"):
        if (run.folder / name).is_file():
            text = (run.folder / name).read_text(encoding="utf-8", errors="replace")
            return f"<h2>Resolved configuration</h2>\n<pre>{html.escape(text)}</pre>"
    return ""


# -------------------------------------------------------------------------------------------------------- comparison


def compare(labelled: dict[str, list[Path]], out: str | Path) -> tuple[Path, Path]:
    """Compare runs that differ in one thing, each with several seeds: a Markdown table and a picture.

    Args:
        labelled: label -> run folders, one per seed.
        out: folder to write table.md and compare.png to.
    Returns:
        the paths of both.
    Raises:
        ValueError: a folder has no records, or its run has no evaluation.
    """
    import matplotlib

    runs = {label: [read_run(folder) for folder in folders] for label, folders in labelled.items()}
    for run in (run for seeds in runs.values() for run in seeds):
        if not run.evals:
            raise ValueError(f"{run.folder} has no evaluation to compare: train with evaluate.every above 0.")
    folder = make_folder(out)
    table, picture = folder / "table.md", folder / "compare.png"
    table.write_text(comparison_table(runs), encoding="utf-8")
    with matplotlib.rc_context(STYLE):
        draw_comparison(runs).savefig(picture)
    return table, picture


def spread(values: list[float | None], digits: int = 1, sign: str = "") -> str:
    """Mean and sample standard deviation over the seeds that have a value."""
    known = [v for v in values if v is not None]
    if not known:
        return "–"
    mean = f"{statistics.fmean(known):{sign}.{digits}f}"
    return f"{mean} ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else mean


def comparison_table(runs: dict[str, list[Run]]) -> str:
    """Markdown table, one row per label: mean ± sample standard deviation over seeds, first and last evaluation."""

    def column(seeds: list[Run], at: int, key: str, scale: float) -> list[float | None]:
        return [None if (v := run.ends[at].get(key)) is None else scale * v for run in seeds]

    out = (
        "| | seeds | steps | pass@1 at start, % | pass@1 at end, % | gain, points | length of correct at start, tokens"
        " | at end, tokens | change, % | truncated at end, % |\n|:--|" + "--:|" * 9 + "\n"
    )
    for label, seeds in runs.items():
        a, b = (column(seeds, at, "pass_at_1", 100) for at in (0, -1))
        short, long = column(seeds, -1, "length_correct", 1), column(seeds, 0, "length_correct", 1)
        gain = [None if x is None or y is None else y - x for x, y in zip(a, b, strict=True)]
        cut = [None if x is None or not y else 100 * (x / y - 1) for x, y in zip(short, long, strict=True)]
        steps = ", ".join(str(s) for s in sorted({run.ends[-1]["step"] for run in seeds}))
        cells = [label.replace("|", "\\|"), str(len(seeds)), steps, spread(a), spread(b), spread(gain, sign="+")]
        cells += [spread(long), spread(short), spread(cut, sign="+"), spread(column(seeds, -1, "truncated_share", 100))]
        out += f"| {' | '.join(cells)} |\n"
    return out + "\nMean ± sample standard deviation over the seeds; held-out problems, scored 0 or 1.\n"


def draw_comparison(runs: dict[str, list[Run]]) -> "Figure":
    """Draw the mean over seeds, bold, and every seed, faint."""
    fig, axes = figure(10.4, 4.3, 2)
    wanted = (("pass_at_1", 100, "Held-out accuracy", "pass@1 (%)"), ("length_correct", 1, "Length", "tokens"))
    for ax, (key, scale, title, unit) in zip(axes, wanted, strict=True):
        for i, (label, seeds) in enumerate(runs.items()):
            color = LINES[i % len(LINES)]
            curves = [dict(zip(*line(run.evals, key, scale), strict=True)) for run in seeds]
            for curve in curves if len(curves) > 1 else []:
                ax.plot(list(curve), list(curve.values()), color=color, alpha=0.3, linewidth=0.9)
            steps = sorted(set.intersection(*(set(curve) for curve in curves)))
            means = [statistics.fmean(curve[s] for curve in curves) for s in steps]
            name = f"{label} ({len(seeds)} seeds)" if len(seeds) > 1 else label
            ax.plot(steps, means, "os^Dv<>"[i % 7] + "-", color=color, label=name)
        ax.set(title=title, ylabel=unit)
        integer_steps(ax)
    axes[1].set_title("Length of correct responses")
    axes[1].set_ylabel("mean length (tokens)")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(4, len(runs)))
    return fig


def parse_labelled(given: list[str]) -> dict[str, list[Path]]:
    """["LEAD=a,b", "GRPO=c"] -> {"LEAD": [a, b], "GRPO": [c]}."""
    out: dict[str, list[Path]] = {}
    for item in given:
        label, _, folders = item.partition("=")
        paths = [Path(f) for f in folders.split(",") if f]
        if not label or not paths:
            raise ValueError(f"--compare was given {item!r}: write LABEL=RUN_DIR[,RUN_DIR...].")
        if label in out:
            raise ValueError(f"--compare names {label!r} twice: give all its run folders at once, separated by commas.")
        out[label] = paths
    return out


def main(args: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(prog="python -m lead_fast.report", description=(__doc__ or "").splitlines()[0])
    p.add_argument("run_dir", nargs="?", help="folder of a run")
    p.add_argument("--compare", nargs="+", metavar="LABEL=RUN_DIR[,RUN_DIR...]", help="runs to compare; seeds by comma")
    p.add_argument("--out", help="folder to write to; default: the run's folder, with --compare the current one")
    p.add_argument("--serve", action="store_true", help="follow the run in a browser, rollouts included")
    p.add_argument("--port", type=int, default=8421, help="with --serve: port; 0 chooses a free one")
    p.add_argument("--host", default="127.0.0.1", help="with --serve: the address to bind")
    p.add_argument("--remote", action="store_true", help="with --serve: allow a --host that other machines can reach")
    a = p.parse_args(args)
    if bool(a.run_dir) == bool(a.compare):
        p.error("give either one RUN_DIR or --compare LABEL=RUN_DIR ...")
    if a.serve and not a.run_dir:
        p.error("--serve takes one RUN_DIR")
    if not a.serve and (a.remote or a.host != p.get_default("host") or a.port != p.get_default("port")):
        p.error("--port, --host and --remote belong to --serve")
    if a.serve:
        from .view.server import serve

        serve(Path(a.run_dir), lambda: pictures(a.run_dir), host=a.host, port=a.port, remote=a.remote)
    elif a.compare:
        table, picture = compare(parse_labelled(a.compare), a.out or ".")
        print(table.read_text(encoding="utf-8"))
        print(f"{table}  {picture}")
    else:
        print(write_report(a.run_dir, a.out))


if __name__ == "__main__":
    try:
        main()
    except ValueError as e:
        sys.exit(f"error: {e}")
