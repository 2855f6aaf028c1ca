"""Test the paper's tables: our numbers beside the paper's, its definition of precision, and lighteval's verdicts."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lead_fast import crosscheck, tables
from lead_fast.evaluate import main
from lead_fast.scores import Answered, summary
from lead_fast.tables import TABLE_1, TABLE_3, TABLE_4, Measured, groups, read_evaluation, resampled

ASKED = {"evaluate.samples": 32, "evaluate.temperature": 0.6, "evaluate.min_p": 0.01, "rollout.max_tokens": 8192,
         "reward.grade": "all"}  # fmt: skip


def problem(i: int, correct: int, answered: int, samples: int, length: int, difficulty: float | None = None) -> dict:
    """Make a row of samples.jsonl: right answers first, then wrong ones that all differ, then responses without one."""
    right = [k < correct for k in range(samples)]
    found = [("1" if k < correct else f"w{k}") if k < answered else None for k in range(samples)]
    texts = [f"\\boxed{{{e}}}" if e else "" for e in found]
    vote = float(correct > 0 and correct >= (answered > correct)) / (
        1 + (correct == 1 and answered > 1) * (answered - 1)
    )
    return {"id": str(i), "problem": f"q{i}", "reference": "1", "difficulty": difficulty, "correct": right,
            "lengths": [length + k for k in range(samples)], "truncated": [e is None for e in found],
            "extracted": found, "texts": texts, "votes": vote}  # fmt: skip


def write(folder: Path, rows: list[dict], model: str, data: str, **asked: object) -> Path:
    """Write an evaluation's folder as lead_fast.evaluate does."""
    folder.mkdir(parents=True)
    fields = ("id", "problem", "reference", "difficulty", "correct", "lengths", "truncated", "extracted")
    named = [[r[k] for k in fields] for r in rows]
    record = summary([Answered(*v, texts=[], votes=r["votes"]) for v, r in zip(named, rows, strict=True)], 8192)
    (folder / "evaluation.json").write_text(json.dumps({"model": model, "data": data} | record))
    lines = [{"asked": ASKED | asked}, *rows]
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


# Ten problems per row of the paper's table with 32 samples each: (answered, correct). Found by search.
WITNESSES = {
    ("7B base", "1 to 5"): "27,27 27,27 27,27 27,27 27,27 26,26 26,26 12,1 4,0 0,0",
    ("7B L + AD", "1 to 5"): "32,18 32,2 31,31 31,29 30,22 29,26 29,22 28,28 25,23 2,0",
    ("7B LEAD", "1 to 5"): "32,32 32,31 32,30 32,29 32,27 30,30 27,21 25,20 3,0 0,0",
    ("7B base", "6 to 10"): "26,26 23,18 20,11 20,6 17,13 14,9 10,0 7,0 1,0 0,0",
    ("7B L + AD", "6 to 10"): "32,14 32,10 31,22 28,19 27,0 25,5 23,7 22,2 12,9 10,10",
    ("7B LEAD", "6 to 10"): "32,20 30,15 30,13 28,16 24,18 21,8 16,0 11,1 7,6 1,0",
    ("7B base", "11 to 15"): "6,2 5,4 3,2 3,0 2,1 1,0 0,0 0,0 0,0 0,0",
    ("7B L + AD", "11 to 15"): "22,0 22,0 21,0 21,0 17,0 14,0 9,6 9,5 6,2 5,0",
    ("7B LEAD", "11 to 15"): "27,1 13,0 11,0 6,4 6,3 5,3 4,3 4,0 1,1 0,0",
}


def witness(label: str, name: str) -> list[tuple[int, int]]:
    pairs = [word.split(",") for word in WITNESSES[label, name].split()]
    return [(int(a), int(c)) for a, c in pairs]


