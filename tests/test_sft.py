"""Test supervised fine-tuning end to end, its data sources, and what it shares with training."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from jobs import ROOT, torchrun

from lead_fast.checks import check, check_sft
from lead_fast.cli import load_config
from lead_fast.config import Config, OptimConfig, SftConfig
from lead_fast.data import read
from lead_fast.data.read import load_problems
from lead_fast.learner.memory import remedy
from lead_fast.learner.model import load_model
from lead_fast.learner.optimizer import make_optimizer
from lead_fast.learner.policy import Policy
from lead_fast.report import read_run


@pytest.fixture
def no_hub(monkeypatch):
    def asked(name: str, *_: str) -> list[dict]:
        pytest.fail(f"the hub was asked for {name}")

    monkeypatch.setattr(read, "_read_hub", asked)


@pytest.mark.parametrize("source", ["nowhere.csv", "nowhere.jsonl", "nowhere.parquet", "./nowhere", "../nowhere",
                                    "/nowhere/at/all", "a/b/nowhere", "nowhere/", "~/nowhere"])  # fmt: skip
def test_what_looks_like_a_file_is_not_asked_for_at_the_hub(source, no_hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as e:
        load_problems(source)
    assert str(e.value).startswith(f"{source} does not exist: give")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "source, says", [("owner/data", "is a folder without data files: give a"), ("notes", "is neither .jsonl")]
)
def test_a_folder_or_another_file_is_refused_by_its_name(source, says, no_hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "data").mkdir(parents=True)
    (tmp_path / "notes").write_text("1")
    with pytest.raises(ValueError, match=says) as e:
        load_problems(source)
    assert source in str(e.value)


@pytest.mark.parametrize("source", ["owner/name", "gsm8k", "owner/name:main"])
def test_a_hub_name_is_asked_for_at_the_hub(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(read, "_read_hub", lambda name, *_: [{"problem": name, "answer": "1"}])
    assert load_problems(source)[0].problem == source


# ---------------------------------------------------------------------------------------------------------- optimiser


def test_norms_and_biases_are_decayed_unless_spared():
    policy = Policy(load_model(load_config([]).model))
    (group,) = make_optimizer(policy, OptimConfig(weight_decay=0.1)).param_groups
    assert len(group["params"]) == len(list(policy.parameters())) and group["weight_decay"] == 0.1
    decayed, spared = make_optimizer(policy, OptimConfig(weight_decay=0.1, decay_norms_and_biases=False)).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    names = {id(p): n for n, p in policy.named_parameters()}
    assert spared["params"] and all("norm" in names[id(p)] or "bias" in names[id(p)] for p in spared["params"])
    assert not any("norm" in names[id(p)] or "bias" in names[id(p)] for p in decayed["params"])
    assert len(decayed["params"]) + len(spared["params"]) == len(names)


RESUME = """
import json, sys, torch
from pathlib import Path
from lead_fast.cli import load_config
from lead_fast.learner import checkpoint
from lead_fast.learner.optimizer import make_optimizer, update
from lead_fast.learner.policy import load_policy
from lead_fast.runtime.ranks import start, stop

def made(*args):
    c = load_config(["--recipe=tiny", *args])
    policy = load_policy(c.model, c.parallel, ranks)
    return policy, make_optimizer(policy, c.optim)

def moments(policy, optimizer):
    return torch.cat([optimizer.state[p][k].full_tensor().flatten() for p in policy.parameters()
                      for k in ("exp_avg", "exp_avg_sq")])

ranks, out = start(), []
for before, after in (("true", "false"), ("false", "true"), ("false", "false"), ("true", "true")):
    run = Path(sys.argv[1]) / f"{before}-{after}"
    policy, optimizer = made(f"--optim.decay_norms_and_biases={before}", "--optim.weight_decay=0.1")
    for i, p in enumerate(policy.parameters()):
        p.grad = torch.full_like(p, 0.01 * (i + 1))
    update(policy, optimizer, 1e-3, 1.0)
    assert checkpoint.save(run, 1, policy, optimizer, {}, ranks)
    again, resumed = made(f"--optim.decay_norms_and_biases={after}", "--optim.weight_decay=0.2")
    checkpoint.load(run, again, resumed, ranks)
    same = [torch.equal(a.full_tensor(), b.full_tensor()) for a, b in zip(policy.parameters(), again.parameters())]
    first, second = moments(policy, optimizer), moments(again, resumed)
    out.append([all(same), torch.equal(first, second), bool(first.any()),
                [g["weight_decay"] for g in resumed.param_groups]])
