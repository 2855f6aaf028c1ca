"""How a command that trains begins and ends: its run directory, the lock on it, one sentence for a user's mistake."""

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .cli import dump
from .config import Config, SftConfig
from .learner import checkpoint
from .runtime.ranks import Ranks, complaint, stop


def in_run_directory(
    c: Config | SftConfig, name: str, shape: Any, ranks: Ranks, dry: bool, work: Callable[[Path], None]
) -> None:
    """Do a command's work in its run directory, which no other run uses meanwhile, and leave the job.

    Args:
        c: output, resume, recipe and checkpoint_every are used; it is written down as config.toml.
        name: goes before the recipe in the name of a directory that is not given.
        shape: the model's configuration, for the room that checkpoints take.
        ranks: of this job.
        dry: print the configuration and do nothing.
        work: called on every rank with the directory.
    """
    if dry:
        if ranks.main:
            print(dump(c))
        return stop()
    stamp = ranks.gather_objects(time.strftime("%Y%m%d-%H%M%S"))[0]
    folder = Path(c.output or f"runs/{name}{Path(c.recipe).stem}-{stamp}")
    ranks.check_same(dump(c))
    lock = checkpoint.claim(folder, c.resume) if ranks.main else None
    checkpoint.check_shared(folder, ranks)
    if lock:
        checkpoint.check_room(folder, shape, c.checkpoint_every)
        checkpoint.write_atomic(folder / "config.toml", dump(dataclasses.replace(c, resume=False)))
    work(folder)
    stop()
    if lock:
        lock.close()


def run_command(main: Callable[[], None]) -> None:
    """Call a command's main(); a user's mistake and Ctrl-C end it without a traceback."""
    try:
        main()
    except ValueError as e:
        sys.exit(complaint(e))
    except KeyboardInterrupt:  # before there was anything to finish
        sys.exit(130)