@pytest.mark.parametrize("label, name", WITNESSES)
def test_the_papers_precision_is_a_mean_over_problems_and_not_pooled(label, name):
    """Its two columns of counts give a different, pooled precision; ten problems exist that give its mean."""
    _, correct, answered, precision, pass_at_1 = TABLE_4[label][name]
    assert abs(correct / answered - precision) > 0.03
    g = tables.group([problem(i, c, a, 32, 100) for i, (a, c) in enumerate(witness(label, name))])
    assert abs(g.precision - precision) <= 0.00051 and abs(g.pass_at_1 - pass_at_1) <= 0.00051
    assert abs(g.correct - correct) <= 0.0501 and abs(g.answered - answered) <= 0.0501
    assert abs(g.pooled_precision - precision) > 0.03


def test_groups_by_place_and_by_column(tmp_path):
    rows = [problem(i, i % 15 + 1, 16 + i % 15, 32, 10, float(i // 10)) for i in range(30)]
    e = read_evaluation(write(tmp_path / "a", rows, "m", "AIME25"))
    by_place = groups(e)
    assert [*by_place] == ["1 to 5", "6 to 10", "11 to 15"] and all(g.problems == 10 for g in by_place.values())
    first = by_place["1 to 5"]
    assert first.correct == np.mean([1, 2, 3, 4, 5]) and first.answered == np.mean([16, 17, 18, 19, 20])
    ratios = [1 / 16, 2 / 17, 3 / 18, 4 / 19, 5 / 20]
    assert first.precision == pytest.approx(np.mean(ratios)) and first.pooled_precision == pytest.approx(15 / 90)
    assert [*groups(e, "column")] == ["0", "1", "2"]
    e.rows = e.rows[:29]
    assert [*groups(e)] == ["0", "1", "2"]
    with pytest.raises(ValueError, match="29 problems, not a multiple of 15"):
        groups(e, "position")


def test_the_interval_holds_the_truth_as_often_as_it_says():
    """Repeats evaluations of one model on fixed problems, each with new samples."""
    rng = np.random.default_rng(3)
    chances = rng.random(12)
    held = 0
    for _ in range(60):
        rows = []
        for i, p in enumerate(chances):
            row = problem(i, 0, 32, 32, 5)
            row["correct"] = (rng.random(32) < p).tolist()
            rows.append(row)
        low, high = np.quantile(resampled(rows, 300)["pass_at_1"], [0.025, 0.975])
        held += low <= chances.mean() <= high
    assert 50 <= held <= 60


def test_every_value_lies_in_its_interval():
    rng = np.random.default_rng(0)
    rows = [problem(i, int(rng.integers(0, 33)), 32, 32, 50 * i) for i in range(12)]
    g = tables.group(rows)
    for key, ci in g.ci.items():
        assert ci is not None and ci[0] <= getattr(g, key) <= ci[1], key
    assert len(g.ci) == 6 and tables.group([r | {"votes": None} for r in rows]).cons_at_k is None
    draws = resampled(rows)
    assert abs(draws["pass_at_1"].mean() - g.pass_at_1) < 0.003 and draws["correct"].std() > 0


def test_a_mark_stands_where_the_papers_number_is_outside_of_the_interval():
    assert Measured(0.45, [0.42, 0.48]).cell(0.431, 3) == "0.450 [0.420, 0.480] / 0.431"
    assert Measured(0.45, [0.42, 0.48]).cell(0.40, 3) == "0.450 [0.420, 0.480] / 0.400 ≠"
    assert Measured(0.45, [0.42, 0.48]).cell(0.4195, 3) == "0.450 [0.420, 0.480] / 0.419" or "≠" not in Measured(
        0.45, [0.42, 0.48]).cell(0.4195, 3)  # fmt: skip
    assert Measured(0.45, [0.42, 0.48]).cell(0.40, 3, comparable=False).endswith("0.400")
    assert Measured(None).cell(6990, 0) == "- / 6990" and Measured(None).cell(None, 1) == "-"
    assert Measured(0.5).cell(0.1, 1) == "0.5 / 0.1"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write evaluations with the paper's own counts where it prints them, and one far from them."""
    base = tmp_path_factory.mktemp("evaluations")
    for label, model in (("7B base", "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"), ("7B LEAD", "runs/mine")):
        rows = []
        for exam in range(2):
            for name in TABLE_4[label]:
                half = witness(label, name)[exam::2]
                rows += [problem(len(rows) + i, c, a, 32, 7098) for i, (a, c) in enumerate(half)]
        write(base / label.replace(" ", "-"), rows, model, "AIME25")
    far = [problem(i, 31, 32, 32, 9000) for i in range(30)]
    write(base / "far", far, "runs/mine", "AIME24", **{"evaluate.temperature": 1.0})
    code = [problem(i, (i % 4 > 1) * 8, 8, 8, 6000 + 1000 * (i % 3), float(i % 3 + 1)) for i in range(60)]
    write(base / "code", [r | {"reference": f"tests {r['id']}", "votes": None} for r in code], "PlanePaper/LEAD-14B",
          "LiveCodeBench:v5")  # fmt: skip
    own = [problem(i, 1, 2, 4, 30, float(2 + i % 2)) for i in range(8)]
    write(base / "own", own, "runs/stage2", "test.jsonl")
    return base


def test_all_tables_by_one_command(folders, tmp_path, capsys):
    main(["--tables", str(folders / "7B-base"), f"7B LEAD={folders}/7B-LEAD,{folders}/far", str(folders / "code"),
          str(folders / "own"), f"--output={tmp_path}"])  # fmt: skip
    text = (tmp_path / "tables.md").read_text()
    assert text in capsys.readouterr().out
    parts = {part.partition("\n")[0]: part for part in text.split("## ")}
    assert len([p for p in parts if p.startswith("Table ")]) == 4
    first = parts["Table 1: what each part adds, 7B"].splitlines()
    lead = next(line for line in first if line.startswith("| 7B LEAD |"))
    assert "/ 0.470 ≠" in lead and "/ 6104 ≠" in lead  # the evaluation far from the paper, on AIME24
    assert "0.345 ≠" not in lead and "/ 0.345" in lead  # its AIME25 matches the paper
    assert "| 7B L | - / 0.767 | - / 0.438 | - / 5275 |" in parts["Table 1: what each part adds, 7B"]
    third = parts["Table 3: LiveCodeBench v5"]
    assert "| LEAD-14B stage 2 | 0.5000 [0.5000, 0.5000] / 0.5156 ≠ |" in third
    assert all(f"/ {n}" in third for n in TABLE_3["14B base"][1:])
    fourth = parts["Table 4: AIME25 by position in the exam, 7B"]
    row = next(line for line in fourth.splitlines() if line.startswith("| 7B base | 1 to 5 |"))
    cells = [c.strip() for c in row.split("|")[3:-1]]
    assert [re.sub(r" \[.*\]", "", c) for c in cells[1:4]] == ["18.8 / 18.8", "20.3 / 20.3", "0.708 / 0.708"]
    assert cells[4] == "0.926" and cells[5].endswith("/ 0.588") and all("[" in c for c in cells[1:4])
    assert "7B LEAD, AIME24: evaluate.temperature is 1.0, in the paper 0.6." in text and "AIME25: evaluate" not in text
    assert "| stage2 | test.jsonl | 8 x 4 |" in parts["Not in the paper"]
    assert "| 2 | 4 |" in parts["stage2 on test.jsonl by difficulty\n".strip()]


def test_what_cannot_be_a_table_is_said(folders, tmp_path):
    for args, says in (
        ([str(tmp_path / "none")], "holds no evaluation.json"),
        ([f"7B L={folders}/far", f"7B L={folders}/far"], "two evaluations on AIME24"),
        ([f"x={folders}/own", f"x={folders}/own"], "two evaluations on test.jsonl"),
    ):
        with pytest.raises(ValueError, match=says):
            main(["--tables", *args, f"--output={tmp_path}"])
    (tmp_path / "evaluation.json").write_text("{}")
    with pytest.raises(ValueError, match="was not written by"):
        main(["--tables", str(tmp_path), f"--output={tmp_path}"])


def test_the_evaluations_of_the_pipeline_have_tables(tmp_path, capsys):
    """Only their evaluation.json is kept in docs."""
    docs = Path(__file__).parent.parent / "docs" / "evidence" / "pipeline"
    names = ("base", "sft", "stage1", "stage2")
    files = {n: docs / ("seed-0" if n.startswith("stage") else "") / f"{n}.json" for n in names}
    main(["--tables", *(f"{n}={path}" for n, path in files.items()), f"--output={tmp_path}"])
    out = capsys.readouterr().out
    for n, path in files.items():
        record = json.loads(path.read_text())
        assert f"| {n} | {record['data']} | 128 x 2 | - | {record['pass_at_1']:.3f} [" in out
    assert out.count("/ 0.767") >= len(TABLE_1) - 1


# ------------------------------------------------------------------------------------------------------- cross-check


def test_details_are_lightevals(folders, tmp_path):
    from pyarrow import parquet

    file, rows = crosscheck.export(folders / "own", tmp_path)
    date = file.parent.name
    assert (
        file.name == f"details_test|0_{date}.parquet" and file.parent.parent == tmp_path / "details" / "runs" / "stage2"
    )
    read = parquet.read_table(file).to_pylist()
    assert sorted(read[0]) == ["doc", "metric", "model_response"] and len(read) == len(rows) == 8
    assert read[0]["doc"]["choices"] == ["1"] and read[0]["doc"]["query"] == "q0" and read[0]["doc"]["num_samples"] == 4
    assert read[0]["model_response"]["text"] == rows[0]["texts"] and read[0]["metric"] == {"avg@n:n=4": 0.25}
    golds = [crosscheck.lighteval_reference(t) for t in ("204", "-0.5", "\\sqrt{2}", "$x$", "\\boxed{2}")]
    assert golds == ["204", "-0.5", "$\\sqrt{2}$", "$x$", "\\boxed{2}"]
    sides = crosscheck.details([rows[0] | {"texts": ["a</think>b"]}], "t|0", "after_think")
    assert sides[0]["model_response"]["text_post_processed"] == ["b"]


def test_agreement_is_counted_and_disagreements_are_listed(folders):
    rows = [json.loads(line) for line in (folders / "own" / "samples.jsonl").read_text().splitlines()][1:]
    theirs = [list(r["correct"]) for r in rows]
    theirs[3][0], theirs[5][2] = False, True
    found = crosscheck.compare(rows, theirs)
    assert found["counts"] == {
        "both correct": 7,
        "both wrong": 23,
        "ours alone correct": 1,
        "lighteval's alone correct": 1,
    }
    assert found["agreement"] == 30 / 32
    assert [(d["id"], d["sample"], d["ours"]) for d in found["disagreements"]] == [("3", 0, True), ("5", 2, False)]
    shown = crosscheck.report({"lighteval": "0"} | found)
    assert "agree on 93.75 % of 32 samples" in shown and "- problem 3, sample 0" in shown


def test_without_lighteval_one_sentence_says_how_to_get_it(folders, tmp_path):
    python = os.environ.get("LIGHTEVAL_PYTHON")
    if python is None:
        with pytest.raises(ValueError, match="pip install lighteval"):
            main(["--lighteval", str(folders / "own"), f"--output={tmp_path}", f"--python={sys.executable}"])
        assert list(tmp_path.glob("details/**/*.parquet"))
        pytest.skip("LIGHTEVAL_PYTHON names no interpreter that has lighteval: only what is said without it was tested")
    main(["--lighteval", str(folders / "own"), f"--output={tmp_path}", f"--python={python}"])
    found = json.loads((tmp_path / "crosscheck.json").read_text())
    assert found["samples"] == 32 and found["agreement"] == 1.0
    load = """
import sys
from lighteval.logging.evaluation_tracker import EvaluationTracker
from lighteval.models.model_output import ModelResponse
from lighteval.tasks.requests import Doc
tracker = EvaluationTracker(output_dir=sys.argv[1])
tracker.general_config_logger.model_name = "runs/stage2"
(rows,) = tracker.load_details_datasets("last", ["test"]).values()
print([(len(ModelResponse(**r["model_response"]).text), Doc(**r["doc"]).get_golds()) for r in rows][0])
"""
    done = subprocess.run([python, "-c", load, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip().endswith("(4, ['1'])"), done.stderr[-2000:]
