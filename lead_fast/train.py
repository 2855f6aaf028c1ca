"""Train a model by GRPO-LEAD, from problems to new weights. Read this first.

    torchrun --nproc_per_node N -m lead_fast.train [--recipe NAME] [--preset NAME] [--section.key=value ...]

A step: sample G responses to each problem and grade them, turn outcomes and lengths into advantages, take one gradient
of the clipped loss over all packs and ranks, and hand the new weights back to the engine.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from .checks import check, chosen_engine, fit_quantized
from .cli import RECIPES, load_config, names, take_dry_run
from .command import in_run_directory, run_command
from .config import Config
from .data.prompts import load_test, load_train
from .evaluate import evaluate
from .learner.advantage import advantages
from .learner.learner import Learner
from .learner.loss import mismatch
from .learner.model import load_tokenizer
from .learner.model_check import check_model
from .machine import fit_engine, look_at_machine, pick_recipe
from .records import Problem
from .release import release
from .report import write_report
from .reward.function import RewardFunction
from .reward.verifier import Verifier
from .rollout.engine import EngineFailure
from .rollout.engines import check_engine, make_engine
from .rollout.sampler import Sampler
from .rollout.sync import canary, publish
from .runtime.journal import Journal
from .runtime.ranks import Ranks, start
from .runtime.signals import any_rank_caught, say_stopped, stop_on_signals


def train(c: Config, ranks: Ranks, folder: Path) -> None:
    """Train as `c` says; all output goes to `folder`."""
    asked_to_stop = stop_on_signals(ranks)
    tokenizer = load_tokenizer(c.model)  # users' mistakes are found before a model is loaded
    keep = bool(c.reward.function)  # the data's columns are passed to the function
    graded = not (keep and c.reward.mode == "replace")  # if replaced, references need not be verifiable
    problems, prompts = load_train(c, tokenizer, ranks, keep_columns=keep, graded=graded)
    test, test_prompts = load_test(c, tokenizer, ranks, keep_columns=keep) if c.evaluate.every else ([], [])
    function = own_function(c, problems[0], ranks)
    journal = Journal(folder, c, ranks, tokenizer)
    learner = Learner(c, ranks, journal)
    c = learner.c  # with the measured pack size
    state = learner.resume() if c.resume else {}  # before an engine shares the GPU
    engine = make_engine(c, tokenizer, ranks)
    first = state.get("step", 0)
    publish(learner.policy, engine, first, c, ranks)
    canary(learner.policy, engine, prompts[0], c, ranks)
    journal.begin(first, state.get("elapsed_s", 0.0), state.get("updates_skipped", 0))
    verifier = Verifier(timeout_s=c.reward.verifier_timeout_s)
    with verifier, contextlib.closing(journal), function or contextlib.nullcontext():
        sampler = Sampler(engine, verifier, problems, prompts, c, ranks, journal, first, state, function)
        run = Run(folder, learner, sampler, journal, first)

        def held_out(step: int) -> None:
            progress = partial(journal.progress, "evaluate", step)
            with journal.phase("evaluate"), run.saved_on_failure(f"In the evaluation after step {step}", step):
                record, batch = evaluate(engine, test, test_prompts, verifier, c, ranks, progress, function=function)
            journal.evaluation(step, record, batch)
            learner.saw(record)

        if c.evaluate.every and first == 0:
            held_out(0)
        for step in range(first, c.steps):
            with run.saved_on_failure(f"In step {step + 1}", step):
                batch = sampler.collect(step)  # ask, generate, grade, gather; replace dropped groups
            with journal.phase("advantage"):
                credit = advantages(batch.scores, batch.lengths, learner.c, ranks.device)  # L, E, AD
            update = learner.step(batch, credit, step)  # pack, loss over global denominators, AdamW
            with journal.phase("sync"):
                synced = publish(learner.policy, engine, step + 1, c, ranks)  # compared on both sides
            done = step + 1
            if c.evaluate.every and (done % c.evaluate.every == 0 or done == c.steps):
                held_out(done)
            journal.step(done, batch, credit, update, synced)
            run.leave_if(mismatch(update["kl_behavior"], c), done)
            leaving = any_rank_caught(asked_to_stop, ranks)
            due = c.checkpoint_every and done % c.checkpoint_every == 0
            saved = bool(leaving or due) and run.save(done, wait=leaving)  # timed in the next step's record
            if leaving:
                return say_stopped(folder, done, saved, ranks)
        journal.progress("export", c.steps, 0, 1)
        learner.export(folder / "final", tokenizer)
    if ranks.main:
        release(folder)
        print(f"Model: {folder / 'final'}   Report: {write_report(folder)}", flush=True)


def own_function(c: Config, sample: Problem, ranks: Ranks) -> RewardFunction | None:
    """Load the user's reward function, if there is one, and call it once with a correct response to `sample`."""
    say = partial(ranks.say_once, "reward.function")
    return RewardFunction(c.reward, sample, say) if c.reward.function else None


@dataclasses.dataclass
class Run:
    """What a checkpoint holds, and the ways in which a run ends early."""

    folder: Path
    learner: Learner
    sampler: Sampler
    journal: Journal
    first: int
    """Number of steps finished when this process began."""

    def save(self, step: int, *, wait: bool = True) -> bool:
        """Save a checkpoint after `step` steps; returns whether it was written, or without `wait` whether it began."""
        with self.journal.phase("save"):
            state = self.journal.state() | self.sampler.state() | self.learner.state()
            return self.learner.save(step, state, wait=wait)

    def leave_if(self, fault: str, step: int) -> None:
        """If there is a fault after `step` steps, save a checkpoint and end the run with one sentence."""
        if fault:
            saved = self.save(step)
            raise ValueError(f"After step {step} {fault}{f' --output={self.folder} --resume' if saved else ''}.")

    @contextlib.contextmanager
    def saved_on_failure(self, when: str, step: int) -> Iterator[None]:
        """If an engine dies after `step` steps, save a checkpoint and end the run with one sentence."""
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
    c, weighed = fit_quantized(c, args)
    if ranks.main:
        reason = "as asked" if named else f"{why}; name another with --recipe ({', '.join(names(RECIPES))})"
        for sentence in (reason, *fitted, *weighed):
            print(f"Recipe {c.recipe}: {sentence}.", flush=True)
    check(c, ranks.world, device_type=ranks.device.type)
    shape = look_at_machine(c.model, ranks, engine=chosen_engine(c, ranks.device.type))
    longest = c.data.max_prompt_tokens + c.rollout.max_tokens
    if not dry:
        check_model(shape, c.model, ranks.device, longest)
        check_engine(shape, c, ranks.device.type, longest)
    in_run_directory(c, "", shape, ranks, dry, partial(train, c, ranks))


if __name__ == "__main__":
    run_command(main)
