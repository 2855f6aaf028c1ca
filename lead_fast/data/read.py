"""Read problems from JSONL, CSV, Parquet, a hub dataset or the built-in tasks, and check them before a model loads."""

import csv
import itertools
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from ..records import Problem
from .columns import (
    BEHIND_HASHES,
    DEFAULTS,
    IN_BOX,
    Columns,
    answer_of_solution,
    cell,
    chat_of,
    find_columns,
    names_of,
    number_of,
    problem_text,
    reference_of,
    text_of,
)

# Benchmarks by the names used in papers: hub set (and its configuration after a colon) and split.
BENCHMARKS = {
    "AIME24": ("HuggingFaceH4/aime_2024", "train"),
    "AIME25": ("math-ai/aime25", "test"),
    "MATH500": ("HuggingFaceH4/MATH-500", "test"),
    "AMC23": ("math-ai/amc23", "test"),
    "Minerva": ("math-ai/minervamath", "test"),
    "OlympiadBench": ("Hothan/OlympiadBench:OE_TO_maths_en_COMP", "train"),
}
# Endings that no hub dataset's name has: such a source is a file, which is read here or refused.
SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".txt", ".arrow", ".xlsx", ".gz", ".zip", ".zst")
FORMATS = "a .jsonl, .json, .csv or .parquet file"
SAMPLE_ROWS = 200
"""Number of rows from which a layout is recognised."""


def load_problems(
    source: str,
    *,
    split: str = "train",
    problem_column: str = DEFAULTS["problem"],
    reference_column: str = DEFAULTS["reference"],
    difficulty_column: str = DEFAULTS["difficulty"],
    solution_column: str = DEFAULTS["solution"],
    min_difficulty: float | None = None,
    limit: int | None = None,
    references: bool = True,
    empty_references: bool = False,
    keep_columns: bool = False,
) -> list[Problem]:
    """Read a source's rows as problems; print a line on what was read unless it is simply the columns named.

    Args:
        source: path of a .jsonl, .json (an array of objects, or one object per line), .csv (commas, names in the first
            line) or .parquet file; a benchmark's name (`BENCHMARKS`); a hub dataset's name, or `name:configuration`,
            followed by `?split=math` for another split; or `arithmetic:train?n=4000&seed=1`, generated here.
        split: of a hub dataset; a dataset with a single split gives that one.
        problem_column, reference_column: must exist, the latter only if `references`; if the default names are absent,
            known layouts are recognised (see columns.py).
        difficulty_column, solution_column: may be absent.
        min_difficulty: keep only problems above this.
        limit: keep only the first `limit` problems.
        references: whether every row must have one; if not, a row without one has the reference "" (worked solutions
            are enough for SFT), but there must be a column of references or of solutions.
        empty_references: accept rows without a reference, with "", because a later error covers all of them.
        keep_columns: keep every row as loaded in Problem.columns.
    Raises:
        ValueError: no such file or dataset, a file that cannot be read, a missing column, a cell that is neither text
            nor a number, an empty question or reference, no problem left.
    """
    if source.lower().startswith("livecodebench"):
        raise ValueError(f"{source} is solved by programs: only python -m lead_fast.evaluate --allow_code accepts it.")
    name, table, sample = _open(source, split)
    wanted = Columns(problem_column, reference_column, difficulty_column, solution_column)
    at = find_columns(source, table.columns, sample, wanted, references=references)
    if name is not None and difficulty_column not in table.columns and difficulty_column == DEFAULTS["difficulty"]:
        at = Columns(at.problem, at.reference, "level", at.solution, at.worked)
    if min_difficulty is not None and not {at.difficulty, at.difficulty.split(".")[0]} & {*table.columns}:
        raise ValueError(
            f"data.min_difficulty is {min_difficulty}, but {source} has no column {at.difficulty}, only "
            f"{', '.join(table.columns)}: name the right one with --data.difficulty_column."
        )
    reader = Reader(source, at, strict_solutions=not references, lists=name == "OlympiadBench", words=name is not None)
    problems: list[Problem] = []
    empty: list[int] = []
    used = None if keep_columns else [c for c in table.columns if c in at.top_level]
    for i, row in enumerate(table.rows(used), 1):
        problem = reader.problem(i, row, row if keep_columns else None)
        if not problem.reference and references:
            empty.append(i)
        if min_difficulty is None or (problem.difficulty is not None and problem.difficulty > min_difficulty):
            problems.append(problem)
        if limit and len(problems) == limit:
            break
    if empty and not empty_references:
        hint = " or has neither \\boxed{} nor ####" if at.worked else ""
        raise ValueError(
            f"{source}, row {empty[0]}: column {at.reference} is empty{hint}"
            f"{f', and in {len(empty) - 1:,} more rows' if len(empty) > 1 else ''}; fill it in, or leave such rows out "
            "with --data.drop_unverifiable (python -m lead_fast.data mix makes a set without them)."
        )
    if not problems:
        raise ValueError(
            f"{source} has no problem left (data.min_difficulty is {min_difficulty}): lower it, or add data."
        )
    if how := reader.how(wanted):
        say(f"{source}: {how}")
    return problems


