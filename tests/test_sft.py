"""Supervised fine-tuning end to end, its data sources, and what it shares with training."""

import pytest

from lead_fast.data import read
from lead_fast.data.read import load_problems


@pytest.fixture
def no_hub(monkeypatch):
    def asked(name: str, *_: str) -> list[dict]:
        pytest.fail(f"the hub was asked for {name}")

    monkeypatch.setattr(read, "_read_hub", asked)


@pytest.mark.parametrize("source", ["nowhere.csv", "nowhere.jsonl", "nowhere.parquet", "./nowhere", "../nowhere",
                                    "/nowhere/at/all", "a/b/nowhere", "nowhere/", "~/nowhere"])  # fmt: skip
def test_what_looks_like_a_file_is_not_asked_for_at_the_hub(source, no_hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as e:
        load_problems(source)
    assert str(e.value).startswith(f"{source} does not exist: give")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("source, says", [("owner/data", "is a folder: give a"), ("notes", "is neither .jsonl")])
def test_a_folder_or_another_file_is_refused_by_its_name(source, says, no_hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "data").mkdir(parents=True)
    (tmp_path / "notes").write_text("1")
    with pytest.raises(ValueError, match=says) as e:
        load_problems(source)
    assert source in str(e.value)


@pytest.mark.parametrize("source", ["owner/name", "gsm8k", "owner/name:main"])
def test_a_hub_name_is_asked_for_at_the_hub(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(read, "_read_hub", lambda name, *_: [{"problem": name, "answer": "1"}])
    assert load_problems(source)[0].problem == source
