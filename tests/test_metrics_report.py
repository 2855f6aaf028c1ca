"""Test the records that a run writes, and the report and the comparison made from them."""

import html.parser
import json
import math
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import lead_fast
from lead_fast.cli import load_config
from lead_fast.learner.advantage import LengthGuard
from lead_fast.report import PHASES, band, draw_groups, draw_time, main, parse_labelled, read_run, write_report
from lead_fast.runtime import journal as metrics_module
from lead_fast.runtime.console import clock
from lead_fast.runtime.journal import length_correctness, length_spread
from lead_fast.runtime.jsonl import read_jsonl
from lead_fast.runtime.metrics import Metrics, PhaseTimer

pytestmark = pytest.mark.quick

STEPS = 6


def train_record(step: int, **over) -> dict:
    seconds = {"rollout": 3.1, "reward": 0.1, "train": 1.5, "optim": 0.1, "sync": 0.1}
    return {
        "elapsed_s": 5.0 * step,
        "reward_mean": -0.25 + 0.1 * step,
        "accuracy": 0.5 + 0.05 * step,
        "solve_rate_histogram": [4 - step // 2, 2, 2, step // 2],
        "length_correct": 60.0 - 2 * step,
        "length_wrong": 90.0,
        "entropy": 0.4 - 0.02 * step,
        "grad_norm": 0.5,
        "tokens": 1000,
        "tokens_per_s": 5000.0,
        "seconds": seconds,
    } | over


def eval_record(step: int, pass_at_1: float, length: float = 60.0, **over) -> dict:
    return {
        "elapsed_s": 5.0 * step,
        "problems": 200,
        "samples": 1,
        "pass_at_1": pass_at_1,
        "pass_at_1_ci": [pass_at_1 - 0.06, pass_at_1 + 0.06],
        "length_correct": length,
        "length_wrong": 90.0,
        "length_mean": 70.0,
        "truncated_share": 0.05,
        "by_difficulty": {
            "10": {"problems": 100, "pass_at_1": pass_at_1 - 0.1, "length_correct": 70.0},
            "2": {"problems": 100, "pass_at_1": pass_at_1 + 0.1, "length_correct": 50.0},
        },
    } | over


def write_run(folder: Path, start: float = 0.40, end: float = 0.70, start_length=60.0, end_length=45.0) -> Path:
    """Write a run of six steps, evaluated before and after."""
    m = Metrics(folder, total_steps=STEPS, tensorboard=False)
    m.eval(0, eval_record(0, start, start_length))
    for step in range(1, STEPS + 1):
        m.train(step, train_record(step))
    m.eval(STEPS, eval_record(STEPS, end, end_length))
    m.close()
    return folder


def strict_lines(path: Path) -> list[dict]:
    """Parse every line as standard JSON, which has no NaN."""

    def refuse(name: str):
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(text, parse_constant=refuse) for text in path.read_text(encoding="utf-8").split("\n") if text]


# ----------------------------------------------------------------------------------------------------------- metrics


def test_records_are_valid_json_and_what_is_no_number_is_null(tmp_path, capsys):
    m = Metrics(tmp_path, total_steps=4, tensorboard=False)
    m.train(
        1,
        train_record(
            1,
            grad_norm=math.nan,
            loss=torch.tensor(0.5),
            entropy=np.float32(math.inf),
            length_correct=None,
            solve_rate_histogram=torch.tensor([1, 2]),
            seconds={"rollout": -math.inf, "train": np.float64(1.5)},
        ),
    )
    (record,) = strict_lines(tmp_path / "metrics.jsonl")  # on disk before close, because every record is flushed
    assert record["step"] == 1 and record["kind"] == "train" and record["elapsed_s"] == 5.0
    assert record["grad_norm"] is None and record["entropy"] is None and record["length_correct"] is None
    assert record["loss"] == 0.5 and record["solve_rate_histogram"] == [1, 2]
    assert record["seconds"] == {"rollout": None, "train": 1.5}
    assert re.search(r"length +- .* grad +- ", capsys.readouterr().out)


