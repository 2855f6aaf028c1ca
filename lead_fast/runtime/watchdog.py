"""End a job that makes no progress, and print where each rank stopped.

    dog = Watchdog(1500, ranks); dog.beat("rollout", step=3); ...; dog.close()

Every rank has a thread that checks the time of its last beat. The first thread to find it too long ago writes this to
the job's store; every rank's thread then prints its own phase and Python stacks, and the process ends with `EXIT`. If
Python itself is blocked (by code that holds the interpreter's lock), faulthandler's own thread prints the stacks and
ends the process a little later.

A rank that waits for others (`Ranks.waiting`) has nothing to beat for: the ranks that work beat for it, through a
counter in the store. So a rank may wait for a slow one as long as that one makes progress, and the job ends when a rank
that is not waiting makes none, or when all ranks wait.
"""

import atexit
import faulthandler
import os
import sys
import threading
import time
from typing import Any

import torch.distributed as dist

from .ranks import Ranks

EXIT = 75  # temporary failure: run again with --resume
GRACE_S = 10.0  # time for the other ranks to print their stacks
STILL, PRINTED, BEATS = "watchdog/still", "watchdog/printed", "watchdog/beats"


class Watchdog:
    """Watch one rank.

    Args:
        limit_s: seconds without a beat after which the job is ended; 0: never.
        ranks: of this job; its process group must exist.
    """

    def __init__(self, limit_s: float, ranks: Ranks):
        self.limit_s, self.ranks = limit_s, ranks
        self.phase, self.step, self.last_s = "start", 0, time.monotonic()
        self._armed_s = 0.0
        self._counted_s, self._beats, self._others_s = 0.0, 0, self.last_s  # last values in the store
        self._closed = threading.Event()
        if limit_s > 0:
            store: Any = dist.distributed_c10d._get_default_store()
            self._store = store.clone()  # a separate connection, which the thread does not share with the collectives
            self.beat("start", 0)
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
            atexit.register(self.close)

    def beat(self, phase: str | None = None, step: int | None = None) -> None:
        """Record progress; `phase` and `step` keep their values if not given. Cheap."""
        self.phase, self.step = phase or self.phase, self.step if step is None else step
        self.last_s = time.monotonic()
        if self.limit_s > 0 and self.last_s - self._armed_s > min(1.0, self.limit_s / 10):
            self._armed_s = self.last_s
            self._arm()

    def close(self) -> None:
        """Stop watching; also called when the process ends by itself. Waits for the thread: an interpreter that ends
        while a thread is inside the store's C++ code aborts the process."""
        self._closed.set()
        if self.limit_s > 0:
            faulthandler.cancel_dump_traceback_later()
            self._thread.join(GRACE_S)

    def _watch(self) -> None:
        while not self._closed.wait(min(5.0, self.limit_s / 5)):
            idle_s = time.monotonic() - self.last_s
            try:
                still = self._store.check([STILL])
                self._count_beats()
                if still or self._stands_still(idle_s):
                    if not still:
                        self._store.set(STILL, str(self.ranks.rank))
                    self._bark(idle_s)
                    self._wait_for_others()
                    os._exit(EXIT)
            except dist.DistError:  # the store is gone: the job is ending by itself, or this rank is alone
                if idle_s > self.limit_s:
                    self._bark(idle_s)
                    os._exit(EXIT)

    def _count_beats(self) -> None:
        """Add this rank's beats to the job's counter, and note when other ranks have added theirs."""
        own = int(self.last_s > self._counted_s)
        self._counted_s = self.last_s
        beats = self._store.add(BEATS, own)
        if beats > self._beats + own:
            self._others_s = time.monotonic()
        self._beats = beats

    def _stands_still(self, idle_s: float) -> bool:
        if idle_s <= self.limit_s:
            return False
        if not self.ranks.waits or time.monotonic() - self._others_s > self.limit_s:
            return True
        self._arm()  # other ranks make progress
        return False

    def _arm(self) -> None:
        faulthandler.dump_traceback_later(self.limit_s + min(self.limit_s, 30.0), exit=True)

    def _bark(self, idle_s: float) -> None:
        where = f"phase {self.phase}, step {self.step}"
        where += f", waiting in {self.ranks.waits[-1]}" if self.ranks.waits else ""
        sentence = f"rank {self.ranks.rank} made no progress for {idle_s:.0f} s: {where}"
        print(f"Watchdog ({self.limit_s:g} s): {sentence}. Its stacks:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        sys.stderr.flush()

    def _wait_for_others(self) -> None:
        """Wait until the other ranks have printed, so that the launcher kills none before it has."""
        self._store.add(PRINTED, 1)
        until = time.monotonic() + GRACE_S
        while time.monotonic() < until and self._store.add(PRINTED, 0) < self.ranks.world:
            time.sleep(0.1)
