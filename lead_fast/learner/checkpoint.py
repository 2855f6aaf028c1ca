"""Distributed checkpoints, which are used only if complete, and the final model in Hugging Face layout.

A checkpoint is written to `<run>/checkpoints/step-N.partial`. Every rank hashes its files as it writes them (SHA-256),
`extra.json` lists them all, and only then is the folder renamed to `step-N` and named in `latest`. Reading tries the
newest first and uses the first checkpoint whose files are all present, complete and unchanged. Nothing in a checkpoint
is ever executed: DCP's own reader unpickles freely, ours accepts only tensors, numbers and DCP's records.

All random draws are functions of (seed, step, rank) and the position in the data is the step, so the step number is
the entire random state.
"""

import concurrent.futures
import contextlib
import enum
import fcntl
import hashlib
import io
import json
import os
import pickle
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase

from ..runtime.hardware import GIB, check_disk
from ..runtime.ranks import Ranks, at_stop
from .policy import Policy

KEEP = 2
SPARE = 1.01  # size of a checkpoint's files over that of its tensors
COPY_AHEAD = 10_000_000  # bytes in flight from the GPU while an unstaged checkpoint is written
SEEN_S = 15.0  # within which a file written on one machine must be visible on another; NFS caches for a few seconds


# ------------------------------------------------------------------------------------------------------------- writing


class Checkpoints:
    """Write a run's checkpoints while the run continues: stage them in host memory, then write them in a thread.

    Only one write is under way at a time; the next one waits for it. The threads' collectives (DCP's plan, the list of
    hashes) use a separate gloo group and run in the order of the writes, the same on every rank: they never interleave
    with the trainer's collectives, whose order is the same as without checkpoints. The `async_save` of
    torch.distributed.checkpoint would return before hashes and rename, which would then need a second thread.

    Host memory: a rank's part of a checkpoint (12 bytes per parameter, over all ranks), pinned on a GPU machine and
    kept from one checkpoint to the next. If it is not free, the run waits until the checkpoint is written.

    Args:
        run: the run directory.
        ranks: of this job.
        progress: called with (step, MiB written, MiB in total) on this rank while something waits for a write.
    """

    def __init__(self, run: Path, ranks: Ranks, progress: Callable[[int, int, int], None] = lambda *_: None):
        self.run, self.ranks, self.progress = run, ranks, progress
        self._group = dist.new_group(backend="gloo")
        cuda = ranks.device.type == "cuda"
        options = {"use_pinned_memory": cuda, "use_non_blocking_copy": cuda}
        self._stager = DefaultStager(StagingOptions(use_async_staging=False, use_shared_memory=False, **options))
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint", self._enter_thread)
        self._pending: tuple[int, _Hashes, int, concurrent.futures.Future[str]] | None = None
        self._newest = -1  # the step written last
        self._has_staged = False  # if True, host memory for staging is already allocated
        self._failures: list[str] = []
        at_stop.append(self.close)

    def _enter_thread(self) -> None:
        if self.ranks.device.type == "cuda":
            torch.cuda.set_device(self.ranks.device)  # a new thread starts on GPU 0

    def save(self, step: int, policy: Policy, optimizer: torch.optim.Optimizer, extra: dict, *, wait: bool) -> bool:
        """Stage model, optimiser and `extra` (JSON) after `step` steps, and start writing them. A collective.

        Args:
            wait: return only after the checkpoint has been written.
        Returns:
            whether the write was started, or with `wait` whether it succeeded; the same on every rank. The reason for
            a failure is in `failures`.
        """
        self.finish()
        if self._newest == step:
            return True
        if fault := _prepare(self.run, step, state := _state(policy, optimizer), self.ranks):
            self._failures.append(_not_written(self.run, step, fault))
            return False
        hashes = _Hashes()
        args = (self.run, step, extra, hashes, self.ranks)
        if self._has_staged or _fits_host(state, self.ranks):
            self._has_staged = True
            staged: Any = self._stager.stage(state)
            if self.ranks.device.type == "cuda":
                torch.cuda.synchronize(self.ranks.device)
            future = self._thread.submit(_write, *args, staged, self._group)
        else:
            future = concurrent.futures.Future()
            future.set_result(_write(*args, state, None))
        self._pending = (step, hashes, _size(state)[1], future)
        return self.finish() if wait else True

    def finish(self) -> bool:
        """Wait for the write that is under way. Returns whether there was none or it succeeded. A collective."""
        if self._pending is None:
            return True
        step, hashes, size, future = self._pending
        with self.ranks.waiting("the checkpoint's write"):
            before = -1
            while not concurrent.futures.wait([future], timeout=0.5).done:
                if hashes.bytes > before:  # only written bytes count as progress, so a hanging disk ends the job
                    before = hashes.bytes
                    self.progress(step, min(before, size) >> 20, size >> 20)
        return self._collect()

    def _collect(self) -> bool:
        """Record how the write that just ended went."""
        assert self._pending
        step, _, _, future = self._pending
        self._pending = None
        if fault := future.result():
            self._failures.append(_not_written(self.run, step, fault))
        else:
            self._newest = step
        return not fault

    def failures(self) -> list[str]:
        """Sentences on checkpoints that could not be written, each returned once; does not wait for a running write."""
        if self._pending and self._pending[-1].done():
            self._collect()
        failures, self._failures = self._failures, []
        return failures

    def close(self) -> None:
        """Wait for a running write and free the staging memory; print failures that nobody has read."""
        self.finish()
        for sentence in self.failures() if self.ranks.main else []:
            print(f"Warning: {sentence}", flush=True)
        self._thread.shutdown()
        self._stager.close()


