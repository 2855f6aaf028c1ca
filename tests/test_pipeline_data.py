"""Test data commands on local files with the public sets' columns, word problems, solve-rate sampling and refill."""

import json
import re

import numpy as np
import pyarrow.parquet as parquet
import pytest

from lead_fast.data.order import SolveRateStream
from lead_fast.data.prepare import file_hash, main
from lead_fast.data.read import load_problems
from lead_fast.data.word_problems import FORMS, form_of, make_problems
from lead_fast.records import Batch, Group, Problem, Response, Sample, Score


def jsonl(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def test_deepscaler_by_difficulty_without_duplicates_and_unverifiable_references(tmp_path):
    rows = [{"problem": f"q{i}", "answer": str(i), "solution": "s", "difficulty": i / 2} for i in range(10)]
    rows += [rows[9], {"problem": "bad", "answer": "\\frac{", "solution": "", "difficulty": 4.0}]
    rows += [{"problem": "fine", "answer": "\\frac{1}{2}", "solution": "", "difficulty": 4.0}]
    rows += [{"problem": "blank", "answer": None, "solution": "s", "difficulty": 4.0}]
    rows += [{"problem": "ungraded", "answer": "1", "solution": "", "difficulty": None}]
    source = jsonl(tmp_path / "in.jsonl", rows)
    main(["deepscaler", "--source", source, "--out", str(tmp_path / "a.parquet")])
    problems = load_problems(str(tmp_path / "a.parquet"))
    assert [p.problem for p in problems] == ["q6", "q7", "q8", "q9", "fine"]
    manifest = json.loads((tmp_path / "a.manifest.json").read_text())
    assert manifest["counts"] == {"read": 15, "without difficulty": 1, "above": 8, "duplicates": 1,
                                  "unverifiable references": 2}  # fmt: skip
    assert manifest["rows"] == 5 and manifest["filters"]["difficulty_above"] == 2.5
    assert manifest["revision"] == f"sha256:{file_hash(tmp_path / 'in.jsonl')}"
    assert manifest["sha256_file"] == file_hash(tmp_path / "a.parquet")
    main(["deepscaler", "--source", source, "--out", str(tmp_path / "b.parquet")])
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_select_by_rollouts_and_by_samples(tmp_path):
    source = jsonl(tmp_path / "in.jsonl", [{"problem": f"q{i}", "answer": "1", "difficulty": i} for i in range(5)])
    (tmp_path / "run").mkdir()
    (tmp_path / "eval").mkdir()
    jsonl(tmp_path / "run" / "solved.jsonl", [{"step": s, "problem": f"q{i}", "correct": 2 * i, "sampled": 8}
                                              for s in (1, 2) for i in range(4)])  # fmt: skip
    (tmp_path / "eval" / "samples.jsonl").write_text(
        '{"asked": {}}\n' + json.dumps({"problem": "q4", "correct": [True, False]}) + '\n{"problem": "q0", "corr'
    )  # a kill left half a line behind
    main(["select", source, "--rollouts", str(tmp_path / "run"), "--most", "0.5", "--out", str(tmp_path / "a.parquet")])
    assert [p.problem for p in load_problems(str(tmp_path / "a.parquet"))] == ["q0", "q1", "q2"]
    counts = json.loads((tmp_path / "a.manifest.json").read_text())["counts"]
    assert counts == {"read": 5, "never sampled": 1, "outside": 1}
    main(["select", source, "--rollouts", str(tmp_path / "run"), "--samples", str(tmp_path / "eval"), "--least", "0.5",
          "--most", "0.75", "--out", str(tmp_path / "b.parquet")])  # fmt: skip
    assert [p.problem for p in load_problems(str(tmp_path / "b.parquet"))] == ["q2", "q3", "q4"]


def test_mix_keeps_each_problem_once_and_says_where_from(tmp_path):
    a = jsonl(tmp_path / "a.jsonl", [{"problem": "1", "answer": "1"}, {"problem": "2", "answer": "2"}])
    b = jsonl(tmp_path / "b.jsonl", [{"problem": "2", "answer": "2"}, {"problem": "3", "answer": "3"}])
    main(["mix", a, b, "--out", str(tmp_path / "m.parquet")])
    rows = parquet.read_table(tmp_path / "m.parquet").to_pylist()
    assert [(r["problem"], r["source"]) for r in rows] == [("1", a), ("2", a), ("3", b)]
    main(["mix", str(tmp_path / "m.parquet"), "--out", str(tmp_path / "n.parquet")])
    manifest = json.loads((tmp_path / "n.manifest.json").read_text())
    assert manifest["sources"][0]["manifest"]["counts"][f"already there, {b}"] == 1


def test_mix_renames_columns_and_holds_out_the_same_rows_in_any_order(tmp_path):
    rows = [{"q": f"q{i}", "s": f"s{i}"} for i in range(20)] + [{"q": "nothing", "s": ""}]
    held_out = []
    for name, order in (("a", rows), ("b", rows[::-1])):
        source = jsonl(tmp_path / f"{name}.jsonl", order)
        main(["mix", source, "--problem_column", "q", "--solution_column", "s", "--hold_out", "5",
              "--out", str(tmp_path / f"{name}.parquet")])  # fmt: skip
        kept, apart = (parquet.read_table(tmp_path / f"{name}{end}.parquet").to_pylist() for end in ("", ".held-out"))
        assert len(kept) == 15 and len(apart) == 5
        assert {r["problem"] for r in kept + apart} == {r["q"] for r in rows[:20]}
        assert all(r["solution"] == r["problem"].replace("q", "s") for r in kept + apart)
        manifest = json.loads((tmp_path / f"{name}.held-out.manifest.json").read_text())
        assert manifest["rows"] == 5 and manifest["counts"][f"without reference and solution, {source}"] == 1
        held_out.append({r["problem"] for r in apart})
    assert held_out[0] == held_out[1]


def test_sets_are_made_of_worked_solutions_too_but_hold_no_system_messages(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", [{"question": "q", "answer": "1+1=2\n#### 2"}])
    main(["mix", source, "--out", str(tmp_path / "m.parquet")])
    (row,) = parquet.read_table(tmp_path / "m.parquet").to_pylist()
    assert (row["problem"], row["answer"], row["solution"]) == ("q", "2", "1+1=2\n#### 2")
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    source = jsonl(tmp_path / "b.jsonl", [{"prompt": messages, "answer": "2"}])
    with pytest.raises(SystemExit, match="row 1: the prompt has a system message or several turns, which a set made"):
        main(["mix", source, "--out", str(tmp_path / "n.parquet")])


def test_stats(tmp_path, capsys):
    main(["stats", "arithmetic:train?n=50", "--model", "tiny", "--out", str(tmp_path)])
    record = json.loads((tmp_path / "stats.json").read_text())
    assert record["problems"] == record["with difficulty"] == record["integer references"] == 50
    assert "prompt length, tokens" in capsys.readouterr().out and (tmp_path / "stats.png").stat().st_size > 5000


@pytest.mark.parametrize(
    "args, says",
    [
        (["deepscaler", "--source", "{no}", "--out", "x.parquet"], "has no difficulty in column difficulty"),
        (["deepscaler", "--source", "{no}", "--above=none", "--out", "x.csv"], "give a name that ends in .parquet"),
        (["select", "{no}", "--out", "x.parquet"], "needs solve rates"),
        (["select", "{no}", "--rollouts", "/nowhere", "--out", "x.parquet"], "has no solved.jsonl"),
        (["select", "{no}", "--samples", "/nowhere", "--out", "x.parquet"], "has no samples.jsonl"),
        (["mix", "nowhere.jsonl", "--out", "x.parquet"], "nowhere.jsonl does not exist"),
        (["mix", "{no}", "--hold_out", "1", "--out", "x.parquet"], "--hold_out is 1 of 1 rows: give fewer"),
        (["mix", "{no}", "--problem_column", "q", "--out", "x.parquet"], "has no column q, only problem, answer"),
    ],
)
def test_mistakes_get_one_sentence(args, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    no = jsonl(tmp_path / "no.jsonl", [{"problem": "1", "answer": "1"}])
    with pytest.raises(SystemExit) as e:
        main([a.replace("{no}", no) for a in args])
    assert says in str(e.value) and "\n" not in str(e.value)
    assert not (tmp_path / "x.parquet").exists()


# --------------------------------------------------------------------------------------------------------- curriculum


def test_solve_rates_steer_the_draw_and_nothing_is_drawn_twice():
    stream = SolveRateStream(100, 10, seed=3)
    for i in range(100):
        stream.tell(i, 0.5 if i < 10 else 1.0 if i < 55 else 0.0)
    drawn = [stream.batch(step) for step in range(200)]
    assert all(len(set(b)) == 10 for b in drawn) and stream.batch(7) == drawn[7] != drawn[8]
    times = np.bincount(np.concatenate(drawn), minlength=100)
    assert times[:10].min() > 3 * times[10:].mean() and times[10:].sum() > 0


def groups(outcomes: list[list[int]], first: int) -> Batch:
    response = Response([5], [0.0], "stop", "", 0)
    return Batch(
        [
            Group(Problem(str(i), f"q{i}", "1"), [1], [Sample(response, Score(bool(x), None, False, False)) for x in o])
            for i, o in enumerate(outcomes, first)
        ]
    )


def test_refill_puts_kept_groups_in_the_place_of_dropped_ones():
    batch = groups([[1, 1], [1, 0], [0, 0], [0, 0]], 0)
    more = groups([[0, 0], [0, 1]], 10)
    out = batch.with_dropped_replaced([False, True, False, False], more, [False, True])
    assert out.refilled == 1 and [g.problem.problem for g in out.groups] == ["q11", "q1", "q2", "q3"]
    assert [s.correct for s in out.scores] == [False, True, True, False, False, False, False, False]


# ------------------------------------------------------------------------------------------------------- word problems


def test_word_problems_have_right_solutions_in_three_forms():
    rows = make_problems(400, seed=1)
    assert rows == make_problems(400, seed=1) != make_problems(400, seed=2)
    assert not {r["problem"] for r in rows} & {r["problem"] for r in make_problems(200, seed=1, split="test")}
    lengths = {form: [] for form in FORMS}
    for r in rows:
        form, steps = form_of(r["solution"]), re.findall(r"(\d+ [-+*/] \d+) = (\d+)", r["solution"])
        lengths[form].append(len(r["solution"]))
        assert len(steps) == (0 if form == "hasty" else r["difficulty"])
        assert all(eval(left) == int(right) for left, right in steps)
        assert not steps or steps[-1][1] == r["answer"]
        assert r["solution"].endswith(f"\\boxed{{{r['answer']}}}")
    assert {f: len(n) / 400 for f, n in lengths.items()} == pytest.approx(FORMS, abs=0.06)
    assert np.mean(lengths["wordy"]) > 3 * np.mean(lengths["terse"]) > 3 * np.mean(lengths["hasty"])


@pytest.mark.parametrize(
    "text, form",
    [
        ("3 * 4 = 12\n12 - 2 = 10\n\\boxed{10}", "terse"),
        ("Let's think step by step.", "wordy"),
        ("\n\\boxed{10}", "hasty"),
        ("So it is 10.", "other"),
        ("", "other"),
    ],
)
def test_the_form_of_a_response_is_read_from_its_beginning(text, form):
    assert form_of(text) == form


# ------------------------------------------------------------------------------------------------------------ release


def test_a_release_has_generation_settings_and_a_card(tmp_path):
    import shutil

    from transformers import GenerationConfig

    from lead_fast.cli import dump, load_config
    from lead_fast.learner.model import EMBEDDED
    from lead_fast.release import release

    run = tmp_path / "run"
    (run / "final").mkdir(parents=True)
    data = jsonl(tmp_path / "train.jsonl", [{"problem": "1", "answer": "1"}])
    main(["mix", data, "--out", str(tmp_path / "m.parquet")])
    c = load_config(["--recipe=tiny", f"--data.train={tmp_path}/m.parquet", "--evaluate.temperature=0.6",
                     "--evaluate.min_p=0.01"])  # fmt: skip
    (run / "config.toml").write_text(dump(c))
    batches = [{"kind": "train", "step": n, "accuracy": n / 8, "length_correct": None} for n in (1, 2, 3)]
    jsonl(
        run / "metrics.jsonl", [*batches, {"kind": "eval", "step": 3, "pass_at_1": 0.5, "pass_at_1_ci": [0.25, 0.75]}]
    )
    with pytest.raises(ValueError, match="has no final/config.json"):
        release(run)
    shutil.copytree(EMBEDDED["tiny"], run / "final", dirs_exist_ok=True)
    before = GenerationConfig.from_pretrained(run / "final")
    release(run)
    after = GenerationConfig.from_pretrained(run / "final")
    assert (after.do_sample, after.temperature, after.min_p) == (True, 0.6, 0.01)
    assert after.eos_token_id == before.eos_token_id and after.pad_token_id == before.pad_token_id
    card = (run / "final" / "README.md").read_text()
    manifest = json.loads((tmp_path / "m.manifest.json").read_text())
    assert manifest["sha256_file"] in card and "recipe `tiny`" in card and "pass_at_1 0.5" in card
    assert "- batch of step 1: accuracy 0.125\n- batch of step 3: accuracy 0.375\n" in card and "3 steps." in card
    assert "[0.25, 0.75]" in card and re.search(r"- torch \d", card) and "temperature = 0.6" in card


class OpensThinking:
    """The embedded tokenizer with a template that opens <think> itself, like R1-distill's."""

    def __new__(cls):
        from lead_fast.data.arithmetic import build_tokenizer

        tokenizer = build_tokenizer()
        tokenizer.chat_template = "{{ messages[0].content }}<|assistant|><think>\n"
        return tokenizer


def test_sft_trains_on_the_end_of_sequence_and_opens_thinking_once(tmp_path):
    from lead_fast.config import SftConfig
    from lead_fast.data.arithmetic import build_tokenizer
    from lead_fast.sft import load_examples

    source = jsonl(tmp_path / "a.jsonl", [{"problem": "P", "answer": "1", "solution": "<think>\nwork</think>1"}])
    for tokenizer, expected in ((OpensThinking(), "work</think>1"), (build_tokenizer(), "<think>\nwork</think>1")):
        (prompt,), (solution,) = load_examples(SftConfig(), tokenizer, source, "train")
        assert tokenizer.decode(solution[:-1]) == expected and solution[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(prompt + solution).count("<think>") == 1


def test_sft_leaves_out_solutions_over_the_limit_and_cuts_none(tmp_path, capsys):
    from lead_fast.config import SftConfig
    from lead_fast.data.arithmetic import build_tokenizer
    from lead_fast.sft import load_examples

    rows = [{"problem": f"P{n}", "solution": "1" * n} for n in (3, 4, 9)]  # one token per digit, and end-of-sequence
    source, tokenizer = jsonl(tmp_path / "a.jsonl", rows), build_tokenizer()
    prompts, solutions = load_examples(SftConfig(max_solution_tokens=5), tokenizer, source, "train")
    assert [len(s) for s in solutions] == [4, 5]
    assert all(f"P{n}" in tokenizer.decode(p) for n, p in zip((3, 4), prompts, strict=True))
    assert "1 of 3 solutions are left out: longer than 5 tokens" in capsys.readouterr().out
    assert len(load_examples(SftConfig(), tokenizer, source, "train")[1]) == 3
    with pytest.raises(ValueError, match="every solution is longer than max_solution_tokens, 2: raise it"):
        load_examples(SftConfig(max_solution_tokens=2), tokenizer, source, "train")


def test_a_model_of_another_architecture_gets_one_sentence(tmp_path):
    from transformers import AutoModelForCausalLM, GPT2Config

    from lead_fast.config import ModelConfig
    from lead_fast.learner.model import load_model

    small = GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=16)
    AutoModelForCausalLM.from_config(small).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="\\(gpt2\\) cannot be used: its blocks or its head are not in") as e:
        load_model(ModelConfig(path=str(tmp_path / "gpt2")))
    assert "\n" not in str(e.value)