if ranks.main:
    print(json.dumps(out))
stop()
"""


def test_a_checkpoint_resumes_with_either_choice_of_decayed_weights(tmp_path):
    """Weights and AdamW's moments come from the checkpoint, the decay from the configuration."""
    (tmp_path / "resume.py").write_text(RESUME)
    done = torchrun(2, str(tmp_path / "resume.py"), str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[[")))
    assert all(row[:3] == [True, True, True] for row in found)
    assert [row[3] for row in found] == [[0.2, 0.0], [0.2], [0.2, 0.0], [0.2]]


# ---------------------------------------------------------------------------------------------------------------- runs

SMALL = ["--recipe=tiny", "--batch_tokens=256", "--optim.warmup_steps=0", "--data.train=arithmetic:train?n=32&seed=1",
         "--data.test=arithmetic:test?n=8"]  # fmt: skip
WANDB = """
import json
def init(**told):
    print("wandb", told["project"], flush=True)
    return Run()
class Run:
    def define_metric(self, *args, **told): pass
    def log(self, told): print("logged", json.dumps(sorted(told)), flush=True)
    def finish(self): print("finished", flush=True)
"""


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_measures_its_packs_rehearses_and_writes_to_every_sink(tmp_path):
    """parallel.pack_tokens=0 means measured, which a CPU cannot do: there it is 16,384, as in training."""
    run = tmp_path / "run"
    (tmp_path / "wandb.py").write_text(WANDB)
    path = os.pathsep.join(map(str, (tmp_path, ROOT, ROOT / "kernels")))
    done = torchrun(2, "-m", "lead_fast.sft", *SMALL, "--steps=3", "--validate_every=2", "--parallel.pack_tokens=0",
                    "--parallel.rehearse=always", "--wandb=mine", f"--output={run}", PYTHONPATH=path)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Rehearsal: a pack of 16,384 tokens fits") == 1
    rows = records(run)
    assert [(r["kind"], r["step"], "validation_loss" in r) for r in rows] == [
        ("sft", 1, False), ("sft", 2, True), ("sft", 3, True)]  # fmt: skip
    keys = {"step", "loss", "grad_norm", "learning_rate", "elapsed_s", "tokens", "tokens_per_s", "seconds", "alerts"}
    assert all(keys <= r.keys() and r["loss"] > 0 and r["tokens"] >= 256 for r in rows)
    assert re.search(r"^sft 3/3  loss +[\d.]+  held-out +[\d.]+  grad", done.stdout, re.M)
    assert list((run / "tensorboard").glob("events.*"))
    with pytest.raises(ValueError, match="is a run of lead_fast.sft"):
        read_run(run)
    assert done.stdout.count("wandb mine") == 1 and done.stdout.count("logged") == 3 and "sft/loss" in done.stdout
    assert (run / "final" / "README.md").read_text().count("validation_loss") >= 2


def test_ctrl_c_saves_and_the_run_is_resumed(tmp_path):
    run = tmp_path / "run"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "-m", "lead_fast.sft", *SMALL, "--validate_every=0", f"--output={run}"]
    process = subprocess.Popen(
        [*command, "--steps=5000"], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    until = time.monotonic() + 240
    while time.monotonic() < until and process.poll() is None and not (run / "metrics.jsonl").exists():
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # like a terminal
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err[-3000:]
    step = len(records(run))
    assert f"Asked to stop: saved after step {step}; resume with --output={run} --resume." in out
    assert (run / "checkpoints" / "latest").read_text() == f"step-{step}" and not (run / "final").exists()
    assert "resume = false" in (run / "config.toml").read_text()
    again = subprocess.run(
        [*command, f"--steps={step + 1}", "--resume"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=240
    )
    assert again.returncode == 0, again.stderr[-3000:]
    rows = records(run)
    assert [r["step"] for r in rows] == list(range(1, step + 2)) and rows[-1]["elapsed_s"] > rows[-2]["elapsed_s"]
    assert (run / "final" / "config.json").is_file() and "resume = false" in (run / "config.toml").read_text()


NOT_FINITE = """
import sys
from lead_fast import sft
pack_loss = sft.pack_loss
def spoilt(policy, pack, tokens):
    sft.calls = getattr(sft, "calls", 0) + 1
    return pack_loss(policy, pack, tokens) * (float("nan") if sft.calls == 1 else 1.0)
sft.pack_loss = spoilt
sft.main(sys.argv[1:])
"""


def test_the_batch_of_a_skipped_update_is_kept(tmp_path):
    (tmp_path / "spoilt.py").write_text(NOT_FINITE)
    run = tmp_path / "run"
    done = torchrun(1, str(tmp_path / "spoilt.py"), *SMALL, "--steps=2", "--validate_every=0", f"--output={run}")
    assert done.returncode == 0, done.stderr[-3000:]
    kept = run / "nonfinite" / "step-1.json"
    assert f"step 1: loss or gradient not finite, update skipped; its batch is in {kept}." in done.stdout
    examples = json.loads(kept.read_text())["examples"]
    assert sum(len(e["prompt"]) + len(e["solution"]) - 1 for e in examples) == records(run)[0]["tokens"] >= 256
    assert all("boxed" in e["text"] for e in examples)
    assert [r["updates_skipped"] for r in records(run)] == [1, 0] and [*kept.parent.iterdir()] == [kept]


HANG = """
import sys, time
from lead_fast import sft
sft.update = lambda *args: time.sleep(600)
sft.main(sys.argv[1:])
"""


def test_the_watchdog_ends_a_run_that_hangs(tmp_path):
    (tmp_path / "hang.py").write_text(HANG)
    done = torchrun(1, str(tmp_path / "hang.py"), *SMALL, "--watchdog_s=5", f"--output={tmp_path / 'run'}", timeout=240)
    assert done.returncode != 0 and re.search(r"Watchdog \(5 s\): rank 0 .* phase optim, step 1", done.stderr)


def test_the_remedy_for_too_little_memory_names_sfts_own_limit():
    class One:
        world, rank = 1, 0

    c = load_config(["--recipe=lead-14b-sft", "--parallel.offload=both"], cls=SftConfig)
    assert "max_solution_tokens" in remedy(c, 4096, 8192, One)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "args, says",
    [
        (["--batch_tokens=0"], "batch_tokens is 0: give a whole number from 1 to"),
        (["--validate_every=-1"], "validate_every is -1: give a whole number from 0 to 1000000000 (0: after the last"),
        (["--checkpoint_every=-1"], "checkpoint_every is -1: give a whole number from 0 to 1000000000 (0: never)."),
        (["--watchdog_s=-1"], "watchdog_s is -1.0: give"),
        (["--optim.grad_clip=-1"], "optim.grad_clip is -1.0: give a number from 0 to 1000000000 (0: off)."),
        (["--optim.lr=-1"], "optim.lr is -1.0: give a number from 0 to 1."),
        (["--optim.betas=[0.9,1.0]"], "optim.betas is [0.9, 1.0]"),
        (["--parallel.pack_tokens=-1"], "parallel.pack_tokens is -1"),
    ],
)
def test_mistakes_get_one_sentence_before_a_model_is_loaded(args, says):
    with pytest.raises(ValueError) as e:
        check_sft(load_config(args, cls=SftConfig))
    assert str(e.value).startswith(says) and "\n" not in str(e.value)
    if args[0].startswith(("--optim", "--checkpoint_every")):
        with pytest.raises(ValueError, match=re.escape(says.split(":")[0])):
            check(load_config(args, cls=Config), 1)
