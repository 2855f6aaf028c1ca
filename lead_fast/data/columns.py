r"""Interpret the columns of a row: which one is the problem, which one the reference, and what a cell contains.

A column that the user names is used; dots lead into nested columns (`reward_model.ground_truth`). If a default name is
absent, the layouts of public sets are recognised, provided that only one fits: GSM8K (question; reference behind
`####`), MATH and NuminaMath-CoT (reference in the last \boxed{} of the solution), NuminaMath-1.5 and OpenR1-Math
(problem, answer), verl, DAPO and Skywork (prompt as chat messages; reward_model.ground_truth), Light-R1 (conversations
that end with the assistant's solution), DeepMath (final_answer), OpenMathReasoning (expected_answer).

A cell becomes text only if it is text or a number. Anything else is refused with row, column and remedy.
"""

import ast
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from ..reward.extraction import extract_boxed

DEFAULTS = {"problem": "problem", "reference": "answer", "difficulty": "difficulty", "solution": "solution"}
PROBLEMS = ("question", "prompt", "messages", "conversations")
REFERENCES = ("reward_model.ground_truth", "ground_truth", "final_answer", "expected_answer")
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
EXACT_FLOAT = 2**53
"""Below this, float64 represents every integer."""


# -------------------------------------------------------------------------------------------------------------- columns


@dataclass(frozen=True)
class Columns:
    """The columns of a source by their role; `worked` says that the reference is part of a worked solution."""

    problem: str
    reference: str
    difficulty: str
    solution: str
    worked: bool = False

    @property
    def top_level(self) -> list[str]:
        """Names as in a file: for a nested column the outermost name, and the name with its dots."""
        names = (self.problem, self.reference, self.difficulty, self.solution)
        return list(dict.fromkeys(part for n in names for part in (n, n.split(".")[0]) if n))


def cell(row: Mapping[str, Any], column: str) -> Any:
    """The cell of a column, None if there is none; dots lead into dicts."""
    if column in row or "." not in column:
        return row.get(column)
    value: Any = row
    for part in column.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def names_of(columns: Iterable[str], rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Names by which a user may refer to columns; columns that hold dicts in `rows` by the keys in them."""
    inner: dict[str, dict[str, None]] = {c: {} for c in columns}

    def walk(top: str, name: str, value: Any) -> None:
        if isinstance(value, Mapping) and value and name.count(".") < 3:
            for key, below in value.items():
                walk(top, f"{name}.{key}", below)
        elif name != top:
            inner[top][name] = None

    for row in rows:
        for column in inner.keys() & row.keys():
            walk(column, column, row[column])
    return [name for column, below in inner.items() for name in (below or [column])]


def find_columns(source: str, columns: list[str], sample: list[dict], wanted: Columns, *, references: bool) -> Columns:
    """Find the columns to read; `wanted` holds the names that were asked for, or the default names.

    Args:
        source: the source's name in error messages.
        columns: top-level names.
        sample: the first rows, from which layouts are recognised.
        wanted: from the user, or DEFAULTS.
        references: whether a column with references, or solutions that hold them, is required; if not, solutions do.
    Raises:
        ValueError: a column does not exist, or more than one could be meant.
    """
    known = names_of(columns, sample)

    def there(name: str) -> bool:
        return name in columns or name in known or any(k.startswith(f"{name}.") for k in known)

    def fitting(name: str, kind: str, others: Iterable[str]) -> list[str]:
        return [name] if there(name) else [c for c in others if there(c)] if name == DEFAULTS[kind] else []

    def refusal(name: str, kind: str, several: list[str]) -> ValueError:
        only = f"and {' or '.join(several)} could be meant" if several else f"only {', '.join(known)}"
        return ValueError(
            f"{source} has no column {name}, {only}: name the right one with --data.{kind}_column "
            f"(--{kind}_column of lead_fast.data's other commands)."
        )

    problems = fitting(wanted.problem, "problem", PROBLEMS)
    if len(problems) != 1:
        raise refusal(wanted.problem, "problem", problems)
    problem = problems[0]
    named = fitting(wanted.reference, "reference", REFERENCES)
    if len(named) == 1:
        return Columns(problem, named[0], wanted.difficulty, wanted.solution)
    if not named and wanted.reference == DEFAULTS["reference"]:
        solved = [c for c in (wanted.solution, problem) if there(c)]
        if worked := [c for c in solved if _mostly_worked(sample, c)]:
            return Columns(problem, worked[0], wanted.difficulty, wanted.solution, worked=True)
        if not references and (there(wanted.solution) or _ends_solved(sample, problem)):
            return Columns(problem, "", wanted.difficulty, wanted.solution)
    raise refusal(wanted.reference, "reference", named)


def _mostly_worked(sample: list[dict], column: str) -> bool:
    """Whether at least half of the rows hold a worked solution in `column` from which a reference can be read."""
    texts = [_solution_text(cell(row, column)) for row in sample]
    return 2 * sum(bool(answer_of_solution(t)[0]) for t in texts) >= max(1, len(texts))


def _ends_solved(sample: list[dict], column: str) -> bool:
    return any(isinstance(cell(row, column), list) and _solution_text(cell(row, column)) for row in sample)


def _solution_text(value: Any) -> str:
    """A solution as text: the cell, or the last turn of a chat if it is the assistant's; "" otherwise."""
    if isinstance(value, list) and value and isinstance(value[-1], Mapping):
        last = value[-1]
        value = last.get("content", last.get("value"))
        if ROLES.get(str(last.get("role", last.get("from")))) != "assistant":
            return ""
    return value if isinstance(value, str) else ""


# ---------------------------------------------------------------------------------------------------------------- cells


def text_of(value: Any, where: str, column: str, *, several: bool = False) -> str:
    """Convert a cell to stripped text; an empty cell, None and NaN become "".

    Args:
        where: source and row, with which error messages begin.
        column: its name.
        several: join a list of texts with commas (OlympiadBench's list of answers) instead of refusing it.
    Raises:
        ValueError: the cell is neither text nor a number, or holds a lone surrogate.
    """
    at = f"{where}: column {column}"
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as e:
            raise ValueError(
                f"{at} holds half a surrogate pair ({value[e.start]!a}), which is not text: remove it, or write the "
                "whole character."
            ) from e
        return value.strip()
    if isinstance(value, list) and several:
        return ", ".join(text_of(v, where, column) for v in value)
    if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool):
        return _number(value, at)
    raise ValueError(f"{at} is {_kind(value, column)}")


