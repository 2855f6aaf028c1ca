"""Problems in: JSONL, Parquet, a hub dataset's name, or the built-in arithmetic; checked before any model is loaded."""

import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from ..records import Problem

# Benchmarks by the names that papers use: hub set (and its configuration behind a colon) and split.
BENCHMARKS = {
    "AIME24": ("HuggingFaceH4/aime_2024", "train"),
    "AIME25": ("math-ai/aime25", "test"),
    "MATH500": ("HuggingFaceH4/MATH-500", "test"),
    "AMC23": ("math-ai/amc23", "test"),
    "Minerva": ("math-ai/minervamath", "test"),
    "OlympiadBench": ("Hothan/OlympiadBench:OE_TO_maths_en_COMP", "train"),
}
BENCHMARK_COLUMNS = (("problem", "question"), ("answer", "final_answer"), ("difficulty", "level"))
# What a hub dataset's name does not end in: such a source is a file, read here or refused.
SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".txt", ".arrow", ".xlsx", ".gz", ".zip", ".zst")


def load_problems(
    source: str,
    *,
    split: str = "train",
    problem_column: str = "problem",
    reference_column: str = "answer",
    difficulty_column: str = "difficulty",
    solution_column: str = "solution",
    min_difficulty: float | None = None,
    limit: int | None = None,
    references: bool = True,
) -> list[Problem]:
    """Rows of a source as problems.

    Args:
        source: path of a .jsonl, .json (an array of objects, or lines of them) or .parquet file; a benchmark's name
            (`BENCHMARKS`); a hub dataset's name, or `name:configuration`; or `arithmetic:train?n=4000&seed=1`, made
            here.
        split: of a hub dataset; one that has a single split gives that one.
        problem_column, reference_column: must be there, the latter only if `references`.
        difficulty_column, solution_column: may be there.
        min_difficulty: keep only problems above this.
        limit: keep only the first so many.
        references: every row must have one; if not, a row without one has the reference "" (worked solutions are enough
            for SFT), but there must be a column of references or of solutions.
    Raises:
        ValueError: no such file or dataset, a row that is no JSON, a missing column, an empty question or reference, no
            problem left.
    """
    if source.lower().startswith("livecodebench"):
        raise ValueError(f"{source} is solved by programs: only python -m lead_fast.evaluate --allow_code takes it.")
    name = next((n for n in BENCHMARKS if n.lower() == source.lower()), None)
    if name is not None:
        place, split = BENCHMARKS[name]
        rows, columns = _read(place, split, f"{name} ({place})")
    else:
        rows, columns = _read(source, split)
    if name is not None:  # the sets differ in their columns' names; those the user gave go first
        problem_column, reference_column, difficulty_column = (
            next((c for c in (given, *usual) if c in columns), given)
            for given, usual in zip(
                (problem_column, reference_column, difficulty_column), BENCHMARK_COLUMNS, strict=True
            )
        )
    needed = [(problem_column, "data.problem_column"), (reference_column, "data.reference_column")]
    for wanted, key in needed[: 2 if references or solution_column not in columns else 1]:
        if wanted not in columns:
            raise ValueError(
                f"{source} has no column {wanted}, only {', '.join(columns)}: name the right one with --{key} "
                f"(--{key.removeprefix('data.')} of lead_fast.data)."
            )
    if min_difficulty is not None and difficulty_column not in columns:
        raise ValueError(
            f"data.min_difficulty is {min_difficulty}, but {source} has no column {difficulty_column}, only "
            f"{', '.join(columns)}: name the right one with --data.difficulty_column."
        )
    problems = []
    for i, row in enumerate(rows):
        question, reference = (_text(row.get(c)) for c in (problem_column, reference_column))
        if not question:
            raise ValueError(f"{source}, row {i + 1}: column {problem_column} is empty; fill it in or remove the row.")
        if not reference and references:
            raise ValueError(
                f"{source}, row {i + 1}: column {reference_column} is empty; fill it in, or make a set without such "
                "rows with python -m lead_fast.data mix."
            )
        difficulty = row.get(difficulty_column)
        try:
            level = None if difficulty is None else float(difficulty)
        except (TypeError, ValueError) as e:
            if name is None:
                raise ValueError(
                    f"{source}, row {i + 1}: {difficulty_column} is {difficulty!r}; give a number or leave it out."
                ) from e
            level = None  # OlympiadBench has a word there
        if min_difficulty is None or (level is not None and level > min_difficulty):
            problems.append(Problem(str(i + 1), question, reference, level, _text(row.get(solution_column)) or None))
        if limit and len(problems) == limit:
            break
    if not problems:
        raise ValueError(
            f"{source} has no problem left (data.min_difficulty is {min_difficulty}): lower it or add data."
        )
    return problems