@dataclass
class Reader:
    """Convert rows to problems, and count how often a reference was taken out of something longer.

    strict_solutions: refuse a solution that is not text; otherwise it counts as none. lists: join a list of answers.
    words: a difficulty may be a word, which counts as none.
    """

    source: str
    at: Columns
    strict_solutions: bool
    lists: bool
    words: bool
    rows: int = 0
    chats: int = 0
    places: Counter[str] = field(default_factory=Counter)
    """Places of references that were part of a longer cell."""

    def problem(self, number: int, row: dict, columns: dict[str, Any] | None) -> Problem:
        """Read the problem in a row; its reference is "" if there is none."""
        at, where = self.at, f"{self.source}, row {number}"
        self.rows += 1
        asked = cell(row, at.problem)
        chat = chat_of(asked, where, at.problem)
        turns, solution = chat or ([], "")
        self.chats += chat is not None
        question = problem_text(turns) if chat else text_of(asked, where, at.problem)
        if not question:
            raise ValueError(f"{where}: column {at.problem} is empty; fill it in or remove the row.")
        if (given := cell(row, at.solution)) is not None:
            try:
                solution = text_of(given, where, at.solution, several=self.lists) or solution
            except ValueError:
                if self.strict_solutions:
                    raise
        if at.worked and at.reference == at.problem:
            text = solution
        else:
            text = text_of(cell(row, at.reference), where, at.reference, several=self.lists) if at.reference else ""
        reference, place = answer_of_solution(text) if at.worked else reference_of(text)
        if place:
            self.places[place] += 1
            worked = place == BEHIND_HASHES or (place == IN_BOX and len(text) > len(f"$\\boxed{{{reference}}}$."))
            solution = solution or (text if worked else "")
        return Problem(
            str(number),
            question,
            reference,
            self._difficulty(row, where),
            solution or None,
            messages=tuple(turns) if len(turns) > 1 else None,
            columns=columns,
        )

    def _difficulty(self, row: dict, where: str) -> float | None:
        value = cell(row, self.at.difficulty)
        try:
            return number_of(value)
        except (TypeError, ValueError) as e:
            if self.words:  # OlympiadBench's difficulties are words
                return None
            raise ValueError(f"{where}: {self.at.difficulty} is {value!r:.60}; give a number or leave it out.") from e

    def how(self, wanted: Columns) -> str:
        """Say which columns were read as what; "" if they are the columns named, cell by cell."""
        at = self.at
        as_named = at.problem == wanted.problem and at.reference in (wanted.reference, "")
        if as_named and not (self.places or self.chats):
            return ""
        said = f"reads {at.problem}{' (chat messages)' if self.chats else ''} as problem"
        if at.reference:
            reply = "the assistant's reply in " if at.worked and at.reference == at.problem else ""
            inner = f"the text {' or '.join(self.places)} in " if self.places else ""
            part = sum(self.places.values())
            some = f" ({part:,} of {self.rows:,} rows)" if 0 < part < self.rows else ""
            said += f" and {inner}{reply}{at.reference} as reference{some}"
        return f"{said}."


