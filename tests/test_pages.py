"""Generated pages are current, and every key of metrics.jsonl has an entry that some code writes."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from jobs import ROOT, records
from pages import COMMANDS, PAGES, commands, metrics, table

from lead_fast.cli import FLAGS, keys
from lead_fast.config import Config, SftConfig
from lead_fast.learner.loss import QUANTIZED_KL
from lead_fast.runtime.journal import ASIDE
from lead_fast.runtime.metric_table import SECTIONS, Metric, metric, paths

ENTRIES = {(kind, m.key): m for s in SECTIONS for kind in s.kinds for m in s.metrics}
WRITERS = {
    "train": {
        "runtime/journal.py": ("step", "describe", "function_terms", "staleness"),
        "learner/learner.py": ("step", "means"),
        "rollout/sync.py": ("publish",),
        "rollout/engine.py": ("metrics",),
        "rollout/backlog.py": ("settle", "_count"),
    },
    "eval": {"scores.py": ("summary",), "runtime/journal.py": ("evaluation", "function_terms")},
    "sft": {"sft.py": ("sft",)},
}
"""Functions that put keys into records, by kind of record."""
INSIDE = {"tokens", "accuracy", "accuracy_ci", "problems", "pass_at_1", "pass_at_1_ci", "length_correct", "length_mean"}
"""Of the objects within an evaluation's `budget` and `by_difficulty`."""
NO_METRICS = {"examples", "record"}  # of the batches that are kept when an update is skipped


@pytest.mark.quick
@pytest.mark.parametrize("name", PAGES)
def test_a_generated_page_is_what_the_code_says_now(name):
    assert (ROOT / name).read_text(encoding="utf-8") == PAGES[name](), f"{name} is old: run python tests/pages.py"


def unknown(rows: list[dict]) -> set[str]:
    """Keys of records without an entry."""
    out = set()
    for row in rows:
        for path in paths(row):
            try:
                metric(path, row["kind"])
            except KeyError as e:
                out.add(str(e))
    return out


def test_every_key_that_runs_wrote_has_an_entry(tiny_run):
    evidence = sorted((ROOT / "docs" / "evidence").rglob("metrics.jsonl"))
    rows = [*records(tiny_run), *(json.loads(line) for f in evidence for line in f.read_text().splitlines())]
    assert {r["kind"] for r in rows} == {"train", "eval"} and len(evidence) > 20
    assert not unknown(rows)
    assert unknown([{"kind": "train", "seconds": {"sync": 1.0}, "accuracy": 0.5, "new_metric": 1.0}])
    assert unknown([{"kind": "eval", "accuracy": 0.5}])


def written_in(path: Path, functions: tuple[str, ...]) -> Iterator[str]:
    """Keys that functions of a file write: of dicts, subscripts and `put`; a K stands for what is filled in."""
    seen = set()
    for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(function, ast.FunctionDef) or function.name not in functions:
            continue
        seen.add(function.name)
        for node in ast.walk(function):
            keys: list[ast.expr | None] = []
            if isinstance(node, ast.Dict):
                keys = list(node.keys)
            elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
                keys = [node.slice]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "put":
                keys = [node.args[0]]
            for key in keys:
                if isinstance(key, ast.Constant) and isinstance(key.value, str):
                    yield key.value
                elif isinstance(key, ast.JoinedStr):
                    yield "".join(v.value if isinstance(v, ast.Constant) else "K" for v in key.values)
    assert seen == set(functions), f"{path.name} has no {set(functions) - seen}"


@pytest.mark.quick
@pytest.mark.parametrize("kind", WRITERS)
def test_entries_are_the_keys_that_code_writes(kind):
    written = {k for file, names in WRITERS[kind].items() for k in written_in(ROOT / "lead_fast" / file, names)}
    written -= NO_METRICS | {"K_ci"}
    entries = {m.key: m for (of, _), m in ENTRIES.items() if of == kind and m.value is None}
    heads = {key.split("/")[0] for key in entries} - {"kind", "step"}  # Metrics writes these two
    if kind == "eval":
        heads |= INSIDE
    assert written - heads == set(), "written without an entry in metric_table.py"
    assert heads - written == set(), "an entry of metric_table.py that nothing writes"


@pytest.mark.quick
def test_phases_are_named_in_their_entry():
    source = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "lead_fast").rglob("*.py"))
    entered = set(re.findall(r"phase\(\"(\w+)\"\)", source))
    assert {*ASIDE, "rollout", "keep"} <= entered
    assert entered == set(re.findall(r"`(\w+)`", metric("seconds/rollout").meaning))


@pytest.mark.quick
def test_ranges_say_what_is_wrong_and_what_to_do():
    for m in ENTRIES.values():
        has_range = m.spike or m.low is not None or m.high is not None
        assert has_range == bool(m.outside), m.key
        assert m.remedy or not has_range, m.key
        assert m.low is None or m.high is None or m.low < m.high
    assert metric("kl_behavior").high == QUANTIZED_KL  # where a quantised run ends
    usual = [{"grad_norm": 0.2}, {"grad_norm": 0.4}, {"grad_norm": 0.3}]
    assert metric("grad_norm").bounds(usual) == (None, pytest.approx(3.0))
    assert metric("grad_norm").bounds([]) == (None, None) and metric("accuracy").bounds(usual) == (0.1, 0.9)


@pytest.mark.quick
def test_derived_numbers_and_patterns():
    assert metric("mixed_groups").of({"solve_none": 0.25, "solve_all": 0.5}) == 0.25
    assert metric("clipped_share").of({"clip_low_share": 0.1, "clip_high_share": None}) == 0.1
    assert metric("pass_at_16_ci", "eval").key == "pass_at_K" and metric("pass_at_1", "eval").key == "pass_at_1"
    assert metric("by_difficulty/3.5/pass_at_1_ci", "eval").key == "by_difficulty/LEVEL/pass_at_1"
    for wrong, kind in (("seconds", "train"), ("accuracy_ci", "train"), ("pass_at_1", "train"), ("seconds/a/b", "sft")):
        with pytest.raises(KeyError, match="has no entry"):
            metric(wrong, kind)
    assert "| `accuracy` | share |" in metrics() and "10 to 90 %" in metrics()
    assert table(("a", "b"), [("1", ""), ("2", "")]) == "| a |\n| --- |\n| 1 |\n| 2 |"
    assert isinstance(metric("loss", "sft"), Metric)


def flags_in(path: Path) -> set[str]:
    """Flags that a file's code reads, by argparse or by hand: whole strings such as "--output"."""
    strings = {n.value for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Constant)}
    return {s for s in strings if isinstance(s, str) and re.fullmatch(r"--[a-z][a-z_-]+", s)}


@pytest.mark.quick
@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_of_a_command_is_in_its_section(name):
    section = commands().split(f"## lead_fast.{name}\n")[1].split("\n## ")[0]
    files = {"evaluate": ("evaluate", "tables", "crosscheck"), "data": ("data/prepare",)}.get(name, (name,))
    flags = {f for file in files for f in flags_in(ROOT / "lead_fast" / f"{file}.py")}
    if name in ("train", "sft", "evaluate", "plan"):  # these also take the configuration
        flags -= {flag.split("=")[0] for flag in FLAGS} | {f"--{key}" for key in {*keys(Config), *keys(SftConfig)}}
    listed = set(re.findall(r"^\| `(--\w+)", section, re.M))
    assert flags <= listed, f"without a row in docs/reference/commands.md: {flags - listed}"
    assert listed or name in ("train", "sft")
