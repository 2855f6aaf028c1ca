"""JSON Lines files: read despite a half-written last line, and appended in full or not at all."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def each_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a JSONL file; a half-written last line, left by a run that was killed, is skipped.

    Raises:
        ValueError: any other line is not valid JSON.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    record = json.loads(line)
                except ValueError as e:  # from JSON or UTF-8
                    if not line.endswith(b"\n"):
                        break
                    raise ValueError(f"{path}, line {number} is not valid JSON: remove that line.") from e
                yield record


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The records of `each_jsonl` as a list."""
    return list(each_jsonl(path))


def _append(path: Path, records: list[dict[str, Any]]) -> None:
    # UTF-8 cannot encode a lone surrogate in a problem's text; backslashreplace writes it as a JSON escape.
    text = "".join(json.dumps(r, ensure_ascii=False, allow_nan=False) + "\n" for r in records)
    data = text.encode("utf-8", errors="backslashreplace")
    with open(path, "ab", buffering=0) as f:
        began = f.tell()
        try:
            while data:
                data = data[f.write(data) :]
        except OSError:  # a full disk: half a line would corrupt the file
            f.truncate(began)
            raise


def plain(value: Any) -> Any:
    """Convert a value to JSON's types: arrays and tensors to lists or numbers, NaN and infinity to None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
