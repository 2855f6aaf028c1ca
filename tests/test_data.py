"""Data in: bad input gets one sentence that names the value and the remedy; the stream depends on the step alone."""

import json

import pytest

from lead_fast.data.arithmetic import build_tokenizer, is_test, make_problems
from lead_fast.data.order import ProblemStream
from lead_fast.data.prompts import tokenize_prompts
from lead_fast.data.read import load_problems

pytestmark = pytest.mark.quick


def jsonl(path, rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


ROW = {"problem": "1+1?", "answer": "2", "difficulty": 3, "solution": "2"}


def test_jsonl_and_parquet_give_the_same_problems(tmp_path):
    from datasets import Dataset

    rows = [ROW, {"problem": "2+2?", "answer": 4, "difficulty": None, "solution": None}]
    a = load_problems(jsonl(tmp_path / "a.jsonl", rows))
    Dataset.from_list([{**r, "answer": str(r["answer"])} for r in rows]).to_parquet(str(tmp_path / "a.parquet"))
    b = load_problems(str(tmp_path / "a.parquet"))
    assert a == b and a[0].difficulty == 3.0 and a[1].reference == "4" and a[1].difficulty is None


def test_a_json_array_is_read_like_lines(tmp_path):
    (tmp_path / "a.json").write_text("\n " + json.dumps([ROW, {**ROW, "problem": "2+2?"}], indent=2))
    assert load_problems(str(tmp_path / "a.json")) == load_problems(
        jsonl(tmp_path / "a.jsonl", [ROW, {**ROW, "problem": "2+2?"}])
    )
    for text, says in (("[{}, 3]", "element 2 is int"), ('[{"problem": ]', "line 1 is no JSON")):
        (tmp_path / "b.json").write_text(text)
        with pytest.raises(ValueError, match=says):
            load_problems(str(tmp_path / "b.json"))
    (tmp_path / "c.json").write_bytes(b'[{"problem": "caf\xe9"}]')
    with pytest.raises(ValueError, match="is no UTF-8"):
        load_problems(str(tmp_path / "c.json"))


def test_solutions_are_enough_where_no_answer_is_needed(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", [{"problem": "P", "solution": "S"}])
    with pytest.raises(ValueError, match="no column answer, only problem, solution"):
        load_problems(source)
    (found,) = load_problems(source, references=False)
    assert (found.reference, found.solution) == ("", "S")
    with pytest.raises(ValueError, match="no column answer, only problem"):
        load_problems(jsonl(tmp_path / "b.jsonl", [{"problem": "P"}]), references=False)


def test_columns_are_renamed_and_difficulty_filters(tmp_path):
    rows = [{"q": f"{i}?", "a": str(i), "d": i} for i in range(5)]
    found = load_problems(jsonl(tmp_path / "a.jsonl", rows), problem_column="q", reference_column="a",
                          difficulty_column="d", min_difficulty=2)  # fmt: skip
    assert [p.reference for p in found] == ["3", "4"]
    assert len(load_problems(jsonl(tmp_path / "b.jsonl", [ROW] * 5), limit=2)) == 2


@pytest.mark.parametrize(
    "rows, says",
    [
        ([ROW, "{no json"], "line 2 is no JSON"),
        ([ROW, "[1]"], "line 2 is list"),
        ([{"question": "1", "answer": "2"}], "no column problem, only question, answer"),
        ([{"problem": "1", "result": "2"}], "no column answer, only problem, result"),
        ([ROW, {"problem": "x", "answer": " "}], "row 2: column answer is empty"),
        ([{"problem": None, "answer": "1"}], "row 1: column problem is empty"),
        ([{**ROW, "difficulty": "hard"}], "difficulty is 'hard'"),
    ],
)
def test_bad_rows(rows, says, tmp_path):
    with pytest.raises(ValueError) as e:
        load_problems(jsonl(tmp_path / "a.jsonl", rows))
    assert says in str(e.value) and "\n" not in str(e.value)


def test_bad_sources(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="does not exist: give a .jsonl"):
        load_problems(str(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match="does not exist"):
        load_problems(str(tmp_path / "none.parquet"))
    (tmp_path / "bad.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match="no Parquet file"):
        load_problems(str(tmp_path / "bad.parquet"))
    with pytest.raises(ValueError, match="is not understood: give arithmetic:train"):
        load_problems("arithmetic:train?m=3")
    with pytest.raises(ValueError, match="no problem left"):
        load_problems(jsonl(tmp_path / "a.jsonl", [ROW]), min_difficulty=9)
    with pytest.raises(ValueError, match="min_difficulty is 1, but .* has no column difficulty"):
        load_problems(jsonl(tmp_path / "b.jsonl", [{"problem": "1", "answer": "1"}]), min_difficulty=1)
    (tmp_path / "a.csv").write_text("problem,answer\n1+1,2\n")
    with pytest.raises(ValueError, match="neither .jsonl, .json nor .parquet"):
        load_problems(str(tmp_path / "a.csv"))
    (tmp_path / "latin.jsonl").write_bytes(b'{"problem": "1", "answer": "2"}\n{"problem": "caf\xe9", "answer": "2"}\n')
    with pytest.raises(ValueError, match="line 2 is no UTF-8"):
        load_problems(str(tmp_path / "latin.jsonl"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no retries
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="could not be had from the hub.*give a .jsonl"):
        load_problems("nobody/no-such-dataset-here")


def test_prompts_go_through_the_chat_template():
    tokenizer = build_tokenizer()
    problems = load_problems("arithmetic:train?n=3&seed=5")
    kept, prompts = tokenize_prompts(problems, tokenizer, instruction="Think.", max_prompt_tokens=200)
    assert kept == problems
    assert tokenizer.decode(prompts[0]) == f"<|user|>{problems[0].problem}\nThink.<|assistant|>"
    with pytest.raises(ValueError, match="data.max_prompt_tokens is 5: raise it, or"):
        tokenize_prompts(problems, tokenizer, instruction="", max_prompt_tokens=5)
    assert tokenize_prompts(problems, tokenizer, instruction="", max_prompt_tokens=5, drop_long=True) == ([], [])
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        tokenize_prompts(problems, tokenizer, instruction="", max_prompt_tokens=50)


def test_the_stream_is_a_function_of_the_step_and_every_epoch_holds_everything_once():
    stream = ProblemStream(10, 4, seed=3)
    flat = [i for step in range(5) for i in stream.batch(step)]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10)) and flat[:10] != flat[10:]
    assert ProblemStream(10, 4, seed=3).batch(3) == stream.batch(3) != ProblemStream(10, 4, seed=4).batch(3)


# ---------------------------------------------------------------------------------------------------------- arithmetic


def test_arithmetic_is_made_from_the_seed_and_its_solutions_are_right():
    rows = make_problems(400, seed=1)
    assert rows == make_problems(400, seed=1) != make_problems(400, seed=2)
    lengths = {"terse": [], "wordy": [], "hasty": []}
    for row in rows:
        text = row["solution"]
        style = "wordy" if "First" in text else "hasty" if "So after" in text else "terse"
        lengths[style].append(len(text))
        equations = [line for line in text.splitlines() if "=" in line]
        assert len(equations) == (0 if style == "hasty" else row["difficulty"])
        for line in equations:
            left, right = line.split("=")
            assert eval(left) == int(right)
        assert text.endswith(f"\\boxed{{{row['answer']}}}")
        assert not equations or equations[-1].endswith("=" + row["answer"])
        if row["problem"][-2].isdigit() and "with" not in row["problem"]:
            assert eval(row["problem"].split()[-1].rstrip(".?")) == int(row["answer"])
    assert all(len(found) > 30 for found in lengths.values())
    assert sum(lengths["wordy"]) / len(lengths["wordy"]) > 2 * sum(lengths["terse"]) / len(lengths["terse"])


def test_train_and_test_share_no_problem():
    train = {r["problem"] for r in make_problems(3000, seed=1)}
    test = {r["problem"] for r in make_problems(256, seed=1, split="test")}
    assert len(train) == 3000 and len(test) == 256 and not train & test
    assert all(is_test(t) for t in test) and not any(is_test(t) for t in train)


def test_the_tokenizer_keeps_any_text_and_takes_digits_one_by_one():
    tokenizer = build_tokenizer()
    for text in ("Mia has 47 apples.", "Ünïcode ∑ 数学 \x00 \n\t 12345 <b>", ""):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("12345")["input_ids"]) == 5 and len(tokenizer) <= 512
    assert tokenizer.eos_token == "<|end|>" and tokenizer.pad_token == "<|endoftext|>"
