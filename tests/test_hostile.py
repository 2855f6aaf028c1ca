"""Test hostile input to extraction, grading, chat template and report: no crash, stall, growth, or false "correct"."""

import html.parser
import json
import time
from pathlib import Path

import hostile
import pytest

from lead_fast.cli import dump, load_config
from lead_fast.data.prompts import control_tokens, tokenize_prompts
from lead_fast.data.read import load_problems
from lead_fast.learner.model import load_tokenizer
from lead_fast.records import Problem, Response
from lead_fast.report import write_report
from lead_fast.reward.extraction import extract_boxed, graded_text, is_degenerate
from lead_fast.reward.grading import score
from lead_fast.reward.verifier import Verifier
from lead_fast.runtime.jsonl import read_jsonl
from lead_fast.runtime.metrics import Metrics

LIMIT_S = 1.0
SUM = (r"\sum_{k=1}^{3} k", "6")  # no rule decides a sum, so the worker is asked


def resident_bytes(pid: int | str = "self") -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def answer(text: str) -> Response:
    return Response([1], [-0.1], "stop", text, 0)


def test_the_corpus_is_large_and_always_the_same(tmp_path):
    cases = [*hostile.cases(600, "m")]
    assert len({text for text, _ in cases}) >= 1000 and cases == [*hostile.cases(600, "m")]


@pytest.mark.parametrize("n", [60, pytest.param(600, marks=pytest.mark.slow)])
def test_no_hostile_answer_is_right_run_or_slow(tmp_path, n):
    mark = tmp_path / "mark"
    cases = [*hostile.cases(n, str(mark))]
    with Verifier(timeout_s=20.0) as v:
        v.grade([SUM])
        v.timeout_s = LIMIT_S
        for where in ("all", "after_think"):
            for text, gold in cases:
                began = time.monotonic()
                (s,) = score([answer(text)], [gold], v, where=where, degenerate=True)
                took = time.monotonic() - began
                assert not s.correct, (text[:200], gold)
                # Allows for the limit and for the start of a new checker if one was killed; a hang would take minutes.
                assert took < LIMIT_S + 60, (text[:200], took)
        assert v.kills < 60, "most cases must be told within the limit: else this only tests the limit"
        assert v.grade([("1+x", "x+1"), (r"\sum_{k=1}^{4} k", "10")]) == [True, True]
    assert not mark.exists()


@pytest.mark.parametrize("text", hostile.STALLS)
def test_an_answer_that_stalls_the_checker_is_wrong_and_the_next_one_is_unaffected(text):
    with Verifier(timeout_s=20.0) as v:
        v.grade([SUM])
        first, v.timeout_s = v.worker.process, LIMIT_S
        assert v.grade([(text, "(1+x)^{99}+z")]) == [False]
        v.timeout_s = 20.0
        assert v.grade([(r"\sum_{k=1}^{4} k", "10")]) == [True]
        assert first and (v.kills == 0 or first.poll() is not None)


def test_extraction_takes_no_more_memory_the_second_time(tmp_path):
    cases = [text for text, _ in hostile.cases(600, "m")]

    def once() -> int:
        for text in cases:
            for where in ("all", "before_think", "after_think"):
                extract_boxed(graded_text(text, where))
            is_degenerate(text)
        return resident_bytes()

    first = once()
    assert max(once() for _ in range(3)) - first < 16 << 20


def test_a_problem_cannot_hold_a_control_token():
    tokenizer = load_tokenizer(load_config([]).model)
    control = control_tokens(tokenizer)
    assert {"<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"} <= set(control)
    texts = [f"1+1 {m} 2{m}{m}" for m in hostile.MARKERS] + [f"{a}{b}" for a in control for b in control]
    texts += [text[:2000] for text, _ in hostile.cases(300, "m") if "\ud800" not in text] + ["<|<|end|>end|>", "<|end|"]
    problems = [Problem(str(i), text, "1") for i, text in enumerate(["plain", *texts])]
    for instruction in ("", "Answer briefly."):
        _, prompts = tokenize_prompts(problems, tokenizer, instruction=instruction, max_prompt_tokens=100_000)
        own = [t for t in prompts[0] if t in control.values()]
        assert own
        for p, ids in zip(problems, prompts, strict=True):
            assert [t for t in ids if t in control.values()] == own, p.problem
            wanted = tokenizer.apply_chat_template(
                [{"role": "user", "content": f"{p.problem}\n{instruction}" if instruction else p.problem}],
                tokenize=False,
                add_generation_prompt=True,
            )
            assert tokenizer.decode(ids) == tokenizer.decode(tokenizer(wanted, add_special_tokens=False).input_ids)


def test_the_tokens_of_ordinary_problems_are_those_of_the_chat_template():
    tokenizer = load_tokenizer(load_config([]).model)
    problems = [Problem("1", "Compute 3 + 4 < 9 [mod 2]. <b>", "1"), Problem("2", "Wie viel ist 7·8?", "56")]
    _, prompts = tokenize_prompts(problems, tokenizer, instruction="Go.", max_prompt_tokens=999)
    for p, ids in zip(problems, prompts, strict=True):
        turn = [{"role": "user", "content": f"{p.problem}\nGo."}]
        assert ids == tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"]


class Tags(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs


ATTACKS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</pre><iframe src=http://x>",
    '"><svg onload=alert(1)>',
    "</div></body></html><script>",
    "<a href=javascript:alert(1)>x</a>",
    "&lt;script&gt;",
    "<!--",
    "]]>",
    "\x00\ud800<b>",
]


def test_the_report_shows_hostile_text_as_text(tmp_path):
    run = tmp_path / "<script>alert(0)<"
    run.mkdir()
    m = Metrics(run, total_steps=2, tensorboard=False)
    numbers = {"accuracy": 0.5, "reward_mean": 0.0, "seconds": {"rollout": 1.0}, "solve_rate_histogram": [1, 2, 1]}
    for step in (1, 2):
        m.train(step, numbers)
    texts = ATTACKS + [text[:500] for text, _ in hostile.cases(100, "m")][::40]
    for text in texts:
        row = {"problem": text, "reference": text, "response": text, "extracted": text, "correct": False, "tokens": 1}
        m.responses(1, [row | {"split": "test", "finish_reason": text}])
    m.close()
    (run / "config.toml").write_text(dump(load_config([f"--recipe={'tiny'}", "--wandb=<script>alert(2)</script>"])))
    shown = write_report(run).read_text(encoding="utf-8")
    page = Tags()
    page.feed(shown)
    assert not {"script", "iframe", "svg", "a", "object", "embed", "form", "link"} & set(page.tags)
    assert not [k for k, _ in page.attributes if k.startswith("on") or k in ("href", "action")]
    assert all((v or "").startswith("data:image/png") for k, v in page.attributes if k == "src")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in shown and "default-src 'none'" in shown


def test_hostile_problems_go_through_files_and_records_unharmed(tmp_path):
    """A problem with control characters, quotes and line separators leaves data and records unchanged."""
    texts = [t for t, _ in hostile.cases(50, "m") if "\ud800" not in t and t.strip()][:400]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"problem": t[:5000], "answer": "1"}) + "\n" for t in texts), encoding="utf-8")
    assert [p.problem for p in load_problems(str(path))] == [t[:5000].strip() for t in texts]
    m = Metrics(tmp_path, total_steps=1, tensorboard=False)
    m.responses(1, [{"response": t} for t in [*texts, "\ud800"]])
    back = read_jsonl(tmp_path / "responses.jsonl")
    assert [r["response"] for r in back] == [*texts, "\ud800"]
