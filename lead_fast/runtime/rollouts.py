"""Kept rollouts: every step's groups, compressed within a limit on disk, for the page of `lead_fast.report`.

RUN_DIR/rollouts/step-00000012.bin   one file per step, complete or absent
RUN_DIR/rollouts/tokenizer.json      tells tokens apart without the model

A file is a head of fixed size, the columns that lists and filters need (one row per group, one row per response), the
beginnings of the problems, and one compressed block per group. A list reads columns, a page reads one block. When the
limit is reached, steps are thinned out: the older the steps, the more of them are deleted; the first and the newest
are kept.
"""

import json
import math
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..records import Batch, Group

FOLDER = "rollouts"
MAGIC = b"LEADROL1"
HEAD = struct.Struct("<8sIIII")  # magic, groups, responses, bytes of the columns, bytes of the titles
GROUPS = np.dtype([("offset", "<u8"), ("size", "<u4"), ("first", "<u4"), ("responses", "<u4"), ("correct", "<u4")])
RESPONSES = np.dtype(
    [
        ("group", "<u4"),
        ("correct", "?"),
        ("truncated", "?"),
        ("length", "<u4"),
        ("age", "<i4"),
        ("reward", "<f4"),
        ("z", "<f4"),
        ("advantage", "<f4"),
        ("gap", "<f4"),
    ]
)
TITLE = 160  # characters of a problem to show in a list
LEVEL = 3  # of zlib: a third of the default's time, about a tenth more bytes