def save(run: Path, step: int, policy: Policy, optimizer: torch.optim.Optimizer, extra: dict, ranks: Ranks) -> bool:
    """Write model, optimiser and `extra` (JSON) after `step` steps and wait until it is done. A collective.

    Returns:
        whether it was written, the same on every rank. If not (a full disk), the reason is printed, no part of it
        remains, and older checkpoints are untouched.
    """
    state = _state(policy, optimizer)
    fault = _prepare(run, step, state, ranks) or _write(run, step, extra, _Hashes(), ranks, state, None)
    if fault and ranks.main:
        print(f"Warning: {_not_written(run, step, fault)}", flush=True)
    return not fault


def _state(policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The tensors of a checkpoint, by reference. A collective."""
    model, optim = get_state_dict(policy, optimizer)
    return {"model": model, "optim": optim}


def _partial(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step}.partial"


def _not_written(run: Path, step: int, fault: str) -> str:
    kept = next((p.name for p in finished(run)), "none")
    return f"the checkpoint of step {step} was not written ({fault}): newest one kept: {kept}."


def _prepare(run: Path, step: int, state: dict[str, Any], ranks: Ranks) -> str:
    """Create the folder to write to, if there is room; returns what prevents it, or "". A collective."""
    fault = ""
    if ranks.main:
        partial = _partial(run, step)
        for old in partial.parent.glob("*.partial"):
            shutil.rmtree(old, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            free, needed = shutil.disk_usage(partial).free, SPARE * _size(state)[0]
            if free < needed:
                fault = f"the disk has {free / GIB:.3g} GiB free and it needs {needed / GIB:.3g} GiB"
                shutil.rmtree(partial, ignore_errors=True)
        except OSError as e:
            fault = _reason(e)
    return ranks.gather_objects(fault)[0]


def _tensors(state: Any) -> Iterator[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from _tensors(value)


def _size(state: dict[str, Any]) -> tuple[int, int]:
    """Bytes of a checkpoint's tensors: of all ranks, and of this rank's shards."""
    tensors = [*_tensors(state)]
    shards = (t.to_local() if isinstance(t, DTensor) else t for t in tensors)
    return sum(t.numel() * t.element_size() for t in tensors), sum(t.numel() * t.element_size() for t in shards)


def _fits_host(state: dict[str, Any], ranks: Ranks) -> bool:
    """Whether all ranks of this machine can hold a copy of their shards in free memory. A collective."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world))
    fits = 1.1 * local * _size(state)[1] < available_bytes()
    if not fits and ranks.rank % local == 0:
        print("Warning: too little host memory is free to stage a checkpoint: the run waits for its write.", flush=True)
    return all(ranks.gather_objects(fits))


def available_bytes() -> float:
    """Host memory that can be used without swapping; infinite if the kernel does not report it."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        rows = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
        return next(1024.0 * int(row[1]) for row in rows if row[0] == "MemAvailable:")
    return float("inf")


def _write(
    run: Path, step: int, extra: dict, hashes: "_Hashes", ranks: Ranks, state: dict[str, Any], group: Any
) -> str:
    """Write a checkpoint, list its files, rename its folder. A collective of `group`; None means the default group.

    Returns:
        why it was not written, or ""; the same on every rank. After a failure no part of it remains.
    """
    partial = _partial(run, step)
    folder = partial.with_suffix("")
    fault, files = "", {}
    try:
        writer = _Writer(partial, hashes, copy_ahead=0 if group else COPY_AHEAD)
        dcp_save(state, storage_writer=writer, process_group=group)
        files = hashes.files()
    except (CheckpointException, OSError) as e:
        fault = _reason(e)
    parts = ranks.gather_objects((fault, files), group)
    fault = next((f for f, _ in parts if f), "")
    if ranks.main and not fault:
        try:
            listed = {name: entry for _, part in parts for name, entry in part.items()}
            write_atomic(partial / "extra.json", json.dumps({"step": step, **extra, "files": listed}))
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
        except OSError as e:
            fault = _reason(e)
    fault = ranks.gather_objects(fault, group)[0]
    if ranks.main and fault:
        shutil.rmtree(partial, ignore_errors=True)
    elif ranks.main:
        with contextlib.suppress(OSError):
            write_atomic(run / "checkpoints" / "latest", folder.name)
        for old in finished(run)[KEEP:]:
            shutil.rmtree(old, ignore_errors=True)
    return fault


class _Hashes:
    """SHA-256 and size of the files that this rank writes, computed from the bytes as they go to the disk."""

    def __init__(self) -> None:
        self.bytes = 0
        self.sha: dict[str, tuple[Any, list[int]]] = {}

    def stream(self, name: str, raw: IO[bytes]) -> "_HashedStream":
        self.sha[name] = (hashlib.sha256(), [0])
        return _HashedStream(raw, self, *self.sha[name])

    def files(self) -> dict[str, dict[str, Any]]:
        return {name: {"bytes": size[0], "sha256": sha.hexdigest()} for name, (sha, size) in self.sha.items()}


class _HashedStream(io.RawIOBase):
    """A file that is written once, from beginning to end."""

    def __init__(self, raw: IO[bytes], hashes: _Hashes, sha: Any, size: list[int]):
        self.raw, self.hashes, self.sha, self.size = raw, hashes, sha, size

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        n = self.raw.write(data)
        assert n == memoryview(data).nbytes, "a buffered file writes all bytes or raises"
        self.sha.update(data)
        self.size[0] += n
        self.hashes.bytes += n
        return n

    def tell(self) -> int:
        return self.size[0]

    def flush(self) -> None:
        if not self.raw.closed:
            self.raw.flush()

    def fileno(self) -> int:
        self.raw.flush()  # fsync, which calls this, writes what the kernel has buffered
        return self.raw.fileno()

    def close(self) -> None:
        self.raw.close()
        super().close()


class _HashingFileSystem(FileSystem):
    def __init__(self, hashes: _Hashes):
        self.hashes = hashes

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:
        assert mode == "wb"
        with Path(path).open("wb") as raw:
            yield self.hashes.stream(Path(path).name, raw)

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        super().rename(path, new_path)
        self.hashes.sha[Path(new_path).name] = self.hashes.sha.pop(Path(path).name)


class _Writer(FileSystemWriter):
    """DCP's writer, which hashes the files as it writes them."""

    def __init__(self, folder: Path, hashes: _Hashes, copy_ahead: int):
        super().__init__(folder, per_thread_copy_ahead=copy_ahead)
        self.fs = _HashingFileSystem(hashes)


def check_room(run: Path, shape: PretrainedConfig, checkpoint_every: int) -> None:
    """Raise ValueError if the disk cannot hold one checkpoint and the exported model; warn if it cannot hold all.

    A checkpoint is weights and both AdamW moments in float32; KEEP of them remain while the next is written.
    """
    with torch.device("meta"):
        parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(shape).parameters())
    each = 12 * parameters if checkpoint_every else 0
    present = sum(p.stat().st_size for p in (run / "checkpoints").rglob("*") if p.is_file())
    remedy = "--output=FOLDER on another disk"
    one = f"a checkpoint of {each / GIB:.1f} GiB and the model" if each else "the model"
    check_disk(run, max(0, each - present) + 2 * parameters, f"writing {one} there", remedy)
    if each:
        every = f"writing {KEEP + 1} checkpoints of {each / GIB:.1f} GiB and the model there"
        try:
            check_disk(run, max(0, (KEEP + 1) * each - present) + 2 * parameters, every, remedy)
        except ValueError as e:
            print(f"Warning: {e} A checkpoint that does not fit is skipped.", flush=True)