def columns_of(source: str, split: str = "train") -> list[str]:
    """Names of a source's columns, nested ones with dots."""
    _, table, sample = _open(source, split)
    return names_of(table.columns, sample)


def _open(source: str, split: str) -> tuple[str | None, "Table", list[dict]]:
    """Open a source: its benchmark, if it is one, its table, and the first rows. Raises ValueError if it has none."""
    name = next((n for n in BENCHMARKS if n.lower() == source.lower()), None)
    if name is not None:
        place, split = BENCHMARKS[name]
        table = _read(place, split, f"{name} ({place})")
    else:
        table = _read(source, split)
    sample = list(itertools.islice(table.rows(None), SAMPLE_ROWS))
    if not sample:
        raise ValueError(f"{source} has no rows: give a file with one problem per row.")
    return name, table, sample


def say(text: str) -> None:
    """Print on one rank, however many ranks read the data."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


# -------------------------------------------------------------------------------------------------------------- sources


@dataclass(frozen=True)
class Table:
    """A source's columns and rows; `rows(names)` reads only those columns if that saves memory."""

    columns: list[str]
    rows: Callable[[list[str] | None], Iterable[dict]]


def _listed(rows: list[dict]) -> Table:
    return Table(list(dict.fromkeys(k for row in rows for k in row)), lambda _: rows)


def _read(source: str, split: str, called: str = "") -> Table:
    """Open the table of a source; `called` is its name in error messages."""
    if source.startswith(MADE):
        return _listed(_make(source))
    name, _, named_split = source.partition("?split=")
    path = Path(name).expanduser()
    if not looks_local(name) or _holds_a_dataset(path):
        rows = _read_hub(name, named_split or split, called or source)
        return _listed(rows) if isinstance(rows, list) else Table(rows.column_names, lambda names: _pick(rows, names))
    kind = path.suffix.lower().removeprefix(".")
    _must_be_readable(source, path, kind)
    if kind in ("jsonl", "json"):
        return _listed(_read_json(path))
    if kind == "csv":
        return _listed(_read_csv(path))
    if kind == "parquet":
        return _read_parquet(path)
    raise ValueError(f"{source} is neither .jsonl, .json, .csv nor .parquet: convert it to one of them.")


MADE = ("arithmetic:", "levels:")  # sources that are generated here, from a seed


def _make(source: str) -> list[dict]:
    from . import arithmetic, levels

    task, _, rest = source.partition(":")
    part, _, query = rest.partition("?")
    given = {k: v[-1] for k, v in parse_qs(query).items()}
    module = levels if task == "levels" else arithmetic
    allowed = (*levels.LEVELS, levels.HOPELESS) if task == "levels" else arithmetic.LEVELS
    named = given.pop("difficulties", "-".join(map(str, allowed))).split("-")
    known = part in ("train", "test") and set(given) <= {"n", "seed"} and set(named) <= {str(d) for d in allowed}
    if not known or not all(v.isdigit() for v in given.values()):
        raise ValueError(
            f"{source} cannot be parsed: give {task}:train?n=4000&seed=1, or {task}:test?..., and difficulties=1-2 "
            f"for only some of {'-'.join(map(str, allowed))}."
        )
    n = int(given.get("n", 4000 if part == "train" else 256))
    return module.make_problems(n, seed=int(given.get("seed", 0)), split=part, difficulties=[int(d) for d in named])


def looks_local(source: str) -> bool:
    """Whether to look for a source on this machine: it exists here, or no hub dataset can have such a name."""
    return (
        source.lower().endswith(SUFFIXES)
        or source.startswith(("/", "./", "../", "~"))
        or source.endswith("/")
        or source.count("/") > 1  # a hub name is owner/name
        or Path(source).exists()
    )


def _holds_a_dataset(folder: Path) -> bool:
    """Whether a source is a folder that `datasets` reads itself: not named like a file, and with data files in it."""
    if folder.name.lower().endswith(SUFFIXES) or not folder.is_dir():
        return False
    return any(p.suffix in SUFFIXES for p in folder.rglob("*"))


