"""Run the trainer with injected faults, for test_faults.py and soak.py; everything else is real.

    torchrun ... tests/faults.py '[{"do": "kill", "at": "backward", "step": 3, "rank": 1}]' --steps=6 ...

do: kill (SIGKILL to itself), hang, nan (loss of one pack is NaN), inf (loss of one pack is infinite, its gradient
finite), spike (loss and gradient times 1e4), above0 (a kernel returns log-probs above 0), engine (dies while it
generates). at: a phase of the loop; forward, backward or any for nan, inf, spike and above0; or a stage of a
checkpoint's write, for which the steps do not wait: writing, written, listed, renamed. step: step of the loop, or step
whose checkpoint is written. rank: rank on which it happens. restart: happens only in the life of the job with this
number in torchrun's count (0 is the first).
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

from lead_fast import train
from lead_fast.learner import checkpoint, learner
from lead_fast.rollout.engine import EngineFailure
from lead_fast.rollout.transformers_engine import TransformersEngine
from lead_fast.runtime import journal, watchdog
from lead_fast.runtime.ranks import complaint

FAULTS = json.loads(sys.argv[1])
RANK, LIFE = int(os.environ.get("RANK", 0)), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
step, phase = 0, ""


def here(at: str, *kinds: str, at_step: int | None = None) -> str:
    for f in FAULTS:
        if f["do"] in kinds and f.get("at", at) == at and f["step"] == (step if at_step is None else at_step):
            if f.get("rank", RANK) == RANK and f.get("restart", LIFE) == LIFE:
                return f["do"]
    return ""


def strike(at: str, at_step: int | None = None) -> None:
    if kind := here(at, "kill", "hang", at_step=at_step):
        print(f"fault: {kind} at {at}, step {step if at_step is None else at_step}, rank {RANK}", flush=True)
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        hang()


def hang() -> None:
    while True:
        time.sleep(1)


class Watchdog(watchdog.Watchdog):
    def beat(self, phase: str | None = None, step: int | None = None) -> None:
        super().beat(phase, step)
        globals().update(step=self.step, phase=phase or globals()["phase"])
        if step is None and phase:  # beginning of a phase
            strike(phase)


policy_loss, dcp_save = learner.policy_loss, checkpoint.dcp_save
write_atomic, rename = checkpoint.write_atomic, Path.rename
generate, write = TransformersEngine.generate, checkpoint._HashedStream.write


def faulty_loss(*args):
    strike("forward")
    out = policy_loss(*args)
    kind = here("any", "nan", "inf", "spike", "above0")
    if kind == "above0":
        return out._replace(logprobs=out.logprobs + 1.0)
    factor, plus = {"nan": (torch.nan, 0), "inf": (1, torch.inf), "spike": (1e4, 0), "": (1, 0)}[kind]
    out.loss.register_hook(lambda gradient: strike("backward"))
    return out._replace(loss=out.loss * factor + plus)


def step_of(path) -> int:
    """Return the step to whose checkpoint a path belongs."""
    return next(checkpoint.number(Path(part)) for part in Path(path).parts if part.startswith("step-"))


def faulty_stream(self, data):
    if self.hashes.bytes > 1 << 20:  # in the middle of the tensors
        strike("writing", step_of(self.raw.name))
    return write(self, data)


def faulty_save(*args, **kw):
    dcp_save(*args, **kw)
    strike("written", step_of(kw["storage_writer"].path))


def faulty_generate(*args):
    if here(phase, "engine"):
        raise EngineFailure("RuntimeError: out of patience", {})
    return generate(*args)


def faulty_write(path: Path, text: str) -> None:
    write_atomic(path, text)
    if path.name == "extra.json":
        strike("listed", step_of(path))


def faulty_rename(self: Path, target: Path):
    out = rename(self, target)
    if "step-" in target.name:
        strike("renamed", step_of(target))
    return out


journal.Watchdog, learner.policy_loss = Watchdog, faulty_loss
checkpoint.dcp_save, checkpoint.write_atomic, Path.rename = faulty_save, faulty_write, faulty_rename
TransformersEngine.generate, checkpoint._HashedStream.write = faulty_generate, faulty_stream

if __name__ == "__main__":
    try:
        train.main(sys.argv[2:])
    except ValueError as e:
        sys.exit(complaint(e))
