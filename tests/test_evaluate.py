"""Test evaluation: numbers against definitions, resuming after a kill, benchmarks by name, comparison of models."""

import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from jobs import ROOT, environment

from lead_fast.cli import load_config
from lead_fast.data.read import BENCHMARKS, load_problems
from lead_fast.evaluate import Samples, asked, compare, evaluate, load_test, write
from lead_fast.learner.model import load_tokenizer
from lead_fast.reward.verifier import Verifier
from lead_fast.rollout.engines import make_engine
from lead_fast.scores import Answered, difference, interval, pass_at_k, summary, vote


def same(a: str, b: str) -> bool:
    return float(eval(a)) == float(eval(b))


@pytest.mark.parametrize(
    "extracted, correct, expected",
    [
        (["4", "5", "5"], [1, 0, 0], 0.0),
        (["4", "8/2", "5"], [1, 1, 0], 1.0),  # equal answers vote together
        (["3", "6/2", "9/3", "4", "4"], [0, 0, 0, 1, 1], 0.0),  # also if they are wrong
        (["4", "5"], [1, 0], 0.5),
        (["4", "5", "6"], [1, 0, 0], 1 / 3),
        ([None, None, "4"], [0, 0, 1], 1.0),  # a response without an answer has no vote
        ([None, None], [0, 0], 0.0),
    ],
)
def test_the_majority_votes_over_equal_answers(extracted, correct, expected):
    assert vote(extracted, [bool(x) for x in correct], same) == pytest.approx(expected)


