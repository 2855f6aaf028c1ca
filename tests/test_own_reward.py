"""Test the user's own reward function: the page docs/own-reward.md, errors in the function, use of its value."""

import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jobs import ROOT, python, records, small, succeeded

from lead_fast.checks import check
from lead_fast.cli import load_config
from lead_fast.learner.advantage import advantages
from lead_fast.records import Batch, Group, Problem, Response, Sample, Score
from lead_fast.report import write_report
from lead_fast.reward.function import Call, RewardFunction
from lead_fast.reward.grading import grade
from lead_fast.reward.verifier import Verifier
from lead_fast.runtime.console import train_line
from lead_fast.runtime.journal import function_terms
from lead_fast.runtime.jsonl import read_jsonl

PAGE = (ROOT / "docs" / "own-reward.md").read_text(encoding="utf-8")
EXAMPLE = "\n\n".join(re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S))
FAULTY = """
import os, sys, time
calls = 0

def reward(problem, response, correct):
    global calls
    calls += 1
    if problem == "raise":
        raise KeyError("no such thing")
    if problem == "sleep":
        time.sleep(60)
    if problem == "die":
        os._exit(3)
    if problem == "noise":
        print("{}", flush=True)
        print(sys.stdin.read(), file=sys.stderr)
    return {"none": None, "nan": float("nan"), "huge": 1e30, "text": "1", "list": [1.0], "empty": {},
            "key": {1: 2.0}, "inner": {"a": None}}.get(problem, 1.0)

def needs(response, temperature): return 1.0

def everything(**given): return {"total": len(given), "reward": given["columns"]["x"]}
"""


def problem(text: str = "p", **columns: Any) -> Problem:
    made = Problem("1", text, "7")
    if columns:  # a loader keeps the columns if asked to
        made = SimpleNamespace(id="1", problem=text, reference="7", columns=columns)  # type: ignore[assignment]
    return made


def config(tmp_path: Path, name: str, *more: str):
    (tmp_path / "faulty.py").write_text(FAULTY)
    return load_config([f"--reward.function={tmp_path}/faulty.py:{name}", "--reward.function_timeout_s=1.5", *more])


def test_a_failing_function_costs_one_response_and_is_counted_and_reported_once(tmp_path):
    said: list[str] = []
    c = config(tmp_path, "reward", "--reward.function_failed=-3").reward
    bad = ["none", "raise", "nan", "huge", "text", "list", "empty", "key", "inner", "die", "sleep"]
    asked = [x for name in bad for x in (name, "good")] + ["noise"]
    with RewardFunction(c, problem(), said.append) as function:
        worker = function.process
        values = function([Call(name, "", "7", {}, False) for name in asked])
        assert function.process is not worker and worker and worker.poll() is not None
    assert [(v.terms["reward"], v.failed) for v in values] == [(-3.0, True), (1.0, False)] * len(bad) + [(1.0, False)]
    assert function.failed == len(bad) and len(said) == 1 and function.process is None
    assert "returned None: the value is a NoneType, not a number; such responses get -3" in said[0]


def test_the_first_traceback_is_shown_and_a_worker_that_died_idle_costs_nothing(tmp_path):
    said: list[str] = []
    with RewardFunction(config(tmp_path, "reward").reward, problem(), said.append) as function:
        assert function.process
        os.kill(function.process.pid, 9)
        function.process.wait()
        assert [v.failed for v in function([Call("good", "", "7", {}, True)] * 200)] == [False] * 200  # four batches
        function([Call("raise", "", "7", {}, True)] * 2)
    assert len(said) == 1 and "raised KeyError" in said[0] and 'raise KeyError("no such thing")' in said[0]


@pytest.mark.parametrize(
    "name, says",
    [
        ("FILE:needs", "takes temperature: it may take problem, response, reference, columns, correct, by name."),
        ("FILE:nothing", "has no function nothing: it has reward, needs, everything."),
        ("FILE:calls", "has no function calls"),
        ("FILE:everything", "raised KeyError: 'x'; it was given a correct response to the first problem."),
        ("FILE", "write path/to/FILE.py:name or module:name."),
        ("nowhere.py:reward", "and there is no file"),
        ("no.such.module:reward", "and there is no module no.such.module"),
        ("BROKEN:reward", "cannot be imported: NameError: name 'undefined' is not defined."),
    ],
)
def test_a_function_that_cannot_be_used_is_one_sentence(name, says, tmp_path):
    (tmp_path / "faulty.py").write_text(FAULTY)
    (tmp_path / "broken.py").write_text("x = undefined\n")
    name = name.replace("FILE", f"{tmp_path}/faulty.py").replace("BROKEN", f"{tmp_path}/broken.py")
    with pytest.raises(ValueError) as e:
        RewardFunction(load_config([f"--reward.function={name}"]).reward, problem(), lambda text: None)
    assert says in str(e.value) and "\n" not in str(e.value) and str(e.value).startswith("reward.function ")


def test_columns_reach_the_function_and_the_entry_reward_is_the_total(tmp_path):
    c = config(tmp_path, "everything").reward
    with RewardFunction(c, problem(x=0.25)) as function, Verifier() as verifier:
        samples = grade([problem(x=0.75)], {0: [Response([1], [0.0], "stop", "\\boxed{8}", 0)]}, verifier, c, function)
    (score,) = [s.score for s in samples[0]]
    assert (
        score.terms == {"reward": 0.75, "total": 5.0} and score.correct
    )  # 0.75 is above 0, whatever the verifier says


