"""Supervised fine-tuning on worked solutions, with the trainer's own packs, FSDP2 policy and chunked head.

    torchrun --nproc_per_node N -m lead_fast.sft [--recipe NAME] [--section.key=value ...]

Loss: mean negative log-likelihood of the solution's tokens, end-of-sequence token included, prompt tokens not.
"""

import json
import math
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from lead_kernels import linear_logprobs

from .checks import check_parallel
from .cli import dump, load_config
from .config import SftConfig
from .data.arithmetic import architecture, build_tokenizer
from .data.order import ProblemStream
from .data.prompts import tokenize_prompts
from .data.read import load_problems, say
from .learner import checkpoint
from .learner.model import load_model, load_tokenizer
from .learner.optimizer import learning_rate, make_optimizer, update
from .learner.packing import Pack, assign, make_pack
from .learner.policy import Policy, make_policy
from .machine import look_at_machine
from .release import release
from .runtime.health import Health
from .runtime.ranks import complaint, start, stop


def load_examples(c: SftConfig, tokenizer, source: str, split: str) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and solutions as token ids; every solution ends in the end-of-sequence token, so none is cut short."""
    problems = load_problems(
        source,
        split=split,
        problem_column=c.data.problem_column,
        answer_column=c.data.answer_column,
        difficulty_column=c.data.difficulty_column,
        solution_column=c.solution_column,
        min_difficulty=c.data.min_difficulty if split == "train" else None,
        answers=False,
    )
    missing = next((p.id for p in problems if not p.solution), None)
    if missing is not None:
        raise ValueError(
            f"{source}: problem {missing} has no solution in column {c.solution_column}: SFT needs one a row."
        )
    problems, prompts = tokenize_prompts(
        problems,
        tokenizer,
        instruction=c.data.instruction,
        max_prompt_tokens=c.data.max_prompt_tokens,
        drop_long=c.data.drop_long_prompts,
    )
    texts = [str(p.solution) for p in problems]
    if prompts and str(tokenizer.decode(prompts[0][-8:])).rstrip().endswith("<think>"):  # the template opens it itself
        texts = [text.lstrip().removeprefix("<think>").lstrip("\n") for text in texts]
    encoded = [ids + [tokenizer.eos_token_id] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    most = c.max_solution_tokens or max(map(len, encoded), default=0)
    fit = [i for i, ids in enumerate(encoded) if len(ids) <= most]
    if not fit:
        raise ValueError(
            f"{source}: every solution is over max_solution_tokens, {most}: raise it, or give 0 for no limit."
        )
    if len(fit) < len(encoded):
        say(f"{len(encoded) - len(fit)} of {len(encoded)} solutions left out: over {most} tokens.")
    return [prompts[i] for i in fit], [encoded[i] for i in fit]


def batches(lengths: list[int], c: SftConfig) -> list[list[int]]:
    """Examples of every step: `batch_tokens` at least, in a seeded order that goes on over epochs."""
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


def pack_loss(policy: Policy, pack: Pack, tokens: int) -> torch.Tensor:
    """The pack's share of the batch's mean negative log-likelihood; `tokens` counts the whole batch's targets."""
    return policy(pack, lambda h, w: -linear_logprobs(h, w, pack.targets_R)[0].sum() / tokens)


