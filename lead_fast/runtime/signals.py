"""SIGTERM and Ctrl-C (SIGINT): finish and save the step, then exit with 0; a second Ctrl-C exits at once.

torchrun forwards either signal to its ranks, and kills those that have not ended within 30 s (--shutdown-timeout, in
versions that have it); a second Ctrl-C reaches them as SIGTERM. Therefore after Ctrl-C any second signal ends a rank at
once. After SIGTERM a second SIGTERM is ignored, because schedulers often send two, and only Ctrl-C ends the rank.
"""

import os
import signal
import threading
from pathlib import Path

import torch

from .ranks import Ranks, at_stop

ASKING = (signal.SIGINT, signal.SIGTERM)


def stop_on_signals(ranks: Ranks, unit: str = "step") -> list[int]:
    """Return a list that stays empty until a signal asks this process to stop; the loop reads it after every unit.

    `ranks.stop` restores the previous handlers. A separate thread notices the signal, even while the main thread waits
    inside a library.

    Args:
        ranks: of this job; the first one prints that the job was asked to stop.
        unit: the unit of work that is finished first, for that sentence.
    """
    caught: list[int] = []
    read, write = os.pipe()
    os.set_blocking(write, False)
    before = {s: signal.signal(s, lambda number, frame: None) for s in ASKING}  # every signal is written to the pipe
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)

    def listen() -> None:
        while numbers := os.read(read, 64):
            for number in filter(ASKING.__contains__, numbers):
                if caught and signal.SIGINT in (*caught, number):
                    os._exit(128 + number)  # the exit code of a process ended by the signal
                if not caught and ranks.main:
                    again = "Ctrl-C again exits at once" if number == signal.SIGINT else "Ctrl-C exits at once"
                    print(f"\nAsked to stop: the {unit} is finished first and saved; {again}.", flush=True)
                caught.append(number)
        os.close(read)

    def restore() -> None:
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(write)
        listener.join(5)  # a thread that still runs when the interpreter ends can abort the process

    listener = threading.Thread(target=listen, name="signals", daemon=True)
    listener.start()
    at_stop.append(restore)
    return caught


def any_rank_caught(caught: list[int], ranks: Ranks) -> bool:
    """Whether a signal reached any rank, so that all exit after the same step. A collective."""
    return ranks.all_max(torch.tensor(float(bool(caught)))).item() > 0


def say_stopped(run: Path, step: int, saved: bool, ranks: Ranks) -> None:
    """Say how to resume a run that stops after `step`. Raises ValueError if that step could not be saved."""
    if not saved:
        raise ValueError(f"Asked to stop after step {step}, but it could not be saved: make room in {run}.")
    if ranks.main:
        print(f"Asked to stop: saved after step {step}; resume with --output={run} --resume.", flush=True)
