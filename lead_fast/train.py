"""GRPO-LEAD, from problems to a better model. Read this first.

    torchrun --nproc_per_node N -m lead_fast.train [--recipe NAME] [--preset NAME] [--section.key=value ...]

A step: sample G responses to each problem, grade them, turn outcomes and lengths into advantages, pack the sequences,
take one gradient of the clipped loss over all packs and ranks, and hand the new weights back to the engine.

Legend: P problems, G responses in a group, S = P x G sequences, R response rows of a pack.
"""

import contextlib
import dataclasses
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lead_kernels import LeadAdvantages

from .checks import check, chosen_engine
from .cli import RECIPES, dump, load_config, names
from .config import Config
from .data.order import ProblemStream, SolveRateStream
from .data.prompts import tokenize_prompts
from .data.read import load_problems
from .evaluate import evaluate, load_test
from .learner import checkpoint
from .learner.advantage import advantages, outcomes
from .learner.loss import check_agreement, needs_gradient, objective, pack_logprobs, policy_loss, reduce_metrics
from .learner.memory import rehearse
from .learner.model import load_tokenizer
from .learner.optimizer import learning_rate, make_optimizer, update
from .learner.packing import Pack, assign, efficiency, make_pack
from .learner.policy import Policy, load_policy
from .machine import look_at_machine
from .records import Group, Score
from .release import release
from .report import write_report
from .reward.grading import grade
from .reward.verifier import Verifier
from .rollout.collect import Backlog, Batch, Share, gather, rollout, sampling_seed
from .rollout.engine import EngineFailure, Sampling
from .rollout.engines import make_engine
from .rollout.sync import canary, sync
from .runtime.hardware import smallest_gpu_gib
from .runtime.health import Health, must_be_finite
from .runtime.journal import Metrics, PhaseTimer
from .runtime.jsonl import read_jsonl
from .runtime.ranks import Ranks, complaint, start, stop
from .runtime.watchdog import Watchdog

LARGE_GPU_GIB = 75  # what torch shows of an '80 GB' GPU is 79.1 GiB or a little less
ASIDE = ("evaluate", "save")  # phases that are no part of a step
ROUNDING = 1e-4  # nats; how far above 0 a log-prob may be rounded


