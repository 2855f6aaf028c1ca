"""Write every step's numbers to the console, metrics.jsonl, TensorBoard, and Weights & Biases if asked.

RUN_DIR/metrics.jsonl   one JSON object per line; `kind` is train, eval or sft, `step` counts finished steps
RUN_DIR/responses.jsonl   a sample of responses with their scores
RUN_DIR/tensorboard/    the same numbers as scalars, train/*, eval/* and sft/*
"""

import contextlib
import importlib
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from .console import SFT_EVERY_S, _Console, eval_line, sft_line, train_line
from .jsonl import _append, plain, read_jsonl

MOST_LEVELS = 20  # maximum difficulties to show one by one in TensorBoard; metrics.jsonl always has all


class PhaseTimer:
    """Seconds spent in each phase of a step: `with timer("rollout"): ...`, read as `timer.seconds["rollout"]`.

    A phase entered twice adds up. On CUDA a phase ends when its kernels have finished. `entered` is called with every
    phase.
    """

    def __init__(self, entered: Callable[[str], object] = lambda phase: None) -> None:
        self.seconds: dict[str, float] = {}
        self.entered = entered

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self.entered(phase)
        began = time.perf_counter()
        try:
            yield
        finally:
            _wait_for_cuda()
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - began

    def reset(self) -> None:
        self.seconds = {}


