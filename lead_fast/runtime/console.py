"""Console lines of a run: one per step and evaluation, and progress between them."""

import shutil
import sys
import time
from typing import Any

PROGRESS_EVERY_S = 30.0  # between progress lines if they cannot be rewritten in place
SFT_EVERY_S = 5.0  # between lines of SFT, whose steps may take fractions of a second


def train_line(record: dict[str, Any], total_steps: int, left_s: float | None) -> str:
    """Format a training step as one aligned console line; `-` stands for a missing number."""
    r = record
    width = len(str(total_steps))
    seconds = sum(v for v in r.get("seconds", {}).values() if v is not None)
    return "  ".join(
        [
            f"step {r['step']:>{width}}/{total_steps}",
            f"reward {_number(r.get('reward_mean'), '6.3f')}",
            *(f"{name} {_number(value, '6.3f')}" for name, value in shown_terms(r).items()),
            f"correct {_number(r.get('accuracy'), '5.1f', 100)}%",
            f"length {_number(r.get('length_correct'), '5.0f')}",
            f"entropy {_number(r.get('entropy'), '5.3f')}",
            f"grad {_number(r.get('grad_norm'), '6.3f')}",
            f"{_number(r.get('tokens_per_s'), '6.0f')} tok/s",
            f"{seconds:5.1f} s",
            f"left {clock(left_s):>5}",
        ]
    )


def shown_terms(record: dict[str, Any], most: int = 4) -> dict[str, float | None]:
    """Mean terms of the user's reward function by the name that a reader sees, with the total as `function`."""
    terms = record.get("reward_terms") or {}
    return {"function" if k == "reward" else k: terms[k] for k in [*terms][:most]}


def eval_line(record: dict[str, Any], total_steps: int, first: dict[str, Any] | None) -> str:
    """Format an evaluation as one console line, with the change since the run's first one."""
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
            *(f"{name} {_number(value, '.3f')}" for name, value in shown_terms(r).items()),
            f"truncated {_number(r.get('truncated_share'), '.1f', 100)}%",
            f"{r.get('problems', '-')} x {r.get('samples', '-')}",
        ]
    )


def sft_line(record: dict[str, Any], total_steps: int, left_s: float | None) -> str:
    """Format an SFT step as one aligned console line, with the held-out loss if it was measured."""
    r = record
    held_out = f"held-out {_number(r['validation_loss'], '6.4f')}" if "validation_loss" in r else ""
    return "  ".join(
        [
            f"sft {r['step']:>{len(str(total_steps))}}/{total_steps}",
            f"loss {_number(r.get('loss'), '6.4f')}",
            *([held_out] if held_out else []),
            f"grad {_number(r.get('grad_norm'), '6.3f')}",
            f"lr {_number(r.get('learning_rate'), '8.2e')}",
            f"{_number(r.get('tokens_per_s'), '6.0f')} tok/s",
            f"left {clock(left_s):>5}",
        ]
    )


class _Console:
    """Permanent lines, and one progress line that is rewritten in place if stdout is a terminal."""

    def __init__(self, total_steps: int) -> None:
        self.total_steps = total_steps
        self._tty = sys.stdout.isatty()
        self._shown = False  # whether the terminal's last row shows a progress line
        self._last_s = time.monotonic()
        self._phase: tuple[str, int] | None = None
        self._phase_began = self._last_s

    def line(self, text: str) -> None:
        self.clear()
        print(text, flush=True)
        self._last_s = time.monotonic()

    def quiet_s(self) -> float:
        """Seconds since the last permanent line."""
        return time.monotonic() - self._last_s

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


def _number(value: float | None, spec: str, scale: float = 1.0) -> str:
    """Format a number, or return a dash of the same width."""
    if value is None:
        return "-".rjust(int(spec.split(".")[0] or 1))
    return format(value * scale, spec)


def clock(seconds: float | None) -> str:
    """Format seconds as 4:05 (minutes) or 2:03:04 (hours)."""
    if seconds is None:
        return "-:--"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
