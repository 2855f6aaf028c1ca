"""Test the paper's stages in sequence with the embedded model: SFT, RL, problems chosen by solve rate, RL, release."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from jobs import python, records, succeeded, torchrun
from safetensors.torch import load_file

from lead_fast.data.prepare import main as data
from lead_fast.data.read import load_problems

TRAIN = "--data.train=arithmetic:train?n=32&seed=1"
SMALL = ["--rollout.problems=8", "--rollout.group_size=4", "--rollout.max_tokens=48", "--evaluate.every=0"]
HARD = ["--seed=1", "--advantage.length_reward=false", "--reward.repetition=-1.5", "--data.sampling=solve_rate",
        "--advantage.group_filter=uniform", "--rollout.refill=2", "--optim.lr=1e-3"]  # fmt: skip


def run(*args: str, ranks: int = 1) -> str:
    return succeeded(python("-m", *args) if ranks == 1 else torchrun(ranks, "-m", *args)).stdout


@pytest.fixture(scope="module")
def stages(tmp_path_factory) -> Path:
    """Make sft/, one/ and hard.parquet, each from the stage before."""
    at = tmp_path_factory.mktemp("stages")
    sft = ["--recipe=tiny", "--from_scratch=false", "--batch_tokens=512", "--validate_every=1", "--checkpoint_every=2",
           "--optim.lr=1e-4", "--optim.warmup_steps=0", "--optim.schedule=constant", TRAIN,
           "--data.test=arithmetic:test?n=8"]  # fmt: skip
    with ThreadPoolExecutor() as pool:
        unbroken = pool.submit(run, "lead_fast.sft", *sft, "--steps=3", f"--output={at}/sft")
        run("lead_fast.sft", *sft, "--steps=2", f"--output={at}/sft-again")
        unbroken.result()
    run("lead_fast.sft", *sft, "--steps=3", f"--output={at}/sft-again", "--resume")
    run("lead_fast.train", f"--model={at}/sft", TRAIN, *SMALL, "--steps=3", f"--output={at}/one")
    source = TRAIN.removeprefix("--data.train=")
    data(["select", source, "--rollouts", f"{at}/one", "--most", "0.5", "--out", f"{at}/hard.parquet"])
    return at


def test_sft_that_was_stopped_ends_where_it_would_have(stages):
    unbroken, again = (load_file(stages / name / "final" / "model.safetensors") for name in ("sft", "sft-again"))
    assert all((unbroken[k] == again[k]).all() for k in unbroken)
    losses = [[(r["step"], r["loss"], r["validation_loss"]) for r in records(stages / n)] for n in ("sft", "sft-again")]
    assert losses[0] == losses[1] and [r[0] for r in losses[0]] == [1, 2, 3]


def test_a_stage_begins_with_the_weights_of_the_one_before(stages):
    (first, *_) = [r for r in records(stages / "one") if r["kind"] == "train"]
    assert first["logprob_diff_max"] < 1e-3  # engine and trainer hold the same weights
    config = (stages / "one" / "config.toml").read_text()
    assert f'path = "{stages}/sft"' in config
    card = (stages / "one" / "final" / "README.md").read_text()
    assert f"from `{stages}/sft`" in card


def test_the_set_of_stage_two_is_what_stage_one_rarely_solved(stages):
    rows = [json.loads(line) for line in (stages / "one" / "solved.jsonl").read_text().splitlines()]
    assert len(rows) == 24 and all(r["sampled"] == 4 for r in rows)
    hard = {p.problem for p in load_problems(str(stages / "hard.parquet"))}
    assert hard == {r["problem"] for r in rows if r["correct"] <= 2} and 8 <= len(hard) < 24


@pytest.mark.slow
def test_stage_two_draws_by_solve_rate_refills_and_resumes_as_if_never_stopped(stages, tmp_path):
    stage = ["lead_fast.train", f"--model={stages}/one", f"--data.train={stages}/hard.parquet", *HARD, *SMALL,
             "--rollout.problems=4", "--checkpoint_every=2"]  # fmt: skip
    run(*stage, "--steps=4", f"--output={tmp_path}/unbroken", ranks=2)
    run(*stage, "--steps=2", f"--output={tmp_path}/again", ranks=2)
    run(*stage, "--steps=4", f"--output={tmp_path}/again", "--resume", ranks=2)
    runs = []
    for name in ("unbroken", "again"):
        steps = [r for r in records(tmp_path / name) if r["kind"] == "train"]
        asked = [json.loads(line) for line in (tmp_path / name / "solved.jsonl").read_text().splitlines()]
        runs.append((steps, asked, load_file(tmp_path / name / "final" / "model.safetensors")))
    (steps, asked, weights), (steps_again, asked_again, weights_again) = runs
    assert [r["step"] for r in steps] == [1, 2, 3, 4]
    refilled = sum(r["groups_refilled"] for r in steps)
    assert refilled and len(asked) > 16  # problems asked in place of dropped ones are recorded too
    assert all(r["groups_dropped"] <= 4 for r in steps)
    assert asked_again == asked and [r["accuracy"] for r in steps_again] == [r["accuracy"] for r in steps]
    assert all((weights[k] == weights_again[k]).all() for k in weights)
