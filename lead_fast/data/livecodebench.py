"""LiveCodeBench: problems that programs solve, by name from the hub or from a local file with its schema.

    --data.test=LiveCodeBench[:v5][?from=2024-08-01&to=2025-01-31]    # v1 to v6; else v5, 880 problems
    --data.test=FILE.jsonl[?from=...&to=...]

A row has question_content, starter_code, public_test_cases, private_test_cases, difficulty, question_id, contest_date,
platform, and metadata, with func_name if a function is called. Tests stay in the file until a program is graded,
because those of all problems take gigabytes.
"""

import base64
import binascii
import datetime
import hashlib
import io
import json
import os
import pickle
import pickletools
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from ..config import Config
from ..records import Problem
from .prompts import tokenize_prompts
from .read import say

NAME, HUB = "LiveCodeBench", "livecodebench/code_generation_lite"
VERSIONS = {f"v{n}": [f"test{k if k > 1 else ''}.jsonl" for k in range(1, n + 1)] for n in range(1, 7)}  # cumulative
DIFFICULTIES = {"easy": 1.0, "medium": 2.0, "hard": 3.0}
COLUMNS = ("question_id", "question_content", "starter_code", "difficulty", "contest_date", "platform",
           "public_test_cases", "private_test_cases", "metadata")  # fmt: skip
MAX_TEST_BYTES = 1 << 30  # of one problem's private tests, decompressed

# The authors' prompt for reasoning models: the user's turn, without a system turn.
TASK = ("You will be given a question (problem specification) and will generate a correct Python program that matches "
        "the specification and passes all tests.")  # fmt: skip
WITH_STARTER = ("You will use the following starter code to write the solution to the problem and enclose your code "
                "within delimiters.")  # fmt: skip
WITHOUT_STARTER = ("Read the inputs from stdin solve the problem and write the answer to stdout (do not directly test "
                   "on the sample inputs). Enclose your code within delimiters as follows. Ensure that when the python "
                   "program runs, it reads the inputs, runs the algorithm and writes output to STDOUT.")  # fmt: skip


@dataclass(frozen=True)
class Source:
    """What `data.test` names: files on this machine, or a version on the hub; problems of these contest dates."""

    path: Path | None
    version: str
    first: datetime.date
    last: datetime.date


def parse_source(text: str) -> Source | None:
    """Parse a source of programs; None for any other source, such as a set of mathematics.

    Raises:
        ValueError: an unknown version, an invalid query, or a file of this schema in another format.
    """
    place, _, query = text.partition("?")
    name, _, version = place.partition(":")
    named = name.lower() == NAME.lower()
    if not named and not _has_schema(Path(place)):
        return None
    version = (version or "v5").lower().removeprefix("release_")
    if named and version not in VERSIONS:
        raise ValueError(f"{text} names version {version}: give one of {', '.join(VERSIONS)}.")
    if not named and not place.endswith(".jsonl"):
        raise ValueError(f"{place} has LiveCodeBench's columns: save it as .jsonl, the only format read for them.")
    given = {k: v[-1] for k, v in parse_qs(query, keep_blank_values=True).items()}
    try:
        dates = {k: datetime.date.fromisoformat(v) for k, v in given.items()}
    except ValueError as e:
        raise ValueError(f"{text} has an invalid date ({e}): give ?from=2024-08-01&to=2025-01-31.") from e
    if not set(dates) <= {"from", "to"} or bool(query) != bool(dates):
        raise ValueError(f"{text} cannot be parsed: after the question mark give from=2024-08-01&to=2025-01-31.")
    first, last = dates.get("from", datetime.date.min), dates.get("to", datetime.date.max)
    return Source(None if named else Path(place), version, first, last)


def _has_schema(path: Path) -> bool:
    """Whether a file's first row has columns that only this benchmark has."""
    wanted = {"question_content", "public_test_cases", "private_test_cases"}
    if not path.is_file():
        return False
    if path.suffix == ".parquet":
        from pyarrow import ArrowInvalid, parquet

        try:
            return wanted <= set(parquet.read_schema(path).names)
        except (OSError, ArrowInvalid):  # the reader of other sets will say what is wrong with it
            return False
    with path.open("rb") as f:
        head = next((line for line in f if line.strip()), b"")
    try:
        row = json.loads(head)
    except ValueError:
        return path.suffix == ".json" and all(f'"{w}"'.encode() in head for w in wanted)
    row = row[0] if isinstance(row, list) and row else row
    return isinstance(row, dict) and wanted <= set(row)


