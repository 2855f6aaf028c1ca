"""Watch a run folder for the page: its records and the columns of all kept rollouts, reread as they grow."""

import itertools
import re
import statistics
import threading
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.jsonl import read_jsonl
from ..runtime.rollouts import FOLDER, GROUPS, RESPONSES, StepIndex, read_step, step_files

QUIET_S, QUIET_STEPS = 600, 5  # an unfinished run without a record for both is called silent
RECENT = 20  # steps from which the time per step is estimated


@dataclass(frozen=True)
class Range:
    """Inclusive bounds, None for an open end."""

    low: float | None = None
    high: float | None = None

    def holds(self, values: np.ndarray) -> np.ndarray:
        out = np.ones(len(values), bool)
        if self.low is not None:
            out &= values >= self.low
        if self.high is not None:
            out &= values <= self.high
        return out


@dataclass(frozen=True)
class Filter:
    """Filter of the list: groups of these steps and solve rates with at least one response that meets the rest.

    solve: per cent. correct, truncated: None accepts both.
    """

    step: Range = Range()
    solve: Range = Range()
    age: Range = Range()
    correct: bool | None = None
    truncated: bool | None = None
    sort: str = "newest"


SORTS = {"newest": "newest first", "oldest": "oldest first", "longest": "longest first", "gap": "largest gap first"}


def parse_range(name: str, text: str) -> Range:
    """Parse `12`, `10-20`, `10-` or `-20` as a Range.

    Raises:
        ValueError: it is none of these.
    """
    text = text.strip()
    if not text:
        return Range()
    match = re.fullmatch(r"(\d{1,9})?\s*(-)?\s*(\d{1,9})?", text, re.ASCII)
    if not match or not (match[1] or match[3]):
        raise ValueError(f"{name} is {text[:40]!r}: give a number, or a range such as 10-20.")
    low, high = (float(x) if x else None for x in (match[1], match[3]))
    return Range(low, high) if match[2] else Range(low, low)


def parse_filter(query: dict[str, str]) -> Filter:
    """Parse the filter of a query; unknown names are ignored.

    Raises:
        ValueError: a value cannot be read.
    """
    ranges = {name: parse_range(name, query.get(name, "")) for name in ("step", "solve", "age")}
    flags: dict[str, bool | None] = {}
    for name in ("correct", "truncated"):
        value = query.get(name, "")
        if value not in ("", "yes", "no"):
            raise ValueError(f"{name} is {value[:40]!r}: give yes or no, or omit it.")
        flags[name] = None if not value else value == "yes"
    sort = query.get("sort") or "newest"
    if sort not in SORTS:
        raise ValueError(f"sort is {sort[:40]!r}: give one of {', '.join(SORTS)}.")
    correct, truncated = flags["correct"], flags["truncated"]
    return Filter(ranges["step"], ranges["solve"], ranges["age"], correct, truncated, sort)


@dataclass(frozen=True)
class Columns:
    """All kept rollouts at one moment. G groups and N responses, ascending by step.

    step_G: int64 [G]; place_G: int64 [G], index within the step; groups: GROUPS [G], `first` counting over all
    responses; responses: RESPONSES [N], `group` counting over all groups.
    """

    indexes: dict[int, StepIndex]
    step_G: np.ndarray
    place_G: np.ndarray
    groups: np.ndarray
    responses: np.ndarray

    def select(self, wanted: Filter) -> tuple[np.ndarray, int]:
        """Positions of the groups that pass, in the order asked for, and the number of their responses that do."""
        r, n = self.responses, len(self.groups)
        kept_N = wanted.age.holds(r["age"])
        for name, value in (("correct", wanted.correct), ("truncated", wanted.truncated)):
            if value is not None:
                kept_N &= r[name] == value
        counts_G = np.bincount(r["group"], weights=kept_N, minlength=n)
        solve_G = 100 * self.groups["correct"] / np.maximum(self.groups["responses"], 1)
        kept_G = (counts_G > 0) & wanted.step.holds(self.step_G) & wanted.solve.holds(np.round(solve_G, 6))
        selected = np.flatnonzero(kept_G)
        if wanted.sort in ("longest", "gap"):
            key_G = self.mean("length") if wanted.sort == "longest" else self.mean("gap")
            selected = selected[np.argsort(-np.nan_to_num(key_G[selected], nan=-1.0), kind="stable")]
        elif wanted.sort == "newest":
            selected = selected[np.lexsort((self.place_G[selected], -self.step_G[selected]))]
        return selected, int(counts_G[selected].sum())

    def mean(self, name: str) -> np.ndarray:
        """Mean of a column over each group's responses that have a value; NaN if none has. [G]"""
        values, n = self.responses[name].astype(np.float64), len(self.groups)
        there = np.isfinite(values)
        counts = np.bincount(self.responses["group"][there], minlength=n)
        sums = np.bincount(self.responses["group"][there], weights=values[there], minlength=n)
        return np.divide(sums, counts, out=np.full(n, np.nan), where=counts > 0)


