"""Supervised fine-tuning end to end, its data sources, and what it shares with training."""

import json

import pytest
from test_training import torchrun

from lead_fast.cli import load_config
from lead_fast.config import OptimConfig
from lead_fast.data import read
from lead_fast.data.read import load_problems
from lead_fast.learner.model import load_model
from lead_fast.learner.optimizer import make_optimizer
from lead_fast.learner.policy import Policy


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


@pytest.mark.parametrize("source, says", [("owner/data", "is a folder: give a"), ("notes", "is neither .jsonl")])
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


def test_a_checkpoint_is_resumed_with_either_choice_of_what_is_decayed(tmp_path):
    """Weights and AdamW's moments are the checkpoint's, the decay is the configuration's."""
    (tmp_path / "resume.py").write_text(RESUME)
    done = torchrun(2, str(tmp_path / "resume.py"), str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[[")))
    assert all(row[:3] == [True, True, True] for row in found)
    assert [row[3] for row in found] == [[0.2, 0.0], [0.2], [0.2, 0.0], [0.2]]