def _number(value: int | float | Decimal, at: str) -> str:
    """Format a number as people write it: 27.0, into which tables turn 27, becomes 27."""
    if isinstance(value, int):
        return str(value)
    if not math.isfinite(value):
        raise ValueError(f"{at} is {value}: give a finite number or text.")
    if isinstance(value, float) and abs(value) >= EXACT_FLOAT:
        raise ValueError(
            f"{at} is {value}, a float that has lost the last digits of a number above 2^53: store it as text."
        )
    return str(int(value)) if value == int(value) else f"{value:f}" if isinstance(value, Decimal) else str(value)


def _kind(value: Any, column: str) -> str:
    """Describe a cell that is neither text nor a number, with the remedy."""
    if isinstance(value, bool):
        return f"{str(value).lower()}, which is neither text nor a number: write it as text, such as yes or no."
    if isinstance(value, Mapping):
        keys = [str(k) for k in value]
        if not keys:
            return "an empty object: give one text or number per row."
        return f"an object with the keys {', '.join(keys)}: name which of them is meant, such as {column}.{keys[0]}."
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}: give one text or number per row."
    if isinstance(value, (bytes, bytearray)):
        return "binary data: store it as text."
    return f"of type {type(value).__name__}, which is neither text nor a number: store it as text."


def number_of(value: Any) -> float | None:
    """Convert a difficulty; None for an empty cell or NaN. Raises ValueError or TypeError if it is not finite."""
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool) or not math.isfinite(number := float(value)):
        raise ValueError(value)
    return number


BEHIND_HASHES, IN_BOX, IN_LIST = "behind ####", "in the last \\boxed{}", "alone in a list"


def answer_of_solution(text: str) -> tuple[str, str]:
    r"""Extract the answer that ends a worked solution, and its place: behind `####` on the last line, or in a \boxed{}.

    Of several boxes the last one counts. Both results are "" if there is neither.
    """
    last_line = text.rstrip().rpartition("\n")[2].lstrip()
    if last_line.startswith("####") and (answer := last_line.lstrip("#").strip()):
        return extract_boxed(answer) or answer, BEHIND_HASHES
    answer = extract_boxed(text) or ""
    return answer, IN_BOX if answer else ""


def reference_of(text: str) -> tuple[str, str]:
    """The reference in a cell's text, and its place if the cell holds more than it: as in answer_of_solution, or in
    Skywork's `["18"]`, a list written as text."""
    answer, place = answer_of_solution(text)
    if place:
        return answer, place
    elements = parsed(text) if re.match(r"\[\s*[\"']", text) else None
    if isinstance(elements, list) and len(elements) == 1 and isinstance(elements[0], str):
        return elements[0].strip(), IN_LIST
    return text, ""


def parsed(text: str) -> Any:
    """A list or dict that was written as text, in JSON or as Python's repr; None if it is neither."""
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            pass
    return None


def chat_of(value: Any, where: str, column: str) -> tuple[list[tuple[str, str]], str] | None:
    """Read a cell of chat messages: (role, text) of each up to the last user turn, and the assistant's reply to it.

    Messages are dicts of role and content, or of from and value (ShareGPT); roles are system, user (or human) and
    assistant (or gpt). A list written as text is read too.

    Returns:
        the turns of the prompt, the last one a user's, and the reply ("" if there is none); None if it is not a chat.
    Raises:
        ValueError: a message has another form, or the last turn before a reply is not a user's.
    """
    if isinstance(value, str) and re.match(r"\s*\[\s*\{\s*[\"'](?:role|content|from|value)", value):
        value = parsed(value) or value
    if not isinstance(value, list):
        return None
    turns = []
    for i, message in enumerate(value, 1):
        at = f"{where}: column {column}, message {i}"
        if not isinstance(message, Mapping):
            raise ValueError(f"{at} is not an object with role and content: give text, or a list of chat messages.")
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if role not in ROLES or (role == "system" and i > 1):
            raise ValueError(f"{at} has the role {role!r}: give system (first), user and assistant turns only.")
        if not isinstance(content, str) or not content.strip() or message.get("tool_calls"):
            raise ValueError(f"{at} has no text in content, or calls tools: give turns of text only.")
        turns.append((ROLES[role], text_of(content, where, f"{column}, message {i}")))
    reply = turns.pop()[1] if turns and turns[-1][0] == "assistant" else ""
    if not turns or turns[-1][0] != "user":
        raise ValueError(
            f"{where}: column {column} has no user turn: give messages that end with one, or with the reply to it."
        )
    return turns, reply


def problem_text(turns: list[tuple[str, str]]) -> str:
    """The text by which a chat is compared, counted and shown: its user's text, or all turns."""
    asked = [(role, text) for role, text in turns if role != "system"]
    return asked[0][1] if len(asked) == 1 else "\n\n".join(f"{role}: {text}" for role, text in asked)
