"""Train by GRPO-LEAD, from problems to a better model. Read this first.

    torchrun --nproc_per_node N -m lead_fast.train [--recipe NAME] [--preset NAME] [--section.key=value ...]

A step: sample G responses to each problem and grade them, turn outcomes and lengths into advantages, take one gradient
of the clipped loss over all packs and ranks, and hand the new weights back to the engine.
"""

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from .checks import check, chosen_engine
from .cli import RECIPES, dump, load_config, names, take_dry_run
from .config import Config
from .data.prompts import load_test, load_train
from .evaluate import evaluate
from .learner import checkpoint
from .learner.advantage import advantages
from .learner.learner import Learner
from .learner.model import load_tokenizer
from .machine import fit_engine, look_at_machine, pick_recipe
from .release import release
from .report import write_report
from .reward.verifier import Verifier
from .rollout.engine import EngineFailure
from .rollout.engines import make_engine
from .rollout.sampler import Sampler
from .rollout.sync import canary, publish
from .runtime.journal import Journal
from .runtime.ranks import Ranks, complaint, start, stop
from .runtime.signals import any_rank_caught, say_stopped, stop_on_sigterm


def train(c: Config, ranks: Ranks, folder: Path) -> None:
    """Train as `c` says; everything that comes out is in `folder`."""
    asked_to_stop = stop_on_sigterm()
    tokenizer = load_tokenizer(c.model)  # what a user can get wrong is looked at before a model is loaded
    problems, prompts = load_train(c, tokenizer)
    test, test_prompts = load_test(c, tokenizer) if c.evaluate.every else ([], [])
    journal = Journal(folder, c, ranks)
    learner = Learner(c, ranks, journal)
    c = learner.c  # with the measured size of a pack
    engine = make_engine(c, tokenizer, ranks)
    state = learner.resume(folder) if c.resume else {}
    first = state.get("step", 0)
    publish(learner.policy, engine, first, c, ranks)
    canary(learner.policy, engine, prompts[0], c, ranks)
    journal.begin(first, state.get("elapsed_s", 0.0), state.get("updates_skipped", 0))
    with Verifier(timeout_s=c.reward.verifier_timeout_s) as verifier, contextlib.closing(journal):
        sampler = Sampler(engine, verifier, problems, prompts, c, ranks, journal, first, state)
        run = Run(folder, learner, sampler, journal, first)

        def held_out(step: int) -> None:
            progress = partial(journal.progress, "evaluate", step)
            with journal.phase("evaluate"), run.saved_on_failure(f"In the evaluation after step {step}", step):
                record, batch = evaluate(engine, test, test_prompts, verifier, c, ranks, progress)
            journal.evaluation(step, record, batch)

        if c.evaluate.every and first == 0:
            held_out(0)
        for step in range(first, c.steps):
            with run.saved_on_failure(f"In step {step + 1}", step):
                batch = sampler.collect(step)  # ask, generate, grade, gather; replace dropped groups
            with journal.phase("advantage"):
                credit = advantages(batch.scores, batch.lengths, c, ranks.device)  # L, E, AD
            update = learner.step(batch, credit, step)  # pack, loss over global denominators, AdamW
            with journal.phase("sync"):
                synced = publish(learner.policy, engine, step + 1, c, ranks)  # compared on both sides
            done = step + 1
            if c.evaluate.every and (done % c.evaluate.every == 0 or done == c.steps):
                held_out(done)
            journal.step(done, batch, credit, update, synced)
            leaving = any_rank_caught(asked_to_stop, ranks)
            due = c.checkpoint_every and done % c.checkpoint_every == 0
            saved = bool(leaving or due) and run.save(done)  # its seconds are told with the next step
            if leaving:
                return say_stopped(folder, done, saved, ranks)
        journal.progress("export", c.steps, 0, 1)
        learner.export(folder / "final", tokenizer)
    if ranks.main:
        release(folder)
        print(f"Model: {folder / 'final'}   Report: {write_report(folder)}", flush=True)


@dataclasses.dataclass
class Run:
    """What a checkpoint holds, and how a run is left before its end."""

    folder: Path
    learner: Learner
    sampler: Sampler
    journal: Journal
    first: int
    """Steps that were finished when this process began."""

    def save(self, step: int) -> bool:
        """Write a checkpoint after `step` steps; returns whether it was written."""
        with self.journal.phase("save"):
            return self.learner.save(self.folder, step, self.journal.state() | self.sampler.state())

    @contextlib.contextmanager
    def saved_on_failure(self, when: str, step: int) -> Iterator[None]:
        """Where an engine dies after `step` steps, save them and end the run in a sentence."""
        try:
            yield
        except EngineFailure as e:
            if step > self.first and self.save(step):
                remedy = f"saved after step {step}; resume with --output={self.folder} --resume."
            else:
                remedy = "start again."
            raise ValueError(f"{when} {e}: {remedy}") from e


def main(args: list[str] | None = None) -> None:
    dry, args = take_dry_run(args)
    default, why = pick_recipe()
    c = load_config(args, default_recipe=default, about=__doc__)
    named = any(a.split("=")[0] in ("--recipe", "--config") for a in args)
    ranks = start(c.parallel)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world))
    c, fitted = fit_engine(c, args, ranks.world, here, ranks.device.type)
    if ranks.main:
        reason = "as asked" if named else f"{why}; name another with --recipe ({', '.join(names(RECIPES))})"
        for sentence in (reason, *fitted):
            print(f"Recipe {c.recipe}: {sentence}.", flush=True)
    check(c, ranks.world, device_type=ranks.device.type)
    shape = look_at_machine(c.model, ranks, engine=chosen_engine(c, ranks.device.type))
    if dry:
        if ranks.main:
            print(dump(c))
        return stop()
    stamp = ranks.gather_objects(time.strftime("%Y%m%d-%H%M%S"))[0]
    folder = Path(c.output or f"runs/{Path(c.recipe).stem}-{stamp}")
    lock = checkpoint.claim(folder, c.resume) if ranks.main else None
    if lock:
        checkpoint.check_room(folder, shape, c.checkpoint_every)
        checkpoint.write_atomic(folder / "config.toml", dump(dataclasses.replace(c, resume=False)))
    train(c, ranks, folder)
    stop()
    if lock:
        lock.close()


if __name__ == "__main__":
    try:
        main()
    except ValueError as e:
        sys.exit(complaint(e))