def main(args: list[str] | None = None) -> None:
    c: SftConfig = load_config(args, cls=SftConfig, prog="lead_fast.sft")
    ranks = start(c.parallel)
    check_parallel(c.model, c.parallel)
    shape = look_at_machine(c.model, ranks, engine=None, shape=architecture(8) if c.from_scratch else None)
    run = Path(c.output or f"runs/sft-{Path(c.recipe).stem}-{ranks.gather_objects(time.strftime('%Y%m%d-%H%M%S'))[0]}")
    lock = checkpoint.claim(run, c.resume) if ranks.main else None
    if lock:
        checkpoint.check_room(run, shape, c.checkpoint_every)
        checkpoint.write_atomic(run / "config.toml", dump(c))
    if c.from_scratch:
        tokenizer = build_tokenizer()
    else:
        tokenizer = load_tokenizer(c.model)
    prompts, solutions = load_examples(c, tokenizer, c.data.train, "train")
    test_prompts, test_solutions = load_examples(c, tokenizer, c.data.test, "test")
    model = new_model(c.seed, len(tokenizer)) if c.from_scratch else load_model(c.model)
    policy = make_policy(model, c.model, c.parallel, ranks)
    optimizer = make_optimizer(policy, c.optim)
    lengths = [len(p) + len(s) - 1 for p, s in zip(prompts, solutions, strict=True)]
    test_lengths = [len(p) + len(s) - 1 for p, s in zip(test_prompts, test_solutions, strict=True)]
    schedule = batches(lengths, c)
    first = 0
    if c.resume and (found := checkpoint.load(run, policy, optimizer, ranks)):
        first = found["step"]

    def cut(members: list[int], prompts, solutions, lengths) -> tuple[list[Pack], int]:
        plan = assign([lengths[i] for i in members], c.parallel.pack_tokens, ranks.teams, policy.flops())
        mine = [[members[i] for i in pack] for pack in plan[ranks.team]]
        part = (ranks.member, ranks.sequence)
        packs = [make_pack(pack, prompts, solutions, None, ranks.device, part) for pack in mine]
        return packs, sum(len(solutions[i]) for i in members)

    def total(losses: list[torch.Tensor]) -> float:
        return ranks.all_sum(torch.stack([x.detach() for x in losses]).sum()).item()

    if ranks.main and first and (run / "metrics.jsonl").is_file():  # what came after the checkpoint is made again
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        kept = [line for line in lines if json.loads(line)["step"] <= first]
        checkpoint.write_atomic(run / "metrics.jsonl", "".join(line + "\n" for line in kept))
    health = Health(run, c.optim.max_skipped)
    began = time.monotonic()
    with open(run / "metrics.jsonl" if ranks.main else "/dev/null", "a", encoding="utf-8") as log:
        for step in range(first, c.steps):
            packs, tokens = cut(schedule[step], prompts, solutions, lengths)
            losses = []
            for pack in packs:
                loss = pack_loss(policy, pack, tokens)
                loss.backward()
                losses.append(loss)
            lr = learning_rate(step, c.steps, c.optim)
            loss = total(losses)
            norm = update(policy, optimizer, lr, c.optim.grad_clip, loss)
            health.count(step + 1, int(not math.isfinite(norm)), None)
            record = {"step": step + 1, "loss": loss, "grad_norm": norm, "learning_rate": lr}
            if step + 1 == c.steps or (c.validate_every and (step + 1) % c.validate_every == 0):
                with torch.no_grad():
                    held, n = cut(list(range(len(test_lengths))), test_prompts, test_solutions, test_lengths)
                    record["validation_loss"] = total([pack_loss(policy, pack, n) for pack in held])
            record["elapsed_s"] = time.monotonic() - began
            if ranks.main:
                log.write(json.dumps(record) + "\n")
                log.flush()
                if "validation_loss" in record or (step + 1) % 20 == 0:
                    left = record["elapsed_s"] / (step + 1 - first) * (c.steps - step - 1)
                    shown = "  ".join(f"{k} {v:.4g}" for k, v in record.items() if k != "step")
                    print(f"sft {step + 1}/{c.steps}  {shown}  left_s {left:.0f}", flush=True)
            if c.checkpoint_every and (step + 1) % c.checkpoint_every == 0:
                checkpoint.save(run, step + 1, policy, optimizer, {}, ranks)
    checkpoint.export(run / "final", policy, tokenizer, getattr(torch, c.export_dtype), ranks)
    if ranks.main:
        release(run)
        print(f"Model: {run / 'final'}", flush=True)
    stop()
    if lock:
        lock.close()


def new_model(seed: int, vocabulary: int):
    """The embedded model's architecture with random weights drawn from the seed."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(architecture(vocabulary), dtype=torch.float32)


if __name__ == "__main__":
    try:
        main()
    except ValueError as e:
        sys.exit(complaint(e))