DISGUISES = {
    b"\x1f\x8b": "compressed by gzip: unpack it",
    b"BZh": "compressed by bzip2: unpack it",
    b"\xfd7zXZ": "compressed by xz: unpack it",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: unpack it",
    b"PK\x03\x04": "a ZIP archive or a spreadsheet: unpack it, or export it as CSV",
    b"PAR1": "a Parquet file: rename it to end in .parquet",
    b"ARROW1": "an Arrow file: save it as Parquet",
    b"\xff\xfe": "UTF-16 text: save it as UTF-8",
    b"\xfe\xff": "UTF-16 text: save it as UTF-8",
    b"version https://git-lfs": "a Git LFS pointer, not the data: fetch the file with git lfs pull",
}


def _must_be_readable(source: str, path: Path, kind: str) -> None:
    """Refuse a path that is not a file, or whose contents do not match its name."""
    if path.is_dir():
        named = source.lower().endswith(SUFFIXES)
        what = "is a folder named like a file" if named else "is a folder without data files"
        raise ValueError(f"{source} {what}: give {FORMATS}{', or rename the folder' if named else ''}.")
    if not path.is_file():
        raise ValueError(f"{source} does not exist: give {FORMATS}, or a hub dataset's name.")
    if kind not in ("jsonl", "json", "csv", "parquet"):
        return
    try:
        with path.open("rb") as f:
            head = f.read(1024)
    except OSError as e:
        raise ValueError(f"{source} cannot be read ({e.strerror}): give a file that this user may read.") from e
    if not head:
        raise ValueError(f"{source} is empty: give a file with one problem per row.")
    for magic, what in DISGUISES.items():
        if head.startswith(magic) and (kind, magic) != ("parquet", b"PAR1"):
            raise ValueError(f"{source} is {what}.")
    if head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"<":
        raise ValueError(f"{source} is a web page (HTML or XML), not the data: download the file itself.")


def _read_json(path: Path) -> list[dict]:
    """Read a file with one JSON object per line, or with one JSON array of objects."""
    with path.open("rb") as f:
        while (first := f.readline()) and not first.removeprefix(b"\xef\xbb\xbf").strip():
            pass
        if first.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
            return _json_array(path)
    rows = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"), object_pairs_hook=_object)
            except (ValueError, RecursionError) as e:
                if number == 1 and path.suffix.lower() == ".json" and _is_one_object(path):
                    raise ValueError(f"{path} is a single JSON object: give an array of objects, one per row.") from e
                raise _unreadable(e, path, number, "give one JSON object per line") from e
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number} is {_json_type(row)}: give one JSON object per line.")
            rows.append(row)
    return rows


def _json_array(path: Path) -> list[dict]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_object)
    except (ValueError, RecursionError) as e:
        raise _unreadable(e, path, getattr(e, "lineno", None), "give one array of objects") from e
    other = next((i for i, row in enumerate(rows) if not isinstance(row, dict)), None)
    if other is not None:
        raise ValueError(f"{path}, element {other + 1} is {_json_type(rows[other])}: give one array of objects.")
    return rows


