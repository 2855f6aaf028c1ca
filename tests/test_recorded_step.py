"""Test a recorded batch: its rewards and advantages, and the losses and weights of six updates, equal the record.

    python tests/test_recorded_step.py --record

updates the recorded numbers after a change that is meant to change them. It keeps the batch; if data/recorded_step.json
is missing, the embedded model samples a new one.
"""

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "tests" / "data" / "recorded_step.json"
BATCH = ("prompts", "responses", "logprobs", "correct", "truncated")
GROUP_SIZE, MAX_TOKENS, UPDATES = 4, 48, 6
# At this learning rate the ratios of two tokens reach the clip, and other instruction sets and BLAS code paths change
# no number by more than a quarter of the tolerance; at 5e-5 they exceed it. Packs are small, so that there are several.
ARGS = ["--recipe=tiny", "--preset=paper", "--optim.lr=1e-5", "--parallel.pack_tokens=256",
        f"--rollout.group_size={GROUP_SIZE}", f"--rollout.max_tokens={MAX_TOKENS}"]  # fmt: skip


def trainer() -> SimpleNamespace:
    """Import everything from lead_fast that this file uses."""
    from lead_fast.cli import load_config
    from lead_fast.data.prompts import load_train
    from lead_fast.learner.advantage import advantages
    from lead_fast.learner.learner import Learner
    from lead_fast.learner.model import load_tokenizer
    from lead_fast.records import Batch, Group, Problem, Response, Sample, Score
    from lead_fast.reward.grading import grade
    from lead_fast.reward.verifier import Verifier
    from lead_fast.rollout.collect import gather, rollout
    from lead_fast.rollout.engine import Sampling
    from lead_fast.rollout.engines import make_engine
    from lead_fast.runtime.metrics import PhaseTimer
    from lead_fast.runtime.ranks import start, stop

    return SimpleNamespace(
        advantages=advantages, load_config=load_config, start=start, stop=stop, Sampling=Sampling,
        make_engine=make_engine, PhaseTimer=PhaseTimer, load_tokenizer=load_tokenizer,
        Verifier=Verifier, Batch=Batch, gather=gather, grade=grade, rollout=rollout,
        Group=Group, Problem=Problem, Response=Response, Score=Score, Learner=Learner,
        Sample=Sample, load_train=load_train,
    )  # fmt: skip


@contextlib.contextmanager
def job() -> Iterator[tuple[SimpleNamespace, Any, Any]]:
    """The trainer, its configuration and a job of one process with one thread on the CPU, on any machine."""
    t, threads = trainer(), torch.get_num_threads()
    no_gpu = mock.patch("torch.cuda.is_available", return_value=False)
    with mock.patch.dict(os.environ), no_gpu, mock.patch("os.cpu_count", return_value=1):
        try:
            yield t, t.load_config(ARGS), t.start()
        finally:
            t.stop()
            torch.set_num_threads(threads)


def sample() -> dict[str, list]:
    """Sample 64 problems; for each number of correct responses, keep the group whose lengths differ most."""
    with job() as (t, c, ranks):
        tokenizer = t.load_tokenizer(c.model)
        problems, prompts = (part[:64] for part in t.load_train(c, tokenizer))
        engine, sampling = t.make_engine(c, tokenizer, ranks), t.Sampling(MAX_TOKENS)
        share = t.rollout(engine, prompts, GROUP_SIZE, sampling, c.seed, ranks)
        with t.Verifier() as verifier:
            batch = t.gather(share, t.grade(problems, share.responses, verifier, c.reward), problems, prompts, ranks)
    correct, truncated = [s.correct for s in batch.scores], [s.truncated for s in batch.scores]
    columns = dict(zip(BATCH, (batch.prompts, batch.responses, batch.logprobs, correct, truncated), strict=True))
    groups = [{k: v[i : i + GROUP_SIZE] for k, v in columns.items()} for i in range(0, len(correct), GROUP_SIZE)]
    groups.sort(key=lambda g: len({len(ids) for ids in g["responses"]}))
    chosen = {sum(g["correct"]): g for g in groups}  # the last group with each number of correct responses is kept
    return {k: [row for n in sorted(chosen) for row in chosen[n][k]] for k in BATCH}


def recorded_batch(t: SimpleNamespace, record: dict[str, list]) -> Any:
    """The batch in the trainer's form after grading."""
    scores = [t.Score(ok, None, cut, False) for ok, cut in zip(record["correct"], record["truncated"], strict=True)]
    groups = []
    for i in range(0, len(scores), GROUP_SIZE):
        rows = zip(*(record[k][i : i + GROUP_SIZE] for k in ("responses", "logprobs", "truncated")), strict=True)
        responses = [t.Response(ids, logp, "length" if cut else "stop", "", 0) for ids, logp, cut in rows]
        samples = [t.Sample(*both) for both in zip(responses, scores[i : i + GROUP_SIZE], strict=True)]
        groups.append(t.Group(t.Problem(str(i), "", ""), record["prompts"][i], samples))
    return t.Batch(groups)


