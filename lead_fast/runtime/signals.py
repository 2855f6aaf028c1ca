"""SIGTERM to a run: the step is finished and saved, and the process ends with 0."""

import signal
from pathlib import Path

import torch

from .ranks import Ranks


def stop_on_sigterm() -> list[int]:
    """A list that is empty until SIGTERM arrives; the loop looks at it after every step."""
    caught: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: caught.append(number))
    return caught


def any_rank_caught(caught: list[int], ranks: Ranks) -> bool:
    """Whether SIGTERM reached any rank, so that all leave after the same step. A collective."""
    return ranks.all_max(torch.tensor(float(bool(caught)))).item() > 0


def say_stopped(run: Path, step: int, saved: bool, ranks: Ranks) -> None:
    """Say how to resume a run that stops after `step`. Raises ValueError where that step could not be saved."""
    if not saved:
        raise ValueError(f"Asked to stop after step {step}, but it could not be saved: make room in {run}.")
    if ranks.main:
        print(f"Asked to stop: saved after step {step}; resume with --output={run} --resume.", flush=True)
