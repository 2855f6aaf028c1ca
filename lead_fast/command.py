"""Start and end of a command that trains: its run directory and lock, and one sentence for a user's mistake."""

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
    """Run a command's work in a run directory that no other run uses meanwhile, then leave the job.

    Args:
        c: uses output, resume, recipe and checkpoint_every; saved as config.toml.
        name: goes before the recipe in the directory's name if no output is given.
        shape: the model's configuration, from which the size of checkpoints follows.
        ranks: the ranks of this job.
        dry: only print the configuration.
        work: called with the directory on every rank.
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
    """Call a command's main(); end without a traceback on a user's mistake or Ctrl-C."""
    try:
        main()
    except ValueError as e:
        sys.exit(complaint(e))
    except KeyboardInterrupt:  # before there is anything to finish
        sys.exit(130)
