"""Supervised fine-tuning (SFT) on worked solutions, with the trainer's own packs, FSDP2 policy and chunked head.

    torchrun --nproc_per_node N -m lead_fast.sft [--recipe NAME] [--section.key=value ...]

Loss: mean negative log-likelihood of the solution's tokens, including the end-of-sequence token but not the prompt.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM

from lead_kernels import linear_logprobs

from .checks import check_sft
from .cli import load_config, take_dry_run
from .command import in_run_directory, run_command
from .config import SftConfig
from .data.arithmetic import architecture, build_tokenizer
from .data.order import ProblemStream
from .data.prompts import tokenize_prompts
from .data.read import load_problems, say
from .learner import checkpoint
from .learner.memory import rehearse_pack, worst_pack
from .learner.model import load_tokenizer
from .learner.model_check import check_model
from .learner.optimizer import learning_rate, make_optimizer, update
from .learner.packing import Pack, assign, make_pack
from .learner.policy import Policy, load_policy, make_policy
from .machine import look_at_machine
from .release import release
from .runtime.health import Health, skipped_update
from .runtime.metrics import Metrics, PhaseTimer
from .runtime.ranks import Ranks, start
from .runtime.signals import any_rank_caught, say_stopped, stop_on_signals
from .runtime.watchdog import Watchdog


class Examples(NamedTuple):
    """Token ids of prompts and solutions; every solution ends in the end-of-sequence token, so none is cut short."""

    prompts: list[list[int]]
    solutions: list[list[int]]

    def lengths(self, members: Iterable[int] | None = None) -> list[int]:
        """Tokens of each example that go through the model; the last token is only ever a target."""
        every = range(len(self.solutions)) if members is None else members
        return [len(self.prompts[i]) + len(self.solutions[i]) - 1 for i in every]

    def targets(self, members: Iterable[int]) -> int:
        """Number of tokens that the loss of these examples averages over."""
        return sum(len(self.solutions[i]) for i in members)

    def described(self, members: Iterable[int], tokenizer: Any) -> list[dict[str, Any]]:
        """Token ids and text of these examples, to be saved."""
        return [
            {"prompt": self.prompts[i], "solution": self.solutions[i],
             "text": tokenizer.decode(self.prompts[i] + self.solutions[i])}
            for i in members
        ]  # fmt: skip


def load_examples(c: SftConfig, tokenizer, source: str, split: str) -> Examples:
    """Load a source's problems with their solutions; examples over a limit are left out."""
    problems = load_problems(
        source,
        split=split,
        problem_column=c.data.problem_column,
        reference_column=c.data.reference_column,
        difficulty_column=c.data.difficulty_column,
        solution_column=c.solution_column,
        min_difficulty=c.data.min_difficulty if split == "train" else None,
        references=False,
    )
    missing = next((p.id for p in problems if not p.solution), None)
    if missing is not None:
        raise ValueError(
            f"{source}: problem {missing} has no solution in column {c.solution_column}: SFT needs one in every row."
        )
    problems, prompts = tokenize_prompts(
        problems,
        tokenizer,
        instruction=c.data.instruction,
        max_prompt_tokens=c.data.max_prompt_tokens,
        drop_long=c.data.drop_long_prompts,
        template=c.data.template,
    )
    texts = [str(p.solution) for p in problems]
    if prompts and str(tokenizer.decode(prompts[0][-8:])).rstrip().endswith("<think>"):  # opened by the chat template
        texts = [text.lstrip().removeprefix("<think>").lstrip("\n") for text in texts]
    encoded = [ids + [tokenizer.eos_token_id] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    most = c.max_solution_tokens or max(map(len, encoded), default=0)
    fit = [i for i, ids in enumerate(encoded) if len(ids) <= most]
    if not fit:
        raise ValueError(
            f"{source}: every solution is longer than max_solution_tokens, {most}: raise it, or give 0 for no limit."
        )
    if len(fit) < len(encoded):
        say(f"{len(encoded) - len(fit)} of {len(encoded)} solutions are left out: longer than {most} tokens.")
    return Examples([prompts[i] for i in fit], [encoded[i] for i in fit])


def batches(lengths: list[int], c: SftConfig) -> list[list[int]]:
    """Indices of each step's examples: at least `batch_tokens` tokens, in a seeded order that continues over epochs."""
    order = ProblemStream(len(lengths), 1, c.seed)
    out, at = [], 0
    for _ in range(c.steps):
        batch, tokens = [], 0
        while tokens < c.batch_tokens:
            (i,) = order.batch(at)
            batch.append(i)
            tokens += lengths[i]
            at += 1
        out.append(batch)
    return out


def packs_of(examples: Examples, members: Sequence[int], c: SftConfig, policy: Policy, ranks: Ranks) -> Iterator[Pack]:
    """This rank's packs of the examples `members`; every rank has the same number."""
    lengths = examples.lengths(members)
    plan = assign(lengths, c.parallel.pack_tokens, ranks.teams, policy.flops())
    part = (ranks.member, ranks.sequence)
    for pack in plan[ranks.team]:
        yield make_pack([members[i] for i in pack], *examples, None, ranks.device, part)


def pack_loss(policy: Policy, pack: Pack, tokens: int) -> torch.Tensor:
    """A pack's contribution to the batch's mean negative log-likelihood; `tokens` is the batch's number of targets."""
    return policy(
        pack, lambda h, head: -linear_logprobs(h, head.weight, pack.targets_R, **head.options(1.0))[0].sum() / tokens
    )


def rehearse(policy: Policy, optimizer: torch.optim.Optimizer, c: SftConfig, longest: int, ranks: Ranks) -> SftConfig:
    """Run one largest pack before the first step; returns the configuration with parallel.pack_tokens above 0."""

    def gradient(tokens: int) -> None:
        pack, _ = worst_pack(tokens, longest, ranks)
        for _ in range(2):
            pack_loss(policy, pack, tokens).backward()

    return rehearse_pack(policy, optimizer, c, longest, gradient, ranks)


def validate(policy: Policy, test: Examples, c: SftConfig, ranks: Ranks, beat: Callable[[], None]) -> float:
    """Mean negative log-likelihood of the held-out solutions. A collective."""
    everything = range(len(test.solutions))
    tokens, losses = test.targets(everything), []
    with torch.no_grad():
        for pack in packs_of(test, everything, c, policy, ranks):
            beat()
            losses.append(pack_loss(policy, pack, tokens))
    return ranks.all_sum(torch.stack(losses).sum()).item()


def sft(c: SftConfig, ranks: Ranks, run: Path) -> None:
    """Fine-tune as `c` says; all output goes to the folder `run`."""
    asked_to_stop = stop_on_signals(ranks)
    tokenizer = build_tokenizer() if c.from_scratch else load_tokenizer(c.model)
    train = load_examples(c, tokenizer, c.data.train, "train")
    test = load_examples(c, tokenizer, c.data.test, "test")
    lengths = train.lengths()
    schedule = batches(lengths, c)
    metrics = Metrics(run, total_steps=c.steps, wandb_project=c.wandb or None, enabled=ranks.main)

    if c.from_scratch:
        policy = make_policy(new_model(c.seed, len(tokenizer)), None, c.model, c.parallel, ranks)
    else:
        policy = load_policy(c.model, c.parallel, ranks)
    optimizer = make_optimizer(policy, c.optim)
    c = rehearse(policy, optimizer, c, max(lengths + test.lengths()), ranks)
    state = (c.resume and checkpoint.load(run, policy, optimizer, ranks)) or {}
    first, began = state.get("step", 0), time.monotonic() - state.get("elapsed_s", 0.0)
    metrics.truncate_after(first)
    health = Health(run, c.optim.max_skipped, state.get("updates_skipped", 0))
    dog = Watchdog(c.watchdog_s, ranks)
    timer = PhaseTimer(dog.beat)
    saver = checkpoint.Checkpoints(run, ranks, lambda step, *_: dog.beat("save", step))

    with contextlib.closing(metrics), contextlib.closing(dog):
        for step in range(first, c.steps):
            done, lr = step + 1, learning_rate(step, c.steps, c.optim)
            dog.beat("pack", done)
            with timer("pack"):
                packs, targets = list(packs_of(train, schedule[step], c, policy, ranks)), train.targets(schedule[step])
            with timer("train"):
                losses = []
                for at, pack in enumerate(packs):
                    dog.beat()
                    metrics.progress("train", done, at, len(packs))
                    losses.append(pack_loss(policy, pack, targets))
                    losses[-1].backward()
            with timer("optim"):
                loss = ranks.all_sum(torch.stack([x.detach() for x in losses]).sum()).item()
                norm = update(policy, optimizer, lr, c.optim.grad_clip, loss)
            record: dict[str, Any] = {"loss": loss, "grad_norm": norm, "learning_rate": lr, "packs": len(packs)}
            record["tokens"] = sum(train.lengths(schedule[step]))
            record["tokens_per_s"] = record["tokens"] / sum(timer.seconds[p] for p in ("pack", "train", "optim"))
            if done == c.steps or (c.validate_every and done % c.validate_every == 0):
                with timer("evaluate"):
                    record["validation_loss"] = validate(policy, test, c, ranks, dog.beat)
            record |= {"updates_skipped": int(not math.isfinite(norm)), "alerts": health.look(done, record)}
            record |= {"elapsed_s": time.monotonic() - began, "seconds": timer.seconds}
            metrics.sft(done, record)
            for alert in [*record["alerts"], *saver.failures()]:
                metrics.warn(alert)
            kept = None
            if record["updates_skipped"] and ranks.main:
                kept = health.keep(done, {"record": record, "examples": train.described(schedule[step], tokenizer)})
                metrics.warn(skipped_update(done, kept))
            health.count(done, record["updates_skipped"], kept)
            timer.reset()
            leaving = any_rank_caught(asked_to_stop, ranks)
            if leaving or (c.checkpoint_every and done % c.checkpoint_every == 0):
                with timer("save"):  # recorded with the next step
                    extra = {"elapsed_s": time.monotonic() - began, "updates_skipped": health.skipped}
                    saved = saver.save(done, policy, optimizer, extra, wait=leaving)
                for sentence in saver.failures() if leaving else []:
                    metrics.warn(sentence)
                if leaving:
                    return say_stopped(run, done, saved, ranks)
        saver.finish()
        dog.beat("export")
        checkpoint.export(run / "final", policy, tokenizer, getattr(torch, c.export_dtype), ranks)
    if ranks.main:
        release(run)
        print(f"Model: {run / 'final'}", flush=True)


def main(args: list[str] | None = None) -> None:
    dry, args = take_dry_run(args)
    c: SftConfig = load_config([*trains_named_model(args), *args], cls=SftConfig, about=__doc__)
    check_sft(c)
    ranks = start(c.parallel)
    shape = look_at_machine(c.model, ranks, engine=None, shape=architecture(8) if c.from_scratch else None)
    longest = c.data.max_prompt_tokens + c.max_solution_tokens if c.max_solution_tokens else None
    if not (c.from_scratch or dry):
        check_model(shape, c.model, ranks.device, longest)
    in_run_directory(c, "sft-", shape, ranks, dry, partial(sft, c, ranks))


def trains_named_model(args: list[str]) -> list[str]:
    """Keys that a command line implies by naming a model: that model is trained, wherever the recipe starts from."""
    flags = {a.split("=")[0] for a in args}
    return ["--from_scratch=false"] if flags & {"--model", "--model.path"} and "--from_scratch" not in flags else []


def new_model(seed: int, vocabulary: int):
    """The embedded model's architecture with random weights drawn from the seed."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(architecture(vocabulary), dtype=torch.float32)


if __name__ == "__main__":
    run_command(main)