def test_console_lines_align_and_carry_the_numbers(tmp_path, capsys):
    m = Metrics(tmp_path, total_steps=120, tensorboard=False)
    m.eval(0, eval_record(0, 0.40, 60.0))
    m.train(1, train_record(1, grad_norm=12.5, tokens_per_s=98765.4))
    m.train(118, train_record(2, length_correct=None, accuracy=1.0))
    m.eval(120, eval_record(120, 0.70, 45.0))
    first, a, b, last = capsys.readouterr().out.splitlines()
    assert len(a) == len(b) and [x.start() for x in re.finditer("  reward|  grad|  left", a)] == [
        x.start() for x in re.finditer("  reward|  grad|  left", b)
    ]
    for shown in ("step   1/120", "-0.150", "55.0%", "length    58", "0.380", "12.500", "98765 tok/s", "4.9 s"):
        assert shown in a, shown
    assert "since" not in first
    for shown in ("eval 120/120", "70.0% (64.0 to 76.0)", "+30.0 since step 0", "45 correct (-25%)", "truncated 5.0%"):
        assert shown in last, shown


def test_time_left_counts_the_steps_of_this_process(tmp_path, capsys, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(metrics_module.time, "monotonic", lambda: now)
    m = Metrics(tmp_path, total_steps=100, tensorboard=False)
    m.truncate_after(90)
    now += 50
    m.eval(90, eval_record(90, 0.5))  # before the first step, so not counted
    now += 24
    m.train(92, train_record(92))
    assert capsys.readouterr().out.rstrip().endswith("left  1:36")  # 12 s per step, 8 steps left
    assert (clock(59.6), clock(245), clock(7384), clock(None)) == ("1:00", "4:05", "2:03:04", "-:--")


def test_progress_is_rare_without_a_terminal_and_in_place_on_one(tmp_path, capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr(metrics_module.time, "monotonic", lambda: now)
    m = Metrics(tmp_path, total_steps=10, tensorboard=False)
    for done in range(61):
        m.progress("rollout", 1, done, 60)
        now += 1.0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "step 1/10  rollout 30/60  0:30 left  run -:-- left",
        "step 1/10  rollout 60/60  0:00 left  run -:-- left",
    ]

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "40")
    m = Metrics(tmp_path, total_steps=10, tensorboard=False)
    m.progress("rollout", 1, 0, 60)
    now += 1.0
    m.progress("rollout", 1, 20, 60)
    m.train(1, train_record(1))
    m.close()
    out = capsys.readouterr().out
    assert out.count("\n") == 1  # only the line of the step remains
    *shown, step = out.split("\r")
    assert [len(s.removesuffix("\033[K")) <= 39 for s in shown] == [True] * len(shown) and "20/60  0:02 left" in shown[
        2
    ]
    assert step.startswith("\033[Kstep  1/10  reward")


def test_other_ranks_are_silent(tmp_path, capsys):
    m = Metrics(tmp_path / "run", total_steps=2, wandb_project="p", enabled=False)
    m.truncate_after(0)
    m.progress("rollout", 1, 0, 1)
    m.train(1, train_record(1))
    m.eval(1, eval_record(1, 0.5))
    m.responses(1, [{"problem": "p"}])
    m.close()
    assert capsys.readouterr().out == "" and not (tmp_path / "run").exists()


def test_a_resumed_run_goes_on_after_its_checkpoint(tmp_path, capsys):
    m = Metrics(tmp_path, total_steps=8, tensorboard=False)
    m.eval(0, eval_record(0, 0.4))
    for step in range(1, 6):
        m.train(step, train_record(step, run=1))
        m.responses(step, [{"problem": f"{step}"}])
    m.eval(4, eval_record(4, 0.6))
    m.close()
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 6, "kind": "train", "acc')  # killed while it wrote a record
    m = Metrics(tmp_path, total_steps=8, tensorboard=False)
    m.truncate_after(3)
    m.train(4, train_record(4, run=2))
    m.eval(4, eval_record(4, 0.55))
    m.responses(4, [{"problem": "again"}])
    m.close()
    records = strict_lines(tmp_path / "metrics.jsonl")
    assert [(r["kind"], r["step"], r.get("run")) for r in records] == [
        ("eval", 0, None), ("train", 1, 1), ("train", 2, 1), ("train", 3, 1), ("train", 4, 2), ("eval", 4, None),
    ]  # fmt: skip
    assert [r["problem"] for r in strict_lines(tmp_path / "responses.jsonl")] == ["1", "2", "3", "again"]
    assert "+15.0 since step 0" in capsys.readouterr().out.splitlines()[-1]  # the evaluation before the resume
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "responses.jsonl"]