@dataclass(frozen=True)
class TokenValues:
    """Per-token values of some of a batch's responses, flat over R tokens in any order.

    sequences: int32 [R], which response of the batch; positions: int32 [R], ascending within a response.
    gap: float16 [R], log-prob by the trainer minus log-prob by the engine, nats.
    entropy: float16 [R], of the trainer's distribution, nats.
    """

    sequences: np.ndarray
    positions: np.ndarray
    gap: np.ndarray
    entropy: np.ndarray

    def by_sequence(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Gap and entropy of each response that has them, in token order."""
        order = np.lexsort((self.positions, self.sequences))
        names, starts = np.unique(self.sequences[order], return_index=True)
        parts = zip(np.split(self.gap[order], starts[1:]), np.split(self.entropy[order], starts[1:]), strict=True)
        return dict(zip(names.tolist(), parts, strict=False)) if len(names) else {}

    @staticmethod
    def joined(parts: Sequence["TokenValues"]) -> "TokenValues":
        names = ("sequences", "positions", "gap", "entropy")
        return TokenValues(*(np.concatenate([getattr(p, name) for p in parts]) for name in names))


def length_z(correct: np.ndarray, lengths: np.ndarray, eps: float) -> np.ndarray:
    """Standardised lengths of a group's correct responses (kernels/lead_kernels/advantage.py), NaN for wrong ones."""
    z = np.full(len(lengths), np.nan)
    right = lengths[correct].astype(np.float64)
    if len(right):
        sigma = right.std(ddof=1) if len(right) > 1 else 1.0
        z[correct] = (right - right.mean()) / (sigma + eps)
    return z


class Rollouts:
    """Write and thin out a run's groups. Only one process writes.

    Args:
        run: the run directory.
        limit_bytes: maximum total size of the files; 0: nothing is kept.
    """

    def __init__(self, run: Path, limit_bytes: int):
        self.folder, self.limit_bytes = run / FOLDER, limit_bytes

    def truncate_after(self, step: int) -> None:
        """Remove incomplete files, and the groups of steps after `step`, from which a run is resumed."""
        for path in self.folder.glob("*.partial"):
            path.unlink(missing_ok=True)
        for number, path in step_files(self.folder).items():
            if number > step:
                path.unlink(missing_ok=True)

    def keep_tokenizer(self, tokenizer: Any) -> None:
        """Save the fast tokenizer's tables; without them responses are shown without token colours."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if self.limit_bytes and backend is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = self.folder / "tokenizer.partial"
            backend.save(str(partial))
            os.replace(partial, self.folder / "tokenizer.json")

    def add(
        self, step: int, batch: Batch, rewards: list[float], advantages: list[float], eps: float, values: TokenValues
    ) -> str | None:
        """Keep a step's groups; returns a sentence on what went wrong, or None.

        Args:
            step: number of finished steps, this one included.
            batch: the groups.
            rewards, advantages: [S], group by group.
            eps: advantage.eps, for z.
            values: of the responses that were trained on.
        """
        if not self.limit_bytes:
            return None
        data = encode(step, batch, rewards, advantages, eps, values.by_sequence())
        if len(data) > self.limit_bytes:
            size = math.ceil(len(data) / 2**20)
            return f"step {step}: its rollouts take {size} MiB and were not kept: raise metrics.keep_rollouts."
        path = self.folder / f"step-{step:08d}.bin"
        partial = path.with_suffix(".partial")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._make_room(step, len(data))
            partial.write_bytes(data)
            os.replace(partial, path)
        except OSError as e:  # a full disk does not end the run
            partial.unlink(missing_ok=True)
            return f"step {step}: its rollouts were not kept ({e}): the run continues."
        return None

    def _make_room(self, step: int, size: int) -> None:
        files = {n: p for n, p in step_files(self.folder).items() if n != step}
        sizes = {n: p.stat().st_size for n, p in files.items()}
        left = sum(sizes.values()) + size - self.limit_bytes
        while left > 0:
            dropped = to_drop([*sorted(sizes), step])
            files[dropped].unlink()
            left -= sizes.pop(dropped)


def to_drop(steps: list[int]) -> int:
    """Choose which of the kept steps, ascending, to drop: the one that leaves the smallest gap relative to its age.

    The kept steps then lie about evenly on a logarithmic scale of age. The last step is never dropped, and the first
    only if no other can be.
    """
    if len(steps) <= 2:
        return steps[0]
    last = steps[-1]
    inner = zip(steps, steps[1:], steps[2:], strict=False)
    return min(inner, key=lambda s: ((s[2] - s[0]) / (last - s[0]), s[1]))[1]


def step_files(folder: Path) -> dict[int, Path]:
    """Files of the kept steps, by step, ascending."""
    files = {}
    for path in folder.glob("step-*.bin"):
        number = path.stem.removeprefix("step-")
        if number.isascii() and number.isdigit():
            files[int(number)] = path
    return dict(sorted(files.items()))


# ------------------------------------------------------------------------------------------------------------ format


def encode(
    step: int,
    batch: Batch,
    rewards: list[float],
    advantages: list[float],
    eps: float,
    values: dict[int, tuple[np.ndarray, np.ndarray]],
) -> bytes:
    """Encode a step's groups as the bytes of its file; equal groups give equal bytes."""
    rows = np.zeros(len(rewards), RESPONSES)
    rows["reward"], rows["advantage"] = rewards, advantages
    rows["correct"] = [s.correct for s in batch.scores]
    rows["truncated"] = [s.response.truncated for s in batch.samples]
    rows["length"] = batch.lengths
    rows["age"] = [step - 1 - s.response.policy_version for s in batch.samples]
    groups, blocks, first = np.zeros(len(batch.groups), GROUPS), [], 0
    for i, group in enumerate(batch.groups):
        of_group = slice(first, first + len(group.samples))
        part = rows[of_group]
        part["group"], part["z"] = i, length_z(part["correct"], part["length"], eps)
        token_values = [values.get(s) for s in range(of_group.start, of_group.stop)]
        part["gap"] = [np.nan if v is None else np.abs(v[0].astype(np.float32)).mean() for v in token_values]
        blocks.append(zlib.compress(encode_group(group, token_values), LEVEL))
        groups[i] = (0, len(blocks[-1]), first, len(group.samples), group.correct)
        first = of_group.stop
    titles = zlib.compress(json.dumps([title(g.problem.problem) for g in batch.groups]).encode(), LEVEL)
    groups["offset"] = np.cumsum(groups["size"], dtype=np.uint64) - groups["size"]  # relative to the first block
    columns = zlib.compress(groups.tobytes() + rows.tobytes(), LEVEL)
    return b"".join([HEAD.pack(MAGIC, len(groups), len(rows), len(columns), len(titles)), columns, titles, *blocks])


def title(problem: str) -> str:
    """The beginning of a problem, on one line."""
    return " ".join(problem[: 4 * TITLE].split())[:TITLE]


def encode_group(group: Group, values: list[tuple[np.ndarray, np.ndarray] | None]) -> bytes:
    texts = {
        "problem": group.problem.problem,
        "reference": group.problem.reference,
        "difficulty": group.problem.difficulty,
        "samples": [
            {
                "text": s.response.text,
                "extracted": s.score.extracted,
                "finish_reason": s.response.finish_reason,
                "policy_version": s.response.policy_version,
                "degenerate": s.score.degenerate,
                "terms": s.score.terms,
                "failed": s.score.failed,
                "tokens": s.response.length,
                "trained": v is not None,
            }
            for s, v in zip(group.samples, values, strict=True)
        ],
    }
    text = json.dumps(texts).encode()  # ASCII: a lone surrogate becomes an escape
    out = [struct.pack("<I", len(text)), text]
    for sample, v in zip(group.samples, values, strict=True):
        out += [np.asarray(sample.response.token_ids, "<u4").tobytes()]
        out += [np.asarray(sample.response.logprobs, "<f2").tobytes()]
        if v is not None:
            assert len(v[0]) == len(v[1]) == sample.response.length
            out += [v[0].astype("<f2").tobytes(), v[1].astype("<f2").tobytes()]
    return b"".join(out)


@dataclass(frozen=True)
class StepIndex:
    """Columns of a kept step: groups and responses, structured arrays of dtypes GROUPS and RESPONSES."""

    step: int
    path: Path
    groups: np.ndarray
    responses: np.ndarray
    titles_at: int
    titles_bytes: int

    def titles(self) -> list[str]:
        """Beginnings of the problems, one per group. Raises ValueError like `group`."""
        return json.loads(_inflated(self.path, self.titles_at, self.titles_bytes))

    def group(self, i: int) -> "KeptGroup":
        """Texts and token values of the i-th group.

        Raises:
            ValueError: the file is damaged or missing.
        """
        at = self.titles_at + self.titles_bytes + int(self.groups["offset"][i])
        return decode_group(_inflated(self.path, at, int(self.groups["size"][i])))


@dataclass(frozen=True)
class KeptSample:
    """A kept response: `fields` are those of encode_group; gap and entropy are None if it was not trained on."""

    fields: dict[str, Any]
    token_ids: np.ndarray
    engine: np.ndarray
    gap: np.ndarray | None
    entropy: np.ndarray | None


@dataclass(frozen=True)
class KeptGroup:
    problem: str
    reference: str
    difficulty: float | None
    samples: list[KeptSample]


def decode_group(data: bytes) -> KeptGroup:
    (size,) = struct.unpack_from("<I", data)
    texts, at = json.loads(data[4 : 4 + size]), 4 + size
    samples = []
    for fields in texts["samples"]:
        arrays: list[np.ndarray | None] = []
        for dtype, there in (("<u4", True), ("<f2", True), ("<f2", fields["trained"]), ("<f2", fields["trained"])):
            arrays.append(np.frombuffer(data, dtype, fields["tokens"], at) if there else None)
            at += np.dtype(dtype).itemsize * fields["tokens"] if there else 0
        samples.append(KeptSample(fields, *arrays))  # type: ignore[arg-type]
    return KeptGroup(texts["problem"], texts["reference"], texts["difficulty"], samples)


def read_step(step: int, path: Path) -> StepIndex:
    """Read the columns of a step's file.

    Raises:
        ValueError: it is damaged, or has another format.
        OSError: it is missing, because a running run has thinned it out.
    """
    try:
        with path.open("rb") as f:
            magic, groups, responses, columns_bytes, titles_bytes = HEAD.unpack(f.read(HEAD.size))
            if magic != MAGIC:
                raise ValueError(f"it begins with {magic!r}")
            data = zlib.decompress(f.read(columns_bytes))
        return StepIndex(
            step,
            path,
            np.frombuffer(data, GROUPS, groups),
            np.frombuffer(data, RESPONSES, responses, groups * GROUPS.itemsize),
            HEAD.size + columns_bytes,
            titles_bytes,
        )
    except (struct.error, zlib.error, ValueError) as e:
        raise ValueError(f"{path} holds no readable rollouts ({e}): remove it.") from e


def _inflated(path: Path, at: int, size: int) -> bytes:
    try:
        with path.open("rb") as f:
            f.seek(at)
            data = f.read(size)
    except OSError as e:
        raise ValueError(f"{path} cannot be read ({e}): it may have been thinned out.") from e
    if len(data) != size:
        raise ValueError(f"{path} is incomplete: remove it.")
    try:
        return zlib.decompress(data)
    except zlib.error as e:
        raise ValueError(f"{path} is damaged ({e}): remove it.") from e