def say(text: str) -> None:
    """Print once, however many ranks read the data."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def _text(value: Any) -> str:
    if isinstance(value, list):  # several answers, as OlympiadBench gives them
        return ", ".join(_text(v) for v in value)
    return "" if value is None else str(value).strip()


def _read(source: str, split: str, called: str = "") -> tuple[list[dict], list[str]]:
    """Rows and their columns; `called` is what a complaint calls the source."""
    if source.startswith("arithmetic:"):
        from .arithmetic import make_problems

        part, _, query = source.removeprefix("arithmetic:").partition("?")
        given = {k: v[-1] for k, v in parse_qs(query).items()}
        if (
            part not in ("train", "test")
            or not set(given) <= {"n", "seed"}
            or not all(v.isdigit() for v in given.values())
        ):
            raise ValueError(f"{source} is not understood: give arithmetic:train?n=4000&seed=1, or arithmetic:test?...")
        n = int(given.get("n", 4000 if part == "train" else 256))
        rows: list[dict] = make_problems(n, seed=int(given.get("seed", 0)), split=part)
    elif looks_local(source) and not _holds_a_dataset(source):
        path = Path(source)
        _must_be_a_file(source)
        if source.endswith((".jsonl", ".json")):
            rows = _read_jsonl(path)
        elif source.endswith(".parquet"):
            rows = _read_parquet(path)
        else:
            raise ValueError(f"{source} is neither .jsonl, .json nor .parquet: convert it to one of them.")
    else:
        rows = _read_hub(source, split, called or source)
    return rows, list(dict.fromkeys(k for row in rows for k in row))


def looks_local(source: str) -> bool:
    """Whether a source is looked for on this machine: no hub dataset is named so, or it exists here."""
    return (
        source.lower().endswith(SUFFIXES)
        or source.startswith(("/", "./", "../", "~"))
        or source.endswith("/")
        or source.count("/") > 1  # a hub name is owner/name
        or Path(source).exists()
    )


def _read_jsonl(path: Path) -> list[dict]:
    """Rows of a file with a JSON object a line, or with one JSON array of objects."""
    with path.open("rb") as f:
        if f.read(1024).lstrip()[:1] == b"[":
            return _read_array(path)
    rows = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as e:
                raise ValueError(f"{path}, line {number} is no UTF-8: save the file in that encoding.") from e
            except json.JSONDecodeError as e:
                raise ValueError(f"{path}, line {number} is no JSON ({e.msg}): give one JSON object a line.") from e
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number} is {type(row).__name__}: give one JSON object a line.")
            rows.append(row)
    return rows


def _read_array(path: Path) -> list[dict]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is no UTF-8: save the file in that encoding.") from e
    except json.JSONDecodeError as e:
        raise ValueError(f"{path}, line {e.lineno} is no JSON ({e.msg}): give one array of objects.") from e
    other = next((i for i, row in enumerate(rows) if not isinstance(row, dict)), None)
    if other is not None:
        raise ValueError(f"{path}, element {other + 1} is {type(rows[other]).__name__}: give one array of objects.")
    return rows


def _read_parquet(path: Path) -> list[dict]:
    import pyarrow
    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        return list(Dataset.from_parquet(str(path)))  # type: ignore[arg-type]
    except (pyarrow.ArrowInvalid, DatasetGenerationError) as e:
        raise ValueError(f"{path} is no Parquet file: give one, or a .jsonl file.") from e


def _read_hub(name: str, split: str, called: str) -> list[dict]:
    from datasets import get_dataset_split_names, load_dataset
    from datasets.exceptions import DatasetsError

    path, _, config = name.partition(":")
    try:
        splits = get_dataset_split_names(path, config or None)
        if split not in splits and len(splits) == 1:
            say(f"{name} has no split {split}: its only one, {splits[0]}, is taken.")
            split = splits[0]
        if split in splits:
            return list(load_dataset(path, config or None, split=split))  # type: ignore[arg-type]
    except (OSError, ValueError, RuntimeError, DatasetsError) as e:
        reason = str(e).strip().split("\n")[0][:200]
        raise ValueError(
            f"{called} is no local file and could not be had from the hub, split {split} ({reason}): "
            "give a .jsonl, .json or .parquet file with columns problem and answer."
        ) from e
    raise ValueError(
        f"{name} has no split {split}, only {', '.join(splits)}: save the one you mean as .jsonl or .parquet."
    )


def _holds_a_dataset(source: str) -> bool:
    """Whether a source is a folder that `datasets` reads by itself: not named like a file, with data files in it."""
    folder = Path(source)
    if source.lower().endswith(SUFFIXES) or not folder.is_dir():
        return False
    return any(p.suffix in SUFFIXES for p in folder.rglob("*"))


def _must_be_a_file(source: str) -> None:
    if Path(source).is_dir():
        raise ValueError(f"{source} is a folder without data files: give a .jsonl, .json or .parquet file.")
    if not Path(source).is_file():
        raise ValueError(f"{source} does not exist: give a .jsonl, .json or .parquet file, or a hub dataset's name.")