# ------------------------------------------------------------------------------------------------- what becomes of it


def scores(values: list[float], correct: list[bool] | None = None) -> list[Score]:
    correct = correct or [v > 0 for v in values]
    return [Score(ok, None, False, False, {"reward": v}) for v, ok in zip(values, correct, strict=True)]


def test_replace_makes_the_value_the_reward_and_add_adds_it():
    values, lengths = [2.0, 0.5, -0.5, 0.0], [10, 20, 30, 40]
    base = ["--rollout.group_size=4", "--reward.function=x.py:f"]
    plain = load_config([*base, "--advantage.length_reward=false"])
    credit = advantages(scores(values), lengths, plain, torch.device("cpu"))
    assert credit.reward.tolist() == values and credit.solve_rate.tolist() == [0.5]
    shaped = advantages(scores(values), lengths, load_config(base), torch.device("cpu"))
    z = 5 / (50**0.5 + 1e-6)  # lengths 10 and 20 among the correct
    short, long = (torch.exp(torch.tensor(0.05 * s * z)).item() for s in (1, -1))
    assert shaped.reward.tolist() == pytest.approx([2 + short - 1, 0.5 + long - 1, -0.5, 0.0], abs=1e-6)
    right = [True, False, True, False]
    added = load_config([*base, "--reward.mode=add", "--advantage.length_reward=false", "--reward.wrong=-1"])
    credit = advantages(scores(values, right), lengths, added, torch.device("cpu"))
    assert credit.reward.tolist() == [3.0, -0.5, 0.5, -1.0] and credit.solve_rate.tolist() == [0.5]
    buffered = load_config([*base, "--advantage.length_reward=false", "--rollout.max_tokens=40",
                            "--reward.overlong_buffer=20"])  # fmt: skip
    assert advantages(scores(values), lengths, buffered, torch.device("cpu")).reward.tolist() == [2.0, 0.5, -1.0, -1.0]


def test_rewards_that_replace_would_leave_unused_are_refused(tmp_path):
    given = [f"--reward.function={tmp_path}/x.py:f", "--preset=official"]
    with pytest.raises(ValueError, match="and there is no file"):
        check(load_config(given), 1)
    check(load_config(given), 1, trains=False)  # an evaluation does not call the function
    (tmp_path / "x.py").touch()
    with pytest.raises(ValueError, match="reward.truncated is 0.0 with reward.mode=replace.*--reward.truncated=none"):
        check(load_config(given), 1)
    check(load_config([*given, "--reward.mode=add"]), 1)
    check(load_config([*given, "--reward.truncated=none", "--reward.degenerate=none"]), 1)


def test_terms_are_means_over_the_responses_that_have_them():
    samples = [Sample(Response([1], [0.0], "stop", "", 0), s) for s in scores([1.0, 0.0, 0.5])]
    samples.append(Sample(samples[0].response, Score(False, None, False, False, {"reward": 2.5, "brief": 0.2}, True)))
    found = function_terms(Batch([Group(problem(), [1], samples)]))
    assert found == {"reward_terms": {"reward": 1.0, "brief": 0.2}, "reward_function_failed": 1}
    assert "function  1.000  brief  0.200" in train_line({"step": 1} | found, 9, None)


# ---------------------------------------------------------------------------------------------------------------- runs


def test_the_pages_example_adds_a_tenth_by_one_file(tmp_path):
    """The embedded model writes no `####`; some of its lines begin with `So`."""
    assert EXAMPLE.count('"####"') == 1
    (tmp_path / "my_reward.py").write_text(EXAMPLE.replace('"####"', '"So"'))
    (flags,) = re.findall(r"^torchrun .* -m lead_fast.train (.*)$", PAGE, re.M)
    args = [a.replace("my_reward.py", f"{tmp_path}/my_reward.py") for a in flags.split()]
    run = tmp_path / "run"
    done = succeeded(python("-m", "lead_fast.train", *small(tmp_path, *args, "--steps=2", f"--output={run}")))
    rows = records(run, "train")
    assert len(rows) == 2 and all(r["reward_function_failed"] == 0 and "reward" in r["reward_terms"] for r in rows)
    assert re.search(r"step +1/2  reward +\S+  function +\S+  correct", done.stdout)
    responses = read_jsonl(run / "responses.jsonl")
    lined = [any(line.startswith("So") for line in r["response"].splitlines()) for r in responses]
    assert [r["terms"] for r in responses] == [{"reward": 0.1 * x} for x in lined] and len({*lined}) == 2
    assert "Reward function" not in done.stderr and (run / "terms.png").stat().st_size > 5000
    assert "function 0.100" in write_report(run).read_text()


def test_the_pages_other_example(tmp_path):
    (tmp_path / "my_reward.py").write_text(EXAMPLE)
    c = load_config([f"--reward.function={tmp_path}/my_reward.py:graded"]).reward
    with RewardFunction(c, problem(most_characters=3)) as function:
        found = function([Call("", "ab", "7", {"most_characters": 3}, True), Call("", "abc", "7", {}, False),
                          Call("", "abc", "7", {"most_characters": 3}, False)])  # fmt: skip
    assert [v.terms for v in found] == [{"reward": 1.2, "right": 1.0, "brief": 0.2},
                                        {"reward": 0.2, "right": 0.0, "brief": 0.2},
                                        {"reward": 0.0, "right": 0.0, "brief": 0.0}]  # fmt: skip
