"""SIGTERM and Ctrl-C (SIGINT): the step is finished and saved, and the process ends with 0; a second Ctrl-C leaves now.

torchrun hands either signal on to its ranks, and kills them where they have not ended 30 s later (--shutdown-timeout,
where it has it); a second Ctrl-C reaches them as SIGTERM. So after Ctrl-C any second signal ends a rank at once. After
SIGTERM a second SIGTERM is ignored, for schedulers often send two, and only Ctrl-C ends it.
"""

import os
import signal
import threading
from pathlib import Path

import torch

from .ranks import Ranks, at_stop

ASKING = (signal.SIGINT, signal.SIGTERM)


def stop_on_signals(ranks: Ranks, unit: str = "step") -> list[int]:
    """A list that is empty until a signal asks this process to stop; the loop looks at it after every unit of work.

    The handlers of before come back at `ranks.stop`. What is asked is noticed by a thread of its own, also while the
    main thread waits inside a library.

    Args:
        ranks: of this job; the first says that it was asked.
        unit: what is finished first, for that sentence.
    """
    caught: list[int] = []
    read, write = os.pipe()
    os.set_blocking(write, False)
    before = {s: signal.signal(s, lambda number, frame: None) for s in ASKING}  # the pipe is told of every signal
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)

    def listen() -> None:
        while numbers := os.read(read, 64):
            for number in filter(ASKING.__contains__, numbers):
                if caught and signal.SIGINT in (*caught, number):
                    os._exit(128 + number)  # as the signal itself would end it
                if not caught and ranks.main:
                    again = "Ctrl-C again leaves at once" if number == signal.SIGINT else "Ctrl-C leaves at once"
                    print(f"\nAsked to stop: the {unit} is finished first and saved; {again}.", flush=True)
                caught.append(number)
        os.close(read)

    def restore() -> None:
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(write)
        listener.join(5)  # a thread that still runs while the interpreter ends can abort the process

    listener = threading.Thread(target=listen, name="signals", daemon=True)
    listener.start()
    at_stop.append(restore)
    return caught


def any_rank_caught(caught: list[int], ranks: Ranks) -> bool:
    """Whether a signal reached any rank, so that all leave after the same step. A collective."""
    return ranks.all_max(torch.tensor(float(bool(caught)))).item() > 0


def say_stopped(run: Path, step: int, saved: bool, ranks: Ranks) -> None:
    """Say how to resume a run that stops after `step`. Raises ValueError where that step could not be saved."""
    if not saved:
        raise ValueError(f"Asked to stop after step {step}, but it could not be saved: make room in {run}.")
    if ranks.main:
        print(f"Asked to stop: saved after step {step}; resume with --output={run} --resume.", flush=True)