def train(c: Config, ranks: Ranks, run: Path) -> None:
    """Train as `c` says; everything that comes out is in the folder `run`."""
    asked_to_stop = stop_on_sigterm()
    # Everything that a user can get wrong is looked at before a model is loaded.
    tokenizer = load_tokenizer(c.model)
    problems, prompts = load_train(c, tokenizer)
    test, test_prompts = load_test(c, tokenizer) if c.evaluate.every else ([], [])
    stream = (SolveRateStream if c.data.sampling == "solve_rate" else ProblemStream)(
        len(problems), c.rollout.problems, c.seed
    )
    spare = ProblemStream(len(problems), c.rollout.problems, c.seed + 1)
    place = {p.problem: i for i, p in enumerate(problems)}
    metrics = Metrics(run, total_steps=c.steps, wandb_project=c.wandb or None, enabled=ranks.main)

    policy = load_policy(c.model, c.parallel, ranks)
    sharded = dataclasses.replace(c.parallel, reshard=True)
    reference = load_policy(c.model, sharded, ranks).eval() if c.loss.kl_coef else None
    optimizer = make_optimizer(policy, c.optim)
    c = rehearse(policy, reference, optimizer, c, ranks)
    engine = make_engine(c, tokenizer, ranks)
    found = (c.resume and checkpoint.load(run, policy, optimizer, ranks)) or {}
    first, seconds_before = found.get("step", 0), found.get("elapsed_s", 0.0)
    r = c.rollout
    backlog = Backlog(
        lambda at: stream.batch(at // r.problems)[at % r.problems],
        r.problems,
        r.extra_problems,
        found.get("asked", first * r.problems),
        found.get("waiting", ()),
    )
    watched = c.reward.degenerate is not None or c.reward.repetition is not None
    sampling = Sampling(r.max_tokens, r.temperature, r.top_p, r.min_p, r.stop, r.top_k, end_repetition=watched)
    sync(policy, engine, first, c, ranks)
    canary(policy, engine, prompts[0], c, ranks)
    metrics.truncate_after(first)
    began = time.monotonic() - seconds_before
    health = Health(run, c.optim.max_skipped, found.get("updates_skipped", 0))
    dog = Watchdog(c.watchdog_s, ranks)
    timer = PhaseTimer(dog.beat)

    def progress(phase: str, step: int, at: int, of: int) -> None:
        dog.beat(phase, step)
        metrics.progress(phase, step, at, of)

    def held_out(step: int) -> None:
        with timer("evaluate"):
            tell = partial(progress, "evaluate", step)
            try:
                record, batch = evaluate(engine, test, test_prompts, verifier, c, ranks, tell)
            except EngineFailure as e:
                raise rescued(e, f"In the evaluation after step {step}", step) from e
        metrics.eval(step, record | {"elapsed_s": time.monotonic() - began})
        metrics.answers(step, sample_of_answers(batch, "test"))

    def rescued(e: EngineFailure, when: str, step: int) -> ValueError:
        """What to tell where an engine died after `step` steps, which are saved."""
        kept = step > first and save(step)
        return ValueError(
            f"{when} {e}: "
            + (f"saved after step {step}; go on with --output={run} --resume." if kept else "start again.")
        )

    def collect(share: Share, step: int) -> Batch:
        """Every rank's groups, graded; where an engine died, what is trained is saved and the run ends."""
        with timer("reward"):
            try:
                return gather(share, grade(share.groups, verifier, c), ranks)
            except EngineFailure as e:
                raise rescued(e, f"In step {step + 1}", step) from e

    def ask_others(chosen: list[int], step: int, again: int) -> tuple[Batch, LeadAdvantages]:
        """Graded groups of problems that stand in for dropped ones, and their advantages; `again` counts the rounds."""
        with timer("rollout"):
            engine.wake()
            share = rollout(
                engine,
                [problems[i] for i in chosen],
                [prompts[i] for i in chosen],
                r.group_size,
                sampling,
                sampling_seed(c.seed, step, again),
                ranks,
                partial(progress, "rollout", step + 1),
                shared_by=r.tensor_parallel,
            )
        batch = collect(share, step)
        with timer("advantage"):
            return batch, advantages(batch.scores, batch.lengths, c, ranks.device)

    def save(step: int) -> bool:
        with timer("save"):
            extra = {"elapsed_s": time.monotonic() - began, "updates_skipped": health.skipped}
            extra |= {"asked": backlog.position, "waiting": backlog.waiting}
            return checkpoint.save(run, step, policy, optimizer, extra, ranks)

    with (
        Verifier(timeout_s=c.reward.verifier_timeout_s) as verifier,
        contextlib.closing(metrics),
        contextlib.closing(dog),
    ):
        if first and isinstance(stream, SolveRateStream):  # the first rank's file speaks for all
            past = ranks.gather_objects(read_jsonl(run / "solved.jsonl") if ranks.main else None)[0]
            for row in past:
                if row["problem"] not in place:
                    continue  # the data changed since
                stream.tell(place[row["problem"]], row["correct"] / row["sampled"])
        if c.evaluate.every and first == 0:
            held_out(0)
        for step in range(first, c.steps):
            chosen = backlog.ask()
            dog.beat("rollout", step + 1)
            with timer("rollout"):
                engine.wake()
                share = rollout(
                    engine,
                    [problems[i] for i in chosen],
                    [prompts[i] for i in chosen],
                    c.rollout.group_size,
                    sampling,
                    sampling_seed(c.seed, step),
                    ranks,
                    partial(progress, "rollout", step + 1),
                    shared_by=r.tensor_parallel,
                    begun=backlog.begun,
                    want=r.problems if r.extra_problems else None,
                )
            batch = backlog.settle(collect(share, step))
            with timer("advantage"):
                lead = advantages(batch.scores, batch.lengths, c, ranks.device)
            rows, refilled, replaced = solved(batch), 0, set(chosen)
            for again in range(1, c.rollout.refill + 1):
                if not (dropped := int((~lead.kept).sum())):
                    break
                others = [i for i in spare.batch(step * c.rollout.refill + again - 1) if i not in replaced][:dropped]
                if not others:
                    break
                more, more_lead = ask_others(others, step, again)
                replaced |= set(others)
                rows += solved(more)
                batch, swapped = refill(batch, lead.kept.tolist(), more, more_lead.kept.tolist())
                refilled += swapped
                lead = advantages(batch.scores, batch.lengths, c, ranks.device)
            engine.sleep()  # only now: there is no waking without new weights
            if isinstance(stream, SolveRateStream):
                for row in rows:
                    stream.tell(place[row["problem"]], row["correct"] / row["sampled"])
            if c.debug:
                must_be_finite("rollout's log-probs", *map(torch.tensor, batch.logprobs), most=ROUNDING)
                must_be_finite("rewards and advantages", lead.reward, lead.advantage)
            lr = learning_rate(step, c.steps, c.optim)
            tell = partial(progress, "train", step + 1)
            learned = learn(policy, reference, optimizer, batch, lead, lr, c, ranks, timer, tell)
            if step == first and c.optim.updates == 1:
                check_agreement(learned["logprob_diff_mean"], c)
            with timer("sync"):
                synced = sync(policy, engine, step + 1, c, ranks)
            done = step + 1
            if c.evaluate.every and (done % c.evaluate.every == 0 or done == c.steps):
                held_out(done)
            now = time.monotonic()
            record: dict[str, Any] = describe(batch, lead, c) | learned | synced
            record |= {"rollout_idle_share": batch.idle_share, "groups_refilled": refilled}
            record |= {"learning_rate": lr, "elapsed_s": now - began, "seconds": dict(timer.seconds)}
            record["tokens_per_s"] = record["tokens"] / sum(s for p, s in timer.seconds.items() if p not in ASIDE)
            record |= {"alerts": health.look(done, record)}
            metrics.train(done, record)
            for alert in record["alerts"]:
                metrics.warn(alert)
            kept = None
            if record["updates_skipped"] and ranks.main:
                kept = health.keep(done, spoilt(batch, lead, record))
                metrics.warn(f"step {done}: loss or gradient not finite, update skipped; its batch is in {kept}.")
            health.count(done, record["updates_skipped"], kept)
            metrics.answers(done, sample_of_answers(batch, "train", lead.reward.tolist()))
            metrics.solved(done, rows)
            timer.reset()
            saved = False
            leaving = ranks.all_max(torch.tensor(float(bool(asked_to_stop)))).item() > 0
            if leaving or (c.checkpoint_every and done % c.checkpoint_every == 0):
                saved = save(done)  # its seconds are told with the next step
            if leaving:
                if not saved:
                    raise ValueError(f"Asked to stop after step {done}, but it could not be saved: make room in {run}.")
                if ranks.main:
                    print(f"Asked to stop: saved after step {done}; go on with --output={run} --resume.", flush=True)
                return
        dog.beat("export")
        checkpoint.export(run / "final", policy, tokenizer, getattr(torch, c.model.dtype), ranks)
    if ranks.main:
        release(run)
        print(f"Model: {run / 'final'}   Report: {write_report(run)}", flush=True)


def learn(
    policy: Policy,
    reference: Policy | None,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    lead: LeadAdvantages,
    lr: float,
    c: Config,
    ranks: Ranks,
    timer: PhaseTimer,
    progress: Callable[[int, int], None],
) -> dict:
    """Packs, gradient, optimiser step. The result does not depend on how the batch is cut or spread."""
    lengths, prompts, responses, logprobs = batch.lengths, batch.prompts, batch.responses, batch.logprobs
    kept_S = lead.kept.repeat_interleave(c.rollout.group_size)
    whole = [len(p) + n - 1 for p, n in zip(prompts, lengths, strict=True)]
    share = len(lengths) // c.optim.updates
    groups = outcomes(batch.scores, lengths, c, ranks.device)
    parts, norms, balance, trained, passes = [], [], [], set(), 0
    for at in range(0, len(lengths), share):
        with timer("pack"):
            in_update = torch.zeros_like(kept_S)
            in_update[at : at + share] = True
            o = objective(lead.advantage, lengths, kept_S & in_update, c, groups)
            live = [i for i, moves in enumerate(needs_gradient(o, c)) if moves]
            plan = assign([whole[i] for i in live], c.parallel.pack_tokens, ranks.teams, policy.flops())
            balance.append(efficiency(plan, [whole[i] for i in live], policy.flops()))
            mine = [[live[i] for i in members] for members in plan[ranks.team]]
            part = (ranks.member, ranks.sequence)
            packs = [make_pack(members, prompts, responses, logprobs, ranks.device, part) for members in mine]
            trained.update(live)
        with timer("train"):
            recompute = c.loss.old_logprobs == "recompute"
            passes += len(packs)
            old = [pack_logprobs(policy, p, c.rollout.temperature) if recompute else None for p in packs]
            for at_pack, (pack, old_R) in enumerate(zip(packs, old, strict=True)):
                progress(at_pack, len(packs))
                ref_R = pack_logprobs(reference, pack, c.rollout.temperature) if reference else None
                out = policy_loss(policy, pack, o, c, old_R, ref_R)
                if c.debug:
                    where = f"log-probs of a pack of {len(mine[at_pack])} sequences on rank {ranks.rank}"
                    must_be_finite(where, out.logprobs, old_R, ref_R, most=ROUNDING)
                    must_be_finite("loss and entropy of that pack", out.loss, out.entropy)
                parts.append(backward(policy, pack, out))
        with timer("optim"):
            loss = ranks.all_sum(torch.stack([p["loss"] for p in parts[-len(packs) :]]).sum())
            norms.append(update(policy, optimizer, lr, c.optim.grad_clip, loss.item()))
    sums = reduce_metrics(parts, ranks)
    n = sums["tokens"] or float("nan")  # a batch without a gradient has no means
    return {
        "loss": sums["loss"] / len(norms),
        "entropy": sums["entropy"] / n,
        "clip_low_share": sums["clip_low"] / n,
        "clip_high_share": sums["clip_high"] / n,
        "kl_behavior": sums["kl_behavior"] / n,
        "logprob_diff_mean": sums["logprob_diff"] / n,
        "logprob_diff_max": sums["max_logprob_diff"],
        "importance_truncated_share": sums["importance_truncated"] / n,
        "grad_norm": sum(norms) / len(norms),
        "updates_skipped": sum(not math.isfinite(norm) for norm in norms),
        "packing_efficiency": sum(balance) / len(balance),
        "packs": passes,
        "sequences_skipped": len(lengths) - len(trained),
        "tokens_skipped": sum(n for i, n in enumerate(whole) if i not in trained),
        "head_rows_skipped": sum(whole[i] - lengths[i] for i in trained),
        "passes_skipped": passes * ((c.loss.old_logprobs != "recompute") + (reference is None)),
        "groups_dropped": int((~lead.kept).sum()),
    }


def backward(policy: Policy, pack: Pack, out) -> dict[str, torch.Tensor]:
    """Gradient of one pack, summed into the shards; returns the pack's metrics."""
    out.loss.backward()
    return out.metrics | {"loss": out.loss.detach()}


def describe(batch: Batch, lead: LeadAdvantages, c: Config) -> dict:
    """What the rollouts and their rewards look like."""
    correct = torch.tensor([s.correct for s in batch.scores], dtype=torch.float32)
    lengths = torch.tensor(batch.lengths, dtype=torch.float32)
    solved = correct.view(-1, c.rollout.group_size).sum(1)
    groups = len(batch.groups)

    def mean(x: torch.Tensor) -> float | None:
        return x.mean().item() if x.numel() else None

    return {
        "reward_mean": lead.reward.mean().item(),
        "difficulty_weight_mean": lead.weight.mean().item(),
        "accuracy": correct.mean().item(),
        "solve_rate_histogram": torch.bincount(solved.long(), minlength=c.rollout.group_size + 1).tolist(),
        "solve_none": (solved == 0).sum().item() / groups,
        "solve_all": (solved == c.rollout.group_size).sum().item() / groups,
        "length_correct": mean(lengths[correct == 1]),
        "length_wrong": mean(lengths[correct == 0]),
        "length_mean": mean(lengths),
        "truncated_share": sum(s.truncated for s in batch.scores) / len(batch.scores),
        "response_tokens": int(lengths.sum()),
        "tokens": int(lengths.sum()) + sum(len(g.prompt_ids) * len(g.responses) for g in batch.groups),
    }


def refill(batch: Batch, kept: list[bool], more: Batch, more_kept: list[bool]) -> tuple[Batch, int]:
    """The batch with its dropped groups replaced, as far as they go, by the kept ones of `more`; and how many were."""

    def whole(b: Batch) -> list[tuple[Group, list[Score]]]:
        n = len(b.scores) // len(b.groups) if b.groups else 0
        return [(g, b.scores[i * n : (i + 1) * n]) for i, g in enumerate(b.groups)]

    good = iter([found for found, ok in zip(whole(more), more_kept, strict=True) if ok])
    out, swapped = [], 0
    for found, ok in zip(whole(batch), kept, strict=True):
        instead = None if ok else next(good, None)
        swapped += instead is not None
        out.append(instead or found)
    flat = [s for _, scores in out for s in scores]
    return dataclasses.replace(batch, groups=[g for g, _ in out], scores=flat), swapped


def solved(batch: Batch) -> list[dict]:
    """Of every problem, how many responses were correct: what `lead_fast.data select` chooses by."""
    out, at = [], 0
    for g in batch.groups:
        part = batch.scores[at : at + len(g.responses)]
        at += len(g.responses)
        out.append({"problem": g.problem.problem, "correct": sum(s.correct for s in part), "sampled": len(part)})
    return out


def spoilt(batch: Batch, lead: LeadAdvantages, record: dict) -> dict:
    """Everything that went into a step whose update was skipped."""
    return {
        "record": record,
        "groups": [dataclasses.asdict(g) for g in batch.groups],
        "scores": [dataclasses.asdict(s) for s in batch.scores],
        "reward": lead.reward,
        "advantage": lead.advantage,
    }


def sample_of_answers(batch: Batch, split: str, rewards: list[float] | None = None, count: int = 4) -> list[dict]:
    """A few answers with their scores, spread over the batch."""
    flat = [(g.problem, r) for g in batch.groups for r in g.responses]
    every = max(1, len(flat) // count)
    return [
        {
            "split": split,
            "problem": flat[i][0].problem,
            "answer": flat[i][0].answer,
            "response": flat[i][1].text,
            "extracted": batch.scores[i].extracted,
            "correct": batch.scores[i].correct,
            "tokens": len(flat[i][1].token_ids),
            "finish_reason": flat[i][1].finish_reason,
            **({"reward": rewards[i]} if rewards else {}),
        }
        for i in range(0, len(flat), every)[:count]
    ]


def load_train(c: Config, tokenizer) -> tuple[list, list[list[int]]]:
    problems = load_problems(
        c.data.train,
        split="train",
        problem_column=c.data.problem_column,
        answer_column=c.data.answer_column,
        difficulty_column=c.data.difficulty_column,
        min_difficulty=c.data.min_difficulty,
    )
    problems, prompts = tokenize_prompts(
        problems,
        tokenizer,
        instruction=c.data.instruction,
        max_prompt_tokens=c.data.max_prompt_tokens,
        drop_long=c.data.drop_long_prompts,
    )
    if len(problems) < c.rollout.problems:
        raise ValueError(
            f"{c.data.train} has {len(problems)} problems and rollout.problems is {c.rollout.problems}: "
            "give more data or a smaller batch."
        )
    return problems, prompts


def stop_on_sigterm() -> list[int]:
    """A list that is empty until SIGTERM arrives; the loop looks at it after every step."""
    caught: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: caught.append(number))
    return caught


def pick_recipe() -> tuple[str, str]:
    """Recipe for this machine when none is named, and why: lead-14b for 8 ranks on GPUs of 80 GB or more, else tiny."""
    world, here = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    n, memory = torch.cuda.device_count(), smallest_gpu_gib()
    found = f"{n} GPUs with {memory:.0f} GiB each" if n else "no GPU"
    if min(n, here) * (world // here) >= 8 and memory >= LARGE_GPU_GIB:
        return "lead-14b", found
    if n:
        found = f"Warning: {found}, of which {min(n, here)} train the small embedded model"
    return "tiny", f"{found}, and lead-14b wants 8 ranks on GPUs of {LARGE_GPU_GIB} GiB or more"


def main(args: list[str] | None = None) -> None:
    args = list(sys.argv[1:] if args is None else args)
    dry = "--dry-run" in args
    args = [a for a in args if a != "--dry-run"]
    default, why = pick_recipe()
    c = load_config(args, default_recipe=default)
    named = any(a.split("=")[0] in ("--recipe", "--config") for a in args)
    ranks = start(c.parallel)
    if ranks.main:
        reason = "as asked" if named else f"{why}; name another with --recipe ({', '.join(names(RECIPES))})"
        print(f"Recipe {c.recipe}: {reason}.", flush=True)
    check(c, ranks.world, device_type=ranks.device.type)
    shape = look_at_machine(c.model, ranks, engine=chosen_engine(c, ranks.device.type))
    if dry:
        if ranks.main:
            print(dump(c))
        return stop()
    stamp = ranks.gather_objects(time.strftime("%Y%m%d-%H%M%S"))[0]
    run = Path(c.output or f"runs/{Path(c.recipe).stem}-{stamp}")
    lock = checkpoint.claim(run, c.resume) if ranks.main else None
    if lock:
        checkpoint.check_room(run, shape, c.checkpoint_every)
        checkpoint.write_atomic(run / "config.toml", dump(dataclasses.replace(c, resume=False)))
    train(c, ranks, run)
    stop()
    if lock:
        lock.close()


if __name__ == "__main__":
    try:
        main()
    except ValueError as e:
        sys.exit(complaint(e))
