"""Distributed checkpoints that are whole or passed over, and the final model in Hugging Face layout.

A checkpoint is written to `<run>/checkpoints/step-N.partial`; every rank sums up the files that it wrote (SHA-256),
`extra.json` lists them all, and only then the folder is renamed to `step-N` and named in `latest`. Reading goes from
the newest to the oldest and takes the first whose files are all there, whole and unchanged. Nothing in a checkpoint
is ever executed: DCP's own reader unpickles freely, ours takes tensors, numbers and DCP's records only.

All random draws are functions of (seed, step, rank) and the data position is the step, so the step number is the
random state.
"""

import contextlib
import enum
import fcntl
import hashlib
import io
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase

from ..runtime.hardware import GIB, check_disk
from ..runtime.ranks import Ranks
from .policy import Policy

KEEP = 2


# ------------------------------------------------------------------------------------------------------------- writing


def save(run: Path, step: int, policy: Policy, optimizer: torch.optim.Optimizer, extra: dict, ranks: Ranks) -> bool:
    """Model, optimiser and `extra` (JSON) after `step` steps. A collective.

    Returns:
        whether it was written, the same on every rank. If not (a full disk), the reason is printed, nothing of it is
        left, and older checkpoints stay as they are.
    """
    folder = run / "checkpoints" / f"step-{step}"
    partial = folder.with_suffix(".partial")
    fault, mine = "", {}
    if ranks.main:
        for old in folder.parent.glob("*.partial"):
            shutil.rmtree(old, ignore_errors=True)
        with contextlib.suppress(OSError):  # then writing fails too, on every rank
            partial.mkdir(parents=True)
    ranks.barrier()
    model, optim = get_state_dict(policy, optimizer)
    try:
        dcp_save({"model": model, "optim": optim}, checkpoint_id=partial)
        written = [*partial.glob(f"__{ranks.rank}_*"), *([partial / ".metadata"] if ranks.main else [])]
        mine = {p.name: {"bytes": p.stat().st_size, "sha256": digest(p)} for p in written}
    except (CheckpointException, OSError) as e:
        fault = _reason(e)
    parts = ranks.gather_objects((fault, mine))
    fault = next((f for f, _ in parts if f), "")
    if ranks.main and not fault:
        try:
            files = {name: told for _, part in parts for name, told in part.items()}
            write_atomic(partial / "extra.json", json.dumps({"step": step, **extra, "files": files}))
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
        except OSError as e:
            fault = _reason(e)
    fault = ranks.gather_objects(fault)[0]
    if ranks.main and fault:
        shutil.rmtree(partial, ignore_errors=True)
        kept = ", ".join(p.name for p in finished(run)[:1]) or "none"
        print(f"Warning: the checkpoint of step {step} was not written ({fault}): newest one kept: {kept}.", flush=True)
    elif ranks.main:
        with contextlib.suppress(OSError):
            write_atomic(run / "checkpoints" / "latest", folder.name)
        for old in finished(run)[KEEP:]:
            shutil.rmtree(old, ignore_errors=True)
    return not fault


def check_room(run: Path, shape: PretrainedConfig, checkpoint_every: int) -> None:
    """Raise ValueError where the disk cannot hold one checkpoint and the exported model; warn where not all fit.

    A checkpoint is weights and both AdamW moments in float32; KEEP of them stay while the next is written.
    """
    with torch.device("meta"):
        parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(shape).parameters())
    each = 12 * parameters if checkpoint_every else 0
    there = sum(p.stat().st_size for p in (run / "checkpoints").rglob("*") if p.is_file())
    remedy = "--output=FOLDER on another disk"
    one = f"a checkpoint of {each / GIB:.1f} GiB and the model" if each else "the model"
    check_disk(run, max(0, each - there) + 2 * parameters, f"writing {one} there", remedy)
    if each:
        every = f"writing {KEEP + 1} checkpoints of {each / GIB:.1f} GiB and the model there"
        try:
            check_disk(run, max(0, (KEEP + 1) * each - there) + 2 * parameters, every, remedy)
        except ValueError as e:
            print(f"Warning: {e} A checkpoint that does not fit is left out.", flush=True)


def _reason(e: BaseException) -> str:
    """An error's first line; of a CheckpointException, that of the first rank's error."""
    if isinstance(e, CheckpointException):
        e = next(iter(e.failures.values()))[0]
    return (str(e).strip().splitlines() or [type(e).__name__])[0]