def new_learner(t: SimpleNamespace, c: Any, ranks: Any) -> Any:
    """Make a learner without a watchdog."""
    return t.Learner(
        c,
        ranks,
        SimpleNamespace(
            phase=t.PhaseTimer(), progress=lambda *where: None, token_values=lambda *of: None, folder=Path("nowhere")
        ),
    )


def compute(record: dict[str, list]) -> dict[str, list]:
    """Compute rewards and advantages of the recorded batch, and the results of several updates on it."""
    with job() as (t, c, ranks):
        batch = recorded_batch(t, record)
        lead = t.advantages(batch.scores, batch.lengths, c, ranks.device)
        learner = new_learner(t, c, ranks)
        policy = learner.policy
        out: dict[str, list] = {"reward": lead.reward.tolist(), "advantage": lead.advantage.tolist(), "updates": []}
        first = parameters(policy)
        for _ in range(UPDATES):
            update = learner.step(batch, lead, 0)
            now = parameters(policy)
            out["updates"].append(
                {
                    "loss": update["loss"],
                    "grad_norm": update["grad_norm"],
                    "sum": now.sum().item(),
                    "distance": (now - first).norm().item(),  # norm of the sum of all updates so far
                    "entries": now[len(now) // 32 :: len(now) // 16][:16].tolist(),
                }
            )
    return out


def parameters(policy: torch.nn.Module) -> torch.Tensor:
    """All parameters in one float64 vector."""
    return torch.cat([p.detach().full_tensor().flatten() for p in policy.parameters()]).double()  # type: ignore


def test_a_recorded_batch_gives_the_recorded_numbers():
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    now = compute(record)
    for key in ("reward", "advantage"):
        assert now[key] == close_to(record[key]), key
    for n, (a, b) in enumerate(zip(now["updates"], record["updates"], strict=True), 1):
        for key in b:
            assert a[key] == close_to(b[key]), f"{key} of update {n}"


def test_a_step_hands_the_outcomes_to_the_loss_and_not_the_advantages():
    """Advantages computed beforehand only decide what is trained on: other nonzero numbers give the same weights."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    few = {k: v[:8] for k, v in record.items() if k in BATCH}
    seen, weights = [], []
    from lead_fast.learner import loss

    def watched(hidden: Any, head: Any, tokens: Any, sequences: Any, *args: Any, **kw: Any) -> Any:
        seen.append(type(sequences.advantages).__name__)
        return real(hidden, head, tokens, sequences, *args, **kw)

    real = loss.linear_policy_loss
    for change in (False, True):
        with job() as (t, c, ranks), mock.patch.object(loss, "linear_policy_loss", watched):
            batch = recorded_batch(t, few)
            lead = t.advantages(batch.scores, batch.lengths, c, ranks.device)
            if change:
                lead = lead._replace(advantage=torch.where(lead.advantage == 0, 0.0, 7.0))
            learner = new_learner(t, c, ranks)
            learner.step(batch, lead, 0)
            weights.append(parameters(learner.policy))
    assert set(seen) == {"Groups"} and torch.equal(*weights)


def test_recomputed_log_probs_are_those_before_the_first_of_several_updates():
    """If they were recomputed before each update, every ratio would be 1 and nothing would ever be clipped."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    few = {k: v[:16] for k, v in record.items() if k in BATCH}
    with job() as (t, c, ranks):
        optim = dataclasses.replace(c.optim, updates=2, lr=1e-3)
        c = dataclasses.replace(c, optim=optim, loss=dataclasses.replace(c.loss, old_logprobs="recompute"))
        batch = recorded_batch(t, few)
        update = new_learner(t, c, ranks).step(batch, t.advantages(batch.scores, batch.lengths, c, ranks.device), 0)
    assert abs(update["ratio_mean"] - 1) > 1e-4


def close_to(expected: Any) -> Any:
    """Compare with tolerance for the rounding of other machines."""
    return pytest.approx(expected, rel=1e-5, abs=1e-6)


def rounded(x: Any) -> Any:
    """Round to nine digits, which distinguish every float32 from its neighbours."""
    if isinstance(x, dict):
        return {k: rounded(v) for k, v in x.items()}
    if isinstance(x, list):
        return [rounded(v) for v in x]
    return float(f"{x:.9g}") if isinstance(x, float) else x


def write_record() -> None:
    """Write the file that the test reads, one key per line."""
    old = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else sample()
    batch = rounded({k: old[k] for k in BATCH})
    lines = [f'"{k}": {json.dumps(v)}' for k, v in (batch | rounded(compute(batch))).items()]
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    print(f"{RECORD}: {len(batch['responses'])} responses, {UPDATES} updates")


if __name__ == "__main__":
    if sys.argv[1:] != ["--record"]:
        sys.exit("error: run it by pytest, or give --record.")
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
    write_record()