def test_answers_keep_any_text(tmp_path):
    m = Metrics(tmp_path, total_steps=1, tensorboard=False)
    text = 'a\nb\r "q" \\boxed{½} \u2028 \ud800 终'
    m.responses(3, [{"response": text, "reward": math.nan}, {"response": ""}])
    m.responses(4, [{"response": "x"}])
    rows = strict_lines(tmp_path / "responses.jsonl")
    assert [r["step"] for r in rows] == [3, 3, 4]
    assert rows[0] == {"step": 3, "response": text, "reward": None}


def test_tensorboard_gets_every_number_and_forgets_what_was_resumed_over(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    m = Metrics(tmp_path, total_steps=4)
    for step in range(1, 4):
        m.train(step, train_record(step, grad_norm=math.nan))
    m.eval(3, eval_record(3, 0.5))
    m.close()
    m = Metrics(tmp_path, total_steps=4)
    m.truncate_after(1)
    m.train(2, train_record(2, accuracy=0.125, grad_norm=math.nan))
    m.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, round(e.value, 3)) for e in events.Scalars("train/accuracy")] == [(1, 0.55), (2, 0.125)]
    tags = set(events.Tags()["scalars"])
    assert {"train/seconds/rollout", "train/solve_rate_histogram/3", "eval/by_difficulty/10/pass_at_1"} <= tags
    assert "train/grad_norm" not in tags and "train/step" not in tags