class _Repeated(ValueError):
    """A key occurs twice in an object; json.loads would silently keep its last value."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        key, times = Counter(key for key, _ in pairs).most_common(1)[0]
        raise _Repeated(f"has the key {key!r:.60} {times} times in one object: keep one of them")
    return row


def _unreadable(e: Exception, path: Path, line: int | None, remedy: str) -> ValueError:
    """The error for what json.loads raised."""
    at = f"{path}, line {line}" if line else f"{path}"
    if isinstance(e, UnicodeDecodeError):
        return ValueError(f"{at} is not valid UTF-8: save the file in that encoding.")
    if isinstance(e, _Repeated):
        return ValueError(f"{at} {e}.")
    if isinstance(e, json.JSONDecodeError):
        return ValueError(f"{at} is not valid JSON ({e.msg}): {remedy}.")
    if isinstance(e, RecursionError):
        return ValueError(f"{at} is nested too deeply: {remedy}.")
    return ValueError(f"{at} has a number of more than {sys.get_int_max_str_digits():,} digits: store it as text.")


def _is_one_object(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_text(encoding="utf-8-sig")), dict)
    except (ValueError, RecursionError):
        return False


def _json_type(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _read_csv(path: Path) -> list[dict]:
    """Read a file with commas between cells and names in the first line; every cell is text."""
    limit = csv.field_size_limit(1 << 30)  # a long solution exceeds the default of 128 KiB
    try:
        with path.open(encoding="utf-8-sig", newline="") as f:
            lines = csv.reader(f, strict=True)
            header = [name.strip() for name in next(lines, [])]
            twice = next((n for i, n in enumerate(header) if n and n in header[:i]), None)
            if twice:
                raise ValueError(f"{path} has two columns {twice}: rename one of them.")
            if len(header) == 1 and any(mark in header[0] for mark in ";\t|"):
                raise ValueError(f"{path} has the single column {header[0]!r}: separate columns by commas.")
            rows = []
            for cells in lines:
                if cells and len(cells) != len(header):
                    raise ValueError(
                        f"{path}, row {len(rows) + 1} (line {lines.line_num}) has {len(cells)} cells, but the first "
                        f'line {len(header)} names: put text with commas in double quotes, and write " in it twice.'
                    )
                if cells:
                    rows.append(dict(zip(header, cells, strict=True)))
            return rows
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not valid UTF-8: save the file in that encoding.") from e
    except csv.Error as e:
        raise ValueError(
            f'{path}, line {lines.line_num} is not valid CSV ({e}): put text that holds commas, " or line breaks in '
            'double quotes, and write " in it twice.'
        ) from e
    finally:
        csv.field_size_limit(limit)


def _read_parquet(path: Path) -> Table:
    """Open a local Parquet file directly, so that no cache folder is needed."""
    import pyarrow
    from pyarrow import parquet

    def broken(e: Exception) -> ValueError:
        reason = str(e).strip().split("\n")[0][:200]
        return ValueError(f"{path} is not a readable Parquet file ({reason}): give one, or a .jsonl file.")

    def rows(names: list[str] | None) -> Iterator[dict]:
        try:
            with parquet.ParquetFile(path) as f:
                for batch in f.iter_batches(batch_size=SAMPLE_ROWS, columns=names):
                    yield from batch.to_pylist()
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as e:
            raise broken(e) from e

    try:
        with parquet.ParquetFile(path) as f:
            return Table(f.schema_arrow.names, rows)
    except (pyarrow.ArrowException, OSError) as e:
        raise broken(e) from e


def _pick(rows: Any, names: list[str] | None) -> Any:
    return rows if names is None else rows.select_columns(names)


def _read_hub(name: str, split: str, called: str) -> Any:
    """Load a dataset of the hub, or a folder that `datasets` reads, as list[dict] or datasets.Dataset."""
    from datasets import get_dataset_split_names, load_dataset
    from datasets.exceptions import DatasetsError

    path, _, config = name.partition(":")
    try:
        splits = get_dataset_split_names(path, config or None)
        if split not in splits and len(splits) == 1:
            say(f"{name} has no split {split}: its only one, {splits[0]}, is used.")
            split = splits[0]
        if split in splits:
            return load_dataset(path, config or None, split=split)
    except PermissionError as e:
        raise ValueError(
            f"{called} cannot be read, or {e.filename} not written ({e.strerror}): set HF_HOME to a folder that this "
            "user may write to."
        ) from e
    except (OSError, ValueError, RuntimeError, DatasetsError) as e:
        reason = str(e).strip().split("\n")[0][:200]
        if Path(path).is_dir():
            raise ValueError(f"{called} is a folder that cannot be read ({reason}): give {FORMATS}.") from e
        raise ValueError(
            f"{called} is not a local file and could not be fetched from the hub, split {split} ({reason}): "
            f"give {FORMATS} with columns problem and answer."
        ) from e
    raise ValueError(f"{name} has no split {split}, only {', '.join(splits)}: give one as {name}?split={splits[0]}.")
