"""Test bench/pipeline.py: records, tables from them alone, intervals over seeds, steps that are kept."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parents[1] / "bench" / "pipeline.py"
SPEC = importlib.util.spec_from_file_location("pipeline", PATH)
assert SPEC and SPEC.loader
pipeline = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(pipeline)

pytestmark = pytest.mark.quick

TERSE, HASTY = "3 * 4 = 12\n12 + 1 = 13\n\\boxed{13}", "\\boxed{14}"


def record(pass_at_1: float, length: float | None, forms: dict[str, list[float]]) -> dict:
    curve = [{"tokens": n, "accuracy": pass_at_1 * n / 192} for n in (96, 192)]
    level = {"2": {"pass_at_1": pass_at_1}}
    return {"problems": 3, "samples": 2, "pass_at_1": pass_at_1, "length_correct": length, "length_mean": 60.0,
            "no_answer_share": 0.0, "budget": curve, "by_difficulty": level, "forms": forms}  # fmt: skip


def write(out: Path, seeds: dict[int, tuple[float, float | None]]) -> None:
    """Write records of seeds whose pass@1 goes from .5 to the first value, and length from 80 to the second."""
    out.mkdir()
    (out / "base.json").write_text(json.dumps(record(0.0, None, {"other": [1.0, 0.0]})))
    (out / "sft.json").write_text(json.dumps(record(0.5, 80.0, {"hasty": [0.5, 0.25], "terse": [0.5, 0.75]})))
    for seed, (right, length) in seeds.items():
        (out / f"seed-{seed}").mkdir()
        for name in pipeline.STAGES:
            (out / f"seed-{seed}" / f"{name}.json").write_text(
                json.dumps(record(right, length, {"terse": [1.0, right]}))
            )


def run(monkeypatch, *args: str) -> None:
    monkeypatch.setattr(sys, "argv", ["pipeline.py", *args])
    pipeline.main()


def test_table_and_picture_come_from_the_records_alone(tmp_path, monkeypatch, capsys):
    write(tmp_path / "out", {0: (0.6, 40.0), 1: (0.7, 40.0), 2: (0.8, 48.0)})
    run(monkeypatch, "--table", f"--out={tmp_path / 'out'}")
    text = (tmp_path / "out" / "table.md").read_text()
    assert text in capsys.readouterr().out
    assert "3 held-out problems x 2 samples, 3 seeds" in text
    # mean .7, standard deviation .1, t of two degrees of freedom 4.303: 4.303 * 10 / sqrt(3) = 24.8
    assert "| Pass@1, % | 0.0 | 50.0 | 70.0 [45.2, 94.8] | 70.0 [45.2, 94.8] |" in text
    assert "| correct responses, tokens | - | 80.0 |" in text
    assert "| hasty responses, % (of them right, %) | - | 50.0 (25) | 0.0 | 0.0 |" in text
    assert "| terse responses, % (of them right, %) | - | 50.0 (75) | 100.0 (70) |" in text
    assert "| pass@1, points | +20.0 [-4.8, +44.8] | at least +5 | +10.0, +20.0, +30.0 |" in text
    assert "| correct responses, % | -46.7 [-61.0, -32.3] | at most -30 | -50.0, -50.0, -40.0 |" in text
    assert (tmp_path / "out" / "compare.png").stat().st_size > 5000


def test_one_seed_has_no_interval_and_none_is_an_error(tmp_path, monkeypatch):
    write(tmp_path / "out", {4: (0.6, 40.0)})
    run(monkeypatch, "--table", f"--out={tmp_path / 'out'}")
    assert "| Pass@1, % | 0.0 | 50.0 | 60.0 | 60.0 |" in (tmp_path / "out" / "table.md").read_text()
    write(tmp_path / "none", {})
    with pytest.raises(ValueError, match="none holds no seed's records: run python bench/pipeline.py"):
        run(monkeypatch, "--table", f"--out={tmp_path / 'none'}")


def test_a_pipeline_in_which_nothing_is_right_has_a_table_too(tmp_path, monkeypatch):
    """As with --scale 0.1, whose few steps of SFT teach next to nothing."""
    write(tmp_path / "out", {0: (0.0, None)})
    run(monkeypatch, "--table", f"--out={tmp_path / 'out'}")
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| correct responses, tokens | - | 80.0 | - | - |" in text and "| pass@1, points | -50.0 |" in text
    assert "| correct responses, % |" not in text


def test_a_record_counts_the_forms_of_its_responses(tmp_path):
    (tmp_path / "evaluation.json").write_text(json.dumps({"pass_at_1": 0.5}))
    rows = [
        {"asked": {}},
        {"texts": [TERSE, HASTY], "correct": [True, False]},
        {"texts": [TERSE, ""], "correct": [False, False]},
    ]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pipeline.keep(tmp_path, tmp_path / "kept" / "sft.json")
    kept = json.loads((tmp_path / "kept" / "sft.json").read_text())
    assert kept == {"pass_at_1": 0.5, "forms": {"terse": [0.5, 0.5], "hasty": [0.25, 0.0], "other": [0.25, 0.0]}}


def test_steps_whose_results_exist_are_skipped_and_the_time_of_the_others_adds_up(tmp_path, capsys):
    steps = pipeline.Pipeline(tmp_path, ranks=1, scale=0.5)
    assert steps.steps(12) == 6 and steps.steps(1) == 2
    for _ in range(2):
        steps.run("list", tmp_path / "never", "timeit", "-n1", "-r1", "import time; time.sleep(0.2)")
    took = json.loads((tmp_path / "seconds.json").read_text())["list"]
    steps.run("list", tmp_path / "seconds.json", "timeit", "-n1", "-r1")
    assert "list: " in capsys.readouterr().out and took >= 0.4
    assert json.loads((tmp_path / "seconds.json").read_text())["list"] == took
    with pytest.raises(SystemExit, match="list ended with code .*the same command resumes from here"):
        steps.run("list", tmp_path / "never", "lead_fast.no_such_module")


def test_a_finished_run_keeps_its_export_but_no_checkpoints(tmp_path):
    for folder in ("checkpoints", "final"):
        (tmp_path / "sft" / folder).mkdir(parents=True)
    pipeline.Pipeline(tmp_path, ranks=1, scale=1).fit("SFT", tmp_path / "sft", "lead_fast.sft")
    assert [p.name for p in (tmp_path / "sft").iterdir()] == ["final"]


def test_a_folder_of_another_pipeline_is_refused_before_anything_runs(tmp_path, monkeypatch):
    other_forms = {"scale": 0.2, "model": None, "forms": {"terse": 1.0}}
    for made_with in ({"scale": 0.1, "model": None}, {"scale": 0.2, "model": None}, other_forms):
        (tmp_path / "settings.json").write_text(json.dumps(made_with))
        with pytest.raises(SystemExit, match="holds a pipeline with .*, not .*: give another --runs"):
            run(monkeypatch, f"--runs={tmp_path}", f"--out={tmp_path / 'out'}", "--scale=0.2")