def digest(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------------------------- reading


def finished(run: Path) -> list[Path]:
    """Checkpoint folders that were written to their end, newest first; their files were not looked at."""
    folders = [p for p in (run / "checkpoints").glob("step-*") if p.suffix != ".partial" and p.is_dir()]
    return sorted(folders, key=number, reverse=True)


def number(folder: Path) -> int:
    return int(folder.stem.removeprefix("step-"))


def load(run: Path, policy: Policy, optimizer: torch.optim.Optimizer, ranks: Ranks) -> dict[str, Any] | None:
    """Read the newest whole checkpoint into model and optimiser, on any number of ranks. A collective.

    The optimiser keeps its own groups (what is decayed, and how much): they are the configuration's.

    Returns:
        what was saved as `extra`, with `step`; None if no checkpoint was ever finished.
    Raises:
        ValueError: there are checkpoints and none is whole, or one holds what no checkpoint of ours holds.
    """
    passed = [(p, "it was cut short while it was written") for p in (run / "checkpoints").glob("*.partial")]
    found = None
    for folder in finished(run):
        if fault := _fault(folder, ranks):
            passed.append((folder, fault))
        else:
            found = folder
            break
    passed = [(p, why) for p, why in passed if found is None or number(p) > number(found)]
    if found is None and any(p.suffix != ".partial" for p, _ in passed):
        told = "; ".join(f"{p.name}: {why}" for p, why in passed)
        raise ValueError(
            f"No checkpoint in {run} is whole ({told}): remove them to begin anew, or give another --output."
        )
    for p, why in passed if ranks.main else []:
        instead = f"going on from {found.name}" if found else "there is none before it, so the run begins anew"
        print(f"Warning: checkpoint {p.name} is passed over ({why}): {instead}.", flush=True)
    if found is None:
        return None
    model, optim = get_state_dict(policy, optimizer)
    state = {"model": model, "optim": {"state": optim["state"]}}
    try:
        _Reader(found).read_metadata()  # DCP before torch 2.13 swallows what this raises
        dcp_load(state, storage_reader=_Reader(found), planner=_Planner())
    except (CheckpointException, pickle.UnpicklingError) as e:
        raise ValueError(f"Checkpoint {found} cannot be read ({_reason(e)}): was it made by another model?") from e
    optim |= state["optim"]
    set_state_dict(policy, optimizer, model_state_dict=state["model"], optim_state_dict=optim)
    return json.loads((found / "extra.json").read_text())


def _fault(folder: Path, ranks: Ranks) -> str:
    """What is wrong with a checkpoint, or "". A collective: every rank reads its share of the files."""
    try:
        files = json.loads((folder / "extra.json").read_text())["files"]
        mine = "" if ".metadata" in files else "its list of files is not whole"
        for name, told in [*files.items()][ranks.rank :: ranks.world]:
            path = folder / name
            if not path.is_file():
                mine = f"{name} is missing"
            elif path.stat().st_size != told["bytes"]:
                mine = f"{name} has {path.stat().st_size} bytes of {told['bytes']}"
            elif digest(path) != told["sha256"]:
                mine = f"{name} was changed after it was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        mine = f"its list of files cannot be read: {type(e).__name__}"
    return next((f for f in ranks.gather_objects(mine) if f), "")


class _Reader(FileSystemReader):
    """DCP's reader, but `.metadata` may name DCP's own records only: a pickle could call anything."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as f:
            metadata = _Unpickler(f).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    ALLOWED = {
        ("torch.distributed.checkpoint.metadata", name)
        for name in ("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta")
        + ("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING")
    } | {
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.serialization", "_get_layout"),
        ("torch", "Size"),
        ("pathlib", "PosixPath"),
        ("pathlib._local", "PosixPath"),
    }

    def __init__(self, file: IO[bytes]):
        super().__init__(file)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.ALLOWED:
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):  # how Python 3.11.2 writes a member of an enumeration
            return _member
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f".metadata names {module}.{name}, which no checkpoint needs")


def _member(enumeration: Any, name: str) -> enum.Enum:
    """getattr for enumerations alone."""
    if isinstance(enumeration, type) and issubclass(enumeration, enum.Enum):
        return enumeration[name]
    raise pickle.UnpicklingError(f".metadata asks for {name} of what is no enumeration")


class _Planner(DefaultLoadPlanner):
    """DCP's planner, but what is no tensor must pass torch's `weights_only` loading first."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        torch.load(value, weights_only=True)
        value.seek(0)
        super().load_bytes(read_item, value)


# ------------------------------------------------------------------------------------------------------ run directories


def claim(run: Path, resume: bool) -> IO[str]:
    """Take a run directory for this process and no other; it is let go when the process ends, however it ends.

    Raises:
        ValueError: another process holds it, or it holds a run that is not to be resumed.
    """
    if not resume and any((run / name).exists() for name in ("config.toml", "metrics.jsonl", "checkpoints")):
        raise ValueError(f"{run} holds a run already: go on with --resume, or give another --output.")
    run.mkdir(parents=True, exist_ok=True)
    lock = open(run / "lock", "a+", encoding="utf-8")  # held for as long as the process lives
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        lock.seek(0)
        raise ValueError(
            f"{run} is in use by another run (process {lock.read().strip()}): wait for it, or give another --output."
        ) from e
    except OSError:  # a file system without locks
        pass
    lock.truncate(0)
    lock.write(f"{os.getpid()}\n")
    lock.flush()
    return lock


# -------------------------------------------------------------------------------------------------------------- export


def export(folder: Path, policy: Policy, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, ranks: Ranks) -> None:
    """The model in Hugging Face layout, safetensors in `dtype`, with its tokenizer. A collective."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(policy, options=options)
    if ranks.main:
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        weights = {k.removeprefix("model."): v.to(dtype) for k, v in state.items() if isinstance(v, torch.Tensor)}
        if "lm_head.weight" in dict(policy.model.named_parameters()):  # once, where it is the embedding
            policy.model.config.tie_word_embeddings = False  # whatever was said of it: a reader would drop the head
        else:
            weights.pop("lm_head.weight", None)
        policy.model.save_pretrained(partial, state_dict=weights)
        config = json.loads((partial / "config.json").read_text())
        config["dtype"] = str(dtype).removeprefix("torch.")  # of the file, not of the masters
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        tokenizer.save_pretrained(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    ranks.barrier()


def write_atomic(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old one or the new one, never half."""
    tmp = path.with_name(path.name + ".tmp")
    with tmp.open("w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(tmp, path)