def test_pass_at_k_is_the_mean_over_all_subsets():
    outcomes = [1, 0, 0, 1, 0, 0]
    for k in range(1, 7):
        subsets = list(itertools.combinations(outcomes, k))
        assert pass_at_k(6, 2, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def made(i: int, correct: list[int], lengths: list[int], difficulty: float = 1.0) -> Answered:
    found = ["1" if c else "2" for c in correct]
    return Answered(str(i), f"q{i}", "1", difficulty, [bool(c) for c in correct], lengths, [False] * len(correct),
                    list(found), [], vote(found, [bool(c) for c in correct], same))  # fmt: skip


def test_the_summary_by_hand():
    rows = [made(1, [1, 1, 0, 0], [10, 20, 30, 40]), made(2, [1, 1, 1, 0], [80, 60, 70, 90], 2.0),
            made(3, [0, 0, 0, 0], [50, 50, 50, 50], 2.0)]  # fmt: skip
    r = summary(rows, 100)
    assert r["pass_at_1"] == pytest.approx(5 / 12) and r["cons_at_k"] == pytest.approx(1.5 / 3)
    assert r["pass_at_2"] == pytest.approx((1 - 1 / 6 + 1 + 0) / 3) and r["pass_at_4"] == pytest.approx(2 / 3)
    assert r["length_correct"] == pytest.approx(240 / 5) and r["length_wrong"] == pytest.approx(360 / 7)
    budget = {p["tokens"]: p["accuracy"] for p in r["budget"]}
    assert budget[100] == pytest.approx(5 / 12) and budget[12] == pytest.approx(1 / 12) and budget[6] == 0
    assert r["by_difficulty"]["2"]["pass_at_1"] == pytest.approx(3 / 8) and r["by_difficulty"]["2"]["problems"] == 2
    low, high = r["pass_at_1_ci"]
    assert 0 <= low < 5 / 12 < high <= 1


def test_the_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(5)
    draws = [interval((rng.random(200) < 0.3).astype(float), draws=400) for _ in range(200)]
    covered = sum(d is not None and d[0] <= 0.3 <= d[1] for d in draws)
    assert 180 <= covered <= 199  # 95 % of 200, within three standard deviations


def test_the_paired_difference():
    a = [made(i, [i % 2, 0], [5, 5]) for i in range(40)]
    b = [made(i, [i % 2, 1], [5, 5]) for i in range(40)]
    assert difference(a, b) == (0.5, [0.5, 0.5])
    assert difference(a, b[:-1]) is None


# ------------------------------------------------------------------------------------------------------- with a model

ARGS = ["--evaluate.problems=8", "--evaluate.samples=3", "--rollout.batch_size=6", "--rollout.max_tokens=40"]


@pytest.fixture(scope="module")
def machine(single_rank):
    c = load_config(["--recipe=tiny", *ARGS])
    tokenizer = load_tokenizer(c.model)
    with Verifier() as verifier:
        yield c, single_rank, make_engine(c, tokenizer, single_rank), load_test(c, tokenizer), verifier


class Counting:
    """Engine that counts its prompts and can stop as if killed."""

    def __init__(self, engine, breaks_at: int = 10**9):
        self.engine, self.asked, self.breaks_at = engine, 0, breaks_at

    def generate(self, work, *args):
        if self.asked >= self.breaks_at:
            raise KeyboardInterrupt
        self.asked += len(work.prompts)
        return self.engine.generate(work, *args)


def test_a_killed_evaluation_is_resumed_and_samples_nothing_twice(machine, tmp_path):
    c, ranks, engine, (problems, prompts), verifier = machine
    unbroken = Samples(tmp_path / "unbroken.jsonl", asked(c, problems))
    record, _ = evaluate(engine, problems, prompts, verifier, c, ranks, samples=unbroken)
    path = tmp_path / "broken.jsonl"
    first = Counting(engine, breaks_at=4)
    with pytest.raises(KeyboardInterrupt):
        evaluate(first, problems, prompts, verifier, c, ranks, samples=Samples(path, asked(c, problems)))
    with open(path, "a") as f:
        f.write('{"id": "5", "half a li')
    again = Samples(path, asked(c, problems))
    assert len(again.done) == first.asked == 4
    second = Counting(engine)
    resumed, _ = evaluate(second, problems, prompts, verifier, c, ranks, samples=again)
    assert second.asked == len(problems) - 4
    assert resumed == record and path.read_text() == (tmp_path / "unbroken.jsonl").read_text()
    third = Counting(engine)
    evaluate(third, problems, prompts, verifier, c, ranks, samples=Samples(path, asked(c, problems)))
    assert third.asked == 0


def test_an_evaluation_that_is_asked_to_stop_keeps_its_portions(machine, tmp_path):
    c, ranks, engine, (problems, prompts), verifier = machine
    samples = Samples(tmp_path / "s.jsonl", asked(c, problems))
    answers = iter([False, False, True])
    record, _ = evaluate(engine, problems, prompts, verifier, c, ranks, samples=samples, leaving=lambda: next(answers))
    assert record == {} and len(samples.done) == 4 == len(Samples(samples.path, asked(c, problems)).done)
    record, _ = evaluate(engine, problems, prompts, verifier, c, ranks, samples=samples)
    assert record["problems"] == len(problems)


def test_ctrl_c_ends_an_evaluation_with_what_it_has(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "lead_fast.evaluate", "--model=tiny", "--evaluate.problems=24",
               "--rollout.batch_size=2", "--rollout.max_tokens=64", "--evaluate.samples=2"]  # fmt: skip
    process = subprocess.Popen(
        [*command, f"--output={out}"],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None and not (out / "samples.jsonl").exists():
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=120)[0]
    done = len((out / "samples.jsonl").read_text().splitlines()) - 1
    assert process.returncode == 0 and 0 < done < 24 and not (out / "evaluation.json").exists()
    assert f"Asked to stop: {done} of 24 problems are in {out}/samples.jsonl; the same command resumes." in said


def test_answers_of_weights_that_were_there_before_are_refused(tmp_path):
    from lead_fast.evaluate import weights
    from lead_fast.learner.model import EMBEDDED

    shutil.copytree(EMBEDDED["tiny"], tmp_path / "run" / "final")
    before = weights(str(tmp_path / "run"))
    (tmp_path / "run" / "final" / "README.md").write_text("a card")
    assert weights(str(tmp_path / "run")) == before == weights("tiny") and weights("a/hub-name") is None
    with open(tmp_path / "run" / "final" / "model.safetensors", "r+b") as f:
        f.seek(-1, 2)
        last = f.read(1)
        f.seek(-1, 2)
        f.write(bytes([last[0] ^ 1]))
    assert weights(str(tmp_path / "run")) != before


def test_a_run_directory_is_evaluated_with_its_own_settings(tmp_path):
    from lead_fast.checks import check
    from lead_fast.cli import dump
    from lead_fast.evaluate import own_settings, settings

    c = load_config(["--recipe=lead-14b", "--rollout.max_tokens=77", "--output=elsewhere"])
    (tmp_path / "config.toml").write_text(dump(c))
    for args in ([f"--model={tmp_path}"], ["--model", str(tmp_path)], [f"--model.path={tmp_path}"]):
        found = load_config([*own_settings(args), *args])
        assert (found.rollout.max_tokens, found.reward.grade, found.output) == (77, "after_think", "")
        assert found.model.path == str(tmp_path)
    (tmp_path / "config.toml").write_text(
        dump(load_config(["--rollout.quantization=fp8_per_channel", "--rollout.kv_dtype=fp8"]))
    )
    for more, wanted in (([], ("none", "auto")), (["--rollout.quantization=fp8_per_block"], ("fp8_per_block", "auto"))):
        args = [f"--model={tmp_path}", *more]
        found = load_config([*own_settings(args), *args])  # the weights as saved, unless asked otherwise
        assert (found.rollout.quantization, found.rollout.kv_dtype) == wanted
        assert ("The run sampled from rounded weights" if not more else "=fp8_per_block") in settings(found)
    assert "rounded" not in settings(load_config(["--model=tiny"]))
    assert own_settings([f"--model={tmp_path}", "--recipe=tiny"]) == own_settings(["--model=tiny"]) == []
    (tmp_path / "config.toml").write_text("batch_tokens = 5\n")  # a configuration of SFT
    assert own_settings([f"--model={tmp_path}"]) == []
    check(load_config(["--recipe=lead-14b", "--rollout.problems=7"]), 8, trains=False)
    with pytest.raises(ValueError, match="which does not divide 3 ranks"):
        check(load_config(["--rollout.tensor_parallel=2"]), 3, trains=False)


def test_answers_to_another_question_are_refused(machine, tmp_path):
    c, _, _, (problems, _), _ = machine
    samples = Samples(tmp_path / "s.jsonl", asked(c, problems))
    samples.add([made(1, [1], [3])])
    with pytest.raises(ValueError, match="holds responses sampled with another evaluate.temperature"):
        Samples(tmp_path / "s.jsonl", asked(c, problems) | {"evaluate.temperature": 0.1})


def test_models_side_by_side(tmp_path, capsys):
    for name, outcomes in (("a", [0, 1]), ("b", [1, 1])):
        (tmp_path / name).mkdir()
        rows = [made(i, outcomes, [5, 9]) for i in range(6)]
        Samples(tmp_path / name / "samples.jsonl", {"seed": 0}).add(rows)
        (tmp_path / name / "evaluation.json").write_text(json.dumps(summary(rows, 16)))
    compare(["--compare", f"base={tmp_path}/a", f"LEAD={tmp_path}/b", f"--output={tmp_path}"])
    shown = capsys.readouterr().out
    assert "| | base | LEAD |" in shown and "| - | +50.0 [+50.0, +50.0] |" in shown
    assert (tmp_path / "evaluation.png").stat().st_size > 5000 and (tmp_path / "table.md").read_text() in shown
    with pytest.raises(ValueError, match="holds no evaluation.json"):
        compare(["--compare", f"x={tmp_path}/none"])


def test_a_set_without_difficulty_and_without_a_right_answer(tmp_path):
    record = summary([replace(made(i, [0, 0], [5, 9]), difficulty=None) for i in range(3)], 16)
    assert record["length_correct"] is None and not math.isnan(record["pass_at_1"])
    assert "| tokens, correct | - |" in write(tmp_path, {"m": record})


# --------------------------------------------------------------------------------------------------------- benchmarks


def hub(folder: Path, split: str, rows: list[dict]) -> None:
    folder.mkdir(parents=True)
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


SCHEMAS = {
    "AIME24": ("train", {"id": 60, "problem": "P", "solution": "S", "answer": "204", "year": "2024"}, "204"),
    "AIME25": ("test", {"problem": "P", "answer": "70", "id": "0"}, "70"),
    "MATH500": ("test", {"problem": "P", "answer": "\\frac{1}{2}", "level": 2, "unique_id": "u"}, "\\frac{1}{2}"),
    "AMC23": ("test", {"id": 0, "question": "P", "answer": 27.0, "url": "u"}, "27"),
    "Minerva": ("test", {"question": "P", "answer": "4.5e33"}, "4.5e33"),
    "OlympiadBench": ("train", {"id": 1, "question": "P", "solution": ["S"], "final_answer": ["2", "-1"], "unit": None,
                                "subfield": "Algebra", "difficulty": "Competition"}, "2, -1"),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEMAS)
def test_benchmarks_by_name_read_each_sets_own_columns(name, tmp_path, monkeypatch):
    split, row, answer = SCHEMAS[name]
    assert set(SCHEMAS) == set(BENCHMARKS) and BENCHMARKS[name][1] == split
    hub(tmp_path / "set", split, [row, row])
    monkeypatch.setitem(BENCHMARKS, name, (str(tmp_path / "set"), split))
    found = load_problems(name.lower(), split="test")
    assert [(p.problem, p.reference) for p in found] == [("P", answer)] * 2
    assert found[0].difficulty == (2.0 if name == "MATH500" else None)


def test_the_named_split_or_the_only_one(tmp_path, capsys):
    hub(tmp_path / "one", "train", [{"problem": "P", "answer": "1"}])
    assert load_problems(str(tmp_path / "one"), split="test")[0].reference == "1"
    assert "has no split test: its only one, train, is used" in capsys.readouterr().out
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    (tmp_path / "two" / "validation.jsonl").write_text('{"problem": "P", "answer": "2"}\n')
    assert load_problems(str(tmp_path / "two"), split="validation")[0].reference == "2"
    with pytest.raises(ValueError, match="has no split test, only train, validation"):
        load_problems(str(tmp_path / "two"), split="test")