class Watched:
    """Read the folder of a running or finished run. Safe to use from several threads.

    Args:
        folder: the run directory.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._lock = threading.Lock()
        self._read: dict[Path, tuple[tuple[int, int], StepIndex | None]] = {}
        self._columns = Columns({}, np.empty(0, int), np.empty(0, int), np.empty(0, GROUPS), np.empty(0, RESPONSES))
        self._records: tuple[tuple[int, int], list[dict[str, Any]]] = ((0, 0), [])
        self.unreadable: list[str] = []

    def columns(self) -> Columns:
        """The current rollouts; unchanged files are not read again."""
        with self._lock:
            fresh: dict[Path, tuple[tuple[int, int], StepIndex | None]] = {}
            unreadable = []
            for step, path in step_files(self.folder / FOLDER).items():
                try:
                    stat = path.stat()
                    stamp = stat.st_mtime_ns, stat.st_size
                    known = self._read.get(path)
                    fresh[path] = known if known and known[0] == stamp else (stamp, read_step(step, path))
                except OSError:  # thinned out in the meantime
                    continue
                except ValueError as e:
                    unreadable.append(str(e))
            if {p: s for p, (s, _) in fresh.items()} != {p: s for p, (s, _) in self._read.items()}:
                self._columns = _join([index for _, index in fresh.values() if index is not None])
            self._read, self.unreadable = fresh, unreadable
            return self._columns

    def records(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl, [] before the first."""
        path = self.folder / "metrics.jsonl"
        with self._lock:
            try:
                stat = path.stat()
                stamp = stat.st_mtime_ns, stat.st_size
                if stamp != self._records[0]:
                    self._records = stamp, read_jsonl(path)
            except FileNotFoundError:
                self._records = (0, 0), []
            return self._records[1]

    def config(self) -> dict[str, Any]:
        """The contents of config.toml; {} if it cannot be read."""
        try:
            return tomllib.loads((self.folder / "config.toml").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    def state(self) -> dict[str, Any]:
        """The state of the run, and a mark that changes with it.

        step, steps: done and planned (None: unknown). ended: whether it is complete. silent_s: since the last record,
        None before the first. usual_s: silence that is not unusual. left_s: until the end, None if unknown.
        """
        records = self.records()
        step = max((r["step"] for r in records), default=0)
        steps = self.config().get("steps")
        stamp = self._records[0]
        silent_s = max(0.0, time.time() - stamp[0] / 1e9) if stamp[0] else None
        ended = (self.folder / "final" / "config.json").is_file() and (steps is None or step >= steps)
        times = [r["elapsed_s"] for r in records if r.get("kind") == "train" and r.get("elapsed_s") is not None]
        took_s = [b - a for a, b in itertools.pairwise(times[-RECENT - 1 :])]
        usual_s = max(QUIET_S, QUIET_STEPS * max(took_s, default=0.0))
        left_s = statistics.fmean(took_s) * (steps - step) if took_s and steps else None
        mark = f"{stamp[0]}-{stamp[1]}"
        return {"step": step, "steps": steps, "ended": ended, "silent_s": silent_s, "usual_s": usual_s,
                "left_s": left_s, "mark": mark}  # fmt: skip


def _join(indexes: list[StepIndex]) -> Columns:
    groups, responses, steps, places = [np.empty(0, GROUPS)], [np.empty(0, RESPONSES)], [], []
    before_groups = before_responses = 0
    for index in indexes:
        g, r = index.groups.copy(), index.responses.copy()
        g["first"] += before_responses
        r["group"] += before_groups
        groups.append(g)
        responses.append(r)
        steps.append(np.full(len(g), index.step))
        places.append(np.arange(len(g)))
        before_groups, before_responses = before_groups + len(g), before_responses + len(r)
    empty = [np.empty(0, int)]
    return Columns(
        {i.step: i for i in indexes},
        np.concatenate(empty + steps),
        np.concatenate(empty + places),
        np.concatenate(groups),
        np.concatenate(responses),
    )
