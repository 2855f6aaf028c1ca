"""Watch for unhealthy numbers: keep batches of skipped updates, report spikes, check every value if asked."""

import json
import math
import statistics
from collections import deque
from pathlib import Path
from typing import Any

import torch

from .jsonl import plain
from .metric_table import SPIKE, WINDOW, metric

FEWEST = 8  # steps needed before anything is called a spike
MOST_KEPT = 5  # batches per run that are kept for inspection


class Health:
    """Report what stands out in a step's record; count skipped updates and keep their batches.

    Args:
        run: the run directory; `run/nonfinite/step-N.json` keeps the batches of skipped updates.
        most_skipped: consecutive skipped steps after which the run stops; 0: never.
        skipped: updates skipped before a resume.
    """

    def __init__(self, run: Path, most_skipped: int, skipped: int = 0):
        self.run, self.most_skipped = run, most_skipped
        self.skipped, self.consecutive = skipped, 0
        self.recent: dict[str, deque[float]] = {}

    def look(self, step: int, record: dict[str, Any]) -> list[str]:
        """Sentences on what is unusual in a training step's record; empty for an ordinary step."""
        alerts = []
        for key in ("loss", "grad_norm"):
            value, recent = record.get(key), self.recent.setdefault(key, deque(maxlen=WINDOW))
            if value is None or not math.isfinite(value):
                continue
            usual = statistics.median(recent) if recent else 0.0
            if len(recent) >= FEWEST and usual > 0 and abs(value) > SPIKE * usual:
                alerts.append(f"step {step}: {key} is {value:.3g}, its median over {len(recent)} steps is {usual:.3g}.")
            if value != 0:  # a batch without a gradient says nothing about what is usual
                recent.append(abs(value))
        drift, most = record.get("logprob_diff_mean"), metric("logprob_diff_mean").high
        if drift is not None and most is not None and math.isfinite(drift) and drift > most:
            alerts.append(
                f"step {step}: log-probs of trainer and engine differ by {drift:.3g} nats on average, "
                f"{record.get('logprob_diff_max', math.nan):.3g} at most: the ratio has exploded."
            )
        if failed := record.get("reward_function_failed"):
            alerts.append(f"step {step}: the reward function failed for {failed} responses.")
        return alerts

    def count(self, step: int, updates_skipped: int, kept: Path | None) -> None:
        """Count a step's skipped updates.

        Raises:
            ValueError: `most_skipped` consecutive steps had one; the weights are those from before the first of them.
        """
        self.skipped += updates_skipped
        self.consecutive = self.consecutive + 1 if updates_skipped else 0
        if self.most_skipped and self.consecutive >= self.most_skipped:
            raise ValueError(
                f"Loss or gradient was not finite in {self.consecutive} consecutive steps, the last of them step {step}"
                + (f" (its batch is in {kept})" if kept else "")
                + ": lower optim.lr, check the data, or raise optim.max_skipped."
            )

    def keep(self, step: int, batch: dict[str, Any]) -> Path | None:
        """Save the batch of a skipped update, for the first few only. Returns its file, None if it was not saved."""
        folder = self.run / "nonfinite"
        path = folder / f"step-{step}.json"
        try:
            folder.mkdir(exist_ok=True)
            if not path.exists() and len([*folder.iterdir()]) >= MOST_KEPT:
                return None
            path.write_text(json.dumps(plain(batch), allow_nan=False), encoding="utf-8")
        except OSError:  # a full disk does not end the run
            return None
        return path


def skipped_update(step: int, kept: Path | None) -> str:
    """The warning about a skipped update, with the file that holds its batch."""
    where = f"; its batch is in {kept}" if kept else ""
    return f"step {step}: loss or gradient not finite, update skipped{where}."


def must_be_finite(what: str, *tensors: torch.Tensor | None, most: float = math.inf) -> None:
    """Check values in debug mode.

    Args:
        what: named in the error.
        tensors: float tensors of any shape; None is ignored.
        most: upper bound on every value; for log-probs 0, with room for rounding.
    Raises:
        FloatingPointError: a value is not finite, or is above `most`.
    """
    for x in tensors:
        if x is None or not x.numel():
            continue
        bad = ~torch.isfinite(x) | (x > most)
        if bad.any():
            first = x[bad].flatten()[0].item()
            raise FloatingPointError(f"{what}: {int(bad.sum())} of {x.numel()} values are wrong, the first: {first}.")