# ---------------------------------------------------------------------------------------------------------------- tests


SAFE_OPCODES = frozenset(
    "PROTO FRAME STOP MARK MEMOIZE PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET NONE NEWTRUE NEWFALSE INT BININT "
    "BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 EMPTY_LIST "
    "APPEND APPENDS LIST EMPTY_DICT DICT SETITEM SETITEMS".split()
)


class _DataOnly(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module_name}.{global_name}")


def unpickle_data(data: bytes) -> Any:
    """Read a pickle of strings, numbers, lists and dicts only; refuse any other unread. Raises ValueError."""
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name not in SAFE_OPCODES:
                raise ValueError(f"a pickle with {opcode.name}{f' {argument}' if argument else ''} is not read: it may "
                                 "hold strings, numbers, lists and dicts only")  # fmt: skip
        return _DataOnly(io.BytesIO(data)).load()
    except (pickle.UnpicklingError, EOFError, IndexError, KeyError, TypeError, AttributeError, MemoryError) as e:
        raise ValueError(f"a pickle is damaged ({type(e).__name__}: {e})") from e


def read_tests(text: Any) -> list[dict]:
    """Decode the tests of a column: JSON, or JSON in a pickle, compressed by zlib, in base64. Raises ValueError."""
    if isinstance(text, str) and not text.lstrip().startswith("["):
        try:
            unpacker = zlib.decompressobj()
            data = unpacker.decompress(base64.b64decode(text, validate=True), MAX_TEST_BYTES)
        except (binascii.Error, ValueError, zlib.error) as e:
            raise ValueError(f"it is neither JSON nor base64 of zlib ({e})") from e
        if not unpacker.eof:
            raise ValueError("it is cut short" if len(data) < MAX_TEST_BYTES else f"it is over {MAX_TEST_BYTES} bytes")
        text = unpickle_data(data)
    try:
        tests = json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError) as e:
        raise ValueError(f"it is not valid JSON ({e})") from e
    if not isinstance(tests, list) or not all(
        isinstance(t, dict) and isinstance(t.get("input"), str) and isinstance(t.get("output"), str) for t in tests
    ):
        raise ValueError("it is not a list of objects with the strings input and output")
    return tests


def function_name(row: dict) -> str | None:
    """The function that a row's tests call; None if they use standard input."""
    metadata = row.get("metadata") or {}
    metadata = json.loads(metadata) if isinstance(metadata, str) else metadata
    name = metadata.get("func_name") if isinstance(metadata, dict) else None
    return str(name) if name else None


def tests_of(row: dict) -> tuple[str | None, list[tuple[str, str]]]:
    """The function to call, if any, and all tests, public ones first. Raises ValueError."""
    tests = []
    for column in ("public_test_cases", "private_test_cases"):
        try:
            tests += read_tests(row[column])
        except ValueError as e:
            raise ValueError(f"column {column} cannot be read: {e}.") from e
    name = function_name(row)
    if not tests:
        raise ValueError("there is no test in its columns public_test_cases and private_test_cases.")
    if name is None and any(t.get("testtype") == "functional" for t in tests):
        raise ValueError("its tests call a function, but metadata has no func_name.")
    if name is not None:
        for t in tests:
            try:
                [json.loads(line) for line in [*t["input"].split("\n"), t["output"]]]
            except (ValueError, RecursionError) as e:
                raise ValueError(f"a test of function {name} is not JSON, a line for each argument ({e}).") from e
    return name, [(t["input"], t["output"]) for t in tests]


class TestFiles:
    """Locations of each problem's tests; called with a problem, it reads them."""

    __test__ = False  # not for pytest

    def __init__(self) -> None:
        self.places: dict[str, tuple[Path, int]] = {}

    def __call__(self, problem: Problem) -> tuple[str | None, list[tuple[str, str]]]:
        path, offset = self.places[problem.id]
        with path.open("rb") as f:
            f.seek(offset)
            return tests_of(json.loads(f.readline()))


