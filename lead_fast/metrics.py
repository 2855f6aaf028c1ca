"""Every step's numbers: to the console in short, to metrics.jsonl in full, to TensorBoard, and to W&B if asked.

RUN_DIR/metrics.jsonl   one JSON object a line; `kind` is train or eval, `step` counts finished steps; NaN is null
RUN_DIR/answers.jsonl   a sample of answers with their scores
RUN_DIR/tensorboard/    the same numbers as scalars, train/* and eval/*
"""

import contextlib
import importlib
import json
import math
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

PROGRESS_EVERY_S = 30.0  # between progress lines where they cannot be rewritten in place
MOST_LEVELS = 20  # difficulties that TensorBoard gets one by one; metrics.jsonl always has all


class PhaseTimer:
    """Seconds spent in each phase of a step: `with timer("rollout"): ...`, read as `timer.seconds["rollout"]`.

    A phase entered twice adds up. On CUDA a phase ends when its kernels have. `entered` is told of every phase.
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
    """Writes a run's records. Only the main rank should be enabled; elsewhere every call does nothing.

    Args:
        run_dir: folder of the run, made if missing.
        total_steps: steps of the whole run, for the console's step count and time left.
        tensorboard: write scalars under run_dir/tensorboard.
        wandb_project: project in Weights & Biases, or None for none.
        enabled: False on all ranks but the first.
    Raises:
        ValueError: wandb_project is given and the wandb package is not installed.
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
        self._tensorboard: Any = (
            None  # SummaryWriter, opened at the first record: by then truncate_after has been called
        )
        self._want_tensorboard = tensorboard and enabled
        self._wandb: Any = None
        self._console = _Console(total_steps)
        self._waiting: dict[str, list[dict[str, Any]]] = {}  # records that a full disk did not take
        if enabled:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            if wandb_project:
                self._wandb = _start_wandb(wandb_project, self.run_dir)

    def truncate_after(self, step: int) -> None:
        """Drop the records after `step`, the step that a resumed run goes on from, and a half-written last line."""
        if not self.enabled:
            return
        self._first_step, self._began = step, time.monotonic()
        for name in ("metrics.jsonl", "answers.jsonl", "solved.jsonl"):
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
        """A training step's record; `step` counts it in, so that the first is 1."""
        if self.enabled:
            record = self._write("train", step, record)
            self._console.line(train_line(record, self.total_steps, self._left_s(step)))

    def eval(self, step: int, record: dict[str, Any]) -> None:
        """An evaluation's record, taken after `step` steps; 0 is before the first."""
        if self.enabled:
            record = self._write("eval", step, record)
            self._console.line(eval_line(record, self.total_steps, self._first_eval))
            self._first_eval = self._first_eval or record
            if step == self._first_step:  # time left is reckoned from the first training step on
                self._began = time.monotonic()

    def answers(self, step: int, rows: list[dict[str, Any]]) -> None:
        """A sample of answers with their scores, appended to answers.jsonl."""
        if self.enabled:
            self._keep("answers.jsonl", [plain({"step": step} | row) for row in rows])

    def solved(self, step: int, rows: list[dict[str, Any]]) -> None:
        """How often each problem of the step was solved, appended to solved.jsonl."""
        if self.enabled:
            self._keep("solved.jsonl", [plain({"step": step} | row) for row in rows])

    def progress(self, phase: str, step: int, done: int, total: int) -> None:
        """Where the current step's `phase` is: `done` of `total`. Rewritten in place on a terminal, else rare."""
        if self.enabled:
            self._console.progress(phase, step, done, total, self._left_s(step - 1))

    def close(self) -> None:
        """End the progress line and flush what is buffered."""
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
        """A console line that stays."""
        if self.enabled:
            self._console.line(f"Warning: {text}")

    def _keep(self, name: str, records: list[dict[str, Any]]) -> None:
        """Append to a file of the run; what cannot be written (a full disk) waits for the next time."""
        waiting = self._waiting.setdefault(name, [])
        waiting += records
        try:
            _append(self.run_dir / name, waiting)
            waiting.clear()
        except OSError as e:
            self.warn(f"{len(waiting)} records of {name} cannot be written yet ({e}): the run goes on.")

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
            except OSError as e:  # its writer does not recover from that: a new one opens a new file
                self._console.line(f"Warning: tensorboard of step {step} was not written ({e}): the run goes on.")
                self._tensorboard = None
        if self._wandb:
            self._wandb.log(scalars | {"step": step})
        return record


