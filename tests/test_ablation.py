"""Test bench/ablation.py: measures by hand, paired differences, tables from records, runs that are kept."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parents[1] / "bench" / "ablation.py"
SPEC = importlib.util.spec_from_file_location("ablation", PATH)
assert SPEC and SPEC.loader
ablation = importlib.util.module_from_spec(SPEC)
sys.modules["ablation"] = ablation  # where its dataclasses look up their annotations
SPEC.loader.exec_module(ablation)

pytestmark = pytest.mark.quick


def samples(folder: Path, rows: list[dict]) -> None:
    folder.mkdir(parents=True)
    lines = [{"asked": {}}, *rows]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))


def row(difficulty: float, correct: list[bool], extracted: list[str | None], lengths: list[int]) -> dict:
    texts = ["No answer" if e is None else f"Work\n1+1=2\n</think>\\boxed{{{e}}}" for e in extracted]
    return {"difficulty": difficulty, "correct": correct, "extracted": extracted, "lengths": lengths, "texts": texts}


def test_measures_weigh_the_two_sets_as_the_task_has_them(tmp_path):
    samples(tmp_path / "hard", [row(4.0, [True, False, False, False], ["1", "2", None, None], [40, 9, 9, 9])])
    easy = [row(1.0, [True, True], ["1", "1"], [10, 20]), row(10.0, [False, False], ["5", None], [5, 5])]
    samples(tmp_path / "others", easy)
    m = ablation.measured(tmp_path)
    assert ablation.HARD_RATE == pytest.approx(0.4)
    assert m["pass_at_1"] == pytest.approx(0.4 * 0.25 + 0.6 * 0.5) and m["pass_at_1_hard"] == 0.25
    assert m["answered"] == pytest.approx(0.4 * 0.5 + 0.6 * 0.75)
    assert m["precision"] == pytest.approx(0.4 / 0.65)
    assert m["precision_problems"] == pytest.approx(0.4 * 0.5 + 0.3 * 1 + 0.3 * 0)
    assert m["length_correct"] == pytest.approx((0.4 * 0.25 * 40 + 0.3 * 15) / 0.4)
    assert m["by_level"] == {"1": 1.0, "4": 0.25, "10": 0.0}
    assert m["forms"]["levels 4 to 6"] == {"terse": [0.5, 0.5], "none": [0.5, 0.0]}
    assert m["forms"]["hopeless"] == {"terse": [0.5, 0.0], "none": [0.5, 0.0]}


def test_differences_are_paired_by_seed_and_have_the_standard_error_of_their_mean():
    assert ablation.paired([1, 2, 3], [3, 3, 6]) == (2.0, pytest.approx(1 / 3**0.5))
    assert ablation.paired([1], [3]) == (2.0, None)
    final = {key: 0.5 for key in ablation.MEASURES}
    finals = {"GRPO": {0: final, 1: final, 5: final}, "L": {1: final | {"length_correct": 0.25}, 5: final, 7: final}}
    assert ablation.values(finals, ablation.EFFECTS[0]) == ([1, 5], [0.5, 0.5], [0.25, 0.5])


def test_tables_and_picture_come_from_the_records_alone(tmp_path):
    final = {key: 0.5 for key in ablation.MEASURES} | {"length_correct": 50.0, "by_level": {"1": 0.75, "10": 0.0}}
    final["forms"] = {name: {"terse": [0.75, 0.5], "check": [0.25, 1.0]} for name in ablation.WRITTEN}
    for name, n in (("grpo", 50.0), ("l", 30.0), ("l-ad", 40.0)):
        for seed in (0, 1):
            folder = tmp_path / f"{name}-{seed}"
            folder.mkdir()
            record = final | {"length_correct": n + seed * len(name)}
            (folder / "evaluation.json").write_text(json.dumps(record))
            (folder / "metrics.jsonl").write_text('{"step": 0, "kind": "eval", "pass_at_1": 0.4}\n')
    text = ablation.write(tmp_path)
    assert text == (tmp_path / "table.md").read_text(encoding="utf-8") and "pass@1 40.0 % at the start" in text
    assert "| L | hopeless | 0.0 | 75.0 (50) | 0.0 | 25.0 (100) | 0.0 | 0.0 |" in text
    effects = [line for line in text.splitlines() if line.startswith("| L | GRPO")]
    assert "| 2 | -21.5 | 1.50 | -14.3 |" in effects[0]
    assert "50.0 → 30.0, 54.0 → 31.0" in effects[0] and "LEAD" not in "".join(effects)
    assert (tmp_path / "compare.png").stat().st_size > 10_000


def test_the_control_differs_from_lead_in_what_no_answer_costs_alone():
    from lead_fast.cli import load_config

    configs = {k: load_config(["--recipe=levels", *args]) for k, (_, args) in ablation.VARIANTS.items()}
    truncated = {label: (c.reward.wrong, c.reward.truncated) for label, c in configs.items()}
    assert truncated["LEAD"] == (-1.0, 0.0) and truncated["LEAD, no answer is wrong"] == (-1.0, -1.0)
    assert truncated["GRPO"] == truncated["L"] == truncated["L + AD"] == (0.0, 0.0)


def test_a_run_is_trained_from_where_it_stopped_and_a_finished_one_stays(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(ablation, "execute", lambda *args: asked.append(args))
    for made in (None, "run", "run/final"):
        if made:
            (tmp_path / made).mkdir()
        ablation.train(tmp_path / "run", ["--seed=3"], {}, 2)
    fresh = ["--seed=3", f"--output={tmp_path / 'run'}"]
    assert [a[:2] for a in asked] == [("train", fresh), ("train", [*fresh, "--resume"])] and asked[0][-1] == 2


def test_rollouts_are_compared_seed_by_seed(tmp_path):
    spec = importlib.util.spec_from_file_location("rollout_learning", PATH.parent / "rollout_learning.py")
    assert spec and spec.loader
    learning = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(learning)
    folders: dict[str, list[Path]] = {label: [] for label in learning.VARIANTS}
    for i, label in enumerate(folders):
        for seed in range(2):
            folder = tmp_path / f"{i}-{seed}"
            folder.mkdir()
            ends = (0, 0.4), (30, 0.8 + i * 0.01 * (seed + 1))
            rows = [{"kind": "eval", "step": s, "pass_at_1": p, "length_correct": 30.0} for s, p in ends]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
            folders[label].append(folder)
    lines = learning.differences_table(folders).splitlines()
    assert (
        lines[2] == "| lock step → extra problems at 100 % | pass@1, % | 2 | +1.5 | 0.50 | 80.0 → 81.0, 80.0 → 82.0 |"
    )
    assert "| gain in pass@1 since the start, points | 2 | +1.5 | 0.50 |" in lines[6] and len(lines) == 8