# ------------------------------------------------------------------------------------------------------------- problems


def prompt(question: str, starter_code: str) -> str:
    """The user's turn, as the benchmark's authors give it."""
    rule, code = (WITH_STARTER, starter_code) if starter_code else (WITHOUT_STARTER, "# YOUR CODE HERE")
    return f"{TASK}\n\nQuestion: {question}\n\n{rule}\n```python\n{code}\n```\n\n"


def load_programs(text: str, *, limit: int | None = None) -> tuple[list[Problem], TestFiles]:
    """Load the problems of a source and their tests; `problem` is the entire prompt, `reference` a hash of the tests.

    Every row's tests are read once, each rank reading a part, so that a damaged file is found at the start.

    Raises:
        ValueError: names the row and its fault.
    """
    source = parse_source(text)
    assert source is not None, f"{text} holds no programs"
    files = [source.path] if source.path else [_download(name, text) for name in VERSIONS[source.version]]
    rank, world = (int(os.environ.get(k, d)) for k, d in (("RANK", "0"), ("WORLD_SIZE", "1")))
    tests, problems, number = TestFiles(), [], 0
    for path in files:
        with path.open("rb") as f:
            offset = 0
            for line in f:
                at, offset = offset, offset + len(line)
                number += 1
                if not line.strip():
                    continue
                try:
                    row = _row(line)
                    day = datetime.date.fromisoformat(str(row["contest_date"])[:10])
                    if not source.first <= day <= source.last:
                        continue
                    problem = _problem(row)
                    if problem.id in tests.places:
                        raise ValueError(f"question_id {problem.id} appears twice.")
                    if number % world == rank:
                        tests_of(row)
                except ValueError as e:
                    raise ValueError(f"{path}, row {number}: {e} Correct the row or remove it.") from e
                tests.places[problem.id] = (path, at)
                problems.append(problem)
                if limit and len(problems) == limit:
                    return problems, tests
    if not problems:
        raise ValueError(f"{text} has no problem left: widen from and to, or add problems.")
    return problems, tests


def _row(line: bytes) -> dict:
    try:
        row = json.loads(line)
    except ValueError as e:  # from JSON or UTF-8
        raise ValueError(f"it is not valid JSON ({e}).") from e
    missing = [c for c in COLUMNS if not isinstance(row, dict) or c not in row]
    if missing:
        raise ValueError(f"it has no {', '.join(missing)}.")
    return row


def _problem(row: dict) -> Problem:
    question = str(row["question_content"])
    if not question.strip():
        raise ValueError("question_content is empty.")
    difficulty = str(row["difficulty"]).lower()
    if difficulty not in DIFFICULTIES:
        raise ValueError(f"difficulty is {difficulty!r}, not one of {', '.join(DIFFICULTIES)}.")
    tests = json.dumps([function_name(row), row["public_test_cases"], row["private_test_cases"]])
    digest = hashlib.sha256(tests.encode()).hexdigest()[:16]
    turn = prompt(question, str(row["starter_code"] or ""))
    return Problem(str(row["question_id"]), turn, f"tests {digest}", DIFFICULTIES[difficulty])


def _download(name: str, text: str) -> Path:
    """Fetch a file of the benchmark from the hub or its cache."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(hf_hub_download(HUB, name, repo_type="dataset"))
    except (OSError, ValueError, HfHubHTTPError) as e:
        reason = re.sub(r"\s+", " ", str(e)).strip()[:200]
        raise ValueError(
            f"{text}: {HUB}/{name} could not be fetched from the hub ({reason}): download it, or give a local .jsonl "
            "file of the same schema."
        ) from e


def load_code_test(c: Config, tokenizer: Any) -> tuple[list[Problem], list[list[int]], TestFiles]:
    """Load the held-out problems of `data.test`, their prompts and their tests; data.instruction is ignored."""
    problems, tests = load_programs(c.data.test, limit=c.evaluate.problems or None)
    kept, prompts = tokenize_prompts(
        problems,
        tokenizer,
        instruction="",
        max_prompt_tokens=c.data.max_prompt_tokens,
        drop_long=c.data.drop_long_prompts,
    )
    if c.data.instruction:
        say(f"{c.data.test} uses its authors' prompt; data.instruction is left out.")
    return kept, prompts, tests