def test_wandb_is_asked_for_or_absent(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    Metrics(tmp_path / "none", total_steps=1, tensorboard=False).train(1, train_record(1))
    with pytest.raises(ValueError, match="wandb is 'mine' but the wandb package is not installed: pip install wandb"):
        Metrics(tmp_path / "none", total_steps=1, wandb_project="mine")

    started, logged = [], []
    run = types.SimpleNamespace(
        log=logged.append, finish=lambda: logged.append("end"), define_metric=lambda *a, **k: None
    )
    fake = types.SimpleNamespace(init=lambda **k: started.append(k) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for step in (1, 2):  # the second is a resumed run
        m = Metrics(tmp_path / "run", total_steps=2, tensorboard=False, wandb_project="mine")
        m.train(step, train_record(step))
        m.close()
    assert started[0]["project"] == "mine" and started[0]["name"] == "run" and started[0]["id"] == started[1]["id"]
    assert logged[0]["step"] == 1 and logged[0]["train/accuracy"] == 0.55 and logged[1] == "end"


def test_phase_timer_adds_up_and_survives_an_error(monkeypatch):
    now = 0.0
    monkeypatch.setattr(metrics_module.time, "perf_counter", lambda: now)
    timer = PhaseTimer()
    for _ in range(2):
        with timer("rollout"):
            now += 2.0
    with pytest.raises(RuntimeError), timer("train"):
        now += 0.5
        raise RuntimeError
    assert timer.seconds == {"rollout": 4.0, "train": 0.5}
    kept = timer.seconds
    timer.reset()
    assert timer.seconds == {} and kept == {"rollout": 4.0, "train": 0.5}


def test_a_broken_line_is_forgiven_only_at_the_end(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\n{"step": 2, "x": "\xe4\xbd')
    assert read_jsonl(path) == [{"step": 1}]
    path.write_bytes(b'{"step": 1}\n{"step": 2,\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2 is not valid JSON: remove that line"):
        read_jsonl(path)


# ------------------------------------------------------------------------------------------------------------ report


class Page(html.parser.HTMLParser):
    """Parser that collects tags, attributes that load something, and the visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


ANSWER = {
    "split": "test",
    "problem": "<script>alert(1)</script> 3 < 4 & 5",
    "reference": "7",
    "response": "so </pre><img src=http://example.com/x> \\boxed{7} \ud800",
    "extracted": "7",
    "correct": True,
    "tokens": 12,
    "finish_reason": "length",
}


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """The page of a complete run, with text that tries to break out of the page."""
    run = write_run(tmp_path_factory.mktemp("a<b>"))
    m = Metrics(run, total_steps=STEPS, tensorboard=False)
    m.responses(0, [ANSWER | {"response": "before", "correct": False}])
    m.responses(3, [ANSWER | {"response": "halfway"}])
    m.responses(STEPS, [ANSWER, {"split": "train", "problem": "of training"}])
    (run / "config.toml").write_text('seed = 7\ninstruction = "<b>box</b>"\n')
    with open(run / "metrics.jsonl", "a") as f:
        f.write('{"step": 7, "ki')
    return write_report(run)


def test_page_is_one_file_that_fetches_nothing_and_escapes_everything(report):
    text = report.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == [] and not {"script", "link", "b>"} & set(page.tags)
    assert page.tags.count("img") == 6 and all(load.startswith("data:image/png;base64,") for load in page.loads)
    assert "url(" not in text and "@import" not in text and "default-src 'none'" in text
    for said in (
        ANSWER["problem"],
        "so </pre><img src=http://example.com/x>",
        'instruction = "<b>box</b>"',
        "seed = 7",
    ):
        assert said in page.text, said
    assert "before" in page.text and "halfway" not in page.text and "of training" not in page.text
    assert "truncated" in page.text and report.parent.name in page.text


def test_table_shows_start_end_and_change(report):
    rows = re.findall(r"<tr>(.*?)</tr>", report.read_text(encoding="utf-8"))
    cells = [[re.sub("<.*?>", "", c) for c in re.findall(r"<t[dh]>(.*?)</t[dh]>", row)] for row in rows]
    assert cells[0] == ["", "step 0", f"step {STEPS}", "change"]
    assert cells[1] == ["pass@1", "40.0 % (34.0 to 46.0)", "70.0 % (64.0 to 76.0)", "+30.0 points"]
    assert cells[2] == ["length of correct responses, tokens", "60.0", "45.0", "-25.0 %"]
    assert cells[5] == ["truncated responses", "5.0 %", "5.0 %", "+0.0 points"]


def test_every_picture_is_written_and_drawn_on(report):
    from matplotlib.image import imread

    names = {"accuracy", "length", "difficulty", "groups", "time", "optimisation"}
    assert {p.stem for p in report.parent.glob("*.png")} == names
    for name in names:
        pixels = imread(report.parent / f"{name}.png")
        assert pixels.shape[0] > 400 and pixels.shape[1] > 800 and (pixels[..., :3] < 0.9).any(-1).mean() > 0.005


def test_answers_their_precision_and_accuracy_within_a_budget_are_shown(tmp_path):
    m = Metrics(tmp_path, total_steps=STEPS, tensorboard=False)
    for step, rate, no_answer in ((0, 0.4, 0.2), (STEPS, 0.45, 0.4)):
        budget = [{"tokens": 16 * (i + 1), "accuracy": rate * i / 3} for i in range(4)]
        m.eval(step, eval_record(step, rate) | {"no_answer_share": no_answer, "budget": budget})
    text = write_report(tmp_path).read_text(encoding="utf-8")
    rows = [re.findall(r"<t[dh]>(.*?)</t[dh]>", row) for row in re.findall(r"<tr>(.*?)</tr>", text)]
    assert ["responses with an answer", "80.0 %", "60.0 %", "-20.0 points"] in rows
    assert ["precision: answers that are correct", "50.0 %", "75.0 %", "+25.0 points"] in rows
    assert {"answers.png", "budget.png"} <= {p.name for p in tmp_path.iterdir()}


def test_what_groups_teach_is_drawn_and_its_first_and_last_tenth_are_shown(tmp_path):
    m = Metrics(tmp_path, total_steps=20, tensorboard=False)
    for step in range(1, 21):
        signal = {"groups_with_gradient": 1 - step / 40, "length_correctness": -step / 20, "length_spread": 0.2}
        m.train(step, train_record(1) | signal)
    budget = [{"tokens": 32 * (i + 1), "accuracy": 0.1 * i, "accuracy_ci": [0.1 * i, 0.1 * i + 0.05]} for i in range(4)]
    for step in (0, 20):
        m.eval(step, eval_record(step, 0.3) | {"budget": budget})
    text = write_report(tmp_path).read_text(encoding="utf-8")
    rows = [re.findall(r"<t[dh]>(.*?)</t[dh]>", row) for row in re.findall(r"<tr>(.*?)</tr>", text)]
    assert ["training batches", "steps 1–2", "steps 19–20", "change"] in rows
    assert ["groups with a gradient", "96.2 %", "51.2 %", "-45.0 points"] in rows
    assert ["correlation of length and correctness within groups", "-0.08", "-0.97", "-0.90"] in rows
    assert ["correct within half of the token limit", "10.0 %", "10.0 %", "+0.0 points"] in rows
    assert (tmp_path / "signal.png").stat().st_size > 10_000


def test_held_out_numbers_of_a_rounded_engine_are_said_to_be_that(tmp_path):
    for kind, rounded in (("none", False), ("fp8_per_channel", True)):
        run = write_run(tmp_path / kind)
        (run / "config.toml").write_text(f'[rollout]\nquantization = "{kind}"\nkv_dtype = "auto"\n')
        assert ("with rounded weights or a rounded cache" in write_report(run).read_text(encoding="utf-8")) is rounded


def test_every_phase_of_a_step_has_a_colour_of_its_own():
    source = "".join(p.read_text(encoding="utf-8") for p in Path(lead_fast.__file__).parent.rglob("*.py"))
    assert set(re.findall(r"""\bphase\(["'](\w+)["']\)""", source)) == set(PHASES)
    assert len(set(PHASES.values())) == len(PHASES)


def test_a_run_of_thousands_of_steps_is_drawn_with_a_patch_per_part(tmp_path):
    records = [train_record(1) | {"kind": "train", "step": step} for step in range(1, 3001)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    run = read_run(tmp_path)
    assert len(draw_groups(run).axes[0].collections) == 3 and not draw_groups(run).axes[0].patches
    _, over = draw_time(run).axes
    assert len(over.collections) == len(records[0]["seconds"]) and not over.patches


def test_a_step_recorded_twice_counts_as_recorded_last(tmp_path):
    run = write_run(tmp_path)
    m = Metrics(run, total_steps=STEPS, tensorboard=False)
    m.eval(0, eval_record(0, 0.25))
    found = read_run(run)
    assert [r["step"] for r in found.evals] == [0, STEPS] and found.ends[0]["pass_at_1"] == 0.25
    assert [r["step"] for r in found.train] == list(range(1, STEPS + 1))


def test_report_of_a_run_that_never_evaluated_or_never_trained(tmp_path):
    m = Metrics(tmp_path / "train", total_steps=2, tensorboard=False)
    m.train(1, train_record(1, length_wrong=None, solve_rate_histogram=None, seconds={}))
    Metrics(tmp_path / "eval", total_steps=2, tensorboard=False).eval(0, {"pass_at_1": 0.5, "by_difficulty": {}})
    text = write_report(tmp_path / "train").read_text(encoding="utf-8")
    assert "the run has no evaluation" in text and "55.0 %" in text
    out = write_report(tmp_path / "eval", tmp_path / "elsewhere")
    assert {p.name for p in out.parent.iterdir()} == {"report.html", "accuracy.png", "length.png"}
    assert [p.name for p in (tmp_path / "eval").iterdir()] == ["metrics.jsonl"]


def test_many_difficulties_become_bands_of_about_as_many_problems():
    rows = [(i / 10, 3, 1 - i / 100) for i in range(100)]
    bands = band(rows)
    assert len(bands) == 8 and sum(n for _, n, _ in bands) == 300 and all(30 <= n <= 45 for _, n, _ in bands)
    assert bands[0][0] == "0–1.2" and bands[0][2] == pytest.approx(1 - 6 / 100)
    assert band([(1, 5, 0.5), (2.5, 6, 0.4)]) == [("1", 5, 0.5), ("2.5", 6, 0.4)]


def test_compare_gives_mean_and_spread_over_seeds(tmp_path, capsys):
    a = [
        write_run(tmp_path / f"a{i}", 0.40, end, 60.0, length) for i, (end, length) in enumerate([(0.6, 40), (0.7, 50)])
    ]
    b = write_run(tmp_path / "b", 0.40, 0.50, 60.0, 60.0)
    capsys.readouterr()
    main(["--compare", f"L + AD={a[0]},{a[1]}", f"GRPO={b}", "--out", str(tmp_path / "out")])
    rows = [
        [cell.strip() for cell in row.strip("|").split("|")]
        for row in (tmp_path / "out" / "table.md").read_text(encoding="utf-8").splitlines()
        if row.startswith("|")
    ]
    assert len({len(row) for row in rows}) == 1
    assert rows[2] == ["L + AD", "2", "6", "40.0 ± 0.0", "65.0 ± 7.1", "+25.0 ± 7.1", "60.0 ± 0.0", "45.0 ± 7.1",
                       "-25.0 ± 11.8", "5.0 ± 0.0"]  # fmt: skip
    assert rows[3] == ["GRPO", "1", "6", "40.0", "50.0", "+10.0", "60.0", "60.0", "+0.0", "5.0"]
    assert (tmp_path / "out" / "compare.png").stat().st_size > 10_000
    assert "| L + AD | 2 |" in capsys.readouterr().out


def test_mistakes_get_one_sentence(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "ki')
    Metrics(tmp_path / "train", total_steps=2, tensorboard=False).train(1, train_record(1))
    mistakes = [
        (lambda: write_report(tmp_path / "nowhere"), "nowhere has no metrics.jsonl: give the run directory of a"),
        (lambda: write_report(tmp_path), "holds no step and no evaluation yet"),
        (
            lambda: main(["--compare", f"A={tmp_path / 'train'}", "--out", str(tmp_path)]),
            "train has no evaluation to compare",
        ),
        (lambda: parse_labelled(["runs/a"]), "--compare was given 'runs/a': write LABEL=RUN_DIR"),
        (lambda: parse_labelled(["A="]), "--compare was given 'A='"),
        (lambda: parse_labelled(["A=x", "A=y"]), "--compare names 'A' twice"),
    ]
    for make, says in mistakes:
        with pytest.raises(ValueError) as e:
            make()
        assert says in str(e.value) and "\n" not in str(e.value)


def test_an_out_that_is_a_file_is_refused(tmp_path):
    run = write_run(tmp_path / "run")
    (tmp_path / "file").write_text("mine")
    for out in ("file", "file/below"):
        with pytest.raises(ValueError, match=f"--out is {tmp_path}/{out}, which cannot be created"):
            main([str(run), "--out", str(tmp_path / out)])
        with pytest.raises(ValueError, match="which cannot be created"):
            main(["--compare", f"a={run}", "--out", str(tmp_path / out)])
    assert (tmp_path / "file").read_text() == "mine"


def test_length_and_correctness_within_groups():
    lengths = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0], [5.0, 5.0, 5.0], [1.0, 2.0, 3.0]])
    correct = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 1.0], [0.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    r = 1 / (2 * 2 / 3) ** 0.5  # the sum of products is 1, over sqrt(2 x 2/3)
    assert length_correctness(lengths[:1], correct[:1]) == pytest.approx(r)
    assert length_correctness(lengths[1:2], correct[1:2]) == pytest.approx(-r)
    assert length_correctness(lengths, correct) == pytest.approx(0, abs=1e-6)  # other groups have no correlation
    assert length_correctness(lengths[2:], correct[2:]) is None
    assert length_spread(lengths, correct) == pytest.approx((0.0 + 0.5) / 2)  # 5, 5; and 1, 2, 3
    assert length_spread(lengths[:2], correct[:2]) is None


def test_the_length_guard_suspends_brevity_until_the_accuracy_is_back():
    c = load_config(["--advantage.length_guard=0.05", "--advantage.length_advantage=0.2"])
    guard = LengthGuard(c.advantage)
    seen = []
    for accuracy in (0.5, 0.7, 0.66, 0.64, 0.66, 0.75, 0.69):
        guard.saw(accuracy)
        seen.append(guard.suspended)
    assert seen == [False, False, False, True, False, False, True]
    assert not guard.now().length_reward and guard.now().length_advantage == 0 and guard.now().alpha == 0.05
    again = LengthGuard(c.advantage)
    again.resume(guard.state())
    assert again.suspended and again.best == 0.75
    never = LengthGuard(load_config([]).advantage)
    never.saw(0.9), never.saw(0.0)
    assert not never.suspended and never.state() == {} and never.now().length_reward