class Metrics:
    """Write a run's records. Enable it on the main rank only; elsewhere every call does nothing.

    Args:
        run_dir: folder of the run, created if missing.
        total_steps: steps of the whole run, for the console's step count and time left.
        tensorboard: write scalars under run_dir/tensorboard.
        wandb_project: project in Weights & Biases, or None.
        enabled: False on all ranks but the first.
    Raises:
        ValueError: wandb_project is given but the wandb package is not installed.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        total_steps: int,
        tensorboard: bool = True,
        wandb_project: str | None = None,
        enabled: bool = True,
    ) -> None:
        self.run_dir = Path(run_dir)
        self.total_steps = total_steps
        self.enabled = enabled
        self._first_step = 0  # steps finished before this process began
        self._began = time.monotonic()
        self._first_eval: dict[str, Any] | None = None
        self._tensorboard: Any = None  # SummaryWriter, opened at the first record, after truncate_after has been called
        self._want_tensorboard = tensorboard and enabled
        self._wandb: Any = None
        self._console = _Console(total_steps)
        self._waiting: dict[str, list[dict[str, Any]]] = {}  # records that a full disk refused
        if enabled:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            if wandb_project:
                self._wandb = _start_wandb(wandb_project, self.run_dir)

    def truncate_after(self, step: int) -> None:
        """Drop the records after `step`, from which a run is resumed, and a half-written last line."""
        if not self.enabled:
            return
        self._first_step, self._began = step, time.monotonic()
        for name in ("metrics.jsonl", "responses.jsonl", "solved.jsonl"):
            path = self.run_dir / name
            if path.exists():
                kept = [r for r in read_jsonl(path) if r["step"] <= step]
                partial = path.with_suffix(".partial")
                partial.unlink(missing_ok=True)
                _append(partial, kept)
                os.replace(partial, path)
                if name == "metrics.jsonl":
                    self._first_eval = next((r for r in kept if r.get("kind") == "eval"), None)

    def train(self, step: int, record: dict[str, Any]) -> None:
        """Write a training step's record; `step` includes this step, so the first is 1."""
        if self.enabled:
            record = self._write("train", step, record)
            self._console.line(train_line(record, self.total_steps, self._left_s(step)))

    def eval(self, step: int, record: dict[str, Any]) -> None:
        """Write an evaluation's record, taken after `step` steps; 0 is before the first."""
        if self.enabled:
            record = self._write("eval", step, record)
            self._console.line(eval_line(record, self.total_steps, self._first_eval))
            self._first_eval = self._first_eval or record
            if step == self._first_step:  # the time left is estimated from the first training step on
                self._began = time.monotonic()

    def sft(self, step: int, record: dict[str, Any]) -> None:
        """Write an SFT step's record; print it every few seconds and whenever `validation_loss` was measured."""
        if self.enabled:
            record = self._write("sft", step, record)
            if "validation_loss" in record or self._console.quiet_s() >= SFT_EVERY_S:
                self._console.line(sft_line(record, self.total_steps, self._left_s(step)))

    def responses(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Append a sample of responses with their scores to responses.jsonl."""
        if self.enabled:
            self._keep("responses.jsonl", [plain({"step": step} | row) for row in rows])

    def solved(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Append how often each problem of the step was solved to solved.jsonl."""
        if self.enabled:
            self._keep("solved.jsonl", [plain({"step": step} | row) for row in rows])

    def progress(self, phase: str, step: int, done: int, total: int) -> None:
        """Show that the current step's `phase` is at `done` of `total`: in place on a terminal, elsewhere rarely."""
        if self.enabled:
            self._console.progress(phase, step, done, total, self._left_s(step - 1))

    def close(self) -> None:
        """End the progress line and flush buffers."""
        self._console.clear()
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()
        self._tensorboard = self._wandb = None

    def _left_s(self, step: int) -> float | None:
        done = step - self._first_step
        return (time.monotonic() - self._began) / done * (self.total_steps - step) if done > 0 else None

    def warn(self, text: str) -> None:
        """Print a warning on a permanent line."""
        if self.enabled:
            self._console.line(f"Warning: {text}")

    def _keep(self, name: str, records: list[dict[str, Any]]) -> None:
        """Append to a file of the run; records that cannot be written (a full disk) wait for the next call."""
        waiting = self._waiting.setdefault(name, [])
        waiting += records
        try:
            _append(self.run_dir / name, waiting)
            waiting.clear()
        except OSError as e:
            self.warn(f"{len(waiting)} records of {name} cannot be written yet ({e}): the run continues.")

    def _write(self, kind: str, step: int, record: dict[str, Any]) -> dict[str, Any]:
        record = plain({"step": step, "kind": kind} | record)
        self._keep("metrics.jsonl", [record])
        scalars = {f"{kind}/{name}": value for name, value in _scalars(record) if name not in ("step", "kind")}
        if self._want_tensorboard:
            if self._tensorboard is None:
                from torch.utils.tensorboard.writer import SummaryWriter

                purge = self._first_step + 1 if self._first_step else None
                self._tensorboard = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=purge)
            try:
                for name, value in scalars.items():
                    self._tensorboard.add_scalar(name, value, step)
                self._tensorboard.flush()
            except OSError as e:  # the writer does not recover from this: a new one opens a new file
                self._console.line(f"Warning: tensorboard of step {step} was not written ({e}): the run continues.")
                self._tensorboard = None
        if self._wandb:
            self._wandb.log(scalars | {"step": step})
        return record


def _wait_for_cuda() -> None:
    import torch  # here, so that the report does not have to import it

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _scalars(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers of a nested record with their paths, such as ("seconds/rollout", 1.2)."""
    if isinstance(value, (dict, list)):
        items: Iterable[tuple[Any, Any]] = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            if not (key == "by_difficulty" and len(inner) > MOST_LEVELS):
                yield from _scalars(inner, f"{name}/{key}" if name else str(key))
    elif isinstance(value, (int, float)):
        yield name, float(value)


def _start_wandb(project: str, run_dir: Path) -> Any:
    try:
        wandb = importlib.import_module("wandb")
    except ImportError as e:
        raise ValueError(
            f"wandb is {project!r} but the wandb package is not installed: pip install wandb, or omit --wandb."
        ) from e
    name = run_dir / "wandb_id"  # kept so that a resumed run continues the same entry
    if not name.exists():
        name.write_text(uuid.uuid4().hex[:12])
    run = wandb.init(project=project, name=run_dir.name, id=name.read_text(), resume="allow", dir=str(run_dir))
    run.define_metric("*", step_metric="step")
    return run