def each_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Records of a JSONL file, one after the other; a half-written last line, of a run that was killed, is left out.

    Raises:
        ValueError: any other line is no JSON.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    record = json.loads(line)
                except ValueError as e:  # JSON's or UTF-8's
                    if not line.endswith(b"\n"):
                        break
                    raise ValueError(f"{path}, line {number} is not JSON: remove that line.") from e
                yield record


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All of `each_jsonl`."""
    return list(each_jsonl(path))


def train_line(record: dict[str, Any], total_steps: int, left_s: float | None) -> str:
    """One aligned console line of a training step; `-` stands for a number that does not exist."""
    r = record
    width = len(str(total_steps))
    seconds = sum(v for v in r.get("seconds", {}).values() if v is not None)
    return "  ".join(
        [
            f"step {r['step']:>{width}}/{total_steps}",
            f"reward {_number(r.get('reward_mean'), '6.3f')}",
            f"correct {_number(r.get('accuracy'), '5.1f', 100)}%",
            f"length {_number(r.get('length_correct'), '5.0f')}",
            f"entropy {_number(r.get('entropy'), '5.3f')}",
            f"grad {_number(r.get('grad_norm'), '6.3f')}",
            f"{_number(r.get('tokens_per_s'), '6.0f')} tok/s",
            f"{seconds:5.1f} s",
            f"left {clock(left_s):>5}",
        ]
    )


def eval_line(record: dict[str, Any], total_steps: int, first: dict[str, Any] | None) -> str:
    """One console line of an evaluation, with the change since the run's first one."""
    r = record
    low, high = r.get("pass_at_1_ci") or (None, None)
    correct, wrong = (_number(r.get(key), ".0f") for key in ("length_correct", "length_wrong"))
    gain = cut = ""
    if first and None not in (first.get("pass_at_1"), r.get("pass_at_1")):
        gain = f", {100 * (r['pass_at_1'] - first['pass_at_1']):+.1f} since step {first['step']}"
    if first and first.get("length_correct") and r.get("length_correct"):
        cut = f" ({100 * (r['length_correct'] / first['length_correct'] - 1):+.0f}%)"
    return "  ".join(
        [
            f"eval {r['step']:>{len(str(total_steps))}}/{total_steps}",
            f"pass@1 {_number(r.get('pass_at_1'), '.1f', 100)}%"
            f" ({_number(low, '.1f', 100)} to {_number(high, '.1f', 100)}){gain}",
            f"length {correct} correct{cut}, {wrong} wrong",
            f"truncated {_number(r.get('truncated_share'), '.1f', 100)}%",
            f"{r.get('problems', '-')} x {r.get('samples', '-')}",
        ]
    )


class _Console:
    """Lines that stay, and one progress line that is rewritten in place where stdout is a terminal."""

    def __init__(self, total_steps: int) -> None:
        self.total_steps = total_steps
        self._tty = sys.stdout.isatty()
        self._shown = False  # a progress line stands in the terminal's last row
        self._last_s = time.monotonic()
        self._phase: tuple[str, int] | None = None
        self._phase_began = self._last_s

    def line(self, text: str) -> None:
        self.clear()
        print(text, flush=True)
        self._last_s = time.monotonic()

    def progress(self, phase: str, step: int, done: int, total: int, run_left_s: float | None) -> None:
        now = time.monotonic()
        if self._phase != (phase, step):
            self._phase, self._phase_began = (phase, step), now
        text = f"step {step}/{self.total_steps}  {phase} {done}/{total}"
        if 0 < done <= total:
            text += f"  {clock((now - self._phase_began) / done * (total - done))} left"
        text += f"  run {clock(run_left_s)} left"
        if self._tty:
            print(f"\r{text[: shutil.get_terminal_size().columns - 1]}\033[K", end="", flush=True)
            self._shown = True
        elif now - self._last_s >= PROGRESS_EVERY_S:
            self.line(text)

    def clear(self) -> None:
        if self._shown:
            print("\r\033[K", end="", flush=True)
        self._shown = False


def _wait_for_cuda() -> None:
    import torch  # here, so that the report does not wait for it

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _append(path: Path, records: list[dict[str, Any]]) -> None:
    # A lone surrogate in a problem's text has no UTF-8; backslashreplace writes it as the escape that JSON has for it.
    text = "".join(json.dumps(r, ensure_ascii=False, allow_nan=False) + "\n" for r in records)
    data = text.encode("utf-8", errors="backslashreplace")
    with open(path, "ab", buffering=0) as f:
        began = f.tell()
        try:
            while data:
                data = data[f.write(data) :]
        except OSError:  # a full disk: half a line would spoil the file
            f.truncate(began)
            raise


def plain(value: Any) -> Any:
    """The value in JSON's types: arrays and tensors become lists or numbers, NaN and infinities None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _scalars(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Numbers of a nested record with their path, such as ("seconds/rollout", 1.2)."""
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
            f"wandb is {project!r} but the wandb package is not installed: pip install wandb, or leave --wandb out."
        ) from e
    name = run_dir / "wandb_id"  # kept, so that a resumed run goes on in the same place
    if not name.exists():
        name.write_text(uuid.uuid4().hex[:12])
    run = wandb.init(project=project, name=run_dir.name, id=name.read_text(), resume="allow", dir=str(run_dir))
    run.define_metric("*", step_metric="step")
    return run


def _number(value: float | None, spec: str, scale: float = 1.0) -> str:
    """The number formatted, or a dash as wide."""
    if value is None:
        return "-".rjust(int(spec.split(".")[0] or 1))
    return format(value * scale, spec)


def clock(seconds: float | None) -> str:
    """Seconds as 4:05 (minutes) or 2:03:04 (hours)."""
    if seconds is None:
        return "-:--"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