def _reason(e: BaseException) -> str:
    """An error's first line; for a CheckpointException, that of the first rank's error."""
    if isinstance(e, CheckpointException):
        e = next(iter(e.failures.values()))[0]
    return (str(e).strip().splitlines() or [type(e).__name__])[0]


def digest(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------------------------- reading


def finished(run: Path) -> list[Path]:
    """Folders of completely written checkpoints, newest first; their files are not checked."""
    folders = [p for p in (run / "checkpoints").glob("step-*") if p.suffix != ".partial" and p.is_dir()]
    return sorted(folders, key=number, reverse=True)


def number(folder: Path) -> int:
    return int(folder.stem.removeprefix("step-"))


def load(run: Path, policy: Policy, optimizer: torch.optim.Optimizer, ranks: Ranks) -> dict[str, Any] | None:
    """Read the newest complete checkpoint into model and optimiser, on any number of ranks. A collective.

    The optimiser keeps its own parameter groups (which parameters decay, and how much), as the configuration says.

    Returns:
        what was saved as `extra`, with `step`; None if no checkpoint was ever completed.
    Raises:
        ValueError: there are checkpoints but none is complete, or one holds objects that no checkpoint of ours holds.
    """
    partial, folders = ranks.gather_objects(([*(run / "checkpoints").glob("*.partial")], finished(run)))[0]
    passed = [(p, "its writing was interrupted") for p in partial]
    newest = None
    for folder in folders:
        if fault := _fault(folder, ranks):
            passed.append((folder, fault))
        else:
            newest = folder
            break
    passed = [(p, why) for p, why in passed if newest is None or number(p) > number(newest)]
    if newest is None and any(p.suffix != ".partial" for p, _ in passed):
        reasons = "; ".join(f"{p.name}: {why}" for p, why in passed)
        raise ValueError(
            f"No checkpoint in {run} is complete ({reasons}): remove them to start over, or give another --output."
        )
    for p, why in passed if ranks.main else []:
        instead = f"resuming from {newest.name}" if newest else "there is no earlier one, so the run starts over"
        print(f"Warning: checkpoint {p.name} is skipped ({why}): {instead}.", flush=True)
    if newest is None:
        return None
    model, optim = get_state_dict(policy, optimizer)
    state = {"model": model, "optim": {"state": optim["state"]}}
    try:
        _Reader(newest).read_metadata()  # before torch 2.13, DCP swallows the errors that this raises
        dcp_load(state, storage_reader=_Reader(newest), planner=_Planner())
    except (CheckpointException, pickle.UnpicklingError) as e:
        raise ValueError(f"Checkpoint {newest} cannot be read ({_reason(e)}): was it saved with another model?") from e
    optim |= state["optim"]
    set_state_dict(policy, optimizer, model_state_dict=state["model"], optim_state_dict=optim)
    return json.loads((newest / "extra.json").read_text())


def _fault(folder: Path, ranks: Ranks) -> str:
    """What is wrong with a checkpoint, or "". A collective: every rank reads some of the files."""
    try:
        files = json.loads((folder / "extra.json").read_text())["files"]
        fault = "" if ".metadata" in files else "its list of files is incomplete"
        for name, listed in [*files.items()][ranks.rank :: ranks.world]:
            path = folder / name
            if not path.is_file():
                fault = f"{name} is missing"
            elif path.stat().st_size != listed["bytes"]:
                fault = f"{name} has {path.stat().st_size} bytes of {listed['bytes']}"
            elif digest(path) != listed["sha256"]:
                fault = f"{name} was changed after it was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        fault = f"its list of files cannot be read: {type(e).__name__}"
    return next((f for f in ranks.gather_objects(fault) if f), "")


class _Reader(FileSystemReader):
    """DCP's reader, restricted so that `.metadata` names DCP's own records only: a pickle could call anything."""

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
    """A getattr that works for enumerations only."""
    if isinstance(enumeration, type) and issubclass(enumeration, enum.Enum):
        return enumeration[name]
    raise pickle.UnpicklingError(f".metadata requests {name} of something that is not an enumeration")


class _Planner(DefaultLoadPlanner):
    """DCP's planner, which passes everything but tensors through torch's `weights_only` loading first."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        torch.load(value, weights_only=True)
        value.seek(0)
        super().load_bytes(read_item, value)


# ------------------------------------------------------------------------------------------------------ run directories


def claim(run: Path, resume: bool) -> IO[str]:
    """Lock a run directory for this process; the lock is released when the process ends, however it ends.

    Raises:
        ValueError: another process holds the lock, or the directory holds a run and `resume` is False.
    """
    if not resume and any((run / name).exists() for name in ("config.toml", "metrics.jsonl", "checkpoints")):
        raise ValueError(f"{run} already holds a run: resume it with --resume, or give another --output.")
    run.mkdir(parents=True, exist_ok=True)
    lock = open(run / "lock", "a+", encoding="utf-8")  # held as long as the process lives
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


def check_shared(run: Path, ranks: Ranks) -> None:
    """Raise ValueError on every rank if the machines of the job do not share the run directory. A collective.

    The first rank leaves a file with a mark, which one rank on each other machine must find.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world))
    if local == ranks.world:
        return
    name, mark = ranks.gather_objects((f".seen-{uuid.uuid4().hex[:12]}", uuid.uuid4().hex))[0]
    if ranks.main:
        write_atomic(run / name, mark)
    ranks.barrier()
    path, until = run / name, time.monotonic() + SEEN_S
    while not (seen := path.is_file() and path.read_text() == mark) and time.monotonic() < until:
        time.sleep(0.2)
    where = f"{run.absolute()} on {socket.gethostname()} (rank {ranks.rank})"
    places = ranks.gather_objects((seen, where))
    if ranks.main:
        path.unlink(missing_ok=True)
    blind = next((place for seen, place in places if not seen), None)
    if blind:
        raise ValueError(
            f"The machines of this job do not share the run directory: the file that rank 0 wrote to {places[0][1]} is "
            f"missing in {blind}; give --output=FOLDER on a file system that all of them mount at the same path."
        )


# -------------------------------------------------------------------------------------------------------------- export


def export(folder: Path, policy: Policy, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, ranks: Ranks) -> None:
    """Write the model in Hugging Face layout, safetensors in `dtype`, with its tokenizer. A collective."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(policy, options=options)
    if ranks.main:
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        weights = {k.removeprefix("model."): v.to(dtype) for k, v in state.items() if isinstance(v, torch.Tensor)}
        if "lm_head.weight" in dict(policy.model.named_parameters()):  # listed once if it is tied to the embedding
            policy.model.config.tie_word_embeddings = False  # whatever it was: with True a reader would drop the head
        else:
            weights.pop("lm_head.weight", None)
        policy.model.save_pretrained(partial, state_dict=weights)
        config = json.loads((partial / "config.json").read_text())
        config["dtype"] = str(dtype).removeprefix("torch.")  # of the file, not of the master weights
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        tokenizer.save_pretrained(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    ranks.barrier()


def write_atomic(path: Path, text: str) -> None:
    """Write a small file so that a reader sees either the old or the new version, never a part."""
    tmp = path.with_name(path.name + ".tmp")
    with tmp.open("w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(tmp, path)
